"""Where a request comes from decides what it may do; its client label only names it."""

from __future__ import annotations

from typing import Any

import pytest
import websocket

from tests.handlers.clients import Caller, Raw
from tests.harness import Answer, Server

OPTIONS = ("--hosts", "files.example,OTHER.example")
PORT = "{port}"


def ask(site: Server, method: str, path: str, **headers: str) -> Answer:
    """A request with these headers; Host replaces the usual one."""
    own = f"127.0.0.1:{site.port}"
    sent = {"Host": own} | {k.replace("_", "-"): v for k, v in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in sent.items())]
    with Raw(site) as raw:
        raw.send("\r\n".join([*lines, "Content-Length: 0", "", ""]).encode("latin-1"))
        return raw.answer()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:80",
        "127.0.0.1:{port}",
        "localhost",
        "LOCALHOST:1",
        "sluice.localhost",
        "[::1]:{port}",
        "192.168.7.9",
        "files.example",
        "Files.Example:8443",
        "other.example",
    ],
)
def test_a_known_host_is_answered(site: Server, host: str) -> None:
    """Its own address, any IP address, localhost and configured names are known."""
    assert ask(site, "GET", "/v1/jobs", Host=host.format(port=site.port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "notlocalhost",
        "user@evil.example",
        "2130706433",
        "",
        ":{port}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/", "/static/index.html", "/v1/ws", "/nowhere"])
def test_an_unknown_host_is_refused(site: Server, host: str, path: str) -> None:
    """A name that someone else may point at this machine is not answered (DNS rebinding)."""
    answer = ask(site, "GET", path, Host=host.format(port=site.port))
    assert answer.status in (400, 403)
    if answer.headers.get("Content-Type") == "application/problem+json":
        assert answer.json["code"] == "unknown-host"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_probe_needs_no_host(site: Server, path: str) -> None:
    """Health and readiness are told to anyone."""
    assert ask(site, "GET", path, Host="evil.example").status == 200


CHANGES = [
    ("POST", "/v1/jobs"),
    ("POST", "/v1/jobs/none/pause"),
    ("DELETE", "/v1/jobs/none"),
    ("DELETE", "/v1/files/none"),
    ("POST", "/upload"),
    ("POST", "/upload?file_name=x&bytes_read=0"),
    ("DELETE", "/upload/terminate"),
    ("POST", "/upload/cancel?file_name=x"),
    ("POST", "/export"),
    ("POST", "/export/terminate"),
    ("GET", "/x/process/"),
    ("POST", "/x/process/"),
    ("POST", "/x/process/pause/"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://["},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "{own}"},
    ],
    ids=lambda headers: " ".join(headers.values()),
)
def test_another_site_changes_nothing(
    site: Server, method: str, path: str, headers: dict[str, str]
) -> None:
    """What changes state is refused to a page of another site."""
    given = {k: v.format(own=site.url) for k, v in headers.items()}
    answer = ask(site, method, path, **given)
    assert (answer.status, answer.json["code"]) == (403, "cross-site")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "{own}"},
        {"Origin": "{own}", "Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin"},
    ],
)
def test_our_own_page_and_programs_may(site: Server, headers: dict[str, str]) -> None:
    """Our own page, a typed address and programs that are no browsers are served."""
    given = {k: v.format(own=site.url) for k, v in headers.items()}
    assert ask(site, "POST", "/x/process/cancel/", **given).json["code"] == "job-unknown"
    assert ask(site, "DELETE", "/v1/jobs/none", **given).json["code"] == "job-unknown"


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/files", "/", "/healthz"])
def test_another_site_may_look(site: Server, path: str) -> None:
    """A GET that changes nothing is answered; the browser keeps the answer from the page."""
    answer = ask(site, "GET", path, Origin="https://evil.example", Sec_Fetch_Site="cross-site")
    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
    if path != "/healthz":
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def upgrade(site: Server, **options: Any) -> int:
    """Try to open the channel; the status of the answer."""
    try:
        connection = websocket.create_connection(
            f"ws://127.0.0.1:{site.port}/v1/ws", timeout=10, **options
        )
    except websocket.WebSocketBadStatusException as error:
        return int(error.status_code)
    connection.close()
    return 101


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"suppress_origin": True}, 101),
        ({"origin": "{own}"}, 101),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"suppress_origin": True, "header": ["Sec-Fetch-Site: cross-site"]}, 403),
        ({"origin": "{own}", "header": ["Sec-Fetch-Site: same-origin"]}, 101),
        ({"suppress_origin": True, "host": "evil.example"}, 403),
        ({"origin": "http://evil.example", "host": "evil.example"}, 403),
        ({"suppress_origin": True, "host": "files.example"}, 101),
        ({"origin": "https://files.example", "host": "files.example"}, 101),
    ],
)
def test_the_channel_opens_only_for_our_own_page(
    site: Server, options: dict[str, Any], status: int
) -> None:
    """A page of another site can't open the channel; a program without Origin can."""
    given = {k: v.format(own=site.url) if isinstance(v, str) else v for k, v in options.items()}
    assert upgrade(site, **given) == status


def test_the_client_label_is_kept(site: Server, name: str) -> None:
    """X-Client-Id, else the cookie client_id, labels what a caller starts."""
    assert ask(site, "POST", "/a/process/", X_Client_Id="tab-7").json["client"] == "tab-7"
    assert ask(site, "POST", "/b/process/", Cookie="client_id=tab-8").json["client"] == "tab-8"
    both = ask(site, "POST", "/c/process/", X_Client_Id="tab-9", Cookie="client_id=tab-8")
    assert both.json["client"] == "tab-9"
    assert ask(site, "POST", "/d/process/").json["client"] == ""
    assert both.json["by"]["actor"] == "tab-9"
    for label in "abcd":
        site.post(f"/{label}/process/cancel/")


@pytest.mark.parametrize("label", ["x" * 129, "a b", "a\tb", "ü"])
def test_a_wrong_client_label_is_a_400(site: Server, label: str) -> None:
    """A label that is too long or not printable is refused by name."""
    answer = ask(site, "GET", "/v1/jobs", X_Client_Id=label)
    assert (answer.status, answer.json["field"]) == (400, "X-Client-Id")


def test_a_label_grants_nothing(site: Server, caller: Caller, name: str) -> None:
    """What one client has stored and started, any client of the same owner sees."""
    file_id = caller.store(name, b"data")
    job = caller.post("/shared/process/").json
    other = Caller(site, "someone-else")
    assert other.content(file_id) == b"data"
    site.wait_for(job["id"], "running")
    assert other.post(f"/v1/jobs/{job['id']}/cancel").status == 202
