"""No wait is endless: unknown, meaningless and unreadable statuses; in virtual time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import anyio
import orjson
import pytest

from batch.fal.errors import CallFailed, Trouble
from batch.fal.protocol import Reply, read_status, request_error_reply
from batch.journal.states import State
from batch.run.poll_schedule import PollSchedule
from batch.run.waits import Positions, Stage
from batch.testing.service import FakeService
from batch.types import TicketStatus
from tests.runner.world import World, jobs

pytestmark = pytest.mark.anyio
HOUR = 3600.0
BOUND = PollSchedule.OVERDUE_SECONDS
AFTER = BOUND + 2 * PollSchedule.LONGEST
"""Latest time of a read after the limit: statuses are read at least every ten seconds."""
PAGE = Reply(502, b"<html>bad gateway</html>")
IN_PROGRESS = Reply(400, b'{"detail":"Request is still in progress"}')
GONE = Reply(404, b'{"detail":"Not found"}')


def said(word, **more) -> TicketStatus:
    """Return the status of an answer."""
    return read_status(Reply(200, orjson.dumps({"status": word, **more})))


def redirected(phase="status") -> Trouble:
    return Trouble(phase, "redirect", detail=f"HTTP 302 redirects to https://evil.example:443 ({phase})")


class Odd(FakeService):
    """Answers statuses and results as the test says; None: like the fake."""

    def __init__(self, *, status=lambda request: None, result=lambda request: None, **options):
        super().__init__(**options)
        self.answers = {"status": status, "result": result}
        self.asked: dict[str, list[float]] = {"status": [], "result": []}
        """Times of reads, since the acceptance of each request."""

    async def status(self, ticket):
        real = await super().status(ticket)
        odd = self.odd("status", ticket)
        return real if odd is None else odd

    async def result(self, ticket):
        self.odd("result", ticket)
        return await super().result(ticket)

    def odd(self, phase, ticket):
        request = self.requests[ticket.request_id]
        self.asked[phase].append(anyio.current_time() - request.accepted_at)
        answer = self.answers[phase](request)
        if isinstance(answer, Trouble):
            raise CallFailed(replace(answer, phase=phase))
        if isinstance(answer, Reply):
            raise CallFailed(Trouble(phase, reply=answer, detail=f"HTTP {answer.status}"))
        return answer


def failures(world):
    return [(facts["error_type"], facts["message"]) for facts in world.observer.actions("failed")]


def warnings(world):
    return [str(facts["reason"]) for facts in world.observer.actions("warning")]


# --- status words for an end ------------------------------------------------------------------------------

OWN = request_error_reply(500, "gpu_error", "the GPU fell off")


@pytest.mark.parametrize("word", ["FAILED", "Error", "CANCELLED", "canceled", "timed out"])
@pytest.mark.parametrize(
    ("result", "error"),
    [
        (None, None),
        (OWN, "gpu_error"),
        (GONE, "word"),
        (IN_PROGRESS, "word"),
        (Reply(500, b"<html>"), "word"),
        (Trouble("result", "malformed", detail="seed: Input should be a valid integer"), "word"),
    ],
    ids=["output", "own error", "404", "in progress", "page", "malformed"],
)
async def test_a_word_for_a_failure_leads_to_one_read_of_the_result(word, result, error):
    """An output is done, an error in fal's form is that error, anything else fails with the word; at once."""
    service = Odd(status=lambda _: said(word, error="no luck"), result=lambda _: result, service_time=0.0)
    world = World(service)
    report = await world.run(jobs(3))
    assert (report.done, report.failed) == ((3, 0) if error is None else (0, 3))
    assert (len(service.asked["result"]), service.posts) == (3, 3)
    assert max(service.asked["result"]) < 2
    if error == "word":
        kind, message = failures(world)[0]
        assert kind == word.lower().replace(" ", "_")
        assert message.startswith(f"status {word}: no luck (result: ")
    elif error is not None:
        assert failures(world)[0] == (error, "the GPU fell off")


async def test_an_error_of_the_service_that_may_go_better_is_tried_again_after_such_a_word():
    """As after COMPLETED."""
    odd = request_error_reply(503, "runner_disconnected", "gone")
    service = Odd(
        status=lambda _: said("FAILED"), result=lambda r: odd if r.id == "request-0" else None, service_time=0
    )
    report = await World(service).run(jobs(1))
    assert (report.done, service.posts) == (1, 2)


@pytest.mark.parametrize(
    "fault", [Trouble("result", "reset"), Reply(429), Reply(403, b'{"detail":"no"}'), PAGE], ids=str
)
async def test_after_such_a_word_a_result_that_is_not_answered_is_read_a_few_times(fault):
    """The result exists at the third try, or never: either way it is over within seconds."""
    service = Odd(status=lambda _: said("FAILED"), service_time=0.0)
    service.answers["result"] = lambda _: fault if len(service.asked["result"]) < 3 else None
    assert (await World(service).run(jobs(1))).done == 1
    service = Odd(status=lambda _: said("FAILED"), result=lambda _: fault, service_time=0.0)
    world = World(service)
    report = await world.run(jobs(1))
    assert (report.failed, report.stopped, len(service.asked["result"])) == (1, None, 6)
    assert failures(world)[0][0] == "failed"
    assert service.asked["result"][-1] < 20


@pytest.mark.parametrize("word", ["completed", "SUCCEEDED", "success", "OK", "done"])
async def test_other_words_for_an_end_are_ends(word):
    """And words for running count as running."""
    running = ["queued", "PENDING", "in_progress", "processing"]

    def status(request):
        return said(word if request.reads > 4 else running[request.reads % 4])

    service = Odd(status=status, service_time=0.0)
    assert (await World(service).run(jobs(5))).done == 5
    assert max(service.asked["result"]) < 60


# --- statuses without meaning -----------------------------------------------------------------------------

NOTHING = {
    "unknown": lambda request: said("BANANA"),
    "missing": lambda request: read_status(Reply(200, b"{}")),
    "null": lambda request: said(None),
    "number": lambda request: said(7),
    "other each time": lambda request: said(f"BANANA {request.reads * 'x'}"),
    "stuck": lambda request: said("IN_PROGRESS"),
    "stuck in the queue": lambda request: said("IN_QUEUE", queue_position=0),
    "page": lambda request: PAGE,
    "no JSON": lambda request: Trouble("status", "malformed", detail="not JSON"),
    "silent": lambda request: Trouble("status", "timeout"),
    "refused": lambda request: Reply(422, b'{"detail":"no status here"}'),
    "redirected": lambda request: redirected(),
}


@pytest.mark.parametrize("name", NOTHING)
async def test_after_ten_minutes_the_result_is_read_whatever_the_status_says(name):
    """The result existed for a long time: it is read once, and not earlier."""
    service = Odd(status=NOTHING[name], service_time=20.0)
    assert (await World(service).run(jobs(4))).done == 4
    assert len(service.asked["result"]) == 4
    assert min(service.asked["result"]) >= BOUND
    assert max(service.asked["result"]) <= AFTER + 60  # a failing status is read with growing pauses, up to 30 s


@pytest.mark.parametrize("name", ["unknown", "stuck", "page"])
async def test_after_ten_times_the_usual_duration_where_that_is_longer(name):
    """Jobs of 100 s: 1,000 s."""
    service = Odd(service_time=100.0)
    service.answers["status"] = lambda r: NOTHING[name](r) if r.id == "request-30" else None
    assert (await World(service, window=4).run(jobs(40))).done == 40
    (latest,) = [at for at in service.asked["result"] if at > 300]
    assert 900 <= latest <= 1100


@pytest.mark.parametrize("name", ["unknown", "missing", "stuck", "page", "redirected"])
async def test_a_result_that_is_not_there_is_read_at_growing_intervals(name):
    """The job takes five hours: some early reads, at growing intervals of at most half an hour; then it is done."""
    service = Odd(status=NOTHING[name], service_time=5 * HOUR)
    assert (await World(service).run(jobs(1))).done == 1
    times = service.asked["result"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) <= 16
    assert gaps[0] >= 290
    assert all(later >= min(earlier, 1700) for earlier, later in itertools.pairwise(gaps))
    assert max(gaps) <= PollSchedule.OVERDUE_LONGEST + 60
    assert times[-1] - 5 * HOUR <= PollSchedule.OVERDUE_LONGEST + 60


@pytest.mark.parametrize("name", ["unknown", "missing", "refused", "redirected"])
@pytest.mark.parametrize(
    ("result", "error", "hours"),
    [
        (
            Reply(422, b'{"detail":[{"loc":["body"],"msg":"too small","type":"image_too_small"}]}'),
            "image_too_small",
            0.3,
        ),
        (GONE, "http_404", 9),
        (OWN, "gpu_error", 7),
        (Trouble("result", "malformed", detail="not JSON"), "malformed_output", 9),
    ],
    ids=["own error", "404", "5xx", "malformed"],
)
async def test_where_the_status_says_nothing_a_failure_of_the_result_is_believed(name, result, error, hours):
    """At once if it is the job's own error, after the usual number of reads if it may be temporary; always bounded."""
    service = Odd(status=NOTHING[name], result=lambda _: result, service_time=0.0)
    world = World(service)
    assert (await world.run(jobs(1))).failed == 1
    assert failures(world)[0][0] == error
    assert service.asked["result"][0] >= BOUND
    assert service.asked["result"][-1] <= hours * HOUR


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("stuck", Reply(422, b'{"detail":"no"}')),
        ("stuck in the queue", GONE),
        ("page", OWN),
        ("no JSON", GONE),
        ("silent", OWN),
    ],
    ids=lambda value: value if isinstance(value, str) else value.status,
)
async def test_what_runs_or_cannot_be_reached_is_not_failed_by_its_result(name, result):
    """Neither an outage of nine hours nor odd answers to early reads fail a job."""
    over = 9 * HOUR

    def until(answer):
        return lambda request: answer(request) if anyio.current_time() - request.accepted_at < over else None

    service = Odd(status=until(NOTHING[name]), result=until(lambda _: result), service_time=over - 100)
    report = await World(service).run(jobs(1))
    assert (report.done, report.failed, service.posts) == (1, 0, 1)
    assert len(service.asked["result"]) > 16


async def test_an_unknown_status_of_an_earlier_run_leads_to_the_result_at_once():
    """It has been open for a day."""
    service = Odd(status=NOTHING["unknown"], service_time=20.0)
    world = World(service)
    with anyio.move_on_after(30):
        await world.run(jobs(3))
    await anyio.sleep(24 * HOUR)
    began = anyio.current_time()
    assert (await world.again().run(jobs(3))).done == 3
    assert anyio.current_time() - began < 60


async def test_an_unknown_word_is_told_once():
    """The warning has the request and what follows; if the words keep changing, only some are reported."""
    world = World(Odd(status=NOTHING["unknown"], service_time=20.0))
    await world.run(jobs(10))
    (warning,) = [text for text in warnings(world) if "unknown status" in text]
    assert warning.startswith("request request-")
    assert warning.endswith(": unknown status 'BANANA'; it counts as running, its result is read after 10 min")
    world = World(Odd(status=NOTHING["other each time"], service_time=20.0))
    await world.run(jobs(10))
    assert len([text for text in warnings(world) if "unknown status" in text]) == 5
    world = World(Odd(status=NOTHING["missing"], service_time=20.0))
    await world.run(jobs(1))
    assert "request request-0: a status answer without a status; it counts as running" in warnings(world)[0]


async def test_queue_positions_without_sense_hold_up_nothing():
    """Absurd queue positions, one less each time: the jobs are still noticed."""

    def status(request):
        if anyio.current_time() < request.ends_at:
            return said("IN_QUEUE", queue_position=10**15 - request.reads)
        return None

    service = Odd(status=status, service_time=lambda n: 10.0 if n < 20 else 1000.0)
    assert (await World(service, window=5).run(jobs(25))).done == 25
    late = max(request.noticed_at - request.ends_at for request in service.requests.values())
    assert late <= PollSchedule.LONGEST_QUEUED + 10


# --- redirects that are not followed ----------------------------------------------------------------------


async def test_a_result_that_is_redirected_elsewhere_ends_after_the_bound_with_the_sentence():
    """After the limit it fails with its reservation, and the job can be resumed."""
    service = Odd(result=lambda _: redirected("result"), service_time=5.0)
    world = World(service)
    assert (await world.run(jobs(2))).failed == 2
    kind, message = failures(world)[0]
    assert (kind, message) == ("redirect", "HTTP 302 redirects to https://evil.example:443 (result)")
    assert BOUND <= max(service.asked["result"]) <= AFTER + 60
    assert any("evil.example" in str(facts["reason"]) for facts in world.observer.actions("unreachable"))


async def test_a_status_and_a_result_that_are_redirected_elsewhere_end_after_the_bound():
    """One read of the result is enough then."""
    service = Odd(status=lambda _: redirected(), result=lambda _: redirected("result"), service_time=5.0)
    world = World(service)
    assert (await world.run(jobs(2))).failed == 2
    assert failures(world)[0] == ("redirect", "HTTP 302 redirects to https://evil.example:443 (result)")
    assert len(service.asked["result"]) == 2
    assert BOUND <= min(service.asked["result"]) <= AFTER + 60


@pytest.mark.parametrize("phase", ["status", "result"])
async def test_a_redirect_that_passes_costs_no_job(phase):
    """A network that requires a login for nine minutes, repeatedly; also in a run that resumes old jobs."""

    def portal(request):
        return redirected(phase) if anyio.current_time() % 1000 < 540 else None

    service = Odd(**{phase: portal}, service_time=100.0)
    world = World(service, window=3)
    with anyio.move_on_after(450):
        await world.run(jobs(20))
    await anyio.sleep(24 * HOUR - anyio.current_time())  # redirected again when the next run begins
    report = await world.again().run(jobs(20))
    counts = await world.journal.counts()
    assert (report.failed, counts.by_state) == (0, {State.DONE: 20})


# --- what open jobs wait for ------------------------------------------------------------------------------


async def test_what_open_jobs_wait_for_is_known_at_any_time():
    """In the queue with positions, in progress, ended, downloading, unknown; and for how long."""
    service = Odd(service_time=100.0, slots=2)
    service.answers["status"] = lambda r: said("BANANA") if r.id == "request-0" else None
    world = World(service, window=8)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.run, jobs(8))
        await anyio.sleep(60)
        seen = world.runner.waits.overview(anyio.current_time())
        assert {stage: waiting.jobs for stage, waiting in seen.stages.items()} == {
            Stage.IN_PROGRESS: 1,
            Stage.IN_QUEUE: 6,
            Stage.UNKNOWN: 1,
        }
        assert all(waiting.oldest_seconds == pytest.approx(60, abs=1) for waiting in seen.stages.values())
        assert seen.positions == Positions(0, 2, 4)
        service.answers["result"] = lambda r: PAGE if r.id == "request-1" else None
        await anyio.sleep(100)
        seen = world.runner.waits.overview(anyio.current_time())
        assert seen.stages[Stage.RESULT].jobs == 1
        service.answers["result"] = lambda r: None
    assert world.runner.waits.overview(anyio.current_time()).stages == {}


async def test_a_download_that_takes_long_is_known_as_such():
    """Counted from the answer; for a resumed job from the start of this run."""

    class Slow(FakeService):
        async def download(self, url):
            await anyio.sleep(500)
            return await super().download(url)

    world = World(Slow(service_time=50.0))
    for age in (50, 100):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.again().run, jobs(2))
            await anyio.sleep(100)
            ((stage, waiting),) = world.runner.waits.overview(anyio.current_time()).stages.items()
            assert (stage, waiting.jobs) == (Stage.DOWNLOADING, 2)
            assert waiting.oldest_seconds == pytest.approx(age, abs=2)
            tasks.cancel_scope.cancel()


async def test_a_status_that_cannot_be_read_is_unknown_until_it_can():
    """The last readable status may be an hour old."""
    service = Odd(service_time=2 * HOUR)
    world = World(service)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(world.run, jobs(3))
        for answer, stage in ((None, Stage.IN_PROGRESS), (PAGE, Stage.UNKNOWN), (None, Stage.IN_PROGRESS)):
            service.answers["status"] = lambda request, answer=answer: answer
            await anyio.sleep(60)
            seen = world.runner.waits.overview(anyio.current_time()).stages
            assert {name: waiting.jobs for name, waiting in seen.items()} == {stage: 3}
        tasks.cancel_scope.cancel()
