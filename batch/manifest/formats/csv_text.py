"""Detect the encoding and the column separator of text manifests. Edge.

This module handles byte order marks, decoding and separators, but not records. A byte order mark takes precedence
over the setting: a file with a mark was saved in that encoding.
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

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
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
"""Maximum lines of a header: with a wrong separator a quoted header could extend to the end of the file."""


class Encoding(NamedTuple):
    """A Python codec and the source of the choice."""

    codec: str
    origin: str = ""
    """`byte order mark` or `manifest.encoding`; empty for the default, UTF-8."""

    @property
    def is_utf8(self) -> bool:
        """Whether the bytes are already UTF-8, possibly with a byte order mark."""
        return self.codec == "utf-8-sig"

    @property
    def name(self) -> str:
        """The codec's name for messages."""
        return self.codec.removesuffix("-sig").upper() if self.codec.startswith("utf") else self.codec


_UTF8 = Encoding("utf-8-sig")


def encoding_of(path: Path, unpack: Unpack, setting: str | None) -> Encoding:
    """Return the encoding: the file's byte order mark decides, else `manifest.encoding`, else UTF-8."""
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
    """Return an opener that recodes the file to UTF-8, for readers without support for other encodings."""
    if encoding.is_utf8:
        return unpack
    return lambda path: io.BufferedReader(_Recoded(unpack(path), encoding.codec), _CHUNK)


class _Recoded(io.RawIOBase):
    """A stream that recodes text to UTF-8 in pieces."""

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
    """Return the message about the first bytes of a file that its encoding cannot decode."""
    found = _first_invalid(path, unpack, encoding.codec)
    place = str(path) if found is None else f"{path}, line {found.line}"
    bytes_ = "it" if found is None else f"byte 0x{found.byte:02x} at offset {found.offset}"
    if not encoding.origin:
        advice = 'save it as UTF-8, or set manifest.encoding to its encoding, for example "cp1252"'
        return f"{place}: {bytes_} is not UTF-8; {advice}"
    if encoding.origin == "byte order mark":
        return f"{place}: {bytes_} is not {encoding.name}, the encoding of the byte order mark; is the file complete?"
    advice = "set manifest.encoding to the file's encoding"
    return f"{place}: {bytes_} is not {encoding.name} (manifest.encoding); {advice}"


class _InvalidByte(NamedTuple):
    line: int
    offset: int
    byte: int


def _first_invalid(path: Path, unpack: Unpack, codec: str) -> _InvalidByte | None:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(codec)(), translate=True)
    line, offset = 1, 0
    with unpack(path) as stream:
        while True:
            data, before = stream.read(_CHUNK), decoder.getstate()
            try:
                line += decoder.decode(data, not data).count("\n")
            except UnicodeDecodeError:
                decoder.setstate(before)
                return _invalid_in(decoder, data, line, offset)
            except UnicodeError:  # the codec does not report the position
                return None
            offset += len(data)
            if not data:
                return None


def _invalid_in(decoder: io.IncrementalNewlineDecoder, data: bytes, line: int, offset: int) -> _InvalidByte | None:
    """Locate the invalid byte by decoding byte by byte: a decoder reports the offset, but not the line."""
    for end in range(1, len(data) + 2):
        piece = data[end - 1 : end]
        try:
            line += decoder.decode(piece, not piece).count("\n")
        except UnicodeDecodeError as error:
            held = len(error.object) - len(piece)  # bytes pending from earlier chunks
            start = offset + end - 1 - held + error.start
            return _InvalidByte(line, start, error.object[error.start])
    return None


# --- separators -------------------------------------------------------------------------------------------


class Separator(NamedTuple):
    """The column separator of a file and the source of the choice."""

    character: str
    origin: str = ""
    """The source of the choice; empty for the format's default."""
    lines_above: int = 0
    """Lines before the header, such as Excel's `sep=;`."""


def named(separator: str) -> str:
    """Return a separator for messages; a quoted tab would be invisible."""
    return "tab" if separator == "\t" else repr(separator)


def separator_of(open_text: Callable[[], AbstractContextManager[TextIO]], usual: str, dialect: Dialect) -> Separator:
    """Return the separator: the setting decides, else a first line `sep=;`, else the header.

    The header's separator is the candidate that yields most of the columns that the settings need. The rows have no
    influence.
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
    """Return the column names with this separator; empty if the header cannot be parsed with it."""
    with open_text() as text:
        try:
            return next(filter(None, csv.reader(islice(text, _HEADER_LINES), delimiter=separator, strict=True)), [])
        except csv.Error:
            return []


def _fit(names: list[str], dialect: Dialect, *, usual: bool) -> tuple[int, int, bool, bool, int]:
    plain = {name.strip() for name in names}
    return len(plain & dialect.needed), len(plain & INPUTS), len(names) > 1, usual, len(names)
