"""The queue's decisions as a state machine. Pure: no clock, no disk, no async.

Every method updates the queue and returns what follows from it; the caller does the work, writes it down and
answers. A request lives here from its acceptance until its ending is durable:

    WAITING ──start──> RUNNING ──release──> ENDING ──finish──> gone
       ^  └─cancel, expire────────────────────^
       └────crash (the first one)── RUNNING, or CANCELLING once a cancel has reached it while it ran

Positions cost O(log n): a line numbers its requests and keeps the numbers of those that left from its middle.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from batch.server.queue.records import LogLine, Priority
from batch.types import AppId, QueueState, RequestId

__all__ = ["Cancellation", "FifoQueue", "IllegalStep", "LiveView", "Phase", "Scheduler", "SchedulerStatistics"]

LOG_LINES = 64
"""Kept of one request: a moving window, as the real service keeps one."""
STEP_LINES = 10
"""Step messages logged of one request at most."""
CRASHES_ALLOWED = 1
"""A request whose worker died is tried once more: the next death is called its own fault."""


class Phase(StrEnum):
    """Where a request that has not ended durably stands."""

    WAITING = "waiting"
    RUNNING = "running"
    CANCELLING = "cancelling"
    """Runs, and was asked to stop. It may still finish."""
    ENDING = "ending"
    """Has its outcome, which is not durable yet."""


class Cancellation(StrEnum):
    """What a cancel did."""

    REMOVED = "removed"
    """It left the queue: the caller writes its ending and then calls `finish`."""
    SIGNALLED = "signalled"
    """It runs; its engine is told."""
    TOO_LATE = "too late"
    UNKNOWN = "unknown"


class IllegalStep(RuntimeError):
    """A defect of ours: a request was moved in a way that the diagram does not allow."""


class LiveView(NamedTuple):
    """What a status answer needs of a live request."""

    state: QueueState
    position: int
    """0-based, over all lines; 0 once it runs."""
    logs: tuple[LogLine, ...]


class SchedulerStatistics(NamedTuple):
    """Counts of live requests."""

    waiting: int
    running: int
    """In the hands of an engine, cancelled or not."""
    ending: int


class FifoQueue:
    """First come, first served, with O(log n) positions and removal from the middle."""

    __slots__ = ("_first", "_holes", "_number", "_order")

    def __init__(self) -> None:
        self._order: deque[RequestId | None] = deque()
        """The line itself; who left from its middle leaves None."""
        self._first = 0
        """Number of the head of `_order`."""
        self._number: dict[RequestId, int] = {}
        self._holes: list[int] = []
        """Numbers of the Nones, ascending."""

    def __len__(self) -> int:
        return len(self._number)

    def append(self, request_id: RequestId) -> None:
        """Join at the end."""
        self._number[request_id] = self._first + len(self._order)
        self._order.append(request_id)

    def appendleft(self, request_id: RequestId) -> None:
        """Go to the front: it had been there before."""
        self._first -= 1
        self._number[request_id] = self._first
        self._order.appendleft(request_id)

    def popleft(self) -> RequestId:
        """Take the first one.

        Raises:
            IndexError: nobody waits.
        """
        request_id = self._order.popleft()
        self._first += 1
        assert request_id is not None, "the head of a line is never a hole"
        del self._number[request_id]
        self._close_up()
        return request_id

    def remove(self, request_id: RequestId) -> None:
        """Leave from wherever it stands.

        Raises:
            KeyError: it does not stand here.
        """
        number = self._number.pop(request_id)
        self._order[number - self._first] = None
        insort(self._holes, number)
        self._close_up()

    def position(self, request_id: RequestId) -> int:
        """How many stand before it.

        Raises:
            KeyError: it does not stand here.
        """
        number = self._number[request_id]
        return number - self._first - bisect_left(self._holes, number)

    def _close_up(self) -> None:
        """Holes at the head go, so that the head is always someone."""
        gone = 0
        while self._order and self._order[0] is None:
            self._order.popleft()
            self._first += 1
            gone += 1
        del self._holes[:gone]


@dataclass(slots=True)
class _LiveRequest:
    app: AppId
    priority: Priority
    owner: str
    phase: Phase = Phase.WAITING
    crashes: int = 0
    tenths: int = 0
    """Of the steps that were logged."""
    first_step: tuple[int, float] | None = None
    """Steps done and the time when the first was told: what comes before it, loading say, tells nothing of the rest."""
    logs: deque[LogLine] | None = field(default=None, repr=False)


class Scheduler:
    """All requests that have not ended durably, and who is next.

    Args:
        slots: requests that the engine executes at once, from 1.
        ending_limit: requests whose outcome may wait to be written before no new one is started; it bounds the
            memory that finished images take on a slow disk.
    """

    def __init__(self, slots: int, ending_limit: int = 256) -> None:
        self._slots = slots
        self._ending_limit = ending_limit
        self._entries: dict[RequestId, _LiveRequest] = {}
        self._lines = {priority: FifoQueue() for priority in Priority}
        self._running = 0
        self._ending = 0

    def __repr__(self) -> str:
        return f"Broker(slots={self._slots}, {self.statistics()})"

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    def statistics(self) -> SchedulerStatistics:
        """Counts, each in O(1)."""
        return SchedulerStatistics(sum(map(len, self._lines.values())), self._running, self._ending)

    def accept(self, request_id: RequestId, app: AppId, priority: Priority = Priority.NORMAL, owner: str = "") -> int:
        """Queue a request whose acceptance is durable; its position."""
        if request_id in self._entries:
            raise IllegalStep(f"{request_id} is in the queue already")
        self._entries[request_id] = _LiveRequest(app, priority, owner)
        self._lines[priority].append(request_id)
        return self._position(request_id, priority)

    def start(self) -> RequestId | None:
        """The request to execute now; None where no slot is free or nobody waits. Call until None."""
        if self._running >= self._slots or self._ending >= self._ending_limit:
            return None
        for line in self._lines.values():
            if line:
                request_id = line.popleft()
                self._entries[request_id].phase = Phase.RUNNING
                self._running += 1
                return request_id
        return None

    def log(self, request_id: RequestId, line: LogLine) -> None:
        """Keep a log line; a request that is gone by now is passed over."""
        entry = self._entries.get(request_id)
        if entry is not None:
            if entry.logs is None:
                entry.logs = deque(maxlen=LOG_LINES)
            entry.logs.append(line)

    def step(self, request_id: RequestId, done: int, total: int, now: float) -> bool:
        """An engine's step; every tenth part of the work is logged. Whether a line was."""
        entry = self._entries.get(request_id)
        tenths = done * STEP_LINES // total if total > 0 else 0
        if entry is not None and entry.first_step is None:
            entry.first_step = done, now
        if entry is None or tenths <= entry.tenths:
            return False
        entry.tenths = tenths
        self.log(request_id, LogLine(now, "INFO", f"step {done} of {total}{_to_go(entry, done, total, now)}"))
        return True

    def release(self, request_id: RequestId) -> tuple[LogLine, ...]:
        """The engine is done with it, whatever came of it: its slot is free. Its log lines."""
        entry = self._demand(request_id, Phase.RUNNING, Phase.CANCELLING)
        self._running -= 1
        return self._end(entry)

    def finish(self, request_id: RequestId) -> None:
        """Its ending is durable: forget it."""
        self._demand(request_id, Phase.ENDING)
        del self._entries[request_id]
        self._ending -= 1

    def cancel(self, request_id: RequestId) -> Cancellation:
        """Take it out of the line, or ask its engine to stop."""
        entry = self._entries.get(request_id)
        if entry is None:
            return Cancellation.UNKNOWN
        if entry.phase is Phase.WAITING:
            self._leave_line(request_id, entry)
            return Cancellation.REMOVED
        if entry.phase is Phase.ENDING:
            return Cancellation.TOO_LATE
        entry.phase = Phase.CANCELLING
        return Cancellation.SIGNALLED

    def expire(self, request_id: RequestId) -> bool:
        """Its start deadline passed. True where it still waited: the caller writes its ending, then `finish`."""
        entry = self._entries.get(request_id)
        if entry is None or entry.phase is not Phase.WAITING:
            return False
        self._leave_line(request_id, entry)
        return True

    def crash(self, request_id: RequestId) -> bool:
        """Its worker died. True: it stands at the head of its line again. False: treat it as `release` does."""
        entry = self._demand(request_id, Phase.RUNNING, Phase.CANCELLING)
        entry.crashes += 1
        if entry.phase is Phase.CANCELLING or entry.crashes > CRASHES_ALLOWED:
            return False
        entry.phase, entry.tenths, entry.first_step = Phase.WAITING, 0, None
        self._running -= 1
        self._lines[entry.priority].appendleft(request_id)
        return True

    def is_cancelled(self, request_id: RequestId) -> bool:
        """Whether its engine shall stop."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.phase is Phase.CANCELLING

    def app_of(self, request_id: RequestId) -> AppId | None:
        """The app that it was submitted to; None for a request that is not here."""
        entry = self._entries.get(request_id)
        return entry.app if entry is not None else None

    def owner_of(self, request_id: RequestId) -> str:
        """Whose it is; empty for a request that is not here, too."""
        entry = self._entries.get(request_id)
        return entry.owner if entry is not None else ""

    def view(self, request_id: RequestId) -> LiveView | None:
        """What its status is; None for a request that is not here."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        logs = tuple(entry.logs) if entry.logs else ()
        if entry.phase is Phase.WAITING:
            return LiveView(QueueState.IN_QUEUE, self._position(request_id, entry.priority), logs)
        return LiveView(QueueState.IN_PROGRESS, 0, logs)

    def _position(self, request_id: RequestId, priority: Priority) -> int:
        before = sum(len(line) for other, line in self._lines.items() if other < priority)
        return before + self._lines[priority].position(request_id)

    def _leave_line(self, request_id: RequestId, entry: _LiveRequest) -> None:
        self._lines[entry.priority].remove(request_id)
        self._end(entry)

    def _end(self, entry: _LiveRequest) -> tuple[LogLine, ...]:
        entry.phase = Phase.ENDING
        self._ending += 1
        return tuple(entry.logs) if entry.logs else ()

    def _demand(self, request_id: RequestId, *phases: Phase) -> _LiveRequest:
        entry = self._entries.get(request_id)
        if entry is None or entry.phase not in phases:
            raise IllegalStep(f"{request_id} is {entry.phase if entry else 'not here'}, not {' or '.join(phases)}")
        return entry


def _to_go(entry: _LiveRequest, done: int, total: int, now: float) -> str:
    """How long the remaining steps will take if they take as long as those so far; nothing below a second."""
    assert entry.first_step is not None, "it was set with the first step"
    steps, since = done - entry.first_step[0], now - entry.first_step[1]
    seconds = (total - done) * since / steps if steps > 0 else 0.0
    return f", about {seconds:.0f} s to go" if seconds >= 1 else ""
