"""Tables as jobs make them: each row once whatever happens, and nothing left of the unfinished."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from errors import SluiceError
from jobs.kinds import Column, Kind
from storage import File
from tests.jobs.world import OWNER, World, a_kind, eventually

NUMBERS = [Column("n", "integer"), Column("text", "text")]


class Bench:
    """A kind that fills a table, row by row, until it is told to end."""

    def __init__(self, **more: Any) -> None:
        self.at = 0
        self.ends = False
        self.kind: Kind = a_kind("fill", self.fill, EXACTLY_ONCE=True, **more)

    async def fill(self, ctx: Any, params: Any) -> dict[str, Any]:
        """Two rows a turn, and a line for each of them in a file."""
        row = ctx.cursor or 0
        lines = await ctx.artifact("lines.txt")
        table = await ctx.table("numbers", NUMBERS, about={"source": "nothing"})
        assert table.columns == NUMBERS
        while not self.ends:
            await lines.write(b"%d\n%d\n" % (row, row + 1))
            await table.write([[row, "even"], [row + 1, None]], row + 2)
            row += 2
            assert table.rows == row
            self.at += 2
            await ctx.checkpoint(row, done=row)
            await ctx.sleep(0.001)
        return {"rows": row}

    async def moved(self, rows: int) -> None:
        """It has written so many more."""
        goal = self.at + rows
        await eventually(lambda: self.at >= goal, f"{rows} rows more")


async def filled(world: World, job_id: str) -> tuple[File, list[Any]]:
    """The table that a job has made, and its rows as anybody's SQLite reads them."""
    job = await world.job(job_id)
    assert job.result is not None
    assert job.result.file is not None
    file = await world.files.get(job.result.file, OWNER)
    con = sqlite3.connect(world.folder / "uploads" / file.id / file.name)
    assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = con.execute("SELECT * FROM rows ORDER BY rowid").fetchall()
    con.close()
    return file, rows


async def check(world: World, bench: Bench, job_id: str) -> None:
    """The job ends now, with each row once in the table and once in the file."""
    bench.ends = True
    job = await world.until(job_id, "succeeded")
    assert job.result is not None
    count = job.result.data["rows"]
    file, rows = await filled(world, job_id)
    assert (file.name, file.layout, file.media_type, file.job) == (
        *("numbers", "table", "application/vnd.sqlite3", job_id),
    )
    assert rows == [(n, None if n % 2 else "even") for n in range(count)]
    assert file.bytes == (world.folder / "uploads" / file.id / "numbers").stat().st_size
    lines = [data for name, data in world.published().items() if name.endswith("lines.txt")]
    assert lines == [b"".join(b"%d\n" % n for n in range(count))]
    assert world.unfinished() == []
    assert {artifact.name for artifact in job.artifacts} == {"lines.txt", "numbers"}


async def test_a_table_is_a_stored_file(tmp_path: Path) -> None:
    """It is the result's file, though the job makes another one; and can be asked for its rows."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(10)
        await check(world, bench, job_id)
        file, rows = await filled(world, job_id)
        table = await world.files.table(file)
        assert (table.columns, table.rows) == (NUMBERS, len(rows))
        assert table.about == {"source": "nothing"}
        assert await table.read(0, 10_000) == rows
        await table.close()


async def test_each_row_once_over_crashes(tmp_path: Path) -> None:
    """Killed at any moment, table and file go on from one and the same cursor."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        for n in range(5):
            await bench.moved(11 * n)
            if n % 2:
                await world.runners.save()
                await bench.moved(3)
            await world.restart()
        await bench.moved(10)
        await check(world, bench, job_id)


@pytest.mark.parametrize("warm_s", [0.0, 30.0])
async def test_each_row_once_over_pauses(tmp_path: Path, warm_s: float) -> None:
    """A pause loses nothing, and nothing of it is done again."""
    bench = Bench()
    async with World(tmp_path, bench.kind, warm_s=warm_s) as world:
        job_id = await world.start("fill")
        for _ in range(4):
            await bench.moved(5)
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await world.tell(job_id, "resume")
        await bench.moved(5)
        await check(world, bench, job_id)
        job = await world.job(job_id)
        assert job.result is not None
        assert job.result.data["rows"] == bench.at


@pytest.mark.parametrize("moment", ["running", "paused", "crashed"])
async def test_a_cancel_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """Neither a database nor a log beside it, whenever it comes."""
    bench = Bench()
    async with World(tmp_path, bench.kind, warm_s=0.0) as world:
        job_id = await world.start("fill")
        await bench.moved(10)
        assert len(world.unfinished()) >= 2
        if moment == "paused":
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
        elif moment == "crashed":
            await world.restart()
        await world.tell(job_id, "cancel")
        await world.until(job_id, "cancelled")
        await eventually(lambda: not world.unfinished(), "it is gone")
        assert world.published() == {}
        assert (await world.files.list(OWNER, None, None, 10)).items == []


async def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """What a failed job has written is gone."""

    async def fails(ctx: Any, params: Any) -> None:
        table = await ctx.table("numbers", NUMBERS)
        await table.write([[1, "one"]], 1)
        raise SluiceError("invalid-data", "As it was told.")

    async with World(tmp_path, a_kind("fails", fails)) as world:
        job_id = await world.start("fails")
        await world.until(job_id, "failed")
        await eventually(lambda: not world.unfinished(), "it is gone")
        assert world.published() == {}


async def test_killed_between_publishing_and_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished table is in the making again, and ends with the same rows."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(10)
        published = []

        async def no_commit(*args: Any, **more: Any) -> None:
            published.append(world.published())
            await eventually(lambda: False, "the end", within_s=60)

        monkeypatch.setattr(world.manager, "finish", no_commit)
        bench.ends = True
        await eventually(lambda: published, "it was published")
        assert any(name.endswith("/numbers") for name in published[0])
        await world.restart()
        await check(world, bench, job_id)


async def test_a_lost_table_is_begun_again(tmp_path: Path) -> None:
    """After a power cut there may be no table: its rows are written anew, with the file's."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(20)
        await world.runners.save()
        await world.crash()
        for path in (tmp_path / "tmp").iterdir():
            if path.read_bytes()[:6] == b"SQLite" or path.name.endswith("-wal"):
                path.unlink()
        await world.open()
        await bench.moved(10)
        await check(world, bench, job_id)


async def test_rows_of_a_kind_that_starts_over(tmp_path: Path) -> None:
    """What can't be resumed begins with an empty table."""
    bench = Bench(RESUMABLE=False)
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(10)
        await world.restart()
        await bench.moved(4)
        await check(world, bench, job_id)


async def test_only_the_cursor_of_the_rows_counts(tmp_path: Path) -> None:
    """A cursor that ran ahead of the rows is not gone on from; one without rows is."""
    seen: list[Any] = []
    here: list[bool] = []

    async def ahead(ctx: Any, params: Any) -> None:
        seen.append(ctx.cursor)
        table = await ctx.table("numbers", NUMBERS)
        if len(seen) == 1:
            await table.write([[1, "one"]], {"at": 1})
            await ctx.checkpoint({"at": 5})
        elif len(seen) == 2:
            await table.write([], {"at": 2})
        else:
            return
        await world.runners.save()
        here.append(True)
        while True:
            await ctx.sleep(0.01)

    async with World(tmp_path, a_kind("ahead", ahead)) as world:
        job_id = await world.start("ahead")
        for n in (1, 2):
            await eventually(lambda n=n: len(here) == n, "it is there")  # type: ignore[misc]
            await world.restart()
        await world.until(job_id, "succeeded")
        assert seen == [None, {"at": 1}, {"at": 2}]
        assert (await filled(world, job_id))[1] == [(1, "one")]


@pytest.mark.expects("failed")
async def test_one_table_with_one_set_of_columns(tmp_path: Path) -> None:
    """A second table, or another one under the same name, is the kind's mistake; it fails."""

    async def two(ctx: Any, params: Any) -> None:
        await ctx.table("a", NUMBERS)
        await ctx.table("b", NUMBERS)

    async def other(ctx: Any, params: Any) -> None:
        await ctx.table("a", NUMBERS)
        await ctx.table("a", NUMBERS[:1])

    async def both(ctx: Any, params: Any) -> None:
        await ctx.artifact("a")
        await ctx.table("a", NUMBERS)

    async def odd(ctx: Any, params: Any) -> None:
        await ctx.table("a", [Column("a", "text"), Column("A", "text")])

    kinds = [a_kind(run.__name__, run) for run in (two, other, both, odd)]
    async with World(tmp_path, *kinds) as world:
        for kind, code in (
            ("two", "kind-failed"),
            ("other", "kind-failed"),
            ("both", "kind-failed"),
            ("odd", "invalid-field"),
        ):
            job = await world.until(await world.start(kind), "failed")
            assert job.error is not None
            assert job.error["code"] == code
        await eventually(lambda: not world.unfinished(), "all is gone")


async def test_a_full_disk_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the rows is no reason to wait for ever, also in a pause."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(10)
        monkeypatch.setattr("storage.tables._RESERVE_BYTES", 1 << 62)
        job = await world.until(job_id, "failed")
        assert job.error is not None
        assert job.error["code"] == "disk-full"
        await eventually(lambda: not world.unfinished(), "it is gone")


async def test_a_table_is_no_plain_file(tmp_path: Path) -> None:
    """What is no table can't be asked for rows; a table can be read as a file, and be hashed."""
    bench = Bench()

    async def plain(ctx: Any, params: Any) -> None:
        await (await ctx.artifact("a.txt")).write(b"abc")

    async with World(tmp_path, bench.kind, a_kind("plain", plain)) as world:
        job = await world.until(await world.start("plain"), "succeeded")
        with pytest.raises(SluiceError, match="table-unknown"):
            await world.files.table(await world.files.get(job.artifacts[0].file, OWNER))
        job_id = await world.start("fill")
        await bench.moved(10)
        bench.ends = True
        await world.until(job_id, "succeeded")
        file, _ = await filled(world, job_id)
        reader = await world.files.reader(file)
        assert await reader.read(0, 6) == b"SQLite"
        await reader.close()
        assert "sha-256" in (await world.files.digested(file, asked=True)).digest


async def test_readers_of_a_deleted_table_go_on(tmp_path: Path) -> None:
    """Who has it open reads it to its end, and its bytes go afterwards."""
    bench = Bench()
    async with World(tmp_path, bench.kind) as world:
        job_id = await world.start("fill")
        await bench.moved(1000)
        bench.ends = True
        await world.until(job_id, "succeeded")
        file, rows = await filled(world, job_id)
        table = await world.files.table(file)
        await world.files.delete(file.id, OWNER)
        assert not any(name.endswith("/numbers") for name in world.published())
        found: list[Any] = []
        while some := await table.read(len(found), 99):
            found += some
        assert found == rows
        await table.close()


async def test_a_long_log_is_folded_in(tmp_path: Path) -> None:
    """Beside a big table lies a log of a few MiB at most, also over a crash; all rows are there."""
    most, at_row = 0, 0
    count = 16_000

    async def big(ctx: Any, params: Any) -> None:
        nonlocal most, at_row
        row = ctx.cursor or 0
        table = await ctx.table("numbers", NUMBERS)
        while row < count:
            await table.write([[n, "x" * 1000] for n in range(row, row + 100)], row + 100)
            row = at_row = row + 100
            logs = [p for p in (tmp_path / "tmp").iterdir() if p.name.endswith("-wal")]
            most = max(most, *(p.stat().st_size for p in logs), 0)
            await ctx.checkpoint(row, done=row)

    async with World(tmp_path, a_kind("big", big)) as world:
        job_id = await world.start("big")
        await eventually(lambda: at_row > count // 2, "half of it is written")
        await world.restart()
        await world.until(job_id, "succeeded", within_s=60)
        file, rows = await filled(world, job_id)
        assert [n for n, _ in rows] == list(range(count))
        assert file.bytes > 15 << 20
        assert most < 4 << 20
        assert world.unfinished() == []
