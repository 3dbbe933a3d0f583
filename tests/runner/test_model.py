"""A model of everything that can happen to a run, in any order; hypothesis searches for an order that costs money.

The service accepts, loses replies, refuses, fails, expires results and hides them from its listing. The process is
killed before or after any effect. Runs are resumed, reconciled, and given more rows and other budgets. After every step
the service's counts are compared with the journal. `SOAK_EXAMPLES=20000` searches for hours instead of seconds
(`make soak`).
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import trio
import trio._core._run
import trio.testing
from hypothesis import HealthCheck, register_random, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply, model_error_reply, request_error_reply
from batch.journal.database import JournalDatabase
from batch.journal.events import Event
from batch.journal.records import JobOutcome, OpenJob
from batch.journal.states import TERMINAL, State
from batch.journal.transitions import decode_images
from batch.money import Price
from batch.run.context import Policy
from batch.run.runner import Report
from batch.run.verdicts import Idempotency
from batch.testing.images import MemoryImages
from batch.testing.journal import MemoryJournal
from batch.testing.service import FakeListing, FakeRequest, FakeService, Fault
from batch.types import Attempt, JobKey, RequestId
from tests.runner.world import World, jobs

EXAMPLES = int(os.environ.get("SOAK_EXAMPLES", "0"))
PRICE = Price(0.03, date(2026, 11, 1))
UNIT_USD = 0.5 * 0.03
"""Units that the fake bills for an image."""
ROWS = 14
MADE = jobs(ROWS)
DAY = 86400.0


@pytest.fixture(autouse=True)
def _the_same_again(monkeypatch):
    """Make Trio's shuffling of ready tasks reproducible, as hypothesis requires."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    register_random(trio._core._run._r)


# --- the service, with its own records --------------------------------------------------------------------


@dataclass
class Books:
    """The service's own record, independent of the run's."""

    accepted: list[tuple[JobKey, int, RequestId]] = field(default_factory=list)
    spoiled: set[RequestId] = field(default_factory=set)
    """Requests that ended without a result, or whose result is gone."""
    allowed: set[tuple[JobKey, int]] = field(default_factory=set)
    """Attempts given up by the user's policy while their outcome was unknown."""
    expired: set[RequestId] = field(default_factory=set)
    """Ended requests that did not start in time: never executed, never billed."""
    violations: list[str] = field(default_factory=list)
    attempt: Attempt | None = None


class Accountable(FakeService):
    """The fake service; records which attempt each accepted request belongs to, and fails if one is paid twice."""

    def __init__(self, books: Books, **options: Any) -> None:
        super().__init__(service_time=3.0, round_trip=0.05, **options)
        self._books = books

    def _accept(self, attempt: Attempt) -> RequestId:
        books, request_id = self._books, super()._accept(attempt)
        for key, number, earlier in books.accepted:
            if key == attempt.job_key and earlier not in books.spoiled and (key, number) not in books.allowed:
                books.violations.append(f"{key}: {earlier} (attempt {number}), then {request_id} ({attempt.number})")
        books.accepted.append((attempt.job_key, attempt.number, request_id))
        if self.requests[request_id].is_expired:
            books.expired.add(request_id)
            books.spoiled.add(request_id)
        return request_id


SUBMITS = ["lose reply", "lose request", "no connection", "429", "422", "403", "502", "404"]
ENDS = ["fail", "fail retryably", "expire"]


class Scripted(Fault):
    """Applies scripted faults to the next submits and endings, then does nothing."""

    def __init__(self, books: Books) -> None:
        self.submits: list[str | None] = []
        self.ends: list[str | None] = []
        self._books, self._now = books, None
        self._fates: dict[RequestId, str | None] = {}

    def connecting(self, phase: str, n: int) -> None:
        if phase == "submit":
            self._now = self.submits.pop(0) if self.submits else None
            if self._now == "no connection":
                raise CallFailed(Trouble(phase, "connect", sent=False, detail="connect"))

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        if self._now == "lose request":
            raise CallFailed(Trouble("submit", "reset", detail="reset"))
        return Reply(int(self._now), b'{"detail": "no"}') if self._now and self._now.isdigit() else None

    def accepted(self, attempt: Attempt, n: int) -> None:
        if self._now == "lose reply":
            raise CallFailed(Trouble("submit", "disconnected", detail="disconnected"))

    def completing(self, request: FakeRequest, n: int) -> Reply | None:
        if request.id not in self._fates:
            self._fates[request.id] = self.ends.pop(0) if self.ends else None
        fate = self._fates[request.id]
        if fate is None:
            return None
        self._books.spoiled.add(request.id)
        if fate == "expire":
            return Reply(404, b'{"status": "NOT_FOUND"}')
        if fate == "fail":
            return model_error_reply(422, [{"loc": ["body"], "msg": "no", "type": "content_policy_violation"}])
        return request_error_reply(503, "runner_disconnected", "gone")


class Noise(Fault):
    """Answers every third read with a reply that says nothing about any job."""

    status: int | None = None

    def reading(self, phase: str, n: int) -> Reply | None:
        return Reply(self.status, b"<html>") if self.status and n % 3 == 0 else None


@dataclass(frozen=True)
class Weather:
    """The faults during the life of one process; none by default."""

    submits: list[str | None] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)
    reads: int | None = None
    lag: float = 0.0
    waiting: bool = True
    hides: int = 0
    """One of this many requests does not show its input."""
    page_limit: int = 100
    arrivals: int = 0

    def listing(self) -> FakeListing:
        def hidden(request: FakeRequest) -> bool:
            return self.hides > 0 and int(request.id.rpartition("-")[2]) % self.hides == 1

        return FakeListing(self.lag, self.waiting, hidden, self.page_limit, self.arrivals)


WEATHER = st.builds(
    Weather,
    submits=st.lists(st.sampled_from([None, None, "lose reply", "lose reply", *SUBMITS]), min_size=2, max_size=9),
    ends=st.lists(st.sampled_from([None, None, None, *ENDS]), min_size=2, max_size=6),
    reads=st.sampled_from([None, None, 401, 429, 503]),
    lag=st.sampled_from([0.0, 0.0, 1000.0]),
    waiting=st.booleans(),
    hides=st.sampled_from([0, 0, 3]),
    page_limit=st.sampled_from([2, 100]),
    arrivals=st.sampled_from([0, 1]),
)
BUDGET = st.sampled_from([None, None, 0.0, 0.05, 0.12, 0.3])


# --- the process, which can be killed ---------------------------------------------------------------------


class Death(NamedTuple):
    """Kill at the n-th call of this name: before its effect, or after it but before the caller sees it."""

    call: str
    n: int
    after: bool


class Fuse:
    """Watches the calls of one process; after its death nothing it does has an effect."""

    def __init__(self, death: Death | None, scope: anyio.CancelScope) -> None:
        self._death, self._scope, self._calls = death, scope, Counter()
        self._dead = False

    async def burn(self, call: str, *, after: bool) -> None:
        self._calls[call, after] += 1
        if self._death == (call, self._calls[call, after], after):
            self._dead = True
        if self._dead:
            self._scope.cancel()
            await anyio.sleep_forever()


class Mortal:
    """A service or a journal, as one process sees it: the process may be killed before and after each call."""

    def __init__(self, real: Any, fuse: Fuse) -> None:
        self._real, self._fuse = real, fuse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return self._mortal(name, value) if callable(value) else value

    def _mortal(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*arguments: Any, **options: Any) -> Any:
            await self._fuse.burn(name, after=False)
            try:
                return await method(*arguments, **options)
            finally:
                await self._fuse.burn(name, after=True)

        return call

    async def entries(self, states: Collection[State]) -> Any:
        async with aclosing(self._real.entries(states)) as entries:
            async for entry in entries:
                await self._fuse.burn("entries", after=True)
                yield entry


CALLS = ["submit", "submit", "record", "record", "status", "result", "download", "listing", "requests", "entries"]
DEATH = st.builds(Death, st.sampled_from(CALLS), st.integers(1, 6), st.booleans())


class FileJournal:
    """The real SQLite file without its worker thread, because virtual time does not wait for threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, JournalDatabase.open(path, now=0.0, version="model")
        self.session = self._file.session

    def reopened(self) -> FileJournal:
        """Reopen as after a kill, without closing anything."""
        self._file.close()
        return FileJournal(self._path)

    async def record(self, *events: Event) -> None:
        (error,) = self._file.commit([events])
        await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error

    async def settled(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def entries(self, states: Collection[State]) -> Any:
        ids = self._file.entry_ids(states)
        for entry in [*self._file.read_entries(ids, states)]:
            await anyio.lowlevel.checkpoint()
            yield entry

    def outcomes(self, keys: Collection[JobKey]) -> dict[JobKey, JobOutcome]:
        return self._file.outcomes(list(keys))

    def close(self) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._file, name)

        async def call(*arguments: Any) -> Any:
            await anyio.lowlevel.checkpoint()
            return method(*arguments)

        return call


# --- the model --------------------------------------------------------------------------------------------


class Runs(RuleBasedStateMachine):
    """The state machine described in the module. Time advances from step to step; each step is a run in one process."""

    journal: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.books = Books()
        self.script = Scripted(self.books)
        self.rows, self.budget, self.resubmits = 4, None, False
        self.highest = 0.0
        self.images = MemoryImages()
        self.noise = Noise()
        self.journal = self.make_journal()

    def make_journal(self) -> Any:
        return MemoryJournal()

    @initialize(
        keys=st.sampled_from([*Idempotency, Idempotency.NONE]),
        after=st.sampled_from([None, None, 5.0, 3600.0]),
        start_timeout=st.sampled_from([None, 8.0, 1800.0]),
        rejection=st.sampled_from([409, 422]),
    )
    def begin(self, keys: Idempotency, after: float | None, start_timeout: float | None, rejection: int) -> None:
        self.keys, self.after = keys, after
        # Of the three, only our own server: if a submit may be repeated, the time of its acceptance is unknown.
        self.start_timeout = start_timeout if keys is Idempotency.NONE else None
        self.service = Accountable(
            self.books,
            honours_keys=keys is Idempotency.REPLAY,
            rejects_repeats=Reply(rejection, b"{}") if keys is Idempotency.REJECT else None,
            start_timeout=start_timeout,
            slots=[[(0.0, math.inf)]] * 2,
            faults=[self.script, self.noise],
        )

    # --- events ---

    @rule(more=st.integers(1, 3))
    @precondition(lambda self: self.rows < ROWS)
    def manifest_grows(self, more: int) -> None:
        self.rows = min(ROWS, self.rows + more)

    @rule(seconds=st.sampled_from([1.0, 60.0, 2000.0, DAY]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(weather=WEATHER, budget=BUDGET, retry_failed=st.booleans())
    def run_goes_on(self, weather: Weather, budget: float | None, retry_failed: bool) -> None:
        self.run(weather, budget=budget, retry_failed=retry_failed)

    @rule(weather=WEATHER, budget=BUDGET, retry_failed=st.booleans(), death=DEATH)
    def run_is_killed(self, weather: Weather, budget: float | None, retry_failed: bool, death: Death) -> None:
        self.run(weather, budget=budget, retry_failed=retry_failed, death=death)

    @rule(weather=WEATHER, budget=BUDGET, seconds=st.sampled_from([0.5, 4.0, 10.0]))
    def run_has_a_deadline(self, weather: Weather, budget: float | None, seconds: float) -> None:
        self.run(weather, budget=budget, deadline=seconds)

    @rule(weather=WEATHER, death=st.none() | DEATH)
    def reconcile(self, weather: Weather, death: Death | None) -> None:
        posts = self.service.posts
        self.run(weather, death=death, collect_only=True)
        if self.keys is not Idempotency.REPLAY:
            assert self.service.posts == posts, "reconciling submits nothing"

    # --- execution ---

    def run(
        self, weather: Weather, *, budget: float | None = None, death: Death | None = None, **policy: Any
    ) -> Report | None:
        """Run one process, from its start to its end or its death."""
        self.journal, self.budget = self.journal.reopened(), budget
        self.script.submits, self.script.ends = [*weather.submits], [*weather.ends]
        self.noise.status, self.service.lists = weather.reads, weather.listing()
        decided = Policy(
            idempotency=self.keys,
            start_timeout=self.start_timeout,
            resubmit_unknown_after=self.after,
            **policy,
        )
        rows = [] if decided.collect_only else MADE[: self.rows]

        async def process() -> Report | None:
            with anyio.CancelScope() as scope:
                mortality = Fuse(death, scope)
                service = Mortal(self.service, mortality)
                world = World(service, price=PRICE, budget=self.budget, reconciles=self.keys is not Idempotency.REPLAY)
                world.images, world.journal = self.images, Mortal(self.journal, mortality)
                await self._allow()
                return await world.run(rows, decided)
            return None

        return self.in_virtual_time(process)

    async def _allow(self) -> None:
        """Note the attempts that this run may give up, according to the user's policy."""
        async for entry in self.journal.entries({State.UNKNOWN, State.INTENDED}):
            if self.after is None or self.keys is Idempotency.REJECT:
                continue
            if self.now - entry.intended_at >= self.after - 2.0:
                self.books.allowed.add((entry.job_key, entry.attempt))

    def in_virtual_time(self, main: Callable[[], Any]) -> Any:
        clock = trio.testing.MockClock(autojump_threshold=0)
        clock.jump(self.now)

        async def timed() -> Any:
            try:
                return await main()
            finally:
                self.now = trio.current_time()

        return anyio.run(timed, backend="trio", backend_options={"clock": clock})

    def read(self, states: Collection[State] = tuple(State)) -> dict[JobKey, OpenJob]:
        async def all_of_them() -> dict[JobKey, OpenJob]:
            return {entry.job_key: entry async for entry in self.journal.entries(states)}

        return self.in_virtual_time(all_of_them)

    # --- invariants ---

    @invariant()
    def nothing_is_paid_twice(self) -> None:
        """Never two accepted requests for one key, unless the first is spoiled or the policy gave it up."""
        assert self.books.violations == []
        attempts = [(key, number) for key, number, one in self.books.accepted if one not in self.books.expired]
        assert len(set(attempts)) == len(attempts), "one attempt, one accepted request"

    @invariant()
    def what_was_accepted_is_never_forgotten(self) -> None:
        """Its id is in the journal, or its submit is recorded as unknown."""
        if not self.books.accepted:
            return
        ids = [request_id for _, _, request_id in self.books.accepted]
        known = self.in_virtual_time(lambda: self.journal.requests(ids))
        is_open = self.read({State.INTENDED, State.UNKNOWN})
        for key, number, request_id in self.books.accepted:
            if request_id in self.books.expired:
                continue
            entry = is_open.get(key)
            doubted = entry is not None and entry.attempt == number
            assert request_id in known or doubted or (key, number) in self.books.allowed, f"{request_id} of {key}"

    @invariant()
    def the_money_adds_up(self) -> None:
        """Spent plus reserved money is within the budget, and covers what was charged."""
        counts = self.in_virtual_time(self.journal.counts)
        counted = counts.spent_usd + counts.reserved_usd
        if self.budget is not None:
            assert counted <= max(self.budget, self.highest) + 1e-6
        self.highest = max(self.highest, counted)
        failed = {r for r in self.books.spoiled if self.script._fates.get(r) == "fail retryably"}
        failed |= self.books.expired
        charged = UNIT_USD * sum(1 for _, _, request_id in self.books.accepted if request_id not in failed)
        assert charged <= counted + 1e-6, "an uncounted charge"

    @invariant()
    def nothing_is_done_without_its_image(self) -> None:
        """A job that is done has an answer, and exactly that answer's image on disk."""
        made_by = {(key, request_id) for key, _, request_id in self.books.accepted}
        for key, outcome in self.journal.outcomes([job.key for job in MADE]).items():
            if outcome.state is State.DONE:
                assert outcome.output is not None
                assert (key, outcome.request_id) in made_by
                (image,) = decode_images(outcome.images)
                assert hashlib.sha256(self.images.files[image.path]).hexdigest() == image.sha256

    def teardown(self) -> None:
        """Without further faults every job ends, or is held for a reason."""
        try:
            if hasattr(self, "service"):
                self._comes_to_its_end()
        finally:
            self.close()

    def _comes_to_its_end(self) -> None:
        self.now += 2000.0
        for _ in range(2):
            report = self.run(Weather())
            assert report is not None
            assert report.stopped is None
        self.nothing_is_paid_twice()
        self.what_was_accepted_is_never_forgotten()
        self.the_money_adds_up()
        self.nothing_is_done_without_its_image()
        counts = self.in_virtual_time(self.journal.counts)
        left = {state: count for state, count in counts.by_state.items() if count and state not in TERMINAL}
        assert set(left) <= {State.UNKNOWN}, left
        for key, entry in self.read({State.UNKNOWN}).items():
            arrived = [number for k, number, _ in self.books.accepted if k == key and number == entry.attempt]
            gives_up = self.after is not None and self.keys is Idempotency.NONE
            assert not arrived or gives_up, f"{key} was accepted, is listed, and was not found"
            assert self.keys is not Idempotency.REPLAY, "a server that replays keys leaves nothing in doubt"

    def close(self) -> None:
        """Nothing to close."""


class RunsOnDisk(Runs):
    """The same with the journal's real file."""

    def make_journal(self) -> FileJournal:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return FileJournal(Path(self._folder.name) / "journal.db")

    def close(self) -> None:
        self.journal.close()
        self._folder.cleanup()


def profile(quick: int, share: float = 1.0) -> settings:
    return settings(
        max_examples=round(EXAMPLES * share) or quick,
        stateful_step_count=40 if EXAMPLES else 15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_no_order_of_events_costs_money_or_loses_a_result():
    """The model, with the journal in memory."""
    run_state_machine_as_test(Runs, settings=profile(80))


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_no_order_of_events_costs_money_or_loses_a_result_on_disk():
    """The model, with the journal's SQLite file."""
    run_state_machine_as_test(RunsOnDisk, settings=profile(12, 0.1))
