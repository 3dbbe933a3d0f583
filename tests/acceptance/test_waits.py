"""Every wait of the command ends: odd statuses, redirects, and what `restyle status` shows of open jobs."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from aiohttp import web

from batch.api import status_sync
from tests.acceptance.command import finish, restyle, results, started, summary, wait_for
from tests.faults import target as honest
from tests.faults.target import answer, output, raw, serving

KEY = "key-id:a-secret"


def manifest_of(folder: Path, prompts) -> Path:
    path = folder / "m.csv"
    rows = [f"https://images.example/{n}.jpg,{prompt}" for n, prompt in enumerate(prompts)]
    path.write_text("\n".join(["image_url,prompt", *rows]) + "\n")
    return path


def ran(folder: Path, target, prompts, *options):
    """Run the command; return its outcome, its rows by prompt, and its duration."""
    began = time.monotonic()
    command = ("run", manifest_of(folder, prompts), "-o", folder / "run", "--target", target.url, *options)
    ended = restyle(*command, env={"FAL_KEY": KEY})
    return ended, {row["prompt"]: row for row in results(folder / "run").to_pylist()}, time.monotonic() - began


def by_prompt(table, phase):
    """Return a handler with the table's response for the row's prompt, otherwise a good target's."""

    async def handle(target, request, asked):
        said = table.get(asked.body.get("prompt"))
        if said is None:
            return await honest.DEFAULTS[phase](target, request, asked)
        return said(target, request, asked) if callable(said) else answer(said)

    return handle


# --- case 7 -----------------------------------------------------------------------------------------------

WORDS = ["FAILED", "ERROR", "CANCELLED", "canceled", "Timeout", "timed out", "EXPIRED"]
NO_RESULT = {
    "404": lambda *_: answer({"detail": "Not found"}, 404),
    "in progress": lambda *_: answer({"detail": "Request is still in progress"}, 400),
    "page": lambda *_: raw(b"<html>", 500),
    "no output": lambda *_: answer({"error": "out of memory"}),
}


def test_final_words_that_fal_does_not_use_end_their_jobs(tmp_path):
    """The result is requested once and believed; otherwise the row fails with the word as its reason. No deadline."""
    own = {"own": lambda *_: answer({"detail": [{"loc": ["body"], "msg": "no", "type": "image_too_small"}]}, 422)}
    statuses = {word: {"status": word, "error": "the GPU fell off"} for word in WORDS}
    statuses |= {name: {"status": "FAILED"} for name in (*NO_RESULT, *own, "lies")}
    statuses |= {f"end {word}": {"status": word} for word in ("SUCCEEDED", "success", "completed", "OK")}
    no_result = dict.fromkeys(WORDS, NO_RESULT["404"]) | NO_RESULT | own
    with serving(status=by_prompt(statuses, "status"), result=by_prompt(no_result, "result")) as target:
        ended, rows, seconds = ran(tmp_path, target, statuses)
        reads = [path for method, path, _, _ in target.seen if method == "GET" and "/requests/" in path]
    assert ended.code == 3, ended.text
    assert seconds < 20
    for word in WORDS:
        row = rows[word]
        assert (row["status"], row["error_type"]) == ("failed", word.lower().replace(" ", "_"))
        assert row["error_message"] == f"status {word}: the GPU fell off (result: HTTP 404, Not found)"
    for name in NO_RESULT:
        assert (rows[name]["status"], rows[name]["error_type"]) == ("failed", "failed")
        assert rows[name]["error_message"].startswith("status FAILED (result: ")
    assert (rows["own"]["status"], rows["own"]["error_type"]) == ("failed", "image_too_small")
    done = {prompt for prompt, row in rows.items() if row["status"] == "done"}
    assert done == {"lies", "end SUCCEEDED", "end success", "end completed", "end OK"}
    for prompt, row in rows.items():  # each once, or twice if first requested without a status
        assert sum(row["request_id"] in path and "status" not in path for path in reads) <= 2, prompt
    assert summary(tmp_path / "run")["errors"]["failed"] == len(NO_RESULT) + 1


@pytest.mark.parametrize("word", ["FAILED", "Cancelled"])
def test_a_service_whose_status_always_says_failed_ends_the_command_quickly(tmp_path, word):
    """All jobs without a result: it takes seconds, and the same command requests nothing again."""
    gone = {str(n): NO_RESULT["404"] for n in range(30)}
    with serving(
        status=by_prompt({str(n): {"status": word} for n in range(30)}, "status"), result=by_prompt(gone, "result")
    ) as target:
        ended, rows, seconds = ran(tmp_path, target, gone)
        assert ended.code == 3, ended.text
        assert seconds < 15
        assert {row["error_type"] for row in rows.values()} == {word.lower()}
        reads = [path for method, path, _, _ in target.seen if method == "GET" and "/requests/" in path]
        assert len([path for path in reads if not path.endswith("/status")]) == 30
        posts = target.posts()
        assert ran(tmp_path, target, gone)[0].code == 3
        assert target.posts() == posts == 30


# --- redirects --------------------------------------------------------------------------------------------


def test_reads_are_redirected_inside_the_target_and_nowhere_else(tmp_path):
    """A moved status and result are found, with the key; another server is never contacted, and the message says so."""

    def moved(target, request, asked):
        return web.Response(status=307, headers={"location": f"{request.path}?moved=1"})

    def elsewhere(target, request, asked):
        return web.Response(status=302, headers={"location": f"{other.url}/x"})

    async def status(target, request, asked):
        if asked.body["prompt"] == "inside" and "moved" not in request.query:
            return moved(target, request, asked)
        return await by_prompt({"outside": elsewhere}, "status")(target, request, asked)

    async def result(target, request, asked):
        return moved(target, request, asked) if "moved" not in request.query else answer(output(target, asked))

    with serving() as other, serving(status=status, result=result) as target:
        ended, rows, _ = ran(tmp_path, target, ["inside", "outside"], "--deadline", "4s")
        assert other.seen == []
    assert ended.code == 4, ended.text
    assert {prompt: row["status"] for prompt, row in rows.items()} == {"inside": "done", "outside": "pending"}
    assert f"status: HTTP 302 redirects to {other.url}, which is not the target's own address" in ended.err
    assert any(path.endswith("/status?moved=1") for path in target.keys_shown())


# --- waits ------------------------------------------------------------------------------------------------


def test_status_says_what_open_jobs_wait_for(tmp_path):
    """By stage, with the oldest of each and the queue positions, from another process; nothing after the run."""
    said = {
        "first": {"status": "IN_QUEUE", "queue_position": 3},
        "second": {"status": "queued", "queue_position": 40},
        "third": {"status": "IN_QUEUE", "queue_position": 120},
        "odd": {"status": "IN_QUEUE", "queue_position": "soon"},
        "runs": {"status": "IN_PROGRESS"},
        "unknown": {"status": "BANANA"},
    }
    directory, note = tmp_path / "run", tmp_path / "run" / ".waits.json"
    command = ("run", manifest_of(tmp_path, said), "-o", directory)

    def all_are_read():
        jobs = json.loads(note.read_text()) if note.exists() else None
        return jobs is not None and jobs["unknown"]["jobs"] == jobs["in_progress"]["jobs"] == 1

    options = ("--log-format", "json", "--target")
    with (
        serving(status=by_prompt(said, "status")) as target,
        started(*command, *options, target.url, env={"RESTYLE_LIMITS__DRAIN": "0.2s"}) as process,
    ):
        wait_for(all_are_read, "a read of every status")
        shown, text = json.loads(restyle("status", directory, "--json").out), restyle("status", directory).out
        process.send_signal(signal.SIGTERM)
        ended = finish(process)
    assert ended.code == 4, ended.text
    (line,) = [line for line in map(json.loads, ended.err.splitlines()) if line["action"] == "stopping"]
    assert (line["waits"]["in_queue"]["jobs"], line["waits"]["unknown"]["jobs"]) == (4, 1)
    waits = shown["waits"]
    assert {name: waits[name]["jobs"] for name in ("in_queue", "in_progress", "unknown", "result", "downloading")} == {
        "in_queue": 4,
        "in_progress": 1,
        "unknown": 1,
        "result": 0,
        "downloading": 0,
    }
    assert waits["queue_positions"] == {"lowest": 3, "median": 40, "highest": 120}
    assert 0 < waits["in_queue"]["oldest_seconds"] < 60
    assert waits["result"]["oldest_seconds"] is None
    assert 0 <= waits["age_seconds"] < 60
    assert "waiting, as of " in text
    assert "  in queue             4 for up to" in text
    assert "queue positions 3 to 120, median 40" in text
    assert "  of unknown status    1 for up to" in text
    assert not note.exists()
    assert status_sync(directory).to_json()["waits"] is None
    note.write_text(json.dumps({"at": time.time(), **waits}))  # as left by a killed run
    assert status_sync(directory).to_json()["waits"] is None
