"""The errors that reach a user. Pure; every module may import it.

    RestyleError
    ├── InputError             fix what you gave us, nothing was submitted         exit 2
    │   ├── ConfigError        the configuration or a flag
    │   ├── ManifestError      the manifest as a whole (a bad row is data, not an error)
    │   └── RunDirectoryError  the run directory: another config, a newer journal, unwritable
    ├── StoppedEarly           not finished, resumable: run the same command again  exit 4
    │   └── StorageError       a disk is full or refuses to be written
    ├── RunLocked              another run holds the lock                           exit 5
    └── AccountRefused         the target refused the account (key, balance)        exit 6

Every message says what happened, the value, and what to do next, in that order. Anything else that escapes
is a defect of ours: exit 1.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

__all__ = [
    "AccountRefused",
    "ConfigError",
    "ExitCode",
    "InputError",
    "ManifestError",
    "RestyleError",
    "RunDirectoryError",
    "RunLocked",
    "StoppedEarly",
    "StorageError",
]


class ExitCode(IntEnum):
    """The same for every command; documented in the README."""

    COMPLETE = 0
    UNEXPECTED = 1
    BAD_INPUT = 2
    SOME_FAILED = 3
    STOPPED_EARLY = 4
    LOCKED = 5
    ACCOUNT_REFUSED = 6


class RestyleError(Exception):
    """Base of everything that we raise on purpose."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED


class InputError(RestyleError):
    """The user's input is wrong; nothing was submitted."""

    exit_code = ExitCode.BAD_INPUT


class ConfigError(InputError):
    """A configuration file, an environment variable or a flag is wrong."""


class ManifestError(InputError):
    """The manifest cannot be used at all (missing, empty, a column missing, not parseable)."""


class RunDirectoryError(InputError):
    """The run directory cannot be used with this command."""


class StoppedEarly(RestyleError):
    """The run stopped before it was complete; the same command goes on with it."""

    exit_code = ExitCode.STOPPED_EARLY


class StorageError(StoppedEarly):
    """Something could not be written; what was durable before is still there."""


class RunLocked(RestyleError):
    """Another process works in the same run directory."""

    exit_code = ExitCode.LOCKED


class AccountRefused(RestyleError):
    """The target refused the key or the account (401/403 on a submit)."""

    exit_code = ExitCode.ACCOUNT_REFUSED
