"""The life of a job and its run, in virtual time against the fakes."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
from datetime import date

import anyio
import pytest
from PIL import Image

from batch.errors import StorageError
from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply
from batch.journal.events import Intended
from batch.journal.states import State
from batch.money import Price
from batch.run.admission import StopCause, StopRequest
from batch.run.context import Policy
from batch.run.interfaces import ImageError
from batch.run.pacing import TokenBucket
from batch.run.verdicts import Idempotency
from batch.run.window import Window
from batch.testing.images import MemoryImages
from batch.testing.service import (
    AnswersReadsWith,
    CompletesWith,
    DropsAfterAccept,
    DropsBeforeAccept,
    FakeService,
    RefusesConnection,
    RefusesSubmits,
    SendsDamagedFiles,
)
from batch.types import Job, LocalImage
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
PRICE = Price(0.03, date(2026, 11, 1))
REPLAYS = Policy(idempotency=Idempotency.REPLAY)


async def states(world):
    return (await world.journal.counts()).by_state


async def test_every_job_is_accepted_once_and_finished():
    """N jobs: N accepted submits, N done, every image stored."""
    world = World(FakeService(service_time=3.0))
    report = await world.run(jobs(120))
    assert (report.done, report.failed, report.held, report.stopped) == (120, 0, 0, None)
    assert world.service.accepted == world.service.posts == 120
    assert len(world.images.files) == 120


async def test_second_run_submits_nothing():
    """A finished run, started again, sends no request at all."""
    world = World(FakeService())
    await world.run(jobs(40))
    phases = ("submit", "status", "result", "download", "listing", "upload", "cancel")
    calls = [world.service.count(phase) for phase in phases]
    report = await world.again().run(jobs(40))
    assert report.done == 0
    assert [world.service.count(phase) for phase in phases] == calls
    assert calls[0] == 40


async def test_equal_rows_are_one_job_across_and_within_batches():
    """The same key, repeated near and far apart, is paid once."""
    made = jobs(60)
    world = World(FakeService(service_time=0.5))
    await world.run(made + made[:10] + made + [made[0]] * 120)
    assert world.service.accepted == 60


async def test_window_bounds_what_is_in_flight():
    """The service never has more jobs than the window allows."""
    service = FakeService(service_time=10.0)
    world = World(service, window=7)
    await world.run(jobs(30))
    starts = sorted(r.accepted_at for r in service.requests.values())
    for request in service.requests.values():
        overlapping = sum(1 for s in starts if s <= request.accepted_at < s + 10.0)
        assert overlapping <= 7


@pytest.mark.slow
async def test_auto_window_fills_the_slots_without_piling_up():
    """With 20 slots an automatic window keeps them full and queues little more than another 20."""
    service = FakeService(service_time=5.0, slots=20)
    window = Window(8, floor=2, ceiling=1000)
    world = World(service, window=window)
    await world.run(jobs(1500))
    ended = max(r.ends_at for r in service.requests.values())
    assert ended <= 1.10 * 1500 / 20 * 5.0
    assert 20 <= window.size <= 50


async def test_submits_keep_the_rate():
    """submits_per_second is an upper bound over any second."""
    service = FakeService(service_time=0.1)
    world = World(service, window=500, submits=TokenBucket(10.0, burst=1))
    await world.run(jobs(100))
    times = sorted(r.accepted_at for r in service.requests.values())
    for start in times:
        assert sum(1 for t in times if start <= t < start + 0.999) <= 11


async def test_lost_reply_is_one_post_and_held():
    """Without an idempotency key a lost answer means one POST, and the job is held as unknown."""
    world = World(FakeService(faults=[DropsAfterAccept(every=5)]))
    report = await world.run(jobs(50))
    assert world.service.posts == 50
    assert (report.done, report.held) == (40, 10)
    assert (await states(world))[State.UNKNOWN] == 10
    assert (await world.again().run(jobs(50))).held == 10
    assert world.service.posts == 50


async def test_lost_reply_is_repeated_under_the_same_key_where_honoured():
    """If the target honours the key, a submit without an answer is repeated: accepted once, nothing held."""
    world = World(
        FakeService(honours_keys=True, faults=[DropsAfterAccept(every=3)]),
        policy=REPLAYS,
    )
    report = await world.run(jobs(60))
    assert (report.done, report.held, world.service.accepted) == (60, 0, 60)
    assert world.service.posts > 60


async def test_unknown_is_resubmitted_only_after_the_policy_says():
    """resubmit-after: held before, a new attempt after."""
    world = World(FakeService(faults=[DropsBeforeAccept(every=5)]), policy=Policy(resubmit_unknown_after=3600.0))
    report = await world.run(jobs(10))
    assert (report.done, report.held, world.service.posts) == (8, 2, 10)
    world.service.faults.clear()
    assert (await world.again().run(jobs(10))).held == 2
    await anyio.sleep(3600)
    report = await world.again().run(jobs(10))
    assert (report.done, report.held, world.service.posts) == (2, 0, 12)


async def test_refused_connection_waits_and_goes_on():
    """Offline for ten minutes: nothing was sent, nothing is lost, nothing is paid twice."""
    world = World(FakeService(service_time=2.0, faults=[RefusesConnection(since=5.0, until=605.0)]))
    report = await world.run(jobs(80))
    assert (report.done, world.service.accepted, report.held) == (80, 80, 0)
    assert world.observer.actions("unreachable")


async def test_throttled_submits_wait_for_retry_after():
    """429 with Retry-After: no submit in that time, and all jobs done."""
    fault = RefusesSubmits(429, first=5, times=3, headers={"retry-after": "30"})
    service = FakeService(service_time=1.0, faults=[fault])
    report = await World(service, window=4).run(jobs(20))
    assert report.done == 20
    times = sorted(r.accepted_at for r in service.requests.values())
    assert max(b - a for a, b in itertools.pairwise(times)) >= 30


@pytest.mark.parametrize("status", [401, 403, 408, 409, 429, 500, 502, 503, 504])
async def test_reads_that_say_nothing_change_nothing(status):
    """A third of all reads answered by the gateway: every job is done, each paid once."""
    world = World(FakeService(service_time=2.0, faults=[AnswersReadsWith(status, every=3)]))
    report = await world.run(jobs(40))
    assert (report.done, report.failed, world.service.accepted) == (40, 0, 40)


async def test_refused_key_stops_submits_and_collects():
    """403 on a submit: nothing new is sent, accepted jobs are collected, the reason is kept."""
    world = World(FakeService(service_time=5.0, faults=[RefusesSubmits(403, first=11)]), window=5)
    report = await world.run(jobs(100))
    assert report.stopped.why is StopCause.ACCOUNT
    assert report.done == world.service.accepted == 10
    world.service.faults.clear()
    report = await world.again().run(jobs(100))
    assert (report.done, report.stopped, world.service.accepted) == (90, None, 100)


async def test_policy_violation_is_a_failed_job_and_never_retried():
    """A 422 of the job itself: failed once, one accepted request, unchanged in the next run."""
    world = World(FakeService(faults=[CompletesWith("3 as", 422, "content_policy_violation")]))
    report = await world.run(jobs(10))
    assert (report.done, report.failed, world.service.accepted) == (9, 1, 10)
    report = await world.again().run(jobs(10))
    assert (report.failed, world.service.accepted) == (0, 10)


async def test_retryable_failure_is_a_new_attempt_up_to_the_limit():
    """A failure that the service calls retryable: a new attempt, at most `attempts` in total."""
    once = CompletesWith("3 as", 503, "runner_disconnected", times=1)
    world = World(FakeService(faults=[once]))
    report = await world.run(jobs(10))
    assert (report.done, report.failed, world.service.accepted) == (10, 0, 11)
    always = CompletesWith("3 as", 500, "internal_server_error", needs_retry=True)
    world = World(FakeService(faults=[always]), policy=Policy(attempts=4))
    report = await world.run(jobs(10))
    assert (report.done, report.failed, world.service.accepted) == (9, 1, 13)


async def test_retry_failed_takes_failed_jobs_up_again_once():
    """--retry-failed: failed jobs of earlier runs get one new attempt, under a new idempotency key."""
    fault = CompletesWith("3 as", 422, "file_download_error")
    service = FakeService(honours_keys=True, faults=[fault])
    world = World(service, policy=REPLAYS)
    made = jobs(10)
    await world.run(made)
    report = await world.again().run(made + made, Policy(retry_failed=True, idempotency=Idempotency.REPLAY))
    assert (report.failed, service.accepted) == (1, 11)
    service.faults.clear()
    report = await world.again().run(made, Policy(retry_failed=True, idempotency=Idempotency.REPLAY))
    assert (report.done, service.accepted) == (1, 12)


async def test_damaged_downloads_are_fetched_again():
    """Half of all downloads are damaged: every image is stored whole."""
    world = World(FakeService(faults=[SendsDamagedFiles(every=2)]))
    report = await world.run(jobs(30))
    assert (report.done, report.failed) == (30, 0)


class LacksDescriptors(MemoryImages):
    """No descriptor is free for the first few images that are read, nor for the first few that are written."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.reads = self.writes = times

    async def load(self, image):
        if self.reads:
            self.reads -= 1
            raise ImageError("image_load_error", "cannot be read") from OSError(errno.EMFILE, "Too many open files")
        return await super().load(image)

    async def store(self, data):
        if self.writes:
            self.writes -= 1
            raise StorageError("cannot be written") from OSError(errno.ENFILE, "Too many open files in system")
        return await super().store(data)


async def test_an_image_for_which_no_descriptor_is_free_is_tried_again():
    """It may last far longer than a job: no row fails, the run does not stop, and a notice is shown."""
    world = World(FakeService())
    world.images = LacksDescriptors(300)
    made = [job._replace(image=a_image((number, 0, 0)), megapixels=0.1) for number, job in enumerate(jobs(5))]
    report = await world.run(made)
    assert (report.done, report.failed, report.stopped) == (5, 0, None)
    assert (world.images.reads, world.images.writes) == (0, 0)
    assert "ulimit -n" in world.observer.actions("unreachable")[0]["reason"]


async def test_budget_is_never_passed():
    """A budget for ten jobs: ten jobs, a stop with a reason, never a cent more."""
    world = World(FakeService(service_time=1.0), price=PRICE, budget=0.30)
    report = await world.run(jobs(50))
    assert report.stopped.why is StopCause.BUDGET
    counts = await world.journal.counts()
    assert counts.spent_usd + counts.reserved_usd <= 0.30 + 1e-9
    # The fake bills half of the reservation, so the released half is spent too.
    assert report.done == 19
    report = await world.again().run(jobs(50))
    assert report.done == 0
    world.limit = None
    assert (await world.again().run(jobs(50))).done == 31


async def test_held_reservations_do_not_hang_a_budget():
    """Money reserved for an unknown submit is not waited for: the run stops."""
    world = World(FakeService(faults=[DropsAfterAccept()]), price=PRICE, budget=0.09)
    report = await world.run(jobs(10))
    assert (report.held, report.stopped.why) == (3, StopCause.BUDGET)


async def test_too_many_failures_stop_the_run():
    """max_failures: a run in which everything fails stops early and names the errors."""
    world = World(
        FakeService(faults=[CompletesWith("as", 422, "image_load_error")]), policy=Policy(max_failure_share=0.5)
    )
    report = await world.run(jobs(500))
    assert report.stopped.why is StopCause.FAILURES
    assert "image_load_error" in report.stopped.reason
    assert report.failed < 60


async def test_deadline_stops_submits_and_collects_in_time():
    """The run ends within its deadline; accepted jobs are in the journal, resumable."""
    service = FakeService(service_time=10.0)
    world = World(service, window=10, policy=Policy(deadline=100.0, drain=20.0))
    began = anyio.current_time()
    report = await world.run(jobs(1000))
    assert report.stopped.why is StopCause.DEADLINE
    assert anyio.current_time() - began <= 101
    assert report.done == service.accepted
    report = await world.again().run(jobs(200), Policy())
    assert service.accepted == 200


async def test_signal_collects_what_is_in_flight_and_a_second_one_does_not():
    """First stop: jobs in flight are collected within the drain. Second: stops at once, and the next run collects."""
    for again, done in ((False, 8), (True, 0)):
        service = FakeService(service_time=30.0)
        world = World(service, window=8)
        async with anyio.create_task_group() as tasks:

            async def interrupt(world=world, again=again):
                await anyio.sleep(10)
                world.runner.stop(StopCause.SIGNAL, "SIGINT")
                if again:
                    await anyio.sleep(1)
                    world.runner.stop(StopCause.SIGNAL, "SIGINT")

            tasks.start_soon(interrupt)
            report = await world.run(jobs(100))
        assert report.done == done
        assert service.accepted == 8
        report = await world.again().run(jobs(100))
        assert service.accepted == 100


async def stopped_run(world, *moments, made=None, why=StopCause.SIGNAL):
    """Run, stop at these moments, and return the report."""
    async with anyio.create_task_group() as tasks:

        async def stop():
            for moment in moments:
                await anyio.sleep_until(moment)
                world.runner.stop(why, "SIGINT")

        tasks.start_soon(stop)
        return await world.run(made or jobs(100))


async def test_an_intent_that_is_written_when_the_run_stops_is_not_sent():
    """A slow disk: the stop comes while intents are being written. They are withdrawn, and nothing is held."""
    for budget in (None, 100.0):
        world = World(FakeService(), window=8, price=None if budget is None else PRICE, budget=budget)
        record = world.journal.record

        async def slowly(*events, record=record):
            await record(*events)
            if isinstance(events[0], Intended):
                await anyio.sleep(3.0)

        world.journal.record = slowly
        began = anyio.current_time()
        report = await stopped_run(world, began + 2.0)
        assert (report.done, report.held, world.service.posts) == (0, 0, 0)
        assert await states(world) == {State.PENDING: 8}
        assert (await world.journal.counts()).reserved_usd == 0.0
        world.journal.record = record
        assert (await world.again().run(jobs(100))).done == 100
        assert world.service.posts == 100


@pytest.mark.parametrize("why", [StopCause.SIGNAL, StopCause.CANCELLED])
async def test_a_doubtful_submit_is_not_sent_again_by_a_run_that_ends_soon(why):
    """The next run repeats it under its key. This run ends at once, because there is nothing to collect."""
    service = FakeService(honours_keys=True, faults=[DropsAfterAccept()])
    world = World(service, window=4, policy=Policy(idempotency=Idempotency.REPLAY))
    began = anyio.current_time()
    report = await stopped_run(world, began + 20.0, why=why)
    posts = service.posts
    assert (report.done, report.stopped.why, service.accepted) == (0, why, 4)
    assert anyio.current_time() - began < 21
    service.faults.clear()
    assert (await world.again().run(jobs(100))).done == 100
    assert (service.accepted, service.posts) == (100, posts + 100)


async def test_a_signal_bounds_a_stop_that_would_collect_all():
    """After too many failures everything paid is collected; the first Ctrl-C limits that to `drain` seconds."""
    for moments, seconds in (((10.0,), 70.0), ((10.0, 12.0), 12.0)):
        fails = CompletesWith("as", 422, "image_load_error", times=1)
        service = FakeService(service_time=lambda n: 1.0 if n == 1 else 600.0, faults=[fails])
        world = World(service, window=8, policy=Policy(max_failures=0))
        began = anyio.current_time()
        report = await stopped_run(world, *(began + moment for moment in moments))
        assert (report.stopped.why, report.done) == (StopCause.FAILURES, 0)
        assert anyio.current_time() - began == pytest.approx(seconds, abs=0.1)


async def test_crash_anywhere_then_resume_pays_once():
    """A run killed at any moment and resumed to the end: each job accepted once, with a server that honours keys."""
    for moment in [0.0, 0.5, 1.0, 1.01, 1.5, 2.0, 2.2, 3.1, 4.9]:
        service = FakeService(service_time=1.0, honours_keys=True, round_trip=0.05)
        world = World(service, window=5, policy=REPLAYS)
        with anyio.move_on_after(moment):
            await world.run(jobs(20))
        report = await world.again().run(jobs(20))
        assert service.accepted == 20, moment
        assert report.held == 0
        assert (await states(world))[State.DONE] == 20


async def test_crash_without_keys_holds_what_it_cannot_know():
    """Killed between intent and answer, with a server that ignores keys: never a second POST for that job."""
    service = FakeService(service_time=1.0, round_trip=0.05)
    world = World(service, window=5)
    with anyio.move_on_after(0.03):
        await world.run(jobs(20))
    report = await world.again().run(jobs(20))
    assert report.held == 5
    assert service.posts == 15


def a_image(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    data = buffer.getvalue()
    return LocalImage(hashlib.sha256(data).hexdigest(), len(data), data=data)


async def test_local_image_is_uploaded_once_for_all_its_jobs():
    """Eight jobs with one image: one upload, and its URL in every body."""
    image = a_image("teal")
    made = [Job(j.key, {**j.input, "image_url": f"sha256:{image.sha256}"}, image, 0.1) for j in jobs(8)]
    world = World(FakeService(round_trip=0.1))
    report = await world.run(made)
    assert (report.done, world.service.count("upload")) == (8, 1)
    assert all(str(body["image_url"]).startswith("fake://uploads/") for body in world.service.bodies)


async def test_few_images_are_on_their_way_up_at_once():
    """A hundred jobs in flight, each with its own image: sixteen images in memory, for any window."""
    under_way = []

    class Slow(FakeService):
        async def upload(self, data, content_type, name):
            under_way.append(data)
            seen.append(len(under_way))
            await anyio.sleep(1.0)
            under_way.remove(data)
            return await super().upload(data, content_type, name)

    seen = []
    made = [j._replace(image=a_image((number, 0, 0)), megapixels=0.1) for number, j in enumerate(jobs(100))]
    assert (await World(Slow(round_trip=0.1), window=100).run(made)).done == 100
    assert max(seen) == 16


async def test_images_that_are_refused_hold_up_no_others():
    """The storage never accepts sixteen images, as many as are uploaded concurrently: all others arrive."""
    refused = {a_image((number, 0, 0)).data for number in range(16)}

    class Picky(FakeService):
        async def upload(self, data, content_type, name):
            if data in refused:
                raise CallFailed(Trouble("upload", reply=Reply(503, b"")))
            return await super().upload(data, content_type, name)

    made = [j._replace(image=a_image((number, 0, 0)), megapixels=0.1) for number, j in enumerate(jobs(100))]
    world = World(Picky(round_trip=0.1), window=100)
    with anyio.move_on_after(60):
        await world.run(made)
    assert world.service.count("upload") == 84


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_refused_account_is_noticed_at_the_first_upload(status):
    """Before any submit the run stops as if the submit had been refused; nothing was sent, nothing failed."""

    class Closed(FakeService):
        async def upload(self, data, content_type, name):
            raise CallFailed(Trouble("initiate", reply=Reply(status, b'{"detail": "no such key"}')))

    made = [j._replace(image=a_image((number, 0, 0)), megapixels=0.1) for number, j in enumerate(jobs(40))]
    began = anyio.current_time()
    world = World(Closed())
    report = await world.run(made)
    assert report.stopped == StopRequest(StopCause.ACCOUNT, "no such key")
    assert (report.done, report.failed, world.service.posts) == (0, 0, 0)
    assert anyio.current_time() - began < 15


async def test_a_stop_does_not_wait_for_a_storage_that_refuses():
    """Jobs whose images were not uploaded were never submitted, so the stop turns them back."""

    class Refusing(FakeService):
        async def upload(self, data, content_type, name):
            raise CallFailed(Trouble("upload", reply=Reply(503, b"")))

    world = World(Refusing())
    made = [j._replace(image=a_image((number, 0, 0)), megapixels=0.1) for number, j in enumerate(jobs(4))]
    async with anyio.create_task_group() as tasks:

        async def stop():
            await anyio.sleep(5)
            world.runner.stop(StopCause.FAILURES, "enough")

        tasks.start_soon(stop)
        report = await world.run(made)
    assert (report.done, report.failed, report.stopped.why) == (0, 0, StopCause.FAILURES)
    assert anyio.current_time() < 60


async def test_unreadable_image_is_a_failed_row_and_nothing_is_sent():
    """A truncated local image: failed with the endpoint's error type, no POST."""
    image = LocalImage("00", 3, data=b"\xff\xd8\xff")
    job = jobs(1)[0]
    world = World(FakeService())
    report = await world.run([Job(job.key, job.input, image)])
    assert (report.failed, world.service.posts) == (1, 0)
    assert world.observer.actions("failed")[0]["error_type"] == "image_load_error"


async def test_full_disk_stops_in_order():
    """A journal that cannot be written stops the run with its error."""
    world = World(FakeService(service_time=1.0))
    record, calls = world.journal.record, 0

    async def full(*events):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise StorageError("no space left")
        await record(*events)

    world.journal.record = full
    with pytest.raises(StorageError, match="no space left"):
        await world.run(jobs(50))


async def test_polls_are_few_and_notice_soon():
    """Once the speed is known, a job of 5 s takes at most three reads and is noticed within 10%."""
    service = FakeService(service_time=5.0)
    world = World(service, window=10)
    began = anyio.current_time()
    await world.run(jobs(300))
    assert service.count("status") / 300 <= 4
    assert anyio.current_time() - began <= 1.15 * 300 / 10 * 5.0
