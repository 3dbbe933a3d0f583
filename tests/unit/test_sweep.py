"""Cells of a sweep: stable order and ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.errors import ConfigError
from batch.manifest.sweep import BASE, cells

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
AXES = st.fixed_dictionaries(
    {},
    optional={
        "strength": st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
        "guidance_scale": st.lists(st.floats(1, 20), min_size=1, max_size=4),
        "seed": st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
        "prompt": st.lists(TEXTS, min_size=1, max_size=4),
        "output_format": st.lists(st.sampled_from(["png", "jpeg"]), min_size=1, max_size=2),
    },
)


def test_without_axes_there_is_one_cell_without_values() -> None:
    """Each row is then one job."""
    assert [(cell.id, cell.values) for cell in cells({})] == [(BASE, {})]


def test_axes_are_crossed_in_their_order_and_the_last_varies_fastest() -> None:
    """The order is that of nested loops, the first axis outermost."""
    crossed = [cell.values for cell in cells({"strength": [0.5, 1.0], "seed": [1, 2]})]
    assert crossed == [
        {"strength": 0.5, "seed": 1},
        {"strength": 0.5, "seed": 2},
        {"strength": 1.0, "seed": 1},
        {"strength": 1.0, "seed": 2},
    ]


def test_an_id_names_axes_by_the_alphabet_with_values_in_the_endpoints_types() -> None:
    """A guidance of `3` becomes 3.0; axes are sorted by name."""
    (cell,) = cells({"strength": ["0.75"], "guidance_scale": [3], "enable_safety_checker": [False]})
    assert cell.id == "enable_safety_checker=false,guidance_scale=3.0,strength=0.75"
    assert cell.values == {"strength": 0.75, "guidance_scale": 3.0, "enable_safety_checker": False}


def test_values_that_mean_the_same_are_one_cell() -> None:
    """Equal values of an axis are not paid for twice."""
    assert [cell.values["strength"] for cell in cells({"strength": [0.75, "0.75", 0.750, 1, 1.0]})] == [0.75, 1.0]


def test_long_text_is_a_readable_prefix_and_a_hash() -> None:
    """Ids are short, contain no commas, and differ even if only the ends of prompts differ."""
    start = "as a watercolor, wet on wet, with a great deal of "
    first, second, plain = cells({"prompt": [start + "blue", start + "red", "ink"]})
    assert first.id.startswith("prompt=as-a-watercolor-wet-on-w~")
    assert first.id != second.id
    assert "," not in first.id
    assert len(first.id) < 50
    assert plain.id == "prompt=ink"


@given(AXES, st.randoms(use_true_random=False))
def test_an_id_does_not_change_when_axes_grow_or_change_places(axes, random) -> None:
    """Adding values or reordering axes and values keeps every id and its values."""
    before = {cell.id: cell.values for cell in cells(axes)}
    more = {"strength": 0.31, "guidance_scale": 7.7, "seed": 99, "prompt": "new, here", "output_format": "png"}
    grown = {name: [*values, more[name]] for name, values in axes.items()}
    shuffled = list(grown.items())
    random.shuffle(shuffled)
    for _, values in shuffled:
        random.shuffle(values)
    after = {cell.id: cell.values for cell in cells(dict(shuffled))}
    assert before.items() <= after.items()


@given(AXES)
def test_cells_with_one_id_have_the_same_values(axes) -> None:
    """No two points share an id."""
    crossed = cells(axes)
    assert len({cell.id for cell in crossed}) == len(crossed)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"strength": [0.5, 1.5]}, ["sweep.strength", "1.5", "0.01 to 1"]),
        ({"num_inference_steps": [9]}, ["sweep.num_inference_steps", "'9'", "10 to 50"]),
        ({"seed": [2**63]}, ["sweep.seed", str(2**63)]),
        ({"output_format": ["gif"]}, ["sweep.output_format", "gif", "jpeg, png"]),
        ({"prompt": ["\ud800"]}, ["sweep.prompt"]),
        ({"strength": []}, ["sweep.strength", "at least one"]),
        ({"prompt": "ink"}, ["sweep.prompt", "list"]),
        ({"image_url": ["https://a/b"]}, ["sweep.image_url", "strength"]),
        ({"sync_mode": [True]}, ["sweep.sync_mode"]),
        ({"steps": [20]}, ["sweep.steps", "num_inference_steps"]),
    ],
)
def test_an_axis_that_cannot_work_is_named_with_its_value(axes, words) -> None:
    """A sweep is validated before anything is planned."""
    with pytest.raises(ConfigError) as raised:
        cells(axes)
    for word in words:
        assert word in str(raised.value)
