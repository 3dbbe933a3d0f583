"""`restyle audit`: a clean run adds up; each kind of mismatch is found, named and counted."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from batch.api import audit, audit_sync, run_sync
from batch.directory import RunDirectory
from batch.errors import RunDirectoryError, RunLocked
from batch.fal.platform import Charge, billing_reply, platform_error_reply
from batch.journal.database import JournalDatabase
from batch.results.schema import IMAGE, OWN_SCHEMA

JOBS = 12
FAILED_ATTEMPTS = 3
PRICE = 0.03
FAULTS = f"""
[[fault]]
at = "execute"
do = "fail"
status = 503
retryable = true
first = {FAILED_ATTEMPTS}
"""


@pytest.fixture
def anyio_backend():
    """Aiohttp lives on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Twelve jobs, three of which needed a second request; with a price, so that money is counted."""
    folder = tmp_path_factory.mktemp("audited")
    rows = [f"https://images.example/{n}.jpg,image {n} as a watercolor" for n in range(JOBS)]
    (folder / "m.csv").write_text("\n".join(["image_url,prompt", *rows]) + "\n")
    (folder / "faults.toml").write_text(FAULTS)
    target = {"engine": "echo", "faults": str(folder / "faults.toml")}
    summary = run_sync(
        folder / "m.csv", folder / "run", settings={"target": target, "price": {"usd_per_megapixel": PRICE}}
    )
    assert (summary.exit_code, summary.done) == (0, JOBS)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("endpoint"))


def damage(run: Path, *statements: str) -> None:
    connection = sqlite3.connect(run / "journal.db", isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def rows_of(run: Path, statement: str) -> list[tuple]:
    connection = sqlite3.connect(run / "journal.db")
    found = connection.execute(statement).fetchall()
    connection.close()
    return found


def found_in(books) -> dict[str, int]:
    """Mismatches by check."""
    return {check.name: check.wrong for check in books.checks if check.wrong}


def images(run: Path) -> list[Path]:
    return sorted(path for path in (run / "images").rglob("*") if path.is_file())


# --- a clean run ------------------------------------------------------------------------------------------


def test_a_clean_run_adds_up_with_the_requests_of_earlier_attempts(finished):
    """Fifteen requests were accepted for twelve jobs; the three without a result are counted too."""
    books = audit_sync(finished)
    assert books.add_up
    assert found_in(books) == {}
    assert books.counts | {"spent_usd": 0.0} == {
        "jobs": 12, "accepted": 15, "collected": 12, "ended_without_result": 3, "open": 0, "unknown": 0,
        "spent_usd": 0.0, "reserved_usd": 0.0, "sessions": 1,
    }  # fmt: skip
    spent = sum(cost for (cost,) in rows_of(finished, "SELECT cost_usd FROM jobs"))
    assert books.counts["spent_usd"] == pytest.approx(spent, abs=1e-6)
    assert spent > 0
    sums = {check.name: check.sum for check in books.checks}
    assert sums["submits"] == "15 accepted = 12 collected + 3 ended without a result + 0 open"
    assert sums["images"].startswith("12 files verified")
    assert sums["results"] == "12 rows of results.parquet"
    (charges,) = (check for check in books.checks if check.name == "charges")
    assert (charges.compared, charges.verdict) == (False, "not compared")


def test_nothing_of_the_run_is_written(run):
    """All files keep their content, and no file is added except SQLite's own."""

    def contents():
        files = (path for path in run.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = contents()
    audit_sync(run)
    assert contents() == before


def test_a_run_that_works_is_not_audited(run):
    """The numbers of a running run change: the command refuses with exit code 5."""
    with RunDirectory(run).locked("now"), pytest.raises(RunLocked, match="audit it after the run has ended"):
        audit_sync(run)


def test_a_folder_without_a_run_says_how_to_start_one(tmp_path):
    """Like every command that needs a run."""
    with pytest.raises(RunDirectoryError, match="there is no run"):
        audit_sync(tmp_path)


def test_files_that_no_job_refers_to_are_told_and_are_no_error(run):
    """Left by a killed run, or foreign; also names that are not valid UTF-8."""
    (run / "images" / "ab").mkdir(exist_ok=True)
    (run / "images" / "ab" / "stray.jpg").write_bytes(b"x")
    (run / "images" / ".part").mkdir(exist_ok=True)
    (run / "images" / ".part" / "tmp1").write_bytes(b"x")
    Path(str(run / "images").encode().decode(), "b\udcffd.jpg").write_bytes(b"x")
    books = audit_sync(run)
    assert books.add_up
    (remark,) = books.remarks
    assert remark.count == 3
    assert "images/ab/stray.jpg" in remark.examples
    assert "images/.part/tmp1" in remark.examples
    assert "also: 3 files in images/ belong to no finished job" in books.render()


def test_jobs_whose_rows_have_left_the_manifest_are_told_and_are_no_error(run):
    """Their jobs stay in the journal and were paid for."""
    path = run / "results.parquet"
    pq.write_table(pq.read_table(path).slice(0, 10), path)
    books = audit_sync(run)
    assert books.add_up
    assert [(remark.count, len(remark.examples)) for remark in books.remarks] == [(2, 2)]


# --- what does not add up ---------------------------------------------------------------------------------

ONE = "WHERE id = (SELECT min(id) FROM jobs)"
TWO = "WHERE id = (SELECT min(id) + 1 FROM jobs)"
OPEN = "SET state = 'accepted', answer_id = NULL, end_id = NULL, reserved_usd = 0.03"
FIRST_ANSWER = "WHERE id = (SELECT min(id) FROM outcomes WHERE happening = 'answer')"

CONTRADICTIONS = {
    "open": (f"UPDATE jobs {OPEN} {ONE}", {"submits": 1, "results": 1}),
    "unknown": (f"UPDATE jobs SET state = 'unknown' {ONE}", {"unknown": 1, "submits": 1, "results": 1}),
    "intended": (f"UPDATE jobs SET state = 'intended' {ONE}", {"unknown": 1, "submits": 1, "results": 1}),
    "shared request": (
        f"UPDATE jobs SET request_id = (SELECT request_id FROM jobs {ONE}) {TWO}",
        {"submits": 1, "results": 1},
    ),
    "no answer": (f"UPDATE outcomes SET output = NULL {FIRST_ANSWER}", {"answers": 1}),
    "no end": (f"UPDATE jobs SET end_id = NULL {ONE}", {"answers": 1, "results": 1}),
    "no image": (
        f"UPDATE outcomes SET images = CAST('[]' AS BLOB) WHERE id = (SELECT end_id FROM jobs {ONE})",
        {"answers": 1, "results": 1},
    ),
    "sessions": ("UPDATE sessions SET spent_usd = spent_usd + 0.01", {"money": 1}),
    "free": (f"UPDATE jobs SET cost_usd = 0 {ONE}", {"money": 2, "results": 1}),
    "reserved": (f"UPDATE jobs SET reserved_usd = 0.03 {ONE}", {"reservations": 1}),
    "foreign": (f"DELETE FROM jobs {ONE}", {"money": 1, "results": 1}),
}
"""A statement that damages a good journal, and the checks that find it."""


@pytest.mark.parametrize("harm", CONTRADICTIONS)
def test_a_journal_that_contradicts_itself_or_the_results_is_found(run, harm):
    """Exactly the checks meant for it find each kind of damage."""
    statement, found = CONTRADICTIONS[harm]
    damage(run, statement)
    books = audit_sync(run)
    assert not books.add_up
    assert found_in(books) == found


def test_images_are_read_again_and_each_fault_has_its_name(run):
    """One file missing, one truncated, one with a flipped bit; the rest is verified."""
    gone, shorter, other = images(run)[:3]
    gone.unlink()
    shorter.write_bytes(shorter.read_bytes()[:-5])
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    books = audit_sync(run)
    (check,) = (check for check in books.checks if check.name == "images")
    assert found_in(books) == {"images": 3}
    missing, damaged = check.mismatches
    assert (missing.count, damaged.count) == (1, 2)
    assert gone.relative_to(run).as_posix() in missing.examples[0]
    assert {example.split(" of job ")[0] for example in damaged.examples} == {
        path.relative_to(run).as_posix() for path in (shorter, other)
    }
    assert check.sum.startswith("9 files verified")


def test_at_most_ten_examples_are_shown_and_all_are_counted(run):
    """Twelve missing images: a count of twelve, ten examples, and "2 more"."""
    shutil.rmtree(run / "images")
    books = audit_sync(run)
    (check,) = (check for check in books.checks if check.name == "images")
    assert (check.wrong, len(check.mismatches[0].examples)) == (12, 10)
    assert "  and 2 more" in books.render()


@pytest.mark.parametrize("harm", ["missing", "no parquet", "another table", "behind"])
def test_results_that_are_not_those_of_the_journal_are_found(run, harm):
    """The advice is `restyle export`, which is free."""
    path = run / "results.parquet"
    match harm:
        case "missing":
            path.unlink()
        case "no parquet":
            path.write_text("not a table")
        case "another table":
            pq.write_table(pa.table({"a": [1]}), path)
        case _:
            table = pq.read_table(path)
            column = table.schema.get_field_index("status")
            pq.write_table(table.set_column(column, "status", pa.array(["pending"] * JOBS)), path)
    books = audit_sync(run)
    assert found_in(books) == {"results": JOBS if harm == "behind" else 1}
    assert "`restyle export` rebuilds it" in books.render()


def test_the_command_prints_a_table_or_json_and_exits_with_three(run, finished):
    """Exit code 0 if everything adds up, otherwise 3; both formats show the same facts."""

    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "batch", "audit", *map(str, words)], capture_output=True, text=True, timeout=60
        )

    good = command(finished)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[0] == f"{finished}, target local"
    assert "submits       adds up          15 accepted = 12 collected" in good.stdout
    images(run)[0].unlink()
    bad = command(run, "--json")
    said = json.loads(bad.stdout)
    assert (bad.returncode, said["adds_up"], said["counts"]["accepted"]) == (3, False, 15)
    wrong = {check["name"]: check for check in said["checks"] if check["adds_up"] is False}
    assert list(wrong) == ["images"]
    assert wrong["images"]["mismatches"][0]["count"] == 1
    assert [check["name"] for check in said["checks"] if check["adds_up"] is None] == ["charges"]
    text = command(run)
    assert text.returncode == 3
    assert "images        does not add up" in text.stdout


# --- bills ------------------------------------------------------------------------------------------------


class Biller:
    """A platform API that sends these charges, or an error."""

    def __init__(self, charges, *, status=200, body=None, page=10_000, circular=False):
        self.charges, self.status, self.body, self.page, self.circular = charges, status, body, page, circular
        self.asked: list[dict[str, str]] = []
        self.keys: list[str | None] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.query))
        self.keys.append(request.headers.get("authorization"))
        if self.body is not None or self.status != 200:
            reply = platform_error_reply(self.status, "authorization_error", "no")
            return web.Response(status=self.status, body=self.body or reply.body)
        start = int(request.query.get("cursor", "0"))
        following = start + self.page
        more = self.circular or following < len(self.charges)
        cursor = ("0" if self.circular else str(following)) if more else None
        return web.Response(body=billing_reply(self.charges[start:following], cursor).body)


@asynccontextmanager
async def billed_by(run: Path, biller: Biller):
    """Point the run's configuration to this biller."""
    app = web.Application()
    app.router.add_get("/v1/models/billing-events", biller.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        point_to(run, f"http://127.0.0.1:{runner.addresses[0][1]}")
        yield
    finally:
        await runner.cleanup()


def point_to(run: Path, target: str) -> None:
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["target"] |= {"name": target, "faults": None}
    (run / "run.json").write_text(json.dumps(facts))


def true_charges(run: Path) -> list[Charge]:
    """Return the charges of an honest service: one per request with units in the journal, at its price."""
    found = rows_of(run, "SELECT request_id, at, billable_units FROM outcomes WHERE billable_units > 0 ORDER BY id")
    return [Charge(request, "app", at, units, PRICE) for request, at, units in found]


async def charges_of(run: Path, biller: Biller):
    async with billed_by(run, biller):
        books = await audit(run)
    (check,) = (check for check in books.checks if check.name == "charges")
    return books, check


@pytest.mark.anyio
@pytest.mark.parametrize("page", [10_000, 5])
async def test_honest_bills_add_up_page_by_page(run, page):
    """Every charge belongs to a request and none is missing; the query covers the run and names the app."""
    biller = Biller(true_charges(run), page=page)
    books, check = await charges_of(run, biller)
    assert (books.add_up, check.compared, check.wrong) == (True, True, 0)
    assert books.counts["charged"] == JOBS
    assert books.counts["charged_usd"] == pytest.approx(books.counts["spent_usd"], abs=1e-6)
    assert len(biller.asked) == (1 if page > JOBS else 3)
    assert biller.asked[0]["endpoint_id"] == "fal-ai/flux/dev/image-to-image"
    assert biller.asked[0]["start"] < biller.asked[0]["end"]
    assert biller.keys == [None] * len(biller.asked)


@pytest.mark.anyio
async def test_a_page_that_shifts_shows_a_charge_again_and_that_is_no_second_charge(run):
    """A charge with the same instant, units and request is the same event."""
    true = true_charges(run)
    books, check = await charges_of(run, Biller([*true[:6], *true[4:]]))
    assert books.add_up
    assert check.sum.startswith("12 requests charged")


@pytest.mark.anyio
async def test_each_kind_of_wrong_bill_is_found(run):
    """Charged twice, charged more than counted, and not charged although the result reported units."""
    first, second, third, *rest = true_charges(run)
    twice = Charge(first.request_id, first.app, first.at + 60, first.units, PRICE)
    dear = Charge(second.request_id, second.app, second.at, second.units, PRICE * 2)
    damage(run, "UPDATE outcomes SET at = at - 7200")
    books, check = await charges_of(run, Biller([first, twice, dear, *rest]))
    assert [mismatch.count for mismatch in check.mismatches] == [1, 1, 1]
    assert first.request_id in check.mismatches[0].examples[0]
    assert second.request_id in check.mismatches[1].examples[0]
    assert third.request_id in check.mismatches[2].examples[0]
    assert found_in(books) == {"charges": 3}


@pytest.mark.anyio
async def test_a_bill_that_is_not_there_yet_is_no_mismatch_within_the_hour(run):
    """Bills may lag; the sums are shown."""
    books, check = await charges_of(run, Biller(true_charges(run)[:5]))
    assert books.add_up
    assert check.sum.startswith("5 requests charged")


@pytest.mark.anyio
async def test_less_than_was_counted_is_a_discount(run):
    """Less money than counted is not a mismatch."""
    cheap = [Charge(one.request_id, one.app, one.at, one.units, PRICE / 2) for one in true_charges(run)]
    books, _ = await charges_of(run, Biller(cheap))
    assert books.add_up
    assert books.counts["charged_usd"] < books.counts["spent_usd"]


@pytest.mark.anyio
async def test_charges_of_other_runs_are_told_and_are_no_error(run):
    """An account has many runs; a submit of unknown outcome may be among them."""
    others = [Charge(f"other-{n}", "app", 1.0, 1.0, PRICE) for n in range(3)]
    books, _ = await charges_of(run, Biller([*true_charges(run), *others]))
    assert books.add_up
    (remark,) = books.remarks
    assert remark.count == 3
    assert "$0.09" in remark.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("biller", "why"),
    [
        (Biller([], status=401), "this key may not read billing events (HTTP 401)"),
        (Biller([], status=403), "this key may not read billing events (HTTP 403)"),
        (Biller([], status=404), "has no billing events (HTTP 404)"),
        (Biller([], status=503), "could not read billing events (HTTP 503)"),
        (Biller([], body=b"<html>"), "could not read billing events (not JSON"),
        (Biller([], body=b'{"billing_events": [{"request_id": "a"}], "has_more": false}'), "lacks its time"),
        (Biller([], circular=True), "cursor of a page repeats"),
    ],
    ids=["401", "403", "404", "503", "html", "no cost", "circles"],
)
async def test_bills_that_cannot_be_had_are_not_compared_and_no_error(run, biller, why):
    """The rest is audited, and the line says why the bills are missing."""
    books, check = await charges_of(run, biller)
    assert (books.add_up, check.compared) == (True, False)
    assert why in check.sum
    assert "charged" not in books.counts
    if biller.status in {401, 403, 404}:
        assert len(biller.asked) == 1, "another read would say the same"


@pytest.mark.anyio
async def test_a_target_that_is_away_is_not_compared(run):
    """The port is closed: a connect error, not an exception."""
    point_to(run, "http://127.0.0.1:1")
    books = await audit(run)
    assert books.add_up
    assert "could not read billing events (connect" in books.checks[-1].sum


@pytest.mark.anyio
async def test_fal_without_a_key_is_not_compared(run):
    """Nothing is sent, and the line says how to set the key."""
    point_to(run, "fal")
    books = await audit(run)
    assert books.checks[-1].sum == "FAL_KEY is not set; export FAL_KEY=key_id:key_secret"


@pytest.mark.anyio
async def test_the_key_goes_to_the_target(run, monkeypatch):
    """Bills belong to an account, which the key identifies."""
    monkeypatch.setenv("FAL_KEY", "id:secret")
    biller = Biller(true_charges(run))
    await charges_of(run, biller)
    assert biller.keys == ["Key id:secret"]


# --- size -------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from batch.api import audit_sync
books = audit_sync(sys.argv[1])
assert books.add_up, books.render()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def large(finished: Path, folder: Path, jobs: int) -> Path:
    """Return a run of `jobs` finished jobs without downloads, written without the runner."""
    folder.mkdir()
    shutil.copy(finished / "run.json", folder)
    JournalDatabase.open(folder / "journal.db", now=1.0, version="test").close(now=2.0)
    image = '[["https://files.example/x.jpg", 8, 8, "image/jpeg", null, null, null, null]]'
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {jobs})"
    one, request = "job_id, session, attempt, at, request_id", "printf('r-%030x', i)"
    output = '{"images": [{"url": "u"}]}'
    damage(
        folder,
        "INSERT INTO jobs (id, key, state, session, attempt, request_id, reserved_usd, cost_usd, answer_id, end_id)"
        f" {numbers} SELECT i, printf('%032x', i), 'done', 1, 1, {request}, 0.0, 0.03, i * 2 - 1, i * 2 FROM n",
        f"INSERT INTO outcomes (id, happening, {one}, output, billable_units, cost_usd) {numbers}"
        f" SELECT i * 2 - 1, 'answer', i, 1, 1, 1.0, {request}, CAST('{output}' AS BLOB), 1.0, 0.03 FROM n",
        f"INSERT INTO outcomes (id, happening, {one}, images) {numbers}"
        f" SELECT i * 2, 'finish', i, 1, 1, 1.0, {request}, CAST('{image}' AS BLOB) FROM n",
        f"UPDATE sessions SET spent_usd = {jobs} * 0.03",
    )
    empty = {name: pa.nulls(jobs, OWN_SCHEMA.field(name).type) for name in OWN_SCHEMA.names}
    loaded = dict.fromkeys(field.name for field in IMAGE)
    told = empty | {
        "job_key": pa.array([f"{n:032x}" for n in range(1, jobs + 1)]),
        "request_id": pa.array([f"r-{n:030x}" for n in range(1, jobs + 1)]),
        "status": pa.array(["done"] * jobs),
        "cost_usd": pa.array([0.03] * jobs),
        "images": pa.array([[loaded]] * jobs, OWN_SCHEMA.field("images").type),
    }
    pq.write_table(pa.table(told, schema=OWN_SCHEMA), folder / "results.parquet", row_group_size=10_000)
    return folder


def test_memory_does_not_grow_with_the_number_of_jobs(finished, tmp_path):
    """Thirty times the jobs need the same memory: intermediate data is on disk."""

    def peak(jobs):
        directory = large(finished, tmp_path / f"run{jobs}", jobs)
        words = [sys.executable, "-c", PEAK, str(directory)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    small = peak(2_000)
    assert peak(60_000) < small + 60
