"""``/v1/tables``: list, columns, rows. Their bytes are those of ``/v1/files/{id}/content``."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import msgspec

from handlers.base import BaseHandler
from jobs.files import Files
from jobs.kinds import Column
from jobs.rows import table_row
from jobs.tables import Rows, Table

_JSON, _CSV, _LINES = "application/json", "text/csv", "application/x-ndjson"


@asynccontextmanager
async def _opened(files: Files, file: Any) -> AsyncIterator[Table]:
    table = await files.table(file)
    try:
        yield table
    finally:
        await table.close()


class TablesHandler(BaseHandler):
    """The newest versions of the owner's tables."""

    async def get(self) -> None:
        """Newest first; older versions are listed by ``/v1/files?name=``."""
        limit, after = self.paging(self.query("limit", "after"))
        files = self.services.files
        page = await files.tables(self.caller.owner, after, limit)
        items = []
        for file in page.items:
            async with _opened(files, file) as table:
                items.append(table_row(file, table.columns, table.rows, table.about))
            await asyncio.sleep(0)
        self.reply({"items": items, "next": str(page.next) if page.next is not None else None})


class TableHandler(BaseHandler):
    """One table, by its name or the id of one of its versions."""

    async def get(self, name: str) -> None:
        """Its columns, how many rows it has, and where they are from."""
        file = await self.services.files.find_table(name, self.caller.owner)
        async with _opened(self.services.files, file) as table:
            self.set_header("ETag", file.etag)
            self.reply(table_row(file, table.columns, table.rows, table.about))


class RowsHandler(BaseHandler):
    """The rows of a table, a page at a time."""

    async def get(self, name: str) -> None:
        """Those that pass ``where``, in their order, behind the number ``after``."""
        filters, values = self.filters(("columns",), "where", "limit", "after")
        limit, after = self.paging(values)
        file = await self.services.files.find_table(name, self.caller.owner)
        async with _opened(self.services.files, file) as table:
            known = {column.name for column in table.columns}
            names = _names(filters["columns"], known)
            page = await table.page(after or 0, limit, names, values.get("where"))
        self.set_header("Vary", "Accept")
        self.set_header("Sluice-Table", file.id)
        if page.next is not None:
            query = {**values, "after": str(page.next)}
            pairs = [*query.items(), *(("columns", each) for each in filters["columns"])]
            path = self.location(f"/v1/tables/{file.id}/rows?{urlencode(pairs)}")
            self.set_header("Link", f'<{path}>; rel="next"')
        self._send(page, file.id)

    def _send(self, page: Rows, file_id: str) -> None:
        accept = self.request.headers.get("Accept", "")
        rows = [_values(row, page.columns) for _, row in page.rows]
        if _CSV in accept:
            self.set_header("Content-Type", f"{_CSV}; charset=utf-8; header=present")
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\r\n")
            writer.writerow([column.name for column in page.columns])
            writer.writerows([[_word(cell) for cell in row] for row in rows])
            self.write(text.getvalue().encode())
            return
        names = [column.name for column in page.columns]
        items = [dict(zip(names, row, strict=True)) for row in rows]
        if _LINES in accept or "application/jsonl" in accept:
            self.set_header("Content-Type", _LINES)
            self.write(msgspec.json.Encoder().encode_lines(items))
            return
        self.reply(
            {
                "table": file_id,
                "items": items,
                "next": str(page.next) if page.next is not None else None,
            }
        )


def _names(given: Sequence[str], known: set[str]) -> list[str] | None:
    """The columns that a query names: each value is one name, or several with commas between."""
    if not given:
        return None
    return [name for value in given for name in ([value] if value in known else value.split(","))]


def _values(row: Sequence[Any], columns: Sequence[Column]) -> list[Any]:
    """Cells as JSON has them."""
    return [
        bool(cell) if column.type == "boolean" and cell is not None else cell
        for cell, column in zip(row, columns, strict=True)
    ]


def _word(cell: Any) -> Any:
    return str(cell).lower() if isinstance(cell, bool) else cell
