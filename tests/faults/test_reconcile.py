"""Lost responses over real HTTP: the command, a target without idempotency keys, and its listing."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.acceptance.command import jobs_in, log, restyle, results, started, summary, wait_for, write_manifest
from tests.faults import target as honest
from tests.faults.target import Lost, answer, listed, serving

CONFIG = """
[target]
name = "{url}"
[price]
usd_per_megapixel = 0.03
[limits]
max_in_flight = 8
"""
ROWS = 30


async def loses_every_third(target, request, asked):
    if len(target.requests) % 3 == 0:
        raise Lost
    return await honest.submit(target, request, asked)


async def lists_nothing(target, request, asked):
    return answer({"items": [], "has_more": False, "next_cursor": None})


async def has_no_listing(target, request, asked):
    return answer({"detail": "Not found"}, 404)


async def hides_one_input(target, request, asked):
    items = [listed(one) for one in target.requests.values()]
    items[2]["json_input"] = None  # the first lost submit
    return answer({"items": items, "has_more": False, "next_cursor": None})


async def lists_everything_twice(target, request, asked):
    items = [listed(one) for one in target.requests.values()]
    duplicates = [item | {"request_id": f"duplicate-{number}"} for number, item in enumerate(items)]
    return answer({"items": items + duplicates, "has_more": False, "next_cursor": None})


async def invents_an_id(target, request, asked):
    items = [listed(one) | {"request_id": "../../v1/admin"} for one in target.requests.values()]
    return answer({"items": items, "has_more": False, "next_cursor": None})


def begin(tmp_path, target):
    """Write manifest and config; return the command, which the tests repeat."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(url=target.url))
    manifest, directory = write_manifest(tmp_path / "rows.csv", range(ROWS)), tmp_path / "run"
    return directory, ("run", manifest, "-o", directory, "-c", config)


def all_done(directory):
    rows = results(directory).to_pylist()
    assert [row["status"] for row in rows] == ["done"] * ROWS
    assert len({row["request_id"] for row in rows}) == ROWS
    return True


def test_lost_answers_are_found_before_the_run_ends(tmp_path):
    """A third of all responses lost: one POST per job, every result collected, exit 0."""
    with serving(submit=loses_every_third) as target:
        directory, command = begin(tmp_path, target)
        ended = restyle(*command)
    assert ended.code == 0, ended.text
    assert target.posts() == ROWS
    assert all_done(directory)
    assert sum(line["action"] == "reconciled" for line in log(directory)) == ROWS // 3


def test_what_is_held_is_counted_and_priced_and_reconcile_settles_it(tmp_path):
    """The listing lags: exit 4 with number and cost; `restyle reconcile` finds them and submits nothing."""
    with serving(submit=loses_every_third, listing=lists_nothing) as target:
        directory, command = begin(tmp_path, target)
        ended = restyle(*command)
        assert ended.code == 4, ended.text
        assert "10 submits of unknown outcome, not repeated" in ended.out
        assert "$0.90 at most" in ended.out, "ten images of unknown size: three megapixels each"
        assert f"restyle reconcile {directory}" in ended.out
        assert summary(directory)["unknown"] == 10
        again = restyle("reconcile", directory)
        assert (again.code, target.posts()) == (4, ROWS), again.text

        del target.handlers["listing"]
        settled = restyle("reconcile", directory)
        assert settled.code == 0, settled.text
        assert (target.posts(), jobs_in(directory, "done")) == (ROWS, ROWS)
        assert all_done(directory)
        assert restyle(*command).code == 0
        assert target.posts() == ROWS
    assert summary(directory)["reserved_usd"] == 0


@pytest.mark.parametrize(
    ("listing", "finding"),
    [
        (has_no_listing, "refused"),
        (hides_one_input, "hidden"),
        (lists_everything_twice, "ambiguous"),
        (invents_an_id, "unreadable"),
    ],
)
def test_where_there_is_doubt_nothing_is_adopted_and_nothing_sent_again(tmp_path, listing, finding):
    """No listing, a hidden input, two matches, an id that is a path: held, exit 4, and one POST per job."""
    with serving(submit=loses_every_third, listing=listing) as target:
        directory, command = begin(tmp_path, target)
        assert restyle(*command).code == 4
        assert {line["finding"] for line in log(directory) if line["action"] == "reconciled"} == {finding}
        assert jobs_in(directory, "unknown") == 10
        assert not any("admin" in path for _, path, _, _ in target.seen)
        del target.handlers["listing"]
        assert restyle(*command).code == 0
    assert target.posts() == ROWS
    assert all_done(directory)


def test_a_run_killed_before_its_answers_came_finds_what_it_asked_for(tmp_path):
    """Kill -9 while eight POSTs wait for their responses: the next run adopts all eight."""

    async def hangs(target, request, asked):
        await asyncio.sleep(60)

    with serving(submit=hangs) as target:
        directory, command = begin(tmp_path, target)
        with started(*command) as process:
            wait_for(lambda: len(target.requests) == 8, "eight accepted submits")
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        del target.handlers["submit"]
        ended = restyle(*command)
    assert ended.code == 0, ended.text
    assert target.posts() == ROWS
    assert all_done(directory)


def test_what_is_absent_is_sent_again_where_the_policy_says_so(tmp_path):
    """`on_unknown = "resubmit-after=1s"`: the job is not in the listing, so one new attempt is submitted."""

    async def swallows_every_third(target, request, asked):
        if target.posts() % 3 == 0 and target.posts() <= ROWS:
            del target.requests[asked.id]
            raise Lost
        return await honest.submit(target, request, asked)

    with serving(submit=swallows_every_third) as target:
        directory, command = begin(tmp_path, target)
        config = command[-1]
        config.write_text(config.read_text() + 'on_unknown = "resubmit-after=0.1s"\n')
        assert restyle(*command).code == 4
        assert target.posts() == ROWS
        assert restyle("reconcile", directory).code == 4
        assert target.posts() == ROWS, "reconciling submits nothing, whatever the policy"
        ended = restyle(*command)
    assert ended.code == 0, ended.text
    assert target.posts() == ROWS + 10
    assert all_done(directory)
