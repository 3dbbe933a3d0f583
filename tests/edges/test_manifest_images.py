"""Image references: real files of every format, valid and invalid references, and the cache of facts."""

import base64
import hashlib
import io
import os
import pwd
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image

from batch.image_formats import READABLE
from batch.manifest.images import MemoryFacts, SourceImages
from batch.manifest.types import CellError, FileFact, FileKey, Resolved
from batch.types import LocalImage


def image_bytes(kind: str = "PNG", size: tuple[int, int] = (40, 25)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, kind)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a tiny PNG with a large size in its header: decoding it would take gigabytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def images(tmp_path) -> SourceImages:
    return SourceImages(tmp_path, 100)


def one(images: SourceImages, reference: object) -> Resolved | CellError:
    (answer,) = images.resolve([reference])
    return answer


# --- valid references ---


@pytest.mark.parametrize("url", ["https://a.example/1.png?x=y", "http://localhost:8000/a b.jpg", "HTTPS://A.EXAMPLE"])
def test_web_urls_pass_through_unknown_in_size(images, url) -> None:
    """Planning downloads nothing."""
    assert one(images, url) == Resolved(url, None, None)


def test_a_data_uri_passes_through_with_its_size(images) -> None:
    """Its header is checked."""
    uri = "data:image/png;base64," + base64.b64encode(image_bytes()).decode()
    assert one(images, uri) == Resolved(uri, None, 0.001)


@pytest.mark.parametrize("kind", [*READABLE, "MPO"])
def test_a_local_image_resolves_to_its_content_hash_and_size(tmp_path, images, kind) -> None:
    """This holds for every supported format; the size comes from the header."""
    data = image_bytes(kind)
    path = tmp_path / "a cat.bin"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    image = LocalImage(digest, len(data), path=path, name="a cat.bin")
    assert one(images, "a cat.bin") == Resolved(f"sha256:{digest}", image, 0.001)


def test_paths_and_file_urls_name_the_same_file(tmp_path, images) -> None:
    """Relative paths start at the manifest's folder, not the working directory; `%20` in a URL is a space."""
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "a cat.png"
    path.write_bytes(image_bytes())
    names = ["sub/a cat.png", "./sub/../sub/a cat.png", str(path), path.as_uri(), "file://sub/a%20cat.png"]
    names.append("file://localhost" + path.as_uri().removeprefix("file://"))
    for answer in images.resolve(names):
        assert isinstance(answer, Resolved), answer
        assert answer.image.path == path


def test_a_struct_gives_its_bytes_or_else_its_path(tmp_path, images) -> None:
    """This is the format of Hugging Face datasets; a cell of bytes works too."""
    data = image_bytes()
    (tmp_path / "cat.png").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    embedded = LocalImage(digest, len(data), data=data, name="dog.png")
    assert one(images, {"bytes": data, "path": "x/dog.png"}) == Resolved(f"sha256:{digest}", embedded, 0.001)
    assert one(images, {"bytes": data, "path": None}).image.name == "image"
    assert one(images, data).token == f"sha256:{digest}"
    assert one(images, {"bytes": None, "path": "cat.png"}).image.path == tmp_path / "cat.png"
    assert one(images, {"bytes": None, "path": "https://a/1.png"}) == Resolved("https://a/1.png")


def test_answers_keep_the_order_of_the_references(tmp_path, images) -> None:
    """This holds although threads read the files, and with repeated references."""
    names = [f"{index}.png" for index in range(40)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(image_bytes(size=(index + 1, 10)))
    references = [*names, "https://a/1", *reversed(names), None]
    answers = images.resolve(references)
    assert [answer.image.name for answer in answers[:40]] == names
    assert [answer.megapixels for answer in answers[41:81]] == [(40 - index) / 100_000 for index in range(40)]
    assert answers[40] == Resolved("https://a/1")
    assert answers[81].type == "missing"


# --- invalid references ---


@pytest.mark.parametrize(
    ("reference", "type", "words"),
    [
        (None, "missing", ["empty"]),
        ("", "missing", ["empty"]),
        ("  ", "missing", ["empty"]),
        (b"", "missing", ["empty"]),
        ({"bytes": None, "path": None}, "missing", ["empty"]),
        ("nowhere.png", "file_not_found", ["nowhere.png", "manifest's folder"]),
        ("text.png/deeper.png", "file_not_found", ["deeper.png"]),
        ("folder", "is_a_folder", ["folder", "name an image in it"]),
        ("nul\0.png", "unreadable", ["cannot be read"]),
        ("x" * 300, "unreadable", ["cannot be read", "File name too long"]),
        ("pipe", "unreadable", ["not a regular file"]),
        ("text.png", "image_load_error", ["text.png", "JPEG, PNG"]),
        ("empty.png", "image_load_error", ["empty.png"]),
        ("cut.png", "image_load_error", ["cut.png"]),
        (b"not an image", "image_load_error", ["JPEG, PNG"]),
        ({"bytes": b"no", "path": "dog.png"}, "image_load_error", ["dog.png"]),
        ("s3://bucket/cat.png", "unsupported_scheme", ["s3://bucket/cat.png", "http(s) URL"]),
        ("ftp://host/cat.png", "unsupported_scheme", ["ftp://host/cat.png"]),
        ("https:///cat.png", "unsupported_scheme", ["has no host"]),
        ("data:text/plain;base64,aGk=", "data_uri", ["data:text/plain", "data:image/"]),
        ("data:image/png,raw", "data_uri", ["base64"]),
        ("data:image/png;base64,!!!", "data_uri", ["not valid base64"]),
        ("data:image/png;base64,aGVsbG8=", "image_load_error", ["data:image/png"]),
    ],
)
def test_an_invalid_reference_is_an_error_of_its_cell(tmp_path, images, reference, type, words) -> None:  # noqa: A002
    """The error has a stable type and a message with the value and the fix; nothing is raised."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_bytes(b"text in a file with the suffix of an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(image_bytes()[:20])
    os.mkfifo(tmp_path / "pipe")
    answer = one(images, reference)
    assert isinstance(answer, CellError)
    assert answer.type == type
    for word in words:
        assert word in answer.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_missing_permissions_are_an_error_of_the_cell(tmp_path, images) -> None:
    """The run itself continues."""
    path = tmp_path / "secret.png"
    path.write_bytes(image_bytes())
    path.chmod(0)
    assert one(images, "secret.png").type == "unreadable"


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 9_000)])
def test_an_image_above_the_limit_is_refused_by_its_header(tmp_path, images, width, height) -> None:
    """Pillow's own limits, which warn or raise, do not apply; nothing is decoded."""
    data = huge_png(width, height)
    (tmp_path / "huge.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = images.resolve(["huge.png", data, uri])
        allowed = one(SourceImages(tmp_path, 400), "huge.png")
    for answer in answers:
        assert answer.type == "image_too_large"
        assert f"{width * height / 1e6:.1f} megapixels" in answer.message
        assert "limits.max_image_megapixels is 100" in answer.message
    assert allowed.megapixels == width * height / 1e6


# --- facts ---


class RecordingFacts(MemoryFacts):
    """A cache that records the stored facts."""

    def __init__(self) -> None:
        super().__init__()
        self.put: list[FileKey] = []

    def put_many(self, facts) -> None:
        self.put += facts
        super().put_many(facts)


def test_a_file_is_read_once_until_it_changes(tmp_path) -> None:
    """A resumed run checks only names, sizes and times; a changed file is another image."""
    path = tmp_path / "cat.png"
    path.write_bytes(image_bytes())
    facts = RecordingFacts()
    first = one(SourceImages(tmp_path, 100, facts), "cat.png")
    assert one(SourceImages(tmp_path, 100, facts), "cat.png") == first
    assert facts.put == [FileKey(str(path), path.stat().st_size, path.stat().st_mtime_ns)]
    path.write_bytes(image_bytes(size=(80, 25)))
    os.utime(path, ns=(1, 1))
    assert one(SourceImages(tmp_path, 100, facts), "cat.png").token != first.token
    assert len(facts.put) == 2


def test_known_facts_are_used_without_reading_and_checked_against_the_current_limit(tmp_path) -> None:
    """The facts contain the size; the limit is applied each time."""
    path = tmp_path / "cat.png"
    path.write_bytes(b"never read")
    facts = MemoryFacts()
    facts.put_many({FileKey(str(path), 10, path.stat().st_mtime_ns): FileFact("ab" * 32, 50.0)})
    assert one(SourceImages(tmp_path, 100, facts), "cat.png").token == "sha256:" + "ab" * 32
    assert one(SourceImages(tmp_path, 10, facts), "cat.png").type == "image_too_large"


def test_an_invalid_image_leaves_no_fact(tmp_path) -> None:
    """The file is read again, because it may have been repaired."""
    (tmp_path / "cat.png").write_bytes(b"broken")
    facts = RecordingFacts()
    one(SourceImages(tmp_path, 100, facts), "cat.png")
    assert facts.put == []


def test_facts_in_memory_are_bounded() -> None:
    """Millions of files do not fill the memory; the newest facts are kept."""
    facts = MemoryFacts(limit=10)
    keys = [FileKey(f"/{index}", 1, 1) for index in range(25)]
    for key in keys:
        facts.put_many({key: FileFact("ab", 1.0)})
    assert list(facts.get_many(keys)) == keys[15:]


def test_the_folder_may_be_relative(tmp_path, monkeypatch) -> None:
    """Facts and images still have absolute paths."""
    (tmp_path / "cat.png").write_bytes(image_bytes())
    monkeypatch.chdir(tmp_path)
    assert one(SourceImages(Path(), 100), "cat.png").image.path == tmp_path / "cat.png"


# --- home folders ---


@pytest.mark.parametrize("reference", ["~/sub/cat.png", "~/sub/../sub/cat.png", "file://~/sub/cat.png"])
def test_a_tilde_is_the_users_home(tmp_path, images, monkeypatch, reference) -> None:
    """The expansion is that of a shell, also in a struct, and even if the manifest's folder contains a folder `~`."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (home / "sub" / "cat.png").write_bytes(image_bytes())
    (tmp_path / "~" / "sub").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for cell in (reference, {"bytes": None, "path": reference}):
        assert one(images, cell).image.path == home / "sub" / "cat.png"
    assert one(images, "./~/sub/cat.png").type == "file_not_found"


def test_a_tilde_with_a_name_is_that_users_home(images, monkeypatch) -> None:
    """The system's user database decides, not HOME."""
    monkeypatch.setenv("HOME", "/nowhere")
    user = pwd.getpwuid(os.geteuid())
    answer = one(images, f"~{user.pw_name}/no such file.png")
    assert answer.type == "file_not_found"
    assert f"{Path(user.pw_dir) / 'no such file.png'}" in answer.message


def test_an_unknown_user_is_an_error_of_the_cell(tmp_path, images) -> None:
    """An existing file or folder whose name begins with a tilde is used, as in a shell."""
    answer = one(images, "~no-such-user/cat.png")
    assert answer.type == "file_not_found"
    assert "'~no-such-user/cat.png': there is no user 'no-such-user'; use the full path" in answer.message
    (tmp_path / "~no-such-user").mkdir()
    for name in ("~no-such-user/cat.png", "~cat.png", "cat~.png"):
        (tmp_path / name).write_bytes(image_bytes())
        assert one(images, name).image.path == tmp_path / name
    assert "manifest's folder" in one(images, "~dog.png").message


def test_an_unknown_home_is_an_error_of_the_cell(images, monkeypatch) -> None:
    """This is a container's user without a passwd entry and HOME."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["none"])
    answer = one(images, "~/cat.png")
    assert (answer.type, "the home folder is unknown" in answer.message) == ("file_not_found", True)
