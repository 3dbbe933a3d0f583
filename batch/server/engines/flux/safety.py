"""The safety checker: which of some images it flags. Runs inside a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

__all__ = ["Checker", "open_checker"]

_FLAGGED_ABOVE = 0.5
"""Probability of the label "nsfw"; the bound of fal's open toolkit."""


class Checker(Protocol):
    """Looks at images."""

    def flags(self, rendered: Sequence[Image.Image]) -> list[bool]:
        """For each image whether it is not safe for work."""


def open_checker(folder: Path, kind: str, device: Any) -> Checker:
    """The checker in a folder.

    Args:
        folder: checked by `batch.server.engines.flux.folder.check_checker`.
        kind: its class.
        device: torch's.
    """
    if kind == "ViTForImageClassification":
        return _Classifier(folder, device)
    return _StableDiffusion(folder, device)


class _Classifier:
    """A ViT with a label "nsfw", for instance Falconsai/nsfw_image_detection."""

    def __init__(self, folder: Path, device: Any) -> None:
        from transformers import ViTForImageClassification, ViTImageProcessor

        self._processor = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = ViTForImageClassification.from_pretrained(folder, local_files_only=True).to(device).eval()
        labels = self._model.config.id2label
        self._label = next(int(number) for number, label in labels.items() if "nsfw" in str(label).lower())

    def flags(self, rendered: Sequence[Image.Image]) -> list[bool]:
        """Above one half of the label's probability."""
        import torch

        inputs = self._processor(images=list(rendered), return_tensors="pt")
        with torch.no_grad():
            logits = self._model(inputs["pixel_values"].to(self._model.device)).logits
        shares = logits.float().softmax(-1)[:, self._label]
        return [bool(share > _FLAGGED_ABOVE) for share in shares.tolist()]


class _StableDiffusion:
    """CLIP concepts with a threshold each, for instance CompVis/stable-diffusion-safety-checker."""

    def __init__(self, folder: Path, device: Any) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = StableDiffusionSafetyChecker.from_pretrained(folder, local_files_only=True).to(device).eval()
        self._device = device

    def flags(self, rendered: Sequence[Image.Image]) -> list[bool]:
        """By its own thresholds. The rendered that it would blacken itself are copies that nobody keeps."""
        import numpy as np
        import torch

        inputs = self._processor(images=list(rendered), return_tensors="pt")
        copies = [np.zeros((1, 1, 3), np.float32) for _ in rendered]
        with torch.no_grad():
            _, flags = self._model(images=copies, clip_input=inputs["pixel_values"].to(self._device))
        return [bool(flag) for flag in flags]
