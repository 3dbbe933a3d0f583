"""`restyle cancel` with a slow target over real HTTP: concurrent, counted by outcome, interrupted and repeated."""

from __future__ import annotations

import asyncio
import signal
import time

import anyio
import pytest

from batch import api
from batch.journal.events import Accepted, Intended
from batch.journal.writer import open_journal
from batch.types import JobKey, RequestId, Ticket
from tests.acceptance.command import finish, jobs_in, restyle, started, wait_for, write_manifest
from tests.faults.target import Target, answer, serving

SECONDS = 0.1
NEXT = "`restyle run` reads how they ended"


def asked(target: Target) -> list[str]:
    """Ids of cancelled requests, in order."""
    return [path.split("/")[-2] for method, path, _, _ in target.seen if method == "PUT" and path.endswith("/cancel")]


def outcome(number: int):
    """Every tenth request has ended, every tenth is unknown; the others are cancelled."""
    words = {1: (400, "ALREADY_COMPLETED"), 2: (404, "NOT_FOUND")}
    return words.get(number % 10, (202, "CANCELLATION_REQUESTED"))


async def slow_cancel(target, request, asked_for):
    await asyncio.sleep(SECONDS)
    status, word = outcome(int(request.path.split("/")[-2].rpartition("-")[2]))
    return answer({"status": word}, status)


def left_open(tmp_path, target, count):
    """Return the directory of a run that was killed with `count` requests open."""
    directory = tmp_path / "run"
    ended = restyle("run", write_manifest(tmp_path / "m.csv", range(1)), "-o", directory, "--target", target.url)
    assert ended.code == 0, ended.text

    async def leave():
        async with open_journal(directory / "journal.db") as journal:
            for start in range(0, count, 500):
                events = []
                for number in range(start, min(start + 500, count)):
                    key, name = JobKey(f"{number:032x}"), f"00000000-0000-7000-8000-{number:012d}"
                    below = f"{target.url}/fal-ai/flux/requests/{name}"
                    ticket = Ticket(RequestId(name), f"{below}/status", below, f"{below}/cancel")
                    events += [Intended(key, 1.0, 1, b"{}", 0.0), Accepted(key, 2.0, ticket)]
                await journal.record(*events)

    anyio.run(leave)
    assert jobs_in(directory, "accepted") == count
    return directory


def test_hundreds_are_cancelled_in_seconds_and_counted_by_outcome(tmp_path):
    """640 cancellations of 100 ms take 64 s one by one; "not found" differs from "too late"."""
    with serving(cancel=slow_cancel) as target:
        directory = left_open(tmp_path, target, 640)
        began = time.monotonic()
        found = api.cancel_sync(directory)
        took = time.monotonic() - began
        assert found == api.Cancelled(asked=640, requested=512, too_late=64, not_found=64, open=640)
        assert took < 16, "a quarter of the sequential time"
        assert len(asked(target)) == len(set(asked(target))) == 640
        ended = restyle("cancel", directory)
    assert ended.code == 0, ended.text
    first, second, third = ended.out.splitlines()
    assert first == ("640 open requests: 512 cancellations requested, 64 too late, 64 not found, 0 without an answer")
    assert second.startswith("not found: the target does not know these requests")
    assert third.startswith(NEXT)
    assert jobs_in(directory, "accepted") == 640, "the next run reads how they ended"


def test_a_target_without_answers_is_said_and_exit_code_4(tmp_path):
    """The same command asks again and then succeeds."""

    async def broken(target, request, asked_for):
        return answer({"detail": "bad gateway"}, 502)

    with serving(cancel=broken) as target:
        directory = left_open(tmp_path, target, 20)
        ended = restyle("cancel", directory)
        assert ended.code == 4, ended.text
        assert ended.out.startswith("20 open requests: 0 cancellations requested, 0 too late, 0 not found, 20 without")
        assert "20 requests without an answer; run the same command again" in ended.out
        target.handlers["cancel"] = slow_cancel
        again = restyle("cancel", directory)
    assert (again.code, again.out.splitlines()[0][:42]) == (0, "20 open requests: 16 cancellations request")


def test_a_refused_key_is_exit_code_6(tmp_path):
    """With an error message."""

    async def refused(target, request, asked_for):
        return answer({"detail": "No user found for Key ID and Secret"}, 401)

    with serving(cancel=refused) as target:
        ended = restyle("cancel", left_open(tmp_path, target, 3))
    assert ended.code == 6
    assert "refused the key" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_far_it_came_and_the_same_command_goes_on(tmp_path, number):
    """Exit 4 at once with the counts so far; nothing is lost, the lock is free."""
    with serving(cancel=slow_cancel) as target:
        directory = left_open(tmp_path, target, 3000)
        with started("cancel", directory) as process:
            wait_for(lambda: len(asked(target)) > 200, "two hundred asked")
            process.send_signal(number)
            ended = finish(process, 20)
        assert ended.code == 4, ended.text
        assert "Traceback" not in ended.text
        assert len(asked(target)) < 3000
        first, *_ = ended.out.splitlines()
        assert first.startswith("3,000 open requests: ")
        assert "run the same command again to retry them" in ended.out
        assert "run the same command to resume" in ended.err
        seen = len(asked(target))
        with started("cancel", directory) as process:
            wait_for(lambda: len(asked(target)) > seen + 100, "it goes on")
    assert jobs_in(directory, "accepted") == 3000
