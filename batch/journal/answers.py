"""How a service's answers are stored in the journal. Pure.

As they came, packed where they are long, and without data URIs once their bytes are stored as files.
"""

from __future__ import annotations

import zlib

import orjson

from batch.fal.protocol import Malformed, read_output
from batch.types import Answer, Json, JsonObject

__all__ = ["answer_of", "output_of", "pack", "shorten_data_uri", "unpack", "without_data_uris"]

_PACK_FROM = 512
"""Bytes. Packing a shorter answer saves next to nothing, and each job would pay for it."""
_LEVEL = 1
_MARK = b"x"
"""The first byte of a zlib stream. A JSON object starts with a brace; what starts with this letter is always packed."""
_DATA_URI_FROM = 256
"""Characters. A shorter data URI holds no image and is not worth replacing."""


def pack(answer: Answer) -> bytes:
    """The answer's body as it came, for the journal; its output where only that is known."""
    return _packed(orjson.dumps(answer.output) if answer.raw is None else answer.raw)


def _packed(raw: bytes) -> bytes:
    if len(raw) < _PACK_FROM and not raw.startswith(_MARK):
        return raw
    packed = zlib.compress(raw, _LEVEL)
    return packed if len(packed) < len(raw) or raw.startswith(_MARK) else raw


def unpack(stored: bytes) -> bytes:
    """The body that `pack` was given."""
    return zlib.decompress(stored) if stored.startswith(_MARK) else stored


def answer_of(stored: bytes, billable_units: float | None, engine: str | None) -> Answer:
    """The stored answer, read again by what this version can read."""
    return Answer(output_of(stored), billable_units, engine, unpack(stored))


def output_of(stored: bytes) -> JsonObject:
    """The stored answer's output; {} where it is not a JSON object."""
    try:
        return read_output(unpack(stored))
    except Malformed:
        return {}


def without_data_uris(stored: bytes) -> bytes:
    """The stored answer with each data URI shortened; one that is not JSON comes back as it is."""
    raw = unpack(stored)
    if b"data:" not in raw:
        return stored
    output = output_of(stored)
    return _packed(orjson.dumps(_shortened(output))) if output else stored


def _shortened(value: Json) -> Json:
    match value:
        case str() if value.startswith("data:"):
            return shorten_data_uri(value)
        case dict():
            return {key: _shortened(item) for key, item in value.items()}
        case list():
            return [_shortened(item) for item in value]
        case _:
            return value


def shorten_data_uri(url: str) -> str:
    """A long data URI without its payload, which is stored as a file; any other URL as it is."""
    if not url.startswith("data:") or len(url) < _DATA_URI_FROM:
        return url
    return url.partition(",")[0][:100] + ",…"
