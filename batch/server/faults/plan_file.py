"""The faults file on disk: read by the server that commits the faults, and before it by whoever starts one. Edge: disk.

What stands in it is judged by `batch.server.faults.plan`.
"""

from __future__ import annotations

from pathlib import Path

from batch.errors import ConfigError
from batch.server.faults.plan import FaultPlan, parse_faults

__all__ = ["read_faults"]


def read_faults(path: Path) -> FaultPlan:
    """Read a faults file.

    Raises:
        ConfigError: there is none, or it is not one; the message says where.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the faults file {path} cannot be read: {reason}; configs/faults.toml is one") from error
    return parse_faults(text, str(path))
