"""Opening of the manifest that a user names; standard input is copied to a file first. Assembly."""

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
    """Location of a manifest."""

    path: str | Path
    folder: Path | None = None
    """Base of relative image paths, if not the manifest's folder: the working directory, for standard input."""
    is_spooled: bool = False
    """Whether the file is temporary."""


@asynccontextmanager
async def located(named: str | Path | ManifestSource, settings: Settings) -> AsyncIterator[ManifestSource]:
    """Locate the named manifest. Standard input is copied to a temporary file, which exists during the block.

    Raises:
        ManifestError: standard input cannot be read. StorageError: it cannot be stored.
    """
    if isinstance(named, ManifestSource) or str(named) not in STDIN:
        yield named if isinstance(named, ManifestSource) else ManifestSource(named)
        return
    with TemporaryDirectory(prefix="restyle-", ignore_cleanup_errors=True) as folder:
        # Abandoned on Ctrl-C: the writer of the pipe may take hours.
        path = await anyio.to_thread.run_sync(
            partial(spool, Path(folder), settings.manifest.format), abandon_on_cancel=True
        )
        try:
            yield ManifestSource(path, Path.cwd(), is_spooled=True)
        except ManifestError as error:
            raise ManifestError(str(error).replace(str(path), "standard input")) from error


def open_manifest(source: ManifestSource, settings: Settings) -> Manifest:
    """Open the manifest with these settings.

    Raises:
        ManifestError: the manifest is unusable.
    """
    return Manifest.open(source.path, settings.limits.rows, dialect_of(settings), source.folder)


def keep(source: ManifestSource, root: Path) -> ManifestSource:
    """Copy a temporary manifest into the run directory, so that `export` and `reconcile` find it.

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
        raise StorageError(f"{kept} cannot be written ({error.strerror}); free some space, then run again") from error
    return ManifestSource(kept, source.folder)


def with_columns(manifest: Manifest, settings: Settings) -> Settings:
    """Return the settings with the prompt column of a folder of images, where captions are often called `text`.

    Raises:
        ManifestError: neither a setting nor a column provides the prompts.
    """
    name = settings.manifest.prompt
    is_given = name != type(settings.manifest).model_fields["prompt"].default or name in manifest.schema
    if not manifest.has_images or is_given or "prompt" in settings.sweep:
        return settings
    if "text" in manifest.schema:
        mapped = settings.manifest.model_copy(update={"prompt": "text"})
        return settings.model_copy(update={"manifest": mapped})
    if settings.input.prompt is None:
        raise ManifestError(f"the images of {manifest.source} have no prompts; set one prompt for all with --prompt")
    return settings
