"""The endpoint over real HTTP: the behaviour that fal's clients and restyle rely on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys

import aiohttp
import fal_client
import fal_client.client
import orjson
import pytest

from batch.errors import InputError
from batch.fal.endpoint import APP_ID
from batch.server.egress.http_client import SafeHttpClient
from batch.server.egress.source_images import SourceFetcher
from batch.server.engines.base import WorkerCrashed
from batch.server.engines.echo import EchoEngine
from batch.server.files.storage import Storage
from batch.server.limits import ServerLimits
from batch.server.queue import service as service_module
from batch.server.queue.records import CompletedRequest
from batch.server.queue.store import Store
from batch.server.serve import ServeOptions, serve
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, full_disk, read, result, serving, submit

PNG = b"\x89PNG and then some"


def run(coroutine):
    return asyncio.run(coroutine)


# --- the queue --------------------------------------------------------------------------------------------


def test_a_request_goes_from_submit_to_result(tmp_path):
    """200 with all fields and URLs of this server, 200 COMPLETED, then the output; its image URLs work."""

    async def use():
        async with serving(tmp_path) as session:
            status, headers, ticket = await call(session, "POST", SUBMIT, json={**INPUT, "seed": 2**53 + 1})
            assert status == 200
            assert headers["x-fal-request-id"] == ticket["request_id"]
            assert set(ticket) == {
                *("status", "request_id", "response_url", "status_url", "cancel_url"),
                *("logs", "metrics", "queue_position"),
            }
            assert ticket["status_url"].startswith(str(session._base_url))
            last = await completed(session, ticket["request_id"])
            assert last["metrics"] == {"inference_time": 0.5}
            assert [line["message"] for line in last["logs"]] == ["step 1 of 2", "step 2 of 2"]
            assert set(last["logs"][0]) == {"message", "timestamp", "level", "source", "labels"}
            status, _, again = await call(session, "GET", ticket["status_url"] + "?logs=0")
            assert (status, again["logs"]) == (200, [])
            status, headers, output = await call(session, "GET", ticket["response_url"])
            assert (status, headers["x-fal-billable-units"], headers["x-restyle-engine"]) == (200, "0.5000", "scripted")
            assert (output["seed"], output["prompt"], output["has_nsfw_concepts"]) == (2**53 + 1, "a cat", [])
            (image,) = output["images"]
            assert (image["width"], image["height"], image["content_type"]) == (1000, 500, "image/png")
            async with session.get(image["url"]) as response:
                data = await response.read()
            assert data.startswith(ticket["request_id"].encode())
            assert (len(data), response.content_type) == (image["file_size"], "image/png")

    run(use())


@pytest.mark.parametrize("app", ["fal-ai/flux", "fal-ai/flux/dev/image-to-image"])
@pytest.mark.parametrize("tail", ["", "/", "/response"])
def test_reads_work_with_every_path_form(tmp_path, app, tail):
    """Owner/alias or full id, `/response`, trailing slash."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session)
            await completed(session, request_id)
            assert (await call(session, "GET", f"/{app}/requests/{request_id}{tail}"))[0] == 200
            assert (await call(session, "GET", f"/{app}/requests/{request_id}/status{tail[:1] * (tail == '/')}"))[
                0
            ] == 200

    run(use())


def test_status_is_202_with_positions_until_it_ended(tmp_path):
    """IN_PROGRESS and IN_QUEUE return 202 with 0-based positions; the result returns 400."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            ids = [await submit(session, "hold") for _ in range(3)]
            found = [await call(session, "GET", read(one, "/status?logs=true")) for one in ids]
            assert [status for status, _, _ in found] == [202] * 3
            assert [body["status"] for _, _, body in found] == ["IN_PROGRESS", "IN_QUEUE", "IN_QUEUE"]
            assert found[0][2]["logs"] == []
            assert [body.get("queue_position") for _, _, body in found] == [None, 0, 1]
            status, _, body = await call(session, "GET", read(ids[0]))
            assert (status, body) == (400, {"detail": "Request is still in progress"})
            engine.go.set()
            assert [(await result(session, one))[0] for one in ids] == [200] * 3

    run(use())


def test_an_invalid_input_is_accepted_and_fails_with_422(tmp_path):
    """The input is validated on execution, as on fal: COMPLETED with `error`, every problem in `detail`."""

    async def use():
        async with serving(tmp_path) as session:
            status, _, ticket = await call(session, "POST", SUBMIT, json={"prompt": 5, "strength": 2})
            assert status == 200
            last = await completed(session, ticket["request_id"])
            assert (last["error"], "error_type" in last) == ("Invalid status code: 422", False)
            status, headers, body = await call(session, "GET", ticket["response_url"])
            assert (status, headers["x-fal-billable-units"], headers["x-fal-needs-retry"]) == (422, "0", "false")
            found = {tuple(one["loc"]): (one["type"], one.get("ctx")) for one in body["detail"]}
            assert found == {
                ("body", "image_url"): ("missing", None),
                ("body", "prompt"): ("string_type", None),
                ("body", "strength"): ("less_than_equal", {"le": 1.0}),
            }

    run(use())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'"text"', b"\xff", b'{"a": NaN}'])
def test_a_body_that_is_not_a_json_object_is_rejected_at_once(tmp_path, body):
    """The response is 422 with a model error; nothing is accepted."""

    async def use():
        async with serving(tmp_path) as session:
            status, headers, answer = await call(session, "POST", SUBMIT, data=body)
            assert (status, answer["detail"][0]["type"]) == (422, "json_invalid")
            assert headers["x-fal-request-id"]
            health = (await call(session, "GET", "/health"))[2]
            assert (health["accepted"], health["submit_posts"]) == (0, 1)

    run(use())


@pytest.mark.parametrize(
    ("prompt", "status", "error_type", "tries"),
    [("fail", 422, None, 1), ("boom", 500, "internal_error", 1), ("crash", 500, "internal_error", 2)],
)
def test_a_failed_request_is_completed_with_its_error(tmp_path, prompt, status, error_type, tries):
    """A model error keeps its body; a bug and a second worker crash are `internal_error`."""

    async def use():
        engine = ScriptedEngine()
        async with serving(tmp_path, engine) as session:
            request_id = await submit(session, prompt)
            last = await completed(session, request_id)
            assert (last["error"], last.get("error_type")) == (f"Invalid status code: {status}", error_type)
            found, headers, body = await call(session, "GET", read(request_id))
            assert (found, headers.get("x-fal-error-type"), len(engine.seen)) == (status, error_type, tries)
            if prompt == "fail":
                (detail,) = body["detail"]
                assert (detail["type"], detail["ctx"]) == ("image_too_small", {"min_width": 16})
                assert (detail["loc"], detail["input"]) == (["body", "image_url"], INPUT["image_url"])
                assert detail["url"] == "https://docs.fal.ai/errors#image_too_small"

    run(use())


def test_a_request_survives_one_worker_crash(tmp_path):
    """The request is retried with the same id and the same seed."""

    async def use():
        engine = ScriptedEngine()
        async with serving(tmp_path, engine) as session:
            request_id = await submit(session, "crash once")
            status, _, body = await result(session, request_id)
            assert status == 200
            assert [job.seed for job in engine.seen] == [body["seed"]] * 2

    run(use())


def test_cancel_removes_a_queued_request_and_stops_a_running_one(tmp_path):
    """202 for both, then 499; 400 after the end; 404 for an unknown id."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            running, queued = await submit(session, "hold"), await submit(session, "hold")
            for one in (queued, running):
                status, _, body = await call(session, "PUT", read(one, "/cancel"))
                assert (status, body) == (202, {"status": "CANCELLATION_REQUESTED"})
                last = await completed(session, one)
                assert last["error_type"] == "client_cancelled"
                assert (await call(session, "GET", read(one)))[0] == 499
                status, _, body = await call(session, "PUT", read(one, "/cancel/"))
                assert (status, body) == (400, {"status": "ALREADY_COMPLETED"})
            assert [job.request_id for job in engine.seen] == [running]
            status, _, body = await call(session, "PUT", read("0" * 36, "/cancel"))
            assert (status, body) == (404, {"status": "NOT_FOUND"})

    run(use())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/fal-ai/other", 404),
        ("POST", "/fal-ai/flux/schnell", 404),
        ("POST", "/run/fal-ai/other/thing", 404),
        ("POST", "/alone", 404),
        ("GET", "/fal-ai/flux/requests/x", 404),
        ("GET", read("0199c0de-0000-7000-8000-000000000001", "/status"), 404),
        ("GET", read("0199c0de-0000-7000-8000-000000000001", "/elsewhere"), 404),
        ("GET", SUBMIT, 405),
        ("DELETE", read("0199c0de-0000-7000-8000-000000000001"), 405),
        ("PUT", "/storage/upload/token/files/ab/abc", 403),
        ("POST", "/storage/upload/elsewhere", 404),
        ("GET", "/files/ab/nothing", 404),
        ("GET", "/files/%2e%2e/secret", 404),
    ],
)
def test_every_error_is_json_with_a_request_id(tmp_path, method, path, status):
    """Any other error is attributed to a proxy by fal's Python client, which repeats the call."""

    async def use():
        async with serving(tmp_path) as session:
            found, headers, body = await call(session, method, path)
            assert (found, headers["content-type"]) == (status, "application/json")
            assert headers["x-fal-request-id"]
            assert body.get("detail") or body == {"status": "NOT_FOUND"}
            if path == "/fal-ai/flux/schnell":
                assert (body["detail"], headers["x-fal-billable-units"]) == ("Path /schnell not found", "0")

    run(use())


def test_a_request_of_another_app_s_path_is_not_found(tmp_path):
    """A request is only found below its own app."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session)
            assert (await call(session, "GET", f"/fal-ai/other/requests/{request_id}/status"))[0] == 404

    run(use())


def test_an_idempotency_key_gives_the_same_request_to_the_same_input(tmp_path):
    """200 with the first id, not counted again, also after a restart; a different input returns 422."""

    async def use():
        key = {"idempotency-key": "job-1"}
        async with serving(tmp_path) as session:
            first = await submit(session, "one", headers=key)
            again = {"prompt": "one", "image_url": INPUT["image_url"]}  # same input in another order of keys
            assert (await call(session, "POST", SUBMIT, json=again, headers=key))[2]["request_id"] == first
            status, _, body = await call(session, "POST", SUBMIT, json={**INPUT, "prompt": "two"}, headers=key)
            assert (status, body["detail"][0]["type"]) == (422, "idempotency_key_reused")
            await completed(session, first)
        async with serving(tmp_path) as session:
            assert await submit(session, "one", headers=key) == first
            assert await submit(session, "one") != first
            health = (await call(session, "GET", "/health"))[2]
            assert (health["accepted"], health["submit_posts"]) == (2, 2)

    run(use())


def test_simultaneous_repeats_of_one_submit_are_one_request(tmp_path):
    """Concurrent repeats are one request, too."""

    async def use():
        engine = ScriptedEngine()
        async with serving(tmp_path, engine) as session:
            key = {"idempotency-key": "k"}
            ids = await asyncio.gather(*(submit(session, headers=key) for _ in range(20)))
            await completed(session, ids[0])
            assert (len(set(ids)), len(engine.seen)) == (1, 1)

    run(use())


def test_a_result_contains_the_name_of_its_engine(tmp_path):
    """Results keep the name of their engine when the data dir gets another one."""

    async def use():
        async with serving(tmp_path) as session:
            made = await submit(session)
            assert (await result(session, made))[1]["x-restyle-engine"] == "scripted"
        async with serving(tmp_path, EchoEngine()) as session:
            assert (await result(session, made))[1]["x-restyle-engine"] == "scripted"
            assert (await result(session, await submit(session)))[1]["x-restyle-engine"] == "echo"

    run(use())


@pytest.mark.parametrize("header", ["X-Fal-Request-Timeout", "X-Fal-Request-Start-Timeout"])
def test_a_start_timeout_ends_a_waiting_request(tmp_path, header):
    """The result is 504 with type `user`; the request is never executed."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            await submit(session, "hold")
            late = await submit(session, headers={header: "0.2"})
            status, headers, body = await result(session, late)
            assert (status, body["error_type"]) == (504, "request_timeout")
            assert headers["x-fal-request-timeout-type"] == "user"
            engine.go.set()
        assert len(engine.seen) == 1

    run(use())


def test_a_start_timeout_that_passed_while_the_server_was_down_is_honoured(tmp_path):
    """The next server does not start the request."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            await submit(session, "hold")
            late = await submit(session, headers={"X-Fal-Request-Start-Timeout": "0.2"})
        await asyncio.sleep(0.2)
        engine = ScriptedEngine(slots=2)
        engine.go.set()
        async with serving(tmp_path, engine) as session:
            status, headers, _ = await result(session, late)
            assert (status, headers["x-fal-request-timeout-type"]) == (504, "user")
            await session.get("/health")
        assert [job.input.prompt for job in engine.seen] == ["hold"]

    run(use())


class CrashesLate(ScriptedEngine):
    """Crashes on the first request after 0.3 s."""

    async def generate(self, job, on_step, cancelled):
        if not self.seen:
            self.seen.append(job)
            await asyncio.sleep(0.3)
            raise WorkerCrashed("killed by signal 9")
        return await super().generate(job, on_step, cancelled)


def test_a_crashed_request_is_not_retried_after_its_start_timeout(tmp_path):
    """The start deadline includes retries."""

    async def use():
        engine = CrashesLate(slots=1)
        async with serving(tmp_path, engine) as session:
            late = await submit(session, headers={"X-Fal-Request-Start-Timeout": "0.2"})
            status, headers, _ = await result(session, late)
            assert (status, headers["x-fal-request-timeout-type"]) == (504, "user")
            assert (await result(session, await submit(session)))[0] == 200, "its slot is free again"
        assert len(engine.seen) == 2

    run(use())


def test_a_start_timeout_is_dropped_at_start_or_cancel(tmp_path):
    """No timer remains until the deadline."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            day = {"x-fal-request-start-timeout": "86400"}
            held = await submit(session, "hold", headers=day)
            waiting = [await submit(session, headers=day) for _ in range(5)]
            await call(session, "PUT", read(waiting[0], "/cancel"))
            loop = asyncio.get_running_loop()
            timers = [one for one in loop._scheduled if one.when() > loop.time() + 80_000]
            assert [one.cancelled() for one in timers].count(False) == 4
            engine.go.set()
            for one in (held, *waiting):
                await completed(session, one)
            assert all(one.cancelled() for one in timers)

    run(use())


def test_a_waiting_call_leaks_nothing_per_wake_up(tmp_path):
    """Status stream and direct call: the number of futures is constant over 100 wake-ups."""

    def futures():
        gc.collect()
        return sum(isinstance(one, asyncio.Future) for one in gc.get_objects())

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine, limits=ServerLimits(keep_alive_seconds=0.002)) as session:
            await submit(session, "hold")
            direct = asyncio.create_task(call(session, "POST", f"/run{SUBMIT}", json=INPUT))
            async with session.get(read(await submit(session), "/status/stream")) as stream:
                for round_ in range(220):
                    while not (await stream.content.readline()).startswith(b": "):
                        pass
                    if round_ == 20:
                        before = futures()
                assert futures() - before < 20
                engine.go.set()
                assert b"COMPLETED" in await stream.read()
            assert (await direct)[0] == 200

    run(use())


def test_priority_and_queue_limit_are_honoured(tmp_path):
    """`low` waits behind `normal`; above `fal_max_queue_length`, a submit returns 429 and is not accepted."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            await submit(session, "hold")
            low = await submit(session, headers={"x-fal-queue-priority": "low"})
            await submit(session, headers={"x-fal-queue-priority": "normal"})
            assert (await call(session, "GET", read(low, "/status")))[2]["queue_position"] == 1
            status, _, _ = await call(session, "POST", f"{SUBMIT}?fal_max_queue_length=1", json=INPUT)
            assert status == 429
            assert (await call(session, "GET", "/health"))[2]["queue_depth"] == 2
            engine.go.set()

    run(use())


def test_the_direct_call_returns_the_output(tmp_path):
    """`POST /run/{app}` returns the result and its headers on one connection."""

    async def use():
        async with serving(tmp_path) as session:
            status, headers, body = await call(session, "POST", "/run" + SUBMIT, json={**INPUT, "num_images": 3})
            assert (status, headers["x-fal-billable-units"], len(body["images"])) == (200, "1.5000", 3)
            status, _, body = await call(session, "POST", "/run" + SUBMIT, json={**INPUT, "prompt": "fail"})
            assert (status, body["detail"][0]["type"]) == (422, "image_too_small")

    run(use())


def test_sync_mode_returns_data_uris(tmp_path):
    """The response contains the image."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session, sync_mode=True)
            _, _, body = await result(session, request_id)
            head, _, data = body["images"][0]["url"].partition(",")
            assert head == "data:image/png;base64"
            assert base64.b64decode(data).startswith(request_id.encode())

    run(use())


def test_a_prompt_cannot_forge_a_url(tmp_path):
    """Only the server's own members become absolute URLs, never text of a prompt."""

    async def use():
        prompt = '","url":"/files/aa/evil'
        async with serving(tmp_path) as session:
            _, _, body = await result(session, await submit(session, prompt))
            assert body["prompt"] == prompt

    run(use())


def test_health_describes_the_engine_and_the_missing_safety_checker(tmp_path):
    """Health contains engine, model, revision, checker, queue depth and counters."""

    async def use():
        async with serving(tmp_path) as session:
            assert (await call(session, "GET", "/health"))[2] == {
                "engine": "scripted",
                "model": "no model",
                "revision": "7",
                "safety_checker": "not checked",
                "safety_checked": False,
                "slots": 2,
                "honours_idempotency_key": True,
                "honours_start_timeout": True,
                "queue_depth": 0,
                "running": 0,
                "accepted": 0,
                "submit_posts": 0,
                "disk": "ok",
            }

    run(use())


# --- images in and out ----------------------------------------------------------------------------------


def test_an_embedded_image_reaches_the_engine_but_not_the_database(tmp_path):
    """A data URI is moved to the storage; an invalid one fails with `image_load_error`."""
    data = os.urandom(600_000)

    async def use():
        engine = ScriptedEngine(fetches_source=True)
        async with serving(tmp_path, engine) as session:
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            assert (await result(session, await submit(session, image_url=url)))[0] == 200
            assert engine.seen[0].source == data
            status, _, body = await result(session, await submit(session, image_url="data:image/png;base64,%%%"))
            assert (status, body["detail"][0]["type"]) == (422, "image_load_error")

    run(use())
    assert sum(path.stat().st_size for path in tmp_path.glob("server.db*")) < 300_000


@pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
def test_both_upload_mechanisms_give_a_usable_url(tmp_path, size):
    """Python's POST and JavaScript's PUT: type, length, ETag and HEAD, and valid as `image_url` after a restart."""
    data = os.urandom(size)

    async def upload(session):
        _, _, token = await call(session, "POST", "/storage/auth/token?storage_type=fal-cdn-v3", json={})
        assert {"token", "token_type", "base_url", "expires_at"} == set(token)
        headers = {"authorization": f"{token['token_type']} {token['token']}", "content-type": "image/png"}
        _, _, one = await call(session, "POST", token["base_url"] + "/files/upload", data=data, headers=headers)
        wanted = {"content_type": "image/png", "file_name": "../../cat.png"}
        _, _, two = await call(session, "POST", "/storage/upload/initiate?storage_type=fal-cdn-v3", json=wanted)
        assert (await call(session, "GET", two["file_url"]))[0] == 404
        status, answered, _ = await call(session, "PUT", two["upload_url"], data=data)
        assert (status, bool(answered["etag"])) == (200, True)
        return [one["access_url"], two["file_url"]]

    async def use():
        async with serving(tmp_path) as session:
            urls = await upload(session)
            for url in urls:
                async with session.get(url) as response:
                    assert (await response.read(), response.content_type) == (data, "image/png")
                    assert response.headers["x-content-type-options"] == "nosniff"
                async with session.head(url) as head:
                    assert (head.content_length, head.headers["etag"]) == (size, response.headers["etag"])
                async with session.get(url, headers={"if-none-match": response.headers["etag"]}) as unchanged:
                    assert unchanged.status == 304
        (tmp_path / "port").write_text("1")  # the next server uses another port
        engine = ScriptedEngine(fetches_source=True)
        async with serving(tmp_path, engine) as session:
            for url in urls:
                assert (await result(session, await submit(session, image_url=url)))[0] == 200
            assert [job.source for job in engine.seen] == [data, data]

    run(use())


def test_a_body_above_the_limit_is_413_with_the_limit(tmp_path):
    """The message contains the limit in MiB and what to do."""
    limits = ServerLimits(upload_bytes=2**20, body_bytes=2**20)

    async def chunks():
        for _ in range(20):
            yield b"x" * 2**17

    async def use():
        async with serving(tmp_path, limits=limits) as session:
            for path in (SUBMIT, "/files/upload"):
                status, headers, body = await call(session, "POST", path, data=io.BytesIO(b"x" * (2**20 + 1)))
                assert (status, "1 MiB" in body["detail"]) == (413, True)
                assert headers["x-fal-request-id"]
            status, _, _ = await call(session, "POST", "/files/upload", data=chunks())
            assert status == 413

    run(use())


@pytest.mark.parametrize("path", [SUBMIT, "/files/upload"])
def test_an_aborted_upload_leaves_nothing(tmp_path, caplog, path):
    """A partial body creates no request, no file, and no stack trace in the log."""

    async def use():
        async with serving(tmp_path) as session:
            _, writer = await asyncio.open_connection(session._base_url.host, session._base_url.port)
            writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
            await writer.drain()
            await call(session, "GET", "/health")
            writer.close()
            await writer.wait_closed()
            assert (await call(session, "GET", "/health"))[2]["accepted"] == 0

    run(use())
    assert not list((tmp_path / "incoming").iterdir())
    assert [record for record in caplog.records if record.exc_info] == []


# --- the process ------------------------------------------------------------------------------------------


def test_a_stopped_server_returns_running_requests_to_the_queue(tmp_path):
    """The next server executes it, in the same order; finished requests keep their results."""

    async def use():
        first, second = ScriptedEngine(slots=1), ScriptedEngine(slots=1)
        async with serving(tmp_path, first) as session:
            done = await submit(session, "quick")
            before = await result(session, done)
            held = [await submit(session, f"hold {n}") for n in range(3)]
            assert (await call(session, "GET", read(held[0], "/status")))[2]["status"] == "IN_PROGRESS"
        second.go.set()
        (tmp_path / "port").write_text("1")
        async with serving(tmp_path, second) as session:
            assert [(await result(session, one))[0] for one in held] == [200] * 3
            after = await call(session, "GET", read(done))
            assert after[2]["images"][0]["url"].startswith(str(session._base_url))
            assert after[2]["seed"] == before[2]["seed"]
            async with session.get(after[2]["images"][0]["url"]) as response:
                assert response.status == 200
        assert [job.request_id for job in second.seen] == held

    run(use())


def test_a_result_is_written_when_the_disk_has_space_again(tmp_path):
    """A finished result stays in memory until the write succeeds, and is published only then."""

    async def use():
        engine = ScriptedEngine()
        async with (
            await Store.open(tmp_path / "server.db") as store,
            Storage(tmp_path) as storage,
            SafeHttpClient() as client,
            service_module.queue_service(
                store, storage, engine, SourceFetcher(storage, client), retry_seconds=0.01
            ) as service,
        ):
            body = orjson.dumps({**INPUT, "prompt": "hold" + "x" * 100_000})
            request_id = (await service.submit(APP_ID, body, service_module.SubmitOptions())).request_id
            with full_disk(tmp_path / "server.db", "UPDATE"):
                engine.go.set()
                while service.statistics().ending == 0:
                    await service.changed(request_id, 0.01)
                while service.disk_refuses is None:
                    await asyncio.sleep(0.01)
                assert not isinstance((await service.find(request_id)).state, CompletedRequest)
            while not isinstance((await service.find(request_id)).state, CompletedRequest):
                await service.changed(request_id, 1)
            assert (await service.find(request_id)).state.status == 200
        assert len(engine.seen) == 1

    run(use())


def test_a_stream_ends_when_the_server_shuts_down(tmp_path):
    """The stream ends without delaying the shutdown."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session, "hold")
            stream = asyncio.create_task(completed(session, request_id))
            await call(session, "GET", read(request_id, "/status"))
            session_url = str(session._base_url)
        with contextlib.suppress(aiohttp.ClientError):
            assert (await stream)["status"] == "IN_PROGRESS"
        async with aiohttp.ClientSession() as other:
            with pytest.raises(aiohttp.ClientConnectionError):
                await other.get(session_url)

    run(use())


def test_a_port_or_data_dir_in_use_is_one_clear_sentence(tmp_path):
    """The InputError contains the value and what to do."""

    async def use():
        async with serving(tmp_path / "a") as session:
            options = ServeOptions(tmp_path / "b", port=session._base_url.port)
            with pytest.raises(InputError, match=rf"port {session._base_url.port} .* --port"):
                await serve(options, ready=print, engine=ScriptedEngine())
            options = ServeOptions(tmp_path / "a", port=0, limits=ServerLimits(lock_seconds=0.1))
            with pytest.raises(InputError, match="another server"):
                await serve(options, ready=print, engine=ScriptedEngine())
        with pytest.raises(InputError, match="unknown engine 'magic'"):
            await serve(ServeOptions(tmp_path / "c", port=0, engine="magic"), ready=print)

    run(use())


def start_process(data_dir, *options):
    """Start `python -m batch.server`; return the process and its URL."""
    command = [sys.executable, "-m", "batch.server", "--data-dir", str(data_dir), "--engine", "echo", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return process, json.loads(process.stdout.readline())["url"]


def end_process(process, number):
    process.send_signal(number)
    process.wait()
    process.stdout.close()


def test_a_killed_server_loses_and_duplicates_nothing(tmp_path):
    """After kill -9, finished, running and queued requests keep their ids, all finish, none is accepted twice."""

    async def before(url):
        async with aiohttp.ClientSession(url) as session:
            ids = [await submit(session, f"cat {n}", headers={"idempotency-key": str(n)}) for n in range(12)]
            outputs = [await result(session, one) for one in ids[:2]]
            states = [(await call(session, "GET", read(one, "/status")))[2]["status"] for one in ids]
            return ids, outputs, set(states)

    async def after(url, ids):
        async with aiohttp.ClientSession(url) as session:
            outputs = [await result(session, one) for one in ids]
            again = [await submit(session, f"cat {n}", headers={"idempotency-key": str(n)}) for n in range(12)]
            assert again == ids
            return outputs, (await call(session, "GET", "/health"))[2]["accepted"]

    process, url = start_process(tmp_path, "--slots", "2", "--service-time", "0.2")
    try:
        ids, outputs, states = run(before(url))
    finally:
        end_process(process, signal.SIGKILL)
    assert states == {"COMPLETED", "IN_PROGRESS", "IN_QUEUE"}
    process, second_url = start_process(tmp_path)
    try:
        all_outputs, accepted = run(after(second_url, ids))
    finally:
        end_process(process, signal.SIGTERM)
    assert process.returncode == 0
    assert second_url == url, "the port of the last server is taken again"
    assert [status for status, _, _ in all_outputs] == [200] * 12
    assert [body["prompt"] for _, _, body in all_outputs] == [f"cat {n}" for n in range(12)]
    assert [body for _, _, body in all_outputs[:2]] == [body for _, _, body in outputs]
    assert accepted == 12


# --- the official client ----------------------------------------------------------------------------------


@pytest.fixture
def official_client(monkeypatch):
    """Return a function that points the unmodified `fal_client` at a server and returns a client."""

    def point(url):
        for name in ("QUEUE_URL_FORMAT", "RUN_URL_FORMAT"):
            monkeypatch.setattr(fal_client.client, name, url + "/")
        for name in ("REST_URL", "CDN_URL"):
            monkeypatch.setattr(fal_client.client, name, url)
        return fal_client.SyncClient(key="id:secret")

    return point


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client never closes its upload connection
def test_the_official_python_client_is_served(tmp_path, official_client):
    """Upload, submit, status with logs, subscribe, result, cancel and errors work with the unmodified client."""
    app = SUBMIT.removeprefix("/")

    def talk(client, go):
        url = client.upload(PNG, "image/png", file_name="cat.png")
        given = {"image_url": url, "prompt": "a cat", "seed": 2**60}
        seen = []
        output = client.subscribe(app, given, with_logs=True, on_queue_update=seen.append)
        assert output["seed"] == 2**60
        assert isinstance(seen[-1], fal_client.Completed)
        assert [line["message"] for line in seen[-1].logs] == ["step 1 of 2", "step 2 of 2"]

        handle = client.submit(app, {**given, "prompt": "hold"}, priority="normal", start_timeout=30)
        assert isinstance(handle.status(), fal_client.InProgress)
        waiting = client.submit(app, {**given, "prompt": "hold"})
        assert client.status(app, waiting.request_id) == fal_client.Queued(position=0)
        waiting.cancel()
        with pytest.raises(fal_client.client.FalClientHTTPError) as cancelled:
            waiting.get()
        assert (cancelled.value.status_code, cancelled.value.error_type) == (499, "client_cancelled")
        go()
        assert handle.get()["prompt"] == "hold"
        assert client.result(app, handle.request_id)["seed"] == 2**60

        with pytest.raises(fal_client.client.FalClientHTTPError) as failed:
            client.subscribe(app, {**given, "prompt": "fail"})
        assert failed.value.status_code == 422
        assert "too small" in str(failed.value)

    async def use():
        engine, loop = ScriptedEngine(slots=1, fetches_source=True), asyncio.get_running_loop()
        async with serving(tmp_path, engine) as session:
            client = official_client(str(session._base_url).rstrip("/"))
            await asyncio.to_thread(talk, client, lambda: loop.call_soon_threadsafe(engine.go.set))
            client._client.close()
            gc.collect()
        assert engine.seen[0].source == PNG

    run(use())


def test_the_stream_is_server_sent_events(tmp_path):
    """`text/event-stream` with one `data:` per change, closed after COMPLETED."""

    async def use():
        engine = ScriptedEngine()
        async with serving(tmp_path, engine) as session:
            request_id = await submit(session, "hold")
            states = []
            async with session.get(read(request_id, "/status/stream")) as response:
                assert response.content_type == "text/event-stream"
                async for line in response.content:
                    if line.startswith(b"data: "):
                        states.append(orjson.loads(line[6:])["status"])
                        engine.go.set()
            assert (states[0], states[-1]) == ("IN_PROGRESS", "COMPLETED")

    run(use())
