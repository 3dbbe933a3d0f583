"""The wire protocol without I/O: each role reads what the other writes."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.fal import protocol
from batch.fal.endpoint import APP_ID
from batch.fal.protocol import (
    Address,
    Call,
    CancelOutcome,
    Malformed,
    Operation,
    Origins,
    Reply,
    RequestOptions,
)
from batch.types import AppId, QueueState, RequestId, Ticket

ID = RequestId("0199c0de-0000-7000-8000-000000000001")
BASE = "http://127.0.0.1:8787"


@pytest.mark.parametrize(
    ("path", "operation", "app", "request_id"),
    [
        ("/fal-ai/flux/dev/image-to-image", Operation.SUBMIT, APP_ID, None),
        ("/fal-ai/flux/dev/image-to-image/", Operation.SUBMIT, APP_ID, None),
        (f"/fal-ai/flux/requests/{ID}", Operation.RESULT, "fal-ai/flux", ID),
        (f"/fal-ai/flux/requests/{ID}/", Operation.RESULT, "fal-ai/flux", ID),
        (f"/fal-ai/flux/requests/{ID}/response", Operation.RESULT, "fal-ai/flux", ID),
        (f"/fal-ai/flux/requests/{ID}/status", Operation.STATUS, "fal-ai/flux", ID),
        (f"/fal-ai/flux/requests/{ID}/status/", Operation.STATUS, "fal-ai/flux", ID),
        (f"/fal-ai/flux/dev/image-to-image/requests/{ID}/status", Operation.STATUS, APP_ID, ID),
        (f"/fal-ai/flux/requests/{ID}/status/stream", Operation.STREAM, "fal-ai/flux", ID),
        (f"/fal-ai/flux/requests/{ID}/cancel", Operation.CANCEL, "fal-ai/flux", ID),
        (f"/workflows/me/mine/requests/{ID}/status", Operation.STATUS, "workflows/me/mine", ID),
        ("/comfy/me/mine", Operation.SUBMIT, "comfy/me/mine", None),
    ],
)
def test_every_path_form_in_the_field_is_understood(path, operation, app, request_id):
    """Owner/alias and full id, `/response`, trailing slash, namespaces."""
    assert protocol.parse_path(path) == Address(operation, AppId(app), request_id)


@pytest.mark.parametrize(
    "path",
    ["", "/", "/flux", "/workflows/me", "//flux", f"/fal-ai/flux/requests/{ID}/logs", "/fal-ai/flux/requests//status"],
)
def test_a_path_that_is_none_of_the_queue_s_is_refused(path):
    """An incomplete app id, an unknown suffix, no request id."""
    assert protocol.parse_path(path) is None


@pytest.mark.parametrize("operation", [Operation.STATUS, Operation.STREAM, Operation.RESULT, Operation.CANCEL])
def test_a_path_that_the_client_builds_is_the_one_that_the_server_reads(operation):
    """Round trip of reads and cancels, always in the owner/alias form."""
    path = protocol.request_path(operation, APP_ID, ID)
    assert protocol.parse_path(path) == Address(operation, AppId("fal-ai/flux"), ID)


def test_an_accepted_reply_has_all_eight_fields_and_is_a_ticket():
    """Python's client subscripts the URLs, JavaScript's needs logs and metrics."""
    reply = protocol.accepted_reply(BASE, APP_ID, ID, 7)
    body = orjson.loads(reply.body)
    assert reply.status == 200
    assert body == {
        "status": "IN_QUEUE",
        "request_id": ID,
        "response_url": f"{BASE}/fal-ai/flux/requests/{ID}",
        "status_url": f"{BASE}/fal-ai/flux/requests/{ID}/status",
        "cancel_url": f"{BASE}/fal-ai/flux/requests/{ID}/cancel",
        "logs": None,
        "metrics": {},
        "queue_position": 7,
    }
    assert reply.headers["x-fal-request-id"] == ID
    assert protocol.read_ticket(reply) == Ticket(ID, body["status_url"], body["response_url"], body["cancel_url"])


@pytest.mark.parametrize("state", [QueueState.IN_QUEUE, QueueState.IN_PROGRESS])
def test_progress_is_202_and_reads_back(state):
    """`queue_position` while it waits, `logs` while it runs: clients subscript them."""
    line = {"message": "step 1 of 2"}
    reply = protocol.progress_reply(BASE, APP_ID, ID, state, position=3, logs=[line])
    read = protocol.read_status(reply)
    assert (reply.status, read.state) == (202, state)
    assert (read.position, read.logs) == ((3, ()) if state is QueueState.IN_QUEUE else (None, (line,)))
    assert "logs" in orjson.loads(reply.body) or state is QueueState.IN_QUEUE


def test_completed_is_200_whether_it_went_well_or_not():
    """There is no FAILED: a failure is COMPLETED with `error`."""
    well = protocol.completed_reply(BASE, APP_ID, ID, inference_time=1.5)
    badly = protocol.completed_reply(BASE, APP_ID, ID, inference_time=None, error="bad", error_type="internal_error")
    assert well.status == badly.status == 200
    assert protocol.read_status(well).inference_time == 1.5
    assert protocol.read_status(well).error is None
    assert protocol.read_status(badly).error == "bad"
    assert protocol.read_status(badly).error_type == "internal_error"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(CancelOutcome.REQUESTED, 202), (CancelOutcome.ALREADY_COMPLETED, 400), (CancelOutcome.NOT_FOUND, 404)],
)
def test_a_cancel_answers_with_its_outcome(outcome, status):
    """202, 400, 404, with the word in the body."""
    reply = protocol.cancel_reply(outcome, ID)
    assert (reply.status, orjson.loads(reply.body)) == (status, {"status": outcome.value})
    assert protocol.read_cancel(reply) is outcome


def test_a_request_error_is_read_back_with_its_type():
    """Body and header agree."""
    reply = protocol.request_error_reply(503, "runner_disconnected", "gone", ID)
    read = protocol.error_body_of(reply)
    assert (read.type, read.message, read.is_fal) == ("runner_disconnected", "gone", True)
    assert reply.headers["x-fal-error-type"] == "runner_disconnected"
    assert reply.headers["x-fal-request-id"] == ID


def test_a_model_error_is_read_back_with_its_first_type_and_all_messages():
    """`detail` is a list; the message is prefixed with the field."""
    errors = [{"loc": ["body", "strength"], "msg": "too large", "type": "less_than_equal"}, {"loc": [], "msg": "odd"}]
    read = protocol.error_body_of(protocol.model_error_reply(422, errors, ID))
    assert (read.type, read.message) == ("less_than_equal", "strength: too large; odd")


@pytest.mark.parametrize("body", [b"", b"<html>nginx</html>", b"[]", b"\xff\xfe", b'{"detail": 5}'])
def test_a_foreign_error_page_says_nothing_about_the_job(body):
    """Never raises, and does not count as fal's."""
    assert not protocol.error_body_of(Reply(502, body)).is_fal


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"request_id": 5}', b'{"request_id": "../../etc"}', b'{"request_id": ""}']
)
def test_a_submit_answer_without_a_usable_id_is_malformed(body):
    """It is then unknown whether the job was accepted, and the caller must know that."""
    with pytest.raises(Malformed):
        protocol.read_ticket(Reply(200, body))


def read_status(body: object):
    return protocol.read_status(Reply(200, orjson.dumps(body)))


FAILURE_WORDS = [
    "FAILED", "failed", "Failed", "FAIL", "FAILURE", "ERROR", "error", "ERRORED", "CANCELLED", "CANCELED", "Cancelled",
    "TIMEOUT", "TIMED_OUT", "timed out", "Timed-Out", "TimedOut", "ABORTED", "EXPIRED", "REJECTED", "TERMINATED",
    "KILLED", "CRASHED", "STOPPED", " FAILED ", "JOB_STATE_FAILED", "job failed", "EXECUTION_ERROR", "FAILED_TO_START",
    "USER_CANCELLED", "COMPLETED_WITH_ERRORS", "failed: out of memory", "Content Moderated",
]  # fmt: skip
END_WORDS = ["COMPLETED", "completed", "Complete", "SUCCEEDED", "SUCCESS", "success", "OK", "ok", "DONE", "Finished", "JOB_STATE_SUCCEEDED"]  # fmt: skip # noqa: E501
RUNNING_WORDS = ["IN_PROGRESS", "in_progress", "In Progress", "InProgress", "in-progress", "PROCESSING", "Running", "STARTED", "cancelling"]  # fmt: skip # noqa: E501
QUEUED_WORDS = ["IN_QUEUE", "in_queue", "In Queue", "queued", "PENDING", "Waiting", "SUBMITTED"]
UNKNOWN_WORDS = ["", " ", "???", "READY", "BANANA", "ERROR_RETRYING", "NOT_FAILED", "CANCEL_REQUESTED", "FAILED_QUEUE_PENDING", "état", "失敗", "7", "A" * 100_000]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("word", "state", "failed"),
    [
        *[(word, QueueState.COMPLETED, True) for word in FAILURE_WORDS],
        *[(word, QueueState.COMPLETED, False) for word in END_WORDS],
        *[(word, QueueState.IN_PROGRESS, False) for word in RUNNING_WORDS],
        *[(word, QueueState.IN_QUEUE, False) for word in QUEUED_WORDS],
        *[(word, None, False) for word in UNKNOWN_WORDS],
    ],
)
def test_a_status_word_means(word, state, failed):
    """In any case, with or without spaces; an ambiguous word is unknown, never a failure."""
    status = read_status({"status": word})
    assert (status.state, status.failed, status.word) == (state, failed, word[:100])


@pytest.mark.parametrize(
    "answer",
    [{}, {"status": None}, {"status": 5}, {"status": ["FAILED"]}, {"status": {"state": "FAILED"}}, {"status": True},
     {"state": "COMPLETED"}],
)  # fmt: skip
def test_a_status_answer_without_a_word_is_unknown(answer):
    """Missing, null or of another type: the request counts as running."""
    status = read_status(answer)
    assert (status.state, status.failed, status.word, status.error) == (None, False, "", None)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"COMPLETED", b'{"status": "COMPLETED"', b"\xff", b"[" * 200_000, b"[]", b"null"]
)
def test_a_status_answer_that_is_no_json_object_is_malformed(body):
    """It says nothing: a proxy's page, or a truncated answer."""
    with pytest.raises(Malformed):
        protocol.read_status(Reply(200, body))


@pytest.mark.parametrize("position", [None, "3", -1, 2.5, True, [], {}, 1e300])
@pytest.mark.parametrize("word", ["IN_QUEUE", "IN_PROGRESS"])
def test_a_queue_position_of_another_kind_is_none(position, word):
    """Never an error, in a status or in a submit."""
    assert read_status({"status": word, "queue_position": position}).position is None
    reply = Reply(200, orjson.dumps({"request_id": ID, "queue_position": position}))
    assert protocol.read_ticket(reply).position is None


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"error": "out of memory"}, "out of memory"),
        ({"error": {"message": "out of memory", "code": 7}}, "out of memory"),
        ({"error": None, "detail": "out of memory"}, "out of memory"),
        ({"error": "", "detail": [{"loc": ["body", "seed"], "msg": "too large"}]}, "seed: too large"),
        ({"error": 7, "detail": []}, None),
        ({"error": {"message": 7}}, None),
        ({"error": "x" * 5000}, "x" * 1000),
    ],
)
def test_a_status_keeps_what_the_service_says_of_a_failure(said, text):
    """In `error` or `detail`, in the forms in use."""
    assert read_status({"status": "FAILED", **said}).error == text


HERE = f"{BASE}/fal-ai/flux/requests/{ID}/status"


@pytest.mark.parametrize("status", sorted(protocol.REDIRECTS))
@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/v2/status", f"{BASE}/v2/status"),
        ("v2", HERE.rpartition("/")[0] + "/v2"),
        ("?again=1", f"{HERE}?again=1"),
        (f"{BASE}/v2", f"{BASE}/v2"),
        (f"{BASE.replace('http', 'HTTP')}/v2", f"{BASE}/v2"),
    ],
)
def test_a_redirect_of_a_read_leads_to_another_address_of_the_target(status, location, url):
    """The redirected request is a GET again."""
    call = protocol.redirected(Origins.of_server(BASE), Call("GET", HERE), Reply(status, b"", {"location": location}))
    assert (call.method, call.url.replace("HTTP:", "http:"), call.body) == ("GET", url, b"")


@pytest.mark.parametrize("location", ["https://rest.fal.ai/x", "https://v3.fal.media/x", "https://api.fal.ai/x", "//queue.fal.run/x"])  # fmt: skip # noqa: E501
def test_a_redirect_among_the_origins_of_fal_is_followed(location):
    """All of them belong to the target."""
    call = Call("GET", "https://queue.fal.run/fal-ai/flux/requests/1/status")
    assert protocol.redirected(protocol.FAL, call, Reply(302, b"", {"location": location})).url.endswith("/x")


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://evil.example/a?token=secret", "https://evil.example:443"),
        ("//evil.example/secret", "http://evil.example:80"),
        (BASE.replace("http:", "https:") + "/secret", "https://"),
        (BASE[:-1] + "/secret", "http://127.0.0.1:878,"),
        (BASE.replace("://", "://secret@"), "not valid"),
        (BASE.replace("://", "://secret\\@"), "not valid"),
        (f"{BASE}/a b secret", "not valid"),
        ("http://[secret", "not valid"),
        ("file:///etc/secret", "not valid"),
        ("javascript:secret", "not valid"),
        ("http://secr\udcffet.example/", "http://secr\\udcffet.example:80,"),
        ("", "without a usable Location"),
        (None, "without a usable Location"),
    ],
)
def test_a_redirect_elsewhere_is_refused_with_a_sentence(location, shown):
    """It names the host and nothing that may be secret, in characters that every terminal and file accepts."""
    headers = {} if location is None else {"location": location}
    with pytest.raises(protocol.RedirectRefused) as caught:
        protocol.redirected(Origins.of_server(BASE), Call("GET", HERE), Reply(307, b"", headers))
    sentence = str(caught.value)
    assert sentence.startswith("HTTP 307 ")
    assert shown in sentence
    assert "secret" not in sentence
    assert sentence.isascii()


def test_reads_use_returned_urls_on_the_own_origin_and_rebuild_foreign_ones():
    """After a move to another port, or with a foreign host, the known origin is used."""
    origins = Origins.of_server(BASE)
    own = Ticket(ID, f"{BASE}/custom/status")
    moved = Ticket(ID, "http://127.0.0.1:1/custom/status")
    assert protocol.ticket_call(origins, APP_ID, own, Operation.STATUS).url == f"{BASE}/custom/status"
    rebuilt = f"{BASE}/fal-ai/flux/requests/{ID}/status?logs=1"
    assert protocol.ticket_call(origins, APP_ID, moved, Operation.STATUS, logs=True).url == rebuilt


@given(st.text(max_size=80))
def test_no_path_breaks_the_parser(path):
    """Any text is a path or not; nothing raises."""
    address = protocol.parse_path(path)
    assert address is None or address.app


# --- options of a submit ----------------------------------------------------------------------------------


TAG_KEYS = st.text("abcz09._-", min_size=1, max_size=64).filter(lambda key: not key.startswith("fal."))
TAG_VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=","), min_size=1).map(
    str.strip
)
OPTIONS = st.builds(
    RequestOptions,
    start_timeout=st.none() | st.integers(1001, 10**9).map(lambda ms: ms / 1000),
    low_priority=st.booleans(),
    file_seconds=st.none() | st.integers(60, 10**9).map(float),
    tags=st.dictionaries(TAG_KEYS, TAG_VALUES.filter(bool).map(lambda text: text[:30].strip()), max_size=10),
)


@given(OPTIONS)
def test_what_the_client_asks_for_is_what_the_server_reads(options):
    """Start timeout, priority, lifetime and tags survive the way through the headers of a real submit."""
    call = protocol.submit_call(Origins.of_server(BASE), APP_ID, b"{}", "key", options=options)
    assert protocol.options_in(call.headers) == options


def test_the_headers_are_those_that_fal_documents():
    """Both names of the start timeout, a word, JSON, and comma-separated `key=value` pairs."""
    options = RequestOptions(600.0, True, 604800.0, {"run": "quick", "job": "ab12", "team": "", "note": "a=b c"})
    assert protocol.option_headers(options) == {
        "x-fal-request-start-timeout": "600",
        "x-fal-request-timeout": "600",
        "x-fal-queue-priority": "low",
        "x-fal-object-lifecycle-preference": '{"expiration_duration_seconds":604800}',
        "x-fal-tags": "run=quick,job=ab12,note=a=b c",
    }
    assert protocol.option_headers(RequestOptions()) == {"x-fal-queue-priority": "normal"}
    assert protocol.option_headers(RequestOptions(start_timeout=1e6))["x-fal-request-timeout"] == "1000000"
    assert protocol.option_headers(RequestOptions(start_timeout=2.5))["x-fal-request-timeout"] == "2.5"


@pytest.mark.parametrize(
    ("headers", "options"),
    [
        ({}, RequestOptions()),
        ({"x-fal-request-timeout": "30.0"}, RequestOptions(start_timeout=30.0)),
        ({"x-fal-request-timeout": "30", "x-fal-request-start-timeout": "7"}, RequestOptions(start_timeout=7.0)),
        ({"x-fal-request-start-timeout": "0.1"}, RequestOptions()),
        ({"x-fal-request-start-timeout": "soon"}, RequestOptions()),
        ({"x-fal-request-start-timeout": "nan"}, RequestOptions()),
        ({"x-fal-request-start-timeout": "1e400"}, RequestOptions()),
        ({"x-fal-queue-priority": " Low "}, RequestOptions(low_priority=True)),
        ({"x-fal-queue-priority": "urgent"}, RequestOptions()),
        ({"x-fal-object-lifecycle-preference": '{"expiration_duration_seconds": null}'}, RequestOptions()),
        ({"x-fal-tags": " Team = design , env=prod"}, RequestOptions(tags={"team": "design", "env": "prod"})),
        ({"x-fal-tags": "a=1,a=2"}, RequestOptions(tags={"a": "2"})),
        ({"x-fal-tags": "fal.run=x,,=y,b,a b=c,ok=1"}, RequestOptions(tags={"b": "", "ok": "1"})),
        ({"x-fal-tags": "a=\udce9,b=2"}, RequestOptions(tags={"b": "2"})),
        ({"x-fal-tags": f"a={'x' * 257},b=2"}, RequestOptions(tags={"b": "2"})),
        ({"x-fal-tags": f"{'k' * 65}=1,b=2"}, RequestOptions(tags={"b": "2"})),
        ({"x-fal-tags": ",".join(f"k{n}=v" for n in range(11))},
         RequestOptions(tags={f"k{n}": "v" for n in range(10)})),
        ({"x-fal-tags": ",".join(f"k{n}={'v' * 254}" for n in range(5))},
         RequestOptions(tags={f"k{n}": "v" * 254 for n in range(4)})),
    ],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_ignored(headers, options):
    """The request is never refused for it: fal drops the invalid tag, not the request."""
    assert protocol.options_in(headers) == options


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        (protocol.model_error_reply(422, [{"loc": ["header", "idempotency-key"], "msg": "used", "type": "x"}]), True),
        (protocol.model_error_reply(422, [{"loc": ["body"], "msg": "m", "type": "idempotency_key_reused"}]), True),
        (protocol.request_error_reply(409, "idempotency_conflict", "used"), True),
        (protocol.request_error_reply(409, "conflict", "Idempotency-Key was used"), False),
        (
            protocol.model_error_reply(422, [{"loc": ["body", "prompt"], "msg": "idempotency", "type": "missing"}]),
            False,
        ),
        (Reply(409, b"<html>"), False),
        (Reply(422, b'{"detail": "no"}'), False),
    ],
)
def test_an_answer_about_the_idempotency_key_is_known_by_its_words(reply, named):
    """By its type or its `loc`, never by its text."""
    assert protocol.names_idempotency_key(reply) is named
