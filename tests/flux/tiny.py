"""A complete FLUX.1 [dev] pipeline with small random weights, one megabyte on disk. Built offline.

Shapes follow the real configuration where images depend on it: four VAE levels (so that sides round to 16 px), the
published scheduler, embedded guidance. The images are noise, but they must depend on every input as FLUX's do, because
otherwise equal images would prove nothing. The initial weights are too small for that and are scaled up.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

_WORDS = ("a", "an", "the", "of", "in", "on", "with", "cat", "dog", "painting", "watercolor", "oil", "city", "forest")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with a byte vocabulary, which accepts any text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    """Return a tokenizer for printable ASCII and some words."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -2.0}
    pieces |= {chr(code): -4.0 for code in range(33, 127)}
    pieces |= {"\u2581" + word: -1.5 - 0.1 * len(word) for word in _WORDS}
    return T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    start, end = tokenizer.convert_tokens_to_ids([_START, _END])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, hidden_act="gelu", bos_token_id=start, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    return CLIPTextModel(config)


def _text_encoder_2(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, sample_size=64, latent_channels=4, norm_num_groups=1,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False, shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    means, spreads = vae.encoder.conv_out.weight.data.split(4)
    means.mul_(10)
    spreads.zero_()
    vae.encoder.conv_out.bias.data[4:].fill_(-8)
    vae.decoder.conv_out.weight.data.mul_(2)
    return vae


def _transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    transformer.proj_out.weight.data.mul_(8)
    # Steps must differ little, as in the real model; otherwise the cache would skip no blocks.
    transformer.time_text_embed.timestep_embedder.linear_2.weight.data.mul_(0.1)
    return transformer


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the published scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def build(seed: int = 0) -> FluxImg2ImgPipeline:
    """Build the pipeline in memory. The weights depend on the seed."""
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FluxImg2ImgPipeline(
            scheduler=_scheduler(), vae=_vae().eval(), transformer=_transformer().eval(), tokenizer=tokenizer,
            tokenizer_2=tokenizer_2, text_encoder=_text_encoder(tokenizer).eval(),
            text_encoder_2=_text_encoder_2(tokenizer_2).eval(),
        )  # fmt: skip


def save(folder: Path, seed: int = 0) -> Path:
    """Save the pipeline with `save_pretrained`."""
    build(seed).save_pretrained(folder)
    return folder


def save_as_published(folder: Path, seed: int = 0) -> Path:
    """Save the same weights in the layout of the snapshot on the hub.

    Its index names FluxPipeline, CLIP's keys start with `text_model.`, CLIP's tokenizer consists of two files, and T5
    and the transformer are in shards.
    """
    save(folder, seed)
    clip = folder / "text_encoder/model.safetensors"
    own = {name.removeprefix("text_model."): value for name, value in load_file(clip).items()}
    save_file({f"text_model.{name}": value for name, value in own.items()}, clip, metadata={"format": "pt"})
    tokenizer = folder / "tokenizer/tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())["model"]["vocab"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    tokenizer.unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    for name in ("feature_extractor", "image_encoder"):
        index.pop(name, None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    sharded = {"text_encoder_2": (T5EncoderModel, "20KB"), "transformer": (FluxTransformer2DModel, "100KB")}
    for part, (kind, size) in sharded.items():
        loaded = kind.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        loaded.save_pretrained(folder / part, max_shard_size=size)
    return folder


def save_concepts(folder: Path, *, flags: bool) -> Path:
    """Save a StableDiffusionSafetyChecker that flags everything or nothing: cosines are always between -2 and 2."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 32, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0 if flags else 2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, *, flags: bool, labels: tuple[str, str] = ("normal", "nsfw")) -> Path:
    """Save a ViT classifier that flags everything or nothing by its bias."""
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        num_labels=2, id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)},
    )  # fmt: skip
    classifier = ViTForImageClassification(config)
    classifier.classifier.bias.data.copy_(torch.tensor([-9.0, 9.0] if flags else [9.0, -9.0]))
    classifier.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
