"""The version of the installed tool. Knows nothing else, so that `restyle --version` loads nothing else. Pure."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["tool_version"]


def tool_version() -> str:
    """Of the installed distribution; `0+unknown` in a bare checkout."""
    try:
        return version("restyle-batch")
    except PackageNotFoundError:
        return "0+unknown"
