"""A job that is disturbed at its n-th checkpoint: paused, killed or cancelled there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest

from jobs.process import Process
from storage import Job
from tests.jobs.world import Dead, World, eventually

How = Literal["warm", "cold", "kill", "cancel"]


class Trap:
    """Springs at the n-th checkpoint of a world's processes, and counts them all."""

    def __init__(self, patch: pytest.MonkeyPatch, world: World, number: int, how: How) -> None:
        self.count = 0
        self.sprung = asyncio.Event()
        original = Process.checkpoint

        async def checkpoint(process: Process, *args: Any, **more: Any) -> None:
            self.count += 1
            if self.count == number:
                self.sprung.set()
                if how == "kill":
                    world.state.die()
                    world.blobs.dead = True
                    raise Dead
                await world.tell(process.job_id, "cancel" if how == "cancel" else "pause")
            await original(process, *args, **more)

        patch.setattr(Process, "checkpoint", checkpoint)


class Exact(Process):
    """A process whose child waits at each checkpoint, so that a trap springs exactly there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_exact = True


async def disturbed(world: World, job_id: str, trap: Trap, how: How) -> Job:
    """Wait for the end of a job through its disturbance; its last row."""
    ending = asyncio.ensure_future(world.until(job_id, "succeeded", "failed", "cancelled"))
    springing = asyncio.ensure_future(trap.sprung.wait())
    await asyncio.wait([ending, springing], return_when=asyncio.FIRST_COMPLETED)
    if trap.sprung.is_set() and how == "kill":
        await world.restart()
    while left := [task for task in (ending, springing) if not task.done()]:
        for task in left:  # again: wait_for of Python 3.11 may swallow a cancellation
            task.cancel()
        await asyncio.wait(left, timeout=0.05)
    await asyncio.gather(ending, springing, return_exceptions=True)
    if trap.sprung.is_set() and how in ("warm", "cold"):
        job = await world.until(job_id, "paused", "succeeded", "failed")
        if job.state == "paused":
            if how == "cold":
                await eventually(lambda: job_id not in world.runners._live, "it is cold")
            await world.tell(job_id, "resume")
    return await world.until(job_id, "succeeded", "failed", "cancelled")


async def at_every_checkpoint(
    patch: pytest.MonkeyPatch,
    make: Callable[[int], World],
    prepare: Callable[[World], Awaitable[Any]],
    start: tuple[str, dict[str, Any]],
    how: How,
    judge: Callable[[World, Job], Awaitable[None]],
) -> int:
    """Disturb a job at its first checkpoint, a new one at its second, and so on; how many.

    ``judge`` sees how each of them has ended; the last one was not disturbed at all.
    """
    number = 1
    while True:
        world = make(number)
        await world.open()
        await prepare(world)
        with patch.context() as inner:
            trap = Trap(inner, world, number, how)
            job_id = await world.start(*start)
            job = await disturbed(world, job_id, trap, how)
        try:
            await judge(world, job)
        finally:
            await world.close()
        if not trap.sprung.is_set():
            return trap.count
        number += 1


async def nothing_new(world: World, names: set[str]) -> None:
    """There are no more stored files than these, and nothing unfinished."""
    await eventually(lambda: world.unfinished() == [], "nothing unfinished")
    assert {path.rpartition("/")[2] for path in world.published()} == names


def error_of(job: Job) -> dict[str, Any]:
    """The error of a job that has failed."""
    assert job.state == "failed"
    assert job.error is not None
    return job.error
