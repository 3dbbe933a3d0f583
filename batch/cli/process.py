"""What every command does between parsing its flags and printing its result."""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

from batch.errors import RestyleError
from batch.system import signals as interrupts
from batch.system.descriptors import require
from batch.system.open_files import allowance

__all__ = ["begin", "run_call"]

T = TypeVar("T")
_LEAST_FILES = 12
"""Descriptors of an event loop and of a file or two; without them it fails in ways that say nothing."""


def run_call(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Call a coroutine function in an event loop; of a group of errors, raise the first one of ours."""
    from batch.api import event_loop

    begin()
    try:
        return anyio.run(call, backend_options=event_loop())
    except BaseExceptionGroup as group:
        raise _single(group) from group


def begin() -> None:
    """All modules are here: the collector works again, but not through them, and signals are taken again.

    Raises:
        InputError: too few files may be open for any command.
    """
    require(allowance(), _LEAST_FILES)
    # Else a quarter of a large plan would go into walking through what was imported again and again.
    gc.freeze()
    gc.enable()  # `batch.__main__` has both wait until here
    interrupts.take()


def _single(error: BaseException) -> BaseException:
    """The first of our own errors in a group, else its first error."""
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, RestyleError)]
    return (ours or leaves)[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
