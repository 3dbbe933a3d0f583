"""A paid answer is never discarded and never paid for twice: odd answers of a real service.

A refused read is repeated up to sixteen times, with pauses: most runs use the quick clock of `tests.quick_time`.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from batch.journal.answers import unpack
from batch.journal.database import JournalDatabase
from tests.acceptance.command import restyle, results
from tests.acceptance.odd_service import answer, jpeg, odd_service

MADE_BY_0_1_0 = Path(__file__).parent / "made_by_0_1_0" / "journal.sql"


def manifest_of(folder, *names):
    path = folder / "m.csv"
    rows = [f"https://images.example/{name}.jpg,{name} cat\n" for name in names or ("a",)]
    path.write_text("image_url,prompt\n" + "".join(rows))
    return path


def run(folder, service, *flags, names=("a",), code=0, quick=True):
    ended = restyle(
        "run", manifest_of(folder, *names), "-o", folder / "out", "--target", service.url, *flags, quick=quick
    )
    assert ended.code == code, ended.text
    return results(folder / "out").to_pylist(), ended


ODD_FIELDS = [
    ("seed", None),
    ("seed", ...),
    ("seed", "17"),
    ("seed", 1e300),
    ("seed", -5),
    ("has_nsfw_concepts", None),
    ("has_nsfw_concepts", ...),
    ("has_nsfw_concepts", "no"),
    ("timings", None),
    ("timings", ...),
    ("timings", [1, 2]),
    ("prompt", None),
    ("prompt", 17),
    ("extra", {"deep": [{"er": None}]}),
]


def test_cases_1_2_3_an_odd_field_costs_that_field_only(tmp_path):
    """Null, missing, of another type or out of range: done, the column is null, and the row has a note."""
    names = [f"n{number}" for number in range(len(ODD_FIELDS))]
    with odd_service() as service:

        def output(request):
            whole = service.ok(request)
            name, value = ODD_FIELDS[int(whole["prompt"].split()[0][1:])]
            return {key: item for key, item in (whole | {name: value}).items() if item is not ...}

        service.output = output
        rows, _ = run(tmp_path, service, names=names)
        assert service.posts == len(names)
        asked = {given["prompt"]: given["seed"] for given in service.inputs.values()}
    for (name, value), row in zip(ODD_FIELDS, rows, strict=True):
        assert row["status"] == "done", (name, value, row)
        assert (tmp_path / "out" / row["images"][0]["path"]).read_bytes()
        assert row["seed"] == asked[row["prompt"]]
        odd = name in {"seed", "has_nsfw_concepts", "timings"}
        assert [note.partition(":")[0] for note in row["notes"] or []] == [name] * odd
        assert row["has_nsfw_concepts"] == (None if name == "has_nsfw_concepts" else [False])
        assert (row["timings"]["inference"] is None) == (name == "timings")


def test_case_3_what_is_a_number_among_the_timings_is_kept(tmp_path):
    """A nested object among them is dropped alone."""
    with odd_service(change={"timings": {"inference": 0.25, "load": 2, "nested": {"a": 1}}}) as service:
        ((row,), _) = run(tmp_path, service)
    assert row["timings"]["inference"] == 0.25
    assert row["timings_extra"] == [{"name": "load", "seconds": 2.0}]
    assert row["notes"] == ["timings.nested: an object"]


def test_case_4_an_answer_without_images_is_kept_and_not_paid_for_again_without_a_word(tmp_path):
    """Failed with `no_images`; the plan shows that it is free; after another read it is still one request."""
    with odd_service(change={"images": []}) as service:
        ((row,), _) = run(tmp_path, service, code=3, quick=False)
        assert (row["status"], row["error_type"], row["images"]) == ("failed", "no_images", None)
        assert (row["has_nsfw_concepts"], row["timings"]["inference"], row["request_id"]) == ([False], 0.5, "request-1")
        planned = restyle("plan", tmp_path / "m.csv", "-o", tmp_path / "out", "--target", service.url, "--retry-failed")
        assert "1 failed but paid for: results are fetched again for free" in planned.out
        assert "to do       0" in planned.out
        run(tmp_path, service, "--retry-failed", code=3, quick=False)
        assert service.posts == 1
        service.change = {}
        ((row,), _) = run(tmp_path, service)
        assert row["status"] == "done"
        assert service.posts == 1


@pytest.mark.parametrize("flag", [[], ["--retry-failed"]])
def test_case_5_a_file_that_is_refused_for_a_while_is_fetched_later_free(tmp_path, flag):
    """The row keeps URL and sizes; the next run, with or without --retry-failed, downloads the file."""
    statuses = (403, 404, 410, 401)
    with odd_service() as service:
        service.image = lambda request, _: answer({"detail": "no"}, int(service.inputs[request]["prompt"].split()[0]))
        rows, ended = run(tmp_path, service, names=statuses, code=3)
        for row, status in zip(rows, statuses, strict=True):
            assert (row["status"], row["error_type"], row["attempts"]) == ("failed", "result_file_gone", 1)
            assert str(status) in row["error_message"]
            (image,) = row["images"]
            assert (image["url"], image["width"], image["height"]) == (
                f"{service.url}/files/{row['request_id']}.jpg", 64, 48,
            )  # fmt: skip
            assert (image["path"], image["sha256"]) == (None, None)
            assert (row["has_nsfw_concepts"], row["timings"]["inference"]) == ([False], 0.5)
        assert "paid for: 4 failed jobs" in ended.out
        assert "result_file_gone, for example row 0" in ended.out
        service.image = lambda _, __: None
        rows, _ = run(tmp_path, service, *flag, names=statuses)
        assert {(row["status"], row["error_type"], row["attempts"]) for row in rows} == {("done", None, 1)}
        assert service.posts == len(statuses)
    assert restyle("audit", tmp_path / "out").code == 0


def test_case_6_a_damaged_file_is_fetched_later_free(tmp_path):
    """Truncated, something else, or empty: complete the next day."""
    bodies = {"cut": jpeg(3)[:200], "html": b"<html>maintenance</html>", "empty": b""}
    with odd_service() as service:
        service.image = lambda request, _: (200, bodies[service.inputs[request]["prompt"].split()[0]], {})
        rows, _ = run(tmp_path, service, names=bodies, code=3)
        assert {(row["error_type"], row["images"][0]["path"]) for row in rows} == {("result_file_damaged", None)}
        service.image = lambda _, __: None
        rows, _ = run(tmp_path, service, names=bodies)
        assert {row["status"] for row in rows} == {"done"}
        assert service.posts == len(bodies)


def test_case_8_two_jobs_never_share_a_request_id(tmp_path):
    """The later submit is unknown with the reason; no row shows the image of another row."""
    with odd_service(name=lambda _: "the-same") as service:
        rows, _ = run(tmp_path, service, "--max-in-flight", 1, names=("a", "b"), code=4)
        assert [row["status"] for row in rows] == ["done", "unknown"]
        assert "the-same" in rows[1]["error_message"]
        assert rows[1]["images"] is None
        assert service.posts == 2


# --- unreadable answers -----------------------------------------------------------------------------------


NO_ANSWERS = {
    "array": b"[]",
    "array_of_images": b'[{"url": "x"}]',
    "null": b"null",
    "html": b"<html>",
    "nothing": b"",
    "half": b"{",
    "null_images": b'{"images": null}',
    "another_object": b'{"error": "odd"}',
    "text": b'"text"',
    "long": b"x" * 3000,
}


def test_an_answer_that_is_none_is_kept_raw_and_read_again(tmp_path):
    """The response is in the journal; the next run requests it again, free."""
    with odd_service() as service:
        service.result = lambda request, _: (200, NO_ANSWERS[service.inputs[request]["prompt"].split()[0]], {})
        rows, _ = run(tmp_path, service, names=NO_ANSWERS, code=3)
        assert {(row["status"], row["error_type"]) for row in rows} == {("failed", "malformed_output")}
        journal = JournalDatabase.open_read_only(tmp_path / "out" / "journal.db")
        outcomes = journal.outcomes([row["job_key"] for row in rows])
        journal.close()
        assert [unpack(outcomes[row["job_key"]].output) for row in rows] == list(NO_ANSWERS.values())
        service.result = lambda _, __: None
        rows, _ = run(tmp_path, service, names=NO_ANSWERS)
        assert {row["status"] for row in rows} == {"done"}
        assert service.posts == len(NO_ANSWERS)


def test_json_that_is_nearly_right_is_read(tmp_path):
    """A byte order mark, NaN, a Latin-1 letter and an unpaired surrogate affect only their own value."""
    with odd_service() as service:

        def result(request, _):
            image = f'"images": [{{"url": "{service.url}/files/{request}.jpg"}}]'
            text = f'{{{image}, "seed": NaN, "prompt": "\\ud83d", "other": "\xe9"}}'
            return 200, b"\xef\xbb\xbf" + text.encode("latin-1"), {}

        service.result = result
        ((row,), _) = run(tmp_path, service)
        assert (row["status"], row["seed"]) == ("done", service.inputs["request-1"]["seed"])
        assert service.posts == 1


def test_an_answer_of_50_mb_is_read(tmp_path):
    """It is paid for, and only its size is odd."""
    with odd_service(change={"padding": "x" * 50_000_000}) as service:
        ((row,), _) = run(tmp_path, service)
        assert (row["status"], service.posts) == ("done", 1)
    assert (tmp_path / "out" / "journal.db").stat().st_size < 5_000_000


def test_an_answer_over_the_limit_is_collected_with_a_larger_one(tmp_path):
    """Failed with a message that names the setting; then free."""
    config = tmp_path / "c.toml"
    config.write_text("[limits]\nmax_download_bytes = 1000000\n")
    with odd_service(change={"padding": "x" * 18_000_000}) as service:
        ((row,), _) = run(tmp_path, service, "-c", config, code=3)
        assert row["error_type"] == "malformed_output"
        assert "limits.max_download_bytes" in row["error_message"]
        ((row,), _) = run(tmp_path, service)
        assert (row["status"], service.posts) == ("done", 1)


def test_images_with_the_same_url_twice_are_two_images_of_one_file(tmp_path):
    """Stored once, shown twice."""
    with odd_service() as service:
        service.output = lambda request: service.ok(request) | {"images": service.ok(request)["images"] * 2}
        ((row,), _) = run(tmp_path, service)
        assert len(row["images"]) == 2
        assert len({image["path"] for image in row["images"]}) == 1


def test_one_bad_file_of_several_does_not_cost_the_others(tmp_path):
    """Good files are stored and shown; the others are downloaded later."""
    with odd_service() as service:

        def output(request):
            whole = service.ok(request)
            return whole | {"images": [{"url": f"{service.url}/files/missing.jpg"}, *whole["images"]]}

        service.output = output
        service.image = lambda request, _: answer({}, 404) if request == "missing" else None
        ((row,), _) = run(tmp_path, service, code=3)
        assert [image["path"] is None for image in row["images"]] == [True, False]


def test_a_data_uri_is_stored_and_leaves_the_journal(tmp_path):
    """An embedded image becomes a file and is not stored twice."""
    import base64

    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg(9)).decode()
    with odd_service(change={"images": [{"url": uri, "width": 64}]}) as service:
        ((row,), _) = run(tmp_path, service)
    assert (tmp_path / "out" / row["images"][0]["path"]).read_bytes() == jpeg(9)
    assert row["images"][0]["url"] == "data:image/jpeg;base64,…"
    journal = JournalDatabase.open_read_only(tmp_path / "out" / "journal.db")
    (outcome,) = journal.outcomes([row["job_key"]]).values()
    journal.close()
    assert uri.encode() not in outcome.output


# --- final verdicts and expired results -------------------------------------------------------------------


def test_the_services_own_verdict_is_paid_for_again_only_when_asked(tmp_path):
    """A 422 of the model is final: the next run skips it, --retry-failed submits a new attempt."""
    odd = answer({"detail": [{"loc": ["body"], "msg": "too small", "type": "image_too_small"}]}, 422)
    with odd_service(result=lambda _, __: odd) as service:
        ((row,), _) = run(tmp_path, service, code=3)
        assert row["error_type"] == "image_too_small"
        run(tmp_path, service, code=3)
        assert service.posts == 1
        service.result = lambda _, __: None
        run(tmp_path, service, "--retry-failed")
        assert service.posts == 2


def test_after_its_time_a_lost_file_is_paid_for_again_only_when_asked(tmp_path):
    """After `limits.collect_for`: one last free attempt, then --retry-failed submits a new one, as planned."""
    config = tmp_path / "c.toml"
    config.write_text("[limits]\ncollect_for = 0\n")
    gone = "request-1"
    with odd_service(image=lambda request, _: answer({}, 404) if request == gone else None) as service:
        run(tmp_path, service, "-c", config, code=3)
        planned = restyle(
            "plan", tmp_path / "m.csv", "-o", tmp_path / "out", "-c", config, "--target", service.url, "--retry-failed"
        )
        assert "to do       1, 1 of them failed before" in planned.out
        run(tmp_path, service, "-c", config, code=3)
        assert service.posts == 1
        ((row,), _) = run(tmp_path, service, "-c", config, "--retry-failed")
        assert (row["status"], row["request_id"], row["attempts"]) == ("done", "request-2", 2)
        assert service.posts == 2


def test_a_result_that_is_not_shown_is_asked_for_again(tmp_path):
    """404 after COMPLETED, for a while."""
    with odd_service(result=lambda _, __: answer({"detail": "not found"}, 404)) as service:
        ((row,), _) = run(tmp_path, service, code=3)
        assert (row["status"], row["request_id"]) == ("failed", "request-1")
        service.result = lambda _, __: None
        ((row,), _) = run(tmp_path, service, "--retry-failed")
        assert (row["status"], service.posts) == ("done", 1)


# --- journals of older versions ---------------------------------------------------------------------------


def test_a_journal_of_0_1_0_is_opened_and_its_refused_answers_are_collected(tmp_path):
    """Created by 0.1.0: a null seed, a missing file, a damaged one, a failure, an empty answer, a finished job."""
    names = ("ok", "nullseed", "gone", "damaged", "failed", "empty")
    with odd_service() as service:
        given = {1: "ok", 4: "nullseed", 2: "gone", 3: "damaged", 5: "failed", 6: "empty"}
        service.inputs |= {f"request-{n}": {"prompt": f"{name} cat", "seed": n} for n, name in given.items()}
        service.change = {"seed": None}
        out = tmp_path / "out"
        out.mkdir()
        database = sqlite3.connect(out / "journal.db")
        database.executescript(MADE_BY_0_1_0.read_text("utf-8"))
        for number, output in database.execute("SELECT id, output FROM outcomes WHERE output IS NOT NULL").fetchall():
            moved = output.replace(b"http://127.0.0.1:37817", service.url.encode())
            database.execute("UPDATE outcomes SET output = ? WHERE id = ?", (moved, number))
        database.commit()
        database.close()
        status = restyle("status", out)
        rows, _ = run(tmp_path, service, names=names, code=3)
        assert service.posts == 0
    assert "failed                 4" in status.out  # read unchanged: only a run upgrades it
    assert {row["prompt"].split()[0]: row["status"] for row in rows} == {
        "ok": "done", "nullseed": "done", "gone": "done", "damaged": "done", "failed": "failed", "empty": "done",
    }  # fmt: skip
    nullseed = rows[1]
    assert any("seed" in note for note in nullseed["notes"])


# --- lost files -----------------------------------------------------------------------------------------------


def test_audit_repair_fetches_missing_and_damaged_images_again(tmp_path):
    """Free; a file is replaced only by equal bytes, and unavailable images are listed."""
    names = ("missing", "shorter", "same_size", "gone", "other", "whole")
    with odd_service() as service:
        rows, _ = run(tmp_path, service, names=names)
        paths = {name: tmp_path / "out" / row["images"][0]["path"] for name, row in zip(names, rows, strict=True)}
        before = {name: path.read_bytes() for name, path in paths.items()}
        for name in ("missing", "gone", "other"):
            paths[name].unlink()
        paths["shorter"].write_bytes(before["shorter"][:100])
        paths["same_size"].write_bytes(before["same_size"][:-1] + b"!")
        by_request = {row["request_id"]: name for name, row in zip(names, rows, strict=True)}
        odd = {"gone": answer({}, 404), "other": (200, jpeg(250), {})}
        service.image = lambda request, _: odd.get(by_request[request])
        audited = restyle("audit", tmp_path / "out")
        assert audited.code == 3
        assert "restyle audit --repair" in audited.out
        repaired = restyle("audit", tmp_path / "out", "--repair", quick=True)
        assert repaired.code == 3
        assert "3 images downloaded again, 2 not available" in repaired.out
        assert "different bytes" in repaired.out
        for name in ("missing", "shorter", "same_size", "whole"):
            assert paths[name].read_bytes() == before[name], name
        assert not paths["gone"].exists()
        service.image = lambda _, __: None
        assert restyle("audit", tmp_path / "out", "--repair", quick=True).code == 0
        assert restyle("audit", tmp_path / "out").code == 0
        assert service.posts == len(names)


def test_audit_repair_asks_the_result_for_a_fresh_url(tmp_path):
    """The stored URL has expired; the target has the image under another one."""
    with odd_service() as service:
        ((row,), _) = run(tmp_path, service)
        path = tmp_path / "out" / row["images"][0]["path"]
        path.unlink()
        moved = service.ok("request-1") | {"images": [{"url": f"{service.url}/files/moved.jpg"}]}
        service.inputs["moved"] = service.inputs["request-1"]
        service.result = lambda _, __: answer(moved)
        service.image = lambda request, _: answer({}, 404) if request == "request-1" else None
        assert restyle("audit", tmp_path / "out", "--repair", quick=True).code == 0
        assert path.exists()
