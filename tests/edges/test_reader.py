"""Reading manifests: real files of every format, line numbers, and malformed files."""

import bz2
import gzip
import lzma
import shutil
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.errors import ManifestError
from batch.manifest.reader import Manifest

CSV = b"image_url,prompt,id\nhttps://a/1.png,a cat,007\nhttps://a/2.png,,008\n"
PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def rows_of(manifest: Manifest, size: int = 4096) -> list[dict]:
    return [row for batch in manifest.batches(size) for row in batch.frame.to_dicts()]


def lines_of(manifest: Manifest, size: int = 4096) -> list[int]:
    return [line for batch in manifest.batches(size) for line in batch.lines]


@pytest.fixture
def write(tmp_path):
    def _write(name: str, data: bytes):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return _write


# --- rows ---


def test_csv_columns_are_text_and_empty_fields_are_null(write) -> None:
    """`007` stays `007`, so the results contain the manifest's columns unchanged."""
    manifest = Manifest.open(write("m.csv", CSV))
    assert manifest.columns == ("image_url", "prompt", "id")
    assert set(manifest.schema.dtypes()) == {pl.String()}
    assert (manifest.rows, manifest.has_lines) == (2, True)
    assert rows_of(manifest) == [
        {"image_url": "https://a/1.png", "prompt": "a cat", "id": "007"},
        {"image_url": "https://a/2.png", "prompt": None, "id": "008"},
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.csv", b"\xef\xbb\xbf" + CSV),
        ("crlf.csv", CSV.replace(b"\n", b"\r\n")),
        ("open.csv", CSV.rstrip(b"\n")),
        ("tabs.tsv", CSV.replace(b",", b"\t")),
        ("quoted.csv", CSV.replace(b"a cat", b'"a cat"')),
        ("LOUD.CSV", CSV),
        ("v1.2.csv", CSV),
    ],
)
def test_dialects_of_one_table_read_alike(write, name, data) -> None:
    """A byte order mark, Windows line ends, quotes, tabs and a missing final newline change nothing."""
    assert rows_of(Manifest.open(write(name, data))) == rows_of(Manifest.open(write("plain.csv", CSV)))


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson"])
def test_packed_text_reads_like_plain_text(write, packing, kind) -> None:
    """gz, bz2, xz and zst work with every text format; line numbers are those of the decompressed text."""
    data = {"csv": CSV, "tsv": CSV.replace(b",", b"\t")}.get(kind, b'{"a":1,"b":"x"}\n{"a":2}\n')
    plain = Manifest.open(write(f"m.{kind}", data))
    packed = Manifest.open(write(f"m.{kind}.{packing}", PACKERS[packing](data)))
    assert rows_of(packed) == rows_of(plain)
    assert lines_of(packed) == lines_of(plain)


def test_a_packed_file_of_several_members_is_read_to_its_end(write) -> None:
    """`cat a.gz b.gz` is a valid file; the same holds for the other formats."""
    for packing, pack in PACKERS.items():
        data = pack(CSV) + pack(b"https://a/3.png,dog,009\n")
        assert Manifest.open(write(f"m.csv.{packing}", data)).rows == 3, packing


def test_jsonl_keeps_types_and_finds_columns_that_come_late(write) -> None:
    """A column has the common type of its values; missing keys are null; empty lines are skipped."""
    lines = [b'{"a":1,"s":{"x":1}}'] * 5000 + [
        b"",
        b'{"a":2.5,"late":"v","t":[1,2],"n":null}',
        b'{"mixed":1}',
        b'{"mixed":"x"}',
    ]
    manifest = Manifest.open(write("m.jsonl", b"\n".join(lines)))
    assert manifest.columns == ("a", "s", "late", "t", "n", "mixed")
    found = rows_of(manifest)
    assert [found[0][name] for name in ("a", "s", "late")] == [1.0, {"x": 1}, None]
    assert [found[5000][name] for name in ("a", "late", "t")] == [2.5, "v", [1, 2]]
    assert [row["mixed"] for row in found[5001:]] == ["1", "x"]
    assert lines_of(manifest)[-3:] == [5002, 5003, 5004]
    assert all(batch.frame.schema == manifest.schema for batch in manifest.batches())


def test_a_jsonl_with_a_byte_order_mark_reads(write) -> None:
    """Windows editors write one."""
    assert rows_of(Manifest.open(write("m.jsonl", b'\xef\xbb\xbf{"a":"\xc3\xa9"}\r\n'))) == [{"a": "é"}]


def test_parquet_keeps_its_types_and_has_no_lines(tmp_path) -> None:
    """Columns are unchanged."""
    frame = pl.DataFrame({"image_url": ["a", None], "n": [1, 2], "when": [0, 1]}).with_columns(
        pl.col("when").cast(pl.Datetime("us", "UTC"))
    )
    frame.write_parquet(tmp_path / "m.parquet")
    manifest = Manifest.open(tmp_path / "m.parquet")
    (batch,) = manifest.batches()
    assert batch.frame.equals(frame)
    assert batch.frame.schema == manifest.schema == frame.schema
    assert (batch.lines, manifest.has_lines) == (None, False)


def test_a_folder_and_a_glob_of_parquet_are_one_manifest_in_order_of_names(tmp_path) -> None:
    """Shards may order columns differently, and an all-null column may have another type."""
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    pl.DataFrame({"a": ["x", "y"], "n": [1, 2]}).write_parquet(folder / "train" / "part-0.parquet")
    pl.DataFrame({"n": [3], "a": ["z"]}).write_parquet(folder / "train" / "part-1.parquet")
    pq.write_table(pa.table({"a": ["w"], "n": pa.nulls(1)}), folder / "train" / "part-2.parquet")
    (folder / "_metadata.parquet").write_bytes(b"not a shard")
    for source in (folder, folder / "train" / "part-*.parquet", folder / "*" / "*.parquet"):
        manifest = Manifest.open(source)
        assert [(row["a"], row["n"]) for row in rows_of(manifest, 1)] == [("x", 1), ("y", 2), ("z", 3), ("w", None)]
        assert [batch.first_row for batch in manifest.batches(1)] == [0, 1, 2, 3]
    assert Manifest.open(folder).folder == folder
    assert Manifest.open(folder / "*" / "*.parquet").folder == folder


def test_batches_are_no_larger_than_asked_and_continue_each_other(write) -> None:
    """`first_row` is the position in the manifest."""
    data = b"a\n" + b"".join(b"%d\n" % i for i in range(1000))
    manifest = Manifest.open(write("m.csv", data))
    batches = list(manifest.batches(300))
    assert [(batch.first_row, len(batch.frame)) for batch in batches] == [(0, 300), (300, 300), (600, 300), (900, 100)]
    assert [row["a"] for row in rows_of(manifest, 7)] == [str(i) for i in range(1000)]


def test_only_the_first_rows_are_read_on_request(write, tmp_path) -> None:
    """Later rows may be malformed: they are not read."""
    csv = Manifest.open(write("m.csv", CSV + b"ragged\n"), rows=2)
    jsonl = Manifest.open(write("m.jsonl", b'{"a":1}\n\n{"a":2}\nnonsense\n'), rows=2)
    pl.DataFrame({"a": [1, 2, 3]}).write_parquet(tmp_path / "m.parquet", row_group_size=1)
    parquet = Manifest.open(tmp_path / "m.parquet", rows=2)
    for manifest in (csv, jsonl, parquet):
        assert manifest.rows == len(rows_of(manifest)) == len(rows_of(manifest, 1)) == 2


# --- lines ---


def test_a_row_is_on_the_line_on_which_it_starts(write) -> None:
    """Newlines inside quotes and empty lines count as lines, as in an editor."""
    data = b'a,b\n1,"two\nlines"\n\n2,x\r\n"3\r\n\r\n",y\n4,z\n'
    manifest = Manifest.open(write("m.csv", data))
    assert lines_of(manifest) == lines_of(manifest, 1) == [2, 5, 6, 9]
    assert [row["b"] for row in rows_of(manifest)] == ["two\nlines", "x", "y", "z"]


FIELDS = st.text(alphabet='ab,"\n\r é', max_size=5)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]), st.integers(1, 4))
def test_lines_are_right_for_any_text_in_any_batch_size(tmp_path_factory, records, end, size) -> None:
    """The line of a row is one more than the number of line breaks before it; its fields are unchanged."""
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    text, expected = f"a,b{end}", []
    for record in records:
        breaks = text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
        expected.append(breaks + 1)
        text += ",".join('"' + field.replace('"', '""') + '"' for field in record) + end
    path.write_bytes(text.encode())
    manifest = Manifest.open(path)
    assert lines_of(manifest, size) == expected
    assert [tuple(row.values()) for row in rows_of(manifest, size)] == [(a or None, b or None) for a, b in records]


# --- errors ---


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.csv", b"", ["empty", "first line"]),
        ("m.csv", b"\n\n", ["empty"]),
        ("m.csv", b"a,b\n", ["header and no rows"]),
        ("m.csv", b"a,b\n\n\n", ["header and no rows"]),
        ("m.csv", b"a,b,a\n1,2,3\n", ["more than one column 'a'"]),
        ("m.csv", b"a,b\n1,2\n1,2,3\n", ["line 3", "3 fields where the header has 2", "1,2,3"]),
        ("m.csv", b'a,b\n"1\n",2\n1\n', ["line 4", "1 field where"]),
        ("m.csv", b'a,b\n1,2\n1,"two\n3,4\n5,6\n', ["line 3", "not parseable", "quote"]),
        ("m.csv", b'a,b\n1,"two"x\n', ["line 2", "not parseable"]),
        ("m.csv", b'"a,b\n1,2\n', ["line 1", "not parseable"]),
        ("m.csv", b"a,b\n1,2\n1,caf\xe9\n", ["line 3", "not UTF-8"]),
        ("m.csv.gz", b"a,b\n1,2\n", ["cannot be read", "suffix"]),
        ("m.csv.gz", gzip.compress(CSV * 99, mtime=0)[:-20], ["cannot be read", "complete"]),
        ("m.csv.xz", lzma.compress(CSV * 99)[:-20], ["cannot be read"]),
        ("m.csv.bz2", bz2.compress(CSV * 99)[:-20], ["cannot be read"]),
        ("m.csv.zst", b"a,b\n1,2\n", ["cannot be read"]),
        ("m.csv.gz", gzip.compress(b"a,b\n1,caf\xe9\n", mtime=0), ["line 2", "not UTF-8"]),
        ("m.jsonl", b"", ["empty"]),
        ("m.jsonl", b"\n \n", ["empty"]),
        ("m.jsonl", b"{}\n{}\n", ["no columns"]),
        ("m.jsonl", b'{"a":1}\n\n{"a":2\n{"a":3}\n', ["line 3", "not parseable"]),
        ("m.jsonl", b'{"a":1}\n[1]\n', ["line 2", "not a JSON object"]),
        ("m.jsonl", b'{"a":1}\n3\n', ["line 2", "not a JSON object"]),
        ("m.jsonl", b'[{"a":1}]', ["line 1", "not a JSON object"]),
        ("m.jsonl", b'{"a":1}\n{"a":"caf\xe9"}\n', ["line 2", "not UTF-8"]),
        ("m.jsonl", b'{"a":1}\n{"a":NaN}\n', ["line 2", "at character 6", "write null"]),
        ("m.jsonl", b'{"a":1}\nnull\n', ["line 2: null is not a JSON object"]),
        ("m.jsonl", b'{"a":1,"b":2}\n{"a":1,"b":2,"a":3}\n', ["line 2", "duplicate key 'a'"]),
        ("m.jsonl", b'{"prompt":"x","\\u0070rompt":"y"}\n', ["line 1", "duplicate key 'prompt'"]),
        ("m.jsonl", b'{"a" : 1, "b" :2,"b":3}\n', ["line 1", "duplicate key 'b'"]),
        ("m.jsonl", b'{"a":{"b":1,"b":2}}\n', ["line 1", "duplicate key 'b'"]),
        ("m.jsonl", b'{"a":1,"a":null}\n{"a":1}\n', ["line 1", "duplicate key 'a'"]),
        ("m.jsonl", b'{"a":1}\n{"\\ud83d":1}\n', ["line 2", "the key '\\ud83d' contains an unpaired surrogate"]),
        ("m.parquet", b"", ["cannot be read"]),
        ("m.parquet", b"PAR1 but not for long PAR1", ["cannot be read"]),
        ("m.txt", CSV, [".txt", ".csv", ".jsonl", ".parquet"]),
        ("m.parquet.gz", b"", [".parquet.gz", "unsupported manifest format", "unpack it"]),
        ("m", CSV, ["has no suffix", ".csv", "--format"]),
    ],
)
def test_an_invalid_manifest_is_refused_with_a_clear_message(write, name, data, words) -> None:
    """The message names the error and the line. Opening raises it, before anything is planned or paid for."""
    path = write(name, data)
    with pytest.raises(ManifestError) as raised:
        Manifest.open(path)
    assert str(path) in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_a_bad_line_far_down_is_found_by_opening(write) -> None:
    """A long run must not discover at its end that the manifest is truncated."""
    good = b"".join(b"%d,x\n" % i for i in range(20_000))
    with pytest.raises(ManifestError, match="line 20002: 1 field "):
        Manifest.open(write("m.csv", b"a,b\n" + good + b"oops\n"))
    good = b'{"a":1}\n' * 20_000
    with pytest.raises(ManifestError, match="line 20001: not parseable"):
        Manifest.open(write("m.jsonl", good + b'{"a":\n'))


SURROGATES = [
    # the value as JSON, the value in the frame, and the reported value if it has a lone surrogate
    (rb'"\ud83d half"', "\ufffd half", "\ud83d half"),
    (rb'"a \uDC00"', "a \ufffd", "a \udc00"),
    (rb'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600", "\ud83d\U0001f600"),
    (rb'"\ud83d\ude00 and \uD83D\uDE00"', "\U0001f600 and \U0001f600", None),
    (rb'"a folder \\ud83d"', r"a folder \ud83d", None),
    (rb'"nothing \u0000"', "nothing \0", None),
]


@pytest.mark.parametrize(("written", "shown", "surrogate"), SURROGATES, ids=[row[0].decode() for row in SURROGATES])
@pytest.mark.parametrize("size", [1, 4096])
def test_a_lone_surrogate_is_reported_and_replaced(write, written, shown, surrogate, size) -> None:
    """By itself, polars would read a NUL. Other rows are unchanged."""
    manifest = Manifest.open(write("m.jsonl", b'{"p":"good"}\n\n{"p":' + written + b"}\n"))
    assert [row["p"] for row in rows_of(manifest, size)] == ["good", shown]
    batches = manifest.batches(size)
    found = {batch.lines[index]: value for batch in batches for index, value in batch.surrogates.items()}
    assert found == ({} if surrogate is None else {3: ("p", surrogate)})


def test_a_nested_lone_surrogate_is_reported_with_its_column(write) -> None:
    """The column here is the struct of an image."""
    manifest = Manifest.open(write("m.jsonl", rb'{"n":1,"image":{"path":"\udc00.png"}}'))
    (batch,) = manifest.batches()
    assert batch.surrogates[0].column == "image"
    assert batch.frame["image"].to_list() == [{"path": "\ufffd.png"}]


LONG = "1" * 41
KINDS = [
    # values of one column as JSON, and the values read
    (["1", "true"], ["1", "true"]),
    (["1.5", "false"], ["1.5", "false"]),
    (["1", "[1]"], ["1", "[1]"]),
    (["1", '{"a":2}'], ["1", '{"a": 2}']),
    (["[1]", '{"a":2}', '"x"'], ["[1]", '{"a": 2}', "x"]),
    (["1", LONG], ["1", LONG]),
    (["9223372036854775807", "0"], [2**63 - 1, 0]),
    (["9223372036854775808", "0"], ["9223372036854775808", "0"]),
    (["1e400", "-1e400"], ["1e400", "-1e400"]),
    (["1.5", "9007199254740993"], ["1.5", "9007199254740993"]),
    (["1.5", "9007199254740992"], [1.5, 2.0**53]),
    (["1.5", "12345678901234567890"], ["1.5", "12345678901234567890"]),
    (["1.5", "1.7e18"], [1.5, 1.7e18]),
    (['{"a":1}', '{"a":true}'], [{"a": "1"}, {"a": "true"}]),
    (["[1]", "[true]"], [["1"], ["true"]]),
    (["{}", "{}"], ["{}", "{}"]),
    (["null", "true"], [None, True]),
]


@pytest.mark.parametrize(("values", "read"), KINDS, ids=[" and ".join(row[0])[:40] for row in KINDS])
@pytest.mark.parametrize("apart", [1, 5000])
@pytest.mark.parametrize("turned", [False, True])
def test_values_of_mixed_types_become_text_unchanged(write, values, read, apart, turned) -> None:
    """This holds at any distance and in either order. As in a CSV, one invalid seed is then one bad row."""
    values, read = (values[::-1], read[::-1]) if turned else (values, read)
    lines = [f'{{"n":{i},"a":{value}}}' for value in values for i in range(apart)]
    manifest = Manifest.open(write("m.jsonl", "\n".join(lines).encode()))
    found = [row["a"] for row in rows_of(manifest)]
    assert found == [value for value in read for _ in range(apart)]
    assert list(map(type, found[::apart])) == list(map(type, read))
    assert manifest.schema["n"] == pl.Int64


def test_the_message_about_a_missing_manifest_names_similar_files(write, tmp_path) -> None:
    """Most missing files are misspelt."""
    write("images.csv", CSV)
    with pytest.raises(ManifestError, match=r"there is no manifest .*imgaes\.csv; did you mean images\.csv\?"):
        Manifest.open(tmp_path / "imgaes.csv")
    with pytest.raises(ManifestError, match="check the contents of"):
        Manifest.open(tmp_path / "zzz.jsonl")
    with pytest.raises(ManifestError, match=r"the folder .*nowhere does not exist either"):
        Manifest.open(tmp_path / "nowhere" / "m.csv")


def test_folders_and_globs_without_parquet_are_refused(write, tmp_path) -> None:
    """Only Parquet and Arrow manifests can consist of several files."""
    write("m.csv", CSV)
    with pytest.raises(
        ManifestError, match=r"has no Parquet file, Arrow file or image in it; name a file, for example .*m\.csv"
    ):
        Manifest.open(tmp_path)
    with pytest.raises(ManifestError, match="no Parquet or Arrow file matches"):
        Manifest.open(tmp_path / "*.csv")


def test_a_shard_that_is_not_parquet_is_named(tmp_path) -> None:
    """Joining of valid shards is tested in `test_shards`."""
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ManifestError, match=r"1\.parquet cannot be read: Parquet magic bytes"):
        Manifest.open(tmp_path)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path) -> None:
    """Such text would make polars panic."""
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"n": [1], "prompt": text}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"m\.parquet: the column 'prompt' has invalid values .* text as UTF-8"):
        list(Manifest.open(tmp_path / "m.parquet").batches())


def test_parquet_without_rows_or_with_a_duplicate_column_is_refused(tmp_path) -> None:
    """The rules are the same as for text."""
    pl.DataFrame({"a": []}).write_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ManifestError, match="has no rows"):
        Manifest.open(tmp_path / "empty.parquet")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ManifestError, match="more than one column 'a'"):
        Manifest.open(tmp_path / "twice.parquet")


def test_a_manifest_that_changes_while_it_is_read_is_an_error(write) -> None:
    """The rows counted when opening must still exist when they are planned."""
    path = write("m.csv", CSV)
    manifest = Manifest.open(path)
    write("m.csv", CSV + CSV.splitlines(keepends=True)[1])
    with pytest.raises(ManifestError, match="had 2 rows and now has 3"):
        list(manifest.batches())
    path.unlink()
    with pytest.raises(ManifestError, match="cannot be read"):
        list(manifest.batches())


# --- fingerprint ---


def test_the_fingerprint_depends_on_the_contents(write, tmp_path) -> None:
    """A copy has the same fingerprint, a changed file another; that of a folder depends on all shards."""
    path = write("m.csv", CSV)
    before = Manifest.open(path).fingerprint()
    shutil.copy(path, tmp_path / "copy.csv")
    assert Manifest.open(tmp_path / "copy.csv").fingerprint() == before
    write("m.csv", CSV.replace(b"007", b"070"))
    assert Manifest.open(path).fingerprint() != before
    for shard in ("0", "1"):
        pl.DataFrame({"a": [shard]}).write_parquet(tmp_path / f"{shard}.parquet")
    whole = Manifest.open(tmp_path).fingerprint()
    pl.DataFrame({"a": ["2"]}).write_parquet(tmp_path / "1.parquet")
    assert Manifest.open(tmp_path).fingerprint() != whole


# --- memory ---


def test_embedded_images_come_a_few_at_a_time(tmp_path) -> None:
    """A batch with image bytes has at most 64 rows, whatever the requested size."""
    image = pa.array([{"bytes": b"x" * 100, "path": f"{i}.png"} for i in range(200)])
    pq.write_table(pa.table({"image": image}), tmp_path / "m.parquet")
    sizes = [len(batch.frame) for batch in Manifest.open(tmp_path / "m.parquet").batches(4096)]
    assert sum(sizes) == 200
    assert max(sizes) <= 64


def test_long_text_rows_come_a_few_at_a_time(write) -> None:
    """Batches are also limited by bytes: at most 32 MiB and a few rows."""
    manifest = Manifest.open(write("m.csv", b"a\n" + (b"x" * 2**20 + b"\n") * 60))
    assert max(len(batch.frame) for batch in manifest.batches()) <= 48
    assert manifest.rows == 60
    manifest = Manifest.open(write("m.jsonl", (b'{"a":"' + b"x" * 2**20 + b'"}\n') * 60))
    assert max(len(batch.frame) for batch in manifest.batches()) <= 32


MEASURE = """
import resource, sys
from batch.manifest.reader import Manifest
for source in sys.argv[1:3]:
    rows = sum(len(batch.frame) for batch in Manifest.open(source).batches())
    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_manifest(tmp_path, kind) -> None:
    """Reading 60 times as many rows takes less than 60 MiB of additional memory."""
    for name, count in (("small", 5_000), ("large", 300_000)):
        numbers = pl.int_range(count, eager=True).cast(pl.String)
        frame = pl.DataFrame(
            {"image_url": "https://a.example/" + numbers, "prompt": "a painting of " + numbers + "!" * 150}
        )
        writer = {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[kind]
        writer(tmp_path / f"{name}.{kind}")
    sources = [str(tmp_path / f"{name}.{kind}") for name in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *sources], capture_output=True, text=True, check=True)
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (small, large) == (5_000, 300_000)
    assert after - before < 60
