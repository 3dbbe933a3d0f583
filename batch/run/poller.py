"""Following an accepted request to its answer: when it is read, and what an unread or disbelieved one means.

Owns every wait for an answer. When to read next is `polling`'s to say, what an answer proves `retry`'s; whoever may
wake it earlier (`ports.CompletionHints`) is believed only as far as reading now: a hint that lies costs a read, one
that is lost costs a wait.

A status is the service's word, not a fact. A word for a failure is followed by one read of the result; a job that takes
ten times as long as usual (`PollSchedule.overdue`) has its result read whatever its status says. An output is believed
in either case.
"""

from __future__ import annotations

import anyio

from batch.fal.answer import inference_of
from batch.fal.errors import CallFailed, Trouble
from batch.run.admission import StopCause
from batch.run.context import RunContext
from batch.run.interfaces import CompletionHints
from batch.run.job import JobFailed, JobRun
from batch.run.pacing import TokenBucket
from batch.run.poll_schedule import JobTimings, PollSchedule
from batch.run.retrying import reading
from batch.run.verdicts import (
    Action,
    Verdict,
    backoff,
    concerns_request,
    failure_of,
    final,
    judge,
    judge_failed,
    kind_of,
    pause_after,
    retry_after_of,
)
from batch.run.waits import Stage, duration, stage_of
from batch.run.window import queued_share
from batch.types import Answer, JobKey, QueueState, Ticket, TicketStatus

__all__ = ["Poller"]

_NET = 4.0
"""Where a hint is to be expected, a job is read by itself after so many times the usual wait, and after
`PollSchedule.LONGEST` at the latest."""
_WORDS_TOLD = 5
"""Most unknown status words that are reported; a service may use another one at each read."""
_LONGEST_WISH = 30.0
"""Most seconds of `Retry-After` that are honoured after a status that says that the work failed."""


class _FaultCounter:
    """Failed reads of one job's result."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._kind = ""
        self._since = 0.0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self._seen.values())

    def add(self, kind: str, age: float) -> tuple[int, float]:
        """One more of a kind, at the job's age: how many there are by now, and for how long there were no others."""
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if kind != self._kind:
            self._kind, self._since = kind, age
        return self._seen[kind], age - self._since


class Poller:
    """One for a run: it learns from each job for all others."""

    def __init__(
        self, context: RunContext, *, polls: TokenBucket | None, hints: CompletionHints | None, patience: float
    ) -> None:
        """Make the one of a run.

        Args:
            context: what the parts of the run share.
            polls: bounds reads over all jobs, in their order, results that are known to be there excepted; None: no
                bound.
            hints: may know of a completion earlier; None: only reads tell.
            patience: seconds for which an account may be refused at every read until the run gives up for now.
        """
        self._context, self._polls, self._hints, self._patience = context, polls, hints, patience
        self._times = PollSchedule()
        self._unknown_words: set[str] = set()
        self._last_fault: dict[JobKey, Trouble] = {}
        """Why the last read of a status failed, of jobs whose status cannot be read."""
        self._feeling: set[anyio.CancelScope] = set()
        """Jobs that sleep without anything known; the first that ends wakes them."""
        self._refused_since: float | None = None
        self._in_two_steps = False
        """Whether a result is only asked for after its status."""
        self.reads = 0
        """Statuses and results that were answered."""

    def queued(self, timings: JobTimings) -> float | None:
        """The share of its time that an ended job was queued, None where that is not known.

        What the output says of its execution leaves out what is done around it; who goes by that for the window
        would take that for queueing. So a job whose status was not read at its end is taken to be as others are.
        """
        if timings.ended is None:
            return None
        inference = self._times.execution if timings.inference is None else timings.inference
        return queued_share(timings.ended, inference, timings.queued)

    async def answer(self, job_run: JobRun, ticket: Ticket) -> Answer:
        """Wait for the request to end and fetch its output. Nothing of it is durable yet.

        Raises:
            JobFailed: it ended without one.
        """
        stage = Stage.UNKNOWN if job_run.resumed else Stage.IN_QUEUE
        self._context.waits.put(job_run.key, stage, job_run.accepted_at, ticket.position)
        try:
            answer = await self._followed(job_run, ticket)
        except BaseException:
            self._context.waits.drop(job_run.key)
            raise
        finally:
            self._last_fault.pop(job_run.key, None)
            if self._hints is not None:
                self._hints.forget(ticket)
        self._context.waits.put(job_run.key, Stage.DOWNLOADING, self._context.now())
        return answer

    async def _followed(self, job_run: JobRun, ticket: Ticket) -> Answer:
        faults = _FaultCounter()
        pause = 0.0 if job_run.resumed else None
        while True:
            teaches = pause is None and not job_run.resumed
            if pause is None:
                await self._wait(job_run, ticket)
            else:
                await anyio.sleep(pause)
            if teaches and self._times.sure and not self._in_two_steps:
                answer = await self._straight(job_run, ticket)
                if answer is not None:
                    return answer
                teaches = False  # that read did
            pause = None
            status = await self._status(job_run, ticket)
            has_ended = status is not None and status.state is QueueState.COMPLETED
            if teaches and status is not None and not status.failed:
                self._times.came(in_time=has_ended)
            if not has_ended:
                if self._age(job_run) < self._times.overdue(job_run.timings):
                    continue
                await self._permitted()
            try:
                answer = await self._context.service.result(ticket)
            except CallFailed as error:
                # Read again means: after a fresh status, for a gateway's 503 and a job's own look alike.
                if status is not None and status.failed:
                    pause = self._failed(job_run, status, error.trouble, faults)
                elif has_ended:
                    pause = self._disbelief(job_run, error.trouble, faults)
                else:
                    pause = self._not_there(job_run, status, error.trouble, faults)
                continue
            self.reads += 1
            self._learn(job_run)
            return answer

    async def _straight(self, job_run: JobRun, ticket: Ticket) -> Answer | None:
        """The output without a status before it, where that is likely to be there already.

        An output of the right shape proves that the request has ended well; anything else proves nothing, and the
        status is read as ever.
        """
        await self._permitted()
        try:
            answer = await self._context.service.result(ticket)
        except CallFailed as error:
            self._times.came(in_time=False)
            # A refusal says "not yet". Silence, or something else than an output, says that it is not to be asked so.
            self._in_two_steps = self._in_two_steps or error.trouble.reply is None
            if error.trouble.reply is not None:  # "not yet" may come with a wish for how long
                await anyio.sleep(retry_after_of(error.trouble.reply, self._context.now()) or 0.0)
            return None
        self._times.came(in_time=True)
        self._was_read()
        job_run.timings.noticed = self._context.now() - job_run.accepted_at
        job_run.timings.executed = inference_of(answer.output)
        self._learn(job_run)
        return answer

    async def _wait(self, job_run: JobRun, ticket: Ticket) -> None:
        """Sleep until this job is due, or until a hint says that it may have ended."""
        pause = self._due(job_run)
        if self._times.knows or pause <= 0.0:
            await self._sleep(job_run, ticket, pause)
            return
        with anyio.CancelScope() as scope:
            self._feeling.add(scope)
            try:
                await self._sleep(job_run, ticket, pause)
            finally:
                self._feeling.discard(scope)
        if scope.cancelled_caught:  # now there is something to go by
            await self._sleep(job_run, ticket, self._due(job_run))

    def _due(self, job_run: JobRun) -> float:
        return self._times.due(job_run.timings) - (self._context.now() - job_run.accepted_at)

    async def _sleep(self, job_run: JobRun, ticket: Ticket, seconds: float) -> None:
        if self._hints is None or job_run.resumed:  # of an earlier run: what was asked to call us then is gone
            if seconds > 0.0:
                await anyio.sleep(seconds)
        else:
            seconds = max(0.0, seconds)
            longest = max(seconds, min(_NET * seconds, PollSchedule.LONGEST))
            job_run.timings.told = await self._hints.wait(ticket, seconds, longest)

    async def _status(self, job_run: JobRun, ticket: Ticket) -> TicketStatus | None:
        """Its status; None where none could be read for so long that its result is to be read instead."""
        timings, status = job_run.timings, None
        with anyio.CancelScope() as scope:

            def unread(verdict: Verdict) -> None:
                age = self._age(job_run)
                if timings.unreadable is None:
                    timings.unreadable = age
                scope.deadline = anyio.current_time() + max(0.0, self._times.overdue(timings) - age)
                self._context.waits.put(job_run.key, Stage.UNKNOWN, job_run.accepted_at)
                self._unread(verdict)

            try:
                status = await reading(
                    lambda: self._read(job_run, ticket), self._context.rng, notice=unread, now=self._context.now
                )
            except CallFailed as error:
                verdict = final(error.trouble)
                raise JobFailed(failure_of(error.trouble, verdict), collectable=verdict.collectable) from error
        if status is None:
            return None
        self._was_read()
        timings.unreadable = None
        age = self._age(job_run)
        self._context.waits.put(job_run.key, stage_of(status), job_run.accepted_at, status.position)
        if status.state is None:
            self._tell_unknown(ticket, status.word)
        if status.state is not QueueState.COMPLETED:
            self._times.pending(timings, age, queued=status.state is QueueState.IN_QUEUE, position=status.position)
        else:
            timings.inference = timings.executed = status.inference_time
            if timings.noticed is None:
                timings.noticed = age
        return status

    async def _read(self, job_run: JobRun, ticket: Ticket) -> TicketStatus:
        await self._permitted()
        try:
            return await self._context.service.status(ticket)
        except CallFailed as error:
            self._last_fault[job_run.key] = error.trouble
            raise

    def _age(self, job_run: JobRun) -> float:
        return self._context.now() - job_run.accepted_at

    def _tell_unknown(self, ticket: Ticket, word: str) -> None:
        if word in self._unknown_words or len(self._unknown_words) >= _WORDS_TOLD:
            return
        self._unknown_words.add(word)
        said = f"unknown status {word!r}" if word else "a status answer without a status"
        after = duration(self._times.patience)
        self._context.warn(
            f"request {ticket.request_id}: {said}; it counts as running, its result is read after {after}"
        )

    async def _permitted(self) -> None:
        if self._polls is not None and (wait := self._polls.reserve(anyio.current_time())):
            await anyio.sleep(wait)

    def _was_read(self) -> None:
        self.reads += 1
        self._refused_since = None
        self._context.expiry.read()

    def _learn(self, job_run: JobRun) -> None:
        """What a job of this run took teaches when to read the others."""
        if job_run.resumed or job_run.timings.noticed is None:
            return
        self._times.took(job_run.timings, job_run.timings.noticed)
        for scope in self._feeling:
            scope.cancel()
        self._feeling.clear()

    def _disbelief(self, job_run: JobRun, trouble: Trouble, faults: _FaultCounter) -> float:
        """Seconds until the result of an ended job is asked for again; raises where the fault is the job's own."""
        seen, verdict = self._judged(job_run, trouble, faults)
        self._unread(verdict)
        return (verdict.retry_after or 0.0) + pause_after(trouble, seen, self._context.rng)

    def _failed(self, job_run: JobRun, status: TicketStatus, trouble: Trouble, faults: _FaultCounter) -> float:
        """The same after a status that says that the work failed: seconds only where nothing was answered."""
        faults.add(kind_of(trouble), self._age(job_run))
        verdict, failure = judge_failed(trouble, status, seen=faults.total)
        if verdict.action is not Action.READ_AGAIN:
            raise JobFailed(failure, new_attempt=verdict.new_attempt)
        self._unread(verdict)
        return min(verdict.retry_after or 0.0, _LONGEST_WISH) + backoff(faults.total, self._context.rng, cap=1.0)

    def _not_there(
        self, job_run: JobRun, status: TicketStatus | None, trouble: Trouble, faults: _FaultCounter
    ) -> float | None:
        """Seconds until an overdue job is read again whose result is not there; None: by its usual schedule.

        A failure is believed only where the status says nothing: unknown words, or answers that are about the request
        (`concerns_request`). A request that is queued or running has an answer yet to come.
        """
        self._times.overdue_read(job_run.timings, self._age(job_run))
        unread = self._last_fault.get(job_run.key) if status is None else None
        if (status is not None and status.state is None) or (unread is not None and concerns_request(unread)):
            self._judged(job_run, trouble, faults, overdue=unread is not None)
        wish = retry_after_of(trouble.reply, self._context.now()) if trouble.reply is not None else None
        return wish if unread is None else (wish or 0.0) + backoff(faults.total, self._context.rng)

    def _judged(
        self, job_run: JobRun, trouble: Trouble, faults: _FaultCounter, *, overdue: bool = False
    ) -> tuple[int, Verdict]:
        """How often it was seen, and that it is to be read again.

        Raises:
            JobFailed: the fault is the job's own.
        """
        seen, lasted = faults.add(kind_of(trouble), self._age(job_run))
        verdict = judge(trouble, seen=seen, overdue=overdue or lasted >= self._times.patience, now=self._context.now())
        if verdict.action is not Action.READ_AGAIN:
            raise JobFailed(
                failure_of(trouble, verdict),
                new_attempt=verdict.new_attempt,
                collectable=verdict.collectable,
                answer=trouble.answer,
            )
        return seen, verdict

    def _unread(self, verdict: Verdict) -> None:
        self._context.read_failed(verdict)
        self._context.warn(self._context.expiry.unread(self._context.now()))
        if verdict.account:
            since = self._refused_since = self._refused_since or anyio.current_time()
            if anyio.current_time() - since >= self._patience:
                words = f"reads have been refused for {self._patience:g} s ({verdict.reason}): is the key still good?"
                self._context.admission.stop(StopCause.ACCOUNT, words)
