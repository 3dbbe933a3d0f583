"""Throughput and capacity of the endpoint: the echo engine on one core, a bare aiohttp loop on another.

    python -m tests.benchmarks.bench_endpoint

A job is complete when the client has received the response to its submit, a COMPLETED status and the result. The server
fsyncs each acceptance and each completion before it responds. The queue is measured with an engine that is always busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import quantiles

import aiohttp
import orjson
import uvloop

from batch.fal.endpoint import APP_ID

__all__ = ["measure", "render"]

JOBS = 12_000
WARM_UP = 1_000
IN_FLIGHT = 256
POLL_SECONDS = 0.1
"""Delay before each status read, as in the official Python client."""
WAITING = 50_000
READS = 10_000
READERS = 8
_SUBMIT = f"/{APP_ID}"
_READ = "/fal-ai/flux/requests/"


def measure() -> dict[str, float]:
    """Return all figures by name: rates per second, times in ms, memory in MB."""
    return {**uvloop.run(_throughput()), **uvloop.run(_waiting())}


def render(figures: dict[str, float]) -> str:
    """Format the figures as a Markdown table."""
    rows = [
        ("complete jobs per second", "jobs_per_second", "at least 1,200"),
        ("HTTP responses per second", "answers_per_second", ""),
        ("job from submit to result, median, ms", "job_p50_ms", ""),
        ("job from submit to result, p99, ms", "job_p99_ms", ""),
        ("server CPU time per job, ms", "server_cpu_ms_per_job", ""),
        ("server's core utilization, %", "server_core_percent", "lower if other processes used the core"),
        ("submits per second while filling the queue", "waiting_submits_per_second", ""),
        (f"memory with {WAITING:,} waiting, MB", "waiting_rss_mb", "under 400"),
        ("status of a waiting request, median, ms", "waiting_status_p50_ms", ""),
        ("status of a waiting request, p99, ms", "waiting_status_p99_ms", "under 50"),
    ]
    lines = [f"| {what} | {figures[name]:,.2f} | {bar} |" for what, name, bar in rows]
    return "\n".join(["| endpoint, echo engine | measured | bar |", "|---|---:|---|", *lines])


@contextlib.contextmanager
def _server(*options: str) -> Iterator[tuple[str, int]]:
    """Run a server on the first core and this process on the last; yields URL and process id."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "batch.server", "--data-dir", folder, "--engine", "echo", *options]
        os.sched_setaffinity(0, {cores[0]})  # inherited by the child and its threads
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        os.sched_setaffinity(0, {cores[-1]})
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process.pid
        finally:
            os.sched_setaffinity(0, cores)
            process.kill()
            process.communicate()


def _body(number: int) -> bytes:
    return orjson.dumps(
        {
            "image_url": f"https://images.example/{number:08}.jpg",
            "prompt": f"image {number} as a watercolor, wet on wet, soft light, visible paper grain",
            "strength": 0.85,
            "seed": number,
        }
    )


async def _throughput() -> dict[str, float]:
    times: list[float] = []
    polls = 0

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal polls
        began = time.perf_counter()
        headers = {"idempotency-key": f"job-{number}", "content-type": "application/json"}
        async with session.post(_SUBMIT, data=_body(number), headers=headers) as response:
            request_id = orjson.loads(await response.read())["request_id"]
        status = 202
        while status == 202:
            await asyncio.sleep(POLL_SECONDS)
            async with session.get(f"{_READ}{request_id}/status") as response:
                await response.read()
                status, polls = response.status, polls + 1
        async with session.get(_READ + request_id) as response:
            assert orjson.loads(await response.read())["seed"] == number
        times.append(time.perf_counter() - began)

    with _server("--slots", "64") as (url, pid):
        async with _session(url) as session:
            numbers = count()
            await _all(WARM_UP, lambda: one(session, next(numbers)))
            times.clear()
            polls, began, spent = 0, time.perf_counter(), _cpu_seconds(pid)
            await _all(JOBS, lambda: one(session, next(numbers)))
            seconds, spent = time.perf_counter() - began, _cpu_seconds(pid) - spent
    marks = quantiles(times, n=100)
    return {
        "jobs_per_second": JOBS / seconds,
        "answers_per_second": (2 * JOBS + polls) / seconds,
        "job_p50_ms": marks[49] * 1000,
        "job_p99_ms": marks[98] * 1000,
        "server_cpu_ms_per_job": 1000 * spent / JOBS,
        "server_core_percent": 100 * spent / seconds,
    }


async def _waiting() -> dict[str, float]:
    ids: list[str] = []
    times: list[float] = []

    async def put(session: aiohttp.ClientSession) -> None:
        headers = {"content-type": "application/json"}
        async with session.post(_SUBMIT, data=_body(len(ids)), headers=headers) as response:
            ids.append(orjson.loads(await response.read())["request_id"])

    async def look(session: aiohttp.ClientSession) -> None:
        began = time.perf_counter()
        async with session.get(f"{_READ}{random.choice(ids)}/status") as response:
            assert "queue_position" in orjson.loads(await response.read())
        times.append(time.perf_counter() - began)

    with _server("--slots", "1", "--service-time", "86400") as (url, pid):
        async with _session(url) as session:
            await put(session)  # this request occupies the only slot
            began = time.perf_counter()
            await _all(WAITING, lambda: put(session))
            seconds = time.perf_counter() - began
            del ids[0]
            await _all(READS, lambda: look(session), READERS)
            rss_kb = int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])
    marks = quantiles(times, n=100)
    return {
        "waiting_submits_per_second": WAITING / seconds,
        "waiting_rss_mb": rss_kb / 1000,
        "waiting_status_p50_ms": marks[49] * 1000,
        "waiting_status_p99_ms": marks[98] * 1000,
    }


def _session(url: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(url, connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def _all(number: int, work, at_once: int = IN_FLIGHT) -> None:
    left = iter(range(number))

    async def take() -> None:
        for _ in left:
            await work()

    await asyncio.gather(*(take() for _ in range(at_once)))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    measured = measure()
    sys.stdout.write(render(measured) + "\n")
