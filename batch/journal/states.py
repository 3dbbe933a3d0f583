"""The life of a job as one table. Everything that decides a job's next state stands here. Pure.

The journal applies these events and nothing else; an illegal one raises and names state and event. A job
that the journal has never heard of is PENDING.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["OPEN", "TABLE", "TERMINAL", "EventKind", "IllegalTransition", "State", "advance"]


class State(StrEnum):
    """Where a job is. Kept by the journal as these words."""

    PENDING = "pending"
    """Nothing of it was sent, or what was sent was certainly not accepted."""
    INTENDED = "intended"
    """The submit is about to be sent, or was; its outcome is not written down yet."""
    ACCEPTED = "accepted"
    """The server gave a request id. It is, or will be, paid for."""
    ANSWERED = "answered"
    """Its output is in the journal; the images are not all stored yet."""
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """The submit may or may not have been accepted."""
    COLLECTABLE = "collectable"
    """The request ended and is paid for, but its answer or an image could not be read. It failed as far as the results
    go, and it is asked for again, free, for as long as the target may keep it."""


class EventKind(StrEnum):
    """What can happen to a job."""

    INTEND = "intend"
    ACCEPT = "accept"
    REFUSE = "refuse"
    """The submit was certainly not accepted, and may be tried again."""
    LOSE = "lose"
    """The submit's outcome is not known, and not just for a moment."""
    ANSWER = "answer"
    FINISH = "finish"
    FAIL = "fail"
    UNCOLLECTED = "uncollected"
    """The request ended, and its answer or an image of it could not be read; not by a verdict of the service."""
    RETRY = "retry"
    """A failed job is taken up again: a new attempt."""


_S, _K = State, EventKind

TABLE: dict[tuple[State, EventKind], State] = {
    (_S.PENDING, _K.INTEND): _S.INTENDED,
    (_S.PENDING, _K.FAIL): _S.FAILED,  # its image cannot be read: nothing was sent
    (_S.INTENDED, _K.ACCEPT): _S.ACCEPTED,
    (_S.INTENDED, _K.REFUSE): _S.PENDING,
    (_S.INTENDED, _K.FAIL): _S.FAILED,  # refused for good, 422 at the gateway for instance
    (_S.INTENDED, _K.LOSE): _S.UNKNOWN,
    (_S.UNKNOWN, _K.ACCEPT): _S.ACCEPTED,  # adopted by reconciliation
    (_S.UNKNOWN, _K.INTEND): _S.INTENDED,  # resubmitted, where policy or an idempotency key allows it
    (_S.ACCEPTED, _K.ANSWER): _S.ANSWERED,
    (_S.ACCEPTED, _K.FAIL): _S.FAILED,
    (_S.ANSWERED, _K.FINISH): _S.DONE,
    (_S.ANSWERED, _K.FAIL): _S.FAILED,  # its files can no longer be had
    (_S.FAILED, _K.RETRY): _S.PENDING,
    (_S.ACCEPTED, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.ANSWERED, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.COLLECTABLE, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.COLLECTABLE, _K.ANSWER): _S.ANSWERED,
    (_S.COLLECTABLE, _K.FINISH): _S.DONE,  # its stored answer was readable after all
    (_S.COLLECTABLE, _K.FAIL): _S.FAILED,  # the service's own verdict, or it is no longer kept
}

TERMINAL = frozenset({State.DONE, State.FAILED, State.COLLECTABLE})
OPEN = frozenset({State.INTENDED, State.ACCEPTED, State.ANSWERED, State.UNKNOWN})
"""Something was sent and its end is not written down: collected before anything new is submitted."""


class IllegalTransition(RuntimeError):
    """A defect of ours: an event that the table does not allow."""


def advance(state: State, kind: EventKind) -> State:
    """The next state.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return TABLE[state, kind]
    except KeyError:
        raise IllegalTransition(f"a job that is {state} cannot {kind}") from None
