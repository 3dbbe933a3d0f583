"""From a hub id to a folder: the hub's cache on this machine, else a download by a process of its own.

    python -m batch.server.engines.flux.hub ID PATTERN...

Owns where the cache lies and what of a repository is fetched. The server looks into the cache itself and leaves the
download to that child, so that the hub's client library never reaches its process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from batch.errors import InputError
from batch.server.engines.flux.folder import CheckedFolder

__all__ = ["CHECKER_FILES", "MODEL_FILES", "located", "main"]

MODEL_FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
"""Of a model's repository; its root also has the same weights once more, in one file of 24 GB."""
CHECKER_FILES = ("*.json", "model.safetensors")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(given: str, patterns: tuple[str, ...], check: Callable[[Path], CheckedFolder]) -> CheckedFolder:
    """The folder that is meant: one of this machine, a snapshot in the hub's cache, or one just downloaded.

    Blocks for as long as a download takes; its progress goes to standard error.

    Args:
        given: a path or a hub id.
        patterns: files of a repository that are fetched.
        check: judges a folder; a snapshot that it refuses, because its download was broken off, is fetched again.

    Raises:
        InputError: a hub id that cannot be had, or a folder that `check` refuses; the message says why.
    """
    folder = Path(given).expanduser()
    if folder.exists() or not _ID.fullmatch(given):
        return check(folder)
    if (snapshot := _cached(given)) is not None:
        with suppress(InputError):
            return check(snapshot)
    return check(_downloaded(given, patterns))


def main(repository: str, patterns: list[str]) -> int:
    """Download a repository's newest snapshot and print its folder, or one sentence and fail."""
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, allow_patterns=patterns)
    except Exception as error:  # the boundary to the hub's client: every fault is told to a person
        sys.stdout.write(_sentence(repository, error) + "\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def _downloaded(repository: str, patterns: tuple[str, ...]) -> Path:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - the import system's own ""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", "-m", "batch.server.engines.flux.hub", repository, *patterns]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    said = ended.stdout.strip().rpartition("\n")[2]
    if ended.returncode:
        raise InputError(said or f"{repository} could not be downloaded; the lines above say why")
    return Path(said)


def _cached(repository: str) -> Path | None:
    """The snapshot that `main` meant at the last download, as the hub's client finds it.

    Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home = os.environ.get("HF_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")).expanduser()
    place = cache / f"models--{repository.replace('/', '--')}"
    try:
        commit = (place / "refs/main").read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = place / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _sentence(repository: str, error: Exception) -> str:
    kind = type(error).__name__
    page = f"https://huggingface.co/{repository}"
    if kind == "GatedRepoError":
        why = (
            f"its licence has to be accepted first: accept it at {page}, then log in with `hf auth login` (or HF_TOKEN)"
        )
    elif kind == "RepositoryNotFoundError":
        why = f"the hub has no such repository, or not for you; look at {page}, log in with `hf auth login`"
    elif kind == "ModuleNotFoundError":
        why = "the hub's client is not installed: pip install 'restyle-batch[flux]'"
    else:
        first = (str(error).splitlines() or [""])[0][:300]
        why = f"{kind}: {first}; give --model a folder of this machine, or try again"
    return f"{repository} cannot be downloaded: {why}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
