"""Files that are already on the machine become stored files, by the way that uploads take."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from errors import SluiceError
from jobs.files import clean_name, now_ms
from jobs.uploads import Uploads
from storage import By, File

_PIECE_BYTES = 1 << 20


class FilePieces:
    """A local file in pieces (see jobs.uploads.Pieces)."""

    def __init__(self, fd: int) -> None:
        self.gate: Callable[[], Awaitable[None]] | None = None
        self.most_bytes: Callable[[], int | None] | None = None
        self._fd = fd
        self._error: SluiceError | None = None

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self._error = error

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        while data := os.read(self._fd, _PIECE_BYTES):
            if self._error is not None:
                raise self._error
            yield memoryview(data)
            await asyncio.sleep(0)


async def add(uploads: Uploads, path: Path, owner: str) -> File:
    """Copy a local file in; the stored file. Raises OSError for what can't be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        length = os.fstat(fd).st_size
        by = By(actor=owner, via="system", at=now_ms())
        job, _ = await uploads.create(
            clean_name(path.name),
            owner=owner,
            client="",
            by=by,
            protocol="add",
            resumable=False,
            length=length,
        )
        pieces = FilePieces(fd)
        async with uploads.connect(job, pieces) as upload:
            await uploads.append(upload, 0, pieces)
        return (await uploads.complete(job))[0]
    finally:
        os.close(fd)
