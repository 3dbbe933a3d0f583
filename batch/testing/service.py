"""`FakeService`: the queue API in memory, on anyio's clock, with faults named after their effect.

Implements `batch.run.interfaces.Service`. Under Trio's MockClock a run of hours takes milliseconds. Counts the POSTs
that arrived, the accepted requests (each would be billed), reads and uploads.
"""

from __future__ import annotations

import hashlib
import io
import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
import orjson
from PIL import Image

from batch.fal.endpoint import APP_ID
from batch.fal.errors import CallFailed, Trouble
from batch.fal.platform import PAGE_LIMIT, Listed, ListingPage
from batch.fal.protocol import CancelOutcome, Reply, model_error_reply, request_error_reply
from batch.types import Answer, Attempt, Json, JsonObject, QueueState, RequestId, Ticket, TicketStatus

__all__ = [
    "AnswersReadsWith",
    "CompletesWith",
    "DropsAfterAccept",
    "DropsBeforeAccept",
    "FakeListing",
    "FakeService",
    "Fault",
    "RefusesConnection",
    "RefusesSubmits",
    "SendsDamagedFiles",
]


@dataclass(slots=True)
class FakeRequest:
    """One accepted request."""

    id: RequestId
    body: JsonObject
    accepted_at: float
    ends_at: float
    starts_at: float
    cancelled: bool = False
    reads: int = 0
    """Status reads that arrived."""
    is_expired: bool = False
    """Whether it did not start in time: it ended with 504, and is not billed."""
    noticed_at: float | None = None
    """Time of the first status read that reported its end."""


class Fault:
    """Does nothing; a fault overrides the event at which it occurs. `n` counts that event from 1."""

    def connecting(self, phase: str, n: int) -> None:
        """Called before any byte is sent."""

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        """Return a reply for a submit that arrived, instead of accepting it."""

    def accepted(self, attempt: Attempt, n: int) -> None:
        """Called after a submit was accepted, before its answer is sent."""

    def reading(self, phase: str, n: int) -> Reply | None:
        """Return a reply for a status or result read, instead of the real one."""

    def completing(self, request: FakeRequest, n: int) -> Reply | None:
        """Return a failure of the job, instead of its result."""

    def downloading(self, data: bytes, n: int) -> bytes:
        """Return the bytes to send for a file."""
        return data

    def listing(self, n: int) -> Reply | None:
        """Return a reply for a page of the request listing, instead of the real one."""


@dataclass(slots=True)
class FakeListing:
    """How the fake lists its requests; the defaults are those of an ideal service."""

    lag: float = 0.0
    """Seconds until an accepted request is listed."""
    waiting: bool = True
    """Whether unfinished requests are listed."""
    hidden: Callable[[FakeRequest], bool] = lambda _: False
    """Whether a request's input is hidden."""
    page_limit: int = PAGE_LIMIT
    """Maximum requests per page, whatever is asked for."""
    arrivals: int = 0
    """Requests of other users that arrive before each page is read, and shift the pages."""
    page_bytes: int | None = None
    """Size of a page above which it is too large for the client."""
    others: list[Listed] = field(default_factory=list)
    """Requests that do not belong to this run."""


@dataclass(slots=True)
class RefusesConnection(Fault):
    """Refuses connections between two times: certainly nothing was sent."""

    since: float
    until: float

    def connecting(self, phase: str, n: int) -> None:
        """Refuse."""
        if self.since <= anyio.current_time() < self.until:
            raise CallFailed(Trouble(phase, "connect", sent=False, detail="connect: refused"))


@dataclass(slots=True)
class DropsAfterAccept(Fault):
    """Drops the connection after the submit was accepted, before the answer: the expensive case."""

    every: int = 1

    def accepted(self, attempt: Attempt, n: int) -> None:
        """Drop."""
        if n % self.every == 0:
            raise CallFailed(Trouble("submit", "disconnected", detail="disconnected"))


@dataclass(slots=True)
class DropsBeforeAccept(Fault):
    """Drops the connection after the submit was sent, before it was accepted; the client cannot know."""

    every: int = 1

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        """Drop."""
        if n % self.every == 0:
            raise CallFailed(Trouble("submit", "disconnected", detail="disconnected"))
        return None


@dataclass(slots=True)
class RefusesSubmits(Fault):
    """Answers `times` submits with a status, starting with the `first`-th."""

    status: int
    first: int = 1
    times: int = 1_000_000_000
    headers: dict[str, str] = field(default_factory=dict)

    def submitting(self, attempt: Attempt, n: int) -> Reply | None:
        """Refuse."""
        if self.first <= n < self.first + self.times:
            return Reply(self.status, orjson.dumps({"detail": "refused on purpose"}), self.headers)
        return None


@dataclass(slots=True)
class AnswersReadsWith(Fault):
    """Answers every `every`-th status and result read with a status that says nothing about the job."""

    status: int
    every: int = 2
    body: bytes = b"<html>nginx</html>"

    def reading(self, phase: str, n: int) -> Reply | None:
        """Return the wrong reply."""
        return Reply(self.status, self.body) if n % self.every == 0 else None


@dataclass(slots=True)
class CompletesWith(Fault):
    """Ends jobs whose prompt contains `word` with an error of the job itself, the first `times` times."""

    word: str
    status: int
    type: str
    times: int = 1_000_000_000
    needs_retry: bool | None = None
    _seen: int = 0
    _ids: set[str] = field(default_factory=set)

    def completing(self, request: FakeRequest, n: int) -> Reply | None:
        """Return the error."""
        if self.word not in str(request.body["prompt"]):
            return None
        if request.id not in self._ids:
            self._seen += 1
            self._ids.add(request.id)
        if self._seen > self.times:
            return None
        if self.status == 422:
            return model_error_reply(422, [{"loc": ["body"], "msg": "failed on purpose", "type": self.type}])
        headers = {} if self.needs_retry is None else {"x-fal-needs-retry": str(self.needs_retry).lower()}
        return request_error_reply(self.status, self.type, "failed on purpose", None, **headers)


@dataclass(slots=True)
class SendsDamagedFiles(Fault):
    """Cuts every `every`-th download in half."""

    every: int = 2

    def downloading(self, data: bytes, n: int) -> bytes:
        """Cut the file."""
        return data[: len(data) // 2] if n % self.every == 0 else data


@dataclass(slots=True)
class _Slot:
    """Executes one request at a time; starts requests only during its shifts."""

    shifts: Sequence[tuple[float, float]]
    free_at: float = 0.0

    def next_start(self, now: float) -> float:
        earliest = max(now, self.free_at)
        return next((max(earliest, since) for since, until in self.shifts if earliest < until), math.inf)


class FakeService:
    """The fake queue API.

    `slots` None: every request executes at once. A number: that many concurrently. Otherwise the shifts of each slot,
    as time spans in which it starts requests: `[[(0, 100)], [(50, math.inf)]]`; at least one slot must be unlimited.
    `rejects_repeats`: the reply to a submit with a known key; None: it replays the first answer if it `honours_keys`,
    else it ignores keys. `start_timeout`: seconds that a request may wait before it ends with 504.
    """

    def __init__(
        self,
        *,
        service_time: float | Callable[[int], float] = 1.0,
        slots: int | Sequence[Sequence[tuple[float, float]]] | None = None,
        honours_keys: bool = False,
        rejects_repeats: Reply | None = None,
        start_timeout: float | None = None,
        faults: Sequence[Fault] = (),
        round_trip: float = 0.0,
        listing: FakeListing | None = None,
    ) -> None:
        self._service_time = service_time if callable(service_time) else (lambda _: service_time)
        shifts = [[(0.0, math.inf)]] * slots if isinstance(slots, int) else slots or []
        self._slots = [_Slot(of_one) for of_one in shifts]
        self._honours_keys, self._round_trip = honours_keys, round_trip
        self.faults = list(faults)
        """Those in force; a list that may change while the service is used."""
        self._rejects_repeats, self._start_timeout = rejects_repeats, start_timeout
        self.lists = listing or FakeListing()
        self.before_send: Callable[[Attempt], Awaitable[None]] | None = None
        self._by_key: dict[str, RequestId] = {}
        self._counts: Counter[str] = Counter()
        self.requests: dict[RequestId, FakeRequest] = {}
        self._starts: list[float] = []
        self.bodies: list[JsonObject] = []
        """Bodies of all POSTs that arrived."""

    @property
    def accepted(self) -> int:
        """Number of accepted requests: each would be billed."""
        return len(self.requests)

    @property
    def posts(self) -> int:
        """Number of submit POSTs that arrived."""
        return self._counts["submit"]

    def count(self, phase: str) -> int:
        """Return the number of exchanges of a phase that arrived."""
        return self._counts[phase]

    def forget_keys(self) -> None:
        """Know no `Idempotency-Key` any more, like a service whose keys have expired."""
        self._by_key.clear()

    async def submit(self, attempt: Attempt) -> Ticket:
        """Accept the submit, or apply a fault."""
        if self.before_send is not None:
            await self.before_send(attempt)
        n = await self._arrive("submit")
        self.bodies.append(orjson.loads(attempt.body))
        for fault in self.faults:
            self._refuse("submit", fault.submitting(attempt, n))
        if attempt.idempotency_key in self._by_key:
            self._refuse("submit", self._rejects_repeats)
        request_id = self._by_key.get(attempt.idempotency_key) if self._honours_keys else None
        if request_id is None:
            request_id = self._accept(attempt)
        for fault in self.faults:
            fault.accepted(attempt, n)
        return Ticket(request_id, position=self._ahead(self.requests[request_id].starts_at, anyio.current_time()))

    async def status(self, ticket: Ticket) -> TicketStatus:
        """Return the state of the request at the current time."""
        request = await self._read("status", ticket)
        request.reads += 1
        now = anyio.current_time()
        if now >= request.ends_at or request.cancelled:
            request.noticed_at = now if request.noticed_at is None else request.noticed_at
            return TicketStatus(QueueState.COMPLETED, inference_time=request.ends_at - request.starts_at)
        if now >= request.starts_at:
            return TicketStatus(QueueState.IN_PROGRESS)
        return TicketStatus(QueueState.IN_QUEUE, position=self._ahead(request.starts_at, now))

    async def result(self, ticket: Ticket) -> Answer:
        """Return the output; its images are determined by the input."""
        request = await self._read("result", ticket)
        now = anyio.current_time()
        if now < request.ends_at:
            request.reads += 1  # too early, counted like a status read with the same answer
            self._refuse("result", Reply(400, b'{"detail":"Request is still in progress"}'))
        request.noticed_at = now if request.noticed_at is None else request.noticed_at
        if request.is_expired:
            timeout = {"x-fal-request-timeout-type": "user"}
            self._refuse("result", request_error_reply(504, "request_timeout", "Not started in time", None, **timeout))
        for fault in self.faults:
            self._refuse("result", fault.completing(request, self._counts["result"]))
        body = request.body
        count = body.get("num_images")
        images: list[Json] = [
            {"url": f"fake://{request.id}/{i}", "width": 8, "height": 8, "content_type": "image/png"}
            for i in range(count if isinstance(count, int) else 1)
        ]
        output: JsonObject = {
            "images": images,
            "seed": body["seed"],
            "timings": {"inference": request.ends_at - request.starts_at},
            "prompt": body["prompt"],
            "has_nsfw_concepts": [],
        }
        return Answer(output, 0.5, raw=orjson.dumps(output))

    async def cancel(self, ticket: Ticket) -> CancelOutcome | None:
        """Cancel a request that has not ended."""
        request = await self._read("cancel", ticket)
        if anyio.current_time() >= request.ends_at:
            return CancelOutcome.ALREADY_COMPLETED
        request.cancelled = True
        return CancelOutcome.REQUESTED

    async def upload(self, data: bytes, content_type: str, name: str) -> str:
        """Return a URL derived from the content."""
        await self._arrive("upload")
        return f"fake://uploads/{hashlib.sha256(data).hexdigest()}"

    async def download(self, url: str) -> bytes:
        """Return a small PNG whose colour is determined by the seed and the URL."""
        n = await self._arrive("download")
        request_id = url.removeprefix("fake://").partition("/")[0]
        seed = self.requests[RequestId(request_id)].body["seed"]
        colour = hashlib.sha256(f"{seed}{url.rpartition('/')[2]}".encode()).digest()
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (colour[0], colour[1], colour[2])).save(buffer, "PNG")
        data = buffer.getvalue()
        for fault in self.faults:
            data = fault.downloading(data, n)
        return data

    async def listing(self, start: float, end: float, cursor: str | None, limit: int = PAGE_LIMIT) -> ListingPage:
        """Return a page of the requests between two times, newest first; the cursor is a page number."""
        n = await self._arrive("listing")
        for fault in self.faults:
            self._refuse("listing", fault.listing(n))
        how, now = self.lists, anyio.current_time()
        for number in range(how.arrivals):
            name = RequestId(f"other-{n}-{number}")
            how.others.append(Listed(name, APP_ID, min(now, end - 1e-3), None, None, None, {"seed": -1}))
        own = [
            self._listed(request)
            for request in self.requests.values()
            if request.accepted_at + how.lag <= now and (how.waiting or request.ends_at <= now)
        ]
        found = [item for item in own + how.others if item.sent_at is not None and start <= item.sent_at < end]
        found.sort(key=lambda item: item.sent_at or 0.0, reverse=True)
        size, number = min(limit, how.page_limit), int(cursor or 0)
        page = found[number * size : (number + 1) * size]
        if how.page_bytes is not None and sum(len(orjson.dumps(item.input)) for item in page) > how.page_bytes:
            raise CallFailed(Trouble("listing", "oversize", detail="oversize"))
        return ListingPage(tuple(page), str(number + 1) if len(found) > (number + 1) * size else None)

    def _listed(self, request: FakeRequest) -> Listed:
        ended = request.ends_at if request.ends_at <= anyio.current_time() else None
        shown = None if self.lists.hidden(request) else request.body
        status = (504 if request.is_expired else 200) if ended else None
        return Listed(request.id, APP_ID, request.accepted_at, request.starts_at, ended, status, shown)

    async def _arrive(self, phase: str) -> int:
        await anyio.sleep(self._round_trip)
        for fault in self.faults:
            fault.connecting(phase, self._counts[phase] + 1)
        self._counts[phase] += 1
        return self._counts[phase]

    async def _read(self, phase: str, ticket: Ticket) -> FakeRequest:
        await self._arrive(phase)
        self._counts["reads"] += 1
        for fault in self.faults:
            self._refuse(phase, fault.reading(phase, self._counts["reads"]))
        request = self.requests.get(ticket.request_id)
        if request is None:
            raise CallFailed(Trouble(phase, reply=Reply(404, b'{"status":"NOT_FOUND"}')))
        return request

    def _accept(self, attempt: Attempt) -> RequestId:
        now, number = anyio.current_time(), len(self.requests)
        request_id = RequestId(f"request-{number}")
        slot = min(self._slots, key=lambda one: one.next_start(now)) if self._slots else _Slot([(0.0, math.inf)])
        starts = slot.next_start(now)
        is_expired = self._start_timeout is not None and starts - now > self._start_timeout
        if is_expired and self._start_timeout is not None:
            starts = ends = now + self._start_timeout
        else:
            ends = slot.free_at = starts + self._service_time(number)
        self._by_key[attempt.idempotency_key] = request_id
        self.requests[request_id] = FakeRequest(
            request_id, orjson.loads(attempt.body), now, ends, starts, is_expired=is_expired
        )
        insort(self._starts, starts)
        return request_id

    def _ahead(self, starts_at: float, now: float) -> int:
        """Return the number of waiting requests that will start earlier."""
        return max(0, bisect_left(self._starts, starts_at) - bisect_right(self._starts, now))

    def _refuse(self, phase: str, reply: Reply | None) -> None:
        if reply is not None:
            raise CallFailed(Trouble(phase, reply=reply, detail=f"HTTP {reply.status}"))
