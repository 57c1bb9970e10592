"""``/v1/jobs`` and ``/v1/kinds``: start, list, look, change, command, delete, history, log."""

from __future__ import annotations

import re

import msgspec
from msgspec import UNSET, UnsetType

from errors import SluiceError
from handlers.base import BaseHandler
from jobs import Filter, Job
from jobs.commands import StartRequest, start
from jobs.rows import event_row, rfc3339

_VERSION = re.compile(r'(?:W/)?"?(\d{1,18})"?')
_FILTERS = ("state", "kind", "owner")
_TEXT_CHARS = 200


class ChangeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a change; what is left out stays."""

    name: str | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    limit_bytes_per_s: int | UnsetType | None = UNSET


class JobsHandler(BaseHandler):
    """All jobs of the owner."""

    async def get(self) -> None:
        """Newest first; filters may be repeated."""
        filters, values = self._filters()
        limit, after = self.paging(values)
        manager = self.services.manager
        owner = self.caller.owner
        foreign = filters["owner"] and owner not in filters["owner"]
        where = Filter(
            owner="" if foreign else owner,
            kinds=tuple(filters["kind"]),
            states=tuple(filters["state"]),
            text=_text(values),
        )
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
        """Start a process."""
        caller = self.caller
        job = await start(
            self.services.manager,
            self.json(StartRequest),
            owner=caller.owner,
            client=caller.client,
            by=caller.by("rest"),
        )
        await reply_job(self, job, 201)


class JobHandler(BaseHandler):
    """One job."""

    async def get(self, job_id: str) -> None:
        """The job as it is now."""
        job = await self.services.manager.get(job_id, self.caller.owner)
        await reply_job(self, job, 200)

    async def patch(self, job_id: str) -> None:
        """Rename it, move it in the queue, limit its transfer."""
        asked = msgspec.structs.asdict(self.json(ChangeRequest))
        job = await self.services.manager.change(
            job_id,
            owner=self.caller.owner,
            by=self.caller.by("rest"),
            if_version=if_match(self),
            **{field: value for field, value in asked.items() if value is not UNSET},
        )
        await reply_job(self, job, 200)

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended; its files stay."""
        await self.services.manager.delete(
            job_id,
            owner=self.caller.owner,
            by=self.caller.by("rest"),
            if_version=if_match(self),
        )
        self.set_status(204)


class CommandHandler(BaseHandler):
    """Pause, resume, cancel, retry."""

    async def post(self, job_id: str, verb: str) -> None:
        """200 when it is done, 202 when it is under way; retry makes a new job (201)."""
        manager, owner, by = self.services.manager, self.caller.owner, self.caller.by("rest")
        values = self.query("force")
        if verb == "retry":
            await reply_job(self, await manager.retry(job_id, owner=owner, by=by), 201)
            return
        force = verb == "cancel" and values.get("force", "0") in ("1", "true")
        job, status = await manager.command(
            job_id, verb, owner=owner, by=by, if_version=if_match(self), force=force
        )
        await reply_job(self, job, status)


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


class LogHandler(BaseHandler):
    """The log lines of one job."""

    async def get(self, job_id: str) -> None:
        """The newest lines, or those ``after`` a number, oldest first."""
        limit, after = self.paging(self.query("limit", "after"))
        lines = await self.services.manager.lines(
            job_id, self.caller.owner, -limit if after is None else after, limit
        )
        self.set_header("Cache-Control", "no-store")
        self.reply(
            {
                "items": [{"n": n, "at": rfc3339(at), "line": line} for n, at, line in lines],
                "next": str(lines[-1][0]) if len(lines) == limit else None,
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


def _text(values: dict[str, str]) -> str | None:
    """What is searched for. Raises invalid-field."""
    text = values.get("q") or None
    if text is not None and len(text) > _TEXT_CHARS:
        raise SluiceError("invalid-field", f"q has at most {_TEXT_CHARS} characters.", field="q")
    return text


async def reply_job(handler: BaseHandler, job: Job, status: int) -> None:
    """Answer with a job; its version is the ETag."""
    handler.set_header("ETag", f'"{job.version}"')
    handler.set_header("Cache-Control", "no-store")
    if status == 201:
        handler.set_header("Location", handler.location(f"/v1/jobs/{job.id}"))
    handler.reply(await handler.services.manager.full_row(job), status)


def if_match(handler: BaseHandler) -> int | None:
    """The version that If-Match names."""
    header = handler.request.headers.get("If-Match")
    if header is None or header.strip() == "*":
        return None
    match = _VERSION.fullmatch(header.strip())
    if match is None:
        raise SluiceError("invalid-field", "If-Match must be one version.", field="If-Match")
    return int(match[1])
