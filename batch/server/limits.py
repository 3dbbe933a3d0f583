"""Limits of what callers may send and of how long the server waits for them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "ServerLimits"]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Sizes in bytes, times in seconds."""

    body_bytes: int = 72 * 2**20
    """Largest body of a submit: a source image of 50 MiB as a data URI, plus the other fields."""
    body_seconds: float = 300.0
    """Time limit for the body of a submit."""
    upload_bytes: int = 100 * 2**20
    """Largest file in one upload; the official clients send anything larger in parts."""
    part_bytes: int = 100 * 2**20
    """Largest part of an upload; the official clients send 10 MiB."""
    file_bytes: int = 2**30
    """Largest file that is sent in parts."""
    unfinished_bytes: int = 8 * 2**30
    """Total size of all unfinished uploads."""
    silence_seconds: float = 60.0
    """Longest pause in the middle of an upload."""
    source_bytes: int = 50 * 2**20
    """Largest source image. Precedent: the default cap of fal's own toolkit for images."""
    keep_alive_seconds: float = 5.0
    """Interval of comments in a status stream; clients expect data every 10 s."""
    listed_bytes: int = 2**20
    """Largest input or result that the request listing shows; fal keeps no longer ones either."""
    listed_images_bytes: int = 32 * 2**20
    """Total size of the images that one page of the listing shows as data URIs."""
    lock_seconds: float = 15.0
    """How long a new server waits for the previous one to release the data directory."""


DEFAULT_LIMITS = ServerLimits()
