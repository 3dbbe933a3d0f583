"""What JSON text may say and a fast parser would change: halves of characters, long numbers, twins. Pure.

Works on the bytes of one line, and only where `jsonl` has reason to look: a million lines are parsed by polars.
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
    # After the first four characters, which the search is quick by: a high half without a low one, or the reverse.
    rf"\\u[dD](?:{_HIGH}(?!\\u[dD]{_LOW})|{_LOW}(?<!\\u[dD]{_HIGH}\\u[dD]{_HEX}{{3}}))".encode()
)
"""Found wherever half a character is escaped, and where a backslash of the text itself stands before `ud83d`."""

_ESCAPE = re.compile(rf"\\u[dD]{_HIGH}\\u[dD]{_LOW}|(\\u[dD][89a-fA-F]{_HEX}{{2}})|\\.".encode(), re.DOTALL)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*', re.DOTALL)
_INT64 = 2**63
_NESTED = frozenset({dict, list})


def find_lone_surrogate(line: bytes) -> LoneSurrogate | None:
    """The first value of an object with half a character in it; None where there is none, or no JSON.

    Where it stands in a key, the key with it is the column.
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
    """The line with U+FFFD in the place of each half of a character."""
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], line)


def exact(line: bytes) -> bytes:
    """The line with quotes around each number that neither 64 bits nor a float can hold: its digits stay."""
    return _TOKEN.sub(lambda token: token[0] if _fits(token[0]) else b'"' + token[0] + b'"', line)


def _fits(token: bytes) -> bool:
    if token.startswith(b'"'):
        return True
    try:
        return -_INT64 <= int(token) < _INT64
    except ValueError:  # a fraction, or more digits than Python reads
        pass
    try:
        return math.isfinite(float(token))
    except ValueError:  # no number: whoever parses the line says so
        return True


def count_keys(value: Json) -> int:
    """How many keys a value has, those of the objects in it counted."""
    if isinstance(value, dict):
        return len(value) + sum(count_keys(inner) for inner in value.values() if type(inner) in _NESTED)
    return sum(count_keys(inner) for inner in value if type(inner) in _NESTED) if isinstance(value, list) else 0


class _DuplicateKey(Exception):
    """A key that an object has twice."""


def find_duplicate_key(line: bytes) -> str | None:
    """A key that stands twice in one object of a line of JSON."""
    try:
        json.loads(line, object_pairs_hook=_refuse_twins, parse_int=str, parse_float=str)
    except _DuplicateKey as twin:
        return str(twin)
    return None


def _refuse_twins(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _DuplicateKey(name)
        seen.add(name)
