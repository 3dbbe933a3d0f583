"""Verdicts on answers: one line per case, decided by status and type and never by text."""

from __future__ import annotations

from random import Random

import anyio
import orjson
import pytest
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tenacity.stop import stop_after_attempt

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.run.retrying import reading
from batch.run.verdicts import (
    Action,
    Idempotency,
    Verdict,
    backoff,
    concerns_request,
    failure_of,
    final,
    judge,
    judge_failed,
    judge_submit,
    kind_of,
    retry_after_of,
)
from batch.types import Failed, QueueState, TicketStatus

A = Action
MODEL_ERROR = orjson.dumps({"detail": [{"loc": ["body", "image_url"], "msg": "cannot be read", "type": "image_load_error"}]})  # fmt: skip # noqa: E501
NO_WEBHOOK = orjson.dumps({"detail": [{"loc": ["query", "fal_webhook"], "msg": "not allowed", "type": "url_error"}]})
GATEWAY = b"<html><h1>502 Bad Gateway</h1></html>"


def request_error(word: str) -> bytes:
    return orjson.dumps({"detail": "it failed", "error_type": word})


def answered(phase: str, status: int, body: bytes = b'{"detail": "no"}', **headers: str) -> Trouble:
    return Trouble(phase, reply=Reply(status, body, {k.replace("_", "-"): v for k, v in headers.items()}))


# --- the table: each line of "classification a runner needs" ----------------------------------------------

UNSENT = ["connect", "dns", "tls", "connect timeout", "descriptors", "proxy"]
SENT = ["reset", "timeout", "disconnected", "broken body", "bad answer", "malformed", "oversize"]
TABLE = [
    # submit: no byte was sent: certainly not accepted
    *[(Trouble("submit", word, sent=False), 1, A.SUBMIT_AGAIN) for word in UNSENT],
    # submit: a complete refusal: not accepted, and not sent again
    *[(answered("submit", status), 1, A.JOB_FAILED) for status in (400, 413, 415, 422)],
    (answered("submit", 422, MODEL_ERROR), 1, A.JOB_FAILED),
    *[(answered("submit", status), 1, A.STOP_ACCOUNT) for status in (401, 402, 403)],
    (answered("submit", 404), 1, A.STOP_TARGET),
    (answered("submit", 422, NO_WEBHOOK), 1, A.STOP_TARGET),
    # submit: 429, or a proxy's 407: not accepted, wait
    *[(answered("submit", status), 1, A.SUBMIT_AGAIN) for status in (407, 429)],
    # submit: anything else after a byte was sent is ambiguous
    *[(Trouble("submit", word), 1, A.UNKNOWN) for word in SENT],
    *[(answered("submit", status), 1, A.UNKNOWN) for status in (301, 302, 307, 408, 409, 418, 499)],
    *[(answered("submit", status, GATEWAY), 1, A.UNKNOWN) for status in (500, 502, 503, 504, 520)],
    *[(answered("submit", status, request_error("internal_error")), 1, A.UNKNOWN) for status in (500, 503, 504)],
    # status and result: says nothing about the job
    *[(Trouble(phase, word, sent=s), 1, A.READ_AGAIN)
      for phase in ("status", "result", "initiate", "upload", "download")
      for word, s in [*((w, False) for w in UNSENT), *((w, True) for w in SENT)]],
    *[(answered(phase, status), 9, A.READ_AGAIN)
      for phase in ("status", "result") for status in (401, 403, 408, 409, 429)],
    *[(answered(phase, status, GATEWAY), 9, A.READ_AGAIN)
      for phase in ("status", "result") for status in (500, 502, 503, 504)],
    *[(answered("status", status, request_error("internal_error")), 9, A.READ_AGAIN) for status in (500, 503)],
    # result: the job's own failure; a 5xx is accepted after twelve reads
    *[(answered("result", status, MODEL_ERROR), 1, A.JOB_FAILED) for status in (422, 406, 415)],
    *[(answered("result", status, request_error("runner_server_error")), seen, action)
      for status in (500, 503, 504) for seen, action in ((11, A.READ_AGAIN), (12, A.JOB_FAILED))],
    (answered("result", 503, GATEWAY, x_fal_error_type="runner_disconnected"), 12, A.JOB_FAILED),
    (answered("result", 500, MODEL_ERROR), 12, A.JOB_FAILED),
    # result: still in progress, although the status said otherwise
    (answered("result", 400, b'{"detail": "Request is still in progress"}'), 15, A.READ_AGAIN),
    (answered("result", 400, b'{"detail": "Request is still in progress"}'), 16, A.JOB_FAILED),
    # an unknown request is suspicious: accepted after several reads
    *[(answered(phase, 404, b'{"status": "NOT_FOUND"}'), seen, action)
      for phase in ("status", "result") for seen, action in ((15, A.READ_AGAIN), (16, A.JOB_FAILED))],
    # a result of another shape
    (Trouble("result", "malformed"), 15, A.READ_AGAIN),
    (Trouble("result", "malformed"), 16, A.JOB_FAILED),
    (Trouble("status", "malformed"), 99, A.READ_AGAIN),
    # a redirect that is not followed: never by the number of reads
    *[(Trouble(phase, "redirect"), 99, A.READ_AGAIN) for phase in ("status", "result")],
    # files
    *[(answered(phase, 413), 1, A.JOB_FAILED) for phase in ("initiate", "upload")],
    *[(answered(phase, status), seen, action)
      for phase in ("upload", "download") for status in (401, 403)
      for seen, action in ((15, A.READ_AGAIN), (16, A.JOB_FAILED))],
    *[(answered("initiate", status), seen, action)
      for status in (401, 402, 403) for seen, action in ((15, A.READ_AGAIN), (16, A.STOP_ACCOUNT))],
    (answered("upload", 500), 9, A.READ_AGAIN),
    (answered("upload", 429), 9, A.READ_AGAIN),
    (answered("download", 404), 15, A.READ_AGAIN),
    (answered("download", 404), 16, A.JOB_FAILED),
    (answered("download", 410), 16, A.JOB_FAILED),
    (answered("download", 503), 99, A.READ_AGAIN),
]  # fmt: skip


@pytest.mark.parametrize(("trouble", "seen", "action"), TABLE, ids=str)
def test_a_trouble_means(trouble, seen, action):
    """Each line of the table."""
    verdict = judge(trouble, seen=seen)
    assert verdict.action is action
    assert verdict.reason


@pytest.mark.parametrize(("trouble", "seen", "action"), TABLE, ids=str)
@pytest.mark.parametrize("words", ["", "retry", "COMPLETED", "Request is still in progress", "not found \u0000 \ud7ff"])
def test_no_decision_looks_at_the_text_of_a_message(trouble, seen, action, words):
    """Statuses, types and headers decide; texts may change without notice."""
    reply = trouble.reply
    if reply is not None:
        reply = Reply(reply.status, _worded(reply.body, words), reply.headers)
    changed = Trouble(trouble.phase, trouble.transport, reply=reply, sent=trouble.sent, detail=words)
    as_it_was, otherwise = judge(trouble, seen=seen), judge(changed, seen=seen)
    assert (otherwise.action, otherwise.new_attempt) == (as_it_was.action, as_it_was.new_attempt)


def _worded(body, words):
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if isinstance(said, dict) and isinstance(said.get("detail"), str):
        said["detail"] = words
    elif isinstance(said, dict) and isinstance(said.get("detail"), list):
        for entry in said["detail"]:
            entry["msg"] = words
    return orjson.dumps(said)


def test_a_result_that_is_redirected_for_longer_than_any_job_takes_is_given_up():
    """The message has the destination; a status alone never fails a job, and no other error depends on time."""
    sentence = "HTTP 302 redirects to https://evil.example:443, ..."
    trouble = Trouble("result", "redirect", detail=sentence)
    verdict = judge(trouble, overdue=True)
    assert verdict.action is A.JOB_FAILED
    assert failure_of(trouble, verdict) == Failed("redirect", sentence)
    others = [Trouble("status", "redirect"), Trouble("result", "timeout"), Trouble("result", "malformed")]
    others += [answered("result", 502, GATEWAY), answered("result", 401), answered("status", 404)]
    assert [judge(other, overdue=True).action for other in others] == [A.READ_AGAIN] * len(others)


# --- after a status that reports a failure ----------------------------------------------------------------

SAID = TicketStatus(QueueState.COMPLETED, word="FAILED", failed=True)
OWN = "the service's own error"
BY_WORD = "the status word"
AGAIN = "read again"
AFTER_FAILED = [
    # an error in fal's form belongs to the job, even if it would need confirmation after COMPLETED
    (answered("result", 422, MODEL_ERROR), 1, OWN),
    *[(answered("result", status, request_error("runner_server_error")), 1, OWN) for status in (500, 502, 503, 504)],
    (answered("result", 500, b'{"detail": "it broke"}'), 1, OWN),
    (answered("result", 499, request_error("client_cancelled")), 1, OWN),
    (answered("result", 400, request_error("bad_image")), 1, OWN),
    (answered("result", 500, GATEWAY, x_fal_error_type="runner_disconnected"), 1, OWN),
    # there is no result, and no reason
    *[(answered("result", 404, body), 1, BY_WORD) for body in (b"", b"<html>", b'{"status": "NOT_FOUND"}')],
    (answered("result", 400, b'{"detail": "Request is still in progress"}'), 1, BY_WORD),
    # an answer of another form
    *[(answered("result", status, GATEWAY), 1, BY_WORD) for status in (400, 405, 410, 418, 422, 500, 520)],
    *[(Trouble("result", word), 1, BY_WORD) for word in ("malformed", "oversize", "redirect")],
    # no answer, or one about the network, the key or the request rate
    *[(Trouble("result", word, sent=sent), seen, meaning)
      for word, sent in [*((w, False) for w in UNSENT), ("reset", True), ("timeout", True), ("broken body", True)]
      for seen, meaning in ((1, AGAIN), (5, AGAIN), (6, BY_WORD))],
    *[(answered("result", status, GATEWAY), seen, meaning)
      for status in (401, 403, 408, 429, 502, 503, 504) for seen, meaning in ((5, AGAIN), (6, BY_WORD))],
]  # fmt: skip


@pytest.mark.parametrize(("trouble", "seen", "meaning"), AFTER_FAILED, ids=str)
def test_after_a_status_that_says_failed_one_answer_is_believed(trouble, seen, meaning):
    """An error in fal's form is that error; anything else is the status word. No answer: read again, a few times."""
    verdict, failure = judge_failed(trouble, SAID, seen=seen)
    assert verdict.reason
    assert verdict.action is (A.READ_AGAIN if meaning == AGAIN else A.JOB_FAILED)
    if meaning == OWN:
        assert failure == failure_of(trouble, verdict)
        assert verdict.new_attempt is judge(trouble, seen=99).new_attempt
    if meaning == BY_WORD:
        assert (failure.error_type, verdict.new_attempt) == ("failed", False)
        assert failure.message.startswith("status FAILED (result: ")


@pytest.mark.parametrize(
    ("status", "error_type", "message"),
    [
        ({"word": "Timed Out"}, "timed_out", "status Timed Out (result: HTTP 404)"),
        ({"word": "CANCELLED", "error": "by user"}, "cancelled", "status CANCELLED: by user (result: HTTP 404)"),
        ({"word": "ERROR", "error_type": "oom"}, "oom", "status ERROR (result: HTTP 404)"),
        ({"word": "FAILED\x1b[2J", "error": "a\nb"}, "failed_2j", "status FAILED [2J: a b (result: HTTP 404)"),
        ({"word": "FAILED " * 14, "error_type": "x" * 500}, "x" * 100, None),
    ],
)
def test_a_failure_by_status_word_keeps_what_the_status_said(status, error_type, message):
    """The error type is the service's, else the word in lower case; the message has its texts in printable form."""
    said = TicketStatus(QueueState.COMPLETED, failed=True, **status)
    _, failure = judge_failed(answered("result", 404, b""), said, seen=1)
    assert (failure.error_type, failure.billable_units) == (error_type, None)
    assert failure.message == message or message is None
    assert failure.message.isprintable()


def test_a_failure_by_status_word_costs_what_the_service_says():
    """And has its message, if it has fal's form."""
    trouble = answered("result", 404, b'{"detail": "no such result"}', x_fal_billable_units="0")
    _, failure = judge_failed(trouble, SAID, seen=1)
    assert (failure.message, failure.billable_units) == ("status FAILED (result: HTTP 404, no such result)", 0.0)


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (Trouble("status", "redirect"), True),
        *[(answered("status", status), True) for status in (400, 404, 405, 410, 422)],
        *[(answered("status", status), False) for status in (401, 403, 408, 425, 429, 500, 502, 503)],
        *[(Trouble("status", word), False) for word in ("timeout", "reset", "malformed", "oversize", "connect")],
    ],
    ids=str,
)
def test_a_status_that_cannot_be_read_for_long_is_about_the_request_or_the_service(trouble, expected):
    """An outage of a day fails no job; a refusal of this one request lets its result decide."""
    assert concerns_request(trouble) is expected


@given(st.integers(300, 599), st.binary(max_size=40), st.booleans())
def test_a_submit_is_sent_again_only_where_nothing_was_accepted(status, body, with_type):
    """Only a 429 allows another submit; the text decides nothing."""
    headers = {"x-fal-error-type": "internal_error"} if with_type else {}
    verdict = judge(Trouble("submit", reply=Reply(status, body, headers)))
    assert (verdict.action is A.SUBMIT_AGAIN) is (status in {407, 429})
    assert verdict.action is judge(Trouble("submit", reply=Reply(status))).action


@given(st.sampled_from(["status", "result"]), st.integers(500, 599), st.binary(max_size=40), st.integers(1, 50))
def test_a_gateways_page_never_fails_a_job(phase, status, body, seen):
    """Without fal's own shape a 5xx says nothing about the job, however often it is seen."""
    assert judge(Trouble(phase, reply=Reply(status, b"<" + body)), seen=seen).action is A.READ_AGAIN


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(503, request_error("runner_disconnected")), True),
        (Reply(500, request_error("internal_error")), True),
        (Reply(500, request_error("a_word_of_tomorrow")), False),
        (Reply(422, MODEL_ERROR), False),
        (Reply(422, MODEL_ERROR, {"x-fal-needs-retry": "true"}), True),
        (Reply(422, MODEL_ERROR, {"x-fal-retryable": "1"}), True),
        (Reply(503, request_error("runner_disconnected"), {"x-fal-needs-retry": "false"}), False),
        (Reply(504, request_error("request_timeout"), {"x-fal-request-timeout-type": "user"}), False),
        (Reply(499, request_error("client_cancelled"), {"x-fal-needs-retry": "true"}), False),
    ],
)
def test_another_attempt_is_made_where_it_may_go_better(reply, expected):
    """The service's own flag first, then known transient errors; never after a cancel or our own timeout."""
    verdict = judge(Trouble("result", reply=reply), seen=12)
    assert verdict.action is A.JOB_FAILED
    assert verdict.new_attempt is expected


# --- a submit whose key the target may have seen ----------------------------------------------------------

I = Idempotency  # noqa: E741
USED = orjson.dumps({"detail": [{"loc": ["header", "idempotency-key"], "msg": "used", "type": "value_error"}]})
NOT_SENT, LOST = Trouble("submit", "connect", sent=False), Trouble("submit", "reset")
HELD = A.UNKNOWN
REPEATS = [
    # trouble, then the verdict on a repeat if keys are replayed, rejected, ignored
    (NOT_SENT, A.REPEAT, A.REPEAT, HELD),
    (LOST, A.REPEAT, A.REPEAT, HELD),
    (answered("submit", 429, retry_after="7"), A.REPEAT, A.REPEAT, HELD),
    *[(answered("submit", status), A.REPEAT, A.REPEAT, HELD) for status in (302, 408, 425, 500, 502, 503, 504)],
    (answered("submit", 409), A.REPEAT, A.DUPLICATE, HELD),
    (answered("submit", 409, request_error("in_progress")), A.REPEAT, A.DUPLICATE, HELD),
    (answered("submit", 422), HELD, A.DUPLICATE, HELD),
    (answered("submit", 422, USED), HELD, A.DUPLICATE, HELD),
    (answered("submit", 400, USED), HELD, A.DUPLICATE, HELD),
    *[(answered("submit", status), HELD, HELD, HELD) for status in (400, 404, 413, 415)],
    (answered("submit", 422, NO_WEBHOOK), HELD, A.DUPLICATE, HELD),
    *[(answered("submit", status), A.STOP_ACCOUNT, A.STOP_ACCOUNT, A.STOP_ACCOUNT) for status in (401, 402, 403)],
]
FIRSTS = [
    # the same for the first POST of an attempt
    (NOT_SENT, A.SUBMIT_AGAIN, A.SUBMIT_AGAIN, A.SUBMIT_AGAIN),
    (LOST, A.REPEAT, A.REPEAT, A.UNKNOWN),
    (answered("submit", 429), A.SUBMIT_AGAIN, A.SUBMIT_AGAIN, A.SUBMIT_AGAIN),
    *[(answered("submit", status), A.REPEAT, A.REPEAT, A.UNKNOWN) for status in (302, 408, 500, 502, 503, 504)],
    (answered("submit", 409), A.REPEAT, A.DUPLICATE, A.UNKNOWN),
    (answered("submit", 422, USED), A.JOB_FAILED, A.DUPLICATE, A.JOB_FAILED),
    (answered("submit", 400, USED), A.JOB_FAILED, A.DUPLICATE, A.JOB_FAILED),
    *[(answered("submit", status), A.JOB_FAILED, A.JOB_FAILED, A.JOB_FAILED) for status in (400, 413, 415, 422)],
    (answered("submit", 422, NO_WEBHOOK), A.STOP_TARGET, A.STOP_TARGET, A.STOP_TARGET),
    (answered("submit", 404), A.STOP_TARGET, A.STOP_TARGET, A.STOP_TARGET),
    *[(answered("submit", status), A.STOP_ACCOUNT, A.STOP_ACCOUNT, A.STOP_ACCOUNT) for status in (401, 402, 403)],
]


@pytest.mark.parametrize(
    ("trouble", "replayed", "rejected", "ignored", "repeated"),
    [(*row, True) for row in REPEATS] + [(*row, False) for row in FIRSTS],
    ids=str,
)
def test_a_failed_submit_means_by_what_becomes_of_a_repeated_key(trouble, replayed, rejected, ignored, repeated):
    """Each row; if keys are ignored, a first POST is judged as by `judge`."""
    for keys, action in ((I.REPLAY, replayed), (I.REJECT, rejected), (I.NONE, ignored)):
        verdict = judge_submit(trouble, keys, repeated=repeated)
        assert verdict.action is action, keys
        assert verdict.reason
    if not repeated:
        assert judge_submit(trouble) == judge(trouble)


@given(st.sampled_from(I), st.integers(300, 599), st.booleans(), st.binary(max_size=20))
def test_a_job_that_may_be_accepted_never_fails_and_never_counts_as_unsent(keys, status, named, body):
    """Whatever the answer to a repeat: only a success, or the listing, ends the doubt."""
    trouble = answered("submit", status, USED if named else body)
    assert judge_submit(trouble, keys, repeated=True).action in {A.REPEAT, A.DUPLICATE, A.UNKNOWN, A.STOP_ACCOUNT}


@given(st.integers(300, 599), st.booleans(), st.binary(max_size=20))
def test_a_submit_is_never_repeated_where_keys_are_ignored(status, repeated, body):
    """Each repeat would be another request, and another charge."""
    assert judge_submit(answered("submit", status, body), I.NONE, repeated=repeated).action is not A.REPEAT
    assert judge_submit(LOST, I.NONE, repeated=repeated).action is A.UNKNOWN


def test_a_repeat_waits_for_what_the_service_asks():
    """The verdict keeps the `Retry-After` of a 429."""
    assert judge_submit(answered("submit", 429, retry_after="7"), I.REJECT, repeated=True).retry_after == 7.0


# --- the error of the row ---------------------------------------------------------------------------------


def test_a_failure_speaks_the_services_own_words():
    """The error type and the location, for the results."""
    failure = failure_of(answered("result", 422, MODEL_ERROR, x_fal_billable_units="0.5"), Verdict(A.JOB_FAILED, "x"))
    assert failure.error_type == "image_load_error"
    assert failure.message == "image_url: cannot be read"
    assert failure.billable_units == 0.5


@pytest.mark.parametrize(("status", "header", "units"), [(500, "", 0.0), (503, "1", 1.0), (422, "", None), (422, "no number", None), (422, "nan", None), (422, "inf", None), (422, "-1", None)])  # fmt: skip # noqa: E501
def test_an_error_of_the_server_is_free_unless_it_says_otherwise(status, header, units):
    """Fal never charges for 5xx; for a 422 without a header the charge is unknown."""
    trouble = answered("result", status, request_error("internal_error"), x_fal_billable_units=header)
    assert failure_of(trouble, judge(trouble, seen=12)).billable_units == units


def test_a_failure_without_words_has_its_status():
    """There is always something to search for."""
    trouble = answered("upload", 413, b"")
    failure = failure_of(trouble, judge(trouble))
    assert (failure.error_type, failure.message) == ("http_413", "HTTP 413")


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("5", 5.0), ("0", 0.0), ("2.5", 2.5), ("9999999", 3600.0), ("-1", None), ("", None),
     ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("nan", None), ("inf", 3600.0)],
)  # fmt: skip
def test_retry_after_is_bounded_seconds_or_nothing(said, seconds):
    """A hostile or broken header does not stop a run for a week."""
    assert retry_after_of(Reply(429, headers={"retry-after": said})) == seconds


NOW = 1_792_567_680.0
"""Wed, 21 Oct 2026 07:28:00 GMT."""


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wednesday, 21-Oct-26 07:28:30 GMT", 30.0),
        ("Wed Oct 21 07:28:30 2026", 30.0),
        ("  Wed, 21 Oct 2026 07:28:30 GMT ", 30.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Thu, 21 Oct 2027 07:28:00 GMT", 3600.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
        ("Wed, 31 Feb 2026 07:28:00 GMT", None),
        ("2026-10-21T07:28:30Z", None),
        ("30 s", None),
        ("1_000", None),
        ("-inf", None),
        ("1e999", 3600.0),
        ("31536000", 3600.0),
        ("+5", 5.0),
        ("5, 6", None),
    ],
)
def test_retry_after_may_be_a_date_in_each_form_of_the_standard(said, seconds):
    """Relative to the given time; the past means no wait, a year is cut to an hour, anything else is ignored."""
    assert retry_after_of(Reply(429, headers={"retry-after": said}), NOW) == seconds


@given(st.text(max_size=40))
def test_no_retry_after_breaks_anything(said):
    """For any header value."""
    seconds = retry_after_of(Reply(429, headers={"retry-after": said}), NOW)
    assert seconds is None or 0.0 <= seconds <= 3600.0


@pytest.mark.parametrize("phase", ["submit", "status", "result", "download"])
def test_a_wish_that_is_cut_is_in_the_reason(phase):
    """The log explains why the service is asked again sooner than requested."""
    verdict = judge(answered(phase, 429, retry_after="Thu, 21 Oct 2027 07:28:00 GMT"), now=NOW)
    assert verdict.retry_after == 3600.0
    assert "asks to wait 31,536,000 s (limited to 3,600 s)" in verdict.reason
    assert "asks" not in judge(answered(phase, 429, retry_after="60"), now=NOW).reason


def test_a_503_on_a_submit_keeps_its_wish():
    """The outcome stays unknown."""
    verdict = judge(answered("submit", 503, retry_after="60"))
    assert (verdict.action, verdict.retry_after) == (A.UNKNOWN, 60.0)


def test_equal_faults_are_counted_together():
    """By kind, not by text."""
    assert kind_of(answered("result", 503, b"a")) == kind_of(answered("result", 503, b"b")) == "503"
    assert kind_of(Trouble("status", "timeout")) == "timeout"


# --- waiting ----------------------------------------------------------------------------------------------


@given(st.integers(1, 1024), st.integers(0, 2**32))
def test_backoff_is_within_its_bounds_for_any_attempt(tries, seed):
    """From 0 to the cap, also at attempt 1,024, where 2^1023 no longer fits a float product."""
    assert 0.0 <= backoff(tries, Random(seed)) <= min(30.0, 0.2 * 2.0 ** min(tries - 1, 30))


def test_backoff_is_drawn_over_the_whole_range():
    """Full jitter: neither bunched at the cap nor at zero."""
    rng = Random(1)
    drawn = sorted(backoff(20, rng) for _ in range(1000))
    assert drawn[100] < 6
    assert drawn[900] > 24


class Flaky:
    """Fails with each of the given troubles, then answers."""

    def __init__(self, *troubles: Trouble) -> None:
        self.left, self.calls = list(troubles), 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.left:
            raise CallFailed(self.left.pop(0))
        return "answer"


def in_virtual_time(main):
    """Run on Trio with a clock that skips every sleep; return the result and the elapsed seconds."""

    async def timed():
        began = anyio.current_time()
        return await main(), anyio.current_time() - began

    clock = trio.testing.MockClock(autojump_threshold=0)
    return anyio.run(timed, backend="trio", backend_options={"clock": clock})


def test_a_read_that_works_is_done_once():
    """Without retry overhead."""
    call = Flaky()
    assert in_virtual_time(lambda: reading(call, Random(1))) == ("answer", 0.0)
    assert call.calls == 1


@pytest.mark.parametrize("times", [1, 2, 3, 50])
def test_a_read_goes_on_until_it_is_answered(times):
    """Each error is reported to `notice`; pauses stay below the cap."""
    call, noticed = Flaky(*[answered("status", 503, GATEWAY)] * times), []
    answer, seconds = in_virtual_time(lambda: reading(call, Random(1), notice=noticed.append))
    assert answer == "answer"
    assert call.calls == times + 1
    assert [verdict.action for verdict in noticed] == [A.READ_AGAIN] * times
    assert 0 < seconds <= 30 * times


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_waits_for_what_the_service_asks(times):
    """`Retry-After: 7` is a lower bound for every pause, including the first."""
    call = Flaky(*[answered("status", 429, retry_after="7")] * times)
    _, seconds = in_virtual_time(lambda: reading(call, Random(1)))
    assert seconds >= 7 * times


def test_a_read_waits_until_the_date_that_the_service_names():
    """By the caller's clock."""
    call = Flaky(answered("status", 503, GATEWAY, retry_after="Thu, 01 Jan 1970 00:05:00 GMT"))
    _, seconds = in_virtual_time(lambda: reading(call, Random(1), now=anyio.current_time))
    assert 300 <= seconds <= 301


def test_a_read_ends_with_the_fault_that_is_final():
    """An unknown request: sixteen reads in at most half a minute, then it is accepted."""
    call = Flaky(*[answered("status", 404)] * 50)

    async def main():
        with pytest.raises(CallFailed) as caught:
            await reading(call, Random(1))
        return caught.value.trouble.reply.status

    status, seconds = in_virtual_time(main)
    assert status == 404
    assert seconds <= 30.0
    assert call.calls == 16


def test_an_account_that_may_not_upload_is_known_soon():
    """Usually the key is wrong: sixteen tries within a few seconds, then the verdict counts."""
    call = Flaky(*[answered("initiate", 401)] * 50)

    async def main():
        with pytest.raises(CallFailed) as caught:
            await reading(call, Random(1))
        return final(caught.value.trouble)

    verdict, seconds = in_virtual_time(main)
    assert (verdict.action, call.calls) == (A.STOP_ACCOUNT, 16)
    assert seconds <= 8.0


def test_a_final_fault_is_raised_at_once():
    """A refused upload is not repeated."""
    call = Flaky(answered("upload", 413))

    async def main():
        with pytest.raises(CallFailed):
            await reading(call, Random(1))

    assert in_virtual_time(main)[1] == 0.0
    assert call.calls == 1


def test_a_read_can_be_bounded():
    """`stop` is tenacity's; the last error is raised."""
    call = Flaky(*[answered("status", 503, GATEWAY)] * 50)

    async def main():
        with pytest.raises(CallFailed):
            await reading(call, Random(1), stop=stop_after_attempt(3))

    in_virtual_time(main)
    assert call.calls == 4


def test_a_defect_is_no_fault_of_the_network():
    """Any other exception than `CallFailed` is raised at once."""

    async def broken():
        raise KeyError("ours")

    async def main():
        with pytest.raises(KeyError):
            await reading(broken, Random(1))

    assert in_virtual_time(main)[1] == 0.0


def test_a_cancelled_read_stops():
    """Cancelling the scope ends an endless read."""

    async def main():
        with anyio.move_on_after(100) as scope:
            await reading(Flaky(*[answered("status", 503)] * 10_000), Random(1))
        return scope.cancelled_caught

    assert in_virtual_time(main) == (True, pytest.approx(100))
