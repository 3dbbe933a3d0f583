"""The endpoint `fal-ai/flux/dev/image-to-image`: its input and output types. Pure; needs pydantic only.

Fields, bounds and defaults follow the endpoint's documentation as of autumn 2026. Client, planner and server all
validate with these models.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from batch.types import AppId

__all__ = ["APP_ID", "IMAGES_LIMIT", "SEED_LIMIT", "Image", "ImageToImageInput", "ImageToImageOutput"]

APP_ID = AppId("fal-ai/flux/dev/image-to-image")
IMAGES_LIMIT = 16
"""Maximum images in one answer: a request can ask for four, and every image in an answer is downloaded."""
SEED_LIMIT = 2**63 - 1
"""Results store seeds as int64. The service states no bound; its own examples exceed 2^53."""


class ImageToImageInput(BaseModel):
    """Input of the endpoint. Unknown keys are ignored, as the service does."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_url: Annotated[str, Field(min_length=1, description="URL or data URI of the source image")]
    prompt: Annotated[str, Field(description="description of the desired image")]
    strength: Annotated[
        float,
        Field(ge=0.01, le=1, allow_inf_nan=False, description="how much to change the source image; 1 is completely"),
    ] = 0.95
    num_inference_steps: Annotated[int, Field(ge=10, le=50)] = 40
    guidance_scale: Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)] = 3.5
    seed: Annotated[int | None, Field(ge=0, le=SEED_LIMIT)] = None
    num_images: Annotated[int, Field(ge=1, le=4)] = 1
    enable_safety_checker: bool = True
    sync_mode: Annotated[bool, Field(description="answer with data URIs; no files are stored")] = False
    output_format: Literal["jpeg", "png"] = "jpeg"
    acceleration: Literal["none", "regular", "high"] = "none"


class Image(BaseModel):
    """One result image."""

    model_config = ConfigDict(extra="ignore")

    url: str
    width: int | None = None
    height: int | None = None
    content_type: str | None = "image/jpeg"
    file_name: str | None = None
    file_size: int | None = None


class ImageToImageOutput(BaseModel):
    """Output of the endpoint."""

    model_config = ConfigDict(extra="ignore")

    images: Annotated[list[Image], Field(max_length=IMAGES_LIMIT)]
    timings: dict[str, float] = Field(default_factory=dict)
    seed: int
    has_nsfw_concepts: list[bool] = Field(default_factory=list)
    prompt: str = ""
