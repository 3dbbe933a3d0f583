"""What the parts of one run share: its edges, its policy, its clock and its source of randomness."""

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
    """What the user decided; durations in seconds."""

    download: bool = True
    attempts: int = 3
    idempotency: Idempotency = Idempotency.NONE
    """What the target does with a repeated key: unless it ignores keys, a submit of unknown outcome may be repeated."""
    start_timeout: float | None = None
    """Seconds from its acceptance after which the target does not start a request any more. None: it may, or a submit
    is repeated under its key, so that nobody knows when it was accepted."""
    file_seconds: float | None = None
    """Lifetime of result files that each submit asks for."""
    retry_failed: bool = False
    collect_only: bool = False
    """Settle and collect what was submitted before; no attempt is submitted that was not begun before."""
    resubmit_unknown_after: float | None = None
    drain: float = 60.0
    collect_for: float = COLLECT_SECONDS
    """How long after its end a request whose answer or images could not be read is asked for again, free, before it
    counts as lost."""
    deadline: float | None = None
    max_failures: int | None = None
    max_failure_share: float | None = None
    keeps_results: bool = False
    """Whether the target keeps results until they are fetched, as our own server does: then none can be late."""
    target: str = "local"
    """Uploaded images are remembered under its name: another target does not have them."""


@dataclass(slots=True)
class RunContext:
    """The parts that `Runner`, `JobDriver`, `Submitter`, `Poller` and `Transfers` of one run share."""

    service: Service
    journal: Journal
    images: Images
    observer: Observer
    admission: Admission
    policy: Policy
    now: Callable[[], float]
    """Wall time in Unix seconds, for what is recorded. Waits use anyio's clock."""
    rng: Random
    waits: Waits = field(default_factory=Waits)
    """What each accepted job waits for."""
    expiry: Expiry = field(init=False)
    """Warns before a result or a file expires at the target."""

    def __post_init__(self) -> None:
        self.expiry = Expiry(for_good=self.policy.keeps_results, file_seconds=self.policy.file_seconds)

    def warn(self, sentence: str | None) -> None:
        """Report a warning, if there is one."""
        if sentence is not None:
            self.observer.happened("warning", reason=sentence)

    def read_failed(self, verdict: Verdict) -> None:
        """Report a read that failed and is repeated."""
        self.admission.notice("unreachable", f"{verdict.reason}; it is tried again")
