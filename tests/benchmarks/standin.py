"""The stand-in service of the benchmarks: the queue protocol in memory, so that the service is never the bottleneck.

    python -m tests.benchmarks.standin --port 0 [--service-time 1.0 | --log-normal 4.0,0.6] [--slots 32]

It accepts everything and executes nothing: a request starts when a slot is free and completes after its service time.
Each result has one small image. It prints one JSON line with its URL; `GET /counts` returns the counts of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop
from aiohttp import web

APP = "fal-ai/flux"


@dataclass(slots=True)
class Request:
    starts: float
    ends: float
    seed: int
    noticed: float = 0.0


class Queue:
    def __init__(self, slots: int | None, median: float, sigma: float) -> None:
        self.free = [0.0] * slots if slots else None
        self.median, self.sigma, self.rng = median, sigma, random.Random(1)
        self.requests: dict[str, Request] = {}
        self.submits = self.reads = self.results = self.uploads = 0
        self.number = 0

    def accept(self, body: bytes) -> str:
        now = time.monotonic()
        service = self.median * math.exp(self.sigma * self.rng.gauss(0, 1)) if self.sigma else self.median
        starts = now
        if self.free is not None:
            starts = max(now, heapq.heappop(self.free))
            heapq.heappush(self.free, starts + service)
        self.number += 1
        request_id = f"00000000-0000-7000-8000-{self.number:012d}"
        self.requests[request_id] = Request(starts, starts + service, orjson.loads(body).get("seed") or 0)
        self.submits += 1
        return request_id


def application(queue: Queue, loaded: bytes) -> web.Application:
    def urls(base: str, request_id: str) -> dict[str, str]:
        url = f"{base}/{APP}/requests/{request_id}"
        return {
            "request_id": request_id,
            "response_url": url,
            "status_url": url + "/status",
            "cancel_url": url + "/cancel",
        }

    def answer(value: object, status: int = 200) -> web.Response:
        return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")

    async def submit(request: web.Request) -> web.Response:
        request_id = queue.accept(await request.read())
        base = f"http://{request.host}"
        return answer(
            {"status": "IN_QUEUE", "queue_position": 0, "logs": None, "metrics": {}, **urls(base, request_id)}
        )

    async def status(request: web.Request) -> web.Response:
        queue.reads += 1
        request_id = request.match_info["id"]
        known, now = queue.requests[request_id], time.monotonic()
        base = f"http://{request.host}"
        if now >= known.ends:
            known.noticed = known.noticed or now
            body = {"status": "COMPLETED", "logs": [], "metrics": {"inference_time": known.ends - known.starts}}
            return answer({**body, **urls(base, request_id)})
        if now >= known.starts:
            return answer({"status": "IN_PROGRESS", "logs": [], **urls(base, request_id)}, 202)
        return answer({"status": "IN_QUEUE", "queue_position": 0, **urls(base, request_id)}, 202)

    async def stream(request: web.Request) -> web.StreamResponse:
        """Send an event at least every 5 s while the request runs, and one when it completes."""
        request_id = request.match_info["id"]
        known, urls_of = queue.requests[request_id], urls(f"http://{request.host}", request_id)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        state = {"status": "IN_PROGRESS", "logs": [], **urls_of}
        while (left := known.ends - time.monotonic()) > 0:
            await response.write(b"data: " + orjson.dumps(state) + b"\n\n")
            await asyncio.sleep(min(left, 5.0))
        state |= {"status": "COMPLETED", "metrics": {"inference_time": known.ends - known.starts}}
        await response.write(b"data: " + orjson.dumps(state) + b"\n\n")
        return response

    async def result(request: web.Request) -> web.Response:
        known, now = queue.requests[request.match_info["id"]], time.monotonic()
        if now < known.ends:  # an early read of the result counts as a status read
            queue.reads += 1
            return answer({"detail": "Request is still in progress"}, 400)
        queue.results += 1
        known.noticed = known.noticed or now
        image = {
            "url": f"http://{request.host}/files/{known.seed}.jpg",
            "width": 64,
            "height": 64,
            "content_type": "image/jpeg",
        }
        return answer(
            {
                "images": [image],
                "timings": {"inference": known.ends - known.starts},
                "seed": known.seed,
                "has_nsfw_concepts": [False],
                "prompt": "x",
            }
        )

    async def initiate(request: web.Request) -> web.Response:
        url = f"http://{request.host}/files/up{queue.uploads}"
        return answer({"upload_url": url, "file_url": url})

    async def put(request: web.Request) -> web.Response:
        await request.read()
        queue.uploads += 1
        return web.Response()

    async def file(request: web.Request) -> web.Response:
        # A JPEG comment with the name makes each file distinct; equal files would be stored once.
        note = request.match_info["name"].encode()
        comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
        return web.Response(body=loaded[:2] + comment + loaded[2:], content_type="image/jpeg")

    async def counts(_: web.Request) -> web.Response:
        delays = sorted(
            (r.noticed - r.ends) / (r.ends - r.starts)
            for r in queue.requests.values()
            if r.noticed and r.ends > r.starts
        )
        at = (lambda q: delays[min(len(delays) - 1, int(q * len(delays)))]) if delays else (lambda q: 0.0)
        return answer(
            {
                "submits": queue.submits,
                "reads": queue.reads,
                "results": queue.results,
                "uploads": queue.uploads,
                "notice_median": at(0.5),
                "notice_p95": at(0.95),
            }
        )

    app = web.Application(client_max_size=2**28)
    app.router.add_get("/counts", counts)
    app.router.add_get("/files/{name}", file)
    app.router.add_put("/files/{name}", put)
    app.router.add_post("/storage/upload/initiate", initiate)
    app.router.add_get("/" + APP + "/requests/{id}/status", status)
    app.router.add_get("/" + APP + "/requests/{id}/status/stream", stream)
    app.router.add_get("/" + APP + "/requests/{id}", result)
    app.router.add_post("/" + APP + "/{path:.*}", submit)
    return app


async def serve(arguments: argparse.Namespace) -> None:
    median, sigma = arguments.service_time, 0.0
    if arguments.log_normal:
        median, sigma = (float(part) for part in arguments.log_normal.split(","))
    image = b"\xff\xd8\xff\xd9" * (arguments.image_bytes // 4)
    if arguments.image:
        image = Path(arguments.image).read_bytes()
    runner = web.AppRunner(application(Queue(arguments.slots, median, sigma), image), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", arguments.port, backlog=4096)
    await site.start()
    port = runner.addresses[0][1]
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes stdin or ends


def main() -> None:
    gc.disable()  # the server keeps all requests in memory, and collections would affect the measurement
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service-time", type=float, default=0.0)
    parser.add_argument("--log-normal", default="")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--image", default="")
    parser.add_argument("--image-bytes", type=int, default=1024)
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
