"""The sweep: axes of input values crossed into cells, each with an id that stays. Pure."""

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
"""Id of the only cell where nothing is swept."""
_PLAIN = re.compile(r"[A-Za-z0-9_.+-]{1,32}")
_ODD = re.compile(r"[^A-Za-z0-9_.+-]+")
_PREFIX = 24
_NEVER_SWEPT = frozenset({"image_url", "sync_mode"})


class Cell(NamedTuple):
    """One point of the sweep."""

    id: str
    """`guidance_scale=3.5,strength=0.75`: axes by name, values in the endpoint's types."""
    values: JsonObject


def cells(axes: Mapping[str, Sequence[Json]]) -> tuple[Cell, ...]:
    """Cross the axes, in their order, the last varying fastest; no axes give the one cell `base`.

    A cell's id changes neither when an axis grows nor when axes or values change places. Values are brought
    into the endpoint's types first, so `0.75` and `"0.75"` are one; one that an axis repeats counts once.

    Raises:
        ConfigError: an axis that is no input of the endpoint or has no values, a value out of its bounds.
    """
    if not axes:
        return (Cell(BASE, {}),)
    points = [_points(name, values) for name, values in axes.items()]
    return tuple(_cell(dict(zip(axes, point, strict=True))) for point in itertools.product(*points))


def _points(name: str, values: Sequence[Json]) -> list[Json]:
    if name not in INPUTS - _NEVER_SWEPT:
        raise ConfigError(f"sweep.{name}: the endpoint has no such input; axes are {_axes()}")
    if isinstance(values, str) or not values:
        raise ConfigError(f"sweep.{name} = {values!r}: an axis is a list with at least one value")
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
    """A value in an id: as JSON; short plain text as it is, any other as readable prefix, `~`, hash."""
    text = orjson.dumps(value).decode()
    if not isinstance(value, str):
        return text
    if _PLAIN.fullmatch(value):
        return value
    digest = blake2b(value.encode(), digest_size=5).hexdigest()
    return f"{_ODD.sub('-', value).strip('-')[:_PREFIX].rstrip('-')}~{digest}"
