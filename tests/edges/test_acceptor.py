"""More connections than a server may open: they wait, idle ones are closed, and nothing breaks."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import uvloop
from aiohttp import web

from batch.system import acceptor as module
from batch.system.acceptor import Acceptor, bound

LIMIT = 8
SOON = 8.0
"""Seconds; an idle connection is closed after one."""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request):
    """Both event loops: each accepts in its own way, and neither is used for accepting."""
    return request.param


@asynccontextmanager
async def serving(handler, *, limit=LIMIT, wrapped=lambda listener: listener):
    """A server with that many connections; yields its port and its Acceptor."""
    acceptor = Acceptor(limit)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    acceptor.watch(app)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    listener = bound("127.0.0.1", 0)
    try:
        async with acceptor.accepting(wrapped(listener), runner.server):
            yield listener.getsockname()[1], runner.server
    finally:
        listener.close()
        await runner.cleanup()


async def hello(_):
    return web.Response(text="hello")


class Caller:
    """One raw connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def at(cls, port):
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, body=b""):
        self.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        return await self.answer()

    async def answer(self):
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return head, await self.reader.readexactly(length)

    async def is_closed(self):
        return await self.reader.read(1) == b""

    async def close(self):
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


async def asked(port):
    """Make one call on its own connection, as most clients do."""
    caller = await Caller.at(port)
    try:
        return (await caller.ask())[1]
    finally:
        await caller.close()


def test_more_callers_than_connections_are_all_answered(run):
    """Ten times as many: the others wait, and the limit is never exceeded."""

    async def use():
        most = 0

        async def handler(request):
            nonlocal most
            most = max(most, len(server.connections))
            await asyncio.sleep(0.01)
            return await hello(request)

        async with serving(handler) as (port, server), asyncio.timeout(SOON):
            assert set(await asyncio.gather(*(asked(port) for _ in range(10 * LIMIT)))) == {b"hello"}
        assert 1 < most <= LIMIT

    run(use())


def test_idle_connections_make_room_for_those_that_wait(run):
    """As many as needed, including connections without any request; the others stay usable."""

    async def use():
        async with serving(hello) as (port, _), asyncio.timeout(SOON):
            kept = await Caller.at(port)
            assert (await kept.ask())[1] == b"hello"
            callers = [kept] + [await Caller.at(port) for _ in range(LIMIT - 1)]
            await asyncio.sleep(1.2 * module.IDLE_SECONDS)
            assert {await asked(port) for _ in range(2)} == {b"hello"}
            assert await kept.is_closed()
            assert await callers[1].is_closed()
            assert (await callers[2].ask())[1] == b"hello"
            for caller in callers:
                await caller.close()

    run(use())


def test_what_is_under_way_is_never_cut(run):
    """A handler at work, an answer or a body in transfer: they are not idle, however long they take."""

    async def use():
        go = asyncio.Event()

        async def handler(request):
            body = await request.read()
            if body == b"wait":
                await go.wait()
            return web.Response(body=bytes(2**24) if body == b"large" else b"small")

        async with serving(handler, limit=3) as (port, _), asyncio.timeout(SOON):
            working, reading, sending = [await Caller.at(port) for _ in range(3)]
            ends = asyncio.create_task(working.ask(b"wait"))
            reading.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nlarge")
            sending.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nha")
            waiting = asyncio.create_task(asked(port))
            await asyncio.sleep(2 * module.IDLE_SECONDS)
            assert not waiting.done()
            sending.writer.write(b"lf")
            assert (await sending.answer())[1] == b"small"
            assert len((await reading.answer())[1]) == 2**24
            go.set()
            assert (await ends)[1] == b"small"
            assert await waiting == b"small"
            for caller in (working, reading, sending):
                await caller.close()

    run(use())


def test_a_crowded_server_says_that_a_connection_ends(run):
    """So that the client does not send its next request on a connection that is about to be closed."""

    async def use():
        async with serving(hello) as (port, _), asyncio.timeout(SOON):
            alone = await Caller.at(port)
            assert "connection: close" not in (await alone.ask())[0]
            others = [await Caller.at(port) for _ in range(LIMIT - 1)]
            while "connection: close" not in (await alone.ask())[0]:
                await asyncio.sleep(0.01)
            assert await alone.is_closed()
            for caller in (alone, *others):
                await caller.close()

    run(use())


class Refusing:
    """A listener whose first accepts fail."""

    def __init__(self, errors, listener):
        self._errors, self._listener = errors, listener

    def accept(self):
        if self._errors:
            raise OSError(self._errors.pop(0), "refused")
        return self._listener.accept()

    def fileno(self):
        return self._listener.fileno()


def test_without_a_descriptor_callers_wait_and_one_line_is_logged(run, caplog):
    """Neither a traceback for each try, nor connections that are accepted and dropped."""

    async def use():
        wrapped = partial(Refusing, [errno.EMFILE, errno.ENFILE, errno.EMFILE])
        async with serving(hello, wrapped=wrapped) as (port, _), asyncio.timeout(SOON):
            assert set(await asyncio.gather(*(asked(port) for _ in range(5)))) == {b"hello"}

    run(use())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.exc_info is None
    assert "ulimit -n" in record.message


def test_a_connection_that_broke_before_it_was_accepted_is_nothing_to_log(run, caplog):
    """Its client is gone."""

    async def use():
        wrapped = partial(Refusing, [errno.ECONNABORTED, errno.EPROTO])
        async with serving(hello, wrapped=wrapped) as (port, _), asyncio.timeout(SOON):
            assert await asked(port) == b"hello"

    run(use())
    assert not caplog.records


def test_an_end_leaves_no_socket_behind(run):
    """Connections being opened are closed; pytest fails on leaked sockets."""

    async def use():
        async with serving(hello) as (port, _):
            callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(LIMIT)]
            await asyncio.sleep(0)
        for caller in callers:
            caller.close()

    run(use())
