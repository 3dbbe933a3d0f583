"""Scenarios (a) to (d) and (h): throughput, concurrency, polling and memory of the client."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.harness import (
    PYTHON,
    REPOSITORY,
    Measured,
    Standin,
    bar,
    in_turn,
    measured,
    median,
    run_of,
    standin,
    table,
    write_manifest,
)

JS_MODULES = REPOSITORY / ".cache" / "js"
"""Folder in which the tests install the JavaScript client from its lock file."""
PEER_JOBS = {"fal-client": 2_000, "@fal-ai/client": 5_000}
"""Jobs per round of the other clients. 20,000 jobs would take the Python client four minutes; the rate is the same."""
AT_ONCE = 64
READS = "status GETs per job, including early result GETs"


def floor(server: Standin, jobs: int, *options: str) -> Measured:
    """Measure the bare loop."""
    return measured(PYTHON, "-m", "tests.benchmarks.peers.floor", server.url, str(jobs), *options)


def fal_python(server: Standin, jobs: int) -> Measured:
    """Measure the official Python client."""
    return measured(PYTHON, "-m", "tests.benchmarks.peers.fal_python", server.url, str(jobs), "--at-once", str(AT_ONCE))


def fal_js(server: Standin, jobs: int) -> Measured:
    """Measure the official JavaScript client."""
    script = str(Path(__file__).parent / "peers" / "fal_js.mjs")
    return measured("node", script, server.url, str(jobs), str(AT_ONCE), MODULES=str(JS_MODULES))


def ours(server: Standin, folder: Path, jobs: int, *options: str) -> Measured:
    """Measure a complete `restyle run` to a new folder, without downloads, which the other clients do not do either."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    manifest = folder / f"{jobs}.csv"
    if not manifest.exists():
        write_manifest(manifest, jobs)
    return run_of(server, manifest, folder / "run", "--no-download", *options)


def instant(rounds: int, jobs: int = 20_000) -> str:
    """Scenario (a): an instant service, so that the client is the bottleneck."""
    with tempfile.TemporaryDirectory() as name, standin() as server:
        contestants = {"floor": partial(floor, server, jobs), "ours": partial(ours, server, Path(name), jobs)}
        contestants["fal-client"] = partial(fal_python, server, PEER_JOBS["fal-client"])
        if shutil.which("node") and (JS_MODULES / "node_modules").is_dir():
            contestants["@fal-ai/client"] = partial(fal_js, server, PEER_JOBS["@fal-ai/client"])
        found = in_turn(rounds, **contestants)
    counts = {"floor": jobs, "ours": jobs, **PEER_JOBS}
    rate = {name: median([counts[name] / one.wall for one in runs]) for name, runs in found.items()}
    cpu = {name: median([one.cpu / counts[name] * 1000 for one in runs]) for name, runs in found.items()}
    words = {
        "floor": "bare aiohttp loop, three requests per job, no journal (the floor)",
        "ours": "complete `restyle run` with journal, results and log",
        "fal-client": f"`fal-client`, `AsyncClient.subscribe`, {AT_ONCE} concurrent",
        "@fal-ai/client": f"`@fal-ai/client`, `fal.subscribe`, {AT_ONCE} concurrent",
    }
    rows = [[words[name], f"{rate[name]:,.0f}", f"{cpu[name]:.2f}"] for name in found]
    bars = [
        ["figure", "measured", "bar", ""],
        bar("jobs/s over fal-client", rate["ours"] / rate["fal-client"], 12, "x"),
        bar("share of the floor's jobs/s", rate["ours"] / rate["floor"], 0.55, ""),
        bar("CPU per job over the floor's", cpu["ours"] / cpu["floor"], 2.0, "x", at_most=True),
    ]
    if "@fal-ai/client" in rate:
        bars.insert(2, bar("jobs/s over @fal-ai/client", rate["ours"] / rate["@fal-ai/client"], 4, "x"))
    text = f"{jobs:,} jobs (peers: {PEER_JOBS['fal-client']:,} and {PEER_JOBS['@fal-ai/client']:,}), {rounds} rounds."
    return "\n\n".join([text, table(["client", "jobs/s", "CPU ms per job"], *rows), table(*bars)])


def one_second(rounds: int) -> str:
    """Scenario (b): 640 jobs on 32 slots with a service time of one second, ideally 20.0 s."""
    jobs, slots, ideal = 640, 32, 20.0
    with tempfile.TemporaryDirectory() as name:
        runs, reads = [], []
        for _ in range(rounds):
            with standin("--service-time", "1", "--slots", str(slots)) as server:
                runs.append(ours(server, Path(name), jobs, "--max-in-flight", "64"))
                reads.append(server.counts()["reads"] / jobs)
    wall = median([one.wall for one in runs])
    return table(
        ["figure", "measured", "bar", ""],
        bar("wall time relative to the ideal 20.0 s, process start to end", wall / ideal, 1.03, "x", at_most=True),
        ["CPU seconds", f"{median([one.cpu for one in runs]):.1f}", "", ""],
        [READS, f"{median(reads):.1f}", "", ""],
    )


def in_flight(rounds: int, jobs: int) -> str:
    """Scenario (c): a 5-second service with unlimited slots and all jobs in flight.

    The ideal is five seconds plus the time of the bare loop for the same number of requests.
    """
    service, runs, reads, bare = 5.0, [], [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            with standin() as server:
                bare.append(floor(server, jobs).wall)
            with standin("--service-time", str(service)) as server:
                runs.append(ours(server, Path(name), jobs, "--max-in-flight", str(jobs)))
                reads.append(server.counts()["reads"] / jobs)
    ideal = service + median(bare)
    wall, cpu = median([one.wall for one in runs]), median([one.cpu for one in runs])
    rows = [
        ["figure", "measured", "bar", ""],
        bar(
            f"wall time relative to the ideal {ideal:.1f} s",
            wall / ideal,
            1.06 if jobs <= 1000 else 1.15,
            "x",
            at_most=True,
        ),
    ]
    if jobs <= 1000:
        rows.append(bar("CPU", cpu, 2.5, " s", at_most=True))
        rows.append(bar(READS, median(reads), 3, "", at_most=True))
    else:
        rows.append(["CPU", f"{cpu:.1f} s", "", ""])
        rows.append([READS, f"{median(reads):.1f}", "", ""])
        rows.append(bar("peak memory", median([one.peak_mb for one in runs]), 500, " MB", at_most=True))
    return table(*rows)


def log_normal(rounds: int) -> str:
    """Scenario (d): 2,000 jobs on 40 slots with log-normal service times of median 1 s and sigma 0.6."""
    rows = [["figure", "measured", "bar", ""]]
    for updates in ("poll", "stream"):
        runs, counts = [], []
        with tempfile.TemporaryDirectory() as name:
            for _ in range(rounds):
                with standin("--log-normal", "1.0,0.6", "--slots", "40") as server:
                    runs.append(ours(server, Path(name), 2_000, "--updates", updates))
                    counts.append(server.counts())
        middle, late = _m(counts, "notice_median") * 100, _m(counts, "notice_p95") * 100
        rows += [
            bar(f"{updates}: delay until noticed, median, relative to the service time", middle, 4, "%", at_most=True),
            bar(f"{updates}: delay until noticed, 95th percentile", late, 12, "%", at_most=True),
            bar(f"{updates}: {READS}", _m(counts, "reads") / 2_000, 5, "", at_most=True),
            [f"{updates}: wall time", f"{median([one.wall for one in runs]):.1f} s", "", ""],
        ]
    return table(*rows)


def memory(small: int = 20_000, large: int = 200_000) -> str:
    """Scenario (h): peak memory at ten times the number of jobs."""
    with tempfile.TemporaryDirectory() as name, standin() as server:
        first, second = (ours(server, Path(name), jobs).peak_mb for jobs in (small, large))
    return table(
        ["figure", "measured", "bar", ""],
        [f"peak memory at {small:,} jobs", f"{first:.0f} MB", "", ""],
        [f"peak memory at {large:,} jobs", f"{second:.0f} MB", "", ""],
        bar("ratio of the two", second / first, 1.10, "x", at_most=True),
    )


def _m(counts: list[dict[str, float]], name: str) -> float:
    return median([one[name] for one in counts])


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
