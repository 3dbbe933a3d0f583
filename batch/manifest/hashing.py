"""Hashes used as identities: job keys, derived seeds, image contents. Pure.

The hashed byte strings must never change: a change makes every finished job look new, so it is paid for again.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b, sha256

import orjson

from batch.types import AppId, JobKey, JsonObject

__all__ = ["canonical_json", "content_hash", "derived_seed", "job_key"]

_SEED_BITS = 31


def canonical_json(value: JsonObject) -> bytes:
    """Return the canonical JSON of an object: sorted keys, no spaces, UTF-8, shortest floats.

    Raises:
        TypeError: a value has no JSON form, text contains a lone surrogate, or an integer exceeds 64 bits.
    """
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def job_key(app: AppId, input: JsonObject) -> JobKey:  # noqa: A002 - the endpoint's own word
    """Return the BLAKE2b-128 hash of the app id and the canonical complete input, as 32 hex digits.

    `1` and `1.0` are different JSON, so the input must use the endpoint's types.
    """
    hasher = _app_hasher(app).copy()
    hasher.update(canonical_json(input))
    return JobKey(hasher.hexdigest())


@lru_cache(maxsize=8)
def _app_hasher(app: AppId) -> blake2b:
    """Return the hash state of an app id, which all keys of the app share."""
    return blake2b(app.encode() + b"\n", digest_size=16)


def derived_seed(run_seed: int, identity: str, cell_id: str) -> int:
    """Return the seed of a job without an explicit seed: 31 bits, 0 included.

    The seed depends on the row's identity, never on its position, so rows can be added and removed around it.
    """
    digest = blake2b(f"{run_seed}\n{cell_id}\n{identity}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def content_hash(data: bytes) -> str:
    """Return the SHA-256 of an image's bytes as 64 hex digits, which identifies uploads and stored files."""
    return sha256(data).hexdigest()
