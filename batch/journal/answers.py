"""Storage format of the service's answers in the journal. Pure.

Answers are stored as received, compressed if long, and without data URIs once the images are stored as files.
"""

from __future__ import annotations

import zlib

import orjson

from batch.fal.protocol import Malformed, read_output
from batch.types import Answer, Json, JsonObject

__all__ = ["answer_of", "output_of", "pack", "shorten_data_uri", "unpack", "without_data_uris"]

_PACK_FROM = 512
"""Bytes. Compressing a shorter answer saves next to nothing and costs time for each job."""
_LEVEL = 1
_MARK = b"x"
"""The first byte of a zlib stream. A JSON object starts with a brace; a body that starts with this byte is always
compressed, so the prefix is unambiguous."""
_DATA_URI_FROM = 256
"""Characters. A shorter data URI holds no image and is kept."""


def pack(answer: Answer) -> bytes:
    """Return the answer's body as received, in storage format; without a body, its output as JSON."""
    return _packed(orjson.dumps(answer.output) if answer.raw is None else answer.raw)


def _packed(raw: bytes) -> bytes:
    if len(raw) < _PACK_FROM and not raw.startswith(_MARK):
        return raw
    packed = zlib.compress(raw, _LEVEL)
    return packed if len(packed) < len(raw) or raw.startswith(_MARK) else raw


def unpack(stored: bytes) -> bytes:
    """Return the body that was passed to `pack`."""
    return zlib.decompress(stored) if stored.startswith(_MARK) else stored


def answer_of(stored: bytes, billable_units: float | None, engine: str | None) -> Answer:
    """Parse a stored answer with the parser of this version."""
    return Answer(output_of(stored), billable_units, engine, unpack(stored))


def output_of(stored: bytes) -> JsonObject:
    """Return the output of a stored answer; {} if it is not a JSON object."""
    try:
        return read_output(unpack(stored))
    except Malformed:
        return {}


def without_data_uris(stored: bytes) -> bytes:
    """Return the stored answer with each data URI shortened; an answer that is not JSON is returned unchanged."""
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
    """Return a long data URI without its payload, which is stored as a file; return any other URL unchanged."""
    if not url.startswith("data:") or len(url) < _DATA_URI_FROM:
        return url
    return url.partition(",")[0][:100] + ",…"
