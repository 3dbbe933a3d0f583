"""The command `restyle serve`: its flags, checked, and the endpoint behind them."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from batch.cli.process import begin
from batch.cli.streams import fail, print_result
from batch.errors import ConfigError, ExitCode
from batch.system.paths import at_home

__all__ = ["serve"]

FLUX = Group("Engine flux", sort_key=4)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class FluxFlags:
    """What the engine `flux` runs, and where; `batch.server.engines.flux.options` checks them."""

    model: Annotated[str | None, Parameter(help="folder with FLUX.1 [dev], or its hub id", group=FLUX)] = None
    devices: Annotated[
        str | None,
        Parameter(help="a worker with the whole model each: cuda:0,cuda:1 (default cuda:0) or cpu", group=FLUX),
    ] = None
    safety_checker: Annotated[
        str | None, Parameter(help="folder or hub id; without one nothing is checked", group=FLUX)
    ] = None
    quantize: Annotated[
        Literal["fp8"] | None, Parameter(help="compute in 8 bits: faster, half the memory", group=FLUX)
    ] = None
    offload: Annotated[
        Literal["none", "model", "sequential"] | None,
        Parameter(help="keep what does not work just now in main memory, for small cards", group=FLUX),
    ] = None
    warm_up: Annotated[
        str | None, Parameter(help="sizes rendered at the start: 1024x1024,768x1344 or none", group=FLUX)
    ] = None


_NO_FLUX = FluxFlags()


def serve(
    *,
    host: Annotated[str, Parameter(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes any free one")] = 8787,
    engine: Annotated[Literal["preview", "echo", "flux"], Parameter(help="what executes requests")] = "preview",
    flux: FluxFlags = _NO_FLUX,
    data_dir: Annotated[Path, Parameter(help="queue and files live here")] = Path("restyle-data"),
    slots: Annotated[int | None, Parameter(help="requests executed at once")] = None,
    service_time: Annotated[str, Parameter(help="of the echo engine: 2s")] = "0",
    price: Annotated[float, Parameter(help="US dollars a megapixel, as its platform API tells it")] = 0.0,
    faults: Annotated[Path | None, Parameter(help="commit the faults of this file on purpose")] = None,
    keys: Annotated[Path | None, Parameter(help="file with the keys of those who may ask")] = None,
    retention: Annotated[str, Parameter(help="how long finished results and files stay: 30d")] = "30d",
    tls_cert: Annotated[Path | None, Parameter(help="PEM file of a certificate: https instead of http")] = None,
    tls_key: Annotated[Path | None, Parameter(help="PEM file of its key")] = None,
    new_key: Annotated[str | None, Parameter(help="add a key of that name to the keys file, show it and end")] = None,
    allow_private: Annotated[
        bool, Parameter(negative="", help="fetch from, and call, loopback and private addresses too")
    ] = False,
) -> int:
    """Run the endpoint on this machine: the same API as fal's, nothing to pay."""
    from batch.server.engines.flux.options import FluxOptions
    from batch.server.http.auth import load_keys
    from batch.server.serve import ServeOptions, run_server

    begin()
    faults, keys, tls_cert, tls_key = (path and at_home(path) for path in (faults, keys, tls_cert, tls_key))
    if new_key is not None:
        return _new_key(keys, new_key)
    options = ServeOptions(
        data_dir=at_home(data_dir), host=host, port=port, engine=engine, slots=slots,
        service_time=_seconds("--service-time", service_time), price_usd=price, faults=faults,
        keys=load_keys(keys, os.environ), allow_private=allow_private,
        retention=_seconds("--retention", retention), tls_cert=tls_cert, tls_key=tls_key,
        flux=FluxOptions.of_flags(**asdict(flux)),
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run_server(options, ready=lambda url: print(f"serving {engine} at {url}  (Ctrl-C stops)", flush=True))
    return ExitCode.COMPLETE


def _new_key(path: Path | None, name: str) -> int:
    """The key alone goes to standard output, for a script to catch; it is shown this once."""
    import secrets

    from batch.server.http.auth import add_key

    if path is None:
        return fail(f"--new-key {name} needs --keys FILE, where its hash is kept", ExitCode.BAD_INPUT)
    print_result(add_key(path, name, secrets.token_urlsafe(32)))
    print(f"kept as a hash in {path}; give the key to {name} as FAL_KEY, it cannot be shown again", file=sys.stderr)
    return ExitCode.COMPLETE


def _seconds(flag: str, text: str) -> float:
    """A duration of `serve`, which has no settings that would name its place.

    Raises:
        ConfigError: it is none.
    """
    from batch.config import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    assert isinstance(seconds, float), "of a text"
    return seconds
