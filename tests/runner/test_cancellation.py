"""Cancellation of all open requests, many concurrently, with each answer counted correctly; in virtual time."""

from __future__ import annotations

from random import Random

import anyio
import pytest

from batch.errors import AccountRefused
from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import CancelOutcome, Reply
from batch.journal.events import Accepted, Intended
from batch.run.cancellation import AT_ONCE, Cancelled, cancel_open
from batch.testing.journal import MemoryJournal
from batch.types import JobKey, RequestId, Ticket

pytestmark = pytest.mark.anyio


class Target:
    """Answers each cancel after `seconds` with `answer(number, tries)`; an integer is the HTTP status of a failure."""

    def __init__(self, answer=lambda number, tries: CancelOutcome.REQUESTED, seconds=0.1):
        self.answer, self.seconds = answer, seconds
        self.tries, self.at_once, self.most_at_once = {}, 0, 0

    async def cancel(self, ticket):
        number = int(ticket.request_id)
        self.tries[number] = self.tries.get(number, 0) + 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await anyio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        said = self.answer(number, self.tries[number])
        if isinstance(said, int):
            raise CallFailed(
                Trouble("cancel", reply=Reply(said, b"", {"retry-after": "31536000"} if said == 429 else {}))
            )
        if said == "refused":
            raise CallFailed(Trouble("cancel", "refused", detail="nothing listens there"))
        return said


async def opened(count):
    """Return a journal with that many open requests, and one job that was never sent."""
    journal = MemoryJournal()
    for number in range(count + 1):
        key = JobKey(f"{number:032}")
        await journal.record(Intended(key, 1.0, 1, b"{}", 0.03))
        if number < count:
            await journal.record(
                Accepted(key, 2.0, Ticket(RequestId(str(number)), "http://x/s", "http://x/r", "http://x/c"))
            )
    return journal


async def cancelled(target, count, report=None):
    return await cancel_open(target, await opened(count), Random(7), report)


async def test_many_are_asked_at_once():
    """640 of 100 ms each take a second, at most 64 concurrently."""
    target = Target()
    journal, began = await opened(640), anyio.current_time()
    found = await cancel_open(target, journal, Random(7))
    assert anyio.current_time() - began == pytest.approx(640 / AT_ONCE * 0.1)
    assert (found.open, found.asked, found.requested, found.left) == (640, 640, 640, 0)
    assert (target.most_at_once, set(target.tries.values())) == (AT_ONCE, {1})


async def test_each_answer_is_counted_as_what_it_is():
    """Not found, too late and unanswered are different outcomes."""
    answers = [CancelOutcome.REQUESTED, CancelOutcome.ALREADY_COMPLETED, CancelOutcome.NOT_FOUND, 503, "refused"]
    target, report = Target(lambda number, tries: answers[number % 5]), []
    found = await cancelled(target, 50, report.append)
    assert found == Cancelled(asked=50, requested=10, too_late=10, not_found=10, unanswered=20, open=50)
    assert found.left == 20
    assert [one.asked for one in report] == list(range(51))
    assert report[-1] == found
    assert {target.tries[number] for number in range(0, 50, 5)} == {1}
    assert {target.tries[number] for number in range(3, 50, 5)} == {5}


async def test_a_passing_trouble_is_asked_again():
    """A cancel may be repeated: two bad answers, then the good one."""
    target = Target(lambda number, tries: CancelOutcome.REQUESTED if tries > 2 else 502)
    assert await cancelled(target, 100) == Cancelled(asked=100, requested=100, open=100)


async def test_a_target_that_is_not_there_is_given_up():
    """After too much silence the rest is not asked, and is left to the next call."""
    target = Target(lambda number, tries: "refused", seconds=0.0)
    found = await cancelled(target, 10_000)
    assert found.asked == found.unanswered < 4 * AT_ONCE
    assert found.left == found.open == 10_000


async def test_silence_in_between_gives_nothing_up():
    """If every second request gets an answer, all are asked."""
    target = Target(lambda number, tries: CancelOutcome.REQUESTED if number % 2 else 503)
    found = await cancelled(target, 1000)
    assert (found.asked, found.requested, found.unanswered) == (1000, 500, 500)


async def test_a_wait_of_a_year_is_not_waited():
    """A `Retry-After` longer than a minute counts as no answer."""
    began = anyio.current_time()
    assert (await cancelled(Target(lambda number, tries: 429), 10)).unanswered == 10
    assert anyio.current_time() - began < 61


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_refused_key_ends_it(status):
    """One error; the thousands of other requests are not asked."""
    target = Target(lambda number, tries: status)
    with pytest.raises(AccountRefused, match=f"HTTP {status}"):
        await cancelled(target, 5000)
    assert len(target.tries) <= 2 * AT_ONCE


async def test_it_can_be_left_and_begun_again():
    """The reported counts stay valid; the next call asks for everything that is still open."""
    target, report, journal = Target(), [], await opened(640)
    with anyio.move_on_after(0.45):
        await cancel_open(target, journal, Random(7), report.append)
    assert (report[-1].asked, report[-1].left) == (256, 384)
    assert (await cancel_open(target, journal, Random(7))).requested == 640


async def test_nothing_open_is_nothing_asked():
    """A job that was only intended is not cancelled."""
    target = Target()
    assert await cancelled(target, 0) == Cancelled()
    assert target.tries == {}
