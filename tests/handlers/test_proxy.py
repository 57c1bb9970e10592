"""What trusted proxies say of a request is believed; real proxies, as docs/proxies.md sets them up.

The server trusts 127.0.0.1 only; a client that connects from 127.0.0.2 is a stranger to it.
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import websocket
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from handlers.auth import Proxies
from tests.conftest import need
from tests.handlers.clients import Caller, Raw
from tests.harness import ROOT, Answer, Server, eventually

OPTIONS = ("--trusted-proxies", "127.0.0.1", "--hosts", "files.example")
PROXIES = Proxies(tuple(map(ip_network, ("10.0.0.0/8", "2001:db8::/32"))))
PROXY = "10.0.0.1"

# What is believed, and of whom


def seen_by(
    proxies: Proxies, peer: str | None, headers: list[tuple[str, str]]
) -> HTTPServerRequest:
    """A request of that peer, after ``proxies`` has looked at it."""
    lines = HTTPHeaders({"Host": "inside"})
    for name, value in headers:
        lines.add(name, value)
    connection: Any = SimpleNamespace(context=SimpleNamespace(remote_ip=peer, protocol="http"))
    request = HTTPServerRequest(
        start_line=RequestStartLine("GET", "/", "HTTP/1.1"), headers=lines, connection=connection
    )
    proxies.apply(request)
    assert request.host == request.headers["Host"]
    return request


def who(peer: str | None, *headers: tuple[str, str]) -> tuple[str, str, str]:
    """The address, the protocol and the host of a request with these headers."""
    request = seen_by(PROXIES, peer, list(headers))
    return request.remote_ip or "", request.protocol, request.host


FORWARDED = [
    ("for=192.0.2.1", ("192.0.2.1", "http", "inside")),
    ("for=192.0.2.1;proto=https;host=a.example", ("192.0.2.1", "https", "a.example")),
    ("For=192.0.2.1; Proto=HTTPS; HOST=A.example", ("192.0.2.1", "https", "A.example")),
    ('for="192.0.2.1:4711";host="a.example:8443"', ("192.0.2.1", "http", "a.example:8443")),
    ('for="[2001:db9::1]:4711";by="[2001:db8::1]"', ("2001:db9::1", "http", "inside")),
    ('for="[2001:DB9:0::1]"', ("2001:db9::1", "http", "inside")),
    ('for="[::ffff:192.0.2.1]:_port"', ("192.0.2.1", "http", "inside")),
    (r'for="192.0.2.\1";host="a.exa\mple"', ("192.0.2.1", "http", "a.example")),
    ("for=192.0.2.1:4711;host=a.example:80", ("192.0.2.1", "http", "a.example:80")),
    ('host="[2001:db8::1]:80"', (PROXY, "http", "[2001:db8::1]:80")),
    ('secret="a,b;c=\\"d";for=192.0.2.1', ("192.0.2.1", "http", "inside")),
    (",, for=192.0.2.1 ;; ,", ("192.0.2.1", "http", "inside")),
    ("for=unknown;proto=https", (PROXY, "https", "inside")),
    ("for=_hidden;host=a.example", (PROXY, "http", "a.example")),
    # Several: what a stranger has written stands left of what the last trusted one saw.
    ("for=198.51.100.9;host=evil, for=192.0.2.1", ("192.0.2.1", "http", "inside")),
    ("for=198.51.100.9, for=192.0.2.1, for=10.9.9.9", ("192.0.2.1", "http", "inside")),
    (
        "for=192.0.2.1;proto=https;host=a.example, for=10.9.9.9;proto=http;host=b.example",
        ("192.0.2.1", "https", "a.example"),
    ),
    (
        "for=192.0.2.1;host=evil, for=198.51.100.9, for=10.9.9.9;host=b.example",
        ("198.51.100.9", "http", "b.example"),
    ),
    ("for=192.0.2.1, for=unknown, for=10.9.9.9", (PROXY, "http", "inside")),
    ('for=10.7.7.7, for="[2001:db8::9]"', ("10.7.7.7", "http", "inside")),
]


@pytest.mark.parametrize(("header", "expected"), FORWARDED, ids=lambda value: str(value)[:60])
def test_forwarded_of_a_trusted_peer(header: str, expected: tuple[str, str, str]) -> None:
    """The element that the outermost trusted proxy wrote tells who asked, and for what."""
    assert who(PROXY, ("Forwarded", header)) == expected
    # Nothing else counts beside it.
    others = [("X-Forwarded-For", "203.0.113.1"), ("X-Forwarded-Host", "other.example")]
    assert who(PROXY, ("Forwarded", header), *others) == expected


def test_forwarded_may_be_in_several_lines() -> None:
    """Lines of one name are one list."""
    lines = [("Forwarded", "for=192.0.2.1;host=a.example"), ("Forwarded", "for=10.1.1.1")]
    assert who(PROXY, *lines) == ("192.0.2.1", "http", "a.example")


X_FORWARDED = [
    ({"For": "192.0.2.1"}, ("192.0.2.1", "http", "inside")),
    ({"For": "192.0.2.1:4711"}, ("192.0.2.1", "http", "inside")),
    ({"For": "2001:db9::1"}, ("2001:db9::1", "http", "inside")),
    ({"For": "[2001:db9::1]:80"}, ("2001:db9::1", "http", "inside")),
    ({"For": "198.51.100.9, 192.0.2.1 ,10.1.1.1"}, ("192.0.2.1", "http", "inside")),
    ({"For": "10.1.1.1"}, ("10.1.1.1", "http", "inside")),
    ({"Proto": "https"}, (PROXY, "https", "inside")),
    ({"Proto": "ftp"}, (PROXY, "http", "inside")),
    ({"Host": "a.example:8443"}, (PROXY, "http", "a.example:8443")),
    (
        {"For": "192.0.2.1, 10.1.1.1", "Proto": "http, https", "Host": "evil, a.example"},
        ("192.0.2.1", "https", "a.example"),
    ),
]


@pytest.mark.parametrize(("headers", "expected"), X_FORWARDED, ids=str)
def test_x_forwarded_of_a_trusted_peer(
    headers: dict[str, str], expected: tuple[str, str, str]
) -> None:
    """The older headers tell the same; of several hosts the nearest proxy's counts."""
    lines = [(f"X-Forwarded-{name}", value) for name, value in headers.items()]
    assert who(PROXY, *lines) == expected


MALFORMED = [
    "for",
    "for=",
    "=192.0.2.1",
    "for 192.0.2.1",
    "for=192.0.2.1 proto=https",
    'for="192.0.2.1',
    'for="192.0.2.1"x',
    "for=192.0.2.1;for=192.0.2.2",
    "for=192.0.2.999",
    "for=192.0.2",
    'for="[::1"',
    'for="[]"',
    'for="[2001:db9::1]x"',
    "for=localhost",
    "for=::1::",
    "proto=ftp",
    "host=",
    'host=""',
    'host="a example"',
    'host="a.example/x"',
    'host="user@a.example"',
    'host="a.example:port"',
    'host="a.example, b.example"',
    "host=" + "a" * 300,
    "\xff\xfe",
    '"' * 9,
    "for=192.0.2.1" + " " * 60_000 + "x",
    "a" * 60_000,
    'a="' + "\\" * 60_000,
    "for=1," * 10_000,
]
MALFORMED_X = [
    *(
        ("For", text)
        for text in ("", ",", "localhost", "192.0.2.999", "[::1", "::1::", "1" * 60_000)
    ),
    *(("For", text) for text in ("192.0.2.1, ?", "unknown", "192.0.2.1 10.1.1.1", '"192.0.2.1"')),
    *(("Proto", text) for text in ("", ",", "ftp", "https,", "http https", "https" * 9999)),
    *(("Host", text) for text in ("", "a b", "a/x", "u@a", "a:b", "[::1", "a,", "é", "a" * 60_000)),
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("Forwarded", text) for text in MALFORMED),
        *((f"X-Forwarded-{name}", text) for name, text in MALFORMED_X),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_what_is_malformed_is_ignored(name: str, text: str) -> None:
    """A header that can't be read changes nothing, takes no time and raises nothing."""
    began = time.process_time()
    assert who(PROXY, (name, text)) == (PROXY, "http", "inside")
    assert time.process_time() - began < 0.5


EVERYTHING = [
    ("Forwarded", "for=203.0.113.1;proto=https;host=evil"),
    ("X-Forwarded-For", "203.0.113.1"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "evil"),
    ("X-Forwarded-Prefix", "/evil"),
]
ANYONE = Proxies((ip_network("0.0.0.0/0"), ip_network("::/0")))


@pytest.mark.parametrize(
    ("proxies", "peer"),
    [
        *((PROXIES, peer) for peer in ("192.0.2.1", "11.0.0.1", "::1", "2001:db9::1", "127.0.0.1")),
        # A unix socket has no address; Tornado tells 0.0.0.0.
        *((ANYONE, peer) for peer in ("0.0.0.0", "::", "/run/x", "", None)),
        (Proxies(), "127.0.0.1"),
    ],
)
@pytest.mark.parametrize("headers", [EVERYTHING, EVERYTHING[1:]], ids=["Forwarded", "X-Forwarded"])
def test_anybody_else_is_not_heard(
    proxies: Proxies, peer: str | None, headers: list[tuple[str, str]]
) -> None:
    """A peer outside the networks, or without an address, changes nothing by any header."""
    request = seen_by(proxies, peer, headers)
    assert (request.remote_ip, request.protocol, request.host) == (peer, "http", "inside")
    assert request.host_name == "inside"
    assert proxies.prefix(request) == ""


@pytest.mark.parametrize("peer", ["10.255.0.1", "2001:db8:9::1", "::ffff:10.0.0.1"])
def test_each_address_of_the_networks_is_heard(peer: str) -> None:
    """Both families are trusted, and an IPv4 address also in its IPv6 form."""
    request = seen_by(PROXIES, peer, EVERYTHING)
    assert (request.remote_ip, request.protocol, request.host) == ("203.0.113.1", "https", "evil")
    assert request.host_name == "evil"
    assert PROXIES.prefix(request) == "/evil"


PREFIXES = [
    *(("/files", "/files"), ("/a/b-c/~d.e_f", "/a/b-c/~d.e_f"), ("/files/", "/files"), ("/", "")),
    *(
        (wrong, "")
        for wrong in ("files", "//evil.example", "/a//b", "/a b", "/a?b", "/a,/b", "/%2e")
    ),
    *((wrong, "") for wrong in ("https://evil.example", "/\\evil", "/é", "/a" * 30_000 + "!")),
]


@pytest.mark.parametrize(("text", "prefix"), PREFIXES, ids=lambda text: text[:40])
def test_a_prefix_is_a_plain_path(text: str, prefix: str) -> None:
    """A prefix that could lead elsewhere is none."""
    assert PROXIES.prefix(seen_by(PROXIES, PROXY, [("X-Forwarded-Prefix", text)])) == prefix


# On the service


def ask(
    site: Server, method: str, path: str, body: str | None = None, *, at: str, **headers: str
) -> Answer:
    """One request of a peer with the address ``at``."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", site.port, timeout=30, source_address=(at, 0)
    )
    sent = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    found = Answer(answer.status, dict(answer.headers.items()), answer.read())
    connection.close()
    return found


TRUSTED, STRANGER = "127.0.0.1", "127.0.0.2"
HOST_HEADERS = pytest.mark.parametrize(
    ("name", "value"), [("X_Forwarded_Host", "{}"), ("Forwarded", "for=192.0.2.1;host={}")]
)


@HOST_HEADERS
@pytest.mark.parametrize("path", ["/v1/jobs", "/", "/v1/ws"])
def test_a_proxy_tells_the_host(site: Server, path: str, name: str, value: str) -> None:
    """The host that a trusted proxy was asked for is the one that has to be known."""
    good, evil = ({name: value.format(host)} for host in ("files.example", "evil.example"))
    known = ask(site, "GET", path, at=TRUSTED, Host="upstream", **good)
    assert known.status == (400 if path == "/v1/ws" else 200)  # 400: this is no upgrade
    assert ask(site, "GET", path, at=TRUSTED, Host="localhost", **evil).status == 403


@HOST_HEADERS
@pytest.mark.parametrize("path", ["/v1/jobs", "/", "/v1/ws"])
def test_a_stranger_tells_no_host(site: Server, path: str, name: str, value: str) -> None:
    """From anybody else only Host counts, so that the check can't be talked round."""
    for host in ("localhost", "files.example", "127.0.0.1"):
        given = {name: value.format(host)}
        assert ask(site, "GET", path, at=STRANGER, Host="evil.example", **given).status == 403
    given = {name: value.format("evil.example")}
    known = ask(site, "GET", path, at=STRANGER, Host="localhost", **given)
    assert known.status == (400 if path == "/v1/ws" else 200)


@HOST_HEADERS
def test_the_own_site_is_what_the_proxy_was_asked_for(site: Server, name: str, value: str) -> None:
    """A page that came through the proxy is our own; a stranger can't make his page our own."""
    page = {"Origin": "https://files.example:8443", name: value.format("files.example:8443")}
    post = "/x/process/?kind=count&steps=0"
    assert ask(site, "POST", post, at=TRUSTED, Host="localhost", **page).status == 200
    foreign = ask(site, "POST", post, at=STRANGER, Host="localhost", **page)
    assert (foreign.status, foreign.json["code"]) == (403, "cross-site")


def test_the_next_request_of_a_connection_speaks_for_itself(site: Server) -> None:
    """What a proxy says of one request does not stick to its connection."""
    with Raw(site) as raw:
        for host, status in (("files.example", 200), ("localhost", 200), (None, 403)):
            told = f"X-Forwarded-Host: {host}\r\n" if host else ""
            raw.send(f"GET /v1/jobs HTTP/1.1\r\nHost: upstream\r\n{told}\r\n".encode())
            assert raw.answer().status == status


def test_locations_begin_with_the_prefix(site: Server) -> None:
    """Where a trusted proxy shows the service below a path, Location names that path."""
    Caller(site, "c").store("prefix.bin", b"x")
    start = ("POST", "/v1/jobs", '{"kind": "count", "params": {"steps": 0}}')
    export = ("POST", "/export", '{"filename": "prefix.bin"}')
    for request in (start, export):
        given = {"X_Forwarded_Prefix": "/files", "Prefer": "respond-async"}
        below = ask(site, *request, at=TRUSTED, **given)
        assert below.headers["Location"] == f"/files/v1/jobs/{below.json['id']}"
        for at, prefix in ((STRANGER, "/files"), (TRUSTED, "//evil.example"), (TRUSTED, "")):
            plain = ask(site, *request, at=at, **given | {"X_Forwarded_Prefix": prefix})
            assert plain.headers["Location"] == f"/v1/jobs/{plain.json['id']}"


# Real proxies


class Program(NamedTuple):
    """A proxy: its part of the page, how it is put to a test, and its command line."""

    replaced: list[tuple[str, str]]
    whole: str
    command: Callable[[str, Path], list[str]]


PROGRAMS = {
    "nginx": Program(
        [("listen 80;", "listen 127.0.0.1:PORT;")],
        "master_process off;\ndaemon off;\npid nginx.pid;\nerror_log error.log;\n"
        "events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{text}\n}}\n",
        lambda path, file: [path, "-p", str(file.parent), "-e", "error.log", "-c", str(file)],
    ),
    "caddy": Program(
        [("files.example {", "http://:PORT {\n\tbind 127.0.0.1")],
        "{{\nadmin off\nauto_https off\n}}\n{text}",
        lambda path, file: [path, "run", "--adapter", "caddyfile", "--config", str(file)],
    ),
    "haproxy": Program(
        [("bind :80 ", "bind 127.0.0.1:PORT ")],
        "{text}",
        lambda path, file: [path, "-db", "-f", str(file)],
    ),
}
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # nginx wants to have these


def configuration(name: str, port: int, site: Server) -> str:
    """The configuration of the page, with the ports of this test."""
    program = PROGRAMS[name]
    page = (ROOT / "docs" / "proxies.md").read_text()
    found = re.search(rf"```{name}\n(.*?)```", page, re.S)
    assert found is not None
    text = found[1]
    for old, new in [*program.replaced, ("127.0.0.1:8888", f"127.0.0.1:{site.port}")]:
        assert text.count(old) == 1, old
        text = text.replace(old, new.replace("PORT", str(port)))
    temporary = "\n".join(f"{each}_temp_path {each};" for each in _TEMPORARY)
    return program.whole.format(text=text, temporary=temporary)


def free_port() -> int:
    """A port that this process keeps, so that only who is told of it listens there."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = int(holder.getsockname()[1])
    holder.detach()
    return port


@pytest.fixture(scope="module", params=list(PROGRAMS))
def front(
    request: pytest.FixtureRequest, site: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A proxy before the server; what one can do with a Server, one can do with this."""
    name = str(request.param)
    path = need(name)
    folder = tmp_path_factory.mktemp(name)
    front = Server(site.folder)
    front.port = free_port()
    file = folder / "conf"
    file.write_text(configuration(name, front.port, site))
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            PROGRAMS[name].command(path, file),
            stdout=out,
            stderr=out,
            cwd=folder,
            env={"HOME": str(folder), "PATH": ""},
        )
    try:
        eventually(
            lambda: process.poll() is not None or front.get("/healthz").status == 200, "it serves"
        )
        assert process.poll() is None, log.read_text()
        yield front
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def through(front: Server, name: str) -> Caller:
    """A client of the proxy."""
    return Caller(front, name)


def test_an_upload_passes_piece_by_piece(site: Server, through: Caller, name: str) -> None:
    """The first half has reached the server before the second is sent: nothing was buffered."""
    half = bytes(range(256)) * (8 << 10)
    with Raw(through.server) as raw:
        path = f"/upload?file_name={name}&is_complete=1"
        raw.head("POST", path, Content_Length=2 * len(half), X_Client_Id=through.client)
        raw.send(half)
        job_id = Caller(site, through.client).job("upload")["id"]
        received = "the first half is on the server"
        eventually(lambda: site.job(job_id)["transfer"]["received_bytes"] == len(half), received)
        raw.send(half)
        answer = raw.answer()
    assert answer.status == 200
    assert through.content(answer.json["id"]) == half + half


def test_a_chunked_upload_passes_piece_by_piece(site: Server, through: Caller, name: str) -> None:
    """The same without a Content-Length."""
    with Raw(through.server) as raw:
        path = f"/upload?file_name={name}&is_complete=1"
        raw.head("POST", path, Transfer_Encoding="chunked", X_Client_Id=through.client)
        raw.chunk(bytes(100_000))
        job_id = Caller(site, through.client).job("upload")["id"]
        eventually(lambda: site.job(job_id)["transfer"]["received_bytes"] == 100_000, "it is here")
        raw.chunk(b"end")
        raw.chunk(b"")
        assert raw.answer().status == 200


def test_a_slow_reader_holds_the_server(site: Server, through: Caller, name: str) -> None:
    """The proxy takes no more of a file than its reader does, so that a pause means something."""
    size = 96 << 20
    caller = Caller(site, through.client)
    assert caller.block(name, 0, bytes(size), "&is_complete=1").status == 200
    with Raw(through.server, receive_bytes=64 << 10) as raw:
        body = f'{{"filename": "{name}"}}'.encode()
        raw.head("POST", "/export", Content_Length=len(body), X_Client_Id=through.client)
        raw.send(body)
        job_id = caller.job("download")["id"]
        done = -1

        def stands() -> bool:
            """Whether something has left, and nothing more for some time."""
            nonlocal done
            before, done = done, site.job(job_id)["progress"]["done"]
            time.sleep(0.3)
            return bool(0 < done == before)

        eventually(stands, "nothing more leaves")
        assert done < size
        assert site.job(job_id)["state"] == "running"
    site.wait_for(job_id, "failed")


def test_the_channel_opens_through_the_proxy(front: Server) -> None:
    """A WebSocket passes, also one of a page that came through the proxy."""
    channel = front.socket("jobs.v1.json")
    channel.say(t="hello", ver=1)
    assert channel.until(lambda m: m["t"] == "welcome")
    channel.close()
    url = f"ws://127.0.0.1:{front.port}/v1/ws"
    websocket.create_connection(url, timeout=10, origin=front.url).close()
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(url, timeout=10, origin="https://evil.example")


@pytest.mark.parametrize("n", [100_000, 8 << 20, 80 << 20])
def test_an_early_refusal_reaches_the_client(through: Caller, name: str, n: int) -> None:
    """A 400 that the server gives before it has read the body is no 502 behind the proxy."""
    with Raw(through.server) as raw:
        raw.head("POST", f"/upload?file_name={name}&bytes_read=7", Content_Length=n)
        with raw.pouring(n):
            answer = raw.answer()
        assert (answer.status, answer.json["code"]) == (400, "offset-mismatch")


def test_a_client_can_not_speak_for_the_proxy(front: Server) -> None:
    """What a client writes into the proxies' headers does not reach the server."""
    forged = {
        "Forwarded": "for=192.0.2.1;proto=https;host=evil.example",
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Prefix": "/evil",
    }
    start = {"kind": "count", "params": {"steps": 0}}
    answer = front.request("POST", "/v1/jobs", start, forged)
    assert answer.status == 201
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert headers["location"] == f"/v1/jobs/{answer.json['id']}"
    own = forged | {"Origin": "https://evil.example"}
    assert front.request("POST", "/v1/jobs", start, own).status == 403


def test_the_host_is_known_behind_the_proxy(front: Server) -> None:
    """The name under which the proxy was asked has to be one of the service's."""
    assert front.get("/v1/jobs", Host="files.example").status == 200
    assert front.get("/v1/jobs", Host="evil.example").status == 403
