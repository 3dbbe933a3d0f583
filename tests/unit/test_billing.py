"""Billing events: the client reads what our server writes, and refuses anything that is not an amount."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import orjson
import pytest

from batch.fal.endpoint import APP_ID
from batch.fal.platform import Bill, Charge, billing_call, billing_reply, read_billing
from batch.fal.protocol import Malformed, Origins, Reply
from batch.types import RequestId

EVENT = {"request_id": "a", "timestamp": "2026-11-22T10:00:00Z", "output_units": 1.5, "cost_total": 0.045}


def page(*events, **more) -> Reply:
    return Reply(200, orjson.dumps({"billing_events": list(events), "has_more": False, "next_cursor": None, **more}))


def test_what_the_server_writes_is_what_the_client_reads():
    """One module for both roles."""
    charges = [
        Charge(RequestId("a"), APP_ID, 1700000000.5, 1.5, 0.03),
        Charge(RequestId("b"), APP_ID, 1.0, 0.041, 0.03),
    ]
    found = read_billing(billing_reply(charges, "Mg=="))
    assert found.bills == (Bill(RequestId("a"), 1700000000.5, 1.5, 0.045), Bill(RequestId("b"), 1.0, 0.041, 0.00123))
    assert found.next_cursor == "Mg=="
    assert read_billing(billing_reply([], None)) == ((), None)


def test_the_call_names_app_window_and_cursor():
    """The request goes to the platform's origin with the largest page size."""
    call = billing_call(Origins.of_server("http://h:1"), APP_ID, start=0.0, end=86400.0, cursor="Mg==")
    assert call.url.startswith("http://h:1/v1/models/billing-events?")
    assert parse_qs(urlsplit(call.url).query) == {
        "endpoint_id": [APP_ID], "start": ["1970-01-01T00:00:00.000000Z"], "end": ["1970-01-02T00:00:00.000000Z"],
        "limit": ["10000"], "cursor": ["Mg=="],
    }  # fmt: skip


def test_a_cost_is_taken_from_nano_dollars_where_the_total_is_missing():
    """The documentation of fal has both fields; one is enough."""
    event = {**EVENT, "cost_total": None, "cost_estimate_nano_usd": 45_000_000}
    assert read_billing(page(event)).bills[0].usd == pytest.approx(0.045)


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": None}, {"timestamp": "yesterday"}, {"timestamp": None}, {"output_units": -1},
        {"output_units": "1"}, {"output_units": True}, {"cost_total": "0.03"}, {"cost_total": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_event_that_is_none_is_not_passed_over(change):
    """A partial event proves nothing: the page is malformed."""
    with pytest.raises(Malformed):
        read_billing(page({**EVENT, **change}))


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"billing_events": {}}', b'{"billing_events": [], "has_more": true}'])
def test_a_page_of_another_shape_is_malformed(body):
    """A page that announces more without a cursor is malformed, too."""
    with pytest.raises(Malformed):
        read_billing(Reply(200, body))
