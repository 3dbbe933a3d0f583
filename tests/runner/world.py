"""A runner with fakes around it, for tests in virtual time."""

from __future__ import annotations

from contextlib import aclosing
from random import Random

import anyio

from batch.fal.endpoint import APP_ID
from batch.manifest.hashing import job_key
from batch.money import Budget
from batch.run.admission import Admission
from batch.run.context import Policy, RunContext
from batch.run.reconcile import Reconciler
from batch.run.runner import Runner
from batch.run.verdicts import REPEAT_SECONDS, Idempotency
from batch.run.window import Window
from batch.testing.images import MemoryImages
from batch.testing.journal import MemoryJournal
from batch.testing.observer import RecordingObserver
from batch.types import Job


def jobs(count: int, word: str = "as a watercolor") -> list[Job]:
    made = []
    for number in range(count):
        body = {"image_url": f"https://images.example/{number}.jpg", "prompt": f"{number} {word}", "seed": number}
        made.append(Job(job_key(APP_ID, body), body, megapixels=1.0))
    return made


async def batches(made, size: int = 50):
    for start in range(0, len(made), size):
        yield made[start : start + size]


class World:
    """A runner with fakes; `again()` is the next session after a crash or an end."""

    def __init__(
        self,
        service,
        *,
        window=16,
        price=None,
        budget=None,
        submits=None,
        policy=None,
        seed=7,
        reconciles=False,
        polls=None,
        hints=None,
    ):
        self.service, self.journal = service, MemoryJournal()
        self.reconciles, self.polls, self.hints = reconciles, polls, hints
        self.images, self.observer = MemoryImages(), RecordingObserver()
        self.window, self.price, self.limit, self.submits = window, price, budget, submits
        self.policy, self.seed = policy or Policy(), seed
        self.runner = None

    async def run(self, made, policy=None):
        counts = await self.journal.counts()
        rng = Random(self.seed)
        window = self.window if isinstance(self.window, Window) else Window(self.window)
        admission = Admission(
            window=window,
            budget=Budget(self.limit, spent=counts.spent_usd, reserved=counts.reserved_usd),
            price=self.price,
            submits=self.submits,
            observer=self.observer,
            rng=rng,
        )
        decided = policy or self.policy
        repeated_for = REPEAT_SECONDS if decided.idempotency is Idempotency.REJECT else 0.0
        reconciler = Reconciler(
            self.service, self.journal, self.observer, anyio.current_time, rng, repeated_for=repeated_for
        )
        context = RunContext(
            service=self.service, journal=self.journal, images=self.images, observer=self.observer,
            admission=admission, policy=decided, now=anyio.current_time, rng=rng,
        )  # fmt: skip
        self.runner = Runner(
            context,
            reconciler=reconciler if self.reconciles else None,
            polls=self.polls,
            hints=self.hints,
        )
        with anyio.fail_after(7 * 86400):
            async with aclosing(batches(made)) as source:
                return await self.runner.run(source)

    def again(self):
        self.journal.session += 1
        return self
