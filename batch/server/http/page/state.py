"""The page's live state as JSON: numbers and newest requests. Pure.

Untrusted text (prompts, URLs, error messages) is truncated here; the page inserts it as text, never as HTML. Seeds are
strings, because JavaScript's integers are exact only up to 2^53.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias
from urllib.parse import urlsplit

from batch.fal import protocol
from batch.fal.protocol import Malformed, Reply
from batch.server.queue.records import RequestSummary
from batch.server.queue.scheduler import LiveView
from batch.server.queue.stats import EndKind, ServerStats
from batch.types import Json, JsonObject, QueueState

__all__ = ["PathIn", "numbers", "request_card"]

TEXT_LIMIT = 400
"""Maximum length of a prompt, URL or error message in characters."""
_SETTINGS = ("strength", "num_inference_steps", "guidance_scale", "output_format", "num_images")

PathIn: TypeAlias = Callable[[str], str | None]
"""Returns the path of a file of this server in a URL, or None."""


def numbers(tally: ServerStats, *, waiting: int, running: int, now: float) -> JsonObject:
    """Return the counts since the start, and the requests finished in each of the last 60 seconds."""
    return {
        "now": now,
        "waiting": waiting,
        "running": running,
        **{outcome.value: tally.outcomes[outcome] for outcome in EndKind},
        "per_second": list(tally.per_second(now)),
    }


def request_card(listed: RequestSummary, view: LiveView | None, path_in: PathIn) -> JsonObject:
    """Return one request for the page's list."""
    given, made = _object(listed.body), _object(listed.payload)
    seed = made.get("seed", given.get("seed"))
    card: JsonObject = {
        "id": listed.request_id,
        "state": _state(listed, view),
        "position": view.position if view is not None and view.state is QueueState.IN_QUEUE else None,
        "accepted_at": listed.accepted_at,
        "ended_at": listed.ended_at,
        "seconds": listed.inference_time,
        "prompt": _text(given.get("prompt")),
        "seed": str(seed) if isinstance(seed, int) and not isinstance(seed, bool) else None,
        "settings": {name: given[name] for name in _SETTINGS if isinstance(given.get(name), str | int | float)},
        "source": _source(given.get("image_url"), path_in),
        "images": [] if listed.inline else list(_images(made.get("images"), path_in)),
        "error": None,
    }
    if listed.status is not None and listed.status >= 400:
        card["error"] = _text(protocol.error_body_of(Reply(listed.status, listed.payload or b"{}")).message)
    return card


def _state(listed: RequestSummary, view: LiveView | None) -> str:
    if listed.status is None:
        return "waiting" if view is None or view.state is QueueState.IN_QUEUE else "running"
    if listed.status < 400:
        return "done"
    return "cancelled" if listed.status == 499 else "failed"


def _source(url: Json, path_in: PathIn) -> JsonObject:
    """Return the source image's path, or the host name for one on another server, which the page never loads."""
    if not isinstance(url, str):
        return {"image": None, "name": "no image"}
    path = path_in(url)
    if path is not None:
        return {"image": path, "name": path.rpartition("/")[2]}
    if url[:5].lower() == "data:":
        return {"image": None, "name": "invalid data URI"}
    return {"image": None, "name": _host(url)}


def _host(url: str) -> str:
    try:
        return _text(urlsplit(url).hostname or url)
    except ValueError:
        return _text(url)


def _images(images: Json, path_in: PathIn) -> Iterable[JsonObject]:
    for image in images if isinstance(images, list) else []:
        if isinstance(image, dict) and isinstance(url := image.get("url"), str) and (path := path_in(url)) is not None:
            yield {"image": path, "width": image.get("width"), "height": image.get("height")}


def _text(value: Json) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "…"


def _object(body: bytes | None) -> JsonObject:
    try:
        return protocol.read_object(body) if body is not None else {}
    except Malformed:
        return {}
