"""The renderer's pixels equal those of plain diffusers, for every kind of source and independent of other requests."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from batch.server.engines.base import EngineCancelled, EngineFailure
from batch.server.engines.flux.tuning import accelerated
from tests.flux.rendering import by_diffusers, job, opened, packed, photograph, pixels, rendered

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the libraries must not fail these tests


@pytest.mark.parametrize("strength", [0.01, 0.5, 0.95, 1.0])
def test_an_image_equals_that_of_plain_diffusers(renderer, plain, strength):
    """The same weights and inputs give the same pixels, at low, medium and high strength."""
    result = rendered(renderer, job(strength=strength, num_inference_steps=20))
    expected = by_diffusers(plain, photograph(), strength=strength, num_inference_steps=20)
    assert expected.std() > 10, "flat images would be equal for any input"
    assert np.array_equal(pixels(result.images[0]), expected)


def test_the_defaults_are_those_of_the_endpoint(renderer, plain):
    """Strength 0.95, 40 steps, guidance 3.5; the defaults of diffusers differ."""
    given = job()
    bare = given.input.model_validate({"image_url": "x", "prompt": given.input.prompt, "seed": 5})
    steps = []
    result = renderer.render(
        type(given)("r", bare.model_copy(update={"output_format": "png"}), given.source),
        lambda *step: steps.append(step),
        lambda: False,
    )
    assert steps[-1] == (38, 38)
    expected = by_diffusers(plain, photograph(), strength=0.95, num_inference_steps=40, guidance_scale=3.5)
    assert np.array_equal(pixels(result.images[0]), expected)


def test_each_input_changes_the_image(renderer):
    """Otherwise the comparisons of this file could not fail."""
    base = pixels(rendered(renderer, job(strength=0.5)).images[0])
    others = [
        {"strength": 0.6},
        {"seed": 6},
        {"guidance_scale": 5.0},
        {"num_inference_steps": 12},
        {"prompt": "a city in oil"},
        {"source": packed(photograph().transpose(Image.Transpose.FLIP_LEFT_RIGHT))},
    ]
    for other in others:
        assert not np.array_equal(pixels(rendered(renderer, job(**{"strength": 0.5, **other})).images[0]), base), other


def _halved_alpha():
    """A half-transparent source, and the same composited over white."""
    base = np.asarray(photograph())
    source = Image.fromarray(np.dstack([base, np.full(base.shape[:2], 128, np.uint8)]), "RGBA")
    over = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    assert np.abs(np.asarray(over).astype(int) - (base * (128 / 255) + 255 * (127 / 255))).max() <= 1
    return packed(source), over


def _sixteen_bits():
    levels = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    grey = np.rint(levels / 257).astype(np.uint8)
    return packed(Image.fromarray(levels)), Image.fromarray(grey, "L").convert("RGB")


def _rotated():
    """A source stored sideways with an EXIF orientation, and the same upright."""
    upright = photograph(256, 320)
    exif = Image.Exif()
    exif[0x0112] = 6
    return packed(upright.transpose(Image.Transpose.ROTATE_90), exif=exif), upright


def _cmyk():
    source = photograph().convert("CMYK")
    return packed(source, "TIFF"), source.convert("RGB")


def _grey():
    source = photograph().convert("L")
    return packed(source), source.convert("RGB")


def _odd():
    source = photograph(333, 271)
    return packed(source), source.resize((336, 272), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _tiny():
    """A source that is too small for the model, and the same with a shorter side of 256."""
    source = photograph(40, 30)
    return packed(source), source.resize((336, 256), Image.Resampling.LANCZOS, reducing_gap=3.0)


@pytest.mark.parametrize("made", [_halved_alpha, _sixteen_bits, _rotated, _cmyk, _grey, _odd, _tiny])
def test_every_kind_of_source_is_converted_to_rgb(renderer, plain, made):
    """Alpha over white, 16 bits scaled, EXIF applied, sides rounded to multiples of 16; then as plain diffusers."""
    source, converted = made()
    result = rendered(renderer, job(source, strength=0.5))
    assert (result.images[0].width, result.images[0].height) == converted.size
    assert np.array_equal(pixels(result.images[0]), by_diffusers(plain, converted, strength=0.5))


def test_several_images_equal_the_single_images_of_their_seeds(renderer):
    """Image i of seed s equals the single image of seed s + i; the result's seed is s."""
    together = rendered(renderer, job(num_images=3, seed=2**63 - 2))
    assert together.seed == 2**63 - 2
    alone = [rendered(renderer, job(seed=seed)) for seed in (2**63 - 2, 2**63 - 1)]
    for image, one in zip(together.images, alone, strict=False):
        assert np.array_equal(pixels(image), pixels(one.images[0]))
    assert len({image.data for image in together.images}) == 3


def test_the_published_layout_gives_the_same_images(models, renderer):
    """It has FluxPipeline in the index, prefixed keys, other tokenizer files and shards."""
    published = opened(models / "published")
    assert np.array_equal(pixels(rendered(published, job()).images[0]), pixels(rendered(renderer, job()).images[0]))


def test_metadata_names_model_revision_and_seed(renderer):
    """JPEG and PNG files contain the model, its revision and the seed of the image."""
    for output_format, note in (("jpeg", "comment"), ("png", "Comment")):
        result = rendered(renderer, job(output_format=output_format, num_images=2))
        for number, loaded in enumerate(result.images):
            image = Image.open(io.BytesIO(loaded.data))
            assert (loaded.content_type, image.format) == (f"image/{output_format}", output_format.upper())
            text = image.info[note]
            text = text.decode() if isinstance(text, bytes) else text
            assert text == f"restyle flux: FLUX.1 [dev], tiny, revision 1, seed {5 + number}"


def test_timings_have_inference_and_its_parts(renderer):
    """The phases of the model add up to `inference`; reading and encoding are separate."""
    renderer.model()
    timings = rendered(renderer, job()).timings
    assert set(timings) == {"inference", "reading", "prompt", "denoising", "decoding", "checking", "encoding"}
    parts = sum(timings[name] for name in ("prompt", "denoising", "decoding", "checking"))
    assert timings["inference"] == pytest.approx(parts)
    assert all(seconds > 0 for seconds in timings.values())


def test_every_step_of_every_image_is_reported(renderer):
    """Steps are counted across images: ceil(10 x 0.5) for each of two images."""
    steps = []
    rendered(renderer, job(strength=0.5, num_images=2), on_step=lambda *step: steps.append(step))
    assert steps == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize("after", [0, 1, 7])
def test_cancellation_takes_effect_between_steps(renderer, after):
    """No further step is executed, and the next request is not affected."""
    before = rendered(renderer, job()).images[0].data
    steps = []
    with pytest.raises(EngineCancelled):
        rendered(renderer, job(), lambda *step: steps.append(step), lambda: len(steps) >= after)
    assert len(steps) == after
    assert rendered(renderer, job()).images[0].data == before


def test_acceleration_skips_blocks_and_none_is_exact(renderer, plain):
    """`high` executes fewer blocks than `regular`; both are reproducible, and a later `none` is exact."""
    transformer = renderer.model().pipeline.transformer
    runs = []
    handle = transformer.single_transformer_blocks[-1].norm.register_forward_hook(lambda *_: runs.append(1))
    counts, images = {}, {}
    try:
        for acceleration in ("none", "regular", "high", "none"):
            given = job(acceleration=acceleration, num_inference_steps=50, strength=1)
            for _ in range(2):
                runs.clear()
                image = rendered(renderer, given).images[0].data
                assert images.setdefault(acceleration, image) == image
                counts[acceleration] = len(runs)
    finally:
        handle.remove()
    assert counts["none"] == 50
    assert counts["high"] < counts["regular"] < 50, counts
    expected = by_diffusers(plain, photograph(), num_inference_steps=50, strength=1)
    assert np.array_equal(pixels(rendered(renderer, job(num_inference_steps=50, strength=1)).images[0]), expected)


def test_the_cache_is_removed_after_cancellation_and_errors(renderer):
    """Its hooks are removed however the request ends."""
    before = rendered(renderer, job()).images[0].data
    with pytest.raises(EngineCancelled):
        rendered(renderer, job(acceleration="high"), cancelled=lambda: True)
    with pytest.raises(KeyError), accelerated(renderer.model().pipeline.transformer, "regular"):
        raise KeyError
    assert not renderer.model().pipeline.transformer.is_cache_enabled
    assert rendered(renderer, job()).images[0].data == before


def test_a_source_that_is_not_an_image_is_a_client_error(renderer):
    """It raises image_load_error, and the renderer continues."""
    with pytest.raises(EngineFailure) as caught:
        rendered(renderer, job(b"not an image"))
    assert (caught.value.status, caught.value.type) == (422, "image_load_error")
    with pytest.raises(EngineFailure):
        rendered(renderer, job(b""))
    assert rendered(renderer, job()).images


@pytest.mark.parametrize("prompt", ["", "a cat " * 600, "猫 \U0001f408", "<|endoftext|>"])
def test_any_prompt_is_accepted(renderer, plain, prompt):
    """Cases: empty, too long, non-ASCII, and the name of a special token."""
    result = rendered(renderer, job(prompt=prompt))
    assert np.array_equal(pixels(result.images[0]), by_diffusers(plain, photograph(), prompt=prompt))
    assert result.prompt == prompt


# --- the safety checker ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "kind"), [("classifier", "ViTForImageClassification"), ("concepts", "StableDiffusionSafetyChecker")]
)
def test_flagged_images_are_black(models, checkers, folder, kind):
    """There is one flag per image, and the metadata of the file says that it was blackened."""
    renderer = opened(models / "plain", checkers / folder, kind)
    result = rendered(renderer, job(num_images=2))
    assert result.has_nsfw_concepts == (True, True)
    for image in result.images:
        assert not pixels(image).any()
        assert (image.width, image.height) == (256, 256)
        assert Image.open(io.BytesIO(image.data)).info["Comment"].endswith("; blackened by the safety checker")


def test_a_request_can_disable_the_checker(models, checkers, renderer):
    """With `enable_safety_checker: false` the image is returned without flags."""
    checked = opened(models / "plain", checkers / "classifier", "ViTForImageClassification")
    result = rendered(checked, job(enable_safety_checker=False))
    assert result.has_nsfw_concepts == ()
    assert result.images[0].data == rendered(renderer, job()).images[0].data


def test_an_image_that_passes_is_unchanged(models, checkers, renderer):
    """It has the same bytes as without a checker, and the flag False."""
    checked = opened(models / "plain", checkers / "content", "ViTForImageClassification")
    result = rendered(checked, job())
    assert result.has_nsfw_concepts == (False,)
    assert result.images[0].data == rendered(renderer, job()).images[0].data


def test_without_a_checker_there_are_no_flags(renderer):
    """A check that did not run must not report False."""
    assert rendered(renderer, job()).has_nsfw_concepts == ()
