"""From what a user calls the manifest to an opened one: files as they are, standard input kept in a file. Assembly."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio.to_thread

from batch.config import Settings
from batch.errors import ManifestError, StorageError
from batch.manifest.planner import dialect_of
from batch.manifest.reader import Manifest
from batch.manifest.stdin import spool
from batch.system.durable import replacing

__all__ = ["STDIN", "ManifestSource", "keep", "located", "open_manifest", "with_columns"]

STDIN = ("-", "/dev/stdin")


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """Where a manifest is."""

    path: str | Path
    folder: Path | None = None
    """Where relative paths of images start, if not at the file: the working directory of a manifest from standard
    input."""
    is_spooled: bool = False
    """Whether the file is temporary."""


@asynccontextmanager
async def located(named: str | Path | ManifestSource, settings: Settings) -> AsyncIterator[ManifestSource]:
    """The manifest of that name. Standard input is copied into a temporary file, which lasts for the block.

    Raises:
        ManifestError, StorageError: standard input cannot be read or kept.
    """
    if isinstance(named, ManifestSource) or str(named) not in STDIN:
        yield named if isinstance(named, ManifestSource) else ManifestSource(named)
        return
    with TemporaryDirectory(prefix="restyle-", ignore_cleanup_errors=True) as folder:
        # Abandoned on Ctrl-C: whoever writes to the pipe may take hours.
        path = await anyio.to_thread.run_sync(
            partial(spool, Path(folder), settings.manifest.format), abandon_on_cancel=True
        )
        try:
            yield ManifestSource(path, Path.cwd(), is_spooled=True)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(path), "standard input")) from error


def open_manifest(source: ManifestSource, settings: Settings) -> Manifest:
    """Open it as the settings say.

    Raises:
        ManifestError: it cannot be used.
    """
    return Manifest.open(source.path, settings.limits.rows, dialect_of(settings), source.folder)


def keep(source: ManifestSource, root: Path) -> ManifestSource:
    """Copy a temporary file into a run directory, so that `export` and `reconcile` find it.

    Raises:
        StorageError: the disk refused.
    """
    path = Path(source.path)
    kept = root / path.name
    try:
        if not (kept.exists() and filecmp.cmp(path, kept, shallow=False)):
            with path.open("rb") as original, replacing(kept, sync_name=False) as copy:
                shutil.copyfileobj(original, copy)
    except OSError as error:
        raise StorageError(f"{kept} cannot be written ({error.strerror}); make room, and run again") from error
    return ManifestSource(kept, source.folder)


def with_columns(manifest: Manifest, settings: Settings) -> Settings:
    """The settings with the prompt's column of a folder of images, whose captions are often called `text`.

    Raises:
        ManifestError: no setting and no column gives its images a prompt.
    """
    name = settings.manifest.prompt
    is_given = name != type(settings.manifest).model_fields["prompt"].default or name in manifest.schema
    if not manifest.has_images or is_given or "prompt" in settings.sweep:
        return settings
    if "text" in manifest.schema:
        mapped = settings.manifest.model_copy(update={"prompt": "text"})
        return settings.model_copy(update={"manifest": mapped})
    if settings.input.prompt is None:
        raise ManifestError(f"the images of {manifest.source} have no prompts; give one for all with --prompt")
    return settings
