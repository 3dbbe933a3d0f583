"""The demo's images and manifests: drawn by our script, and complete."""

import csv
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.images import read_source
from batch.server.engines.preview.wording import Scene, Style, scene_of, style_of

MANIFESTS = Path(__file__).parents[2] / "manifests"
NAMES = sorted(path.name for path in (MANIFESTS / "images").iterdir())


@pytest.fixture(scope="module")
def script():
    """The drawing script, imported from its file."""
    spec = importlib.util.spec_from_file_location("draw_images", MANIFESTS / "draw_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    """The rows of demo.csv."""
    with (MANIFESTS / "demo.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)


def test_script_and_folder_name_the_same_images(script):
    """Every image has a drawing function, and every function has an image."""
    assert sorted(script.IMAGES) == NAMES
    assert len(NAMES) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_drawing_again_gives_the_same_image(script, name):
    """The size is equal, and pixels differ no more than between codec versions."""
    stored, drawn = pixels((MANIFESTS / "images" / name).read_bytes()), pixels(script.draw(name))
    assert drawn.shape == stored.shape
    assert np.abs(drawn - stored).mean() < 1.0


def test_drawing_writes_every_manifest_as_it_stands(script, tmp_path, monkeypatch):
    """The script writes the text manifests byte for byte from the stored images."""
    monkeypatch.setattr(script, "draw", lambda name: (MANIFESTS / "images" / name).read_bytes())
    script.write_everything(tmp_path)
    for name in ("demo.csv", "sweep.jsonl"):
        assert (tmp_path / name).read_bytes() == (MANIFESTS / name).read_bytes()
    written, stored = (pq.read_table(folder / "demo.parquet") for folder in (tmp_path, MANIFESTS))
    assert written.schema.equals(stored.schema, check_metadata=True)
    assert written.drop(["image"]).equals(stored.drop(["image"]))


def test_images_are_varied_and_small():
    """JPEG, PNG with alpha, one greyscale image, several aspect ratios; under 1.5 MB in total."""
    kinds, shapes = set(), set()
    for name in NAMES:
        with Image.open(MANIFESTS / "images" / name) as image:
            kinds.add((image.format, image.mode))
            shapes.add(image.size)
            assert 600 <= max(image.size) <= 800
    assert kinds == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA")}
    assert len(shapes) >= 5
    assert sum((MANIFESTS / "images" / name).stat().st_size for name in NAMES) < 1_500_000


def test_demo_shows_every_image_once_and_many_styles(demo):
    """Ids are unique, paths exist relative to the manifest, and inputs are within the endpoint's bounds."""
    assert sorted(Path(row["image_url"]).name for row in demo) == NAMES
    assert len({row["id"] for row in demo}) == len(demo)
    for row in demo:
        assert (MANIFESTS / row["image_url"]).is_file()
        ImageToImageInput(**{name: value for name, value in row.items() if value})
    assert {style_of(row["prompt"]) for row in demo} == set(Style)
    assert {scene_of(row["prompt"]) for row in demo} >= {Scene.NIGHT, Scene.WINTER, Scene.AUTUMN, Scene.MAGIC}
    assert any(row["strength"] for row in demo)
    assert any(row["seed"] for row in demo)


def test_parquet_carries_its_images():
    """The images are structs of bytes and path, as in Hugging Face datasets; under 300 kB."""
    path = MANIFESTS / "demo.parquet"
    table = pq.read_table(path)
    assert path.stat().st_size < 300_000
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    for row in table.to_pylist():
        assert read_source(row["image"]["bytes"]).mode == "RGB"
        assert style_of(row["prompt"]) is not Style.PAINTERLY


def test_sweep_fills_its_template():
    """Every row has the columns of the template `a {animal} as a {style}`, and its image exists."""
    rows = [json.loads(line) for line in (MANIFESTS / "sweep.jsonl").read_text("utf-8").splitlines()]
    assert len({(row["animal"], row["style"]) for row in rows}) == len(rows) == 3
    for row in rows:
        assert (MANIFESTS / row["image_url"]).is_file()
        assert style_of("a {animal} as a {style}".format(**row)) is not Style.PAINTERLY
