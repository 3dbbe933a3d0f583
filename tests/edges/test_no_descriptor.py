"""A process that can open nothing for a while, for real: work waits, and nothing fails."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sqlite3
import threading
from contextlib import contextmanager

import aiohttp
import pytest
from PIL import Image

from batch.embedded import embedded_endpoint
from batch.errors import StorageError
from batch.fal.client import FalClient
from batch.fal.endpoint import APP_ID
from batch.fal.errors import CallFailed
from batch.fal.protocol import Origins
from batch.fal.status_stream import StatusStreams
from batch.journal.database import JournalDatabase
from batch.manifest.images import SourceImages
from batch.run.images import ImageFolder
from batch.run.interfaces import ImageError
from batch.run.verdicts import Action, judge
from batch.server import serve as serve_module
from batch.server.egress.http_client import FetchLimits, SafeHttpClient
from batch.server.egress.ssrf import private_too
from batch.server.engines.process_pool import WorkerPool
from batch.server.files.storage import Storage
from batch.system.descriptors import Allowance, lacks_descriptor
from batch.types import Attempt, JobKey, LocalImage, RequestId, Ticket
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, result, serving, submit
from tests.edges.test_images import image_bytes
from tests.edges.test_webhooks import BODY, Receiver, options_with, sender, settled

ATTEMPT = Attempt(JobKey("0" * 32), 1, b'{"prompt": "a"}')
LARGE = bytes(100_000)


@contextmanager
def none_free(seconds: float | None = None):
    """Prevent any opening in the block, or for the given seconds of it; open files stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def restore():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    timer = threading.Timer(seconds or 0.0, restore)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        if seconds is not None:
            timer.start()
        yield
    finally:
        restore()
        if seconds is not None:
            timer.join()


def in_loop(use):
    """Run `use()`, with its threads and modules ready before the descriptors run out."""

    async def main():
        await asyncio.to_thread(int)
        return await use()

    return asyncio.run(main())


# --- a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_submit_is_certainly_not_sent(host):
    """Neither a connection nor a DNS look-up is possible: it is sent later, and its outcome is not unknown."""

    async def use():
        async with FalClient(Origins.of_server(f"http://{host}:9"), APP_ID) as client:
            with none_free(), pytest.raises(CallFailed) as caught:
                await client.submit(ATTEMPT)
        trouble = caught.value.trouble
        assert not trouble.sent
        assert judge(trouble).action is Action.SUBMIT_AGAIN

    in_loop(use)


def test_reads_and_files_are_tried_again():
    """However often it happens: neither a status, a result nor a file is given up."""

    async def use():
        async with FalClient(Origins.of_server("http://127.0.0.1:9"), APP_ID) as client:
            ticket = Ticket(RequestId("request-1"))
            calls = (client.status(ticket), client.result(ticket), client.download("http://127.0.0.1:9/a.png"))
            calls += (client.upload(b"x", "image/png", "a.png"),)
            for one in calls:
                with none_free(), pytest.raises(CallFailed) as caught:
                    await one
                assert caught.value.trouble.transport == "descriptors"
                assert judge(caught.value.trouble, seen=1000).action is Action.READ_AGAIN

    in_loop(use)


def test_an_image_is_not_at_fault(tmp_path):
    """It can neither be read nor stored; the error has the cause, so that it is retried."""

    async def use():
        images = ImageFolder(tmp_path, limit_megapixels=100)
        stored = await images.store(image_bytes(size=(64, 48)))
        local = LocalImage(stored.sha256, stored.file_size, path=tmp_path / stored.path)
        for work in (images.store(image_bytes(size=(48, 64))), images.load(local)):
            with none_free(), pytest.raises((StorageError, ImageError)) as caught:
                await work
            assert lacks_descriptor(caught.value)

    in_loop(use)


def test_a_local_image_of_a_manifest_is_no_bad_row(tmp_path):
    """Planning waits until the file can be read."""
    for number in range(10):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    images = SourceImages(tmp_path, 100.0)
    assert images.resolve(["0.png"])[0].image is not None
    with none_free(0.3):
        found = images.resolve([f"{number}.png" for number in range(10)])
    assert all(one.image is not None for one in found)


class Refusing:
    """A connection to SQLite whose next statements find no descriptor for a temporary file."""

    def __init__(self, connection, times):
        self._connection, self.times = connection, times

    def execute(self, *arguments):
        if self.times:
            self.times -= 1
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CANTOPEN, "SQLITE_CANTOPEN"
            raise error
        return self._connection.execute(*arguments)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_the_journal_waits_for_sqlite(tmp_path):
    """SQLite only reports that it cannot open something; the database itself is open."""
    file = JournalDatabase.open(tmp_path / "journal.db", now=1.0, version="1")
    try:
        refusing = file._connection = Refusing(file._connection, 2)
        assert file.find([JobKey("a" * 32)]) == {}
        assert refusing.times == 0
    finally:
        file.close()


def test_the_servers_databases_wait_for_sqlite(tmp_path):
    """Requests and small files are written eventually."""

    async def use():
        async with Storage(tmp_path) as storage:
            small = storage._small
            small._database = refusing = Refusing(small._database, 3)
            path = await storage.save(b"small", "image/png")
            small._recent.clear()
            refusing.times = 2
            assert await storage.read(path) == b"small"

    in_loop(use)


# --- a server ---------------------------------------------------------------------------------------------


class LacksOnce(ScriptedEngine):
    """Lacks a descriptor at its first two tries."""

    async def generate(self, job, on_step, cancelled):
        if len(self.seen) < 2:
            self.seen.append(job)
            raise OSError(errno.EMFILE, "Too many open files")
        return await super().generate(job, on_step, cancelled)


def test_a_request_is_executed_when_there_is_a_descriptor(tmp_path, caplog):
    """It does not fail, and the log has one line about it."""

    async def use():
        async with serving(tmp_path, LacksOnce()) as session:
            status, _, body = await result(session, await submit(session))
            assert (status, len(body["images"])) == (200, 1)

    in_loop(use)
    said = [record for record in caplog.records if "too many open files" in record.message]
    assert len(said) == 1
    assert all(record.exc_info is None for record in caplog.records)


def test_a_request_that_waits_for_a_descriptor_can_be_cancelled(tmp_path):
    """Retrying must not be endless."""

    class Lacks(ScriptedEngine):
        async def generate(self, job, on_step, cancelled):
            self.seen.append(job)
            raise OSError(errno.ENFILE, "Too many open files in system")

    async def use():
        engine = Lacks()
        async with serving(tmp_path, engine) as session:
            request_id = await submit(session)
            while not engine.seen:
                await asyncio.sleep(0.01)
            status, _, _ = await call(session, "PUT", f"/fal-ai/flux/requests/{request_id}/cancel")
            assert status == 202
            async with asyncio.timeout(5):
                assert (await completed(session, request_id))["status"] == "COMPLETED"

    in_loop(use)


def test_large_files_wait_on_their_way_in_and_out(tmp_path):
    """An upload does not become a 503, nor a download a 404."""

    async def use():
        async with serving(tmp_path) as session:
            await call(session, "GET", "/health")  # keeps a connection open
            with none_free(0.4):
                _, _, body = await call(session, "POST", "/files/upload", data=LARGE)
            url = body["access_url"]
            with none_free(0.4):
                async with session.get(url) as answer:
                    assert answer.status == 200
                    assert await answer.read() == LARGE

    in_loop(use)


def test_a_call_that_finds_no_descriptor_may_come_again(tmp_path, monkeypatch, caplog):
    """429, which every client retries and which proves that nothing was accepted; neither 500 nor a traceback."""

    async def use():
        async with serving(tmp_path) as session:

            async def refused(*_):
                raise StorageError("not written") from OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr("batch.server.queue.service.QueueService.submit", refused)
            status, headers, body = await call(session, "POST", SUBMIT, json=INPUT)
            assert (status, headers["retry-after"]) == (429, "1")
            assert "too many files open" in body["detail"]
            assert "x-fal-request-id" in headers

    in_loop(use)
    assert all(record.exc_info is None for record in caplog.records)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://no-such-host.invalid/"])
def test_another_server_is_not_called_unreachable(url):
    """Neither for a connection nor for a look-up: the source image of a request is not at fault."""

    async def use():
        async with SafeHttpClient(private_too) as client:
            await asyncio.get_running_loop().getaddrinfo("localhost", 80)
            with none_free(), pytest.raises(OSError, match="descriptor") as caught:
                await client.fetch(url, FetchLimits(1000, 5.0))
            assert lacks_descriptor(caught.value)

    in_loop(use)


def test_waiting_for_a_connection_is_not_part_of_a_fetchs_time():
    """A small machine allows few concurrent requests; the time in the queue does not count."""

    async def use():
        async def handle(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.2)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\nx")
            writer.close()
            await writer.wait_closed()

        async with (
            await asyncio.start_server(handle, "127.0.0.1", 0) as server,
            SafeHttpClient(private_too, limit=2) as client,
        ):
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            found = await asyncio.gather(*(client.fetch(url, FetchLimits(10, 0.8)) for _ in range(12)))
        assert found == [b"x"] * 12

    in_loop(use)


def test_a_webhook_is_sent_when_there_is_a_descriptor(tmp_path, monkeypatch):
    """A try that could not start does not count: the webhook does not wait for hours after the tenth."""
    post, times = SafeHttpClient.post, 10

    async def lacking(client, *arguments):
        nonlocal times
        if times:
            times -= 1
            raise OSError(errno.EMFILE, "no descriptor is free")
        return await post(client, *arguments)

    monkeypatch.setattr(SafeHttpClient, "post", lacking)

    async def use():
        async with Receiver() as receiver, sender(tmp_path, chance=lambda: 1.0, disk_seconds=0.01) as (service, store):
            await service.submit(APP_ID, BODY, options_with(receiver.url))
            await receiver.got(1)
            await settled(store)

    in_loop(use)
    assert times == 0


def test_an_endpoint_that_died_is_replaced_when_there_is_a_descriptor(tmp_path):
    """Its pipes need descriptors."""

    async def use():
        async with embedded_endpoint(tmp_path, "echo", None, 0.0) as endpoint:
            with none_free(1.0):
                os.kill(endpoint.pid, signal.SIGKILL)
                async with asyncio.timeout(20):
                    while not endpoint.restarts:
                        await asyncio.sleep(0.05)

    in_loop(use)


def test_a_worker_process_that_cannot_be_started_is_no_failure_of_its_job():
    """The error has the cause, so that the job is retried; its slot is free then."""

    async def use():
        async with WorkerPool("batch.server.engines.preview.renderer:open_renderer", size=2) as pool:
            with none_free(), pytest.raises(OSError, match="Too many open files") as caught:
                await pool.start(2)
            assert lacks_descriptor(caught.value)
            await pool.start(2)
            assert pool.statistics().idle == 2

    in_loop(use)


def test_connections_that_wait_for_an_end_leave_room_for_the_others(tmp_path, monkeypatch):
    """Streams and direct calls take at most three quarters; further ones are refused, and a submit is answered."""
    monkeypatch.setattr(serve_module, "allowance", lambda: Allowance(80, 80, 40))

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session, aiohttp.ClientSession(session._base_url) as others:
            held = await submit(session, "hold")
            path = f"/fal-ai/flux/requests/{held}/status/stream"
            streams = await asyncio.gather(*(others.get(path) for _ in range(24)))
            refused = [one for one in streams if one.status == 429]
            assert 0 < len(refused) < 24
            assert {one.headers["retry-after"] for one in refused} == {"1"}
            assert await submit(session, "a cat")
            async with StatusStreams(Origins.of_server(str(session._base_url)), APP_ID, None) as listening:
                waiting = listening.wait(Ticket(RequestId(held)), 0.05, 20.0)
                assert await asyncio.wait_for(waiting, 5.0) is False
            engine.go.set()
            for one in streams:
                one.close()

    in_loop(use)
