"""How soon, and with how many reads, the runner notices that a job has ended: whole runs in virtual time."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import anyio
import pytest

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.run.pacing import TokenBucket
from batch.run.window import Window
from batch.testing.service import CompletesWith, FakeService
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio


class Noticed(NamedTuple):
    """Reads per job, lateness as a share of each job's duration, and when the last job ended and was noticed."""

    reads: float
    median: float
    p95: float
    worst: float
    ended_at: float


def noticed(service: FakeService) -> Noticed:
    requests = list(service.requests.values())
    late = sorted((r.noticed_at - r.ends_at) / (r.ends_at - r.starts_at) for r in requests)
    reads = sum(r.reads for r in requests) / len(requests)
    last = max(r.noticed_at for r in requests)
    return Noticed(reads, late[len(late) // 2], late[int(0.95 * len(late))], late[-1], last)


def log_normal(median: float, sigma: float, seed: int = 1):
    """Return service times by request number."""
    rng = Random(seed)
    times: list[float] = []

    def of(number: int) -> float:
        while len(times) <= number:
            times.append(median * rng.lognormvariate(0.0, sigma))
        return times[number]

    return of


@pytest.mark.slow
async def test_a_log_normal_service_is_followed_with_five_reads_a_job():
    """Median 4 s, sigma 0.6, 40 slots, 2,000 jobs: the accuracy that five reads a job allow.

    `tests/unit/test_poll_schedule.py` shows that no schedule of reads is much better; `--updates stream` is.
    """
    service = FakeService(service_time=log_normal(4.0, 0.6), slots=40)
    await World(service, window=Window(32, floor=2, ceiling=1024)).run(jobs(2000))
    found = noticed(service)
    assert found.reads <= 5.0
    assert found.median <= 0.2
    assert found.p95 <= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("submits", [None, 2500.0])
async def test_a_thousand_jobs_at_once_are_noticed_within_six_hundredths(submits):
    """5 s each, without earlier knowledge: at most three reads a job, and no job is noticed later than 0.3 s."""
    service = FakeService(service_time=5.0, round_trip=0.001)
    bucket = None if submits is None else TokenBucket(submits)
    await World(service, window=1000, submits=bucket).run(jobs(1000))
    found = noticed(service)
    assert found.reads <= 1.5
    assert found.worst <= 0.06


@pytest.mark.slow
async def test_a_thousand_in_flight_of_many_are_noticed_within_six_hundredths():
    """The same with more jobs following, and with slightly varying service times."""
    service = FakeService(service_time=lambda n: 5.0 + (n % 7) * 0.01, round_trip=0.001)
    await World(service, window=1000).run(jobs(4000))
    found = noticed(service)
    assert found.reads <= 2.0
    assert found.worst <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "most"), [(64, 1.01), (Window(64, ceiling=999), 1.06), (Window(16, ceiling=999), 1.15)]
)
async def test_slots_of_a_steady_service_are_kept_full(window, most):
    """1 s, 32 slots, 640 jobs: 20 s, plus 1% with a fixed window; an adaptive one must find its size first."""
    service = FakeService(service_time=1.0, slots=32, round_trip=0.001)
    await World(service, window=window).run(jobs(640))
    assert noticed(service).ended_at <= most * 20.0


async def test_an_instant_service_is_asked_for_results_straight_away():
    """The first statuses show that all jobs have ended when they are read, so the others' are not read at all."""
    service = FakeService(service_time=0.0, round_trip=0.001)
    await World(service, window=64).run(jobs(1000))
    assert service.count("result") == 1000
    assert service.count("status") <= 80


async def test_a_steady_service_is_asked_for_results_straight_away():
    """Slightly more than two requests a job instead of three; a missing result costs one wasted read."""
    service = FakeService(service_time=5.0, round_trip=0.001)
    await World(service, window=100).run(jobs(2000))
    assert service.count("status") + service.count("result") < 1.6 * 2000


async def test_a_failure_is_believed_after_a_status_however_its_result_was_asked_for():
    """An answer that is not an output proves nothing by itself: the status is read, and the result once more."""
    service = FakeService(service_time=2.0, faults=[CompletesWith("7 as", 422, "content_policy_violation")])
    report = await World(service, window=20).run(jobs(400))
    assert (report.done, report.failed, service.accepted) == (360, 40, 400)
    failed = [request for request in service.requests.values() if "7 as" in str(request.body["prompt"])]
    assert len(failed) == 40
    assert all(request.reads >= 1 for request in failed)


async def test_a_service_that_is_silent_to_early_questions_is_asked_once_in_vain():
    """It delays reads of missing results until the connection times out: they are never tried again in this run."""

    class Holds(FakeService):
        held = 0

        async def result(self, ticket):
            if anyio.current_time() < self.requests[ticket.request_id].ends_at:
                self.held += 1
                await anyio.sleep(120.0)
                raise CallFailed(Trouble("result", "timeout"))
            return await super().result(ticket)

    service = Holds(service_time=lambda n: 2.0 if n < 100 else 6.0, round_trip=0.001)
    assert (await World(service, window=10).run(jobs(400))).done == 400
    assert 1 <= service.held <= 10  # those concurrent with the first


async def test_a_wish_for_a_pause_is_honoured_by_early_questions():
    """429 with Retry-After to an early result read: the request is not read again until then."""
    asked: dict[str, list[float]] = {}

    class Busy(FakeService):
        async def status(self, ticket):
            asked.setdefault(ticket.request_id, []).append(anyio.current_time())
            return await super().status(ticket)

        async def result(self, ticket):
            times = asked.setdefault(ticket.request_id, [])
            times.append(anyio.current_time())
            if len(asked) == 60 and len(times) == 1:
                refused.append(ticket.request_id)
                raise CallFailed(Trouble("result", reply=Reply(429, b"", {"retry-after": "7"})))
            return await super().result(ticket)

    refused: list[str] = []
    report = await World(Busy(service_time=1.0), window=8).run(jobs(120))
    assert report.done == 120
    (request,) = refused
    first, second, *_ = asked[request]
    assert second - first >= 7


async def test_jobs_of_an_earlier_run_are_asked_for_their_status():
    """Their lateness says nothing about the speed: even if new jobs end at once, their statuses are read first."""
    service = FakeService(service_time=lambda n: 30.0 if n < 20 else 0.0, round_trip=0.001)
    run = World(service, window=64)
    with anyio.move_on_after(1.0):
        await run.run(jobs(20))
    assert service.accepted == 20
    assert (await run.again().run(jobs(400))).done == 400
    assert service.count("result") == 400  # one each, none wasted
    assert service.count("status") >= 2 * 20


async def test_a_deep_queue_is_read_a_few_times_a_job():
    """Each waits for minutes behind 150 others; queue positions predict how long."""
    service = FakeService(service_time=log_normal(5.0, 0.1), slots=4)
    await World(service, window=150).run(jobs(400))
    assert noticed(service).reads <= 10
