"""Worker processes: real ones, killed for real."""

import collections
import io
import json
import os
import random
import select
import signal
import subprocess
import sys

import anyio
import pytest
from PIL import Image

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import EngineCancelled, EngineFailure, EngineJob, NotReady, WorkerCrashed
from batch.server.engines.preview.engine import PreviewEngine
from batch.server.engines.preview.renderer import open_renderer
from batch.server.engines.process_pool import WorkerPool

pytestmark = pytest.mark.anyio

RENDERER = '''
"""A renderer that does what the prompt says, a JSON list."""
import json, os, pathlib, signal, time
from batch.server.engines.base import EngineCancelled, EngineFailure, EngineImage, EngineResult, NotReady

class Renderer:
    def __init__(self, greeting):
        self.greeting = greeting

    def render(self, job, on_step, cancelled):
        order, *rest = json.loads(job.input.prompt)
        said = getattr(self, order)(job, on_step, cancelled, *rest)
        image = EngineImage(job.source or b"", "image/png", 1, 1)
        return EngineResult((image,), job.seed, (), {"inference": 0.5}, json.dumps([os.getpid(), said]))

    def greet(self, job, on_step, cancelled):
        return self.greeting

    def greet_at(self, job, on_step, cancelled, folder, count):
        self.meet(job, on_step, cancelled, folder, count)
        return self.greeting

    def count(self, job, on_step, cancelled, total):
        for done in range(1, total + 1):
            on_step(done, total)
            if cancelled():
                raise EngineCancelled

    def go_on_until_stopped(self, job, on_step, cancelled, marker):
        pathlib.Path(marker).touch()
        while not cancelled():
            on_step(1, 2)
            time.sleep(0.001)
        raise EngineCancelled

    def meet(self, job, on_step, cancelled, folder, count):
        on_step(1, 2)
        pathlib.Path(folder, str(os.getpid())).touch()
        while len(os.listdir(folder)) < count:
            time.sleep(0.001)

    def die(self, job, on_step, cancelled):
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(self, job, on_step, cancelled):
        raise EngineFailure(422, "image_too_small", "too small: 3 px", ctx={"min_width": 16})

    def stumble(self, job, on_step, cancelled):
        raise ZeroDivisionError("a defect")

    def get_ready(self, job, on_step, cancelled, folder):
        pathlib.Path(folder, self.greeting).touch()
        if self.greeting == "lost":
            raise NotReady("the device is lost; see to it")

    def chatter(self, job, on_step, cancelled):
        print("a library that prints", flush=True)
        os.write(1, b"straight to the descriptor")

def open_renderer(greeting="hello"):
    return Renderer(greeting)

def cannot_open():
    raise FileNotFoundError("no weights here")
'''
REFERENCE = "renderer_for_tests:open_renderer"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    """The two loops that the server may run on."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def renderer(tmp_path, monkeypatch):
    """A module that the workers can import because we can."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "renderer_for_tests.py").write_text(RENDERER)
    monkeypatch.syspath_prepend(folder)
    return folder


def job(*order, source=None):
    asked = ImageToImageInput(image_url="http://example.test/", prompt=json.dumps(order), seed=9)
    return EngineJob("r1", asked, source)


async def run(pool, *order, on_step=lambda *_: None, cancelled=lambda: False, source=None):
    """Process id and answer of one job."""
    result = await pool.run(job(*order, source=source), on_step, cancelled)
    return tuple(json.loads(result.prompt))


def ended(pid, within=20.0):
    """Whether a process that may be nobody's child ends in time; waits on the kernel, not on a clock."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within)[0])
    finally:
        os.close(descriptor)


async def test_result_and_steps_come_back():
    """A job's steps are told while it runs, its result is whole."""
    steps = []
    async with WorkerPool(REFERENCE, size=1) as pool:
        result = await pool.run(job("count", 3), lambda *step: steps.append(step), lambda: False)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (result.seed, result.timings, result.has_nsfw_concepts) == (9, {"inference": 0.5}, ())


async def test_arguments_reach_the_renderer():
    """What the engine was configured with is what its renderer is made with."""
    async with WorkerPool(REFERENCE, {"greeting": "good day"}, size=1) as pool:
        assert (await run(pool, "greet"))[1] == "good day"


async def test_each_place_has_its_own_arguments_and_keeps_them(tmp_path):
    """One process a set of arguments; the one that replaces a killed one gets those that it had."""
    async with WorkerPool(REFERENCE, [{"greeting": "first"}, {"greeting": "second"}]) as pool:
        assert pool.size == 2

        async def by_greeting():
            """Two at once, so that both places answer."""
            meeting = tmp_path / str(len(list(tmp_path.iterdir())))
            meeting.mkdir()
            pids = []
            async with anyio.create_task_group() as tasks:
                for _ in range(2):
                    tasks.start_soon(meet, meeting, pids)
            return dict(pids)

        async def meet(meeting, pids):
            pid, greeting = await run(pool, "greet_at", str(meeting), 2)
            pids.append((greeting, pid))

        before = await by_greeting()
        os.kill(before["second"], signal.SIGKILL)
        while len(pool.pids()) == 2:
            await anyio.sleep(0.001)
        after = await by_greeting()
    assert before.keys() == after.keys() == {"first", "second"}
    assert after["first"] == before["first"]
    assert after["second"] != before["second"]


async def test_preparing_reaches_every_place(tmp_path):
    """Each process executes the job once, before any other."""
    async with WorkerPool(REFERENCE, [{"greeting": "first"}, {"greeting": "second"}]) as pool:
        seen = tmp_path / "seen"
        seen.mkdir()
        await pool.prepare(job("get_ready", str(seen)))
        assert {path.name for path in seen.iterdir()} == {"first", "second"}
        assert pool.statistics() == (2, 0, 2, 0)


async def test_a_place_that_cannot_get_ready_is_told_at_once(tmp_path):
    """With its own words; the others end with the pool."""
    async with WorkerPool(REFERENCE, [{"greeting": "fine"}, {"greeting": "lost"}]) as pool:
        with pytest.raises(NotReady, match=r"^the device is lost; see to it$") as caught:
            await pool.prepare(job("get_ready", str(tmp_path)))
    assert (caught.value.status, caught.value.type, caught.value.retryable) == (500, "internal_server_error", True)


async def test_a_place_that_cannot_get_ready_rests_ever_longer(tmp_path):
    """Its process is ended, and a new one is started there only after a pause that doubles; a success ends that."""
    async with WorkerPool(REFERENCE, [{"greeting": "lost"}], first_rest=0.2) as pool:
        began = anyio.current_time()
        for started in (1, 2, 3):
            with pytest.raises(NotReady):
                await pool.run(job("get_ready", str(tmp_path)), lambda *_: None, lambda: False)
            assert pool.statistics() == (0, 0, started, 0)
        assert anyio.current_time() - began >= 0.2 + 0.4
        assert (await run(pool, "greet"))[1] == "lost"
        assert anyio.current_time() - began >= 0.2 + 0.4 + 0.8
        with pytest.raises(NotReady):
            await pool.run(job("get_ready", str(tmp_path)), lambda *_: None, lambda: False)
        again = anyio.current_time()
        assert (await run(pool, "greet"))[1] == "lost"
        assert 0.2 <= anyio.current_time() - again < 1.6, "it began anew with the shortest"


async def test_a_resting_place_does_not_hold_up_the_others(tmp_path):
    """While one rests for an hour, every job goes to the other."""
    places = [{"greeting": "lost"}, {"greeting": "fine"}]
    async with WorkerPool(REFERENCE, places, first_rest=3600, longest_rest=3600) as pool:
        with pytest.raises(NotReady):
            await pool.prepare(job("get_ready", str(tmp_path)))
        for _ in range(5):
            assert (await run(pool, "greet"))[1] == "fine"


async def test_jobs_run_side_by_side_in_processes_of_their_own(tmp_path):
    """Three jobs that wait for each other end only if three processes run them at once."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    async with WorkerPool(REFERENCE, size=3) as pool, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(run, pool, "meet", str(meeting), 3)
    assert len(list(meeting.iterdir())) == 3


async def test_no_more_processes_than_size_and_none_before_it_is_needed():
    """One job after another needs one process; ten at once get two."""
    async with WorkerPool(REFERENCE, size=2) as pool:
        for _ in range(3):
            await run(pool, "greet")
        assert pool.statistics().started == 1
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(run, pool, "greet")
        assert pool.statistics() == (2, 0, 2, 0)
        assert len(pool.pids()) == 2


async def test_worker_that_dies_costs_its_one_job_only(tmp_path):
    """A kill -9 raises WorkerCrashed for that job; its neighbour ends well, the next one finds a new process."""
    crashed = []
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    async with WorkerPool(REFERENCE, size=2) as pool:

        async def shot():
            try:
                await run(pool, "meet", str(meeting), 99, on_step=lambda *_: kill_it())
            except WorkerCrashed as error:
                crashed.append(str(error))

        def kill_it():
            (pid,) = pool.pids()
            os.kill(pid, signal.SIGKILL)

        await shot()
        assert await run(pool, "greet")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, pool, "count", 50)
            with pytest.raises(WorkerCrashed, match=r"worker process \d+ was killed by SIGKILL"):
                await run(pool, "die")
        assert (await run(pool, "greet"))[1] == "hello"
        assert pool.statistics().crashed == 2
        assert pool.statistics().busy == 0
    assert "may be tried again" in crashed[0]


async def test_idle_worker_that_was_killed_is_replaced():
    """A death between two jobs costs no job, once it is noticed."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        first, _ = await run(pool, "greet")
        os.kill(first, signal.SIGKILL)
        while pool.pids():
            await anyio.sleep(0.001)
        second, _ = await run(pool, "greet")
        assert second != first
        assert pool.statistics() == (1, 0, 2, 1)


async def test_model_error_comes_back_as_it_was():
    """Status, type, message, place and limits survive the pipe; the process goes on."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        with pytest.raises(EngineFailure, match="too small: 3 px") as caught:
            await run(pool, "refuse")
        failure = caught.value
        assert (failure.status, failure.type, failure.loc) == (422, "image_too_small", ("body", "image_url"))
        assert failure.ctx == {"min_width": 16}
        assert (await run(pool, "greet"))[0] == before


async def test_defect_in_one_job_leaves_the_process_alive(capfd):
    """It is a 500 for that job, with its trace on stderr and not in the message."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        with pytest.raises(EngineFailure) as caught:
            await run(pool, "stumble")
        assert (caught.value.status, caught.value.type) == (500, "internal_server_error")
        assert str(caught.value) == "the engine failed: ZeroDivisionError: a defect"
        assert (await run(pool, "greet"))[0] == before
    assert "Traceback" in capfd.readouterr().err


async def test_stop_reaches_the_worker_between_steps():
    """Once cancelled() is true the job ends with EngineCancelled, and the process is kept."""
    seen = []
    async with WorkerPool(REFERENCE, size=1) as pool:
        with pytest.raises(EngineCancelled):
            await run(
                pool,
                "go_on_until_stopped",
                os.devnull,
                on_step=lambda *step: seen.append(step),
                cancelled=lambda: len(seen) >= 3,
            )
        assert (await run(pool, "greet"))[1] == "hello"
        assert pool.statistics().started == 1


async def test_job_cancelled_before_it_starts_is_not_sent():
    """No process is bothered with it."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        with pytest.raises(EngineCancelled):
            await run(pool, "die", cancelled=lambda: True)
        assert pool.statistics().crashed == 0


async def test_cancelled_task_frees_its_worker_for_the_next_job():
    """The caller's own cancellation stops the job too; what it leaves in the pipe confuses nobody."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        for _ in range(5):
            with anyio.CancelScope() as scope:
                await run(pool, "go_on_until_stopped", os.devnull, on_step=lambda *_, stop=scope.cancel: stop())
            assert scope.cancelled_caught
            assert await run(pool, "greet") == (before, "hello")


async def test_error_in_the_callers_step_handler_stops_the_job():
    """It is the caller's error and reaches the caller; the worker is free again."""

    def handler(*_):
        raise KeyError("ours")

    async with WorkerPool(REFERENCE, size=1) as pool:
        with pytest.raises(KeyError):
            await run(pool, "go_on_until_stopped", os.devnull, on_step=handler)
        assert (await run(pool, "greet"))[1] == "hello"


async def test_printing_libraries_do_not_spoil_the_pipe(capfd):
    """What a worker prints ends on stderr."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        await run(pool, "chatter")
        assert (await run(pool, "greet"))[1] == "hello"
    assert "a library that prints" in capfd.readouterr().err


async def test_large_images_pass():
    """Twelve megabytes each way, byte for byte."""
    source = os.urandom(2**20) * 12
    async with WorkerPool(REFERENCE, size=1) as pool:
        result = await pool.run(job("greet", source=source), lambda *_: None, lambda: False)
    assert result.images[0].data == source


async def test_terminal_signals_are_left_to_the_parent():
    """Ctrl-C and a service manager's stop reach the whole group; the worker goes on until its parent ends it."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        os.kill(before, signal.SIGINT)
        os.kill(before, signal.SIGTERM)
        assert (await run(pool, "greet"))[0] == before


async def test_closing_ends_idle_and_busy_workers(tmp_path):
    """All processes are gone; the job that ran is told; a second close is no error; no job runs any more."""
    marker = tmp_path / "runs"
    pool = WorkerPool(REFERENCE, size=2)
    await pool.start(2, loaded=True)
    pids = pool.pids()

    async def busy():
        with pytest.raises(WorkerCrashed, match="closed"):
            await run(pool, "go_on_until_stopped", str(marker))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(busy)
        while not marker.exists():
            await anyio.sleep(0.001)
        await pool.aclose()
    assert all(ended(pid) for pid in pids)
    await pool.aclose()
    with pytest.raises(WorkerCrashed, match="closed"):
        await run(pool, "greet")


async def test_worker_that_hears_nothing_is_killed_when_the_pool_closes():
    """A stopped process cannot leave by itself; closing does not wait for it."""
    pool = WorkerPool(REFERENCE, size=1, grace=0.05)
    await pool.start(loaded=True)
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    await pool.aclose()
    assert ended(pid)


async def test_renderer_that_cannot_be_loaded_is_told_at_the_start(capfd):
    """With `loaded` the start waits, and says that the process left."""
    pool = WorkerPool("renderer_for_tests:cannot_open", size=2)
    with pytest.raises(WorkerCrashed, match="left with exit status 1"):
        await pool.start(2, loaded=True)
    await pool.aclose()
    assert "no weights here" in capfd.readouterr().err


PARENT = """
import anyio, json, sys
from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import EngineJob
from batch.server.engines.process_pool import WorkerPool

async def main():
    pool = WorkerPool("renderer_for_tests:open_renderer", size=2)
    await pool.start(2, loaded=True)
    order = json.dumps(["meet", sys.argv[1], 99])
    job = EngineJob("r", ImageToImageInput(image_url="x", prompt=order, seed=1))
    await pool.run(job, lambda *_: print(*pool.pids(), flush=True), lambda: False)

anyio.run(main)
"""


def test_workers_end_when_the_parent_is_killed(tmp_path, renderer):
    """SIGKILL gives the parent no chance to clean up; an idle and a busy worker both leave all the same."""
    environment = {**os.environ, "PYTHONPATH": str(renderer)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


async def test_preview_engine_gives_what_its_renderer_gives():
    """Through the processes come the same bytes as from a direct call."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((320, 256)).convert("RGB").save(buffer, "PNG")
    asked = [ImageToImageInput(image_url="x", prompt="a mosaic", seed=seed) for seed in (1, 2)]
    jobs = [EngineJob(str(one.seed), one, buffer.getvalue()) for one in asked]
    images = {}
    engine = PreviewEngine(slots=2)
    await engine.start()

    async def generate(one):
        images[one.seed] = (await engine.generate(one, lambda *_: None, lambda: False)).images

    async with anyio.create_task_group() as tasks:
        for one in jobs:
            tasks.start_soon(generate, one)
    statistics = engine.statistics()
    await engine.aclose()
    assert (statistics.idle, statistics.busy, statistics.crashed) == (2, 0, 0)
    for one in jobs:
        assert images[one.seed] == open_renderer().render(one, lambda *_: None, lambda: False).images


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_preview_has_the_same_bytes_from_every_process_of_a_busy_machine(anyio_backend):
    """Whatever each process rendered before, with more processes than cores and a neighbour that takes one."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((288, 192)).convert("RGB").save(buffer, "PNG")
    prompts = ("a blueprint", "neon", "oil", "a rocket", "pixel art")
    asked = [ImageToImageInput(image_url="x", prompt=prompt, seed=110) for prompt in prompts]
    made = collections.defaultdict(set)
    order = [one for one in asked for _ in range(6)]
    random.Random(7).shuffle(order)

    async def generate(one):
        job = EngineJob("r", one, buffer.getvalue())
        made[one.prompt].add((await engine.generate(job, lambda *_: None, lambda: False)).images)

    engine = PreviewEngine(slots=3)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            async with anyio.create_task_group() as tasks:
                for one in order:
                    tasks.start_soon(generate, one)
        finally:
            neighbour.kill()
            await engine.aclose()
    assert {prompt: len(found) for prompt, found in made.items()} == dict.fromkeys(prompts, 1)
