"""`make bench`: every scenario on this machine; writes docs/benchmarks.md.

    python -m tests.benchmarks [--rounds 3] [--only a,c1,endpoint]

A scenario that is not asked for keeps its last figures. Those that are compared take turns on one server (A B A B);
medians are quoted. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks import bench_client, bench_data, bench_endpoint
from tests.benchmarks.harness import REPOSITORY

PAGE = REPOSITORY / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `make bench`; each section says when. `restyle run` is the whole command as a user starts it: process start,
plan, journal on disk, results and log. The service is a stand-in that does nothing (`tests/benchmarks/standin.py`), so
that it is never what is measured. Compare only within one table: machines differ, and this one is shared.
"""
JS_CLIENT = "1.10.1"


def scenarios(rounds: int) -> dict[str, tuple[str, Callable[[], str]]]:
    """Title and measurement by short name."""
    data = bench_data
    return {
        "a": ("(a) Instant service", partial(bench_client.instant, rounds)),
        "b": ("(b) One-second service, 32 slots, 640 jobs", partial(bench_client.one_second, rounds)),
        "c1": ("(c) Five-second service, 1,000 in flight", partial(bench_client.in_flight, rounds, 1_000)),
        "c2": ("(c) Five-second service, 10,000 in flight", partial(bench_client.in_flight, 1, 10_000)),
        "d": ("(d) Log-normal service, 40 slots, 2,000 jobs", partial(bench_client.log_normal, rounds)),
        "e": ("(e) 10,000 result images", partial(data.downloads, rounds)),
        "f": ("(f) 2,000 local images", data.uploads),
        "g5": ("(g) 100,000 rows", partial(data.rows, 100_000)),
        "g6": ("(g) 1,000,000 rows", partial(data.rows, 1_000_000)),
        "g7": ("(g) 10,000,000 rows", partial(data.rows, 10_000_000, plan_only=True)),
        "h": ("(h) Memory", bench_client.memory),
        "endpoint": ("The endpoint", lambda: bench_endpoint.render(bench_endpoint.measure())),
    }


def kept(page: Path) -> dict[str, str]:
    """Sections of the page as it is, by short name."""
    if not page.exists():
        return {}
    found = re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- |\Z)", page.read_text("utf-8"), re.DOTALL)
    return {name: text.strip() for name, text in found}


def machine() -> str:
    """What it was measured on."""
    names = ("aiohttp", "anyio", "uvloop", "orjson", "polars", "pyarrow", "fal-client")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    where = (
        f"{bench_client.cores()} cores {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    )
    return f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {where}; {versions}, @fal-ai/client {JS_CLIENT}."


def main() -> None:
    """Measure what was asked for and write the page anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="short names, with commas between")
    given = parser.parse_args()
    known = scenarios(given.rounds)
    wanted = given.only.split(",") if given.only else list(known)
    if unknown := set(wanted) - known.keys():
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in wanted:
        title, measure = known[name]
        text = f"## {title}\n\n{measure()}\n\n{machine()}"
        print(text, flush=True)
        sections = {**kept(PAGE), name: text}  # written at once: a long bench may be cut short
        parts = [f"<!-- {one} -->\n{sections[one]}" for one in known if one in sections]
        others = [f"<!-- {one} -->\n{text}" for one, text in sections.items() if one not in known]
        PAGE.write_text("\n\n".join([HEAD.strip(), *parts, *others]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
