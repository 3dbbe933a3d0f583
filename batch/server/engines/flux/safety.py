"""Safety checkers for the generated images. Runs in a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

__all__ = ["Checker", "open_checker"]

_FLAGGED_ABOVE = 0.5
"""Threshold for the probability of the label "nsfw"; taken from fal's open-source toolkit."""


class Checker(Protocol):
    """A safety checker."""

    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Return for each image whether it is not safe for work."""


def open_checker(folder: Path, kind: str, device: Any) -> Checker:
    """Load the checker in a folder.

    Args:
        folder: a folder that `batch.server.engines.flux.folder.check_checker` accepted.
        kind: the class of the checker.
        device: a `torch.device`.
    """
    if kind == "ViTForImageClassification":
        return _Classifier(folder, device)
    return _StableDiffusion(folder, device)


class _Classifier:
    """A ViT classifier with a label "nsfw", for example Falconsai/nsfw_image_detection."""

    def __init__(self, folder: Path, device: Any) -> None:
        from transformers import ViTForImageClassification, ViTImageProcessor

        self._processor = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = ViTForImageClassification.from_pretrained(folder, local_files_only=True).to(device).eval()
        labels = self._model.config.id2label
        self._label = next(int(number) for number, label in labels.items() if "nsfw" in str(label).lower())

    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Flag images whose probability of the label exceeds 0.5."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt")
        with torch.no_grad():
            logits = self._model(inputs["pixel_values"].to(self._model.device)).logits
        probabilities = logits.float().softmax(-1)[:, self._label]
        return [bool(probability > _FLAGGED_ABOVE) for probability in probabilities.tolist()]


class _StableDiffusion:
    """CLIP concepts with one threshold each, for example CompVis/stable-diffusion-safety-checker."""

    def __init__(self, folder: Path, device: Any) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = StableDiffusionSafetyChecker.from_pretrained(folder, local_files_only=True).to(device).eval()
        self._device = device

    def flags(self, images: Sequence[Image.Image]) -> list[bool]:
        """Flag images that exceed a threshold of the model."""
        import numpy as np
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt")
        # The model blackens the arrays that it gets in `images`, so it gets placeholders.
        placeholders = [np.zeros((1, 1, 3), np.float32) for _ in images]
        with torch.no_grad():
            _, flags = self._model(images=placeholders, clip_input=inputs["pixel_values"].to(self._device))
        return [bool(flag) for flag in flags]
