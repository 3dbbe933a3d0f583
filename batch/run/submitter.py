"""Submit a job: the POST that costs money, sent once.

The intent is durable before the POST is sent, the outcome before anything else happens. Depends on Protocols only
(`batch.run.interfaces`). `verdicts` decides what an answer proves, `admission` when a submit may be sent.
"""

from __future__ import annotations

from typing import NoReturn

import anyio
import orjson

from batch.fal.errors import CallFailed, Trouble
from batch.journal.events import Accepted, Intended, Lost, Refused
from batch.journal.records import RequestIdTaken
from batch.journal.states import State
from batch.run.admission import StopCause
from batch.run.context import RunContext
from batch.run.interfaces import HeldBack
from batch.run.job import JobFailed, JobRun, OutcomeUnknown, RunStopping
from batch.run.transfers import Transfers
from batch.run.verdicts import REPEAT_SECONDS, Action, Idempotency, Verdict, backoff, failure_of, judge, judge_submit
from batch.types import Attempt, Ticket

__all__ = ["Submitter"]

_UNCERTAIN = frozenset({Action.UNKNOWN, Action.REPEAT, Action.DUPLICATE})
"""Verdicts on a submit that may have been accepted."""


class Submitter:
    """Submits the jobs of one run."""

    def __init__(self, context: RunContext, transfers: Transfers) -> None:
        self._context, self._transfers = context, transfers
        context.service.before_send = context.admission.before_send

    async def submit(self, job_run: JobRun) -> Ticket:
        """Send the submit of this attempt, once, after its intent is durable."""
        may_have_arrived = job_run.state in {State.INTENDED, State.UNKNOWN}  # an earlier POST of it may have arrived
        tries = 0
        while True:
            if may_have_arrived and self._context.admission.ends_soon:
                raise RunStopping  # the next run sends it again under its key
            job_run.body = job_run.body or await self._body_of(job_run)
            if job_run.state is not State.INTENDED:
                if self._context.policy.collect_only and not may_have_arrived:
                    raise RunStopping
                await self._context.admission.acquire_submit(job_run)
                await self._intend(job_run)
                if self._context.admission.stopping is not None:  # the stop came while the intent was written
                    await self._withdraw(job_run, may_have_arrived=may_have_arrived)
            else:
                await self._context.admission.acquire_repeat()
            tries += 1
            try:
                ticket = await self._context.service.submit(
                    Attempt(job_run.key, job_run.attempt, job_run.body, may_have_arrived)
                )
            except HeldBack as error:
                if not may_have_arrived:
                    await self._not_sent(job_run, str(error))
                continue
            except CallFailed as error:
                verdict = judge_submit(
                    error.trouble, self._context.policy.idempotency, repeated=may_have_arrived, now=self._context.now()
                )
                may_have_arrived = may_have_arrived or verdict.action in _UNCERTAIN
                if may_have_arrived:
                    await self._handle_unknown(job_run, error.trouble, verdict, tries)
                else:
                    await self._submit_refused(job_run, error.trouble, verdict)
                continue
            self._context.admission.accepted()
            job_run.accepted_at, job_run.timings.position = self._context.now(), ticket.position
            await self._accept(job_run, ticket)
            job_run.ticket, job_run.state = ticket, State.ACCEPTED
            self._context.observer.happened("accepted", job=job_run.key, request_id=ticket.request_id)
            return ticket

    async def _intend(self, job_run: JobRun) -> None:
        if not job_run.repeats:
            job_run.intended_at = self._context.now()
        timeout = self._context.policy.start_timeout
        await self._context.journal.record(
            Intended(job_run.key, job_run.intended_at, job_run.attempt, job_run.body, job_run.reserved_usd, timeout)
        )
        job_run.state = State.INTENDED

    async def _accept(self, job_run: JobRun, ticket: Ticket) -> None:
        """Record the accepted request.

        Raises:
            OutcomeUnknown: the request id belongs to another job, so it is unknown whose result it shows.
        """
        try:
            await self._context.journal.record(Accepted(job_run.key, job_run.accepted_at, ticket))
        except RequestIdTaken as error:
            await self._context.journal.record(Lost(job_run.key, self._context.now(), str(error)))
            self.hold(job_run, str(error))
            raise OutcomeUnknown from error

    async def _withdraw(self, job_run: JobRun, *, may_have_arrived: bool) -> NoReturn:
        """Withdraw an intent whose submit was not sent, and restore the job's earlier state."""
        reason = "the run stopped before it was sent"
        if may_have_arrived:
            await self._context.journal.record(Lost(job_run.key, self._context.now(), reason))
        else:
            await self._not_sent(job_run, reason)
        raise RunStopping

    async def _pause(self, seconds: float) -> None:
        """Sleep, but end at once if the run ends soon."""
        with anyio.move_on_after(seconds):
            await self._context.admission.stopped()
            if not self._context.admission.ends_soon:
                await anyio.sleep_forever()

    async def _not_sent(self, job_run: JobRun, reason: str) -> None:
        """Withdraw the intent: the same attempt will be sent later, or in another run."""
        await self._context.journal.record(Refused(job_run.key, self._context.now(), reason))
        job_run.state = State.PENDING
        self._context.admission.settle(job_run, 0.0)

    async def _submit_refused(self, job_run: JobRun, trouble: Trouble, verdict: Verdict) -> None:
        """Handle a submit that was certainly not accepted: fail the job, stop the run, or send it again later."""
        if verdict.action is Action.JOB_FAILED:
            raise JobFailed(failure_of(trouble, verdict), new_attempt=verdict.new_attempt)
        if verdict.action is Action.SUBMIT_AGAIN:  # before any await: other submits are about to be sent
            self._pause_submits(trouble, verdict)
        await self._not_sent(job_run, verdict.reason)
        if self._context.admission.ends_soon:
            raise RunStopping
        if verdict.action is Action.SUBMIT_AGAIN:
            return
        words = failure_of(trouble, verdict).message
        self._context.admission.stop(
            StopCause.ACCOUNT if verdict.action is Action.STOP_ACCOUNT else StopCause.TARGET, words
        )
        raise RunStopping

    def _pause_submits(self, trouble: Trouble, verdict: Verdict) -> None:
        throttled = trouble.reply is not None and trouble.reply.status == 429
        self._context.admission.throttled(verdict, trouble.detail, throttled=throttled, now=self._context.now())

    async def _handle_unknown(self, job_run: JobRun, trouble: Trouble, verdict: Verdict, tries: int) -> None:
        """Handle a submit of unknown outcome: repeat it under the same key where that is safe, else hold it."""
        forever = self._context.policy.idempotency is Idempotency.REPLAY
        first = judge(trouble, now=self._context.now())
        if first.action is Action.SUBMIT_AGAIN or first.retry_after is not None:
            self._pause_submits(trouble, first)
        if verdict.action is Action.REPEAT and (forever or self.may_repeat(job_run)):
            self._context.admission.notice("unreachable", f"{verdict.reason}; retrying under the same idempotency key")
            await self._pause(backoff(tries, self._context.rng))
            return
        if verdict.action is Action.STOP_ACCOUNT:
            self._context.admission.stop(StopCause.ACCOUNT, verdict.reason)
        await self._context.journal.record(Lost(job_run.key, self._context.now(), verdict.reason))
        self.hold(job_run, verdict.reason)
        raise OutcomeUnknown

    def hold(self, job_run: JobRun, reason: str) -> None:
        """Report a job whose submit has an unknown outcome."""
        self._context.observer.happened("held", job=job_run.key, reason=reason)

    def may_repeat(self, job_run: JobRun) -> bool:
        """Return whether the target still knows the key of this submit, if it was accepted."""
        return self._context.now() - job_run.intended_at < REPEAT_SECONDS

    async def _body_of(self, job_run: JobRun) -> bytes:
        """Return the body to submit: the job's input, with the uploaded URL if its image is local."""
        job = job_run.job
        assert job is not None, "a resumed job already has its body"
        url = job.input["image_url"] if job.image is None else await self._transfers.uploaded(job)
        return orjson.dumps({**job.input, "image_url": url}, option=orjson.OPT_SORT_KEYS)
