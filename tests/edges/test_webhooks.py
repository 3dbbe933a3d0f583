"""Webhooks, delivered to a real receiver on loopback that verifies signatures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.parse

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from batch.errors import InputError, StorageError
from batch.fal.endpoint import APP_ID
from batch.fal.signing import BadSignature, keys_in, verify
from batch.server.egress.http_client import SafeHttpClient
from batch.server.egress.source_images import SourceFetcher
from batch.server.egress.ssrf import AddressRefused, private_too, public_only
from batch.server.files.storage import Storage
from batch.server.queue import webhooks as webhooks_module
from batch.server.queue.records import CompletedRequest, DeliveryOutcome, Submission, Webhook
from batch.server.queue.service import SubmitOptions, queue_service
from batch.server.queue.store import Store
from batch.server.queue.webhooks import (
    BACKOFF_LIMIT_SECONDS,
    BACKOFF_SECONDS,
    PARALLEL,
    PARALLEL_PER_HOST,
    RETRIES,
    DeliveryVerdict,
    Webhooks,
    callback_body,
    next_try,
    sending,
    signing_key,
    verdict_on,
    webhook_of,
)
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, read, result, serving
from tests.edges.test_auth import HEADERS, some_keys
from tests.quick_time import run_at


class Receiver:
    """Receives callbacks. `answers`: statuses in order, the last one repeats; `hold` never responds."""

    def __init__(self, *answers, hold=False):
        self.answers = list(answers) or [200]
        self.calls = []
        self.waiting = 0
        self.go = asyncio.Event()
        if not hold:
            self.go.set()
        self._news = asyncio.Event()

    async def __aenter__(self):
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/hook?secret=1"
        return self

    async def __aexit__(self, *_):
        self.go.set()
        await self._runner.cleanup()

    async def _handle(self, request):
        head = {name.lower(): value for name, value in request.headers.items()}
        self.calls.append((head, await request.read(), request.path_qs))
        self.waiting += 1
        self._news.set()
        await self.go.wait()
        self.waiting -= 1
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers={"location": "/elsewhere"} if 300 <= status < 400 else {})

    async def got(self, count):
        """Wait for `count` calls; return their bodies."""
        async with asyncio.timeout(HANGS):
            while len(self.calls) < count:
                self._news.clear()
                await self._news.wait()
        return [orjson.loads(body) for _, body, _ in self.calls]


def hooked(url):
    return f"{SUBMIT}?{urllib.parse.urlencode({'fal_webhook': url})}"


async def submitted(session, url, prompt="a cat", headers=None, **inputs):
    given = {**INPUT, "prompt": prompt, **inputs}
    status, _, body = await call(session, "POST", hooked(url), json=given, headers=headers)
    assert status == 200, body
    return body["request_id"]


@contextlib.asynccontextmanager
async def sender(data_dir, engine=None, chance=lambda: 0.0, permitted=private_too, clock=time.time, disk_seconds=1.0):
    """Run a queue and its webhooks without HTTP; yield (service, store). Retries are immediate."""
    key = signing_key(data_dir / "webhook-key.pem")
    async with (
        await Store.open(data_dir / "server.db") as store,
        Storage(data_dir) as storage,
        SafeHttpClient(permitted) as guard,
        queue_service(store, storage, engine or ScriptedEngine(), SourceFetcher(storage, guard), clock) as service,
        sending(Webhooks(service, store, guard, key, clock, chance, disk_seconds=disk_seconds)),
    ):
        yield service, store


def options_with(url, **more):
    return SubmitOptions(webhook=Webhook(url, urllib.parse.urlsplit(url).hostname, "http://server"), **more)


async def settled(store, count=0):
    """Wait until `count` callbacks are pending."""
    async with asyncio.timeout(HANGS):
        while store.webhooks != count:
            await asyncio.sleep(0.005)


BODY = orjson.dumps(INPUT)
HANGS = 3000.0
"""Seconds of the loop, whose clock may be a quick one."""


# --- the schedule -----------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0, 4e9))
def test_the_delay_of_retries_is_bounded(tries, chance, now):
    """For any number of attempts and any jitter: not in the past, at most 4 h later, at most 31 retries."""
    at = next_try(tries, now, chance)
    assert (at is None) == (tries > RETRIES)
    if at is not None:
        assert now <= at <= now + BACKOFF_LIMIT_SECONDS


def test_the_maximum_delay_doubles_up_to_its_limit():
    """The maximum delay is 5 s, 10 s, 20 s, ..., 4 h, with full jitter."""
    longest = [next_try(tries, 0.0, 1.0) for tries in range(1, RETRIES + 1)]
    assert longest[:4] == [BACKOFF_SECONDS * 2**n for n in range(4)]
    assert longest == sorted(longest)
    assert longest[-1] == BACKOFF_LIMIT_SECONDS
    assert [next_try(3, 100.0, chance) for chance in (0.0, 0.25)] == [100.0, 105.0]
    assert 24 < sum(longest) / 3600 < 24 * 7


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        *((status, DeliveryVerdict.ACKNOWLEDGED) for status in (200, 201, 202, 204, 299)),
        *((status, DeliveryVerdict.NEVER) for status in (300, 301, 302, 304, 307, 308)),
        *((status, DeliveryVerdict.AGAIN) for status in (400, 401, 404, 410, 422, 429, 500, 503)),
    ],
)
def test_any_2xx_acknowledges_and_a_redirect_is_final(status, verdict):
    """All other statuses are retried."""
    assert verdict_on(status) is verdict


def test_bodies_have_fal_s_format():
    """OK with the output, ERROR with the error's body; for a large result, a hint instead of the payload."""
    ok = CompletedRequest("r1", APP_ID, 0.0, 200, b"")
    common = {"request_id": "r1", "gateway_request_id": "r1"}
    seed = 196619188014358660
    payload = orjson.dumps({"seed": seed})
    assert orjson.loads(callback_body(ok, payload)) == common | {"status": "OK", "payload": {"seed": seed}}
    failed = CompletedRequest("r1", APP_ID, 0.0, 422, b"")
    expected = common | {"status": "ERROR", "error": "Invalid status code: 422", "payload": {"detail": []}}
    assert orjson.loads(callback_body(failed, b'{"detail":[]}')) == expected
    large = orjson.loads(callback_body(ok, orjson.dumps("x" * webhooks_module.PAYLOAD_LIMIT_BYTES)))
    assert (large["status"], large["payload"]) == ("OK", None)
    assert "fetch it" in large["payload_error"]


def test_an_unusable_url_is_rejected_at_once():
    """A host name is resolved only at delivery."""
    assert webhook_of("https://Example.com/a?b", "http://s", public_only) == Webhook(
        "https://Example.com/a?b", "example.com", "http://s"
    )
    for url in ("ftp://example.com", "http://127.0.0.1/", "http://u:p@example.com/", "nonsense"):
        with pytest.raises(AddressRefused):
            webhook_of(url, "http://s", public_only)


# --- the key pair -----------------------------------------------------------------------------------------


def test_the_key_pair_is_created_once_with_mode_0600(tmp_path):
    """The file has mode 0600 and is reused; a file without a valid key is an InputError."""
    path = tmp_path / "webhook-key.pem"
    first = signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert signing_key(path).public_key() == first.public_key()
    for text in ("nonsense", ""):
        path.write_text(text)
        with pytest.raises(InputError, match="Ed25519"):
            signing_key(path)


# --- over HTTP --------------------------------------------------------------------------------------------


def test_a_receiver_gets_a_verifiable_callback(tmp_path):
    """The payload is the result, signed with the published key; tampered copies fail the verification."""

    async def use():
        async with Receiver() as receiver, serving(tmp_path, allow_private=True) as session:
            request_id = await submitted(session, receiver.url, seed=2**60)
            (told,) = await receiver.got(1)
            _, _, output = await call(session, "GET", read(request_id))
            assert told == {
                "request_id": request_id,
                "gateway_request_id": request_id,
                "status": "OK",
                "payload": output,
            }
            assert output["images"][0]["url"].startswith(str(session._base_url))
            async with session.get("/.well-known/jwks.json") as response:
                keys = keys_in(orjson.loads(await response.read()))
            headers, body, path = receiver.calls[0]
            assert (path, headers["content-type"]) == ("/hook?secret=1", "application/json")
            now = int(headers["x-fal-webhook-timestamp"])
            assert verify(headers, body, keys, now=now) == request_id
            for changed in (headers | {"x-fal-webhook-timestamp": str(now + 1)}, headers):
                with pytest.raises(BadSignature):
                    verify(changed, body.replace(b"OK", b"KO"), keys, now=now)
            with pytest.raises(BadSignature, match="off"):
                verify(headers, body, keys, now=now + 301)

    asyncio.run(use())


def test_failures_and_cancellations_are_delivered_too(tmp_path):
    """`ERROR` with the body of the result URL."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with Receiver() as receiver, serving(tmp_path, engine, allow_private=True) as session:
            held = await submitted(session, receiver.url, "hold")
            waiting = await submitted(session, receiver.url)
            await call(session, "PUT", read(waiting, "/cancel"))
            engine.go.set()
            failed = await submitted(session, receiver.url, "fail")
            found = {told["request_id"]: told for told in await receiver.got(3)}
            assert {name: found[name]["status"] for name in (held, waiting, failed)} == {
                held: "OK",
                waiting: "ERROR",
                failed: "ERROR",
            }
            assert found[waiting]["payload"]["error_type"] == "client_cancelled"
            assert found[waiting]["error"] == "Invalid status code: 499"
            assert found[failed]["payload"] == (await result(session, failed))[2]

    asyncio.run(use())


def test_sync_mode_delivers_data_uris(tmp_path):
    """The payload contains the same data URIs as the result."""

    async def use():
        async with Receiver() as receiver, serving(tmp_path, allow_private=True) as session:
            await submitted(session, receiver.url, sync_mode=True)
            (told,) = await receiver.got(1)
            assert told["payload"]["images"][0]["url"].startswith("data:image/png;base64,")

    asyncio.run(use())


def test_the_user_of_a_callback_is_the_owner_of_the_request(tmp_path):
    """`X-Fal-Webhook-User-Id`: the key's name; `local` on a server without keys."""

    async def use():
        for name, options in (("alice", {"keys": some_keys()}), ("local", {})):
            async with Receiver() as receiver, serving(tmp_path / name, allow_private=True, **options) as session:
                await submitted(session, receiver.url, headers=HEADERS["alice"])
                await receiver.got(1)
                assert receiver.calls[0][0]["x-fal-webhook-user-id"] == name

    asyncio.run(use())


@pytest.mark.parametrize("url", ["ftp://example.com/", "http://127.0.0.1:9999/", "http://169.254.169.254/", "x"])
def test_a_forbidden_webhook_is_rejected_at_the_submit(tmp_path, url):
    """The response is 422 with the parameter's name; nothing is accepted."""

    async def use():
        async with serving(tmp_path) as session:
            status, _, body = await call(session, "POST", hooked(url), json=INPUT)
            assert status == 422
            assert body["detail"][0]["loc"] == ["query", "fal_webhook"]
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 0

    asyncio.run(use())


def test_a_name_with_a_private_address_is_never_called(tmp_path, caplog):
    """The address is checked at delivery; the callback is dropped, and only the URL's host is logged."""

    async def use():
        async with Receiver() as receiver, serving(tmp_path) as session:
            url = f"http://localhost:{receiver.port}/hook?secret=1"
            request_id = await submitted(session, url)
            assert (await result(session, request_id))[0] == 200
            async with asyncio.timeout(20):
                while "giving up" not in caplog.text:
                    await asyncio.sleep(0.005)
            assert receiver.calls == []
        assert "secret" not in caplog.text

    asyncio.run(use())


def test_a_repeated_submit_has_one_callback(tmp_path):
    """A repeated idempotency key keeps the first webhook."""

    async def use():
        async with Receiver() as receiver, serving(tmp_path, allow_private=True) as session:
            again = {"idempotency-key": "k"}
            ids = {await submitted(session, receiver.url, headers=again) for _ in range(3)}
            assert len(ids) == 1
            await receiver.got(1)
            other = await submitted(session, receiver.url)
            assert [told["request_id"] for told in await receiver.got(2)] == [*ids, other]

    asyncio.run(use())


# --- again and again --------------------------------------------------------------------------------------


def test_a_failing_receiver_is_retried_until_it_acknowledges(tmp_path):
    """4xx and 5xx are retried with the same body and a new signature."""

    async def use():
        async with Receiver(500, 404, 429, 503, 204) as receiver, sender(tmp_path) as (service, store):
            await service.submit(APP_ID, BODY, options_with(receiver.url))
            await receiver.got(5)
            await settled(store)
            assert len({body for _, body, _ in receiver.calls}) == 1
            assert len(receiver.calls) == 5

    asyncio.run(use())


def test_delivery_ends_after_the_last_retry(tmp_path):
    """Delivery ends after one attempt and 31 retries; the result is still available."""

    async def use():
        async with Receiver(500) as receiver, sender(tmp_path) as (service, store):
            admission = await service.submit(APP_ID, BODY, options_with(receiver.url))
            await settled(store)
            assert len(receiver.calls) == 1 + RETRIES
            assert (await service.find(admission.request_id)).state.status == 200

    asyncio.run(use())


def test_a_redirect_is_final_and_not_followed(tmp_path):
    """One call is made and none is pending."""

    async def use():
        async with Receiver(302) as receiver, sender(tmp_path) as (service, store):
            await service.submit(APP_ID, BODY, options_with(receiver.url))
            await settled(store)
            assert [path for _, _, path in receiver.calls] == ["/hook?secret=1"]

    asyncio.run(use())


def test_an_unreachable_receiver_is_retried(tmp_path):
    """Connection refused, timeout and unknown host are retried."""
    speed = webhooks_module.FIRST_SECONDS / 0.1

    async def use():
        async with Receiver() as gone:
            pass
        async with Receiver(hold=True) as silent, sender(tmp_path, chance=lambda: 1.0) as (service, store):
            for url in (gone.url, silent.url, "http://unknown.invalid/"):
                await service.submit(APP_ID, BODY, options_with(url))
            async with asyncio.timeout(HANGS):
                while len(found := await waiting_tries(store)) < 3 or set(found) != {1}:
                    await asyncio.sleep(0.01)
            assert store.webhooks == 3

    async def waiting_tries(store):
        upcoming = await store.webhooks_due(4e9, 10, busy_hosts=[], under_way=[])
        return [delivery.tries for delivery in upcoming]

    run_at(speed, use())


def test_the_first_attempt_has_a_shorter_timeout(tmp_path):
    """15 s, then 120 s, so that a slow receiver can succeed."""
    assert (webhooks_module.FIRST_SECONDS, webhooks_module.LATER_SECONDS) == (15.0, 120.0)

    async def use():
        async with Receiver(hold=True) as receiver, sender(tmp_path) as (service, store):
            await service.submit(APP_ID, BODY, options_with(receiver.url))
            await receiver.got(2)
            receiver.go.set()
            await settled(store)
            assert len(receiver.calls) == 2

    run_at(webhooks_module.FIRST_SECONDS / 0.3, use())


def test_a_hanging_receiver_blocks_only_itself(tmp_path):
    """The queue and other hosts are not affected, and the calls in flight per host are limited."""

    async def use():
        count = 4 * PARALLEL
        async with (
            Receiver(hold=True) as silent,
            Receiver() as quick,
            sender(tmp_path, ScriptedEngine(slots=8)) as (service, store),
        ):
            ids = [await service.submit(APP_ID, BODY, options_with(silent.url)) for _ in range(count)]
            await silent.got(PARALLEL_PER_HOST)
            other = quick.url.replace("127.0.0.1", "localhost")
            mine = await service.submit(APP_ID, BODY, options_with(other))
            assert [told["request_id"] for told in await quick.got(1)] == [mine.request_id]
            assert len(silent.calls) == silent.waiting == PARALLEL_PER_HOST
            for admission in ids:
                assert (await service.find(admission.request_id)).state.status == 200
            silent.go.set()
            await settled(store)
            assert len(silent.calls) == count

    asyncio.run(use())


def test_a_full_disk_delays_only_the_record_of_a_delivery(tmp_path):
    """A delivered callback is recorded when writes succeed again, and is not repeated."""

    async def use():
        refusals = iter([StorageError("no space"), StorageError("no space")])
        async with Receiver() as receiver, sender(tmp_path, disk_seconds=0.01) as (service, store):
            settle = store.settle

            async def refusing(outcome):
                for refusal in refusals:
                    raise refusal
                await settle(outcome)

            store.settle = refusing
            await service.submit(APP_ID, BODY, options_with(receiver.url))
            await settled(store)
            assert len(receiver.calls) == 1

    asyncio.run(use())


# --- durable ----------------------------------------------------------------------------------------------


def test_pending_callbacks_survive_the_server(tmp_path):
    """The next server delivers a callback that was not acknowledged."""

    async def use():
        async with Receiver(hold=True) as receiver:
            async with sender(tmp_path) as (service, _):
                first = await service.submit(APP_ID, BODY, options_with(receiver.url))
                await receiver.got(1)
            receiver.go.set()
            async with sender(tmp_path) as (_, store):
                assert store.webhooks == 1
                told = await receiver.got(2)
                await settled(store)
            assert [one["request_id"] for one in told] == [first.request_id] * 2
            async with sender(tmp_path) as (_, store):
                assert store.webhooks == 0

    asyncio.run(use())


def test_a_result_and_its_callback_are_one_transaction(tmp_path):
    """One transaction, so that a killed server never loses a callback."""

    async def use():
        path = tmp_path / "server.db"
        async with await Store.open(path) as store:
            await store.accept(Submission("r1", APP_ID, 1.0, b"{}", owner="alice", webhook=Webhook("u", "h", "b")))
            assert await store.webhooks_due(4e9, 9, busy_hosts=[], under_way=[]) == []
            await store.end(CompletedRequest("r1", APP_ID, 5.0, 200, b"{}"))
            (due,) = await store.webhooks_due(5.0, 9, busy_hosts=[], under_way=[])
            assert due == ("r1", ("u", "h", "b"), 0)
            assert await store.webhooks_due(5.0, 9, busy_hosts=["h"], under_way=[]) == []
            assert await store.webhooks_due(5.0, 9, busy_hosts=[], under_way=["r1"]) == []
            assert (await store.webhook_next(4.9), await store.webhook_next(5.0)) == (5.0, None)
            await store.settle(DeliveryOutcome("r1", 7.0))
            assert (await store.webhooks_due(7.0, 9, busy_hosts=[], under_way=[]))[0].tries == 1
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("DELETE FROM request")  # as when its retention ends
            assert database.execute("SELECT count(*) FROM webhook").fetchone() == (0,)

    asyncio.run(use())


def test_a_version_1_store_is_upgraded(tmp_path):
    """Its rows stay, without an owner, and its schema equals that of a new file."""
    old, new = tmp_path / "old.db", tmp_path / "new.db"

    async def use():
        async with await Store.open(new) as store:
            await store.accept(Submission("r1", APP_ID, 1.0, b"{}"))
        async with await Store.open(old) as store:
            assert (await store.find("r1")).owner == ""
            await store.accept(Submission("r2", APP_ID, 1.0, b"{}", owner="alice", webhook=Webhook("u", "h", "b")))
            assert (await store.find("r2")).owner == "alice"
            assert store.webhooks == 1

    def shape(path):
        with contextlib.closing(sqlite3.connect(path)) as database:
            names = database.execute("SELECT type, name FROM sqlite_master ORDER BY 1, 2").fetchall()
            tables = [name for kind, name in names if kind == "table"]
            return names, [database.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in tables]

    with contextlib.closing(sqlite3.connect(old)) as database:
        database.executescript(FIRST_VERSION)
    asyncio.run(use())
    assert shape(old) == shape(new)


FIRST_VERSION = """
CREATE TABLE request (
    seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, app TEXT NOT NULL, accepted_at REAL NOT NULL,
    body BLOB NOT NULL, digest BLOB NOT NULL, idempotency_key TEXT UNIQUE, priority INTEGER NOT NULL, start_by REAL,
    ended_at REAL, status INTEGER, payload BLOB, started_at REAL, inference_time REAL, billable_units REAL,
    error_type TEXT, retryable INTEGER, inline INTEGER, logs BLOB
) STRICT;
CREATE INDEX request_to_do ON request (seq) WHERE ended_at IS NULL;
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counter VALUES ('accepted', 1);
INSERT INTO request (request_id, app, accepted_at, body, digest, priority)
VALUES ('r1', 'fal-ai/flux/dev/image-to-image', 1.0, x'7b7d', x'00', 0);
PRAGMA user_version = 1;
"""


def test_callbacks_survive_kill_9(tmp_path):
    """After kill -9 with callbacks in flight, the next server delivers each of them, with the same ids."""

    @contextlib.asynccontextmanager
    async def server():
        command = [sys.executable, "-m", "batch.server", "--data-dir", str(tmp_path), "--engine", "echo"]
        process = await asyncio.create_subprocess_exec(
            *command, "--allow-private", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            url = orjson.loads(await process.stdout.readline())["url"]
            async with aiohttp.ClientSession(url) as session:
                yield session
        finally:
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            process._transport.close()

    async def use():
        async with Receiver(hold=True) as receiver:
            async with server() as session:
                ids = {await submitted(session, receiver.url) for _ in range(20)}
                await receiver.got(PARALLEL_PER_HOST)
            receiver.go.set()
            async with server():
                told = await receiver.got(20 + PARALLEL_PER_HOST)
            assert {one["request_id"] for one in told} == ids

    asyncio.run(use())
