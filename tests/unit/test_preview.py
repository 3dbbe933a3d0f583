"""Style selection, filters, grading and reproducibility of the preview."""

import hashlib

import cv2
import numpy as np
import pytest

from batch.server.engines.preview.grade import Tint, graded, tint_of
from batch.server.engines.preview.renderer import STYLES, open_renderer, restyled
from batch.server.engines.preview.texture import clouds, generator, grain
from batch.server.engines.preview.wording import Scene, Style, scene_of, style_of


@pytest.fixture(scope="module")
def image():
    """A colourful BGR scene with shapes, 160x224."""
    y, x = np.mgrid[0:160, 0:224].astype(np.float32)
    scene = np.stack([x, 255 - y, (x + y) / 2], -1)
    scene[(x - 120) ** 2 + (y - 80) ** 2 < 50**2] = (40, 60, 220)
    scene[100:140, 20:90] = (200, 220, 230)
    return scene.clip(0, 255).astype(np.uint8)


def distance(one, other):
    return float(np.abs(one.astype(np.float32) - other).mean())


PROMPTS = {
    Style.PIXEL: "a castle, 16-bit pixel art",
    Style.MOSAIC: "a stained glass window",
    Style.BLUEPRINT: "BLUEPRINT of a ship",
    Style.PENCIL: "a pencil drawing",
    Style.POPART: "in the manner of Warhol",
    Style.CARTOON: "anime girl",
    Style.WATERCOLOR: "a watercolour painting",
    Style.NEON: "cyberpunk alley",
    Style.VINTAGE: "old photo of a harbour",
    Style.OIL: "thick oil painting",
    Style.PAINTERLY: "a turtle",
}


@pytest.mark.parametrize("style", Style)
def test_style_is_chosen_by_words_in_the_prompt(style):
    """The words of each style select it, in upper and lower case."""
    assert style_of(PROMPTS[style]) is style


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [("a street by night", Scene.NIGHT), ("deep snow", Scene.WINTER), ("a wizard", Scene.MAGIC), ("a chair", None)],
)
def test_scene_is_chosen_by_words_in_the_prompt(prompt, scene):
    """A scene word selects its scene; without one there is no scene."""
    assert scene_of(prompt) is scene


@pytest.mark.parametrize("prompt", ["a boiling pot", "drinking tea", "a nice price", "ascetic monk"])
def test_words_inside_other_words_choose_nothing(prompt):
    """`oil` in boiling, `ink` in drinking and `ice` in nice do not match."""
    assert (style_of(prompt), scene_of(prompt)) == (Style.PAINTERLY, None)


@pytest.mark.parametrize("style", Style)
def test_each_style_repeats_itself_and_varies_with_the_seed(style, image):
    """The same seed and input give the same pixels, another seed gives others, and neither equals the source."""
    prompt = PROMPTS[style]
    first = restyled(image, prompt, 7, 0.95, 3.5)
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert np.array_equal(first, restyled(image, prompt, 7, 0.95, 3.5))
    assert not np.array_equal(first, restyled(image, prompt, 8, 0.95, 3.5))
    assert distance(first, image) > 3


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("shape", [(16, 16), (256, 48), (33, 1000)])
def test_each_style_takes_any_shape_and_flat_images(style, shape):
    """Tiny, narrow and featureless images keep their size."""
    flat = np.full((*shape, 3), 128, np.uint8)
    assert restyled(flat, PROMPTS[style], 0, 1.0, 20.0).shape == flat.shape


SHIFTS = (0, 16, 32, 48)
"""Offsets of arrays from a multiple of 64 bytes: malloc may return any multiple of 16."""


@pytest.fixture
def as_in_a_worker():
    """Configure OpenCV as `open_renderer` does, and restore it afterwards."""
    before = cv2.getNumThreads(), cv2.ocl.useOpenCL(), cv2.ipp.useIPP()
    open_renderer()
    yield
    for restore, value in zip((cv2.setNumThreads, cv2.ocl.setUseOpenCL, cv2.ipp.setUseIPP), before, strict=True):
        restore(value)


def realigned(values, shift):
    """Return a copy that starts `shift` bytes after a multiple of 64."""
    buffer = np.empty(values.nbytes + 128, np.uint8)
    begin = -buffer.ctypes.data % 64 + shift
    copy = buffer[begin : begin + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("style", Style)
def test_the_same_numbers_come_out_wherever_the_arrays_lie(style, image, as_in_a_worker, monkeypatch):
    """Every call of OpenCV, not only the final image, returns the same bits for arrays at any address."""
    calls = ("GaussianBlur", "LUT", "Sobel", "bilateralFilter", "blur", "copyMakeBorder", "cvtColor", "divide")
    calls += ("distanceTransformWithLabels", "filter2D", "kmeans", "magnitude", "morphologyEx", "remap", "resize")
    originals = {name: getattr(cv2, name) for name in calls}
    given = np.tile(image, (2, 2, 1))
    trails = []
    for shift in SHIFTS:
        trail: list[bytes] = []

        def put(values, shift=shift):
            return realigned(values, shift) if isinstance(values, np.ndarray) and values.ndim > 1 else values

        for name, original in originals.items():

            def moved(*arguments, original=original, trail=trail, put=put, **options):
                made = original(*map(put, arguments), **{key: put(value) for key, value in options.items()})
                found = made if isinstance(made, tuple) else (made,)
                trail.extend(one.tobytes() for one in found if isinstance(one, np.ndarray))
                return tuple(map(put, made)) if isinstance(made, tuple) else put(made)

            monkeypatch.setattr(cv2, name, moved)
        trail.append(restyled(given, PROMPTS[style], 7, 0.95, 3.5).tobytes())
        trails.append([hashlib.sha256(one).digest() for one in trail])
    assert len(trails[0]) > 5
    assert all(trail == trails[0] for trail in trails)


def test_every_style_has_a_filter():
    """The table of filters and the enumeration contain the same styles."""
    assert set(STYLES) == set(Style)


@pytest.mark.parametrize("style", Style)
def test_strength_increases_the_distance_from_the_source(style, image):
    """A small strength stays close to the source; more strength gives more change."""
    away = [distance(restyled(image, PROMPTS[style], 3, s, 3.5), image) for s in (0.01, 0.3, 0.6, 0.95)]
    assert away[0] < 2
    assert away == sorted(away)


def test_guidance_has_a_mild_effect(image):
    """Guidance changes the pixels, but less than the style does."""
    low, high = (restyled(image, "oil painting at night", 3, 0.95, g) for g in (1.0, 20.0))
    assert 0.5 < distance(low, high) < distance(low, image)


def test_any_change_of_the_prompt_changes_the_image(image):
    """Two prompts with the same style and scene give different images."""
    one, other = (restyled(image, f"an oil painting of a {what}", 3, 0.95, 3.5) for what in ("cat", "dog"))
    assert distance(one, other) > 0.5


def test_night_is_darker_and_winter_is_paler(image):
    """The grading matches the name of the scene."""
    day = graded(image, None, Tint(0, 0), 1.0)
    assert graded(image, Scene.NIGHT, Tint(0, 0), 1.0).mean() < day.mean() - 20
    spread = np.ptp(graded(image, Scene.WINTER, Tint(0, 0), 1.0).astype(int), axis=-1).mean()
    assert spread < 0.75 * np.ptp(day.astype(int), axis=-1).mean()


def test_grading_with_amount_0_keeps_the_image(image):
    """The result equals the input up to rounding."""
    assert distance(graded(image, Scene.FIRE, Tint(9, 9), 0.0), image) < 1.5


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63 + 3])
def test_random_fields_are_bounded_and_depend_on_seed_and_prompt(seed):
    """Any integer is a valid seed; noise stays approximately within -1 and 1."""
    rng = generator(seed, "p")
    assert np.abs(clouds(rng, 40, 60, 5, 3)).max() < 1.6
    assert np.abs(grain(rng, 40, 60, 1.5)).max() <= 1
    assert generator(seed, "p").random() == generator(seed, "p").random()
    assert generator(seed, "p").random() != generator(seed, "q").random()
    assert tint_of("p", generator(1, "p")) != tint_of("p", generator(2, "p"))
