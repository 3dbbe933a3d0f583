"""The embedded endpoint: a child process that starts and ends with its run."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time

import aiohttp
import pytest

from batch.embedded import embedded_endpoint
from batch.errors import RestyleError, StoppedEarly, StorageError
from tests.edges.serving import INPUT, SUBMIT, call, result, submit


def run(coroutine):
    return asyncio.run(coroutine)


async def until(happened, seconds=15):
    """Poll every few milliseconds: the only way to observe a process that is not ours."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


def is_free(data_dir):
    """Return whether no server locks the data dir; the kernel releases the lock of a dead one."""
    with (data_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def test_the_endpoint_serves_while_the_block_lasts_and_keeps_its_port(tmp_path):
    """Started in time, gone afterwards; the next one has the same URL and the old requests."""

    async def first():
        begin = time.monotonic()
        async with embedded_endpoint(tmp_path, "echo", 2, 0.0) as endpoint:
            assert time.monotonic() - begin < 10, "0.4 s on a free machine"
            async with aiohttp.ClientSession(endpoint.url) as session:
                assert (await call(session, "GET", "/health"))[2]["slots"] == 2
                request_id = await submit(session)
                assert (await result(session, request_id))[0] == 200
        assert is_free(tmp_path)
        return endpoint.url, request_id

    async def second(request_id):
        log_path = tmp_path / "own.log"
        async with (
            embedded_endpoint(tmp_path, "echo", None, 0.0, log_path) as endpoint,
            aiohttp.ClientSession(endpoint.url) as session,
        ):
            assert (await result(session, request_id))[0] == 200
        return endpoint.url

    url, request_id = run(first())
    assert run(second(request_id)) == url
    assert "stopping" in (tmp_path / "server.log").read_text()
    assert "stopping" in (tmp_path / "own.log").read_text()


def test_what_the_block_raises_leaves_as_it_came(tmp_path):
    """Without an exception group, and the child is gone."""

    async def use():
        async with embedded_endpoint(tmp_path, "echo", None, 0.0):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(use())
    assert is_free(tmp_path)


def test_a_cancelled_block_ends_the_child(tmp_path):
    """Ctrl-C in the run must not leave a server behind."""

    async def use():
        inside = asyncio.Event()

        async def block():
            async with embedded_endpoint(tmp_path, "echo", None, 0.0):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_free(tmp_path)

    run(use())


def test_a_child_that_does_not_start_is_explained_by_its_log(tmp_path):
    """One error with the exit code, the log's path and its last lines."""

    async def use(data_dir):
        async with embedded_endpoint(data_dir, "magic", None, 0.0):
            pytest.fail("it started")

    (tmp_path / "server.log").write_text("an old line\n")
    with pytest.raises(RestyleError, match=r"exit code 2.*server\.log\n.*'magic'") as caught:
        run(use(tmp_path))
    assert "an old line" not in str(caught.value)


def test_a_child_that_dies_is_replaced_on_the_same_port(tmp_path):
    """Its requests continue under their ids at the same URL."""

    async def use():
        async with embedded_endpoint(tmp_path, "echo", 1, 0.3) as endpoint:
            async with aiohttp.ClientSession(endpoint.url) as session:
                ids = [await submit(session) for _ in range(2)]
            os.kill(endpoint.pid, signal.SIGKILL)
            await until(lambda: endpoint.restarts == 1)
            async with aiohttp.ClientSession(endpoint.url) as session:
                assert [(await result(session, one))[0] for one in ids] == [200, 200]

    run(use())


def test_a_child_that_dies_again_and_again_ends_the_run(tmp_path):
    """Resumable, and the error has the path of the log."""

    async def use():
        async with embedded_endpoint(tmp_path, "echo", None, 0.0, restarts=1) as endpoint:
            os.kill(endpoint.pid, signal.SIGKILL)
            await until(lambda: endpoint.restarts == 1)
            os.kill(endpoint.pid, signal.SIGKILL)
            await asyncio.Event().wait()

    with pytest.raises(StoppedEarly, match=r"died 2 times .*server\.log"):
        run(use())


def test_a_disk_that_takes_nothing_more_ends_the_run(tmp_path):
    """The endpoint could wait for space, but then the run would see nothing but 503."""
    answers = set()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # a quota that needs no rights
            try:  # the child inherits it
                endpoint = await stack.enter_async_context(embedded_endpoint(tmp_path, "echo", 2, 0.0))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            http = await stack.enter_async_context(aiohttp.ClientSession(endpoint.url))
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(aiohttp.ClientError):
                    answers.add((await call(http, "POST", SUBMIT, json=INPUT))[0])

    with pytest.raises(StorageError, match=r"could not be written.*run the same command again"):
        run(main())
    assert answers == {200, 503}


def test_the_child_ends_with_a_killed_parent(tmp_path):
    """Even kill -9 of the run leaves no server behind; Ctrl-C does not reach it."""
    program = f"""
import asyncio, json
from pathlib import Path
from batch.embedded import embedded_endpoint
async def main():
    async with embedded_endpoint(Path({str(tmp_path)!r}), "echo", None, 0.0) as endpoint:
        print(json.dumps([endpoint.pid, endpoint.url]), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    pid, _ = json.loads(parent.stdout.readline())
    assert os.getpgid(pid) != os.getpgid(parent.pid)
    assert not is_free(tmp_path)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    run(until(lambda: is_free(tmp_path)))


def test_the_child_loads_nothing_that_it_does_not_need():
    """For a fast start: no data frames, no command line, no notebooks."""
    program = (
        "import sys, batch.server.__main__, batch.embedded\n"
        "print([m for m in ('polars', 'pyarrow', 'cyclopts', 'pandas', 'tqdm', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
