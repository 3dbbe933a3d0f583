"""Planning: precedence of values, bad rows, stable keys and seeds. Rows are real frames in memory."""

from collections.abc import Iterator
from datetime import date

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.config import Settings
from batch.errors import ConfigError, ManifestError
from batch.estimate import counted, estimate, render_problems
from batch.fal.endpoint import ImageToImageInput
from batch.journal.records import KnownJob
from batch.journal.states import State
from batch.manifest.planner import Planned, Planner
from batch.manifest.types import CellError, LoneSurrogate, Resolved, RowBatch
from batch.money import Price
from batch.types import LocalImage


class Table:
    """A manifest in memory; its first row is on line 2."""

    def __init__(self, frame: pl.DataFrame, *, lines: bool = True) -> None:
        self.frame, self.schema, self._lines = frame, frame.schema, lines

    def batches(self, size: int = 4096) -> Iterator[RowBatch]:
        for first in range(0, len(self.frame), size):
            part = self.frame.slice(first, size)
            yield RowBatch(first, part, list(range(first + 2, first + 2 + len(part))) if self._lines else None)


class FakeImages:
    """An image resolver: URLs resolve to themselves, `local:HEX` to a local image of two megapixels."""

    def resolve(self, references):
        return [self._one(reference) for reference in references]

    def _one(self, reference):
        if reference is None:
            return CellError("missing", "the cell is empty")
        if str(reference).startswith("local:"):
            name = reference.removeprefix("local:")
            return Resolved(f"sha256:{name}", LocalImage(name, 10), 2.0)
        return Resolved(str(reference))


def planner(columns, configuration=None, *, lines=True) -> Planner:
    frame = columns if isinstance(columns, pl.DataFrame) else pl.DataFrame(columns)
    return Planner(Table(frame, lines=lines), Settings(**(configuration or {})), FakeImages())


def items(columns, configuration=None) -> list[Planned]:
    return [item for batch in planner(columns, configuration).batches() for item in batch.items]


def inputs(columns, configuration=None):
    return [item.job.input for item in items(columns, configuration)]


def problems(columns, configuration=None):
    return [problem for checked in planner(columns, configuration).checked() for problem in checked.problems]


ONE = {"image_url": ["https://a/1.png"], "prompt": ["a fresco"]}


def test_a_job_holds_every_input_of_the_endpoint() -> None:
    """The input is independent of the service's defaults: it has all fields, including the seed."""
    (complete,) = inputs(ONE)
    assert set(complete) == set(ImageToImageInput.model_fields)
    assert ImageToImageInput.model_validate(complete, strict=True).model_dump() == complete
    assert complete["sync_mode"] is False
    assert 0 <= complete["seed"] < 2**31


def test_the_sweep_wins_over_the_column_over_the_input_section_over_the_default() -> None:
    """Each source is used exactly where no source of higher precedence has a value."""
    columns = {
        "image_url": ["https://a/1.png"] * 2,
        "prompt": ["p"] * 2,
        "strength": ["0.3", None],
        "guidance_scale": ["2", "nonsense"],
        "num_images": ["2", ""],
    }
    found = inputs(columns, {"input": {"strength": 0.6, "num_inference_steps": 20}, "sweep": {"guidance_scale": [5]}})
    assert [
        (row["strength"], row["num_inference_steps"], row["guidance_scale"], row["num_images"]) for row in found
    ] == [
        (0.3, 20, 5.0, 2),
        (0.6, 20, 5.0, 1),
    ]


def test_text_and_typed_columns_give_the_same_job() -> None:
    """A CSV and a Parquet file with the same content give the same jobs."""
    text = {
        **ONE,
        "strength": ["0.50"],
        "num_inference_steps": ["20"],
        "enable_safety_checker": ["false"],
        "seed": ["7"],
    }
    typed = {**ONE, "strength": [0.5], "num_inference_steps": [20.0], "enable_safety_checker": [False], "seed": [7]}
    assert [item.job.key for item in items(ONE | text)] == [item.job.key for item in items(ONE | typed)]


def test_items_come_row_by_row_and_cell_by_cell() -> None:
    """This is the order of the results table."""
    columns = {"image_url": ["https://a/1", "https://a/2"], "prompt": ["p", "q"]}
    found = items(columns, {"sweep": {"seed": [1, 2]}})
    assert [(item.row, item.cell, item.job.input["seed"]) for item in found] == [
        (0, "seed=1", 1),
        (0, "seed=2", 2),
        (1, "seed=1", 1),
        (1, "seed=2", 2),
    ]


def test_a_batch_keeps_the_manifests_columns_and_stays_small_under_a_sweep() -> None:
    """Jobs, not rows, bound memory: a wide sweep makes short batches."""
    columns = pl.DataFrame({"image_url": [f"https://a/{i}" for i in range(100)], "prompt": "p", "extra": "007"})
    batches = list(planner(columns, {"sweep": {"seed": list(range(1000))}}).batches())
    assert max(len(batch.items) for batch in batches) <= 4096
    assert pl.concat([batch.frame for batch in batches]).equals(columns)
    assert [batch.first_row for batch in batches] == list(range(0, 100, 4))


# --- prompts ---


def test_a_template_is_filled_from_columns() -> None:
    """Braces contain column names, doubled braces are literal, numbers are formatted unchanged."""
    columns = {"image_url": ["u://1"], "animal": ["cat"], "n": [3]}
    (complete,) = inputs(columns, {"manifest": {"prompt": "{n} {{{animal}}} as wizards"}})
    assert complete["prompt"] == "3 {cat} as wizards"


def test_a_row_without_a_prompt_falls_back_or_is_a_problem() -> None:
    """Null is a missing prompt: `[input] prompt` replaces it, and without one the row is bad."""
    columns = {"image_url": ["u://1", "u://2"], "prompt": ["own", None]}
    assert [row["prompt"] for row in inputs(columns, {"input": {"prompt": "all"}})] == ["own", "all"]
    (problem,) = problems(columns)
    assert (problem.row, problem.line, problem.column, problem.type) == (1, 3, "prompt", "missing")
    template = {"manifest": {"prompt": "a {prompt}"}}
    assert [problem.type for problem in problems(columns, template)] == ["missing"]


def test_an_empty_text_is_a_prompt_in_typed_formats() -> None:
    """The endpoint accepts any text."""
    (complete,) = inputs({"image_url": ["u://1"], "prompt": [""]}, {"input": {"prompt": "all"}})
    assert complete["prompt"] == ""


def test_the_prompt_may_come_from_the_settings_alone() -> None:
    """Without a prompt column, `[input]` or a prompt axis provides the prompt."""
    columns = {"image_url": ["u://1"]}
    assert [row["prompt"] for row in inputs(columns, {"input": {"prompt": "ink"}})] == ["ink"]
    assert [row["prompt"] for row in inputs(columns, {"sweep": {"prompt": ["ink", "oil"]}})] == ["ink", "oil"]


# --- settings that do not fit the manifest ---


@pytest.mark.parametrize(
    ("configuration", "error", "words"),
    [
        ({"manifest": {"image": "imageurl"}}, ManifestError, ["'imageurl'", "did you mean 'image_url'", "caption"]),
        ({"manifest": {"image": "count"}}, ManifestError, ["'count'", "Int64", "manifest.image"]),
        ({}, ManifestError, ["'prompt'", "input.prompt", "caption"]),
        ({"manifest": {"prompt": "captoin"}, "input": {"prompt": "x"}}, ManifestError, ["did you mean 'caption'"]),
        ({"manifest": {"prompt": "a {captoin}"}}, ManifestError, ["'captoin'", "did you mean 'caption'"]),
        ({"manifest": {"prompt": "a {tags}"}}, ManifestError, ["'tags'", "List"]),
        ({"manifest": {"prompt": "a {caption"}}, ConfigError, ["'a {caption'", "template"]),
        ({"manifest": {"prompt": "a {caption:>9}"}}, ConfigError, ["placeholder"]),
        ({"manifest": {"prompt": "a {}"}}, ConfigError, ["placeholder"]),
        ({"manifest": {"prompt": "caption", "id": "sku"}}, ManifestError, ["'sku'", "manifest.id"]),
        ({"manifest": {"prompt": "caption"}, "sweep": {"strength": [7]}}, ConfigError, ["sweep.strength", "'7'"]),
        ({"manifest": {"prompt": "caption"}, "input": {"seed": 2**63}}, ConfigError, ["input.seed", str(2**63)]),
    ],
)
def test_settings_that_do_not_fit_the_columns_stop_at_once(configuration, error, words) -> None:
    """The message names the configured and the available columns."""
    columns = {"image_url": ["u://1"], "caption": ["c"], "count": [1], "tags": [["x"]]}
    with pytest.raises(error) as raised:
        planner(columns, configuration)
    for word in words:
        assert word in str(raised.value)


# --- bad rows ---


@pytest.mark.parametrize(
    ("column", "value", "type", "words"),
    [
        ("strength", "high", "float_parsing", ["'high'", "0.01 to 1"]),
        ("strength", "1.5", "less_than_equal", ["'1.5'", "0.01 to 1"]),
        ("strength", "nan", "finite_number", ["'nan'"]),
        ("num_inference_steps", "9", "greater_than_equal", ["'9'", "10 to 50"]),
        ("num_inference_steps", "20.5", "int_parsing", ["'20.5'", "an integer"]),
        ("seed", "-1", "greater_than_equal", ["'-1'"]),
        ("output_format", "PNG", "literal_error", ["'PNG'", "jpeg, png"]),
        ("enable_safety_checker", "maybe", "bool_parsing", ["'maybe'", "true or false"]),
        ("sync_mode", "true", "sync_mode", ["sync_mode is not supported"]),
    ],
)
def test_a_value_that_the_endpoint_would_refuse_is_a_problem_of_its_row(column, value, type, words) -> None:  # noqa: A002
    """Other rows become jobs; the problem has the line, column, value and allowed values."""
    columns = {"image_url": ["u://1", "u://2", "u://3"], "prompt": ["p"] * 3, column: [None, value, None]}
    good, bad, also_good = items(columns)
    assert [item.job is None for item in (good, bad, also_good)] == [False, True, False]
    assert (bad.problem.row, bad.problem.line, bad.problem.column) == (1, 3, column)
    assert (bad.problem.value, bad.problem.type) == (value, type)
    for word in words:
        assert word in bad.problem.message


def test_sync_mode_may_be_off() -> None:
    """Only a true value is refused."""
    assert [row["sync_mode"] for row in inputs({**ONE, "sync_mode": ["false"]})] == [False]


def test_each_bad_cell_is_a_problem_and_the_first_is_the_rows() -> None:
    """All problems of a row are listed at once; every cell of the sweep has the same problem."""
    columns = {"image_url": [None], "prompt": [None], "strength": ["high"], "seed": ["x"]}
    configuration = {"sweep": {"num_images": [1, 2]}}
    assert [problem.column for problem in problems(columns, configuration)] == [
        "image_url",
        "prompt",
        "strength",
        "seed",
    ]
    assert [(item.cell, item.problem.column) for item in items(columns, configuration)] == [
        ("num_images=1", "image_url"),
        ("num_images=2", "image_url"),
    ]


def known(columns, configuration=None):
    """Return the kept inputs of the only row, and the names of those that are null."""
    (item,) = items(columns, configuration)
    assert item.job is None
    return item.known, {name for name, value in item.known.items() if value is None}


FULL = {**ONE, "strength": ["0.5"], "num_inference_steps": ["20"], "seed": ["7"], "output_format": ["png"]}


@pytest.mark.parametrize(
    ("column", "value", "null"),
    [
        ("strength", "high", {"strength"}),
        ("strength", "2", {"strength"}),
        ("num_inference_steps", "9", {"num_inference_steps"}),
        ("seed", "-1", {"seed"}),
        ("seed", "x", {"seed"}),
        ("output_format", "PNG", {"output_format"}),
        ("prompt", None, {"prompt"}),
        ("prompt", "a\0b", {"prompt"}),
        ("image_url", None, {"image_url"}),
        ("sync_mode", "true", set()),
    ],
)
def test_a_bad_row_keeps_every_input_that_could_be_read(column, value, null) -> None:
    """Inputs from other columns, `[input]` and defaults are kept; only invalid ones are null."""
    found, nulls = known(FULL | {column: [value]}, {"input": {"guidance_scale": 5}})
    assert nulls == null
    good = {"prompt": "a fresco", "strength": 0.5, "num_inference_steps": 20, "seed": 7, "output_format": "png"}
    good |= {"guidance_scale": 5.0, "num_images": 1, "acceleration": "none"}
    assert {name: found[name] for name in good if name not in null} == {
        name: value for name, value in good.items() if name not in null
    }


def test_a_bad_row_has_the_seed_that_it_will_have_when_it_is_corrected() -> None:
    """The seed is known if its sources are readable: image and prompt, or the id."""
    (good,) = inputs(ONE)
    assert known({**ONE, "strength": ["x"]})[0]["seed"] == good["seed"]
    assert known({**ONE, "image_url": [None]})[0]["seed"] is None
    assert known({**ONE, "prompt": [None]})[0]["seed"] is None
    assert known({**ONE, "strength": ["x"], "seed": ["x"]})[0]["seed"] is None
    with_id, named = {"manifest": {"id": "sku"}}, {**ONE, "sku": ["7"]}
    (good,) = inputs(named, with_id)
    assert known({**named, "image_url": [None]}, with_id)[0]["seed"] == good["seed"]
    assert known({**named, "sku": [None]}, with_id)[0]["seed"] is None


def test_each_cell_of_a_bad_row_has_its_own_inputs() -> None:
    """Swept inputs are known even if the row is bad."""
    columns = {"image_url": [None], "prompt": ["p"], "seed": ["x"]}
    found = items(columns, {"sweep": {"strength": [0.5, 1], "prompt": ["a", "b"]}})
    assert [(item.cell, item.known["strength"], item.known["prompt"], item.known["seed"]) for item in found] == [
        ("prompt=a,strength=0.5", 0.5, "a", None),
        ("prompt=b,strength=0.5", 0.5, "b", None),
        ("prompt=a,strength=1.0", 1.0, "a", None),
        ("prompt=b,strength=1.0", 1.0, "b", None),
    ]


def test_the_message_of_a_bad_row_has_all_its_problems() -> None:
    """The type is that of the first problem; each column has one sentence."""
    columns = {"image_url": [None], "prompt": [None], "strength": ["high"], "seed": ["x"]}
    (item,) = items(columns)
    assert item.problem.type == "missing"
    assert item.problem.message == ". ".join(problem.message for problem in problems(columns))
    for words in ("the cell is empty", "input.prompt", "strength is 'high'", "seed is 'x'"):
        assert words in item.problem.message


def test_text_with_a_lone_surrogate_is_not_kept_as_an_input() -> None:
    """The U+FFFD in its place is not the user's text; the other inputs are kept."""
    frame = pl.DataFrame({"image_url": ["u://1"] * 2, "prompt": ["\ufffd", "p"], "style": ["s", "\ufffd"]})

    class WithSurrogates(Table):
        def batches(self, size: int = 4096) -> Iterator[RowBatch]:
            surrogates = {0: LoneSurrogate("prompt", "\ud83d"), 1: LoneSurrogate("style", "\ud83d")}
            yield RowBatch(0, self.frame, [2, 3], surrogates)

    def prompts(configuration):
        (batch,) = Planner(WithSurrogates(frame), Settings(**configuration), FakeImages()).batches()
        assert {item.problem.type for item in batch.items} == {"string_unicode"}
        return [(item.known["prompt"], item.known["strength"]) for item in batch.items]

    assert prompts({}) == [(None, 0.95), ("p", 0.95)]
    assert prompts({"manifest": {"prompt": "{prompt} in {style}"}}) == [(None, 0.95), (None, 0.95)]


@pytest.mark.parametrize(
    ("prompt", "type", "words"),
    [
        ("a\0b", "string_nul", ["prompt is 'a\\x00b'", "NUL"]),
        ("x" * 10_000_000, "string_too_long", ["prompt has 10,000,000 characters", "limit is 1,000,000"]),
    ],
)
def test_a_prompt_that_no_service_takes_is_a_problem(prompt, type, words) -> None:  # noqa: A002
    """The prompt may come from a column, a template or the settings; a prompt at the limit is accepted."""
    columns = {"image_url": ["u://1", "u://2"], "prompt": [prompt, "x" * 1_000_000]}
    bad, good = items(columns)
    assert (bad.problem.type, good.problem) == (type, None)
    for word in words:
        assert word in bad.problem.message
    assert len(bad.problem.message) < 200
    assert items(columns, {"manifest": {"prompt": "{prompt}"}})[0].problem.type == type
    with pytest.raises(ConfigError, match=r"input\.prompt"):
        planner(columns, {"input": {"prompt": prompt}})
    with pytest.raises(ConfigError, match=r"sweep\.prompt"):
        planner(columns, {"sweep": {"prompt": [prompt]}})


def test_a_row_without_its_id_is_a_problem() -> None:
    """The row's seed derives from a mapped id, so the id must be present."""
    (problem,) = problems({**ONE, "sku": [None]}, {"manifest": {"id": "sku"}})
    assert (problem.column, problem.type) == ("sku", "missing")


# --- identity ---


def test_the_input_contains_the_hash_of_a_local_image() -> None:
    """A renamed file gives the same job; the job has the file to upload and its size."""
    (item,) = items({"image_url": ["local:ab"], "prompt": ["p"]})
    assert item.job.input["image_url"] == "sha256:ab"
    assert item.job.image == LocalImage("ab", 10)
    assert item.job.megapixels == 2.0


def test_given_and_swept_seeds_are_kept_and_empty_ones_derived() -> None:
    """A seed in the manifest, in `[input]` or in the sweep is used unchanged."""
    columns = {"image_url": ["u://1"] * 2, "prompt": ["p"] * 2, "seed": [5, None]}
    given_seed, derived = (row["seed"] for row in inputs(columns))
    assert given_seed == 5
    assert derived != 5
    assert [row["seed"] for row in inputs(columns, {"input": {"seed": 9}})] == [5, 9]
    assert [row["seed"] for row in inputs(columns, {"sweep": {"seed": [4]}})] == [4, 4]


def test_the_run_seed_changes_derived_seeds_only() -> None:
    """Another run seed gives other images, but never changes an explicit seed."""
    columns = {"image_url": ["u://1"] * 2, "prompt": ["p", "q"], "seed": [5, None]}
    before, after = inputs(columns), inputs(columns, {"run_seed": 1})
    assert before[0] == after[0]
    assert before[1]["seed"] != after[1]["seed"]


def test_with_an_id_the_seed_outlives_a_new_prompt_and_without_it_does_not() -> None:
    """A mapped id identifies the row, else its image and prompt do."""
    old = {"image_url": ["u://1"], "prompt": ["p"], "sku": [7]}
    new = {"image_url": ["u://1"], "prompt": ["other"], "sku": ["7"]}
    with_id = {"manifest": {"id": "sku"}}
    assert inputs(old, with_id)[0]["seed"] == inputs(new, with_id)[0]["seed"]
    assert inputs(old)[0]["seed"] != inputs(new)[0]["seed"]


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "image_url": st.sampled_from(["https://a/1", "https://a/2", "local:ab"]),
            "prompt": st.text(max_size=4),
            "strength": st.sampled_from([None, "0.5", "0.50", "1", "high"]),
        }
    ),
    min_size=1,
    max_size=8,
)
SCHEMA = {"image_url": pl.String, "prompt": pl.String, "strength": pl.String}


def keys(rows, configuration=None):
    return [item.job and item.job.key for item in items(pl.DataFrame(rows, schema=SCHEMA), configuration)]


@settings(deadline=None, max_examples=60)
@given(ROWS, ROWS, st.integers(0, 8))
def test_rows_inserted_anywhere_change_no_other_job(rows, more, place) -> None:
    """A job does not depend on its row's position, so finished jobs stay finished."""
    place = min(place, len(rows))
    changed = keys(rows[:place] + more + rows[place:])
    assert changed[:place] + changed[place + len(more) :] == keys(rows)
    assert changed[place : place + len(more)] == keys(more)


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_two_equal_rows_are_one_job(rows) -> None:
    """A duplicate row is paid for once."""
    once = keys(rows)
    assert keys(rows + rows) == once + once


@settings(deadline=None, max_examples=60)
@given(ROWS, st.lists(st.sampled_from([2, 3, 4, 5]), unique=True, min_size=1))
def test_a_growing_axis_keeps_every_job_that_was_there(rows, scales) -> None:
    """The old cells keep their ids, seeds and keys in the grown sweep."""
    frame = pl.DataFrame(rows, schema=SCHEMA)

    def jobs(axis):
        return {
            (item.row, item.cell): item.job.key
            for item in items(frame, {"sweep": {"guidance_scale": axis}})
            if item.job
        }

    assert jobs(scales).items() <= jobs([9, *reversed(scales)]).items()


# --- estimate ---


def test_an_estimate_counts_distinct_jobs_images_dollars_and_hours() -> None:
    """Two equal rows count once; unknown sizes count as 2.1 megapixels; each of `num_images` counts."""
    columns = {
        "image_url": ["local:a", "local:a", "https://a/1", "local:b", None],
        "prompt": ["p"] * 5,
        "num_images": [2, 2, 3, 1, 1],
    }
    found = estimate(planner(columns), None, Price(0.5, date(2026, 11, 1)), 2, 3600)
    assert (found.rows, found.bad_rows, found.cells) == (5, 1, 1)
    assert (found.jobs, found.duplicates, found.to_do) == (3, 1, 3)
    assert (found.megapixels, found.unknown_sizes) == (6.0, 3)
    assert found.dollars == pytest.approx((6.0 + 3 * 2.1) * 0.5)
    assert found.dollars_at_most == pytest.approx((2 * 2 + 3 * 3 + 1 * 2) * 0.5)
    assert found.hours == pytest.approx(1.5)
    text = found.render()
    assert "$6.15 at $0.5 a megapixel, at most $7.50 if every image is rounded up; 3 unknown sizes taken as 2.1" in text
    assert len({line.index(line[12:].lstrip()[0], 12) for line in text.splitlines()}) == 1
    assert found.to_json()["problems"][0]["type"] == "missing"


def test_jobs_in_the_journal_are_not_to_do_and_cost_nothing() -> None:
    """Done, failed and submitted jobs are counted separately; a pending job of the journal is to do.

    With `retry_failed`, failed jobs are to do at full cost. No job is counted twice.
    """
    states = [State.DONE, State.FAILED, State.ACCEPTED, State.UNKNOWN, State.PENDING, None]
    columns = {"image_url": [f"local:{i}" for i in range(6)] * 2, "prompt": ["p"] * 12}
    known = {
        item.job.key: KnownJob(state, 1)
        for item, state in zip(items(columns), states * 2, strict=True)
        if state is not None
    }
    asked = []

    def find(keys):
        asked.extend(keys)
        return {key: known[key] for key in keys if key in known}

    found = estimate(planner(columns), find, Price(1.0, date(2026, 11, 1)), 1, 3600.0)
    assert (found.done, found.failed, found.in_flight, found.to_do, found.retried) == (1, 1, 2, 2, 0)
    assert (found.jobs, found.duplicates) == (6, 6)
    assert found.dollars == pytest.approx(4.0)
    assert len(asked) == len(set(asked)) == 6

    again = estimate(planner(columns), find, Price(1.0, date(2026, 11, 1)), 1, 3600.0, retry_failed=True)
    assert (again.done, again.failed, again.in_flight, again.to_do, again.retried) == (1, 0, 2, 3, 1)
    assert (again.dollars, again.hours) == (pytest.approx(6.0), pytest.approx(3.0))
    assert "to do       3, 1 of them failed before" in again.render()


@pytest.mark.slow
def test_duplicates_are_found_at_any_distance() -> None:
    """Duplicates are detected across many merges: 75,000 jobs, each occurring twice."""
    count = 75_000
    frame = pl.DataFrame({"image_url": [f"https://a/{i}" for i in range(count)] * 2, "prompt": "p", "seed": 1})
    found = estimate(planner(frame), None, None, 10, 1)
    assert (found.rows, found.jobs, found.duplicates) == (2 * count, count, count)
    assert found.unknown_sizes == count


def test_at_most_twenty_problems_are_shown_and_all_are_counted() -> None:
    """The first problems are listed with file and line, and the total is always shown."""
    columns = {"image_url": ["u://1"] * 30, "prompt": ["p"] * 30, "strength": ["high"] * 30}
    found = estimate(planner(columns), None, None, 1, 1)
    assert (found.problem_count, len(found.problems), found.bad_rows, found.jobs) == (30, 20, 30, 0)
    lines = render_problems("pets.csv", found.problems, found.problem_count).splitlines()
    assert lines[0] == "pets.csv:2 strength: strength is 'high'; it must be a number from 0.01 to 1"
    assert lines[-1] == "30 problems, 10 more not shown"
    assert len(lines) == 21


def test_problems_of_a_manifest_without_lines_name_the_row() -> None:
    """Parquet has no lines, so the row number is shown."""
    columns = pl.DataFrame({**ONE, "strength": [7.0]})
    found = estimate(planner(columns, lines=False), None, None, 1, 1)
    assert render_problems("pets.parquet", found.problems, 1).startswith("pets.parquet:row 0 strength: ")
    assert render_problems("pets.parquet", (), 0) == ""


def test_one_takes_the_singular() -> None:
    """Nouns agree with their numbers."""
    assert [counted(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    text = estimate(planner({**ONE, "image_url": ["https://a/1"]}), None, None, 1, 1).render()
    assert "0 known, 1 image of unknown size" in text
