"""Invalid requests get a clear error, never a 500 or a stack trace, and the server keeps running."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import itertools
import re
import struct
import zlib

import orjson
import pytest
from PIL import Image

from batch.server.engines.preview.engine import PreviewEngine
from batch.server.http.auth import Key, Keys
from batch.server.limits import ServerLimits
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, read, result, serving, submit

NOBODY = "0199c0de-0000-7000-8000-000000000001"


def run(coroutine):
    return asyncio.run(coroutine)


async def raw(session, data, *, half_close=False, head_only=False):
    """Send raw bytes; return status and body of the response, None if the connection closed without one."""
    reader, writer = await asyncio.open_connection(session._base_url.host, session._base_url.port)
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        if half_close:
            writer.write_eof()
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n") if head_only else reader.read(), 20)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body) if head else (None, b"")


def http(method, path, headers=b"", body=b""):
    """Return the bytes of a request with `Connection: close`."""
    start = method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return start + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def lives(session):
    """Check that a valid request still works."""
    return (await result(session, await submit(session)))[0] == 200


@pytest.fixture(autouse=True)
def no_unexpected_error(caplog):
    """Whether the log contains no exception."""
    yield
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


# --- submits ----------------------------------------------------------------------------------------------

GOOD = orjson.dumps(INPUT)
DEEP = b'{"image_url":"https://example.com/cat.png","prompt":"a cat","more":' + b"[" * 500 + b"]" * 500 + b"}"
BODIES = {
    "no json": (b"{'a': 1}", 422),
    "an array": (b"[1, 2]", 422),
    "a form": (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n", 422),
    "two documents": (GOOD + GOOD, 422),
    "NaN": (b'{"image_url":"https://x/","prompt":"a","strength":NaN}', 422),
    "Infinity": (b'{"image_url":"https://x/","prompt":"a","strength":-Infinity}', 422),
    "a number that overflows": (b'{"image_url":"https://x/","prompt":"a","strength":1e999}', 422),
    "a huge integer": (b'{"image_url":"https://x/","prompt":"a","seed":' + b"9" * 5000 + b"}", 422),
    "an integer beyond 64 bits": (b'{"image_url":"https://x/","prompt":"a","seed":99999999999999999999}', 422),
    "a negative seed": (b'{"image_url":"https://x/","prompt":"a","seed":-1}', 422),
    "deep nesting": (DEEP, (200, 422)),
    "deeper nesting": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 422),
    "invalid utf-8": (b'{"image_url":"https://x/","prompt":"\xff\xfe"}', 422),
    "lone surrogate": (rb'{"image_url":"https://x/","prompt":"\ud800"}', (200, 422)),
    "a null byte": (b'{"image_url":"https://x/","prompt":"a\x00b"}', 422),
    "an escaped null byte": (rb'{"image_url":"https://x/","prompt":"a\u0000b"}', 200),
    "duplicate keys": (b'{"image_url":"https://x/","prompt":"one","prompt":"two"}', 200),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, 422),
    "null everywhere": (b'{"image_url":null,"prompt":null,"seed":null}', 422),
    "an empty data uri": (b'{"image_url":"data:","prompt":"a"}', 422),
    "a source that is not a url": (b'{"image_url":"\\\\\\\\server\\\\share","prompt":"a"}', 422),
    "a source with a broken host": (b'{"image_url":"http://[::1","prompt":"a"}', 422),
    "a source on a file": (b'{"image_url":"file:///etc/passwd","prompt":"a"}', 422),
}

SOURCES = {"an empty data uri", "a source that is not a url", "a source with a broken host", "a source on a file"}
"""Only an engine that fetches the source image checks these."""


@pytest.mark.parametrize("keyed", [False, True], ids=["", "with an idempotency key"])
def test_an_invalid_body_is_rejected_or_fails_with_422(tmp_path, keyed):
    """Immediately if it is not a JSON object, else as the request's result; with and without an idempotency key."""

    async def outcome(session, name, body):
        headers = {"content-type": "text/plain"} | ({"idempotency-key": name} if keyed else {})
        status, _, answer = await call(session, "POST", SUBMIT, data=body, headers=headers)
        if status == 200:
            status, _, answer = await result(session, answer["request_id"])
        assert status == 200 or answer["detail"], name
        return status

    async def use():
        async with serving(tmp_path, ScriptedEngine(fetches_source=False)) as session:
            found = {name: await outcome(session, name, body) for name, (body, _) in BODIES.items()}
            assert await lives(session)
            return found

    found = run(use())
    for name, (_, expected) in BODIES.items():
        allowed = expected if isinstance(expected, tuple) else (expected,)
        assert found[name] in ((200,) if name in SOURCES else allowed), name


def test_an_invalid_source_is_a_model_error(tmp_path):
    """If the engine fetches the image: `image_load_error` or `file_download_error` with the field's location."""

    async def use():
        async with serving(tmp_path, ScriptedEngine(fetches_source=True)) as session:
            for name, (body, _) in BODIES.items():
                if name not in SOURCES:
                    continue
                _, _, ticket = await call(session, "POST", SUBMIT, data=body)
                status, _, answer = await result(session, ticket["request_id"])
                (problem,) = answer["detail"]
                assert (status, problem["loc"]) == (422, ["body", "image_url"]), name
                assert problem["type"] in {"image_load_error", "file_download_error"}, name
                assert problem["input"] == orjson.loads(body)["image_url"]

    run(use())


HEADERS = {
    "idempotency key in invalid utf-8": b"Idempotency-Key: \xff\xfe\r\n",
    "long idempotency key": b"Idempotency-Key: " + b"k" * 8000 + b"\r\n",
    "start timeout that is a word": b"X-Fal-Request-Start-Timeout: soon\r\n",
    "start timeout NaN": b"X-Fal-Request-Start-Timeout: nan\r\n",
    "endless start timeout": b"X-Fal-Request-Start-Timeout: 1e400\r\n",
    "unknown priority": b"X-Fal-Queue-Priority: \xff\r\n",
    "lifecycle that is not json": b"X-Fal-Object-Lifecycle-Preference: {\r\n",
    "lifecycle in invalid utf-8": b"X-Fal-Object-Lifecycle-Preference: \xff\r\n",
    "lifecycle with a word": b'X-Fal-Object-Lifecycle-Preference: {"expiration_duration_seconds": "soon"}\r\n',
    "endless lifecycle": b'X-Fal-Object-Lifecycle-Preference: {"expiration_duration_seconds": 1e300}\r\n',
    "key in invalid utf-8": b"Authorization: Key \xff\xfe:\xff\r\n",
    "store-io in invalid utf-8": b"X-Fal-Store-IO: \xff\r\n",
}


def test_an_invalid_header_is_harmless(tmp_path):
    """It is ignored or rejected; the next request succeeds."""

    async def use():
        async with serving(tmp_path) as session:
            for name, header in HEADERS.items():
                status, _ = await raw(session, http(b"POST", SUBMIT.encode(), header, GOOD))
                assert status in {200, 422}, name
                assert await lives(session), name

    run(use())


AUTHORIZATIONS = {
    "missing": b"",
    "empty": b"Authorization:\r\n",
    "blank": b"Authorization:  \t \r\n",
    "a scheme alone": b"Authorization: Bearer\r\n",
    "not UTF-8, a token": b"Authorization: Bearer \xff\xfe\r\n",
    "not UTF-8, a token's signature": b"Authorization: Bearer alice.9999999999.\xff\r\n",
    "not UTF-8, a token's name": b"Authorization: Bearer \xff.9999999999.00\r\n",
    "not UTF-8, a key": b"Authorization: Key \xff:\xff\r\n",
    "not UTF-8, a secret": b"Authorization: Key alice:\xc3\r\n",
    "not UTF-8, basic": b"Authorization: Basic \xff\r\n",
    "not UTF-8, the scheme": b"Authorization: \xff \xff\r\n",
    "not UTF-8, no scheme": b"Authorization: \xff\r\n",
    "UTF-8": "Authorization: Bearer ключ.9.é\r\n".encode(),
    "huge": b"Authorization: Bearer " + b"\xff" * 8000 + b"\r\n",
    "huge, a key": b"Authorization: Key alice:" + b"x" * 8000 + b"\r\n",
    "several, all wrong": b"Authorization: Bearer \xff\r\nAuthorization: Key \xfe:\xff\r\n",
    "several, all right": b"Authorization: Key alice:secret\r\n" * 2,
    "several, one right": b"Authorization: Key alice:secret\r\nAuthorization: Bearer x\r\n",
}


@pytest.mark.parametrize("case", AUTHORIZATIONS)
def test_an_invalid_authorization_is_401(tmp_path, case):
    """On routes for keys and for upload tokens, only the valid key is accepted."""
    keys = Keys((Key("alice", hashlib.sha256(b"secret").digest()),))
    paths = (SUBMIT.encode(), b"/run" + SUBMIT.encode(), b"/files/upload", b"/files/upload/multipart", b"/v1/models")

    async def use():
        async with serving(tmp_path, keys=keys) as session:
            for path in paths:
                status, body = await raw(session, http(b"POST", path, AUTHORIZATIONS[case], GOOD))
                assert (status, b"request_id" in body or b"detail" in body) == (401, True), path
            good = b"Authorization: Key alice:secret\r\n"
            assert (await raw(session, http(b"POST", SUBMIT.encode(), good, GOOD)))[0] == 200

    run(use())


# Each one is decoded, compared or repeated somewhere; aiohttp's own rejections are 4xx, too.
NAMES = (
    *("accept", "accept-encoding", "authorization", "content-encoding", "content-type", "cookie"),
    *("expect", "forwarded", "host", "idempotency-key", "if-match", "if-modified-since", "if-none-match", "if-range"),
    *("origin", "range", "sec-fetch-site", "transfer-encoding", "upgrade", "user-agent", "x-fal-file-name"),
    *("x-fal-object-lifecycle-preference", "x-fal-queue-priority", "x-fal-request-start-timeout", "x-fal-store-io"),
    *("x-fal-target-url", "x-forwarded-host"),
)
VALUES = (b"\xff\xfe", b"", "é".encode(), b"https://fal.run/\xff", b"bytes=\xff-", b"text/plain; charset=\xff")


@pytest.mark.parametrize("keyed", [False, True], ids=["open", "with keys"])
def test_invalid_utf_8_never_causes_a_5xx(tmp_path, keyed):
    """In any header, path or query of any route: a response below 500."""
    keys = Keys((Key("alice", hashlib.sha256(b"secret").digest()),) if keyed else ())

    async def use():
        async with serving(tmp_path, keys=keys) as session:
            right = {"authorization": "Key alice:secret"}
            _, _, upload = await call(session, "POST", "/files/upload", data=b"x" * 40_000, headers=right)
            stored = "/files/" + upload["access_url"].partition("/files/")[2]
            routes = [(b"POST", SUBMIT), (b"GET", read(NOBODY, "/status")), (b"GET", stored), (b"GET", "/")]
            routes += [(b"POST", "/files/upload"), (b"POST", "/api/fal/proxy"), (b"GET", "/metrics")]
            gate, wrong = asyncio.Semaphore(16), []

            async def one(method, path, headers):
                whole = {
                    b"host": b"localhost",
                    b"authorization": b"Key alice:secret",
                    b"connection": b"close",
                } | headers
                lines = b"".join(name + b": " + value + b"\r\n" for name, value in whole.items())
                start = method + b" " + path + b" HTTP/1.1\r\n" + lines
                async with gate:
                    status, _ = await raw(session, start + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD)
                if status is None or status >= 500:
                    wrong.append((method, path, headers, status))

            tails = (b"\xff", b"?\xff=\xff", b"?logs=\xff&fal_webhook=\xff&fal_max_queue_length=\xff", b"/\xff/%ff")
            await asyncio.gather(
                *(
                    one(method, path.encode(), {name.encode(): value})
                    for method, path in routes
                    for name in NAMES
                    for value in VALUES
                ),
                *(one(method, path.encode() + tail, {}) for method, path in routes for tail in tails),
                one(b"PUT", b"/storage/upload/\xff" + stored.encode(), {}),
                one(b"PUT", b"/storage/upload/%ff" + stored.encode(), {}),
            )
            assert wrong == []

    run(use())


def test_an_expect_header_is_met_or_rejected_with_json(tmp_path):
    """`100-continue` is answered before the body; anything else returns 417 with a request id."""

    async def use():
        async with serving(tmp_path) as session:
            async with session.post(SUBMIT, json=INPUT, expect100=True) as answer:
                assert answer.status == 200
            status, headers, body = await call(session, "POST", SUBMIT, json=INPUT, headers={"expect": "a miracle"})
            assert (status, "'a miracle'" in body["detail"], bool(headers["x-fal-request-id"])) == (417, True, True)
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 1

    run(use())


QUERIES = [
    "fal_max_queue_length=" + "9" * 5000,
    "fal_max_queue_length=%C2%B2",
    "fal_max_queue_length=-1",
    "fal_max_queue_length=%D9%A1",
    "fal_webhook=%00",
    "fal_webhook=http://[",
    "fal_webhook=file:///etc/passwd",
    "fal_webhook=http://example.com/%ff%fe",
    "fal_webhook=http://" + "a" * 300 + ".example/",
    "fal_webhook=&fal_webhook=",
    "%ff=%fe&&&=",
    "logs=%ff",
]


def test_an_invalid_query_is_harmless(tmp_path):
    """Invalid query parameters of a submit and of a read are ignored or rejected."""

    async def use():
        async with serving(tmp_path) as session:
            for query in QUERIES:
                for method, path in ((b"POST", SUBMIT.encode()), (b"GET", read(NOBODY, "/status").encode())):
                    status, _ = await raw(session, http(method, path + b"?" + query.encode(), b"", GOOD))
                    assert status in {200, 404, 422, 429}, query
            assert await lives(session)

    run(use())


# --- sizes and stalls -------------------------------------------------------------------------------------


def test_a_body_of_100_mb_is_rejected(tmp_path):
    """413 with the limit, with a Content-Length or chunked."""
    piece = b" " * 2**20

    async def pieces():
        for _ in range(100):
            yield piece

    async def use():
        async with serving(tmp_path) as session:
            for data in (io.BytesIO(piece * 100), pieces()):
                try:
                    status, _, answer = await call(session, "POST", SUBMIT, data=data)
                except ConnectionError:  # rejected before the whole body was sent
                    continue
                assert (status, "72 MiB" in answer["detail"]) == (413, True)
            assert await lives(session)

    run(use())


def test_ten_thousand_headers_are_rejected_or_accepted(tmp_path):
    """Many short headers, a long one, and an endless one."""
    many = b"".join(b"X-Header-%d: value\r\n" % number for number in range(10_000))

    async def use():
        async with serving(tmp_path) as session:
            for headers in (many, b"X-Long: " + b"x" * 100_000 + b"\r\n", b"X: " + b"x" * 1_000_000):
                status, body = await raw(session, http(b"POST", SUBMIT.encode(), headers, GOOD))
                assert status in {None, 200, 400, 431}
                assert b"Traceback" not in body
            assert await lives(session)

    run(use())


def test_a_stalled_body_times_out(tmp_path):
    """408 after the timeout, though the connection stays open; nothing is accepted or left behind."""
    limits = ServerLimits(body_seconds=0.2, silence_seconds=0.2)

    async def stop(session, path, framing):
        start = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
        return (await raw(session, start + b'5\r\n{"a":\r\n', head_only=True))[0]

    async def use():
        async with serving(tmp_path, limits=limits) as session:
            paths = (SUBMIT, "/files/upload", "/storage/upload/initiate")
            framings = ("Content-Length: 1000", "Transfer-Encoding: chunked")
            stops = [stop(session, path, framing) for path in paths for framing in framings]
            assert await asyncio.gather(*stops) == [408] * 6
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 0
            assert await lives(session)

    run(use())
    assert not list((tmp_path / "incoming").iterdir())


NO_HTTP = [
    b"POST " + SUBMIT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST " + SUBMIT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST " + SUBMIT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST "
    + SUBMIT.encode()
    + b" HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    b"POST " + SUBMIT.encode() + b" HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /health?" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"FOO / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET http://elsewhere.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"CONNECT elsewhere.example:443 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
]


def test_invalid_http_ends_only_its_connection(tmp_path, caplog):
    """400 or a closed connection, without a stack trace in the log."""

    async def use():
        async with serving(tmp_path) as session:
            for data in NO_HTTP:
                status, body = await raw(session, data, half_close=True)
                assert status is None or status < 500, data
                assert b"Traceback" not in body
            assert await lives(session)

    run(use())
    assert any("invalid HTTP" in record.message for record in caplog.records)
    assert not any(record.exc_info for record in caplog.records)


# --- paths ------------------------------------------------------------------------------------------------

PATHS = [
    "/files/../secret",
    "/files/..%2fsecret",
    "/files/%2e%2e/secret",
    "/files/ab/..%5c..%5csecret",
    "/files/ab/%2e%2e%2f%2e%2e%2fserver.db",
    "/files/ab/" + "a" * 32 + "%00.png",
    "/files/%c0%ae%c0%ae/secret",
    "/files/ab/" + "a" * 5000,
    "/files/ab/%ff%fe",
    "//etc/passwd",
    "/%",
    "/%zz",
    "/%00",
    "/%ff%fe/%ff",
    "/..",
    "/fal-ai/flux/requests/%00/status",
    "/fal-ai/flux/requests/%ff/status",
    "/fal-ai/flux/requests/" + "%F0%9F%90%A2" * 9 + "/status",
    "/fal-ai/flux/requests/' OR 1=1 --/status".replace(" ", "%20"),
    "/fal-ai/flux/requests/" + "0" * 36 + "/status",
    "/fal-ai/flux/requests/" + "\u0660".encode().hex("%").join(["%", ""]) * 18 + "/status",
    "/fal-ai/flux/requests//status",
    "/fal-ai/%ff/requests/" + NOBODY,
    "/workflows/owner/name",
    "/workflows/owner/name/requests/" + NOBODY + "/status",
    "/comfy/owner/name/path/requests/" + NOBODY,
    "/run/%ff",
    "/run/",
    "/storage/upload/x/files/%2e%2e/secret",
    "/storage/upload/x/files/ab/" + "a" * 32 + "/1",
    "/files/ab/" + "a" * 32 + "/multipart/x/1",
    "/files/ab/" + "a" * 32 + "/multipart/x/complete",
    "/static/../routes.py",
    "/static/%2e%2e/routes.py",
    "/v1/models/requests/by-endpoint?endpoint_id=%ff&cursor=%ff&limit=9e9&start=never",
    "/v1/models/pricing?endpoint_id=" + "x," * 3000,
]


def test_no_path_escapes_or_fails(tmp_path):
    """Dots, slashes, null bytes, invalid UTF-8, other namespaces and unknown ids are rejected without details."""

    async def use():
        async with serving(tmp_path) as session:
            secret = (tmp_path / "secret").read_bytes()
            for method, path in itertools.product((b"GET", b"POST", b"PUT", b"HEAD"), PATHS):
                status, body = await raw(session, http(method, path.encode()))
                assert status is not None, path
                assert 400 <= status < 500, (method, path, status)
                assert secret not in body
                assert b"Traceback" not in body
            assert await lives(session)

    run(use())


def test_the_name_of_an_uploaded_file_is_not_used_as_a_path(tmp_path):
    """A client's file name is never part of a path."""

    async def use():
        async with serving(tmp_path) as session:
            for name in ("../../../etc/passwd", "\\\\server\\share", "CON", "a" * 5000, "%00.png", ""):
                headers = {"x-fal-file-name": name, "content-type": "image/png; charset=" + "x" * 100}
                status, _, first = await call(session, "POST", "/files/upload", data=b"x" * 40_000, headers=headers)
                assert status == 200
                wanted = {"file_name": name, "content_type": "../../x"}
                status, _, second = await call(session, "POST", "/storage/upload/initiate", json=wanted)
                assert status == 200
                for url in (first["access_url"], second["file_url"]):
                    assert re.fullmatch(r"http://[\d.:]+/files/[0-9a-f]{2}/[0-9a-f]{32}(\.png)?", url)

    run(use())
    assert {path.name for path in tmp_path.iterdir()} >= {"files", "incoming", "server.db"}
    assert all(path.parent.parent.name == "files" for path in tmp_path.glob("**/*.png"))


# --- images ---------------------------------------------------------------------------------------------


def png(width, height, *chunks, data=b""):
    """A PNG with any declared size and extra chunks."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*one) for one in chunks)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned():
    """A JPEG whose EXIF data rotates it by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (512, 256), "red"), "JPEG", exif=exif)


BOMBS = {
    "half a gigapixel": (png(30_000, 17_000, data=zlib.compress(bytes(1000))), "image_too_large"),
    "four gigapixels": (png(2**31 - 1, 2, data=b""), "image_too_large"),
    "text that swells": (
        png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))), data=zlib.compress(bytes(64 * 65))),
        "image_load_error",
    ),
    "data that ends": (saved(Image.new("RGB", (300, 300)), "PNG")[:-40], "image_load_error"),
    "a web page": (b"<!doctype html><title>Not found</title>", "image_load_error"),
    "nothing": (b"", "image_load_error"),
    "zeros": (bytes(100_000), "image_load_error"),
    "vectors": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_load_error"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "image_load_error"),
    "a pixel": (saved(Image.new("RGB", (1, 1)), "PNG"), "image_too_small"),
}
GOOD_IMAGES = {
    "turned by EXIF": (turned(), (256, 512)),
    "with alpha": (saved(Image.new("RGBA", (300, 300), (255, 0, 0, 0)), "PNG"), (304, 304)),
    "palette": (saved(Image.new("P", (300, 300)), "PNG", transparency=0), (304, 304)),
    "CMYK": (saved(Image.new("CMYK", (300, 300)), "JPEG"), (304, 304)),
    "16 bit": (saved(Image.new("I;16", (300, 300), 40_000), "PNG"), (304, 304)),
    "one bit": (saved(Image.new("1", (300, 300)), "PNG"), (304, 304)),
    "animated": (
        saved(
            Image.new("RGB", (300, 300), "red"),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (300, 300), "blue")],
        ),
        (304, 304),
    ),
    "WebP": (saved(Image.new("RGB", (300, 300)), "WEBP"), (304, 304)),
    "a phone's photo": (
        saved(Image.new("RGB", (300, 300)), "MPO", save_all=True, append_images=[Image.new("RGB", (300, 300))]),
        (304, 304),
    ),
    "huge": (saved(Image.new("L", (6000, 4000)), "JPEG"), (1760, 1168)),
}


def test_every_kind_of_image_is_accepted_or_a_model_error(tmp_path):
    """Bombs and invalid files give fal's model error; all others a result of the right size."""

    async def one(session, data, *, uri):
        given = "data:image/png;base64," + base64.b64encode(data).decode()
        if not uri:
            _, _, upload = await call(
                session, "POST", "/files/upload", data=data, headers={"content-type": "image/png"}
            )
            given = upload["access_url"]
        return await result(session, await submit(session, image_url=given, num_inference_steps=10))

    async def use():
        async with serving(tmp_path, PreviewEngine(1)) as session:
            for number, (name, (data, error)) in enumerate(BOMBS.items()):
                status, headers, answer = await one(session, data, uri=number % 2 == 0)
                assert (status, answer["detail"][0]["type"]) == (422, error), name
                assert set(answer["detail"][0]) >= {"loc", "msg", "type", "url", "input"}, name
                assert headers["x-fal-billable-units"] == "0"
                if error != "image_load_error":
                    assert answer["detail"][0]["ctx"], name
            for number, (name, (data, size)) in enumerate(GOOD_IMAGES.items()):
                status, _, answer = await one(session, data, uri=number % 2 == 1)
                image = answer["images"][0]
                assert (status, (image["width"], image["height"])) == (200, size), name

    run(use())


def test_a_source_above_the_limit_is_file_too_large(tmp_path):
    """As a data URI, an upload or a download; `max_size` contains the limit."""
    limits = ServerLimits(source_bytes=10_000)

    async def use():
        engine = ScriptedEngine(fetches_source=True)
        async with serving(tmp_path, engine, allow_private=True, limits=limits) as session:
            _, _, upload = await call(session, "POST", "/files/upload", data=b"x" * 60_000)
            elsewhere = str(session._base_url / "openapi.json")
            for url in (upload["access_url"], "data:image/png;base64," + "A" * 80_000, elsewhere):
                status, _, answer = await result(session, await submit(session, image_url=url))
                assert (status, answer["detail"][0]["type"]) == (422, "file_too_large"), url[:60]
                assert answer["detail"][0]["ctx"] == {"max_size": 10_000}

    run(use())


def test_sync_mode_returns_data_uris(tmp_path):
    """The response contains each image, and no URL."""

    async def use():
        async with serving(tmp_path) as session:
            status, _, body = await result(session, await submit(session, sync_mode=True, num_images=2))
            assert status == 200
            assert all(image["url"].startswith("data:image/png;base64,") for image in body["images"])

    run(use())
