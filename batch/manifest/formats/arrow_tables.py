"""Arrow tables on their way to polars: types that it has, text that is UTF-8. Pure but for Arrow's and polars types."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from batch.errors import ManifestError

__all__ = ["IMAGE_ROWS", "check_text", "frame_of", "holds_bytes", "plain_schema"]

IMAGE_ROWS = 64
"""In one batch, where rows carry the images themselves."""
_WIDEST_DECIMAL = 38


def plain_schema(path: Path, schema: Any) -> Any:
    """The schema with types that polars has: extension types become what they store, views become plain text or bytes.

    Raises:
        ManifestError: a column has a type without an equal. polars would end the process over some of them.
    """
    fields = []
    for field in schema.remove_metadata():
        try:
            kind = _plain(field.type)
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: a name in the column {field.name!r} is not UTF-8; write it again") from error
        if kind is None:
            advice = "cast the column to text, numbers, lists or structs, or leave it out"
            raise ManifestError(f"{path}: unsupported type {field.type} of the column {field.name!r}; {advice}")
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def _plain(kind: Any) -> Any:
    """The type as polars has it; None where there is none."""
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
        if value == kind.value_type and kind.value_field.name.isprintable():  # a name that is not UTF-8 raises here
            return kind  # with the name that its items have
        if types.is_fixed_size_list(kind):
            return pa.list_(value, kind.list_size)
        return pa.large_list(value) if types.is_large_list(kind) else pa.list_(value)
    is_unknown = types.is_union(kind) or types.is_run_end_encoded(kind) or types.is_interval(kind)
    return None if is_unknown or "list_view" in str(kind) else kind


@cache
def _is_zone(name: str) -> bool:
    """Whether polars knows a time zone: by names such as Europe/Paris, and not by offsets."""
    try:
        pl.Series([0]).cast(pl.Datetime("us", name))
    except pl.exceptions.PolarsError:
        return False
    return True


def check_text(path: Path, table: Any) -> None:
    """Refuse values that their type does not allow: polars ends the process over text that is not UTF-8.

    Raises:
        ManifestError: there are some.
    """
    for name, column in zip(table.schema.names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            what = f"the column {name!r} holds what its type does not allow ({str(error).splitlines()[0]})"
            raise ManifestError(f"{path}: {what}; write it again, text as UTF-8") from error


def frame_of(table: Any) -> pl.DataFrame:
    """The same table for polars."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def holds_bytes(kind: pl.DataType) -> bool:
    """Whether values of a type may be images: bytes, or a struct with bytes in it."""
    if isinstance(kind, pl.Struct):
        return any(holds_bytes(field.dtype) for field in kind.fields if isinstance(field.dtype, pl.DataType))
    return kind == pl.Binary
