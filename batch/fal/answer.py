"""Lenient reading of the endpoint's output: readable fields are kept, odd ones are null and named in a note. Pure.

A paid answer needs its images; every other field may be absent, null, of another type or out of range. A paid result is
never discarded for such a field. Tests check our own server against the strict schema (`batch.fal.endpoint`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from batch.fal.endpoint import IMAGES_LIMIT, SEED_LIMIT
from batch.types import Json, JsonObject, StoredImage

__all__ = ["AnswerFields", "fields_of", "has_images", "images_of", "inference_of", "says_no_images"]

_NOTES_LIMIT = 16
"""Maximum notes on one answer; a broken service could cause thousands."""
_SCHEMES = ("https://", "http://", "data:")
"""Prefixes of a text in `images` that make it a URL."""
_INT64 = 2**63
_ABSENT: Json = "\0absent"


class AnswerFields(NamedTuple):
    """All fields of an output except its images. An unusable field is None, and a note names it."""

    seed: int | None
    flags: list[bool | None] | None
    """One per image; None if nothing was checked."""
    inference: float | None
    """Seconds of execution."""
    timings: list[tuple[str, float]] | None
    """The other timings by name, in seconds."""
    notes: tuple[str, ...]


def images_of(output: JsonObject) -> list[StoredImage]:
    """Return the images that an output names, at most 16; empty if none has a URL."""
    images, _ = _images(output)
    return images


def has_images(output: JsonObject) -> bool:
    """Return whether an output is usable: it names at least one image with a URL."""
    reported = output.get("images")
    return (isinstance(reported, list) and bool(reported) and _is_plain(reported[0])) or bool(images_of(output))


def says_no_images(output: JsonObject) -> bool:
    """Return whether an output explicitly has no images, as opposed to not being an output at all."""
    return output.get("images") == []


def inference_of(output: JsonObject) -> float | None:
    """Return the seconds of execution that the output reports; None if missing or not a number >= 0."""
    timings = output.get("timings")
    return _seconds(timings.get("inference")) if isinstance(timings, dict) else None


def fields_of(output: JsonObject, asked_seed: Json = None) -> AnswerFields:
    """Return all fields of an output except its images.

    Args:
        output: the JSON object from the service; {} if the answer is not one.
        asked_seed: the seed of the request, for a note if the service reports another one.
    """
    notes: list[str] = []
    seed = _seed(output.get("seed", _ABSENT), asked_seed, notes)
    inference, timings = _timings(output.get("timings", _ABSENT), notes)
    reported = output.get("images")
    if (
        isinstance(reported, list) and len(reported) <= IMAGES_LIMIT and all(map(_is_plain, reported))
    ):  # the common case
        count = len(reported)
    else:
        images, odd = _images(output)
        count = len(images)
        notes += odd
    flags = _flags(output.get("has_nsfw_concepts", _ABSENT), count, notes)
    if len(notes) > _NOTES_LIMIT:
        notes[_NOTES_LIMIT:] = [f"and {len(notes) - _NOTES_LIMIT} more"]
    return AnswerFields(seed, flags, inference, timings, tuple(notes))


def _seed(reported: Json, asked: Json, notes: list[str]) -> int | None:
    if type(reported) is int and 0 <= reported <= SEED_LIMIT:
        if reported != asked and type(asked) is int:
            notes.append(f"seed: the service reports {reported}, {asked} was asked for")
        return reported
    notes.append(f"seed: {_odd(reported)}; the column has the seed that was asked for")
    return None


def _flags(reported: Json, images: int, notes: list[str]) -> list[bool | None] | None:
    if not isinstance(reported, list):
        notes.append(f"has_nsfw_concepts: {_odd(reported)}")
        return None
    if not reported:  # nothing was checked
        return None
    flags: list[bool | None] = [flag if flag is True or flag is False else None for flag in reported[:IMAGES_LIMIT]]
    for place, flag in enumerate(flags):
        if flag is None:
            notes.append(f"has_nsfw_concepts[{place}]: {_odd(reported[place])}")
    if images and len(reported) != images:
        notes.append(f"has_nsfw_concepts: {len(reported)} values for {images} images")
    return flags if any(flag is not None for flag in flags) else None


def _timings(reported: Json, notes: list[str]) -> tuple[float | None, list[tuple[str, float]] | None]:
    if not isinstance(reported, dict):
        notes.append(f"timings: {_odd(reported)}")
        return None, None
    inference: float | None = None
    rest: list[tuple[str, float]] = []
    for name, value in reported.items():
        seconds = _seconds(value)
        if seconds is None:
            notes.append(f"timings.{name[:40]}: {_odd(value)}")
        elif name == "inference":
            inference = seconds
        else:
            rest.append((name, seconds))
    return inference, rest or None


def _seconds(value: Json) -> float | None:
    if type(value) is float or type(value) is int:
        try:
            seconds = float(value)
        except OverflowError:
            return None
        return seconds if 0.0 <= seconds < math.inf else None
    return None


def _is_plain(image: Json) -> bool:
    """Return whether an image has no odd field; a wrong False only costs time."""
    if type(image) is not dict:
        return False
    url, width, height, size = image.get("url"), image.get("width"), image.get("height"), image.get("file_size")
    return (
        type(url) is str
        and bool(url.strip())
        and (width is None or (type(width) is int and 0 <= width < _INT64))
        and (height is None or (type(height) is int and 0 <= height < _INT64))
        and (size is None or (type(size) is int and 0 <= size < _INT64))
        and type(image.get("content_type", "")) is str
        and type(image.get("file_name", "")) is str
    )


def _images(output: JsonObject) -> tuple[list[StoredImage], list[str]]:
    """Return the usable images, and notes on odd fields."""
    reported = output.get("images")
    if not isinstance(reported, list):
        single = output.get("image")  # endpoints with one image use this name
        if not isinstance(single, dict | str):
            return [], []  # the failure message covers it
        reported = [single]
    images: list[StoredImage] = []
    notes: list[str] = []
    for place, item in enumerate(reported[:IMAGES_LIMIT]):
        fields: JsonObject = item if isinstance(item, dict) else {"url": item}
        url = fields.get("url")
        if not isinstance(url, str) or not url.strip() or not (isinstance(item, dict) or url.startswith(_SCHEMES)):
            notes.append(f"images[{place}]: no URL in {_odd(item)}")
            continue
        where = f"images[{place}]"
        images.append(
            StoredImage(
                url,
                _integer(fields, "width", where, notes),
                _integer(fields, "height", where, notes),
                _text(fields, "content_type", where, notes),
                _text(fields, "file_name", where, notes),
                _integer(fields, "file_size", where, notes),
            )
        )
    if len(reported) > IMAGES_LIMIT:
        notes.append(f"images: {len(reported)} images; only the first {IMAGES_LIMIT} are kept")
    return images, notes


def _integer(fields: JsonObject, name: str, where: str, notes: list[str]) -> int | None:
    value = fields.get(name)
    if value is None or (type(value) is int and 0 <= value < _INT64):
        return value
    if type(value) is float and value.is_integer() and 0 <= value < 2**53:  # JavaScript has no integers
        return int(value)
    notes.append(f"{where}.{name}: {_odd(value)}")
    return None


def _text(fields: JsonObject, name: str, where: str, notes: list[str]) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    notes.append(f"{where}.{name}: {_odd(value)}")
    return None


def _odd(value: Json) -> str:
    """Describe a value in a few words."""
    if value is _ABSENT:
        return "missing"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a number beyond 64 bits" if isinstance(value, int) and not -_INT64 < value < _INT64 else str(value)
