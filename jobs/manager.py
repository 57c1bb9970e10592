"""The door to all jobs: start, command, look, and what drivers report.

Strategy. Every change goes through ``_step``: read the row, let ``states.decide`` say what it
becomes, commit it with its event by compare-and-swap, and only then run the effects. A stale row
is read and decided again, so each race is settled by which commit came first. The manager knows
no kind of work: *drivers* (processes, uploads, downloads) move the jobs and report back.

Everything runs on one loop; a live task belongs to its driver, never to a request.
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from errors import SluiceError
from jobs import states
from jobs.files import now_ms, uuid7
from jobs.kinds import Registry
from jobs.measures import Measures
from jobs.rows import job_row
from jobs.states import Decision, Effect, Facts, Input
from storage import (
    KEY_KEPT_MS,
    UNSET,
    Boot,
    By,
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
    Rollback,
    Stale,
    State,
    Transfer,
    Used,
)

T = TypeVar("T")

log = logging.getLogger("sluice.jobs")

_TICK_S = 0.1  # how often progress is told
_MARKS = 250  # of progress in a slice: some 2 ms
_TICKS_A_SAVE = 10  # and how much rarer it is saved
_RETENTION_S = 60.0
_BATCH = 100  # transitions that are decided in one slice of the loop: some 3 ms
_KEYS = 1000  # forgotten together
_CONCLUDE_S = 2.0  # that a request waits for the commit of its outcome
_AGAIN_S = 1.0  # before a report that could not be committed is tried again

_NAME_CHARS = 200
_PRIORITY = 9  # the highest
_WAITING = frozenset({states.QUEUED, states.SCHEDULED})
_LIMIT_LOW, _LIMIT_HIGH = 1 << 10, 1 << 40  # bytes_per_s


class Mark(NamedTuple):
    """The latest progress of a live job, as it travels to subscribers; may be lost."""

    job: str
    h: int
    version: int
    owner: str
    kind: str
    state: str
    name: str
    progress: Progress


class Glance(NamedTuple):
    """What a driver knows of a live job beyond its row."""

    progress: Progress | None
    transfer: dict[str, Any] | None


class Grown(NamedTuple):
    """A file that a job makes, as far as it has come.

    The first ``bytes`` of the blob are there and will never be others, whatever happens to the
    job: they survive a crash. ``length_bytes`` is that of the whole, if it is known by now. Under
    the id ``blob`` there are never other bytes: a process that begins anew makes another one.
    """

    blob: str
    name: str
    media_type: str
    bytes: int
    length_bytes: int | None


class _Finish(NamedTuple):
    """A process has come to its end and tells it."""

    job_id: str
    fence: int
    files: Sequence[File]
    facts: dict[str, Any]
    told: asyncio.Future[Job | None]


class _Start(NamedTuple):
    """A job that is asked for while a slot is free and nobody waits."""

    job: Job
    by: By
    live_name: str | None
    key: Key | None
    told: asyncio.Future[tuple[Job, bool]]


class _Step(NamedTuple):
    """What happens to a job whose row is known."""

    job: Job
    input: Input
    facts: Facts
    fence: int
    files: Sequence[File] = ()


News = Callable[[Job | None], None]
Versions = int | Sequence[int] | None  # one of which a job must be at


class Driver(Protocol):
    """What moves the jobs of some kinds."""

    def start(self, job: Job) -> None:
        """Run a job that was given a slot, from its cursor."""
        ...

    def signal(self, job: Job) -> bool:
        """``job.want`` has changed. True: a live task will report what comes of it."""
        ...

    def tune(self, job: Job) -> None:
        """``job.limit_bytes_per_s`` has changed."""
        ...

    def force(self, job: Job) -> None:
        """The grace is over: stop the live task now."""
        ...

    async def rollback(self, job: Job) -> Rollback | None:
        """Undo what the job has done, after its live task has ended."""
        ...

    async def discard(self, job: Job) -> None:
        """Remove the unfinished bytes of a job that has ended."""
        ...

    async def recover(self, job: Job, same_boot: bool) -> list[str]:
        """Put the bytes of a job of an earlier incarnation right; the blobs that it still needs."""
        ...

    def glance(self, job: Job, finished: bool = False) -> Glance:
        """Live progress and transfer details, if the job is live here."""
        ...

    def grown(self, job: Job, name: str | None) -> Grown | None:
        """A file that the job makes or has made, by its name or id; None: the first one.

        None if there is no such file so far. Raises content-unknown if there will be none. Waits
        for nothing, and is cheap enough to be called after each commit.
        """
        ...

    def changed(self) -> Iterable[tuple[str, Progress]]:
        """Jobs whose progress has moved since the last call, also if some end meanwhile."""
        ...

    async def save(self) -> None:
        """Store progress, cursors and offsets of live jobs; called once a second."""
        ...

    async def stop(self) -> None:
        """Bring live jobs to a checkpoint and report SHUTDOWN for each."""
        ...


class Following(NamedTuple):
    """A checked start that is to follow a transfer, made together with it.

    ``file_field``: the parameter that names the transfer's file, if the service shall set it.
    """

    kind: str
    params: dict[str, Any]
    file_field: str | None
    name: str | None
    priority: int
    not_before: int | None
    after: Sequence[str]
    on: str


class Limits(NamedTuple):
    """Numbers of the configuration that the manager keeps."""

    slots: int = 8
    warn_s: float = 10.0
    grace_s: float = 30.0
    max_queued: int = 10_000
    owner_queued: int = 0  # 0: no limit but that of all owners together
    owner_slots: int = 0  # 0: as many as there are
    # Before what the kinds say themselves:
    kind_limits: Mapping[str, int] = {}
    run_timeouts_s: Mapping[str, float] = {}
    stall_timeouts_s: Mapping[str, float] = {}
    keep_jobs_s: float = 30 * 86_400.0


class Manager:
    """All jobs of the service."""

    def __init__(self, state: State, kinds: Registry, boot: Boot, limits: Limits) -> None:
        self.kinds = kinds
        self.limits = limits
        self.measures = Measures()
        self._state = state
        self._boot = boot
        self._drivers: dict[str, Driver] = {}
        self._active: dict[str, Job] = {}  # running to cancelling, as last committed
        self._slots: dict[str, Job] = {}
        self._waiting: Counter[str] = Counter()  # by owner: jobs that are queued or scheduled
        self._total_waiting = 0
        self._chained = False  # a job has waited for another one
        self._limits_of: dict[str, int] = {}  # how many of a kind may run, where that is limited
        self._alarms: dict[str, asyncio.TimerHandle] = {}
        self._rollbacks: dict[str, asyncio.Task[None]] = {}
        self._waits: set[asyncio.Future[Job | None]] = set()
        self._news: dict[str, set[News]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting: list[_Start] = []
        self._starters: set[asyncio.Task[Any]] = set()
        self._finishing: list[_Finish] = []
        self._claiming: asyncio.Task[None] | None = None
        self._claim_again = False
        self._due_timer: asyncio.TimerHandle | None = None
        self._open = False

    # For handlers

    def parse(self, kind: str, params: dict[str, Any]) -> dict[str, Any]:
        """Check the parameters of a process that is to be started (see Registry.parse).

        Raises kind-not-startable for a transfer.
        """
        self._check_startable(kind)
        return self.kinds.parse(kind, params)

    def _check_startable(self, kind: str) -> None:
        if kind and kind in self._drivers:  # processes have one driver, under no name
            raise SluiceError(
                "kind-not-startable", f"{kind} begins with its transfer.", field="kind"
            )

    async def start(
        self,
        kind: str,
        params: dict[str, Any],
        *,
        owner: str,
        by: By,
        client: str = "",
        name: str | None = None,
        priority: int = 5,
        not_before: int | None = None,
        live_name: bool = False,
        retry_of: str | None = None,
        after: Sequence[str] = (),
        on: str = "success",
        key: Key | None = None,
    ) -> tuple[Job, bool]:
        """Create a job of a process kind with checked ``params``; it starts when a slot is free.

        It waits for the jobs ``after``: until all have succeeded, or (``on="any"``) ended. If it
        must not start any more, it is cancelled. With ``live_name`` the name is unique among the
        owner's live jobs: a live one is returned instead, with False. Raises unknown-kind,
        queue-full, stopping, invalid-field for a job in ``after`` that is not there, and Spent for
        a key that was used, as all that take one.
        """
        job = self._new(
            kind,
            params,
            owner=owner,
            client=client,
            name=name,
            priority=priority,
            not_before=not_before,
            retry_of=retry_of,
        )
        if after:
            job = await self._behind(job, after, on)
        held = name if live_name else None
        if self._has_room(job):
            return await self._start_now(job, by, held, key)
        self._reserve(owner)
        # It happens whether or not the caller goes on waiting for it.
        task = asyncio.get_running_loop().create_task(self._queue(job, by, held, key))
        self._starters.add(task)
        task.add_done_callback(self._queued)
        return await asyncio.shield(task)

    async def _queue(
        self, job: Job, by: By, live_name: str | None, key: Key | None
    ) -> tuple[Job, bool]:
        """Make a job that waits, on the place that is reserved for it."""
        created = False
        try:
            job, created = await self._create(job, by, live_name, key)
        finally:
            if not created:
                self._count(job.owner, -1)
        if created and job.blocked:  # what it waits for may have ended
            await self._look_after(job.id)
            job = await self._state.get(job.id) or job
        return job, created

    def _queued(self, task: asyncio.Task[Any]) -> None:
        self._starters.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that is gone does not take it

    def _has_room(self, job: Job) -> bool:
        """Whether a new job need not queue: nobody is before it, and a slot is free for it."""
        return (
            self._open
            and self._total_waiting == 0
            and self._claiming is None
            and len(self._slots) < self.limits.slots
            and not job.blocked
            and job.not_before is None
            and not self._is_full(job)
        )

    def _start_now(
        self, job: Job, by: By, live_name: str | None, key: Key | None
    ) -> asyncio.Future[tuple[Job, bool]]:
        """Make a job and give it a slot in one commit, with all others of this turn of the loop.

        To be queued, leased and claimed would cost it three. It happens whether or not somebody
        goes on waiting for it.
        """
        self._slots[job.id] = job
        told: asyncio.Future[tuple[Job, bool]] = asyncio.get_running_loop().create_future()
        if not self._starting:
            self._spawn_starter()
        self._starting.append(_Start(job, by, live_name, key, told))
        return told

    def _spawn_starter(self) -> None:
        self._starters.add(task := self.spawn(self._start_all()))
        task.add_done_callback(self._starters.discard)

    async def _start_all(self) -> None:
        starts, self._starting = self._starting[:_BATCH], self._starting[_BATCH:]
        if self._starting:
            self._spawn_starter()
        try:
            creations = [self._creation(start) for start in starts]
            results = await self._state.create_all(creations)
        except Exception as error:
            for start in starts:
                self._started_not(start, error)
            return
        for start, creation, result in zip(starts, creations, results, strict=True):
            if isinstance(result, BaseException):
                self._started_not(start, result)
                continue
            made, created = result
            if created:
                self._remember(made)
                running = msgspec.structs.replace(creation.claimed, h=made.h)
                self._remember(running)
                self._driver(running).start(running)
            else:
                self._slots.pop(start.job.id)
                self._kick()
            if not start.told.done():
                start.told.set_result(result)

    def _creation(self, start: _Start) -> Creation:
        job, event = self._begun(start.job, start.by)
        decision = states.decide(job, Input.CLAIM, self._facts())
        assert decision is not None
        claimed = msgspec.structs.replace(decision.job, fence=job.fence + 1)
        claimed, claim = self._entry(job, claimed, decision.cause, "service")
        return Creation(job, event, claimed, claim, start.live_name, start.key)

    def _started_not(self, start: _Start, error: BaseException) -> None:
        self._slots.pop(start.job.id)
        self._kick()
        if not start.told.done():
            start.told.set_exception(error)

    async def _behind(self, job: Job, after: Sequence[str], on: str) -> Job:
        """The job, waiting for others unless all have ended as they must. Raises invalid-field."""
        after = tuple(dict.fromkeys(after))
        found = await self._state.states(after, job.owner)
        if unknown := [parent for parent in after if parent not in found]:
            raise SluiceError(
                "invalid-field", f"There is no job with the id {unknown[0][:64]!r}.", field="after"
            )
        fine = states.FINAL if on == "any" else {states.SUCCEEDED}
        blocked = any(state not in fine for state in found.values())
        return msgspec.structs.replace(job, after=after, on=on, blocked=blocked)

    def _reserve(self, owner: str) -> None:
        """Take a place in the queue before the job is made. Raises queue-full."""
        most, mine = self.limits.max_queued, self.limits.owner_queued
        if self._total_waiting >= most:
            raise SluiceError(
                "queue-full", f"{self._total_waiting} jobs are waiting.", retry_after_s=5
            )
        if mine and self._waiting[owner] >= mine:
            raise SluiceError("queue-full", f"{mine} of your jobs are waiting.", retry_after_s=5)
        self._count(owner, 1)

    def _count(self, owner: str, n: int) -> None:
        """So many more of an owner's jobs wait now."""
        n = max(n, -self._waiting[owner])
        self._total_waiting += n
        self._waiting[owner] += n
        if not self._waiting[owner]:
            del self._waiting[owner]

    def _new(
        self,
        kind: str,
        params: dict[str, Any],
        *,
        owner: str,
        client: str,
        name: str | None,
        priority: int = 5,
        not_before: int | None = None,
        retry_of: str | None = None,
    ) -> Job:
        """The row of a process that was not made so far. Raises unknown-kind."""
        self._check_startable(kind)
        if self.kinds.get(kind) is None:
            self.kinds.parse(kind, params)
        now = now_ms()
        job_id = uuid7()
        return Job(
            id=job_id,
            kind=kind,
            name=name or f"{kind} {job_id[-6:]}",
            owner=owner,
            client=client,
            state=states.QUEUED,
            priority=priority,
            params=params,
            created_at=now,
            not_before=not_before,
            retry_of=retry_of,
            progress=Progress(unit=self.unit(kind)),
        )

    async def begin(
        self,
        kind: str,
        transfer: Transfer,
        *,
        job_id: str | None = None,
        owner: str,
        client: str,
        name: str,
        by: By,
        cursor: Any = None,
        params: dict[str, Any] | None = None,
        live_name: str | None = None,
        total: int | None = None,
        following: Following | None = None,
    ) -> tuple[Job, bool]:
        """Create a transfer; it runs at once. ``live_name`` as in ``start``.

        What is ``following`` is made with it or not at all; ``params.then`` names that job. If
        the transfer is there already, it is made now unless it is there, too.
        """
        job = Job(
            id=job_id or uuid7(),
            kind=kind,
            name=name,
            owner=owner,
            client=client,
            state=states.RUNNING,
            created_at=now_ms(),
            transfer=transfer,
            cursor=cursor,
            params=params or {},
            progress=Progress(total=total, unit="bytes"),
        )
        if following is None:
            return await self._create(job, by, live_name)
        child = await self._follower(job, following)
        job.params["then"] = child.id
        self._reserve(owner)
        created = follows = False
        try:
            job, created = await self._create(job, by, live_name, follower=child)
            if not created and "then" not in job.params:
                child = await self._follower(job, following)
                child, follows = await self._create(child, by, _follower_name(job))
        finally:
            if not (created or follows):
                self._count(owner, -1)
        if follows:
            await self._look_after(child.id)
        return job, created

    async def _follower(self, job: Job, following: Following) -> Job:
        """The row of what follows a transfer. Raises unknown-kind, invalid-field."""
        params = dict(following.params)
        if following.file_field is not None:
            params[following.file_field] = f"job:{job.id}"
        child = self._new(
            following.kind,
            params,
            owner=job.owner,
            client=job.client,
            name=following.name,
            priority=following.priority,
            not_before=following.not_before,
        )
        if following.after:
            child = await self._behind(child, following.after, following.on)
        after = (job.id, *child.after)
        return msgspec.structs.replace(child, after=after, on=following.on, blocked=True)

    async def command(
        self,
        job_id: str,
        verb: str,
        *,
        owner: str,
        by: By,
        if_version: Versions = None,
        force: bool = False,
        key: Key | None = None,
    ) -> tuple[Job, int]:
        """Pause, resume or cancel; the job after it, and 200 (done) or 202 (under way).

        Raises job-unknown, version-mismatch, job-finished, job-cancelling.
        """
        facts = self._facts(by=by, force=force)
        done = await self._step(
            job_id, Input(verb), facts, owner=owner, if_version=if_version, command=True, key=key
        )
        assert done is not None
        return done

    async def change(
        self,
        job_id: str,
        *,
        owner: str,
        by: By,
        name: str | None = None,
        priority: int | None = None,
        limit_bytes_per_s: int | None = UNSET,
        if_version: Versions = None,
        key: Key | None = None,
    ) -> Job:
        """Rename a job, move it in the queue, or limit its transfer; the job after it.

        ``limit_bytes_per_s=None`` ends the limit. What is so already is no change: nothing is
        logged. Raises job-unknown, version-mismatch, invalid-field, and job-finished for anything
        but the name of a job that has ended.
        """
        asked = _asked(name, priority, limit_bytes_per_s)
        while True:
            job = await self.get(job_id, owner)
            _check_version(job, if_version)
            if job.transfer is None and "limit_bytes_per_s" in asked:
                raise SluiceError(
                    "invalid-field", "Only transfers have a limit.", field="limit_bytes_per_s"
                )
            if job.state in states.FINAL and asked.keys() != {"name"}:
                raise SluiceError(
                    "job-finished",
                    f"The job is {job.state}: only its name can be changed.",
                    job=job.id,
                    state=job.state,
                )
            change = {field: new for field, new in asked.items() if new != getattr(job, field)}
            if not change:
                if key is not None:
                    await self._state.spend(key, job.id, job.version)
                return job
            cause = "renamed" if change.keys() == {"name"} else "command"
            try:
                after = states.noted(job, by=by, **change)
                after = await self._commit(job, after, cause, by.actor, key=key)
            except Stale:
                continue
            if "limit_bytes_per_s" in change:
                self._driver(after).tune(after)
            return after

    async def retry(
        self,
        job_id: str,
        *,
        owner: str,
        by: By,
        if_version: Versions = None,
        key: Key | None = None,
    ) -> Job:
        """A new job like one that has ended, from the start. Raises job-live, unknown-kind."""
        job = await self._ended_job(job_id, owner, if_version)
        again, _ = await self.start(
            job.kind,
            job.params,
            owner=owner,
            by=by,
            client=job.client,
            name=job.name,
            priority=job.priority,
            retry_of=job.id,
            key=key,
        )
        return again

    async def delete(
        self,
        job_id: str,
        *,
        owner: str,
        by: By,
        if_version: Versions = None,
        key: Key | None = None,
    ) -> None:
        """Forget a job that has ended, with its history. Its files stay. Raises job-live."""
        job = await self._ended_job(job_id, owner, if_version)
        try:
            await self._delete(job, "deleted", by, key)
        except Stale:  # an ended job moves no more: somebody else has deleted it
            raise _unknown(job_id) from None

    async def _ended_job(self, job_id: str, owner: str, if_version: Versions) -> Job:
        """A job that has ended. Raises job-unknown, version-mismatch, job-live."""
        job = await self.get(job_id, owner)
        _check_version(job, if_version)
        if job.state not in states.FINAL:
            raise SluiceError("job-live", f"The job is {job.state}.", job=job.id)
        return job

    async def used(self, owner: str, key: str) -> Used | None:
        """What was done under an idempotency key."""
        return await self._state.used(owner, key)

    async def spend(self, key: Key, job: str, version: int) -> None:
        """Spend a key on what changes no single job. Raises Spent."""
        await self._state.spend(key, job, version)

    async def get(self, job_id: str, owner: str) -> Job:
        """A job. Raises job-unknown."""
        job = await self._state.get(job_id, owner)
        if job is None:
            raise _unknown(job_id)
        return job

    async def holder(self, owner: str, live_name: str) -> Job | None:
        """The live job that was started under that name, whatever it is called now."""
        return await self._state.holder(owner, live_name)

    async def find(self, filter: Filter, after: int | None, limit: int) -> Page[Job]:
        """Jobs, newest first."""
        return await self._state.find(filter, after, limit)

    async def history(self, job_id: str, owner: str, after: int, limit: int) -> list[Event]:
        """A job's events, oldest first. Raises job-unknown."""
        await self.get(job_id, owner)
        return await self._state.history(job_id, after, limit)

    async def lines(
        self, job_id: str, owner: str, after: int, limit: int
    ) -> list[tuple[int, int, str]]:
        """A job's log lines. Raises job-unknown."""
        await self.get(job_id, owner)
        return await self._state.lines(job_id, after, limit)

    async def counts(self, owner: str | None) -> dict[str, int]:
        """How many jobs are in each state."""
        return await self._state.counts(owner)

    async def tally(self, owner: str | None) -> list[tuple[str, str, int]]:
        """How many jobs there are of each kind in each state."""
        return await self._state.tally(owner)

    def row(self, job: Job) -> dict[str, Any]:
        """A job as clients see it, with its parameters."""
        return self._row(job, self._driver(job).glance(job)) | {"params": job.params}

    async def full_row(self, job: Job) -> dict[str, Any]:
        """``row``, with the place in the queue of a job that waits."""
        row = self.row(job)
        if job.state == states.QUEUED:
            waiting = row["waiting"]
            waiting["position"] = await self._state.ahead(job) + 1
            if self._is_full(job):
                waiting["why"] = "limit"
        return row

    def _is_full(self, job: Job) -> bool:
        """As many of its kind or of its owner run as may."""
        held = self._slots.values()
        most, mine = self._limits_of.get(job.kind), self.limits.owner_slots
        if most is not None and sum(other.kind == job.kind for other in held) >= most:
            return True
        return mine > 0 and sum(other.owner == job.owner for other in held) >= mine

    def grown(self, job: Job, name: str | None) -> Grown | None:
        """A file that the job makes, as far as it has come (see Driver).

        Raises content-gone for a job that has ended without success or will do so, and
        content-unknown.
        """
        if job.state != states.SUCCEEDED and (job.want == "cancel" or job.state in states.FINAL):
            ended = job.state if job.state in states.FINAL else "being cancelled"
            raise SluiceError("content-gone", f"The job is {ended}.", job=job.id, state=job.state)
        return self._driver(job).grown(job, name)

    def listen(self, job_id: str, news: News) -> None:
        """Call ``news`` with each row of the job that is committed, and with None when it grew:

        when more of its files or its log was committed, or it was deleted.

        It is called before anything else runs, and must be short.
        """
        self._news.setdefault(job_id, set()).add(news)

    def unlisten(self, job_id: str, news: News) -> None:
        """End what ``listen`` began."""
        listeners = self._news[job_id]
        listeners.discard(news)
        if not listeners:
            del self._news[job_id]

    def unit(self, kind: str) -> str:
        """What ``done`` counts for a kind."""
        known = self.kinds.get(kind)
        return known.unit if known else "bytes"

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Callers that wait for a job (see ``until``)."""
        return len(self._waits)

    # For drivers

    def use(self, driver: Driver, *kinds: str) -> None:
        """Let ``driver`` move the jobs of these kinds; without kinds, all processes."""
        for kind in kinds or ("",):
            self._drivers[kind] = driver

    async def report(
        self,
        job_id: str,
        input: Input,
        *,
        fence: int | None = None,
        error: SluiceError | None = None,
        files: Sequence[File] = (),
        **facts: Any,
    ) -> Job | None:
        """A driver tells what has happened; the job after it, or None if that came too late."""
        problem = error.problem() if error is not None else None
        try:
            done = await self._step(
                job_id, input, self._facts(error=problem, **facts), fence=fence, files=files
            )
        except Fenced:
            log.warning("job %s: a report of %s came from an old lease", job_id, input.value)
            return None
        return done[0] if done else None

    async def insist(self, job_id: str, input: Input, **facts: Any) -> Job | None:
        """``report`` until it is committed: a job whose end was not written down has no other."""
        while True:
            try:
                return await self.report(job_id, input, **facts)
            except SluiceError as error:
                log.warning("job %s: %s could not be committed: %s", job_id, input.value, error)
            await asyncio.sleep(_AGAIN_S)

    def finish(
        self, job_id: str, fence: int, files: Sequence[File] = (), **facts: Any
    ) -> asyncio.Future[Job | None]:
        """``insist`` on FINISH, whether or not somebody goes on waiting for it.

        Short jobs end by hundreds: those of one turn of the loop are told in one go.
        """
        told: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()
        if not self._finishing:
            self.spawn(self._finish_all())
        self._finishing.append(_Finish(job_id, fence, files, facts, told))
        return told

    async def _finish_all(self) -> None:
        reports, self._finishing = self._finishing[:_BATCH], self._finishing[_BATCH:]
        if self._finishing:
            self.spawn(self._finish_all())
        known = []
        for report in reports:
            job = self._active.get(report.job_id)
            if job is None or job.fence != report.fence:
                self.spawn(self._finish_slowly(report))
            else:
                facts = self._facts(**report.facts)
                step = _Step(job, Input.FINISH, facts, report.fence, report.files)
                known.append((report, step))
        for report, after in await self._step_all(known):
            if after is None:
                self.spawn(self._finish_slowly(report))
            elif not report.told.done():
                report.told.set_result(after)

    async def _finish_slowly(self, report: _Finish) -> None:
        job_id, fence, files, facts, told = report
        try:
            job = await self.insist(job_id, Input.FINISH, fence=fence, files=files, **facts)
        except Exception as error:
            if not told.done():
                told.set_exception(error)
        else:
            if not told.done():
                told.set_result(job)

    async def conclude(self, job_id: str, input: Input, **facts: Any) -> None:
        """``insist``, for a request: it waits for the commit, but not for a disk."""
        await asyncio.wait([self.spawn(self.insist(job_id, input, **facts))], timeout=_CONCLUDE_S)

    async def undone(self, job_id: str, rollback: Rollback) -> None:
        """A rollback has moved on: tell it, and let its deadline begin anew."""
        deadline_at = now_ms() + int(self.limits.warn_s * 1000)
        await self.note(
            job_id, "undone", rollback=rollback, deadline_at=deadline_at, deadline_step=0
        )
        if (job := self._active.get(job_id)) is not None:
            self._alarm(job)

    async def note(self, job_id: str, cause: str, **change: Any) -> None:
        """Log an event that is no transition; ``change`` are fields of the row; ``by`` signs it."""
        while True:
            job = await self._state.get(job_id)
            if job is None or job.state in states.FINAL:
                return
            after = states.noted(job, **change)
            by = change.get("by")
            try:
                await self._commit(job, after, cause, by.actor if by is not None else "service")
            except Stale:
                continue
            return

    async def until(self, job_id: str, done: Callable[[Job], bool], wait_s: float) -> Job | None:
        """The first row of a job that is ``done``, or how it is after ``wait_s``.

        None if there is no such job. Returns early when the service stops. ``done`` must be true of
        a job that has ended, and short. A caller that is cancelled leaves nothing behind.
        """
        reached: asyncio.Future[Job | None] = asyncio.get_running_loop().create_future()

        def news(job: Job | None) -> None:
            if job is not None and not reached.done() and done(job):
                reached.set_result(job)

        self.listen(job_id, news)
        self._waits.add(reached)
        try:
            job = await self._state.get(job_id)
            if job is None or done(job) or not self._open:
                return job
            await asyncio.wait([reached], timeout=wait_s)
            found = reached.result() if reached.done() else None
            return found or await self._state.get(job_id)
        finally:
            self.unlisten(job_id, news)
            self._waits.discard(reached)

    async def ended(self, job_id: str, wait_s: float) -> bool:
        """Wait until the job is final, at most ``wait_s``; whether it is, or is no more."""
        job = await self.until(job_id, lambda job: job.state in states.FINAL, wait_s)
        return job is None or job.state in states.FINAL

    def grew(self, job_id: str) -> None:
        """More of a file that the job makes, or of its log, was committed, or all of it is gone."""
        for news in self._news.get(job_id, ()):
            news(None)

    async def settled(self, job_id: str) -> None:
        """Return when no rollback of the job is under way."""
        while task := self._rollbacks.get(job_id):
            await asyncio.wait([task])

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something in the background, for as long as the manager is open."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    # Life

    async def recover(self) -> list[str]:
        """Put right what an earlier incarnation left; the blobs that are still needed.

        running → queued, pausing → paused, cancelling → undone → cancelled; a transfer that lives
        on its connection has failed. Each with its event. Nothing starts before ``open``, so that
        blobs that nobody needs can be swept in between.
        """
        for owner, n in (await self._state.waiting()).items():
            self._count(owner, n)
        keep: list[str] = []
        after: int | None = None
        while True:
            page = await self._state.find(Filter(live=True), after, _BATCH)
            found = [job for job in page.items if job.incarnation < self._boot.incarnation]
            for blobs in await asyncio.gather(*(self._recover(job) for job in found)):
                keep += blobs
            if page.next is None:
                break
            after = page.next
        await self._catch_up()
        return keep

    async def _catch_up(self) -> None:
        """See after the jobs that wait for one that ended just before the crash."""
        self._chained = self._state.chained()
        after = ""
        while jobs := await self._state.overdue(after, _BATCH):
            await asyncio.gather(*(self._look_after(job) for job in jobs))
            after = jobs[-1]

    def open(self) -> None:
        """Take work, after ``recover``."""
        self._open = True
        self._read_limits()
        self.spawn(self._tick())
        self.spawn(self._retain())
        self._watch_due()
        self._kick()

    def _read_limits(self) -> None:
        """Know the limits of the kinds; say which settings name none of them."""
        names = self.kinds.names()
        for name in names:
            kind = self.kinds.get(name)
            limit = self.limits.kind_limits.get(name, kind.limit if kind is not None else None)
            if limit is not None:
                self._limits_of[name] = limit
        limits = self.limits
        for told in (limits.kind_limits, limits.run_timeouts_s, limits.stall_timeouts_s):
            if unknown := sorted(set(told).difference(names)):
                log.warning("a limit is set for what is no kind here: %s", ", ".join(unknown))

    async def close(self, grace_s: float) -> None:
        """Bring every live job to a checkpoint, at most ``grace_s`` long, and stop."""
        self._open = False
        for reached in self._waits:
            if not reached.done():
                reached.set_result(None)
        drivers = set(self._drivers.values())
        try:
            async with asyncio.timeout(grace_s):
                # What they start must be stopped, too.
                for starter in filter(None, (self._claiming, *self._starters)):
                    await asyncio.wait([starter])
                await asyncio.gather(*(driver.stop() for driver in drivers))
        except TimeoutError:
            log.warning("some jobs reached no checkpoint in %.0f s", grace_s)
        for timer in (*self._alarms.values(), self._due_timer):
            if timer is not None:
                timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # One step of the machine

    async def _step(
        self,
        job_id: str,
        input: Input,
        facts: Facts,
        *,
        owner: str | None = None,
        if_version: Versions = None,
        fence: int | None = None,
        files: Sequence[File] = (),
        command: bool = False,
        key: Key | None = None,
    ) -> tuple[Job, int] | None:
        while True:
            job = await self._state.get(job_id, owner)
            if job is None:
                if command:
                    raise _unknown(job_id)
                return None
            _check_version(job, if_version)
            if fence is not None and job.fence != fence:
                raise Fenced(job_id)
            decision = states.decide(job, input, facts)
            if decision is None:
                return None
            if not decision.changed:
                if key is not None:
                    await self._state.spend(key, job.id, job.version)
                self._act(job, decision.effects)
                return job, decision.status
            after = decision.job
            if input is Input.CRASH:  # what the crashed incarnation may still write is void
                after = msgspec.structs.replace(after, fence=job.fence + 1)
            actor = facts.by.actor if facts.by is not None else "service"
            try:
                after = await self._commit(job, after, decision.cause, actor, fence, files, key)
            except Stale:
                continue
            self._act(after, decision.effects)
            return after, decision.status

    async def _follow(self, job_id: str) -> None:
        """A job has ended: see after those that wait for it."""
        after = ""
        while jobs := await self._state.followers(job_id, after, _BATCH):
            await asyncio.gather(*(self._look_after(job) for job in jobs))
            after = jobs[-1]

    async def _look_after(self, job_id: str) -> None:
        """Let a job go on if nothing that it waits for is left, and end it if it never may."""
        job = await self._state.get(job_id)
        if job is None or not job.blocked:
            return
        parents = await self._state.parents(job_id)
        wrong = {
            parent: state
            for parent, state in parents.items()
            if job.on == "success" and state not in (None, states.SUCCEEDED)
        }
        if wrong:
            parent, state = next(iter(wrong.items()))
            error = SluiceError("parent-failed", f"Job {parent} is {state}.", parent=parent)
            await self.insist(job_id, Input.AFTER, broken=True, error=error)
        elif None not in parents.values():
            await self.insist(job_id, Input.AFTER)

    async def _step_all(self, steps: Sequence[tuple[T, _Step]]) -> list[tuple[T, Job | None]]:
        """Take many steps with one wait for their commits; each job after it.

        None where it takes a closer look: the row has changed meanwhile, or can't be committed
        now. Only for what looks at nothing that moves without a version (cursor, journal).
        """
        decided = [self._decided(step) for _, step in steps]
        try:
            results = await self._state.commit_all([made[0] for made in decided if made])
        except SluiceError as error:
            log.warning("%d steps could not be committed: %s", len(steps), error)
            return [(key, None) for key, _ in steps]
        done: list[tuple[T, Job | None]] = []
        following = iter(results)
        for (key, step), made in zip(steps, decided, strict=True):
            if made is None or isinstance(next(following), BaseException):
                done.append((key, None))
                continue
            commit, decision = made
            self._committed(step.job, commit.job)
            self._act(commit.job, decision.effects)
            done.append((key, commit.job))
        return done

    def _decided(self, step: _Step) -> tuple[Commit, Decision] | None:
        job, input, facts, fence, files = step
        decision = states.decide(job, input, facts)
        if decision is None or not decision.changed:
            return None
        try:
            after, event = self._entry(job, decision.job, decision.cause, "service")
        except Exception:  # a result that is no JSON, say; it must not hurt the others
            return None
        return Commit(after, event, job.version, fence, files), decision

    async def _commit(
        self,
        job: Job,
        after: Job,
        cause: str,
        actor: str,
        fence: int | None = None,
        files: Sequence[File] = (),
        key: Key | None = None,
    ) -> Job:
        after, event = self._entry(job, after, cause, actor)
        await self._state.commit(
            after, event, was_version=job.version, fence=fence, files=files, key=key
        )
        self._committed(job, after)
        return after

    def _committed(self, before: Job, after: Job) -> None:
        if (moved := (after.state in _WAITING) - (before.state in _WAITING)) != 0:
            self._count(after.owner, moved)
        self._remember(after)

    def _entry(self, job: Job, after: Job, cause: str, actor: str) -> tuple[Job, Event]:
        """The row after a change, with the progress it has come to, and its event."""
        glance = self._driver(after).glance(after, finished=after.state == states.SUCCEEDED)
        if glance.progress is not None:
            after = msgspec.structs.replace(after, progress=glance.progress)
        return after, self._event(job.state, after, after.state, cause, actor, glance)

    async def _create(
        self,
        job: Job,
        by: By,
        live_name: str | None,
        key: Key | None = None,
        follower: Job | None = None,
    ) -> tuple[Job, bool]:
        if not self._open:
            raise SluiceError("stopping", retry_after_s=5)
        job, event = self._begun(job, by)
        self._chained |= job.blocked or follower is not None
        second = None
        if follower is not None:
            second = (*self._begun(follower, by), _follower_name(job))
        made, created = await self._state.create(
            job, event, live_name=live_name, key=key, follower=second
        )
        if created:
            self._remember(made)
            if made.state == states.QUEUED:
                self._kick()
            elif made.state == states.SCHEDULED:
                self._watch_due()
        return made, created

    def _begun(self, job: Job, by: By) -> tuple[Job, Event]:
        """A job's first row and event."""
        job = states.created(job, self._facts(by=by))
        glance = self._driver(job).glance(job)
        return job, self._event(None, job, job.state, "created", by.actor, glance)

    async def _delete(
        self, job: Job, cause: str, by: By | None = None, key: Key | None = None
    ) -> None:
        gone = states.noted(job) if by is None else states.noted(job, by=by)
        actor = "service" if by is None else by.actor
        event = self._event(job.state, gone, states.DELETED, cause, actor, Glance(None, None))
        await self._state.delete(job.id, event, was_version=job.version, key=key)
        self.grew(job.id)

    def _event(
        self, before: str | None, after: Job, to: str, cause: str, actor: str, glance: Glance
    ) -> Event:
        """The log's entry of a change, with the row as it is then."""
        return Event(
            job=after.id,
            version=after.version,
            kind=after.kind,
            owner=after.owner,
            at=now_ms(),
            from_=before,
            to=to,
            cause=cause,
            actor=actor,
            row=msgspec.Raw(msgspec.json.encode(self._row(after, glance))),
        )

    def _facts(self, **facts: Any) -> Facts:
        return Facts(
            now=now_ms(),
            warn_ms=int(self.limits.warn_s * 1000),
            grace_ms=int(self.limits.grace_s * 1000),
            **facts,
        )

    def _row(self, job: Job, glance: Glance) -> dict[str, Any]:
        transfer = glance.transfer
        if transfer is None and job.transfer is not None:
            transfer = {
                "received_bytes": job.stored_bytes,
                "stored_bytes": job.stored_bytes,
                "durable_bytes": job.durable_bytes,
                "processed_bytes": job.stored_bytes,
                "connected": False,
                "protocol": job.transfer.protocol,
                "stalled_since": None,
                "warm": False,
                "limit_bytes_per_s": job.limit_bytes_per_s,
            }
        return job_row(job, glance.progress or job.progress, transfer)

    def _driver(self, job: Job) -> Driver:
        return self._drivers.get(job.kind) or self._drivers[""]

    def _remember(self, job: Job) -> None:
        if job.state in states.FINAL or job.state in (states.QUEUED, states.SCHEDULED):
            self._active.pop(job.id, None)
        else:
            self._active[job.id] = job
        self.measures.moved(job)
        for news in self._news.get(job.id, ()):
            news(job)
        if self._chained and job.state in states.FINAL:
            self.spawn(self._follow(job.id))
        if job.deadline_at is None and (alarm := self._alarms.pop(job.id, None)):
            alarm.cancel()

    # Effects

    def _act(self, job: Job, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Effect.SIGNAL:
                    self._signal(job)
                case Effect.START:
                    self._driver(job).start(job)
                case Effect.RELEASE:
                    self._slots.pop(job.id, None)
                    self._kick()
                case Effect.QUEUE:
                    self._kick()
                case Effect.ALARM:
                    self._alarm(job)
                case Effect.ROLLBACK:
                    self._roll_back(job)
                case Effect.DISCARD:
                    self.spawn(self._driver(job).discard(job))
                case Effect.FORCE:
                    self._driver(job).force(job)

    def _signal(self, job: Job) -> None:
        live = self._driver(job).signal(job)
        if not live and job.state in (states.PAUSING, states.CANCELLING):
            self.spawn(self.insist(job.id, Input.UNWOUND))

    def _alarm(self, job: Job) -> None:
        if job.deadline_at is None:
            self._watch_due()
            return
        if earlier := self._alarms.get(job.id):
            earlier.cancel()
        delay_s = max(0.0, (job.deadline_at - now_ms()) / 1000) + 0.002

        def ring() -> None:
            del self._alarms[job.id]
            log.warning("job %s is %s for too long (step %d)", job.id, job.state, job.deadline_step)
            self.spawn(self._deadline(job.id))

        self._alarms[job.id] = asyncio.get_running_loop().call_later(delay_s, ring)

    async def _deadline(self, job_id: str) -> None:
        """Report a deadline; if the clock was set back it is not due yet, so watch on."""
        if await self.insist(job_id, Input.DEADLINE) is None:
            job = await self._state.get(job_id)
            if job is not None and job.deadline_at is not None and job_id not in self._alarms:
                self._alarm(job)

    def _roll_back(self, job: Job) -> None:
        if job.id in self._rollbacks:
            return
        task = self.spawn(self._rollback(job))
        self._rollbacks[job.id] = task
        task.add_done_callback(lambda _: self._rollbacks.pop(job.id, None))

    async def _rollback(self, job: Job) -> None:
        while True:
            try:
                rollback = await self._driver(job).rollback(job)
                await self.report(job.id, Input.UNDONE, rollback=rollback)
                return
            except SluiceError as error:
                log.warning("job %s could not be rolled back: %s", job.id, error)
            await asyncio.sleep(_AGAIN_S)

    # Slots

    def _kick(self) -> None:
        """Look for jobs that can start, now and not twice at once."""
        if self._claiming is not None:
            self._claim_again = True
        elif self._open and self._total_waiting and len(self._slots) < self.limits.slots:
            self._claiming = self.spawn(self._claim())

    async def _claim(self) -> None:
        try:
            while self._open and (free := self.limits.slots - len(self._slots)) > 0:
                self._claim_again = False
                leased = await self._lease(free)
                self._slots.update((job.id, job) for job in leased)
                await self._begin_all(leased)
                if len(leased) < free and not self._claim_again:
                    return
        except SluiceError as error:
            log.warning("no job could be claimed: %s", error)
            asyncio.get_running_loop().call_later(_AGAIN_S, self._kick)
        finally:
            self._claiming = None

    async def _lease(self, free: int) -> list[Job]:
        """Claim as many jobs as the limits allow."""
        names = self.kinds.names()
        if not self._limits_of and not self.limits.owner_slots:
            return await self._state.claim(names, free)
        of_kinds = Counter(job.kind for job in self._slots.values())
        return await self._state.claim(
            names,
            free,
            room={kind: most - of_kinds[kind] for kind, most in self._limits_of.items()},
            owner_slots=self.limits.owner_slots or None,
            busy=Counter(job.owner for job in self._slots.values()),
        )

    async def _begin_all(self, leased: Sequence[Job]) -> None:
        facts = self._facts()
        steps = [(job, _Step(job, Input.CLAIM, facts, job.fence)) for job in leased]
        done = await self._step_all(steps)
        await asyncio.gather(*(self._begin(job) for job, after in done if after is None))

    async def _begin(self, job: Job) -> None:
        """Commit the claim of a leased job; one that was taken back frees its slot."""
        started = await self.insist(job.id, Input.CLAIM, fence=job.fence)
        if started is None:
            self._slots.pop(job.id, None)
            self._claim_again = True

    # Clocks

    def _watch_due(self) -> None:
        if self._due_timer is not None:
            self._due_timer.cancel()
        if self._open:
            self.spawn(self._due())

    async def _due(self) -> None:
        """Queue the scheduled jobs whose time has come; look again when the next one's comes."""
        jobs, following = await self._state.due(now_ms())
        await asyncio.gather(
            *(self.insist(job.id, Input.RETRY_AT if job.attempt > 1 else Input.DUE) for job in jobs)
        )
        if jobs:  # there may be more than one look takes
            self._watch_due()
        elif following is not None:
            delay_s = min(3600.0, max(0.01, (following - now_ms()) / 1000))
            loop = asyncio.get_running_loop()
            if self._due_timer is not None:
                self._due_timer.cancel()
            self._due_timer = loop.call_later(delay_s, self._watch_due)

    async def _tick(self) -> None:
        """Tell progress ten times a second, save it once."""
        tick = 0
        while True:
            await asyncio.sleep(_TICK_S)
            tick += 1
            for driver in set(self._drivers.values()):
                await self._tell_progress(driver.changed())
            if tick % _TICKS_A_SAVE == 0:
                await self._save()

    async def _tell_progress(self, changed: Iterable[tuple[str, Progress]]) -> None:
        """Tell it in slices, between which the loop is the others'."""
        left = iter(changed)
        while some := list(islice(left, _MARKS)):
            await self._state.progress_out(
                [
                    Mark(job.id, job.h, job.version, job.owner, job.kind, job.state, job.name, told)
                    for job_id, told in some
                    if (job := self._active.get(job_id)) is not None
                ]
            )
            if len(some) == _MARKS:
                await asyncio.sleep(0)

    async def _save(self) -> None:
        saves = [driver.save() for driver in set(self._drivers.values())]
        for result in await asyncio.gather(*saves, return_exceptions=True):
            if isinstance(result, Exception):  # the fault of one must not stop the clock of all
                log.error("a driver could not save", exc_info=result)

    async def _retain(self) -> None:
        """Forget jobs that ended long ago, and old keys."""
        while True:
            await asyncio.sleep(_RETENTION_S)
            try:
                await self._forget_keys()
                await self._forget_jobs()
            except SluiceError as error:  # a full disk; the next round tries again
                log.warning("what is old could not be forgotten: %s", error)

    async def _forget_keys(self) -> None:
        while await self._state.forget_keys(now_ms() - KEY_KEPT_MS, _KEYS) == _KEYS:
            pass

    async def _forget_jobs(self) -> None:
        before = now_ms() - int(self.limits.keep_jobs_s * 1000)
        for job in await self._state.ended_before(before, _BATCH):
            try:
                await self._delete(job, "expired")
            except Stale:
                continue

    async def _recover(self, job: Job) -> list[str]:
        blobs = await self._driver(job).recover(job, self._boot.same_boot)
        error = SluiceError("interrupted", "The server stopped during the transfer.")
        if job.transfer is None:
            error = SluiceError("crash-loop")
        after = await self.report(job.id, Input.CRASH, error=error)
        if after is not None and after.state in states.FINAL:
            return []
        if self.kinds.get(job.kind) is None and job.transfer is None:
            log.warning("job %s waits for a kind that is not here: %s", job.id, job.kind)
        return blobs

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)


def _follower_name(job: Job) -> str:
    """The live name of what follows a transfer, so that a repeated request makes no second one."""
    return f"then/{job.id}"


def _unknown(job_id: str) -> SluiceError:
    return SluiceError("job-unknown", f"There is no job with the id {job_id[:64]!r}.")


def _asked(name: str | None, priority: int | None, limit_bytes_per_s: int | None) -> dict[str, Any]:
    """The fields that a change asks for, checked."""
    asked: dict[str, Any] = {}
    if name is not None:
        odd = any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
        if odd or not 1 <= len(name) <= _NAME_CHARS:
            raise SluiceError(
                "invalid-field",
                f"name must be 1 to {_NAME_CHARS} characters, none of them a control character.",
                field="name",
            )
        asked["name"] = name
    if priority is not None:
        if not 0 <= priority <= _PRIORITY:
            raise SluiceError(
                "invalid-field", f"priority must be 0 to {_PRIORITY}.", field="priority"
            )
        asked["priority"] = priority
    if limit_bytes_per_s is not UNSET:
        if limit_bytes_per_s is not None and not _LIMIT_LOW <= limit_bytes_per_s <= _LIMIT_HIGH:
            raise SluiceError(
                "invalid-field",
                f"limit_bytes_per_s must be {_LIMIT_LOW:,} to {_LIMIT_HIGH:,}, or null.",
                field="limit_bytes_per_s",
            )
        asked["limit_bytes_per_s"] = limit_bytes_per_s
    if not asked:
        raise SluiceError(
            "invalid-field", "Say what shall change: name, priority or limit_bytes_per_s."
        )
    return asked


def _check_version(job: Job, if_version: Versions) -> None:
    versions = (if_version,) if isinstance(if_version, int) else if_version
    if versions is not None and job.version not in versions:
        raise SluiceError(
            "version-mismatch", f"The job is at version {job.version}.", version=job.version
        )
