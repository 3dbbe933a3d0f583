"""From a hub id to a folder: the hub's cache on this machine, else a download. Both in a process of their own.

    python -m batch.server.engines.flux.hub find|download ID PATTERN...

Owns what of a repository is fetched. Where the cache is, and which snapshot in it is the newest, the hub's client
library knows; only the child imports it, so that it never reaches the process of the server.
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
"""Of a model's repository; its root also has the same weights once more, in one file of 24 GB."""
CHECKER_FILES = ("*.json", "model.safetensors")
Task: TypeAlias = Literal["find", "download"]
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
    with suppress(InputError):
        # `check` decides whether a snapshot is complete: another program may have fetched less than all patterns.
        return check(_asked("find", given, patterns[:1]))
    return check(_asked("download", given, patterns))


def main(task: Task, repository: str, patterns: list[str]) -> int:
    """Print the folder of a repository's newest snapshot, or one sentence and fail.

    Args:
        task: `find` only looks into the cache of this machine; `download` asks the hub and fetches what is missing.
        repository: a hub id.
        patterns: files that the snapshot has to have.
    """
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, allow_patterns=patterns, local_files_only=task == "find")
    except Exception as error:  # the boundary to the hub's client: every fault is told to a person
        sys.stdout.write(_sentence(repository, error) + "\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def _asked(task: Task, repository: str, patterns: Sequence[str]) -> Path:
    """What a child prints that does the task.

    Raises:
        InputError: it failed; the message is its sentence.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - the import system's own ""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-P", "-m", "batch.server.engines.flux.hub", task, repository, *patterns]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    said = ended.stdout.strip().rpartition("\n")[2]
    if ended.returncode:
        raise InputError(said or f"{repository} could not be downloaded; the lines above say why")
    return Path(said)


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
    sys.exit(main(cast(Task, sys.argv[1]), sys.argv[2], sys.argv[3:]))
