"""The platform API over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from datetime import UTC, datetime, timedelta
from random import Random

import aiohttp
import orjson
import pytest

from batch.fal.client import FalClient
from batch.fal.endpoint import APP_ID
from batch.fal.platform_queries import cursor_of
from batch.fal.protocol import Origins
from batch.server.http.auth import Key, Keys
from batch.server.limits import ServerLimits
from tests.edges.serving import INPUT, SUBMIT, ScriptedEngine, call, completed, read, result, serving, submit

LISTING = "/v1/models/requests/by-endpoint"
HERE = {"endpoint_id": APP_ID}


def run(coroutine):
    return asyncio.run(coroutine)


async def listed(session, **query):
    """Return the items of one page, and the page."""
    status, _, body = await call(session, "GET", LISTING, params={**HERE, **query})
    assert status == 200, body
    return body["items"], body


def ids(items):
    return [item["request_id"] for item in items]


def faults(tmp_path, text):
    path = tmp_path / "faults.toml"
    path.write_text(text)
    return path


# --- the listing ------------------------------------------------------------------------------------------


def test_requests_are_listed_by_their_end_with_payloads(tmp_path):
    """Input as submitted, output with URLs or the body of an error; no payloads by default."""

    async def use():
        async with serving(tmp_path) as session:
            good = await submit(session, seed=5, extra="kept")
            await completed(session, good)
            bad = await submit(session, "fail")
            await completed(session, bad)
            items, page = await listed(session, expand="payloads")
            assert (ids(items), page["next_cursor"], page["has_more"]) == ([bad, good], None, False)
            assert items[1]["json_input"] == {**INPUT, "seed": 5, "extra": "kept"}
            assert items[1]["json_output"] == (await call(session, "GET", read(good)))[2]
            assert items[0]["json_output"]["detail"][0]["type"] == "image_too_small"
            assert [item["status_code"] for item in items] == [422, 200]
            assert items[1]["sent_at"] <= items[1]["started_at"] <= items[1]["ended_at"]
            plain, _ = await listed(session)
            assert [set(item) for item in plain] == [set(items[0]) - {"json_input", "json_output"}] * 2

    run(use())


def test_an_embedded_image_is_listed_as_submitted(tmp_path):
    """The data URI is identical; images beyond the page's limit are URLs that work."""
    images = [Random(n).randbytes(size) for n, size in enumerate((300, 200_000))]
    uris = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in images]

    async def use():
        async with serving(tmp_path) as session:
            for uri in uris:
                await completed(session, await submit(session, image_url=uri))
            items, _ = await listed(session, expand="payloads")
            assert [item["json_input"]["image_url"] for item in items] == uris[::-1]
        async with serving(tmp_path, limits=ServerLimits(listed_images_bytes=1000)) as session:
            items, _ = await listed(session, expand="payloads")
            assert items[1]["json_input"]["image_url"] == uris[0]
            async with session.get(items[0]["json_input"]["image_url"]) as response:
                assert await response.read() == images[1]

    run(use())


def test_a_request_with_store_io_0_is_listed_without_payloads(tmp_path):
    """`X-Fal-Store-IO: 0`: the request is listed without input and output."""

    async def use():
        async with serving(tmp_path) as session:
            await completed(session, await submit(session, headers={"x-fal-store-io": "0"}))
            (item,), _ = await listed(session, expand="payloads")
            assert not {"json_input", "json_output"} & set(item)

    run(use())


def test_inline_and_large_payloads_are_not_listed(tmp_path):
    """`sync_mode` results and very large bodies are omitted, as on fal; the request is listed."""

    async def use():
        async with serving(tmp_path, limits=ServerLimits(listed_bytes=1000)) as session:
            await completed(session, await submit(session, sync_mode=True))
            await completed(session, await submit(session, "x" * 1000))
            (huge, inline), _ = await listed(session, expand="payloads")
            assert ("json_input" in inline, "json_output" in inline) == (True, False)
            assert "json_input" not in huge

    run(use())


def test_a_request_cancelled_before_its_start_is_a_user_error(tmp_path):
    """Its status is 499, and `started_at`, which is required, equals `ended_at`."""

    async def use():
        engine = ScriptedEngine(slots=1)
        async with serving(tmp_path, engine) as session:
            held, waiting = await submit(session, "hold"), await submit(session)
            await call(session, "PUT", read(waiting, "/cancel"))
            await completed(session, waiting)
            (item,), _ = await listed(session, status="user_error")
            assert (item["request_id"], item["status_code"]) == (waiting, 499)
            assert item["started_at"] == item["ended_at"]
            engine.go.set()
            await completed(session, held)

    run(use())


@pytest.mark.parametrize(("status", "prompts"), [("success", ["a cat"]), ("error", ["boom"]), ("user_error", ["fail"])])
def test_the_status_filter_selects_by_outcome(tmp_path, status, prompts):
    """`success` is 2xx, `error` 5xx, `user_error` 4xx."""

    async def use():
        async with serving(tmp_path) as session:
            for prompt in ("a cat", "fail", "boom"):
                await completed(session, await submit(session, prompt))
            items, _ = await listed(session, status=status, expand="payloads")
            assert [item["json_input"]["prompt"] for item in items] == prompts

    run(use())


def test_a_window_selects_by_submit_and_its_end_is_exclusive(tmp_path):
    """The default is the last day. A request id, in any case, extends it."""

    async def use():
        async with serving(tmp_path) as session:
            first = await submit(session)
            await completed(session, first)
            (item,), _ = await listed(session)
            sent = datetime.fromisoformat(item["sent_at"])
            second = await submit(session)
            await completed(session, second)
            iso = lambda at: at.isoformat()  # noqa: E731
            # Listed times are rounded to microseconds, so that the windows keep a margin.
            assert ids((await listed(session, end=iso(sent - timedelta(microseconds=5))))[0]) == []
            assert ids((await listed(session, end=iso(sent + timedelta(microseconds=5))))[0]) == [first]
            assert ids((await listed(session, start=iso(sent + timedelta(microseconds=5))))[0]) == [second]
            assert ids((await listed(session, start=(sent + timedelta(days=1)).date().isoformat()))[0]) == []
            assert ids((await listed(session, request_id=first.upper()))[0]) == [first]
            assert ids((await listed(session, request_id=first, status="error"))[0]) == []
            assert (await listed(session, endpoint_id="fal-ai/flux/schnell"))[0] == []
            assert ids((await listed(session, endpoint_id=f"a/b,{APP_ID}"))[0]) == [second, first]

    run(use())


def test_pages_contain_every_request_once_in_order(tmp_path):
    """Cursors are page numbers; the last page has none; `sort_by=duration` lists the longest request first."""

    async def use():
        async with serving(tmp_path) as session:
            sent = [await submit(session) for _ in range(23)]
            await asyncio.gather(*(completed(session, one) for one in sent))
            found, cursor, pages = [], {}, 0
            while True:
                items, page = await listed(session, limit="5", **cursor)
                found, pages = found + items, pages + 1
                assert page["has_more"] is (page["next_cursor"] is not None)
                if not page["has_more"]:
                    break
                assert page["next_cursor"] == cursor_of(pages + 1)
                cursor = {"cursor": page["next_cursor"]}
            assert (pages, len(found)) == (5, 23)
            assert sorted(ids(found)) == sorted(sent)
            ends = [item["ended_at"] for item in found]
            assert ends == sorted(ends, reverse=True)
            items, _ = await listed(session, sort_by="duration", limit="100")
            durations = [item["duration"] for item in items]
            assert durations == sorted(durations, reverse=True)
            assert (await listed(session, cursor=cursor_of(99)))[0] == []

    run(use())


def test_the_listing_survives_a_restart(tmp_path):
    """The listing is read from disk."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session)
            await completed(session, request_id)
        async with serving(tmp_path) as session:
            assert ids((await listed(session))[0]) == [request_id]

    run(use())


def test_requests_and_charges_are_separate_per_owner(tmp_path):
    """Listing, also by id, billing events and averages contain the owner's requests only."""
    names = ("alice", "bob")
    keys = Keys(tuple(Key(name, hashlib.sha256(name.encode()).digest()) for name in names))
    headers = {name: {"authorization": f"Key {name}:{name}"} for name in names}

    async def use():
        async with serving(tmp_path, keys=keys, price_usd=0.03) as session:
            request_id = await submit(session, headers=headers["alice"])
            while (await call(session, "GET", read(request_id), headers=headers["alice"]))[0] != 200:
                await asyncio.sleep(0)
            for query in ({}, {"request_id": request_id}):
                for name, expected in (("alice", [request_id]), ("bob", [])):
                    found = await call(session, "GET", LISTING, params=HERE | query, headers=headers[name])
                    assert ids(found[2]["items"]) == expected
                    paid = await call(session, "GET", "/v1/models/billing-events", params=query, headers=headers[name])
                    assert ids(paid[2]["billing_events"]) == expected
            status, _, body = await call(session, "GET", LISTING, params=HERE)
            assert (status, body["error"]["type"]) == (401, "authorization_error")
            estimate = {"estimate_type": "historical_api_price", "endpoints": {APP_ID: {"call_quantity": 1}}}
            for name, total in (("alice", 0.015), ("bob", 0.03)):
                path = "/v1/models/pricing/estimate"
                assert (await call(session, "POST", path, json=estimate, headers=headers[name]))[2][
                    "total_cost"
                ] == total

    run(use())


# --- behaviour that fal does not document -----------------------------------------------------------------


def test_unfinished_requests_are_listed_only_with_a_faults_file(tmp_path):
    """Both variants can be tested, because fal's is unknown: missing, or listed without an end."""

    async def use(rules):
        engine = ScriptedEngine(slots=1)
        path = tmp_path / "d"
        async with serving(path, engine, faults=faults(tmp_path, rules)) as session:
            sent = [await submit(session, "hold") for _ in range(3)]
            before, _ = await listed(session, expand="payloads")
            engine.go.set()
            await asyncio.gather(*(completed(session, one) for one in sent))
            after, _ = await listed(session)
            assert set(sent) <= set(ids(after))
            return sent, [item for item in before if item["request_id"] in sent]

    assert run(use(""))[1] == []
    sent, items = run(use("[listing]\nshow_waiting = true"))
    assert ids(items) == sent[::-1]
    for item in items:
        assert not {"ended_at", "status_code", "duration", "json_output"} & set(item)
        assert item["json_input"]["prompt"] == "hold"


@pytest.mark.parametrize("waiting", ["true", "false"])
def test_a_lagging_listing_omits_recent_events(tmp_path, waiting):
    """Submits and ends of the last hour are not listed."""

    async def use():
        rules = faults(tmp_path, f"[listing]\nlag = 3600\nshow_waiting = {waiting}")
        async with serving(tmp_path / "d", faults=rules) as session:
            await completed(session, await submit(session))
            assert (await listed(session))[0] == []

    run(use())


def test_the_window_can_select_by_end(tmp_path):
    """`window = "ended_at"`: a request is listed in the window of its end, not of its submit."""

    async def use():
        engine = ScriptedEngine(slots=1)
        rules = faults(tmp_path, '[listing]\nwindow = "ended_at"')
        async with serving(tmp_path / "d", engine, faults=rules) as session:
            request_id = await submit(session, "hold")
            submitted = datetime.now(UTC).isoformat()
            engine.go.set()
            await completed(session, request_id)
            assert (await listed(session, end=submitted))[0] == []
            assert ids((await listed(session, start=submitted))[0]) == [request_id]

    run(use())


# --- money ------------------------------------------------------------------------------------------------


def test_charges_are_the_measured_units_at_the_server_s_price(tmp_path):
    """Only requests with images are charged; filters by request and endpoint; paging."""

    async def use(**options):
        async with serving(tmp_path, **options) as session:
            paid = [await submit(session, num_images=n) for n in (1, 2)]
            await asyncio.gather(*(completed(session, one) for one in paid))
            await completed(session, await submit(session, "fail"))
            events = (await call(session, "GET", "/v1/models/billing-events", params=HERE))[2]["billing_events"]
            one = await call(session, "GET", f"/v1/models/billing-events?request_id={paid[0]}")
            assert ids(one[2]["billing_events"]) == [paid[0]]
            page = (await call(session, "GET", "/v1/models/billing-events?limit=1"))[2]
            assert (len(page["billing_events"]), page["next_cursor"]) == (1, cursor_of(2))
            other = await call(session, "GET", "/v1/models/billing-events?endpoint_id=a/b")
            assert other[2]["billing_events"] == []
            return {event["request_id"]: event for event in events}, paid

    events, paid = run(use())
    assert [events[one]["output_units"] for one in paid] == [0.5, 1.0]
    assert {event["cost_total"] for event in events.values()} == {0}
    events, paid = run(use(price_usd=0.03))
    assert [events[one]["cost_total"] for one in paid] == [0.015, 0.03]


BILLS = "/v1/models/billing-events"


def test_tagged_charges_contain_and_filter_tags(tmp_path):
    """Keys combine with "and", values of a key with "or"; tags survive a restart; `source=billed` omits them."""

    async def use():
        async with serving(tmp_path) as session:
            tags = ["team=a,env=prod", "team=b,env=prod", "team=a,env=test,fal.x=y", None]
            ids_of = {}
            for number, packed in enumerate(tags):
                ids_of[await submit(session, headers={"X-Fal-Tags": packed} if packed else None)] = number
            await asyncio.gather(*(completed(session, one) for one in ids_of))
        async with serving(tmp_path) as session:

            async def found(*filters):
                query = [("source", "tagged-billed"), *(("tag", one) for one in filters)]
                status, _, body = await call(session, "GET", BILLS, params=query)
                assert status == 200, body
                return {ids_of[one["request_id"]]: one["tags"] for one in body["billing_events"]}

            assert await found() == {
                0: {"team": "a", "env": "prod"},
                1: {"team": "b", "env": "prod"},
                2: {"team": "a", "env": "test"},
                3: {},
            }
            assert set(await found("team=a")) == {0, 2}
            assert set(await found("team=a", "env=prod")) == {0}
            assert set(await found("team=a", "team=b", "env=prod")) == {0, 1}
            assert set(await found("team=(untagged)")) == {3}
            assert set(await found("owner=x")) == set()
            plain = (await call(session, "GET", BILLS))[2]["billing_events"]
            assert len(plain) == 4
            assert not any("tags" in one for one in plain)
            for query in ("tag=a=b", "source=all", "source=tagged-billed&tag=a", "source=tagged-billed&tag==a"):
                assert (await call(session, "GET", f"{BILLS}?{query}"))[0] == 400, query
            eleven = "&".join(f"tag=k{number}=v" for number in range(11))
            assert (await call(session, "GET", f"{BILLS}?source=tagged-billed&{eleven}"))[0] == 400

    run(use())


def test_prices_and_estimates_of_the_endpoint(tmp_path):
    """An unknown endpoint is 404; calls cost the average of earlier calls, or one megapixel without any."""

    async def use():
        async with serving(tmp_path, price_usd=0.04) as session:
            status, _, body = await call(session, "GET", "/v1/models/pricing", params=HERE)
            assert (status, body["prices"][0]["unit_price"], body["prices"][0]["unit"]) == (200, 0.04, "megapixels")
            assert (await call(session, "GET", "/v1/models/pricing?endpoint_id=a/b"))[0] == 404

            async def estimate(kind, name, quantity, app=APP_ID):
                body = {"estimate_type": kind, "endpoints": {app: {name: quantity}}}
                return await call(session, "POST", "/v1/models/pricing/estimate", json=body)

            assert (await estimate("unit_price", "unit_quantity", 2.5))[2]["total_cost"] == 0.1
            assert (await estimate("historical_api_price", "call_quantity", 10))[2]["total_cost"] == 0.4
            await completed(session, await submit(session))
            assert (await estimate("historical_api_price", "call_quantity", 10))[2]["total_cost"] == 0.2
            assert (await estimate("unit_price", "unit_quantity", 1, app="a/b"))[0] == 404
            assert (await call(session, "GET", "/v1/meta"))[2] == {"webhook_ip_ranges": ["127.0.0.1/32"]}

    run(use())


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", LISTING, 400, "validation_error"),
        ("GET", f"{LISTING}?endpoint_id=a/b&limit=0", 400, "validation_error"),
        ("GET", f"{LISTING}?endpoint_id=a/b&cursor=%ff", 400, "validation_error"),
        ("GET", f"{LISTING}?endpoint_id=a/b&start=%ed%a0%80", 400, "validation_error"),
        ("GET", "/v1/models/billing-events?start=2000-01-01", 400, "validation_error"),
        ("GET", "/v1/models/pricing", 400, "validation_error"),
        ("POST", "/v1/models/pricing/estimate", 400, "validation_error"),
        ("GET", "/v1/models/usage", 404, "not_found"),
        ("DELETE", "/v1/models/requests/x/payloads", 404, "not_found"),
        ("POST", "/v1/anything", 404, "not_found"),
    ],
)
def test_every_error_has_the_platform_s_format(tmp_path, method, path, status, kind):
    """JSON `{"error": {type, message, request_id}}`; no path below /v1 is a submit."""

    async def use():
        async with serving(tmp_path) as session:
            found, headers, body = await call(session, method, path)
            assert (found, body["error"]["type"]) == (status, kind)
            assert body["error"]["request_id"] == headers["x-fal-request-id"]
            assert (await call(session, "GET", "/health"))[2]["submit_posts"] == 0

    run(use())


# --- restyle's client -------------------------------------------------------------------------------------


def test_the_client_finds_a_submit_with_a_lost_response(tmp_path):
    """As in a reconciliation: the connection breaks after the acceptance, and the listing shows the input."""

    async def use():
        rules = faults(tmp_path, '[[fault]]\nat = "submit"\ndo = "drop-after-accept"\nfirst = 1')
        async with serving(tmp_path / "d", faults=rules) as session:
            before = datetime.now(UTC).timestamp() - 1
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await session.post(SUBMIT, data=orjson.dumps({**INPUT, "seed": 77}))
            async with FalClient(Origins.of_server(str(session._base_url)), APP_ID) as client:
                page = await client.listing(before, before + 60, None)
                while not page.items:  # it is listed after it has ended
                    page = await client.listing(before, before + 60, None)
            (item,) = page.items
            assert item.input == {**INPUT, "seed": 77}
            assert (await result(session, item.request_id))[0] == 200

    run(use())
