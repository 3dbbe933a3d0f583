"""The unmodified official Python client: concurrent `AsyncClient.subscribe`, as in its documentation.

python -m tests.benchmarks.peers.fal_python URL JOBS [--at-once 64]
"""

from __future__ import annotations

import argparse
import asyncio

import fal_client
import fal_client.client

APP = "fal-ai/flux/dev/image-to-image"


async def main(given: argparse.Namespace) -> None:
    fal_client.client.QUEUE_URL_FORMAT = given.url + "/"
    client, room = fal_client.AsyncClient(key="benchmark:none"), asyncio.Semaphore(given.at_once)

    async def job(number: int) -> None:
        asked = {"image_url": "https://images.example/a.jpg", "prompt": f"p {number}", "seed": number}
        async with room:
            await client.subscribe(APP, arguments=asked)

    await asyncio.gather(*map(job, range(given.jobs)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("jobs", type=int)
    parser.add_argument("--at-once", type=int, default=64)
    asyncio.run(main(parser.parse_args()))
