"""The version of the installed tool, alone in a module so that `restyle --version` loads nothing else. Pure."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["tool_version"]


def tool_version() -> str:
    """Return the version of the installed distribution; `0+unknown` in a bare checkout."""
    try:
        return version("restyle-batch")
    except PackageNotFoundError:
        return "0+unknown"
