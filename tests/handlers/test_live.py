"""The live channel, as a program that is no browser sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import SHUT_RDWR, SO_RCVBUF, SOL_SOCKET
from time import monotonic
from typing import Any, NamedTuple

import pytest
import websocket

from tests.conftest import Serve
from tests.handlers.clients import UUID7, Caller, Raw
from tests.harness import Server, Socket, eventually

JSON = "jobs.v1.json"


class Silent(NamedTuple):
    """Two sockets that were opened before the first test and say nothing."""

    mute: Socket  # did not even say hello
    quiet: Socket  # said hello, and nothing since


@pytest.fixture(scope="module", autouse=True)
def silent(site: Server) -> Iterator[Silent]:
    """What takes many seconds begins with the first test and is looked at by the last."""
    mute, quiet = site.socket(JSON), site.socket(JSON)
    quiet.say(t="hello", ver=1)
    yield Silent(mute, quiet)
    mute.close()
    quiet.close()


@pytest.fixture
def live(site: Server) -> Iterator[Socket]:
    """A channel that has said hello."""
    socket = site.socket(JSON)
    socket.say(t="hello", ver=1, cid="test")
    socket.until(lambda m: m["t"] == "welcome")
    yield socket
    socket.close()


def subscribe(socket: Socket, id: int = 1, **more: Any) -> Any:
    """Subscribe; the (first page of the) snapshot."""
    socket.say(t="sub", id=id, **more)
    return socket.until(lambda m: m["t"] == "snap" and m["id"] == id)


def count(caller: Caller, steps: int, delay_s: float = 0.0, **more: Any) -> Any:
    """Start a count."""
    params = {"steps": steps, "delay_s": delay_s}
    return caller.post("/v1/jobs", {"kind": "count", "params": params} | more).json


def event_of(job_id: str, *states: str) -> Any:
    """Whether a message is the event that a job has come into one of the states."""
    return lambda m: m["t"] == "ev" and m["row"]["id"] == job_id and m["to"] in states


def check_chain(messages: list[Any], id: int, at: int) -> int:
    """Check that each event or mark of a subscription points to the one before; the last seq."""
    for message in messages:
        if message.get("id") != id or message["t"] not in ("ev", "mark"):
            continue
        assert message["p"] == at
        assert message["s"] > at
        at = message["s"]
    return at


def reach(socket: Socket, id: int, seq: int) -> None:
    """Wait until a subscription has come to an event, or behind it."""
    eventually(
        lambda: any(
            m["t"] in ("ev", "mark") and m["id"] == id and m["s"] >= seq for m in socket.seen
        ),
        f"subscription {id} reaches {seq}",
    )


# Opening


def test_a_plain_socket_sees_everything(site: Server, caller: Caller) -> None:
    """A socket without a subprotocol is welcomed and subscribed to everything by itself."""
    socket = site.socket()
    welcome = socket.until(lambda m: True)
    assert (welcome["t"], welcome["ver"]) == ("welcome", 1)
    assert UUID7.fullmatch(welcome["conn"])
    snap = socket.until(lambda m: m["t"] == "snap")
    assert (snap["id"], snap["epoch"]) == (1, welcome["epoch"])
    job = count(caller, 3)
    assert socket.until(event_of(job["id"], "succeeded"))["row"]["progress"]["done"] == 3
    socket.close()


def test_a_plain_socket_is_read_only(site: Server, caller: Caller) -> None:
    """Commands over a socket without a subprotocol are refused."""
    job = count(caller, 100_000, 0.01)
    site.wait_for(job["id"], "running")
    socket = site.socket()
    for hello in (False, True):
        if hello:
            socket.say(t="hello", ver=1)
        socket.say(t="cmd", id=7, op="pause", job=job["id"])
        err = socket.until(lambda m: m["t"] in ("ack", "err") and m["id"] == 7)
        assert (err["t"], err["code"]) == ("err", "bad-request")
    assert site.job(job["id"])["state"] == "running"
    caller.post(f"/v1/jobs/{job['id']}/cancel")
    socket.close()


def test_hello_is_answered_by_welcome(site: Server) -> None:
    """The welcome tells the connection, where the log stands, and the limits."""
    socket = site.socket(JSON)
    assert socket.ws.subprotocol == JSON
    socket.say(t="hello", ver=1, cid="tab", feat=["now"], vis="visible", hb=15)
    welcome = socket.until(lambda m: True)
    assert welcome["t"] == "welcome"
    assert set(welcome) == {"t", "conn", "epoch", "s", "hb", "now", "limits", "feat", "ver"}
    assert welcome["hb"] == 15
    socket.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"not json", 4400),
        (b"", 4400),
        (b"{", 4400),
        (b'{"t": "sub", "id": 1}', 4400),
        (b'{"t": "cmd", "id": 1, "op": "start"}', 4400),
        (b'{"t": "hello", "ver": 2}', 4406),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_first_frame_closes_the_channel(site: Server, first: bytes, code: int) -> None:
    """What is no message, comes before hello, is of another version or too long, ends it."""
    socket = site.socket(JSON)
    socket.ws.send(first)
    assert socket.until_closed() == code
    socket.close()


def test_a_too_long_frame_closes_the_channel(live: Socket) -> None:
    """A message of more than 64 KiB ends the channel."""
    live.say(t="hb", pad="x" * (65 << 10))
    assert live.until_closed() == 1009


def test_a_binary_frame_closes_the_channel(live: Socket) -> None:
    """The channel speaks text only."""
    live.ws.send_binary(b'{"t": "hb"}')
    assert live.until_closed() == 4400


@pytest.mark.parametrize(
    ("message", "id"),
    [
        ({"t": "dance", "id": 3}, 3),
        ({"id": 4}, 4),
        ({"t": "sub", "id": "one"}, "one"),
        ({"t": "sub"}, None),
        ({"t": "sub", "id": 5, "f": {"colour": "red"}}, 5),
        ({"t": "sub", "id": 6, "f": {"kind": "count"}}, 6),
        ({"t": "cmd", "id": 7}, 7),
        ({"t": "cmd", "id": 8, "op": 5}, 8),
        ({"t": "cmd", "id": 9, "op": "pause", "job": "none", "if_v": "1"}, 9),
        ({"t": "more", "id": 99, "cursor": 1}, 99),
        (["t"], None),
        ([[[[]]]], None),
        (5, None),
    ],
    ids=str,
)
def test_a_wrong_message_is_answered_and_the_channel_stays(
    live: Socket, message: Any, id: Any
) -> None:
    """A message that is wrong in itself gets an err with its id; nothing is closed."""
    live.ws.send(json.dumps(message))
    err = live.until(lambda m: m["t"] == "err")
    assert err["id"] == id
    assert err["code"] in ("invalid-field", "bad-request")
    assert err["msg"]
    live.say(t="sub", id=1)
    live.until(lambda m: m["t"] == "snap")


def test_messages_may_come_as_a_list(site: Server) -> None:
    """Several messages may be sent in one frame."""
    socket = site.socket(JSON)
    socket.ws.send(json.dumps([{"t": "hello", "ver": 1}, {"t": "sub", "id": 2}]))
    assert socket.until(lambda m: m["t"] == "snap")["id"] == 2
    socket.close()


# Events


def test_events_follow_each_other_without_a_gap(live: Socket, caller: Caller) -> None:
    """Each event points to the one before, and a job's versions are complete and in order."""
    snap = subscribe(live)
    jobs = [count(caller, 5) for _ in range(10)]
    for job in jobs:
        caller.server.wait_for(job["id"], "succeeded")
    last = max(
        event["seq"]
        for job in jobs
        for event in caller.get(f"/v1/jobs/{job['id']}/events").json["items"]
    )
    reach(live, 1, last)
    assert check_chain(live.seen, 1, snap["s"]) >= last
    for job in jobs:
        events = [m for m in live.seen if m["t"] == "ev" and m["row"]["id"] == job["id"]]
        assert [m["to"] for m in events] == ["queued", "running", "succeeded"]
        assert [m["row"]["version"] for m in events] == [1, 2, 3]
        assert [m["cause"] for m in events] == ["created", "claimed", "done"]
        row = caller.get(f"/v1/jobs/{job['id']}").json
        assert events[-1]["row"] == {k: v for k, v in row.items() if k != "params"}


def test_a_snapshot_holds_what_is_there(live: Socket, caller: Caller) -> None:
    """A snapshot has the rows of the list without their parameters, and the counts."""
    job = count(caller, 100_000, 0.01)
    caller.server.wait_for(job["id"], "running")
    snap = subscribe(live)
    row = next(row for row in snap["jobs"] if row["id"] == job["id"])
    assert row["state"] == "running" and "params" not in row
    assert (row["h"], row["version"]) == (job["h"], 2)
    assert snap["counts"]["running"] >= 1
    caller.post(f"/v1/jobs/{job['id']}/cancel")


def test_filters_choose_the_jobs(live: Socket, caller: Caller, name: str) -> None:
    """By kind, by state and by id: each subscription sees its own, and its chain is whole."""
    caller.store(name, b"x")
    old = count(caller, 0)
    caller.server.wait_for(old["id"], "succeeded")
    job = count(caller, 100_000, 0.01)
    caller.server.wait_for(job["id"], "running")
    snaps = {
        1: subscribe(live, 1, f={"kind": ["upload"]}),
        2: subscribe(live, 2, f={"kind": ["count"], "state": ["running", "paused"]}),
        3: subscribe(live, 3, f={"jobs": [old["id"], job["id"], "none"]}),
        4: subscribe(live, 4, f={"owner": "somebody"}),
        5: subscribe(live, 5, f={"jobs": [old["id"], job["id"]], "state": ["running"]}),
    }
    assert {row["kind"] for row in snaps[1]["jobs"]} == {"upload"}
    assert {row["state"] for row in snaps[2]["jobs"]} == {"running"}
    assert {row["id"] for row in snaps[3]["jobs"]} == {old["id"], job["id"]}
    assert snaps[4]["jobs"] == []
    assert [row["id"] for row in snaps[5]["jobs"]] == [job["id"]]
    caller.post(f"/v1/jobs/{job['id']}/pause")
    caller.store(name, b"y")
    other = count(caller, 0)
    caller.server.wait_for(other["id"], "succeeded")
    caller.post(f"/v1/jobs/{job['id']}/cancel")
    caller.server.wait_for(job["id"], "cancelled")
    history = caller.get(f"/v1/jobs/{job['id']}/events").json["items"]
    for id in (1, 2, 3, 4, 5):
        reach(live, id, history[-1]["seq"])
        check_chain(live.seen, id, snaps[id]["s"])

    def seen(id: int) -> list[Any]:
        return [m for m in live.seen if m["t"] == "ev" and m["id"] == id]

    assert {m["row"]["kind"] for m in seen(1)} == {"upload"}
    # Each of them by its old or its new state, so that leaving shows.
    mine = [(m["from"], m["to"]) for m in seen(2) if m["row"]["id"] == job["id"]]
    assert mine == [("running", "pausing"), ("pausing", "paused"), ("paused", "cancelling")]
    assert {m["row"]["id"] for m in seen(3)} == {job["id"]}
    assert len(seen(3)) == 4
    assert seen(4) == []
    assert [(m["from"], m["to"]) for m in seen(5)] == [("running", "pausing")]


def test_an_ended_subscription_is_silent(live: Socket, caller: Caller) -> None:
    """After unsub nothing comes for that subscription, while others go on."""
    subscribe(live, 1)
    subscribe(live, 2)
    live.say(t="unsub", id=1)
    live.say(t="cmd", id=1, op="none")
    live.until(lambda m: m["t"] == "err")  # so the unsub was heard
    at = len(live.seen)
    job = count(caller, 0)
    live.until(event_of(job["id"], "succeeded"))
    assert {m["id"] for m in live.seen[at:] if m["t"] == "ev"} == {2}


def test_progress_is_told_by_its_latest_value(live: Socket, caller: Caller) -> None:
    """Progress comes some ten times a second, rising, and the last of it with the final event."""
    subscribe(live)
    began = monotonic()
    job = count(caller, 1200, 0.001)
    last = live.until(event_of(job["id"], "succeeded"), 60)
    took_s = monotonic() - began
    rows = [row for m in live.seen if m["t"] == "p" for row in m["u"] if row[0] == job["h"]]
    done = [row[2] for row in rows]
    assert done == sorted(done)
    assert 3 <= len(set(done)) <= took_s * 11 + 2
    assert {row[1] for row in rows} == {2}  # the version that it belongs to
    assert {row[5] for row in rows} <= {1200, None}
    assert (last["row"]["progress"]["done"], last["row"]["progress"]["total"]) == (1200, 1200)


def test_the_last_progress_of_a_short_request_is_told(live: Socket, caller: Caller) -> None:
    """An upload in blocks moves on with each of them, also if none is open when it is told."""
    subscribe(live)

    def moved_to(done: int) -> Callable[[Any], bool]:
        return lambda m: m["t"] == "p" and any(row[2] == done for row in m["u"])

    for n in range(3):
        caller.block("blocks.bin", 9 * n, bytes(9), "&file_size=90")
        live.until(moved_to(9 * (n + 1)))


def test_a_hidden_page_gets_less(live: Socket, caller: Caller) -> None:
    """Who says that nobody looks gets progress once a second."""
    subscribe(live)
    live.say(t="set", vis="hidden")
    live.say(t="cmd", id=1, op="none")
    live.until(lambda m: m["t"] == "err")
    began = monotonic()
    job = count(caller, 1200, 0.001)
    live.until(event_of(job["id"], "succeeded"), 60)
    told = sum(m["t"] == "p" for m in live.seen)
    assert told <= (monotonic() - began) * 1.2 + 2


def test_counts_and_numbers_come_once_a_second(site: Server, caller: Caller) -> None:
    """The counts come when they have changed, the numbers of now to who asks for them."""
    socket = site.socket(JSON)
    socket.say(t="hello", ver=1, feat=["now"])
    subscribe(socket)
    now = socket.until(lambda m: m["t"] == "now")
    assert set(now) >= {
        *("in_bytes_per_s", "out_bytes_per_s", "running", "slots", "queued", "free_bytes"),
        *("loop_lag_ms", "running_by_kind", "subscribers", "disk_bytes"),
    }
    assert now["subscribers"] >= 1
    job = count(caller, 100_000, 0.01)
    told = socket.until(lambda m: m["t"] == "counts" and m["n"].get("running"))
    assert (told["id"], told["s"] > 0) == (1, True)
    caller.post(f"/v1/jobs/{job['id']}/cancel")
    socket.close()


# Snapshots in pages


@pytest.mark.parametrize("by_id", [False, True])
def test_a_long_snapshot_comes_in_pages(live: Socket, caller: Caller, by_id: bool) -> None:
    """Of many jobs the first page comes at once and each next one for the asking."""
    ids = [count(caller, 0)["id"] for _ in range(120)]
    for job_id in ids:
        caller.server.wait_for(job_id, "succeeded")
    snap = subscribe(live, f={"jobs": ids} if by_id else {})
    rows, at = snap["jobs"], snap["s"]
    assert (snap["page"], len(rows), snap["last"]) == (1, 50, False)
    while not snap["last"]:
        live.say(t="more", id=1, cursor=snap["cursor"])
        snap = live.until(lambda m: m["t"] == "snap")
        assert snap["s"] >= at
        rows += snap["jobs"]
    found = [row["id"] for row in rows]
    assert len(found) == len(set(found))
    assert set(ids) <= set(found)
    if by_id:
        assert len(found) == len(ids)


def test_subscriptions_are_limited(live: Socket) -> None:
    """One subscription too many is refused; the others stay."""
    for id in range(1, 33):
        live.say(t="sub", id=id, f={"kind": ["none"]})
    live.until(lambda m: m["t"] == "snap" and m["id"] == 32)
    live.say(t="sub", id=33)
    assert live.until(lambda m: m["t"] == "err")["id"] == 33
    subscribe(live, 32)


# Going on after a cut


def test_a_cut_subscriber_misses_and_repeats_nothing(site: Server, caller: Caller) -> None:
    """Who comes back with its cursor gets exactly the events that it has not seen."""
    first = site.socket(JSON)
    first.say(t="hello", ver=1)
    snap = subscribe(first)
    job = count(caller, 100_000, 0.01)
    seen = first.until(event_of(job["id"], "running"))
    assert first.ws.sock is not None
    first.ws.sock.shutdown(SHUT_RDWR)  # without a word
    epoch, at = snap["epoch"], seen["s"]
    for verb, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        caller.post(f"/v1/jobs/{job['id']}/{verb}")
        site.wait_for(job["id"], state)
    second = site.socket(JSON)
    second.say(t="hello", ver=1)
    second.say(t="sub", id=1, epoch=epoch, s=at)
    ack = second.until(lambda m: m.get("id") == 1)
    assert (ack["t"], ack["s"], ack["resumed"]) == ("ack", at, True)
    second.until(event_of(job["id"], "cancelled"))
    check_chain(second.seen, 1, at)
    told = [
        m["row"]["version"]
        for m in first.seen + second.seen
        if m["t"] == "ev" and m["row"]["id"] == job["id"]
    ]
    history = caller.get(f"/v1/jobs/{job['id']}/events").json["items"]
    assert told == [event["version"] for event in history]
    assert not any(m["t"] in ("snap", "reset") for m in second.seen)
    second.close()


def test_a_cursor_at_the_end_is_just_acknowledged(live: Socket) -> None:
    """Who has missed nothing gets an ack and nothing else."""
    snap = subscribe(live, 1, f={"kind": ["none"]})
    live.say(t="sub", id=2, epoch=snap["epoch"], s=snap["s"], f={"kind": ["none"]})
    assert live.until(lambda m: m.get("id") == 2)["t"] == "ack"


@pytest.mark.parametrize(("epoch", "s"), [("other", 1), (None, 1), ("", 0), ("same", 10**9)])
def test_a_cursor_of_another_log_is_reset(live: Socket, epoch: str | None, s: int) -> None:
    """A cursor that can't be honoured gets a reset, and then a whole snapshot."""
    snap = subscribe(live, 1)
    given = snap["epoch"] if epoch == "same" else epoch
    live.say(t="sub", id=2, epoch=given, s=s)
    ack = live.until(lambda m: m.get("id") == 2)
    assert (ack["t"], ack["resumed"]) == ("ack", False)
    reset = live.until(lambda m: m.get("id") == 2)
    assert (reset["t"], reset["why"], reset["epoch"]) == ("reset", "epoch", snap["epoch"])
    assert live.until(lambda m: m.get("id") == 2 and m["t"] == "snap")["page"] == 1


def test_a_subscriber_goes_on_after_a_restart(serve: Serve) -> None:
    """A stopping server says bye and closes with 1012; the cursor holds over the restart."""
    server = serve()
    caller = Caller(server, "c")
    socket = server.socket(JSON)
    socket.say(t="hello", ver=1)
    snap = subscribe(socket)
    job = count(caller, 100_000, 0.01)
    at = socket.until(event_of(job["id"], "running"))["s"]
    assert server.stop() == 0
    bye = socket.until(lambda m: m["t"] == "bye")
    assert (bye["why"], bye["final"]) == ("restart", False)
    assert bye["retry_ms"] > 0
    assert socket.until_closed() == 1012
    socket.close()
    at = check_chain(socket.seen, 1, snap["s"])
    server.start()
    again = server.socket(JSON)
    again.say(t="hello", ver=1)
    again.say(t="sub", id=1, epoch=snap["epoch"], s=at)
    assert again.until(lambda m: m.get("id") == 1)["t"] == "ack"
    again.until(event_of(job["id"], "running"))
    check_chain(again.seen, 1, at)
    told = [
        m["row"]["version"]
        for m in socket.seen + again.seen
        if m["t"] == "ev" and m["row"]["id"] == job["id"]
    ]
    assert told == list(range(1, len(told) + 1))
    caller.post(f"/v1/jobs/{job['id']}/cancel")
    again.close()


# Who may be here


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "c2x1aWNlIHRlc3RzIGl0cw==",
}


def test_the_address_takes_no_parameters(site: Server) -> None:
    """A token in the address would end up in logs: any query is refused before the upgrade."""
    answer = site.request("GET", "/v1/ws?token=secret", headers=UPGRADE)
    assert (answer.status, answer.json["code"]) == (400, "invalid-field")


@pytest.mark.parametrize(("token", "status"), [("c2VjcmV0", 101), ("a-_9", 101), ("?", 400)])
def test_a_token_comes_as_a_subprotocol(site: Server, token: str, status: int) -> None:
    """A token beside the protocol is accepted and never sent back; a malformed one is refused."""
    with Raw(site) as raw:
        raw.head("GET", "/v1/ws", **UPGRADE, Sec_WebSocket_Protocol=f"{JSON}, auth.{token}")
        answer = raw.answer()
    assert answer.status == status
    assert answer.headers.get("Sec-Websocket-Protocol") == (JSON if status == 101 else None)


def test_a_newer_tab_replaces_an_older(site: Server) -> None:
    """A second socket of the same tab ends the first with 4409; other tabs are left alone."""

    def tab(cid: str) -> Socket:
        socket = site.socket(JSON)
        socket.say(t="hello", ver=1, cid=cid)
        socket.until(lambda m: m["t"] == "welcome")
        return socket

    older, other, nameless, newer = tab("one"), tab("two"), tab(""), tab("one")
    tab("").close()
    assert older.until_closed() == 4409
    for socket in (other, nameless, newer):
        subscribe(socket)
        socket.close()
    older.close()


def test_one_owner_has_so_many_connections(serve: Serve) -> None:
    """One socket too many is closed with 4429, a stream or a poll is a 429; leaving makes room."""
    server = serve("--max-sockets", "2")
    first, second = server.socket(JSON), server.socket(JSON)
    for socket in (first, second):
        socket.say(t="hello", ver=1)
        subscribe(socket)
    third = server.socket(JSON)
    assert third.until_closed() == 4429
    third.close()
    for accept in ("text/event-stream", "application/json"):
        answer = server.get("/v1/events", Accept=accept)
        assert (answer.status, answer.json["code"]) == (429, "too-many-sockets")
        assert "Retry-After" in answer.headers
    first.close()
    eventually(lambda: server.get("/v1/events").status == 200, "there is room again")
    second.close()


def test_too_many_messages_in_a_frame_close_the_channel(live: Socket) -> None:
    """A list of more than a hundred messages is no honest frame."""
    live.ws.send(json.dumps([{"t": "hb"}] * 101))
    assert live.until_closed() == 4400


def test_who_says_too_much_is_slowed_down(live: Socket) -> None:
    """A flood is read no faster than the limit allows, nothing of it is lost, nobody is closed."""
    began = monotonic()
    for _ in range(14):  # a thousand at once, then 200 a second
        live.ws.send(json.dumps([{"t": "hb"}] * 100))
    live.say(t="more", id=9, cursor=1)
    live.until(lambda m: m["t"] == "err")
    assert monotonic() - began > 1.5


# Leaving the filter, and searching


def test_a_row_that_leaves_the_filter_says_so(live: Socket, caller: Caller, name: str) -> None:
    """By its state and by its name: the last event of it is marked."""
    subscribe(live, 1, f={"q": name, "state": ["queued", "running"]})
    job = count(caller, 0, name=f"The {name.upper()}")
    left = live.until(event_of(job["id"], "succeeded"))
    assert left["out"] is True
    snap = subscribe(live, 2, f={"q": name})
    assert [row["id"] for row in snap["jobs"]] == [job["id"]]
    subscribe(live, 3, f={"q": job["id"]})
    patched = caller.server.request("PATCH", f"/v1/jobs/{job['id']}", {"name": "another"})
    assert patched.status == 200

    def renamed(id: int) -> Any:
        return next(
            (m for m in live.seen if m["t"] == "ev" and m["id"] == id and m["cause"] == "renamed"),
            None,
        )

    assert eventually(lambda: renamed(2), "who searched by name is told")["out"] is True
    assert "out" not in eventually(lambda: renamed(3), "who searched by id is told")
    assert "out" not in next(m for m in live.seen if m["t"] == "ev" and m["to"] == "running")


# Logs


TALK = """
import msgspec

KIND, TITLE, UNIT, PAUSE = "talk", "Talk", "steps", "at once"


class Params(msgspec.Struct, forbid_unknown_fields=True):
    lines: int = 3


async def run(ctx, params):
    for i in range(params.lines):
        ctx.log(f"line {i}")
        await ctx.checkpoint(i, done=i, total=params.lines)
        await ctx.sleep(0.2)
    return {}
"""


def test_a_log_is_followed(tmp_path: Path) -> None:
    """The newest lines that are there, then each new one; or from a number on; and of no other."""
    kind = tmp_path / "talk.py"
    kind.write_text(TALK)
    server = Server(tmp_path / "data")
    server.env = {"SLUICE_KINDS": str(kind)}
    server.start()
    body = {"kind": "talk", "params": {"lines": 4}}
    job = server.post("/v1/jobs", body).json["id"]
    other = server.post("/v1/jobs", body).json["id"]
    socket = server.socket(JSON)
    socket.say(t="hello", ver=1)
    socket.say(t="sub", id=1, log=job)
    ack = socket.until(lambda m: m["t"] in ("ack", "err"))
    assert (ack["t"], ack["id"]) == ("ack", 1)

    def lines(id: int) -> list[tuple[int, str]]:
        told = [m for m in socket.seen if m["t"] == "log" and m["id"] == id]
        assert {m["j"] for m in told} <= {job}
        assert all(m["from"] == m["lines"][0]["n"] for m in told)
        return [(line["n"], line["line"]) for m in told for line in m["lines"]]

    said = [(n, f"line {n - 1}") for n in range(1, 5)]
    eventually(lambda: len(lines(1)) >= 4, "all lines have come")
    assert lines(1) == said
    socket.ws.send(
        json.dumps(
            [
                {"t": "sub", "id": 2, "log": job, "from": 2},
                {"t": "sub", "id": 3, "log": job, "from": -1},
                {"t": "sub", "id": 4, "log": "none"},
            ]
        )
    )
    assert socket.until(lambda m: m["t"] == "err")["id"] == 4
    eventually(lambda: len(lines(2)) >= 2 and lines(3), "the old ones have come")
    assert (lines(2), lines(3)) == (said[2:], said[3:])
    server.wait_for(other, "succeeded")
    socket.close()
    server.close()


# What a slow reader gets


def test_a_reader_that_stops_gets_everything_later(site: Server, caller: Caller) -> None:
    """What could not be sent is not kept, and still comes, in order and whole."""
    ws = websocket.create_connection(
        f"ws://127.0.0.1:{site.port}/v1/ws",
        subprotocols=[JSON],
        timeout=30,
        sockopt=[(SOL_SOCKET, SO_RCVBUF, 4096)],
    )
    ws.send(json.dumps([{"t": "hello"}, {"t": "sub", "id": 1, "f": {"kind": ["count"]}}]))
    jobs = [count(caller, 0)["id"] for _ in range(150)]
    for job_id in jobs:
        site.wait_for(job_id, "succeeded")
    seen: list[Any] = []
    while sum(m["t"] == "ev" and m["to"] == "succeeded" for m in seen) < 150:
        said = json.loads(ws.recv())
        seen += said if isinstance(said, list) else [said]
    at = next(m["s"] for m in seen if m["t"] == "snap")
    check_chain(seen, 1, at)
    told = [(m["row"]["id"], m["row"]["version"]) for m in seen if m["t"] == "ev"]
    assert set(told) == {(job_id, v) for job_id in jobs for v in (1, 2, 3)}
    assert len(told) == len(set(told))
    ws.close()


# Commands


def command(socket: Socket, id: int, op: str, **more: Any) -> Any:
    """Send a command; its ack or err."""
    socket.say(t="cmd", id=id, op=op, **more)
    return socket.until(lambda m: m["t"] in ("ack", "err") and m["id"] == id)


def test_a_job_is_run_by_commands(live: Socket, caller: Caller) -> None:
    """Start, pause, resume, cancel, retry and delete are each acknowledged after their commit."""
    params = {"steps": 100_000, "delay_s": 0.01}
    ack = command(live, 1, "start", args={"kind": "count", "params": params, "name": "by hand"})
    assert (ack["t"], ack["v"]) == ("ack", 1)
    job_id = ack["job"]
    assert caller.server.wait_for(job_id, "running")["name"] == "by hand"
    for id, (op, state) in enumerate(
        [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")], 2
    ):
        ack = command(live, id, op, job=job_id)
        assert (ack["t"], ack["job"]) == ("ack", job_id)
        row = caller.server.wait_for(job_id, state)
        assert row["version"] >= ack["v"]
        assert row["by"]["via"] == "ws"
    again = command(live, 5, "retry", job=job_id)
    assert again["t"] == "ack" and again["job"] != job_id
    assert caller.server.job(again["job"])["retry_of"] == job_id
    assert command(live, 6, "cancel", job=again["job"])["t"] == "ack"
    gone = command(live, 7, "delete", job=job_id)
    assert (gone["t"], gone["job"], gone["v"]) == ("ack", job_id, None)
    assert caller.get(f"/v1/jobs/{job_id}").status == 404


def test_a_delete_is_an_event(live: Socket, caller: Caller) -> None:
    """That a job was deleted is told to who had it."""
    subscribe(live)
    job = count(caller, 0)
    live.until(event_of(job["id"], "succeeded"))
    assert command(live, 1, "delete", job=job["id"])["t"] == "ack"
    deleted = event_of(job["id"], "deleted")
    eventually(lambda: any(deleted(m) for m in live.seen), "the event of the delete")


@pytest.mark.parametrize(
    ("op", "more", "code", "field"),
    [
        ("pause", {"job": "none"}, "job-unknown", None),
        ("pause", {}, "invalid-field", "job"),
        ("dance", {"job": "none"}, "invalid-field", "op"),
        ("retry", {"job": "none"}, "job-unknown", None),
        ("delete", {"job": "none"}, "job-unknown", None),
        ("start", {}, "invalid-field", "kind"),
        ("start", {"job": "none", "args": {"kind": "count"}}, "invalid-field", "job"),
        ("pause", {"job": "none", "jobs": ["none"]}, "invalid-field", "jobs"),
        ("pause", {"jobs": ["none"], "if_v": 1}, "invalid-field", "if_v"),
        ("pause", {"f": {"jobs": ["none"]}}, "invalid-field", "f"),
        ("pause", {"job": "none", "args": {"force": 5}}, "invalid-field", "force"),
        ("start", {"args": {"kind": "nope"}}, "unknown-kind", "kind"),
        ("start", {"args": {"kind": "upload"}}, "kind-not-startable", "kind"),
        ("start", {"args": {"kind": "count", "params": 5}}, "invalid-field", "params"),
        ("start", {"args": {"kind": "count", "params": {"steps": "x"}}}, None, "params.steps"),
    ],
)
def test_a_wrong_command_gets_an_err(
    live: Socket, op: str, more: dict[str, Any], code: str | None, field: str | None
) -> None:
    """An err has the code, the text and the field that REST would give."""
    err = command(live, 1, op, **more)
    assert (err["t"], err["code"], err["field"]) == ("err", code or "invalid-field", field)
    assert err["msg"] and err["next"] and err["retry"] is False


def test_a_command_may_name_the_version_it_means(live: Socket, caller: Caller) -> None:
    """With if_v a command is obeyed only if the job has not changed since."""
    job = count(caller, 100_000, 0.01)
    job = caller.server.wait_for(job["id"], "running")
    err = command(live, 1, "pause", job=job["id"], if_v=job["version"] - 1)
    assert (err["t"], err["code"], err["retry"]) == ("err", "version-mismatch", True)
    assert command(live, 2, "cancel", job=job["id"], if_v=job["version"])["t"] == "ack"


def test_a_command_that_comes_too_late_gets_an_err(live: Socket, caller: Caller) -> None:
    """A job that has ended can't be paused."""
    job = count(caller, 0)
    caller.server.wait_for(job["id"], "succeeded")
    assert command(live, 1, "pause", job=job["id"])["code"] == "job-finished"


def test_commands_of_one_job_keep_their_order(live: Socket, caller: Caller) -> None:
    """Commands that are sent at once are obeyed one after the other."""
    jobs = [count(caller, 100_000, 0.01) for _ in range(3)]
    for job in jobs:
        caller.server.wait_for(job["id"], "running")
    ops = ["pause", "resume", "pause", "resume", "cancel"]
    live.ws.send(
        json.dumps(
            [
                {"t": "cmd", "id": f"{i}-{n}", "op": op, "job": job["id"]}
                for n, op in enumerate(ops)
                for i, job in enumerate(jobs)
            ]
        )
    )
    for job in jobs:
        caller.server.wait_for(job["id"], "cancelled")

    def answers() -> list[Any]:
        return [m for m in live.seen if m["t"] in ("ack", "err")]

    eventually(lambda: len(answers()) == 15, "all are answered")
    assert {m["t"] for m in answers()} == {"ack"}
    for i in range(3):
        mine = [m for m in answers() if m["id"].startswith(f"{i}-")]
        assert [m["id"] for m in mine] == [f"{i}-{n}" for n in range(5)]
        versions = [m["v"] for m in mine]
        assert versions == sorted(versions)


def test_too_many_commands_at_once_are_refused(live: Socket, caller: Caller) -> None:
    """Of a flood of commands some are refused as busy; each gets exactly one answer."""
    jobs = [{"t": "cmd", "id": i, "op": "retry", "job": "none"} for i in range(40)]
    live.ws.send(json.dumps(jobs))
    eventually(lambda: sum(m["t"] == "err" for m in live.seen) == 40, "all are answered")
    errs = [m for m in live.seen if m["t"] == "err"]
    assert sorted(m["id"] for m in errs) == list(range(40))
    codes = [m["code"] for m in errs]
    assert set(codes) == {"busy", "job-unknown"}
    assert codes.count("job-unknown") == 16
    assert command(live, 99, "retry", job="none")["code"] == "job-unknown"


def test_a_list_is_commanded_at_once(live: Socket, caller: Caller) -> None:
    """One ack tells how many are as was asked for, and which are not, and why."""
    jobs = [count(caller, 100_000, 0.01)["id"] for _ in range(3)]
    for job_id in jobs:
        caller.server.wait_for(job_id, "running")
    ack = command(live, 1, "pause", jobs=[*jobs, "none"])
    assert (ack["t"], ack["n"], ack["failures"]) == ("ack", 3, 1)
    assert [(one["job"], one["code"]) for one in ack["failed"]] == [("none", "job-unknown")]
    for job_id in jobs:
        caller.server.wait_for(job_id, "paused")
    assert command(live, 2, "cancel", jobs=jobs)["n"] == 3


def test_all_that_a_filter_takes_is_commanded(live: Socket, caller: Caller, name: str) -> None:
    """By text and kind; of the owner's own jobs only, whatever the filter says."""
    jobs = [count(caller, 100_000, 0.01, name=f"{name} {i}")["id"] for i in range(3)]
    for job_id in jobs:
        caller.server.wait_for(job_id, "running")
    assert command(live, 1, "cancel", f={"q": name, "owner": "somebody"})["n"] == 0
    assert command(live, 2, "pause", f={"q": name, "kind": ["upload"]})["n"] == 0
    ack = command(live, 3, "cancel", f={"q": name, "kind": ["count"]})
    assert (ack["t"], ack["n"]) == ("ack", 3)
    for job_id in jobs:
        caller.server.wait_for(job_id, "cancelled")
    assert command(live, 4, "delete", f={"q": name})["n"] == 3


def test_a_command_under_a_key_is_done_once(live: Socket, caller: Caller, name: str) -> None:
    """Repeated it is answered the same, without effect; another one under the key is refused."""
    start = {"args": {"kind": "count", "params": {"steps": 0}, "name": name}, "key": name}
    first = command(live, 1, "start", **start)
    again = command(live, 2, "start", **start)
    assert (again["job"], again["v"]) == (first["job"], first["v"])
    assert len(caller.get(f"/v1/jobs?q={name}").json["items"]) == 1
    assert command(live, 3, "cancel", job=first["job"], key=name)["code"] == "key-reused"
    for key in ("", "x" * 129, "two words", "ü"):
        refused = command(live, 4, "start", **start | {"key": key})
        assert (refused["code"], refused["field"]) == ("invalid-field", "key")


# What takes long, begun before the first test


def test_who_does_not_say_hello_is_closed(silent: Silent) -> None:
    """A socket that says nothing is closed with 4511 after some five seconds."""
    assert silent.mute.until_closed() == 4511
    assert silent.mute.seen == []


def test_silence_is_broken_by_a_heartbeat(silent: Silent) -> None:
    """Within 15 seconds of silence the server says where the log stands."""
    heartbeat = silent.quiet.until(lambda m: m["t"] == "hb", 60)
    welcome = silent.quiet.seen[0]
    assert heartbeat["s"] >= welcome["s"]
    # By the server's clock, as this test may look long after it came; a busy server may be late.
    assert 11_000 < heartbeat["now"] - welcome["now"] < 40_000
    silent.quiet.say(t="hb", s=heartbeat["s"], lag=0.001)
    assert command(silent.quiet, 1, "retry", job="none")["t"] == "err"
