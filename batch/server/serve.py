"""Run the server: lock, store, engine, socket and shutdown. The server's composition root.

Handles everything outside of requests: the data dir's lock, the port, signals. Shutdown interrupts running requests;
the next server with the same data dir executes them again.
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
"""Seconds that open calls have to finish during shutdown."""
_DISK_LOOK_SECONDS = 0.5
_KEEP_ALIVE_SECONDS = 75.0
"""Idle timeout of a connection. Source: nginx's default."""
_START_FILES = 30
"""File descriptors that a server needs before the first connection."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of a server."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8787
    """0: the port that this data dir used last if it is free, else any."""
    engine: str = "preview"
    slots: int | None = None
    """Requests executed at once; None: the engine's default."""
    service_time: float = 0.0
    """Seconds per job of the `echo` engine."""
    flux: FluxOptions | None = None
    """Model and devices of the `flux` engine; requires `engine` to be `flux`."""
    allow_private: bool = False
    """Whether source images may be fetched from, and webhooks sent to, loopback and private addresses."""
    keys: Keys = field(default_factory=Keys)
    """API keys. Without any, the server requires no key and listens on loopback only."""
    price_usd: float = 0.0
    """Price per megapixel in the price list and the billing events."""
    faults: Path | None = None
    """A faults file: failures to inject."""
    retention: float = DEFAULT_SECONDS
    """Seconds that results and files are kept."""
    tls_cert: Path | None = None
    """PEM file of the certificate and its chain; with `tls_key`, the server uses https."""
    tls_key: Path | None = None
    disk_patience: float | None = None
    """Seconds of failed writes after which the server exits; None: it waits for free space."""
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
        options: the options of the server.
        ready: called with the server's URL when it accepts requests.
        engine: an existing engine; `options.engine` is then only its name.
        stop: stops the server when set.

    Raises:
        StorageError: the disk is full at the start, or writes failed for `disk_patience`.
        InputError: the port or the data dir is in use or unusable, the engine is unknown or unusable, an option or the
            faults file is invalid, or the limit of open files is too low.
    """
    allowed = allowance()
    require(allowed, _START_FILES)
    stop = stop or asyncio.Event()
    logging.getLogger("aiohttp.server").addFilter(_one_line_for_bad_http)
    _check(options)
    fault_injection = FaultInjection(read_faults(options.faults)) if options.faults is not None else None
    if fault_injection is not None:
        _log.warning("injecting faults from %s", options.faults)
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
        client = await stack.enter_async_context(SafeHttpClient(rule, limit=share.outgoing))
        source_fetcher = SourceFetcher(storage, client, limit_bytes=options.limits.source_bytes)
        engine = engine or _engine(options, share)
        if fault_injection is not None:
            engine = fault_injection.engine(engine)
        rules = fault_injection.listing if fault_injection is not None else None
        request_log = await stack.enter_async_context(
            RequestLog(options.data_dir / "server.db", rules, listed_bytes=options.limits.listed_bytes)
        )
        stack.push_async_callback(engine.aclose)
        await engine.start()
        service = await stack.enter_async_context(
            queue_service(store, storage, engine, source_fetcher, time.time, options.retention)
        )
        await stack.enter_async_context(cleaning_up(Cleanup(store, storage, options.retention), time.time))
        sender = webhooks.Webhooks(service, store, client, signer, time.time, random.random)
        await stack.enter_async_context(webhooks.sending(sender))
        stack.enter_context(_signals(stop))
        authenticator = Authenticator(options.keys, storage.derived(b"cdn tokens"), APP_ID, time.time)
        listed = listing.routes(service, APP_ID, request_log, options.price_usd, limits=options.limits)
        more = [*listed, *webhooks.routes(signer)]
        app = application(
            service,
            authenticator,
            client.permitted,
            more=more,
            idempotency=fault_injection is None or fault_injection.idempotency,
            middleware=None if fault_injection is None else fault_injection.middleware(service, APP_ID),
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
        stack.callback(service.stop)  # runs early, so that no stream blocks the shutdown
        stack.callback(listener.close)  # runs first: new connections are refused at once
        assert runner.server is not None, "the runner is set up"
        await stack.enter_async_context(acceptor.accepting(listener, runner.server))
        _log.info(limits)
        ready(_url(options.host, listener, "http" if tls is None else "https"))
        refusal = await _stopped(stop, service, options.disk_patience)
        _log.info("stopping")
    if refusal is not None:  # outside of the stack, whose task groups would wrap it in an ExceptionGroup
        raise StorageError(refusal)


async def _stopped(stop: asyncio.Event, service: QueueService, disk_patience: float | None) -> str | None:
    """Wait for `stop`; return the last error if writes fail for `disk_patience` seconds, else None."""
    while disk_patience is not None and not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _DISK_LOOK_SECONDS)
        refused = service.disk_refuses
        if refused is not None and time.monotonic() - refused[0] > disk_patience:
            return refused[1]
    await stop.wait()
    return None


def _one_line_for_bad_http(record: logging.LogRecord) -> bool:
    """Log invalid HTTP, which gets a 400, as one line; aiohttp would log it as a server error with a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, BadHttpMessage | web.RequestPayloadError):
        record.msg, record.args = "rejected invalid HTTP: %s", (" ".join(str(error).split())[:200],)
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def run_server(
    options: ServeOptions, *, ready: Callable[[str], None], stop: Callable[[], asyncio.Event] | None = None
) -> None:
    """Run `serve` in a new event loop, uvloop if installed.

    Args:
        options: the options of the server.
        ready: see `serve`.
        stop: creates the event that stops the server; called inside the loop.
    """

    async def main() -> None:
        await serve(options, ready=ready, stop=stop() if stop is not None else None)

    # Reference counting frees almost everything; the garbage collector would scan all waiting requests and all modules
    # many times a second (7 % of a busy server's time, and its longest pauses).
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())


def _check(options: ServeOptions) -> None:
    """Reject invalid options before anything is opened."""
    if not 0 <= options.port < 65536:
        raise InputError(f"invalid --port {options.port}: use 0 (any free port) to 65535")
    if not options.host:  # a socket would bind to every address
        raise InputError("--host is empty; use an address such as 127.0.0.1")
    if options.slots is not None and options.slots < 1:
        raise InputError(f"invalid --slots {options.slots}: use an integer >= 1")
    if not 0 <= options.service_time < math.inf:
        raise InputError(f"invalid --service-time {options.service_time:g} s: use a non-negative time, for example 2s")
    if not 0 <= options.price_usd < math.inf:
        raise InputError(
            f"invalid --price {options.price_usd}: use a non-negative number of US dollars, for example 0.03"
        )
    if not options.retention > 0:
        raise InputError(f"invalid --retention {options.retention:g} s: use a positive time, for example 30d")


def _share(allowed: Allowance, options: ServeOptions, *, own_engine: bool) -> tuple[ServerShare, str]:
    """Return the server's share of the open files that remain, and a log line about it."""
    wanted = 0 if own_engine else _processes(options)
    share = server_share(replace(allowed, in_use=allowance().in_use), wanted)
    words = described(allowed, share.connections)
    if share.workers < wanted:
        words = f"{words}, and {share.workers} of {wanted} worker processes"
        if options.flux is not None:  # one process per device, all required
            raise InputError(f"{words}; raise the limit, for example with `ulimit -n 1024`")
    if share.threads < _THREADS:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(share.threads, "files"))
    return share, words


def _processes(options: ServeOptions) -> int:
    """Return the number of worker processes that the engine starts."""
    if options.flux is not None:
        return len(options.flux.devices)
    return (options.slots or usable_cores()) if options.engine == "preview" else 0


_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Default size of asyncio's thread pool."""


def _engine(options: ServeOptions, share: ServerShare) -> Engine:
    if options.flux is not None and options.engine != "flux":
        raise ConfigError(f"a model requires --engine flux, not --engine {options.engine}")
    try:
        slots = share.workers if options.engine == "preview" else options.slots
        return engine_of(options.engine, slots, options.service_time, options.flux)
    except ValueError as error:
        raise InputError(str(error)) from error


def _listen(options: ServeOptions) -> socket.socket:
    """Bind a socket. Port 0 tries the data dir's last port first, so that earlier URLs stay valid."""
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
            raise InputError(f"port {options.port} of {options.host} is in use; choose another with --port") from error
        raise InputError(f"cannot listen on {options.host}:{options.port}: {error}; check host and port") from error
    except TypeError as error:  # the standard library's error for an invalid host name
        raise InputError(f"invalid --host {options.host!r}: {error}") from error
    try:
        memory.write_text(str(listener.getsockname()[1]), "ascii")
    except OSError:
        listener.close()
        raise
    return listener


def _check_exposure(options: ServeOptions, listener: socket.socket) -> None:
    """Require keys unless the bound address is loopback."""
    if not options.keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        raise ConfigError(
            f"without keys, the server listens on loopback only, not on {options.host}; create a key with"
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
        raise ConfigError("https requires a certificate and its key: --tls-cert FILE --tls-key FILE")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # otherwise OpenSSL prompts on the terminal
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot use {certificate} and {key} as certificate and key: {error}; use two matching PEM files, the key"
            " without a passphrase"
        ) from error
    return context


def _url(host: str, listener: socket.socket, scheme: str) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - read, not bound
    return f"{scheme}://{name}:{listener.getsockname()[1]}"


@contextlib.contextmanager
def _usable(data_dir: Path) -> Iterator[None]:
    """Translate disk errors of the block into messages about the data dir.

    Raises:
        StorageError: the disk is full.
        InputError: the data dir is unusable.
    """
    if data_dir.is_file():
        raise InputError(f"{data_dir} is a file; --data-dir must be a folder")
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if lacks_descriptor(error):
            raise
        number, code = getattr(error, "errno", None), getattr(error, "sqlite_errorcode", None)
        if number in {errno.ENOSPC, errno.EDQUOT} or code == sqlite3.SQLITE_FULL:
            raise StorageError(f"cannot write the data dir {data_dir}: {error}; free disk space and restart") from error
        raise InputError(
            f"cannot use the data dir {data_dir}: {error}; choose a writable folder with --data-dir"
        ) from error


@contextlib.asynccontextmanager
async def _locked(data_dir: Path, seconds: float) -> AsyncIterator[None]:
    """Lock the data dir against a second server. The kernel releases the lock when the process dies.

    Raises:
        InputError: another server still holds it after `seconds`.
    """
    # Without a thread: an attempt does not block, and the size of the thread pool is not set yet.
    lock = AsyncFileLock(data_dir / "lock", timeout=seconds, run_in_executor=False)
    try:
        await lock.acquire()
    except Timeout as error:
        raise InputError(f"{data_dir} is in use by another server; stop it or choose another --data-dir") from error
    try:
        yield
    finally:
        await lock.release()


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """Stop the server on SIGTERM and SIGINT; does nothing outside the main thread."""
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
