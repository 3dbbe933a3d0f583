"""The state table of a job: exactly the listed transitions are legal."""

from __future__ import annotations

import itertools

import pytest

from batch.journal.states import OPEN, TABLE, TERMINAL, EventKind, IllegalTransition, State, advance

S, H = State, EventKind

# Repeated here on purpose: a mistake in the table must be made twice to go unnoticed.
LEGAL = [
    (S.PENDING, H.INTEND, S.INTENDED),
    (S.PENDING, H.FAIL, S.FAILED),
    (S.INTENDED, H.ACCEPT, S.ACCEPTED),
    (S.INTENDED, H.REFUSE, S.PENDING),
    (S.INTENDED, H.FAIL, S.FAILED),
    (S.INTENDED, H.LOSE, S.UNKNOWN),
    (S.UNKNOWN, H.ACCEPT, S.ACCEPTED),
    (S.UNKNOWN, H.INTEND, S.INTENDED),
    (S.ACCEPTED, H.ANSWER, S.ANSWERED),
    (S.ACCEPTED, H.FAIL, S.FAILED),
    (S.ANSWERED, H.FINISH, S.DONE),
    (S.ANSWERED, H.FAIL, S.FAILED),
    (S.FAILED, H.RETRY, S.PENDING),
    (S.ACCEPTED, H.UNCOLLECTED, S.COLLECTABLE),
    (S.ANSWERED, H.UNCOLLECTED, S.COLLECTABLE),
    (S.COLLECTABLE, H.UNCOLLECTED, S.COLLECTABLE),
    (S.COLLECTABLE, H.ANSWER, S.ANSWERED),
    (S.COLLECTABLE, H.FINISH, S.DONE),
    (S.COLLECTABLE, H.FAIL, S.FAILED),
]
ILLEGAL = sorted(set(itertools.product(S, H)) - {(state, kind) for state, kind, _ in LEGAL})


@pytest.mark.parametrize(("state", "kind", "after"), LEGAL)
def test_a_legal_event_leads_on(state, kind, after):
    """Each row of the table."""
    assert advance(state, kind) is after


@pytest.mark.parametrize(("state", "kind"), ILLEGAL)
def test_an_illegal_event_raises_and_names_both(state, kind):
    """A defect is loud: the message has state and event."""
    with pytest.raises(IllegalTransition, match=rf"\b{state}\b.*\b{kind}\b"):
        advance(state, kind)


def test_the_table_has_no_other_rows():
    """The transitions above are all."""
    assert len(TABLE) == len(LEGAL)


def test_every_state_is_reached_and_left_as_it_should_be():
    """Every state is pending, open or terminal, and can be reached; only done is final."""
    assert {S.PENDING} | TERMINAL | OPEN == set(S)
    assert not TERMINAL & OPEN
    assert set(TABLE.values()) == set(S)
    assert set(S) - {state for state, _ in TABLE} == {S.DONE}


def test_a_job_that_may_have_been_paid_for_is_never_simply_pending_again():
    """From accepted, answered or unknown no single event leads back to an unsent state."""
    assert all(after is not S.PENDING for (state, _), after in TABLE.items() if state in {S.ACCEPTED, S.ANSWERED, S.UNKNOWN, S.COLLECTABLE})  # fmt: skip # noqa: E501
