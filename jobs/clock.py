"""How long a job may run, and how long it may be silent.

Both count active time only: the clock stands while the job is paused, waits in the queue, or has
done its work and is being finished. What it has run is kept with its cursor, so that a resume, a
restart and another attempt go on from there. A silent job is looked at a few times in the time that
it has, so it is found up to an eighth of that too late, and never too early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from errors import SluiceError

_LOOKS = 8  # in the time that a job may be silent
_LEAST_S = 0.005


class Clock:
    """The clock of one running job; it runs at once.

    ``alive`` tells whether there was a sign of life since it was last asked. ``late`` is called
    once, with ``timeout`` or ``stalled``.
    """

    def __init__(
        self,
        run_timeout_s: float | None,
        stall_timeout_s: float | None,
        ran_s: float,
        alive: Callable[[], bool],
        late: Callable[[SluiceError], None],
    ) -> None:
        self._run_s = run_timeout_s
        self._stall_s = stall_timeout_s
        self._ran_s = ran_s  # before it was last started
        self._since: float | None = None
        self._heard = 0.0
        self._alive = alive
        self._late = late
        self._timer: asyncio.TimerHandle | None = None
        self.go()

    @property
    def ran_s(self) -> float:
        """How long the job was active, in all."""
        return self._ran_s + (0.0 if self._since is None else monotonic() - self._since)

    def go(self) -> None:
        """The job is active from now on."""
        if self._since is None:
            self._since = self._heard = monotonic()
            self._look_later()

    def hold(self) -> None:
        """It is not; may be called again."""
        if self._since is not None:
            self._ran_s, self._since = self.ran_s, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        waits_s = []
        if self._run_s is not None:
            waits_s.append(self._run_s - self.ran_s)
        if self._stall_s is not None:
            waits_s.append(self._stall_s / _LOOKS)
        delay_s = max(_LEAST_S, min(waits_s))
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        now = monotonic()
        if self._alive():
            self._heard = now
        if self._run_s is not None and self.ran_s >= self._run_s:
            error = SluiceError("timeout", f"It ran for more than {self._run_s:g} s.")
        elif self._stall_s is not None and now - self._heard >= self._stall_s:
            error = SluiceError("stalled", f"No checkpoint came for {self._stall_s:g} s.")
        else:
            self._look_later()
            return
        self.hold()
        self._late(error)
