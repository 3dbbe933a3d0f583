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
    """The flags of the engine `flux`; `batch.server.engines.flux.options` checks them."""

    model: Annotated[str | None, Parameter(help="folder with FLUX.1 [dev], or its Hugging Face id", group=FLUX)] = None
    devices: Annotated[
        str | None,
        Parameter(help="one worker per device: cuda:0,cuda:1 (default cuda:0) or cpu", group=FLUX),
    ] = None
    safety_checker: Annotated[
        str | None, Parameter(help="folder or Hugging Face id of a safety checker; default: no check", group=FLUX)
    ] = None
    quantize: Annotated[
        Literal["fp8"] | None, Parameter(help="compute in 8 bits: faster, half the memory", group=FLUX)
    ] = None
    offload: Annotated[
        Literal["none", "model", "sequential"] | None,
        Parameter(help="keep idle parts of the model in main memory, for small GPUs", group=FLUX),
    ] = None
    warm_up: Annotated[
        str | None, Parameter(help="image sizes to render at startup: 1024x1024,768x1344 or none", group=FLUX)
    ] = None


_NO_FLUX = FluxFlags()


def serve(
    *,
    host: Annotated[str, Parameter(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="port; 0 picks a free one")] = 8787,
    engine: Annotated[Literal["preview", "echo", "flux"], Parameter(help="engine that executes requests")] = "preview",
    flux: FluxFlags = _NO_FLUX,
    data_dir: Annotated[Path, Parameter(help="folder for the queue and its files")] = Path("restyle-data"),
    slots: Annotated[int | None, Parameter(help="requests executed at once")] = None,
    service_time: Annotated[str, Parameter(help="simulated time per request (echo engine), for example 2s")] = "0",
    price: Annotated[float, Parameter(help="US dollars per megapixel that the platform API reports")] = 0.0,
    faults: Annotated[Path | None, Parameter(help="faults file: failures to inject")] = None,
    keys: Annotated[Path | None, Parameter(help="API key file")] = None,
    retention: Annotated[str, Parameter(help="how long to keep results and files, for example 30d")] = "30d",
    tls_cert: Annotated[Path | None, Parameter(help="TLS certificate (PEM): serve https")] = None,
    tls_key: Annotated[Path | None, Parameter(help="TLS private key (PEM)")] = None,
    new_key: Annotated[
        str | None, Parameter(help="create a key with this name in the key file, print it and exit")
    ] = None,
    allow_private: Annotated[
        bool, Parameter(negative="", help="allow loopback and private addresses for sources and webhooks")
    ] = False,
) -> int:
    """Serve the endpoint on this machine: fal's API, free."""
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
    """Print the key alone to standard output, for scripts. It is shown once."""
    import secrets

    from batch.server.http.auth import add_key

    if path is None:
        return fail(f"--new-key {name} needs --keys FILE to store the key's hash", ExitCode.BAD_INPUT)
    print_result(add_key(path, name, secrets.token_urlsafe(32)))
    print(f"stored as a hash in {path}; give the key to {name} as FAL_KEY, it cannot be shown again", file=sys.stderr)
    return ExitCode.COMPLETE


def _seconds(flag: str, text: str) -> float:
    """Parse a duration flag of `serve`.

    Raises:
        ConfigError: the text is not a duration.
    """
    from batch.config import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    assert isinstance(seconds, float), "of a text"
    return seconds
