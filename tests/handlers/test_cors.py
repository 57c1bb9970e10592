"""Pages of allowed origins may use the service, others get nothing; POST may stand for a method."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application

from config import Config
from errors import SluiceError
from handlers import ROUTES
from handlers.base import BaseHandler
from server import assembled, make_app, recover
from tests.conftest import Serve
from tests.handlers.clients import Caller, Raw
from tests.harness import Answer, Server

APP, LOCAL = "https://app.example", "http://localhost:3000"
OPTIONS = ("--cors-origins", f"{APP},{LOCAL}", "--hosts", "files.example")
STRANGERS = [
    "https://evil.example",
    "https://app.example.evil.example",
    "https://app.example:8443",
    "http://app.example",
    "HTTPS://APP.EXAMPLE",
    "https://app.example/",
    "https://app.example, https://app.example",
    "http://localhost",
    "null",
    "*",
    "",
]
ASKED = {"Access-Control-Request-Method": "PATCH"}
SHOWN = (
    "Location, Upload-Offset, Upload-Length, Upload-Defer-Length, Upload-Expires, Upload-Metadata, "
    "Upload-Concat, Upload-Complete, Upload-Limit, Upload-Draft-Interop-Version, Tus-Version, "
    "Tus-Resumable, Tus-Max-Size, Tus-Extension, Tus-Checksum-Algorithm, Content-Range, "
    "Content-Disposition, Accept-Ranges, ETag, Repr-Digest, Digest, Retry-After, X-Request-Id, "
    "Preference-Applied, Idempotency-Replayed, Sluice-Job"
)
SENDABLE = (
    "Authorization, Content-Type, Content-Disposition, Content-Digest, Repr-Digest, "
    "Want-Repr-Digest, Want-Content-Digest, Idempotency-Key, If-Match, If-None-Match, "
    "If-Modified-Since, If-Unmodified-Since, If-Range, Range, Origin, Prefer, X-Client-Id, "
    "X-Request-Id, X-Requested-With, X-HTTP-Method-Override, "
    "Tus-Resumable, Upload-Length, Upload-Offset, Upload-Defer-Length, Upload-Metadata, "
    "Upload-Concat, Upload-Checksum, Upload-Complete, Upload-Incomplete, "
    "Upload-Draft-Interop-Version"
)


@pytest.fixture(scope="module")
def anyone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that pages of every origin may use."""
    server = Server(tmp_path_factory.mktemp("anyone") / "data", "--cors-origins", "*")
    yield server.start()
    server.close()


def grants(answer: Answer) -> dict[str, str]:
    """The headers of an answer that a browser looks for, without their common beginning."""
    start = "Access-Control-"
    return {k.removeprefix(start): v for k, v in answer.headers.items() if k.startswith(start)}


def granted(answer: Answer, origin: str = APP) -> None:
    """Check that a page of that origin may read the answer and its headers."""
    assert grants(answer) == {
        "Allow-Origin": origin,
        "Allow-Credentials": "true",
        "Expose-Headers": SHOWN,
    }
    assert answer.headers["Vary"].split(", ")[-1] == "Origin"


# Answers


@pytest.fixture(scope="module")
def file_id(site: Server) -> str:
    """A stored file."""
    return Caller(site, "c").store("cors.bin", b"0123456789")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/jobs", {}, 200),
        ("GET", "/v1/jobs", ASKED, 200),
        ("GET", "/v1/files/{id}/content", {}, 200),
        ("HEAD", "/v1/files/{id}/content", {}, 200),
        ("GET", "/v1/files/{id}/content", {"Range": "bytes=0-1"}, 206),
        ("GET", "/v1/files/{id}/content", {"If-None-Match": "*"}, 304),
        ("GET", "/v1/files/{id}/content", {"Range": "bytes=99-"}, 416),
        ("DELETE", "/v1/files/none", {}, 404),
        ("POST", "/x/process/?kind=count&steps=0", {}, 200),
        ("POST", "/v1/jobs", {}, 400),
        ("PUT", "/v1/jobs", {}, 405),
        ("PROPFIND", "/v1/jobs", {}, 405),
        ("GET", "/v1/jobs", {"Host": "evil.example"}, 403),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/v1/ws", {}, 400),
        ("GET", "/healthz", {}, 200),
        ("GET", "/", {}, 200),
        ("GET", "/static/none.js", {}, 404),
    ],
)
def test_every_answer_is_granted_to_an_allowed_origin(
    site: Server, file_id: str, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """Whatever the answer is, and whichever handler gives it, the page may read it."""
    for origin in (APP, LOCAL):
        asked = {"Origin": origin, "Sec-Fetch-Site": "cross-site", **headers}
        answer = site.request(method, path.format(id=file_id), headers=asked)
        assert answer.status == status
        granted(answer, origin)


def test_a_204_is_granted(site: Server) -> None:
    """An answer without a body is marked like others."""
    file_id = Caller(site, "c").store("gone.bin", b"x")
    answer = site.delete(f"/v1/files/{file_id}", Origin=APP)
    assert answer.status == 204
    granted(answer)


def test_an_early_refusal_is_granted(site: Server) -> None:
    """A refusal that comes before the body was read can be read by the page."""
    with Raw(site) as raw:
        raw.head("POST", "/upload?file_name=x&bytes_read=7", Origin=APP, Content_Length=1 << 20)
        answer = raw.answer()
        assert (answer.status, answer.json["code"]) == (400, "offset-mismatch")
        assert answer.headers["Connection"] == "close"
        granted(answer)


@pytest.mark.parametrize("origin", STRANGERS)
def test_an_unknown_origin_gets_nothing(site: Server, file_id: str, origin: str) -> None:
    """An origin that is not exactly one of the list gets no grant, only word that it matters."""
    for path in ("/v1/jobs", f"/v1/files/{file_id}/content", "/nowhere", "/"):
        answer = site.get(path, Origin=origin)
        assert grants(answer) == {}
        assert answer.headers["Vary"].split(", ")[-1] == "Origin"
    asked = {"Origin": origin, **ASKED}
    answer = site.request("OPTIONS", "/v1/jobs", headers=asked)
    assert (answer.status, grants(answer)) == (204, {})
    assert answer.headers["Vary"] == "Origin"


def test_without_an_origin_only_caches_are_told(site: Server) -> None:
    """A request that no page has sent is answered with Vary, so that no cache mixes them up."""
    answer = site.get("/v1/jobs")
    assert (grants(answer), answer.headers["Vary"]) == ({}, "Origin")


def test_any_origin_is_granted_without_credentials(anyone: Server) -> None:
    """With * every page may read, never with credentials, which browsers would refuse anyway."""
    for origin in (APP, "https://evil.example", "null"):
        answer = anyone.get("/v1/jobs", Origin=origin)
        assert grants(answer) == {"Allow-Origin": "*", "Expose-Headers": SHOWN}
        assert answer.headers["Vary"] == "Origin"
        asked = {"Origin": origin, **ASKED}
        preflight = grants(anyone.request("OPTIONS", "/v1/jobs", headers=asked))
        assert preflight["Allow-Origin"] == "*"
        assert "Allow-Credentials" not in preflight
    assert grants(anyone.get("/v1/jobs")) == {}


def test_by_default_there_is_no_grant(serve: Serve) -> None:
    """Without the setting answers say nothing of origins, and a preflight is told of methods."""
    server = serve()
    answer = server.get("/v1/jobs", Origin=APP)
    assert (answer.status, grants(answer)) == (200, {})
    assert "Vary" not in answer.headers
    asked = server.request("OPTIONS", "/v1/jobs", headers={"Origin": APP, **ASKED})
    assert (asked.status, grants(asked)) == (204, {})
    assert "Vary" not in asked.headers


# Preflights


def example(pattern: str) -> str:
    """A path that the pattern of a route matches: of several words the first, else an x."""

    def fill(group: re.Match[str]) -> str:
        words = re.fullmatch(r"[a-z|]*", group[1])
        return group[1].partition("|")[0] if words else "x"

    return re.sub(r"\((.*?)\)", fill, pattern.removesuffix("/?"))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.pattern)
def test_every_route_answers_a_preflight(site: Server, route: Any) -> None:
    """A preflight of an allowed origin is told what it may do there, with nothing to show."""
    path = example(route.pattern)
    answer = site.request("OPTIONS", path, headers={"Origin": APP, **ASKED})
    assert (answer.status, answer.body) == (204, b"")
    told = grants(answer)
    methods = told.pop("Allow-Methods")
    assert told == {
        "Allow-Origin": APP,
        "Allow-Credentials": "true",
        "Allow-Headers": SENDABLE,
        "Max-Age": "86400",
    }
    assert answer.headers["Vary"] == "Origin"
    assert {*route.methods, "OPTIONS"} <= set(methods.split(", "))
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(methods.split(", ")):
        assert site.request(method, path).status in (400, 405)


@pytest.mark.parametrize("path", ["/v1/jobs", "/x/process/", "/healthz", "/v1/ws", "/"])
def test_plain_options_is_answered_to_anyone(site: Server, path: str) -> None:
    """OPTIONS that is no preflight gets the methods, whatever page has sent it."""
    for headers in ({}, {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, ASKED):
        answer = site.request("OPTIONS", path, headers=headers)
        assert (answer.status, grants(answer)) == (204, {})
        assert {"GET", "OPTIONS"} <= set(answer.headers["Allow"].split(", "))
    answer = site.request("OPTIONS", path, headers={"Origin": APP})
    granted(answer)


def test_options_needs_a_known_host(site: Server) -> None:
    """A name that someone else has pointed at this machine learns nothing by OPTIONS."""
    for path in ("/v1/jobs", "/v1/ws", "/"):
        assert site.request("OPTIONS", path, headers={"Host": "evil.example"}).status == 403


def test_options_looks_at_nothing_but_the_host(site: Server) -> None:
    """What would be a 400 in another request is none in a question."""
    answer = site.request("OPTIONS", "/v1/jobs", headers={"X-Client-Id": "a b"})
    assert answer.status == 204


def test_a_private_network_is_granted_if_asked_for(site: Server) -> None:
    """A public page that is allowed may reach a private address, when its browser asks."""
    private = {"Access-Control-Request-Private-Network": "true"}
    asked = {"Origin": APP, **ASKED, **private}
    answer = site.request("OPTIONS", "/v1/jobs", headers=asked)
    assert grants(answer)["Allow-Private-Network"] == "true"
    stranger = asked | {"Origin": "https://evil.example"}
    assert grants(site.request("OPTIONS", "/v1/jobs", headers=stranger)) == {}


def test_a_405_names_options(site: Server) -> None:
    """The methods that a 405 tells include OPTIONS, as it is answered."""
    assert site.delete("/v1/jobs").headers["Allow"] == "GET, POST, OPTIONS"


# What an allowed page may do


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": APP},
        {"Origin": APP, "Sec-Fetch-Site": "cross-site"},
        {"Origin": LOCAL, "Sec-Fetch-Site": "same-site"},
    ],
    ids=lambda headers: " ".join(headers.values()),
)
def test_an_allowed_page_changes_state(site: Server, headers: dict[str, str], name: str) -> None:
    """A page of an allowed origin uploads, starts and deletes as our own page does."""
    up = site.request("POST", f"/upload?file_name={name}&is_complete=1", b"data", headers)
    assert up.status == 200
    assert site.request("DELETE", f"/v1/files/{up.json['id']}", headers=headers).status == 204
    # This one changes state by GET.
    started = site.request("GET", f"/{name}/process/?kind=count&steps=0", headers=headers)
    assert started.status == 200


@pytest.mark.parametrize("origin", STRANGERS)
def test_another_page_still_changes_nothing(site: Server, origin: str) -> None:
    """A list of allowed origins opens the service to these and no others."""
    for method, path in (("POST", "/v1/jobs"), ("GET", "/x/process/"), ("POST", "/upload")):
        for headers in ({}, {"Sec-Fetch-Site": "cross-site"}):
            answer = site.request(method, path, headers={"Origin": origin, **headers})
            assert (answer.status, answer.json["code"]) == (403, "cross-site")


def test_without_an_origin_nothing_is_allowed(site: Server, anyone: Server) -> None:
    """A link or an image of another site, which tells no origin, still changes nothing."""
    for server in (site, anyone):
        for headers in ({}, {"Origin": ""}):
            sent = {"Sec-Fetch-Site": "cross-site", **headers}
            assert server.request("GET", "/x/process/", headers=sent).status == 403


def test_any_page_changes_state_if_any_is_allowed(anyone: Server) -> None:
    """With * the page of any site may do it."""
    sent = {"Origin": "https://other.example", "Sec-Fetch-Site": "cross-site"}
    assert anyone.request("POST", "/x/process/?kind=count&steps=0", headers=sent).status == 200


@pytest.mark.parametrize(
    ("origin", "headers", "status"),
    [
        (APP, [], 101),
        (APP, ["Sec-Fetch-Site: cross-site"], 101),
        (LOCAL, [], 101),
        ("https://evil.example", [], 403),
        ("https://app.example:8443", ["Sec-Fetch-Site: cross-site"], 403),
        ("null", [], 403),
    ],
)
def test_the_channel_opens_for_an_allowed_page(
    site: Server, origin: str, headers: list[str], status: int
) -> None:
    """A page of an allowed origin may open the channel, others may not."""
    url = f"ws://127.0.0.1:{site.port}/v1/ws"
    try:
        websocket.create_connection(url, timeout=10, origin=origin, header=headers).close()
    except websocket.WebSocketBadStatusException as error:
        assert error.status_code == status
    else:
        assert status == 101


# Handlers of a dialect, in one process with the server


class DialectHandler(BaseHandler):
    """Takes a body by PATCH, looks by HEAD, and has more to say to OPTIONS."""

    STREAMS = True
    OVERRIDES = True

    async def admit(self) -> None:
        """Is only asked about methods that there are."""
        if self.request.method not in self.allowed():
            raise SluiceError("bad-request")

    async def options(self, *args: str, **kwargs: str) -> None:
        """Tell of the dialect, too."""
        await super().options(*args, **kwargs)
        self.set_header("Tus-Version", "1.0.0")

    async def head(self) -> None:
        """Headers of something with a body."""
        self.set_header("Upload-Offset", "7")
        self.set_header("Content-Length", "1000")

    async def post(self) -> None:
        """What it is without an override."""
        self.reply({"as": "POST"})

    async def patch(self) -> None:
        """The body, as it arrives."""
        pieces = [bytes(piece) async for piece in self.body]
        self.set_header("Vary", "Prefer")
        self.reply({"as": "PATCH", "body": b"".join(pieces).decode()})


class ShortHandler(BaseHandler):
    """Says nothing but 204, to methods that POST may stand for."""

    OVERRIDES = True

    async def head(self) -> None:
        """Done."""
        self.set_status(204)

    async def delete(self) -> None:
        """Done."""
        self.set_status(204)


class PlainHandler(BaseHandler):
    """Wants no overrides."""

    async def post(self) -> None:
        """What it is."""
        self.set_header("Vary", "Accept, origin")
        self.reply({"as": "POST"})

    async def delete(self) -> None:
        """What it must not become."""


@pytest.fixture
def app(io_loop: IOLoop, tmp_path: Path) -> Iterator[Application]:
    """The service in this process, not yet recovered, with handlers of a dialect."""
    opened = assembled(Config(data=tmp_path / "data", cors_origins=(APP,)))
    parts = io_loop.run_sync(opened.__aenter__)
    app = make_app(parts.services)
    routes = [("/dialect", DialectHandler), ("/short", ShortHandler), ("/plain", PlainHandler)]
    app.add_handlers(".*", list(routes))
    app.settings["parts"] = parts
    yield app
    io_loop.run_sync(lambda: parts.services.manager.close(5))
    io_loop.run_sync(lambda: opened.__aexit__(None, None, None))


@pytest.mark.gen_test
async def test_a_preflight_does_not_wait_for_recovery(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str
) -> None:
    """While the service is starting a browser already learns what it may send."""
    url = f"{base_url}/v1/jobs"
    assert (await http_client.fetch(url, raise_error=False)).code == 503
    asked = {"Origin": APP, **ASKED}
    answer = await http_client.fetch(url, method="OPTIONS", headers=asked)
    assert answer.code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == APP


@pytest.mark.gen_test
async def test_a_dialect_has_more_to_say(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str
) -> None:
    """A handler adds its own headers to those that OPTIONS has everywhere."""
    asked = {"Origin": APP, **ASKED}
    answer = await http_client.fetch(f"{base_url}/dialect", method="OPTIONS", headers=asked)
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert answer.headers["Access-Control-Allow-Methods"] == "HEAD, POST, PATCH, OPTIONS"
    assert answer.headers["Allow"] == "HEAD, POST, PATCH, OPTIONS"


async def by_post(
    http_client: AsyncHTTPClient, app: Application, url: str, method: str, **headers: str
) -> HTTPResponse:
    """POST that asks to be taken for another method."""
    await recover(app.settings["parts"])
    sent = {
        "X-HTTP-Method-Override": method,
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    return await http_client.fetch(
        url, method="POST", body=b"some bytes", headers=sent, raise_error=False
    )


@pytest.mark.gen_test
async def test_vary_keeps_what_the_handler_says(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """Origin is added to the Vary of a handler, unless it is there."""
    answer = await by_post(http_client, app, f"{base_url}/dialect", "PATCH")
    assert answer.headers.get_list("Vary") == ["Prefer, Origin"]
    answer = await by_post(http_client, app, f"{base_url}/plain", "PATCH")
    assert answer.headers.get_list("Vary") == ["Accept, origin"]


# Method override


@pytest.mark.gen_test
async def test_a_post_stands_for_patch(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """The handler of the other method runs, and its body comes piece by piece."""
    answer = await by_post(http_client, app, f"{base_url}/dialect", "PATCH")
    assert answer.body == b'{"as":"PATCH","body":"some bytes"}\n'


@pytest.mark.gen_test
async def test_a_post_stands_for_delete(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """Also where the handler has no POST."""
    assert (await by_post(http_client, app, f"{base_url}/short", "DELETE")).code == 204


@pytest.mark.gen_test
async def test_a_204_has_no_length(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """An answer that has no body by itself is given none."""
    answer = await by_post(http_client, app, f"{base_url}/short", "HEAD")
    assert answer.code == 204
    assert "Content-Length" not in answer.headers


@pytest.mark.gen_test
async def test_a_post_stands_for_head(
    http_server: HTTPServer, app: Application, http_port: int
) -> None:
    """The headers are those of HEAD, and who waits for the body of a POST gets an empty one."""
    await recover(app.settings["parts"])
    reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
    head = "POST /dialect HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    other = "Origin: https://evil.example\r\nContent-Length: 3\r\nX-HTTP-Method-Override: HEAD\r\n"
    for _ in range(2):  # on one connection
        writer.write(f"{head}{other}\r\nabc".encode())
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert answer.startswith("HTTP/1.1 200 ")
        assert "\r\nUpload-Offset: 7\r\n" in answer
        assert "\r\nContent-Length: 0\r\n" in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.gen_test
async def test_an_overridden_method_changes_state(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """What holds for the method holds for a POST that stands for it."""
    url = f"{base_url}/short"
    evil = await by_post(http_client, app, url, "DELETE", Origin="https://evil.example")
    assert evil.code == 403
    assert (await by_post(http_client, app, url, "DELETE", Origin=APP)).code == 204


@pytest.mark.gen_test
async def test_a_post_stands_for_nothing_else(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """Other words are a 400, a method that the handler has not is a 405, and neither runs."""
    for word in ("PUT", "GET", "POST", "patch", "TRACE", "PATCH, DELETE", ""):
        answer = await by_post(http_client, app, f"{base_url}/dialect", word)
        assert answer.code == 400
        assert b'"field":"X-HTTP-Method-Override"' in answer.body
    answer = await by_post(http_client, app, f"{base_url}/dialect", "DELETE")
    assert answer.code == 405
    assert answer.headers["Allow"] == "HEAD, POST, PATCH, OPTIONS"


@pytest.mark.gen_test
async def test_who_wants_no_override_has_none(
    http_client: AsyncHTTPClient, http_server: HTTPServer, base_url: str, app: Application
) -> None:
    """Elsewhere, and in other methods than POST, the header means nothing."""
    answer = await by_post(http_client, app, f"{base_url}/plain", "DELETE")
    assert answer.body == b'{"as":"POST"}\n'
    sent = {"X-HTTP-Method-Override": "DELETE"}
    head = await http_client.fetch(f"{base_url}/dialect", method="HEAD", headers=sent)
    assert head.headers["Upload-Offset"] == "7"
