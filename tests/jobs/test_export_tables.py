"""Tables as sources of exports, and Parquet: typed cells in every format, the same after a kill."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.kinds import csv_import, export, kind_of
from jobs.runners import Runners
from storage import Job
from tests.harness import FULL
from tests.jobs.disturb import Exact, How, Trap
from tests.jobs.world import World

TABLE = (
    b"n,name,price,open,day,at,exact\n"
    b'1,"Ann, B",1.50,true,2026-01-31,2026-01-31T20:15:00+01:00,12345678901234567.10\n'
    b"-2,,0.1,false,,,\n"
    b"3,007,1e300,,2024-02-29,2026-01-31 20:15,0.2\n"
)
TYPES = {"exact": "decimal", "name": "text"}


@asynccontextmanager
async def a_world(folder: Path, **more: Any) -> AsyncIterator[World]:
    """A service that imports and exports."""
    kinds = (kind_of(csv_import)._replace(runner="lane"), kind_of(export))
    async with World(folder, *kinds, **more) as world:
        yield world


async def table(world: World, data: bytes, name: str = "t", **params: Any) -> str:
    """Import a table; its id."""
    await world.store("in.csv", data)
    wish = {"source": "in.csv", "table": name, "types": TYPES} | params
    job = await world.until(await world.start("csv.import", wish), "succeeded", "failed")
    assert job.result is not None, job.error
    assert job.result.file is not None
    return job.result.file


async def ended(world: World, **params: Any) -> Job:
    """Run an export to its end."""
    job_id = await world.start("export", {"source": "t"} | params)
    return await world.until(job_id, "succeeded", "failed", within_s=60)


def bytes_of(world: World, job: Job) -> bytes:
    """What an export has made."""
    assert job.result is not None, job.error
    (made,) = job.artifacts
    return (world.folder / "uploads" / made.file / made.name).read_bytes()


async def test_a_table_as_csv(tmp_path: Path) -> None:
    """Numbers as SQLite and Python write them, booleans as words, decimals to the last digit."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        job = await ended(world)
        assert [artifact.name for artifact in job.artifacts] == ["t-export.csv"]
        data = bytes_of(world, job)
        assert list(csv.reader(io.StringIO(data.decode(), newline=""))) == [
            ["n", "name", "price", "open", "day", "at", "exact"],
            [
                *("1", "Ann, B", "1.5", "true", "2026-01-31"),
                *("2026-01-31T20:15:00+01:00", "12345678901234567.10"),
            ],
            ["-2", "", "0.1", "false", "", "", ""],
            ["3", "007", "1e+300", "", "2024-02-29", "2026-01-31 20:15", "0.2"],
        ]
        packed = await ended(world, format="csv.gz")
        assert gzip.decompress(bytes_of(world, packed)) == data


async def test_a_table_as_lines(tmp_path: Path) -> None:
    """Numbers are numbers, booleans booleans, no value is null."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        data = bytes_of(world, await ended(world, format="jsonl", columns=["open", "n", "name"]))
        assert [json.loads(line) for line in data.splitlines()] == [
            {"open": True, "n": 1, "name": "Ann, B"},
            {"open": False, "n": -2, "name": None},
            {"open": None, "n": 3, "name": "007"},
        ]


async def test_a_table_as_parquet(tmp_path: Path) -> None:
    """Columns have their types; times are in UTC; decimals stay texts."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        job = await ended(world, format="parquet")
        found = pq.read_table(io.BytesIO(bytes_of(world, job)))
        assert [str(field.type) for field in found.schema] == [
            *("int64", "string", "double", "bool", "date32[day]"),
            *("timestamp[us, tz=UTC]", "string"),
        ]
        assert [list(row.values()) for row in found.to_pylist()] == [
            [
                *(1, "Ann, B", 1.5, True, date(2026, 1, 31)),
                *(datetime(2026, 1, 31, 19, 15, tzinfo=UTC), "12345678901234567.10"),
            ],
            [-2, None, 0.1, False, None, None, None],
            [
                *(3, "007", 1e300, None, date(2024, 2, 29)),
                *(datetime(2026, 1, 31, 20, 15, tzinfo=UTC), "0.2"),
            ],
        ]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("n > 0", [1, 3]),
        ("price = 0.1", [-2]),
        ("price = 1.5 or name = '007'", [1, 3]),
        ("open = true", [1]),
        ("not open = true", [-2, 3]),
        ("exact > 1", [1]),
        ("day >= '2026-01-01'", [1]),
        ("name is null", [-2]),
        ("n = '3'", [3]),
    ],
)
async def test_filters_on_typed_columns(tmp_path: Path, where: str, wanted: list[int]) -> None:
    """They mean what they mean for files."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        data = bytes_of(world, await ended(world, where=where, columns=["n"], format="jsonl"))
        assert [json.loads(line)["n"] for line in data.splitlines()] == wanted


async def test_dates_and_several_sources(tmp_path: Path) -> None:
    """A range of dates; a table and a file one after the other, matched by name."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        dates = {"column": "at", "from": "2026-01-31T19:00", "to": "2026-01-31T20:00"}
        job = await ended(world, dates=dates, columns=["n"])
        assert bytes_of(world, job) == b"n\r\n1\r\n"
        assert job.result is not None
        assert job.result.data["undated"] == 1
        await world.store("more.csv", b"name,n\nZoe,9\n")
        job = await ended(world, source=["t", "more.csv"], columns=["n", "name"], format="parquet")
        found = pq.read_table(io.BytesIO(bytes_of(world, job)))
        assert [str(field.type) for field in found.schema] == ["string", "string"]
        assert found.to_pylist()[-1] == {"n": "9", "name": "Zoe"}
        assert found.to_pylist()[0] == {"n": "1", "name": "Ann, B"}


async def test_files_as_parquet(tmp_path: Path) -> None:
    """Cells of CSV and values of JSON are texts, to the last character."""
    async with a_world(tmp_path) as world:
        await world.store("a.jsonl", b'{"a": 1.10, "b": [1, {"c": null}]}\n{"b": "x"}\n')
        job = await ended(world, source="a.jsonl", format="parquet")
        assert pq.read_table(io.BytesIO(bytes_of(world, job))).to_pylist() == [
            {"a": "1.10", "b": '[1,{"c":null}]'},
            {"a": None, "b": "x"},
        ]


async def test_an_empty_table(tmp_path: Path) -> None:
    """No rows make a header, no lines, or a Parquet file without row groups."""
    async with a_world(tmp_path) as world:
        await table(world, b"n,name\n", types={})
        assert bytes_of(world, await ended(world)) == b"n,name\r\n"
        assert bytes_of(world, await ended(world, format="jsonl")) == b""
        job = await ended(world, format="parquet")
        assert pq.read_table(io.BytesIO(bytes_of(world, job))).num_rows == 0


@pytest.mark.parametrize("format", ["csv", "jsonl.gz", "parquet"])
async def test_killed_and_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The result has the same bytes as that of an undisturbed run."""
    monkeypatch.setattr(Runners, "process", Exact)
    hows: list[How] = ["kill", "cold", "kill"]
    rows = 200_000 if FULL else 40_000
    data = b"n,name\n" + b"".join(b"%d,row %d\n" % (n, n) for n in range(rows))
    async with a_world(tmp_path, warm_s=0.0) as world:
        await table(world, data, types={})
        expected = bytes_of(world, await ended(world, format=format))
        wish = {"source": "t", "format": format, "name": "again"}
        job_id = ""
        for how in hows:
            with monkeypatch.context() as patch:
                trap = Trap(patch, world, 40, how)
                if not job_id:
                    job_id = await world.start("export", wish)
                await trap.sprung.wait()
                if how == "kill":
                    await world.restart()
                else:
                    await world.until(job_id, "paused")
                    await world.tell(job_id, "resume")
        job = await world.until(job_id, "succeeded", "failed")
        assert bytes_of(world, job) == expected
        assert world.unfinished() == []


async def test_a_table_that_is_deleted_before(tmp_path: Path) -> None:
    """Then it is unknown, as a file would be; a table is not read as if it were CSV."""
    async with a_world(tmp_path) as world:
        await table(world, TABLE)
        job = await ended(world, source_format="csv")
        assert job.error is not None
        assert job.error["code"] == "invalid-data"
        job = await ended(world, source="gone")
        assert job.error is not None
        assert job.error["code"] == "file-unknown"
