"""Budget in virtual time: reserved before, settled after, never above the limit, whatever fails."""

from __future__ import annotations

from datetime import date
from random import Random

import anyio
import pytest

from batch.journal.events import Answered, FailedForGood, Intended, Lost
from batch.journal.states import State
from batch.money import Price
from batch.run.admission import StopCause
from batch.run.context import Policy
from batch.run.observers import ProgressCounter
from batch.testing.journal import MemoryJournal
from batch.testing.service import (
    AnswersReadsWith,
    CompletesWith,
    DropsAfterAccept,
    DropsBeforeAccept,
    FakeService,
    RefusesSubmits,
)
from batch.types import Answer, Job
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))
BILLED = 0.015
"""Units that the fake bills for a success. A failure without units is charged as reserved."""
FUZZ = 1e-6


class Watched(MemoryJournal):
    """Checks the money after each event: within the limit, and covering all that the service may bill."""

    def __init__(self, service, limit):
        super().__init__()
        self.service, self.limit, self.looked = service, limit, 0

    async def record(self, *events):
        await super().record(*events)
        counts = await self.counts()
        held = counts.spent_usd + counts.reserved_usd
        assert held <= self.limit + FUZZ, events
        assert self.service.billable() <= held + FUZZ, events
        self.looked += 1


class Billing(FakeService):
    """Knows the true cost of each accepted request: half a unit for a success, nothing for a failure."""

    words = ("3 as", "5 as")

    def billable(self):
        fine = [r for r in self.requests.values() if not str(r.body["prompt"]).startswith(self.words)]
        return len(fine) * BILLED


class SaysNoUnits(FakeService):
    """A service that never sends `X-Fal-Billable-Units`."""

    async def result(self, ticket):
        answer = await super().result(ticket)
        return Answer(answer.output)


def spent_by_events(events):
    """Compute the same sum independently, from the events of all sessions."""
    total, attempts, unknown, answered = 0.0, {}, {}, set()
    for event in events:
        match event:
            case Intended():
                if event.attempt > attempts.get(event.job_key, 0):
                    total += unknown.pop(event.job_key, 0.0)
                    answered.discard(event.job_key)
                unknown.pop(event.job_key, None)
                attempts[event.job_key] = event.attempt
                attempts[event.job_key, "reserved"] = event.reserved_usd
            case Lost():
                unknown[event.job_key] = attempts[event.job_key, "reserved"]
            case Answered():
                unknown.pop(event.job_key, None)
                answered.add(event.job_key)
                total += event.cost_usd or 0.0
            case FailedForGood() if event.job_key not in answered:
                unknown.pop(event.job_key, None)
                total += event.cost_usd or 0.0
            case _:
                pass
    return total


async def money(world):
    counts = await world.journal.counts()
    return counts.spent_usd, counts.reserved_usd


def reservations(world):
    return [event.reserved_usd for event in world.journal.events if isinstance(event, Intended)]


# --- one job ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megapixels", "images", "usd"),
    [(0.3, 1, 0.03), (1.0, 1, 0.03), (1.05, 1, 0.06), (None, 1, 0.09), (1.05, 4, 0.24), (12.0, 1, 0.36)],
)
async def test_a_reservation_is_made_by_the_images_size(megapixels, images, usd):
    """Whole megapixels for each image; recorded in the intent, so it is durable before the POST."""
    job = jobs(1)[0]
    world = World(FakeService(), price=PRICE)
    await world.run([Job(job.key, {**job.input, "num_images": images}, megapixels=megapixels)])
    assert reservations(world) == [pytest.approx(usd)]
    assert await money(world) == (pytest.approx(BILLED), 0.0)


async def test_a_service_that_says_no_units_costs_what_was_reserved():
    """Without billed units, the higher estimate counts."""
    world = World(SaysNoUnits(), price=PRICE)
    await world.run(jobs(3))
    assert await money(world) == (pytest.approx(0.09), 0.0)


async def test_a_refused_submit_costs_nothing_and_frees_its_money():
    """A 429 and then a refusal: nothing was accepted."""
    faults = [RefusesSubmits(429, times=3, headers={"retry-after": "1"}), RefusesSubmits(422, first=4)]
    world = World(FakeService(faults=faults), price=PRICE, budget=0.03)
    report = await world.run(jobs(4))
    assert (report.failed, report.stopped) == (4, None)
    assert await money(world) == (0.0, 0.0)


async def test_an_unknown_submit_keeps_its_reservation():
    """It may have been accepted, so the money stays reserved."""
    world = World(FakeService(faults=[DropsAfterAccept(every=2)]), price=PRICE)
    await world.run(jobs(10))
    assert await money(world) == (pytest.approx(5 * BILLED), pytest.approx(5 * 0.03))
    await world.again().run(jobs(10))
    assert await money(world) == (pytest.approx(5 * BILLED), pytest.approx(5 * 0.03))


async def test_a_resubmitted_unknown_is_counted_twice():
    """Given up by policy: its reservation counts as spent, and the new attempt reserves again."""
    world = World(FakeService(faults=[DropsAfterAccept()]), price=PRICE, policy=Policy(resubmit_unknown_after=60.0))
    await world.run(jobs(2))
    world.service.faults.clear()
    await anyio.sleep(60)
    report = await world.again().run(jobs(2))
    assert report.done == 2
    assert world.service.accepted == 4
    assert await money(world) == (pytest.approx(2 * 0.03 + 2 * BILLED), 0.0)


async def test_a_service_fault_costs_nothing_and_each_attempt_is_reserved():
    """A 5xx is never billed; its new attempt reserves again."""
    fault = CompletesWith("0 as", 503, "runner_disconnected", times=1)
    world = World(FakeService(faults=[fault]), price=PRICE)
    await world.run(jobs(1))
    assert reservations(world) == [0.03, 0.03]
    assert await money(world) == (pytest.approx(BILLED), 0.0)


# --- the limit --------------------------------------------------------------------------------------------


async def test_a_budget_below_what_is_spent_submits_nothing_and_collects():
    """`--budget` may be lowered: paid results are collected, then the run stops with a reason."""
    world = World(FakeService(service_time=10.0), price=PRICE, window=8)
    with anyio.move_on_after(25):
        await world.run(jobs(100))
    assert (world.service.accepted, (await world.journal.counts()).by_state[State.ACCEPTED]) == (24, 8)
    world.limit = 0.01
    report = await world.again().run(jobs(100))
    assert (report.done, report.stopped.why, world.service.posts) == (8, StopCause.BUDGET, 24)
    assert "budget" in report.stopped.reason
    assert report.stopped.reason == (
        "$0.36 is spent or reserved and a job may cost $0.03: more than the budget of $0.01; raise it with --budget"
    )
    assert await money(world) == (pytest.approx(24 * BILLED), 0.0)


async def test_money_that_open_requests_of_an_earlier_run_hold_is_waited_for():
    """The run does not stop while open requests can still release money."""
    world = World(FakeService(service_time=10.0), price=PRICE, window=8)
    with anyio.move_on_after(1):
        await world.run(jobs(8))
    world.limit, world.window = 8 * 0.03, 20  # the window has room for all of them, the budget does not yet
    report = await world.again().run(jobs(12))
    assert (report.done, report.stopped) == (12, None)


async def test_an_attempt_that_does_not_fit_waits_for_a_larger_budget():
    """The failure is recorded, the job is pending, and the next run continues it."""
    fault = CompletesWith("0 as", 500, "internal_server_error", times=1, needs_retry=True)
    service = FakeService(service_time=5.0, faults=[fault, DropsAfterAccept(every=2)])
    world = World(service, price=PRICE, budget=0.06, window=2)
    report = await world.run(jobs(3))
    assert (report.stopped, report.held) != (None, 0)
    spent, reserved = await money(world)
    assert spent + reserved <= 0.06 + FUZZ
    world.limit, service.faults = 1.0, []
    report = await world.again().run(jobs(3))
    assert (await world.journal.counts()).by_state == {State.DONE: 2, State.UNKNOWN: 1}


def troubled(rng):
    """A service with every fault at once, at a speed chosen by the seed."""
    faults = [
        DropsAfterAccept(every=rng.randint(4, 9)),
        DropsBeforeAccept(every=rng.randint(5, 11)),
        RefusesSubmits(429, first=rng.randint(3, 9), times=2, headers={"retry-after": "1"}),
        AnswersReadsWith(rng.choice([401, 403, 500, 502]), every=rng.randint(3, 6)),
        CompletesWith("3 as", 503, "runner_disconnected"),
        CompletesWith("5 as", 422, "content_policy_violation"),
    ]
    return Billing(service_time=2.0, slots=rng.randint(2, 6), round_trip=0.05, faults=faults)


@pytest.mark.parametrize("seed", range(24))
async def test_spent_and_reserved_never_pass_the_limit(seed):
    """Lost answers, retries, resubmits, refusals, and a crash at any time of each session; checked at each event."""
    rng = Random(seed)
    service, limit = troubled(rng), rng.uniform(0.2, 1.0)
    policy = Policy(resubmit_unknown_after=rng.choice([None, 5.0]))
    world = World(service, price=PRICE, budget=limit, window=rng.randint(1, 9), policy=policy, seed=seed)
    world.journal = Watched(service, limit)
    made = [job._replace(megapixels=rng.choice([None, 0.4, 1.0, 1.7])) for job in jobs(40)]
    by_session = []
    for _ in range(5):
        before, _ = await money(world)
        with anyio.move_on_after(rng.choice([rng.uniform(0.0, 8.0), 1e6])):
            await world.run(made)
        by_session.append((await money(world))[0] - before)
        world.again()
    assert world.journal.looked > 10
    spent, _ = await money(world)
    assert sum(by_session) == pytest.approx(spent)
    assert spent == pytest.approx(spent_by_events(world.journal.events))
    outcomes = world.journal.outcomes([job.key for job in made])
    assert sum(outcome.cost_usd or 0.0 for outcome in outcomes.values()) == pytest.approx(spent)


# --- display during a run ---------------------------------------------------------------------------------


async def test_the_live_display_tells_this_run_and_all_runs_apart():
    """`spent` counts from zero in each session, the total over all of them."""
    world = World(FakeService(), price=PRICE)
    await world.run(jobs(10))
    first = world.observer.actions("spent")[-1]
    assert (first["usd"], first["total_usd"]) == (pytest.approx(10 * BILLED), pytest.approx(10 * BILLED))
    await world.again().run(jobs(30))
    last = world.observer.actions("spent")[-1]
    assert (last["usd"], last["total_usd"]) == (pytest.approx(20 * BILLED), pytest.approx(30 * BILLED))

    tally = ProgressCounter()
    for name, facts in world.observer.events:
        tally.happened(name, **facts)
    assert "$0.30 spent ($0.45 with earlier runs)" in tally.line()


async def test_one_run_alone_shows_one_sum():
    """Earlier runs are mentioned only if there are any."""
    tally = ProgressCounter()
    tally.happened("spent", usd=0.3, total_usd=0.3)
    assert tally.line().endswith("$0.30 spent")
