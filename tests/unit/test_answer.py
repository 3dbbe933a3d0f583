"""A paid answer is read field by field: an odd field affects only itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.fal.answer import fields_of, has_images, images_of, inference_of, says_no_images

IMAGE = {"url": "https://files.example/a.jpg", "width": 64, "height": 48, "content_type": "image/jpeg"}
OK = {"images": [IMAGE], "seed": 7, "has_nsfw_concepts": [False], "timings": {"inference": 0.5}, "prompt": "x"}


def without(name):
    return {key: value for key, value in OK.items() if key != name}


def test_a_whole_answer_has_no_notes():
    fields = fields_of(OK, 7)
    assert fields == (7, [False], 0.5, None, ())
    assert [image.url for image in images_of(OK)] == [IMAGE["url"]]


@pytest.mark.parametrize("seed", [None, "7", 7.0, True, -1, 2**63, 2**200, [], {}, math.nan])
def test_a_seed_that_is_not_one_is_the_one_that_was_asked_for(seed):
    fields = fields_of(OK | {"seed": seed}, 7)
    assert fields.seed is None
    assert "seed" in fields.notes[0]
    assert fields[1:4] == ([False], 0.5, None)


@pytest.mark.parametrize("name", ["seed", "has_nsfw_concepts", "timings"])
def test_an_absent_field_is_null_with_a_note(name):
    fields = fields_of(without(name), 7)
    assert len(fields.notes) == 1
    assert fields.notes[0].startswith(f"{name}: missing")
    assert has_images(without(name))


def test_another_seed_than_the_one_that_was_asked_for_is_kept_and_noted():
    fields = fields_of(OK, 8)
    assert fields.seed == 7
    assert fields.notes == ("seed: the service reports 7, 8 was asked for",)


@pytest.mark.parametrize("flags", [None, False, "no", {}, [None], ["x"]])
def test_flags_that_are_not_readable_are_null(flags):
    fields = fields_of(OK | {"has_nsfw_concepts": flags}, 7)
    assert fields.flags is None
    assert fields.notes


def test_flags_keep_what_can_be_read():
    fields = fields_of(OK | {"images": [IMAGE] * 3, "has_nsfw_concepts": [True, None, 1]}, 7)
    assert fields.flags == [True, None, None]
    assert len(fields.notes) == 2


def test_no_flags_are_no_oddity():
    assert fields_of(OK | {"has_nsfw_concepts": []}, 7).notes == ()


def test_timings_keep_what_is_a_number():
    odd = {"inference": 1, "safety": 0.25, "nested": {"a": 1}, "text": "1", "nan": math.nan, "less": -1.0, "yes": True}
    fields = fields_of(OK | {"timings": odd}, 7)
    assert (fields.inference, fields.timings) == (1.0, [("safety", 0.25)])
    assert len(fields.notes) == 5


@pytest.mark.parametrize("timings", [None, [], "0.5", 3])
def test_timings_of_another_type_are_null(timings):
    fields = fields_of(OK | {"timings": timings}, 7)
    assert (fields.inference, fields.timings) == (None, None)
    assert inference_of(OK | {"timings": timings}) is None


@pytest.mark.parametrize("images", [None, {}, "x", 3, [None], [{}], [{"url": None}], [{"url": " "}], [[]], ["x"]])
def test_an_answer_without_a_usable_image_is_not_usable(images):
    assert not has_images(OK | {"images": images})
    assert not says_no_images(OK | {"images": images})


def test_an_empty_list_says_that_there_are_no_images():
    assert says_no_images(OK | {"images": []})
    assert not has_images(OK | {"images": []})


def test_images_keep_what_can_be_read():
    odd = OK | {
        "images": [None, "https://files.example/b.png", IMAGE | {"width": "64", "height": 48.0, "file_name": 3}]
    }
    images = images_of(odd)
    assert [(image.url[-5:], image.width, image.height, image.file_name) for image in images] == [
        ("b.png", None, None, None),
        ("a.jpg", None, 48, None),
    ]
    assert len(fields_of(odd, 7).notes) == 4  # two for the image, one for the null, one for the number of flags


def test_the_same_url_twice_is_two_images():
    assert len(images_of(OK | {"images": [IMAGE, IMAGE]})) == 2


def test_more_images_than_can_be_asked_for_are_bounded():
    odd = OK | {"images": [IMAGE] * 1000}
    assert len(images_of(odd)) == 16
    assert any("1000" in note for note in fields_of(odd, 7).notes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["images", "seed", "has_nsfw_concepts", "timings", "prompt", "image"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_no_answer_breaks_the_reading(output):
    fields = fields_of(output, 7)
    assert fields.seed is None or 0 <= fields.seed < 2**63
    assert all(isinstance(image.url, str) for image in images_of(output))
    assert len(fields.notes) <= 17
