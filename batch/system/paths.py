"""Expand `~` in paths like a shell, which does not do it in quotes and in `--out=~/run`. Edge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from batch.errors import ConfigError

__all__ = ["at_home"]

P = TypeVar("P", bound=str | Path)


def at_home(path: P) -> P:
    """Replace `~` or `~name` at the start by that user's home folder; return any other path unchanged.

    Raises:
        ConfigError: there is neither such a user nor a folder of that name, or the home folder is unknown.
    """
    text = str(path)
    if not text.startswith("~"):
        return path
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises for an unknown user
    if expanded == text:
        first, slash, _ = text.partition("/")
        if first == "~":
            raise ConfigError(f"{text}: the home folder is unknown; set HOME, or write the whole path")
        if slash and not os.path.lexists(first):
            raise ConfigError(f"{text}: there is no user {first[1:]!r}; write the whole path")
    return type(path)(expanded)
