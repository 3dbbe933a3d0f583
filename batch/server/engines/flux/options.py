"""What the flux engine may be told, checked. Pure: knows neither disk nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from batch.errors import ConfigError

__all__ = ["FluxOptions", "Offload"]

Offload: TypeAlias = Literal["none", "model", "sequential"]
_DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_SIDES_PX = (16, 4096)


@dataclass(frozen=True, slots=True)
class FluxOptions:
    """How to run FLUX.1 [dev].

    Raises:
        ConfigError: a value is none, or two do not go together.
    """

    model: str
    """A folder with the model as diffusers lays it out, or a hub id: `black-forest-labs/FLUX.1-dev`."""
    devices: tuple[str, ...] = ("cuda:0",)
    """`cpu` or `cuda:N`; one worker process each, with the whole model."""
    safety_checker: str | None = None
    """A folder or a hub id; None: nothing is checked."""
    quantize: Literal["fp8"] | None = None
    offload: Offload = "none"
    """What waits in main memory: `model` all parts but the one that works, `sequential` all layers but one."""
    warm_up: tuple[tuple[int, int], ...] | None = None
    """Widths and heights rendered before the first request; None: 1024x1024 on a GPU, nothing on a CPU."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("the engine flux needs a model: --model DIR, or --model black-forest-labs/FLUX.1-dev")
        if not self.devices:
            raise ConfigError("the engine flux needs a device: --devices cuda:0,cuda:1 or --devices cpu")
        for device in self.devices:
            if not _DEVICE.fullmatch(device):
                raise ConfigError(f"{device!r} is no device; say for instance --devices cuda:0,cuda:1 or --devices cpu")
        if self.quantize not in {None, "fp8"}:
            raise ConfigError(f"{self.quantize!r} is no quantization; there is --quantize fp8")
        if self.offload not in get_args(Offload):
            raise ConfigError(f"{self.offload!r} is no way to offload; say --offload {'|'.join(get_args(Offload))}")
        on_cpu = "cpu" in self.devices
        if on_cpu and set(self.devices) != {"cpu"}:
            raise ConfigError("CPU and GPU compute with other numbers and would give other images; name one kind only")
        if on_cpu and self.offload != "none":
            raise ConfigError(f"--offload {self.offload} saves a GPU's memory and means nothing with --devices cpu")
        if on_cpu and self.quantize:
            raise ConfigError("--quantize fp8 needs a GPU that computes in fp8, and means nothing with --devices cpu")
        if self.quantize and self.offload != "none":
            raise ConfigError("--quantize fp8 and --offload do not go together; a quantized model needs less memory")

    @classmethod
    def of_flags(
        cls,
        model: str | None,
        devices: str | None = None,
        safety_checker: str | None = None,
        quantize: str | None = None,
        offload: str | None = None,
        warm_up: str | None = None,
    ) -> FluxOptions | None:
        """The options as a command line gives them, lists with commas; None where not one of them was given.

        Raises:
            ConfigError: see there; and a flag without a model.
        """
        given = (model, devices, safety_checker, quantize, offload, warm_up)
        if all(value is None for value in given):
            return None
        return cls(
            model=model or "",
            devices=("cuda:0",) if devices is None else tuple(_words(devices)),
            safety_checker=safety_checker,
            quantize=cast(Any, quantize),  # checked at construction
            offload=cast(Any, offload or "none"),
            warm_up=None if warm_up is None else tuple(map(_size, _words(warm_up, none="none"))),
        )


def _words(text: str, none: str = "") -> list[str]:
    return [] if text.strip() == none else [word.strip() for word in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    least, most = _SIDES_PX
    if not all(least <= side <= most for side in sides):
        raise ConfigError(f"{text!r} is no size from {least} to {most} px; say --warm-up 1024x1024,768x1344, or none")
    return sides
