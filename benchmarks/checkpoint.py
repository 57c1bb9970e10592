"""What a checkpoint costs a process that nobody wants anything of.

Claim: with budget left and nothing wanted, ``await ctx.checkpoint()`` takes at most 10 x as long as
awaiting an async function that does nothing, with a cursor and progress as well as without. A real
process on the lane measures it: blocks of calls, far shorter than its turn of 2 ms, and a new turn
before each; the ways take turns, and a ratio is the median of the blocks' own ratios.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.common import Report, at_most, main, place
from benchmarks.domain import Nothing, a_kind, domain
from jobs.manager import Limits

_BLOCK = 500  # calls
_BLOCKS = 400  # of each way

Way = Callable[[Any], Awaitable[None]]


async def nothing() -> None:
    """The least that an await costs."""


async def _nothing(_: Any) -> None:
    for _ in range(_BLOCK):
        await nothing()


async def _bare(ctx: Any) -> None:
    for _ in range(_BLOCK):
        await ctx.checkpoint()


async def _cursor(ctx: Any) -> None:
    for n in range(_BLOCK):
        await ctx.checkpoint(n)


async def _progress(ctx: Any) -> None:
    for n in range(_BLOCK):
        await ctx.checkpoint(n, done=n, total=_BLOCK)


_WAYS: dict[str, Way] = {
    "an async function that does nothing": _nothing,
    "ctx.checkpoint()": _bare,
    "ctx.checkpoint(cursor)": _cursor,
    "ctx.checkpoint(cursor, done=, total=)": _progress,
}


async def _measure(folder: Path) -> list[list[float]]:
    """Seconds a call, of each way in each block."""
    found: list[list[float]] = [[] for _ in _WAYS]

    async def run(ctx: Any, _: Nothing) -> None:
        for turn in range(_BLOCKS + 1):
            for way, taken in zip(_WAYS.values(), found, strict=True):
                await asyncio.sleep(0)  # a new turn of the lane's
                begin = perf_counter()
                await way(ctx)
                if turn:
                    taken.append((perf_counter() - begin) / _BLOCK)

    async with domain(folder, Limits(), a_kind("calls", run)) as ours:
        await ours.start("calls")
        await ours.ended(1)
    return found


def measure() -> Report:
    """One process, all ways."""
    with place() as folder:
        found = asyncio.run(_measure(folder))
    ratios = [
        median(each / least for each, least in zip(taken, found[0], strict=True)) for taken in found
    ]
    return Report(
        "The fast path of a checkpoint",
        ("Await of", "ns", "ratio"),
        [
            [name, f"{median(taken) * 1e9:,.0f}", f"{ratio:.1f} x"]
            for name, taken, ratio in zip(_WAYS, found, ratios, strict=True)
        ],
        [
            at_most(f"{name} : an empty await", ratio, 10.0)
            for name, ratio in list(zip(_WAYS, ratios, strict=True))[1:]
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
