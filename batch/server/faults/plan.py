"""Decide which HTTP call or request gets which injected fault. Pure; random numbers are seeded.

Defines the format of a faults file; `injection` carries out the faults. A file:

    seed = 7
    idempotency = false            # ignore Idempotency-Key, as fal does; default: true
    [[fault]]
    at = "submit"                  # the point: submit, status, result, cancel, upload, file, listing, execute
    do = "drop-after-accept"       # the action; each point has its own set
    every = 20                     # which calls: every n-th, a `share` of them, or the `first` n

Each point counts its calls from 1. A call gets at most one fault, from the first matching rule in the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from pathlib import Path
from random import Random
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from batch.errors import ConfigError
from batch.server.queue.records import ListingRules, ListingWindow

__all__ = [
    "ACTIONS",
    "ErrorBodyKind",
    "FaultAction",
    "FaultPlan",
    "FaultPoint",
    "FaultRule",
    "FaultSequence",
    "parse_faults",
    "read_faults",
]


class FaultPoint(StrEnum):
    """A point where faults can be injected. All except `execute` are HTTP calls."""

    SUBMIT = "submit"
    STATUS = "status"
    RESULT = "result"
    CANCEL = "cancel"
    UPLOAD = "upload"
    FILE = "file"
    """A client downloads a result image or an uploaded one."""
    LISTING = "listing"
    """The platform API's list of requests."""
    EXECUTE = "execute"
    """The engine executes a request; a repeated execution counts again."""


class FaultAction(StrEnum):
    """The effect of a fault on a call or an execution."""

    DROP = "drop"
    """The server reads the call and closes the connection without an answer. The call has no effect."""
    DROP_AFTER_ACCEPT = "drop-after-accept"
    """The server stores the request and closes the connection without an answer."""
    ANSWER = "answer"
    """The server answers with an error. The call has no effect."""
    ANSWER_AFTER_ACCEPT = "answer-after-accept"
    """The server stores the request and answers with an error."""
    LATE = "late"
    """The server sends the correct answer `seconds` late."""
    SLOW = "slow"
    """The body of the correct answer takes `seconds`."""
    CUT = "cut"
    """The server sends half of the body with the full Content-Length, then closes the connection."""
    SHORT = "short"
    """The server sends half of the body with a matching Content-Length."""
    FAIL = "fail"
    """The model fails with a 5xx; `retryable` sets the header of that name."""
    CONTENT_POLICY = "content-policy"
    """The status is COMPLETED without `error`, and the result is 422 content_policy_violation."""
    EXPIRE = "expire"
    """The request succeeds, but its result answers 404 once `seconds` have passed since the end."""
    REQUEUE = "requeue"
    """The request is IN_PROGRESS for `seconds`, IN_QUEUE for as long (or until a slot is free), then executes."""
    ODD_FIELDS = "odd-fields"
    """The images are correct; `seed`, `has_nsfw_concepts`, `timings` or `prompt` is absent, null or of a wrong type,
    in every later read of that result too. The file's seed selects the fields and values."""
    NO_IMAGES = "no-images"
    """The list of images is empty for `seconds`, or in the first `reads` reads. At most once per result."""
    REFUSE = "refuse"
    """The file answers with an error for `seconds`, or in its first `reads` reads. At most once per file."""
    CRASH = "crash"
    """The engine's worker dies. The request executes again after the first time and fails after the second."""


class ErrorBodyKind(StrEnum):
    """Body of an error answer."""

    FAL = "fal"
    """fal's JSON with a request id. As a result, it looks the same as a failure of the request."""
    HTML = "html"
    """The page of an nginx in front of the service; no request id."""
    EMPTY = "empty"


_ANSWERS = frozenset({FaultAction.DROP, FaultAction.ANSWER, FaultAction.LATE})
_BODIES = frozenset({FaultAction.SLOW, FaultAction.CUT, FaultAction.SHORT})
ACTIONS: Mapping[FaultPoint, frozenset[FaultAction]] = {
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
_NEEDS: Mapping[FaultAction, tuple[tuple[str, ...], ...]] = {
    FaultAction.ANSWER: (("status",),),
    FaultAction.ANSWER_AFTER_ACCEPT: (("status",),),
    FaultAction.LATE: (("seconds",),),
    FaultAction.SLOW: (("seconds",),),
    FaultAction.FAIL: (("status",),),
    FaultAction.EXPIRE: (("seconds",),),
    FaultAction.REQUEUE: (("seconds",),),
    FaultAction.NO_IMAGES: (("seconds", "reads"),),
    FaultAction.REFUSE: (("status",), ("seconds", "reads")),
}
"""Keys that an action requires: exactly one of each group."""
_TAKES: Mapping[FaultAction, tuple[str, ...]] = {
    FaultAction.ANSWER: ("retry_after", "body"),
    FaultAction.ANSWER_AFTER_ACCEPT: ("retry_after", "body"),
    FaultAction.REFUSE: ("retry_after", "body"),
    FaultAction.FAIL: ("retryable",),
}
"""Keys that an action accepts in addition."""
_GATEWAY = frozenset({502, 503, 504})

_Seconds = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
_WORD = Field(strict=False)
"""Strict mode does not convert text to an enum."""


class _Table(BaseModel):
    """A table of the file. Strict: `every = true` and `seed = "7"` are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FaultRule(_Table):
    """One `[[fault]]` table. Durations in seconds."""

    at: Annotated[FaultPoint, _WORD]
    do: Annotated[FaultAction, _WORD]
    every: _Count | None = None
    """Every n-th call."""
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Each call with this probability."""
    first: _Count | None = None
    """The first n calls."""
    after: Annotated[int, Field(ge=0)] = 0
    """Number of calls to skip; counting starts after them."""
    times: _Count | None = None
    """The fault happens at most this often."""
    seconds: _Seconds = 0.0
    reads: _Count | None = None
    """Number of affected reads of each file or result; None: `seconds` limits the fault."""
    status: Annotated[int, Field(ge=400, le=599)] = 0
    retry_after: _Seconds | None = None
    """The `Retry-After` header of the response; None: no header."""
    body: Annotated[ErrorBodyKind, _WORD] = Field(
        default_factory=lambda given: ErrorBodyKind.HTML if given.get("status") in _GATEWAY else ErrorBodyKind.FAL
    )
    retryable: bool = True

    @field_validator("do", mode="before")
    @classmethod
    def _action_fits_the_point(cls, value: Any, info: ValidationInfo) -> Any:
        at = info.data.get("at")
        known = [action for action in FaultAction if at is None or action in ACTIONS[at]]
        if value not in known:
            raise ValueError(f"unknown do {value!r} at {at}{_nearest(str(value), known)}")
        return value

    @model_validator(mode="after")
    def _keys_fit_the_action(self) -> Self:
        needs = (("at",), ("do",), ("every", "share", "first"), *_NEEDS.get(self.do, ()))
        keys = [*chain(*needs), "after", "times", *_TAKES.get(self.do, ())]
        if unknown := sorted(self.model_fields_set.difference(keys)):
            raise ValueError(f"{self.do} does not take the key {unknown[0]}{_nearest(unknown[0], keys)}")
        for group in needs:
            if len(self.model_fields_set.intersection(group)) != 1:
                raise ValueError(f"{self.do} needs {'exactly one of ' * (len(group) > 1)}{', '.join(group)}")
        if self.do is FaultAction.FAIL and self.status < 500:
            raise ValueError(f"invalid status = {self.status} for {self.do}: use 500 to 599")
        return self

    def chooses(self, number: int, rng: Random) -> bool:
        """Whether this rule matches a call. `number` counts from 1; `rng` is used at most once per call."""
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
    """A validated faults file."""

    faults: tuple[FaultRule, ...] = ()
    seed: int = 0
    listing: ListingRules = field(default_factory=ListingRules)
    idempotency: bool = True
    """Whether the server honours `Idempotency-Key`; fal does not."""


class FaultSequence:
    """The decisions for one server process: the n-th call at a point meets the same fault in every process."""

    def __init__(self, plan: FaultPlan) -> None:
        # Each fault has its own random source: decisions at one point do not depend on the calls at another.
        self._faults = [(fault, Random(f"{plan.seed}/{number}")) for number, fault in enumerate(plan.faults)]
        self._variants = [Random(f"{plan.seed}/{number}/way") for number in range(len(plan.faults))]
        self._calls: Counter[FaultPoint] = Counter()
        self._happened: Counter[int] = Counter()
        self._points = frozenset(fault.at for fault in plan.faults)

    def decide(self, point: FaultPoint) -> FaultRule | None:
        """Find the fault of the next call at a point, if any."""
        if point not in self._points:
            return None
        self._calls[point] += 1
        number, chosen = self._calls[point], None
        for index, (fault, rng) in enumerate(self._faults):
            # Every rule draws at every call, so that a new rule in the file does not change the others.
            if fault.at is point and fault.chooses(number, rng) and chosen is None and not self._used_up(index):
                chosen = index
        if chosen is None:
            return None
        self._happened[chosen] += 1
        return self._faults[chosen][0]

    def draw(self, fault: FaultRule) -> float:
        """Draw a number from 0 to 1 that selects among the variants of a fault."""
        index = next(index for index, (known, _) in enumerate(self._faults) if known is fault)
        return self._variants[index].random()

    def _used_up(self, index: int) -> bool:
        times = self._faults[index][0].times
        return times is not None and self._happened[index] >= times


# --- reading a faults file --------------------------------------------------------------------------------


class _ListingTable(_Table):
    show_waiting: bool = False
    lag: _Seconds = 0.0
    window: Annotated[ListingWindow, _WORD] = ListingWindow.SENT_AT


class _FaultsFile(_Table):
    seed: Annotated[int, Field(ge=0)] = 0
    idempotency: bool = True
    fault: list[FaultRule] = []
    listing: _ListingTable = _ListingTable()


def parse_faults(text: str, source: str) -> FaultPlan:
    """Read a faults file.

    Args:
        text: TOML.
        source: the file's name, for messages.

    Raises:
        ConfigError: invalid TOML, an unknown key or an invalid value. The message lists the allowed ones.
    """
    try:
        file = _FaultsFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error)}") from error
    return FaultPlan(tuple(file.fault), file.seed, ListingRules(**dict(file.listing)), file.idempotency)


def _sentence(error: ValidationError) -> str:
    """Describe the first problem: its table, key and value, and what is allowed."""
    problem = error.errors()[0]
    kind, value, message = problem["type"], problem["input"], problem["msg"]
    table: type[_Table] = _FaultsFile
    place, path = "", list(problem["loc"])
    match path:
        case ["fault", int(index), *path]:
            place, table = f"fault {index + 1}: ", FaultRule
        case ["listing", key, *path]:
            place, table, path = "listing: ", _ListingTable, [key]
    if kind == "value_error":
        return place + message.removeprefix("Value error, ")
    key = str(path[0]) if path else "fault"
    if kind in {"list_type", "model_type"}:
        return f"{key} = {value!r:.60} is not a [[fault]] table (two brackets) or a [listing] table"
    if kind == "extra_forbidden":
        return f"{place}unknown key {key}{_nearest(key, table.model_fields)}"
    if kind in {"missing", "enum"}:
        words: Any = table.model_fields[key].annotation  # an enum: no other key is required
        said = f"{key} is missing" if kind == "missing" else f"unknown {key} {value!r}"
        return f"{place}{said}{_nearest(str(value), words)}"
    return f"{place}{key} = {value!r} {message.removeprefix('Input ')}"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), 1)
    return (f"; did you mean {near[0]}?" if near else "") + f" (known: {', '.join(known)})"


def read_faults(path: Path) -> FaultPlan:
    """Read a faults file.

    Raises:
        ConfigError: the file is unreadable or invalid.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read the faults file {path}: {reason}; for an example see configs/faults.toml"
        ) from error
    return parse_faults(text, str(path))
