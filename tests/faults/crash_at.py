"""Run `restyle ...` in a process that kills itself at one durable transition, or records all transitions.

    python -m tests.faults.crash_at kill STATE HAPPENING before|after N restyle-arguments...
    python -m tests.faults.crash_at record FILE restyle-arguments...

`quick` before either word runs it on the clock of `tests.quick_time`.

A transition is one row of `batch.journal.states.TABLE`, counted from 1 in the order in which the journal commits them.
`before`: the transaction with the N-th one does not start. `after`: it is on disk, but its caller has no answer yet.
SIGKILL leaves no time for cleanup in either case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from batch.cli.main import main
from batch.journal.database import JournalDatabase
from batch.journal.events import Event, Uploaded
from batch.journal.states import State, advance
from tests.quick_time import quicken


def transitions(journal: JournalDatabase, calls: Sequence[Sequence[Event]]) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table that a group of events passes."""
    events = [event for call in calls for event in call if not isinstance(event, Uploaded)]
    known = journal.find([event.job_key for event in events])
    states = {key: job.state for key, job in known.items()}
    for event in events:
        state = states.get(event.job_key, State.PENDING)
        yield str(state), str(event.kind)
        states[event.job_key] = advance(state, event.kind)


def watch(before: Callable[[Counter], None], after: Callable[[Counter], None]) -> None:
    """Call both functions around each commit with the count of each row so far, including this commit."""
    commit, happened = JournalDatabase.commit, Counter()

    def watched(self: JournalDatabase, calls: Sequence[Sequence[Event]]) -> list[Exception | None]:
        happened.update(transitions(self, calls))
        before(happened)
        refusals = commit(self, calls)
        after(happened)
        return refusals

    JournalDatabase.commit = watched


def kill_at(state: str, happening: str, when: str, number: int) -> None:
    def die(happened: Counter) -> None:
        if happened[state, happening] >= number:
            os.kill(os.getpid(), signal.SIGKILL)

    def live(_: Counter) -> None:
        pass

    watch(*((die, live) if when == "before" else (live, die)))


def record(file: Path) -> None:
    """Write one JSON line per process: [[state, happening, count], ...], rewritten after each commit."""
    earlier = file.read_text() if file.exists() else ""

    def note(happened: Counter) -> None:
        file.write_text(earlier + json.dumps([[*row, count] for row, count in happened.items()]) + "\n")

    watch(lambda _: None, note)


if __name__ == "__main__":
    if sys.argv[1] == "quick":
        quicken()
        del sys.argv[1]
    if sys.argv[1] == "kill":
        kill_at(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
        sys.exit(main(sys.argv[6:]))
    else:
        record(Path(sys.argv[2]))
        sys.exit(main(sys.argv[3:]))
