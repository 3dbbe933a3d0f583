"""A call that a thread waits for, and interrupts that arrive at any moment."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from batch.system.sync_call import BlockingCall, current_call


def called(function, *, signals=False):
    return BlockingCall(function, str, signals=signals).result("a call", {})


def interrupt():
    """Do what the kernel does at Ctrl-C; this thread is not the main one."""
    os.kill(os.getpid(), signal.SIGINT)


def test_a_call_returns_and_raises_as_the_coroutine_does():
    """Without an interrupt, the thread is invisible."""

    async def fails():
        raise ValueError("its own")

    async def works():
        return threading.current_thread().name

    assert called(works) == "a call"
    with pytest.raises(ValueError, match="its own"):
        called(fails)
    assert current_call() is None


def test_a_call_that_leaves_nothing_is_cancelled():
    """A plan, for example: cancelled at its await, and KeyboardInterrupt is raised when it has ended."""
    ends = []

    async def waits():
        try:
            await anyio.to_thread.run_sync(interrupt)
            await anyio.sleep_forever()
        finally:
            ends.append("ended")

    with pytest.raises(KeyboardInterrupt):
        called(waits)
    assert ends == ["ended"]


def test_a_call_that_cannot_be_cancelled_is_left_behind():
    """A long computation in a thread with nothing to finish: the caller waits a second for it."""
    go, ended = threading.Event(), threading.Event()

    def work():
        interrupt()
        go.wait(20)

    async def computes():
        await anyio.to_thread.run_sync(work)
        await anyio.lowlevel.checkpoint()
        ended.set()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        called(computes)
    assert 0.5 < time.monotonic() - began < 10
    go.set()
    assert not ended.wait(0.2)


@pytest.mark.parametrize("times", [1, 2])
def test_a_call_that_stops_in_order_is_waited_for(times):
    """It receives each interrupt; the exception has its result as text."""
    heard = []

    async def stops():
        again = anyio.Event()

        def stop(name):
            heard.append(name)
            if len(heard) == times:
                again.set()

        call = current_call()
        assert call is not None
        call.stopped_by(stop)
        for number in range(times):
            await anyio.to_thread.run_sync(interrupt)
            while len(heard) <= number:
                await anyio.sleep(0.001)
        await again.wait()
        await anyio.sleep(0.01)
        return "stopped in order"

    with pytest.raises(KeyboardInterrupt, match="stopped in order"):
        called(stops)
    assert heard == ["SIGINT"] * times


def test_a_fault_after_the_interrupt_is_its_cause():
    """For example, a full disk at the end."""

    async def breaks():
        call = current_call()
        assert call is not None
        stopped = anyio.Event()
        call.stopped_by(lambda _: stopped.set())
        await anyio.to_thread.run_sync(interrupt)
        await stopped.wait()
        raise OSError("no space left")

    with pytest.raises(KeyboardInterrupt) as caught:
        called(breaks)
    assert isinstance(caught.value.__cause__, OSError)


def test_an_interrupt_at_the_very_end_is_not_lost():
    """It arrives when the coroutine has returned and its thread is ending."""

    async def returns():
        return "done"

    class Loop(asyncio.SelectorEventLoop):
        def close(self):
            super().close()
            interrupt()
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        BlockingCall(returns, str, signals=False).result("a call", {"loop_factory": Loop})


def test_nested_calls_keep_apart():
    """A call inside another call's coroutine is separate; afterwards the outer one is current again."""

    async def inner():
        return current_call()

    async def outer():
        mine = current_call()
        nested = await anyio.to_thread.run_sync(called, inner)
        return mine is current_call(), nested is not mine, nested is not None

    assert called(outer) == (True, True, True)
