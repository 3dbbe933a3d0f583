"""The commands and Python blocks of README and quickstart run and print the documented output.

Paid parts are replaced: `--target fal` of a run becomes `--target local` with fal's price, so that budgets apply; a
plan for fal sends nothing and runs unchanged. The echo engine makes the images.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance.command import REPOSITORY, environment, restyle

PAGES = ("README.md", "docs/quickstart.md")
ANYTHING = "…"
PRICE = {"RESTYLE_PRICE__USD_PER_MEGAPIXEL": "0.03"}
LANGUAGES = {"console", "python", "csv", ""}


class Command(NamedTuple):
    """A `$ ` line and its documented output; empty if the page shows none."""

    words: list[str]
    printed: str


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / page).read_text("utf-8")
    return [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if kind == language
    ]


def commands(page: str) -> list[Command]:
    found: list[Command] = []
    for block in blocks(page, "console"):
        assert block.startswith("$ "), f"a console block begins with a command: {block}"
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, printed = part.partition("\n")
            found.append(Command(shlex.split(line), printed))
    return found


def spends(words: list[str]) -> bool:
    return words[1] == "run" and ("fal" in words or "configs/fal.toml" in words)


def without_money(words: list[str]) -> list[str]:
    if "--target" in words:
        return ["local" if word == "fal" else word for word in words]
    return [*words, "--target", "local"]


def matches(printed: str, expected: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.strip().split(ANYTHING))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The directory of a new user, without the environment that `make` builds."""
    for name in ("manifests", "configs", "notebooks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_print_what_the_page_says(page, checkout):
    """Each command ends with 0 and prints the output on the page, where … matches anything."""
    given = {"RESTYLE_TARGET__ENGINE": "echo"}
    for words, expected in commands(page):
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            given[name] = value
        elif words[0] == "make":
            menu = subprocess.run(["make", "-n", *words[1:]], cwd=checkout, capture_output=True, text=True, timeout=30)
            assert menu.returncode == 0, menu.stderr
        else:
            assert words[0] == "restyle", f"{words[0]} is not a command of this test"
            paid = spends(words)
            ended = restyle(
                *(without_money(words) if paid else words)[1:], env=given | (PRICE if paid else {}), cwd=checkout
            )
            assert ended.code == 0, f"{' '.join(words)}: {ended.text}"
            said = expected if words[1] == "plan" else expected.replace("target fal", "target local")
            assert not expected or matches(ended.out, said), f"{' '.join(words)}:\n{ended.out}\nis not\n{said}"


def test_the_python_blocks_run_one_after_the_other(checkout):
    """The README's Python, with `local` instead of `fal`, plans, runs and reads the results."""
    code = "".join(blocks("README.md", "python")).replace('"fal"', '"local"')
    env = environment({"RESTYLE_TARGET__ENGINE": "echo", **PRICE})
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 0, ended.stderr
    assert "COMPLETE 12" in ended.stdout
    assert "cost_usd" in ended.stdout


def test_nothing_on_the_pages_escapes_this_test():
    """Each fenced block is a console, Python, an example table, or the map; and there are enough of each."""
    for page in PAGES:
        languages = set(
            re.findall(r"^```(\w*)\n.*?^```$", (REPOSITORY / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
        )
        assert languages <= LANGUAGES, page
        assert len(commands(page)) >= 5, page


def test_paths_on_all_pages_exist():
    """Every link and path on a page exists."""
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = page.read_text("utf-8")
        named = re.findall(r"`((?:batch|configs|docs|notebooks|manifests|tests)/[\w./-]*)`", text)
        linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        missing = [name for name in named if not (REPOSITORY / name).exists()]
        missing += [link for link in linked if not (page.parent / link).exists()]
        assert not missing, f"{os.path.relpath(page, REPOSITORY)} names {missing}"
