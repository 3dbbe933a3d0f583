"""The columns of the results: names, types and values."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import polars as pl
import pyarrow as pa
import pytest

from batch.journal.records import JobOutcome
from batch.journal.states import State
from batch.journal.transitions import encode_images
from batch.manifest.planner import Planned, PlannedBatch
from batch.results.schema import IMAGE, OWN_SCHEMA, TIMING, record_batch, results_schema
from batch.types import Job, JobKey, Problem, RequestId, StoredImage

INPUT = {
    "image_url": "http://x/0.png",
    "prompt": "a cat",
    "strength": 1,
    "num_inference_steps": 40,
    "guidance_scale": 3.5,
    "seed": 7,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
    "acceleration": "none",
}
STORED = StoredImage("http://x/1.jpg", 64, 48, "image/jpeg", "1.jpg", 9, "images/ab/abc.jpg", "abc")
OUTPUT = {
    "images": [{"url": "http://x/1.jpg", "width": 64}],
    "seed": 2**62 + 1,
    "timings": {"inference": 1.5},
    "has_nsfw_concepts": [False],
}
KEY = JobKey("0" * 32)
DONE = JobOutcome(
    KEY, State.DONE, 2, RequestId("r-1"), 1_700_000_000.123456, 1_700_000_003.5, orjson.dumps(OUTPUT),
    encode_images([STORED]), 0.5, 2.0, 0.25, 1.25, 0.03, "preview",
)  # fmt: skip


def done(output):
    return JobOutcome(KEY, State.DONE, 1, output=orjson.dumps(output), images=encode_images([]))


def job(row=0, **values):
    return Job(JobKey(f"{row:032x}"), {**INPUT, **values})


def batch_of(items, frame=None, first_row=0):
    if frame is None:
        frame = pl.DataFrame({"image_url": [f"http://x/{i}.png" for i in range(len(items))]})
    return PlannedBatch(first_row, frame, items)


def table_of(batch, outcomes=None, *, on_bad_row="fail"):
    schema = results_schema(batch.frame.to_arrow().schema)
    table = record_batch(batch, outcomes or {}, schema=schema, target="local", on_bad_row=on_bad_row)
    table.validate(full=True)
    assert table.schema == schema
    return table


def record(outcome, **values):
    """Return the record of a one-row manifest."""
    one = job(**values)
    table = table_of(batch_of([Planned(0, "", one, None)]), {} if outcome is None else {one.key: outcome})
    return table.to_pylist()[0]


def test_schema_is_the_documented_one():
    """Names, order and types are an interface: users' queries depend on them."""
    image = "struct<url: string, width: int64, height: int64, content_type: string, file_name: string, "
    image += "file_size: int64, path: string, sha256: string>"
    assert [f"{field.name}: {field.type}" for field in OWN_SCHEMA] == [
        "row: int64",
        "cell: string",
        "job_key: string",
        "status: string",
        "prompt: string",
        "strength: double",
        "num_inference_steps: int64",
        "guidance_scale: double",
        "num_images: int64",
        "enable_safety_checker: bool",
        "output_format: string",
        "acceleration: string",
        "seed: int64",
        f"images: list<item: {image}>",
        "has_nsfw_concepts: list<item: bool>",
        "timings: struct<inference: double, queue: double, total: double, download: double>",
        "timings_extra: list<item: struct<name: string, seconds: double>>",
        "request_id: string",
        "attempts: int32",
        "submitted_at: timestamp[us, tz=UTC]",
        "completed_at: timestamp[us, tz=UTC]",
        "billable_units: double",
        "cost_usd: double",
        "error_type: string",
        "error_message: string",
        "target: string",
        "engine: string",
        "notes: list<item: string>",
    ]


def test_manifest_columns_come_first_and_clashes_get_a_suffix():
    """Our names stay unique, and so do the renamed columns of the manifest."""
    manifest = pa.schema([(name, pa.int8()) for name in ("prompt", "label", "seed", "prompt_manifest", "row")])
    names = results_schema(manifest).names
    assert names[:5] == ["prompt_manifest_manifest", "label", "seed_manifest", "prompt_manifest", "row_manifest"]
    assert names[5:] == OWN_SCHEMA.names
    assert len(set(names)) == len(names)


def test_done_job_fills_every_column():
    """The record contains everything that is known about a finished job."""
    said = record(DONE)
    assert said == {
        "image_url": "http://x/0.png",
        "row": 0,
        "cell": "",
        "job_key": "0" * 32,
        "status": "done",
        "prompt": "a cat",
        "strength": 1.0,
        "num_inference_steps": 40,
        "guidance_scale": 3.5,
        "num_images": 1,
        "enable_safety_checker": True,
        "output_format": "jpeg",
        "acceleration": "none",
        "seed": 2**62 + 1,
        "images": [{field.name: getattr(STORED, field.name) for field in IMAGE}],
        "has_nsfw_concepts": [False],
        "timings": {"inference": 1.5, "queue": 0.5, "total": 2.0, "download": 0.25},
        "timings_extra": None,
        "request_id": "r-1",
        "attempts": 2,
        "submitted_at": datetime(2023, 11, 14, 22, 13, 20, 123456, UTC),
        "completed_at": datetime(2023, 11, 14, 22, 13, 23, 500000, UTC),
        "billable_units": 1.25,
        "cost_usd": 0.03,
        "error_type": None,
        "error_message": None,
        "target": "local",
        "engine": "preview",
        "notes": [f"seed: the service reports {2**62 + 1}, 7 was asked for"],
    }


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.PENDING, "pending"),
        (State.INTENDED, "unknown"),
        (State.ACCEPTED, "pending"),
        (State.ANSWERED, "pending"),
        (State.DONE, "done"),
        (State.FAILED, "failed"),
        (State.UNKNOWN, "unknown"),
        (State.COLLECTABLE, "failed"),
    ],
)
def test_status_follows_the_state(state, status):
    """Each state of a job maps to one status."""
    assert record(JobOutcome(KEY, state, 1))["status"] == status


def test_job_without_outcome_is_pending():
    """A job without an outcome is pending, with its input and planned seed."""
    said = record(None)
    assert (said["status"], said["seed"], said["attempts"], said["images"]) == ("pending", 7, 0, None)
    assert said["timings"] is None
    assert said["submitted_at"] is None


@pytest.mark.parametrize(("on_bad_row", "status"), [("fail", "failed"), ("skip", "skipped")])
def test_bad_row_is_a_record(on_bad_row, status):
    """An invalid row gives a record with the reason, at its position."""
    problem = Problem(1, 3, "image_url", "nope.png", "image_not_found", "line 3: nope.png is not there")
    items = [Planned(0, "", job(0), None), Planned(1, "", None, problem)]
    said = table_of(batch_of(items), on_bad_row=on_bad_row).to_pylist()[1]
    assert (said["status"], said["error_type"], said["error_message"]) == (status, problem.type, problem.message)
    assert (said["job_key"], said["prompt"], said["seed"], said["row"]) == (None, None, None, 1)


def test_failure_is_told():
    """The service's error type and message, and the billed units."""
    word = "content_policy_violation"
    failed = JobOutcome(KEY, State.FAILED, 3, completed_at=5.0, billable_units=0.5, error_type=word, error_message="no")
    said = record(failed)
    assert (said["error_type"], said["error_message"], said["billable_units"]) == (
        "content_policy_violation",
        "no",
        0.5,
    )
    assert (said["images"], said["attempts"]) == (None, 3)


@pytest.mark.parametrize(
    ("known", "message"),
    [("reset", "reset"), (None, "reconcile"), ("", "reconcile")],
)
def test_unknown_says_what_to_do(known, message):
    """A submit of unknown outcome has a reason, or at least an advice."""
    said = record(JobOutcome(KEY, State.UNKNOWN, 1, error_type="unknown", error_message=known))
    assert said["error_type"] == "unknown"
    assert message in said["error_message"]


def test_pending_job_shows_no_failure():
    """Only failed and unknown records have an error."""
    said = record(JobOutcome(KEY, State.ANSWERED, 1, output=orjson.dumps(OUTPUT)))
    assert (said["error_type"], said["images"]) == (None, None)


def test_nothing_checked_is_null():
    """An empty list of safety verdicts means that nothing was checked."""
    for output in ({**OUTPUT, "has_nsfw_concepts": []}, {"seed": 1}):
        assert record(done(output))["has_nsfw_concepts"] is None


def test_done_without_images_has_an_empty_list():
    """An empty list of a finished job differs from a missing answer."""
    assert record(done(OUTPUT))["images"] == []


def test_unknown_timings_are_kept():
    """The endpoint's timings other than inference go into a list."""
    output = {**OUTPUT, "timings": {"load": 0.5, "inference": 1.0, "queue": 9.0}}
    said = record(done(output))
    assert said["timings"] == {"inference": 1.0, "queue": None, "total": None, "download": None}
    assert said["timings_extra"] == [{"name": "load", "seconds": 0.5}, {"name": "queue", "seconds": 9.0}]


@pytest.mark.parametrize("seed", [2**63, 1.5, "12", None, True])
def test_seed_is_an_integer_or_the_one_that_was_asked_for(seed):
    """Seeds never become floats; a seed that does not fit int64 is replaced by the input's."""
    assert record(done({**OUTPUT, "seed": seed}))["seed"] == 7
    assert record(done({**OUTPUT, "seed": 2**63 - 1}))["seed"] == 2**63 - 1


def test_odd_output_makes_nulls_and_no_error():
    """Answers are stored as received: a value that does not fit its column is null, and its neighbours stay."""
    outputs = [
        {"seed": 1, "timings": {"inference": "soon", "load": "x"}, "has_nsfw_concepts": ["maybe"]},
        {"seed": 2, "timings": [1], "has_nsfw_concepts": [True]},
        {"seed": 3, "timings": {"inference": 2.0}},
    ]
    jobs = [job(row) for row in range(3)]
    outcomes = {
        one.key: done(output)._replace(images=encode_images([StoredImage("u", width=2**64 - 1, height=5)]))
        for one, output in zip(jobs, outputs, strict=True)
    }
    said = table_of(batch_of([Planned(i, "", one, None) for i, one in enumerate(jobs)]), outcomes).to_pylist()
    assert [s["timings"] and s["timings"]["inference"] for s in said] == [None, None, 2.0]
    assert [s["has_nsfw_concepts"] for s in said] == [None, [True], None]
    assert [s["timings_extra"] for s in said] == [None, None, None]
    assert [(s["images"][0]["width"], s["images"][0]["height"]) for s in said] == [(None, 5)] * 3


def test_sweep_repeats_its_manifest_row():
    """One record per cell, with the manifest's columns repeated; row numbers count over the whole manifest."""
    frame = pl.DataFrame({"label": ["a", "b"]})
    items = [Planned(row, cell, job(row, seed=seed), None) for row in (10, 11) for seed, cell in ((1, "x"), (2, "y"))]
    said = table_of(batch_of(items, frame, first_row=10)).to_pylist()
    assert [(s["label"], s["row"], s["cell"], s["seed"]) for s in said] == [
        ("a", 10, "x", 1),
        ("a", 10, "y", 2),
        ("b", 11, "x", 1),
        ("b", 11, "y", 2),
    ]


def test_part_of_a_batch_takes_its_own_rows():
    """Items need not cover all rows of the frame."""
    frame = pl.DataFrame({"label": ["a", "b", "c"]})
    said = table_of(batch_of([Planned(5, "", job(5), None)], frame, first_row=4)).to_pylist()
    assert [s["label"] for s in said] == ["b"]


def test_a_bad_row_shows_the_inputs_that_could_be_read():
    """The readable inputs are shown next to the manifest's columns; the others are null and keep their type."""
    problem = Problem(0, 2, "strength", "x", "float_parsing", "strength is 'x'")
    kept = {name: value for name, value in INPUT.items() if name != "strength"}
    said = table_of(batch_of([Planned(0, "base", None, problem, kept | {"strength": None})])).to_pylist()[0]
    assert (said["status"], said["error_type"], said["job_key"]) == ("failed", "float_parsing", None)
    shown = {name: said[name] for name in INPUT if name != "image_url"}
    assert shown == {name: value for name, value in INPUT.items() if name != "image_url"} | {"strength": None}


def test_rows_that_share_a_job_share_its_outcome():
    """Two rows, one job: paid once, shown twice."""
    one = job()
    batch = batch_of([Planned(0, "", one, None), Planned(1, "", one, None)])
    assert table_of(batch, {one.key: DONE})["status"].to_pylist() == ["done", "done"]


def test_columns_without_values_keep_their_type():
    """A table of failures, or without rows, has the same schema as any other."""
    problem = Problem(0, None, "image_url", "", "missing", "m")
    for items in ([Planned(0, "", None, problem)], []):
        frame = pl.DataFrame({"x": [None] * len(items)}, schema={"x": pl.Int16})
        table = table_of(batch_of(items, frame))
        assert table.schema.field("x").type == pa.int16()
        assert table.schema.field("timings_extra").type == pa.list_(TIMING)
        assert len(table) == len(items)


@pytest.mark.parametrize("state", [State.FAILED, State.COLLECTABLE])
def test_a_failed_job_keeps_what_its_answer_said(state):
    """The images could not be stored, but their URLs, flags and timings are shown."""
    outcome = DONE._replace(state=state, images=None, error_type="result_file_gone", error_message="HTTP 404")
    said = record(outcome)
    assert said["status"] == "failed"
    assert (said["images"][0]["url"], said["images"][0]["width"], said["images"][0]["path"]) == (
        "http://x/1.jpg",
        64,
        None,
    )
    assert (said["has_nsfw_concepts"], said["timings"]["inference"], said["request_id"]) == ([False], 1.5, "r-1")


def test_odd_fields_are_null_and_noted():
    """An unreadable field affects only that field."""
    said = record(done({**OUTPUT, "seed": None, "has_nsfw_concepts": None, "timings": {"inference": "x", "load": 2}}))
    assert (said["seed"], said["has_nsfw_concepts"], said["timings"]) == (7, None, None)
    assert said["timings_extra"] == [{"name": "load", "seconds": 2.0}]
    assert [note.partition(":")[0] for note in said["notes"]] == ["seed", "timings.inference", "has_nsfw_concepts"]


def test_an_answer_that_is_no_object_costs_nothing_but_itself():
    """The answer stays in the journal, and the row shows the facts that do not need it."""
    said = record(DONE._replace(state=State.COLLECTABLE, output=b"<html>", images=None, error_type="malformed_output"))
    assert (said["seed"], said["images"], said["notes"], said["error_type"]) == (7, None, None, "malformed_output")
