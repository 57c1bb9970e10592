"""Rows in one SQLite file, written in groups.

Strategy. All writes that happen in one turn of the loop become one transaction: each write is a
function of the connection, queued with a future; ``_flush`` runs the queue inside BEGIN…COMMIT and
only then resolves the futures. So an acknowledged write is a committed one, and nothing is ever
awaited inside a transaction. A failing write fails alone: nearly all refuse before they have
changed anything; if one has, the group is run again with a savepoint around each. The next group
waits so long that SQLite gets at most 30 % of the time of a loop that has other things to do.

Transitions, cursors and durable_bytes are committed with synchronous=FULL; what may be lost at a
power cut (stored progress, stored_bytes, logs) with NORMAL, unless it shares a group with the
former. WAL checkpoints are run by hand, about once a second, so that no commit pays for one.

A job is a JSON document beside the columns that queries need; the four fields that move without
a version (cursor, undo, stored_bytes, durable_bytes) are columns of their own, so that a save
never rewrites the document and a commit never overwrites a save.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from errors import SluiceError
from storage import (
    KEEP_EVENTS,
    KEY_KEPT_MS,
    UNSET,
    Boot,
    Commit,
    Creation,
    Event,
    Fenced,
    File,
    Filter,
    Job,
    Key,
    Page,
    Progress,
    Spent,
    Stale,
    Undo,
    Used,
    matches_text,
)
from storage.lines_sqlite import INDEX, Lines

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], Any]

_GROUP = 250  # writes in one transaction; bounds the loop's pause
_SHARE = 0.3  # of the time of a busy loop that commits may take
_IDLE_S = 1e-4  # a turn of the loop that takes no longer did nothing
_CHECKPOINT_S = 1.0
_LEASE_S = 15.0  # for the commit that must follow a claim
_LOG_LINES = 10_000  # kept for each job
_ABOVE = 1 << 62  # beyond every number
_TRIM = 500  # events that the log forgets in one group
_SEARCH = 2000  # names that one call of find looks at for a text

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (
    h INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL, client TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    state TEXT NOT NULL, version INTEGER NOT NULL, fence INTEGER NOT NULL,
    incarnation INTEGER NOT NULL, priority INTEGER NOT NULL, rank INTEGER NOT NULL,
    not_before INTEGER, ended_at INTEGER, live INTEGER, live_name TEXT, lease_ends REAL,
    doc BLOB NOT NULL, progress BLOB, cursor BLOB, undo BLOB,
    stored_bytes INTEGER NOT NULL DEFAULT 0, durable_bytes INTEGER NOT NULL DEFAULT 0,
    saved_at INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS jobs_owner ON jobs (owner, h);
CREATE INDEX IF NOT EXISTS jobs_kind ON jobs (owner, kind, state, h);
CREATE INDEX IF NOT EXISTS jobs_name ON jobs (owner, name, kind, state, h);
CREATE INDEX IF NOT EXISTS jobs_client ON jobs (owner, client, kind, state, h);
CREATE INDEX IF NOT EXISTS jobs_live ON jobs (h) WHERE live = 1;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_live_name ON jobs (owner, live_name)
    WHERE live_name IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_due ON jobs (not_before) WHERE state = 'scheduled';
CREATE INDEX IF NOT EXISTS jobs_ended ON jobs (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS counts (
    owner TEXT, kind TEXT, state TEXT, n INTEGER NOT NULL, PRIMARY KEY (owner, kind, state)
    ) WITHOUT ROWID;
DROP TRIGGER IF EXISTS jobs_in; DROP TRIGGER IF EXISTS jobs_out; DROP TRIGGER IF EXISTS jobs_move;
CREATE TABLE IF NOT EXISTS waits (
    child TEXT, parent TEXT, ended TEXT, PRIMARY KEY (child, parent)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS waits_parent ON waits (parent);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, version INTEGER NOT NULL,
    kind TEXT NOT NULL, owner TEXT NOT NULL, at INTEGER NOT NULL, from_ TEXT, to_ TEXT NOT NULL,
    cause TEXT NOT NULL, actor TEXT NOT NULL, row BLOB NOT NULL, UNIQUE (job, version));
CREATE TABLE IF NOT EXISTS files (
    h INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    name TEXT NOT NULL, version INTEGER NOT NULL, bytes INTEGER NOT NULL, expires_at INTEGER,
    doc BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS files_name ON files (owner, name, h);
CREATE INDEX IF NOT EXISTS files_owner ON files (owner, h);
CREATE INDEX IF NOT EXISTS files_expiry ON files (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS names (
    owner TEXT, name TEXT, version INTEGER NOT NULL, PRIMARY KEY (owner, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stored (
    owner TEXT PRIMARY KEY, files INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS files_in AFTER INSERT ON files BEGIN
    INSERT INTO stored VALUES (new.owner, 1, new.bytes)
        ON CONFLICT DO UPDATE SET files = files + 1, bytes = bytes + new.bytes; END;
CREATE TRIGGER IF NOT EXISTS files_out AFTER DELETE ON files BEGIN
    UPDATE stored SET files = files - 1, bytes = bytes - old.bytes WHERE owner = old.owner; END;
CREATE TABLE IF NOT EXISTS keys (
    owner TEXT, key TEXT, fingerprint TEXT NOT NULL, job TEXT NOT NULL, version INTEGER NOT NULL,
    at INTEGER NOT NULL, PRIMARY KEY (owner, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_at ON keys (at);
CREATE TABLE IF NOT EXISTS lines (
    job TEXT, n INTEGER, at INTEGER NOT NULL, line TEXT NOT NULL, PRIMARY KEY (job, n)
    ) WITHOUT ROWID;
"""

_COLUMNS = (
    "h, fence, incarnation, doc, progress, cursor, undo, stored_bytes, durable_bytes, saved_at"
)
_EVENT = "seq, job, version, kind, owner, at, from_, to_, cause, actor, row"

_encode = msgspec.json.Encoder().encode
_job_decoder = msgspec.json.Decoder(Job)
_file_decoder = msgspec.json.Decoder(File)
_progress_decoder = msgspec.json.Decoder(Progress)
_undo_decoder = msgspec.json.Decoder(tuple[Undo, ...])


class _Write(NamedTuple):
    change: Change
    future: asyncio.Future[Any]
    full: bool


class SqliteState:
    """The State contract over one SQLite file in WAL mode. One process opens it at a time."""

    def __init__(
        self, path: Path, durability: str = "interval", keep_events: int = KEEP_EVENTS
    ) -> None:
        self._path = path
        self._strict = durability != "never"
        self._keep_events = keep_events
        self._trimming = False
        self._queue: list[_Write] = []
        self._flushing: asyncio.TimerHandle | asyncio.Handle | None = None
        self._not_before = 0.0
        self._turned = 0.0
        self._totals: dict[str, int] = {}  # of counts, by state
        self._moved: dict[tuple[str, str, str], int] = {}  # of counts, in this group
        self._full: bool | None = None
        self._dirty = False
        self._checkpoint: asyncio.TimerHandle | None = None
        self._seq = 0
        self._waiters: set[asyncio.Future[int]] = set()
        self._lines = Lines()
        self._leases: dict[str, float] = {}  # until when a claimed job waits for its commit
        self._any_waits = False  # a job has ever waited for another one
        self._progress: list[asyncio.Queue[Sequence[tuple[Any, ...]]]] = []

    async def open(self) -> Boot:
        """Make or open the file, and begin a new incarnation."""
        try:
            self._con = sqlite3.connect(self._path, isolation_level=None, cached_statements=256)
        except sqlite3.Error as error:
            raise _refusal(error) from error
        try:
            return self._boot()
        except sqlite3.Error as error:
            self._con.close()
            raise _refusal(error) from error

    def _boot(self) -> Boot:
        self._con.execute("PRAGMA journal_mode=WAL")
        self._con.execute("PRAGMA wal_autocheckpoint=0")
        self._con.execute("PRAGMA journal_size_limit=67108864")
        self._con.executescript(_SCHEMA + INDEX)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        meta = dict(self._con.execute("SELECT key, value FROM meta").fetchall())
        same_boot = meta.get("boot_id") == boot_id
        # Without FULL commits a power cut may take acknowledged rows along: their numbers would
        # be given again, so cursors into the old log must not be honoured.
        lost = not same_boot and meta.get("strict") == "0" and meta.get("clean") != "1"
        epoch = meta.get("epoch") if not lost else None
        self._incarnation = int(meta.get("incarnation", "0")) + 1
        self._oldest = int(meta.get("oldest") or self._first_whole())
        meta = {
            "oldest": str(self._oldest),
            "epoch": epoch or os.urandom(6).hex(),
            "incarnation": str(self._incarnation),
            "boot_id": boot_id,
            "strict": str(int(self._strict)),
            "clean": "0",
        }
        self._begin(True)  # whatever the durability: after a power cut it must say what may be lost
        self._con.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        self._con.execute(  # a lease that no commit has followed
            "UPDATE jobs INDEXED BY jobs_live SET lease_ends = NULL"
            " WHERE live = 1 AND state = 'queued' AND lease_ends IS NOT NULL"
        )
        self._con.execute("COMMIT")
        self._any_waits = bool(self._con.execute("SELECT 1 FROM waits LIMIT 1").fetchone())
        self._seq = self._con.execute(
            "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0)"
        ).fetchone()[0]
        totals = self._con.execute("SELECT state, sum(n) FROM counts GROUP BY state")
        self._totals = dict(totals.fetchall())
        return Boot(meta["epoch"], self._incarnation, self._seq, same_boot)

    def _first_whole(self) -> int:
        """From where on the log has no holes, in a file that does not say it."""
        least, newest, n = self._con.execute(
            "SELECT coalesce(min(seq), 1), coalesce(max(seq), 0), count(*) FROM events"
        ).fetchone()
        return 1 if (least, n) == (1, newest) else int(newest) + 1

    async def close(self) -> None:
        """Write what is queued, note that the stop was clean, fold the WAL in, close."""
        try:
            await self._write(
                lambda con: con.execute("UPDATE meta SET value='1' WHERE key='clean'")
            )
            with suppress(sqlite3.Error):  # a full disk: the next start folds it in
                self._con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            for handle in (self._flushing, self._checkpoint):
                if handle is not None:
                    handle.cancel()
            self._con.close()

    # Group commit

    def _write(self, change: Callable[[sqlite3.Connection], T], *, full: bool = True) -> Any:
        """Run ``change`` in the next group; an awaitable of its result once that is committed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._queue.append(_Write(change, future, full and self._strict))
        if self._flushing is None:
            self._flushing = loop.call_soon(self._turn)
        # A caller that is cancelled does not take the write back: it is the group's now.
        return future

    def _turn(self) -> None:
        """Flush, unless it is the others' time and they use it.

        They are given it in turns of the loop: an idle one would only sleep it away.
        """
        now = time.monotonic()
        if now >= self._not_before or now - self._turned < _IDLE_S:
            self._flush()
            return
        self._turned = now
        self._flushing = asyncio.get_running_loop().call_soon(self._turn)

    def _flush(self) -> None:
        self._flushing = None
        group, self._queue = self._queue[:_GROUP], self._queue[_GROUP:]
        began = time.monotonic()
        results: list[Any] = []
        try:
            results = self._run_group(group)
        except Exception as error:  # nothing of the group was kept
            if self._con.in_transaction:
                self._con.execute("ROLLBACK")
            results = [_refusal(error)] * len(group)
        self._not_before = time.monotonic() + (time.monotonic() - began) * (1 / _SHARE - 1)
        for write, result in zip(group, results, strict=True):
            if write.future.cancelled():
                continue
            if isinstance(result, BaseException):
                write.future.set_exception(result)
                write.future.exception()  # a caller that was cancelled leaves nobody to read it
            else:
                write.future.set_result(result)
        if self._queue:
            self._flushing = asyncio.get_running_loop().call_soon(self._turn)
        self._tidy_later()
        self._announce()
        self._trim()

    def _run_group(self, group: Sequence[_Write]) -> list[Any]:
        """Commit writes; what came of each."""
        full = any(write.full for write in group)
        self._begin(full)
        results = self._apply_bare(group)
        if results is None:
            self._con.execute("ROLLBACK")
            self._begin(full)
            results = self._apply_safely(group)
        self._con.executemany(
            "INSERT INTO counts VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
            [(*cell, n) for cell, n in self._moved.items() if n],
        )
        self._con.execute("COMMIT")
        for (_, _, state), n in self._moved.items():
            self._totals[state] = self._totals.get(state, 0) + n
        return results

    def _begin(self, full: bool) -> None:
        if full != self._full:
            self._con.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
            self._full = full
        self._con.execute("BEGIN IMMEDIATE")

    def _apply_bare(self, group: Sequence[_Write]) -> list[Any] | None:
        """Run writes without savepoints; None if one has failed half-way."""
        self._moved = {}
        results: list[Any] = []
        for write in group:
            before = self._con.total_changes
            try:
                results.append(write.change(self._con))
            except Exception as error:
                if not self._con.in_transaction:  # SQLite gave the group up (a full disk)
                    raise
                if self._con.total_changes != before:
                    return None
                results.append(_own(error))
        return results

    def _apply_safely(self, group: Sequence[_Write]) -> list[Any]:
        """Run writes so that each fails alone, whatever it has done."""
        self._moved = {}
        results: list[Any] = []
        for write in group:
            moved = self._moved.copy()
            self._con.execute("SAVEPOINT one")
            try:
                results.append(write.change(self._con))
            except Exception as error:
                if not self._con.in_transaction:
                    raise
                self._con.execute("ROLLBACK TO one")
                self._moved = moved
                results.append(_own(error))
            self._con.execute("RELEASE one")
        return results

    def _count(self, job: Job | Event, state: str | None, by: int) -> None:
        """Note that a job has come into a state or left it."""
        if state is not None:
            cell = (job.owner, job.kind, state)
            self._moved[cell] = self._moved.get(cell, 0) + by

    def _announce(self) -> None:
        """Wake those who wait for events."""
        row = self._con.execute("SELECT seq FROM sqlite_sequence WHERE name='events'").fetchone()
        if row is None or row[0] == self._seq:
            return
        self._seq = row[0]
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(self._seq)

    def _trim(self) -> None:
        """Let the log forget, a slice at a time, what is too old and of jobs that are no more."""
        over = self._seq + 1 - self._oldest - self._keep_events
        if self._trimming or over <= self._keep_events // 10:
            return
        begin, end = self._oldest, self._oldest + min(over, _TRIM)
        self._trimming = True

        def change(con: sqlite3.Connection) -> None:
            con.execute(
                "DELETE FROM events WHERE seq >= ? AND seq < ?"
                " AND NOT EXISTS (SELECT 1 FROM jobs WHERE id = events.job)",
                (begin, end),
            )
            con.execute("UPDATE meta SET value = ? WHERE key = 'oldest'", (str(end),))

        def done(written: asyncio.Future[None]) -> None:
            self._trimming = False
            if not written.cancelled() and written.exception() is None:
                self._oldest = end
                self._trim()

        asyncio.ensure_future(self._write(change, full=False)).add_done_callback(done)

    def _tidy_later(self) -> None:
        if self._checkpoint is None:
            loop = asyncio.get_running_loop()
            self._checkpoint = loop.call_later(_CHECKPOINT_S, self._tidy)

    def _tidy(self) -> None:
        """Fold the WAL into the database; PASSIVE never waits for a reader."""
        self._checkpoint = None
        try:
            self._con.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error:
            self._tidy_later()

    # Jobs

    async def create(
        self,
        job: Job,
        event: Event,
        *,
        live_name: str | None = None,
        key: Key | None = None,
        follower: tuple[Job, Event, str] | None = None,
    ) -> tuple[Job, bool]:
        """See the contract."""

        def change(con: sqlite3.Connection) -> tuple[Job, bool]:
            if held := _held(con, job.owner, live_name, key):
                return held, False
            _spend(con, key, job.id, job.version)
            made = self._insert(con, job, event, live_name)
            if follower is not None:
                self._insert(con, *follower)
            return made, True

        return await self._write(change)  # type: ignore[no-any-return]

    async def create_all(
        self, creations: Sequence[Creation]
    ) -> list[tuple[Job, bool] | BaseException]:
        """See the contract. The row is written once, as it is in the end."""
        writes = [self._write(partial(self._create_claimed, creation)) for creation in creations]
        return list(await asyncio.gather(*writes, return_exceptions=True))

    def _create_claimed(self, creation: Creation, con: sqlite3.Connection) -> tuple[Job, bool]:
        job, event, claimed, claim, live_name, key = creation
        if held := _held(con, job.owner, live_name, key):
            return held, False
        _spend(con, key, job.id, job.version)
        made = self._insert(con, claimed, event, live_name)
        self._log_event(con, claim, made)
        return msgspec.structs.replace(job, h=made.h, incarnation=made.incarnation), True

    def _insert(
        self, con: sqlite3.Connection, job: Job, event: Event, live_name: str | None
    ) -> Job:
        """A new row with its first event, and what it waits for."""
        made = msgspec.structs.replace(job, incarnation=self._incarnation)
        inserted = con.execute(
            "INSERT INTO jobs (id, owner, client, kind, name, state, version, fence,"
            " incarnation, priority, rank, not_before, ended_at, live, live_name, doc,"
            " progress, cursor, undo, stored_bytes, durable_bytes)"
            " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                made.id,
                made.owner,
                made.client,
                made.kind,
                made.name,
                made.state,
                made.version,
                made.fence,
                made.incarnation,
                made.priority,
                made.rank,
                _clock(made),
                made.ended_at,
                _live(made),
                live_name if _live(made) else None,
                _doc(made),
                _encode(made.progress),
                _encode(made.cursor),
                _encode(made.undo),
                made.stored_bytes,
                made.durable_bytes,
            ),
        )
        made = msgspec.structs.replace(made, h=inserted.lastrowid)
        if made.blocked:
            self._wait_for(con, made)
        self._log_event(con, event, made)
        self._count(made, made.state, 1)
        return made

    def _wait_for(self, con: sqlite3.Connection, job: Job) -> None:
        """Note what a job waits for; all of it must be there."""
        for parent in job.after:
            done = con.execute(
                "INSERT INTO waits SELECT ?, id, NULL FROM jobs WHERE id = ? AND owner = ?",
                (job.id, parent, job.owner),
            )
            if done.rowcount == 0:
                raise SluiceError("invalid-field", f"There is no job {parent}.", field="after")
        self._any_waits = True

    async def commit(
        self,
        job: Job,
        event: Event,
        *,
        was_version: int,
        fence: int | None = None,
        files: Sequence[File] = (),
        key: Key | None = None,
    ) -> int:
        """See the contract."""
        commit = Commit(job, event, was_version, fence, files, key)
        return await self._write(partial(self._commit, commit))  # type: ignore[no-any-return]

    async def commit_all(self, commits: Sequence[Commit]) -> list[int | BaseException]:
        """See the contract."""
        writes = [self._write(partial(self._commit, commit)) for commit in commits]
        return list(await asyncio.gather(*writes, return_exceptions=True))

    def _commit(self, commit: Commit, con: sqlite3.Connection) -> int:
        job, event, was_version, fence, files, key = commit
        _spend(con, key, job.id, job.version)
        live = _live(job)
        done = con.execute(
            # The fence never falls: a command may have read the row before it was claimed.
            "UPDATE jobs SET name=?, state=?, version=?, fence=max(fence, ?), incarnation=?,"
            " priority=?, rank=?, not_before=?, ended_at=?, live=?,"
            " live_name = CASE WHEN ? THEN live_name END,"
            " lease_ends = CASE WHEN ? THEN lease_ends END, doc=?, progress=?"
            " WHERE id=? AND version=? AND state=? AND fence=coalesce(?, fence)",
            (
                job.name,
                job.state,
                job.version,
                job.fence,
                self._incarnation,
                job.priority,
                job.rank,
                _clock(job),
                job.ended_at,
                live,
                live,
                fence is None and job.state == "queued",  # a command leaves the lease alone
                _doc(job),
                _encode(job.progress),
                job.id,
                was_version,
                event.from_,
                fence,
            ),
        )
        if done.rowcount == 0:
            self._guard(con, job.id, was_version, fence)
            raise Stale(job.id)  # its state is not the one that the event begins with
        for file in files:
            _add_file(con, file)
        if event.from_ != job.state:
            self._count(job, event.from_, -1)
            self._count(job, job.state, 1)
        if job.after and not job.blocked and self._any_waits:
            con.execute("DELETE FROM waits WHERE child = ?", (job.id,))
        return self._log_event(con, event)

    async def save(
        self,
        job_id: str,
        fence: int,
        *,
        cursor: Any = UNSET,
        progress: Progress | None = None,
        stored_bytes: int | None = None,
        durable_bytes: int | None = None,
        undo: Sequence[Undo] | None = None,
    ) -> None:
        """See the contract."""
        columns: dict[str, Any] = {}
        if cursor is not UNSET:
            columns["cursor"] = _encode(cursor)
        if undo is not None:
            columns["undo"] = _encode(undo)
        if durable_bytes is not None:
            columns["durable_bytes"] = durable_bytes
        full = bool(columns)
        if stored_bytes is not None:
            columns["stored_bytes"] = stored_bytes
        if progress is not None:
            columns["progress"] = _encode(progress)
        columns["saved_at"] = _now_ms()
        sets = ", ".join(f"{column}=?" for column in columns)

        def change(con: sqlite3.Connection) -> None:
            done = con.execute(
                f"UPDATE jobs SET {sets} WHERE id=? AND fence=?", (*columns.values(), job_id, fence)
            )
            if done.rowcount == 0:
                raise Fenced(job_id)

        await self._write(change, full=full)

    async def claim(
        self,
        kinds: Collection[str],
        slots: int,
        *,
        room: Mapping[str, int] = {},
        owner_slots: int | None = None,
        busy: Mapping[str, int] = {},
    ) -> list[Job]:
        """See the contract. A lease is the row's new fence, and until when nobody else gets it."""
        if not kinds or slots <= 0:
            return []

        def change(con: sqlite3.Connection) -> list[Job]:
            now = time.monotonic()
            self._end_leases(con, now)
            leased = []
            for h in self._lines.take(con, slots, kinds, room, owner_slots, busy):
                con.execute(
                    "UPDATE jobs SET fence = fence + 1, incarnation = ?, lease_ends = ?"
                    " WHERE h = ?",
                    (self._incarnation, now + _LEASE_S, h),
                )
                row = con.execute(f"SELECT {_COLUMNS} FROM jobs WHERE h = ?", (h,)).fetchone()
                leased.append(_job(row))
                self._leases[leased[-1].id] = now + _LEASE_S
            return leased

        return await self._write(change, full=False)  # type: ignore[no-any-return]

    def _end_leases(self, con: sqlite3.Connection, now: float) -> None:
        """Put jobs back into their lines whose claim nobody has committed in time."""
        while self._leases:
            job_id, ends = next(iter(self._leases.items()))  # the oldest: they all last as long
            if ends > now:
                return
            del self._leases[job_id]
            con.execute(
                "UPDATE jobs SET lease_ends = NULL"
                " WHERE id = ? AND state = 'queued' AND lease_ends <= ?",
                (job_id, now),
            )

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        """See the contract. One process owns the file, so a lease is lost only to a newer fence."""
        lost = []
        for job_id, fence in leases:
            row = self._con.execute("SELECT fence FROM jobs WHERE id=?", (job_id,)).fetchone()
            if row is None or row[0] != fence:
                lost.append(job_id)
        return lost

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """See the contract."""
        row = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND (? IS NULL OR owner = ?)",
            (job_id, owner, owner),
        ).fetchone()
        return _job(row) if row else None

    async def holder(self, owner: str, live_name: str) -> Job | None:
        """See the contract."""
        row = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE owner = ? AND live_name = ?", (owner, live_name)
        ).fetchone()
        return _job(row) if row else None

    async def find(self, filter: Filter, after: int | None, limit: int) -> Page[Job]:
        """See the contract. First the numbers, from indexes alone, then the rows of one page."""
        key = after if after is not None else _ABOVE
        looked = limit if filter.text is None else _SEARCH
        found: list[int] = []
        for source, where, values in self._seeks(filter):
            rows = self._con.execute(
                f"SELECT h FROM {source} WHERE {where} AND h < ? ORDER BY h DESC LIMIT ?",
                (*values, key, looked + 1),
            )
            found += [row[0] for row in rows]
        found.sort(reverse=True)
        if filter.text is not None:
            return self._search(filter.text, found[:_SEARCH], limit, len(found) > _SEARCH)
        page = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE h IN (SELECT value FROM json_each(?))"
            " ORDER BY h DESC",
            (_encode(found[:limit]).decode(),),
        )
        jobs = [_job(row) for row in page]
        return Page(jobs, jobs[-1].h if len(found) > limit else None)

    def _search(self, text: str, among: Sequence[int], limit: int, more: bool) -> Page[Job]:
        """The first jobs of some that a text finds; ``more``: there are others behind them."""
        names = self._con.execute(
            "SELECT h, name, id FROM jobs WHERE h IN (SELECT value FROM json_each(?))"
            " ORDER BY h DESC",
            (_encode(among).decode(),),
        )
        found = [h for h, name, job_id in names if matches_text(text, name, job_id)]
        rows = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE h IN (SELECT value FROM json_each(?))"
            " ORDER BY h DESC",
            (_encode(found[:limit]).decode(),),
        )
        jobs = [_job(row) for row in rows]
        if len(found) > limit:
            return Page(jobs, jobs[-1].h)
        return Page(jobs, among[-1] if more else None)

    def _seeks(self, filter: Filter) -> Iterator[tuple[str, str, list[Any]]]:
        """The walks down an index (source, where, values) that together find what matches.

        Each cell of ``counts`` that matches is a seek of its own, so that a page costs the same
        however many jobs do not match. The index is named: there are no statistics, and without
        them SQLite may choose to sort all rows of a state.
        """
        walk = filter.name is None and filter.client is None
        if filter.live or (walk and not filter.kinds and not filter.states):
            index = "jobs_live" if filter.live else "jobs_owner"
            source = "jobs"
            if filter.live or filter.owner is not None:
                source += f" INDEXED BY {index}"
            yield source, *_where(filter, filter.owner, filter.kinds, filter.states)
            return
        index = "jobs_kind" if walk else "jobs_client" if filter.name is None else "jobs_name"
        owned, values = _owned(filter.owner)
        cells = self._con.execute(
            f"SELECT owner, kind, state FROM counts WHERE {owned} AND n > 0", values
        ).fetchall()
        for owner, kind, state in cells:
            if kind in (filter.kinds or (kind,)) and state in (filter.states or (state,)):
                yield f"jobs INDEXED BY {index}", *_where(filter, owner, (kind,), (state,))

    async def counts(self, owner: str | None) -> dict[str, int]:
        """See the contract. Kept with each change, so it costs nothing to ask."""
        if owner is None:
            return {state: n for state, n in self._totals.items() if n}
        owned, values = _owned(owner)
        rows = self._con.execute(
            f"SELECT state, sum(n) FROM counts WHERE {owned} GROUP BY state", values
        )
        return {state: n for state, n in rows if n}

    async def tally(self, owner: str | None) -> list[tuple[str, str, int]]:
        """See the contract. Kept by triggers, as ``counts``."""
        owned, values = _owned(owner)
        return self._con.execute(
            f"SELECT kind, state, sum(n) FROM counts WHERE {owned}"
            " GROUP BY kind, state HAVING sum(n) > 0",
            values,
        ).fetchall()

    async def due(self, now: int) -> tuple[list[Job], int | None]:
        """See the contract."""
        rows = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE state = 'scheduled' AND not_before <= ?"
            " ORDER BY not_before LIMIT 500",
            (now,),
        ).fetchall()
        following = self._con.execute(
            "SELECT min(not_before) FROM jobs WHERE state = 'scheduled' AND not_before > ?", (now,)
        ).fetchone()[0]
        return [_job(row) for row in rows], following

    async def ahead(self, job: Job) -> int:
        """See the contract."""
        return self._lines.ahead(self._con, job.priority, job.rank, job.owner, job.h)

    async def waiting(self) -> dict[str, int]:
        """See the contract."""
        rows = self._con.execute(
            "SELECT owner, sum(n) FROM counts WHERE state IN ('queued', 'scheduled')"
            " GROUP BY owner HAVING sum(n) > 0"
        )
        return dict(rows.fetchall())

    async def states(self, job_ids: Collection[str], owner: str) -> dict[str, str]:
        """See the contract."""
        rows = self._con.execute(
            "SELECT id, state FROM jobs WHERE id IN (SELECT value FROM json_each(?)) AND owner = ?",
            (_encode(list(job_ids)).decode(), owner),
        )
        return dict(rows.fetchall())

    def chained(self) -> bool:
        """See the contract."""
        return self._any_waits

    async def parents(self, job_id: str) -> dict[str, str | None]:
        """See the contract."""
        rows = self._con.execute(
            "SELECT waits.parent, CASE WHEN waits.ended IS NOT NULL THEN waits.ended"
            " WHEN jobs.ended_at IS NOT NULL THEN jobs.state END"
            " FROM waits LEFT JOIN jobs ON jobs.id = waits.parent WHERE child = ?",
            (job_id,),
        )
        return dict(rows.fetchall())

    async def followers(self, job_id: str, after: str, limit: int) -> list[str]:
        """See the contract."""
        if not self._any_waits:
            return []
        rows = self._con.execute(
            "SELECT child FROM waits WHERE parent = ? AND child > ? ORDER BY child LIMIT ?",
            (job_id, after, limit),
        )
        return [row[0] for row in rows]

    async def overdue(self, after: str, limit: int) -> list[str]:
        """See the contract."""
        rows = self._con.execute(
            "SELECT DISTINCT child FROM waits LEFT JOIN jobs ON jobs.id = waits.parent"
            " WHERE child > ? AND (waits.ended IS NOT NULL OR jobs.ended_at IS NOT NULL)"
            " ORDER BY child LIMIT ?",
            (after, limit),
        )
        return [row[0] for row in rows]

    async def delete(
        self, job_id: str, event: Event, *, was_version: int, key: Key | None = None
    ) -> int:
        """See the contract."""

        def change(con: sqlite3.Connection) -> int:
            _spend(con, key, job_id, event.version)
            self._guard(con, job_id, was_version, None)
            self._count(event, event.from_, -1)
            if self._any_waits:  # who still waits for it must know how it ended
                con.execute(
                    "UPDATE waits SET ended = (SELECT state FROM jobs WHERE id = parent)"
                    " WHERE parent = ?",
                    (job_id,),
                )
                con.execute("DELETE FROM waits WHERE child = ?", (job_id,))
            con.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            con.execute(  # what is older than the log is whole was kept for the job's history
                "DELETE FROM events WHERE job = ?"
                " AND seq < (SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'oldest')",
                (job_id,),
            )
            con.execute("DELETE FROM lines WHERE job = ?", (job_id,))
            return self._log_event(con, event)

        return await self._write(change)  # type: ignore[no-any-return]

    async def spend(self, key: Key, job: str, version: int) -> None:
        """See the contract."""
        await self._write(lambda con: _spend(con, key, job, version))

    async def used(self, owner: str, key: str) -> Used | None:
        """See the contract."""
        return _used(self._con, owner, key)

    async def forget_keys(self, before: int, limit: int) -> int:
        """See the contract."""

        def change(con: sqlite3.Connection) -> int:
            return con.execute(
                "DELETE FROM keys WHERE (owner, key) IN"
                " (SELECT owner, key FROM keys WHERE at < ? ORDER BY at LIMIT ?)",
                (before, limit),
            ).rowcount

        return await self._write(change, full=False)  # type: ignore[no-any-return]

    async def ended_before(self, at: int, limit: int) -> list[Job]:
        """Final jobs that ended before ``at``, oldest first."""
        rows = self._con.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE ended_at < ? ORDER BY ended_at LIMIT ?", (at, limit)
        ).fetchall()
        return [_job(row) for row in rows]

    async def log(self, job_id: str, lines: Sequence[str], at: int) -> None:
        """See the contract."""

        def change(con: sqlite3.Connection) -> None:
            n = con.execute(
                "SELECT coalesce(max(n), 0) FROM lines WHERE job = ?", (job_id,)
            ).fetchone()[0]
            rows = [(job_id, n + i, at, line) for i, line in enumerate(lines, 1)]
            con.executemany("INSERT INTO lines VALUES (?, ?, ?, ?)", rows)
            con.execute(
                "DELETE FROM lines WHERE job = ? AND n <= ?", (job_id, n + len(lines) - _LOG_LINES)
            )

        await self._write(change, full=False)

    async def lines(self, job_id: str, after: int, limit: int) -> list[tuple[int, int, str]]:
        """See the contract."""
        if after < 0:
            newest = self._con.execute(
                "SELECT coalesce(max(n), 0) FROM lines WHERE job = ?", (job_id,)
            ).fetchone()[0]
            after += newest
        return self._con.execute(
            "SELECT n, at, line FROM lines WHERE job = ? AND n > ? ORDER BY n LIMIT ?",
            (job_id, after, limit),
        ).fetchall()

    def _guard(
        self, con: sqlite3.Connection, job_id: str, was_version: int, fence: int | None
    ) -> None:
        row = con.execute("SELECT version, fence FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None or row[0] != was_version:
            raise Stale(job_id)
        if fence is not None and row[1] != fence:
            raise Fenced(job_id)

    # Events

    def _log_event(self, con: sqlite3.Connection, event: Event, made: Job | None = None) -> int:
        row = bytes(event.row)
        if made is not None:  # its number was not known to the caller
            row = row.replace(b'"h":0', b'"h":%d' % made.h, 1)
        return con.execute(  # type: ignore[return-value]
            "INSERT INTO events (job, version, kind, owner, at, from_, to_, cause, actor, row)"
            " VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                event.job,
                event.version,
                event.kind,
                event.owner,
                event.at,
                event.from_,
                event.to,
                event.cause,
                event.actor,
                row,
            ),
        ).lastrowid

    async def events(self, after_seq: int, limit: int) -> list[Event]:
        """See the contract."""
        rows = self._con.execute(
            f"SELECT {_EVENT} FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after_seq, limit)
        )
        return [_event(row) for row in rows]

    async def oldest(self) -> int:
        """See the contract."""
        row = self._con.execute("SELECT value FROM meta WHERE key = 'oldest'").fetchone()
        return int(row[0])

    async def history(self, job_id: str, after_version: int, limit: int) -> list[Event]:
        """See the contract."""
        rows = self._con.execute(
            f"SELECT {_EVENT} FROM events WHERE job = ? AND version > ? ORDER BY version LIMIT ?",
            (job_id, after_version, limit),
        )
        return [_event(row) for row in rows]

    async def wait(self, seq: int) -> int:
        """See the contract."""
        if self._seq > seq:
            return self._seq
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            return await waiter
        finally:  # one that gave up must not stay here until the next event
            self._waiters.discard(waiter)

    async def progress_out(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """See the contract. Here every node is this process."""
        for queue in self._progress:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(rows)

    async def progress_in(self) -> AsyncIterator[Sequence[tuple[Any, ...]]]:
        """See the contract."""
        queue: asyncio.Queue[Sequence[tuple[Any, ...]]] = asyncio.Queue(16)
        self._progress.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._progress.remove(queue)

    # Files

    async def file(self, file_id: str, owner: str | None) -> File | None:
        """See the contract."""
        row = self._con.execute(
            "SELECT doc, h, version FROM files WHERE id = ? AND (? IS NULL OR owner = ?)",
            (file_id, owner, owner),
        ).fetchone()
        return _file(row) if row else None

    async def newest(self, owner: str, name: str) -> File | None:
        """See the contract."""
        row = self._con.execute(
            "SELECT doc, h, version FROM files WHERE owner = ? AND name = ?"
            " ORDER BY h DESC LIMIT 1",
            (owner, name),
        ).fetchone()
        return _file(row) if row else None

    async def find_files(
        self,
        owner: str,
        name: str | None,
        after: int | None,
        limit: int,
        *,
        newest: bool = False,
        text: str | None = None,
    ) -> Page[File]:
        """See the contract."""
        if newest or text is not None:
            return self._search_files(owner, name, after, limit, newest, text)
        where, values = (
            ("owner = ?", [owner]) if name is None else ("owner = ? AND name = ?", [owner, name])
        )
        rows = self._con.execute(
            f"SELECT doc, h, version FROM files WHERE {where} AND h < ? ORDER BY h DESC LIMIT ?",
            (*values, after if after is not None else _ABOVE, limit + 1),
        ).fetchall()
        files = [_file(row) for row in rows[:limit]]
        return Page(files, files[-1].h if len(rows) > limit else None)

    def _search_files(
        self,
        owner: str,
        name: str | None,
        after: int | None,
        limit: int,
        newest: bool,
        text: str | None,
    ) -> Page[File]:
        """Walk down the files until the page is full, or enough were looked at."""
        found: list[File] = []
        looked, h = 0, after
        for row in self._con.execute(
            "SELECT doc, h, version, name, id FROM files WHERE owner = ? AND h < ?"
            " AND (? IS NULL OR name = ?) ORDER BY h DESC LIMIT ?",
            (owner, after if after is not None else _ABOVE, name, name, _SEARCH + 1),
        ):
            if looked == _SEARCH or len(found) == limit:
                return Page(found, h)
            looked, h = looked + 1, row[1]
            if text is not None and not matches_text(text, row[3], row[4]):
                continue
            if not newest or self._is_newest(owner, row[3], h):
                found.append(_file(row))
        return Page(found, None)

    def _is_newest(self, owner: str, name: str, h: int) -> bool:
        newer = "SELECT 1 FROM files INDEXED BY files_name WHERE owner = ? AND name = ? AND h > ?"
        return self._con.execute(newer, (owner, name, h)).fetchone() is None

    async def add_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """See the contract. A power cut may lose them: they can be found again."""

        def change(con: sqlite3.Connection) -> None:
            for file_id, found in digests.items():
                row = con.execute("SELECT doc FROM files WHERE id = ?", (file_id,)).fetchone()
                if row is None:
                    continue
                file = _file_decoder.decode(row[0])
                file = msgspec.structs.replace(file, digest={**found, **file.digest})
                con.execute("UPDATE files SET doc = ? WHERE id = ?", (_encode(file), file_id))

        await self._write(change, full=False)

    async def delete_file(self, file_id: str) -> None:
        """See the contract."""
        await self._write(lambda con: con.execute("DELETE FROM files WHERE id = ?", (file_id,)))

    async def expired_files(self, now: int, limit: int) -> list[File]:
        """See the contract."""
        rows = self._con.execute(
            "SELECT doc, h, version FROM files WHERE expires_at < ? ORDER BY expires_at LIMIT ?",
            (now, limit),
        )
        return [_file(row) for row in rows]

    async def stored(self, owner: str | None) -> tuple[int, int]:
        """See the contract. Kept by triggers."""
        owned, values = _owned(owner)
        return self._con.execute(  # type: ignore[no-any-return]
            f"SELECT coalesce(sum(files), 0), coalesce(sum(bytes), 0) FROM stored WHERE {owned}",
            values,
        ).fetchone()


def _refusal(error: BaseException) -> SluiceError:
    """What a failing SQLite means to the caller; names no path."""
    if isinstance(error, SluiceError):
        return error
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return SluiceError("disk-full", "The disk of the state is full; nothing was changed.")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR")):
        return SluiceError("storage-missing", f"The state can't be written ({name}).")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return SluiceError("storage-failed", f"state.db is damaged, or no database ({name}).")
    refusal = SluiceError("internal")
    refusal.__cause__ = error
    return refusal


def _own(error: Exception) -> Exception:
    """What a write that fails alone tells its caller."""
    return error if isinstance(error, Stale | Fenced | Spent) else _refusal(error)


def _used(con: sqlite3.Connection, owner: str, key: str) -> Used | None:
    row = con.execute(
        "SELECT fingerprint, job, version FROM keys WHERE owner = ? AND key = ? AND at > ?",
        (owner, key, _now_ms() - KEY_KEPT_MS),
    ).fetchone()
    return Used(*row) if row else None


def _spend(con: sqlite3.Connection, key: Key | None, job: str, version: int) -> None:
    """Write down what has spent a key, before the change: if that fails, it is taken back, too."""
    if key is None:
        return
    if (used := _used(con, key.owner, key.key)) is not None:
        raise Spent(used)
    con.execute(
        "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)", (*key, job, version, _now_ms())
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _clock(job: Job) -> int | None:
    """When the clock takes a job; one that waits for others is not the clock's."""
    return None if job.blocked else job.not_before


def _live(job: Job) -> int | None:
    return None if job.ended_at is not None else 1


def _doc(job: Job) -> bytes:
    """The versioned part of a job."""
    return _encode(
        msgspec.structs.replace(
            job,
            cursor=None,
            undo=(),
            stored_bytes=0,
            durable_bytes=0,
            saved_at=0,
            progress=Progress(),
        )
    )


def _job(row: Sequence[Any]) -> Job:
    h, fence, incarnation, doc, progress, cursor, undo, stored, durable, saved_at = row
    return msgspec.structs.replace(
        _job_decoder.decode(doc),
        h=h,
        fence=fence,
        incarnation=incarnation,
        progress=_progress_decoder.decode(progress) if progress else Progress(),
        cursor=msgspec.json.decode(cursor) if cursor else None,
        undo=_undo_decoder.decode(undo) if undo else (),
        stored_bytes=stored,
        durable_bytes=durable,
        saved_at=saved_at,
    )


def _select(con: sqlite3.Connection, job_id: str) -> Sequence[Any]:
    return con.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()  # type: ignore[no-any-return]


def _held(
    con: sqlite3.Connection, owner: str, live_name: str | None, key: Key | None
) -> Job | None:
    """The live job that holds a live name already; it is then what the key stands for."""
    if live_name is None:
        return None
    row = con.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE owner = ? AND live_name = ?", (owner, live_name)
    ).fetchone()
    if row is None:
        return None
    held = _job(row)
    _spend(con, key, held.id, held.version)
    return held


def _owned(owner: str | None) -> tuple[str, list[Any]]:
    """WHERE for what an owner may see."""
    return ("1", []) if owner is None else ("owner = ?", [owner])


def _where(
    filter: Filter, owner: str | None, kinds: Sequence[str], states: Sequence[str]
) -> tuple[str, list[Any]]:
    """WHERE for one seek."""
    where, values = _owned(owner)
    for column, wanted in (
        ("kind", kinds),
        ("state", states),
        ("name", [] if filter.name is None else [filter.name]),
        ("client", [] if filter.client is None else [filter.client]),
    ):
        if wanted:
            where += f" AND {column} IN ({','.join('?' * len(wanted))})"
            values += wanted
    return where + (" AND live = 1" if filter.live else ""), values


def _event(row: Sequence[Any]) -> Event:
    return Event(
        seq=row[0],
        job=row[1],
        version=row[2],
        kind=row[3],
        owner=row[4],
        at=row[5],
        from_=row[6],
        to=row[7],
        cause=row[8],
        actor=row[9],
        row=msgspec.Raw(row[10]),
    )


def _file(row: Sequence[Any]) -> File:
    return msgspec.structs.replace(_file_decoder.decode(row[0]), h=row[1], version=row[2])


def _add_file(con: sqlite3.Connection, file: File) -> None:
    """Insert a file as the next version of its name; numbers of deleted versions stay used."""
    version = con.execute(
        "INSERT INTO names VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET version = version + 1"
        " RETURNING version",
        (file.owner, file.name),
    ).fetchone()[0]
    con.execute(
        "INSERT INTO files (id, owner, name, version, bytes, expires_at, doc)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (file.id, file.owner, file.name, version, file.bytes, file.expires_at, _encode(file)),
    )
