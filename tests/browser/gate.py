"""A process that takes each step, forward and back, when a file of that name appears."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from jobs.kinds import Context

KIND = "gate"
TITLE = "Wait at gates"
UNIT = "steps"
PAUSE = "at once"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Where the files are, and how many steps there are."""

    folder: str
    steps: int = 4


async def back(folder: str, step: int) -> None:
    """Take a step back once it may, and slowly: of quick ones not each is told."""
    await asyncio.sleep(0.3)
    while not Path(folder, f"back {step}").exists():
        await asyncio.sleep(0.01)


UNDO = {"back": back}


async def run(ctx: Context, params: Params) -> None:
    """Go from gate to gate."""
    step = ctx.cursor or 0
    while step < params.steps:
        await ctx.checkpoint(step, done=step, total=params.steps)
        while not Path(params.folder, f"step {step + 1}").exists():
            await ctx.sleep(0.01)
        step += 1
        await ctx.undo("back", folder=params.folder, step=step)
    await ctx.checkpoint(step, done=step, total=params.steps)
