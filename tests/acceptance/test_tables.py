"""Tables of other programs, read by the real command, and the notes about them."""

from __future__ import annotations

import codecs
import shutil

import polars as pl
import pytest

from tests.acceptance.command import REPOSITORY, accepted, restyle, results

ECHO = ("--engine", "echo")
CAT = REPOSITORY / "manifests" / "images" / "cat.jpg"


@pytest.fixture
def folder(tmp_path):
    """A folder for a manifest, with an image."""
    (tmp_path / "images").mkdir()
    shutil.copy(CAT, tmp_path / "images" / "cat.jpg")
    return tmp_path


SEMICOLONS = "image_url;prompt\nimages/cat.jpg;a cat; with a hat\n"
TABS = "image_url\tprompt\nimages/cat.jpg\ta cat\n"
EXCEL = 'sep=;\r\nimage_url;prompt\r\nimages/cat.jpg;"a cat; with a hat"\r\n'
TEXTS = [
    (SEMICOLONS.encode(), "a cat; with a hat", ["separator ';' (found in the header)", "unquoted ';'"]),
    (TABS.encode(), "a cat", ["separator tab (found in the header)"]),
    (EXCEL.encode(), "a cat; with a hat", ["separator ';' (the line sep= at the top)"]),
    (
        codecs.BOM_UTF16_LE + TABS.replace("\n", "\r\n").encode("utf-16-le"),
        "a cat",
        ["separator tab (found in the header)", "encoding UTF-16 (byte order mark)"],
    ),
]


@pytest.mark.parametrize(("data", "prompt", "notes"), TEXTS, ids=["semicolons", "tabs", "excel", "utf-16"])
def test_a_csv_of_another_program_is_read_and_how_is_said(folder, data, prompt, notes):
    """The first lines of plan and run have the notes, as has the JSON of plan; `export` reads the same rows."""
    manifest, directory = folder / "m.csv", folder / "run"
    manifest.write_bytes(data)
    planned = restyle("plan", manifest)
    assert planned.code == 0, planned.text
    ran = restyle("run", manifest, "-o", directory, *ECHO)
    assert ran.code == 0, ran.text
    for out in (planned.out, ran.out):
        first = out.splitlines()[1 : 1 + len(notes)]
        assert all(line.startswith("manifest    ") and note in line for line, note in zip(first, notes, strict=True))
    as_json = restyle("plan", manifest, "--json").out
    assert all(note in as_json for note in notes)
    assert restyle("export", directory).code == 0
    assert results(directory)["prompt"].to_pylist() == [prompt]
    assert accepted(directory) == 1


def test_another_encoding_and_separator_are_named_by_settings(folder):
    """Without the settings, the message names them; with them, the row is read correctly."""
    manifest, directory = folder / "m.csv", folder / "run"
    manifest.write_bytes("image_url~prompt\nimages/cat.jpg~a café\n".encode("cp1252"))
    refused = restyle("plan", manifest)
    assert refused.code == 2
    assert "line 2: byte 0xe9 at offset" in refused.err
    assert "set manifest.encoding" in refused.err
    (folder / "c.toml").write_text("[manifest]\nencoding = 'cp1252'\nseparator = '~'\n")
    ran = restyle("run", manifest, "-o", directory, *ECHO, "-c", folder / "c.toml")
    assert ran.code == 0, ran.text
    assert "encoding cp1252 (manifest.encoding)" in ran.out
    assert results(directory)["prompt"].to_pylist() == ["a café"]
    unknown = restyle("plan", manifest, env={"RESTYLE_MANIFEST__ENCODING": "cp1252000"})
    assert unknown.code == 2
    assert "unknown text encoding 'cp1252000'" in unknown.err


# --- folders of Parquet -----------------------------------------------------------------------------------


def test_columns_of_folders_and_of_some_files_are_used_like_any_other(folder):
    """The prompt uses a partition column, an input is a column missing in one file; `export` reads the same rows."""
    table, directory = folder / "table", folder / "run"
    for animal, columns in (("cat", {"strength": [0.5]}), ("big%20dog", {})):
        (table / f"animal={animal}").mkdir(parents=True)
        frame = pl.DataFrame({"image_url": ["https://images.example/1.jpg"], **columns})
        frame.write_parquet(table / f"animal={animal}" / "part-0.parquet")
        (table / f"animal={animal}" / "_SUCCESS").touch()
    (folder / "c.toml").write_text("[manifest]\nprompt = 'a {animal}'\n")
    for source in (table, table / "*" / "*.parquet"):
        ran = restyle("run", source, "-o", directory, *ECHO, "-c", folder / "c.toml")
        assert ran.code == 0, ran.text
        assert "manifest    columns from the names of folders: 'animal'" in ran.out
        assert "manifest    column 'strength' is in 1 of 2 files, null in the others (first: part-0.parquet)" in ran.out
        assert restyle("export", directory).code == 0
        rows = results(directory).select(["animal", "prompt", "strength_manifest", "strength"]).to_pylist()
        assert [tuple(row.values()) for row in rows] == [
            ("big dog", "a big dog", None, 0.95),
            ("cat", "a cat", 0.5, 0.5),
        ]
    assert accepted(directory) == 2, "the glob gives the same jobs"


def test_invalid_files_among_ten_thousand_are_named(folder):
    """One is empty, one is not Parquet: exit code 2, and no run directory is created."""
    table = folder / "table"
    table.mkdir()
    pl.DataFrame({"image_url": ["https://a.example/1.jpg"], "prompt": ["x"]}).write_parquet(table / "0.parquet")
    data = (table / "0.parquet").read_bytes()
    for number in range(1, 10_000):
        (table / f"{number}.parquet").write_bytes(data)
    assert "rows        10,000" in restyle("plan", table).out
    (table / "4000.parquet").write_bytes(b"")
    (table / "7000.parquet").write_bytes(b"image_url,prompt\n")
    refused = restyle("run", table, "-o", folder / "run", *ECHO)
    assert refused.code == 2
    for name in ("4000.parquet cannot be read: Parquet file size is 0 bytes", "7000.parquet"):
        assert name in refused.err
    assert not (folder / "run").exists()


# --- home folders -----------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(folder):
    """A shell does not expand these: `--out=~/run`, quoted paths, cells and config values."""
    env, home = {"HOME": str(folder)}, folder
    (folder / "elsewhere").mkdir()
    (folder / "c.toml").write_text("[target]\nfaults = '~/f.toml'\n")
    (folder / "f.toml").write_text("")
    (folder / "m.csv").write_text("image_url,prompt\n~/images/cat.jpg,x\n~no-such-user/cat.jpg,x\n")
    options = {"env": env, "cwd": folder / "elsewhere"}
    ran = restyle("run", "~/m.csv", "--out=~/run", "--config=~/c.toml", *ECHO, **options)
    assert ran.code == 3, ran.text
    assert "1 done, 1 failed" in ran.out
    rows = results(home / "run").to_pylist()
    assert [row["error_type"] for row in rows] == [None, "file_not_found"]
    assert "there is no user 'no-such-user'" in rows[1]["error_message"]
    assert restyle("export", "~/run", "--out=~/copy.parquet", **options).code == 0
    assert restyle("status", "~/run", **options).code == 0
    assert (home / "copy.parquet").exists()
    assert list((folder / "elsewhere").iterdir()) == []
    refused = restyle("run", "~/m.csv", "-o", "~no-such-user/run", *ECHO, **options)
    assert refused.code == 2
    assert "there is no user 'no-such-user'" in refused.err
