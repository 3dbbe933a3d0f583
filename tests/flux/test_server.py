"""`restyle serve --engine flux` as a process: concurrent requests, kills, the official client and a complete run."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import urllib.request
from pathlib import Path

import aiohttp
import fal_client
import fal_client.client
import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.acceptance.command import children, restyle, results
from tests.acceptance.endpoint import APP, endpoint
from tests.acceptance.test_server_crash import Server
from tests.edges.serving import call, completed, read, result, submit
from tests.flux.rendering import PROMPT, job, packed, photograph, pixels, rendered

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(400),  # each worker imports torch and diffusers, which takes ten seconds on a free core
]
SOURCE = "data:image/png;base64," + base64.b64encode(packed(photograph())).decode()
INPUTS = {"image_url": SOURCE, "num_inference_steps": 10, "output_format": "png"}
LONG = {**INPUTS, "num_inference_steps": 50, "num_images": 4}
"""Inputs of a request that takes some seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flux")


@pytest.fixture(scope="module")
def server(folder, models):
    """A server with one worker on the CPU."""
    flags = ("--engine", "flux", "--model", models / "published", "--devices", "cpu", "--warm-up", "256x256")
    with endpoint(folder, *flags, "--allow-private", keyed=False) as running:
        yield running


def asking(server, ask):
    async def use():
        async with aiohttp.ClientSession(server.url) as session:
            return await ask(session)

    return asyncio.run(use())


class Shown:
    """Image bytes in the form that `pixels` accepts."""

    def __init__(self, data):
        self.data = data


async def shown(session, body, number=0):
    url = body["images"][number]["url"]
    async with session.get(url) as answer:
        assert answer.headers["content-type"] == body["images"][number]["content_type"]
        return pixels(Shown(await answer.read()))


def alone(renderer, **inputs):
    """Return the image of this request when it runs alone."""
    return pixels(rendered(renderer, job(**inputs)).images[0])


async def first_step(session, request_id):
    """Wait until the request has logged a step."""
    async with session.get(read(request_id, "/status/stream?logs=1")) as response:
        async for line in response.content:
            if b"step " in line:
                return
    raise AssertionError("the request ended without a step")


def test_the_model_is_identified_everywhere(server, folder):
    """Health, log, header and file name engine, model and revision; health and log report the missing checker."""

    async def ask(session):
        _, _, health = await call(session, "GET", "/health")
        request_id = await submit(session, **INPUTS)
        _, headers, body = await result(session, request_id)
        async with session.get(body["images"][0]["url"]) as answer, session.get("/") as page:
            return health, headers, body, await answer.read(), await page.text()

    health, headers, body, data, page = asking(server, ask)
    assert health["engine"].startswith("flux published@sha")
    assert health["engine"].endswith("+fp32")
    assert health["revision"] in health["engine"]
    assert health["model"] == "FLUX.1 [dev]: published"
    assert (health["safety_checked"], health["slots"]) == (False, 1)
    assert headers["x-restyle-engine"] == health["engine"]
    assert health["engine"] in page
    assert body["has_nsfw_concepts"] == []
    note = Image.open(io.BytesIO(data)).info["Comment"]
    assert note == f"restyle flux: FLUX.1 [dev], published, revision {health['revision']}, seed {body['seed']}"
    log = (folder / "server.log").read_text()
    assert "no safety checker is loaded" in log
    for words in (
        "loading transformer (1 of 4",
        f"published, revision {health['revision']} is loaded",
        "warm-up at 256x256",
    ):
        assert words in log


def test_eight_concurrent_requests_do_not_affect_each_other(server, renderer):
    """Every second request is cancelled, the first one while it runs; the others give the images of solo runs."""

    async def ask(session):
        running = await submit(session, PROMPT, **LONG, seed=99)
        await first_step(session, running)
        ids = [running, *await asyncio.gather(*(submit(session, PROMPT, **INPUTS, seed=seed) for seed in range(1, 8)))]
        ends = [asyncio.ensure_future(result(session, request_id)) for request_id in ids]
        for request_id in ids[::2]:
            assert (await call(session, "PUT", read(request_id, "/cancel")))[0] == 202
        answers = await asyncio.gather(*ends)
        assert [status for status, _, _ in answers] == [499, 200] * 4
        return {body["seed"]: await shown(session, body) for _, _, body in answers[1::2]}

    images = asking(server, ask)
    assert sorted(images) == [1, 3, 5, 7]
    for seed, seen in images.items():
        assert np.array_equal(seen, alone(renderer, seed=seed)), seed


def test_a_killed_worker_loses_no_request(server, renderer):
    """A new process runs the request again under the same id, with the images of a solo run."""
    (worker,) = children(server.process.pid)

    async def ask(session):
        request_id = await submit(session, PROMPT, **LONG, seed=3)
        await first_step(session, request_id)
        os.kill(worker, signal.SIGKILL)
        last = await completed(session, request_id)
        assert any("was killed by SIGKILL" in line["message"] for line in last["logs"])
        status, _, body = await call(session, "GET", read(request_id))
        assert status == 200, body
        return body["seed"], [await shown(session, body, number) for number in range(4)]

    seed, images = asking(server, ask)
    assert children(server.process.pid) != [worker]
    assert seed == 3
    for number, seen in enumerate(images):
        assert np.array_equal(seen, alone(renderer, seed=3 + number, num_inference_steps=50))


def test_the_official_client_gets_images(server, renderer, monkeypatch):
    """Unmodified `fal-client`: progress, both formats, several images, data URIs."""
    for name in ("QUEUE_URL_FORMAT", "RUN_URL_FORMAT"):
        monkeypatch.setattr(fal_client.client, name, server.url + ("/run/" if name == "RUN_URL_FORMAT" else "/"))
    for name in ("REST_URL", "CDN_URL"):
        monkeypatch.setattr(fal_client.client, name, server.url)
    client, seen = fal_client.SyncClient(key="any"), []
    given = {**INPUTS, "prompt": PROMPT, "seed": 8}
    url = client.upload(packed(photograph()), "image/png")
    output = client.subscribe(
        APP, {**given, "image_url": url, "num_images": 2}, with_logs=True, on_queue_update=seen.append
    )
    assert "step" in seen[-1].logs[-1]["message"]
    assert {"inference", "denoising", "decoding"} <= set(output["timings"])
    assert seen[-1].metrics["inference_time"] == output["timings"]["inference"]
    with urllib.request.urlopen(output["images"][1]["url"]) as answer:
        assert np.array_equal(pixels(Shown(answer.read())), alone(renderer, seed=9))
    inline = client.run(APP, {**given, "sync_mode": True, "output_format": "jpeg"})["images"][0]["url"]
    kind, _, data = inline.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)
    client._client.close()


def test_a_sweep_runs_on_the_endpoint(server, renderer, tmp_path):
    """With `restyle run` each cell gets its own image, and the engine column names the model and its revision."""
    photograph().save(tmp_path / "cat.png")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f'image_url,prompt\ncat.png,"{PROMPT}"\n')
    config = tmp_path / "sweep.toml"
    config.write_text(
        f'[target]\nname = "{server.url}"\n[input]\nnum_inference_steps = 10\noutput_format = "png"\n'
        "[sweep]\nstrength = [0.5, 0.95]\nseed = [1, 2]\n"
    )
    ended = restyle("run", manifest, "-o", tmp_path / "run", "-c", config, "--quiet", "--max-in-flight", 4)
    assert ended.code == 0, ended.text
    table = pl.from_arrow(results(tmp_path / "run"))
    assert table["status"].to_list() == ["done"] * 4
    assert all(name.startswith("flux published@sha") for name in table["engine"])
    assert table["has_nsfw_concepts"].list.len().fill_null(0).to_list() == [0] * 4
    for row in table.iter_rows(named=True):
        data = (tmp_path / "run" / row["images"][0]["path"]).read_bytes()
        expected = alone(renderer, strength=row["strength"], seed=row["seed"])
        assert np.array_equal(pixels(Shown(data)), expected)


def test_a_killed_server_resumes_its_requests(models, renderer, tmp_path):
    """After a restart the same ids give the images of solo runs."""
    server = Server(tmp_path)
    server._command[-1:] = ["flux", "--model", str(models / "plain"), "--devices", "cpu"]

    async def use():
        await server.start()
        async with aiohttp.ClientSession(server.url) as session:
            request_id = await submit(session, PROMPT, **LONG, seed=4)
            waiting = await submit(session, PROMPT, **INPUTS, seed=5)
            await first_step(session, request_id)
        await server.end(signal.SIGKILL)
        await server.start()
        async with aiohttp.ClientSession(server.url) as session:
            for one, seed in ((request_id, 4), (waiting, 5)):
                status, _, body = await result(session, one)
                assert (status, body["seed"]) == (200, seed)
                steps = 50 if one == request_id else 10
                seen = await shown(session, body)
                assert np.array_equal(seen, alone(renderer, seed=seed, num_inference_steps=steps))
        await server.end(signal.SIGTERM)

    asyncio.run(use())
    assert server.process.returncode == 0


def test_a_safety_checker_blackens_flagged_images(models, checkers, tmp_path):
    """/health names its class and revision, results have one flag per image, and requests can disable it."""
    flags = ("--engine", "flux", "--model", models / "plain", "--devices", "cpu")
    with endpoint(tmp_path, *flags, "--safety-checker", checkers / "concepts", keyed=False) as server:

        async def ask(session):
            _, _, health = await call(session, "GET", "/health")
            assert health["safety_checked"]
            assert health["safety_checker"].startswith("StableDiffusionSafetyChecker: concepts@sha")
            _, _, checked = await result(session, await submit(session, **INPUTS, num_images=2))
            assert checked["has_nsfw_concepts"] == [True, True]
            assert not (await shown(session, checked)).any()
            _, _, unchecked = await result(session, await submit(session, **INPUTS, enable_safety_checker=False))
            assert unchecked["has_nsfw_concepts"] == []
            assert (await shown(session, unchecked)).any()

        asking(server, ask)
    assert "no safety checker" not in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "flux"], "--model"),
        (["--model", "somewhere"], "--engine flux"),
        (["--engine", "flux", "--model", "{models}/nothing"], "model folder not found"),
        (["--engine", "flux", "--model", "{models}"], "model_index.json is missing"),
        (["--engine", "flux", "--model", "{models}/plain", "--safety-checker", "{models}/plain/vae"], "is incomplete"),
        (["--engine", "flux", "--model", "{models}/plain", "--devices", "cpu", "--slots", "2"], "invalid --slots 2"),
        (["--engine", "flux", "--model", "{models}/plain", "--devices", "cuda:99"], "cuda:99 is unavailable"),
    ],
)
def test_an_invalid_start_ends_with_exit_code_2(models, tmp_path, flags, words):
    """There is one message without a traceback, and nothing is served."""
    given = [flag.format(models=models) for flag in flags]
    ended = restyle("serve", "--port", 0, "--data-dir", tmp_path / "data", *given)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err.splitlines()[-1]
    assert ended.err.splitlines()[-1].startswith("restyle: ")


def test_the_server_process_does_not_load_torch(server):
    """The memory maps of the worker contain libtorch; those of the server do not."""
    (worker,) = children(server.process.pid)

    def maps(pid):
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" in maps(worker)
    assert "libtorch" not in maps(server.process.pid)
    assert json.loads(urllib.request.urlopen(server.url + "/health").read())["running"] == 0
