"""Unreadable paid results are collected later, free; in virtual time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date

import anyio
import orjson
import pytest

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply, request_error_reply
from batch.journal.states import State
from batch.money import Price
from batch.run.context import Policy
from batch.testing.service import FakeService, Fault
from batch.types import Answer
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio

DAY = 86400.0
PRICE = Price(0.03, date(2026, 11, 1))


@dataclass
class Odd(FakeService):
    """Answers a request's result as its entry in `odd` says: `empty`, `html`, `oversize`, `hidden`, `verdict`."""

    odd: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    """Requests whose files are refused."""
    downloads: Counter[str] = field(default_factory=Counter)

    def __post_init__(self):
        super().__init__(service_time=2.0, faults=[_Verdicts(self)])

    def answers_after(self, seconds):
        """Make every later call take this long."""
        self._round_trip = seconds

    async def result(self, ticket):
        answer = await super().result(ticket)
        match self.odd.get(ticket.request_id):
            case "empty":
                raw = orjson.dumps(answer.output | {"images": []})
                came = Answer({}, 0.5, None, raw)
                raise CallFailed(Trouble("result", "no images", detail="the answer has no images", answer=came))
            case "html":
                raise CallFailed(Trouble("result", "malformed", detail="odd", answer=Answer({}, None, None, b"<html>")))
            case "oversize":
                raise CallFailed(Trouble("result", "oversize", detail="too large"))
            case "hidden":
                raise CallFailed(Trouble("result", reply=Reply(404, b'{"detail": "no"}'), detail="HTTP 404"))
            case _:
                return answer

    async def download(self, url):
        request = url.removeprefix("fake://").partition("/")[0]
        self.downloads[request] += 1
        if request in self.gone:
            raise CallFailed(Trouble("download", reply=Reply(403, b"no"), detail="HTTP 403"))
        return await super().download(url)


@dataclass
class _Verdicts(Fault):
    service: Odd

    def completing(self, request, n):
        if self.service.odd.get(request.id) == "verdict":
            return request_error_reply(503, "runner_server_error", "on purpose", None)
        return None


def states(world):
    return Counter(known for known in (world.journal.state(job.key) for job in jobs(6)) if known is not State.PENDING)


@pytest.mark.parametrize("kind", ["empty", "html", "oversize", "hidden", "gone"])
@pytest.mark.parametrize("retry", [False, True])
async def test_it_is_collected_by_the_next_run_free(kind, retry):
    """Whatever was unreadable: one request, charged once, done as soon as it is readable."""
    service = Odd(gone={"request-1"}) if kind == "gone" else Odd(odd={"request-1": kind})
    world = World(service, price=PRICE)
    report = await world.run(jobs(3))
    assert (report.done, report.failed) == (2, 1)
    assert states(world) == {State.DONE: 2, State.COLLECTABLE: 1}
    spent = (await world.journal.counts()).spent_usd
    service.odd.clear()
    service.gone.clear()
    await anyio.sleep(2 * DAY)
    report = await world.again().run(jobs(3), Policy(retry_failed=retry))
    assert (report.done, report.failed) == (1, 0)
    assert states(world) == {State.DONE: 3}
    assert service.posts == 3
    counts = await world.journal.counts()
    assert (counts.spent_usd, counts.reserved_usd) == (spent, 0.0)


@pytest.mark.parametrize("kind", ["empty", "html", "hidden", "gone"])
async def test_within_its_time_it_is_never_paid_for_again(kind):
    """Neither later runs nor --retry-failed pay for it again."""
    service = Odd(gone={"request-1"}) if kind == "gone" else Odd(odd={"request-1": kind})
    world = World(service, price=PRICE)
    await world.run(jobs(3))
    for _ in range(3):
        await anyio.sleep(2 * DAY)
        await world.again().run(jobs(3), Policy(retry_failed=True))
        assert states(world) == {State.DONE: 2, State.COLLECTABLE: 1}
    assert service.posts == 3


@pytest.mark.parametrize("kind", ["html", "hidden", "gone"])
async def test_after_its_time_it_is_lost_and_paid_for_again_when_asked(kind):
    """After one last free try it is failed; only --retry-failed starts a new attempt."""
    service = Odd(gone={"request-1"}) if kind == "gone" else Odd(odd={"request-1": kind})
    world = World(service, price=PRICE)
    await world.run(jobs(3))
    await anyio.sleep(8 * DAY)
    await world.again().run(jobs(3))
    assert states(world) == {State.DONE: 2, State.FAILED: 1}
    assert service.posts == 3
    await world.again().run(jobs(3), Policy(retry_failed=True))
    assert states(world) == {State.DONE: 3}
    assert service.posts == 4


async def test_after_its_time_retry_failed_needs_one_run_only():
    """One run makes the free try, then the new attempt."""
    service = Odd(odd={"request-1": "hidden"})
    world = World(service, price=PRICE)
    await world.run(jobs(3))
    await anyio.sleep(8 * DAY)
    await world.again().run(jobs(3), Policy(retry_failed=True))
    assert states(world) == {State.DONE: 3}
    assert service.posts == 4


async def test_a_verdict_that_shows_later_ends_it_without_a_new_attempt():
    """It was resumed to be collected, free, so a retryable failure does not start a paid attempt in the same run."""
    service = Odd(odd={"request-1": "html"})
    world = World(service, price=PRICE)
    await world.run(jobs(3))
    service.odd["request-1"] = "verdict"
    await world.again().run(jobs(3))
    assert states(world) == {State.DONE: 2, State.FAILED: 1}
    assert service.posts == 3


async def test_a_killed_run_leaves_it_collectable():
    """Nothing else is recorded before the answer."""
    service = Odd(odd={"request-1": "html"})
    world = World(service, price=PRICE)
    await world.run(jobs(3))
    service.odd.clear()
    statuses, results = service.count("status"), service.count("result")
    service.answers_after(5.0)
    with anyio.move_on_after(7.0):  # its status was read, its result is being read
        await world.again().run(jobs(3))
    assert states(world) == {State.DONE: 2, State.COLLECTABLE: 1}
    assert (service.count("status"), service.count("result")) == (statuses + 1, results)
    service.answers_after(0.0)
    await world.again().run(jobs(3))
    assert states(world) == {State.DONE: 3}
    assert service.posts == 3


async def test_a_repeated_request_id_holds_the_later_job():
    """If two submits get the same id, the first keeps it and the second is unknown."""

    class Twins(FakeService):
        async def submit(self, attempt):
            ticket = await super().submit(attempt)
            return ticket if ticket.request_id == "request-0" else type(ticket)("request-0")

    world = World(Twins(service_time=1.0), window=1)
    report = await world.run(jobs(2))
    assert (report.done, report.held) == (1, 1)
    assert states(world) == {State.DONE: 1, State.UNKNOWN: 1}
