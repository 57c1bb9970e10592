"""What clients tell jobs to do, through whichever door: in order, once, many at a time.

Strategy. A ``Session`` is a connection that stays. It takes commands without waiting and answers
each exactly once, after its commit. A command waits for the earlier ones of its session that touch
the same jobs; one by filter touches all. Every wait is for something that was submitted before, so
nobody waits in a circle. A command that comes alone, as over HTTP, is one call (``Commands.run``).

A command with a key is done once, however often it comes: while the first is in flight, a repeat
waits for its answer; later, the store tells what came of it, in the transaction that changed the
job. Of many jobs each has a key of its own, made of the command's, so that a repeat after a crash
goes on with the rest. Keys are the owner's, and the same through every door.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from errors import SluiceError
from jobs import states
from jobs.files import now_ms
from jobs.kinds import invalid
from jobs.manager import Following, Manager
from storage import By, Filter, Job, Key, Spent, Used

log = logging.getLogger("sluice.jobs")

IN_FLIGHT = 16
STARTS = 1000  # in a list

_JOBS = 500  # in a list
_PAGE = 100  # of a filter
_AT_ONCE = 25  # one commit; more would be no faster, and hold the loop longer
_STARTS_AT_ONCE = 50  # likewise
_FAILED = 100  # that are named


_JobId = Annotated[str, Meta(min_length=1, max_length=64)]


class StartRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What a start says, through whichever door."""

    kind: Annotated[str, Meta(min_length=1, max_length=64)]
    params: dict[str, Any] = {}
    name: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    not_before: datetime | None = None
    after: Annotated[list[_JobId], Meta(max_length=100)] = []
    on: Literal["success", "any"] = "success"

    def not_before_ms(self) -> int | None:
        """``not_before`` in milliseconds since 1970. Raises invalid-field."""
        if self.not_before is None:
            return None
        if self.not_before.tzinfo is None or not 1970 < self.not_before.year < 9999:
            raise SluiceError(
                "invalid-field",
                "not_before needs a time zone, and a year from 1971 to 9998.",
                field="not_before",
            )
        return int(self.not_before.timestamp() * 1000)


async def start(
    manager: Manager,
    asked: StartRequest,
    *,
    owner: str,
    client: str,
    by: By,
    key: Key | None = None,
) -> Job:
    """Start what was asked for; the job. Raises invalid-field, and what Manager.start raises."""
    not_before = asked.not_before_ms()
    job, _ = await manager.start(
        asked.kind,
        manager.parse(asked.kind, asked.params),
        owner=owner,
        client=client,
        by=by,
        name=asked.name,
        priority=asked.priority,
        not_before=not_before,
        after=asked.after,
        on=asked.on,
        key=key,
    )
    return job


_UPLOAD = "job:00000000-0000-7000-8000-000000000000"  # until the upload has an id
_FILE_FIELDS = ("file", "source")


def following(manager: Manager, text: str | bytes) -> Following:
    """What shall follow an upload, as its sender says it: a start, as JSON.

    Where the kind has a parameter ``file`` or ``source`` and neither is given, it will be the
    upload's file. Raises invalid-field, unknown-kind, kind-not-startable.
    """
    try:
        asked = msgspec.json.decode(text, type=StartRequest)
    except msgspec.ValidationError as error:
        raise invalid(error, "then") from error
    except (msgspec.DecodeError, UnicodeError):
        raise SluiceError("invalid-field", "then is no JSON object.", field="then") from None
    kind, params = manager.kinds.get(asked.kind), dict(asked.params)
    known = kind.params.__struct_fields__ if kind is not None else ()
    fields = [name for name in _FILE_FIELDS if name in known]
    field = fields[0] if fields and params.keys().isdisjoint(fields) else None
    if field is not None:
        params[field] = _UPLOAD
    return Following(
        asked.kind,
        manager.parse(asked.kind, params),
        field,
        asked.name,
        asked.priority,
        asked.not_before_ms(),
        asked.after,
        asked.on,
    )


class ChangeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What a change says; what is left out stays."""

    name: str | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    limit_bytes_per_s: int | UnsetType | None = UNSET

    def fields(self) -> dict[str, Any]:
        """What was given."""
        given = msgspec.structs.asdict(self)
        return {field: value for field, value in given.items() if value is not UNSET}


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Force(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False


class _Priority(msgspec.Struct, forbid_unknown_fields=True):
    priority: int


_ARGS: dict[str, type[msgspec.Struct]] = {
    "pause": _Nothing,
    "resume": _Nothing,
    "cancel": _Force,
    "retry": _Nothing,
    "delete": _Nothing,
    "priority": _Priority,
    "change": ChangeRequest,
    "start": StartRequest,
}
_OF_ENDED = ("retry", "delete")


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One order: to ``job``, to each of ``jobs`` (at most 500), or to all that ``where`` takes.

    ``where`` has its owner set. ``key`` makes a repeat harmless for 24 hours. ``if_v`` is the
    version that one job must be at, or several of which it must be at one. ``args``: ``force`` of
    cancel, ``priority``, a ``ChangeRequest``, or a ``StartRequest``, as they are or as plain JSON;
    ``starts`` are many of the last.
    """

    op: str
    job: str | None = None
    jobs: tuple[str, ...] | None = None
    where: Filter | None = None
    key: str | None = None
    if_v: int | tuple[int, ...] | None = None
    args: dict[str, Any] | StartRequest | ChangeRequest = {}
    starts: tuple[StartRequest, ...] | None = None


class Outcome(NamedTuple):
    """What came of a command.

    For one job: it and its version now; the new job of start and retry; no version of one that was
    deleted. For many: ``n`` are as was asked for now, ``failures`` are not, and the first 100 of
    these are named.
    """

    job: str | None
    version: int | None
    n: int | None
    failed: list[tuple[str, SluiceError]]
    failures: int


class Told(NamedTuple):
    """An outcome, and what only those need who tell more than that.

    ``row`` is the one job right after the commit, and ``status`` 202 if what was asked for is still
    under way; both only if it was done now. It was done before if ``replayed``. ``items``: of many
    starts, in their order, the job (its id if it was made before), or why there is none.
    """

    outcome: Outcome
    row: Job | None = None
    status: int = 200
    replayed: bool = False
    items: Sequence[Job | str | SluiceError] = ()


Answer = Callable[[Outcome | SluiceError], None]
_Task = asyncio.Task[Told | SluiceError]


class Commands:
    """The commands of all connections."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self._in_flight: dict[tuple[str, str], tuple[str, _Task]] = {}

    def session(self, owner: str, client: str, via: str) -> Session:
        """One connection; ``via`` is the door's name in the signature of its commands."""
        return Session(self, owner, client, via)

    async def run(self, command: Command, *, owner: str, client: str, via: str) -> Told:
        """Do one command that comes alone, by itself; returns after its commit.

        A caller that is cancelled, or has gone, takes nothing back. Raises what the command is
        refused for; key-in-flight while the first one under the key is not done.
        """
        args = _checked(command)
        key = _key_of(command, args, owner)
        if self.leader(key) is not None:
            raise SluiceError("key-in-flight", retry_after_s=1)
        order = _Order(self.manager, command, args, key, owner, client, via)
        task: _Task = self.manager.spawn(_run([], order))
        if key is not None:
            self.lead(key, task)
        await asyncio.wait([task])
        if task.cancelled():
            raise SluiceError("stopping", retry_after_s=5)
        told = task.result()
        if isinstance(told, SluiceError):
            raise told
        return told

    def leader(self, key: Key | None) -> _Task | None:
        """The same command in flight, of whichever connection. Raises key-reused."""
        found = self._in_flight.get((key.owner, key.key)) if key is not None else None
        if key is None or found is None:
            return None
        _check_print(key, found[0])
        return found[1]

    def lead(self, key: Key, task: _Task) -> None:
        """Let repeats wait for ``task``, until it has ended."""
        place = (key.owner, key.key)
        self._in_flight[place] = (key.fingerprint, task)
        task.add_done_callback(lambda _: self._in_flight.pop(place))


class Session:
    """The commands of one connection. Made by ``Commands.session``."""

    def __init__(self, commands: Commands, owner: str, client: str, via: str) -> None:
        self._commands = commands
        self._manager = commands.manager
        self._owner = owner
        self._client = client
        self._via = via
        self._closed = False
        # What is unanswered, oldest first, with the jobs that it touches; None is all of them.
        self._running: dict[_Task, frozenset[str] | None] = {}

    def submit(self, command: Command, answer: Answer) -> None:
        """Take a command; ``answer`` is called once, after the commit or with the refusal.

        Never waits. A command that is malformed, or the 17th that is unanswered (busy), is
        answered before this returns. After ``stopping`` it may have been obeyed nevertheless: a
        repeat under its key tells.
        """
        if self._closed:
            return
        try:
            if len(self._running) >= IN_FLIGHT:
                raise SluiceError("busy", f"{IN_FLIGHT} commands are unanswered.")
            args = _checked(command)
            key = _key_of(command, args, self._owner)
            leader = self._commands.leader(key)
        except SluiceError as error:
            answer(error)
            return
        touches = _touches(command)
        before = [
            task
            for task, touched in self._running.items()
            if touches is None or touched is None or not touches.isdisjoint(touched)
        ]
        if leader is not None:
            task = self._manager.spawn(_follow(before, leader))
        else:
            order = _Order(self._manager, command, args, key, self._owner, self._client, self._via)
            task = self._manager.spawn(_run(before, order))
            if key is not None:
                self._commands.lead(key, task)
        self._running[task] = touches
        task.add_done_callback(lambda task: self._answer(task, answer))

    def close(self) -> None:
        """Take nothing more and answer nothing more; what was submitted runs to its end."""
        self._closed = True

    def _answer(self, task: _Task, answer: Answer) -> None:
        del self._running[task]
        if self._closed:
            return
        told = SluiceError("stopping") if task.cancelled() else task.result()
        answer(told if isinstance(told, SluiceError) else told.outcome)


async def _follow(before: Sequence[_Task], leader: _Task) -> Told | SluiceError:
    await asyncio.wait([*before, leader])
    return leader.result()


async def _run(before: Sequence[_Task], order: _Order) -> Told | SluiceError:
    if before:
        await asyncio.wait(before)
    try:
        return await order.run()
    except Exception as error:
        return order.refusal(error)


class _Record(msgspec.Struct, array_like=True):
    """What is kept of the outcome for many jobs, beside ``n``."""

    failures: int
    failed: list[tuple[str, str, str]]  # job, code, detail


class _Started(msgspec.Struct, array_like=True):
    """What is kept of the outcome of many starts: each job, or code, detail and field."""

    items: list[str | tuple[str, str, str | None]]


class _Order:
    """The execution of one command."""

    def __init__(
        self,
        manager: Manager,
        command: Command,
        args: msgspec.Struct,
        key: Key | None,
        owner: str,
        client: str,
        via: str,
    ) -> None:
        self._manager = manager
        self._command = command
        self._args = args
        self._key = key
        self._owner = owner
        self._client = client
        self._via = via
        self._n = 0
        self._failures = 0
        self._failed: list[tuple[str, SluiceError]] = []
        self._is_whole = True  # nothing is left that a repeat could do

    async def run(self) -> Told:
        """Do it, or tell what came of it when it was done."""
        command = self._command
        if command.starts is not None:
            return await self._start_each(command.starts)
        if command.jobs is None and command.where is None:
            return await self._one(command.job or "", self._args, self._key)
        return await self._many()

    def refusal(self, error: Exception) -> SluiceError:
        """The error as it is answered; a fault of ours is logged."""
        if isinstance(error, SluiceError) and error.code != "internal":
            return error
        log.error("the command %s has failed", self._command.op, exc_info=error)
        return SluiceError("internal")

    # One job

    async def _one(self, job_id: str, args: msgspec.Struct, key: Key | None) -> Told:
        used = await self._used(key)
        if used is None:
            try:
                job, status = await self._act(job_id, args, key)
            except Spent as spent:
                used = spent.used
            else:
                if job is None:
                    return Told(Outcome(job_id, None, None, [], 0))
                return Told(Outcome(job.id, job.version, None, [], 0), job, status)
        assert key is not None
        _check_print(key, used.fingerprint)
        version = None if self._command.op == "delete" else used.version
        return Told(Outcome(used.job, version, None, [], 0), replayed=True)

    async def _act(
        self, job_id: str, args: msgspec.Struct, key: Key | None
    ) -> tuple[Job | None, int]:
        """The job after it (none after a delete), and 202 if it is under way."""
        manager, owner, if_version = self._manager, self._owner, self._command.if_v
        by = By(actor=self._client or owner, via=self._via, at=now_ms())
        op = self._command.op
        match args:
            case StartRequest():
                job = await start(manager, args, owner=owner, client=self._client, by=by, key=key)
            case ChangeRequest() | _Priority():
                change = args.fields() if isinstance(args, ChangeRequest) else {}
                if isinstance(args, _Priority):
                    change = {"priority": args.priority}
                job = await manager.change(
                    job_id, owner=owner, by=by, if_version=if_version, key=key, **change
                )
            case _Force(force=force):
                return await manager.command(
                    job_id, op, owner=owner, by=by, if_version=if_version, force=force, key=key
                )
            case _ if op == "retry":
                job = await manager.retry(
                    job_id, owner=owner, by=by, if_version=if_version, key=key
                )
            case _ if op == "delete":
                await manager.delete(job_id, owner=owner, by=by, if_version=if_version, key=key)
                return None, 200
            case _:
                return await manager.command(
                    job_id, op, owner=owner, by=by, if_version=if_version, key=key
                )
        return job, 200

    async def _used(self, key: Key | None) -> Used | None:
        return await self._manager.used(key.owner, key.key) if key is not None else None

    # Many jobs

    async def _many(self) -> Told:
        used = await self._used(self._key)
        if used is None:
            if self._command.jobs is not None:
                await self._each(list(dict.fromkeys(self._command.jobs)))
            elif self._command.where is not None:
                await self._matching(_narrowed(self._command.op, self._command.where))
            if self._key is not None and self._is_whole:
                failed = [(job, error.code, error.detail) for job, error in self._failed]
                record = msgspec.json.encode(_Record(self._failures, failed)).decode()
                await self._manager.spend(self._key, record, self._n)
            return Told(Outcome(None, None, self._n, self._failed, self._failures))
        assert self._key is not None
        _check_print(self._key, used.fingerprint)
        kept = msgspec.json.decode(used.job, type=_Record)
        named = [(job, SluiceError(code, detail)) for job, code, detail in kept.failed]
        return Told(Outcome(None, None, used.version, named, kept.failures), replayed=True)

    async def _matching(self, where: Filter) -> None:
        """Each job that matches, newest first: what is made meanwhile comes before the pages."""
        after = await self._begin(where)
        while True:
            page = await self._manager.find(where, after, _PAGE)
            await self._each([job.id for job in page.items])
            if page.next is None:
                return
            after = page.next

    async def _begin(self, where: Filter) -> int | None:
        """The number below which the pages begin; a repeat after a crash begins at the same."""
        key = self._key_for("")
        if key is None:
            return None
        used = await self._used(key)
        if used is not None:
            _check_print(key, used.fingerprint)
            return used.version + 1
        newest = (await self._manager.find(where, None, 1)).items
        h = newest[0].h if newest else 0
        await self._manager.spend(key, "", h)
        return h + 1

    async def _each(self, jobs: list[str]) -> None:
        for at in range(0, len(jobs), _AT_ONCE):
            some = jobs[at : at + _AT_ONCE]
            errors = await asyncio.gather(*(self._try(job) for job in some))
            for job, error in zip(some, errors, strict=True):
                if error is None:
                    self._n += 1
                    continue
                self._failures += 1
                self._is_whole = self._is_whole and not error.entry.retry
                if len(self._failed) < _FAILED:
                    self._failed.append((job, error))
            await asyncio.sleep(0)  # the others' turn, also if all are refused without a wait

    async def _try(self, job_id: str) -> SluiceError | None:
        try:
            await self._one(job_id, self._args, self._key_for(job_id))
        except Exception as error:
            return self.refusal(error)
        return None

    # Many starts

    async def _start_each(self, starts: Sequence[StartRequest]) -> Told:
        """Start each, some in a commit; those of a repeat that were started before stay as one."""
        used = await self._used(self._key)
        if used is not None:
            assert self._key is not None
            _check_print(self._key, used.fingerprint)
            kept = msgspec.json.decode(used.job, type=_Started)
            return self._told_starts([_item(item) for item in kept.items], replayed=True)
        items: list[Job | str | SluiceError] = []
        for at in range(0, len(starts), _STARTS_AT_ONCE):
            some = starts[at : at + _STARTS_AT_ONCE]
            items += await asyncio.gather(
                *(self._try_start(asked, at + i) for i, asked in enumerate(some))
            )
            await asyncio.sleep(0)
        errors = [item for item in items if isinstance(item, SluiceError)]
        if self._key is not None and not any(error.entry.retry for error in errors):
            record = msgspec.json.encode(_Started([_kept(item) for item in items])).decode()
            await self._manager.spend(self._key, record, len(items) - len(errors))
        return self._told_starts(items)

    async def _try_start(self, asked: StartRequest, at: int) -> Job | str | SluiceError:
        try:
            told = await self._one("", asked, self._key_for(str(at)))
        except Exception as error:
            return self.refusal(error)
        return told.row or told.outcome.job or ""

    def _told_starts(
        self, items: Sequence[Job | str | SluiceError], *, replayed: bool = False
    ) -> Told:
        failures = sum(isinstance(item, SluiceError) for item in items)
        outcome = Outcome(None, None, len(items) - failures, [], failures)
        return Told(outcome, replayed=replayed, items=items)

    def _key_for(self, job_id: str) -> Key | None:
        key = self._key
        # No client's own key has a line break in it.
        return key._replace(key=f"{key.key}\n{job_id}") if key is not None else None


def _checked(command: Command) -> msgspec.Struct:
    """The arguments, if the command makes sense. Raises invalid-field."""
    op = command.op
    if op not in _ARGS:
        raise SluiceError("invalid-field", f"{op[:40]!r} is no command.", field="op")
    if command.starts is not None:
        if not 1 <= len(command.starts) <= STARTS:
            raise SluiceError("invalid-field", f"A list has 1 to {STARTS:,} starts.")
        return _Nothing()
    _check_target(command)
    if isinstance(command.args, _ARGS[op]):
        return command.args
    try:
        return msgspec.convert(command.args, _ARGS[op])
    except msgspec.ValidationError as error:
        raise invalid(error) from error


def _check_target(command: Command) -> None:
    """Raise invalid-field if it is not clear which jobs are meant."""
    op = command.op
    wheres = {"job": command.job, "jobs": command.jobs, "f": command.where}
    given = [field for field, value in wheres.items() if value is not None]
    if op == "start" and given:
        raise SluiceError("invalid-field", "A start names no job.", field=given[0])
    if op != "start" and not given:
        raise SluiceError("invalid-field", f"Say which job to {op}.", field="job")
    if len(given) > 1:
        raise SluiceError("invalid-field", "Name one job, a list or a filter.", field=given[1])
    if command.if_v is not None and command.job is None:
        raise SluiceError("invalid-field", "A version goes with one job.", field="if_v")
    if command.jobs is not None and not 1 <= len(command.jobs) <= _JOBS:
        raise SluiceError("invalid-field", f"A list has 1 to {_JOBS} jobs.", field="jobs")


def _key_of(command: Command, args: msgspec.Struct, owner: str) -> Key | None:
    """The key, and a print of all that the command means, whichever words it was said in."""
    if command.key is None:
        return None
    meant = msgspec.structs.replace(command, key=None, args={}), args
    said = msgspec.json.encode(meant, order="deterministic")
    return Key(owner, command.key, hashlib.blake2b(said, digest_size=16).hexdigest())


def _kept(item: Job | str | SluiceError) -> str | tuple[str, str, str | None]:
    """One of many starts, as it is stored."""
    if isinstance(item, SluiceError):
        return item.code, item.detail, item.field
    return item if isinstance(item, str) else item.id


def _item(kept: str | tuple[str, str, str | None]) -> str | SluiceError:
    """What was stored of one of many starts."""
    return kept if isinstance(kept, str) else SluiceError(kept[0], kept[1], field=kept[2])


def _check_print(key: Key, fingerprint: str) -> None:
    if key.fingerprint != fingerprint:
        raise SluiceError("key-reused", f"The key {key.key[:128]!r} was another command's.")


def _touches(command: Command) -> frozenset[str] | None:
    """The jobs whose other commands must not overtake this one; None: all jobs."""
    if command.where is not None:
        return None
    return frozenset(command.jobs or ([command.job] if command.job is not None else []))


def _narrowed(op: str, where: Filter) -> Filter:
    """The filter, without the jobs to which the command can mean nothing."""
    if where.states:
        return where
    if op in _OF_ENDED:
        return msgspec.structs.replace(where, states=tuple(sorted(states.FINAL)))
    return msgspec.structs.replace(where, live=True)
