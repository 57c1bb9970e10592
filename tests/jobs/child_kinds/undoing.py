"""Makes a file, which its undo removes, and waits."""

from __future__ import annotations

from pathlib import Path

import msgspec

from jobs.kinds import Context

KIND = "undoing"
TITLE = "An effect that is undone"
RUNNER = "child"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which file."""

    path: str


async def remove(path: str) -> None:
    """Take it back."""
    Path(path).unlink(missing_ok=True)


UNDO = {"remove": remove}


async def run(ctx: Context, params: Params) -> None:
    """The entry first, then the effect."""
    await ctx.undo("remove", path=params.path)
    Path(params.path).touch()
    await ctx.sleep(60)
