"""What starts when: limits, turns, jobs that wait for others, the length of the queue."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from errors import SluiceError
from jobs.files import now_ms
from jobs.manager import Limits
from tests.jobs.world import OWNER, World, a_kind, eventually

GONE = "019506d0-0000-7000-8000-000000000000"


class Gate:
    """A kind whose jobs end when they are let out."""

    def __init__(self) -> None:
        self.inside: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[str] = []
        self.open = False
        self.failing: set[str] = set()

    async def run(self, ctx: Any, params: Any) -> None:
        """Wait inside until the gate is open; fail if the job's owner shall."""
        self.order.append(ctx.owner)
        self.inside[ctx.owner] += 1
        self.most[ctx.owner] = max(self.most[ctx.owner], self.inside[ctx.owner])
        self.most[""] = max(self.most[""], self.inside.total())
        try:
            while not self.open:
                await ctx.sleep(0.002)
            if ctx.job_id in self.failing:
                raise ValueError("as asked")
        finally:
            self.inside[ctx.owner] -= 1


async def once(ctx: Any, params: Any) -> None:
    """End at once."""


async def endless(ctx: Any, params: Any) -> None:
    """Run until it is stopped."""
    while True:
        await ctx.checkpoint(1)
        await ctx.sleep(0.002)


async def fails(ctx: Any, params: Any) -> None:
    """Fail at once."""
    raise SluiceError("invalid-data", "as asked")


# ---- Limits and turns ----


@pytest.mark.parametrize("by_setting", [False, True])
async def test_a_kind_has_a_limit_of_its_own(tmp_path: Path, by_setting: bool) -> None:
    """No more of it run at once, though slots are free; a setting comes before the kind's own."""
    gate = Gate()
    limits = Limits(kind_limits={"few": 2} if by_setting else {})
    few = a_kind("few", gate.run, LIMIT=5 if by_setting else 2)
    async with World(tmp_path, few, a_kind("once", once), limits=limits) as world:
        jobs = [await world.start("few") for _ in range(6)]
        other = await world.start("once")
        await world.until(other, "succeeded")
        assert (await world.manager.counts(OWNER))["running"] == 2
        row = await world.manager.full_row(await world.job(jobs[3]))
        assert row["waiting"] == {"why": "limit", "position": 2}
        gate.open = True
        for job in jobs:
            await world.until(job, "succeeded")
        assert gate.most[""] == 2


async def test_a_limit_of_no_kind_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A typo in a setting does not pass unnoticed."""
    limits = Limits(kind_limits={"onec": 2}, run_timeouts_s={"once": 9, "nothing": 1})
    async with World(tmp_path, a_kind("once", once), limits=limits):
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "a limit is set for what is no kind here: onec",
            "a limit is set for what is no kind here: nothing",
        ]


async def test_a_paused_job_leaves_its_place_of_the_kind(tmp_path: Path) -> None:
    """What is paused does not count, and comes back when there is room."""
    gate = Gate()
    async with World(tmp_path, a_kind("few", gate.run, LIMIT=1)) as world:
        first, second = [await world.start("few") for _ in range(2)]
        await world.until(first, "running")
        await world.tell(first, "pause")
        await world.until(second, "running")
        await world.tell(first, "resume")
        assert (await world.job(first)).state == "queued"
        gate.open = True
        for job in (first, second):
            await world.until(job, "succeeded")


async def test_an_owner_has_so_many_slots(tmp_path: Path) -> None:
    """One owner's jobs leave room for another's."""
    gate = Gate()
    limits = Limits(slots=6, owner_slots=2)
    async with World(tmp_path, a_kind("gate", gate.run), limits=limits) as world:
        for _ in range(10):
            await world.start("gate", owner="bob")
        mine = await world.start("gate")
        await world.until(mine, "running")
        await eventually(lambda: gate.inside["bob"] == 2, "two of bob's run")
        gate.open = True
        await eventually(lambda: len(gate.order) == 11, "all have run")
        assert gate.most["bob"] == 2


async def test_owners_take_turns(tmp_path: Path) -> None:
    """Who has queued one job does not wait for who has queued many."""
    gate = Gate()
    gate.open = True
    async with World(tmp_path, a_kind("gate", gate.run), limits=Limits(slots=1)) as world:
        flood = [world.start("gate", owner="bob") for _ in range(40)]
        await asyncio.gather(*flood, *(world.start("gate", owner=who) for who in ("ann", "cid")))
        await eventually(lambda: len(gate.order) == 42, "all have run")
        assert {"ann", "cid"} <= set(gate.order[:5])


# ---- The length of the queue ----


async def test_all_that_waits_counts(tmp_path: Path) -> None:
    """Queued, scheduled and blocked jobs, also many at once; paused ones do not."""
    limits = Limits(slots=1, max_queued=6)
    async with World(tmp_path, a_kind("endless", endless), limits=limits) as world:
        runs = await world.start("endless")
        await world.until(runs, "running")
        await world.start("endless", not_before=now_ms() + 3_600_000)
        await world.start("endless", after=[runs])
        started = await asyncio.gather(
            *(world.start("endless") for _ in range(9)), return_exceptions=True
        )
        codes = [error.code for error in started if isinstance(error, SluiceError)]
        assert codes == ["queue-full"] * 5
        queued = next(job for job in started if isinstance(job, str))
        await world.tell(queued, "pause")
        await world.start("endless")
        with pytest.raises(SluiceError, match="queue-full") as caught:
            await world.start("endless")
        assert caught.value.retry_after_s
        await world.restart()
        with pytest.raises(SluiceError, match="queue-full"):
            await world.start("endless")


async def test_one_owner_can_not_fill_the_queue(tmp_path: Path) -> None:
    """An owner's own limit refuses them, and nobody else."""
    limits = Limits(slots=1, max_queued=100, owner_queued=3)
    async with World(tmp_path, a_kind("endless", endless), limits=limits) as world:
        await world.until(await world.start("endless"), "running")
        for _ in range(3):
            await world.start("endless")
        with pytest.raises(SluiceError, match="queue-full"):
            await world.start("endless")
        await world.start("endless", owner="bob")


# ---- After other jobs ----


async def test_a_job_starts_after_others(tmp_path: Path) -> None:
    """It waits for all of them, says so, and is queued by the end of the last one."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        first, second = [await world.start("gate") for _ in range(2)]
        child = await world.start("once", after=[first, second])
        row = await world.manager.full_row(await world.job(child))
        assert (row["state"], row["after"]) == ("scheduled", [first, second])
        assert row["waiting"] == {"why": "after", "position": None}
        gate.open = True
        await world.until(child, "succeeded")
        assert [event.cause for event in await world.history(child)][:3] == [
            "created",
            "after",
            "claimed",
        ]
        assert {(await world.job(job)).state for job in (first, second)} == {"succeeded"}


@pytest.mark.parametrize("how", ["fails", "cancel"])
async def test_what_must_succeed_and_does_not_ends_its_followers(tmp_path: Path, how: str) -> None:
    """They are cancelled, with what was wrong, and so are theirs; with ``any`` they run."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        parent = await world.start("gate")
        child = await world.start("once", after=[parent])
        grandchild = await world.start("once", after=[child])
        anyhow = await world.start("once", after=[parent, child], on="any")
        gate.failing.add(parent)
        gate.open = how == "fails"
        if how == "cancel":
            await world.tell(parent, "cancel")
        ended = await world.until(child, "cancelled")
        await world.until(grandchild, "cancelled")
        await world.until(anyhow, "succeeded")
        state = (await world.job(parent)).state
        assert (ended.reason, ended.error and ended.error["code"]) == ("after", "parent-failed")
        assert ended.error is not None
        assert (ended.error["parent"], state in ended.error["detail"]) == (parent, True)
        assert (await world.history(child))[-1].cause == "after"


@pytest.mark.expects("failed")
async def test_after_a_job_that_has_ended(tmp_path: Path) -> None:
    """What it waits for may be over: it starts at once, or ends at once."""
    async with World(tmp_path, a_kind("fails", fails), a_kind("once", once)) as world:
        good, bad = await world.start("once"), await world.start("fails")
        await world.until(good, "succeeded")
        await world.until(bad, "failed")
        await world.until(await world.start("once", after=[good]), "succeeded")
        assert (await world.job(await world.start("once", after=[bad]))).state == "cancelled"
        await world.until(await world.start("once", after=[bad, good], on="any"), "succeeded")


async def test_after_an_unknown_job(tmp_path: Path) -> None:
    """The job that is not there, or is another owner's, is named."""
    async with World(tmp_path, a_kind("once", once)) as world:
        foreign = await world.start("once", owner="bob")
        for unknown in (GONE, foreign):
            with pytest.raises(SluiceError, match=unknown) as caught:
                await world.start("once", after=[unknown])
            assert (caught.value.code, caught.value.field) == ("invalid-field", "after")
        assert await world.manager.counts(OWNER) == {}


async def test_a_waiting_job_takes_commands(tmp_path: Path) -> None:
    """Paused it stays so when its time comes; resumed it waits on; a cancel ends it."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        parent = await world.start("gate")
        paused, resumed, ended = [await world.start("once", after=[parent]) for _ in range(3)]
        assert await world.tell(paused, "pause") == ("paused", 200)
        await world.tell(resumed, "pause")
        assert await world.tell(resumed, "resume") == ("scheduled", 202)
        assert await world.tell(ended, "cancel") == ("cancelled", 200)
        changed = await world.manager.change(ended, owner=OWNER, by=world.by(), name="x")
        assert changed.name == "x"
        await world.manager.change(resumed, owner=OWNER, by=world.by(), priority=9)
        gate.open = True
        await world.until(resumed, "succeeded")
        assert (await world.job(paused)).state == "paused"
        await world.tell(paused, "resume")
        await world.until(paused, "succeeded")


async def test_after_and_not_before(tmp_path: Path) -> None:
    """Both must be fulfilled, in whichever order they are."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        parent = await world.start("gate")
        soon = await world.start("once", after=[parent], not_before=now_ms() + 20)
        late = await world.start("once", after=[parent], not_before=now_ms() + 3_600_000)
        await asyncio.sleep(0.05)
        assert (await world.job(soon)).state == "scheduled"
        gate.open = True
        await world.until(soon, "succeeded")
        row = world.manager.row(await world.until(late, "scheduled"))
        while row["waiting"]["why"] != "time":
            await asyncio.sleep(0.002)
            row = world.manager.row(await world.job(late))
        assert row["state"] == "scheduled"


async def test_a_chain_of_a_thousand(tmp_path: Path) -> None:
    """It ends link by link, without recursion, and without holding the loop for long."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        last = first = await world.start("gate")
        for _ in range(1000):
            last = await world.start("once", after=[last])
        await world.tell(first, "cancel")
        await world.until(last, "cancelled", within_s=240)
        assert (await world.manager.counts(OWNER))["cancelled"] == 1001


async def test_many_followers_of_one(tmp_path: Path) -> None:
    """All of them start, however many there are."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        parent = await world.start("gate")
        await asyncio.gather(*(world.start("once", after=[parent]) for _ in range(350)))
        gate.open = True
        await world.until(parent, "succeeded")
        for _ in range(2000):
            if (await world.manager.counts(OWNER)).get("succeeded") == 351:
                break
            await world.state.wait(world.state._seq)
        assert await world.manager.counts(OWNER) == {"succeeded": 351}


async def test_a_follower_of_a_deleted_job_does_not_wait_for_ever(tmp_path: Path) -> None:
    """How a job ended outlives the job, as long as somebody waits."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        gone = await world.start("once")
        stays = await world.start("gate")
        child = await world.start("once", after=[gone, stays])
        await world.until(gone, "succeeded")
        await world.manager.delete(gone, owner=OWNER, by=world.by())
        gate.open = True
        await world.until(child, "succeeded")


async def test_a_crash_between_the_end_and_the_start(tmp_path: Path) -> None:
    """What had ended before the crash starts its followers after it."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), a_kind("once", once)) as world:
        parent = await world.start("gate")
        child = await world.start("once", after=[parent])
        other = await world.start("once", after=[child])
        world.manager._chained = False  # as if it had died before it could look after them
        gate.open = True
        await world.until(parent, "succeeded")
        assert (await world.job(child)).state == "scheduled"
        await world.restart()
        await world.until(other, "succeeded")


# ---- The file of another job ----


async def test_a_job_reads_what_another_one_makes(tmp_path: Path) -> None:
    """A file can be named by its job before there is one; a job without a file is refused."""
    found: dict[str, bytes] = {}

    async def makes(ctx: Any, params: Any) -> None:
        file = await ctx.artifact("made.txt")
        await file.write(b"hello")

    async with World(tmp_path, a_kind("makes", makes), a_kind("once", once)) as world:
        maker, empty = await world.start("makes"), await world.start("once")

        async def reads(ctx: Any, params: Any) -> None:
            for job in (maker, empty, GONE):
                try:
                    file = await ctx.files.find(f"job:{job}")
                except SluiceError as error:
                    found[job] = error.code.encode()
                    continue
                reader = await ctx.files.reader(file.id)
                found[job] = await reader.read(0, 9)
                await reader.close()

        world.manager.kinds._kinds["reads"] = a_kind("reads", reads)
        await world.until(await world.start("reads", after=[maker, empty]), "succeeded")
        assert found == {maker: b"hello", empty: b"file-unknown", GONE: b"file-unknown"}


# ---- Starts that need not wait ----


async def test_a_start_that_finds_a_slot_has_the_same_history(tmp_path: Path) -> None:
    """It is told as queued, then claimed by the service, whether or not it has waited."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), limits=Limits(slots=1)) as world:
        first, second = await world.start("gate"), await world.start("gate")
        gate.open = True
        for job_id in (first, second):
            job = await world.until(job_id, "succeeded")
            assert (job.version, job.fence, job.attempt) == (3, 1, 1)
            told = [
                (event.version, event.from_, event.to, event.cause, event.actor)
                for event in await world.history(job_id)
            ]
            assert told == [
                (1, None, "queued", "created", OWNER),
                (2, "queued", "running", "claimed", "service"),
                (3, "running", "succeeded", "done", "service"),
            ]
            rows = [msgspec.json.decode(event.row) for event in await world.history(job_id)]
            assert [(row["h"], row["version"]) for row in rows] == [(job.h, n) for n in (1, 2, 3)]


async def test_starts_of_one_turn_take_no_more_slots_than_there_are(tmp_path: Path) -> None:
    """Some start now and the others queue, in their order; none is lost, and no slot is kept."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run), limits=Limits(slots=3)) as world:
        jobs = await asyncio.gather(*(world.start("gate") for _ in range(10)))
        await eventually(lambda: gate.most[""] == 3, "three run")
        running = [(await world.job(job_id)).state == "running" for job_id in jobs]
        assert running == [True] * 3 + [False] * 7
        gate.open = True
        for job_id in jobs:
            await world.until(job_id, "succeeded")
        assert gate.most[""] == 3
        await eventually(lambda: world.manager.running == 0, "all slots are free")


async def test_a_start_whose_caller_has_gone_runs(tmp_path: Path) -> None:
    """It was asked for: it is made, runs, ends and frees its slot."""
    async with World(tmp_path, a_kind("once", once)) as world:
        caller = asyncio.create_task(world.start("once"))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        await eventually(lambda: world.state._seq == 3, "it has ended")
        assert (await world.state.counts(None)) == {"succeeded": 1}
        await eventually(lambda: world.manager.running == 0, "the slot is free")


async def test_a_start_that_waits_and_whose_caller_has_gone_runs(tmp_path: Path) -> None:
    """It has its place in the queue until it is claimed, also if nobody was told of it."""
    gate = Gate()
    kinds = a_kind("gate", gate.run), a_kind("once", once)
    async with World(tmp_path, *kinds, limits=Limits(slots=1)) as world:
        first = await world.start("gate")
        caller = asyncio.create_task(world.start("once"))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        await eventually(lambda: world.state._totals.get("queued") == 1, "it is made")
        assert world.manager._total_waiting == 1
        gate.open = True
        await world.until(first, "succeeded")
        await eventually(lambda: world.state._totals.get("succeeded") == 2, "it has run")
        assert world.manager._total_waiting == 0


async def test_a_start_under_a_name_that_is_held_takes_no_slot(tmp_path: Path) -> None:
    """Of two starts in one turn under a unique name one is made, and both are told of it."""
    gate = Gate()
    async with World(tmp_path, a_kind("gate", gate.run)) as world:
        more: dict[str, Any] = {"name": "only", "live_name": True}
        one, other = await asyncio.gather(*(world.start("gate", **more) for _ in range(2)))
        assert one == other
        assert world.manager.running == 1
        gate.open = True
        await world.until(one, "succeeded")
        assert world.manager.running == 0


async def test_a_start_that_can_not_be_stored_keeps_no_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is full a start is refused; afterwards there are as many slots as before."""
    async with World(tmp_path, a_kind("once", once), limits=Limits(slots=1)) as world:
        with monkeypatch.context() as patch:

            def refuse(*_: Any, **__: Any) -> Any:
                raise SluiceError("disk-full")

            patch.setattr(world.state, "_write", refuse)
            with pytest.raises(SluiceError, match="disk-full"):
                await world.start("once")
        assert world.manager.running == 0
        await world.until(await world.start("once"), "succeeded")
