"""Unknown submits: look them up in the platform's request listing to find out whether they were accepted.

`match` is pure and decides; `Reconciler` reads pages and records adoptions. A job is adopted only if exactly one listed
request has every key that was sent, lies in its time window, and matches no other unknown submit. Otherwise (two
matches, a request without its input, an unreadable page) it stays unknown. Absence proves nothing, because queued
requests may not be listed and the listing lags. A start timeout changes that: once a submit can no longer be queued or
running, it appears in a listing that demonstrably covers its time, or it was not accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import NamedTuple, Protocol

import anyio
import orjson
from tenacity import stop_after_attempt

from batch.fal.errors import CallFailed
from batch.fal.platform import PAGE_LIMIT, Listed, ListingPage, minted_at
from batch.journal.events import Accepted
from batch.journal.records import OpenJob
from batch.journal.states import State
from batch.run.interfaces import Journal, Observer
from batch.run.retrying import reading
from batch.types import JobKey, Json, JsonObject, RequestId, Ticket

__all__ = [
    "Finding",
    "FoundRequest",
    "Reconciler",
    "RequestListing",
    "Search",
    "SearchWindow",
    "Settled",
    "bounded",
    "match",
    "same_input",
    "windows",
]

BEFORE_SECONDS = 300.0
"""Clocks differ, and it is not documented which timestamp the listing filters on."""
AFTER_SECONDS = 900.0
"""A submit may hang for its whole timeout before acceptance, and the listing may filter on the end of the request."""
LATE_SECONDS = 300.0
"""Longest time from intent to acceptance: the client waits 120 s for an answer, and clocks differ."""
OVER_SECONDS = 5400.0
"""From the last possible start to the entry in the listing: fal executes a request for at most an hour, and the listing
may lag."""
COVERED_SECONDS = 14 * 86400.0
"""An older submit may have left the listing. fal keeps inputs for 30 days; other services do not document it."""
_NOT_STARTED_STATUS = 504
_AT_ONCE_SECONDS = 60.0
"""The first submits of a run are concurrent: none was sent before the others."""
_WITNESSES = 50
"""Requests kept at each end of a window, to find some of this run."""
_READS = 5
"""Tries at one page. An unreadable page leaves its window's jobs unknown."""
_PAGE_SECONDS = 60.0
"""For all tries at one page, whatever `Retry-After` says: an unavailable listing must not block the run."""
_PAGE_SIZES = (PAGE_LIMIT, 10, 1)
"""Requests per page. Inputs that contain their image can make a page too large; then fewer are requested."""
_PAGES = 10_000
"""Maximum pages of one window, against a listing without an end."""
_NO_ACCESS = frozenset({401, 403, 404, 405, 501})
"""HTTP statuses, after all tries, of a platform without a listing for this key, or without one at all."""
_UNREADABLE_WINDOWS = 3
"""Unreadable windows after which the remaining ones are skipped: the listing is down, and each try takes time."""


class Finding(StrEnum):
    """Outcome of the look-up of one unknown submit."""

    ADOPTED = "adopted"
    ABSENT = "absent"
    """Not listed. This proves nothing: it may still be queued, or the listing may lag."""
    NOT_ACCEPTED = "not accepted"
    """Not listed, although it can no longer be queued or running and the listing covers its time."""
    NOT_STARTED = "not started"
    """Accepted, and ended without a start: HTTP 504, which costs nothing."""
    AMBIGUOUS = "ambiguous"
    """Two or more requests match."""
    HIDDEN = "hidden"
    """A request in the window has no input to compare with."""
    UNREADABLE = "unreadable"
    """A page of the listing could not be read."""
    REFUSED = "refused"
    """This key may not read the listing, or there is no listing: no look-up will ever find the submit."""


class FoundRequest(NamedTuple):
    """A finding, with the request if exactly one matches."""

    finding: Finding
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class SearchWindow:
    """A time span and its unknown submits; `end` is exclusive."""

    start: float
    end: float
    entries: tuple[OpenJob, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """Result of one reconciliation."""

    at: float
    """Wall time, in Unix seconds, just before the first page was requested."""
    adopted: int
    still_unknown: dict[JobKey, Finding]

    @property
    def unknown(self) -> int:
        """Jobs that are still unknown."""
        return len(self.still_unknown)

    def missed(self, key: JobKey, intended_at: float, after: float) -> bool:
        """Return whether a complete listing did not show a submit at least `after` seconds after its intent.

        A listing that is refused permanently counts as complete: waiting longer changes nothing. A listing that could
        not be read, or that shows possible matches, never counts.
        """
        return self.still_unknown.get(key) in _MISSED and self.at - intended_at >= after

    def clears(self, key: JobKey) -> bool:
        """Return whether a submit is certain not to be billed, so that the same attempt may be sent again."""
        return self.still_unknown.get(key) in _CLEARED


_MISSED = frozenset({Finding.ABSENT, Finding.REFUSED})
_CLEARED = frozenset({Finding.NOT_ACCEPTED, Finding.NOT_STARTED})


def bounded(after: float, start_timeout: float | None) -> float:
    """Return the seconds a submit has to show up: `after`, but at least until it can no longer start."""
    return after if start_timeout is None else max(after, start_timeout + LATE_SECONDS)


def _is_over(entry: OpenJob, at: float) -> bool:
    """Return whether a look-up that began at `at` would show the submit if it was accepted, whatever its end."""
    if entry.start_timeout is None:
        return False
    age = at - entry.intended_at
    return LATE_SECONDS + entry.start_timeout + OVER_SECONDS <= age <= COVERED_SECONDS


def same_input(sent: JsonObject, listed: JsonObject) -> bool:
    """Return whether every key that we sent is listed with an equal value; other keys are the service's defaults.

    Numbers are compared as numbers (1 equals 1.0), but a boolean never equals a number.
    """
    return all(name in listed and _equal(value, listed[name]) for name, value in sent.items())


def match(
    entry: OpenJob, listed: Sequence[Listed], known: Collection[str], *, after: float = AFTER_SECONDS
) -> FoundRequest:
    """Decide about one unknown submit.

    Args:
        entry: the job, with the body as it was sent.
        listed: every request of its window, from all pages.
        known: request ids that already belong to a job or an earlier attempt.
        after: seconds from its intent within which it can have been accepted.
    """
    sent = orjson.loads(entry.body)
    candidates = [item for item in listed if item.request_id not in known and _in_time(entry, item, after)]
    matches = [item for item in candidates if item.input is not None and same_input(sent, item.input)]
    if len(matches) > 1:
        return FoundRequest(Finding.AMBIGUOUS)
    if any(item.input is None for item in candidates):
        return FoundRequest(Finding.HIDDEN)
    return FoundRequest(Finding.ADOPTED, matches[0].request_id) if matches else FoundRequest(Finding.ABSENT)


def windows(entries: Sequence[OpenJob], now: float, *, after: float = AFTER_SECONDS) -> list[SearchWindow]:
    """Return the spans to list, each with its submits. Overlapping spans are merged; none ends in the future."""
    spans: list[list[OpenJob]] = []
    for entry in sorted(entries, key=lambda entry: entry.intended_at):
        if spans and entry.intended_at - BEFORE_SECONDS <= spans[-1][-1].intended_at + after:
            spans[-1].append(entry)
        else:
            spans.append([entry])
    return [
        SearchWindow(span[0].intended_at - BEFORE_SECONDS, min(now, span[-1].intended_at + after), tuple(span))
        for span in spans
    ]


class Search:
    """Search of one window: takes its pages, keeps possible matches, and decides at the end.

    A busy account has many more requests in a window than unknown submits, so only requests with the seed of a submit,
    or without any input, are kept. Every job has a seed before it is sent. If a submit has a start timeout, the first
    and last requests of the window are kept too: those that belong to this run show which time the listing covers.
    """

    def __init__(self, entries: Sequence[OpenJob], *, after: float = AFTER_SECONDS) -> None:
        self._entries, self._after = entries, after
        self._bounded = any(entry.start_timeout is not None for entry in entries)
        self._edges: dict[RequestId, float] = {}
        self._seeds = [_seed_of(orjson.loads(entry.body)) for entry in entries]
        self._by_seed: dict[str, dict[RequestId, Listed]] = {seed: {} for seed in self._seeds}
        self._hidden: dict[RequestId, Listed] = {}
        self._shown: set[RequestId] = set()

    def take(self, items: Iterable[Listed]) -> None:
        """Add one page. Pages shift between reads: a request seen twice counts once, in its latest version."""
        for item in items:
            if self._bounded and (at := _instant_of(item)) is not None:
                self._edges[item.request_id] = at
            if item.input is None:
                self._hidden[item.request_id] = item
                continue
            for seed in {_seed_of(item.input), _NO_SEED} & self._by_seed.keys():
                self._by_seed[seed][item.request_id] = item
                self._shown.add(item.request_id)
        if len(self._edges) > 4 * _WITNESSES:
            inwards = sorted(self._edges.items(), key=lambda edge: edge[1])
            self._edges = dict(inwards[:_WITNESSES] + inwards[-_WITNESSES:])

    def ids(self) -> list[RequestId]:
        """Return the ids of all kept requests."""
        return [*dict.fromkeys((*self._shown, *self._hidden, *self._edges))]

    def findings(self, known: Collection[str], at: float = 0.0) -> dict[JobKey, FoundRequest]:
        """Decide about each submit of the window; `known` as for `match`, `at` just before the first page request."""
        hidden = [item for item in self._hidden.values() if item.request_id not in self._shown]
        covered = [instant for request_id, instant in self._edges.items() if request_id in known]
        found: dict[JobKey, FoundRequest] = {}
        for entry, seed in zip(self._entries, self._seeds, strict=True):
            listed = self._by_seed[seed]
            finding = match(entry, [*listed.values(), *hidden], known, after=self._after)
            if _is_over(entry, at):
                finding = _conclude(entry, finding, listed, covered)
            found[entry.job_key] = finding
        claims = Counter(finding.request_id for finding in found.values() if finding.request_id is not None)
        for key, finding in found.items():
            if finding.request_id is not None and claims[finding.request_id] > 1:
                found[key] = FoundRequest(Finding.AMBIGUOUS)
        return found


def _conclude(
    entry: OpenJob, found: FoundRequest, listed: Mapping[RequestId, Listed], covered: Sequence[float]
) -> FoundRequest:
    """Return what a finding proves about a submit that can no longer be queued or running.

    `covered` contains the times of listed requests known to belong to this run.
    """
    sent = entry.intended_at
    if found.finding is Finding.ABSENT and covered and min(covered) - _AT_ONCE_SECONDS <= sent <= max(covered):
        return FoundRequest(Finding.NOT_ACCEPTED)
    if found.request_id is not None and listed[found.request_id].status_code == _NOT_STARTED_STATUS:
        return FoundRequest(Finding.NOT_STARTED)
    return found


_NO_SEED = ""


def _seed_of(values: JsonObject) -> str:
    """Return the seed as text, equal for equal numbers of any type; empty if it is not a whole number."""
    seed = values.get("seed")
    if isinstance(seed, int | float) and not isinstance(seed, bool) and seed == int(seed):
        return str(int(seed))
    return _NO_SEED


class RequestListing(Protocol):
    """The platform's request listing; raises `CallFailed`."""

    async def listing(self, start: float, end: float, cursor: str | None, limit: int) -> ListingPage:
        """Return one page of at most `limit` requests, payloads included."""


class _Unreadable(Exception):
    """A window's listing could not be read completely, so nothing may be concluded from it."""


class _ListingRefused(_Unreadable):
    """This key may not read the listing."""


class _ListingTooLarge(Exception):
    """A page is larger than the client accepts."""


class Reconciler:
    """Settles the unknown submits of a journal."""

    def __init__(
        self,
        listing: RequestListing,
        journal: Journal,
        observer: Observer,
        now: Callable[[], float],
        rng: Random,
        *,
        repeated_for: float = 0.0,
    ) -> None:
        """`repeated_for`: seconds from its intent within which a submit may have been repeated under its key."""
        self._listing, self._journal, self._observer = listing, journal, observer
        self._now, self._rng = now, rng
        self._after = AFTER_SECONDS + repeated_for

    async def settle(self) -> Settled:
        """Look up every unknown submit; those found are accepted in the journal when this returns.

        Raises:
            StorageError: the disk refused.
        """
        async with aclosing(self._journal.entries({State.UNKNOWN})) as unknown:
            entries = [entry async for entry in unknown]
        at, adopted, rest, unreadable = self._now(), 0, dict[JobKey, Finding](), 0
        without = FoundRequest(Finding.UNREADABLE)
        for window in windows(entries, at, after=self._after):
            found: dict[JobKey, FoundRequest] = {}
            try:
                found = await self._search(window, at) if unreadable < _UNREADABLE_WINDOWS else {}
            except _Unreadable as error:
                unreadable += 1
                without = FoundRequest(Finding.REFUSED if isinstance(error, _ListingRefused) else Finding.UNREADABLE)
            for entry in window.entries:
                finding, request_id = found.get(entry.job_key, without)
                if request_id is not None:
                    await self._journal.record(Accepted(entry.job_key, self._now(), Ticket(request_id)))
                    adopted += 1
                else:
                    rest[entry.job_key] = finding
                self._observer.happened("reconciled", job=entry.job_key, finding=finding, request_id=request_id)
        return Settled(at, adopted, rest)

    async def _search(self, window: SearchWindow, at: float) -> dict[JobKey, FoundRequest]:
        """Return what the listing shows of a window's submits.

        Raises:
            _Unreadable: a page failed.
        """
        for limit in _PAGE_SIZES:
            search = Search(window.entries, after=self._after)
            try:
                await self._all_pages(window, limit, search)
            except _ListingTooLarge:
                continue
            return search.findings(await self._journal.requests(search.ids()), at)
        raise _Unreadable

    async def _all_pages(self, window: SearchWindow, limit: int, search: Search) -> None:
        """Read all pages with the same `end`: the cursor encodes a page number, and new requests would shift pages."""
        cursor: str | None = None
        seen: set[str] = set()
        for _ in range(_PAGES):
            page = await self._page(window, cursor, limit)
            search.take(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return
            if cursor in seen:  # a cycle of pages never ends
                break
            seen.add(cursor)
        raise _Unreadable

    async def _page(self, window: SearchWindow, cursor: str | None, limit: int) -> ListingPage:
        async def read() -> ListingPage:
            try:
                return await self._listing.listing(window.start, window.end, cursor, limit)
            except CallFailed as error:
                if error.trouble.transport == "oversize":
                    raise _ListingTooLarge from error
                raise

        try:
            with anyio.fail_after(_PAGE_SECONDS):
                return await reading(read, self._rng, stop=stop_after_attempt(_READS), now=self._now)
        except TimeoutError as error:
            raise _Unreadable from error
        except CallFailed as error:
            reply = error.trouble.reply
            raise (_ListingRefused if reply is not None and reply.status in _NO_ACCESS else _Unreadable) from error


def _instant_of(item: Listed) -> float | None:
    """Return when a request was sent, according to the listing or its id."""
    return minted_at(item.request_id) if item.sent_at is None else item.sent_at


def _in_time(entry: OpenJob, item: Listed, after: float) -> bool:
    """Return whether a request can be this submit, by every known timestamp."""
    earliest, latest = entry.intended_at - BEFORE_SECONDS, entry.intended_at + after
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
