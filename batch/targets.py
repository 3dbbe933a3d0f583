"""Targets: their prices and limits, and how they are opened. Assembly."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp
import anyio
import orjson
from pydantic import SecretStr
from tenacity import stop_after_attempt

from batch.config import RUN_NAME_LIMIT, Settings, TargetSettings, api_key
from batch.errors import AccountRefused, ConfigError, RestyleError, StoppedEarly
from batch.fal import protocol
from batch.fal.client import FalClient
from batch.fal.errors import CallFailed, Trouble
from batch.fal.http import Http, within
from batch.fal.protocol import FAL, Origins, RequestOptions
from batch.fal.status_stream import StatusStreams
from batch.money import PRICES, Price
from batch.run.interfaces import CompletionHints
from batch.run.retrying import reading
from batch.run.verdicts import Idempotency
from batch.system.descriptors import ClientShare, client_share
from batch.system.open_files import allowance

__all__ = [
    "Connection",
    "LivePrice",
    "TargetProfile",
    "check_faults",
    "live_price",
    "open_hints",
    "open_platform",
    "open_target",
    "profile_of",
]

_LOCAL_ECHO_SLOTS = 32
_FAL_SECONDS = 6.0
"""Duration of 38 steps at one megapixel on a data-centre GPU, by published figures (4 to 9 s)."""
_FAL_POLLS = 200.0
"""Status reads per second. fal states no limit; its own clients read ten (Python) or two (JavaScript) times a second
for each job, so this equals 20 to 100 jobs of these clients."""
_PREVIEW_SECONDS = 0.6
"""Duration of one megapixel on one core of 2026."""
_PRICE_READS = 4
_PRICE_SECONDS = 30.0
_MEGAPIXELS = frozenset({"megapixel", "megapixels", "mp"})
"""fal's pages use `megapixels`, without documenting it as the unit."""


@dataclass(frozen=True, slots=True)
class TargetProfile:
    """Facts about a target that are known without contacting it."""

    name: str
    price: Price | None
    """None: jobs are free."""
    submits_per_second: float | None
    window_start: int
    window_ceiling: int
    service_seconds: float
    """Estimated duration of one job, for plans only."""
    headline: str
    """The first line of output: the target and its price."""
    live: bool = False
    """Whether the price was just fetched from the target."""
    polls_per_second: float | None = None
    """None: no limit on status reads."""
    slots: int | None = None
    """Concurrent jobs of the target, if known."""

    @property
    def paid(self) -> bool:
        """Whether a run needs the user's consent to its cost."""
        return self.name == "fal" and self.price is not None


class LivePrice(NamedTuple):
    """A price from the platform API."""

    price: Price
    read_at: datetime


def profile_of(settings: Settings, live: LivePrice | None = None) -> TargetProfile:
    """Return the profile of the configured target; `live` replaces the configured or built-in price.

    Raises:
        ConfigError: fal without a known price for the app; faults for another target than the embedded endpoint; or
            callbacks from a target that does not know the address.
    """
    if settings.target.faults is not None and settings.target.name != "local":
        raise ConfigError(
            f"target.faults = {settings.target.faults!r} is for the embedded endpoint only, but the target is"
            f" {settings.target.name}; use --target local, or remove the faults"
        )
    _check_updates(settings)
    polls = settings.limits.polls_per_second or (_FAL_POLLS if settings.target.name == "fal" else None)
    known = replace(_terms_of(settings, _price(settings) if live is None else live.price), polls_per_second=polls)
    if live is None:
        return known
    usual = _price(settings)
    words = "none" if usual is None else f"${usual.usd_per_megapixel:g} as of {usual.as_of}"
    when = f"read at {live.read_at:%Y-%m-%d %H:%M} UTC"
    return replace(known, headline=f"{known.headline}, {when} (a run uses its own price: {words})", live=True)


def check_faults(settings: Settings) -> None:
    """Validate the faults file, if one is configured, as the embedded endpoint will.

    Raises:
        ConfigError: it is missing or invalid; the message says where.
    """
    if settings.target.faults is not None:
        from batch.server.faults.plan import read_faults  # imported only if needed

        read_faults(Path(settings.target.faults))


def _check_updates(settings: Settings) -> None:
    """Require a public URL if a remote target is to send callbacks."""
    name, url = settings.target.name, settings.webhook.public_url
    if settings.limits.updates != "webhook" or name == "local":
        return
    if url is None and not protocol.is_loopback(protocol.origin_of(name)[1]):
        raise ConfigError(
            f"limits.updates = 'webhook' needs webhook.public_url: the address under which {name} reaches this machine;"
            " without one use --updates poll"
        )
    if name == "fal" and url is not None and not url.startswith("https://"):
        raise ConfigError(f"webhook.public_url = {url!r}: use an https address; fal does not call others")


def _terms_of(settings: Settings, price: Price | None) -> TargetProfile:
    target, limits = settings.target, settings.limits
    rate = limits.submits_per_second
    _require_not_fal(target.name)
    if target.name == "fal":
        if price is None:
            raise ConfigError(
                f"no price is known for {target.app}; set [price] usd_per_megapixel, which a budget needs"
            )
        words = f"target: fal ({target.app}), ${price.usd_per_megapixel:g} a megapixel as of {price.as_of}"
        return TargetProfile("fal", price, rate or 20.0, 16, 1024, _FAL_SECONDS, words)
    cost = "costs nothing" if price is None else f"${price.usd_per_megapixel:g} a megapixel"
    if target.name == "local":
        what = {
            "preview": "engine preview: filters, no model runs",
            "echo": f"engine echo: simulation, {target.service_time:g} s a job, images are not changed",
        }[target.engine]
        start, seconds = (
            (4, _PREVIEW_SECONDS) if target.engine == "preview" else (2 * _LOCAL_ECHO_SLOTS, target.service_time)
        )
        words = f"target: local, the embedded endpoint ({what}); {_local_cost(settings)}"
        return TargetProfile("local", price, rate, start, 512, seconds, words, slots=_slots(target))
    return TargetProfile(
        target.name, price, rate, 64, 1024, _FAL_SECONDS, f"target: {target.name} ({target.app}); {cost}"
    )


def _require_not_fal(name: str) -> None:
    """Refuse one of fal's hosts as a URL, even if the settings were not validated: its price would be unknown."""
    if name != "fal" and protocol.names_fal(name):
        raise ConfigError(f"target.name = {name!r} is one of fal's own hosts; use --target fal, which has the price")


def _slots(target: TargetSettings) -> int:
    """Return the concurrent jobs of the embedded endpoint."""
    return target.slots or (_LOCAL_ECHO_SLOTS if target.engine == "echo" else os.cpu_count() or 1)


def _local_cost(settings: Settings) -> str:
    """Describe the cost of the embedded endpoint."""
    usd = settings.price.usd_per_megapixel
    return "costs nothing" if usd is None else f"counts ${usd:g} a megapixel as a simulation; nothing is charged"


def _price(settings: Settings) -> Price | None:
    if settings.price.usd_per_megapixel is not None:
        return Price(settings.price.usd_per_megapixel, settings.price.as_of or date.today())  # noqa: DTZ011 - a label
    return PRICES.get(settings.target.app) if settings.target.name == "fal" else None


class Connection(NamedTuple):
    """An opened target."""

    client: FalClient
    origins: Origins
    idempotency: Idempotency
    """How it handles a repeated `Idempotency-Key`."""
    bounds_starts: bool
    """Whether it is known to honour a start timeout."""
    share: ClientShare
    """Maximum connections and files."""
    keeps_results: bool = False
    """Whether it keeps results until they are fetched, as our own server does."""
    key: SecretStr | None = None


class _Health(NamedTuple):
    """Properties that a server reports at /health."""

    replays_keys: bool | None
    """None: not reported."""
    bounds_starts: bool


_OURS = _Health(replays_keys=True, bounds_starts=True)


@asynccontextmanager
async def open_target(
    settings: Settings, endpoint_directory: Path, *, version: str, run_name: str = ""
) -> AsyncIterator[Connection]:
    """Connect to the configured target; start the embedded endpoint if it is that, and stop it with the block.

    `run_name` labels what is submitted, unless the settings do.

    Raises:
        ConfigError: fal without a key, a server that contradicts `target.idempotency`, or an unusable proxy.
        InputError: the limit of open files is too low.
        RestyleError: the embedded endpoint does not start; the message has the end of its log.
    """
    target, share = settings.target, _share(settings)
    if target.name == "fal":
        if _key() is None:
            raise ConfigError("FAL_KEY is not set; export FAL_KEY=key_id:key_secret, or use --target local")
        async with _client(settings, FAL, version, share, key=True, run_name=run_name) as client:
            yield Connection(client, FAL, Idempotency.NONE, bounds_starts=True, share=share, key=_key())
    elif target.name == "local":
        from batch.embedded import embedded_endpoint

        async with (
            embedded_endpoint(
                endpoint_directory,
                engine=target.engine,
                slots=_slots(target),
                service_time=target.service_time,
                faults=None if target.faults is None else Path(target.faults),
            ) as endpoint,
            _client(
                settings, (origins := Origins.of_server(endpoint.url)), version, share, key=False, run_name=run_name
            ) as client,
        ):
            health = _OURS if target.faults is None else await _health(endpoint.url, version)
            yield _connection(target, client, origins, health, share, None)
    else:
        _require_not_fal(target.name)
        origins = Origins.of_server(target.name)
        async with _client(settings, origins, version, share, key=True, run_name=run_name) as client:
            yield _connection(target, client, origins, await _health(target.name, version), share, _key())


def _connection(
    target: TargetSettings,
    client: FalClient,
    origins: Origins,
    health: _Health,
    share: ClientShare,
    key: SecretStr | None,
) -> Connection:
    """Return the connection to one of our own servers, or a server of unknown make."""
    replays = health.replays_keys is True
    if target.idempotency == "auto":
        keys = Idempotency.REPLAY if replays else Idempotency.NONE
    else:
        keys = Idempotency(target.idempotency)
    if keys is Idempotency.REPLAY and health.replays_keys is False:
        raise ConfigError(
            f"target.idempotency = 'replay', but {target.name} reports at /health that it ignores Idempotency-Key:"
            " a repeated submit would be paid for twice; use auto"
        )
    return Connection(client, origins, keys, health.bounds_starts, share, keeps_results=replays, key=key)


@asynccontextmanager
async def open_hints(settings: Settings, target: Connection, *, version: str) -> AsyncIterator[CompletionHints | None]:
    """Open the source of completion hints that `limits.updates` names; None for polling only.

    Raises:
        ConfigError: cannot listen at `webhook.bind`.
    """
    agent = f"restyle/{version}"
    match settings.limits.updates:
        case "stream":
            most = target.share.hints
            async with StatusStreams(
                target.origins, settings.target.app, target.key, user_agent=agent, most=most
            ) as streams:
                yield streams
        case "webhook":
            from batch.fal.webhook_receiver import WebhookReceiver  # imports a web server; needed here only

            webhook = settings.webhook
            where = webhook.bind, webhook.public_url, target.origins.rest
            async with WebhookReceiver(*where, most=target.share.hints, user_agent=agent) as callbacks:
                target.client.webhook = callbacks.url
                yield callbacks
        case _:
            yield None


@asynccontextmanager
async def open_platform(settings: Settings, *, version: str) -> AsyncIterator[FalClient]:
    """Connect to the target's platform API (prices, bills) only; opening it sends nothing.

    Raises:
        ConfigError: the target has no such API, or no key is set for it.
    """
    name = settings.target.name
    if name == "local":
        raise ConfigError(f"the embedded endpoint has no price list and sends no bills: it {_local_cost(settings)}")
    if name == "fal" and _key() is None:
        raise ConfigError("FAL_KEY is not set; export FAL_KEY=key_id:key_secret")
    _require_not_fal(name)
    origins = FAL if name == "fal" else Origins.of_server(name)
    async with _client(settings, origins, version, _share(settings), key=True) as client:
        yield client


async def live_price(settings: Settings, *, version: str, now: Callable[[], datetime]) -> LivePrice:
    """Fetch the current price of the app from the target.

    Raises:
        ConfigError: the target has no price for it, or not per megapixel.
        AccountRefused: the target refused the key.
        StoppedEarly: no answer; a retry may help.
    """
    async with open_platform(settings, version=version) as client:
        try:
            with anyio.fail_after(_PRICE_SECONDS):
                stop = stop_after_attempt(_PRICE_READS)
                usd, unit = await reading(client.price, Random(), stop=stop, now=lambda: now().timestamp())
        except (CallFailed, TimeoutError) as error:
            raise _unpriced(settings, error) from error
    if unit.lower() not in _MEGAPIXELS:
        raise ConfigError(
            f"{settings.target.name} prices {settings.target.app} by {unit!r}, not by the megapixel; convert it"
            " and set [price] usd_per_megapixel"
        )
    at = now()
    return LivePrice(Price(usd, at.date()), at)


def _unpriced(settings: Settings, error: CallFailed | TimeoutError) -> RestyleError:
    name = settings.target.name
    trouble = error.trouble if isinstance(error, CallFailed) else Trouble("price", "timeout", detail="timeout")
    reply = trouble.reply
    if reply is not None and reply.status in {401, 402, 403}:
        return AccountRefused(f"{name} refused the key for its price list (HTTP {reply.status}); check FAL_KEY")
    without = "or plan without --live-price"
    refused = reply is not None and 400 <= reply.status < 500 and reply.status != 429
    if refused or trouble.transport == "malformed":
        return ConfigError(
            f"{name} has no price for {settings.target.app} ({trouble.detail}); set price.usd_per_megapixel, {without}"
        )
    return StoppedEarly(f"could not fetch the live price from {name} ({trouble.detail}); try again, {without}")


def _share(settings: Settings) -> ClientShare:
    """Return what a run may open in addition to what is open already.

    Raises:
        InputError: too little.
    """
    return client_share(allowance(), hints=settings.limits.updates != "poll", nearby=settings.target.name == "local")


def _client(
    settings: Settings, origins: Origins, version: str, share: ClientShare, *, key: bool, run_name: str = ""
) -> FalClient:
    return FalClient(
        origins,
        settings.target.app,
        _key() if key else None,
        connections=share.connections,
        download_limit_bytes=settings.limits.max_download_bytes,
        user_agent=f"restyle/{version}",
        options=_options(settings, run_name),
    )


def _options(settings: Settings, run_name: str) -> RequestOptions:
    """Return the options of each submit."""
    target = settings.target
    tags = {"run": _tag_value(run_name), **target.tags}
    if shown := next((name for name, value in tags.items() if _holds_key(value)), None):
        raise ConfigError(f"the tag {shown!r} contains FAL_KEY, and bills show tags; remove it from target.tags")
    return RequestOptions(
        start_timeout=settings.limits.start_timeout,
        low_priority=target.priority == "low",
        file_seconds=target.keep_files,
        tags=tags,
    )


def _tag_value(name: str) -> str:
    """Return a name as the value of a tag: printable ASCII without commas."""
    return re.sub(r"[^\x20-\x2b\x2d-\x7e]", "-", name).strip()[:RUN_NAME_LIMIT]


def _holds_key(text: str) -> bool:
    """Return whether a text contains the API key or its secret half."""
    key = api_key()
    secret = "" if key is None else key.get_secret_value().rpartition(":")[2]
    return bool(secret) and secret in text


def _key() -> SecretStr | None:
    key = api_key()
    text = "" if key is None else key.get_secret_value()
    if not (text.isascii() and text.isprintable()):  # such a header would break each submit while it is sent
        raise ConfigError("FAL_KEY contains a line break or an invalid character; copy it again as key_id:key_secret")
    return key


async def _health(url: str, version: str) -> _Health:
    """Ask a server of unknown make. Redirects are not followed: they may lead to another service."""
    http = Http(limit=1, timeout=within(10.0), user_agent=f"restyle/{version}")
    try:
        async with http, http.request("GET", f"{url}/health") as answer:
            health = orjson.loads(await answer.content.read(65536))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        health = {}
    facts = health if isinstance(health, dict) else {}
    replays = facts.get("honours_idempotency_key")
    return _Health(replays if isinstance(replays, bool) else None, facts.get("honours_start_timeout") is True)
