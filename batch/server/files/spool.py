"""Streams of unknown length onto the disk, in bounded memory. Owns nothing but the writing."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from batch.system.descriptors import patiently

__all__ = ["Spooled", "TooLarge", "spool"]

_CHUNK = 1 << 20


class TooLarge(ValueError):
    """More bytes came than may be stored."""


class Spooled(NamedTuple):
    """What was written."""

    sha256: bytes
    size_bytes: int


async def spool(chunks: AsyncIterator[bytes], place: Path, limit: int) -> Spooled:
    """Append a stream of at most `limit` bytes to a file; it is not synced.

    Raises:
        TooLarge: more came; what was written so far is left for the caller to remove.
        OSError: the disk refused.
    """
    digest, size, buffer = hashlib.sha256(), 0, bytearray()
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"more than {limit} bytes")
        digest.update(chunk)
        buffer += chunk
        if len(buffer) >= _CHUNK:
            await asyncio.to_thread(_append, place, buffer)
            buffer = bytearray()
    await asyncio.to_thread(_append, place, buffer)
    return Spooled(digest.digest(), size)


def _append(place: Path, data: bytearray) -> None:
    with patiently(lambda: place.open("ab"), time.sleep) as file:
        file.write(data)
