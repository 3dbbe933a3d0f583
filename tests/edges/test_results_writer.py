"""The results file: atomic replacement, and the same content in every reader."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from datetime import date
from pathlib import Path

import orjson
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batch.errors import StorageError
from batch.journal.database import JournalDatabase
from batch.journal.events import Accepted, Answered, Finished, Intended
from batch.journal.records import JobOutcome
from batch.journal.states import State
from batch.journal.transitions import encode_images
from batch.manifest.inputs import DEFAULTS
from batch.manifest.planner import Planned, PlannedBatch
from batch.results import writer as sink
from batch.results.schema import OWN_SCHEMA
from batch.results.writer import write_results
from batch.types import Answer, Job, JobKey, Problem, RequestId, StoredImage, Ticket

INPUT = {"prompt": "p", "seed": 7} | DEFAULTS


def key(row):
    return JobKey(f"{row:032x}")


def batch_of(first_row, frame, cells=1):
    items = [
        Planned(first_row + row, str(cell), Job(key(first_row + row), {**INPUT, "strength": 0.5, "seed": 1}), None)
        for row in range(len(frame))
        for cell in range(cells)
    ]
    return PlannedBatch(first_row, frame, items)


def frames(rows, size=100):
    for start in range(0, rows, size):
        numbers = list(range(start, min(start + size, rows)))
        yield start, pl.DataFrame({"image_url": [f"http://x/{n}" for n in numbers], "n": numbers})


def done(keys):
    images = encode_images([StoredImage("http://x/1.jpg", 64, 48, "image/jpeg")])
    output = orjson.dumps({"seed": 2**60, "timings": {"inference": 1.0, "load": 0.5}})
    return {k: JobOutcome(k, State.DONE, 1, RequestId("r"), 1.0, 2.0, output, images, cost_usd=0.5) for k in keys}


def write(path, batches, outcomes=done, **changes):
    batches = list(batches)
    schema = batches[0].frame.to_arrow().schema if batches else pa.schema([])
    options = {"manifest_schema": schema, "target": "local", "on_bad_row": "fail", "metadata": {"restyle": "{}"}}
    return write_results(path, batches, outcomes, **{**options, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.parquet"


# --- content ----------------------------------------------------------------------------------------------


def test_every_reader_reads_the_same(path):
    """Pyarrow, its dataset scanner and polars agree on rows, order and types."""
    totals = write(path, [batch_of(start, frame) for start, frame in frames(250)])
    assert (totals.rows, totals.done, totals.cost_usd) == (250, 250, 125.0)
    table = pq.read_table(path)
    assert table["row"].to_pylist() == list(range(250))
    assert table["n"].to_pylist() == list(range(250))
    assert table["seed"].to_pylist() == [2**60] * 250
    assert ds.dataset(path).to_table().equals(table)
    frame = pl.read_parquet(path)
    assert frame["image_url"].to_list() == table["image_url"].to_pylist()
    assert frame["images"][0].to_list()[0]["width"] == 64
    assert frame["timings"][7] == {"inference": 1.0, "queue": None, "total": None, "download": None}
    assert frame.schema["submitted_at"] == pl.Datetime("us", "UTC")


def test_totals_count_by_status_and_error(path):
    """The totals that the summary prints match the table."""
    states = [State.DONE, State.FAILED, State.UNKNOWN, State.INTENDED, State.ACCEPTED, State.PENDING]
    (_, frame), *_ = frames(8)
    batch = batch_of(0, frame)
    batch.items[6] = Planned(6, "", None, Problem(6, None, "image_url", "", "image_not_found", "m"))

    def outcomes(keys):
        known = {key(row): JobOutcome(key(row), state, 1, cost_usd=0.25) for row, state in enumerate(states)}
        known[key(1)] = JobOutcome(key(1), State.FAILED, 1, error_type="timeout", error_message="m")
        return {k: known[k] for k in keys if k in known}

    totals = write(path, [batch], outcomes)
    assert totals[:6] == (8, 1, 2, 2, 3, 0)
    assert totals.errors == Counter({"timeout": 1, "image_not_found": 1})
    assert totals.cost_usd == 1.25
    totals = write(path, [batch], outcomes, on_bad_row="skip")
    assert (totals.failed, totals.skipped, totals.errors) == (1, 1, Counter({"timeout": 1}))


def test_manifest_columns_keep_their_types_and_values(path):
    """Manifest columns of every type pass unchanged, including images in the struct that Hugging Face writes."""
    manifest = pa.table(
        {
            "image": pa.array(
                [{"bytes": b"\xff\xd8", "path": "a.jpg"}, None],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "small": pa.array([1, None], pa.int8()),
            "day": pa.array([date(2026, 1, 2), None]),
            "tags": pa.array([["a", None], []], pa.list_(pa.string())),
            "nested": pa.array(
                [{"a": {"b": [1.5]}}, None], pa.struct([("a", pa.struct([("b", pa.list_(pa.float32()))]))])
            ),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "nothing": pa.array([None, None], pa.string()),
        }
    )
    write(path, [batch_of(0, pl.from_arrow(manifest), cells=2)], manifest_schema=manifest.schema)
    table = pq.read_table(path).select(manifest.column_names)
    assert table.schema.field("kind").type.value_type in {pa.string(), pa.large_string()}
    for name in manifest.column_names:
        assert table[name].to_pylist() == [value for value in manifest[name].to_pylist() for _ in range(2)]
        if name != "kind":
            assert table.schema.field(name).type == manifest.schema.field(name).type


def test_columns_without_values_keep_their_types(path):
    """The schema does not depend on the outcomes."""
    write(path, [batch_of(start, frame) for start, frame in frames(3)], lambda _: {})
    schema = pq.read_schema(path)
    assert [schema.field(name).type for name in OWN_SCHEMA.names] == OWN_SCHEMA.types


def test_empty_plan_gives_an_empty_table(path):
    """A table without rows has all columns."""
    totals = write(path, [], manifest_schema=pa.schema([("a", pa.int8())]))
    assert totals.rows == 0
    assert pq.read_table(path).schema.names == ["a", *OWN_SCHEMA.names]


def test_metadata_is_in_the_file(path):
    """The Parquet metadata contains the given entries."""
    write(path, [batch_of(0, frame) for _, frame in frames(1)], metadata={"restyle": '{"run_seed": 7}'})
    assert pq.read_metadata(path).metadata[b"restyle"] == b'{"run_seed": 7}'


def test_small_batches_share_row_groups(path):
    """The size of row groups does not depend on the size of batches."""
    write(path, [batch_of(start, frame) for start, frame in frames(2500)], group_rows=1000)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1000, 1000, 500]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_rows_with_images_make_smaller_row_groups(path):
    """The memory of a row group is also limited in bytes, even if a sweep repeats a large row."""
    frame = pl.DataFrame({"image": [os.urandom(10_000) for _ in range(20)]})
    asked = []

    def outcomes(keys):
        asked.append(len(keys))
        return {}

    write(path, [batch_of(0, frame, cells=9)], outcomes, group_bytes=400_000, slice_bytes=100_000)
    assert sum(asked) == 180
    assert max(asked) <= 10
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups >= 4
    assert pq.read_table(path)["image"].to_pylist() == [value for value in frame["image"] for _ in range(9)]


def test_journal_and_plan_become_the_table(path, tmp_path):
    """Outcomes of a real journal appear in the table."""
    journal = JournalDatabase.open(tmp_path / "journal.db", now=0.0, version="")
    life = [
        Intended(key(1), 10.0, 1, b"{}", 0.03),
        Accepted(key(1), 11.0, Ticket(RequestId("r-1"))),
        Answered(key(1), 12.0, Answer({"seed": 5}, 1.0, "echo"), 0.03, 0.5, 2.0),
        Finished(key(1), 13.0, (StoredImage("http://x/1.jpg", sha256="ab"),)),
    ]
    journal.commit([life])
    write(path, [batch_of(start, frame) for start, frame in frames(3)], journal.outcomes)
    frame = pl.read_parquet(path)
    assert frame["status"].to_list() == ["pending", "done", "pending"]
    assert frame["engine"].to_list() == [None, "echo", None]
    assert frame["images"].to_list()[1][0]["sha256"] == "ab"
    journal.close()


# --- replacement and failures -----------------------------------------------------------------------------


def test_failure_leaves_the_old_file_and_nothing_else(path):
    """The old table stays unchanged until the new one is complete."""
    path.write_bytes(b"the old table")
    enabled = gc.isenabled()

    def broken(keys):
        raise RuntimeError("the journal disappeared")

    def planned():
        for start, frame in frames(300):
            if start:
                raise FileNotFoundError(errno.ENOENT, "manifest disappeared")
            yield batch_of(start, frame)

    schema = next(frames(1))[1].to_arrow().schema
    options = {"manifest_schema": schema, "target": "t", "metadata": {}}
    with pytest.raises(RuntimeError, match="journal disappeared"):
        write_results(path, [batch_of(*next(frames(5)))], broken, **options)
    with pytest.raises(FileNotFoundError, match="manifest"):  # not converted to a StorageError
        write_results(path, planned(), done, **options)
    assert path.read_bytes() == b"the old table"
    assert list(path.parent.iterdir()) == [path]
    assert gc.isenabled() is enabled


def test_new_file_replaces_the_old_one_atomically(path):
    """A reader that has the old file open continues to read the old content."""
    path.write_bytes(b"the old table")
    with path.open("rb") as reader:
        write(path, [batch_of(start, frame) for start, frame in frames(5)])
        assert reader.read() == b"the old table"
    assert pq.read_table(path).num_rows == 5
    assert list(path.parent.iterdir()) == [path]


def test_missing_folder_is_a_storage_error(tmp_path):
    """The message contains the path and the reason."""
    with pytest.raises(StorageError, match=r"gone/results.parquet could not be written .*No such file"):
        write(tmp_path / "gone" / "results.parquet", [batch_of(*next(frames(1)))])


_WRITES_TOO_MUCH = """
    import os, resource, signal, sys
    from pathlib import Path
    import polars as pl
    from batch.errors import StorageError
    from batch.manifest.inputs import DEFAULTS
    from batch.manifest.planner import Planned, PlannedBatch
    from batch.types import Job, JobKey
    from batch.results.writer import write_results

    path = Path(sys.argv[1])
    frame = pl.DataFrame({"noise": [os.urandom(1000) for _ in range(1000)]})
    items = [Planned(i, "", Job(JobKey(str(i)), {"prompt": "p", **DEFAULTS}), None) for i in range(1000)]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write_results(path, [PlannedBatch(0, frame, items)], lambda keys: {},
                      manifest_schema=frame.to_arrow().schema, target="t", metadata={})
    except StorageError as error:
        print(error)
        sys.exit(4)
"""


def test_full_disk_keeps_the_old_table(path):
    """Running out of space keeps the old table, removes the new one and advises what to do."""
    path.write_bytes(b"the old table")
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(_WRITES_TOO_MUCH), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 4, ended.stderr
    assert "could not be written (File too large)" in ended.stdout
    assert "restyle export" in ended.stdout
    assert ended.stderr == ""
    assert path.read_bytes() == b"the old table"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "health of the disk"),
        (errno.EACCES, "permis"),
    ],
)
def test_advice_depends_on_the_error(number, advice):
    """Each kind of disk error has its own advice."""
    error = sink._storage_error(Path("r.parquet"), OSError(number, os.strerror(number)))
    assert advice in str(error)
    assert os.strerror(number) in str(error)


_WITHOUT_PRIVILEGES = """
    import os, sys
    from pathlib import Path
    import pyarrow as pa
    from batch.errors import StorageError
    from batch.results.writer import write_results

    if os.getuid() == 0:
        os.setuid(65534)  # permissions do not bind root
    try:
        write_results(Path(sys.argv[1]), [], lambda keys: {}, manifest_schema=pa.schema([]), target="t", metadata={})
    except StorageError as error:
        print(error)
"""


def test_read_only_folder_is_a_storage_error():
    """The message advises to check the permissions; the old table stays."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "results.parquet"
        path.write_bytes(b"the old table")
        path.parent.chmod(0o555)
        command = [sys.executable, "-c", textwrap.dedent(_WITHOUT_PRIVILEGES), str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        path.parent.chmod(0o700)
        assert "check the permissions" in output
        assert path.read_bytes() == b"the old table"
