"""Engines of the endpoint: preview (filters, no model), echo (rehearsal) and flux (FLUX.1 [dev] on local devices).

Importing this package is cheap: the libraries of an engine are imported only when that engine is created.
"""

from __future__ import annotations

from batch.server.engines.base import Engine
from batch.server.engines.flux.options import FluxOptions

__all__ = ["ENGINES", "engine_of"]

ENGINES = ("preview", "echo")
"""Engines that need no model. `flux` is the third engine and needs one."""


def engine_of(
    name: str, slots: int | None = None, service_time: float = 0.0, flux: FluxOptions | None = None
) -> Engine:
    """Create an engine by name. It is not started yet.

    Args:
        name: one of `ENGINES`, or `flux`.
        slots: concurrent jobs; None: one per core for `preview`, 32 for `echo`, one per device for `flux`.
        service_time: simulated seconds per job; only `echo` uses it.
        flux: model and devices; required for `flux`.

    Raises:
        ValueError: unknown name, `flux` without its options, or `slots` other than the number of flux devices.
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
            devices = len(flux.devices)
            raise ValueError(f"invalid --slots {slots}: engine flux runs one request per device ({devices}); omit it")
        return open_engine(flux)
    known = f"use {', '.join(ENGINES)}, or flux with a model (--engine flux --model DIR)"
    raise ValueError(f"unknown engine {name!r}: {known}")
