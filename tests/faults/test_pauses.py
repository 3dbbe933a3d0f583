"""`Retry-After` over real HTTP: no submits before that time, and the displays show the time."""

from __future__ import annotations

import json
import signal
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from tests.acceptance.command import finish, jobs_in, log, restyle, started, wait_for, write_manifest
from tests.faults import target as honest
from tests.faults.target import answer, serving

ON_THE_WIRE = 0.6
"""Seconds for reading the response and for submits already sent, on a busy machine."""


def refusing(number: int, header):
    """Accepts all submits except the `number`-th, which gets a 429; records the arrival times."""
    arrived: list[float] = []

    async def submit(target, request, asked):
        arrived.append(time.monotonic())
        if len(arrived) == number:
            del target.requests[asked.id]
            return answer({"detail": "slow down"}, 429, retry_after=header())
        return await honest.submit(target, request, asked)

    return submit, arrived


def seconds() -> str:
    return "2"


def date() -> str:
    """Two to three seconds from now: HTTP dates have no fractions."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)


@pytest.mark.parametrize(
    ("flags", "header"),
    [(("--rate", "40/s"), seconds), ((), seconds), (("--max-in-flight", "80"), seconds), (("--rate", "40/s"), date)],
)
def test_a_429_pauses_the_whole_run(tmp_path, flags, header):
    """Also with the default settings of a URL target, which have no rate, and with all rows in flight."""
    submit, arrived = refusing(10, header)
    manifest = write_manifest(tmp_path / "m.csv", range(80))
    with serving(submit=submit) as target:
        ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", target.url, "--no-download", *flags)
    assert ended.code == 0, ended.text
    assert len(target.requests) == 80
    refused = arrived[9]
    assert [at - refused for at in arrived if refused + ON_THE_WIRE < at < refused + 1.9] == []
    assert max(arrived) > refused + 1.9, "the refused submit is repeated after the pause"
    assert "pause" in ended.err
    assert [line["action"] for line in log(tmp_path / "run") if line["action"] in {"paused", "resumed"}] == [
        "paused",
        "resumed",
    ]


def test_status_and_lines_say_until_when_a_pause_goes(tmp_path):
    """A pause of a year is cut to an hour, with a message. A running run is shown as paused, a stopped one is not."""
    submit, arrived = refusing(3, lambda: "31536000")
    manifest, directory = write_manifest(tmp_path / "m.csv", range(20)), tmp_path / "run"
    with serving(submit=submit) as target:
        command = ("run", manifest, "-o", directory, "--target", target.url, "--no-download", "--rate", "10/s")
        with started(*command) as process:
            wait_for(
                lambda: (directory / "log.jsonl").exists() and b'"paused"' in (directory / "log.jsonl").read_bytes(),
                "the pause",
            )
            facts = json.loads(restyle("status", directory, "--json").out)
            shown = restyle("status", directory).out
            process.send_signal(signal.SIGTERM)
            ended = finish(process)
    assert 3500 < facts["paused_until"] - time.time() < 3602
    assert "paused until " in shown
    assert "for another 59 min" in shown or "for another 60 min" in shown
    assert "31,536,000 s" in ended.err
    assert "3,600 s" in ended.err
    assert " UTC" in ended.err
    assert ended.code == 4
    assert (len(arrived), jobs_in(directory, "pending")) == (3, 1)
    assert json.loads(restyle("status", directory, "--json").out)["paused_until"] is None
