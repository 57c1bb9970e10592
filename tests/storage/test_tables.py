"""Tables: rows commit with their mark or not at all, and what is finished can be read for good."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import SluiceError
from storage.tables import TYPES, TableFile, TableReader, check_columns, flat

COLUMNS = [("n", "integer"), ("text", "text")]
SIDES = ("-wal", "-shm", "-journal")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a table is made."""
    return tmp_path / "table"


@pytest.fixture
def table(path: Path) -> Iterator[TableFile]:
    """A table without rows."""
    table = TableFile(path)
    table.begin(COLUMNS, {"source": "a.csv"}, 0)
    yield table
    table.close()


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    """All rows with their numbers, as anybody's SQLite reads them."""
    con = sqlite3.connect(path)
    assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = con.execute("SELECT rowid, * FROM rows ORDER BY rowid").fetchall()
    con.close()
    return rows


def wrong(columns: list[tuple[str, str]]) -> str:
    """Why these can't be columns."""
    with pytest.raises(SluiceError) as caught:
        check_columns(columns)
    assert (caught.value.code, caught.value.field) == ("invalid-field", "columns")
    return caught.value.detail


def test_what_was_committed_is_found_again(table: TableFile, path: Path) -> None:
    """Rows that were added but not committed are gone, with the mark behind them."""
    table.add([1, "one", 2, None])
    table.commit({"at": 2})
    table.add([3, "three"])
    table.close()
    assert TableFile.found(path) == {"at": 2}
    again = TableFile(path)
    assert (again.columns, again.rows, again.mark) == (COLUMNS, 2, {"at": 2})
    again.add([3, "drei"])
    again.finish({"at": 3})
    assert rows_of(path) == [(1, 1, "one"), (2, 2, None), (3, 3, "drei")]
    assert not any(Path(f"{path}{side}").exists() for side in SIDES)


def test_a_place_without_a_table_has_no_mark(path: Path) -> None:
    """Nothing there, or a database that was not begun: nobody is told to go on."""
    assert TableFile.found(path) is None
    assert not path.exists()
    TableFile(path).close()
    assert TableFile.found(path) is None


def test_many_rows_go_in_together(table: TableFile, path: Path) -> None:
    """However many rows a call has, each gets the next number."""
    dice = random.Random(1)
    expected: list[tuple[Any, ...]] = []
    for size in (0, 1, 349, 350, 351, 700, 1234):
        rows = [(dice.randrange(-(1 << 63), 1 << 63), dice.random().hex()) for _ in range(size)]
        table.add(flat(rows, 2))
        expected += [(len(expected) + 1 + i, *row) for i, row in enumerate(rows)]
        assert table.rows == len(expected)
    table.finish(None)
    assert rows_of(path) == expected


@pytest.mark.parametrize("rows", [[[1]], [[1, "a"], [2, "b", "c"]], [[1, "a"], []]])
def test_rows_have_the_width_of_the_table(rows: list[list[Any]]) -> None:
    """A row with more or fewer cells is refused before anything is written."""
    with pytest.raises(ValueError, match="2 cells"):
        flat(rows, 2)


@pytest.mark.parametrize(
    ("cells", "kind"), [([1 << 63, "a"], OverflowError), ([1, "\ud800"], UnicodeEncodeError)]
)
def test_a_cell_that_is_none_spoils_the_uncommitted(
    table: TableFile, path: Path, cells: list[Any], kind: type[Exception]
) -> None:
    """What SQLite can't hold raises, and no more is taken: else rows were missing in between."""
    table.add([1, "one"])
    table.commit(1)
    table.add([2, "two"])
    with pytest.raises(kind):
        table.add(cells)
    assert table.lost
    with pytest.raises(SluiceError, match="storage-failed"):
        table.add([3, "three"])
    with pytest.raises(SluiceError, match="storage-failed"):
        table.commit(3)
    again = TableFile(path)
    assert (again.rows, again.mark) == (1, 1)
    again.close()


def test_a_table_that_outgrows_its_room(path: Path) -> None:
    """A full disk is said so; the rows that were committed are there, with their mark."""
    table = TableFile(path)
    table.begin(COLUMNS, {}, 0)
    table.add([1, "first"])
    table.commit(1)
    table._con.execute("PRAGMA max_page_count=8")
    with pytest.raises(SluiceError) as caught:
        for n in range(100):
            table.add([n, "x" * 4096])
            table.commit(2)
    assert caught.value.code == "disk-full"
    table.close()
    again = TableFile(path)
    again.finish(again.mark)
    assert rows_of(path)[0] == (1, 1, "first")


def test_no_room_for_the_rest_of_the_service(
    table: TableFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last MiBs of a disk are the state's; with room again, the same commit goes on."""
    table.add([1, "one"])
    with monkeypatch.context() as patch:
        patch.setattr("storage.tables._RESERVE_BYTES", 1 << 62)
        with pytest.raises(SluiceError, match="disk-full"):
            table.commit(1)
    assert not table.lost
    table.commit(1)
    table.finish(1)
    assert rows_of(path) == [(1, 1, "one")]


def test_a_commit_is_due_by_size(table: TableFile) -> None:
    """Who adds much is told to commit before the memory is full of it."""
    asked = [table.due]
    table.add([1, "one"])
    asked.append(table.due)
    table.add([2, "x" * (2 << 20)])
    asked.append(table.due)
    table.commit(2)
    assert [*asked, table.due] == [False, False, True, False]


def test_the_log_does_not_grow_with_the_table(path: Path) -> None:
    """What is beside the database stays a few MiB, however much is written."""
    table = TableFile(path)
    table.begin(COLUMNS, {}, 0)
    most = 0
    for n in range(64):
        table.add([n, "x" * (256 << 10)])
        if table.due:
            table.commit(n)
        most = max(most, Path(f"{path}-wal").stat().st_size)
    table.finish(64)
    assert path.stat().st_size > 16 << 20
    assert most < 4 << 20


def test_the_syncs_may_be_the_callers(path: Path) -> None:
    """Who makes them himself is told when, and has all rows in the database afterwards."""
    table = TableFile(path, log_bytes=64 << 10, syncs=False)
    table.begin(COLUMNS, {}, 0)
    folded = 0
    for n in range(100):
        table.add([n, "x" * 5000])
        table.commit(n)
        if table.has_long_log:
            table.copy_log()
            copy = path.read_bytes()
            table.drop_log()
            assert Path(f"{path}-wal").stat().st_size == 0
            assert path.read_bytes() == copy
            folded += 1
    assert folded > 3
    table.finish(99)
    assert [row[1] for row in rows_of(path)] == list(range(100))


def test_names_that_no_column_can_have() -> None:
    """Twins, nothing at all, control characters, too many, too long, no types."""
    assert "two columns are named 'Name'" in wrong([("name", "text"), ("Name", "text")])
    assert "can't be named ''" in wrong([("", "text")])
    assert "can't be named" in wrong([("a\0b", "text")])
    assert "can't be named" in wrong([("a\ud800", "text")])
    assert "not 2,001" in wrong([(f"c{n}", "text") for n in range(2001)])
    assert "not 0" in wrong([])
    assert "more than 20 KiB" in wrong([("x" * 21_000, "text")])
    assert "no type" in wrong([("a", "varchar")])
    assert "rowid" in wrong([("rowid", "text"), ("OID", "text"), ("_ROWID_", "text")])


HOSTILE = [
    'x"); DROP TABLE rows; --',
    "rows",
    "rowid",
    "select",
    "ä",
    "Ä",
    "a b",
    "[x]",
    "`",
    "'",
    "?",
    ":x",
    "%s",
    "📄",
    " ",
]


def test_any_name_is_only_a_name(path: Path) -> None:
    """What looks like SQL is quoted, in the making and in reading; the number stays the number."""
    table = TableFile(path)
    table.begin([(name, "text") for name in HOSTILE], {}, None)
    table.add(HOSTILE)
    table.finish(None)
    reader = TableReader(path)
    assert [name for name, _ in reader.columns] == HOSTILE
    assert reader.read(0, 10) == [tuple(HOSTILE)]
    for name in HOSTILE:
        assert reader.read(0, 10, [name]) == [(name,)]
    with pytest.raises(SluiceError, match="storage-failed"):
        reader.read(0, 1, ["unknown"])
    reader.close()


def test_as_many_columns_as_there_can_be(path: Path) -> None:
    """2,000 columns of all types."""
    types = list(TYPES)
    columns = [(f"c{n}", types[n % len(types)]) for n in range(2000)]
    table = TableFile(path)
    table.begin(columns, {}, None)
    row = [str(n) if TYPES[columns[n][1]] == "TEXT" else n for n in range(2000)]
    for _ in range(3):
        table.add(row)
    table.finish(None)
    reader = TableReader(path)
    assert reader.columns == columns
    assert reader.read(1, 5) == [tuple(row), tuple(row)]
    reader.close()


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-(1 << 63), (1 << 63) - 1)),
            st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]))),
            st.one_of(st.none(), st.floats(allow_nan=False)),
        )
    )
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=50,
)
def test_cells_come_out_as_they_went_in(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    """Nothing is cut, rounded or made of another type."""
    path = tmp_path / "any"
    table = TableFile(path)
    table.begin([("i", "integer"), ("t", "decimal"), ("r", "real")], {}, None)
    table.add(flat(rows, 3))
    table.finish(None)
    reader = TableReader(path)
    found: list[tuple[Any, ...]] = []
    while some := reader.read(len(found), 7):
        found += some
    reader.close()
    path.unlink()
    assert found == rows


def test_readers_outlive_the_file(table: TableFile, path: Path) -> None:
    """A table that is opened by its descriptor and then deleted is read to its end."""
    table.add([cell for n in range(20_000) for cell in (n, f"row {n}")])
    table.finish(None)
    fd = os.open(path, os.O_RDONLY)
    reader = TableReader(f"/proc/self/fd/{fd}")
    path.unlink()
    assert (reader.rows, reader.about) == (20_000, {"source": "a.csv"})
    found: list[tuple[Any, ...]] = []
    while some := reader.read(len(found), 999):
        found += some
    assert found == [(n, f"row {n}") for n in range(20_000)]
    reader.close()
    os.close(fd)


def test_big_cells_come_in_small_numbers(table: TableFile, path: Path) -> None:
    """A page of huge rows does not fill the memory: it is shorter, but never empty."""
    for n in range(64):
        table.add([n, "x" * (1 << 20)])
        table.commit(n)
    table.finish(None)
    reader = TableReader(path)
    found = 0
    while some := reader.read(found, 500):
        assert len(some) <= 32
        found += len(some)
    assert found == 64
    reader.close()


@pytest.mark.parametrize("damage", [b"", b"no database at all " * 100])
def test_what_is_no_table_is_not_read(path: Path, damage: bytes) -> None:
    """Bytes that are no database are refused in words that name no path."""
    path.write_bytes(damage)
    with pytest.raises(SluiceError) as caught:
        TableReader(path)
    assert caught.value.code == "storage-failed"
    assert str(path) not in str(caught.value)


KILLED = """
import sys
from pathlib import Path
from storage.tables import TableFile
table = TableFile(Path(sys.argv[1]), log_bytes=64 << 10)
if not table.columns:
    table.begin([("n", "integer"), ("text", "text")], {}, 0)
at = table.mark
print("ready", flush=True)
while True:
    table.add([cell for n in range(at, at + 100) for cell in (n, "x" * 200)])
    at += 100
    if at % 700 == 0:
        table.commit(at)
"""


def test_killed_at_any_moment(path: Path) -> None:
    """kill -9 in the middle of writing, again and again: each row is there once, up to the mark."""
    dice = random.Random(7)
    root = Path(__file__).parent.parent.parent
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], cwd=root, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(dice.uniform(0.01, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
    table = TableFile(path)
    mark, rows = table.mark, table.rows
    table.finish(mark)
    assert rows == mark > 0
    assert [row[:2] for row in rows_of(path)] == [(n + 1, n) for n in range(mark)]


def test_a_power_cut_loses_only_the_last_commits(path: Path, tmp_path: Path) -> None:
    """Of the log that was not synced any part may be missing: what is found fits together."""
    table = TableFile(path)
    table.begin(COLUMNS, {}, 0)
    table._log_bytes = 1 << 62
    for n in range(50):
        table.add([n, "x" * 3000])
        table.commit(n + 1)
    log = Path(f"{path}-wal").read_bytes()
    main = path.read_bytes()
    table.close()
    dice = random.Random(3)
    for i in range(20):
        cut = dice.randrange(len(log))
        torn = log[:cut] + bytes(dice.randrange(0, 9000))
        copy = tmp_path / f"copy{i}"
        copy.write_bytes(main)
        Path(f"{copy}-wal").write_bytes(torn)
        found = TableFile(copy)
        if found.columns:
            mark = found.mark
            assert found.rows == mark
            found.finish(mark)
            assert [row[1] for row in rows_of(copy)] == list(range(mark))
        found.close()
