"""`make bench`: the client against the floor, the endpoint alone; writes docs/benchmarks.md.

    python -m tests.benchmarks [--jobs 20000] [--rounds 3] [--only client|endpoint]

Floor and client take turns on one server (A B A B), medians are quoted. The comparison with the official clients
is not here yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks import bench_endpoint

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def standin():
    command = [sys.executable, "-m", "tests.benchmarks.standin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as server:
        yield json.loads(server.stdout.readline())["url"]
        server.stdin.close()
        server.wait(10)


def timed(*command: str) -> tuple[float, float]:
    """Wall and CPU seconds of a whole process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def client(jobs: int, rounds: int) -> str:
    floor, ours = [], []
    with tempfile.TemporaryDirectory() as folder, standin() as url:
        manifest = Path(folder) / "manifest.csv"
        with manifest.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image_url", "prompt"])
            rows.writerows([f"https://pictures.example/{n}.jpg", f"{n} as a watercolor"] for n in range(jobs))
        for number in range(rounds):
            floor.append(timed("tests.benchmarks.floor", url, str(jobs)))
            out = str(Path(folder) / f"run{number}")
            ours.append(timed("batch", "run", str(manifest), "-o", out, "--target", url, "--no-download", "--quiet"))
    wall_floor, cpu_floor = (statistics.median(column) for column in zip(*floor, strict=True))
    wall, cpu = (statistics.median(column) for column in zip(*ours, strict=True))
    return "\n".join(
        [
            f"## Instant service, {jobs:,} jobs, median of {rounds} turns",
            "",
            "| | jobs/s | CPU ms/job | durable |",
            "|---|---|---|---|",
            (
                f"| bare aiohttp loop, three requests a job (the floor) | {jobs / wall_floor:,.0f} |"
                f" {cpu_floor / jobs * 1000:.2f} | no |"
            ),
            (
                f"| `restyle run`, whole process with journal, results and log | {jobs / wall:,.0f} |"
                f" {cpu / jobs * 1000:.2f} | yes |"
            ),
            f"| share of the floor | {wall_floor / wall:.2f} | {cpu / cpu_floor:.2f}x | |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["client", "endpoint"])
    arguments = parser.parse_args()
    names = ("aiohttp", "anyio", "uvloop", "orjson")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    parts = [
        "# Benchmarks",
        "Made by `make bench`. Compare only within one table: machines are noisy.",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}; {versions}.",
    ]
    if arguments.only != "endpoint":
        parts.append(client(arguments.jobs, arguments.rounds))
    if arguments.only != "client":
        parts.append("## The endpoint\n\n" + bench_endpoint.render(bench_endpoint.measure()))
    text = "\n\n".join(parts) + "\n"
    (REPOSITORY / "docs" / "benchmarks.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
