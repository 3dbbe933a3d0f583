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
    """Between any two permits lie at most burst + rate x time of them; permits come in the order of asking."""
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
    """Rest earns no more than the burst, however long it was."""
    bucket = TokenBucket(rate, burst)
    delays = [bucket.reserve(1e6) for _ in range(burst + 1)]
    assert all(delay < 1e-6 for delay in delays[:-1])
    assert delays[-1] == pytest.approx(1 / rate, rel=1e-3)


def test_a_busy_bucket_serves_at_its_rate():
    """A hundred asked at once at 20 a second: the last is let through after five seconds, less the burst."""
    bucket = TokenBucket(20, 2)
    assert [bucket.reserve(0.0) for _ in range(100)][-1] == pytest.approx(98 / 20)


@given(gaps, st.floats(0.1, 100), st.floats(1, 50))
def test_a_bucket_tells_what_a_permit_would_have_to_wait_for(waits, rate, burst):
    """And takes none by it; another bucket of the same kind starts full."""
    bucket, now = TokenBucket(rate, burst), 0.0
    for wait in waits:
        now += wait
        assert bucket.wait(now) == bucket.wait(now) == bucket.reserve(now)
    assert bucket.another().reserve(now) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0.5)])
def test_a_bucket_that_would_never_give_is_refused(rate, burst):
    """A rate of nothing is no rate."""
    with pytest.raises(ValueError, match="rate must be above 0"):
        TokenBucket(rate, burst)


# --- pauses -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 1100))
def test_pauses_grow_up_to_their_cap_and_never_vanish(seed, times):
    """Without a word from the service: between a quarter of a second and a minute, also the 1,100th."""
    pauses, now = Pauses(Random(seed)), 0.0
    for _ in range(times):
        pause = pauses.begin(now)
        assert 0.25 <= pause <= 60.0
        now += pause
        assert pauses.left(now) == pytest.approx(0.0, abs=1e-6)
        now += 1e-6 * max(1.0, now)  # beyond float fuzz
    if times > 10:
        assert pause >= 30.0


def test_what_the_service_asks_for_is_waited_for_and_a_little_more():
    """`Retry-After` is a lower bound; the rest is random, so that not all come back at once."""
    pauses = Pauses(Random(1))
    assert 5.0 < pauses.begin(0.0, 5.0) <= 5.5


def test_many_refusals_at_once_are_one_pause():
    """A thousand submits turned away together are one event, not a thousand doublings."""
    pauses = Pauses(Random(1))
    first = pauses.begin(0.0)
    assert [pauses.begin(0.0) for _ in range(1000)] == [first] * 1000
    assert pauses.begin(0.0, 7.0) == 7.0
    assert pauses.left(0.0) == 7.0


def test_success_makes_the_next_pause_small_again():
    """Trouble that is over is forgotten."""
    pauses = Pauses(Random(1))
    for n in range(10):
        pauses.begin(n * 1000.0)
    pauses.succeeded()
    assert pauses.begin(1e6) <= 0.5


def test_there_is_no_pause_before_the_first():
    """Nothing is waited for at the start."""
    assert Pauses(Random(1)).left(0.0) == 0.0


# --- window -----------------------------------------------------------------------------------------------

happenings = st.lists(st.one_of(st.sampled_from(["enter", "429"]), st.floats(0, 1), st.none()), max_size=300)


@given(happenings, st.integers(1, 30), st.integers(0, 30))
def test_a_window_stays_within_its_bounds(script, start, room):
    """Whatever happens the size lies between floor and ceiling, moves by one at most at a leave, and says why."""
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
    """Jobs enter until it is full; as how many each came."""
    came = []
    while not window.full:
        came.append(window.entered())
    return came


def drive(window: Window, inside: list[int], slots: int, ends: int) -> None:
    """Jobs of a service with so many slots and even times: the n-th at once is queued for 1 - slots / n."""
    for _ in range(ends):
        came_as = inside.pop(0)
        window.left(came_as, max(0.0, 1.0 - slots / came_as))
        inside += fill(window)


@pytest.mark.parametrize("start", [2, 16, 300])
@pytest.mark.parametrize("slots", [1, 2, 7, 40, 200])
def test_a_window_finds_what_the_slots_need(slots, start):
    """All slots are busy, and about half as many jobs wait; it is there within some stays and then rests."""
    window = Window(start, floor=2, ceiling=1000)
    inside = fill(window)
    drive(window, inside, slots, 40 * max(slots, start))
    assert slots < window.size <= 2 * slots + 2
    rested = window.size
    drive(window, inside, slots, 10 * slots)
    assert abs(window.size - rested) <= 0.05 * rested + 1


def test_a_window_whose_jobs_run_at_once_soon_doubles():
    """The service takes all that it is given."""
    window = Window(8, ceiling=100)
    inside = fill(window)
    for _ in range(24):
        change = window.left(inside.pop(0), 0.0)
        inside += fill(window)
        assert change is None or "hardly queued" in change.reason
    assert 20 <= window.size <= 32


def test_a_window_that_is_not_full_does_not_grow():
    """The manifest or the rate is what holds it back, not the window."""
    window = Window(16, ceiling=100)
    for _ in range(200):
        window.left(window.entered(), 0.0)
    assert window.size == 16


def test_a_window_whose_jobs_mostly_queue_shrinks():
    """What the service keeps waiting gains nothing, and would be paid for after a stop."""
    window = Window(10, floor=2, ceiling=100)
    inside, changes = fill(window), []
    for _ in range(100):
        changes.append(window.left(inside.pop(0), 0.9))
        inside += fill(window)
    assert window.size == 2
    assert "concurrent job was queued for 90% of its time" in next(c.reason for c in changes if c)


def test_a_job_of_which_nothing_is_known_moves_nothing():
    """A resumed job's stay says nothing about the service today."""
    window = Window(10, floor=2, ceiling=100)
    assert window.left(fill(window)[0], None) is None
    assert window.size == 10


@pytest.mark.parametrize(
    ("stay", "inference", "last_queued", "share"),
    [
        (10.0, 5.0, None, 1 - 5.25 / 10),  # waited nearly half of its time
        (5.2, 5.0, 0.1, 0.0),  # noticing it is no queue
        (0.2, 0.0, None, 0.0),  # an instant service is never queued, however busy this machine is
        (10.0, None, 8.0, 0.8),  # a service that does not say how long it executed
        (10.0, None, None, 0.0),
        (0.0, None, None, 0.0),
    ],
)
def test_the_queued_share_of_a_stay(stay, inference, last_queued, share):
    """What the service says it executed, and the noticing, is not queueing."""
    assert queued_share(stay, inference, last_queued) == pytest.approx(share)


def test_a_429_cuts_at_most_once_a_second():
    """A burst of refusals is one sign."""
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
    """After a 429 the window grows by one place in the time of a job, as congestion is avoided elsewhere."""
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
