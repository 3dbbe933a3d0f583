"""Parse partition columns in folder names, as Hive, Spark and polars write them: `country=de/day=2024-05-01/`. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, datetime
from typing import TypeAlias, TypeVar
from urllib.parse import unquote

__all__ = ["Value", "partitions_of", "typed"]

Value: TypeAlias = int | float | bool | date | datetime | str

T = TypeVar("T")

_MISSING = "__HIVE_DEFAULT_PARTITION__"
_INT64 = 2**63


def partitions_of(folders: Sequence[str]) -> Mapping[str, str | None]:
    """Return the partition columns of a file, given its folders below the table's folder; other folders are ignored.

    Raises:
        ValueError: a key is repeated or not UTF-8.
    """
    found: dict[str, str | None] = {}
    for folder in folders:
        key, is_partition, value = folder.partition("=")
        if not is_partition or not key:
            continue
        key, value = _decoded(key), _decoded(value)
        if key in found:
            raise ValueError(f"the folders give the column {key!r} twice")
        found[key] = None if value in {_MISSING, ""} else value
    return found


def _decoded(text: str) -> str:
    try:
        text.encode()
        return unquote(text, errors="strict")
    except UnicodeError as error:
        shown = text.encode(errors="backslashreplace").decode()
        raise ValueError(f"the folder name {shown!r} is not UTF-8") from error


def typed(texts: Collection[str]) -> list[Value]:
    """Convert all values of one column to their common type, as polars infers it, or else leave them as text."""
    for parse in (_whole, _number, _truth, _day, _instant):
        values = _parsed(texts, parse)
        if values is not None:
            return values
    return list(texts)


def _parsed(texts: Collection[str], parse: Callable[[str], Value | None]) -> list[Value] | None:
    values: list[Value] = []
    for text in texts:
        value = parse(text)
        if value is None:
            return None
        values.append(value)
    return values


_WHOLE = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_INSTANT = re.compile(_DAY.pattern + r"[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?")


def _whole(text: str) -> int | None:
    value = int(text) if _WHOLE.fullmatch(text) else None
    return value if value is not None and -_INT64 <= value < _INT64 else None


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text) or (text.lstrip("-").isdigit() and _whole(text) is None):
        return None  # exceeds 64 bits: a float would change the number
    value = float(text)
    return value if math.isfinite(value) else None


def _truth(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text)


def _day(text: str) -> date | None:
    return _from_iso(_DAY, date.fromisoformat, text)


def _instant(text: str) -> datetime | None:
    return _from_iso(_INSTANT, datetime.fromisoformat, text)


def _from_iso(form: re.Pattern[str], parse: Callable[[str], T], text: str) -> T | None:
    try:
        return parse(text) if form.fullmatch(text) else None
    except ValueError:  # an invalid date such as February 31
        return None
