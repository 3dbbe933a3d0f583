"""Convert Arrow tables to polars: supported types, valid UTF-8. Pure except for Arrow and polars types."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from batch.errors import ManifestError

__all__ = ["IMAGE_ROWS", "check_text", "frame_of", "holds_bytes", "plain_schema"]

IMAGE_ROWS = 64
"""Maximum rows of a batch if they contain image bytes."""
_WIDEST_DECIMAL = 38


def plain_schema(path: Path, schema: Any) -> Any:
    """Return the schema with types that polars supports: storage types of extensions, plain text or bytes for views.

    Raises:
        ManifestError: a column has an unsupported type. polars would panic on some of them.
    """
    fields = []
    for field in schema.remove_metadata():
        try:
            kind = _plain(field.type)
        except UnicodeDecodeError as error:
            raise ManifestError(
                f"{path}: a name in the column {field.name!r} is not UTF-8; save the file with UTF-8 names"
            ) from error
        if kind is None:
            advice = "cast the column to text, numbers, lists or structs, or leave it out"
            raise ManifestError(f"{path}: unsupported type {field.type} of the column {field.name!r}; {advice}")
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def _plain(kind: Any) -> Any:
    """Return the equivalent type that polars supports, or None."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_dictionary(kind):
        value = _plain(kind.value_type)
        is_text = types.is_string(value) or types.is_large_string(value)
        return pa.dictionary(kind.index_type, value, kind.ordered) if is_text else value
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.string() if types.is_string_view(kind) else pa.binary()
    if types.is_timestamp(kind) and kind.tz and not _is_zone(kind.tz):
        return pa.timestamp(kind.unit, "UTC")  # the same instants
    if types.is_decimal256(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= _WIDEST_DECIMAL else None
    if types.is_struct(kind):
        fields = {field.name: _plain(field.type) for field in kind}
        has_none = any(inner is None for inner in fields.values())
        return None if has_none or len(fields) < kind.num_fields else pa.struct(list(fields.items()))
    if types.is_map(kind):
        key, item = _plain(kind.key_type), _plain(kind.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
        value = _plain(kind.value_type)
        if value is None:
            return None
        if value == kind.value_type and kind.value_field.name.isprintable():  # raises for a name that is not UTF-8
            return kind  # keeps the name of the item field
        if types.is_fixed_size_list(kind):
            return pa.list_(value, kind.list_size)
        return pa.large_list(value) if types.is_large_list(kind) else pa.list_(value)
    is_unknown = types.is_union(kind) or types.is_run_end_encoded(kind) or types.is_interval(kind)
    return None if is_unknown or "list_view" in str(kind) else kind


@cache
def _is_zone(name: str) -> bool:
    """Return whether polars knows a time zone: names such as Europe/Paris, but not offsets."""
    try:
        pl.Series([0]).cast(pl.Datetime("us", name))
    except pl.exceptions.PolarsError:
        return False
    return True


def check_text(path: Path, table: Any) -> None:
    """Refuse values that are invalid for their type: polars would panic on text that is not UTF-8.

    Raises:
        ManifestError: a column has invalid values.
    """
    for name, column in zip(table.schema.names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            what = f"the column {name!r} has invalid values ({str(error).splitlines()[0]})"
            raise ManifestError(f"{path}: {what}; save the file again, with text as UTF-8") from error


def frame_of(table: Any) -> pl.DataFrame:
    """Return the table as a polars frame."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def holds_bytes(kind: pl.DataType) -> bool:
    """Return whether values of a type may be images: bytes, or a struct that contains bytes."""
    if isinstance(kind, pl.Struct):
        return any(holds_bytes(field.dtype) for field in kind.fields if isinstance(field.dtype, pl.DataType))
    return kind == pl.Binary
