"""Prompt templates: the same rules for `[manifest]`, `[input]` and `[sweep]`."""

from __future__ import annotations

import string
import time

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.errors import ConfigError, ManifestError
from batch.manifest.prompts import parse_template
from batch.manifest.sweep import cells
from tests.unit.test_planner import inputs, items, planner, problems

PLACES = {
    "manifest.prompt": lambda text: {"manifest": {"prompt": text}},
    "input.prompt": lambda text: {"input": {"prompt": text}},
    "sweep.prompt": lambda text: {"sweep": {"prompt": [text]}},
}
everywhere = pytest.mark.parametrize("key", PLACES)
COLUMNS = {"image_url": ["u://1", "u://2"], "animal": ["dog", "cat"], "n": [3, 4]}


def prompts(key, text, columns=None):
    return [row["prompt"] for row in inputs(columns or COLUMNS, PLACES[key](text))]


def refusal(key, text, columns=None):
    with pytest.raises((ConfigError, ManifestError)) as raised:
        planner(columns or COLUMNS, PLACES[key](text))
    assert raised.value.exit_code == 2
    assert key in str(raised.value)
    return str(raised.value)


# --- filled templates -------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("a {animal}", ["a dog", "a cat"]),
        ("{animal}", ["dog", "cat"]),
        ("{n} {animal}s, {n} times", ["3 dogs, 3 times", "4 cats, 4 times"]),
        ("{{{animal}}}", ["{dog}", "{cat}"]),
        ("{{animal}} and {animal}", ["{animal} and dog", "{animal} and cat"]),
        ("{animal}}}{{", ["dog}{", "cat}{"]),
    ],
)
def test_a_template_is_filled_by_the_same_rules_in_every_setting(key, text, filled):
    """Column names in braces, literal braces doubled, numbers unchanged."""
    assert prompts(key, text) == filled


@pytest.mark.parametrize("key", ["input.prompt", "sweep.prompt"])
@pytest.mark.parametrize(
    ("text", "sent"), [("as a fresco", "as a fresco"), ("set {{1, 2}}", "set {1, 2}"), ("{{}}", "{}"), ("", "")]
)
def test_a_template_without_placeholders_is_one_text_for_all(key, text, sent):
    """Escapes work the same with and without placeholders."""
    assert prompts(key, text) == [sent, sent]


def test_a_sweep_crosses_templates_and_texts():
    """Each cell fills its own template; other axes are unaffected."""
    swept = {"sweep": {"prompt": ["a {animal}", "b"], "strength": [0.5, 1.0]}}
    assert [(row["prompt"], row["strength"]) for row in inputs(COLUMNS, swept)] == [
        ("a dog", 0.5), ("a dog", 1.0), ("b", 0.5), ("b", 1.0),
        ("a cat", 0.5), ("a cat", 1.0), ("b", 0.5), ("b", 1.0),
    ]  # fmt: skip


def test_the_id_of_a_cell_comes_from_the_template():
    """The id does not depend on the row or the filled text."""
    written = ["a {animal}", "{{b}}", "c"]
    found = items(COLUMNS, {"sweep": {"prompt": written}})
    assert [item.cell for item in found[:3]] == [cell.id for cell in cells({"prompt": written})]
    assert [item.cell for item in found[:3]] == [item.cell for item in found[3:]]


def test_a_prompt_without_braces_is_the_same_job_as_before():
    """Keys of paid jobs are stable: these are from version 0.1.0."""
    made = items({"image_url": ["u://1"]}, {"sweep": {"prompt": ["ink", "oil, on canvas"]}})
    plain = items({"image_url": ["u://1"]}, {"input": {"prompt": "ink"}})
    assert [item.job.key for item in [*made, *plain]] == [
        "74421f6554c2ab6cb2250216521999a6",
        "18f08c736188c0d9e1cb476e7a05df5c",
        "ec7697b12190724e1b3abd91ce766696",
    ], "do not update these keys: finished jobs would be paid for again; leave a new input out while it is unset"


def test_swept_rows_with_the_same_filled_prompt_are_one_job():
    """The key is computed from the sent input, so duplicates are paid for once."""
    columns = {"image_url": ["u://1"] * 2, "animal": ["dog"] * 2, "other": ["x", "y"]}
    first, second = items(columns, {"sweep": {"prompt": ["a {animal}"]}})
    assert first.job.key == second.job.key


def test_prompts_in_the_manifests_own_column_stay_literal():
    """Braces in the manifest's own prompts are not placeholders."""
    columns = {**COLUMNS, "prompt": ["a {animal}", "{{"]}
    assert [row["prompt"] for row in inputs(columns)] == ["a {animal}", "{{"]
    assert prompts("manifest.prompt", "{prompt}!", columns) == ["a {animal}!", "{{!"]


def test_column_values_are_not_parsed_as_templates():
    """Placeholders are replaced once."""
    columns = {**COLUMNS, "animal": ["{n}", "}}"]}
    assert prompts("sweep.prompt", "a {animal}", columns) == ["a {n}", "a }}"]


@everywhere
def test_a_column_of_an_odd_name_is_named_as_it_is(key):
    """Dots, brackets, colons and spaces are valid in column names."""
    odd = {"a.b": "1", "a[0]": "2", "x:y": "3", "dc!r": "4", "two words": "5", " ": "6"}
    columns = {"image_url": ["u://1"], **{name: [value] for name, value in odd.items()}}
    assert prompts(key, " ".join(f"{{{name}}}" for name in odd), columns) == ["1 2 3 4 5 6"]


# --- missing parts ----------------------------------------------------------------------------------------

GAPS = {"image_url": ["u://1", "u://2"], "animal": ["dog", None], "style": [None, None]}


def test_a_swept_prompt_with_a_missing_part_fails_its_own_cell_only():
    """The row's other cells are jobs; the problem, one per row, names the empty column and the prompt."""
    swept = {"sweep": {"prompt": ["a {animal}", "b", "the {animal}"]}}
    found = items(GAPS, swept)
    assert [item.job is None for item in found] == [False, False, False, True, False, True]
    (problem,) = problems(GAPS, swept)
    assert (problem.row, problem.line, problem.column, problem.type) == (1, 3, "animal", "missing")
    assert "'a {animal}' needs it" in problem.message
    assert found[3].problem == found[5].problem == problem


def test_a_cell_with_a_missing_part_falls_back_to_the_prompt_for_all():
    """Rows with `[manifest] prompt` do the same; `[input] prompt` may be a template too."""
    both = {"sweep": {"prompt": ["a {animal}"]}, "input": {"prompt": "any"}}
    assert [row["prompt"] for row in inputs(GAPS, both)] == ["a dog", "any"]
    templates = {"manifest": {"prompt": "a {animal}"}, "input": {"prompt": "see {image_url}"}}
    assert [row["prompt"] for row in inputs(GAPS, templates)] == ["a dog", "see u://2"]


def test_where_the_prompt_for_all_has_a_missing_part_the_row_is_bad():
    """There is no further fallback."""
    (problem,) = problems(GAPS, PLACES["input.prompt"]("a {animal}"))
    assert (problem.row, problem.column, problem.type) == (1, "animal", "missing")
    both = {"manifest": {"prompt": "a {animal}"}, "input": {"prompt": "in {style}"}}
    (problem,) = problems(GAPS, both)
    assert (problem.row, problem.column, problem.type) == (1, "animal", "missing")
    assert "'in {style}'" in problem.message


# --- what is refused --------------------------------------------------------------------------------------


@everywhere
def test_an_unknown_name_is_refused_with_the_nearest_column(key):
    """Templates are checked before anything is planned."""
    said = refusal(key, "a {aminal} at dawn")
    assert "no column 'aminal'" in said
    assert "did you mean 'animal'?" in said
    assert "image_url, animal, n" in said


def test_each_prompt_of_an_axis_is_checked():
    """The message names the invalid prompt."""
    with pytest.raises(ConfigError, match=r"sweep\.prompt = 'b \{colour\}'.* no column 'colour'"):
        planner(COLUMNS, {"sweep": {"prompt": ["a {animal}", "b {colour}"]}})


@everywhere
@pytest.mark.parametrize(
    "name",
    ["animal.name", "animal[0]", "animal!r", "animal:>10", "animal:{n}", "animal.__class__", "0", "", "!r", ":d"],
)
def test_nothing_in_a_placeholder_is_evaluated(key, name):
    """Format syntax is an error, and the message explains how to escape braces."""
    said = refusal(key, f"a {{{name}}}")
    assert "dog" not in said
    assert "'animal'" in said or name in {"0", "", "!r", ":d", "animal:{n}"}
    assert "{{" in said or key == "manifest.prompt"


@everywhere
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a {animal", "'{' at character 3 is not closed"),
        ("a animal}", "'}' at character 9 is unmatched"),
        ("a {{animal}", "'}' at character 11 is unmatched"),
        ("a {animal}}", "'}' at character 11 is unmatched"),
        ("a {animal {n}}", "'{' at character 3 is not closed"),
        ("{", "'{' at character 1 is not closed"),
        ("}{", "'}' at character 1 is unmatched"),
    ],
)
def test_a_brace_without_its_partner_is_refused_with_its_place(key, text, words):
    """The message also explains how to write literal braces."""
    said = refusal(key, text)
    assert words in said
    assert "write {{ and }} for literal braces" in said


def test_a_column_without_text_cannot_be_filled_in():
    """Lists and bytes are refused as placeholders."""
    columns = {**COLUMNS, "tags": [["x"], ["y"]], "raw": [b"1", b"2"]}
    for name in ("tags", "raw"):
        with pytest.raises(ConfigError, match=rf"the column '{name}' holds .*sweep\.prompt needs one with text"):
            planner(columns, PLACES["sweep.prompt"](f"a {{{name}}}"))


def test_json_as_a_prompt_needs_escaped_braces():
    """The message explains how to escape them."""
    said = refusal("sweep.prompt", '{"style": "ink"}')
    assert "write {{ and }} for literal braces" in said
    assert prompts("sweep.prompt", '{{"style": "ink"}}') == ['{"style": "ink"}'] * 2


# --- arbitrary text ---------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1, max_size=6)


@given(st.lists(st.one_of(NAMES.map(lambda name: (name, True)), st.text(max_size=6).map(lambda t: (t, False)))))
def test_texts_and_columns_come_back_as_they_went_in(parts):
    """Escaped literal text and columns in any order are filled correctly."""
    known = {name: f"<{name}>" for name, is_column in parts if is_column}
    text = "".join(f"{{{t}}}" if is_column else t.replace("{", "{{").replace("}", "}}") for t, is_column in parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    template = parse_template(text, "key", list(known))
    filled = template.texts(pl.DataFrame({name: [value] for name, value in {**known, "other": ""}.items()}))
    assert filled == ["".join(known[t] if is_column else t for t, is_column in parts)]


@given(st.text(alphabet="{}ab.:!["))
def test_a_template_is_read_as_python_reads_it_or_refused(text):
    """An accepted template has the names and texts that `string.Formatter` finds."""
    try:
        template = parse_template(text, "key", ["a", "b"])
    except ConfigError:
        return
    ours = [part if isinstance(part, str) else (part.name,) for part in template.parts]
    theirs = []
    for literal, name, _, _ in string.Formatter().parse(text):
        theirs += [literal] if literal else []
        theirs += [] if name is None else [(name,)]
    assert "".join(map(str, ours)) == "".join(map(str, theirs))


def test_ten_thousand_placeholders_are_filled_in_linear_time():
    """Ten times as many placeholders take about ten times as long."""
    columns = {"image_url": [f"u://{i}" for i in range(5)], "animal": ["dog"] * 5}

    def seconds(count):
        began = time.perf_counter()
        found = prompts("sweep.prompt", "{animal} {{}} " * count, columns)
        assert found == ["dog {} " * count] * 5
        return time.perf_counter() - began

    seconds(1000)
    assert seconds(10_000) < max(40 * seconds(1000), 2.0)


def test_many_open_braces_are_refused_in_linear_time():
    """A malicious text does not block the command."""
    began = time.perf_counter()
    for text in ("{" * 200_001, "{a" * 100_000, "}" * 200_001, "{" + "a" * 500_000):
        with pytest.raises((ConfigError, ManifestError)) as raised:
            planner(COLUMNS, PLACES["sweep.prompt"](text))
        assert len(str(raised.value)) < 1000
    assert time.perf_counter() - began < 5.0


def test_a_long_template_makes_short_batches():
    """The length of prompts bounds memory too."""
    columns = pl.DataFrame({"image_url": [f"u://{i}" for i in range(300)], "animal": "dog"})
    batches = list(planner(columns, PLACES["input.prompt"]("{animal} and more " * 10_000)).batches())
    assert max(len(batch.items) for batch in batches) <= 100
    assert sum(len(batch.items) for batch in batches) == 300
