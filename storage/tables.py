"""Tables: SQLite databases that a job makes, each one the blob of a stored file.

A database has two tables. ``rows`` has the rows, numbered from 1 without a gap by its rowid.
``meta`` has, as JSON, the ``columns`` with their types, how many ``rows`` there are, what the maker
wants to be known ``about`` them, and the ``mark``: where the job stands.

Strategy. Rows and mark commit together, so a job that goes on from the mark writes each row once,
whatever ended it. Many calls share a commit, because a row may be lost with its mark. While it is
made, the database is in WAL mode, where a commit needs no sync: after a power cut the last commits
may be gone, but nothing is torn, and the mark that is found tells where to go on. The log is copied
into the database whenever it is a MiB long, so that no call holds its caller for long. For that the
log has to be on the disk first, then the database, then the log's end. Who may not wait for a disk
makes these syncs himself, between ``copy_log`` and ``drop_log``; SQLite then makes none.
``finish`` folds it in for good; then the database is one file that never changes again, so that
readers need no locks (``immutable``).

The rows of several calls go in with one statement: SQLite spends less on a hundred rows in one than
on each by itself.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import msgspec

from errors import SluiceError

# How a type is declared. What is kept as text must be, or SQLite would make numbers of it.
TYPES = {
    "text": "TEXT",
    "integer": "INTEGER",
    "real": "REAL",
    "boolean": "BOOLEAN",
    "date": "TEXT",
    "datetime": "TEXT",
    "decimal": "TEXT",
}
MAX_COLUMNS = 2000  # SQLite's own bound
MAX_NAMES_BYTES = 20 << 10  # of all names as JSON: they stand in cursors, results and events

_LOG_BYTES = 1 << 20  # of the write-ahead log, before it is copied into the database
_COMMIT_S = 0.05
_OTHER_PAGES = 4  # that a commit changes beside those it adds
_MARKS = 700  # values in one statement; SQLite takes some 32,000, but more gains nothing
_RESERVE_BYTES = 16 << 20  # of the disk, left free for the state
_ROWIDS = ("rowid", "_rowid_", "oid")
_FETCH = 8  # rows between two looks at the clock
_SLICE_S = 0.002

Columns = Sequence[tuple[str, str]]  # (name, type) each


def check_columns(columns: Columns) -> None:
    """Raise invalid-field for what can't be the columns of a table."""
    names = [name for name, _ in columns]
    wrong = ""
    if not 1 <= len(names) <= MAX_COLUMNS:
        wrong = f"a table has 1 to {MAX_COLUMNS:,} columns, not {len(names):,}"
    elif unknown := [type for _, type in columns if type not in TYPES]:
        wrong = f"{unknown[0][:40]!r} is no type of a column"
    elif odd := [name for name in names if not name or not name.isprintable()]:
        wrong = f"a column can't be named {odd[0][:80]!r}"
    elif twice := twin(names):
        wrong = f"two columns are named {twice[:80]!r}; upper and lower case do not tell them apart"
    elif len(msgspec.json.encode(names)) > MAX_NAMES_BYTES:
        wrong = "the names of the columns take more than 20 KiB"
    elif _rowid(names) is None:
        wrong = "no column may be named 'rowid' where others are '_rowid_' and 'oid'"
    if wrong:
        raise SluiceError("invalid-field", f"columns: {wrong}.", field="columns")


def twin(names: Iterable[str]) -> str | None:
    """The first name that stands there twice for SQLite, which folds the case of ASCII letters."""
    seen: set[str] = set()
    for name in names:
        folded = name.translate(_FOLD)
        if folded in seen:
            return name
        seen.add(folded)
    return None


_FOLD = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def _rowid(names: Iterable[str]) -> str | None:
    """A name for the number of a row that no column has taken."""
    taken = {name.translate(_FOLD) for name in names}
    return next((name for name in _ROWIDS if name not in taken), None)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def refused(error: sqlite3.Error) -> SluiceError:
    """What a failing database means to the caller."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return SluiceError("disk-full", "The disk is full; the rows committed so far are kept.")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
        return SluiceError("storage-missing", "The data folder is gone or can't be written.")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return SluiceError("storage-failed", "The table is damaged.")
    return SluiceError("storage-failed", f"The table was refused: {name or error}.")


class TableFile:
    """A table in the making, for the one job that makes it.

    Each call takes as long as its rows take. All raise disk-full, storage-missing, storage-failed.
    Once rows are ``lost`` by an error nothing more is taken: the job has to go on from the mark of
    the last commit. A commit that only had no room may be tried again.
    """

    def __init__(
        self,
        path: Path,
        *,
        log_bytes: int = _LOG_BYTES,
        commit_s: float = _COMMIT_S,
        syncs: bool = True,
    ) -> None:
        self._path = path
        self._syncs = syncs  # else the caller does
        self._commit_s = commit_s
        self._log_bytes = log_bytes
        self._sql = ""
        self._columns: list[tuple[str, str]] = []
        self._pending = False
        self._began = 0.0
        self._pages = 0
        self._logged = 0
        self.rows = 0
        self.mark: Any = None
        self.lost = False
        try:
            # The statements are few, but of each table only one with a hundred rows.
            self._con = sqlite3.connect(path, isolation_level=None, cached_statements=16)
            try:
                self._open()
            except BaseException:
                self._con.close()
                raise
        except sqlite3.Error as error:
            raise refused(error) from error

    @classmethod
    def found(cls, path: Path) -> Any:
        """The mark in a table that was begun; None if there is none."""
        if not path.exists():
            return None
        table = cls(path)
        table.close()
        return table.mark

    def _open(self) -> None:
        con = self._con
        con.execute("PRAGMA locking_mode=EXCLUSIVE")  # no shared memory, no locks between calls
        con.execute("PRAGMA journal_mode=WAL")
        con.execute(f"PRAGMA synchronous={'NORMAL' if self._syncs else 'OFF'}")
        con.execute("PRAGMA wal_autocheckpoint=0")
        con.execute("PRAGMA cache_size=-16384")
        (self._page_bytes,) = con.execute("PRAGMA page_size").fetchone()
        (self._pages,) = con.execute("PRAGMA page_count").fetchone()
        (known,) = con.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'meta'").fetchone()
        if known:
            meta = _meta(con)
            self.rows, self.mark = meta["rows"], meta["mark"]
            self._use(meta["columns"])

    def _use(self, columns: Iterable[Sequence[str]]) -> None:
        self._columns = [(name, type) for name, type in columns]
        width = len(self._columns)
        self._width = width
        self._together = max(1, _MARKS // width)
        self._one = f"({','.join('?' * width)})"

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Name and type of each; none before ``begin``."""
        return self._columns

    def begin(self, columns: Columns, about: Mapping[str, Any], mark: Any) -> None:
        """Make the table with no rows, in one commit. Raises invalid-field, see check_columns."""
        check_columns(columns)
        declared = ", ".join(f"{_quoted(name)} {TYPES[type]}" for name, type in columns)
        try:
            with self._con:
                self._con.execute("BEGIN IMMEDIATE")
                self._con.execute(f"CREATE TABLE rows ({declared})")
                self._con.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                self._note(columns=list(columns), about=dict(about), rows=0, mark=mark)
        except sqlite3.Error as error:
            raise refused(error) from error
        self.mark = mark
        self._use(columns)
        self._count_log()

    def _note(self, **values: Any) -> None:
        self._con.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [(key, msgspec.json.encode(value).decode()) for key, value in values.items()],
        )

    def add(self, cells: Sequence[Any]) -> None:
        """Append rows, given as their cells one after the other; nothing is committed.

        A cell is None, an int of 64 bits, a float, or a text.
        """
        if len(cells) % self._width:
            raise ValueError(f"{len(cells)} cells are no rows of {self._width}")
        self._check_lost()
        try:
            if not self._pending:
                self._con.execute("BEGIN IMMEDIATE")
                self._pending, self._began = True, monotonic()
            step = self._width * self._together
            whole = len(cells) - len(cells) % step
            if whole:
                parts = [cells[at : at + step] for at in range(0, whole, step)]
                self._con.executemany(self._insert(self._together), parts)
            if left := (len(cells) - whole) // self._width:
                self._con.execute(self._insert(left), cells[whole:])
        except BaseException as error:
            self._give_up()
            if isinstance(error, sqlite3.Error):
                raise refused(error) from error
            raise
        self.rows += len(cells) // self._width

    def _insert(self, rows: int) -> str:
        return f"INSERT INTO rows VALUES {','.join([self._one] * rows)}"

    @property
    def due(self) -> bool:
        """Whether what was added should be committed now: it is old, or as long as the log."""
        if not self._pending:
            return False
        if monotonic() - self._began > self._commit_s:
            return True
        (pages,) = self._con.execute("PRAGMA page_count").fetchone()
        return bool((pages - self._pages) * self._page_bytes > self._log_bytes)

    def commit(self, mark: Any) -> None:
        """Commit what was added, with the mark from which the job goes on."""
        self._check_lost()
        room = os.statvfs(self._path.parent)
        if room.f_bavail * room.f_frsize < _RESERVE_BYTES:
            raise SluiceError("disk-full", "The disk is full; the rows committed so far are kept.")
        try:
            if not self._pending:
                self._con.execute("BEGIN IMMEDIATE")
                self._pending, self._began = True, monotonic()
            self._note(rows=self.rows, mark=mark)
            self._con.execute("COMMIT")
            self._pending = False
            self.mark = mark
            self._count_log()
            if self._syncs and self.has_long_log:
                self._fold("PASSIVE")
        except sqlite3.Error as error:
            if self._pending and not self._con.in_transaction:
                self._give_up()
            raise refused(error) from error

    def _count_log(self) -> None:
        (pages,) = self._con.execute("PRAGMA page_count").fetchone()
        self._logged += (pages - self._pages + _OTHER_PAGES) * self._page_bytes
        self._pages = pages

    @property
    def has_long_log(self) -> bool:
        """Whether the log should be put into the database now."""
        return self._logged >= self._log_bytes

    def copy_log(self) -> None:
        """Put the log, which was synced, into the database; sync that before ``drop_log``.

        Nothing may be added in between.
        """
        try:
            self._fold("PASSIVE")
        except sqlite3.Error as error:
            raise refused(error) from error

    def drop_log(self) -> None:
        """End the log, all of which is in the database; sync that before anything is added."""
        try:
            self._fold("TRUNCATE")
        except sqlite3.Error as error:
            raise refused(error) from error

    def _fold(self, how: str) -> None:
        self._con.execute(f"PRAGMA wal_checkpoint({how})")
        self._logged = 0

    def _check_lost(self) -> None:
        if self.lost:
            raise SluiceError("storage-failed", "Rows of the table were lost.")

    def _give_up(self) -> None:
        """Take back what was not committed, and take nothing more."""
        self.lost = self._pending
        with suppress(sqlite3.Error):
            if self._con.in_transaction:
                self._con.execute("ROLLBACK")
            self._con.execute("PRAGMA synchronous=NORMAL")  # to close it is to copy the log
        self._con.close()

    def finish(self, mark: Any) -> None:
        """Commit, and make the database one file; it is closed then, but not yet synced."""
        if self._pending or mark != self.mark:
            self.commit(mark)
        try:
            self._con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._con.execute("PRAGMA journal_mode=DELETE")
            self._con.close()
        except sqlite3.Error as error:
            raise refused(error) from error

    def close(self) -> None:
        """Let go; what was not committed is gone. May be called again."""
        self._give_up()


def _meta(con: sqlite3.Connection) -> dict[str, Any]:
    found = con.execute("SELECT key, value FROM meta").fetchall()
    return {key: msgspec.json.decode(value) for key, value in found}


class TableReader:
    """A finished table, open for reading.

    It reads by a descriptor of its own, so a file that is deleted meanwhile is read to its end; the
    bytes must only not be cut before ``close``.
    """

    def __init__(self, path: Path | str) -> None:
        uri = f"file:{_percent(str(path))}?mode=ro&immutable=1"
        try:
            self._con = sqlite3.connect(uri, uri=True, isolation_level=None)
            try:
                meta = _meta(self._con)
            except BaseException:
                self._con.close()
                raise
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise (
                refused(error)
                if isinstance(error, sqlite3.Error)
                else SluiceError("storage-failed", "The table is damaged.")
            ) from error
        self.columns: list[tuple[str, str]] = [(name, type) for name, type in meta["columns"]]
        self.rows: int = meta["rows"]
        self.about: dict[str, Any] = meta["about"]
        self._rowid = _rowid(name for name, _ in self.columns)

    def read(
        self, after: int, most: int, names: Sequence[str] | None = None
    ) -> list[tuple[Any, ...]]:
        """Rows behind the one of a number (0: from the first), which have the next numbers.

        At most ``most``, and no more than some milliseconds can bring; none only at the end.
        ``names`` are the columns wanted (default: all), in their order. Raises storage-failed.
        """
        wanted = [name for name, _ in self.columns] if names is None else names
        chosen = ", ".join(f"rows.{_quoted(name)}" for name in wanted)
        number = f"rows.{self._rowid}"  # is not asked for, as it would be one column too many
        sql = f"SELECT {chosen} FROM rows WHERE {number} > ? ORDER BY {number} LIMIT ?"
        found: list[tuple[Any, ...]] = []
        began = perf_counter()
        try:
            cursor = self._con.execute(sql, (after, most))
            while some := cursor.fetchmany(_FETCH):
                found += some
                if perf_counter() - began > _SLICE_S:
                    break
            cursor.close()
        except sqlite3.Error as error:
            raise refused(error) from error
        return found

    def close(self) -> None:
        """Let go of the table; may be called again."""
        self._con.close()


def flat(rows: Sequence[Sequence[Any]], width: int) -> list[Any]:
    """The cells of rows one after the other. Raises ValueError for a row of another width."""
    if rows and set(map(len, rows)) != {width}:
        raise ValueError(f"a row has not {width} cells")
    return list(chain.from_iterable(rows))


_SAFE = re.compile(r"[^A-Za-z0-9/._-]")


def _percent(path: str) -> str:
    return _SAFE.sub(lambda odd: "".join(f"%{byte:02X}" for byte in odd[0].encode()), path)
