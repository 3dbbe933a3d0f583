"""What makes the pipeline faster, each a function of its own, so that a benchmark can switch them on one by one.

None of them is used on a CPU. All change the last digits of an image, none what it shows, but for the first-block
cache, which a request asks for (`acceleration`). Runs inside a worker process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any, Literal

__all__ = [
    "THRESHOLDS",
    "accelerated",
    "channels_last",
    "compile_blocks",
    "fast_attention",
    "fuse_projections",
    "quantize_fp8",
    "tune",
    "untune",
]

THRESHOLDS = {"regular": 0.08, "high": 0.12}
"""Of the first-block cache: how much the first block's part may differ, relative to the step before, for the rest of
the transformer to be left out. 0.08 and 0.12 are what the method's authors use for FLUX.1 [dev]
(https://github.com/chengzeyi/ParaAttention); what fal uses for these words is not published."""
_HOPPER = (9, 0)
_LEAST_FP8_FEATURES = 1024
"""Smaller linear layers (embeddings, the last one) stay as they are: little time, much of the image."""
_log = logging.getLogger(__name__)


def tune(part: str, module: Any, *, fp8: bool) -> None:
    """Everything that suits a part of the pipeline on a GPU which holds the whole model; the order matters."""
    if part == "vae":
        channels_last(module)
    elif part == "transformer":
        fuse_projections(module)
        if fp8:
            quantize_fp8(module)
        fast_attention(module)
        compile_blocks(module)


def untune(transformer: Any) -> None:
    """Back to what needs neither compiler nor special kernels; fused and quantized weights stay as they are."""
    import torch

    torch.compiler.set_stance("force_eager")
    with contextlib.suppress(Exception):  # nothing was set
        transformer.reset_attention_backend()


def channels_last(vae: Any) -> None:
    """The order of numbers in memory that convolutions of the VAE like best."""
    import torch

    vae.to(memory_format=torch.channels_last)


def fuse_projections(transformer: Any) -> None:
    """One matrix product for query, key and value instead of three; the three are then given up (4 GB)."""
    from diffusers.models.attention import AttentionModuleMixin

    transformer.fuse_qkv_projections()
    for module in transformer.modules():
        if isinstance(module, AttentionModuleMixin) and getattr(module, "fused_projections", False):
            own = ("to_q", "to_k", "to_v") if hasattr(module, "to_qkv") else ()
            added = ("add_q_proj", "add_k_proj", "add_v_proj") if hasattr(module, "to_added_qkv") else ()
            for name in (*own, *added):
                # Set, not deleted: the module's own code asks whether they are there.
                setattr(module, name, None)


def fast_attention(transformer: Any) -> str:
    """The fastest attention that is there; its name. FlashAttention 3 if installed, else on Hopper that of cuDNN."""
    import torch

    if torch.cuda.get_device_capability(transformer.device) < _HOPPER:
        return "native"
    name = "_flash_3" if importlib.util.find_spec("flash_attn_interface") is not None else "_native_cudnn"
    transformer.set_attention_backend(name)
    return name


def compile_blocks(transformer: Any, **options: Any) -> None:
    """Compile the transformer's two kinds of blocks once each, 10 s at the first image and at the second size.

    Args:
        transformer: whose.
        options: further ones of `torch.compile`.
    """
    transformer.compile_repeated_blocks(fullgraph=True, **options)


def quantize_fp8(transformer: Any) -> None:
    """Weights and activations of the large linear layers in 8 bits, scaled by row; half the memory.

    Needs torchao, and a GPU that computes in fp8 (Ada, Hopper or newer).
    """
    import torch
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def is_large(module: Any, _: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear)
            and min(module.in_features, module.out_features) >= _LEAST_FP8_FEATURES
            and module.weight.dtype is torch.bfloat16
        )

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer, config, filter_fn=is_large)


@contextlib.contextmanager
def accelerated(transformer: Any, acceleration: Literal["none", "regular", "high"]) -> Iterator[None]:
    """Leave out blocks that change little from step to step while one image is made; `none` leaves out nothing.

    The cache is made anew for each image: diffusers' own reset keeps the last residual of the image before
    (`FBCSharedBlockState.reset`, 0.42), and the first step of the next one would be compared with it. Its hooks break
    the graphs of compiled blocks, which therefore run uncompiled meanwhile.
    """
    if acceleration == "none":
        yield
        return
    import torch
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLDS[acceleration]))
    try:
        with torch.compiler.set_stance("force_eager"), transformer.cache_context("img2img"):
            yield
    finally:
        transformer.disable_cache()
