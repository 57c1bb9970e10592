"""Rows that processes write, in a database of their own: ``tables.db``.

A write commits the rows together with the job's cursor. When the job goes on after a crash, this
cursor wins over the one in its row, so each row is there exactly once, whatever State is.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from errors import SluiceError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Tables:
    """The tables; opened when first used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._con: sqlite3.Connection | None = None

    def _open(self) -> sqlite3.Connection:
        if self._con is None:
            self._con = sqlite3.connect(self._path, isolation_level=None)
            self._con.execute("PRAGMA journal_mode=WAL")
            self._con.execute("PRAGMA synchronous=FULL")
            self._con.execute(
                "CREATE TABLE IF NOT EXISTS _cursors (job TEXT PRIMARY KEY, cursor BLOB)"
            )
        return self._con

    async def write(
        self, job_id: str, table: str, rows: Sequence[Mapping[str, Any]], cursor: Any
    ) -> None:
        """Append rows to a table and save the job's cursor, in one commit.

        The table is made from the fields of the first row it ever gets. Raises invalid-field for
        a name that is none, disk-full.
        """
        con = self._open()
        con.execute("BEGIN IMMEDIATE")
        try:
            if rows:
                columns = [_name(column) for column in rows[0]]
                names = ", ".join(columns)
                con.execute(f"CREATE TABLE IF NOT EXISTS {_name(table)} ({names})")
                marks = ", ".join("?" * len(columns))
                con.executemany(
                    f"INSERT INTO {_name(table)} ({names}) VALUES ({marks})",
                    [[row.get(column) for column in rows[0]] for row in rows],
                )
            con.execute(
                "INSERT OR REPLACE INTO _cursors VALUES (?, ?)",
                (job_id, msgspec.json.encode(cursor)),
            )
            con.execute("COMMIT")
        except BaseException as error:
            if con.in_transaction:
                con.execute("ROLLBACK")
            if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
                raise SluiceError("disk-full", "The disk of the tables is full.") from error
            raise

    async def cursor(self, job_id: str) -> tuple[bool, Any]:
        """Whether the job has written rows, and the cursor that it wrote with the last of them."""
        row = (
            self._open().execute("SELECT cursor FROM _cursors WHERE job = ?", (job_id,)).fetchone()
        )
        return (True, msgspec.json.decode(row[0])) if row else (False, None)

    async def close(self) -> None:
        """Close the database if it was opened."""
        if self._con is not None:
            self._con.close()


def _name(name: str) -> str:
    """A name as an SQL identifier."""
    if not _NAME.fullmatch(name):
        raise SluiceError("invalid-field", f"{name!r} is no name of a table or column.")
    return f'"{name}"'
