"""Fill a disk, and see what each backend makes of it.

Run as a program in a mount namespace of its own, with a small tmpfs on the folder that is named:
``python -m tests.storage.full_disk blobs|state|tables <folder>``. Whatever happens, the mount is
gone with the process.
"""

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import storage.tables
from errors import SluiceError
from storage import Blobs, File, Filter, Job, State, open_blobs, open_state
from storage.tables import TableFile
from tests.storage.rows import a_file, a_job, its_event, moved

MIB = 1 << 20


PIECE = bytes(range(256)) * 2800  # no divisor of the disk: the last one fits in part


async def refused(call: Awaitable[object], folder: Path) -> bool:
    """Whether the call was refused because the disk is full, in words that name no path."""
    try:
        await call
    except SluiceError as error:
        assert error.code == "disk-full", error
        assert str(folder) not in str(error)
        return True
    return False


async def blobs(folder: Path) -> None:
    """A write that does not fit is refused whole, and room that was made can be used."""
    blobs = open_blobs(f"file://{folder}", "interval")
    await blobs.open()
    ballast = await blobs.writer("ballast", 1)
    await ballast.write(memoryview(b"b" * 2 * MIB))
    await ballast.close()

    writer = await blobs.writer("b1", 1)
    offset = 0
    while not await refused(writer.write(memoryview(PIECE)), folder):
        offset += len(PIECE)
    assert offset > 0
    assert await writer.sync() == offset
    reader = await blobs.reader("b1", None)
    assert reader.size_bytes == offset
    for start in range(0, offset, len(PIECE)):
        assert await reader.read(start, len(PIECE)) == PIECE
    await reader.close()

    assert await refused(blobs.writer("b2", 1, length=MIB), folder)
    assert await refused(blobs.concat("all", [("b1", None)]), folder)
    assert await blobs.size("all") is None

    free = await blobs.free_bytes()
    await blobs.discard("ballast")
    assert await blobs.free_bytes() == free + 2 * MIB
    assert await writer.write(memoryview(PIECE)) == offset + len(PIECE)
    await writer.close()
    await leave(blobs, offset)
    await blobs.close()


async def leave(blobs: Blobs, offset: int) -> None:
    """Bytes that are still read take room until the reader goes."""
    await blobs.publish("b1", "data.csv")
    reader = await blobs.reader("b1", "data.csv")
    free = await blobs.free_bytes()
    await blobs.discard("b1")
    assert await blobs.free_bytes() == free
    assert await reader.read(offset, 256) == PIECE[:256]
    await reader.close()
    assert await blobs.free_bytes() >= free + offset


async def move(state: State, job: Job, note: str, *files: File) -> Job:
    """Commit the job's next version."""
    after = moved(job, "running", params={"note": note})
    await state.commit(after, its_event(after, job), was_version=job.version, files=files)
    return after


async def state(folder: Path) -> None:
    """A commit that does not fit is refused whole, and the store goes on when there is room."""
    url = f"sqlite://{folder}/state.db"
    state = open_state(url, "interval")
    boot = await state.open()
    jobs = [a_job(f"j{i}") for i in range(10)]
    made = [(await state.create(job, its_event(job)))[0] for job in jobs]

    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    failed = await asyncio.gather(
        *(refused(move(state, job, "x" * 100_000, a_file(job.id)), folder) for job in made)
    )
    kept = failed.count(False)
    assert kept < 10
    rows = (await state.find(Filter(), None, 99)).items[::-1]
    assert [row.version == 1 for row in rows] == failed
    assert len(await state.events(0, 999)) == 10 + kept
    assert (await state.stored(None))[0] == kept

    filler.unlink()
    for row in rows:
        await move(state, row, "y" * 10_000)
    assert [event.seq for event in await state.events(0, 999)] == list(range(1, 21 + kept))
    await state.close()
    con = sqlite3.connect(folder / "state.db")
    assert con.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    con.close()
    state = open_state(url, "interval")
    assert await state.open() == (boot.epoch, 2, 20 + kept, True)
    await state.close()


async def tables(folder: Path) -> None:
    """Rows that do not fit are refused, and those that were committed can be gone on from."""
    storage.tables._RESERVE_BYTES = 0  # else the disk would never be really full
    path = folder / "table"
    table = TableFile(path)
    table.begin([("n", "integer"), ("text", "text")], {}, 0)
    rows = 0
    try:
        while True:
            table.add([cell for n in range(rows, rows + 50) for cell in (n, "x" * 999)])
            table.commit(rows + 50)
            rows += 50
    except SluiceError as error:
        assert error.code == "disk-full", error
        assert str(folder) not in str(error)
    table.close()
    again = folder / "elsewhere"  # there is no room to put the log into the table
    again.mkdir()
    assert rows > 1000
    subprocess.run(["mount", "-t", "tmpfs", "none", str(again)], check=True)
    for side in ("", "-wal"):
        shutil.copy(f"{path}{side}", again) if Path(f"{path}{side}").exists() else None
    table = TableFile(again / "table")
    assert table.rows == table.mark
    assert table.mark in (rows, rows + 50)  # committed, before the log found no room in the table
    rows = table.rows
    table.add([rows, "more"])
    table.finish(rows + 1)
    con = sqlite3.connect(again / "table")
    assert con.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert con.execute("SELECT n FROM rows ORDER BY rowid").fetchall() == [
        (n,) for n in range(rows + 1)
    ]
    con.close()


if __name__ == "__main__":
    asyncio.run({"blobs": blobs, "state": state, "tables": tables}[sys.argv[1]](Path(sys.argv[2])))
