"""Hashes that give things their identity: job keys, derived seeds, image contents. Pure.

The forms hashed here are promises: a change to any of them makes every finished job look new, and paid for again.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b, sha256

import orjson

from batch.types import AppId, JobKey, JsonObject

__all__ = ["canonical_json", "content_hash", "derived_seed", "job_key"]

_SEED_BITS = 31


def canonical_json(value: JsonObject) -> bytes:
    """The one spelling of a JSON object: keys sorted, no spaces, UTF-8, shortest floats.

    Raises:
        TypeError: a value that JSON lacks, text with a lone surrogate, an integer beyond 64 bits.
    """
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def job_key(app: AppId, input: JsonObject) -> JobKey:  # noqa: A002 - the endpoint's own word
    """BLAKE2b-128 of the app id and the canonical complete input, as 32 hex digits.

    `1` and `1.0` are different JSON, so the input has to be in the endpoint's own types.
    """
    hasher = _begun(app).copy()
    hasher.update(canonical_json(input))
    return JobKey(hasher.hexdigest())


@lru_cache(maxsize=8)
def _begun(app: AppId) -> blake2b:
    """What the keys of an app have in common: it is hashed once, not a million times."""
    return blake2b(app.encode() + b"\n", digest_size=16)


def derived_seed(run_seed: int, identity: str, cell_id: str) -> int:
    """The seed of a job that was given none: 31 bits, 0 included.

    It depends on what a row is (`identity`), never on where it stands, so rows may come and go around it.
    """
    digest = blake2b(f"{run_seed}\n{cell_id}\n{identity}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def content_hash(data: bytes) -> str:
    """SHA-256 of an image's bytes as 64 hex digits: what an upload and a stored file go by."""
    return sha256(data).hexdigest()
