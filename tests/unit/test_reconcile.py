"""The conclusions from a listing about a submit whose answer was lost."""

from __future__ import annotations

import itertools
from dataclasses import replace
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.fal.platform import Listed
from batch.journal.records import OpenJob
from batch.journal.states import State
from batch.run.reconcile import Finding, FoundRequest, Search, bounded, match, same_input, windows
from batch.types import AppId, JobKey, RequestId

NOW = 1_790_000_000.0
SENT = {"image_url": "https://x/1.jpg", "prompt": "a cat", "seed": 7, "strength": 0.95, "enable_safety_checker": True}
DEFAULTS = {"sync_mode": False, "loras": [], "anything": {"new": 1}}


def entry(sent: dict | None = None, at: float = NOW, key: str = "a") -> OpenJob:
    return OpenJob(JobKey(key), State.UNKNOWN, 1, at, orjson.dumps(SENT if sent is None else sent))


def uuid7(at: float, number: int = 1) -> RequestId:
    return RequestId(str(UUID(int=int(at * 1000) << 80 | 7 << 76 | 2 << 62 | number)))


def listed(sent: dict | None = SENT, at: float | None = NOW + 1, request_id: str = "r1") -> Listed:
    return Listed(RequestId(request_id), AppId("fal-ai/flux"), at, None, None, None, sent)


# --- the same input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "shown", "same"),
    [
        ({}, {}, True),
        (SENT, SENT, True),
        (SENT, SENT | DEFAULTS, True),
        (SENT, {name: value for name, value in SENT.items() if name != "strength"}, False),
        ({"seed": 7}, {"seed": 8}, False),
        # numbers are numbers: a service may store 40 as 40.0
        ({"steps": 40}, {"steps": 40.0}, True),
        ({"strength": 1.0}, {"strength": 1}, True),
        ({"strength": 0.95}, {"strength": 0.95}, True),
        ({"strength": 0.95}, {"strength": "0.95"}, False),
        ({"strength": 0.95}, {"strength": None}, False),
        # beyond the precision of a double, as in the service's own examples
        ({"seed": 196619188014358661}, {"seed": 196619188014358661}, True),
        ({"seed": 196619188014358661}, {"seed": 196619188014358660}, False),
        ({"seed": 196619188014358661}, {"seed": 196619188014358661.0}, False),
        # a boolean is not a number
        ({"sync_mode": True}, {"sync_mode": 1}, False),
        ({"sync_mode": False}, {"sync_mode": 0}, False),
        ({"num_images": 1}, {"num_images": True}, False),
        ({"sync_mode": True}, {"sync_mode": True}, True),
        ({"seed": None}, {"seed": None}, True),
        ({"seed": None}, {}, False),
        ({"seed": None}, {"seed": False}, False),
        # nested values must be equal: only the outermost keys have defaults
        ({"rules": {"a": 1}}, {"rules": {"a": 1.0}}, True),
        ({"rules": {"a": 1}}, {"rules": {"a": 1, "b": 2}}, False),
        ({"rules": {"a": 1}}, {"rules": [1]}, False),
        ({"list": [1, True]}, {"list": [1.0, True]}, True),
        ({"list": [1, True]}, {"list": [1, 1]}, False),
        ({"list": [1]}, {"list": [1, 2]}, False),
        ({"list": [1]}, {"list": {"0": 1}}, False),
        ({"prompt": "a"}, {"prompt": "a "}, False),
        ({"prompt": "é"}, {"prompt": "e\u0301"}, False),
    ],
    ids=str,
)
def test_the_same_input_is(sent, shown, same):
    """Every key that was sent, with an equal value; the service's additions are ignored."""
    assert same_input(sent, shown) is same


NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
INPUTS = st.dictionaries(st.sampled_from("abcdefgh"), VALUES, max_size=5)


@given(INPUTS, INPUTS)
def test_an_input_survives_the_wire_and_added_defaults(sent, more):
    """The sent input is found after a round trip through JSON, with any additional keys."""
    try:
        shown = orjson.loads(orjson.dumps(more | sent))
    except TypeError:  # we never send an integer of more than 64 bits
        return
    assert same_input(sent, shown)


@given(INPUTS.filter(bool), VALUES, st.data())
def test_one_changed_value_is_another_input(sent, value, data):
    """Each key counts."""
    name = data.draw(st.sampled_from(sorted(sent)))
    changed = sent | {name: value}
    assert same_input(sent, changed) is same_input({name: sent[name]}, {name: value})
    assert not same_input(sent, {key: kept for key, kept in changed.items() if key != name})


# --- one submit -------------------------------------------------------------------------------------------

OTHER = listed(SENT | {"seed": 8}, request_id="other")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], FoundRequest(Finding.ABSENT)),
        ([OTHER], FoundRequest(Finding.ABSENT)),
        ([listed()], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
        ([OTHER, listed(SENT | DEFAULTS)], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
        # two matches cannot be distinguished
        ([listed(), listed(request_id="r2")], FoundRequest(Finding.AMBIGUOUS)),
        ([listed(), listed(request_id="r2"), listed(None, request_id="r3")], FoundRequest(Finding.AMBIGUOUS)),
        # a request without its input may be a second match, or the only one
        ([listed(None)], FoundRequest(Finding.HIDDEN)),
        ([listed(), listed(None, request_id="r2")], FoundRequest(Finding.HIDDEN)),
        ([OTHER, listed(None, request_id="r2")], FoundRequest(Finding.HIDDEN)),
        # outside its time: another client's, or another attempt's
        ([listed(at=NOW - 301)], FoundRequest(Finding.ABSENT)),
        ([listed(at=NOW - 299)], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
        ([listed(at=NOW + 899)], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
        ([listed(at=NOW + 901)], FoundRequest(Finding.ABSENT)),
        ([listed(None, at=NOW + 901)], FoundRequest(Finding.ABSENT)),
        ([listed(), listed(at=NOW - 4000, request_id="r2")], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
        # the time inside the id is a second source, and both must agree
        ([listed(request_id=uuid7(NOW + 1))], FoundRequest(Finding.ADOPTED, uuid7(NOW + 1))),
        ([listed(request_id=uuid7(NOW - 4000))], FoundRequest(Finding.ABSENT)),
        ([listed(at=NOW - 4000, request_id=uuid7(NOW))], FoundRequest(Finding.ABSENT)),
        ([listed(at=None, request_id=uuid7(NOW))], FoundRequest(Finding.ADOPTED, uuid7(NOW))),
        # without any time, the listing's own window decides
        ([listed(at=None)], FoundRequest(Finding.ADOPTED, RequestId("r1"))),
    ],
    ids=str,
)
def test_a_listing_says_of_one_submit(found, expected):
    """Adopted only if exactly one request has everything that was sent, and none hides its input."""
    assert match(entry(), found, ()) == expected
    assert match(entry(), found[::-1], ()) == expected


@pytest.mark.parametrize("of_known", [listed(request_id="r9"), listed(None, request_id="r9")], ids=["shown", "hidden"])
def test_a_request_that_has_its_job_is_not_given_to_another(of_known):
    """An earlier attempt of the same job has the same input: its request is known, so it does not count."""
    assert match(entry(), [of_known], {"r9"}) == FoundRequest(Finding.ABSENT)
    assert match(entry(), [of_known, listed()], {"r9"}) == FoundRequest(Finding.ADOPTED, RequestId("r1"))


# --- a submit with a start timeout -------------------------------------------------------------------------

TIMEOUT = 600.0
OVER = NOW + 300 + TIMEOUT + 5400
BEFORE, AFTER = listed(SENT | {"seed": 1}, NOW + 59, "before"), listed(SENT | {"seed": 2}, NOW + 99, "after")
EARLY, LATE = replace(BEFORE, sent_at=NOW + 61), replace(AFTER, sent_at=NOW - 1)
EXPIRED = replace(listed(), status_code=504, ended_at=NOW + 700)


def found_by(*pages, at=OVER, timeout: float | None = TIMEOUT, known=frozenset({"before", "after"})) -> FoundRequest:
    """Return what a search of these pages finds about one submit with that start timeout."""
    search = Search([replace(entry(), start_timeout=timeout)])
    for page in pages:
        search.take(page)
    return search.findings(known & set(search.ids()), at)["a"]


def test_what_can_no_longer_start_and_is_not_listed_was_not_accepted():
    """The listing shows earlier and later requests of this run, so it would show this one."""
    assert found_by([AFTER], [BEFORE]) == FoundRequest(Finding.NOT_ACCEPTED)


@pytest.mark.parametrize(
    ("page", "how"),
    [
        # too early: it may still run, or the listing lags; too late: it may have left the listing
        ([AFTER, BEFORE], {"at": OVER - 1}),
        ([AFTER, BEFORE], {"at": NOW + 14 * 86400 + 1}),
        ([AFTER, BEFORE], {"timeout": None}),
        # nothing shows that the listing covers its time
        ([], {}),
        ([AFTER, EARLY], {}),
        ([LATE], {}),
        ([AFTER, BEFORE], {"known": frozenset({"after"})}),
    ],
    ids=["a second early", "after two weeks", "no timeout", "empty", "none before", "none after", "not ours"],
)
def test_absence_proves_nothing_where_anything_else_may_explain_it(page, how):
    """Too early, too late, or a listing that may not cover the time."""
    assert found_by(page, **how) == FoundRequest(Finding.ABSENT)


def test_what_is_listed_is_adopted_after_its_start_timeout_too():
    """It started in time; a request without its input may be it, and two matches are ambiguous."""
    assert found_by([AFTER, BEFORE, listed()]) == FoundRequest(Finding.ADOPTED, RequestId("r1"))
    assert found_by([AFTER, BEFORE, listed(None)]) == FoundRequest(Finding.HIDDEN)
    assert found_by([AFTER, BEFORE, listed(), listed(request_id="r2")]) == FoundRequest(Finding.AMBIGUOUS)


def test_what_ended_without_a_start_is_known_from_the_listing():
    """HTTP 504 costs nothing. Until it is certain to be over, the request itself is read."""
    assert found_by([EXPIRED]) == FoundRequest(Finding.NOT_STARTED)
    assert found_by([EXPIRED], at=OVER - 1) == FoundRequest(Finding.ADOPTED, RequestId("r1"))
    assert found_by([EXPIRED], timeout=None) == FoundRequest(Finding.ADOPTED, RequestId("r1"))
    assert found_by([replace(EXPIRED, status_code=500)]) == FoundRequest(Finding.ADOPTED, RequestId("r1"))


def test_the_ends_of_a_long_window_are_found_on_whatever_page_they_are():
    """Thousands of other users' requests are in between; memory does not grow with them."""
    others = [listed(SENT | {"seed": n}, NOW + (n - 1000) / 10, f"r{n}") for n in range(1000, 6000)]
    around = [listed(SENT | {"seed": 3}, NOW + 800, "late"), listed(SENT | {"seed": 4}, NOW - 250, "early")]
    shown = [*others[:2500], *around, *others[2500:]]
    search = Search([replace(entry(), start_timeout=TIMEOUT)])
    for n in range(0, len(shown), 100):
        search.take(shown[n : n + 100])
    assert len(search.ids()) <= 300
    assert search.findings({"late", "early"}, OVER)["a"] == FoundRequest(Finding.NOT_ACCEPTED)


@pytest.mark.parametrize(
    ("after", "timeout", "seconds"), [(1800.0, None, 1800.0), (1800.0, 600.0, 1800.0), (700.0, 600.0, 900.0)]
)
def test_a_submit_is_not_given_up_while_it_may_start(after, timeout, seconds):
    """`resubmit-after` is raised to the start timeout plus five minutes."""
    assert bounded(after, timeout) == seconds


def test_a_submit_that_may_have_been_repeated_is_looked_for_longer():
    """A target that rejects a repeat may have accepted any POST under its key, including the last one."""
    late = listed(at=NOW + 4000)
    assert match(entry(), [late], ()) == FoundRequest(Finding.ABSENT)
    assert match(entry(), [late], (), after=4500.0) == FoundRequest(Finding.ADOPTED, RequestId("r1"))
    (window,) = windows([entry()], NOW + 10_000, after=4500.0)
    assert (window.start, window.end) == (NOW - 300, NOW + 4500)


# --- many submits, page by page ---------------------------------------------------------------------------


def test_a_request_that_two_submits_claim_belongs_to_neither():
    """One input is a subset of the other, so the same request matches both."""
    small, large = entry({"seed": 7}, key="small"), entry(SENT, key="large")
    search = Search([small, large])
    search.take([listed()])
    assert set(search.findings(()).values()) == {FoundRequest(Finding.AMBIGUOUS)}
    search.take([listed({"seed": 7}, request_id="r2")])
    assert search.findings(()) == {
        "small": FoundRequest(Finding.AMBIGUOUS),
        "large": FoundRequest(Finding.ADOPTED, RequestId("r1")),
    }


def test_a_request_that_comes_twice_counts_once():
    """New requests shift the pages between reads."""
    search = Search([entry()])
    search.take([OTHER, listed()])
    search.take([listed(), OTHER])
    assert search.findings(()) == {"a": FoundRequest(Finding.ADOPTED, RequestId("r1"))}


def test_a_request_that_shows_its_input_later_is_not_hidden():
    """The payload is stored after the request is listed."""
    search = Search([entry()])
    search.take([listed(None)])
    search.take([listed()])
    assert search.findings(()) == {"a": FoundRequest(Finding.ADOPTED, RequestId("r1"))}


def test_only_what_may_be_ours_is_kept():
    """A busy account's million requests are not kept in memory."""
    search = Search([entry()])
    search.take(listed(SENT | {"seed": n}, request_id=f"r{n}") for n in range(100, 1100))
    assert search.ids() == []
    search.take([listed(), listed(None, request_id="r2")])
    assert search.ids() == ["r1", "r2"]


SEEDS = st.sampled_from([1, 1.0, 2, 2**60 + 1, True, "1", None, 1.5])
SHOWN = st.builds(
    lambda number, seed, word, hidden, at: listed(
        None if hidden else {"seed": seed, "prompt": word, "x": 0}, NOW + at, f"r{number}"
    ),
    st.integers(0, 12),
    SEEDS,
    st.sampled_from("ab"),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([0.0, 5.0, -400.0, 2000.0]),
)
ASKED = st.lists(st.tuples(SEEDS | st.just(...), st.sampled_from("ab")), min_size=1, max_size=4, unique_by=str)


@given(ASKED, st.lists(st.lists(SHOWN, max_size=4), max_size=5), st.sets(st.sampled_from(["r0", "r1", "r2"])))
def test_a_search_concludes_what_a_look_at_everything_would(asked, pages, known):
    """Keeping only equal seeds loses nothing, for any pages; and no two submits share a request."""
    entries = [
        entry({"prompt": word} | ({} if seed is ... else {"seed": seed}), key=str(number))
        for number, (seed, word) in enumerate(asked)
    ]
    search = Search(entries)
    everything: dict[str, Listed] = {}
    for page in pages:
        fresh = list({item.request_id: item for item in page if item.request_id not in everything}.values())
        everything.update({item.request_id: item for item in fresh})
        search.take(fresh)
        search.take(reversed(fresh))
    found = search.findings(known)
    adopted = [finding.request_id for finding in found.values() if finding.request_id]
    assert len(set(adopted)) == len(adopted)
    assert not set(adopted) & known
    for one in entries:
        alone = match(one, list(everything.values()), known)
        if found[one.job_key] != alone:
            rivals = [match(other, list(everything.values()), known) for other in entries if other is not one]
            assert found[one.job_key].finding is Finding.AMBIGUOUS
            assert alone.request_id in {rival.request_id for rival in rivals}


# --- windows ----------------------------------------------------------------------------------------------


def test_a_window_has_room_on_both_sides():
    """Five minutes before, because clocks differ; fifteen after, for a submit that hung."""
    (window,) = windows([entry()], NOW + 10_000)
    assert (window.start, window.end) == (NOW - 300, NOW + 900)


def test_a_window_does_not_end_in_the_future():
    """A fixed end keeps the pages from growing."""
    (window,) = windows([entry()], NOW + 10)
    assert window.end == NOW + 10


def test_there_is_no_window_without_a_submit():
    """Without unknown submits, nothing is listed."""
    assert windows([], NOW) == []


@given(st.lists(st.floats(0, 50_000), min_size=1, max_size=30), st.floats(0, 60_000))
def test_windows_cover_every_submit_once_and_do_not_overlap(offsets, later):
    """Each submit is in one window with its margins, and no time is listed twice."""
    entries = [entry(at=NOW + offset, key=str(number)) for number, offset in enumerate(offsets)]
    now = NOW + max(offsets) + later
    found = windows(entries, now)
    assert sorted(e.job_key for w in found for e in w.entries) == sorted(e.job_key for e in entries)
    for window in found:
        for one in window.entries:
            assert window.start <= one.intended_at - 300
            assert window.end >= min(now, one.intended_at + 900)
    for earlier, later_one in itertools.pairwise(found):
        assert earlier.end < later_one.start


def test_the_order_of_the_journal_does_not_matter():
    """Windows are sorted, oldest first."""
    far = replace(entry(), intended_at=NOW + 5000.0)
    assert [w.start for w in windows([far, entry()], NOW + 9000)] == [NOW - 300, NOW + 4700]
