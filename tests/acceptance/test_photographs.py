"""Photographs from scikit-image as image URLs of a web server, through the preview engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.acceptance.command import accepted, restyle, results

skimage = pytest.importorskip("skimage")

SIZES = {
    # file: size in px of the source and of the result: an area of at most 1440 x 1440, sides of at least 256 px that
    # are multiples of 16
    "astronaut.png": ((512, 512), (512, 512)),
    "coffee.png": ((600, 400), (608, 400)),
    "camera.png": ((512, 512), (512, 512)),  # grey
    "chelsea.png": ((451, 300), (448, 304)),
    "rocket.jpg": ((640, 427), (640, 432)),
    "hubble_deep_field.jpg": ((1000, 872), (992, 864)),
    "retina.jpg": ((1411, 1411), (1408, 1408)),
    "logo.png": ((500, 500), (496, 496)),  # with transparency
    "page.png": ((384, 191), (512, 256)),
}
TOO_SMALL = "no_time_for_that_tiny.gif"  # 25 x 14
PROMPTS = ["an oil painting", "a pencil sketch", "a pop art print", "a watercolor"]


@pytest.fixture
def photographs(image_server, tmp_path):
    """Write a manifest of the photographs' URLs."""
    bundled = Path(skimage.__file__).parent / "data"
    rows = []
    for number, name in enumerate([*SIZES, TOO_SMALL]):
        shutil.copy(bundled / name, image_server.folder / name)
        rows.append(f"{name},{image_server.url}/{name},{PROMPTS[number % len(PROMPTS)]}")
    manifest = tmp_path / "photographs.csv"
    manifest.write_text("\n".join(["name,image_url,prompt", *rows]) + "\n")
    return manifest


def images(directory: Path) -> dict[str, tuple[dict, Image.Image]]:
    """Return the results of each row's image, and the file."""
    found = {}
    for row in results(directory).to_pylist():
        for image in row["images"] or []:
            with Image.open(directory / image["path"]) as opened:
                opened.load()
                found[f"{row['name']} {row['cell']}".strip()] = (image, opened)
    return found


def test_photographs_become_previews_and_the_same_again(photographs, tmp_path, image_server):
    """Sizes follow the rule and bytes the seed: a fresh run of the same manifest gives the same files."""
    for name in ("one", "two"):
        ended = restyle("run", photographs, "-o", tmp_path / name)
        assert ended.code == 3, ended.text
    rows = results(tmp_path / "one").to_pylist()
    assert [row["name"] for row in rows] == [*SIZES, TOO_SMALL]
    assert [row["status"] for row in rows] == ["done"] * len(SIZES) + ["failed"]
    assert (rows[-1]["error_type"], rows[-1]["engine"]) == ("image_too_small", None)
    assert {row["engine"] for row in rows[:-1]} == {"preview"}
    assert accepted(tmp_path / "one") == len(rows)

    one, two = images(tmp_path / "one"), images(tmp_path / "two")
    assert len({said["sha256"] for said, _ in one.values()}) == len(SIZES)
    for row in rows[:-1]:
        name, source = row["name"], image_server.folder / row["name"]
        (said, file), expected = next(v for k, v in one.items() if k.split()[0] == name), SIZES[name]
        with Image.open(source) as opened:
            assert opened.size == expected[0]
        assert file.size == (said["width"], said["height"]) == expected[1], name
        assert (file.format, said["content_type"]) == ("JPEG", "image/jpeg")
        assert said["sha256"] == next(v for k, v in two.items() if k.split()[0] == name)[0]["sha256"], name
        assert np.asarray(file.convert("L")).std() > 3, f"{name} shows nothing"


def test_a_result_still_shows_its_source(photographs, tmp_path, image_server):
    """Light and dark areas stay at a low strength; less so at a high one."""
    config = tmp_path / "c.toml"
    config.write_text("[sweep]\nstrength = [0.1, 0.95]\n")
    assert restyle("run", photographs, "-c", config, "-o", tmp_path / "run", "--limit", 3).code == 0
    for name in list(SIZES)[:3]:
        with Image.open(image_server.folder / name) as opened:
            source = np.asarray(opened.convert("L").resize((64, 64)), float).ravel()
        likeness = [
            np.corrcoef(source, np.asarray(file.convert("L").resize((64, 64)), float).ravel())[0, 1]
            for key, (_, file) in images(tmp_path / "run").items()
            if key.startswith(name)
        ]
        assert likeness[0] > 0.9, name
        assert likeness[0] > likeness[1] > 0.2, name


def test_seeds_make_images_and_png_is_png(photographs, tmp_path):
    """Another seed gives another image, the same seed the same one; `output_format` determines the file."""
    config = tmp_path / "c.toml"
    config.write_text('[input]\noutput_format = "png"\n[sweep]\nseed = [1, 2]\n')
    assert restyle("run", photographs, "-c", config, "-o", tmp_path / "run", "--limit", 2).code == 0
    rows = results(tmp_path / "run").to_pylist()
    assert [row["seed"] for row in rows] == [1, 2, 1, 2]
    hashes = [row["images"][0]["sha256"] for row in rows]
    assert len(set(hashes)) == 4
    for image, file in images(tmp_path / "run").values():
        assert (file.format, image["content_type"]) == ("PNG", "image/png")
        assert image["path"].endswith(".png")

    config.write_text('[input]\noutput_format = "png"\nseed = 2\n')
    assert restyle("run", photographs, "-c", config, "-o", tmp_path / "fixed", "--limit", 2).code == 0
    assert [row["images"][0]["sha256"] for row in results(tmp_path / "fixed").to_pylist()] == hashes[1::2]
