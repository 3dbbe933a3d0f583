"""Admission: decide when a job may submit (window, pauses, rate, budget) and stop the run.

Contains every wait except the wait for an answer. The rules are in `pacing`, `window` and `budget`; this module sleeps
on anyio's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from random import Random

import anyio
import orjson

from batch.money import Budget, Price
from batch.run.interfaces import HeldBack, Observer
from batch.run.job import JobRun, RunStopping
from batch.run.pacing import Pauses, TokenBucket
from batch.run.verdicts import Verdict
from batch.run.window import Window, WindowChange
from batch.types import Attempt

__all__ = ["Admission", "StopCause", "StopRequest"]

_BEYOND_WINDOW = 32
"""Jobs beyond the window that may still be downloading their images."""
_NOTICE_EVERY = 30.0
"""Seconds between two notices of one kind: a network outage produces thousands of identical errors."""
_RATE_WAIT_SECONDS = 1.0
"""Longest time (or one period of a low rate, if that is longer) that a submit with a durable intent and a free
connection waits for the rate. A slow disk can release many submits at once: those beyond this limit are taken back and
queued again. Otherwise they would leave in one burst, hold connections, and be unknown after a crash."""


class StopCause(StrEnum):
    """Why a run stopped before the end of its manifest."""

    SIGNAL = "signal"
    CANCELLED = "cancelled"
    """The program that called the library cancelled the run."""
    DEADLINE = "deadline"
    BUDGET = "budget"
    FAILURES = "too many failures"
    ACCOUNT = "account refused"
    TARGET = "no such endpoint"
    STORAGE = "storage"


_BOUNDED = frozenset({StopCause.SIGNAL, StopCause.CANCELLED, StopCause.DEADLINE, StopCause.STORAGE})
"""Stops that wait at most `Policy.drain` for jobs in flight; all others collect everything that is paid for."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The first stop requested, with its reason."""

    why: StopCause
    reason: str


class Admission:
    """Admission control of one run: jobs enter, acquire a submit, settle, and leave."""

    def __init__(
        self,
        *,
        window: Window,
        budget: Budget,
        price: Price | None,
        submits: TokenBucket | None,
        observer: Observer,
        rng: Random,
    ) -> None:
        """`price` None: jobs are free. `submits` None: no rate limit."""
        self._window, self._budget, self._price = window, budget, price
        self._submits = submits
        self._send_bucket = None if submits is None else submits.another()
        self._turn = anyio.Lock(fast_acquire=True)
        self._observer, self._pauses = observer, Pauses(rng)
        self._announced_until = -math.inf
        self._is_pause_announced = False
        self._pausing_noted_at = -math.inf
        self._stopping: StopRequest | None = None
        self._stop_called = anyio.Event()
        self.hurried = False
        """Whether `Runner.stop` was called, possibly after the run was already stopping for another reason."""
        self._state_changed = anyio.Event()
        self._reserving: set[str] = set()
        self._spent_before = budget.spent
        self._inside = 0
        self._noticed_at: dict[str, float] = {}

    # --- stopping ----------------------------------------------------------------------------------------

    @property
    def stopping(self) -> StopRequest | None:
        """The first stop requested, or None."""
        return self._stopping

    def stop(self, why: StopCause, reason: str, meanwhile: str = "") -> None:
        """Admit no more submits. The first reason is kept; `meanwhile` says what still happens until the end."""
        if self._stopping is None:
            self._stopping = StopRequest(why, reason)
            self._observer.happened("stopping", reason=f"{reason}: {meanwhile}" if meanwhile else reason)
            self._stop_called.set()
            self._wake()

    @property
    def ends_soon(self) -> bool:
        """Whether the run waits only a bounded time for jobs in flight; then nothing is repeated."""
        return self.hurried or (self._stopping is not None and self._stopping.why in _BOUNDED)

    async def stopped(self) -> None:
        """Wait until a stop is requested."""
        await self._stop_called.wait()

    # --- the window ----------------------------------------------------------------------------------------

    async def enter(self, job_run: JobRun) -> bool:
        """Wait for a place in the window. Return False if the run stops first and the job was not submitted before."""
        while self._window.full or self._inside >= self._window.size + _BEYOND_WINDOW:
            if self._stopping is not None and not job_run.resumed:
                return False
            await self._wait_for_change()
        if self._stopping is not None and not job_run.resumed:
            return False
        self._inside += 1
        if job_run.reserved_usd:  # resumed: its end releases money, so other jobs may wait for it
            self._reserving.add(job_run.key)
        job_run.came_as = self._window.entered()
        return True

    def answered(self, job_run: JobRun, queued: float | None = None) -> None:
        """Give the job's place in the window to another job; its request has ended.

        `queued` is the share of the request's time that it spent in the queue, None if unknown.
        """
        if job_run.came_as:
            came_as, job_run.came_as = job_run.came_as, 0
            self._report_window(self._window.left(came_as, queued))
            self._wake()

    def leave(self, job_run: JobRun) -> None:
        """Release what the job still holds; its task has ended."""
        self.answered(job_run)
        self._reserving.discard(job_run.key)
        self._inside -= 1
        self._wake()

    # --- a turn --------------------------------------------------------------------------------------------

    async def acquire_submit(self, job_run: JobRun) -> None:
        """Reserve money, then wait until no pause is in effect and the rate permits a submit.

        The prepared submit may still wait for the disk and a connection; `before_send` checks pauses and rate again.

        Raises:
            RunStopping: the run is stopping.
        """
        reserved = job_run.reserved_usd
        if self._price is not None and not reserved:
            await self._reserve(job_run, self._price)
        try:
            await self._permitted(stops=True)
        except RunStopping:
            if not reserved:
                self._release(job_run)
            raise

    async def acquire_repeat(self) -> None:
        """Do the same for a submit that may have arrived before. It has its money, and a stop does not hold it back."""
        await self._permitted(stops=False)

    async def before_send(self, attempt: Attempt) -> None:
        """Check pauses and rate again, just before the first byte of a submit is sent.

        Raises:
            HeldBack: submits pause, too many are ready at once, or the run is stopping and this is not a repeat.
        """
        self._require_may_send(attempt)
        if self._send_bucket is None:
            return
        if self._send_bucket.wait(anyio.current_time()) > max(_RATE_WAIT_SECONDS, self._send_bucket.period):
            raise HeldBack("too many submits were ready at once")
        if wait := self._send_bucket.reserve(anyio.current_time()):
            await self._sleep(wait, stops=not attempt.repeat)
            self._require_may_send(attempt)

    def throttled(self, verdict: Verdict, detail: str, *, throttled: bool, now: float | None = None) -> None:
        """Pause all submits because the service refuses them. `now` (Unix seconds) adds the end of the pause."""
        if throttled:
            self._report_window(self._window.throttled(anyio.current_time()))
        pause = self._pauses.begin(anyio.current_time(), verdict.retry_after)
        until = anyio.current_time() + pause
        if until <= self._announced_until + _NOTICE_EVERY:
            return
        self._announced_until, self._is_pause_announced = until, True
        words = f"{verdict.reason} ({detail}); submits pause for {pause:.1f} s"
        if now is None:
            self._observer.happened("paused", reason=words)
            return
        at = datetime.fromtimestamp(now + pause, UTC)
        self._observer.happened(
            "paused", reason=f"{words}, until {at:%H:%M:%S} UTC", until=at.isoformat(timespec="seconds")
        )

    def accepted(self) -> None:
        """Reset the growth of pauses after an accepted submit."""
        self._pauses.succeeded()

    def settle(self, job_run: JobRun, units: float | None) -> float | None:
        """Settle the budget of an ended request. Return its cost in US dollars, None if there is no price.

        `units` are the billed units, None if the service did not report them: then the reservation is charged.
        """
        if self._price is None:
            return None
        cost = job_run.reserved_usd if units is None else self._price.charge(units)
        self._budget.settle(job_run.reserved_usd, cost)
        job_run.reserved_usd = 0.0
        self._reserving.discard(job_run.key)
        self._observer.happened("spent", usd=self._budget.spent - self._spent_before, total_usd=self._budget.spent)
        self._wake()
        return cost

    def notice(self, action: str, reason: str) -> None:
        """Report an event, at most one of each kind every `_NOTICE_EVERY` seconds."""
        if anyio.current_time() - self._noticed_at.get(action, -math.inf) >= _NOTICE_EVERY:
            self._noticed_at[action] = anyio.current_time()
            self._observer.happened(action, reason=reason)

    # --- inside --------------------------------------------------------------------------------------------

    async def _permitted(self, *, stops: bool) -> None:
        """Wait until no pause is in effect and the rate grants a permit.

        Raises:
            RunStopping: the run is stopping, and `stops`.
        """
        if self._submits is None or self._send_bucket is None:
            await self._unpaused(stops=stops)
            return
        async with self._turn:  # one at a time: no permit is taken long before it is used
            while True:
                await self._unpaused(stops=stops)
                now = anyio.current_time()
                wait = max(self._submits.reserve(now), self._send_bucket.wait(now))
                if wait:
                    await self._sleep(wait, stops=stops)
                if not self._pauses.left(anyio.current_time()):
                    break
        self._raise_if_stopping(stops=stops)

    async def _unpaused(self, *, stops: bool) -> None:
        while True:
            self._raise_if_stopping(stops=stops)
            now = anyio.current_time()
            left = self._pauses.left(now) if self._pauses.begun else 0.0
            if not left:
                break
            if now - self._pausing_noted_at >= _NOTICE_EVERY:  # keeps a display alive
                self._pausing_noted_at = now
                self._observer.happened("pausing")
            await self._sleep(min(left, _NOTICE_EVERY), stops=stops)
        if self._is_pause_announced:
            self._is_pause_announced = False
            self._observer.happened("resumed")

    def _require_may_send(self, attempt: Attempt) -> None:
        if self.ends_soon or (self._stopping is not None and not attempt.repeat):
            raise HeldBack("the run is stopping")
        if self._pauses.begun and self._pauses.left(anyio.current_time()):
            raise HeldBack("submits pause")

    def _release(self, job_run: JobRun) -> None:
        """Release the money of a job that was not submitted."""
        self._budget.settle(job_run.reserved_usd, 0.0)
        job_run.reserved_usd = 0.0
        self._reserving.discard(job_run.key)
        self._wake()

    async def _reserve(self, job_run: JobRun, price: Price) -> None:
        usd = _cost_ahead(job_run, price)
        while not self._budget.fits(usd):
            if not self._reserving:  # no job in flight can release any
                spent, limit = self._budget.spent + self._budget.reserved, self._budget.limit_usd
                words = f"${spent:.2f} is spent or reserved and a job may cost ${usd:.4g}"
                self.stop(StopCause.BUDGET, f"{words}: more than the budget of ${limit:.2f}; raise it with --budget")
            self._raise_if_stopping()
            await self._wait_for_change()
        self._raise_if_stopping()
        self._budget.reserve(usd)
        self._reserving.add(job_run.key)
        job_run.reserved_usd = usd

    def _report_window(self, change: WindowChange | None) -> None:
        if change is not None:
            self._observer.happened("window", size=change.size, reason=change.reason)

    async def _wait_for_change(self) -> None:
        """Wait until something changes. All waiters share one event, and each checks its own condition again."""
        if self._state_changed.is_set():
            self._state_changed = anyio.Event()
        await self._state_changed.wait()

    def _wake(self) -> None:
        self._state_changed.set()

    def _raise_if_stopping(self, *, stops: bool = True) -> None:
        if self._stopping is not None and stops:
            raise RunStopping

    async def _sleep(self, seconds: float, *, stops: bool) -> None:
        """Sleep; a stop ends the sleep early if `stops`."""
        if not stops:
            await anyio.sleep(seconds)
            return
        with anyio.move_on_after(seconds):
            await self._stop_called.wait()


def _cost_ahead(job_run: JobRun, price: Price) -> float:
    if job_run.job is None:  # resumed from the journal: the number of images is in the body
        return price.reservation(None, int(orjson.loads(job_run.body).get("num_images", 1)))
    images = job_run.job.input.get("num_images")
    return price.reservation(job_run.job.megapixels, images if isinstance(images, int) else 1)
