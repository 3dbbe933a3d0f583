"""Verdicts on failed exchanges: one table, decided by status and type, never by text. Pure.

A verdict is a value; nothing here sleeps. A submit is sent again only where it is certain that it was not accepted.
Source: `docs/design-notes.md`, "What an answer proves".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from random import Random
from typing import TypeVar

from batch.fal.errors import Trouble
from batch.fal.protocol import ErrorBody, Reply, error_body_of, names_idempotency_key, names_webhook
from batch.types import Failed, TicketStatus

__all__ = [
    "REPEAT_SECONDS",
    "Action",
    "Idempotency",
    "Verdict",
    "backoff",
    "concerns_request",
    "failure_of",
    "final",
    "judge",
    "judge_failed",
    "judge_submit",
    "kind_of",
    "pause_after",
    "retry_after_of",
]

Answered = TypeVar("Answered")


class Idempotency(StrEnum):
    """How a target handles a submit whose `Idempotency-Key` it has seen before."""

    REPLAY = "replay"
    """It answers with the request created by the first submit."""
    REJECT = "reject"
    """It refuses, which proves that the first submit was accepted. If it accepts, the first one was not."""
    NONE = "none"
    """It ignores keys: each submit creates a new request."""


class Action(StrEnum):
    """The next step."""

    READ_AGAIN = "read again"
    """The answer says nothing about the job."""
    SUBMIT_AGAIN = "submit again"
    """The submit was certainly not accepted; waiting may help."""
    UNKNOWN = "unknown"
    """The submit may have been accepted."""
    REPEAT = "repeat"
    """The submit may have been accepted, and the target knows its key: sending the same POST again shows which."""
    DUPLICATE = "duplicate"
    """The submit was accepted before; its request id is unknown."""
    JOB_FAILED = "job failed"
    STOP_ACCOUNT = "stop: account refused"
    STOP_TARGET = "stop: no such endpoint"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and its reason."""

    action: Action
    reason: str
    retry_after: float | None = None
    """Seconds that the service asked to wait."""
    new_attempt: bool = False
    """With JOB_FAILED: whether another attempt may succeed."""
    collectable: bool = False
    """With JOB_FAILED: not the service's own verdict, so the paid result may be collected later, free."""
    account: bool = False
    """With READ_AGAIN: the account was refused, which concerns the run, not the job."""


REPEAT_SECONDS = 3600.0
"""How long after its first POST a submit is repeated under its key, where repeated keys are rejected: a target that has
forgotten the key would accept the job a second time. Services that document it keep keys for a day."""
# Gateways and our own server send these 4xx after judging the whole request, so it cannot have been queued.
_REFUSED = frozenset({400, 405, 406, 410, 411, 413, 414, 415, 422, 431})
_ACCOUNT = frozenset({401, 402, 403})
# Infrastructure failures that fal's pages call transient: the job ended, another attempt may succeed.
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
# On a read these concern the key, the gateway or our request rate, never the job.
_SAYS_NOTHING = frozenset({401, 402, 403, 407, 408, 409, 423, 425, 429})
_CONFIRMATIONS = 12
"""Reads, each after a fresh COMPLETED, that must return a 5xx with a fal body before it is accepted: a gateway's 503
may look alike, and would hide a paid result. If every second read is such an answer, one in 4,000 jobs is given up."""
_NOT_FOUND_LIMIT = 16
"""Reads that must answer 404 before a known request id counts as lost. It is paid for: if every second read is wrong,
one in 65,000 jobs is given up."""
_MALFORMED_LIMIT = 16
_CERTAIN_LIMIT = 3
"""For a result that says it has no images, or is too large: accepted sooner than an answer that is not a result."""
_CERTAIN = frozenset({"no images", "oversize"})
_UNANSWERED_LIMIT = 6
"""Unanswered reads of the result after a status that reports a failure."""
_GATEWAY = frozenset({502, 503, 504})
_REDIRECT = "redirect"
_MISSHAPEN = frozenset({"malformed", "oversize"})
_PERMANENT = _MISSHAPEN | {"bad url", _REDIRECT}
"""Errors of a file transfer that neither a better network nor a restarted server can fix."""
_PERMANENT_LIMIT = 6
_FILES = frozenset({"initiate", "upload", "download"})
_REFUSED_FILE = frozenset({401, 402, 403, 404, 410})
_CALLS = {
    "initiate": "upload of a source image",
    "upload": "upload of a source image",
    "download": "result image",
}
"""Names of exchanges in messages; other phases use their own name."""
_OUTPUT_WORDS = {"malformed": "malformed_output", "oversize": "malformed_output", "no images": "no_images"}
_MOST_READS = max(_CONFIRMATIONS, _NOT_FOUND_LIMIT, _MALFORMED_LIMIT, _PERMANENT_LIMIT)
_WORD_LIMIT = 100
"""Maximum length of an error type, which is counted and printed."""
_LONGEST_WAIT = 3600.0
"""Longest honoured `Retry-After`, in seconds: a hostile or broken header must not stop a run for a week."""
_COUNTED_CAP = 2.0
"""Longest pause, in seconds, between reads that are counted up to a limit: about 14 s in total."""
_REFUSED_CAP = 0.5
"""The same for an account that may not upload, about 4 s in total: usually the key is wrong and a user is waiting."""
_CONFIRMED_CAP = 1.0
"""The same for an error to be confirmed, about 5 s in total: usually the job has failed, and a new attempt waits."""


def final(trouble: Trouble) -> Verdict:
    """Return the verdict that ended `reading`, where the same answer was repeated up to its limit."""
    return judge(trouble, seen=_MOST_READS)


def judge(trouble: Trouble, *, seen: int = 1, overdue: bool = False, now: float | None = None) -> Verdict:
    """Return the verdict on one failed exchange.

    Args:
        trouble: the error.
        seen: equal answers for this job so far, this one included.
        overdue: whether they have been equal for longer than any job takes.
        now: Unix seconds, for a `Retry-After` with a date; None: such a date is ignored.
    """
    if trouble.phase == "submit":
        return _judge_submit(trouble, now)
    if trouble.reply is None:
        if trouble.transport == _REDIRECT and trouble.phase == "result" and overdue:
            return Verdict(Action.JOB_FAILED, f"the result cannot be read: {trouble.detail}", collectable=True)
        if trouble.transport == "malformed" and trouble.phase == "result" and seen >= _MALFORMED_LIMIT:
            words = f"the result is not an image-to-image answer: {trouble.detail}"
            return Verdict(Action.JOB_FAILED, words, collectable=True)
        if trouble.phase == "result" and trouble.transport in _CERTAIN and seen >= _CERTAIN_LIMIT:
            return Verdict(Action.JOB_FAILED, trouble.detail, collectable=True)
        if trouble.transport in _PERMANENT and trouble.phase in _FILES and seen >= _PERMANENT_LIMIT:
            return Verdict(Action.JOB_FAILED, trouble.detail or str(trouble.transport), collectable=True)
        words = trouble.detail or trouble.transport or "no answer"
        return Verdict(Action.READ_AGAIN, f"{_CALLS.get(trouble.phase, trouble.phase)}: {words}")
    answer = f"{_CALLS.get(trouble.phase, trouble.phase)}: HTTP {trouble.reply.status}"
    if trouble.phase in {"status", "result"} and trouble.reply.status in _ACCOUNT:
        return Verdict(Action.READ_AGAIN, answer, retry_after_of(trouble.reply, now), account=True)
    if trouble.phase == "result":
        return _judge_result(trouble.reply, seen, now)
    if trouble.phase == "status" and trouble.reply.status == 404 and seen >= _NOT_FOUND_LIMIT:
        return Verdict(Action.JOB_FAILED, "the target does not know this request (any more)", collectable=True)
    if trouble.phase == "initiate" and trouble.reply.status in _ACCOUNT and seen >= _NOT_FOUND_LIMIT:
        return Verdict(Action.STOP_ACCOUNT, f"HTTP {trouble.reply.status}")
    if trouble.phase in _FILES and _is_permanent(trouble.reply, seen):
        return Verdict(Action.JOB_FAILED, f"HTTP {trouble.reply.status}", collectable=trouble.phase == "download")
    return Verdict(Action.READ_AGAIN, answer + _excess_note(trouble.reply, now), retry_after_of(trouble.reply, now))


def judge_submit(
    trouble: Trouble, keys: Idempotency = Idempotency.NONE, *, repeated: bool = False, now: float | None = None
) -> Verdict:
    """Return the verdict on one failed submit.

    Args:
        trouble: the error.
        keys: how the target handles a repeated key.
        repeated: an earlier POST of the same attempt may have been accepted. Then a refusal concerns this POST only:
            the job neither fails nor counts as not accepted.
        now: as for `judge`.
    """
    verdict = _judge_submit(trouble, now)
    if keys is Idempotency.REJECT and trouble.reply is not None and _is_duplicate(trouble.reply, repeated=repeated):
        words = f"HTTP {trouble.reply.status}: the target accepted it before; its request id is unknown"
        return Verdict(Action.DUPLICATE, words)
    if not repeated and verdict.action is not Action.UNKNOWN:
        return verdict
    if keys is not Idempotency.NONE and verdict.action in {Action.UNKNOWN, Action.SUBMIT_AGAIN}:
        return Verdict(Action.REPEAT, verdict.reason, verdict.retry_after)
    return verdict if verdict.action is Action.STOP_ACCOUNT else Verdict(Action.UNKNOWN, verdict.reason)


def _is_duplicate(reply: Reply, *, repeated: bool) -> bool:
    """Return whether a target that rejects repeated keys refuses this one as repeated.

    409 means that even for the first POST of an attempt, which a proxy may have sent twice. A plain 422 to a first POST
    concerns its input.
    """
    if reply.status == 409 or (reply.status == 422 and repeated):
        return True
    return reply.status in _REFUSED and names_idempotency_key(reply)


def _judge_submit(trouble: Trouble, now: float | None) -> Verdict:
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
        words = f"HTTP 429{_excess_note(trouble.reply, now)}"
        return Verdict(Action.SUBMIT_AGAIN, words, retry_after_of(trouble.reply, now))
    if status == 407:
        return Verdict(Action.SUBMIT_AGAIN, "HTTP 407: the proxy requires a user and a password")
    if status in _REFUSED and names_webhook(trouble.reply):  # the webhook is an option of the run, not of the job
        return Verdict(Action.STOP_TARGET, f"HTTP {status}")
    if status in _REFUSED:
        return Verdict(Action.JOB_FAILED, f"HTTP {status}")
    words = f"HTTP {status} says nothing certain about a submit{_excess_note(trouble.reply, now)}"
    return Verdict(Action.UNKNOWN, words, retry_after_of(trouble.reply, now))


def _judge_result(reply: Reply, seen: int, now: float | None) -> Verdict:
    error = error_body_of(reply)
    if reply.status in _SAYS_NOTHING or reply.status < 400:
        words = f"HTTP {reply.status}{_excess_note(reply, now)}"
        return Verdict(Action.READ_AGAIN, words, retry_after_of(reply, now))
    if reply.status == 404:
        gone = seen >= _NOT_FOUND_LIMIT
        return Verdict(Action.JOB_FAILED if gone else Action.READ_AGAIN, "HTTP 404", collectable=gone)
    if reply.status == 400 and error.type in {None, "bad_request"}:
        # "Request is still in progress": it concerns the job only if repeated, each time after COMPLETED.
        final = seen >= _NOT_FOUND_LIMIT
        return Verdict(Action.JOB_FAILED if final else Action.READ_AGAIN, "HTTP 400", collectable=final)
    if not error.is_fal:
        return Verdict(Action.READ_AGAIN, f"HTTP {reply.status} without fal's body", retry_after_of(reply, now))
    if reply.status >= 500 and seen < _CONFIRMATIONS:
        return Verdict(Action.READ_AGAIN, f"HTTP {reply.status}, to be confirmed", retry_after_of(reply, now))
    return Verdict(Action.JOB_FAILED, f"HTTP {reply.status}", new_attempt=_may_succeed(reply, error))


def judge_failed(trouble: Trouble, status: TicketStatus, *, seen: int) -> tuple[Verdict, Failed]:
    """Return what an unreadable result means after a status that reports a failure.

    One answer is enough: an error in fal's form belongs to the job; otherwise the status word is the reason.

    Args:
        trouble: error of the read of the result.
        status: its `failed` is set.
        seen: reads of this result so far, this one included.
    """
    reply = trouble.reply
    if _is_unanswered(trouble) and seen < _UNANSWERED_LIMIT:
        return Verdict(Action.READ_AGAIN, judge(trouble).reason), _failure_by_word(status, trouble)
    if reply is not None:
        verdict = judge(trouble, seen=_MOST_READS)
        error = error_body_of(reply)
        if error.is_fal and verdict.action is Action.JOB_FAILED and not _is_not_there(reply, error):
            return verdict, failure_of(trouble, verdict)
    return Verdict(Action.JOB_FAILED, f"status {status.word}"), _failure_by_word(status, trouble)


def _is_unanswered(trouble: Trouble) -> bool:
    """Return whether the read says nothing about the request: no answer, or one about network, key or request rate."""
    if trouble.reply is None:
        return trouble.transport not in _PERMANENT
    status = trouble.reply.status
    return status in _SAYS_NOTHING or (status in _GATEWAY and not error_body_of(trouble.reply).is_fal)


def _is_not_there(reply: Reply, error: ErrorBody) -> bool:
    """Return whether an answer says only that there is no result, not why."""
    return reply.status == 404 or (reply.status == 400 and error.type in {None, "bad_request"})


def _failure_by_word(status: TicketStatus, trouble: Trouble) -> Failed:
    """Return the row's error where only the status reports a failure."""
    word = _printable(status.word)
    reported, billable = trouble.detail or str(trouble.transport), None
    if trouble.reply is not None:
        error = error_body_of(trouble.reply)
        reported = f"HTTP {trouble.reply.status}" + (f", {error.message}" if error.is_fal and error.message else "")
        billable = _amount(trouble.reply.headers.get("x-fal-billable-units", ""))
    why = f": {status.error}" if status.error else ""
    kind = _printable(status.error_type or "") or re.sub(r"\W+", "_", word.lower()).strip("_")
    return Failed(kind[:_WORD_LIMIT], _printable(f"status {word}{why} (result: {reported})"), billable)


def concerns_request(trouble: Trouble) -> bool:
    """Return whether a status read that has failed this way for too long concerns the request; then its result decides.

    It does not if nothing answers, if a gateway answers, or if the answer concerns the key or the request rate: these
    errors are temporary.
    """
    if trouble.reply is None:
        return trouble.transport == _REDIRECT
    return trouble.reply.status < 500 and trouble.reply.status not in _SAYS_NOTHING


def _may_succeed(reply: Reply, error: ErrorBody) -> bool:
    if reply.headers.get("x-fal-request-timeout-type") == "user" or reply.status == 499:
        return False
    if error.needs_retry is not None:
        return error.needs_retry
    return reply.status >= 500 and error.type in _TRANSIENT_TYPES


def _is_permanent(reply: Reply, seen: int) -> bool:
    """Return whether an upload is refused for good, or a file is gone; some storages answer 403 for a missing file."""
    if reply.status in _REFUSED_FILE:
        return seen >= _NOT_FOUND_LIMIT
    return 400 <= reply.status < 500 and reply.status not in _SAYS_NOTHING


def failure_of(trouble: Trouble, verdict: Verdict) -> Failed:
    """Return the row's error, in the service's own words where it has any."""
    if trouble.reply is None:
        word = trouble.transport or "no_answer"
        if trouble.phase == "result":
            word = _OUTPUT_WORDS.get(word, word)
        return Failed(word, trouble.detail or verdict.reason)
    error = error_body_of(trouble.reply)
    billable = _amount(trouble.reply.headers.get("x-fal-billable-units", ""))
    if billable is None and trouble.reply.status >= 500:
        billable = 0.0  # fal never charges for them
    word = _printable(error.type or "")[:_WORD_LIMIT] or f"http_{trouble.reply.status}"
    return Failed(word, _printable(error.message) or verdict.reason, billable)


def _printable(text: str) -> str:
    """Replace unprintable characters by spaces, so that a service's text cannot move a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _amount(text: str) -> float | None:
    """Return a number >= 0, None for anything else; NaN would spoil every later sum."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def retry_after_of(reply: Reply, now: float | None = None) -> float | None:
    """Return the `Retry-After` in seconds, at most an hour; 0 for a date in the past, None without a valid header.

    `now` in Unix seconds is needed for a date in one of the three forms of RFC 9110; without it a date is ignored. A
    negative number and any other text are ignored, too. (fal does not document this header.)
    """
    seconds = _asked_wait(reply, now)
    return None if seconds is None else min(seconds, _LONGEST_WAIT)


def _asked_wait(reply: Reply, now: float | None) -> float | None:
    text = reply.headers.get("retry-after", "").strip()
    try:
        seconds = float("" if "_" in text else text)
    except ValueError:
        return _seconds_until(text, now)
    return seconds if seconds >= 0 else None


def _seconds_until(text: str, now: float | None) -> float | None:
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):  # depends on the malformed date
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)  # the oldest form names no zone
    return None if now is None else max(0.0, at.timestamp() - now)


def _excess_note(reply: Reply, now: float | None) -> str:
    """Return a note for a message if the requested wait exceeds the limit, else an empty text."""
    seconds = _asked_wait(reply, now)
    if seconds is None or seconds <= _LONGEST_WAIT:
        return ""
    return f", asks to wait {seconds:,.0f} s (limited to {_LONGEST_WAIT:,.0f} s)"


def backoff(tries: int, rng: Random, *, base: float = 0.2, cap: float = 30.0) -> float:
    """Return full jitter: uniform in [0, min(cap, base * 2^(tries-1))] seconds, for tries >= 1.

    The whole delay is random, so that hundreds of synchronized requests do not return synchronized.
    """
    return rng.uniform(0.0, min(cap, base * 2.0 ** min(tries - 1, 30)))


def pause_after(trouble: Trouble, tries: int, rng: Random) -> float:
    """Return the seconds until the next read: `backoff`, with a lower cap where a limited number of reads is made."""
    kind = kind_of(trouble)
    reply = trouble.reply
    if trouble.phase == "result" and reply is not None and reply.status >= 500 and error_body_of(reply).is_fal:
        return backoff(tries, rng, cap=_CONFIRMED_CAP)
    if trouble.phase == "initiate" and reply is not None and reply.status in _ACCOUNT:
        return backoff(tries, rng, cap=_REFUSED_CAP)
    is_refused_file = trouble.phase in _FILES and reply is not None and reply.status in _REFUSED_FILE
    is_odd_result = trouble.phase == "result" and kind in {"400", "malformed", "no images", "oversize"}
    counted = kind == "404" or is_refused_file or is_odd_result
    return backoff(tries, rng, cap=_COUNTED_CAP) if counted else backoff(tries, rng)


def kind_of(trouble: Trouble) -> str:
    """Return the kind of an error; errors of one kind count as equal."""
    return trouble.transport or (f"{trouble.reply.status}" if trouble.reply else "")
