"""The writer of `results.parquet`: written to a temporary name, fsynced, renamed. An edge.

Owns row groups, compression and the atomic replacement of the file. `schema` knows what a column means; the caller
supplies the outcomes, batch by batch.
"""

from __future__ import annotations

import errno
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.errors import StorageError
from batch.journal.records import JobOutcome
from batch.manifest.planner import PlannedBatch
from batch.results.schema import OnBadRow, record_batch, results_schema
from batch.results.totals import Totals
from batch.system.durable import replacing
from batch.types import JobKey

__all__ = ["write_results"]

_GROUP_ROWS = 16_384
"""Two groups are in memory at once: groups of four times the size took 80 MB more and made the file 8% smaller."""
_GROUP_BYTES = 64 * 2**20
"""In memory, before compression: embedded images fill a row group with few rows."""
_SLICE_ROWS = 8_192
_SLICE_BYTES = 32 * 2**20


def write_results(
    path: Path,
    batches: Iterable[PlannedBatch],
    outcomes: Callable[[Sequence[JobKey]], Mapping[JobKey, JobOutcome]],
    *,
    manifest_schema: pa.Schema,
    target: str,
    on_bad_row: OnBadRow = "fail",
    metadata: Mapping[str, str],
    group_rows: int = _GROUP_ROWS,
    group_bytes: int = _GROUP_BYTES,
    slice_bytes: int = _SLICE_BYTES,
) -> Totals:
    """Write the results table. The old file stays unchanged until the new one is complete and on disk.

    Args:
        path: the output file.
        batches: planned rows in manifest order.
        outcomes: returns the known outcomes of a few thousand keys.
        manifest_schema: types of the manifest's columns.
        target: the value of the column `target`.
        on_bad_row: whether the status of an invalid row is failed or skipped.
        metadata: key-value metadata of the file.
        group_rows: of a row group, about.
        group_bytes: of a row group in memory, about.
        slice_bytes: in memory, of the rows that become results at once.

    Raises:
        StorageError: the disk refused; the old file is unchanged.
    """
    schema = results_schema(manifest_schema).with_metadata(dict(metadata))
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    cost, flagged = 0.0, 0
    examples: dict[str, tuple[int, str]] = {}
    with _collector_paused(), _appearing(path, schema) as write, _one_behind(write) as put:
        parts = (part for batch in batches for part in _slices(batch, slice_bytes))
        tables = _tables(parts, outcomes, schema, target, on_bad_row)
        for group in _row_groups(tables, group_rows, group_bytes):
            put(group)
            statuses += _tally(group["status"])
            failed = group.filter(pc.equal(group["status"], "failed"))
            errors += _tally(failed["error_type"])
            _add_examples(examples, failed)
            flagged += pc.sum(pc.list_flatten(group["has_nsfw_concepts"])).as_py() or 0
            cost += pc.sum(group["cost_usd"]).as_py() or 0.0
    return Totals(
        rows=statuses.total(),
        done=statuses["done"],
        failed=statuses["failed"],
        unknown=statuses["unknown"],
        pending=statuses["pending"],
        skipped=statuses["skipped"],
        errors=errors,
        cost_usd=cost,
        flagged=flagged,
        examples=examples,
    )


def _tables(
    parts: Iterable[PlannedBatch],
    outcomes: Callable[[Sequence[JobKey]], Mapping[JobKey, JobOutcome]],
    schema: pa.Schema,
    target: str,
    on_bad_row: OnBadRow,
) -> Iterator[pa.Table]:
    for part in parts:
        known = outcomes([item.job.key for item in part.items if item.job is not None])
        yield record_batch(part, known, schema=schema, target=target, on_bad_row=on_bad_row)


def _slices(batch: PlannedBatch, slice_bytes: int) -> Iterator[PlannedBatch]:
    """Yield parts of a batch that need little memory: a sweep repeats each row, and a row may contain its image."""
    row_bytes = max(1, int(batch.frame.estimated_size()) // max(1, len(batch.frame)))
    step = max(1, min(_SLICE_ROWS, slice_bytes // row_bytes))
    for start in range(0, len(batch.items), step):
        yield PlannedBatch(batch.first_row, batch.frame, batch.items[start : start + step])


def _row_groups(tables: Iterable[pa.Table], group_rows: int, group_bytes: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        waiting.append(table)
        rows, size = rows + len(table), size + table.nbytes
        if rows >= group_rows or size >= group_bytes:
            yield pa.concat_tables(waiting)
            waiting.clear()
            rows = size = 0
    if waiting:
        yield pa.concat_tables(waiting)


@contextmanager
def _one_behind(write: Callable[[pa.Table], None]) -> Iterator[Callable[[pa.Table], None]]:
    """Write in a thread while the next row group is built: compression releases the GIL."""
    with ThreadPoolExecutor(1, "restyle results") as thread:
        under_way: list[Future[None]] = []

        def put(table: pa.Table) -> None:
            if under_way:
                under_way.pop().result()
            try:
                under_way.append(thread.submit(write, table))
            except RuntimeError:  # the main thread has ended, so executors refuse work; this thread still runs
                write(table)

        yield put
        for last in under_way:
            last.result()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Disable the garbage collector: scanning millions of acyclic values took a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tally(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()})


def _add_examples(examples: dict[str, tuple[int, str]], failed: pa.Table) -> None:
    """Add the first row of each new error type."""
    if not len(failed):
        return
    firsts = failed.select(["error_type", "row", "error_message"]).group_by("error_type", use_threads=False)
    for row in firsts.aggregate([("row", "first"), ("error_message", "first")]).to_pylist():
        examples.setdefault(row["error_type"] or "", (row["row_first"], row["error_message_first"] or ""))


@contextmanager
def _appearing(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Write row groups to a temporary file next to `path`; rename it on success, otherwise remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # `restyle export` may write it at the same time
    with ExitStack() as stack:
        with _refusals(path):
            file = stack.enter_context(replacing(path, temporary))
            writer = pq.ParquetWriter(file, schema, compression="zstd")

        def write(table: pa.Table) -> None:
            with _refusals(path):
                writer.write_table(table, row_group_size=len(table))

        try:
            yield write
            with _refusals(path):
                writer.close()
        except BaseException:
            with suppress(OSError):
                writer.close()
            raise
        with _refusals(path):
            stack.close()


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Translate errors of the disk. Errors of the manifest's reader, which runs between row groups, stay unchanged."""
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error) from error


_ADVICE = {
    errno.ENOSPC: "free some space, then run `restyle export` (free)",
    errno.EDQUOT: "free some space, then run `restyle export` (free)",
    errno.EROFS: "the file system is read-only; use another path with `restyle export -o FILE`",
    errno.EACCES: "check the permissions of the folder, or use another path with `restyle export -o FILE`",
    errno.EIO: "I/O error; check the health of the disk, then run `restyle export` (free)",
}


def _storage_error(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "use another path with `restyle export -o FILE`")
    return StorageError(f"{path} could not be written ({reason}): {advice}. The journal is complete.")
