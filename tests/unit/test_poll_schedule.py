"""When to read a status next, without a clock: ages are arguments."""

from __future__ import annotations

import itertools
import math
import pickle
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.run.poll_schedule import JobTimings, PollSchedule

seconds = st.floats(0, 1e4)


def polled(
    times: PollSchedule, duration: float, *, with_inference: bool = True, queued: float = 0.0
) -> tuple[int, float]:
    """Return the reads of one job of this duration, and how late its end was noticed."""
    timings, reads = JobTimings(), 0
    while True:
        age = times.due(timings)
        reads += 1
        if age >= duration:
            timings.inference = timings.executed = duration - queued if with_inference else None
            times.took(timings, age)
            return reads, age - duration
        times.pending(timings, age, queued=age < queued, position=None)


def means(pairs) -> tuple[float, float]:
    reads, late = zip(*pairs, strict=True)
    return sum(reads) / len(reads), sum(late) / len(late)


@given(
    st.lists(st.tuples(st.none() | seconds, seconds, st.none() | seconds), max_size=300),
    st.none() | st.tuples(st.floats(0, 1e6), st.booleans(), st.none() | st.integers(0, 10**6)),
)
def test_a_poll_time_is_within_its_bounds(finished, read):
    """At most ten seconds after the last read unless its turn is far off, and never a busy loop."""
    times = PollSchedule()
    for unfinished, noticed, inference in finished:
        timings = JobTimings()
        if unfinished is not None:
            times.pending(timings, min(unfinished, noticed), queued=False, position=None)
        timings.inference = timings.executed = inference
        times.took(timings, noticed)
    timings = JobTimings(10**6)
    last = 0.0
    if read is not None:
        last, queued, position = read
        times.pending(timings, last, queued=queued, position=position)
    delay = times.due(timings) - last
    starts_at = min(PollSchedule.LONGEST_QUEUED, ((timings.starts_at or 0.0) - last) / 2) if finished else 0.0
    longest = max(PollSchedule.LONGEST, starts_at)
    tolerance = 1e-9 * (1 + last + longest)
    assert (
        min(longest, max(PollSchedule.FINEST, last * PollSchedule.CLOSEST)) - tolerance <= delay <= longest + tolerance
    )


@pytest.mark.parametrize("with_inference", [True, False])
@pytest.mark.parametrize("duration", [0.2, 2.0, 6.0, 40.0])
def test_jobs_of_one_length_need_few_reads_and_are_noticed_soon(duration, with_inference):
    """After some ended jobs; fewer reads if the service reports inference times."""
    times, rng = PollSchedule(), Random(3)
    for _ in range(200):
        polled(times, duration * rng.uniform(0.95, 1.05), with_inference=with_inference)
    reads, late = means(
        polled(times, duration * rng.uniform(0.95, 1.05), with_inference=with_inference) for _ in range(200)
    )
    assert reads < (3.2 if with_inference else 3.5) + duration / PollSchedule.LONGEST
    assert late < max(0.02, 0.05 * duration)


def test_a_service_that_always_takes_the_same_is_read_once():
    """And noticed within 1%."""
    times = PollSchedule()
    for _ in range(200):
        polled(times, 5.0)
    reads, late = polled(times, 5.0)
    assert (reads, late < 0.05) == (1, True)


@pytest.mark.parametrize("with_inference", [True, False])
@pytest.mark.parametrize(("before", "after"), [(6.0, 1.0), (1.0, 6.0), (40.0, 2.0)])
def test_poll_times_follow_a_service_that_changes(before, after, with_inference):
    """A faster or slower service is learned within 400 jobs."""
    times, rng = PollSchedule(), Random(3)
    for _ in range(300):
        polled(times, before * rng.uniform(0.9, 1.1), with_inference=with_inference)
    for _ in range(400):
        polled(times, after * rng.uniform(0.9, 1.1), with_inference=with_inference)
    reads, late = means(polled(times, after * rng.uniform(0.9, 1.1), with_inference=with_inference) for _ in range(20))
    assert reads < 5
    assert late < 0.15 * after


def test_in_a_mixture_the_fast_jobs_do_not_wait_for_the_slow_ones():
    """Cached answers in 0.1 s among real ones in 8 s: each kind is read at its end."""
    times = PollSchedule()
    found = [polled(times, 0.1 if n % 2 else 8.0) for n in range(400)][100:]
    assert means(found)[0] < 4
    assert means(found[1::2])[1] < 0.15
    assert means(found[::2])[1] < 0.4


def test_in_a_mixture_of_a_silent_service_the_fast_jobs_wait_for_half_of_the_slow_ones_at_most():
    """Without inference times a late read looks like a slow job."""
    times = PollSchedule()
    found = [polled(times, 0.1 if n % 2 else 8.0, with_inference=False) for n in range(400)][100:]
    assert means(found[1::2])[1] < 4.0


def test_only_who_nearly_always_finds_an_end_is_sure():
    """Twenty-five hits in a row are enough, four misses are enough to lose it, and a share of one half never is."""
    times = PollSchedule()
    for n in range(26):
        assert not times.sure or n > 20
        times.came(in_time=True)
    assert times.sure
    for _ in range(4):
        times.came(in_time=False)
    assert not times.sure
    for _ in range(200):
        times.came(in_time=True)
        times.came(in_time=False)
        assert not times.sure


def test_what_is_queued_is_not_read_before_it_can_have_ended():
    """After IN_QUEUE a job cannot end before the shortest execution time has passed."""
    times = PollSchedule()
    for _ in range(50):
        polled(times, 5.0)
    timings = JobTimings()
    times.pending(timings, 5.0, queued=True, position=None)
    assert times.due(timings) == pytest.approx(10.0)
    times.pending(timings, 5.5, queued=False, position=None)
    assert times.due(timings) < 6.0


def test_a_job_is_overdue_after_ten_times_the_usual_duration_and_ten_minutes_at_least():
    """Based on the median; a few slow jobs change nothing."""
    times = PollSchedule()
    assert times.overdue(JobTimings()) == 600.0
    for _ in range(20):
        polled(times, 5.0)
    assert times.overdue(JobTimings()) == 600.0
    for _ in range(100):
        polled(times, 200.0)
    for _ in range(20):
        polled(times, 5000.0)
    assert times.overdue(JobTimings()) == pytest.approx(2000.0, rel=0.1)


def test_an_overdue_job_is_looked_at_later_and_later():
    """The interval is half of its age, at most half an hour; restarted when its status becomes unreadable."""
    times, timings, ages = PollSchedule(), JobTimings(), []
    for _ in range(9):
        ages.append(times.overdue(timings))
        times.overdue_read(timings, ages[-1])
    assert ages[:4] == [600.0, 900.0, 1350.0, 2025.0]
    assert ages[-1] - ages[-2] == 1800.0
    resumed = JobTimings(resumed=True)
    resumed.unreadable = 86400.0
    assert times.overdue(resumed) == 87000.0
    times.overdue_read(resumed, 87000.0)
    assert times.overdue(resumed) == 88800.0


def test_an_implausibly_large_place_is_looked_at_every_ten_minutes():
    """Positions may be wrong: a position of a million billion must not cause an endless wait."""
    times = PollSchedule()
    for _ in range(50):
        polled(times, 5.0)
    timings = JobTimings(10**15)
    times.pending(timings, 10.0, queued=True, position=10**15 - 1)
    assert times.due(timings) == 10.0 + PollSchedule.LONGEST_QUEUED


def test_a_place_in_a_long_queue_foretells_the_turn():
    """Accepted at place 300, after 10 s at 290: 290 s to go; it is read half way, not every ten seconds."""
    times = PollSchedule()
    for _ in range(50):
        polled(times, 5.0)
    timings = JobTimings(300)
    times.pending(timings, 10.0, queued=True, position=290)
    assert timings.starts_at == pytest.approx(300.0)
    assert times.due(timings) == pytest.approx(155.0)
    times.pending(timings, 155.0, queued=True, position=290)  # no progress: the prediction is soon dropped
    assert times.due(timings) <= 155.0 + 72.5


def test_a_place_that_grows_foretells_nothing():
    """Other jobs may overtake it; then it is read as usual."""
    times = PollSchedule()
    for _ in range(50):
        polled(times, 5.0)
    timings = JobTimings(3)
    times.pending(timings, 5.0, queued=True, position=7)
    assert timings.starts_at is None
    assert times.due(timings) == pytest.approx(10.0)


def test_knowing_nothing_all_jobs_together_feel_for_the_first_end():
    """No two jobs are read at the same age, and the steps are finer than a single job could afford."""
    times = PollSchedule()
    ages = [times.due(JobTimings()) for _ in range(100)]
    assert ages[0] == PollSchedule.FIRST
    assert all(later / earlier == pytest.approx(1.03) for earlier, later in itertools.pairwise(ages))
    alone, timings, age = PollSchedule(), JobTimings(), 0.0
    reads = 0
    while age < 5.0:
        age = alone.due(timings)
        alone.pending(timings, age, queued=False, position=None)
        reads += 1
    assert reads <= 2 + math.log(5.0 / PollSchedule.FIRST) / math.log(1 + PollSchedule.SHARE)


def test_knowing_nothing_a_queued_job_leaves_the_feeling_to_those_that_run():
    """It will not be the first to end."""
    times, timings = PollSchedule(), JobTimings()
    times.pending(timings, times.due(timings), queued=True, position=3)
    assert times.due(timings) == pytest.approx(PollSchedule.FIRST + PollSchedule.LONGEST)


def test_jobs_of_an_earlier_run_do_not_take_part_in_the_feeling():
    """They are hours old, and would delay the reads of new jobs by hours."""
    times = PollSchedule()
    for _ in range(100):
        old = JobTimings(resumed=True)
        times.pending(old, 3600.0, queued=False, position=None)
        assert times.due(old) == 3600.0 + PollSchedule.LONGEST
    assert times.due(JobTimings()) == PollSchedule.FIRST


def test_no_schedule_of_reads_meets_both_bars_of_a_log_normal_service_in_five_reads():
    """Sigma 0.6: to notice 95 % within 12 % of their time, and half within 4 %, takes more than eight reads a job.

    A schedule is a density of reads: r(z) is the interval to the next read as a share of the age, at z standard
    deviations. A job that ends there is noticed within a share s with probability min(1, s / r), and all jobs that have
    not ended are read. So each dz costs sigma x (1 - Phi(z)) / r reads, and more per end where fewer jobs end: the
    cheapest way to 95 % skips the first 5 % and reads all others at r = 0.12. That costs this integral, without the
    second condition.
    """
    sigma, share, first = 0.6, 0.12, -1.645
    density = math.exp(-(first**2) / 2) / math.sqrt(2 * math.pi)
    beyond = density - first * 0.95  # the integral of 1 - Phi from there on
    assert sigma * beyond / share > 8.0


def test_the_memory_is_bounded():
    """A run of a million jobs remembers the last few hundred."""
    times, sizes = PollSchedule(), []
    for _ in range(5):
        for n in range(7 * PollSchedule.MEMORY):
            timings = JobTimings()
            timings.inference = n % 5 + 0.5
            times.took(timings, n % 7 + 0.5)
        sizes.append(len(pickle.dumps(times)))
    assert max(sizes) < 1.01 * sizes[0]
