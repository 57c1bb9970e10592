"""What every State backend must do.

A backend's test module inherits these classes and provides the fixtures ``new_url`` (each call
names an empty store), ``url`` (one of them) and ``state`` (that one, open). Nothing here looks
behind the contract in ``storage/__init__.py``.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
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
from storage import (
    KEY_KEPT_MS,
    UNSET,
    Artifact,
    By,
    Commit,
    Creation,
    Fenced,
    File,
    Filter,
    Job,
    Key,
    Page,
    Progress,
    Result,
    Rollback,
    Spent,
    Stale,
    State,
    Transfer,
    Undo,
    Used,
    open_state,
)
from tests.storage.rows import FINAL, a_file, a_job, its_event, moved

NewUrl = Callable[[], str]

# A model has no disk to wait for, and reading the same rows back is the point, not surviving.
MODEL = settings(
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

KEY = Key("ann", "k1", "print")


async def start(state: State, job: Job, **options: Any) -> Job:
    """Create a job; the row as it was stored."""
    made, created = await state.create(job, its_event(job), **options)
    assert created
    return made


async def start_all(state: State, jobs: Sequence[Job]) -> list[Job]:
    """Create jobs in this order."""
    return await asyncio.gather(*(start(state, job) for job in jobs))


async def move(
    state: State,
    job: Job,
    to: str,
    *,
    fence: int | None = None,
    files: Sequence[File] = (),
    **change: Any,
) -> Job:
    """Commit the job's next version; the row that was written. ``fence`` is the writer's."""
    after = moved(job, to, **change)
    await state.commit(
        after, its_event(after, job), was_version=job.version, fence=fence, files=files
    )
    return after


async def the(state: State, job_id: str = "j1") -> Job:
    """The stored row, which must be there."""
    job = await state.get(job_id)
    assert job is not None
    return job


async def forget(state: State, job: Job) -> int:
    """Delete a job."""
    gone = moved(job, "deleted")
    return await state.delete(job.id, its_event(gone, job), was_version=job.version)


async def store(state: State, *files: File) -> None:
    """Add files by the commit of a job of their own."""
    job = await start(state, a_job(f"of {files[0].id}"))
    await move(state, job, "succeeded", files=files)


async def log_of(state: State) -> list[tuple[int, str, int, str]]:
    """The whole event log, shortened."""
    events = await state.events(0, 100_000)
    return [(event.seq, event.job, event.version, event.to) for event in events]


async def log_at_rest(state: State) -> tuple[list[tuple[int, str, int, str]], int]:
    """The event log and its ``oldest``, read with no trimming between the two."""
    while True:
        before, log = await state.oldest(), await log_of(state)
        if await state.oldest() == before:
            return log, before


def ids(jobs: Sequence[Job | File]) -> list[str]:
    return [job.id for job in jobs]


def is_saved(job: Job) -> tuple[Any, ...]:
    """What only ``save`` writes."""
    return job.cursor, job.undo, job.stored_bytes, job.durable_bytes


class Creating:
    """``create``."""

    async def test_a_job_reads_back_as_it_was_given(self, state: State) -> None:
        """Every field of a row survives, and only the number and the incarnation are new."""
        job = a_job(
            client="browser 7",
            name="żółw 🐢.csv",
            state="failed",
            want="cancel",
            reason="expired",
            version=7,
            attempt=3,
            priority=9,
            rank=-(10**14),
            params={"rows": 3, "nested": {"a": [1, None, "ü"]}},
            started_at=1_100,
            ended_at=1_200,
            not_before=1_300,
            deadline_at=1_400,
            deadline_step=1,
            expires_at=1_500,
            retry_of="j0",
            by=By(actor="you", via="ws", at=1_050),
            transfer=Transfer(protocol="tus", resumable=True, length_bytes=1 << 40, file="f9"),
            limit_bytes_per_s=1_000_000,
            progress=Progress(done=5, total=9, unit="rows", rate_per_s=1.5, eta_s=(1.0, 2.5)),
            rollback=Rollback(done=1, total=2, failed=1),
            result=Result(file="f1", data={"rows": 2**53}),
            artifacts=(Artifact(name="a.txt", file="f2", bytes=3, media_type="text/plain"),),
            error={"code": "kind-failed", "status": 500},
            fence=4,
            cursor={"at": [1, 2, {"x": None}]},
            undo=(Undo(name="drop", args={"table": "t"}),),
            stored_bytes=1 << 41,
            durable_bytes=1 << 40,
        )
        made = await start(state, job)
        assert made == msgspec.structs.replace(job, h=made.h, incarnation=made.incarnation)
        assert await state.get("j1") == made

    async def test_numbers_grow(self, state: State) -> None:
        """Each new job has a higher number than all before it."""
        jobs = await start_all(state, [a_job(f"j{i}") for i in range(50)])
        later = await start(state, a_job("later"))
        numbers = [job.h for job in jobs]
        assert len(set(numbers)) == 50
        assert min(numbers) > 0
        assert later.h > max(numbers)

    async def test_the_number_of_a_deleted_job_is_not_given_again(self, state: State) -> None:
        """Deleting the newest job does not make its number free."""
        job = await start(state, a_job())
        await forget(state, job)
        assert (await start(state, a_job("j2"))).h > job.h

    async def test_the_first_event_carries_the_number(self, state: State) -> None:
        """The event's row knows the number, though its maker could not."""
        await start(state, a_job("j0"))
        job = await start(state, a_job(name='"h":0', params={"h": 0}))
        event = (await state.history("j1", 0, 10))[0]
        assert json.loads(bytes(event.row))["h"] == job.h

    async def test_a_live_name_is_held_by_one_job(self, state: State) -> None:
        """A second job of a live name is not made, not logged; the first is returned as it is."""
        first = await start(state, a_job(), live_name="numbers")
        first = await move(state, first, "running")
        again, created = await state.create(
            a_job("j2"), its_event(a_job("j2")), live_name="numbers"
        )
        assert not created
        assert (again.id, again.state, again.version) == ("j1", "running", 2)
        assert await state.get("j2") is None
        assert await log_of(state) == [(1, "j1", 1, "queued"), (2, "j1", 2, "running")]

    @pytest.mark.parametrize("final", FINAL)
    async def test_the_end_frees_the_live_name(self, state: State, final: str) -> None:
        """A name can be taken again once its job has ended, however it ended."""
        first = await start(state, a_job(), live_name="numbers")
        await move(state, first, final)
        second = await start(state, a_job("j2"), live_name="numbers")
        assert second.id == "j2"

    async def test_the_holder_of_a_live_name_is_found(self, state: State) -> None:
        """Whatever it is called now, and for its owner only."""
        job = await start(state, a_job(), live_name="held")
        found = await state.holder(job.owner, "held")
        assert found is not None
        assert found.id == job.id
        assert await state.holder("bob", "held") is None
        assert await state.holder(job.owner, job.name) is None

    async def test_live_names_belong_to_owners(self, state: State) -> None:
        """Two owners may use one live name, and jobs made without one never collide."""
        await start(state, a_job(), live_name="numbers")
        await start(state, a_job("j2", owner="bob"), live_name="numbers")
        await start(state, a_job("j3"))
        await start(state, a_job("j4"))

    async def test_a_new_display_name_keeps_the_live_name(self, state: State) -> None:
        """Renaming a job does not let go of the name under which it is unique."""
        first = await start(state, a_job(), live_name="numbers")
        await move(state, first, "queued", name="letters")
        again, created = await state.create(
            a_job("j2"), its_event(a_job("j2")), live_name="numbers"
        )
        assert (again.id, created) == ("j1", False)

    async def test_racing_creations_make_one_job(self, state: State) -> None:
        """Of many creations of one live name at once, one makes the job and all get that one."""
        done = await asyncio.gather(
            *(
                state.create(a_job(f"j{i}"), its_event(a_job(f"j{i}")), live_name="numbers")
                for i in range(20)
            )
        )
        assert [created for _, created in done].count(True) == 1
        assert len({job.id for job, _ in done}) == 1


class Committing:
    """``commit``."""

    async def test_row_and_event_move_together(self, state: State) -> None:
        """After a commit the row is new, and its event is in the log and in the history."""
        job = await start(state, a_job())
        after = moved(job, "running", started_at=1_700, name="renamed", priority=8, want="pause")
        seq = await state.commit(after, its_event(after, job), was_version=1)
        assert seq == 2
        stored = await the(state)
        assert stored == msgspec.structs.replace(after, incarnation=stored.incarnation)
        assert (await state.events(1, 10))[0] == msgspec.structs.replace(
            its_event(after, job), seq=2
        )
        assert [event.version for event in await state.history("j1", 0, 10)] == [1, 2]

    async def test_an_old_version_is_refused_whole(self, state: State) -> None:
        """Stale leaves no row, no event, no file behind."""
        job = await start(state, a_job())
        after = await move(state, job, "running")
        stored = await the(state)
        with pytest.raises(Stale):
            await move(state, job, "paused", files=[a_file()])
        assert await the(state) == stored
        assert await log_of(state) == [(1, "j1", 1, "queued"), (2, "j1", 2, "running")]
        assert await state.file("f1", None) is None
        await move(state, after, "paused")

    async def test_a_version_from_the_future_is_refused(self, state: State) -> None:
        """Stale means different, not only older."""
        job = await start(state, a_job())
        with pytest.raises(Stale):
            await move(state, msgspec.structs.replace(job, version=5), "running")

    async def test_an_unknown_job_is_stale(self, state: State) -> None:
        """A commit can't make a job, nor bring a deleted one back."""
        with pytest.raises(Stale):
            await move(state, a_job("nobody"), "running")
        job = await start(state, a_job())
        await forget(state, job)
        with pytest.raises(Stale):
            await move(state, job, "running")

    async def test_an_old_fence_is_refused_whole(self, state: State) -> None:
        """A runner whose lease has passed to another changes nothing."""
        await start(state, a_job())
        old = (await state.claim(["count"], 1))[0]
        running = await move(state, old, "running", fence=old.fence)
        await move(state, running, "queued")
        new = (await state.claim(["count"], 1))[0]
        with pytest.raises(Fenced):
            await move(state, new, "running", fence=old.fence, files=[a_file()])
        assert (await the(state)).state == "queued"
        assert await state.file("f1", None) is None
        assert len(await log_of(state)) == 3
        await move(state, new, "running", fence=new.fence)

    async def test_a_command_needs_no_fence(self, state: State) -> None:
        """Without a fence only the version counts."""
        await start(state, a_job())
        leased = (await state.claim(["count"], 1))[0]
        await move(state, leased, "paused")
        assert (await the(state)).state == "paused"

    async def test_the_fence_never_falls(self, state: State) -> None:
        """A command that read the row before the claim does not give the old fence back."""
        before = await start(state, a_job())
        leased = (await state.claim(["count"], 1))[0]
        await move(state, before, "paused")
        assert (await the(state)).fence == leased.fence
        with pytest.raises(Fenced):
            await state.save("j1", before.fence, cursor=1)

    async def test_a_commit_can_raise_the_fence(self, state: State) -> None:
        """A take-over makes what the earlier holder may still write void."""
        job = await start(state, a_job(state="running"))
        after = moved(job, "running", fence=job.fence + 1)
        await state.commit(after, its_event(after, job), was_version=1)
        with pytest.raises(Fenced):
            await state.save("j1", job.fence, stored_bytes=1)
        await state.save("j1", job.fence + 1, stored_bytes=2)

    async def test_one_of_many_commits_of_a_version_wins(self, state: State) -> None:
        """Concurrent commits on one version: exactly one is kept, the others are Stale."""
        job = await start(state, a_job())
        done = await asyncio.gather(
            *(move(state, job, "running", reason=f"r{i}") for i in range(25)),
            return_exceptions=True,
        )
        won = [result for result in done if isinstance(result, Job)]
        assert len(won) == 1
        assert all(isinstance(result, Stale) for result in done if result is not won[0])
        assert (await the(state)).reason == won[0].reason
        assert len(await log_of(state)) == 2

    async def test_a_commit_leaves_what_is_saved(self, state: State) -> None:
        """A commit from an older reading does not set cursor, journal and offsets back."""
        job = await start(state, a_job())
        journal = (Undo(name="drop", args={"n": 1}),)
        await state.save("j1", 0, cursor=[7], undo=journal, stored_bytes=30, durable_bytes=20)
        await move(state, job, "running")
        assert is_saved(await the(state)) == ([7], journal, 30, 20)

    async def test_a_save_leaves_what_is_committed(self, state: State) -> None:
        """A save that is queued with a commit, before or after it, keeps the new row."""
        job = await start(state, a_job())
        await asyncio.gather(
            state.save("j1", 0, cursor="a"),
            move(state, job, "running", reason="why"),
            state.save("j1", 0, stored_bytes=3),
        )
        row = await the(state)
        assert (row.state, row.version, row.reason) == ("running", 2, "why")
        assert (row.cursor, row.stored_bytes) == ("a", 3)

    async def test_the_log_has_no_holes(self, state: State) -> None:
        """Numbers of events follow each other, whatever fails between them."""
        jobs = await start_all(state, [a_job(f"j{i}") for i in range(30)])
        stale = a_job("j1", version=9)
        work: list[Coroutine[Any, Any, object]] = []
        for i, job in enumerate(jobs):
            work.append(move(state, job, "running"))
            work.append(move(state, stale, "paused"))
            work.append(move(state, a_job(f"nobody {i}"), "running"))
            work.append(state.save(job.id, 99, cursor=i))
        await asyncio.gather(*work, return_exceptions=True)
        assert [seq for seq, *_ in await log_of(state)] == list(range(1, 61))

    async def test_files_come_with_the_commit(self, state: State) -> None:
        """Several files can be added by one commit, and they count versions name by name."""
        job = await start(state, a_job())
        await move(
            state,
            job,
            "succeeded",
            files=[a_file("f1"), a_file("f2"), a_file("f3", name="other.csv")],
        )
        found = [await state.file(file_id, None) for file_id in ("f1", "f2", "f3")]
        assert [file.version for file in found if file] == [1, 2, 1]

    async def test_a_commit_that_fails_inside_leaves_nothing(self, state: State) -> None:
        """If a file can't be added (its id is taken), row and event are not written either."""
        await store(state, a_file("f1"))
        job = await start(state, a_job())
        before = await log_of(state)
        with pytest.raises(SluiceError):
            await move(state, job, "succeeded", files=[a_file("f2"), a_file("f1", name="b")])
        assert await state.get("j1") == job
        assert await log_of(state) == before
        assert await state.file("f2", None) is None
        assert await state.stored(None) == (1, 10)


class Saving:
    """``save``."""

    async def test_a_save_is_no_event(self, state: State) -> None:
        """Cursor, progress, offsets and journal move without a version and without an event."""
        job = await start(state, a_job())
        progress = Progress(done=3, total=9, phase="reading", message="…", eta_s=(1.0, 2.0))
        journal = (Undo(name="drop", args={"n": 1}), Undo(name="free", args={}))
        await state.save(
            "j1",
            0,
            cursor={"row": 3},
            progress=progress,
            stored_bytes=50,
            durable_bytes=40,
            undo=journal,
        )
        row = await the(state)
        assert is_saved(row) == ({"row": 3}, journal, 50, 40)
        assert row.progress == progress
        assert (row.version, row.state) == (job.version, job.state)
        assert len(await log_of(state)) == 1

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("cursor", {"b": 2}),
            ("cursor", None),
            ("cursor", 0),
            ("progress", Progress(done=9)),
            ("stored_bytes", 0),
            ("durable_bytes", 0),
            ("undo", ()),
        ],
    )
    async def test_each_field_moves_alone(self, state: State, field: str, value: Any) -> None:
        """What is not given to a save stays, also when the new value looks like nothing."""
        job = a_job(
            cursor={"a": 1},
            progress=Progress(done=1),
            stored_bytes=5,
            durable_bytes=4,
            undo=(Undo(name="drop", args={}),),
        )
        made = await start(state, job)
        await state.save("j1", 0, **{field: value})
        row = await the(state)
        expected = msgspec.structs.replace(made, saved_at=row.saved_at, **{field: value})
        assert row == expected

    async def test_the_time_of_the_last_save_is_kept(self, state: State) -> None:
        """A save tells when it happened, and a commit does not."""
        job = await start(state, a_job())
        await move(state, job, "running")
        assert (await the(state)).saved_at == 0
        await state.save("j1", 0, stored_bytes=1)
        assert (await the(state)).saved_at > 1_600_000_000_000

    @pytest.mark.parametrize("fence", [0, 2, -1])
    async def test_another_fence_is_refused(self, state: State, fence: int) -> None:
        """Only the newest lease may save, neither an older nor an invented one."""
        await start(state, a_job(cursor="kept"))
        leased = (await state.claim(["count"], 1))[0]
        assert leased.fence == 1
        with pytest.raises(Fenced):
            await state.save("j1", fence, cursor="lost", stored_bytes=9)
        row = await the(state)
        assert (row.cursor, row.stored_bytes) == ("kept", 0)

    async def test_a_job_that_is_gone_is_fenced(self, state: State) -> None:
        """Saving for a deleted or unknown job tells the runner to stop."""
        job = await start(state, a_job())
        await forget(state, job)
        with pytest.raises(Fenced):
            await state.save("j1", 0, cursor=1)
        with pytest.raises(Fenced):
            await state.save("nobody", 0, cursor=1)

    async def test_saving_nothing_still_asks_for_the_fence(self, state: State) -> None:
        """An empty save is fine for the holder and refused for others."""
        await start(state, a_job())
        await state.save("j1", 0)
        with pytest.raises(Fenced):
            await state.save("j1", 1)


def modelled(
    queued: list[Job],
    slots: int,
    kinds: Sequence[str],
    room: dict[str, int],
    most: int | None,
    busy: dict[str, int],
    turns: dict[tuple[int, bool], str],
) -> list[Job]:
    """What a claim gives, by sorting all that waits for each single job."""
    taken: list[Job] = []
    while len(taken) < slots:
        able = [
            job
            for job in queued
            if job not in taken
            and job.kind in kinds
            and room.get(job.kind, 1) > 0
            and (most is None or busy.get(job.owner, 0) < most)
        ]
        if not able:
            break

        def place(job: Job) -> tuple[Any, ...]:
            level = job.priority, job.rank >= 0
            passed = job.owner <= turns.get(level, "")
            return -level[0], level[1], passed, job.owner, job.rank, job.h

        job = min(able, key=place)
        taken.append(job)
        turns[job.priority, job.rank >= 0] = job.owner
        busy[job.owner] = busy.get(job.owner, 0) + 1
        if job.kind in room:
            room[job.kind] -= 1
    return taken


class Claiming:
    """``claim`` and ``renew``."""

    async def test_the_queue_is_ordered(self, state: State) -> None:
        """Higher priority first, then lower rank, then age."""
        dice = random.Random(4)
        jobs = [
            a_job(f"j{i}", priority=dice.randrange(3), rank=dice.randrange(-3, 3))
            for i in range(60)
        ]
        made = await start_all(state, jobs)
        expected = sorted(made, key=lambda job: (-job.priority, job.rank, job.h))
        claimed: list[Job] = []
        for _ in range(9):
            claimed += await state.claim(["count"], 7)
        assert ids(claimed) == ids(expected)

    async def test_only_as_many_as_there_are_slots(self, state: State) -> None:
        """A claim gives at most so many, fewer if there are fewer, none for no slots."""
        await start_all(state, [a_job(f"j{i}") for i in range(5)])
        assert await state.claim(["count"], 0) == []
        assert await state.claim(["count"], -1) == []
        assert len(await state.claim(["count"], 3)) == 3
        assert len(await state.claim(["count"], 3)) == 2
        assert await state.claim(["count"], 3) == []

    async def test_only_the_kinds_that_were_named(self, state: State) -> None:
        """A worker gets no job that it can not run."""
        await start_all(state, [a_job(kind, kind=kind) for kind in ("a", "b", "c")])
        assert await state.claim([], 9) == []
        assert await state.claim(["nothing"], 9) == []
        assert ids(await state.claim({"c", "a"}, 9)) == ["a", "c"]

    async def test_only_queued_jobs(self, state: State) -> None:
        """No other state can be claimed."""
        others = ("scheduled", "running", "pausing", "paused", "cancelling", *FINAL)
        await start_all(state, [a_job(word, state=word) for word in others])
        assert await state.claim(["count"], 99) == []

    async def test_a_lease_changes_no_state(self, state: State) -> None:
        """A claim moves the fence and nothing that anyone watches."""
        made = await start(state, a_job(cursor=5, progress=Progress(done=2)))
        leased = (await state.claim(["count"], 1))[0]
        assert leased == msgspec.structs.replace(
            made, fence=made.fence + 1, incarnation=leased.incarnation
        )
        assert await the(state) == leased
        assert len(await log_of(state)) == 1

    async def test_a_leased_job_is_not_given_again(self, state: State) -> None:
        """Until its claim is committed a job stays with the one who got it."""
        await start(state, a_job())
        leased = (await state.claim(["count"], 1))[0]
        assert await state.claim(["count"], 1) == []
        await move(state, leased, "queued", name="renamed by somebody")
        assert await state.claim(["count"], 1) == []

    async def test_concurrent_claims_share_nothing(self, state: State) -> None:
        """Many claims at once never give one job twice, and together give all."""
        await start_all(state, [a_job(f"j{i}") for i in range(40)])
        batches = await asyncio.gather(*(state.claim(["count"], 3) for _ in range(20)))
        given = [job.id for batch in batches for job in batch]
        assert len(given) == len(set(given)) == 40

    async def test_each_claim_raises_the_fence(self, state: State) -> None:
        """A job that comes back to the queue is leased under a higher fence."""
        await start(state, a_job())
        fences = []
        for _ in range(3):
            leased = (await state.claim(["count"], 1))[0]
            fences.append(leased.fence)
            running = await move(state, leased, "running", fence=leased.fence)
            await move(state, running, "queued", fence=leased.fence)
        assert fences == sorted(set(fences))

    async def test_a_lease_that_was_paused_away_is_void(self, state: State) -> None:
        """Pause and resume between claim and commit give the job to the next claim."""
        await start(state, a_job())
        first = (await state.claim(["count"], 1))[0]
        paused = await move(state, first, "paused")
        await move(state, paused, "queued")
        second = (await state.claim(["count"], 1))[0]
        assert second.fence > first.fence
        with pytest.raises(Fenced):
            await move(state, second, "running", fence=first.fence)

    async def test_a_lease_can_be_given_back(self, state: State) -> None:
        """The holder's own commit, under its fence, ends the lease though the job stays queued."""
        await start(state, a_job())
        leased = (await state.claim(["count"], 1))[0]
        await move(state, leased, "queued", fence=leased.fence)
        assert ids(await state.claim(["count"], 1)) == ["j1"]

    async def test_owners_take_turns(self, state: State) -> None:
        """Of each owner one job in a cycle, however many another one has; then its next oldest."""
        await start_all(state, [a_job(f"ann{i}", owner="ann") for i in range(6)])
        await start_all(state, [a_job(f"bob{i}", owner="bob") for i in range(2)])
        await start_all(state, [a_job(f"cid{i}", owner="cid", kind="b") for i in range(2)])
        first = ids(await state.claim(["count", "b"], 2))
        rest = ids(await state.claim(["count", "b"], 5)) + ids(await state.claim(["count", "b"], 9))
        assert first == ["ann0", "bob0"]
        assert rest == ["cid0", "ann1", "bob1", "cid1", "ann2", "ann3", "ann4", "ann5"]

    async def test_an_owner_that_comes_late_has_the_next_turn(self, state: State) -> None:
        """Nobody waits for what others had queued before."""
        await start_all(state, [a_job(f"zoe{i}", owner="zoe") for i in range(50)])
        assert len(await state.claim(["count"], 5)) == 5
        await start(state, a_job("late", owner="ann"))
        assert "late" in ids(await state.claim(["count"], 2))

    async def test_priority_comes_before_turns(self, state: State) -> None:
        """Turns are taken among jobs of one priority, and who ran before precedes those."""
        await start_all(
            state,
            [
                a_job("a low", priority=1),
                a_job("a high", priority=2),
                a_job("a high too", priority=2),
                a_job("b low", priority=1, owner="bob"),
                a_job("b ran", priority=1, owner="bob", rank=-5),
            ],
        )
        assert ids(await state.claim(["count"], 9)) == [
            "a high",
            "a high too",
            "b ran",
            "a low",
            "b low",
        ]

    async def test_the_oldest_of_an_owner_whatever_its_kind(self, state: State) -> None:
        """Kinds do not take turns: an owner's jobs start in their order."""
        kinds = "abbabaab"
        jobs = [a_job(f"j{i}", kind=kind, rank=i) for i, kind in enumerate(kinds)]
        await start_all(state, jobs)
        claimed = [
            *await state.claim(["a", "b"], 3),
            *await state.claim(["a", "b"], 9),
        ]
        assert ids(claimed) == [f"j{i}" for i in range(8)]

    async def test_a_full_kind_is_passed_over(self, state: State) -> None:
        """No more start of a limited kind than it has room for; others go ahead."""
        await start_all(state, [a_job(f"a{i}", kind="a") for i in range(5)])
        await start_all(state, [a_job(f"b{i}", kind="b") for i in range(3)])
        await start(state, a_job("low", kind="b", priority=0))
        assert ids(await state.claim(["a", "b"], 9, room={"a": 2})) == [
            "a0",
            "a1",
            "b0",
            "b1",
            "b2",
            "low",
        ]
        assert await state.claim(["a", "b"], 9, room={"a": 0}) == []
        assert ids(await state.claim(["a"], 9, room={"a": 1, "b": 0})) == ["a2"]

    async def test_an_owner_holds_so_many_slots(self, state: State) -> None:
        """What an owner holds already counts, and the others' turns come sooner."""
        await start_all(state, [a_job(f"ann{i}", priority=9) for i in range(5)])
        await start_all(state, [a_job(f"bob{i}", owner="bob", kind="b") for i in range(5)])
        claimed = await state.claim(["count", "b"], 9, owner_slots=3, busy={"bob": 2})
        assert ids(claimed) == ["ann0", "ann1", "ann2", "bob0"]
        assert await state.claim(["count", "b"], 9, owner_slots=3, busy={"ann": 3, "bob": 9}) == []

    async def test_any_claim_is_that_of_the_model(self, state: State) -> None:
        """Whatever is queued and full: priority, who ran before, turns, age, and the limits."""
        dice = random.Random(6)
        turns: dict[tuple[int, bool], str] = {}
        queued: list[Job] = []
        for round_ in range(30):
            jobs = [
                a_job(
                    f"{round_}.{i}",
                    owner=dice.choice("abcd"),
                    kind=dice.choice("xyz"),
                    priority=dice.randrange(2),
                    rank=dice.randrange(-2, 9),
                )
                for i in range(dice.randrange(8))
            ]
            queued += await start_all(state, jobs)
            room = {kind: dice.randrange(4) for kind in "xyz" if dice.random() < 0.5}
            busy = {owner: dice.randrange(3) for owner in "abcd"}
            most = dice.choice([None, 2, 3])
            slots = dice.randrange(1, 7)
            kinds = ["x", "y"] if dice.random() < 0.3 else ["x", "y", "z"]
            expected = modelled(queued, slots, kinds, dict(room), most, dict(busy), turns)
            claimed = await state.claim(kinds, slots, room=room, owner_slots=most, busy=busy)
            assert ids(claimed) == ids(expected), round_
            queued = [job for job in queued if job.id not in ids(claimed)]

    async def test_renewing_tells_what_is_lost(self, state: State) -> None:
        """A lease is lost to a newer fence or with the job; all others are kept."""
        await start_all(state, [a_job(f"j{i}") for i in range(3)])
        leased = await state.claim(["count"], 3)
        gone = await move(state, leased[1], "failed", fence=leased[1].fence)
        await forget(state, gone)
        leases = [(job.id, job.fence) for job in leased]
        assert await state.renew([*leases, ("j2", 0), ("nobody", 1)]) == ["j1", "j2", "nobody"]
        assert await state.renew([]) == []


class Chaining:
    """Jobs that wait for others."""

    async def test_parents_tell_how_they_have_ended(self, state: State) -> None:
        """Each that a blocked job waits for, with its end as soon as there is one."""
        one, two = await start_all(state, [a_job("p1"), a_job("p2")])
        await start(state, a_job("c", state="scheduled", after=("p1", "p2"), blocked=True))
        assert await state.parents("c") == {"p1": None, "p2": None}
        running = await move(state, one, "running")
        assert await state.parents("c") == {"p1": None, "p2": None}
        await move(state, running, "failed")
        await move(state, two, "succeeded")
        assert await state.parents("c") == {"p1": "failed", "p2": "succeeded"}

    async def test_the_end_of_a_deleted_parent_is_kept(self, state: State) -> None:
        """A job does not wait for one that is gone, and knows how that one ended."""
        one, _ = await start_all(state, [a_job("p1"), a_job("p2")])
        await start(state, a_job("c", state="scheduled", after=("p1", "p2"), blocked=True))
        await forget(state, await move(state, one, "cancelled"))
        assert await state.parents("c") == {"p1": "cancelled", "p2": None}
        assert await state.overdue("", 9) == ["c"]

    async def test_a_state_knows_whether_anybody_waits(self, url: str) -> None:
        """So that who does not is asked for nothing; also after a restart."""
        state = open_state(url, "interval")
        await state.open()
        await start_all(state, [a_job("p"), a_job("q", after=("p",))])
        assert not state.chained()
        await start(state, a_job("c", state="scheduled", after=("p",), blocked=True))
        assert state.chained()
        await state.close()
        state = open_state(url, "interval")
        await state.open()
        assert state.chained()
        await state.close()

    async def test_followers_come_in_pages(self, state: State) -> None:
        """All blocked jobs that wait for one, by id."""
        await start_all(state, [a_job("p"), a_job("q")])
        assert await state.followers("p", "", 9) == []
        for child in "dbac":
            await start(state, a_job(child, state="scheduled", after=("p",), blocked=True))
        await start(state, a_job("e", state="scheduled", after=("q",), blocked=True))
        await start(state, a_job("f", after=("p",)))
        assert await state.followers("p", "", 3) == ["a", "b", "c"]
        assert await state.followers("p", "c", 3) == ["d"]
        assert await state.followers("q", "", 9) == ["e"]

    async def test_who_waits_no_more_is_no_follower(self, state: State) -> None:
        """The commit that unblocks a job ends its waiting, and a pause does not."""
        await start(state, a_job("p"))
        child = await start(state, a_job("c", state="scheduled", after=("p",), blocked=True))
        child = await move(state, child, "paused")
        assert await state.followers("p", "", 9) == ["c"]
        await move(state, child, "queued", blocked=False)
        assert (await state.followers("p", "", 9), await state.parents("c")) == ([], {})

    async def test_overdue(self, state: State) -> None:
        """Blocked jobs of which something has ended, in pages by id."""
        p, _ = await start_all(state, [a_job("p"), a_job("q")])
        for child, parent in (("c1", "p"), ("c2", "q"), ("c3", "p")):
            await start(state, a_job(child, state="scheduled", after=(parent,), blocked=True))
        assert await state.overdue("", 9) == []
        await move(state, p, "succeeded")
        assert await state.overdue("", 1) == ["c1"]
        assert await state.overdue("c1", 9) == ["c3"]

    @pytest.mark.parametrize("parent", ["nobody", "bobs"])
    async def test_what_is_waited_for_must_be_there(self, state: State, parent: str) -> None:
        """A job that waits for none of the owner's is not made."""
        await start_all(state, [a_job("p"), a_job("bobs", owner="bob")])
        child = a_job("c", state="scheduled", after=("p", parent), blocked=True)
        with pytest.raises(SluiceError, match=parent):
            await start(state, child)
        assert await state.get("c") is None
        assert await state.followers("p", "", 9) == []

    async def test_the_clock_leaves_a_blocked_job_alone(self, state: State) -> None:
        """Its time counts once it waits for nobody."""
        await start(state, a_job("p"))
        child = await start(
            state, a_job("c", state="scheduled", after=("p",), blocked=True, not_before=100)
        )
        assert await state.due(200) == ([], None)
        await move(state, child, "scheduled", blocked=False)
        assert ids((await state.due(200))[0]) == ["c"]

    async def test_a_follower_is_made_with_its_job(self, state: State) -> None:
        """Both or neither, each with its number and its first event."""
        first = a_job("p", state="running")
        child = a_job("c", state="scheduled", after=("p",), blocked=True)
        made, _ = await state.create(
            first, its_event(first), live_name="n", follower=(child, its_event(child), "then/p")
        )
        assert (await the(state, "c")).h == made.h + 1
        assert await state.parents("c") == {"p": None}
        assert [entry[1:] for entry in await log_of(state)] == [
            ("p", 1, "running"),
            ("c", 1, "scheduled"),
        ]
        holder = await state.holder(child.owner, "then/p")
        assert holder is not None
        assert holder.id == "c"
        again, other = a_job("p2"), a_job("c2", state="scheduled", after=("p2",), blocked=True)
        await state.create(
            again, its_event(again), live_name="n", follower=(other, its_event(other), "then/p2")
        )
        assert (await state.get("p2"), await state.get("c2")) == (None, None)
        broken = a_job("c3", state="scheduled", after=("nobody",), blocked=True)
        with pytest.raises(SluiceError):
            await state.create(
                again, its_event(again), follower=(broken, its_event(broken), "then/x")
            )
        assert (await state.get("p2"), await state.get("c3")) == (None, None)

    async def test_states_of_an_owners_jobs(self, state: State) -> None:
        """Those that there are, and no other owner's."""
        await start_all(state, [a_job("p"), a_job("q", state="failed"), a_job("r", owner="bob")])
        assert await state.states(["p", "q", "r", "s"], "ann") == {"p": "queued", "q": "failed"}
        assert await state.states([], "ann") == {}

    async def test_how_many_wait(self, state: State) -> None:
        """Queued and scheduled jobs of each owner that has some."""
        await start_all(
            state,
            [
                a_job("a"),
                a_job("b", state="scheduled", kind="other"),
                a_job("c", state="paused"),
                a_job("d", owner="bob"),
                a_job("e", owner="cid", state="running"),
            ],
        )
        assert await state.waiting() == {"ann": 2, "bob": 1}


def cells() -> st.SearchStrategy[list[dict[str, str]]]:
    """Jobs that differ in all that a filter knows."""
    return st.lists(
        st.fixed_dictionaries(
            {
                "owner": st.sampled_from(["ann", "bob"]),
                "kind": st.sampled_from(["count", "upload", "digest"]),
                "state": st.sampled_from(["queued", "running", "succeeded", "failed"]),
                "name": st.sampled_from(["x", "y", "żółw"]),
                "client": st.sampled_from(["", "tab 1"]),
            }
        ),
        max_size=25,
    )


def filters() -> st.SearchStrategy[Filter]:
    """Filters of every shape, also with values that repeat or match nothing."""
    return st.builds(
        Filter,
        owner=st.sampled_from([None, "ann", "bob", "eve"]),
        kinds=st.lists(st.sampled_from(["count", "upload", "none"]), max_size=3).map(tuple),
        states=st.lists(st.sampled_from(["queued", "succeeded", "failed", "none"]), max_size=3).map(
            tuple
        ),
        name=st.sampled_from([None, "x", "y", ""]),
        client=st.sampled_from([None, "", "tab 1"]),
        live=st.booleans(),
    )


def matches(job: Job, wanted: Filter) -> bool:
    """The filter in plain Python."""
    return (
        wanted.owner in (None, job.owner)
        and (not wanted.kinds or job.kind in wanted.kinds)
        and (not wanted.states or job.state in wanted.states)
        and wanted.name in (None, job.name)
        and wanted.client in (None, job.client)
        and (not wanted.live or job.ended_at is None)
    )


class Finding:
    """The queries over jobs."""

    async def test_get_knows_the_owner(self, state: State) -> None:
        """A job is there for its owner and for the service, for nobody else."""
        job = await start(state, a_job())
        assert await state.get("j1") == job
        assert await state.get("j1", "ann") == job
        assert await state.get("j1", "bob") is None
        assert await state.get("j1", "") is None
        assert await state.get("nobody") is None

    @pytest.mark.parametrize(
        ("wanted", "found"),
        [
            (Filter(), "gfedcba"),
            (Filter(owner="ann"), "gfedca"),
            (Filter(owner="eve"), ""),
            (Filter(kinds=("upload",)), "fd"),
            (Filter(kinds=("upload", "digest")), "fed"),
            (Filter(states=("running", "paused")), "dc"),
            (Filter(states=("failed",), kinds=("upload",)), "f"),
            (Filter(name="y"), "fc"),
            (Filter(name="y", owner="ann", states=("paused",)), "c"),
            (Filter(client="tab"), "ge"),
            (Filter(client=""), "fdcba"),
            (Filter(live=True), "dcba"),
            (Filter(live=True, owner="ann", client=""), "dca"),
            (Filter(live=True, states=("failed",)), ""),
            (Filter(kinds=("count", "count"), states=("queued", "queued")), "ba"),
        ],
    )
    async def test_each_filter(self, state: State, wanted: Filter, found: str) -> None:
        """Every field that is given must match, a repeated value counts once."""
        await start_all(
            state,
            [
                a_job("a"),
                a_job("b", owner="bob"),
                a_job("c", state="paused", name="y"),
                a_job("d", kind="upload", state="running"),
                a_job("e", kind="digest", state="succeeded", client="tab"),
                a_job("f", kind="upload", state="failed", name="y"),
                a_job("g", state="cancelled", client="tab"),
            ],
        )
        page = await state.find(wanted, None, 50)
        assert "".join(ids(page.items)) == found
        assert page.next is None

    async def test_pages_follow_each_other(self, state: State) -> None:
        """Newest first; the key of a page begins the next one; the last page says so."""
        await start_all(state, [a_job(f"{i}") for i in range(7)])
        first = await state.find(Filter(owner="ann"), None, 3)
        second = await state.find(Filter(owner="ann"), first.next, 3)
        third = await state.find(Filter(owner="ann"), second.next, 3)
        pages = (first, second, third)
        assert [ids(page.items) for page in pages] == [["6", "5", "4"], ["3", "2", "1"], ["0"]]
        assert third.next is None

    async def test_a_full_last_page_has_no_next(self, state: State) -> None:
        """A page that ends exactly at the oldest job promises nothing more."""
        await start_all(state, [a_job(f"{i}") for i in range(3)])
        assert (await state.find(Filter(), None, 3)).next is None

    async def test_new_jobs_do_not_shift_pages(self, state: State) -> None:
        """What arrives or goes between two pages neither repeats nor hides a row."""
        jobs = await start_all(state, [a_job(f"{i}") for i in range(6)])
        first = await state.find(Filter(), None, 3)
        await start(state, a_job("new"))
        await forget(state, jobs[4])
        second = await state.find(Filter(), first.next, 3)
        assert ids(second.items) == ["2", "1", "0"]

    async def test_rows_are_found_as_they_are_now(self, state: State) -> None:
        """A commit moves a job from one answer to the other at once."""
        job = await start(state, a_job())
        await move(state, job, "succeeded", name="renamed")
        assert not (await state.find(Filter(states=("queued",)), None, 9)).items
        assert not (await state.find(Filter(name="numbers"), None, 9)).items
        assert not (await state.find(Filter(live=True), None, 9)).items
        stored = await the(state)
        for wanted in (Filter(states=("succeeded",)), Filter(name="renamed"), Filter(owner="ann")):
            assert (await state.find(wanted, None, 9)).items == [stored]

    async def test_any_number_of_values(self, state: State) -> None:
        """A filter with hundreds of kinds and states is answered like any other."""
        await start_all(state, [a_job("a"), a_job("b", kind="k7")])
        many = Filter(
            kinds=tuple(f"k{i}" for i in range(300)),
            states=("queued", *(f"s{i}" for i in range(300))),
        )
        assert ids((await state.find(many, None, 9)).items) == ["b"]

    @settings(MODEL)
    @given(
        rows=cells(), wanted=st.lists(filters(), min_size=1, max_size=8), limit=st.integers(1, 9)
    )
    def test_find_is_a_filter_over_a_list(
        self,
        runner: asyncio.Runner,
        new_url: NewUrl,
        rows: list[dict[str, str]],
        wanted: list[Filter],
        limit: int,
    ) -> None:
        """Paging through any filter gives what a plain Python model gives."""

        async def compare() -> None:
            state = open_state(new_url(), "never")
            await state.open()
            jobs = await start_all(state, [a_job(f"{i}", **row) for i, row in enumerate(rows)])
            for one in wanted:
                expected = [job for job in reversed(jobs) if matches(job, one)]
                found: list[Job] = []
                page = await state.find(one, None, limit)
                while True:
                    found += page.items
                    assert len(page.items) == limit or page.next is None
                    if page.next is None:
                        break
                    page = await state.find(one, page.next, limit)
                assert found == expected
            await state.close()

        runner.run(compare())

    async def test_counts(self, state: State) -> None:
        """Each state's jobs are counted, an owner's or all, through every change."""
        assert await state.counts(None) == {}
        jobs = await start_all(state, [a_job(f"{i}") for i in range(3)])
        await start(state, a_job("b", owner="bob", kind="upload", state="running"))
        assert await state.counts(None) == {"queued": 3, "running": 1}
        await move(state, jobs[0], "running")
        done = await move(state, jobs[1], "succeeded")
        await move(state, jobs[2], "queued", name="renamed")
        assert await state.counts("ann") == {"queued": 1, "running": 1, "succeeded": 1}
        assert await state.counts("bob") == {"running": 1}
        assert await state.counts(None) == {"queued": 1, "running": 2, "succeeded": 1}
        await forget(state, done)
        assert await state.counts("ann") == {"queued": 1, "running": 1}
        assert await state.counts("eve") == {}

    async def test_tally(self, state: State) -> None:
        """Jobs, of all owners or of one, are counted by kind and state, where there are any."""
        assert await state.tally(None) == []
        jobs = await start_all(state, [a_job(f"{i}") for i in range(3)])
        await start(state, a_job("b", owner="bob"))
        await start(state, a_job("c", owner="bob", kind="upload", state="running"))
        kind = jobs[0].kind
        assert sorted(await state.tally(None)) == [(kind, "queued", 4), ("upload", "running", 1)]
        assert sorted(await state.tally("bob")) == [(kind, "queued", 1), ("upload", "running", 1)]
        done = await move(state, jobs[1], "succeeded")
        assert sorted(await state.tally(None)) == [
            (kind, "queued", 3),
            (kind, "succeeded", 1),
            ("upload", "running", 1),
        ]
        await forget(state, done)
        assert sorted(await state.tally(None)) == [(kind, "queued", 3), ("upload", "running", 1)]

    async def test_a_refused_write_is_not_counted(self, state: State) -> None:
        """What was rolled back has never been in a count."""
        job = await start(state, a_job())
        await move(state, job, "running")
        with pytest.raises(Stale):
            await move(state, job, "paused")
        assert await state.counts(None) == {"running": 1}

    async def test_due(self, state: State) -> None:
        """Scheduled jobs whose time has come, the earliest first, and when the next one's comes."""
        await start_all(
            state,
            [
                a_job("late", state="scheduled", not_before=300),
                a_job("early", state="scheduled", not_before=100),
                a_job("now", state="scheduled", not_before=200),
                a_job("later", state="scheduled", not_before=400),
                a_job("waits for others", state="scheduled"),
                a_job("paused", state="paused", not_before=100),
            ],
        )
        jobs, following = await state.due(200)
        assert (ids(jobs), following) == (["early", "now"], 300)
        assert await state.due(99) == ([], 100)
        jobs, following = await state.due(1_000)
        assert (ids(jobs), following) == (["early", "now", "late", "later"], None)

    async def test_a_queued_job_is_no_longer_due(self, state: State) -> None:
        """A job leaves the clock with its state."""
        job = await start(state, a_job(state="scheduled", not_before=100))
        await move(state, job, "queued")
        assert await state.due(1_000) == ([], None)

    async def test_ahead(self, state: State) -> None:
        """The place in the queue is the place in the order of claims."""
        dice = random.Random(5)
        jobs = [
            a_job(
                f"{i}",
                priority=dice.randrange(3),
                rank=dice.randrange(-1, 3),
                owner=f"o{dice.randrange(4)}",
                kind=dice.choice(["a", "b"]),
            )
            for i in range(60)
        ]
        made = await start_all(state, jobs)
        await start(state, a_job("running", state="running", priority=9))
        before = await state.claim(["a", "b"], 3)  # the next turn is not the first owner's
        made = [job for job in made if job.id not in ids(before)]
        told = {job.id: await state.ahead(job) for job in made}
        order = await state.claim(["a", "b"], 60)
        assert [told[job.id] for job in order] == list(range(57))

    async def test_ahead_stops_counting(self, state: State) -> None:
        """Beyond a thousand the place in the queue is no longer exact."""
        await start_all(state, [a_job(f"{i}") for i in range(1_010)])
        last = await start(state, a_job("last"))
        assert await state.ahead(last) == 1_000

    async def test_ended_before(self, state: State) -> None:
        """Old final jobs, the longest ended first, never live ones."""
        await start_all(
            state,
            [
                a_job("c", state="failed", ended_at=300),
                a_job("a", state="succeeded", ended_at=100),
                a_job("b", state="cancelled", ended_at=200),
                a_job("live"),
            ],
        )
        assert ids(await state.ended_before(300, 9)) == ["a", "b"]
        assert ids(await state.ended_before(10_000, 2)) == ["a", "b"]
        assert await state.ended_before(100, 9) == []


class Searching:
    """``find`` with a text."""

    async def test_a_text_is_part_of_a_name_or_an_id(self, state: State) -> None:
        """In any case and script, together with the other filters; an id only as a whole."""
        names = ["Report.csv", "GRÖSSE 文件", "größe", "other"]
        jobs = [a_job(f"j{i}", name=name) for i, name in enumerate(names)]
        await start_all(state, [*jobs, a_job("j9", name="report 2", owner="bob")])

        async def found(text: str, **more: Any) -> list[str]:
            page = await state.find(Filter(owner="ann", text=text, **more), None, 9)
            assert page.next is None
            return ids(page.items)

        assert await found("report") == ["j0"]
        assert await found("GRÖSSE") == ["j2", "j1"]
        assert await found("größe") == ["j2", "j1"]
        assert await found("件") == ["j1"]
        assert await found("j3") == ["j3"]
        assert await found("j") == []
        assert await found("r", states=("running",)) == []
        assert await found("r", states=("queued",)) == ["j3", "j2", "j1", "j0"]
        assert await found("%") == []

    async def test_a_search_looks_at_so_many_at_a_time(self, state: State) -> None:
        """A page may be empty and promise more; following it finds each job once, newest first."""
        wanted = {0, 1, 700, 2500, 4001}
        made = [
            a_job(f"j{i}", name=f"needle {i}" if i in wanted else f"hay {i}") for i in range(4500)
        ]
        for at in range(0, len(made), 500):
            await start_all(state, made[at : at + 500])
        found, after, pages = [], None, 0
        while pages == 0 or after is not None:
            page = await state.find(Filter(owner="ann", text="NEEDLE"), after, 2)
            found += ids(page.items)
            assert len(page.items) <= 2
            after, pages = page.next, pages + 1
        assert found == ["j4001", "j2500", "j700", "j1", "j0"]
        assert pages <= 6


class Keying:
    """Keys of commands."""

    async def test_a_key_is_spent_with_the_change(self, state: State) -> None:
        """Each kind of change keeps, with its key, the job and the version after it."""
        made = await start(state, a_job(), key=KEY)
        await state.commit(
            after := moved(made, "failed"),
            its_event(after, made),
            was_version=1,
            key=KEY._replace(key="k2"),
        )
        gone = moved(after, "deleted")
        await state.delete("j1", its_event(gone, after), was_version=2, key=KEY._replace(key="k3"))
        await state.spend(KEY._replace(key="k4"), "j1", 3)
        assert [await state.used("ann", f"k{i}") for i in range(1, 6)] == [
            Used("print", "j1", 1),
            Used("print", "j1", 2),
            Used("print", "j1", 3),
            Used("print", "j1", 3),
            None,
        ]

    async def test_a_repeat_changes_nothing(self, state: State) -> None:
        """Under a spent key nothing is created, committed, deleted or spent, whatever it says."""
        job = await start(state, a_job(state="failed"), key=KEY)
        before = await log_of(state)
        after = moved(job, "queued")
        for repeat in (
            state.create(a_job("j2"), its_event(a_job("j2")), key=KEY),
            state.create(a_job("j2"), its_event(a_job("j2")), key=KEY._replace(fingerprint="?")),
            state.commit(after, its_event(after, job), was_version=1, key=KEY),
            state.commit(after, its_event(after, job), was_version=7, key=KEY),
            state.delete("j1", its_event(after, job), was_version=1, key=KEY),
            state.spend(KEY, "j2", 5),
        ):
            with pytest.raises(Spent) as spent:
                await repeat
            assert spent.value.used == Used("print", "j1", 1)
        assert await log_of(state) == before
        assert await the(state) == job
        assert await state.get("j2") is None

    async def test_keys_belong_to_owners(self, state: State) -> None:
        """The same key of another owner is another key."""
        await start(state, a_job(), key=KEY)
        assert await state.used("bob", "k1") is None
        await start(state, a_job("j2", owner="bob"), key=KEY._replace(owner="bob"))
        assert await state.used("bob", "k1") == Used("print", "j2", 1)
        assert await state.used("ann", "k1") == Used("print", "j1", 1)

    async def test_racing_creations_with_one_key_make_one_job(self, state: State) -> None:
        """Of commands that come together under one key one is obeyed."""
        done = await asyncio.gather(
            *(start(state, a_job(f"{i}"), key=KEY) for i in range(5)), return_exceptions=True
        )
        made = [result for result in done if isinstance(result, Job)]
        spent = [result.used.job for result in done if isinstance(result, Spent)]
        assert len(made) == 1
        assert spent == [made[0].id] * 4
        assert await state.counts(None) == {"queued": 1}

    async def test_a_held_live_name_spends_the_key_too(self, state: State) -> None:
        """A creation that finds the live job keeps that one with its key."""
        await start(state, a_job(), live_name="numbers")
        job = a_job("j2")
        _, created = await state.create(job, its_event(job), live_name="numbers", key=KEY)
        assert not created
        assert await state.used("ann", "k1") == Used("print", "j1", 1)

    async def test_a_change_that_fails_leaves_the_key(self, state: State) -> None:
        """A key is not spent by a change that was refused."""
        job = await start(state, a_job())
        after = moved(job, "running")
        with pytest.raises(Stale):
            await state.commit(after, its_event(after, job), was_version=7, key=KEY)
        with pytest.raises(Fenced):
            await state.commit(after, its_event(after, job), was_version=1, fence=9, key=KEY)
        with pytest.raises(Stale):
            await state.delete("j1", its_event(after, job), was_version=7, key=KEY)
        with pytest.raises(SluiceError):
            await state.create(job, its_event(job), key=KEY)
        assert await state.used("ann", "k1") is None
        await state.commit(after, its_event(after, job), was_version=1, key=KEY)
        assert await state.used("ann", "k1") == Used("print", "j1", 2)

    async def test_a_key_is_kept_for_a_day(
        self, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After 24 hours a key is as good as new."""
        began = time.time_ns() // 1_000_000
        now = began
        monkeypatch.setattr(time, "time_ns", lambda: now * 1_000_000)
        await start(state, a_job(), key=KEY)
        now = began + KEY_KEPT_MS - 1
        assert await state.used("ann", "k1") is not None
        with pytest.raises(Spent):
            await state.spend(KEY, "j1", 2)
        now = began + KEY_KEPT_MS
        assert await state.used("ann", "k1") is None
        await state.spend(KEY, "j1", 2)
        assert await state.used("ann", "k1") == Used("print", "j1", 2)

    async def test_keys_are_forgotten_in_slices(
        self, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The oldest keys go first, as many as were asked for."""
        began = time.time_ns() // 1_000_000
        for i in range(5):
            monkeypatch.setattr(time, "time_ns", lambda at=began + i: at * 1_000_000)
            await state.spend(KEY._replace(key=f"{i}"), "j1", i)
        assert await state.forget_keys(began + 4, 3) == 3
        assert await state.used("ann", "2") is None
        assert await state.used("ann", "3") is not None
        assert await state.forget_keys(began + 4, 3) == 1
        assert await state.forget_keys(began + 4, 3) == 0
        assert await state.used("ann", "4") is not None


class Deleting:
    """``delete``."""

    async def test_a_deleted_job_leaves_its_events(self, state: State) -> None:
        """Row and log lines go; the log keeps all that subscribers may not have read yet."""
        await start(state, a_job("other"))
        job = await move(state, await start(state, a_job()), "succeeded")
        await state.log("j1", ["line"], 5)
        assert await forget(state, job) == 4
        assert await state.get("j1") is None
        assert await state.lines("j1", 0, 9) == []
        assert await log_of(state) == [
            (1, "other", 1, "queued"),
            (2, "j1", 1, "queued"),
            (3, "j1", 2, "succeeded"),
            (4, "j1", 3, "deleted"),
        ]
        assert ids((await state.find(Filter(), None, 9)).items) == ["other"]

    async def test_an_old_version_is_not_deleted(self, state: State) -> None:
        """A job that has moved since it was read stays, with its history."""
        job = await start(state, a_job())
        await move(state, job, "failed")
        with pytest.raises(Stale):
            await forget(state, job)
        assert (await the(state)).state == "failed"
        assert len(await state.history("j1", 0, 9)) == 2

    async def test_a_job_is_deleted_once(self, state: State) -> None:
        """Of several deletions one wins, the others are Stale."""
        job = await start(state, a_job(state="failed"))
        done = await asyncio.gather(*(forget(state, job) for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(result, Stale) for result in done) == 4
        assert len(await log_of(state)) == 2

    async def test_files_outlive_their_job(self, state: State) -> None:
        """Deleting a job does not forget what it stored."""
        job = await start(state, a_job())
        done = await move(state, job, "succeeded", files=[a_file()])
        await forget(state, done)
        assert await state.file("f1", "ann") is not None


class Lines:
    """The log of a job."""

    async def test_lines_are_numbered(self, state: State) -> None:
        """Lines keep their order, text and time, and number on from call to call."""
        await start_all(state, [a_job(), a_job("j2")])
        await state.log("j1", ["one", "zwei 🐢", ""], 100)
        await state.log("j2", ["elsewhere"], 150)
        await state.log("j1", ["four"], 200)
        assert await state.lines("j1", 0, 9) == [
            (1, 100, "one"),
            (2, 100, "zwei 🐢"),
            (3, 100, ""),
            (4, 200, "four"),
        ]
        assert await state.lines("j1", 2, 1) == [(3, 100, "")]
        assert await state.lines("j1", 4, 9) == []
        assert await state.lines("nobody", 0, 9) == []

    async def test_the_tail(self, state: State) -> None:
        """A negative number asks for the last lines, oldest of them first."""
        await start(state, a_job())
        await state.log("j1", [f"{i}" for i in range(1, 6)], 1)
        assert [line for *_, line in await state.lines("j1", -2, 9)] == ["4", "5"]
        assert len(await state.lines("j1", -99, 9)) == 5
        assert await state.lines("nobody", -2, 9) == []

    async def test_the_oldest_lines_go(self, state: State) -> None:
        """A job keeps its newest 10,000 lines, under the numbers they had."""
        await start(state, a_job())
        await state.log("j1", [f"{i}" for i in range(1, 9_999)], 1)
        await state.log("j1", [f"{i}" for i in range(9_999, 10_006)], 2)
        lines = await state.lines("j1", 0, 20_000)
        assert len(lines) == 10_000
        assert (lines[0], lines[-1]) == ((6, 1, "6"), (10_005, 2, "10005"))
        assert (await state.lines("j1", -1, 9))[0][0] == 10_005

    async def test_no_lines(self, state: State) -> None:
        """Appending nothing is fine."""
        await start(state, a_job())
        await state.log("j1", [], 1)
        assert await state.lines("j1", 0, 9) == []


class Logging:
    """The event log and what waits for it."""

    async def test_events_read_back_as_they_were_given(self, state: State) -> None:
        """Every field of an event survives, and its row byte for byte."""
        job = await start(state, a_job())
        after = moved(job, "running")
        event = its_event(
            after,
            job,
            cause="taken-over",
            actor="żółw",
            row=msgspec.Raw(b'{"h":0,"z":[1.50, "\xc5\xbc"]}'),
        )
        await state.commit(after, event, was_version=1)
        stored = (await state.events(1, 9))[0]
        assert bytes(stored.row) == bytes(event.row)
        assert stored == msgspec.structs.replace(event, seq=2)

    async def test_events_after_a_cursor(self, state: State) -> None:
        """A reader gets what is newer than its cursor, oldest first, so many at a time."""
        await start_all(state, [a_job(f"j{i}") for i in range(6)])
        assert [event.seq for event in await state.events(0, 99)] == [1, 2, 3, 4, 5, 6]
        assert [event.seq for event in await state.events(2, 2)] == [3, 4]
        assert await state.events(6, 9) == []
        assert await state.events(99, 9) == []

    async def test_the_log_is_whole_from_its_oldest_on(self, url: str) -> None:
        """What is older than keep_events goes with jobs that are no more; of others it stays."""
        state = open_state(url, "never", 20)
        await state.open()
        stays = await move(state, await start(state, a_job("stays")), "succeeded")
        assert await state.oldest() == 1
        for i in range(30):
            await forget(state, await start(state, a_job(f"j{i}", state="failed")))
            newest, oldest = 2 + 2 * (i + 1), await state.oldest()
            assert newest + 1 - oldest >= min(20, newest)
            seqs = [seq for seq, *_ in await log_of(state)]
            assert seqs[-20:] == list(range(newest + 1 - len(seqs[-20:]), newest + 1))
            assert [event.seq for event in await state.history("stays", 0, 9)] == [1, 2]
        for _ in range(20):  # each commit may let some more go, after it was acknowledged
            await state.save("stays", 0, cursor=1)
        log, oldest = await log_at_rest(state)
        assert 62 + 1 - oldest <= 22
        assert [seq for seq, *_ in log] == [1, 2, *range(oldest, 63)]
        await state.close()
        state = open_state(url, "never", 20)
        await state.open()
        assert await state.oldest() == oldest
        await forget(state, stays)
        log, oldest = await log_at_rest(state)
        assert [seq for seq, *_ in log] == [*range(oldest, 64)]
        await state.close()

    async def test_the_history_of_a_job(self, state: State) -> None:
        """A job's own events after a version, oldest first."""
        job = await start(state, a_job())
        await start(state, a_job("j2"))
        for word in ("running", "pausing", "paused"):
            job = await move(state, job, word)
        words = [(event.version, event.to) for event in await state.history("j1", 0, 99)]
        assert words == [(1, "queued"), (2, "running"), (3, "pausing"), (4, "paused")]
        assert [event.version for event in await state.history("j1", 1, 2)] == [2, 3]
        assert await state.history("j1", 4, 9) == []
        assert await state.history("nobody", 0, 9) == []

    async def test_wait_returns_what_is_there(self, state: State) -> None:
        """Who is behind does not wait."""
        await start_all(state, [a_job(), a_job("j2")])
        assert await asyncio.wait_for(state.wait(0), 60) == 2
        assert await asyncio.wait_for(state.wait(1), 60) == 2

    async def test_a_commit_wakes_all_who_wait(self, state: State) -> None:
        """Everyone who waits learns of a commit when its event can be read."""
        job = await start(state, a_job())
        waiting = [asyncio.create_task(state.wait(1)) for _ in range(5)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await move(state, job, "running")
        assert await asyncio.wait_for(asyncio.gather(*waiting), 60) == [2] * 5
        assert (await state.events(1, 1))[0].seq == 2

    async def test_deleting_wakes_too(self, state: State) -> None:
        """The last event of a job is one to be told."""
        job = await start(state, a_job(state="failed"))
        waiting = asyncio.create_task(state.wait(1))
        await forget(state, job)
        assert await asyncio.wait_for(waiting, 60) == 2

    async def test_only_events_wake(self, state: State) -> None:
        """Saves, log lines and claims leave those who wait for events alone."""
        await start(state, a_job())
        waiting = asyncio.create_task(state.wait(1))
        await state.save("j1", 0, cursor=1)
        await state.log("j1", ["line"], 1)
        await state.claim(["count"], 1)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])

    async def test_who_gives_up_waiting_harms_nobody(self, state: State) -> None:
        """A cancelled wait does not disturb the others, nor the commit."""
        job = await start(state, a_job())
        impatient = asyncio.create_task(state.wait(1))
        patient = asyncio.create_task(state.wait(1))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait([impatient])
        await move(state, job, "running")
        assert await asyncio.wait_for(patient, 60) == 2

    async def test_progress_reaches_every_listener(self, state: State) -> None:
        """Each iteration of progress_in gets what is told from then on, in order."""

        async def listen() -> list[tuple[Any, ...]]:
            heard: list[tuple[Any, ...]] = []
            async for rows in state.progress_in():
                heard += rows
                if len(heard) >= 6:
                    break
            return heard

        listeners = [asyncio.create_task(listen()) for _ in range(3)]
        n = 0
        while not all(task.done() for task in listeners):
            await state.progress_out([("j1", n), ("j2", n)])
            n += 1
            await asyncio.sleep(0.001)
            assert n < 5_000
        for task in listeners:
            heard = [tuple(row) for row in task.result()]
            assert heard == sorted(heard, key=lambda row: row[1])
            assert {row[0] for row in heard} == {"j1", "j2"}

    async def test_progress_is_told_without_listeners(self, state: State) -> None:
        """Progress that nobody hears is lost, and that is fine."""
        await state.progress_out([("j1", 1)])
        await state.progress_out([])

    async def test_a_slow_listener_misses_only_old_progress(self, state: State) -> None:
        """Who does not keep up holds nobody up, and still hears the newest."""
        first = asyncio.Event()
        go_on = asyncio.Event()

        async def listen() -> int:
            async for rows in state.progress_in():
                first.set()
                await go_on.wait()
                if rows[-1][0] == 999:
                    return 999
            return -1

        task = asyncio.create_task(listen())
        while not first.is_set():
            await state.progress_out([(-1,)])
            await asyncio.sleep(0.001)
        for n in range(1_000):
            await state.progress_out([(n,)])
        go_on.set()
        assert await asyncio.wait_for(task, 60) == 999


class Filing:
    """Stored files."""

    async def test_a_file_reads_back_as_it_was_given(self, state: State) -> None:
        """Every field survives; number and version are given by the store."""
        file = a_file(
            name="żółw 🐢.csv",
            bytes=1 << 42,
            digest={"sha-256": "ab" * 32},
            job=None,
            expires_at=9_000,
            layout="zip",
        )
        await store(state, file)
        stored = await state.file("f1", "ann")
        assert stored is not None
        assert stored.h > 0
        assert stored == msgspec.structs.replace(file, h=stored.h, version=1)

    async def test_versions_count_for_each_owner_and_name(self, state: State) -> None:
        """Every new file of a name is its next version."""
        await store(state, a_file("f1"), a_file("f2"), a_file("f3", name="b"))
        await store(state, a_file("f4", owner="bob"), a_file("f5"))
        versions = {}
        for i in range(1, 6):
            file = await state.file(f"f{i}", None)
            assert file is not None
            versions[file.id] = file.version
        assert versions == {"f1": 1, "f2": 2, "f3": 1, "f4": 1, "f5": 3}

    async def test_the_version_of_a_deleted_file_is_not_given_again(self, state: State) -> None:
        """Not even when all versions of the name are gone."""
        await store(state, a_file("f1"), a_file("f2"))
        await state.delete_file("f1")
        await state.delete_file("f2")
        await store(state, a_file("f3"))
        newest = await state.newest("ann", "data.csv")
        assert newest is not None
        assert newest.version == 3

    async def test_concurrent_commits_number_versions_once(self, state: State) -> None:
        """Files stored at the same time get different versions."""
        await asyncio.gather(*(store(state, a_file(f"f{i}")) for i in range(20)))
        page = await state.find_files("ann", "data.csv", None, 50)
        assert sorted(file.version for file in page.items) == list(range(1, 21))

    async def test_newest(self, state: State) -> None:
        """The newest version of a name that is still there."""
        assert await state.newest("ann", "data.csv") is None
        await store(state, a_file("f1"), a_file("f2"))
        await store(state, a_file("f3", owner="bob"))
        newest = await state.newest("ann", "data.csv")
        assert newest is not None
        assert (newest.id, newest.version) == ("f2", 2)
        await state.delete_file("f2")
        assert ids([file for file in [await state.newest("ann", "data.csv")] if file]) == ["f1"]

    async def test_files_are_found_in_pages(self, state: State) -> None:
        """An owner's files, newest first, all or those of a name."""
        await store(state, *(a_file(f"{i}", name="ab"[i % 2]) for i in range(7)))
        await store(state, a_file("bob's", owner="bob", name="a"))
        first = await state.find_files("ann", None, None, 4)
        second = await state.find_files("ann", None, first.next, 4)
        assert ids(first.items) == ["6", "5", "4", "3"]
        assert (ids(second.items), second.next) == (["2", "1", "0"], None)
        named = await state.find_files("ann", "a", None, 3)
        assert ids(named.items) == ["6", "4", "2"]
        rest = await state.find_files("ann", "a", named.next, 3)
        assert (ids(rest.items), rest.next) == (["0"], None)
        assert (await state.find_files("ann", "c", None, 3)).items == []

    async def test_files_are_found_by_name_and_version(self, state: State) -> None:
        """Part of the name or the id finds files; of each name the newest that is left is one."""
        files = [a_file(f"f{i}", name=name) for i, name in enumerate(["Äa", "b", "ÄA", "b", "äa"])]
        await store(state, *files)
        await store(state, a_file("f9", owner="bob", name="b"))

        async def find(after: int | None = None, limit: int = 9, **how: Any) -> Page[File]:
            return await state.find_files("ann", how.pop("name", None), after, limit, **how)

        assert ids((await find(newest=True)).items) == ["f4", "f3", "f2", "f0"]
        assert ids((await find(text="ä")).items) == ["f4", "f2", "f0"]
        assert ids((await find(text="f1")).items) == ["f1"]
        assert ids((await find(text="b", newest=True)).items) == ["f3"]
        assert ids((await find(name="b", newest=True)).items) == ["f3"]
        assert ids((await find(name="b", text="a")).items) == []
        first = await find(newest=True, limit=2)
        rest = await find(first.next, newest=True, limit=2)
        assert (ids(first.items), ids(rest.items)) == (["f4", "f3"], ["f2", "f0"])
        assert rest.next is None
        await state.delete_file("f3")
        assert ids((await find(newest=True)).items) == ["f4", "f2", "f1", "f0"]

    async def test_a_search_for_files_looks_at_a_bounded_number(self, state: State) -> None:
        """However many versions a name has, one call ends soon; the pages together find all."""
        await store(state, a_file("first", name="old"))
        for start_at in range(0, 2500, 500):
            await store(state, *(a_file(f"f{start_at + i}") for i in range(500)))
        pages = [await state.find_files("ann", None, None, 9, newest=True)]
        while (after := pages[-1].next) is not None:
            pages.append(await state.find_files("ann", None, after, 9, newest=True))
        assert 1 < len(pages) < 5
        assert [file.id for page in pages for file in page.items] == ["f2499", "first"]

    async def test_a_deleted_file_is_gone(self, state: State) -> None:
        """No query finds it, its room is free, and deleting it again is fine."""
        await store(state, a_file("f1", expires_at=5), a_file("f2", bytes=7))
        await state.delete_file("f1")
        await state.delete_file("f1")
        await state.delete_file("unknown")
        assert await state.file("f1", None) is None
        assert ids((await state.find_files("ann", None, None, 9)).items) == ["f2"]
        assert await state.expired_files(1_000, 9) == []
        assert await state.stored("ann") == (1, 7)

    async def test_expired_files(self, state: State) -> None:
        """Files whose time has passed, the earliest first; most files have no such time."""
        await store(
            state,
            a_file("f3", expires_at=300),
            a_file("f1", expires_at=100),
            a_file("f2", expires_at=200, owner="bob"),
            a_file("for ever"),
        )
        assert ids(await state.expired_files(250, 9)) == ["f1", "f2"]
        assert ids(await state.expired_files(1_000, 2)) == ["f1", "f2"]
        assert await state.expired_files(50, 9) == []

    async def test_stored(self, state: State) -> None:
        """Files and bytes are counted, an owner's or all."""
        assert await state.stored(None) == (0, 0)
        await store(state, a_file("f1", bytes=1 << 40), a_file("f2", bytes=0))
        await store(state, a_file("f3", owner="bob", bytes=5))
        assert await state.stored("ann") == (2, 1 << 40)
        assert await state.stored("bob") == (1, 5)
        assert await state.stored("eve") == (0, 0)
        assert await state.stored(None) == (3, (1 << 40) + 5)

    async def test_digests_are_added(self, state: State) -> None:
        """New ones come to those that are there; what is known stays; nothing else changes."""
        await store(state, a_file("f1", digest={"sha-256": "ab"}), a_file("f2"), a_file("f3"))
        before = {file_id: await state.file(file_id, None) for file_id in ("f1", "f2", "f3")}
        seq = len(await log_of(state))
        await state.add_digests(
            {
                "f1": {"crc-32": "00000001", "sha-256": "cd"},
                "f2": {"crc-32": "00000002"},
                "unknown": {"crc-32": "00000003"},
            }
        )
        await state.add_digests({})
        expected = {
            "f1": {"sha-256": "ab", "crc-32": "00000001"},
            "f2": {"crc-32": "00000002"},
            "f3": {},
        }
        for file_id, digest in expected.items():
            file, known = await state.file(file_id, None), before[file_id]
            assert known is not None
            assert file == msgspec.structs.replace(known, digest=digest)
        assert len(await log_of(state)) == seq
        assert await state.stored("ann") == (3, 30)

    async def test_files_know_their_owner(self, state: State) -> None:
        """Another owner finds nothing by any query."""
        await store(state, a_file("f1"))
        assert await state.file("f1", "bob") is None
        assert await state.file("f1", None) is not None
        assert await state.newest("bob", "data.csv") is None
        assert (await state.find_files("bob", None, None, 9)).items == []
        assert (await state.find_files("bob", "data.csv", None, 9)).items == []


class Grouping:
    """Writes of many callers at the same time."""

    async def test_a_failing_write_fails_alone(self, state: State) -> None:
        """What is written together with a refused write is kept."""
        one = await start(state, a_job("one"))
        done = await asyncio.gather(
            start(state, a_job("two")),
            move(state, a_job("nobody"), "running"),
            move(state, one, "running"),
            state.save("one", 42, cursor="lost"),
            start(state, a_job("one")),
            state.log("one", ["kept"], 1),
            start(state, a_job("three")),
            return_exceptions=True,
        )
        failed = [type(result) for result in done if isinstance(result, BaseException)]
        assert failed == [Stale, Fenced, SluiceError]
        assert [(job, to) for _, job, _, to in await log_of(state)] == [
            ("one", "queued"),
            ("two", "queued"),
            ("one", "running"),
            ("three", "queued"),
        ]
        assert (await the(state, "one")).cursor is None
        assert await state.lines("one", 0, 9) == [(1, 1, "kept")]

    async def test_many_writes_at_once(self, state: State) -> None:
        """More writes than fit into one group are all made, each once."""
        jobs = await start_all(state, [a_job(f"{i}") for i in range(1_300)])
        await asyncio.gather(*(move(state, job, "running") for job in jobs))
        assert await state.counts(None) == {"running": 1_300}
        assert [seq for seq, *_ in await log_of(state)] == list(range(1, 2_601))

    async def test_writes_of_one_caller_keep_their_order(self, state: State) -> None:
        """A later save is never overtaken by an earlier one."""
        await start(state, a_job())
        await asyncio.gather(*(state.save("j1", 0, cursor=i) for i in range(100)))
        assert (await the(state)).cursor == 99

    async def test_an_acknowledged_write_is_read(self, state: State) -> None:
        """Whoever awaited a write sees it in every query."""
        for i in range(20):
            job = await start(state, a_job(f"{i}"))
            assert await state.get(job.id) == job
            assert (await state.find(Filter(), None, 1)).items == [job]
            assert (await state.events(i, 1))[0].job == job.id

    async def test_a_caller_that_leaves_takes_nothing_back(self, state: State) -> None:
        """A write whose caller is cancelled is made like the others, and so are they."""
        before = await start(state, a_job("one"))
        leaving = [
            asyncio.create_task(start(state, a_job("two"))),
            asyncio.create_task(move(state, before, "running")),
            asyncio.create_task(move(state, a_job("nobody"), "running")),
        ]
        staying = asyncio.create_task(start(state, a_job("three")))
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        assert (await staying).id == "three"
        done = await asyncio.gather(*leaving, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done)
        assert (await the(state, "one")).state == "running"
        assert (await the(state, "two")).state == "queued"
        assert len(await log_of(state)) == 4

    async def test_a_group_of_cancelled_callers(self, state: State) -> None:
        """If all callers have gone, the store goes on."""
        tasks = [asyncio.create_task(start(state, a_job(f"{i}"))) for i in range(5)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await start(state, a_job("last"))
        assert await state.counts(None) == {"queued": 6}


class Together:
    """Many creations or commits with one wait."""

    async def test_each_commit_is_by_itself(self, state: State) -> None:
        """One that is stale, fenced or spent changes nothing, and hinders no other."""
        jobs = await start_all(state, [a_job(f"j{i}") for i in range(5)])
        await state.spend(KEY, "j9", 9)
        after = [moved(job, "running") for job in jobs]
        commits = [
            Commit(new, its_event(new, job), job.version)
            for job, new in zip(jobs, after, strict=True)
        ]
        commits[1] = commits[1]._replace(was_version=7)
        commits[2] = commits[2]._replace(fence=3)
        commits[3] = commits[3]._replace(key=KEY)
        done = await state.commit_all(commits)
        assert [type(result) for result in done] == [int, Stale, Fenced, Spent, int]
        assert [seq for seq, *_ in await log_of(state)][5:] == [done[0], done[4]]
        for job, new, result in zip(jobs, after, done, strict=True):
            assert await the(state, job.id) == (new if isinstance(result, int) else job)
        assert await state.counts(None) == {"queued": 3, "running": 2}
        assert await state.commit_all([]) == []

    async def test_a_claimed_creation_is_both(self, state: State) -> None:
        """The row is the claimed one, the log has both events with the job's number."""
        job = a_job()
        claimed = moved(job, "running", fence=1)
        creation = Creation(job, its_event(job), claimed, its_event(claimed, job))
        [result] = await state.create_all([creation])
        assert isinstance(result, tuple)
        made, created = result
        assert created
        assert made == msgspec.structs.replace(job, h=made.h, incarnation=made.incarnation)
        assert made.h > 0
        now = await the(state)
        assert now == msgspec.structs.replace(claimed, h=made.h, incarnation=made.incarnation)
        events = await state.events(0, 10)
        assert [(event.version, event.from_, event.to) for event in events] == [
            (1, None, "queued"),
            (2, "queued", "running"),
        ]
        assert [msgspec.json.decode(event.row)["h"] for event in events] == [made.h] * 2
        assert await state.counts(None) == {"running": 1}
        assert await state.claim(["count"], 1) == []
        await move(state, now, "succeeded", fence=1)

    async def test_each_creation_is_by_itself(self, state: State) -> None:
        """A held live name gives its holder, a spent key is refused; others are made."""
        held = await start(state, a_job("j0"), live_name="only")
        await state.spend(KEY, "j9", 9)
        jobs = [a_job(f"j{i}") for i in range(1, 5)]
        creations = [
            Creation(job, its_event(job), new, its_event(new, job))
            for job, new in ((job, moved(job, "running")) for job in jobs)
        ]
        creations[1] = creations[1]._replace(live_name="only")
        creations[2] = creations[2]._replace(key=KEY)
        done = await state.create_all(creations)
        assert done[1] == (held, False)
        assert isinstance(done[2], Spent)
        assert [await state.get(f"j{i}") is not None for i in range(5)] == [1, 1, 0, 0, 1]
        assert await state.counts(None) == {"queued": 1, "running": 2}


class Restarting:
    """Closing and opening again."""

    async def test_a_restart_continues(self, url: str) -> None:
        """Epoch, numbers and the log stay; only the incarnation is new."""
        state = open_state(url, "interval")
        first = await state.open()
        assert first.seq == 0
        assert first.incarnation > 0
        assert first.epoch
        jobs = await start_all(state, [a_job("j1"), a_job("j2")])
        await state.close()
        state = open_state(url, "interval")
        second = await state.open()
        assert second == (first.epoch, first.incarnation + 1, 2, True)
        third = await start(state, a_job("j3"))
        assert third.h > max(job.h for job in jobs)
        assert [seq for seq, *_ in await log_of(state)] == [1, 2, 3]
        assert await asyncio.wait_for(state.wait(2), 60) == 3
        await state.close()

    async def test_the_log_goes_on_though_its_end_was_deleted(self, url: str) -> None:
        """Numbers that a cursor may have seen are not given again after a restart."""
        state = open_state(url, "interval")
        await state.open()
        jobs = await start_all(state, [a_job("j1"), a_job("j2", state="failed")])
        await forget(state, jobs[1])
        await state.close()
        state = open_state(url, "interval")
        assert (await state.open()).seq == 3
        assert (await start(state, a_job("j3"))).h > jobs[1].h
        assert [seq for seq, *_ in await log_of(state)] == [1, 2, 3, 4]
        await state.close()

    async def test_every_epoch_is_its_own(self, new_url: NewUrl) -> None:
        """Two stores never share an epoch."""
        epochs = set()
        for _ in range(3):
            state = open_state(new_url(), "never")
            epochs.add((await state.open()).epoch)
            await state.close()
        assert len(epochs) == 3

    async def test_all_rows_are_kept(self, url: str) -> None:
        """Jobs, what was saved, log lines, files, names and counts are as before."""

        async def everything(state: State) -> list[Any]:
            return [
                (await state.find(Filter(), None, 9)).items,
                await state.events(0, 99),
                await state.lines("j1", 0, 9),
                (await state.find_files("ann", None, None, 9)).items,
                await state.counts(None),
                await state.stored(None),
            ]

        state = open_state(url, "interval")
        await state.open()
        job = await start(state, a_job(), live_name="numbers")
        await state.save("j1", 0, cursor=[1], progress=Progress(done=4), stored_bytes=7)
        await move(state, job, "running", progress=Progress(done=5))
        await state.log("j1", ["line"], 3)
        await store(state, a_file("f1"), a_file("f2"))
        await state.delete_file("f2")
        before = await everything(state)
        await state.close()
        state = open_state(url, "interval")
        await state.open()
        assert await everything(state) == before
        again, created = await state.create(
            a_job("j9"), its_event(a_job("j9")), live_name="numbers"
        )
        assert (again.id, created) == ("j1", False)
        await store(state, a_file("f3"))
        newest = await state.newest("ann", "data.csv")
        assert newest is not None
        assert newest.version == 3
        await state.close()

    async def test_keys_are_kept(self, url: str) -> None:
        """A key that was spent is spent after a restart."""
        state = open_state(url, "interval")
        await state.open()
        await start(state, a_job(), key=KEY)
        await state.close()
        state = open_state(url, "interval")
        await state.open()
        assert await state.used("ann", "k1") == Used("print", "j1", 1)
        with pytest.raises(Spent):
            await start(state, a_job("j2"), key=KEY)
        await state.close()

    async def test_rows_tell_whose_they_are(self, url: str) -> None:
        """A row belongs to the incarnation that wrote or leased it last."""
        state = open_state(url, "interval")
        first = await state.open()
        jobs = await start_all(state, [a_job("moved"), a_job("leased"), a_job("untouched")])
        await state.close()
        state = open_state(url, "interval")
        second = await state.open()
        await move(state, jobs[0], "running")
        leased = (await state.claim(["count"], 1))[0]
        await state.save("untouched", 0, cursor=1)
        assert leased.incarnation == second.incarnation
        found = (await state.find(Filter(), None, 9)).items
        assert {job.id: job.incarnation for job in found} == {
            "moved": second.incarnation,
            "leased": second.incarnation,
            "untouched": first.incarnation,
        }
        await state.close()

    async def test_leases_end_with_their_incarnation(self, url: str) -> None:
        """A claim that was not committed is void after a restart, and its fence stays used."""
        state = open_state(url, "interval")
        await state.open()
        await start(state, a_job())
        old = (await state.claim(["count"], 1))[0]
        await state.close()
        state = open_state(url, "interval")
        await state.open()
        new = (await state.claim(["count"], 1))[0]
        assert new.fence > old.fence
        with pytest.raises(Fenced):
            await state.save("j1", old.fence, cursor=1)
        await state.close()

    async def test_closing_writes_what_is_queued(self, url: str) -> None:
        """A write that was begun before the close is made."""
        state = open_state(url, "interval")
        await state.open()
        begun = [asyncio.create_task(start(state, a_job(f"{i}"))) for i in range(700)]
        await asyncio.sleep(0)
        await state.close()
        await asyncio.gather(*begun)
        state = open_state(url, "interval")
        assert (await state.open()).seq == 700
        await state.close()


STATES = ("queued", "running", "paused", "succeeded", "failed")
KEPT = 10  # events, of the log


class Machine(RuleBasedStateMachine):
    """A store against a dict, move by move: create, commit, save, claim, delete, restart."""

    new_url: NewUrl

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.url = type(self).new_url()
        self.jobs: dict[str, Job] = {}
        self.past: dict[str, list[Job]] = {}  # every row that somebody may have read
        self.leased: set[str] = set()
        self.log: list[tuple[int, str, int, str]] = []
        self.seq = 0
        self.made = 0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result, or the refusal as a value."""

        async def attempt() -> Any:
            try:
                return await work
            except (Stale, Fenced) as refusal:
                return type(refusal)

        return self.runner.run(attempt())

    @initialize()
    def open(self) -> None:
        self.state = open_state(self.url, "never", KEPT)
        self.boot = self.do(self.state.open())

    def teardown(self) -> None:
        if hasattr(self, "state"):
            self.do(self.state.close())
        self.runner.close()

    def happened(self, job_id: str, version: int, to: str) -> None:
        self.seq += 1
        self.log.append((self.seq, job_id, version, to))

    def became(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.past.setdefault(job.id, []).append(job)

    @rule(kind=st.sampled_from("ab"), priority=st.integers(0, 2), rank=st.integers(0, 2))
    def create(self, kind: str, priority: int, rank: int) -> None:
        job = a_job(f"j{self.made}", kind=kind, priority=priority, rank=rank)
        self.made += 1
        made, created = self.do(self.state.create(job, its_event(job)))
        assert created
        assert all(made.h > other.h for rows in self.past.values() for other in rows)
        assert made == msgspec.structs.replace(job, h=made.h, incarnation=self.boot.incarnation)
        self.became(made)
        self.happened(job.id, 1, job.state)

    @precondition(lambda self: self.past)
    @rule(data=st.data(), to=st.sampled_from(STATES), fenced=st.booleans())
    def commit(self, data: st.DataObject, to: str, fenced: bool) -> None:
        """From a row as it was read at any time, with its fence or without."""
        read = self.read(data)
        after = moved(read, to, name=f"v{read.version + 1}", cursor="never", stored_bytes=-1)
        done = self.do(
            self.state.commit(
                after,
                its_event(after, read),
                was_version=read.version,
                fence=read.fence if fenced else None,
            )
        )
        now = self.jobs.get(read.id)
        if now is None or now.version != read.version:
            assert done is Stale
        elif fenced and now.fence != read.fence:
            assert done is Fenced
        else:
            assert done == self.seq + 1
            self.happened(read.id, after.version, to)
            if fenced or to != "queued":
                self.leased.discard(read.id)
            kept = {field: getattr(now, field) for field in ("cursor", "stored_bytes", "fence")}
            self.became(msgspec.structs.replace(after, incarnation=self.boot.incarnation, **kept))

    @precondition(lambda self: self.past)
    @rule(
        data=st.data(),
        cursor=st.one_of(st.just(UNSET), st.none(), st.integers(), st.text(max_size=3)),
        stored_bytes=st.one_of(st.none(), st.integers(0, 2**50)),
        done=st.one_of(st.none(), st.integers(0, 9)),
    )
    def save(self, data: st.DataObject, cursor: Any, stored_bytes: int | None, done: Any) -> None:
        read = self.read(data)
        progress = None if done is None else Progress(done=done)
        result = self.do(
            self.state.save(
                read.id, read.fence, cursor=cursor, stored_bytes=stored_bytes, progress=progress
            )
        )
        now = self.jobs.get(read.id)
        if now is None or now.fence != read.fence:
            assert result is Fenced
            return
        assert result is None
        change: dict[str, Any] = {} if cursor is UNSET else {"cursor": cursor}
        change |= {} if stored_bytes is None else {"stored_bytes": stored_bytes}
        change |= {} if progress is None else {"progress": progress}
        self.became(msgspec.structs.replace(now, **change))

    @rule(kinds=st.sets(st.sampled_from("ab")), slots=st.integers(0, 3))
    def claim(self, kinds: set[str], slots: int) -> None:
        free = [
            job
            for job in self.jobs.values()
            if job.state == "queued" and job.kind in kinds and job.id not in self.leased
        ]
        free.sort(key=lambda job: (-job.priority, job.rank, job.h))
        leased = self.do(self.state.claim(kinds, slots))
        assert ids(leased) == ids(free[:slots])
        for before, job in zip(free, leased, strict=False):
            assert job.fence == before.fence + 1
            self.leased.add(job.id)
            self.became(
                msgspec.structs.replace(before, fence=job.fence, incarnation=self.boot.incarnation)
            )

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        read = self.read(data)
        done = self.do(forget(self.state, read))
        now = self.jobs.get(read.id)
        if now is None or now.version != read.version:
            assert done is Stale
            return
        del self.jobs[read.id]
        self.leased.discard(read.id)
        self.happened(read.id, read.version + 1, "deleted")

    @rule()
    def restart(self) -> None:
        self.do(self.state.close())
        self.state = open_state(self.url, "never", KEPT)
        boot = self.do(self.state.open())
        assert boot == (self.boot.epoch, self.boot.incarnation + 1, self.seq, True)
        self.boot = boot
        self.leased.clear()

    def read(self, data: st.DataObject) -> Job:
        """A row that somebody has read, mostly the newest one."""
        rows = self.past[data.draw(st.sampled_from(sorted(self.past)))]
        return rows[data.draw(st.sampled_from([-1, -1, -1, -2, 0])) % len(rows)]

    @invariant()
    def same(self) -> None:
        """The store and the dict hold the same."""
        if not hasattr(self, "state"):
            return
        found = self.do(self.state.find(Filter(), None, 500)).items
        rows = {job.id: msgspec.structs.replace(job, saved_at=0) for job in found}
        assert rows == self.jobs
        log, oldest = self.do(log_at_rest(self.state))
        assert self.seq + 1 - oldest >= min(KEPT, self.seq)
        assert log == [entry for entry in self.log if entry[0] >= oldest or entry[1] in self.jobs]
        counts: dict[str, int] = {}
        for job in self.jobs.values():
            counts[job.state] = counts.get(job.state, 0) + 1
        assert self.do(self.state.counts(None)) == counts


class Modelling:
    """Any sequence of moves."""

    def test_a_store_is_a_dict_with_a_log(self, new_url: NewUrl) -> None:
        """However moves follow each other, rows, log, leases and counts are those of a dict."""
        machine = type("AnyMachine", (Machine,), {"new_url": staticmethod(new_url)})
        run_state_machine_as_test(machine, settings=settings(MODEL, stateful_step_count=30))
