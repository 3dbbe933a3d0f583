"""Paths that begin with `~`, as a shell expands them; in `--out=~/run` and in quotes it does not. Edge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from batch.errors import ConfigError

__all__ = ["at_home"]

P = TypeVar("P", bound=str | Path)


def at_home(path: P) -> P:
    """The path with `~` or `~name` at its start replaced by that user's home folder; any other as it is.

    Raises:
        ConfigError: there is no such user, nor a folder with that very name; or the home folder is not known.
    """
    text = str(path)
    if not text.startswith("~"):
        return path
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises for an unknown user
    if expanded == text:
        first, slash, _ = text.partition("/")
        if first == "~":
            raise ConfigError(f"{text}: the home folder of this user is not known; set HOME, or write the whole path")
        if slash and not os.path.lexists(first):
            raise ConfigError(f"{text}: there is no user {first[1:]!r}; write the whole path")
    return type(path)(expanded)
