"""What the endpoint executes: preview (no model), echo (rehearsal), later flux.

This package stays light: an engine's libraries are imported when that engine is asked for.
"""

from __future__ import annotations

from batch.server.engines.base import Engine

__all__ = ["ENGINES", "engine_of"]

ENGINES = ("preview", "echo")
"""The names that `engine_of` knows."""


def engine_of(name: str, slots: int | None = None, service_time: float = 0.0) -> Engine:
    """The engine of that name, not started yet.

    Args:
        name: one of `ENGINES`.
        slots: jobs that it executes at once; None: one a core for `preview`, 32 for `echo`.
        service_time: seconds that each `echo` job takes; the others take what they take.

    Raises:
        ValueError: no engine has that name.
    """
    if name == "preview":
        from batch.server.engines.preview.engine import PreviewEngine

        return PreviewEngine(slots)
    if name == "echo":
        from batch.server.engines.echo import EchoEngine

        return EchoEngine(service_time, slots)
    raise ValueError(f"{name!r} is no engine; it is one of {', '.join(ENGINES)}")
