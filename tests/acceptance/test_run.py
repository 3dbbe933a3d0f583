"""`restyle run` and the commands around it: the real command, the embedded endpoint, real files."""

from __future__ import annotations

import json
import os
import signal
import time

import polars as pl
import pyarrow.parquet as pq
import pytest

from batch.manifest.reader import Manifest
from batch.results.schema import OWN_SCHEMA, results_schema
from tests.acceptance.command import (
    REPOSITORY,
    accepted,
    finish,
    jobs_in,
    log,
    restyle,
    results,
    started,
    summary,
    wait_for,
    write_manifest,
)

ECHO = ("--engine", "echo")
OF_THE_RUN = ["request_id", "submitted_at", "completed_at", "timings", "timings_extra"]
"""Columns that depend on the run, not on its images."""


# --- a run and its files ------------------------------------------------------------------------------------


def test_the_demo_needs_nothing_but_the_package(tmp_path):
    """`restyle run manifests/demo.csv`: twelve images, no key, no cost, no network; the first line says "local"."""
    ended = restyle("run", REPOSITORY / "manifests" / "demo.csv", "-o", tmp_path / "demo")
    assert ended.code == 0, ended.text
    assert ended.out.startswith("target: local, the embedded endpoint (engine preview")
    assert "costs nothing" in ended.out.splitlines()[0]
    table = results(tmp_path / "demo").to_pylist()
    assert [row["status"] for row in table] == ["done"] * 12
    images = [tmp_path / "demo" / row["images"][0]["path"] for row in table]
    assert all(image.stat().st_size > 1000 for image in images)
    assert len(set(images)) == 12


def processor_seconds() -> float:
    """Return the CPU seconds of all finished commands; other load on the machine does not count."""
    used = os.times()
    return used.children_user + used.children_system


def test_two_thousand_rows_are_submitted_once_and_the_same_command_then_submits_nothing(tmp_path):
    """Counted by the endpoint's durable counter; resuming a complete run takes less than 3 s of CPU time."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(2000)), tmp_path / "run"
    command = ("run", manifest, "-o", directory, *ECHO)
    assert restyle(*command).code == 0
    assert accepted(directory) == 2000
    before = (directory / "results.parquet").read_bytes()

    began = processor_seconds()
    again = restyle(*command)
    assert processor_seconds() - began < 3.0
    assert again.code == 0
    assert "2,000 rows, 0 jobs to do, 2,000 done before" in again.out
    assert accepted(directory) == 2000
    assert (directory / "results.parquet").read_bytes() == before
    assert summary(directory)["ended"] == 0
    table = results(directory)
    assert table["row"].to_pylist() == list(range(2000))
    assert set(table["status"].to_pylist()) == {"done"}
    assert len(set(table["request_id"].to_pylist())) == 2000


def test_results_are_the_manifest_then_our_columns_in_manifest_order(finished_run):
    """The schema is fixed: every column has its type, even without values."""
    table = results(finished_run.directory)
    manifest = Manifest.open(finished_run.manifest)
    assert table.schema.equals(results_schema(manifest.schema.to_frame().to_arrow().schema))
    assert table.column_names == ["name", "image_url", "prompt_manifest", *OWN_SCHEMA.names]
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == [str(n) for n in range(40)]
    assert [row["row"] for row in rows] == list(range(40))
    first = rows[0]
    assert first["prompt"] == first["prompt_manifest"] == "image 0 as a watercolor"
    assert (first["strength"], first["num_inference_steps"], first["guidance_scale"]) == (0.95, 40, 3.5)
    assert (first["attempts"], first["target"], first["engine"], first["error_type"]) == (1, "local", "echo", None)
    assert first["submitted_at"] <= first["completed_at"]
    assert len({row["seed"] for row in rows}) == 40
    assert all(0 <= row["seed"] < 2**31 for row in rows)


def test_results_say_in_their_metadata_how_they_came_about(finished_run):
    """Config, versions, run seed and the manifest's fingerprint are in the file."""
    metadata = json.loads(pq.read_schema(finished_run.directory / "results.parquet").metadata[b"restyle"])
    assert metadata["run_seed"] == 0
    assert metadata["config"]["target"]["engine"] == "echo"
    assert metadata["manifest"]["fingerprint"] == Manifest.open(finished_run.manifest).fingerprint()
    assert metadata["restyle_version"]


def test_images_lie_under_the_hash_of_their_content(finished_run):
    """The table's facts about an image match the file."""
    import hashlib

    for row in results(finished_run.directory).to_pylist():
        (image,) = row["images"]
        data = (finished_run.directory / image["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == image["sha256"]
        assert image["path"] == f"images/{image['sha256'][:2]}/{image['sha256']}.jpg"
        assert image["file_size"] == len(data)
        assert (image["width"], image["height"], image["content_type"]) == (192, 112, "image/jpeg")


def test_a_fresh_run_gives_the_same_table(finished_run, tmp_path):
    """Everything except times, request ids and URLs is equal: seeds, keys, images by hash."""
    again = tmp_path / "again"
    assert restyle("run", finished_run.manifest, "-o", again, *ECHO).code == 0

    def comparable(directory):
        table = pl.from_arrow(results(directory)).drop(OF_THE_RUN)
        images = table["images"].list.first().struct.unnest().drop("url", "file_name")
        return table.drop("images").hstack(images.select(pl.all().name.prefix("image_")))

    assert comparable(finished_run.directory).equals(comparable(again))
    assert comparable(again)["image_sha256"].n_unique() == 40


def test_the_summary_is_one_line_of_json(finished_run):
    """For scripts after a cron job: counts, money, times, exit code."""
    said = summary(finished_run.directory)
    assert (said["exit_code"], said["status"], said["rows"], said["done"], said["failed"]) == (0, "complete", 40, 40, 0)
    assert (said["ended"], said["spent_usd"], said["stopped"], said["target"]) == (40, 0, None, "local")
    assert said["seconds"] > 0
    assert said["started_at"] <= said["ended_at"]
    assert said["results"] == str(finished_run.directory / "results.parquet")


def test_the_log_tells_each_job_by_stable_words(finished_run):
    """One JSON object per line: the session, each acceptance, each end."""
    lines = log(finished_run.directory)
    actions = [line["action"] for line in lines]
    assert actions.count("session") == actions.count("expected") == 1
    assert actions.count("accepted") == actions.count("done") == 40
    assert all("at" in line for line in lines)
    keys = set(results(finished_run.directory)["job_key"].to_pylist())
    assert {line["job"] for line in lines if line["action"] == "accepted"} == keys


def test_run_json_holds_the_resolved_config_and_the_manifest(finished_run):
    """The run is documented without the config file."""
    facts = json.loads((finished_run.directory / "run.json").read_text())
    assert facts["config"]["input"]["strength"] is None
    assert facts["config"]["limits"]["max_in_flight"] == "auto"
    assert facts["manifest"]["rows"] == 40
    assert facts["manifest"]["source"] == str(finished_run.manifest)


# --- changed manifests and failed rows ----------------------------------------------------------------------


def test_a_growing_manifest_pays_for_what_is_new_only(tmp_path):
    """New rows are added, removed rows leave the results and stay in the journal, the order is the manifest's."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(30)), tmp_path / "run"
    command = ("run", manifest, "-o", directory, *ECHO)
    assert restyle(*command).code == 0
    first = {row["name"]: row for row in results(directory).to_pylist()}

    write_manifest(manifest, [*range(49, 29, -1), *range(10, 30)])
    assert restyle(*command).code == 0
    rows = results(directory).to_pylist()
    assert [row["name"] for row in rows] == [str(n) for n in [*range(49, 29, -1), *range(10, 30)]]
    assert {row["status"] for row in rows} == {"done"}
    assert accepted(directory) == jobs_in(directory) == 50
    assert summary(directory)["ended"] == 20
    for row in rows[20:]:  # another place in the manifest, the same seed, job and image
        assert {**row, "row": 0} == {**first[row["name"]], "row": 0}

    write_manifest(manifest, range(50))
    assert restyle(*command).code == 0
    assert accepted(directory) == 50


def test_equal_rows_are_one_job(tmp_path):
    """Two rows with the same input are paid for once, and both show the image."""
    manifest, directory = write_manifest(tmp_path / "m.csv", [1, 2]), tmp_path / "run"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert restyle("run", manifest, "-o", directory, *ECHO).code == 0
    rows = results(directory).to_pylist()
    assert accepted(directory) == 2
    assert rows[0]["job_key"] == rows[2]["job_key"]
    assert rows[0]["images"] == rows[2]["images"]
    assert "1 duplicate" in restyle("plan", manifest).out


def test_failed_rows_stay_failed_until_they_are_asked_for_again(tmp_path, image_server):
    """A URL with a 404 fails its row (exit 3); only `--retry-failed` retries it."""
    source = REPOSITORY / "manifests" / "images" / "cat.jpg"
    (image_server.folder / "there.jpg").write_bytes(source.read_bytes())
    manifest, directory = tmp_path / "m.csv", tmp_path / "run"
    manifest.write_text(f"image_url,prompt\n{image_server.url}/there.jpg,a cat\n{image_server.url}/missing.jpg,a cat\n")
    command = ("run", manifest, "-o", directory)
    ended = restyle(*command)
    assert ended.code == 3, ended.text
    assert "1 done, 1 failed" in ended.out
    assert "file_download_error" in ended.out
    row = results(directory).to_pylist()[1]
    assert (row["status"], row["error_type"], row["images"]) == ("failed", "file_download_error", None)
    assert "missing.jpg" in row["error_message"]
    assert "404" in row["error_message"]
    submitted = accepted(directory)

    (image_server.folder / "missing.jpg").write_bytes(source.read_bytes())
    assert restyle(*command).code == 3
    assert accepted(directory) == submitted
    assert restyle(*command, "--retry-failed").code == 0
    assert accepted(directory) == submitted + 1
    row = results(directory).to_pylist()[1]
    assert (row["status"], row["error_type"]) == ("done", None)
    assert row["attempts"] > 1


# --- options ----------------------------------------------------------------------------------------------


def test_without_downloads_the_urls_are_kept(tmp_path):
    """`--no-download`: no file, no hash, the endpoint's own values."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(3)), tmp_path / "run"
    assert restyle("run", manifest, "-o", directory, *ECHO, "--no-download").code == 0
    assert not (directory / "images").exists()
    assert summary(directory)["images"] is None
    for row in results(directory).to_pylist():
        (image,) = row["images"]
        assert image["url"].startswith("http://127.0.0.1:")
        assert (image["path"], image["sha256"]) == (None, None)
        assert (image["width"], image["height"]) == (192, 112)


def test_limit_takes_the_first_rows_only(tmp_path):
    """The first rows of a manifest; the complete run then resumes after them."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(12)), tmp_path / "run"
    assert restyle("run", manifest, "-o", directory, *ECHO, "--limit", 5).code == 0
    assert results(directory)["name"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert accepted(directory) == 5
    assert restyle("run", manifest, "-o", directory, *ECHO).code == 0
    assert results(directory).num_rows == accepted(directory) == 12


def test_quiet_says_one_line(tmp_path):
    """Nothing on standard error."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    ended = restyle("run", manifest, "-o", tmp_path / "run", *ECHO, "--quiet")
    assert ended.err == ""
    assert ended.out.count("\n") == 1
    assert ended.out.startswith("complete: 3 done in ")
    assert ended.out.endswith("results.parquet\n")


def test_json_output_is_json_on_every_line(tmp_path):
    """For programs: the summary on standard output, progress on standard error."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(40)), tmp_path / "run"
    ended = restyle("run", manifest, "-o", directory, *ECHO, "--log-format", "json", "--deadline", "1s",
                    "--service-time", "0.5s", "--slots", "1")  # fmt: skip
    assert ended.code == 4, ended.text
    (said,) = [json.loads(line) for line in ended.out.splitlines()]
    assert {**said, "ended_at": ""} == {**summary(directory), "ended_at": ""}
    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert lines[0]["action"] == "plan"
    assert lines[0]["message"].startswith("target: local")
    assert lines[0]["to_do"] == 40
    stopping = next(line for line in lines if line["action"] == "stopping")
    assert "deadline" in stopping["message"]
    assert stopping["jobs"] == 40


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    """Each source of a setting, in order of precedence."""
    manifest, config = write_manifest(tmp_path / "m.csv", range(3)), tmp_path / "c.toml"
    config.write_text('[limits]\nmax_in_flight = 3\n[target]\nengine = "echo"\n[input]\nstrength = 0.5\n')

    def at_once(*flags, env=None):
        return json.loads(restyle("plan", manifest, "--json", *flags, env=env).out)["max_in_flight"]

    variable = {"RESTYLE_LIMITS__MAX_IN_FLIGHT": "5"}
    assert at_once("-c", config) == 3
    assert at_once("-c", config, env=variable) == 5
    assert at_once("-c", config, "--max-in-flight", 7, env=variable) == 7
    assert at_once(env=variable) == 5

    assert restyle("run", manifest, "--config", config, "-o", tmp_path / "run", env=variable).code == 0
    resolved = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (resolved["limits"]["max_in_flight"], resolved["target"]["engine"]) == (5, "echo")
    assert set(results(tmp_path / "run")["strength"].to_pylist()) == {0.5}


def test_a_column_wins_over_the_config_and_a_sweep_over_both(tmp_path):
    """Three cells per row, each with its id; the row's own seed applies to all of them."""
    manifest, config = tmp_path / "m.jsonl", tmp_path / "c.toml"
    manifest.write_text('{"image_url": "https://p.example/1.jpg", "prompt": "a", "seed": 9, "guidance_scale": 2.0}\n')
    config.write_text("[input]\nguidance_scale = 7.0\nstrength = 0.2\n[sweep]\nstrength = [0.5, 0.6, 0.7]\n")
    assert restyle("run", manifest, "-c", config, "-o", tmp_path / "run", *ECHO).code == 0
    rows = results(tmp_path / "run").to_pylist()
    assert [row["strength"] for row in rows] == [0.5, 0.6, 0.7]
    assert len({row["cell"] for row in rows}) == len({row["job_key"] for row in rows}) == 3
    assert {(row["row"], row["seed"], row["guidance_scale"]) for row in rows} == {(0, 9, 2.0)}


# --- stopping ---------------------------------------------------------------------------------------------


def slow(tmp_path, *, rows, seconds, slots):
    manifest, directory = write_manifest(tmp_path / "m.csv", range(rows)), tmp_path / "run"
    command = ("run", manifest, "-o", directory, *ECHO)
    return directory, command, ("--service-time", f"{seconds}s", "--slots", slots, "--max-in-flight", slots)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_submits_and_collects_what_is_in_flight(tmp_path, number):
    """Exit 4, accepted jobs are done, the rest is pending; the same command resumes and pays for nothing twice."""
    directory, command, pace = slow(tmp_path, rows=60, seconds=0.5, slots=4)
    with started(*command, *pace) as process:
        wait_for(lambda: jobs_in(directory, "done") >= 4, "the first jobs done")
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 4, ended.text
    assert "Traceback" not in ended.text
    assert f"stopped early (signal): {number.name}" in ended.out
    done = accepted(directory)
    assert jobs_in(directory, "done") == done < 60
    assert jobs_in(directory, "intended", "accepted", "answered", "unknown") == 0
    statuses = results(directory)["status"].to_pylist()
    assert (statuses.count("done"), statuses.count("pending")) == (done, 60 - done)
    said = summary(directory)
    assert (said["exit_code"], said["stopped"], said["pending"]) == (4, "signal", 60 - done)

    assert restyle(*command).code == 0
    assert accepted(directory) == jobs_in(directory, "done") == 60


def test_a_second_signal_stops_at_once_and_loses_nothing(tmp_path):
    """Jobs in flight stay accepted in the journal; the next run collects them without a new submit."""
    directory, command, pace = slow(tmp_path, rows=12, seconds=60, slots=8)
    with started(*command, *pace) as process:
        wait_for(lambda: jobs_in(directory, "accepted") == 8, "eight jobs in flight")
        process.send_signal(signal.SIGINT)
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        ended = finish(process, timeout=30)
    assert ended.code == 4, ended.text
    assert "Traceback" not in ended.text
    assert jobs_in(directory, "accepted") == 8
    assert results(directory)["status"].to_pylist().count("pending") == 12

    assert restyle(*command).code == 0
    assert accepted(directory) == jobs_in(directory, "done") == 12


def test_a_deadline_stops_in_time(tmp_path):
    """The run ends by the deadline, with its jobs in flight collected: exit 4, resumable."""
    directory, command, pace = slow(tmp_path, rows=500, seconds=0.2, slots=2)
    ended = restyle(*command, *pace, "--deadline", "2s", timeout=30)  # the whole run would take 50 s
    assert ended.code == 4, ended.text
    assert "stopped early (deadline): the deadline of 2 s is near" in ended.out
    done = jobs_in(directory, "done")
    assert 0 < done == accepted(directory) < 500
    assert summary(directory)["stopped"] == "deadline"


def test_too_many_failures_stop_the_run(tmp_path):
    """`--max-failures 2`: no submits after the third failure."""
    manifest, directory = tmp_path / "m.csv", tmp_path / "run"
    rows = "".join(f"http://127.0.0.1:1/{n}.jpg,a cat\n" for n in range(30))
    manifest.write_text("image_url,prompt\n" + rows)
    ended = restyle("run", manifest, "-o", directory, "--max-failures", 2, "--max-in-flight", 2,
                    env={"RESTYLE_LIMITS__ATTEMPTS": "1"})  # fmt: skip
    assert ended.code == 4, ended.text
    assert "too many failures" in ended.out
    assert 3 <= summary(directory)["failed"] <= 6
    assert summary(directory)["pending"] >= 24


def two_failed(tmp_path):
    """A run of three rows, two of them failed: its directory, and the command without the faults."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(3)), tmp_path / "run"
    (tmp_path / "faults.toml").write_text('[[fault]]\nat = "execute"\ndo = "content-policy"\nfirst = 2\n')
    command = ("run", manifest, "-o", directory, *ECHO)
    ended = restyle(*command, "--faults", tmp_path / "faults.toml")
    assert ended.code == 3, ended.text
    return directory, command


def test_what_a_plan_says_is_to_do_is_what_a_run_does(tmp_path):
    """Failed rows count as jobs to do if they are retried: in the plan, the run's first lines, its log and its end."""
    directory, command = two_failed(tmp_path)
    usual = restyle(*command)
    assert "3 rows, 0 jobs to do, 1 done before, 2 failed before" in usual.out
    assert accepted(directory) == 3
    planned = restyle("plan", *command[1:], "--retry-failed", "--json")
    assert {name: json.loads(planned.out)[name] for name in ("to_do", "retried", "done", "failed")} == {
        "to_do": 2, "retried": 2, "done": 1, "failed": 0,
    }  # fmt: skip
    ended = restyle(*command, "--retry-failed")
    assert ended.code == 0, ended.text
    assert "3 rows, 2 jobs to do, 2 of them failed before, 1 done before" in ended.out
    (expected,) = [line["jobs"] for line in log(directory) if line["action"] == "expected"][1:]
    assert expected == summary(directory)["ended"] == 2


def test_failed_rows_are_taken_up_again_for_money_only_with_a_yes(tmp_path):
    """They cost as much as any job: exit 2 without a terminal, with the sum; nothing is sent."""
    directory, command = two_failed(tmp_path)
    facts = json.loads((directory / "run.json").read_text())
    facts["config"]["target"] |= {"name": "fal", "faults": None}  # simulates the directory of a paid run
    (directory / "run.json").write_text(json.dumps(facts))
    ended = restyle(*command, "--target", "fal", "--retry-failed", env={"FAL_KEY": "id:secret"})
    assert ended.code == 2, ended.text
    assert "this run would cost about $0.13 (at most $0.18) for 2 jobs; add --yes" in ended.err


# --- the lock ---------------------------------------------------------------------------------------------


def test_two_runs_at_once_and_a_dead_owner(tmp_path):
    """The second one names the owner of the lock (exit 5) and harms nothing; a killed owner's lock is free."""
    directory, command, pace = slow(tmp_path, rows=6, seconds=60, slots=6)
    with started(*command, *pace) as process:
        wait_for(lambda: jobs_in(directory, "accepted") == 6, "six jobs in flight")
        second = restyle(*command)
        assert second.code == 5
        assert f"process {process.pid}" in second.err
        assert str(directory) in second.err
        assert restyle("cancel", directory).code == 5
        found = json.loads(restyle("status", directory, "--json").out)
        assert found["running"] is True
        assert found["jobs"]["accepted"] == 6
        assert found["oldest_open_at"] <= time.time()
        assert jobs_in(directory, "accepted") == 6
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

    assert json.loads(restyle("status", directory, "--json").out)["running"] is False
    assert restyle(*command).code == 0
    assert accepted(directory) == jobs_in(directory, "done") == 6


# --- other commands ---------------------------------------------------------------------------------------


def test_status_counts_by_state(finished_run):
    """As text and as JSON."""
    text = restyle("status", finished_run.directory)
    assert text.code == 0
    assert "not running (target local)" in text.out
    assert any(line.split() == ["done", "40"] for line in text.out.splitlines())
    found = json.loads(restyle("status", finished_run.directory, "--json").out)
    assert found["jobs"] == {"pending": 0, "intended": 0, "accepted": 0, "answered": 0, "done": 40, "failed": 0, "unknown": 0, "collectable": 0}  # fmt: skip # noqa: E501
    assert (found["spent_usd"], found["running"], found["target"]) == (0, False, "local")
    assert found["manifest"] == str(finished_run.manifest)


def test_export_rebuilds_the_results_from_the_journal(finished_run, tmp_path):
    """The same table at another path, also after the manifest has moved."""
    ended = restyle("export", finished_run.directory, "-o", tmp_path / "copy.parquet")
    assert ended.code == 0, ended.text
    assert "40 rows, 40 done" in ended.out
    assert pq.read_table(tmp_path / "copy.parquet").equals(results(finished_run.directory))

    moved = tmp_path / "moved.csv"
    moved.write_bytes(finished_run.manifest.read_bytes())
    ended = restyle("export", finished_run.directory, "-o", tmp_path / "moved.parquet", "--manifest", moved)
    assert ended.code == 0, ended.text
    assert pq.read_table(tmp_path / "moved.parquet").equals(results(finished_run.directory))


def test_export_puts_lost_results_back(tmp_path):
    """`results.parquet` is an export: it can be deleted."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(3)), tmp_path / "run"
    assert restyle("run", manifest, "-o", directory, *ECHO).code == 0
    before = results(directory)
    (directory / "results.parquet").unlink()
    assert restyle("export", directory).code == 0
    assert results(directory).equals(before)
    (directory / "results.parquet").unlink()
    assert restyle("run", manifest, "-o", directory, *ECHO).code == 0
    assert results(directory).equals(before)
    assert accepted(directory) == 3


def test_cancel_empties_the_queue_and_the_next_run_reads_how_each_ended(tmp_path):
    """Queued requests are cancelled, running ones may still succeed. Nothing is submitted again."""
    directory, command, _ = slow(tmp_path, rows=6, seconds=60, slots=2)
    with started(*command, "--service-time", "60s", "--slots", 2, "--max-in-flight", 6) as process:
        wait_for(lambda: jobs_in(directory, "accepted") == 6, "six jobs accepted")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    ended = restyle("cancel", directory)
    assert ended.code == 0, ended.text
    assert ended.out.startswith("6 open requests: 6 cancellations requested, 0 too late")
    assert "a failed row (client_cancelled), which only --retry-failed submits again" in ended.out
    again = restyle(*command)
    assert again.code == 3, again.text
    rows = results(directory).to_pylist()
    cancelled = [row for row in rows if row["error_type"] == "client_cancelled"]
    assert len(cancelled) >= 4
    assert {row["status"] for row in cancelled} == {"failed"}
    assert len(cancelled) + sum(row["status"] == "done" for row in rows) == 6
    assert accepted(directory) == 6
    assert restyle(*command, "--retry-failed").code == 0
    assert accepted(directory) == 6 + len(cancelled)


@pytest.mark.parametrize("command", ["status", "export", "cancel"])
def test_a_companion_without_a_run_says_how_to_start_one(tmp_path, command):
    """Exit 2, and nothing is created."""
    ended = restyle(command, tmp_path / "nothing")
    assert ended.code == 2
    assert "there is no run in" in ended.err
    assert "restyle run" in ended.err
    assert not (tmp_path / "nothing").exists()


def test_plan_writes_and_sends_nothing(tmp_path):
    """It works at any time, also in a read-only folder."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    ended = restyle("plan", manifest, "--target", "fal")
    assert ended.code == 0, ended.text
    assert "target: fal" in ended.out
    assert "$" in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


def test_a_plan_reckons_with_the_slots_of_the_target(tmp_path):
    """Twenty one-second jobs on two slots take ten seconds, with any number in flight."""
    manifest = write_manifest(tmp_path / "m.csv", range(20))
    planned = restyle("plan", manifest, "--engine", "echo", "--service-time", "1s", "--slots", "2", "--json")
    facts = json.loads(planned.out)
    assert (facts["max_in_flight"], facts["at_once"]) == (16, 2)
    assert facts["hours"] * 3600 == pytest.approx(10)
