"""The domain on one loop and one folder, without a network, for kinds of the benchmark's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec

from jobs.children import Children
from jobs.files import Files, now_ms
from jobs.kinds import Kind, Registry, kind_of
from jobs.manager import Limits, Manager
from jobs.runners import Runners
from jobs.states import FINAL
from storage import Boot, By, Job
from storage.blobs_local import LocalBlobs
from storage.state_sqlite import SqliteState

OWNER = "local"


class Nothing(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """No parameters."""


def a_kind(name: str, run: Callable[..., Any]) -> Kind:
    """A kind that is one coroutine function."""
    return kind_of(SimpleNamespace(KIND=name, TITLE=name, Params=Nothing, run=run))


class Domain(NamedTuple):
    """What a benchmark needs of it."""

    manager: Manager
    state: SqliteState
    boot: Boot

    async def start(self, kind: str) -> Job:
        """Start a job."""
        by = By(actor=OWNER, via="rest", at=now_ms())
        return (await self.manager.start(kind, {}, owner=OWNER, by=by))[0]

    async def ended(self, n: int) -> None:
        """Return when ``n`` jobs have ended."""
        seq = self.boot.seq
        while sum(c for word, c in (await self.state.counts(None)).items() if word in FINAL) < n:
            seq = await self.state.wait(seq)


@asynccontextmanager
async def domain(folder: Path, limits: Limits, *kinds: Kind) -> AsyncIterator[Domain]:
    """Put together as the server does it, with FULL commits."""
    blobs, state = LocalBlobs(folder), SqliteState(folder / "state.db")
    await blobs.open()
    boot = await state.open()
    manager = Manager(state, Registry(kinds), boot, limits)
    files, children = Files(state, blobs), Children(folder)
    Runners(manager, state, blobs, files, warm_s=30.0, children=children)
    await manager.recover()
    manager.open()
    try:
        yield Domain(manager, state, boot)
    finally:
        await manager.close(1.0)
        await blobs.close()
        await state.close()
