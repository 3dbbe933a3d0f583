"""Manifests of every format in the command: JSON lists, Arrow, saved datasets, folders of images, standard input."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pytest

from tests.acceptance.command import REPOSITORY, accepted, restyle, results, started, summary, wait_for

ECHO = ("--engine", "echo")
IMAGES = REPOSITORY / "manifests" / "images"
ROWS = [
    {"image_url": "https://images.example/1.jpg", "prompt": "one", "n": 1},
    {"image_url": "https://images.example/2.jpg", "prompt": "two", "n": 2},
    {"image_url": "nowhere.jpg", "prompt": "three", "n": 3},
]


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_jsonl(path):
    path.write_text("\n".join(map(json.dumps, ROWS)))


def write_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


FILES = {
    "m.json": write_json,
    "lines.json": write_jsonl,
    "m.arrow": write_stream,
    "m.feather": lambda path: pl.DataFrame(ROWS).write_ipc(path, compression="lz4"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind_is_planned_run_and_taken_up_again(tmp_path, name):
    """Bad rows are reported with their place, columns keep their types, and nothing is paid for twice."""
    FILES[name](tmp_path / name)
    place = {"m.json": 12, "lines.json": 3}.get(name, "row 2")
    planned = restyle("plan", tmp_path / name)
    assert planned.code == 0, planned.text
    assert f"{tmp_path / name}:{place} image_url: there is no file" in planned.out
    for _ in range(2):
        ended = restyle("run", tmp_path / name, "-o", tmp_path / "run", *ECHO)
        assert ended.code == 3, ended.text
        table = results(tmp_path / "run")
        assert table["status"].to_pylist() == ["done", "done", "failed"]
        assert (table["n"].to_pylist(), table["n"].type) == ([1, 2, 3], pa.int64())
    assert accepted(tmp_path / "run") == 2
    exported = restyle("export", tmp_path / "run")
    assert exported.code == 0, exported.text


def test_a_dataset_saved_to_disk_is_run_with_its_images(tmp_path):
    """Embedded images are uploaded; a dataset with several splits is refused."""
    import datasets

    cat, dog = (str(IMAGES / name) for name in ("cat.jpg", "tree.jpg"))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    train = datasets.Dataset.from_dict({"image": [cat, dog], "text": ["a cat", None]}, features=features)
    datasets.DatasetDict({"train": train, "test": train}).save_to_disk(tmp_path / "saved")
    config = tmp_path / "c.toml"
    config.write_text('[manifest]\nimage = "image"\nprompt = "text"\n')
    refused = restyle("run", tmp_path / "saved", "-o", tmp_path / "run", "-c", config, *ECHO)
    assert refused.code == 2
    assert f"the splits train, test; name one split, for example {tmp_path / 'saved' / 'train'}" in refused.err
    flags = ("-o", tmp_path / "run", "-c", config, "--prompt", "an animal", *ECHO)
    ended = restyle("run", tmp_path / "saved" / "train", *flags)
    assert ended.code == 0, ended.text
    table = results(tmp_path / "run")
    assert table["prompt"].to_pylist() == ["a cat", "an animal"]
    assert [image["path"] for image in table["image"].to_pylist()] == ["cat.jpg", "tree.jpg"]


# --- folders of images ---


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(IMAGES / "cat.jpg", folder / "b.jpg")
    shutil.copy(IMAGES / "tree.jpg", folder / "more" / "a.jpg")
    (folder / "readme.txt").write_text("not an image")
    return folder


def test_a_folder_of_images_with_one_prompt_for_all(photos):
    """The run directory may be inside the folder: results are not restyled again."""
    command = ("run", photos, "-o", photos / "out", *ECHO)
    refused = restyle(*command)
    assert refused.code == 2
    assert f"the images of {photos} have no prompts; set one prompt for all with --prompt" in refused.err
    assert not (photos / "out").exists()
    for left_out in ("", ", the run directory out"):
        ended = restyle(*command, "--prompt", "as a watercolor")
        assert ended.code == 0, ended.text
        assert f"2 images below {photos}; not read: 1 other file (1 .txt){left_out}\n" in ended.out
    table = results(photos / "out")
    assert table["image_url"].to_pylist() == ["b.jpg", "more/a.jpg"]
    assert table["file_name"].to_pylist() == ["b.jpg", "a.jpg"]
    assert set(table["prompt"].to_pylist()) == {"as a watercolor"}
    assert accepted(photos / "out") == 2
    (photos / "c.jpg").write_bytes((IMAGES / "boat.jpg").read_bytes())
    assert restyle(*command, "--prompt", "as a watercolor").code == 0
    assert (accepted(photos / "out"), summary(photos / "out")["rows"]) == (3, 3)


def test_images_with_metadata_have_their_own_prompts(photos, tmp_path):
    """Without a column `prompt`, `text` is used; line numbers are those of the metadata file."""
    metadata = photos / "metadata.csv"
    metadata.write_text("file_name,text,license\nb.jpg,a cat,cc0\nmore/a.jpg,,by\ngone.jpg,a ghost,\n")
    planned = restyle("plan", photos, "--json")
    assert json.loads(planned.out)["manifest_notes"][0].startswith(
        f"2 images below {photos}, with the rows of metadata."
    )
    planned = restyle("plan", photos)
    assert f"{metadata}:3 text: " in planned.out
    assert f"{metadata}:4 image_url: there is no file" in planned.out
    ended = restyle("run", photos, "-o", tmp_path / "run", "--prompt", "a cup", *ECHO)
    assert ended.code == 3, ended.text
    table = results(tmp_path / "run")
    assert table["status"].to_pylist() == ["done", "done", "failed"]
    assert table["prompt"].to_pylist()[:2] == ["a cat", "a cup"]
    assert table["license"].to_pylist() == ["cc0", "by", None]
    metadata.write_text("file_name,text\nb.jpg,a cat\n")
    refused = restyle("run", photos, "-o", tmp_path / "other", *ECHO)
    assert refused.code == 2
    assert f"1 image has no row in {metadata}: more/a.jpg" in refused.err


def test_the_prompt_of_the_command_is_for_rows_without_one(tmp_path):
    """`--prompt` sets `input.prompt`: a row's own prompt takes precedence, and the column may be missing."""
    (tmp_path / "m.csv").write_text("image_url,prompt\nhttps://a.example/1.jpg,own\nhttps://a.example/2.jpg,\n")
    (tmp_path / "bare.csv").write_text("image_url\nhttps://a.example/1.jpg\n")
    assert restyle("run", tmp_path / "m.csv", "-o", tmp_path / "a", "--prompt", "all", *ECHO).code == 0
    assert results(tmp_path / "a")["prompt"].to_pylist() == ["own", "all"]
    assert restyle("run", tmp_path / "bare.csv", "-o", tmp_path / "b", "--prompt", "all", *ECHO).code == 0
    assert results(tmp_path / "b")["prompt"].to_pylist() == ["all"]
    changed = restyle("run", tmp_path / "bare.csv", "-o", tmp_path / "b", "--prompt", "other", *ECHO)
    assert changed.code == 2
    assert "input.prompt was 'all', is 'other'" in changed.err


# --- standard input ---


def piped(path) -> dict:
    """Return options of `restyle()` that redirect standard input from a file."""
    return {"through": ("sh", "-c", f'exec "$@" < "{path}"', "sh")}


CSV = "image_url,prompt\nhttps://images.example/1.jpg,one\nb.jpg,two\n"


def test_a_manifest_from_standard_input_is_kept_and_taken_up_again(photos, tmp_path):
    """The same bytes resume the run; export and reconcile use the copy, even after the run directory moved."""
    (tmp_path / "in").write_text(CSV)
    run = tmp_path / "run"
    for _ in range(2):
        ended = restyle("run", "-", "-o", run, *ECHO, cwd=photos, **piped(tmp_path / "in"))
        assert ended.code == 0, ended.text
    assert accepted(run) == 2
    assert (run / "stdin.csv").read_text() == CSV
    facts = json.loads((run / "run.json").read_text())["manifest"]
    assert (facts["source"], facts["folder"]) == (str(run / "stdin.csv"), str(photos))
    run = run.rename(tmp_path / "moved")
    for command in ("export", "reconcile"):
        ended = restyle(command, run)
        assert ended.code == 0, ended.text
        assert results(run)["status"].to_pylist() == ["done", "done"]


def test_other_bytes_from_standard_input_are_a_manifest_that_has_changed(tmp_path):
    """Unchanged rows stay done; an invalid manifest does not replace the kept one."""
    source, run = tmp_path / "in", tmp_path / "run"
    command = ("run", "-", "-o", run, *ECHO)
    source.write_text("image_url,prompt\nhttps://images.example/1.jpg,one\n")
    assert restyle(*command, **piped(source)).code == 0
    source.write_text(source.read_text() + "https://images.example/2.jpg,two\n")
    ended = restyle(*command, **piped(source))
    assert "1 job to do, 1 done before" in ended.out
    kept = (run / "stdin.csv").read_text()
    assert kept == source.read_text()
    source.write_text("image_url,prompt\nhttps://images.example/1.jpg,one,too many\n")
    ended = restyle(*command, **piped(source))
    assert ended.code == 2
    assert "restyle: standard input, line 2: 3 fields where the header has 2" in ended.err
    assert (run / "stdin.csv").read_text() == kept


def test_standard_input_in_another_format_needs_the_format_flag(tmp_path):
    """The message names the detected format; problems are shown with their lines."""
    (tmp_path / "in").write_text('{"image_url":"https://images.example/1.jpg","prompt":"x"}\n{"image_url":null}\n')
    refused = restyle("plan", "-", **piped(tmp_path / "in"))
    assert refused.code == 2
    assert "standard input is read as CSV but looks like jsonl; use --format jsonl" in refused.err
    planned = restyle("plan", "-", "--format", "jsonl", **piped(tmp_path / "in"))
    assert planned.code == 0, planned.text
    assert "standard input:2 image_url: " in planned.out
    buffer = io.BytesIO()
    pl.DataFrame(ROWS[:2]).write_parquet(buffer)
    (tmp_path / "in").write_bytes(buffer.getvalue())
    assert "looks like parquet" in restyle("plan", "-", **piped(tmp_path / "in")).err
    ended = restyle("run", "-", "--format", "parquet", "-o", tmp_path / "run", *ECHO, **piped(tmp_path / "in"))
    assert ended.code == 0, ended.text
    assert (tmp_path / "run" / "stdin.parquet").exists()


def test_standard_input_without_a_manifest_is_refused(tmp_path):
    """It may be empty, closed, or a terminal, on which the command would wait for input."""
    run = ("run", "-", "-o", tmp_path / "run", *ECHO)
    empty = restyle(*run)
    assert (empty.code, empty.err.count("\n")) == (2, 1)
    assert "standard input is empty; pipe a manifest in" in empty.err
    closed = restyle(*run, through=("sh", "-c", 'exec "$@" <&-', "sh"))
    assert closed.code == 2
    assert "standard input is" in closed.err
    near, far = os.openpty()
    try:
        terminal = restyle(*run, **piped(os.ttyname(far)))
    finally:
        os.close(near)
        os.close(far)
    assert terminal.code == 2
    assert "- reads the manifest from standard input, which is a terminal" in terminal.err
    assert not (tmp_path / "run").exists()


def test_a_paid_run_with_its_manifest_from_standard_input_cannot_ask(tmp_path):
    (tmp_path / "in").write_text(CSV.replace("b.jpg", "https://images.example/2.jpg"))
    ended = restyle(
        "run", "-", "-o", tmp_path / "run", "--target", "fal", env={"FAL_KEY": "a:b"}, **piped(tmp_path / "in")
    )
    assert ended.code == 2
    assert "add --yes or --budget USD (standard input is the manifest, so restyle cannot ask)" in ended.err


def test_ctrl_c_while_standard_input_is_awaited_ends_the_command(tmp_path):
    """The writer of the pipe may take hours."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp")}
    with (
        started("run", "-", "-o", tmp_path / "run", env=environment, **piped(tmp_path / "pipe")) as process,
        (tmp_path / "pipe").open("w") as pipe,
    ):
        pipe.write("image_url,prompt\n")
        pipe.flush()
        wait_for(lambda: list((tmp_path / "tmp").glob("restyle-*/stdin.csv")), "reading")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 4, out + err
    assert "restyle: interrupted" in err
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "run").exists()


# --- formats by name, and invalid sources ---


def test_a_file_with_an_odd_name_is_read_as_its_format_is_named(tmp_path):
    (tmp_path / "export.txt").write_text("image_url;prompt\nhttps://images.example/1.jpg;x\n")
    refused = restyle("plan", tmp_path / "export.txt")
    assert refused.code == 2
    assert "unsupported manifest format '.txt'" in refused.err
    assert "supported: .csv" in refused.err
    planned = restyle("plan", tmp_path / "export.txt", "--format", "csv")
    assert planned.code == 0, planned.text
    unknown = restyle("plan", tmp_path / "export.txt", "--format", "xlsx")
    assert unknown.code == 2
    assert "xlsx" in unknown.err


@pytest.mark.parametrize("source", ["s3://b/x.csv", "gs://b/x/", "az://b/x", "hf://datasets/a/b", "https://a.b/x.csv"])
def test_places_that_are_not_read_yet_are_said_to_be_so(tmp_path, source):
    ended = restyle("run", source, "-o", tmp_path / "run", *ECHO)
    assert ended.code == 2
    assert f"restyle: {source}: manifests in object stores and on the web are not supported yet" in ended.err
    assert not (tmp_path / "run").exists()


def test_the_help_says_what_a_manifest_may_be():
    for command in ("plan", "run"):
        shown = " ".join(restyle(command, "--help").out.split())
        for word in ("JSON", "Arrow", "folder of images", "standard input", "--prompt", "--format"):
            assert word in shown


def test_the_library_refuses_a_closed_standard_input():
    """A notebook has no standard input."""
    code = """
import sys
sys.stdin = None
from batch.api import plan_sync
from batch.errors import ManifestError
try:
    plan_sync("-")
except ManifestError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert "standard input is closed; name a manifest file" in done.stdout, done.stderr
