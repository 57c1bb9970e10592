"""Jobs, events and files as the layers above would make them, without their rules."""

from typing import Any

import msgspec

from storage import Event, File, Job

FINAL = ("succeeded", "failed", "cancelled")


def a_job(job_id: str = "j1", **change: Any) -> Job:
    """A queued job at version 1; final states get an end."""
    fields: dict[str, Any] = {
        "id": job_id,
        "kind": "count",
        "name": "numbers",
        "owner": "ann",
        "state": "queued",
        "version": 1,
        "created_at": 1_000,
    } | change
    if fields["state"] in FINAL:
        fields.setdefault("ended_at", 2_000)
    return Job(**fields)


def moved(job: Job, state: str, **change: Any) -> Job:
    """The job's next version, in another state or with other fields."""
    if state in FINAL:
        change.setdefault("ended_at", 2_000)
    return msgspec.structs.replace(job, state=state, version=job.version + 1, **change)


def its_event(job: Job, before: Job | None = None, **change: Any) -> Event:
    """The event that goes with a row."""
    fields: dict[str, Any] = {
        "job": job.id,
        "version": job.version,
        "kind": job.kind,
        "owner": job.owner,
        "at": 1_500,
        "from_": before.state if before else None,
        "to": job.state,
        "cause": "command" if before else "created",
        "actor": "tester",
        "row": msgspec.Raw(
            msgspec.json.encode(
                {"id": job.id, "h": job.h, "state": job.state, "version": job.version}
            )
        ),
    }
    return Event(**fields | change)


def a_file(file_id: str = "f1", **change: Any) -> File:
    """A small stored file."""
    fields: dict[str, Any] = {
        "id": file_id,
        "name": "data.csv",
        "bytes": 10,
        "media_type": "text/csv",
        "owner": "ann",
        "job": "j1",
        "created_at": 1_000,
    }
    return File(**fields | change)
