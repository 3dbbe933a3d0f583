"""What is switched on for a GPU, as far as a CPU can tell: the same images, and a way back where it does not work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batch.server.engines.base import NotReady
from batch.server.engines.flux import renderer as renderer_module
from batch.server.engines.flux import tuning
from batch.server.engines.flux.errors import RenderError, render_error_of
from batch.server.engines.flux.loading import Model, Setup
from batch.server.engines.flux.renderer import FluxRenderer
from tests.flux import tiny
from tests.flux.rendering import job, pixels, rendered

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pipeline():
    """The weights of the other tests' model, to be changed."""
    made = tiny.build()
    made.set_progress_bar_config(disable=True)
    yield made
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def tuned(pipeline, monkeypatch):
    """A renderer that takes this pipeline for one that was tuned for a GPU."""
    model = Model(pipeline, None, torch.device("cpu"), tuned=True)
    monkeypatch.setattr(renderer_module, "load", lambda _: model)
    return FluxRenderer(Setup("nowhere", "tiny, revision 1", "cpu", warm_up=((256, 256),)))


def rendered_image(renderer, **inputs):
    return pixels(rendered(renderer, job(**inputs)).images[0]).astype(int)


def test_fused_projections_and_channels_last_paint_the_same(pipeline, tuned, renderer):
    """But for rounding; and the projections that are no longer needed are given up."""
    before = sum(weight.numel() for weight in pipeline.transformer.parameters())
    tuning.fuse_projections(pipeline.transformer)
    tuning.channels_last(pipeline.vae)
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) == before
    assert np.abs(rendered_image(tuned) - rendered_image(renderer)).max() <= 2


def test_compiled_blocks_are_whole_graphs_and_leave_acceleration_alone(pipeline, tuned):
    """Each kind of block is one graph; accelerated requests go around the graphs."""
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
    assert len(graphs) == compiled, "and compile nothing anew"


def test_a_compiler_that_fails_is_done_without(pipeline, tuned, renderer, caplog):
    """Found by the warm-up, told in the log; slower is better than not at all."""

    def backend(*_):
        raise RuntimeError("no kernel image is available")

    tuning.compile_blocks(pipeline.transformer, backend=backend)
    assert np.abs(rendered_image(tuned) - rendered_image(renderer)).max() <= 2
    assert "without compiled blocks" in caplog.text


def test_a_warm_up_that_cannot_be_done_is_one_sentence(pipeline, tuned):
    """Too little memory for a size that was named: no request is taken."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")

    pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(NotReady) as caught:
        tuned.model()
    said = "cpu ran out of memory in the warm-up (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert str(caught.value) == f"{said}; a smaller image needs less"


@pytest.mark.parametrize(
    ("error", "trouble"),
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
        (ValueError("CUDA error: somebody quotes it"), RenderError.OTHER),
    ],
)
def test_what_an_error_of_torch_means(error, trouble):
    """Memory: this request. A lost device: this process. Anything else: a defect."""
    assert render_error_of(error) is trouble


def test_torch_really_raises_so_when_memory_runs_out():
    """The words that are looked for are those of this version."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert render_error_of(caught.value) is RenderError.MEMORY
