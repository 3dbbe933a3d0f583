"""Unknown submits: find out through the platform's request listing whether they were accepted.

`match` is pure and decides; `Reconciler` reads pages and has the adoption written down. A job is adopted only
where exactly one listed request bears every key that was sent, in its window of time, and no other unknown
submit lays claim to it. Everything else, two matches, a request whose input is not shown, a page that failed,
leaves it unknown: absence proves nothing, because requests that still wait may not be listed and the listing
lags. A start timeout ends that: once a submit can neither wait nor run any more, a listing that demonstrably covers its
time shows it, or it was not accepted.
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
"""The clocks of two machines differ, and which of its instants the listing filters on is not documented."""
AFTER_SECONDS = 900.0
"""A submit may have hung for its whole timeout before it was accepted, and the listing filter may mean the end."""
LATE_SECONDS = 300.0
"""A submit may be accepted so long after its intent: the client waits 120 s for its answer, and clocks differ."""
OVER_SECONDS = 5400.0
"""From its last possible start to its entry in the listing: fal executes a request for an hour at most, and the listing
may lag."""
COVERED_SECONDS = 14 * 86400.0
"""An older submit may have left the listing. fal keeps inputs for 30 days; other services do not say."""
_NOT_STARTED_STATUS = 504
_AT_ONCE_SECONDS = 60.0
"""The first submits of a run go out together: none was sent before the others."""
_WITNESSES = 50
"""Requests at each end of a window that may be this run's."""
_READS = 5
"""Tries at one page. A page that cannot be read leaves its window's jobs unknown."""
_PAGE_SECONDS = 60.0
"""For all tries at one page, whatever `Retry-After` says: a listing that is not to be had must not hold up a run."""
_PAGE_SIZES = (PAGE_LIMIT, 10, 1)
"""Requests a page. Inputs that carry their image make a page too large to be read: then fewer are asked for."""
_PAGES = 10_000
"""Of one window; a listing of more does not end."""
_NOT_FOR_US = frozenset({401, 403, 404, 405, 501})
"""Answers, after all tries, of a platform that lists nothing to this key, or has no listing."""
_UNREADABLE_WINDOWS = 3
"""So many, and the rest of this time's are not tried: the listing is out of order, and each try takes its time."""


class Finding(StrEnum):
    """What the listing says of one unknown submit."""

    ADOPTED = "adopted"
    ABSENT = "absent"
    """Not listed. No proof: it may still wait, or the listing may lag."""
    NOT_ACCEPTED = "not accepted"
    """Not listed, although it can no longer wait or run, and the listing shows this run's requests around its time."""
    NOT_STARTED = "not started"
    """Accepted, and over without a start: HTTP 504, which costs nothing."""
    AMBIGUOUS = "ambiguous"
    """Two or more requests match."""
    HIDDEN = "hidden"
    """A request of the window has no input to compare with."""
    UNREADABLE = "unreadable"
    """A page of the listing could not be read."""
    REFUSED = "refused"
    """The listing is not shown to this key, or there is none: no look-up will ever find it."""


class FoundRequest(NamedTuple):
    """A finding, and the request where there is exactly one."""

    finding: Finding
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class SearchWindow:
    """A span of time and the unknown submits in it; `end` is exclusive."""

    start: float
    end: float
    entries: tuple[OpenJob, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """What one reconciliation did."""

    at: float
    """Wall time, in Unix seconds, before the first page was asked for."""
    adopted: int
    still_unknown: dict[JobKey, Finding]

    @property
    def unknown(self) -> int:
        """Jobs that are still unknown."""
        return len(self.still_unknown)

    def missed(self, key: JobKey, intended_at: float, after: float) -> bool:
        """Whether a submit had `after` seconds to show up in a listing that was read to its end, and did not.

        A listing that is refused for good counts as read: there is nothing more to wait for. One that could not be
        read, or that shows requests which may be this one, says nothing, however late it is.
        """
        return self.still_unknown.get(key) in _MISSED and self.at - intended_at >= after

    def clears(self, key: JobKey) -> bool:
        """Whether a submit is certain not to be billed: the same attempt may be sent again."""
        return self.still_unknown.get(key) in _CLEARED


_MISSED = frozenset({Finding.ABSENT, Finding.REFUSED})
_CLEARED = frozenset({Finding.NOT_ACCEPTED, Finding.NOT_STARTED})


def bounded(after: float, start_timeout: float | None) -> float:
    """Seconds that a submit gets to show up: as asked for, but none while it may still start."""
    return after if start_timeout is None else max(after, start_timeout + LATE_SECONDS)


def _is_over(entry: OpenJob, at: float) -> bool:
    """Whether a look-up that began then shows the submit if it was accepted, whatever became of it."""
    if entry.start_timeout is None:
        return False
    age = at - entry.intended_at
    return LATE_SECONDS + entry.start_timeout + OVER_SECONDS <= age <= COVERED_SECONDS


def same_input(sent: JsonObject, listed: JsonObject) -> bool:
    """Whether every key that we sent is listed with an equal value; other keys are the service's defaults.

    Numbers are compared as numbers (1 equals 1.0), but a boolean never equals a number.
    """
    return all(name in listed and _equal(value, listed[name]) for name, value in sent.items())


def match(
    entry: OpenJob, listed: Sequence[Listed], known: Collection[str], *, after: float = AFTER_SECONDS
) -> FoundRequest:
    """Decide about one unknown submit.

    Args:
        entry: the job, with the body as it was sent.
        listed: every request of its window, all pages read.
        known: request ids that already belong to a job or to an earlier attempt.
        after: seconds from its intent in which it can have been accepted.
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
    """The spans to list, each with its submits: spans that touch are one, and none ends in the future."""
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
    """One window's search: is given its pages, keeps what may be one of its submits, and concludes at the end.

    A busy account has many more requests in a window than unknown submits: only those that bear one's seed, or
    show no input at all, are kept. Every job has a seed before it is sent. Where a submit has a start timeout, the
    first and last requests of the window are kept too: those of this run among them show which time the listing
    covers.
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
        """One page. Pages shift while they are read: a request that comes twice counts once, as it was shown last."""
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
        """Of everything that was kept."""
        return [*dict.fromkeys((*self._shown, *self._hidden, *self._edges))]

    def findings(self, known: Collection[str], at: float = 0.0) -> dict[JobKey, FoundRequest]:
        """Decide about each submit of the window; `known` as for `match`, `at`: before the first page was asked for."""
        hidden = [item for item in self._hidden.values() if item.request_id not in self._shown]
        covered = [instant for request_id, instant in self._edges.items() if request_id in known]
        found: dict[JobKey, FoundRequest] = {}
        for entry, seed in zip(self._entries, self._seeds, strict=True):
            listed = self._by_seed[seed]
            finding = match(entry, [*listed.values(), *hidden], known, after=self._after)
            if _is_over(entry, at):
                finding = _concluded(entry, finding, listed, covered)
            found[entry.job_key] = finding
        claims = Counter(finding.request_id for finding in found.values() if finding.request_id is not None)
        for key, finding in found.items():
            if finding.request_id is not None and claims[finding.request_id] > 1:
                found[key] = FoundRequest(Finding.AMBIGUOUS)
        return found


def _concluded(
    entry: OpenJob, found: FoundRequest, listed: Mapping[RequestId, Listed], covered: Sequence[float]
) -> FoundRequest:
    """What a finding proves of a submit that can neither wait nor run any more.

    `covered` has the instants of listed requests that are known to be this run's.
    """
    sent = entry.intended_at
    if found.finding is Finding.ABSENT and covered and min(covered) - _AT_ONCE_SECONDS <= sent <= max(covered):
        return FoundRequest(Finding.NOT_ACCEPTED)
    if found.request_id is not None and listed[found.request_id].status_code == _NOT_STARTED_STATUS:
        return FoundRequest(Finding.NOT_STARTED)
    return found


_NO_SEED = ""


def _seed_of(values: JsonObject) -> str:
    """The same for equal numbers, whatever their type. What is no whole number is left to the comparison."""
    seed = values.get("seed")
    if isinstance(seed, int | float) and not isinstance(seed, bool) and seed == int(seed):
        return str(int(seed))
    return _NO_SEED


class RequestListing(Protocol):
    """The platform's request listing; raises `CallFailed`."""

    async def listing(self, start: float, end: float, cursor: str | None, limit: int) -> ListingPage:
        """One page of at most so many requests, payloads included."""


class _Unreadable(Exception):
    """A window's listing could not be read to its end: nothing may be concluded from it."""


class _ListingRefused(_Unreadable):
    """The listing is not for this key."""


class _ListingTooLarge(Exception):
    """A page is larger than the client takes."""


class Reconciler:
    """Settles what is unknown in a journal."""

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
        """`repeated_for`: seconds from its intent in which a submit may have been repeated under its key."""
        self._listing, self._journal, self._observer = listing, journal, observer
        self._now, self._rng = now, rng
        self._after = AFTER_SECONDS + repeated_for

    async def settle(self) -> Settled:
        """Look every unknown submit up; those that are found are accepted in the journal when this returns.

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
        """What the listing says of a window's submits, all pages read.

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
        """The cursor encodes a page number, and new requests shift pages: `end` stays the same for all of them."""
        cursor: str | None = None
        seen: set[str] = set()
        for _ in range(_PAGES):
            page = await self._page(window, cursor, limit)
            search.take(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return
            if cursor in seen:  # pages that go round in circles never end
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
            raise (_ListingRefused if reply is not None and reply.status in _NOT_FOR_US else _Unreadable) from error


def _instant_of(item: Listed) -> float | None:
    """When a request was sent, as far as the listing or its id says."""
    return minted_at(item.request_id) if item.sent_at is None else item.sent_at


def _in_time(entry: OpenJob, item: Listed, after: float) -> bool:
    """Whether a request can be this submit, by each instant that is known of it."""
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
