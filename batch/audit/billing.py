"""Comparison of the target's billing events with the costs that a run counted. Assembly.

Owns reading the pages of billing events and the comparison. Unavailable billing events (no key, no ADMIN scope, a
target without them) give an explanation, not an error.
"""

from __future__ import annotations

import time
from functools import partial
from random import Random

import anyio
import anyio.to_thread
from tenacity import stop_after_attempt

from batch.audit.report import EXAMPLES, Check, Mismatch, Remark
from batch.audit.tables import AuditTables
from batch.config import Settings
from batch.errors import ConfigError
from batch.fal.client import FalClient
from batch.fal.errors import CallFailed, Trouble
from batch.fal.platform import BILLING_SPAN, BillPage
from batch.run.retrying import reading
from batch.targets import open_platform

__all__ = ["charges_check", "gather_bills"]

_FUZZ_USD = 1e-6
_BILL_READS = 5
_BILL_PAGE_SECONDS = 120.0
_BILL_LAG = 3600.0
"""Seconds. A request that ended more recently may be billed later. fal publishes no number; this one is ours."""
_BILL_MARGIN = 3600.0
"""Seconds. The clocks differ, and it is undocumented which instant of a request the timestamp of an event is."""


async def gather_bills(settings: Settings, scratch: AuditTables, version: str, since: float, now: float) -> str:
    """Read the target's billing events for the time of the run. Return "" or why it failed."""
    try:
        async with open_platform(settings, version=version) as client:
            start = since - _BILL_MARGIN
            while start < now:
                end = min(now, start + BILLING_SPAN)
                await _gather_span(client, scratch, start, end)
                start = end
    except ConfigError as error:
        return str(error)
    except TimeoutError:
        return "timeout while reading billing events"
    except _BillsRefused as error:
        return str(error)
    except CallFailed as error:
        return f"could not read billing events ({error.trouble.detail})"
    return ""


class _BillsRefused(Exception):
    """An answer that another read would not change. The message says why."""


async def _read_page(client: FalClient, start: float, end: float, cursor: str | None) -> BillPage:
    try:
        return await client.billing(start, end, cursor)
    except CallFailed as error:
        status = None if error.trouble.reply is None else error.trouble.reply.status
        if status in {401, 402, 403}:
            words = f"this key may not read billing events (HTTP {status}): they need the ADMIN scope"
            raise _BillsRefused(words) from error
        if status in {404, 405, 501}:
            raise _BillsRefused(f"the target has no billing events (HTTP {status})") from error
        raise


async def _gather_span(client: FalClient, scratch: AuditTables, start: float, end: float) -> None:
    cursor: str | None = None
    seen: set[str] = set()
    while True:
        read = partial(_read_page, client, start, end, cursor)
        with anyio.fail_after(_BILL_PAGE_SECONDS):
            page = await reading(read, Random(), stop=stop_after_attempt(_BILL_READS), now=time.time)
        bills = [(bill.request_id, bill.at, bill.units, bill.usd) for bill in page.bills]
        await anyio.to_thread.run_sync(scratch.add_bills, bills)
        cursor = page.next_cursor
        if cursor is None:
            return
        if cursor in seen:
            raise CallFailed(Trouble("billing", "malformed", detail="the cursor of a page repeats"))
        seen.add(cursor)


def charges_check(scratch: AuditTables, why: str, now: float, *, priced: bool) -> tuple[Check, Remark | None]:
    """Compare the billed amounts with the counted ones, request by request."""
    if why:
        return Check("charges", why, compared=False), None
    twice = Mismatch("requests were charged more than once", "ask the service and quote the request ids")
    for request_id, job, times, count in scratch.rows("billed_twice", [EXAMPLES]):
        twice.met(f"request {request_id} of job {job}: {times} times")
        twice.count = count
    limits = {"fuzz": _FUZZ_USD, "count": EXAMPLES, "priced": priced, "before": now - _BILL_LAG}
    otherwise = Mismatch(
        "requests were charged more, or for other units, than counted",
        "`restyle plan --live-price` shows whether the price has changed",
    )
    for request_id, job, *amounts, count in scratch.rows("billed_otherwise", limits):
        ours, units, theirs, their_units = amounts
        counted = f"${ours:.6g}" + ("" if units is None else f" for {units:g} units")
        charged = f"${theirs:.6g} for {their_units:g} units"
        otherwise.met(f"request {request_id} of job {job}: {counted} counted, {charged} charged")
        otherwise.count = count
    unbilled = Mismatch("results report billed units but have no charge", "check again later: bills may lag")
    for request_id, job, units, count in scratch.rows("unbilled", limits):
        unbilled.met(f"request {request_id} of job {job}: {units:g} units")
        unbilled.count = count
    ((billed, usd),) = scratch.rows("count_bills")
    ((foreign, foreign_usd),) = scratch.rows("foreign_bills")
    ((_, _, own_usd),) = scratch.rows("count_requests")
    words = f"{billed:,} requests charged, ${usd:,.2f}; counted ${own_usd:,.2f}"
    remark = Remark(
        f"charges (${foreign_usd:,.2f}) are for requests of this app that are not in the journal: other runs of this"
        " account, or submits of unknown outcome",
        foreign,
    )
    return Check("charges", words, (twice, otherwise, unbilled)), remark
