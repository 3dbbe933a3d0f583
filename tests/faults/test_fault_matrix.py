"""Every fault of the endpoint, with probability 30%: nothing is paid twice, nothing is lost, nothing hangs.

`make soak` is larger, with 300 jobs at 5% and at 50%. `matrix.carry_out` has the checks.
Here the event loop's clock is the quick one of `tests.quick_time`: nearly all the time of a case is backoff.
"""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import pytest

from batch.server.faults.plan import FaultPoint
from tests.faults.matrix import Case, carry_out, kinds, together
from tests.quick_time import SPEED, QuickLoop

JOBS = 40
SHARE = 0.3
AT_ONCE = 6
SECONDS = 60.0 * SPEED
"""Seconds on the loop's clock after which a command counts as hanging."""


def carry_out_all(cases: list[Case], folder: Path) -> None:
    """Run several cases concurrently: nearly all the time is backoff."""

    async def main() -> None:
        room = anyio.Semaphore(AT_ONCE)

        async def one(number: int, case: Case) -> None:
            async with room:
                await carry_out(case, folder / str(number), JOBS, seconds=SECONDS)

        async with anyio.create_task_group() as tasks:
            for number, case in enumerate(cases):
                tasks.start_soon(one, number, case)

    logging.getLogger("batch").setLevel(logging.CRITICAL)
    try:
        anyio.run(main, backend_options={"loop_factory": QuickLoop})
    finally:
        logging.getLogger("batch").setLevel(logging.NOTSET)


@pytest.mark.parametrize("moment", FaultPoint)
def test_each_fault_alone(tmp_path, moment):
    """The server ignores idempotency keys, as fal does: each lost response was one POST, and none is repeated."""
    cases = [Case((kind,), SHARE, keys=False) for kind in kinds() if kind.at is moment]
    assert cases
    carry_out_all(cases, tmp_path)


def test_each_fault_of_a_submit_where_keys_are_honoured(tmp_path):
    """A submit of unknown outcome is repeated with its key: nothing stays unknown, nothing is paid twice."""
    carry_out_all([Case((kind,), SHARE, keys=True) for kind in kinds() if kind.at is FaultPoint.SUBMIT], tmp_path)


@pytest.mark.parametrize("keys", [True, False], ids=["keys honoured", "keys ignored"])
def test_all_faults_together(tmp_path, keys):
    """5% of each fault, with and without keys."""
    carry_out_all([together(0.05, keys=keys)], tmp_path)
