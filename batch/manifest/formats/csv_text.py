"""Text manifests: in which encoding a file is written, and which separator its columns have. Edge.

Owns byte order marks, decoding and the choice of a separator; refuses to know records and rows. A byte order mark
decides before the setting: a file that has one was saved in that encoding.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, TypeAlias

from batch.manifest.formats.base import Dialect
from batch.manifest.inputs import INPUTS

__all__ = ["Encoding", "Separator", "Unpack", "as_utf8", "encoding_of", "named", "separator_of", "undecodable"]

Unpack: TypeAlias = Callable[[Path], BinaryIO]

_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 2**16
_CANDIDATES = (",", ";", "\t", "|")
_EXCEL_LINE = re.compile(r'"?sep=([^"\r\n])"?[\r\n]*', re.IGNORECASE)
_HEADER_LINES = 100
"""Lines that a header may take, in quotes: with a wrong separator it could seem to reach to the end of the file."""


class Encoding(NamedTuple):
    """A codec of Python's, and what decided for it."""

    codec: str
    origin: str = ""
    """`byte order mark` or `manifest.encoding`; empty for UTF-8 that nothing asked for."""

    @property
    def is_utf8(self) -> bool:
        """Whether the bytes are UTF-8 as they are; a mark before them may have to be removed."""
        return self.codec == "utf-8-sig"

    @property
    def name(self) -> str:
        """For a person."""
        return self.codec.removesuffix("-sig").upper() if self.codec.startswith("utf") else self.codec


_UTF8 = Encoding("utf-8-sig")


def encoding_of(path: Path, unpack: Unpack, setting: str | None) -> Encoding:
    """By the file's byte order mark, else by `manifest.encoding`, else UTF-8."""
    with unpack(path) as stream:
        start = stream.read(4)
    for mark, codec in _MARKS:
        if start.startswith(mark):
            return Encoding(codec, "byte order mark")
    if setting is None:
        return _UTF8
    name = codecs.lookup(setting).name
    return Encoding("utf-8-sig" if name == "utf-8" else name, "manifest.encoding")


def as_utf8(unpack: Unpack, encoding: Encoding) -> Unpack:
    """The same bytes as UTF-8, for readers that know no other encoding."""
    if encoding.is_utf8:
        return unpack
    return lambda path: io.BufferedReader(_Recoded(unpack(path), encoding.codec), _CHUNK)


class _Recoded(io.RawIOBase):
    """A stream of text in some encoding as UTF-8, a piece at a time."""

    def __init__(self, stream: BinaryIO, codec: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._left = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            self._left = memoryview(self._decoder.decode(data, self._ended).encode())
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


# --- bytes that cannot be decoded -------------------------------------------------------------------------


def undecodable(path: Path, unpack: Unpack, encoding: Encoding) -> str:
    """A sentence about the first bytes of a file that its encoding does not allow."""
    found = _first_wrong(path, unpack, encoding.codec)
    place = str(path) if found is None else f"{path}, line {found.line}"
    bytes_ = "it" if found is None else f"byte 0x{found.byte:02x} at offset {found.offset}"
    if not encoding.origin:
        advice = 'save it as UTF-8, or set manifest.encoding to the encoding that it has, for example "cp1252"'
        return f"{place}: {bytes_} is not UTF-8; {advice}"
    if encoding.origin == "byte order mark":
        return f"{place}: {bytes_} is not {encoding.name}, which the byte order mark says; is the file complete?"
    advice = "set manifest.encoding to the encoding that the file has"
    return f"{place}: {bytes_} is not {encoding.name} (manifest.encoding); {advice}"


class _Wrong(NamedTuple):
    line: int
    offset: int
    byte: int


def _first_wrong(path: Path, unpack: Unpack, codec: str) -> _Wrong | None:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(codec)(), translate=True)
    line, offset = 1, 0
    with unpack(path) as stream:
        while True:
            data, before = stream.read(_CHUNK), decoder.getstate()
            try:
                line += decoder.decode(data, not data).count("\n")
            except UnicodeDecodeError:
                decoder.setstate(before)
                return _in_piece(decoder, data, line, offset)
            except UnicodeError:  # of codecs that do not say where
                return None
            offset += len(data)
            if not data:
                return None


def _in_piece(decoder: io.IncrementalNewlineDecoder, data: bytes, line: int, offset: int) -> _Wrong | None:
    """Byte by byte: a decoder says where it stopped, but not on which line."""
    for end in range(1, len(data) + 2):
        piece = data[end - 1 : end]
        try:
            line += decoder.decode(piece, not piece).count("\n")
        except UnicodeDecodeError as error:
            held = len(error.object) - len(piece)  # what it had kept of the pieces before
            start = offset + end - 1 - held + error.start
            return _Wrong(line, start, error.object[error.start])
    return None


# --- separators -------------------------------------------------------------------------------------------


class Separator(NamedTuple):
    """What stands between the columns of a file."""

    character: str
    origin: str = ""
    """What decided for it; empty where it is the usual one of the format."""
    lines_above: int = 0
    """Lines before the header: Excel's `sep=;`."""


def named(separator: str) -> str:
    """For a person: a tab is invisible in quotes."""
    return "tab" if separator == "\t" else repr(separator)


def separator_of(open_text: Callable[[], AbstractContextManager[TextIO]], usual: str, dialect: Dialect) -> Separator:
    """By the setting, else by a line `sep=;` at the top, else by the header.

    Of the header's possible separators it is the one with which most of the columns that the settings need are
    found. What stands in the rows decides nothing.
    """
    with open_text() as text:
        line = _EXCEL_LINE.fullmatch(text.readline(_CHUNK))
    above = 0 if line is None else 1
    if dialect.separator is not None:
        return Separator(dialect.separator, "manifest.separator", above)
    if line is not None:
        return Separator(line[1], "the line sep= at the top", above)
    candidates = dict.fromkeys((usual, *_CANDIDATES))
    headers = {candidate: _header(open_text, candidate) for candidate in candidates}
    best = max(headers, key=lambda candidate: _fit(headers[candidate], dialect, usual=candidate == usual))
    return Separator(best, "" if best == usual else "found in the header")


def _header(open_text: Callable[[], AbstractContextManager[TextIO]], separator: str) -> list[str]:
    """The names with this separator; none where they cannot be parsed with it."""
    with open_text() as text:
        try:
            return next(filter(None, csv.reader(islice(text, _HEADER_LINES), delimiter=separator, strict=True)), [])
        except csv.Error:
            return []


def _fit(names: list[str], dialect: Dialect, *, usual: bool) -> tuple[int, int, bool, bool, int]:
    plain = {name.strip() for name in names}
    return len(plain & dialect.needed), len(plain & INPUTS), len(names) > 1, usual, len(names)
