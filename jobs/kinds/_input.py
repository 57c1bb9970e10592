"""A stored file read from its start to its end, by exact lengths."""

from __future__ import annotations

from jobs.kinds import FileReader

_READ_BYTES = 256 << 10


class Damaged(Exception):
    """The bytes are not what they should be; the message says what the file does wrong."""


class TooMuch(Exception):
    """The bytes would make more than is allowed; the message says what the file does."""


class Input:
    """A file from ``at`` on. It holds at most 256 KiB more than it was asked for."""

    def __init__(self, reader: FileReader, at: int) -> None:
        self._reader = reader
        self._held = b""
        self._from = 0  # in what is held
        self.at = at

    async def some(self, most: int) -> bytes:
        """At least one byte, and at most so many; none only at the end."""
        if self._from == len(self._held):
            self._held = await self._reader.read(self.at, _READ_BYTES)
            self._from = 0
        found = self._held[self._from : self._from + most]
        self._from += len(found)
        self.at += len(found)
        return found

    async def upto(self, n: int) -> bytes:
        """So many bytes; fewer only at the end."""
        found = await self.some(n)
        while len(found) < n and (more := await self.some(n - len(found))):
            found += more
        return found

    async def exactly(self, n: int) -> bytes:
        """So many bytes. Raises Damaged."""
        found = await self.upto(n)
        if len(found) < n:
            raise Damaged("is cut short")
        return found

    def skip(self, n: int) -> int:
        """Go on behind so many bytes; how many there were."""
        n = min(n, self._reader.size_bytes - self.at)
        self.seek(self.at + n)
        return n

    def seek(self, at: int) -> None:
        """Go on from there."""
        moved = self._from + at - self.at
        if 0 <= moved <= len(self._held):
            self._from = moved
        else:
            self._held, self._from = b"", 0
        self.at = at
