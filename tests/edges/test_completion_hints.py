"""Streams and callbacks: with our own server, with servers that misbehave, and with forgeries."""

from __future__ import annotations

import asyncio
import contextlib
import time

import aiohttp
import orjson
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr

from batch.errors import ConfigError
from batch.fal.client import FalClient
from batch.fal.endpoint import APP_ID
from batch.fal.protocol import Origins
from batch.fal.signing import jwks_of, sign
from batch.fal.status_stream import SILENCE, StatusStreams
from batch.fal.webhook_receiver import WebhookReceiver
from batch.types import Attempt, JobKey, RequestId, Ticket
from tests.edges.serving import INPUT, ScriptedEngine, serving, submit
from tests.quick_time import quickly

pytestmark = pytest.mark.anyio
TICKET = Ticket(RequestId("request-1"))
LONG = 20.0
"""Seconds longer than anything here takes: a longer wait means that no hint arrived."""


@pytest.fixture
def anyio_backend():
    return "asyncio"


@contextlib.asynccontextmanager
async def answering(handler):
    """A server whose every answer is the handler's; yields its origin."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def listening(url, **options):
    return StatusStreams(Origins.of_server(url), APP_ID, None, **options)


def event(status):
    return b"data: " + orjson.dumps({"status": status, "request_id": TICKET.request_id}) + b"\n\n"


async def timed(waiting):
    began = time.monotonic()
    return await asyncio.wait_for(waiting, 200 * SILENCE), time.monotonic() - began


# --- streams ----------------------------------------------------------------------------------------------


async def test_a_stream_of_our_server_wakes_at_the_end(tmp_path):
    """The end of a job is reported at once, long before the next read, and only once."""
    engine = ScriptedEngine()
    async with serving(tmp_path, engine) as session, listening(str(session._base_url)) as streams:
        ticket = Ticket(RequestId(await submit(session, "hold")))
        waiting = asyncio.create_task(streams.wait(ticket, LONG, LONG))
        while not engine.seen:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.go.set()
        assert await asyncio.wait_for(waiting, 5) is True
        assert await timed(streams.wait(ticket, 0.0, LONG)) == (False, pytest.approx(0.0, abs=0.5))
        streams.forget(ticket)
        assert "0 open" in repr(streams)
        assert await asyncio.wait_for(streams.wait(ticket, LONG, LONG), 5) is True  # it opens a new stream


async def served(request, *parts, status=200, kind="text/event-stream", hold=False):
    stream = web.StreamResponse(status=status, headers={"content-type": kind})
    await stream.prepare(request)
    for part in parts:
        await stream.write(part)
    while hold and request.transport is not None:  # until the client disconnects
        await asyncio.sleep(0.05)
    return stream


FAULTS = {
    "refused": lambda request: served(request, b"{}", status=403, kind="application/json"),
    "no stream": lambda request: served(request, b"<html>", kind="text/html"),
    "ends early": lambda request: served(request, event("IN_QUEUE"), event("IN_PROGRESS")),
    "cut in the middle": lambda request: served(request, event("IN_QUEUE"), event("COMPLETED")[:20]),
    "nonsense": lambda request: served(request, b"data: ]]\n\n", hold=True),
    "unknown status": lambda request: served(request, event("BANANA"), hold=True),
    "no status": lambda request: served(request, event(None), hold=True),
    "a line without end": lambda request: served(request, b"data: " + b"x" * 2**20, hold=True),
    "an event without end": lambda request: served(request, b"data: 12345678\n" * 2**16, hold=True),
    "redirect": lambda request: served(request, status=302),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stream_that_fails_leaves_the_job_to_reading(fault):
    """For any error: no exception, no hint, and the usual wait, not the longest."""
    opened = []

    async def handler(request):
        opened.append(request.path)
        return await FAULTS[fault](request)

    async with answering(handler) as url, listening(url) as streams:
        woken, seconds = await timed(streams.wait(TICKET, 0.4, LONG))
        assert not woken
        assert 0.35 <= seconds < 5.0
        assert await timed(streams.wait(TICKET, 0.1, LONG)) == (False, pytest.approx(0.1, abs=0.5))
    assert opened == ["/fal-ai/flux/requests/request-1/status/stream"]


@pytest.mark.parametrize("word", ["COMPLETED", "FAILED", "Cancelled", "succeeded"])
async def test_a_stream_wakes_at_every_word_for_an_end(word):
    """Also if the word is not fal's own."""
    async with (
        answering(lambda request: served(request, event("in_progress"), event(word), hold=True)) as url,
        listening(url) as streams,
    ):
        assert (await timed(streams.wait(TICKET, LONG, LONG)))[0] is True


@quickly(SILENCE / 0.3)
async def test_a_silent_stream_is_given_up():
    """After two missing keep-alives the job is polled as usual."""
    async with (
        answering(lambda request: served(request, event("IN_QUEUE"), hold=True)) as url,
        listening(url) as streams,
    ):
        woken, seconds = await timed(streams.wait(TICKET, 0.0, 100 * SILENCE))
        assert not woken
        assert 0.25 <= seconds < 5.0


@quickly(SILENCE / 0.4)
async def test_comments_keep_a_stream_alive():
    """A comment is neither an event nor an end."""

    async def handler(request):
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        for _ in range(5):
            await stream.write(b": still here\n\n")
            await asyncio.sleep(SILENCE / 2)
        await stream.write(event("COMPLETED"))
        return stream

    async with answering(handler) as url, listening(url) as streams:
        assert (await timed(streams.wait(TICKET, 0.0, 100 * SILENCE)))[0] is True


async def test_only_so_many_streams_are_open():
    """A job without a stream is polled as usual."""
    async with (
        answering(lambda request: served(request, event("IN_QUEUE"), hold=True)) as url,
        listening(url, most=1) as streams,
    ):
        first = asyncio.create_task(streams.wait(TICKET, LONG, LONG))
        await asyncio.sleep(0)
        assert await timed(streams.wait(Ticket(RequestId("request-2")), 0.1, LONG)) == (
            False,
            pytest.approx(0.1, abs=0.5),
        )
        first.cancel()


async def test_the_key_goes_to_the_target_and_its_repr_hides_it():
    """As with every other exchange."""
    seen = []

    async def handler(request):
        seen.append(request.headers.get("authorization"))
        return await served(request, event("COMPLETED"))

    async with (
        answering(handler) as url,
        StatusStreams(Origins.of_server(url), APP_ID, SecretStr("id:secret")) as streams,
    ):
        assert await streams.wait(TICKET, 0.0, LONG)
        assert "secret" not in repr(streams)
    assert seen == ["Key id:secret"]


# --- callbacks --------------------------------------------------------------------------------------------


async def test_a_callback_of_our_server_wakes_at_the_end(tmp_path):
    """Submitted with our address, called at the end, verified with the server's own keys."""
    engine = ScriptedEngine()
    async with serving(tmp_path, engine, allow_private=True) as session:
        url = str(session._base_url).rstrip("/")
        async with (
            WebhookReceiver("127.0.0.1:0", None, url) as callbacks,
            FalClient(Origins.of_server(url), APP_ID) as client,
        ):
            client.webhook = callbacks.url
            body = orjson.dumps({**INPUT, "prompt": "hold"})
            ticket = await client.submit(Attempt(JobKey("key"), 1, body))
            waiting = asyncio.create_task(callbacks.wait(ticket, LONG, LONG))
            while not engine.seen:
                await asyncio.sleep(0.01)
            assert not waiting.done()
            engine.go.set()
            assert await asyncio.wait_for(waiting, 5) is True
            assert (callbacks.believed, callbacks.refused) == (1, 0)
            assert await timed(callbacks.wait(ticket, 0.0, LONG)) == (False, pytest.approx(0.0, abs=0.5))
            callbacks.forget(ticket)
            again, seconds = await timed(callbacks.wait(ticket, 0.0, 0.3))
            assert (again, seconds >= 0.3) == (False, True), "nothing is known of it"


class Target:
    """Publishes keys, and signs callbacks with them."""

    def __init__(self):
        self.key, self.fetched, self.fails = Ed25519PrivateKey.generate(), 0, False

    async def handle(self, request):
        assert request.path == "/.well-known/jwks.json"
        assert "authorization" not in request.headers
        self.fetched += 1
        body = orjson.dumps(jwks_of([self.key.public_key()]))
        return web.Response(status=500 if self.fails else 200, body=body, content_type="application/json")

    def signed(self, request_id="request-1", body=b"{}", at=None, key=None):
        timestamp = int(time.time() if at is None else at)
        return sign(key or self.key, request_id=request_id, user_id="u", timestamp=timestamp, body=body)


@contextlib.asynccontextmanager
async def called(**options):
    """A target, the receiver of its callbacks, and a function to call it; yields all three."""
    target = Target()
    async with (
        answering(target.handle) as url,
        WebhookReceiver("127.0.0.1:0", None, url, **options) as callbacks,
        aiohttp.ClientSession() as session,
    ):

        async def call(headers, body=b"{}", method="POST"):
            async with session.request(method, callbacks.url, data=body, headers=headers) as response:
                return response.status

        yield target, callbacks, call


async def test_a_forged_callback_is_ignored():
    """Another key, another body, no signature, an old one: refused, and no job wakes up."""
    async with called() as (target, callbacks, call):
        waiting = asyncio.create_task(callbacks.wait(TICKET, 1.0, 1.0))
        forger = Ed25519PrivateKey.generate()
        assert await call(target.signed(key=forger)) == 401
        assert await call(target.signed(), b'{"other":1}') == 401
        assert await call({}) == 401
        assert await call(target.signed(at=time.time() - 301)) == 401
        assert await call(target.signed(at=time.time() + 301)) == 401
        assert await call({}, method="GET") == 405
        assert not waiting.done()
        assert await waiting is False
        assert (callbacks.believed, callbacks.refused) == (0, 5)


async def test_a_callback_for_nobody_is_acknowledged():
    """Unknown, or settled long ago: 200, because sending it again would not help."""
    async with called() as (target, callbacks, call):
        assert await call(target.signed("unknown-request")) == 200
        assert callbacks.believed == 1


async def test_a_callback_may_be_faster_than_the_answer_to_its_submit():
    """It is remembered until the job waits for it."""
    async with called() as (target, callbacks, call):
        assert await call(target.signed()) == 200
        assert await timed(callbacks.wait(TICKET, LONG, LONG)) == (True, pytest.approx(0.0, abs=0.5))


async def test_what_is_kept_in_mind_is_bounded():
    """The oldest is forgotten."""
    async with called(early=2) as (target, callbacks, call):
        for name in ("request-1", "request-2", "request-3"):
            await call(target.signed(name))
        tickets = [Ticket(RequestId(name)) for name in ("request-1", "request-2", "request-3")]
        assert [await callbacks.wait(ticket, 0.05, 0.05) for ticket in tickets] == [False, True, True]


async def test_the_keys_are_fetched_once_and_again_when_they_have_changed():
    """Many callbacks, one fetch; an unmatched signature causes another fetch, at most once a minute."""
    clock = [time.time()]
    async with called(now=lambda: clock[0]) as (target, _, call):
        assert await asyncio.gather(*(call(target.signed(f"r-{n}")) for n in range(20))) == [200] * 20
        assert target.fetched == 1
        target.key = Ed25519PrivateKey.generate()
        assert await call(target.signed()) == 401
        assert target.fetched == 1
        clock[0] += 61
        assert await call(target.signed()) == 200
        assert target.fetched == 2


async def test_without_keys_a_callback_is_asked_for_again():
    """Unreadable keys are not the sender's fault: 503 asks for a retry."""
    async with called() as (target, callbacks, call):
        target.fails = True
        assert await call(target.signed()) == 503
        target.fails = False
        assert await call(target.signed()) == 200
        assert callbacks.refused == 0


async def test_a_callback_of_any_length_is_bounded():
    """A body over the limit is refused unread."""
    async with called(body_limit=1000) as (target, _, call):
        assert await call(target.signed(body=b"x" * 2000), b"x" * 2000) == 413


async def test_an_address_that_cannot_be_listened_at_is_the_user_s_mistake():
    """The error names the setting."""
    async with WebhookReceiver("127.0.0.1:0", None, "http://127.0.0.1:1") as first:
        bind = first.url.removeprefix("http://").rstrip("/")
        with pytest.raises(ConfigError, match=r"webhook\.bind"):
            async with WebhookReceiver(bind, None, "http://127.0.0.1:1"):
                pass
