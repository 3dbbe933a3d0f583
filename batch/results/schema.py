"""Columns of `results.parquet`: their schema, and their values from planned rows and outcomes. Pure.

Owns the names, order, types and meaning of the columns. Knows nothing of the journal, files or row groups: `writer`
supplies batches and outcomes and writes the result. Needs pyarrow and numpy for the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import numpy as np
import orjson
import pyarrow as pa

from batch.fal.answer import AnswerFields, fields_of, has_images, images_of
from batch.journal.answers import output_of
from batch.journal.records import JobOutcome
from batch.journal.states import State
from batch.journal.transitions import encode_images
from batch.manifest.planner import Planned, PlannedBatch
from batch.types import JobKey, Json, JsonObject

__all__ = [
    "IMAGE",
    "INPUT_COLUMNS",
    "OWN_SCHEMA",
    "TIMING",
    "TIMINGS",
    "OnBadRow",
    "record_batch",
    "results_schema",
    "status_of",
]

OnBadRow: TypeAlias = Literal["fail", "skip"]

_SUFFIX = "_manifest"
_INSTANT = pa.timestamp("us", tz="UTC")
_UNHEARD = JobOutcome(JobKey(""), State.PENDING, attempts=0)
_NOTHING: JsonObject = {}
_NO_FIELDS = AnswerFields(None, None, None, None, ())
_UNDECIDED = "the submit may have been accepted; `restyle reconcile` or the next run settles it"

IMAGE = pa.struct(
    [
        ("url", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("content_type", pa.string()),
        ("file_name", pa.string()),
        ("file_size", pa.int64()),
        ("path", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""One result image; `file_size` in bytes, `path` relative to the run directory."""

TIMINGS = pa.struct([(name, pa.float64()) for name in ("inference", "queue", "total", "download")])
"""Seconds."""

TIMING = pa.struct([("name", pa.string()), ("seconds", pa.float64())])
"""One of the endpoint's other timings. The column is a list of them, not a map: `datasets` cannot load a map."""

_INPUTS = [
    ("prompt", pa.string()),
    ("strength", pa.float64()),
    ("num_inference_steps", pa.int64()),
    ("guidance_scale", pa.float64()),
    ("num_images", pa.int64()),
    ("enable_safety_checker", pa.bool_()),
    ("output_format", pa.string()),
    ("acceleration", pa.string()),
]
INPUT_COLUMNS = tuple(name for name, _ in _INPUTS)
"""The effective input without the image (a manifest column) and the seed (a separate column)."""

_INPUT_VALUES = itemgetter(*INPUT_COLUMNS)
_NO_INPUT: JsonObject = dict.fromkeys((*INPUT_COLUMNS, "seed"))

OWN_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("cell", pa.string()),
        ("job_key", pa.string()),
        ("status", pa.string()),
        *_INPUTS,
        ("seed", pa.int64()),
        ("images", pa.list_(IMAGE)),
        ("has_nsfw_concepts", pa.list_(pa.bool_())),
        ("timings", TIMINGS),
        ("timings_extra", pa.list_(TIMING)),
        ("request_id", pa.string()),
        ("attempts", pa.int32()),
        ("submitted_at", _INSTANT),
        ("completed_at", _INSTANT),
        ("billable_units", pa.float64()),
        ("cost_usd", pa.float64()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("target", pa.string()),
        ("engine", pa.string()),
        ("notes", pa.list_(pa.string())),
    ]
)
"""The columns of restyle, after those of the manifest. Every run has the same ones: an empty column keeps its type."""

_FAILED = frozenset({State.FAILED, State.COLLECTABLE})
_STATUS = {
    State.PENDING: "pending",
    State.INTENDED: "unknown",
    State.ACCEPTED: "pending",
    State.ANSWERED: "pending",
    State.DONE: "done",
    State.FAILED: "failed",
    State.UNKNOWN: "unknown",
    State.COLLECTABLE: "failed",
}


def status_of(state: State) -> str:
    """Return the value of the column `status` for a job's state."""
    return _STATUS[state]


def results_schema(manifest: pa.Schema) -> pa.Schema:
    """Return the results schema of a manifest: its columns, then ours.

    A manifest column with the name of one of ours gets the suffix `_manifest`, repeated until the name is unique.
    """
    own = set(OWN_SCHEMA.names)
    taken = own | set(manifest.names)
    fields = []
    for field in manifest:
        name = field.name
        if name in own:
            while name in taken:
                name += _SUFFIX
            taken.add(name)
        fields.append(pa.field(name, field.type))
    return pa.schema(fields + list(OWN_SCHEMA))


def record_batch(
    batch: PlannedBatch,
    outcomes: Mapping[JobKey, JobOutcome],
    *,
    schema: pa.Schema,
    target: str,
    on_bad_row: OnBadRow,
) -> pa.Table:
    """Return the results of one planned batch: one record per item, in order.

    Args:
        batch: planned rows.
        outcomes: outcomes of their jobs; a missing job is pending.
        schema: the manifest's `results_schema`.
        target: the value of the column `target`.
        on_bad_row: whether the status of an invalid row is failed or skipped.

    Raises:
        pyarrow.ArrowInvalid: a manifest column does not fit its type in the schema.
    """
    width = len(schema) - len(OWN_SCHEMA)
    columns = _manifest_columns(batch, pa.schema([schema.field(i) for i in range(width)]))
    own = _own_columns(batch.items, outcomes, target, on_bad_row)
    return pa.Table.from_arrays(columns + [own[name] for name in OWN_SCHEMA.names], schema=schema)


def _manifest_columns(batch: PlannedBatch, schema: pa.Schema) -> list[pa.ChunkedArray]:
    table = batch.frame.to_arrow()
    rows = np.fromiter((item.row for item in batch.items), np.int64, len(batch.items)) - batch.first_row
    if len(rows) != len(table) or (rows != np.arange(len(table))).any():
        table = table.take(pa.array(rows))
    return [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]


def _own_columns(
    items: Sequence[Planned], outcomes: Mapping[JobKey, JobOutcome], target: str, on_bad_row: OnBadRow
) -> dict[str, pa.Array]:
    jobs = [item.job for item in items]
    inputs = [_NO_INPUT | item.known if item.job is None else item.job.input for item in items]
    found = [_UNHEARD if job is None else outcomes.get(job.key, _UNHEARD) for job in jobs]
    said = _by_name(JobOutcome._fields, found)
    outputs = [_NOTHING if output is None else output_of(output) for output in said["output"]]
    asked = [values["seed"] for values in inputs]
    fields = [fields_of(output, seed) if output else _NO_FIELDS for output, seed in zip(outputs, asked, strict=True)]
    bad = "failed" if on_bad_row == "fail" else "skipped"
    statuses = [bad if job is None else _STATUS[state] for job, state in zip(jobs, said["state"], strict=True)]
    errors = list(map(_error, items, statuses, said["error_type"], said["error_message"]))
    plain: dict[str, Sequence[Any]] = {
        "row": [item.row for item in items],
        "cell": [item.cell for item in items],
        "job_key": [None if job is None else job.key for job in jobs],
        "status": statuses,
        **_by_name(INPUT_COLUMNS, map(_INPUT_VALUES, inputs)),
        # The seed reported by the endpoint, otherwise the requested one.
        "seed": [seed if one.seed is None else one.seed for one, seed in zip(fields, asked, strict=True)],
        "has_nsfw_concepts": [one.flags for one in fields],
        "timings_extra": [None if one.timings is None else list(map(_timing, one.timings)) for one in fields],
        "notes": [list(one.notes) or None for one in fields],
        **{name: said[name] for name in ("request_id", "attempts", "billable_units", "cost_usd", "engine")},
        "error_type": [error[0] for error in errors],
        "error_message": [error[1] for error in errors],
    }
    columns = {name: _array(values, OWN_SCHEMA.field(name).type) for name, values in plain.items()}
    columns["images"] = _images(list(map(_known_images, said["state"], said["images"], outputs)))
    inference = [one.inference for one in fields]
    columns["timings"] = _timings(inference, *(said[f"{name}_seconds"] for name in ("queue", "total", "download")))
    columns["submitted_at"] = _instants(said["submitted_at"])
    columns["completed_at"] = _instants(said["completed_at"])
    columns["target"] = pa.repeat(pa.scalar(target, pa.string()), len(items))
    return columns


def _by_name(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Return the columns by name."""
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (TypeError, ValueError, OverflowError):
        # Outputs are stored as received, and JSON integers are unbounded: a value that does not fit becomes null.
        return pa.array([_fitting(value, kind) for value in values], kind)


def _fitting(value: Any, kind: pa.DataType) -> Any:
    try:
        pa.scalar(value, kind)
    except (TypeError, ValueError, OverflowError):
        return None
    return value


def _error(item: Planned, status: str, word: str | None, message: str | None) -> tuple[str | None, str | None]:
    if item.problem is not None:
        return item.problem.type, item.problem.message
    if status == "unknown":
        return "unknown", message or _UNDECIDED
    return (word, message) if status == "failed" else (None, None)


def _timing(timing: tuple[str, float]) -> dict[str, str | float]:
    return {"name": timing[0], "seconds": timing[1]}


def _known_images(state: State, stored: bytes | None, output: JsonObject) -> bytes | None:
    """Return the stored images; for a failed job, those of its answer, which are paid for and still available."""
    if stored is None and output and state in _FAILED:
        return encode_images(images_of(output)) if has_images(output) else None
    return stored


def _timings(*seconds: Sequence[Json]) -> pa.Array:
    """Build the struct array from one sequence per field of `TIMINGS`; null if a job has none of them."""
    children = [_array(values, pa.float64()) for values in seconds]
    nothing = np.logical_and.reduce([child.is_null().to_numpy(zero_copy_only=False) for child in children])
    return pa.StructArray.from_arrays(children, fields=list(TIMINGS), mask=pa.array(nothing))


def _images(encoded: Sequence[bytes | None]) -> pa.Array:
    """Build one list per job with known images, null for other jobs."""
    lists = [() if images is None else orjson.loads(images) for images in encoded]
    said = _by_name([field.name for field in IMAGE], chain.from_iterable(lists))
    values = pa.StructArray.from_arrays([_array(said[field.name], field.type) for field in IMAGE], fields=list(IMAGE))
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(list(map(len, lists)), out=offsets[1:])
    missing = np.array([images is None for images in encoded], np.bool_)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(IMAGE), mask=pa.array(missing))


def _instants(seconds: Sequence[float | None]) -> pa.Array:
    exact = np.array(seconds, np.float64)  # None becomes NaN
    missing = np.isnan(exact)
    microseconds = np.rint(np.where(missing, 0.0, exact) * 1e6).astype(np.int64)
    return pa.array(microseconds, mask=missing).cast(_INSTANT)
