"""Validate a model folder before anything is loaded, and name every missing, truncated or wrong file.

Owns the layout of a FLUX.1 [dev] snapshot as diffusers reads it, and the detection of its revision. Reads only headers,
so that checking 34 GB takes milliseconds. Needs no torch and no diffusers.

Source of the layout: https://huggingface.co/docs/diffusers (`FluxPipeline.save_pretrained`); of the header:
https://huggingface.co/docs/safetensors, "Format": 8 bytes little-endian length, that much JSON, then the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch.errors import InputError

__all__ = ["PARTS", "CheckedFolder", "check_checker", "check_model"]

PARTS = ("transformer", "text_encoder_2", "text_encoder", "vae")
"""Parts with weights, largest first."""
_PIPELINES = frozenset({"FluxPipeline", "FluxImg2ImgPipeline"})
_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""File name stem of each part's weights."""
_TOKENIZERS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
"""Sets of files per tokenizer; one complete set is required."""
_CHECKERS = frozenset({"ViTForImageClassification", "StableDiffusionSafetyChecker"})
_MAX_LISTED = 8
"""Maximum number of problems listed in one message; the rest is counted."""
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors format
_SAMPLES, _SAMPLE_BYTES = 16, 65536
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DOWNLOAD = (
    "To download it: accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, log in with"
    " `hf auth login`, then run `hf download black-forest-labs/FLUX.1-dev --local-dir {folder}`"
)


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A folder whose files are complete."""

    path: Path
    name: str
    """Hub id if the path contains it, else the folder name; printable ASCII without spaces."""
    revision: str
    """12 digits: the commit on the hub, or `sha` and a digest of samples of the weights."""
    kind: str
    """Class of the pipeline or of the checker."""


def check_model(folder: Path) -> CheckedFolder:
    """Check that a folder contains a complete FLUX.1 [dev] model.

    Raises:
        InputError: it does not; the message lists the problems and what to do.
    """
    download = _DOWNLOAD.format(folder=folder)
    if not folder.is_dir():
        raise InputError(f"model folder not found: {folder}; set --model to a folder or a hub id. {download}")
    index, problem = _json(folder / "model_index.json")
    if problem:
        raise InputError(f"{folder} is not a diffusers model folder: {problem}. {download}")
    kind = str(index.get("_class_name"))
    if kind not in _PIPELINES:
        raise InputError(f"{folder} contains another model ({kind}); this endpoint needs FLUX.1 [dev]. {download}")
    problems = list(_model_problems(folder))
    if problems:
        raise InputError(f"{folder} is incomplete: {_join_problems(problems)}. {download}")
    _check_dev(folder)
    weights = [file for part in PARTS for file in sorted((folder / part).glob("*.safetensors"))]
    return CheckedFolder(folder, _name(folder), _revision(folder, weights), kind)


def check_checker(folder: Path) -> CheckedFolder:
    """Check a safety checker: a ViT classifier with a label "nsfw", or a StableDiffusionSafetyChecker.

    Raises:
        InputError: the folder contains neither, or files are missing or damaged.
    """
    if not folder.is_dir():
        raise InputError(f"safety checker folder not found: {folder}; set --safety-checker to a folder or a hub id")
    config, problem = _json(folder / "config.json")
    kind = next((str(one) for one in config.get("architectures") or [] if one in _CHECKERS), "")
    problems = [problem] if problem else []
    problems += [f"{name} is missing" for name in ("preprocessor_config.json",) if not (folder / name).is_file()]
    problems += _weights_problems(folder, "model", "model.safetensors")
    if problems:
        raise InputError(f"the safety checker in {folder} is incomplete: {_join_problems(problems)}; download it again")
    if not kind:
        found = config.get("architectures") or config.get("model_type")
        supported = ", ".join(sorted(_CHECKERS))
        raise InputError(f"unsupported safety checker in {folder} ({found}); supported: {supported}")
    if kind.startswith("ViT") and not any("nsfw" in str(label).lower() for label in _labels(config)):
        labels = ", ".join(map(str, _labels(config)))
        raise InputError(f'the classifier in {folder} has no label "nsfw"; its labels: {labels}')
    return CheckedFolder(folder, _name(folder), _revision(folder, sorted(folder.glob("*.safetensors"))), kind)


# --- completeness ---------------------------------------------------------------------------------------------


def _model_problems(folder: Path) -> Iterator[str]:
    if not (folder / "scheduler/scheduler_config.json").is_file():
        yield "scheduler/scheduler_config.json is missing"
    for part, sets in _TOKENIZERS.items():
        if not any(all((folder / part / name).is_file() for name in names) for names in sets):
            yield f"{part}/ has neither {' nor '.join(' with '.join(names) for names in sets)}"
    for part in PARTS:
        _, problem = _json(folder / part / "config.json")
        if problem:
            yield f"{part}/{problem}"
        for problem in _weights_problems(folder / part, _WEIGHTS[part], f"{_WEIGHTS[part]}.safetensors"):
            yield f"{part}/{problem}"


def _check_dev(folder: Path) -> None:
    """Reject other FLUX.1 models. They have the same pipeline class and differ in the transformer's config."""
    config, _ = _json(folder / "transformer/config.json")
    if not config.get("guidance_embeds"):
        model = "FLUX.1 [schnell] or another model without guidance"
        raise InputError(f"{folder} contains {model}; this endpoint needs FLUX.1 [dev]")
    if config.get("out_channels") not in {None, config.get("in_channels")}:
        model = "a FLUX.1 model with more inputs (Fill, Canny or Depth)"
        raise InputError(f"{folder} contains {model}; this endpoint needs FLUX.1 [dev]")


def _weights_problems(folder: Path, stem: str, single: str) -> list[str]:
    """Return the problems of one part's weights, in one file or in the shards that an index names."""
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.is_file():
        if (folder / single).is_file():
            return [problem for _, problem in [_header(folder / single)] if problem]
        shards = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.safetensors"))
        return [f"{index_path.name} is missing" if shards else f"{single} is missing"]
    index, problem = _json(index_path)
    shard_of = index.get("weight_map")
    if problem or not isinstance(shard_of, dict):
        return [problem or f"{index_path.name} has no weight_map"]
    problems = []
    for shard in sorted({str(one) for one in shard_of.values()}):
        names, problem = _header(folder / shard)
        if problem:
            problems.append(problem)
        elif missing := [name for name, one in shard_of.items() if one == shard and name not in names]:
            problems.append(f"{shard} lacks {len(missing)} tensors, for example {missing[0]}")
    return problems


def _header(path: Path) -> tuple[set[str], str]:
    """Return the tensor names of a safetensors file, and its problem or ""."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                return set(), f"{path.name} is a Git LFS pointer; fetch the weights with `git lfs pull`"
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT_BYTES + 1
            if length > min(size, _HEADER_LIMIT_BYTES):
                return set(), f"{path.name} is truncated or not a safetensors file ({size} bytes)"
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected_size = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        return set(), f"{path.name} is missing"
    except OSError as error:
        return set(), f"{path.name} cannot be read ({error.strerror or error})"
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return set(), f"{path.name} has an invalid header"
    if size != expected_size:
        return set(), f"{path.name} has {size} bytes, expected {expected_size}"
    return set(tensors), ""


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """Return a JSON object, and its problem or ""."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except OSError as error:
        return {}, f"{path.name} cannot be read ({error.strerror or error})"
    except ValueError:
        return {}, f"{path.name} is not valid JSON"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is not a JSON object")


def _labels(config: dict[str, Any]) -> list[Any]:
    labels = config.get("id2label")
    return list(labels.values()) if isinstance(labels, dict) else []


def _join_problems(problems: list[str]) -> str:
    more = len(problems) - _MAX_LISTED
    return "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


# --- name and revision ----------------------------------------------------------------------------------------


def _name(folder: Path) -> str:
    """Return the hub id of a snapshot in the hub's cache (`models--OWNER--NAME/snapshots/COMMIT`), else the name."""
    path = folder.absolute()
    cached = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    name = path.parent.parent.name.removeprefix("models--").replace("--", "/") if cached else path.name
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", name) or "model"


def _revision(folder: Path, weights: list[Path]) -> str:
    commit = folder.absolute().name
    if not _COMMIT.fullmatch(commit):
        commit = _downloaded_commit(folder)
    return commit[:12] if commit else f"sha{_digest(weights)}"


def _downloaded_commit(folder: Path) -> str:
    """Return the commit that `hf download --local-dir` recorded, or "" if it is unknown or differs between files.

    The first line of the metadata file of each downloaded file is its commit.
    """
    metadata = folder / ".cache/huggingface/download"
    commits = set()
    for file in metadata.rglob("*.metadata") if metadata.is_dir() else ():
        first = file.read_text("utf-8", "replace").partition("\n")[0].strip()
        commits.add(first if _COMMIT.fullmatch(first) else "")
    return commits.pop() if len(commits) == 1 else ""


def _digest(weights: list[Path]) -> str:
    """Return a digest of samples from each file. Reading all takes minutes, and headers do not depend on the values."""
    digest = hashlib.blake2b(digest_size=6)
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
