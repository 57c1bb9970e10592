"""The shapes that clients see: a job, a file, an event as JSON objects.

One shape for REST, the channel and the log. Times are RFC 3339 UTC with milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from storage import Event, File, Job, Progress


@lru_cache(4096)  # a row has the same few times in it whenever its job moves
def rfc3339(at: int | None) -> str | None:
    """A time in milliseconds since 1970 as ``2026-11-21T20:31:00.123Z``."""
    if at is None:
        return None
    return f"{_second(at // 1000)}.{at % 1000:03d}Z"


@lru_cache(4096)
def _second(at_s: int) -> str:
    """Many jobs move in one second."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%dT%H:%M:%S}"


def progress_row(progress: Progress) -> dict[str, Any]:
    """The ``progress`` member of a job."""
    return msgspec.structs.asdict(progress)


def job_row(job: Job, progress: Progress, transfer: dict[str, Any] | None) -> dict[str, Any]:
    """A job as clients see it, without ``params``. ``id`` and ``h`` come first."""
    return {
        "id": job.id,
        "h": job.h,
        "kind": job.kind,
        "name": job.name,
        "owner": job.owner,
        "client": job.client,
        "state": job.state,
        "want": job.want,
        "reason": job.reason,
        "version": job.version,
        "attempt": job.attempt,
        "priority": job.priority,
        "created_at": rfc3339(job.created_at),
        "started_at": rfc3339(job.started_at),
        "ended_at": rfc3339(job.ended_at),
        "not_before": rfc3339(job.not_before),
        "deadline_at": rfc3339(job.deadline_at),
        "expires_at": rfc3339(job.expires_at),
        "retry_of": job.retry_of,
        "after": list(job.after),
        "by": job.by and {"actor": job.by.actor, "via": job.by.via, "at": rfc3339(job.by.at)},
        "waiting": _waiting(job),
        "progress": progress_row(progress),
        "transfer": transfer,
        "rollback": job.rollback and msgspec.structs.asdict(job.rollback),
        "result": job.result and msgspec.structs.asdict(job.result),
        "artifacts": [msgspec.structs.asdict(artifact) for artifact in job.artifacts],
        "error": job.error,
    }


def _waiting(job: Job) -> dict[str, Any] | None:
    if job.state == "queued":
        return {"why": "slot", "position": None}
    if job.blocked and job.state == "scheduled":
        return {"why": "after", "position": None}
    if job.state == "scheduled":
        return {"why": "backoff" if job.attempt > 1 else "time", "position": None}
    return None


def file_row(file: File) -> dict[str, Any]:
    """A stored file as clients see it."""
    return {
        "id": file.id,
        "name": file.name,
        "version": file.version,
        "bytes": file.bytes,
        "media_type": file.media_type,
        "digest": file.digest,
        "etag": file.etag,
        "owner": file.owner,
        "job": file.job,
        "created_at": rfc3339(file.created_at),
        "expires_at": rfc3339(file.expires_at),
    }


class _Signed(msgspec.Struct):
    """What of an event's row says who gave the command."""

    by: _By | None = None


class _By(msgspec.Struct):
    via: str


# What is done because somebody has asked for it, and signed; all else the service does by itself.
_ASKED = frozenset({"created", "command", "renamed", "deleted"})
_signed = msgspec.json.Decoder(_Signed)


def _via(event: Event) -> str:
    """The door through which somebody has asked for what happened; ``system`` if nobody has."""
    by = _signed.decode(event.row).by if event.cause in _ASKED else None
    return by.via if by is not None else "system"


def table_row(
    file: File, columns: Sequence[tuple[str, str]], rows: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """A table as clients see it: the file, and what is in it."""
    return file_row(file) | {
        "columns": [{"name": name, "type": type} for name, type in columns],
        "rows": rows,
        "about": about,
    }


def event_row(event: Event) -> dict[str, Any]:
    """A transition as clients see it."""
    return {
        "seq": event.seq,
        "job": event.job,
        "version": event.version,
        "kind": event.kind,
        "owner": event.owner,
        "at": rfc3339(event.at),
        "from": event.from_,
        "to": event.to,
        "cause": event.cause,
        "actor": event.actor,
        "via": _via(event),
        "row": event.row,
    }
