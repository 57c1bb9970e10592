"""``/asyncapi.json``: the live channel for machines, as AsyncAPI 3.0.

Made from the types in ``handlers/messages.py``, so that it says what the code says: their
docstrings are its descriptions, and the tests hold every frame that they receive against it. How
to miss nothing is in docs/channel.md.

Schemas are of JSON Schema draft 7, which is what AsyncAPI means when it is told nothing else.
Objects that the server sends are open: a client ignores what it does not know.
"""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from handlers import messages as m
from handlers.base import BaseHandler
from jobs.channel import Why


class EventRow(msgspec.Struct, kw_only=True):
    """A transition, as a poll and ``GET /v1/jobs/{id}/events`` show it."""

    seq: m.Seq
    job: str
    version: int
    kind: str
    owner: str
    at: m.Time
    from_: str | None = msgspec.field(name="from")
    to: str
    cause: str
    actor: str
    via: Annotated[str, Meta(description="the door it was asked for through; else system")]
    row: m.Row


class Polled(msgspec.Struct, kw_only=True):
    """The answer to a poll; ``cursor`` is the next ``after``. If reset, list the jobs anew."""

    events: list[EventRow]
    cursor: str
    reset: Why | None


class EventsQuery(msgspec.Struct, kw_only=True):
    """What may be asked of ``/v1/events``; ``kind``, ``state`` and ``job`` may be repeated."""

    kind: list[str] = []
    state: list[str] = []
    job: list[str] = []
    owner: str | None = None
    q: str | None = None
    after: str | None = None
    rate: float | None = None
    wait: float | None = None
    limit: int | None = None


# One of each, as it travels; the tests hold them against the schemas.
_AT = '"at":"2026-11-21T20:31:00.123Z"'
_ROW = """{"id":"019351aa-1f0c-7000-8000-3b5a1c0d9e2f","h":7,"kind":"count","name":"nightly",
"owner":"local","client":"127.0.0.1","state":"queued","want":"run","reason":null,"version":1,
"attempt":1,"priority":0,"created_at":"2026-11-21T20:31:00.123Z","started_at":null,"ended_at":null,
"not_before":null,"deadline_at":null,"expires_at":null,"retry_of":null,"after":[],"by":null,
"waiting":{"why":"slot","position":null},"progress":{"done":0,"total":null,"unit":"steps",
"rate_per_s":null,"eta_s":null,"phase":null,"message":null},"transfer":null,"rollback":null,
"result":null,"artifacts":[],"error":null}"""
_EXAMPLES: dict[type[msgspec.Struct], str] = {
    m.Hello: '{"t":"hello","ver":1,"cid":"tab-1","feat":["now"]}',
    m.Sub: '{"t":"sub","id":1,"f":{"kind":["count"]},"epoch":"0193f0a2b1c4","s":1041}',
    m.Unsub: '{"t":"unsub","id":1}',
    m.More: '{"t":"more","id":1,"cursor":50}',
    m.Cmd: '{"t":"cmd","id":"a1","op":"pause","job":"019351aa-1f0c-7000-8000-3b5a1c0d9e2f"}',
    m.Set: '{"t":"set","vis":"hidden"}',
    m.Beat: '{"t":"hb","s":1042}',
    m.Welcome: """{"t":"welcome","conn":"019351aa-2b11-7000-8000-51c0ffee0001",
"epoch":"0193f0a2b1c4","s":1042,"hb":15.0,"now":1795552260123,"feat":["now","counts"],"ver":1,
"limits":{"subs":32,"in_flight":16,"message_bytes":65536}}""",
    m.Snap: f"""{{"t":"snap","id":1,"epoch":"0193f0a2b1c4","s":1041,"page":1,"last":true,
"cursor":null,"jobs":[{_ROW}],"counts":{{"queued":1,"succeeded":41}}}}""",
    m.Ev: f"""{{"t":"ev","id":1,"s":1042,"p":1041,"from":null,"to":"queued","cause":"created",
"actor":"127.0.0.1",{_AT},"row":{_ROW}}}""",
    m.Mark: '{"t":"mark","id":1,"s":1050,"p":1042}',
    m.P: '{"t":"p","u":[[7,2,300,51.5,[12.0,15.5],1000,null,null]],"now":1795552260123}',
    m.CountsMessage: '{"t":"counts","id":1,"s":1042,"n":{"queued":1,"succeeded":41}}',
    m.Now: """{"t":"now","in_bytes_per_s":0,"out_bytes_per_s":0,"running":1,"slots":8,
"running_by_kind":{"checksum":1,"upload":2},"queued":0,"subscribers":3,"children":1,
"free_bytes":1099511627776,"disk_bytes":2199023255552,"loop_lag_ms":0.4,"files":3,"stored_bytes":1048576}""",
    m.LogMessage: f"""{{"t":"log","id":2,"j":"019351aa-1f0c-7000-8000-3b5a1c0d9e2f","from":1,
"lines":[{{"n":1,{_AT},"line":"half way"}}]}}""",
    m.Reset: '{"t":"reset","id":1,"why":"retention","epoch":"0193f0a2b1c4"}',
    m.Subscribed: '{"t":"ack","id":1,"s":1041,"resumed":true}',
    m.Done: '{"t":"ack","id":"a1","job":"019351aa-1f0c-7000-8000-3b5a1c0d9e2f","v":3}',
    m.Err: """{"t":"err","id":"a1","code":"job-unknown","msg":"There is no such job.",
"retry":false,"after_ms":null,"next":"GET /v1/jobs lists the jobs.","field":null}""",
    m.Hb: '{"t":"hb","s":1042,"now":1795552260123}',
    m.Bye: '{"t":"bye","why":"restart","retry_ms":250,"final":false}',
    Polled: f"""{{"events":[{{"seq":1042,"job":"019351aa-1f0c-7000-8000-3b5a1c0d9e2f","version":1,
"kind":"count","owner":"local",{_AT},"from":null,"to":"queued","cause":"created","actor":"127.0.0.1",
"via":"rest","row":{_ROW}}}],"cursor":"0193f0a2b1c4:1042","reset":null}}""",
}


def _draft7(schema: Any) -> Any:
    """A schema of msgspec in the words of draft 7, its texts in Markdown."""
    if isinstance(schema, list | tuple):
        return [_draft7(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:  # nothing beside it counts
        return {"$ref": schema["$ref"]}
    told = {name: _draft7(value) for name, value in schema.items()}
    if "prefixItems" in told:
        told |= {"items": told.pop("prefixItems"), "additionalItems": False}
    if isinstance(told.get("enum"), list) and len(told["enum"]) == 1:
        (told["const"],) = told.pop("enum")
    if isinstance(told.get("description"), str):
        told["description"] = told["description"].replace("``", "`")
    return told


def _message(of: type[msgspec.Struct]) -> dict[str, Any]:
    text = (inspect.getdoc(of) or "").replace("``", "`")
    tag = of.__struct_config__.tag
    return {
        "name": str(tag or of.__name__.lower()),
        "title": of.__name__,
        "summary": text,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{of.__name__}"},
        "examples": [{"payload": msgspec.json.decode(_EXAMPLES[of])}],
    }


def _refs(types: tuple[type, ...], where: str) -> dict[str, dict[str, str]]:
    return {of.__name__: {"$ref": f"#/{where}/messages/{of.__name__}"} for of in types}


def _operation(
    action: str, channel: str, types: tuple[type, ...], summary: str, **more: Any
) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": list(_refs(types, f"channels/{channel}").values()),
        **more,
    }


# Over SSE nothing is asked for after the request, so nothing is answered and no log is followed.
_STREAMED = (m.Subscribed, m.Reset, m.Snap, m.Ev, m.Mark, m.P, m.CountsMessage, m.Hb, m.Bye)

_LIVE = f"""\
A frame is one message or an array of them, in both directions; of a client's at most 100 messages
and 64 KiB. With the subprotocol `{m.PROTOCOL}` say hello within five seconds; without one the
server subscribes you to everything, read-only. Ignore members and messages that you do not know."""

_EVENTS = """\
The same events behind the same cursor, by HTTP: server-sent events if the request accepts
`text/event-stream`, each with one message as its data, else one answer with what follows `after`.
The id of an event, and the cursor of an answer, is `<epoch>:<s>`; go on with it in `Last-Event-ID`
or `after`."""


@functools.cache
def document() -> dict[str, Any]:
    """The AsyncAPI 3.0 document."""
    types = (*m.SAID, *m.HEARD, Polled)
    _, schemas = msgspec.json.schema_components(
        (*types, EventsQuery), ref_template="#/components/schemas/{name}"
    )
    query = {
        "method": "GET",
        "query": {"$ref": "#/components/schemas/EventsQuery"},
        "bindingVersion": "0.3.0",
    }
    protocols = {
        "type": "object",
        "properties": {"Sec-WebSocket-Protocol": {"type": "string", "const": m.PROTOCOL}},
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Sluice: the live channel",
            "version": f"{m.VERSION}.0.0",
            "description": "Every transition of every job, its latest progress, and commands.",
        },
        "defaultContentType": "application/json",
        "channels": {
            "live": {
                "address": "/v1/ws",
                "title": "WebSocket",
                "description": _LIVE,
                "messages": _refs((*m.SAID, *m.HEARD), "components"),
                "bindings": {
                    "ws": {"method": "GET", "headers": protocols, "bindingVersion": "0.1.0"}
                },
            },
            "events": {
                "address": "/v1/events",
                "title": "Server-sent events and long-poll",
                "description": _EVENTS,
                "messages": _refs((*_STREAMED, Polled), "components"),
            },
        },
        "operations": {
            "say": _operation("send", "live", m.SAID, "What the server says"),
            "hear": _operation("receive", "live", m.HEARD, "What clients say"),
            "stream": _operation(
                "send", "events", _STREAMED, "Server-sent events", bindings={"http": query}
            ),
            "poll": _operation(
                "send", "events", (Polled,), "The answer to a poll", bindings={"http": query}
            ),
        },
        "components": {
            "messages": {of.__name__: _message(of) for of in types},
            "schemas": _draft7(schemas),
        },
    }


class AsyncApiHandler(BaseHandler):
    """What the channel says and hears, for machines."""

    OPEN = True

    async def get(self) -> None:
        """The AsyncAPI document."""
        self.set_header("Cache-Control", "no-cache")
        self.reply(document())
