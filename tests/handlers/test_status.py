"""What the service tells of itself: health, readiness, numbers, errors, and its page."""

from __future__ import annotations

import socket

import pytest

from errors import CATALOGUE
from tests.handlers.clients import UUID7, Caller
from tests.harness import Server, eventually


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_probe_is_answered(site: Server, path: str) -> None:
    """A server that runs is healthy and ready."""
    answer = site.get(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")


def test_the_numbers_of_now(caller: Caller, name: str) -> None:
    """Status tells what moves, what waits, what is stored and what is free."""
    before = caller.get("/v1/status").json
    assert set(before) == {
        *("in_bytes_per_s", "out_bytes_per_s", "running", "slots", "queued"),
        *("running_by_kind", "subscribers", "children", "free_bytes", "disk_bytes"),
        *("loop_lag_ms", "files", "stored_bytes", "slow_steps"),
    }
    caller.block(name, 0, bytes(3 << 20), "&is_complete=1")
    job = caller.get(f"/{name}/process/").json
    caller.server.wait_for(job["id"], "running")
    answer = caller.get("/v1/status")
    now = answer.json
    assert answer.headers["Cache-Control"] == "no-store"
    assert (now["files"], now["stored_bytes"]) == (
        before["files"] + 1,
        before["stored_bytes"] + (3 << 20),
    )
    assert (now["running"], now["slots"]) == (1, 8)
    assert now["running_by_kind"][job["kind"]] == 1
    assert now["disk_bytes"] > now["free_bytes"] > 0 and now["loop_lag_ms"] >= 0
    eventually(lambda: caller.get("/v1/status").json["in_bytes_per_s"] > 0, "bytes are counted")
    caller.post(f"/{name}/process/cancel/")


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_error_has_a_page(site: Server, code: str) -> None:
    """The type of a problem is an address that explains it."""
    page = site.get(f"/errors/{code}")
    entry = CATALOGUE[code]
    assert (page.status, page.json["code"]) == (200, code)
    assert (page.json["status"], page.json["title"]) == (entry.status, entry.title)


def test_an_unknown_error_has_no_page(site: Server) -> None:
    """A code that the catalogue does not have is a 404."""
    assert site.get("/errors/nope").status == 404


@pytest.mark.parametrize(
    ("method", "path", "n"),
    [
        ("GET", "/nowhere", 0),
        ("GET", "/v1/", 0),
        ("GET", "/v2/jobs", 0),
        ("POST", "/nowhere", 10),
        ("PUT", "/nowhere", 4 << 20),
        ("DELETE", "/%2e%2e/etc/passwd", 0),
    ],
)
def test_what_is_nowhere_is_a_404(site: Server, method: str, path: str, n: int) -> None:
    """An address that is not there is a problem like any other, whatever is sent to it."""
    answer = site.request(method, path, bytes(n) if n else None)
    assert (answer.status, answer.json["code"]) == (404, "not-found")


def test_a_problem_has_all_its_fields(site: Server) -> None:
    """A problem tells its type, title, status, code, detail, next step and request."""
    answer = site.get("/v1/jobs/none", X_Request_Id="my-request-1")
    problem = answer.json
    assert problem == {
        "type": "/errors/job-unknown",
        "title": "No such job",
        "status": 404,
        "code": "job-unknown",
        "detail": problem["message"],
        "message": problem["detail"],
        "next": "GET /v1/jobs lists the jobs.",
        "retry": False,
        "retry_after_s": None,
        "request_id": "my-request-1",
    }
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-Id"] == "my-request-1"
    assert site.get(problem["type"]).status == 200


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "ü"])
def test_a_request_gets_an_id(site: Server, given: str) -> None:
    """A request that brings no good id of its own gets one."""
    for path in ("/v1/jobs", "/v1/jobs/none", "/nowhere"):
        assert UUID7.fullmatch(site.get(path, X_Request_Id=given).headers["X-Request-Id"])


@pytest.mark.parametrize("path", ["/", "/static/index.html", "/v1/jobs", "/v1/jobs/none", "/none"])
def test_security_headers(site: Server, path: str) -> None:
    """Every answer forbids sniffing, foreign use and referrers, and names no software version."""
    headers = site.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Server"] == "Sluice"


@pytest.mark.parametrize("path", ["/", "/static/index.html"])
def test_the_page_runs_nothing_foreign(site: Server, path: str) -> None:
    """The dashboard's policy allows its own files only, and no frame around it."""
    answer = site.get(path)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["Cache-Control"] == "no-cache"
    assert site.get(path, If_None_Match=answer.headers["Etag"]).status == 304


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static/nothing.js",
        "/static/",
        "/static//etc/passwd",
    ],
)
def test_nothing_outside_the_page_is_served(site: Server, path: str) -> None:
    """Only files of the dashboard are served, by no way others."""
    answer = site.get(path)
    assert answer.status in (403, 404)
    assert b"import" not in answer.body and b"root:" not in answer.body


def test_a_request_that_is_no_http_is_closed(site: Server) -> None:
    """Rubbish ends its connection and nothing else."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01 no http\r\n\r\n")
        answer = connection.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert site.get("/healthz").status == 200
