"""When to read a status next: learned from how long finished jobs took, and from places in the queue. Pure.

No clock: all seconds count from the acceptance of the job. The runner sleeps and reads (`batch.run.poller`). No wait is
without an end: a job that takes ten times as long as usual has its result read whatever its status says.

Reads and lateness are two ends of one rope: who reads at each tenth of a job's time reads often and is late by a
twentieth. Here the middle of the known distribution is walked in `STEPS` steps of equal ratio; a service that always
takes the same time is read once.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

__all__ = ["JobTimings", "PollSchedule"]


class JobTimings:
    """What the reads of one job have told so far."""

    __slots__ = (
        "ended",
        "executed",
        "inference",
        "noticed",
        "overdue_next",
        "position",
        "queued",
        "resumed",
        "starts_at",
        "told",
        "unfinished",
        "unreadable",
    )

    def __init__(self, position: int | None = None, *, resumed: bool = False) -> None:
        """What is known when it is accepted.

        Args:
            position: its place in the queue, from 0; None where the service does not say.
            resumed: an earlier run submitted it: its age says nothing about the service's pace.
        """
        self.resumed = resumed
        self.position = position
        """As last read."""
        self.queued: float | None = None
        """When a read last said that it was queued."""
        self.unfinished: float | None = None
        """When a read last said that it was not finished."""
        self.starts_at: float | None = None
        """When its turn comes, as its places in the queue foretell it; None where they do not."""
        self.inference: float | None = None
        """For how long it was executed, as its status said at the end; None where it did not, or was not read."""
        self.executed: float | None = None
        """The same, or where its status was not read what the output says: at least so long."""
        self.told = False
        """Whether the last read was made because somebody said that it had ended."""
        self.noticed: float | None = None
        """When a read first said that it had ended."""
        self.ended: float | None = None
        """When it is taken to have ended; None until its end has taught something."""
        self.unreadable: float | None = None
        """Since when no read of its status succeeds; None where the last one did."""
        self.overdue_next = 0.0
        """When its result may be read again whatever its status says; 0.0 before the first such read."""


class _Recent:
    """The last so many values, also in order."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque()
        self._size = size
        self.sorted: list[float] = []

    def add(self, value: float) -> None:
        if len(self._values) == self._size:
            del self.sorted[bisect_right(self.sorted, self._values.popleft()) - 1]
        self._values.append(value)
        insort(self.sorted, value)

    def at(self, share: float) -> float:
        """The value below which such a share of them lies."""
        return self.sorted[int(share * (len(self.sorted) - 1))]


class PollSchedule:
    """Learns from jobs that ended, and says when to read those that have not.

    Knowing nothing, all jobs together feel for the end of the first: no two are read at the same age. Knowing some,
    a job is read when the next earliest end is over and all others that follow within one step are too.
    """

    FIRST = 0.05
    """Of the very first read, seconds: our own echo engine answers within milliseconds."""
    SHARE = 0.25
    """Longest step beyond all that is known, as a share of the time already taken."""
    FINEST = 0.02
    """No two reads of one job come closer, seconds, nor closer than `CLOSEST` of the time it already took."""
    CLOSEST = 0.03
    LONGEST = 10.0
    LONGEST_QUEUED = 600.0
    """The same while its place in the queue foretells a longer wait: the service's numbers may be wrong."""
    OVERDUE = 10.0
    """Times the usual duration after which a job that has not ended has its result read whatever its status says."""
    OVERDUE_SECONDS = 600.0
    """The least that this can be."""
    OVERDUE_GROWTH = 1.5
    """From one such read to the next, as a factor of the job's age."""
    OVERDUE_LONGEST = 1800.0
    """Longest interval between two such reads, seconds: half of the hour for which fal keeps a result in any case."""
    MEMORY = 128
    """Finished jobs that are remembered. The service's speed changes: one that becomes six times as fast is
    followed within some 300 jobs."""
    STEPS = 9.0
    """From the tenth to the ninetieth hundredth of the distribution."""
    EARLY = 0.05
    """Share of the possible ends that a read need not be in time for: the rare early ones cost the most reads."""
    MARGIN = 1.005
    """A read aims so much beyond the end that it waits for: two journeys through the network differ."""
    SURE = 0.8
    """Share of the last some sixteen reads that found their job ended."""
    GUESS = 0.8
    """Where the end of a job is taken to lie, as a share of when it was noticed, if the first read already
    found it finished and nothing more is known. Below 1, so that reads move forward when the service becomes faster."""

    _READS = 16

    def __init__(self) -> None:
        self._ends = _Recent(self.MEMORY)
        """Ages at which jobs ended."""
        self._inference = _Recent(self.MEMORY)
        self._step = 1.0 + self.CLOSEST
        self._found = 0.0
        """Share of reads that found what they were made for; old ones fade."""
        self._frontier = 0.0
        """Nothing is known: the greatest age at which some job will have been read."""
        self._unfinished = 0.0
        """Nothing is known: the greatest age at which some job was not finished."""

    @property
    def knows(self) -> bool:
        """Whether any job has ended."""
        return bool(self._ends.sorted)

    @property
    def sure(self) -> bool:
        """Whether nearly every read of late found its job ended: then its result may be asked for straight away.

        A result that is not there yet costs a request, one that is there saves one: even at one half.
        """
        return self._found >= self.SURE

    def came(self, *, in_time: bool) -> None:
        """A read that was due was made; whether it found what it was made for."""
        self._found += (float(in_time) - self._found) / self._READS

    @property
    def execution(self) -> float | None:
        """For how long jobs are executed as a rule, as their statuses say; None where they do not."""
        return self._inference.at(0.5) if self._inference.sorted else None

    def pending(self, timings: JobTimings, age: float, *, queued: bool, position: int | None) -> None:
        """A read at that age found it unfinished."""
        if queued:
            if position is not None and timings.position is not None and position < timings.position:
                pace = (age - (timings.queued or 0.0)) / (timings.position - position)
                timings.starts_at = age + position * pace
            timings.queued, timings.position = age, position
        timings.unfinished = age
        if not (self.knows or timings.resumed):
            self._unfinished = max(self._unfinished, age)

    def took(self, timings: JobTimings, noticed: float) -> None:
        """It was seen to have ended at the age of `noticed`; whether that is to teach anything is the caller's."""
        least = timings.unfinished or (0.0 if self.knows else self._unfinished)
        found_at_once = least == 0.0
        if timings.inference is not None:
            self._inference.add(timings.inference)
        if timings.executed is not None:
            least = max(least, (timings.queued or 0.0) + timings.executed)
        least = min(least, noticed)
        if timings.told:
            timings.ended = noticed
            self._ends.add(noticed)
        elif found_at_once:
            timings.ended = max(least, noticed * self.GUESS)
            # Half way to the earliest that it can have been, so that what is read late is not learned late.
            self._ends.add(timings.ended if least == 0.0 else (least + timings.ended) / 2)
        else:
            timings.ended = (least + noticed) / 2
            self._ends.add(timings.ended)
        low, high = max(self._ends.at(0.1), 1e-3), self._ends.at(0.9)
        self._step = max(1.0 + self.CLOSEST, (high / low) ** (1.0 / self.STEPS) if high > low else 1.0)

    def due(self, timings: JobTimings) -> float:
        """The age at which to read it next; it may have passed already."""
        last = timings.unfinished or 0.0
        if not self.knows:
            return min(last + self.LONGEST, self._feel(timings, last))
        aim = self._next(last)
        longest = self.LONGEST
        if timings.queued is not None and timings.queued == last:  # it had not even begun
            starts_at = max(last, timings.starts_at or 0.0)
            longest = max(longest, min(self.LONGEST_QUEUED, (starts_at - last) / 2))
            aim = max(aim, starts_at + (self._inference.at(self.EARLY) if self._inference.sorted else 0.0))
        return min(last + longest, max(aim, last + max(self.FINEST, last * self.CLOSEST)))

    @property
    def patience(self) -> float:
        """Seconds that a job may take until its result is read whatever its status says."""
        return max(self.OVERDUE_SECONDS, self.OVERDUE * self._ends.at(0.5) if self.knows else 0.0)

    def overdue(self, timings: JobTimings) -> float:
        """The age from which on its result is read whatever its status says."""
        return max(timings.overdue_next, (timings.unreadable or 0.0) + self.patience)

    def overdue_read(self, timings: JobTimings, age: float) -> None:
        """Such a read was made at that age, and brought no result: the next one comes later and later."""
        timings.overdue_next = min(max(age, 1.0) * self.OVERDUE_GROWTH, age + self.OVERDUE_LONGEST)

    def _feel(self, timings: JobTimings, last: float) -> float:
        """Ages grow by a fixed ratio over all jobs that may be the first to end: many feel more finely than one."""
        if timings.resumed:
            return max(self.FIRST, last * (1.0 + self.SHARE))
        if timings.queued is not None and timings.queued == last:
            return last + self.LONGEST
        self._frontier = max(self.FIRST, last * (1.0 + self.SHARE), self._frontier * (1.0 + self.CLOSEST))
        return self._frontier

    def _next(self, last: float) -> float:
        """When to read a job that was not finished at that age, by what others took."""
        ends = self._ends.sorted
        shorter = bisect_right(ends, last) if last > 0 else 0
        if shorter == len(ends):  # slower than all that we know: small steps first
            return last + min(max(last - ends[-1], last * self.CLOSEST), last * self.SHARE)
        first = ends[shorter + int((len(ends) - shorter) * self.EARLY)]
        return ends[bisect_right(ends, first * self._step) - 1] * self.MARGIN
