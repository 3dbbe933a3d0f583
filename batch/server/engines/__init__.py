"""What the endpoint executes: preview (no model), echo (rehearsal), flux (FLUX.1 [dev] on one's own devices).

This package stays light: an engine's libraries are imported when that engine is asked for.
"""

from __future__ import annotations

from batch.server.engines.base import Engine
from batch.server.engines.flux.options import FluxOptions

__all__ = ["ENGINES", "engine_of"]

ENGINES = ("preview", "echo")
"""The engines that need nothing; `flux` needs a model."""


def engine_of(
    name: str, slots: int | None = None, service_time: float = 0.0, flux: FluxOptions | None = None
) -> Engine:
    """The engine of that name, not started yet.

    Args:
        name: one of `ENGINES`, or `flux`.
        slots: jobs that it executes at once; None: one a core for `preview`, 32 for `echo`.
        service_time: seconds that each `echo` job takes; the others take what they take.
        flux: what `flux` is to run, and where.

    Raises:
        ValueError: no engine has that name, or `flux` shall not run as many jobs as it has devices.
        InputError: the model cannot be used; see `batch.server.engines.flux.engine.open_engine`.
    """
    if name == "preview":
        from batch.server.engines.preview.engine import PreviewEngine

        return PreviewEngine(slots)
    if name == "echo":
        from batch.server.engines.echo import EchoEngine

        return EchoEngine(service_time, slots)
    if name == "flux" and flux is not None:
        from batch.server.engines.flux.engine import open_engine

        if slots not in {None, len(flux.devices)}:
            raise ValueError(f"the engine flux executes one request a device, not {slots}; leave --slots out")
        return open_engine(flux)
    known = f"it is one of {', '.join(ENGINES)}, or flux with a model (--engine flux --model DIR)"
    raise ValueError(f"{name!r} is no engine; {known}")
