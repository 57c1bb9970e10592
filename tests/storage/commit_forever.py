"""Commit until killed, and print each acknowledgement as soon as it is there.

Run as a program: ``python -m tests.storage.commit_forever <url> <prefix of the job ids>``. Each
line is JSON: ``["commit", seq, job, version]`` or ``["save", job, cursor]``.
"""

import asyncio
import json
import sys
from typing import Any

from storage import State, open_state
from tests.storage.rows import a_file, a_job, its_event, moved

WRITERS = 8


def acknowledged(*what: Any) -> None:
    print(json.dumps(what), flush=True)


async def write(state: State, job_id: str) -> None:
    job, _ = await state.create(a_job(job_id), its_event(a_job(job_id)))
    while True:
        after = moved(job, "paused" if job.state == "running" else "running")
        seq = await state.commit(
            after,
            its_event(after, job),
            was_version=job.version,
            files=[a_file(f"{job_id}-{after.version}")],
        )
        acknowledged("commit", seq, job_id, after.version)
        job = after
        await state.save(job_id, 0, cursor=after.version, stored_bytes=after.version)
        acknowledged("save", job_id, after.version)


async def main(url: str, prefix: str) -> None:
    state = open_state(url, "interval")
    await state.open()
    await asyncio.gather(*(write(state, f"{prefix}{i}") for i in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
