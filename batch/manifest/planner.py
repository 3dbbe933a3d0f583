"""Plan the jobs of a manifest: resolve every input, compute every key, send nothing. Pure except for polars types.

This module defines the meaning of columns and the precedence of values. It does not know the source of rows and images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import polars as pl

from batch.config import Settings
from batch.errors import ConfigError, ManifestError
from batch.manifest.formats.base import Dialect
from batch.manifest.hashing import derived_seed, job_key
from batch.manifest.inputs import DEFAULTS, check_column, check_value, shorten, surrogate_fault
from batch.manifest.prompts import Prompts, kind_of, placeholders, require_plain
from batch.manifest.sweep import Cell, cells
from batch.manifest.types import CellError, ImageResolver, Resolved, RowBatch, Rows
from batch.types import AppId, Job, Json, JsonObject, Problem

__all__ = ["Checked", "Planned", "PlannedBatch", "Planner", "dialect_of"]

_BATCH_JOBS = 4096
_BATCH_CHARACTERS = 2**24
"""Maximum total length of a batch's prompt templates: long templates make short batches."""
_NOTHING: JsonObject = {}
_NO_SYNC = CellError("sync_mode", "sync_mode is not supported: its results are not kept; leave the cell empty")


class Planned(NamedTuple):
    """One manifest row x cell: either a job, or the problem that prevents it."""

    row: int
    cell: str
    job: Job | None
    problem: Problem | None
    """The row's first problem, with the messages of all its problems."""
    known: JsonObject = _NOTHING
    """Inputs of a bad row: readable ones as they would have been sent, the others None."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Consecutive manifest rows and their planned items."""

    first_row: int
    frame: pl.DataFrame
    """The manifest's own columns, unchanged."""
    items: list[Planned]
    """`len(frame) * cells` items, ordered by row, then by cell."""


class Checked(NamedTuple):
    """A planned batch and its problems, one for each bad cell of the manifest."""

    batch: PlannedBatch
    problems: list[Problem]


class Planner:
    """Plans the jobs of one manifest. It can be iterated any number of times, always with the same result.

    Sources of an input's value, from lowest to highest precedence: the endpoint's default, `[input]`, the manifest
    column of the same name (unless the cell is empty), the sweep. A column of a swept input is therefore ignored.
    `manifest.prompt` is a column or a template over columns (`a {animal} as a wizard`, with literal braces doubled).
    `[input] prompt` and swept prompts are templates too. If a part of a template is missing, the row or cell uses
    `[input] prompt` instead. In typed formats an empty text is a valid prompt; only null is missing.

    Args:
        manifest: the rows.
        settings: resolved configuration; uses `manifest`, `input`, `sweep`, `target.app` and `run_seed`.
        images: resolves the cells of the image column.

    Raises:
        ManifestError: a column that the settings need is missing (the message names the nearest one) or has an
            unsuitable type.
        ConfigError: a template is malformed; a template of `[input]` or `[sweep]` names an unknown column (the message
            names the nearest one); a value there is out of bounds.
    """

    def __init__(self, manifest: Rows, settings: Settings, images: ImageResolver) -> None:
        self._manifest = manifest
        self._images = images
        self._app: AppId = settings.target.app
        self._run_seed = settings.run_seed
        self.cells = cells(settings.sweep)
        swept = set(settings.sweep)
        schema = manifest.schema
        self._image = _image_column(schema, settings.manifest.image)
        self._prompts = Prompts(
            schema,
            setting=settings.manifest.prompt,
            default=settings.input.prompt,
            swept=[str(cell.values["prompt"]) for cell in self.cells] if "prompt" in swept else None,
        )
        self._prompt_name = settings.manifest.prompt
        self._base = DEFAULTS | _given(settings)
        if self._prompts.for_all is not None:
            self._base["prompt"] = self._prompts.for_all
        self._id = _id_column(schema, settings.manifest.id)
        mapped = {"image_url", "prompt"}
        self._columns = tuple(name for name in DEFAULTS if name in schema and name not in swept | mapped)

    def __repr__(self) -> str:
        return f"Planner({self._manifest!r}, cells={len(self.cells)})"

    def batches(self) -> Iterator[PlannedBatch]:
        """Yield the plan in manifest order, a few thousand jobs at a time.

        Raises:
            ManifestError: the manifest can no longer be read.
        """
        for checked in self.checked():
            yield checked.batch

    def checked(self) -> Iterator[Checked]:
        """Yield the same batches with each problem separately (a `Planned` combines those of its row).

        Raises:
            ManifestError: the manifest can no longer be read.
        """
        jobs = min(_BATCH_JOBS, _BATCH_CHARACTERS // max(1, self._prompts.longest))
        for rows in self._manifest.batches(max(1, jobs // len(self.cells))):
            yield self._batch(rows)

    def _batch(self, rows: RowBatch) -> Checked:
        first_row, frame, found = rows.first_row, rows.frame, _Problems(rows)
        for index, (column, text) in rows.surrogates.items():
            found.add(index, column, text, surrogate_fault(column, text))
        broken = {index for index, surrogate in rows.surrogates.items() if surrogate.column in self._prompts.columns}
        images = self._resolved(frame, found)
        inputs: dict[str, list[Any]] = {"image_url": [image and image.token for image in images]}
        gaps: set[int] = set()

        def note(index: int, column: str, value: object, fault: CellError) -> Problem:
            gaps.add(index)
            return found.add(index, column, value, fault)

        prompts = self._prompts.of_rows(frame, note)
        if prompts is not None:
            checked = self._checked("prompt", self._prompt_name, prompts, found)
            missing = gaps | broken
            inputs["prompt"] = [None if i in missing else p for i, p in enumerate(checked)] if missing else checked
        for name in self._columns:
            inputs[name] = self._values(name, _cells_of(frame[name], name), found)
        identities = self._identities(frame, found)

        items: list[Planned] = []
        bad = found.by_row()
        swept, unswept = self._swept_prompts(frame, found), (None,) * len(self.cells)
        by_row = zip(*inputs.values(), strict=True)
        for row, (image, identity, values) in enumerate(zip(images, identities, by_row, strict=True), first_row):
            given = {**self._base, **dict(zip(inputs, values, strict=False))}  # equal lengths; strict costs time
            own = unswept if swept is None else [prompts[row - first_row] for prompts in swept]
            if image is None or row in bad:
                items += self._bad(row, bad[row], given, identity, image, own)
                continue
            for cell, prompt in zip(self.cells, own, strict=True):
                if isinstance(prompt, Problem):
                    items += self._bad(row, [prompt], given, identity, image, [prompt], cells=(cell,))
                else:
                    items.append(Planned(row, cell.id, self._job(given, cell, prompt, identity, image), None))
        return Checked(PlannedBatch(first_row, frame, items), found.ordered())

    def _job(self, given: JsonObject, cell: Cell, prompt: str | None, identity: str | None, image: Resolved) -> Job:
        """Return the row's job in a cell; `prompt` is the cell's prompt if prompts are swept, else None."""
        complete = given | cell.values if cell.values else given
        if prompt is not None:
            complete["prompt"] = prompt
        if complete["seed"] is None:
            complete["seed"] = self._derived(cell, identity, image.token, complete["prompt"])
        return Job(job_key(self._app, complete), complete, image.image, image.megapixels)

    def _derived(self, cell: Cell, identity: str | None, token: str, prompt: Json) -> int:
        """Return the seed of a row without one. Without an id, image and prompt identify the row."""
        who = f"id\n{identity}" if identity is not None else f"row\n{token}\n{prompt}"
        return derived_seed(self._run_seed, who, cell.id)

    def _bad(
        self,
        row: int,
        problems: list[Problem],
        given: JsonObject,
        identity: str | None,
        image: Resolved | None,
        prompts: Sequence[str | Problem | None],
        cells: Sequence[Cell] | None = None,
    ) -> Iterator[Planned]:
        """Yield a bad row's items, one per cell, with the readable inputs; `prompts` has one value per cell."""
        problem, columns = _combined(problems), {problem.column for problem in problems}
        for cell, prompt in zip(self.cells if cells is None else cells, prompts, strict=True):
            known = given | cell.values
            if "prompt" in cell.values:
                known["prompt"] = prompt if isinstance(prompt, str) else None
            has_identity = image is not None and known.get("prompt") is not None if self._id is None else identity
            if known["seed"] is None and has_identity and not columns & {"seed", self._id}:
                token = "" if image is None else image.token
                known["seed"] = self._derived(cell, identity, token, known.get("prompt"))
            yield Planned(row, cell.id, None, problem, known)

    def _swept_prompts(self, frame: pl.DataFrame, found: _Problems) -> list[list[str | Problem]] | None:
        """Return each cell's prompts or problems, one per row; None if prompts are not swept."""
        cells_prompts = self._prompts.of_cells(frame, found.add)
        if cells_prompts is None:
            return None
        for prompts in {id(prompts): prompts for prompts in cells_prompts}.values():
            texts = ["" if isinstance(prompt, Problem) else prompt for prompt in prompts]
            _, faults = check_column("prompt", texts, self._prompt_name)
            for index, fault in faults.items():
                prompts[index] = found.add(index, self._prompt_name, texts[index], fault)
        return cells_prompts

    # --- columns: one value per row, None where a problem was added ---

    def _resolved(self, frame: pl.DataFrame, found: _Problems) -> list[Resolved | None]:
        references = frame[self._image].to_list()
        answers = self._images.resolve(references)
        for index, answer in enumerate(answers):
            if isinstance(answer, CellError):
                found.add(index, self._image, references[index], answer)
        return [None if isinstance(answer, CellError) else answer for answer in answers]

    def _values(self, name: str, cells_of_column: list[Any], found: _Problems) -> list[Any]:
        fallback = self._base[name]
        filled = [fallback if value is None or value == "" else value for value in cells_of_column]
        checked = self._checked(name, name, filled, found)
        if name == "sync_mode":
            for index in (index for index, value in enumerate(checked) if value):
                found.add(index, name, filled[index], _NO_SYNC)
        return checked

    def _checked(self, name: str, column: str, values: list[Any], found: _Problems) -> list[Any]:
        checked, faults = check_column(name, values, column)
        for index, fault in faults.items():
            found.add(index, column, values[index], fault)
        return checked

    def _identities(self, frame: pl.DataFrame, found: _Problems) -> list[str | None]:
        if self._id is None:
            return [None] * len(frame)
        identities: list[str | None] = frame[self._id].cast(pl.String).to_list()
        for index in (index for index, identity in enumerate(identities) if not identity):
            found.add(index, self._id, None, CellError("missing", "the cell is empty; every row needs an id"))
        return identities


class _Problems:
    """The problems of one batch."""

    def __init__(self, rows: RowBatch) -> None:
        self._rows = rows
        self._found: dict[int, list[Problem]] = {}

    def add(self, index: int, column: str, value: object, fault: CellError) -> Problem:
        line = self._rows.lines[index] if self._rows.lines is not None else None
        shown = shorten(value).encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be printed
        problem = Problem(self._rows.first_row + index, line, column, shown, fault.type, fault.message)
        self._found.setdefault(index, []).append(problem)
        return problem

    def by_row(self) -> dict[int, list[Problem]]:
        """Return the problems of each bad row by row number."""
        return {problems[0].row: problems for problems in self._found.values()}

    def ordered(self) -> list[Problem]:
        return [problem for index in sorted(self._found) for problem in self._found[index]]


def _combined(problems: list[Problem]) -> Problem:
    """Combine the problems of one row under the type of the first; each column appears once."""
    first_of = {problem.column: problem.message for problem in reversed(problems)}
    messages = [first_of[column] for column in dict.fromkeys(problem.column for problem in problems)]
    return replace(problems[0], message=". ".join(messages)) if len(messages) > 1 else problems[0]


def _cells_of(column: pl.Series, name: str) -> list[Any]:
    """Return the values of an input's column; booleans become text where a number belongs: pydantic reads true as 1."""
    is_number = column.dtype == pl.Boolean and not isinstance(DEFAULTS[name], bool)
    return (column.cast(pl.String) if is_number else column).to_list()


# --- columns that the settings name -----------------------------------------------------------------------


def dialect_of(settings: Settings) -> Dialect:
    """Return how the settings describe the manifest's format, and the columns that they need."""
    mapped = settings.manifest
    parts = placeholders(mapped.prompt)
    named = {mapped.image, mapped.prompt, *parts} | ({mapped.id} if mapped.id else set())
    return Dialect(mapped.separator, mapped.encoding, frozenset(named), mapped.format, mapped.image)


def _given(settings: Settings) -> JsonObject:
    values: JsonObject = {}
    for name, value in settings.input.model_dump(exclude_none=True).items():
        checked = check_value(name, value)
        if isinstance(checked, CellError):
            raise ConfigError(f"input.{checked.message}")
        values[name] = checked
    return values


def _image_column(schema: pl.Schema, name: str) -> str:
    kind = kind_of(schema, name, "manifest.image")
    fields = {field.name for field in kind.fields} if isinstance(kind, pl.Struct) else set()
    text = kind in {pl.String, pl.Binary, pl.Null} or isinstance(kind, pl.Categorical | pl.Enum)
    if not text and not fields & {"bytes", "path"}:
        raise ManifestError(
            f"the column {name!r} holds {kind}, not images; set manifest.image to one with URLs, paths, "
            "or a struct of bytes and path"
        )
    return name


def _id_column(schema: pl.Schema, name: str | None) -> str | None:
    if name is not None:
        require_plain(schema, name, "manifest.id")
    return name
