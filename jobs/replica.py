"""A subscriber's side of the channel: what to believe, when to ask again; pure.

Strategy. The cursor is that of the last message that was *applied*. An ``ev`` or ``mark`` is
applied only if its ``p`` is that cursor; else something was lost, whatever the reason, and the
subscription is asked for again from the cursor. The server then sends what follows it, or says
``reset`` and lists the rows anew: what is not in that list is gone. A row is replaced only by one
of a higher version, so that overlaps do no harm. What a reset has jumped over is known by the
versions that are missing, and can be read per job (``gaps``). Nothing that was known of another
epoch counts: the log may give the same versions again, to other transitions.

It does no input or output: ``hear`` takes a message of the server and returns what to answer. The
verifier, the tests and docs/channel.md follow it; channel.js in ``static/`` has the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jobs.channel import Cursor

Message = Mapping[str, Any]


class Gap(NamedTuple):
    """Versions of a job that were not seen: those after ``after``, up to ``upto``."""

    job: str
    after: int
    upto: int


class Replica:
    """The rows of one subscription, and every transition that it was told of."""

    def __init__(self, id: int = 1, select: Mapping[str, Any] | None = None) -> None:
        self.id = id
        self.select = dict(select or {})
        self.rows: dict[str, dict[str, Any]] = {}
        self.cursor: Cursor | None = None
        self.seen: dict[str, set[int]] = {}
        self.repeated: list[tuple[str, int]] = []
        self.resets: list[str] = []
        self.counts: dict[str, int] = {}
        self.ready = False  # the rows are complete
        self._numbers: dict[int, str] = {}  # ids by the number that progress comes under
        self._base: dict[str, int] = {}  # the version in which a job was first met
        self._asked = 0  # subscriptions that were not answered yet
        self._listed: set[str] | None = None  # of a snapshot whose last page has not come
        self._touched: set[str] = set()  # by events since that snapshot began
        self._first = True
        self._epoch: str | None = None  # what is known is of this one
        self._filled: set[tuple[str, int]] = set()

    def ask(self) -> dict[str, Any]:
        """The message that subscribes, or resumes behind the cursor."""
        self._asked += 1
        message: dict[str, Any] = {"t": "sub", "id": self.id, "f": self.select}
        if self.cursor is not None:
            message |= {"epoch": self.cursor.epoch, "s": self.cursor.seq}
        return message

    def cut(self) -> None:
        """The connection has ended."""
        self._asked = 0
        self._give_up_listing()

    def hear(self, message: Message) -> list[dict[str, Any]]:
        """Apply one message of the server; the messages to answer with."""
        if message.get("id", self.id) != self.id:
            return []
        match message["t"]:
            case "ack" if "s" in message:
                self._asked -= 1
            case "reset" if self._asked == 0:
                self.resets.append(message["why"])
                self.cursor = None
            case "snap" if self._asked == 0:  # else of a subscription that was given up
                return self._snap(message)
            case "ev" | "mark" if self._asked == 0:
                return self._follow(message)
            case "p":
                for told in message["u"]:
                    self.progress(told)
            case "counts":
                self.counts = dict(message["n"])
            case "hb":
                answer = [{"t": "hb", "s": self.cursor.seq if self.cursor else 0}]
                return answer + (self._again() if self._behind(message["s"]) else [])
        return []

    def _follow(self, message: Message) -> list[dict[str, Any]]:
        if not self.follows(message):
            return self._again()
        assert self.cursor is not None
        self.cursor = Cursor(self.cursor.epoch, message["s"])
        if message["t"] == "ev":
            self.event(message["row"], message["to"], out=message.get("out", False))
        return []

    def follows(self, message: Message) -> bool:
        """The gap rule: whether nothing was lost before this message."""
        return self.cursor is not None and bool(message["p"] == self.cursor.seq)

    def _behind(self, seq: int) -> bool:
        """Whether a heartbeat tells of more than what came, so that something was lost."""
        return self._asked == 0 and self.cursor is not None and seq > self.cursor.seq

    def _again(self) -> list[dict[str, Any]]:
        if self._asked:
            return []
        self._give_up_listing()
        return [self.ask()]

    def _give_up_listing(self) -> None:
        """Half a snapshot is no ground to go on from."""
        if self._listed is not None:
            self._listed = None
            self.cursor = None

    def event(self, row: Mapping[str, Any], to: str, *, out: bool = False) -> None:
        """One transition, with the row after it."""
        job, version = row["id"], row["version"]
        seen = self.seen.setdefault(job, set())
        if (job, version) in self._filled:  # the list was ahead of the cursor
            self._filled.remove((job, version))
        elif version in seen:
            self.repeated.append((job, version))
        seen.add(version)
        self._touched.add(job)
        if out or to == "deleted":
            if self._newer(row):
                self.rows.pop(job, None)
        else:
            self._put(row)

    def _snap(self, message: Message) -> list[dict[str, Any]]:
        if message["page"] == 1:
            self.begin(Cursor(message["epoch"], message["s"]))
        elif self._listed is None:  # a page of a snapshot that was given up
            return []
        self.counts = dict(message["counts"])
        self.page(message["jobs"])
        if not message["last"]:
            return [{"t": "more", "id": self.id, "cursor": message["cursor"]}]
        self.end()
        return []

    def begin(self, cursor: Cursor) -> None:
        """A list of all rows follows; each is at least as new as the cursor."""
        if self._epoch not in (None, cursor.epoch):
            self.rows.clear()
            self.seen.clear()
            self._base.clear()
            self._filled.clear()
        self._epoch = cursor.epoch
        self.cursor = cursor
        self._listed = set()
        self._touched = set()

    def page(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """A page of that list."""
        assert self._listed is not None
        for row in rows:
            self._listed.add(row["id"])
            if self._first:
                self._base.setdefault(row["id"], row["version"])
            self._put(row)

    def end(self) -> None:
        """The list is complete: what is not in it is gone, unless an event has told of it since."""
        assert self._listed is not None
        for job in self.rows.keys() - self._listed - self._touched:
            del self.rows[job]
        self._listed = None
        self._first = False
        self.ready = True

    def progress(self, told: list[Any]) -> None:
        """A row of a ``p`` message; dropped if it is of another version of the job."""
        h, version, *values = told
        row = self.rows.get(self._numbers.get(h, ""))
        if row is not None and row["version"] == version:
            names = ("done", "rate_per_s", "eta_s", "total", "phase", "message")
            row["progress"] = row["progress"] | dict(zip(names, values, strict=False))

    def _newer(self, row: Mapping[str, Any]) -> bool:
        known = self.rows.get(row["id"])
        return known is None or row["version"] > known["version"]

    def _put(self, row: Mapping[str, Any]) -> None:
        if self._newer(row):
            self.rows[row["id"]] = dict(row)
            self._numbers[row["h"]] = row["id"]

    def gaps(self) -> list[Gap]:
        """What was jumped over: of each row that is here, the versions that no event has told."""
        found = []
        for job, row in self.rows.items():
            at = self._base.get(job, 0)
            for version in sorted(self.seen.get(job, set()) | {row["version"] + 1}):
                if version > at + 1:
                    found.append(Gap(job, at, version - 1))
                at = max(at, version)
        return found

    def fill(self, job: str, version: int) -> None:
        """A version that was jumped over was read from the job's history."""
        seen = self.seen.setdefault(job, set())
        if version not in seen:
            seen.add(version)
            self._filled.add((job, version))
