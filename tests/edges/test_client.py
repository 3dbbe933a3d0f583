"""The client edge against real loopback servers with every fault: each is a `Trouble`, and a POST is sent once."""

from __future__ import annotations

import gzip
import inspect
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import anyio
import orjson
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey
from anyio.abc import SocketStream
from pydantic import SecretStr

from batch.fal import client as module
from batch.fal import http as http_module
from batch.fal.answer import images_of
from batch.fal.client import FalClient, trouble_of
from batch.fal.endpoint import APP_ID
from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Call, CancelOutcome, Origins
from batch.run.interfaces import HeldBack
from batch.run.verdicts import Action, judge
from batch.types import Attempt, JobKey, QueueState, RequestId, Ticket
from tests.quick_time import quickly

pytestmark = pytest.mark.anyio
KEY = "key-id:key-secret"
ATTEMPT = Attempt(JobKey("0" * 32), 1, b'{"prompt": "a"}')
TICKET = Ticket(RequestId("request-1"))
OUTPUT = {"images": [{"url": "http://x/y.png"}], "seed": 7, "prompt": "a"}


@pytest.fixture
def anyio_backend():
    """Aiohttp needs asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch):
    """Clear the developer's own proxy settings."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@asynccontextmanager
async def client_at(url: str, *, key: str | None = None, **options):
    secret = None if key is None else SecretStr(key)
    async with FalClient(Origins.of_server(url), APP_ID, secret, **options) as client:
        yield client


class Requests(list):
    """Requests that a server received."""

    def posts(self) -> int:
        return sum(request.method == "POST" for request in self)


@asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | web.Response, **options):
    """A client of a server that gives one answer to everything, and the requests that the server received."""
    received = Requests()

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        received.append(request)
        if isinstance(answer, web.Response):
            return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
        return await answer(request)

    app = web.Application(client_max_size=2**27)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with client_at(f"http://127.0.0.1:{port}", **options) as client:
            client.url = f"http://127.0.0.1:{port}"
            yield client, received
    finally:
        await runner.cleanup()


@asynccontextmanager
async def speaking(talk: Callable[[SocketStream, int], Awaitable[None]], **options):
    """A client of a raw socket server; `talk` gets the connection and its number, after the head of the request."""
    connections = []

    async def serve(stream: SocketStream) -> None:
        async with stream:
            connections.append(stream)
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError):
                await talk(stream, len(connections))

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with client_at(f"http://127.0.0.1:{port}", **options) as client:
            yield client, connections
        tasks.cancel_scope.cancel()


async def request_of(stream: SocketStream) -> bytes:
    """Read one request, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(v) for k, _, v in (h.partition(b":") for h in head.lower().split(b"\r\n")) if k == b"content-length"), 0)  # fmt: skip # noqa: E501
    while len(body) < length:
        body += await stream.receive()
    return head


def json_answer(value: object, status: int = 200, **headers: str) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), headers={"content-type": "application/json"} | headers)


async def trouble(call: Awaitable[object]) -> Trouble:
    with anyio.fail_after(6000), pytest.raises(CallFailed) as caught:  # of the loop, whose clock may be a quick one
        await call
    return caught.value.trouble


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- nothing was sent -------------------------------------------------------------------------------------


async def test_a_refused_connection_is_certainly_unsent():
    """Nothing listens: the submit may be sent again."""
    async with client_at(f"http://127.0.0.1:{free_port()}") as client:
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("connect", False)
    assert judge(found).action is Action.SUBMIT_AGAIN
    assert "127.0.0.1" in found.detail


async def test_a_name_that_does_not_exist_is_certainly_unsent():
    """`.invalid` never resolves, with or without a network."""
    async with client_at("http://missing.invalid") as client:
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("dns", False)


@quickly(http_module.CONNECT_TIMEOUT / 0.3)
async def test_a_connect_timeout_is_certainly_unsent():
    """A listener with a full backlog accepts no connection: nothing was written."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        crowd = [socket.socket() for _ in range(4)]
        try:
            for one in crowd:
                one.setblocking(False)
                one.connect_ex(address)
            async with client_at(f"http://127.0.0.1:{address[1]}") as client:
                found = await trouble(client.submit(ATTEMPT))
        finally:
            for one in crowd:
                one.close()
    assert (found.transport, found.sent) == ("connect timeout", False)


async def test_a_failed_tls_handshake_is_certainly_unsent():
    """TLS with a server that speaks plain HTTP."""
    async with answering(json_answer({})) as (plain, received), client_at(plain.url.replace("http", "https")) as client:
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("tls", False)
    assert not received


async def test_a_submit_asks_whether_it_may_leave_once_its_connection_is_free():
    """After all other waits, and before its first byte; a submit that is held back was not sent."""
    release, asked = anyio.Event(), []

    async def slow(request):
        await release.wait()
        return json_answer({"request_id": "r"})

    async def before_send(attempt):
        asked.append(attempt)
        if release.is_set():
            raise HeldBack("submits pause")

    async with answering(slow, connections=1) as (client, received):
        client.before_send = before_send
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.submit, ATTEMPT)
            while not received:
                await anyio.sleep(0.01)

            async def second():
                with pytest.raises(HeldBack):
                    await client.submit(ATTEMPT)

            tasks.start_soon(second)
            await anyio.wait_all_tasks_blocked()
            assert len(asked) == 1, "its connection is not free yet"
            release.set()
        assert (len(asked), received.posts()) == (2, 1)


# --- it may have arrived ----------------------------------------------------------------------------------


async def test_a_connection_dropped_after_the_request_leaves_a_submit_unknown():
    """The bytes were read and no answer came: sent, once, and unknown."""

    async def drop(stream, _):
        await request_of(stream)

    async with speaking(drop) as (client, connections):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("disconnected", True)
    assert judge(found).action is Action.UNKNOWN
    assert len(connections) == 1


async def test_a_connection_reset_after_the_request_leaves_a_submit_unknown():
    """A reset instead of an orderly end."""

    async def reset(stream, _):
        await request_of(stream)
        raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    async with speaking(reset) as (client, connections):
        found = await trouble(client.submit(ATTEMPT))
    assert found.transport in {"reset", "disconnected"}
    assert found.sent
    assert len(connections) == 1


@quickly(module.EXCHANGE_SECONDS / 0.2)
async def test_silence_after_the_request_is_a_timeout():
    """No byte of an answer within the read timeout."""

    async def silent(stream, _):
        await request_of(stream)
        await anyio.sleep_forever()

    async with speaking(silent) as (client, _):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("timeout", True)


@quickly(module.EXCHANGE_SECONDS / 0.2)
async def test_a_body_that_stops_in_the_middle_is_a_timeout():
    """A head and half a body, then silence."""

    async def stall(stream, _):
        await request_of(stream)
        await stream.send(b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"request_id": ')
        await anyio.sleep_forever()

    async with speaking(stall) as (client, _):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("timeout", True)


@quickly(module.EXCHANGE_SECONDS / 10.0)
async def test_a_slow_body_is_no_fault():
    """Single bytes are fine, as long as the whole exchange stays within its time."""
    body = orjson.dumps({"request_id": "abc", "padding": "x" * 20})

    async def dribble(stream, _):
        await request_of(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
        for byte in body:
            await stream.send(bytes([byte]))
            await anyio.sleep(0.015 * module.EXCHANGE_SECONDS / 10.0)

    async with speaking(dribble) as (client, _):
        ticket = await client.submit(ATTEMPT)
    assert ticket.request_id == "abc"


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n",
    ],
    ids=["short of its length", "an unfinished chunk", "no chunk at all"],
)
async def test_a_truncated_answer_leaves_a_submit_unknown(said):
    """A truncated answer proves nothing."""

    async def cut(stream, _):
        await request_of(stream)
        await stream.send(said)

    async with speaking(cut) as (client, _):
        found = await trouble(client.submit(ATTEMPT))
    assert found.transport in {"broken body", "bad answer"}
    assert judge(found).action is Action.UNKNOWN


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 banana\r\n\r\n"])
async def test_an_answer_that_is_no_http_leaves_a_submit_unknown(said):
    """Something else listens there."""

    async def talk(stream, _):
        await request_of(stream)
        await stream.send(said)

    async with speaking(talk) as (client, _):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("bad answer", True)


async def test_ten_megabytes_of_headers_are_refused_early():
    """They are not kept: the answer ends at the limit of one header line."""

    async def talk(stream, _):
        await request_of(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\n")
        for n in range(160):
            await stream.send(b"x-%d: " % n + b"y" * 65536 + b"\r\n")

    async with speaking(talk) as (client, _):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("bad answer", True)
    assert len(found.detail) < 200


# --- complete answers that are wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("length_is_given", [True, False], ids=["with its length", "chunked"])
async def test_an_oversize_answer_is_cut_off(length_is_given):
    """It is dropped at the limit, with or without a content length."""
    sent = []

    async def large(request):
        response = web.StreamResponse()
        if length_is_given:
            response.content_length = 2**26
        await response.prepare(request)
        for _ in range(2**10):
            await response.write(b" " * 2**16)
            sent.append(2**16)
        return response

    async with answering(large, json_limit_bytes=10_000) as (client, received):
        found = await trouble(client.submit(ATTEMPT))
    assert found.transport == "oversize"
    assert judge(found).action is Action.UNKNOWN
    assert received.posts() == 1
    assert sum(sent) < 2**26


async def test_a_download_has_a_limit_of_its_own():
    """`limits.max_download_bytes` limits a result image."""
    async with answering(web.Response(body=b"x" * 1001), download_limit_bytes=1000) as (client, _):
        found = await trouble(client.download(f"{client.url}/a.png"))
    assert found.transport == "oversize"
    assert "1000 bytes" in found.detail


@pytest.mark.parametrize("location", ["/elsewhere", "{url}/elsewhere", "http://127.0.0.1:1/elsewhere"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirected_submit_is_not_followed(status, location):
    """The POST went to another address than intended, so acceptance is unknown. Also inside the target."""

    async def redirect(request):
        return web.Response(status=status, headers={"location": location.format(url=client.url)})

    async with answering(redirect) as (client, received):
        found = await trouble(client.submit(ATTEMPT))
    assert found.reply is not None
    assert found.reply.status == status
    assert judge(found).action is Action.UNKNOWN
    assert [request.method for request in received] == ["POST"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>fine</html>",
        b'{"request_id": "abc"',
        b'{"request_id": NaN}',
        b"[]",
        b'"abc"',
        b"null",
        b"{}",
        b'{"request_id": null}',
        b'{"request_id": 7}',
        b'{"request_id": ""}',
        b'{"request_id": "../../x"}',
        b'{"request_id": "a/b"}',
        b'{"request_id": "a?b"}',
        b'{"request_id": "a\\r\\nx: y"}',
        '{"request_id": "é"}'.encode(),
        b'{"request_id": "' + b"a" * 201 + b'"}',
        b"\xff\xfe",
        gzip.compress(b'{"request_id": "abc"}', mtime=0),
    ],
    ids=repr,
)
async def test_a_submit_answer_without_a_usable_request_id_is_unknown(body):
    """2xx means accepted, but without an id it cannot be read. An invalid id never becomes part of our URLs."""
    async with answering(web.Response(body=body)) as (client, received):
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("malformed", True)
    assert judge(found).action is Action.UNKNOWN
    assert received.posts() == 1


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"NaN", b"<html>fine</html>", b'{"status": "IN_QUEUE"'])
async def test_a_status_outside_the_protocol_is_read_again(body):
    """It says nothing about the job."""
    async with answering(web.Response(body=body)) as (client, _):
        found = await trouble(client.status(TICKET))
    assert found.transport == "malformed"
    assert judge(found).action is Action.READ_AGAIN


async def test_odd_fields_of_a_status_are_passed_over():
    """Only the state counts; a value of the wrong type is ignored."""
    said = {"status": "IN_QUEUE", "queue_position": True, "metrics": [], "logs": "x", "error": 7}
    async with answering(json_answer(said, 202)) as (client, _):
        status = await client.status(TICKET)
    assert status.state is QueueState.IN_QUEUE
    assert (status.position, status.inference_time, status.error, status.logs) == (None, None, None, ())


@pytest.mark.parametrize(
    "output",
    [
        [],
        {},
        {"images": [{}], "seed": 1},
        {"images": [{"url": 5}], "seed": 1},
        {"images": "x", "seed": 1},
        {"images": [None, 5, "x"], "seed": 1},
    ],
    ids=repr,
)
async def test_a_result_of_another_shape_is_malformed(output):
    """It has no image: it is read again, and the answer is kept."""
    async with answering(json_answer(output)) as (client, _):
        found = await trouble(client.result(TICKET))
    assert found.transport == "malformed"
    assert orjson.loads(found.answer.raw) == output
    assert judge(found).action is Action.READ_AGAIN
    last = judge(found, seen=16)
    assert (last.action, last.collectable) == (Action.JOB_FAILED, True)


async def test_a_result_without_images_says_so():
    """An empty list is accepted sooner than another shape; the answer is kept."""
    async with answering(json_answer({"images": [], "seed": 1})) as (client, _):
        found = await trouble(client.result(TICKET))
    assert (found.transport, found.answer.output) == ("no images", {"images": [], "seed": 1})
    assert judge(found, seen=2).action is Action.READ_AGAIN
    assert judge(found, seen=3).action is Action.JOB_FAILED


@pytest.mark.parametrize(
    "body",
    [b'{"images": [{"url": "https://x/1"}], "seed": NaN}', b'\xef\xbb\xbf{"images": ["https://x/1"], "a": "\xff"}'],
)
async def test_a_result_that_is_nearly_json_is_read(body):
    """It is paid for: NaN, a byte order mark and invalid UTF-8 affect only their own value."""
    async with answering(web.Response(body=body)) as (client, _):
        answer = await client.result(TICKET)
    assert images_of(answer.output)[0].url == "https://x/1"
    assert answer.raw == body


@pytest.mark.parametrize(("said", "units"), [("0.75", 0.75), ("", None), ("many", None), ("nan", None), ("inf", None), ("-1", None)])  # fmt: skip # noqa: E501
async def test_billable_units_are_a_number_or_nothing(said, units):
    """An invalid amount is ignored: then the reservation counts."""
    async with answering(json_answer(OUTPUT, 200, **{"x-fal-billable-units": said})) as (client, _):
        answer = await client.result(TICKET)
    assert answer.billable_units == units
    assert answer.output == OUTPUT


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(202, CancelOutcome.REQUESTED), (400, CancelOutcome.ALREADY_COMPLETED), (404, CancelOutcome.NOT_FOUND)],
)
async def test_a_cancel_is_answered_by_its_status(status, outcome):
    """400 and 404 are answers to a cancel, not errors."""
    async with answering(json_answer({}, status)) as (client, received):
        assert await client.cancel(TICKET) is outcome
    assert received[0].method == "PUT"


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_a_cancel_without_an_answer_is_a_fault(status):
    """Its outcome is unknown."""
    async with answering(json_answer({}, status)) as (client, _):
        assert (await trouble(client.cancel(TICKET))).reply.status == status


# --- compression ------------------------------------------------------------------------------------------


async def test_nothing_packed_is_asked_for():
    """Bodies are never unpacked, so compression must not be requested."""

    async def packing(request):
        response = web.Response(body=orjson.dumps({"request_id": "abc", "padding": "x" * 5000}))
        response.enable_compression()
        return response

    async with answering(packing) as (client, received):
        assert (await client.submit(ATTEMPT)).request_id == "abc"
    assert received[0].headers["accept-encoding"] == "identity"


async def test_a_gzip_bomb_is_never_unpacked():
    """It would expand a thousandfold; packed it is neither JSON nor an image."""
    bomb = gzip.compress(b" " * 50_000_000)

    async def throw(request):
        return web.Response(body=bomb, headers={"content-encoding": "gzip"})

    async with answering(throw) as (client, _):
        assert (await trouble(client.submit(ATTEMPT))).transport == "malformed"
        assert await client.download(f"{client.url}/a.png") == bomb


# --- once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["submit", "cancel"])
async def test_a_post_on_a_connection_that_the_server_closes_is_sent_once(method):
    """The kept connection closes as the next request is written: a POST is not repeated, an idempotent PUT may be."""
    ticket = b'{"request_id": "abc"}'
    requests = []

    async def close_at_the_second(stream, connection):
        while True:
            head = await request_of(stream)
            requests.append((connection, head.split(b" ")[0]))
            if len(requests) == 2:
                return
            await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(ticket), ticket))

    async with speaking(close_at_the_second) as (client, _):
        await client.submit(ATTEMPT)
        if method == "submit":
            found = await trouble(client.submit(ATTEMPT))
            assert (found.transport, found.sent) == ("disconnected", True)
            assert requests == [(1, b"POST"), (1, b"POST")]
        else:
            assert await client.cancel(TICKET) is CancelOutcome.REQUESTED
            assert requests == [(1, b"POST"), (1, b"PUT"), (2, b"PUT")]


async def test_a_submit_carries_its_body_and_its_idempotency_key():
    """The recorded bytes are the sent bytes; fallback models are disabled."""
    bodies = []

    async def keep(request):
        bodies.append(await request.read())
        return json_answer({"request_id": "abc", "status_url": "http://x/status"})

    async with answering(keep) as (client, received):
        ticket = await client.submit(ATTEMPT)
    assert ticket == Ticket(RequestId("abc"), "http://x/status")
    assert bodies == [ATTEMPT.body]
    headers = received[0].headers
    assert headers["idempotency-key"] == ATTEMPT.idempotency_key
    assert headers["x-app-fal-disable-fallback"] == "true"
    assert received[0].path == f"/{APP_ID}"


# --- redirected reads -------------------------------------------------------------------------------------

READS = {
    "status": (lambda client: client.status(TICKET), {"status": "IN_PROGRESS"}),
    "result": (lambda client: client.result(TICKET), OUTPUT),
}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("phase", READS)
async def test_a_redirected_read_is_followed_inside_the_target(phase, status):
    """Relative and absolute, as a GET with the key."""
    read, body = READS[phase]

    async def hop(request):
        if request.path.endswith("/there"):
            return json_answer(body)
        there = "/moved/again" if "moved" not in request.path else f"{client.url}/there"
        return web.Response(status=status, headers={"location": there})

    async with answering(hop, key=KEY) as (client, received):
        await read(client)
    assert [request.method for request in received] == ["GET"] * 3
    assert [request.path for request in received][1:] == ["/moved/again", "/there"]
    assert [request.headers.get("authorization") for request in received] == [f"Key {KEY}"] * 3


@pytest.mark.parametrize("phase", READS)
async def test_a_read_that_is_redirected_elsewhere_is_refused(phase):
    """The other server gets no request; the message names it, without the path."""
    read, body = READS[phase]
    async with answering(json_answer(body)) as (other, others):
        location = f"{other.url}/catch?token=secret"
        async with answering(web.Response(status=302, headers={"location": location}), key=KEY) as (client, received):
            found = await trouble(read(client))
    assert (found.transport, found.reply, len(received), len(others)) == ("redirect", None, 1, 0)
    assert f"HTTP 302 redirects to {other.url}, which is not the target's own address" in found.detail
    assert "secret" not in found.detail
    assert judge(found, seen=99).action is Action.READ_AGAIN


@pytest.mark.parametrize("phase", READS)
@pytest.mark.parametrize(
    ("status", "headers", "asked"),
    [
        (302, {"location": "/again"}, 6),
        (302, {}, 1),
        (302, {"location": ""}, 1),
        (304, {"location": "/again"}, 1),
        (300, {}, 1),
        (308, {"location": "file:///etc/passwd"}, 1),
        (307, {"location": "http://user:secret@127.0.0.1/x"}, 1),
    ],
)
async def test_a_redirect_that_leads_nowhere_is_given_up(phase, status, headers, asked):
    """In circles, without an address, or with an invalid one: a few requests, and one kind of trouble."""
    read, _ = READS[phase]
    async with answering(web.Response(status=status, headers=headers)) as (client, received):
        found = await trouble(read(client))
    assert (found.transport, len(received)) == ("redirect", asked)
    assert found.detail
    assert "secret" not in found.detail


async def test_a_redirect_to_an_error_is_that_error():
    """The last answer counts."""

    async def hop(request):
        if request.path == "/there":
            return json_answer({"detail": "gone"}, 404)
        return web.Response(status=302, headers={"location": "/there"})

    async with answering(hop) as (client, _):
        found = await trouble(client.result(TICKET))
    assert found.reply is not None
    assert found.reply.status == 404


@pytest.mark.parametrize("call", ["cancel", "upload", "listing"])
async def test_nothing_else_is_redirected_with_the_key(call):
    """A cancel, the start of an upload and a listing: the redirect is the answer."""
    calls = {
        "cancel": lambda client: client.cancel(TICKET),
        "upload": lambda client: client.upload(b"x", "image/png", "a.png"),
        "listing": lambda client: client.listing(0.0, 1.0, None),
    }
    async with answering(web.Response(status=302, headers={"location": "/x"}), key=KEY) as (client, received):
        found = await trouble(calls[call](client))
    assert found.reply is not None
    assert (found.reply.status, len(received)) == (302, 1)


@pytest.mark.parametrize(
    ("answer", "state", "failed"),
    [
        ({"status": "FAILED", "error": "out of memory"}, QueueState.COMPLETED, True),
        ({"status": "succeeded"}, QueueState.COMPLETED, False),
        ({"status": "in_queue", "queue_position": "3"}, QueueState.IN_QUEUE, False),
        ({"status": "IN_QUEUE", "queue_position": None}, QueueState.IN_QUEUE, False),
        ({"status": "BOOTSTRAPPING"}, None, False),
        ({"status": None}, None, False),
        ({"status": 1}, None, False),
        ({}, None, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("code", [200, 202])
async def test_an_odd_status_is_read(answer, state, failed, code):
    """Words that fal does not use, or none at all."""
    async with answering(json_answer(answer, code)) as (client, _):
        status = await client.status(TICKET)
    assert (status.state, status.failed, status.position) == (state, failed, None)


# --- downloads --------------------------------------------------------------------------------------------


async def test_a_download_follows_a_few_redirects():
    """Relative and absolute, at most five."""

    async def hop(request):
        left = int(request.path.strip("/"))
        return web.Response(body=b"here") if not left else web.Response(status=302, headers={"location": str(left - 1)})

    async with answering(hop) as (client, _):
        assert await client.download(f"{client.url}/5") == b"here"
        found = await trouble(client.download(f"{client.url}/6"))
    assert found.transport == "redirect"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher:x"])
async def test_a_download_redirected_out_of_the_web_is_refused(target):
    """Only http and https are requested, and no local file is read."""
    async with answering(web.Response(status=302, headers={"location": target})) as (client, _):
        found = await trouble(client.download(f"{client.url}/a.png"))
    assert found.transport == "bad url"


async def test_a_data_uri_is_decoded_here():
    """Results of `sync_mode` need no network; invalid ones are errors."""
    async with client_at("http://127.0.0.1:1") as client:
        assert await client.download("data:image/png;base64,aGVsbG8=") == b"hello"
        assert (await trouble(client.download("data:image/png;base64,@@@"))).transport == "malformed"


@pytest.mark.parametrize("answer", [{}, {"upload_url": "http://x"}, {"file_url": 1, "upload_url": "http://x"}, []])
async def test_an_upload_answer_without_its_urls_is_malformed(answer):
    """Both are required, as text."""
    async with answering(json_answer(answer)) as (client, received):
        assert (await trouble(client.upload(b"x", "image/png", "a.png"))).transport == "malformed"
    assert len(received) == 1


# --- the key ----------------------------------------------------------------------------------------------


async def test_the_key_goes_to_the_target_and_to_nobody_else():
    """Own origin: with it. An image's server, an upload's server: without it. No `repr` shows it."""

    async def elsewhere_answer(request):
        return web.Response(body=b"image")

    async with answering(elsewhere_answer) as (elsewhere, foreign):

        async def answer(request):
            if "initiate" in request.path:
                return json_answer({"upload_url": f"{elsewhere.url}/put", "file_url": f"{elsewhere.url}/file"})
            urls = {name: f"{elsewhere.url}/{name}" for name in ("status_url", "response_url", "cancel_url")}
            return json_answer({"request_id": "abc", "status": "IN_QUEUE", **urls})

        async with answering(answer, key=KEY) as (client, own):
            ticket = await client.submit(ATTEMPT)
            await client.status(ticket)
            await client.cancel(ticket)
            assert await client.upload(b"x", "image/png", "a.png") == f"{elsewhere.url}/file"
            assert await client.download(f"{elsewhere.url}/file") == b"image"
            assert KEY not in repr(client)
            assert "key=set" in repr(client)
    assert [request.path for request in foreign] == ["/put", "/file"]
    assert all("authorization" not in request.headers for request in foreign)
    assert len(own) == 4
    assert all(request.headers["authorization"] == f"Key {KEY}" for request in own)


async def test_a_call_to_another_origin_never_carries_the_key():
    """The last step checks again, whatever built the call."""
    async with answering(web.Response()) as (elsewhere, foreign), client_at("http://target.invalid", key=KEY) as client:
        await client._exchange("status", Call("GET", f"{elsewhere.url}/status"))
    assert "authorization" not in foreign[0].headers


async def test_a_download_from_the_target_itself_needs_no_key():
    """Result files are public."""
    async with answering(web.Response(body=b"x"), key=KEY) as (client, received):
        await client.download(f"{client.url}/a.png")
    assert "authorization" not in received[0].headers


async def test_a_netrc_entry_does_not_get_in_the_way_of_the_key(monkeypatch, tmp_path):
    """A `.netrc` with an entry for every host is common on shared machines; its passwords must not be sent."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login alice password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with answering(json_answer({"request_id": "abc"}), key=KEY) as (client, received):
        await client.submit(ATTEMPT)
        await client.download(f"{client.url}/a.png")
    assert [request.headers.get("authorization") for request in received] == [f"Key {KEY}", None]


# --- proxies ----------------------------------------------------------------------------------------------


async def test_a_proxy_of_the_environment_is_used_except_for_this_machine(monkeypatch):
    """Corporate networks have one; the embedded endpoint is never behind it."""
    async with answering(json_answer({"request_id": "abc"})) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://me:secret@"))
        async with client_at("http://far.invalid") as far:
            assert (await far.submit(ATTEMPT)).request_id == "abc"
        assert [request.headers["host"] for request in seen] == ["far.invalid"]
        assert seen[0].headers["proxy-authorization"].startswith("Basic ")
        async with answering(json_answer({"request_id": "own"})) as (near, own):
            assert (await near.submit(ATTEMPT)).request_id == "own"
    assert len(seen) == len(own) == 1


async def test_no_proxy_is_honoured(monkeypatch):
    """An excepted host is contacted directly; here it does not exist."""
    async with answering(json_answer({"request_id": "abc"})) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "far.invalid")
        async with client_at("http://far.invalid") as far:
            assert (await trouble(far.submit(ATTEMPT))).transport == "dns"
    assert not seen


async def test_a_proxy_that_is_not_there_leaves_a_submit_unsent(monkeypatch):
    """The connection to the proxy failed: nothing reached the target."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    async with client_at("http://far.invalid") as client:
        found = await trouble(client.submit(ATTEMPT))
    assert (found.transport, found.sent) == ("connect", False)


# --- the translation --------------------------------------------------------------------------------------


def _made(kind: type[BaseException]) -> BaseException:
    """Return an exception as aiohttp itself creates it."""
    key = ConnectionKey("host.invalid", 443, True, True, None, None, None)
    certificate = ssl.SSLCertVerificationError("self-signed")
    if issubclass(kind, aiohttp.ClientConnectorCertificateError):
        return kind(key, certificate)
    if issubclass(kind, aiohttp.ServerFingerprintMismatch):
        return kind(b"a", b"b", "host.invalid", 443)
    if issubclass(kind, aiohttp.ClientConnectorError):
        return kind(key, OSError(111, "refused"))
    if issubclass(kind, aiohttp.ClientResponseError):
        return kind(None, (), status=400)
    if issubclass(kind, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return kind("nonsense")
    return kind()


def _kinds() -> list[type[BaseException]]:
    found = {o for _, o in inspect.getmembers(aiohttp, inspect.isclass) if issubclass(o, aiohttp.ClientError)}
    found |= {TimeoutError, OSError, ConnectionResetError, ValueError, UnicodeError, ssl.SSLError}
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", _kinds(), ids=lambda kind: kind.__name__)
def test_every_exception_of_aiohttp_is_translated(kind):
    """None passes untranslated, each has a kind and a message, and only connection errors count as unsent."""
    found = trouble_of("submit", _made(kind))
    assert found.transport
    assert found.detail.startswith(found.transport)
    before_sending = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL,
                      aiohttp.NonHttpUrlClientError, aiohttp.ClientHttpProxyError)  # fmt: skip
    assert found.sent is not issubclass(kind, before_sending)


def test_what_is_not_aiohttps_is_a_defect():
    """An unknown exception must not count as a network error."""
    with pytest.raises(AssertionError, match="KeyError"):
        trouble_of("submit", KeyError("x"))
