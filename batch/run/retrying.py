"""Retry reads with tenacity until their verdict is not `READ_AGAIN`. Never for a submit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_never
from tenacity.stop import stop_base

from batch.fal.errors import CallFailed
from batch.run.verdicts import Action, Verdict, backoff, judge, kind_of, pause_after

__all__ = ["reading"]

Answered = TypeVar("Answered")


async def reading(
    call: Callable[[], Awaitable[Answered]],
    rng: Random,
    *,
    notice: Callable[[Verdict], None] | None = None,
    stop: stop_base = stop_never,
    now: Callable[[], float] | None = None,
) -> Answered:
    """Call a read, or an upload (repeating one costs bandwidth only), until its verdict is not READ_AGAIN.

    Never for a submit. `notice` is called for each error that is retried; `now` is Unix seconds, as for `judge`.
    Returns the answer, or raises the `CallFailed` that ended it.
    """
    try:
        return await call()  # the common case, without tenacity's overhead
    except CallFailed as error:
        return await _read_again(call, error, rng, notice, stop, now or (lambda: None))


async def _read_again(
    call: Callable[[], Awaitable[Answered]],
    first: CallFailed,
    rng: Random,
    notice: Callable[[Verdict], None] | None,
    stop: stop_base,
    now: Callable[[], float | None],
) -> Answered:
    seen: dict[str, int] = {}

    def again(error: BaseException) -> bool:
        if not isinstance(error, CallFailed):
            return False
        kind = kind_of(error.trouble)
        seen[kind] = seen.get(kind, 0) + 1
        verdict = judge(error.trouble, seen=seen[kind], now=now())
        if notice is not None and verdict.action is Action.READ_AGAIN:
            notice(verdict)
        return verdict.action is Action.READ_AGAIN

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, CallFailed):
            return 0.0
        asked = judge(error.trouble, now=now()).retry_after or 0.0
        return asked + pause_after(error.trouble, state.attempt_number, rng)

    async def once() -> Answered:  # tenacity awaits coroutine functions only
        return await call()

    if not again(first):
        raise first
    await anyio.sleep((judge(first.trouble, now=now()).retry_after or 0.0) + backoff(1, rng))
    retrying = AsyncRetrying(retry=retry_if_exception(again), wait=wait, stop=stop, sleep=anyio.sleep, reraise=True)
    return await retrying(once)
