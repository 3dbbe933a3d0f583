"""Limits of requests: sizes and timeouts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "ServerLimits"]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Maximum sizes and timeouts of the server."""

    body_bytes: int = 72 * 2**20
    """Largest body of a submit: a source image of 50 MiB as a data URI, plus the other fields."""
    body_seconds: float = 300.0
    """Time limit for the body of a submit."""
    upload_bytes: int = 100 * 2**20
    """Largest file in one upload; the official clients use multipart uploads for larger files."""
    part_bytes: int = 100 * 2**20
    """Largest part of an upload; the official clients send 10 MiB."""
    file_bytes: int = 2**30
    """Largest file of a multipart upload."""
    unfinished_bytes: int = 8 * 2**30
    """Total of all unfinished uploads."""
    silence_seconds: float = 60.0
    """Timeout for the next bytes of an upload."""
    source_bytes: int = 50 * 2**20
    """Largest source image. Source: the default limit for images in fal's toolkit."""
    keep_alive_seconds: float = 5.0
    """Interval of comments in a status stream; clients expect data every 10 s."""
    listed_bytes: int = 2**20
    """Larger inputs and results are not listed: fal does not keep them either."""
    listed_images_bytes: int = 32 * 2**20
    """Maximum total size of the data URIs on one page of the listing."""
    lock_seconds: float = 15.0
    """Seconds that a new server waits for the previous one to exit."""


DEFAULT_LIMITS = ServerLimits()
