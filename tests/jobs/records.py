"""Events and progress as the log has them, made up for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from jobs.manager import Mark
from storage import Event, Progress


def an_event(seq: int, job: str = "j1", **change: Any) -> Event:
    """One transition of one job."""
    fields: dict[str, Any] = {
        "seq": seq,
        "job": job,
        "version": seq,
        "kind": "count",
        "owner": "ann",
        "at": 1_800_000_000_123,
        "from_": "queued",
        "to": "running",
        "cause": "claimed",
        "actor": "service",
        "row": msgspec.Raw(b'{"id":"' + job.encode() + b'","name":"numbers"}'),
    }
    return Event(**fields | change)


def a_mark(job: str = "j1", **change: Any) -> Mark:
    """The progress of one job."""
    mark = Mark(job, 7, 3, "ann", "count", "running", "numbers", Progress(done=5, total=9))
    return mark._replace(**change)
