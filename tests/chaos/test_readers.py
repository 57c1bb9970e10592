"""Subscribers that read nothing, or too slowly: what they cost, and that they lose nothing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from socket import SO_RCVBUF, SOL_SOCKET
from typing import Any

import pytest
import websocket

from tests.conftest import Serve
from tests.harness import FULL, Server, eventually

READERS, TRANSITIONS = (1000, 100_000) if FULL else (60, 1500)
KIB_EACH = 64
FLIGHT = 16  # commands at once

pytestmark = pytest.mark.chaos


def a_reader(server: Server, cursor: Any = None) -> websocket.WebSocket:
    """A subscriber to everything with little room, which has read nothing yet."""
    ws = websocket.create_connection(
        f"ws://127.0.0.1:{server.port}/v1/ws",
        subprotocols=["jobs.v1.json"],
        suppress_origin=True,
        timeout=60,
        sockopt=[(SOL_SOCKET, SO_RCVBUF, 4096)],
    )
    ws.send(json.dumps([{"t": "hello"}, {"t": "sub", "id": 1, **(cursor or {})}]))
    return ws


def messages(ws: websocket.WebSocket) -> Iterator[Any]:
    """What it reads, to its end."""
    while True:
        frame = ws.recv_frame()  # type: ignore[no-untyped-call] # the server sends no fragments
        if frame.opcode == websocket.ABNF.OPCODE_CLOSE:
            yield {"t": "closed", "code": int.from_bytes(frame.data[:2], "big")}
            return
        if frame.opcode == websocket.ABNF.OPCODE_PING:
            with contextlib.suppress(OSError):  # it may have hung up; what it said is still there
                ws.pong(frame.data)
            continue
        said = json.loads(frame.data)
        yield from said if isinstance(said, list) else [said]


def make_transitions(server: Server, n: int) -> None:
    """Run jobs that end at once: three transitions each."""
    channel = server.socket("jobs.v1.json")
    channel.say(t="hello", ver=1)
    start = {"t": "cmd", "op": "start", "args": {"kind": "count", "params": {"steps": 0}}}
    asked = answered = 0
    while answered < n // 3:
        while asked < n // 3 and asked - answered < FLIGHT:
            asked += 1
            channel.say(**start, id=asked)
        ack = channel.until(lambda m: m["t"] in ("ack", "err"), 60)
        assert ack["t"] == "ack", ack
        answered += 1
    eventually(
        lambda: server.get("/v1/jobs?limit=1").json["counts"].get("succeeded", 0) >= n // 3,
        "all have ended",
        120,
    )
    channel.close()


def newest(server: Server) -> int:
    """The place behind the last event."""
    return int(server.get("/v1/jobs?limit=1").json["cursor"].rpartition(":")[2])


def test_who_does_not_read_costs_no_more_than_its_connection(serve: Serve) -> None:
    """Many that never read cost under 64 KiB each, and one that reads in the end gets all."""
    server = serve("--max-sockets", "5000", "--max-queued", "1000000", "--slots", "100")
    make_transitions(server, 15_000 if FULL else 4500)  # fills the ring, and warms all up
    before_kib = server.status("VmRSS")
    began = time.monotonic()
    readers = [a_reader(server) for _ in range(READERS)]
    late = a_reader(server)
    seq = newest(server)
    make_transitions(server, TRANSITIONS)
    each_kib = (server.status("VmRSS") - before_kib) / READERS
    print(f"{READERS} readers, {TRANSITIONS} transitions: {each_kib:.1f} KiB each")
    assert each_kib < KIB_EACH
    last, at, told, cursor = newest(server), None, 0, None
    while at is None or at < last:
        for message in messages(late):
            if message["t"] == "snap":
                at = message["s"] if at is None else at
                cursor = {"epoch": message["epoch"]}
            elif message["t"] in ("ev", "mark"):
                assert message["p"] == at
                at, told = message["s"], told + (message["t"] == "ev")
            elif message["t"] == "closed":  # that took more than half a minute: it comes back
                assert message["code"] == 4508
                assert time.monotonic() - began > 30
                late.shutdown()  # type: ignore[no-untyped-call]
                late = a_reader(server, {**(cursor or {}), "s": at})
            if at is not None and at >= last:
                break
    assert told == last - seq
    for ws in (*readers, late):
        ws.shutdown()  # type: ignore[no-untyped-call]


if FULL:

    def test_who_reads_nothing_for_half_a_minute_is_closed(serve: Serve) -> None:
        """It gets whole frames, then 4508, and resumes; one that reads slowly stays."""
        server = serve()
        stalled, slow = a_reader(server), a_reader(server)
        seq = newest(server)
        make_transitions(server, 3000)
        reading = messages(slow)
        at_slow, end = None, time.monotonic() + 45
        while time.monotonic() < end:
            message = next(reading)
            assert message["t"] != "closed"
            if message["t"] in ("snap", "ev", "mark"):
                at_slow = message["s"]
            time.sleep(0.02)
        assert at_slow is not None
        seen = list(messages(stalled))
        assert seen[-1] == {"t": "closed", "code": 4508}
        at = next(m["s"] for m in seen if m["t"] == "snap")
        epoch = next(m["epoch"] for m in seen if m["t"] == "snap")
        for message in seen:
            if message["t"] in ("ev", "mark"):
                assert message["p"] == at
                at = message["s"]
        assert seq <= at < newest(server)
        again = a_reader(server, {"epoch": epoch, "s": at})
        for message in messages(again):
            assert message["t"] not in ("snap", "reset", "closed")
            if message["t"] in ("ev", "mark"):
                assert message["p"] == at
                at = message["s"]
                if at == newest(server):
                    break
        for ws in (stalled, slow, again):
            ws.shutdown()  # type: ignore[no-untyped-call]
