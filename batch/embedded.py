"""The embedded endpoint: our server as a child process of a run.

The child listens on loopback and has its own process group, so Ctrl-C at the terminal reaches only the run, which then
collects the jobs in flight. It ends when its standard input closes, which the kernel does even if the parent is killed.
A child that dies is restarted on the same port, so URLs and request ids stay valid.
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
from anyio.abc import Process

from batch.errors import ExitCode, InputError, RestyleError, StoppedEarly, StorageError
from batch.system.descriptors import lacks_descriptor
from batch.system.durable import make_folders

__all__ = ["Endpoint", "embedded_endpoint"]

START_SECONDS = 60.0
"""Time for a child to answer after its start: an engine may have to load a model."""
STOP_SECONDS = 10.0
"""Time for a child to end after its input is closed; then it is killed."""
RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
_LINES_SHOWN = 8
_TRIES, _PAUSE_SECONDS = 60, 0.5
"""Tries to start a child while no descriptor is free, and the pause between two tries."""


@dataclass(slots=True)
class Endpoint:
    """A running embedded endpoint."""

    url: str
    """`http://127.0.0.1:PORT`; it does not change while the endpoint runs."""
    pid: int
    """Process id of the current child."""
    restarts: int = 0
    """Number of children that died and were replaced."""


@dataclass(frozen=True, slots=True)
class _Command:
    """How to start the child."""

    data_dir: Path
    engine: str
    slots: int | None
    service_time: float
    log_path: Path
    faults: Path | None

    def line(self, port: int) -> list[str]:
        options = ["--data-dir", str(self.data_dir), "--engine", self.engine, "--port", str(port)]
        if self.slots is not None:
            options += ["--slots", str(self.slots)]
        options += ["--service-time", str(self.service_time), "--allow-private", "--with-parent"]
        if self.faults is not None:
            options += ["--faults", str(self.faults)]
        return [sys.executable, "-m", "batch.server", *options]


@asynccontextmanager
async def embedded_endpoint(
    data_dir: Path,
    engine: str,
    slots: int | None,
    service_time: float,
    log_path: Path | None = None,
    faults: Path | None = None,
    *,
    restarts: int = RESTARTS,
) -> AsyncIterator[Endpoint]:
    """Run the endpoint as a child process while the block lasts.

    Args:
        data_dir: folder of its queue, files and last port; requests of an earlier run continue.
        engine: `preview` or `echo`.
        slots: concurrent requests; None: the engine's default.
        service_time: seconds that a job of `echo` takes.
        log_path: the child's log is appended here; None: `data_dir/server.log`.
        faults: file of failures to simulate.
        restarts: maximum restarts within a minute.

    Raises:
        RestyleError: the child did not start; the message has the last lines of its log. InputError if it rejected its
            input.
        StorageError: it can no longer write to its disk.
        StoppedEarly: it died more than `restarts` times a minute.
    """
    await anyio.to_thread.run_sync(make_folders, data_dir)
    command = _Command(data_dir, engine, slots, service_time, log_path or data_dir / "server.log", faults)
    with command.log_path.open("ab") as log:
        child, endpoint = await _start(command, 0, log)
        holder = _Holder(child)
        failure: BaseException | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_supervise, command, holder, endpoint, log, restarts)
                try:
                    yield endpoint
                except Exception as error:  # raised by the block: the task group would wrap it
                    failure = error
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Only the supervisor can have raised.
            raise group.exceptions[0] from None
        finally:
            await _end(holder.child)
        if failure is not None:
            raise failure


@dataclass(slots=True)
class _Holder:
    child: Process


async def _supervise(command: _Command, holder: _Holder, endpoint: Endpoint, log: IO[bytes], restarts: int) -> None:
    """Replace a child that dies, on the same port."""
    port = int(endpoint.url.rpartition(":")[2])
    deaths: deque[float] = deque(maxlen=restarts)
    while True:
        code = await holder.child.wait()
        await holder.child.aclose()
        if code == ExitCode.STOPPED_EARLY:
            raise StorageError(_disk_full(command.data_dir))
        now = anyio.current_time()
        earliest = deaths[0] if len(deaths) == restarts else -math.inf
        if now - earliest < RESTART_WINDOW_SECONDS:
            raise StoppedEarly(_died_too_often(code, command.log_path, restarts))
        deaths.append(now)
        holder.child, replaced = await _start(command, port, log)
        endpoint.pid, endpoint.restarts = replaced.pid, endpoint.restarts + 1


async def _start(command: _Command, port: int, log: IO[bytes]) -> tuple[Process, Endpoint]:
    seen = command.log_path.stat().st_size
    child = await _open_process(command.line(port), log)
    try:
        with anyio.fail_after(START_SECONDS):
            announced = json.loads(await _first_line(child))
    except BaseException as error:
        await _end(child, STOP_SECONDS if isinstance(error, ValueError) else 0.0)
        if isinstance(error, ValueError | TimeoutError):
            what = (
                f"within {START_SECONDS:.0f} s"
                if isinstance(error, TimeoutError)
                else f"(exit code {child.returncode})"
            )
            lines = _last_lines(command.log_path, seen)
            if child.returncode == ExitCode.STOPPED_EARLY:
                raise StorageError(_disk_full(command.data_dir)) from error
            # The child rejected its input, and the same command would fail again.
            kind = InputError if child.returncode == ExitCode.BAD_INPUT else RestyleError
            raise kind(f"the embedded endpoint did not start {what}; see {command.log_path}\n{lines}") from error
        raise
    return child, Endpoint(announced["url"], announced["pid"])


async def _open_process(line: list[str], log: IO[bytes]) -> Process:
    """Start a process; retry while no descriptor is free for its pipes."""
    for _ in range(_TRIES):
        try:
            return await anyio.open_process(line, stderr=log, start_new_session=True)
        except OSError as error:
            if not lacks_descriptor(error):
                raise
        await anyio.sleep(_PAUSE_SECONDS)
    raise StoppedEarly("cannot start the embedded endpoint: too many open files; raise `ulimit -n` and run again")


async def _first_line(child: Process) -> bytes:
    """Return the child's first line of output, or what it wrote before it ended."""
    assert child.stdout is not None, "it is a pipe"
    line = b""
    async for chunk in child.stdout:
        line += chunk
        if b"\n" in chunk:
            break
    return line


async def _end(child: Process, grace: float = STOP_SECONDS) -> None:
    """Close the child's standard input, which asks it to end; kill it if it does not."""
    with anyio.CancelScope(shield=True):
        if child.stdin is not None:
            await child.stdin.aclose()
        with anyio.move_on_after(grace):
            await child.wait()
        if child.returncode is None:
            child.kill()
        await child.wait()
        await child.aclose()


def _died_too_often(code: int, log_path: Path, restarts: int) -> str:
    return (
        f"the embedded endpoint died {restarts + 1} times within {RESTART_WINDOW_SECONDS:.0f} s, last with exit code "
        f"{code}; see {log_path}, then run the same command again\n{_last_lines(log_path, 0)}"
    )


def _disk_full(data_dir: Path) -> str:
    """Return the message for a full disk; the child's log is on the same disk and cannot be quoted."""
    return (
        f"{data_dir} could not be written, so the embedded endpoint stopped; free space on that disk (or raise its"
        " quota), then run the same command again. What was durable before is still there."
    )


def _last_lines(log_path: Path, since: int) -> str:
    """Return the last lines that the child logged after byte `since`."""
    with log_path.open("rb") as file:
        file.seek(max(since, log_path.stat().st_size - 8192))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-_LINES_SHOWN:])
