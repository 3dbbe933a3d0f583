"""Every injected fault on the wire, and a complete run with the example faults file."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import aiohttp
import orjson
import pytest

from batch.errors import ConfigError
from batch.fal.endpoint import APP_ID
from batch.server.faults.injection import fault_point_of
from batch.server.faults.plan import FaultAction, FaultPoint, FaultRule, read_faults
from batch.server.queue.records import ListingRules
from tests.acceptance.command import REPOSITORY, accepted, jobs_in, restyle, results, summary, write_manifest
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, read, result, serving, submit

LISTING = f"/v1/models/requests/by-endpoint?endpoint_id={APP_ID}"
UPLOAD = "/files/upload"


def run(coroutine):
    return asyncio.run(coroutine)


def fault(at, do, **keys):
    """A faults file with one fault, by default at the first call."""
    keys = keys if keys.keys() & {"every", "share", "first"} else {"first": 1, **keys}
    words = {True: "true", False: "false"}
    lines = [f"{key} = {words[value] if isinstance(value, bool) else repr(value)}" for key, value in keys.items()]
    return "\n".join(["[[fault]]", f"at = '{at}'", f"do = '{do}'", *lines, ""])


@contextlib.asynccontextmanager
async def injecting(tmp_path, text, engine=None):
    """Run a server with these faults."""
    path = tmp_path / "faults.toml"
    path.write_text(text)
    async with serving(tmp_path / "data", engine, faults=path) as session:
        yield session


async def accepted_by(session):
    return (await call(session, "GET", "/health"))[2]["accepted"]


async def path_for(session, point):
    """Return method and path of a successful call at this point."""
    if point is FaultPoint.SUBMIT:
        return "POST", SUBMIT
    if point is FaultPoint.UPLOAD:
        return "POST", UPLOAD
    if point is FaultPoint.LISTING:
        return "GET", LISTING
    request_id = await submit(session)
    await completed(session, request_id)
    if point is FaultPoint.FILE:
        async with session.post(UPLOAD, data=b"x" * 1000, headers={"content-type": "image/png"}) as response:
            return "GET", orjson.loads(await response.read())["access_url"]
    if point is FaultPoint.CANCEL:
        return "PUT", read(request_id, "/cancel")
    return "GET", read(request_id, "/status" if point is FaultPoint.STATUS else "")


async def raw(session, method, path):
    """Return status, headers and body of a call; a submit is sent with a body."""
    session._retry_connection = False  # otherwise aiohttp hides the fault by retrying the read
    body = orjson.dumps(INPUT) if method == "POST" else None
    async with session.request(method, path, data=body) as response:
        return response.status, response.headers, await response.read()


# --- faults of calls --------------------------------------------------------------------------------------

CALLS = [point for point in FaultPoint if point is not FaultPoint.EXECUTE]


@pytest.mark.parametrize("point", CALLS)
def test_a_dropped_call_has_no_response_and_no_effect(tmp_path, point):
    """The connection is closed cleanly, nothing is executed, and the next call works."""

    async def use():
        async with injecting(tmp_path, fault(point, "drop")) as session:
            method, path = await path_for(session, point)
            before = await accepted_by(session)
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await raw(session, method, path)
            assert await accepted_by(session) == before
            assert (await raw(session, method, path))[0] in {200, 400}  # 400: the cancel was too late

    run(use())


@pytest.mark.parametrize("do", ["drop-after-accept", "answer-after-accept"])
def test_a_submit_can_be_accepted_without_a_successful_response(tmp_path, do):
    """The request is durable, and its idempotency key finds it."""
    text = fault("submit", do, **({"status": 503} if do.startswith("answer") else {}))

    async def use():
        key = {"idempotency-key": "k"}
        async with injecting(tmp_path, text) as session:
            try:
                async with session.post(SUBMIT, json=INPUT, headers=key) as response:
                    seen = response.status
            except aiohttp.ServerDisconnectedError:
                seen = None
            assert seen == (503 if do.startswith("answer") else None)
            assert await accepted_by(session) == 1
            again = await submit(session, headers=key)
            assert await accepted_by(session) == 1
            assert (await result(session, again))[0] == 200

    run(use())


@pytest.mark.parametrize("do", ["drop-after-accept", "answer-after-accept"])
def test_a_rejected_submit_stays_rejected(tmp_path, do):
    """A rejected submit returns its real error."""
    text = fault("submit", do, **({"status": 503} if do.startswith("answer") else {}))

    async def use():
        async with injecting(tmp_path, text) as session:
            assert (await call(session, "POST", SUBMIT, data=b"["))[0] == 422

    run(use())


@pytest.mark.parametrize("point", [FaultPoint.SUBMIT, FaultPoint.RESULT, FaultPoint.LISTING])
def test_a_late_response_is_correct(tmp_path, point):
    """It is the correct response, `seconds` late."""

    async def use():
        async with injecting(tmp_path, fault(point, "late", seconds=0.2)) as session:
            method, path = await path_for(session, point)
            began = time.monotonic()
            assert (await raw(session, method, path))[0] == 200
            assert time.monotonic() - began >= 0.2
            if point is FaultPoint.SUBMIT:
                assert await accepted_by(session) == 1

    run(use())


def test_a_late_submit_is_accepted(tmp_path):
    """A client timeout does not undo the acceptance."""

    async def use():
        async with injecting(tmp_path, fault("submit", "late", seconds=1)) as session:
            with pytest.raises(TimeoutError):
                await session.post(SUBMIT, json=INPUT, timeout=aiohttp.ClientTimeout(total=0.3))
            assert await accepted_by(session) == 1

    run(use())


@pytest.mark.parametrize("point", CALLS)
def test_an_error_has_the_service_s_body(tmp_path, point):
    """JSON with a request id, in the platform API's format for its calls; nothing is executed."""
    words = {401: "No user found", 403: "User is locked", 429: "not accepted", 500: "Internal"}
    kinds = {401: "authorization_error", 403: "authorization_error", 429: "rate_limited", 500: "server_error"}

    async def use():
        text = "".join(fault(point, "answer", status=status, first=n) for n, status in enumerate(words, 1))
        async with injecting(tmp_path, text) as session:
            method, path = await path_for(session, point)
            before = await accepted_by(session)
            for status, said in words.items():
                found, headers, body = await raw(session, method, path)
                assert (found, headers["content-type"]) == (status, "application/json")
                assert headers["x-fal-request-id"]
                assert "retry-after" not in headers
                if point is FaultPoint.LISTING:
                    assert orjson.loads(body)["error"]["type"] == kinds[status]
                else:
                    assert said in orjson.loads(body)["detail"]
            assert await accepted_by(session) == before

    run(use())


def test_an_error_can_have_retry_after(tmp_path):
    """The header contains the seconds from the file."""

    async def use():
        async with injecting(tmp_path, fault("submit", "answer", status=429, retry_after=1.5)) as session:
            status, headers, _ = await raw(session, "POST", SUBMIT)
            assert (status, headers["retry-after"]) == (429, "1.5")
            assert await accepted_by(session) == 0

    run(use())


def test_a_gateway_error_is_an_nginx_page(tmp_path):
    """HTML without a request id, which makes fal's Python client retry."""

    async def use():
        text = "".join(fault("status", "answer", status=502 + n, first=n + 1) for n in range(3))
        async with injecting(tmp_path, text) as session:
            method, path = "GET", read("x", "/status")
            for status in (502, 503, 504):
                found, headers, body = await raw(session, method, path)
                assert (found, headers["content-type"], headers["server"]) == (status, "text/html", "nginx")
                assert b"nginx" in body
                assert "x-fal-request-id" not in headers

    run(use())


def test_a_gateway_error_can_look_like_a_model_error(tmp_path):
    """`body = "fal"`: detail, error_type and header; `body = "empty"`: an empty body."""
    text = fault("result", "answer", status=503, body="fal") + fault(
        "result", "answer", status=503, body="empty", first=2
    )

    async def use():
        async with injecting(tmp_path, text) as session:
            method, path = await path_for(session, FaultPoint.RESULT)
            _, headers, body = await raw(session, method, path)
            assert headers["x-fal-error-type"] == orjson.loads(body)["error_type"] == "runner_scheduling_failure"
            status, headers, body = await raw(session, method, path)
            assert (status, body) == (503, b"")

    run(use())


@pytest.mark.parametrize("point", [FaultPoint.FILE, FaultPoint.RESULT, FaultPoint.STATUS, FaultPoint.LISTING])
def test_a_body_can_be_slow_cut_or_short(tmp_path, point):
    """`slow` is complete; `cut` ends before its Content-Length; `short` is incomplete with a matching one."""
    text = fault(point, "slow", seconds=0.2) + fault(point, "cut", first=2) + fault(point, "short", first=3)

    async def use():
        async with injecting(tmp_path, text) as session:
            method, path = await path_for(session, point)
            began = time.monotonic()
            status, headers, whole = await raw(session, method, path)
            assert (status, int(headers["content-length"])) == (200, len(whole))
            assert time.monotonic() - began > 0.19
            async with session.request(method, path) as response:
                assert response.status == 200
                assert response.content_length is not None
                assert response.content_length > len(whole) / 2
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            status, headers, short = await raw(session, method, path)
            assert (status, int(headers["content-length"])) == (200, len(short))
            assert len(short) < len(whole)
            status, headers, right = await raw(session, method, path)
            assert (status, len(right)) == (200, len(whole))
            if point is FaultPoint.FILE:
                assert (whole, short) == (right, right[: len(right) // 2])

    run(use())


def test_an_error_is_not_cut(tmp_path):
    """A missing file returns 404."""

    async def use():
        text = fault("file", "cut", every=1) + fault("result", "short", every=1)
        async with injecting(tmp_path, text) as session:
            assert (await call(session, "GET", "/files/ab/" + "ab" * 16))[0] == 404
            assert (await call(session, "GET", read("0" * 36)))[0] == 404

    run(use())


TYPES = {"seed": int, "has_nsfw_concepts": list, "timings": dict, "prompt": str}


def oddities(right, seen):
    """Return the wrong fields and how they differ: missing, null or a type."""
    changed = {name for name in right if name not in seen or seen[name] != right[name]}
    return {name: type(seen[name]).__name__ if name in seen else "absent" for name in changed}


def test_a_result_can_have_odd_fields(tmp_path):
    """Correct images, other fields missing, null or of a wrong type, at every read; other results are correct."""

    async def results_of(session, count):
        ids = [await submit(session, f"cat {number}", seed=number + 1) for number in range(count)]
        for one in ids:
            await completed(session, one)
        return ids, [(await call(session, "GET", read(one)))[2] for one in ids]

    async def use(folder, seed):
        (tmp_path / folder).mkdir()
        text = f"seed = {seed}\n" + fault("result", "odd-fields", every=2)
        async with injecting(tmp_path / folder, text) as session:
            ids, first = await results_of(session, 60)
            again = [(await call(session, "GET", read(one, "/response")))[2] for one in ids[1::2]]
            assert again == first[1::2]
        async with serving(tmp_path / folder / "data") as session:
            right = [(await call(session, "GET", read(one)))[2] for one in ids]
        for number, (good, seen) in enumerate(zip(right, first, strict=True)):
            paths = [[image["url"].partition("/files/")[2] for image in one["images"]] for one in (good, seen)]
            assert paths[0] == paths[1]
            found = oddities({**good, "images": []}, {**seen, "images": []})
            assert bool(found) is (number % 2 == 1), (number, found)
            assert found.keys() <= TYPES.keys()
            assert all(name not in seen or seen[name] is None or seen[name] != good[name] for name in found)
        found = [
            oddities({**good, "images": []}, {**one, "images": []}) for good, one in zip(right, first, strict=True)
        ]
        return Counter(item for one in found for item in one.items())

    found = run(use("a", 3))
    assert {name for name, _ in found} == TYPES.keys()
    for name in ("seed", "has_nsfw_concepts", "timings"):
        assert {"absent", "NoneType"} < {kind for other, kind in found if other == name}, name
    assert found != run(use("b", 4)), "the file's seed chooses"


def test_an_error_has_no_odd_fields(tmp_path):
    """Unfinished, failed and unknown requests return their real response."""

    async def use():
        async with injecting(tmp_path, fault("result", "odd-fields", every=1)) as session:
            failed, held = await submit(session, "fail"), await submit(session, "hold")
            status, _, body = await result(session, failed)
            assert (status, body["detail"][0]["type"]) == (422, "image_too_small")
            assert (await call(session, "GET", read(held)))[0] == 400
            assert (await call(session, "GET", read("0" * 36)))[0] == 404

    run(use())


def test_an_odd_result_can_get_another_fault(tmp_path):
    """A later fault of the call leaves the odd fields as they are."""
    text = fault("result", "odd-fields") + fault("result", "late", seconds=0.05, first=2)

    async def use():
        async with injecting(tmp_path, text) as session:
            request_id = await submit(session)
            await completed(session, request_id)
            bodies = [(await call(session, "GET", read(request_id)))[2] for _ in range(3)]
            assert bodies[0] == bodies[1] == bodies[2]
            assert oddities({"seed": 0, "has_nsfw_concepts": 0, "timings": 0, "prompt": 0}, bodies[0])

    run(use())


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize(("choice", "chosen"), [({"every": 1}, 3), ({"first": 1}, 1)], ids=["each", "the first"])
def test_a_file_can_be_refused_for_its_first_reads(tmp_path, status, choice, chosen):
    """Each chosen file is refused for its first reads only; other files are served immediately."""

    async def use():
        async with injecting(tmp_path, fault("file", "refuse", status=status, reads=3, **choice)) as session:
            for number in range(3):
                async with session.post(UPLOAD, data=b"%d" % number * 1000) as response:
                    url = orjson.loads(await response.read())["access_url"]
                async with session.head(url) as response:
                    assert response.status == 200, "no read"
                seen = [await raw(session, "GET", url) for _ in range(8)]
                assert [one for one, _, _ in seen] == ([status] * 3 if number < chosen else []) + [200] * (
                    5 if number < chosen else 8
                )
                assert seen[-1][2] == b"%d" % number * 1000

    run(use())


def test_a_file_can_be_refused_for_a_while(tmp_path):
    """For `seconds` from the first refusal, with the body and headers of the faults file."""
    text = fault("file", "refuse", status=403, seconds=0.3, retry_after=1, body="html", every=1)

    async def use():
        async with injecting(tmp_path, text) as session:
            method, url = await path_for(session, FaultPoint.FILE)
            began, refusals = time.monotonic(), 0
            while (seen := await raw(session, method, url))[0] == 403:
                refusals += 1
                assert (seen[1]["retry-after"], b"nginx" in seen[2]) == ("1", True)
                assert time.monotonic() - began < 10
            assert time.monotonic() - began >= 0.3
            assert refusals > 1
            assert [(await raw(session, method, url))[0] for _ in range(5)] == [200] * 5

    run(use())


# --- faults of requests -----------------------------------------------------------------------------------


def test_a_content_policy_rejection_is_completed_without_an_error(tmp_path):
    """The status has no `error` and no `error_type`, also after a restart; the result is 422."""

    async def use():
        async with injecting(tmp_path, fault("execute", "content-policy")) as session:
            request_id = await submit(session)
            last = await completed(session, request_id)
            assert (last["status"], "error" in last, "error_type" in last) == ("COMPLETED", False, False)
            status, headers, body = await call(session, "GET", read(request_id))
            assert (status, body["detail"][0]["type"]) == (422, "content_policy_violation")
            assert headers["x-fal-needs-retry"] == "false"
        async with serving(tmp_path / "data") as session:
            assert "error" not in (await call(session, "GET", read(request_id, "/status")))[2]

    run(use())


@pytest.mark.parametrize(("status", "kind"), [(500, "internal_server_error"), (504, "generation_timeout")])
@pytest.mark.parametrize("retryable", [True, False])
def test_a_model_failure_is_marked_retryable_or_final(tmp_path, status, kind, retryable):
    """The result is a 5xx with a model error and `X-Fal-Needs-Retry`; nothing is billed."""
    text = fault("execute", "fail", status=status, retryable=retryable)

    async def use():
        async with injecting(tmp_path, text) as session:
            found, headers, body = await result(session, await submit(session))
            assert (found, body["detail"][0]["type"]) == (status, kind)
            assert headers["x-fal-needs-retry"] == ("true" if retryable else "false")
            assert headers["x-fal-billable-units"] == "0"
            assert (await result(session, await submit(session)))[0] == 200

    run(use())


def test_a_result_can_expire(tmp_path):
    """The result returns 404 from `seconds` after its end until the server stops; the status stays COMPLETED."""

    async def use():
        async with injecting(tmp_path, fault("execute", "expire", seconds=0.3)) as session:
            request_id, other = await submit(session), await submit(session)
            status, _, _ = await result(session, request_id)
            assert status == 200
            ended = time.monotonic()
            while status == 200:
                assert time.monotonic() - ended < 10
                status, headers, body = await call(session, "GET", read(request_id))
            assert (status, body) == (404, {"status": "NOT_FOUND"})
            assert headers["x-fal-request-id"]
            assert (await call(session, "GET", read(request_id, "/status")))[2]["status"] == "COMPLETED"
            assert (await result(session, other))[0] == 200

    run(use())


def test_a_request_can_return_to_the_queue(tmp_path):
    """IN_PROGRESS, then IN_QUEUE, then executed, with the same id."""

    async def use():
        engine = ScriptedEngine()
        async with injecting(tmp_path, fault("execute", "requeue", seconds=0.3), engine) as session:
            request_id = await submit(session)
            seen = []
            while not seen or seen[-1] != "COMPLETED":
                seen.append((await call(session, "GET", read(request_id, "/status")))[2]["status"])
            changes = [now for now, before in zip(seen, [None, *seen], strict=False) if now != before]
            assert changes[:2] == ["IN_PROGRESS", "IN_QUEUE"]
            assert changes[-1] == "COMPLETED"
            assert (await result(session, request_id))[0] == 200
            assert len(engine.seen) == 1

    run(use())


def test_a_requeued_request_can_be_cancelled(tmp_path):
    """A cancel is effective while the request pretends to run."""

    async def use():
        async with injecting(tmp_path, fault("execute", "requeue", seconds=60)) as session:
            request_id = await submit(session)
            await call(session, "PUT", read(request_id, "/cancel"))
            assert (await result(session, request_id))[0] == 499

    run(use())


@pytest.mark.parametrize(("first", "status"), [(1, 200), (2, 500)])
def test_a_request_survives_one_crash_and_fails_after_two(tmp_path, first, status):
    """After the first crash the request is retried with the same id; after the second it fails."""

    async def use():
        async with injecting(tmp_path, fault("execute", "crash", first=first)) as session:
            found, _, body = await result(session, await submit(session))
            assert (found, body.get("error_type")) == (status, None if status == 200 else "internal_error")

    run(use())


# --- the file and the middleware --------------------------------------------------------------------------


def test_a_server_without_a_faults_file_has_no_middleware(tmp_path):
    """There is no middleware without a faults file."""
    from batch.server.http import app as app_module

    made = []

    async def use(**options):
        original = app_module.web.Application
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app_module.web, "Application", lambda **given: made.append(original(**given)) or made[-1])
            async with serving(tmp_path, **options) as session:
                await submit(session)

    run(use())
    assert not [one for one in made[-1].middlewares if "inject" in one.__qualname__]
    path = tmp_path / "faults.toml"
    path.write_text("")
    run(use(faults=path))
    assert len([one for one in made[-1].middlewares if "inject" in one.__qualname__]) == 1


def test_an_invalid_faults_file_prevents_the_start(tmp_path):
    """The error is one sentence, and the data dir is not created."""

    async def use(path):
        async with serving(tmp_path / "data", faults=path):
            raise AssertionError("it serves")

    with pytest.raises(ConfigError, match="No such file"):
        run(use(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("[[fault]]\nat = 'submit'\ndo = 'explode'\nfirst = 1\n")
    with pytest.raises(ConfigError, match="unknown do 'explode' at submit"):
        run(use(tmp_path / "bad.toml"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("method", "path", "point"),
    [
        ("POST", SUBMIT, FaultPoint.SUBMIT),
        ("POST", "/fal-ai/other", None),
        ("GET", SUBMIT, None),
        ("POST", "/run" + SUBMIT, None),
        ("GET", read("x", "/status"), FaultPoint.STATUS),
        ("GET", read("x", "/status/"), FaultPoint.STATUS),
        ("GET", read("x", "/status/stream"), None),
        ("GET", read("x"), FaultPoint.RESULT),
        ("GET", read("x", "/response"), FaultPoint.RESULT),
        ("PUT", read("x", "/cancel"), FaultPoint.CANCEL),
        ("GET", "/files/ab/cd", FaultPoint.FILE),
        ("HEAD", "/files/ab/cd", None),
        ("POST", "/files/upload", FaultPoint.UPLOAD),
        ("PUT", "/storage/upload/t/files/ab/cd", FaultPoint.UPLOAD),
        ("GET", "/v1/models/requests/by-endpoint", FaultPoint.LISTING),
        ("GET", "/v1/models/pricing", None),
        ("GET", "/health", None),
        ("GET", "/", None),
    ],
)
def test_each_call_belongs_to_its_point(method, path, point):
    """Health, prices, direct calls and the page have no faults."""
    assert fault_point_of(method, path, APP_ID) is point


def test_the_example_file_shows_every_fault():
    """configs/faults.toml contains each action, point, selector and key."""
    path = REPOSITORY / "configs" / "faults.toml"
    plan, text = read_faults(path), path.read_text("utf-8")
    assert {one.do for one in plan.faults} == set(FaultAction)
    assert {one.at for one in plan.faults} == set(FaultPoint)
    assert [key for key in FaultRule.model_fields if f"{key} = " not in text] == []
    assert [key for key in ListingRules.__dataclass_fields__ if f"{key} = " not in text] == []


def test_a_whole_run_survives_the_example_file(tmp_path):
    """200 rows: each is done, or failed by an injected model error; none is submitted twice."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(200)), tmp_path / "run"
    file = REPOSITORY / "configs" / "faults.toml"
    ended = restyle("run", manifest, "-o", directory, "--engine", "echo", "--faults", file, timeout=110)
    assert ended.code == 3, ended.text
    table = results(directory).to_pylist()
    outcomes = Counter((row["status"], row["error_type"]) for row in table)
    assert set(outcomes) == {("done", None), ("failed", "content_policy_violation")}, outcomes
    assert outcomes["failed", "content_policy_violation"] >= 2
    assert all(row["images"][0]["sha256"] for row in table if row["status"] == "done")
    attempts = sum(row["attempts"] for row in table)
    assert attempts > 200, "a model failure that may be retried is another submit"
    assert accepted(directory) == attempts
    assert (jobs_in(directory), summary(directory)["unknown"]) == (200, 0)
    committed = (directory / "endpoint" / "server.log").read_text()
    on = {fault.do for fault in read_faults(file).faults}
    assert [do for do in on if f"injected fault: {do} " not in committed] == []


def test_a_run_rejects_an_invalid_faults_file_or_a_foreign_target(tmp_path):
    """The exit code is 2 with one sentence, and nothing is submitted."""
    manifest = write_manifest(tmp_path / "m.csv", range(2))
    ended = restyle("run", manifest, "-o", tmp_path / "a", "--faults", tmp_path / "none.toml")
    assert (ended.code, f"the faults file {tmp_path / 'none.toml'}: No such file" in ended.err) == (2, True), ended.text
    ended = restyle("run", manifest, "-o", tmp_path / "b", "--target", "http://127.0.0.1:1", "--faults", "x.toml")
    assert (ended.code, "is for the embedded endpoint" in ended.err) == (2, True), ended.text


def test_a_proxied_call_gets_the_faults_of_its_target(tmp_path):
    """Calls through the proxy route get the same faults as direct ones."""

    async def use():
        async with injecting(tmp_path, fault("submit", "answer", status=429)) as session:
            headers = {"x-fal-target-url": f"https://queue.fal.run{SUBMIT}"}
            found = [(await call(session, "POST", "/api/fal/proxy", json=INPUT, headers=headers))[0] for _ in range(2)]
            assert found == [429, 200]

    run(use())


def test_missing_images_are_temporary(tmp_path):
    """The list is empty at the first reads, and complete afterwards."""

    async def use():
        async with injecting(tmp_path, '[[fault]]\nat = "result"\ndo = "no-images"\nreads = 2\nfirst = 1\n') as session:
            one = await submit(session)
            assert (await completed(session, one))["status"] == "COMPLETED"
            found = [(await call(session, "GET", read(one)))[2] for _ in range(4)]
            assert [len(body["images"]) for body in found] == [0, 0, 1, 1]
            assert {body["seed"] for body in found} == {found[-1]["seed"]}

    run(use())
