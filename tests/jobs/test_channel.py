"""The rules of the channel, value by value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.channel import (
    BATCH_BYTES,
    BATCH_EVENTS,
    FRAME_ROWS,
    Cursor,
    Latest,
    Pace,
    Said,
    Select,
    Subscription,
    Sweep,
    View,
    progress_text,
    snap_text,
    text_frame,
    why_reset,
)
from storage import Job, Progress
from tests.jobs.records import a_mark, an_event


def a_view(**select: Any) -> View:
    """What ann wants to see; its frames are the texts in lines."""
    return View(1, "ann", Select(**select), lines)


def lines(said: Sequence[Said]) -> bytes:
    """A door for tests."""
    return b"\n".join(one.text for one in said)


def read(frame: bytes | None) -> list[Any]:
    """The messages of a frame."""
    assert frame is not None
    return [json.loads(line) for line in frame.splitlines()]


# ---- Cursor ----


def test_a_cursor_is_a_short_text() -> None:
    """What is written can be read, also with colons in the epoch."""
    for cursor in (Cursor("e1", 0), Cursor("a:b", 10**17)):
        assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text", ["", "1", ":1", "e:", "e:-1", "e:x", "e:1.0", "e:²", "e:" + "9" * 19]
)
def test_what_is_no_cursor(text: str) -> None:
    """Anything else is no cursor; nothing is raised."""
    assert Cursor.parse(text) is None


@pytest.mark.parametrize(
    ("cursor", "why"),
    [
        (Cursor("e", 9), None),
        (Cursor("e", 4), None),
        (Cursor("e", 3), "retention"),
        (Cursor("e", 10), "epoch"),
        (Cursor("f", 9), "epoch"),
        (Cursor("", 9), "epoch"),
    ],
)
def test_a_cursor_is_honoured_only_if_all_that_follows_is_there(
    cursor: Cursor, why: str | None
) -> None:
    """Of the same log, not beyond its end, and not before what is kept (here 5 to 9)."""
    assert why_reset(cursor, "e", newest=9, oldest=5) == why


# ---- Filters ----


@pytest.mark.parametrize(
    ("select", "wanted", "out"),
    [
        ({}, True, False),
        ({"kind": ("count",)}, True, False),
        ({"kind": ("upload", "count")}, True, False),
        ({"kind": ("upload",)}, False, None),
        ({"jobs": ("j1",)}, True, False),
        ({"jobs": ("j2",)}, False, None),
        ({"state": ("running",)}, True, False),
        ({"state": ("queued",)}, True, True),
        ({"state": ("paused", "failed")}, False, None),
        ({"state": ("running",), "kind": ("upload",)}, False, None),
        ({"q": "NUMB"}, True, False),
        ({"q": "j1"}, True, False),
        ({"q": "letters"}, False, None),
        ({"owner": "ann"}, True, False),
        ({"owner": "bob"}, False, None),
    ],
)
def test_filter_looks_at_the_old_and_the_new_state(
    select: dict[str, Any], wanted: bool, out: bool | None
) -> None:
    """An event that enters or leaves the filter is seen, and says if it has left."""
    view = a_view(**select)
    assert view.wants(an_event(1)) is wanted
    if wanted:
        (message,) = read(view.batch([an_event(1)], 0, 0).frame)
        assert message.get("out", False) is out


def test_a_renaming_is_seen_by_every_search() -> None:
    """What it was called before is not known, so that leaving shows; it says if it has left."""
    view = a_view(q="letters")
    assert view.wants(an_event(1, cause="renamed"))
    (message,) = read(view.batch([an_event(1, cause="renamed")], 0, 0).frame)
    assert message["out"] is True


def test_a_deleted_job_leaves_every_filter() -> None:
    """The last event of a job says so."""
    (message,) = read(a_view().batch([an_event(1, to="deleted")], 0, 0).frame)
    assert (message["to"], message["out"]) == ("deleted", True)


def test_first_event_of_a_job_has_no_old_state() -> None:
    """A job that is created in a wanted state is seen."""
    view = a_view(state=("queued",))
    assert view.wants(an_event(1, from_=None, to="queued"))
    assert not view.wants(an_event(1, from_=None, to="running"))


def test_other_owners_are_never_seen() -> None:
    """Neither events nor progress of another owner pass, whatever the filter says."""
    for view in (a_view(jobs=("j1",)), a_view(owner="bob"), a_view()):
        assert not view.wants(an_event(1, owner="bob"))
        assert not view.wants_mark(a_mark(owner="bob"))


def test_progress_is_filtered_as_well() -> None:
    """A mark passes by the job's present state, kind, name and id."""
    assert a_view(state=("running",), kind=("count",), jobs=("j1",), q="Num").wants_mark(a_mark())
    assert not a_view(state=("paused",)).wants_mark(a_mark())
    assert not a_view(kind=("upload",)).wants_mark(a_mark())
    assert not a_view(jobs=("j2",)).wants_mark(a_mark())
    assert not a_view(q="letters").wants_mark(a_mark())


def test_rows_are_filtered_as_events_are() -> None:
    """A row belongs to a filter by what it is now."""
    job = Job(id="j1", kind="count", name="numbers", owner="ann", state="running", created_at=1)
    for select in ({}, {"state": ("running",)}, {"q": "UMB"}, {"jobs": ("j1",), "owner": "ann"}):
        assert Select(**select).takes(job)
    for select in ({"state": ("queued",)}, {"q": "x"}, {"jobs": ("j2",)}, {"owner": "bob"}):
        assert not Select(**select).takes(job)


# ---- Frames ----


def test_each_message_points_at_the_one_before() -> None:
    """p is the s of the message before, over skipped events, so that a hole can be noticed."""
    view = a_view(kind=("count",))
    events = [an_event(11), an_event(12, kind="upload"), an_event(13), an_event(14, kind="upload")]
    batch = view.batch(events, 10, 10)
    assert [(message["p"], message["s"]) for message in read(batch.frame)] == [(10, 11), (11, 13)]
    assert (batch.seq, batch.sent) == (14, 13)


def test_message_has_the_whole_row() -> None:
    """An ev replaces a row: it has everything that is known of the transition."""
    (message,) = read(a_view().batch([an_event(1)], 0, 0).frame)
    assert message == {
        "t": "ev",
        "id": 1,
        "s": 1,
        "p": 0,
        "from": "queued",
        "to": "running",
        "cause": "claimed",
        "actor": "service",
        "at": "2027-01-15T08:00:00.123Z",
        "row": {"id": "j1", "name": "numbers"},
    }


def test_mark_moves_the_cursor_over_what_was_skipped() -> None:
    """Events of others move the cursor by a mark, once; the next message points at the mark."""
    one = Subscription(a_view(kind=("count",)), 0)
    assert one.mark() is None
    one.moved(one.view.batch([an_event(1, kind="upload"), an_event(2, kind="upload")], 0, 0))
    assert read(one.mark()) == [{"t": "mark", "id": 1, "s": 2, "p": 0}]
    assert one.mark() is None
    assert read(one.view.batch([an_event(3)], one.seq, one.sent).frame)[0]["p"] == 2


def test_nothing_wanted_makes_no_frame() -> None:
    """Events of others alone move only the place."""
    batch = a_view(kind=("upload",)).batch([an_event(1), an_event(2)], 0, 0)
    assert batch == (None, 2, 0)


@given(st.lists(st.integers(0, 5000), max_size=200))
def test_frames_are_bounded_and_lose_nothing(sizes: list[int]) -> None:
    """However many and long events are, each comes once, in frames of bounded size."""
    events = [
        an_event(seq, row=msgspec.Raw(b'{"pad":"%s"}' % (b"x" * size)))
        for seq, size in enumerate(sizes, 1)
    ]
    view, place, seen = a_view(), (0, 0), []
    while place[0] < len(events):
        batch = view.batch(events[place[0] :], *place)
        messages = read(batch.frame)
        assert len(messages) <= BATCH_EVENTS
        assert len(messages) == 1 or len(batch.frame or b"") <= BATCH_BYTES + BATCH_EVENTS
        seen += [message["s"] for message in messages]
        place = (batch.seq, batch.sent)
    assert seen == list(range(1, len(events) + 1))


def test_who_stands_at_the_same_place_gets_the_same_bytes() -> None:
    """A frame is built once for its place, until it is forgotten."""
    view = a_view()
    batch = view.batch([an_event(1)], 0, 0)
    assert view.memo[0, 0] is batch
    view.forget()
    assert not view.memo


@pytest.mark.parametrize("n", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_text_frame_says_its_length(n: int) -> None:
    """Lengths take one, three or nine bytes, whichever is the shortest (RFC 6455 section 5.2)."""
    frame = text_frame([Said(b"x" * n)])
    assert frame[0] == 0x81
    if n < 126:
        assert (frame[1], frame[2:]) == (n, b"x" * n)
    elif n < 1 << 16:
        assert (frame[1], frame[2:4], frame[4:]) == (126, n.to_bytes(2, "big"), b"x" * n)
    else:
        assert (frame[1], frame[2:10], frame[10:]) == (127, n.to_bytes(8, "big"), b"x" * n)


def test_several_messages_are_an_array() -> None:
    """One frame holds one object, or an array of them."""
    assert text_frame([Said(b"{}")])[2:] == b"{}"
    assert text_frame([Said(b"1"), Said(b"2", 7)])[2:] == b"[1,2]"


def test_snapshot_names_its_cursor() -> None:
    """A page of rows says as of which seq it is, and whether more pages follow."""
    page = json.loads(snap_text(1, Cursor("e1", 5), 1, 44, [{"id": "j1"}], {"queued": 1}))
    assert (page["t"], page["epoch"], page["s"], page["last"]) == ("snap", "e1", 5, False)
    assert (page["jobs"], page["counts"], page["cursor"]) == ([{"id": "j1"}], {"queued": 1}, 44)
    assert json.loads(snap_text(1, Cursor("e1", 5), 2, None, [], {}))["last"] is True


# ---- Progress ----


def test_progress_is_a_short_row_for_each_job() -> None:
    """Progress travels as arrays; an estimate is a pair or null."""
    message = json.loads(progress_text([a_mark()], 1_800_000_000_000))
    assert message == {
        "t": "p",
        "u": [[7, 3, 5, None, None, 9, None, None]],
        "now": 1_800_000_000_000,
    }


def told(latest: Latest, sweep: Sweep) -> tuple[list[tuple[str, int]], Sweep]:
    """What a subscriber to everything gets next."""
    marks, sweep = latest.since(sweep, lambda mark: True)
    return [(mark.job, mark.progress.done) for mark in marks], sweep


def a_step(latest: Latest, job: int, done: int, at_s: float = 0.0) -> None:
    """A job has moved on."""
    latest.put(a_mark(f"j{job}", h=job + 1, progress=Progress(done=done)), at_s)


def test_only_the_latest_progress_is_told_and_once() -> None:
    """Who asks late gets one row a job, the newest, and not again."""
    latest = Latest()
    for done in range(5):
        a_step(latest, 1, done)
        a_step(latest, 2, done)
    rows, sweep = told(latest, Sweep())
    assert rows == [("j1", 4), ("j2", 4)]
    assert told(latest, sweep) == ([], sweep)
    a_step(latest, 1, 9)
    assert told(latest, sweep)[0] == [("j1", 9)]


def test_no_job_starves_however_many_there_are() -> None:
    """More jobs than fit into a frame are told in turns, though all move all the time."""
    latest, sweep = Latest(), Sweep()
    n = 2 * FRAME_ROWS + 50
    seen: dict[str, list[int]] = {}
    for done in range(12):
        for job in range(n):
            a_step(latest, job, done)
        rows, sweep = told(latest, sweep)
        assert len(rows) <= FRAME_ROWS
        for job_id, value in rows:
            seen.setdefault(job_id, []).append(value)
    assert len(seen) == n
    for values in seen.values():
        assert len(values) >= 3
        assert values == sorted(set(values))


@given(st.lists(st.one_of(st.integers(0, 299), st.none()), max_size=900))
def test_the_last_progress_always_arrives(moves: list[int | None]) -> None:
    """Whenever a subscriber looks, in the end it knows the last value of every job."""
    latest, sweep = Latest(), Sweep()
    now: dict[str, int] = {}
    known: dict[str, int] = {}
    for done, job in enumerate(moves):
        if job is None:
            rows, sweep = told(latest, sweep)
            known |= dict(rows)
        else:
            a_step(latest, job, done)
            now[f"j{job}"] = done
    for _ in range(4):
        rows, sweep = told(latest, sweep)
        known |= dict(rows)
    assert known == now
    assert told(latest, sweep)[0] == []


def test_progress_of_ended_and_of_silent_jobs_is_dropped() -> None:
    """What has ended, or was not replaced for long, is told no more."""
    latest = Latest()
    for job in (1, 2, 3):
        a_step(latest, job, 1, at_s=float(job))
    latest.drop("j3")
    latest.drop("none")
    latest.forget(before_s=2.0)
    assert told(latest, Sweep())[0] == [("j2", 1)]


def test_progress_is_told_ten_times_a_second() -> None:
    """At the clock's rate each tick is in time, however the machine delays it; not two at once."""
    pace = Pace()
    assert pace.due(0.0)
    pace.sent(0.0)
    assert not pace.due(0.0)
    assert pace.due(0.1)
    pace.set(rate=1000)
    assert pace.rate == 10


@pytest.mark.parametrize(
    ("asked", "hidden", "rate"), [(5, False, 5), (5, True, 1), (0.5, True, 0.5)]
)
def test_a_subscriber_may_ask_for_less(asked: float, hidden: bool, rate: float) -> None:
    """The rate is what is asked for; for a page that nobody sees, one a second at the most."""
    pace = Pace()
    pace.set(rate=asked, hidden=hidden)
    assert pace.rate == rate
    pace.sent(10.0)
    assert not pace.due(10.0 + 1 / rate - 0.11)
    assert pace.due(10.0 + 1 / rate)
    pace.set(rate=0)
    assert pace.rate == 0.1
