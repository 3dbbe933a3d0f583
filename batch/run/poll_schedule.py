"""When to read the status of a job next, learned from the durations of finished jobs. Pure.

No clock: all seconds count from the acceptance of the job; `batch.run.poller` sleeps and reads. Every wait is bounded:
a job that takes ten times as long as usual has its result read whatever its status says.

More reads mean less delay: reading at each tenth of a job's duration costs many reads and is late by a twentieth on
average. The schedule divides the central 80 % of the known durations into `STEPS` steps of equal ratio. A service with
a constant duration is read once per job.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

__all__ = ["JobTimings", "PollSchedule"]


class JobTimings:
    """Observations of the reads of one job."""

    __slots__ = (
        "ended",
        "executed",
        "hinted",
        "inference",
        "noticed",
        "overdue_next",
        "position",
        "queued",
        "resumed",
        "starts_at",
        "unfinished",
        "unreadable",
    )

    def __init__(self, position: int | None = None, *, resumed: bool = False) -> None:
        """Create the timings of an accepted job.

        Args:
            position: its place in the queue, from 0; None if the service does not report it.
            resumed: an earlier run submitted it, so its age says nothing about the service's speed.
        """
        self.resumed = resumed
        self.position = position
        """As read last."""
        self.queued: float | None = None
        """Age at the last read that reported it as queued."""
        self.unfinished: float | None = None
        """Age at the last read that reported it as unfinished."""
        self.starts_at: float | None = None
        """Age at which its execution should start, extrapolated from its places in the queue; None if unknown."""
        self.inference: float | None = None
        """Seconds of execution as its final status reported them; None if it did not, or was not read."""
        self.executed: float | None = None
        """The same; where the status was not read, the seconds from the output, which are a lower bound."""
        self.hinted = False
        """Whether a hint that it had ended caused the last read."""
        self.noticed: float | None = None
        """Age at the first read that reported its end."""
        self.ended: float | None = None
        """Estimated age at its end; None until it was used for learning."""
        self.unreadable: float | None = None
        """Age since which every status read has failed; None if the last one succeeded."""
        self.overdue_next = 0.0
        """Age from which the result may be read again whatever its status says; 0.0 before the first such read."""


class _Recent:
    """The last `size` values, in order of arrival and sorted."""

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
        """Return the quantile at this share."""
        return self.sorted[int(share * (len(self.sorted) - 1))]


class PollSchedule:
    """Learns from ended jobs when to read the others.

    Before the first job has ended, all jobs together search for its end: no two are read at the same age. After that, a
    job is read when its next likely end is over, together with all other ends that follow within one step.
    """

    FIRST = 0.05
    """Seconds until the very first read: our own echo engine answers within milliseconds."""
    SHARE = 0.25
    """Longest step beyond all known durations, as a share of the job's age."""
    FINEST = 0.02
    """Shortest interval between two reads of one job, in seconds; at least `CLOSEST` times its age."""
    CLOSEST = 0.03
    LONGEST = 10.0
    LONGEST_QUEUED = 600.0
    """Longest interval while the queue position predicts a longer wait: the prediction may be wrong."""
    OVERDUE = 10.0
    """Factor of the usual duration after which the result of an unfinished job is read whatever its status says."""
    OVERDUE_SECONDS = 600.0
    """Lower bound of that duration, in seconds."""
    OVERDUE_GROWTH = 1.5
    """From one overdue read to the next, as a factor of the job's age."""
    OVERDUE_LONGEST = 1800.0
    """Longest interval between two overdue reads, in seconds: half of the hour for which fal guarantees a result."""
    MEMORY = 128
    """Remembered ended jobs. The service's speed changes: after a speed-up by a factor of six, the schedule has adapted
    within about 300 jobs."""
    STEPS = 9.0
    """Steps from the 10th to the 90th percentile of the distribution."""
    EARLY = 0.05
    """Share of possible ends that a read may miss: the rare early ones would cost the most reads."""
    MARGIN = 1.005
    """Factor by which a read is later than the end it waits for: network delays vary."""
    SURE = 0.8
    """Share of successful reads from which `sure` is true; an average over about the last 16."""
    GUESS = 0.8
    """Estimated end of a job as a share of the age at which it was noticed, if the first read already found it finished
    and nothing else is known. Below 1, so that reads become earlier when the service becomes faster."""

    _READS = 16

    def __init__(self) -> None:
        self._ends = _Recent(self.MEMORY)
        """Ages at which jobs ended."""
        self._inference = _Recent(self.MEMORY)
        self._step = 1.0 + self.CLOSEST
        self._found = 0.0
        """Share of reads that found what they were made for, with exponential decay."""
        self._frontier = 0.0
        """Before the first end: the greatest age at which a read is planned."""
        self._unfinished = 0.0
        """Before the first end: the greatest age at which a job was seen unfinished."""

    @property
    def knows(self) -> bool:
        """Whether any job has ended."""
        return bool(self._ends.sorted)

    @property
    def sure(self) -> bool:
        """Whether most recent reads found their job ended; then its result may be read without its status.

        A missing result costs one request, an existing one saves one, so this pays from a share of one half on.
        """
        return self._found >= self.SURE

    def came(self, *, in_time: bool) -> None:
        """Note whether a due read found what it was made for."""
        self._found += (float(in_time) - self._found) / self._READS

    @property
    def execution(self) -> float | None:
        """Median execution time according to the statuses, in seconds; None if they do not report it."""
        return self._inference.at(0.5) if self._inference.sorted else None

    def pending(self, timings: JobTimings, age: float, *, queued: bool, position: int | None) -> None:
        """Note that a read at this age found the job unfinished."""
        if queued:
            if position is not None and timings.position is not None and position < timings.position:
                pace = (age - (timings.queued or 0.0)) / (timings.position - position)
                timings.starts_at = age + position * pace
            timings.queued, timings.position = age, position
        timings.unfinished = age
        if not (self.knows or timings.resumed):
            self._unfinished = max(self._unfinished, age)

    def took(self, timings: JobTimings, noticed: float) -> None:
        """Learn from a job that was seen ended at age `noticed`; the caller decides whether it is representative."""
        least = timings.unfinished or (0.0 if self.knows else self._unfinished)
        found_at_once = least == 0.0
        if timings.inference is not None:
            self._inference.add(timings.inference)
        if timings.executed is not None:
            least = max(least, (timings.queued or 0.0) + timings.executed)
        least = min(least, noticed)
        if timings.hinted:
            timings.ended = noticed
            self._ends.add(noticed)
        elif found_at_once:
            timings.ended = max(least, noticed * self.GUESS)
            # Half way to its earliest possible end, so that late reads do not make later reads later still.
            self._ends.add(timings.ended if least == 0.0 else (least + timings.ended) / 2)
        else:
            timings.ended = (least + noticed) / 2
            self._ends.add(timings.ended)
        low, high = max(self._ends.at(0.1), 1e-3), self._ends.at(0.9)
        self._step = max(1.0 + self.CLOSEST, (high / low) ** (1.0 / self.STEPS) if high > low else 1.0)

    def due(self, timings: JobTimings) -> float:
        """Return the age at which to read the job next; it may be in the past."""
        last = timings.unfinished or 0.0
        if not self.knows:
            return min(last + self.LONGEST, self._probe(timings, last))
        aim = self._next(last)
        longest = self.LONGEST
        if timings.queued is not None and timings.queued == last:  # it had not started
            starts_at = max(last, timings.starts_at or 0.0)
            longest = max(longest, min(self.LONGEST_QUEUED, (starts_at - last) / 2))
            aim = max(aim, starts_at + (self._inference.at(self.EARLY) if self._inference.sorted else 0.0))
        return min(last + longest, max(aim, last + max(self.FINEST, last * self.CLOSEST)))

    @property
    def patience(self) -> float:
        """Seconds that a job may take before its result is read whatever its status says."""
        return max(self.OVERDUE_SECONDS, self.OVERDUE * self._ends.at(0.5) if self.knows else 0.0)

    def overdue(self, timings: JobTimings) -> float:
        """Return the age from which its result is read whatever its status says."""
        return max(timings.overdue_next, (timings.unreadable or 0.0) + self.patience)

    def overdue_read(self, timings: JobTimings, age: float) -> None:
        """Note an overdue read at this age that returned no result: the interval to the next one grows."""
        timings.overdue_next = min(max(age, 1.0) * self.OVERDUE_GROWTH, age + self.OVERDUE_LONGEST)

    def _probe(self, timings: JobTimings, last: float) -> float:
        """Return the next age of a search shared by all jobs that may end first: together they search more finely."""
        if timings.resumed:
            return max(self.FIRST, last * (1.0 + self.SHARE))
        if timings.queued is not None and timings.queued == last:
            return last + self.LONGEST
        self._frontier = max(self.FIRST, last * (1.0 + self.SHARE), self._frontier * (1.0 + self.CLOSEST))
        return self._frontier

    def _next(self, last: float) -> float:
        """Return when to read a job that was unfinished at this age, according to the known durations."""
        ends = self._ends.sorted
        shorter = bisect_right(ends, last) if last > 0 else 0
        if shorter == len(ends):  # slower than all known jobs: small steps first
            return last + min(max(last - ends[-1], last * self.CLOSEST), last * self.SHARE)
        first = ends[shorter + int((len(ends) - shorter) * self.EARLY)]
        return ends[bisect_right(ends, first * self._step) - 1] * self.MARGIN
