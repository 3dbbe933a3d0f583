"""GPU optimizations, as far as a CPU can test them: the same images, and a fallback if one fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batch.server.engines.base import NotReady
from batch.server.engines.flux import renderer as renderer_module
from batch.server.engines.flux import tuning
from batch.server.engines.flux.errors import RenderError, render_error_of
from batch.server.engines.flux.loading import LoadedModel, Setup
from batch.server.engines.flux.renderer import FluxRenderer
from tests.flux import tiny
from tests.flux.rendering import job, pixels, rendered

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipeline():
    """A private copy of the tiny model, which the test may change."""
    made = tiny.build()
    made.set_progress_bar_config(disable=True)
    yield made
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def tuned(pipeline, monkeypatch):
    """A renderer that treats this pipeline as tuned for a GPU."""
    model = LoadedModel(pipeline, None, torch.device("cpu"), tuned=True)
    monkeypatch.setattr(renderer_module, "load", lambda _: model)
    return FluxRenderer(Setup("nowhere", "tiny, revision 1", "cpu", warm_up=((256, 256),)))


def rendered_image(renderer, **inputs):
    return pixels(rendered(renderer, job(**inputs)).images[0]).astype(int)


def test_fused_projections_and_channels_last_keep_the_image(pipeline, tuned, renderer):
    """Images are equal up to rounding, and the unfused projections are freed."""
    before = sum(weight.numel() for weight in pipeline.transformer.parameters())
    tuning.fuse_projections(pipeline.transformer)
    tuning.channels_last(pipeline.vae)
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) == before
    assert np.abs(rendered_image(tuned) - rendered_image(renderer)).max() <= 2


def test_compiled_blocks_are_full_graphs_and_acceleration_bypasses_them(pipeline, tuned):
    """Each kind of block is one graph; accelerated requests do not use the graphs."""
    before, accelerated = rendered_image(tuned), rendered_image(tuned, acceleration="high")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    tuning.compile_blocks(pipeline.transformer, backend=backend)
    assert np.abs(rendered_image(tuned) - before).max() <= 1
    compiled = len(graphs)
    assert compiled >= 2, "two kinds of blocks"
    assert np.abs(rendered_image(tuned, acceleration="high") - accelerated).max() <= 1
    assert np.abs(rendered_image(tuned) - before).max() <= 1
    assert len(graphs) == compiled, "accelerated requests must not compile again"


def test_a_compiler_that_fails_is_disabled(pipeline, tuned, renderer, caplog):
    """The warm-up detects it, logs a warning and continues without compiled blocks."""

    def backend(*_):
        raise RuntimeError("no kernel image is available")

    tuning.compile_blocks(pipeline.transformer, backend=backend)
    assert np.abs(rendered_image(tuned) - rendered_image(renderer)).max() <= 2
    assert "without compiled blocks" in caplog.text


def test_a_failed_warm_up_is_not_ready(pipeline, tuned):
    """If memory is too small for a warm-up size, the worker accepts no request."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")

    pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(NotReady) as caught:
        tuned.model()
    message = str(caught.value)
    assert message.startswith("cpu ran out of memory during the warm-up")
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.)" in message
    assert "\n" not in message
    assert "--offload" not in message, "it has no effect on a CPU"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RenderError.MEMORY),
        (MemoryError(), RenderError.MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            RenderError.MEMORY,
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RenderError.MEMORY,
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), RenderError.LOST),
        (torch.AcceleratorError("CUDA error: out of memory"), RenderError.MEMORY),
        (RuntimeError("CUDA error: unspecified launch failure"), RenderError.LOST),
        (RuntimeError("CUDA driver error: device is lost"), RenderError.LOST),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), RenderError.OTHER),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RenderError.OTHER),
        (ValueError("CUDA error: a quotation"), RenderError.OTHER),
    ],
)
def test_torch_errors_are_classified(error, kind):
    """Out of memory fails the request, a lost device ends the process, anything else is a bug."""
    assert render_error_of(error) is kind


def test_the_installed_torch_raises_the_expected_out_of_memory_error():
    """The pattern matches the message of the installed version."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert render_error_of(caught.value) is RenderError.MEMORY
