"""The echo engine: cheap, distinct cards per job, an exact service time, metadata that says no model ran."""

import io
import itertools
import subprocess
import sys
import time

import anyio
import pytest
import trio
from PIL import Image
from trio.testing import MockClock

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines import ENGINES, engine_of
from batch.server.engines.base import EngineCancelled, EngineJob
from batch.server.engines.echo import NOTE, EchoEngine, draw_card


def asked(**inputs):
    return ImageToImageInput(**{"image_url": "http://source.test/x", "prompt": "a turtle", "seed": 1, **inputs})


def generate(engine, job, cancelled=lambda: False):
    """Run one job and return its result, steps and virtual seconds."""
    steps = []

    async def main():
        await engine.start()
        began = trio.current_time()
        result = await engine.generate(job, lambda *step: steps.append(step), cancelled)
        await engine.aclose()
        return result, steps, trio.current_time() - began

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
def test_card_has_the_requested_format(output_format):
    """The card decodes, its size and type are correct, and its metadata says that no model ran."""
    card = draw_card(asked(output_format=output_format), 1)
    image = Image.open(io.BytesIO(card.data))
    image.load()
    assert (image.format, image.size) == (output_format.upper(), (card.width, card.height))
    assert card.content_type == f"image/{output_format}"
    note = image.info["comment"].decode() if output_format == "jpeg" else image.text["Comment"]
    assert note.startswith(NOTE)


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 1}, {"seed": 2}),
        ({"prompt": "a cat"}, {"prompt": "a dog"}),
        ({"prompt": "x" * 500 + "a"}, {"prompt": "x" * 500 + "b"}),
        ({"prompt": "猫"}, {"prompt": "犬"}),
        ({"strength": 0.5}, {"strength": 0.6}),
        ({"num_inference_steps": 20}, {"num_inference_steps": 30}),
        ({"guidance_scale": 2.0}, {"guidance_scale": 3.0}),
    ],
)
def test_different_jobs_get_different_bytes(output_format, one, other):
    """Two jobs never share a card, even if the difference does not fit on it."""
    first, second = (asked(output_format=output_format, **inputs) for inputs in (one, other))
    assert draw_card(first, first.seed).data != draw_card(second, second.seed).data
    assert draw_card(first, first.seed).data == draw_card(first, first.seed).data


@pytest.mark.parametrize(("one", "other"), [({"seed": 1}, {"seed": 2}), ({"prompt": "a cat"}, {"prompt": "a dog"})])
def test_seed_and_prompt_can_be_seen(one, other):
    """Seed and prompt are drawn on the card, not only written to its metadata."""
    pixels = []
    for inputs in (one, other):
        card = asked(output_format="png", **inputs)
        pixels.append(Image.open(io.BytesIO(draw_card(card, card.seed).data)).tobytes())
    assert pixels[0] != pixels[1]


@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "w" * 10_000, "\ud800", "emoji 🐢"])
def test_any_prompt_can_be_drawn(prompt):
    """Empty, long, non-Latin and invalid text all produce a card."""
    assert draw_card(asked().model_copy(update={"prompt": prompt}), 1).data


def test_card_does_not_depend_on_the_source_url():
    """Each server assigns its own URL to an upload; the card stays the same."""
    assert draw_card(asked(image_url="http://a.test/1"), 1) == draw_card(asked(image_url="http://b.test/2"), 1)


def test_answer_comes_after_the_service_time():
    """A job takes exactly service_time."""
    _, steps, took = generate(EchoEngine(service_time=6.5), EngineJob("r", asked()))
    assert took == pytest.approx(6.5)
    assert steps == [(1, 1)]


def test_several_cards_are_those_of_following_seeds():
    """Card i uses seed + i; the first equals the card of num_images 1."""
    result, _, _ = generate(EchoEngine(), EngineJob("r", asked(num_images=3)))
    assert [card.data for card in result.images] == [draw_card(asked(), 1 + i).data for i in range(3)]
    assert result.has_nsfw_concepts == ()
    assert result.seed == 1
    assert "inference" in result.timings


def test_cancelled_job_ends_early():
    """Cancellation takes effect while the job waits, not at its end."""
    checks = itertools.count()
    with pytest.raises(EngineCancelled):
        generate(EchoEngine(service_time=3600.0), EngineJob("r", asked()), lambda: next(checks) == 5)
    assert next(checks) == 6


def test_jobs_wait_concurrently():
    """A hundred jobs of one second take one second together."""

    async def main():
        engine = EchoEngine(1.0, slots=100)
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                job = EngineJob(str(number), asked(seed=number))
                tasks.start_soon(engine.generate, job, lambda *_: None, lambda: False)
        return trio.current_time()

    clock = MockClock(autojump_threshold=0)
    began = clock.current_time()
    assert trio.run(main, clock=clock) - began == pytest.approx(1.0)


def test_card_takes_under_a_millisecond():
    """One core draws more than a thousand cards per second."""
    inputs = asked()
    began = time.process_time()
    for seed in range(300):
        draw_card(inputs, seed)
    assert (time.process_time() - began) / 300 < 0.001


def test_engines_are_created_by_name():
    """Each known name creates that engine; the error for another name lists the known ones."""
    for name in ENGINES:
        assert engine_of(name).info().name == name
        assert engine_of(name, slots=3).info().slots == 3
        assert engine_of(name).info().safety_checker is None
    assert engine_of("echo").info().fetches_source is False
    assert engine_of("echo").info().slots == 32
    assert engine_of("preview").info().fetches_source is True
    with pytest.raises(ValueError, match="unknown engine 'flux': use preview, echo"):
        engine_of("flux")


def test_the_server_process_does_not_import_opencv():
    """Echo does not need OpenCV, and preview needs it only in its workers."""
    code = (
        "import sys; from batch.server.engines import engine_of; engine_of('echo'); engine_of('preview');"
        "sys.exit('cv2' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
