"""Optimizations of the pipeline, one function each, so that a benchmark can enable them one by one.

They apply to GPUs only. They change the rounding of an image but not its content, except the first-block cache, which
a request enables with `acceleration`. Runs in a worker process.
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
"""Thresholds of the first-block cache, by `acceleration`.

The remaining blocks are skipped if the residual of the first block differs from the previous step by less than this
fraction. The authors of the method use 0.08 and 0.12 for FLUX.1 [dev] (https://github.com/chengzeyi/ParaAttention);
fal's values are not published.
"""
_HOPPER = (9, 0)
_MIN_FP8_FEATURES = 1024
"""Smaller linear layers (embeddings, the last layer) are not quantized: little to gain, large effect on the image."""
_log = logging.getLogger(__name__)


def tune(part: str, module: Any, *, fp8: bool) -> None:
    """Apply all optimizations for a part of the pipeline on a GPU that holds the whole model. The order matters."""
    if part == "vae":
        channels_last(module)
    elif part == "transformer":
        fuse_projections(module)
        if fp8:
            quantize_fp8(module)
        fast_attention(module)
        compile_blocks(module)


def untune(transformer: Any) -> None:
    """Disable compilation and special attention kernels; fused and quantized weights remain."""
    import torch

    torch.compiler.set_stance("force_eager")
    with contextlib.suppress(Exception):  # nothing was set
        transformer.reset_attention_backend()


def channels_last(vae: Any) -> None:
    """Use the channels-last memory layout, which speeds up the convolutions of the VAE."""
    import torch

    vae.to(memory_format=torch.channels_last)


def fuse_projections(transformer: Any) -> None:
    """Compute query, key and value with one matrix product instead of three, and free the three matrices (4 GB)."""
    from diffusers.models.attention import AttentionModuleMixin

    transformer.fuse_qkv_projections()
    for module in transformer.modules():
        if isinstance(module, AttentionModuleMixin) and getattr(module, "fused_projections", False):
            own = ("to_q", "to_k", "to_v") if hasattr(module, "to_qkv") else ()
            added = ("add_q_proj", "add_k_proj", "add_v_proj") if hasattr(module, "to_added_qkv") else ()
            for name in (*own, *added):
                # Set to None instead of deleted, because the module's code reads the attributes.
                setattr(module, name, None)


def fast_attention(transformer: Any) -> str:
    """Select the fastest attention and return its name: FlashAttention 3 or cuDNN on Hopper, native on older GPUs."""
    import torch

    if torch.cuda.get_device_capability(transformer.device) < _HOPPER:
        return "native"
    name = "_flash_3" if importlib.util.find_spec("flash_attn_interface") is not None else "_native_cudnn"
    transformer.set_attention_backend(name)
    return name


def compile_blocks(transformer: Any, **options: Any) -> None:
    """Compile each of the transformer's two kinds of blocks. Takes 10 s at the first image and at the second size.

    Args:
        transformer: the transformer to compile in place.
        options: additional options of `torch.compile`.
    """
    transformer.compile_repeated_blocks(fullgraph=True, **options)


def quantize_fp8(transformer: Any) -> None:
    """Quantize weights and activations of the large linear layers to 8 bits, scaled by row. Halves their memory.

    Needs torchao and a GPU with fp8 support (Ada, Hopper or newer).
    """
    import torch
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def is_large(module: Any, _: str) -> bool:
        return (
            isinstance(module, torch.nn.Linear)
            and min(module.in_features, module.out_features) >= _MIN_FP8_FEATURES
            and module.weight.dtype is torch.bfloat16
        )

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer, config, filter_fn=is_large)


@contextlib.contextmanager
def accelerated(transformer: Any, acceleration: Literal["none", "regular", "high"]) -> Iterator[None]:
    """Skip blocks that change little between the steps of one image; `none` skips nothing.

    Each image gets a new cache, because the reset of diffusers 0.42 (`FBCSharedBlockState.reset`) keeps the last
    residual of the previous image and the first step of the next image would be compared with it. The hooks of the
    cache break the graphs of compiled blocks, which therefore run uncompiled in this context.
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
