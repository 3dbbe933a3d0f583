"""Tables as other programs write them, through the real command: what is read, and what is said about it."""

from __future__ import annotations

import codecs
import shutil

import pytest

from tests.acceptance.command import REPOSITORY, accepted, restyle, results

ECHO = ("--engine", "echo")
CAT = REPOSITORY / "manifests" / "pictures" / "cat.jpg"


@pytest.fixture
def folder(tmp_path):
    """A folder for a manifest, with an image in it."""
    (tmp_path / "pictures").mkdir()
    shutil.copy(CAT, tmp_path / "pictures" / "cat.jpg")
    return tmp_path


SEMICOLONS = "image_url;prompt\npictures/cat.jpg;a cat; with a hat\n"
TABS = "image_url\tprompt\npictures/cat.jpg\ta cat\n"
EXCEL = 'sep=;\r\nimage_url;prompt\r\npictures/cat.jpg;"a cat; with a hat"\r\n'
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
    """In the first lines of plan and run, and in the JSON of both; `export` reads it alike."""
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
    """The sentence without them says what to set; with them the row is what was written."""
    manifest, directory = folder / "m.csv", folder / "run"
    manifest.write_bytes("image_url~prompt\npictures/cat.jpg~a café\n".encode("cp1252"))
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
