"""The steps of every command between parsing its flags and printing its result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

from batch.errors import RestyleError
from batch.system import signals
from batch.system.descriptors import require
from batch.system.open_files import allowance

__all__ = ["begin", "run_call"]

T = TypeVar("T")
_LEAST_FILES = 12
"""Descriptors for an event loop and a few files. With fewer, failures have no useful message."""


def run_call(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Call a coroutine function in an event loop; of a group of errors, raise the first one of ours."""
    from batch.api import event_loop

    begin()
    try:
        return anyio.run(call, backend_options=event_loop())
    except BaseExceptionGroup as group:
        raise _single(group) from group


def begin() -> None:
    """Turn on the garbage collector and signals, now that all modules are loaded.

    Raises:
        InputError: the limit of open files is too low for any command.
    """
    require(allowance(), _LEAST_FILES)
    # Without this, a quarter of a large plan is spent on collecting imported modules again and again.
    gc.freeze()
    gc.enable()  # `batch.__main__` turned it off
    signals.take()


def _single(error: BaseException) -> BaseException:
    """Return the first of our own errors in a group, else its first error."""
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, RestyleError)]
    return (ours or leaves)[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
