"""`python -m batch.server`: the process of an embedded endpoint.

Writes its URL as one JSON line to standard output and logs to standard error. With `--with-parent` it exits when its
standard input closes, so that it never outlives the process that started it, even after kill -9.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

from batch.errors import InputError, RestyleError
from batch.server.engines.flux.options import FluxOptions
from batch.server.http.auth import load_keys
from batch.server.serve import ServeOptions, run_server

__all__ = ["main"]

_DISK_PATIENCE = 5.0
"""Seconds that an embedded endpoint waits for free disk space."""


def main(arguments: list[str] | None = None) -> int:
    """Run a server and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m batch.server", description="Serve the endpoint on this machine.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: the previous port if free, else any")
    parser.add_argument("--engine", default="preview")
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--service-time", type=float, default=0.0, help="engine echo: seconds per job")
    parser.add_argument("--model", help="engine flux: folder or hub id")
    parser.add_argument("--devices", help="engine flux: cuda:0,cuda:1 or cpu")
    parser.add_argument("--safety-checker", help="engine flux: folder or hub id")
    parser.add_argument("--quantize", help="engine flux: fp8")
    parser.add_argument("--offload", help="engine flux: model, sequential or none")
    parser.add_argument("--warm-up", help="engine flux: 1024x1024,768x1344 or none")
    parser.add_argument("--allow-private", action="store_true", help="permit loopback and private addresses")
    parser.add_argument("--price", type=float, default=0.0, help="US dollars per megapixel, for the platform API")
    parser.add_argument("--faults", type=Path, default=None, help="faults file: failures to inject")
    parser.add_argument("--keys", type=Path, default=None, help="file with API keys")
    parser.add_argument("--with-parent", action="store_true", help="exit when standard input closes")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        options = ServeOptions(
            data_dir=given.data_dir,
            host=given.host,
            port=given.port,
            engine=given.engine,
            slots=given.slots,
            service_time=given.service_time,
            flux=FluxOptions.of_flags(
                given.model, given.devices, given.safety_checker, given.quantize, given.offload, given.warm_up
            ),
            allow_private=given.allow_private,
            price_usd=given.price,
            faults=given.faults,
            # An embedded endpoint serves its parent only; the variable is meant for another server on this machine.
            keys=load_keys(given.keys, {} if given.with_parent else os.environ),
            # The parent run writes to the same disk and reports the problem immediately.
            disk_patience=_DISK_PATIENCE if given.with_parent else None,
        )
        run_server(options, ready=_say, stop=partial(_stop_event, with_parent=given.with_parent))
    except RestyleError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


def _say(url: str) -> None:
    sys.stdout.write(json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()


def _stop_event(*, with_parent: bool) -> asyncio.Event:
    stop = asyncio.Event()
    if with_parent:
        loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

        def read() -> None:
            if not os.read(stdin, 4096):
                loop.remove_reader(stdin)
                stop.set()

        try:
            loop.add_reader(stdin, read)
        except (OSError, ValueError) as error:
            raise InputError(f"--with-parent needs a pipe as standard input: {error}") from error
    return stop


if __name__ == "__main__":
    sys.exit(main())
