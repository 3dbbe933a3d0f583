"""What lets a job through: the window, pauses, the rate, the money; and what stops letting them through.

Owns every wait that is not about an answer. Decides nothing itself: it asks `pacing` and `budget` and does
the waiting, on anyio's clock.
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
"""Jobs that may still fetch their images while the window is already given to others."""
_NOTICE_EVERY = 30.0
"""Seconds between two notices to a person: one dead network is a thousand equal faults."""
_LEAVING_SECONDS = 1.0
"""The longest that a submit waits, or one period of a low rate, when its intent is durable and its connection is free.
Those that a slow disk lets through all together go back into the line: they shall neither leave together, nor hold
connections, nor be unknown after a crash."""


class StopCause(StrEnum):
    """Why a run ended before its manifest did."""

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
"""Stops that wait only `Policy.drain` for what is in flight; the others collect all that is paid for."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A stop that was called, and its reason in words."""

    why: StopCause
    reason: str


class Admission:
    """One for a run; jobs enter, take their turn, settle, and leave."""

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
        """`price` None: nothing costs anything. `submits` None: no rate limit."""
        self._window, self._budget, self._price = window, budget, price
        self._submits = submits
        self._leaving = None if submits is None else submits.another()
        self._line = anyio.Lock(fast_acquire=True)
        self._observer, self._pauses = observer, Pauses(rng)
        self._said_until = -math.inf
        self._is_pause_said = False
        self._shown_at = -math.inf
        self._stopping: StopRequest | None = None
        self._stop_called = anyio.Event()
        self.hurried = False
        """Whether somebody stopped the run and waits for its end, whatever had stopped it before."""
        self._moved = anyio.Event()
        self._reserving: set[str] = set()
        self._spent_before = budget.spent
        self._inside = 0
        self._noticed_at: dict[str, float] = {}

    # --- stopping ----------------------------------------------------------------------------------------

    @property
    def stopping(self) -> StopRequest | None:
        """The stop that was called first, if any."""
        return self._stopping

    def stop(self, why: StopCause, reason: str, meanwhile: str = "") -> None:
        """Let nothing more through. The first reason stays; `meanwhile` says what is going on until the end."""
        if self._stopping is None:
            self._stopping = StopRequest(why, reason)
            self._observer.happened("stopping", reason=f"{reason}: {meanwhile}" if meanwhile else reason)
            self._stop_called.set()
            self._wake()

    @property
    def ends_soon(self) -> bool:
        """Whether the run waits only a bounded time for what is in flight: then nothing is repeated either."""
        return self.hurried or (self._stopping is not None and self._stopping.why in _BOUNDED)

    async def stopped(self) -> None:
        """Wait until a stop is called."""
        await self._stop_called.wait()

    # --- the window ----------------------------------------------------------------------------------------

    async def enter(self, job_run: JobRun) -> bool:
        """Wait for room; False where the run is stopping first and the job was not submitted before."""
        while self._window.full or self._inside >= self._window.size + _BEYOND_WINDOW:
            if self._stopping is not None and not job_run.resumed:
                return False
            await self._movement()
        if self._stopping is not None and not job_run.resumed:
            return False
        self._inside += 1
        if job_run.reserved_usd:  # of an earlier run: its end frees money, so that it is worth waiting for
            self._reserving.add(job_run.key)
        job_run.came_as = self._window.entered()
        return True

    def answered(self, job_run: JobRun, queued: float | None = None) -> None:
        """The job is out of the service's hands: its place goes to another.

        `queued` is the share of its stay there that it was queued, None where that teaches nothing.
        """
        if job_run.came_as:
            came_as, job_run.came_as = job_run.came_as, 0
            self._changed(self._window.left(came_as, queued))
            self._wake()

    def leave(self, job_run: JobRun) -> None:
        """The job's task is over."""
        self.answered(job_run)
        self._reserving.discard(job_run.key)
        self._inside -= 1
        self._wake()

    # --- a turn --------------------------------------------------------------------------------------------

    async def acquire_submit(self, job_run: JobRun) -> None:
        """Wait until this submit may be prepared: money, then no pause and a permit of the rate.

        What is prepared may wait for a disk and for a connection; `before_send` looks at pause and rate again.

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
                self._free(job_run)
            raise

    async def acquire_repeat(self) -> None:
        """The same for a submit that may have arrived before, and that a stop does not hold back: it has its money."""
        await self._permitted(stops=False)

    async def before_send(self, attempt: Attempt) -> None:
        """The last look before a submit's first byte; all that it waited for since its turn is there.

        Raises:
            HeldBack: submits pause, too many want to leave at once, or the run is stopping and this is no repeat.
        """
        self._hold_back(attempt)
        if self._leaving is None:
            return
        if self._leaving.wait(anyio.current_time()) > max(_LEAVING_SECONDS, self._leaving.period):
            raise HeldBack("too many submits were ready at once")
        if wait := self._leaving.reserve(anyio.current_time()):
            await self._doze(wait, stops=not attempt.repeat)
            self._hold_back(attempt)

    def throttled(self, verdict: Verdict, detail: str, *, throttled: bool, now: float | None = None) -> None:
        """The service wants no submits for now: pause all of them. `now` in Unix seconds, to say until when."""
        if throttled:
            self._changed(self._window.throttled(anyio.current_time()))
        pause = self._pauses.begin(anyio.current_time(), verdict.retry_after)
        until = anyio.current_time() + pause
        if until <= self._said_until + _NOTICE_EVERY:
            return
        self._said_until, self._is_pause_said = until, True
        words = f"{verdict.reason} ({detail}); submits pause for {pause:.1f} s"
        if now is None:
            self._observer.happened("paused", reason=words)
            return
        at = datetime.fromtimestamp(now + pause, UTC)
        self._observer.happened(
            "paused", reason=f"{words}, until {at:%H:%M:%S} UTC", until=at.isoformat(timespec="seconds")
        )

    def accepted(self) -> None:
        """A submit was accepted."""
        self._pauses.succeeded()

    def settle(self, job_run: JobRun, units: float | None) -> float | None:
        """The job's request is over; its cost in dollars, None where there is no price.

        `units` is what was billed, None where the service did not say: then the reservation counts.
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
        """Tell a person, each kind not too often."""
        if anyio.current_time() - self._noticed_at.get(action, -math.inf) >= _NOTICE_EVERY:
            self._noticed_at[action] = anyio.current_time()
            self._observer.happened(action, reason=reason)

    # --- inside --------------------------------------------------------------------------------------------

    async def _permitted(self, *, stops: bool) -> None:
        """Wait for the end of every pause and for a permit, the one or the other first.

        Raises:
            RunStopping: the run is stopping, and `stops`.
        """
        if self._submits is None or self._leaving is None:
            await self._unpaused(stops=stops)
            return
        async with self._line:  # one after the other: no permit is taken long before it is used
            while True:
                await self._unpaused(stops=stops)
                now = anyio.current_time()
                wait = max(self._submits.reserve(now), self._leaving.wait(now))
                if wait:
                    await self._doze(wait, stops=stops)
                if not self._pauses.left(anyio.current_time()):
                    break
        self._turn_back_if_stopping(stops=stops)

    async def _unpaused(self, *, stops: bool) -> None:
        while True:
            self._turn_back_if_stopping(stops=stops)
            now = anyio.current_time()
            left = self._pauses.left(now) if self._pauses.begun else 0.0
            if not left:
                break
            if now - self._shown_at >= _NOTICE_EVERY:  # so that a display does not fall silent
                self._shown_at = now
                self._observer.happened("pausing")
            await self._doze(min(left, _NOTICE_EVERY), stops=stops)
        if self._is_pause_said:
            self._is_pause_said = False
            self._observer.happened("resumed")

    def _hold_back(self, attempt: Attempt) -> None:
        if self.ends_soon or (self._stopping is not None and not attempt.repeat):
            raise HeldBack("the run is stopping")
        if self._pauses.begun and self._pauses.left(anyio.current_time()):
            raise HeldBack("submits pause")

    def _free(self, job_run: JobRun) -> None:
        """The money of a job that was not submitted."""
        self._budget.settle(job_run.reserved_usd, 0.0)
        job_run.reserved_usd = 0.0
        self._reserving.discard(job_run.key)
        self._wake()

    async def _reserve(self, job_run: JobRun, price: Price) -> None:
        usd = _cost_ahead(job_run, price)
        while not self._budget.fits(usd):
            if not self._reserving:  # nothing that is under way can free any
                spent, limit = self._budget.spent + self._budget.reserved, self._budget.limit_usd
                words = f"${spent:.2f} is spent or reserved and a job may cost ${usd:.4g}"
                self.stop(StopCause.BUDGET, f"{words}: more than the budget of ${limit:.2f}; --budget raises it")
            self._turn_back_if_stopping()
            await self._movement()
        self._turn_back_if_stopping()
        self._budget.reserve(usd)
        self._reserving.add(job_run.key)
        job_run.reserved_usd = usd

    def _changed(self, change: WindowChange | None) -> None:
        if change is not None:
            self._observer.happened("window", size=change.size, reason=change.reason)

    async def _movement(self) -> None:
        """Wait until something moved. One event for all who wait: each looks again whether it was for him."""
        if self._moved.is_set():
            self._moved = anyio.Event()
        await self._moved.wait()

    def _wake(self) -> None:
        self._moved.set()

    def _turn_back_if_stopping(self, *, stops: bool = True) -> None:
        if self._stopping is not None and stops:
            raise RunStopping

    async def _doze(self, seconds: float, *, stops: bool) -> None:
        """Sleep, where a stop may end it only until that is called."""
        if not stops:
            await anyio.sleep(seconds)
            return
        with anyio.move_on_after(seconds):
            await self._stop_called.wait()


def _cost_ahead(job_run: JobRun, price: Price) -> float:
    if job_run.job is None:  # taken up again from the journal: its body says how many images
        return price.reservation(None, int(orjson.loads(job_run.body).get("num_images", 1)))
    images = job_run.job.input.get("num_images")
    return price.reservation(job_run.job.megapixels, images if isinstance(images, int) else 1)
