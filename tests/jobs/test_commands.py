"""Commands over real rows: their order, their answers, their keys, and those to many jobs."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from errors import SluiceError
from jobs import manager
from jobs.commands import IN_FLIGHT, Command, Commands, Outcome, StartRequest
from jobs.files import now_ms
from jobs.kinds import Kind
from jobs.manager import Limits
from storage import KEY_KEPT_MS, Filter, Job, Key, Spent
from tests.jobs.world import OWNER, World, a_kind, eventually

ALL = Filter(owner=OWNER)


async def once(ctx: Any, params: Any) -> None:
    """End at once."""


async def hold(ctx: Any, params: Any) -> None:
    """Run until it is told to end."""
    while True:
        await ctx.sleep(60)


ONCE, HOLD = a_kind("once", once), a_kind("hold", hold)


class Desk:
    """One connection; each command is a future of its answer, which fails if a second one comes."""

    def __init__(self, commands: Commands, owner: str = OWNER) -> None:
        self.session = commands.session(owner, "tab", "ws")
        self.answered: list[str] = []  # in order, by op and what was named

    def submit(self, op: str, job: str | None = None, **fields: Any) -> asyncio.Future[Any]:
        """Submit a command."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer(outcome: Outcome | SluiceError) -> None:
            self.answered.append(op)
            future.set_result(outcome)

        self.session.submit(Command(op=op, job=job, **fields), answer)
        return future


async def waiting(world: World, n: int) -> list[str]:
    """Jobs whose time comes in an hour."""
    at = now_ms() + 3_600_000
    return await asyncio.gather(*(world.start("once", not_before=at) for _ in range(n)))


async def ended(world: World, n: int) -> list[str]:
    """Jobs that have been cancelled."""
    jobs = await waiting(world, n)
    await asyncio.gather(*(world.tell(job, "cancel") for job in jobs))
    for job in jobs:
        await world.until(job, "cancelled")
    return jobs


async def all_jobs(world: World) -> list[Job]:
    """Every job, newest first."""
    return (await world.state.find(ALL, None, 10_000)).items


def code_of(answer: Any) -> str | None:
    """The code of a refusal; None of an outcome."""
    return answer.code if isinstance(answer, SluiceError) else None


def plain(outcome: Outcome) -> tuple[Any, ...]:
    """An outcome for many that can be compared."""
    failed = [(job, error.code, error.detail) for job, error in outcome.failed]
    return outcome.job, outcome.version, outcome.n, failed, outcome.failures


# ---- Order and answers ----


async def test_commands_of_one_job_keep_their_order(tmp_path: Path) -> None:
    """Commands that are given at once are obeyed and answered one after the other."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager))
        ops = ["pause", "resume", "pause", "resume", "cancel"]
        answers = await asyncio.gather(*(desk.submit(op, job) for op in ops))
        assert desk.answered == ops
        assert {answer.job for answer in answers} == {job}
        versions = [answer.version for answer in answers]
        assert versions == sorted(set(versions))
        by = (await world.job(job)).by
        assert by is not None
        assert (by.actor, by.via) == ("tab", "ws")


async def test_an_answer_comes_after_the_commit(tmp_path: Path) -> None:
    """What an answer tells can be read by another connection to the database."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        other = sqlite3.connect(tmp_path / "state.db")
        done = asyncio.get_running_loop().create_future()

        def answer(outcome: Outcome | SluiceError) -> None:
            assert isinstance(outcome, Outcome)
            row = other.execute("SELECT version FROM jobs WHERE id = ?", (job,)).fetchone()
            done.set_result((outcome.version, row[0]))

        session = Commands(world.manager).session(OWNER, "", "ws")
        session.submit(Command(op="priority", job=job, args={"priority": 9}), answer)
        told, stored = await done
        other.close()
        assert told == stored == 2


async def test_a_list_stands_in_the_order_of_each_of_its_jobs(tmp_path: Path) -> None:
    """A command to a list waits for the earlier ones of its jobs, and the later ones for it."""
    async with World(tmp_path, ONCE) as world:
        jobs = await waiting(world, 3)
        desk = Desk(Commands(world.manager))
        first = [desk.submit("priority", job, args={"priority": 7}) for job in jobs]
        many = desk.submit("pause", jobs=tuple(jobs))
        last = [desk.submit("resume", job) for job in jobs]
        answers = await asyncio.gather(*first, many, *last)
        assert desk.answered == ["priority"] * 3 + ["pause"] + ["resume"] * 3
        assert answers[3] == Outcome(None, None, 3, [], 0)
        assert [answer.version for answer in answers[4:]] == [4, 4, 4]


async def test_a_command_by_filter_stands_between_all_others(tmp_path: Path) -> None:
    """It sees what was asked for before, and nothing of what is asked for after it."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager))
        later = {"kind": "once", "not_before": "2990-01-01T00:00:00Z"}
        answers = await asyncio.gather(
            desk.submit("start", args=later),
            desk.submit("pause", job),
            desk.submit("cancel", where=ALL),
            desk.submit("start", args=later),
            desk.submit("resume", job),
        )
        assert answers[2].n == 2
        assert (await world.job(answers[3].job)).state == "scheduled"
        assert code_of(answers[4]) in ("job-cancelling", "job-finished")
        assert sorted(desk.answered[:2]) == ["pause", "start"]  # of different jobs: in any order
        assert desk.answered[2] == "cancel"


async def test_other_jobs_do_not_wait_for_a_long_list(tmp_path: Path) -> None:
    """A command overtakes a list in which its job is not."""
    async with World(tmp_path, ONCE) as world:
        *many, job = await waiting(world, 301)
        desk = Desk(Commands(world.manager))
        long, short = desk.submit("pause", jobs=tuple(many)), desk.submit("cancel", job)
        assert (await short).job == job
        assert not long.done()
        assert (await long).n == 300


async def test_too_many_commands_at_once_are_busy(tmp_path: Path) -> None:
    """Beyond 16 a command is refused at once; each gets one answer, and then there is room."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager))
        answers = [desk.submit("pause", job) for _ in range(40)]
        assert [code_of(a.result()) for a in answers if a.done()] == ["busy"] * (40 - IN_FLIGHT)
        done = await asyncio.gather(*answers)
        assert [code_of(answer) for answer in done] == [None] * IN_FLIGHT + ["busy"] * 24
        assert await desk.submit("resume", job)
        assert len(desk.answered) == 41


@pytest.mark.parametrize(
    ("command", "code", "field"),
    [
        ({"op": "dance", "job": "x"}, "invalid-field", "op"),
        ({"op": "pause"}, "invalid-field", "job"),
        ({"op": "pause", "job": "x", "jobs": ("y",)}, "invalid-field", "jobs"),
        ({"op": "pause", "job": "x", "where": ALL}, "invalid-field", "f"),
        ({"op": "pause", "jobs": ()}, "invalid-field", "jobs"),
        ({"op": "pause", "jobs": ("x",) * 501}, "invalid-field", "jobs"),
        ({"op": "pause", "jobs": ("x",), "if_v": 1}, "invalid-field", "if_v"),
        ({"op": "pause", "where": ALL, "if_v": 1}, "invalid-field", "if_v"),
        ({"op": "pause", "job": "x", "args": {"now": 1}}, "invalid-field", "now"),
        ({"op": "cancel", "job": "x", "args": {"force": 1}}, "invalid-field", "force"),
        ({"op": "priority", "job": "x"}, "invalid-field", "priority"),
        ({"op": "priority", "job": "x", "args": {"priority": "a"}}, "invalid-field", "priority"),
        ({"op": "start", "job": "x", "args": {"kind": "once"}}, "invalid-field", "job"),
        ({"op": "start", "where": ALL, "args": {"kind": "once"}}, "invalid-field", "f"),
        ({"op": "start", "if_v": 1, "args": {"kind": "once"}}, "invalid-field", "if_v"),
        ({"op": "start"}, "invalid-field", "kind"),
        ({"op": "start", "args": {"kind": "once", "params": 5}}, "invalid-field", "params"),
        ({"op": "start", "args": {"kind": "once", "sons": 5}}, "invalid-field", "sons"),
    ],
)
async def test_a_malformed_command_is_refused_at_once(
    tmp_path: Path, command: dict[str, Any], code: str, field: str
) -> None:
    """The refusal names the field, and comes before anything is waited for."""
    async with World(tmp_path, ONCE) as world:
        answer = Desk(Commands(world.manager)).submit(**command).result()
        assert (answer.code, answer.field) == (code, field)


@pytest.mark.parametrize(
    ("command", "code", "field"),
    [
        ({"op": "pause", "job": "x"}, "job-unknown", None),
        ({"op": "retry", "job": "x"}, "job-unknown", None),
        ({"op": "delete", "job": "x"}, "job-unknown", None),
        ({"op": "priority", "job": "x", "args": {"priority": 10}}, "invalid-field", "priority"),
        ({"op": "start", "args": {"kind": "nope"}}, "unknown-kind", "kind"),
        ({"op": "start", "args": {"kind": "upload"}}, "kind-not-startable", "kind"),
        ({"op": "start", "args": {"kind": "once", "params": {"x": 1}}}, None, "params.x"),
        ({"op": "start", "args": {"kind": "once", "not_before": "2990-01-01"}}, None, "not_before"),
    ],
)
async def test_a_wrong_command_is_refused(
    tmp_path: Path, command: dict[str, Any], code: str | None, field: str | None
) -> None:
    """The refusal is the one that the other doors give."""
    async with World(tmp_path, ONCE) as world:
        answer = await Desk(Commands(world.manager)).submit(**command)
        assert (answer.code, answer.field) == (code or "invalid-field", field)


async def test_each_command_does_what_it_says(tmp_path: Path) -> None:
    """Start, priority, change, pause, resume, cancel, retry and delete, and what each answers."""
    async with World(tmp_path, HOLD) as world:
        desk = Desk(Commands(world.manager))
        asked = {"kind": "hold", "name": "by hand", "priority": 2}
        made = await desk.submit("start", args=asked)
        job = await world.until(made.job, "running")
        assert (made.version, job.name, job.client) == (1, "by hand", "tab")
        await desk.submit("priority", job.id, args={"priority": 8})
        assert (await world.job(job.id)).priority == 8
        await desk.submit("change", job.id, args={"name": "renamed", "priority": 1})
        changed = await world.job(job.id)
        assert (changed.name, changed.priority) == ("renamed", 1)
        for op, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
            answer = await desk.submit(op, job.id)
            assert answer.job == job.id
            assert (await world.until(job.id, state)).version >= answer.version
        again = await desk.submit("retry", job.id)
        assert (await world.job(again.job)).retry_of == job.id
        assert (await desk.submit("cancel", again.job, args={"force": True})).job == again.job
        assert await desk.submit("delete", job.id) == Outcome(job.id, None, None, [], 0)
        assert code_of(await desk.submit("delete", job.id)) == "job-unknown"


@pytest.mark.parametrize("op", ["pause", "cancel", "priority", "retry", "delete"])
async def test_a_command_may_name_the_version_that_it_means(tmp_path: Path, op: str) -> None:
    """With if_v a command is refused if the job has changed since."""
    async with World(tmp_path, ONCE) as world:
        jobs = await (ended if op in ("retry", "delete") else waiting)(world, 1)
        version = (await world.job(jobs[0])).version
        desk = Desk(Commands(world.manager))
        args = {"priority": 6} if op == "priority" else {}
        refused = await desk.submit(op, jobs[0], if_v=version - 1, args=args)
        assert code_of(refused) == "version-mismatch"
        assert code_of(await desk.submit(op, jobs[0], if_v=version, args=args)) is None


async def test_jobs_of_others_are_unknown(tmp_path: Path) -> None:
    """Neither one by one, nor in a list, nor by a filter."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager), "bob")
        assert code_of(await desk.submit("cancel", job)) == "job-unknown"
        many = await desk.submit("cancel", jobs=(job,))
        assert (many.n, many.failures, code_of(many.failed[0][1])) == (0, 1, "job-unknown")
        assert (await desk.submit("cancel", where=Filter(owner="bob"))).n == 0
        assert (await world.job(job)).version == 1


async def test_after_the_close_nothing_is_answered_but_all_is_done(tmp_path: Path) -> None:
    """What was submitted before the close is obeyed, what comes after it is not."""
    async with World(tmp_path, ONCE) as world:
        jobs = await waiting(world, 2)
        desk = Desk(Commands(world.manager))
        desk.submit("pause", jobs[0])
        desk.submit("cancel", jobs[0])
        desk.session.close()
        desk.submit("cancel", jobs[1])
        await world.until(jobs[0], "cancelled")
        assert (await world.job(jobs[1])).state == "scheduled"
        assert desk.answered == []


async def test_what_the_end_of_the_service_cuts_off_is_answered(tmp_path: Path) -> None:
    """When the service stops, each command has one answer: what came of it, or that it stops."""
    world = World(tmp_path, ONCE)
    await world.open()
    [job] = await waiting(world, 1)
    desk = Desk(Commands(world.manager))
    answers = [desk.submit(("pause", "resume")[i % 2], job) for i in range(IN_FLIGHT)]
    await world.close()
    codes = [code_of(answer) for answer in await asyncio.gather(*answers)]
    assert set(codes) <= {None, "stopping"}
    assert len(desk.answered) == IN_FLIGHT


async def test_a_fault_of_ours_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody expected is answered as internal, alone and in a list."""

    class Odd(msgspec.Struct, forbid_unknown_fields=True):
        def __post_init__(self) -> None:
            raise RuntimeError("a fault")

    async with World(tmp_path, a_kind("odd", once, Params=Odd)) as world:
        desk = Desk(Commands(world.manager))
        with caplog.at_level(logging.ERROR):
            answer = await desk.submit("start", args={"kind": "odd"}, key="k")
        assert code_of(answer) == "internal"
        assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["a fault"]
        assert await world.state.used(OWNER, "k") is None


async def test_commands_race_with_those_of_others(tmp_path: Path) -> None:
    """Two connections at one job: each command is decided on the row that it finds, and none lost.

    Both read the same version in the same turn, so one of each pair must decide anew.
    """
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        commands = Commands(world.manager)
        desks = [Desk(commands) for _ in range(4)]
        answers = await asyncio.gather(
            *(
                desk.submit("priority", job, args={"priority": i + j}, key=f"{i} {j}")
                for j in range(5)
                for i, desk in enumerate(desks)
            )
        )
        history = await world.history(job)
        assert [event.version for event in history] == list(range(1, len(history) + 1))
        for n, answer in enumerate(answers):
            used = await world.state.used(OWNER, f"{n % 4} {n // 4}")
            assert used is not None
            assert (used.job, used.version) == (answer.job, answer.version)
        last = await asyncio.gather(desks[0].submit("pause", job), desks[1].submit("cancel", job))
        assert [code_of(answer) for answer in last] == [None, None]
        assert last[1].version == last[0].version + 1
        await world.until(job, "cancelled")


# ---- Keys ----


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("op", ["start", "pause", "priority", "cancel", "retry", "delete"])
async def test_a_repeat_is_told_what_came_of_the_first(
    tmp_path: Path, op: str, restarted: bool
) -> None:
    """The same command under the same key is done once, also over the death of the service."""
    async with World(tmp_path, ONCE) as world:
        jobs = await (ended if op in ("retry", "delete") else waiting)(world, 1)
        args: dict[str, Any] = {}
        if op == "priority":
            args = {"priority": 6}
        elif op == "start":
            args = {"kind": "once", "not_before": "2990-01-01T00:00:00Z"}
        fields: dict[str, Any] = {
            "job": None if op == "start" else jobs[0],
            "args": args,
            "key": "k",
        }
        first = await Desk(Commands(world.manager)).submit(op, **fields)
        assert code_of(first) is None
        if op == "retry":  # the new job goes its own way meanwhile
            await world.until(first.job, "succeeded")
        if restarted:
            await world.restart()
        before = len(await all_jobs(world)), world.state._seq
        again = await Desk(Commands(world.manager)).submit(op, **fields)
        assert again == first
        assert (len(await all_jobs(world)), world.state._seq) == before


async def test_a_command_that_changes_nothing_spends_its_key(tmp_path: Path) -> None:
    """A repeat does not do later what was needless at first."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager))
        needless = await desk.submit("resume", job, key="a")
        same = await desk.submit("priority", job, args={"priority": 5}, key="b")
        assert (needless.version, same.version) == (1, 1)
        await desk.submit("priority", job, args={"priority": 9})
        again = await desk.submit("priority", job, args={"priority": 5}, key="b")
        assert again == same
        assert (await world.job(job)).priority == 9


async def test_a_key_is_for_one_command(tmp_path: Path) -> None:
    """Another command under the key is refused, in flight and later; another owner's is not."""
    async with World(tmp_path, ONCE) as world:
        jobs = await waiting(world, 2)
        commands = Commands(world.manager)
        desk = Desk(commands)
        first = desk.submit("pause", jobs[0], key="k")
        assert code_of(desk.submit("pause", jobs[1], key="k").result()) == "key-reused"
        await first
        assert code_of(await desk.submit("cancel", jobs[0], key="k")) == "key-reused"
        assert code_of(await desk.submit("cancel", jobs=tuple(jobs), key="k")) == "key-reused"
        other = await Desk(commands, "bob").submit("cancel", jobs[0], key="k")
        assert code_of(other) == "job-unknown"
        assert (await world.job(jobs[1])).version == 1


async def test_a_repeat_in_flight_waits_for_the_first(tmp_path: Path) -> None:
    """Whatever connection it comes by, it gets the same answer, and one job is made."""
    async with World(tmp_path, ONCE) as world:
        commands = Commands(world.manager)
        desks = [Desk(commands) for _ in range(3)]
        args = {"kind": "once", "not_before": "2990-01-01T00:00:00Z"}
        answers = await asyncio.gather(
            *(desk.submit("start", args=args, key="k") for desk in desks for _ in range(2))
        )
        assert [job.id for job in await all_jobs(world)] == [answers[0].job]
        assert answers == [answers[0]] * 6


async def test_a_command_that_comes_alone_does_not_wait_for_another(tmp_path: Path) -> None:
    """A repeat in flight is refused where nobody waits; later it is told what came of the first."""
    async with World(tmp_path, ONCE) as world:
        commands = Commands(world.manager)
        args = StartRequest(kind="once", params={})
        asked = Command(op="start", args=args, key="k")

        def run() -> Any:
            return commands.run(asked, owner=OWNER, client="tab", via="rest")

        first: Any
        second: Any
        first, second = await asyncio.gather(run(), run(), return_exceptions=True)
        assert code_of(second) == "key-in-flight"
        assert first.row is not None and not first.replayed
        again = await run()
        assert again.replayed and again.outcome == first.outcome
        by_tab = await Desk(commands).submit("start", args={"kind": "once"}, key="k")
        assert by_tab == first.outcome
        assert len(await all_jobs(world)) == 1


async def test_a_caller_that_has_gone_takes_no_command_back(tmp_path: Path) -> None:
    """What was given is obeyed although nobody waits for the answer any more."""
    async with World(tmp_path, ONCE) as world:
        commands = Commands(world.manager)
        starts = tuple(StartRequest(kind="once") for _ in range(60))
        asked = Command(op="start", starts=starts, key="k")
        task = asyncio.create_task(commands.run(asked, owner=OWNER, client="", via="rest"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def found() -> Any:
            return await world.manager.used(OWNER, "k")

        while await found() is None:
            await asyncio.sleep(0.002)
        assert len(await all_jobs(world)) == 60


async def test_repeats_across_connections_wait_in_no_circle(tmp_path: Path) -> None:
    """Two connections that repeat each other's commands, in opposite orders, are both answered."""
    async with World(tmp_path, ONCE) as world:
        jobs = await waiting(world, 2)
        commands = Commands(world.manager)
        one, two = Desk(commands), Desk(commands)
        both = tuple(jobs)
        asked: list[tuple[Desk, str]] = [
            (one, "pause"),
            (two, "cancel"),
            (one, "cancel"),
            (two, "pause"),
        ]
        answers = await asyncio.gather(*(desk.submit(op, jobs=both, key=op) for desk, op in asked))
        assert answers[0] == answers[3]
        assert answers[1] == answers[2]


async def test_a_refused_command_leaves_its_key(tmp_path: Path) -> None:
    """What was refused can be asked for again under the same key."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        desk = Desk(Commands(world.manager))
        assert code_of(await desk.submit("delete", job, key="k")) == "job-live"
        await desk.submit("cancel", job)
        await world.until(job, "cancelled")
        assert (await desk.submit("delete", job, key="k")).job == job


async def test_the_manager_spends_a_key_once(tmp_path: Path) -> None:
    """Commands under one key that reach the manager together are obeyed once."""
    async with World(tmp_path, ONCE) as world:
        [job] = await waiting(world, 1)
        done = await asyncio.gather(
            *(
                world.manager.command(
                    job, verb, owner=OWNER, by=world.by(), key=Key(OWNER, "k", verb)
                )
                for verb in ("pause", "cancel", "pause")
            ),
            return_exceptions=True,
        )
        assert [type(result) for result in done] == [tuple, Spent, Spent]
        assert (await world.job(job)).state == "paused"


async def test_old_keys_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a day a key's row is removed."""
    monkeypatch.setattr(manager, "_RETENTION_S", 0.05)
    async with World(tmp_path, ONCE) as world:
        real = time.time_ns
        with monkeypatch.context() as earlier:
            earlier.setattr(time, "time_ns", lambda: real() - (KEY_KEPT_MS + 1000) * 1_000_000)
            await world.state.spend(Key(OWNER, "old", ""), "j", 1)
        await world.state.spend(Key(OWNER, "new", ""), "j", 1)
        other = sqlite3.connect(tmp_path / "state.db")

        def is_forgotten() -> bool:
            return other.execute("SELECT key FROM keys").fetchall() == [("new",)]

        await eventually(is_forgotten, "the old key is gone")
        other.close()


# ---- Many jobs ----


async def test_failures_do_not_fail_a_list(tmp_path: Path) -> None:
    """Each job is named once, what failed is told with its reason, and the rest is done."""
    async with World(tmp_path, ONCE) as world:
        good, [bad] = await waiting(world, 2), await ended(world, 1)
        desk = Desk(Commands(world.manager))
        jobs = (good[0], bad, "nobody", good[1], good[0])
        answer = await desk.submit("pause", jobs=jobs, key="k")
        assert (answer.job, answer.version, answer.n, answer.failures) == (None, None, 2, 2)
        failed = [(job, error.code) for job, error in answer.failed]
        assert failed == [(bad, "job-finished"), ("nobody", "job-unknown")]
        assert {(await world.job(job)).state for job in good} == {"paused"}
        await world.restart()
        seq = world.state._seq
        again = await Desk(Commands(world.manager)).submit("pause", jobs=jobs, key="k")
        assert plain(again) == plain(answer)
        assert world.state._seq == seq


async def test_at_most_a_hundred_failures_are_named(tmp_path: Path) -> None:
    """All are counted."""
    async with World(tmp_path, ONCE) as world:
        jobs = tuple(f"nobody {i}" for i in range(230))
        answer = await Desk(Commands(world.manager)).submit("cancel", jobs=jobs)
        assert (answer.n, answer.failures) == (0, 230)
        assert [job for job, _ in answer.failed] == list(jobs[:100])


async def test_a_filter_takes_all_that_match(tmp_path: Path) -> None:
    """Over many pages no row is skipped: live jobs for a pause, ended ones for a delete."""
    async with World(tmp_path, ONCE) as world:
        jobs = await waiting(world, 620)
        kept = await ended(world, 2)
        desk = Desk(Commands(world.manager))
        assert await desk.submit("pause", where=ALL) == Outcome(None, None, 620, [], 0)
        assert await world.state.counts(OWNER) == {"paused": 620, "cancelled": 2}
        few = Filter(owner=OWNER, states=("cancelled",))
        assert (await desk.submit("delete", where=few)).n == len(kept)
        assert (await desk.submit("cancel", where=ALL)).n == 620
        for job in jobs:
            await world.until(job, "cancelled")
        assert await desk.submit("delete", where=ALL) == Outcome(None, None, 620, [], 0)
        assert await all_jobs(world) == []
        assert (await desk.submit("delete", where=ALL)).n == 0


async def test_a_filter_with_states_is_taken_at_its_word(tmp_path: Path) -> None:
    """What a state does not allow is a failure, not left out."""
    async with World(tmp_path, ONCE) as world:
        await ended(world, 3)
        where = Filter(owner=OWNER, states=("cancelled",))
        answer = await Desk(Commands(world.manager)).submit("pause", where=where)
        assert (answer.n, answer.failures) == (0, 3)
        assert {error.code for _, error in answer.failed} == {"job-finished"}


async def test_a_retry_of_all_does_not_retry_what_it_makes(tmp_path: Path) -> None:
    """Jobs that it has made, and that end at once, are not among those that it takes."""
    async with World(tmp_path, ONCE) as world:
        jobs = [await world.start("once") for _ in range(260)]
        for job in jobs:
            await world.until(job, "succeeded")
        answer = await Desk(Commands(world.manager)).submit("retry", where=ALL)
        assert answer.n == 260
        made = [job.retry_of for job in await all_jobs(world) if job.retry_of is not None]
        assert sorted(made) == sorted(jobs)


async def test_a_repeat_after_a_crash_goes_on_with_the_rest(tmp_path: Path) -> None:
    """A retry of all that died in the middle retries each job once in the end, and no new one."""
    async with World(tmp_path, ONCE) as world:
        jobs = await ended(world, 300)
        seq = world.state._seq
        desk = Desk(Commands(world.manager))
        answer = desk.submit("retry", where=ALL, key="k")
        await world.state.wait(seq + 60)
        await world.crash()
        await answer
        await world.open()
        made = [job for job in await all_jobs(world) if job.retry_of is not None]
        assert 0 < len(made) < 300
        for job in made:
            await world.until(job.id, "succeeded")
        again = await Desk(Commands(world.manager)).submit("retry", where=ALL, key="k")
        assert again == Outcome(None, None, 300, [], 0)
        of = [job.retry_of for job in await all_jobs(world) if job.retry_of is not None]
        assert sorted(of) == sorted(jobs)
        third = await Desk(Commands(world.manager)).submit("retry", where=ALL, key="k")
        assert third == again


async def test_a_repeat_does_what_could_not_be_done_at_first(tmp_path: Path) -> None:
    """A failure that may pass leaves the key: the same command again does only the rest."""
    kinds: list[Kind] = [ONCE, HOLD]
    async with World(tmp_path, *kinds, limits=Limits(slots=1)) as world:
        jobs = tuple(await ended(world, 60))
        blocker = await world.start("hold")
        await world.until(blocker, "running")
        world.manager.limits = Limits(slots=1, max_queued=20)
        desk = Desk(Commands(world.manager))
        first = await desk.submit("retry", jobs=jobs, key="k")
        assert first.n > 0
        assert {error.code for _, error in first.failed} == {"queue-full"}
        world.manager.limits = Limits(slots=1)
        second = await desk.submit("retry", jobs=jobs, key="k")
        assert second == Outcome(None, None, 60, [], 0)
        made = [job.retry_of for job in await all_jobs(world) if job.retry_of is not None]
        assert sorted(made) == sorted(jobs)
