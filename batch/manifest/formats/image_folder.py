"""Read a folder of images as a manifest: one row per image, or the rows of its metadata file. Edge.

The names are listed once, when the folder is opened, so that a run sees the same rows throughout.
"""

from __future__ import annotations

import os
import posixpath
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

import polars as pl

from batch.errors import ManifestError
from batch.manifest.file_kinds import is_image
from batch.manifest.folders import files_below
from batch.manifest.formats.base import BATCH_ROWS, Chunk, Format
from batch.manifest.types import LoneSurrogate

__all__ = ["FILE_NAME", "ImageFiles", "ImageFilesWithMetadata"]

FILE_NAME = "file_name"
_END = b"\0"
"""Terminator of a file name: the one character that no name can contain."""
_HASHED_NAMES = 2**16
_SHOWN = 3


class ImageFiles:
    """The images below a folder, sorted by path: the relative path and the file name."""

    def __init__(self, folder: Path, image: str, rows: int | None) -> None:
        """List the images, at most `rows`; `image` is the name of the path column."""
        self._image = image
        self.schema = pl.Schema(dict.fromkeys((image, FILE_NAME), pl.String()))
        self._names: list[bytes] = []
        """Compressed blocks of names: a million names take about 8 MB."""
        self._hash = blake2b(digest_size=16)
        self.rows = 0
        names = islice(filter(is_image, files_below(folder)), rows)
        while block := [os.fsencode(name) + _END for name in islice(names, BATCH_ROWS)]:
            text = b"".join(block)
            self._hash.update(text)
            self._names.append(zlib.compress(text, 1))
            self.rows += len(block)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order, at most `size` at a time."""
        blocks = (zlib.decompress(block).split(_END)[:-1] for block in self._names)
        names = chain.from_iterable(blocks)
        while part := list(islice(names, size)):
            texts = [name.decode("utf-8", "replace") for name in part]
            columns = {FILE_NAME: [posixpath.basename(text) for text in texts]} | {self._image: texts}
            frame = pl.DataFrame(columns, schema_overrides=self.schema).select(self.schema.names())
            yield Chunk(frame, None, dict(self._unreadable(part)))

    def _unreadable(self, names: list[bytes]) -> Iterator[tuple[int, LoneSurrogate]]:
        """Yield names that are not UTF-8, which a table cannot hold."""
        for index, name in enumerate(names):
            try:
                name.decode()
            except UnicodeDecodeError:
                yield index, LoneSurrogate(self._image, os.fsdecode(name))

    def fingerprint(self) -> str:
        """Return a hash of the names; the contents of the images are part of the job keys."""
        return self._hash.hexdigest()


class ImageFilesWithMetadata:
    """The rows of a metadata file, whose column `file_name` names the image."""

    def __init__(self, path: Path, content: Format, image: str) -> None:
        """Add the column `image`, a copy of `file_name`, unless it has that name.

        Raises:
            ManifestError: the column `file_name` is missing or not text, or a column `image` exists.
        """
        names = content.schema.names()
        if FILE_NAME not in names:
            raise ManifestError(f"{path} has no column {FILE_NAME!r} with the images; its columns: {', '.join(names)}")
        if content.schema[FILE_NAME] not in {pl.String, pl.Null}:
            raise ManifestError(f"the column {FILE_NAME!r} of {path} must be text, not {content.schema[FILE_NAME]}")
        if image in names and image != FILE_NAME:
            raise ManifestError(
                f"{path} has the columns {FILE_NAME!r} and {image!r}; set manifest.image = {FILE_NAME!r} to restyle the"
                f" files of the folder, or name {path} as the manifest to restyle the images of {image!r}"
            )
        self._content, self._image = content, image
        self.rows = content.rows
        added = {} if image == FILE_NAME else {image: pl.String()}
        self.schema = pl.Schema({**added, **content.schema})

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order, at most `size` at a time."""
        for chunk in self._content.chunks(size):
            frame = chunk.frame.with_columns(pl.col(FILE_NAME).cast(pl.String).alias(self._image))
            yield chunk._replace(frame=frame.select(self.schema.names()))

    def require_all(self, path: Path, folder: Path) -> None:
        """Check that each image below a folder has a row; takes 8 bytes of memory per image.

        Raises:
            ManifestError: images without a row exist; the message names the first.
        """
        named = pl.concat([_normal(chunk.frame).hash() for chunk in self._content.chunks(_HASHED_NAMES)]).unique()
        images = filter(is_image, files_below(folder))
        without: list[str] = []
        count = 0
        while part := list(islice(images, _HASHED_NAMES)):
            names = pl.Series([_relative(name, folder, path.parent) for name in part])
            missing = names.filter(~names.hash().is_in(named.implode()))
            count += len(missing)
            without += missing.head(_SHOWN - len(without)).to_list()
        if count:
            shown = ", ".join(without[:_SHOWN]) + (", ..." if count > _SHOWN else "")
            advice = f"add rows for them, move them away, or rename {path.name} to use all images"
            raise ManifestError(
                f"{count:,} {'image has' if count == 1 else 'images have'} no row in {path}: {shown}; {advice}"
            )


def _normal(frame: pl.DataFrame) -> pl.Series:
    names = frame[FILE_NAME].cast(pl.String).drop_nulls().to_list()
    return pl.Series(map(posixpath.normpath, names), dtype=pl.String)


def _relative(name: str, folder: Path, start: Path) -> str:
    text = os.fsencode(name).decode("utf-8", "replace")
    return text if folder == start else posixpath.relpath(text, start.relative_to(folder).as_posix())
