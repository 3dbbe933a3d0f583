"""Group commit: the size of a group, the answer to each caller, and closing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from batch.system.group_commit import GroupCommit


class Disk:
    """Notes the groups it gets; the items `bad` are refused, and it takes `seconds` for a group."""

    def __init__(self, seconds=0.0):
        self.groups, self.seconds, self.go = [], seconds, threading.Event()
        self.go.set()

    def write(self, items):
        self.go.wait(10)
        time.sleep(self.seconds)
        self.groups.append(items)
        return [ValueError("bad") if item == "bad" else f"{item} written" for item in items]


def test_what_comes_in_one_turn_is_one_group_and_each_hears_its_own():
    """An exception among the answers hurts its own caller only; what comes meanwhile is the next group."""
    disk = Disk()

    async def use():
        group = GroupCommit(disk.write, "test")
        disk.go.clear()
        first = [group.put(item) for item in ("a", "bad", "b")]
        await asyncio.sleep(0.02)
        second = [group.put("c"), group.put("d")]
        assert group.waiting == 5
        disk.go.set()
        told = await asyncio.gather(*first, *second, return_exceptions=True)
        assert [str(one) for one in told] == ["a written", "bad", "b written", "c written", "d written"]
        await group.aclose()

    asyncio.run(use())
    assert disk.groups == [["a", "bad", "b"], ["c", "d"]]


@pytest.mark.parametrize(("slow_seconds", "sizes"), [(60.0, [4, 4, 2]), (0.0, [4, 6])])
def test_a_group_has_a_limit_unless_the_disk_is_slow(slow_seconds, sizes):
    """Then the next one takes everything."""
    disk = Disk(0.01)

    async def use():
        group = GroupCommit(disk.write, "test", limit=4, gather_seconds=0.01, slow_seconds=slow_seconds)
        await asyncio.gather(*(group.put(number) for number in range(10)))
        await group.aclose()

    asyncio.run(use())
    assert [len(items) for items in disk.groups] == sizes
    assert [item for items in disk.groups for item in items] == list(range(10))


def test_a_group_waits_for_more():
    """It waits `gather_seconds` from its first item."""
    disk = Disk()

    async def use():
        group = GroupCommit(disk.write, "test", gather_seconds=0.2)
        first = group.put("a")
        await asyncio.sleep(0.01)
        await asyncio.gather(first, group.put("b"))
        await group.aclose()

    asyncio.run(use())
    assert disk.groups == [["a", "b"]]


def test_what_nobody_waits_for_is_written():
    """Neither a cancelled answer nor the end of the loop's tasks stops it; closing waits for all of it."""
    disk = Disk(0.01)

    async def use():
        group = GroupCommit(disk.write, "test")
        group.put("a").cancel()
        group.put("b")
        await group.settled()
        assert disk.groups == [["a", "b"]]
        group.put("c")
        await group.aclose()

    asyncio.run(use())
    assert disk.groups == [["a", "b"], ["c"]]


def test_giving_up_answers_all_that_is_not_written():
    """Items that are being written fail too, and their later result is ignored."""
    disk = Disk()

    async def use():
        group = GroupCommit(disk.write, "test")
        disk.go.clear()
        answers = [group.put("a")]
        await asyncio.sleep(0.02)
        answers.append(group.put("b"))
        group.give_up(OSError("late"))
        told = await asyncio.gather(*answers, return_exceptions=True)
        assert [str(one) for one in told] == ["late", "late"]
        disk.go.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(group.settled(), 1)

    asyncio.run(use())
    assert disk.groups == [["a"]]


def test_other_work_comes_between_groups_and_may_be_repeated():
    """In the same thread, through the same `attempt`."""
    disk, tried = Disk(), []

    def twice(work):
        tried.append(threading.current_thread().name)
        return work()

    async def use():
        group = GroupCommit(disk.write, "writer", attempt=twice)
        answer = group.put("a")
        assert await group.call(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await group.call(lambda: 1 // 0)
        assert await answer == "a written"
        await group.aclose()

    asyncio.run(use())
    assert tried == ["writer"] * 3


def test_it_works_after_the_main_thread_has_ended():
    """As a run does that was started in a thread of its own: executors take nothing more then."""
    code = """
import asyncio, threading, time
from batch.system.group_commit import GroupCommit

async def use():
    threading.main_thread().join()
    time.sleep(0.05)
    group = GroupCommit(list, "test")
    print(await group.put("a"), await group.call(lambda: "b"))
    await group.aclose()

threading.Thread(target=asyncio.run, args=[use()]).start()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr) == ("a b\n", "")
