"""What goes when: with a clock of our own, on real files, and over HTTP where a caller can see it."""

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
    """A store, a storage and a sweeper that know what time it is only from us."""

    def __init__(self, store, storage, seconds, **pace):
        self.now = BEGIN
        self.store = store
        self.storage = storage
        self.sweeper = Cleanup(store, storage, seconds, pause=0.0, **pace)
        self._numbers = itertools.count()

    async def request(self, *, key=None, body=b"{}", source=None, keeping=None, payload=b'{"images":[]}', end=True):
        """A request that is accepted now, and has ended now unless `end` is false."""
        request_id = RequestId(f"{next(self._numbers):036}")
        kept = keeping or RetentionOptions()
        await self.store.accept(
            Submission(request_id, APP_ID, self.now, body, b"digest", key, keeping=kept, source=source)
        )
        if end:
            await self.end(request_id, payload)
        return request_id

    async def end(self, request_id, payload=b'{"images":[]}', kept_for=None, status=200):
        await self.store.end(CompletedRequest(request_id, APP_ID, self.now, status, payload, kept_for=kept_for))

    async def repeat(self, key, digest=b"digest"):
        """Another submission with that key: its id, and what became of it."""
        request_id = RequestId(f"{next(self._numbers):036}")
        return request_id, await self.store.accept(
            Submission(request_id, APP_ID, self.now, b"{}", digest, idempotency_key=key)
        )

    async def sweep(self):
        """One whole round; what went: endings, files with an end of their own, old files."""
        return (
            await self.sweeper.endings(self.now),
            await self.sweeper.short_lives(self.now),
            await self.sweeper.files(self.now),
        )

    async def here(self, path):
        return await self.storage.find(path) is not None


def play(tmp_path, script, seconds=30 * DAY, **pace):
    """Run a script in such a world."""

    async def use():
        world = None
        async with (
            await Store.open(tmp_path / "server.db", seconds) as store,
            Storage(tmp_path, lambda: world.now if world else BEGIN) as storage,
        ):
            world = World(store, storage, seconds, **pace)
            await script(world)

    asyncio.run(use())


def test_an_ending_goes_when_its_time_is_over(tmp_path):
    """By its end, not by its acceptance; what has not ended stays however old it is."""

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


def test_many_endings_go_in_small_steps(tmp_path):
    """No step holds the writer up for long; a round leaves none behind."""

    async def script(world):
        for _ in range(95):
            await world.request()
        world.now += 31 * DAY
        assert await world.store.forget(world.now, 30 * DAY, 10) == 10
        assert (await world.sweep())[0] == 85

    play(tmp_path, script, step=10)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_file_goes_after_the_result_that_shows_it_never_before(tmp_path, data):
    """At every hour around its end: as long as the result is told its image is there."""

    async def script(world):
        path = await world.storage.save(data, "image/png")
        world.now += 60  # the disk refused for a while
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
def test_the_source_of_a_request_stays_as_long_as_the_request(tmp_path, data):
    """An upload that is older than the retention but was used yesterday, or is still waited for."""

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
def test_bytes_that_were_saved_again_are_as_good_as_new(tmp_path, data):
    """Equal bytes are kept once: the younger user's time counts."""

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
def test_a_file_with_an_end_of_its_own_goes_then(tmp_path, data):
    """And shares its bytes with nobody: the same image of somebody else stays."""

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


def test_an_idempotency_key_is_good_for_a_day_while_its_request_can_be_answered(tmp_path):
    """Done, failed or cancelled: the first id within 24 h, then a new request. One that waits is never doubled."""

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
        assert (await world.store.find(firsts["done"])).ending is not None

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
def test_the_key_of_an_answer_that_has_expired_makes_a_new_request(tmp_path, case, swept):
    """Whatever the input, and once only: the new request holds the key from then on. Before that: the first id."""
    keeping, ended, life, seconds = EXPIRIES[case]

    async def script(world):
        first = await world.request(key="k", keeping=RetentionOptions(**keeping), end=False)
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
    """The lifetime of files that were never made frees no key."""

    async def script(world):
        first = await world.request(key="k", keeping=RetentionOptions(file_life=600.0), end=False)
        await world.end(first, status=422)
        world.now += 3600
        assert (await world.repeat("k"))[1] == (first, False, True)

    play(tmp_path, script)


def test_a_storage_of_the_first_version_is_taken_as_of_now(tmp_path):
    """Its small files knew no instants; none goes at once."""
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


def test_a_disk_that_refuses_is_tried_again_in_the_next_round(tmp_path, caplog):
    """The sweeper does not die of it, and says so."""

    async def script(world):
        await world.request()
        world.now += 31 * DAY
        with full_disk(tmp_path / "server.db", "DELETE"):
            task = asyncio.create_task(world.sweeper.run(lambda: world.now))
            while not caplog.records:
                await asyncio.sleep(0.001)
            assert "trying again" in caplog.text
        with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
            while database.execute("SELECT count(*) FROM request").fetchone() != (0,):
                await asyncio.sleep(0.001)
        task.cancel()

    play(tmp_path, script, round_seconds=0.0)


# --- as a caller sees it ----------------------------------------------------------------------------------


def test_a_result_is_not_told_any_more_when_its_time_is_over(tmp_path):
    """404 from the first moment on, swept or not, from memory or from disk."""

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
    """On submit an id that can be read, on the direct call the answer itself: no 500, no id that stays 404."""
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


def test_a_caller_that_waited_is_told_the_end_however_short_the_retention(tmp_path):
    """The direct call and the status stream: the result expires before anybody else could ask for it."""

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
    """By its size, as fal's short store; written down with the ending."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session, prompt, headers={"X-Fal-Store-IO": "0"})
            assert (await result(session, request_id))[0] == 200

    asyncio.run(use())
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        assert database.execute("SELECT brief, kept_for FROM request").fetchall() == [(1, seconds)]


def test_the_lifecycle_header_is_honoured_for_the_images(tmp_path):
    """Also by a server that was started again in between; uploads have it too; nonsense is passed over."""
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


def test_a_data_uri_and_a_file_of_ours_are_known_as_sources(tmp_path):
    """Somebody else's URL is not."""

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
