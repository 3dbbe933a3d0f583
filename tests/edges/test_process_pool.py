"""The process pool, with real processes and real kills."""

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
"""A renderer that executes its prompt: a JSON list of a method name and arguments."""
import json, os, pathlib, signal, time
from batch.server.engines.base import EngineCancelled, EngineFailure, EngineImage, EngineResult, NotReady

class Renderer:
    def __init__(self, greeting):
        self.greeting = greeting

    def render(self, job, on_step, cancelled):
        method, *arguments = json.loads(job.input.prompt)
        reply = getattr(self, method)(job, on_step, cancelled, *arguments)
        image = EngineImage(job.source or b"", "image/png", 1, 1)
        return EngineResult((image,), job.seed, (), {"inference": 0.5}, json.dumps([os.getpid(), reply]))

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

    def raise_bug(self, job, on_step, cancelled):
        raise ZeroDivisionError("a bug")

    def get_ready(self, job, on_step, cancelled, folder):
        pathlib.Path(folder, self.greeting).touch()
        if self.greeting == "lost":
            raise NotReady("the device is lost; replace it")

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
    """The two event loops that the server supports."""
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def renderer(tmp_path, monkeypatch):
    """A module on this process's import path, which the workers inherit."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "renderer_for_tests.py").write_text(RENDERER)
    monkeypatch.syspath_prepend(folder)
    return folder


def job(*call, source=None):
    asked = ImageToImageInput(image_url="http://example.test/", prompt=json.dumps(call), seed=9)
    return EngineJob("r1", asked, source)


async def run(pool, *call, on_step=lambda *_: None, cancelled=lambda: False, source=None):
    """Run one job and return the worker's process id and the method's reply."""
    result = await pool.run(job(*call, source=source), on_step, cancelled)
    return tuple(json.loads(result.prompt))


def ended(pid, within=20.0):
    """Return whether a process, possibly not a child, ends in time. Waits with pidfd, without polling."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within)[0])
    finally:
        os.close(descriptor)


async def test_result_and_steps_come_back():
    """The steps of a job arrive while it runs; its result arrives complete."""
    steps = []
    async with WorkerPool(REFERENCE, size=1) as pool:
        result = await pool.run(job("count", 3), lambda *step: steps.append(step), lambda: False)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (result.seed, result.timings, result.has_nsfw_concepts) == (9, {"inference": 0.5}, ())


async def test_arguments_reach_the_renderer():
    """The renderer is created with the pool's arguments."""
    async with WorkerPool(REFERENCE, {"greeting": "good day"}, size=1) as pool:
        assert (await run(pool, "greet"))[1] == "good day"


async def test_each_slot_has_its_own_arguments_and_keeps_them(tmp_path):
    """Each process gets one entry of the list; the replacement of a killed process gets the same entry."""
    async with WorkerPool(REFERENCE, [{"greeting": "first"}, {"greeting": "second"}]) as pool:
        assert pool.size == 2

        async def by_greeting():
            """Run two jobs at once, so that both slots reply."""
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


async def test_prepare_runs_in_every_slot(tmp_path):
    """Each process executes the job once."""
    async with WorkerPool(REFERENCE, [{"greeting": "first"}, {"greeting": "second"}]) as pool:
        seen = tmp_path / "seen"
        seen.mkdir()
        await pool.prepare(job("get_ready", str(seen)))
        assert {path.name for path in seen.iterdir()} == {"first", "second"}
        assert pool.statistics() == (2, 0, 2, 0)


async def test_prepare_raises_the_error_of_a_slot_that_is_not_ready(tmp_path):
    """The original message is kept."""
    async with WorkerPool(REFERENCE, [{"greeting": "fine"}, {"greeting": "lost"}]) as pool:
        with pytest.raises(NotReady, match=r"^the device is lost; replace it$") as caught:
            await pool.prepare(job("get_ready", str(tmp_path)))
    assert (caught.value.status, caught.value.type, caught.value.retryable) == (500, "internal_server_error", True)


async def test_a_slot_that_is_not_ready_backs_off_exponentially(tmp_path):
    """Its process ends; the next one starts after a backoff that doubles each time and that a success resets."""
    async with WorkerPool(REFERENCE, [{"greeting": "lost"}], first_backoff=0.2) as pool:
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
        assert 0.2 <= anyio.current_time() - again < 1.6, "the success must reset the backoff"


async def test_a_slot_in_backoff_does_not_block_the_others(tmp_path):
    """While one slot backs off for an hour, every job goes to the other."""
    slots = [{"greeting": "lost"}, {"greeting": "fine"}]
    async with WorkerPool(REFERENCE, slots, first_backoff=3600, longest_backoff=3600) as pool:
        with pytest.raises(NotReady):
            await pool.prepare(job("get_ready", str(tmp_path)))
        for _ in range(5):
            assert (await run(pool, "greet"))[1] == "fine"


async def test_jobs_run_concurrently_in_separate_processes(tmp_path):
    """Three jobs that wait for each other end only if three processes run them concurrently."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    async with WorkerPool(REFERENCE, size=3) as pool, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(run, pool, "meet", str(meeting), 3)
    assert len(list(meeting.iterdir())) == 3


async def test_processes_start_on_demand_up_to_the_size():
    """Sequential jobs need one process; ten concurrent jobs get two."""
    async with WorkerPool(REFERENCE, size=2) as pool:
        for _ in range(3):
            await run(pool, "greet")
        assert pool.statistics().started == 1
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(run, pool, "greet")
        assert pool.statistics() == (2, 0, 2, 0)
        assert len(pool.pids()) == 2


async def test_a_worker_crash_fails_only_its_own_job(tmp_path):
    """After kill -9 that job raises WorkerCrashed, a concurrent job completes, and the next job gets a new process."""
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
    assert "can be retried" in crashed[0]


async def test_idle_worker_that_was_killed_is_replaced():
    """A process that died between two jobs is replaced before the next job."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        first, _ = await run(pool, "greet")
        os.kill(first, signal.SIGKILL)
        while pool.pids():
            await anyio.sleep(0.001)
        second, _ = await run(pool, "greet")
        assert second != first
        assert pool.statistics() == (1, 0, 2, 1)


async def test_model_error_comes_back_as_it_was():
    """Status, type, message, location and limits survive the pipe; the process continues."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        with pytest.raises(EngineFailure, match="too small: 3 px") as caught:
            await run(pool, "refuse")
        failure = caught.value
        assert (failure.status, failure.type, failure.loc) == (422, "image_too_small", ("body", "image_url"))
        assert failure.ctx == {"min_width": 16}
        assert (await run(pool, "greet"))[0] == before


async def test_a_bug_in_one_job_keeps_the_process_alive(capfd):
    """That job gets a 500; the traceback goes to stderr, not into the message."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        with pytest.raises(EngineFailure) as caught:
            await run(pool, "raise_bug")
        assert (caught.value.status, caught.value.type) == (500, "internal_server_error")
        assert "ZeroDivisionError: a bug" in str(caught.value)
        assert (await run(pool, "greet"))[0] == before
    assert "Traceback" in capfd.readouterr().err


async def test_stop_reaches_the_worker_between_steps():
    """When cancelled() returns true the job raises EngineCancelled; the process continues."""
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
    """The worker never receives it."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        with pytest.raises(EngineCancelled):
            await run(pool, "die", cancelled=lambda: True)
        assert pool.statistics().crashed == 0


async def test_cancelled_task_frees_its_worker_for_the_next_job():
    """Cancelling the calling task stops the job; late messages of that job do not affect the next one."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        for _ in range(5):
            with anyio.CancelScope() as scope:
                await run(pool, "go_on_until_stopped", os.devnull, on_step=lambda *_, stop=scope.cancel: stop())
            assert scope.cancelled_caught
            assert await run(pool, "greet") == (before, "hello")


async def test_error_in_the_callers_step_handler_stops_the_job():
    """The error propagates to the caller; the worker accepts the next job."""

    def handler(*_):
        raise KeyError("ours")

    async with WorkerPool(REFERENCE, size=1) as pool:
        with pytest.raises(KeyError):
            await run(pool, "go_on_until_stopped", os.devnull, on_step=handler)
        assert (await run(pool, "greet"))[1] == "hello"


async def test_printing_libraries_do_not_spoil_the_pipe(capfd):
    """Output of a worker goes to stderr."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        await run(pool, "chatter")
        assert (await run(pool, "greet"))[1] == "hello"
    assert "a library that prints" in capfd.readouterr().err


async def test_large_images_pass():
    """Twelve megabytes pass unchanged in both directions."""
    source = os.urandom(2**20) * 12
    async with WorkerPool(REFERENCE, size=1) as pool:
        result = await pool.run(job("greet", source=source), lambda *_: None, lambda: False)
    assert result.images[0].data == source


async def test_terminal_signals_are_left_to_the_parent():
    """Workers ignore SIGINT and SIGTERM, which reach the whole process group; only the parent ends them."""
    async with WorkerPool(REFERENCE, size=1) as pool:
        before, _ = await run(pool, "greet")
        os.kill(before, signal.SIGINT)
        os.kill(before, signal.SIGTERM)
        assert (await run(pool, "greet"))[0] == before


async def test_closing_ends_idle_and_busy_workers(tmp_path):
    """All processes end, the running job raises, a second close does nothing, and later jobs are rejected."""
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


async def test_a_worker_that_does_not_exit_is_killed_when_the_pool_closes():
    """A process after SIGSTOP cannot exit; closing kills it after a timeout."""
    pool = WorkerPool(REFERENCE, size=1, exit_timeout=0.05)
    await pool.start(loaded=True)
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    await pool.aclose()
    assert ended(pid)


async def test_start_raises_if_a_renderer_cannot_be_loaded(capfd):
    """With `loaded` the start waits and reports the exit status of the process."""
    pool = WorkerPool("renderer_for_tests:cannot_open", size=2)
    with pytest.raises(WorkerCrashed, match="exited with status 1"):
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
    call = json.dumps(["meet", sys.argv[1], 99])
    job = EngineJob("r", ImageToImageInput(image_url="x", prompt=call, seed=1))
    await pool.run(job, lambda *_: print(*pool.pids(), flush=True), lambda: False)

anyio.run(main)
"""


def test_workers_end_when_the_parent_is_killed(tmp_path, renderer):
    """After SIGKILL the parent cannot clean up; an idle and a busy worker both exit by themselves."""
    environment = {**os.environ, "PYTHONPATH": str(renderer)}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


async def test_preview_engine_gives_what_its_renderer_gives():
    """The pool returns the same bytes as a direct call of the renderer."""
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
    """The bytes do not depend on earlier jobs, with more processes than cores and another process that uses a core."""
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
