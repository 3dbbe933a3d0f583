"""Multipart uploads over real HTTP, valid and invalid."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest

from batch.image_formats import FORMATS
from batch.server.files.multipart import BadParts, Part
from batch.server.files.storage import Storage
from batch.server.limits import ServerLimits
from tests.edges.serving import ScriptedEngine, call, result, serving, submit

KIND = {"content-type": "image/png"}


def run(coroutine):
    return asyncio.run(coroutine)


async def announced(session, way):
    """Announce a multipart upload; return the URL of the file and the base URL of its parts."""
    if way == "python":
        status, _, said = await call(session, "POST", "/files/upload/multipart", headers=KIND)
        assert status == 200
        return said["access_url"], f"{said['access_url']}/multipart/{said['uploadId']}"
    wanted = {"content_type": "image/png", "file_name": "cat.png"}
    path = "/storage/upload/initiate-multipart?storage_type=fal-cdn-v3"
    status, _, said = await call(session, "POST", path, json=wanted)
    assert status == 200
    return said["file_url"], said["upload_url"]


async def put(session, below, number, data):
    """Upload a part; return its entry for the completion."""
    status, headers, said = await call(session, "PUT", f"{below}/{number}", data=data)
    assert (status, said["partNumber"], said["etag"]) == (200, number, headers["etag"])
    return said


async def complete(session, below, parts):
    return await call(session, "POST", f"{below}/complete", json={"parts": parts})


async def served(session, url):
    async with session.get(url) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("way", ["python", "javascript"])
def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path, way):
    """Parts arrive concurrently, in any order, one of them twice; they are listed in any order."""
    pieces = {number: os.urandom(70_000) for number in range(1, 13)}

    async def use():
        engine = ScriptedEngine(fetches_source=True)
        async with serving(tmp_path, engine) as session:
            url, below = await announced(session, way)
            await put(session, below, 5, b"not this one")
            order = [7, 1, 12, 5, 3, 2, 11, 4, 10, 6, 9, 8]
            parts = await asyncio.gather(*(put(session, below, number, pieces[number]) for number in order))
            assert (await served(session, url))[0] == 404
            assert (await complete(session, below, parts))[0] == 200
            assert await served(session, url) == (200, b"".join(pieces[number] for number in sorted(pieces)))
            assert (await result(session, await submit(session, image_url=url)))[0] == 200

    run(use())
    assert list((tmp_path / "parts").iterdir()) == []
    assert list((tmp_path / "incoming").iterdir()) == []


SENT = {
    **{known.content_type: known.content_type for known in FORMATS},
    "image/mpo": "image/jpeg",  # Pillow's name for some phone photos
    "image/jpg": "image/jpeg",
    "IMAGE/MPO; charset=binary": "image/jpeg",
    "image/apng": "image/png",
}


def test_an_image_is_served_with_the_usual_type(tmp_path):
    """Uploaded, announced or as a data URI: the usual suffix and content type."""
    suffixes = {known.content_type: known.suffix for known in FORMATS}

    async def ways(session, content_type, data):
        headers = {"content-type": content_type}
        _, _, said = await call(session, "POST", "/files/upload", data=data, headers=headers)
        yield said["access_url"]
        _, _, said = await call(session, "POST", "/storage/upload/initiate", json={"content_type": content_type})
        await call(session, "PUT", said["upload_url"], data=data, headers=headers)
        yield said["file_url"]
        uri = f"data:{content_type};base64,{base64.b64encode(data).decode()}"
        request_id = await submit(session, image_url=uri)
        await result(session, request_id)
        _, _, page = await call(session, "GET", "/page/state")
        yield next(one["source"]["image"] for one in page["requests"] if one["id"] == request_id)

    async def use():
        async with serving(tmp_path, ScriptedEngine()) as session:
            for sent, expected in SENT.items():
                async for url in ways(session, sent, os.urandom(50)):
                    async with session.get(url) as response:
                        assert (response.status, response.content_type) == (200, expected), (sent, url)
                    assert url.endswith(suffixes[expected]), (sent, url)

    run(use())


def test_completing_is_idempotent(tmp_path):
    """A client repeats the completion after a broken connection."""

    async def use():
        async with serving(tmp_path) as session:
            url, below = await announced(session, "python")
            parts = [await put(session, below, number, b"x" * number) for number in (1, 2)]
            found = await asyncio.gather(*(complete(session, below, parts) for _ in range(5)))
            assert [status for status, _, _ in found] == [200] * 5
            assert (await complete(session, below, parts))[0] == 200
            assert await served(session, url) == (200, b"xxx")

    run(use())


def test_an_unfinished_upload_survives_a_restart(tmp_path):
    """The stored parts remain, and the client continues."""

    async def use():
        async with serving(tmp_path) as session:
            url, below = await announced(session, "javascript")
            first = await put(session, below, 1, b"a" * 1000)
        (folder,) = (tmp_path / "parts").iterdir()
        (folder / "half.new").write_bytes(b"half a part")
        async with serving(tmp_path) as session:
            parts = [first, await put(session, below, 2, b"b")]
            assert (await complete(session, below, parts))[0] == 200
            assert await served(session, url) == (200, b"a" * 1000 + b"b")

    run(use())


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [{"partNumber": 1}],
        [{"partNumber": 2, "etag": '"' + "0" * 32 + '"'}],
        [{"partNumber": 1, "etag": "../../../secret"}],
        [{"partNumber": "1", "etag": "x"}],
        [{"partNumber": True, "etag": ["x"]}],
        [{"partNumber": -1, "etag": "x"}],
        [{"partNumber": 10**30, "etag": "x"}],
        ["x", None],
        {"partNumber": 1},
    ],
)
def test_missing_parts_are_rejected(tmp_path, parts):
    """400 with the part; stored parts remain, and a valid list still completes the upload."""

    async def use():
        async with serving(tmp_path) as session:
            url, below = await announced(session, "python")
            good = await put(session, below, 1, b"good")
            status, _, said = await complete(session, below, parts)
            assert (status, said["detail"].startswith("The upload cannot be completed")) == (400, True)
            assert (await complete(session, below, [good, good]))[0] == 400
            assert (await complete(session, below, [good]))[0] == 200
            assert await served(session, url) == (200, b"good")

    run(use())


def test_only_announced_uploads_are_accepted(tmp_path):
    """Another token or path and invalid numbers are rejected; nothing is written."""

    async def use():
        async with serving(tmp_path) as session:
            _, below = await announced(session, "python")
            _, other = await announced(session, "python")
            path, _, token = below.rpartition("/")
            foreign = path + "/" + other.rpartition("/")[2]
            for url, status in [
                (f"{foreign}/1", 403),
                (f"{path}/{token}x/1", 403),
                (f"{below}/0", 400),
                (f"{below}/1001", 400),
                (f"{below}/-1", 400),
                (f"{below}/one", 400),
                (f"{below}/%C2%B2", 400),
                (f"{below}/" + "9" * 5000, 400),
            ]:
                assert (await call(session, "PUT", url, data=b"x"))[0] == status, url
            assert (await call(session, "POST", f"{foreign}/complete", json={"parts": []}))[0] == 403
            assert (await call(session, "POST", f"{below}/complete", data=b"[1]"))[0] == 422

    run(use())
    assert list((tmp_path / "parts").iterdir()) == []


def test_parts_files_and_unfinished_uploads_are_limited(tmp_path):
    """A part, a file and the total of unfinished uploads are limited; rejected bytes do not count."""
    limits = ServerLimits(part_bytes=1000, file_bytes=2500, unfinished_bytes=4000)

    async def chunks():
        for _ in range(20):
            yield b"x" * 100

    async def use():
        async with serving(tmp_path, limits=limits) as session:
            _, below = await announced(session, "python")
            assert (await call(session, "PUT", f"{below}/1", data=b"x" * 1001))[0] == 413
            assert (await call(session, "PUT", f"{below}/1", data=chunks()))[0] == 413
            parts = [await put(session, below, number, b"x" * 1000) for number in (1, 2)]
            parts[1] = await put(session, below, 2, b"y" * 1000)
            status, _, said = await call(session, "PUT", f"{below}/3", data=b"x" * 1000)
            assert (status, "limited to" in said["detail"]) == (413, True)
            _, second = await announced(session, "javascript")
            await put(session, second, 1, b"z" * 1000)
            await put(session, second, 2, b"z" * 1000)
            status, _, said = await call(session, "PUT", f"{second}/3", data=b"z")
            assert (status, "unfinished uploads" in said["detail"]) == (503, True)
            assert (await complete(session, below, parts))[0] == 200
            await put(session, second, 3, b"z" * 400)

    run(use())


def test_abandoned_uploads_are_removed(tmp_path):
    """Uploads without a recent part are removed; others stay."""

    async def use():
        async def one(data):
            yield data

        async with Storage(tmp_path) as storage:
            paths = [storage.reserve("image/png").path for _ in range(2)]
            tags = [await storage.receive_part(path, 1, one(b"data"), 4) for path in paths]
            folders = {path: tmp_path / "parts" / path[-36:-4] for path in paths}
            os.utime(folders[paths[0]], (1000, 1000))
            assert await storage.remove_abandoned_parts(2000) == 1
            assert [folder.exists() for folder in folders.values()] == [False, True]
            await storage.join_parts(paths[1], [Part(1, tags[1])])
            assert await storage.read(paths[1]) == b"data"
            with pytest.raises(BadParts):
                await storage.join_parts(paths[0], [Part(1, tags[0])])

    run(use())


def test_an_aborted_part_leaves_nothing(tmp_path):
    """No part or partial file remains, and its space is released."""

    async def use():
        async with serving(tmp_path) as session:
            _, below = await announced(session, "python")
            path = below.removeprefix(str(session._base_url).rstrip("/"))
            _, writer = await asyncio.open_connection(session._base_url.host, session._base_url.port)
            writer.write(f"PUT {path}/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf".encode())
            await writer.drain()
            await call(session, "GET", "/health")
            writer.close()
            await writer.wait_closed()
            await call(session, "GET", "/health")
            assert (await complete(session, below, []))[0] == 400

    run(use())
    assert list((tmp_path / "parts").glob("*/*")) == []


def test_the_realtime_token_is_a_string(tmp_path):
    """Both official clients expect a JSON string."""

    async def use():
        async with serving(tmp_path) as session:
            wanted = {"allowed_apps": ["flux"], "token_expiration": 120}
            status, _, token = await call(session, "POST", "/tokens/", json=wanted)
            assert (status, isinstance(token, str)) == (200, True)

    run(use())
