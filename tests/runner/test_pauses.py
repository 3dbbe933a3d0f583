"""Pauses and the rate in virtual time: when a submit is really sent, whatever it waited for before."""

from __future__ import annotations

import itertools
from datetime import date
from random import Random

import anyio
import anyio.lowlevel
import pytest
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.journal.events import Intended, Refused
from batch.journal.states import State
from batch.money import Budget, Price
from batch.run.admission import Admission, StopCause
from batch.run.context import Policy
from batch.run.interfaces import HeldBack
from batch.run.job import JobRun
from batch.run.pacing import TokenBucket, bucket_for
from batch.run.verdicts import Idempotency, judge
from batch.run.window import Window
from batch.testing.journal import MemoryJournal
from batch.testing.observer import RecordingObserver
from batch.testing.service import FakeService, Fault, RefusesConnection, RefusesSubmits
from batch.types import Attempt, Job, JobKey
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))
FUZZ = 1e-6


class Noting(Fault):
    """Records when each submit arrives, and refuses one with a `Retry-After`."""

    def __init__(self, *refused: int, status: int = 429, wait: float = 30.0, header: str | None = None) -> None:
        self.left: list[float] = []
        self.keys: list[str] = []
        self.pauses: list[tuple[float, float]] = []
        self._refused, self._status, self._wait, self._header = set(refused), status, wait, header

    def connecting(self, phase: str, n: int) -> None:
        if phase == "submit":
            self.left.append(anyio.current_time())

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        self.keys.append(attempt.job_key)
        if n not in self._refused:
            return None
        self.pauses.append((anyio.current_time(), anyio.current_time() + self._wait))
        return Reply(self._status, b"{}", {"retry-after": self._header or f"{self._wait:g}"})

    def none_in_a_pause(self) -> bool:
        return bool(self.pauses) and not [
            at for at in self.left for since, until in self.pauses if since + FUZZ < at < until - FUZZ
        ]


def within(times: list[float], rate: float, burst: float) -> bool:
    """Return whether every time window has at most burst + rate x seconds events."""
    times = sorted(times)
    return all(
        last - first + 1 <= burst + rate * (times[last] - times[first]) + FUZZ * (1 + rate)
        for first in range(len(times))
        for last in range(first, len(times))
    )


class Slow(MemoryJournal):
    """A slow journal: intents of some time become durable together, as with one fsync."""

    def __init__(self, every: float) -> None:
        super().__init__()
        self._every = every

    async def record(self, *events):
        if any(isinstance(event, Intended) for event in events):
            await anyio.sleep(self._every - anyio.current_time() % self._every)
        await super().record(*events)


# --- a pause holds for every submit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"submits": (5.0, 1.0)},
        {"submits": (5.0, 3.0)},
        {"submits": (20.0, 2.0)},
        {},
        {"submits": (5.0, 1.0), "price": PRICE},
        {"submits": (5.0, 1.0), "price": PRICE, "budget": 0.60},
        {"price": PRICE, "budget": 0.60},
        {"submits": (5.0, 1.0), "slow": 1.7},
        {"slow": 3.0},
        {"submits": (20.0, 2.0), "slow": 3.0, "price": PRICE, "budget": 0.60},
    ],
    ids=str,
)
@pytest.mark.parametrize("refused", [(1,), (7,), (7, 8), (7, 60)], ids=str)
async def test_no_submit_leaves_in_the_time_that_a_429_asks_for(options, refused):
    """200 rows, each waiting for something when the answer comes: a permit, money, or the disk."""
    noting = Noting(*refused)
    submits = options.get("submits")
    world = World(
        FakeService(service_time=2.0, faults=[noting]),
        window=300,
        submits=submits and TokenBucket(*submits),
        price=options.get("price"),
        budget=None,
    )
    if "slow" in options:
        world.journal = Slow(options["slow"])
    if "budget" in options:
        world.limit = 200 * 0.03  # enough for all, but only few can be reserved at once
        world.price = PRICE
    report = await world.run(jobs(200))
    assert report.done == 200
    assert noting.none_in_a_pause()
    if submits:
        assert within(noting.left, *submits)
    assert len(noting.left) == 200 + len(refused), "each refused submit is sent once more, no other"
    if submits and "slow" not in options:
        intents = [event for event in world.journal.events if isinstance(event, Intended)]
        taken_back = len(intents) - len(noting.left)
        assert taken_back < submits[1] * len(refused), "only what left with the refused one in a burst"


async def test_the_default_rate_of_fal_keeps_a_pause_too():
    """20 a second, with a burst of a tenth of a second, and far more jobs waiting."""
    noting = Noting(40, wait=30.0)
    world = World(FakeService(service_time=5.0, faults=[noting]), window=1024, submits=bucket_for(20.0))
    assert (await world.run(jobs(600))).done == 600
    assert noting.none_in_a_pause()
    assert within(noting.left, 20.0, 2.0)


async def test_a_submit_on_its_way_when_the_answer_comes_is_the_last():
    """The trip takes a second: what was sent before the answer still arrives, nothing is sent after it."""
    noting = Noting(3)
    world = World(FakeService(round_trip=1.0, faults=[noting]), window=100, submits=TokenBucket(5.0))
    await world.run(jobs(100))
    ((since, until),) = noting.pauses
    late = [at for at in noting.left if since < at - 1.0 < until - 1.0 - FUZZ]  # recorded on arrival
    assert late == []


async def test_money_that_comes_free_in_a_pause_is_not_spent_in_it():
    """A budget for three at once: jobs that waited for money check the pause again."""
    noting = Noting(4)
    world = World(FakeService(service_time=10.0, faults=[noting]), price=PRICE, budget=0.09, window=50)
    report = await world.run(jobs(50))
    assert report.stopped.why is StopCause.BUDGET
    assert noting.none_in_a_pause()


async def test_a_refused_connection_pauses_every_submit():
    """While nothing listens for a minute there are a few probes, not one for each waiting job."""
    noting = Noting()
    world = World(
        FakeService(faults=[noting, RefusesConnection(since=2.0, until=62.0)]), window=300, submits=TokenBucket(20.0)
    )
    assert (await world.run(jobs(200))).done == 200
    tries = [at for at in noting.left if 2.0 <= at < 62.0]
    assert len(tries) < 20


@pytest.mark.parametrize("status", [429, 503])
async def test_a_repeat_under_its_key_keeps_the_pause_and_the_rate(status):
    """Repeated submits of unknown outcome respect pause and rate like any other."""
    noting = Noting(30, status=status)
    faults = [noting, RefusesSubmits(502, times=25)]  # all unknown: repeated many times
    world = World(
        FakeService(honours_keys=True, faults=faults),
        window=25,
        submits=TokenBucket(5.0),
        policy=Policy(idempotency=Idempotency.REPLAY),
    )
    assert (await world.run(jobs(40))).done == 40
    assert noting.none_in_a_pause()
    assert within(noting.left, 5.0, 1.0)


async def test_a_repeat_that_is_refused_pauses_the_others_too():
    """A 429 to a repeat pauses all submits, like one to a first submit."""

    class First(Fault):
        def submitting(self, attempt, n):
            return {1: Reply(502), 2: Reply(429)}.get(n)

    policy = Policy(idempotency=Idempotency.REPLAY)
    world = World(FakeService(honours_keys=True, faults=[First()]), window=1, policy=policy)
    assert (await world.run(jobs(3))).done == 3
    (said,) = world.observer.actions("paused")
    assert "HTTP 429" in said["reason"]


async def test_what_a_crash_left_unanswered_is_repeated_within_the_rate():
    """200 intents without an answer do not become 200 POSTs at once."""
    noting = Noting(6)
    service = FakeService(honours_keys=True, faults=[noting])
    world = World(service, window=300, submits=TokenBucket(5.0, 2.0), policy=Policy(idempotency=Idempotency.REPLAY))
    for job in jobs(100):
        body = b'{"prompt": "a", "seed": 1, "image_url": "u"}'
        await world.journal.record(Intended(job.key, anyio.current_time(), 1, body, 0.0))
    assert (await world.again().run([])).done == 100
    assert noting.none_in_a_pause()
    assert within(noting.left, 5.0, 2.0)


async def test_a_503_with_a_wish_to_wait_pauses_all_and_holds_only_its_own_job():
    """The submit's outcome is unknown; later submits would become unknown too."""
    noting = Noting(5, status=503, wait=120.0)
    report = await World(FakeService(faults=[noting]), submits=TokenBucket(5.0), window=50).run(jobs(50))
    assert (report.done, report.held) == (49, 1)
    assert noting.none_in_a_pause()


async def test_a_submit_that_a_pause_overtakes_is_not_unknown():
    """Its intent was durable already: it is recorded as not sent, and costs nothing."""
    noting = Noting(2)
    world = World(FakeService(faults=[noting]), price=PRICE, window=20)
    world.journal = Slow(1.0)
    await world.run(jobs(20))
    refused = [event for event in world.journal.events if isinstance(event, Refused)]
    assert len(refused) >= 1
    counts = await world.journal.counts()
    assert counts.by_state == {State.DONE: 20}
    assert counts.reserved_usd == 0.0


async def test_a_stop_overtakes_a_submit_whose_intent_is_being_written():
    """Nothing is sent after the stop, and nothing becomes unknown."""
    noting = Noting()
    world = World(FakeService(faults=[noting]), window=20)
    world.journal = Slow(10.0)
    async with anyio.create_task_group() as tasks:

        async def stop():
            await anyio.sleep(5.0)
            world.runner.stop(StopCause.SIGNAL, "SIGINT")

        tasks.start_soon(stop)
        report = await world.run(jobs(20))
    assert (report.done, report.held, noting.left) == (0, 0, [])
    assert set((await world.journal.counts()).by_state) == {State.PENDING}


# --- the length of a pause --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "at_least", "at_most"),
    [
        ("30", 30.0, 31.0),
        ("0", 0.0, 1.0),
        ("31536000", 3600.0, 3601.0),
        ("-5", 0.0, 1.0),
        ("nan", 0.0, 1.0),
        ("soon", 0.0, 1.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 119.0, 121.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0, 1.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0, 3601.0),
    ],
)
async def test_a_pause_is_as_long_as_the_header_says(header, at_least, at_most):
    """Seconds or a date, by the run's own clock; at most an hour; without a usable value a short random time."""
    noting = Noting(1, header=header)
    world = World(FakeService(faults=[noting]), window=1)
    await world.run(jobs(2))
    first, second, *_ = noting.left
    assert at_least <= second - first <= at_most


async def test_a_wish_beyond_the_longest_pause_is_said():
    """The log has the requested wait, its limit, and the end of the pause."""
    world = World(FakeService(faults=[Noting(1, header="31536000")]), window=5)
    await world.run(jobs(5))
    (said,) = world.observer.actions("paused")
    assert "asks to wait 31,536,000 s" in said["reason"]
    assert "limited to 3,600 s" in said["reason"]
    assert "until 01:00:" in said["reason"]
    assert said["until"].startswith("1970-01-01T01:00:")
    assert len(world.observer.actions("resumed")) == 1


async def test_a_long_pause_is_said_though_a_short_one_was_just_before():
    """Notices are rare, but an hour's pause is always reported."""

    class Both(Fault):
        def submitting(self, attempt, n):
            return {1: Reply(429), 2: Reply(429, b"", {"retry-after": "900"})}.get(n)

    world = World(FakeService(faults=[Both()]), window=1)
    await world.run(jobs(3))
    assert [len(facts["until"]) > 0 for facts in world.observer.actions("paused")] == [True, True]
    assert "until 00:15:" in world.observer.actions("paused")[1]["reason"]


# --- admission alone: any pauses, any arrivals ------------------------------------------------------------


def in_virtual_time(main):
    clock = trio.testing.MockClock(autojump_threshold=0)
    return anyio.run(main, backend="trio", backend_options={"clock": clock})


@settings(deadline=None, max_examples=60)
@given(
    arrivals=st.lists(st.floats(0, 20), min_size=1, max_size=40),
    pauses=st.lists(st.tuples(st.floats(0, 40), st.sampled_from([None, 0.0, 0.3, 2.0, 15.0])), max_size=6),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.5, 4.0]), min_size=1, max_size=8),
    rate=st.floats(0.5, 30),
    burst=st.floats(1, 8),
    seed=st.integers(0, 2**16),
)
def test_in_no_window_of_time_more_submits_leave_than_the_rate_allows(arrivals, pauses, delays, rate, burst, seed):
    """With random pauses and random delays between admission and sending; none is sent during a pause."""
    left: list[float] = []
    spans: list[tuple[float, float]] = []
    admission = Admission(
        window=Window(1000),
        budget=Budget(None),
        price=None,
        submits=TokenBucket(rate, burst),
        observer=RecordingObserver(),
        rng=Random(seed),
    )

    async def one(number: int, at: float, delay: float) -> None:
        key = JobKey(f"{number:032d}")
        job_run = JobRun(key, Job(key, {}, megapixels=1.0))
        await anyio.sleep(at)
        while True:
            await admission.acquire_submit(job_run)
            await anyio.sleep(delay)
            try:
                await admission.before_send(Attempt(key, 1, b""))
            except HeldBack:
                continue
            left.append(anyio.current_time())
            return

    async def pause(at: float, wait: float | None) -> None:
        await anyio.sleep(at)
        headers = {} if wait is None else {"retry-after": f"{wait}"}
        admission.throttled(judge(Trouble("submit", reply=Reply(429, b"", headers))), "", throttled=True)
        spans.append((anyio.current_time(), anyio.current_time() + (wait or 0.0)))

    async def main() -> None:
        with anyio.fail_after(10_000):
            async with anyio.create_task_group() as tasks:
                for number, (at, delay) in enumerate(zip(arrivals, itertools.cycle(delays), strict=False)):
                    tasks.start_soon(one, number, at, delay)
                for at, wait in pauses:
                    tasks.start_soon(pause, at, wait)

    in_virtual_time(main)
    assert len(left) == len(arrivals)
    assert within(left, rate, burst)
    assert [at for at in left for since, until in spans if since + FUZZ < at < until - FUZZ] == []


@pytest.mark.slow
async def test_a_disk_that_stood_still_is_not_made_up_for_at_once():
    """Thirty seconds of submits become durable together: they are sent at the rate, and the queue shrinks again."""
    noting = Noting()
    world = World(FakeService(service_time=1.0, faults=[noting]), window=1000, submits=TokenBucket(20.0, 2.0))

    durable: dict[str, float] = {}

    class Stalls(MemoryJournal):
        async def record(self, *events):
            if isinstance(events[0], Intended) and 5.0 <= anyio.current_time() < 35.0:
                await anyio.sleep(35.0 - anyio.current_time())
            await super().record(*events)
            if isinstance(events[0], Intended):
                durable[events[0].job_key] = anyio.current_time()

    world.journal = Stalls()
    assert (await world.run(jobs(1200))).done == 1200
    assert within(noting.left, 20.0, 2.0)
    assert max(noting.left) < 35.0 + 1200 / 20.0
    waits = [(at, at - durable[key]) for at, key in zip(noting.left, noting.keys, strict=True)]
    assert max(wait for _, wait in waits) <= 1.0 + FUZZ, "none is unknown for long if the run is killed now"
    assert max(wait for at, wait in waits if at > 70.0) < 0.1, "what was late is made up for in the line"
    assert len([event for event in world.journal.events if isinstance(event, Refused)]) < 700


async def test_the_connection_that_a_submit_waited_for_is_not_used_in_a_pause():
    """The service calls `before_send` before the first byte, and respects its answer."""
    admission = Admission(
        window=Window(10), budget=Budget(None), price=None, submits=None, observer=RecordingObserver(), rng=Random(1)
    )
    await admission.before_send(Attempt(JobKey("1"), 1, b""))
    admission.throttled(judge(Trouble("submit", reply=Reply(429, b"", {"retry-after": "9"}))), "", throttled=True)
    for repeat in (False, True):
        with pytest.raises(HeldBack):
            await admission.before_send(Attempt(JobKey("1"), 1, b"", repeat=repeat))
    await anyio.sleep(10.0)
    admission.stop(StopCause.BUDGET, "used up")
    with pytest.raises(HeldBack):
        await admission.before_send(Attempt(JobKey("1"), 1, b""))
    await admission.before_send(Attempt(JobKey("1"), 1, b"", repeat=True))  # it may have arrived: this finds out
    admission.hurried = True
    with pytest.raises(HeldBack):  # left to the next run
        await admission.before_send(Attempt(JobKey("1"), 1, b"", repeat=True))


async def test_a_service_that_asks_nobody_is_refused_nothing():
    """`before_send` is optional: without a runner, a service submits at once."""
    service = FakeService()
    ticket = await service.submit(Attempt(JobKey("1"), 1, b'{"prompt": "a", "seed": 1}'))
    assert ticket.request_id
    with pytest.raises(CallFailed):
        await FakeService(faults=[RefusesSubmits(429)]).submit(Attempt(JobKey("1"), 1, b"{}"))
