"""From what a user names to files: one file, a glob, or a folder with tables, a saved dataset or images in it. Edge."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from batch.errors import ManifestError
from batch.manifest.file_kinds import HEAD_BYTES, IMAGES, Kind, is_image, kind_of, suffixes_of
from batch.manifest.folders import files_below, is_run_directory
from batch.manifest.inputs import shorten
from batch.manifest.saved_datasets import saved_files

__all__ = ["FoundManifest", "find", "head_of", "local"]

_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
_PARTED = ("parquet", "arrow")
"""Formats whose files in a folder are one manifest."""
_SHOWN = 3
# Two letters at least: C:\m.csv is a path. One slash is enough: pathlib makes one of two.
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_DOWNLOADS = {
    "s3": "aws s3 cp {} .",
    "gs": "gcloud storage cp {} .",
    "az": "az storage blob download",
    "hf": "hf download REPOSITORY",
    "http": "curl -LO {}",
    "https": "curl -LO {}",
}


class FoundManifest(NamedTuple):
    """What to read."""

    kind: Kind
    paths: tuple[Path, ...]
    """Its files in order; none where the rows are images."""
    folder: Path
    """Where relative paths of images start."""
    notes: tuple[str, ...] = ()
    """What was taken, where that was a choice."""
    has_images: bool = False
    """Whether the file is the metadata of the images of the folder that was named."""


def local(source: str | Path) -> Path:
    """The path that a source names, or a `file://` URL.

    Raises:
        ManifestError: it is empty, or lies in an object store or on the web.
    """
    text = str(source)
    if not text.strip():
        raise ManifestError("the manifest's name is empty; name a file (is a variable of the shell not set?)")
    remote = _REMOTE.match(text)
    if remote is None or os.path.exists(text):  # noqa: PTH110 - for any text, also one that is too long for a name
        return Path(text)
    scheme = remote[1].lower()
    if scheme == "file":
        return Path(url2pathname(urlsplit(text).path))
    url = f"{remote[1]}://{text[remote.end() :]}"
    command = _DOWNLOADS.get({"gcs": "gs", "abfs": "az", "abfss": "az", "wasbs": "az", "s3a": "s3"}.get(scheme, scheme))
    advice = "download it and name the local copy" + (f", for example with: {command.format(url)}" if command else "")
    raise ManifestError(f"{url}: manifests in object stores and on the web are not supported yet; {advice}")


def find(source: Path, named: str | None) -> FoundManifest:
    """The files of a source, and their format.

    Args:
        source: a file, a folder, or a glob.
        named: the format that the settings name; None: by the names of the files.

    Raises:
        ManifestError: nothing is there that can be read.
    """
    try:
        is_folder, is_file, exists = source.is_dir(), source.is_file(), source.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ManifestError(f"{shorten(source)} cannot be read ({error.strerror}); check the name") from error
    if is_folder:
        return _in_folder(source, named)
    if is_file:
        return FoundManifest(kind_of(source, named, head_of(source)), (source,), source.parent)
    if exists:
        raise ManifestError(f"{source} is not a regular file, and a manifest is read more than once; pipe it in with -")
    if any(character in str(source) for character in "*?["):
        return _matching(source, named)
    raise ManifestError(f"there is no manifest {source}{_near(source)}")


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _near(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; the folder {missing.parent} is not there either"
    names = [path.name for path in islice(missing.parent.iterdir(), 10_000)]
    near = difflib.get_close_matches(missing.name, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; look at what is in {missing.parent.absolute()}"


# --- globs ------------------------------------------------------------------------------------------------


def _matching(source: Path, named: str | None) -> FoundManifest:
    fixed = next(parent for parent in source.parents if not any(c in str(parent) for c in "*?["))
    kinds = (named,) if named in _PARTED else _PARTED
    matches = sorted(path for path in fixed.glob(str(source.relative_to(fixed))) if path.is_file())
    # Results are rows where the pattern names them, `runs/*/results.parquet`, and not where it takes all there is.
    parts = [path for path in matches if _is_part(path, fixed, of_runs=not any(c in source.name for c in "*?["))]
    for kind in kinds:
        found = [path for path in parts if named == kind or path.suffix.lower() in suffixes_of(kind)]
        if found:
            return FoundManifest(Kind(kind), tuple(found), fixed)
    hint = "name the folder of the images" if any(is_image(path.name) for path in matches) else "name one file"
    raise ManifestError(f"no Parquet or Arrow file matches {source}; for other formats {hint}")


def _is_part(path: Path, fixed: Path, *, of_runs: bool) -> bool:
    """Whether a file belongs to a table in several files: not hidden, not another program's, not a result."""
    inside = path.relative_to(fixed)
    if any(part.startswith(".") or _is_private(part) for part in inside.parts):
        return False
    return of_runs or not any(is_run_directory(fixed / parent) for parent in inside.parents if parent.parts)


def _is_private(part: str) -> bool:
    """As for Spark: `_temporary/` and `_metadata` are not the table's, but `_key=value/` is."""
    return part.startswith("_") and "=" not in part


# --- folders ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Contents:
    """What is below a folder, as far as it matters here."""

    parts: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in _PARTED})
    images: int = 0
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    """Tables that are given as one file."""
    others: Counter[str] = field(default_factory=Counter)
    """All other files, by their endings."""
    skipped: list[str] = field(default_factory=list)
    """Run directories and linked folders."""


def _in_folder(folder: Path, named: str | None) -> FoundManifest:
    if named not in {None, IMAGES, *_PARTED}:
        raise ManifestError(f"{folder} is a folder, and {named} is read from one file; name the file")
    saved = saved_files(folder) if named in {None, "arrow"} else None
    if saved is not None:
        return FoundManifest(Kind("arrow"), saved, folder)
    if is_run_directory(folder):
        raise ManifestError(f"{folder} is a run directory, not a manifest; name the manifest, or a file in the folder")
    contents = _look(folder)
    if contents.metadata and contents.images and named in {None, IMAGES}:
        return _with_metadata(folder, contents)
    for kind in _PARTED:
        names = contents.parts[kind]
        if names and named in {None, kind}:
            notes = _notes(contents, f"{_count(names, kind.title() + ' file')} of {folder}", kind)
            return FoundManifest(Kind(kind), tuple(folder / name for name in names), folder, notes)
    if contents.images and named in {None, IMAGES}:
        return FoundManifest(Kind(IMAGES), (), folder, _notes(contents, f"{_images(contents)} below {folder}", IMAGES))
    wanted = {IMAGES: "image", None: "Parquet file, Arrow file or image"}.get(named, f"{named} file")
    hint = f"name a file, for example {folder / contents.tables[0]}" if contents.tables else "name a manifest file"
    raise ManifestError(f"the folder {folder} has no {wanted} in it; {hint}")


def _look(folder: Path) -> _Contents:
    contents = _Contents()
    is_cache = (folder / "dataset_info.json").is_file()
    for name in files_below(folder, contents.skipped.append):
        path = Path(name)
        suffix = path.suffix.lower()
        kind = next((kind for kind in _PARTED if suffix in suffixes_of(kind)), None)
        if path.name in _METADATA:
            contents.metadata.append(name)
        if is_image(name):
            contents.images += 1
        elif kind is not None and not any(map(_is_private, path.parts)):
            if kind == "arrow" and is_cache and path.name.startswith(("cache-", "tmp")):
                continue  # what `map` and `filter` of datasets leave beside the rows
            contents.parts[kind].append(name)
        elif suffix in {*suffixes_of("csv"), *suffixes_of("tsv"), *suffixes_of("jsonl")}:
            contents.tables.append(name)
        else:
            contents.others[suffix or path.name] += 1
    return contents


def _with_metadata(folder: Path, contents: _Contents) -> FoundManifest:
    if len(contents.metadata) > 1:
        named = _shown(contents.metadata)
        raise ManifestError(f"{folder} has several metadata files ({named}); name one of their folders, or keep one")
    path = folder / contents.metadata[0]
    note = f"{_images(contents)} below {folder}, with the rows of {contents.metadata[0]}"
    for names in (*contents.parts.values(), contents.tables):
        if contents.metadata[0] in names:
            names.remove(contents.metadata[0])
    return FoundManifest(kind_of(path), (path,), path.parent, _notes(contents, note, IMAGES), has_images=True)


def _notes(contents: _Contents, taken: str, kind: str) -> tuple[str, ...]:
    """What was taken, and what of the rest may have been meant."""
    left = []
    if kind != IMAGES and contents.images:
        left.append(f"{_images(contents)} that may lie there for its rows (--format images takes them as rows)")
    if kind != "arrow" and contents.parts["arrow"]:
        left.append(_count(contents.parts["arrow"], "Arrow file"))
    if kind == IMAGES:
        tables = [*contents.parts["parquet"], *contents.tables]
        left += [f"{_count(tables, 'table')} (name {tables[0]} to read it)"] if tables else []
        endings = ", ".join(f"{count:,} {suffix}" for suffix, count in contents.others.most_common(_SHOWN))
        others = contents.others.total()
        left += [f"{others:,} other file{'s' * (others != 1)} ({endings})"] if others else []
    if contents.skipped:
        left.append(_shown(contents.skipped))
    if not left and kind != IMAGES:
        return ()
    return (taken + (f"; not read: {', '.join(left)}" if left else ""),)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _images(contents: _Contents) -> str:
    return f"{contents.images:,} image" + "s" * (contents.images != 1)


def _count(names: list[str], noun: str) -> str:
    return f"{len(names):,} {noun}" + "s" * (len(names) != 1)
