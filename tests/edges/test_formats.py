"""JSON lists, Arrow, saved datasets, folders of images, formats by name, and invalid manifests."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batch.errors import ManifestError
from batch.manifest.formats.base import Dialect
from batch.manifest.images import SourceImages
from batch.manifest.reader import Manifest
from tests.edges.test_reader import KINDS, PACKERS, SURROGATES, lines_of, rows_of


def refusal(source: Path | str, dialect: Dialect | None = None) -> str:
    with pytest.raises(ManifestError) as raised:
        Manifest.open(source, None, dialect or Dialect())
    return str(raised.value)


def png(color: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, "PNG")
    return buffer.getvalue()


# --- JSON lists ---


RECORDS = [{"image_url": "https://a/1.png", "n": 1}, {"image_url": "https://a/2.png", "late": "x"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packing", ["", *PACKERS])
def test_a_json_list_reads_like_its_objects_as_lines(tmp_path, indent, packing) -> None:
    """This holds for indented and compact, compressed and plain files."""
    pack = PACKERS.get(packing, bytes)
    path = tmp_path / ("m.json." + packing).rstrip(".")
    path.write_bytes(pack(json.dumps(RECORDS, indent=indent).encode()))
    lines = tmp_path / "m.jsonl"
    lines.write_text("\n".join(map(json.dumps, RECORDS)))
    found, expected = Manifest.open(path), Manifest.open(lines)
    assert (rows_of(found), found.schema) == (rows_of(expected), expected.schema)
    assert rows_of(found, 1) == rows_of(expected)


def test_rows_of_a_json_list_have_lines_if_no_two_share_one(tmp_path) -> None:
    """In a list on one line all rows would be on line 1, so they are numbered instead."""
    path = tmp_path / "m.json"
    path.write_text('[{"a":1},\n\n {\n"a":2},\r\n{"a":3}]')
    manifest = Manifest.open(path)
    assert manifest.has_lines
    assert lines_of(manifest) == lines_of(manifest, 1) == [1, 3, 5]
    path.write_text('[{"a":1},\n{"a":2},{"a":3}]')
    manifest = Manifest.open(path)
    assert not manifest.has_lines
    assert [batch.lines for batch in manifest.batches(1)] == [None, None, None]


@pytest.mark.parametrize(("values", "read"), KINDS, ids=[" and ".join(row[0])[:40] for row in KINDS])
def test_values_in_a_json_list_are_read_as_in_jsonl(tmp_path, values, read) -> None:
    """Columns of mixed types are text; long numbers keep their digits."""
    path = tmp_path / "m.json"
    path.write_text("[" + ",\n".join(f'{{"n":{i},"a":{value}}}' for i, value in enumerate(values)) + "]")
    found = [row["a"] for row in rows_of(Manifest.open(path))]
    assert found == read
    assert list(map(type, found)) == list(map(type, read))


@pytest.mark.parametrize(("written", "shown", "surrogate"), SURROGATES, ids=[row[0].decode() for row in SURROGATES])
def test_unpaired_surrogates_in_a_json_list_are_bad_rows(tmp_path, written, shown, surrogate) -> None:
    """The rule is that of JSONL."""
    path = tmp_path / "m.json"
    path.write_bytes(b'[{"p":"good"},{"p":' + written + b"}]")
    manifest = Manifest.open(path)
    assert [row["p"] for row in rows_of(manifest)] == ["good", shown]
    (batch,) = manifest.batches()
    expected = {} if surrogate is None else {1: ("p", surrogate)}
    assert {index: tuple(found) for index, found in batch.surrogates.items()} == expected


def test_lines_of_json_in_a_json_file_are_read_as_lines(tmp_path) -> None:
    """The objects may also span several lines each, as in the output of jq, and be UTF-16."""
    path = tmp_path / "m.json"
    path.write_text('\n{"a":1}\n\n{"a":2}')
    assert (rows_of(Manifest.open(path)), lines_of(Manifest.open(path))) == ([{"a": 1}, {"a": 2}], [2, 4])
    path.write_text('{\n "a":1\n}\n{\n "a":2\n}\n')
    assert (rows_of(Manifest.open(path)), lines_of(Manifest.open(path))) == ([{"a": 1}, {"a": 2}], [1, 4])
    path.write_text('[{"a":1},\n{"a":"é"}]', "utf-16")
    manifest = Manifest.open(path)
    assert rows_of(manifest) == [{"a": "1"}, {"a": "é"}]
    assert manifest.notes == ("encoding UTF-16 (byte order mark)",)


def test_only_the_first_rows_of_a_json_list_are_read_on_request(tmp_path) -> None:
    path = tmp_path / "m.json"
    path.write_text('[{"a":1},{"a":2},nonsense')
    assert rows_of(Manifest.open(path, rows=2)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["has no rows"]),
        (b"[]", ["has no rows"]),
        (b" [ ] ", ["has no rows"]),
        (b"[{},{}]", ["names no columns"]),
        (b'[\n{"a":1},\n{"a":1,"a":2}]', ["line 3, row 1", "duplicate key 'a'"]),
        (b'[{"a":1},{"b":{"c":1,"c":2}}]', ["line 1, row 1", "duplicate key 'c'"]),
        (b'[\n{"a":1},\n\n{"a":NaN}]', ["line 4, row 1", "JSON has no NaN"]),
        (b'[{"a":1},{"a":01}]', ["line 1, row 1", "not parseable"]),
        (b'[{"a":1},{"a" 2}]', ["line 1, row 1", "not parseable", "each item of the list must be one object"]),
        (b'[{"a":1},\n{"\\ud83d":1}]', ["line 2, row 1", "the key '\\ud83d'"]),
        (b'[{"a":1},\n3]', ["line 2, row 1", "'3' is not a JSON object"]),
        (b'[["a"],[1]]', ["line 1, row 0", "is not a JSON object"]),
        (b'[{"a":1}', ["line 1, row 1", "comma", "]"]),
        (b'[{"a":1},', ["line 1, row 1", "is the file complete?"]),
        (b'[{"a":"caf\xe9"}]', ["line 1", "not UTF-8"]),
        (
            b'{"data":[{"a":1}],"n":1}',
            ["is one object, with the keys 'data', 'n', not a list of rows", "save the list"],
        ),
        (b'{\n"image_url":{"0":"x"}}', ["is one object, with the keys 'image_url'", "[{...}, {...}]"]),
        (b'{"a":1}\n{"a":\n', ["line 2", "not parseable"]),
        (b"image_url,prompt\n", ["begins with 'image_url'", "list of objects"]),
        ('[{"a":1}]'.encode("utf-16-le"), ["line 1, row 0", 'manifest.encoding = "utf-16-le"']),
    ],
)
def test_an_invalid_json_file_is_refused_with_a_clear_message(tmp_path, data, words) -> None:
    """The message names the file and the place."""
    path = tmp_path / "m.json"
    path.write_bytes(data)
    said = refusal(path)
    for word in (str(path), *words):
        assert word in said


def test_the_message_about_a_list_in_a_jsonl_file_names_the_format(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    for text in ('[{"a":1}]\n', '[\n{"a":1}\n]'):
        path.write_text(text)
        assert "needs the suffix .json or --format json" in refusal(path)
    path.write_text('[\n{"a":1}\n]')
    assert rows_of(Manifest.open(path, None, Dialect(format="json"))) == [{"a": 1}]


# --- Arrow ---


TABLE = pa.table(
    {
        "image": pa.array([{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "tags": pa.array([["a"], [], None]),
        "n": pa.array([1, None, 3], pa.int32()),
    }
)
WRITERS = {
    "file": lambda path, table: _write(pa.ipc.new_file, path, table),
    "stream": lambda path, table: _write(pa.ipc.new_stream, path, table),
    "lz4": lambda path, table: pa.feather.write_feather(table, str(path), compression="lz4"),
    "zstd": lambda path, table: pa.feather.write_feather(table, str(path), compression="zstd"),
    "polars": lambda path, table: pl.from_arrow(table).write_ipc(path),
}


def _write(opened, path, table, rows: int = 2) -> None:
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".ipc", ".arrows"])
def test_arrow_files_of_every_form_read_like_parquet(tmp_path, form, suffix) -> None:
    """Forms are file and stream, compressed or not; columns may be nested or dictionaries."""
    path, parquet = tmp_path / f"m{suffix}", tmp_path / "m.parquet"
    WRITERS[form](path, TABLE)
    pq.write_table(TABLE, parquet)
    found, expected = Manifest.open(path), Manifest.open(parquet)
    assert found.schema == expected.schema
    assert rows_of(found) == rows_of(found, 1) == rows_of(expected)
    assert (found.rows, found.has_lines, found.folder) == (3, False, tmp_path)
    assert rows_of(Manifest.open(path, rows=2), 1) == rows_of(expected)[:2]


def test_folders_and_globs_of_arrow_files_are_one_manifest(tmp_path) -> None:
    """Missing columns are null; numbers of two types are joined; hidden files are ignored."""
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    _write(pa.ipc.new_file, folder / "a.arrow", pa.table({"u": ["1"], "n": [1]}))
    _write(pa.ipc.new_stream, folder / "b" / "1.arrow", pa.table({"n": pa.array([2.5]), "u": ["2"], "late": ["x"]}))
    _write(pa.ipc.new_file, folder / "b" / "2.feather", pa.table({"u": pa.nulls(1), "n": pa.nulls(1)}))
    (folder / ".hidden.arrow").write_bytes(b"nothing")
    (folder / "_part.arrow").write_bytes(b"nothing")
    expected = [("1", 1.0, None), ("2", 2.5, "x"), (None, None, None)]
    for source in (folder, folder / "**" / "*"):
        assert [(row["u"], row["n"], row["late"]) for row in rows_of(Manifest.open(source))] == expected
    assert rows_of(Manifest.open(folder / "b" / "*.arrow")) == [{"n": 2.5, "u": "2", "late": "x"}]
    _write(pa.ipc.new_file, folder / "c.arrow", pa.table({"u": [1]}))
    said = refusal(folder)
    assert f"the column 'u' is string in {folder / 'a.arrow'} and int64 in {folder / 'c.arrow'}" in said


def test_dictionaries_may_differ_from_file_to_file(tmp_path) -> None:
    """Each file has its own values."""
    for name, values in (("a", ["x", "y"]), ("b", ["z", "x"])):
        _write(pa.ipc.new_file, tmp_path / f"{name}.arrow", pa.table({"k": pa.array(values).dictionary_encode()}))
    manifest = Manifest.open(tmp_path)
    assert [row["k"] for row in rows_of(manifest, 1)] == ["x", "y", "z", "x"]
    assert all(batch.frame.schema == manifest.schema for batch in manifest.batches(1))


def test_a_batch_has_only_the_dictionary_values_of_its_rows(tmp_path) -> None:
    """Otherwise each batch would contain a dictionary of a million prompts."""
    prompts = [f"prompt {i}" for i in range(5000)]
    _write(pa.ipc.new_file, tmp_path / "m.arrow", pa.table({"p": pa.array(prompts).dictionary_encode()}), 5000)
    batches = list(Manifest.open(tmp_path / "m.arrow").batches(10))
    assert [row["p"] for batch in batches for row in batch.frame.to_dicts()] == prompts
    assert max(len(batch.frame["p"].to_arrow().dictionary) for batch in batches) <= 10


def ext(kind: pa.DataType, storage: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, storage)


ODD = {
    "json": (ext(pa.json_(), pa.array(['{"a":1}'])), '{"a":1}'),
    "bool8": (ext(pa.bool8(), pa.array([1], pa.int8())), 1),
    "uuid": (pa.array([b"x" * 16], pa.uuid()), b"x" * 16),
    "list of extensions": (pa.ListArray.from_arrays([0, 1], ext(pa.bool8(), pa.array([1], pa.int8()))), [1]),
    "tensor": (ext(pa.fixed_shape_tensor(pa.int64(), (2,)), pa.array([[1, 2]], pa.list_(pa.int64(), 2))), [1, 2]),
    "text view": (pa.array(["a"], pa.string_view()), "a"),
    "bytes view": (pa.array([b"a"], pa.binary_view()), b"a"),
    "large text": (pa.array(["a"], pa.large_string()), "a"),
    "wide decimal": (pa.array([Decimal("1.5")], pa.decimal256(38, 1)), Decimal("1.5")),
    "numbers by index": (pa.array([7]).dictionary_encode(), 7),
    "bytes by index": (pa.array([b"a"]).dictionary_encode(), b"a"),
    "map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), None),
    "half": (pa.array([1.5], pa.float32()).cast(pa.float16()), 1.5),
    "a time zone by its offset": (pa.array([0], pa.timestamp("us", "+05:30")), datetime(1970, 1, 1, tzinfo=UTC)),
    "an unknown time zone": (pa.array([0], pa.timestamp("us", "Mars/Base")), datetime(1970, 1, 1, tzinfo=UTC)),
}


@pytest.mark.parametrize("name", ODD)
def test_arrow_types_of_other_programs_are_read(tmp_path, name) -> None:
    column, value = ODD[name]
    _write(pa.ipc.new_file, tmp_path / "m.arrow", pa.table({"c": column}))
    manifest = Manifest.open(tmp_path / "m.arrow")
    (row,) = rows_of(manifest)
    assert value is None or row["c"] == value
    (batch,) = manifest.batches()
    assert batch.frame.schema == manifest.schema


UNSUPPORTED = {
    "union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
    "run-end": pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([7])),
    "interval": pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
    "list view": pa.array([[1]], pa.list_view(pa.int64())),
    "wider decimal": pa.array([Decimal("1.5")], pa.decimal256(50, 1)),
    "a field twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"]),
    "deep inside": pa.array([[{"a": Decimal("1.5")}]], pa.list_(pa.struct([("a", pa.decimal256(50, 1))]))),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_arrow_types_that_polars_does_not_have_are_refused(tmp_path, name, capfd) -> None:
    """For some of them, polars would panic with a trace on standard error."""
    _write(pa.ipc.new_stream, tmp_path / "m.arrow", pa.table({"image_url": ["x"], "c": UNSUPPORTED[name]}))
    said = refusal(tmp_path / "m.arrow")
    assert "m.arrow: unsupported type" in said
    assert "of the column 'c'; cast" in said
    assert capfd.readouterr().err == ""


def whole(form: str = "file") -> bytes:
    stream = io.BytesIO()
    opened = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with opened(stream, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty"]),
        (b"image_url,prompt\n1,2\n", ["cannot be read", "does its suffix match"]),
        (b"FEA1" + b"\0" * 40, ["Feather version 1", "version 2"]),
        (b"ARROW1\0\0", ["cannot be read"]),
        (whole()[:-20], ["cannot be read", "complete"]),
        (whole("stream")[:-60], ["cannot be read", "complete"]),
        (whole("stream")[:300], ["cannot be read", "complete"]),
        (b"PAR1" + b"\0" * 40, ["cannot be read"]),
    ],
)
def test_an_unreadable_arrow_file_is_named(tmp_path, data, words) -> None:
    path = tmp_path / "m.arrow"
    path.write_bytes(data)
    said = refusal(path)
    for word in (str(path), *words):
        assert word in said


def test_invalid_arrow_tables_are_refused(tmp_path) -> None:
    """The tables have no rows, a duplicate column, or text that is not UTF-8."""
    path = tmp_path / "m.arrow"
    _write(pa.ipc.new_file, path, pa.table({"a": pa.array([], pa.string())}))
    assert "has no rows" in refusal(path)
    _write(pa.ipc.new_file, path, pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]))
    assert "more than one column 'a'" in refusal(path)
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    _write(pa.ipc.new_file, path, pa.table({"n": [1], "prompt": text}))
    with pytest.raises(ManifestError, match=r"m\.arrow: the column 'prompt' has invalid values .* text as UTF-8"):
        list(Manifest.open(path).batches())


def test_a_nested_name_that_is_not_utf8_is_refused(tmp_path, capfd) -> None:
    """Such a name would make polars panic."""
    path = tmp_path / "m.arrow"
    path.write_bytes(whole().replace(b"item", b"it\xffm"))
    assert "m.arrow: a name in the column 'tags' is not UTF-8" in refusal(path)
    assert capfd.readouterr().err == ""


def test_an_arrow_file_that_is_overwritten_while_it_is_read_is_an_error(tmp_path) -> None:
    """The file is mapped into memory: access beyond its new end would kill the process."""
    path = tmp_path / "m.arrow"
    _write(pa.ipc.new_file, path, pa.table({"a": list(range(1000))}), 1000)
    batches = Manifest.open(path).batches(10)
    next(batches)
    path.write_bytes(b"ARROW1")
    with pytest.raises(ManifestError, match="changed while being read"):
        next(batches)


def test_embedded_images_in_arrow_come_a_few_at_a_time(tmp_path) -> None:
    """The limits are those of Parquet."""
    image = pa.array([{"bytes": b"x" * 100, "path": f"{i}.png"} for i in range(200)])
    _write(pa.ipc.new_file, tmp_path / "m.arrow", pa.table({"image": image}), 200)
    sizes = [len(batch.frame) for batch in Manifest.open(tmp_path / "m.arrow").batches(4096)]
    assert (sum(sizes), max(sizes)) == (200, 64)
    _write(pa.ipc.new_file, tmp_path / "m.arrow", pa.table({"image": ["x" * 2**20] * 60}), 60)
    assert max(len(batch.frame) for batch in Manifest.open(tmp_path / "m.arrow").batches()) <= 32


# --- datasets of Hugging Face ---


@pytest.fixture
def dataset(tmp_path):
    """A dataset of three rows with images; that of the first is in a file."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        (tmp_path / "files" / f"{name}.png").write_bytes(png())
    images = [
        str(tmp_path / "files" / "a.png"),
        {"bytes": png("red"), "path": "sub/c.png"},
        {"bytes": png(), "path": None},
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    columns = {"image": images, "text": ["one", "two", None], "label": [0, 1, 0]}
    return datasets.Dataset.from_dict(columns, features=features)


def resolved(manifest: Manifest, column: str = "image") -> list[object]:
    images = SourceImages(manifest.folder, 100)
    return [answer for batch in manifest.batches() for answer in images.resolve(batch.frame[column].to_list())]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_dataset_is_read_with_its_images(tmp_path, dataset, shards) -> None:
    """Files are read in the order of the dataset's list; other files are ignored."""
    saved = tmp_path / "saved"
    dataset.save_to_disk(saved, num_shards=shards)
    _write(pa.ipc.new_stream, saved / "cache-0123.arrow", TABLE)
    manifest = Manifest.open(saved)
    assert manifest.columns == ("image", "text", "label")
    assert [row["text"] for row in rows_of(manifest)] == ["one", "two", None]
    assert [answer.image.name for answer in resolved(manifest)] == ["a.png", "c.png", "image"]
    if shards > 1:
        state = json.loads((saved / "state.json").read_text())
        state["_data_files"] = state["_data_files"][::-1][:2]
        (saved / "state.json").write_text(json.dumps(state))
        assert [row["text"] for row in rows_of(Manifest.open(saved))] == [None, "two"]


def test_selected_rows_are_read_as_saved(tmp_path, dataset) -> None:
    """Saving materializes a selection."""
    dataset.select([2, 0]).save_to_disk(tmp_path / "saved")
    assert [row["text"] for row in rows_of(Manifest.open(tmp_path / "saved"))] == [None, "one"]


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_a_row_index_of_a_saved_dataset_is_refused(tmp_path, dataset, key) -> None:
    """Old versions of datasets saved one; ignoring it would give other rows."""
    dataset.save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))
    said = refusal(tmp_path / "saved")
    assert "an index over its rows" in said
    assert "flatten_indices" in said


def test_the_message_about_a_dataset_with_splits_names_them(tmp_path, dataset) -> None:
    import datasets

    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(saved)
    assert f"the splits train, test; name one split, for example {saved / 'train'}" in refusal(saved)
    assert Manifest.open(saved / "train").rows == 3
    assert Manifest.open(saved / "test").rows == 1
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "one")
    assert "the split train; name one split" in refusal(tmp_path / "one")


def test_an_incomplete_saved_dataset_is_refused(tmp_path, dataset) -> None:
    saved = tmp_path / "saved"
    dataset.save_to_disk(saved, num_shards=3)
    (saved / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow is missing, but state.json lists it" in refusal(saved)
    for state, words in [
        ("{", "cannot be read"),
        ("{}", "does not list the files"),
        ('{"_data_files": []}', "lists no Arrow files"),
        ('{"_data_files": [{"filename": 7}]}', "lists no Arrow files"),
        ('{"_data_files": ["data-0.arrow"]}', "lists no Arrow files"),
    ]:
        (saved / "state.json").write_text(state)
        assert words in refusal(saved)


def test_a_cached_dataset_is_read_without_derived_files(tmp_path) -> None:
    """`map` and `filter` write cache files to the same folder."""
    (tmp_path / "dataset_info.json").write_text("{}")
    _write(pa.ipc.new_stream, tmp_path / "x-train.arrow", pa.table({"a": [1]}))
    _write(pa.ipc.new_stream, tmp_path / "cache-abc.arrow", pa.table({"indices": [0]}))
    assert rows_of(Manifest.open(tmp_path)) == [{"a": 1}]


# --- folders of images ---


@pytest.fixture
def photos(tmp_path):
    """A folder with images at several depths, and with other files."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a/2.PNG", "a/1.jpeg", "a.jpg", "é/ü ß.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    for name in (".hidden.png", ".thumbs/1.png", "__MACOSX/1.png", "notes.txt", "c.heic", "d.heic"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return folder


def test_a_folder_of_images_is_a_manifest_of_all_images(photos) -> None:
    """Images are sorted by path, hidden files are ignored, and a note reports other files."""
    manifest = Manifest.open(photos)
    expected = ["a/1.jpeg", "a/2.PNG", "a.jpg", "b.png", "é/ü ß.webp"]
    assert [tuple(row.values()) for row in rows_of(manifest)] == [(name, Path(name).name) for name in expected]
    assert rows_of(manifest, 1) == rows_of(manifest, 2) == rows_of(manifest)
    assert (manifest.columns, manifest.has_lines, manifest.has_images) == (("image_url", "file_name"), False, True)
    assert all(answer.image is not None for answer in resolved(manifest, "image_url"))
    assert manifest.notes == (f"5 images below {photos}; not read: 3 other files (2 .heic, 1 .txt)",)
    assert [row["image_url"] for row in rows_of(Manifest.open(photos, rows=2))] == expected[:2]


def test_the_settings_name_the_image_column(photos) -> None:
    manifest = Manifest.open(photos, None, Dialect(image="photo"))
    assert manifest.columns == ("photo", "file_name")
    manifest = Manifest.open(photos, None, Dialect(image="file_name"))
    assert manifest.columns == ("file_name",)
    assert rows_of(manifest)[0] == {"file_name": "a/1.jpeg"}


def test_a_folder_of_images_is_listed_once(photos) -> None:
    """Images added during a run belong to the next run; the fingerprint is that of the names."""
    manifest = Manifest.open(photos)
    before = rows_of(manifest)
    same = Manifest.open(photos).fingerprint()
    (photos / "0.png").write_bytes(png())
    assert rows_of(manifest) == before
    assert manifest.fingerprint() == same != Manifest.open(photos).fingerprint()
    assert len(rows_of(Manifest.open(photos))) == len(before) + 1


def test_links_to_images_are_rows_and_linked_folders_are_named(photos, tmp_path) -> None:
    """Following a folder that links to itself would never end."""
    (photos / "link.png").symlink_to(photos / "b.png")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "loop").symlink_to(photos)
    manifest = Manifest.open(photos)
    assert {"link.png", "gone.png"} < {row["image_url"] for row in rows_of(manifest)}
    assert manifest.rows == 7
    assert "the linked folder loop" in manifest.notes[0]
    (tmp_path / "other").symlink_to(photos)
    assert Manifest.open(tmp_path / "other").rows == 7


def test_results_inside_the_folder_are_not_restyled_again(photos) -> None:
    """This is the second `restyle run photos -o photos/out`; the same holds for a folder of Parquet files."""
    for name in ("journal.db", "run.json"):
        (photos / "out").mkdir(exist_ok=True)
        (photos / "out" / name).write_bytes(b"")
    (photos / "out" / "images").mkdir()
    (photos / "out" / "images" / "x.jpg").write_bytes(png())
    pl.DataFrame({"a": [1]}).write_parquet(photos / "out" / "results.parquet")
    manifest = Manifest.open(photos)
    assert manifest.rows == 5
    assert "the run directory out" in manifest.notes[0]
    assert "is a run directory, not a manifest" in refusal(photos / "out")
    assert Manifest.open(photos / "out" / "images").rows == 1
    pl.DataFrame({"a": [1]}).write_parquet(photos / "m.parquet")
    assert Manifest.open(photos).rows == Manifest.open(photos / "**" / "*.parquet").rows == 1
    assert len(Manifest.open(photos / "*" / "results.parquet").files) == 1
    assert "for other formats name the folder of the images" in refusal(photos / "*.png")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are arbitrary bytes only on Linux")
def test_a_file_name_that_is_not_utf8_is_a_bad_row(photos) -> None:
    """A table cannot hold such a name."""
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    batches = list(Manifest.open(photos).batches(2))
    found = {batch.first_row + index: surrogate for batch in batches for index, surrogate in batch.surrogates.items()}
    assert found == {4: ("image_url", "caf\udce9.png")}
    assert [row["image_url"] for batch in batches for row in batch.frame.to_dicts()][4] == "caf\ufffd.png"


def test_an_unreadable_folder_stops_the_command(photos, monkeypatch) -> None:
    """Otherwise its images would silently be missing."""
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{photos / 'a'} cannot be read (Permission denied); check its permissions" in refusal(photos)


def test_a_table_in_a_folder_of_images_is_reported(photos) -> None:
    """A Parquet file is the manifest, and the images are its references; other tables are mentioned in a note."""
    (photos / "prompts.csv").write_text("a,b\n1,2\n")
    manifest = Manifest.open(photos)
    assert manifest.rows == 5
    assert "1 table (name prompts.csv to read it)" in manifest.notes[0]
    pl.DataFrame({"image_url": ["a.jpg"]}).write_parquet(photos / "m.parquet")
    manifest = Manifest.open(photos)
    assert rows_of(manifest) == [{"image_url": "a.jpg"}]
    assert manifest.notes[0].startswith(
        f"1 Parquet file of {photos}; not read: 5 images, possibly referenced by its rows"
    )
    manifest = Manifest.open(photos, None, Dialect(format="images"))
    assert manifest.rows == 5
    assert "2 tables (name m.parquet to read it)" in manifest.notes[0]


# --- images with metadata ---

METADATA = {
    "metadata.csv": "file_name,text,n\na.jpg,one,1\nb.png,two,2\na/1.jpeg,,3\n./a//2.PNG,four,4\né/ü ß.webp,five,5\n",
    "metadata.jsonl": "".join(
        json.dumps({"file_name": name, "text": text, "n": n}) + "\n"
        for n, (name, text) in enumerate(
            [("a.jpg", "one"), ("b.png", "two"), ("a/1.jpeg", None), ("./a//2.PNG", "four"), ("é/ü ß.webp", "five")], 1
        )
    ),
}


@pytest.mark.parametrize("name", [*METADATA, "metadata.parquet"])
def test_metadata_gives_the_rows_of_a_folder_of_images(photos, name) -> None:
    """`file_name` names the image, other columns pass through; line numbers are those of the metadata file."""
    if name in METADATA:
        (photos / name).write_text(METADATA[name])
    else:
        pl.read_ndjson(io.StringIO(METADATA["metadata.jsonl"])).write_parquet(photos / name)
    manifest = Manifest.open(photos)
    assert manifest.columns == ("image_url", "file_name", "text", "n")
    assert [row["text"] for row in rows_of(manifest)] == ["one", "two", None, "four", "five"]
    assert [row["image_url"] for row in rows_of(manifest)] == [row["file_name"] for row in rows_of(manifest)]
    assert all(answer.image is not None for answer in resolved(manifest, "image_url"))
    assert manifest.place == photos / name
    assert manifest.has_lines == name.endswith((".csv", ".jsonl"))
    assert manifest.notes[0].startswith(f"5 images below {photos}, with the rows of {name}; not read: 3 other files")
    assert all(batch.frame.schema == manifest.schema for batch in manifest.batches(2))


def test_images_without_metadata_are_an_error(photos) -> None:
    """As in datasets: a missing caption is usually a mistake. With a row limit there is no check."""
    (photos / "metadata.csv").write_text("file_name,text\na.jpg,one\nb.png,\n,nothing\n")
    said = refusal(photos)
    assert f"3 images have no row in {photos / 'metadata.csv'}: a/1.jpeg, a/2.PNG, é/ü ß.webp; add rows" in said
    assert Manifest.open(photos, rows=1).rows == 1


def test_metadata_with_semicolons_is_read(photos) -> None:
    (photos / "metadata.csv").write_text(METADATA["metadata.csv"].replace(",", ";"))
    assert rows_of(Manifest.open(photos))[0]["text"] == "one"


def test_metadata_of_one_folder_below_is_found(photos) -> None:
    """Its names are relative to that folder; images elsewhere have no row."""
    (photos / "a" / "metadata.csv").write_text("file_name,text\n1.jpeg,one\n2.PNG,two\n")
    assert "a.jpg" not in str(Manifest.open(photos / "a").notes)
    assert Manifest.open(photos / "a").rows == 2
    assert "3 images have no row in" in refusal(photos)
    for name in ("a.jpg", "b.png", "é/ü ß.webp"):
        (photos / name).unlink()
    manifest = Manifest.open(photos)
    assert all(answer.image is not None for answer in resolved(manifest, "image_url"))
    (photos / "é" / "metadata.csv").write_text("file_name,text\n")
    assert "several metadata files (a/metadata.csv, é/metadata.csv)" in refusal(photos)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,text\na.jpg,x\n", ["no column 'file_name'", "its columns: image, text"]),
        ("file_name,image_url\na.jpg,x\n", ["the columns 'file_name' and 'image_url'", "manifest.image = 'file_name'"]),
        ("file_name,text\n", ["has a header and no rows"]),
        ("file_name,text\na.jpg,x,y\n", ["line 2"]),
    ],
)
def test_invalid_metadata_is_refused_with_a_clear_message(photos, text, words) -> None:
    (photos / "metadata.csv").write_text(text)
    said = refusal(photos)
    for word in (str(photos / "metadata.csv"), *words):
        assert word in said


def test_a_metadata_column_with_the_image_columns_name_passes_through_on_request(photos) -> None:
    (photos / "metadata.csv").write_text(METADATA["metadata.csv"].replace("text", "image_url"))
    manifest = Manifest.open(photos, None, Dialect(image="file_name"))
    assert manifest.columns == ("file_name", "image_url", "n")


# --- formats by name, and invalid sources ---


def test_a_named_format_overrides_the_file_name(tmp_path) -> None:
    """Compression is then detected from the first bytes."""
    csv, pack = b"image_url,prompt\na,b\n", gzip.compress
    lines = b'{"image_url":"a","prompt":"b"}\n'
    parquet, arrow = io.BytesIO(), io.BytesIO()
    frame = pl.DataFrame({"image_url": ["a"], "prompt": ["b"]})
    frame.write_parquet(parquet)
    frame.write_ipc(arrow)
    for named, data in {
        "csv": csv,
        "tsv": csv.replace(b",", b"\t"),
        "jsonl": lines,
        "json": b"[" + lines + b"]",
        "parquet": parquet.getvalue(),
        "arrow": arrow.getvalue(),
    }.items():
        for packed in (data, pack(data)) if named not in {"parquet", "arrow"} else (data,):
            for name in ("m", "m.txt", "m.csv", "m.parquet"):
                (tmp_path / name).write_bytes(packed)
                manifest = Manifest.open(tmp_path / name, None, Dialect(format=named))
                assert rows_of(manifest) == [{"image_url": "a", "prompt": "b"}], (named, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.xyz", ["unsupported manifest format '.xyz'", "supported: .csv, .tsv", ".json", ".parquet", ".arrow"]),
        ("m.xyz.gz", ["unsupported manifest format '.xyz.gz'"]),
        ("m.gz", ["unsupported manifest format '.gz'"]),
        ("m.parquet.gz", ["'.parquet.gz'", "unpack it"]),
        ("m.arrow.zst", ["'.arrow.zst'", "unpack it"]),
        ("m.xlsx", ["'.xlsx'", "save it as CSV or Parquet"]),
        ("m.JPG", ["'.jpg'", "name the folder of the image"]),
        ("m.zip", ["'.zip'", "unpack it"]),
        ("manifest", ["has no suffix", "Use --format"]),
        (".csv", ["has no suffix"]),
    ],
)
def test_the_message_about_an_unknown_suffix_lists_the_known_ones(tmp_path, name, words) -> None:
    (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    said = refusal(tmp_path / name)
    for word in words:
        assert word in said


REMOTE = [
    ("s3://b/x.csv", "aws s3 cp s3://b/x.csv ."),
    ("s3a://b/x.csv", "aws s3 cp"),
    ("gs://b/x.csv", "gcloud storage cp gs://b/x.csv ."),
    ("gcs://b/x.csv", "gcloud storage cp"),
    ("az://b/x", "az storage"),
    ("abfss://b@a.dfs.core.windows.net/x", "az storage"),
    ("hf://datasets/a/b", "hf download"),
    ("https://h.example/x.csv?a=b#c", "curl -LO https://h.example/x.csv?a=b#c"),
    ("HTTP://h.example/x.csv", "curl -LO"),
    ("ftp://h/x.csv", "download it and name the local copy"),
    (Path("s3://b/x.csv"), "aws s3 cp s3://b/x.csv ."),
]


@pytest.mark.parametrize(("source", "command"), REMOTE, ids=[str(row[0]) for row in REMOTE])
def test_remote_manifests_are_refused_with_a_download_command(source, command) -> None:
    said = refusal(source)
    assert "manifests in object stores and on the web are not supported yet" in said
    assert command in said
    assert "there is no manifest" not in said


def test_a_file_url_is_a_path(tmp_path) -> None:
    (tmp_path / "m x.csv").write_text("a\n1\n")
    assert Manifest.open((tmp_path / "m x.csv").as_uri()).rows == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_refused(tmp_path) -> None:
    """It can be read only once, and opening it would block."""
    os.mkfifo(tmp_path / "m.csv")
    assert "is not a regular file" in refusal(tmp_path / "m.csv")
    assert "pipe it in with -" in refusal(tmp_path / "m.csv")


def test_impossible_file_names_are_refused(tmp_path) -> None:
    assert "cannot be read (File name too long)" in refusal("x" * 5000)
    assert "there is no manifest" in refusal("a\0b.csv")


def test_a_folder_is_refused_for_single_file_formats(tmp_path) -> None:
    (tmp_path / "m.csv").write_text("a\n1\n")
    assert "is a folder, but a csv manifest is a single file" in refusal(tmp_path, Dialect(format="csv"))
    assert "has no image in it" in refusal(tmp_path, Dialect(format="images"))
    assert "has no parquet file in it" in refusal(tmp_path, Dialect(format="parquet"))


# --- memory ---

MEASURE = """
import sys
from batch.manifest.reader import Manifest

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

for source in sys.argv[1:3]:
    print(sum(len(batch.frame) for batch in Manifest.open(source).batches()), peak())
"""


def _json(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.write("[")
        for i in range(count):
            file.write(f'{{"image_url":"https://a.example/{i}","prompt":"a painting of {i}{"!" * 150}"}}, ')
        file.write('{"image_url":"x","prompt":"y"}]')


def _arrow(opened):
    def write(path: Path, count: int) -> None:
        numbers = pl.int_range(count, eager=True).cast(pl.String)
        frame = pl.DataFrame({"image_url": "https://a.example/" + numbers, "prompt": numbers + "!" * 250})
        table = pa.concat_tables([frame.to_arrow(), pa.table(frame[:1].to_arrow())]).combine_chunks()
        _write(opened, path, table, 10**9 if opened is pa.ipc.new_file else 1000)

    return write


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "write"),
    [("m.json", _json), ("file.arrow", _arrow(pa.ipc.new_file)), ("stream.arrow", _arrow(pa.ipc.new_stream))],
)
def test_memory_does_not_grow_with_the_manifest(tmp_path, name, write) -> None:
    """Fifty times as many rows, in a one-line JSON list or in one Arrow record batch, take less than 40 MiB more."""
    sources = []
    for folder, count in (("small", 5_000), ("large", 250_000)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, count)
        sources.append(str(tmp_path / folder / name))
    assert Path(sources[1]).stat().st_size > 50 * 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, *sources], capture_output=True, text=True, check=True)
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (small, large) == (5_001, 250_001)
    assert after - before < 40


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_folder_with_many_images_needs_little_memory(tmp_path) -> None:
    """Memory holds the names of one folder at a time, and 8 bytes per name in the metadata."""
    for folder in range(30):
        (tmp_path / f"{folder:02}").mkdir()
        for i in range(1000):
            (tmp_path / f"{folder:02}" / f"{i}{'x' * 100}.png").touch()
    names = [f"{folder:02}/{i}{'x' * 100}.png" for folder in range(30) for i in range(1000)]
    small = tmp_path / "00"
    done = subprocess.run([sys.executable, "-c", MEASURE, str(small), str(tmp_path)], capture_output=True, text=True)
    (_, before), (rows, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (rows, after - before < 20) == (30_000, True)
    (tmp_path / "metadata.csv").write_text("file_name\n" + "\n".join(names) + "\n")
    assert Manifest.open(tmp_path).rows == 30_000
