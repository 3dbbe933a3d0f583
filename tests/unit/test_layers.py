"""The import table of the house, as data: who stands in which ring, and that imports only point inward.

A new module has to be entered here. Its rank is higher than that of everything it imports; its ring says what it may
know. An edge names the outside thing that it owns: modules of one thing may import each other, edges of different
things may not.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / "batch").rglob("*.py"))
}

PURE, WAITS, ASSEMBLY, TESTING = "pure", "waits", "assembly", "testing"

TABLE: dict[str, tuple[str, int]] = {
    # face and assembly
    "batch": (PURE, 0),
    "batch.errors": (PURE, -2),
    "batch.model": (PURE, 0),
    "batch.version": (PURE, 0),
    "batch.image_formats": (PURE, 0),
    "batch.descriptors": (PURE, -1),
    "batch.open_files": ("edge: the process", 0),
    "batch.accepting": ("edge: network", 0),
    "batch.config": ("edge: environment and config file", 2),
    "batch.targets": (ASSEMBLY, 4),
    "batch.bills": (ASSEMBLY, 5),
    "batch.audit": (ASSEMBLY, 6),
    "batch.repair": (ASSEMBLY, 6),
    "batch.projection": (ASSEMBLY, 7),
    "batch.opening": (ASSEMBLY, 7),
    "batch.signals": (ASSEMBLY, 7),
    "batch.session": (ASSEMBLY, 8),
    "batch.api": (ASSEMBLY, 9),
    "batch.flags": ("edge: command line", 0),
    "batch.paths": ("edge: home folders", 1),
    "batch.outlet": ("edge: terminal", 0),
    "batch.interrupts": ("edge: the process", 0),
    "batch.blocking": ("edge: the process", 1),
    "batch.screen": (ASSEMBLY, 10),
    "batch.cli": (ASSEMBLY, 11),
    "batch.__main__": (ASSEMBLY, 12),
    # what is asked for
    "batch.manifest": (PURE, 0),
    "batch.manifest.keys": (PURE, 1),
    "batch.manifest.ports": (PURE, 1),
    "batch.manifest.inputs": (PURE, 2),
    "batch.manifest.sweep": (PURE, 3),
    "batch.manifest.prompts": (PURE, 3),
    "batch.manifest.pictures": ("edge: source pictures", 3),
    "batch.manifest.formats": (PURE, 2),
    "batch.manifest.jsontext": (PURE, 2),
    "batch.manifest.hive": (PURE, 0),
    "batch.manifest.shards": (PURE, 1),
    "batch.manifest.text": ("edge: manifest files", 3),
    "batch.manifest.kinds": (PURE, 2),
    "batch.manifest.jsonitems": (PURE, 3),
    "batch.manifest.arrowdata": (PURE, 2),
    "batch.manifest.tree": ("edge: manifest files", 2),
    "batch.manifest.saved": ("edge: manifest files", 2),
    "batch.manifest.finding": ("edge: manifest files", 3),
    "batch.manifest.imagefolder": ("edge: manifest files", 3),
    "batch.manifest.arrow": ("edge: manifest files", 4),
    "batch.manifest.jsonfile": ("edge: manifest files", 4),
    "batch.manifest.stdin": ("edge: standard input", 3),
    "batch.manifest.jsonl": ("edge: manifest files", 3),
    "batch.manifest.parquet": ("edge: manifest files", 3),
    "batch.manifest.read": ("edge: manifest files", 5),
    "batch.manifest.plan": (PURE, 4),
    "batch.manifest.survey": (PURE, 5),
    # what the API is
    "batch.fal": (PURE, 0),
    "batch.fal.endpoint": (PURE, 1),
    "batch.fal.protocol": (PURE, 1),
    "batch.fal.signing": (PURE, 1),
    "batch.fal.answer": (PURE, 2),
    "batch.fal.platform": (PURE, 2),
    "batch.fal.queries": (PURE, 3),
    "batch.fal.http": ("edge: network", 2),
    "batch.fal.client": ("edge: network", 3),
    "batch.fal.callbacks": ("edge: network", 3),
    "batch.fal.streams": ("edge: network", 3),
    # how it is carried out
    "batch.run": (PURE, 0),
    "batch.run.lifecycle": (PURE, 0),
    "batch.run.pacing": (PURE, 0),
    "batch.run.polling": (PURE, 0),
    "batch.run.waits": (PURE, 1),
    "batch.run.retention": (PURE, 0),
    "batch.run.books": (PURE, 1),
    "batch.run.scratch": ("edge: an audit's scratch database", 1),
    "batch.run.budget": (PURE, 2),
    "batch.run.ports": (PURE, 2),
    "batch.run.observe": ("edge: terminal and log", 3),
    "batch.run.course": (PURE, 3),
    "batch.run.answers": (PURE, 2),
    "batch.run.ledger": (PURE, 3),
    "batch.run.directory": ("edge: run directory", 3),
    "batch.run.images": ("edge: result pictures", 3),
    "batch.run.retry": (WAITS, 3),
    "batch.run.cancelling": (WAITS, 4),
    "batch.run.gate": (WAITS, 4),
    "batch.run.reconcile": (WAITS, 4),
    "batch.run.transfer": (WAITS, 5),
    "batch.run.journal_file": ("edge: journal", 4),
    "batch.run.journal": ("edge: journal", 5),
    "batch.run.follow": (WAITS, 5),
    "batch.run.runner": (WAITS, 6),
    # what comes out
    "batch.results": (PURE, 0),
    "batch.results.totals": (PURE, 0),
    "batch.results.columns": (PURE, 5),
    "batch.results.sink": ("edge: results file", 6),
    # the endpoint, ours
    "batch.server.http": (PURE, 0),
    "batch.server.queue": (PURE, 0),
    "batch.server.files": (PURE, 0),
    "batch.server.egress": (PURE, 0),
    "batch.server.faults": (PURE, 0),
    "batch.server": (PURE, 0),
    "batch.group_commit": ("edge: server's disk", 0),
    "batch.server.faults.plan": (PURE, 1),
    "batch.server.faults.plan_file": ("edge: faults file", 2),
    "batch.server.queue.records": (PURE, 1),
    "batch.embedded": ("edge: endpoint process", 1),
    "batch.server.http.auth": ("edge: keys file", 1),
    "batch.server.files.small_files": ("edge: server's disk", 1),
    "batch.server.files.spool": ("edge: server's disk", 0),
    "batch.server.files.multipart": ("edge: server's disk", 1),
    "batch.server.queue.cleanup": (ASSEMBLY, 4),
    "batch.server.http.fal_proxy": (ASSEMBLY, 5),
    "batch.server.queue.scheduler": (PURE, 2),
    "batch.server.files.storage": ("edge: server's disk", 2),
    "batch.server.queue.store": ("edge: server's disk", 2),
    "batch.server.queue.stats": (PURE, 2),
    "batch.server.queue.responses": (PURE, 3),
    "batch.server.queue.request_log": ("edge: server's disk", 4),
    "batch.server.http.openapi": (PURE, 4),
    "batch.server.egress.ssrf": ("edge: other people's servers", 1),
    "batch.server.egress.http_client": ("edge: other people's servers", 2),
    "batch.server.egress.source_images": ("edge: other people's servers", 3),
    "batch.server.queue.executor": (ASSEMBLY, 4),
    "batch.server.queue.service": (ASSEMBLY, 5),
    "batch.server.http.metrics": (ASSEMBLY, 6),
    "batch.server.http.page": (PURE, 0),
    "batch.server.http.page.state": (PURE, 3),
    "batch.server.http.page.routes": (ASSEMBLY, 6),
    "batch.server.http.platform": (ASSEMBLY, 6),
    "batch.server.faults.injection": (ASSEMBLY, 6),
    "batch.server.http.callers": (ASSEMBLY, 1),
    "batch.server.http.uploads": (ASSEMBLY, 6),
    "batch.server.queue.webhooks": (ASSEMBLY, 6),
    "batch.server.http.app": (ASSEMBLY, 7),
    "batch.server.serve": (ASSEMBLY, 8),
    "batch.server.__main__": (ASSEMBLY, 9),
    "batch.server.engines": (ASSEMBLY, 6),
    "batch.server.engines.base": (PURE, 2),
    "batch.server.engines.images": (PURE, 3),
    "batch.server.engines.echo": (WAITS, 3),
    "batch.server.engines.process": ("edge: engine processes", 3),
    "batch.server.engines.__main__": ("edge: engine processes", 4),
    "batch.server.engines.process_pool": ("edge: engine processes", 4),
    "batch.server.engines.preview": (PURE, 0),
    "batch.server.engines.preview.texture": (PURE, 0),
    "batch.server.engines.preview.wording": (PURE, 0),
    "batch.server.engines.preview.brush": (PURE, 1),
    "batch.server.engines.preview.grade": (PURE, 2),
    "batch.server.engines.preview.graphic": (PURE, 2),
    "batch.server.engines.preview.painted": (PURE, 2),
    "batch.server.engines.preview.renderer": ("edge: engine processes", 4),
    "batch.server.engines.preview.engine": ("edge: engine processes", 5),
    "batch.server.engines.flux": (PURE, 0),
    "batch.server.engines.flux.options": (PURE, 1),
    "batch.server.engines.flux.folder": ("edge: engine processes", 1),
    "batch.server.engines.flux.hub": ("edge: engine processes", 2),
    "batch.server.engines.flux.safety": ("edge: engine processes", 0),
    "batch.server.engines.flux.trouble": ("edge: engine processes", 0),
    "batch.server.engines.flux.tuning": ("edge: engine processes", 0),
    "batch.server.engines.flux.loading": ("edge: engine processes", 3),
    "batch.server.engines.flux.restyle": ("edge: engine processes", 4),
    "batch.server.engines.flux.renderer": ("edge: engine processes", 5),
    "batch.server.engines.flux.engine": ("edge: engine processes", 5),
    # fakes that ship
    "batch.testing": (PURE, 0),
    "batch.testing.observer": (TESTING, 3),
    "batch.testing.service": (TESTING, 3),
    "batch.testing.images": (TESTING, 4),
    "batch.testing.journal": (TESTING, 4),
}

OUTWARD: dict[tuple[str, str], str] = {
    ("batch.manifest.plan", "batch.config"): "the Settings value; only `load_settings` reads anything",
    ("batch.run.directory", "batch.config"): "the Settings value again",
    (
        "batch.server.egress.source_images",
        "batch.server.files.storage",
    ): "its own files are read from disk, not over HTTP",
}
"""Imports that the rings do not allow and that stand all the same, each with its reason."""

OUTSIDE = {
    "aiohttp", "asyncio", "concurrent", "cyclopts", "fcntl", "filelock", "http", "httpx", "logging", "multiprocessing",
    "os", "queue", "requests", "resource", "secrets", "select", "shutil", "signal", "socket", "sqlite3", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time", "tqdm", "uvloop", "yarl",
}  # fmt: skip
"""Libraries that touch something outside, or the clock."""
WAITING = {"anyio", "tenacity", "trio"}
"""Libraries of those who wait: on a clock that a test replaces."""


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text("utf-8"))


@cache
def imported_by(name: str) -> frozenset[str]:
    """Full names of everything that a module imports, also inside functions."""
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


def in_ring(ring: str) -> list[str]:
    return [name for name, (kind, _) in TABLE.items() if kind == ring]


EDGES = [name for name, (ring, _) in TABLE.items() if ring.startswith("edge: ")]


def test_the_table_names_every_module_and_no_other():
    """A module without a ring and a rank is a house without an address."""
    assert sorted(TABLE) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_ranks_fall_along_every_import(name):
    """A module imports only what ranks below it; so there is no circle either."""
    assert {other: TABLE[other][1] for other in ours(name) if TABLE[other][1] >= TABLE[name][1]} == {}


@pytest.mark.parametrize("name", in_ring(PURE))
def test_a_pure_module_knows_nothing_outside(name):
    """No clock, network, disk, waiting; it imports pure modules only."""
    assert roots(name) & (OUTSIDE | WAITING) == set()
    assert {other for other in ours(name) if TABLE[other][0] != PURE and (name, other) not in OUTWARD} == set()


@pytest.mark.parametrize("name", in_ring(PURE))
def test_a_pure_module_takes_time_and_chance_as_arguments(name):
    """It neither asks for the date nor draws from the process's own random source, and awaits nothing."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"now", "utcnow", "today"}, f"{name}, line {node.lineno}"
        if isinstance(node, ast.Import):
            assert "random" not in {alias.name for alias in node.names}, f"{name}: from random import Random"
        assert not isinstance(node, ast.Await), f"{name}, line {node.lineno}"


@pytest.mark.parametrize("name", in_ring(WAITS))
def test_a_module_that_waits_knows_only_the_clock_of_anyio(name):
    """The runner and its kin see Protocols: no aiohttp, no sqlite3, no edge."""
    assert roots(name) & OUTSIDE == set()
    allowed = {PURE, WAITS}
    assert {other for other in ours(name) if TABLE[other][0] not in allowed and (name, other) not in OUTWARD} == set()


@pytest.mark.parametrize("name", EDGES)
def test_edges_never_import_each_other(name):
    """An edge imports pure modules and the other parts of its own edge; assembly brings edges together."""
    allowed = {PURE, TABLE[name][0]}
    assert {other for other in ours(name) if TABLE[other][0] not in allowed and (name, other) not in OUTWARD} == set()


def test_every_exception_is_still_needed():
    """An allowance that nobody uses is removed."""
    assert [pair for pair in OUTWARD if pair[1] not in ours(pair[0])] == []


def test_the_server_knows_nothing_of_the_client_side():
    """The server shares the wire protocol, the values and the errors with the runner, and nothing else."""
    shared = (
        "batch.server",
        "batch.group_commit",
        "batch.fal.endpoint",
        "batch.fal.platform",
        "batch.fal.protocol",
        "batch.fal.signing",
    )
    shared += ("batch.fal.queries",)
    shared += ("batch.model", "batch.errors", "batch.version", "batch.descriptors", "batch.open_files")
    shared += ("batch.accepting", "batch.image_formats")
    for name in SOURCES:
        if name.startswith("batch.server"):
            assert [other for other in ours(name) if not other.startswith(shared)] == [], name


def test_nothing_that_runs_imports_the_fakes():
    """`batch.testing` is for tests, ours and those of users."""
    inside = [name for name in SOURCES if not name.startswith("batch.testing")]
    assert [name for name in inside if any(other.startswith("batch.testing") for other in ours(name))] == []


@pytest.mark.parametrize("name", in_ring(TESTING))
def test_a_fake_touches_no_network_and_no_database(name):
    """A fake stands in for an edge; it is none itself."""
    assert roots(name) & {"aiohttp", "sqlite3", "socket"} == set()
    assert {other for other in ours(name) if TABLE[other][0] == ASSEMBLY} == set()


# --- what an import costs ---------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Top-level names that a fresh interpreter has loaded after the statement, and had not before."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in ended.stdout.split()}


def test_importing_the_package_loads_no_library():
    """`import batch` costs nothing."""
    assert loaded_by("import batch") - sys.stdlib_module_names == {"batch"}


def test_importing_the_command_loads_no_heavy_library():
    """`restyle --help` does not wait for table, picture or HTTP libraries."""
    heavy = {"aiohttp", "cv2", "numpy", "PIL", "polars", "pyarrow", "pydantic"}
    assert loaded_by("import batch.cli") & heavy == set()


def test_a_run_does_not_wait_for_what_writes_its_results():
    """Pyarrow and numpy are loaded while jobs are under way; the web server and the models' libraries never are."""
    late = {"cryptography", "cv2", "jinja2", "numpy", "prometheus_client", "pyarrow", "torch"}
    assert loaded_by("import batch.api, batch.screen") & late == set()


# --- the surface ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_says_what_it_is(name):
    """A module begins with a docstring."""
    assert ast.get_docstring(tree_of(name))


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith("__main__")])
def test_every_module_lists_its_surface(name):
    """`__all__` is there, sorted (constants, classes, the rest), and true; an empty package has none."""
    module = importlib.import_module(name)
    defined = [node for node in tree_of(name).body if not isinstance(node, ast.Expr)]
    if not defined:
        return
    names = module.__all__
    assert names == sorted(names, key=_order)
    assert [one for one in names if not hasattr(module, one)] == []


def _order(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
