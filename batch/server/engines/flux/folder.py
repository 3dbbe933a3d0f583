"""A model folder, looked at before anything is loaded: what is missing, cut short or another model is said by name.

Owns the layout of a FLUX.1 [dev] snapshot as diffusers reads it, and where a folder tells its revision. Reads headers
only, never weights, so that 34 GB are judged in milliseconds. Needs no library of the model's own.

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
"""The parts with weights, the largest first."""
_PIPELINES = frozenset({"FluxPipeline", "FluxImg2ImgPipeline"})
_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Stem of each part's weights."""
_TOKENIZERS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
"""For each tokenizer the sets of files of which one has to be there."""
_CHECKERS = frozenset({"ViTForImageClassification", "StableDiffusionSafetyChecker"})
_MOST_NAMED = 8
"""Problems in one message; the rest is counted."""
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own bound
_SAMPLES, _SAMPLE_BYTES = 16, 65536
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GET_AGAIN = (
    "To get it: accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, log in with `hf auth login`,"
    " then `hf download black-forest-labs/FLUX.1-dev --local-dir {folder}` fetches what is missing"
)


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A folder whose files are all there."""

    path: Path
    name: str
    """Hub id where the folder tells it, else its own name; printable ASCII without spaces."""
    revision: str
    """The hub's commit, or `sha` and a digest of samples of the weights: 12 digits each."""
    kind: str
    """Class of the pipeline or of the checker."""


def check_model(folder: Path) -> CheckedFolder:
    """The FLUX.1 [dev] model in a folder.

    Raises:
        InputError: it is none, or not whole; every problem is named, with what to do.
    """
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}; give --model a folder or a hub id. {_again(folder)}")
    index, problem = _json(folder / "model_index.json")
    if problem:
        raise InputError(f"{folder} is no model folder as diffusers lays it out: {problem}. {_again(folder)}")
    kind = str(index.get("_class_name"))
    if kind not in _PIPELINES:
        raise InputError(f"{folder} holds another model ({kind}); this endpoint is FLUX.1 [dev]. {_again(folder)}")
    problems = list(_model_problems(folder))
    if problems:
        raise InputError(f"{folder} is not whole: {_listed(problems)}. {_again(folder)}")
    _check_dev(folder)
    weights = [file for part in PARTS for file in sorted((folder / part).glob("*.safetensors"))]
    return CheckedFolder(folder, _name(folder), _revision(folder, weights), kind)


def check_checker(folder: Path) -> CheckedFolder:
    """The safety checker in a folder: a ViT classifier with a label "nsfw", or a StableDiffusionSafetyChecker.

    Raises:
        InputError: it is none, or not whole.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give --safety-checker a folder or a hub id")
    config, problem = _json(folder / "config.json")
    kind = next((str(one) for one in config.get("architectures") or [] if one in _CHECKERS), "")
    problems = [problem] if problem else []
    problems += [f"{name} is missing" for name in ("preprocessor_config.json",) if not (folder / name).is_file()]
    problems += _weights_problems(folder, "model", "model.safetensors")
    if problems:
        raise InputError(f"the safety checker in {folder} is not whole: {_listed(problems)}; download it again")
    if not kind:
        found = config.get("architectures") or config.get("model_type")
        raise InputError(f"{folder} holds no safety checker that we know ({found}); known: {', '.join(_CHECKERS)}")
    if kind.startswith("ViT") and not any("nsfw" in str(label).lower() for label in _labels(config)):
        raise InputError(f'the classifier in {folder} has no label "nsfw" but {", ".join(map(str, _labels(config)))}')
    return CheckedFolder(folder, _name(folder), _revision(folder, sorted(folder.glob("*.safetensors"))), kind)


# --- what a model has to have ---------------------------------------------------------------------------------


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
    """FLUX.1 has siblings of the same pipeline class; their transformers differ."""
    config, _ = _json(folder / "transformer/config.json")
    if not config.get("guidance_embeds"):
        raise InputError(f"{folder} holds FLUX.1 [schnell], or another model without guidance; this endpoint is [dev]")
    if config.get("out_channels") not in {None, config.get("in_channels")}:
        raise InputError(f"{folder} holds a FLUX.1 that takes more than an image (Fill, Canny, Depth), not [dev]")


def _weights_problems(folder: Path, stem: str, single: str) -> list[str]:
    """Problems of one part's weights, in one file or in shards that an index names."""
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.is_file():
        if (folder / single).is_file():
            return [problem for _, problem in [_header(folder / single)] if problem]
        shards = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.safetensors"))
        return [f"{index_path.name} is missing" if shards else f"{single} is missing"]
    index, problem = _json(index_path)
    places = index.get("weight_map")
    if problem or not isinstance(places, dict):
        return [problem or f"{index_path.name} names no tensors"]
    problems = []
    for shard in sorted({str(one) for one in places.values()}):
        names, problem = _header(folder / shard)
        if problem:
            problems.append(problem)
        elif missing := [name for name, place in places.items() if place == shard and name not in names]:
            problems.append(f"{shard} lacks {len(missing)} tensors, {missing[0]} first")
    return problems


def _header(path: Path) -> tuple[set[str], str]:
    """Names of the tensors in a safetensors file; what is wrong with it, or nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                return set(), f"{path.name} is a Git LFS pointer, not the weights (`git lfs pull` fetches them)"
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT_BYTES + 1
            if length > min(size, _HEADER_LIMIT_BYTES):
                return set(), f"{path.name} is cut short or no safetensors file ({size} bytes)"
            header = json.loads(file.read(length))
        tensors = {name: told for name, told in header.items() if name != "__metadata__"}
        whole = 8 + length + max((told["data_offsets"][1] for told in tensors.values()), default=0)
    except FileNotFoundError:
        return set(), f"{path.name} is missing"
    except OSError as error:
        return set(), f"{path.name} cannot be read ({error.strerror or error})"
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return set(), f"{path.name} has a broken header"
    if size != whole:
        return set(), f"{path.name} has {size} of {whole} bytes"
    return set(tensors), ""


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object; what is wrong with it, or nothing."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except OSError as error:
        return {}, f"{path.name} cannot be read ({error.strerror or error})"
    except ValueError:
        return {}, f"{path.name} is cut short or no JSON"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is no JSON object")


def _labels(config: dict[str, Any]) -> list[Any]:
    labels = config.get("id2label")
    return list(labels.values()) if isinstance(labels, dict) else []


def _listed(problems: list[str]) -> str:
    more = len(problems) - _MOST_NAMED
    return "; ".join(problems[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _again(folder: Path) -> str:
    return _GET_AGAIN.format(folder=folder)


# --- which one it is ------------------------------------------------------------------------------------------


def _name(folder: Path) -> str:
    """A snapshot of the hub's cache lies in `models--OWNER--NAME/snapshots/COMMIT`."""
    whole = folder.absolute()
    cached = whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--")
    name = whole.parent.parent.name.removeprefix("models--").replace("--", "/") if cached else whole.name
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", name) or "model"


def _revision(folder: Path, weights: list[Path]) -> str:
    commit = folder.absolute().name
    if not _COMMIT.fullmatch(commit):
        commit = _downloaded_commit(folder)
    return commit[:12] if commit else f"sha{_digest(weights)}"


def _downloaded_commit(folder: Path) -> str:
    """`hf download --local-dir` leaves a note beside each file whose first line is the commit."""
    notes = folder / ".cache/huggingface/download"
    commits = set()
    for note in notes.rglob("*.metadata") if notes.is_dir() else ():
        first = note.read_text("utf-8", "replace").partition("\n")[0].strip()
        commits.add(first if _COMMIT.fullmatch(first) else "")
    return commits.pop() if len(commits) == 1 else ""


def _digest(weights: list[Path]) -> str:
    """Of samples spread over each file: all of it would be minutes of reading, a header alone hides other values."""
    digest = hashlib.blake2b(digest_size=6)
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.parent.name}/{path.name} {size}".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
