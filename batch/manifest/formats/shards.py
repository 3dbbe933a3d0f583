"""Merge the columns of many files into one table, each in a type that holds every file's values. Pure.

Uses pyarrow's types. Keeps one schema and, for messages, one path per type, not all schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from batch.errors import ManifestError

__all__ = ["Columns", "joint"]

Kind: TypeAlias = Any
"""A `pyarrow.DataType`; pyarrow has no type annotations for mypy."""

_NAMED = 3
"""Maximum number of columns that notes name."""


class Columns:
    """The merged columns of files, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._first: dict[str, dict[Kind, Path]] = {}
        self._files: dict[str, int] = {}
        self._lacking: dict[str, Path] = {}
        self._last: Any = None
        self._paths = 0
        self._first_path = Path()

    def add(self, path: Path, schema: Any) -> None:
        """Merge the schema of one more file.

        Raises:
            ManifestError: a column's type cannot be joined with that of an earlier file; the message names both files.
        """
        same = self._last is not None and schema.equals(self._last)
        self._last = schema
        if not self._paths:
            self._first_path = path
        self._paths += 1
        for name in schema.names:
            self._files[name] = self._files.get(name, 0) + 1
        if same:
            return
        for field in schema:
            self._take(path, field.name, field.type)
        for name in self._kinds.keys() - set(schema.names):
            self._lacking.setdefault(name, path)

    def _take(self, path: Path, name: str, kind: Kind) -> None:
        if name not in self._kinds:
            self._kinds[name] = kind
            self._first[name] = {kind: path}
            if self._paths > 1:
                self._lacking[name] = self._first_path
            return
        joined = joint(self._kinds[name], kind)
        if joined is None:
            seen = self._first[name].items()
            other, where = next((pair for pair in seen if joint(pair[0], kind) is None), next(iter(seen)))
            raise ManifestError(
                f"the column {name!r} is {other} in {where} and {kind} in {path}; give it one type in all files"
            )
        self._kinds[name] = joined
        self._first[name].setdefault(kind, path)

    @property
    def kinds(self) -> dict[str, Kind]:
        """The type of each column."""
        return dict(self._kinds)

    def place_of(self, name: str) -> Path:
        """Return a file that has a column."""
        return next(iter(self._first[name].values()))

    def files_with(self, name: str) -> int:
        """Return the number of files that have a column."""
        return self._files.get(name, 0)

    def notes(self) -> Iterator[str]:
        """Yield notes for the user about columns that are not in every file."""
        for name, path in islice(self._lacking.items(), _NAMED):
            yield (
                f"column {name!r} is in {self._files[name]:,} of {self._paths:,} files, null in the others (first:"
                f" {path.name})"
            )
        if len(self._lacking) > _NAMED:
            yield f"{len(self._lacking) - _NAMED:,} more columns are not in every file"


def joint(left: Kind, right: Kind) -> Kind | None:
    """Return the type that holds the values of both types unchanged; None if there is no such type.

    Text in any layout is one type, as are bytes, integers of any width, and floats. The reader refuses a value that the
    joint type cannot hold after all (2^53 + 1 among fractions).
    """
    if left == right:
        return left
    left, right = _plain(left), _plain(right)
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if _is_list(left) and _is_list(right):
        inner = joint(left.value_type, right.value_type)
        return None if inner is None else pa.large_list(inner)
    if pa.types.is_struct(left) and pa.types.is_struct(right):
        return _joint_struct(left, right)
    if any(map(_is_text_or_bytes, (left, right))):  # pyarrow would convert text to bytes
        return None
    if pa.types.is_decimal(left) != pa.types.is_decimal(right) and any(map(pa.types.is_floating, (left, right))):
        return pa.float64()  # pyarrow would use 32 bits if the other column does
    try:
        schemas = [pa.schema([("x", kind)]) for kind in (left, right)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _plain(kind: Kind) -> Kind:
    """Return the common layout of types with the same values."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.large_binary()
    return kind


def _is_text_or_bytes(kind: Kind) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: Kind) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _joint_struct(left: Kind, right: Kind) -> Kind | None:
    fields = {field.name: field.type for field in left}
    for field in right:
        inner = joint(fields[field.name], field.type) if field.name in fields else field.type
        if inner is None:
            return None
        fields[field.name] = inner
    return pa.struct(list(fields.items()))
