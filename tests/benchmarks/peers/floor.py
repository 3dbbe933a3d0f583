"""The floor: a bare aiohttp loop with three requests per job, without a journal. With `--files` it also stores images.

    python -m tests.benchmarks.peers.floor URL JOBS [--at-once 64] [--first-poll 0] [--every 0.5] [--files DIR]

Prints one JSON line. `--download-only` omits the three requests and only downloads, hashes and writes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import orjson
import uvloop

APP = "fal-ai/flux/dev/image-to-image"
CONNECTIONS = 64


async def job(session: aiohttp.ClientSession, given: argparse.Namespace, number: int) -> str:
    """Submit, poll, read the result and return the image's URL."""
    body = orjson.dumps({"image_url": "https://images.example/a.jpg", "prompt": f"p {number}", "seed": number})
    headers = {"content-type": "application/json"}
    async with session.post(f"{given.url}/{APP}", data=body, headers=headers) as reply:
        ticket = orjson.loads(await reply.read())
    await asyncio.sleep(given.first_poll)
    while True:
        async with session.get(ticket["status_url"]) as reply:
            if orjson.loads(await reply.read())["status"] == "COMPLETED":
                break
        await asyncio.sleep(given.every)
    async with session.get(ticket["response_url"]) as reply:
        return orjson.loads(await reply.read())["images"][0]["url"]


async def keep(session: aiohttp.ClientSession, url: str, folder: Path) -> None:
    """Download, hash and write an image, without validation and without fsync."""
    async with session.get(url) as reply:
        data = await reply.read()
    (folder / hashlib.sha256(data).hexdigest()).write_bytes(data)


async def work(session: aiohttp.ClientSession, given: argparse.Namespace, numbers: Iterator[int]) -> None:
    for number in numbers:
        url = f"{given.url}/files/{number}.jpg"
        if not given.download_only:
            url = await job(session, given, number)
        if given.files is not None:
            await keep(session, url, given.files)


async def main(given: argparse.Namespace) -> None:
    began, numbers = time.perf_counter(), iter(range(given.jobs))
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(work(session, given, numbers) for _ in range(given.at_once)))
    print(json.dumps({"jobs": given.jobs, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("jobs", type=int)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--first-poll", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=0.5)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--download-only", action="store_true")
    uvloop.run(main(parser.parse_args()))
