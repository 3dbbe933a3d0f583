"""The journal's file: durability, refusals and messages."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from array import array
from contextlib import closing
from pathlib import Path
from random import Random

import anyio
import pytest

from batch.errors import RestyleError, RunDirectoryError, StorageError
from batch.journal import database as database_module
from batch.journal.database import APPLICATION_ID, SCHEMA_VERSION, JournalDatabase
from batch.journal.events import Accepted, Answered, FailedForGood, Finished, Intended, Lost, Retried
from batch.journal.states import State
from batch.journal.writer import open_journal
from batch.manifest.types import FileFact, FileKey
from batch.system.sql import load_statements
from batch.types import Answer, Failed, JobKey, RequestId, Ticket

KEY = JobKey("a" * 32)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


def opened(path, now=1000.0):
    return JournalDatabase.open(path, now=now, version="1.2.3")


def intended(number=0, at=1.0):
    return Intended(JobKey(f"{number:032x}"), at, 1, b"{}", 0.03)


def schema_of(path):
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, type, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'").fetchall()
    connection.close()
    return {name: (kind, sql) for name, kind, sql in rows}


def ask(path, *statements):
    """Return the rows of the last statement, read over a separate connection."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
        connection.commit()
    return rows


# --- what is in it ----------------------------------------------------------------------------------------


def test_fresh_schema_is_the_documented_one(path):
    """Tables and columns are an interface for users of the sqlite3 shell; all tables are STRICT."""
    opened(path).close()
    schema = schema_of(path)
    assert {name for name, (kind, _) in schema.items() if kind == "table"} == {
        "meta", "sessions", "jobs", "bodies", "start_timeouts", "outcomes", "uploads", "files",
    }  # fmt: skip
    assert [name for name, (kind, _) in schema.items() if kind == "index"] == [
        "open_jobs",
        "request_ids",
        "failed_request_ids",
    ]
    assert all("STRICT" in sql for kind, sql in schema.values() if kind == "table")
    connection = sqlite3.connect(path)
    columns = [row[1] for row in connection.execute("PRAGMA table_info(jobs)")]
    assert columns == [
        "id", "key", "state", "session", "attempt", "intended_at", "accepted_at", "request_id", "status_url",
        "response_url", "cancel_url", "reserved_usd", "cost_usd", "reason", "answer_id", "end_id",
    ]  # fmt: skip
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_commits_reach_the_disk(path):
    """The file is written with synchronous=FULL: a commit survives a power cut."""
    file = opened(path)
    assert file._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    file.close()


def test_reopening_changes_nothing_but_the_session(path):
    """Opening again keeps schema and content."""
    file = opened(path)
    file.commit([[intended()]])
    file.close(now=2000.0)
    before = schema_of(path)
    again = opened(path, 3000.0)
    assert schema_of(path) == before
    assert (again.session, again.counts().by_state) == (2, {State.INTENDED: 1})
    first, second = again.sessions()
    assert (first.started_at, first.ended_at, first.version) == (1000.0, 2000.0, "1.2.3")
    assert (second.number, second.ended_at) == (2, None)
    again.close()


def test_sessions_know_what_was_spent_and_done_in_them(path):
    """Each session counts its own cost and finished jobs."""
    for session in (1, 2):
        file = opened(path, session * 1000.0)
        key = JobKey(f"{session:032x}")
        life = [
            Intended(key, 1.0, 1, b"{}", 0.03),
            Accepted(key, 2.0, Ticket(RequestId(f"r-{session}"))),
            Answered(key, 3.0, Answer({}), 0.01 * session),
            Finished(key, 1500.0 * session, ()),
        ]
        file.commit([life])
        assert file.finished_since(session * 1000.0).last_at == 1500.0 * session
        file.close()
    reader = JournalDatabase.open_read_only(path)
    assert [(s.spent_usd, s.finished, s.last_finished_at) for s in reader.sessions()] == [
        (0.01, 1, 1500.0),
        (0.02, 1, 3000.0),
    ]
    assert reader.finished_since(0.0).count == 2
    assert reader.finished_since(5000.0).count == 0
    reader.close()


def test_earlier_outcomes_stay_in_the_file(path):
    """Outcomes are append-only: error and cost of a failed attempt stay readable."""
    file = opened(path)
    for attempt in (1, 2):
        ticket = Ticket(RequestId(f"r-{attempt}"))
        file.commit([[Intended(KEY, 1.0, attempt, b"{}"), Accepted(KEY, 2.0, ticket)]])
        file.commit([[FailedForGood(KEY, 3.0, Failed("e", "m"), 0.01), Retried(KEY, 4.0)]])
    rows = ask(path, "SELECT request_id, attempt, cost_usd FROM outcomes ORDER BY id")
    assert rows == [("r-1", 1, 0.01), ("r-2", 2, 0.01)]
    file.close()


def test_open_jobs_are_found_without_reading_the_others(path):
    """Finding jobs to collect uses the small index, for a table of any size."""
    file = opened(path)
    file.close()
    statements = load_statements(database_module.__file__)
    with closing(sqlite3.connect(path)) as connection:
        for name in ("open_ids", "sum_open"):
            parameters = ['["accepted"]'] if name == "open_ids" else []
            plan = connection.execute("EXPLAIN QUERY PLAN " + statements[name], parameters).fetchall()
            assert any("open_jobs" in row[3] for row in plan), plan


def test_facts_of_local_images_are_good_until_the_file_changes(path):
    """The cache key is path, size and modification time, for any file name."""
    file = opened(path)
    key = FileKey("/images/\udcff é.jpg", 10, 123)
    file.put_many({key: FileFact("abc", 1.5), FileKey("/b", 1, 1): FileFact("b", 0.5)})
    assert file.get_many([key, FileKey("/images/\udcff é.jpg", 11, 123), FileKey("/c", 1, 1)]) == {
        key: FileFact("abc", 1.5)
    }
    file.put_many({key._replace(mtime_ns=124): FileFact("def", 1.0)})
    assert file.get_many([key]) == {}
    file.close()


def test_notes_are_kept(path):
    """A note is one value per name; the last one wins."""
    file = opened(path)
    file.note("fingerprint", "a")
    file.note("fingerprint", "b")
    assert (file.noted("fingerprint"), file.noted("other")) == ("b", None)
    file.close()


def test_entry_ids_are_small(path):
    """Ids of millions of jobs are eight bytes each."""
    file = opened(path)
    file.commit([[intended(n) for n in range(10)]])
    ids = file.entry_ids({State.INTENDED})
    assert isinstance(ids, array)
    assert (ids.itemsize, len(ids)) == (8, 10)
    file.close()


# --- what it refuses --------------------------------------------------------------------------------------


def both_openings(path):
    return [lambda: opened(path), lambda: JournalDatabase.open_read_only(path)]


def test_newer_journal_is_refused(path):
    """A journal of a newer version is unchanged, and the message says to upgrade."""
    opened(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    for opening in both_openings(path):
        with pytest.raises(
            RunDirectoryError,
            match=rf"newer restyle \(journal version {SCHEMA_VERSION + 1}, supported: {SCHEMA_VERSION}\); upgrade",
        ):
            opening()


def test_foreign_database_is_refused_and_untouched(path):
    """Another program's SQLite file is never written to."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (a)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    for opening in both_openings(path):
        with pytest.raises(RunDirectoryError, match="not a restyle journal"):
            opening()
    assert path.read_bytes() == before


def test_file_that_is_no_database_is_refused(path):
    """A text file is not written to either."""
    path.write_text("hello, this is certainly no database\n" * 100)
    for opening in both_openings(path):
        with pytest.raises(RunDirectoryError, match="not a restyle journal"):
            opening()


def test_missing_journal_cannot_be_read(path):
    """Reading does not create a file."""
    with pytest.raises(RunDirectoryError, match="there is no journal at"):
        JournalDatabase.open_read_only(path)
    assert not path.exists()


def test_journal_that_was_never_begun_is_made_or_refused(path):
    """A crash before the schema was committed leaves an empty file: a run creates the schema, a reader says so."""
    path.touch()
    with pytest.raises(RunDirectoryError, match="is empty"):
        JournalDatabase.open_read_only(path)
    opened(path).close()
    JournalDatabase.open_read_only(path).close()


def test_missing_folder_is_a_sentence(tmp_path):
    """The folder must exist."""
    with pytest.raises(StorageError, match="check the folder"):
        opened(tmp_path / "no" / "journal.db")


def test_reader_cannot_write(path):
    """A journal opened for reading cannot be written."""
    opened(path).close()
    reader = JournalDatabase.open_read_only(path)
    with pytest.raises(StorageError, match="read-only"):
        reader.note("a", "b")
    reader.close()


def test_reader_sees_what_a_writer_commits(path):
    """Status and plan work while a run writes."""
    writer = opened(path)
    reader = JournalDatabase.open_read_only(path)
    writer.commit([[intended()]])
    assert reader.counts().by_state == {State.INTENDED: 1}
    reader.close()
    writer.close()


_WITHOUT_PRIVILEGES = """
    import os, sys, tempfile
    from pathlib import Path
    from batch.errors import RestyleError
    from batch.journal.database import JournalDatabase

    with tempfile.TemporaryDirectory() as folder:  # loads what is loaded late
        JournalDatabase.open(Path(folder, "journal.db"), now=1.0, version="").close()
    if os.getuid() == 0:
        os.setuid(65534)  # permissions do not bind root
    path = Path(sys.argv[1])
    for opening in (JournalDatabase.open_read_only, lambda path: JournalDatabase.open(path, now=1.0, version="")):
        try:
            journal = opening(path)
            print(dict(journal.counts().by_state))
            journal.close()
        except RestyleError as error:
            print(f"{type(error).__name__}: {error}")
"""


def openings_without_privileges(path):
    """Open for reading and for writing with restricted permissions; return the output lines."""
    command = [sys.executable, "-c", textwrap.dedent(_WITHOUT_PRIVILEGES), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_folder_that_may_not_be_entered_is_a_sentence():
    """The message names the permissions, not a missing journal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o000)
        told = openings_without_privileges(folder / "journal.db")
        folder.chmod(0o700)
    assert len(told) == 2
    assert all(line.startswith("StorageError") and "permissions" in line for line in told)


def test_read_only_folder_can_be_read_and_is_refused_for_writing():
    """An archived run is readable; a run in it ends with an error message."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = opened(folder / "journal.db")
        file.commit([[intended()]])
        file.close()
        (folder / "journal.db").chmod(0o444)
        folder.chmod(0o555)
        told = openings_without_privileges(folder / "journal.db")
        folder.chmod(0o700)
    assert told[0] == "{<State.INTENDED: 'intended'>: 1}"
    assert told[1].startswith("StorageError")
    assert "permissions" in told[1]


# --- what it survives -------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_full_disk_is_told_to_every_caller_and_leaves_nothing(path):
    """A full disk writes nothing of a group; with free space the journal works again."""
    async with open_journal(path, clock=lambda: 1.0) as journal:
        await journal.record(intended(0))
        connection = journal.file._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        told = []

        async def record(number):
            try:
                await journal.record(Intended(JobKey(f"{number:032x}"), 1.0, 1, b"x" * 4000))
            except StorageError as error:
                told.append(str(error))

        async with anyio.create_task_group() as tasks:
            for number in range(1, 21):
                tasks.start_soon(record, number)
        assert len(told) == 20
        assert all("the disk is full; free some space, then run the same command again" in text for text in told)
        assert (await journal.counts()).by_state == {State.INTENDED: 1}
        connection.execute("PRAGMA max_page_count = 100000")
        await journal.record(intended(1))
        assert (await journal.counts()).by_state == {State.INTENDED: 2}


@pytest.mark.anyio
async def test_other_writer_is_a_sentence(path):
    """A second writer gets neither a hang nor a stack trace."""
    async with open_journal(path, clock=lambda: 1.0, busy_seconds=0.01) as journal:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another process is writing"):
            await journal.record(intended())
        other.execute("ROLLBACK")
        other.close()
        await journal.record(intended())


@pytest.mark.anyio
async def test_damaged_file_is_a_sentence(path):
    """A corrupt page is reported as damage."""
    file = opened(path)
    file.commit([[intended(n) for n in range(200)]])
    file.close()
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xff" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    with pytest.raises(RestyleError, match="damaged"):
        async with open_journal(path, clock=lambda: 1.0) as journal:
            await journal.counts()


@pytest.mark.anyio
async def test_closing_flushes_what_is_pending(path):
    """Events recorded before closing are on disk after it, also when the run is cancelled."""
    with anyio.CancelScope() as scope:
        async with open_journal(path, clock=lambda: 5.0) as journal, anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(journal.record, intended(number))
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    reader = JournalDatabase.open_read_only(path)
    assert reader.counts().by_state == {State.INTENDED: 50}
    assert reader.sessions()[0].ended_at == 5.0
    reader.close()


@pytest.mark.anyio
async def test_what_comes_at_once_is_written_in_parts_and_in_order(path):
    """The first of many thousand calls are durable long before the last, and the events of a job keep their order."""
    settled = []

    async def recorded(number):
        await journal.record(intended(number))
        settled.append((number, journal.statistics().commits))
        await journal.record(Accepted(intended(number).job_key, 2.0, Ticket(RequestId(str(number)))))

    slow = 60.0  # a busy machine must not count as a slow disk
    async with (
        open_journal(path, clock=lambda: 5.0, slow_seconds=slow) as journal,
        anyio.create_task_group() as tasks,
    ):
        for number in range(2000):
            tasks.start_soon(recorded, number)
    assert journal.statistics().largest_group <= 512
    assert [number for number, _ in settled[:512]] == list(range(512))
    assert settled[511][1] == 1
    reader = JournalDatabase.open_read_only(path)
    assert reader.counts().by_state == {State.ACCEPTED: 2000}
    reader.close()


@pytest.mark.anyio
async def test_errors_of_the_block_pass_as_they_are(path):
    """Exceptions are not wrapped in an exception group."""
    with pytest.raises(ZeroDivisionError):
        async with open_journal(path, clock=lambda: 1.0):
            raise ZeroDivisionError


@pytest.mark.anyio
async def test_closed_journal_takes_nothing(path):
    """A call after closing is a bug and raises."""
    async with open_journal(path, clock=lambda: 1.0) as journal:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await journal.record(intended())


@pytest.mark.anyio
async def test_stuck_disk_does_not_hold_the_end_for_ever(path):
    """Closing has a timeout; callers that still wait get an error."""
    disk, ended = threading.Event(), threading.Event()
    told = []

    async def record(journal, number):
        try:
            await journal.record(intended(number))
        except StorageError as error:
            told.append(str(error))

    def commit(calls):
        disk.wait()
        refusals = real(calls)
        ended.set()
        return refusals

    async with (
        anyio.create_task_group() as tasks,
        open_journal(path, clock=lambda: 1.0, settle_seconds=0.05) as journal,
    ):
        real, journal.file.commit = journal.file.commit, commit
        tasks.start_soon(record, journal, 1)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(record, journal, 2)
        await anyio.wait_all_tasks_blocked()
    assert len(told) == 2
    assert all("did not write" in text for text in told)
    disk.set()
    assert ended.wait(10.0)
    await anyio.to_thread.run_sync(journal.file.close)


@pytest.mark.anyio
async def test_what_nobody_waits_for_is_settled_all_the_same(path):
    """The callers were cancelled; `settled` waits until their events are on disk."""
    async with open_journal(path, clock=lambda: 1.0) as journal:
        await journal.settled()  # with nothing recorded
        real, slow = journal.file.commit, 0.05
        journal.file.commit = lambda calls: (time.sleep(slow), real(calls))[1]
        async with anyio.create_task_group() as tasks:
            for number in range(1200):
                tasks.start_soon(journal.record, intended(number))
            await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        await journal.settled()
        assert (await journal.counts()).by_state == {State.INTENDED: 1200}


@pytest.mark.anyio
async def test_what_the_disk_refused_is_not_settled(path):
    """Neither are events that miss the timeout."""
    async with open_journal(path, clock=lambda: 1.0, settle_seconds=0.5) as journal:
        disk, real = threading.Event(), journal.file.commit
        journal.file.commit = lambda calls: (disk.wait(), real(calls))[1]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(journal.record, intended(1))
            await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
        with pytest.raises(StorageError, match="did not write"):
            await journal.settled()
        disk.set()
        await journal.settled()

        def refuse(calls):
            raise StorageError("the disk is full")

        journal.file.commit = refuse
        with pytest.raises(StorageError):
            await journal.record(intended(2))
        with pytest.raises(StorageError, match="full"):
            await journal.settled()


@pytest.mark.anyio
async def test_a_slow_disk_gets_all_there_is_in_one_transaction(path):
    """Otherwise the last of ten thousand calls would wait for twenty transactions."""
    async with open_journal(path, clock=lambda: 1.0) as journal:
        sizes, real = [], journal.file.commit
        journal.file.commit = lambda calls: (sizes.append(len(calls)), time.sleep(0.25), real(calls))[2]
        async with anyio.create_task_group() as tasks:
            for number in range(3000):
                tasks.start_soon(journal.record, intended(number))
    assert sizes == [512, 3000 - 512]


_WRITER = """
    import anyio, sys
    from pathlib import Path
    from batch.types import Answer, JobKey, RequestId, Ticket
    from batch.journal.writer import open_journal
    from batch.journal.events import Accepted, Answered, Intended

    async def main():
        async with open_journal(Path(sys.argv[1])) as journal:
            async def job(start):
                for number in range(start, 10**9, 32):
                    key = JobKey(f"{number:032x}")
                    for step, event in enumerate([
                        Intended(key, 1.0, 1, b"{}", 0.03),
                        Accepted(key, 2.0, Ticket(RequestId(key))),
                        Answered(key, 3.0, Answer({"seed": number}), 0.01),
                    ]):
                        await journal.record(event)
                        sys.stdout.write(f"{key} {step}\\n")
                        sys.stdout.flush()
            async with anyio.create_task_group() as tasks:
                for start in range(32):
                    tasks.start_soon(job, start)
    anyio.run(main)
"""


def test_kill_loses_nothing_that_was_recorded(path):
    """After kill -9 while recording, every event for which record() returned is on disk."""
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(path)], stdout=subprocess.PIPE, text=True
    )
    told = [writer.stdout.readline() for _ in range(3000)]
    writer.send_signal(signal.SIGKILL)
    told += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    if not told[-1].endswith("\n"):
        told.pop()
    reached = {}
    for line in told:
        key, step = line.split()
        reached[JobKey(key)] = int(step)
    assert len(reached) > 500

    file = opened(path)
    order = [State.INTENDED, State.ACCEPTED, State.ANSWERED]
    known = file.find(list(reached))
    assert all(order.index(known[key].state) >= step for key, step in reached.items())
    counts = file.counts()
    answered = counts.by_state[State.ANSWERED]
    assert counts.spent_usd == pytest.approx(0.01 * answered)
    assert counts.reserved_usd == pytest.approx(0.03 * (sum(counts.by_state.values()) - answered))
    outcomes = file.outcomes(list(reached))
    assert all(o.output is not None for o in outcomes.values() if o.state is State.ANSWERED)
    file.close()
    assert ask(path, "PRAGMA integrity_check") == [("ok",)]


def test_outcomes_in_turn_are_the_outcomes(tmp_path):
    """Keys in the journal's order, in another order, repeated or unknown give the same rows as single look-ups."""
    file = opened(tmp_path / "journal.db")
    keys = [JobKey(f"{number:032x}") for number in range(300)]
    file.commit([(Intended(key, float(number), 1, b"{}"),) for number, key in enumerate(keys)])
    known = file.outcomes(keys)
    strangers = [JobKey(f"{number:032x}") for number in range(1000, 1050)]
    shuffled = Random(1).sample(keys, len(keys))
    for asked in (keys, keys[::-1], shuffled, [*keys[:100], *strangers, *keys[50:]], keys[:10] * 3):
        read = file.outcomes_in_turn()
        for start in range(0, len(asked), 40):
            part = asked[start : start + 40]
            assert read(part) == {key: known[key] for key in part if key in known}
    file.close()


def test_a_journal_made_before_start_timeouts_is_taken_over(path):
    """Its open submits have no start timeout; later intents have one."""
    file = opened(path)
    file.commit([[Intended(JobKey("a" * 32), 1.0, 1, b"{}"), Lost(JobKey("a" * 32), 2.0, "reset")]])
    file.close()
    ask(path, "DROP TABLE start_timeouts", "PRAGMA user_version = 1")
    file = opened(path)
    file.commit([[Intended(JobKey("b" * 32), 3.0, 1, b"{}", start_timeout=60.0), Lost(JobKey("b" * 32), 4.0, "reset")]])
    entries = file.read_entries(file.entry_ids({State.UNKNOWN}), {State.UNKNOWN})
    assert [entry.start_timeout for entry in entries] == [None, 60.0]


def test_start_timeouts_are_kept_until_a_job_has_ended(path):
    """The table holds open jobs only, for a run of any size."""
    file, key = opened(path), JobKey("a" * 32)
    file.commit([[Intended(key, 1.0, 1, b"{}", start_timeout=60.0)]])
    assert ask(path, "SELECT count(*) FROM start_timeouts") == [(1,)]
    file.commit([[Accepted(key, 2.0, Ticket(RequestId("r"))), FailedForGood(key, 3.0, Failed("x", "y"))]])
    assert ask(path, "SELECT count(*) FROM start_timeouts") == [(0,)]
