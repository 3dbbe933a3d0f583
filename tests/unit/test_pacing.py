"""Rate, window and pauses, without a clock: `now` is an argument."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.run.pacing import Pauses, TokenBucket
from batch.run.window import Window, queued_share

gaps = st.lists(st.floats(0, 5), min_size=1, max_size=200)

# --- token bucket -----------------------------------------------------------------------------------------


@given(gaps, st.floats(0.1, 100), st.floats(1, 50))
def test_a_token_bucket_is_never_over_its_rate_in_any_window(waits, rate, burst):
    """Between any two permits there are at most burst + rate x time of them; permits are in the order of requests."""
    bucket, now, times = TokenBucket(rate, burst), 0.0, []
    for wait in waits:
        now += wait
        delay = bucket.reserve(now)
        assert delay >= 0
        times.append(now + delay)
    assert all(later - earlier > -1e-9 for earlier, later in itertools.pairwise(times))
    for first in range(len(times)):
        for last in range(first, len(times)):
            count, seconds = last - first + 1, times[last] - times[first]
            assert count <= burst + rate * seconds + 1e-6 * (1 + rate)


@given(st.floats(0.1, 100), st.integers(1, 50))
def test_a_rested_bucket_gives_its_burst_at_once_and_no_more(rate, burst):
    """An idle bucket never holds more than its burst."""
    bucket = TokenBucket(rate, burst)
    delays = [bucket.reserve(1e6) for _ in range(burst + 1)]
    assert all(delay < 1e-6 for delay in delays[:-1])
    assert delays[-1] == pytest.approx(1 / rate, rel=1e-3)


def test_a_busy_bucket_serves_at_its_rate():
    """A hundred permits requested at once at 20 a second: the last is valid after five seconds, less the burst."""
    bucket = TokenBucket(20, 2)
    assert [bucket.reserve(0.0) for _ in range(100)][-1] == pytest.approx(98 / 20)


@given(gaps, st.floats(0.1, 100), st.floats(1, 50))
def test_a_bucket_tells_what_a_permit_would_have_to_wait_for(waits, rate, burst):
    """`wait` takes no permit; `another` starts full."""
    bucket, now = TokenBucket(rate, burst), 0.0
    for wait in waits:
        now += wait
        assert bucket.wait(now) == bucket.wait(now) == bucket.reserve(now)
    assert bucket.another().reserve(now) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0.5)])
def test_a_bucket_that_would_never_give_is_refused(rate, burst):
    """The rate must be positive, the burst at least 1."""
    with pytest.raises(ValueError, match="rate must be above 0"):
        TokenBucket(rate, burst)


# --- pauses -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 1100))
def test_pauses_grow_up_to_their_cap_and_never_vanish(seed, times):
    """Without a Retry-After: between a quarter of a second and a minute, also the 1,100th."""
    pauses, now = Pauses(Random(seed)), 0.0
    for _ in range(times):
        pause = pauses.begin(now)
        assert 0.25 <= pause <= 60.0
        now += pause
        assert pauses.left(now) == pytest.approx(0.0, abs=1e-6)
        now += 1e-6 * max(1.0, now)  # larger than float rounding
    if times > 10:
        assert pause >= 30.0


def test_what_the_service_asks_for_is_waited_for_and_a_little_more():
    """`Retry-After` is a lower bound; the rest is random, so that not all clients return at once."""
    pauses = Pauses(Random(1))
    assert 5.0 < pauses.begin(0.0, 5.0) <= 5.5


def test_many_refusals_at_once_are_one_pause():
    """A thousand submits refused together cause one pause, not a thousand doublings."""
    pauses = Pauses(Random(1))
    first = pauses.begin(0.0)
    assert [pauses.begin(0.0) for _ in range(1000)] == [first] * 1000
    assert pauses.begin(0.0, 7.0) == 7.0
    assert pauses.left(0.0) == 7.0


def test_success_makes_the_next_pause_small_again():
    """A success resets the backoff."""
    pauses = Pauses(Random(1))
    for n in range(10):
        pauses.begin(n * 1000.0)
    pauses.succeeded()
    assert pauses.begin(1e6) <= 0.5


def test_there_is_no_pause_before_the_first():
    """Nothing waits at the start."""
    assert Pauses(Random(1)).left(0.0) == 0.0


# --- window -----------------------------------------------------------------------------------------------

happenings = st.lists(st.one_of(st.sampled_from(["enter", "429"]), st.floats(0, 1), st.none()), max_size=300)


@given(happenings, st.integers(1, 30), st.integers(0, 30))
def test_a_window_stays_within_its_bounds(script, start, room):
    """The size always stays between floor and ceiling, changes by at most one at a leave, and has a reason."""
    floor, ceiling = max(1, start // 2), start + room
    window, inside, now = Window(start, floor=floor, ceiling=ceiling), [], 0.0
    for what in script:
        now += 0.3
        before, change = window.size, None
        if what == "enter":
            if not window.full:
                inside.append(window.entered())
        elif what == "429":
            change = window.throttled(now)
        elif inside:
            change = window.left(inside.pop(0), what)
            assert abs(window.size - before) <= 1
        assert floor <= window.size <= ceiling
        assert window.in_flight == len(inside)
        assert (change is not None and change.size == window.size and change.reason) or window.size == before


def fill(window: Window) -> list[int]:
    """Let jobs enter until the window is full; return the number in flight at each entry."""
    came = []
    while not window.full:
        came.append(window.entered())
    return came


def drive(window: Window, inside: list[int], slots: int, ends: int) -> None:
    """Simulate a service with constant times: the n-th concurrent job is queued for 1 - slots / n."""
    for _ in range(ends):
        came_as = inside.pop(0)
        window.left(came_as, max(0.0, 1.0 - slots / came_as))
        inside += fill(window)


@pytest.mark.parametrize("start", [2, 16, 300])
@pytest.mark.parametrize("slots", [1, 2, 7, 40, 200])
def test_a_window_finds_what_the_slots_need(slots, start):
    """All slots are busy, and about half as many jobs wait; this takes a few stays, then the size is stable."""
    window = Window(start, floor=2, ceiling=1000)
    inside = fill(window)
    drive(window, inside, slots, 40 * max(slots, start))
    assert slots < window.size <= 2 * slots + 2
    rested = window.size
    drive(window, inside, slots, 10 * slots)
    assert abs(window.size - rested) <= 0.05 * rested + 1


def test_a_window_whose_jobs_run_at_once_soon_doubles():
    """The service executes everything at once."""
    window = Window(8, ceiling=100)
    inside = fill(window)
    for _ in range(24):
        change = window.left(inside.pop(0), 0.0)
        inside += fill(window)
        assert change is None or "hardly queued" in change.reason
    assert 20 <= window.size <= 32


def test_a_window_that_is_not_full_does_not_grow():
    """The manifest or the rate is the limit, not the window."""
    window = Window(16, ceiling=100)
    for _ in range(200):
        window.left(window.entered(), 0.0)
    assert window.size == 16


def test_a_window_whose_jobs_mostly_queue_shrinks():
    """Jobs queued at the service gain nothing, and must be paid for after a stop."""
    window = Window(10, floor=2, ceiling=100)
    inside, changes = fill(window), []
    for _ in range(100):
        changes.append(window.left(inside.pop(0), 0.9))
        inside += fill(window)
    assert window.size == 2
    assert "concurrent job was queued for 90% of its time" in next(c.reason for c in changes if c)


def test_a_job_of_which_nothing_is_known_moves_nothing():
    """The stay of a resumed job says nothing about the current service."""
    window = Window(10, floor=2, ceiling=100)
    assert window.left(fill(window)[0], None) is None
    assert window.size == 10


@pytest.mark.parametrize(
    ("stay", "inference", "last_queued", "share"),
    [
        (10.0, 5.0, None, 1 - 5.25 / 10),  # queued for nearly half of its time
        (5.2, 5.0, 0.1, 0.0),  # the time until it is noticed is not queueing
        (0.2, 0.0, None, 0.0),  # an instant service never queues, however busy this machine is
        (10.0, None, 8.0, 0.8),  # a service without inference times
        (10.0, None, None, 0.0),
        (0.0, None, None, 0.0),
    ],
)
def test_the_queued_share_of_a_stay(stay, inference, last_queued, share):
    """Execution time and the time until the end is noticed are not queueing."""
    assert queued_share(stay, inference, last_queued) == pytest.approx(share)


def test_a_429_cuts_at_most_once_a_second():
    """Simultaneous refusals count once."""
    window = Window(100, floor=10, ceiling=200)
    change = window.throttled(5.0)
    assert change is not None
    assert (change.size, change.reason) == (80, "the service answered 429")
    assert window.throttled(5.9) is None
    assert window.throttled(6.0).size == 64
    for second in range(7, 60):
        window.throttled(float(second))
    assert window.size == 10


def test_what_was_too_much_is_come_near_with_care():
    """After a 429 the window grows by one place per duration of a job, like TCP congestion avoidance."""
    window = Window(100, floor=10, ceiling=200)
    window.throttled(0.0)
    inside = fill(window)
    for _ in range(4 * 80):
        window.left(inside.pop(0), 0.0)
        inside += fill(window)
    assert 82 <= window.size <= 84


def test_a_fixed_window_keeps_its_size():
    """`--max-in-flight 5` is five."""
    window = Window(5)
    for came_as in fill(window):
        assert window.left(came_as, 0.0) is None
    assert window.throttled(1.0) is None
    assert window.size == 5
