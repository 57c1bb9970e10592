"""How far a job is, how fast, and how long it may still take. Pure: the clock is an argument.

The rate is an average over *active* time with a half-life of two seconds: while a job is paused its
clock stands, and each phase has a rate of its own. The time left is an interval, from the rate and
how much the rate varies, or nothing: a wrong number is worse than none. ``done`` never goes back,
not by a phase that counts anew nor by a resume from an older cursor; what is done again has no
rate. It is never beyond ``total``: a total that was too low grows with it.
"""

from __future__ import annotations

from time import monotonic

from storage import Progress

_HALF_LIFE_S = 2.0
_SAMPLE_S = 0.1
_ETA_AFTER_S = 3.0
_ETA_MOST_S = 1e9  # a job that would take longer stands still
_LEAST_SPREAD = 0.03  # of the rate: no machine is steadier for long


class Meter:
    """Collects the marks of one job and tells its progress."""

    __slots__ = (
        "_active_s",
        "_at",
        "_eta_known",
        "_from",
        "_held",
        "_rate",
        "_spread",
        "changed",
        "done",
        "message",
        "phase",
        "total",
        "unit",
    )

    def __init__(self, unit: str, last: Progress | None = None) -> None:
        last = last or Progress()
        self.unit = unit
        self.done = last.done
        self.total = last.total
        self.phase = last.phase
        self.message = last.message
        self.changed = False
        self._held = last.done > 0  # until it is further than it was before
        self._eta_known = True
        self._from: int | None = None  # done at the last sample
        self._at = 0.0
        self._active_s = 0.0
        self._rate: float | None = None
        self._spread = 0.0

    def mark(
        self,
        done: int | None = None,
        total: int | None = None,
        phase: str | None = None,
        message: str | None = None,
        eta: bool | None = None,
    ) -> None:
        """Take the newest values; what is None stays. Cheap: no clock is read here.

        ``eta=False``: what follows goes at another pace, so no time left is told.
        """
        self.changed = True
        if done is not None and done > self.done:
            self.done = done
            self._held = False
        if total is not None:
            self.total = total
        if phase is not None and phase != self.phase:
            self.phase = phase
            self._start_rate()
        if eta is not None:
            self._eta_known = eta
        if message is not None:
            self.message = message

    def hold(self) -> None:
        """The job is paused or its peer is gone: stop the clock, forget the rate."""
        self._held = True
        self._start_rate()
        self.changed = True

    def _start_rate(self) -> None:
        self._from = None
        self._rate = None
        self._spread = 0.0
        self._active_s = 0.0

    def progress(self, now: float | None = None) -> Progress:
        """The progress at ``now`` (monotonic seconds)."""
        self._sample(monotonic() if now is None else now)
        return Progress(
            done=self.done,
            total=self._total(),
            unit=self.unit,
            rate_per_s=None if self._rate is None else round(self._rate, 3),
            eta_s=self._eta(),
            phase=self.phase,
            message=self.message,
        )

    def finished(self) -> Progress:
        """The progress of a job that succeeded: whole, whatever was announced before."""
        total = self._total() or self.done
        return Progress(
            done=total, total=total, unit=self.unit, phase=self.phase, message=self.message
        )

    def _total(self) -> int | None:
        """The announced total, unless more is done already."""
        return None if self.total is None else max(self.total, self.done)

    def _sample(self, now: float) -> None:
        if self._held:
            return
        if self._from is None:
            self._from, self._at = self.done, now
            return
        passed_s = now - self._at
        if passed_s < _SAMPLE_S:
            return
        rate = (self.done - self._from) / passed_s
        weight = 1 - 0.5 ** (passed_s / _HALF_LIFE_S)
        if self._rate is None:
            self._rate = rate
        else:
            self._spread += weight * (abs(rate - self._rate) - self._spread)
            self._rate += weight * (rate - self._rate)
        self._active_s += passed_s
        self._from, self._at = self.done, now

    def _eta(self) -> tuple[float, float] | None:
        if self.total is None or not self._eta_known:
            return None
        if not self._rate or self._active_s < _ETA_AFTER_S:
            return None
        left = max(0, self.total - self.done)
        if self._rate * _ETA_MOST_S < left:
            return None
        spread = max(self._spread, self._rate * _LEAST_SPREAD)
        low = left / (self._rate + spread)
        high = left / max(self._rate - spread, self._rate / 10)
        return round(low, 1), round(high, 1)
