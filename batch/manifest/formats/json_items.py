"""Splits a JSON array, or objects written one after another, into the bytes of each object. Pure.

Only brackets, strings and the commas between objects are looked at; what is inside an object is for the parser of
single objects, which is as strict as it is for lines. Memory holds one object and a chunk of text, whatever the size
of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orjson

from batch.manifest.inputs import shorten

__all__ = ["LONGEST", "BadJson", "Item", "NotRows", "split"]

LONGEST = 64 * 2**20
"""Bytes of one object; a longer one is taken for a bracket or quote that is not closed."""

_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_QUICK_DEPTH = 3
"""Lists and objects inside one object, up to which one match finds its end; deeper ones take six times as long."""


def _object(depth: int) -> bytes:
    inner = rb'(?:[^"{}\[\]]++|' + _STRING + (b"|" + _object(depth - 1) if depth else b"") + rb")*+"
    return rb"\{" + inner + rb"\}" + (b"" if depth == _QUICK_DEPTH else rb"|\[" + inner + rb"\]")


_OBJECT = re.compile(_object(_QUICK_DEPTH))
_NEXT_OBJECT = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+(" + _OBJECT.pattern + rb")")
_TOKEN = re.compile(_STRING + rb'|[{}\[\]"]')
_OPEN_STRING = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+\\?\Z')
_CLOSING = {b"{": b"}", b"[": b"]"}
_FILLED = re.compile(rb"[^ \t\r\n]")
_SCALAR = re.compile(rb'"(?:[^"\\]|\\.){0,60}"?|[^,\]\s]{1,60}')
_FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.){0,60})"')
_MARK = b"\xef\xbb\xbf"


class BadJson(Exception):
    """The text is not what it should be; `line` is where, counted from 1, `row` the object that was due there."""

    def __init__(self, line: int, row: int, what: str, *, has_nul: bool = False) -> None:
        super().__init__(what)
        self.line, self.row, self.has_nul = line, row, has_nul


class NotRows(Exception):
    """The text is one object; the message names its keys."""


class Item(NamedTuple):
    """One object."""

    line: int
    """On which it starts, from 1."""
    last_line: int
    text: bytes
    """Without line breaks."""


def split(read: Callable[[], bytes]) -> Iterator[Item]:
    """The objects of a JSON array, or of a text in which objects follow each other.

    Args:
        read: gives the next chunk, empty at the end.

    Raises:
        Malformed: the text is neither of them, or breaks off.
        NotRows: it is one object.
    """
    text = _Text(read)
    start = text.peek()
    if start == b"[":
        yield from _array(text)
    elif start == b"{":
        yield from _sequence(text)
    elif start:
        raise text.wrong(f"it begins with {text.shown()}, not with [ or {{; write a list of objects")


def _array(text: _Text) -> Iterator[Item]:
    text.skip()
    if text.peek() != b"]":
        while True:
            if text.peek() == b"]":
                raise text.wrong("a comma before the end of the list; remove it, or add the object that is missing")
            yield text.item()
            yield from iter(text.next_item, None)
            after = text.peek()
            if after == b"]":
                break
            if after != b",":
                raise text.wrong(f"{text.shown()} after an object; put a comma between objects and ] at the end")
            text.skip()
    text.skip()
    if text.peek():
        raise text.wrong(f"{text.shown()} after the end of the list; remove it")


def _sequence(text: _Text) -> Iterator[Item]:
    first = text.item(is_alone=True)
    if not text.peek():
        raise NotRows(_keys_of(first.text))
    yield first
    while text.peek():
        yield text.item()


class _Text:
    """The text as it is read: one chunk and what is left of the chunk before."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._buffer, self._at = b"", 0
        self._line, self._row = 1, 0
        self._is_over = False
        self._fill(len(_MARK))
        self._buffer = self._buffer.removeprefix(_MARK)

    def peek(self) -> bytes:
        """The next byte that is not white space; empty at the end."""
        while True:
            found = _FILLED.search(self._buffer, self._at)
            end = len(self._buffer) if found is None else found.start()
            self._line += self._buffer.count(b"\n", self._at, end)
            self._at = end
            if found is not None:
                return found[0]
            if not self._fill(1):
                return b""

    def skip(self) -> None:
        """Pass over the byte that was seen."""
        self._at += 1

    def item(self, *, is_alone: bool = False) -> Item:
        """The object that begins at the next byte.

        Args:
            is_alone: it may be the whole text; one that is too long then is.
        """
        start = self.peek()
        if not start:
            raise self.wrong("the list is not closed by ]; is the file complete?")
        if start != b"{":
            raise self.wrong(f"{self.shown()} is not a JSON object; each item of the list is one")
        while (end := self._end()) is None:
            size = len(self._buffer) - self._at
            if size >= LONGEST:
                if is_alone:
                    raise NotRows(_first_key_of(self._buffer[self._at :]))
                raise self._unclosed(f"the object that begins here is longer than {LONGEST >> 20} MiB")
            if not self._fill(size):  # twice as much each time: what is scanned again stays as little as it is long
                raise self._unclosed("the object that begins here is not closed; is the file complete?")
        return self._taken(self._at, end)

    def next_item(self) -> Item | None:
        """The object after a comma, where it is simple and in the buffer; else None, and nothing is passed over."""
        found = _NEXT_OBJECT.match(self._buffer, self._at)
        if found is None:
            return None
        start, end = found.span(1)
        self._line += self._buffer.count(b"\n", self._at, start)
        return self._taken(start, end)

    def _taken(self, start: int, end: int) -> Item:
        text, line = self._buffer[start:end], self._line
        if b"\n" in text:
            self._line += text.count(b"\n")
            text = text.replace(b"\n", b" ")  # white space all of them: a string with one in it is refused
        self._at, self._row = end, self._row + 1
        return Item(line, self._line, text)

    def _end(self) -> int | None:
        """Where the object that begins here ends; None where that is not in the buffer yet."""
        found = _OBJECT.match(self._buffer, self._at)
        if found is not None:
            return found.end()
        due: list[bytes] = []
        for token in _TOKEN.finditer(self._buffer, self._at):
            if (closing := _CLOSING.get(token[0])) is not None:
                due.append(closing)
            elif token[0] == b'"':
                if _OPEN_STRING.match(self._buffer, token.start()) is None:
                    raise self._wrong_at(token, "a string with a line break or another control character; escape it")
                return None
            elif token[0] in b"}]":
                if token[0] != due.pop():
                    raise self._wrong_at(token, f"{token[0].decode()!r} closes a bracket of the other kind")
                if not due:
                    return token.end()
        return None

    def _wrong_at(self, token: re.Match[bytes], what: str) -> BadJson:
        self._line += self._buffer.count(b"\n", self._at, token.start())
        return self.wrong(what)

    def _fill(self, least: int) -> bool:
        """Read at least so many bytes more, unless the text ends; False where nothing came."""
        chunks, size = [self._buffer[self._at :]], 0
        while size < least and not self._is_over:
            chunk = self._read()
            self._is_over = not chunk
            chunks.append(chunk)
            size += len(chunk)
        self._buffer, self._at = b"".join(chunks), 0
        return size > 0

    def shown(self) -> str:
        """What stands here, for a message."""
        self._fill(256)
        found = _SCALAR.match(self._buffer, self._at)
        text = found[0] if found else self._buffer[self._at : self._at + 1]
        return repr(shorten(text.decode("utf-8", "replace"), 40))

    def wrong(self, what: str) -> BadJson:
        return BadJson(self._line, self._row, what, has_nul=b"\0" in self._buffer[self._at : self._at + 8])

    def _unclosed(self, what: str) -> BadJson:
        """Say where the object stops to be JSON, if that is before its end."""
        text = self._buffer[self._at :]
        try:
            orjson.loads(text)
        except orjson.JSONDecodeError as error:
            whole = text.decode("utf-8", "replace").rstrip()
            if error.pos < len(whole):
                line = self._line + whole.count("\n", 0, error.pos)
                return BadJson(line, self._row, f"not parseable as JSON ({error.msg}, at character {error.colno})")
        return self.wrong(what)


def _keys_of(text: bytes) -> str:
    try:
        keys = list(orjson.loads(text))
    except orjson.JSONDecodeError:
        return _first_key_of(text)
    shown = ", ".join(repr(shorten(key, 40)) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
    return f"one object, with the keys {shown}" if keys else "one object, which is empty"


def _first_key_of(text: bytes) -> str:
    found = _FIRST_KEY.match(text)
    return f"one object, whose first key is {found[1].decode('utf-8', 'replace')!r}" if found else "one object"
