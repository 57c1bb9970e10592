"""Counts, slowly: a process to try the service with.

It shows all that a process can do: progress, pause at any step, a cursor, and (with ``undo_steps``)
a journal that is rolled back step by step when the job is cancelled.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec

from jobs.kinds import Context

KIND = "count"
TITLE = "Count to a number"
UNIT = "steps"
PAUSE = "at once"

Delay = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to count."""

    steps: Annotated[int, msgspec.Meta(ge=0, le=10**12, description="how far to count")] = 100
    delay_s: Annotated[Delay, msgspec.Meta(description="seconds for each step")] = 0.1
    undo_steps: Annotated[
        int, msgspec.Meta(ge=0, le=1000, description="entries to roll back when cancelled")
    ] = 0


async def wait(delay_s: float, step: int) -> None:
    """Take a step back, as slowly as it was made."""
    await asyncio.sleep(delay_s)


UNDO = {"wait": wait}


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Count from the cursor to ``steps``."""
    step = ctx.cursor or 0
    while step < params.steps:
        await ctx.checkpoint(step, done=step, total=params.steps)
        if step < params.undo_steps:
            await ctx.undo("wait", delay_s=params.delay_s, step=step)
        if params.delay_s:
            await ctx.sleep(params.delay_s)
        step += 1
    await ctx.checkpoint(step, done=step, total=params.steps)
    return {"counted": step}
