"""A subscriber's rules, message by message."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.channel import Cursor
from jobs.replica import Gap, Replica


def a_row(job: str, version: int, **more: Any) -> dict[str, Any]:
    """A row of a job."""
    return {"id": job, "h": int(job[1:]), "version": version, "progress": {"done": 0}} | more


def an_ev(s: int, p: int, job: str, version: int, to: str = "running", **more: Any) -> Any:
    """A transition."""
    return {"t": "ev", "id": 1, "s": s, "p": p, "to": to, "row": a_row(job, version)} | more


def a_snap(s: int, *rows: dict[str, Any], page: int = 1, cursor: int | None = None) -> Any:
    """A page of rows."""
    return {
        "t": "snap",
        "id": 1,
        "epoch": "e",
        "s": s,
        "page": page,
        "last": cursor is None,
        "cursor": cursor,
        "jobs": list(rows),
        "counts": {"running": len(rows)},
    }


def a_mark(s: int, p: int) -> Any:
    """Nothing else up to s."""
    return {"t": "mark", "id": 1, "s": s, "p": p}


def an_ack(s: int, resumed: bool = False) -> Any:
    """The answer to a subscription."""
    return {"t": "ack", "id": 1, "s": s, "resumed": resumed}


RESET = {"t": "reset", "id": 1, "why": "epoch", "epoch": "e"}


def subscribed(*rows: dict[str, Any], s: int = 10) -> Replica:
    """A subscriber that has its snapshot."""
    replica = Replica()
    assert replica.ask() == {"t": "sub", "id": 1, "f": {}}
    assert replica.hear(an_ack(s)) == []
    assert replica.hear(a_snap(s, *rows)) == []
    assert replica.ready
    return replica


def versions(replica: Replica) -> dict[str, int]:
    """The rows, as far as they matter."""
    return {job: row["version"] for job, row in replica.rows.items()}


def test_events_replace_rows() -> None:
    """A row comes whole with each transition; the cursor is that of the last one applied."""
    replica = subscribed(a_row("j1", 3))
    assert replica.hear(an_ev(12, 10, "j1", 4)) == []
    assert replica.hear(an_ev(13, 12, "j2", 1)) == []
    assert versions(replica) == {"j1": 4, "j2": 1}
    assert replica.cursor == Cursor("e", 13)
    assert replica.seen == {"j1": {4}, "j2": {1}}
    assert (replica.gaps(), replica.repeated) == ([], [])


@pytest.mark.parametrize("lost", [an_ev(12, 11, "j1", 5), a_mark(12, 11)])
def test_what_does_not_follow_is_not_applied(lost: Any) -> None:
    """An event or a mark whose p is not the cursor means a loss: it asks from the cursor, once."""
    replica = subscribed(a_row("j1", 3))
    assert replica.hear(lost) == [{"t": "sub", "id": 1, "f": {}, "epoch": "e", "s": 10}]
    assert (versions(replica), replica.cursor) == ({"j1": 3}, Cursor("e", 10))
    assert replica.hear(an_ev(13, 12, "j1", 6)) == []  # of the old subscription
    assert replica.hear(an_ack(10, resumed=True)) == []
    assert replica.hear(an_ev(11, 10, "j1", 4)) == []
    assert replica.hear(an_ev(12, 11, "j1", 5)) == []
    assert versions(replica) == {"j1": 5}
    assert replica.repeated == []


def test_marks_move_the_cursor() -> None:
    """What others did moves the cursor, so that the next event follows."""
    replica = subscribed()
    replica.hear(a_mark(20, 10))
    assert replica.hear(an_ev(21, 20, "j1", 1)) == []
    assert versions(replica) == {"j1": 1}


@pytest.mark.parametrize(("s", "asks"), [(10, False), (9, False), (11, True)])
def test_a_heartbeat_tells_of_a_lost_end(s: int, asks: bool) -> None:
    """It says how far all was sent; if that is more than what came, something was lost."""
    replica = subscribed()
    answers = replica.hear({"t": "hb", "s": s, "now": 0})
    assert answers[0] == {"t": "hb", "s": 10}
    assert [answer["t"] for answer in answers[1:]] == (["sub"] if asks else [])


def test_a_row_leaves() -> None:
    """By out, and by deleted; what comes back is a new row."""
    replica = subscribed(a_row("j1", 1), a_row("j2", 1))
    replica.hear(an_ev(11, 10, "j1", 2, "paused", out=True))
    replica.hear(an_ev(12, 11, "j2", 2, "deleted", out=True))
    assert versions(replica) == {}
    replica.hear(an_ev(13, 12, "j1", 3))
    assert versions(replica) == {"j1": 3}


def test_an_old_row_does_not_replace_a_newer_one() -> None:
    """Rows of a snapshot may be newer than its cursor; events that follow do no harm."""
    replica = subscribed(a_row("j1", 5))
    replica.hear(an_ev(11, 10, "j1", 4))
    assert versions(replica) == {"j1": 5}
    replica.hear(an_ev(12, 11, "j1", 5))
    assert (versions(replica), replica.repeated) == ({"j1": 5}, [])


def test_what_comes_twice_is_noted() -> None:
    """No transition may be told twice."""
    replica = subscribed(a_row("j1", 1))
    replica.hear(an_ev(11, 10, "j1", 2))
    replica.hear(an_ev(12, 11, "j1", 2))
    assert replica.repeated == [("j1", 2)]


def test_a_reset_begins_anew() -> None:
    """The rows that are not listed are gone, and what was jumped over is known."""
    replica = subscribed(a_row("j1", 1), a_row("j2", 1), a_row("j3", 4))
    replica.hear(an_ev(11, 10, "j1", 2))
    replica.cut()
    assert replica.ask() == {"t": "sub", "id": 1, "f": {}, "epoch": "e", "s": 11}
    for message in (
        an_ack(50),
        RESET,
        a_snap(50, a_row("j1", 5), a_row("j3", 4), a_row("j4", 2)),
    ):
        assert replica.hear(message) == []
    assert versions(replica) == {"j1": 5, "j3": 4, "j4": 2}
    assert (replica.resets, replica.cursor) == (["epoch"], Cursor("e", 50))
    assert replica.gaps() == [Gap("j1", 2, 5), Gap("j4", 0, 2)]
    for job, version in (("j1", 3), ("j1", 4), ("j1", 5), ("j4", 1), ("j4", 2)):
        replica.fill(job, version)
    assert replica.gaps() == []


def test_what_is_known_of_another_epoch_does_not_count() -> None:
    """The tail of a log was lost: its versions are given again, so lower ones replace higher."""
    replica = subscribed(a_row("j1", 4), a_row("j2", 1))
    replica.hear(an_ev(11, 10, "j1", 5))
    replica.hear(an_ev(12, 11, "j1", 6))
    replica.cut()
    replica.ask()
    snap = a_snap(10, a_row("j1", 4, name="of the new log"), cursor=1) | {"epoch": "f"}
    for message in (an_ack(10), RESET | {"epoch": "f"}, snap):
        replica.hear(message)
    replica.hear(a_snap(10, a_row("j2", 1), page=2) | {"epoch": "f"})
    assert versions(replica) == {"j1": 4, "j2": 1}
    assert replica.rows["j1"]["name"] == "of the new log"
    assert replica.gaps() == [Gap("j1", 0, 4), Gap("j2", 0, 1)]
    replica.hear(an_ev(11, 10, "j1", 5))
    assert (versions(replica)["j1"], replica.repeated) == (5, [])


def test_what_was_read_from_the_history_may_be_told_once() -> None:
    """The rows of a snapshot may be ahead of its cursor, and so is what fills the gaps."""
    replica = subscribed(a_row("j1", 1))
    replica.cut()
    replica.ask()
    for message in (an_ack(50), RESET, a_snap(50, a_row("j1", 3))):
        replica.hear(message)
    for version in (2, 3):
        replica.fill("j1", version)
    replica.hear(an_ev(51, 50, "j1", 3))
    assert replica.repeated == []
    replica.hear(an_ev(52, 51, "j1", 3))
    assert replica.repeated == [("j1", 3)]


def test_a_snapshot_comes_in_pages() -> None:
    """Each next page is asked for; what events have told meanwhile stays."""
    replica = subscribed(a_row("j1", 1), a_row("j9", 1))
    replica.cut()
    replica.ask()
    replica.hear(an_ack(20))
    replica.hear(RESET)
    more = replica.hear(a_snap(20, a_row("j5", 1), cursor=5))
    assert more == [{"t": "more", "id": 1, "cursor": 5}]
    replica.hear(an_ev(21, 20, "j6", 1))
    replica.hear(an_ev(22, 21, "j5", 2, "deleted", out=True))
    assert versions(replica) == {"j1": 1, "j9": 1, "j6": 1}
    assert replica.hear(a_snap(22, a_row("j1", 1), page=2)) == []
    assert versions(replica) == {"j1": 1, "j6": 1}


def test_half_a_snapshot_is_no_ground_to_go_on_from() -> None:
    """Who was cut between two pages, or has lost something there, subscribes anew."""
    replica = Replica()
    replica.ask()
    replica.hear(an_ack(10))
    replica.hear(a_snap(10, a_row("j5", 1), cursor=5))
    assert not replica.ready
    assert replica.hear(an_ev(12, 11, "j1", 1)) == [{"t": "sub", "id": 1, "f": {}}]
    assert replica.hear(a_snap(10, a_row("j4", 1), page=2)) == []  # of the old one
    replica.hear(an_ack(12))
    replica.hear(a_snap(12, a_row("j5", 1), cursor=5))
    replica.cut()
    assert replica.ask() == {"t": "sub", "id": 1, "f": {}}


def test_progress_belongs_to_a_version() -> None:
    """Progress of an older or newer version of the job, or of an unknown job, is dropped."""
    replica = subscribed(a_row("j7", 3))
    for version in (2, 4):
        replica.hear({"t": "p", "u": [[7, version, 50, None, None, 99, None, None]], "now": 0})
    replica.hear({"t": "p", "u": [[8, 3, 50, None, None, 99, None, None]], "now": 0})
    assert replica.rows["j7"]["progress"] == {"done": 0}
    replica.hear({"t": "p", "u": [[7, 3, 50, 1.5, [1, 2], 99, "copy", "half"]], "now": 0})
    assert replica.rows["j7"]["progress"] == {
        "done": 50,
        "rate_per_s": 1.5,
        "eta_s": [1, 2],
        "total": 99,
        "phase": "copy",
        "message": "half",
    }


def test_other_subscriptions_and_unknown_messages_are_left_alone() -> None:
    """Only what bears its id, or none, is its own."""
    replica = subscribed(a_row("j1", 1))
    for message in (
        an_ev(11, 10, "j1", 2, id=2),
        {"t": "ack", "id": "c1", "job": "j1", "v": 2},
        {"t": "dance"},
        {"t": "snap", "id": 2},
    ):
        assert replica.hear(message) == []
    assert versions(replica) == {"j1": 1}


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=60), st.data())
def test_however_messages_get_lost_all_is_known_in_the_end(
    moves: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """A server that resumes behind the cursor, and a transport that loses what it likes."""
    log: list[tuple[str, int]] = []
    now: dict[str, int] = {}
    replica = subscribed(s=0)
    outbox: list[Any] = []
    sent = 0

    def serve(answers: list[dict[str, Any]]) -> None:
        """What the server sends: all behind the cursor, or behind what it has sent."""
        nonlocal sent
        for answer in answers:
            if answer["t"] == "sub":
                sent = answer["s"]
                outbox.append(an_ack(sent, resumed=True))
        while sent < len(log):
            job, version = log[sent]
            outbox.append(an_ev(sent + 1, sent, job, version))
            sent += 1

    for number, loses in moves:
        job = f"j{number}"
        now[job] = now.get(job, 0) + 1
        log.append((job, now[job]))
        serve([])
        for message in outbox[:]:
            outbox.remove(message)
            if loses and message["t"] == "ev" and data.draw(st.booleans()):
                continue
            serve(replica.hear(message))
    outbox.append({"t": "hb", "s": len(log), "now": 0})
    while outbox:
        serve(replica.hear(outbox.pop(0)))
    assert versions(replica) == now
    assert {(job, v) for job, seen in replica.seen.items() for v in seen} == set(log)
    assert (replica.repeated, replica.gaps()) == ([], [])
