"""The SSRF-safe HTTP client, against real web servers on loopback: requests, responses and error messages.

Two loopback addresses represent the two sides: 127.0.0.1 the public internet, 127.0.0.2 the private network.
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

from batch.server.egress import http_client as http_client_module
from batch.server.egress.http_client import FetchLimits, ResponseTooLarge, SafeHttpClient, Unreachable
from batch.server.egress.source_images import SourceFetcher
from batch.server.egress.ssrf import AddressRefused, private_too, public_only
from batch.server.engines.base import EngineFailure
from batch.server.files.storage import Storage
from tests.edges.serving import ScriptedEngine, result, serving, submit

LIMITS = FetchLimits(size_bytes=1000, seconds=20.0)


def outside_only(address):
    """A strict rule for tests: 127.0.0.1 is the internet, everything else is private."""
    return address == ipaddress.ip_address("127.0.0.1")


class Server:
    """A web server on a loopback address that records its requests."""

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
    """A resolver for these names; a list of lists gives one answer per lookup."""
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


async def refused(client, url, kind=AddressRefused):
    with pytest.raises(kind) as caught:
        await client.fetch(url, LIMITS)
    return caught.value


# --- addresses --------------------------------------------------------------------------------------------


def test_the_default_rule_refuses_loopback():
    """A client without options connects to public addresses only, for literals and names."""

    async def use():
        async with Server(send_image) as server, SafeHttpClient() as client:
            for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"):
                await refused(client, f"http://{host}:{server.port}/")
            assert server.seen == []
        async with Server(send_image) as server, SafeHttpClient(private_too) as client:
            for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1"):
                assert await client.fetch(f"http://{host}:{server.port}/", LIMITS) == b"image"
            assert server.seen[2] == (f"127.0.0.1:{server.port}", "/")

    asyncio.run(use())


def test_a_name_with_a_private_address_is_refused_before_sending():
    """The address decides, not the name; for several addresses, only permitted ones are used."""

    async def use():
        lookup = names(inside=["127.0.0.2"], metadata=["169.254.169.254"], both=["127.0.0.2", "127.0.0.1"])
        async with (
            Server(send_image) as outside,
            Server(send_image, "127.0.0.2", outside.port) as inside,
            SafeHttpClient(outside_only, lookup) as client,
        ):
            await refused(client, f"http://inside.example:{outside.port}/")
            await refused(client, f"http://metadata.example:{outside.port}/latest/meta-data/")
            assert await client.fetch(f"http://both.example:{outside.port}/", LIMITS) == b"image"
            assert inside.seen == []
            assert outside.seen == [(f"both.example:{outside.port}", "/")]

    asyncio.run(use())


def test_the_client_connects_to_the_checked_address():
    """A name is resolved once per connection, so that a change between check and connect has no effect."""

    async def use():
        lookup = names(rebinds=[["127.0.0.1"], ["127.0.0.2"]])
        async with (
            Server(send_image) as outside,
            Server(send_image, "127.0.0.2", outside.port) as inside,
            SafeHttpClient(outside_only, lookup) as client,
        ):
            url = f"http://rebinds.example:{outside.port}/"
            assert await client.fetch(url, LIMITS) == b"image"
            assert lookup.asked == ["rebinds.example"]
            assert await client.fetch(url, LIMITS) == b"image"  # over the same connection
            assert lookup.asked == ["rebinds.example"]
        async with SafeHttpClient(outside_only, lookup) as client, Server(send_image, "127.0.0.2") as inside:
            await refused(client, f"http://rebinds.example:{inside.port}/")
            assert inside.seen == []

    asyncio.run(use())


def test_the_socket_check_refuses_an_unchecked_literal(monkeypatch):
    """The socket checks the address that it connects to, independent of earlier checks."""

    async def use():
        async with Server(send_image, "127.0.0.2") as inside, SafeHttpClient(outside_only) as client:
            monkeypatch.setattr(http_client_module, "check_url", lambda url, _: aiohttp.client.URL(url))
            await refused(client, inside.url, Unreachable)
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
def test_a_redirect_is_checked_like_the_first_url(location):
    """To metadata, private networks, other protocols or ports: refused, without the target in the message."""

    async def use():
        async def handler(request):
            return web.Response(status=302, headers={"location": location.format(port=inside.port)})

        async with Server(send_image, "127.0.0.2") as inside, Server(handler) as outside:
            async with SafeHttpClient(outside_only, names(inside=["127.0.0.2"])) as client:
                refusal = await refused(client, outside.url)
            assert inside.seen == []
            assert len(outside.seen) == 1
            for secret in ("169.254", "127.0.0.2", "inside", "secret", "passwd"):
                assert secret not in str(refusal)

    asyncio.run(use())


def test_redirects_are_followed_up_to_the_limit():
    """Relative and absolute redirects are followed up to the limit, which also ends a loop."""

    async def use():
        async def handler(request):
            hops = int(request.query.get("hops", "0"))
            if request.path == "/loop":
                return web.Response(status=307, headers={"location": "/loop"})
            if hops:
                base = outside.url if hops % 2 else ""
                return web.Response(status=301 + hops % 2, headers={"location": f"{base}/?hops={hops - 1}"})
            return web.Response(body=b"image")

        async with Server(handler) as outside, SafeHttpClient(outside_only) as client:
            assert await client.fetch(f"{outside.url}/?hops=5", LIMITS) == b"image"
            await refused(client, f"{outside.url}/?hops=6", Unreachable)
            outside.seen.clear()
            failure = await refused(client, f"{outside.url}/loop", Unreachable)
            assert "redirects more than 5 times" in str(failure)
            assert len(outside.seen) == 6

    asyncio.run(use())


# --- size and time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["with length", "without length"])
def test_a_body_is_cut_off_at_the_limit(announced):
    """A body one byte above the limit is `ResponseTooLarge`, with or without a Content-Length; the limit is allowed."""

    async def use():
        async def handler(request):
            answer = web.StreamResponse()
            if announced:
                answer.content_length = int(request.query["size"])
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                await answer.write(b"x" * int(request.query["size"]))
            return answer

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            assert len(await client.fetch(f"{server.url}/?size=1000", LIMITS)) == 1000
            await refused(client, f"{server.url}/?size=1001", ResponseTooLarge)

    asyncio.run(use())


def test_an_endless_body_is_aborted_at_the_limit():
    """The client stops reading and closes the connection."""

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

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            await refused(client, server.url, ResponseTooLarge)
            await asyncio.wait_for(over.wait(), 10)
        assert sent < 64 * 2**20

    asyncio.run(use())


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("X-GZIP", gzip.compress)]
)
def test_a_compressed_body_is_decompressed_up_to_the_limit(encoding, pack):
    """The limit applies to the decompressed size: a bomb of 50 MB is dropped after 1001 bytes."""

    async def use():
        async def handler(request):
            size = int(request.query["size"])
            body = pack(bytes(size))[: -1 if "cut" in request.query else None]
            return web.Response(body=body, headers={"content-encoding": encoding})

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            assert await client.fetch(f"{server.url}/?size=1000", LIMITS) == bytes(1000)
            await refused(client, f"{server.url}/?size=1001", ResponseTooLarge)
            await refused(client, f"{server.url}/?size=50000000", ResponseTooLarge)
            await refused(client, f"{server.url}/?size=1000&cut", Unreachable)

    asyncio.run(use())


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_an_unknown_content_encoding_is_rejected(encoding):
    """Only encodings that can be decompressed with a limit are accepted."""

    async def use():
        async def handler(request):
            assert request.headers["accept-encoding"] == "identity"
            return web.Response(body=b"x", headers={"content-encoding": encoding})

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            await refused(client, server.url, Unreachable)

    asyncio.run(use())


def test_a_slow_body_times_out():
    """The timeout covers the whole fetch: single bytes and redirects do not extend it."""

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

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            started = asyncio.get_running_loop().time()
            with pytest.raises(Unreachable, match="took too long") as caught:
                await client.fetch(server.url, FetchLimits(10**6, seconds=0.3))
            assert asyncio.get_running_loop().time() - started < 5
            assert caught.value.retryable
            over.set()

    asyncio.run(use())


def test_a_hanging_lookup_times_out():
    """The timeout includes DNS."""

    async def use():
        async def lookup(host):
            await asyncio.Event().wait()

        async with SafeHttpClient(outside_only, lookup) as client:
            with pytest.raises(Unreachable, match="took too long"):
                await client.fetch("http://hangs.example/", FetchLimits(1000, seconds=0.1))

    asyncio.run(use())


# --- error messages ---------------------------------------------------------------------------------------


def test_a_private_name_is_indistinguishable_from_an_unknown_one():
    """Otherwise a client could find out which names the private DNS knows."""

    async def use():
        lookup = names(inside=["10.1.2.3"], empty=[])
        async with SafeHttpClient(public_only, lookup) as client:
            kinds = (AddressRefused, Unreachable)
            told = [await refused(client, f"http://{name}.corp/", kinds) for name in ("inside", "missing", "empty")]
        assert len({(str(error), error.retryable) for error in told}) == 1
        assert "10.1" not in str(told[0])

    asyncio.run(use())


def test_network_errors_contain_no_address():
    """Refused connections, invalid responses, certificates: no text of the libraries."""

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
        async with SafeHttpClient(outside_only, names(name=["127.0.0.1"])) as client, hello:
            for url in (
                f"http://name.example:{free}/",
                f"http://name.example:{port}/",
                f"https://name.example:{port}/",
            ):
                told = await refused(client, url, Unreachable)
                for secret in ("127.0.0.1", "SSH", "secret", "name.example", str(port), "ssl", "Errno"):
                    assert secret not in str(told), url

    asyncio.run(use())


@pytest.mark.parametrize(("status", "retryable"), [(204, False), (404, False), (403, False), (429, True), (503, True)])
def test_only_status_200_has_a_body(status, retryable):
    """Server errors are retryable."""

    async def use():
        async def handler(request):
            return web.Response(status=status)

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            failure = await refused(client, server.url, Unreachable)
            assert str(status) in str(failure)
            assert failure.retryable is retryable

    asyncio.run(use())


def test_no_cookies_or_secrets_are_sent():
    """No cookies, no key, no proxy from the environment, no version."""

    async def use(monkeypatch):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.2:9")
        heads = []

        async def handler(request):
            heads.append(dict(request.headers))
            return web.Response(body=b"x", headers={"set-cookie": "a=b"})

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            await client.fetch(server.url, LIMITS)
            await client.fetch(server.url, LIMITS)
        assert {name.lower() for head in heads for name in head} == {"host", "accept", "accept-encoding", "user-agent"}
        assert heads[0]["User-Agent"] == "restyle"

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(use(monkeypatch))


def test_a_post_follows_no_redirect_and_reads_no_body():
    """Only the status is read; an endless body does not block."""

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

        async with Server(handler) as server, SafeHttpClient(outside_only) as client:
            assert await client.post(f"{server.url}/a", b"hello", {"x-own": "1"}, 10.0) == 201
            assert await client.post(f"{server.url}/redirect", b"hello", {}, 10.0) == 307
            assert [path for _, path in server.seen] == ["/a", "/redirect"]
            over.set()

    asyncio.run(use())


# --- source images --------------------------------------------------------------------------------------


def test_download_errors_are_fal_s_model_errors(tmp_path):
    """422 with fal's type, the location, the URL and the limit, also for a redirect to metadata."""

    async def handler(request):
        if request.path == "/away":
            return web.Response(status=302, headers={"location": "http://169.254.169.254/latest/meta-data/"})
        if request.path == "/large":
            return web.Response(body=bytes(1001))
        return web.Response(status=404)

    async def use():
        async with Server(handler) as server, Storage(tmp_path) as storage, SafeHttpClient(outside_only) as client:
            source_fetcher = SourceFetcher(storage, client, limit_bytes=1000)
            for path, kind, retryable in (
                ("/away", "file_download_error", False),
                ("/large", "file_too_large", False),
                ("/none", "file_download_error", False),
            ):
                with pytest.raises(EngineFailure) as caught:
                    await source_fetcher.fetch(server.url + path)
                failure = caught.value
                assert (failure.status, failure.type, failure.retryable) == (422, kind, retryable)
                assert failure.loc == ("body", "image_url")
                assert failure.ctx == ({"max_size": 1000} if path == "/large" else {})
                assert "169.254" not in str(failure)

    asyncio.run(use())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "0x7f000001"])
def test_a_server_refuses_private_addresses_by_default(tmp_path, host):
    """The server refuses a private image URL with a complete model error; `--allow-private` permits it."""

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
