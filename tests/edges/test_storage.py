"""The server's files, and the source images of requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib

import pytest
from aiohttp import web

from batch.errors import StorageError
from batch.server.egress import source_images as sources_module
from batch.server.egress.http_client import SafeHttpClient
from batch.server.egress.source_images import SourceFetcher, parse_data_uri
from batch.server.egress.ssrf import private_too
from batch.server.engines.base import EngineFailure
from batch.server.files.storage import Storage, UploadTooLarge
from tests.quick_time import run_at

SMALL, LARGE = b"small image", b"large image" * 10_000


def in_storage(root, use, speed=1.0):
    """Run `use(storage)` with a storage in `root`, like one run of a server."""

    async def life():
        async with Storage(root) as storage:
            return await use(storage)

    return run_at(speed, life())


async def pieces(*chunks):
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize("data", [SMALL, LARGE, b""], ids=["small", "large", "empty"])
def test_a_saved_file_is_found_by_the_next_server(tmp_path, data):
    """Small files are in a database, large ones on disk; readers see no difference."""

    async def first(storage):
        return await storage.save(data, "image/png")

    async def second(storage):
        assert await storage.read(path) == data
        assert storage.path_in("http://10.1.2.3:99" + path + "?x=1") == path

    path = in_storage(tmp_path, first)
    assert path.endswith(".png")
    in_storage(tmp_path, second)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_equal_bytes_are_stored_once(tmp_path, data):
    """The path depends on the content and type only."""

    async def use(storage):
        one, two = await asyncio.gather(storage.save(data, "image/png"), storage.save(data, "image/png"))
        three = await storage.receive(pieces(data), "image/png", 1 << 20)
        assert one == two == three
        return await storage.save(data + b".", "image/png") != one

    assert in_storage(tmp_path, use)


def test_a_name_cannot_be_derived_from_the_content_alone(tmp_path):
    """The same bytes have another name in another data dir: names are keyed hashes."""

    async def use(storage):
        return await storage.save(SMALL, "image/png")

    assert in_storage(tmp_path / "a", use) != in_storage(tmp_path / "b", use)
    assert (tmp_path / "a" / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "path",
    [
        "/files/../secret",
        "/files/ab/../../secret",
        "/files/ab/..%2f..%2fsecret",
        "/files//etc/passwd",
        "/files/ab/" + "c" * 32,  # the prefix does not match the name
        "/files/ab/ab" + "0" * 30 + ".png/..",
        "/files/ab/ab" + "0" * 30 + ".PNG\x00",
        "/files/ab/ab" + "0" * 31,
        "file:///etc/passwd",
        "http://[::1/files",
    ],
)
def test_an_invalid_path_finds_nothing(tmp_path, path):
    """Traversal, absolute paths and odd bytes find nothing."""

    async def use(storage):
        assert storage.path_in(path) is None
        assert await storage.find(path) is None

    in_storage(tmp_path, use)


def test_an_upload_that_grows_too_large_leaves_nothing(tmp_path):
    """No complete and no partial file remains."""

    async def use(storage):
        with pytest.raises(UploadTooLarge):
            await storage.receive(pieces(b"x" * 900_000, b"x" * 900_000, b"x" * 900_000), "image/png", 2_000_000)

    in_storage(tmp_path, use)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 500_000]
    assert not list((tmp_path / "incoming").iterdir())


def test_a_partial_file_of_a_killed_server_is_removed(tmp_path):
    """A file that was never renamed into place is deleted at the start."""
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "half").write_bytes(b"ha")

    async def use(storage):
        return storage

    in_storage(tmp_path, use)
    assert not list((tmp_path / "incoming").iterdir())


def test_a_reserved_name_can_be_written_with_its_token_only(tmp_path):
    """The token is a signature of the path and stays valid after a restart."""

    async def first(storage):
        return storage.reserve("image/jpeg"), storage.reserve("image/jpeg")

    async def second(storage):
        assert storage.may_write(one.path, one.token)
        assert not storage.may_write(one.path, other.token)
        assert not storage.may_write(one.path, "ü")
        await storage.receive(pieces(SMALL), None, 100, one.path)
        assert await storage.read(one.path) == SMALL

    one, other = in_storage(tmp_path, first)
    in_storage(tmp_path, second)


def test_a_failed_write_is_a_storage_error(tmp_path):
    """The caller gets a StorageError; nothing is reported as stored."""

    async def use(storage):
        for folder in (tmp_path / "files", tmp_path / "incoming"):
            folder.rmdir()
            folder.write_bytes(b"in the way")
        with pytest.raises(StorageError, match="free disk space"):
            await storage.save(LARGE, "image/png")

    in_storage(tmp_path, use)


# --- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "data", "content_type"),
    [
        ("data:image/png;base64," + base64.b64encode(b"abc").decode(), b"abc", "image/png"),
        ("DATA:image/png;charset=x;BASE64,YWJj", b"abc", "image/png"),
        ("data:image/png;base64,YWI%3D", b"ab", "image/png"),
        ("data:,a%20b", b"a b", "text/plain"),
    ],
)
def test_data_uris_are_decoded(uri, data, content_type):
    """Base64 and percent-encoding, as in RFC 2397."""
    assert parse_data_uri(uri) == (data, content_type)


@contextlib.asynccontextmanager
async def web_server(handler):
    """Run a web server on loopback; yield its origin."""
    server = web.Server(handler)
    runner = web.ServerRunner(server, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def fetched(root, handler, path="/a.png", **limits):
    """Fetch a path from a server with this handler."""

    async def use(storage):
        async with web_server(handler) as origin, SafeHttpClient(private_too) as client:
            return await SourceFetcher(storage, client, **limits).fetch(origin + path)

    return in_storage(root, use)


def test_an_image_is_fetched_over_redirects(tmp_path):
    """Up to five redirects are followed."""

    async def handler(request):
        hops = int(request.query.get("hops", "5"))
        if hops:
            raise web.HTTPFound(f"/a.png?hops={hops - 1}")
        return web.Response(body=b"image")

    assert fetched(tmp_path, handler) == b"image"
    with pytest.raises(EngineFailure, match="redirects"):
        fetched(tmp_path, handler, "/a.png?hops=6")


@pytest.mark.parametrize(("status", "retryable"), [(404, False), (403, False), (429, True), (503, True)])
def test_an_error_of_the_source_server_is_a_download_error(tmp_path, status, retryable):
    """The error is 422 `file_download_error`, retryable for 5xx, 408 and 429."""

    async def handler(request):
        return web.Response(status=status)

    with pytest.raises(EngineFailure, match=str(status)) as caught:
        fetched(tmp_path, handler)
    assert (caught.value.status, caught.value.type) == (422, "file_download_error")
    assert caught.value.retryable is retryable


@pytest.mark.parametrize("announced", [True, False], ids=["with length", "without length"])
def test_a_source_above_the_limit_is_cut_off(tmp_path, announced):
    """The error is `file_too_large` with the limit, with or without a Content-Length."""

    async def handler(request):
        if announced:
            return web.Response(body=b"x" * 1001)
        answer = web.StreamResponse()
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(1001):
                await answer.write(b"x")
        return answer

    with pytest.raises(EngineFailure) as caught:
        fetched(tmp_path, handler, limit_bytes=1000)
    assert (caught.value.type, caught.value.ctx) == ("file_too_large", {"max_size": 1000})


def test_a_silent_server_is_given_up(tmp_path):
    """The whole download has a timeout; the error is retryable."""

    async def use(storage):
        over = asyncio.Event()

        async def handler(request):
            await over.wait()
            return web.Response()

        async with web_server(handler) as origin, SafeHttpClient(private_too) as client:
            with pytest.raises(EngineFailure, match="could not be fetched") as caught:
                await SourceFetcher(storage, client).fetch(origin + "/a.png")
            over.set()
        assert caught.value.retryable

    in_storage(tmp_path, use, speed=sources_module.FETCH_SECONDS / 0.2)


@pytest.mark.parametrize("url", ["ftp://host/a.png", "file:///etc/passwd", "/a.png", "http://", "nonsense", "http://["])
def test_anything_but_http_and_data_is_refused(tmp_path, url):
    """Local files and other protocols are refused with a clear error."""

    async def use(storage):
        async with SafeHttpClient() as client:
            with pytest.raises(EngineFailure) as caught:
                await SourceFetcher(storage, client).fetch(url)
            assert caught.value.type == "file_download_error"
            assert not caught.value.retryable

    in_storage(tmp_path, use)


def test_an_invalid_data_uri_is_an_image_load_error(tmp_path):
    """It fails before the engine runs."""

    async def use(storage):
        async with SafeHttpClient() as client:
            with pytest.raises(EngineFailure) as caught:
                await SourceFetcher(storage, client).fetch("data:image/png;base64,!!!")
            assert caught.value.type == "image_load_error"

    in_storage(tmp_path, use)


def test_own_files_are_read_from_disk_for_any_origin(tmp_path):
    """A server on another port still recognises its files."""

    async def use(storage):
        path = await storage.save(LARGE, "image/png")
        async with SafeHttpClient() as client:
            source_fetcher = SourceFetcher(storage, client)
            assert await source_fetcher.fetch("http://127.0.0.1:1" + path) == LARGE
            assert await source_fetcher.fetch(path) == LARGE

    in_storage(tmp_path, use)
