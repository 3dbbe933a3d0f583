"""The shared context of one run: edges, policy, clock and random source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from batch.run.admission import Admission
from batch.run.expiry import COLLECT_SECONDS, Expiry
from batch.run.interfaces import Images, Journal, Observer, Service
from batch.run.verdicts import Idempotency, Verdict
from batch.run.waits import Waits

__all__ = ["Policy", "RunContext"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The user's settings for a run; durations in seconds."""

    download: bool = True
    attempts: int = 3
    idempotency: Idempotency = Idempotency.NONE
    """How the target handles a repeated key. Unless it ignores keys, a submit of unknown outcome may be repeated."""
    start_timeout: float | None = None
    """Seconds from acceptance after which the target no longer starts a request. None: unknown, because the target has
    no limit or because a repeated submit hides the time of its acceptance."""
    file_seconds: float | None = None
    """Lifetime of result files that each submit requests."""
    retry_failed: bool = False
    collect_only: bool = False
    """Settle and collect earlier submits only; begin no new attempt."""
    resubmit_unknown_after: float | None = None
    drain: float = 60.0
    collect_for: float = COLLECT_SECONDS
    """How long after its end a request with an unreadable answer or image is still collected (free) before it counts as
    lost."""
    deadline: float | None = None
    max_failures: int | None = None
    max_failure_share: float | None = None
    keeps_results: bool = False
    """Whether the target keeps results until they are fetched, as our own server does; then no result can expire."""
    target: str = "local"
    """Name under which uploaded images are remembered: another target does not have them."""


@dataclass(slots=True)
class RunContext:
    """Objects that `Runner`, `JobDriver`, `Submitter`, `Poller` and `Transfers` of one run share."""

    service: Service
    journal: Journal
    images: Images
    observer: Observer
    admission: Admission
    policy: Policy
    now: Callable[[], float]
    """Wall time in Unix seconds, for records. Waits use anyio's clock."""
    rng: Random
    waits: Waits = field(default_factory=Waits)
    """The stage of each accepted job."""
    expiry: Expiry = field(init=False)
    """Warns before a result or a file expires at the target."""

    def __post_init__(self) -> None:
        self.expiry = Expiry(for_good=self.policy.keeps_results, file_seconds=self.policy.file_seconds)

    def warn(self, sentence: str | None) -> None:
        """Report a warning, if there is one."""
        if sentence is not None:
            self.observer.happened("warning", reason=sentence)

    def read_failed(self, verdict: Verdict) -> None:
        """Report a failed read that will be retried."""
        self.admission.notice("unreachable", f"{verdict.reason}; retrying")
