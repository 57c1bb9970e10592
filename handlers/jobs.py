"""``/v1/jobs`` and ``/v1/kinds``: start, list, look, change, command, delete, history.

Whatever changes a job is a ``Command``, given by ``commands.run``; so a key, a version, a list and
a filter mean here what they mean on the channel. What is left to HTTP are its headers: If-Match
(RFC 9110 section 13), Idempotency-Key (draft-ietf-httpapi-idempotency-key-header) and Prefer
(RFC 7240), by which a caller says for how long it will wait for the end of what it has asked for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from errors import SluiceError
from handlers.base import BaseHandler, check_states, check_text
from handlers.fields import preferences, string
from handlers.ranges import tags_of
from jobs import Filter, Job
from jobs.commands import ChangeRequest, Command, StartRequest, Told
from jobs.rows import event_row
from jobs.states import FINAL, PAUSING, QUEUED, SCHEDULED

_VERSION = re.compile(r'"?(0|[1-9][0-9]{0,17})"?')
_KEY = re.compile(r"[ -~]{1,128}")
_FILTERS = ("state", "kind", "owner")
_LONGEST_WAIT_S = 60
_STARTS: Any = StartRequest | list[StartRequest]
_ROWS = 50  # that are made before the loop gets its turn


def _has_ended(job: Job) -> bool:
    return job.state in FINAL


# Whether what was asked for is no longer under way.
_DONE: dict[str, Callable[[Job], bool]] = {
    "start": _has_ended,
    "retry": _has_ended,
    "cancel": _has_ended,
    "pause": lambda job: job.state != PAUSING,
    "resume": lambda job: job.state not in (QUEUED, SCHEDULED),
}


class OrderHandler(BaseHandler):
    """Gives commands, and answers them when the caller wants the answer."""

    async def order(self, op: str, **fields: Any) -> Told:
        """Give a command; what came of it, now or the first time. Raises what it is refused for."""
        versions = if_match(self)
        if versions is not None and fields.get("job") is None:
            raise SluiceError("invalid-field", "A version goes with one job.", field="If-Match")
        told = await self.services.commands.run(
            Command(op=op, key=self._key(), if_v=versions, **fields),
            owner=self.caller.owner,
            client=self.caller.client,
            via="rest",
        )
        if told.replayed:
            self.set_header("Idempotency-Replayed", "true")
        return told

    async def answer(self, op: str, told: Told, *, made: bool = False) -> None:
        """Answer a command to one job as the caller prefers; ``made``: it has made the job.

        At once, or as soon as it is done if the caller will wait for that: 200, or 202 if it is
        still under way after the wait.
        """
        job, done = told.row, _DONE[op]
        if job is None:
            job = await self.services.manager.get(told.outcome.job or "", self.caller.owner)
        prefers = preferences(self.request.headers.get("Prefer"))
        wait_s = _seconds(prefers.get("wait"))
        is_async = prefers.get("respond-async") == ""
        if wait_s is not None:
            job = await self._when(job, done, wait_s)
            status = 200 if done(job) else 202
        elif made:
            status = 202 if is_async else 201
        else:
            status = (200 if done(job) else 202) if told.replayed else told.status
        applied = ["respond-async"] if is_async and status == 202 else []
        if wait_s is not None:
            applied.append(f"wait={wait_s}")
        if applied:
            self.set_header("Preference-Applied", ", ".join(applied))
        self.set_header("Vary", "Prefer")
        if made:
            self.set_header("Location", self.location(f"/v1/jobs/{job.id}"))
        await reply_job(self, job, status)

    async def _when(self, job: Job, done: Callable[[Job], bool], wait_s: int) -> Job:
        """The job as soon as it is done; as it is when the time is over, or the caller has gone."""
        waiting = asyncio.ensure_future(self.services.manager.until(job.id, done, wait_s))

        def gone() -> None:
            waiting.cancel()

        self.gone = gone
        if self.connection.stream.closed():
            gone()
        await asyncio.wait([waiting])
        found = None if waiting.cancelled() else waiting.result()
        return found or job

    def _key(self) -> str | None:
        """The Idempotency-Key. Raises invalid-field."""
        header = self.request.headers.get("Idempotency-Key")
        if header is None:
            return None
        key = string(header)
        if key is None or not _KEY.fullmatch(key):
            raise SluiceError(
                "invalid-field",
                'Idempotency-Key must be a string of 1 to 128 characters in quotes: "8e03978e".',
                field="Idempotency-Key",
            )
        return key


class JobsHandler(OrderHandler):
    """All jobs of the owner."""

    async def get(self) -> None:
        """Newest first; filters may be repeated."""
        filters, values = self._filters()
        limit, after = self.paging(values)
        manager = self.services.manager
        owner = self.caller.owner
        where = _where(owner, filters["owner"], filters["kind"], filters["state"], values.get("q"))
        cursor = self.services.hub.cursor  # before the rows: what happens meanwhile follows it
        page = await manager.find(where, after, limit)
        self.set_header("Cache-Control", "no-store")
        self.reply(
            {
                "items": [manager.row(job) for job in page.items],
                "next": str(page.next) if page.next is not None else None,
                "cursor": str(cursor),
                "counts": await manager.counts(owner),
            }
        )

    def _filters(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        filters, values = self.filters(_FILTERS, "limit", "after", "q")
        if max(len(found) for found in filters.values()) > 20:
            raise SluiceError("invalid-field", "A filter is repeated too often.", field="kind")
        return {name: list(dict.fromkeys(found)) for name, found in filters.items()}, values

    async def post(self) -> None:
        """Start a process; or each of a list, and answer for each."""
        asked: StartRequest | list[StartRequest] = self.json(_STARTS)
        if isinstance(asked, list):
            await self._answer_each(await self.order("start", starts=tuple(asked)))
        else:
            await self.answer("start", await self.order("start", args=asked), made=True)

    async def _answer_each(self, told: Told) -> None:
        """201 if all were started, else 200."""
        rows = []
        for n, item in enumerate(told.items, 1):
            rows.append(msgspec.json.encode(await self._started(item)))
            if n % _ROWS == 0:
                await asyncio.sleep(0)
        outcome = told.outcome
        self.set_status(200 if outcome.failures else 201)
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Type", "application/json")
        self.write(b'{"items":[')
        self.write(b",".join(rows))
        self.write(b'],"n":%d,"failures":%d}\n' % (outcome.n or 0, outcome.failures))

    async def _started(self, item: Job | str | SluiceError) -> dict[str, Any]:
        manager = self.services.manager
        try:
            if isinstance(item, str):
                item = await manager.get(item, self.caller.owner)
        except SluiceError as error:  # it was deleted since
            item = error
        if isinstance(item, SluiceError):
            return {"error": item.problem(self.request_id)}
        return {"job": manager.row(item)}


class JobHandler(OrderHandler):
    """One job."""

    async def get(self, job_id: str) -> None:
        """The job as it is now."""
        job = await self.services.manager.get(job_id, self.caller.owner)
        await reply_job(self, job, 200)

    async def patch(self, job_id: str) -> None:
        """Rename it, move it in the queue, limit its transfer."""
        told = await self.order("change", job=job_id, args=self.json(ChangeRequest))
        job = told.row or await self.services.manager.get(job_id, self.caller.owner)
        await reply_job(self, job, 200)

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended; its files stay."""
        await self.order("delete", job=job_id)
        self.set_status(204)


class CommandHandler(OrderHandler):
    """Pause, resume, cancel, retry."""

    async def post(self, job_id: str, verb: str) -> None:
        """200 when it is done, 202 when it is under way; retry makes a new job (201)."""
        args = {"force": True} if _is_forced(self, verb) else {}
        told = await self.order(verb, job=job_id, args=args)
        await self.answer(verb, told, made=verb == "retry")


class ListFilter(msgspec.Struct, forbid_unknown_fields=True):
    """Which jobs, in the words of the list's query; each of the first three may be several."""

    state: str | list[str] = []
    kind: str | list[str] = []
    owner: str | list[str] = []
    q: str | None = None


class BulkRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a command to many jobs: one of the two."""

    ids: (
        Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=500)]
        | None
    ) = None
    filter: ListFilter | None = None


class BulkHandler(OrderHandler):
    """Pause, resume, cancel, retry or delete many jobs."""

    async def post(self, verb: str) -> None:
        """How many are as was asked for, how many are not, and why; 200 whatever came of it."""
        asked = self.json(BulkRequest)
        if (asked.ids is None) == (asked.filter is None):
            raise SluiceError("invalid-field", "Say which jobs: ids or filter.", field="ids")
        jobs = tuple(asked.ids) if asked.ids is not None else None
        where = None
        if (words := asked.filter) is not None:
            states = _several(words.state)
            check_states(states)
            owners, kinds = _several(words.owner), _several(words.kind)
            where = _where(self.caller.owner, owners, kinds, states, words.q)
        args = {"force": True} if _is_forced(self, verb) else {}
        told = await self.order(verb, jobs=jobs, where=where, args=args)
        outcome = told.outcome
        self.set_header("Cache-Control", "no-store")
        self.reply(
            {
                "n": outcome.n,
                "failures": outcome.failures,
                "failed": [
                    {"job": job, "problem": error.problem(self.request_id)}
                    for job, error in outcome.failed
                ],
            }
        )


class EventsHandler(BaseHandler):
    """The history of one job."""

    async def get(self, job_id: str) -> None:
        """Its transitions, oldest first; ``after`` is a version."""
        limit, after = self.paging(self.query("limit", "after"))
        events = await self.services.manager.history(
            job_id, self.caller.owner, after or 0, limit + 1
        )
        more = len(events) > limit
        events = events[:limit]
        self.set_header("Cache-Control", "no-store")
        self.reply(
            {
                "items": [event_row(event) for event in events],
                "next": str(events[-1].version) if more else None,
            }
        )


class KindsHandler(BaseHandler):
    """What can be started."""

    async def get(self) -> None:
        """Each kind with the JSON Schema of its parameters, and the files that are none."""
        transfers = [
            {"kind": "upload", "title": "A file on its way in", "startable": False},
            {"kind": "download", "title": "A file on its way out", "startable": False},
        ]
        kinds = self.services.manager.kinds
        problems = [problem._asdict() for problem in kinds.problems]
        self.reply({"items": transfers + kinds.describe(), "next": None, "problems": problems})


def _where(
    mine: str, owners: Sequence[str], kinds: Sequence[str], states: Sequence[str], text: str | None
) -> Filter:
    """The jobs of an owner that a list names. Raises invalid-field."""
    text = check_text(text)
    foreign = owners and mine not in owners
    return Filter(
        owner="" if foreign else mine, kinds=tuple(kinds), states=tuple(states), text=text
    )


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(dict.fromkeys(value))


def _is_forced(handler: BaseHandler, verb: str) -> bool:
    """Whether a cancel shall end the grace."""
    return handler.query("force").get("force", "0") in ("1", "true") and verb == "cancel"


def _seconds(value: str | None) -> int | None:
    """For how long a caller will wait, at most as long as we do; None if it says nothing."""
    if value is None or not re.fullmatch("[0-9]{1,18}", value):
        return None
    return min(int(value), _LONGEST_WAIT_S)


async def reply_job(handler: BaseHandler, job: Job, status: int) -> None:
    """Answer with a job; its version is the ETag."""
    handler.set_header("ETag", f'"{job.version}"')
    handler.set_header("Cache-Control", "no-store")
    handler.reply(await handler.services.manager.full_row(job), status)


def if_match(handler: BaseHandler) -> tuple[int, ...] | None:
    """The versions that If-Match allows, by strong comparison; None if it allows any.

    A number without quotes is taken, too. Raises invalid-field for what is no list of tags.
    """
    header = handler.request.headers.get("If-Match", "*").strip()
    if header == "*":
        return None
    tags = [header] if _VERSION.fullmatch(header) else tags_of(header)
    if not tags:
        raise SluiceError(
            "invalid-field",
            "If-Match must be a list of versions in quotes, or *.",
            field="If-Match",
        )
    return tuple(int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag)))
