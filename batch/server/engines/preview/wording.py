"""Select style and scene by the words of a prompt. Pure."""

from __future__ import annotations

import re
from enum import StrEnum

__all__ = ["Scene", "Style", "scene_of", "style_of"]


class Style(StrEnum):
    """The styles of the preview."""

    PIXEL = "pixel"
    MOSAIC = "mosaic"
    BLUEPRINT = "blueprint"
    PENCIL = "pencil"
    POPART = "popart"
    CARTOON = "cartoon"
    WATERCOLOR = "watercolor"
    NEON = "neon"
    VINTAGE = "vintage"
    OIL = "oil"
    PAINTERLY = "painterly"
    """The style of prompts that contain no known style."""


class Scene(StrEnum):
    """The scenes of the preview, each with its light and colours."""

    NIGHT = "night"
    SUNSET = "sunset"
    WINTER = "winter"
    AUTUMN = "autumn"
    FOREST = "forest"
    WATER = "water"
    FIRE = "fire"
    MAGIC = "magic"


# The first match wins, so more specific styles come first: a "pixel art cartoon" is pixel art.
_STYLE_WORDS = {
    Style.PIXEL: r"pixel|(8|16).?bit|minecraft|voxel|lego",
    Style.MOSAIC: r"mosaic|stained.?glass|low.?poly|voronoi|tile[ds]?\b",
    Style.BLUEPRINT: r"blueprint|schematic|technical drawing|cyanotype",
    Style.WATERCOLOR: r"water.?colou?r|aquarelle|gouache|\bwash\b|pastel",
    Style.PENCIL: r"pencil|sketch|charcoal|graphite|etching|engraving|line.?art|\bink\b|drawing|manga|woodcut",
    Style.POPART: r"pop.?art|halftone|warhol|lichtenstein|comic|screen.?print|risograph|poster",
    Style.CARTOON: r"cartoon|anime|pixar|disney|ghibli|cel.?shad|toon|illustration|vector|flat design|3d render",
    Style.NEON: r"neon|cyberpunk|synthwave|vaporwave|\btron\b|glow|sci.?fi|futuristic|hologram",
    Style.VINTAGE: r"vintage|sepia|retro|old photo|film|noir|black and white|monochrome|daguerreotype|polaroid",
    Style.OIL: r"\boil\b|impasto|gogh|monet|impression|painting|painted|renaissance|baroque|rembrandt|canvas|fresco",
}
_SCENE_WORDS = {
    Scene.NIGHT: r"night|midnight|moon|\bdark",
    Scene.SUNSET: r"sunset|dusk|\bdawn\b|sunrise|golden hour|golden light|warm light",
    Scene.WINTER: r"winter|\bsnow|\bic[ey]\b|frost|arctic",
    Scene.AUTUMN: r"autumn|fall leaves|october|\brust",
    Scene.FOREST: r"forest|jungle|\bmoss|garden|meadow|spring",
    Scene.WATER: r"underwater|ocean|\bsea\b|\baqua\b|coral",
    Scene.FIRE: r"\bfire|lava|\bhell\b|flame|volcan|\bmars\b",
    Scene.MAGIC: r"mystic|magic|wizard|fantasy|dream|cosmic|galaxy|space",
}
_STYLES = [(style, re.compile(words, re.IGNORECASE)) for style, words in _STYLE_WORDS.items()]
_SCENES = [(scene, re.compile(words, re.IGNORECASE)) for scene, words in _SCENE_WORDS.items()]


def style_of(prompt: str) -> Style:
    """Return the first style whose words are in the prompt, or `PAINTERLY`."""
    return next((style for style, words in _STYLES if words.search(prompt)), Style.PAINTERLY)


def scene_of(prompt: str) -> Scene | None:
    """Return the first scene whose words are in the prompt, or None."""
    return next((scene for scene, words in _SCENES if words.search(prompt)), None)
