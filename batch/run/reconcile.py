"""Unknown submits: find out through the platform's request listing whether they were accepted.

`match` is pure and decides; `Reconciler` reads pages and has the adoption written down. A job is adopted only
where exactly one listed request bears every key that was sent, in its window of time. Everything else, two
matches, a request whose input is not shown, a page that failed, leaves it unknown: absence proves nothing,
because requests that still wait may not be listed and the listing lags.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from random import Random
from typing import NamedTuple, Protocol

import orjson
from tenacity import stop_after_attempt

from batch.fal.platform import Listed, Page, minted_at
from batch.model import Json, JsonObject, RequestId, Ticket
from batch.run.lifecycle import State
from batch.run.ports import Accepted, CallFailed, Entry, Journal, Observer
from batch.run.retry import reading

__all__ = ["Finding", "Found", "Listing", "Reconciler", "Settled", "match", "same_input", "windows"]

BEFORE_SECONDS = 300.0
"""The clocks of two machines differ, and which of its instants the listing filters on is not documented."""
AFTER_SECONDS = 900.0
"""A submit may have hung for its whole timeout before it was accepted, and the listing filter may mean the end."""
_READS = 5
"""Tries at one page. A page that cannot be read leaves its window's jobs unknown."""


class Finding(StrEnum):
    """What the listing says of one unknown submit."""

    ADOPTED = "adopted"
    ABSENT = "absent"
    """Not listed. No proof: it may still wait, or the listing may lag."""
    AMBIGUOUS = "ambiguous"
    """Two or more requests match."""
    HIDDEN = "hidden"
    """A request of the window has no input to compare with."""
    UNREADABLE = "unreadable"
    """A page of the listing could not be read."""


class Found(NamedTuple):
    """A finding, and the request where there is exactly one."""

    finding: Finding
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time and the unknown submits in it; `end` is exclusive."""

    start: float
    end: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """What one reconciliation did."""

    adopted: int
    still_unknown: dict[Finding, int]

    @property
    def unknown(self) -> int:
        """Jobs that are still unknown."""
        return sum(self.still_unknown.values())


def same_input(sent: JsonObject, listed: JsonObject) -> bool:
    """Whether every key that we sent is listed with an equal value; other keys are the service's defaults.

    Numbers are compared as numbers (1 equals 1.0), but a boolean never equals a number.
    """
    return all(name in listed and _equal(value, listed[name]) for name, value in sent.items())


def match(entry: Entry, listed: Sequence[Listed], known: Collection[str]) -> Found:
    """Decide about one unknown submit.

    Args:
        entry: the job, with the body as it was sent.
        listed: every request of its window, all pages read.
        known: request ids that already belong to a job or to an earlier attempt.
    """
    sent = orjson.loads(entry.body)
    candidates = [item for item in listed if item.request_id not in known and _in_time(entry, item)]
    matches = [item for item in candidates if item.input is not None and same_input(sent, item.input)]
    if len(matches) > 1:
        return Found(Finding.AMBIGUOUS)
    if any(item.input is None for item in candidates):
        return Found(Finding.HIDDEN)
    return Found(Finding.ADOPTED, matches[0].request_id) if matches else Found(Finding.ABSENT)


def windows(entries: Sequence[Entry], now: float) -> list[Window]:
    """The spans to list, each with its submits: spans that touch are one, and none ends in the future."""
    spans: list[list[Entry]] = []
    for entry in sorted(entries, key=lambda entry: entry.intended_at):
        if spans and entry.intended_at - BEFORE_SECONDS <= spans[-1][-1].intended_at + AFTER_SECONDS:
            spans[-1].append(entry)
        else:
            spans.append([entry])
    return [
        Window(span[0].intended_at - BEFORE_SECONDS, min(now, span[-1].intended_at + AFTER_SECONDS), tuple(span))
        for span in spans
    ]


class Listing(Protocol):
    """The platform's request listing; raises `CallFailed`."""

    async def listing(self, start: float, end: float, cursor: str | None) -> Page:
        """One page, payloads included."""


class Reconciler:
    """Settles what is unknown in a journal."""

    def __init__(
        self, listing: Listing, journal: Journal, observer: Observer, now: Callable[[], float], rng: Random
    ) -> None:
        self._listing, self._journal, self._observer = listing, journal, observer
        self._now, self._rng = now, rng

    async def settle(self) -> Settled:
        """Look every unknown submit up; those that are found are accepted in the journal when this returns."""
        entries = [entry async for entry in self._journal.entries({State.UNKNOWN})]
        adopted, rest = 0, dict.fromkeys(Finding, 0)
        for window in windows(entries, self._now()):
            listed = await self._all_pages(window)
            known = await self._journal.requests([item.request_id for item in listed or ()])
            for entry in window.entries:
                found = Found(Finding.UNREADABLE) if listed is None else match(entry, listed, known)
                if found.request_id is not None:
                    await self._journal.record(Accepted(entry.job_key, self._now(), Ticket(found.request_id)))
                    adopted += 1
                else:
                    rest[found.finding] += 1
                facts: dict[str, Json] = {"job": entry.job_key, "finding": found.finding}
                self._observer.happened("reconciled", request_id=found.request_id, **facts)
        return Settled(adopted, {finding: count for finding, count in rest.items() if count})

    async def _all_pages(self, window: Window) -> list[Listed] | None:
        """Every request of a window; None where a page failed, for then nothing may be concluded.

        The cursor encodes a page number, and new requests shift pages: `end` is fixed, and requests that come
        twice count once.
        """
        found: dict[RequestId, Listed] = {}
        cursor: str | None = None
        seen: set[str] = set()
        while True:
            read = partial(self._listing.listing, window.start, window.end, cursor)
            try:
                page = await reading(read, self._rng, stop=stop_after_attempt(_READS))
            except CallFailed:
                return None
            for item in page.items:
                found[item.request_id] = item
            if page.next_cursor is None:
                return list(found.values())
            if page.next_cursor in seen:
                return None  # pages that go round in circles never end
            seen.add(page.next_cursor)
            cursor = page.next_cursor


def _in_time(entry: Entry, item: Listed) -> bool:
    """Whether a request can be this submit, by each instant that is known of it."""
    earliest, latest = entry.intended_at - BEFORE_SECONDS, entry.intended_at + AFTER_SECONDS
    instants = (minted_at(item.request_id), item.sent_at)
    return all(at is None or earliest <= at <= latest for at in instants)


def _equal(sent: Json, listed: Json) -> bool:
    if isinstance(sent, bool) or isinstance(listed, bool):
        return sent is listed
    if isinstance(sent, dict) and isinstance(listed, dict):
        return sent.keys() == listed.keys() and all(_equal(value, listed[name]) for name, value in sent.items())
    if isinstance(sent, list) and isinstance(listed, list):
        return len(sent) == len(listed) and all(map(_equal, sent, listed))
    return sent == listed
