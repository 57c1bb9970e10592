"""Kills itself at a step, or computes without looking up."""

from __future__ import annotations

import os
import signal
import time

import msgspec

from jobs.kinds import Context

KIND = "mortal"
TITLE = "A child that dies, or is slow"
RUNNER = "child"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """When it dies, if it does, and how long it computes at each step."""

    steps: int = 4
    dies_at: int | None = None
    busy_s: float = 0.0


async def run(ctx: Context, params: Params) -> dict[str, object]:
    """A line for each step."""
    file = await ctx.artifact("lines.txt", "text/plain")
    for step in range(ctx.cursor or 0, params.steps):
        await file.write(b"%d\n" % step)
        if step == params.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + params.busy_s
        while time.monotonic() < until:
            pass
        await ctx.checkpoint(step + 1, done=step + 1, total=params.steps)
    return {"counted": params.steps}
