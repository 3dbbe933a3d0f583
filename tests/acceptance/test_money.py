"""Costs over real HTTP: the real command and the real endpoint, with a price, keys and faults."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.acceptance.command import jobs_in, log, restyle, results, summary, write_manifest
from tests.acceptance.endpoint import endpoint

PRICE = 0.03
UNITS = 0.0215
"""Megapixels of an echo image, 192 x 112, as billed by our endpoint."""
PRICED = {"RESTYLE_PRICE__USD_PER_MEGAPIXEL": str(PRICE)}
ECHO = ("--engine", "echo", "--price", PRICE)


def sessions(directory) -> list[float]:
    """Return the cost of each session of a journal."""
    with closing(sqlite3.connect(directory / "journal.db")) as connection:
        return [usd for (usd,) in connection.execute("SELECT spent_usd FROM sessions ORDER BY number")]


def accepted_by(server) -> int:
    """Return the number of requests that the server has ever accepted; each is billed."""
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        return json.load(answer)["accepted"]


@contextmanager
def doorkeeper() -> Iterator[tuple[str, list[bytes]]]:
    """Listens, records the first bytes of each connection, and closes it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        done = threading.Event()

        def listen() -> None:
            while not done.is_set():
                try:
                    visitor, _ = listener.accept()
                except TimeoutError:
                    continue
                with visitor:
                    visitor.settimeout(5)
                    heard.append(visitor.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        finally:
            done.set()
            thread.join()


# --- plan -------------------------------------------------------------------------------------------------


def test_a_plan_opens_no_connection_unless_a_live_price_is_asked_for(tmp_path):
    """Not to a URL target and not to fal: any request would go through this listener."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    with doorkeeper() as (url, heard):
        proxy = {"FAL_KEY": "id:secret", "HTTPS_PROXY": url, "HTTP_PROXY": url, "ALL_PROXY": url}
        for target in ("fal", url, "local"):
            assert restyle("plan", manifest, "--target", target, env=proxy).code == 0
        assert heard == []
        asked = restyle("plan", manifest, "--target", "fal", "--live-price", env=proxy)
        assert asked.code == 4
        assert "could not fetch the live price from fal (" in asked.err
        assert "plan without --live-price" in asked.err
        assert heard[0].startswith(b"CONNECT api.fal.ai:443")
        assert b"secret" not in b"".join(heard)


def test_a_live_price_is_used_and_says_from_when(tmp_path):
    """The target's own price list; a difference is reported, and a run uses the configured price."""
    manifest = write_manifest(tmp_path / "m.csv", range(10))
    with endpoint(tmp_path, "--engine", "echo", "--price", 0.05) as server:
        env = {"FAL_KEY": server.key, **PRICED}
        usual = restyle("plan", manifest, "--target", server.url, env=env)
        assert "at $0.03 a megapixel" in usual.out
        live = restyle("plan", manifest, "--target", server.url, "--live-price", env=env)
        assert live.code == 0, live.text
        assert "at $0.05 a megapixel" in live.out
        assert "$0.05 a megapixel, read at 20" in live.out.splitlines()[0]
        assert "UTC (a run uses its own price: $0.03 as of 20" in live.out.splitlines()[0]
        said = json.loads(restyle("plan", manifest, "--target", server.url, "--live-price", "--json", env=env).out)
        assert (said["price_per_megapixel"], said["price_is_live"]) == (0.05, True)
        assert said["price_as_of"].startswith("20")
        refused = restyle("plan", manifest, "--target", server.url, "--live-price", env={"FAL_KEY": "id:wrong"})
        assert refused.code == 6
        assert "refused the key for its price list (HTTP 401)" in refused.err


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("fal", "FAL_KEY is not set"),
        ("local", "the embedded endpoint has no price list and sends no bills: it costs nothing"),
    ],
)
def test_a_live_price_that_cannot_be_had_is_one_sentence(tmp_path, target, why):
    """Exit 2: nothing was sent."""
    ended = restyle("plan", write_manifest(tmp_path / "m.csv", [1]), "--target", target, "--live-price")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert why in ended.err


# --- a rehearsal ------------------------------------------------------------------------------------------


def test_a_rehearsal_with_a_price_says_what_its_dollars_are(tmp_path):
    """Planned and reserved like the real image, settled with the small one; nothing is charged, as audit says."""
    manifest, directory = write_manifest(tmp_path / "m.csv", [1]), tmp_path / "run"
    command, env = (manifest, "-o", directory, "--engine", "echo"), {"RESTYLE_PRICE__USD_PER_MEGAPIXEL": "0.5"}
    planned = restyle("plan", *command, env=env)
    assert "$0.5 " in planned.out.splitlines()[0]
    assert "$1.05 at $0.5 a megapixel, at most $1.50 if every image is rounded up" in planned.out
    ended = restyle("run", *command, env=env)
    assert "1 done, $0.01 spent" in ended.out
    (charges,) = [line for line in restyle("audit", directory).out.splitlines() if line.startswith("charges")]
    assert "$0.5 " in charges
    assert "costs nothing" not in charges


# --- a paid run -------------------------------------------------------------------------------------------


def test_what_is_counted_is_what_is_billed_over_all_runs(tmp_path):
    """A budget that ends the first run, a lower one that submits nothing, none for the rest; then the audit."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(40)), tmp_path / "run"
    with endpoint(tmp_path, *ECHO) as server:
        env = {"FAL_KEY": server.key, **PRICED}
        command = ("run", manifest, "-o", directory, "--target", server.url, "--max-in-flight", 4)
        first = restyle(*command, "--budget", 0.105, env=env)
        assert first.code == 4, first.text
        assert "stopped early (budget)" in first.out
        said = summary(directory)
        assert said["spent_usd"] == said["spent_total_usd"] <= 0.105
        done = said["done"]
        assert done == 24  # three megapixels are reserved for an image of unknown size: $0.09 of $0.105
        assert said["spent_usd"] == pytest.approx(done * UNITS * PRICE)

        lowered = restyle(*command, "--budget", 0.001, env=env)
        assert lowered.code == 4, lowered.text
        assert "more than the budget of $0.00" in lowered.out
        assert summary(directory)["ended"] == 0
        assert accepted_by(server) == done

        rest = restyle(*command, env=env)
        assert rest.code == 0, rest.text
        said = summary(directory)
        assert said["spent_usd"] == pytest.approx((40 - done) * UNITS * PRICE)
        assert said["spent_total_usd"] == pytest.approx(40 * UNITS * PRICE)
        spent = sessions(directory)
        assert spent == pytest.approx([done * UNITS * PRICE, 0, (40 - done) * UNITS * PRICE])
        assert sum(results(directory)["cost_usd"].to_pylist()) == pytest.approx(sum(spent))

        audited = json.loads(restyle("audit", directory, "--json", env=env).out)
        assert audited["adds_up"] is True
        assert {check["name"]: check["adds_up"] for check in audited["checks"]}["charges"] is True
        counts = audited["counts"]
        assert (counts["accepted"], counts["charged"], counts["collected"], counts["sessions"]) == (40, 40, 40, 3)
        assert counts["charged_usd"] == pytest.approx(counts["spent_usd"], abs=1e-6)
        assert "may not read billing events (HTTP 401)" in restyle("audit", directory, env={"FAL_KEY": "id:wrong"}).out


def test_lines_for_machines_tell_the_spend_of_this_run_and_of_all(tmp_path):
    """`--log-format json`: both sums in each line, and the summary on standard output."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(6)), tmp_path / "run"
    command = ("run", manifest, "-o", directory, "--engine", "echo", "--log-format", "json")
    assert restyle(*command, "--limit", 3, env=PRICED).code == 0
    ended = restyle(*command, "--deadline", "3s", "--service-time", "60s", env=PRICED)
    assert ended.code == 4, ended.text
    lines = [json.loads(line) for line in ended.err.splitlines()]
    stopping = next(line for line in lines if line["action"] == "stopping")
    said = json.loads(ended.out)
    for facts in (stopping, said):
        assert (facts["spent_usd"], facts["spent_total_usd"]) == (0, pytest.approx(3 * UNITS * PRICE, abs=1e-4))
    assert said["reserved_usd"] == pytest.approx(3 * 3 * PRICE)


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["submit", "upload"])
def test_a_wrong_key_submits_nothing_and_the_right_one_goes_on(tmp_path, first):
    """401 on the first call: exit 6, one message; the same command completes once the key works."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(6)), tmp_path / "run"
    if first == "upload":
        Image.new("RGB", (64, 64)).save(tmp_path / "local.png")
        manifest.write_text("image_url,prompt\n" + "".join(f"local.png,number {n}\n" for n in range(6)))
    with endpoint(tmp_path, *ECHO) as server:
        command = ("run", manifest, "-o", directory, "--target", server.url)
        wrong = restyle(*command, env={"FAL_KEY": "tester:not the secret"})
        assert wrong.code == 6, wrong.text
        assert "stopped early (account refused)" in wrong.out
        assert summary(directory)["exit_code"] == 6
        assert (accepted_by(server), jobs_in(directory, "accepted", "done", "unknown")) == (0, 0)
        right = restyle(*command, env={"FAL_KEY": server.key})
        assert right.code == 0, right.text
        assert accepted_by(server) == jobs_in(directory, "done") == 6


def test_a_lock_in_the_middle_stops_submits_collects_and_goes_on_later(tmp_path):
    """403 from the sixth submit on: the five before are collected, exit 6; later the rest, each paid once."""
    manifest, directory, faults = write_manifest(tmp_path / "m.csv", range(12)), tmp_path / "run", tmp_path / "f.toml"
    faults.write_text('[[fault]]\nat = "submit"\ndo = "answer"\nstatus = 403\nevery = 1\nafter = 5\n')
    command = ("run", manifest, "-o", directory, "--max-in-flight", 2, "--target")
    with endpoint(tmp_path, *ECHO, "--service-time", "0.2s", "--faults", faults) as server:
        locked = restyle(*command, server.url, env={"FAL_KEY": server.key})
        assert locked.code == 6, locked.text
        assert "User is locked" in locked.out
        said = summary(directory)
        assert (said["done"], said["pending"], said["stopped"]) == (5, 7, "account refused")
        assert accepted_by(server) == 5
    with endpoint(tmp_path, *ECHO) as server:
        again = restyle(*command, server.url, env={"FAL_KEY": server.key})
        assert again.code == 0, again.text
        assert accepted_by(server) == jobs_in(directory, "done") == 12
        assert restyle("audit", directory, env={"FAL_KEY": server.key}).code == 0


def test_failures_are_told_by_their_commonest_reason(tmp_path):
    """`--max-failures 50%` in a run in which everything fails: it stops early and names the reason."""
    manifest, directory, faults = write_manifest(tmp_path / "m.csv", range(200)), tmp_path / "run", tmp_path / "f.toml"
    faults.write_text('[[fault]]\nat = "execute"\ndo = "content-policy"\nevery = 1\n')
    ended = restyle("run", manifest, "-o", directory, "--engine", "echo", "--faults", faults, "--max-failures", "50%",
                    "--max-in-flight", 4)  # fmt: skip
    assert ended.code == 4, ended.text
    failed = summary(directory)["failed"]
    assert 20 <= failed <= 40
    assert "of 20 jobs failed: 20 content_policy_violation" in ended.out
    assert any(line["action"] == "stopping" for line in log(directory))


# --- requests ---------------------------------------------------------------------------------------------


def test_a_submit_asks_for_this_model_only_and_for_results_that_are_kept(tmp_path):
    """Both spellings of "no fallback"; neither `sync_mode` nor `X-Fal-Store-IO`; the key once, nothing else."""
    seen: list[tuple[dict[str, str], bytes]] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append(({name.lower(): value for name, value in self.headers.items()}, body))
            answer = b'{"detail":[{"loc":["body"],"msg":"no","type":"value_error"}]}'
            self.send_response(422)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            manifest = write_manifest(tmp_path / "m.csv", [1])
            ended = restyle("run", manifest, "-o", tmp_path / "run", "--target", url, env={"FAL_KEY": "id:secret"})
        finally:
            server.shutdown()
            thread.join()
    assert ended.code == 3, ended.text
    ((headers, body),) = seen
    assert headers["x-app-fal-disable-fallback"] == headers["x-fal-disable-fallbacks"] == "true"
    assert headers["authorization"] == "Key id:secret"
    assert "x-fal-store-io" not in headers
    assert not json.loads(body)["sync_mode"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[input]\nsync_mode = true\n", "its results are data URIs"),
        ("[sweep]\nsync_mode = [true]\n", "its results are data URIs"),
        ('[target.headers]\n"X-Fal-Store-IO" = "0"\n', "without stored payloads a result is kept for at most one hour"),
    ],
)
def test_wishes_that_would_lose_results_are_refused_with_a_reason(tmp_path, config, reason):
    """In the config: exit 2 before anything is sent."""
    (tmp_path / "c.toml").write_text(config)
    manifest = write_manifest(tmp_path / "m.csv", [1])
    ended = restyle("run", manifest, "-o", tmp_path / "run", "-c", tmp_path / "c.toml")
    assert ended.code == 2
    assert "is not supported" in ended.err
    assert reason in ended.err
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_asks_for_sync_mode_has_bad_rows(tmp_path):
    """The row says why; the others are done."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_url,prompt,sync_mode\nhttps://p.example/1.jpg,a,true\nhttps://p.example/2.jpg,b,\n")
    assert restyle("run", manifest, "-o", tmp_path / "run", "--engine", "echo").code == 3
    bad, good = results(tmp_path / "run").to_pylist()
    assert (bad["status"], bad["error_type"], good["status"]) == ("failed", "sync_mode", "done")
    assert "results are not kept" in bad["error_message"]


# --- a lost journal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_lost_journal_is_not_begun_anew(tmp_path, how):
    """Every job would be submitted and paid for again: refused, the results stay, and a restored journal resumes."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(3)), tmp_path / "run"
    command = ("run", manifest, "-o", directory, "--engine", "echo")
    assert restyle(*command).code == 0
    journal, kept = directory / "journal.db", tmp_path / "kept.db"
    journal.rename(kept)
    if how == "empty":
        journal.touch()
    table = (directory / "results.parquet").read_bytes()
    refused = restyle(*command)
    assert refused.code == 2
    assert "missing or empty" in refused.err
    assert "Restore it" in refused.err
    assert (directory / "results.parquet").read_bytes() == table
    for told in ("status", "export", "audit", "reconcile", "cancel"):
        ended = restyle(told, directory)
        assert ended.code == 2
        assert "missing" in ended.err or "-wal is lost" in ended.err, ended.text
    planned = restyle("plan", manifest, "-o", directory, "--engine", "echo")
    assert (planned.code, "missing" in planned.err or "-wal is lost" in planned.err) == (2, True), planned.text
    kept.replace(journal)
    again = restyle(*command)
    assert (again.code, "0 jobs to do" in again.out) == (0, True), again.text


def test_two_run_directories_at_one_server(tmp_path):
    """The same local images, uploaded by each run: separate requests, not one key with two inputs."""
    Image.new("RGB", (64, 64)).save(tmp_path / "local.png")
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_url,prompt\nlocal.png,one\nlocal.png,two\n")
    with endpoint(tmp_path, *ECHO) as server:
        for name in ("a", "b"):
            ended = restyle("run", manifest, "-o", tmp_path / name, "--target", server.url, env={"FAL_KEY": server.key})
            assert ended.code == 0, ended.text
        assert accepted_by(server) == 4
