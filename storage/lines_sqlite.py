"""Which queued job comes next: one index, walked by seeks.

Strategy. Jobs of one priority, kind and owner stand in a *line*, the oldest first; those that ran
before stand in lines of their own, ahead of the others. The index ``jobs_line`` has all lines one
behind the other. So the end of a line, a whole kind that is full, or the next owner is one seek
away, and no step looks at the jobs that it passes over, however many they are.

Owners of one priority take turns: the next one is who follows the last one by name, round and
round. So each gets one start in a cycle, whatever the others have queued. Whose turn it is, is kept
in memory: after a restart a cycle begins anew, which starves nobody.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

_FROM = "FROM jobs INDEXED BY jobs_line WHERE state = 'queued' AND lease_ends IS NULL"
_LEVEL = f"{_FROM} AND priority = ? AND (rank >= 0) = ?"
_FIELDS = "priority, rank >= 0, kind, owner, rank, h"
_MOST_AHEAD = 1000

INDEX = """
DROP INDEX IF EXISTS jobs_queue;
CREATE INDEX IF NOT EXISTS jobs_line ON jobs (priority DESC, rank >= 0, kind, owner, rank, h)
    WHERE state = 'queued' AND lease_ends IS NULL;
"""


class _Head(NamedTuple):
    """The first job of a line."""

    priority: int
    fresh: int  # 1: it never ran
    kind: str
    owner: str
    rank: int
    h: int


class Lines:
    """The order of queued jobs in one store."""

    def __init__(self) -> None:
        self._turns: dict[tuple[int, int], str] = {}  # by level: who had the last turn

    def take(
        self,
        con: sqlite3.Connection,
        slots: int,
        kinds: Collection[str],
        room: Mapping[str, int],
        owner_slots: int | None,
        busy: Mapping[str, int],
    ) -> Iterator[int]:
        """The numbers of the next jobs, at most ``slots``.

        ``room``: how many more of a kind may start, for those that have a limit; ``busy``: how many
        slots an owner holds, of ``owner_slots``. A job must have left its line (by its lease)
        before the next one is asked for.
        """
        claim = _Claim(con, slots, kinds, room, owner_slots, busy)
        at = _first(con)
        while at is not None and claim.slots > 0:
            level = at.priority, at.fresh
            last = _Head(
                *con.execute(
                    f"SELECT {_FIELDS} {_LEVEL} ORDER BY kind DESC, owner DESC LIMIT 1", level
                ).fetchone()
            )
            if (at.kind, at.owner) == (last.kind, last.owner):
                yield from self._of_line(claim, at)
            else:
                yield from self._of_level(claim, level)
            at = _first_below(con, *level) if claim.slots > 0 else None

    def _of_line(self, claim: _Claim, head: _Head) -> Iterator[int]:
        """All that may start of a level that is one line."""
        most = claim.most(head.kind, head.owner)
        if most <= 0:
            return
        rows = claim.con.execute(
            f"SELECT h {_LEVEL} AND kind = ? AND owner = ? ORDER BY rank, h LIMIT ?",
            (*head[:4], most),
        ).fetchall()
        self._turns[head.priority, head.fresh] = head.owner
        for (h,) in rows:
            claim.spend(head.kind, head.owner)
            yield h

    def _of_level(self, claim: _Claim, level: tuple[int, int]) -> Iterator[int]:
        """Those of a level that may start, by turns; of an owner the oldest, whatever its kind."""
        turn = self._turns.get(level, "")
        heads: dict[str, _Head] = {}
        for kind in _kinds(claim.con, level):
            if kind in claim.kinds and (head := _next(claim, level, kind, turn)) is not None:
                heads[kind] = head
        while heads:
            head = min(heads.values(), key=lambda head: (head.owner <= turn, head[3:]))
            turn = self._turns[level] = head.owner
            claim.spend(head.kind, turn)
            yield head.h
            if claim.slots <= 0:
                return
            # The others are still the next of their kinds: this one came before them.
            for kind in [kind for kind, other in heads.items() if other.owner == turn]:
                following = _next(claim, level, kind, turn)
                if following is None:
                    del heads[kind]
                else:
                    heads[kind] = following
            for kind in [kind for kind in heads if claim.room.get(kind, 1) <= 0]:
                del heads[kind]

    def ahead(self, con: sqlite3.Connection, priority: int, rank: int, owner: str, h: int) -> int:
        """How many come before a queued job if nothing is full; at most 1,000 are counted."""
        level = priority, int(rank >= 0)
        n: int = con.execute(
            f"SELECT count(*) FROM (SELECT 1 {_FROM} AND priority > ? LIMIT ?)",
            (priority, _MOST_AHEAD),
        ).fetchone()[0]
        if level[1]:
            n += _count(con, _LEVEL, (priority, 0), _MOST_AHEAD)
        kinds = list(_kinds(con, level))
        own = sum(
            _count(
                con,
                f"{_LEVEL} AND kind = ? AND owner = ? AND (rank, h) < (?, ?)",
                (*level, other, owner, rank, h),
                _MOST_AHEAD,
            )
            for other in kinds
        )
        n += own
        turn = self._turns.get(level, "")
        mine = (owner <= turn, owner)
        found: dict[str, int] = {}
        for other in kinds:
            at = ""
            while n + sum(found.values()) < _MOST_AHEAD:
                row = con.execute(
                    f"SELECT owner {_LEVEL} AND kind = ? AND owner >= ? ORDER BY owner LIMIT 1",
                    (*level, other, at),
                ).fetchone()
                if row is None:
                    break
                who: str = row[0]
                at = f"{who}\0"
                if who == owner:
                    continue
                turns = own + ((who <= turn, who) < mine)
                most = turns - found.get(who, 0)
                if most > 0:
                    where = f"{_LEVEL} AND kind = ? AND owner = ?"
                    line = _count(con, where, (*level, other, who), most)
                    found[who] = found.get(who, 0) + line
        return min(_MOST_AHEAD, n + sum(found.values()))


class _Claim:
    """What is left to one claim."""

    def __init__(
        self,
        con: sqlite3.Connection,
        slots: int,
        kinds: Collection[str],
        room: Mapping[str, int],
        owner_slots: int | None,
        busy: Mapping[str, int],
    ) -> None:
        self.con = con
        self.slots = slots
        self.kinds = kinds
        self.room = dict(room)
        self._owner_slots = owner_slots
        self._busy = dict(busy)

    def most(self, kind: str, owner: str) -> int:
        """How many of that kind and owner may start."""
        if kind not in self.kinds:
            return 0
        most = min(self.slots, self.room.get(kind, self.slots))
        if self._owner_slots is not None:
            most = min(most, self._owner_slots - self._busy.get(owner, 0))
        return most

    def spend(self, kind: str, owner: str) -> None:
        """One of them starts."""
        self.slots -= 1
        if kind in self.room:
            self.room[kind] -= 1
        if self._owner_slots is not None:
            self._busy[owner] = self._busy.get(owner, 0) + 1


def _first(con: sqlite3.Connection) -> _Head | None:
    row = con.execute(f"SELECT {_FIELDS} {_FROM} ORDER BY priority DESC, rank >= 0 LIMIT 1")
    found = row.fetchone()
    return _Head(*found) if found else None


def _first_below(con: sqlite3.Connection, priority: int, fresh: int) -> _Head | None:
    """The first job of the next level."""
    found = None
    if not fresh:
        found = con.execute(f"SELECT {_FIELDS} {_LEVEL} LIMIT 1", (priority, 1)).fetchone()
    if found is None:
        found = con.execute(
            f"SELECT {_FIELDS} {_FROM} AND priority < ? ORDER BY priority DESC, rank >= 0 LIMIT 1",
            (priority,),
        ).fetchone()
    return _Head(*found) if found else None


def _kinds(con: sqlite3.Connection, level: tuple[int, int]) -> Iterator[str]:
    """The kinds that wait in a level."""
    at = ""
    while True:
        row = con.execute(
            f"SELECT kind {_LEVEL} AND kind >= ? ORDER BY kind LIMIT 1", (*level, at)
        ).fetchone()
        if row is None:
            return
        yield row[0]
        at = f"{row[0]}\0"  # the least text behind it


def _next(claim: _Claim, level: tuple[int, int], kind: str, turn: str) -> _Head | None:
    """The head of the kind's next line in the cycle whose owner may start another one."""
    at, wrapped = f"{turn}\0", False
    while claim.room.get(kind, 1) > 0:
        row = claim.con.execute(
            f"SELECT {_FIELDS} {_LEVEL} AND kind = ? AND owner >= ?"
            " ORDER BY owner, rank, h LIMIT 1",
            (*level, kind, at),
        ).fetchone()
        if row is None or (wrapped and row[3] > turn):
            if wrapped:
                return None
            at, wrapped = "", True
            continue
        head = _Head(*row)
        if claim.most(kind, head.owner) > 0:
            return head
        at = f"{head.owner}\0"
    return None


def _count(con: sqlite3.Connection, where: str, values: tuple[object, ...], most: int) -> int:
    return con.execute(  # type: ignore[no-any-return]
        f"SELECT count(*) FROM (SELECT 1 {where} LIMIT ?)", (*values, most)
    ).fetchone()[0]
