"""The adaptive window, with services whose slots are few, many, or change over time; in virtual time."""

from __future__ import annotations

import itertools
import math
from random import Random

import anyio
import pytest

from batch.fal.protocol import Reply
from batch.run.window import Window
from batch.testing.service import FakeService, Fault
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
FOR_EVER = [(0.0, math.inf)]


def uneven(seconds: float):
    """Return service times with a spread of 20%."""
    rng = Random(5)
    return lambda _: seconds * rng.uniform(0.8, 1.2)


async def carried_out(service: FakeService, count: int, *, start: int = 32) -> World:
    world = World(service, window=Window(start, floor=2, ceiling=1024))
    report = await world.run(jobs(count))
    assert report.done == count
    return world


def busy(service: FakeService, since: float, until: float) -> float:
    """Return the average number of executing slots in a time span."""
    spans = ((max(r.starts_at, since), min(r.ends_at, until)) for r in service.requests.values())
    return sum(max(0.0, ended - began) for began, ended in spans) / (until - since)


def piled(service: FakeService, since: float, until: float) -> float:
    """Return the average number of jobs in the service's queue in a time span."""
    spans = ((max(r.accepted_at, since), min(r.starts_at, until)) for r in service.requests.values())
    return sum(max(0.0, ended - began) for began, ended in spans) / (until - since)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "seconds"), [(2, 6.0), (20, 5.0), (40, 2.0), (100, 4.0)])
async def test_fixed_slots_are_kept_full(slots, seconds):
    """After warming up at least 95% are busy (usually 97%), and at most about as many jobs again are queued."""
    service = FakeService(service_time=uneven(seconds), slots=slots, round_trip=0.02)
    await carried_out(service, 24 * slots + 60)
    ended = max(r.ends_at for r in service.requests.values())
    assert busy(service, 6 * seconds, ended - 3 * seconds) >= 0.95 * slots
    assert piled(service, 0.6 * ended, ended - 3 * seconds) <= 1.2 * slots + 1


@pytest.mark.slow
async def test_slots_that_come_are_used():
    """From 10 to 60 at 100 s: within 30 s all of them are busy."""
    service = FakeService(service_time=uneven(4.0), slots=[FOR_EVER] * 10 + [[(100.0, math.inf)]] * 50)
    await carried_out(service, 2000)
    assert busy(service, 30.0, 100.0) >= 0.95 * 10
    ended = max(r.ends_at for r in service.requests.values())
    assert busy(service, 130.0, ended - 15.0) >= 0.95 * 60


@pytest.mark.slow
async def test_slots_that_go_leave_no_pile():
    """From 60 to 10 at 60 s: 90 s later at most twice the needed number is queued."""
    service = FakeService(service_time=uneven(4.0), slots=[FOR_EVER] * 10 + [[(0.0, 60.0)]] * 50)
    await carried_out(service, 1500)
    ended = max(r.ends_at for r in service.requests.values())
    assert busy(service, 20.0, 60.0) >= 0.95 * 60
    assert busy(service, 70.0, ended - 15.0) >= 0.93 * 10
    assert piled(service, 150.0, ended - 15.0) <= 20


@pytest.mark.slow
async def test_slots_that_flutter_are_mostly_used():
    """Half of 40 come and go every 30 s, as with other users' load."""
    shifts = [(start, start + 30.0) for start in range(0, 3600, 60)]
    service = FakeService(service_time=uneven(3.0), slots=[FOR_EVER] * 20 + [[*shifts]] * 20)
    await carried_out(service, 3000)
    ended = max(r.ends_at for r in service.requests.values())
    assert ended <= 1.08 * 3000 * 3.0 / 30


class LimitsWhatIsOpen(Fault):
    """Refuses submits while too many requests are open, with a `Retry-After`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.refused = limit, 0
        self.service: FakeService | None = None

    def submitting(self, attempt, n):
        now = anyio.current_time()
        if sum(1 for r in self.service.requests.values() if r.ends_at > now) < self.limit:
            return None
        self.refused += 1
        return Reply(429, b'{"detail":"too many"}', {"retry-after": "1"})


async def test_a_429_cuts_the_window_and_its_pause_is_kept():
    """A service that accepts 30 concurrently and refuses more: it stays busy, with hardly any refused submit."""
    limit = LimitsWhatIsOpen(30)
    service = limit.service = FakeService(service_time=uneven(3.0), faults=[limit])
    world = await carried_out(service, 1200)
    cuts = [change for change in world.observer.actions("window") if "429" in change["reason"]]
    assert cuts
    assert limit.refused <= 0.15 * 1200
    ended = max(r.ends_at for r in service.requests.values())
    assert ended <= 1.35 * 1200 * 3.0 / 30


async def test_every_change_of_size_is_told_with_its_reason():
    """The log shows the reason."""
    world = await carried_out(FakeService(service_time=uneven(3.0), slots=40), 400, start=8)
    changes = world.observer.actions("window")
    assert changes[-1]["size"] > 40
    assert all(set(change) == {"size", "reason"} and change["reason"] for change in changes)
    assert all(abs(after["size"] - before["size"]) <= 1 for before, after in itertools.pairwise(changes))
