"""The kind ``fetch``: servers that misbehave, addresses that are refused, pauses and deaths."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errors import SluiceError
from jobs.children import Children
from jobs.harness import check
from jobs.kinds import Kind, _http, fetch, kind_of
from jobs.resolve import Resolver, is_public
from storage import Job
from tests.conftest import Serve, need
from tests.harness import FULL, Server
from tests.harness import eventually as wait
from tests.jobs.disturb import How, Trap, disturbed, error_of, nothing_new
from tests.jobs.site import Answer, Request, Site, cut_after, whole
from tests.jobs.world import World, eventually

DATA = random.Random(1).randbytes(400_000)
OTHER = random.Random(2).randbytes(300_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long waits before another try, and short pieces, however many bytes have come."""
    monkeypatch.setattr(fetch, "_WAIT_S", (0.01, 0.05))
    monkeypatch.setattr(_http, "_PIECE_BYTES", 32 << 10)


def the_kind() -> Kind:
    """The kind, without the retries of the whole job, which wait a minute."""
    return kind_of(SimpleNamespace(**(vars(fetch) | {"RETRY": None})))


def allowing(*places: str) -> Callable[[Children], Resolver]:
    """A resolver that also allows these."""
    return lambda children: Resolver(children, places)


def a_world(folder: Path, **more: Any) -> World:
    """A service that fetches, also from 127.0.0.1."""
    return World(folder / "data", the_kind(), **({"resolver": allowing("127.0.0.1")} | more))


async def ran(world: World, url: str, **params: Any) -> Job:
    """Run a fetch to its end."""
    job_id = await world.start("fetch", {"url": url} | params)
    return await world.until(job_id, "succeeded", "failed")


def result(world: World, job: Job) -> bytes:
    """What was fetched."""
    assert job.state == "succeeded", job.error
    assert job.result is not None
    (artifact,) = job.artifacts
    return world.published()[f"{job.result.file}/{artifact.name}"]


def done_of(world: World, job_id: str) -> int:
    """How many bytes a live job has."""
    process = world.runners._live.get(job_id)
    return process.meter.done if process is not None else 0


async def for_ever() -> None:
    """Say nothing any more."""
    await asyncio.get_running_loop().create_future()


async def log_of(world: World, job: Job) -> str:
    """The job's log."""
    return "\n".join(line for _, _, line in await world.state.lines(job.id, 0, 1000))


class TestAnswers:
    """What a server may send."""

    async def test_a_file(self, tmp_path: Path) -> None:
        """Its bytes, the server's name and type for it, progress up to the end."""
        more = {"Content_Type": "text/csv; charset=utf-8"}
        name = {"Content_Disposition": "attachment; filename*=UTF-8''%C5%BC%C3%B3%C5%82w.csv"}
        async with a_world(tmp_path) as world, Site(whole(DATA, more | name)) as site:
            job = await ran(world, site.url("/x?token=secret#part"))
            assert result(world, job) == DATA
            assert job.artifacts[0].name == "żółw.csv"
            assert job.artifacts[0].media_type == "text/csv"
            assert (job.progress.done, job.progress.total) == (len(DATA), len(DATA))
            (request,) = site.requests
            assert request.target == "/x?token=secret"
            assert request.headers["host"] == f"127.0.0.1:{site.port}"
            assert "range" not in request.headers
            assert job.result is not None
            assert job.result.data["host"] == "127.0.0.1"
            assert "secret" not in json.dumps(job.result.data)

    @pytest.mark.parametrize(
        ("path", "given", "param", "wanted"),
        [
            ("/a/b%20c.txt?x=1", None, None, "b c.txt"),
            ("/a/", None, None, "download"),
            ("/a/%2e%2e", None, None, "download"),
            ("/a", 'attachment; filename="../../etc/passwd"', None, "passwd"),
            ("/a", 'attachment; filename="..\\\\x.txt"', None, "x.txt"),
            ("/a.bin", "attachment; filename", None, "a.bin"),
            ("/a.bin", 'attachment; filename="Ä.txt"', None, "Ä.txt"),
            ("/a.bin", "attachment; filename=evil.exe", "mine.txt", "mine.txt"),
            ("/" + "n" * 300, None, None, "n" * 255),
        ],
    )
    async def test_names(
        self, tmp_path: Path, path: str, given: str | None, param: str | None, wanted: str
    ) -> None:
        """A label and never a path: of the parameter, the server, or the URL."""
        more = {"Content_Disposition": given.encode().decode("latin-1")} if given else {}
        async with a_world(tmp_path) as world, Site(whole(b"abc", more)) as site:
            job = await ran(world, site.url(path), **({"name": param} if param else {}))
            assert job.artifacts[0].name == wanted

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    async def test_lengths_that_are_not_told(self, tmp_path: Path, size: int) -> None:
        """Chunked, or up to the end of the connection."""

        async def answer(request: Request) -> None:
            data = DATA[:size]
            if request.target == "/chunked":
                await request.head("200 OK", Transfer_Encoding="chunked")
                chunks = [data[at : at + 30_000] for at in range(0, size, 30_000)]
                for chunk in chunks:
                    await request.body(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await request.body(b"0\r\n\r\n")
            else:
                await request.head("200 OK")
                await request.body(data)

        async with a_world(tmp_path) as world, Site(answer) as site:
            for path in ("/chunked", "/closed"):
                job = await ran(world, site.url(path))
                assert result(world, job) == DATA[:size]
                assert job.progress.total == size

    async def test_hints_before_the_answer(self, tmp_path: Path) -> None:
        """A 103 is no answer, and what it says is not taken for one."""

        async def answer(request: Request) -> None:
            await request.head("103 Early Hints", ETag='"hint"', Link="</x>")
            await whole(DATA)(request)

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url())
            assert result(world, job) == DATA
            assert job.result is not None
            assert job.result.data["validator"] == '"one"'

    @pytest.mark.parametrize(
        ("location", "target"),
        [
            ("b", "/x/b"),
            ("/b?q=1#part", "/b?q=1"),
            ("?q", "/x/a?q"),
            ("/two words", "/two%20words"),
            ("/ü", "/%C3%BC"),
            ("http://127.0.0.1:{port}/c", "/c"),
            ("//127.0.0.1:{port}/d", "/d"),
        ],
    )
    async def test_redirects(self, tmp_path: Path, location: str, target: str) -> None:
        """A place in any form that servers use; the name stays that of the URL."""

        async def answer(request: Request) -> None:
            if request.target != "/x/a":
                await whole(DATA)(request)
                return
            where = location.format(port=site.port).encode().decode("latin-1")
            await request.head("301 Moved", Content_Length=5, Location=where)
            await request.body(b"moved")

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url("/x/a"))
            assert result(world, job) == DATA
            assert [request.target for request in site.requests] == ["/x/a", target]
            assert job.artifacts[0].name == "a"

    async def test_an_empty_file(self, tmp_path: Path) -> None:
        """Nothing is a file, too."""
        async with a_world(tmp_path) as world, Site(whole(b"")) as site:
            assert result(world, await ran(world, site.url())) == b""

    @pytest.mark.parametrize(
        ("status", "headers", "code", "requests"),
        [
            ("404 Not Found", {}, "fetch-refused", 1),
            ("403 Forbidden", {}, "fetch-refused", 1),
            ("204 Empty", {}, "fetch-refused", 1),
            ("206 Partial", {"Content_Range": "bytes 0-2/3"}, "fetch-refused", 1),
            ("416 Never asked", {}, "fetch-refused", 1),
            ("503 Later", {}, "fetch-failed", 3),
            ("503 Later", {"Retry_After": "0"}, "fetch-failed", 3),
            ("500 Oh", {}, "fetch-failed", 3),
            ("429 Too Many", {"Retry_After": "100000"}, "fetch-failed", 1),
            ("302 Found", {}, "fetch-refused", 1),
            ("302 Found", {"Location": "ftp://127.0.0.1/"}, "fetch-refused", 1),
            ("302 Found", {"Location": "http://u:secret@127.0.0.1/"}, "fetch-refused", 1),
            ("302 Found", {"Location": "/again"}, "fetch-refused", 11),
        ],
    )
    async def test_errors(
        self, tmp_path: Path, status: str, headers: dict[str, str], code: str, requests: int
    ) -> None:
        """What may pass is tried again, so often and no more; what will not, is not."""

        async def answer(request: Request) -> None:
            await request.head(status, Content_Length=0, **headers)

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url("/x?k=secret"), retries=2)
            error = error_of(job)
            assert error["code"] == code
            assert len(site.requests) == requests
            assert "secret" not in json.dumps(error) + await log_of(world, job)
            await nothing_new(world, set())

    async def test_it_comes_back_when_it_is_told(self, tmp_path: Path) -> None:
        """A 503 and a 429 are no end; the log tells of both."""
        statuses = ["503 Later", "429 Slow Down"]

        async def answer(request: Request) -> None:
            if statuses:
                await request.head(statuses.pop(), Content_Length=0, Retry_After="0")
            else:
                await whole(DATA)(request)

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url())
            assert result(world, job) == DATA
            assert "503 Later" in await log_of(world, job)

    @pytest.mark.parametrize("told", [True, False])
    async def test_too_large(self, tmp_path: Path, told: bool) -> None:
        """A length that is told is refused at once; an endless body where it is too much."""

        async def answer(request: Request) -> None:
            if told:
                await request.head("200 OK", Content_Length=1 << 50)
            else:
                await request.head("200 OK")
            while True:
                await request.body(DATA)

        async with a_world(tmp_path) as world, Site(answer) as site:
            error = error_of(await ran(world, site.url(), max_bytes=1_000_000))
            assert error["code"] == "too-large"
            assert site.requests[0].sent < 30_000_000
            await nothing_new(world, set())

    @pytest.mark.parametrize(
        "head",
        [
            b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nabcdef",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"",
        ],
        ids=range(5),
    )
    async def test_what_is_no_answer(self, tmp_path: Path, head: bytes) -> None:
        """It is tried again and then told, whatever was sent."""

        async def answer(request: Request) -> None:
            await request.body(head)

        async with a_world(tmp_path) as world, Site(answer) as site:
            assert error_of(await ran(world, site.url(), retries=1))["code"] == "fetch-failed"
            assert len(site.requests) == 2
            await nothing_new(world, set())

    async def test_a_server_that_is_silent(self, tmp_path: Path) -> None:
        """Before its head or in the middle: it is left, and the rest is asked for."""
        silent = ["head", "body"]

        async def answer(request: Request) -> None:
            if not silent:
                await whole(DATA)(request)
            elif silent.pop() == "head":
                await for_ever()
            else:
                await request.head("200 OK", Content_Length=len(DATA), ETag='"one"')
                await request.body(DATA[:100_000])
                await for_ever()

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url(), idle_s=1)
            assert result(world, job) == DATA
            assert [request.start for request in site.requests] == [0, 100_000, 100_000]

    async def test_nobody_listens(self, tmp_path: Path) -> None:
        """A refused connection is tried again, and told without an address."""
        with socket.socket() as taken:  # so that nobody else listens there meanwhile
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
            async with a_world(tmp_path) as world:
                error = error_of(await ran(world, url, retries=1))
            assert (error["code"], error["detail"]) == (
                "fetch-failed",
                "127.0.0.1: can't be reached.",
            )


class TestGoingOn:
    """After a cut."""

    async def test_the_rest_is_asked_for(self, tmp_path: Path) -> None:
        """By Range and If-Range, from the byte where it was cut, each time."""
        answer = cut_after(90_000, DATA, times=4)
        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url(), retries=1)
            assert result(world, job) == DATA
            starts = [request.start for request in site.requests]
            assert starts == [0, 90_000, 180_000, 270_000, 360_000]
            assert {r.headers.get("if-range") for r in site.requests} == {None, '"one"'}

    @pytest.mark.parametrize(
        "then",
        [
            whole(OTHER, etag='"two"'),
            whole(OTHER, ranges=False),
            whole(OTHER, etag="", ranges=False),
        ],
        ids=["changed", "no ranges", "no validator"],
    )
    async def test_another_version(self, tmp_path: Path, then: Answer) -> None:
        """It begins anew and has nothing of the old one, be it longer."""
        answer = cut_after(350_000, DATA, then=then)
        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url())
            assert result(world, job) == OTHER
            assert "starting over" in await log_of(world, job)
            assert job.progress.done == job.progress.total == 350_000 + len(OTHER)

    @pytest.mark.parametrize(
        "headers",
        [
            {"Content_Range": "bytes 0-399999/400000", "Content_Length": 400_000},
            {"Content_Range": "bytes 99999-399999/400000", "Content_Length": 300_001},
            {"Content_Range": "bytes 100000-399998/399999", "Content_Length": 299_999},
            {"Content_Range": "bytes 100000-399999/400000", "Content_Length": 5},
            {"Content_Range": "rubbish", "Content_Length": 300_000},
            {"Content_Length": 300_000},
            {
                "Content_Range": "bytes 100000-399999/400000",
                "Content_Length": 300_000,
                "ETag": '"two"',
            },
        ],
        ids=range(7),
    )
    async def test_wrong_ranges(self, tmp_path: Path, headers: dict[str, Any]) -> None:
        """A part that is not the missing one is never put behind the others."""

        async def then(request: Request) -> None:
            if request.start:
                await request.head("206 Partial", **headers)
                await request.body(bytes(int(headers["Content_Length"])))
            else:
                await whole(DATA)(request)

        answer = cut_after(100_000, DATA, then=then)
        async with a_world(tmp_path) as world, Site(answer) as site:
            assert result(world, await ran(world, site.url())) == DATA
            assert [request.start for request in site.requests] == [0, 100_000, 0]

    async def test_a_server_that_cuts_for_ever(self, tmp_path: Path) -> None:
        """Where nothing gets any further, there is an end of it, also if each try begins anew."""

        async def answer(request: Request) -> None:
            await request.head("200 OK", Content_Length=len(DATA))
            await request.body(DATA[:50_000])
            await request.cut()

        async with a_world(tmp_path) as world, Site(answer) as site:
            assert error_of(await ran(world, site.url(), retries=3))["code"] == "fetch-failed"
            assert len(site.requests) == 5
            await nothing_new(world, set())

    @pytest.mark.parametrize(
        ("headers", "wanted"),
        [
            ({"ETag": 'W/"weak"'}, ""),
            ({"ETag": '"strong"'}, '"strong"'),
            ({"ETag": "unquoted"}, ""),
            (
                {
                    "Last_Modified": "Sun, 29 Nov 2026 10:00:00 GMT",
                    "Date": "Sun, 29 Nov 2026 10:00:05 GMT",
                },
                "Sun, 29 Nov 2026 10:00:00 GMT",
            ),
            (
                {
                    "Last_Modified": "Sun, 29 Nov 2026 10:00:00 GMT",
                    "Date": "Sun, 29 Nov 2026 10:00:00 GMT",
                },
                "",
            ),
            ({"Last_Modified": "yesterday", "Date": "today"}, ""),
            ({}, ""),
        ],
    )
    async def test_validators(self, tmp_path: Path, headers: dict[str, str], wanted: str) -> None:
        """Only a strong one lets a part follow another."""

        async def answer(request: Request) -> None:
            await request.head("200 OK", Content_Length=3, **headers)
            await request.body(b"abc")

        async with a_world(tmp_path) as world, Site(answer) as site:
            job = await ran(world, site.url())
            assert job.result is not None
            assert job.result.data["validator"] == wanted

    async def test_where_the_redirect_led(self, tmp_path: Path) -> None:
        """The last place is asked first; when it has gone, the first one again."""
        gone = False

        async def answer(request: Request) -> None:
            nonlocal gone
            if request.target == "/":
                await request.head("302 Found", Content_Length=0, Location="/b" if gone else "/a")
            elif request.target == "/a" and gone:
                await request.head("403 Expired", Content_Length=0)
            elif request.target == "/a":
                gone = True
                await cut_after(100_000, DATA)(request)
            else:
                await whole(DATA)(request)

        async with a_world(tmp_path) as world, Site(answer) as site:
            assert result(world, await ran(world, site.url("/"))) == DATA
            assert [request.target for request in site.requests] == ["/", "/a", "/a", "/", "/b"]
            assert site.requests[-1].start == 100_000


class TestDigests:
    """What it must be."""

    @pytest.mark.parametrize("cut", [0, 1])
    async def test_expected(self, tmp_path: Path, cut: int) -> None:
        """All that was named are compared, in any case of the letters."""
        digests = {
            "sha256": hashlib.sha256(DATA).hexdigest().upper(),
            "md5": hashlib.md5(DATA).hexdigest(),
        }
        async with a_world(tmp_path) as world, Site(cut_after(9, DATA, times=cut)) as site:
            assert result(world, await ran(world, site.url(), expect=digests)) == DATA
            error = error_of(await ran(world, site.url(), expect={"sha1": "0" * 40}))
            assert error["code"] == "digest-mismatch"
            assert hashlib.sha1(DATA).hexdigest() in error["detail"]
            await nothing_new(world, {"file.bin"})

    async def test_after_a_resume_all_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The bytes of an earlier run count, too."""
        digest = {"sha256": hashlib.sha256(DATA).hexdigest()}
        async with a_world(tmp_path, warm_s=0) as world, Site(whole(DATA)) as site:
            with monkeypatch.context() as inner:
                trap = Trap(inner, world, 5, "cold")
                job_id = await world.start("fetch", {"url": site.url(), "expect": digest})
                job = await disturbed(world, job_id, trap, "cold")
            assert trap.sprung.is_set()
            assert result(world, job) == DATA
            assert site.requests[1].start > 0


REFUSED = [
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192"),
    *("198.18.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "::7f00:1", "3fff::1"),
]
PUBLIC = [
    *("1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.128.0.1", "223.255.255.255"),
    *("2606:2800:220:1::1", "2a00:1450::1", "64:ff9b::101:101", "::ffff:1.1.1.1"),
    "2002:101:101::1",
]


@pytest.mark.parametrize(
    ("text", "wanted"), [*((text, False) for text in REFUSED), *((text, True) for text in PUBLIC)]
)
def test_which_addresses_are_public(text: str, wanted: bool) -> None:
    """Whatever leads into this machine or its networks is none."""
    assert is_public(ipaddress.ip_address(text)) is wanted


class TestGuard:
    """Where it does not go."""

    @pytest.mark.parametrize(
        "host",
        [
            *("127.0.0.1", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "localhost"),
            *("LOCALHOST", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "0"),
        ],
    )
    async def test_this_machine(self, tmp_path: Path, host: str) -> None:
        """However it is written, nobody there is asked."""
        async with (
            a_world(tmp_path, resolver=Resolver) as world,
            Site(whole(b"secret")) as site,
        ):
            job = await ran(world, f"http://{host}:{site.port}/", retries=0)
            assert error_of(job)["code"] in ("address-refused", "fetch-failed")
            if host in ("127.0.0.1", "127.1", "localhost", "[::1]", "0"):
                assert error_of(job)["code"] == "address-refused"
            assert site.requests == []
            await nothing_new(world, set())

    @pytest.mark.parametrize(
        "location",
        [
            "http://127.0.0.2:{port}/",
            "//127.0.0.2:{port}/",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]:{port}/",
            "http://[64:ff9b::7f00:2]:{port}/",
        ],
    )
    async def test_a_redirect_there(self, tmp_path: Path, location: str) -> None:
        """Each hop is checked like the first."""

        async def answer(request: Request) -> None:
            where = location.format(port=site.port)
            await request.head("307 There", Content_Length=0, Location=where)

        async with a_world(tmp_path) as world, Site(answer) as site:
            assert error_of(await ran(world, site.url()))["code"] == "address-refused"
            assert len(site.requests) == 1

    async def test_the_checked_address_is_the_one(self, tmp_path: Path) -> None:
        """A name that means another address at each look-up is asked for once, and obeyed once."""
        fake = names(tmp_path, ["127.0.0.1"], ["127.0.0.2"])
        async with (
            a_world(tmp_path, resolver=fake("127.0.0.1")) as world,
            Site(whole(DATA)) as site,
            Site(whole(b"secret"), host="127.0.0.2") as other,
        ):
            job = await ran(world, site.url(host="rebind.example"))
            assert result(world, job) == DATA
            assert site.requests[0].headers["host"] == f"rebind.example:{site.port}"
            assert (tmp_path / "asked").read_text() == "rebind.example\n"
            error = error_of(await ran(world, other.url(host="rebind.example")))
            assert error["code"] == "address-refused"
            assert other.requests == []

    async def test_one_bad_address_among_good_ones(self, tmp_path: Path) -> None:
        """It refuses the name: whoever mixes them means no good."""
        fake = names(tmp_path, ["127.0.0.1", "10.1.2.3"])
        async with a_world(tmp_path, resolver=fake("127.0.0.1")) as world, Site(whole(b"")) as site:
            error = error_of(await ran(world, site.url(host="mixed.example")))
            assert error["code"] == "address-refused"
            assert "10.1.2.3" not in error["detail"]
            assert site.requests == []

    async def test_a_name_may_be_allowed(self, tmp_path: Path) -> None:
        """By itself, wherever it is; the second address serves when the first does not."""
        fake = names(tmp_path, ["127.0.0.3", "127.0.0.1"])
        async with (
            a_world(tmp_path, resolver=fake("inside.example")) as world,
            Site(whole(DATA)) as site,
        ):
            assert result(world, await ran(world, site.url(host="inside.example"))) == DATA

    async def test_names_that_are_not_there(self, tmp_path: Path) -> None:
        """A failure that may pass, without a look into the system's messages."""
        fake = names(tmp_path, [], [])
        async with a_world(tmp_path, resolver=fake()) as world:
            error = error_of(await ran(world, "http://nowhere.example/"))
            assert (error["code"], error["detail"]) == (
                "fetch-failed",
                "nowhere.example has no address.",
            )

    async def test_ports_of_other_services(self, tmp_path: Path) -> None:
        """Mail, SSH and their like are not spoken to, not even where all is allowed."""
        async with a_world(tmp_path) as world:
            for port in (22, 25, 6667):
                error = error_of(await ran(world, f"http://127.0.0.1:{port}/"))
                assert error["code"] == "address-refused"

    async def test_a_look_up_that_hangs(self, tmp_path: Path) -> None:
        """A cancel ends its process at once."""
        program = tmp_path / "hang.py"
        program.write_text("import time\ntime.sleep(1000)\n")

        def resolver(children: Children) -> Resolver:
            return Resolver(children, (), (sys.executable, "-I", "-S", str(program)))

        async with a_world(tmp_path, resolver=resolver) as world:
            job_id = await world.start("fetch", {"url": "http://slow.example/"})
            await eventually(lambda: len(world.children) == 1, "it looks the name up")
            await world.tell(job_id, "cancel")
            await world.until(job_id, "cancelled")
            await eventually(lambda: len(world.children) == 0, "its process has ended")

    @pytest.mark.parametrize(
        "url",
        [
            *(
                "ftp://a/",
                "file:///etc/passwd",
                "gopher://a/",
                "a.example/x",
                "http://",
                "http:///x",
            ),
            *("http://user@a/", "http://user:secret@a/", "http://a:0x50/", "http://a:99999/"),
            *("http://a b/", "http://a/\r\nX: y", "http://a\\@b/", "http://[fe80::1%25eth0]/"),
            *("http://[::1/", "http://a/" + "x" * 8200, "javascript:alert(1)", "http://exa$mple/"),
        ],
    )
    async def test_urls_that_are_none(self, tmp_path: Path, url: str) -> None:
        """They are refused at the start, and a password is never repeated."""
        async with a_world(tmp_path) as world:
            with pytest.raises(SluiceError) as caught:
                await world.start("fetch", {"url": url})
            assert (caught.value.code, caught.value.field) == ("invalid-field", "params.url")
            assert "secret" not in str(caught.value)

    def test_how_urls_are_read(self) -> None:
        """Fragments go, names become ASCII, odd characters are quoted once."""
        assert _http.place_of("HTTP://Bücher.example/ü?q=ä#frag").url == (
            "http://xn--bcher-kva.example/%C3%BC?q=%C3%A4"
        )
        assert _http.place_of("http://a.example/%20x?y=%26").path == "/%20x?y=%26"
        assert _http.place_of("https://a.example:443").host_header == "a.example"
        assert _http.place_of("https://[2001:DB8::1]:8443/").host_header == "[2001:db8::1]:8443"


def names(folder: Path, *answers: list[str]) -> Callable[..., Callable[[Children], Resolver]]:
    """A resolver whose look-ups answer with these addresses, one list after the other."""
    asked = folder / "asked"
    program = folder / "names.py"
    program.write_text(
        "import json, sys\n"
        f"path, answers = {str(asked)!r}, {list(answers)!r}\n"
        "with open(path, 'a+') as file:\n"
        "    file.seek(0)\n"
        "    n = len(file.readlines())\n"
        "    file.write(sys.argv[1] + '\\n')\n"
        "print(json.dumps({'addresses': answers[min(n, len(answers) - 1)]}))\n"
    )

    def make(*allow: str) -> Callable[[Children], Resolver]:
        return lambda children: Resolver(
            children, allow, (sys.executable, "-I", "-S", str(program))
        )

    return make


class TestTls:
    """HTTPS."""

    @pytest.mark.expects("SSL Error")
    async def test_the_name_must_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The certificate is that of the name, though the connection goes to an address."""
        key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
        subprocess.run(
            [
                *(need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=tls.example"),
                *("-addext", "subjectAltName=DNS:tls.example"),
                *("-keyout", str(key), "-out", str(cert)),
            ],
            check=True,
            capture_output=True,
        )
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(cert, key)
        heard: list[str | None] = []
        theirs.sni_callback = lambda _socket, name, _context: heard.append(name)
        ours = ssl.create_default_context(cafile=str(cert))
        fake = names(tmp_path, ["127.0.0.1"])
        async with (
            a_world(tmp_path, resolver=fake("127.0.0.1")) as world,
            Site(whole(DATA), tls=theirs) as site,
        ):
            error = error_of(await ran(world, site.url(host="tls.example"), retries=0))
            assert error["code"] == "fetch-refused"  # nobody has signed it
            monkeypatch.setattr(_http, "TLS", ours)
            assert result(world, await ran(world, site.url(host="tls.example"))) == DATA
            error = error_of(await ran(world, site.url(host="other.example"), retries=0))
            assert error["code"] == "fetch-refused"
            assert "certificate" in error["detail"]
            assert heard == ["tls.example", "tls.example", "other.example"]
            assert len(site.requests) == 1

    def test_not_from_https_to_http(self) -> None:
        """A redirect does not give up what the first URL has promised."""
        exchange = SimpleNamespace(
            place=_http.place_of("https://a.example/"),
            headers={"Location": "http://a.example/"},
        )
        with pytest.raises(SluiceError) as caught:
            fetch._moved(exchange)  # type: ignore[arg-type]
        assert caught.value.code == "fetch-refused"


def has_heard(site: Site, count: int) -> bool:
    """Whether so many requests have come."""
    return len(site.requests) >= count


class TestPauses:
    """Holding, and dying."""

    async def test_a_warm_pause_stops_reading(self, tmp_path: Path) -> None:
        """The server can send no more than fits in the buffers; then the same answer goes on."""
        size = 64 << 20

        async def answer(request: Request) -> None:
            await request.head("200 OK", Content_Length=size, ETag='"one"')
            await request.body(bytes(size), 64 << 10)

        async with a_world(tmp_path) as world, Site(answer) as site:
            job_id = await world.start("fetch", {"url": site.url()})
            await eventually(lambda: done_of(world, job_id) > 0, "bytes come")
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            done = world.runners._live[job_id].meter.done
            sent = -1
            while sent != site.requests[0].sent:  # until the buffers are full
                sent = site.requests[0].sent
                await asyncio.sleep(0.1)
            assert sent < size
            assert world.runners._live[job_id].meter.done == done
            await world.tell(job_id, "resume")
            job = await world.until(job_id, "succeeded", "failed")
            assert len(result(world, job)) == size
            assert len(site.requests) == 1

    async def test_a_pause_while_nothing_comes(self, tmp_path: Path) -> None:
        """It takes effect at once, before the head and in the middle, and so does a cancel."""

        async def answer(request: Request) -> None:
            if request.target == "/middle":
                await request.head("200 OK", Content_Length=9)
                await request.body(b"abc")
            await for_ever()

        async with a_world(tmp_path) as world, Site(answer) as site:
            for n, path in enumerate(("/head", "/middle"), 1):
                job_id = await world.start("fetch", {"url": site.url(path)})
                await eventually(partial(has_heard, site, n), "it asks")
                await world.tell(job_id, "pause")
                await world.until(job_id, "paused")
                await world.tell(job_id, "resume")
                await world.until(job_id, "running")
                await world.tell(job_id, "cancel")
                await world.until(job_id, "cancelled")
            await nothing_new(world, set())

    @pytest.mark.parametrize("how", ["warm", "cold", "kill", "cancel"])
    async def test_any_interruption(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How
    ) -> None:
        """At each of the first checkpoints: it goes on to the same bytes, or leaves nothing."""
        answer = cut_after(150_000, DATA)
        for number in range(1, 9):
            more = {"warm_s": 0} if how == "cold" else {}
            world = a_world(tmp_path / f"{number}", **more)
            world.folder.parent.mkdir()
            await world.open()
            async with Site(answer) as site:
                with monkeypatch.context() as inner:
                    trap = Trap(inner, world, number, how)
                    job_id = await world.start("fetch", {"url": site.url()})
                    job = await disturbed(world, job_id, trap, how)
                assert trap.sprung.is_set()
                if how == "cancel":
                    assert job.state == "cancelled"
                    await nothing_new(world, set())
                else:
                    assert result(world, job) == DATA
                    assert job.progress.done == len(DATA)
                    await nothing_new(world, {"file.bin"})
            await world.close()

    async def test_a_cold_pause_reads_nothing_twice(self, tmp_path: Path) -> None:
        """The rest is asked for from the byte where it stood."""
        held = asyncio.Event()

        async def answer(request: Request) -> None:
            if request.start:
                await whole(DATA)(request)
                return
            await request.head("200 OK", Content_Length=len(DATA), ETag='"one"')
            await request.body(DATA[:200_000])
            await held.wait()

        async with a_world(tmp_path, warm_s=0) as world, Site(answer) as site:
            job_id = await world.start("fetch", {"url": site.url()})
            await eventually(lambda: done_of(world, job_id) == 200_000, "half of it came")
            await world.tell(job_id, "pause")
            await world.until(job_id, "paused")
            await eventually(lambda: job_id not in world.runners._live, "it is cold")
            await world.tell(job_id, "resume")
            assert result(world, await world.until(job_id, "succeeded", "failed")) == DATA
            assert [request.start for request in site.requests] == [0, 200_000]
            held.set()

    async def test_followers_never_read_two_versions(self, tmp_path: Path) -> None:
        """Who reads what is there so far has another blob after a new start."""
        blobs = set()

        async def then(request: Request) -> None:
            await whole(OTHER, etag='"two"')(request)

        async with a_world(tmp_path) as world, Site(cut_after(200_000, DATA, then=then)) as site:
            job_id = await world.start("fetch", {"url": site.url()})
            while (job := await world.job(job_id)).state not in ("succeeded", "failed"):
                grown = world.runners.grown(job, None)
                if grown is not None:
                    blobs.add(grown.blob)
                await asyncio.sleep(0)
            assert result(world, job) == OTHER
            assert len(blobs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
def test_the_harness_finds_no_difference(ranges: bool) -> None:
    """Disturbed in each way at points all over it, also where it must begin anew each time."""
    started: Future[int] = Future()
    stop = threading.Event()

    async def serve_until_stopped() -> None:
        async with Site(whole(DATA, ranges=ranges)) as site:
            started.set_result(site.port)
            while not stop.is_set():
                await asyncio.sleep(0.01)

    site = threading.Thread(target=lambda: asyncio.run(serve_until_stopped()))
    site.start()
    try:
        params = {"url": f"http://127.0.0.1:{started.result(60)}/file.bin"}
        options = ("--fetch-allow", "127.0.0.1")
        report = check("fetch", params, sample=0 if FULL else 3, options=options)
        assert report.points["checkpoint"] >= 3
    finally:
        stop.set()
        site.join()


@pytest.mark.chaos
@pytest.mark.expects("was interrupted")
def test_killed_for_real(serve: Serve, tmp_path: Path) -> None:
    """kill -9 in the middle: the next start asks for the rest, and the file is whole."""
    data = os.urandom(3_000_000)

    async def work() -> tuple[bytes, list[int]]:
        server = await asyncio.to_thread(serve, "--fetch-allow", "127.0.0.1")
        paused = asyncio.Event()

        async def answer(request: Request) -> None:
            if request.start:
                await whole(data)(request)
                return
            await request.head("200 OK", Content_Length=len(data), ETag='"one"')
            await request.body(data[:2_000_000])
            await paused.wait()

        async with Site(answer) as site:
            fetched = await asyncio.to_thread(_kill_in_the_middle, server, site.url())
            paused.set()
            return fetched, [request.start for request in site.requests]

    fetched, starts = asyncio.run(work())
    assert fetched == data
    assert starts[0] == 0
    assert 0 < starts[1] <= 2_000_000


def _kill_in_the_middle(server: Server, url: str) -> bytes:
    """Start a fetch, kill the server when a part of it is safe, and start it again."""
    job_id = server.post("/v1/jobs", {"kind": "fetch", "params": {"url": url}}).json["id"]
    path = f"/v1/jobs/{job_id}/content"
    wait(lambda: server.get(path).status == 200 and server.get(path).body, "a part of it is safe")
    server.kill()
    server.start()
    job = server.wait_for(job_id, "succeeded")
    return server.get(f"/v1/files/{job['result']['file']}/content").body
