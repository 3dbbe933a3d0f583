"""User errors: one message with the error, the value and the fix; no trace, no lost data, no cost."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import contextmanager

import polars as pl
import pytest

from tests.acceptance.command import (
    REPOSITORY,
    accepted,
    jobs_in,
    restyle,
    results,
    summary,
    write_manifest,
)

ECHO = ("--engine", "echo")
CAT = REPOSITORY / "manifests" / "images" / "cat.jpg"


def refused(*arguments, code: int = 2, **options) -> str:
    """Run a command that must fail; return its single error message."""
    ended = restyle(*arguments, **options)
    assert ended.code == code, ended.text
    (line,) = [line for line in ended.err.splitlines() if line.startswith("restyle: ")]
    assert not ended.err.splitlines()[-1].endswith(":")
    return line


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "m.csv", range(3))


# --- manifests as a whole ---------------------------------------------------------------------------------

MANIFESTS = [
    ("m.csv", None, ["there is no manifest", "m.csv", "did you mean m.cvs?"]),
    ("m.csv", "", ["m.csv is empty", "name the columns"]),
    ("m.csv", "image_url,prompt\n", ["has a header and no rows", "give at least one"]),
    (
        "m.csv",
        "img,prompt\na.jpg,x\n",
        ["no column 'image_url'", "did you mean 'img'?", "Its columns are: img, prompt"],
    ),
    ("m.csv", "image_url,text\na.jpg,x\n", ["no column 'prompt'", "Its columns are: image_url, text", "input.prompt"]),
    ("m.csv", "image_url,prompt\na.jpg,x,y\n", ["line 2", "3 fields where the header has 2"]),
    ("m.csv", 'image_url,prompt\na.jpg,"x\n', ["line 2", "unclosed quote"]),
    ("m.csv", b"image_url,prompt\na.jpg,caf\xe9\n", ["line 2", "not UTF-8", "save it as UTF-8", "manifest.encoding"]),
    ("m.csv", "image_url;prompt\na.jpg;x;y\n", ["line 2", "3 fields where the header has 2 (separator ';')"]),
    ("m.csv", "bild;prompt\na.jpg;x\n", ["no column 'image_url'", "Its columns are: bild, prompt"]),
    ("m.csv", "image_url;prompt;prompt\na.jpg;x;y\n", ["more than one column 'prompt'"]),
    ("m.csv", b"image_url,pro\0mpt\na.jpg,x\n", ["m.csv", "NUL"]),
    ("m.csv", "image_url,prompt\na.jpg,x\n".encode("utf-16-le"), ["NUL", 'manifest.encoding = "utf-16-le"']),
    ("m.parquet", "image_url,prompt\n", ["m.parquet", "does its suffix match"]),
]


@pytest.mark.parametrize(("name", "content", "words"), MANIFESTS, ids=lambda value: str(value)[:30])
def test_an_invalid_manifest_is_refused(tmp_path, name, content, words):
    """The message has the file, the line if there is one, and the fix."""
    if content is None:
        (tmp_path / "m.cvs").write_text("image_url,prompt\na,b\n")
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused("run", tmp_path / name, "-o", tmp_path / "run", *ECHO)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("name", ["", " "])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_manifest_without_a_name(tmp_path, command, name):
    """An unset shell variable gives an empty name, which must not mean the working directory."""
    flags = ("-o", tmp_path / "run") if command == "run" else ()
    assert "the manifest name is empty; name a file" in refused(command, name, *flags)


# --- rows -------------------------------------------------------------------------------------------------


def png_of(side: int) -> bytes:
    """Return a valid one-bit PNG of `side` x `side` pixels in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


ROWS = [
    # image, strength, steps, seed, error type, words of the message
    ("cat.jpg", "high", "", "", "float_parsing", ["strength is 'high'", "a number from 0.01 to 1"]),
    ("cat.jpg", "1.5", "", "", "less_than_equal", ["strength is '1.5'", "a number from 0.01 to 1"]),
    ("cat.jpg", "", "9", "", "greater_than_equal", ["num_inference_steps is '9'", "from 10 to 50"]),
    ("cat.jpg", "", "10.5", "", "int_parsing", ["num_inference_steps is '10.5'", "an integer"]),
    ("cat.jpg", "", "", "-1", "greater_than_equal", ["seed is '-1'"]),
    ("cat.jpg", "nan", "", "", "finite_number", ["strength is 'nan'"]),
    ("nowhere.jpg", "", "", "", "file_not_found", ["nowhere.jpg", "relative paths start at the manifest's folder"]),
    ("folder", "", "", "", "is_a_folder", ["folder", "name an image in it"]),
    ("", "", "", "", "missing", ["the cell is empty", "give a URL, a path or an image"]),
    ("ftp://host/a.jpg", "", "", "", "unsupported_scheme", ["ftp://host/a.jpg", "give an http(s) URL"]),
    ("notes.txt", "", "", "", "image_load_error", ["notes.txt", "JPEG, PNG, WebP"]),
    ("huge.png", "", "", "", "image_too_large", ["huge.png", "400.0 megapixels", "max_image_megapixels is 100"]),
    ("cut.jpg", "", "", "", "image_load_error", ["damaged or incomplete"]),
    ("data:image/png;base64,@@@", "", "", "", "data_uri", ["is not valid base64"]),
]


def test_bad_rows_are_data_and_the_good_ones_are_done(tmp_path):
    """Each bad row is a failed row with an error type and a message; the other rows run."""
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "huge.png").write_bytes(png_of(20_000))
    (tmp_path / "folder").mkdir()
    manifest, directory = tmp_path / "m.csv", tmp_path / "run"
    lines = [f'"{image}",a cat,{strength},{steps},{seed}' for image, strength, steps, seed, _, _ in ROWS]
    lines.append("cat.jpg,a good cat,,,")
    manifest.write_text("image_url,prompt,strength,num_inference_steps,seed\n" + "\n".join(lines) + "\n")

    planned = restyle("plan", manifest)
    assert planned.code == 0
    for number, (image, *_) in enumerate(ROWS[:-2], 2):
        assert f"{manifest}:{number} " in planned.out, image

    ended = restyle("run", manifest, "-o", directory, *ECHO)
    assert ended.code == 3, ended.text
    assert f"1 done, {len(ROWS)} failed" in ended.out
    (failed,) = [line for line in ended.out.splitlines() if line.startswith("failed with: ")]
    kinds = Counter(kind for *_, kind, _ in ROWS)
    named = sum(count for _, count in kinds.most_common(5))
    assert failed.endswith(f" and {len(kinds) - 5} other kinds ({len(ROWS) - named} rows)")
    assert "--retry-failed submits failed jobs again" in ended.out
    rows = results(directory).to_pylist()
    for row, (image, *_, kind, words) in zip(rows, ROWS, strict=False):
        assert (row["status"], row["error_type"]) == ("failed", kind), (image, row["error_message"])
        assert row["images"] is None
        for word in words:
            assert word in row["error_message"], row["error_message"]
    assert rows[-1]["status"] == "done"
    assert accepted(directory) == 1, "nothing was submitted for a bad row"


def test_failed_rows_keep_every_input_that_could_be_read(tmp_path):
    """This holds for failed and skipped rows; the message has all problems of the row."""
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    (tmp_path / "m.csv").write_text(
        "image_url,prompt,strength,guidance_scale,seed,note\n"
        "cat.jpg,bad seed,0.5,2,seven,a\n"
        "nowhere.jpg,no image,0.6,,8,b\n"
        "nowhere.jpg,,7,2,x,c\n"
    )
    for policy, status in (("fail", "failed"), ("skip", "skipped")):
        directory = tmp_path / policy
        restyle("run", tmp_path / "m.csv", "-o", directory, *ECHO, "--on-bad-row", policy)
        rows = results(directory).to_pylist()
        assert {row["status"] for row in rows} == {status}
        names = ("image_url", "prompt", "strength", "guidance_scale", "seed", "num_images", "note")
        assert [tuple(row[name] for name in names) for row in rows] == [
            ("cat.jpg", "bad seed", 0.5, 2.0, None, 1, "a"),
            ("nowhere.jpg", "no image", 0.6, 3.5, 8, 1, "b"),
            ("nowhere.jpg", None, None, 2.0, None, 1, "c"),
        ]
        for words in ("there is no file", "input.prompt", "strength is '7'", "seed is 'x'"):
            assert words in rows[2]["error_message"]


def test_text_that_no_service_takes_is_a_bad_row(tmp_path):
    """The rows have a prompt of ten megabytes, or a NUL in a prompt, URL or path; none is submitted."""
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    rows = [
        ("https://images.example/1.jpg", "x" * 10_000_000, "string_too_long", "10,000,000 characters"),
        ("https://images.example/1.jpg", "a\0b", "string_nul", "NUL"),
        ("https://images.example/\0.jpg", "x", "unsupported_scheme", "NUL"),
        ("c\0at.jpg", "x", "unreadable", "cannot be read"),
        ("cat.jpg", "good", None, ""),
    ]
    (tmp_path / "m.csv").write_text("image_url,prompt\n" + "".join(f"{image},{prompt}\n" for image, prompt, *_ in rows))
    lines = [json.dumps({"image_url": image, "prompt": prompt}) for image, prompt, *_ in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    frame = pl.DataFrame({"image_url": [row[0] for row in rows], "prompt": [row[1] for row in rows]})
    frame.write_parquet(tmp_path / "m.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        directory = tmp_path / kind
        ended = restyle("run", tmp_path / f"m.{kind}", "-o", directory, *ECHO)
        assert ended.code == 3, ended.text
        assert len(ended.text) < 3000
        found = results(directory).select(["status", "error_type", "error_message"]).to_pylist()
        assert [row["error_type"] for row in found] == [row[2] for row in rows]
        assert all(words in (row["error_message"] or "") for row, (*_, words) in zip(found, rows, strict=True))
        assert accepted(directory) == 1


JSON_ROWS = [
    # other keys of the object, error type, words of the message
    (r'"prompt":"\ud83d half"', "string_unicode", [r"prompt is '\ud83d half'", "unpaired surrogate"]),
    (r'"prompt":"a","note":"\udc00"', "string_unicode", [r"note is '\udc00'"]),
    ('"prompt":"a","seed":[1]', "int_parsing", ["seed is '[1]'", "an integer"]),
    ('"prompt":"a","seed":true', "int_parsing", ["seed is 'true'"]),
    ('"prompt":"a","seed":9223372036854775808', "less_than_equal", ["seed is '9223372036854775808'"]),
    (f'"prompt":"a","seed":{"1" * 41}', "less_than_equal", ["seed is '11111"]),
    ('"prompt":"a","seed":1.5', "int_parsing", ["seed is '1.5'"]),
    ('"prompt":"a","strength":1e400', "finite_number", ["strength is '1e400'"]),
]


def test_bad_values_of_json_are_bad_rows_and_change_no_good_one(tmp_path):
    """Invalid values are reported with their lines; a seed beyond 2^53 in another row keeps its exact value."""
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    good = '"prompt":"a good cat \\ud83d\\ude00","seed":9007199254740993,"meta":{}'
    lines = ['{"image_url":"cat.jpg",' + keys + "}" for keys in [*(keys for keys, _, _ in JSON_ROWS), good]]
    manifest, directory = tmp_path / "m.jsonl", tmp_path / "run"
    manifest.write_text("\n".join(lines))

    planned = restyle("plan", manifest)
    assert planned.code == 0, planned.text
    for number in range(1, len(lines)):
        assert f"{manifest}:{number} " in planned.out
    assert restyle("run", manifest, "-o", directory, *ECHO).code == 3
    rows = results(directory).to_pylist()
    for row, (keys, kind, words) in zip(rows, JSON_ROWS, strict=False):
        assert (row["status"], row["error_type"]) == ("failed", kind), (keys, row["error_message"])
        for word in words:
            assert word in row["error_message"]
    assert (rows[-1]["status"], rows[-1]["seed"]) == ("done", 2**53 + 1)
    assert rows[-1]["prompt"] == "a good cat \U0001f600"
    assert accepted(directory) == 1


def test_true_is_not_a_seed(tmp_path):
    """This holds even if the whole column is boolean: pydantic would convert true to 1."""
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    (tmp_path / "m.jsonl").write_text('{"image_url":"cat.jpg","prompt":"a","seed":true,"enable_safety_checker":true}')
    assert "m.jsonl:1 seed: seed is 'true'; it must be an integer" in restyle("plan", tmp_path / "m.jsonl").out


def test_bad_rows_can_be_skipped(tmp_path, manifest):
    """With `--on-bad-row skip` a bad row does not affect the exit code and is `skipped` in the results."""
    manifest.write_text(manifest.read_text() + "x,no-such-file.jpg,y\n")
    ended = restyle("run", manifest, "-o", tmp_path / "run", *ECHO, "--on-bad-row", "skip")
    assert ended.code == 0, ended.text
    assert results(tmp_path / "run")["status"].to_pylist() == ["done"] * 3 + ["skipped"]


# --- config and flags -------------------------------------------------------------------------------------

CONFIGS = [
    ("[limits]\nbudget = 1\n", ["unknown key limits.budget", "did you mean limits.budget_usd?"]),
    ("[limits\n", ["c.toml is not TOML", "line 1"]),
    ("[input]\nstrength = 2.0\n", ["input.strength = 2.0", "less than or equal to 1"]),
    ("[sweep]\nstrenght = [0.5]\n", ["'strenght' cannot be swept", "did you mean 'strength'?"]),
    ('[target]\nname = "falai"\n', ["invalid target 'falai'", "local, fal, or a URL"]),
]


@pytest.mark.parametrize(("text", "words"), CONFIGS, ids=lambda value: str(value)[:20])
def test_an_invalid_config_is_refused(tmp_path, manifest, text, words):
    """The message has the file, the key and the nearest known key; no run directory is created."""
    (tmp_path / "c.toml").write_text(text)
    sentence = refused("run", manifest, "-c", tmp_path / "c.toml", "-o", tmp_path / "run")
    for word in ["c.toml", *words]:
        assert word in sentence
    assert not (tmp_path / "run").exists()


FLAGS = [
    (["--bugdet", "3"], ["--bugdet", "Did you mean --budget?", "restyle run --help"]),
    (["--budget", "many"], ["--budget", "many"]),
    (["--max-in-flight", "0"], ["max_in_flight"]),
    (["--engine", "dalle"], ["--engine", "dalle", "preview"]),
    (["-c", "nowhere.toml"], ["there is no config file nowhere.toml", "configs/"]),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=lambda value: str(value)[:20])
def test_an_invalid_flag_is_refused(tmp_path, manifest, flags, words):
    """The message has the flag, its value and the fix."""
    sentence = refused("run", manifest, "-o", tmp_path / "run", *flags)
    for word in words:
        assert word in sentence


def test_a_misspelt_variable_is_refused(tmp_path, manifest):
    """Otherwise a misspelt limit would silently have no effect."""
    sentence = refused("run", manifest, "-o", tmp_path / "run", env={"RESTYLE_LIMITS__BUDGET": "5"})
    assert "unknown environment variable RESTYLE_LIMITS__BUDGET; did you mean RESTYLE_LIMITS__BUDGET_USD?" in sentence


@pytest.mark.parametrize("text", [None, '[[fault]]\nat = "sbumit"\n'], ids=["none", "wrong"])
def test_a_faults_file_that_cannot_be_used_is_refused_by_plan_and_run(tmp_path, manifest, text):
    """Both give the same message before the run directory is created."""
    if text is not None:
        (tmp_path / "f.toml").write_text(text)
    faults = ("--faults", tmp_path / "f.toml", *ECHO)
    sentence = refused("plan", manifest, *faults)
    assert "f.toml" in sentence
    assert refused("run", manifest, "-o", tmp_path / "run", *faults) == sentence
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_run_directory(manifest):
    """`-o` has no default."""
    assert "--out" in refused("run", manifest)


def test_the_message_about_an_unknown_command_lists_the_commands():
    """It also mentions `--help`."""
    sentence = refused("rum")
    assert '"rum"' in sentence
    assert "run" in sentence
    assert "restyle --help" in sentence


# --- run directories --------------------------------------------------------------------------------------


def test_another_config_is_refused_until_it_is_accepted(tmp_path, manifest):
    """The message names the difference; `--new-config` continues and keeps finished jobs."""
    directory, command = tmp_path / "run", ("run", manifest, "-o", tmp_path / "run", *ECHO)
    assert restyle(*command).code == 0
    before = results(directory)
    (tmp_path / "c.toml").write_text("[input]\nstrength = 0.5\n")
    sentence = refused(*command, "-c", tmp_path / "c.toml")
    planned = restyle("plan", *command[1:], "-c", tmp_path / "c.toml")
    assert planned.code == 0, planned.text
    assert "to do       3" in planned.out, "it still shows what --new-config would do"
    assert planned.out.splitlines()[-1] == sentence.replace("restyle: ", "`restyle run` refuses this: ")
    assert "refuses this" not in restyle("plan", *command[1:]).out
    assert "input.strength was None, is 0.5" in sentence
    assert "--new-config" in sentence
    assert results(directory).equals(before)

    assert restyle(*command, "-c", tmp_path / "c.toml", "--new-config").code == 0
    assert set(results(directory)["strength"].to_pylist()) == {0.5}
    assert (accepted(directory), jobs_in(directory)) == (6, 6)
    assert restyle(*command, "--new-config").code == 0
    assert results(directory).equals(before)
    assert accepted(directory) == 6


def test_another_kind_of_target_is_always_refused(tmp_path, manifest):
    """Results of different services are never mixed, even with `--new-config`."""
    command = ("run", manifest, "-o", tmp_path / "run", *ECHO)
    assert restyle(*command).code == 0
    for more in ((), ("--new-config",)):
        sentence = refused(*command, "--target", "fal", "--yes", *more)
        assert "was made with target local" in sentence
        assert "name another folder with -o" in sentence


def test_a_file_or_a_strange_folder_as_run_directory(tmp_path, manifest):
    """Files of other programs are not modified."""
    (tmp_path / "file").write_text("mine")
    for command in ("run", "plan"):
        sentence = refused(command, manifest, "-o", tmp_path / "file", *ECHO)
        assert "is a file; name a folder with -o" in sentence
        assert (tmp_path / "file").read_text() == "mine"
        assert "is not empty and not a run directory" in refused(command, manifest, "-o", tmp_path, *ECHO)


def test_an_unwritable_run_directory_is_refused(manifest):
    """In `/proc`, no user can create files, not even root."""
    sentence = refused("run", manifest, "-o", "/proc/restyle/run", *ECHO)
    assert "/proc/restyle/run cannot be written" in sentence
    assert "name another folder with -o" in sentence


def test_a_journal_of_a_newer_version_is_left_alone(tmp_path, manifest):
    """An older version must not write to a newer journal."""
    directory, command = tmp_path / "run", ("run", manifest, "-o", tmp_path / "run", *ECHO)
    assert restyle(*command).code == 0
    connection = sqlite3.connect(directory / "journal.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (directory / "journal.db").read_bytes()
    for arguments in (command, ("status", directory), ("export", directory)):
        sentence = refused(*arguments)
        assert "was written by a newer restyle" in sentence
        assert "version 99" in sentence
        assert "upgrade" in sentence
    assert (directory / "journal.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all" * 500, None], ids=["not SQLite", "another program's"])
def test_a_foreign_file_named_like_the_journal_is_left_alone(tmp_path, manifest, content):
    """Another program may have created the file."""
    directory = tmp_path / "run"
    directory.mkdir()
    if content is None:
        connection = sqlite3.connect(directory / "journal.db")
        connection.execute("CREATE TABLE diary (entry)")
        connection.close()
    else:
        (directory / "journal.db").write_bytes(content)
    before = (directory / "journal.db").read_bytes()
    for arguments in (("run", manifest, "-o", directory, *ECHO), ("status", directory)):
        assert "is not a restyle journal; name another folder with -o" in refused(*arguments)
    assert (directory / "journal.db").read_bytes() == before


# --- serve ------------------------------------------------------------------------------------------------

SERVED = [
    (["--slots", "0"], ["invalid --slots 0", "an integer >= 1"]),
    (["--port", "99999"], ["invalid --port 99999", "0 (any free port) to 65535"]),
    (["--port", "-1"], ["invalid --port -1"]),
    (["--host", "\u00fc..b"], ["invalid --host '\u00fc..b'"]),
    (["--host", ""], ["--host is empty"]),
    (["--retention", "soon"], ["--retention: 'soon' is not a duration"]),
    (["--engine", "echo", "--service-time", "-1"], ["--service-time: '-1' is not a duration"]),
    (["--data-dir", "file"], ["file is a file; --data-dir must be a folder"]),
    (["--data-dir", "file/below"], ["cannot use the data dir file/below", "--data-dir"]),
    (["--data-dir", "/proc/restyle"], ["cannot use the data dir /proc/restyle", "--data-dir"]),
    (["--data-dir", "strange"], ["cannot use the data dir strange", "strange/files"]),
]


@pytest.mark.parametrize(("flags", "words"), SERVED, ids=lambda value: " ".join(value)[:40])
def test_a_server_that_cannot_work_says_why_and_does_not_start(tmp_path, flags, words):
    """Numbers out of range, invalid hosts, unusable data folders: the message has the value and the fix."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "files").write_text("mine")
    port = () if "--port" in flags else ("--port", "0")
    sentence = refused("serve", *port, *flags, cwd=tmp_path, timeout=20)
    for word in words:
        assert word in sentence


def test_a_server_without_room_says_so(tmp_path):
    """The exit code is 4, as for a run with a full disk: the input is valid."""
    with small_disk(tmp_path, "16k") as disk:
        (disk / "ballast").write_bytes(bytes(8192))
        sentence = refused("serve", "--port", "0", "--data-dir", disk / "data", code=4, timeout=20)
    assert "room" in sentence


PLACES = [
    ("x.csv", ["x.csv does not end in .parquet", "write_ndjson"]),
    ("x", ["x does not end in .parquet"]),
    ("nowhere/x.parquet", ["there is no folder", "nowhere; create it"]),
    ("m.parquet/x.parquet", ["there is no folder", "m.parquet; create it"]),
    ("folder", ["is a folder; name a file with -o", "folder/results.parquet"]),
    ("folder.parquet", ["is a folder; name a file with -o"]),
    ("m.parquet", ["is the manifest", "name another file with -o"]),
    ("", ["is a folder"]),
]


def test_an_invalid_destination_of_an_export_is_refused(tmp_path):
    """This is a user error, not a stopped run: exit 2, and no file changes."""
    manifest = tmp_path / "m.parquet"
    pl.read_csv(write_manifest(tmp_path / "m.csv", range(3))).write_parquet(manifest)
    assert restyle("run", manifest, "-o", tmp_path / "run", *ECHO).code == 0
    for folder in ("folder", "folder.parquet"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.rglob("*")), manifest.read_bytes()
    for name, words in PLACES:
        sentence = refused("export", tmp_path / "run", "-o", tmp_path / name if name else "")
        for word in words:
            assert word in sentence, sentence
    assert (sorted(tmp_path.rglob("*")), manifest.read_bytes()) == before


def test_an_export_among_the_files_of_its_manifest(tmp_path):
    """In a folder of Parquet files an export may not replace a file, nor add one, which would become a part."""
    folder = tmp_path / "manifest"
    folder.mkdir()
    pl.read_csv(write_manifest(tmp_path / "m.csv", range(3))).write_parquet(folder / "a.parquet")
    before = (folder / "a.parquet").read_bytes()
    assert restyle("run", folder, "-o", tmp_path / "run", *ECHO).code == 0
    assert "is the manifest" in refused("export", tmp_path / "run", "-o", folder / "a.parquet")
    (folder / "deeper").mkdir()
    for place in (folder / "b.parquet", folder / "deeper" / "b.parquet"):
        assert "would become part of the manifest" in refused("export", tmp_path / "run", "-o", place)
    assert "File name too long" in refused("export", tmp_path / "run", "-o", tmp_path / f"{'x' * 300}.parquet")
    assert list(folder.rglob("*.parquet")) == [folder / "a.parquet"]
    assert (folder / "a.parquet").read_bytes() == before


def test_a_column_that_no_table_can_hold_is_carried_as_text(tmp_path):
    """With two hundred nested lists the results could not be written after the jobs were paid for."""
    manifest = tmp_path / "m.jsonl"
    deep = "[" * 200 + "1" + "]" * 200
    manifest.write_text(f'{{"image_url": "https://images.example/1.jpg", "prompt": "one", "x": {deep}}}\n')
    ended = restyle("run", manifest, "-o", tmp_path / "run", *ECHO)
    assert ended.code == 0, ended.text
    assert results(tmp_path / "run").to_pylist()[0]["x"] == deep


def test_a_plan_accepts_the_directory_of_an_interrupted_first_start(tmp_path, manifest):
    """It has only an empty journal; a run would start there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "journal.db").touch()
    assert restyle("plan", manifest, "-o", tmp_path / "run", *ECHO).code == 0
    assert restyle("run", manifest, "-o", tmp_path / "run", *ECHO).code == 0


def test_the_advice_for_another_format_works(tmp_path, manifest):
    """The message contains a working line of Python."""
    assert restyle("run", manifest, "-o", tmp_path / "run", *ECHO).code == 0
    sentence = refused("export", tmp_path / "run", "-o", tmp_path / "x.csv")
    assert restyle("export", tmp_path / "run", "-o", tmp_path / "x.parquet").code == 0
    code = sentence.partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done"] * 3
    assert all(line["images"] for line in lines)


# --- disks ------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(tmp_path, size):
    """Mount a tmpfs of the given size; skip the test without the permission."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.skipif(os.name == "nt", reason="no tmpfs on Windows")
@pytest.mark.parametrize("size", ["1m", "3m"])
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, size):
    """Exit 4 with a message; after space is freed, the same command completes and pays for nothing twice."""
    manifest = write_manifest(tmp_path / "m.csv", range(300))
    with small_disk(tmp_path, size) as disk:
        command = ("run", manifest, "-o", disk / "run", *ECHO)
        sentence = refused(*command, code=4)
        assert "space" in sentence or "room" in sentence
        assert "run the same command again" in sentence
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert restyle(*command).code == 0
        assert accepted(disk / "run") == jobs_in(disk / "run", "done") == 300


def test_a_read_only_disk_is_reported(tmp_path, manifest):
    """The run does not start."""
    with small_disk(tmp_path, "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        sentence = refused("run", manifest, "-o", disk / "run", *ECHO)
    assert "cannot be written (Read-only file system); name another folder with -o" in sentence


@pytest.mark.skipif(os.name == "nt", reason="no ulimit on Windows")
@pytest.mark.parametrize("blocks", [200, 1200])
def test_a_disk_that_fails_in_the_middle_stops_the_run_and_loses_nothing(tmp_path, blocks):
    """A limit on the file size simulates a quota without root permissions."""
    manifest = write_manifest(tmp_path / "m.csv", range(300))
    command = ("run", manifest, "-o", tmp_path / "run", *ECHO)
    sentence = refused(*command, code=4, through=("sh", "-c", f'ulimit -f {blocks}; exec "$0" "$@"'))
    assert "run/journal.db" in sentence or "run/endpoint" in sentence  # the first to hit the limit
    assert "durable" in sentence.lower()
    assert restyle(*command).code == 0
    assert accepted(tmp_path / "run") == jobs_in(tmp_path / "run", "done") == 300


# --- money ------------------------------------------------------------------------------------------------


def test_fal_off_a_terminal_asks_for_a_yes_and_sends_nothing(tmp_path, manifest):
    """The plan's cost is shown; without `--yes` or a budget nothing is submitted."""
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", "fal", env={"FAL_KEY": "id:secret"})
    assert ended.code == 2
    assert ended.out.startswith("target: fal (fal-ai/flux/dev/image-to-image), $0.03 a megapixel")
    assert "cost" in ended.out
    assert "this run would cost about $0.19 (at most $0.27) for 3 jobs; add --yes or --budget USD" in ended.err
    assert "secret" not in ended.text
    assert jobs_in(tmp_path / "run") == 0


@pytest.mark.parametrize("agreed", [("--yes",), ("--budget", "1")])
def test_the_message_about_a_missing_key_explains_how_to_set_it(tmp_path, manifest, agreed):
    """Nothing is sent."""
    sentence = refused("run", manifest, "-o", tmp_path / "run", "--target", "fal", *agreed)
    assert "FAL_KEY is not set" in sentence
    assert "--target local" in sentence
    assert jobs_in(tmp_path / "run") == 0


@pytest.mark.parametrize("key", ["id:sec\nret", "id:s\u00e9cret"])
def test_a_key_that_no_header_can_carry_is_refused(tmp_path, manifest, key):
    """A mangled key is detected before the first submit and is not shown."""
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", "fal", "--yes", env={"FAL_KEY": key})
    assert ended.code == 2, ended.text
    assert "FAL_KEY contains a line break or an invalid character" in ended.err
    assert key not in ended.text
    assert jobs_in(tmp_path / "run") == 0


def test_a_run_waits_for_an_unreachable_target_until_the_deadline(tmp_path, manifest):
    """Nothing was sent, so every job is pending; the message has the reason."""
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", "http://127.0.0.1:9", "--deadline", "1s")
    assert ended.code == 4, ended.text
    assert "connect" in ended.err
    assert (summary(tmp_path / "run")["pending"], summary(tmp_path / "run")["unknown"]) == (3, 0)
