"""Fault injection: the selection of calls, and the faults file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.errors import ConfigError
from batch.server.faults.plan import (
    ACTIONS,
    ErrorBodyKind,
    FaultAction,
    FaultPlan,
    FaultPoint,
    FaultRule,
    FaultSequence,
    parse_faults,
)
from batch.server.queue.records import ListingRules, ListingWindow
from tests.faults.matrix import kinds


def met(text, point, calls):
    """Return the numbers of the calls at a point that get a fault, with its action."""
    faults = FaultSequence(parse_faults(text, "f.toml"))
    found = [faults.decide(point) for _ in range(calls)]
    return {number: fault.do for number, fault in enumerate(found, 1) if fault is not None}


def entry(**keys):
    """A `[[fault]]` table."""
    words = {True: "true", False: "false"}
    lines = [f"{key} = {words[value] if isinstance(value, bool) else repr(value)}" for key, value in keys.items()]
    return "\n".join(["[[fault]]", *lines, ""])


# --- selection of calls -----------------------------------------------------------------------------------


def test_every_n_th_call_is_selected():
    """`every = 3`: calls 3, 6, 9 at this point."""
    assert list(met(entry(at="submit", do="drop", every=3), FaultPoint.SUBMIT, 10)) == [3, 6, 9]


def test_the_first_calls_are_selected():
    """`first = 2`: calls 1 and 2."""
    assert list(met(entry(at="submit", do="drop", first=2), FaultPoint.SUBMIT, 10)) == [1, 2]


def test_after_skips_the_first_calls():
    """`after = 4, every = 3`: calls 7, 10."""
    assert list(met(entry(at="submit", do="drop", every=3, after=4), FaultPoint.SUBMIT, 11)) == [7, 10]
    assert list(met(entry(at="submit", do="drop", first=2, after=4), FaultPoint.SUBMIT, 11)) == [5, 6]


def test_times_limits_the_number_of_faults():
    """`times = 2`: at most two faults."""
    assert list(met(entry(at="submit", do="drop", every=2, times=2), FaultPoint.SUBMIT, 20)) == [2, 4]
    assert len(met(entry(at="submit", do="drop", share=0.5, times=3), FaultPoint.SUBMIT, 100)) == 3


def test_a_share_is_approximate_and_reproducible():
    """The selection is seeded; another seed selects other calls."""
    text = entry(at="status", do="drop", share=0.1)
    one = met("seed = 1\n" + text, FaultPoint.STATUS, 2000)
    assert 140 < len(one) < 260
    assert met("seed = 1\n" + text, FaultPoint.STATUS, 2000) == one
    assert met("seed = 2\n" + text, FaultPoint.STATUS, 2000) != one


def test_points_are_independent():
    """Calls at one point do not affect the decisions at another."""
    text = entry(at="status", do="drop", share=0.3) + entry(at="submit", do="drop", share=0.3)
    alone, mixed = FaultSequence(parse_faults(text, "f")), FaultSequence(parse_faults(text, "f"))
    expected = [alone.decide(FaultPoint.SUBMIT) is not None for _ in range(50)]
    found = []
    for _ in range(50):
        mixed.decide(FaultPoint.STATUS)
        found.append(mixed.decide(FaultPoint.SUBMIT) is not None)
    assert found == expected
    assert any(expected)


def test_a_call_gets_the_first_matching_fault():
    """A call gets one fault; one that was not used does not count for `times`."""
    text = entry(at="submit", do="drop", every=2) + entry(at="submit", do="late", seconds=1, every=3, times=2)
    found = met(text, FaultPoint.SUBMIT, 12)
    assert {number for number, do in found.items() if do is FaultAction.DROP} == {2, 4, 6, 8, 10, 12}
    assert {number for number, do in found.items() if do is FaultAction.LATE} == {3, 9}


@given(st.integers(1, 30), st.integers(0, 30), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 200))
def test_every_is_arithmetic(every, after, times, calls):
    """`every` selects exactly each n-th call, for any numbers."""
    plan = FaultPlan((FaultRule(at=FaultPoint.FILE, do=FaultAction.CUT, every=every, after=after, times=times),))
    faults = FaultSequence(plan)
    chosen = [number for number in range(1, calls + 1) if faults.decide(FaultPoint.FILE)]
    assert chosen == list(range(after + every, calls + 1, every))[:times]


def test_variants_are_drawn_independently_of_the_selection():
    """Draws are reproducible per seed and fault, and do not affect the selection."""
    text = entry(at="result", do="odd-fields", share=0.5) + entry(at="result", do="odd-fields", every=1)

    def ways(seed):
        faults = FaultSequence(parse_faults(f"seed = {seed}\n{text}", "f"))
        met = [faults.decide(FaultPoint.RESULT) for _ in range(200)]
        return [(fault is met[0], faults.draw(fault)) for fault in met]

    faults = FaultSequence(parse_faults(f"seed = 1\n{text}", "f"))
    undrawn = [faults.decide(FaultPoint.RESULT) for _ in range(200)]
    assert ways(1) == ways(1)
    assert [first for first, _ in ways(1)] == [fault is undrawn[0] for fault in undrawn]
    assert {way for _, way in ways(1)} & {way for _, way in ways(2)} == set()
    assert len({way for _, way in ways(1)}) == 200


def test_an_empty_plan_has_no_faults():
    """An empty file is a valid plan."""
    assert parse_faults("", "f.toml") == FaultPlan()
    assert met("", FaultPoint.SUBMIT, 5) == {}


# --- the faults file --------------------------------------------------------------------------------------


def test_all_keys_are_read():
    """Each key is read; gateway statuses have an HTML body by default."""
    text = (
        "seed = 7\n"
        + entry(at="submit", do="answer", status=429, retry_after=2, every=5, times=3, after=1)
        + entry(at="result", do="answer", status=502, share=0.5)
        + entry(at="result", do="answer", status=503, body="empty", first=1)
        + entry(at="execute", do="fail", status=500, retryable=False, every=9)
        + entry(at="execute", do="expire", seconds=1.5, every=1)
        + entry(at="file", do="refuse", status=403, reads=3, retry_after=1, every=1)
        + entry(at="file", do="refuse", status=404, seconds=2.5, every=1)
        + "[listing]\nshow_waiting = true\nlag = 2\nwindow = 'ended_at'\n"
    )
    plan = parse_faults(text, "f.toml")
    assert plan.seed == 7
    assert plan.listing == ListingRules(show_waiting=True, lag=2.0, window=ListingWindow.ENDED_AT)
    first, second, third, fourth, fifth, sixth, seventh = plan.faults
    assert (first.status, first.retry_after, first.every, first.times, first.after) == (429, 2.0, 5, 3, 1)
    assert (first.body, second.body, third.body) == (ErrorBodyKind.FAL, ErrorBodyKind.HTML, ErrorBodyKind.EMPTY)
    assert (fourth.status, fourth.retryable, fifth.seconds) == (500, False, 1.5)
    assert (sixth.status, sixth.reads, sixth.retry_after, sixth.body) == (403, 3, 1.0, ErrorBodyKind.FAL)
    assert (seventh.status, seventh.reads, seventh.seconds) == (404, None, 2.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = ", ["is not TOML"]),
        ("sede = 1", ["unknown key sede", "did you mean seed?", "fault, listing"]),
        ("seed = 'x'", ["seed = 'x'", "integer"]),
        ("[fault]\nat = 'submit'", ["two brackets"]),
        ("listing = 1", ["[listing] table"]),
        ("[listing]\nlags = 1", ["listing: unknown key lags", "did you mean lag?"]),
        ("[listing]\nlag = -1", ["lag = -1", "greater than or equal to 0"]),
        ("[listing]\nlag = inf", ["lag = inf"]),
        ("[listing]\nwindow = 'x'", ["unknown window 'x'", "sent_at, ended_at"]),
        ("[listing]\nshow_waiting = 1", ["show_waiting = 1", "boolean"]),
        (entry(do="drop", every=1), ["fault 1: at is missing", "submit, status, result"]),
        (entry(at="submit", every=1), ["do is missing", "drop-after-accept"]),
        (entry(at="sumbit", do="drop", every=1), ["unknown at 'sumbit'", "did you mean submit?"]),
        (entry(at="status", do="drop-after-accept", every=1), ["'drop-after-accept' at status", "known: drop, answer"]),
        (entry(at="submit", do="drop"), ["exactly one of every, share, first"]),
        (entry(at="submit", do="drop", every=1, share=0.1), ["exactly one of every, share, first"]),
        (entry(at="submit", do="drop", every=0), ["every = 0", "greater than or equal to 1"]),
        (entry(at="submit", do="drop", every=True), ["every = True"]),
        (entry(at="submit", do="drop", share=1.5), ["share = 1.5", "less than or equal to 1"]),
        (
            entry(at="submit", do="drop", every=1, status=500),
            ["drop does not take the key status", "known: at, do, every"],
        ),
        (entry(at="submit", do="drop", every=1, evry=1), ["unknown key evry", "did you mean every?"]),
        (entry(at="submit", do="answer", every=1), ["answer needs status"]),
        (entry(at="submit", do="answer", every=1, status=200), ["status = 200", "greater than or equal to 400"]),
        (entry(at="execute", do="fail", every=1, status=422), ["status = 422", "500 to 599"]),
        (entry(at="file", do="slow", every=1), ["slow needs seconds"]),
        (entry(at="file", do="refuse", every=1, seconds=1), ["refuse needs status"]),
        (entry(at="file", do="refuse", every=1, status=403), ["refuse needs exactly one of seconds, reads"]),
        (entry(at="file", do="refuse", every=1, status=403, seconds=1, reads=1), ["exactly one of seconds, reads"]),
        (entry(at="file", do="refuse", every=1, status=403, reads=0), ["reads = 0", "greater than or equal to 1"]),
        (entry(at="file", do="refuse", every=1, status=200, reads=1), ["status = 200", "greater than or equal to 400"]),
        (entry(at="result", do="refuse", every=1, status=403, reads=1), ["'refuse' at result", "odd-fields"]),
        (entry(at="result", do="odd-fields", every=1, seconds=1), ["odd-fields does not take the key seconds"]),
        (entry(at="status", do="odd-fields", every=1), ["'odd-fields' at status"]),
        (entry(at="submit", do="answer", every=1, status=500, body="xml"), ["unknown body 'xml'", "fal, html, empty"]),
        (entry(at="submit", do="drop", every=1) + entry(at="x", do="drop", every=1), ["f.toml: fault 2: unknown at"]),
    ],
)
def test_an_error_contains_place_value_and_allowed_values(text, words):
    """The message is one sentence with table, value and allowed values."""
    with pytest.raises(ConfigError) as caught:
        parse_faults(text, "f.toml")
    assert str(caught.value).startswith("f.toml")
    assert [word for word in words if word not in str(caught.value)] == []


def test_the_fault_matrix_has_every_action():
    """The matrix of tests/faults is generated from the table of actions; each action is in it."""
    assert {kind.do for kind in kinds()} == {action for actions in ACTIONS.values() for action in actions}
