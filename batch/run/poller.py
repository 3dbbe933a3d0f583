"""The poller: waits for the answer of an accepted request.

`poll_schedule` decides when to read next, `verdicts` what an answer means. `CompletionHints` may cause an earlier read
and nothing else: a wrong hint costs one read, a lost hint costs one wait.

A status is not proof. A status that reports a failure is followed by one read of the result; a job that takes ten times
as long as usual (`PollSchedule.overdue`) has its result read whatever its status says. An output is accepted in either
case.
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

_FALLBACK_FACTOR = 4.0
"""Where a hint is expected, a job is polled after this many times the usual wait, and after `PollSchedule.LONGEST` at
the latest."""
_UNKNOWN_WORDS_LIMIT = 5
"""Maximum number of unknown status words that are reported; a service may use a new one at each read."""
_LONGEST_RETRY_AFTER = 30.0
"""Longest `Retry-After`, in seconds, that is honoured after a status that reports a failure."""


class _FaultCounter:
    """Counts the failed reads of one job's result."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._kind = ""
        self._since = 0.0

    @property
    def total(self) -> int:
        """Failed reads of all kinds."""
        return sum(self._seen.values())

    def add(self, kind: str, age: float) -> tuple[int, float]:
        """Count a failure at the job's age. Return the count of its kind, and for how long there was no other kind."""
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if kind != self._kind:
            self._kind, self._since = kind, age
        return self._seen[kind], age - self._since


class Poller:
    """The poller of a run; what it learns from one job applies to all others."""

    def __init__(
        self, context: RunContext, *, polls: TokenBucket | None, hints: CompletionHints | None, patience: float
    ) -> None:
        """Create the poller of a run.

        Args:
            context: what the parts of the run share.
            polls: limits reads over all jobs, in order, except reads of results known to exist; None: no limit.
            hints: may report a completion earlier; None: polling only.
            patience: seconds for which every read may refuse the account before the run stops.
        """
        self._context, self._polls, self._hints, self._patience = context, polls, hints, patience
        self._times = PollSchedule()
        self._unknown_words: set[str] = set()
        self._last_fault: dict[JobKey, Trouble] = {}
        """The error of the last status read, of jobs whose status cannot be read."""
        self._probing: set[anyio.CancelScope] = set()
        """Sleeping jobs while no duration is known; the first ended job wakes them."""
        self._refused_since: float | None = None
        self._needs_status = False
        """Whether each result read must follow a status read."""
        self.reads = 0
        """Number of answered status and result reads."""

    def queued(self, timings: JobTimings) -> float | None:
        """Return the share of its time that an ended job was queued, None if unknown.

        The execution time in the output excludes overhead of the service, which would wrongly count as queueing. So a
        job whose final status was not read is assumed to have the median execution time.
        """
        if timings.ended is None:
            return None
        inference = self._times.execution if timings.inference is None else timings.inference
        return queued_share(timings.ended, inference, timings.queued)

    async def answer(self, job_run: JobRun, ticket: Ticket) -> Answer:
        """Wait for the request to end and fetch its output. Nothing of it is durable yet.

        Raises:
            JobFailed: the request ended without an output.
        """
        stage = Stage.UNKNOWN if job_run.resumed else Stage.IN_QUEUE
        self._context.waits.put(job_run.key, stage, job_run.accepted_at, ticket.position)
        try:
            answer = await self._poll(job_run, ticket)
        except BaseException:
            self._context.waits.drop(job_run.key)
            raise
        finally:
            self._last_fault.pop(job_run.key, None)
            if self._hints is not None:
                self._hints.forget(ticket)
        self._context.waits.put(job_run.key, Stage.DOWNLOADING, self._context.now())
        return answer

    async def _poll(self, job_run: JobRun, ticket: Ticket) -> Answer:
        faults = _FaultCounter()
        pause = 0.0 if job_run.resumed else None
        while True:
            teaches = pause is None and not job_run.resumed
            if pause is None:
                await self._wait(job_run, ticket)
            else:
                await anyio.sleep(pause)
            if teaches and self._times.sure and not self._needs_status:
                answer = await self._result_first(job_run, ticket)
                if answer is not None:
                    return answer
                teaches = False  # that read was counted already
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
                # A retry begins with a fresh status: a gateway's 503 and a job's own 503 look alike.
                if status is not None and status.failed:
                    pause = self._retry_failed(job_run, status, error.trouble, faults)
                elif has_ended:
                    pause = self._retry_ended(job_run, error.trouble, faults)
                else:
                    pause = self._retry_overdue(job_run, status, error.trouble, faults)
                continue
            self.reads += 1
            self._learn(job_run)
            return answer

    async def _result_first(self, job_run: JobRun, ticket: Ticket) -> Answer | None:
        """Fetch the output without a status read, where it probably exists already.

        A valid output proves that the request succeeded; anything else proves nothing, and the status is read as usual.
        """
        await self._permitted()
        try:
            answer = await self._context.service.result(ticket)
        except CallFailed as error:
            self._times.came(in_time=False)
            # A refusal means "not yet". No reply, or a reply that is not an output: always read the status first.
            self._needs_status = self._needs_status or error.trouble.reply is None
            if error.trouble.reply is not None:  # "not yet" may come with a Retry-After
                await anyio.sleep(retry_after_of(error.trouble.reply, self._context.now()) or 0.0)
            return None
        self._times.came(in_time=True)
        self._note_read()
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
            self._probing.add(scope)
            try:
                await self._sleep(job_run, ticket, pause)
            finally:
                self._probing.discard(scope)
        if scope.cancelled_caught:  # a duration is known now
            await self._sleep(job_run, ticket, self._due(job_run))

    def _due(self, job_run: JobRun) -> float:
        return self._times.due(job_run.timings) - (self._context.now() - job_run.accepted_at)

    async def _sleep(self, job_run: JobRun, ticket: Ticket, seconds: float) -> None:
        if self._hints is None or job_run.resumed:  # the hint receiver of an earlier run no longer exists
            if seconds > 0.0:
                await anyio.sleep(seconds)
        else:
            seconds = max(0.0, seconds)
            longest = max(seconds, min(_FALLBACK_FACTOR * seconds, PollSchedule.LONGEST))
            job_run.timings.hinted = await self._hints.wait(ticket, seconds, longest)

    async def _status(self, job_run: JobRun, ticket: Ticket) -> TicketStatus | None:
        """Return its status; None if the job became overdue while its status was unreadable."""
        timings, status = job_run.timings, None
        with anyio.CancelScope() as scope:

            def unread(verdict: Verdict) -> None:
                age = self._age(job_run)
                if timings.unreadable is None:
                    timings.unreadable = age
                scope.deadline = anyio.current_time() + max(0.0, self._times.overdue(timings) - age)
                self._context.waits.put(job_run.key, Stage.UNKNOWN, job_run.accepted_at)
                self._note_unread(verdict)

            try:
                status = await reading(
                    lambda: self._read(job_run, ticket), self._context.rng, notice=unread, now=self._context.now
                )
            except CallFailed as error:
                verdict = final(error.trouble)
                raise JobFailed(failure_of(error.trouble, verdict), collectable=verdict.collectable) from error
        if status is None:
            return None
        self._note_read()
        timings.unreadable = None
        age = self._age(job_run)
        self._context.waits.put(job_run.key, stage_of(status), job_run.accepted_at, status.position)
        if status.state is None:
            self._warn_unknown_status(ticket, status.word)
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

    def _warn_unknown_status(self, ticket: Ticket, word: str) -> None:
        if word in self._unknown_words or len(self._unknown_words) >= _UNKNOWN_WORDS_LIMIT:
            return
        self._unknown_words.add(word)
        problem = f"unknown status {word!r}" if word else "a status answer without a status"
        after = duration(self._times.patience)
        self._context.warn(
            f"request {ticket.request_id}: {problem}; it counts as running, its result is read after {after}"
        )

    async def _permitted(self) -> None:
        if self._polls is not None and (wait := self._polls.reserve(anyio.current_time())):
            await anyio.sleep(wait)

    def _note_read(self) -> None:
        self.reads += 1
        self._refused_since = None
        self._context.expiry.read()

    def _learn(self, job_run: JobRun) -> None:
        """Learn the duration of a job of this run."""
        if job_run.resumed or job_run.timings.noticed is None:
            return
        self._times.took(job_run.timings, job_run.timings.noticed)
        for scope in self._probing:
            scope.cancel()
        self._probing.clear()

    def _retry_ended(self, job_run: JobRun, trouble: Trouble, faults: _FaultCounter) -> float:
        """Return the seconds until an ended job's result is read again; raise if the job itself has failed."""
        seen, verdict = self._judged(job_run, trouble, faults)
        self._note_unread(verdict)
        return (verdict.retry_after or 0.0) + pause_after(trouble, seen, self._context.rng)

    def _retry_failed(self, job_run: JobRun, status: TicketStatus, trouble: Trouble, faults: _FaultCounter) -> float:
        """Do the same after a status that reports a failure; retry only where the result read got no answer."""
        faults.add(kind_of(trouble), self._age(job_run))
        verdict, failure = judge_failed(trouble, status, seen=faults.total)
        if verdict.action is not Action.READ_AGAIN:
            raise JobFailed(failure, new_attempt=verdict.new_attempt)
        self._note_unread(verdict)
        return min(verdict.retry_after or 0.0, _LONGEST_RETRY_AFTER) + backoff(faults.total, self._context.rng, cap=1.0)

    def _retry_overdue(
        self, job_run: JobRun, status: TicketStatus | None, trouble: Trouble, faults: _FaultCounter
    ) -> float | None:
        """Return the seconds until an overdue job without a result is read again; None: by the usual schedule.

        A failure is accepted only where the status says nothing: unknown words, or answers about the request itself
        (`concerns_request`). A request that is queued or running can still get an answer.
        """
        self._times.overdue_read(job_run.timings, self._age(job_run))
        unread = self._last_fault.get(job_run.key) if status is None else None
        if (status is not None and status.state is None) or (unread is not None and concerns_request(unread)):
            self._judged(job_run, trouble, faults, overdue=unread is not None)
        asked = retry_after_of(trouble.reply, self._context.now()) if trouble.reply is not None else None
        return asked if unread is None else (asked or 0.0) + backoff(faults.total, self._context.rng)

    def _judged(
        self, job_run: JobRun, trouble: Trouble, faults: _FaultCounter, *, overdue: bool = False
    ) -> tuple[int, Verdict]:
        """Return how often this error was seen, and a verdict that asks for another read.

        Raises:
            JobFailed: the job itself has failed.
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

    def _note_unread(self, verdict: Verdict) -> None:
        self._context.read_failed(verdict)
        self._context.warn(self._context.expiry.unread(self._context.now()))
        if verdict.account:
            since = self._refused_since = self._refused_since or anyio.current_time()
            if anyio.current_time() - since >= self._patience:
                words = f"reads have been refused for {self._patience:g} s ({verdict.reason}): check the API key"
                self._context.admission.stop(StopCause.ACCOUNT, words)
