"""The waits of open jobs, as numbers, as JSON and in words."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.run.waits import Overview, Positions, Stage, Waiting, Waits, duration, stage_of
from batch.types import JobKey, QueueState, TicketStatus


def waits(*jobs: tuple[Stage, float, int | None]) -> Waits:
    found = Waits()
    for number, (stage, since, position) in enumerate(jobs):
        found.put(JobKey(str(number)), stage, since, position)
    return found


SOME = waits(
    (Stage.IN_QUEUE, 100.0, 40),
    (Stage.IN_QUEUE, 50.0, 3),
    (Stage.IN_QUEUE, 170.0, 120),
    (Stage.IN_PROGRESS, 180.0, None),
    (Stage.DOWNLOADING, 10.0, None),
).overview(200.0)


def test_an_overview_counts_ages_and_positions():
    """The oldest of each stage; lowest, median and highest position."""
    assert SOME.stages == {
        Stage.IN_QUEUE: Waiting(3, 150.0),
        Stage.IN_PROGRESS: Waiting(1, 20.0),
        Stage.DOWNLOADING: Waiting(1, 190.0),
    }
    assert SOME.positions == Positions(3, 40, 120)
    assert SOME.oldest_seconds == 190.0


def test_nothing_waits():
    """No stage, no age, no words."""
    empty = Waits().overview(1.0)
    assert (empty.stages, empty.positions, empty.oldest_seconds, empty.sentence(), empty.lines()) == (
        {},
        None,
        0.0,
        "",
        [],
    )


def test_a_job_is_in_one_stage_and_leaves():
    """A position counts only in the queue; removing an unknown job is harmless."""
    found = waits((Stage.IN_QUEUE, 0.0, 7))
    found.put(JobKey("0"), Stage.IN_PROGRESS, 0.0, 7)
    assert found.overview(5.0) == Overview({Stage.IN_PROGRESS: Waiting(1, 5.0)})
    found.drop(JobKey("0"))
    found.drop(JobKey("0"))
    assert found.overview(5.0).stages == {}


def test_a_clock_that_is_set_back_makes_no_negative_age():
    """No age is negative."""
    assert waits((Stage.IN_PROGRESS, 100.0, None)).overview(50.0).oldest_seconds == 0.0


@pytest.mark.parametrize(
    ("state", "stage"),
    [
        (QueueState.IN_QUEUE, Stage.IN_QUEUE),
        (QueueState.IN_PROGRESS, Stage.IN_PROGRESS),
        (QueueState.COMPLETED, Stage.RESULT),
        (None, Stage.UNKNOWN),
    ],
)
def test_a_status_says_what_is_waited_for(state, stage):
    """An ended request waits for its result to be read."""
    assert stage_of(TicketStatus(state)) is stage


def test_the_words_name_what_has_waited_noticeably():
    """From half a minute; everything on request."""
    assert (
        SOME.sentence()
        == "3 in queue for up to 2 min, queue positions 3 to 120, median 40; 1 downloading for up to 3 min"
    )
    assert SOME.lines() == [
        ("in queue", 3, "for up to 2 min, queue positions 3 to 120, median 40"),
        ("in progress", 1, "for up to 20 s"),
        ("downloading", 1, "for up to 3 min"),
    ]
    one = waits((Stage.IN_QUEUE, 0.0, 0), (Stage.UNKNOWN, 0.0, None), (Stage.RESULT, 0.0, None)).overview(7200.0)
    assert one.sentence() == (
        "1 in queue for up to 2.0 h, queue position 0; 1 ended and unread for up to 2.0 h;"
        " 1 of unknown status for up to 2.0 h"
    )


def test_json_has_every_stage():
    """A reader never has to check whether a key exists."""
    assert SOME.to_json() == {
        "in_queue": {"jobs": 3, "oldest_seconds": 150.0},
        "in_progress": {"jobs": 1, "oldest_seconds": 20.0},
        "result": {"jobs": 0, "oldest_seconds": None},
        "downloading": {"jobs": 1, "oldest_seconds": 190.0},
        "unknown": {"jobs": 0, "oldest_seconds": None},
        "queue_positions": {"lowest": 3, "median": 40, "highest": 120},
    }


places = st.tuples(st.sampled_from(Stage), st.integers(0, 10**6).map(float), st.none() | st.integers(0, 10**9))


@given(st.lists(places, max_size=50))
def test_json_is_read_back(jobs):
    """By another process."""
    found = waits(*jobs).overview(1e6)
    assert Overview.of_json(orjson.loads(orjson.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    "value",
    [{}, {"in_queue": 5, "queue_positions": []}, {"in_queue": {"jobs": "3", "oldest_seconds": 1}},
     {"in_queue": {"jobs": 3}}, {"in_queue": {"jobs": -1, "oldest_seconds": 1.0}},
     {"queue_positions": {"lowest": 1, "median": None, "highest": 3}}],
)  # fmt: skip
def test_json_of_another_form_is_left_out(value):
    """A file of another version, or a damaged one."""
    assert Overview.of_json(value) == Overview({})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (86400 * 3, "3 days")],
)
def test_a_duration_is_said_in_one_unit(seconds, words):
    """The most readable unit."""
    assert duration(seconds) == words
