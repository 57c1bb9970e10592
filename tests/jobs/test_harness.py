"""The harness for kinds finds what is wrong with bad ones, and lets good ones pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.harness import Report, check
from jobs.trial import MODES
from tests.harness import FULL, ROOT

HEAD = """
import asyncio, os, subprocess, tempfile
from pathlib import Path
import msgspec

KIND, TITLE, RESUMABLE = "tried", "Tried", True


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    steps: int = 4

"""

GOOD = """
async def remove(path):
    Path(path).unlink(missing_ok=True)


UNDO = {"remove": remove}


async def run(ctx, params):
    step, total = ctx.cursor or (0, 0)
    lines = await ctx.artifact("lines.txt", "text/plain")
    if step == 0:
        await ctx.undo("remove", path=os.path.abspath("made"))
        Path("made").write_text("made")
    while step < params.steps:
        await lines.write(b"%d\\n" % step)
        total += step
        step += 1
        await ctx.checkpoint((step, total), done=step, total=params.steps)
        await ctx.sleep(0)
    return {"total": total}
"""

LINES = """
async def run(ctx, params):
    step = {start}
    lines = await ctx.artifact("lines.txt")
    while step < params.steps:
        await lines.write(b"%d\\n" % step)
        step += 1
        await ctx.checkpoint({cursor})
    return {{"steps": step}}
"""

FORGETFUL = LINES.format(start="0", cursor="step")
LATE = LINES.format(start="ctx.cursor or 0", cursor="step - 1 or None")

GLOBAL = """
total = 0

async def run(ctx, params):
    global total
    for step in range(ctx.cursor or 0, params.steps):
        total += step
        await ctx.checkpoint(step + 1)
    return {"total": total}
"""

TOO_EARLY = """
async def remove(path):
    Path(path).unlink(missing_ok=True)

UNDO = {"remove": remove}

async def run(ctx, params):
    for step in range(ctx.cursor or 0, params.steps):
        path = os.path.abspath(f"file-{step}")
        Path(path).write_text("x")
        await ctx.undo("remove", path=path)
        await ctx.checkpoint(step + 1)
"""

LITTER = """
async def run(ctx, params):
    with tempfile.NamedTemporaryFile(delete=False, suffix=".litter") as file:
        for step in range(params.steps):
            await ctx.checkpoint()
        os.unlink(file.name)
"""

ORPHANS = """
async def run(ctx, params):
    child = subprocess.Popen(["sleep", "1000"])
    for step in range(params.steps):
        await ctx.checkpoint()
    child.kill()
    child.wait()
"""

OPEN = """
kept = []

async def run(ctx, params):
    info = await ctx.files.find("a.txt")
    kept.append(await ctx.files.reader(info.id))
    for step in range(params.steps):
        await ctx.checkpoint()
    await kept.pop().close()
"""

TASK = """
async def tick():
    while True:
        await asyncio.sleep(0.01)

async def run(ctx, params):
    task = asyncio.get_running_loop().create_task(tick())
    for step in range(params.steps):
        await ctx.checkpoint()
    task.cancel()
"""

DEAF = """
async def run(ctx, params):
    for step in range(params.steps):
        try:
            await ctx.checkpoint(step)
        except BaseException:
            pass
"""

BROKEN_UNDO = """
async def fail(step):
    raise RuntimeError("no way back")

UNDO = {"fail": fail}

async def run(ctx, params):
    await ctx.undo("fail", step=1)
    await ctx.checkpoint(1)
"""

CHANCE = """
async def run(ctx, params):
    await ctx.checkpoint()
    return {"pid": os.getpid(), "inner": [{"pid": os.getpid()}]}
"""

FAILS = """
async def run(ctx, params):
    ctx.log("about to divide")
    1 / 0
"""

HANGS = """
async def run(ctx, params):
    cursor = ctx.cursor
    await ctx.checkpoint(1)
    if cursor:
        await asyncio.sleep(1000)
"""


def kind(folder: Path, body: str) -> Path:
    """A file with this kind."""
    path = folder / "tried.py"
    path.write_text(HEAD + body)
    return path


def found(folder: Path, body: str, **how: Any) -> str:
    """What the harness says of a kind that is not good."""
    with pytest.raises(AssertionError) as caught:
        check(kind(folder, body), files={"a.txt": b"a"}, **how)
    return str(caught.value)


def test_a_good_kind_passes_at_every_point(tmp_path: Path) -> None:
    """Each mode meets each point at which it has a meaning."""
    report = check(kind(tmp_path, GOOD), {"steps": 3}, sample=0)
    assert isinstance(report, Report)
    assert "child" not in report.trials  # it has none
    assert (report.kind, report.points) == ("tried", {"undo": 1, "checkpoint": 3, "sleep": 3})
    assert report.trials == dict(warm=6, cold=6, kill=6, lost=8, cancel=6, abort=8)
    assert (report.missed, report.differences) == (0, [])


@pytest.mark.parametrize(
    ("body", "modes", "said"),
    [
        (FORGETFUL, "cold", "cold, checkpoint 1: lines.txt has 10 bytes, undisturbed 8; byte 2"),
        (FORGETFUL, "kill", "kill, checkpoint 1: lines.txt has 10 bytes, undisturbed 8; byte 2"),
        (LATE, "cold", "cold, checkpoint 2: lines.txt has 10 bytes, undisturbed 8; byte 4"),
        (LATE, "kill", "kill, checkpoint 2: lines.txt has 10 bytes, undisturbed 8; byte 4"),
        (GLOBAL, "kill", 'kill, checkpoint 2: result.data is {"total": 5}, undisturbed {"total"'),
        (TOO_EARLY, "abort", "abort, undo 1: file-0 is left"),
        (LITTER, "cancel", ".litter is left"),
        (LITTER, "lost", ".litter is left in the working folder"),
        (ORPHANS, "cancel", "cancel, checkpoint 1: the process 'sleep 1000' is left"),
        (ORPHANS, "lost", "lost, checkpoint 1: the process 'sleep 1000' is left"),
        (OPEN, "cancel", "cancel, checkpoint 1: a.txt is left open"),
        (TASK, "cancel", "cancel, checkpoint 1: the task tick is left"),
        (DEAF, "cancel", "cancel, checkpoint 1: it went on after it was cancelled"),
        (DEAF, "cold", "cold, checkpoint 1: it went on after it was paused"),
        (BROKEN_UNDO, "cancel", "cancel, checkpoint 1: 1 entries of its undo journal have failed"),
        (CHANCE, "warm", "undisturbed, once more: result.data is"),
        (FAILS, "warm", "the job is failed, not succeeded: kind-failed"),
        (HANGS, "cold", "cold, checkpoint 1: the job is hanging"),
    ],
)
def test_a_bad_kind_is_found_out(tmp_path: Path, body: str, modes: str, said: str) -> None:
    """What is wrong is told with the mode and the point at which it shows."""
    slow = body in (LITTER, ORPHANS, OPEN, TASK, HANGS)  # it waits for what never ends
    params, timeout_s = {"steps": 1 if slow else 4}, 10 if body is HANGS else 600
    text = found(tmp_path, body, params=params, modes=[modes], timeout_s=timeout_s, sample=0)
    assert said in text, text


@pytest.mark.parametrize(
    ("body", "modes"),
    [(FORGETFUL, ["warm", "cancel", "abort"]), (GLOBAL, ["warm", "cancel"])],
)
def test_a_fault_shows_only_where_it_matters(tmp_path: Path, body: str, modes: list[str]) -> None:
    """A kind without a working cursor can still be paused warm and cancelled."""
    assert check(kind(tmp_path, body), modes=modes, sample=2).ok


def test_a_failure_brings_the_log_along(tmp_path: Path) -> None:
    """The last lines of the job's log and of the server's say what has failed."""
    text = found(tmp_path, FAILS)
    assert "about to divide" in text
    assert "ZeroDivisionError" in text


def test_a_kind_in_a_child_is_disturbed_there_too(tmp_path: Path) -> None:
    """Its checkpoints are points as well, and its process may be the one that dies."""
    path = ROOT / "tests" / "jobs" / "child_kinds" / "steps.py"
    report = check(path, {"steps": 3}, ignore=["attempt"], sample=0 if FULL else 1)
    assert report.points["checkpoint"] == 3
    assert report.trials.keys() == MODES.keys()
    assert min(report.trials.values()) >= 1


def test_a_kind_in_a_child_that_forgets_is_found_out(tmp_path: Path) -> None:
    """What the child does wrong is told as if it were on the lane."""
    body = FORGETFUL + '\nRUNNER = "child"\n'
    text = found(tmp_path, body, modes=["cold"], sample=1)
    assert "cold, checkpoint 3: lines.txt has 14 bytes, undisturbed 8; byte 6" in text


def test_fields_may_be_left_out(tmp_path: Path) -> None:
    """What differs in each run by its nature is not compared, at any depth."""
    assert check(kind(tmp_path, CHANCE), ignore=["pid"], modes=["warm"]).ok


def test_a_sample_is_spread_evenly(tmp_path: Path) -> None:
    """Of many points, some are tried, with the first and the last."""
    report = check(kind(tmp_path, GLOBAL), {"steps": 100}, modes=["warm"], sample=4)
    assert report.points == {"checkpoint": 100}
    assert report.trials == {"warm": 4}
    text = found(tmp_path, GLOBAL, params={"steps": 100}, modes=["kill"], sample=4)
    for at in (34, 67, 100):
        assert f"kill, checkpoint {at}:" in text


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``server.py``."""
    program = [sys.executable, str(ROOT / "server.py"), *words]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=600)


def test_the_command_line(tmp_path: Path) -> None:
    """It takes a kind by name or file, says what it has found, and ends with 0 or 1."""
    (tmp_path / "a.txt").write_text("one")
    path = kind(tmp_path, GOOD)
    done = command("--kinds", str(path), "check", "tried", "--modes", "warm,cancel", "--sample=1")
    assert done.returncode == 0, done.stderr
    assert "tried: 1 undo, 4 checkpoints, 4 sleeps" in done.stdout
    assert "warm       1 times  as undisturbed" in done.stdout
    assert "cancel     1 times  nothing is left" in done.stdout
    path = kind(tmp_path, FORGETFUL)
    words = ["--modes=cold", "--sample=1", "--json"]
    done = command("check", *words, str(path), '{"steps": 2}', str(tmp_path / "a.txt"))
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["differences"][0]["mode"] == "cold"
    assert not list(tmp_path.glob("data"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "KIND"),
        (["check", "nothing"], "no kind is named 'nothing'; there are"),
        (["check", "nothing.py"], "nothing.py is no kind"),
        (["check", "count", "{"], "the parameters are no JSON"),
        (["check", "count", '{"steps": -1}'], "params.steps: Expected `int` >= 0"),
        (["check", "checksum", '{"file": "a"}', "nothing.txt"], "no such file: nothing.txt"),
        (["check", "--modes=slow", "count"], "--modes are warm, cold, kill"),
        (["check", "--sample=-1", "count"], "--sample is a whole number"),
        (["check", "--kinds=nothing", "count"], "no such file or folder: nothing"),
        (["check", "--loud", "count"], "--loud"),
    ],
)
def test_what_cannot_be_tried_is_said_in_one_line(words: list[str], said: str) -> None:
    """A mistake of the person who asks is one line and the exit status 2."""
    done = command(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("sluice: check: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
