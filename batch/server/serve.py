"""The server as a process: lock, store, engine, socket, and the way down. The server's composition root.

Owns what is outside of any request: the data dir's lock, the port, signals. A server that is stopped lets go of
what it executes; the next one on the same data dir goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import math
import os
import random
import signal
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage
from filelock import AsyncFileLock, Timeout

from batch.errors import ConfigError, InputError, StorageError
from batch.fal.endpoint import APP_ID
from batch.server.egress.http_client import SafeHttpClient
from batch.server.egress.source_images import SourceFetcher
from batch.server.egress.ssrf import address_rule
from batch.server.engines import engine_of
from batch.server.engines.base import Engine
from batch.server.engines.flux.options import FluxOptions
from batch.server.engines.process_pool import usable_cores
from batch.server.faults.injection import FaultInjection
from batch.server.faults.plan import read_faults
from batch.server.files.storage import Storage
from batch.server.http import platform as listing
from batch.server.http.app import application
from batch.server.http.auth import ENVIRONMENT, Authenticator, Keys
from batch.server.limits import DEFAULT_LIMITS, ServerLimits
from batch.server.queue import webhooks
from batch.server.queue.cleanup import DEFAULT_SECONDS, Cleanup, cleaning_up
from batch.server.queue.request_log import RequestLog
from batch.server.queue.service import QueueService, queue_service
from batch.server.queue.store import Store
from batch.system.acceptor import Acceptor, bound
from batch.system.descriptors import Allowance, ServerShare, described, lacks_descriptor, require, server_share
from batch.system.durable import make_folders
from batch.system.open_files import allowance

__all__ = ["ServeOptions", "run_server", "serve"]

_log = logging.getLogger(__name__)

DRAIN_SECONDS = 2.0
"""How long open calls may take to end when the server goes down."""
_DISK_LOOK_SECONDS = 0.5
_KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be idle. Precedent: nginx."""
_START_FILES = 30
"""Descriptors that a server needs before it has a connection."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to run a server."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8787
    """0: the one that this data dir had last, if it is free, else any."""
    engine: str = "preview"
    slots: int | None = None
    """Requests executed at once; None: what suits the engine."""
    service_time: float = 0.0
    """Seconds that a job of the `echo` engine takes."""
    flux: FluxOptions | None = None
    """What the `flux` engine is to run, and where; with it `engine` has to be `flux`."""
    allow_private: bool = False
    """Whether source images may be fetched from, and webhooks sent to, loopback and private addresses."""
    keys: Keys = field(default_factory=Keys)
    """None of them: everybody may ask, and it listens on loopback only."""
    price_usd: float = 0.0
    """Of a megapixel, as the price list and the billing events tell it."""
    faults: Path | None = None
    """A faults file: failures on purpose, to rehearse."""
    retention: float = DEFAULT_SECONDS
    """Seconds that finished results and files stay."""
    tls_cert: Path | None = None
    """PEM files of certificate (and chain) and its key: https instead of http."""
    tls_key: Path | None = None
    disk_patience: float | None = None
    """Seconds after which a server gives up that can write nothing any more; None: it waits for room."""
    limits: ServerLimits = DEFAULT_LIMITS


async def serve(
    options: ServeOptions,
    *,
    ready: Callable[[str], None],
    engine: Engine | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until cancelled, until SIGTERM or SIGINT, or until `stop` is set.

    Args:
        options: see there.
        ready: is told the server's URL as soon as it answers.
        engine: one that is made already; `options.engine` is then only a name.
        stop: ends the server when it is set.

    Raises:
        StorageError: nothing could be written for `disk_patience`, or there is no room to begin with.
        InputError: the port or the data dir is in use or cannot be used, the engine is not known or cannot work, an
            option is out of its range, the faults file is wrong, or too few files may be open.
    """
    allowed = allowance()
    require(allowed, _START_FILES)
    stop = stop or asyncio.Event()
    logging.getLogger("aiohttp.server").addFilter(_one_line_for_nonsense)
    _check(options)
    rehearsal = FaultInjection(read_faults(options.faults)) if options.faults is not None else None
    if rehearsal is not None:
        _log.warning("this server fails on purpose, as %s says", options.faults)
    tls = _tls(options.tls_cert, options.tls_key)
    async with contextlib.AsyncExitStack() as stack:
        with _usable(options.data_dir):
            make_folders(options.data_dir)
            await stack.enter_async_context(_locked(options.data_dir, options.limits.lock_seconds))
            listener = stack.enter_context(contextlib.closing(_listen(options)))
            _check_exposure(options, listener)
            store = await stack.enter_async_context(await Store.open(options.data_dir / "server.db", options.retention))
            storage = await stack.enter_async_context(Storage(options.data_dir, limits=options.limits))
            signer = webhooks.signing_key(options.data_dir / "webhook-key.pem")
        share, limits = _share(allowed, options, own_engine=engine is not None)
        rule = address_rule(allow_private=options.allow_private)
        guard = await stack.enter_async_context(SafeHttpClient(rule, limit=share.outgoing))
        sources = SourceFetcher(storage, guard, limit_bytes=options.limits.source_bytes)
        engine = engine or _engine(options, share)
        if rehearsal is not None:
            engine = rehearsal.engine(engine)
        rules = rehearsal.listing if rehearsal is not None else None
        history = await stack.enter_async_context(
            RequestLog(options.data_dir / "server.db", rules, listed_bytes=options.limits.listed_bytes)
        )
        stack.push_async_callback(engine.aclose)
        await engine.start()
        service = await stack.enter_async_context(
            queue_service(store, storage, engine, sources, time.time, options.retention)
        )
        await stack.enter_async_context(cleaning_up(Cleanup(store, storage, options.retention), time.time))
        sender = webhooks.Webhooks(service, store, guard, signer, time.time, random.random)
        await stack.enter_async_context(webhooks.sending(sender))
        stack.enter_context(_signals(stop))
        authenticator = Authenticator(options.keys, storage.derived(b"cdn tokens"), APP_ID, time.time)
        listed = listing.routes(service, APP_ID, history, options.price_usd, limits=options.limits)
        more = [*listed, *webhooks.routes(signer)]
        app = application(
            service,
            authenticator,
            guard.permitted,
            more=more,
            idempotency=rehearsal is None or rehearsal.idempotency,
            middleware=None if rehearsal is None else rehearsal.middleware(service, APP_ID),
            share=share,
            limits=options.limits,
        )
        acceptor = Acceptor(share.connections, tls)
        acceptor.watch(app)
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=DRAIN_SECONDS, keepalive_timeout=_KEEP_ALIVE_SECONDS
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        stack.callback(service.stop)  # first of all, so that nobody waits on a stream while the calls drain
        stack.callback(listener.close)  # whoever connects now is refused, and does not wait for nothing
        assert runner.server is not None, "it is set up"
        await stack.enter_async_context(acceptor.accepting(listener, runner.server))
        _log.info(limits)
        ready(_url(options.host, listener, "http" if tls is None else "https"))
        refusal = await _stopped(stop, service, options.disk_patience)
        _log.info("stopping")
    if refusal is not None:  # raised here: in there it would come out wrapped by the groups of tasks that it ends
        raise StorageError(refusal)


async def _stopped(stop: asyncio.Event, service: QueueService, disk_patience: float | None) -> str | None:
    """Wait for the end, at most so long against a disk that refuses; what was refused, where that is the end."""
    while disk_patience is not None and not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _DISK_LOOK_SECONDS)
        refused = service.disk_refuses
        if refused is not None and time.monotonic() - refused[0] > disk_patience:
            return refused[1]
    await stop.wait()
    return None


def _one_line_for_nonsense(record: logging.LogRecord) -> bool:
    """What is no HTTP is its sender's fault, and answered with 400: aiohttp would log it as a crash of ours."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, BadHttpMessage | web.RequestPayloadError):
        record.msg, record.args = "a request that is no HTTP was refused: %s", (" ".join(str(error).split())[:200],)
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def run_server(
    options: ServeOptions, *, ready: Callable[[str], None], stop: Callable[[], asyncio.Event] | None = None
) -> None:
    """`serve` in an event loop of its own, uvloop's where there is one.

    Args:
        options: see there.
        ready: see `serve`.
        stop: makes the event that ends the server; called inside the loop.
    """

    async def main() -> None:
        await serve(options, ready=ready, stop=stop() if stop is not None else None)

    # What is dropped here goes by its count of references; the collector would walk through all that waits, and
    # through every module, many times a second (7 % of the time of a busy server, and its longest pauses).
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())


def _check(options: ServeOptions) -> None:
    """Refuse numbers that no server can work with, before anything is opened."""
    if not 0 <= options.port < 65536:
        raise InputError(f"{options.port} is no port; --port is a number from 0 (any free one) to 65535")
    if not options.host:  # which a socket takes for every address there is
        raise InputError("--host is empty; name the address to listen at, for instance 127.0.0.1")
    if options.slots is not None and options.slots < 1:
        raise InputError(f"a server with {options.slots} slots executes nothing; --slots is 1 or more")
    if not 0 <= options.service_time < math.inf:
        raise InputError(f"a job cannot take {options.service_time:g} s; say for instance --service-time 2s")
    if not 0 <= options.price_usd < math.inf:
        raise InputError(f"{options.price_usd} is no price of a megapixel; say US dollars, for instance --price 0.03")
    if not options.retention > 0:
        raise InputError(f"results cannot be kept for {options.retention:g} s; say for instance --retention 30d")


def _share(allowed: Allowance, options: ServeOptions, *, own_engine: bool) -> tuple[ServerShare, str]:
    """What the limit of open files leaves with the data dir open, and a line that says it."""
    wanted = 0 if own_engine else _processes(options)
    share = server_share(replace(allowed, in_use=allowance().in_use), wanted)
    words = described(allowed, share.connections)
    if share.workers < wanted:
        words = f"{words}, and {share.workers} of {wanted} worker processes"
        if options.flux is not None:  # a device each: none can be left out
            raise InputError(f"{words}; raise the limit, for example with `ulimit -n 1024`")
    if share.threads < _THREADS:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(share.threads, "files"))
    return share, words


def _processes(options: ServeOptions) -> int:
    """Worker processes that the engine would start."""
    if options.flux is not None:
        return len(options.flux.devices)
    return (options.slots or usable_cores()) if options.engine == "preview" else 0


_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of the executor that `asyncio.to_thread` uses otherwise."""


def _engine(options: ServeOptions, share: ServerShare) -> Engine:
    if options.flux is not None and options.engine != "flux":
        raise ConfigError(f"a model is given and the engine is {options.engine}; say --engine flux, or leave it out")
    try:
        slots = share.workers if options.engine == "preview" else options.slots
        return engine_of(options.engine, slots, options.service_time, options.flux)
    except ValueError as error:
        raise InputError(str(error)) from error


def _listen(options: ServeOptions) -> socket.socket:
    """A listening socket. With port 0 the data dir's last port is tried first, so that URLs given out stay valid."""
    memory = options.data_dir / "port"
    last = _last_port(memory) if options.port == 0 else None
    try:
        try:
            listener = bound(options.host, last if last is not None else options.port)
        except OSError:
            if last is None:
                raise
            listener = bound(options.host, 0)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {options.port} of {options.host} is in use by another program; choose another with --port"
            ) from error
        raise InputError(f"cannot listen on {options.host}:{options.port}: {error}; check host and port") from error
    except TypeError as error:  # what the standard library says of a name that no address can have
        raise InputError(f"{options.host!r} is no name of a host ({error}); check --host") from error
    try:
        memory.write_text(str(listener.getsockname()[1]), "ascii")
    except OSError:
        listener.close()
        raise
    return listener


def _check_exposure(options: ServeOptions, listener: socket.socket) -> None:
    """Without keys nobody but this machine may reach the server; judged by what it is really bound to."""
    if not options.keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        raise ConfigError(
            f"without keys the endpoint listens on loopback only, not on {options.host}; make a key with"
            f" `restyle serve --keys FILE --new-key NAME` and start with --keys FILE (or {ENVIRONMENT})"
        )


def _last_port(memory: Path) -> int | None:
    try:
        port = int(memory.read_text("ascii"))
    except (OSError, ValueError):
        return None
    return port if 0 < port < 65536 else None


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("https needs both a certificate and its key: --tls-cert FILE --tls-key FILE")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # else OpenSSL asks at the terminal
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} cannot be used as certificate and key: {error}; give two PEM files that belong"
            " together, the key without a passphrase"
        ) from error
    return context


def _url(host: str, listener: socket.socket, scheme: str) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - read, not bound
    return f"{scheme}://{name}:{listener.getsockname()[1]}"


@contextlib.contextmanager
def _usable(data_dir: Path) -> Iterator[None]:
    """What the disk refuses in the block, said as a sentence about the data dir.

    Raises:
        StorageError: it is full. InputError: no server can work there.
    """
    if data_dir.is_file():
        raise InputError(f"{data_dir} is a file; --data-dir names the folder of the server")
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if lacks_descriptor(error):
            raise
        number, code = getattr(error, "errno", None), getattr(error, "sqlite_errorcode", None)
        if number in {errno.ENOSPC, errno.EDQUOT} or code == sqlite3.SQLITE_FULL:
            raise StorageError(
                f"the data dir {data_dir} cannot be written: {error}; make room and start again"
            ) from error
        raise InputError(
            f"the data dir {data_dir} cannot be used: {error}; name a folder that can be written with --data-dir"
        ) from error


@contextlib.asynccontextmanager
async def _locked(data_dir: Path, seconds: float) -> AsyncIterator[None]:
    """Hold the data dir: two servers would each execute every request. The kernel frees the lock of a dead process.

    Raises:
        InputError: another server still holds it after `seconds`.
    """
    # Without threads: an attempt does not block, and the number of threads is not decided yet.
    lock = AsyncFileLock(data_dir / "lock", timeout=seconds, run_in_executor=False)
    try:
        await lock.acquire()
    except Timeout as error:
        raise InputError(f"{data_dir} is in use by another server; stop it or choose another data dir") from error
    try:
        yield
    finally:
        await lock.release()


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT end the server; left alone where this is not the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
