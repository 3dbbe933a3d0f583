"""Observers count, draw and log, and never disturb the run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from batch.errors import StorageError
from batch.run.observers import JsonLog, Observer, ObserverGroup, PlainLines, ProgressBar, ProgressCounter, pause_in
from batch.testing.observer import RecordingObserver


def ran(observer: Observer, *, jobs: int = 4, done: int = 2, failed: int = 1) -> None:
    """Send events of started jobs, some of which end."""
    observer.expected(jobs, 1)
    for number in range(jobs):
        observer.happened("started", job=str(number))
    for number in range(done):
        observer.happened("done", job=str(number))
        observer.happened("ended", job=str(number))
    for number in range(failed):
        observer.happened("failed", job=str(done + number), error_type="content_policy_violation")
        observer.happened("ended", job=str(done + number))


def test_an_observer_does_nothing():
    """The base class is the contract: every event is accepted, known or not."""
    Observer().happened("an action of tomorrow", any_fact=[1, None])
    Observer().expected(1, 0)


def test_several_observers_are_told_in_order():
    """Every event goes to each of them, in order."""
    first, second, tally = RecordingObserver(), RecordingObserver(), ProgressCounter()
    ran(ObserverGroup(first, second, tally))
    assert first.events == second.events
    assert len(first.events) == 10
    assert tally.done == 2


def test_a_tally_counts():
    """In flight means started and not ended."""
    tally = ProgressCounter()
    ran(tally)
    tally.happened("held", job="3", reason="its outcome is unknown")
    assert (tally.jobs, tally.already_done, tally.done, tally.failed, tally.held, tally.in_flight) == (4, 1, 2, 1, 1, 1)
    assert tally.errors == {"content_policy_violation": 1}
    assert tally.line() == "2/4 done, 1 failed, 1 in flight, 1 unknown"


def test_a_tally_keeps_this_runs_money_apart_from_that_of_all():
    """A budget concerns all runs, a user asks for the cost of this one."""
    tally = ProgressCounter()
    tally.happened("spent", usd=1.25, total_usd=1.25)
    assert tally.line().endswith("$1.25 spent")
    tally.happened("spent", usd=1.5, total_usd=1000.5)
    assert tally.line().endswith("$1.50 spent ($1,000.50 with earlier runs)")
    tally.happened("spent", usd=None, total_usd=None)
    assert (tally.spent_usd, tally.spent_total_usd) == (1.5, 1000.5)


def test_what_slows_a_run_down_is_shown_until_it_moves_again():
    """The note about a pause disappears with the next job that is done."""
    tally = ProgressCounter()
    tally.happened("paused", reason="HTTP 429")
    assert tally.line().endswith("(paused: HTTP 429)")
    tally.happened("done", job="1")
    assert tally.note == ""


WAITING = {
    "in_queue": {"jobs": 50, "oldest_seconds": 120.0},
    "in_progress": {"jobs": 14, "oldest_seconds": 31.0},
    "downloading": {"jobs": 2, "oldest_seconds": 3.0},
    "queue_positions": {"lowest": 3, "median": 40, "highest": 120},
}
WAITS = "50 in queue for up to 2 min, queue positions 3 to 120, median 40; 14 in progress for up to 31 s"


def test_what_open_jobs_wait_for_is_in_the_line_once_it_is_noticeable():
    """Next to the note about the pause; gone when nothing waits any longer."""
    tally = ProgressCounter()
    tally.happened("waiting", **WAITING)
    assert tally.line() == f"0/0 done, 0 failed, 0 in flight (waiting: {WAITS})"
    tally.happened("paused", reason="HTTP 429")
    assert tally.line().endswith(f"(waiting: {WAITS}; paused: HTTP 429)")
    tally.happened("done", job="1")
    tally.happened("waiting", in_queue={"jobs": 50, "oldest_seconds": 29.0})
    assert tally.line() == "1/0 done, 0 failed, 0 in flight"
    tally.happened("waiting", **WAITING)
    tally.happened("waiting", in_queue={"jobs": 0, "oldest_seconds": None})
    assert "waiting" not in tally.line()


def test_a_bar_says_what_is_waited_for_longest():
    """It is redrawn when that changes, although no job ends; notices do not remove it."""
    tally, stream = ProgressCounter(), io.StringIO()
    bar = ProgressBar(tally, stream)
    observer = ObserverGroup(tally, bar)
    observer.expected(9, 0)
    observer.happened("waiting", in_queue={"jobs": 50, "oldest_seconds": 5.0})
    assert "waiting" not in stream.getvalue()
    observer.happened("waiting", **WAITING)
    assert "waiting=50 in queue 2 min" in stream.getvalue().rsplit("\r", 1)[-1]
    drawn = stream.getvalue()
    observer.happened("waiting", **WAITING)
    assert stream.getvalue() == drawn
    observer.happened("waiting", downloading={"jobs": 2, "oldest_seconds": 7200.0})
    assert "waiting=2 downloading 2.0 h" in stream.getvalue().rsplit("\r", 1)[-1]
    observer.happened("waiting", in_queue={"jobs": 0, "oldest_seconds": None})
    assert "waiting" not in stream.getvalue().rsplit("\r", 1)[-1]
    assert "waiting: " not in stream.getvalue()
    bar.close()


def test_until_when_a_pause_goes_is_shown_for_as_long_as_it_holds():
    """Neither ended jobs nor other notices hide it, only its end does."""
    tally = ProgressCounter()
    tally.happened("paused", reason="HTTP 429; until 14:05:10 UTC", until="2026-11-22T14:05:10+00:00")
    assert tally.line().endswith("(paused: HTTP 429; until 14:05:10 UTC)")
    tally.happened("done", job="1")
    assert tally.line().endswith("(submits pause until 14:05:10 UTC)")
    tally.happened("unreachable", reason="status: timeout")
    assert tally.line().endswith("(unreachable: status: timeout; submits pause until 14:05:10 UTC)")
    tally.happened("resumed")
    assert tally.line().endswith("(unreachable: status: timeout)")


def test_lines_go_on_in_a_long_pause():
    """Nothing else happens then; in JSON the end of the pause is a key."""
    clock, tally, stream = Clock(), ProgressCounter(), io.StringIO()
    observer = ObserverGroup(tally, PlainLines(tally, stream, as_json=True, clock=clock))
    observer.happened("paused", reason="HTTP 429", until="2026-11-22T14:05:10+00:00")
    for second in range(0, 100, 30):
        clock.now = float(second)
        observer.happened("pausing")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["action"] for line in found] == ["paused", "progress", "progress", "progress"]
    assert {line["paused_until"] for line in found} == {"2026-11-22T14:05:10+00:00"}


def test_a_bar_shows_until_when_a_pause_goes():
    """Next to the numbers, until it is over."""
    tally, stream = ProgressCounter(), io.StringIO()
    bar = ProgressBar(tally, stream)
    observer = ObserverGroup(tally, bar)
    observer.expected(3, 0)
    observer.happened("paused", reason="HTTP 429", until="2026-11-22T14:05:10+00:00")
    observer.happened("pausing")
    assert "paused until=14:05:10 UTC" in stream.getvalue()
    observer.happened("resumed")
    assert "paused until" not in stream.getvalue().rsplit("\r", 1)[-1]
    bar.close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_every_thirty_seconds():
    """Not one for each of a million jobs; none while nothing happens."""
    clock, tally, stream = Clock(), ProgressCounter(), io.StringIO()
    observer = ObserverGroup(tally, PlainLines(tally, stream, clock=clock))
    for second in range(100):
        clock.now = float(second)
        observer.happened("done", job=str(second))
    assert stream.getvalue().splitlines() == [
        "31/0 done, 0 failed, 0 in flight",
        "61/0 done, 0 failed, 0 in flight",
        "91/0 done, 0 failed, 0 in flight",
    ]


def test_plain_lines_come_while_jobs_are_only_waited_for():
    """Nothing ends for ten minutes: a line every thirty seconds says what the run waits for."""
    clock, tally, stream = Clock(), ProgressCounter(), io.StringIO()
    observer = ObserverGroup(tally, PlainLines(tally, stream, clock=clock))
    for second in range(0, 600, 2):
        clock.now = float(second)
        observer.happened("waiting", in_queue={"jobs": 7, "oldest_seconds": clock.now})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 19
    assert lines[0] == "0/0 done, 0 failed, 0 in flight (waiting: 7 in queue for up to 30 s)"
    assert lines[-1].endswith("(waiting: 7 in queue for up to 10 min)")


def test_plain_lines_as_json_say_what_is_waited_for():
    """With every stage, or null."""
    clock, tally, stream = Clock(), ProgressCounter(), io.StringIO()
    observer = ObserverGroup(tally, PlainLines(tally, stream, as_json=True, clock=clock))
    observer.happened("warning", reason="x")
    clock.now = 40.0
    observer.happened("waiting", **WAITING)
    before, line = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert before["waits"] is None
    assert line["action"] == "progress"
    assert line["waits"]["in_queue"] == WAITING["in_queue"]
    assert line["waits"]["unknown"] == {"jobs": 0, "oldest_seconds": None}
    assert line["waits"]["queue_positions"] == WAITING["queue_positions"]


@pytest.mark.parametrize("action", ["paused", "stopping", "unreachable", "warning"])
def test_what_a_person_has_to_know_is_said_at_once(action):
    """As text, at any time."""
    stream = io.StringIO()
    PlainLines(ProgressCounter(), stream, clock=Clock()).happened(action, reason="HTTP 429")
    assert stream.getvalue() == f"{action}: HTTP 429\n"


def test_plain_lines_can_be_json():
    """The action, the message and the counts."""
    tally, stream = ProgressCounter(), io.StringIO()
    observer = ObserverGroup(tally, PlainLines(tally, stream, as_json=True, clock=Clock()))
    ran(observer)
    observer.happened("stopping", reason="the deadline of 5 s is near")
    (line,) = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert line["at"]
    assert (line["action"], line["message"]) == ("stopping", "stopping: the deadline of 5 s is near")
    assert (line["jobs"], line["done"], line["failed"], line["in_flight"]) == (4, 2, 1, 1)


def test_a_bar_counts_what_was_done_before():
    """It starts where the last run ended, advances for each end, and writes notices above itself."""
    tally, stream = ProgressCounter(), io.StringIO()
    bar = ProgressBar(tally, stream)
    observer = ObserverGroup(tally, bar)
    ran(observer, jobs=9, done=3)
    observer.happened("stopping", reason="SIGINT")
    bar.close()
    drawn = stream.getvalue()
    assert "5/10" in drawn.rsplit("\r", 1)[-1]
    assert "failed=1" in drawn
    assert "in_flight=5" in drawn
    assert "stopping: SIGINT\n" in drawn


def test_a_bar_that_was_never_drawn_is_closed_without_harm():
    """A run may end before it begins."""
    bar = ProgressBar(ProgressCounter(), io.StringIO())
    bar.happened("done")
    bar.close()


# --- the log ----------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_has_a_line_for_everything_but_the_display(tmp_path):
    """`started`, `ended`, `spent` and `waiting` are for a live display only."""
    path = tmp_path / "log.jsonl"
    with JsonLog(path) as log:
        ran(log)
        log.happened("spent", usd=1.0, total_usd=1.0)
        log.happened("waiting", **WAITING)
    found = lines(path)
    assert [line["action"] for line in found] == ["expected", "done", "done", "failed"]
    assert found[0]["jobs"] == 4
    assert found[3]["error_type"] == "content_policy_violation"
    assert all(line["at"].endswith("+00:00") for line in found)


def test_the_log_is_appended_over_all_sessions(tmp_path):
    """Nothing of an earlier run is lost."""
    path = tmp_path / "log.jsonl"
    for number in range(3):
        with JsonLog(path) as log:
            log.happened("session", number=number)
    assert [line["number"] for line in lines(path)] == [0, 1, 2]


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path):
    """A full disk may have cut the previous line."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"action": "done"}\n{"acti')
    with JsonLog(path) as log:
        log.happened("session", number=2)
    assert path.read_text().splitlines()[:2] == ['{"action": "done"}', '{"acti']
    assert json.loads(path.read_text().splitlines()[2])["number"] == 2


PAUSED = '{"action":"paused","reason":"HTTP 429","until":"2026-11-22T14:05:10+00:00"}\n'
UNTIL = 1_795_356_310.0


@pytest.mark.parametrize(
    ("text", "until"),
    [
        (PAUSED, UNTIL),
        (PAUSED + '{"action":"done","job":"1"}\n' * 50_000, UNTIL),
        (PAUSED + '{"action":"failed","message":"\\"resumed\\", it says"}\n', UNTIL),
        (PAUSED + '{"action":"resumed"}\n', None),
        (PAUSED + '{"action":"session","number":2}\n', None),
        (PAUSED + '{"action":"resumed"}\n' + PAUSED + '{"action":"pau', UNTIL),
        ('{"action":"paused","reason":"of version 0.1.0"}\n', None),
        ('{"action":"paused","until":7}\n', None),
        ("", None),
        ("[1]\n\xff\n", None),
    ],
)
def test_the_pause_that_holds_is_read_from_the_log(tmp_path, text, until):
    """The last pause of the last session, unless it has ended."""
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert pause_in(path, UNTIL - 60) == until
    assert pause_in(path, UNTIL + 1) is None
    assert pause_in(tmp_path / "none", 0.0) is None


def test_a_pause_is_in_the_log_at_once(tmp_path):
    """It may be the last event for an hour."""
    with JsonLog(tmp_path / "log.jsonl") as log:
        log.happened("done", job="1")
        log.happened("paused", reason="HTTP 429", until="2026-11-22T14:05:10+00:00")
        assert pause_in(tmp_path / "log.jsonl", UNTIL - 60) == UNTIL


def test_a_log_that_cannot_be_opened_is_said(tmp_path):
    """With its path."""
    with pytest.raises(StorageError, match=r"log\.jsonl cannot be written"):
        JsonLog(tmp_path / "no folder" / "log.jsonl").__enter__()


def test_a_full_disk_does_not_end_the_run_through_the_log():
    """The journal notices it too, and stops the run with a reason; the log just ends."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with JsonLog(full) as log:
        log.happened("session", number=1)
        log.happened("done", text="x" * 100_000)
        log.happened("done", text="x")


def test_a_log_that_is_not_open_takes_events_without_harm(tmp_path):
    """Before and after."""
    log = JsonLog(tmp_path / "log.jsonl")
    log.happened("done")
    assert not (tmp_path / "log.jsonl").exists()
