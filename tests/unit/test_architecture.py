"""docs/architecture.md says what the imports say: its diagrams, its list of folders and the places that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_layers import ORDER, SOURCES, ours, place

PAGE = (Path(__file__).parents[2] / "docs/architecture.md").read_text("utf-8")
DIAGRAMS = re.findall(r"^```mermaid\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ARROW = r"\s*(-->|-\.->)(?:\|[^|]*\|)?\s*"


def module(node: str) -> str:
    return "batch." + node.strip().replace("/", ".")


def arrows() -> list[tuple[str, str, str]]:
    """Start, kind and end of each arrow of the diagrams; a line may have several."""
    found = []
    for line in "\n".join(DIAGRAMS).splitlines():
        parts = re.split(ARROW, line.strip())
        found += [(parts[at], parts[at + 1], parts[at + 2]) for at in range(0, len(parts) - 2, 2)]
    return found


def test_there_is_a_diagram_of_a_row_and_one_of_a_request():
    """Both are found, with their arrows."""
    assert len(DIAGRAMS) == 2
    assert len(arrows()) > 30


@pytest.mark.parametrize(("start", "kind", "end"), arrows())
def test_an_arrow_is_an_import_or_a_protocol(start, kind, end):
    """Solid: the first module imports the second. Dotted: neither imports the other, `run/interfaces` is between."""
    assert {module(start), module(end)} <= set(SOURCES)
    if kind == "-->":
        assert module(end) in ours(module(start))
    else:
        assert module(end) not in ours(module(start))
        assert module(start) not in ours(module(end))


def test_the_folders_are_listed_in_the_order_of_imports():
    """The table of folders has every place, in the order that test_layers checks."""
    table = PAGE.partition("## Folders")[2]
    named = [
        name.strip("/")
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+/?)`", row)
    ]
    assert named == [*ORDER[:-1], "testing"]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:batch|docs|configs|tests)/[\w/.]+)`", PAGE))))
def test_a_named_file_exists(path):
    """Where a change goes is a place that exists."""
    assert (Path(__file__).parents[2] / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+)`(?= (?:in|of) `batch|,| or)", PAGE))))
def test_a_named_class_exists(name):
    """Classes that the page names are defined in the package."""
    defined = {
        node.name
        if isinstance(node, ast.ClassDef)
        else getattr(node.targets[0] if isinstance(node, ast.Assign) else node.target, "id", "")
        for path in SOURCES.values()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef | ast.Assign | ast.AnnAssign)
    }
    assert name in defined


def test_every_place_of_the_order_exists():
    """A rank without a folder or module is out of date."""
    assert {place(name) for name in SOURCES if name != "batch"} - {"testing"} == set(ORDER)
