"""`batch.api` in a program: async and sync, also inside a running event loop as in a notebook."""

from __future__ import annotations

import asyncio
import threading

import pytest

from batch import api
from batch.errors import ConfigError, ExitCode, ManifestError, RunDirectoryError, StoppedEarly
from batch.journal.states import State
from batch.run.observers import ProgressCounter
from batch.testing.observer import RecordingObserver
from tests.acceptance.command import accepted, results, wait_for, write_manifest

SETTINGS = {"target": {"engine": "echo"}}


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "m.csv", range(5))


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
async def test_plan_and_run_are_coroutines(tmp_path, manifest):
    """The README's three lines, awaited; an observer and a tally receive the events."""
    from batch.api import plan, run

    found = await plan(manifest, settings=SETTINGS)
    assert (found.estimate.rows, found.estimate.to_do, found.profile.name, found.profile.paid) == (5, 5, "local", False)
    assert list(tmp_path.iterdir()) == [manifest]

    observer, tally = RecordingObserver(), ProgressCounter()
    summary = await run(manifest, tmp_path / "run", settings=SETTINGS, observer=observer, tally=tally)
    assert (summary.exit_code, summary.done, summary.rows, summary.stopped) == (ExitCode.COMPLETE, 5, 5, None)
    assert (tally.jobs, tally.done, tally.in_flight) == (5, 5, 0)
    assert len(observer.actions("accepted")) == 5
    assert results(tmp_path / "run").num_rows == 5

    found = await plan(manifest, tmp_path / "run", settings=SETTINGS)
    assert (found.estimate.to_do, found.estimate.done) == (0, 5)
    status = await api.status(tmp_path / "run")
    assert (status.counts.by_state[State.DONE], status.running) == (5, False)
    totals = await api.export(tmp_path / "run", tmp_path / "copy.parquet")
    assert (totals.rows, totals.done) == (5, 5)


def test_the_plain_twins_need_no_loop(tmp_path, manifest):
    """In a script."""
    from batch.api import plan_sync, run_sync

    assert plan_sync(manifest, settings=SETTINGS).estimate.to_do == 5
    assert run_sync(manifest, tmp_path / "run", settings=SETTINGS).done == 5
    assert api.status_sync(tmp_path / "run").counts.by_state[State.DONE] == 5
    assert api.export_sync(tmp_path / "run").rows == 5
    assert api.cancel_sync(tmp_path / "run").asked == 0


def test_the_plain_twins_work_inside_a_running_loop(tmp_path, manifest):
    """A notebook cell runs in a loop: no nested loop, no patching, no leftovers."""

    async def cell():
        assert api.plan_sync(manifest, settings=SETTINGS).estimate.to_do == 5
        return api.run_sync(manifest, tmp_path / "run", settings=SETTINGS)

    before = threading.active_count()
    assert asyncio.run(cell()).done == 5
    wait_for(lambda: threading.active_count() == before, "the end of the threads")
    assert accepted(tmp_path / "run") == 5


def test_an_error_is_the_same_exception_everywhere(tmp_path, manifest):
    """Sync or async, with its message: not in an exception group, and with the same type."""
    with pytest.raises(ManifestError, match="there is no manifest"):
        api.plan_sync(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="did you mean"):
        api.run_sync(manifest, tmp_path / "run", settings={"limits": {"budget": 1}})
    with pytest.raises(RunDirectoryError, match="there is no run"):
        api.status_sync(tmp_path / "run")
    with pytest.raises(ManifestError, match="there is no manifest"):
        asyncio.run(api.run(tmp_path / "none.csv", tmp_path / "run"))


def test_an_endpoint_that_does_not_start_is_one_error(tmp_path, manifest):
    """Raised inside several task groups, it arrives unwrapped, with the end of the server's log."""
    api.run_sync(manifest, tmp_path / "run", settings=SETTINGS | {"limits": {"rows": 1}})
    (tmp_path / "run" / "endpoint" / "server.db").write_bytes(b"no database" * 1000)
    with pytest.raises(Exception, match="the embedded endpoint did not start") as caught:
        api.run_sync(manifest, tmp_path / "run", settings=SETTINGS)
    assert "server.db as the request database" in str(caught.value)
    assert not isinstance(caught.value, ExceptionGroup)


def test_settings_are_those_of_the_file_and_win_over_it(tmp_path, manifest):
    """Both together: the file first, then the arguments."""
    config = tmp_path / "c.toml"
    config.write_text("[input]\nstrength = 0.5\nguidance_scale = 2.0\n")
    api.run_sync(manifest, tmp_path / "run", config=config, settings=SETTINGS | {"input": {"strength": 0.25}})
    assert set(results(tmp_path / "run")["strength"].to_pylist()) == {0.25}
    assert set(results(tmp_path / "run")["guidance_scale"].to_pylist()) == {2.0}


def test_money_needs_a_yes(tmp_path, manifest, monkeypatch):
    """A paid run without `yes`, budget or `confirm` is refused before anything is opened."""
    monkeypatch.setenv("FAL_KEY", "id:secret")
    with pytest.raises(ConfigError, match="yes=True"):
        api.run_sync(manifest, tmp_path / "run", settings={"target": {"name": "fal"}})
    with pytest.raises(StoppedEarly, match="not confirmed"):
        api.run_sync(manifest, tmp_path / "run", settings={"target": {"name": "fal"}}, confirm=lambda _: False)


def test_confirm_is_shown_the_plan(tmp_path, manifest):
    """A custom display can ask; "no" stops the run."""
    seen = []

    def confirm(found):
        seen.append(found.estimate.to_do)
        return False

    with pytest.raises(StoppedEarly, match="nothing was submitted"):
        api.run_sync(manifest, tmp_path / "run", settings=SETTINGS, confirm=confirm)
    assert seen == [5]
    assert not (tmp_path / "run" / "results.parquet").exists()


def test_two_runs_in_one_process_keep_apart(tmp_path):
    """No module has state: two concurrent runs are each complete."""

    async def both():
        runs = [
            api.run(write_manifest(tmp_path / f"{n}.csv", range(n, n + 20)), tmp_path / str(n), settings=SETTINGS)
            for n in (100, 200)
        ]
        return await asyncio.gather(*runs)

    assert [summary.done for summary in asyncio.run(both())] == [20, 20]
    assert results(tmp_path / "100")["name"].to_pylist() == [str(n) for n in range(100, 120)]
    assert accepted(tmp_path / "100") == accepted(tmp_path / "200") == 20
