"""The channel by SSE and by long-poll."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from tests.conftest import Serve
from tests.handlers.clients import Caller, Raw
from tests.harness import Server, eventually


class Sent(NamedTuple):
    """One server-sent event."""

    id: str | None
    message: Any


class Stream:
    """A reader of server-sent events, as a browser reads them (HTML section 9.2)."""

    def __init__(self, server: Server, query: str = "", **headers: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        sent = {"Accept": "text/event-stream"} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        self.connection.request("GET", f"/v1/events{query}", headers=sent)
        self.answer = self.connection.getresponse()
        self.last_id: str | None = None
        self.retry_ms: int | None = None

    def next(self) -> Sent | None:
        """The next event; None at the end."""
        id, data = None, []
        while line := self.answer.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "data":
                data.append(value)
            elif name == "id":
                id = value
            elif name == "retry":
                self.retry_ms = int(value)
            elif not name and data:
                self.last_id = id or self.last_id
                return Sent(id, json.loads("\n".join(data)))
        return None

    def until(self, t: str, **wanted: Any) -> Sent:
        """The next event of a type with some values."""
        while (sent := self.next()) is not None:
            if sent.message["t"] == t and wanted.items() <= sent.message.items():
                return sent
        raise EOFError

    def until_job(self, job_id: str, to: str) -> list[Sent]:
        """All transitions up to the one that brings a job into a state."""
        found = []
        while True:
            sent = self.until("ev")
            found.append(sent)
            if sent.message["row"]["id"] == job_id and sent.message["to"] == to:
                return found

    def close(self) -> None:
        """Go away."""
        self.answer.close()
        self.connection.close()


@contextmanager
def stream(server: Server, query: str = "", **headers: str) -> Iterator[Stream]:
    """A stream that is left at the end."""
    one = Stream(server, query, **headers)
    try:
        yield one
    finally:
        one.close()


def count(caller: Caller, steps: int = 0, delay_s: float = 0.0, **more: Any) -> Any:
    """Start a count."""
    params = {"steps": steps, "delay_s": delay_s}
    return caller.post("/v1/jobs", {"kind": "count", "params": params} | more).json


def poll(caller: Caller, query: str) -> Any:
    """One look."""
    answer = caller.get(f"/v1/events{query}")
    assert answer.status == 200, answer
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(answer.json) == {"events", "cursor", "reset"}
    return answer.json


def versions(events: list[Any], job_id: str) -> list[int]:
    """What was told of a job, of rows of either door."""
    rows = [event["row"] for event in events]
    return [row["version"] for row in rows if row["id"] == job_id]


# SSE


def test_a_stream_begins_with_a_snapshot(site: Server, caller: Caller) -> None:
    """Rows first, then each transition as it happens, with the row of the WebSocket."""
    old = count(caller)
    site.wait_for(old["id"], "succeeded")
    with stream(site) as one:
        assert one.answer.status == 200
        assert one.answer.headers["Content-Type"] == "text/event-stream"
        assert one.answer.headers["X-Accel-Buffering"] == "no"
        ack = one.until("ack")
        assert (ack.id, ack.message["resumed"]) == (None, False)
        assert one.retry_ms == 2000
        snap = one.until("snap")
        assert old["id"] in {row["id"] for row in snap.message["jobs"]}
        assert (snap.id is None) is not snap.message["last"]
        job = count(caller, 3)
        told = one.until_job(job["id"], "succeeded")
    assert versions([sent.message for sent in told], job["id"]) == [1, 2, 3]
    epoch = snap.message["epoch"]
    assert [sent.id for sent in told] == [f"{epoch}:{sent.message['s']}" for sent in told]
    row = site.job(job["id"])
    assert told[-1].message["row"] == {k: v for k, v in row.items() if k != "params"}


def test_all_pages_of_a_snapshot_come_unasked(site: Server, caller: Caller, name: str) -> None:
    """A stream can't ask for more; who is cut before the last page begins anew."""
    ids = [count(caller, name=f"{name} {i}")["id"] for i in range(120)]
    site.wait_for(ids[-1], "succeeded")
    with stream(site, f"?q={name}") as one:
        pages = [one.until("snap", page=page) for page in (1, 2, 3)]
    assert [page.message["last"] for page in pages] == [False, False, True]
    assert [page.id is not None for page in pages] == [False, False, True]
    assert sorted(row["id"] for page in pages for row in page.message["jobs"]) == sorted(ids)


@pytest.mark.parametrize("by", ["header", "after"])
def test_a_stream_goes_on_where_it_was_cut(site: Server, caller: Caller, by: str) -> None:
    """With Last-Event-ID, or after, exactly what was missed comes, and no snapshot."""
    with stream(site, "?kind=count") as one:
        one.until("snap", last=True)
        job = count(caller, 100_000, 0.01)
        one.until_job(job["id"], "running")
        last = one.last_id
    assert last is not None
    for verb, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        caller.post(f"/v1/jobs/{job['id']}/{verb}")
        site.wait_for(job["id"], state)
    query, headers = ("?kind=count", {"Last_Event_ID": last})
    if by == "after":
        query, headers = f"?kind=count&after={last}", {}
    with stream(site, query, **headers) as one:
        first = one.next()
        assert first is not None
        assert (first.message["t"], first.message["resumed"]) == ("ack", True)
        told = one.until_job(job["id"], "cancelled")
    history = caller.get(f"/v1/jobs/{job['id']}/events").json["items"]
    assert versions([sent.message for sent in told], job["id"]) == [
        event["version"] for event in history[2:]
    ]


def test_a_stream_of_another_log_is_reset(site: Server) -> None:
    """A cursor that can't be honoured gets a reset and a snapshot."""
    with stream(site, Last_Event_ID="other:1") as one:
        assert one.until("reset").message["why"] == "epoch"
        one.until("snap", page=1)


def test_a_stream_tells_progress(site: Server, caller: Caller) -> None:
    """Latest values come without an id, ten times a second at the most."""
    with stream(site, "?kind=count&rate=5") as one:
        one.until("snap", last=True)
        job = count(caller, 100_000, 0.01)
        told = [one.until("p") for _ in range(3)]
        assert all(sent.id is None for sent in told)
        done = [row[2] for sent in told for row in sent.message["u"] if row[0] == job["h"]]
        assert done == sorted(done)
        caller.post(f"/v1/jobs/{job['id']}/cancel")


def test_an_old_client_gets_a_stream_without_chunks(site: Server) -> None:
    """HTTP/1.0 knows no chunks: the bytes come as they are, until the end."""
    with Raw(site) as raw:
        raw.send(
            b"GET /v1/events?kind=none HTTP/1.0\r\nHost: localhost\r\n"
            b"Accept: text/event-stream\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += raw.file.readline()
        assert b"Transfer-Encoding" not in head
        lines = [raw.file.readline() for _ in range(3)]
    assert lines[0] == b"retry: 2000\n"
    assert lines[2].startswith(b"data: {")


def test_a_stopping_server_ends_streams_and_polls(serve: Serve) -> None:
    """A stream gets bye and its time to come back; a poll that waits is answered."""
    server = serve()
    caller = Caller(server, "c")
    at = poll(caller, "")["cursor"]
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(poll(caller, f"?after={at}&wait=60")))
    with stream(server) as one:
        one.until("snap")
        waiting.start()
        eventually(lambda: server.get("/v1/status").json["subscribers"] == 2, "the poll waits")
        server.stop()
        bye = one.until("bye")
        assert one.next() is None
        assert one.retry_ms == bye.message["retry_ms"]
    waiting.join(30)
    assert answers == [{"events": [], "cursor": at, "reset": None}]


# Long-poll


def test_a_poll_begins_at_the_end(caller: Caller) -> None:
    """Without a cursor it tells where the log stands, and nothing else."""
    count(caller)
    first = poll(caller, "")
    assert (first["events"], first["reset"]) == ([], None)
    listed = caller.get("/v1/jobs?limit=1").json["cursor"]
    assert listed.partition(":")[0] == first["cursor"].partition(":")[0]


def test_a_poll_returns_what_has_happened(site: Server, caller: Caller) -> None:
    """All transitions behind the cursor, as in the job's history, in pages without a gap."""
    at = poll(caller, "")["cursor"]
    job = count(caller)
    site.wait_for(job["id"], "succeeded")
    seen: list[Any] = []
    while len(versions(seen, job["id"])) < 3:
        page = poll(caller, f"?after={at}&limit=2")
        assert len(page["events"]) <= 2
        seen += page["events"]
        at = page["cursor"]
    mine = [event for event in seen if event["job"] == job["id"]]
    assert mine == caller.get(f"/v1/jobs/{job['id']}/events").json["items"]
    assert at == f"{at.partition(':')[0]}:{seen[-1]['seq']}"


def test_a_poll_waits_for_what_it_wants(caller: Caller, name: str) -> None:
    """It returns with the first transition that passes its filter, long before its time is over."""
    at = poll(caller, "")["cursor"]
    answers: list[Any] = []
    waiting = threading.Thread(
        target=lambda: answers.append(poll(caller, f"?after={at}&wait=60&q={name}"))
    )
    waiting.start()
    count(caller)
    job = count(caller, name=f"the {name}")
    waiting.join(30)
    assert not waiting.is_alive()
    assert {event["job"] for event in answers[0]["events"]} == {job["id"]}


def test_a_poll_ends_after_its_time(caller: Caller) -> None:
    """With nothing to tell it returns an empty page; the cursor has moved over what others did."""
    at = poll(caller, "")["cursor"]
    count(caller)
    began = time.monotonic()
    page = poll(caller, f"?after={at}&wait=0.5&kind=none")
    assert 0.4 <= time.monotonic() - began < 20
    assert (page["events"], page["reset"]) == ([], None)
    assert int(page["cursor"].rpartition(":")[2]) > int(at.rpartition(":")[2])


@pytest.mark.parametrize(("cursor", "why"), [("other:1", "epoch"), ("{}:999999999", "epoch")])
def test_a_poll_of_another_log_is_reset(caller: Caller, cursor: str, why: str) -> None:
    """It says so, with the cursor of now, instead of leaving something out."""
    now = poll(caller, "")["cursor"]
    page = poll(caller, f"?after={cursor.format(now.partition(':')[0])}")
    assert (page["events"], page["reset"]) == ([], why)
    assert page["cursor"].partition(":")[0] == now.partition(":")[0]


def test_what_was_forgotten_is_a_reset(serve: Serve) -> None:
    """Who has been away for longer than the log goes back is told, at both doors."""
    server = serve("--keep-events", "100")
    caller = Caller(server, "c")
    at = poll(caller, "")["cursor"]
    for _ in range(60):
        job = count(caller)
        server.wait_for(job["id"], "succeeded")
        assert caller.delete(f"/v1/jobs/{job['id']}").status == 204
    page = poll(caller, f"?after={at}")
    assert (page["events"], page["reset"]) == ([], "retention")
    with stream(server, Last_Event_ID=at) as one:
        assert one.until("reset").message["why"] == "retention"
    page = poll(caller, f"?after={page['cursor'].partition(':')[0]}:{4 * 60 - 99}&limit=500")
    assert [event["seq"] for event in page["events"]] == list(range(142, 241))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?after=5", "after"),
        ("?after=e:x", "after"),
        ("?wait=61", "wait"),
        ("?wait=x", "wait"),
        ("?wait=nan", "wait"),
        ("?limit=501&after=e:1", "limit"),
        ("?limit=0&after=e:1", "limit"),
        ("?state=dancing", "state"),
        ("?colour=red", "colour"),
        ("?q=a&q=b", "q"),
    ],
)
def test_a_wrong_question_is_refused(caller: Caller, query: str, field: str) -> None:
    """A parameter that is not known, or out of its bounds, is named."""
    answer = caller.get(f"/v1/events{query}")
    assert (answer.status, answer.json["code"], answer.json["field"]) == (
        400,
        "invalid-field",
        field,
    )
    refused = caller.get("/v1/events", Accept="text/event-stream", Last_Event_ID="nonsense")
    assert (refused.status, refused.json["field"]) == (400, "Last-Event-ID")
