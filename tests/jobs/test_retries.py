"""Failures that may pass are tried again; what runs or is silent for too long is ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs.clock
import jobs.process
import jobs.runners
from errors import SluiceError
from jobs import states
from jobs.clock import Clock
from jobs.files import now_ms
from jobs.kinds import Retry
from jobs.manager import Limits
from jobs.states import Facts, Input
from tests.jobs.test_states import NOW, job_in
from tests.jobs.world import OWNER, World, a_kind, eventually

SOON = Retry(times=2, base_s=0.02, factor=2, max_s=1, jitter=0)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Failures here are meant."""
    caplog.set_level(logging.CRITICAL, "sluice")
    yield


class Trial:
    """A kind that fails as often as it shall, at its third step."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures = failures
        self.error = error or RuntimeError("as asked")
        self.cursors: list[Any] = []
        self.undone: list[int] = []

    async def take_back(self, step: int) -> None:
        """The undo of a step."""
        self.undone.append(step)

    async def run(self, ctx: Any, params: Any) -> dict[str, Any]:
        """Three steps from the cursor, each written down; then the failure, or three more."""
        self.cursors.append(ctx.cursor)
        file = await ctx.artifact("steps.txt")
        for step in range(ctx.cursor or 0, 6):
            if step == 3 and self.failures > 0:
                self.failures -= 1
                raise self.error
            await ctx.undo("take_back", step=step)
            await file.write(b"%d\n" % step)
            await ctx.checkpoint(step + 1, done=step + 1, total=6)
        return {"attempt": ctx.attempt}

    def kind(self, **more: Any) -> Any:
        """The kind ``trial``."""
        fields = {"UNDO": {"take_back": self.take_back}, "RETRY": SOON} | more
        return a_kind("trial", self.run, **fields)


async def test_a_failure_that_may_pass_is_tried_again(tmp_path: Path) -> None:
    """It goes on from its cursor after the wait, and the timeline tells each failure."""
    trial = Trial(2)
    async with World(tmp_path, trial.kind()) as world:
        job_id = await world.start("trial")
        job = await world.until(job_id, "succeeded")
        assert (job.attempt, job.retries, job.result and job.result.data) == (3, 2, {"attempt": 3})
        assert trial.cursors == [None, 3, 3]
        assert trial.undone == []
        assert list(world.published().values()) == [b"0\n1\n2\n3\n4\n5\n"]
        history = await world.history(job_id)
        waits = [event for event in history if event.to == "scheduled"]
        assert [event.cause for event in waits] == ["error", "error"]
        assert [b'"why":"backoff"' in bytes(event.row) for event in waits] == [True, True]
        assert [event.cause for event in history].count("due") == 2
        lines = [line for _, _, line in await world.manager.lines(job_id, OWNER, 0, 99)]
        assert sum("It is tried again at 20" in line for line in lines) == 2


async def test_when_retries_are_used_up_the_journal_runs(tmp_path: Path) -> None:
    """Only then: before, nothing is taken back."""
    trial = Trial(99)
    async with World(tmp_path, trial.kind()) as world:
        job = await world.until(await world.start("trial"), "failed")
        assert (job.attempt, len(trial.cursors)) == (3, 3)
        assert job.error is not None
        assert job.error["code"] == "kind-failed"
        assert trial.undone == [2, 1, 0]
        assert (world.published(), world.unfinished()) == ({}, [])


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (SluiceError("invalid-data", "row 7"), 1),
        (SluiceError("storage-failed", "the disk"), 3),
        (ValueError("anything"), 3),
    ],
)
async def test_only_what_may_pass(tmp_path: Path, error: Exception, attempts: int) -> None:
    """An error whose code says that a retry can't help ends the job at once."""
    trial = Trial(99, error)
    async with World(tmp_path, trial.kind()) as world:
        job = await world.until(await world.start("trial"), "failed")
        assert job.attempt == attempts


async def test_no_retry_unless_the_kind_says_so(tmp_path: Path) -> None:
    """The default is none."""
    trial = Trial(1)
    async with World(tmp_path, trial.kind(RETRY=None)) as world:
        assert (await world.until(await world.start("trial"), "failed")).attempt == 1


async def test_the_slot_is_free_during_the_wait(tmp_path: Path) -> None:
    """And a pause, a resume and a cancel work in it."""
    trial = Trial(1)
    kind = trial.kind(RETRY=Retry(times=1, base_s=3600, max_s=3600, jitter=0))

    async def once(ctx: Any, params: Any) -> None:
        """End at once."""

    limits = Limits(slots=1)
    async with World(tmp_path, kind, a_kind("once", once), limits=limits) as world:
        job_id = await world.start("trial")
        job = await world.until(job_id, "scheduled")
        assert job.not_before is not None
        assert 3_590_000 < job.not_before - now_ms() < 3_601_000
        await world.until(await world.start("once"), "succeeded")
        assert await world.tell(job_id, "pause") == ("paused", 200)
        assert await world.tell(job_id, "resume") == ("scheduled", 202)
        await world.tell(job_id, "cancel")
        await world.until(job_id, "cancelled")
        assert trial.undone == [2, 1, 0]


async def test_a_crash_uses_no_retry(tmp_path: Path) -> None:
    """Attempts count crashes, retries do not."""
    trial = Trial(0)
    hold = asyncio.Event()

    async def run(ctx: Any, params: Any) -> Any:
        """As the trial, once it may."""
        await ctx.checkpoint(ctx.cursor)
        while not hold.is_set():
            await ctx.sleep(0.002)
        return await trial.run(ctx, params)

    kind = a_kind("trial", run, UNDO={"take_back": trial.take_back}, RETRY=SOON)
    async with World(tmp_path, kind) as world:
        job_id = await world.start("trial")
        for _ in range(3):
            await world.until(job_id, "running")
            await world.restart()
        trial.failures = 2
        hold.set()
        job = await world.until(job_id, "succeeded")
        assert (job.attempt, job.retries) == (6, 2)


@pytest.mark.parametrize("undo", [False, True])
async def test_a_crash_loop_ends(
    tmp_path: Path, undo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One crash too many without progress fails the job, after its journal has run."""
    monkeypatch.setattr(states, "_LOOP", 10)
    undone = []
    begun = asyncio.Event()

    async def take_back() -> None:
        undone.append(1)

    async def run(ctx: Any, params: Any) -> None:
        """Never end."""
        if undo and ctx.attempt == 1:
            await ctx.undo("take_back")
        await ctx.checkpoint(1)
        begun.set()
        await ctx.sleep(3600)

    kind = a_kind("killer", run, UNDO={"take_back": take_back})
    async with World(tmp_path, kind) as world:
        job_id = await world.start("killer")
        for _ in range(10):
            await begun.wait()
            begun.clear()
            await world.restart()
        assert (await world.until(job_id, "running")).attempt == 11
        await world.restart()
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert (job.error["code"], undone) == ("crash-loop", [1] if undo else [])


async def test_crashes_of_a_job_that_comes_further_do_not_count(tmp_path: Path) -> None:
    """A job that gets on between the crashes is not what the server dies of."""

    async def run(ctx: Any, params: Any) -> None:
        """A step in each attempt."""
        await ctx.checkpoint(1, done=ctx.attempt, total=15)
        if ctx.attempt < 15:
            await ctx.sleep(60)

    async with World(tmp_path, a_kind("steady", run)) as world:
        job_id = await world.start("steady")
        for attempt in range(1, 15):
            await eventually(lambda: meter_at(world, job_id, attempt), "its step")  # noqa: B023
            await world.runners.save()
            await world.restart()
        assert (await world.until(job_id, "succeeded")).attempt == 15


def meter_at(world: World, job_id: str, done: int) -> bool:
    """Whether the job is so far."""
    process = world.runners._live.get(job_id)
    return process is not None and process.meter.done >= done


async def test_who_gets_on_survives_any_number_of_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the service lives too short for the save of each second."""
    monkeypatch.setattr(jobs.runners, "_EARLY_S", 0.01)

    async def run(ctx: Any, params: Any) -> None:
        """Step by step."""
        step = ctx.cursor or 0
        while True:
            step += 1
            await ctx.checkpoint(step, done=step)
            await ctx.sleep(0.001)

    async with World(tmp_path, a_kind("gets-on", run)) as world:
        job_id = await world.start("gets-on")
        for _ in range(15):
            await world.until(job_id, "running")
            before = (await world.job(job_id)).progress.done
            if (await world.job(job_id)).crashes:
                while (await world.job(job_id)).progress.done <= before:
                    await asyncio.sleep(0.002)
            await world.restart()
        assert (await world.until(job_id, "running")).attempt == 16


async def test_crashes_long_ago_do_not_count(tmp_path: Path) -> None:
    """Five in a week are bad luck."""
    old = tuple(NOW - 600_000 - i for i in range(20))
    job = msgspec.structs.replace(job_in("running"), crashes=(*old, NOW - 1))
    decision = states.decide(job, Input.CRASH, Facts(now=NOW))
    assert decision is not None
    assert (decision.job.state, decision.job.crashes) == ("queued", (NOW - 1, NOW))


async def test_progress_never_goes_back_whatever_the_job_goes_through(tmp_path: Path) -> None:
    """Phases, pauses, crashes, retries, older cursors: each row of the history is no less far."""
    failures = [3, 7, 12]
    steps, over = 0, False

    async def run(ctx: Any, params: Any) -> None:
        """Two phases that count for themselves; the cursor is only each fifth step."""
        nonlocal steps, over
        for phase in ("one", "two"):
            for step in range(10):
                at = step + 10 * (phase == "two")
                cursor = at // 5 * 5
                if at < (ctx.cursor or 0):
                    continue
                await ctx.checkpoint(cursor, done=step, total=10, phase=phase)
                steps += 1
                await ctx.sleep(0.004)
                if failures and at == failures[0]:
                    failures.pop(0)
                    raise RuntimeError("as asked")
        over = True

    kind = a_kind("phases", run, RETRY=Retry(times=9, base_s=0.01, max_s=0.01))
    async with World(tmp_path, kind, warm_s=0) as world:
        job_id = await world.start("phases")
        for _ in range(4):
            if (await world.until(job_id, "running", "succeeded")).state == "succeeded":
                break
            goal = steps + 3
            await eventually(lambda: over or steps >= goal, "it gets on")  # noqa: B023
            with suppress(SluiceError):
                await world.tell(job_id, "pause")
            await world.until(job_id, "paused", "succeeded")
            await world.restart()
            with suppress(SluiceError):
                await world.tell(job_id, "resume")
        await world.until(job_id, "succeeded")
        rows = [msgspec.json.decode(event.row) for event in await world.history(job_id)]
        progress = [(row["progress"]["done"], row["progress"]["total"]) for row in rows]
        dones = [done for done, _ in progress]
        assert dones == sorted(dones)
        assert all(total is None or done <= total for done, total in progress)
        assert progress[-1] == (10, 10)
        assert not failures


async def test_a_crash_in_the_middle_of_a_rollback(tmp_path: Path) -> None:
    """Each entry is undone at least once, the last ones first; the count goes on over crashes."""
    undone: list[int] = []
    hold: list[int] = [25, 15, 5]
    stuck = asyncio.Event()

    async def take_back(step: int) -> None:
        if hold and step == hold[0]:
            hold.pop(0)
            stuck.set()
            await asyncio.Event().wait()
        if step == 20:
            raise RuntimeError("as asked")
        undone.append(step)

    async def run(ctx: Any, params: Any) -> None:
        for step in range(30):
            await ctx.undo("take_back", step=step)
        while True:
            await ctx.checkpoint(1)
            await ctx.sleep(0.002)

    async with World(tmp_path, a_kind("undoes", run, UNDO={"take_back": take_back})) as world:
        job_id = await world.start("undoes")
        await eventually(lambda: world.runners._live, "it has begun")
        while len((await world.job(job_id)).undo) < 30:
            await asyncio.sleep(0.002)
        await world.tell(job_id, "cancel")
        for left in (26, 16, 6):
            await stuck.wait()
            stuck.clear()
            assert len((await world.job(job_id)).undo) == left
            await world.restart()
        job = await world.until(job_id, "cancelled")
        assert sorted(set(undone)) == [step for step in range(30) if step != 20]
        assert undone == sorted(undone, reverse=True)
        assert job.rollback is not None
        assert (job.rollback.done, job.rollback.total, job.rollback.failed) == (30, 30, 1)


# ---- Clocks ----


async def walks(ctx: Any, params: Any) -> None:
    """Checkpoints for ever."""
    while True:
        await ctx.checkpoint(1)
        await ctx.sleep(0.005)


async def hangs(ctx: Any, params: Any) -> None:
    """One checkpoint, then nothing."""
    await ctx.checkpoint(1)
    await asyncio.Event().wait()


async def test_a_job_runs_for_so_long(tmp_path: Path) -> None:
    """Then it fails, whatever it does."""
    async with World(tmp_path, a_kind("walks", walks, RUN_TIMEOUT_S=0.15)) as world:
        began = monotonic()
        job = await world.until(await world.start("walks"), "failed")
        assert monotonic() - began >= 0.15
        assert job.error is not None
        assert job.error["code"] == "timeout"
        assert world.manager.running == 0


async def test_a_setting_comes_before_the_kind(tmp_path: Path) -> None:
    """For both clocks, also where the kind has none."""
    kinds = (a_kind("walks", walks, RUN_TIMEOUT_S=3600), a_kind("hangs", hangs))
    limits = Limits(run_timeouts_s={"walks": 0.05}, stall_timeouts_s={"hangs": 0.05})
    async with World(tmp_path, *kinds, limits=limits) as world:
        for kind, code in (("walks", "timeout"), ("hangs", "stalled")):
            job = await world.until(await world.start(kind), "failed")
            assert job.error is not None
            assert job.error["code"] == code


async def test_what_hangs_is_ended(tmp_path: Path) -> None:
    """No checkpoint for too long: it fails though it never comes to one, and runs its journal."""
    undone = []

    async def take_back() -> None:
        undone.append(1)

    async def run(ctx: Any, params: Any) -> None:
        await ctx.undo("take_back")
        await hangs(ctx, params)

    kind = a_kind("hangs", run, STALL_TIMEOUT_S=0.5, UNDO={"take_back": take_back})
    async with World(tmp_path, kind) as world:
        job = await world.until(await world.start("hangs"), "failed")
        assert job.error is not None
        assert (job.error["code"], undone) == ("stalled", [1])


async def test_what_hangs_may_be_tried_again(tmp_path: Path) -> None:
    """A stall may pass; a job over its time gets no other one."""
    stalls = a_kind("stalls", hangs, STALL_TIMEOUT_S=0.05, RETRY=SOON)
    late = a_kind("late", walks, RUN_TIMEOUT_S=0.05, RETRY=SOON)
    async with World(tmp_path, stalls, late) as world:
        stalled, timeout = await world.start("stalls"), await world.start("late")
        assert (await world.until(stalled, "failed")).attempt == 3
        assert (await world.until(timeout, "failed")).attempt == 1


async def test_who_sleeps_is_not_silent(tmp_path: Path) -> None:
    """ctx.sleep is a wait that the job has declared."""

    async def run(ctx: Any, params: Any) -> None:
        await ctx.sleep(0.4)

    async with World(tmp_path, a_kind("sleeps", run, STALL_TIMEOUT_S=0.1)) as world:
        await world.until(await world.start("sleeps"), "succeeded")


class Paces:
    """A kind whose steps take 0.1 s each by the clock that jobs are measured with, and by no other.

    So how far a job gets does not hang on the machine. It may run for 10 s, which are 100 steps,
    and a few more until the clock is looked at.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.steps = 0
        patch.setattr(jobs.clock, "monotonic", lambda: self.now_s)

    async def run(self, ctx: Any, params: Any) -> None:
        """Checkpoints for ever."""
        while True:
            self.steps += 1
            self.now_s += 0.1
            await ctx.checkpoint(1)
            await ctx.sleep(0.002)

    @property
    def kind(self) -> Any:
        """The kind ``paces``; because it must not be silent it is looked at each 20 ms at least."""
        return a_kind("paces", self.run, RUN_TIMEOUT_S=10, STALL_TIMEOUT_S=0.16)


@pytest.mark.parametrize("warm_s", [0, 30])
async def test_a_pause_stops_both_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_s: float
) -> None:
    """Warm or cold; what it had run before counts afterwards."""
    paces = Paces(monkeypatch)
    async with World(tmp_path, paces.kind, warm_s=warm_s) as world:
        job_id = await world.start("paces")
        await eventually(lambda: paces.steps >= 60, "it is past the half")
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        paces.now_s += 3600
        await asyncio.sleep(0.1)  # nothing happens
        assert (await world.job(job_id)).state == "paused"
        await world.tell(job_id, "resume")
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert job.error["code"] == "timeout"
        assert 100 <= paces.steps < 160


async def test_what_it_has_run_outlives_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart gives no new time, but for what was not saved."""
    paces = Paces(monkeypatch)
    async with World(tmp_path, paces.kind) as world:
        job_id = await world.start("paces")
        await eventually(lambda: paces.steps >= 60, "it is past the half")
        await world.runners.save()
        await world.restart()
        paces.steps = 0
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert job.error["code"] == "timeout"
        assert paces.steps < 100


async def test_a_frame_that_does_not_end_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that swallows its end has failed all the same; its slot and its journal are free."""
    monkeypatch.setattr(jobs.process, "_LATE_S", 0.05)
    let_go = asyncio.Event()
    undone = []

    async def take_back() -> None:
        undone.append(1)

    async def run(ctx: Any, params: Any) -> None:
        await ctx.undo("take_back")
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    kind = a_kind("deaf", run, RUN_TIMEOUT_S=0.05, UNDO={"take_back": take_back})
    async with World(tmp_path, kind) as world:
        job_id = await world.start("deaf")
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert (job.error["code"], undone, world.manager.running) == ("timeout", [1], 0)
        let_go.set()
        await eventually(lambda: not world.runners._live, "the frame has ended")
        assert (await world.job(job_id)).state == "failed"


async def test_a_clock_that_is_closed_says_nothing() -> None:
    """A job that has ended, or is held, is never late."""
    told: list[SluiceError] = []
    for run_s, stall_s, code in ((0.01, None, "timeout"), (None, 0.01, "stalled")):
        clock = Clock(run_s, stall_s, 0.0, lambda: False, told.append)
        clock.hold()
        ran_s = clock.ran_s
        await asyncio.sleep(0.06)
        assert (told, clock.ran_s) == ([], ran_s)
        clock.go()
        await eventually(lambda: told, "it is late")
        assert told.pop().code == code


@given(
    times=st.integers(0, 10),
    base_s=st.floats(0.001, 100),
    factor=st.floats(0.1, 10),
    max_s=st.floats(0.001, 1e6),
    jitter=st.floats(0, 1),
    chance=st.floats(0, 1),
)
def test_waits_are_bounded(
    times: int, base_s: float, factor: float, max_s: float, jitter: float, chance: float
) -> None:
    """So many waits, none longer than the longest, none shorter than chance may make it."""
    retry = Retry(times, base_s, factor, max_s, jitter)
    waits = [retry.delay_s(n, chance) for n in range(times + 2)]
    assert waits[times:] == [None, None]
    for n, wait_s in enumerate(waits[:times]):
        assert wait_s is not None
        full_s = min(max_s, base_s * factor**n)
        assert full_s * (1 - jitter) * 0.999 <= wait_s <= full_s
