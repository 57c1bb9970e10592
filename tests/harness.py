"""A real server in a process of its own, and small clients for it."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import jsonschema_rs
import websocket

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("SCALE") == "full"
T = TypeVar("T")


class Answer(NamedTuple):
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Server:
    """One data folder, and the server that runs on it (or does not, after ``kill``)."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.log_path = folder.parent / f"{folder.name}.log"
        self._threads = 0

    def start(self, *, ready: bool = True) -> Server:
        """Start it and wait until it is ready; the port stays the same over restarts."""
        self.log = self.log_path.open("a")
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "serve.py"),
                *("--address", "127.0.0.1", "--port", str(self.port)),
                *("--data", str(self.folder), *self.options),
            ],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
            | dict(self.env),
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, f"the server did not start: {line!r} {self.log_path.read_text()}"
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])
        if ready:
            eventually(self.is_ready, "the server is ready")
        return self

    def is_ready(self) -> bool:
        """Whether it takes work; not if it is down, or dies just now."""
        try:
            return self.get("/readyz").status == 200
        except ConnectionError:
            return False

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        """The base address, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def status(self, field: str) -> int:
        """A number of /proc/PID/status: VmHWM in kB, Threads."""
        self.check_threads()
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise KeyError(field)

    def check_threads(self) -> None:
        """Fail if the server has more than one thread."""
        if self.process is not None and self.process.poll() is None:
            self._threads = max(self._threads, len(os.listdir(f"/proc/{self.pid}/task")))
        assert self._threads <= 1, f"{self._threads} threads"

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        assert self.process is not None
        self.process.kill()
        self._ended()

    def stop(self, within_s: float = 60) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(within_s)
        return self._ended()

    def _ended(self) -> int:
        assert self.process is not None
        status = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
        self.process = None
        return status

    def close(self) -> None:
        """Stop it if it runs, and fail if it has logged a warning or an error, or a thread."""
        if self.process is not None:
            self.check_threads()
            assert self.stop() == 0, self.log_path.read_text()
        # How long a step takes is the machine's doing; benchmarks look at it.
        allowed = (" INFO ", " DEBUG ", "held the loop", *self.expected)
        lines = self.log_path.read_text().splitlines()
        noise = [line for line in lines if not any(part in line for part in allowed)]
        assert noise == [], "\n".join(noise)

    expected: tuple[str, ...] = ()
    """Parts of log lines that the test expects."""

    env: Mapping[str, str] = {}
    """Variables for the next start (see tests/serve.py)."""

    # Clients

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> Answer:
        """One request on a connection of its own. A dict or list body is sent as JSON."""
        sent = dict(headers or {})
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            # An early answer may end the sending; it can still be read.
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers.items()), answer.read())
        finally:
            connection.close()
            self.check_threads()

    def get(self, path: str, **headers: str) -> Answer:
        """GET."""
        try:
            return self.request(
                "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )
        except ConnectionRefusedError:
            return Answer(0, {}, b"")

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        """POST."""
        return self.request(
            "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    def delete(self, path: str, **headers: str) -> Answer:
        """DELETE."""
        return self.request(
            "DELETE", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    def job(self, job_id: str) -> Any:
        """One job."""
        answer = self.get(f"/v1/jobs/{job_id}")
        if answer.status == 0:
            raise ConnectionRefusedError
        assert answer.status == 200, answer
        return answer.json

    def jobs(self, query: str = "") -> list[Any]:
        """A page of jobs."""
        return list(self.get(f"/v1/jobs{query}").json["items"])

    def wait_for(self, job_id: str, *states: str, within_s: float = 60) -> Any:
        """The job as soon as it is in one of the states."""
        return eventually(
            lambda: (job := self.job(job_id))["state"] in states and job,
            f"job {job_id} becomes {states}",
            within_s,
        )

    def socket(self, *protocols: str, **options: Any) -> Socket:
        """A client of the channel."""
        return Socket(f"ws://127.0.0.1:{self.port}/v1/ws", list(protocols), **options)


def strict(schema: Any) -> Any:
    """A schema whose objects are closed: what is not described does not fit."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


class Described:
    """What a server's AsyncAPI document says that it says."""

    def __init__(self, document: Any) -> None:
        components = document["components"]
        self._schemas = strict(components["schemas"])
        self._said: dict[str, list[jsonschema_rs.Draft7Validator]] = {}
        for message in document["operations"]["say"]["messages"]:
            title = message["$ref"].rpartition("/")[2]
            name = components["messages"][title]["name"]
            self._said.setdefault(name, []).append(self.validator(title))

    def validator(self, title: str) -> jsonschema_rs.Draft7Validator:
        """What takes that schema, and nothing beside it."""
        ref = {"$ref": f"#/components/schemas/{title}"}
        return jsonschema_rs.Draft7Validator(
            {"allOf": [ref], "components": {"schemas": self._schemas}}
        )

    def complaint(self, message: Any) -> str | None:
        """Why the server may not say this."""
        t = message.get("t") if isinstance(message, dict) else None
        validators = self._said.get(t, []) if isinstance(t, str) else []
        if any(validator.is_valid(message) for validator in validators):
            return None
        why = [
            f"{error.instance_path}: {error.message}"
            for validator in validators
            for error in validator.iter_errors(message)
        ]
        return f"not described: {message!r}: {why}"


@functools.cache
def described(netloc: str) -> Described:
    """The document of the server at an address."""
    host, _, port = netloc.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("GET", "/asyncapi.json")
        return Described(json.loads(connection.getresponse().read()))
    finally:
        connection.close()


class Socket:
    """A websocket-client that reads in the background (of the test's process).

    Every frame is held against the server's own AsyncAPI document; what does not fit fails the test
    as soon as it waits for anything, or closes.
    """

    def __init__(self, url: str, protocols: list[str], **options: Any) -> None:
        self._described = described(urlsplit(url).netloc)
        self._complaints: list[str] = []
        self.ws = websocket.create_connection(
            url, subprotocols=protocols or None, timeout=60, suppress_origin=True, **options
        )
        self.seen: list[Any] = []
        self._inbox: queue.Queue[Any] = queue.Queue()
        self.close_code: int | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while True:
                opcode, data = self.ws.recv_data()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    self.close_code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 1005
                    break
                if opcode != websocket.ABNF.OPCODE_TEXT:
                    continue
                message = json.loads(data)
                for one in message if isinstance(message, list) else [message]:
                    if (complaint := self._described.complaint(one)) is not None:
                        self._complaints.append(complaint)
                    self.seen.append(one)
                    self._inbox.put(one)
        except (websocket.WebSocketException, OSError):
            pass
        self._inbox.put(None)

    def say(self, **message: Any) -> None:
        """Send one message."""
        self.ws.send(json.dumps(message))

    def until(self, wanted: Callable[[Any], Any], within_s: float = 60) -> Any:
        """The next message for which ``wanted`` is true; None stands for the end."""
        end = time.monotonic() + within_s
        while True:
            message = self._inbox.get(timeout=max(0.01, end - time.monotonic()))
            self.check()
            if message is None:
                raise EOFError(f"closed with {self.close_code}")
            if wanted(message):
                return message

    def until_closed(self, within_s: float = 60) -> int | None:
        """The close code."""
        self._reader.join(within_s)
        assert not self._reader.is_alive()
        self.check()
        return self.close_code

    def check(self) -> None:
        """Fail if the server has said what its document does not describe."""
        assert self._complaints == [], "\n".join(self._complaints)

    def close(self) -> None:
        """Close the socket."""
        self.ws.close()
        self._reader.join(60)
        # Also where the server was the first to close.
        self.ws.shutdown()  # type: ignore[no-untyped-call]
        self.check()


def eventually(check: Callable[[], T], what: str, within_s: float = 60) -> T:
    """The first true value of ``check``, asked again and again."""
    end = time.monotonic() + within_s
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def form(*files: tuple[str, str, bytes], boundary: str = "xxBOUNDARYxx") -> tuple[bytes, str]:
    """A multipart body of (field, filename, content), and its Content-Type."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for field, name, content in files
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"
