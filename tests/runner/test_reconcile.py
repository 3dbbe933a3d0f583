"""Lost replies are found in the listing, and adopted only if the match is certain. In virtual time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import anyio
import orjson
import pytest

from batch.errors import StorageError
from batch.fal.errors import CallFailed, Trouble
from batch.fal.platform import Listed
from batch.fal.protocol import Reply
from batch.journal.events import Accepted, Intended
from batch.journal.states import State
from batch.money import Price
from batch.run.admission import StopCause
from batch.run.context import Policy
from batch.run.reconcile import LATE_SECONDS, OVER_SECONDS
from batch.testing.service import (
    CompletesWith,
    DropsAfterAccept,
    DropsBeforeAccept,
    FakeListing,
    FakeService,
    Fault,
    RefusesSubmits,
)
from batch.types import AppId, Attempt, RequestId
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))


def world(*faults: Fault, listing: FakeListing | None = None, policy: Policy | None = None, **options) -> World:
    service = FakeService(service_time=2.0, round_trip=0.1, faults=faults, listing=listing)
    return World(service, policy=policy, reconciles=True, **options)


async def state(of: World) -> dict[State, int]:
    return {name: count for name, count in (await of.journal.counts()).by_state.items() if count}


def findings(of: World) -> set[str]:
    return {facts["finding"] for facts in of.observer.actions("reconciled")}


@dataclass(slots=True)
class FailsPages(Fault):
    """`times` pages of the listing are unavailable, starting with the `first`-th."""

    first: int = 1
    times: int = 1_000_000
    status: int = 502
    headers: tuple[tuple[str, str], ...] = ()

    def listing(self, n: int) -> Reply | None:
        struck = self.first <= n < self.first + self.times
        return Reply(self.status, b"<html>", dict(self.headers)) if struck else None


@dataclass(slots=True)
class LosesReplyTo(Fault):
    """The submit with a word in its prompt is accepted, and its answer is lost."""

    word: str

    def accepted(self, attempt: Attempt, n: int) -> None:
        if self.word in str(orjson.loads(attempt.body)["prompt"]):
            raise CallFailed(Trouble("submit", "disconnected", detail="disconnected"))


@dataclass(slots=True)
class LosesRequestOf(Fault):
    """The first submit with a word in its prompt is lost before it arrives."""

    word: str
    is_spent: bool = False

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        if not self.is_spent and self.word in str(orjson.loads(attempt.body)["prompt"]):
            self.is_spent = True
            raise CallFailed(Trouble("submit", "reset", detail="reset"))
        return None


class GoesRound(FakeService):
    """A listing whose pages never end."""

    async def listing(self, start, end, cursor, limit=100):
        page = await super().listing(start, end, None, limit)
        return type(page)(page.items, "again")


# --- found ------------------------------------------------------------------------------------------------


async def test_lost_replies_are_adopted_at_the_end_of_the_same_run():
    """A fifth of all replies lost: one POST for each job, every result collected, nothing held."""
    of = world(DropsAfterAccept(every=5))
    report = await of.run(jobs(200))
    assert (report.done, report.failed, report.held) == (200, 0, 0)
    assert of.service.posts == of.service.accepted == 200
    assert await state(of) == {State.DONE: 200}
    assert len({event.ticket.request_id for event in of.journal.events if isinstance(event, Accepted)}) == 200
    assert findings(of) == {"adopted"}


async def test_a_listing_that_lags_is_asked_again_by_the_next_run():
    """Absence proves nothing: held at the end of the run, adopted at the start of the next, still one POST each."""
    of = world(DropsAfterAccept(every=5), listing=FakeListing(lag=600.0))
    assert (await of.run(jobs(50))).held == 10
    assert findings(of) == {"absent"}
    assert (await of.again().run(jobs(50))).held == 10
    await anyio.sleep(600)
    report = await of.again().run(jobs(50))
    assert (report.done, report.held, of.service.posts) == (10, 0, 50)


async def test_a_request_that_waits_and_is_not_listed_is_found_once_it_has_ended():
    """Only ended requests are listed: a queued request does not count as lost."""
    of = world(DropsAfterAccept(), listing=FakeListing(waiting=False))
    assert (await of.run(jobs(5))).held == 5
    await anyio.sleep(10)
    report = await of.again().run(jobs(5))
    assert (report.done, report.held, of.service.posts) == (5, 0, 5)


async def test_a_run_killed_between_post_and_answer_finds_what_it_asked_for():
    """The losses were not recorded: an intent without an outcome becomes unknown, and is found."""
    of = world()
    with anyio.move_on_after(0.15):  # the POSTs have arrived, their answers have not
        await of.run(jobs(30))
    sent = of.service.posts
    assert sent > 0
    report = await of.again().run(jobs(30))
    assert (report.done, report.held, of.service.posts) == (30, 0, 30)


async def test_an_adopted_failure_is_a_failed_row():
    """The request was accepted and failed: the row says so, and it is not submitted again."""
    of = world(LosesReplyTo("3 as"), CompletesWith("3 as", 422, "content_policy_violation"))
    report = await of.run(jobs(5))
    assert (report.done, report.failed, report.held, of.service.posts) == (4, 1, 0, 5)


async def test_an_adopted_request_settles_its_reservation():
    """Its actual cost replaces the reservation."""
    of = world(DropsAfterAccept(every=2), price=PRICE, budget=10.0)
    await of.run(jobs(20))
    counts = await of.journal.counts()
    assert counts.reserved_usd == pytest.approx(0.0)
    assert counts.spent_usd == pytest.approx(20 * 0.5 * 0.03)


async def test_pages_that_shift_while_they_are_read_hide_nothing():
    """Other users' requests arrive between two pages, so some rows appear twice: each counts once."""
    of = world(DropsAfterAccept(every=3), listing=FakeListing(page_limit=7, arrivals=3))
    report = await of.run(jobs(90))
    assert (report.done, report.held, of.service.posts) == (90, 0, 90)
    assert of.service.count("listing") > 90 / 7


async def test_a_page_that_is_too_large_is_asked_for_in_parts():
    """Inputs that contain their image: a page of a hundred exceeds the client's limit, a smaller one does not."""
    of = world(DropsAfterAccept(every=3), listing=FakeListing(page_bytes=1000))
    report = await of.run(jobs(30))
    assert (report.done, report.held, of.service.posts) == (30, 0, 30)
    of = world(DropsAfterAccept(every=3), listing=FakeListing(page_bytes=10))
    assert (await of.run(jobs(30))).held == 10
    assert findings(of) == {"unreadable"}


async def test_a_page_that_fails_at_first_is_read_again():
    """Reading is free: a temporary gateway error changes nothing."""
    of = world(DropsAfterAccept(every=5), FailsPages(first=1, times=3))
    assert (await of.run(jobs(20))).held == 0


# --- not found --------------------------------------------------------------------------------------------


async def test_two_matches_stay_unknown():
    """Another client sent exactly the same input with the same key: the matches cannot be distinguished."""
    of = world(LosesReplyTo("4 as"), LosesReplyTo("7 as"))
    duplicate = jobs(5)[4]
    of.service.lists.others.append(
        Listed(RequestId("same-input"), AppId("fal-ai/flux"), 0.15, None, None, None, dict(duplicate.input))
    )
    report = await of.run(jobs(10))
    assert (report.done, report.held, of.service.posts) == (9, 1, 10)
    assert findings(of) == {"adopted", "ambiguous"}
    assert (await of.again().run(jobs(10))).held == 1
    assert of.service.posts == 10


async def test_one_hidden_input_leaves_its_whole_time_unknown():
    """A request without its input may be the match, or a second one."""
    of = world(DropsAfterAccept(every=5))
    of.service.lists.others.append(Listed(RequestId("veiled"), AppId("fal-ai/flux"), 0.15, None, None, None, None))
    report = await of.run(jobs(10))
    assert (report.done, report.held, of.service.posts) == (8, 2, 10)
    assert findings(of) == {"hidden"}


async def test_a_hidden_request_of_our_own_hides_nothing():
    """Its id is in the journal, so it is known."""
    of = world(DropsAfterAccept(every=5), listing=FakeListing(hidden=lambda request: request.id == "request-0"))
    assert (await of.run(jobs(10))).held == 0


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 502])
async def test_a_failed_page_leaves_everything_unknown(status):
    """The second page is unavailable: the first one alone is inconclusive."""
    of = world(DropsAfterAccept(every=2), FailsPages(first=2, status=status), listing=FakeListing(page_limit=10))
    report = await of.run(jobs(30))
    assert (report.done, report.held, of.service.posts) == (15, 15, 30)
    assert findings(of) == {"refused" if status in {401, 403, 404} else "unreadable"}


async def test_a_listing_that_never_ends_is_given_up():
    """The cursor leads in circles."""
    of = World(GoesRound(round_trip=0.1, faults=[DropsAfterAccept(every=5)]), reconciles=True)
    assert (await of.run(jobs(10))).held == 2
    assert findings(of) == {"unreadable"}
    assert of.service.count("listing") < 10


async def test_a_listing_that_asks_for_patience_does_not_hold_up_the_run():
    """`Retry-After: 3600` on the listing: the run still ends within minutes."""
    of = world(DropsAfterAccept(every=5), FailsPages(status=429, headers=(("retry-after", "3600"),)))
    began = anyio.current_time()
    assert (await of.run(jobs(10))).held == 2
    assert anyio.current_time() - began < 300


async def test_many_windows_of_a_listing_that_is_down_cost_minutes_not_hours():
    """Fifty unknown submits, hours apart: after a few unreadable windows the others are skipped."""
    of = world(DropsAfterAccept(), FailsPages())
    made = jobs(50)
    for number in range(50):
        await of.run(made[: number + 1])
        of.again()
        await anyio.sleep(3 * 3600)
    asked, began = of.service.count("listing"), anyio.current_time()
    assert (await of.run(made)).held == 50
    assert anyio.current_time() - began < 600
    assert of.service.count("listing") - asked < 50
    of.service.faults.pop()
    report = await of.again().run(made)
    assert (report.done, report.held, of.service.posts) == (50, 0, 50)


async def test_what_never_arrived_stays_unknown_and_is_never_sent_again():
    """It was lost before it arrived: it is not listed, which proves nothing, however often it is looked up."""
    of = world(DropsBeforeAccept(every=5))
    for _ in range(4):
        assert (await of.run(jobs(10))).held == 2
        of.again()
        await anyio.sleep(86400)
    assert of.service.posts == 10


async def test_earlier_attempts_are_never_adopted():
    """Attempt one was accepted and failed, the reply to attempt two is lost: attempt two's request is found."""
    of = world(DropsAfterAccept(every=2), CompletesWith("0 as", 503, "runner_disconnected", times=1))
    assert (await of.run(jobs(1))).held == 1
    await anyio.sleep(1)
    report = await of.again().run(jobs(1))
    assert (report.done, report.held, of.service.posts, of.service.accepted) == (1, 0, 2, 2)
    adopted = [facts["request_id"] for facts in of.observer.actions("reconciled")]
    assert adopted == [None, "request-1"]


async def test_an_earlier_attempt_alone_is_no_match():
    """Attempt two never arrived: only the first attempt's request is listed, and it is known."""
    of = world(DropsBeforeAccept(every=2), CompletesWith("0 as", 503, "runner_disconnected", times=1))
    report = await of.run(jobs(1))
    assert (report.done, report.held, of.service.accepted) == (0, 1, 1)
    assert findings(of) == {"absent"}


# --- policies ---------------------------------------------------------------------------------------------


async def test_the_listing_is_asked_before_anything_is_sent_again():
    """resubmit-after has passed, but the request is listed by now: adopted, not paid twice."""
    of = world(DropsAfterAccept(every=5), listing=FakeListing(lag=60.0), policy=Policy(resubmit_unknown_after=100.0))
    assert (await of.run(jobs(10))).held == 2
    await anyio.sleep(200)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts) == (2, 0, 10)


async def test_what_is_not_listed_is_sent_again_where_the_policy_says_so():
    """resubmit-after has passed and nothing is listed: a new attempt, and the old reservation counts as spent."""
    of = world(DropsBeforeAccept(every=5), policy=Policy(resubmit_unknown_after=100.0), price=PRICE)
    assert (await of.run(jobs(10))).held == 2
    of.service.faults.clear()
    await anyio.sleep(200)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts, of.service.accepted) == (2, 0, 12, 10)
    counts = await of.journal.counts()
    assert counts.spent_usd == pytest.approx(10 * 0.5 * 0.03 + 2 * 0.03)
    assert counts.reserved_usd == pytest.approx(0.0)


async def test_a_look_up_that_failed_sends_nothing_again():
    """The time has passed, but a page could not be read, and it may have shown the lost request."""
    after = Policy(resubmit_unknown_after=100.0)
    of = world(DropsAfterAccept(every=5), listing=FakeListing(lag=60.0), policy=after)
    assert (await of.run(jobs(10))).held == 2
    await anyio.sleep(200)
    of.service.faults.append(out := FailsPages(status=500))
    assert (await of.again().run(jobs(10))).held == 2
    assert findings(of) >= {"unreadable"}
    of.service.faults.remove(out)
    of.service.lists.hidden = lambda _: True
    assert (await of.again().run(jobs(10))).held == 2
    of.service.lists.hidden = lambda _: False
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts) == (2, 0, 10)


async def test_a_key_that_may_not_list_leaves_only_the_clock():
    """Without access to a listing, only the time set by the user decides."""
    of = world(DropsBeforeAccept(every=5), FailsPages(status=403), policy=Policy(resubmit_unknown_after=100.0))
    assert (await of.run(jobs(10))).held == 2
    of.service.faults.pop(0)
    assert (await of.again().run(jobs(10))).held == 2, "too early"
    await anyio.sleep(200)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts, of.service.accepted) == (2, 0, 12, 10)


async def test_collecting_only_adopts_and_submits_nothing():
    """`restyle reconcile`: listed requests are collected; retryable, held and new jobs are left to a run."""
    lost = [LosesReplyTo(f"{number} as") for number in (1, 3, 5, 7, 9)]
    of = world(*lost, listing=FakeListing(lag=60.0), policy=Policy(resubmit_unknown_after=1.0))
    await of.run(jobs(10))
    await anyio.sleep(100)
    of.service.lists.hidden = lambda request: request.body["seed"] == 9
    of.service.faults.append(CompletesWith("7 as", 503, "runner_disconnected", times=1))
    report = await of.again().run([], Policy(collect_only=True, resubmit_unknown_after=1.0))
    assert of.service.posts == 10
    assert (report.done, report.failed) == (0, 0), "one input is hidden, and so all of its time stays unknown"
    of.service.lists.hidden = lambda _: False
    report = await of.again().run([], Policy(collect_only=True, resubmit_unknown_after=1.0))
    assert (report.done, report.failed, report.held, of.service.posts) == (4, 0, 0, 10)
    assert await state(of) == {State.DONE: 9, State.PENDING: 1}
    of.service.faults.clear()
    report = await of.again().run(jobs(10))
    assert (report.done, of.service.posts) == (1, 11)


async def test_a_retryable_failure_of_a_stopping_run_is_tried_again_by_the_next():
    """A stopping run starts no new attempt, and does not count the job as failed either."""
    of = world(CompletesWith("3 as", 503, "runner_disconnected", times=1))
    async with anyio.create_task_group() as tasks:

        async def stop() -> None:
            await anyio.sleep(3.0)
            of.runner.stop(StopCause.SIGNAL, "SIGTERM")

        tasks.start_soon(stop)
        report = await of.run(jobs(10))
    assert (report.done, report.failed, of.service.posts) == (9, 0, 10)
    assert await state(of) == {State.DONE: 9, State.PENDING: 1}
    assert (await of.again().run(jobs(10), Policy())).done == 1


# --- with a start timeout -----------------------------------------------------------------------------------

TIMEOUT = 600.0
OVER = LATE_SECONDS + TIMEOUT + OVER_SECONDS
BOUNDED = Policy(start_timeout=TIMEOUT)


def bounded_world(*faults: Fault, policy: Policy = BOUNDED, listing: FakeListing | None = None, **options) -> World:
    service = FakeService(
        service_time=2.0, round_trip=0.1, faults=faults, listing=listing, start_timeout=TIMEOUT, **options
    )
    return World(service, policy=policy, reconciles=True, price=PRICE, budget=100.0)


async def test_what_never_arrived_is_sent_again_once_it_can_no_longer_start():
    """Held while it may start, run or be listed late; then the same attempt is sent, without cost for the first try."""
    of = bounded_world(LosesRequestOf("4 as"))
    assert (await of.run(jobs(10))).held == 1
    await anyio.sleep(OVER - 60.0)
    assert (await of.again().run(jobs(10))).held == 1
    assert of.service.posts == 10
    await anyio.sleep(120.0)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts, of.service.accepted) == (1, 0, 11, 10)
    assert findings(of) == {"absent", "not accepted"}
    assert {event.attempt for event in of.journal.events if isinstance(event, Intended)} == {1}
    counts = await of.journal.counts()
    assert counts.spent_usd == pytest.approx(10 * 0.5 * 0.03)
    assert counts.reserved_usd == pytest.approx(0.0)


async def test_a_start_timeout_of_this_run_says_nothing_of_an_earlier_submit():
    """It was sent without a start timeout, so it may still be queued."""
    of = bounded_world(LosesRequestOf("4 as"))
    assert (await of.run(jobs(10), Policy())).held == 1
    await anyio.sleep(OVER + 60.0)
    assert (await of.again().run(jobs(10))).held == 1
    assert of.service.posts == 10


async def test_where_everything_is_lost_nothing_shows_that_the_listing_works():
    """No request of this run is listed, so the listing may not cover its time at all."""
    of = bounded_world(DropsBeforeAccept())
    assert (await of.run(jobs(5))).held == 5
    await anyio.sleep(OVER + 60.0)
    assert (await of.again().run(jobs(5))).held == 5
    assert of.service.posts == 5


async def test_a_listing_that_is_hours_late_does_not_cost_anything_twice():
    """The listing does not cover the time of the submit yet, so the run waits."""
    of = bounded_world(LosesReplyTo("4 as"), listing=FakeListing(lag=OVER + 3600.0))
    assert (await of.run(jobs(10))).held == 1
    await anyio.sleep(OVER + 60.0)
    assert (await of.again().run(jobs(10))).held == 1
    await anyio.sleep(3600.0)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts) == (1, 0, 10)


@pytest.mark.parametrize("hidden", [True, False])
async def test_a_look_up_in_doubt_sends_nothing_again_after_a_start_timeout(hidden):
    """A hidden input or a failed page may hide the request, however late it is."""
    of = bounded_world(LosesReplyTo("4 as"), listing=FakeListing(hidden=lambda request: request.body["seed"] == 4))
    if not hidden:
        of.service.faults.append(FailsPages(first=1))
    assert (await of.run(jobs(10))).held == 1
    await anyio.sleep(OVER + 60.0)
    assert (await of.again().run(jobs(10))).held == 1
    assert of.service.posts == 10


async def test_a_lost_request_that_did_not_start_in_time_is_sent_again_for_free():
    """The listing shows it: 504, never executed, never billed. Looked up earlier, it is an ordinary failure."""
    of = bounded_world(LosesReplyTo("1 as"), slots=[[(0.0, 1.0), (5000.0, float("inf"))]])
    assert (await of.run(jobs(1))).done == 1
    with anyio.move_on_after(0.15):
        await of.again().run(jobs(2))
    assert of.service.accepted == 2
    of.service.faults.clear()
    await anyio.sleep(OVER + 60.0)
    report = await of.again().run(jobs(2))
    assert findings(of) - {"absent"} == {"not started"}
    assert (report.done, report.failed, report.held, of.service.posts) == (1, 0, 0, 3)
    counts = await of.journal.counts()
    assert counts.spent_usd == pytest.approx(2 * 0.5 * 0.03), "nothing for what did not start"
    assert counts.reserved_usd == pytest.approx(0.0)


async def test_an_expired_start_is_a_failed_row_that_costs_nothing():
    """Another attempt does not follow the target's own verdict; --retry-failed starts one."""
    of = bounded_world(slots=[[(0.0, 1.0), (5000.0, float("inf"))]])
    report = await of.run(jobs(2))
    assert (report.done, report.failed) == (1, 1)
    assert (await of.journal.counts()).spent_usd == pytest.approx(0.5 * 0.03)
    await anyio.sleep(5000.0)
    report = await of.again().run(jobs(2), replace(BOUNDED, retry_failed=True))
    assert (report.done, of.service.accepted) == (1, 3)


async def test_resubmit_after_waits_until_the_first_submit_can_no_longer_start():
    """The policy says 60 s, but while the submit may still start, it may be missing from the listing."""
    policy = Policy(start_timeout=TIMEOUT, resubmit_unknown_after=60.0)
    of = bounded_world(LosesRequestOf("4 as"), policy=policy)
    assert (await of.run(jobs(10))).held == 1
    await anyio.sleep(TIMEOUT + 60.0)
    assert (await of.again().run(jobs(10))).held == 1
    await anyio.sleep(LATE_SECONDS)
    report = await of.again().run(jobs(10))
    assert (report.done, report.held, of.service.posts, of.service.accepted) == (1, 0, 11, 10)


async def test_reconciling_says_what_was_not_accepted_and_sends_nothing():
    """The next run sends it."""
    of = bounded_world(LosesRequestOf("4 as"))
    await of.run(jobs(10))
    await anyio.sleep(OVER + 60.0)
    report = await of.again().run([], replace(BOUNDED, collect_only=True))
    assert (report.held, of.service.posts) == (1, 10)
    assert "not accepted" in findings(of)
    assert (await of.again().run(jobs(10))).done == 1


async def test_a_submit_that_is_sent_again_may_be_throttled_and_refused_like_any_other():
    """The target certainly has nothing of it: a 429 waits, a 422 fails the row."""
    of = bounded_world(LosesRequestOf("4 as"), LosesRequestOf("7 as"))
    assert (await of.run(jobs(10))).held == 2
    await anyio.sleep(OVER + 60.0)
    of.service.faults[:] = [RefusesSubmits(429, first=11, times=3), RefusesSubmits(422, first=14, times=1)]
    report = await of.again().run(jobs(10))
    assert (report.done, report.failed, report.held, of.service.accepted) == (1, 1, 0, 9)


# --- edge cases -------------------------------------------------------------------------------------------


async def test_nothing_unknown_asks_nothing():
    """The listing is read only if a submit is unknown."""
    of = world()
    await of.run(jobs(10))
    assert of.service.count("listing") == 0


async def test_a_disk_that_refuses_the_adoption_stops_the_run_with_its_sentence():
    """One `StorageError`, as for any other write; the next run adopts."""
    of = world(DropsAfterAccept(every=5))
    record, adopting = of.journal.record, []

    async def full(*events):
        adopting.extend(event for event in events if isinstance(event, Accepted))
        if len(adopting) > 8:
            raise StorageError("no space left")
        await record(*events)

    of.journal.record = full
    with pytest.raises(StorageError, match="no space left"):
        await of.run(jobs(10))
    of.journal.record = record
    report = await of.again().run(jobs(10))
    assert (report.held, of.service.posts) == (0, 10)


async def test_a_service_without_a_listing_is_held_and_named():
    """A server without that path: everything stays unknown, and nothing hangs."""

    class WithoutListing(FakeService):
        async def listing(self, start, end, cursor, limit=100):
            await self._arrive("listing")
            raise CallFailed(Trouble("listing", reply=Reply(404, b'{"detail":"Not found"}')))

    of = World(WithoutListing(round_trip=0.1, faults=[DropsAfterAccept(every=5)]), reconciles=True)
    began = anyio.current_time()
    assert (await of.run(jobs(10))).held == 2
    assert anyio.current_time() - began < 120
