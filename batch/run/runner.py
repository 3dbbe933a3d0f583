"""The runner: `drive` is one job's whole life, read from top to bottom; `run` lets jobs in and ends.

Sees Protocols only (`batch.run.interfaces`); every wait is `anyio.sleep` or an event, so that its tests run in
virtual time. It decides nothing about answers (`retry`), pace and money (`admission`) or legal states
(`lifecycle`): it asks them, does the one thing they say, and has it written down before it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, NoReturn

import anyio
import anyio.abc
import orjson

from batch.errors import StorageError
from batch.fal.answer import images_of
from batch.fal.errors import CallFailed, Trouble
from batch.journal.events import (
    Accepted,
    Answered,
    FailedForGood,
    Finished,
    Intended,
    Lost,
    Refused,
    Retried,
    Uncollected,
)
from batch.journal.records import KnownJob, RequestIdTaken
from batch.journal.states import OPEN, State
from batch.run.admission import Admission, StopCause, StopRequest
from batch.run.expiry import COLLECT_SECONDS, Expiry
from batch.run.interfaces import CompletionHints, HeldBack, Images, Journal, Observer, Service
from batch.run.job import JobFailed, JobRun, OutcomeUnknown, RunStopping
from batch.run.pacing import TokenBucket
from batch.run.poll_schedule import PollSchedule
from batch.run.poller import Poller
from batch.run.reconcile import Reconciler, Settled, bounded
from batch.run.transfers import Transfers
from batch.run.verdicts import REPEAT_SECONDS, Action, Idempotency, Verdict, backoff, failure_of, judge, judge_submit
from batch.run.waits import Stage, Waits
from batch.types import Answer, Attempt, Failed, Job, JobKey, JsonObject, StoredImage, Ticket

__all__ = ["Policy", "Report", "Runner"]

_JUDGE_FAILURES_FROM = 20
"""A percentage of failures means nothing among fewer ended jobs."""
_REASONS_SHOWN = 3
_DOUBTS = frozenset({Action.UNKNOWN, Action.REPEAT, Action.DUPLICATE})
"""Verdicts on a submit that may have been accepted."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user decided; durations in seconds."""

    download: bool = True
    attempts: int = 3
    idempotency: Idempotency = Idempotency.NONE
    """What the target does with a repeated key: unless it ignores keys, a submit of unknown outcome may be repeated."""
    start_timeout: float | None = None
    """Seconds from its acceptance after which the target does not start a request any more. None: it may, or a submit
    is repeated under its key, so that nobody knows when it was accepted."""
    file_seconds: float | None = None
    """Lifetime of result files that each submit asks for."""
    retry_failed: bool = False
    collect_only: bool = False
    """Settle and collect what was submitted before; no attempt is submitted that was not begun before."""
    resubmit_unknown_after: float | None = None
    drain: float = 60.0
    collect_for: float = COLLECT_SECONDS
    """How long after its end a request whose answer or images could not be read is asked for again, free, before it
    counts as lost."""
    deadline: float | None = None
    max_failures: int | None = None
    max_failure_share: float | None = None
    keeps_results: bool = False
    """Whether the target keeps results until they are fetched, as our own server does: then none can be late."""
    target: str = "local"
    """Uploaded images are remembered under its name: another target does not have them."""


class Report(NamedTuple):
    """How a run ended."""

    done: int
    failed: int
    held: int
    """Jobs whose submit has no known outcome."""
    stopped: StopRequest | None


class Runner:
    """Carries out jobs against a service, with a journal; see `run`."""

    def __init__(
        self,
        *,
        service: Service,
        journal: Journal,
        images: Images,
        observer: Observer,
        admission: Admission,
        policy: Policy,
        now: Callable[[], float],
        rng: Random,
        reconciler: Reconciler | None = None,
        polls: TokenBucket | None = None,
        hints: CompletionHints | None = None,
    ) -> None:
        """Plug it together.

        `now` is wall time in Unix seconds, for what is written down; waits use anyio's clock. `reconciler` is for
        targets that do not honour idempotency keys; `polls` bounds status reads, `hints` may wake who waits for them.
        """
        self._reconciler = reconciler
        self._looked_up: Settled | None = None
        self._service, self._journal, self._observer = service, journal, observer
        service.before_send = admission.before_send
        self._admission, self._policy, self._now, self._rng = admission, policy, now, rng
        self._underway: set[JobKey] = set()
        self._handled: set[JobKey] = set()
        self._lost: set[JobKey] = set()
        """Paid for in an earlier session, and not kept by the target any more: only a new attempt gives a result."""
        self._expiry = Expiry(for_good=policy.keeps_results, file_seconds=policy.file_seconds)
        self.waits = Waits()
        """What each accepted job waits for."""
        self._transfers = Transfers(
            service=service,
            journal=journal,
            images=images,
            target=policy.target,
            expiry=self._expiry,
            now=now,
            rng=rng,
            notice=self._unanswered,
            warn=self._warn,
            stop=admission.stop,
            stopped=admission.stopped,
        )
        self._patience = max(policy.drain, 3 * PollSchedule.LONGEST)
        """Seconds for which an account may be refused at every read until the run gives up for now."""
        self._poller = Poller(
            service=service,
            admission=admission,
            expiry=self._expiry,
            polls=polls,
            hints=hints,
            patience=self._patience,
            now=now,
            rng=rng,
            notice=self._unanswered,
            warn=self._warn,
            waits=self.waits,
        )
        self._errors: Counter[str] = Counter()
        self._scope = anyio.CancelScope()
        self._done = self._failed = 0

    def __repr__(self) -> str:
        return f"<Runner {len(self._underway)} under way, {self._done} done, {self._failed} failed>"

    # --- the run -----------------------------------------------------------------------------------------

    async def run(self, source: AsyncGenerator[Sequence[Job], None]) -> Report:
        """Collect what is open in the journal, then do the source's jobs that are not done.

        Args:
            source: batches of jobs in manifest order; duplicates are allowed and done once.

        Raises:
            StorageError: the disk refused; what was durable before is still there.
        """
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._bound_the_end)
            with self._scope:
                try:
                    await self._work(source)
                except* StorageError as errors:  # not of a job's task: of the reading and settling between them
                    self.stop(StopCause.STORAGE, _words(errors))
            watch.cancel_scope.cancel()
        stopping = self._admission.stopping
        if stopping is not None and stopping.why is StopCause.STORAGE:
            raise StorageError(stopping.reason)
        await self._journal.settled()  # a stop leaves calls behind that nobody waits for: they count
        held = (await self._journal.counts()).by_state.get(State.UNKNOWN, 0)
        return Report(self._done, self._failed, held, stopping)

    async def _work(self, source: AsyncGenerator[Sequence[Job], None]) -> None:
        await self._mark_interrupted_submits_unknown()
        await self._reconcile()
        if self._policy.retry_failed:  # what is lost for good is known before the manifest's jobs are fed
            async with anyio.create_task_group() as jobs:
                await self._resume(jobs, {State.COLLECTABLE})
        async with anyio.create_task_group() as jobs:
            await self._resume(jobs, OPEN)
            if not self._policy.retry_failed:
                await self._resume(jobs, {State.COLLECTABLE})
            await self._feed(source, jobs)
        if await self._reconcile():
            async with anyio.create_task_group() as jobs:
                await self._resume(jobs, {State.ACCEPTED})

    def stop(self, why: StopCause, reason: str, meanwhile: str = "") -> None:
        """Submit nothing more and collect what is in flight. Called a second time: give that up too.

        A run that stops already, for its budget say, collects for `Policy.drain` from the first call on.
        """
        if self._admission.hurried or why is StopCause.STORAGE:
            self._scope.cancel()
        elif self._admission.stopping is not None:
            self._scope.deadline = min(self._scope.deadline, anyio.current_time() + self._policy.drain)
        self._admission.hurried = True
        self._admission.stop(why, reason, meanwhile)

    async def _bound_the_end(self) -> None:
        """Stop in time for the deadline, and give a bounded stop its last moment."""
        drain, deadline = self._policy.drain, self._policy.deadline
        if deadline is not None:
            drain = min(drain, deadline / 4)
            with anyio.move_on_after(deadline - drain):
                await self._admission.stopped()
            self._admission.stop(StopCause.DEADLINE, f"the deadline of {deadline:g} s is near")
        await self._admission.stopped()
        if self._ends_soon:
            self._scope.deadline = anyio.current_time() + drain
        elif self._admission.stopping is not None and self._admission.stopping.why is StopCause.ACCOUNT:
            await self._while_reads_succeed()
            self._scope.cancel()

    async def _while_reads_succeed(self) -> None:
        """A refused account may still be shown its results, or not."""
        seen = -1
        while (answered := self._poller.reads + self._transfers.fetched) != seen:
            seen = answered
            await anyio.sleep(self._patience)

    async def _mark_interrupted_submits_unknown(self) -> None:
        """A submit that a crash cut off is unknown, unless it may be repeated under its key."""
        if self._policy.idempotency is Idempotency.REPLAY:
            return
        async with aclosing(self._journal.entries({State.INTENDED})) as entries:
            async for entry in entries:
                await self._journal.record(Lost(entry.job_key, self._now(), "the run ended before the answer came"))

    async def _reconcile(self) -> bool:
        """Look up what is unknown; whether any of it was found, and is accepted now."""
        if self._reconciler is None:
            return False
        self._looked_up = await self._reconciler.settle()
        return self._looked_up.adopted > 0

    async def _resume(self, jobs: anyio.abc.TaskGroup, states: Collection[State]) -> None:
        """What was submitted before comes first, oldest first: its results do not wait for ever."""
        async with aclosing(self._journal.entries(states)) as entries:
            async for entry in entries:
                job_run = JobRun.of_entry(entry)
                if job_run.state in {State.ACCEPTED, State.ANSWERED}:
                    is_answered = job_run.state is State.ANSWERED
                    self._warn(self._expiry.resumed(job_run.intended_at, self._now(), answered=is_answered))
                if not self._held_back(job_run):
                    await self._let_in(job_run, jobs)

    def _held_back(self, job_run: JobRun) -> bool:
        """Whether an unknown submit has to stay unknown for now."""
        if job_run.state is not State.UNKNOWN or self._policy.idempotency is Idempotency.REPLAY:
            return False
        if not self._policy.collect_only:
            if self._looked_up is not None and self._looked_up.clears(job_run.key):
                self._admission.settle(job_run, 0.0)
                job_run.start_over()
                return False
            if self._policy.idempotency is Idempotency.REJECT and self._may_repeat(job_run):
                job_run.repeats = True
                return False
        if self._policy.collect_only or not self._given_up(job_run):
            self._hold(job_run, "the outcome of its submit is unknown")
            return True
        self._admission.settle(job_run, None)  # it may have been accepted: its reservation counts as spent
        job_run.renew()
        job_run.state = State.UNKNOWN
        return False

    def _given_up(self, job_run: JobRun) -> bool:
        """Whether an unknown submit had the time that the user set to show up, and did not."""
        after = self._policy.resubmit_unknown_after
        if after is None or self._policy.idempotency is Idempotency.REJECT:  # its repeats may have proved otherwise
            return False
        after = bounded(after, job_run.start_timeout)
        if self._looked_up is None:
            return self._now() - job_run.intended_at >= after
        return self._looked_up.missed(job_run.key, job_run.intended_at, after)

    def _may_repeat(self, job_run: JobRun) -> bool:
        """Whether the target still knows the key of this submit, if it was accepted."""
        return self._now() - job_run.intended_at < REPEAT_SECONDS

    async def _feed(self, source: AsyncGenerator[Sequence[Job], None], jobs: anyio.abc.TaskGroup) -> None:
        async with aclosing(source) as batches:
            async for batch in batches:
                # What was started before this look-up and is no longer under way is in the journal by now.
                self._handled = set(self._underway)
                known = await self._journal.find([job.key for job in batch])
                for job in batch:
                    if self._admission.stopping is not None:
                        return
                    job_run = None if job.key in self._handled else self._due(job, known.get(job.key))
                    if job_run is not None:
                        await self._let_in(job_run, jobs)

    def _due(self, job: Job, known: KnownJob | None) -> JobRun | None:
        """The job's course where it still has to be driven."""
        if known is None:
            return JobRun(job.key, job)
        again = self._policy.retry_failed and (known.session != self._journal.session or job.key in self._lost)
        if known.state is State.PENDING or (known.state is State.FAILED and again):
            return JobRun(job.key, job, known.attempt, state=known.state)
        return None

    async def _let_in(self, job_run: JobRun, jobs: anyio.abc.TaskGroup) -> None:
        if await self._admission.enter(job_run):
            self._handled.add(job_run.key)
            self._underway.add(job_run.key)
            jobs.start_soon(self._guard, job_run)

    async def _guard(self, job_run: JobRun) -> None:
        """One task of the run: a disk that refuses ends the run in order, anything else is a defect."""
        self._observer.happened("started", job=job_run.key)
        try:
            await self.drive(job_run)
        except (OutcomeUnknown, RunStopping):
            pass
        except StorageError as error:
            self.stop(StopCause.STORAGE, str(error))
        finally:
            self._underway.discard(job_run.key)
            self.waits.drop(job_run.key)
            self._admission.leave(job_run)
            self._observer.happened("ended", job=job_run.key)

    # --- one job -----------------------------------------------------------------------------------------

    async def drive(self, job_run: JobRun) -> None:
        """One job's whole life: submit it once, wait for it, keep its answer, store its images.

        Raises:
            Held: the outcome of its submit is unknown, and written down as such.
            RunStopping: the run is stopping, and it was not submitted.
            StorageError: the disk refused.
        """
        if job_run.state is State.FAILED:
            await self._take_up_again(job_run)
        while True:
            try:
                ticket = job_run.ticket or await self._submitted(job_run)
                answer = await self._answered(job_run, ticket)
                await self._finished(job_run, answer)
            except JobFailed as error:
                if await self._another_attempt(job_run, error):
                    continue
            return

    async def _submitted(self, job_run: JobRun) -> Ticket:
        """Send the submit of this attempt, once, after its intent is durable."""
        doubtful = job_run.state in {State.INTENDED, State.UNKNOWN}  # an earlier POST of it may have arrived
        tries = 0
        while True:
            if doubtful and self._ends_soon:
                raise RunStopping  # the next run sends it again under its key
            job_run.body = job_run.body or await self._body_of(job_run)
            if job_run.state is not State.INTENDED:
                if self._policy.collect_only and not doubtful:
                    raise RunStopping
                await self._admission.acquire_submit(job_run)
                await self._intend(job_run)
                if self._admission.stopping is not None:  # called while the intent was written
                    await self._take_back(job_run, doubtful=doubtful)
            else:
                await self._admission.acquire_repeat()
            tries += 1
            try:
                ticket = await self._service.submit(Attempt(job_run.key, job_run.attempt, job_run.body, doubtful))
            except HeldBack as error:
                if not doubtful:
                    await self._not_sent(job_run, str(error))
                continue
            except CallFailed as error:
                verdict = judge_submit(error.trouble, self._policy.idempotency, repeated=doubtful, now=self._now())
                doubtful = doubtful or verdict.action in _DOUBTS
                if doubtful:
                    await self._doubt(job_run, error.trouble, verdict, tries)
                else:
                    await self._submit_refused(job_run, error.trouble, verdict)
                continue
            self._admission.accepted()
            job_run.accepted_at, job_run.timings.position = self._now(), ticket.position
            await self._accept(job_run, ticket)
            job_run.ticket, job_run.state = ticket, State.ACCEPTED
            self._observer.happened("accepted", job=job_run.key, request_id=ticket.request_id)
            return ticket

    async def _intend(self, job_run: JobRun) -> None:
        if not job_run.repeats:
            job_run.intended_at = self._now()
        timeout = self._policy.start_timeout
        await self._journal.record(
            Intended(job_run.key, job_run.intended_at, job_run.attempt, job_run.body, job_run.reserved_usd, timeout)
        )
        job_run.state = State.INTENDED

    async def _accept(self, job_run: JobRun, ticket: Ticket) -> None:
        """Write down which request it is.

        Raises:
            Held: the request id is another job's. Whose result it shows is not known, so neither job gets the other's.
        """
        try:
            await self._journal.record(Accepted(job_run.key, job_run.accepted_at, ticket))
        except RequestIdTaken as error:
            await self._journal.record(Lost(job_run.key, self._now(), str(error)))
            self._hold(job_run, str(error))
            raise OutcomeUnknown from error

    async def _take_back(self, job_run: JobRun, *, doubtful: bool) -> NoReturn:
        """Withdraw an intent whose submit was not sent: the job is again what it was before."""
        reason = "the run stopped before it was sent"
        if doubtful:
            await self._journal.record(Lost(job_run.key, self._now(), reason))
        else:
            await self._not_sent(job_run, reason)
        raise RunStopping

    @property
    def _ends_soon(self) -> bool:
        """Whether the run stops and waits only `Policy.drain` for what is in flight."""
        return self._admission.ends_soon

    async def _pause(self, seconds: float) -> None:
        """Wait; a run that ends soon does not."""
        with anyio.move_on_after(seconds):
            await self._admission.stopped()
            if not self._ends_soon:
                await anyio.sleep_forever()

    async def _not_sent(self, job_run: JobRun, reason: str) -> None:
        """Take the intent back: the same attempt is to be sent later, or in another run."""
        await self._journal.record(Refused(job_run.key, self._now(), reason))
        job_run.state = State.PENDING
        self._admission.settle(job_run, 0.0)

    async def _submit_refused(self, job_run: JobRun, trouble: Trouble, verdict: Verdict) -> None:
        """A submit that was certainly not accepted: the job failed, the run stops, or it is sent again later."""
        if verdict.action is Action.JOB_FAILED:
            raise JobFailed(failure_of(trouble, verdict), new_attempt=verdict.new_attempt)
        if verdict.action is Action.SUBMIT_AGAIN:  # before anything is waited for: others are about to be sent
            self._pause_submits(trouble, verdict)
        await self._not_sent(job_run, verdict.reason)
        if self._ends_soon:
            raise RunStopping
        if verdict.action is Action.SUBMIT_AGAIN:
            return
        words = failure_of(trouble, verdict).message
        self._admission.stop(StopCause.ACCOUNT if verdict.action is Action.STOP_ACCOUNT else StopCause.TARGET, words)
        raise RunStopping

    def _pause_submits(self, trouble: Trouble, verdict: Verdict) -> None:
        throttled = trouble.reply is not None and trouble.reply.status == 429
        self._admission.throttled(verdict, trouble.detail, throttled=throttled, now=self._now())

    async def _doubt(self, job_run: JobRun, trouble: Trouble, verdict: Verdict, tries: int) -> None:
        """A submit of unknown outcome: repeat it under the same key where that is safe, else hold it."""
        forever = self._policy.idempotency is Idempotency.REPLAY
        first = judge(trouble, now=self._now())
        if first.action is Action.SUBMIT_AGAIN or first.retry_after is not None:
            self._pause_submits(trouble, first)
        if verdict.action is Action.REPEAT and (forever or self._may_repeat(job_run)):
            self._admission.notice("unreachable", f"{verdict.reason}; asking again under the same idempotency key")
            await self._pause(backoff(tries, self._rng))
            return
        if verdict.action is Action.STOP_ACCOUNT:
            self._admission.stop(StopCause.ACCOUNT, verdict.reason)
        await self._journal.record(Lost(job_run.key, self._now(), verdict.reason))
        self._hold(job_run, verdict.reason)
        raise OutcomeUnknown

    def _hold(self, job_run: JobRun, reason: str) -> None:
        self._observer.happened("held", job=job_run.key, reason=reason)

    async def _body_of(self, job_run: JobRun) -> bytes:
        """The bytes to submit: the job's input, with the uploaded URL where its image is local."""
        job = job_run.job
        assert job is not None, "a job from the journal brings its body"
        url = job.input["image_url"] if job.image is None else await self._transfers.uploaded(job)
        return orjson.dumps({**job.input, "image_url": url}, option=orjson.OPT_SORT_KEYS)

    async def _answered(self, job_run: JobRun, ticket: Ticket) -> Answer:
        """Wait for the request to end and fetch its output; durable when this returns."""
        if job_run.answer is not None:
            return await self._renewed(job_run, ticket, job_run.answer)
        answer = await self._poller.answer(job_run, ticket)
        await self._keep(job_run, answer)
        return answer

    async def _keep(self, job_run: JobRun, answer: Answer) -> None:
        """Write the answer down, and what it cost."""
        now, timings = self._now(), job_run.timings
        age = now - job_run.accepted_at
        at = job_run.ended_at = job_run.ended_at or now
        waited = 0.0 if job_run.resumed else age - (timings.unfinished or 0.0)
        self._warn(self._expiry.collected(waited, len(answer.raw or b"")))
        total = at - job_run.intended_at
        queued = None if timings.executed is None else max(0.0, total - timings.executed)
        # Of a request that ended before, what it cost is settled.
        cost = None if job_run.state is State.COLLECTABLE else self._admission.settle(job_run, answer.billable_units)
        answered = Answered(job_run.key, at, answer, cost, queued, total)
        if self._policy.download:
            await self._journal.record(answered)
            job_run.state = State.ANSWERED
        else:  # with nothing to store there is nothing between the two
            job_run.images = tuple(images_of(answer.output))
            await self._journal.record(answered, Finished(job_run.key, now, job_run.images, None))
            job_run.state = State.DONE
        job_run.answer = answer
        self._admission.answered(job_run, self._poller.queued(timings))

    async def _renewed(self, job_run: JobRun, ticket: Ticket, kept: Answer) -> Answer:
        """A kept answer whose images were not stored: fresh URLs where the target still has them."""
        self._admission.answered(job_run)
        self.waits.put(job_run.key, Stage.DOWNLOADING, self._now())
        try:
            return await self._service.result(ticket)
        except CallFailed:
            return kept

    async def _finished(self, job_run: JobRun, answer: Answer) -> None:
        """Store every image, then call the job done."""
        if job_run.state is not State.DONE:
            started, images = anyio.current_time(), images_of(answer.output)
            if self._policy.download:
                images = await self._stored(images)
            seconds = anyio.current_time() - started if self._policy.download else None
            job_run.images = tuple(images)
            await self._journal.record(Finished(job_run.key, self._now(), job_run.images, seconds))
        self._done += 1
        self._observer.happened(
            "done", job=job_run.key, attempt=job_run.attempt, images=[i.path for i in job_run.images]
        )

    async def _stored(self, said: list[StoredImage]) -> list[StoredImage]:
        """Every image, downloaded and stored. One that cannot be had does not keep the others from being stored.

        Raises:
            JobFailed: the first of those that could not be stored; with all images, stored or not.
        """
        images: list[StoredImage] = []
        failed: JobFailed | None = None
        for image in said:
            try:
                images.append(await self._transfers.stored(image))
            except JobFailed as error:
                failed = failed or error
                images.append(image)
        if failed is not None:
            raise JobFailed(failed.failure, collectable=failed.collectable, images=tuple(images)) from failed
        return images

    # --- the ends ----------------------------------------------------------------------------------------

    async def _another_attempt(self, job_run: JobRun, error: JobFailed) -> bool:
        """Write the failure down; whether a new attempt follows, and its pause is over."""
        failure, was = error.failure, job_run.state
        if error.collectable and await self._collected_later(job_run, error):
            return False
        # What was never accepted costs nothing; what was, costs what the service says or was reserved.
        units = failure.billable_units if job_run.state is State.ACCEPTED else 0.0
        cost = self._admission.settle(job_run, units)
        await self._journal.record(FailedForGood(job_run.key, self._now(), failure, cost))
        said = {"job": job_run.key, "error_type": failure.error_type, "message": failure.message}
        # What was taken up to be collected, free, is not paid for again in the same breath.
        may_retry = error.new_attempt and was is not State.COLLECTABLE
        if may_retry and job_run.attempt < self._policy.attempts:  # where the run stops: in the next one
            await self._take_up_again(job_run)
            self._observer.happened("retried", attempt=job_run.attempt, **said)
            await anyio.sleep(backoff(job_run.attempt, self._rng, base=1.0))
            return True
        self._count_failure(job_run, failure)
        return False

    async def _collected_later(self, job_run: JobRun, error: JobFailed) -> bool:
        """Write down that what is paid for can be asked for again; False where that is over."""
        at, was = self._now(), job_run.state
        ended_at = job_run.ended_at or at
        if at - ended_at > self._policy.collect_for:
            self._lost.add(job_run.key)
            return False
        cost = None
        if was is State.ACCEPTED:
            cost = self._admission.settle(job_run, None if error.answer is None else error.answer.billable_units)
        await self._journal.record(
            Uncollected(job_run.key, at, error.failure, ended_at, cost, error.answer, error.images)
        )
        self._count_failure(job_run, error.failure, collectable=True)
        return True

    def _count_failure(self, job_run: JobRun, failure: Failed, *, collectable: bool = False) -> None:
        said: JsonObject = {"error_type": failure.error_type, "message": failure.message}
        if collectable:
            said["collectable"] = True
        self._failed += 1
        self._errors[failure.error_type] += 1
        self._observer.happened("failed", job=job_run.key, attempt=job_run.attempt, **said)
        self._stop_if_all_fails()

    async def _take_up_again(self, job_run: JobRun) -> None:
        await self._journal.record(Retried(job_run.key, self._now()))
        job_run.renew()

    def _stop_if_all_fails(self) -> None:
        ended = self._done + self._failed
        share, most = self._policy.max_failure_share, self._policy.max_failures
        too_many = most is not None and self._failed > most
        too_large = share is not None and ended >= _JUDGE_FAILURES_FROM and self._failed > share * ended
        if too_many or too_large:
            commonest = ", ".join(f"{count} {name}" for name, count in self._errors.most_common(_REASONS_SHOWN))
            self._admission.stop(StopCause.FAILURES, f"{self._failed} of {ended} jobs failed: {commonest}")

    def _warn(self, sentence: str | None) -> None:
        if sentence is not None:
            self._observer.happened("warning", reason=sentence)

    def _unanswered(self, verdict: Verdict) -> None:
        self._admission.notice("unreachable", f"{verdict.reason}; it is tried again")


def _words(errors: BaseExceptionGroup[StorageError]) -> str:
    """The first sentence in a group."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first)
