"""The preview renderer, from source bytes to encoded images, in this process."""

import io

import numpy as np
import pytest
from PIL import Image

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import EngineCancelled, EngineFailure, EngineJob
from batch.server.engines.preview.renderer import NOTE, PreviewRenderer


@pytest.fixture(scope="module")
def source():
    """A PNG of 300x280 px."""
    y, x = np.mgrid[0:280, 0:300]
    buffer = io.BytesIO()
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def job(source, **inputs):
    asked = {"image_url": "http://example.test/a.png", "prompt": "a watercolor", "seed": 5, **inputs}
    return EngineJob("r1", ImageToImageInput(**asked), source)


def render(job, steps=None, cancelled=lambda: False):
    return PreviewRenderer().render(job, lambda done, total: (steps or []).append((done, total)), cancelled)


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
def test_image_has_the_requested_format_and_says_that_no_model_ran(source, output_format):
    """Format, type and size are correct, and the file's metadata says that it is a preview."""
    (loaded,) = render(job(source, output_format=output_format)).images
    image = Image.open(io.BytesIO(loaded.data))
    image.load()
    assert loaded.content_type == f"image/{output_format}"
    assert (image.format, image.size) == (output_format.upper(), (loaded.width, loaded.height))
    assert image.size == (304, 288)
    note = image.info["comment"].decode() if output_format == "jpeg" else image.text["Comment"]
    assert note.startswith(NOTE)
    assert "seed 5" in note


def test_same_job_gives_the_same_bytes_and_another_seed_gives_others(source):
    """The bytes depend only on input and seed."""
    first = render(job(source)).images[0].data
    assert first == render(job(source)).images[0].data
    assert first != render(job(source, seed=6)).images[0].data


def test_several_images_are_single_images_of_following_seeds(source):
    """num_images n gives the n single images of seed + i."""
    result = render(job(source, num_images=3))
    alone = [render(job(source, seed=5 + i)).images[0].data for i in range(3)]
    assert [image.data for image in result.images] == alone
    assert result.seed == 5


def test_has_nsfw_concepts_is_empty_without_a_checker(source):
    """The list is empty whether or not the request enables the safety checker."""
    for wanted in (True, False):
        assert render(job(source, enable_safety_checker=wanted)).has_nsfw_concepts == ()


def test_timings_and_prompt_are_reported(source):
    """Inference is in seconds; the prompt is returned unchanged."""
    result = render(job(source))
    assert 0 < result.timings["inference"] < 60
    assert result.prompt == "a watercolor"


def test_steps_are_counted_to_the_end(source):
    """One step for reading, two per image."""
    steps = [(0, 0)]
    render(job(source, num_images=2), steps)
    assert steps[1:] == [(i, 5) for i in range(1, 6)]


def test_cancelled_job_stops_after_its_current_step(source):
    """cancelled() is called after each step."""
    steps = [(0, 0)]
    with pytest.raises(EngineCancelled):
        render(job(source, num_images=4), steps, lambda: len(steps) > 2)
    assert steps[-1] == (2, 9)


@pytest.mark.parametrize("data", [None, b"", b"<html>"])
def test_source_that_is_not_an_image_is_a_model_error(data):
    """It raises fal's image_load_error for image_url, with status 422."""
    with pytest.raises(EngineFailure) as caught:
        render(job(data))
    assert (caught.value.status, caught.value.type) == (422, "image_load_error")
    assert caught.value.loc == ("body", "image_url")


def test_largest_seed_works_with_several_images(source):
    """Seed + i may exceed 2^63."""
    result = render(job(source, seed=2**63 - 1, num_images=2))
    assert len({image.data for image in result.images}) == 2


def test_job_without_a_seed_is_rejected():
    """The endpoint draws missing seeds; an engine never does."""
    with pytest.raises(ValueError, match="no seed"):
        EngineJob("r1", ImageToImageInput(image_url="x", prompt="p"))
