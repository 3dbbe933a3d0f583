"""The run: admits jobs, drives each in its own task (`job_driver`), and ends.

Depends on Protocols only (`batch.run.interfaces`); every wait is `anyio.sleep` or an event, so its tests run in virtual
time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import NamedTuple

import anyio
import anyio.abc

from batch.errors import StorageError
from batch.journal.events import Lost
from batch.journal.records import KnownJob
from batch.journal.states import OPEN, State
from batch.run.admission import StopCause, StopRequest
from batch.run.context import RunContext
from batch.run.interfaces import CompletionHints
from batch.run.job import JobRun, OutcomeUnknown, RunStopping
from batch.run.job_driver import JobDriver
from batch.run.pacing import TokenBucket
from batch.run.poll_schedule import PollSchedule
from batch.run.poller import Poller
from batch.run.reconcile import Reconciler, Settled, bounded
from batch.run.submitter import Submitter
from batch.run.transfers import Transfers
from batch.run.verdicts import Idempotency
from batch.types import Job, JobKey

__all__ = ["Report", "Runner"]


class Report(NamedTuple):
    """How a run ended."""

    done: int
    failed: int
    held: int
    """Jobs with a submit of unknown outcome."""
    stopped: StopRequest | None


class Runner:
    """Runs jobs against a service, with a journal; see `run`."""

    def __init__(
        self,
        context: RunContext,
        *,
        reconciler: Reconciler | None = None,
        polls: TokenBucket | None = None,
        hints: CompletionHints | None = None,
    ) -> None:
        """Build the parts of a run.

        Args:
            context: what the parts share.
            reconciler: looks up submits of unknown outcome; for targets that ignore idempotency keys.
            polls: limits status reads over all jobs; None: no limit.
            hints: may wake jobs before their next status read; None: polling only.
        """
        self._context, self._reconciler = context, reconciler
        self._looked_up: Settled | None = None
        self._underway: set[JobKey] = set()
        self._handled: set[JobKey] = set()
        self.waits = context.waits
        self._patience = max(context.policy.drain, 3 * PollSchedule.LONGEST)
        """Seconds for which every read may refuse the account before the run stops."""
        self._transfers = Transfers(context)
        self._submitter = Submitter(context, self._transfers)
        self._poller = Poller(context, polls=polls, hints=hints, patience=self._patience)
        self._driver = JobDriver(context, self._submitter, self._poller, self._transfers)
        self._scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<Runner {len(self._underway)} under way, {self._driver.done} done, {self._driver.failed} failed>"

    async def run(self, source: AsyncGenerator[Sequence[Job], None]) -> Report:
        """Collect what is open in the journal, then run the source's jobs that are not done.

        Args:
            source: batches of jobs in manifest order; duplicates are allowed and run once.

        Raises:
            StorageError: the disk refused; what was durable before is kept.
        """
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._limit_shutdown)
            with self._scope:
                try:
                    await self._work(source)
                except* StorageError as errors:  # raised outside the jobs' tasks: while reading or settling
                    self.stop(StopCause.STORAGE, _first_message(errors))
            watch.cancel_scope.cancel()
        stopping = self._context.admission.stopping
        if stopping is not None and stopping.why is StopCause.STORAGE:
            raise StorageError(stopping.reason)
        await self._context.journal.settled()  # cancelled tasks may have left pending writes; they count
        held = (await self._context.journal.counts()).by_state.get(State.UNKNOWN, 0)
        return Report(self._driver.done, self._driver.failed, held, stopping)

    async def _work(self, source: AsyncGenerator[Sequence[Job], None]) -> None:
        await self._mark_interrupted_submits_unknown()
        await self._reconcile()
        if self._context.policy.retry_failed:  # lost results must be known before the manifest's jobs are read
            async with anyio.create_task_group() as jobs:
                await self._resume(jobs, {State.COLLECTABLE})
        async with anyio.create_task_group() as jobs:
            await self._resume(jobs, OPEN)
            if not self._context.policy.retry_failed:
                await self._resume(jobs, {State.COLLECTABLE})
            await self._feed(source, jobs)
        if await self._reconcile():
            async with anyio.create_task_group() as jobs:
                await self._resume(jobs, {State.ACCEPTED})

    def stop(self, why: StopCause, reason: str, meanwhile: str = "") -> None:
        """Submit nothing more and collect the jobs in flight. A second call stops collecting, too.

        If the run is already stopping, for its budget for example, the first call limits collecting to `Policy.drain`.
        """
        if self._context.admission.hurried or why is StopCause.STORAGE:
            self._scope.cancel()
        elif self._context.admission.stopping is not None:
            self._scope.deadline = min(self._scope.deadline, anyio.current_time() + self._context.policy.drain)
        self._context.admission.hurried = True
        self._context.admission.stop(why, reason, meanwhile)

    async def _limit_shutdown(self) -> None:
        """Stop in time for the deadline, and limit the time of a bounded stop."""
        drain, deadline = self._context.policy.drain, self._context.policy.deadline
        if deadline is not None:
            drain = min(drain, deadline / 4)
            with anyio.move_on_after(deadline - drain):
                await self._context.admission.stopped()
            self._context.admission.stop(StopCause.DEADLINE, f"the deadline of {deadline:g} s is near")
        await self._context.admission.stopped()
        if self._context.admission.ends_soon:
            self._scope.deadline = anyio.current_time() + drain
        elif self._context.admission.stopping is not None and self._context.admission.stopping.why is StopCause.ACCOUNT:
            await self._while_reads_succeed()
            self._scope.cancel()

    async def _while_reads_succeed(self) -> None:
        """Wait as long as reads still succeed: a refused account may or may not read its results."""
        seen = -1
        while (answered := self._poller.reads + self._transfers.fetched) != seen:
            seen = answered
            await anyio.sleep(self._patience)

    async def _mark_interrupted_submits_unknown(self) -> None:
        """Mark submits interrupted by a crash as unknown, unless they may be repeated under their key."""
        if self._context.policy.idempotency is Idempotency.REPLAY:
            return
        async with aclosing(self._context.journal.entries({State.INTENDED})) as entries:
            async for entry in entries:
                await self._context.journal.record(
                    Lost(entry.job_key, self._context.now(), "the run ended before the answer came")
                )

    async def _reconcile(self) -> bool:
        """Look up unknown submits; return whether any was found and accepted."""
        if self._reconciler is None:
            return False
        self._looked_up = await self._reconciler.settle()
        return self._looked_up.adopted > 0

    async def _resume(self, jobs: anyio.abc.TaskGroup, states: Collection[State]) -> None:
        """Resume earlier submits, oldest first: their results may expire."""
        async with aclosing(self._context.journal.entries(states)) as entries:
            async for entry in entries:
                job_run = JobRun.of_entry(entry)
                if job_run.state in {State.ACCEPTED, State.ANSWERED}:
                    is_answered = job_run.state is State.ANSWERED
                    self._context.warn(
                        self._context.expiry.resumed(job_run.intended_at, self._context.now(), answered=is_answered)
                    )
                if not self._stays_unknown(job_run):
                    await self._admit(job_run, jobs)

    def _stays_unknown(self, job_run: JobRun) -> bool:
        """Return whether an unknown submit must stay unknown for now."""
        if job_run.state is not State.UNKNOWN or self._context.policy.idempotency is Idempotency.REPLAY:
            return False
        if not self._context.policy.collect_only:
            if self._looked_up is not None and self._looked_up.clears(job_run.key):
                self._context.admission.settle(job_run, 0.0)
                job_run.start_over()
                return False
            if self._context.policy.idempotency is Idempotency.REJECT and self._submitter.may_repeat(job_run):
                job_run.repeats = True
                return False
        if self._context.policy.collect_only or not self._may_resubmit(job_run):
            self._submitter.hold(job_run, "the outcome of its submit is unknown")
            return True
        self._context.admission.settle(job_run, None)  # it may have been accepted: its reservation counts as spent
        job_run.renew()
        job_run.state = State.UNKNOWN
        return False

    def _may_resubmit(self, job_run: JobRun) -> bool:
        """Return whether an unknown submit did not show up within the time set by the user."""
        after = self._context.policy.resubmit_unknown_after
        if (
            after is None or self._context.policy.idempotency is Idempotency.REJECT
        ):  # a repeated submit can show whether the first was accepted
            return False
        after = bounded(after, job_run.start_timeout)
        if self._looked_up is None:
            return self._context.now() - job_run.intended_at >= after
        return self._looked_up.missed(job_run.key, job_run.intended_at, after)

    async def _feed(self, source: AsyncGenerator[Sequence[Job], None], jobs: anyio.abc.TaskGroup) -> None:
        async with aclosing(source) as batches:
            async for batch in batches:
                # A job that ended before this look-up is in the journal by now.
                self._handled = set(self._underway)
                known = await self._context.journal.find([job.key for job in batch])
                for job in batch:
                    if self._context.admission.stopping is not None:
                        return
                    job_run = None if job.key in self._handled else self._due(job, known.get(job.key))
                    if job_run is not None:
                        await self._admit(job_run, jobs)

    def _due(self, job: Job, known: KnownJob | None) -> JobRun | None:
        """Return the job's run, None if the job is finished."""
        if known is None:
            return JobRun(job.key, job)
        again = self._context.policy.retry_failed and (
            known.session != self._context.journal.session or job.key in self._driver.lost
        )
        if known.state is State.PENDING or (known.state is State.FAILED and again):
            return JobRun(job.key, job, known.attempt, state=known.state)
        return None

    async def _admit(self, job_run: JobRun, jobs: anyio.abc.TaskGroup) -> None:
        if await self._context.admission.enter(job_run):
            self._handled.add(job_run.key)
            self._underway.add(job_run.key)
            jobs.start_soon(self._run_job, job_run)

    async def _run_job(self, job_run: JobRun) -> None:
        """Drive one job as a task: a disk error stops the run gracefully, any other exception is a defect."""
        self._context.observer.happened("started", job=job_run.key)
        try:
            await self._driver.drive(job_run)
        except (OutcomeUnknown, RunStopping):
            pass
        except StorageError as error:
            self.stop(StopCause.STORAGE, str(error))
        finally:
            self._underway.discard(job_run.key)
            self.waits.drop(job_run.key)
            self._context.admission.leave(job_run)
            self._context.observer.happened("ended", job=job_run.key)


def _first_message(errors: BaseExceptionGroup[StorageError]) -> str:
    """Return the message of the first error in a group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first)
