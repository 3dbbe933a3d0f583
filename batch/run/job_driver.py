"""The whole life of one job, in order, in `JobDriver.drive`: submit once, wait, keep the answer, store the images.

Depends on Protocols only (`batch.run.interfaces`). `verdicts` judges answers, `admission` decides pace and money,
`journal.states` the legal states. Each step is recorded before the next one begins.
"""

from __future__ import annotations

from collections import Counter

import anyio

from batch.fal.answer import images_of
from batch.fal.errors import CallFailed
from batch.journal.events import Answered, FailedForGood, Finished, Retried, Uncollected
from batch.journal.states import State
from batch.run.admission import StopCause
from batch.run.context import RunContext
from batch.run.job import JobFailed, JobRun
from batch.run.poller import Poller
from batch.run.submitter import Submitter
from batch.run.transfers import Transfers
from batch.run.verdicts import backoff
from batch.run.waits import Stage
from batch.types import Answer, Failed, JobKey, JsonObject, StoredImage, Ticket

__all__ = ["JobDriver"]

_JUDGE_FAILURES_FROM = 20
"""Ended jobs before a failure percentage is meaningful."""
_REASONS_SHOWN = 3


class JobDriver:
    """Drives single jobs, and counts how they end."""

    def __init__(self, context: RunContext, submitter: Submitter, poller: Poller, transfers: Transfers) -> None:
        self._context, self._submitter, self._poller, self._transfers = context, submitter, poller, transfers
        self.done = self.failed = 0
        self._errors: Counter[str] = Counter()
        self.lost: set[JobKey] = set()
        """Jobs paid for by an earlier session whose results the target no longer keeps: they need a new attempt."""

    async def drive(self, job_run: JobRun) -> None:
        """Submit the job once, wait for it, keep its answer and store its images.

        Raises:
            OutcomeUnknown: the outcome of its submit is unknown, and recorded as such.
            RunStopping: the run is stopping, and the job was not submitted.
            StorageError: the disk refused.
        """
        if job_run.state is State.FAILED:
            await self._start_new_attempt(job_run)
        while True:
            try:
                ticket = job_run.ticket or await self._submitter.submit(job_run)
                answer = await self._await_answer(job_run, ticket)
                await self._finish(job_run, answer)
            except JobFailed as error:
                if await self._fail_or_retry(job_run, error):
                    continue
            return

    async def _await_answer(self, job_run: JobRun, ticket: Ticket) -> Answer:
        """Wait for the request to end and fetch its output; durable when this returns."""
        if job_run.answer is not None:
            return await self._refreshed_answer(job_run, ticket, job_run.answer)
        answer = await self._poller.answer(job_run, ticket)
        await self._record_answer(job_run, answer)
        return answer

    async def _record_answer(self, job_run: JobRun, answer: Answer) -> None:
        """Record the answer and its cost."""
        now, timings = self._context.now(), job_run.timings
        age = now - job_run.accepted_at
        at = job_run.ended_at = job_run.ended_at or now
        waited = 0.0 if job_run.resumed else age - (timings.unfinished or 0.0)
        self._context.warn(self._context.expiry.collected(waited, len(answer.raw or b"")))
        total = at - job_run.intended_at
        queued = None if timings.executed is None else max(0.0, total - timings.executed)
        # A collectable request ended before: its cost is already settled.
        cost = (
            None
            if job_run.state is State.COLLECTABLE
            else self._context.admission.settle(job_run, answer.billable_units)
        )
        answered = Answered(job_run.key, at, answer, cost, queued, total)
        if self._context.policy.download:
            await self._context.journal.record(answered)
            job_run.state = State.ANSWERED
        else:  # without images to store, answered and done are one step
            job_run.images = tuple(images_of(answer.output))
            await self._context.journal.record(answered, Finished(job_run.key, now, job_run.images, None))
            job_run.state = State.DONE
        job_run.answer = answer
        self._context.admission.answered(job_run, self._poller.queued(timings))

    async def _refreshed_answer(self, job_run: JobRun, ticket: Ticket, kept: Answer) -> Answer:
        """Return a fresh answer with new image URLs if the target still has it, else the stored one."""
        self._context.admission.answered(job_run)
        self._context.waits.put(job_run.key, Stage.DOWNLOADING, self._context.now())
        try:
            return await self._context.service.result(ticket)
        except CallFailed:
            return kept

    async def _finish(self, job_run: JobRun, answer: Answer) -> None:
        """Store every image, then record the job as done."""
        if job_run.state is not State.DONE:
            started, images = anyio.current_time(), images_of(answer.output)
            if self._context.policy.download:
                images = await self._stored(images)
            seconds = anyio.current_time() - started if self._context.policy.download else None
            job_run.images = tuple(images)
            await self._context.journal.record(Finished(job_run.key, self._context.now(), job_run.images, seconds))
        self.done += 1
        self._context.observer.happened(
            "done", job=job_run.key, attempt=job_run.attempt, images=[i.path for i in job_run.images]
        )

    async def _stored(self, facts: list[StoredImage]) -> list[StoredImage]:
        """Download and store every image. A failed image does not keep the others from being stored.

        Raises:
            JobFailed: the first failure; it carries all images, stored or not.
        """
        images: list[StoredImage] = []
        failed: JobFailed | None = None
        for image in facts:
            try:
                images.append(await self._transfers.stored(image))
            except JobFailed as error:
                failed = failed or error
                images.append(image)
        if failed is not None:
            raise JobFailed(failed.failure, collectable=failed.collectable, images=tuple(images)) from failed
        return images

    async def _fail_or_retry(self, job_run: JobRun, error: JobFailed) -> bool:
        """Record the failure. Return whether a new attempt follows, after its backoff."""
        failure, was = error.failure, job_run.state
        if error.collectable and await self._defer_collection(job_run, error):
            return False
        # Without acceptance there is no cost; with it, the cost is what the service reports, or the reservation.
        units = failure.billable_units if job_run.state is State.ACCEPTED else 0.0
        cost = self._context.admission.settle(job_run, units)
        await self._context.journal.record(FailedForGood(job_run.key, self._context.now(), failure, cost))
        facts = {"job": job_run.key, "error_type": failure.error_type, "message": failure.message}
        # A job resumed only to be collected, free, is not paid for again in the same run.
        may_retry = error.new_attempt and was is not State.COLLECTABLE
        if may_retry and job_run.attempt < self._context.policy.attempts:  # if the run stops, the next one goes on
            await self._start_new_attempt(job_run)
            self._context.observer.happened("retried", attempt=job_run.attempt, **facts)
            await anyio.sleep(backoff(job_run.attempt, self._context.rng, base=1.0))
            return True
        self._count_failure(job_run, failure)
        return False

    async def _defer_collection(self, job_run: JobRun, error: JobFailed) -> bool:
        """Record that the paid result can be asked for again; False if it is too late for that."""
        at, was = self._context.now(), job_run.state
        ended_at = job_run.ended_at or at
        if at - ended_at > self._context.policy.collect_for:
            self.lost.add(job_run.key)
            return False
        cost = None
        if was is State.ACCEPTED:
            cost = self._context.admission.settle(
                job_run, None if error.answer is None else error.answer.billable_units
            )
        await self._context.journal.record(
            Uncollected(job_run.key, at, error.failure, ended_at, cost, error.answer, error.images)
        )
        self._count_failure(job_run, error.failure, collectable=True)
        return True

    def _count_failure(self, job_run: JobRun, failure: Failed, *, collectable: bool = False) -> None:
        facts: JsonObject = {"error_type": failure.error_type, "message": failure.message}
        if collectable:
            facts["collectable"] = True
        self.failed += 1
        self._errors[failure.error_type] += 1
        self._context.observer.happened("failed", job=job_run.key, attempt=job_run.attempt, **facts)
        self._stop_if_all_fails()

    async def _start_new_attempt(self, job_run: JobRun) -> None:
        await self._context.journal.record(Retried(job_run.key, self._context.now()))
        job_run.renew()

    def _stop_if_all_fails(self) -> None:
        ended = self.done + self.failed
        share, most = self._context.policy.max_failure_share, self._context.policy.max_failures
        too_many = most is not None and self.failed > most
        too_large = share is not None and ended >= _JUDGE_FAILURES_FROM and self.failed > share * ended
        if too_many or too_large:
            commonest = ", ".join(f"{count} {name}" for name, count in self._errors.most_common(_REASONS_SHOWN))
            self._context.admission.stop(StopCause.FAILURES, f"{self.failed} of {ended} jobs failed: {commonest}")
