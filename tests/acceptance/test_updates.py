"""`--updates stream` and `--updates webhook`: the same table, and after kill -9 nothing is paid for twice."""

from __future__ import annotations

import pytest

from tests.acceptance.command import accepted, restyle, results, start, write_manifest
from tests.acceptance.endpoint import endpoint
from tests.acceptance.test_crash import kill, reached

ROWS = 120
MODES = ["stream", "webhook"]


def begin(tmp_path, mode, *more):
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    return directory, ("run", manifest, "-o", directory, "--engine", "echo", "--updates", mode, *more)


def whole(directory):
    """Check that every row is done and every job was accepted once."""
    assert results(directory).column("status").to_pylist() == ["done"] * ROWS
    assert accepted(directory) == ROWS


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_told_of_its_ends_is_a_run_like_any_other(tmp_path, mode):
    """Exit 0, every row done, every job accepted once."""
    directory, command = begin(tmp_path, mode, "--service-time", "0.3s")
    ended = restyle(*command)
    assert ended.code == 0, ended.text
    whole(directory)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_that_was_told_pays_for_nothing_twice(tmp_path, mode):
    """Kill -9 halfway: the same command resumes, reads open requests and submits only missing jobs."""
    directory, command = begin(tmp_path, mode, "--service-time", "0.5s")
    with start(*command) as process:
        reached(directory, process, ROWS // 3, "done")
        kill(process.pid)
        process.communicate()
    again = restyle(*command)
    assert again.code == 0, again.text
    whole(directory)


def test_callbacks_need_an_address_that_the_target_reaches(tmp_path):
    """Refused before the run starts, with what to do."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", "http://gpu-box:8787", "--updates", "webhook")
    assert ended.code == 2
    assert "webhook.public_url" in ended.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("private", [True, False])
def test_a_server_of_ones_own_on_this_machine_calls_back_where_it_may(tmp_path, private):
    """With --allow-private it does; otherwise the run ends at its first submit with the reason, and no row fails."""
    manifest = write_manifest(tmp_path / "m.csv", range(20))
    with endpoint(tmp_path, "--engine", "echo", *(["--allow-private"] if private else []), keyed=False) as server:
        ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", server.url, "--updates", "webhook")
    assert ended.code == (0 if private else 2), ended.text
    assert {row["status"] for row in results(tmp_path / "run").to_pylist()} == {"done" if private else "pending"}
    assert private or "Invalid webhook URL" in ended.out
    assert private or "--allow-private" in ended.out
