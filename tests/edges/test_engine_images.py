"""Decoding of sources to RGB at output size, with valid files of every format and with invalid ones."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batch.image_formats import READABLE
from batch.server.engines.base import EngineFailure
from batch.server.engines.images import MAX_AREA_PX, encode, output_size, read_source

SIDE = 256


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour_at(image, x, y):
    return image.getpixel((x, y))


def rejection_of(data, **options):
    with pytest.raises(EngineFailure) as caught:
        read_source(data, **options)
    assert caught.value.status == 422
    assert caught.value.loc == ("body", "image_url")
    assert not caught.value.retryable
    return caught.value


def png_header(width, height):
    """Return a PNG whose header has this size and which contains no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("given_size", "size"),
    [
        ((1024, 768), (1024, 768)),
        ((1000, 700), (992, 704)),
        ((768, 512), (768, 512)),
        ((4000, 3000), (1664, 1248)),
        ((1440, 1440), (1440, 1440)),
        ((100, 100), (256, 256)),
        ((100, 50), (512, 256)),
        ((100_000, 20), (8096, 256)),
        ((20_000, 300), (8096, 256)),
    ],
)
def test_output_size_follows_the_source(given_size, size):
    """Area at most 1440x1440, sides multiples of 16 and at least 256, aspect ratio kept if both limits allow it."""
    assert output_size(*given_size) == size
    assert output_size(*reversed(given_size)) == tuple(reversed(size))


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_output_size_always_keeps_its_bounds(width, height):
    """Any source size results in a size that the model supports."""
    size = output_size(width, height)
    assert all(side % 16 == 0 and side >= 256 for side in size)
    assert size.width * size.height <= MAX_AREA_PX * (1 + 8 / 256 + 8 / 256)
    if 0.25 <= width / height <= 4:
        assert size.width / size.height == pytest.approx(width / height, rel=0.08)


@pytest.mark.parametrize("kind", READABLE)
def test_usual_formats_are_read(kind):
    """Every supported format keeps its colour."""
    data = file_of(Image.new("RGB", (320, 272), (200, 60, 40)), kind)
    image = read_source(data)
    assert (image.mode, image.size) == ("RGB", (320, 272))
    assert colour_at(image, 100, 100) == pytest.approx((200, 60, 40), abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    """A red corner is at the upper left after decoding."""
    upright = Image.new("RGB", (320, 256), "white")
    upright.paste((255, 0, 0), (0, 0, 80, 64))
    # What a camera stores for each orientation: the inverse of the transposition that EXIF prescribes.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_source(file_of(stored, "JPEG", exif=exif.tobytes(), quality=95, subsampling=0))
    assert image.size == (320, 256)
    assert colour_at(image, 20, 20) == pytest.approx((255, 0, 0), abs=8)
    assert colour_at(image, 300, 240) == pytest.approx((255, 255, 255), abs=8)


def test_image_with_damaged_exif_is_read():
    """Damaged metadata does not make an image unusable."""
    data = file_of(Image.new("RGB", (SIDE, SIDE), "blue"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of the corrupt EXIF
        assert read_source(data).size == (SIDE, SIDE)


def with_transparency(mode):
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 128, SIDE))
    if mode == "P":
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode):
    """Alpha is composited over white."""
    image = read_source(file_of(with_transparency(mode)))
    assert colour_at(image, 200, 100) == (255, 255, 255)
    assert colour_at(image, 50, 100) != (255, 255, 255)


def test_half_transparent_is_half_white():
    """An alpha of one half mixes the colour with white in equal parts."""
    image = read_source(file_of(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128))))
    assert colour_at(image, 9, 9) == pytest.approx((127, 127, 127), abs=1)


def test_transparent_colour_of_a_png_is_white_too():
    """A PNG can mark one colour as transparent without an alpha channel."""
    data = file_of(Image.new("RGB", (SIDE, SIDE), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert colour_at(read_source(data), 9, 9) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    """A ramp over all 65536 levels becomes a ramp over 256 levels."""
    ramp = np.tile(np.linspace(0, 65535, SIDE).astype(np.uint16), (SIDE, 1))
    image = np.asarray(read_source(file_of(Image.fromarray(ramp), kind)))
    assert np.abs(image[9, :, 0].astype(int) - np.arange(SIDE)).max() <= 1


@pytest.mark.parametrize(("top", "kind"), [(1.0, np.float32), (255.0, np.float32), (70_000, np.int32)])
def test_floats_and_wide_integers_are_scaled(top, kind):
    """Ranges of 0 to 1, 0 to 255 and wider become 0 to 255."""
    ramp = np.tile(np.linspace(0, top, SIDE).astype(kind), (SIDE, 1))
    image = np.asarray(read_source(file_of(Image.fromarray(ramp), "TIFF")))
    assert np.abs(image[9, :, 0].astype(int) - np.arange(SIDE)).max() <= 1


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("L", 255), ("1", 1)])
def test_other_colour_models_become_rgb(mode, colour):
    """CMYK, grey and black-and-white images are converted."""
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = read_source(file_of(Image.new(mode, (SIDE, SIDE), colour), kind))
    expected = (255, 0, 0) if mode == "CMYK" else (255, 255, 255)
    assert colour_at(image, 9, 9) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"])
def test_animation_gives_its_first_frame(kind):
    """Only the first frame is used."""
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    pace = {} if kind in {"TIFF", "MPO"} else {"duration": 50}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **pace)
    assert colour_at(read_source(data), 9, 9) == pytest.approx((255, 0, 0), abs=4)


def test_large_image_is_scaled_down():
    """12 megapixels become two, with the same aspect ratio."""
    data = file_of(Image.new("RGB", (4000, 3000), (10, 200, 100)), "JPEG")
    image = read_source(data)
    assert image.size == (1664, 1248)
    assert colour_at(image, 800, 600) == pytest.approx((10, 200, 100), abs=4)


@pytest.mark.parametrize("size", [(30_000, 20_000), (12_000, 12_000), (11_000, 9500)])
def test_image_bomb_is_rejected_before_decoding(size):
    """The header is sufficient: these files contain no pixels."""
    rejection = rejection_of(png_header(*size))
    assert rejection.type == "image_too_large"
    assert rejection.ctx == {"max_width": 10_000, "max_height": 10_000}
    assert "100 megapixels" in str(rejection)


def test_pixel_limit_is_an_argument():
    """A smaller limit rejects smaller images."""
    data = file_of(Image.new("RGB", (300, 300)))
    assert rejection_of(data, max_pixels=89_999).type == "image_too_large"
    assert read_source(data, max_pixels=90_000).size == (304, 304)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_tracking_pixel_is_too_small(size):
    """A side under 16 px is rejected."""
    rejection = rejection_of(file_of(Image.new("RGB", size)))
    assert rejection.type == "image_too_small"
    assert rejection.ctx == {"min_width": 16, "min_height": 16}
    assert f"{size[0]}x{size[1]}" in str(rejection)


def test_smallest_image_is_scaled_up():
    """16 px per side are accepted and become 256."""
    assert read_source(file_of(Image.new("RGB", (16, 16)))).size == (256, 256)


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_file_is_rejected(kind, share):
    """An incomplete file is an image_load_error, even with 97 % of its bytes."""
    data = file_of(NOISE, kind)
    assert rejection_of(data[: int(len(data) * share)]).type == "image_load_error"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"<html><body>404</body></html>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='300' height='300'/>",
        b"\xff\xd8\xff\xe0" + b"\0" * 50,
    ],
)
def test_file_that_is_not_an_image_is_rejected(data):
    """Web pages, documents and other data are an image_load_error; PostScript is never executed."""
    rejection = rejection_of(data)
    assert rejection.type == "image_load_error"
    assert "source image" in str(rejection)


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damaged_file_is_read_or_rejected(position, damage):
    """Damaged bytes raise no error other than EngineFailure."""
    data = bytearray(file_of(NOISE.crop((0, 0, 40, 40)), "PNG"))
    position %= len(data)
    data[position : position + len(damage)] = damage
    with contextlib.suppress(EngineFailure):
        assert read_source(bytes(data)).mode == "RGB"


@pytest.mark.parametrize("output_format", ["jpeg", "png"])
def test_encoded_image_keeps_pixels_size_and_note(output_format):
    """The encoded image decodes to almost the same pixels and contains its note, also with non-ASCII text."""
    image = read_source(file_of(Image.linear_gradient("L").convert("RGB")))
    loaded = encode(image, output_format, "note: ü")
    again = Image.open(io.BytesIO(loaded.data))
    assert again.format == output_format.upper()
    assert loaded.content_type == f"image/{output_format}"
    assert (loaded.width, loaded.height) == again.size == image.size
    difference = np.abs(np.asarray(again.convert("RGB")).astype(int) - np.asarray(image))
    assert difference.max() <= (0 if output_format == "png" else 6)
    note = again.info["comment"].decode() if output_format == "jpeg" else again.text["Comment"]
    assert note == "note: ü"
