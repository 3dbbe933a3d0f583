"""Options of the flux engine and their validation. Pure: no disk access, no torch."""

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
        ConfigError: a value is invalid, or two values contradict each other.
    """

    model: str
    """A model folder in the layout of diffusers, or a hub id such as `black-forest-labs/FLUX.1-dev`."""
    devices: tuple[str, ...] = ("cuda:0",)
    """`cpu` or `cuda:N`; each gets one worker process with the whole model."""
    safety_checker: str | None = None
    """A folder or a hub id; None: images are not checked."""
    quantize: Literal["fp8"] | None = None
    offload: Offload = "none"
    """Content of main memory: with `model` all parts except the active one, with `sequential` all layers except one."""
    warm_up: tuple[tuple[int, int], ...] | None = None
    """Sizes (width, height) rendered before the first request; None: 1024x1024 on a GPU, nothing on a CPU."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("the engine flux needs a model: --model DIR, or --model black-forest-labs/FLUX.1-dev")
        if not self.devices:
            raise ConfigError("the engine flux needs a device: --devices cuda:0,cuda:1 or --devices cpu")
        for device in self.devices:
            if not _DEVICE.fullmatch(device):
                raise ConfigError(f"invalid device {device!r}: use --devices cpu, or GPUs such as cuda:0,cuda:1")
        if self.quantize not in {None, "fp8"}:
            raise ConfigError(f"invalid --quantize {self.quantize!r}: use fp8")
        if self.offload not in get_args(Offload):
            raise ConfigError(f"invalid --offload {self.offload!r}: use {', '.join(get_args(Offload))}")
        on_cpu = "cpu" in self.devices
        if on_cpu and set(self.devices) != {"cpu"}:
            raise ConfigError("--devices mixes CPU and GPU, which produce different images; use only one kind")
        if on_cpu and self.offload != "none":
            raise ConfigError(f"--offload {self.offload} has no effect with --devices cpu; omit it")
        if on_cpu and self.quantize:
            raise ConfigError("--quantize fp8 needs a GPU and does not work with --devices cpu; omit it")
        if self.quantize and self.offload != "none":
            raise ConfigError(f"--quantize fp8 and --offload {self.offload} cannot be combined; omit one of them")

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
        """Parse command line values, with lists separated by commas. Return None if no flag is set.

        Raises:
            ConfigError: a value is invalid, values contradict each other, or `model` is missing.
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
        limits = f"{least} to {most} px per side"
        raise ConfigError(f"invalid --warm-up size {text!r}: use sizes such as 1024x1024,768x1344 ({limits}), or none")
    return sides
