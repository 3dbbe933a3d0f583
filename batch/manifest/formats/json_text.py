"""Handle JSON that a fast parser would change: lone surrogates, long numbers, duplicate keys. Pure.

The functions work on one line and are slow; `jsonl` calls them only for suspicious lines.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from batch.manifest.types import LoneSurrogate
from batch.types import Json

__all__ = ["MAY_BE_LONE", "count_keys", "exact", "find_duplicate_key", "find_lone_surrogate", "replace_lone_surrogates"]

_HEX = "[0-9a-fA-F]"
_HIGH, _LOW = rf"[89abAB]{_HEX}{{2}}", rf"[c-fC-F]{_HEX}{{2}}"

MAY_BE_LONE = re.compile(
    # A literal prefix makes the search fast. Then: a high surrogate without a low one, or the reverse.
    rf"\\u[dD](?:{_HIGH}(?!\\u[dD]{_LOW})|{_LOW}(?<!\\u[dD]{_HIGH}\\u[dD]{_HEX}{{3}}))".encode()
)
r"""Matches every escaped lone surrogate, and also an escaped backslash before `ud83d` (`\\ud83d`)."""

_ESCAPE = re.compile(rf"\\u[dD]{_HIGH}\\u[dD]{_LOW}|(\\u[dD][89a-fA-F]{_HEX}{{2}})|\\.".encode(), re.DOTALL)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*', re.DOTALL)
_INT64 = 2**63
_NESTED = frozenset({dict, list})


def find_lone_surrogate(line: bytes) -> LoneSurrogate | None:
    """Return the first value of an object with a lone surrogate; None without one, or if the line is not JSON.

    If a key contains the surrogate, that key is the column.
    """
    try:
        record = json.loads(line.decode(), parse_int=str, parse_float=str)
    except ValueError:
        return None
    for column, value in record.items() if isinstance(record, dict) else ():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not (_is_whole(column) and _is_whole(text)):
            return LoneSurrogate(column, text)
    return None


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def replace_lone_surrogates(line: bytes) -> bytes:
    """Replace each lone surrogate of a line by U+FFFD."""
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], line)


def exact(line: bytes) -> bytes:
    """Quote each number of a line that neither 64 bits nor a float can hold, to keep its digits."""
    return _TOKEN.sub(lambda token: token[0] if _fits(token[0]) else b'"' + token[0] + b'"', line)


def _fits(token: bytes) -> bool:
    if token.startswith(b'"'):
        return True
    try:
        return -_INT64 <= int(token) < _INT64
    except ValueError:  # a fraction, or more digits than `int` accepts
        pass
    try:
        return math.isfinite(float(token))
    except ValueError:  # not a number: the parser of the line reports it
        return True


def count_keys(value: Json) -> int:
    """Return the number of keys in a value, including those of nested objects."""
    if isinstance(value, dict):
        return len(value) + sum(count_keys(inner) for inner in value.values() if type(inner) in _NESTED)
    return sum(count_keys(inner) for inner in value if type(inner) in _NESTED) if isinstance(value, list) else 0


class _DuplicateKey(Exception):
    """A key occurs twice in an object."""


def find_duplicate_key(line: bytes) -> str | None:
    """Return a key that occurs twice in one object of a line of JSON, or None."""
    try:
        json.loads(line, object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str)
    except _DuplicateKey as duplicate:
        return str(duplicate)
    return None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _DuplicateKey(name)
        seen.add(name)
