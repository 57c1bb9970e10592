"""The rules of the live channel, as pure values: what a subscriber gets, in which frames, and when.

Strategy. A subscription is a cursor into the event log, not a queue. ``seq`` is how far the log was
looked through for it, ``sent`` what its subscriber knows its cursor to be; each ``ev`` and
``mark`` says in ``p`` the ``sent`` before it, so that whoever keeps the cursor of what it applied
notices any hole. A filter takes an event by the job's state before *or* after it, so that a row
that leaves the filter is seen to leave (``out``).

Frames are built once for all subscriptions that are alike: those of one ``View`` (same id, owner,
filter and door) that stand at the same place share the bytes.

Progress is no event: it is the latest value of each job, ordered by when it was last replaced. A
subscriber keeps a ``Sweep`` through it, three numbers, whatever it has missed.

Nothing here waits, reads a clock or knows a socket. ``jobs/replica.py`` is the subscriber's side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from jobs import states
from jobs.manager import Mark
from jobs.rows import rfc3339
from storage import Event, Job, matches_text

BATCH_EVENTS = 64
BATCH_BYTES = 16 << 10  # of one frame; a subscriber that does not read holds at most one
FRAME_ROWS = 200
RATE, RATE_HIDDEN = 10.0, 1.0  # progress frames a second
_RATE_LEAST = 0.1

Why = Literal["epoch", "retention"]

_encode = msgspec.json.Encoder().encode


class Cursor(NamedTuple):
    """A place in the log, the same at every door; ``<epoch>:<seq>`` in text."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """The cursor in a text, or None if there is none in it."""
        epoch, _, seq = text.rpartition(":")
        known = 0 < len(epoch) <= 64 and seq.isascii() and seq.isdigit() and len(seq) <= 18
        return cls(epoch, int(seq)) if known else None


def why_reset(cursor: Cursor, epoch: str, newest: int, oldest: int) -> Why | None:
    """Why a cursor can't be honoured, or None if all that follows it is there.

    ``epoch``: it is of another log, or of a part of this one that was lost; its numbers may have
    been given again. ``retention``: what followed it was forgotten.
    """
    if cursor.epoch != epoch or cursor.seq > newest:
        return "epoch"
    return "retention" if cursor.seq < oldest - 1 else None


class Select(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which jobs a subscriber wants; every field that is given must match.

    ``q``: this text is in the name, in capitals or not, or is the id.
    """

    owner: str | None = None
    kind: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    q: str | None = None

    def takes(self, job: Job) -> bool:
        """Whether a job as it is now belongs to it."""
        return self._takes(job.owner, job.kind, job.id) and (
            (not self.state or job.state in self.state) and self._named(job.name, job.id)
        )

    def wants(self, event: Event) -> bool:
        """Whether an event belongs to it: the job was in it before, or is in it now."""
        return (
            self._takes(event.owner, event.kind, event.job)
            and (not self.state or event.to in self.state or event.from_ in self.state)
            # What a job was called before its renaming is not in the event.
            and (self.q is None or event.cause == "renamed" or self._named(_name(event), event.job))
        )

    def lets_go(self, event: Event) -> bool:
        """Whether the job of an event that it wants does not belong to it any more."""
        if event.to == states.DELETED or (self.state and event.to not in self.state):
            return True
        return self.q is not None and not self._named(_name(event), event.job)

    def wants_mark(self, mark: Mark) -> bool:
        """Whether progress belongs to it."""
        return (
            self._takes(mark.owner, mark.kind, mark.job)
            and (not self.state or mark.state in self.state)
            and self._named(mark.name, mark.job)
        )

    def _takes(self, owner: str, kind: str, job_id: str) -> bool:
        return (
            self.owner in (None, owner)
            and (not self.kind or kind in self.kind)
            and (not self.jobs or job_id in self.jobs)
        )

    def _named(self, name: str, job_id: str) -> bool:
        return self.q is None or matches_text(self.q, name, job_id)


class _Named(msgspec.Struct):
    name: str = ""


_named = msgspec.json.Decoder(_Named)


def _name(event: Event) -> str:
    return _named.decode(event.row).name


class Said(NamedTuple):
    """One message of the server as JSON; ``s`` if it moves the cursor of its subscription."""

    text: bytes
    s: int | None = None


Door = Callable[[Sequence[Said]], bytes]


def text_frame(said: Sequence[Said]) -> bytes:
    """Messages as one WebSocket text frame, several of them as an array (RFC 6455 section 5.2)."""
    text = said[0].text if len(said) == 1 else b"[" + b",".join(one.text for one in said) + b"]"
    n = len(text)
    if n < 126:
        return bytes((0x81, n)) + text
    if n < 1 << 16:
        return b"\x81\x7e" + n.to_bytes(2, "big") + text
    return b"\x81\x7f" + n.to_bytes(8, "big") + text


class Batch(NamedTuple):
    """The next frame of a view, or None if nothing up to ``seq`` belongs to it."""

    frame: bytes | None
    seq: int
    sent: int


class View:
    """What all subscriptions with the same id, owner, filter and door have in common."""

    __slots__ = ("__weakref__", "door", "id", "memo", "owner", "select")

    def __init__(self, id: int, owner: str, select: Select, door: Door) -> None:
        self.id = id
        self.owner = owner
        self.select = select
        self.door = door
        # What was made for one, by its place, for all others that come to the same place.
        self.memo: dict[tuple[int, int], Batch] = {}

    def wants(self, event: Event) -> bool:
        """Whether the event belongs to it."""
        return event.owner == self.owner and self.select.wants(event)

    def wants_mark(self, mark: Mark) -> bool:
        """Whether the progress belongs to it."""
        return mark.owner == self.owner and self.select.wants_mark(mark)

    def batch(self, events: Iterable[Event], seq: int, sent: int) -> Batch:
        """One frame of the events that follow ``seq``, as many as fit into it."""
        said: list[Said] = []
        size, place = 0, (seq, sent)
        for event in events:
            if self.wants(event):
                one = self._ev(event, sent)
                if said and size + len(one.text) > BATCH_BYTES:
                    break
                said.append(one)
                size += len(one.text) + 1
                sent = event.seq
            seq = event.seq
            if len(said) == BATCH_EVENTS:
                break
        made = Batch(self.door(said) if said else None, seq, sent)
        self.memo[place] = made
        return made

    def mark(self, seq: int, sent: int) -> bytes:
        """A frame that says: nothing else for you up to ``seq``."""
        text = b'{"t":"mark","id":%d,"s":%d,"p":%d}' % (self.id, seq, sent)
        return self.door([Said(text, seq)])

    def forget(self) -> None:
        """Drop the frames made so far; those who stood there have them."""
        self.memo.clear()

    def _ev(self, event: Event, previous: int) -> Said:
        out = b',"out":true' if self.select.lets_go(event) else b""
        return Said(
            b'{"t":"ev","id":%d,"s":%d,"p":%d,%s,"row":%s%s}'
            % (self.id, event.seq, previous, _facts(event), bytes(event.row), out),
            event.seq,
        )


def _facts(event: Event) -> bytes:
    return _encode(
        {
            "from": event.from_,
            "to": event.to,
            "cause": event.cause,
            "actor": event.actor,
            "at": rfc3339(event.at),
        }
    )[1:-1]


class Subscription:
    """One subscriber's place in a view."""

    __slots__ = ("held", "page_rows", "pages", "sent", "seq", "view")

    def __init__(self, view: View, seq: int) -> None:
        self.view = view
        self.seq = seq
        self.sent = seq
        self.held = False  # nothing is sent while a page of its snapshot is read
        self.pages = 0  # of its snapshot
        self.page_rows = 50

    def moved(self, batch: Batch) -> None:
        """A batch was sent, or had nothing to send."""
        self.seq, self.sent = batch.seq, batch.sent

    def mark(self) -> bytes | None:
        """The frame that moves the subscriber's cursor over what did not belong to it."""
        if self.sent == self.seq:
            return None
        frame = self.view.mark(self.seq, self.sent)
        self.sent = self.seq
        return frame


class Sweep(NamedTuple):
    """How far a subscriber has come through the progress of all jobs.

    One frame takes ``FRAME_ROWS`` jobs, by their numbers, from behind ``h``; it takes those that
    were replaced after ``base``. Once through, the next sweep's ``base`` is what was the newest
    stamp when this one began: so no job starves, however many there are and however often others
    move, and none is told twice unless more than one frame is needed.
    """

    base: int = 0
    h: int = 0
    began: int = 0


class Latest:
    """The latest progress of each live job; ``stamp`` grows with each that is put in."""

    def __init__(self) -> None:
        self.stamp = 0
        self._rows: OrderedDict[str, tuple[int, float, Mark]] = OrderedDict()

    def put(self, mark: Mark, at_s: float) -> None:
        """Replace what was known of the job."""
        self.stamp += 1
        self._rows[mark.job] = (self.stamp, at_s, mark)
        self._rows.move_to_end(mark.job)

    def drop(self, job_id: str) -> None:
        """Forget a job that has ended: its event has the last of it."""
        self._rows.pop(job_id, None)

    def forget(self, before_s: float) -> None:
        """Drop what was not replaced since: the job's row has it."""
        while self._rows and next(iter(self._rows.values()))[1] < before_s:
            self._rows.popitem(last=False)

    def since(self, sweep: Sweep, wants: Callable[[Mark], bool]) -> tuple[list[Mark], Sweep]:
        """The marks of the next frame, and the sweep after it."""
        began = sweep.began if sweep.h else self.stamp
        newer = []
        for stamp, _, mark in reversed(self._rows.values()):
            if stamp <= sweep.base:
                break
            if mark.h > sweep.h and wants(mark):
                newer.append(mark)
        newer.sort(key=lambda mark: mark.h)
        if len(newer) <= FRAME_ROWS:
            return newer, Sweep(began, 0, 0)
        newer = newer[:FRAME_ROWS]
        return newer, Sweep(sweep.base, newer[-1].h, began)


def progress_text(marks: Iterable[Mark], now: int) -> bytes:
    """Latest progress of many jobs: [h, v, done, rate, eta, total, phase, message] each."""
    rows = [
        (
            mark.h,
            mark.version,
            mark.progress.done,
            mark.progress.rate_per_s,
            mark.progress.eta_s,
            mark.progress.total,
            mark.progress.phase,
            mark.progress.message,
        )
        for mark in marks
    ]
    return _encode({"t": "p", "u": rows, "now": now})


class Pace:
    """When a subscriber may get its next progress; a page that nobody sees gets less."""

    __slots__ = ("_due_s", "_hidden", "_rate")

    def __init__(self) -> None:
        self._rate = RATE
        self._hidden = False
        self._due_s = 0.0

    def set(self, *, rate: float | None = None, hidden: bool | None = None) -> None:
        """What the subscriber asks for, in frames a second."""
        if rate is not None:
            self._rate = min(RATE, max(_RATE_LEAST, rate))
        if hidden is not None:
            self._hidden = hidden
        self._due_s = 0.0

    @property
    def rate(self) -> float:
        """Frames a second at the most."""
        return min(self._rate, RATE_HIDDEN) if self._hidden else self._rate

    def due(self, now_s: float) -> bool:
        """Whether one may be sent now."""
        return now_s >= self._due_s

    def sent(self, now_s: float) -> None:
        """One was sent. The clock that brings progress ticks at RATE: a bit early is in time."""
        self._due_s = now_s + 1 / self.rate - 0.1 / RATE


def snap_text(
    id: int,
    cursor: Cursor,
    page: int,
    following: int | None,
    rows: Sequence[Any],
    counts: dict[str, int],
) -> bytes:
    """Rows as they are at the cursor or later; ``following`` asks for the next page by ``more``."""
    return _encode(
        {
            "t": "snap",
            "id": id,
            "epoch": cursor.epoch,
            "s": cursor.seq,
            "page": page,
            "last": following is None,
            "cursor": following,
            "jobs": rows,
            "counts": counts,
        }
    )
