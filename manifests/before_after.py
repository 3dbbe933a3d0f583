"""Draw docs/images/before-after.jpg from a finished demo run: sources in the first row, results in the second.

`make demo && .venv/bin/python manifests/before_after.py`
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
from PIL import Image

HERE = Path(__file__).parent
RUN = HERE.parent / "out/demo"
SHOWN = ("mountains", "skyline", "cat", "flower")
WIDTH, HEIGHT, GAP = 320, 240, 8


def fitted(path: Path) -> Image.Image:
    """Scale and crop to one tile."""
    with Image.open(path) as image:
        scale = max(WIDTH / image.width, HEIGHT / image.height)
        large = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    left, top = (large.width - WIDTH) // 2, (large.height - HEIGHT) // 2
    return large.crop((left, top, left + WIDTH, top + HEIGHT))


def main() -> None:
    """Compose the tiles."""
    rows = pl.read_parquet(RUN / "results.parquet").select("image_url", "images").to_dicts()
    results = {Path(row["image_url"]).stem: RUN / row["images"][0]["path"] for row in rows}
    size = (len(SHOWN) * (WIDTH + GAP) - GAP, 2 * HEIGHT + GAP)
    sheet = Image.new("RGB", size, "white")
    for place, name in enumerate(SHOWN):
        (source,) = (HERE / "images").glob(f"{name}.*")
        left = place * (WIDTH + GAP)
        sheet.paste(fitted(source), (left, 0))
        sheet.paste(fitted(results[name]), (left, HEIGHT + GAP))
    target = HERE.parent / "docs/images/before-after.jpg"
    target.parent.mkdir(exist_ok=True)
    sheet.save(target, quality=85)
    print(target)


if __name__ == "__main__":
    main()
