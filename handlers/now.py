"""The numbers of now: rates, slots, queue, room, and how late the loop is."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from jobs.measures import LAGS_S, Histogram
from jobs.states import QUEUED, RUNNING

if TYPE_CHECKING:
    from handlers.base import Services

_SAMPLE_S = 0.5


class Now:
    """Samples the byte counters and the lag of the loop twice a second."""

    def __init__(self) -> None:
        self._in_per_s = 0.0
        self._out_per_s = 0.0
        self._lag_ms = 0.0
        self.lags = Histogram(LAGS_S)

    async def run(self, services: Services) -> None:
        """Sample until cancelled."""
        at, taken, sent = monotonic(), 0, 0
        while True:
            await asyncio.sleep(_SAMPLE_S)
            now = monotonic()
            passed_s, lag_s = now - at, max(0.0, now - at - _SAMPLE_S)
            taken_now, sent_now = services.uploads.received_bytes, services.downloads.sent_bytes
            self._in_per_s = 0.5 * self._in_per_s + 0.5 * (taken_now - taken) / passed_s
            self._out_per_s = 0.5 * self._out_per_s + 0.5 * (sent_now - sent) / passed_s
            self.lags.add(lag_s)
            self._lag_ms = 0.8 * self._lag_ms + 0.2 * lag_s * 1000
            at, taken, sent = now, taken_now, sent_now

    async def row(self, services: Services, owner: str) -> dict[str, Any]:
        """The numbers as ``GET /v1/status`` and the channel's ``now`` show them."""
        tally = await services.manager.tally(owner)
        files, stored_bytes = await services.files.stored(owner)
        return {
            "in_bytes_per_s": round(self._in_per_s) if self._in_per_s >= 1 else 0,
            "out_bytes_per_s": round(self._out_per_s) if self._out_per_s >= 1 else 0,
            "running": services.manager.running,
            "slots": services.settings.slots,
            "running_by_kind": {kind: n for kind, state, n in tally if state == RUNNING},
            "queued": sum(n for _, state, n in tally if state == QUEUED),
            "subscribers": services.feeds.all,
            "children": len(services.children),
            "free_bytes": await services.files.free_bytes(),
            "disk_bytes": await services.files.disk_bytes(),
            "loop_lag_ms": round(self._lag_ms, 1),
            "files": files,
            "stored_bytes": stored_bytes,
        }
