"""Exports: what they write, what they refuse, and that no interruption changes a byte."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import SluiceError
from jobs import progress
from jobs.add import add
from jobs.kinds import Context, Kind, Registry, _formats, _records, export, kind_of
from storage import Filter, Job
from tests.conftest import Serve
from tests.harness import FULL, Server, eventually, form
from tests.jobs.disturb import Trap
from tests.jobs.world import OWNER, World, a_kind

FORMATS = ("csv", "jsonl", "csv.gz", "jsonl.gz")
TABLE = b'id,name,n\r\n1,Ann,10\r\n2,"Bob, ""B""",\r\n3,"two\nlines",-2.50\r\n'
LINES = (
    b'{"id": 1, "tags": ["a", {"x": 1.10}], "big": 123456789012345678901234567890}\n'
    b'{"id": "2", "ok": true, "none": null, "f": 1E400, "s": "\\u00e9\\"\\n,"}\n'
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that small tables have many."""
    monkeypatch.setattr(_records, "BLOCK_BYTES", 64)


async def put(world: World, name: str, data: bytes) -> str:
    """Store a file; its id."""
    path = world.folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return (await add(world.uploads, path, OWNER)).id


async def ended(world: World, params: dict[str, Any]) -> Job:
    """Run an export to its end."""
    return await world.until(await world.start("export", params), "succeeded", "failed")


async def made(world: World, params: dict[str, Any]) -> bytes:
    """What an export makes."""
    job = await ended(world, params)
    assert job.state == "succeeded", job.error
    assert job.result is not None and job.result.file is not None
    (artifact,) = job.artifacts
    assert artifact.file == job.result.file
    return world.published()[f"{job.result.file}/{artifact.name}"]


def a_world(folder: Path, **more: Any) -> World:
    """A service that exports."""
    return World(folder, kind_of(export), **more)


def run_by(run: Callable[[Any, export.Params], Awaitable[dict[str, Any]]]) -> Kind:
    """The kind, run by another function."""
    return kind_of(SimpleNamespace(**(vars(export) | {"run": run})))


def run(folder: Path, files: dict[str, bytes], **params: Any) -> bytes:
    """Store these files, export the first (or ``source``), and return the result."""

    async def work() -> bytes:
        async with a_world(folder) as world:
            for name, data in files.items():
                await put(world, name, data)
            return await made(world, {"source": next(iter(files))} | params)

    return asyncio.run(work())


def failed(folder: Path, files: dict[str, bytes], **params: Any) -> dict[str, Any]:
    """The error of an export that must fail, and leave nothing."""

    async def work() -> dict[str, Any]:
        async with a_world(folder) as world:
            for name, data in files.items():
                await put(world, name, data)
            job = await ended(world, {"source": next(iter(files))} | params)
            assert job.state == "failed"
            assert job.artifacts == ()
            while world.runners._live:  # until it has unwound
                await asyncio.sleep(0)
            assert world.unfinished() == []
            assert len(world.published()) == len(files)
            assert job.error is not None
            return job.error

    return asyncio.run(work())


# What is written


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, b'id,name,n\r\n1,Ann,10\r\n2,"Bob, ""B""",\r\n3,"two\nlines",-2.50\r\n'),
        ({"columns": ["n", "id"]}, b"n,id\r\n10,1\r\n,2\r\n-2.50,3\r\n"),
        ({"columns": ["n"]}, b'n\r\n10\r\n""\r\n-2.50\r\n'),
        (
            {"format": "jsonl", "where": "n > -3"},
            b'{"id":"1","name":"Ann","n":"10"}\n{"id":"3","name":"two\\nlines","n":"-2.50"}\n',
        ),
        ({"format": "jsonl", "columns": ["n"], "where": "n is null"}, b'{"n":""}\n'),
        ({"where": "name = 'nobody'"}, b"id,name,n\r\n"),
        ({"where": "name = 'nobody'", "format": "jsonl"}, b""),
    ],
)
def test_csv_source(tmp_path: Path, params: dict[str, Any], wanted: bytes) -> None:
    """CSV comes out as RFC 4180 with CRLF and the fewest quotes, or as JSON of its texts."""
    assert run(tmp_path, {"t.csv": TABLE}, **params) == wanted


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (
            {"format": "jsonl"},
            b'{"id":1,"tags":["a", {"x": 1.10}],"big":123456789012345678901234567890}\n'
            b'{"id":"2","ok":true,"none":null,"f":1E400,"s":"\\u00e9\\"\\n,"}\n',
        ),
        (
            {},
            "id,tags,big,ok,none,f,s\r\n"
            '1,"[""a"",{""x"":1.10}]",123456789012345678901234567890,,,,\r\n'
            '2,,,true,,1E400,"é""\n,"\r\n'.encode(),
        ),
        ({"columns": ["f", "id"], "where": "ok = true"}, b"f,id\r\n1E400,2\r\n"),
        ({"columns": ["id"], "where": "tags like '%1.10%'"}, b"id\r\n1\r\n"),
        ({"columns": ["id"], "where": "none is null and id = 2"}, b"id\r\n2\r\n"),
        (
            {"columns": ["id"], "where": "big = 123456789012345678901234567890", "format": "jsonl"},
            b'{"id":1}\n',
        ),
    ],
)
def test_jsonl_source(tmp_path: Path, params: dict[str, Any], wanted: bytes) -> None:
    """JSON values stay as they are written, to the last digit; in CSV they are their text."""
    assert run(tmp_path, {"t.jsonl": LINES}, **params) == wanted


def test_columns_of_jsonl_come_from_the_whole_file(tmp_path: Path, small_blocks: None) -> None:
    """A name that only the last row has is a column; the order is that of first appearance."""
    lines = b'{"b":1}\n' * 50 + b'{"a":2,"b":3}\n'
    assert run(tmp_path, {"t.jsonl": lines}) == b"b,a\r\n" + b"1,\r\n" * 50 + b"3,2\r\n"


def test_several_sources_are_matched_by_name(tmp_path: Path) -> None:
    """Files are concatenated, columns by their names; what a file doesn't have is empty."""
    files = {"a.csv": b"x,y\n1,2\n", "b.csv": b"y,x,z\n3,4,5\n", "c.jsonl": b'{"z":6.0,"x":7}\n'}
    everything = {"source": list(files)}
    assert run(tmp_path, files, **everything) == b"x,y,z\r\n1,2,\r\n4,3,5\r\n7,,6.0\r\n"
    lines = run(tmp_path / "again", files, format="jsonl", **everything)
    assert lines == b'{"x":"1","y":"2"}\n{"x":"4","y":"3","z":"5"}\n{"x":7,"z":6.0}\n'


@pytest.mark.parametrize(
    ("name", "data", "params"),
    [
        ("t.csv", b"\xef\xbb\xbfa,b\n1,2\n", {}),
        ("t.csv", b"a,b\r\n1,2", {}),
        ("t.csv", b"a,b\n\n1,2\n\n\n", {}),
        ("t.csv", b"a;b\n1;2\n", {"delimiter": ";"}),
        ("t.csv", b"a|b\n1|2\n", {"delimiter": "|"}),
        ("t.tsv", b"a\tb\n1\t2\n", {}),
        ("t.CSV", b'"a","b"\n"1","2"\n', {}),
        ("t.ndjson", b'\xef\xbb\xbf\n{"a":1,"b":2}', {}),
        ("t.dat", b'{"a":1,"b":"2"}\r\n\r\n', {"source_format": "jsonl"}),
        ("t.dat", b"a,b\n1,2\n", {"source_format": "csv"}),
    ],
)
def test_ways_to_write_the_same(
    tmp_path: Path, name: str, data: bytes, params: dict[str, Any]
) -> None:
    """Byte order mark, line ends, empty lines, quotes and delimiters make no difference."""
    assert run(tmp_path, {name: data}, **params) == b"a,b\r\n1,2\r\n"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"a\n1\n\n", b'a\r\n1\r\n""\r\n'),  # an empty line is a row where there is one column
        (b"a,b\n", b"a,b\r\n"),
        (b'a,b\n5" pipe,x"\n', b'a,b\r\n"5"" pipe","x"""\r\n'),
        (b",b\n1,2\n", b",b\r\n1,2\r\n"),
        (b"a\n=1+1\n", b"a\r\n=1+1\r\n"),  # formulas are data
        ("a\nx\u2028y\x0bz\x1cw\n".encode(), "a\r\nx\u2028y\x0bz\x1cw\r\n".encode()),
        (b'a\n"x\ry"\n', b'a\r\n"x\ry"\r\n'),
    ],
)
def test_odd_but_true(tmp_path: Path, data: bytes, wanted: bytes) -> None:
    """What is odd and has one meaning goes through unchanged."""
    assert run(tmp_path, {"t.csv": data}) == wanted


def test_dates(tmp_path: Path) -> None:
    """From is included, to is not, a naive time is UTC; what is no date is counted."""
    days = [
        "2024-01-09",
        "2024-01-10",
        "2024-01-11T23:59:59+02:00",
        "2024-01-12T00+02:00",
        "soon",
        "",
    ]
    data = "id,day\n" + "".join(f"{n},{day}\n" for n, day in enumerate(days))

    async def work() -> None:
        async with a_world(tmp_path) as world:
            await put(world, "t.csv", data.encode())
            dates = {"column": "day", "from": "2024-01-10", "to": "2024-01-11T22:00:00Z"}
            job = await ended(world, {"source": "t.csv", "columns": ["id"], "dates": dates})
            assert job.result is not None
            assert job.result.data == {
                "rows_read": 6,
                "rows_written": 2,
                "undated": 2,
                "bytes": 10,
                "columns": ["id"],
                "format": "csv",
            }
            only = {"dates": [dates], "where": "day != ''"}
            job = await ended(world, {"source": "t.csv", **only})
            assert job.result is not None
            assert (job.result.data["rows_written"], job.result.data["undated"]) == (2, 1)

    asyncio.run(work())


def test_the_name_of_the_result(tmp_path: Path) -> None:
    """It is the source's with another end, but never a new version of a source."""

    async def work() -> None:
        async with a_world(tmp_path) as world:
            for name in ("t.csv", "noend", "x" * 251 + ".csv"):
                await put(world, name, b"a\n1\n")
            names = []
            for params in (
                {"source": "t.csv", "format": "jsonl.gz"},
                {"source": "t.csv"},
                {"source": "noend", "source_format": "csv"},
                {"source": "t.csv", "name": "wish.txt"},
                {"source": "x" * 251 + ".csv", "format": "jsonl"},
            ):
                (artifact,) = (await ended(world, params)).artifacts
                names.append(artifact.name)
            assert names[:4] == ["t.jsonl.gz", "t-export.csv", "noend.csv", "wish.txt"]
            assert names[4] == "x" * 249 + ".jsonl"

    asyncio.run(work())


# What is refused


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t.csv", b"a,b\n1,2\n3\n", "row 2 (byte 8): it has 1 cells, but the header has 2"),
        ("t.csv", b"a,b\n\n1,2\n3,4,5\n", "row 2 (byte 9): it has 3 cells"),
        ("t.csv", b'a,b\n"x\ny",2\n3\n', "row 2 (byte 12): it has 1 cells"),
        ("t.csv", b"a,b\n1,2\n\xff,4\n", "row 2 (byte 8): it is no UTF-8"),
        ("t.csv", b'a,b\n1,2\n3,"4\n5,6\n', "row 2 (byte 8): a quote is not closed"),
        ("t.csv", b'a,b\n1,2\n3,"4"x\n', "row 2 (byte 8): ',' expected after '\"'"),
        ("t.csv", b"a,b\n1,2\n3,4\r5,6\n", "row 2 (byte 8): new-line character"),
        ("t.csv", b"", "the header (byte 0): the file is empty"),
        ("t.csv", b"\n1\n", "the header (byte 0): it is empty"),
        ("t.csv", b"a,b,a\n", "the header (byte 0): the name 'a' stands there twice"),
        ("t.csv", b'a,"b\n', "the header (byte 0): a quote is not closed"),
        ("t.csv", b"a,\xff\n", "the header (byte 2): it is no UTF-8"),
        ("t.csv", b"a\n1\n" + b"x" * (1 << 20) + b"\n", "row 2 (byte 4): it is longer than 1 MiB"),
        ("t.csv", b'a\n1\n"' + b"\n" * (1 << 21), "row 2 (byte 4): it is longer than 1 MiB"),
        ("t.csv", b"x" * (1 << 20) + b",b\n", "the header (byte 0): it is longer than 1 MiB"),
        ("t.csv", b"\x1f\x8b\x08\x00", "'t.csv' is compressed (gzip)"),
        ("t.csv", b"PK\x03\x04", "'t.csv' is a zip archive or a spreadsheet"),
        ("t.csv", b"\xff\xfea\x00", "'t.csv' is UTF-16"),
        ("t.bin", b"a,b\n", "neither CSV nor JSONL"),
        ("t.csv", b",".join(b"%d" % n for n in range(1001)) + b"\n", "there are 1,001 columns"),
        ("t.csv", b"x" * (21 << 10) + b"\n", "there are 1 columns"),
        ("t.jsonl", b'{"a":1}\n\n{"a":\n', "row 2 (byte 9): Input data was truncated"),
        ("t.jsonl", b'{"a":1}\n[1]\n', "row 2 (byte 8): it is no JSON object"),
        ("t.jsonl", b'{"a":1}\n{"a":1}{"b":2}\n', "row 2 (byte 8): JSON is malformed"),
        ("t.jsonl", b'{"a":1}\n{"a":01}\n', "row 2 (byte 8): JSON is malformed"),
        ("t.jsonl", b'{"a":1}\n{"a":"\xff"}\n', "row 2 (byte 14): it is no UTF-8"),
        ("t.jsonl", b'{"a":1}\n{"a":"\\ud800"}\n', "row 2 (byte 8): "),
        ("t.jsonl", b'{"a":1}\n{"a":' + b"[" * 5000, "row 2 (byte 8): it is nested too deeply"),
        ("t.jsonl", b'{"a":1}\n"' + b"x" * (1 << 20), "row 2 (byte 8): it is longer than 1 MiB"),
        ("t.jsonl", b"".join(b'{"%d":1}\n' % n for n in range(1001)), "1,001 columns"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else None,
)
def test_wrong_data_fails_the_job(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    """The job says which source, row and byte is wrong, and leaves no result."""
    error = failed(tmp_path, {name: data})
    assert error["code"] == "invalid-data"
    assert said in error["detail"]
    assert repr(name) in error["detail"]
    assert error["source"] == name


@pytest.mark.parametrize("data", [b"a,b\n" + b"1,2\n" * 500 + b"3\n", b"a,b\n" + b"1,2\n" * 500])
def test_a_row_is_told_by_its_place_in_its_file(
    tmp_path: Path, data: bytes, small_blocks: None
) -> None:
    """Number and byte count from the beginning of the file at fault, over all blocks."""
    error = failed(tmp_path, {"x.csv": data + b"4\n", "y.csv": data}, source=["y.csv", "x.csv"])
    name = "y.csv" if data.endswith(b"\n3\n") else "x.csv"
    assert (error["source"], error["row"], error["byte"]) == (name, 501, 2004)


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("t.csv", b"a\n", b'"' + b"x\n" * 40_000 + b'"\n'),
        ("t.jsonl", b"", b'{"a":"' + b"x" * 80_000 + b'"}\n'),
    ],
    ids=["csv", "jsonl"],
)
async def test_a_long_row_is_a_block_of_its_own(
    tmp_path: Path, name: str, head: bytes, row: bytes
) -> None:
    """What is read to reach a long row's end is not worked on with it, so that turns stay short."""
    short = b'{"a":1}\n' if name == "t.jsonl" else b"1\n"
    data = head + short + row + short * 30_000
    async with a_world(tmp_path) as world:
        file = await world.files.get(await put(world, name, data), OWNER)
        reader = await world.files.reader(file)
        records = await _records.open_records(_records.source_of(file, "auto", None), reader)
        blocks, rows = [], 0
        async for batch in records.batches(records.start, 0, 1000):
            assert len(batch.rows) <= 1000
            rows += len(batch.rows)
            if batch.end is not None:
                blocks.append(batch.end)
        await reader.close()
    begin = len(head + short)
    assert blocks[:2] == [begin, begin + len(row)]
    assert all(end - at <= _records.BLOCK_BYTES for at, end in pairwise(blocks[1:]))
    assert (rows, blocks[-1]) == (30_002, len(data))


@pytest.mark.parametrize(
    "params",
    [
        {"columns": ["a", "nope"]},
        {"where": "a = 1 or nope = 1"},
        {"dates": {"column": "nope", "from": "2024-01-01"}},
    ],
)
@pytest.mark.parametrize(
    "files",
    [
        {"t.csv": b"a\n1\n"},
        {"t.jsonl": b'{"a":1}\n'},
        {"t.csv": b"a\n1\n", "t.jsonl": b'{"a":1}\n'},
    ],
    ids=["csv", "jsonl", "both"],
)
def test_unknown_column(tmp_path: Path, files: dict[str, bytes], params: dict[str, Any]) -> None:
    """A name that no source has is refused wherever it stands, rather than read as empty."""
    error = failed(tmp_path, files, **params, source=list(files))
    assert (error["code"], error["detail"]) == (
        "invalid-data",
        "No source has a column named 'nope'.",
    )


def test_unknown_column_of_csv_is_known_from_the_headers(tmp_path: Path) -> None:
    """Where headers say which columns there are, no row is read to refuse another."""
    error = failed(tmp_path, {"t.csv": b"a\nwrong,row\n"}, columns=["nope"])
    assert error["detail"] == "No source has a column named 'nope'."


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_of_nothing(tmp_path: Path, format: str) -> None:
    """JSONL without rows has no columns and no rows, whichever are named."""
    for n, more in enumerate(({}, {"columns": ["a"]})):
        data = run(tmp_path / str(n), {"t.jsonl": b"\n"}, format=format, **more)
        data = gzip.decompress(data) if format.endswith("gz") else data
        assert data == (b"a\r\n" if more and format.startswith("csv") else b"")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "params.source"),
        ({"source": []}, "params.source"),
        ({"source": ""}, "params.source"),
        ({"source": ["a"] * 1001}, "params.source"),
        ({"format": "xlsx"}, "params.format"),
        ({"delimiter": ":"}, "params.delimiter"),
        ({"source_format": "xml"}, "params.source_format"),
        ({"columns": []}, "params.columns"),
        ({"columns": ["a", "a"]}, "params.columns"),
        ({"columns": ["x" * (21 << 10)]}, "params.columns"),
        ({"where": "a = "}, "params.where"),
        ({"where": "field `format` = 1"}, "params.where"),
        ({"dates": {"column": "a"}}, "params.dates.from"),
        ({"dates": {"column": "a", "from": "soon"}}, "params.dates.from"),
        ({"dates": [{"column": "a", "to": "2024-13-01"}]}, "params.dates[0].to"),
        ({"dates": {"column": "a", "from": "2024-01-02", "to": "2024-01-02"}}, "params.dates.to"),
        ({"dates": [{"column": "a", "to": "2024-01-01"}] * 11}, "params.dates"),
        ({"name": "../x"}, "params.name"),
        ({"name": "a\\b"}, "params.name"),
        ({"name": ".."}, "params.name"),
        ({"name": ""}, "params.name"),
        ({"name": "a\nb"}, "params.name"),
        ({"name": " a"}, "params.name"),
        ({"name": "e\u0301"}, "params.name"),
        ({"name": "x" * 256}, "params.name"),
        ({"expires_s": 59}, "params.expires_s"),
        ({"expires_s": 31_536_001}, "params.expires_s"),
        ({"columnz": ["a"]}, "params.columnz"),
    ],
)
def test_wrong_parameter_is_refused_at_the_start(params: dict[str, Any], field: str) -> None:
    """A bad parameter is a 400 with its name, before there is a job."""
    given = params if "source" in params or field == "params.source" else params | {"source": "t"}
    with pytest.raises(SluiceError) as caught:
        Registry([kind_of(export)]).parse("export", given)
    assert (caught.value.code, caught.value.field) == ("invalid-field", field)


def test_a_filter_is_refused_with_the_place() -> None:
    """Who writes a wrong filter is told at which character."""
    with pytest.raises(SluiceError, match=r"params.where: .*at character 3: expected a comparison"):
        Registry([kind_of(export)]).parse("export", {"source": "t", "where": "a b"})


# How long it still takes


class Timed:
    """The context of an export on a machine of a steady pace, and what was told on the way.

    The clock of the meters goes on by what was done: to look takes a second per KiB, to write two.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.told: list[tuple[float, str | None, Any]] = []
        self._ctx: Any = None

    async def run(self, ctx: Any, params: export.Params) -> dict[str, Any]:
        """See Kind."""
        self._ctx = ctx
        return await export.run(cast(Context, self), params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    async def checkpoint(self, cursor: Any = None, **more: Any) -> None:
        """Let time pass, and look at what is told."""
        meter = self._ctx.meter
        passed = more.get("done", meter.done) - meter.done
        self.now_s += passed / 1024 * (2 if meter.phase == "exporting" else 1)
        await self._ctx.checkpoint(cursor, **more)
        self.told.append((self.now_s, meter.phase, meter.progress(self.now_s).eta_s))


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_the_time_left_is_true(tmp_path: Path, small_blocks: None, source: str) -> None:
    """Whenever a time left is told, the end comes in it; it is told in nearly all of the last pass,
    and never in the first, whose pace is another one."""
    timed = Timed()
    rows = [{"id": str(n), "text": "x" * 20} for n in range(500)]

    async def work() -> None:
        async with World(tmp_path, run_by(timed.run)) as world:
            await put(world, f"t.{source}", stored(source, rows))
            await made(world, {"source": f"t.{source}"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "monotonic", lambda: timed.now_s)
        asyncio.run(work())
    assert [eta for _, phase, eta in timed.told if phase != "exporting" and eta] == []
    last = [(now_s, eta) for now_s, phase, eta in timed.told if phase == "exporting"]
    told = [(now_s, eta) for now_s, eta in last if eta is not None]
    assert len(told) > 0.8 * len(last)
    for now_s, (low_s, high_s) in told:
        assert low_s - 0.1 <= timed.now_s - now_s <= high_s + 0.1


# Interruptions


class Interrupted:
    """The context of a process that is paused, or whose server dies, at chosen checkpoints."""

    def __init__(self, ctx: Any, trouble: Trouble) -> None:
        self._ctx = ctx
        self._trouble = trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    async def checkpoint(self, cursor: Any = None, **more: Any) -> None:
        """Go on, or be paused, or die, with or without having saved the cursor."""
        what = next(self._trouble.plan, "")
        if what == "pause":
            await self._trouble.world.tell(self._ctx.job_id, "pause")
        await self._ctx.checkpoint(cursor, **more)
        if what == "save":
            await self._ctx.save()
        if what in ("save", "die"):
            self._trouble.dying = True
            await asyncio.get_running_loop().create_future()


class Trouble:
    """An export on its own service, and what befalls it."""

    def __init__(self, folder: Path, warm_s: float) -> None:
        self.plan: Iterator[str] = iter(())
        self.dying = False

        async def run(ctx: Any, params: export.Params) -> dict[str, Any]:
            return await export.run(Interrupted(ctx, self), params)

        self.world = World(folder, run_by(run), warm_s=warm_s)

    async def through(self, params: dict[str, Any], plan: list[str]) -> bytes:
        """Export to the end, whatever happens on the way; what was made."""
        self.plan = iter(plan)
        job_id = await self.world.start("export", params)
        while True:
            if self.dying:
                self.dying = False
                await self.world.restart()
            job = await self.world.job(job_id)
            if job.state == "paused":
                await self.world.tell(job_id, "resume")
            if job.state in ("succeeded", "failed"):
                break
            await asyncio.sleep(0.0005)
        assert job.state == "succeeded", job.error
        assert job.result is not None
        assert self.world.unfinished() == []
        return self.world.published()[f"{job.result.file}/{job.artifacts[0].name}"]


NAMES = ["id", "né", 'odd "x", y']
TEXT = st.text('ab,"\n\r;é 0', max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    """A source's format, and its rows."""
    source = draw(st.sampled_from(["csv", "jsonl"]))
    cell = TEXT if source == "csv" else st.one_of(TEXT, st.integers(), st.none(), st.booleans())
    names = NAMES[: draw(st.integers(1, 3))]
    rows = draw(st.lists(st.tuples(*[cell for _ in names]), max_size=25))
    return source, [dict(zip(names, row, strict=True)) for row in rows]


def stored(source: str, rows: list[dict[str, Any]], quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    """A table as the standard library writes it."""
    if source == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
        return "".join(f"{line}\n" for line in lines).encode()
    text = io.StringIO(newline="")
    end = "\n" if quoting == csv.QUOTE_ALL else "\r\n"
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    if rows or source == "csv":
        writer.writerow(rows[0] if rows else NAMES[:1])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


@given(
    tables(),
    st.sampled_from(FORMATS),
    st.sampled_from([None, "id like '%a%'"]),
    st.integers(8, 200),
    st.sampled_from([1, 50, 1 << 20]),
    st.sampled_from([0.0, 30.0]),
    st.lists(st.sampled_from(["", "", "", "pause", "save", "die"]), max_size=12),
)
@settings(max_examples=400 if FULL else 60, deadline=None)
def test_no_interruption_changes_a_byte(
    table: tuple[str, list[dict[str, Any]]],
    format: str,
    where: str | None,
    block_bytes: int,
    part_bytes: int,
    warm_s: float,
    plan: list[str],
) -> None:
    """Paused warm or cold or killed anywhere, an export makes what the standard library makes."""
    source, rows = table
    chosen = rows if where is None else [r for r in rows if "a" in _cell(r["id"])]
    if source == "csv" or rows:
        wanted = stored(format.partition(".")[0], chosen)
        if format.startswith("csv") and not chosen:
            wanted = stored("csv", rows[:1]).partition(b"\r\n")[0] + b"\r\n"
    else:
        wanted = b""
    params = {"source": f"t.{source}", "format": format, "where": where, "columns": None}
    if source == "jsonl" and not rows:
        params["where"] = None

    async def work(folder: Path) -> None:
        trouble = Trouble(folder, warm_s)
        await trouble.world.open()
        await put(trouble.world, f"t.{source}", stored(source, rows, csv.QUOTE_ALL))
        alone = await trouble.through(params, [])
        assert (gzip.decompress(alone) if format.endswith("gz") else alone) == wanted
        assert await trouble.through(params, plan) == alone
        await trouble.world.close()

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_records, "BLOCK_BYTES", block_bytes)
        patch.setattr(_formats, "PART_BYTES", part_bytes)
        asyncio.run(work(Path(folder)))


@pytest.mark.parametrize("what", ["pause", "save"])
@pytest.mark.parametrize("format", FORMATS if FULL else FORMATS[::3])
def test_an_interruption_at_each_checkpoint(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch, format: str, what: str
) -> None:
    """Wherever a pause goes cold, or the server dies with a new cursor: not a byte changes."""
    monkeypatch.setattr(_formats, "PART_BYTES", 60)
    lines = "".join(f'{{"id":{n},"text":"row {n}"}}\n' for n in range(12))

    async def work() -> None:
        trouble = Trouble(tmp_path, 0)
        await trouble.world.open()
        await put(trouble.world, "t.csv", b'id,text\n1,"a\nb"\n2,c\n' + b"3,d\n" * 20)
        await put(trouble.world, "t.jsonl", lines.encode())
        params = {"source": ["t.csv", "t.jsonl"], "format": format}
        alone = await trouble.through(params, [])
        for n in range(200):
            plan = [*[""] * n, what]
            assert await trouble.through(params, plan) == alone, n
            if next(trouble.plan, None) is not None:
                break
        assert 20 < n < 199
        await trouble.world.close()

    asyncio.run(work())


def test_the_result_expires(tmp_path: Path, small_blocks: None) -> None:
    """The result has an end from its publication on, also if the job was killed in between."""

    async def work() -> None:
        trouble = Trouble(tmp_path, 0)
        async with trouble.world as world:
            await put(world, "t.csv", b"a\n" + b"1\n" * 500)
            await trouble.through({"source": "t.csv", "expires_s": 61}, [*[""] * 9, "save"])
            assert next(trouble.plan, None) is None
            file = await world.files.find("t-export.csv", OWNER)
            assert file.expires_at == file.created_at + 61_000
            assert file.media_type == "text/csv"

    asyncio.run(work())


def test_a_resumed_export_still_counts_rows_from_the_beginning(
    tmp_path: Path, small_blocks: None
) -> None:
    """What is wrong behind a cold pause is told by its place in the whole file."""

    async def work() -> None:
        trouble = Trouble(tmp_path, 0)
        async with trouble.world as world:
            await put(world, "t.csv", b"a,b\n" + b"1,2\n" * 500 + b"3\n")
            with pytest.raises(AssertionError):
                await trouble.through({"source": "t.csv"}, [*[""] * 20, "pause"])
            assert next(trouble.plan, None) is None
            (job,) = (
                await world.manager.find(Filter(owner=OWNER, kinds=("export",)), None, 9)
            ).items
            assert job.error is not None
            assert (job.error["row"], job.error["byte"]) == (501, 2004)

    asyncio.run(work())


async def test_an_artefact_expires_also_if_it_is_not_opened_again(tmp_path: Path) -> None:
    """How long a file is kept is saved with the cursor, like its length."""
    begun = asyncio.Event()

    async def run(ctx: Any, params: Any) -> None:
        if ctx.cursor is None:
            file = await ctx.artifact("a", expires_s=7)
            await file.write(b"x")
            await ctx.checkpoint(1)
            begun.set()
            await ctx.sleep(60)

    world = World(tmp_path, a_kind("once", run), warm_s=0)
    async with world:
        job_id = await world.start("once")
        await begun.wait()
        await world.tell(job_id, "pause")
        await world.until(job_id, "paused")
        while job_id in world.runners._live:  # until it is cold
            await asyncio.sleep(0)
        await world.tell(job_id, "resume")
        job = await world.until(job_id, "succeeded")
        assert job.result is not None and job.result.file is not None
        file = await world.files.get(job.result.file, OWNER)
        assert (file.bytes, file.expires_at) == (1, file.created_at + 7000)


def test_parts_of_gzip_are_neither_too_small_nor_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are compressed nearly as well as in one go; where none come, the cursor moves."""
    rows = [f"{n},{n % 100},some text and more\n" for n in range(60_000)]

    async def work() -> None:
        async with a_world(tmp_path, warm_s=0) as world:
            await put(world, "t.csv", ("id,n,text\n" + "".join(rows)).encode())
            few = {"source": "t.csv", "format": "csv.gz", "where": "n = 5"}
            data = await made(world, few)
            assert len(data) < 1.1 * len(gzip.compress(gzip.decompress(data), 4))
            monkeypatch.setattr(_formats, "_PART_SOURCE_BYTES", 1 << 17)
            Trap(monkeypatch, world, 15, "cold")
            job_id = await world.start("export", few | {"where": "n = 'none'"})
            job = await world.until(job_id, "paused")
            assert job.progress.done > 1 << 19
            assert job.cursor["cursor"]["offset"] > 1 << 18

    asyncio.run(work())


def test_a_source_that_is_deleted_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that is resumed after its source was deleted says so; newer ones are not read."""

    async def work() -> None:
        async with a_world(tmp_path, warm_s=0) as world:
            old = await put(world, "t.csv", b"a\n" + b"1\n" * 60_000)
            alone = await made(world, {"source": "t.csv", "name": "alone"})
            jobs: list[str] = []
            for name in "xy":
                with monkeypatch.context() as patch:
                    Trap(patch, world, 200, "cold")
                    jobs.append(await world.start("export", {"source": "t.csv", "name": name}))
                    await world.until(jobs[-1], "paused")
            assert len(world.unfinished()) == len(jobs)
            while world.runners._live:  # until they are cold
                await asyncio.sleep(0)
            await put(world, "t.csv", b"b\n2\n")
            await world.tell(jobs[0], "resume")
            job = await world.until(jobs[0], "succeeded")
            assert job.result is not None
            assert world.published()[f"{job.result.file}/x"] == alone
            await world.files.delete(old, OWNER)
            await world.tell(jobs[1], "resume")
            job = await world.until(jobs[1], "failed")
            assert job.error is not None
            assert job.error["code"] == "file-unknown"
            assert job.error["detail"] == (
                "The source 't.csv' was deleted before all of it was read."
            )
            while world.runners._live:  # until it has unwound
                await asyncio.sleep(0)
            assert world.unfinished() == []

    asyncio.run(work())


def test_a_deleted_source_that_is_open_is_read_to_its_end(tmp_path: Path) -> None:
    """A delete while the export reads changes nothing."""

    async def work() -> None:
        async with a_world(tmp_path) as world:
            file = await put(world, "t.csv", b"a\n" + b"1\n" * 200_000)
            job_id = await world.start("export", {"source": "t.csv"})
            while not any(path.stat().st_size for path in (tmp_path / "tmp").iterdir()):
                await asyncio.sleep(0)
            await world.files.delete(file, OWNER)
            job = await world.until(job_id, "succeeded")
            assert job.result is not None
            assert job.result.data["rows_written"] == 200_000

    asyncio.run(work())


def test_progress_counts_source_bytes_of_both_passes(tmp_path: Path) -> None:
    """Done and total are bytes of the sources, twice where JSONL is read twice."""

    async def work() -> None:
        async with a_world(tmp_path) as world:
            await put(world, "t.jsonl", b'{"a":1}\n' * 50_000)
            await put(world, "t.csv", b"a\n" + b"1\n" * 50_000)
            both = ["t.csv", "t.jsonl"]
            for params, total in (({}, 900_002), ({"columns": ["a"]}, 500_002)):
                job_id = await world.start("export", {"source": both} | params)
                seen, last = [], 0
                while (job := await world.job(job_id)).state != "succeeded":
                    assert job.state != "failed", job.error
                    now = world.runners.glance(job).progress
                    if now is not None and now.total is not None:
                        assert now.total == total
                        assert last <= now.done <= total
                        last = now.done
                        seen.append((now.phase, now.message))
                    await asyncio.sleep(0)
                assert (
                    job.progress.phase,
                    job.progress.message,
                ) == ("exporting", "100,000 rows read, 100,000 written")
                assert (job.progress.done, job.progress.unit) == (total, "bytes")
                assert len(set(seen)) > 2
                assert job.result is not None
                assert job.result.data["rows_read"] == 100_000

    asyncio.run(work())


# The server itself


def upload(server: Server, name: str, data: bytes) -> None:
    """Store a file by a form."""
    body, content_type = form(("file", name, data))
    assert server.request("POST", "/upload", body, {"Content-Type": content_type}).status == 200


def start(server: Server, **params: Any) -> str:
    """Start an export."""
    answer = server.post("/v1/jobs", {"kind": "export", "params": params})
    assert answer.status == 201, answer
    return str(answer.json["id"])


def content(server: Server, job_id: str) -> bytes:
    """What an export made, when it has."""
    job = server.wait_for(job_id, "succeeded", "failed")
    assert job["state"] == "succeeded", job["error"]
    return server.get(f"/v1/files/{job['result']['file']}/content").body


def test_over_http(server: Server) -> None:
    """Start by POST, refuse a wrong filter by 400, show the kind, and give the result as a file."""
    upload(server, "t.csv", TABLE)
    assert content(server, start(server, source="t.csv", columns=["id"], where="n > 0")) == (
        b"id\r\n1\r\n"
    )
    answer = server.post(
        "/v1/jobs", {"kind": "export", "params": {"source": "t.csv", "where": "n >"}}
    )
    assert (answer.status, answer.json["field"]) == (400, "params.where")
    kinds = {kind["kind"]: kind for kind in server.get("/v1/kinds").json["items"]}
    assert kinds["export"]["unit"] == "bytes"


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("format", "points"),
    [
        ("csv", ["written:5", "published:1"]),
        ("jsonl", ["checkpoint:40", "ending:1"]),
        ("csv.gz", ["written:2", "checkpoint:90"]),
        ("jsonl.gz", ["saved:1", "written:3"]),
    ][:: 1 if FULL else 3],
)
def test_killed_at_exact_moments(serve: Serve, format: str, points: list[str]) -> None:
    """kill -9 between any two steps, and a cold pause: the same bytes, and no leftovers."""
    chance = random.Random(4)
    rows = (f"{n},{chance.random()},plain\n" for n in range(80_000))
    server = serve("--warm-s", "0")
    upload(server, "t.csv", b"id,v,text\n" + "".join(rows).encode())
    alone = content(server, start(server, source="t.csv", format=format))
    for point in points:
        server.kill()
        server.env = {"CRASH_AT": point}
        server.start()
        job_id = ""
        with suppress(ConnectionError):
            job_id = start(server, source="t.csv", format=format)
        process = server.process
        assert process is not None
        eventually(lambda p=process: p.poll() is not None, f"it dies at {point}")  # type: ignore[misc]
        server.kill()
        server.env = {}
        server.start()
        job_id = job_id or server.jobs()[0]["id"]
        with suppress(AssertionError):  # it may have ended
            server.post(f"/v1/jobs/{job_id}/pause")
            server.wait_for(job_id, "paused", within_s=1)
        server.post(f"/v1/jobs/{job_id}/resume")
        assert content(server, job_id) == alone
    eventually(lambda: list((server.folder / "tmp").iterdir()) == [], "tmp/ is empty")
