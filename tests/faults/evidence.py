"""What the endpoint and the journal hold after a run, each by itself, and whether they agree.

The endpoint's side is its own database: each request that it accepted, durable before it was answered, is one that a
service would bill. Jobs are told apart there by what was asked for: prompt and seed, which no two rows share.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from batch.journal.states import State
from tests.acceptance.command import results


@dataclass(frozen=True)
class Evidence:
    """Counts, after everything was checked that has to hold whatever happens."""

    rows: int
    done: int
    failed: dict[str, int]
    """Failed rows by error type."""
    unknown: int
    accepted: int
    """Requests that the endpoint accepted."""
    succeeded: int
    """Requests that it carried out."""
    written_off: int
    """Carried out, and given up by us with a reason in the journal: a result that could not be had."""
    strangers: int
    """Requests that the endpoint accepted and the journal does not know."""
    paid_twice: int
    """Jobs with two requests that were carried out, neither of them written off."""


def examine(run: Path, server: Path) -> Evidence:
    """Read both sides; raises where a row that is done lacks its image or its request."""
    requests = _query(server / "server.db", "SELECT request_id, body, status FROM request")
    ((accepted,),) = _query(server / "server.db", "SELECT value FROM counter WHERE name = 'accepted'")
    jobs = _query(run / "journal.db", "SELECT key, state, request_id FROM jobs")
    failures = _query(run / "journal.db", "SELECT request_id FROM outcomes WHERE happening = 'fail'")
    ended = _query(run / "journal.db", "SELECT request_id FROM outcomes WHERE request_id IS NOT NULL")
    assert accepted == len(requests), "the endpoint's counter and its table"

    # What was given up in one command and collected in a later one is not given up.
    collected = {request_id for _, state, request_id in jobs if state == State.DONE}
    given_up = {request_id for (request_id,) in failures} - collected
    known = {request_id for _, _, request_id in jobs} | {request_id for (request_id,) in ended}
    succeeded = [(request_id, _asked(body)) for request_id, body, status in requests if status == 200]
    kept = Counter(asked for request_id, asked in succeeded if request_id not in given_up)

    rows = results(run).to_pylist()
    by_id = dict(succeeded)
    for row in rows:
        if row["status"] == "done":
            assert by_id[row["request_id"]] == (row["prompt"], row["seed"]), "the answer of another job"
            assert row["images"], f"{row['job_key']} is done and has no image"
        for image in row["images"] or () if row["status"] == "done" else ():
            if image["path"] is not None:
                assert hashlib.sha256((run / image["path"]).read_bytes()).hexdigest() == image["sha256"]
    done = sum(row["status"] == "done" for row in rows)
    assert sum(state == State.DONE for _, state, _ in jobs) == done, "the table and the journal"
    return Evidence(
        rows=len(rows),
        done=done,
        failed=dict(Counter(row["error_type"] for row in rows if row["status"] == "failed")),
        unknown=sum(row["status"] == "unknown" for row in rows),
        accepted=accepted,
        succeeded=len(succeeded),
        written_off=sum(request_id in given_up for request_id, _ in succeeded),
        strangers=sum(request_id not in known for request_id, _, _ in requests),
        paid_twice=sum(count > 1 for count in kept.values()),
    )


def what_matters(run: Path) -> dict[str, tuple]:
    """The results by job, without times, ids, URLs, attempts and money: equal for equal runs."""
    return {
        row["job_key"]: (
            row["status"],
            row["seed"],
            row["prompt"],
            row["image_url"],
            row["error_type"],
            [(image["sha256"], image["width"], image["height"]) for image in row["images"] or ()],
        )
        for row in results(run).to_pylist()
    }


def _asked(body: bytes) -> tuple[str, int]:
    given = json.loads(body)
    return given["prompt"], given["seed"]


def _query(path: Path, statement: str) -> list[tuple]:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()
