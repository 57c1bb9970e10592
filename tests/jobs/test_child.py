"""Kinds that run in a child process: as on the lane, and with nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import states
from jobs.kinds import Kind, load_kind
from jobs.manager import Limits
from jobs.states import CANCELLED, FAILED, PAUSED, RUNNING, SUCCEEDED
from jobs.warden import processes
from storage import Job
from tests.jobs.world import World, descendants, eventually, standing

KINDS = Path(__file__).with_name("child_kinds")


def a_child(name: str) -> Kind:
    """One of the kinds in child_kinds/."""
    return load_kind(("file", str(KINDS / f"{name}.py")), name)


async def written(world: World, job_id: str) -> bytes:
    """The bytes of the job's only file."""
    job = await world.job(job_id)
    assert job.result is not None and job.result.file is not None
    (path,) = (world.folder / "uploads" / job.result.file).iterdir()
    return path.read_bytes()


async def further(world: World, job_id: str) -> None:
    """Return when the job has come further; after a pause that was cold, in another frame."""
    before = (await world.job(job_id)).progress.done

    def is_further() -> bool:
        process = world.runners._live.get(job_id)
        return process is not None and process.meter.done > before

    await eventually(is_further, "progress")


def endless(folder: Path) -> dict[str, Any]:
    """Parameters of steps that go on until there is a file named ``go``."""
    return {"steps": 0, "pause_s": 0.002, "go": str(folder / "go")}


async def ended(world: World, job_id: str, folder: Path) -> Job:
    """Let such steps end: the job, whose lines are each step once."""
    (folder / "go").touch()
    job = await world.until(job_id, *states.FINAL)
    assert job.state == SUCCEEDED, job.error
    assert job.result is not None
    assert await written(world, job_id) == lines(job.result.data["steps"])
    return job


def lines(steps: int) -> bytes:
    """What so many steps write."""
    return b"".join(b"%d\n" % n for n in range(steps))


async def test_it_runs_as_on_the_lane(tmp_path: Path) -> None:
    """A child reads a file, writes an artefact, logs, and returns data, like any other."""
    async with World(tmp_path, a_child("steps")) as world:
        job = await world.until(await world.start("steps", {"steps": 300}), *states.FINAL)
        assert job.state == SUCCEEDED, job.error
        assert job.result is not None and job.result.data == {"steps": 300, "attempt": 1}
        assert await written(world, job.id) == lines(300)
        said = await world.manager.lines(job.id, job.owner, 0, 100)
        assert sorted(line for _, _, line in said) == ["began at 0", "ended", "printed"]
        assert (job.progress.done, job.progress.total) == (300, 300)
        assert not descendants()


@pytest.mark.parametrize("warm_s", [30.0, 0.0])
async def test_a_pause_holds_it_and_it_goes_on(tmp_path: Path, warm_s: float) -> None:
    """A paused child is stopped, or gone when the pause is cold; the result is the same."""
    async with World(tmp_path, a_child("steps"), warm_s=warm_s) as world:
        job_id = await world.start("steps", endless(tmp_path))
        for _ in range(3):
            await world.until(job_id, RUNNING)
            await further(world, job_id)
            await world.tell(job_id, "pause")
            await world.until(job_id, PAUSED)
            if warm_s:
                await eventually(standing, "it stands")
            else:
                await eventually(lambda: not descendants(), "the end of the child")
            await world.tell(job_id, "resume")
        await ended(world, job_id, tmp_path)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"run_timeouts_s": {"stubborn": 1.0}}, "timeout"),
        ({"stall_timeouts_s": {"stubborn": 1.0}}, "stalled"),
    ],
)
async def test_a_clock_ends_it(tmp_path: Path, limits: dict[str, Any], code: str) -> None:
    """One that is silent, or runs for too long, fails with that code, and no process is left."""
    kind = a_child("stubborn")
    async with World(tmp_path, kind, limits=Limits(**limits), child_grace_s=0.2) as world:
        job = await world.until(await world.start("stubborn"), *states.FINAL)
        assert (job.state, job.error and job.error["code"]) == (FAILED, code)
        assert not descendants()


async def test_a_pause_stops_the_clock_of_a_child(tmp_path: Path) -> None:
    """A stopped child is not silent, and does not run."""
    limits = Limits(run_timeouts_s={"steps": 600.0}, stall_timeouts_s={"steps": 300.0})
    async with World(tmp_path, a_child("steps"), limits=limits) as world:
        job_id = await world.start("steps", endless(tmp_path))
        await world.until(job_id, RUNNING)
        await further(world, job_id)
        await world.tell(job_id, "pause")
        await world.until(job_id, PAUSED)
        clock = world.runners._live[job_id]._clock
        assert clock is not None
        ran_s = clock.ran_s
        await asyncio.sleep(0.1)
        assert clock.ran_s == ran_s > 0
        await world.tell(job_id, "resume")
        await world.until(job_id, RUNNING)
        await eventually(lambda: clock.ran_s > ran_s, "it goes on")
        await ended(world, job_id, tmp_path)


async def test_a_cancel_unwinds_it(tmp_path: Path) -> None:
    """A cancelled child runs its ``finally``; no process and no file is left."""
    async with World(tmp_path, a_child("steps")) as world:
        job_id = await world.start("steps", endless(tmp_path))
        await world.until(job_id, RUNNING)
        await eventually(lambda: world.runners._live[job_id].meter.done > 0, "progress")
        await world.tell(job_id, "cancel")
        await world.until(job_id, CANCELLED)
        assert not descendants()
        assert not world.unfinished() and not world.published()
        assert not list((tmp_path / "work").iterdir())

        async def said() -> list[str]:
            return [line for _, _, line in await world.manager.lines(job_id, "ann", 0, 100)]

        while "ended" not in await said():  # what it said last is stored within a second
            await asyncio.sleep(0.02)


async def test_a_stubborn_one_is_killed(tmp_path: Path) -> None:
    """A child that reaches no checkpoint and ignores TERM is paused, and killed by a cancel."""
    async with World(tmp_path, a_child("stubborn"), child_grace_s=0.2) as world:
        job_id = await world.start("stubborn")
        await world.until(job_id, RUNNING)
        await eventually(lambda: len(descendants()) >= 2, "its own child")
        await world.tell(job_id, "pause")
        await world.until(job_id, PAUSED)
        await eventually(standing, "both stand")
        await world.tell(job_id, "cancel")
        await world.until(job_id, CANCELLED)
        assert not descendants()


async def test_force_kills_one_that_is_told_to_unwind(tmp_path: Path) -> None:
    """Who loses patience while a child may still unwind has it killed, and nothing is left."""
    async with World(tmp_path, a_child("stubborn"), child_grace_s=60) as world:
        job_id = await world.start("stubborn")
        await eventually(lambda: len(descendants()) == 2, "it runs, with what it has started")
        process = world.runners._live[job_id]
        await world.tell(job_id, "cancel")
        await eventually(lambda: not process._programs, "it is told to unwind")
        await world.tell(job_id, "cancel", force=True)
        await world.until(job_id, CANCELLED)
        await eventually(lambda: not len(world.children), "no child is left")
        assert not descendants()


async def test_its_death_fails_the_job(tmp_path: Path) -> None:
    """A child that is killed by somebody fails its job, with the signal's name."""
    async with World(tmp_path, a_child("steps")) as world:
        job_id = await world.start("steps", endless(tmp_path))
        await world.until(job_id, RUNNING)
        await eventually(lambda: world.runners._live[job_id].meter.done > 0, "progress")
        os.kill(descendants()[0], signal.SIGKILL)
        job = await world.until(job_id, *states.FINAL)
        assert job.state == FAILED and job.error is not None
        assert "SIGKILL" in job.error["detail"]


async def test_a_crash_goes_on_from_the_cursor(tmp_path: Path) -> None:
    """After a crash of the service the job goes on from its cursor, and nothing of before runs."""
    async with World(tmp_path, a_child("steps")) as world:
        job_id = await world.start("steps", endless(tmp_path))
        await world.until(job_id, RUNNING)
        await eventually(lambda: world.runners._live[job_id].meter.done > 50, "progress")
        await world.runners.save()
        await world.restart()
        await further(world, job_id)
        assert (await ended(world, job_id, tmp_path)).attempt == 2
        assert not descendants()


async def test_its_errors_are_told(tmp_path: Path) -> None:
    """What a child raises fails the job with its code; its log has the trace of an exception."""
    async with World(tmp_path, a_child("steps")) as world:
        job = await world.until(
            await world.start("steps", {"steps": 5, "fail": "code"}), *states.FINAL
        )
        assert job.error is not None and job.error["code"] == "invalid-data"
        job = await world.until(
            await world.start("steps", {"steps": 5, "fail": "bug"}), *states.FINAL
        )
        assert job.error is not None and job.error["code"] == "kind-failed"
        lines = await world.manager.lines(job.id, job.owner, 0, 100)
        assert any("ZeroDivisionError" in line for _, _, line in lines)
        await eventually(lambda: not world.unfinished(), "all is gone")
        assert not world.published()


async def test_undo_runs_in_the_service(tmp_path: Path) -> None:
    """What a child has written into its undo journal is undone, also after its death."""
    async with World(tmp_path, a_child("undoing")) as world:
        job_id = await world.start("undoing", {"path": str(tmp_path / "mark")})
        await eventually((tmp_path / "mark").exists, "the effect")
        os.kill(descendants()[0], signal.SIGKILL)
        await world.until(job_id, FAILED)
        assert not (tmp_path / "mark").exists()


async def test_a_service_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """After kill -9 of the service nothing of its children runs, whatever they did to hide."""
    program = Path(__file__).with_name("killed_service.py")
    reading, writing = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, str(program), str(tmp_path)],
        os.environ | {"PYTHONPATH": str(Path.cwd())},
        file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)],
    )
    os.close(writing)
    with os.fdopen(reading) as told:
        pids = [int(told.readline()) for _ in range(3)]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    await eventually(lambda: not [p for p in pids if _runs(p)], "the end of all")


def _runs(pid: int) -> bool:
    process: Any = processes().get(pid)
    return process is not None and process.state != "Z"


async def test_a_dead_warden_takes_all_along(tmp_path: Path, caplog: Any) -> None:
    """If the warden is killed, its children die, their jobs fail, and the next job runs again."""
    async with World(tmp_path, a_child("steps")) as world:
        job_id = await world.start("steps", endless(tmp_path))
        await world.until(job_id, RUNNING)
        await eventually(lambda: world.runners._live[job_id].meter.done > 0, "progress")
        warden = world.children._warden
        assert warden is not None
        os.kill(warden.pid, signal.SIGKILL)
        await world.until(job_id, FAILED)
        await eventually(lambda: not descendants(), "the end of the child")
        assert "warden" in caplog.text
        caplog.clear()
        job = await world.until(await world.start("steps", {"steps": 3}), *states.FINAL)
        assert job.state == SUCCEEDED
        await asyncio.sleep(0)
