"""Every fault of the endpoint as a case: a run against it, and the required end state.

The cases are generated from the server's own table of fault points and actions, so a new fault is a new case. Server
and run share a process, with real loopback HTTP, a real journal and real files. A case mostly waits, so several run
concurrently.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import numpy as np
from PIL import Image

from batch import api
from batch.errors import ExitCode
from batch.journal.database import JournalDatabase
from batch.journal.states import State
from batch.server.faults import plan as faults
from batch.server.faults.plan import FaultAction, FaultPoint
from batch.server.serve import ServeOptions, serve
from tests.faults.evidence import Evidence, examine

RUN_SECONDS = 900.0
"""Seconds until a command counts as hung. The unluckiest of 300 uploads, half of which fail, takes minutes."""
ROUNDS = 25
_HELD_ROUNDS = 4
"""Commands that only look up lost submits, before the remaining unknown ones are submitted again."""
_LISTED_BY = 1.0
"""Seconds until the server has finished accepted requests and lists them; submitting again earlier may pay for a job
twice."""

_READ_ANSWERS = ("status = 404", "status = 401", "status = 429\nretry_after = 0.05", "status = 503")
_ANSWERS = {
    FaultPoint.SUBMIT: ("status = 422", "status = 429\nretry_after = 0.05", "status = 500", "status = 503"),
    FaultPoint.STATUS: _READ_ANSWERS,
    FaultPoint.RESULT: (*_READ_ANSWERS, "status = 500"),
    FaultPoint.CANCEL: ("status = 500",),
    FaultPoint.UPLOAD: ("status = 429", "status = 503"),
    FaultPoint.FILE: _READ_ANSWERS,
    FaultPoint.LISTING: ("status = 429", "status = 500"),
}
_WITHHELD = "status = 404\nreads = 20"
"""More reads than one command makes for a file."""
_OPTIONS = {
    FaultAction.ANSWER_AFTER_ACCEPT: ("status = 500", "status = 502"),
    FaultAction.LATE: ("seconds = 0.2",),
    FaultAction.SLOW: ("seconds = 0.2",),
    FaultAction.FAIL: ("status = 503\nretryable = true", "status = 500\nretryable = false"),
    FaultAction.EXPIRE: ("seconds = 0",),
    FaultAction.REQUEUE: ("seconds = 0.1",),
    FaultAction.REFUSE: ("status = 403\nreads = 3", _WITHHELD),
    FaultAction.NO_IMAGES: ("reads = 2", "reads = 8"),
}
_LOSES = (FaultAction.DROP_AFTER_ACCEPT, FaultAction.ANSWER_AFTER_ACCEPT)


class Kind(NamedTuple):
    """One fault with its options."""

    at: FaultPoint
    do: FaultAction
    options: str = ""

    @property
    def name(self) -> str:
        """A name, for reports and test ids."""
        return " ".join([self.at, self.do, *self.options.replace("\n", ", ").split(" = ")])

    def entry(self, share: float) -> str:
        """Return the entry of a faults file."""
        return f'[[fault]]\nat = "{self.at}"\ndo = "{self.do}"\nshare = {share}\n{self.options}\n'

    @property
    def fails_jobs(self) -> bool:
        """Whether it fails the job itself, or cannot be distinguished from that by any number of reads."""
        own = self.at is FaultPoint.EXECUTE  # a request that is requeued twice fails there
        refused = self.at is FaultPoint.SUBMIT and "422" in self.options
        final = self.at is FaultPoint.RESULT and self.options == "status = 500"  # with fal's body: finally believed
        return own or refused or final or self.at is FaultPoint.CANCEL

    @property
    def withholds(self) -> bool:
        """Whether it fails rows whose result exists and is paid for; a later command collects it, free."""
        return self.options == _WITHHELD or (self.do is FaultAction.NO_IMAGES and self.options == "reads = 8")

    @property
    def doubtful(self) -> bool:
        """Whether it leaves the outcome of a submit unknown that did not arrive."""
        lost = self.do is FaultAction.DROP or (
            self.do is FaultAction.ANSWER and self.options in {"status = 500", "status = 503"}
        )
        return self.at is FaultPoint.SUBMIT and lost


def kinds() -> Iterator[Kind]:
    """Return all faults of the server's table, each with every relevant set of options."""
    for point, actions in faults.ACTIONS.items():
        for action in sorted(actions):
            for options in _ANSWERS[point] if action is FaultAction.ANSWER else _OPTIONS.get(action, ("",)):
                yield Kind(point, action, options)


@dataclass(frozen=True)
class Case:
    """Faults with a probability, and a server that supports idempotency keys or not."""

    faults: tuple[Kind, ...]
    share: float
    keys: bool

    @property
    def name(self) -> str:
        """A name, for reports."""
        what = self.faults[0].name if len(self.faults) == 1 else "all together"
        return f"{what} at {self.share:.0%}, keys {'honoured' if self.keys else 'ignored'}"

    def file(self) -> str:
        """Return the content of the faults file."""
        entries = [kind.entry(self.share) for kind in self.faults]
        if self.faults[0].at is FaultPoint.LISTING:  # the look-up needs lost submits
            entries.append(Kind(FaultPoint.SUBMIT, FaultAction.DROP_AFTER_ACCEPT).entry(0.2))
        return "\n".join([f"idempotency = {str(self.keys).lower()}", *entries])

    def has(self, point: FaultPoint) -> bool:
        """Whether one of its faults is at this point."""
        return any(kind.at is point for kind in self.faults)


def together(share: float, *, keys: bool) -> Case:
    """Return all faults that a run can meet at once: none at cancellation, and not every submit fault twice."""
    return Case(tuple(kind for kind in kinds() if kind.at is not FaultPoint.CANCEL), share, keys)


class Outcome(NamedTuple):
    """The outcome of a case."""

    evidence: Evidence
    posts: int
    """Submits that the server received from the first command."""
    codes: list[int]
    """Exit codes of the commands."""
    seconds: float


async def carry_out(case: Case, folder: Path, jobs: int, *, seconds: float = RUN_SECONDS) -> Outcome:
    """Run a case to its end and check all invariants.

    Raises:
        AssertionError: an invariant is violated.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "faults.toml").write_text(case.file())
    manifest = _write_manifest(folder, jobs, local=case.has(FaultPoint.UPLOAD))
    began, codes, posts = time.monotonic(), list[int](), 0
    cancelling = case.has(FaultPoint.CANCEL)
    async with _serving(folder, service_time=0.3 if cancelling else 0.0) as url:
        if cancelling:
            await _begin_and_cancel(manifest, folder / "run", url, seconds)
        retry_failed, doubtful = False, any(kind.doubtful for kind in case.faults)
        while not codes or codes[-1]:
            assert len(codes) < ROUNDS, f"{case.name}: not complete after {codes}"
            # Lost submits are sent again, but only after enough look-ups to find those that arrived.
            resubmits = doubtful and len(codes) >= (1 if len(case.faults) == 1 else _HELD_ROUNDS)
            limits: dict[str, Any] = {"on_unknown": f"resubmit-after={_LISTED_BY:g}s"} if resubmits else {}
            if any(kind.do is FaultAction.EXPIRE for kind in case.faults):
                limits["collect_for"] = 0  # do not request expired results again
            if resubmits:
                await anyio.to_thread.run_sync(time.sleep, _LISTED_BY)  # by the wall clock, as the limit is
            settings = {"target": {"name": url}, "limits": limits}
            with anyio.fail_after(seconds):
                summary = await api.run(manifest, folder / "run", settings=settings, retry_failed=retry_failed)
            _check_code(case, summary)
            codes.append(int(summary.exit_code))
            retry_failed = summary.failed > 0
            if len(codes) == 1:
                posts = await anyio.to_thread.run_sync(_posts, url)
                if not case.keys and len(case.faults) == 1 and case.faults[0].do in _LOSES:
                    assert posts == jobs, f"{case.name}: {posts} POSTs for {jobs} jobs"
    found = examine(folder / "run", folder / "server")
    assert found.done == found.rows == jobs, (case.name, found)
    assert found.paid_twice == found.foreign == found.unknown == 0, (case.name, found)
    if not any(kind.fails_jobs for kind in case.faults):
        assert found.accepted == jobs, (case.name, found)
        assert found.written_off == 0, (case.name, found)
    return Outcome(found, posts, codes, time.monotonic() - began)


def _check_code(case: Case, summary: api.Summary) -> None:
    """Check the exit code against the counts, and that the case explains them."""
    words = (case.name, summary.to_json())
    expected = ExitCode.SOME_FAILED if summary.failed else ExitCode.COMPLETE
    if summary.unknown:
        expected = ExitCode.STOPPED_EARLY
        assert case.has(FaultPoint.LISTING) or any(kind.doubtful for kind in case.faults), words
        # With a key a submit is repeated until its outcome is known; a refused repeat proves nothing about the first.
        assert not case.keys or len(case.faults) > 1, words
    if summary.failed:
        assert any(kind.fails_jobs or kind.withholds for kind in case.faults), words
    assert summary.pending == summary.skipped == 0, words
    assert summary.exit_code is expected, words


async def _begin_and_cancel(manifest: Path, run: Path, url: str, seconds: float) -> None:
    """Start a run, stop it halfway, and cancel its open requests."""
    settings = {"target": {"name": url}}

    async def begin(scope: anyio.CancelScope) -> None:
        with scope:
            await api.run(manifest, run, settings=settings)

    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()
        tasks.start_soon(begin, scope)
        with anyio.fail_after(seconds):
            while await anyio.to_thread.run_sync(_accepted, run / "journal.db") < 5:
                await anyio.sleep(0.01)
        scope.cancel()
    with anyio.fail_after(seconds):
        await api.cancel(run)


def _accepted(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        journal = JournalDatabase.open_read_only(path)
    except Exception:  # it does not exist yet
        return 0
    try:
        return journal.counts().by_state.get(State.ACCEPTED, 0)
    finally:
        journal.close()


@asynccontextmanager
async def _serving(folder: Path, service_time: float) -> AsyncIterator[str]:
    options = ServeOptions(
        data_dir=folder / "server", port=0, engine="echo", service_time=service_time, faults=folder / "faults.toml"
    )
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    server = asyncio.create_task(serve(options, ready=ready.set_result, stop=stop))
    try:
        await asyncio.wait({server, ready}, return_when=asyncio.FIRST_COMPLETED)
        yield ready.result() if ready.done() else server.result()
    finally:
        stop.set()
        await server


def _posts(url: str) -> int:
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        return json.load(answer)["submit_posts"]


def _write_manifest(folder: Path, jobs: int, *, local: bool) -> Path:
    path = folder / "manifest.csv"
    lines = ["image_url,prompt"]
    for number in range(jobs):
        url = f"https://images.example/{number}.jpg"
        if local:
            url = f"{number}.png"
            pixels = np.full((8, 8, 3), (number % 256, number // 256, 7), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / url)
        lines.append(f"{url},image {number} as a watercolor")
    path.write_text("\n".join(lines) + "\n")
    return path
