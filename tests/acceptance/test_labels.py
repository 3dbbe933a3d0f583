"""Headers of a submit, and the treatment of repeated keys: the real command, over real HTTP."""

from __future__ import annotations

import json
import sqlite3
import urllib.request
from contextlib import closing

import pytest

from tests.acceptance.command import accepted, jobs_in, log, restyle, results, write_manifest
from tests.acceptance.endpoint import endpoint
from tests.faults import target as honest
from tests.faults.target import Lost, answer, serving

ROWS = 9
KEY = "key-id:a-long-secret"


def submits(target) -> list[dict[str, str]]:
    """Return the headers of the received POSTs."""
    return [headers for method, path, headers, _ in target.seen if method == "POST" and path == f"/{honest.APP}"]


def command(tmp_path, target, config="", name="run"):
    """Write manifest and config; return the command for a target."""
    (tmp_path / "config.toml").write_text(f'[target]\nname = "{target.url}"\n{config}')
    manifest = write_manifest(tmp_path / "rows.csv", range(ROWS))
    return "run", manifest, "-o", tmp_path / name, "-c", tmp_path / "config.toml"


def health(**facts):
    async def said(target, request, asked):
        return answer(facts)

    return said


async def loses_every_third(target, request, asked):
    if len(target.requests) % 3 == 0:
        raise Lost
    return await honest.submit(target, request, asked)


def rejecting(status):
    """Loses every third response, and answers a repeated key with a status; a repeat creates no request."""
    keys: set[str] = set()

    async def submit(target, request, asked):
        key = request.headers["idempotency-key"]
        if key in keys:
            del target.requests[asked.id]
            return answer({"detail": "duplicate"}, status)
        keys.add(key)
        return await loses_every_third(target, request, asked)

    return submit


# --- headers ----------------------------------------------------------------------------------------------


def test_every_submit_is_labelled_with_its_run_and_its_job(tmp_path):
    """Default: the run directory's name and the job's key, normal priority, no deadline, no lifetime."""
    with serving() as target:
        ended = restyle(*command(tmp_path, target, name="läufe, 1"))
        assert ended.code == 0, ended.text
    keys = {row["job_key"] for row in results(tmp_path / "läufe, 1").to_pylist()}
    assert {headers["x-fal-tags"] for headers in submits(target)} == {f"run=l-ufe- 1,job={key}" for key in keys}
    assert {headers["x-fal-queue-priority"] for headers in submits(target)} == {"normal"}
    assert not any("timeout" in name or "lifecycle" in name for headers in submits(target) for name in headers)


def test_a_submit_carries_what_the_settings_ask_for(tmp_path):
    """Both names of the start timeout, priority, lifetime, custom tags; reads have none of them."""
    config = """idempotency = "none"
priority = "low"
keep_files = "30d"
tags = {team = "design", job = ""}
[limits]
start_timeout = "90s"
"""
    with serving() as target:
        ended = restyle(*command(tmp_path, target, config))
        assert ended.code == 0, ended.text
    for headers in submits(target):
        assert headers["x-fal-request-timeout"] == headers["x-fal-request-start-timeout"] == "90"
        assert headers["x-fal-queue-priority"] == "low"
        assert json.loads(headers["x-fal-object-lifecycle-preference"]) == {"expiration_duration_seconds": 30 * 86400}
        assert headers["x-fal-tags"] == "run=run,team=design"
    others = [headers for method, _, headers, _ in target.seen if method == "GET"]
    assert others
    assert not any("x-fal-tags" in headers or "x-fal-request-timeout" in headers for headers in others)


def test_a_tag_that_holds_the_api_key_is_refused(tmp_path):
    """It would appear on bills. Nothing is sent, and the key is not in the message."""
    with serving() as target:
        ended = restyle(*command(tmp_path, target, 'tags = {who = "a-long-secret"}'), env={"FAL_KEY": KEY})
        assert not submits(target)
    assert ended.code == 2, ended.text
    assert "the tag 'who' contains FAL_KEY" in ended.text
    assert "a-long-secret" not in ended.text


def test_our_own_server_bills_by_run_and_job(tmp_path):
    """Its billing events with tags identify the run and the job of each dollar."""
    manifest = write_manifest(tmp_path / "rows.csv", range(3))
    with endpoint(tmp_path, "--engine", "echo", "--price", 0.03) as server:
        key = {"FAL_KEY": server.key, "RESTYLE_TARGET__TAGS": '{"team": "design"}'}
        ended = restyle("run", manifest, "-o", tmp_path / "quick", "--target", server.url, env=key)
        assert ended.code == 0, ended.text
        asked = urllib.request.Request(f"{server.url}/v1/models/billing-events?source=tagged-billed&tag=run=quick")
        asked.add_header("authorization", f"Key {server.key}")
        with urllib.request.urlopen(asked) as reply:
            events = json.load(reply)["billing_events"]
    keys = {row["request_id"]: row["job_key"] for row in results(tmp_path / "quick").to_pylist()}
    assert {event["request_id"]: event["tags"] for event in events} == {
        request_id: {"run": "quick", "team": "design", "job": job} for request_id, job in keys.items()
    }


# --- a repeated key ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [409, 422])
def test_a_target_that_rejects_repeats_has_accepted_the_first(tmp_path, status):
    """Every third response lost: the repeat is rejected, the request is found in the listing, nothing is paid twice."""
    with serving(submit=rejecting(status)) as target:
        ended = restyle(*command(tmp_path, target, 'idempotency = "reject"'))
        assert ended.code == 0, ended.text
        assert len(target.requests) == ROWS
        assert target.posts() == ROWS + ROWS // 3
    assert jobs_in(tmp_path / "run", "done") == ROWS
    rows = results(tmp_path / "run").to_pylist()
    assert {row["attempts"] for row in rows} == {1}
    assert len({row["request_id"] for row in rows}) == ROWS
    assert {line["finding"] for line in log(tmp_path / "run") if line["action"] == "reconciled"} == {"adopted"}


def test_a_server_that_says_that_it_ignores_keys_is_not_sent_repeats(tmp_path):
    """`idempotency = "replay"` contradicts the server: exit 2 before any submit."""
    with serving(health=health(honours_idempotency_key=False)) as target:
        ended = restyle(*command(tmp_path, target, 'idempotency = "replay"'))
        assert not submits(target)
    assert ended.code == 2, ended.text
    assert "target.idempotency = 'replay', but" in ended.text


@pytest.mark.parametrize(("idempotency", "posts"), [("auto", ROWS), ("none", ROWS), ("replay", ROWS + 4)])
def test_a_lost_answer_is_repeated_where_the_profile_says_so(tmp_path, idempotency, posts):
    """A server that does not mention keys counts as ignoring them, unless the user overrides it."""
    keys: dict[str, str] = {}

    async def replays(target, request, asked):
        first = keys.setdefault(request.headers["idempotency-key"], asked.id)
        if first != asked.id and idempotency == "replay":
            del target.requests[asked.id]
            return await honest.submit(target, request, target.requests[first])
        if len(target.requests) in {2, 4, 6, 8}:
            raise Lost
        return await honest.submit(target, request, asked)

    with serving(submit=replays) as target:
        ended = restyle(*command(tmp_path, target, f'idempotency = "{idempotency}"'))
        assert ended.code == 0, ended.text
        assert (len(target.requests), target.posts()) == (ROWS, posts)


@pytest.mark.parametrize("says", [True, False])
def test_a_start_timeout_is_relied_on_only_where_the_target_honours_it(tmp_path, says):
    """Another server may ignore the header: then absence from its listing proves nothing."""
    config = 'idempotency = "none"\n[limits]\nstart_timeout = "90s"'

    async def loses(target, request, asked):
        raise Lost

    async def lists_nothing(target, request, asked):
        return answer({"items": [], "has_more": False, "next_cursor": None})

    facts = {"honours_start_timeout": True} if says else {}
    with serving(submit=loses, listing=lists_nothing, health=health(**facts)) as target:
        assert restyle(*command(tmp_path, target, config)).code == 4
        assert len(submits(target)) == ROWS
        assert {headers["x-fal-request-timeout"] for headers in submits(target)} == {"90"}
    with closing(sqlite3.connect(tmp_path / "run" / "journal.db")) as journal:
        noted = journal.execute("SELECT seconds FROM start_timeouts").fetchall()
    assert noted == ([(90.0,)] * ROWS if says else [])


def test_an_embedded_endpoint_that_ignores_keys_is_asked_so(tmp_path):
    """A faults file may disable keys: then lost responses are looked up, not repeated."""
    faults = tmp_path / "faults.toml"
    faults.write_text('idempotency = false\n[[fault]]\nat = "submit"\ndo = "drop-after-accept"\nevery = 3\n')
    manifest = write_manifest(tmp_path / "rows.csv", range(ROWS))
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--engine", "echo", "--faults", faults)
    assert ended.code == 0, ended.text
    assert accepted(tmp_path / "run") == ROWS
    assert sum(line["action"] == "reconciled" for line in log(tmp_path / "run")) == ROWS // 3
