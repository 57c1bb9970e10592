"""What subscribers see: the pure cursor, and the hub over a real log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs import events as module
from jobs.events import Hub, Select, Subscription, progress_frame, snap_frame
from jobs.manager import Mark
from storage import Event, Job, Progress
from storage.state_sqlite import SqliteState


def an_event(seq: int, job: str = "j1", **change: Any) -> Event:
    """One transition of one job."""
    fields: dict[str, Any] = {
        "seq": seq,
        "job": job,
        "version": seq,
        "kind": "count",
        "owner": "ann",
        "at": 1_800_000_000_123,
        "from_": "queued",
        "to": "running",
        "cause": "claimed",
        "actor": "service",
        "row": msgspec.Raw(b'{"id":"' + job.encode() + b'"}'),
    }
    return Event(**fields | change)


def a_mark(job: str = "j1", **change: Any) -> Mark:
    """The progress of one job."""
    mark = Mark(job, 7, 3, "ann", "count", "running", "numbers", Progress(done=5, total=9))
    return mark._replace(**change)


def subscription(seq: int = 0, **select: Any) -> Subscription:
    """A subscriber of ann's."""
    return Subscription(1, "ann", Select(**select), seq)


def read(frames: list[bytes]) -> list[Any]:
    """The frames as JSON."""
    return [json.loads(frame) for frame in frames]


# ---- Subscription ----


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ({}, True),
        ({"kind": ("count",)}, True),
        ({"kind": ("upload", "count")}, True),
        ({"kind": ("upload",)}, False),
        ({"jobs": ("j1",)}, True),
        ({"jobs": ("j2",)}, False),
        ({"state": ("running",)}, True),
        ({"state": ("queued",)}, True),
        ({"state": ("paused", "failed")}, False),
        ({"state": ("running",), "kind": ("upload",)}, False),
    ],
)
def test_filter_looks_at_the_old_and_the_new_state(select: dict[str, Any], wanted: bool) -> None:
    """An event that enters or leaves the wanted states is seen; every other field must match."""
    assert subscription(**select).wants(an_event(1)) is wanted


def test_first_event_of_a_job_has_no_old_state() -> None:
    """A job that is created in a wanted state is seen."""
    one = subscription(state=("queued",))
    assert one.wants(an_event(1, from_=None, to="queued"))
    assert not one.wants(an_event(1, from_=None, to="running"))


def test_other_owners_are_never_seen() -> None:
    """Neither events nor progress of another owner pass, whatever the filter says."""
    one = subscription(jobs=("j1",))
    assert not one.wants(an_event(1, owner="bob"))
    assert not one.wants_mark(a_mark(owner="bob"))


def test_progress_is_filtered_as_well() -> None:
    """A mark passes by the job's present state, kind and id."""
    assert subscription(state=("running",), kind=("count",), jobs=("j1",)).wants_mark(a_mark())
    assert not subscription(state=("paused",)).wants_mark(a_mark())
    assert not subscription(kind=("upload",)).wants_mark(a_mark())
    assert not subscription(jobs=("j2",)).wants_mark(a_mark())


def test_each_frame_points_at_the_one_before() -> None:
    """p is the s of the frame before, over skipped events, so that a hole can be noticed."""
    one = subscription(seq=10, kind=("count",))
    frames = read(
        one.frames(
            [an_event(11), an_event(12, kind="upload"), an_event(13), an_event(14, kind="upload")]
        )
    )
    assert [(frame["p"], frame["s"]) for frame in frames] == [(10, 11), (11, 13)]
    assert (one.sent, one.seq) == (13, 14)


def test_frame_has_the_whole_row() -> None:
    """An ev frame replaces a row: it has everything that is known of the transition."""
    (frame,) = read(subscription().frames([an_event(1)]))
    assert frame == {
        "t": "ev",
        "id": 1,
        "s": 1,
        "p": 0,
        "from": "queued",
        "to": "running",
        "cause": "claimed",
        "at": "2027-01-15T08:00:00.123Z",
        "row": {"id": "j1"},
    }


def test_mark_moves_the_cursor_over_what_was_skipped() -> None:
    """Events of others move the cursor by a mark, once; the next frame points at the mark."""
    one = subscription(kind=("count",))
    assert one.mark() is None
    one.frames([an_event(1, kind="upload"), an_event(2, kind="upload")])
    frame = one.mark()
    assert frame is not None
    assert json.loads(frame) == {"t": "mark", "id": 1, "s": 2}
    assert one.mark() is None
    assert read(one.frames([an_event(3)]))[0]["p"] == 2


def test_progress_frame_is_a_short_row_for_each_job() -> None:
    """Progress travels as arrays; an estimate is a pair or null."""
    frame = json.loads(progress_frame([a_mark()]))
    assert frame["t"] == "p"
    assert frame["u"] == [[7, 3, 5, None, None, 9, None, None]]
    assert frame["now"] > 1_700_000_000_000


def test_snapshot_names_its_cursor() -> None:
    """A page of rows says as of which seq it is, and whether more pages follow."""
    frame = json.loads(snap_frame(1, "e1", 5, 0, False, [{"id": "j1"}], {"queued": 1}, 44))
    assert (frame["t"], frame["epoch"], frame["s"], frame["last"]) == ("snap", "e1", 5, False)
    assert (frame["jobs"], frame["counts"], frame["cursor"]) == ([{"id": "j1"}], {"queued": 1}, 44)


# ---- Hub ----


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

    async def caught_up(self) -> None:
        """Return when the hub has seen everything."""
        while self.hub.seq < self.state._seq:
            await asyncio.sleep(0)


@asynccontextmanager
async def a_log(folder: Path, path: str = "state.db") -> AsyncIterator[Log]:
    """A log over a real file, with its hub running."""
    state = SqliteState(folder / path)
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


async def test_deleted_job_leaves_a_hole_that_hides_nothing(tmp_path: Path) -> None:
    """Events that went with their job before anyone looked do not shift those of other jobs."""
    async with a_log(tmp_path) as log:
        first, gone = await log.create("first"), await log.create("gone")
        first, gone = await asyncio.gather(log.move(first, "running"), log.move(gone, "succeeded"))
        log.hub._ring.clear()  # as if the hub had not been scheduled since
        log.hub.seq = 0
        await log.delete(gone)
        await log.move(first, "paused")
        await log.caught_up()
        assert [event.seq for event in log.hub._ring] == [1, 3, 5, 6]
        for seq in range(7):
            for n in (1, 2, 100):
                assert short(await log.hub.after(seq, n)) == short(await log.state.events(seq, n))


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
        assert await log.hub.resumable(epoch, seq) is None
        assert await log.hub.resumable(epoch, 0) is None
        assert await log.hub.resumable(epoch, seq + 1) == "epoch"
        assert await log.hub.resumable("other", 0) == "epoch"
        assert await log.hub.resumable(None, 0) == "epoch"
        assert short(await log.hub.after(0, 10)) == [(1, "j1", 1, "queued"), (2, "j2", 1, "queued")]
    async with a_log(tmp_path, "new.db") as log:
        assert await log.hub.resumable(epoch, 0) == "epoch"


async def test_cursor_before_what_is_kept_is_reset(tmp_path: Path) -> None:
    """Where the beginning of the log is gone, a cursor in the gap says so instead of skipping."""
    async with a_log(tmp_path) as log:
        gone = await log.move(await log.create("gone"), "succeeded")
        await log.create("kept")
        await log.delete(gone)
        await log.caught_up()
        epoch = log.hub.epoch
        assert await log.hub.resumable(epoch, 0) == "retention"
        assert await log.hub.resumable(epoch, 1) == "retention"
        assert await log.hub.resumable(epoch, 2) is None


async def test_progress_is_the_latest_value_of_each_job(tmp_path: Path) -> None:
    """A subscriber that asks late gets one row a job, the newest, and not again."""
    async with a_log(tmp_path) as log:
        await asyncio.sleep(0)  # the hub subscribes when it first runs
        for done in range(5):
            await log.state.progress_out(
                [a_mark(job, progress=Progress(done=done)) for job in ("a", "b")]
            )
            await asyncio.sleep(0)
        marks, stamp = log.hub.marks(0)
        assert [(mark.job, mark.progress.done) for mark in marks] == [("a", 4), ("b", 4)]
        assert log.hub.marks(stamp) == ([], stamp)
        await log.state.progress_out([a_mark("a", progress=Progress(done=9))])
        await asyncio.sleep(0)
        marks, _ = log.hub.marks(stamp)
        assert [(mark.job, mark.progress.done) for mark in marks] == [("a", 9)]


async def test_progress_of_an_ended_job_is_forgotten(tmp_path: Path) -> None:
    """After its last transition no progress of a job is told any more."""
    async with a_log(tmp_path) as log:
        job = await log.create("a")
        await log.state.progress_out([a_mark("a")])
        await asyncio.sleep(0)
        await log.move(job, "succeeded")
        await log.caught_up()
        assert log.hub.marks(0)[0] == []
