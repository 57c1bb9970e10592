"""The hub over a real log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs import events as module
from jobs.channel import Cursor, Select, Subscription, Sweep, text_frame
from jobs.events import Hub, Lost
from jobs.manager import Mark
from storage import Event, Job
from storage.state_sqlite import SqliteState
from tests.jobs.records import a_mark, an_event


class Log:
    """A state with jobs that move, and a hub that tails it."""

    def __init__(self, state: SqliteState, hub: Hub) -> None:
        self.state = state
        self.hub = hub

    async def create(self, job_id: str) -> Job:
        """A queued job."""
        job = Job(
            id=job_id,
            kind="count",
            name=job_id,
            owner="ann",
            state="queued",
            version=1,
            created_at=1,
        )
        event = an_event(0, job_id, version=1, from_=None, to="queued", cause="created")
        return (await self.state.create(job, event))[0]

    async def move(self, job: Job, to: str) -> Job:
        """The job in another state."""
        after = msgspec.structs.replace(
            job, state=to, version=job.version + 1, ended_at=9 if to == "succeeded" else None
        )
        event = an_event(0, job.id, version=after.version, from_=job.state, to=to)
        await self.state.commit(after, event, was_version=job.version)
        return after

    async def delete(self, job: Job) -> None:
        """Forget the job."""
        event = an_event(0, job.id, version=job.version + 1, from_=job.state, to="deleted")
        await self.state.delete(job.id, event, was_version=job.version)

    async def tell(self, marks: list[Mark]) -> None:
        """Return when the hub knows this progress."""
        while not self.state._progress:  # the hub listens when it first runs
            await asyncio.sleep(0)
        stamp = self.hub.latest.stamp
        await self.state.progress_out(marks)
        while self.hub.latest.stamp < stamp + len(marks):
            await asyncio.sleep(0)

    async def caught_up(self) -> None:
        """Return when the hub has seen everything."""
        while self.hub.seq < self.state._seq:
            await asyncio.sleep(0)


@asynccontextmanager
async def a_log(folder: Path, path: str = "state.db", keep: int = 1000) -> AsyncIterator[Log]:
    """A log over a real file, with its hub running."""
    state = SqliteState(folder / path, keep_events=keep)
    boot = await state.open()
    hub = Hub(state, boot)
    running = asyncio.create_task(hub.run())
    try:
        yield Log(state, hub)
    finally:
        running.cancel()
        await asyncio.wait([running])
        await state.close()


def short(events: list[Event]) -> list[tuple[int, str, int, str]]:
    """What matters of events."""
    return [(event.seq, event.job, event.version, event.to) for event in events]


async def test_ring_and_log_tell_the_same(tmp_path: Path) -> None:
    """From every cursor, with every page size, the ring gives exactly what the log gives."""
    async with a_log(tmp_path) as log:
        for i in range(20):
            await log.move(await log.create(f"j{i}"), "running")
        await log.caught_up()
        for seq in range(41):
            for n in (1, 3, 100):
                assert short(await log.hub.after(seq, n)) == short(await log.state.events(seq, n))


async def test_cursor_that_lags_behind_the_ring_is_served_from_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber that slept too long for the ring misses nothing."""
    monkeypatch.setattr(module, "RING", 8)
    async with a_log(tmp_path) as log:
        for i in range(30):
            await log.create(f"j{i}")
        await log.caught_up()
        seen, cursor = [], 0
        while page := await log.hub.after(cursor, 5):
            seen += [event.seq for event in page]
            cursor = page[-1].seq
        assert seen == list(range(1, 31))


async def test_a_cursor_that_waits_too_long_is_lost(tmp_path: Path) -> None:
    """Behind what is kept nothing is read as if it were whole."""
    async with a_log(tmp_path, keep=100) as log:
        for i in range(150):
            job = await log.move(await log.create(f"j{i}"), "succeeded")
            await log.delete(job)
        await log.caught_up()
        log.hub._ring.clear()  # as if it had not been in the ring for long
        log.hub._ring_from = log.hub.seq
        oldest = await log.state.oldest()
        assert oldest > 300
        with pytest.raises(Lost):
            await log.hub.after(oldest - 2, 10)
        assert (await log.hub.after(oldest - 1, 10))[0].seq == oldest
        assert await log.hub.why_reset(Cursor(log.hub.epoch, oldest - 2)) == "retention"
        assert await log.hub.why_reset(Cursor(log.hub.epoch, oldest - 1)) is None


async def test_subscriptions_that_are_alike_share_frames(tmp_path: Path) -> None:
    """Who stands at the same place in the same view gets the same bytes; others get their own."""
    async with a_log(tmp_path) as log:
        await log.create("j1")
        await log.caught_up()

        def first_frame(id: int, **select: Any) -> bytes | None:
            sub = Subscription(log.hub.view(id, "ann", Select(**select), text_frame), 0)
            subs.append(sub)  # a view lives as long as a subscription to it
            batch = log.hub.next(sub)
            assert batch is not None
            return batch.frame

        subs: list[Subscription] = []
        frame = first_frame(1)
        assert frame is not None
        assert first_frame(1) is frame
        assert first_frame(2) not in (frame, None)
        assert first_frame(1, kind=("upload",)) is None
        log.hub.forget_frames()
        assert first_frame(1) == frame
        assert first_frame(1) is not frame


async def test_frames_of_many_unlike_views_are_not_all_kept(tmp_path: Path) -> None:
    """Where each subscription needs a frame of its own, those made before are soon forgotten."""
    async with a_log(tmp_path) as log:
        await log.create("j1")
        await log.caught_up()
        views = [log.hub.view(id, "ann", Select(), text_frame) for id in range(1, 1001)]
        for view in views:
            batch = log.hub.next(Subscription(view, 0))
            assert batch is not None and batch.frame is not None
        assert 0 < sum(len(view.memo) for view in views) <= module._VIEWS


async def test_views_live_as_long_as_their_subscriptions(tmp_path: Path) -> None:
    """However many filters were ever asked for, only those in use are kept."""
    async with a_log(tmp_path) as log:
        for i in range(100):
            log.hub.view(1, "ann", Select(q=str(i)), text_frame)
        assert len(log.hub._views) == 0


async def test_a_lagging_subscription_reads_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ring does not have is said so, and comes from the log without a gap."""
    monkeypatch.setattr(module, "RING", 8)
    async with a_log(tmp_path) as log:
        for i in range(30):
            await log.create(f"j{i}")
        await log.caught_up()
        sub = Subscription(log.hub.view(1, "ann", Select(), text_frame), 0)
        read = 0
        while sub.seq < log.hub.seq:
            batch = log.hub.next(sub)
            if batch is None:
                batch, read = await log.hub.read(sub), read + 1
            assert batch.seq > sub.seq
            sub.moved(batch)
        assert read > 0
        assert (sub.seq, sub.sent) == (30, 30)


async def test_listeners_are_woken_until_they_leave(tmp_path: Path) -> None:
    """Every event wakes who listens, and nobody else."""
    async with a_log(tmp_path) as log:
        woken: list[int] = []

        def wake() -> None:
            woken.append(log.hub.seq)

        log.hub.listen(wake)
        await log.create("j1")
        await log.caught_up()
        assert woken == [1]
        log.hub.unlisten(wake)
        await log.create("j2")
        await log.caught_up()
        assert woken == [1]


async def test_cursor_is_honoured_over_a_restart(tmp_path: Path) -> None:
    """The same log after a restart resumes; another log, and one from the future, does not."""
    async with a_log(tmp_path) as log:
        await log.create("j1")
        await log.create("j2")
        await log.caught_up()
        epoch, seq = log.hub.epoch, log.hub.seq
    async with a_log(tmp_path) as log:
        assert (log.hub.epoch, log.hub.seq) == (epoch, seq)
        assert await log.hub.why_reset(Cursor(epoch, seq)) is None
        assert await log.hub.why_reset(Cursor(epoch, 0)) is None
        assert await log.hub.why_reset(Cursor(epoch, seq + 1)) == "epoch"
        assert await log.hub.why_reset(Cursor("other", 0)) == "epoch"
        assert await log.hub.why_reset(Cursor("", 0)) == "epoch"
        assert short(await log.hub.after(0, 10)) == [(1, "j1", 1, "queued"), (2, "j2", 1, "queued")]
    async with a_log(tmp_path, "new.db") as log:
        assert await log.hub.why_reset(Cursor(epoch, 0)) == "epoch"


async def test_progress_is_told_by_one_frame_for_all(tmp_path: Path) -> None:
    """Those with the same views who have come equally far get the same bytes, once."""
    async with a_log(tmp_path) as log:
        await log.tell([a_mark("a"), a_mark("b")])
        views = (log.hub.view(1, "ann", Select(jobs=("a",)), text_frame),)
        frame, sweep = log.hub.progress(views, Sweep())
        assert frame is not None
        assert frame.count(b"[7,3,5,") == 1
        assert log.hub.progress(views, Sweep())[0] is frame
        assert log.hub.progress(views, sweep) == (None, sweep)
        assert log.hub.progress((), Sweep())[0] is None


async def test_progress_of_an_ended_job_is_forgotten(tmp_path: Path) -> None:
    """After its last transition no progress of a job is told any more."""
    async with a_log(tmp_path) as log:
        job = await log.create("a")
        await log.tell([a_mark("a")])
        view = log.hub.view(1, "ann", Select(), text_frame)
        assert log.hub.progress((view,), Sweep())[0] is not None
        await log.move(job, "succeeded")
        await log.caught_up()
        log.hub.forget_frames()
        assert log.hub.progress((view,), Sweep())[0] is None
