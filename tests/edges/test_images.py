"""Image files on a real disk: format detection, decoding, and durable storage without duplicates."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
import zlib

import pytest
from PIL import Image

from batch.errors import StorageError
from batch.run.images import ImageFolder, decode
from batch.run.interfaces import ImageError
from batch.types import LocalImage

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def folder(tmp_path):
    return ImageFolder(tmp_path, limit_megapixels=100)


def image_bytes(kind: str = "PNG", size: tuple[int, int] = (20, 10), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    noise = Image.effect_noise(size, 80).convert(mode)
    noise.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Return the header of a huge one-bit PNG with almost no data: tiny, but expensive to decode."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + width // 8) * min(height, 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def local(content: bytes, **where) -> LocalImage:
    return LocalImage(hashlib.sha256(content).hexdigest(), len(content), **where)


# --- decoding ---------------------------------------------------------------------------------------------


KINDS = [
    *[("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1")],
    *[("JPEG", mode) for mode in ("RGB", "CMYK", "L")],
    ("WEBP", "RGB"),
    ("GIF", "L"),
    ("TIFF", "RGB"),
    ("BMP", "RGB"),
    ("AVIF", "RGB"),
]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_a_image_proves_its_size_and_format(kind, mode):
    """Detected from the bytes, not from a name or an HTTP header."""
    seen = decode(image_bytes(kind, (31, 17), mode))
    assert (seen.width, seen.height, seen.format) == (31, 17, kind)
    assert seen.content_type == f"image/{kind.lower()}"


def several(kind: str) -> bytes:
    """Return a file with two images."""
    buffer = io.BytesIO()
    first, second = (Image.effect_noise((31, 17), 80).convert("RGB") for _ in range(2))
    first.save(buffer, kind, save_all=True, append_images=[second])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "content_type", "suffix"),
    [
        ("MPO", "image/jpeg", ".jpg"),  # from phones
        ("PNG", "image/png", ".png"),  # animated
        ("GIF", "image/gif", ".gif"),
        ("WEBP", "image/webp", ".webp"),
        ("TIFF", "image/tiff", ".tiff"),
        ("AVIF", "image/avif", ".avif"),
    ],
)
async def test_a_file_of_several_images_is_of_the_type_of_its_first(folder, tmp_path, kind, content_type, suffix):
    """As a source, uploaded with its type, and as a result, whose file name has its suffix."""
    data = several(kind)
    (tmp_path / "photo").write_bytes(data)
    loaded = await folder.load(local(data, path=tmp_path / "photo", name="photo"))
    stored = await folder.store(data)
    assert (loaded.content_type, stored.content_type) == (content_type, content_type)
    assert (stored.path or "").endswith(suffix)
    assert (stored.width, stored.height) == (31, 17)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_image_that_was_cut_off_is_damaged(kind, share):
    """A truncated download must not become a result."""
    data = image_bytes(kind, (200, 200))
    with pytest.raises(ImageError) as caught:
        decode(data[: int(len(data) * share)])
    assert caught.value.type == "image_load_error"


NO_IMAGES = [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(range(256)) * 20]


@pytest.mark.parametrize("missing", [1, 4, 12, 20, 60])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_few_bytes_missing_at_the_end_are_noticed(kind, missing):
    """Even if all pixels decode, the file is not the original one."""
    with pytest.raises(ImageError):
        decode(image_bytes(kind, (200, 200))[:-missing])


@pytest.mark.parametrize("data", NO_IMAGES, ids=len)
def test_what_is_no_image_is_refused(data):
    """The error type is the endpoint's own."""
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.type == "image_load_error"


@pytest.mark.parametrize("side", [20_000, 30_000])
def test_a_image_of_too_many_pixels_is_never_unpacked(side):
    """A few kilobytes that decode to gigabytes are refused by the header, also at Pillow's limit."""
    with pytest.raises(ImageError) as caught:
        decode(png_of(side, side), limit_pixels=100_000_000)
    assert caught.value.type == "image_too_large"


def test_pillows_warning_of_large_images_is_not_ours():
    """An image between Pillow's warning limit and ours is accepted."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    assert decode(buffer.getvalue()).width == 10_000


def test_a_image_with_broken_metadata_is_still_one():
    """Unreadable EXIF data is not a reason to pay twice."""
    assert decode(image_bytes("JPEG", exif=b"Exif\x00\x00garbage")).width == 20


# --- storing ----------------------------------------------------------------------------------------------


async def test_a_result_is_stored_under_the_hash_of_its_content(folder, tmp_path):
    """`images/ab/abcd....jpg`; the record has the facts of the decoded bytes."""
    data = image_bytes("JPEG", (64, 48))
    stored = await folder.store(data)
    digest = hashlib.sha256(data).hexdigest()
    assert stored.path == f"images/{digest[:2]}/{digest}.jpg"
    assert (tmp_path / stored.path).read_bytes() == data
    assert (stored.width, stored.height, stored.file_size, stored.sha256) == (64, 48, len(data), digest)
    assert stored.content_type == "image/jpeg"
    assert (tmp_path / stored.path).stat().st_mode & 0o777 == 0o644


async def test_equal_bytes_are_stored_once(folder, tmp_path):
    """An existing file is not written again."""
    data = image_bytes()
    first = await folder.store(data)
    before = (tmp_path / first.path).stat().st_mtime_ns
    assert await folder.store(data) == first
    assert (tmp_path / first.path).stat().st_mtime_ns == before
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


async def test_a_file_of_another_length_is_written_again(folder, tmp_path):
    """It was truncated; the name promises the content."""
    data = image_bytes()
    stored = await folder.store(data)
    (tmp_path / stored.path).write_bytes(data[:10])
    await folder.store(data)
    assert (tmp_path / stored.path).read_bytes() == data


async def test_a_damaged_result_leaves_no_file(folder, tmp_path):
    """It is verified before it is written."""
    with pytest.raises(ImageError):
        await folder.store(image_bytes()[:-20])
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_that_refuses_is_named(tmp_path):
    """The message has the error, the path and the advice; no partial file stays."""
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        await ImageFolder(tmp_path, limit_megapixels=100).store(image_bytes())
    assert str(tmp_path / "images") in str(caught.value)
    assert "run the same command again" in str(caught.value)


async def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    """The next run removes partial files and keeps complete ones."""
    whole = await ImageFolder(tmp_path, limit_megapixels=100).store(image_bytes())
    (tmp_path / "images" / ".part" / "leftover").write_bytes(b"half")
    ImageFolder(tmp_path, limit_megapixels=100)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [whole.path]


async def test_a_image_of_an_earlier_run_makes_no_other_fail(tmp_path):
    """A run was killed between an image and its row: the image comes again, then another one for the same folder."""
    images = [image_bytes(size=(4, height)) for height in range(1, 300)]
    by_folder: dict[str, list[bytes]] = {}
    for data in images:
        by_folder.setdefault(hashlib.sha256(data).hexdigest()[:2], []).append(data)
    one, other = next(few for few in by_folder.values() if len(few) > 1)[:2]
    await ImageFolder(tmp_path, limit_megapixels=100).store(one)
    later = ImageFolder(tmp_path, limit_megapixels=100)
    assert (tmp_path / (await later.store(one)).path).read_bytes() == one
    assert (tmp_path / (await later.store(other)).path).read_bytes() == other


async def test_a_folder_that_was_removed_is_made_again(folder, tmp_path):
    """A user moved the first images away during the run."""
    data = image_bytes()
    stored = await folder.store(data)
    shutil.rmtree(tmp_path / "images")
    await folder.store(data)
    assert (tmp_path / stored.path).read_bytes() == data


# --- loading ----------------------------------------------------------------------------------------------


async def test_a_local_image_is_read_verified_and_measured(folder, tmp_path):
    """From a file and from bytes in the manifest."""
    data = image_bytes("JPEG", (1000, 500))
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for image in (local(data, path=path), local(data, data=data)):
        loaded = await folder.load(image)
        assert (loaded.data, loaded.content_type, loaded.megapixels) == (data, "image/jpeg", 0.5)


async def test_a_image_that_changed_since_the_plan_is_refused(folder, tmp_path):
    """The job key contains the hash of the planned image."""
    path = tmp_path / "a.png"
    path.write_bytes(image_bytes())
    with pytest.raises(ImageError, match="changed while the run went on") as caught:
        await folder.load(LocalImage("0" * 64, 100, path=path))
    assert caught.value.type == "image_changed"
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder"])
async def test_a_image_that_cannot_be_read_is_a_fault_of_its_row(folder, tmp_path, kind):
    """The file may disappear between plan and submit."""
    path = tmp_path if kind == "folder" else tmp_path / "gone.png"
    with pytest.raises(ImageError, match="cannot be read") as caught:
        await folder.load(LocalImage("0" * 64, 100, path=path))
    assert caught.value.type == "image_load_error"


async def test_a_image_that_cannot_be_decoded_is_not_uploaded(folder):
    """The service would refuse it after the upload, or charge for it."""
    data = image_bytes("JPEG", (100, 100))[:-500]
    with pytest.raises(ImageError, match="damaged or incomplete"):
        await folder.load(local(data, data=data))


async def test_the_users_limit_counts_for_sources(tmp_path):
    """`limits.max_image_megapixels` applies to sources; results have only the hard limit."""
    small = ImageFolder(tmp_path, limit_megapixels=0.0001)
    data = image_bytes(size=(20, 10))
    with pytest.raises(ImageError) as caught:
        await small.load(local(data, data=data))
    assert caught.value.type == "image_too_large"
    assert (await small.store(data)).width == 20
