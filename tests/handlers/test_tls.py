"""The live channel over TLS, where every byte has to go through the stream."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from socket import SO_RCVBUF, SOL_SOCKET
from typing import Any

import pytest
import websocket

from tests.conftest import need
from tests.harness import Server, eventually

JOBS = 200


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a certificate that it signed itself."""
    folder = tmp_path_factory.mktemp("tls")
    pem = folder / "both.pem"
    subprocess.run(
        [
            *(need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost"),
            *("-keyout", str(pem), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text() + (folder / "cert.pem").read_text())
    server = Server(folder / "data")
    server.env = {"TLS": str(pem)}
    server.start(ready=False)
    eventually(lambda: ask(server, "GET", "/readyz")[0] == 200, "the server is ready")
    yield server
    server.close()


def connection(server: Server) -> http.client.HTTPSConnection:
    """A connection that trusts anyone."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30, context=context)


def ask(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """One request with JSON in and out."""
    one = connection(server)
    try:
        one.request(method, path, None if body is None else json.dumps(body))
        answer = one.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        one.close()


def subscribe(server: Server, **options: Any) -> websocket.WebSocket:
    """A subscriber to everything."""
    ws = websocket.create_connection(
        f"wss://127.0.0.1:{server.port}/v1/ws",
        subprotocols=["jobs.v1.json"],
        suppress_origin=True,
        timeout=30,
        sslopt={"cert_reqs": ssl.CERT_NONE, "check_hostname": False},
        **options,
    )
    ws.send(json.dumps([{"t": "hello"}, {"t": "sub", "id": 1}]))
    return ws


def read(ws: websocket.WebSocket) -> list[Any]:
    """The messages of the next frame."""
    said = json.loads(ws.recv())
    return said if isinstance(said, list) else [said]


def test_each_subscriber_gets_everything_in_order(secure: Server) -> None:
    """One that reads and one that does not until the end: the same chain, with nothing missing."""
    begun: list[int] = []
    readers = [subscribe(secure), subscribe(secure, sockopt=[(SOL_SOCKET, SO_RCVBUF, 4096)])]
    for ws in readers:
        snap = None
        while snap is None:
            snap = next((m for m in read(ws) if m["t"] == "snap"), None)
        begun.append(snap["s"])
    one = connection(secure)
    start = json.dumps({"kind": "count", "params": {"steps": 0}})
    ids = []
    for _ in range(JOBS):
        one.request("POST", "/v1/jobs", start)
        ids.append(json.loads(one.getresponse().read())["id"])
    one.close()
    for ws, at in zip(readers, begun, strict=True):
        told: list[tuple[str, int]] = []
        while len(told) < 3 * JOBS:
            for message in read(ws):
                if message["t"] in ("ev", "mark"):
                    assert message["p"] == at
                    at = message["s"]
                if message["t"] == "ev":
                    told.append((message["row"]["id"], message["row"]["version"]))
        assert sorted(told) == sorted((job, version) for job in ids for version in (1, 2, 3))
        ws.close()


def test_commands_and_streams_work(secure: Server) -> None:
    """A command is acknowledged, and server-sent events come."""
    ws = subscribe(secure)
    args = {"kind": "count", "params": {"steps": 0}}
    ws.send(json.dumps({"t": "cmd", "id": "x", "op": "start", "args": args}))
    ack = None
    while ack is None:
        ack = next((m for m in read(ws) if m.get("id") == "x"), None)
    assert (ack["t"], ack["v"]) == ("ack", 1)
    ws.close()
    one = connection(secure)
    epoch = ask(secure, "GET", "/v1/events")[1]["cursor"].partition(":")[0]
    one.request(
        "GET",
        f"/v1/events?after={epoch}:0&job={ack['job']}",
        headers={"Accept": "text/event-stream"},
    )
    answer = one.getresponse()
    seen: list[str] = []
    while "succeeded" not in seen:
        line = answer.readline().decode()
        if line.startswith('data: {"t":"ev"'):
            seen.append(json.loads(line[6:])["to"])
    assert seen == ["queued", "running", "succeeded"]
    answer.close()
    one.close()
