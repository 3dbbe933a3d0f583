"""Errors that reach the user. Pure; every module may import it.

    RestyleError
    ├── InputError             invalid user input, nothing was submitted            exit 2
    │   ├── ConfigError        the configuration or a flag
    │   ├── ManifestError      the manifest as a whole (a bad row is data, not an error)
    │   └── RunDirectoryError  the run directory: another config, a newer journal, not writable
    ├── StoppedEarly           incomplete, resumable: run the same command again    exit 4
    │   └── StorageError       a write failed, for example on a full disk
    ├── RunLocked              another run holds the lock                           exit 5
    └── AccountRefused         the target refused the account (key, balance)        exit 6

Every message states what happened, the value, and what to do next, in that order. Any other exception that reaches the
user is a bug: exit 1.
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
    """Exit codes of all commands, documented in the README."""

    COMPLETE = 0
    UNEXPECTED = 1
    BAD_INPUT = 2
    SOME_FAILED = 3
    STOPPED_EARLY = 4
    LOCKED = 5
    ACCOUNT_REFUSED = 6


class RestyleError(Exception):
    """Base class of all errors that are raised on purpose."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED


class InputError(RestyleError):
    """The user's input is invalid; nothing was submitted."""

    exit_code = ExitCode.BAD_INPUT


class ConfigError(InputError):
    """A configuration file, an environment variable or a flag is invalid."""


class ManifestError(InputError):
    """The manifest as a whole cannot be used (missing, empty, without a needed column, not parseable)."""


class RunDirectoryError(InputError):
    """The run directory cannot be used with this command."""


class StoppedEarly(RestyleError):
    """The run stopped before it was complete; the same command resumes it."""

    exit_code = ExitCode.STOPPED_EARLY


class StorageError(StoppedEarly):
    """A write failed; earlier durable data is intact."""


class RunLocked(RestyleError):
    """Another process is using the same run directory."""

    exit_code = ExitCode.LOCKED


class AccountRefused(RestyleError):
    """The target refused the key or the account (401/403 on a submit)."""

    exit_code = ExitCode.ACCOUNT_REFUSED
