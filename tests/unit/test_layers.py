"""The import order of the package, as data: folders are ranked, and imports only point up the list.

A new file in a folder needs no entry; a new folder or loose module does. A module whose docstring says "Pure." is
checked for it.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / "batch").rglob("*.py"))
}

ORDER = (
    "version",
    "errors",
    "types",
    "image_formats",
    "system",
    "fal",
    "money",
    "config",
    "server",
    "embedded",
    "manifest",
    "journal",
    "estimate",
    "run",
    "directory",
    "results",
    "targets",
    "audit",
    "session_signals",
    "session",
    "api",
    "cli",
    "__main__",
)
"""Folders and loose modules of the package. Each imports only what is above it."""
SERVER_ORDER = ("limits", "files", "engines", "egress", "queue", "http", "faults", "serve", "__main__")
"""The same within `batch/server`."""
SHARED = ("version", "errors", "types", "image_formats", "system", "fal")
"""Folders and modules that the endpoint shares with the client side."""
OUTWARD: dict[tuple[str, str], str] = {
    ("batch.manifest.planner", "batch.config"): "the Settings value; only `load_settings` reads anything",
    ("batch.directory", "batch.config"): "the Settings value again",
}
"""Exceptions for imports of pure modules, each with its reason."""
EDGES_OF_A_RUN = {"batch.run.images", "batch.run.observers"}
"""The modules of `batch/run` that touch the disk or the terminal. All others see Protocols."""

OUTSIDE = {
    "aiohttp", "asyncio", "concurrent", "cyclopts", "fcntl", "filelock", "http", "httpx", "logging", "multiprocessing",
    "os", "queue", "requests", "resource", "secrets", "select", "shutil", "signal", "socket", "sqlite3", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time", "tqdm", "uvloop", "yarl",
}  # fmt: skip
"""Libraries that access the outside world or the clock."""
WAITING = {"anyio", "tenacity", "trio"}
"""Libraries that wait on a clock, which tests replace."""


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text("utf-8"))


@cache
def imported_by(name: str) -> frozenset[str]:
    """Return the full names of all imports of a module, including those inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in SOURCES else str(node.module) for one in full}
    return frozenset(found)


def ours(name: str) -> set[str]:
    return {other for other in imported_by(name) if other.partition(".")[0] == "batch"} - {name}


def roots(name: str) -> set[str]:
    return {other.partition(".")[0] for other in imported_by(name)}


def place(name: str, root: str = "batch") -> str:
    """Return the folder or loose module under `root` that a module belongs to; empty for the root itself."""
    return name.removeprefix(root).lstrip(".").partition(".")[0]


def is_pure(name: str) -> bool:
    """Whether a module's docstring says "Pure."."""
    return re.search(r"\bPure\b", ast.get_docstring(tree_of(name)) or "") is not None


PURE = [name for name in SOURCES if is_pure(name)]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_up_the_list(name):
    """A folder imports only folders above it. A new file in a folder needs no entry here."""
    if name == "batch" or name.startswith("batch.testing"):
        return
    rank = ORDER.index(place(name))
    wrong = {other for other in ours(name) if place(other) != place(name) and ORDER.index(place(other)) > rank}
    assert wrong == set()


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("batch.server.")])
def test_imports_of_the_server_point_up_its_list(name):
    """The same within the endpoint."""
    inside = {other for other in ours(name) if other.startswith("batch.server.")}
    rank = SERVER_ORDER.index(place(name, "batch.server"))
    assert {other for other in inside if SERVER_ORDER.index(place(other, "batch.server")) > rank} == set()


def test_no_module_imports_itself_by_way_of_others():
    """The imports can be sorted, so there is no cycle."""
    order = TopologicalSorter({name: ours(name) for name in SOURCES})
    assert set(order.static_order()) >= set(SOURCES)


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_knows_nothing_outside(name):
    """A pure module imports no clock, network, disk or waiting, and only pure modules."""
    assert roots(name) & (OUTSIDE | WAITING) == set()
    assert {other for other in ours(name) if not is_pure(other) and (name, other) not in OUTWARD} == set()


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_takes_time_and_randomness_as_arguments(name):
    """It reads neither the date nor the process's random source, and awaits nothing."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"now", "utcnow", "today"}, f"{name}, line {node.lineno}"
        if isinstance(node, ast.Import):
            assert "random" not in {alias.name for alias in node.names}, f"{name}: from random import Random"
        assert not isinstance(node, ast.Await), f"{name}, line {node.lineno}"


def test_pure_modules_stay_pure():
    """A module that loses the word loses the check. That is a decision, so the number is fixed here."""
    assert len(PURE) >= 57


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("batch.run.")])
def test_a_run_knows_only_the_clock_of_anyio(name):
    """The runner and its parts see Protocols: no aiohttp, no sqlite3, no file."""
    if name not in EDGES_OF_A_RUN:
        assert roots(name) & OUTSIDE == set()
        assert ours(name) & EDGES_OF_A_RUN == set()


def test_every_exception_is_still_needed():
    """An unused exception is removed."""
    assert [pair for pair in OUTWARD if pair[1] not in ours(pair[0])] == []


def test_the_server_knows_nothing_of_the_client_side():
    """The server shares only the wire protocol, the values and the errors with the runner."""
    for name in SOURCES:
        if name.startswith("batch.server"):
            assert {other for other in ours(name) if place(other) not in {*SHARED, "server"}} == set(), name


def test_nothing_that_runs_imports_the_fakes():
    """`batch.testing` is for tests: ours and those of users."""
    inside = [name for name in SOURCES if not name.startswith("batch.testing")]
    assert [name for name in inside if any(other.startswith("batch.testing") for other in ours(name))] == []


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("batch.testing.")])
def test_a_fake_touches_no_network_and_no_database(name):
    """A fake replaces an edge and is not one."""
    assert roots(name) & {"aiohttp", "sqlite3", "socket"} == set()
    assert {place(other) for other in ours(name)} <= {"errors", "types", "fal", "journal", "run", "testing"}


# --- what an import costs ---------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that the statement loads in a fresh interpreter."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in ended.stdout.split()}


def test_importing_the_package_loads_no_library():
    """`import batch` loads no library."""
    assert loaded_by("import batch") - sys.stdlib_module_names == {"batch"}


def test_importing_the_command_loads_no_heavy_library():
    """`restyle --help` does not wait for table, image or HTTP libraries."""
    heavy = {"aiohttp", "cv2", "numpy", "PIL", "polars", "pyarrow", "pydantic"}
    assert loaded_by("import batch.cli.main") & heavy == set()


def test_a_run_does_not_wait_for_what_writes_its_results():
    """Pyarrow and numpy are loaded while jobs are in flight; the web server and model libraries never are."""
    late = {"cryptography", "cv2", "jinja2", "numpy", "prometheus_client", "pyarrow", "torch"}
    assert loaded_by("import batch.api, batch.cli.output") & late == set()


# --- the surface ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_what_it_is(name):
    """Every module has a docstring."""
    assert ast.get_docstring(tree_of(name))


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith("__main__")])
def test_every_module_lists_its_surface(name):
    """`__all__` exists, is sorted (constants, classes, the rest) and correct; an empty package has none."""
    module = importlib.import_module(name)
    defined = [node for node in tree_of(name).body if not isinstance(node, ast.Expr)]
    if not defined:
        return
    names = module.__all__
    assert names == sorted(names, key=_order)
    assert [one for one in names if not hasattr(module, one)] == []


def _order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_no_class_name_is_in_two_modules():
    """A name means one thing, private names included."""
    names = Counter(
        node.name.lstrip("_") for name in SOURCES for node in ast.walk(tree_of(name)) if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == set()
