"""csv.validate and csv.import: what is read, what is wrong, and each row once whatever happens."""

from __future__ import annotations

import asyncio
import csv
import io
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import SluiceError
from jobs.harness import check
from jobs.kinds import Column, Registry, csv_import, csv_validate, kind_of
from jobs.kinds._csv import Converter, CsvParams, Guess, open_csv, split_plain
from jobs.trial import MODES
from storage import Job
from tests.harness import FULL
from tests.jobs.world import World, eventually

IMPORT, VALIDATE = kind_of(csv_import), kind_of(csv_validate)
ON_LANE = (IMPORT._replace(runner="lane"), VALIDATE._replace(runner="lane"))


class Site:
    """A world with short ways to import and validate."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def run(self, kind: str, data: bytes, name: str = "in.csv", **params: Any) -> Job:
        """Store a file and let a job end over it."""
        await self.world.store(name, data)
        job_id = await self.world.start(kind, {"source": name} | params)
        return await self.world.until(job_id, "succeeded", "failed", within_s=60)

    async def imported(self, data: bytes, **params: Any) -> list[Any]:
        """The rows of a table made of a file."""
        return self.rows(await self.run("csv.import", data, **params))

    async def result(self, kind: str, data: bytes, **params: Any) -> dict[str, Any]:
        """The data of a result."""
        job = await self.run(kind, data, **params)
        assert job.result is not None, job.error
        return job.result.data

    async def types(self, data: bytes, **params: Any) -> dict[str, str]:
        """The types that a table gets."""
        data_of = await self.result("csv.import", data, **params)
        return {column["name"]: column["type"] for column in data_of["columns"]}

    def rows(self, job: Job) -> list[Any]:
        """The rows of the table that a job has made."""
        assert job.result is not None, job.error
        (made,) = [a for a in job.artifacts if a.file == job.result.file]
        con = sqlite3.connect(self.world.folder / "uploads" / made.file / made.name)
        assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = con.execute("SELECT * FROM rows ORDER BY rowid").fetchall()
        con.close()
        return rows

    def report(self, job: Job) -> list[tuple[str, ...]]:
        """What the report about errors says, without its header."""
        (made,) = [a for a in job.artifacts if a.name.endswith("-errors.csv")]
        path = self.world.folder / "uploads" / made.file / made.name
        header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        assert header == ["row", "column", "value", "reason"]
        return [tuple(row) for row in rows]

    async def error(self, kind: str, data: bytes, **params: Any) -> dict[str, Any]:
        """Why a job over a file fails; nothing of it is left."""
        job = await self.run(kind, data, **params)
        assert job.state == "failed", job.result
        assert job.error is not None
        await eventually(lambda: not self.world.unfinished(), "it is gone")
        return job.error


@asynccontextmanager
async def a_site(folder: Path, *kinds: Any, **more: Any) -> AsyncIterator[Site]:
    """An empty folder, open."""
    async with World(folder, *(kinds or ON_LANE), **more) as world:
        yield Site(world)


# What is read


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
async def test_any_usual_file(tmp_path: Path, end: str, delimiter: str) -> None:
    """Delimiters and line ends are found; types are told; no value is none."""
    lines = ["id,name,price,day,open", "1,Ann,1.50,2026-01-31,true", "-2,,,,"]
    lines.append("3,ÄÖ,2,2024-02-29,false")
    data = end.join(lines).replace(",", delimiter).encode()
    async with a_site(tmp_path) as site:
        job = await site.run("csv.import", data, table="t")
        assert site.rows(job) == [
            (1, "Ann", 1.5, "2026-01-31", 1),
            (-2, None, None, None, None),
            (3, "ÄÖ", 2.0, "2024-02-29", 0),
        ]
        assert job.result is not None
        types = {column["name"]: column["type"] for column in job.result.data["columns"]}
        assert types == {
            **{"id": "integer", "name": "text", "price": "real"},
            **{"day": "date", "open": "boolean"},
        }
        assert {k: job.result.data[k] for k in ("table", "rows", "rows_wrong")} == {
            **{"table": "t", "rows": 3, "rows_wrong": 0}
        }
        assert [artifact.name for artifact in job.artifacts] == ["t"]


async def test_quotes_and_empty_lines(tmp_path: Path) -> None:
    """Quoted delimiters, line ends and quotes; empty lines hold no rows; a BOM is no name."""
    data = b'\xef\xbb\xbf"a",b\r\n\r\n"x,y","two\r\nlines"\r\n"say ""hi""",\r\n\n\r\nlast,one'
    async with a_site(tmp_path) as site:
        assert await site.imported(data, null=[]) == [
            ("x,y", "two\r\nlines"),
            ('say "hi"', ""),
            ("last", "one"),
        ]
        result = await site.result("csv.validate", data)
        assert (result["rows"], result["rows_wrong"]) == (3, 0)
        assert [column["name"] for column in result["columns"]] == ["a", "b"]


async def test_a_single_column(tmp_path: Path) -> None:
    """There an empty line is a row."""
    async with a_site(tmp_path) as site:
        assert await site.imported(b"n\n1\n\n3\n") == [(1,), (None,), (3,)]


async def test_headers(tmp_path: Path) -> None:
    """The first row may be names, passed over, or a row; columns choose or name."""
    data = b"a,b,c\n1,2,3\n4,5,6\n"
    async with a_site(tmp_path) as site:
        assert await site.imported(data, columns=["c", "a"]) == [(3, 1), (6, 4)]
        assert await site.imported(data, header="skip") == [(1, 2, 3), (4, 5, 6)]
        named = await site.types(data, header="skip", columns=["x", "y", "z"])
        assert list(named) == ["x", "y", "z"]
        assert (await site.imported(data, header="none"))[0] == ("a", "b", "c")
        error = await site.error("csv.import", data, columns=["c", "d"])
        assert error["code"] == "invalid-data"
        assert "no column named 'd'" in error["detail"]
        error = await site.error("csv.import", data, header="none", columns=["x"])
        assert "3 cells, not 1" in error["detail"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\n\r\n", "empty"),
        (b"a,a\n1,2\n", "stands there twice"),
        (b"a,A\n1,2\n", "stands there twice"),
        (b"a,\n1,2\n", "'' is no name"),
        (b"a\0,b\n1,2\n", "is no name"),
        (b"a,\xff\n1,2\n", "no UTF-8"),
        (b'a,"b\n1,2\n', "a quote is in a wrong place"),
        (b'a,"b"x\n1,2\n', "a quote is in a wrong place"),
        (b"a,b\r1,2\r", "end in CR alone"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04", "spreadsheet"),
        (b"x" * (2 << 20), "too long"),
        (b",".join(b"c%d" % n for n in range(2001)) + b"\n", "2,001 columns"),
        (b"x" * 30_000 + b",b\n1,2\n", "20 KiB"),
    ],
)
async def test_files_that_are_refused_whole(tmp_path: Path, data: bytes, said: str) -> None:
    """What is no CSV in UTF-8 with names of columns is refused in one sentence, by both."""
    async with a_site(tmp_path) as site:
        for kind in ("csv.import", "csv.validate"):
            error = await site.error(kind, data)
            assert error["code"] == "invalid-data"
            assert said in error["detail"]
            assert len(error["detail"]) < 400


async def test_as_many_columns_as_there_can_be(tmp_path: Path) -> None:
    """2,000 columns, and names that look like SQL, are columns like others."""
    names = [f"c{n}" for n in range(1998)] + ['x"); DROP TABLE rows; --', "rowid"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([[str(n * k) for n in range(2000)] for k in range(20)])
    async with a_site(tmp_path) as site:
        rows = await site.imported(text.getvalue().encode())
        assert rows == [tuple(n * k for n in range(2000)) for k in range(20)]
        result = await site.result("csv.validate", text.getvalue().encode())
        assert [column["name"] for column in result["columns"]] == names


# What is wrong

WRONG = (
    b"n,text\n"
    b"1,one\n"
    b"2\n"  # too short
    b"3,three,drei\n"  # too long
    b"x,four\n"  # no number
    b'5,"five" or so\n'  # a lone quote
    b"6,six\r,seven\n"  # CR in the middle
    b"7,\xff\n"  # no UTF-8
    b"8,a\0b\n"  # NUL
    b"9223372036854775808,nine\n"  # beyond 64 bits
    b"10,ten\n"
)


async def test_wrong_rows_are_reported_and_left_out(tmp_path: Path) -> None:
    """Each with its number, column, value and reason; the good ones around them are there."""
    wish: dict[str, Any] = {"types": {"n": "integer", "text": "text"}, "on_error": "skip"}
    async with a_site(tmp_path) as site:
        job = await site.run("csv.import", WRONG, **wish)
        assert site.rows(job) == [(1, "one"), (10, "ten")]
        assert site.report(job) == [
            ("2", "", "2", "the row has 1 cells, but there are 2 columns"),
            ("3", "", "3,three,drei", "the row has 3 cells, but there are 2 columns"),
            ("4", "n", "x", "it is no whole number of 64 bits"),
            ("5", "", "", "a quote is in the middle of a quoted cell"),
            ("6", "", "", "there is a carriage return (CR) outside of quotes"),
            ("7", "text", "?", "it is no UTF-8"),
            ("8", "text", "a\0b", "it has a NUL character"),
            ("9", "n", "9223372036854775808", "it is no whole number of 64 bits"),
        ]
        assert job.result is not None
        assert job.result.data["rows_wrong"] == 8
        assert job.result.file != job.artifacts[0].file or job.artifacts[0].name == "in"
        del wish["on_error"]
        checked = await site.run("csv.validate", WRONG, **wish)
        assert site.report(checked) == site.report(job)
        assert checked.result is not None
        data = checked.result.data
        assert (data["rows"], data["rows_wrong"], data["cells_wrong"]) == (10, 8, 2)
        assert data["columns"][0] == {
            **{"name": "n", "type": "integer", "nulls": 0, "errors": 2, "fits": "text"}
        }


async def test_the_first_wrong_row_fails_the_job(tmp_path: Path) -> None:
    """Unless it is told to skip: with the row, the column and the value; nothing is left."""
    async with a_site(tmp_path) as site:
        error = await site.error("csv.import", b"n\n1\nx\n3\n", types={"n": "integer"})
        assert (error["code"], error["row"]) == ("invalid-data", 2)
        assert "row 2, column 'n': it is no whole number" in error["detail"]
        assert "'x'" in error["detail"]
        assert site.world.published().keys() == {
            key for key in site.world.published() if key.endswith("in.csv")
        }


async def test_too_many_wrong_rows(tmp_path: Path) -> None:
    """The import fails, naming the first one; the report of a validation ends, its counts don't."""
    data = b"n\n" + b"x\n" * 3000
    wish: dict[str, Any] = {"types": {"n": "integer"}, "max_errors": 100}
    async with a_site(tmp_path) as site:
        error = await site.error("csv.import", data, on_error="skip", **wish)
        assert "more than 100 rows are wrong, at first row 1" in error["detail"]
        job = await site.run("csv.validate", data, **wish)
        assert len(site.report(job)) == 100
        assert job.result is not None
        assert (job.result.data["rows_wrong"], job.result.data["reported"]) == (3000, 100)


@pytest.mark.parametrize("end", [b"\n", b""])
async def test_a_quote_that_is_never_closed(tmp_path: Path, end: bytes) -> None:
    """It costs the line that it is in, not the rest of the file."""
    big = 20_000 if not FULL else 100_000
    rest = b"".join(b"%d,row\n" % n for n in range(big))
    async with a_site(tmp_path) as site:
        data = b'n,text\n1,"open\n' + rest + b'2,"open again' + end
        job = await site.run("csv.import", data, on_error="skip", types={"n": "integer"})
        assert site.rows(job) == [(n, "row") for n in range(big)]
        assert [row[0] for row in site.report(job)] == ["1", str(big + 2)]


async def test_rows_as_long_as_they_may_be_and_longer(tmp_path: Path) -> None:
    """Fields of nearly 1 MiB are read; of more, reported with their beginning only."""
    fits, longer = b"x" * ((1 << 20) - 20), b"y" * (3 << 20)
    data = b"n,text\n1," + fits + b'\n2,"' + fits[:-9] + b'\n"\n3,' + longer + b"\n4,d\n5," + longer
    async with a_site(tmp_path) as site:
        job = await site.run("csv.import", data, on_error="skip")
        rows = site.rows(job)
        assert [(n, len(text)) for n, text in rows] == [
            (1, len(fits)),
            (2, len(fits) - 8),
            (4, 1),
        ]
        report = site.report(job)
        assert [(row[0], row[3]) for row in report] == [
            ("3", "the row is longer than 1 MiB"),
            ("5", "the row is longer than 1 MiB"),
        ]
        assert all(len(row[2]) <= 200 for row in report)


# Types


def guess(*cells: str) -> str:
    """The type that a column of these seems to have."""
    found = Guess()
    for cell in cells:  # one by one, as blocks come
        found.see([cell])
    whole = Guess()
    whole.see(cells)
    assert found.type == whole.type
    return found.type


@pytest.mark.parametrize(
    ("cells", "type"),
    [
        (["1", "-2", "0", "9223372036854775807"], "integer"),
        (["1", "2.5"], "real"),
        (["1e5"], "real"),
        (["1", "9223372036854775808"], "decimal"),
        (["12345678901234567", "0.5"], "decimal"),
        (["1.23456789012345678"], "decimal"),
        (["007"], "text"),
        (["+5"], "text"),
        (["1_000"], "text"),
        ([" 1"], "text"),
        (["٣"], "text"),
        (["nan"], "text"),
        (["true", "False"], "boolean"),
        (["1", "0"], "integer"),
        (["true", "1"], "text"),
        (["2026-01-31", "2024-02-29"], "date"),
        (["2026-02-29"], "text"),
        (["20260131"], "integer"),
        (["2026-W05-1"], "text"),
        (["2026-01-31T20:15", "2026-01-31 20:15:00.5+01:00"], "datetime"),
        (["2026-01-31", "2026-01-31T20:15"], "text"),
        (["1", "x"], "text"),
        (["x", "1"], "text"),
        ([], "text"),
    ],
)
def test_types_are_told_by_what_would_be_lost(cells: list[str], type: str) -> None:
    """The narrowest type that keeps every cell as it is."""
    assert guess(*cells) == type


GOOD: dict[str, dict[str, Any]] = {
    "integer": {"1": 1, "-0": 0, "+7": 7, "007": 7, "-9223372036854775808": -(1 << 63)},
    "real": {"1": 1.0, ".5": 0.5, "5.": 5.0, "+1e3": 1000.0, "007.5": 7.5, "1e-400": 0.0},
    "boolean": {"true": 1, "FALSE": 0, "1": 1, "0": 0, "Yes": 1, "n": 0},
    "date": {"2026-01-31": "2026-01-31"},
    "datetime": {"2026-01-31T20:15:00Z": "2026-01-31T20:15:00Z"},
    "decimal": {"1.10": "1.10", "1" * 100: "1" * 100, "-0.5e9": "-0.5e9"},
    "text": {"\ta ": "\ta ", "NULL": "NULL"},
}
BAD: dict[str, list[str]] = {
    "integer": [
        "x",
        "1.0",
        "1e3",
        " 1",
        "1 ",
        "1_0",
        "٣",
        "--1",
        "1-2",
        "1,2",
        "9" * 30,
        "1" * 5000,
    ],
    "real": ["x", "nan", "inf", "-Infinity", "1e999", "1_0.5", " 1", "0x1p3", "1,5", "-", "."],
    "boolean": ["x", "2", "tRue", " true"],
    "date": [
        "2026-02-30",
        "20260131",
        "2026-1-31",
        "2026-W05-1",
        "x",
        "2026-01-31T00:00",
        "٢٠٢٦-01-31",
    ],
    "datetime": ["2026-01-31", "2026-01-31T25:00", "x", "2026-01-31T20"],
    "decimal": ["x", "1_0", "nan", "1e", " 1", "1" * 1001],
}


@pytest.mark.parametrize("type", GOOD)
def test_values_of_a_type(type: str) -> None:
    """A column is converted as a whole, with cells that are wrong, and cell by cell, alike."""
    good, bad = GOOD[type], BAD.get(type, [])
    converter = Converter(Column("c", type), ["", "-"])
    assert converter.values(list(good)) == (list(good.values()), [])
    values, wrong = converter.values([*good, "", *bad, "-", *good])
    assert list(values) == [
        *good.values(),
        None,
        *([None] * len([b for b in bad if b != "-"] + [b for b in bad if b == "-"])),
        None,
        *good.values(),
    ]
    expected = [n for n, cell in enumerate(bad, len(good) + 1) if cell != "-"]
    assert wrong == expected
    for cell in bad:
        if cell != "-":
            assert converter.values([cell])[1] == [0]
    assert converter.nulls == 2 + bad.count("-")


# The same as the csv module


class Bytes:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = self.bytes = len(data)
        self.id = self.name = "in.csv"
        self.media_type, self.layout, self.h = "text/csv", "plain", 1
        self.digest: dict[str, str] = {}

    async def read(self, start: int, n: int) -> bytes:
        """See FileReader."""
        return self._data[start : start + n]

    def fileno(self) -> None:
        """See FileReader."""

    async def close(self) -> None:
        """See FileReader."""


async def read(data: bytes, delimiter: Any) -> tuple[list[list[str]], list[int], int]:
    """All good rows of a file without a header, the numbers of the wrong ones, and how many."""
    file = Bytes(data)
    params = CsvParams(source="in.csv", delimiter=delimiter, header="none")
    opened = await open_csv(file, file, params)
    rows: list[list[str]] = []
    wrong: list[int] = []
    last = 0
    numbers: list[int] = []
    async for part in opened.blocks(opened.start, 0):
        width = opened.width
        rows += [part.cells[at : at + width] for at in range(0, len(part.cells), width)]
        numbers += part.numbers
        wrong += [fault.row for fault in part.faults]
        last = part.row
    assert sorted(numbers + wrong) == list(range(1, last + 1))
    return rows, wrong, last


CELLS = st.text(st.sampled_from('ab,;"\n é1 '), max_size=6)  # the module quotes no CR alone


@given(
    st.lists(st.lists(CELLS, min_size=2, max_size=4), min_size=1, max_size=30),
    st.sampled_from(",;"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([48, 256, 65536]),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_rows_are_those_of_the_csv_module(
    rows: list[list[str]], delimiter: str, quoting: Any, end: str, block: int
) -> None:
    """Whatever is written can be read again, however the blocks lie; other widths are told."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.kinds._csv.BLOCK_BYTES", block)
        patch.setattr("jobs.kinds._csv.MAX_ROW_BYTES", 4096)
        found, wrong, last = asyncio.run(read(text.getvalue().encode(), delimiter))
    width = len(rows[0])
    assert found == [row for row in rows if len(row) == width]
    assert wrong == [n for n, row in enumerate(rows, 1) if len(row) != width]
    assert last == len(rows)


@given(st.binary(max_size=300), st.sampled_from([16, 65536]))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_are_read_or_refused(data: bytes, block: int) -> None:
    """No input raises anything but invalid-data, and none is read for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.kinds._csv.BLOCK_BYTES", block)
        patch.setattr("jobs.kinds._csv.MAX_ROW_BYTES", 64)
        try:
            asyncio.run(read(data, ","))
        except SluiceError as error:
            assert error.code == "invalid-data"


WORDS = ['"a"', "b", '""', '"', ",", "\n", ",", "\n", '"1,"', '"a"\n"b",']
LINES = st.one_of(
    st.text(st.sampled_from('ab,\n\r1"'), max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=40).map("".join),
)


@given(LINES, st.integers(1, 4))
@settings(deadline=None, max_examples=600)
def test_the_short_way_gives_what_the_csv_module_gives(text: str, width: int) -> None:
    """Where lines are split without it, the cells are the same."""
    cells = split_plain(text.encode(), ",", width)
    if cells is None:
        return
    rows = list(csv.reader(io.StringIO(text.removesuffix("\n") + "\n", newline="\n"), strict=True))
    assert [cells[at : at + width] for at in range(0, len(cells), width)] == [
        row or [""] for row in rows
    ]


# Disturbed


def table_of(rows: int) -> bytes:
    """A file with wrong rows here and there."""
    dice = random.Random(rows)
    lines = ["n,text,price,day"]
    for n in range(rows):
        name = f'"row {n}"' if n % 11 == 0 else f"row {n}"
        lines.append(f"{n},{name},{dice.randrange(999) / 4},2026-01-{n % 28 + 1:02d}")
        if n % 97 == 5:
            lines.append(f"wrong {n}")
    return "\n".join(lines).encode()


DISTURBED = {"source": "in.csv", "types": {"n": "integer"}}


@pytest.mark.parametrize("kind", ["csv.import", "csv.validate"])
def test_no_disturbance_changes_the_end(kind: str) -> None:
    """Paused, killed or cancelled at its points: the same table and report, or nothing at all."""
    params = dict(DISTURBED) | ({"on_error": "skip"} if kind == "csv.import" else {})
    modes = tuple(MODES) if FULL else ("cold", "both", "cancel")
    check(kind, params, {"in.csv": table_of(9000)}, sample=12 if FULL else 2, modes=modes)


async def test_rows_are_exact_over_pauses_and_kills(tmp_path: Path) -> None:
    """A child that is paused, and a service that is killed, again and again: each row is once."""
    rows = 200_000 if FULL else 60_000
    data = b"n,text\n" + b"".join(b"%d,row %d\n" % (n, n) for n in range(rows))
    dice = random.Random(5)
    async with a_site(tmp_path, IMPORT, warm_s=0.0) as site:
        world = site.world
        await world.store("in.csv", data)
        job_id = await world.start("csv.import", {"source": "in.csv"})
        for n in range(6):
            job = await world.until(job_id, "running", "succeeded")
            if job.state == "succeeded":
                break
            await asyncio.sleep(dice.uniform(0.05, 0.4))
            if n % 2:
                await world.restart()
            else:
                with suppress(SluiceError):  # it may have ended
                    await world.tell(job_id, "pause")
                job = await world.until(job_id, "paused", "succeeded")
                if job.state == "paused":
                    await world.tell(job_id, "resume")
        job = await world.until(job_id, "succeeded", within_s=60)
        assert site.rows(job) == [(n, f"row {n}") for n in range(rows)]
        assert world.unfinished() == []


async def test_appending(tmp_path: Path) -> None:
    """A new version begins with the rows of the newest one and has its types; the old one stays."""
    async with a_site(tmp_path) as site:
        first = await site.run("csv.import", b"n,text\n1,007\n", table="t")
        second = await site.run("csv.import", b"n,text\n2,8\n", table="t", mode="append")
        assert site.rows(second) == [(1, "007"), (2, "8")]
        assert site.rows(first) == [(1, "007")]
        replaced = await site.run("csv.import", b"x\n9\n", table="t")
        assert site.rows(replaced) == [(9,)]
        assert await site.imported(b"n\n1\n", table="new", mode="append") == [(1,)]
        error = await site.error("csv.import", b"y\n1\n", table="t", mode="append")
        assert "other columns" in error["detail"]
        error = await site.error("csv.import", b"x\n1\n", table="in.csv")
        assert (error["code"], error["field"]) == ("invalid-field", "params.table")


async def test_a_newer_version_is_never_mixed_in(tmp_path: Path) -> None:
    """The file that was newest at the start is read to its end, also over a crash."""
    data = b"n\n" + b"".join(b"%d\n" % n for n in range(200_000))
    async with a_site(tmp_path) as site:
        world = site.world
        await world.store("in.csv", data)
        job_id = await world.start("csv.import", {"source": "in.csv"})
        await eventually(lambda: len(world.unfinished()) > 1, "it has begun")
        await world.restart()
        await world.store("in.csv", b"n\n7\n")
        job = await world.until(job_id, "succeeded", within_s=60)
        assert site.rows(job) == [(n,) for n in range(200_000)]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"table": "a/b"}, "no plain file name"),
        ({"columns": ["a", "A"]}, "stands there twice"),
        ({"columns": ["a"], "types": {"b": "text"}}, "which is no column"),
        ({"types": {"b": "varchar"}}, "types"),
        ({"delimiter": "x"}, "delimiter"),
        ({"max_errors": -1}, "max_errors"),
        ({"expires_s": 1}, "expires_s"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_parameters_are_checked_at_the_start(params: dict[str, Any], said: str) -> None:
    """What can't be is refused before there is a job."""
    with pytest.raises(SluiceError) as caught:
        Registry([IMPORT]).parse("csv.import", {"source": "in.csv"} | params)
    assert caught.value.code == "invalid-field"
    assert said in caught.value.detail
