"""What jobs say: pages of it, the next page as soon as there is one, and all of it as it comes."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.iostream import IOStream

from handlers.feed import Feed, Feeds
from handlers.messages import Sub
from jobs.channel import text_frame
from jobs.events import Hub
from tests.handlers.clients import Raw
from tests.harness import Server, eventually
from tests.jobs.world import OWNER, World, a_kind
from tests.jobs.world import eventually as until

# Says each line when it is told to: a file appears whose name is the number of the line. It saves
# no cursor, so that nothing but the line itself is there to wake anyone.
TALK = """
from pathlib import Path
from typing import Annotated
import msgspec
from errors import SluiceError

KIND, TITLE, PAUSE = "talk", "Talk", "at once"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    lines: int = 3
    folder: str = ""
    text: str = "line"
    fails: bool = False

async def run(ctx, params):
    for n in range(1, params.lines + 1):
        while params.folder and not Path(params.folder, str(n)).exists():
            await ctx.sleep(0.005)
        ctx.log(f"{params.text} {n}")
    if params.fails:
        raise SluiceError("invalid-data", "It is over.")
"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a kind that talks."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "talk.py").write_text(TALK)
    server = Server(folder / "data", "--kinds", str(folder / "talk.py"), "--write-idle-s", "2")
    yield server.start()
    server.close()


class Talk:
    """A job that says its lines when it is told to."""

    def __init__(self, server: Server, folder: Path, lines: int = 3, **params: Any) -> None:
        self.server = server
        self.folder = folder
        body = {"kind": "talk", "params": {"lines": lines, "folder": str(folder), **params}}
        self.id = server.post("/v1/jobs", body).json["id"]
        self.path = f"/v1/jobs/{self.id}/log"

    def say(self, *numbers: int) -> None:
        """Let it say these lines."""
        for n in numbers:
            (self.folder / str(n)).touch()

    def said(self, n: int) -> None:
        """Return when it has said that many."""
        eventually(lambda: len(self.page("?limit=500")) >= n, f"{n} lines are stored")

    def page(self, query: str = "") -> list[tuple[int, str]]:
        """Lines of a page."""
        return lines(self.server.get(f"{self.path}{query}").json["items"])


def lines(rows: Any) -> list[tuple[int, str]]:
    """Numbers and texts."""
    return [(row["n"], row["line"]) for row in rows]


def wanted(*numbers: int) -> list[tuple[int, str]]:
    """What these lines are."""
    return [(n, f"line {n}") for n in numbers]


class Follower:
    """A reader of a log as it comes."""

    def __init__(self, talk: Talk, query: str = "", **headers: str) -> None:
        self.raw = Raw(talk.server, receive_bytes=4096)
        self.raw.head("GET", f"{talk.path}?follow=1{query}", **headers)
        self.status = int(self.raw.file.readline().split()[1])
        self.headers: dict[str, str] = {}
        while line := self.raw.file.readline().decode().strip():
            name, _, value = line.partition(": ")
            self.headers[name] = value
        self._rest = b""
        self.is_whole = False

    def line(self) -> bytes | None:
        """The next line; None at the end, which is whole only after the last chunk."""
        while b"\n" not in self._rest:
            size = self.raw.file.readline()
            if not size:
                return None
            chunk = self.raw.file.read(int(size, 16) + 2)[:-2]
            if not chunk:
                self.is_whole = True
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def row(self) -> tuple[int, str]:
        """The next line, which is there."""
        line = self.line()
        assert line is not None
        return lines([json.loads(line)])[0]

    def rows(self) -> list[tuple[int, str]]:
        """All lines until the end."""
        found = []
        while (line := self.line()) is not None:
            found += lines([json.loads(line)])
        self.raw.close()
        return found


def test_the_newest_lines_are_a_page(talker: Server) -> None:
    """Without a number the newest come, oldest first; with one those behind it, page by page."""
    body = {"kind": "talk", "params": {"lines": 25}}
    job = talker.post("/v1/jobs", body, Prefer="wait=30").json
    path = f"/v1/jobs/{job['id']}/log"
    tail = talker.get(f"{path}?limit=10").json
    assert (lines(tail["items"]), tail["next"]) == (wanted(*range(16, 26)), None)
    found: list[tuple[int, str]] = []
    after: str | None = "0"
    while after is not None:
        page = talker.get(f"{path}?limit=10&after={after}").json
        found += lines(page["items"])
        after = page["next"]
    assert found == wanted(*range(1, 26))
    assert talker.get(f"{path}?after=25").json == {"items": [], "next": None}
    row = tail["items"][0]
    assert set(row) == {"n", "at", "line"}
    assert row["at"] >= job["started_at"]


def test_a_log_is_followed_to_its_end(talker: Server, tmp_path: Path) -> None:
    """What was said comes at once, each new line within about a second, and then the end."""
    talk = Talk(talker, tmp_path, 4)
    talk.say(1)
    talk.said(1)
    follower = Follower(talk)
    assert follower.status == 200
    assert follower.headers["Content-Type"] == "application/x-ndjson"
    assert follower.headers["Cache-Control"] == "no-store"
    assert follower.row() == (1, "line 1")
    for n in (2, 3):
        began = time.monotonic()
        talk.say(n)
        assert follower.row() == (n, f"line {n}")
        assert time.monotonic() - began < 20  # a second, on a machine that does nothing else
    talk.say(4)
    assert follower.rows() == wanted(4)
    assert follower.is_whole
    assert talker.job(talk.id)["state"] == "succeeded"
    # Of one that has ended all is there, and nothing is waited for.
    late = Follower(talk, "&after=2")
    assert (late.rows(), late.is_whole) == (wanted(3, 4), True)
    newest = Follower(talk, "&limit=1")
    assert newest.rows() == wanted(4)


@pytest.mark.parametrize("how", ["failed", "cancelled", "paused"])
def test_every_end_of_a_job_ends_its_log(talker: Server, tmp_path: Path, how: str) -> None:
    """All that was said before a failure or a cancel is sent before the end; a pause is no end."""
    talk = Talk(talker, tmp_path, 3, fails=how == "failed")
    follower = Follower(talk)
    talk.say(1, 2)
    assert [follower.row(), follower.row()] == wanted(1, 2)
    match how:
        case "failed":
            talk.say(3)
            assert follower.rows() == wanted(3)
            assert talker.job(talk.id)["error"]["code"] == "invalid-data"
        case "cancelled":
            talker.post(f"/v1/jobs/{talk.id}/cancel")
            assert follower.rows() == []
        case _:
            talker.post(f"/v1/jobs/{talk.id}/pause", Prefer="wait=30")
            talker.post(f"/v1/jobs/{talk.id}/resume")
            talk.say(3)
            assert follower.rows() == wanted(3)
    assert follower.is_whole


def test_a_log_is_text_for_who_asks_for_that(talker: Server, tmp_path: Path) -> None:
    """With Accept: text/plain each line is its text alone, also if it had a line break in it."""
    talk = Talk(talker, tmp_path, 2, text="é\n☃")
    talk.say(1, 2)
    follower = Follower(talk, Accept="text/plain")
    assert follower.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "Accept" in follower.headers["Vary"]
    assert [follower.line(), follower.line()] == ["é ☃ 1".encode(), "é ☃ 2".encode()]
    assert (follower.line(), follower.is_whole) == (None, True)
    follower.raw.close()


def test_the_next_line_is_waited_for(talker: Server, tmp_path: Path) -> None:
    """With wait a page is answered when it has a line, the time is over, or the job has ended."""
    talk = Talk(talker, tmp_path, 2)
    began = time.monotonic()
    empty = talker.get(f"{talk.path}?after=0&wait=0.5").json
    assert time.monotonic() - began >= 0.5
    assert empty == {"items": [], "next": None}
    for n in (1, 2):
        with Raw(talker) as raw:
            raw.head("GET", f"{talk.path}?after={n - 1}&wait=60")
            eventually(lambda: watchers(talker) == 1, "it waits")
            talk.say(n)
            assert lines(raw.answer().json["items"]) == wanted(n)
    talker.wait_for(talk.id, "succeeded")
    began = time.monotonic()
    assert talk.page("?after=2&wait=60") == []
    assert time.monotonic() - began < 20


def watchers(server: Server) -> int:
    """How many follow anything."""
    text = server.get("/metrics").body.decode()
    return int(float(text.split("\nsluice_subscribers ")[1].split("\n")[0]))


def test_a_reader_that_goes_leaves_nothing_behind(talker: Server, tmp_path: Path) -> None:
    """Who hangs up while nothing is said is forgotten at once."""
    talk = Talk(talker, tmp_path, 1)
    follower = Follower(talk)
    waiting = Raw(talker)
    waiting.head("GET", f"{talk.path}?after=0&wait=60")
    eventually(lambda: watchers(talker) == 2, "they follow")
    follower.raw.cut()
    waiting.cut()
    eventually(lambda: watchers(talker) == 0, "they are forgotten")
    talker.post(f"/v1/jobs/{talk.id}/cancel", Prefer="wait=30")


def test_a_reader_that_does_not_read_is_let_go(talker: Server) -> None:
    """Lines are not kept for it: it costs no memory, and is cut after a while, before the end."""
    body = {"kind": "talk", "params": {"lines": 4000, "text": "x" * 4000}}
    job = talker.post("/v1/jobs", body, Prefer="wait=60").json
    said = lines(talker.get(f"/v1/jobs/{job['id']}/log?limit=1").json["items"])[0][0]
    memory = talker.status("VmRSS")
    with Raw(talker, receive_bytes=4096) as raw:
        raw.head("GET", f"/v1/jobs/{job['id']}/log?after=0&follow=1")
        assert raw.file.readline() == b"HTTP/1.1 200 OK\r\n"  # since then it is a watcher
        eventually(lambda: watchers(talker) == 0, "it is cut", 60)
        assert talker.status("VmRSS") - memory < 8 << 10
        got = raw.rest()
    assert not got.endswith(b"0\r\n\r\n")
    assert said > 100


class Corridor:
    """A door that does nothing by itself."""

    def beat(self, now_s: float) -> bool:
        """See Shell."""
        return True

    def bye(self, retry_ms: int) -> None:
        """See Shell."""

    def fail(self) -> None:
        """See Shell."""


async def follow_and_leave(folder: Path) -> None:
    """Follow a job's log by three subscriptions of two feeds, and end them one after the other."""

    async def hold(ctx: Any, params: Any) -> None:
        await ctx.sleep(60)

    async with World(folder, a_kind("hold", hold)) as world:
        job = await world.start("hold")
        feeds = Feeds(Hub(world.state, world.boot), world.manager)
        ends = [socket.socketpair() for _ in range(2)]
        streams = [IOStream(mine) for mine, _ in ends]
        one, two = (Feed(feeds, OWNER, stream, text_frame, Corridor()) for stream in streams)
        for feed, id in ((one, 1), (one, 2), (two, 1)):
            feed.subscribe(Sub(id=id, log=job))
        listeners = world.manager._news
        await until(lambda: len(listeners.get(job, ())) == 3, "they listen")
        one.subscribe(Sub(id=1, log=job))
        one.unsubscribe(2)
        await until(lambda: len(listeners[job]) == 2, "one has ended, and one was replaced")
        one.close()
        assert len(listeners[job]) == 1
        await world.tell(job, "cancel")
        await world.until(job, "cancelled")
        await world.manager.delete(job, owner=OWNER, by=world.by())
        await two.follow()
        assert not listeners
        two.close()
        for stream, (_, other) in zip(streams, ends, strict=True):
            stream.close()
            other.close()


def test_the_channel_lets_go_of_the_logs_that_it_follows(tmp_path: Path) -> None:
    """A subscription that ends, is replaced, or loses its job listens to nothing any more."""
    asyncio.run(follow_and_leave(tmp_path))


def test_the_end_of_the_service_is_no_end_of_the_log(tmp_path: Path) -> None:
    """When the service stops, a follower is cut without the last chunk, and goes on afterwards."""
    (tmp_path / "talk.py").write_text(TALK)
    (tmp_path / "cues").mkdir()
    server = Server(tmp_path / "data", "--kinds", str(tmp_path / "talk.py"))
    server.start()
    try:
        talk = Talk(server, tmp_path / "cues", 2)
        follower = Follower(talk)
        talk.say(1)
        assert follower.row() == (1, "line 1")
        assert server.stop() == 0
        assert follower.rows() == []
        assert not follower.is_whole
        server.start()
        follower = Follower(talk, "&after=1")
        talk.say(2)
        rows = follower.rows()
        # It begins anew, so what it has said is said again, under a new number.
        assert (rows[-1][1], follower.is_whole) == ("line 2", True)
        assert all(n > 1 for n, _ in rows)
    finally:
        server.close()


def test_a_follower_counts_as_a_subscriber(tmp_path: Path) -> None:
    """There are no more of them than the configuration allows of all connections that watch."""
    (tmp_path / "talk.py").write_text(TALK)
    options = ("--kinds", str(tmp_path / "talk.py"), "--max-sockets", "1")
    server = Server(tmp_path / "data", *options)
    server.start()
    try:
        talk = Talk(server, tmp_path, 1)
        follower = Follower(talk)
        for query in ("?follow=1", "?after=0&wait=1"):
            answer = server.get(talk.path + query)
            assert (answer.status, answer.json["code"]) == (429, "too-many-sockets")
        assert server.get(talk.path).status == 200
        talk.say(1)
        assert follower.rows() == wanted(1)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("follow=2", 400, "follow"),
        ("wait=61", 400, "wait"),
        ("wait=-1", 400, "wait"),
        ("wait=nan", 400, "wait"),
        ("follow=1", 404, None),
        ("wait=1", 404, None),
        ("", 404, None),
    ],
)
def test_what_can_not_be_followed_is_told(
    talker: Server, query: str, status: int, field: str | None
) -> None:
    """A wrong parameter is named; a log of no job is a 404, also for who would wait."""
    answer = talker.get(f"/v1/jobs/none/log?{query}")
    assert (answer.status, answer.json.get("field")) == (status, field)
