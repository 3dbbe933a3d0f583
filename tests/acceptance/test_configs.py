"""The files in `configs/`: each is valid, and the commands in its comments work."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
from pathlib import Path

import pytest

from batch.config import load_settings, parse_duration
from batch.server.faults.plan import read_faults
from tests.acceptance.command import REPOSITORY, accepted, restyle, results, started, summary

CONFIGS = REPOSITORY / "configs"


def commands(name: str) -> list[list[str]]:
    """Return the words after `restyle` of each command in a file's comments."""
    text = (CONFIGS / name).read_text("utf-8")
    lines = re.findall(r"^#.*?\brestyle ((?:run|plan) [^>\n]*)", text, re.MULTILINE)
    return [shlex.split(line.partition("    ")[0]) for line in lines]  # a remark may follow


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("manifests", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_says_how_to_use_it(path):
    """A config loads without errors, and a command in its comments uses it."""
    (read_faults if path.name == "faults.toml" else load_settings)(path)
    assert commands(path.name)
    assert all(f"configs/{path.name}" in words for words in commands(path.name))


def test_the_demo_restyles_all_its_images(checkout):
    """`make demo` runs the command in demo.toml, and every row gets an image."""
    (words,) = commands("demo.toml")
    recipe = re.search(r"^demo:.*\n\t.*?/restyle (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert shlex.split(recipe[1]) == words
    ended = restyle(*words, cwd=checkout)
    assert ended.code == 0, ended.text
    rows = results(checkout / "out/demo").to_pylist()
    assert len(rows) == 12
    assert {row["engine"] for row in rows} == {"preview"}
    assert all((checkout / "out/demo" / row["images"][0]["path"]).is_file() for row in rows)


def test_the_sweep_makes_every_combination(checkout):
    """Three rows, two strengths, two guidance scales and two seeds give 24 records with filled prompts."""
    (words,) = commands("sweep.toml")
    ended = restyle(*words, cwd=checkout, env={"RESTYLE_TARGET__ENGINE": "echo"})
    assert ended.code == 0, ended.text
    rows = results(checkout / "out/sweep").to_pylist()
    points = {(row["row"], row["strength"], row["guidance_scale"], row["seed"]) for row in rows}
    assert len(rows) == len(points) == 24
    assert {row["prompt"] for row in rows} == {f"a {row['style']} of a {row['animal']}" for row in rows}


def test_cron_does_only_what_is_new(checkout):
    """On a longer manifest the same command submits only the new row; a bad row is skipped without a failure."""
    crontab, unit = commands("cron.toml")
    assert crontab == unit
    manifest = checkout / "manifests/demo.csv"
    first = restyle(*crontab, cwd=checkout, env={"RESTYLE_TARGET__ENGINE": "echo"})
    with manifest.open("a") as file:
        file.write("cat-2,images/cat.jpg,a second look at the cat,,\nnone,images/none.jpg,nothing,,\n")
    second = restyle(*crontab, cwd=checkout, env={"RESTYLE_TARGET__ENGINE": "echo"})
    assert (first.code, second.code) == (0, 0), second.text
    said = summary(checkout / "out/cron")
    assert (said["done"], said["skipped"], said["ended"]) == (13, 1, 1)
    assert accepted(checkout / "out/cron") == 13


def test_cron_ends_within_the_limits_of_cron_and_systemd():
    """The run ends before the next one starts, and a stop ends before systemd kills the process."""
    limits = load_settings(CONFIGS / "cron.toml").limits
    stop = re.search(r"TimeoutStopSec=(\w+)", (CONFIGS / "cron.toml").read_text())
    assert stop is not None
    seconds = parse_duration(stop[1])
    assert isinstance(seconds, float)
    assert limits.deadline is not None
    assert limits.deadline < 3600
    assert limits.drain < seconds


def test_fal_plans_without_a_key_and_sends_nothing(checkout):
    """The plan of fal.toml needs no key; without one the run stops with a message before anything is sent."""
    plan, run = commands("fal.toml")
    planned = restyle(*plan, cwd=checkout)
    assert planned.code == 0, planned.text
    assert "target: fal" in planned.out
    stopped = restyle(*run, cwd=checkout)
    assert stopped.code == 2
    assert stopped.err == "restyle: FAL_KEY is not set; export FAL_KEY=key_id:key_secret, or use --target local\n"


def test_the_service_unit_starts_an_endpoint_that_runs_can_use(checkout):
    """The unit's ExecStart, on a free port, serves a run with `--target URL`."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # keep the case of option names
    unit.read(CONFIGS / "restyle-serve.service")
    words = shlex.split(unit["Service"]["ExecStart"])[1:]
    words[words.index("--port") + 1] = "0"
    words[words.index("--data-dir") + 1] = str(checkout / "served")
    with started(*words, cwd=checkout) as server:
        assert server.stdout is not None
        url = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
        assert url is not None
        ended = restyle("run", "manifests/demo.csv", "-o", "out", "--limit", 2, "--target", url[0], "-q", cwd=checkout)
        assert ended.code == 0, ended.text
        server.terminate()
        assert server.wait(30) == 0
