"""Following an accepted request to its answer: when it is read, and what an unread or disbelieved one means.

Owns every wait for an answer. When to read next is `polling`'s to say, what an answer proves `retry`'s; whoever may
wake it earlier (`ports.Hints`) is believed only as far as reading now: a hint that lies costs a read, one that is lost
costs a wait.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import anyio

from batch.model import Answer, QueueState, Ticket, TicketStatus
from batch.run.course import Course, JobFailed
from batch.run.gate import Gate, Stop
from batch.run.pacing import TokenBucket, queued_share
from batch.run.polling import PollTimes, Stay
from batch.run.ports import CallFailed, Hints, Service, Trouble
from batch.run.retention import Retention
from batch.run.retry import Action, Verdict, failure_of, judge, kind_of, pause_after, reading, retry_after_of

__all__ = ["Follower"]

_NET = 4.0
"""Where a hint is to be expected, a job is read by itself after so many times the usual wait, and after
`PollTimes.LONGEST` at the latest."""


class Follower:
    """One for a run: it learns from each job for all others."""

    def __init__(
        self,
        *,
        service: Service,
        gate: Gate,
        retention: Retention,
        polls: TokenBucket | None,
        hints: Hints | None,
        patience: float,
        now: Callable[[], float],
        rng: Random,
        notice: Callable[[Verdict], None],
        warn: Callable[[str | None], None],
    ) -> None:
        """Plug it together.

        Args:
            service: asked for statuses and results.
            gate: stops the run where the account stays refused.
            retention: told of reads, so that somebody is warned in time.
            polls: bounds reads over all jobs, in their order, results that are known to be there excepted; None: no
                bound.
            hints: who may know earlier; None: nobody.
            patience: seconds for which an account may be refused at every read until the run gives up for now.
            now: wall time in Unix seconds; waits use anyio's clock.
            rng: for the pauses between reads that failed.
            notice: told of each read that is read again.
            warn: told a sentence, or nothing.
        """
        self._service, self._gate, self._retention = service, gate, retention
        self._polls, self._hints, self._patience = polls, hints, patience
        self._now, self._rng, self._notice, self._warn = now, rng, notice, warn
        self._times = PollTimes()
        self._feeling: set[anyio.CancelScope] = set()
        """Jobs that sleep without anything known; the first that ends wakes them."""
        self._refused_since: float | None = None
        self._in_two_steps = False
        """Whether a result is only asked for after its status."""
        self.reads = 0
        """Statuses and results that were answered."""

    def queued(self, stay: Stay) -> float | None:
        """The share of its time that an ended job was queued, None where that is not known.

        What the output says of its execution leaves out what is done around it; who goes by that for the window
        would take that for queueing. So a job whose status was not read at its end is taken to be as others are.
        """
        if stay.ended is None:
            return None
        inference = self._times.execution if stay.inference is None else stay.inference
        return queued_share(stay.ended, inference, stay.queued)

    async def answer(self, course: Course, ticket: Ticket) -> Answer:
        """Wait for the request to end and fetch its output. Nothing of it is durable yet.

        Raises:
            JobFailed: it ended without one.
        """
        try:
            return await self._followed(course, ticket)
        finally:
            if self._hints is not None:
                self._hints.forget(ticket)

    async def _followed(self, course: Course, ticket: Ticket) -> Answer:
        faults: dict[str, int] = {}
        pause = 0.0 if course.resumed else None
        while True:
            teaches = pause is None and not course.resumed
            if pause is None:
                await self._wait(course, ticket)
            else:
                await anyio.sleep(pause)
            if teaches and self._times.sure and not self._in_two_steps:
                answer = await self._straight(course, ticket)
                if answer is not None:
                    return answer
                teaches = False  # that read did
            pause = None
            status = await self._status(course, ticket)
            has_ended = status.state is QueueState.COMPLETED
            if teaches:
                self._times.came(in_time=has_ended)
            if not has_ended:
                continue
            try:
                answer = await self._service.result(ticket)
            except CallFailed as error:
                # Read again means: after a fresh status, for a gateway's 503 and a job's own look alike.
                pause = self._disbelief(error.trouble, faults)
                continue
            self.reads += 1
            self._learn(course)
            return answer

    async def _straight(self, course: Course, ticket: Ticket) -> Answer | None:
        """The output without a status before it, where that is likely to be there already.

        An output of the right shape proves that the request has ended well; anything else proves nothing, and the
        status is read as ever.
        """
        await self._permitted()
        try:
            answer = await self._service.result(ticket)
        except CallFailed as error:
            self._times.came(in_time=False)
            # A refusal says "not yet". Silence, or something else than an output, says that it is not to be asked so.
            self._in_two_steps = self._in_two_steps or error.trouble.reply is None
            if error.trouble.reply is not None:  # "not yet" may come with a wish for how long
                await anyio.sleep(retry_after_of(error.trouble.reply, self._now()) or 0.0)
            return None
        self._times.came(in_time=True)
        self._was_read()
        course.stay.noticed = self._now() - course.accepted_at
        course.stay.executed = _inference(answer)
        self._learn(course)
        return answer

    async def _wait(self, course: Course, ticket: Ticket) -> None:
        """Sleep until this job is due, or until a hint says that it may have ended."""
        pause = self._due(course)
        if self._times.knows or pause <= 0.0:
            await self._sleep(course, ticket, pause)
            return
        with anyio.CancelScope() as scope:
            self._feeling.add(scope)
            try:
                await self._sleep(course, ticket, pause)
            finally:
                self._feeling.discard(scope)
        if scope.cancelled_caught:  # now there is something to go by
            await self._sleep(course, ticket, self._due(course))

    def _due(self, course: Course) -> float:
        return self._times.due(course.stay) - (self._now() - course.accepted_at)

    async def _sleep(self, course: Course, ticket: Ticket, seconds: float) -> None:
        if self._hints is None or course.resumed:  # of an earlier run: what was asked to call us then is gone
            if seconds > 0.0:
                await anyio.sleep(seconds)
        else:
            seconds = max(0.0, seconds)
            longest = max(seconds, min(_NET * seconds, PollTimes.LONGEST))
            course.stay.told = await self._hints.wait(ticket, seconds, longest)

    async def _status(self, course: Course, ticket: Ticket) -> TicketStatus:
        try:
            status = await reading(lambda: self._read(ticket), self._rng, notice=self._unread, now=self._now)
        except CallFailed as error:
            raise JobFailed(failure_of(error.trouble, judge(error.trouble))) from error
        self._was_read()
        stay, age = course.stay, self._now() - course.accepted_at
        if status.state is not QueueState.COMPLETED:
            self._times.pending(stay, age, queued=status.state is QueueState.IN_QUEUE, position=status.position)
        else:
            stay.inference = stay.executed = status.inference_time
            if stay.noticed is None:
                stay.noticed = age
        return status

    async def _read(self, ticket: Ticket) -> TicketStatus:
        await self._permitted()
        return await self._service.status(ticket)

    async def _permitted(self) -> None:
        if self._polls is not None and (wait := self._polls.reserve(anyio.current_time())):
            await anyio.sleep(wait)

    def _was_read(self) -> None:
        self.reads += 1
        self._refused_since = None
        self._retention.read()

    def _learn(self, course: Course) -> None:
        """What a job of this run took teaches when to read the others."""
        if course.resumed or course.stay.noticed is None:
            return
        self._times.took(course.stay, course.stay.noticed)
        for scope in self._feeling:
            scope.cancel()
        self._feeling.clear()

    def _disbelief(self, trouble: Trouble, faults: dict[str, int]) -> float:
        """Seconds until the result is asked for again; raises where the fault is the job's own."""
        kind = kind_of(trouble)
        faults[kind] = faults.get(kind, 0) + 1
        verdict = judge(trouble, seen=faults[kind], now=self._now())
        if verdict.action is not Action.READ_AGAIN:
            raise JobFailed(failure_of(trouble, verdict), new_attempt=verdict.new_attempt)
        self._unread(verdict)
        return (verdict.retry_after or 0.0) + pause_after(trouble, faults[kind], self._rng)

    def _unread(self, verdict: Verdict) -> None:
        self._notice(verdict)
        self._warn(self._retention.unread(self._now()))
        if verdict.account:
            since = self._refused_since = self._refused_since or anyio.current_time()
            if anyio.current_time() - since >= self._patience:
                words = f"reads have been refused for {self._patience:g} s ({verdict.reason}): is the key still good?"
                self._gate.stop(Stop.ACCOUNT, words)


def _inference(answer: Answer) -> float | None:
    """Seconds of execution, as the output itself says."""
    timings = answer.output.get("timings")
    seconds = timings.get("inference") if isinstance(timings, dict) else None
    return float(seconds) if isinstance(seconds, int | float) and 0.0 <= seconds < float("inf") else None
