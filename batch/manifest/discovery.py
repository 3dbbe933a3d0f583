"""Find the files of a manifest: one file, a glob, or a folder of tables, a saved dataset or images. Edge."""

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
"""Formats in which a folder of files is one manifest."""
_SHOWN = 3
# At least two letters: C:\m.csv is a path. One slash is enough: pathlib collapses two into one.
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
    """The files of a manifest and their format."""

    kind: Kind
    paths: tuple[Path, ...]
    """The files in order; empty if the rows are the images of a folder."""
    folder: Path
    """Base folder of relative image paths."""
    notes: tuple[str, ...] = ()
    """Choices made during discovery, for the user: the files read and the files ignored."""
    has_images: bool = False
    """Whether the file is the metadata of a folder of images."""


def local(source: str | Path) -> Path:
    """Return the local path of a source, which may be a `file://` URL.

    Raises:
        ManifestError: the source is empty, or in an object store or on the web.
    """
    text = str(source)
    if not text.strip():
        raise ManifestError("the manifest name is empty; name a file (is a shell variable unset?)")
    remote = _REMOTE.match(text)
    if remote is None or os.path.exists(text):  # noqa: PTH110 - for any text, even one too long for a file name
        return Path(text)
    scheme = remote[1].lower()
    if scheme == "file":
        return Path(url2pathname(urlsplit(text).path))
    url = f"{remote[1]}://{text[remote.end() :]}"
    command = _DOWNLOADS.get({"gcs": "gs", "abfs": "az", "abfss": "az", "wasbs": "az", "s3a": "s3"}.get(scheme, scheme))
    advice = "download it and name the local copy" + (f", for example with: {command.format(url)}" if command else "")
    raise ManifestError(f"{url}: manifests in object stores and on the web are not supported yet; {advice}")


def find(source: Path, named: str | None) -> FoundManifest:
    """Find the files of a source and their format.

    Args:
        source: a file, a folder or a glob.
        named: the format from the settings; None: the file names decide.

    Raises:
        ManifestError: nothing readable was found.
    """
    try:
        is_folder, is_file, exists = source.is_dir(), source.is_file(), source.exists()
    except OSError as error:  # the name is too long, or a folder may not be entered
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
    """Return the first `HEAD_BYTES` bytes of a file.

    Raises:
        ManifestError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _near(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; the folder {missing.parent} does not exist either"
    names = [path.name for path in islice(missing.parent.iterdir(), 10_000)]
    near = difflib.get_close_matches(missing.name, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; check the contents of {missing.parent.absolute()}"


# --- globs ------------------------------------------------------------------------------------------------


def _matching(source: Path, named: str | None) -> FoundManifest:
    fixed = next(parent for parent in source.parents if not any(c in str(parent) for c in "*?["))
    kinds = (named,) if named in _PARTED else _PARTED
    matches = sorted(path for path in fixed.glob(str(source.relative_to(fixed))) if path.is_file())
    # Results count as rows if the pattern names them (`runs/*/results.parquet`), but not if it ends in a wildcard.
    parts = [path for path in matches if _is_part(path, fixed, of_runs=not any(c in source.name for c in "*?["))]
    for kind in kinds:
        found = [path for path in parts if named == kind or path.suffix.lower() in suffixes_of(kind)]
        if found:
            return FoundManifest(Kind(kind), tuple(found), fixed)
    hint = "name the folder of the images" if any(is_image(path.name) for path in matches) else "name one file"
    raise ManifestError(f"no Parquet or Arrow file matches {source}; for other formats {hint}")


def _is_part(path: Path, fixed: Path, *, of_runs: bool) -> bool:
    """Return whether a file is part of a table: not hidden, not another program's, not a result of a run."""
    inside = path.relative_to(fixed)
    if any(part.startswith(".") or _is_private(part) for part in inside.parts):
        return False
    return of_runs or not any(is_run_directory(fixed / parent) for parent in inside.parents if parent.parts)


def _is_private(part: str) -> bool:
    """Apply Spark's rule: `_temporary/` and `_metadata` are not part of a table, but `_key=value/` is."""
    return part.startswith("_") and "=" not in part


# --- folders ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Contents:
    """The relevant contents of a folder and its subfolders."""

    parts: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in _PARTED})
    images: int = 0
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    """Tables in formats that are always a single file."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of all other files by suffix."""
    skipped: list[str] = field(default_factory=list)
    """Descriptions of run directories and symlinked folders."""


def _in_folder(folder: Path, named: str | None) -> FoundManifest:
    if named not in {None, IMAGES, *_PARTED}:
        raise ManifestError(f"{folder} is a folder, but a {named} manifest is a single file; name the file")
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
                continue  # cache files of `map` and `filter` of datasets
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
    """Describe the files read, and the ignored files that the user may have meant."""
    left = []
    if kind != IMAGES and contents.images:
        left.append(f"{_images(contents)}, possibly referenced by its rows (--format images reads them as rows)")
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
