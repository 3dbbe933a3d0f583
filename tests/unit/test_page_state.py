"""The JSON state of the web page."""

from __future__ import annotations

import orjson
import pytest

from batch.server.http.page.state import TEXT_LIMIT, numbers, request_card
from batch.server.queue.records import CompletedRequest, RequestSummary
from batch.server.queue.scheduler import LiveView
from batch.server.queue.stats import ServerStats
from batch.types import QueueState, RequestId

BODY = {"image_url": "/files/ab/abc.png", "prompt": "a cat", "seed": 5, "strength": 0.5}


def path_in(url):
    return url[url.index("/files/") :] if "/files/" in url else None


def listed(body=BODY, status=None, payload=None, **changes):
    ended = {} if status is None else {"ended_at": 20.0, "status": status, "payload": orjson.dumps(payload)}
    values = {
        "request_id": RequestId("r1"),
        "accepted_at": 10.0,
        "body": orjson.dumps(body) if isinstance(body, dict) else body,
        "started_at": None,
        "ended_at": None,
        "status": None,
        "payload": None,
        "error_type": None,
        "inference_time": None,
        "inline": False,
    }
    return RequestSummary(**values | ended | changes)


def card(*given, view=None, **changes):
    return request_card(listed(*given, **changes), view, path_in)


@pytest.mark.parametrize(
    ("view", "state", "position"),
    [
        (LiveView(QueueState.IN_QUEUE, 3, ()), "waiting", 3),
        (LiveView(QueueState.IN_PROGRESS, 0, ()), "running", None),
        (None, "waiting", None),
    ],
)
def test_a_live_request_has_the_queue_s_state(view, state, position):
    """A request that is accepted but not queued yet is shown as waiting."""
    shown = card(view=view)
    assert (shown["state"], shown["position"]) == (state, position)


@pytest.mark.parametrize(("status", "state"), [(200, "done"), (422, "failed"), (500, "failed"), (499, "cancelled")])
def test_an_ended_request_has_its_outcome(status, state):
    """A cancelled request is not shown as failed."""
    assert card(status=status, payload={"detail": "why"})["state"] == state


def test_a_result_contains_its_images_and_seed():
    """Seeds are strings, because JavaScript's integers end at 2^53. Images on other servers are omitted."""
    images = [{"url": "/files/cd/cde.png", "width": 4, "height": 3}, {"url": "https://elsewhere.example/x.png"}]
    shown = card(status=200, payload={"images": images, "seed": 2**63 - 1})
    assert shown["images"] == [{"image": "/files/cd/cde.png", "width": 4, "height": 3}]
    assert shown["seed"] == str(2**63 - 1)


def test_sync_mode_images_are_not_listed():
    """`sync_mode` images are not listed."""
    assert card(status=200, payload={"images": [{"url": "/files/cd/cde.png"}]}, inline=True)["images"] == []


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("/files/ab/abc.png", {"image": "/files/ab/abc.png", "name": "abc.png"}),
        ("https://old-host:1/files/ab/abc.png", {"image": "/files/ab/abc.png", "name": "abc.png"}),
        ("https://images.example/cat.png?token=secret", {"image": None, "name": "images.example"}),
        ("data:image/png;base64,###", {"image": None, "name": "invalid data URI"}),
        ("http://[", {"image": None, "name": "http://["}),
        (7, {"image": None, "name": "no image"}),
        (None, {"image": None, "name": "no image"}),
    ],
)
def test_a_source_on_another_server_is_shown_by_host(url, source):
    """Only the host is shown, never the query, which may contain a token, and nothing is loaded."""
    assert card({**BODY, "image_url": url})["source"] == source


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"prompt": 7, "seed": true, "strength": {}, "image_url": []}'])
def test_an_accepted_invalid_input_is_listed(body):
    """Inputs are validated on execution, so that any JSON object may be listed."""
    shown = card(body=body)
    assert (shown["prompt"], shown["seed"], shown["settings"]) == ("", None, {})


def test_a_long_input_is_omitted():
    """The store returns None for it."""
    assert card(body=None)["prompt"] == ""


def test_texts_are_bounded():
    """A prompt of a megabyte is not sent to every page each second."""
    assert len(card({**BODY, "prompt": "x" * 10_000})["prompt"]) == TEXT_LIMIT + 1


def test_a_failure_has_its_message():
    """The text is read from both error families."""
    detail = [{"loc": ["body", "strength"], "msg": "too strong", "type": "less_than_equal"}]
    assert card(status=422, payload={"detail": detail})["error"] == "strength: too strong"
    assert card(status=500, payload={"detail": "died"})["error"] == "died"


def test_the_numbers_are_the_counters():
    """Counts since the start, and the last minute by second."""
    tally = ServerStats()
    tally.ended(CompletedRequest("r1", "fal-ai/flux", 99.0, 200, b"{}"))
    shown = numbers(tally, waiting=3, running=2, now=100.0)
    assert (shown["waiting"], shown["running"], shown["finished"], shown["failed"]) == (3, 2, 1, 0)
    assert (shown["per_second"][-1], sum(shown["per_second"])) == (1, 1)
