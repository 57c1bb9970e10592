"""The whole manager under anything: every sort of kind, command, crash and full queue, mixed.

The machine of test_manager.py knows one kind and looks closely at it; this one mixes kinds that
are quick, deaf, fickle, limited, chained to others, or children that are slow or die, and looks for
what is stuck or left over.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from pathlib import Path
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
from jobs.kinds import Kind, Retry, load_kind
from jobs.manager import Limits
from jobs.states import FINAL
from jobs.warden import mark_of, processes
from storage import Job
from tests.harness import FULL
from tests.jobs.world import HOLDING, OWNER, World, a_kind, eventually

MORTAL = load_kind(("file", str(Path(__file__).with_name("child_kinds") / "mortal.py")), "mortal")
OTHER = "bob"
OWNERS = (OWNER, OTHER)
SOON = Retry(times=2, base_s=0.004, factor=2, max_s=1, jitter=0)
MOST_CHILDREN = 2  # in one example: each takes as long to start as all else together


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An error in the log fails the test: each failure here is one that a kind has told."""
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.levelno >= logging.ERROR] == []


class Work(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a job does at its first steps."""

    undo: int = 0
    file: bool = False
    failures: int = 0


class Crew:
    """Kinds whose jobs are told by the machine how to end; what they have done outlives a crash."""

    def __init__(self) -> None:
        self.endings: dict[str, str] = {}
        self.undone: dict[str, list[int]] = {}
        self.failed: Counter[str] = Counter()
        self.begun: set[str] = set()

    async def take_back(self, job: str, step: int) -> None:
        """The undo of a step."""
        await asyncio.sleep(0)
        self.undone.setdefault(job, []).append(step)

    async def work(self, ctx: Any, params: Work) -> dict[str, Any]:
        """Steps with a line each, until told to end."""
        self.begun.add(ctx.job_id)
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
        if ending == "fail":
            raise SluiceError("invalid-data", "as asked")
        return {"counted": step}

    async def fickle(self, ctx: Any, params: Work) -> dict[str, Any]:
        """Fail some times by what may pass."""
        self.begun.add(ctx.job_id)
        for step in range(ctx.cursor or 0, 3):
            if step < params.undo:
                await ctx.undo("take_back", job=ctx.job_id, step=step)
            await ctx.checkpoint(step + 1, done=step + 1)
            await ctx.sleep(0.0005)
        if self.failed[ctx.job_id] < params.failures:
            self.failed[ctx.job_id] += 1
            raise SluiceError("storage-failed", "as asked")
        return {}

    async def quick(self, ctx: Any, params: Work) -> None:
        """End at once."""
        self.begun.add(ctx.job_id)
        await ctx.checkpoint(1)

    async def deaf(self, ctx: Any, params: Work) -> None:
        """Reach no checkpoint until told to end; only force stops it before."""
        self.begun.add(ctx.job_id)
        while ctx.job_id not in self.endings:
            await asyncio.sleep(0.001)
        await ctx.checkpoint(1)

    @property
    def kinds(self) -> list[Kind]:
        """All of them."""
        more: dict[str, Any] = {"Params": Work, "UNDO": {"take_back": self.take_back}}
        return [
            a_kind("work", self.work, **more),
            a_kind("fickle", self.fickle, RETRY=SOON, **more),
            a_kind("quick", self.quick, **more),
            a_kind("deaf", self.deaf, **more),
            a_kind("limited", self.work, LIMIT=1, **more),
            MORTAL,
        ]


class WholeMachine(RuleBasedStateMachine):
    """Any job, any command, any end, in any order."""

    folder: Path
    numbers = iter(range(10**9))

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.noise: list[str] = []
        self.runner.get_loop().set_exception_handler(
            lambda _, context: self.noise.append(str(context))
        )
        self.crew = Crew()
        self.owners: dict[str, str] = {}  # of all jobs, in the order of their start
        self.gone: set[str] = set()
        self.children = 0
        self.world: World | None = None

    def do(self, work: Awaitable[Any]) -> Any:
        """Run something on the loop."""

        async def limited() -> Any:
            return await asyncio.wait_for(work, 300)

        return self.runner.run(limited())

    def attempt(self, work: Awaitable[Any], *codes: str) -> Any:
        """Run what may be refused for these reasons."""
        try:
            return self.do(work)
        except SluiceError as error:
            assert error.code in codes, error
            return None

    def pick(self, n: int) -> tuple[str, str]:
        """A job and its owner, by a number that depends on nothing that happens to others."""
        return list(self.owners.items())[n % len(self.owners)]

    @initialize(
        warm_s=st.sampled_from([0.0, 0.002, 30.0]),
        slots=st.integers(1, 4),
        owner_slots=st.sampled_from([0, 1]),
        max_queued=st.sampled_from([2, 6, 100]),
    )
    def begin(self, warm_s: float, slots: int, owner_slots: int, max_queued: int) -> None:
        """A new folder."""
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        limits = Limits(
            slots=slots,
            owner_slots=owner_slots,
            max_queued=max_queued,
            warn_s=0.05,
            grace_s=0.1,
        )
        self.world = World(
            folder,
            *self.crew.kinds,
            warm_s=warm_s,
            limits=limits,
            stop_s=0.5,  # a deaf job makes each stop last as long as it may
            child_grace_s=0.2,
        )
        self.do(self.world.open())

    # What people do

    def _start(self, kind: str, params: dict[str, Any], owner: str, **more: Any) -> None:
        assert self.world is not None
        starting = self.world.start(kind, params, owner=owner, **more)
        if job_id := self.attempt(starting, "queue-full", "invalid-field"):
            self.owners[job_id] = owner

    @rule(
        kind=st.sampled_from(["work", "work", "fickle", "quick", "deaf", "limited"]),
        undo=st.integers(0, 3),
        file=st.booleans(),
        failures=st.integers(0, 4),
        priority=st.integers(0, 9),
        owner=st.sampled_from(OWNERS),
    )
    def start(
        self, kind: str, undo: int, file: bool, failures: int, priority: int, owner: str
    ) -> None:
        """One more job, unless the queue is full."""
        params = {"undo": undo, "file": file, "failures": failures}
        self._start(kind, params, owner, priority=priority)

    @precondition(lambda self: self.children < MOST_CHILDREN)
    @rule(dies_at=st.sampled_from([None, 0, 2]), busy_s=st.sampled_from([0.0, 0.03]))
    def start_child(self, dies_at: int | None, busy_s: float) -> None:
        """One that runs in a child, which may die or be slow."""
        self.children += 1
        self._start("mortal", {"dies_at": dies_at, "busy_s": busy_s}, OWNER)

    @precondition(lambda self: self.owners)
    @rule(
        picks=st.lists(st.integers(0, 20), min_size=1, max_size=3),
        on=st.sampled_from(["success", "any"]),
        kind=st.sampled_from(["quick", "work"]),
    )
    def chain(self, picks: list[int], on: str, kind: str) -> None:
        """One that waits for others of the same owner."""
        owner = self.pick(picks[0])[1]
        parents = [job for job, whose in map(self.pick, picks) if whose == owner]
        self._start(kind, {"undo": 1}, owner, after=parents, on=on)

    @precondition(lambda self: self.owners)
    @rule(
        pick=st.integers(0, 20),
        verb=st.sampled_from(["pause", "pause", "resume", "resume", "cancel", "force"]),
    )
    def command(self, pick: int, verb: str) -> None:
        """A command to any job."""
        assert self.world is not None
        job_id, owner = self.pick(pick)
        force = verb == "force"
        telling = self.world.manager.command(
            job_id, "cancel" if force else verb, owner=owner, by=self.world.by(), force=force
        )
        self.attempt(telling, "job-finished", "job-cancelling", "job-unknown")

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 20), priority=st.integers(0, 9))
    def change(self, pick: int, priority: int) -> None:
        """Another place in the queue."""
        assert self.world is not None
        job_id, owner = self.pick(pick)
        changing = self.world.manager.change(
            job_id, owner=owner, by=self.world.by(), priority=priority
        )
        self.attempt(changing, "job-finished", "job-unknown")

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 20))
    def retry(self, pick: int) -> None:
        """Try again what has ended."""
        assert self.world is not None
        job_id, owner = self.pick(pick)
        retrying = self.world.manager.retry(job_id, owner=owner, by=self.world.by())
        if again := self.attempt(retrying, "job-live", "job-unknown", "queue-full"):
            self.owners[again.id] = owner

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 20))
    def delete(self, pick: int) -> None:
        """Forget what has ended."""
        assert self.world is not None
        job_id, owner = self.pick(pick)

        async def deleting() -> bool:
            assert self.world is not None
            await self.world.manager.delete(job_id, owner=owner, by=self.world.by())
            return True

        if self.attempt(deleting(), "job-live", "job-unknown"):
            self.gone.add(job_id)

    # What happens

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 20), ending=st.sampled_from(["finish", "finish", "fail"]))
    def end(self, pick: int, ending: str) -> None:
        """Let a job end when it next can."""
        self.crew.endings.setdefault(self.pick(pick)[0], ending)

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.002, 0.01]))
    def wait(self, seconds: float) -> None:
        """Let some steps be made."""
        self.do(asyncio.sleep(seconds))

    @precondition(lambda self: self.children)
    @rule()
    def wait_for_child(self) -> None:
        """Long enough for a child to have started."""
        self.do(asyncio.sleep(0.2))

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

    # What must hold

    @invariant()
    def everything_is_sound(self) -> None:
        """Rows, slots and histories hold after every step."""
        if self.world is None:
            return
        assert self.noise == []
        self.do(self._check(self.world))

    async def _jobs(self, world: World) -> list[Job]:
        found = self.owners.items()
        return [await world.manager.get(job, owner) for job, owner in found if job not in self.gone]

    async def _check(self, world: World) -> None:
        jobs = await self._jobs(world)
        assert world.unsound(jobs) == []
        # A paused one may still stand in its coroutine; it does nothing there.
        assert sum(job.kind == "limited" and job.state in HOLDING for job in jobs) <= 1
        for job in jobs:
            history = await world.manager.history(job.id, job.owner, 0, 10_000)
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
                self._check_processes(self.world)
        finally:
            self.runner.close()
        assert self.noise == []

    async def _drive(self, world: World) -> None:
        for job_id in self.owners:
            self.crew.endings.setdefault(job_id, "finish")
        for job in await self._jobs(world):
            if job.state in ("paused", "pausing"):
                with suppress(SluiceError):  # it may just end
                    await world.manager.command(job.id, "resume", owner=job.owner, by=world.by())
        await eventually_final(self, world)
        jobs = {job.id: job for job in await self._jobs(world)}
        for job in jobs.values():
            self._check_end(job, jobs, world)
        await self._check_leftovers(world)

    def _check_end(self, job: Job, jobs: dict[str, Job], world: World) -> None:
        parents = [jobs[parent] for parent in job.after if parent in jobs]
        if job.state == "succeeded":
            assert job.on == "any" or all(parent.state == "succeeded" for parent in parents)
        else:
            # Each at least once, the first one last; twice after a crash that lost the cursor.
            undone = self.crew.undone.get(job.id, [])
            assert undone[-1:] in ([], [0]), undone
            assert set(undone) == set(range(max(undone, default=-1) + 1)), undone
            assert not job.undo
            assert not job.artifacts
        if job.state == "succeeded" and job.artifacts:
            assert job.result is not None
            content = world.published()[f"{job.artifacts[0].file}/lines.txt"]
            assert content == b"".join(b"%d\n" % n for n in range(job.result.data["counted"]))

    async def _check_leftovers(self, world: World) -> None:
        manager = world.manager
        await eventually(lambda: not world.runners._live, "no frame is left")
        await eventually(lambda: world.unfinished() == [], "tmp/ is empty")
        # A row is seen a moment before the manager hears that it was committed.
        await eventually(lambda: manager.running == 0, "no slot is taken")
        await eventually(lambda: not manager._waiting.total(), "no place in the queue is taken")
        await eventually(lambda: not manager._active, "no job is live")
        await eventually(lambda: not manager._alarms, "no deadline is left")
        await eventually(lambda: not manager._rollbacks, "no rollback is left")
        await eventually(lambda: not len(world.children), "no child is left")
        work = world.folder / "work"
        await eventually(lambda: not work.exists() or not list(work.iterdir()), "work/ is empty")
        files = {
            f"{file.id}/{file.name}"
            for owner in OWNERS
            for file in (await world.files.list(owner, None, None, 1000)).items
        }
        assert set(world.published()) == files

    def _check_processes(self, world: World) -> None:
        """Nothing that was started for this folder runs any more."""
        site = world.children._site
        assert [pid for pid in processes() if mark_of(pid).partition("/")[0] == site] == []


async def eventually_final(machine: WholeMachine, world: World) -> None:
    """Return when all jobs have ended; say which ones don't."""
    for job in await machine._jobs(world):
        end = asyncio.get_running_loop().time() + 60
        while (job := await world.manager.get(job.id, job.owner)).state not in FINAL:
            late = asyncio.get_running_loop().time() > end
            assert not late, f"{job.kind} is stuck: {job.state}, wants {job.want}"
            if job.state == "paused":
                await world.manager.command(job.id, "resume", owner=job.owner, by=world.by())
            await asyncio.sleep(0.005)


@pytest.mark.slow
def test_nothing_is_stuck_or_left_over(tmp_path: Path) -> None:
    """Whatever happens in whatever order, each job can end, and nothing of it remains."""
    WholeMachine.folder = tmp_path
    run_state_machine_as_test(
        WholeMachine,
        settings=settings(
            max_examples=60 if FULL else 8,
            stateful_step_count=50 if FULL else 30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
