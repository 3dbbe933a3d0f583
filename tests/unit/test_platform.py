"""The platform API's formats: round trips between server and client, and invalid input."""

from __future__ import annotations

import math
from urllib.parse import parse_qsl, urlsplit

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.fal.endpoint import APP_ID
from batch.fal.platform import (
    BILLING_LIMIT,
    Charge,
    Listed,
    PlatformError,
    billing_reply,
    estimate_reply,
    listing_call,
    listing_reply,
    meta_reply,
    minted_at,
    platform_error_reply,
    pricing_call,
    pricing_reply,
    read_listing,
    read_price,
)
from batch.fal.platform_queries import (
    EstimateKind,
    RequestOutcome,
    SortBy,
    cursor_of,
    read_billing_query,
    read_estimate,
    read_listing_query,
    read_pricing_query,
)
from batch.fal.protocol import FAL, Malformed, Reply, json_reply, read_object
from batch.server.http import bodies
from batch.server.queue.records import uuid7

NOW = 1_790_000_000.0
DAY = 86400.0
APP = ("endpoint_id", APP_ID)
ID = "01a202bc-b0c8-7df4-ae50-0ec04a5b3f0e"
INSTANTS = st.integers(0, 4 * 10**15).map(lambda micros: micros / 1e6)


def query_of(call):
    return parse_qsl(urlsplit(call.url).query)


# --- the listing ------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(
            Listed,
            st.uuids().map(str),
            st.just(APP_ID),
            INSTANTS,
            st.one_of(st.none(), INSTANTS),
            st.one_of(st.none(), INSTANTS),
            st.one_of(st.none(), st.integers(100, 599)),
            st.one_of(st.none(), st.dictionaries(st.text(max_size=5), st.integers(0, 2**53))),
            st.one_of(st.none(), st.dictionaries(st.text(max_size=5), st.booleans())),
        ),
        max_size=5,
    ),
    st.one_of(st.none(), st.text("abc=", min_size=1)),
)
def test_the_client_reads_the_server_s_page(items, cursor):
    """The page is equal to the microsecond, except that the required `started_at` is filled in."""
    page = read_listing(listing_reply(items, cursor, payloads=True))
    assert page.next_cursor == cursor
    for sent, read in zip(items, page.items, strict=True):
        assert (read.request_id, read.app, read.status_code) == (sent.request_id, sent.app, sent.status_code)
        assert (read.input, read.output) == (sent.input, sent.output)
        assert read.sent_at == pytest.approx(sent.sent_at, abs=1e-5)
        assert (read.ended_at is None) == (sent.ended_at is None)
        stand_in = next((at for at in (sent.started_at, sent.ended_at, sent.sent_at) if at is not None), None)
        assert read.started_at == pytest.approx(stand_in, abs=1e-5)


def test_an_item_has_the_documented_members_and_no_empty_ones():
    """Payloads only if requested and stored; `duration` includes the waiting time."""
    item = Listed(ID, APP_ID, NOW, NOW + 1, NOW + 3, 200, {"seed": 1}, {"seed": 2})
    (plain,) = read_object(listing_reply([item], None, payloads=False).body)["items"]
    assert plain == {
        "request_id": ID,
        "endpoint_id": APP_ID,
        "sent_at": "2026-09-21T14:13:20.000000Z",
        "started_at": "2026-09-21T14:13:21.000000Z",
        "ended_at": "2026-09-21T14:13:23.000000Z",
        "duration": 3.0,
        "status_code": 200,
    }
    (full,) = read_object(listing_reply([item], None, payloads=True).body)["items"]
    assert (full["json_input"], full["json_output"]) == ({"seed": 1}, {"seed": 2})
    waiting = Listed(ID, APP_ID, NOW, None, None, None, None)
    body = read_object(listing_reply([waiting], "Mg==", payloads=True).body)
    assert set(body["items"][0]) == {"request_id", "endpoint_id", "sent_at", "started_at"}
    assert (body["next_cursor"], body["has_more"]) == ("Mg==", True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"items": {}},
        {"items": [{}]},
        {"items": [{"request_id": 5}]},
        {"items": [{"request_id": "../x"}]},
        {"items": ["x"]},
        {"items": [], "has_more": True},
    ],
)
def test_a_listing_in_another_format_is_malformed(body):
    """A malformed page proves nothing."""
    with pytest.raises(Malformed):
        read_listing(json_reply(200, body))


def test_the_server_parses_the_client_s_query():
    """The server parses the client's call, times to the microsecond."""
    call = listing_call(FAL, APP_ID, start=NOW - 1.5, end=NOW, cursor=cursor_of(7))
    assert call.url.startswith("https://api.fal.ai/v1/models/requests/by-endpoint?")
    asked = read_listing_query(query_of(call), NOW + 99)
    assert (asked.apps, asked.start, asked.end) == ((APP_ID,), NOW - 1.5, NOW)
    assert (asked.payloads, asked.limit, asked.page, asked.offset) == (True, 100, 7, 600)


def test_a_listing_query_has_defaults():
    """The last day, 50 per page, sorted by end; 90 days for a single request."""
    asked = read_listing_query([APP], NOW)
    assert (asked.start, asked.end, asked.limit, asked.page, asked.payloads) == (NOW - DAY, NOW, 50, 1, False)
    assert (asked.sort_by, asked.outcome, asked.request_id) == (SortBy.ENDED_AT, None, None)
    one = read_listing_query([APP, ("request_id", ID.upper())], NOW)
    assert (one.start, one.request_id) == (NOW - 90 * DAY, ID)


def test_ids_may_be_repeated_or_comma_separated():
    """Ids are deduplicated; dates may lack time and zone; unknown parameters are ignored."""
    asked = read_listing_query(
        [
            ("endpoint_id", "a/b, c/d"),
            ("endpoint_id", "a/b"),
            ("start", "2025-01-01"),
            ("end", "2025-01-01T01:00:00+01:00"),
            ("status", "user_error"),
            ("sort_by", "duration"),
            ("expand", "x,payloads"),
            ("colour", "blue"),
        ],
        NOW,
    )
    assert asked.apps == ("a/b", "c/d")
    assert asked.start == asked.end == 1735689600.0
    assert (asked.outcome, asked.sort_by, asked.payloads) == (RequestOutcome.USER_ERROR, SortBy.DURATION, True)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ([], "endpoint_id is missing"),
        ([("endpoint_id", " , ")], "endpoint_id is missing"),
        ([("endpoint_id", ",".join(f"a/{n}" for n in range(51)))], "endpoint_id .* at most 50 .* 51"),
        ([APP, ("start", "yesterday")], "start = 'yesterday'.* ISO 8601"),
        ([APP, ("end", "5")], "end = '5'.* ISO 8601"),
        ([APP, ("status", "fine")], "status = 'fine'.*'success', 'error' or 'user_error'"),
        ([APP, ("sort_by", "name")], "sort_by = 'name'.*'ended_at' or 'duration'"),
        ([APP, ("limit", "0")], "limit = '0'.* 1$"),
        ([APP, ("limit", "101")], "limit = '101'.* 100$"),
        ([APP, ("limit", "1.5")], "limit = "),
        ([APP, ("limit", "٣")], "limit = "),
        ([APP, ("limit", "9" * 5000)], "limit = "),
        ([APP, ("request_id", "x")], "request_id = 'x'.* UUID"),
        ([APP, ("cursor", "!")], "cursor = .*next_cursor"),
        ([APP, ("cursor", "MA==")], "cursor = .*next_cursor"),
        ([APP, ("cursor", cursor_of(10**12))], "cursor = .*next_cursor"),
        ([APP, ("cursor", "2")], "cursor = .*next_cursor"),
    ],
)
def test_an_invalid_parameter_is_named(query, words):
    """The message contains the parameter, its value and what is allowed."""
    with pytest.raises(Malformed, match=words):
        read_listing_query(query, NOW)


@given(st.integers(1, 10**9))
def test_a_cursor_is_a_page_number(page):
    """The page number in base64, as in fal's example `Mg==` for page 2."""
    assert read_listing_query([APP, ("cursor", cursor_of(page))], NOW).page == page
    assert cursor_of(2) == "Mg=="


@given(st.lists(st.tuples(st.sampled_from(["endpoint_id", "start", "end", "limit", "cursor", "status"]), st.text())))
def test_any_query_string_is_parsed_or_malformed(query):
    """Any query string is parsed or Malformed."""
    for read in (read_listing_query, read_billing_query):
        try:
            asked = read(query, NOW)
        except Malformed:
            continue
        assert asked.limit >= 1
        assert math.isfinite(asked.start)


# --- charges, prices, estimates ---------------------------------------------------------------------------


def test_a_billing_query_has_defaults_and_bounds():
    """The default is the last day, the maximum 90 days."""
    asked = read_billing_query([], NOW)
    assert (asked.start, asked.end, asked.apps, asked.request_ids) == (NOW - DAY, NOW, (), ())
    assert (asked.limit, asked.offset) == (BILLING_LIMIT, 0)
    assert read_billing_query([("request_id", f"{ID},x"), APP], NOW).request_ids == (ID, "x")
    with pytest.raises(Malformed, match="days apart; use at most 90"):
        read_billing_query([("start", "2020-01-01")], NOW)
    with pytest.raises(Malformed, match=r"request_id.* = 'a b'"):
        read_billing_query([("request_id", "a b")], NOW)


@given(st.floats(0, 1e4), st.floats(0, 10))
def test_a_billing_event_adds_up(units, price):
    """Subtotal minus discount is the total, which equals the nano dollars."""
    (event,) = read_object(billing_reply([Charge(ID, APP_ID, NOW, units, price)], None).body)["billing_events"]
    assert event["cost_subtotal"] - event["cost_discount"] == event["cost_total"]
    assert event["cost_total"] == event["cost_estimate_nano_usd"] / 1e9
    assert event["cost_total"] == pytest.approx(units * price, abs=1e-9)
    assert (event["output_units"], event["unit_price"], event["percent_discount"]) == (units, price, None)


def test_the_client_reads_the_server_s_price():
    """The price is per megapixel, in US dollars."""
    assert read_pricing_query(query_of(pricing_call(FAL, APP_ID))) == (APP_ID,)
    assert read_price(pricing_reply({APP_ID: 0.03}), APP_ID) == (0.03, "megapixels")
    with pytest.raises(Malformed, match="no price in USD"):
        read_price(pricing_reply({}), APP_ID)
    with pytest.raises(Malformed, match="endpoint_id is missing"):
        read_pricing_query([])


def test_both_kinds_of_estimate_are_parsed():
    """Billing units, or calls."""
    units = {"estimate_type": "unit_price", "endpoints": {APP_ID: {"unit_quantity": 1.5}}}
    assert read_estimate(orjson.dumps(units)) == (EstimateKind.UNIT_PRICE, {APP_ID: 1.5})
    calls = {
        "estimate_type": "historical_api_price",
        "endpoints": {"a/b": {"call_quantity": 3}, APP_ID: {"call_quantity": 1}},
    }
    assert read_estimate(orjson.dumps(calls)) == (EstimateKind.HISTORICAL, {"a/b": 3.0, APP_ID: 1.0})
    assert read_object(estimate_reply(EstimateKind.UNIT_PRICE, 0.045).body) == {
        "estimate_type": "unit_price",
        "total_cost": 0.045,
        "currency": "USD",
    }


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[]", "JSON object"),
        ("{", "not JSON"),
        ("{}", "estimate_type.*'unit_price', 'historical_api_price'"),
        ('{"estimate_type": "unit_price"}', "endpoints is missing"),
        ('{"estimate_type": "unit_price", "endpoints": {"a/b": 5}}', "a/b = 5: should be a JSON object"),
        (
            '{"estimate_type": "unit_price", "endpoints": {"a/b": {"unit_quantity": true}}}',
            "unit_quantity = True: should be a valid number",
        ),
        ('{"estimate_type": "unit_price", "endpoints": {"a/b": {"unit_quantity": 0}}}', "unit_quantity = 0"),
        (
            '{"estimate_type": "historical_api_price", "endpoints": {"a/b": {"call_quantity": 1.5}}}',
            "call_quantity = 1.5",
        ),
        ('{"estimate_type": "historical_api_price", "endpoints": {"a/b": {"unit_quantity": 1}}}', "call_quantity"),
    ],
)
def test_an_estimate_in_another_format_is_malformed(body, words):
    """The message contains what is missing or invalid."""
    with pytest.raises(Malformed, match=words):
        read_estimate(body.encode())


@pytest.mark.parametrize(
    ("model", "reply"),
    [
        (
            bodies.RequestPageBody,
            listing_reply([Listed(ID, APP_ID, NOW, None, None, None, None)], "Mg==", payloads=True),
        ),
        (
            bodies.RequestPageBody,
            listing_reply([Listed(ID, APP_ID, NOW, NOW + 1, NOW + 3, 200, {"a": None}, {"b": 1})], None, payloads=True),
        ),
        (bodies.BillingPageBody, billing_reply([Charge(ID, APP_ID, NOW, 1.5, 0.03, {"team": "a"})], None)),
        (bodies.PricePageBody, pricing_reply({APP_ID: 0.03})),
        (bodies.EstimateBody, estimate_reply(EstimateKind.UNIT_PRICE, 0.045)),
        (bodies.MetaBody, meta_reply(["127.0.0.1/32"])),
        (bodies.PlatformErrorBody, platform_error_reply(400, PlatformError.VALIDATION, "limit", ID)),
    ],
)
def test_the_documented_models_describe_the_replies(model, reply):
    """A reply has every required field of its model and no other fields."""
    body = read_object(reply.body)
    assert model.model_validate(body).model_dump(exclude_unset=True) == body


def test_an_error_has_the_platform_s_format():
    """With a request id, if any, also in the header."""
    reply = platform_error_reply(400, PlatformError.VALIDATION, "limit", ID)
    assert (reply.status, reply.headers["x-fal-request-id"]) == (400, ID)
    assert read_object(reply.body) == {"error": {"type": "validation_error", "message": "limit", "request_id": ID}}
    assert read_object(meta_reply(["127.0.0.1/32"]).body) == {"webhook_ip_ranges": ["127.0.0.1/32"]}


def test_a_version_7_id_contains_its_time():
    """The time is exact to the millisecond; other ids have none."""
    assert minted_at(uuid7(NOW, 12345)) == NOW
    assert minted_at("6ba7b810-9dad-41d1-80b4-00c04fd430c8") is None
    assert minted_at("x") is None
    assert isinstance(meta_reply([]), Reply)
