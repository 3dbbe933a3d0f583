"""Targets that replay, reject or ignore a repeated `Idempotency-Key`, and lost replies. In virtual time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import anyio
import orjson
import pytest

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.journal.events import Intended
from batch.journal.states import State
from batch.money import Price
from batch.run.admission import StopCause
from batch.run.context import Policy
from batch.run.verdicts import REPEAT_SECONDS, Idempotency
from batch.testing.service import (
    CompletesWith,
    DropsAfterAccept,
    DropsBeforeAccept,
    FakeListing,
    FakeService,
    Fault,
    RefusesConnection,
    RefusesSubmits,
)
from batch.types import Attempt
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))
CONFLICT = Reply(409, b'{"detail": "duplicate"}')
USED = orjson.dumps({"detail": [{"loc": ["header", "idempotency-key"], "msg": "used", "type": "value_error"}]})
REJECTIONS = [CONFLICT, Reply(422, b'{"detail": "duplicate"}'), Reply(422, USED), Reply(400, USED)]
REJECTS = Policy(idempotency=Idempotency.REJECT)


def rejecting(*faults: Fault, answer: Reply = CONFLICT, policy: Policy = REJECTS, **options) -> World:
    """Return a world whose target rejects a repeated key, and lists its requests."""
    service = FakeService(service_time=2.0, round_trip=0.1, faults=faults, rejects_repeats=answer, **options)
    return World(service, policy=policy, reconciles=True, price=PRICE, budget=100.0)


@dataclass(slots=True)
class LosesReplies(Fault):
    """The first `times` accepted submits lose their answers."""

    times: int = 1

    def accepted(self, attempt: Attempt, n: int) -> None:
        if self.times > 0:
            self.times -= 1
            raise CallFailed(Trouble("submit", "disconnected", detail="disconnected"))


@dataclass(slots=True)
class LosesSubmits(Fault):
    """The first `times` submits are lost before they arrive."""

    times: int = 1

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        if self.times > 0:
            self.times -= 1
            raise CallFailed(Trouble("submit", "reset", detail="reset"))
        return None


def attempts(world: World) -> set[int]:
    return {event.attempt for event in world.journal.events if isinstance(event, Intended)}


# --- a repeat is rejected, or accepted --------------------------------------------------------------------


@pytest.mark.parametrize("answer", REJECTIONS, ids=["409", "422", "422 key", "400 key"])
async def test_a_rejected_repeat_proves_that_the_first_one_was_accepted(answer):
    """The request is found in the listing and collected: never failed, never sent under another key."""
    world = rejecting(DropsAfterAccept(every=5), answer=answer)
    report = await world.run(jobs(50))
    assert (report.done, report.failed, report.held) == (50, 0, 0)
    assert world.service.accepted == 50
    assert world.service.posts > 50
    assert attempts(world) == {1}
    assert {facts["finding"] for facts in world.observer.actions("reconciled")} == {"adopted"}
    assert (await world.journal.counts()).spent_usd == pytest.approx(50 * 0.5 * 0.03)


async def test_an_accepted_repeat_proves_that_the_first_one_was_not():
    """The first submit was lost before it arrived: the same key is accepted, and nothing is unknown."""
    world = rejecting(DropsBeforeAccept(every=5))
    report = await world.run(jobs(50))
    assert (report.done, report.failed, report.held, world.service.accepted) == (50, 0, 0, 50)
    assert world.service.count("listing") == 0
    assert attempts(world) == {1}


async def test_a_repeat_goes_on_through_throttles_outages_and_gateways():
    """None of these answers is conclusive; the first conclusive one decides."""
    faults = [LosesReplies(), RefusesSubmits(429, first=2, times=2), RefusesSubmits(503, first=4, times=3)]
    world = rejecting(*faults, RefusesConnection(20.0, 300.0))
    report = await world.run(jobs(1))
    assert (report.done, report.failed, report.held, world.service.accepted) == (1, 0, 0, 1)
    assert world.service.posts > 6


@pytest.mark.parametrize("answer", REJECTIONS, ids=["409", "422", "422 key", "400 key"])
async def test_what_is_rejected_and_not_listed_is_held_for_good(answer):
    """It is paid for, so no policy and no --retry-failed sends it again; the listing shows it later."""
    policy = replace(REJECTS, resubmit_unknown_after=60.0, retry_failed=True)
    world = rejecting(LosesReplies(), answer=answer, listing=FakeListing(lag=20 * 86400.0), policy=policy)
    for _ in range(4):
        assert (await world.run(jobs(3))).held == 1
        world.again()
        await anyio.sleep(4 * 86400)
    assert world.service.accepted == 3
    assert attempts(world) == {1}
    await anyio.sleep(8 * 86400)
    report = await world.run(jobs(3))
    assert (report.done, report.held, world.service.accepted) == (1, 0, 3)


async def test_a_rejection_of_a_first_submit_is_about_its_input():
    """A plain 422: no earlier POST of this attempt can have arrived."""
    world = rejecting(RefusesSubmits(422, first=3, times=1))
    report = await world.run(jobs(5))
    assert (report.done, report.failed, report.held, world.service.accepted) == (4, 1, 0, 4)


async def test_a_first_submit_that_was_doubled_on_its_way_is_looked_up():
    """A proxy sent it twice, and only the second answer arrived: 409 to a first POST."""

    class Doubles(Fault):
        def accepted(self, attempt: Attempt, n: int) -> None:
            if n == 2:
                raise CallFailed(Trouble("submit", reply=CONFLICT))

    world = rejecting(Doubles())
    report = await world.run(jobs(5))
    assert (report.done, report.failed, report.held) == (5, 0, 0)
    assert world.service.posts == world.service.accepted == 5


# --- crashes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrives", [True, False], ids=["accepted", "lost on its way"])
async def test_a_submit_that_a_crash_cut_off_is_looked_up_then_repeated(arrives):
    """The next run finds it in the listing, or repeats it under the same key."""
    world = rejecting(*([] if arrives else [LosesSubmits(30)]))
    with anyio.move_on_after(0.15):
        await world.run(jobs(30))
    sent = world.service.posts
    assert sent > 0
    world.service.faults.clear()
    report = await world.again().run(jobs(30))
    assert (report.done, report.failed, report.held, world.service.accepted) == (30, 0, 0, 30)
    assert world.service.posts == (30 if arrives else 30 + sent)
    assert attempts(world) == {1}


async def test_a_repeat_that_a_crash_cuts_off_is_still_looked_up_from_its_first_submit_on():
    """The first POST was accepted half an hour before the repeat: the look-up uses the time of the first."""
    world = rejecting(LosesReplies(), listing=FakeListing(lag=7200.0))
    with anyio.move_on_after(0.15):
        await world.run(jobs(1))
    await anyio.sleep(1800)
    with anyio.move_on_after(0.15):
        await world.again().run(jobs(1))
    await anyio.sleep(7200)
    report = await world.again().run(jobs(1))
    assert (report.done, report.held, world.service.accepted) == (1, 0, 1)


async def test_a_repeat_is_looked_up_where_it_was_the_one_that_was_accepted():
    """The first POST was lost; the repeat 50 minutes later was accepted, and its answer was lost too."""
    world = rejecting(LosesSubmits(), LosesReplies())
    with anyio.move_on_after(0.15):
        await world.run(jobs(1))
    await anyio.sleep(3000)
    with anyio.move_on_after(0.25):  # the listing, then the repeat
        await world.again().run(jobs(1))
    assert world.service.accepted == 1
    await anyio.sleep(7200)
    report = await world.again().run(jobs(1))
    assert (report.done, report.held, world.service.accepted, world.service.posts) == (1, 0, 1, 2)


async def test_a_key_that_the_target_may_have_forgotten_is_not_repeated():
    """A forgotten key would be accepted as new, so after an hour only the listing counts."""
    world = rejecting(LosesReplies(), listing=FakeListing(lag=2 * REPEAT_SECONDS))
    with anyio.move_on_after(0.15):
        await world.run(jobs(1))
    world.service.forget_keys()
    await anyio.sleep(REPEAT_SECONDS)
    assert (await world.again().run(jobs(1))).held == 1
    assert world.service.posts == 1
    await anyio.sleep(REPEAT_SECONDS)
    report = await world.again().run(jobs(1))
    assert (report.done, report.held, world.service.posts) == (1, 0, 1)


async def test_an_outage_that_outlasts_the_key_ends_in_a_held_job():
    """The first answer was lost, then nothing could be sent for two hours: no late repeat, and no endless wait."""
    world = rejecting(
        LosesReplies(), RefusesConnection(0.15, 2 * REPEAT_SECONDS), listing=FakeListing(lag=3 * REPEAT_SECONDS)
    )
    assert (await world.run(jobs(1))).held == 1
    assert world.service.posts == 1
    assert anyio.current_time() < 1.1 * REPEAT_SECONDS
    await anyio.sleep(3 * REPEAT_SECONDS)
    report = await world.again().run(jobs(1))
    assert (report.done, report.held, world.service.posts) == (1, 0, 1)


async def test_reconciling_repeats_nothing():
    """`restyle reconcile` only looks up: a repeat could be the POST that is accepted."""
    world = rejecting(LosesSubmits(30))
    with anyio.move_on_after(0.15):
        await world.run(jobs(5))
    sent = world.service.posts
    report = await world.again().run([], replace(REJECTS, collect_only=True))
    assert (report.held, world.service.posts) == (sent, sent)
    report = await world.again().run(jobs(5))
    assert (report.done, report.held, world.service.accepted) == (5, 0, 5)


async def test_a_stop_leaves_a_doubted_submit_for_the_next_run():
    """After a refused account nothing is repeated, and nothing fails."""
    world = rejecting(LosesReplies(), RefusesSubmits(403, first=2))
    report = await world.run(jobs(1))
    assert (report.stopped.why, report.failed) == (StopCause.ACCOUNT, 0)
    world.service.faults.clear()
    report = await world.again().run(jobs(1))
    assert (report.held, world.service.accepted) == (0, 1)
    assert world.journal.state(jobs(1)[0].key) is State.DONE


async def test_a_new_attempt_after_a_failure_has_a_new_key():
    """The service ended the first attempt, so the second one has another key and is not rejected."""
    world = rejecting(CompletesWith("0 as", 503, "runner_disconnected", times=1), LosesReplies())
    report = await world.run(jobs(2))
    assert (report.done, report.held, world.service.accepted) == (2, 0, 3)


# --- replay, and ignored keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [DropsAfterAccept(every=3), DropsBeforeAccept(every=3)], ids=["accepted", "not"])
async def test_a_replayed_key_finds_its_request_without_a_listing(fault):
    """If keys are replayed, the answer to the repeat has the request id."""
    service = FakeService(honours_keys=True, faults=[fault])
    world = World(service, policy=Policy(idempotency=Idempotency.REPLAY))
    report = await world.run(jobs(60))
    assert (report.done, report.held, service.accepted, service.count("listing")) == (60, 0, 60, 0)


@pytest.mark.parametrize("status", [409, 422])
async def test_where_keys_are_ignored_no_answer_is_a_rejection(status):
    """409 is inconclusive: held. 422 concerns the input: failed. Neither is sent again."""
    world = World(FakeService(faults=[RefusesSubmits(status, first=2, times=1)]), reconciles=True)
    report = await world.run(jobs(5))
    assert (report.done, report.held, report.failed) == (4, 1 if status == 409 else 0, 0 if status == 409 else 1)
    assert world.service.posts == 5
