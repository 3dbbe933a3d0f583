"""Run `restyle` on a slow disk and stop it twice when the end of the last job is recorded.

    python -m tests.faults.slow_disk JOBS SECONDS run MANIFEST -o DIR ...

From that moment each transaction takes SECONDS, and SIGINT comes twice: most recorded events are not on disk yet, and
their callers are gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from batch.cli.main import main
from batch.journal.database import JournalDatabase
from batch.journal.events import Event, Finished
from batch.journal.writer import JournalWriter


def slow_down(jobs: int, seconds: float) -> None:
    commit, record = JournalDatabase.commit, JournalWriter.record
    finished = 0

    def slowly(self: JournalDatabase, calls: Any) -> Any:
        if finished == jobs:
            time.sleep(seconds)
        return commit(self, calls)

    async def counted(self: JournalWriter, *events: Event) -> None:
        nonlocal finished
        finished += any(isinstance(event, Finished) for event in events)
        if finished == jobs and isinstance(events[-1], Finished):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        await record(self, *events)

    JournalDatabase.commit, JournalWriter.record = slowly, counted  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(int(sys.argv[1]), float(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
