"""``/v1/files``: list, metadata, content, delete."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from errors import SluiceError
from handlers.auth import is_prefetch
from handlers.base import BaseHandler, check_text
from handlers.send import send_stored
from jobs.files import clean_path
from jobs.rows import file_row
from jobs.samples import sample


class FilesHandler(BaseHandler):
    """All files of the owner."""

    async def get(self) -> None:
        """Newest first; ``name`` lists the versions of one name, ``newest`` one of each."""
        values = self.query("limit", "after", "name", "newest", "q")
        limit, after = self.paging(values)
        page = await self.services.files.list(
            self.caller.owner,
            values.get("name"),
            after,
            limit,
            newest=_is_on(values, "newest"),
            text=check_text(values.get("q")),
        )
        self.reply(
            {
                "items": [file_row(file) for file in page.items],
                "next": str(page.next) if page.next is not None else None,
            }
        )


class FileHandler(BaseHandler):
    """One stored file."""

    async def get(self, file_id: str) -> None:
        """What is known of it."""
        file = await self.services.files.get(file_id, self.caller.owner)
        self.set_header("ETag", file.etag)
        self.reply(file_row(file))

    async def delete(self, file_id: str) -> None:
        """Remove it; who is reading it reads it to its end."""
        await self.services.files.delete(file_id, self.caller.owner)
        self.set_status(204)


def _is_on(values: Mapping[str, str], name: str) -> bool:
    """Whether a switch of the query is on. Raises invalid-field."""
    if (value := values.get(name, "0")) not in ("0", "1"):
        raise SluiceError("invalid-field", f"{name} can only be 0 or 1.", field=name)
    return value == "1"


class _Wishes(NamedTuple):
    """How the content is wanted."""

    attachment: bool
    track: bool


class SampleHandler(BaseHandler):
    """What an export of a file would begin with."""

    async def get(self, file_id: str) -> None:
        """The first rows that pass ``where``, with their columns, as texts."""
        filters, values = self.filters(("columns",), "where", "limit")
        limit, _ = self.paging(values)
        file = await self.services.files.get(file_id, self.caller.owner)
        found = await sample(
            self.services.files, file, filters["columns"], values.get("where"), limit
        )
        self.reply({"columns": found.columns, "items": found.rows, "whole": found.whole})


class _Reading(BaseHandler):
    """What the addresses of content have in common."""

    def wishes(self) -> _Wishes:
        """The query's parameters. Raises invalid-field."""
        values = self.query("disposition", "track")
        if values.get("disposition", "attachment") != "attachment":
            detail = "disposition can only be attachment."
            raise SluiceError("invalid-field", detail, field="disposition")
        return _Wishes("disposition" in values, _is_on(values, "track"))


class ContentHandler(_Reading):
    """The bytes of a file; they never change under this address."""

    def initialize(self) -> None:
        """See BaseHandler; a download that is a job changes state, so other sites may not do it."""
        super().initialize()
        tracked = b"1" in self.request.query_arguments.get("track", [])
        self.CHANGES = tracked and self.request.method == "GET"

    async def head(self, file_id: str) -> None:
        """The headers of all of it."""
        await self._send(file_id)

    async def get(self, file_id: str) -> None:
        """All of it, or ranges; with ``track=1`` as a job."""
        if self.CHANGES and is_prefetch(self.request):
            raise SluiceError("prefetch")
        await self._send(file_id)

    async def _send(self, file_id: str) -> None:
        wishes = self.wishes()
        file = await self.services.files.get(file_id, self.caller.owner)
        await send_stored(self, file, attachment=wishes.attachment, track=wishes.track)


class NewestHandler(_Reading):
    """The newest version of a name."""

    async def head(self, name: str) -> None:
        """The same."""
        await self._redirect(name)

    async def get(self, name: str) -> None:
        """Where its content is; a client that goes on later does so at that address."""
        await self._redirect(name)

    async def _redirect(self, name: str) -> None:
        self.wishes()
        stored = unicodedata.normalize("NFC", name)
        folders, _, last = name.rpartition("/")
        if clean_path(folders, last) != stored:
            raise SluiceError("invalid-field", f"{name[:80]!r} is no file's name.", field="name")
        file = await self.services.files.newest(stored, self.caller.owner)
        if file is None:
            raise SluiceError("file-unknown", f"There is no file named {name[:80]!r}.")
        query = f"?{self.request.query}" if self.request.query else ""
        self.set_status(307)
        self.set_header("Location", self.location(f"/v1/files/{file.id}/content{query}"))
        self.set_header("Cache-Control", "no-cache")
