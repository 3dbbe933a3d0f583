"""The sweep: axes of input values crossed into cells with stable ids. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import orjson

from batch.errors import ConfigError
from batch.manifest.inputs import INPUTS, check_value
from batch.manifest.types import CellError
from batch.types import Json, JsonObject

__all__ = ["BASE", "Cell", "cells"]

BASE = "base"
"""Id of the only cell if nothing is swept."""
_PLAIN = re.compile(r"[A-Za-z0-9_.+-]{1,32}")
_ODD = re.compile(r"[^A-Za-z0-9_.+-]+")
_PREFIX = 24
_NEVER_SWEPT = frozenset({"image_url", "sync_mode"})


class Cell(NamedTuple):
    """One point of the sweep."""

    id: str
    """For example `guidance_scale=3.5,strength=0.75`: axes sorted by name, values in the endpoint's types."""
    values: JsonObject


def cells(axes: Mapping[str, Sequence[Json]]) -> tuple[Cell, ...]:
    """Cross the axes in order, the last varying fastest; without axes, return the single cell `base`.

    A cell's id does not change when an axis grows, or when axes or values are reordered. Values are first converted to
    the endpoint's types, so `0.75` and `"0.75"` are equal; duplicate values of an axis count once.

    Raises:
        ConfigError: an axis is not an input of the endpoint or has no values, or a value is out of bounds.
    """
    if not axes:
        return (Cell(BASE, {}),)
    points = [_points(name, values) for name, values in axes.items()]
    return tuple(_cell(dict(zip(axes, point, strict=True))) for point in itertools.product(*points))


def _points(name: str, values: Sequence[Json]) -> list[Json]:
    if name not in INPUTS - _NEVER_SWEPT:
        raise ConfigError(f"sweep.{name}: not an input that can be swept; axes: {_axes()}")
    if isinstance(values, str) or not values:
        raise ConfigError(f"sweep.{name} = {values!r}: an axis must be a list with at least one value")
    points: dict[str, Json] = {}
    for value in values:
        checked = check_value(name, value)
        if isinstance(checked, CellError):
            raise ConfigError(f"sweep.{name}: {checked.message} ({checked.type})")
        points.setdefault(_spell(checked), checked)
    return list(points.values())


def _axes() -> str:
    return ", ".join(sorted(INPUTS - _NEVER_SWEPT))


def _cell(values: JsonObject) -> Cell:
    return Cell(",".join(f"{name}={_spell(values[name])}" for name in sorted(values)), values)


def _spell(value: Json) -> str:
    """Format a value for an id: JSON; short plain text unchanged; other text as readable prefix, `~` and hash."""
    text = orjson.dumps(value).decode()
    if not isinstance(value, str):
        return text
    if _PLAIN.fullmatch(value):
        return value
    digest = blake2b(value.encode(), digest_size=5).hexdigest()
    return f"{_ODD.sub('-', value).strip('-')[:_PREFIX].rstrip('-')}~{digest}"
