"""Shares of the limit of open files, and waiting for a missing descriptor."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from hypothesis import assume, given
from hypothesis import strategies as st

from batch.errors import InputError, StorageError
from batch.system import open_files
from batch.system.descriptors import (
    CONNECTIONS,
    ENOUGH,
    HINTS,
    Allowance,
    client_share,
    described,
    lacks_descriptor,
    limits_to_try,
    patiently,
    server_share,
)
from tests.acceptance.command import REPOSITORY

INFINITY = -1
FULL = OSError(errno.EMFILE, "Too many open files")


# --- the limit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "hard", "tried"),
    [
        (256, 4096, [4096]),
        (256, 20_000, [20_000, 10_240]),
        (256, INFINITY, [ENOUGH, 10_240]),  # macOS
        (1024, 2**30, [ENOUGH, 10_240]),  # a container
        (256, 256, []),
        (2**20, 2**20, []),
        (INFINITY, INFINITY, []),
        (20_000, 2**20, [ENOUGH]),
    ],
)
def test_the_soft_limit_is_raised_to_the_hard_one_within_reason(soft, hard, tried):
    """Never lowered, and with a second choice if a system refuses the first."""
    assert limits_to_try(soft, hard, INFINITY) == tried


def limited(code: str, soft: int, hard: int) -> str:
    """Return the output of a fresh interpreter under these limits."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    return ended.stdout.strip()


def test_the_process_gets_all_that_it_may_and_counts_what_it_uses():
    """Descriptors that are already open are not available."""
    code = (
        "import resource; from batch.system.open_files import allowance\n"
        "held = [open('/dev/null') for _ in range(10)]\n"
        "first, second = allowance(), allowance()\n"
        "print(first.before, first.allowed, second.before, resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "print(13 <= first.in_use <= 15, first.free == first.allowed - first.in_use)"
    )
    assert limited(code, 64, 512) == "64 512 64 512\nTrue True"
    assert limited(code, 128, 128).startswith("128 128 128 128")


def test_a_process_without_a_free_descriptor_knows_it():
    """The listing of descriptors needs one itself."""
    code = (
        "from batch.system.open_files import allowance\n"
        "held = []\n"
        "try:\n    while True: held.append(open('/dev/null'))\n"
        "except OSError: pass\n"
        "print(allowance().free)"
    )
    assert limited(code, 64, 64) == "0"


def test_where_there_is_no_limit_nothing_is_bounded(monkeypatch):
    """Windows has no module `resource`."""
    monkeypatch.setattr(open_files, "resource", None)
    found = open_files.allowance()
    assert found.allowed is None
    assert client_share(found, hints=True, nearby=True)[:3] == (CONNECTIONS, HINTS, 8)
    assert described(found, 7) == "open files: no limit; at most 7 connections at once"


# --- the shares -------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 2**20)


def test_too_small_a_limit_is_said_at_the_start():
    """The limit, the number in use, and what to do."""
    for share in (client_share, server_share):
        options = {"hints": False, "nearby": True} if share is client_share else {}
        with pytest.raises(InputError, match=r"40 are allowed and 30 are in use.*`ulimit -n 256`"):
            share(Allowance(40, 40, 30), **options)


@given(st.integers(1, 2**20), NUMBERS, st.booleans(), st.booleans())
def test_a_run_never_opens_more_than_is_free(allowed, in_use, hints, nearby):
    """Connections to three hosts, hint connections, and files; an error if there are too few."""
    allowance = Allowance(allowed, allowed, min(allowed, in_use))
    assume(allowance.free >= (50 if nearby else 80))
    share = client_share(allowance, hints=hints, nearby=nearby)
    assert share.connections * (1 if nearby else 3) + share.hints + share.files <= allowance.free
    assert share.connections >= 4
    assert share.files >= 1
    assert bool(share.hints) is hints


@given(st.integers(1, 2**20), NUMBERS, st.integers(0, 5000))
def test_a_server_never_opens_more_than_is_free(allowed, in_use, workers):
    """Its connections, outgoing requests with their DNS look-ups, files, and three for each worker process."""
    allowance = Allowance(allowed, allowed, min(allowed, in_use))
    assume(allowance.free >= 30)
    share = server_share(allowance, workers)
    opened = share.connections + 2 * share.outgoing + share.downloads + share.threads + 3 * share.workers
    assert opened <= allowance.free
    assert min(share[:4]) >= 1
    assert min(workers, 1) <= share.workers <= workers


@pytest.mark.parametrize("allowed", [64, 128, 256, 1024])
def test_the_embedded_endpoint_takes_all_connections_of_its_run(allowed):
    """Both have the same limit; a run starts with about 30 open descriptors, the endpoint with about 25."""
    share = client_share(Allowance(allowed, allowed, 30), hints=True, nearby=True)
    assert share.connections + share.hints <= server_share(Allowance(allowed, allowed, 25), workers=2).connections


def test_an_ample_limit_bounds_nothing():
    """Then our own defaults apply."""
    share = client_share(Allowance(20_000, 256, 40), hints=True, nearby=False)
    assert share == (CONNECTIONS, HINTS, 8, False)
    assert client_share(Allowance(256, 256, 40), hints=False, nearby=False).is_bounded


def test_what_is_allowed_is_one_line():
    """With the original limit, if it was raised."""
    assert described(Allowance(4096, 256, 30), 256) == (
        "open files: 4,096 allowed (raised from 256); at most 256 connections at once"
    )
    assert described(Allowance(256, 256, 30), 51) == "open files: 256 allowed; at most 51 connections at once"


# --- a missing descriptor ---------------------------------------------------------------------------------


def raised_from(cause: BaseException) -> StorageError:
    error = StorageError("images cannot be written")
    error.__cause__ = cause
    return error


KEY = ConnectionKey("host.invalid", 443, True, True, None, None, None)


def connecting(cause: OSError) -> aiohttp.ClientError:
    error = aiohttp.ClientConnectorError(KEY, cause)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.ENFILE, "Too many open files in system"),
        raised_from(FULL),
        raised_from(raised_from(FULL)),
        connecting(FULL),
        ExceptionGroup("tasks", [ValueError(), raised_from(FULL)]),
        ImportError("libx.so: cannot open shared object file: Too many open files"),
    ],
)
def test_a_missing_descriptor_is_recognized(error):
    """By its number, also as the cause of an error of ours or of a library."""
    assert lacks_descriptor(error)


@pytest.mark.parametrize(
    "error",
    [None, OSError(), OSError(errno.ENOSPC, "No space left"), raised_from(PermissionError()), ImportError("no x")],
)
def test_nothing_else_is_taken_for_one(error):
    """Waiting for other files to close does not help against a full disk."""
    assert not lacks_descriptor(error)


def test_work_is_done_again_until_a_descriptor_is_free():
    """With growing pauses; the result is that of the successful try."""
    pauses: list[float] = []
    tries = iter([FULL, raised_from(FULL), None])

    def work() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "done"

    assert patiently(work, pauses.append) == "done"
    assert pauses == [0.01, 0.02]


def test_waiting_has_an_end_and_other_errors_none_at_all():
    """After the time limit the error is raised; any other error at once."""
    pauses: list[float] = []

    def work() -> None:
        raise raised_from(FULL)

    with pytest.raises(StorageError):
        patiently(work, pauses.append, seconds=5.0)
    assert 5.0 <= sum(pauses) < 6.0
    pauses.clear()
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 / 0, pauses.append)
    assert not pauses
