"""Flags of the engine: what is given, what goes together, what is refused in one sentence."""

from __future__ import annotations

import importlib.util

import pytest

from batch.errors import ConfigError, InputError
from batch.server.engines import engine_of
from batch.server.engines.flux.options import FluxOptions


def test_no_flag_is_no_engine():
    """The other engines are asked for without a word about models."""
    assert FluxOptions.of_flags(None) is None


def test_flags_become_options():
    """Lists with commas; what is not given has its default."""
    assert FluxOptions.of_flags("m") == FluxOptions("m", ("cuda:0",), None, None, "none", None)
    given = FluxOptions.of_flags("m", "cuda:0, cuda:1", "s", "fp8", None, "1024x1024, 768x1344")
    assert given == FluxOptions("m", ("cuda:0", "cuda:1"), "s", "fp8", "none", ((1024, 1024), (768, 1344)))
    assert FluxOptions.of_flags("m", "cpu", warm_up="none").warm_up == ()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model": None, "devices": "cpu"}, "needs a model"),
        ({"devices": "gpu"}, "'gpu' is no device"),
        ({"devices": ""}, "needs a device"),
        ({"devices": "cpu,cuda:0"}, "name one kind only"),
        ({"devices": "cpu", "offload": "model"}, "means nothing with --devices cpu"),
        ({"devices": "cpu", "quantize": "fp8"}, "means nothing with --devices cpu"),
        ({"quantize": "int3"}, "'int3' is no quantization"),
        ({"offload": "disk"}, "none|model|sequential"),
        ({"quantize": "fp8", "offload": "model"}, "do not go together"),
        ({"warm_up": "1024"}, "'1024' is no size"),
        ({"warm_up": "9x99999"}, "is no size"),
    ],
)
def test_what_cannot_be_is_refused(flags, said):
    """With the flag that would do."""
    with pytest.raises(ConfigError) as caught:
        FluxOptions.of_flags(**{"model": "m", **flags})
    assert said in str(caught.value)


def test_one_request_a_device(tmp_path):
    """Slots are the devices; another number is refused before the model is looked for."""
    with pytest.raises(ValueError, match="one request a device, not 3"):
        engine_of("flux", slots=3, flux=FluxOptions(str(tmp_path), ("cpu",)))
    with pytest.raises(InputError, match="is no model folder"):
        engine_of("flux", flux=FluxOptions(str(tmp_path), ("cpu",)))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed here")
def test_quantizing_without_its_library_is_said_at_once(models):
    """Before anything is loaded."""
    with pytest.raises(InputError, match="pip install torchao"):
        engine_of("flux", flux=FluxOptions(str(models / "plain"), quantize="fp8"))
