"""Ctrl-C and cancellation of a run in a program: in a script, a notebook, a thread, a loop.

Nothing more is submitted, jobs in flight are collected for a bounded time, journal and results are complete, and the
same call resumes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty

import anyio
import pytest
import uvloop
from jupyter_client.manager import KernelManager
from PIL import Image

from batch import api
from batch.errors import ExitCode
from batch.run.interfaces import Observer
from tests.acceptance.command import REPOSITORY, environment, finish, results, summary, wait_for, write_manifest
from tests.faults import target as targets

ROWS = 16
AT_ONCE = 2
SERVICE = 0.3
OPEN = {"accepted requests are not collected", "submits have an unknown outcome and may have been paid for"}
"""Audit findings of a run that was stopped with open requests; they are not damage."""


def slow(seconds: float):
    """Reports for `SERVICE` seconds that the request is in progress."""

    async def status(target, request, asked):
        if time.time() < asked.at + seconds:
            return targets.answer({"request_id": asked.id, "status": "IN_PROGRESS", "logs": []}, 202)
        return await targets.status(target, request, asked)

    return status


NEVER = slow(600)


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "m.csv", range(ROWS))


@pytest.fixture
def service():
    """A counting target; a job takes `SERVICE` seconds unless a test changes that."""
    with targets.serving(status=slow(SERVICE)) as target:
        yield target


def settings_for(target, **limits):
    return {"target": {"name": target.url}, "limits": {"max_in_flight": AT_ONCE, **limits}}


def require_whole(directory: Path, service, *, collected: bool, stopped: str = "signal", reason: str = "SIGINT"):
    """Check that the run stopped early and reported it, and that results, journal and the service's requests agree."""
    told, table = summary(directory), results(directory)
    assert (told["stopped"], told["reason"], told["exit_code"]) == (stopped, reason, ExitCode.STOPPED_EARLY)
    assert table.num_rows == told["rows"] == ROWS
    words = table["status"].to_pylist()
    assert {word: words.count(word) for word in set(words)} == {
        word: told[word] for word in ("done", "pending", "unknown") if told[word]
    }
    assert service.posts() < ROWS
    if collected:
        assert told["done"] == service.posts()
    books = api.audit_sync(directory)
    wrong = {mismatch.what for check in books.checks for mismatch in check.mismatches if mismatch.count}
    assert wrong <= (set() if collected else OPEN)


def require_completion(manifest: Path, directory: Path, service):
    """Repeat the call: each job is submitted exactly once over all runs."""
    service.handlers["status"] = targets.status
    ended = api.run_sync(manifest, directory, settings=settings_for(service, max_in_flight=16))
    assert (ended.exit_code, ended.done) == (ExitCode.COMPLETE, ROWS)
    assert service.posts() == len(service.requests) == ROWS
    assert api.audit_sync(directory).add_up


def require_no_submit_after(moment: float, service):
    """Check that no submit follows the stop; a running run submits two per `SERVICE` seconds."""
    assert [asked.at - moment for asked in service.requests.values() if asked.at > moment + 0.5] == []


@contextmanager
def interrupting(service, *, after: int = 3, times: int = 1, pause: float = 0.3, number: int = signal.SIGINT):
    """Send this process a signal after this many submits; return the time of each signal."""
    moments: list[float] = []

    def work():
        wait_for(lambda: len(service.requests) >= after, "the submits", timeout=20)
        for _ in range(times):
            moments.append(time.time())
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield moments
    finally:
        thread.join()


# --- a script ---------------------------------------------------------------------------------------------

PLAIN = """
from batch.api import run_sync
run_sync({manifest!r}, {out!r}, settings={settings!r})
print("went on")
"""
IN_A_THREAD = """
from threading import Thread
from batch.api import run_sync
thread = Thread(target=run_sync, args=({manifest!r}, {out!r}), kwargs=dict(settings={settings!r}))
thread.start()
thread.join()
print("went on")
"""
IN_AN_EXECUTOR = """
from concurrent.futures import ThreadPoolExecutor
from batch.api import run_sync
pool = ThreadPoolExecutor(1)
pool.submit(run_sync, {manifest!r}, {out!r}, settings={settings!r}).result()
print("went on")
"""


def interrupted(text: str, service, manifest, out, *, times: int = 1, pause: float = 0.2, **limits):
    """Run a script in a separate process and send SIGINT; return its outcome, the first signal's time, and seconds."""
    values = {"manifest": str(manifest), "out": str(out), "settings": settings_for(service, **limits)}
    command = [sys.executable, "-c", textwrap.dedent(text).format(**values)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: len(service.requests) >= 3 or process.poll() is not None, "the submits")
        began = time.time()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        ended = finish(process)
    return ended, began, time.time() - began


def test_ctrl_c_in_a_script(tmp_path, manifest, service):
    """Jobs in flight are collected, then KeyboardInterrupt: a script without a handler ends as after any Ctrl-C."""
    ended, began, _ = interrupted(PLAIN, service, manifest, tmp_path / "run")
    assert (ended.code, ended.out) == (-signal.SIGINT, ""), ended.text
    done = summary(tmp_path / "run")["done"]
    said = f"KeyboardInterrupt: {done} of {ROWS} rows are done, the results are written; repeat the call to continue"
    assert ended.err.rstrip().splitlines()[-1] == said
    assert "SIGINT: collecting jobs in flight; interrupt again to stop at once" in ended.err
    require_no_submit_after(began, service)
    require_whole(tmp_path / "run", service, collected=True)
    require_completion(manifest, tmp_path / "run", service)


def test_a_second_ctrl_c_in_a_script(tmp_path, manifest, service):
    """The drain stops at once; journal and results are still complete."""
    service.handlers["status"] = NEVER
    ended, _, seconds = interrupted(PLAIN, service, manifest, tmp_path / "run", times=2, max_in_flight=3)
    assert (ended.code, ended.out, seconds < 10) == (-signal.SIGINT, "", True), ended.text
    require_whole(tmp_path / "run", service, collected=False)
    require_completion(manifest, tmp_path / "run", service)


def test_impatience_in_a_script(tmp_path, manifest, service):
    """After any number of signals, also while the results are written, they are complete."""
    service.handlers["status"] = NEVER
    interrupted(PLAIN, service, manifest, tmp_path / "run", times=100, pause=0.02, max_in_flight=3)
    require_whole(tmp_path / "run", service, collected=False)
    require_completion(manifest, tmp_path / "run", service)


@pytest.mark.parametrize("text", [IN_A_THREAD, IN_AN_EXECUTOR])
def test_ctrl_c_of_the_main_thread_while_another_one_runs(tmp_path, manifest, service, text):
    """It ends only the main thread: a run that Python would wait for stops in order."""
    ended, _, _ = interrupted(text, service, manifest, tmp_path / "run")
    assert ended.code in {-signal.SIGINT, 1}, "Python exits with 1 if it loads a module after that"
    assert ended.out == ""
    require_whole(tmp_path / "run", service, collected=True)
    require_completion(manifest, tmp_path / "run", service)


def test_a_thread_that_outlives_the_main_one(tmp_path, service):
    """A main thread that ends does not stop the run, which completes, with local images."""
    service.handlers["status"] = targets.status
    for number in range(ROWS):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text("".join(["image_url,prompt\n", *(f"{number}.png,one\n" for number in range(ROWS))]))
    ended, _, _ = interrupted(IN_A_THREAD.replace("thread.join()", "#"), service, manifest, tmp_path / "run", times=0)
    assert (ended.code, ended.text) == (0, "went on\n")
    assert (summary(tmp_path / "run")["done"], results(tmp_path / "run").num_rows) == (ROWS, ROWS)


# --- the main thread of a program -------------------------------------------------------------------------


def test_a_drain_is_bounded(tmp_path, manifest, service):
    """Jobs that do not end within `limits.drain` stay open for the next run, also in the results."""
    service.handlers["status"] = NEVER
    with interrupting(service, after=2) as moments, pytest.raises(KeyboardInterrupt):
        api.run_sync(manifest, tmp_path / "run", settings=settings_for(service, drain=0.5))
    assert 0.5 <= time.time() - moments[0] < 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=False)
    require_completion(manifest, tmp_path / "run", service)


def test_handlers_are_what_they_were(tmp_path, manifest, service):
    """Also a program's own handlers; one that raises nothing stops nothing."""
    heard = []
    mine = {number: lambda number, _: heard.append(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    try:
        with interrupting(service):
            ended = api.run_sync(manifest, tmp_path / "run", settings=settings_for(service, max_in_flight=8))
        assert {number: signal.getsignal(number) for number in mine} == mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (ended.exit_code, ended.done, heard) == (ExitCode.COMPLETE, ROWS, [signal.SIGINT])


def test_what_a_handler_of_ones_own_raises_stops_the_run_in_order(tmp_path, manifest, service):
    """Like KeyboardInterrupt; the exception is raised at the end."""

    def leave(*_):
        raise SystemExit(7)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with interrupting(service, number=signal.SIGTERM) as moments, pytest.raises(SystemExit, match="7"):
            api.run_sync(manifest, tmp_path / "run", settings=settings_for(service))
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_are_wanted_return_the_summary(tmp_path, manifest, service, number):
    """`signals=True`: as on the command line, nothing is raised, and the summary has the reason."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with interrupting(service, number=number) as moments:
        ended = api.run_sync(manifest, tmp_path / "run", settings=settings_for(service), signals=True)
    name = signal.Signals(number).name
    assert (ended.exit_code, ended.stopped, ended.reason) == (ExitCode.STOPPED_EARLY, "signal", name)
    assert ended.done == service.posts()
    assert {each: signal.getsignal(each) for each in before} == before
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=True, reason=name)


def test_signals_are_wanted_where_none_come(tmp_path, manifest):
    """Only the main thread receives signals."""
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(api.run_sync, manifest, tmp_path / "run", signals=True)
    assert "main thread" in str(call.exception())
    assert isinstance(call.exception(), ValueError)


@pytest.mark.parametrize("answer", [True, False])
def test_ctrl_c_at_a_question_does_not_wait_for_its_answer(tmp_path, manifest, service, answer):
    """Nothing has started: it is raised at once, and a later answer starts nothing."""
    asked, go = threading.Event(), threading.Event()

    def confirm(_):
        asked.set()
        go.wait(20)
        return answer

    def interrupt():
        asked.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    others = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        api.run_sync(manifest, tmp_path / "run", settings=settings_for(service), confirm=confirm)
    assert not go.is_set()
    thread.join()
    go.set()
    wait_for(lambda: threading.active_count() < others, "the end of the call's thread")
    assert service.posts() == 0
    require_completion(manifest, tmp_path / "run", service)


# --- an event loop ----------------------------------------------------------------------------------------


def run_in(loop_factory, main):
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_ctrl_c_under_asyncio_run(tmp_path, manifest, service, loop):
    """It cancels the main task: the run stops in order, then asyncio raises KeyboardInterrupt."""
    with interrupting(service) as moments, pytest.raises(KeyboardInterrupt):
        run_in(loop, api.run(manifest, tmp_path / "run", settings=settings_for(service)))
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=True, stopped="cancelled", reason="the caller cancelled it")
    require_completion(manifest, tmp_path / "run", service)


@LOOPS
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_plain_call_that_holds_up_a_loop(tmp_path, manifest, service, loop, times):
    """`run_sync` in a coroutine: the handler of `asyncio.run` could only wake the loop, which waits for the call."""
    if times == 2:
        service.handlers["status"] = NEVER

    async def main():
        handler = signal.getsignal(signal.SIGINT)
        try:
            api.run_sync(manifest, tmp_path / "run", settings=settings_for(service))
        finally:
            assert signal.getsignal(signal.SIGINT) is handler

    with interrupting(service, after=2, times=times) as moments, pytest.raises(KeyboardInterrupt, match="repeat"):
        run_in(loop, main())
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=times == 1)
    require_completion(manifest, tmp_path / "run", service)


@LOOPS
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_second_ctrl_c_under_asyncio_run(tmp_path, manifest, service, loop, pause):
    """The drain stops at once; journal and results are still complete, and Python's handler is restored."""
    service.handlers["status"] = NEVER
    with interrupting(service, after=2, times=2, pause=pause) as moments, pytest.raises(KeyboardInterrupt):
        run_in(loop, api.run(manifest, tmp_path / "run", settings=settings_for(service, drain=5 if pause else 0.5)))
    assert time.time() - moments[0] < 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told = summary(tmp_path / "run")
    assert told["stopped"] in {"cancelled", "signal"}, "whichever reached the loop first"
    require_whole(tmp_path / "run", service, collected=False, stopped=told["stopped"], reason=told["reason"])
    require_completion(manifest, tmp_path / "run", service)


class Interrupts(Observer):
    """Sends SIGINT during a job's step, so that its exception would be raised there."""

    def __init__(self, times: int) -> None:
        self.left = times

    def happened(self, action, **facts):
        if action == "accepted" and self.left:
            self.left -= 1
            signal.raise_signal(signal.SIGINT)


@LOOPS
@pytest.mark.parametrize("times", [2, 3])
def test_ctrl_c_in_the_middle_of_a_step_tears_nothing(tmp_path, manifest, service, loop, times):
    """A second Ctrl-C at an arbitrary instruction would leave tasks and threads behind, so it is deferred."""
    service.handlers["status"] = NEVER
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_in(
            loop,
            api.run(
                manifest,
                tmp_path / "run",
                settings=settings_for(service, max_in_flight=4, drain=20),
                observer=Interrupts(times),
            ),
        )
    wait_for(lambda: threading.active_count() <= before, "the end of the threads")
    told = summary(tmp_path / "run")
    require_whole(tmp_path / "run", service, collected=False, stopped=told["stopped"], reason=told["reason"])
    require_completion(manifest, tmp_path / "run", service)


def test_ctrl_c_in_a_loop_with_no_handler_of_its_own(tmp_path, manifest, service):
    """`run_until_complete`: Python's handler would raise inside the loop and leave the run suspended."""
    loop = asyncio.new_event_loop()
    try:
        with interrupting(service) as moments, pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(api.run(manifest, tmp_path / "run", settings=settings_for(service)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        loop.close()
    require_no_submit_after(moments[0], service)
    require_whole(tmp_path / "run", service, collected=True)
    require_completion(manifest, tmp_path / "run", service)


def test_ctrl_c_while_two_runs_share_a_loop(tmp_path, manifest, service):
    """Both stop in order; the handler is restored after the later one."""
    places = [tmp_path / "a", tmp_path / "b"]

    async def both():
        await asyncio.gather(*(api.run(manifest, place, settings=settings_for(service)) for place in places))

    with interrupting(service, after=4), pytest.raises(KeyboardInterrupt):
        asyncio.run(both())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told = [summary(place) for place in places]
    assert [each["stopped"] for each in told] == ["cancelled"] * 2
    assert sum(each["done"] for each in told) == service.posts() < ROWS


def test_a_loop_that_ends_first_leaves_whole_results(tmp_path, manifest, service):
    """A task without a waiter: the end of the main task cancels every task, including those of the run."""
    service.handlers["status"] = NEVER

    async def main():
        task = asyncio.create_task(api.run(manifest, tmp_path / "run", settings=settings_for(service)))
        while len(service.requests) < 2:
            await asyncio.sleep(0.01)
        return task

    asyncio.run(main())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told = summary(tmp_path / "run")
    require_whole(tmp_path / "run", service, collected=False, stopped="cancelled", reason=told["reason"])
    require_completion(manifest, tmp_path / "run", service)


async def submits(service, count: int = 3) -> float:
    """Wait for this many submits; return the time."""
    while len(service.requests) < count:
        await anyio.sleep(0.01)
    return time.time()


CANCELLED = {"stopped": "cancelled", "reason": "the caller cancelled it"}


def test_a_task_that_is_cancelled(tmp_path, manifest, service):
    """By the program's code: jobs are collected first, then the cancellation is raised."""

    async def main():
        task = asyncio.create_task(api.run(manifest, tmp_path / "run", settings=settings_for(service)))
        moment = await submits(service)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return moment, task.cancelled()

    moment, was_cancelled = asyncio.run(main())
    assert was_cancelled
    require_no_submit_after(moment, service)
    require_whole(tmp_path / "run", service, collected=True, **CANCELLED)
    require_completion(manifest, tmp_path / "run", service)


def test_a_task_that_is_cancelled_twice(tmp_path, manifest, service):
    """The second cancellation stops the drain."""
    service.handlers["status"] = NEVER

    async def main():
        task = asyncio.create_task(api.run(manifest, tmp_path / "run", settings=settings_for(service)))
        await submits(service, 2)
        task.cancel()
        await asyncio.sleep(0.2)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    asyncio.run(main())
    require_whole(tmp_path / "run", service, collected=False, **CANCELLED)
    require_completion(manifest, tmp_path / "run", service)


def test_a_timeout_of_asyncio(tmp_path, manifest, service):
    """`asyncio.timeout` ends after the drain; its TimeoutError is raised."""
    service.handlers["status"] = NEVER

    async def within():
        async with asyncio.timeout(None) as timeout:
            watch = asyncio.create_task(submits(service, 2))
            watch.add_done_callback(lambda _: timeout.reschedule(asyncio.get_running_loop().time()))
            await api.run(manifest, tmp_path / "run", settings=settings_for(service, drain=0.5))

    async def main():
        began, task = time.monotonic(), asyncio.current_task()
        with pytest.raises(TimeoutError):
            await within()
        assert task.cancelling() == 0
        return time.monotonic() - began

    assert asyncio.run(main()) < 15
    require_whole(tmp_path / "run", service, collected=False, **CANCELLED)
    require_completion(manifest, tmp_path / "run", service)


@pytest.mark.parametrize("again", [False, True])
def test_a_scope_of_anyio_that_is_cancelled(tmp_path, manifest, service, again):
    """As with `move_on_after`. Code after the scope continues, for example with another run in the same loop."""

    async def main():
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel():
                    await submits(service)
                    scope.cancel()

                tasks.start_soon(cancel)
                await api.run(manifest, tmp_path / "run", settings=settings_for(service))
        assert scope.cancelled_caught
        moment = time.time()
        require_whole(tmp_path / "run", service, collected=True, **CANCELLED)
        await anyio.sleep(0)
        if again:
            service.handlers["status"] = targets.status
            ended = await api.run(manifest, tmp_path / "run", settings=settings_for(service, max_in_flight=16))
            assert ended.done == ROWS
        else:
            require_no_submit_after(moment, service)

    asyncio.run(main())
    require_completion(manifest, tmp_path / "run", service)


def test_a_cancellation_before_anything_was_begun(tmp_path, manifest, service):
    """While planning: nothing is submitted, no run directory is created, and the directory is free."""

    async def main():
        task = asyncio.create_task(
            api.run(manifest, tmp_path / "run", settings=settings_for(service), confirm=lambda _: task.cancel() or True)
        )
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert service.posts() == 0
    assert not (tmp_path / "run" / "results.parquet").exists()
    require_completion(manifest, tmp_path / "run", service)


# --- a notebook -------------------------------------------------------------------------------------------


class Notebook:
    """Cells in a real kernel."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager, self.client = manager, manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, code: str) -> str:
        """Start a cell and return its id."""
        return self.client.execute(textwrap.dedent(code))

    def end(self, cell: str) -> tuple[str, str]:
        """Wait for a cell. Return the name of its error (empty without one) and its output."""
        error, text, end = "", "", time.monotonic() + 30
        while time.monotonic() < end:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Empty:
                continue
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            match message["msg_type"]:
                case "error":
                    error, text = content["ename"], text + content["evalue"]
                case "stream":
                    text += content["text"]
                case "status" if content["execution_state"] == "idle":
                    return error, text
        raise AssertionError(f"the cell did not end: {text}")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    manager = KernelManager(kernel_name="python3")
    extra = {
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
        "PYTHONPATH": str(REPOSITORY),
    }
    manager.start_kernel(env=environment(extra), cwd=str(tmp_path_factory.mktemp("notebook")))
    book = Notebook(manager)
    try:
        yield book
    finally:
        book.client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


@pytest.mark.filterwarnings("default")  # of Jupyter's own libraries
@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        ("api.run_sync", "KeyboardInterrupt", {}),
        ("await api.run", "CancelledError", CANCELLED),
        ("await asyncio.sleep(0) or api.run_sync", "KeyboardInterrupt", {}),
    ],
)
def test_a_kernel_that_is_interrupted(tmp_path, manifest, service, notebook, call, error, why):
    """Jobs in flight are collected, the cell ends with its error, and the next cell completes the same directory."""
    text = """
    import asyncio
    from batch import api
    ended = {call}({manifest!r}, {out!r}, settings={settings!r})
    print(ended.exit_code.name, ended.done)
    """
    values = {"call": call, "manifest": str(manifest), "out": str(tmp_path / "run")}
    cell = notebook.start(text.format(**values, settings=settings_for(service)))
    wait_for(lambda: len(service.requests) >= 3, "the submits", timeout=20)
    moment = time.time()
    notebook.manager.interrupt_kernel()
    assert notebook.end(cell)[0] == error
    require_no_submit_after(moment, service)
    require_whole(tmp_path / "run", service, collected=True, **why)
    service.handlers["status"] = targets.status
    cell = notebook.start(text.format(**values, settings=settings_for(service, max_in_flight=16)))
    assert notebook.end(cell) == ("", f"COMPLETE {ROWS}\n")
    assert service.posts() == len(service.requests) == ROWS


@pytest.mark.filterwarnings("default")  # of Jupyter's own libraries
def test_a_kernel_that_is_interrupted_twice(tmp_path, manifest, service, notebook):
    """The drain stops at once, and the kernel's own interrupt handling is restored."""
    service.handlers["status"] = NEVER
    text = f"api.run_sync({str(manifest)!r}, {str(tmp_path / 'run')!r}, settings={settings_for(service)!r})"
    cell = notebook.start(f"from batch import api\n{text}")
    wait_for(lambda: len(service.requests) >= 2, "the submits", timeout=20)
    for _ in range(2):
        notebook.manager.interrupt_kernel()
        time.sleep(0.2)
    assert notebook.end(cell)[0] == "KeyboardInterrupt"
    require_whole(tmp_path / "run", service, collected=False)
    cell = notebook.start("import time\nprint('sleeps', flush=True)\ntime.sleep(20)")
    time.sleep(0.3)
    notebook.manager.interrupt_kernel()
    assert notebook.end(cell) == ("KeyboardInterrupt", "sleeps\n")
    require_completion(manifest, tmp_path / "run", service)
