"""Resolve image references of a manifest: URLs and data URIs pass, local images get a content hash and size. Edge.

This module reads image files and their headers. It never uses the network and never decodes an image.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import struct
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from batch.image_formats import READABLE
from batch.manifest.hashing import content_hash
from batch.manifest.inputs import shorten
from batch.manifest.types import CellError, FileFact, FileFacts, FileKey, Resolved
from batch.system.descriptors import patiently
from batch.types import LocalImage

__all__ = ["MemoryFacts", "SourceImages"]

_WEB = re.compile(r"https?://[^\s/?#\0][^\0]*\Z", re.IGNORECASE)
# At least two letters before the colon: C:\cat.jpg is a path.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_DATA = re.compile(r"data:(image/[\w.+-]+)(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
# Raised by Pillow's plugins for damaged images (`Image.open` treats the first four alike).
_BROKEN = (SyntaxError, IndexError, TypeError, struct.error, KeyError, ValueError, EOFError, OSError)
_PIXELS = 1_000_000  # in a megapixel, as in the price
_READERS = 8


class MemoryFacts:
    """A cache of file facts in memory; beyond `limit` entries the oldest are dropped."""

    def __init__(self, limit: int = 200_000) -> None:
        self._limit = limit
        self._facts: dict[FileKey, FileFact] = {}

    def get_many(self, keys: Sequence[FileKey]) -> Mapping[FileKey, FileFact]:
        """Return the known facts of the given keys."""
        return {key: self._facts[key] for key in keys if key in self._facts}

    def put_many(self, facts: Mapping[FileKey, FileFact]) -> None:
        """Store facts."""
        self._facts.update(facts)
        for key in list(self._facts)[: max(0, len(self._facts) - self._limit)]:
            del self._facts[key]


class SourceImages:
    """Resolves the image column of one manifest.

    Args:
        folder: base folder of relative paths: the folder of the manifest.
        max_megapixels: a larger local image or data URI is an error of its row.
        facts: cache of file facts; default: a cache in memory.
    """

    def __init__(self, folder: Path, max_megapixels: float, facts: FileFacts | None = None) -> None:
        self._folder = folder
        self._max_megapixels = max_megapixels
        self._facts: FileFacts = MemoryFacts() if facts is None else facts

    def __repr__(self) -> str:
        return f"SourceImages({str(self._folder)!r}, max_megapixels={self._max_megapixels})"

    def resolve(self, references: Sequence[object]) -> list[Resolved | CellError]:
        """Resolve cells in order; the value of a cell never raises.

        A cell is text (URL, data URI, path, `file://`), bytes, a mapping with `bytes` and `path` as in Hugging Face
        datasets, or None. Only the size of `http(s)` images is unknown, because nothing is downloaded.
        """
        with warnings.catch_warnings():
            # Pillow's warnings about odd metadata do not matter here, only whether the image is usable.
            warnings.filterwarnings("ignore", module="PIL")
            return self._resolve(references)

    def _resolve(self, references: Sequence[object]) -> list[Resolved | CellError]:
        resolved: list[Resolved | CellError] = []
        local: dict[int, Path] = {}
        for index, reference in enumerate(references):
            if isinstance(reference, str) and _WEB.match(reference):
                resolved.append(Resolved(reference))
                continue
            answer = self._one(reference)
            if isinstance(answer, Path):
                local[index] = answer
                answer = CellError("file_not_found", "")
            resolved.append(answer)
        if local:
            files = self._files(sorted(set(local.values())))
            for index, path in local.items():
                resolved[index] = files[path]
        return resolved

    def _one(self, reference: object) -> Resolved | CellError | Path:
        """Resolve one reference, except a local path, which is returned for `_files`."""
        name = "image"
        if isinstance(reference, Mapping):
            name = Path(str(reference.get("path") or name)).name
            reference = reference.get("bytes") or reference.get("path")
            if isinstance(reference, str) and _WEB.match(reference):
                return Resolved(reference)
        if isinstance(reference, bytes) and reference:
            return self._embedded(reference, name)
        if not isinstance(reference, str) or not reference.strip():
            return CellError("missing", "the cell is empty; give a URL, a path or an image")
        if reference[:5].lower() == "data:":
            return self._data_uri(reference)
        return _path_of(reference, self._folder)

    def _embedded(self, data: bytes, name: str) -> Resolved | CellError:
        megapixels = self._measure(io.BytesIO(data), name)
        if isinstance(megapixels, CellError):
            return megapixels
        digest = content_hash(data)
        return Resolved(f"sha256:{digest}", LocalImage(digest, len(data), data=data, name=name), megapixels)

    def _data_uri(self, uri: str) -> Resolved | CellError:
        head = _DATA.match(uri)
        if head is None:
            return CellError("data_uri", f"invalid data URI {shorten(uri, 40)!r}: use data:image/...;base64,...")
        try:
            data = base64.b64decode(uri[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            return CellError("data_uri", f"{shorten(uri, 40)!r} is not valid base64 ({error}); encode the image again")
        megapixels = self._measure(io.BytesIO(data), shorten(uri, 40))
        return megapixels if isinstance(megapixels, CellError) else Resolved(uri, None, megapixels)

    def _files(self, paths: list[Path]) -> dict[Path, Resolved | CellError]:
        """Stat each file once; read only files without known facts."""
        answers: dict[Path, Resolved | CellError] = {}
        keys: dict[Path, FileKey] = {}
        for path in paths:
            key = _stat(path)
            if isinstance(key, CellError):
                answers[path] = key
            else:
                keys[path] = key
        known = self._facts.get_many(list(keys.values()))
        unknown = [path for path, key in keys.items() if key not in known]
        read = dict(zip(unknown, self._read_all(unknown), strict=True))
        fresh = {keys[path]: fact for path, fact in read.items() if isinstance(fact, FileFact)}
        if fresh:
            self._facts.put_many(fresh)
        for path, key in keys.items():
            fact = known[key] if key in known else read[path]
            answers[path] = fact if isinstance(fact, CellError) else self._local(path, key, fact)
        return answers

    def _local(self, path: Path, key: FileKey, fact: FileFact) -> Resolved | CellError:
        # Checked again: the fact may come from a run with a higher limit.
        fault = self._too_large(fact.megapixels, str(path))
        image = LocalImage(fact.sha256, key.size_bytes, path=path, name=path.name)
        return fault or Resolved(f"sha256:{fact.sha256}", image, fact.megapixels)

    def _read_all(self, paths: list[Path]) -> list[FileFact | CellError]:
        if len(paths) < _READERS:
            return [self._read(path) for path in paths]
        with ThreadPoolExecutor(_READERS, "images") as readers:  # hashing and disk reads release the GIL
            try:
                found = readers.map(self._read, paths)
            except RuntimeError:  # the main thread has ended, so executors accept no work
                return [self._read(path) for path in paths]
            return list(found)

    def _read(self, path: Path) -> FileFact | CellError:
        try:
            with patiently(lambda: path.open("rb"), time.sleep) as file:
                megapixels = self._measure(file, str(path))
                if isinstance(megapixels, CellError):
                    return megapixels
                file.seek(0)
                return FileFact(file_digest(file, "sha256").hexdigest(), megapixels)
        except OSError as error:
            return _unreadable(path, error)

    def _measure(self, file: BinaryIO, name: str) -> float | CellError:
        size = _header_size(file)
        if size is None:
            known = "JPEG, PNG, WebP, GIF, AVIF, TIFF or BMP"
            return CellError("image_load_error", f"{name!r} is not a supported image; use {known}")
        megapixels = size[0] * size[1] / _PIXELS
        return self._too_large(megapixels, name) or megapixels

    def _too_large(self, megapixels: float, name: str) -> CellError | None:
        if megapixels <= self._max_megapixels:
            return None
        limit = f"limits.max_image_megapixels is {self._max_megapixels:g}"
        return CellError("image_too_large", f"{name!r} has {megapixels:.1f} megapixels, {limit}; scale it down")


def _path_of(reference: str, folder: Path) -> Path | CellError:
    scheme = _SCHEME.match(reference)
    if scheme is not None and scheme[1].lower() == "file":
        parts = urlsplit(reference)
        host = "" if parts.netloc.lower() == "localhost" else parts.netloc
        reference = url2pathname(host + parts.path)
    elif scheme is not None:
        what = "has an unsupported scheme"
        if scheme[1].lower() in {"http", "https"}:
            what = "contains a NUL character" if "\0" in reference else "has no host"
        return CellError(
            "unsupported_scheme", f"{shorten(reference)!r} {what}; give an http(s) URL, a data URI or a local path"
        )
    if reference.startswith("~"):
        return _at_home(reference, folder)
    return Path(os.path.abspath(folder / reference))  # noqa: PTH100 - Path.resolve would follow links


def _at_home(reference: str, folder: Path) -> Path | CellError:
    """Expand `~` or `~name` at the start of a path, as a shell does."""
    expanded = os.path.expanduser(reference)  # noqa: PTH111 - Path.expanduser raises for an unknown user
    first, slash, _ = reference.partition("/")
    if expanded == reference and first == "~":
        return CellError("file_not_found", f"{shorten(reference)!r}: the home folder is unknown; use the full path")
    if expanded == reference and slash and not (folder / first).exists():
        return CellError("file_not_found", f"{shorten(reference)!r}: there is no user {first[1:]!r}; use the full path")
    return Path(os.path.abspath(folder / expanded))  # noqa: PTH100


def _stat(path: Path) -> FileKey | CellError:
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return CellError(
            "file_not_found", f"there is no file {str(path)!r}; relative paths start at the manifest's folder"
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return _unreadable(path, error)
    if stat.S_ISDIR(facts.st_mode):
        return CellError("is_a_folder", f"{str(path)!r} is a folder; name an image in it")
    if not stat.S_ISREG(facts.st_mode):
        return CellError("unreadable", f"{str(path)!r} is not a regular file; name an image")
    return FileKey(str(path), facts.st_size, facts.st_mtime_ns)


def _unreadable(path: Path, error: Exception) -> CellError:
    reason = getattr(error, "strerror", None) or str(error)
    return CellError("unreadable", f"{shorten(path)!r} cannot be read ({reason}); check the name and its permissions")


def _header_size(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height from the header of an image; None if the file is not a supported image.

    The plugins are called directly: `Image.open` warns about or refuses large images by a process-wide limit, but here
    the user's limit decides.
    """
    Image.init()
    prefix = file.read(16)
    for name in READABLE:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(prefix) is not True):
            continue
        file.seek(0)
        try:
            return factory(file, "").size
        except _BROKEN:
            return None
    return None
