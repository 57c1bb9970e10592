"""Tables: stored files that can also be asked for their rows.

A table is a file of the layout ``table``: what makes, lists, names, downloads, expires and deletes
files does so with tables, too. Its bytes are an SQLite database (storage/tables.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from errors import SluiceError
from jobs.kinds import Column
from storage import Reader
from storage.tables import TableReader

TABLE: Final = "table"  # File.layout
MEDIA_TYPE: Final = "application/vnd.sqlite3"


class Table:
    """One table, open for reading (see kinds.TableReader); it stays whole if it is deleted."""

    def __init__(self, reader: Reader) -> None:
        fd = reader.fileno()
        if fd is None:
            raise SluiceError("storage-failed", "The table does not lie on this machine.")
        self._reader = reader  # as long as it is open, nobody cuts the bytes
        self._rows = TableReader(f"/proc/self/fd/{fd}")
        self.columns = [Column(name, type) for name, type in self._rows.columns]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self._rows.rows

    @property
    def about(self) -> dict[str, Any]:
        """What its maker wanted to be known."""
        return self._rows.about

    async def read(
        self, after: int, most: int, names: Sequence[str] | None = None
    ) -> list[tuple[Any, ...]]:
        """See kinds.TableReader."""
        return self._rows.read(after, most, names)

    async def close(self) -> None:
        """Let go of it; may be called again."""
        self._rows.close()
        await self._reader.close()
