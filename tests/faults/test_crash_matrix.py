"""SIGKILL at every durable transition of a job: the same command completes, and nothing differs but times and ids.

The kill points are made from `lifecycle.TABLE`, by turns before and after the commit; `make soak` takes both of each,
in every scenario that has it, with 300 jobs, and 200 random moments. Here the commands run on a quick clock
(`tests.quick_time`), there on the real one.
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
    """What a scenario comes to undisturbed; run when it is first asked for, once for all of xdist's workers."""
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
    """The first scenario that goes through a row."""
    found = next((name for name in SCENARIOS if row in calm(name).rows), None)
    assert found is not None, f"no scenario goes through {row}: it needs one"
    return found


@pytest.mark.parametrize(("number", "row"), list(enumerate(ROWS)), ids=[" ".join(row) for row in ROWS])
def test_a_run_that_is_killed_at_a_transition_completes(tmp_path, calm, number, row):
    """Counted by the server: no job was paid for twice; counted by us: every job has its result."""
    name = home(calm, row)
    expected = calm(name)
    kill = Kill(*row, "before" if number % 2 else "after", max(1, expected.rows[row] // 2))
    survive(kill, SCENARIOS[name], tmp_path, JOBS, expected, quick=True)


@pytest.mark.parametrize("share", moments(4, 1.0, seed=4))
def test_a_run_that_is_killed_at_any_moment_completes(tmp_path, calm, share):
    """The same at random moments, from the start of the process to its end."""
    expected = calm("plain")
    survive_at(share * expected.seconds, SCENARIOS["plain"], tmp_path, JOBS, expected, quick=True)


def test_the_scenarios_go_through_no_row_that_is_not_in_the_table(calm):
    """And through each that is: else a kill point would be missing."""
    assert {row for name in SCENARIOS for row in calm(name).rows} == set(ROWS)
