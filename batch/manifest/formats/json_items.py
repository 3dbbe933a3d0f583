"""Split a JSON array, or concatenated JSON objects, into the bytes of each object. Pure.

Only brackets, strings and the commas between objects are examined; the contents of an object are left to the JSONL
parser. Memory holds one object and one chunk of text, whatever the size of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orjson

from batch.manifest.inputs import shorten

__all__ = ["LONGEST", "BadJson", "Item", "NotRows", "split"]

LONGEST = 64 * 2**20
"""Maximum bytes of one object; a longer one indicates an unclosed bracket or quote."""

_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_QUICK_DEPTH = 3
"""Nesting depth up to which a single regex match finds the end of an object; deeper objects take six times as long."""


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
    """The text is malformed at `line`, counted from 1, in the object `row`, counted from 0."""

    def __init__(self, line: int, row: int, what: str, *, has_nul: bool = False) -> None:
        super().__init__(what)
        self.line, self.row, self.has_nul = line, row, has_nul


class NotRows(Exception):
    """The text is a single object; the message names its keys."""


class Item(NamedTuple):
    """One object of the text."""

    line: int
    """1-based line on which the object starts."""
    last_line: int
    text: bytes
    """The object without line breaks."""


def split(read: Callable[[], bytes], *, longest: int = LONGEST) -> Iterator[Item]:
    """Yield the objects of a JSON array or of concatenated JSON objects.

    Args:
        read: returns the next chunk of text; empty at the end.
        longest: maximum bytes of one object.

    Raises:
        BadJson: the text is malformed or incomplete.
        NotRows: the text is a single object.
    """
    text = _Text(read, longest)
    start = text.peek()
    if start == b"[":
        yield from _array(text)
    elif start == b"{":
        yield from _sequence(text)
    elif start:
        raise text.wrong(f"it begins with {text.shown()} instead of [ or {{; write a list of objects")


def _array(text: _Text) -> Iterator[Item]:
    text.skip()
    if text.peek() != b"]":
        while True:
            if text.peek() == b"]":
                raise text.wrong("trailing comma before the end of the list; remove it, or add the missing object")
            yield text.item()
            yield from iter(text.next_item, None)
            after = text.peek()
            if after == b"]":
                break
            if after != b",":
                raise text.wrong(f"{text.shown()} after an object; separate objects by commas and end the list with ]")
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
    """A buffered view of the text: one chunk and the rest of the previous one."""

    def __init__(self, read: Callable[[], bytes], longest: int) -> None:
        self._read = read
        self._longest = longest
        self._buffer, self._at = b"", 0
        self._line, self._row = 1, 0
        self._is_over = False
        self._fill(len(_MARK))
        self._buffer = self._buffer.removeprefix(_MARK)

    def peek(self) -> bytes:
        """Return the next byte that is not white space; empty at the end."""
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
        """Skip the byte that `peek` returned."""
        self._at += 1

    def item(self, *, is_alone: bool = False) -> Item:
        """Return the object that begins at the next byte.

        Args:
            is_alone: the object may be the whole text, so one that is too long raises `NotRows`.
        """
        start = self.peek()
        if not start:
            raise self.wrong("the list is not closed by ]; is the file complete?")
        if start != b"{":
            raise self.wrong(f"{self.shown()} is not a JSON object; each item of the list must be one")
        while (end := self._end()) is None:
            size = len(self._buffer) - self._at
            if size >= self._longest:
                if is_alone:
                    raise NotRows(_first_key_of(self._buffer[self._at :]))
                raise self._unclosed(f"the object that begins here is longer than {self._longest >> 20} MiB")
            if not self._fill(size):  # double the buffer each time, so that the total scan time stays linear
                raise self._unclosed("the object that begins here is not closed; is the file complete?")
        return self._taken(self._at, end)

    def next_item(self) -> Item | None:
        """Return the object after a comma if it is shallow and in the buffer; else None, without consuming anything."""
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
            text = text.replace(b"\n", b" ")  # only white space: a line break in a string is an error
        self._at, self._row = end, self._row + 1
        return Item(line, self._line, text)

    def _end(self) -> int | None:
        """Return the end of the object that begins here; None if it is not in the buffer yet."""
        found = _OBJECT.match(self._buffer, self._at)
        if found is not None:
            return found.end()
        due: list[bytes] = []
        for token in _TOKEN.finditer(self._buffer, self._at):
            if (closing := _CLOSING.get(token[0])) is not None:
                due.append(closing)
            elif token[0] == b'"':
                if _OPEN_STRING.match(self._buffer, token.start()) is None:
                    raise self._wrong_at(token, "unescaped line break or control character in a string; escape it")
                return None
            elif token[0] in b"}]":
                if token[0] != due.pop():
                    raise self._wrong_at(token, f"{token[0].decode()!r} does not match the open bracket")
                if not due:
                    return token.end()
        return None

    def _wrong_at(self, token: re.Match[bytes], what: str) -> BadJson:
        self._line += self._buffer.count(b"\n", self._at, token.start())
        return self.wrong(what)

    def _fill(self, least: int) -> bool:
        """Read at least `least` more bytes, unless the text ends; return False if nothing was read."""
        chunks, size = [self._buffer[self._at :]], 0
        while size < least and not self._is_over:
            chunk = self._read()
            self._is_over = not chunk
            chunks.append(chunk)
            size += len(chunk)
        self._buffer, self._at = b"".join(chunks), 0
        return size > 0

    def shown(self) -> str:
        """Return the text at the current position, for a message."""
        self._fill(256)
        found = _SCALAR.match(self._buffer, self._at)
        text = found[0] if found else self._buffer[self._at : self._at + 1]
        return repr(shorten(text.decode("utf-8", "replace"), 40))

    def wrong(self, what: str) -> BadJson:
        return BadJson(self._line, self._row, what, has_nul=b"\0" in self._buffer[self._at : self._at + 8])

    def _unclosed(self, what: str) -> BadJson:
        """Return the parser's error if the object is malformed before the end of the text, else one with `what`."""
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
