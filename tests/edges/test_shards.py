"""Tables of many Parquet files: missing columns, differing types, partition columns."""

import os
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch.errors import ManifestError
from batch.manifest.reader import Manifest


def rows_of(manifest: Manifest, size: int = 4096) -> list[dict]:
    return [row for batch in manifest.batches(size) for row in batch.frame.to_dicts()]


@pytest.fixture
def put(tmp_path):
    """Return a function that writes one Parquet file below `data` and returns that folder."""

    def _put(name: str, columns: dict | pa.Table | bytes):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(columns, bytes):
            path.write_bytes(columns)
        else:
            pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
        return tmp_path / "data"

    return _put


def refusal(source) -> str:
    """Return the error of opening or reading a manifest."""
    with pytest.raises(ManifestError) as raised:
        list(Manifest.open(source).batches())
    return str(raised.value)


# --- columns that are not in every file ---


def test_a_column_that_a_file_lacks_is_null_there(put) -> None:
    """Columns have the order of their first occurrence; a note says how many files have one."""
    put("0.parquet", {"a": ["x", "y"], "sim": [0.5, 0.6]})
    put("1.parquet", {"late": [True], "a": ["z"]})
    folder = put("2.parquet", {"a": ["w"], "sim": [0.7]})
    for source in (folder, folder / "*.parquet"):
        manifest = Manifest.open(source)
        assert manifest.columns == ("a", "sim", "late")
        for size in (1, 3, 4096):
            assert rows_of(manifest, size) == [
                {"a": "x", "sim": 0.5, "late": None},
                {"a": "y", "sim": 0.6, "late": None},
                {"a": "z", "sim": None, "late": True},
                {"a": "w", "sim": 0.7, "late": None},
            ]
        assert all(batch.frame.schema == manifest.schema for batch in manifest.batches(1))
        assert manifest.notes == (
            "column 'late' is in 1 of 3 files, null in the others (first: 0.parquet)",
            "column 'sim' is in 2 of 3 files, null in the others (first: 1.parquet)",
        )


def test_many_columns_that_are_not_in_every_file_are_counted(put) -> None:
    """Three are named, the others counted."""
    put("0.parquet", {"a": [1]})
    folder = put("1.parquet", {"a": [1]} | {f"c{i}": [1] for i in range(10)})
    *named, rest = Manifest.open(folder).notes
    assert len(named) == 3
    assert rest == "7 more columns are not in every file"


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PATH = pa.struct([("path", pa.large_string())])
TEXT = ["x", None]
JOINED = [
    # two arrays, the joined values, and the polars type
    (pa.array([1], pa.int32()), pa.array([2**40]), [1, 2**40], pl.Int64),
    (pa.array([1], pa.uint8()), pa.array([-1], pa.int16()), [1, -1], pl.Int16),
    (pa.array([1], pa.uint64()), pa.array([-1]), [1, -1], pl.Int64),
    (pa.array([2**53]), pa.array([0.5]), [2.0**53, 0.5], pl.Float64),
    (pa.array([7], pa.int32()), pa.array([0.5], pa.float32()), [7.0, 0.5], pl.Float64),
    (pa.array([Decimal("0.75")]), pa.array([0.5], pa.float32()), [0.75, 0.5], pl.Float64),
    (pa.array(TEXT), pa.array(TEXT, pa.large_string()), TEXT * 2, pl.String),
    (pa.array(TEXT).dictionary_encode(), pa.array(["y"]), [*TEXT, "y"], pl.String),
    (pa.array(TEXT).dictionary_encode(), pa.array(["y"]).dictionary_encode(), [*TEXT, "y"], pl.Categorical),
    (pa.array(["x"]), pa.array(["y"], pa.dictionary(pa.int8(), pa.large_string())), ["x", "y"], pl.String),
    (pa.nulls(2), pa.array(["y"]), [None, None, "y"], pl.String),
    (pa.nulls(1), pa.array([{"path": "p", "bytes": b"b"}], IMAGE), [None, {"path": "p", "bytes": b"b"}], None),
    (pa.array([b"x"]), pa.array([b"y"], pa.large_binary()), [b"x", b"y"], pl.Binary),
    (pa.array([[1]], pa.list_(pa.int32())), pa.array([[0.5]], pa.large_list(pa.float64())), [[1.0], [0.5]], None),
    (pa.array([[]], pa.list_(pa.null())), pa.array([["y"]]), [[], ["y"]], None),
    (
        pa.array([{"bytes": b"b", "path": "p"}], IMAGE),
        pa.array([{"path": "q"}], PATH),
        [{"bytes": b"b", "path": "p"}, {"bytes": None, "path": "q"}],
        None,
    ),
    (pa.array([date(2024, 1, 1)]), pa.nulls(1), [date(2024, 1, 1), None], pl.Date),
]


@pytest.mark.parametrize(("left", "right", "values", "kind"), JOINED, ids=[f"{a.type}+{b.type}" for a, b, *_ in JOINED])
@pytest.mark.parametrize("turned", [False, True])
def test_types_that_differ_are_joined(put, left, right, values, kind, turned) -> None:
    """The order does not matter; no value changes, except that integers may become equal floats."""
    first, second = (right, left) if turned else (left, right)
    put("0.parquet", {"a": first})
    folder = put("1.parquet", {"a": second})
    manifest = Manifest.open(folder)
    expected = values[len(left) :] + values[: len(left)] if turned else values
    for size in (1, 4096):
        assert [row["a"] for row in rows_of(manifest, size)] == expected
    if kind is not None:
        assert manifest.schema["a"] == kind
    assert all(batch.frame.schema == manifest.schema for batch in manifest.batches())


APART = [
    (pa.array([1]), pa.array(["x"]), "int64", "string"),
    (pa.array(["x"]), pa.array([b"x"]), "string", "binary"),
    (pa.array([True]), pa.array([1]), "bool", "int64"),
    (pa.array([1]), pa.array([[1]]), "int64", "list<element: int64>"),
    (pa.array([date(2024, 1, 1)]), pa.array(["2024-01-01"]), "date32[day]", "string"),
    (pa.array(["p"]), pa.array([{"path": "p"}]), "string", "struct<path: string>"),
    (pa.array([{"path": "p"}]), pa.array([{"path": 1}]), "struct<path: string>", "struct<path: int64>"),
]


@pytest.mark.parametrize(("left", "right", "one", "other"), APART, ids=[f"{row[2]}+{row[3]}" for row in APART])
def test_types_that_cannot_be_joined_are_named_with_their_files(put, left, right, one, other) -> None:
    """The message has both files, both types and the column, but not an earlier file with an all-null column."""
    put("0.parquet", {"a": pa.nulls(1), "b": [1]})
    put("1.parquet", {"a": left, "b": [1]})
    put("2.parquet", {"a": left, "b": [1]})
    folder = put("3.parquet", {"a": right, "b": [1]})
    said = refusal(folder)
    assert f"the column 'a' is {one} in {folder / '1.parquet'} and {other} in {folder / '3.parquet'}" in said
    assert "0.parquet" not in said


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5])),
        (pa.array([2**63], pa.uint64()), pa.array([-1])),
    ],
    ids=["beyond 2^53", "beyond 63 bits"],
)
def test_a_number_that_the_joint_type_would_change_is_refused(put, left, right) -> None:
    """A changed seed would be paid for."""
    put("0.parquet", {"seed": left})
    folder = put("1.parquet", {"seed": right})
    said = refusal(folder)
    assert f"{folder / '0.parquet'}: the column 'seed' is {left.type} here" in said


def test_categories_of_many_files_keep_their_values(put) -> None:
    """Each file has its own dictionary."""
    for number in range(5):
        folder = put(f"{number}.parquet", {"a": pa.array([f"x{number}", "same"]).dictionary_encode()})
    manifest = Manifest.open(folder)
    assert [row["a"] for row in rows_of(manifest)] == [text for n in range(5) for text in (f"x{n}", "same")]


# --- many files ---


def test_small_files_are_read_together(put) -> None:
    """One batch per file would be slow for thousands of files; no batch exceeds the requested size."""
    for number in range(20):
        folder = put(f"{number:02d}.parquet", {"n": [number * 3, number * 3 + 1, number * 3 + 2]})
    manifest = Manifest.open(folder)
    assert [len(batch.frame) for batch in manifest.batches()] == [60]
    assert [len(batch.frame) for batch in manifest.batches(25)] == [25, 25, 10]
    assert [row["n"] for row in rows_of(manifest, 7)] == list(range(60))
    assert [len(batch.frame) for batch in Manifest.open(folder, rows=31).batches(25)] == [25, 6]


def test_long_rows_of_parquet_come_a_few_at_a_time(put) -> None:
    """Batches are limited by bytes, as for text: 60 rows of 1 MiB are at least two batches."""
    folder = put("m.parquet", {"a": [f"{n:02d}" + "x" * 2**20 for n in range(60)]})
    sizes = [len(batch.frame) for batch in Manifest.open(folder / "m.parquet").batches()]
    assert sum(sizes) == 60
    assert max(sizes) <= 33


FEW_DESCRIPTORS = """
import resource, sys
from batch.manifest.reader import Manifest
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
manifest = Manifest.open(sys.argv[1])
print(sum(len(batch.frame) for batch in manifest.batches()), manifest.fingerprint() == manifest.fingerprint())
"""


def test_ten_thousand_files_need_no_more_descriptors_than_one(put) -> None:
    """Files are opened one at a time."""
    folder = put("00000.parquet", {"a": ["x"]})
    data = (folder / "00000.parquet").read_bytes()
    for number in range(1, 10_000):
        (folder / f"{number:05d}.parquet").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["10000", "True"], done.stderr


def test_every_unreadable_file_is_named(put) -> None:
    """One message names an empty file and one that is not Parquet, so that both can be fixed at once."""
    for number in range(20):
        folder = put(f"{number:02d}.parquet", {"a": [number]})
    put("07.parquet", b"")
    said = refusal(folder)
    assert said.startswith(f"{folder / '07.parquet'} cannot be read: Parquet file size is 0 bytes")
    put("11.parquet", b"image_url,prompt\n")
    said = refusal(folder)
    assert f"{folder / '07.parquet'} cannot be read" in said
    assert f"1 more cannot be read either: {folder / '11.parquet'}" in said


@pytest.mark.parametrize(
    "name",
    [
        "_SUCCESS",
        "_committed_123",
        ".part-0.parquet.crc",
        "_metadata.parquet",
        ".hidden.parquet",
        "_temporary/0/part-0.parquet",
        ".ipynb_checkpoints/part-0.parquet",
        "a=1/_temporary/part-0.parquet",
        "README.md",
    ],
)
def test_auxiliary_files_of_spark_are_ignored(put, name) -> None:
    """These are hidden names, names that begin with an underscore, and everything below such folders."""
    put(name, b"not Parquet")
    folder = put("a=1/part-0.parquet", {"x": [1]})
    assert rows_of(Manifest.open(folder)) == [{"x": 1, "a": 1}]
    assert len(Manifest.open(folder / "**" / "*.parquet").files) == 1


# --- partition columns ---


def test_folders_give_columns(put) -> None:
    """Nested, decoded, after the files' columns; null without a value. A note names them."""
    put("country=de/day=2024-05-01/p.parquet", {"x": [1, 2]})
    put("country=a%20b%2Fc/day=2024-05-02/p.parquet", {"x": [3]})
    folder = put("country=__HIVE_DEFAULT_PARTITION__/day=2024-05-03/p.parquet", {"x": [4]})
    for source in (folder, folder / "*" / "*" / "*.parquet", folder / "**" / "*.parquet", folder / "c*" / "d*" / "p*"):
        manifest = Manifest.open(source)
        assert manifest.columns == ("x", "country", "day")
        assert dict(manifest.schema) == {"x": pl.Int64, "country": pl.String, "day": pl.Date}
        assert sorted(tuple(row.values()) for row in rows_of(manifest, 1)) == sorted(
            [
                (1, "de", date(2024, 5, 1)),
                (2, "de", date(2024, 5, 1)),
                (3, "a b/c", date(2024, 5, 2)),
                (4, None, date(2024, 5, 3)),
            ]
        )
        assert manifest.notes == ("columns from the names of folders: 'country', 'day'",)


def test_files_at_other_depths_have_null_for_missing_folders(put) -> None:
    """Other folders in between are ignored, as is the folder of the table itself."""
    put("a=1/x/b=2/p.parquet", {"n": [1]})
    put("a=3/p.parquet", {"n": [2]})
    put("_c=4/p.parquet", {"n": [3]})
    folder = put("z.parquet", {"n": [4]})
    rows = rows_of(Manifest.open(folder))
    assert sorted(tuple(row[name] for name in ("n", "a", "b", "_c")) for row in rows) == [
        (1, 1, 2, None),
        (2, 3, None, None),
        (3, None, None, 4),
        (4, None, None, None),
    ]
    assert Manifest.open(folder / "a=1").columns == ("n", "b")
    assert Manifest.open(folder / "a=3" / "p.parquet").columns == ("n",)


NAMES = [
    ["1", "2"],
    ["01", "02", "-5"],
    ["1", "x"],
    ["1.5", "2"],
    ["0.10", "1e3"],
    ["true", "false"],
    ["true", "1"],
    ["2024-01-01", "2024-12-31"],
    ["2024-01-01 10:00:00"],
    ["2024-01-01", "x"],
    ["1", None],
    [None],
    ["1_000"],
    [" 1"],
    ["+5"],
    ["nan"],
    ["null", "1"],
    ["a b", "é/ü"],
    ["9223372036854775807", "-9223372036854775808"],
]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_types_of_folders_are_those_that_polars_infers(put, names) -> None:
    """The test compares with polars."""
    for name in names:
        spelled = "__HIVE_DEFAULT_PARTITION__" if name is None else name.replace(" ", "%20").replace("/", "%2F")
        folder = put(f"k={spelled.replace(':', '%3A')}/p.parquet", {"x": [1]})
    theirs = pl.scan_parquet(folder, hive_partitioning=True).collect()
    manifest = Manifest.open(folder)
    (batch,) = manifest.batches()
    assert manifest.schema["k"] == theirs.schema["k"]
    assert batch.frame["k"].sort().to_list() == theirs["k"].sort().to_list()


def test_values_that_no_type_can_hold_are_text(put) -> None:
    """For these, polars would use 128 bits, which Parquet results cannot store, or infinity or null."""
    for name in ("99999999999999999999", "1e999", "a=b"):
        folder = put(f"k={name}/p.parquet", {"x": [1]})
    assert {row["k"] for row in rows_of(Manifest.open(folder))} == {"99999999999999999999", "1e999", "a=b"}
    folder = put("when=2023-02-31/p.parquet", {"x": [1]})
    assert Manifest.open(folder).schema["when"] == pl.String


OWNED = [
    # the file's own column, folder value, joined value and type
    (pa.array([1], pa.int32()), "1", 1, pl.Int64),
    (pa.array(["01"]), "01", "01", pl.String),
    (pa.array(["de"]).dictionary_encode(), "de", "de", pl.String),
    (pa.array([date(2024, 1, 1)]), "2024-01-01", date(2024, 1, 1), pl.Date),
    (pa.array([0.5]), "0.5", 0.5, pl.Float64),
    (pa.array([2.0]), "2", 2.0, pl.Float64),
    (pa.nulls(1, pa.int64()), "__HIVE_DEFAULT_PARTITION__", None, pl.Int64),
]


@pytest.mark.parametrize(("own", "name", "value", "kind"), OWNED, ids=[f"{row[0].type}-{row[1]}" for row in OWNED])
def test_a_file_may_repeat_the_value_of_its_folder(put, own, name, value, kind) -> None:
    """The column keeps its position in the file; a file without it gets the folder's value."""
    put(f"a={name}/p.parquet", {"a": own, "x": [1]})
    folder = put(f"a={name}/q.parquet", {"x": [2]})
    manifest = Manifest.open(folder)
    assert manifest.schema["a"] == kind
    assert rows_of(manifest) == [{"a": value, "x": 1}, {"a": value, "x": 2}]
    assert not any("names of folders" in note for note in manifest.notes)


@pytest.mark.parametrize(
    ("own", "name", "words"),
    [
        (pa.array([1, 2]), "1", ["a=1/p.parquet: the column 'a' holds 2 and the folder says 1"]),
        (pa.array(["x", None]), "x", ["the column 'a' holds None and the folder says 'x'"]),
        (pa.array([3]), "__HIVE_DEFAULT_PARTITION__", ["the column 'a' holds 3 and the folder says None"]),
        (pa.array([1]), "x", ["the column 'a' is int64 in", "a folder is named a=x"]),
        (pa.array([[1]]), "1", ["the column 'a' is list<element: int64> in", "a folder is named a=1"]),
    ],
)
def test_a_file_that_contradicts_its_folder_is_refused(put, own, name, words) -> None:
    """Spark and polars silently use the folder's value, although either may be correct."""
    folder = put(f"a={name}/p.parquet", {"a": own})
    said = refusal(folder)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "words"),
    [("a=1/a=2/p.parquet", ["the folders give the column 'a' twice"]), ("a=%FF/p.parquet", ["a=%FF", "not UTF-8"])],
)
def test_folders_that_cannot_be_read_as_columns_are_refused(put, name, words) -> None:
    """The message names the file."""
    said = refusal(put(name, {"x": [1]}))
    for word in [name, *words]:
        assert word in said


def test_a_folder_name_that_is_not_utf8_is_refused(put, tmp_path) -> None:
    """A table cannot hold such a name."""
    folder = put("a=1/p.parquet", {"x": [1]})
    (folder / "a=1").rename(os.fsdecode(os.fsencode(folder) + b"/a=\xff"))
    assert "is not UTF-8" in refusal(folder)


def test_the_fingerprint_depends_on_partition_folders(put) -> None:
    """A file in another partition gives other rows; other folders have no influence."""
    folder = put("a=1/p.parquet", {"x": [1]})
    before = Manifest.open(folder).fingerprint()
    (folder / "a=1").rename(folder / "a=2")
    assert Manifest.open(folder).fingerprint() != before
    (folder / "a=2").rename(folder / "x")
    plain = Manifest.open(folder).fingerprint()
    assert plain == Manifest.open(folder / "x" / "p.parquet").fingerprint()
    assert plain not in {before}


def test_timestamps_of_folders_are_parsed(put) -> None:
    """Spark percent-encodes them."""
    folder = put("t=2024-01-01%2010%3A30%3A00.5/p.parquet", {"x": [1]})
    assert rows_of(Manifest.open(folder))[0]["t"] == datetime(2024, 1, 1, 10, 30, 0, 500_000)  # noqa: DTZ001
