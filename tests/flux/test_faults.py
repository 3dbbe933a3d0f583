"""What goes wrong in a worker: who learns of it, in which words, and that the server stays up."""

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
    pytest.mark.timeout(400),  # each worker imports torch and its friends: ten seconds of a free core
]
SOURCE = "data:image/png;base64," + base64.b64encode(packed(photograph())).decode()
GIVEN = {"num_inference_steps": 10, "output_format": "png", "seed": 5}


async def ask(session, prompt):
    """The result's status, headers and body, and the log lines of the request."""
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
    """One worker on a copy of the model, which fails as its prompts say."""
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    folder = shutil.copytree(models / "plain", tmp_path / "model")
    return FluxEngine(FluxOptions(str(folder), ("cpu",)), check_model(folder), None, FAULTY)


class _Shown:
    """An image's bytes, as `pixels` takes them."""

    def __init__(self, data):
        self.data = data


def test_faults_of_a_worker_are_told_and_survived(engine, renderer, tmp_path):
    """Memory: retryable, same process. A defect: not retryable, same process. A lost device: done by another process.

    A model that is gone when a worker is replaced: retryable, and when it is back requests are done again.
    """
    folder = tmp_path / "model"

    async def use():
        async with serving(tmp_path / "data", engine) as session:
            (first,) = engine.pids()
            status, headers, body, _ = await ask(session, "run out of memory")
            assert (status, headers["x-fal-needs-retry"]) == (500, "true")
            kind, said = failure(body)
            assert kind == "internal_server_error"
            assert "cpu ran out of memory in a request (OutOfMemoryError: CUDA out of memory. Tried" in said
            status, headers, body, _ = await ask(session, "stumble")
            assert (status, headers["x-fal-needs-retry"]) == (500, "false")
            assert failure(body)[1] == "the model failed in a request (ZeroDivisionError: a defect)"
            assert engine.pids() == [first], "neither costs the loaded model"

            status, headers, body, logs = await ask(session, "lose the device once")
            assert status == 200
            assert any("left with exit status 70" in line for line in logs)
            assert engine.pids() != [first]
            expected = rendered(renderer, job(prompt="lose the device once")).images[0]
            assert np.array_equal(pixels(_Shown(await rendered_image(session, body))), pixels(expected))

            # Then the model is gone just when a worker has to be replaced.
            folder.rename(tmp_path / "elsewhere")
            os.kill(engine.pids()[0], signal.SIGKILL)
            status, headers, body, _ = await ask(session, "a cat")
            assert (status, headers["x-fal-needs-retry"]) == (500, "true")
            kind, said = failure(body)
            assert kind == "internal_server_error"
            assert said.startswith(f"{folder} cannot be loaded on cpu")
            (tmp_path / "elsewhere").rename(folder)
            assert (await ask(session, "a cat"))[0] == 200
            assert (await call(session, "GET", "/health"))[2]["running"] == 0

    asyncio.run(use())


def test_a_start_that_cannot_work_is_one_sentence(models, tmp_path):
    """Weights of other shapes than their config says, which no look at headers finds."""
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

    said = asyncio.run(start())
    assert said.startswith(f"{folder} cannot be loaded on cpu")
    assert "\n" not in said
