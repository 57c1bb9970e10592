"""Stored files of any size that cost no room: holes, and each 16 MiB bytes that are only there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jobs.files import uuid7
from storage import open_blobs, open_state
from tests.storage.rows import a_file, a_job, its_event, moved

MARK_EVERY = 16 << 20


def write_sparse(path: Path, size: int) -> None:
    """Make a file of holes and marks."""
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, MARK_EVERY):
            file.seek(at)
            file.write(mark(at))


def mark(at: int) -> bytes:
    """The bytes that stand only there."""
    return hashlib.sha256(str(at).encode()).digest()


async def store_sparse(folder: Path, name: str, size: int) -> str:
    """Store a sparse file in the data folder of a server that does not run; its path."""
    blobs = open_blobs(f"file://{folder}", "interval")
    state = open_state(f"sqlite://{folder}/state.db", "interval")
    await blobs.open()
    await state.open()
    file_id = uuid7()
    await (await blobs.writer(file_id, 1)).close()
    write_sparse(folder / "tmp" / file_id, size)
    assert await blobs.publish(file_id, name) == size
    job = a_job(uuid7(), kind="upload", name=name, owner="local", state="running")
    job, _ = await state.create(job, its_event(job))
    after = moved(job, "succeeded")
    file = a_file(file_id, name=name, bytes=size, owner="local", job=job.id)
    await state.commit(after, its_event(after, job), was_version=job.version, files=[file])
    await state.close()
    await blobs.close()
    return f"/v1/files/{file_id}/content"
