"""Resolve a hub id to a folder in the hub's local cache, downloading it if necessary, in a child process.

    python -m batch.server.engines.flux.hub find|download ID PATTERN...

Owns the list of files to fetch. The hub's client library locates the cache and its newest snapshot; only the child
imports it, which keeps it out of the server process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias, cast

from batch.errors import InputError
from batch.server.engines.flux.folder import CheckedFolder

__all__ = ["CHECKER_FILES", "MODEL_FILES", "Task", "located", "main"]

MODEL_FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
"""Files to fetch of a model. The root's copy of the same weights, a single file of 24 GB, is left out."""
CHECKER_FILES = ("*.json", "model.safetensors")
Task: TypeAlias = Literal["find", "download"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(model: str, patterns: tuple[str, ...], check: Callable[[Path], CheckedFolder]) -> CheckedFolder:
    """Return the checked folder of a path or hub id: a local folder, a cached snapshot or a new download.

    Blocks during the download; its progress goes to standard error.

    Args:
        model: a path or a hub id.
        patterns: files of the repository to fetch.
        check: validates a folder. A cached snapshot that it rejects, for example an incomplete one, is fetched again.

    Raises:
        InputError: the download failed, or `check` rejected the folder; the message gives the reason.
    """
    folder = Path(model).expanduser()
    if folder.exists() or not _ID.fullmatch(model):
        return check(folder)
    with suppress(InputError):
        # `check` decides whether a snapshot is complete: another program may have fetched only some of the patterns.
        return check(_run_task("find", model, patterns[:1]))
    return check(_run_task("download", model, patterns))


def main(task: Task, repository: str, patterns: list[str]) -> int:
    """Print the folder of a repository's newest snapshot and return 0, or print a one-line error and return 1.

    Args:
        task: `find` uses only the local cache; `download` contacts the hub and fetches missing files.
        repository: a hub id.
        patterns: files that the snapshot needs.
    """
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, allow_patterns=patterns, local_files_only=task == "find")
    except Exception as error:  # the boundary to the hub's client: every error becomes one line for the user
        sys.stdout.write(_message(repository, error) + "\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def _run_task(task: Task, repository: str, patterns: Sequence[str]) -> Path:
    """Run the task in a child process and return the folder that it prints.

    Raises:
        InputError: the child failed; the message is the line that it printed.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - the import system's own ""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", "-m", "batch.server.engines.flux.hub", task, repository, *patterns]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    last_line = ended.stdout.strip().rpartition("\n")[2]
    if ended.returncode:
        raise InputError(last_line or f"could not download {repository}; see the lines above")
    return Path(last_line)


def _message(repository: str, error: Exception) -> str:
    kind = type(error).__name__
    page = f"https://huggingface.co/{repository}"
    if kind == "GatedRepoError":
        reason = f"accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    elif kind == "RepositoryNotFoundError":
        reason = f"repository not found, or your account has no access: check {page} and log in with `hf auth login`"
    elif kind == "ModuleNotFoundError":
        reason = "the hub's client is not installed: pip install 'restyle-batch[flux]'"
    else:
        first = (str(error).splitlines() or [""])[0][:300]
        reason = f"{kind}: {first}; try again, or set --model to a local folder"
    return f"could not download {repository}: {reason}"


if __name__ == "__main__":
    sys.exit(main(cast(Task, sys.argv[1]), sys.argv[2], sys.argv[3:]))
