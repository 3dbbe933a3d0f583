"""Compare two checkouts in turn (A B A B) on scenarios (a), (c), (e) and (g): medians of wall and CPU, and their ratio.

    python -m tests.benchmarks.ab OTHER_CHECKOUT [--rounds 5] [--only a,c,e,g]

Both use this checkout's stand-in server and this Python environment. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks.bench_data import jpeg
from tests.benchmarks.harness import PYTHON, REPOSITORY, Measured, in_turn, measured, median, standin, write_manifest

JOBS = {"a": 20_000, "c": 1_000, "e": 5_000, "g": 200_000}


def command(checkout: Path, *arguments: str) -> Measured:
    """One whole `restyle` command of a checkout."""
    return measured("env", f"PYTHONPATH={checkout}", PYTHON, "-m", "batch", *arguments)


def run(checkout: Path, folder: Path, manifest: Path, url: str, *options: str) -> Measured:
    """`restyle run` into a fresh folder."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    return command(checkout, "run", str(manifest), "-o", str(out), "--target", url, "--quiet", *options)


@contextmanager
def scenario(name: str) -> Iterator[dict[str, Callable[[Path], Measured]]]:
    """Yield the figures of one scenario, by title."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        manifest = write_manifest(folder / "m.csv", JOBS[name])
        if name == "a":
            url = stack.enter_context(standin()).url
            yield {"(a) instant service": lambda tree: run(tree, folder, manifest, url, "--no-download")}
        elif name == "c":
            url = stack.enter_context(standin("--service-time", "5")).url
            options = ("--no-download", "--max-in-flight", "1000")
            yield {"(c) 1,000 in flight, 5 s": lambda tree: run(tree, folder, manifest, url, *options)}
        elif name == "e":
            (folder / "image.jpg").write_bytes(jpeg(768, 75))
            url = stack.enter_context(standin("--image", str(folder / "image.jpg"))).url
            yield {"(e) images": lambda tree: run(tree, folder, manifest, url, "--max-in-flight", "64")}
        else:
            yield rows(folder, manifest, stack.enter_context(standin()).url)


def rows(folder: Path, manifest: Path, url: str) -> dict[str, Callable[[Path], Measured]]:
    """(g): plan, resume with all done, export; each checkout fills a journal of its own."""
    filled: set[Path] = set()

    def directory(tree: Path) -> Path:
        out = folder / f"run-{abs(hash(tree))}"
        if tree not in filled:
            words = ("run", str(manifest), "-o", str(out), "--target", url, "--no-download", "--limit", "1")
            command(tree, *words)
            fill = [PYTHON, "-m", "tests.benchmarks.bench_data", str(manifest), str(out), url]
            subprocess.run(["env", f"PYTHONPATH={tree}", *fill], cwd=tree, check=True)
            command(tree, *words[:-2])
            filled.add(tree)
        return out

    def resume(tree: Path) -> Measured:
        out = directory(tree)
        return command(tree, "run", str(manifest), "-o", str(out), "--target", url, "--no-download", "--quiet")

    return {
        "(g) plan": lambda tree: command(tree, "plan", str(manifest), "--target", url),
        "(g) resume, all done": resume,
        "(g) export": lambda tree: command(tree, "export", str(directory(tree)), "-o", str(folder / "t.parquet")),
    }


def main() -> None:
    """Print one line per figure."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ab", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="a,c,e,g")
    given = parser.parse_args()
    other = given.other.resolve()
    for name in given.only.split(","):
        with scenario(name) as figures:
            for title, carry_out in figures.items():
                carry_out(other), carry_out(REPOSITORY)  # warm: files, journals, compiled modules
                found = in_turn(given.rounds, other=partial(carry_out, other), this=partial(carry_out, REPOSITORY))
                for what in ("wall", "cpu"):
                    was, now = ([getattr(one, what) for one in found[side]] for side in ("other", "this"))
                    pairs = median([new / old for old, new in zip(was, now, strict=True)])
                    line = f"{title:<28}{what:<5} {median(was):8.2f} s -> {median(now):8.2f} s"
                    print(f"{line}   median ratio {pairs:.3f}", flush=True)


if __name__ == "__main__":
    main()
