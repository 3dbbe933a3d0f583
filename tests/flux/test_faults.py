"""Worker failures: the error that the client gets, and the recovery of the server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal

import numpy as np
import pytest

from batch.errors import InputError
from batch.server.engines.flux.engine import FluxEngine, open_engine
from batch.server.engines.flux.folder import check_model
from batch.server.engines.flux.options import FluxOptions
from tests.edges.serving import call, completed, read, serving, submit
from tests.flux.doubles import FAULTY, MARKER
from tests.flux.rendering import job, packed, photograph, pixels, rendered

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(400),  # each worker imports torch and diffusers, which takes ten seconds on a free core
]
SOURCE = "data:image/png;base64," + base64.b64encode(packed(photograph())).decode()
GIVEN = {"num_inference_steps": 10, "output_format": "png", "seed": 5}


async def ask(session, prompt):
    """Run a request and return the result's status, headers and body, and the log lines of the request."""
    request_id = await submit(session, prompt, **GIVEN, image_url=SOURCE)
    logs = (await completed(session, request_id))["logs"]
    return *await call(session, "GET", read(request_id)), [line["message"] for line in logs]


async def rendered_image(session, body):
    path = body["images"][0]["url"]
    async with session.get(path) as answer:
        return await answer.read()


def failure(body):
    (detail,) = body["detail"]
    assert detail["loc"] == ["body"]
    assert "\n" not in detail["msg"]
    return detail["type"], detail["msg"]


@pytest.fixture
def engine(models, tmp_path, monkeypatch):
    """One worker on a copy of the model, which fails on request of the prompt."""
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    folder = shutil.copytree(models / "plain", tmp_path / "model")
    return FluxEngine(FluxOptions(str(folder), ("cpu",)), check_model(folder), None, FAULTY)


class _Shown:
    """Image bytes in the form that `pixels` accepts."""

    def __init__(self, data):
        self.data = data


def test_worker_failures_are_reported_and_survived(engine, renderer, tmp_path):
    """Each kind of failure has its result.

    Out of memory: retryable, same process. A bug: not retryable, same process. A lost device: another process completes
    the request. A model folder that is missing when a worker is replaced: retryable, and requests succeed again when
    it is back.
    """
    folder = tmp_path / "model"

    async def use():
        async with serving(tmp_path / "data", engine) as session:
            (first,) = engine.pids()
            status, headers, body, _ = await ask(session, "run out of memory")
            assert (status, headers["x-fal-needs-retry"]) == (500, "true")
            kind, message = failure(body)
            assert kind == "internal_server_error"
            assert message.startswith("cpu ran out of memory")
            assert "(OutOfMemoryError: CUDA out of memory. Tried" in message
            status, headers, body, _ = await ask(session, "bug")
            assert (status, headers["x-fal-needs-retry"]) == (500, "false")
            assert "(ZeroDivisionError: a bug)" in failure(body)[1]
            assert engine.pids() == [first], "the process must survive both errors"

            status, headers, body, logs = await ask(session, "lose the device once")
            assert status == 200
            assert any("exited with status 70" in line for line in logs)
            assert engine.pids() != [first]
            expected = rendered(renderer, job(prompt="lose the device once")).images[0]
            assert np.array_equal(pixels(_Shown(await rendered_image(session, body))), pixels(expected))

            # The model folder is missing while a worker is replaced.
            folder.rename(tmp_path / "elsewhere")
            os.kill(engine.pids()[0], signal.SIGKILL)
            status, headers, body, _ = await ask(session, "a cat")
            assert (status, headers["x-fal-needs-retry"]) == (500, "true")
            kind, message = failure(body)
            assert kind == "internal_server_error"
            assert message.startswith(f"cannot load {folder} on cpu")
            (tmp_path / "elsewhere").rename(folder)
            assert (await ask(session, "a cat"))[0] == 200
            assert (await call(session, "GET", "/health"))[2]["running"] == 0

    asyncio.run(use())


def test_a_model_that_cannot_be_loaded_stops_the_start(models, tmp_path):
    """The shapes of the weights contradict the config, which the check of the headers does not detect."""
    folder = shutil.copytree(models / "plain", tmp_path / "model")
    config = folder / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "joint_attention_dim": 48}))

    async def start():
        engine = open_engine(FluxOptions(str(folder), ("cpu",)))
        try:
            with pytest.raises(InputError) as caught:
                await engine.start()
        finally:
            await engine.aclose()
        return str(caught.value)

    message = asyncio.run(start())
    assert message.startswith(f"cannot load {folder} on cpu")
    assert "\n" not in message
