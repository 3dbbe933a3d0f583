"""Flags of the flux engine: parsing, defaults and validation."""

from __future__ import annotations

import importlib.util

import pytest

from batch.errors import ConfigError, InputError
from batch.server.engines import engine_of
from batch.server.engines.flux.options import FluxOptions


def test_no_flags_give_no_options():
    """The other engines have no model flags."""
    assert FluxOptions.of_flags(None) is None


def test_flags_become_options():
    """Lists are separated by commas; missing flags have their defaults."""
    assert FluxOptions.of_flags("m") == FluxOptions("m", ("cuda:0",), None, None, "none", None)
    given = FluxOptions.of_flags("m", "cuda:0, cuda:1", "s", "fp8", None, "1024x1024, 768x1344")
    assert given == FluxOptions("m", ("cuda:0", "cuda:1"), "s", "fp8", "none", ((1024, 1024), (768, 1344)))
    assert FluxOptions.of_flags("m", "cpu", warm_up="none").warm_up == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": None, "devices": "cpu"}, ["--model"]),
        ({"devices": "gpu"}, ["'gpu'", "--devices cpu", "cuda:0"]),
        ({"devices": ""}, ["needs a device", "--devices"]),
        ({"devices": "cpu,cuda:0"}, ["--devices", "CPU and GPU"]),
        ({"devices": "cpu", "offload": "model"}, ["--offload model", "--devices cpu"]),
        ({"devices": "cpu", "quantize": "fp8"}, ["--quantize fp8", "--devices cpu"]),
        ({"quantize": "int3"}, ["--quantize", "'int3'", "use fp8"]),
        ({"offload": "disk"}, ["--offload", "'disk'", "none, model, sequential"]),
        ({"quantize": "fp8", "offload": "model"}, ["--quantize fp8", "--offload model"]),
        ({"warm_up": "1024"}, ["--warm-up", "'1024'", "1024x1024"]),
        ({"warm_up": "9x99999"}, ["'9x99999'", "16 to 4096 px"]),
    ],
)
def test_invalid_flags_are_rejected(flags, words):
    """The message contains the flag, the value and valid values."""
    with pytest.raises(ConfigError) as caught:
        FluxOptions.of_flags(**{"model": "m", **flags})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_slots_must_equal_the_number_of_devices(tmp_path):
    """Another number is rejected before the model is checked."""
    with pytest.raises(ValueError, match="invalid --slots 3: "):
        engine_of("flux", slots=3, flux=FluxOptions(str(tmp_path), ("cpu",)))
    with pytest.raises(InputError, match=r"model_index\.json is missing"):
        engine_of("flux", flux=FluxOptions(str(tmp_path), ("cpu",)))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed here")
def test_quantization_without_torchao_is_rejected(models):
    """The error comes before anything is loaded."""
    with pytest.raises(InputError, match="pip install torchao"):
        engine_of("flux", flux=FluxOptions(str(models / "plain"), quantize="fp8"))
