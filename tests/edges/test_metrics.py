"""`/metrics` over real HTTP, read with Prometheus' parser."""

from __future__ import annotations

import asyncio

import aiohttp
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.edges.serving import ScriptedEngine, call, completed, read, serving, submit


def run(coroutine):
    return asyncio.run(coroutine)


async def samples(session: aiohttp.ClientSession) -> dict[tuple, float]:
    """Return every sample by name and label values."""
    async with session.get("/metrics") as response:
        assert response.status == 200
        text = await response.text()
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_outcome(tmp_path):
    """Accepted, finished, failed, cancelled; a cancelled request does not count as failed."""

    async def use():
        async with serving(tmp_path, ScriptedEngine(slots=1)) as session:
            for prompt in ("a cat", "a dog", "fail"):
                await completed(session, await submit(session, prompt))
            held = await submit(session, "hold")
            waiting = await submit(session, "a bird")
            await call(session, "PUT", read(waiting, "/cancel"))
            during = await samples(session)
            await call(session, "PUT", read(held, "/cancel"))
            await completed(session, held)
            return during, await samples(session)

    during, after = run(use())
    assert during["restyle_requests_accepted_total",] == 5
    assert during["restyle_requests_ended_total", "finished"] == 2
    assert during["restyle_requests_ended_total", "failed"] == 1
    assert during["restyle_requests_ended_total", "cancelled"] == 1
    assert (during["restyle_requests_running",], during["restyle_queue_depth",]) == (1, 0)
    assert (after["restyle_requests_running",], after["restyle_requests_ended_total", "cancelled"]) == (0, 2)


def test_the_queue_is_a_gauge(tmp_path):
    """Waiting requests, running requests and slots."""

    async def use():
        async with serving(tmp_path, ScriptedEngine(slots=1)) as session:
            for _ in range(3):
                await submit(session, "hold")
            return await samples(session)

    found = run(use())
    assert (found["restyle_queue_depth",], found["restyle_requests_running",]) == (2, 1)
    assert found["restyle_engine_slots",] == 1


def test_engine_seconds_are_a_cumulative_histogram(tmp_path):
    """Only successful requests are measured."""

    async def use():
        async with serving(tmp_path) as session:
            for prompt in ("a cat", "a dog", "fail"):
                await completed(session, await submit(session, prompt))
            return await samples(session)

    found = run(use())
    assert (found["restyle_engine_seconds_count",], found["restyle_engine_seconds_sum",]) == (2, 1.0)
    assert found["restyle_engine_seconds_bucket", "0.3"] == 0
    assert found["restyle_engine_seconds_bucket", "1.0"] == 2
    assert found["restyle_engine_seconds_bucket", "+Inf"] == 2


def test_responses_are_counted_by_route_group_and_status(tmp_path):
    """No path or id becomes a label, so that requests cannot create new series."""

    async def use():
        async with serving(tmp_path) as session:
            request_id = await submit(session)
            await completed(session, request_id)
            await call(session, "GET", read(request_id))
            await call(session, "GET", read(request_id, "/status"))
            await call(session, "GET", read("no-such-id"))
            for n in range(20):
                await call(session, "GET", f"/made/up/{n}")
            return await samples(session)

    found = {name: value for name, value in run(use()).items() if name[0] == "restyle_http_answers_total"}
    assert {name[1:]: value for name, value in found.items()} == {
        ("submit", "200"): 1,
        ("stream", "200"): 1,
        ("result", "200"): 1,
        ("result", "404"): 1,
        ("status", "200"): 1,
        ("other", "405"): 20,
    }


def test_the_build_metric_describes_the_engine(tmp_path):
    """Engine, model and safety checker are labels."""

    async def use():
        async with serving(tmp_path) as session, session.get("/metrics") as response:
            return await response.text()

    (build,) = [one for one in parse_text(run(use())) if one.name.startswith("restyle_build")]
    labels = build.samples[0].labels
    assert (labels["engine"], labels["model"], labels["revision"]) == ("scripted", "no model", "7")
    assert labels["safety_checker"] == "not checked"
    assert labels["version"]


def test_openmetrics_is_served_on_request(tmp_path):
    """Prometheus sends this Accept header; its parser validates the response."""

    async def use():
        async with serving(tmp_path) as session:
            await completed(session, await submit(session))
            headers = {"accept": "application/openmetrics-text; version=1.0.0"}
            async with session.get("/metrics", headers=headers) as response:
                assert response.content_type == "application/openmetrics-text"
                return await response.text()

    names = {family.name for family in parse_openmetrics(run(use()))}
    assert {"restyle_requests_accepted", "restyle_engine_seconds", "restyle_http_answers", "restyle_build"} <= names


def test_two_servers_in_one_process_have_separate_metrics(tmp_path):
    """Each has its own registry, and counters start at 0, whatever the store contains."""

    async def use():
        async with serving(tmp_path / "a") as first, serving(tmp_path / "b") as second:
            await completed(first, await submit(first))
            apart = await samples(first), await samples(second)
        async with serving(tmp_path / "a") as again:
            return *apart, await samples(again)

    first, second, again = run(use())
    accepted = ("restyle_requests_accepted_total",)
    assert (first[accepted], second[accepted], again[accepted]) == (1, 0, 0)
