"""Contents of the endpoint and of the journal after a run, and checks that they agree.

The endpoint's side is its own database: a service would bill each request that it has accepted, which is durable before
the response. A job is identified there by prompt and seed, which are unique per row.
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
    """Counts, after all invariants were checked."""

    rows: int
    done: int
    failed: dict[str, int]
    """Number of failed rows by error type."""
    unknown: int
    accepted: int
    """Requests that the endpoint accepted."""
    succeeded: int
    """Requests that the endpoint executed successfully."""
    written_off: int
    """Executed, but recorded as failed in the journal because the result was not available."""
    foreign: int
    """Requests that the endpoint accepted and that are not in the journal."""
    paid_twice: int
    """Jobs with two executed requests, neither of them written off."""


def examine(run: Path, server: Path) -> Evidence:
    """Read both sides. Raises if a finished row lacks its image or its request."""
    requests = _query(server / "server.db", "SELECT request_id, body, status FROM request")
    ((accepted,),) = _query(server / "server.db", "SELECT value FROM counter WHERE name = 'accepted'")
    jobs = _query(run / "journal.db", "SELECT key, state, request_id FROM jobs")
    failures = _query(run / "journal.db", "SELECT request_id FROM outcomes WHERE happening = 'fail'")
    ended = _query(run / "journal.db", "SELECT request_id FROM outcomes WHERE request_id IS NOT NULL")
    assert accepted == len(requests), "the endpoint's counter and its table differ"

    # A request that one command gave up and a later one collected does not count as given up.
    collected = {request_id for _, state, request_id in jobs if state == State.DONE}
    given_up = {request_id for (request_id,) in failures} - collected
    known = {request_id for _, _, request_id in jobs} | {request_id for (request_id,) in ended}
    succeeded = [(request_id, _asked(body)) for request_id, body, status in requests if status == 200]
    kept = Counter(asked for request_id, asked in succeeded if request_id not in given_up)

    rows = results(run).to_pylist()
    by_id = dict(succeeded)
    for row in rows:
        if row["status"] == "done":
            assert by_id[row["request_id"]] == (row["prompt"], row["seed"]), "the result belongs to another job"
            assert row["images"], f"{row['job_key']} is done and has no image"
        for image in row["images"] or () if row["status"] == "done" else ():
            if image["path"] is not None:
                assert hashlib.sha256((run / image["path"]).read_bytes()).hexdigest() == image["sha256"]
    done = sum(row["status"] == "done" for row in rows)
    assert sum(state == State.DONE for _, state, _ in jobs) == done, "the table and the journal differ"
    return Evidence(
        rows=len(rows),
        done=done,
        failed=dict(Counter(row["error_type"] for row in rows if row["status"] == "failed")),
        unknown=sum(row["status"] == "unknown" for row in rows),
        accepted=accepted,
        succeeded=len(succeeded),
        written_off=sum(request_id in given_up for request_id, _ in succeeded),
        foreign=sum(request_id not in known for request_id, _, _ in requests),
        paid_twice=sum(count > 1 for count in kept.values()),
    )


def what_matters(run: Path) -> dict[str, tuple]:
    """Return the results by job without times, ids, URLs, attempts and money: identical for identical runs."""
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
