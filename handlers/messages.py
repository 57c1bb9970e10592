"""Every message of ``jobs.v1``, as a type.

Strategy. What clients say is decoded into these types; what the server says is described by them,
and the AsyncAPI document is made from all (``handlers/asyncapi.py``). The rare messages are encoded
from here as well; ``ev``, ``p``, ``mark`` and ``snap`` are built in ``jobs/channel.py``, by hand,
because they are what there are many of. The tests hold each frame against the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from errors import SluiceError
from jobs.channel import Select, Why

PROTOCOL = "jobs.v1.json"
VERSION = 1

SubId = Annotated[int, Meta(ge=1, le=1 << 31, description="a subscription, numbered by the client")]
CommandId = int | Annotated[str, Meta(max_length=128)]
Seq = Annotated[int, Meta(ge=0, description="a place in the event log")]
Time = Annotated[str, Meta(description="RFC 3339, UTC, with milliseconds")]
Millis = Annotated[int, Meta(description="milliseconds since 1970 by the server's clock")]

# What clients say


class Hello(msgspec.Struct, tag_field="t", tag="hello"):
    """The first message of a client, within five seconds."""

    ver: int = VERSION
    cid: Annotated[
        str, Meta(max_length=64, description="names the tab; a newer one replaces an older")
    ] = ""
    feat: Annotated[
        tuple[str, ...],
        Meta(max_length=16, description='"now" asks for the numbers of the service'),
    ] = ()
    hb: float | None = None
    vis: Literal["visible", "hidden"] = "visible"


class Sub(msgspec.Struct, tag_field="t", tag="sub"):
    """Subscribe, or resume after ``s`` of ``epoch``; with ``log``, follow a job's log lines."""

    id: SubId
    f: Select = Select()
    epoch: Annotated[str, Meta(max_length=64)] | None = None
    s: Annotated[int, Meta(ge=0, lt=1 << 62)] | None = None
    rate: (
        Annotated[float, Meta(description="progress frames a second, for the connection")] | None
    ) = None
    page: Annotated[int, Meta(ge=1, le=500, description="rows on a page of the snapshot")] = 50
    log: Annotated[str, Meta(max_length=64, description="a job's id")] | None = None
    from_: (
        Annotated[
            int,
            Meta(
                gt=-1 << 62,
                lt=1 << 62,
                description="the last log line that is known, or -n for the newest n (-1000)",
            ),
        ]
        | None
    ) = msgspec.field(default=None, name="from")


class Unsub(msgspec.Struct, tag_field="t", tag="unsub"):
    """End a subscription."""

    id: SubId


class More(msgspec.Struct, tag_field="t", tag="more"):
    """Ask for the next page of a snapshot."""

    id: SubId
    cursor: Annotated[int, Meta(ge=0, lt=1 << 62)]


class Cmd(msgspec.Struct, tag_field="t", tag="cmd"):
    """A command to one job, to a list, or to all that a filter takes; one ack or err answers it."""

    id: CommandId
    op: Annotated[str, Meta(max_length=40)]
    job: Annotated[str, Meta(max_length=64)] | None = None
    jobs: (
        Annotated[
            tuple[Annotated[str, Meta(max_length=64)], ...], Meta(min_length=1, max_length=500)
        ]
        | None
    ) = None
    f: Select | None = None
    key: (
        Annotated[
            str,
            Meta(
                pattern="^[!-~]{1,128}$",
                description="the same command under the same key is done once",
            ),
        ]
        | None
    ) = None
    if_v: (
        Annotated[
            int, Meta(ge=0, lt=1 << 62, description="refused if the job is at another version")
        ]
        | None
    ) = None
    args: dict[str, Any] = {}


class Set(msgspec.Struct, tag_field="t", tag="set"):
    """What the client shows now."""

    vis: Literal["visible", "hidden"] | None = None
    rate: float | None = None


class Beat(msgspec.Struct, tag_field="t", tag="hb"):
    """A sign of life: the place that was applied, and what the client has measured."""

    s: int | None = None
    lag: float | None = None
    rtt: float | None = None


Message = Hello | Sub | Unsub | More | Cmd | Set | Beat

# What the server says

Counts = Annotated[dict[str, int], Meta(description="how many of the owner's jobs are in a state")]


class ByRow(msgspec.Struct, kw_only=True):
    """Who gave the last command."""

    actor: str
    via: str
    at: Time


class WaitingRow(msgspec.Struct, kw_only=True):
    """Why a job does not run yet."""

    why: Literal["slot", "limit", "after", "time", "backoff"]
    position: int | None


class ProgressRow(msgspec.Struct, kw_only=True):
    """How far a job is."""

    done: int
    total: int | None
    unit: str
    rate_per_s: float | None
    eta_s: tuple[float, float] | None
    phase: str | None
    message: str | None


class TransferRow(msgspec.Struct, kw_only=True):
    """What an upload or a download is doing."""

    received_bytes: int
    stored_bytes: int
    durable_bytes: int
    processed_bytes: int
    connected: bool
    protocol: str
    stalled_since: Time | None
    warm: bool
    limit_bytes_per_s: int | None


class RollbackRow(msgspec.Struct, kw_only=True):
    """How far a job has been undone."""

    done: int
    total: int
    failed: int


class ResultRow(msgspec.Struct, kw_only=True):
    """What a job has made."""

    file: str | None
    data: dict[str, Any]


class ArtifactRow(msgspec.Struct, kw_only=True):
    """A file beside the result."""

    name: str
    file: str
    bytes: int
    media_type: str
    digest: dict[str, str]


class Row(msgspec.Struct, kw_only=True):
    """A job, as ``GET /v1/jobs/{id}`` shows it, without its parameters."""

    id: str
    h: Annotated[int, Meta(description="the job's number; progress comes under it")]
    kind: str
    name: str
    owner: str
    client: str
    state: str
    want: str
    reason: str | None
    version: Annotated[int, Meta(description="one more with each event of the job")]
    attempt: int
    priority: int
    created_at: Time
    started_at: Time | None
    ended_at: Time | None
    not_before: Time | None
    deadline_at: Time | None
    expires_at: Time | None
    retry_of: str | None
    after: list[str]
    by: ByRow | None
    waiting: WaitingRow | None
    progress: ProgressRow
    transfer: TransferRow | None
    rollback: RollbackRow | None
    result: ResultRow | None
    artifacts: list[ArtifactRow]
    error: dict[str, Any] | None


class Limits(msgspec.Struct, kw_only=True):
    """What a client may ask of one connection."""

    subs: int
    in_flight: int
    message_bytes: int


class Welcome(msgspec.Struct, tag_field="t", tag="welcome", kw_only=True):
    """Answers hello."""

    conn: str
    epoch: str
    s: Seq
    hb: Annotated[float, Meta(description="seconds of silence after which a heartbeat comes")]
    now: Millis
    limits: Limits
    feat: tuple[str, ...]
    ver: int


class Snap(msgspec.Struct, tag_field="t", tag="snap", kw_only=True):
    """A page of rows as they are at ``s`` or later; after the last, rows not listed are gone."""

    id: SubId
    epoch: str
    s: Seq
    page: int
    last: bool
    cursor: Annotated[int | None, Meta(description="for more; null on the last page")]
    jobs: list[Row]
    counts: Counts


class Ev(msgspec.Struct, tag_field="t", tag="ev", kw_only=True):
    """One transition, with the whole row after it."""

    id: SubId
    s: Seq
    p: Annotated[int, Meta(description="the s of the ev, mark, ack or snap before it")]
    from_: str | None = msgspec.field(name="from")
    to: str
    cause: str
    actor: str
    at: Time
    row: Row
    out: Annotated[bool, Meta(description="the row does not belong to the filter any more")] = False


class Mark(msgspec.Struct, tag_field="t", tag="mark", kw_only=True):
    """Nothing else for this subscription up to ``s``."""

    id: SubId
    s: Seq
    p: int


class P(msgspec.Struct, tag_field="t", tag="p", kw_only=True):
    """Latest progress of many jobs: [h, version, done, rate, eta, total, phase, message] each."""

    u: list[
        tuple[
            int,
            int,
            int,
            float | None,
            tuple[float, float] | None,
            int | None,
            str | None,
            str | None,
        ]
    ]
    now: Millis


class CountsMessage(msgspec.Struct, tag_field="t", tag="counts", kw_only=True):
    """The counts have changed; at most once a second."""

    id: SubId
    s: Seq
    n: Counts


class Now(msgspec.Struct, tag_field="t", tag="now", kw_only=True):
    """The numbers of the service, once a second for who has asked."""

    in_bytes_per_s: int
    out_bytes_per_s: int
    running: Annotated[int, Meta(description="slots in use")]
    slots: int
    running_by_kind: Annotated[dict[str, int], Meta(description="jobs, transfers included")]
    queued: int
    subscribers: Annotated[int, Meta(description="connections to the channel, of all")]
    children: Annotated[int, Meta(description="child processes")]
    free_bytes: int
    disk_bytes: int
    loop_lag_ms: float
    files: int
    stored_bytes: int


class Line(msgspec.Struct, kw_only=True):
    """A line of a job's log."""

    n: int
    at: Time
    line: str


class LogMessage(msgspec.Struct, tag_field="t", tag="log", kw_only=True):
    """New lines of a job's log."""

    id: SubId
    j: str
    from_: Annotated[int, Meta(description="the number of the first line")] = msgspec.field(
        name="from"
    )
    lines: list[Line]


class Reset(msgspec.Struct, tag_field="t", tag="reset", kw_only=True):
    """The cursor can't be honoured; a snapshot follows."""

    id: SubId
    why: Why
    epoch: str


class Subscribed(msgspec.Struct, tag_field="t", tag="ack", kw_only=True):
    """Answers sub: events follow ``s``. If it did not resume, the snapshot comes next."""

    id: SubId
    s: Seq
    resumed: bool


class Refused(msgspec.Struct, kw_only=True):
    """One job of a bulk command that was not changed."""

    job: str
    code: str
    msg: str


class Done(msgspec.Struct, tag_field="t", tag="ack", kw_only=True, omit_defaults=True):
    """Answers cmd, after its commit. For many jobs: ``n`` of them are as was asked for."""

    id: CommandId
    job: str | None
    v: int | None
    n: int | None = None
    failures: int | None = None
    failed: list[Refused] | None = None


class Err(msgspec.Struct, tag_field="t", tag="err", kw_only=True):
    """Answers what can't be done; ``code`` is that of the error catalogue."""

    id: Any
    code: str
    msg: str
    retry: bool
    after_ms: int | None
    next: str
    field: str | None


class Hb(msgspec.Struct, tag_field="t", tag="hb", kw_only=True):
    """A heartbeat: everything up to ``s`` was sent."""

    s: Seq
    now: Millis


class Bye(msgspec.Struct, tag_field="t", tag="bye", kw_only=True):
    """The server stops; come back after ``retry_ms``."""

    why: Literal["restart"]
    retry_ms: int
    final: bool


SAID = (
    *(Welcome, Snap, Ev, Mark, P, CountsMessage, Now, LogMessage, Reset, Subscribed, Done, Err),
    *(Hb, Bye),
)
HEARD = (Hello, Sub, Unsub, More, Cmd, Set, Beat)

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Message | list[Message]).decode


def err(id: Any, error: SluiceError) -> bytes:
    """A refusal as a message."""
    after_ms = None if error.retry_after_s is None else int(error.retry_after_s * 1000)
    return encode(
        Err(
            id=id,
            code=error.code,
            msg=error.detail,
            retry=error.entry.retry,
            after_ms=after_ms,
            next=error.entry.next,
            field=error.field,
        )
    )


class _Identified(msgspec.Struct):
    id: Any = None


_identified = msgspec.json.Decoder(_Identified | Sequence[Any])


def id_of(message: str) -> Any:
    """The request id of a message that is wrong in other ways."""
    try:
        found = _identified.decode(message)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found.id if isinstance(found, _Identified) and isinstance(found.id, int | str) else None
