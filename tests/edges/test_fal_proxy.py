"""The proxy route of fal's JavaScript client, fal's host names, and CORS."""

from __future__ import annotations

import asyncio

import pytest

from batch.server.http.auth import Key, Keys
from batch.server.http.fal_proxy import PATH, TARGET, is_direct, own_path
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, read, serving

KEY = {"authorization": "Key tester:secret"}
PAGE = "https://studio.example"


def run(coroutine):
    return asyncio.run(coroutine)


def keys():
    """The keys of one owner."""
    import hashlib

    return Keys((Key("tester", hashlib.sha256(b"secret").digest()),))


async def proxied(session, method, target, **options):
    headers = {TARGET: target, **options.pop("headers", {})}
    return await call(session, method, PATH, headers=headers, **options)


def test_a_complete_request_works_through_the_proxy(tmp_path):
    """Submit, status with its query, result, cancel, upload and direct call work as without the proxy."""

    async def use():
        queue, rest = "https://queue.fal.run", "https://rest.fal.ai"
        async with serving(tmp_path) as session:
            status, headers, ticket = await proxied(session, "POST", queue + SUBMIT, json=INPUT)
            assert (status, headers["x-fal-request-id"]) == (200, ticket["request_id"])
            assert ticket["status_url"].startswith(str(session._base_url))
            await completed(session, ticket["request_id"])
            path = read(ticket["request_id"])
            status, _, said = await proxied(session, "GET", f"{queue}{path}/status?logs=1")
            assert (status, [line["message"] for line in said["logs"]]) == (200, ["step 1 of 2", "step 2 of 2"])
            status, _, direct = await call(session, "GET", path)
            assert (await proxied(session, "GET", queue + path))[::2] == (status, direct) == (200, direct)
            status, _, said = await proxied(session, "PUT", f"{queue}{path}/cancel")
            assert (status, said) == (400, {"status": "ALREADY_COMPLETED"})
            status, _, said = await proxied(session, "POST", f"https://fal.run{SUBMIT}", json=INPUT)
            assert (status, said["prompt"]) == (200, "a cat")
            status, _, said = await proxied(
                session, "POST", f"{rest}/storage/upload/initiate?storage_type=fal-cdn-v3", json={}
            )
            assert (status, set(said)) == (200, {"upload_url", "file_url"})

    run(use())


@pytest.mark.parametrize(
    "target",
    [
        None,
        "",
        "https://example.com/fal-ai/flux",
        "http://queue.fal.run/fal-ai/flux",
        "https://queue.fal.run.example.com/",
        "https://queue.fal.run:8443/",
        "https://queue.fal.run@example.com/",
        "https://user@queue.fal.run/",
        "//queue.fal.run/",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://[::1",
        "https://queue.fal.run:x/",
        "queue.fal.run",
        "\xff",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_any_other_target_is_rejected(tmp_path, target, method):
    """The response is 400, and no other server is contacted."""

    async def use():
        async with serving(tmp_path) as session:
            status, _, said = await call(session, method, PATH, headers={} if target is None else {TARGET: target})
            assert (status, TARGET in said["detail"]) == (400, True)

    run(use())


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("https://queue.fal.run/a/b/c?x=1&y=%20", "/a/b/c?x=1&y=%20"),
        ("https://fal.run/a/b", "/run/a/b"),
        ("https://falrun.com/a/b", "/run/a/b"),
        ("https://api.fal.ai/v1/meta", "/v1/meta"),
        ("https://queue.fal.run", "/"),
        ("https://QUEUE.fal.run/A", "/A"),
        ("https://v3.fal.media/files/a%2Fb%20c", "/files/a%2Fb%20c"),
    ],
)
def test_fal_s_hosts_map_to_paths_of_this_server(target, path):
    """The direct host maps to /run, all others to the root; encoding is preserved."""
    found = own_path(target)
    assert found is not None
    assert found.raw_path_qs == path


DIRECT = ("fal.run", "fal.run:443", "FAL.run:8787", "Fal.Run.", "ws.fal.run", "eu.fal.run:80", "falrun.com")
QUEUED = (
    *("queue.fal.run", "QUEUE.fal.run:443", "queue.eu.fal.run", "eu.queue.fal.run", "queue.falrun.com", "rest.fal.ai"),
    *("localhost", "127.0.0.1:8787", "[::1]", "notfal.run", "fal.run.example", "fal.running", "run", "fal-run", ""),
)


@pytest.mark.parametrize(("hosts", "direct"), [(DIRECT, True), (QUEUED, False)], ids=["direct", "queued"])
def test_the_host_selects_direct_call_or_queue(tmp_path, hosts, direct):
    """The same path under each name, in any case, with and without a port; forwarded hosts are ignored."""

    async def use():
        async with serving(tmp_path, keys=keys()) as session:
            for host in hosts:
                assert is_direct(host) is direct, host
                others = {"x-forwarded-host": "fal.run", "forwarded": "host=fal.run"} if not direct else {}
                headers = {"host": host, **others, **KEY}
                for path in (SUBMIT, SUBMIT + "/"):
                    status, answered, said = await call(session, "POST", path, json=INPUT, headers=headers)
                    found = {"images", "seed"} if direct else {"request_id", "status_url"}
                    assert (status, found <= said.keys()) == (200, True), host
                    assert answered["x-fal-request-id"]
                ended = await call(session, "GET", read(answered["x-fal-request-id"]), headers=headers)
                assert ended[0] in ({200} if direct else {200, 400}), host

    run(use())


def test_a_direct_host_behaves_like_the_direct_path(tmp_path):
    """Errors, wrong methods and unknown apps too; reads go to the queue under every name."""

    async def use():
        async with serving(tmp_path, keys=keys()) as session:
            named, plain = {"host": "fal.run", **KEY}, KEY
            for given in ({**INPUT, "prompt": "fail"}, {**INPUT, "prompt": "boom"}, {}, {**INPUT, "seed": -1}):
                by_host = await call(session, "POST", SUBMIT, json=given, headers=named)
                by_path = await call(session, "POST", f"/run{SUBMIT}", json=given, headers=plain)
                assert (by_host[0], by_host[2]) == (by_path[0], by_path[2]), given
            assert (await call(session, "GET", SUBMIT, headers=named))[0] == 405
            assert (await call(session, "POST", "/fal-ai/other", json=INPUT, headers=named))[0] == 404
            assert (await call(session, "POST", SUBMIT, json=INPUT, headers={"host": "fal.run"}))[0] == 401
            assert (await call(session, "POST", f"/run{SUBMIT}", json=INPUT, headers=named))[0] == 200

    run(use())


def test_a_proxy_request_for_the_proxy_does_not_loop(tmp_path):
    """There is no loop; an unknown path is 404, a wrong method 405."""

    async def use():
        async with serving(tmp_path) as session:
            assert (await proxied(session, "POST", f"https://queue.fal.run{PATH}"))[0] == 400
            assert (await proxied(session, "GET", "https://queue.fal.run/nowhere"))[0] == 404
            assert (await proxied(session, "DELETE", f"https://queue.fal.run{SUBMIT}"))[0] == 405

    run(use())


def test_the_proxy_requires_the_server_s_keys(tmp_path):
    """401 without a key; with it, requests belong to its owner."""

    async def use():
        async with serving(tmp_path, keys=keys()) as session:
            target = "https://queue.fal.run" + SUBMIT
            assert (await proxied(session, "POST", target, json=INPUT))[0] == 401
            status, _, ticket = await proxied(session, "POST", target, json=INPUT, headers=KEY)
            assert status == 200
            assert (await call(session, "GET", read(ticket["request_id"], "/status"), headers=KEY))[0] in {200, 202}

    run(use())


def test_the_stream_works_through_the_proxy(tmp_path):
    """Server-sent events arrive immediately."""

    async def use():
        engine = ScriptedEngine()
        async with serving(tmp_path, engine) as session:
            _, _, ticket = await call(session, "POST", SUBMIT, json={**INPUT, "prompt": "hold"})
            target = f"https://queue.fal.run{read(ticket['request_id'], '/status/stream')}"
            async with session.get(PATH, headers={TARGET: target}) as response:
                assert response.content_type == "text/event-stream"
                assert b"IN_PROGRESS" in await response.content.readuntil(b"\n\n")
                engine.go.set()
                assert b"COMPLETED" in await response.content.read()

    run(use())


# --- CORS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SUBMIT, PATH, "/files/upload", "/storage/upload/initiate", "/health", "/v1/meta"])
def test_any_page_may_call_a_server_with_keys(tmp_path, path):
    """The preflight requires no key and lists the client's headers; the response is readable."""

    async def use():
        asked = {"origin": PAGE, "access-control-request-method": "POST"}
        async with serving(tmp_path, keys=keys()) as session:
            async with session.options(path, headers=asked) as response:
                assert (response.status, response.headers["access-control-allow-origin"]) == (204, "*")
                allowed = response.headers["access-control-allow-headers"].lower().split(", ")
                assert {"authorization", "content-type", "x-fal-queue-priority", "x-fal-target-url"} <= set(allowed)
                assert "PUT" in response.headers["access-control-allow-methods"]
            status, headers, _ = await call(session, "POST", SUBMIT, json=INPUT, headers={"origin": PAGE, **KEY})
            assert (status, headers["access-control-allow-origin"]) == (200, "*")
            assert "access-control-expose-headers" in headers
            status, headers, _ = await call(session, "POST", SUBMIT, json=INPUT, headers={"origin": PAGE})
            assert (status, headers["access-control-allow-origin"]) == (401, "*")

    run(use())


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8787", True),
        (PAGE, False),
        ("null", False),
        ("http://[", False),
    ],
)
def test_without_keys_only_local_pages_may_read(tmp_path, origin, allowed):
    """Otherwise any page in the user's browser could read them."""

    async def use():
        async with serving(tmp_path) as session:
            async with session.options(SUBMIT, headers={"origin": origin}) as response:
                assert ("access-control-allow-origin" in response.headers) is allowed
            _, headers, _ = await call(session, "GET", "/health", headers={"origin": origin})
            assert ("access-control-allow-origin" in headers) is allowed

    run(use())


def test_a_page_can_read_the_status_stream(tmp_path):
    """The CORS headers are set before the stream starts."""

    async def use():
        async with serving(tmp_path, keys=keys()) as session:
            _, _, ticket = await call(session, "POST", SUBMIT, json=INPUT, headers=KEY)
            path = read(ticket["request_id"], "/status/stream")
            async with session.get(path, headers={"origin": PAGE, **KEY}) as response:
                assert response.headers["access-control-allow-origin"] == "*"

    run(use())


@pytest.mark.parametrize("path", ["/health", "/v1/models/pricing", "/fal-ai/flux/requests/x/status", "/"])
@pytest.mark.parametrize(
    ("host", "welcome"),
    [("localhost:1", True), ("127.0.0.1", True), ("127.8.8.8:80", True), ("[::1]:8787", True),
     ("evil.example", False), ("evil.example:8787", False), ("127.0.0.1.evil.example", False)],
)  # fmt: skip
def test_without_keys_a_foreign_host_is_rejected(tmp_path, path, host, welcome):
    """DNS rebinding: for a browser, evil.example resolving to 127.0.0.1 has the server's origin."""

    async def use():
        async with serving(tmp_path) as session, session.get(path, headers={"host": host}) as response:
            assert (response.status != 403) is welcome
            if not welcome:
                assert host in await response.text()

    run(use())


def test_with_keys_any_host_is_accepted(tmp_path):
    """Keys protect the server, so that any Host from a reverse proxy is accepted."""

    async def use():
        async with serving(tmp_path, keys=keys()) as session:
            status, _, _ = await call(session, "POST", SUBMIT, json=INPUT, headers={"host": "gpu.example", **KEY})
            assert status == 200

    run(use())
