"""The journal's SQLite file: opening, one transaction for a group of events, and reading. Synchronous.

Owns the schema (`database.sql`), durability (WAL, synchronous=FULL: what is committed survives a power cut)
and the translation of SQLite's errors. What events mean is decided in `ledger`; the awaitable skin is
`journal`. An edge: imported by the composition root only.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from batch.errors import RunDirectoryError, StorageError
from batch.fal.answer import images_of
from batch.journal.answers import answer_of, output_of, without_data_uris
from batch.journal.events import Accepted, Event, Uploaded
from batch.journal.records import Counts, JobOutcome, KnownJob, OpenJob
from batch.journal.states import OPEN, State
from batch.journal.transitions import JobRow, JobTransitions, decode_images, slim_body
from batch.manifest.types import FileFact, FileKey
from batch.system.sql import in_open_database, load_statements
from batch.types import JobKey, RequestId, StoredImage, Ticket

__all__ = [
    "APPLICATION_ID",
    "BUSY_SECONDS",
    "SCHEMA_VERSION",
    "AuditedJob",
    "AuditedRequest",
    "FinishedJobs",
    "JournalDatabase",
    "Session",
]

APPLICATION_ID = 0x52535459
"""`RSTY`, in the header of the file: another program's database is refused, not written to."""
SCHEMA_VERSION = 2
BUSY_SECONDS = 10.0
_CACHE_KIB = 16_000
_WAL_LIMIT_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 32
"""Rows of one statement; 17 values each stay under SQLite's oldest limit, 999."""
_READ_AHEAD = 16_384
"""Outcomes that were read before they were asked for."""
_SQL = load_statements(__file__)
_STATES = {str(state): state for state in State}
_INDEXED = OPEN | {State.COLLECTABLE}
_UNDER_WAY = frozenset({State.INTENDED, State.ACCEPTED, State.ANSWERED})


class Session(NamedTuple):
    """One opening for writing, as a rule one `restyle run`."""

    number: int
    started_at: float
    ended_at: float | None
    """None while it runs, and for ever after a kill."""
    version: str
    spent_usd: float
    finished: int
    """Jobs that were done in it."""
    last_finished_at: float | None


@dataclass(frozen=True, slots=True)
class FinishedJobs:
    """How many jobs were done, and when the last one was; 0.0 where none was."""

    count: int
    last_at: float


class AuditedJob(NamedTuple):
    """One job as an audit looks at it."""

    id: int
    """Rises in the order of first mention."""
    key: JobKey
    state: State
    request_id: RequestId | None
    reserved_usd: float
    cost_usd: float | None
    promised: int | None
    """Images in its stored answer; None where no answer is stored."""
    images: tuple[StoredImage, ...] | None
    """Images noted when it was finished; None where it was not."""


class AuditedRequest(NamedTuple):
    """How one request, of whatever attempt, was answered or failed."""

    id: int
    job_key: JobKey
    request_id: RequestId | None
    at: float
    failed: bool
    billable_units: float | None
    cost_usd: float | None


class JournalDatabase:
    """One open journal; also the planner's `FileFacts`.

    All methods may be called from any thread: a lock keeps one thread's reads and writes out of another
    thread's transaction, they share the connection. All of them raise `StorageError` where the disk or
    another process refuses.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, session: int) -> None:
        """Use `open` or `open_read_only`."""
        self._connection, self._path = connection, path
        self._lock = threading.RLock()
        self.session = session
        _, self._last_job, self._last_outcome = self._one("last_ids")
        self._under_way: dict[str, JobRow] = {}
        """Rows as they are on disk, of jobs that will soon be written again: nobody else writes them."""

    def __repr__(self) -> str:
        return f"<JournalDatabase {self._path} session={self.session} jobs={self._last_job}>"

    # --- opening and closing ----------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        now: float,
        version: str,
        lost: str | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> JournalDatabase:
        """Open for writing, create where there is none, and begin a session of this tool version.

        Raises:
            RunDirectoryError: no journal of ours, one of a newer restyle, or none, or an empty one, where `lost` is
                given: that is then its sentence.
            StorageError: the disk refused.
        """
        if lost is not None and not path.exists():
            raise RunDirectoryError(lost)
        connection = _connect(path, "rwc", busy_seconds)
        try:
            with _translated(path):
                _check_ours(connection, path, empty=lost)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
                connection.execute("BEGIN IMMEDIATE")
                if _is_fresh(connection):
                    _create(connection)
                else:
                    _upgrade(connection)
                connection.execute("COMMIT")
            journal = cls(connection, path, 0)
            with journal.atomic():
                (journal.session,) = journal._one("begin_session", {"at": now, "version": version})
        except BaseException:
            connection.close()
            raise
        return journal

    @classmethod
    def open_read_only(cls, path: Path) -> JournalDatabase:
        """Open for reading, also while a run writes. `session` is the number of the last one.

        Raises:
            RunDirectoryError: there is no journal, none of ours, or one of a newer restyle.
            StorageError: the disk refused.
        """
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunDirectoryError(
                f"there is no journal at {path}; is this the folder that `restyle run -o` named?"
            ) from error
        except OSError as error:
            raise StorageError(f"the journal {path} cannot be read ({error.strerror}); check permissions") from error
        connection = _connect(path, "ro")
        try:
            with _translated(path):
                _check_ours(connection, path, empty=_NOT_BEGUN.format(path=path, wal=f"{path.name}-wal"))
            journal = cls(connection, path, 0)
            journal.session, _, _ = journal._one("last_ids")
        except BaseException:
            connection.close()
            raise
        return journal

    def close(self, *, now: float | None = None) -> None:
        """Close the file; with `now` the session is noted as ended, where the disk still takes it."""
        with self._lock:
            try:
                if now is not None:
                    with suppress(StorageError), self.atomic():
                        self._execute("end_session", {"at": now, "session": self.session})
            finally:
                self._connection.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """All or nothing: the only way that anything is written."""
        with self._lock, _translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back on a full disk
                    self._connection.execute("ROLLBACK")
                raise

    # --- writing ----------------------------------------------------------------------------------------------

    def commit(self, calls: Sequence[Sequence[Event]]) -> list[Exception | None]:
        """Write a group of calls in one transaction; durable when it returns.

        Returns:
            For each call None, or the `IllegalTransition` or `RequestIdTaken` that kept it, and it alone, from being
            written.
        """
        ids = [event.ticket.request_id for event in chain.from_iterable(calls) if isinstance(event, Accepted)]
        keys = {event.job_key for event in chain.from_iterable(calls) if not isinstance(event, Uploaded)}
        with self.atomic():
            # They are changed while the group is taken in: should it not come to be written, they are read again.
            rows, self._under_way = self._under_way, {}
            absent = keys - rows.keys()
            loaded = self._all("load_jobs", [_json(absent)]) if absent else []
            ledger = JobTransitions(
                chain(map(JobRow.of, loaded), rows.values()),
                session=self.session,
                last_job=self._last_job,
                last_outcome=self._last_outcome,
                owners=dict(self._all("find_owners", {"ids": _json(ids)})) if ids else {},
            )
            refusals: list[Exception | None] = [ledger.take(call) for call in calls]
            self._write(ledger)
        self._last_job, self._last_outcome = ledger.last_job, ledger.last_outcome
        self._under_way = {key: job for key, job in ledger.jobs.items() if job.state in _UNDER_WAY}
        return refusals

    def _write(self, ledger: JobTransitions) -> None:
        self._put("put_jobs", [job.columns() for job in ledger.touched.values()])
        self._put("put_bodies", ledger.bodies)
        self._put("put_start_timeouts", ledger.start_timeouts)
        self._put("put_outcomes", ledger.outcomes)
        self._put("put_uploads", ledger.uploads)
        if ledger.slimmed:
            self._execute("slim_bodies", [_json(ledger.slimmed)])
            self._execute("drop_start_timeouts", [_json(ledger.slimmed)])
        if ledger.stored_answers:
            self._execute("slim_answers", [_json(ledger.stored_answers)])
        if ledger.spent_usd or ledger.finished:
            totals = {"usd": ledger.spent_usd, "finished": ledger.finished, "last_finished_at": ledger.last_finished_at}
            self._execute("sum_up", {**totals, "session": self.session})

    def put_many(self, facts: Mapping[FileKey, FileFact]) -> None:
        """Remember what reading local images told, so that the next plan need not read them."""
        rows = [(os.fsencode(k.path), k.size_bytes, k.mtime_ns, f.sha256, f.megapixels) for k, f in facts.items()]
        with self.atomic():
            self._put("put_files", rows)

    def note(self, name: str, value: str) -> None:
        """Keep one fact about the run as a whole."""
        with self.atomic():
            self._execute("put_meta", [name, value])

    # --- reading ----------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Those of the keys that the journal knows."""
        rows = self._all("find_jobs", [_json(keys)])
        return {key: KnownJob(_STATES[state], *rest) for key, state, *rest in rows}

    def entry_ids(self, states: Collection[State]) -> array[int]:
        """Row ids of the jobs in these states, the one intended first coming first. Eight bytes a job."""
        statement = "open_ids" if _INDEXED.issuperset(states) else "all_ids"
        return array("q", [row_id for (row_id,) in self._all(statement, [_json(states)])])

    def read_entries(self, ids: Sequence[int], states: Collection[State]) -> list[OpenJob]:
        """The jobs of these ids that are in one of the states, in the order of the ids."""
        rows = self._all("read_entries", {"ids": _json(ids), "states": _json(states)})
        return [_entry(row) for row in rows]

    def uploaded(self, sha256: str, since: float) -> str | None:
        """URL of an image uploaded at or after `since`, or None."""
        rows = self._all("find_upload", [sha256, since])
        return rows[0][0] if rows else None

    def requests(self, ids: Sequence[str]) -> set[str]:
        """Those of the request ids that belong to a job, or to one of its ended attempts. Scans both tables."""
        wanted = _json(ids)
        return {request_id for (request_id,) in self._all("find_requests", [wanted, wanted])} if ids else set()

    def counts(self) -> Counts:
        """Totals over all sessions. Reads the narrow table once: about 0.2 s for a million jobs."""
        with self._lock:
            by_state = {_STATES[state]: count for state, count in self._all("count_states")}
            (spent,) = self._one("sum_spent")
            reserved, oldest = self._one("sum_open")
        return Counts(by_state, spent, reserved, oldest)

    def sessions(self) -> list[Session]:
        """All openings for writing, the first one first."""
        return [Session(*row) for row in self._all("read_sessions")]

    def finished_since(self, at: float) -> FinishedJobs:
        """What was done in the sessions that started at or after `at`. Costs nothing."""
        count, last_at = self._one("finished_since", [at])
        return FinishedJobs(count, last_at or 0.0)

    def outcomes(self, keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
        """What the results table shows of those of the keys that the journal knows; a few thousand at a time."""
        return self._outcomes(keys, after=0, upto=0)

    def outcomes_in_turn(self) -> Callable[[Sequence[JobKey]], dict[JobKey, JobOutcome]]:
        """`outcomes` for who asks for all jobs, in about the order in which the journal met them, as an export does.

        The rows are read as they lie, which takes half as long; those that did not lie next to each other are looked
        up. At most a few thousand are kept for later.
        """
        ahead: dict[JobKey, JobOutcome] = {}
        read = 0

        def next_of(keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
            nonlocal read
            if len(ahead) < _READ_AHEAD:  # else the order is another one
                lying_next = self._outcomes([], after=read, upto=read + len(keys))
                read += len(keys)
                if not ahead and list(lying_next) == list(keys):
                    return lying_next
                ahead.update(lying_next)
            found = {key: ahead.pop(key) for key in set(keys) & ahead.keys()}
            absent = [key for key in keys if key not in found]
            return found | self.outcomes(absent) if absent else found

        return next_of

    def _outcomes(self, keys: Sequence[JobKey], *, after: int, upto: int) -> dict[JobKey, JobOutcome]:
        wanted = {"keys": _json(keys), "after": after, "upto": upto}
        return {row[0]: JobOutcome._make(row) for row in self._all("read_outcomes", wanted)}

    def jobs_after(self, row_id: int, count: int) -> list[AuditedJob]:
        """The next jobs behind that row id, at most `count`: all of them, a page at a time."""
        return [_kept(row) for row in self._all("jobs_after", [row_id, count])]

    def jobs_of(self, keys: Sequence[JobKey]) -> dict[JobKey, AuditedJob]:
        """Those of the keys that the journal knows; a few thousand at a time."""
        return {row[1]: _kept(row) for row in self._all("jobs_of", [_json(keys)])}

    def ended_after(self, row_id: int, count: int) -> list[AuditedRequest]:
        """The next answers and failures behind that row id, those of earlier attempts included."""
        rows = self._all("ended_after", [row_id, count])
        return [
            AuditedRequest(one, key, request, at, bool(failed), *paid) for one, key, request, at, failed, *paid in rows
        ]

    def get_many(self, keys: Sequence[FileKey]) -> dict[FileKey, FileFact]:
        """Those of the local images that were read before and have not changed since."""
        found: dict[FileKey, FileFact] = {}
        with self._lock:
            for key in keys:
                rows = self._all("find_file", [os.fsencode(key.path), key.size_bytes, key.mtime_ns])
                if rows:
                    found[key] = FileFact(*rows[0])
        return found

    def noted(self, name: str) -> str | None:
        """A fact about the run as a whole, or None."""
        rows = self._all("get_meta", [name])
        return rows[0][0] if rows else None

    def _put(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Many rows with few statements.

        Python gives its interpreter away for each row that SQLite takes, and waits up to 5 ms until the busy thread
        of the run lets it have it back: 400 rows one by one took 50 ms.
        """
        start = 0
        while start < len(rows):
            count = min(_ROWS_AT_ONCE, 1 << (len(rows) - start).bit_length() - 1)  # few lengths: each is compiled once
            taken = rows[start : start + count]
            self._patiently(_statement_for(statement, count), list(chain.from_iterable(taken)))
            start += count

    # --- the statements ---------------------------------------------------------------------------------------

    def _execute(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        return self._patiently(_SQL[statement], parameters)

    def _patiently(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> sqlite3.Cursor:
        return in_open_database(partial(self._connection.execute, statement, parameters))

    def _all(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _translated(self._path):
            return self._execute(statement, parameters).fetchall()

    def _one(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> tuple[Any, ...]:
        (row,) = self._all(statement, parameters)
        return row


@cache
def _statement_for(name: str, rows: int) -> str:
    """A statement that takes one row of values, for so many."""
    head, values, tail = re.split(r"VALUES (\([?, ]+\))", _SQL[name])
    return f"{head}VALUES {', '.join([values] * rows)}{tail}"


def _json(values: Iterable[str | int]) -> str:
    return orjson.dumps(list(values)).decode()


# --- from rows to values ----------------------------------------------------------------------------------


def _entry(row: tuple[Any, ...]) -> OpenJob:
    key, state, attempt, intended_at, body, accepted_at, request_id, *urls, reserved, start_timeout = row[:-4]
    ended_at, output, units, engine = row[-4:]
    return OpenJob(
        job_key=key,
        state=_STATES[state],
        attempt=attempt,
        intended_at=intended_at or 0.0,
        body=body or b"",
        accepted_at=accepted_at,
        ticket=None if request_id is None else Ticket(RequestId(request_id), *urls),
        answer=None if output is None else answer_of(output, units, engine),
        reserved_usd=reserved,
        ended_at=ended_at,
        start_timeout=start_timeout,
    )


def _kept(row: tuple[Any, ...]) -> AuditedJob:
    row_id, key, state, request_id, reserved, cost, output, images = row
    return AuditedJob(
        row_id,
        key,
        _STATES[state],
        request_id,
        reserved,
        cost,
        None if output is None else len(images_of(output_of(output))),
        None if images is None else decode_images(images),
    )


# --- SQLite's own ways ------------------------------------------------------------------------------------


def _connect(path: Path, mode: str, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    location = path.absolute().as_uri()
    try:
        connection = _try_connect(f"{location}?mode={mode}", busy_seconds)
    except sqlite3.OperationalError as error:
        # A journal at rest in a folder that may not be written: SQLite cannot make its helper files there.
        if mode != "ro" or path.with_name(path.name + "-wal").exists():
            raise _storage_error(path, error) from error
        with _translated(path):
            connection = _try_connect(f"{location}?mode=ro&immutable=1", busy_seconds)
    except sqlite3.DatabaseError as error:
        raise _foreign(path) from error
    return connection


def _try_connect(uri: str, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=busy_seconds)
    connection.create_function("slim_body", 1, slim_body, deterministic=True)
    connection.create_function("slim_answer", 1, without_data_uris, deterministic=True)
    try:
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute("SELECT count(*) FROM sqlite_schema")  # the first thing that reads the file
    except BaseException:
        connection.close()
        raise
    return connection


def _is_fresh(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return bool(tables == 0)


_NOT_BEGUN = "the journal {path} is empty: its run stopped before it began, start it again; or its {wal} is lost"


def _check_ours(connection: sqlite3.Connection, path: Path, *, empty: str | None) -> None:
    """Raises `RunDirectoryError`; for an empty file with this sentence, or not at all."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == 0 and version == 0 and _is_fresh(connection):
        if empty is None:
            return
        raise RunDirectoryError(empty)
    if application != APPLICATION_ID:
        raise _foreign(path)
    if version > SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{path}: journal was written by a newer restyle "
            f"(version {version}, this one knows {SCHEMA_VERSION}); upgrade"
        )


def _create(connection: sqlite3.Connection) -> None:
    for statement in _SQL.begin_with("create_"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Bring a journal of an earlier version up to date, inside the transaction of the caller."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    for statement in _SQL.begin_with("upgrade_1"):
        connection.execute(statement)
    for name in ("create_start_timeouts", "create_open_jobs", "create_request_ids", "create_failed_request_ids"):
        connection.execute(_SQL[name])
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """The one place where SQLite's errors become ours. Its errors about our statements are defects and pass."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _storage_error(path, error) from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise _storage_error(path, error) from error


_ADVICE = {
    "SQLITE_FULL": "the disk is full; free some space and run the same command again",
    "SQLITE_IOERR": "the disk failed; look at its health and space, then run the same command again",
    "SQLITE_READONLY": "it may not be written; check the permissions of the folder",
    "SQLITE_CANTOPEN": "it cannot be opened; check the folder, its permissions and the limit of open files",
    "SQLITE_BUSY": "another process is writing to it; wait until that has ended",
    "SQLITE_CORRUPT": "the file is damaged; restore it from a copy, it knows what was paid for",
    "SQLITE_NOTADB": "the file is damaged; restore it from a copy, it knows what was paid for",
}


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    name = getattr(error, "sqlite_errorname", "")  # absent where Python itself refused
    advice = next((text for code, text in _ADVICE.items() if name.startswith(code)), "run the same command again")
    return StorageError(f"the journal {path} was refused ({error}): {advice}. What was durable before is still there.")


def _foreign(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is not a journal of restyle; name another folder with -o, or move that file away")
