"""SIGKILL at every durable transition of a job: the same command completes, and only times and ids differ.

The kill points are generated from `batch.journal.states.TABLE`, alternating before and after the commit. `make soak`
takes both for each, in every scenario that has it, with 300 jobs, and 200 random moments, on the
real clock; here the commands run on the quick clock of `tests.quick_time`.
"""

from __future__ import annotations

import os
import pickle
from functools import cache

import pytest
from filelock import FileLock

from batch.journal.states import TABLE
from tests.faults.scenarios import SCENARIOS, Kill, Undisturbed, moments, survive, survive_at, undisturbed

JOBS = 60
ROWS = [(str(state), str(happening)) for state, happening in TABLE]


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Return a scenario's results without a kill; run on first use, once for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @cache
    def of(name: str) -> Undisturbed:
        kept = shared / f"calm-{name}.pickle"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_bytes(
                    pickle.dumps(undisturbed(SCENARIOS[name], tmp_path_factory.mktemp(name), JOBS, quick=True))
                )
        return pickle.loads(kept.read_bytes())

    return of


def home(calm, row) -> str:
    """Return the first scenario that passes a row."""
    found = next((name for name in SCENARIOS if row in calm(name).rows), None)
    assert found is not None, f"no scenario goes through {row}: it needs one"
    return found


@pytest.mark.parametrize(("number", "row"), list(enumerate(ROWS)), ids=[" ".join(row) for row in ROWS])
def test_a_run_that_is_killed_at_a_transition_completes(tmp_path, calm, number, row):
    """By the server's count no job is paid for twice; by ours every job has its result."""
    name = home(calm, row)
    expected = calm(name)
    kill = Kill(*row, "before" if number % 2 else "after", max(1, expected.rows[row] // 2))
    survive(kill, SCENARIOS[name], tmp_path, JOBS, expected, quick=True)


@pytest.mark.parametrize("share", moments(4, 1.0, seed=4))
def test_a_run_that_is_killed_at_any_moment_completes(tmp_path, calm, share):
    """The same for random moments, from process start to end."""
    expected = calm("plain")
    survive_at(share * expected.seconds, SCENARIOS["plain"], tmp_path, JOBS, expected, quick=True)


def test_the_scenarios_go_through_no_row_that_is_not_in_the_table(calm):
    """The scenarios pass every row; otherwise a kill point would be missing."""
    assert {row for name in SCENARIOS for row in calm(name).rows} == set(ROWS)
