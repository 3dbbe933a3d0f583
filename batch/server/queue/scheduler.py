"""The queue's state machine. Pure: no clock, no disk, no async.

Each method updates the queue and returns the next action; the caller executes it, writes the result to the store and
replies. A request is here from its acceptance until its result is durable:

    WAITING ──start──> RUNNING ──release──> ENDING ──finish──> gone
       ^  └─cancel, expire────────────────────^
       └────first crash── RUNNING, or CANCELLING after a cancel while it runs

Positions cost O(log n): a queue numbers its requests and keeps the numbers of those removed from its middle.
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
"""Log lines kept per request; older ones are dropped, as on fal."""
STEP_LINES = 10
"""Maximum number of logged step messages per request."""
CRASHES_ALLOWED = 1
"""Retries after a worker crash. A second crash is attributed to the request."""


class Phase(StrEnum):
    """The phase of a live request."""

    WAITING = "waiting"
    RUNNING = "running"
    CANCELLING = "cancelling"
    """Running, and asked to stop. It may still succeed."""
    ENDING = "ending"
    """Has an outcome that is not durable yet."""


class Cancellation(StrEnum):
    """The effect of a cancel."""

    REMOVED = "removed"
    """Removed from the queue: the caller stores the outcome, then calls `finish`."""
    SIGNALLED = "signalled"
    """Running: the engine is asked to stop."""
    TOO_LATE = "too late"
    UNKNOWN = "unknown"


class IllegalStep(RuntimeError):
    """An internal error: a transition that the diagram does not allow."""


class LiveView(NamedTuple):
    """The state of a live request, for its status response."""

    state: QueueState
    position: int
    """0-based, over all priorities; 0 while running."""
    logs: tuple[LogLine, ...]


class SchedulerStatistics(NamedTuple):
    """Numbers of live requests, by phase."""

    waiting: int
    running: int
    """Held by the engine, cancelled or not."""
    ending: int


class FifoQueue:
    """A FIFO queue with positions and removal from the middle in O(log n)."""

    __slots__ = ("_first", "_holes", "_number", "_order")

    def __init__(self) -> None:
        self._order: deque[RequestId | None] = deque()
        """The queued requests; None marks one removed from the middle."""
        self._first = 0
        """Number of the head of `_order`."""
        self._number: dict[RequestId, int] = {}
        self._holes: list[int] = []
        """Numbers of the None entries, ascending."""

    def __len__(self) -> int:
        return len(self._number)

    def append(self, request_id: RequestId) -> None:
        """Add a request at the end."""
        self._number[request_id] = self._first + len(self._order)
        self._order.append(request_id)

    def appendleft(self, request_id: RequestId) -> None:
        """Return a request to the front."""
        self._first -= 1
        self._number[request_id] = self._first
        self._order.appendleft(request_id)

    def popleft(self) -> RequestId:
        """Remove and return the first request.

        Raises:
            IndexError: the queue is empty.
        """
        request_id = self._order.popleft()
        self._first += 1
        assert request_id is not None, "the head of a queue is never a hole"
        del self._number[request_id]
        self._close_up()
        return request_id

    def remove(self, request_id: RequestId) -> None:
        """Remove a request from any position.

        Raises:
            KeyError: the request is not queued.
        """
        number = self._number.pop(request_id)
        self._order[number - self._first] = None
        insort(self._holes, number)
        self._close_up()

    def position(self, request_id: RequestId) -> int:
        """Return the number of requests ahead of this one.

        Raises:
            KeyError: the request is not queued.
        """
        number = self._number[request_id]
        return number - self._first - bisect_left(self._holes, number)

    def _close_up(self) -> None:
        """Drop holes at the head, so that the head is always a request."""
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
    """Tenths of the work that were logged."""
    first_step: tuple[int, float] | None = None
    """Steps done, and the time, at the first report. The time before it (loading) does not predict the rest."""
    logs: deque[LogLine] | None = field(default=None, repr=False)


class Scheduler:
    """All live requests, and which one runs next.

    Args:
        slots: requests that the engine executes at once, >= 1.
        ending_limit: start no request while this many outcomes wait to be written. Bounds the memory that finished
            images use when the disk is slow.
    """

    def __init__(self, slots: int, ending_limit: int = 256) -> None:
        self._slots = slots
        self._ending_limit = ending_limit
        self._entries: dict[RequestId, _LiveRequest] = {}
        self._lines = {priority: FifoQueue() for priority in Priority}
        self._running = 0
        self._ending = 0

    def __repr__(self) -> str:
        return f"Scheduler(slots={self._slots}, {self.statistics()})"

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._entries

    def statistics(self) -> SchedulerStatistics:
        """Return the numbers of live requests in O(1)."""
        return SchedulerStatistics(sum(map(len, self._lines.values())), self._running, self._ending)

    def accept(self, request_id: RequestId, app: AppId, priority: Priority = Priority.NORMAL, owner: str = "") -> int:
        """Queue a request whose acceptance is durable; return its position."""
        if request_id in self._entries:
            raise IllegalStep(f"{request_id} is already in the queue")
        self._entries[request_id] = _LiveRequest(app, priority, owner)
        self._lines[priority].append(request_id)
        return self._position(request_id, priority)

    def start(self) -> RequestId | None:
        """Return the next request to execute; None if no slot is free or none waits. Call until None."""
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
        """Append a log line; ignored if the request is not live."""
        entry = self._entries.get(request_id)
        if entry is not None:
            if entry.logs is None:
                entry.logs = deque(maxlen=LOG_LINES)
            entry.logs.append(line)

    def step(self, request_id: RequestId, done: int, total: int, now: float) -> bool:
        """Record progress; return whether it was logged (every tenth of the work is)."""
        entry = self._entries.get(request_id)
        tenths = done * STEP_LINES // total if total > 0 else 0
        if entry is not None and entry.first_step is None:
            entry.first_step = done, now
        if entry is None or tenths <= entry.tenths:
            return False
        entry.tenths = tenths
        self.log(request_id, LogLine(now, "INFO", f"step {done} of {total}{_remaining(entry, done, total, now)}"))
        return True

    def release(self, request_id: RequestId) -> tuple[LogLine, ...]:
        """Free the slot of a request that the engine has finished or failed; return its log lines."""
        entry = self._demand(request_id, Phase.RUNNING, Phase.CANCELLING)
        self._running -= 1
        return self._end(entry)

    def finish(self, request_id: RequestId) -> None:
        """Forget a request whose outcome is durable."""
        self._demand(request_id, Phase.ENDING)
        del self._entries[request_id]
        self._ending -= 1

    def cancel(self, request_id: RequestId) -> Cancellation:
        """Remove a waiting request, or mark a running one for the engine to stop."""
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
        """End a request that still waits after its start deadline. True: store the outcome, then call `finish`."""
        entry = self._entries.get(request_id)
        if entry is None or entry.phase is not Phase.WAITING:
            return False
        self._leave_line(request_id, entry)
        return True

    def crash(self, request_id: RequestId) -> bool:
        """Handle a worker crash. True: the request is at the head of its queue again. False: call `release`."""
        entry = self._demand(request_id, Phase.RUNNING, Phase.CANCELLING)
        entry.crashes += 1
        if entry.phase is Phase.CANCELLING or entry.crashes > CRASHES_ALLOWED:
            return False
        entry.phase, entry.tenths, entry.first_step = Phase.WAITING, 0, None
        self._running -= 1
        self._lines[entry.priority].appendleft(request_id)
        return True

    def is_cancelled(self, request_id: RequestId) -> bool:
        """Whether the engine must stop this request."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.phase is Phase.CANCELLING

    def app_of(self, request_id: RequestId) -> AppId | None:
        """Return the app of a live request; None for any other."""
        entry = self._entries.get(request_id)
        return entry.app if entry is not None else None

    def owner_of(self, request_id: RequestId) -> str:
        """Return the owner of a live request; empty for any other."""
        entry = self._entries.get(request_id)
        return entry.owner if entry is not None else ""

    def view(self, request_id: RequestId) -> LiveView | None:
        """Return the state of a live request; None for any other."""
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
            raise IllegalStep(f"{request_id} is {entry.phase if entry else 'not live'}, not {' or '.join(phases)}")
        return entry


def _remaining(entry: _LiveRequest, done: int, total: int, now: float) -> str:
    """Return the estimated remaining time as text, from the average time per step; empty below one second."""
    assert entry.first_step is not None, "the first step sets it"
    steps, since = done - entry.first_step[0], now - entry.first_step[1]
    seconds = (total - done) * since / steps if steps > 0 else 0.0
    return f", about {seconds:.0f} s left" if seconds >= 1 else ""
