"""The endpoint is killed with -9 repeatedly during its work: every accepted request ends once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys

import aiohttp

from tests.acceptance.command import environment
from tests.acceptance.endpoint import APP, INPUT

JOBS = 1000
KILLS = 20
WORKERS = 32
GONE = (aiohttp.ClientError, OSError, TimeoutError)
"""Exceptions of a call to a killed server."""


class Server:
    """The server's process; after a restart it uses the same port."""

    def __init__(self, folder):
        self._command = [sys.executable, "-m", "batch.server", "--data-dir", str(folder), "--engine", "echo"]
        self.url = ""

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            *self._command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        url = json.loads(await self.process.stdout.readline())["url"]
        assert self.url in {"", url}, "it listens elsewhere"
        self.url = url

    async def end(self, number):
        self.process.send_signal(number)
        await self.process.communicate()


class Caller:
    """A simple client loop: each failed call is repeated, a submit with the same idempotency key."""

    def __init__(self, session):
        self._session = session
        self.ids = {}
        self.results = {}

    async def ask(self, method, path, **options):
        while True:
            with contextlib.suppress(*GONE):
                async with self._session.request(method, path, **options) as response:
                    return response.status, await response.json()
            await asyncio.sleep(0.01)

    async def submit(self, number):
        key = {"idempotency-key": f"job {number}"}
        status, ticket = await self.ask("POST", f"/{APP}", json={**INPUT, "seed": number}, headers=key)
        assert status == 200, ticket
        return ticket["request_id"]

    async def job(self, number):
        request_id = self.ids[number] = await self.submit(number)
        path = f"/fal-ai/flux/requests/{request_id}"
        while (await self.ask("GET", f"{path}/status"))[0] != 200:
            await asyncio.sleep(0.01)
        status, output = await self.ask("GET", path)
        assert status == 200, output
        assert number not in self.results
        self.results[number] = output


async def killed_while_working(folder):
    """Process all jobs, kill the server at even intervals; return the client and the ids of each second submit."""
    server = Server(folder)
    await server.start()
    numbers = iter(range(JOBS))
    async with aiohttp.ClientSession(server.url) as session:
        caller = Caller(session)

        async def work():
            for number in numbers:
                await caller.job(number)

        async def kill():
            for kill in range(KILLS):
                while len(caller.results) < (kill + 0.5) * JOBS / KILLS:
                    await asyncio.sleep(0.001)
                await server.end(signal.SIGKILL)
                assert len(caller.results) < JOBS, "all jobs were done before the last kill"
                await server.start()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(kill())
            for _ in range(WORKERS):
                tasks.create_task(work())
        again = {number: await caller.submit(number) for number in range(JOBS)}
        _, health = await caller.ask("GET", "/health")
    await server.end(signal.SIGTERM)
    assert server.process.returncode == 0
    return caller, again, health


def test_a_server_killed_twenty_times_loses_nothing_and_does_nothing_twice(tmp_path):
    """1,000 jobs: 1,000 correct results, none twice, and returned ids stay valid."""
    caller, again, health = asyncio.run(killed_while_working(tmp_path))
    assert {number: output["seed"] for number, output in caller.results.items()} == {n: n for n in range(JOBS)}
    assert caller.ids == again
    assert len(set(caller.ids.values())) == JOBS
    assert health["accepted"] == JOBS
    assert (health["queue_depth"], health["running"]) == (0, 0)
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        rows = database.execute("SELECT count(*), count(ended_at), sum(status = 200) FROM request").fetchone()
    assert rows == (JOBS, JOBS, JOBS)
