"""``/v1/files``: list, metadata, content, delete."""

from __future__ import annotations

from handlers.base import BaseHandler
from handlers.send import send_stored
from jobs.rows import file_row


class FilesHandler(BaseHandler):
    """All files of the owner."""

    async def get(self) -> None:
        """Newest first; ``name`` lists the versions of one name."""
        values = self.query("limit", "after", "name")
        limit, after = self.paging(values)
        page = await self.services.files.list(self.caller.owner, values.get("name"), after, limit)
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


class ContentHandler(BaseHandler):
    """The bytes of a file; they never change under this address."""

    async def head(self, file_id: str) -> None:
        """The headers of ``get``."""
        await self._send(file_id)

    async def get(self, file_id: str) -> None:
        """All of it, or one range (RFC 9110 section 14)."""
        await self._send(file_id)

    async def _send(self, file_id: str) -> None:
        await send_stored(self, await self.services.files.get(file_id, self.caller.owner))
