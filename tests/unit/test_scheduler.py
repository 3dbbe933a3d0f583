"""The queue's decisions."""

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


def broker_with(count: int, slots: int = 1) -> Scheduler:
    broker = Scheduler(slots)
    for number in range(count):
        broker.accept(RequestId(f"r{number}"), APP_ID)
    return broker


def test_requests_start_in_the_order_of_acceptance_as_far_as_slots_reach():
    """First come, first served; never more at once than there are slots."""
    broker = broker_with(3, slots=2)
    assert [broker.start(), broker.start(), broker.start()] == ["r0", "r1", None]
    broker.release(RequestId("r0"))
    assert broker.start() == "r2"


def test_low_priority_waits_behind_every_normal_request():
    """`low` can only lower."""
    broker = Scheduler(1)
    assert broker.accept(RequestId("slow"), APP_ID, Priority.LOW) == 0
    assert broker.accept(RequestId("quick"), APP_ID) == 0
    assert broker.view(RequestId("slow")).position == 1
    assert broker.start() == "quick"


def test_a_request_runs_until_its_ending_is_durable():
    """IN_PROGRESS covers the time in which an outcome is being written; the slot is free before."""
    broker = broker_with(2)
    broker.start()
    broker.release(RequestId("r0"))
    assert broker.view(RequestId("r0")).state is QueueState.IN_PROGRESS
    assert broker.statistics() == (1, 0, 1)
    broker.finish(RequestId("r0"))
    assert broker.view(RequestId("r0")) is None


def test_nothing_is_started_while_too_many_endings_wait_to_be_written():
    """A slow disk must not fill the memory with finished images."""
    broker = Scheduler(1, ending_limit=1)
    for name in ("a", "b"):
        broker.accept(RequestId(name), APP_ID)
    broker.release(broker.start())
    assert broker.start() is None
    broker.finish(RequestId("a"))
    assert broker.start() == "b"


def test_cancel_removes_what_waits_and_signals_what_runs():
    """Queued: never processed. Running: asked to stop. Ended: too late."""
    broker = broker_with(2)
    broker.start()
    assert broker.cancel(RequestId("r1")) is Cancellation.REMOVED
    assert broker.cancel(RequestId("r1")) is Cancellation.TOO_LATE
    assert not broker.is_cancelled(RequestId("r0"))
    assert broker.cancel(RequestId("r0")) is Cancellation.SIGNALLED
    assert broker.is_cancelled(RequestId("r0"))
    assert broker.cancel(RequestId("r0")) is Cancellation.SIGNALLED
    assert broker.cancel(RequestId("who")) is Cancellation.UNKNOWN
    broker.release(RequestId("r0"))
    assert broker.cancel(RequestId("r0")) is Cancellation.TOO_LATE


def test_a_request_whose_worker_died_is_next_again_but_only_once():
    """One crash may be chance, two are the request's own fault."""
    broker = broker_with(2)
    broker.start()
    assert broker.crash(RequestId("r0"))
    assert broker.view(RequestId("r0")).position == 0
    assert broker.start() == "r0"
    assert not broker.crash(RequestId("r0"))
    broker.release(RequestId("r0"))
    assert broker.start() == "r1"


def test_a_cancelled_request_is_not_tried_again_after_a_crash():
    """Nobody wants its result."""
    broker = broker_with(1)
    broker.start()
    broker.cancel(RequestId("r0"))
    assert not broker.crash(RequestId("r0"))


def test_only_a_waiting_request_expires():
    """A start deadline does not bound the run time."""
    broker = broker_with(2)
    broker.start()
    assert not broker.expire(RequestId("r0"))
    assert broker.expire(RequestId("r1"))
    assert not broker.expire(RequestId("r1"))
    assert broker.statistics() == (0, 1, 1)


@pytest.mark.parametrize("move", ["release", "finish", "crash"])
def test_an_illegal_move_raises_and_names_the_phase(move):
    """A defect of ours must not pass silently."""
    broker = broker_with(1)
    with pytest.raises(IllegalStep, match="waiting"):
        getattr(broker, move)(RequestId("r0"))
    with pytest.raises(IllegalStep, match="not here"):
        getattr(broker, move)(RequestId("other"))
    with pytest.raises(IllegalStep, match="already"):
        broker.accept(RequestId("r0"), APP_ID)


def test_a_step_says_how_long_the_rest_will_take():
    """Reckoned from the steps so far, without what came before the first; nothing below a second."""
    broker = broker_with(1)
    broker.start()
    for done in range(1, 41):
        broker.step(RequestId("r0"), done, 40, 100.0 + 2.0 * done)
    lines = [line.message for line in broker.view(RequestId("r0")).logs]
    assert "step 4 of 40, about 72 s to go" in lines
    assert lines[-1] == "step 40 of 40"


def test_steps_are_logged_by_tenths_and_logs_are_a_window():
    """A thousand steps give ten lines; a talkative engine cannot fill the memory."""
    broker = broker_with(1)
    broker.start()
    logged = [broker.step(RequestId("r0"), done, 1000, 1.0) for done in range(1, 1001)]
    assert sum(logged) == 10
    for number in range(LOG_LINES * 2):
        broker.log(RequestId("r0"), LogLine(2.0, "INFO", str(number)))
    logs = broker.view(RequestId("r0")).logs
    assert len(logs) == LOG_LINES
    assert logs[-1].message == str(LOG_LINES * 2 - 1)
    assert broker.release(RequestId("r0")) == logs


def test_positions_stay_cheap_in_a_long_queue():
    """At 50,000 waiting requests a position costs microseconds, not a walk through the line."""
    count = 50_000
    broker = broker_with(count)
    for number in range(0, count, 2):
        broker.cancel(RequestId(f"r{number}"))
    begin = time.perf_counter()
    positions = [broker.view(RequestId(f"r{number}")).position for number in range(1, count, 2)]
    assert positions == list(range(count // 2))
    assert time.perf_counter() - begin < 5, "a walk would take minutes"


@given(st.lists(st.sampled_from(["append", "appendleft", "pop", "remove"]), max_size=60), st.randoms())
def test_a_line_counts_like_a_list(moves, chance):
    """Whatever joins and leaves in whatever order, positions are those of a plain list."""
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


class BrokerMachine(RuleBasedStateMachine):
    """Any legal sequence of events keeps the books right."""

    def __init__(self):
        super().__init__()
        self.broker = Scheduler(2)
        self.count = 0
        self.waiting, self.running, self.ending = [], [], []

    @rule()
    def accept(self):
        name = RequestId(f"r{self.count}")
        self.count += 1
        assert self.broker.accept(name, APP_ID) == len(self.waiting)
        self.waiting.append(name)

    @rule()
    def start(self):
        expected = self.waiting[0] if self.waiting and len(self.running) < 2 else None
        assert self.broker.start() == expected
        if expected:
            self.running.append(self.waiting.pop(0))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(self.running))
        self.broker.release(name)
        self.running.remove(name)
        self.ending.append(name)

    @precondition(lambda self: self.ending)
    @rule()
    def finish(self):
        self.broker.finish(self.ending.pop())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(self.waiting))
        assert self.broker.cancel(name) is Cancellation.REMOVED
        self.waiting.remove(name)
        self.ending.append(name)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def crash(self, data):
        name = data.draw(st.sampled_from(self.running))
        self.running.remove(name)
        if self.broker.crash(name):
            self.waiting.insert(0, name)
        else:
            self.broker.release(name)
            self.ending.append(name)

    @invariant()
    def books(self):
        assert self.broker.statistics() == (len(self.waiting), len(self.running), len(self.ending))
        for place, name in enumerate(self.waiting):
            assert self.broker.view(name)[:2] == (QueueState.IN_QUEUE, place)
        for name in self.running + self.ending:
            assert self.broker.view(name).state is QueueState.IN_PROGRESS


TestBrokerMachine = BrokerMachine.TestCase


@given(st.floats(0, 2**47 / 1000), st.integers(0, 2**74 - 1))
def test_request_ids_are_version_7_uuids_that_tell_their_time(now, chance):
    """48 bits of milliseconds, version 7, variant 10."""
    import uuid

    made = uuid7(now, chance)
    read = uuid.UUID(made)
    assert str(read) == made
    assert (read.version, read.variant) == (7, uuid.RFC_4122)
    assert read.int >> 80 == int(now * 1000)
