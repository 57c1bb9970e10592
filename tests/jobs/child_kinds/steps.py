"""Writes a line for each step."""

from __future__ import annotations

import time
from typing import Literal

import msgspec

from errors import SluiceError
from jobs.kinds import Context

KIND = "steps"
TITLE = "Lines in a child"
RUNNER = "child"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How many, how slowly, and how it ends."""

    steps: int
    pause_s: float = 0.0
    fail: Literal["", "code", "bug"] = ""


async def run(ctx: Context, params: Params) -> dict[str, object]:
    """The cursor is the next step."""
    begin = ctx.cursor or 0
    ctx.log(f"began at {begin}")
    file = await ctx.artifact("lines.txt", "text/plain")
    try:
        for n in range(begin, params.steps):
            if n == 1:
                print("printed", flush=True)
            await file.write(b"%d\n" % n)
            time.sleep(params.pause_s)
            await ctx.checkpoint(n + 1, done=n + 1, total=params.steps)
        if params.fail == "code":
            raise SluiceError("invalid-data", "as was asked for")
        if params.fail == "bug":
            raise ZeroDivisionError
    finally:
        ctx.log("ended")
    return {"steps": params.steps, "attempt": ctx.attempt}
