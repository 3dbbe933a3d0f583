"""Faults on purpose: which call or request a fault befalls, and which one. Pure; chance is seeded.

Owns the format of a faults file and the decisions. What a fault looks like on the wire is `rehearsal`'s. A file:

    seed = 7
    idempotency = false            # the server does not honour Idempotency-Key, as fal; left out: it does
    [[fault]]
    at = "submit"                  # the moment: submit, status, result, cancel, upload, file, listing, execute
    do = "drop-after-accept"       # the fault; each moment has its own
    every = 20                     # which calls of that moment: every n-th, a `share` of them, or the `first` n

Each moment counts its calls from 1. A call meets one fault at most: the first in the file that chooses it.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from batch.errors import ConfigError
from batch.server.queue.records import ListingRules, ListingWindow

__all__ = [
    "Body",
    "FaultAction",
    "FaultPlan",
    "FaultPoint",
    "FaultRule",
    "FaultSequence",
    "parse_faults",
    "read_faults",
]


class FaultPoint(StrEnum):
    """Where a fault can happen. All but `execute` are calls over HTTP."""

    SUBMIT = "submit"
    STATUS = "status"
    RESULT = "result"
    CANCEL = "cancel"
    UPLOAD = "upload"
    FILE = "file"
    """A result image, or an uploaded one, is fetched."""
    LISTING = "listing"
    """The platform's list of requests."""
    EXECUTE = "execute"
    """The engine gets a request; one that is executed again is counted again."""


class FaultAction(StrEnum):
    """What can be done to it."""

    DROP = "drop"
    """The call is read and the connection closed without an answer. Nothing was done."""
    DROP_AFTER_ACCEPT = "drop-after-accept"
    """The request is accepted, durably, and the connection closed without an answer."""
    ANSWER = "answer"
    """An error answer. Nothing was done."""
    ANSWER_AFTER_ACCEPT = "answer-after-accept"
    """The request is accepted, durably, and the answer is an error all the same."""
    LATE = "late"
    """The right answer, `seconds` after it was ready."""
    SLOW = "slow"
    """The right answer, its body spread over `seconds`."""
    CUT = "cut"
    """Half of the body under the whole body's Content-Length, then the connection is closed."""
    SHORT = "short"
    """Half of the body under a Content-Length that fits the half."""
    FAIL = "fail"
    """The model fails with a 5xx; `retryable` says what its header says of another try."""
    CONTENT_POLICY = "content-policy"
    """COMPLETED without `error`, and the result is 422 content_policy_violation."""
    EXPIRE = "expire"
    """It works, and its result answers 404 from `seconds` after its end on."""
    REQUEUE = "requeue"
    """IN_PROGRESS for `seconds`, then back to IN_QUEUE for as long (or until a slot is free), then executed."""
    ODD_FIELDS = "odd-fields"
    """The right images, and `seed`, `has_nsfw_concepts`, `timings` or `prompt` absent, null or of another type; so at
    every later read of that result too. The file's seed chooses which and how."""
    NO_IMAGES = "no-images"
    """An empty list of images in place of the right ones, for `seconds` from then on or at its first `reads` reads.
    Once a result at most."""
    REFUSE = "refuse"
    """The file answers an error for `seconds` from then on, or for its first `reads` reads; then it is served. Once a
    file at most."""
    CRASH = "crash"
    """The engine's worker dies under it. Once: executed again. Twice: it failed."""


class Body(StrEnum):
    """What an error answer consists of."""

    FAL = "fal"
    """fal's own JSON with a request id. As the result of a job it cannot be told from the job's own failure."""
    HTML = "html"
    """The page of an nginx that stands before the service; no request id."""
    EMPTY = "empty"


_ANSWERS = frozenset({FaultAction.DROP, FaultAction.ANSWER, FaultAction.LATE})
_BODIES = frozenset({FaultAction.SLOW, FaultAction.CUT, FaultAction.SHORT})
_DEEDS: Mapping[FaultPoint, frozenset[FaultAction]] = {
    FaultPoint.SUBMIT: _ANSWERS | {FaultAction.DROP_AFTER_ACCEPT, FaultAction.ANSWER_AFTER_ACCEPT},
    FaultPoint.STATUS: _ANSWERS | _BODIES,
    FaultPoint.RESULT: _ANSWERS | _BODIES | {FaultAction.ODD_FIELDS, FaultAction.NO_IMAGES},
    FaultPoint.CANCEL: _ANSWERS,
    FaultPoint.UPLOAD: _ANSWERS,
    FaultPoint.FILE: _ANSWERS | _BODIES | {FaultAction.REFUSE},
    FaultPoint.LISTING: _ANSWERS | _BODIES,
    FaultPoint.EXECUTE: frozenset(
        {FaultAction.FAIL, FaultAction.CONTENT_POLICY, FaultAction.EXPIRE, FaultAction.REQUEUE, FaultAction.CRASH}
    ),
}
_CHOICES = ("every", "share", "first")
_OPTIONS: Mapping[FaultAction, frozenset[str]] = {
    FaultAction.ANSWER: frozenset({"status", "retry_after", "body"}),
    FaultAction.ANSWER_AFTER_ACCEPT: frozenset({"status", "retry_after", "body"}),
    FaultAction.LATE: frozenset({"seconds"}),
    FaultAction.SLOW: frozenset({"seconds"}),
    FaultAction.FAIL: frozenset({"status", "retryable"}),
    FaultAction.EXPIRE: frozenset({"seconds"}),
    FaultAction.REQUEUE: frozenset({"seconds"}),
    FaultAction.NO_IMAGES: frozenset({"seconds", "reads"}),
    FaultAction.REFUSE: frozenset({"status", "seconds", "reads", "retry_after", "body"}),
}
"""Keys beside `at`, `do`, `after`, `times` and the choice."""
_REQUIRED = frozenset({"status", "seconds"})
_EITHER: Mapping[FaultAction, tuple[str, ...]] = dict.fromkeys(
    (FaultAction.REFUSE, FaultAction.NO_IMAGES), ("seconds", "reads")
)
"""Of which exactly one is there."""
_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class FaultRule:
    """One entry of a faults file. Durations in seconds."""

    at: FaultPoint
    do: FaultAction
    every: int | None = None
    """Every n-th call."""
    share: float | None = None
    """Each call with this chance, 0 to 1."""
    first: int | None = None
    """The first n calls."""
    after: int = 0
    """The first so many calls are spared; counting starts behind them."""
    times: int | None = None
    """Happens so often at most."""
    seconds: float = 0.0
    reads: int | None = None
    """So many of each file; None: `seconds` says how long."""
    status: int = 0
    retry_after: float | None = None
    """As the `Retry-After` header of the answer; None: it has none."""
    body: Body = Body.FAL
    retryable: bool = True

    def chooses(self, number: int, rng: Random) -> bool:
        """Whether it wants the moment's call of this number, from 1. Draws from `rng` once a call at most."""
        number -= self.after
        if number < 1:
            return False
        if self.every is not None:
            return number % self.every == 0
        if self.first is not None:
            return number <= self.first
        return rng.random() < (self.share or 0.0)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """A faults file, checked."""

    faults: tuple[FaultRule, ...] = ()
    seed: int = 0
    listing: ListingRules = field(default_factory=ListingRules)
    idempotency: bool = True
    """Whether the server honours `Idempotency-Key`; fal does not."""


class FaultSequence:
    """The decisions of one server's life: the n-th call of a moment meets the same fault in every one."""

    def __init__(self, plan: FaultPlan) -> None:
        # Each fault has dice of its own: what happens at one moment does not depend on the calls of another.
        self._faults = [(fault, Random(f"{plan.seed}/{number}")) for number, fault in enumerate(plan.faults)]
        self._ways = [Random(f"{plan.seed}/{number}/way") for number in range(len(plan.faults))]
        self._calls: Counter[FaultPoint] = Counter()
        self._happened: Counter[int] = Counter()
        self._moments = frozenset(fault.at for fault in plan.faults)

    def decide(self, moment: FaultPoint) -> FaultRule | None:
        """The fault that the moment's next call meets, if any."""
        if moment not in self._moments:
            return None
        self._calls[moment] += 1
        number, chosen = self._calls[moment], None
        for index, (fault, rng) in enumerate(self._faults):
            # Every die is thrown at every call, so that one fault more in the file leaves the others as they were.
            if fault.at is moment and fault.chooses(number, rng) and chosen is None and not self._used_up(index):
                chosen = index
        if chosen is None:
            return None
        self._happened[chosen] += 1
        return self._faults[chosen][0]

    def draw(self, fault: FaultRule) -> float:
        """A number from 0 to 1 that says how a fault that was decided on happens, where there are several ways."""
        index = next(index for index, (known, _) in enumerate(self._faults) if known is fault)
        return self._ways[index].random()

    def _used_up(self, index: int) -> bool:
        times = self._faults[index][0].times
        return times is not None and self._happened[index] >= times


# --- reading a faults file --------------------------------------------------------------------------------


def parse_faults(text: str, source: str) -> FaultPlan:
    """Read a faults file.

    Args:
        text: TOML.
        source: the file's name, for messages.

    Raises:
        ConfigError: no TOML, an unknown key or word (the known ones are named), a value out of bounds.
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    table = _Table(source, given)
    table.only("seed", "idempotency", "fault", "listing")
    entries, listing = given.get("fault", []), given.get("listing", {})
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{source}: faults are written as [[fault]] tables, with two brackets")
    if not isinstance(listing, dict):
        raise ConfigError(f"{source}: listing is written as a [listing] table")
    return FaultPlan(
        tuple(_fault(_Table(f"{source}: fault {number}", entry)) for number, entry in enumerate(entries, 1)),
        table.whole("seed", 0, least=0) or 0,
        _listing(_Table(f"{source}: listing", listing)),
        table.flag("idempotency", default=True),
    )


def _listing(table: _Table) -> ListingRules:
    table.only("show_waiting", "lag", "window")
    return ListingRules(
        table.flag("show_waiting", default=False),
        table.number("lag", 0.0) or 0.0,
        table.word("window", ListingWindow, ListingWindow.SENT_AT),
    )


def _fault(table: _Table) -> FaultRule:
    at = table.word("at", FaultPoint)
    do = table.word("do", FaultAction, among=_DEEDS[at], where=f" at {at}")
    options = _OPTIONS.get(do, frozenset())
    table.only("at", "do", *_CHOICES, "after", "times", *sorted(options))
    table.exactly_one("say which calls with", _CHOICES)
    either = _EITHER.get(do, ())
    if either:
        table.exactly_one(f"{do} needs", either)
    table.demand(options & _REQUIRED - {*either})
    status = table.whole("status", None, least=500 if do is FaultAction.FAIL else 400, most=599) or 0
    return FaultRule(
        at,
        do,
        every=table.whole("every", None, least=1),
        share=table.number("share", None, most=1.0),
        first=table.whole("first", None, least=1),
        after=table.whole("after", 0, least=0) or 0,
        times=table.whole("times", None, least=1),
        seconds=table.number("seconds", 0.0) or 0.0,
        reads=table.whole("reads", None, least=1),
        status=status,
        retry_after=table.number("retry_after", None),
        body=table.word("body", Body, Body.HTML if status in _GATEWAY else Body.FAL),
        retryable=table.flag("retryable", default=True),
    )


_Word = TypeVar("_Word", bound=StrEnum)


class _Table:
    """A table of the file, read key by key; every complaint names the place."""

    def __init__(self, place: str, given: Mapping[str, Any]) -> None:
        self._place = place
        self._given = given

    def only(self, *known: str) -> None:
        for key in self._given:
            if key not in known:
                raise ConfigError(f"{self._place}: unknown key {key}{_nearest(key, known)}")

    def exactly_one(self, words: str, names: Collection[str]) -> None:
        if sum(name in self._given for name in names) != 1:
            raise ConfigError(f"{self._place}: {words} exactly one of {', '.join(names)}")

    def demand(self, names: Collection[str]) -> None:
        for name in sorted(names):
            if name not in self._given:
                raise ConfigError(f"{self._place}: {self._given['do']} needs {name}")

    def word(
        self,
        name: str,
        kind: type[_Word],
        default: _Word | None = None,
        among: Collection[_Word] | None = None,
        where: str = "",
    ) -> _Word:
        known = [word for word in kind if among is None or word in among]
        value = self._given.get(name, default)
        if value is None:
            raise ConfigError(f"{self._place}: {name} is missing; it is one of {', '.join(known)}")
        if value not in known:
            raise ConfigError(f"{self._place}: unknown {name} {value!r}{where}{_nearest(str(value), known)}")
        return kind(value)

    def whole(self, name: str, default: int | None, *, least: int, most: int = 2**53) -> int | None:
        value = self._given.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            bounds = f"from {least} to {most}" if most < 2**53 else f"from {least} on"
            raise ConfigError(f"{self._place}: {name} = {value!r} has to be a whole number {bounds}")
        return value

    def number(self, name: str, default: float | None, *, most: float = math.inf) -> float | None:
        value = self._given.get(name, default)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not 0 <= value <= most:
            bounds = f"from 0 to {most:g}" if most < math.inf else "from 0 on"
            raise ConfigError(f"{self._place}: {name} = {value!r} has to be a number {bounds}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._given.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._place}: {name} = {value!r} has to be true or false")
        return value


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), 1)
    return (f"; did you mean {near[0]}?" if near else "") + f" (known: {', '.join(known)})"


def read_faults(path: Path) -> FaultPlan:
    """Read a faults file.

    Raises:
        ConfigError: there is none, or it is not one; the message says where.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the faults file {path} cannot be read: {reason}; configs/faults.toml is one") from error
    return parse_faults(text, str(path))
