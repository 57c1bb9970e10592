"""What is counted as it runs: how long pauses and cancels take, steps that held the loop.

Plain numbers in memory, from the start of the process on; whoever shows them reads them. To count
costs a comparison, so it is always done.
"""

from __future__ import annotations

from bisect import bisect_left
from time import monotonic

from jobs.states import CANCELLED, CANCELLING, PAUSED, PAUSING
from storage import Job

LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LAGS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Histogram:
    """How many values were at most each of some bounds; the last count is of all beyond them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class SlowSteps:
    """The steps of a kind that held the loop for too long: how many, and the worst."""

    def __init__(self) -> None:
        self.n = 0
        self.worst_s = 0.0


class Measures:
    """All of it. There are as many ``slow_steps`` as kinds that had one."""

    def __init__(self) -> None:
        self.pauses = Histogram(LATENCIES_S)  # from the commit of the command to that of its effect
        self.cancels = Histogram(LATENCIES_S)  # with what had to be undone
        self.slow_steps: dict[str, SlowSteps] = {}
        self._since: dict[str, tuple[str, float]] = {}  # jobs that are pausing or being cancelled

    def moved(self, job: Job) -> None:
        """A row of a job was committed."""
        was = self._since.pop(job.id, None)
        if job.state in (PAUSING, CANCELLING):
            begun = was is not None and was[0] == job.state
            self._since[job.id] = was if was is not None and begun else (job.state, monotonic())
        elif was is not None:
            passed_s = monotonic() - was[1]
            if (was[0], job.state) == (PAUSING, PAUSED):
                self.pauses.add(passed_s)
            elif (was[0], job.state) == (CANCELLING, CANCELLED):
                self.cancels.add(passed_s)

    def held(self, kind: str, step_s: float) -> None:
        """A step of a process held the loop for too long."""
        slow = self.slow_steps.setdefault(kind, SlowSteps())
        slow.n += 1
        slow.worst_s = max(slow.worst_s, step_s)
