"""Paid results are collected oldest first, with a warning before they expire, and even with a refused key."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import anyio
import orjson
import pytest

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.journal.states import State
from batch.run.admission import StopCause
from batch.run.context import Policy
from batch.run.pacing import TokenBucket
from batch.testing.service import CompletesWith, FakeService, Fault
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
HOUR = 3600.0


@dataclass
class LocksTheAccount(Fault):
    """Refuses every submit from a moment on, and every read too unless `reads_go_on`."""

    since: float
    until: float = float("inf")
    reads_go_on: bool = False

    @property
    def is_locked(self):
        return self.since <= anyio.current_time() < self.until

    def submitting(self, attempt, n):
        return Reply(403, b'{"detail":"User is locked. Reason: Exhausted balance."}') if self.is_locked else None

    def reading(self, phase, n):
        return Reply(403, b'{"detail":"User is locked."}') if self.is_locked and not self.reads_go_on else None


class Service(FakeService):
    """Records the order in which requests are read, and the times of file downloads."""

    def __init__(self, *, gone=(), gone_until=0.0, padding=0, **options):
        super().__init__(**options)
        self.gone, self.gone_until, self.padding = set(gone), gone_until, padding
        self.first_reads: dict[str, float] = {}
        self.fetched: list[tuple[float, str]] = []

    async def status(self, ticket):
        self.first_reads.setdefault(ticket.request_id, anyio.current_time())
        return await super().status(ticket)

    async def result(self, ticket):
        answer = await super().result(ticket)
        answer.output["timings"] = {f"part {n}": 1.0 for n in range(self.padding)}
        return answer._replace(raw=orjson.dumps(answer.output))

    async def download(self, url):
        name = url.removeprefix("fake://").partition("/")[0]
        self.fetched.append((anyio.current_time(), name))
        if name in self.gone and anyio.current_time() < self.gone_until:
            raise CallFailed(Trouble("download", reply=Reply(503), detail="HTTP 503"))
        return await super().download(url)


def warnings(world):
    return [str(facts["reason"]) for facts in world.observer.actions("warning")]


# --- after a crash ----------------------------------------------------------------------------------------


async def test_what_was_accepted_is_collected_before_anything_is_submitted_oldest_first():
    """No POST until every open request of the earlier run was read."""
    service = Service(service_time=50.0, round_trip=0.01)
    world = World(service, window=10, submits=TokenBucket(4.0))
    with anyio.move_on_after(5):
        await world.run(jobs(40))
    opened = list(service.requests)
    assert len(opened) == 10
    service.first_reads.clear()
    await anyio.sleep(100)
    world.window = 1
    await world.again().run(jobs(40))
    resumed = list(service.first_reads)[:10]
    assert resumed == opened
    first_new = min(request.accepted_at for name, request in service.requests.items() if name not in opened)
    assert max(service.first_reads[name] for name in opened) <= first_new


async def test_a_request_older_than_the_floor_is_warned_of_and_collected():
    """After an hour its result may be gone; it is read anyway."""
    for pause, expected in ((0.9 * HOUR, 0), (5 * HOUR, 1)):
        world = World(Service(service_time=50.0), window=10)
        with anyio.move_on_after(5):
            await world.run(jobs(10))
        await anyio.sleep(pause)
        report = await world.again().run(jobs(10))
        assert (report.done, len(warnings(world))) == (10, expected)
    assert "5.0 h old" in warnings(world)[0]


async def test_a_target_that_keeps_everything_warns_of_nothing():
    """Our own server keeps everything, so there is no warning."""
    world = World(Service(service_time=50.0), window=10, policy=Policy(keeps_results=True))
    with anyio.move_on_after(5):
        await world.run(jobs(10))
    await anyio.sleep(50 * HOUR)
    assert (await world.again().run(jobs(10))).done == 10
    assert warnings(world) == []


# --- while it runs ----------------------------------------------------------------------------------------


async def test_an_outage_of_the_reads_is_warned_of_in_time():
    """A warning after half an hour without an answered read; then everything is collected."""

    class Outage(Fault):
        def reading(self, phase, n):
            return Reply(502, b"<html>") if 10 <= anyio.current_time() < 2 * HOUR else None

    world = World(FakeService(service_time=20.0, faults=[Outage()]))
    report = await world.run(jobs(30))
    assert report.done == 30
    given = warnings(world)
    assert "no request could be read for 30 min" in given[0]
    assert "may have waited" in given[1]  # and afterwards, how long results waited
    assert len(given) == 2


async def test_large_results_that_wait_are_warned_of():
    """Results from 10 kB on are guaranteed for six minutes only, so a read every few minutes is too late."""
    service = Service(service_time=1000.0, padding=2000, faults=[])
    world = World(service)
    await world.run(jobs(2))
    assert warnings(world) == []  # read at least every ten seconds

    class Sleepy(Service):
        async def status(self, ticket):
            await anyio.sleep(200)
            return await super().status(ticket)

    world = World(Sleepy(service_time=1000.0, padding=2000))
    await world.run(jobs(2))
    (warning,) = warnings(world)
    assert "--max-in-flight" in warning


async def test_a_image_that_cannot_be_had_holds_up_no_other_and_is_tried_on():
    """Thirty files fail for an hour: the others pass them, and each arrives within one backoff after that hour."""
    gone = [f"request-{n}" for n in range(30)]
    service = Service(service_time=1.0, gone=gone, gone_until=HOUR)
    world = World(service, window=100)
    report = await world.run(jobs(100))
    assert (report.done, report.failed) == (100, 0)
    fine = [at for at, name in service.fetched if name not in gone]
    assert max(fine) < 10
    assert max(at for at, _ in service.fetched) < HOUR + 61


async def test_a_failing_image_does_not_queue_behind_fresh_ones_again():
    """Its retry comes after its backoff, not behind all files that came in meanwhile."""

    class FirstFails(Service):
        async def download(self, url):
            is_first = not self.fetched
            data = await super().download(url)
            if is_first:
                raise CallFailed(Trouble("download", reply=Reply(503), detail="HTTP 503"))
            await anyio.sleep(20)
            return data

    service = FirstFails(service_time=1.0)
    await World(service, window=200).run(jobs(200))
    first, second = [at for at, name in service.fetched if name == service.fetched[0][1]]
    assert second - first < 1
    assert max(at for at, _ in service.fetched) > 200  # the length of the queue, at sixteen of 20 s each


# --- a refused key ----------------------------------------------------------------------------------------


async def test_a_locked_account_that_still_shows_results_is_collected_to_the_end():
    """403 on a submit: nothing more is submitted, and every accepted job is collected however long it takes."""
    lock = LocksTheAccount(since=1.0, reads_go_on=True)
    world = World(FakeService(service_time=500.0, faults=[lock], round_trip=0.2), window=5)
    report = await world.run(jobs(50))
    assert (report.stopped.why, report.done) == (StopCause.ACCOUNT, world.service.accepted)
    assert anyio.current_time() > 500


async def test_a_dead_key_ends_the_run_and_a_good_one_goes_on():
    """If reads are refused too, the run stops, loses nothing, and the next one continues with a good key."""
    for lock in (LocksTheAccount(since=5.0), LocksTheAccount(since=35.0)):  # with a full window; with submits due
        world = World(FakeService(service_time=30.0, faults=[lock], round_trip=0.2), window=5)
        began = anyio.current_time()
        lock.since += began
        report = await world.run(jobs(20))
        counts = await world.journal.counts()
        assert report.stopped.why is StopCause.ACCOUNT
        assert "403" in report.stopped.reason or "User is locked" in report.stopped.reason
        assert anyio.current_time() - began < 300
        assert counts.by_state.get(State.ACCEPTED, 0) + report.done == world.service.accepted < 20
        world.service.faults.clear()
        report = await world.again().run(jobs(20))
        assert (report.stopped, report.held, world.service.accepted) == (None, 0, 20)
        assert (await world.journal.counts()).by_state == {State.DONE: 20}


# --- everything fails -------------------------------------------------------------------------------------


async def test_too_many_failures_name_the_commonest_reasons():
    """The reason lists the most frequent errors, not the last one."""
    faults = [
        CompletesWith("1 as", 422, "face_detection_error"),
        CompletesWith("2 as", 422, "content_policy_violation"),
        CompletesWith("7 as", 422, "image_too_small"),
        CompletesWith("as", 422, "image_load_error"),
    ]
    world = World(FakeService(faults=faults), policy=Policy(max_failures=29), window=1)
    report = await world.run(jobs(200))
    assert report.stopped.why is StopCause.FAILURES
    assert report.stopped.reason == (
        "30 of 30 jobs failed: 21 image_load_error, 3 face_detection_error, 3 content_policy_violation"
    )


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_reads_that_are_refused_now_and_then_stop_nothing(status):
    """Two refusals of three reads, for any time, stop nothing: there are answers in between."""
    chance = Random(status)

    class MostlyRefused(Fault):
        def reading(self, phase, n):
            return Reply(status) if chance.random() < 0.67 else None

    world = World(FakeService(service_time=20.0, faults=[MostlyRefused()]), window=8)
    report = await world.run(jobs(40))
    assert (report.done, report.stopped) == (40, None)
