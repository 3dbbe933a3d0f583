"""Cleanup of results and files: with a controlled clock on real files, and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import sqlite3

import pytest

from batch.fal.endpoint import APP_ID
from batch.server.files.storage import Storage
from batch.server.queue.cleanup import Cleanup
from batch.server.queue.records import CompletedRequest, RetentionOptions, Submission
from batch.server.queue.store import Store
from batch.types import RequestId
from tests.edges.serving import INPUT, SUBMIT, call, completed, full_disk, read, result, serving, submit

DAY = 86400.0
BEGIN = 1_800_000_000.0
LARGE = b"L" * 40_000
SMALL = b"S" * 100


class World:
    """A store, a storage and a cleanup with a controlled clock."""

    def __init__(self, store, storage, seconds, **pace):
        self.now = BEGIN
        self.store = store
        self.storage = storage
        self.sweeper = Cleanup(store, storage, seconds, pause=0.0, **pace)
        self._numbers = itertools.count()

    async def request(self, *, key=None, body=b"{}", source=None, retention=None, payload=b'{"images":[]}', end=True):
        """Add a request that is accepted now and, unless `end` is false, also ends now."""
        request_id = RequestId(f"{next(self._numbers):036}")
        kept = retention or RetentionOptions()
        await self.store.accept(
            Submission(request_id, APP_ID, self.now, body, b"digest", key, retention=kept, source=source)
        )
        if end:
            await self.end(request_id, payload)
        return request_id

    async def end(self, request_id, payload=b'{"images":[]}', kept_for=None, status=200):
        await self.store.end(CompletedRequest(request_id, APP_ID, self.now, status, payload, kept_for=kept_for))

    async def repeat(self, key, digest=b"digest"):
        """Submit again with this idempotency key; return the new id and the result."""
        request_id = RequestId(f"{next(self._numbers):036}")
        return request_id, await self.store.accept(
            Submission(request_id, APP_ID, self.now, b"{}", digest, idempotency_key=key)
        )

    async def sweep(self):
        """Run one round; return the numbers of removed results, expired files and unused files."""
        return (
            await self.sweeper.results(self.now),
            await self.sweeper.expired_files(self.now),
            await self.sweeper.unused_files(self.now),
        )

    async def here(self, path):
        return await self.storage.find(path) is not None


def play(tmp_path, script, seconds=30 * DAY, **pace):
    """Run a script in a `World`."""

    async def use():
        world = None
        async with (
            await Store.open(tmp_path / "server.db", seconds) as store,
            Storage(tmp_path, lambda: world.now if world else BEGIN) as storage,
        ):
            world = World(store, storage, seconds, **pace)
            await script(world)

    asyncio.run(use())


def test_a_result_is_removed_after_its_retention(tmp_path):
    """The retention starts at the end of a request; an unfinished one is never removed."""

    async def script(world):
        old, waiting = await world.request(), await world.request(end=False)
        late = await world.request(end=False)
        world.now += 29 * DAY
        await world.end(late)
        young = await world.request()
        assert (await world.sweep())[0] == 0
        world.now += 2 * DAY
        assert (await world.sweep())[0] == 1
        found = [await world.store.find(one) for one in (old, waiting, late, young)]
        assert [one is not None for one in found[1:]] == [True] * 3
        assert [one.request_id for one in await world.store.to_do()] == [waiting]

    play(tmp_path, script)
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        assert database.execute("SELECT count(*) FROM request").fetchone() == (3,)


def test_many_results_are_removed_in_small_steps(tmp_path):
    """Each step is bounded; a round removes all expired results."""

    async def script(world):
        for _ in range(95):
            await world.request()
        world.now += 31 * DAY
        assert await world.store.forget(world.now, 30 * DAY, 10) == 10
        assert (await world.sweep())[0] == 85

    play(tmp_path, script, step=10)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_file_is_never_removed_before_its_result(tmp_path, data):
    """At every hour around the expiry: as long as the result is available, its image exists."""

    async def script(world):
        path = await world.storage.save(data, "image/png")
        world.now += 60  # writes failed for a while
        ended_at = world.now
        await world.request(payload=json.dumps({"images": [{"url": path}]}).encode())
        gone = []
        world.now += 29.9 * DAY
        while len(gone) < 2:
            world.now += 1800
            await world.sweep()
            told = world.now < ended_at + 30 * DAY
            assert not told or await world.here(path), "a result without its image"
            gone = [what for what, there in (("result", told), ("file", await world.here(path))) if not there]
            assert world.now < BEGIN + 31 * DAY

    play(tmp_path, script)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_source_image_is_kept_as_long_as_its_request(tmp_path, data):
    """An upload older than the retention is kept if a stored or waiting request uses it."""

    async def script(world):
        path = await world.storage.save(data, "image/png")
        other = await world.storage.save(data + b"x", "image/png")
        waiting = await world.request(source=path, end=False)
        world.now += 40 * DAY
        assert (await world.sweep())[2] == 1
        assert (await world.here(path), await world.here(other)) == (True, False)
        await world.end(waiting)
        world.now += 29 * DAY
        await world.sweep()
        assert await world.here(path)
        world.now += 3 * DAY
        await world.sweep()
        await world.sweep()
        assert not await world.here(path)

    play(tmp_path, script)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_saving_bytes_again_renews_their_retention(tmp_path, data):
    """Equal bytes are stored once, with the latest save time."""

    async def script(world):
        path = await world.storage.save(data, "image/png")
        world.now += 20 * DAY
        assert await world.storage.save(data, "image/png") == path
        world.now += 20 * DAY
        assert (await world.sweep())[2] == 0
        assert await world.storage.read(path) == data
        world.now += 11 * DAY
        assert (await world.sweep())[2] == 1
        assert await world.storage.read(path) is None
        assert await world.storage.save(data, "image/png") == path
        assert await world.storage.read(path) == data

    play(tmp_path, script)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_file_with_its_own_expiry_is_removed_then(tmp_path, data):
    """It is not shared: the same bytes saved by another client stay."""

    async def script(world):
        own = await world.storage.save(data, "image/png", 600)
        again = await world.storage.save(data, "image/png", 6000)
        shared = await world.storage.save(data, "image/png")
        assert len({own, again, shared}) == 3
        world.now += 599
        assert (await world.sweep())[1] == 0
        world.now += 2
        assert (await world.sweep())[1] == 1
        assert [await world.here(path) for path in (own, again, shared)] == [False, True, True]

    play(tmp_path, script)


def test_an_idempotency_key_is_valid_for_a_day_while_its_result_is_available(tmp_path):
    """Done, failed or cancelled: the first id for 24 h, then a new request. A waiting one is never duplicated."""

    async def script(world):
        firsts = {"waits": await world.request(key="waits", end=False)}
        for key, status in (("done", 200), ("failed", 422), ("broken", 500), ("cancelled", 499)):
            firsts[key] = await world.request(key=key, end=False)
            await world.end(firsts[key], status=status)
        world.now += DAY - 1
        for key, first in firsts.items():
            assert (await world.repeat(key))[1] == (first, False, True)
            assert (await world.repeat(key, b"another"))[1] == (first, False, False)
        world.now += 2
        for key in firsts.keys() - {"waits"}:
            late, admission = await world.repeat(key, b"another")
            assert admission == (late, True, True), key
        assert (await world.repeat("waits"))[1] == (firsts["waits"], False, True)
        assert (await world.store.find(firsts["done"])).completed is not None

    play(tmp_path, script)


EXPIRIES = {
    "its result has expired": ({}, {}, 3600, 3600),
    "its brief result has expired": ({"brief": True}, {"kept_for": 360.0}, 360, math.inf),
    "its images have expired": ({"file_life": 600.0}, {}, 600, math.inf),
    "it failed, which has expired": ({}, {"status": 422}, 3600, 3600),
    "it was cancelled, which has expired": ({}, {"status": 499}, 3600, 3600),
}


@pytest.mark.parametrize("swept", [False, True], ids=["still on disk", "swept"])
@pytest.mark.parametrize("case", EXPIRIES)
def test_the_key_of_an_expired_result_creates_a_new_request(tmp_path, case, swept):
    """With any input, and only once: the new request then holds the key. Before the expiry: the first id."""
    retention, ended, life, seconds = EXPIRIES[case]

    async def script(world):
        first = await world.request(key="k", retention=RetentionOptions(**retention), end=False)
        await world.end(first, **ended)
        world.now += life - 1
        assert (await world.repeat("k"))[1] == (first, False, True)
        world.now += 2
        if swept:
            await world.sweep()
        second, admission = await world.repeat("k", b"another")
        assert admission == (second, True, True)
        assert (await world.repeat("k", b"another"))[1] == (second, False, True)
        assert [one.request_id for one in await world.store.to_do()] == [second]

    play(tmp_path, script, seconds)


def test_a_failed_request_has_no_images_to_expire(tmp_path):
    """The lifetime of files does not release the key of a request without files."""

    async def script(world):
        first = await world.request(key="k", retention=RetentionOptions(file_life=600.0), end=False)
        await world.end(first, status=422)
        world.now += 3600
        assert (await world.repeat("k"))[1] == (first, False, True)

    play(tmp_path, script)


def test_files_of_a_version_1_storage_count_as_saved_now(tmp_path):
    """Its small files have no save times; none is removed at once."""
    with contextlib.closing(sqlite3.connect(tmp_path / "small.db")) as database:
        schema = "CREATE TABLE small (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, data BLOB NOT NULL) STRICT"
        database.execute(schema)
        path = "/files/ab/" + "ab" * 16 + ".png"
        database.execute("INSERT INTO small (name, data) VALUES (?, ?)", (path, SMALL))
        database.commit()

    async def script(world):
        world.now += 29 * DAY
        assert (await world.sweep())[2] == 0
        assert await world.storage.read(path) == SMALL
        world.now += 2 * DAY
        assert (await world.sweep())[2] == 1

    play(tmp_path, script)


def test_a_failed_round_is_retried_in_the_next_one(tmp_path, caplog):
    """The cleanup logs the failure and goes on."""

    async def script(world):
        await world.request()
        world.now += 31 * DAY
        with full_disk(tmp_path / "server.db", "DELETE"):
            task = asyncio.create_task(world.sweeper.run(lambda: world.now))
            while not caplog.records:
                await asyncio.sleep(0.001)
            assert "retrying" in caplog.text
        with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
            while database.execute("SELECT count(*) FROM request").fetchone() != (0,):
                await asyncio.sleep(0.001)
        task.cancel()

    play(tmp_path, script, round_seconds=0.0)


# --- over HTTP --------------------------------------------------------------------------------------------


def test_an_expired_result_is_not_found(tmp_path):
    """An expired result returns 404, removed or not, cached or not."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session)
            assert (await result(session, request_id))[0] == 200
        async with serving(tmp_path, retention=0.001) as session:
            for tail in ("", "/status"):
                status, _, said = await call(session, "GET", read(request_id, tail))
                assert (status, said) == (404, {"status": "NOT_FOUND"})
            second = await submit(session)
            assert (await call(session, "GET", read(second)))[0] in {400, 404}

    asyncio.run(use())


@pytest.mark.parametrize("kind", ["a cat", "fail", "boom"])
def test_a_repeat_after_the_result_has_expired_is_a_new_request(tmp_path, kind):
    """A submit returns an id that works, a direct call the output; neither returns 500 or an expired id."""
    body, headers = {**INPUT, "prompt": kind}, {"idempotency-key": "k"}
    expected = {"a cat": 200, "fail": 422, "boom": 500}[kind]

    async def gone(session, request_id):
        while (await call(session, "GET", read(request_id)))[0] != 404:
            await asyncio.sleep(0.01)

    async def use():
        async with serving(tmp_path, retention=0.3) as session:
            first = await submit(session, kind, headers=headers)
            await gone(session, first)
            second = await submit(session, kind, headers=headers)
            status, answered, _ = await result(session, second)
            assert (second != first, status) == (True, expected)
            await gone(session, second)
            status, answered, _ = await call(session, "POST", f"/run{SUBMIT}", json=body, headers=headers)
            assert (answered["x-fal-request-id"] not in {first, second}, status) == (True, expected)
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 3

    asyncio.run(use())


def test_a_waiting_client_gets_the_result_with_any_retention(tmp_path):
    """Direct call and status stream return a result that expires immediately."""

    async def use():
        async with serving(tmp_path, retention=1e-9) as session:
            for _ in range(5):
                status, _, output = await call(session, "POST", f"/run{SUBMIT}", json=INPUT)
                assert (status, len(output["images"])) == (200, 1)
            held = await submit(session, "hold")
            async with session.get(read(held, "/status/stream")) as stream:
                assert b"IN_" in await stream.content.readline()
                await call(session, "PUT", read(held, "/cancel"))
                assert b"COMPLETED" in await stream.read()

    asyncio.run(use())


@pytest.mark.parametrize(("prompt", "seconds"), [("a cat", 3600.0), ("a cat " * 2000, 360.0)], ids=["short", "long"])
def test_store_io_0_keeps_a_result_for_an_hour_or_six_minutes(tmp_path, prompt, seconds):
    """The lifetime depends on the size, as on fal, and is stored with the result."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session, prompt, headers={"X-Fal-Store-IO": "0"})
            assert (await result(session, request_id))[0] == 200

    asyncio.run(use())
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        assert database.execute("SELECT brief, kept_for FROM request").fetchall() == [(1, seconds)]


def test_the_lifecycle_header_is_honoured_for_the_images(tmp_path):
    """Also after a restart, and for uploads; invalid values are ignored."""
    wish = {"X-Fal-Object-Lifecycle-Preference": json.dumps({"expiration_duration_seconds": 60})}

    async def use():
        async with serving(tmp_path) as session:
            held = await submit(session, "hold", headers=wish)
            await call(session, "GET", read(held, "/status"))
            _, _, upload = await call(session, "POST", "/files/upload", data=LARGE, headers=wish)
            for header in ("x", "[]", '{"expiration_duration_seconds": null}', '{"expiration_duration_seconds": -1}'):
                await completed(session, await submit(session, headers={"X-Fal-Object-Lifecycle-Preference": header}))
        async with serving(tmp_path) as session:
            engine_waits = asyncio.create_task(result(session, held))
            await call(session, "PUT", read(held, "/cancel"))
            await engine_waits
            status, _, output = await result(session, await submit(session, headers=wish, num_images=2))
            assert status == 200
            return [image["url"] for image in output["images"]] + [upload["access_url"]]

    urls = asyncio.run(use())
    with contextlib.closing(sqlite3.connect(tmp_path / "small.db")) as database:
        names = {row[0] for row in database.execute("SELECT name FROM life")}
    assert names == {"/files/" + url.partition("/files/")[2] for url in urls}
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        lives = database.execute("SELECT file_life FROM request ORDER BY seq").fetchall()
    assert lives == [(60.0,), (None,), (None,), (None,), (None,), (60.0,)]


def test_data_uris_and_own_files_are_recorded_as_sources(tmp_path):
    """A URL on another server is not recorded as a source file."""

    async def use():
        async with serving(tmp_path) as session:
            _, _, upload = await call(session, "POST", "/files/upload", data=LARGE)
            for url in (upload["access_url"], "data:image/png;base64,AAAA", INPUT["image_url"]):
                assert (await call(session, "POST", SUBMIT, json={**INPUT, "image_url": url}))[0] == 200
            return "/files/" + upload["access_url"].partition("/files/")[2]

    path = asyncio.run(use())
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        sources = [row[0] for row in database.execute("SELECT source FROM request ORDER BY seq")]
    assert (sources[0], sources[2]) == (path, None)
    assert sources[1].startswith("/files/")
