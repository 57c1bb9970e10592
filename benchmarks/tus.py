"""One resumable upload (tus PATCH) at full speed, watched, against nginx PUT and @tus/server.

Claims: PATCH reaches at least 1.2 x the throughput of nginx taking the same file by PUT, at no more
than 0.8 x its CPU, and at least 2 x the throughput of @tus/server; a subscriber of the channel is
shown the progress meanwhile. With a digest (SHA-256 and CRC-32) of every upload it keeps at least
0.45 x of its own throughput at no more than 1.2 x its own CPU: a process of its own hashes, whose
CPU stands apart. An upload counts until its file is published, digest and all.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import websocket

from benchmarks.common import (
    GIB,
    HEAD,
    ROUNDS,
    SIZE,
    Nginx,
    Report,
    Shot,
    Sluice,
    TusServer,
    Verdict,
    Way,
    at_least,
    at_most,
    compare,
    cpu_s,
    curl,
    main,
    place,
    source_file,
)

TUS = {"Tus-Resumable": "1.0.0"}


def create(port: int, path: str, size: int) -> str:
    """Begin a tus upload; its path."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, headers=TUS | {"Upload-Length": str(size)})
        answer = connection.getresponse()
        answer.read()
        location = answer.headers["Location"]
    finally:
        connection.close()
    return str(urlsplit(urljoin(f"http://127.0.0.1:{port}{path}", location)).path)


def patch(port: int, path: str, source: str) -> Shot:
    """Create an upload and send all of it by one PATCH, which is what is timed."""
    where = create(port, path, Path(source).stat().st_size)
    return curl(
        *("-X", "PATCH", "-T", source, f"http://127.0.0.1:{port}{where}"),
        *("-H", "Tus-Resumable: 1.0.0", "-H", "Upload-Offset: 0"),
        *("-H", "Content-Type: application/offset+octet-stream"),
    )


@contextmanager
def watching(ours: Sluice) -> Iterator[list[int]]:
    """Subscribe to everything; the number of progress frames received."""
    ws = websocket.create_connection(f"ws://127.0.0.1:{ours.port}/v1/ws", suppress_origin=True)
    frames = [0]

    def read() -> None:
        try:
            while True:
                told = json.loads(ws.recv())
                several = told if isinstance(told, list) else [told]
                frames[0] += sum(one.get("t") == "p" for one in several)
        except (websocket.WebSocketException, OSError, ValueError):
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    yield frames
    ws.close()
    reader.join()


def children_cpu_s(pid: int) -> float:
    """CPU seconds of the children that a process has now."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(cpu_s(int(child)) for child in listed)


def measure() -> Report:
    """Compare the ways."""
    with (
        place() as folder,
        Sluice(folder, name="plain") as plain,
        Sluice(folder, "--digest", "always", name="digest") as hashing,
        Nginx(folder) as nginx,
        TusServer(folder) as peer,
        watching(plain) as frames,
        watching(hashing),
    ):
        source = str(source_file(folder / "source", SIZE))
        figures = compare(
            [
                Way(
                    "nginx PUT",
                    nginx.pid,
                    lambda: curl("-T", source, f"{nginx.url}/target"),
                    (nginx.files / "target").unlink,
                ),
                Way(
                    "@tus/server PATCH",
                    peer.pid,
                    lambda: patch(peer.port, peer.path, source),
                    peer.remove_files,
                ),
                Way(
                    "Sluice PATCH",
                    plain.pid,
                    lambda: patch(plain.port, "/tus/", source),
                    plain.remove_newest_file,
                ),
                Way(
                    "Sluice PATCH, digest of each",
                    hashing.pid,
                    lambda: patch(hashing.port, "/tus/", source),
                    hashing.remove_newest_file,
                ),
            ],
            SIZE,
        )
        child = children_cpu_s(hashing.pid) / (ROUNDS + 1) / (SIZE / GIB)
    put, tus, ours, digest = figures
    rows = [each.row for each in figures]
    rows.append(["its hashing process", "", "", f"{child:.2f}"])
    return Report(
        "Resumable upload",
        HEAD,
        rows,
        [
            at_least("PATCH : nginx PUT, throughput", ours.ratio, 1.2),
            at_most("PATCH : nginx PUT, CPU", ours.cpu_s_per_gib / put.cpu_s_per_gib, 0.8),
            at_least("PATCH : @tus/server", ours.mb_per_s / tus.mb_per_s, 2.0),
            at_least("with digest : without, throughput", digest.mb_per_s / ours.mb_per_s, 0.45),
            at_most("with digest : without, CPU", digest.cpu_s_per_gib / ours.cpu_s_per_gib, 1.2),
            Verdict("progress frames seen", str(frames[0]), "at least 1", frames[0] > 0),
        ],
    )


if __name__ == "__main__":
    sys.exit(main(measure))
