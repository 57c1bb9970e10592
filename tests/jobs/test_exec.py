"""Allowed programs as jobs: real ones on real files, and what they may not do."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from errors import SluiceError
from jobs import states
from jobs.kinds import Registry
from jobs.kinds._exec import load
from jobs.states import CANCELLED, FAILED, PAUSED, RUNNING, SUCCEEDED
from storage import Job
from tests.jobs.world import World, descendants, eventually, standing

PROGRAMS = """
[gzip]
title = "Compress with gzip"
argv = ["gzip", "-{level}", "-c"]
stdin = "file"
stdout = "{file.name}.gz"
media_type = "application/gzip"
progress = "read"
[gzip.params.file]
type = "file"
[gzip.params.level]
type = "integer"
min = 1
max = 9
default = 9

[sort]
argv = ["sort", "-n", "-o", "{sorted}", "{reverse}", "--", "{file}"]
progress = "read"
[sort.params.file]
type = "file"
[sort.params.reverse]
type = "boolean"
flag = "--reverse"
[sort.outputs.sorted]
name = "sorted.txt"
media_type = "text/plain"

[sha256]
argv = ["sha256sum", "{file}"]
params.file.type = "file"

[say]
argv = ["printf", "%s|", "{text}", "{more}", "x{more}y", "{{{choice}}}"]
stdout = "said.txt"
[say.params.text]
[say.params.more]
optional = true
[say.params.choice]
type = "choice"
choices = ["a", "b"]
default = "a"

[json]
argv = ["sh", "-c", '''
echo '{"done": 1, "total": 4, "message": "one"}'
echo '{"done": 0, "total": 4}'; echo '{"done": "x"}'; echo '{not json'; echo plain
echo '{"message": "two"}'
while [ ! -e go ]; do sleep 0.01; done; echo '{"done": 2, "total": 4}'; exit {code}''']
progress = "json"
unit = "steps"
ok = [0, 3]
params.code = {type = "integer", default = 0}

[percent]
argv = ["sh", "-c", '''
printf 'at 10%%\\rat 55.5%% of it\\r' >&2; while [ ! -e go ]; do sleep 0.01; done''']
progress = {regex = 'at (?P<percent>[0-9.]+)%(?P<message> of it)?'}
unit = "steps"

[stubborn]
argv = ["sh", "-c", "trap '' TERM; (setsid sleep 1000 &); while :; do :; done"]

[loud]
argv = ["sh", "-c", "yes 'a line' | head -n 100000; yes | head -c 300000 | tr '\\\\n' x; exit 9"]

[greedy]
argv = ["sh", "-c", "while :; do :; done"]
limits = {cpu_s = 1}

[environment]
argv = ["env"]
stdout = "env.txt"
env = {COLOUR = "red"}

[halves]
argv = ["sh", "-c", '''
{ head -c 100000; while [ ! -e go ]; do :; done; cat; } | gzip -c''']
stdin = "file"
stdout = "{file.name}.gz"
media_type = "application/gzip"
progress = "read"
params.file.type = "file"

[copy]
argv = ["sh", "-c", "cat; while [ ! -e go ]; do sleep 0.01; done"]
stdin = "file"
stdout = "copy"
params.file.type = "file"

[silent]
argv = ["sh", "-c", "echo begun; sleep 1000"]
stall_timeout_s = 0.4

[slow]
argv = ["sh", "-c", "while sleep 0.01; do echo 'a line'; done"]
run_timeout_s = 0.5

[missing]
argv = ["no-such-program"]
"""


class Rig:
    """A world with these programs."""

    def __init__(self, folder: Path) -> None:
        path = folder / "programs.toml"
        path.write_text(PROGRAMS)
        self.registry = Registry.load((), load(path))
        assert not self.registry.problems
        kinds = [self.registry.get(name) for name in self.registry.names()]
        self.world = World(folder / "data", *[k for k in kinds if k], child_grace_s=0.3)


NUMBERS = random.Random(1)
BIG = b"".join(b"%d\n" % NUMBERS.randrange(1 << 40) for _ in range(20_000))


async def copying(world: World, count: int = 1) -> list[str]:
    """Start programs that wait for their end when they have copied a file, and have done that."""
    jobs = [await world.start("exec.copy", {"file": "big.txt"}) for _ in range(count)]
    await eventually(lambda: written(world) == count * len(BIG), "whole copies")
    return jobs


async def ended(world: World, job_id: str) -> Job:
    """Let a program that waits end; its job."""
    folder = world.folder / "work" / job_id
    await eventually(folder.exists, "its folder")
    (folder / "go").touch()
    return await world.until(job_id, *states.FINAL)


def cpu_ticks(pids: list[int]) -> int:
    """The processor time that they have used."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has just ended
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(words[11]) + int(words[12])
    return total


async def lines_of(world: World, job: Job) -> list[str]:
    return [line for _, _, line in await world.manager.lines(job.id, job.owner, 0, 10_000)]


def content(world: World, job: Job) -> bytes:
    """The bytes of its only file."""
    assert job.result is not None and job.result.file is not None, job.error
    (path,) = (world.folder / "uploads" / job.result.file).iterdir()
    return path.read_bytes()


def written(world: World) -> int:
    """The bytes in unfinished files."""
    return sum((world.folder / "tmp" / name).stat().st_size for name in world.unfinished())


async def test_a_paused_program_uses_no_cpu_and_ends_right(tmp_path: Path) -> None:
    """Programs that compute: paused they take no processor time, and their result is whole."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        await world.store("big.txt", BIG)
        job_id = await world.start("exec.halves", {"file": "big.txt"})
        await world.until(job_id, RUNNING)
        meter = world.runners._live[job_id].meter
        await eventually(lambda: meter.done == 100_000, "it has read the first half")
        used, pids = 0, []
        for _ in range(2):
            await eventually(lambda: cpu_ticks(descendants()) > used, "it computes")  # noqa: B023
            await world.tell(job_id, "pause")
            await world.until(job_id, PAUSED)
            pids = await eventually(standing, "all stand")
            used = cpu_ticks(pids)
            await asyncio.sleep(0.1)  # nothing happens, which no event tells
            assert cpu_ticks(pids) == used
            await world.tell(job_id, "resume")
        job = await ended(world, job_id)
        assert job.state == SUCCEEDED, job.error
        assert gzip.decompress(content(world, job)) == BIG
        assert job.artifacts[0].name == "big.txt.gz"
        assert (job.progress.done, job.progress.total) == (len(BIG), len(BIG))
        assert job.result is not None and job.result.data["exit"] == 0
        assert not set(pids) & set(descendants())


async def test_a_pause_lasts_longer_than_warm(tmp_path: Path) -> None:
    """A program that can't go on from a cursor stays stopped, however long the pause is."""
    rig = Rig(tmp_path)
    rig.world.warm_s = 0.01
    async with rig.world as world:
        await world.store("big.txt", BIG)
        (job_id,) = await copying(world)
        await world.tell(job_id, "pause")
        await world.until(job_id, PAUSED)
        (program,) = world.runners._live[job_id]._programs
        await asyncio.sleep(0.1)  # nothing happens, which no event tells
        assert program.pid in descendants()
        await world.tell(job_id, "resume")
        assert content(world, await ended(world, job_id)) == BIG


async def test_stopped_programs_are_bounded(tmp_path: Path) -> None:
    """Of too many paused programs the longest paused is ended; it starts anew when resumed."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        world.runners.max_stopped = 2
        await world.store("big.txt", BIG)
        jobs = await copying(world, 3)
        live = world.runners._live
        pids = [live[job_id]._programs[0].pid for job_id in jobs]
        for job_id in jobs:
            await world.tell(job_id, "pause")
            await world.until(job_id, PAUSED)
        await eventually(lambda: jobs[0] not in live, "the end of the first")
        assert set(pids) & set(descendants()) == set(pids[1:])
        for job_id in jobs:
            await world.tell(job_id, "resume")
            job = await ended(world, job_id)
            assert job.state == SUCCEEDED, job.error
            assert content(world, job) == BIG


async def test_outputs_by_path(tmp_path: Path) -> None:
    """A file that a program writes by its path becomes an artefact; a boolean is a flag."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        await world.store("n.txt", BIG)
        for reverse in (False, True):
            job_id = await world.start("exec.sort", {"file": "n.txt", "reverse": reverse})
            job = await world.until(job_id, *states.FINAL)
            numbers = sorted(map(int, BIG.split()), reverse=reverse)
            assert [int(line) for line in content(world, job).split()] == numbers
        await eventually(lambda: not list((world.folder / "work").iterdir()), "no folder")


async def test_what_it_says_is_logged(tmp_path: Path) -> None:
    """Lines of a program that writes to no artefact are the job's log."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        await world.store("a", b"abc")
        job = await world.until(await world.start("exec.sha256", {"file": "a"}), *states.FINAL)
        digest = hashlib.sha256(b"abc").hexdigest()
        assert await lines_of(world, job) == [f"{digest}  /dev/fd/3"]


async def test_arguments_are_never_split(tmp_path: Path) -> None:
    """Each entry of argv is one argument, whatever is in it, or none without its value."""
    nasty = 'a b; rm -rf "$HOME" `id` $(id) \n\t\\ {choice}'
    rig = Rig(tmp_path)
    async with rig.world as world:
        job = await world.until(await world.start("exec.say", {"text": nasty}), *states.FINAL)
        assert content(world, job).decode() == f"{nasty}|{{a}}|"
        job = await world.until(
            await world.start("exec.say", {"text": "", "more": "m", "choice": "b"}), *states.FINAL
        )
        assert content(world, job).decode() == "|m|xmy|{b}|"


@pytest.mark.parametrize(
    "kind, params",
    [
        ("exec.say", {"text": "-rf"}),
        ("exec.say", {"text": "a\0b"}),
        ("exec.say", {"text": "a", "choice": "c"}),
        ("exec.say", {"text": "a", "unknown": 1}),
        ("exec.say", {}),
        ("exec.gzip", {"file": "a", "level": 10}),
        ("exec.gzip", {"file": "a", "level": "9"}),
        ("exec.gzip", {"file": ""}),
    ],
)
def test_bad_parameters_are_refused(tmp_path: Path, kind: str, params: dict[str, Any]) -> None:
    """What does not fit the declaration is refused before anything starts."""
    with pytest.raises(SluiceError) as refusal:
        Rig(tmp_path).registry.parse(kind, params)
    assert refusal.value.code == "invalid-field"


async def test_progress_by_json_lines(tmp_path: Path) -> None:
    """Lines of JSON are progress, never backwards; all others are logged; 3 counts as success."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        job_id = await world.start("exec.json", {"code": 3})
        await world.until(job_id, RUNNING)
        meter = world.runners._live[job_id].meter
        await eventually(lambda: meter.message == "two", "all lines")
        assert (meter.done, meter.total) == (1, 4)
        job = await ended(world, job_id)
        assert (job.state, job.progress.done) == (SUCCEEDED, 4)
        assert await lines_of(world, job) == ['{"done": "x"}', "{not json", "plain"]


async def test_progress_by_a_pattern(tmp_path: Path) -> None:
    """A percentage that is drawn over itself with carriage returns is progress."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        job_id = await world.start("exec.percent")
        await world.until(job_id, RUNNING)
        meter = world.runners._live[job_id].meter
        await eventually(lambda: meter.done == 55, "the second mark")
        assert (meter.total, meter.message) == (100, " of it")
        assert (await ended(world, job_id)).state == SUCCEEDED


async def test_a_cancel_ends_all_of_it(tmp_path: Path) -> None:
    """A program that ignores TERM, with a child that has left its session: nothing is left."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        for paused in (False, True):
            job_id = await world.start("exec.stubborn")
            await eventually(lambda: len(descendants()) == 2, "both processes")
            if paused:
                await world.tell(job_id, "pause")
                await world.until(job_id, PAUSED)
            await world.tell(job_id, "cancel")
            await world.until(job_id, CANCELLED)
            assert not descendants()
        assert not world.unfinished() and not world.published()


async def test_failures_say_why(tmp_path: Path) -> None:
    """The job's error has the exit status or the signal, and the last line."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        job = await world.until(await world.start("exec.loud"), *states.FINAL)
        assert job.error is not None
        assert job.error["detail"].startswith("loud ended with exit status 9: ")
        lines = await lines_of(world, job)
        assert lines[0] == "a line" and any("dropped" in line for line in lines)
        assert len(lines) < 5000
        job = await world.until(await world.start("exec.greedy"), *states.FINAL)
        assert job.error is not None and "SIGXCPU" in job.error["detail"]
        job = await world.until(await world.start("exec.missing"), *states.FINAL)
        assert job.state == FAILED and job.error is not None
        assert "No such file" in job.error["detail"]


@pytest.mark.parametrize("kind, code", [("exec.silent", "stalled"), ("exec.slow", "timeout")])
async def test_it_may_not_be_silent_or_run_for_ever(tmp_path: Path, kind: str, code: str) -> None:
    """A program that is silent or runs for too long is ended, and its job fails."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        job = await world.until(await world.start(kind), *states.FINAL)
        assert job.state == FAILED and job.error is not None
        assert job.error["code"] == code
        assert not descendants()


async def test_its_environment_is_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sees what it was given, and none of the service's secrets."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    rig = Rig(tmp_path)
    async with rig.world as world:
        job = await world.until(await world.start("exec.environment"), *states.FINAL)
        seen = dict(line.split("=", 1) for line in content(world, job).decode().splitlines())
        assert "SECRET_TOKEN" not in seen
        assert seen["COLOUR"] == "red"
        assert seen["HOME"] == str(world.folder / "work" / job.id)


async def test_a_crash_starts_it_anew(tmp_path: Path) -> None:
    """After a crash of the service the program runs from its beginning, with one result."""
    rig = Rig(tmp_path)
    async with rig.world as world:
        await world.store("big.txt", BIG)
        (job_id,) = await copying(world)
        await world.restart()
        job = await ended(world, job_id)
        assert (job.state, job.attempt) == (SUCCEEDED, 2)
        assert content(world, job) == BIG
        assert len(world.published()) == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("[a]\nargv = []", "array"),
        ('[a]\nargv = ["x", "{y}"]', "names 'y'"),
        ('[a]\nargv = ["x"]\nstdin = "y"', "stdin is 'y'"),
        ('[A]\nargv = ["x"]', "lower-case"),
        ('[a]\nargv = ["x"]\nshell = true', "shell"),
        ('[a]\nargv = ["x"]\nprogress = {regex = "("}', "unterminated"),
        ('[a]\nargv = ["x"]\nprogress = {regex = "x"}', "no group"),
        ('[a]\nargv = ["x"]\nparams.n = {type = "choice"}', "choices"),
        ('[a]\nargv = ["x"]\nparams.n = {type = "integer", default = "x"}', "int"),
        ("[a", "can't be read"),
    ],
)
def test_a_wrong_entry_is_told_by_name(tmp_path: Path, text: str, said: str) -> None:
    """One wrong program is a problem of its own; the others are there."""
    path = tmp_path / "p.toml"
    path.write_text(text + '\n[good]\nargv = ["true"]\n')
    registry = Registry.load((), load(path))
    (problem,) = registry.problems
    assert said in problem.detail and problem.file.startswith("p.toml")
    assert (registry.get("exec.good") is not None) == (not problem.detail.startswith("it can't"))
