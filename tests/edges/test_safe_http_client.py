"""The one way out, against real web servers on loopback: what is asked, what comes back, what is told of failures.

Two loopback addresses stand for the two sides: 127.0.0.1 for the public internet, 127.0.0.2 for our own network.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ipaddress
import socket
import zlib

import aiohttp
import pytest
from aiohttp import web

from batch.server.egress import http_client as guard_module
from batch.server.egress.http_client import FetchLimits, ResponseTooLarge, SafeHttpClient, Unreachable
from batch.server.egress.source_images import SourceFetcher
from batch.server.egress.ssrf import AddressRefused, private_too, public_only
from batch.server.engines.base import EngineFailure
from batch.server.files.storage import Storage
from tests.edges.serving import ScriptedEngine, result, serving, submit

LIMITS = FetchLimits(size_bytes=1000, seconds=20.0)


def outside_only(address):
    """A strict rule of the tests' own: 127.0.0.1 is the internet, nothing else is."""
    return address == ipaddress.ip_address("127.0.0.1")


class Server:
    """A web server on one loopback address that keeps what it was asked."""

    def __init__(self, handler, host="127.0.0.1", port=0):
        self.seen = []
        self._handler = handler
        self._host, self._port = host, port

    async def __aenter__(self):
        async def handle(request):
            self.seen.append((request.host, request.path))
            return await self._handler(request)

        self._runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://{self._host}:{self.port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()


async def send_image(request):
    return web.Response(body=b"image")


def names(**addresses):
    """A resolver that knows these names; a name's answers may be a list of answers, one for each question."""
    asked = []

    async def lookup(host):
        asked.append(host)
        known = addresses.get(host.partition(".")[0])
        if known is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if known and isinstance(known[0], list):
            return known.pop(0) if len(known) > 1 else known[0]
        return known

    lookup.asked = asked
    return lookup


async def refused(guard, url, kind=AddressRefused):
    with pytest.raises(kind) as caught:
        await guard.fetch(url, LIMITS)
    return caught.value


# --- addresses --------------------------------------------------------------------------------------------


def test_the_strict_rule_is_the_default_and_keeps_loopback_out():
    """A guard that was told nothing asks the public internet only: by literal and by name."""

    async def use():
        async with Server(send_image) as server, SafeHttpClient() as guard:
            for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"):
                await refused(guard, f"http://{host}:{server.port}/")
            assert server.seen == []
        async with Server(send_image) as server, SafeHttpClient(private_too) as guard:
            for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1"):
                assert await guard.fetch(f"http://{host}:{server.port}/", LIMITS) == b"image"
            assert server.seen[2] == (f"127.0.0.1:{server.port}", "/")

    asyncio.run(use())


def test_a_name_that_resolves_into_our_network_is_refused_before_anything_is_sent():
    """The address decides, not the name; a name with several addresses is asked at those that are permitted."""

    async def use():
        lookup = names(inside=["127.0.0.2"], metadata=["169.254.169.254"], both=["127.0.0.2", "127.0.0.1"])
        async with (
            Server(send_image) as outside,
            Server(send_image, "127.0.0.2", outside.port) as inside,
            SafeHttpClient(outside_only, lookup) as guard,
        ):
            await refused(guard, f"http://inside.example:{outside.port}/")
            await refused(guard, f"http://metadata.example:{outside.port}/latest/meta-data/")
            assert await guard.fetch(f"http://both.example:{outside.port}/", LIMITS) == b"image"
            assert inside.seen == []
            assert outside.seen == [(f"both.example:{outside.port}", "/")]

    asyncio.run(use())


def test_the_address_that_was_judged_is_the_one_that_is_connected_to():
    """A name that changes between two questions is asked once for each connection, and never again after it."""

    async def use():
        lookup = names(rebinds=[["127.0.0.1"], ["127.0.0.2"]])
        async with (
            Server(send_image) as outside,
            Server(send_image, "127.0.0.2", outside.port) as inside,
            SafeHttpClient(outside_only, lookup) as guard,
        ):
            url = f"http://rebinds.example:{outside.port}/"
            assert await guard.fetch(url, LIMITS) == b"image"
            assert lookup.asked == ["rebinds.example"]
            assert await guard.fetch(url, LIMITS) == b"image"  # over the same connection
            assert lookup.asked == ["rebinds.example"]
        async with SafeHttpClient(outside_only, lookup) as guard, Server(send_image, "127.0.0.2") as inside:
            await refused(guard, f"http://rebinds.example:{inside.port}/")
            assert inside.seen == []

    asyncio.run(use())


def test_a_literal_that_gets_past_the_check_is_stopped_at_its_socket(monkeypatch):
    """The last look is at what is really connected to, whatever was checked before."""

    async def use():
        async with Server(send_image, "127.0.0.2") as inside, SafeHttpClient(outside_only) as guard:
            monkeypatch.setattr(guard_module, "check_url", lambda url, _: aiohttp.client.URL(url))
            await refused(guard, inside.url, Unreachable)
            assert inside.seen == []

    asyncio.run(use())


@pytest.mark.parametrize(
    "location",
    [
        *("http://169.254.169.254/latest/meta-data/", "http://127.0.0.2:{port}/", "http://inside.example:{port}/"),
        *("http://2130706434:{port}/", "file:///etc/passwd", "ftp://127.0.0.1/", "//127.0.0.2:{port}/x"),
        *("http://user:secret@127.0.0.1:{port}/", "http://127.0.0.1:22/", "http://[", "gopher://x/"),
    ],
)
def test_a_redirect_is_judged_like_the_first_url(location):
    """To metadata, into our network, by name or number, to another protocol or port: refused, untold where to."""

    async def use():
        async def handler(request):
            return web.Response(status=302, headers={"location": location.format(port=inside.port)})

        async with Server(send_image, "127.0.0.2") as inside, Server(handler) as outside:
            async with SafeHttpClient(outside_only, names(inside=["127.0.0.2"])) as guard:
                refusal = await refused(guard, outside.url)
            assert inside.seen == []
            assert len(outside.seen) == 1
            for secret in ("169.254", "127.0.0.2", "inside", "secret", "passwd"):
                assert secret not in str(refusal)

    asyncio.run(use())


def test_redirects_are_followed_within_bounds():
    """Relative and absolute ones, up to the limit; a loop ends there."""

    async def use():
        async def handler(request):
            hops = int(request.query.get("hops", "0"))
            if request.path == "/loop":
                return web.Response(status=307, headers={"location": "/loop"})
            if hops:
                base = outside.url if hops % 2 else ""
                return web.Response(status=301 + hops % 2, headers={"location": f"{base}/?hops={hops - 1}"})
            return web.Response(body=b"image")

        async with Server(handler) as outside, SafeHttpClient(outside_only) as guard:
            assert await guard.fetch(f"{outside.url}/?hops=5", LIMITS) == b"image"
            await refused(guard, f"{outside.url}/?hops=6", Unreachable)
            outside.seen.clear()
            failure = await refused(guard, f"{outside.url}/loop", Unreachable)
            assert "redirects more than 5 times" in str(failure)
            assert len(outside.seen) == 6

    asyncio.run(use())


# --- size and time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False], ids=["length told", "length hidden"])
def test_a_body_is_cut_off_at_the_limit(told):
    """One byte more than the limit is `ResponseTooLarge`, whether or not its length was told; the limit itself is
    fine.
    """

    async def use():
        async def handler(request):
            answer = web.StreamResponse()
            if told:
                answer.content_length = int(request.query["size"])
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                await answer.write(b"x" * int(request.query["size"]))
            return answer

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            assert len(await guard.fetch(f"{server.url}/?size=1000", LIMITS)) == 1000
            await refused(guard, f"{server.url}/?size=1001", ResponseTooLarge)

    asyncio.run(use())


def test_an_endless_body_is_left_after_the_limit():
    """What is not wanted is not read: the sender sees the connection close."""

    async def use():
        sent, over = 0, asyncio.Event()

        async def handler(request):
            nonlocal sent
            answer = web.StreamResponse()
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await answer.write(b"x" * 65536)
                    sent += 65536
            over.set()
            return answer

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            await refused(guard, server.url, ResponseTooLarge)
            await asyncio.wait_for(over.wait(), 10)
        assert sent < 64 * 2**20

    asyncio.run(use())


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("X-GZIP", gzip.compress)]
)
def test_a_packed_body_is_unpacked_up_to_the_limit(encoding, pack):
    """The limit is on what comes out: a bomb of 50 MB is dropped after 1001 bytes."""

    async def use():
        async def handler(request):
            size = int(request.query["size"])
            body = pack(bytes(size))[: -1 if "cut" in request.query else None]
            return web.Response(body=body, headers={"content-encoding": encoding})

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            assert await guard.fetch(f"{server.url}/?size=1000", LIMITS) == bytes(1000)
            await refused(guard, f"{server.url}/?size=1001", ResponseTooLarge)
            await refused(guard, f"{server.url}/?size=50000000", ResponseTooLarge)
            await refused(guard, f"{server.url}/?size=1000&cut", Unreachable)

    asyncio.run(use())


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_a_packing_that_was_not_asked_for_is_refused(encoding):
    """Only what can be unpacked within bounds is unpacked."""

    async def use():
        async def handler(request):
            assert request.headers["accept-encoding"] == "identity"
            return web.Response(body=b"x", headers={"content-encoding": encoding})

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            await refused(guard, server.url, Unreachable)

    asyncio.run(use())


def test_a_slow_body_is_given_up_after_the_whole_time():
    """A byte now and then does not keep a fetch alive, nor does a redirect start its clock anew."""

    async def use():
        over = asyncio.Event()

        async def handler(request):
            if request.path != "/drip":
                return web.Response(status=302, headers={"location": "/drip"})
            answer = web.StreamResponse()
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                while not over.is_set():
                    await answer.write(b"x")
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(over.wait(), 0.02)
            return answer

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            started = asyncio.get_running_loop().time()
            with pytest.raises(Unreachable, match="took too long") as caught:
                await guard.fetch(server.url, FetchLimits(10**6, seconds=0.3))
            assert asyncio.get_running_loop().time() - started < 5
            assert caught.value.retryable
            over.set()

    asyncio.run(use())


def test_a_lookup_that_hangs_is_within_the_time_too():
    """DNS is part of the fetch."""

    async def use():
        async def lookup(host):
            await asyncio.Event().wait()

        async with SafeHttpClient(outside_only, lookup) as guard:
            with pytest.raises(Unreachable, match="took too long"):
                await guard.fetch("http://hangs.example/", FetchLimits(1000, seconds=0.1))

    asyncio.run(use())


# --- what is told -----------------------------------------------------------------------------------------


def test_a_name_of_our_network_cannot_be_told_from_one_that_does_not_exist():
    """Otherwise the server would say which names our own DNS knows."""

    async def use():
        lookup = names(inside=["10.1.2.3"], empty=[])
        async with SafeHttpClient(public_only, lookup) as guard:
            kinds = (AddressRefused, Unreachable)
            told = [await refused(guard, f"http://{name}.corp/", kinds) for name in ("inside", "missing", "empty")]
        assert len({(str(error), error.retryable) for error in told}) == 1
        assert "10.1" not in str(told[0])

    asyncio.run(use())


def test_failures_of_the_network_name_no_address():
    """Refused connections, broken answers, certificates: our own words, not those of the libraries."""

    async def broken(reader, writer):
        await reader.read(1000)
        writer.write(b"SSH-2.0-OpenSSH_9.2 secret\r\n")
        await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def use():
        async with Server(send_image) as server:
            free = server.port
        hello = await asyncio.start_server(broken, "127.0.0.1", 0)
        port = hello.sockets[0].getsockname()[1]
        async with SafeHttpClient(outside_only, names(name=["127.0.0.1"])) as guard, hello:
            for url in (
                f"http://name.example:{free}/",
                f"http://name.example:{port}/",
                f"https://name.example:{port}/",
            ):
                told = await refused(guard, url, Unreachable)
                for secret in ("127.0.0.1", "SSH", "secret", "name.example", str(port), "ssl", "Errno"):
                    assert secret not in str(told), url

    asyncio.run(use())


@pytest.mark.parametrize(("status", "retryable"), [(204, False), (404, False), (403, False), (429, True), (503, True)])
def test_only_200_is_a_body(status, retryable):
    """Another try may help where the other server itself is in trouble."""

    async def use():
        async def handler(request):
            return web.Response(status=status)

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            failure = await refused(guard, server.url, Unreachable)
            assert str(status) in str(failure)
            assert failure.retryable is retryable

    asyncio.run(use())


def test_nothing_of_ours_is_sent_along():
    """No cookies from one host to the next, no key, no proxy of the environment, no version."""

    async def use(monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.2:9")
        heads = []

        async def handler(request):
            heads.append(dict(request.headers))
            return web.Response(body=b"x", headers={"set-cookie": "a=b"})

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            await guard.fetch(server.url, LIMITS)
            await guard.fetch(server.url, LIMITS)
        assert {name.lower() for head in heads for name in head} == {"host", "accept", "accept-encoding", "user-agent"}
        assert heads[0]["User-Agent"] == "restyle"

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(use(monkeypatch))


def test_a_post_follows_no_redirect_and_reads_no_answer():
    """The status is all that is wanted; an endless answer does not hold it up."""

    async def use():
        over = asyncio.Event()

        async def handler(request):
            body = await request.read()
            if request.path == "/redirect":
                return web.Response(status=307, headers={"location": "/other"})
            assert (body, request.headers["x-own"]) == (b"hello", "1")
            answer = web.StreamResponse(status=201)
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                while not over.is_set():
                    await answer.write(b"x" * 1000)
                    await asyncio.sleep(0)
            return answer

        async with Server(handler) as server, SafeHttpClient(outside_only) as guard:
            assert await guard.post(f"{server.url}/a", b"hello", {"x-own": "1"}, 10.0) == 201
            assert await guard.post(f"{server.url}/redirect", b"hello", {}, 10.0) == 307
            assert [path for _, path in server.seen] == ["/a", "/redirect"]
            over.set()

    asyncio.run(use())


# --- source images --------------------------------------------------------------------------------------


def test_the_faults_of_a_download_are_fal_s_model_errors(tmp_path):
    """422 with the type that fal names, where it is, the URL and the limit; a redirect to metadata among them."""

    async def handler(request):
        if request.path == "/away":
            return web.Response(status=302, headers={"location": "http://169.254.169.254/latest/meta-data/"})
        if request.path == "/large":
            return web.Response(body=bytes(1001))
        return web.Response(status=404)

    async def use():
        async with Server(handler) as server, Storage(tmp_path) as storage, SafeHttpClient(outside_only) as guard:
            sources = SourceFetcher(storage, guard, limit_bytes=1000)
            for path, kind, retryable in (
                ("/away", "file_download_error", False),
                ("/large", "file_too_large", False),
                ("/none", "file_download_error", False),
            ):
                with pytest.raises(EngineFailure) as caught:
                    await sources.fetch(server.url + path)
                failure = caught.value
                assert (failure.status, failure.type, failure.retryable) == (422, kind, retryable)
                assert failure.loc == ("body", "image_url")
                assert failure.ctx == ({"max_size": 1000} if path == "/large" else {})
                assert "169.254" not in str(failure)

    asyncio.run(use())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "0x7f000001"])
def test_a_server_on_its_own_keeps_its_network_to_itself(tmp_path, host):
    """`restyle serve` refuses such an image by default, with the whole model error; `--allow-private` lets it in."""

    async def use():
        async with Server(send_image) as server:
            url = f"http://{host}:{server.port}/a.png"
            async with serving(tmp_path, ScriptedEngine(fetches_source=True)) as session:
                status, headers, body = await result(session, await submit(session, image_url=url))
                assert status == 422
                (error,) = body["detail"]
                assert (error["type"], error["loc"]) == ("file_download_error", ["body", "image_url"])
                assert error["url"] == "https://docs.fal.ai/errors#file_download_error"
                assert error["input"] == url
                assert headers["x-fal-billable-units"] == "0"
            assert server.seen == []
            if host != "169.254.169.254":
                async with serving(tmp_path, ScriptedEngine(fetches_source=True), allow_private=True) as session:
                    assert (await result(session, await submit(session, image_url=url)))[0] == 200

    asyncio.run(use())
