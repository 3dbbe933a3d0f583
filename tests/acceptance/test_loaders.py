"""`results.parquet` loaded by Hugging Face datasets, DuckDB, pandas and polars; case 15."""

from __future__ import annotations

import json
import subprocess
import sys

import polars as pl
import pytest

from tests.acceptance.command import environment, restyle
from tests.acceptance.odd_service import answer, odd_service

LOADERS = {
    "datasets": """
        import datasets
        table = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=cache)
        rows = [table[i] for i in range(len(table))]
    """,
    "duckdb": """
        import duckdb
        found = duckdb.sql(f"select * from read_parquet('{path}')")
        rows = [dict(zip(found.columns, row)) for row in found.fetchall()]
    """,
    "pandas": """
        import pandas
        rows = pandas.read_parquet(path).to_dict("records")
    """,
    "polars": """
        import polars
        rows = polars.read_parquet(path).to_dicts()
    """,
}
"""Code that reads `rows` from the file at `path`, run in separate processes because of threads and warnings."""


def loaded(loader, path, cache):
    """Return statuses, seeds and names of extra timings as the loader reads them."""
    lines = [line.strip() for line in LOADERS[loader].strip().splitlines()]
    code = "\n".join(
        [
            "import json, sys",
            "path, cache = sys.argv[1:]",
            *lines,
            "others = [row['timings_extra'] for row in rows]",
            "extra = [[one['name'] for one in ([] if other is None else other)] for other in others]",
            "seeds = [None if row['seed'] is None else int(row['seed']) for row in rows]",
            "print(json.dumps([[row['status'] for row in rows], seeds, extra]))",
        ]
    )
    env = environment({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache)})
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path), str(cache)], capture_output=True, text=True, env=env, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Results with all-null columns, with mixed columns, and of a sweep."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "m.csv").write_text("image_url,prompt\nhttps://x/a.jpg,good\nhttps://x/b.jpg,bad\nhttps://x/c.jpg,odd\n")
    (folder / "sweep.toml").write_text("[sweep]\nseed = [1, 2]\nstrength = [0.5, 0.9]\n")
    made = {}
    with odd_service(submit=lambda _: answer({"detail": "no"}, 422)) as service:
        restyle("run", folder / "m.csv", "-o", folder / "null", "--target", service.url)
    with odd_service() as service:

        def output(request):
            whole = service.ok(request)
            if whole["prompt"] == "odd":
                whole |= {"seed": None, "timings": {"inference": 0.5, "load": 1.5}, "has_nsfw_concepts": None}
            return whole

        service.output = output
        bad = answer({"detail": [{"loc": ["body"], "msg": "small", "type": "image_too_small"}]}, 422)
        service.result = lambda request, _: bad if service.inputs[request]["prompt"] == "bad" else None
        restyle("run", folder / "m.csv", "-o", folder / "mixed", "--target", service.url)
        restyle("run", folder / "m.csv", "-o", folder / "swept", "-c", folder / "sweep.toml", "--target", service.url)
    for name in ("null", "mixed", "swept"):
        path = folder / name / "results.parquet"
        made[name] = path, pl.read_parquet(path).select("status", "seed", "timings_extra")
    return made


@pytest.mark.parametrize("loader", LOADERS)
def test_case_15_every_loader_reads_every_table(tables, loader, tmp_path):
    """All loaders read the same rows."""
    for path, expected in tables.values():
        extra = [[one["name"] for one in row or []] for row in expected["timings_extra"].to_list()]
        found = loaded(loader, path, tmp_path)
        assert found == [expected["status"].to_list(), expected["seed"].to_list(), extra]
    assert tables["null"][1]["status"].to_list() == ["failed"] * 3
    assert tables["mixed"][1]["status"].to_list() == ["done", "failed", "done"]
    assert tables["swept"][1].height == 12
