"""The manager and its processes over real rows and bytes: commands, races, crashes, CPU lane."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from errors import SluiceError
from jobs.downloads import Downloads
from jobs.files import now_ms
from jobs.kinds import Kind, Retry
from jobs.manager import Limits
from jobs.states import FINAL
from storage import File, Job
from tests.harness import FULL
from tests.jobs.world import OWNER, World, a_kind, eventually

REFUSALS = ("job-finished", "job-cancelling", "job-unknown")
QUICK = Limits(warn_s=0.05, grace_s=0.1)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """A warning or an error in the log fails the test, unless its text is expected."""
    marker = request.node.get_closest_marker("expects")
    # A busy machine may take the CPU away in the middle of a step.
    expected = ("held the loop", *(marker.args if marker is not None else ()))
    yield
    noise = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING
        and not any(part in record.getMessage() for part in expected)
    ]
    assert noise == []


class Steps(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How far, and how many of the steps write down how to take them back."""

    steps: int = 1_000_000
    undo: int = 0
    file: str = ""


class Bench:
    """What the kinds of a test leave behind, and how the test steers them."""

    def __init__(self) -> None:
        self.begun: list[Any] = []  # the cursors with which ``run`` was called
        self.at = 0
        self.undone: list[int] = []
        self.broken: set[int] = set()
        self.ending = ""  # "finish" or "fail": how the job shall end
        self.gate = asyncio.Event()  # what a stubborn kind waits for

    async def take_back(self, step: int) -> None:
        """The undo of a step."""
        self.undone.append(step)
        if step in self.broken:
            raise RuntimeError(f"step {step} can't be taken back")

    async def walk(self, ctx: Any, params: Steps) -> dict[str, Any]:
        """Count from the cursor, a step a millisecond; with a line a step in an artefact."""
        self.begun.append(ctx.cursor)
        step = ctx.cursor or 0
        file = await ctx.artifact(params.file) if params.file else None
        while step < params.steps:
            await ctx.checkpoint(step, done=step, total=params.steps)
            if self.ending == "finish":
                break
            if self.ending == "fail":
                raise ValueError("as asked")
            if step < params.undo:
                await ctx.undo("take_back", step=step)
            if file is not None:
                await file.write(b"%d\n" % step)
            await ctx.sleep(0.001)
            step += 1
            self.at = step
        await ctx.checkpoint(step, done=step)
        return {"counted": step}

    @property
    def walker(self) -> Kind:
        """The kind ``walk``."""
        return a_kind("walk", self.walk, Params=Steps, UNDO={"take_back": self.take_back})

    async def moved(self, steps: int = 3) -> None:
        """Return when the walker has gone on by some steps."""
        goal = self.at + steps
        await eventually(lambda: self.at >= goal, "the job moves")


async def once(ctx: Any, params: Any) -> dict[str, Any]:
    """End at once."""
    return {"ok": True}


# ---- Start, slots, queue ----


async def test_process_runs_to_its_end(tmp_path: Path) -> None:
    """A started job is queued, claimed, runs and succeeds, with a result and a gapless history."""
    async with World(tmp_path, a_kind("once", once)) as world:
        job = await world.until(await world.start("once"), "succeeded")
        assert job.result is not None
        assert job.result.data == {"ok": True}
        assert await world.path(job.id) == ["queued", "running", "succeeded"]
        assert [event.version for event in await world.history(job.id)] == [1, 2, 3]
        assert [e.cause for e in await world.history(job.id)] == ["created", "claimed", "done"]
        assert world.manager.running == 0


async def test_unknown_kind_and_transfer_are_not_started(tmp_path: Path) -> None:
    """Only kinds that are here are started."""
    async with World(tmp_path, a_kind("once", once)) as world:
        with pytest.raises(SluiceError, match="unknown-kind"):
            await world.manager.start("twice", {}, owner=OWNER, by=world.by())


async def test_full_queue_refuses(tmp_path: Path) -> None:
    """Beyond the limit a start is refused, with a time to come back."""
    bench = Bench()
    limits = Limits(slots=1, max_queued=2)
    async with World(tmp_path, bench.walker, limits=limits) as world:
        first = await world.start("walk")
        await world.until(first, "running")
        await world.start("walk")
        await world.start("walk")
        with pytest.raises(SluiceError) as caught:
            await world.start("walk")
        assert caught.value.code == "queue-full"
        assert caught.value.retry_after_s


async def test_a_full_queue_refuses_also_those_that_come_at_once(tmp_path: Path) -> None:
    """Of many starts in one turn of the loop no more are taken than there is room for."""
    limits = Limits(slots=1, max_queued=7)
    async with World(tmp_path, Bench().walker, limits=limits) as world:
        later = now_ms() + 3_600_000
        found = await asyncio.gather(
            *(world.start("walk", not_before=later) for _ in range(30)), return_exceptions=True
        )
        refused = [error.code for error in found if isinstance(error, SluiceError)]
        assert refused == ["queue-full"] * 23
        assert (await world.manager.counts(OWNER)) == {"scheduled": 7}


async def test_who_waits_for_a_job_leaves_nothing_behind(tmp_path: Path) -> None:
    """A wait ends with what was waited for, with the time, with its caller, or with the service."""
    world = World(tmp_path, Bench().walker)
    await world.open()
    manager = world.manager
    job = await world.start("walk", not_before=now_ms() + 3_600_000)

    def paused(job: Job) -> bool:
        return job.state == "paused" or job.state in FINAL

    waits = [asyncio.create_task(manager.until(job, paused, 60)) for _ in range(3)]
    await eventually(lambda: len(manager._waits) == 3, "they wait")
    waits[0].cancel()
    await asyncio.wait([waits[0]])
    assert len(manager._waits) == len(manager._news[job]) == 2
    await world.tell(job, "pause")
    for wait in waits[1:]:
        found = await wait
        assert found is not None and found.state == "paused"
    assert not manager._waits and not manager._news
    assert not await manager.ended(job, 0.01)
    late = asyncio.create_task(manager.ended(job, 60))
    await eventually(lambda: manager._waits, "it waits")
    await world.close()
    assert not await late
    assert not manager._waits and not manager._news


async def test_queued_and_deleted_jobs_are_waited_for_rightly(tmp_path: Path) -> None:
    """One that has not begun has not ended; one that is no more has."""
    async with World(tmp_path, Bench().walker, limits=Limits(slots=0)) as world:
        job = await world.start("walk")
        assert not await world.manager.ended(job, 0.01)
        await world.tell(job, "cancel")
        assert await world.manager.ended(job, 0.01)
        await world.manager.delete(job, owner=OWNER, by=world.by())
        assert await world.manager.ended(job, 0.01)


async def test_queue_goes_by_priority_then_age_and_resumed_jobs_first(tmp_path: Path) -> None:
    """The next job has the highest priority; among equals who ran before, then the oldest."""
    order: list[str] = []
    gate = asyncio.Event()

    async def note(ctx: Any, params: Any) -> None:
        order.append((await world.job(ctx.job_id)).name)
        while not gate.is_set():
            await ctx.sleep(0.001)

    async with World(tmp_path, a_kind("note", note), limits=Limits(slots=1), warm_s=0) as world:
        ran = await world.start("note", name="ran before")
        await world.until(ran, "running")
        await world.tell(ran, "pause")
        await world.until(ran, "paused")
        blocker = await world.start("note", name="blocker")
        await world.until(blocker, "running")
        ids = [
            await world.start("note", name=name, priority=priority)
            for name, priority in (("low", 1), ("old", 5), ("new", 5), ("high", 9))
        ]
        assert await world.tell(ran, "resume") == ("queued", 202)
        assert await world.state.ahead(await world.job(ran)) == 1
        gate.set()
        for job_id in (*ids, ran):
            await world.until(job_id, "succeeded")
        assert order == ["ran before", "blocker", "high", "ran before", "old", "new", "low"]


async def test_no_more_jobs_run_than_there_are_slots(tmp_path: Path) -> None:
    """200 queued jobs share 8 slots: never more run at once, and all end."""
    running, most = 0, 0

    async def busy(ctx: Any, params: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running, world.manager.running)
        while most < 8:  # the first ones wait until all slots are taken
            await ctx.sleep(0.005)
        await ctx.sleep(0.005)
        running -= 1

    async with World(tmp_path, a_kind("busy", busy), limits=Limits(slots=8)) as world:
        ids = [await world.start("busy") for _ in range(200)]
        for job_id in ids:
            await world.until(job_id, "succeeded")
        assert most == 8
        await eventually(lambda: world.manager.running == 0, "all slots are free")


async def test_live_name_is_taken_once(tmp_path: Path) -> None:
    """Ten starts under one name at once make one job; when it has ended the name is free."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:

        async def start() -> tuple[Job, bool]:
            return await world.manager.start(
                "walk", {}, owner=OWNER, by=world.by(), name="mine", live_name=True
            )

        made = await asyncio.gather(*(start() for _ in range(10)))
        assert len({job.id for job, _ in made}) == 1
        assert sum(created for _, created in made) == 1
        first = made[0][0].id
        await world.tell(first, "cancel")
        await world.until(first, "cancelled")
        again, created = await start()
        assert created
        assert again.id != first


async def test_scheduled_job_waits_for_its_time(tmp_path: Path) -> None:
    """A job with a time ahead is scheduled, and starts by itself when the time has come."""
    async with World(tmp_path, a_kind("once", once)) as world:
        at = world.by().at + 60
        job_id = await world.start("once", not_before=at)
        job = await world.until(job_id, "succeeded")
        assert job.started_at is not None
        assert job.started_at >= at
        assert await world.path(job_id) == ["scheduled", "queued", "running", "succeeded"]


async def test_paused_before_its_time_it_is_scheduled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduled job that is paused and resumed still waits for its time."""
    hour_ms = 3_600_000
    async with World(tmp_path, a_kind("once", once)) as world:
        job_id = await world.start("once", not_before=now_ms() + hour_ms)
        assert await world.tell(job_id, "pause") == ("paused", 200)
        assert await world.tell(job_id, "resume") == ("scheduled", 202)
        monkeypatch.setattr("jobs.manager.now_ms", lambda: now_ms() + hour_ms)
        world.manager._watch_due()
        await world.until(job_id, "succeeded")


async def test_many_jobs_of_one_time_all_start(tmp_path: Path) -> None:
    """More jobs than one look takes become due in the same millisecond; none is forgotten."""
    async with World(tmp_path, a_kind("once", once), limits=Limits(slots=64)) as world:
        at = world.by().at + 1500
        ids = await asyncio.gather(*(world.start("once", not_before=at) for _ in range(1100)))
        for job_id in ids:
            await world.until(job_id, "succeeded")


# ---- Pause ----


async def test_warm_pause_keeps_the_frame(tmp_path: Path) -> None:
    """A short pause gives the slot back and goes on in the same call of ``run``."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        await bench.moved()
        assert await world.tell(job_id, "pause") == ("pausing", 202)
        await world.until(job_id, "paused")
        assert world.manager.running == 0
        at = bench.at
        assert (await world.job(job_id)).cursor["cursor"] in (at, at - 1)
        await asyncio.sleep(0.03)
        assert bench.at == at
        assert await world.tell(job_id, "resume") == ("queued", 202)
        await bench.moved()
        assert bench.begun == [None]
        bench.ending = "finish"
        await world.until(job_id, "succeeded")
        assert await world.path(job_id) == [
            *("queued", "running", "pausing", "paused"),
            *("queued", "running", "succeeded"),
        ]


async def test_cold_pause_goes_on_from_the_cursor(tmp_path: Path) -> None:
    """After warm_s the frame is gone; a resume calls ``run`` again where it stood."""
    bench = Bench()
    async with World(tmp_path, bench.walker, warm_s=0.01) as world:
        job_id = await world.start("walk")
        for times in range(1, 4):
            await bench.moved()
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await eventually(lambda: not world.runners._live, "the frame is gone")
            at = bench.at
            await world.tell(job_id, "resume")
            await bench.moved(1)
            assert len(bench.begun) == times + 1
            assert bench.begun[-1] in (at, at - 1)
        bench.ending = "finish"
        await world.until(job_id, "succeeded")


async def test_pause_that_is_withdrawn_at_once_changes_nothing(tmp_path: Path) -> None:
    """pause, resume, pause, resume without a breath: the job goes on, in one frame."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        await bench.moved()
        for _ in range(20):
            await world.tell(job_id, "pause")
            await world.tell(job_id, "resume")
        await bench.moved()
        bench.ending = "finish"
        await world.until(job_id, "succeeded")
        assert bench.begun == [None]
        assert world.manager.running == 0


async def test_pause_while_the_old_frame_still_unwinds(tmp_path: Path) -> None:
    """Resumed and paused again while a cold frame takes its time to end: paused, without delay."""
    gate, begun = asyncio.Event(), 0

    async def slow_to_end(ctx: Any, params: Any) -> None:
        nonlocal begun
        begun += 1
        try:
            while True:
                await ctx.checkpoint(begun)
                await ctx.sleep(0.001)
        finally:
            if begun == 1:
                await gate.wait()

    kind = a_kind("slow", slow_to_end)
    async with World(tmp_path, kind, warm_s=0) as world:
        job_id = await world.start("slow")
        await eventually(lambda: begun, "it runs")
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        await eventually(lambda: all(p.over for p in world.runners._live.values()), "it is cold")
        await world.tell(job_id, "resume")
        await world.until(job_id, "running")
        await world.tell(job_id, "pause")
        gate.set()
        await world.until(job_id, "paused")
        assert begun == 1
        await world.tell(job_id, "resume")
        await eventually(lambda: begun == 2, "it runs again")


async def test_cancel_while_the_old_frame_still_unwinds(tmp_path: Path) -> None:
    """Resumed and cancelled while a cold frame takes its time: no new frame is begun."""
    gate, begun = asyncio.Event(), 0

    async def slow_to_end(ctx: Any, params: Any) -> None:
        nonlocal begun
        begun += 1
        try:
            while True:
                await ctx.checkpoint(begun)
                await ctx.sleep(0.001)
        finally:
            await gate.wait()

    async with World(tmp_path, a_kind("slow", slow_to_end), warm_s=0) as world:
        job_id = await world.start("slow")
        await eventually(lambda: begun, "it runs")
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        await eventually(lambda: all(p.over for p in world.runners._live.values()), "it is cold")
        await world.tell(job_id, "resume")
        await world.until(job_id, "running")
        await world.tell(job_id, "cancel")
        gate.set()
        await world.until(job_id, "cancelled")
        await asyncio.sleep(0.02)
        assert begun == 1
        assert not world.runners._live
        assert world.manager.running == 0


async def test_an_artefacts_name_is_a_name_and_no_path(tmp_path: Path) -> None:
    """Whatever a kind calls its artefact, it stays in the folder of its own."""

    async def run(ctx: Any, params: Any) -> None:
        file = await ctx.artifact("../../../out.txt")
        assert await ctx.artifact("out.txt") is file
        await file.write(b"x")

    async with World(tmp_path, a_kind("far", run)) as world:
        job_id = await world.start("far")
        job = await world.until(job_id, "succeeded")
        assert [made.name for made in job.artifacts] == ["out.txt"]
        assert list(world.published().values()) == [b"x"]


async def test_kind_that_can_not_go_on_starts_over(tmp_path: Path) -> None:
    """RESUMABLE = False: after a cold pause there is no cursor, and the artefact begins anew."""
    begun: list[Any] = []

    async def run(ctx: Any, params: Any) -> None:
        begun.append(ctx.cursor)
        file = await ctx.artifact("out.txt")
        await file.write(b"begin\n")
        await ctx.checkpoint(1)
        if len(begun) == 1:
            while True:
                await ctx.checkpoint(2)
                await ctx.sleep(0.001)
        await file.write(b"end\n")

    async with World(tmp_path, a_kind("over", run, RESUMABLE=False), warm_s=0) as world:
        job_id = await world.start("over")
        await eventually(lambda: begun, "it runs")
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        await world.tell(job_id, "resume")
        await world.until(job_id, "succeeded")
        assert begun == [None, None]
        assert list(world.published().values()) == [b"begin\nend\n"]
        assert world.unfinished() == []


async def test_cursor_of_another_version_fails_the_job(tmp_path: Path) -> None:
    """A cursor that the kind no longer understands is not guessed at."""
    bench = Bench()
    async with World(tmp_path, bench.walker, warm_s=0) as world:
        job_id = await world.start("walk")
        await bench.moved()
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
    newer = bench.walker._replace(cursor_version=2)
    async with World(tmp_path, newer) as world:
        await world.tell(job_id, "resume")
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert job.error["code"] == "cursor-incompatible"


# ---- Cancel and the undo journal ----


async def test_cancel_takes_everything_back_in_reverse(tmp_path: Path) -> None:
    """A cancelled job undoes its steps, the last one first, and says how many."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"undo": 5})
        await bench.moved(7)
        assert await world.tell(job_id, "cancel") == ("cancelling", 202)
        job = await world.until(job_id, "cancelled")
        assert bench.undone == [4, 3, 2, 1, 0]
        assert job.rollback is not None
        assert (job.rollback.done, job.rollback.total, job.rollback.failed) == (5, 5, 0)
        assert job.undo == ()


@pytest.mark.expects("undo 'take_back' failed")
async def test_undo_that_fails_is_counted_and_the_rest_still_runs(tmp_path: Path) -> None:
    """An entry that fails is tried again, then counted; the others are not held up."""
    bench = Bench()
    bench.broken = {2}
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"undo": 4})
        await bench.moved(6)
        await world.tell(job_id, "cancel")
        job = await world.until(job_id, "cancelled")
        assert bench.undone == [3, 2, 2, 2, 1, 0]
        assert job.rollback is not None
        assert (job.rollback.done, job.rollback.failed) == (4, 1)


@pytest.mark.expects("failed")
async def test_failure_runs_the_journal(tmp_path: Path) -> None:
    """A job that fails takes back what it did, keeps its error, and its log says why."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"undo": 3, "file": "out.txt"})
        await bench.moved(5)
        bench.ending = "fail"
        job = await world.until(job_id, "failed")
        assert bench.undone == [2, 1, 0]
        assert job.error is not None
        assert job.error["code"] == "kind-failed"
        assert job.rollback is not None
        assert "ValueError: as asked" in [
            line for _, _, line in await world.manager.lines(job_id, OWNER, 0, 10)
        ]
        assert await world.path(job_id) == ["queued", "running", "cancelling", "failed"]
        assert world.unfinished() == []
        assert world.manager.running == 0


async def test_paused_job_with_a_journal_is_undone_without_its_frame(tmp_path: Path) -> None:
    """A cold job is cancelled by its journal alone; ``run`` is not called again."""
    bench = Bench()
    async with World(tmp_path, bench.walker, warm_s=0) as world:
        job_id = await world.start("walk", {"undo": 3})
        await bench.moved(5)
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        await eventually(lambda: not world.runners._live, "the frame is gone")
        assert await world.tell(job_id, "cancel") == ("cancelling", 202)
        await world.until(job_id, "cancelled")
        assert bench.undone == [2, 1, 0]
        assert bench.begun == [None]


async def test_journal_goes_on_after_a_crash_in_the_middle(tmp_path: Path) -> None:
    """Killed while it undoes: after the restart the rest is undone, and the job is cancelled."""
    bench = Bench()
    slow = asyncio.Event()

    async def take_back(step: int) -> None:
        bench.undone.append(step)
        if step == 2 and not slow.is_set():
            await asyncio.Event().wait()

    kind = bench.walker._replace(undo={"take_back": take_back})
    async with World(tmp_path, kind) as world:
        job_id = await world.start("walk", {"undo": 5})
        await bench.moved(7)
        await world.tell(job_id, "cancel")
        await eventually(lambda: bench.undone[-1:] == [2], "the middle is reached")
        slow.set()
        await world.restart()
        await world.until(job_id, "cancelled")
        assert bench.undone == [4, 3, 2, 2, 1, 0]
        assert bench.begun == [None]


async def test_long_rollback_is_not_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline of a cancel is for reaching a checkpoint: a journal that moves has its time."""
    now = now_ms()
    monkeypatch.setattr("jobs.manager.now_ms", lambda: now)
    monkeypatch.setattr("jobs.runners._NOTE_S", 0.0)
    bench = Bench()

    async def take_back(step: int) -> None:
        nonlocal now
        now += 4000
        await world.manager._deadline(job_id)
        bench.undone.append(step)

    kind = bench.walker._replace(undo={"take_back": take_back})
    async with World(tmp_path, kind, limits=Limits(warn_s=10, grace_s=20)) as world:
        job_id = await world.start("walk", {"undo": 12})
        await bench.moved(14)
        await world.tell(job_id, "cancel")
        job = await world.until(job_id, "cancelled")
        assert bench.undone == list(range(11, -1, -1))
        assert job.rollback is not None
        assert job.rollback.done == 12


# ---- Deadlines and force ----


@pytest.mark.expects("too long")
@pytest.mark.parametrize(("verb", "end"), [("pause", "paused"), ("cancel", "cancelled")])
async def test_kind_that_never_reaches_a_checkpoint_is_forced(
    tmp_path: Path, verb: str, end: str
) -> None:
    """Warned, then cancelled by force: the command takes effect without the kind's help."""
    started = asyncio.Event()

    async def deaf(ctx: Any, params: Any) -> None:
        started.set()
        await asyncio.sleep(3600)

    async with World(tmp_path, a_kind("deaf", deaf), limits=QUICK) as world:
        job_id = await world.start("deaf")
        await started.wait()
        began = perf_counter()
        _, status = await world.tell(job_id, verb)
        assert status == 202
        await world.until(job_id, end)
        assert perf_counter() - began > 0.09
        assert [e.cause for e in await world.history(job_id)][-3:-1] == ["deadline", "deadline"]
        assert world.manager.running == 0
        await eventually(lambda: not world.runners._live, "the frame is gone")


@pytest.mark.expects("too long")
async def test_kind_that_swallows_its_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the force a last deadline ends the state; the slot is free; a late end is ignored."""
    monkeypatch.setattr("jobs.states._END_MS", 50)
    started, gate = asyncio.Event(), asyncio.Event()

    async def immortal(ctx: Any, params: Any) -> dict[str, Any]:
        file = await ctx.artifact("late.txt")
        started.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        await file.write(b"too late")
        return {}

    async with World(tmp_path, a_kind("immortal", immortal), limits=QUICK) as world:
        job_id = await world.start("immortal")
        await started.wait()
        await world.tell(job_id, "cancel")
        job = await world.until(job_id, "cancelled")
        assert job.reason == "forced"
        assert world.manager.running == 0
        gate.set()
        await eventually(lambda: not world.runners._live, "it has ended")
        assert (await world.job(job_id)).state == "cancelled"
        assert world.unfinished() == []
        assert world.published() == {}


@pytest.mark.expects("too long")
async def test_kind_that_was_given_up_in_a_pause_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused by the last deadline while it is stuck, then resumed: it goes on, and may succeed."""
    monkeypatch.setattr("jobs.states._END_MS", 50)
    started, gate = asyncio.Event(), asyncio.Event()

    async def immortal(ctx: Any, params: Any) -> dict[str, Any]:
        file = await ctx.artifact("out.txt")
        await file.write(b"first")
        started.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        await ctx.checkpoint("after")
        await file.write(b", last")
        return {}

    async with World(tmp_path, a_kind("immortal", immortal), limits=QUICK) as world:
        job_id = await world.start("immortal")
        await started.wait()
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        await world.tell(job_id, "resume")
        await world.until(job_id, "running")
        gate.set()
        await world.until(job_id, "succeeded")
        assert list(world.published().values()) == [b"first, last"]
        assert world.manager.running == 0


async def test_force_ends_the_grace(tmp_path: Path) -> None:
    """cancel, then cancel with force: a kind that does not listen is ended at once."""
    started = asyncio.Event()

    async def deaf(ctx: Any, params: Any) -> None:
        started.set()
        await asyncio.sleep(3600)

    async with World(tmp_path, a_kind("deaf", deaf)) as world:
        job_id = await world.start("deaf")
        await started.wait()
        await world.tell(job_id, "cancel")
        assert await world.tell(job_id, "cancel", force=True) == ("cancelling", 202)
        await world.until(job_id, "cancelled")


# ---- Artefacts, log ----


async def test_artifact_survives_cold_pauses_byte_for_byte(tmp_path: Path) -> None:
    """Written, paused cold, cut back to the cursor, written on: the file is what it had to be."""
    bench = Bench()
    async with World(tmp_path, bench.walker, warm_s=0) as world:
        job_id = await world.start("walk", {"file": "lines.txt"})
        for _ in range(4):
            await bench.moved(5)
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await world.tell(job_id, "resume")
        bench.ending = "finish"
        job = await world.until(job_id, "succeeded")
        assert job.result is not None
        expected = b"".join(b"%d\n" % i for i in range(job.result.data["counted"]))
        (artifact,) = job.artifacts
        file = await world.files.get(artifact.file, OWNER)
        assert (file.bytes, file.job, file.name) == (len(expected), job_id, "lines.txt")
        assert world.published() == {f"{file.id}/lines.txt": expected}
        assert world.unfinished() == []


async def test_artifact_survives_crashes_byte_for_byte(tmp_path: Path) -> None:
    """Killed at any moment, the job goes on by itself and the file is still what it had to be."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"file": "lines.txt"})
        for _ in range(3):
            await bench.moved(5)
            await world.runners.save()
            await bench.moved(3)
            bench.at = 0
            await world.restart()
        bench.ending = "finish"
        job = await world.until(job_id, "succeeded")
        assert job.result is not None
        assert job.attempt == 4
        expected = b"".join(b"%d\n" % i for i in range(job.result.data["counted"]))
        assert list(world.published().values()) == [expected]


async def test_artifact_is_kept_by_who_has_not_opened_it_again(tmp_path: Path) -> None:
    """Resumed, a kind may save its cursor before it opens its files again, or leave one shut."""
    runs = 0
    stands = asyncio.Event()

    async def two(ctx: Any, params: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            first = await ctx.artifact("first.txt")
            second = await ctx.artifact("second.txt")
            await first.write(b"one")
            await second.write(b"two")
            await ctx.checkpoint("half")
            stands.set()
            await ctx.sleep(3600)
        await ctx.checkpoint("half")
        await world.runners.save()
        if runs == 2:
            stands.set()
            await ctx.sleep(3600)
        second = await ctx.artifact("second.txt")
        await second.write(b", three")

    async with World(tmp_path, a_kind("two", two), warm_s=0) as world:
        job_id = await world.start("two")
        for _ in range(2):
            await stands.wait()
            stands.clear()
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await world.tell(job_id, "resume")
        job = await world.until(job_id, "succeeded")
        found = {key.split("/")[1]: value for key, value in world.published().items()}
        assert found == {"first.txt": b"one", "second.txt": b"two, three"}
        assert sorted(artifact.name for artifact in job.artifacts) == ["first.txt", "second.txt"]
        assert world.unfinished() == []


async def test_artifact_of_a_cancelled_job_is_gone(tmp_path: Path) -> None:
    """Nothing of a cancelled job is left, neither published nor in tmp/."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"file": "lines.txt"})
        await bench.moved()
        assert len(world.unfinished()) == 1
        await world.tell(job_id, "cancel")
        await world.until(job_id, "cancelled")
        assert world.unfinished() == []
        assert world.published() == {}


async def test_new_artifact_is_not_swept_at_start(tmp_path: Path) -> None:
    """A job that starts right after a restart keeps the file that it opens at once."""

    async def write(ctx: Any, params: Any) -> None:
        file = await ctx.artifact("out.txt")
        await file.write(b"here")

    kind = a_kind("write", write)
    async with World(tmp_path, kind, limits=Limits(slots=1)) as world:
        ids = [await world.start("write") for _ in range(250)]
        await world.restart()
        for job_id in ids:
            await world.until(job_id, "succeeded")
        assert len(world.published()) == 250


async def test_log_lines_are_kept_in_order(tmp_path: Path) -> None:
    """What a process logs can be read while it runs and afterwards; a flood is cut, and says so."""
    said, gate = asyncio.Event(), asyncio.Event()

    async def chatty(ctx: Any, params: Any) -> None:
        ctx.log("hello")
        await ctx.checkpoint(1)
        said.set()
        while not gate.is_set():
            await ctx.sleep(0.001)
        for i in range(1500):
            ctx.log(f"line {i}")
        ctx.log("x" * 10_000)

    async with World(tmp_path, a_kind("chatty", chatty)) as world:
        job_id = await world.start("chatty")
        await said.wait()
        await world.runners.save()
        lines = await world.manager.lines(job_id, OWNER, 0, 10)
        assert [line for _, _, line in lines] == ["hello"]
        gate.set()
        await world.until(job_id, "succeeded")
        lines = await world.manager.lines(job_id, OWNER, 0, 2000)
        text = [line for _, _, line in lines]
        assert text[:3] == ["hello", "line 0", "line 1"]
        assert len(text) == 1002
        assert "501 lines were dropped" in text[-1]
        assert [n for n, _, _ in lines] == list(range(1, 1003))


@pytest.mark.expects("cursor could not be saved")
@pytest.mark.parametrize("cursor", ["x" * 70_000, object()])
async def test_cursor_that_can_not_be_saved_fails_its_job_alone(
    tmp_path: Path, cursor: Any
) -> None:
    """A cursor that is too long, or no JSON, fails the job; the others are saved as ever."""
    bench = Bench()

    async def bad(ctx: Any, params: Any) -> None:
        while True:
            await ctx.checkpoint(cursor)
            await ctx.sleep(0.001)

    async with World(tmp_path, a_kind("bad", bad), bench.walker) as world:
        bad_id, good_id = await world.start("bad"), await world.start("walk")
        await bench.moved()
        await world.runners.save()
        assert (await world.job(good_id)).cursor["cursor"] > 0
        await world.tell(bad_id, "pause")
        job = await world.until(bad_id, "failed")
        assert job.error is not None
        assert job.error["code"] == "kind-failed"


@pytest.mark.expects("failed")
async def test_result_that_is_no_json_fails_the_job(tmp_path: Path) -> None:
    """A result that no client could read is a failure, and its artefacts are not published."""

    async def bad(ctx: Any, params: Any) -> dict[str, Any]:
        await (await ctx.artifact("out.txt")).write(b"x")
        return {"result": object()}

    async with World(tmp_path, a_kind("bad", bad)) as world:
        job = await world.until(await world.start("bad"), "failed")
        assert job.error is not None
        assert job.error["code"] == "kind-failed"
        await eventually(lambda: not world.runners._live, "it has ended")
        assert world.unfinished() == []
        assert world.published() == {}


# ---- Retry, delete ----


async def test_retry_makes_a_new_job(tmp_path: Path) -> None:
    """A retry is another job with the same parameters, from the start; live ones have none."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk", {"steps": 777_777})
        with pytest.raises(SluiceError, match="job-live"):
            await world.manager.retry(job_id, owner=OWNER, by=world.by())
        await bench.moved()
        await world.tell(job_id, "cancel")
        old = await world.until(job_id, "cancelled")
        again = await world.manager.retry(job_id, owner=OWNER, by=world.by())
        assert again.id != job_id
        assert (again.retry_of, again.params, again.name) == (job_id, old.params, old.name)
        assert again.cursor is None
        bench.ending = "finish"
        await world.until(again.id, "succeeded")
        assert bench.begun == [None, None]


async def test_delete_is_for_ended_jobs_and_happens_once(tmp_path: Path) -> None:
    """A live job is not deleted; of ten deletes of an ended one, one succeeds."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        with pytest.raises(SluiceError, match="job-live"):
            await world.manager.delete(job_id, owner=OWNER, by=world.by())
        await world.tell(job_id, "cancel")
        await world.until(job_id, "cancelled")
        with pytest.raises(SluiceError, match="job-unknown"):
            await world.manager.delete(job_id, owner="bob", by=world.by())
        done = await asyncio.gather(
            *(world.manager.delete(job_id, owner=OWNER, by=world.by()) for _ in range(10)),
            return_exceptions=True,
        )
        assert done.count(None) == 1
        assert {e.code for e in done if isinstance(e, SluiceError)} == {"job-unknown"}
        assert not [e for e in done if e is not None and not isinstance(e, SluiceError)]
        with pytest.raises(SluiceError, match="job-unknown"):
            await world.job(job_id)
        assert (await world.state.events(0, 99))[-1].to == "deleted"


# ---- Change ----


class Silent:
    """The connection of a transfer of which nothing is wanted."""

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""


async def a_download(world: World, downloads: Downloads) -> Job:
    """A download that runs, with nobody connected."""
    file = File(
        id="f", name="f.bin", bytes=9, media_type="x/y", owner=OWNER, job=None, created_at=1
    )
    return await downloads.create(file, 9, owner=OWNER, client="", by=world.by(), protocol="export")


async def last_event(world: World, job: Job) -> tuple[str | None, str, str, str]:
    """What was logged last of a job, after a look at the version."""
    event = (await world.history(job.id))[-1]
    assert event.version == job.version
    return event.from_, event.to, event.cause, event.actor


async def test_job_is_renamed_in_any_state(tmp_path: Path) -> None:
    """A new name is an event that is no transition, with its author, also when the job is over."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        for name, verb, state in (
            ("runs", "pause", "running"),
            ("waits", "cancel", "paused"),
            ("is over", "", "cancelled"),
        ):
            before = await world.until(job_id, state)
            by = world.by()
            job = await world.manager.change(job_id, owner=OWNER, by=by, name=name)
            assert job == await world.job(job_id)
            assert (job.name, job.state, job.by) == (name, state, by)
            assert job.version == before.version + 1
            assert job.ended_at == before.ended_at
            assert await last_event(world, job) == (state, state, "renamed", OWNER)
            if verb:
                await world.tell(job_id, verb)


async def test_higher_priority_lets_a_queued_job_start_earlier(tmp_path: Path) -> None:
    """The priority of a job that waits is its place in the queue, from the change on."""
    order: list[str] = []
    gate = asyncio.Event()

    async def note(ctx: Any, params: Any) -> None:
        order.append((await world.job(ctx.job_id)).name)
        while not gate.is_set():
            await ctx.sleep(0.001)

    async with World(tmp_path, a_kind("note", note), limits=Limits(slots=1)) as world:
        ids = {name: await world.start("note", name=name) for name in ("first", "a", "b", "c", "d")}
        await world.until(ids["first"], "running")
        for name, priority in (("c", 9), ("a", 0), ("d", 6)):
            job = await world.manager.change(
                ids[name], owner=OWNER, by=world.by(), priority=priority
            )
            assert await last_event(world, job) == ("queued", "queued", "command", OWNER)
        assert [await world.state.ahead(await world.job(ids[name])) for name in "cdba"] == [
            0,
            1,
            2,
            3,
        ]
        gate.set()
        for job_id in ids.values():
            await world.until(job_id, "succeeded")
        assert order == ["first", "c", "d", "b", "a"]


async def test_limit_is_told_to_the_live_transfer(tmp_path: Path) -> None:
    """A limit is in the row and in the flow at once, and kept for who connects later."""
    async with World(tmp_path) as world:
        downloads = Downloads(world.manager, world.state, hold_s=60)
        stale = await a_download(world, downloads)

        async def limit(limit_bytes_per_s: int | None) -> None:
            job = await world.manager.change(
                stale.id, owner=OWNER, by=world.by(), limit_bytes_per_s=limit_bytes_per_s
            )
            assert job.limit_bytes_per_s == limit_bytes_per_s
            assert world.manager.row(job)["transfer"]["limit_bytes_per_s"] == limit_bytes_per_s
            assert await last_event(world, job) == ("running", "running", "command", OWNER)

        await limit(5000)
        async with downloads.connect(stale, Silent()) as download:
            told = [(download.flow.limit_bytes_per_s, download.most_bytes)]
            for limit_bytes_per_s in (1 << 40, None):
                await limit(limit_bytes_per_s)
                told.append((download.flow.limit_bytes_per_s, download.most_bytes))
            assert told == [(5000, 4 << 10), (1 << 40, 1 << 20), (None, None)]
        assert downloads.most_bytes is None  # without a job there is no limit
        assert (await world.job(stale.id)).state == "succeeded"


async def test_change_of_nothing_is_no_event(tmp_path: Path) -> None:
    """What is so already is not logged again; only the rest counts as changed."""
    bench = Bench()
    async with World(tmp_path, bench.walker, limits=Limits(slots=0)) as world:
        job_id = await world.start("walk", name="same", priority=7)
        before = await world.job(job_id)
        same = await world.manager.change(
            job_id, owner=OWNER, by=world.by(), name="same", priority=7
        )
        assert same == before
        job = await world.manager.change(
            job_id, owner=OWNER, by=world.by(), name="other", priority=7
        )
        assert await last_event(world, job) == ("queued", "queued", "renamed", OWNER)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({}, None),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\x7f"}, "name"),
        ({"name": "a\ud800"}, "name"),
        ({"priority": -1}, "priority"),
        ({"priority": 10}, "priority"),
        ({"limit_bytes_per_s": 1023}, "limit_bytes_per_s"),
        ({"limit_bytes_per_s": (1 << 40) + 1}, "limit_bytes_per_s"),
        ({"limit_bytes_per_s": 0, "name": "x"}, "limit_bytes_per_s"),
    ],
    ids=repr,
)
async def test_wrong_change_is_refused_whole(
    tmp_path: Path, change: dict[str, Any], field: str | None
) -> None:
    """A value out of its bounds is refused with its name, and nothing is changed."""
    async with World(tmp_path) as world:
        before = await a_download(world, Downloads(world.manager, world.state, hold_s=60))
        with pytest.raises(SluiceError) as caught:
            await world.manager.change(before.id, owner=OWNER, by=world.by(), **change)
        assert (caught.value.code, caught.value.field) == ("invalid-field", field)
        assert await world.job(before.id) == before


async def test_change_that_the_job_does_not_allow(tmp_path: Path) -> None:
    """No limit for a process, only a name for what is over, nothing for another's or an old one."""
    async with World(tmp_path, a_kind("once", once)) as world:
        job = await world.until(await world.start("once"), "succeeded")

        async def refused(owner: str = OWNER, **change: Any) -> SluiceError:
            with pytest.raises(SluiceError) as caught:
                await world.manager.change(job.id, owner=owner, by=world.by(), **change)
            return caught.value

        for limit in (5000, None):
            error = await refused(limit_bytes_per_s=limit)
            assert (error.code, error.field) == ("invalid-field", "limit_bytes_per_s")
        for change in ({"priority": 9}, {"priority": job.priority}, {"priority": 9, "name": "x"}):
            error = await refused(**change)
            assert (error.code, error.extra["state"]) == ("job-finished", "succeeded")
        assert (await refused(name="x", owner="bob")).code == "job-unknown"
        error = await refused(name="x", if_version=job.version - 1)
        assert (error.code, error.extra["version"]) == ("version-mismatch", job.version)
        assert await world.job(job.id) == job
        await world.manager.change(
            job.id, owner=OWNER, by=world.by(), name="x", if_version=job.version
        )


async def test_changes_race_with_commands_and_the_end(tmp_path: Path) -> None:
    """None of many changes at once is lost, whatever else happens to the job, and it ends well."""
    bench = Bench()
    async with World(tmp_path, bench.walker, warm_s=0.002) as world:
        job_id = await world.start("walk")
        await bench.moved()

        async def change(i: int) -> None:
            await asyncio.sleep(i % 7 * 0.001)
            await world.manager.change(
                job_id, owner=OWNER, by=world.by(), name=f"name {i}", priority=i % 10
            )

        async def annoy() -> None:
            for _ in range(5):
                for verb in ("pause", "resume"):
                    await world.tell(job_id, verb)
                    await asyncio.sleep(0.001)

        await asyncio.gather(annoy(), *(change(i) for i in range(40)))
        bench.ending = "finish"
        job = await world.until(job_id, "succeeded")
        history = await world.history(job_id)
        assert [event.version for event in history] == list(range(1, job.version + 1))
        assert [a.to for a in history[:-1]] == [b.from_ for b in history[1:]]
        names = {msgspec.json.decode(event.row)["name"] for event in history}
        assert names >= {f"name {i}" for i in range(40)}
        assert world.unsound([job]) == []
        assert world.manager.running == 0


async def test_change_outlives_a_crash(tmp_path: Path) -> None:
    """A changed name and priority are there after a restart, also of a job that ran."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        await bench.moved()
        await world.manager.change(job_id, owner=OWNER, by=world.by(), name="new", priority=8)
        await world.restart()
        await bench.moved()
        job = await world.job(job_id)
        assert (job.name, job.priority) == ("new", 8)


# ---- Progress ----


async def test_progress_is_told_and_saved_while_it_runs(tmp_path: Path) -> None:
    """Ten times a second the latest progress goes out; once a second it is in the row."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        told = world.state.progress_in()
        first = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0)
        job_id = await world.start("walk", {"steps": 777_777})
        (mark,) = await first
        assert (mark[0], mark[5]) == (job_id, "running")
        assert mark[7].total == 777_777
        await told.aclose()  # type: ignore[attr-defined]
        while (await world.job(job_id)).cursor is None:
            await asyncio.sleep(0.02)
        assert (await world.job(job_id)).progress.done > 0
        await world.tell(job_id, "cancel")


async def test_progress_never_falls_over_a_crash(tmp_path: Path) -> None:
    """done after a restart is no less than what was told before it."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        await bench.moved(10)
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        before = (await world.job(job_id)).progress.done
        await world.restart()
        assert world.manager.row(await world.job(job_id))["progress"]["done"] == before
        await world.tell(job_id, "resume")
        await world.until(job_id, "running")
        assert world.manager.row(await world.job(job_id))["progress"]["done"] >= before


# ---- Crash and stop ----


async def test_every_state_is_put_right_after_a_crash(tmp_path: Path) -> None:
    """running goes on, paused stays, pausing is paused, cancelling cancelled, queued still runs."""
    stuck = asyncio.Event()
    standing = 0

    async def stubborn(ctx: Any, params: Any) -> None:
        nonlocal standing
        if ctx.cursor is None:
            await ctx.checkpoint("begun")
            await world.runners.save()
            standing += 1
            await stuck.wait()

    kind = a_kind("stubborn", stubborn)
    async with World(tmp_path, kind, limits=Limits(slots=4)) as world:
        ids = [await world.start("stubborn") for _ in range(4)]
        for job_id in ids:
            await world.until(job_id, "running")
        running, pausing, cancelling, paused = ids
        queued = await world.start("stubborn")
        queued_then_paused = await world.start("stubborn")
        await world.tell(queued_then_paused, "pause")
        await eventually(lambda: standing == 4, "all run")
        await world.tell(pausing, "pause")
        await world.tell(cancelling, "cancel")
        assert [(await world.job(j)).state for j in ids] == [
            *("running", "pausing", "cancelling", "running")
        ]
        await world.tell(paused, "pause")
        await world.restart()
        stuck.set()
        await world.until(running, "succeeded")
        await world.until(cancelling, "cancelled")
        await world.until(queued, "succeeded")
        for job_id in (pausing, paused, queued_then_paused):
            assert (await world.job(job_id)).state == "paused"
            await world.tell(job_id, "resume")
            await world.until(job_id, "succeeded")
        causes = [event.cause for event in await world.history(running)]
        assert causes == ["created", "claimed", "crash", "claimed", "done"]
        for job_id in (*ids, queued, queued_then_paused):
            versions = [event.version for event in await world.history(job_id)]
            assert versions == list(range(1, len(versions) + 1))


async def test_stop_brings_jobs_to_a_checkpoint(tmp_path: Path) -> None:
    """A graceful stop saves the cursor and queues the job; the next start goes on from there."""
    bench = Bench()
    async with World(tmp_path, bench.walker) as world:
        job_id = await world.start("walk")
        await bench.moved(5)
    at = bench.at
    async with World(tmp_path, bench.walker) as world:
        await bench.moved(2)
        assert bench.begun == [None, at] or bench.begun == [None, at - 1]
        job = await world.job(job_id)
        assert job.attempt == 1
        causes = [event.cause for event in await world.history(job_id)]
        assert causes[:4] == ["created", "claimed", "shutdown", "claimed"]


@pytest.mark.expects("no checkpoint")
async def test_stop_does_not_wait_for_the_deaf(tmp_path: Path) -> None:
    """A job that reaches no checkpoint in time is left to the recovery, without noise."""
    begun = 0

    async def deaf(ctx: Any, params: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            await asyncio.sleep(3600)

    async with World(tmp_path, a_kind("deaf", deaf), stop_s=0.05) as world:
        job_id = await world.start("deaf")
        await eventually(lambda: begun, "it runs")
    async with World(tmp_path, a_kind("deaf", deaf)) as world:
        await world.until(job_id, "succeeded")


async def test_stop_in_the_middle_of_starts(tmp_path: Path) -> None:
    """A stop while jobs are being claimed leaves none of them running on."""
    for turns in range(0, 24, 2):
        bench = Bench()
        async with World(tmp_path / str(turns), bench.walker) as world:
            ids = [await world.start("walk") for _ in range(3)]
            for _ in range(turns):
                await asyncio.sleep(0)
        assert not [p for p in world.runners._live.values() if not p.task.done()]
        async with World(tmp_path / str(turns), bench.walker) as world:
            bench.ending = "finish"
            for job_id in ids:
                await world.until(job_id, "succeeded")


# ---- When the state can't be written ----


@pytest.mark.expects("disk-full")
async def test_full_disk_of_the_state_loses_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no row can be written jobs end in vain; when there is room again, every end is kept."""
    bench = Bench()
    monkeypatch.setattr("jobs.manager._AGAIN_S", 0.02)
    monkeypatch.setattr("jobs.process._AGAIN_S", 0.02)
    limits = Limits(slots=2)
    async with World(tmp_path, bench.walker, limits=limits) as world:
        running = await world.start("walk", {"file": "out.txt"})
        await bench.moved(5)
        pausing = await world.start("walk")
        await world.until(pausing, "running")
        await eventually(lambda: len(bench.begun) == 2, "both run")
        queued = await world.start("walk")
        await world.tell(pausing, "pause")
        full, refused = True, 0
        write = world.state._write

        def refuse(*args: Any, **more: Any) -> Any:
            nonlocal refused
            if full:
                refused += 1
                raise SluiceError("disk-full")
            return write(*args, **more)

        monkeypatch.setattr(world.state, "_write", refuse)
        bench.ending = "finish"
        await eventually(lambda: refused >= 10, "it was tried again and again")
        full = False
        assert (await world.until(running, "succeeded")).artifacts[0].name == "out.txt"
        assert (await world.until(pausing, "paused", "succeeded")).error is None
        await world.until(queued, "succeeded")
        assert world.unfinished() == []
        if (await world.job(pausing)).state == "paused":
            await world.tell(pausing, "resume")
        await world.until(pausing, "succeeded")
        assert world.manager.running == 0


# ---- Races ----


@pytest.mark.expects("old lease")
async def test_commands_race_with_the_end(tmp_path: Path) -> None:
    """Whatever commands come while jobs end: one final state, a gapless history, no slot kept."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def short(ctx: Any, params: Any) -> None:
        for step in range(chance.randrange(4)):
            await ctx.checkpoint(step)
            await ctx.sleep(chance.random() * 0.003)

    async def tell(job_id: str, verb: str) -> None:
        try:
            await world.tell(job_id, verb)
        except SluiceError as error:
            assert error.code in REFUSALS, error

    async def annoy(job_id: str) -> None:
        for _ in range(chance.randrange(1, 6)):
            await asyncio.sleep(chance.random() * 0.004)
            await tell(job_id, chance.choice(["pause", "resume", "resume", "cancel"]))
        while (await world.job(job_id)).state not in FINAL:
            if (await world.job(job_id)).want == "pause":
                await tell(job_id, "resume")
            await asyncio.sleep(0.005)

    limits = Limits(slots=3)
    async with World(tmp_path, a_kind("short", short), limits=limits, warm_s=0.002) as world:
        ids = [await world.start("short") for _ in range(200 if FULL else 60)]
        await asyncio.gather(*(annoy(job_id) for job_id in ids))
        for job_id in ids:
            job = await world.until(job_id, *FINAL)
            history = await world.history(job_id)
            assert [event.version for event in history] == list(range(1, job.version + 1))
            assert [a.to for a in history[:-1]] == [b.from_ for b in history[1:]]
        assert world.unsound([await world.job(job_id) for job_id in ids]) == []
        assert world.manager.running == 0
        await eventually(lambda: not world.runners._live, "no frame is left")
        assert not world.manager._alarms
        assert not world.manager._waits and not world.manager._news


# ---- The CPU lane ----


class Burn(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Nothing to choose."""


async def burn(ctx: Any, params: Any) -> None:
    """Hash for ever, a short block between two checkpoints."""
    block = bytes(64 << 10)
    step = 0
    while True:
        hashlib.sha256(block).digest()
        step += 1
        await ctx.checkpoint(step, done=step)


async def test_lane_shares_the_loop(tmp_path: Path) -> None:
    """Eight jobs that only compute leave the loop responsive, share fairly, and pause at once."""
    async with World(tmp_path, a_kind("burn", burn, Params=Burn)) as world:
        ids = [await world.start("burn") for _ in range(8)]
        await eventually(lambda: len(world.runners._live) == 8, "all run")
        lags = []
        for _ in range(200):  # by the time that this process had: others may have had the CPU
            began = process_time()
            await asyncio.sleep(0.005)
            lags.append(process_time() - began - 0.005)
        p99 = sorted(lags)[197]
        assert p99 < 0.15, f"p99 {p99 * 1e3:.1f} ms"
        done = [process.meter.done for process in world.runners._live.values()]
        assert min(done) > 0.3 * max(done), done
        for job_id in ids[:3]:
            began = process_time()
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            assert process_time() - began < 1.0
        for job_id in ids:
            await world.tell(job_id, "cancel")


async def test_checkpoint_does_not_suspend_while_there_is_budget(tmp_path: Path) -> None:
    """A checkpoint with nothing to do returns before the loop turns, and costs microseconds."""
    turned: list[bool] = []
    rounds: list[tuple[float, bool]] = []

    async def quick(ctx: Any, params: Any) -> None:
        for _ in range(20):  # the CPU may be taken away in some of them
            await ctx.sleep(0)
            await ctx.sleep(0.001)
            turned.clear()
            asyncio.get_running_loop().call_soon(turned.append, True)
            began = perf_counter()
            for step in range(100):
                await ctx.checkpoint(step, done=step, total=100)
            rounds.append((perf_counter() - began, bool(turned)))

    async with World(tmp_path, a_kind("quick", quick)) as world:
        await world.until(await world.start("quick"), "succeeded")
        cost_s, has_turned = min(rounds)
        assert cost_s / 100 < 100e-6
        assert not has_turned


async def test_waiting_elsewhere_is_no_held_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kind that awaits something of its own between checkpoints is not accused of computing."""

    async def patient(ctx: Any, params: Any) -> None:
        for step in range(3):
            await asyncio.sleep(0.05)
            await ctx.checkpoint(step)

    async with World(tmp_path, a_kind("patient", patient)) as world:
        await world.until(await world.start("patient"), "succeeded")
    assert len(caplog.messages) < 3  # each step of the job waits; a busy machine may add one


# ---- Everything at once ----


class Steered:
    """A kind whose every job is told by the machine how to end; it remembers what it did."""

    def __init__(self) -> None:
        self.endings: dict[str, str] = {}
        self.undone: dict[str, list[int]] = {}

    async def take_back(self, job: str, step: int) -> None:
        """The undo of a step."""
        await asyncio.sleep(0)
        self.undone.setdefault(job, []).append(step)

    async def run(self, ctx: Any, params: Steps) -> dict[str, Any]:
        """Steps with a line each, until told to end."""
        step = ctx.cursor or 0
        file = await ctx.artifact("lines.txt") if params.file else None
        while (ending := self.endings.get(ctx.job_id)) is None:
            await ctx.checkpoint(step, done=step)
            if step < params.undo:
                await ctx.undo("take_back", job=ctx.job_id, step=step)
            if file is not None:
                await file.write(b"%d\n" % step)
            await ctx.sleep(0.0005)
            step += 1
        if ending == "fail once":
            self.endings[ctx.job_id] = "finish"
        if ending != "finish":
            raise SluiceError("kind-failed", "as asked")
        return {"counted": step}

    @property
    def kind(self) -> Kind:
        """The kind."""
        return a_kind(
            "steered",
            self.run,
            Params=Steps,
            UNDO={"take_back": self.take_back},
            RETRY=Retry(times=1, base_s=0.001),
        )


class ManagerMachine(RuleBasedStateMachine):
    """Any commands, ends and crashes in any order."""

    folder: Path
    numbers = iter(range(10**9))

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.noise: list[str] = []
        self.runner.get_loop().set_exception_handler(
            lambda _, context: self.noise.append(str(context))
        )
        self.steered = Steered()
        self.jobs: list[str] = []
        self.deleted: set[str] = set()
        self.world: World | None = None

    def pick(self, n: int) -> str:
        """A job by a number that does not depend on what has become of the others."""
        return self.jobs[n % len(self.jobs)]

    def do(self, work: Awaitable[Any]) -> Any:
        """Run something on the loop."""

        async def limited() -> Any:
            return await asyncio.wait_for(work, 300)

        return self.runner.run(limited())

    @initialize(
        warm_s=st.sampled_from([0.0, 0.002, 30.0]),
        slots=st.integers(1, 3),
        of_kind=st.sampled_from([{}, {"steered": 1}]),
        of_owner=st.integers(0, 2),
        queued=st.sampled_from([4, 1000]),
    )
    def begin(
        self, warm_s: float, slots: int, of_kind: dict[str, int], of_owner: int, queued: int
    ) -> None:
        """A new folder."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        limits = Limits(slots=slots, max_queued=queued, owner_slots=of_owner, kind_limits=of_kind)
        self.world = World(folder, self.steered.kind, warm_s=warm_s, limits=limits)
        self.do(self.world.open())

    @rule(
        undo=st.integers(0, 3),
        file=st.booleans(),
        after=st.lists(st.integers(0, 20), max_size=2),
        on=st.sampled_from(["success", "any"]),
    )
    def start(self, undo: int, file: bool, after: list[int], on: str) -> None:
        """One more job, perhaps after others; refused if one of those is gone, or all wait."""
        assert self.world is not None
        params = {"undo": undo, "file": "lines.txt" if file else ""}
        parents = [self.pick(n) for n in after] if self.jobs else []
        try:
            job_id = self.do(self.world.start("steered", params, after=parents, on=on))
        except SluiceError as error:
            if error.code == "queue-full":
                # By the time that it is looked at, some may have been given slots.
                limits = self.world.limits
                assert self._waiting() >= limits.max_queued - limits.slots
            else:
                assert (error.field, self.deleted.isdisjoint(parents)) == ("after", False)
            return
        self.jobs.append(job_id)

    def _waiting(self) -> int:
        """How many jobs wait."""
        assert self.world is not None
        return sum(self.do(self.world.state.waiting()).values())

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 20), verb=st.sampled_from(["pause", "resume", "cancel"]))
    def command(self, pick: int, verb: str) -> None:
        """A command to any job; a refusal names a reason."""
        assert self.world is not None
        job_id = self.pick(pick)
        try:
            state, status = self.do(self.world.tell(job_id, verb))
        except SluiceError as error:
            assert error.code in REFUSALS, error
            return
        assert status in (200, 202)
        assert state

    @precondition(lambda self: self.jobs)
    @rule(
        pick=st.integers(0, 20), ending=st.sampled_from(["finish", "finish", "fail", "fail once"])
    )
    def end(self, pick: int, ending: str) -> None:
        """Let a job end when it next can."""
        self.steered.endings.setdefault(self.pick(pick), ending)

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 20))
    def retry(self, pick: int) -> None:
        """Try again what has ended."""
        assert self.world is not None
        job_id = self.pick(pick)
        try:
            again = self.do(self.world.manager.retry(job_id, owner=OWNER, by=self.world.by()))
        except SluiceError as error:
            assert error.code in ("job-live", "job-unknown", "queue-full"), error
            return
        self.jobs.append(again.id)

    @precondition(lambda self: self.jobs)
    @rule(pick=st.integers(0, 20))
    def delete(self, pick: int) -> None:
        """Forget what has ended."""
        assert self.world is not None
        job_id = self.pick(pick)
        try:
            self.do(self.world.manager.delete(job_id, owner=OWNER, by=self.world.by()))
        except SluiceError as error:
            assert error.code in ("job-live", "job-unknown"), error
            return
        self.deleted.add(job_id)

    @rule(turns=st.sampled_from([1, 2, 5, 20]))
    def turn(self, turns: int) -> None:
        """Let the loop turn some times."""

        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.do(some())

    @rule()
    def wait(self) -> None:
        """Let some steps be made."""
        self.do(asyncio.sleep(0.004))

    @rule()
    def save(self) -> None:
        """The tick that saves."""
        assert self.world is not None
        self.do(self.world.runners.save())

    @rule()
    def crash(self) -> None:
        """kill -9 and a new start."""
        assert self.world is not None
        self.do(self.world.restart())

    @rule()
    def restart(self) -> None:
        """A graceful stop and a new start."""
        assert self.world is not None
        self.do(self.world.close())
        self.do(self.world.open())

    @invariant()
    def everything_is_sound(self) -> None:
        """Rows, slots and histories hold after every step."""
        if self.world is None:
            return
        assert self.noise == []
        self.do(self._check(self.world))

    async def _check(self, world: World) -> None:
        """One look: none of these calls lets the loop turn."""
        jobs = [await world.job(job_id) for job_id in self.jobs if job_id not in self.deleted]
        assert world.unsound(jobs) == []
        for job in jobs:
            history = await world.history(job.id)
            assert [event.version for event in history] == list(range(1, job.version + 1))
            assert [a.to for a in history[:-1]] == [b.from_ for b in history[1:]]
            assert history[-1].to == job.state

    def teardown(self) -> None:
        """Everything can be driven to an end, and nothing is left over."""
        try:
            if self.world is not None and not self.world.state.dead:
                try:
                    self.do(self._drive(self.world))
                finally:
                    self.do(self.world.close())
        finally:
            self.runner.close()
        assert self.noise == []

    async def _drive(self, world: World) -> None:
        jobs = [job_id for job_id in self.jobs if job_id not in self.deleted]
        for job_id in jobs:
            self.steered.endings.setdefault(job_id, "finish")
            if (await world.job(job_id)).state in ("paused", "pausing"):
                with suppress(SluiceError):  # it may just end
                    await world.tell(job_id, "resume")
        for job_id in jobs:
            job = await world.until(job_id, *FINAL)
            if job.reason == "after":
                assert job.started_at is None
                assert job.error is not None
            if job.state != "succeeded":
                # Each at least once, the first one last; twice after a crash that lost the cursor.
                undone = self.steered.undone.get(job_id, [])
                assert undone[-1:] in ([], [0]), undone
                assert set(undone) == set(range(max(undone, default=-1) + 1)), undone
                assert not job.undo
            elif job.params["file"]:
                assert job.result is not None
                counted = job.result.data["counted"]
                content = world.published()[f"{job.artifacts[0].file}/lines.txt"]
                assert content == b"".join(b"%d\n" % i for i in range(counted))
        await eventually(lambda: not world.runners._live, "no frame is left")
        await eventually(lambda: world.unfinished() == [], "tmp/ is empty")
        await eventually(lambda: world.manager.running == 0, "no slot is held")
        assert not world.manager._waiting
        assert world.state._con.execute("SELECT * FROM waits").fetchall() == []
        assert not world.manager._active
        assert not world.manager._alarms
        assert not world.manager._rollbacks


@pytest.mark.expects("old lease", "lost its lease")
def test_any_order_of_commands_ends_and_crashes(tmp_path: Path) -> None:
    """Rows, slots, history, files and journals are sound whatever happens in whatever order."""
    ManagerMachine.folder = tmp_path
    run_state_machine_as_test(
        ManagerMachine,
        settings=settings(
            max_examples=300 if FULL else 15,
            stateful_step_count=60 if FULL else 30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
