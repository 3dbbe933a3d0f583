"""The server in this process, on loopback, with an engine that tests control."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from dataclasses import dataclass, field

import aiohttp
import orjson

from batch.fal.endpoint import APP_ID
from batch.server.engines.base import (
    EngineCancelled,
    EngineFailure,
    EngineImage,
    EngineInfo,
    EngineResult,
    WorkerCrashed,
)
from batch.server.serve import ServeOptions, serve

SUBMIT = f"/{APP_ID}"
INPUT = {"image_url": "https://example.com/cat.png", "prompt": "a cat"}


@dataclass
class ScriptedEngine:
    """Obeys the prompt: `fail`, `crash`, `crash once`, `boom`, `hold` (until `go` is set); otherwise returns images."""

    slots: int = 2
    fetches_source: bool = False
    size: int = 100
    seen: list = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def info(self):
        return EngineInfo("scripted", "no model", "7", None, self.slots, self.fetches_source)

    async def start(self):
        pass

    async def aclose(self):
        pass

    async def generate(self, job, on_step, cancelled):
        self.seen.append(job)
        prompt = job.input.prompt
        if prompt == "fail":
            raise EngineFailure(422, "image_too_small", "too small", ctx={"min_width": 16})
        if prompt == "crash" or (prompt == "crash once" and len(self.seen) == 1):
            raise WorkerCrashed("killed by signal 9")
        if prompt == "boom":
            raise RuntimeError("unexpected bug")
        while prompt.startswith("hold") and not self.go.is_set():
            if cancelled():
                raise EngineCancelled
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.go.wait(), 0.01)
        on_step(1, 2)
        on_step(2, 2)
        images = tuple(
            EngineImage(f"{job.request_id}-{n}".encode().ljust(self.size, b"."), "image/png", 1000, 500)
            for n in range(job.input.num_images)
        )
        return EngineResult(images, job.seed, (), {"inference": 0.5}, prompt)


@contextlib.asynccontextmanager
async def serving(data_dir, engine=None, **options):
    """Run a server; yields an aiohttp session with its base URL."""
    url, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
    given = ServeOptions(data_dir, port=0, **options)
    task = asyncio.create_task(serve(given, ready=url.set_result, engine=engine or ScriptedEngine(), stop=stop))
    await asyncio.wait([task, url], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        async with aiohttp.ClientSession(url.result()) as session:
            yield session
    finally:
        stop.set()
        await task


@contextlib.contextmanager
def full_disk(database, statement):
    """Within the block, the server's open database refuses a kind of statement on requests as a full disk does."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        refusal = "SELECT RAISE(ROLLBACK, 'database or disk is full');"
        connection.execute(f"CREATE TRIGGER refuse BEFORE {statement} ON request BEGIN {refusal} END")
        try:
            yield
        finally:
            connection.execute("DROP TRIGGER refuse")


async def call(session, method, path, **options):
    """Send a request and return status, headers and JSON body of the response."""
    async with session.request(method, path, **options) as response:
        return response.status, response.headers, orjson.loads(await response.read() or b"null")


async def submit(session, prompt="a cat", headers=None, **inputs):
    """Submit a request and return its id."""
    status, _, body = await call(session, "POST", SUBMIT, json={**INPUT, "prompt": prompt, **inputs}, headers=headers)
    assert status == 200, body
    return body["request_id"]


def read(request_id, tail=""):
    """Return the path of a request, with `tail` appended."""
    return f"/fal-ai/flux/requests/{request_id}{tail}"


async def completed(session, request_id):
    """Read the status stream to its end and return the last status."""
    last = None
    async with session.get(read(request_id, "/status/stream?logs=1")) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                last = orjson.loads(line[6:])
    return last


async def result(session, request_id):
    """Wait for completion and return status, headers and body of the result."""
    assert (await completed(session, request_id))["status"] == "COMPLETED"
    return await call(session, "GET", read(request_id))
