"""Admission in virtual time: which job may submit when, and that a stop reaches every waiting job."""

from __future__ import annotations

from datetime import date
from random import Random

import anyio
import pytest
import trio.testing
from anyio.lowlevel import checkpoint

from batch.fal.errors import Trouble
from batch.fal.protocol import Reply
from batch.journal.states import State
from batch.money import Budget, Price
from batch.run.admission import Admission, StopCause
from batch.run.job import JobRun, RunStopping
from batch.run.pacing import TokenBucket
from batch.run.verdicts import judge
from batch.run.window import Window
from batch.testing.observer import RecordingObserver
from batch.types import Job, JobKey

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))


@pytest.fixture
def anyio_backend():
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


def admission(*, window=100, limit=None, price=None, submits=None) -> Admission:
    observer, budget = RecordingObserver(), Budget(limit)
    made = Admission(
        window=Window(window), budget=budget, price=price, submits=submits, observer=observer, rng=Random(1)
    )
    made.observer, made.budget = observer, budget
    return made


def job_run(number: int, images: int = 1, **options) -> JobRun:
    key = JobKey(f"{number:032d}")
    return JobRun(key, Job(key, {"num_images": images}, megapixels=1.0), **options)


async def times_of(admission: Admission, job_runs: list[JobRun], end=None) -> list[float]:
    """Return the time at which each job was admitted, in that order."""
    times: list[float] = []

    async def one(job_run: JobRun) -> None:
        await admission.acquire_submit(job_run)
        times.append(anyio.current_time() - began)
        if end is not None:
            await end(job_run)

    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for job_run in job_runs:
            tasks.start_soon(one, job_run)
    return times


async def test_a_window_lets_so_many_in_and_the_next_when_one_leaves():
    """Never more at once; a job that leaves admits the next one."""
    made, inside, most = admission(window=3), 0, 0

    async def job(number: int) -> None:
        nonlocal inside, most
        one = job_run(number)
        assert await made.enter(one)
        inside, most = inside + 1, max(most, inside + 1)
        await anyio.sleep(1.0)
        inside -= 1
        made.leave(one)

    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for number in range(9):
            tasks.start_soon(job, number)
    assert most == 3
    assert anyio.current_time() - began == pytest.approx(3.0)


async def test_a_rate_is_kept_by_all_together():
    """Ten submits at two a second take four and a half seconds."""
    times = await times_of(admission(submits=TokenBucket(2.0)), [job_run(n) for n in range(10)])
    assert times == pytest.approx([n / 2 for n in range(10)])


async def test_a_refused_submit_pauses_all_of_them():
    """For as long as the service asks, plus a random time; reported once."""
    made = admission()
    trouble = Trouble("submit", reply=Reply(429, headers={"retry-after": "20"}))
    for _ in range(50):
        made.throttled(judge(trouble), "HTTP 429", throttled=True)
    times = await times_of(made, [job_run(n) for n in range(3)])
    assert all(20.0 < time <= 20.5 for time in times)
    (said,) = made.observer.actions("paused")
    assert "HTTP 429" in said["reason"]


async def test_money_is_waited_for_while_something_can_free_it():
    """More is reserved than billed: the budget of three reservations pays for five jobs at half the price."""
    made, through = admission(limit=0.0901, price=PRICE), []

    async def job(number: int) -> None:
        one = job_run(number)
        try:
            await made.acquire_submit(one)
        except RunStopping:
            return
        through.append(number)
        await anyio.sleep(1.0)
        assert made.settle(one, 0.5) == pytest.approx(0.015)

    with anyio.fail_after(1000):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(job, number)
    assert len(through) == 5
    assert made.stopping is not None
    assert made.stopping.why is StopCause.BUDGET
    assert "more than the budget of $0.09" in made.stopping.reason


async def test_a_budget_that_is_too_small_stops_at_the_first_job():
    """No job in flight can release money."""
    made = admission(limit=0.05, price=PRICE)
    with pytest.raises(RunStopping):
        await made.acquire_submit(job_run(1, images=4))
    assert made.stopping is not None
    assert made.stopping.why is StopCause.BUDGET


async def test_without_a_price_nothing_is_reserved():
    """Without a price, a budget admits every job."""
    made, one = admission(limit=0.0), job_run(1)
    await made.acquire_submit(one)
    assert one.reserved_usd == 0.0
    assert made.settle(one, 3.0) is None


async def test_an_unbilled_end_costs_the_reservation():
    """Without billed units, the reservation counts as spent."""
    made, one = admission(limit=1.0, price=PRICE), job_run(1, images=2)
    await made.acquire_submit(one)
    assert one.reserved_usd == pytest.approx(0.06)
    assert made.settle(one, None) == pytest.approx(0.06)
    assert one.reserved_usd == 0.0


@pytest.mark.parametrize("waits_for", ["rate", "pause", "money", "window"])
async def test_a_stop_reaches_whoever_waits(waits_for):
    """At once, whatever the job waits for; a job that was not submitted is turned back."""
    made = admission(window=1, limit=0.03, price=PRICE, submits=TokenBucket(0.001) if waits_for == "rate" else None)
    first = job_run(0)
    assert await made.enter(first)
    await made.acquire_submit(first)
    if waits_for == "pause":
        made.throttled(judge(Trouble("submit", reply=Reply(429, headers={"retry-after": "900"}))), "", throttled=True)
    ended = []

    async def waiting() -> None:
        if waits_for == "window":
            assert not await made.enter(job_run(1))
        else:
            with pytest.raises(RunStopping):
                await made.acquire_submit(job_run(1))
        ended.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waiting)
        await anyio.sleep(5.0)
        assert not ended
        at = anyio.current_time()
        made.stop(StopCause.SIGNAL, "SIGINT")
    assert ended == [at]


async def test_what_was_submitted_before_is_let_in_while_the_run_stops():
    """A stop admits nothing new; paid jobs are still collected."""
    made = admission()
    made.stop(StopCause.SIGNAL, "SIGINT")
    assert not await made.enter(job_run(1))
    assert await made.enter(job_run(2, resumed=True, state=State.ACCEPTED))


async def test_the_first_stop_is_the_reason():
    """A later deadline does not replace the budget as the reason."""
    made = admission()
    made.stop(StopCause.BUDGET, "the budget is gone")
    made.stop(StopCause.DEADLINE, "the deadline is near")
    assert made.stopping.why is StopCause.BUDGET
    assert [facts["reason"] for facts in made.observer.actions("stopping")] == ["the budget is gone"]
    with anyio.fail_after(1):
        await made.stopped()


async def test_a_notice_of_one_kind_comes_every_thirty_seconds():
    """A network outage produces thousands of identical errors."""
    made = admission()
    for _ in range(100):
        made.notice("unreachable", "connect")
        made.notice("other", "x")
        await anyio.sleep(1.0)
    assert len(made.observer.actions("unreachable")) == len(made.observer.actions("other")) == 4


async def test_who_is_turned_back_gives_its_money_back():
    """Money reserved before the permit is released; a reservation of an earlier run for an unknown submit stays."""
    made = admission(limit=1.0, price=PRICE, submits=TokenBucket(0.01))
    await made.acquire_submit(job_run(0))
    fresh, unknown = job_run(1), job_run(2, reserved_usd=0.03)
    async with anyio.create_task_group() as tasks:

        async def waiting(one: JobRun) -> None:
            with pytest.raises(RunStopping):
                await made.acquire_submit(one)

        tasks.start_soon(waiting, fresh)
        tasks.start_soon(waiting, unknown)
        await anyio.sleep(1.0)
        assert fresh.reserved_usd == pytest.approx(0.03)
        made.stop(StopCause.SIGNAL, "SIGINT")
    assert (fresh.reserved_usd, unknown.reserved_usd) == (0.0, 0.03)
    assert made.budget.reserved == pytest.approx(0.03)


async def test_a_display_hears_of_a_long_pause_again_and_again():
    """Every thirty seconds, however many jobs wait; and once at its end."""
    made = admission()
    made.throttled(judge(Trouble("submit", reply=Reply(429, headers={"retry-after": "300"}))), "", throttled=True)
    await times_of(made, [job_run(n) for n in range(50)])
    assert 10 <= len(made.observer.actions("pausing")) <= 11
    assert len(made.observer.actions("resumed")) == 1


async def test_leaving_frees_a_reservation_that_others_wait_for():
    """A job that was turned back blocks nothing."""
    made = admission(limit=0.03, price=PRICE)
    first, second = job_run(1), job_run(2)
    await made.enter(first)
    await made.acquire_submit(first)
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            await made.acquire_submit(second)

        tasks.start_soon(wait)
        await checkpoint()
        assert second.reserved_usd == 0.0
        made.settle(first, 0.0)
        made.leave(first)
    assert second.reserved_usd == pytest.approx(0.03)
