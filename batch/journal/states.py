"""The state machine of a job: one table decides each transition. Pure.

The journal applies only these events. An illegal event raises and names the state and the event. A job without a row in
the journal is PENDING.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["OPEN", "TABLE", "TERMINAL", "EventKind", "IllegalTransition", "State", "advance"]


class State(StrEnum):
    """The state of a job. The journal stores these words."""

    PENDING = "pending"
    """Nothing was sent, or the submit was certainly not accepted."""
    INTENDED = "intended"
    """The submit is about to be sent or was sent; its outcome is not recorded yet."""
    ACCEPTED = "accepted"
    """The server returned a request id. The request is, or will be, paid for."""
    ANSWERED = "answered"
    """The output is in the journal; not all images are stored yet."""
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """The submit may or may not have been accepted."""
    COLLECTABLE = "collectable"
    """The request has ended and is paid for, but its answer or an image could not be read. The results show it as
    failed. Later runs request the answer again, free, for as long as the target may keep it."""


class EventKind(StrEnum):
    """An event in the life of a job."""

    INTEND = "intend"
    ACCEPT = "accept"
    REFUSE = "refuse"
    """The submit was certainly not accepted and may be retried."""
    LOSE = "lose"
    """The outcome of the submit is unknown, and an immediate retry cannot settle it."""
    ANSWER = "answer"
    FINISH = "finish"
    FAIL = "fail"
    UNCOLLECTED = "uncollected"
    """The request has ended, but its answer or an image could not be read. This is not a verdict of the service."""
    RETRY = "retry"
    """A failed job is retried with a new attempt."""


_S, _K = State, EventKind

TABLE: dict[tuple[State, EventKind], State] = {
    (_S.PENDING, _K.INTEND): _S.INTENDED,
    (_S.PENDING, _K.FAIL): _S.FAILED,  # the source image cannot be read: nothing was sent
    (_S.INTENDED, _K.ACCEPT): _S.ACCEPTED,
    (_S.INTENDED, _K.REFUSE): _S.PENDING,
    (_S.INTENDED, _K.FAIL): _S.FAILED,  # permanent refusal, for example 422 from the gateway
    (_S.INTENDED, _K.LOSE): _S.UNKNOWN,
    (_S.UNKNOWN, _K.ACCEPT): _S.ACCEPTED,  # adopted by reconciliation
    (_S.UNKNOWN, _K.INTEND): _S.INTENDED,  # resubmitted, if the policy or an idempotency key allows it
    (_S.ACCEPTED, _K.ANSWER): _S.ANSWERED,
    (_S.ACCEPTED, _K.FAIL): _S.FAILED,
    (_S.ANSWERED, _K.FINISH): _S.DONE,
    (_S.ANSWERED, _K.FAIL): _S.FAILED,  # its files are no longer available
    (_S.FAILED, _K.RETRY): _S.PENDING,
    (_S.ACCEPTED, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.ANSWERED, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.COLLECTABLE, _K.UNCOLLECTED): _S.COLLECTABLE,
    (_S.COLLECTABLE, _K.ANSWER): _S.ANSWERED,
    (_S.COLLECTABLE, _K.FINISH): _S.DONE,  # this version can read the stored answer
    (_S.COLLECTABLE, _K.FAIL): _S.FAILED,  # the service's own verdict, or the answer has expired
}

TERMINAL = frozenset({State.DONE, State.FAILED, State.COLLECTABLE})
OPEN = frozenset({State.INTENDED, State.ACCEPTED, State.ANSWERED, State.UNKNOWN})
"""A submit was sent and its end is not recorded. These jobs are collected before anything new is submitted."""


class IllegalTransition(RuntimeError):
    """A bug in restyle: the table does not allow this event."""


def advance(state: State, kind: EventKind) -> State:
    """Return the next state.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return TABLE[state, kind]
    except KeyError:
        raise IllegalTransition(f"a job that is {state} cannot {kind}") from None
