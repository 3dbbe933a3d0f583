"""The contract of every journal: one suite over the SQLite file and over the journal in memory."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import orjson
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.journal.answers import unpack
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
    Uploaded,
)
from batch.journal.records import JobOutcome, KnownJob, OpenJob, RequestIdTaken
from batch.journal.states import TABLE, EventKind, IllegalTransition, State
from batch.journal.transitions import decode_images, encode_images
from batch.journal.writer import open_journal
from batch.testing.journal import MemoryJournal
from batch.types import Answer, Failed, JobKey, RequestId, StoredImage, Ticket

A, B, C = JobKey("a" * 32), JobKey("b" * 32), JobKey("c" * 32)
TICKET = Ticket(RequestId("r-1"), "http://x/status", "http://x/response", "http://x/cancel")
TICKET_B = Ticket(RequestId("r-2"))
ANSWER = Answer({"images": [{"url": "http://x/1.jpg"}], "seed": 2**62, "timings": {"inference": 1.5}}, 1.25, "preview")
IMAGE = StoredImage("http://x/1.jpg", 64, 48, "image/jpeg", "1.jpg", 9, "images/ab/abc.jpg", "abc")


@pytest.fixture
def anyio_backend():
    return "asyncio"


pytestmark = pytest.mark.anyio


@asynccontextmanager
async def opened_file(path):
    async with open_journal(path, version="1.2.3", clock=lambda: 1000.0) as journal:
        journal.outcomes = journal.file.outcomes
        yield journal


@asynccontextmanager
async def opened_memory():
    yield MemoryJournal()


@pytest.fixture(params=["file", "memory"])
async def journal(request, tmp_path):
    async with opened_file(tmp_path / "journal.db") if request.param == "file" else opened_memory() as journal:
        yield journal


def intended(key=A, at=1.0, attempt=1, body=b'{"prompt": "x"}', usd=0.03):
    return Intended(key, at, attempt, body, usd)


def ticket_of(key):
    return TICKET if key == A else TICKET_B


def as_stored(answer):
    return answer._replace(raw=orjson.dumps(answer.output))


def whole_life(key=A, at=1.0):
    return [
        intended(key, at),
        Accepted(key, at + 1, ticket_of(key)),
        Answered(key, at + 2, ANSWER, 0.04, 0.5, 2.0),
        Finished(key, at + 3, (IMAGE,), 0.25),
    ]


async def entries(journal, *states):
    return [entry async for entry in journal.entries(states)]


async def test_unheard_job_is_not_known(journal):
    """A job that was never recorded is in no answer."""
    assert await journal.find([A]) == {}
    assert journal.outcomes([A]) == {}
    assert (await journal.counts()).by_state == {}


async def test_done_job_tells_everything(journal):
    """The outcome has every field of the events."""
    for event in whole_life():
        await journal.record(event)
    assert await journal.find([B, A]) == {A: KnownJob(State.DONE, journal.session, 1)}
    assert journal.outcomes([A, B]) == {
        A: JobOutcome(
            job_key=A,
            state=State.DONE,
            attempts=1,
            request_id=TICKET.request_id,
            submitted_at=1.0,
            completed_at=3.0,
            output=orjson.dumps(ANSWER.output),
            images=encode_images([IMAGE]),
            queue_seconds=0.5,
            total_seconds=2.0,
            download_seconds=0.25,
            billable_units=1.25,
            cost_usd=0.04,
            engine="preview",
        )
    }


async def test_one_call_may_carry_a_whole_life(journal):
    """Events of one call apply in order, also to the same job."""
    await journal.record(*whole_life(A), *whole_life(B, 10.0)[:2])
    assert {key: known.state for key, known in (await journal.find([A, B])).items()} == {
        A: State.DONE,
        B: State.ACCEPTED,
    }


async def test_record_without_events_returns(journal):
    """Nothing to write is not an error."""
    await journal.record()
    assert (await journal.counts()).by_state == {}


async def test_an_entry_has_the_start_timeout_of_its_last_intent(journal):
    """A later attempt without one, or with another one, does not inherit it; a job without one has none."""
    await journal.record(Intended(A, 1.0, 1, b"{}", start_timeout=600.0), Lost(A, 2.0, "reset"))
    await journal.record(intended(B, 1.0), Lost(B, 2.0, "reset"))
    assert [entry.start_timeout for entry in await entries(journal, State.UNKNOWN)] == [600.0, None]
    await journal.record(Intended(A, 3.0, 2, b"{}"), Lost(A, 4.0, "reset"))
    await journal.record(Intended(B, 5.0, 2, b"{}", start_timeout=60.5), Lost(B, 6.0, "reset"))
    assert [entry.start_timeout for entry in await entries(journal, State.UNKNOWN)] == [None, 60.5]


async def test_entry_can_be_taken_up(journal):
    """An entry has everything needed to continue the job."""
    await journal.record(*whole_life()[:3])
    await journal.record(intended(B, 0.5, attempt=1, usd=0.06))
    assert await entries(journal, State.ANSWERED, State.INTENDED) == [
        OpenJob(B, State.INTENDED, 1, 0.5, b'{"prompt": "x"}', reserved_usd=0.06),
        OpenJob(
            A,
            State.ANSWERED,
            1,
            1.0,
            b'{"prompt": "x"}',
            2.0,
            TICKET,
            as_stored(ANSWER),
            0.0,
            3.0,
        ),
    ]


async def test_entries_come_oldest_intended_first(journal):
    """Ordered by the time of the intent, in any order of recording and over several pages."""
    keys = [JobKey(f"{i:032x}") for i in range(700)]
    order = sorted(range(700), key=lambda i: i * 7919 % 700)
    await journal.record(*(intended(key, float(at)) for key, at in zip(keys, order, strict=True)))
    found = [entry.intended_at for entry in await entries(journal, State.INTENDED)]
    assert found == [float(i) for i in range(700)]


@pytest.mark.slow
async def test_entries_skip_what_has_moved_on(journal):
    """A job that leaves the states during the iteration is skipped; one that is intended again is not repeated."""
    keys = [JobKey(f"{i:032x}") for i in range(600)]
    for key in keys:
        await journal.record(intended(key, 1.0), Lost(key, 2.0, "reset"))
    met = []
    async for entry in journal.entries({State.UNKNOWN, State.INTENDED}):
        if not met:
            await journal.record(intended(entry.job_key, 99.0), Accepted(keys[-1], 3.0, TICKET))
        met.append(entry.job_key)
    assert met == keys[:-1]


async def test_failed_before_it_was_sent(journal):
    """An unreadable image fails its job without an attempt, and the job can be retried."""
    await journal.record(FailedForGood(A, 5.0, Failed("image_load_error", "not an image")))
    assert journal.outcomes([A])[A] == JobOutcome(
        A, State.FAILED, 0, completed_at=5.0, error_type="image_load_error", error_message="not an image"
    )
    assert await entries(journal, State.FAILED) == [OpenJob(A, State.FAILED, 0, 0.0, b"", ended_at=5.0)]
    await journal.record(Retried(A, 6.0))
    assert await journal.find([A]) == {A: KnownJob(State.PENDING, journal.session, 1)}


async def test_refusal_frees_the_reservation_and_keeps_the_attempt(journal):
    """A submit that was certainly not accepted costs nothing and is sent again under its number."""
    await journal.record(intended(usd=0.03))
    assert (await journal.counts()).reserved_usd == 0.03
    await journal.record(Refused(A, 2.0, "503"))
    counts = await journal.counts()
    assert (counts.reserved_usd, counts.spent_usd, counts.oldest_open_at) == (0.0, 0.0, None)
    assert await journal.find([A]) == {A: KnownJob(State.PENDING, journal.session, 1)}
    await journal.record(intended(attempt=1, at=3.0))
    assert journal.outcomes([A])[A].submitted_at == 3.0


async def test_lost_submit_stays_reserved_and_says_why(journal):
    """It may have been accepted: its money stays reserved, and the results have the reason."""
    await journal.record(intended(usd=0.03), Lost(A, 2.0, "timeout after 30 s"))
    counts = await journal.counts()
    assert (counts.reserved_usd, counts.oldest_open_at) == (0.03, 1.0)
    assert journal.outcomes([A])[A][-2:] == ("unknown", "timeout after 30 s")
    await journal.record(Accepted(A, 3.0, TICKET))
    assert journal.outcomes([A])[A].error_type is None


async def test_answer_settles_the_cost(journal):
    """The answer turns reserved into spent money; finishing changes no money."""
    first = whole_life()
    await journal.record(*first[:3])
    counts = await journal.counts()
    assert (counts.spent_usd, counts.reserved_usd) == (0.04, 0.0)
    await journal.record(first[3])
    assert (await journal.counts()).spent_usd == 0.04


async def test_failure_of_an_answered_job_costs_nothing_more(journal):
    """Its answer has settled the cost; the outcome has both the answer and the failure."""
    await journal.record(*whole_life()[:3])
    await journal.record(FailedForGood(A, 9.0, Failed("result_file_gone", "404"), 0.04))
    outcome = journal.outcomes([A])[A]
    assert (outcome.cost_usd, outcome.completed_at, outcome.billable_units) == (0.04, 3.0, 1.25)
    assert outcome.output == orjson.dumps(ANSWER.output)
    assert (outcome.error_type, outcome.error_message) == ("result_file_gone", "404")
    assert (await journal.counts()).spent_usd == 0.04


async def test_retry_replaces_the_outcome_and_keeps_the_spend(journal):
    """After a retry the outcome has the last attempt, and the cost of all attempts."""
    await journal.record(*whole_life()[:2], FailedForGood(A, 4.0, Failed("generation_timeout", "late", 0.5), 0.01))
    await journal.record(Retried(A, 5.0))
    outcome = journal.outcomes([A])[A]
    assert (outcome.state, outcome.request_id, outcome.error_type) == (State.PENDING, None, None)
    assert outcome.cost_usd == 0.01
    second = Ticket(RequestId("r-2"))
    await journal.record(
        intended(at=6.0, attempt=2),
        Accepted(A, 7.0, second),
        Answered(A, 8.0, ANSWER, 0.03),
        Finished(A, 9.0, ()),
    )
    outcome = journal.outcomes([A])[A]
    assert (outcome.state, outcome.attempts, outcome.error_type) == (State.DONE, 2, None)
    assert outcome.request_id == second.request_id
    assert outcome.images == encode_images([])
    assert outcome.cost_usd == pytest.approx(0.04)
    assert (await journal.counts()).spent_usd == pytest.approx(0.04)


async def test_illegal_event_is_refused_with_its_call(journal):
    """The state table holds for every event, and a call is written completely or not at all."""
    with pytest.raises(IllegalTransition, match="pending cannot accept"):
        await journal.record(intended(B), Uploaded("s", 1.0, "http://u"), Accepted(A, 1.0, TICKET))
    assert await journal.find([A, B]) == {}
    assert await journal.uploaded("s", 0.0) is None
    with pytest.raises(IllegalTransition, match="intended cannot intend"):
        await journal.record(intended(A), intended(A))
    assert await journal.find([A]) == {}


async def test_illegal_event_hurts_its_caller_alone(journal):
    """Concurrent callers are written although one of them is invalid."""
    failures = []

    async def record(event):
        try:
            await journal.record(event)
        except IllegalTransition as error:
            failures.append(str(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(record, intended(A))
        tasks.start_soon(record, Finished(B, 1.0, ()))
        tasks.start_soon(record, intended(C))
    assert failures == ["a job that is pending cannot finish"]
    assert (await journal.find([A, B, C])).keys() == {A, C}


async def test_cancelled_caller_is_written_all_the_same(journal):
    """Events passed to `record` become durable even if its caller no longer waits."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await journal.record(intended(A))
    assert scope.cancelled_caught
    await journal.record(intended(B))
    assert (await journal.find([A, B])).keys() == {A, B}


async def test_long_strings_of_a_body_are_kept_by_hash(journal):
    """Whole while it may have to be sent again; then replaced by a data URI's SHA-256, and cut to 4096 characters."""
    uri = "data:" + "é" * 4092
    body = orjson.dumps({"image_url": uri, "prompt": "y" * 4096, "nested": [{"x": "z" * 5000}]})
    await journal.record(intended(body=body))
    (entry,) = await entries(journal, State.INTENDED)
    assert entry.body == body
    await journal.record(Accepted(A, 2.0, TICKET), FailedForGood(A, 3.0, Failed("x", "y")))
    (entry,) = await entries(journal, State.FAILED)
    kept = orjson.loads(entry.body)
    assert kept == {
        "image_url": "sha256:" + hashlib.sha256(uri.encode()).hexdigest(),
        "prompt": "y" * 4096,
        "nested": [{"x": "sha256:" + hashlib.sha256(b"z" * 5000).hexdigest()}],
    }


async def test_upload_is_found_while_it_is_fresh(journal):
    """A URL counts from the given time on, and a newer upload replaces an older one."""
    await journal.record(Uploaded("s", 10.0, "http://u/1"))
    assert await journal.uploaded("s", 10.0) == "http://u/1"
    assert await journal.uploaded("s", 10.5) is None
    await journal.record(Uploaded("s", 11.0, "http://u/2"))
    assert await journal.uploaded("s", 10.5) == "http://u/2"
    assert await journal.uploaded("t", 0.0) is None


async def test_messages_with_undecodable_names_are_kept(journal):
    """An error message may quote a file name that is not valid UTF-8; it must not stop the run."""
    await journal.record(FailedForGood(A, 1.0, Failed("image_load_error", "no \udcff.jpg")))
    assert journal.outcomes([A])[A].error_message.startswith("no ")


async def test_two_jobs_never_share_a_request_id(journal):
    """Only the later acceptance is refused; the id of an ended attempt still belongs to its job."""
    await journal.record(*whole_life(A)[:2])
    await journal.record(intended(B, 5.0))
    with pytest.raises(RequestIdTaken, match=rf"r-1.*{A}"):
        await journal.record(Accepted(B, 6.0, TICKET))
    await journal.record(Lost(B, 6.0, "request id taken"))
    await journal.record(FailedForGood(A, 7.0, Failed("e", "m")), Retried(A, 8.0), intended(A, 9.0, attempt=2))
    await journal.record(Accepted(A, 10.0, TICKET_B), intended(B, 11.0))
    with pytest.raises(RequestIdTaken):
        await journal.record(Accepted(B, 12.0, TICKET))
    await journal.record(intended(C, 13.0))
    with pytest.raises(RequestIdTaken):
        await journal.record(Accepted(C, 14.0, TICKET_B))
    assert {key: known.state for key, known in (await journal.find([A, B, C])).items()} == {
        A: State.ACCEPTED,
        B: State.INTENDED,
        C: State.INTENDED,
    }


async def test_two_jobs_of_one_group_never_share_a_request_id(journal):
    """Nor if both acceptances are written at once."""
    await journal.record(intended(A), intended(B, 2.0))
    errors = []

    async def accept(key):
        try:
            await journal.record(Accepted(key, 3.0, TICKET))
        except RequestIdTaken as error:
            errors.append(str(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept, A)
        tasks.start_soon(accept, B)
    assert len(errors) == 1
    assert sorted(known.state for known in (await journal.find([A, B])).values()) == [State.ACCEPTED, State.INTENDED]


async def test_what_could_not_be_collected_keeps_what_is_known(journal):
    """The raw answer, the request, the images, and the time of its end, which a later try does not change."""
    raw = b'{"images": "none", "padding": "' + b"x" * 2000 + b'"}'
    odd = Answer({}, 1.5, "preview", raw)
    await journal.record(*whole_life(A)[:2])
    await journal.record(Uncollected(A, 3.0, Failed("malformed_output", "no images"), 3.0, 0.04, odd))
    assert await journal.find([A]) == {A: KnownJob(State.COLLECTABLE, journal.session, 1, 3.0)}
    await journal.record(Uncollected(A, 90.0, Failed("result_file_gone", "404"), 3.0, None, None, (IMAGE,)))
    (entry,) = await entries(journal, State.COLLECTABLE)
    assert (entry.ended_at, entry.answer.raw, entry.ticket) == (3.0, raw, TICKET)
    outcome = journal.outcomes([A])[A]
    assert (outcome.completed_at, outcome.error_type, outcome.cost_usd) == (3.0, "result_file_gone", 0.04)
    assert unpack(outcome.output) == raw
    assert decode_images(outcome.images) == (IMAGE,)
    counts = await journal.counts()
    assert (counts.spent_usd, counts.reserved_usd, counts.oldest_open_at) == (0.04, 0.0, None)
    await journal.record(Answered(A, 3.0, ANSWER), Finished(A, 99.0, (IMAGE,)))
    outcome = journal.outcomes([A])[A]
    assert (outcome.state, outcome.error_type, outcome.cost_usd, outcome.completed_at) == (State.DONE, None, 0.04, 3.0)


async def test_data_uris_are_dropped_once_their_bytes_are_stored():
    """The answer stays, without its embedded images, which are files now."""
    uri = "data:image/png;base64," + "A" * 5000
    answer = Answer({"images": [{"url": uri}], "seed": 3, "other": uri})
    with tempfile.TemporaryDirectory() as folder:
        async with opened_file(Path(folder) / "journal.db") as journal:
            await journal.record(*whole_life(A)[:2], Answered(A, 3.0, answer))
            assert uri in unpack(journal.outcomes([A])[A].output).decode()
            stored = StoredImage("data:image/png;base64,…", path="images/ab/abc.png", sha256="abc")
            await journal.record(Finished(A, 4.0, (stored,)))
            kept = unpack(journal.outcomes([A])[A].output).decode()
    assert orjson.loads(kept)["seed"] == 3
    assert "AAAA" not in kept


# --- any legal history ------------------------------------------------------------------------------------

_KEYS = [A, B, C]
_MONEY = st.sampled_from([None, 0.0, 0.03, 0.06])


def _event(draw, kind, key, at, attempt):
    match kind:
        case EventKind.INTEND:
            return Intended(key, at, attempt, b'{"n": %d}' % attempt, draw(st.sampled_from([0.0, 0.03, 0.25])))
        case EventKind.ACCEPT:
            return Accepted(key, at, Ticket(RequestId(f"r{at}"), "s", "r", draw(st.sampled_from(["", "c"]))))
        case EventKind.REFUSE:
            return Refused(key, at, "busy")
        case EventKind.LOSE:
            return Lost(key, at, draw(st.sampled_from(["", "reset"])))
        case EventKind.ANSWER:
            return Answered(key, at, draw(st.sampled_from([ANSWER, Answer({"seed": 1})])), draw(_MONEY), None, 1.0)
        case EventKind.FINISH:
            return Finished(key, at, draw(st.sampled_from([(), (IMAGE,), (IMAGE, IMAGE)])), draw(_MONEY))
        case EventKind.FAIL:
            return FailedForGood(key, at, Failed("e", "m", draw(_MONEY)), draw(_MONEY))
        case EventKind.UNCOLLECTED:
            answer = draw(st.sampled_from([None, ANSWER, Answer({}, 2.0, "echo", b"<html>" * 200)]))
            images = draw(st.sampled_from([(), (IMAGE,)]))
            return Uncollected(key, at, Failed("e", "m"), at - 0.5, draw(_MONEY), answer, images)
        case EventKind.RETRY:
            return Retried(key, at)


@st.composite
def histories(draw):
    """Random legal walks of three jobs, cut into calls."""
    states, attempts = dict.fromkeys(_KEYS, State.PENDING), dict.fromkeys(_KEYS, 0)
    calls = [[]]
    for step in range(draw(st.integers(1, 25))):
        key = draw(st.sampled_from(_KEYS))
        legal = [kind for state, kind in TABLE if state is states[key]]
        if legal:
            kind = draw(st.sampled_from(legal))
            attempts[key] += kind is EventKind.INTEND
            calls[-1].append(_event(draw, kind, key, float(step), attempts[key]))
            states[key] = TABLE[states[key], kind]
        if draw(st.booleans()):
            calls.append([])
    return calls


async def _contents(journal):
    counts = await journal.counts()
    return (
        await journal.find(_KEYS),
        journal.outcomes(_KEYS),
        [entry async for entry in journal.entries(set(State))],
        counts.by_state,
        (pytest.approx(counts.spent_usd), pytest.approx(counts.reserved_usd), counts.oldest_open_at),
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls=histories(), together=st.booleans())
def test_both_journals_tell_the_same_of_any_history(calls, together):
    """For any legal history, call by call or in one group, file and memory give the same answers."""

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            memory = MemoryJournal()
            async with opened_file(Path(folder) / "journal.db") as file:
                async with anyio.create_task_group() as tasks:
                    for call in calls:
                        await memory.record(*call)
                        if together:
                            tasks.start_soon(file.record, *call)
                            await checkpoint()
                        else:
                            await file.record(*call)
                assert await _contents(file) == await _contents(memory)
            async with opened_file(Path(folder) / "journal.db") as again:
                assert again.session == 2
                assert await _contents(again) == await _contents(memory)

    anyio.run(run)


async def test_memory_journal_reopens_in_the_next_session():
    """The new session does not see later changes of the old one."""
    first = MemoryJournal()
    await first.record(intended(A))
    second = first.reopened()
    await first.record(Accepted(A, 2.0, TICKET))
    assert await second.find([A]) == {A: KnownJob(State.INTENDED, 1, 1)}
    await second.record(Lost(A, 3.0, "crash"))
    assert await second.find([A]) == {A: KnownJob(State.UNKNOWN, 2, 1)}
    assert [type(event) for event in second.events] == [Intended, Lost]


async def test_calls_that_wait_together_are_one_transaction(tmp_path):
    """While one group is being written, later calls gather in the next."""
    async with opened_file(tmp_path / "journal.db") as journal:
        async with anyio.create_task_group() as tasks:
            for number in range(300):
                tasks.start_soon(journal.record, intended(JobKey(f"{number:032x}")))
            await anyio.wait_all_tasks_blocked()
        assert journal.statistics().events == 300
        assert journal.statistics().commits <= 3
        assert journal.statistics().largest_group >= 100


@pytest.mark.parametrize("moment", ["idle", "gathering", "committing"])
async def test_a_loop_that_cancels_every_task_loses_nothing(tmp_path, moment):
    """`asyncio.run` cancels every task after a second Ctrl-C, despite shields: recorded events are still written."""
    reached, go, others, finished = threading.Event(), threading.Event(), asyncio.all_tasks(), 0
    async with open_journal(tmp_path / "journal.db") as journal:
        commit = journal.file.commit

        def slowly(calls):
            reached.set()
            go.wait(10)
            return commit(calls)

        journal.file.commit = slowly
        caller = asyncio.create_task(journal.record(intended(A)))
        if moment == "idle":
            go.set()
            await caller
        while moment == "committing" and not reached.is_set():
            await asyncio.sleep(0)
        if moment == "gathering":
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - others:
            task.cancel()
        await asyncio.sleep(0)
        go.set()
        with suppress(asyncio.CancelledError):
            await caller
        await journal.record(intended(B))
        assert (await journal.find([A, B])).keys() == {A, B}
        finished = journal.statistics().events
    assert finished == 2


async def test_work_is_waited_for_by_a_task_that_is_cancelled(tmp_path):
    """Before its thread starts, while it works, and in a cancelled scope; it is done once."""
    reached, go, done = threading.Event(), threading.Event(), []

    def work():
        reached.set()
        go.wait(10)
        done.append(len(done))
        return "done"

    async with open_journal(tmp_path / "journal.db") as journal:
        for waits in (lambda: True, reached.is_set):
            reached.clear()
            go.clear()
            task = asyncio.create_task(journal.to_the_end(work))
            await asyncio.sleep(0)
            while not waits():
                await asyncio.sleep(0)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.01)
            assert not task.done()
            go.set()
            assert await task == "done"
        with anyio.CancelScope() as scope:
            scope.cancel()
            assert await journal.to_the_end(work) == "done"
    assert done == [0, 1, 2]
