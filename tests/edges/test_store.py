"""The request database, on a real file."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3

import pytest

from batch.errors import InputError, StorageError
from batch.fal.endpoint import APP_ID
from batch.server.queue import store as store_module
from batch.server.queue.records import CompletedRequest, LogLine, Priority, Submission
from batch.server.queue.store import Store
from batch.system.sql import load_statements
from batch.types import RequestId
from tests.edges.serving import full_disk


def submission(name: str, **changes) -> Submission:
    given = {"request_id": RequestId(name), "app": APP_ID, "accepted_at": 1.0, "body": b"{}", **changes}
    return Submission(**given)


def completed(name: str, **changes) -> CompletedRequest:
    given = {"request_id": RequestId(name), "app": APP_ID, "ended_at": 2.0, "status": 200, "payload": b"{}", **changes}
    return CompletedRequest(**given)


def in_store(path, use, **options):
    """Run `use(store)` with a store on `path`, like one run of a server."""

    async def life():
        async with await Store.open(path, **options) as store:
            return await use(store)

    return asyncio.run(life())


def test_unfinished_requests_are_restored_in_order(tmp_path):
    """Unfinished requests are returned in the order of acceptance."""

    async def first(store):
        await asyncio.gather(*(store.accept(submission(f"r{n}", priority=Priority(n % 2))) for n in range(50)))
        await store.end(completed("r3"))

    async def second(store):
        found = await store.to_do()
        assert [one.request_id for one in found] == [f"r{n}" for n in range(50) if n != 3]
        assert [one.priority for one in found[:2]] == [Priority.NORMAL, Priority.LOW]
        assert store.accepted == 50

    in_store(tmp_path / "server.db", first)
    in_store(tmp_path / "server.db", second)


def test_an_acceptance_is_durable_when_the_call_returns(tmp_path):
    """Another connection to the file sees it, so that a 200 may be sent."""

    async def use(store):
        await store.accept(submission("r1", body=b'{"prompt": "x"}'))
        with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as other:
            assert other.execute("SELECT body FROM request").fetchall() == [(b'{"prompt": "x"}',)]
        assert await store.body(RequestId("r1")) == b'{"prompt": "x"}'

    in_store(tmp_path / "server.db", use)


def test_a_result_is_complete_from_memory_and_from_disk(tmp_path):
    """Every field, including log lines, is the same before and after a restart."""
    full = completed(
        "r1",
        status=422,
        payload=b'{"detail":[]}',
        started_at=1.5,
        inference_time=0.25,
        billable_units=0.7864,
        error_type="internal_error",
        retryable=False,
        inline=True,
        logs=(LogLine(1.5, "INFO", "step 1 of 2"),),
    )

    async def first(store):
        await store.accept(submission("r1"))
        assert (await store.find(RequestId("r1"))).completed is None
        await store.end(full)
        assert store.recent(RequestId("r1")) == full
        return await store.find(RequestId("r1"))

    async def second(store):
        assert store.recent(RequestId("r1")) is None
        return await store.find(RequestId("r1"))

    assert in_store(tmp_path / "server.db", first) == in_store(tmp_path / "server.db", second) == (APP_ID, full, "")


def test_the_first_result_of_a_request_is_final(tmp_path):
    """A published result never changes."""

    async def first(store):
        await store.accept(submission("r1"))
        await store.end(completed("r1", payload=b'"one"'))
        await store.end(completed("r1", payload=b'"two"'))

    async def second(store):
        return (await store.find(RequestId("r1"))).completed.payload

    in_store(tmp_path / "server.db", first)
    assert in_store(tmp_path / "server.db", second) == b'"one"'


def test_an_idempotency_key_is_accepted_once_even_in_one_group(tmp_path):
    """Same key and input: the first id, not counted again. Same key, different input: reported as such."""

    async def use(store):
        same = [submission(f"r{n}", idempotency_key="k", digest=b"a") for n in range(3)]
        answers = await asyncio.gather(*(store.accept(one) for one in same))
        assert answers == [("r0", True, True), ("r0", False, True), ("r0", False, True)]
        other = await store.accept(submission("r9", idempotency_key="k", digest=b"b"))
        assert other == ("r0", False, False)
        assert store.accepted == 1
        assert len(await store.to_do()) == 1

    in_store(tmp_path / "server.db", use)


def test_an_unknown_id_is_not_found(tmp_path):
    """An unknown id gives None, not an error."""

    async def use(store):
        return await store.find(RequestId("unknown"))

    assert in_store(tmp_path / "server.db", use) is None


def test_only_the_latest_results_stay_in_memory(tmp_path):
    """The cache is bounded; older results are read from disk."""

    async def use(store):
        for number in range(5):
            await store.accept(submission(f"r{number}"))
            await store.end(completed(f"r{number}"))
        assert [store.recent(RequestId(f"r{n}")) is not None for n in range(5)] == [False, False, True, True, True]
        assert (await store.find(RequestId("r0"))).completed == completed("r0")

    in_store(tmp_path / "server.db", use, remembered=3)


def test_a_full_disk_rejects_writes_until_there_is_space(tmp_path):
    """A failed group is rolled back completely, and later writes succeed."""

    async def use(store):
        with full_disk(tmp_path / "server.db", "INSERT"), pytest.raises(StorageError, match="full"):
            await store.accept(submission("r1"))
        assert store.accepted == 0
        assert (await store.accept(submission("r1"))).fresh

    in_store(tmp_path / "server.db", use)


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_an_earlier_version_is_upgraded(tmp_path, version):
    """Old rows are unchanged, and new results contain their engine."""
    statements = load_statements(store_module.__file__)
    before = statements["schema"]
    if version < 3:
        before = re.sub(r",([^\n]*)\n    engine TEXT\n", r"\1\n", before)
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        database.executescript(before + statements["schema_2"])
        columns = "request_id, app, accepted_at, body, digest, priority"
        for name in ("r1", "r2"):
            database.execute(f"INSERT INTO request ({columns}) VALUES (?, 'a', 1, x'', x'', 0)", (name,))
        database.execute("UPDATE request SET ended_at = 2, status = 200, payload = x'' WHERE request_id = 'r1'")
        database.execute("CREATE TABLE spent_key (idempotency_key TEXT PRIMARY KEY) STRICT, WITHOUT ROWID")
        database.execute(f"PRAGMA user_version = {version}")
        database.commit()

    async def later(store):
        await store.end(completed("r2", engine="echo"))

    async def still_later(store):
        assert [(await store.find(RequestId(name))).completed.engine for name in ("r1", "r2")] == [None, "echo"]

    in_store(tmp_path / "server.db", later)
    in_store(tmp_path / "server.db", still_later)
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert ("spent_key",) not in tables, "an idempotency key goes with its request since version 4"


def test_a_newer_version_or_another_file_is_rejected(tmp_path):
    """The message contains the path, and the file is unchanged."""
    newer, junk = tmp_path / "newer.db", tmp_path / "junk.db"
    with contextlib.closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA user_version = 99")
    junk.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(InputError, match="99"):
        asyncio.run(Store.open(newer))
    with pytest.raises(InputError, match="junk"):
        asyncio.run(Store.open(junk))
