"""What a failed exchange means for its job: one table, decided by status and type, never by text. Pure.

A verdict is a value; nothing here sleeps. The submit POST has no row that says "send it again" unless it is
certain that it was not accepted. Source: `docs/design-notes.md`, "What an answer proves".
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import TypeVar

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_never
from tenacity.stop import stop_base

from batch.fal.protocol import ErrorBody, Reply, error_body_of, names_webhook
from batch.model import Failed
from batch.run.ports import CallFailed, Trouble

__all__ = [
    "Action",
    "Verdict",
    "backoff",
    "failure_of",
    "final",
    "judge",
    "kind_of",
    "pause_after",
    "reading",
    "retry_after_of",
]

Answered = TypeVar("Answered")


class Action(StrEnum):
    """What to do next."""

    READ_AGAIN = "read again"
    """It says nothing about the job."""
    SUBMIT_AGAIN = "submit again"
    """The submit was certainly not accepted; waiting may help."""
    UNKNOWN = "unknown"
    """The submit may have been accepted."""
    JOB_FAILED = "job failed"
    STOP_ACCOUNT = "stop: account refused"
    STOP_TARGET = "stop: no such endpoint"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and its reason."""

    action: Action
    reason: str
    retry_after: float | None = None
    """Seconds that the service asked for."""
    new_attempt: bool = False
    """With JOB_FAILED: whether another attempt may go better."""
    account: bool = False
    """With READ_AGAIN: it was the account that was refused. That says nothing about the job, but about the run."""


# Gateways and our own server speak of a 4xx as a complete, considered refusal; these cannot have been queued.
_REFUSED = frozenset({400, 405, 406, 410, 411, 413, 414, 415, 422, 431})
_ACCOUNT = frozenset({401, 402, 403})
# Infrastructure failures that fal's pages call transient: the job ended, another try may work.
_TRANSIENT_TYPES = frozenset({
    "request_timeout",
    "startup_timeout",
    "runner_scheduling_failure",
    "runner_connection_timeout",
    "runner_disconnected",
    "runner_connection_refused",
    "runner_connection_error",
    "runner_incomplete_response",
    "runner_server_error",
    "internal_error",
})  # fmt: skip
# On a read these are about the key, the gateway or our pace, never about the job.
_SAYS_NOTHING = frozenset({401, 402, 403, 407, 408, 409, 423, 425, 429})
_CONFIRMATIONS = 12
"""A 5xx with a fal body must be seen so often, each after a fresh COMPLETED: a gateway's 503 may look alike, and behind
it lies a result that is paid for. Where every second read is answered so, one in 4,000 jobs is given up."""
_NOT_FOUND_LIMIT = 16
"""A request id that the server once gave and now does not know: believed after so many reads. It is paid for: where
every second read is answered wrongly, one in 65,000 jobs is given up."""
_MALFORMED_LIMIT = 16
_MISSHAPEN = frozenset({"malformed", "oversize"})
_HOPELESS = _MISSHAPEN | {"bad url", "redirect"}
"""Of a file: neither a better network nor a server that comes back makes another URL, or a smaller file, of it."""
_HOPELESS_LIMIT = 6
_FILES = frozenset({"initiate", "upload", "download"})
_CALLS = {
    "initiate": "upload of a source picture",
    "upload": "upload of a source picture",
    "download": "result picture",
}
"""What a person calls them; the others are called what they are."""
_OFTEN = max(_CONFIRMATIONS, _NOT_FOUND_LIMIT, _MALFORMED_LIMIT, _HOPELESS_LIMIT)
_WORD_LIMIT = 100
"""Characters of an error type: it is counted by, and printed."""
_COUNTED_CAP = 2.0
"""Longest pause between reads that are counted up to a limit: all of them together take about 14 s."""
_REFUSED_CAP = 0.5
"""The same for an account that may not upload, about 4 s: mostly the key is wrong, and somebody sits before it."""
_CONFIRMED_CAP = 1.0
"""The same for an error that is to be confirmed, about 5 s: most are the job's own, and its next attempt waits."""


def final(trouble: Trouble) -> Verdict:
    """The verdict that ended `reading`: as often as it took, it was the same."""
    return judge(trouble, seen=_OFTEN)


def judge(trouble: Trouble, *, seen: int = 1) -> Verdict:
    """The verdict on one failed exchange; `seen` counts equal answers for this job so far, this one included."""
    if trouble.phase == "submit":
        return _judge_submit(trouble)
    if trouble.reply is None:
        if trouble.transport in _MISSHAPEN and trouble.phase == "result" and seen >= _MALFORMED_LIMIT:
            return Verdict(Action.JOB_FAILED, f"the result has not the endpoint's shape: {trouble.detail}")
        if trouble.transport in _HOPELESS and trouble.phase in _FILES and seen >= _HOPELESS_LIMIT:
            return Verdict(Action.JOB_FAILED, trouble.detail or str(trouble.transport))
        words = trouble.detail or trouble.transport or "no answer"
        return Verdict(Action.READ_AGAIN, f"{_CALLS.get(trouble.phase, trouble.phase)}: {words}")
    answer = f"{_CALLS.get(trouble.phase, trouble.phase)}: HTTP {trouble.reply.status}"
    if trouble.phase in {"status", "result"} and trouble.reply.status in _ACCOUNT:
        return Verdict(Action.READ_AGAIN, answer, retry_after_of(trouble.reply), account=True)
    if trouble.phase == "result":
        return _judge_result(trouble.reply, seen)
    if trouble.phase == "status" and trouble.reply.status == 404 and seen >= _NOT_FOUND_LIMIT:
        return Verdict(Action.JOB_FAILED, "the target no longer knows this request")
    if trouble.phase == "initiate" and trouble.reply.status in _ACCOUNT and seen >= _NOT_FOUND_LIMIT:
        return Verdict(Action.STOP_ACCOUNT, f"HTTP {trouble.reply.status}")
    if trouble.phase in _FILES and _for_good(trouble.reply, seen):
        return Verdict(Action.JOB_FAILED, f"HTTP {trouble.reply.status}")
    return Verdict(Action.READ_AGAIN, answer, retry_after_of(trouble.reply))


def _judge_submit(trouble: Trouble) -> Verdict:
    if trouble.reply is None:
        if trouble.sent:
            return Verdict(Action.UNKNOWN, f"{trouble.transport} after the request was sent")
        return Verdict(Action.SUBMIT_AGAIN, f"{trouble.transport}: nothing was sent")
    status = trouble.reply.status
    if status in _ACCOUNT:
        return Verdict(Action.STOP_ACCOUNT, f"HTTP {status}")
    if status == 404:
        return Verdict(Action.STOP_TARGET, "HTTP 404")
    if status == 429:
        return Verdict(Action.SUBMIT_AGAIN, "HTTP 429", retry_after_of(trouble.reply))
    if status == 407:
        return Verdict(Action.SUBMIT_AGAIN, "HTTP 407: the proxy wants a user and a password")
    if status in _REFUSED and names_webhook(trouble.reply):  # the run's own wish, not the job's
        return Verdict(Action.STOP_TARGET, f"HTTP {status}")
    if status in _REFUSED:
        return Verdict(Action.JOB_FAILED, f"HTTP {status}")
    return Verdict(Action.UNKNOWN, f"HTTP {status} says nothing certain about a submit")


def _judge_result(reply: Reply, seen: int) -> Verdict:
    error = error_body_of(reply)
    if reply.status in _SAYS_NOTHING or reply.status < 400:
        return Verdict(Action.READ_AGAIN, f"HTTP {reply.status}", retry_after_of(reply))
    if reply.status == 404:
        gone = seen >= _NOT_FOUND_LIMIT
        return Verdict(Action.JOB_FAILED if gone else Action.READ_AGAIN, "HTTP 404")
    if reply.status == 400 and error.type in {None, "bad_request"}:
        # "Request is still in progress": only a repeated one, after COMPLETED each time, is the job's own.
        return Verdict(Action.JOB_FAILED if seen >= _NOT_FOUND_LIMIT else Action.READ_AGAIN, "HTTP 400")
    if not error.is_fal:
        return Verdict(Action.READ_AGAIN, f"HTTP {reply.status} without fal's body", retry_after_of(reply))
    if reply.status >= 500 and seen < _CONFIRMATIONS:
        return Verdict(Action.READ_AGAIN, f"HTTP {reply.status}, to be confirmed", retry_after_of(reply))
    return Verdict(Action.JOB_FAILED, f"HTTP {reply.status}", new_attempt=_may_go_better(reply, error))


def _may_go_better(reply: Reply, error: ErrorBody) -> bool:
    if reply.headers.get("x-fal-request-timeout-type") == "user" or reply.status == 499:
        return False
    if error.needs_retry is not None:
        return error.needs_retry
    return reply.status >= 500 and error.type in _TRANSIENT_TYPES


def _for_good(reply: Reply, seen: int) -> bool:
    """An upload refused as such, or a file that is gone and stays gone; storages call that forbidden, too."""
    if reply.status in {401, 402, 403, 404, 410}:
        return seen >= _NOT_FOUND_LIMIT
    return 400 <= reply.status < 500 and reply.status not in _SAYS_NOTHING


def failure_of(trouble: Trouble, verdict: Verdict) -> Failed:
    """The row's error, from the service's own words where it has any."""
    if trouble.reply is None:
        is_output = trouble.phase == "result" and trouble.transport in _MISSHAPEN
        word = "malformed_output" if is_output else trouble.transport or "no_answer"
        return Failed(word, trouble.detail or verdict.reason)
    error = error_body_of(trouble.reply)
    billable = _amount(trouble.reply.headers.get("x-fal-billable-units", ""))
    if billable is None and trouble.reply.status >= 500:
        billable = 0.0  # fal never charges for them
    word = _printable(error.type or "")[:_WORD_LIMIT] or f"http_{trouble.reply.status}"
    return Failed(word, _printable(error.message) or verdict.reason, billable)


def _printable(text: str) -> str:
    """A service's words as they may be shown on a terminal: what would move its cursor is a space."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _amount(text: str) -> float | None:
    """A number from 0 on; None for anything else: not-a-number would poison every sum after it."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def retry_after_of(reply: Reply) -> float | None:
    """Seconds in `Retry-After`, bounded to an hour; None where absent or a date (fal documents neither)."""
    try:
        seconds = float(reply.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, 3600.0) if seconds >= 0 else None


def backoff(tries: int, rng: Random, *, base: float = 0.2, cap: float = 30.0) -> float:
    """Full jitter: uniform in [0, min(cap, base * 2^(tries-1))] seconds, for tries from 1 on.

    The whole delay is drawn at random, so that hundreds of requests in step do not come back in step.
    """
    return rng.uniform(0.0, min(cap, base * 2.0 ** min(tries - 1, 30)))


async def reading(
    call: Callable[[], Awaitable[Answered]],
    rng: Random,
    *,
    notice: Callable[[Verdict], None] | None = None,
    stop: stop_base = stop_never,
) -> Answered:
    """Do a read (or an upload: repeating one costs bandwidth only) until its verdict is not READ_AGAIN.

    Never for a submit. `notice` is told of each fault that is read again. Ends with the answer, with the
    `CallFailed` that ended it, or by cancellation.
    """
    try:
        return await call()  # nearly always: the machinery below is for the bad days
    except CallFailed as error:
        return await _read_again(call, error, rng, notice, stop)


async def _read_again(
    call: Callable[[], Awaitable[Answered]],
    first: CallFailed,
    rng: Random,
    notice: Callable[[Verdict], None] | None,
    stop: stop_base,
) -> Answered:
    seen: dict[str, int] = {}

    def again(error: BaseException) -> bool:
        if not isinstance(error, CallFailed):
            return False
        kind = kind_of(error.trouble)
        seen[kind] = seen.get(kind, 0) + 1
        verdict = judge(error.trouble, seen=seen[kind])
        if notice is not None and verdict.action is Action.READ_AGAIN:
            notice(verdict)
        return verdict.action is Action.READ_AGAIN

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, CallFailed):
            return 0.0
        return (judge(error.trouble).retry_after or 0.0) + pause_after(error.trouble, state.attempt_number, rng)

    async def once() -> Answered:  # tenacity awaits coroutine functions only
        return await call()

    if not again(first):
        raise first
    await anyio.sleep((judge(first.trouble).retry_after or 0.0) + backoff(1, rng))
    retrying = AsyncRetrying(retry=retry_if_exception(again), wait=wait, stop=stop, sleep=anyio.sleep, reraise=True)
    return await retrying(once)


def pause_after(trouble: Trouble, tries: int, rng: Random) -> float:
    """Seconds until the next read: `backoff`, kept short where only so many of them are believed in."""
    kind = kind_of(trouble)
    reply = trouble.reply
    if trouble.phase == "result" and reply is not None and reply.status >= 500 and error_body_of(reply).is_fal:
        return backoff(tries, rng, cap=_CONFIRMED_CAP)
    if trouble.phase == "initiate" and reply is not None and reply.status in _ACCOUNT:
        return backoff(tries, rng, cap=_REFUSED_CAP)
    is_refused_file = trouble.phase in _FILES and reply is not None and reply.status in _ACCOUNT
    counted = kind == "404" or is_refused_file or (trouble.phase == "result" and kind in {"400", "malformed"})
    return backoff(tries, rng, cap=_COUNTED_CAP) if counted else backoff(tries, rng)


def kind_of(trouble: Trouble) -> str:
    """Which troubles count as "the same again"."""
    return trouble.transport or (f"{trouble.reply.status}" if trouble.reply else "")
