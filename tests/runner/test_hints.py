"""A hint that a job has ended causes a read and nothing else; reads are rate limited. In virtual time."""

from __future__ import annotations

import anyio
import pytest

from batch.journal.states import State
from batch.run.pacing import TokenBucket
from batch.testing.service import AnswersReadsWith, CompletesWith, FakeService, RefusesConnection
from tests.runner.test_poller import log_normal, noticed
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio


class Hints:
    """Reports the fake's ends at once; `heard` selects the requests, `early` makes hints too early by that time."""

    def __init__(self, service, *, heard=lambda number: True, early=0.0):
        self.service, self.heard, self.early = service, heard, early
        self.hinted, self.waiting, self.waited = set(), set(), []

    async def wait(self, ticket, usual, longest):
        self.waiting.add(ticket.request_id)
        self.waited.append((usual, longest))
        number = int(ticket.request_id.removeprefix("request-"))
        if not self.heard(number) or ticket.request_id in self.hinted:
            await anyio.sleep(usual)
            return False
        left = self.service.requests[ticket.request_id].ends_at - self.early - anyio.current_time()
        await anyio.sleep(max(0.0, min(left, longest)))
        if left > longest:
            return False
        self.hinted.add(ticket.request_id)
        return True

    def forget(self, ticket):
        self.waiting.discard(ticket.request_id)


def world(service, **options):
    hints = Hints(service, **options)
    return World(service, window=60, hints=hints), hints


async def test_a_hint_is_read_at_once_and_once():
    """Every end is noticed at once, with one read a job plus a few fallback reads."""
    service = FakeService(service_time=log_normal(4.0, 0.6), slots=40)
    run, hints = world(service)
    assert (await run.run(jobs(1000))).done == 1000
    found = noticed(service)
    assert found.worst == pytest.approx(0.0, abs=1e-6)
    assert found.reads < 2.0
    assert not hints.waiting


async def test_lost_hints_are_made_up_for_by_reading():
    """Half of the hints are lost: those jobs are noticed by polling."""
    service = FakeService(service_time=5.0, slots=40)
    run, hints = world(service, heard=lambda number: number % 2 == 0)
    assert (await run.run(jobs(600))).done == 600
    assert service.posts == service.accepted == 600
    assert noticed(service).worst < 1.0
    assert not hints.waiting


async def test_without_any_hint_the_run_is_the_same():
    """Without hints the run only polls."""
    service = FakeService(service_time=5.0)
    run, _ = world(service, heard=lambda number: False)
    assert (await run.run(jobs(300))).done == 300
    assert noticed(service).worst < 0.4


async def test_a_hint_that_lies_costs_a_read():
    """A hint a second too early: the read finds the job running, and nothing else changes."""
    service = FakeService(service_time=5.0)
    run, _ = world(service, early=1.0)
    assert (await run.run(jobs(300))).done == 300
    assert noticed(service).reads < 5.0
    assert service.count("result") <= 600  # a missing result was requested once


async def test_hints_do_not_change_what_an_answer_means():
    """Failures, gateway errors, an outage: the same verdicts as with polling alone."""
    faults = lambda: [  # noqa: E731
        CompletesWith("7 as", 422, "content_policy_violation"),
        AnswersReadsWith(503, every=3),
        RefusesConnection(4.0, 9.0),
    ]
    ends = []
    for hinted in (True, False):
        service = FakeService(service_time=3.0, faults=faults())
        run = world(service)[0] if hinted else World(service, window=60)
        report = await run.run(jobs(200))
        ends.append((report.done, report.failed, service.accepted, (await run.journal.counts()).by_state[State.DONE]))
    assert ends[0] == ends[1]
    assert ends[0][1] == 20


async def test_a_wait_for_a_hint_is_bounded():
    """At most four times the usual wait, and at most ten seconds unless the usual wait is longer."""
    service = FakeService(service_time=30.0)
    run, hints = world(service)
    await run.run(jobs(100))
    assert all(longest <= max(usual, min(4 * usual, 10.0)) for usual, longest in hints.waited)


async def test_a_job_of_an_earlier_run_is_only_read():
    """Callbacks of its submit went to the earlier run, so it is polled."""
    service = FakeService(service_time=50.0)
    run, hints = world(service)
    with anyio.move_on_after(10.0):
        await run.run(jobs(40))
    hints.waited.clear()
    assert (await run.again().run(jobs(40))).done == 40
    assert hints.waited == []
    assert service.accepted == 40


# --- rate limit of reads ----------------------------------------------------------------------------------


async def test_polls_are_bounded_over_all_jobs_and_nobody_starves():
    """20 reads a second for 500 jobs in flight: never more in any second, and each job gets its turn."""
    reads = []

    class Watched(FakeService):
        async def status(self, ticket):
            reads.append(anyio.current_time())
            return await super().status(ticket)

    service = Watched(service_time=5.0)
    run = World(service, window=500, polls=TokenBucket(20.0, burst=2.0))
    assert (await run.run(jobs(500))).done == 500
    for first, last in zip(reads, reads[22:], strict=False):
        assert last - first >= 1.0 - 1e-6
    waits = [r.noticed_at - r.ends_at for r in service.requests.values()]
    assert max(waits) <= 2.5 * 500 / 20.0


async def test_reads_that_are_repeated_count_too():
    """Retries during gateway errors respect the limit too."""
    service = FakeService(service_time=1.0, faults=[AnswersReadsWith(503, every=3)])
    run = World(service, window=100, polls=TokenBucket(10.0))
    began = anyio.current_time()
    assert (await run.run(jobs(100))).done == 100
    assert service.count("status") <= 1 + 10.0 * (anyio.current_time() - began)
