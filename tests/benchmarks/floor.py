"""The floor: a bare aiohttp loop, three requests a job, no journal, no logic.

python -m tests.benchmarks.floor URL JOBS [AT_ONCE]
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time

import aiohttp
import orjson
import uvloop

APP = "fal-ai/flux/dev/image-to-image"


async def work(session: aiohttp.ClientSession, url: str, numbers, first_poll: float) -> None:
    for number in numbers:
        body = orjson.dumps({"image_url": "https://pictures.example/a.jpg", "prompt": f"p {number}", "seed": number})
        headers = {"content-type": "application/json"}
        async with session.post(f"{url}/{APP}", data=body, headers=headers) as reply:
            ticket = orjson.loads(await reply.read())
        await asyncio.sleep(first_poll)
        while True:
            async with session.get(ticket["status_url"]) as reply:
                if orjson.loads(await reply.read())["status"] == "COMPLETED":
                    break
            await asyncio.sleep(0.5)
        async with session.get(ticket["response_url"]) as reply:
            orjson.loads(await reply.read())


async def main(url: str, count: int, at_once: int, first_poll: float) -> None:
    began = time.perf_counter()
    numbers = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:
        await asyncio.gather(*(work(session, url, numbers, first_poll) for _ in range(at_once)))
    wall = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(orjson.dumps({"jobs": count, "wall": wall, "cpu": used.ru_utime + used.ru_stime}).decode())


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 64, 0.0))
