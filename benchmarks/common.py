"""What the benchmarks share: both servers in a folder of their own, curl, figures, reports.

A claim is a ratio to a peer that is measured in the same run, because the machine's own speed
changes from minute to minute. The ways take turns, each round begins with another one, and one
round is not counted. Figures are medians of the rounds; a ratio is the median of the rounds' own
ratios, so that a slow minute spoils both sides of it.

Environment: SIZE of a transfer (``1GiB``), ROUNDS (5), FOLDER for all data (``/dev/shm``, so that
the disk's own throttling is not what is measured).
"""

from __future__ import annotations

import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

from tests.interop.packages import installed

ROOT = Path(__file__).parent.parent
GIB = 1 << 30
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def size_bytes(text: str) -> int:
    """``512MiB`` and the like, or plain bytes."""
    return int(text[:-3]) * _UNITS[text[-3:]] if text[-3:] in _UNITS else int(text)


SIZE = size_bytes(os.environ.get("SIZE", "1GiB"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
FOLDER = os.environ.get("FOLDER", "/dev/shm")

# Reports


class Verdict(NamedTuple):
    """One claim with its bound."""

    claim: str
    found: str
    bound: str
    passed: bool

    def __str__(self) -> str:
        word = "PASS" if self.passed else "FAIL"
        return f"{word}: {self.claim}: {self.found} (bound: {self.bound})"


class Report(NamedTuple):
    """What a benchmark has found: a table, and the verdicts if it has bounds."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdicts: Sequence[Verdict] = ()

    @property
    def passed(self) -> bool:
        """Whether all bounds were kept."""
        return all(verdict.passed for verdict in self.verdicts)

    def text(self) -> str:
        """The report in Markdown, which reads well on a terminal, too."""
        lines = [" | ".join(self.head), " | ".join("---" for _ in self.head)]
        lines += [" | ".join(row) for row in self.rows]
        table = "\n".join(f"| {line} |" for line in lines)
        return "\n\n".join([table, *(f"- {verdict}" for verdict in self.verdicts)])


def at_least(claim: str, ratio: float, bound: float) -> Verdict:
    """A verdict on a ratio that must not be smaller."""
    return Verdict(claim, f"{ratio:.2f} x", f"at least {bound:.2f} x", ratio >= bound)


def at_most(claim: str, value: float, bound: float, unit: str = "x") -> Verdict:
    """A verdict on a value, or a ratio, that must not be bigger."""
    digits = 2 if unit == "x" else 1
    found, limit = f"{value:.{digits}f} {unit}", f"{bound:.{digits}f} {unit}"
    return Verdict(claim, found, f"at most {limit}", value <= bound)


def main(measure: Callable[[], Report]) -> int:
    """Run one benchmark by itself; the exit status."""
    report = measure()
    print(f"{report.title}\n\n{report.text()}")
    return 0 if report.passed else 1


# Processes


@contextmanager
def place(where: str | Path = FOLDER) -> Iterator[Path]:
    """An empty folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-bench-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def status_of(pid: int, field: str) -> int:
    """A number of /proc/PID/status: VmHWM in KiB, Threads."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def pss_kib(pid: int) -> int:
    """Memory that a process has, with its part of what it shares with others."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise KeyError(pid)


def allow_many_files() -> None:
    """Let the processes that are started from now on open as many files as may be."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Process:
    """A server that is stopped at the end of a ``with``."""

    port: int
    _process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The base address, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


class Sluice(_Process):
    """Our server, as anyone would start it."""

    def __init__(self, folder: Path, *options: str, name: str = "sluice") -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "server.py"), "--port", "0"),
                *("--data", str(folder / name), "--log-level", "warning", *options),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])
        while self.call("GET", "/readyz")[0] != 200:
            time.sleep(0.01)

    def connection(self) -> http.client.HTTPConnection:
        """A client's connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request with JSON in and out: the status and the answer."""
        connection = self.connection()
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def newest_file(self) -> str:
        """The id of the file that was stored last."""
        return str(self.call("GET", "/v1/files?limit=1")[1]["items"][0]["id"])

    def remove_newest_file(self) -> None:
        """Delete it, and wait until its space is free: that happens in slices, afterwards."""
        self.call("DELETE", f"/v1/files/{self.newest_file()}")
        folder = Path(f"/proc/{self.pid}/fd")
        while any(_is_deleted(entry) for entry in folder.iterdir()):
            time.sleep(0.02)


def _is_deleted(entry: Path) -> bool:
    try:
        return str(entry.readlink()).endswith("(deleted)")
    except FileNotFoundError:  # closed meanwhile
        return False


_NGINX = """
daemon off;
master_process off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_max_body_size 0;
    client_body_buffer_size {buffer};
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/files;
        location / {{ dav_methods PUT; }}
    }}
}}
"""


class Nginx(_Process):
    """The peer: one process, files by sendfile, uploads by PUT with a rename at the end."""

    def __init__(self, folder: Path, name: str = "nginx", buffer: str = "16k") -> None:
        self.files = folder / name / "files"
        self.files.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = folder / name / "nginx.conf"
        config.write_text(_NGINX.format(folder=config.parent, port=self.port, buffer=buffer))
        self._process = subprocess.Popen(
            ["nginx", "-p", str(config.parent), "-c", str(config)],
            text=True,
            stderr=subprocess.DEVNULL,  # the built-in error log; ours is in the folder
        )
        _connected(self.port, config.parent / "error.log").close()


_NCHAN = """
daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile {files};
load_module /usr/lib/nginx/modules/ngx_nchan_module.so;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1d;
    client_header_timeout 1d;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        nchan_channel_id all;
        nchan_message_buffer_length 10000;
        nchan_message_timeout 1m;
        nchan_subscriber_first_message newest;
        nchan_websocket_ping_interval 20s;
        location = /publish {{ nchan_publisher http; }}
        location = /subscribe {{ nchan_subscriber websocket; }}
    }}
}}
"""


class Nchan(_Process):
    """The peer for live channels: nginx with nchan, one process, messages kept in memory."""

    path = "/subscribe"
    _FILES = 20_000

    def __init__(self, folder: Path) -> None:
        home = folder / "nchan"
        home.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = home / "nginx.conf"
        config.write_text(_NCHAN.format(folder=home, port=self.port, files=self._FILES))
        self._process = subprocess.Popen(
            ["nginx", "-p", str(home), "-c", str(config)], text=True, stderr=subprocess.DEVNULL
        )
        self._publisher = _connected(self.port, home / "error.log")
        self._publisher.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def publish(self, message: bytes) -> None:
        """POST one message on the one kept connection, and wait for the answer."""
        head = b"POST /publish HTTP/1.1\r\nHost: nchan\r\nContent-Length: %d\r\n\r\n"
        self._publisher.sendall(head % len(message) + message)
        answer = self._publisher.recv(4096)
        if not answer.startswith((b"HTTP/1.1 201 ", b"HTTP/1.1 202 ")):
            raise RuntimeError(answer.decode("latin-1"))

    def __exit__(self, *_: object) -> None:
        self._publisher.close()
        super().__exit__()


def _connected(port: int, log: Path) -> socket.socket:
    """A connection to a server that is just starting."""
    for _ in range(500):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise RuntimeError(f"nginx did not start: {log.read_text() if log.exists() else ''}")


class TusServer(_Process):
    """The peer for resumable uploads: @tus/server with its file store, in one Node process."""

    path = "/files"  # of new uploads

    def __init__(self, folder: Path) -> None:
        packages = installed(ROOT / "benchmarks" / "package.json", "bench")
        self._files = folder / "tus-server"
        self._files.mkdir()
        self._process = subprocess.Popen(
            ["node", str(packages / "tus_server.mjs"), str(self._files), self.path],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("@tus/server did not start")
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])

    def remove_files(self) -> None:
        """Delete what it has stored."""
        for path in self._files.iterdir():
            path.unlink()


def source_file(path: Path, n: int) -> Path:
    """A file of ``n`` bytes that no one can compress or skip."""
    block = os.urandom(min(n, 4 << 20))
    with path.open("wb") as file:
        while n > 0:
            n -= file.write(block[:n])
    return path


def file_of_both(folder: Path, ours: Sluice, nginx: Nginx) -> str:
    """Store a file of SIZE here and show the very same one by nginx, as ``/big``; its id here."""
    source = source_file(folder / "source", SIZE)
    curl("-T", str(source), f"{ours.url}/upload?file_name=big&file_size={SIZE}", "-X", "POST")
    source.unlink()
    file = ours.newest_file()
    os.link(folder / "sluice" / "uploads" / file / "big", nginx.files / "big")
    return file


class Shot(NamedTuple):
    """One transfer as curl saw it."""

    status: int
    seconds: float
    sent: int
    received: int


def curl(*options: str) -> Shot:
    """Run curl. Nothing is shown or kept, and no 100-continue is waited for."""
    done = subprocess.run(
        ["curl", "-s", "-o", "/dev/null", "-H", "Expect:", "-w", "%{json}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout)
    return Shot(
        int(told["http_code"]),
        float(told["time_total"]),
        int(told["size_upload"]),
        int(told["size_download"]),
    )


def curl_all(source: Path, urls: Sequence[str], *options: str) -> Shot:
    """Send a file to many addresses at once, by one curl; the sums, and the time of all."""
    targets = [word for url in urls for word in ("-T", str(source), "-o", "/dev/null", url)]
    told = ["-w", "%{http_code} %{size_upload}\\n"]
    began = time.perf_counter()
    done = subprocess.run(
        [
            "curl",
            "-s",
            "-Z",
            "--parallel-max",
            str(len(urls)),
            "-H",
            "Expect:",
            *told,
            *options,
            *targets,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    answers = [line.split() for line in done.stdout.split("\n") if line]
    statuses = {int(status) for status, _ in answers}
    failed = [status for status in statuses if status not in (200, 201, 204)]
    return Shot((failed or [200])[0], seconds, sum(int(sent) for _, sent in answers), 0)


# Comparisons


class Way(NamedTuple):
    """One of the ways that are compared: a transfer, and what removes its traces."""

    name: str
    pid: int
    run: Callable[[], Shot]
    clean: Callable[[], None] = lambda: None


class Figures(NamedTuple):
    """What was found for one way."""

    name: str
    mb_per_s: float
    cpu_s_per_gib: float
    ratio: float  # of its throughput to that of the first way

    @property
    def row(self) -> list[str]:
        """A line of the table."""
        speed, cpu, ratio = f"{self.mb_per_s:,.0f}", f"{self.cpu_s_per_gib:.2f}", self.ratio
        return [self.name, speed, f"{ratio:.2f} x", cpu]


HEAD = ("Way", "MB/s", "ratio", "server CPU s/GiB")


def compare(ways: Sequence[Way], n: int) -> list[Figures]:
    """Let the ways take turns with transfers of ``n`` bytes; the first one is the peer."""
    seconds: list[list[float]] = [[] for _ in ways]
    cpu: list[list[float]] = [[] for _ in ways]
    for turn in range(ROUNDS + 1):
        for place_in_turn in range(len(ways)):
            at = (turn + place_in_turn) % len(ways)
            way = ways[at]
            before = cpu_s(way.pid)
            shot = way.run()
            used = cpu_s(way.pid) - before
            moved = max(shot.sent, shot.received)
            if shot.status not in (200, 201, 204) or moved < n:
                raise RuntimeError(f"{way.name}: status {shot.status}, {moved:,} bytes")
            way.clean()
            if turn:
                seconds[at].append(shot.seconds)
                cpu[at].append(used)
    return [
        Figures(
            way.name,
            n / median(seconds[at]) / 1e6,
            median(cpu[at]) / (n / GIB),
            median(peer / own for peer, own in zip(seconds[0], seconds[at], strict=True)),
        )
        for at, way in enumerate(ways)
    ]
