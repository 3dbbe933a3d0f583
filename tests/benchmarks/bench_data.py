"""Scenarios (e) downloads, (f) uploads, and (g) plans, resumes and exports of large manifests."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from batch.journal.database import JournalDatabase
from batch.journal.events import Accepted, Answered, Event, Finished, Intended
from batch.types import Answer, Job, RequestId, StoredImage, Ticket
from tests.benchmarks.bench_client import floor
from tests.benchmarks.harness import PYTHON, REPOSITORY, bar, median, restyle, run_of, standin, table, write_manifest

IMAGE_BYTES = 150_000


def jpeg(side: int, quality: int, seed: int = 0) -> bytes:
    """Return a JPEG of noise, which compresses little."""
    noise = np.random.default_rng(seed).integers(0, 255, (side // 4, side // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def downloads(rounds: int, jobs: int = 10_000) -> str:
    """Scenario (e): distinct results of 150 kB, compared with loops that download, hash and write without checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "image.jpg").write_bytes(jpeg(768, 75))
        size = (folder / "image.jpg").stat().st_size
        manifest = write_manifest(folder / "m.csv", jobs)
        ours, bare, whole = [], [], []
        with standin("--image", str(folder / "image.jpg")) as server:
            for _ in range(rounds):
                bare.append(_into(folder, lambda out: floor(server, jobs, "--files", str(out), "--download-only")))
                whole.append(_into(folder, lambda out: floor(server, jobs, "--files", str(out))))
                ours.append(run_of(server, manifest, folder / "run", "--max-in-flight", "64"))
                shutil.rmtree(folder / "run")
    rate, alone, with_requests = (median([jobs / one.wall for one in runs]) for runs in (ours, bare, whole))
    return table(
        ["figure", "measured", "bar", ""],
        [f"`restyle run`, {jobs:,} images of {size / 1000:.0f} kB, synced to disk", f"{rate:,.0f}/s", "", ""],
        ["bare loop: submit, status, result, download, hash, write", f"{with_requests:,.0f}/s", "", ""],
        ["bare loop: download, hash, write", f"{alone:,.0f}/s", "", ""],
        bar("relative to the loop with the same requests", rate / with_requests, 0.7, "x"),
        bar("relative to the loop that only downloads", rate / alone, 0.7, "x"),
    )


def _into(folder: Path, carry_out):
    out = folder / "bare"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        return carry_out(out)
    finally:
        shutil.rmtree(out)


def uploads(count: int = 2_000) -> str:
    """Scenario (f): local images of 1 MB, of which a tenth are copies with other names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image, distinct = jpeg(1400, 96), count * 9 // 10
        for number in range(count):
            note = f"{number % distinct:08}".encode()
            comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
            (folder / f"{number}.jpg").write_bytes(image[:2] + comment + image[2:])
        lines = [f"{number}.jpg,image {number} as a watercolor" for number in range(count)]
        (folder / "m.csv").write_text("image_url,prompt\n" + "\n".join(lines) + "\n")
        with standin() as server:
            run = run_of(server, folder / "m.csv", folder / "run", "--no-download")
            counts = server.counts()
    return table(
        ["figure", "measured", "bar", ""],
        [f"{count:,} local images of {len(image) / 1e6:.1f} MB", f"{run.wall:.1f} s", "", ""],
        ["peak memory", f"{run.peak_mb:.0f} MB", "", ""],
        ["uploads", f"{counts['uploads']:,}", f"{distinct:,}, one per distinct image",
         "kept" if counts["uploads"] == distinct else "**missed**"],
    )  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------


def rows(count: int, *, plan_only: bool = False) -> str:
    """Scenario (g): plan, resume with all jobs done, export. The journal is filled directly, without the service."""
    with tempfile.TemporaryDirectory() as name, standin() as server:
        manifest, run = write_manifest(Path(name) / "m.csv", count), Path(name) / "run"
        found = {"plan": restyle("plan", str(manifest), "--target", server.url)}
        if not plan_only:
            run_of(server, manifest, run, "--no-download", "--limit", "1")  # creates the run directory
            filled = subprocess.run(
                [PYTHON, "-m", "tests.benchmarks.bench_data", str(manifest), str(run), server.url], cwd=REPOSITORY
            )
            assert filled.returncode == 0, "the journal could not be filled"
            again = partial(run_of, server, manifest, run, "--no-download")
            found["resume, results written"] = again()
            found["resume with all done"] = again()
            found["export"] = restyle("export", str(run), "-o", str(Path(name) / "table.parquet"))
            assert server.counts()["submits"] == 1, "all jobs were done, so nothing may be submitted"
    bars = {"plan": 15, "resume with all done": 15, "export": 20} if count == 1_000_000 else {}
    lines = [["", "seconds", "bar", "", "peak MB", "bar", ""]]
    for what, one in found.items():
        _, seconds, *judged = bar("", one.wall, bars.get(what, 0), "", at_most=True)
        size = bar("", one.peak_mb, 400, "", at_most=True)[1:]
        lines.append([f"{count:,} rows: {what}", seconds, *(judged if what in bars else ["", ""]), *size])
    return table(*lines)


def fill(manifest: Path, run: Path, target: str) -> None:
    """Mark every job of a manifest as done, with the journal's writer.

    It runs in a separate process, so that its memory does not count for the commands.
    """
    from batch.config import load_settings
    from batch.manifest.reader import Manifest
    from batch.session import open_planner

    settings = load_settings(None, {"target": {"name": target}, "output": {"download": False}})
    journal = JournalDatabase.open(run / "journal.db", now=0.0, version="benchmark")
    batches = open_planner(Manifest.open(manifest), settings, None).batches()
    jobs = (item.job for batch in batches for item in batch.items if item.job is not None)
    while group := list(islice(jobs, 5_000)):
        known = journal.find([job.key for job in group])
        journal.commit([tuple(_life(job)) for job in group if job.key not in known])
    journal.close(now=1.0)


def _life(job: Job) -> Iterator[Event]:
    key, values = job.key, job.input
    at, ticket = 1_790_000_000.0, Ticket(RequestId(f"019a0000-0000-7000-8000-{key[:12]}"))
    image = {"url": f"http://127.0.0.1:9/files/{key}.jpg", "width": 1024, "height": 768, "content_type": "image/jpeg"}
    output = {"images": [image], "timings": {"inference": 4.2}, "seed": values["seed"], "has_nsfw_concepts": [False],
              "prompt": values["prompt"]}  # fmt: skip
    yield Intended(key, at, 1, orjson.dumps(values), 0.0)
    yield Accepted(key, at + 0.1, ticket)
    yield Answered(key, at + 5, Answer(output, 0.79, "flux"), 0.0, 0.7, 5.0)
    yield Finished(key, at + 6, (StoredImage(**image, path=f"images/{key[:2]}/{key}.jpg", sha256=key),), 0.1)


if __name__ == "__main__":
    fill(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
