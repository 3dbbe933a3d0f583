"""The documentation matches the code: commands, flags, keys, columns, actions and exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from batch.cli.commands import app
from batch.config import InputSettings, Settings
from batch.errors import ExitCode
from batch.fal.endpoint import ImageToImageInput
from batch.results.schema import IMAGE, OWN_SCHEMA
from batch.run.admission import StopCause
from batch.session import Summary

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text("utf-8")
PAGES = {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
COMMANDS = [name for name in app.resolved_commands() if not name.startswith("-")]


def flags_of(command: str) -> set[str]:
    """Return the long flags of a command."""
    names = {name for argument in app[command].assemble_argument_collection() for name in argument.names}
    return {name for name in names if name.startswith("--")}


FLAGS = {flag for command in COMMANDS for flag in flags_of(command)} | {"--help", "--version"}


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the first table under a heading, by each word in backticks (or the text) of the first cell."""
    part = re.split(rf"^#+ {re.escape(heading)}.*$", page, maxsplit=1, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    assert lines is not None, heading
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines[0].splitlines()[2:]]
    return {name: row[1:] for row in rows for name in re.findall(r"`([^`]+)`", row[0]) or [row[0]]}


def keys() -> dict[str, object]:
    """Return every settings key and its default."""
    found: dict[str, object] = {}
    for section, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            found[section] = field.get_default(call_default_factory=True)
            continue
        found |= {f"{section}.{name}": one.default for name, one in inner.items()}
    assert PydanticUndefined not in found.values()
    return found


def spelled(value: object) -> str:
    """Return a value as the documentation writes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_there_are_commands_to_look_for():
    """The introspection of the command line works."""
    assert {"plan", "run", "status", "export", "cancel", "serve"} <= set(COMMANDS)
    assert {"--budget", "--out", "--no-download"} <= flags_of("run")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command):
    """The README shows the command, and the command has a help text."""
    assert f"restyle {command}" in README
    assert app[command].help


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_every_flag_is_in_the_reference(flag):
    """docs/configuration.md names each flag in one of its tables."""
    assert f"`{flag}`" in PAGES["configuration.md"]


def test_the_documentation_names_no_unknown_flag():
    """Checked are README, docs, changelog, config comments and the notebook."""
    pages = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *DOCS.glob("*.md")]
    pages += [*(REPOSITORY / "configs").iterdir(), *(REPOSITORY / "notebooks").glob("*.ipynb")]
    for page in pages:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text("utf-8")))
        assert named <= FLAGS | {"--strict"}, page.name  # a flag of mypy


def test_the_settings_table_has_every_key_and_no_other():
    """Every key is documented, and no unknown key is."""
    assert set(table(PAGES["configuration.md"], "Keys")) == set(keys())


@pytest.mark.parametrize("key", sorted(keys()))
def test_the_settings_table_has_the_correct_default_and_bounds(key):
    """The default in TOML syntax, and every number that bounds the value."""
    default, allowed, *_ = table(PAGES["configuration.md"], "Keys")[key]
    assert default.strip("`") == spelled(keys()[key])
    section, _, name = key.partition(".")
    field = Settings.model_fields[section]
    annotation = repr(field.annotation.model_fields[name] if name else field)
    bounds = re.findall(r"(?:ge|gt|le)=([\d.]+)", annotation)
    assert all(f"{float(bound):g}" in re.findall(r"[\d.]+", allowed) for bound in bounds), (allowed, bounds)
    choices = re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[(.*?)\]", annotation)))
    assert set(choices) <= set(re.findall(r"`(\w+)`", allowed))


def test_the_endpoint_defaults_that_the_settings_table_repeats_are_true():
    """`[input]` is unset by default, so the endpoint's defaults apply."""
    rows = table(PAGES["configuration.md"], "Keys")
    for name in set(InputSettings.model_fields) - {"prompt", "seed"}:
        default = spelled(ImageToImageInput.model_fields[name].default)
        assert f"endpoint default {default}" in rows[f"input.{name}"][-1]


def test_every_flag_in_the_settings_table_sets_its_key():
    """The flag column of the settings table matches the command line."""
    from batch.cli.options import PLACES

    rows = table(PAGES["configuration.md"], "Keys")
    said = {flag: key for key, row in rows.items() for flag in re.findall(r"`(--[a-z-]+)`", row[2])}
    true = {f"--{name.replace('_', '-')}": ".".join(place) for name, place in PLACES.items()}
    assert said == true | {"--no-download": "output.download"}


@pytest.mark.parametrize("name", sorted(set(ImageToImageInput.model_fields) - {"sync_mode", "image_url"}))
def test_every_input_is_a_column_a_key_and_documented(name):
    """A new input of the endpoint also needs a results column, a key of `[input]` and its place on three pages."""
    assert name in OWN_SCHEMA.names, "batch/results/schema.py"
    assert name in InputSettings.model_fields, "batch/config/settings.py"
    assert all(f"`{name}`" in PAGES[page] for page in ("results.md", "manifest.md")), name


def test_every_exit_code_is_in_recovery():
    """Code by code, no other."""
    codes = {str(int(code)) for code in ExitCode}
    assert set(table(PAGES["recovery.md"], "Exit codes")) == codes


@pytest.mark.parametrize("stop", list(StopCause))
def test_every_reason_to_stop_has_an_exit_code_in_recovery(stop):
    """The page explains every cause of an early stop."""
    words = {
        StopCause.ACCOUNT: "the account was refused",
        StopCause.STORAGE: "full disk",
        StopCause.TARGET: "No such endpoint",
    }
    assert words.get(stop, str(stop)) in PAGES["recovery.md"]


def test_every_column_is_in_the_results_table_with_its_type():
    """docs/results.md lists the schema in its order."""
    rows = table(PAGES["results.md"], "Columns of `results.parquet`")
    assert list(rows) == OWN_SCHEMA.names
    kinds = {"list<": "list of", "struct": "struct", "map": "map", "timestamp": "timestamp, UTC"}
    for name, (kind, meaning) in rows.items():
        true = str(OWN_SCHEMA.field(name).type)
        assert kind.startswith(next((word for prefix, word in kinds.items() if true.startswith(prefix)), true)), name
        assert meaning
    assert all(f"`{field.name}`" in rows["images"][1] for field in IMAGE)


def test_every_key_of_the_summary_is_documented():
    """docs/results.md lists exactly the keys of summary.json."""
    body = (REPOSITORY / "batch/session.py").read_text("utf-8").partition("def to_json")[2].partition("async def")[0]
    written = set(re.findall(r'^ +"(\w+)": ', body, re.MULTILINE))
    assert set(Summary.__dataclass_fields__) <= written
    assert set(table(PAGES["results.md"], "`summary.json`")) == written


def test_every_action_of_the_log_is_documented():
    """docs/results.md lists exactly the actions that observers receive."""
    said: set[str] = set()
    for path in (REPOSITORY / "batch").rglob("*.py"):
        said |= set(re.findall(r'\b(?:happened|notice)\(\s*"(\w+)"', path.read_text("utf-8")))
    from batch.run.observers import JsonLog

    assert set(table(PAGES["results.md"], "Actions in `log.jsonl`")) == said - JsonLog.LIVE
    assert all(f"`{action}`" in PAGES["results.md"] for action in said)


def test_every_error_type_of_a_row_is_documented():
    """docs/manifest.md lists the words that planning writes to `error_type`."""
    words: set[str] = set()
    for path in (REPOSITORY / "batch/manifest").glob("*.py"):
        words |= set(re.findall(r'CellError\(\s*"(\w+)"', path.read_text("utf-8")))
    assert words
    assert words <= set(table(PAGES["manifest.md"], "Bad rows"))
    assert all(word in " ".join(PAGES.values()) for word in runner_words())


def runner_words() -> set[str]:
    """Return the words that the runner itself writes to `error_type`."""
    text = "".join(path.read_text("utf-8") for path in (REPOSITORY / "batch/run").glob("*.py"))
    return set(re.findall(r'(?:\bFailed|ImageError)\(\s*"(\w+)"', text)) | {"malformed_output"}


def test_the_changelog_begins_with_what_is_unreleased_and_has_this_version():
    """The format is Keep a Changelog; the latest version is that of the distribution."""
    text = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", version[1]]
