"""Server statistics: outcomes, engine times, finished requests per second, route groups."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.server.queue.records import CompletedRequest
from batch.server.queue.stats import SECONDS_BOUNDS, SHOWN_SECONDS, EndKind, ServerStats, route_of
from batch.types import AppId, RequestId

ID = "0190c5a1-0000-7000-8000-000000000000"


def completed(at=1000.0, status=200, seconds=None):
    return CompletedRequest(RequestId(ID), AppId("fal-ai/flux"), at, status, b"{}", inference_time=seconds)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, EndKind.FINISHED),
        (422, EndKind.FAILED),
        (499, EndKind.CANCELLED),
        (500, EndKind.FAILED),
        (504, EndKind.FAILED),
    ],
)
def test_a_result_is_counted_by_outcome(status, outcome):
    """499 counts as cancelled, any other error as failed."""
    tally = ServerStats()
    tally.ended(completed(status=status))
    assert tally.outcomes == {outcome: 1}


def test_finished_requests_are_counted_per_second():
    """The last value is the newest complete second; the current one is omitted."""
    tally = ServerStats()
    for at in (939.9, 940.0, 999.0, 999.9, 1000.0):
        tally.ended(completed(at))
    tally.ended(completed(999.0, status=422))
    counts = tally.per_second(1000.5)
    assert (len(counts), counts[0], counts[-1], sum(counts)) == (SHOWN_SECONDS, 1, 2, 3)


@given(st.lists(st.floats(0, 500), max_size=300))
def test_the_last_minute_is_complete_and_bounded(times):
    """At any rate, the counts add up to the requests of the last minute, with one entry per second."""
    tally = ServerStats()
    for at in sorted(times):
        tally.ended(completed(at))
    assert sum(tally.per_second(501)) == sum(441 <= int(at) < 501 for at in times)


def test_what_ended_more_than_a_minute_ago_takes_no_memory():
    """A server that works for days holds as much as after its first minutes."""
    tally, sizes = ServerStats(), []
    for second in range(10 * SHOWN_SECONDS):
        tally.ended(completed(1000.0 + second))
        sizes.append(len(pickle.dumps(tally)))
    assert max(sizes) < 1.1 * sizes[2 * SHOWN_SECONDS]


def test_setting_the_clock_back_loses_no_request():
    """They are counted in the latest second."""
    tally = ServerStats()
    for at in (1000.0, 400.0):
        tally.ended(completed(at))
    assert sum(tally.per_second(1001)) == 2


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.01, 0), (0.011, 1), (300.0, 9), (301.0, 10)])
def test_a_bound_is_inclusive(seconds, bucket):
    """Prometheus buckets are "less than or equal"."""
    tally = ServerStats()
    tally.ended(completed(seconds=seconds))
    assert tally.engine_buckets.index(1) == bucket
    assert len(tally.engine_buckets) == len(SECONDS_BOUNDS) + 1


@pytest.mark.parametrize(
    ("method", "path", "group"),
    [
        ("POST", "/fal-ai/flux/dev/image-to-image", "submit"),
        ("POST", "/unknown/app", "submit"),
        ("GET", f"/fal-ai/flux/requests/{ID}", "result"),
        ("GET", f"/fal-ai/flux/requests/{ID}/", "result"),
        ("GET", f"/fal-ai/flux/dev/image-to-image/requests/{ID}/response", "result"),
        ("GET", f"/fal-ai/flux/requests/{ID}/status", "status"),
        ("GET", f"/fal-ai/flux/requests/{ID}/status/stream", "stream"),
        ("PUT", f"/fal-ai/flux/requests/{ID}/cancel", "cancel"),
        ("GET", f"/fal-ai/flux/requests/{ID}/anything", "other"),
        ("POST", "/run/fal-ai/flux/dev/image-to-image", "run"),
        ("PUT", "/storage/upload/token/files/ab/abc", "upload"),
        ("GET", "/files/ab/abc.png", "files"),
        ("GET", "/v1/models/requests/by-endpoint", "platform"),
        ("GET", "/", "page"),
        ("GET", "/page/state", "page"),
        ("GET", "/health", "health"),
        ("GET", "/made/up", "other"),
        ("OPTIONS", "*", "other"),
    ],
)
def test_a_path_belongs_to_a_fixed_set_of_groups(method, path, group):
    """Every form of the queue's paths, and all other paths."""
    assert route_of(method, path) == group
