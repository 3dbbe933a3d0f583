"""The queue's state machine."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batch.fal.endpoint import APP_ID
from batch.server.queue.records import LogLine, Priority, uuid7
from batch.server.queue.scheduler import LOG_LINES, Cancellation, FifoQueue, IllegalStep, Scheduler
from batch.types import QueueState, RequestId


def scheduler_with(count: int, slots: int = 1) -> Scheduler:
    scheduler = Scheduler(slots)
    for number in range(count):
        scheduler.accept(RequestId(f"r{number}"), APP_ID)
    return scheduler


def test_requests_start_in_order_up_to_the_slots():
    """Requests start in FIFO order, at most one per slot."""
    scheduler = scheduler_with(3, slots=2)
    assert [scheduler.start(), scheduler.start(), scheduler.start()] == ["r0", "r1", None]
    scheduler.release(RequestId("r0"))
    assert scheduler.start() == "r2"


def test_low_priority_waits_behind_every_normal_request():
    """A low request starts only when no normal one waits."""
    scheduler = Scheduler(1)
    assert scheduler.accept(RequestId("slow"), APP_ID, Priority.LOW) == 0
    assert scheduler.accept(RequestId("quick"), APP_ID) == 0
    assert scheduler.view(RequestId("slow")).position == 1
    assert scheduler.start() == "quick"


def test_a_request_is_in_progress_until_its_outcome_is_durable():
    """The request stays IN_PROGRESS until its outcome is durable; its slot is free before that."""
    scheduler = scheduler_with(2)
    scheduler.start()
    scheduler.release(RequestId("r0"))
    assert scheduler.view(RequestId("r0")).state is QueueState.IN_PROGRESS
    assert scheduler.statistics() == (1, 0, 1)
    scheduler.finish(RequestId("r0"))
    assert scheduler.view(RequestId("r0")) is None


def test_nothing_starts_while_too_many_outcomes_wait_to_be_written():
    """A slow disk must not fill memory with finished images."""
    scheduler = Scheduler(1, ending_limit=1)
    for name in ("a", "b"):
        scheduler.accept(RequestId(name), APP_ID)
    scheduler.release(scheduler.start())
    assert scheduler.start() is None
    scheduler.finish(RequestId("a"))
    assert scheduler.start() == "b"


def test_cancel_removes_waiting_and_signals_running_requests():
    """Waiting: removed. Running: asked to stop. Ended: too late."""
    scheduler = scheduler_with(2)
    scheduler.start()
    assert scheduler.cancel(RequestId("r1")) is Cancellation.REMOVED
    assert scheduler.cancel(RequestId("r1")) is Cancellation.TOO_LATE
    assert not scheduler.is_cancelled(RequestId("r0"))
    assert scheduler.cancel(RequestId("r0")) is Cancellation.SIGNALLED
    assert scheduler.is_cancelled(RequestId("r0"))
    assert scheduler.cancel(RequestId("r0")) is Cancellation.SIGNALLED
    assert scheduler.cancel(RequestId("who")) is Cancellation.UNKNOWN
    scheduler.release(RequestId("r0"))
    assert scheduler.cancel(RequestId("r0")) is Cancellation.TOO_LATE


def test_a_crashed_request_is_retried_once():
    """The second crash is attributed to the request."""
    scheduler = scheduler_with(2)
    scheduler.start()
    assert scheduler.crash(RequestId("r0"))
    assert scheduler.view(RequestId("r0")).position == 0
    assert scheduler.start() == "r0"
    assert not scheduler.crash(RequestId("r0"))
    scheduler.release(RequestId("r0"))
    assert scheduler.start() == "r1"


def test_a_cancelled_request_is_not_retried_after_a_crash():
    """A cancelled request is not retried."""
    scheduler = scheduler_with(1)
    scheduler.start()
    scheduler.cancel(RequestId("r0"))
    assert not scheduler.crash(RequestId("r0"))


def test_only_a_waiting_request_expires():
    """A start deadline does not limit the execution time."""
    scheduler = scheduler_with(2)
    scheduler.start()
    assert not scheduler.expire(RequestId("r0"))
    assert scheduler.expire(RequestId("r1"))
    assert not scheduler.expire(RequestId("r1"))
    assert scheduler.statistics() == (0, 1, 1)


@pytest.mark.parametrize("move", ["release", "finish", "crash"])
def test_an_illegal_transition_raises_with_the_phase(move):
    """An internal error must be visible."""
    scheduler = scheduler_with(1)
    with pytest.raises(IllegalStep, match="waiting"):
        getattr(scheduler, move)(RequestId("r0"))
    with pytest.raises(IllegalStep, match="not live"):
        getattr(scheduler, move)(RequestId("other"))
    with pytest.raises(IllegalStep, match="already"):
        scheduler.accept(RequestId("r0"), APP_ID)


def test_a_step_contains_the_remaining_time():
    """The estimate uses the time since the first step, and is omitted below one second."""
    scheduler = scheduler_with(1)
    scheduler.start()
    for done in range(1, 41):
        scheduler.step(RequestId("r0"), done, 40, 100.0 + 2.0 * done)
    lines = [line.message for line in scheduler.view(RequestId("r0")).logs]
    assert "step 4 of 40, about 72 s left" in lines
    assert lines[-1] == "step 40 of 40"


def test_steps_are_logged_by_tenths_and_logs_are_bounded():
    """1000 steps give 10 lines, and the log is bounded."""
    scheduler = scheduler_with(1)
    scheduler.start()
    logged = [scheduler.step(RequestId("r0"), done, 1000, 1.0) for done in range(1, 1001)]
    assert sum(logged) == 10
    for number in range(LOG_LINES * 2):
        scheduler.log(RequestId("r0"), LogLine(2.0, "INFO", str(number)))
    logs = scheduler.view(RequestId("r0")).logs
    assert len(logs) == LOG_LINES
    assert logs[-1].message == str(LOG_LINES * 2 - 1)
    assert scheduler.release(RequestId("r0")) == logs


def test_positions_stay_cheap_in_a_long_queue():
    """With 50,000 waiting requests, a position costs microseconds, not a scan."""
    count = 50_000
    scheduler = scheduler_with(count)
    for number in range(0, count, 2):
        scheduler.cancel(RequestId(f"r{number}"))
    begin = time.perf_counter()
    positions = [scheduler.view(RequestId(f"r{number}")).position for number in range(1, count, 2)]
    assert positions == list(range(count // 2))
    assert time.perf_counter() - begin < 5, "a walk would take minutes"


@given(st.lists(st.sampled_from(["append", "appendleft", "pop", "remove"]), max_size=60), st.randoms())
def test_a_queue_counts_like_a_list(moves, chance):
    """For any sequence of operations, positions equal those of a plain list."""
    line, model = FifoQueue(), []
    for number, move in enumerate(moves):
        name = RequestId(str(number))
        if move == "append":
            line.append(name)
            model.append(name)
        elif move == "appendleft":
            line.appendleft(name)
            model.insert(0, name)
        elif model and move == "pop":
            assert line.popleft() == model.pop(0)
        elif model:
            gone = chance.choice(model)
            line.remove(gone)
            model.remove(gone)
        assert [line.position(one) for one in model] == list(range(len(model)))
        assert len(line) == len(model)


class SchedulerMachine(RuleBasedStateMachine):
    """Any legal sequence of events keeps the state consistent."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(2)
        self.count = 0
        self.waiting, self.running, self.ending = [], [], []

    @rule()
    def accept(self):
        name = RequestId(f"r{self.count}")
        self.count += 1
        assert self.scheduler.accept(name, APP_ID) == len(self.waiting)
        self.waiting.append(name)

    @rule()
    def start(self):
        expected = self.waiting[0] if self.waiting and len(self.running) < 2 else None
        assert self.scheduler.start() == expected
        if expected:
            self.running.append(self.waiting.pop(0))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(self.running))
        self.scheduler.release(name)
        self.running.remove(name)
        self.ending.append(name)

    @precondition(lambda self: self.ending)
    @rule()
    def finish(self):
        self.scheduler.finish(self.ending.pop())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(self.waiting))
        assert self.scheduler.cancel(name) is Cancellation.REMOVED
        self.waiting.remove(name)
        self.ending.append(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def crash(self, data):
        name = data.draw(st.sampled_from(self.running))
        self.running.remove(name)
        if self.scheduler.crash(name):
            self.waiting.insert(0, name)
        else:
            self.scheduler.release(name)
            self.ending.append(name)

    @invariant()
    def books(self):
        assert self.scheduler.statistics() == (len(self.waiting), len(self.running), len(self.ending))
        for place, name in enumerate(self.waiting):
            assert self.scheduler.view(name)[:2] == (QueueState.IN_QUEUE, place)
        for name in self.running + self.ending:
            assert self.scheduler.view(name).state is QueueState.IN_PROGRESS


TestSchedulerMachine = SchedulerMachine.TestCase


@given(st.floats(0, 2**47 / 1000), st.integers(0, 2**74 - 1))
def test_request_ids_are_version_7_uuids_with_their_time(now, chance):
    """48 bits of milliseconds, version 7, variant 10."""
    import uuid

    made = uuid7(now, chance)
    read = uuid.UUID(made)
    assert str(read) == made
    assert (read.version, read.variant) == (7, uuid.RFC_4122)
    assert read.int >> 80 == int(now * 1000)
