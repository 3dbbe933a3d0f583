"""Detect manifest formats from the names and first bytes of files. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from batch.errors import ManifestError

__all__ = ["HEAD_BYTES", "IMAGES", "Kind", "is_image", "kind_of", "looks_like", "suffixes_of"]

_SUFFIXES = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".arrows", ".feather", ".ipc"),
}
_TEXT = ("csv", "tsv", "jsonl", "json")
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_BY_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes}
_SUPPORTED = (
    f"{', '.join(suffix for name in _TEXT for suffix in _SUFFIXES[name])} (also with {', '.join(_PACKED)}), "
    f"{', '.join(suffix for name in ('parquet', 'arrow') for suffix in _SUFFIXES[name])}, "
    "or a folder of Parquet files, Arrow files or images"
)

IMAGES = "images"
"""Format of a folder of images: one row per image."""
_IMAGES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif", ".tif", ".tiff", ".bmp", ".dib"}
)
_ADVICE = {
    "save it as CSV or Parquet": {".xlsx", ".xls", ".xlsb", ".ods", ".numbers"},
    "name the folder of the image, or a manifest": _IMAGES,
    "unpack it": {".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br"},
}

HEAD_BYTES = 8
"""Bytes at the start of a file that `looks_like` and `kind_of` need."""
_PACKINGS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"FEA1": "arrow"}


class Kind(NamedTuple):
    """The format and compression of a file."""

    name: str
    packing: str = ""
    """Suffix of the compression, such as `.gz`; empty if the file is not compressed."""

    @property
    def has_lines(self) -> bool:
        """Whether the format is text."""
        return self.name in _TEXT


def suffixes_of(name: str) -> tuple[str, ...]:
    """Return the file suffixes of a format; empty for an unknown one."""
    return _SUFFIXES.get(name, ())


def is_image(name: str) -> bool:
    """Return whether a file is an image, judged by its suffix."""
    return _suffix(name) in _IMAGES


def kind_of(path: Path, named: str | None = None, head: bytes = b"") -> Kind:
    """Return the format and compression of a file.

    Args:
        path: its name decides, unless `named` is given.
        named: the format from the settings; the compression then comes from `head`.
        head: the first `HEAD_BYTES` bytes of the file.

    Raises:
        ManifestError: the suffix is unknown.
    """
    if named is not None:
        packing = next((packing for magic, packing in _PACKINGS.items() if head.startswith(magic)), "")
        return Kind(named, packing if named in _TEXT else "")
    last = _suffix(path.name)
    packing = last if last in _PACKED else ""
    inner = _suffix(path.name[: -len(packing)]) if packing else last
    name = _BY_SUFFIX.get(inner)
    if name is None or (packing and name not in _TEXT):
        raise ManifestError(_unsupported(path, inner + packing, is_packed=name is not None))
    return Kind(name, packing)


def looks_like(head: bytes) -> str | None:
    """Return the format that the first bytes of a file indicate; None for CSV and unknown contents."""
    for magic, name in _BINARY.items():
        if head.startswith(magic):
            return name
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b"{": "jsonl", b"[": "json"}.get(first)


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _unsupported(path: Path, suffix: str, *, is_packed: bool) -> str:
    if not suffix:
        return f"unsupported manifest format: {path} has no suffix; supported: {_SUPPORTED}. Use --format to name one"
    advice = "unpack it" if is_packed else next((text for text, known in _ADVICE.items() if suffix in known), "")
    return f"unsupported manifest format {suffix!r} of {path}{advice and '; ' + advice}; supported: {_SUPPORTED}"
