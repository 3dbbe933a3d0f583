"""Count the calls between modules that one row causes, from its admission to the results table.

`python -m tests.benchmarks.hops` runs manifests of 4 and of 24 rows with the embedded echo engine and prints the
difference per row: the calls from one module of `batch` to another, and the number of modules. Resumed coroutines do
not count as calls. No module names are hard-coded, so versions with different layouts can be compared.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from batch.api import run_sync

FEW, MANY = 4, 24
_ROOTS = {
    "asyncio.runners",
    "asyncio.base_events",
    "anyio._backends._asyncio",
    "anyio._core._eventloop",
    "threading",
    "concurrent.futures.thread",
}
_RESUMABLE = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Tracer:
    """Counter of the calls between modules of the package, in all threads."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_back is None:
            return
        callee = str(frame.f_globals.get("__name__", ""))
        if not callee.startswith("batch.") or (frame.f_code.co_flags & _RESUMABLE and frame.f_lasti > 10):
            return
        back: FrameType | None = frame.f_back
        while back is not None and not str(back.f_globals.get("__name__", "")).startswith("batch."):
            # Frames of libraries between two modules of `batch` are skipped; an event loop or a thread has no caller.
            back = None if back.f_globals.get("__name__") in _ROOTS else back.f_back
        if back is not None and back.f_globals["__name__"] != callee:
            self.calls[back.f_globals["__name__"], callee] += 1


def traced(rows: int) -> Counter[tuple[str, str]]:
    """Count the calls of one run with `rows` rows."""
    tracer = Tracer()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "manifest.csv")
        lines = [f"https://images.example/{number}.jpg,as a watercolor {number}" for number in range(rows)]
        manifest.write_text("\n".join(["image_url,prompt", *lines]) + "\n", "utf-8")
        threading.setprofile(tracer)
        sys.setprofile(tracer)
        try:
            run_sync(
                manifest,
                Path(folder, "run"),
                settings={"target": {"engine": "echo"}, "limits": {"max_in_flight": 1}},
            )
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]  # documented, but missing in the type stubs
    return tracer.calls


def main() -> None:
    """Print the hops and modules per row, and the pairs with the most calls."""
    traced(1)  # so that imports are not counted
    few, many = traced(FEW), traced(MANY)
    each = {pair: (count - few[pair]) / (MANY - FEW) for pair, count in many.items()}
    each = {pair: count for pair, count in each.items() if count >= 0.5}
    modules = {module for pair in each for module in pair}
    print(f"{sum(each.values()):.0f} hops over {len(modules)} modules for one row")
    for (caller, callee), count in sorted(each.items(), key=lambda item: -item[1])[:20]:
        print(f"{count:8.1f}  {caller} -> {callee}")


if __name__ == "__main__":
    main()
