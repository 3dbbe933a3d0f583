"""Ask the target to cancel every open request, many concurrently.

A cancel may be repeated: one without an answer is retried a few times, then left to the next call. Writes nothing to
the journal; the next run reads how each request ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import anyio
from tenacity import stop_after_attempt

from batch.errors import AccountRefused
from batch.fal.errors import CallFailed
from batch.fal.protocol import CancelOutcome
from batch.journal.states import State
from batch.run.interfaces import Journal, Service
from batch.run.retrying import reading
from batch.types import Ticket

__all__ = ["AT_ONCE", "Cancelled", "cancel_open"]

AT_ONCE = 64
"""Concurrent cancels: 10,000 at 100 ms each take 16 s."""
_TRIES = 4
_PATIENCE_SECONDS = 60.0
"""For one request, all tries included."""
_SILENCE = 2 * AT_ONCE
"""Consecutive requests without an answer after which the target counts as unreachable; the rest is not asked."""
_ACCOUNT = frozenset({401, 402, 403})
_FIELDS = {
    CancelOutcome.REQUESTED: "requested",
    CancelOutcome.ALREADY_COMPLETED: "too_late",
    CancelOutcome.NOT_FOUND: "not_found",
    None: "unanswered",
}


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Outcomes of one call of `cancel_open`."""

    asked: int = 0
    """Sum of the four outcomes below."""
    requested: int = 0
    too_late: int = 0
    """The request had already ended."""
    unanswered: int = 0
    not_found: int = 0
    """The target does not know the request (any more)."""
    open: int = 0
    """Requests that were open at the start of the call."""

    @property
    def left(self) -> int:
        """Requests without an answer to their cancel; the next call asks for them."""
        return self.open - self.asked + self.unanswered


async def cancel_open(
    service: Service, journal: Journal, rng: Random, report: Callable[[Cancelled], None] | None = None
) -> Cancelled:
    """Ask for the cancellation of each open request of the journal, `AT_ONCE` concurrently.

    Args:
        service: the target.
        journal: journal of the run.
        rng: for the backoff.
        report: called with the counts so far, after each answer.

    Raises:
        AccountRefused: the target refused the key.
    """
    return await _Round(service, journal, rng, report or (lambda _: None)).run()


class _Round:
    def __init__(self, service: Service, journal: Journal, rng: Random, report: Callable[[Cancelled], None]) -> None:
        self._service, self._journal, self._rng, self._report = service, journal, rng, report
        self._counts = Cancelled()
        self._silent = 0
        """Consecutive requests without an answer."""
        self._refusal: int | None = None
        """HTTP status."""

    async def run(self) -> Cancelled:
        counts = await self._journal.counts()
        self._counts = Cancelled(open=counts.by_state.get(State.ACCEPTED, 0))
        self._report(self._counts)
        free = anyio.Semaphore(AT_ONCE)
        async with anyio.create_task_group() as tasks, aclosing(self._journal.entries({State.ACCEPTED})) as entries:
            async for entry in entries:
                assert entry.ticket is not None, "accepted means that there is a ticket"
                await free.acquire()
                if self._refusal is not None or self._silent >= _SILENCE:
                    break
                tasks.start_soon(self._ask, entry.ticket, free)
        if self._refusal is not None:
            raise AccountRefused(f"the target refused the key for cancels (HTTP {self._refusal}); check FAL_KEY")
        return self._counts

    async def _ask(self, ticket: Ticket, free: anyio.Semaphore) -> None:
        try:
            outcome = await self._answer(ticket)
        finally:
            free.release()
        self._silent = self._silent + 1 if outcome is None else 0
        field, asked = _FIELDS[outcome], self._counts.asked + 1
        self._counts = replace(self._counts, asked=asked, **{field: getattr(self._counts, field) + 1})
        self._report(self._counts)

    async def _answer(self, ticket: Ticket) -> CancelOutcome | None:
        """Return the outcome, None if all tries failed."""
        try:
            with anyio.fail_after(_PATIENCE_SECONDS):
                call = partial(self._service.cancel, ticket)
                return await reading(call, self._rng, stop=stop_after_attempt(_TRIES))
        except TimeoutError:
            return None
        except CallFailed as error:
            reply = error.trouble.reply
            if reply is not None and reply.status in _ACCOUNT:
                self._refusal = reply.status
            return None
