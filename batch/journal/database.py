"""The journal's SQLite file: opening, one transaction for a group of events, and reading. Synchronous.

Owns the schema (`database.sql`), durability (WAL, synchronous=FULL: committed data survives a power cut) and the
translation of SQLite's errors. `transitions` decides what events mean; `writer` is the async interface. An edge:
imported by the composition root only.
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
from batch.system.sql import cannot_open, in_open_database, load_statements
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
"""`RSTY`, in the file header: a database of another program is refused and never written to."""
SCHEMA_VERSION = 2
BUSY_SECONDS = 10.0
_CACHE_KIB = 16_000
_WAL_LIMIT_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 32
"""Rows per statement; 17 values each stay below SQLite's oldest limit of 999 parameters."""
_READ_AHEAD = 16_384
"""Maximum number of outcomes read ahead."""
_SQL = load_statements(__file__)
_STATES = {str(state): state for state in State}
_INDEXED = OPEN | {State.COLLECTABLE}
_UNDER_WAY = frozenset({State.INTENDED, State.ACCEPTED, State.ANSWERED})


class Session(NamedTuple):
    """One opening of the journal for writing; usually one `restyle run`."""

    number: int
    started_at: float
    ended_at: float | None
    """None while the session runs, and forever after a kill."""
    version: str
    spent_usd: float
    finished: int
    """Jobs that finished in this session."""
    last_finished_at: float | None


@dataclass(frozen=True, slots=True)
class FinishedJobs:
    """The number of finished jobs and the time of the last finish, 0.0 without one."""

    count: int
    last_at: float


class AuditedJob(NamedTuple):
    """One job as an audit reads it."""

    id: int
    """Ascending in the order of first mention."""
    key: JobKey
    state: State
    request_id: RequestId | None
    reserved_usd: float
    cost_usd: float | None
    promised: int | None
    """Number of images in the stored answer; None without a stored answer."""
    images: tuple[StoredImage, ...] | None
    """Images recorded when the job finished; None if it has not finished."""


class AuditedRequest(NamedTuple):
    """The answer or failure of one request of any attempt."""

    id: int
    job_key: JobKey
    request_id: RequestId | None
    at: float
    failed: bool
    billable_units: float | None
    cost_usd: float | None


class JournalDatabase:
    """One open journal; also the planner's `FileFacts`.

    All methods may be called from any thread: threads share the connection, and a lock keeps the reads and writes of
    one thread out of the transaction of another. All methods raise `StorageError` if the disk or another process
    refuses.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, session: int) -> None:
        """Wrap an open connection; use `open` or `open_read_only` instead."""
        self._connection, self._path = connection, path
        self._lock = threading.RLock()
        self.session = session
        _, self._last_job, self._last_outcome = self._one("last_ids")
        self._under_way: dict[str, JobRow] = {}
        """Rows as on disk, for jobs that will soon change again. This process is the only writer."""

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
        """Open for writing, create a missing file, and begin a session of this tool version.

        Raises:
            RunDirectoryError: not a restyle journal, or written by a newer restyle; with `lost`, also if the file is
                missing or empty, with `lost` as the message.
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
        """Open for reading, also while a run writes. `session` is the number of the last session.

        Raises:
            RunDirectoryError: the journal is missing, not a restyle journal, or written by a newer restyle.
            StorageError: the disk refused.
        """
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunDirectoryError(
                f"there is no journal at {path}; name the run directory that was given to `restyle run -o`"
            ) from error
        except OSError as error:
            raise StorageError(f"the journal {path} is unreadable ({error.strerror}); check permissions") from error
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
        """Close the file. With `now`, record the end of the session if the disk allows it."""
        with self._lock:
            try:
                if now is not None:
                    with suppress(StorageError), self.atomic():
                        self._execute("end_session", {"at": now, "session": self.session})
            finally:
                self._connection.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Run the block as one transaction: commit it or roll it back. Every write goes through here."""
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
        """Write a group of calls in one transaction; durable on return.

        Returns:
            One item per call: None if it was written, or the `IllegalTransition` or `RequestIdTaken` that rejected it.
            A rejected call does not affect the others.
        """
        ids = [event.ticket.request_id for event in chain.from_iterable(calls) if isinstance(event, Accepted)]
        keys = {event.job_key for event in chain.from_iterable(calls) if not isinstance(event, Uploaded)}
        with self.atomic():
            # The rows change while events are applied. If the transaction fails, the next one reads them from disk.
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
        """Cache the facts of local images, so that the next plan need not read the files."""
        rows = [(os.fsencode(k.path), k.size_bytes, k.mtime_ns, f.sha256, f.megapixels) for k, f in facts.items()]
        with self.atomic():
            self._put("put_files", rows)

    def note(self, name: str, value: str) -> None:
        """Store one fact about the whole run."""
        with self.atomic():
            self._execute("put_meta", [name, value])

    # --- reading ----------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Return the jobs of the given keys that are in the journal."""
        rows = self._all("find_jobs", [_json(keys)])
        return {key: KnownJob(_STATES[state], *rest) for key, state, *rest in rows}

    def entry_ids(self, states: Collection[State]) -> array[int]:
        """Return the row ids of the jobs in these states, oldest intent first. Eight bytes per job."""
        statement = "open_ids" if _INDEXED.issuperset(states) else "all_ids"
        return array("q", [row_id for (row_id,) in self._all(statement, [_json(states)])])

    def read_entries(self, ids: Sequence[int], states: Collection[State]) -> list[OpenJob]:
        """Return the jobs with these ids that are in one of the states, in the order of the ids."""
        rows = self._all("read_entries", {"ids": _json(ids), "states": _json(states)})
        return [_entry(row) for row in rows]

    def uploaded(self, sha256: str, since: float) -> str | None:
        """Return the URL of an image uploaded at or after `since`, or None."""
        rows = self._all("find_upload", [sha256, since])
        return rows[0][0] if rows else None

    def requests(self, ids: Sequence[str]) -> set[str]:
        """Return the request ids that belong to a job or to one of its ended attempts. Scans both tables."""
        wanted = _json(ids)
        return {request_id for (request_id,) in self._all("find_requests", [wanted, wanted])} if ids else set()

    def counts(self) -> Counts:
        """Return totals over all sessions. Scans the narrow table once: about 0.2 s for a million jobs."""
        with self._lock:
            by_state = {_STATES[state]: count for state, count in self._all("count_states")}
            (spent,) = self._one("sum_spent")
            reserved, oldest = self._one("sum_open")
        return Counts(by_state, spent, reserved, oldest)

    def sessions(self) -> list[Session]:
        """Return all sessions, oldest first."""
        return [Session(*row) for row in self._all("read_sessions")]

    def finished_since(self, at: float) -> FinishedJobs:
        """Count the jobs finished in sessions that started at or after `at`. Reads the sessions only."""
        count, last_at = self._one("finished_since", [at])
        return FinishedJobs(count, last_at or 0.0)

    def outcomes(self, keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
        """Return the results columns of the given keys that are in the journal; a few thousand keys per call."""
        return self._outcomes(keys, after=0, upto=0)

    def outcomes_in_turn(self) -> Callable[[Sequence[JobKey]], dict[JobKey, JobOutcome]]:
        """Return a variant of `outcomes` for reading all jobs in about the order of first mention, as an export does.

        It reads rows in table order, which takes half the time, and looks up only the rows that are out of order. It
        keeps a few thousand rows at most.
        """
        ahead: dict[JobKey, JobOutcome] = {}
        read = 0

        def next_of(keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
            nonlocal read
            if len(ahead) < _READ_AHEAD:  # a full buffer means another order
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
        """Return the next jobs after that row id, at most `count`."""
        return [_kept(row) for row in self._all("jobs_after", [row_id, count])]

    def jobs_of(self, keys: Sequence[JobKey]) -> dict[JobKey, AuditedJob]:
        """Return the jobs of the given keys that are in the journal; a few thousand keys per call."""
        return {row[1]: _kept(row) for row in self._all("jobs_of", [_json(keys)])}

    def ended_after(self, row_id: int, count: int) -> list[AuditedRequest]:
        """Return the next answers and failures after that row id, including those of earlier attempts."""
        rows = self._all("ended_after", [row_id, count])
        return [
            AuditedRequest(one, key, request, at, bool(failed), *paid) for one, key, request, at, failed, *paid in rows
        ]

    def get_many(self, keys: Sequence[FileKey]) -> dict[FileKey, FileFact]:
        """Return the facts of the local images that were read before and have not changed since."""
        found: dict[FileKey, FileFact] = {}
        with self._lock:
            for key in keys:
                rows = self._all("find_file", [os.fsencode(key.path), key.size_bytes, key.mtime_ns])
                if rows:
                    found[key] = FileFact(*rows[0])
        return found

    def noted(self, name: str) -> str | None:
        """Return a fact about the whole run, or None."""
        rows = self._all("get_meta", [name])
        return rows[0][0] if rows else None

    def _put(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write many rows with few statements.

        Python releases the GIL for each row that SQLite inserts and waits up to 5 ms for the busy event loop to give it
        back: 400 single inserts took 50 ms.
        """
        start = 0
        while start < len(rows):
            # Powers of two: few statements to compile.
            count = min(_ROWS_AT_ONCE, 1 << (len(rows) - start).bit_length() - 1)
            taken = rows[start : start + count]
            self._patiently(_statement_for(statement, count), list(chain.from_iterable(taken)))
            start += count

    # --- the statements ---------------------------------------------------------------------------------------

    def _execute(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> sqlite3.Cursor:
        return self._patiently(_SQL[statement], parameters)

    def _patiently(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, parameters)
        except sqlite3.Error as error:
            if not cannot_open(error):
                raise
        return in_open_database(partial(self._connection.execute, statement, parameters))

    def _all(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _translated(self._path):
            return self._execute(statement, parameters).fetchall()

    def _one(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> tuple[Any, ...]:
        (row,) = self._all(statement, parameters)
        return row


@cache
def _statement_for(name: str, rows: int) -> str:
    """Return the single-row statement extended to `rows` rows of values."""
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


# --- SQLite specifics -------------------------------------------------------------------------------------


def _connect(path: Path, mode: str, busy_seconds: float = BUSY_SECONDS) -> sqlite3.Connection:
    location = path.absolute().as_uri()
    try:
        connection = _try_connect(f"{location}?mode={mode}", busy_seconds)
    except sqlite3.OperationalError as error:
        # A closed journal in a read-only folder: SQLite cannot create its -wal and -shm files there.
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
        connection.execute("SELECT count(*) FROM sqlite_schema")  # the first statement that reads the file
    except BaseException:
        connection.close()
        raise
    return connection


def _is_fresh(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    return bool(tables == 0)


_NOT_BEGUN = "the journal {path} is empty: its run stopped before it started (run it again), or its {wal} is lost"


def _check_ours(connection: sqlite3.Connection, path: Path, *, empty: str | None) -> None:
    """Raise `RunDirectoryError` for a foreign or newer journal; for an empty one only if `empty` gives the message."""
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
            f"{path} was written by a newer restyle "
            f"(journal version {version}, supported: {SCHEMA_VERSION}); upgrade restyle"
        )


def _create(connection: sqlite3.Connection) -> None:
    for statement in _SQL.begin_with("create_"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Upgrade a journal of an earlier version inside the caller's transaction."""
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
    """Translate SQLite's errors to `StorageError`. Errors about our statements are bugs and pass unchanged."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _storage_error(path, error) from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise _storage_error(path, error) from error


_ADVICE = {
    "SQLITE_FULL": "the disk is full; free some space, then run the same command again",
    "SQLITE_IOERR": "I/O error; check the health and free space of the disk, then run the same command again",
    "SQLITE_READONLY": "it is read-only; check the permissions of the folder",
    "SQLITE_CANTOPEN": "it cannot be opened; check the folder, its permissions and the open-file limit",
    "SQLITE_BUSY": "another process is writing to it; wait until that process ends",
    "SQLITE_CORRUPT": "the file is damaged; restore it from a backup, it records what was paid for",
    "SQLITE_NOTADB": "the file is damaged; restore it from a backup, it records what was paid for",
}


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    name = getattr(error, "sqlite_errorname", "")  # missing if Python itself raised it
    advice = next((text for code, text in _ADVICE.items() if name.startswith(code)), "run the same command again")
    return StorageError(f"cannot use the journal {path} ({error}): {advice}. Durable data is safe.")


def _foreign(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is not a restyle journal; name another folder with -o, or move that file away")
