"""Bytes and rows: the contracts that every backend keeps, and the records they hold.

``State`` holds jobs, their events and the stored files as rows; ``Blobs`` holds bytes. Both are
asynchronous and neither knows HTTP or the rules of jobs: *what* a row becomes is decided above,
by ``jobs/states.py``; a backend only sees to it that it becomes so at once, once, and durably.

- One call is one transaction. A job's row and its event always commit together.
- Writes are *fenced*: a runner passes the fence that its claim gave it, and a write with an older
  one raises ``Fenced``, so that a node that lost its lease can not spoil a job. Commands pass no
  fence; they are compared by version and raise ``Stale`` when the row has moved.
- An awaited write has been committed. What "committed" survives is the durability setting's
  business (docs/durability.md).

The records live here and not in ``jobs``, because imports run downward only. Every ``*_at`` is in
milliseconds since 1970, UTC.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from errors import SluiceError

T = TypeVar("T")

KEEP_EVENTS = 1_000_000
KEY_KEPT_MS = 86_400_000  # how long an idempotency key is remembered


class By(msgspec.Struct, frozen=True, kw_only=True):
    """Who gave the last command, through which door, and when."""

    actor: str
    via: str
    at: int


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a job an upload or a download; ``None`` on a process."""

    protocol: str
    resumable: bool
    length_bytes: int | None = None
    file: str | None = None  # the stored file that a download sends


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The latest value of a job's progress; lossy, never logged by itself."""

    done: int = 0
    total: int | None = None
    unit: str = "steps"
    rate_per_s: float | None = None
    eta_s: tuple[float, float] | None = None
    phase: str | None = None
    message: str | None = None


class Undo(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a job's undo journal: a registered coroutine's name and its arguments."""

    name: str
    args: dict[str, Any]


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a process makes beside its result."""

    name: str
    file: str
    bytes: int
    media_type: str
    digest: dict[str, str] = {}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a job leaves: the id of a stored file, plain data, or both."""

    file: str | None = None
    data: dict[str, Any] = {}


class Rollback(msgspec.Struct, frozen=True, kw_only=True):
    """How far a cancelled or failed job has been undone, in entries of its journal."""

    done: int
    total: int
    failed: int = 0


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the job table.

    ``commit`` writes all of it but ``cursor``, ``undo``, ``stored_bytes``, ``durable_bytes`` and
    ``saved_at``, which only ``save`` writes: they move without an event and without a new version.

    What is as its default is left out of the stored row, so a default here never changes.
    """

    id: str
    h: int = 0
    kind: str
    name: str
    owner: str
    client: str = ""
    state: str
    want: str = "run"
    reason: str | None = None
    version: int = 0
    attempt: int = 1
    priority: int = 5
    rank: int = 0
    params: dict[str, Any] = {}
    created_at: int
    started_at: int | None = None
    ended_at: int | None = None
    not_before: int | None = None
    deadline_at: int | None = None
    deadline_step: int = 0
    expires_at: int | None = None
    retry_of: str | None = None
    after: tuple[str, ...] = ()  # the jobs that it starts after
    on: str = "success"  # or "any": how they must end
    blocked: bool = False  # it still waits for one of them
    retries: int = 0  # attempts that its kind's back-off has granted
    crashes: tuple[int, ...] = ()  # when it was running as the server died, of late
    crashed_at: int = 0  # how far it was at the last of them (progress.done)
    by: By | None = None
    transfer: Transfer | None = None
    limit_bytes_per_s: int | None = None
    progress: Progress = Progress()
    rollback: Rollback | None = None
    result: Result | None = None
    artifacts: tuple[Artifact, ...] = ()
    error: dict[str, Any] | None = None
    fence: int = 0
    incarnation: int = 0
    cursor: Any = None
    undo: tuple[Undo, ...] = ()
    stored_bytes: int = 0
    durable_bytes: int = 0
    saved_at: int = 0  # the last save; the clock of an upload that is left alone


class Event(msgspec.Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """One transition in the log; ``row`` is the job as JSON after it. ``seq`` is the log's."""

    seq: int = 0
    job: str
    version: int
    kind: str
    owner: str
    at: int
    from_: str | None
    to: str
    cause: str
    actor: str
    row: msgspec.Raw


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One stored, immutable version of a named file. ``id`` is its blob's id too.

    ``layout`` says what the blob holds: the bytes (``plain``), those of a table that can also be
    asked for its rows (``table``, see storage/tables.py), or what they are made of when they are
    read (``zip``, see jobs/zips.py). ``bytes`` is what a reader gets, in any case.
    """

    id: str
    h: int = 0
    name: str
    version: int = 0
    bytes: int
    media_type: str
    digest: dict[str, str] = {}
    owner: str
    job: str | None
    created_at: int
    expires_at: int | None = None
    layout: str = "plain"

    @property
    def etag(self) -> str:
        """A strong validator: a version's bytes never change, so its id says it all."""
        return f'"{self.id}"'


class Boot(NamedTuple):
    """What ``open`` found. ``same_boot`` is false after the machine itself restarted."""

    epoch: str
    incarnation: int
    seq: int
    same_boot: bool


def matches_text(text: str, name: str, id: str) -> bool:
    """Whether a search finds a job or a file: by part of its name in any case, or all of its id."""
    return text.casefold() in name.casefold() or text == id


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs: every field that is given must match; ``owner=None`` is the service itself."""

    owner: str | None = None
    kinds: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    name: str | None = None
    client: str | None = None
    live: bool = False
    text: str | None = None


class Page(NamedTuple, Generic[T]):
    """Rows, newest first, and the key after which the next page begins."""

    items: list[T]
    next: int | None


class Stale(Exception):
    """The row has moved on since it was read: read it again and decide again."""


class Fenced(Exception):
    """The writer's lease is no longer the newest: it must stop and write nothing more."""


class Key(NamedTuple):
    """The name that a client gives a command, so that a repeat is known to be one.

    ``fingerprint`` stands for all that the command says: another one under the same key is no
    repeat.
    """

    owner: str
    key: str
    fingerprint: str


class Used(NamedTuple):
    """What came of the command that has spent a key: the job, and its version after it."""

    fingerprint: str
    job: str
    version: int


class Spent(Exception):
    """The key was used before; nothing was changed now."""

    def __init__(self, used: Used) -> None:
        super().__init__(used)
        self.used = used


class Creation(NamedTuple):
    """A new job that is claimed in the transaction that makes it: its second row and event."""

    job: Job
    event: Event
    claimed: Job
    claim: Event
    live_name: str | None = None
    key: Key | None = None


class Commit(NamedTuple):
    """What one call of ``commit`` is given."""

    job: Job
    event: Event
    was_version: int
    fence: int | None = None
    files: Sequence[File] = ()
    key: Key | None = None


UNSET: Any = msgspec.UNSET


class Jobs(Protocol):
    """The job table. ``commit`` is the only way to change a state."""

    async def create(
        self,
        job: Job,
        event: Event,
        *,
        live_name: str | None = None,
        key: Key | None = None,
        follower: tuple[Job, Event, str] | None = None,
    ) -> tuple[Job, bool]:
        """Insert a job with its first event, giving it its number ``h``.

        A live job that holds ``live_name`` already is returned instead, with False. With a key it
        is done once, here as in ``commit`` and ``delete``: the key is kept in the same transaction,
        and raises Spent from then on. ``follower`` is a second job (with its event and live name)
        that is made with the first or not at all. A job that is ``blocked`` waits for ``after``;
        raises invalid-field if one of these is not there.
        """
        ...

    async def create_all(
        self, creations: Sequence[Creation]
    ) -> list[tuple[Job, bool] | BaseException]:
        """``create`` and claim each, by itself, with one wait for all; what ``create`` returns."""
        ...

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
        """Replace a row, log its event and add stored files, in one transaction; the event's seq.

        Raises Stale if the row is not at ``was_version`` or not in the state that the event begins
        with, Fenced if its fence is not ``fence``, Spent for a key that was used.
        """
        ...

    async def commit_all(self, commits: Sequence[Commit]) -> list[int | BaseException]:
        """``commit`` each, by itself, with one wait for all; what each returns or raises."""
        ...

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
        """Write what moves without a version. Raises Fenced for an old fence or a deleted job."""
        ...

    async def claim(
        self,
        kinds: Collection[str],
        slots: int,
        *,
        room: Mapping[str, int] = {},
        owner_slots: int | None = None,
        busy: Mapping[str, int] = {},
    ) -> list[Job]:
        """Lease up to ``slots`` queued jobs with a new fence.

        First by priority; then those that ran before; then owners take turns; of one owner by
        rank, then age. ``room``: how many more of a kind may start, for kinds that have a limit;
        ``busy``: how many slots an owner holds, of the ``owner_slots`` that each may hold. What may
        not start is passed over, at no cost.

        A lease changes no state; the caller commits the claim. A lease that is not followed by a
        commit is void at the next start (or, with many nodes, after its time).
        """
        ...

    async def renew(self, leases: Sequence[tuple[str, int]]) -> list[str]:
        """Keep the leases (job, fence); the jobs whose lease is lost."""
        ...

    async def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """The job, or None if there is none or it is another owner's."""
        ...

    async def holder(self, owner: str, live_name: str) -> Job | None:
        """The live job that holds a live name; it may be shown under another one meanwhile."""
        ...

    async def find(self, filter: Filter, after: int | None, limit: int) -> Page[Job]:
        """Jobs, newest first, with a number below ``after``.

        With a text, one call looks at a bounded number of jobs: a page may then have fewer than
        ``limit``, even none, though ``next`` promises more.
        """
        ...

    async def counts(self, owner: str | None) -> dict[str, int]:
        """How many jobs there are in each state."""
        ...

    async def tally(self, owner: str | None) -> list[tuple[str, str, int]]:
        """How many jobs there are of each kind in each state (kind, state, n), those with any."""
        ...

    async def due(self, now: int) -> tuple[list[Job], int | None]:
        """Scheduled jobs whose time has come, and when the next one's comes."""
        ...

    async def ahead(self, job: Job) -> int:
        """How many queued jobs come before this one, limits aside; at most 1,000 are counted."""
        ...

    async def waiting(self) -> dict[str, int]:
        """How many jobs of each owner are scheduled or queued."""
        ...

    async def states(self, job_ids: Collection[str], owner: str) -> dict[str, str]:
        """The states of those of the jobs that there are, if they are the owner's."""
        ...

    def chained(self) -> bool:
        """Whether any job has ever waited for another one: else nobody needs to ask who does."""
        ...

    async def parents(self, job_id: str) -> dict[str, str | None]:
        """What a blocked job waits for, and how each of these has ended, if it has.

        That is kept when an ended one is deleted.
        """
        ...

    async def followers(self, job_id: str, after: str, limit: int) -> list[str]:
        """The blocked jobs that wait for this one, by id, with ids behind ``after``."""
        ...

    async def overdue(self, after: str, limit: int) -> list[str]:
        """Blocked jobs of whose parents at least one has ended, by id, behind ``after``."""
        ...

    async def ended_before(self, at: int, limit: int) -> list[Job]:
        """Final jobs that ended before ``at``, oldest first."""
        ...

    async def spend(self, key: Key, job: str, version: int) -> None:
        """Spend a key on what changes no row by itself, keeping what is told. Raises Spent."""
        ...

    async def used(self, owner: str, key: str) -> Used | None:
        """What has spent a key within the last ``KEY_KEPT_MS``."""
        ...

    async def forget_keys(self, before: int, limit: int) -> int:
        """Forget keys that were spent before a time, the oldest first; how many."""
        ...

    async def delete(
        self, job_id: str, event: Event, *, was_version: int, key: Key | None = None
    ) -> int:
        """Remove a job; the log keeps its events, and ``event``, for as long as any others."""
        ...

    async def log(self, job_id: str, lines: Sequence[str], at: int) -> None:
        """Append lines to the job's own log; the oldest beyond 10,000 go."""
        ...

    async def lines(self, job_id: str, after: int, limit: int) -> list[tuple[int, int, str]]:
        """Log lines (number, at, text) after a number; ``after=-n`` means the last n."""
        ...


class Events(Protocol):
    """The event log, in commit order, and the lossy progress beside it.

    From ``oldest`` on the log is whole, whatever was deleted. Before it, it has the events of the
    jobs that there are, and no others.
    """

    async def events(self, after_seq: int, limit: int) -> list[Event]:
        """Events after a cursor, oldest first. Ask ``oldest`` afterwards whether it was all."""
        ...

    async def oldest(self) -> int:
        """The seq from which on nothing is missing; it rises as the log grows (keep_events)."""
        ...

    async def history(self, job_id: str, after_version: int, limit: int) -> list[Event]:
        """One job's events, oldest first."""
        ...

    async def wait(self, seq: int) -> int:
        """Return the newest seq as soon as it is beyond ``seq``."""
        ...

    async def progress_out(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Tell every node the latest progress; may be lost."""
        ...

    def progress_in(self) -> AsyncIterator[Sequence[tuple[Any, ...]]]:
        """What any node told, for as long as it is iterated."""
        ...


class Files(Protocol):
    """Stored files; they are added by ``Jobs.commit``."""

    async def file(self, file_id: str, owner: str | None) -> File | None:
        """The file, or None if there is none or it is another owner's."""
        ...

    async def newest(self, owner: str, name: str) -> File | None:
        """The newest version of a name."""
        ...

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
        """Files, newest first, with a number below ``after``; of each name only the ``newest``.

        With one of the last two, one call looks at a bounded number of files: a page may then have
        fewer than ``limit``, even none, though ``next`` promises more.
        """
        ...

    async def add_digests(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Keep digests (hex, by algorithm) with files, by their ids; unknown ids are fine.

        A digest that a file has already stays: its bytes never change.
        """
        ...

    async def delete_file(self, file_id: str) -> None:
        """Forget a file. Its blob is discarded by the caller, afterwards."""
        ...

    async def expired_files(self, now: int, limit: int) -> list[File]:
        """Files whose time has passed."""
        ...

    async def stored(self, owner: str | None) -> tuple[int, int]:
        """How many files, and how many bytes."""
        ...


class State(Jobs, Events, Files, Protocol):
    """Everything that is a row."""

    async def open(self) -> Boot:
        """Make or open the tables; a new incarnation."""
        ...

    async def close(self) -> None:
        """Write what is pending and close."""
        ...


class Writer(Protocol):
    """An unfinished blob that grows at its end."""

    async def write(self, view: memoryview) -> int:
        """Append; the new offset. ``view`` is valid only until this returns.

        Raises disk-full or storage-missing; then the bytes before the call are still valid.
        """
        ...

    async def sync(self) -> int:
        """Force what was written to the disk; the offset that is durable now."""
        ...

    async def close(self) -> None:
        """Give the blob up, keeping its bytes."""
        ...


class Reader(Protocol):
    """Bytes of a blob; stays valid after the blob is discarded."""

    size_bytes: int

    def fileno(self) -> int | None:
        """A descriptor for sendfile, or None."""
        ...

    async def read(self, start: int, n: int) -> bytes:
        """At most ``n`` bytes from ``start``; empty only at the end."""
        ...

    async def close(self) -> None:
        """Let go of the blob."""
        ...


class Bundle(Protocol):
    """The members of a blob, see ``Blobs.link``; all stay readable until ``close``."""

    async def reader(self, member_id: str) -> Reader:
        """Read a member. Raises file-unknown."""
        ...

    async def close(self) -> None:
        """Let go of the members; may be called again."""
        ...


class Digester(Protocol):
    """Hashes a blob while it grows, outside of this process; reads only what is said to be there.

    A blob that is hashed may be published or discarded meanwhile; its bytes stay until ``close``.
    """

    processed: int  # bytes hashed, as an offset in the blob; it never goes back

    def follow(self, upto: int) -> None:
        """Everything before ``upto`` is there and will not change: hash it when there is time.

        Cheap enough to be called after each write.
        """
        ...

    async def reach(self, upto: int) -> None:
        """``follow``, and return when everything before ``upto`` was hashed.

        Raises storage-failed.
        """
        ...

    async def result(self) -> dict[str, str]:
        """The digests of all that was followed before this call, in hex, by algorithm.

        When this returns, that is everything from the start up to ``processed``; the hash goes on
        afterwards. Raises storage-failed.
        """
        ...

    def close(self) -> None:
        """Forget it; may be called again. Whoever waits for it gets storage-failed."""
        ...


class Blobs(Protocol):
    """Everything that is bytes: unfinished blobs that grow, published ones that never change."""

    async def open(self) -> None:
        """Make what is missing and look that the place can be written."""
        ...

    async def writer(
        self, blob_id: str, fence: int, *, offset: int = 0, length: int | None = None
    ) -> Writer:
        """Go on writing at ``offset``; what lies behind it is cut off.

        ``length`` (when known) lets a backend refuse at once what can't fit: disk-full.
        """
        ...

    async def size(self, blob_id: str) -> int | None:
        """The bytes of an unfinished blob, or None."""
        ...

    async def place(self, blob_id: str) -> Path:
        """Where an unfinished blob lies on this machine, for a library that writes files by itself.

        Nothing is made there. Files beside it whose names go on with ``-`` (SQLite's journals) are
        its *side files*: they are kept, swept and discarded with it.
        """
        ...

    async def sync(self, blob_id: str) -> None:
        """Force what lies at a place, and its side files, to the disk. What is missing is fine."""
        ...

    async def publish(self, blob_id: str, name: str) -> int:
        """Make an unfinished blob final under ``name``, at once and durably; its bytes.

        A side file that is not empty means that the blob is not whole: storage-failed.
        """
        ...

    async def unpublish(self, blob_id: str) -> bool:
        """Take a publishing back that no row followed; False if there was none."""
        ...

    async def reader(self, blob_id: str, name: str | None) -> Reader:
        """Read a published blob, or an unfinished one with ``name=None``. May raise not-found."""
        ...

    async def digester(
        self,
        blob_id: str,
        algorithms: Collection[str],
        *,
        start: int = 0,
        name: str | None = None,
    ) -> Digester:
        """Hash a blob (see ``reader`` for ``name``) from ``start`` on, while it grows.

        Algorithms: sha-256, sha-512, sha (SHA-1), md5, crc-32 (eight digits); ValueError for
        another one. Raises file-unknown, storage-failed.
        """
        ...

    async def link(self, blob_id: str, source_id: str, source_name: str) -> None:
        """Make a published blob's bytes a *member* of another blob, which need not exist so far.

        Nothing is copied. The member stays as long as the other one, whatever becomes of its
        source; it is durable when the other one is published. Linking it again changes nothing.
        Raises file-unknown, storage-failed.
        """
        ...

    async def bundle(self, blob_id: str) -> Bundle:
        """Open the members of a blob, also of one that is discarded meanwhile.

        Raises file-unknown if it has none.
        """
        ...

    async def discard(self, blob_id: str) -> None:
        """Remove a blob with its members, published or not, without stopping the loop.

        Unknown ids are fine.
        """
        ...

    async def concat(
        self,
        blob_id: str,
        parts: Sequence[tuple[str, str | None]],
        pace: Callable[[int], Awaitable[None]] | None = None,
    ) -> int:
        """Make an unfinished blob of others, (id, name) each, in order; its bytes.

        ``pace`` is awaited between slices with the bytes so far; what it raises ends the joining.
        """
        ...

    async def sweep(self, keep: Collection[str]) -> int:
        """Remove unfinished blobs that are not in ``keep``, with their members; how many."""
        ...

    async def free_bytes(self) -> int:
        """Room that is left."""
        ...

    async def disk_bytes(self) -> int:
        """All room that there is, used or not."""
        ...

    async def close(self) -> None:
        """Finish pending removals and let go."""
        ...


def open_state(url: str, durability: str, keep_events: int = KEEP_EVENTS) -> State:
    """The State that a URL names: ``sqlite:///folder/state.db``.

    Its log is whole for at least its newest ``keep_events`` events.
    """
    from storage.state_sqlite import SqliteState  # noqa: PLC0415 - a backend loads when it is named

    scheme, _, path = url.partition("://")
    if scheme != "sqlite":
        raise SluiceError("bad-request", f"No state backend is known for {scheme!r}.")
    return SqliteState(Path(path), durability, keep_events)


def open_blobs(url: str, durability: str) -> Blobs:
    """The Blobs that a URL names: ``file:///folder``."""
    from storage.blobs_local import LocalBlobs  # noqa: PLC0415 - a backend loads when it is named

    scheme, _, path = url.partition("://")
    if scheme != "file":
        raise SluiceError("bad-request", f"No blob backend is known for {scheme!r}.")
    return LocalBlobs(Path(path), durability)
