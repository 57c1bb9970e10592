"""One upload in all the trouble there is, against a model of what may be stored.

A hypothesis state machine drives a real server over raw sockets: blocks, asked offsets, cut and
stalled connections, a second sender, pauses, deletes, and kill -9. The model knows which bytes were
acknowledged (they must be there) and which were sent (no others may be). The content depends on the
position, and whatever a sender sends after it was ousted is garbage, so a byte that lands where it
does not belong is seen.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from base64 import b64encode
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import Serve
from tests.harness import FULL, Answer, Server, eventually

SIZE = 3 << 20
DATA = hashlib.shake_256(b"a sluice is a gate").digest(SIZE)
GARBAGE = b"\xee" * 4096
OFFSET_TYPE = "application/offset+octet-stream"

amounts = st.sampled_from([1, 100, 16 << 10, 200_000, 1 << 20])


class Sender:
    """A PATCH whose bytes go out piece by piece."""

    def __init__(self, server: Server, path: str, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.sent = 0
        self.socket = socket.create_connection(("127.0.0.1", server.port), 20)
        self.socket.sendall(
            f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\nTus-Resumable: 1.0.0\r\n"
            f"Upload-Offset: {offset}\r\nContent-Type: {OFFSET_TYPE}\r\n"
            f"Content-Length: {length}\r\n\r\n".encode()
        )

    def send(self, n: int) -> None:
        """The next ``n`` bytes."""
        at = self.offset + self.sent
        self.socket.sendall(DATA[at : at + n])
        self.sent += n

    def status(self) -> int:
        """The answer's status; 0 if the connection ended without one."""
        with suppress(OSError):
            line = self.socket.recv(65536)
            return int(line.split()[1]) if line else 0
        return 0

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


class UploadMachine(RuleBasedStateMachine):
    """What may happen to one upload."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.senders: list[Sender] = []  # open, and perhaps ousted
        self.held: Sender | None = None
        self.paused = False
        self.acked = self.sent = 0

    # Requests

    def ask(self, method: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request for the upload."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.server.request(method, self.path, body, {"Tus-Resumable": "1.0.0"} | named)

    def patch(self, offset: int, body: bytes, **headers: str) -> Answer:
        """A whole block."""
        return self.ask(
            "PATCH", body, Upload_Offset=str(offset), Content_Type=OFFSET_TYPE, **headers
        )

    def settle(self) -> int:
        """Ask for the offset, which must lie between what was acknowledged and what was sent."""
        answer = self.ask("HEAD")
        assert answer.status in (200, 204), answer
        offset = int(answer.headers["Upload-Offset"])
        assert self.acked <= offset <= self.sent, (self.acked, offset, self.sent)
        self.acked = self.sent = offset  # a promise; and whoever was sending has been ousted
        return offset

    # Rules

    @initialize()
    def create(self) -> None:
        """Begin an upload."""
        answer = self.server.post("/tus/", None, Tus_Resumable="1.0.0", Upload_Length=str(SIZE))
        assert answer.status == 201, answer
        self.path = "/tus/" + answer.headers["Location"]
        self.id = self.path.rpartition("/")[2]
        self.acked = self.sent = 0

    @precondition(lambda self: not self.paused)
    @rule(n=amounts)
    def block(self, n: int) -> None:
        """A block at the true offset is stored; it ousts whoever was sending."""
        offset = self.settle()
        n = min(n, SIZE - 1 - offset)
        answer = self.patch(offset, DATA[offset : offset + n])
        assert answer.status == 204, answer
        assert int(answer.headers["Upload-Offset"]) == offset + n
        self.acked = self.sent = offset + n

    @precondition(lambda self: not self.paused)
    @rule(n=amounts, right=st.booleans())
    def checked_block(self, n: int, right: bool) -> None:
        """A block with a checksum is stored whole, or not at all."""
        offset = self.settle()
        body = DATA[offset : min(offset + n, SIZE - 1)]
        told = b64encode(hashlib.sha1(body if right else body + b"!").digest()).decode()
        answer = self.patch(offset, body, Upload_Checksum=f"sha1 {told}")
        assert answer.status == (204 if right else 460), answer
        self.acked = self.sent = offset + len(body) * right

    @rule(by=st.sampled_from([-1, 1, 1000]))
    def wrong_block(self, by: int) -> None:
        """A block at a wrong offset changes nothing and tells the true one."""
        offset = self.settle()
        if offset + by < 0:
            return
        answer = self.patch(offset + by, GARBAGE)
        assert answer.status == 409, answer
        assert int(answer.headers["Upload-Offset"]) == offset

    @rule(n=amounts)
    def cut(self, n: int) -> None:
        """A connection that ends in the middle: some of it may be stored, in order."""
        sender = self.begin(n)
        sender.close()

    @rule(n=amounts)
    def stall(self, n: int) -> None:
        """A sender that stops and stays."""
        self.senders.append(self.begin(n))

    def begin(self, n: int) -> Sender:
        """Send a part of a block, and leave it at that."""
        offset = self.settle()
        n = min(n, SIZE - 1 - offset)
        sender = Sender(self.server, self.path, offset, n + 1)
        if self.paused:
            n = min(n, 100_000)  # nobody reads: only what the kernel takes can be sent
        sender.send(n)
        self.sent = offset + n
        # Else the next request may come first, and then nobody ousts this one.
        eventually(self.is_connected, "the request has come")
        return sender

    def is_connected(self) -> bool:
        """Whether a request writes the upload, or waits to."""
        return bool(self.server.job(self.id)["transfer"]["connected"])

    @precondition(lambda self: self.senders)
    @rule()
    def late_bytes(self) -> None:
        """An ousted sender goes on sending: its bytes go nowhere."""
        self.settle()
        for sender in self.senders:
            with suppress(OSError):
                sender.socket.sendall(GARBAGE)
            sender.close()
        self.senders.clear()

    @precondition(lambda self: not self.paused)
    @rule()
    def pause(self) -> None:
        """From another screen."""
        assert self.server.post(f"/v1/jobs/{self.id}/pause").status in (200, 202)
        self.paused = True

    @precondition(lambda self: self.paused and self.held is None)
    @rule(n=amounts)
    def held_block(self, n: int) -> None:
        """A block for a paused upload is held; the offset stands still."""
        offset = self.settle()
        n = min(n, SIZE - 1 - offset, 100_000)
        self.held = Sender(self.server, self.path, offset, n)
        self.held.send(n)
        # Else it may come behind what follows, and oust it.
        eventually(self.is_connected, "the request has come")
        time.sleep(0.02)
        assert self.server.job(self.id)["transfer"]["stored_bytes"] == offset

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        """What was held goes on by itself."""
        self.resume_now()
        if self.held is not None and self.held.offset == self.acked:
            status = self.held.status()
            if status == 204:
                self.acked = self.sent = self.held.offset + self.held.length
            else:  # it was ousted, or the server died meanwhile
                assert status in (0, 409, 503), status
                self.sent = max(self.sent, self.held.offset + self.held.length)
        self.drop_held()

    def resume_now(self) -> None:
        """Resume, whatever is held."""
        assert self.server.post(f"/v1/jobs/{self.id}/resume").status == 200
        self.paused = False

    def drop_held(self) -> None:
        """End the held connection."""
        if self.held is not None:
            self.sent = max(self.sent, self.held.offset + self.held.length)
            self.held.close()
            self.held = None

    @rule()
    def kill(self) -> None:
        """kill -9: what was acknowledged is there, what was not may be."""
        self.server.kill()
        self.server.start()
        self.drop_held()

    @rule()
    def delete(self) -> None:
        """It ends at once, with whoever was sending; another upload begins."""
        assert self.ask("DELETE").status == 204
        assert self.ask("HEAD").status == 404
        eventually(lambda: not os.listdir(self.server.folder / "tmp"), "the bytes are freed")
        self.paused = False
        self.drop_held()
        self.create()

    @rule()
    def finish(self) -> None:
        """The rest comes: the file is what was sent. Another upload begins."""
        if self.paused:
            self.resume_now()
            self.drop_held()
        offset = self.settle()
        answer = self.patch(offset, DATA[offset:])
        assert answer.status == 204, answer
        job = self.server.job(self.id)
        assert job["state"] == "succeeded", job
        content = self.server.get(f"/v1/files/{job['result']['file']}/content").body
        assert content == DATA
        self.server.delete(f"/v1/files/{job['result']['file']}")
        self.create()

    # What always holds

    @invariant()
    def stored_bytes_are_those_that_were_sent(self) -> None:
        """The blob begins with the acknowledged bytes of the model."""
        blobs = [path for path in (self.server.folder / "tmp").iterdir() if path.stat().st_size]
        assert len(blobs) <= 1, blobs
        stored = blobs[0].read_bytes() if blobs else b""
        # Bytes behind the acknowledged ones may be on their way, or wait for their checksum.
        assert stored[: self.acked] == DATA[: self.acked]

    @invariant()
    def the_row_does_not_lie(self) -> None:
        """Watching tells no less than was acknowledged, and no more than was sent."""
        transfer = self.server.job(self.id)["transfer"]
        assert self.acked <= transfer["stored_bytes"] <= max(self.acked, self.sent), transfer
        assert transfer["durable_bytes"] <= transfer["stored_bytes"]

    def teardown(self) -> None:
        """Leave nothing to the next run."""
        for sender in self.senders:
            sender.close()
        self.drop_held()
        with suppress(AttributeError):  # it did not even begin
            self.ask("DELETE")


@pytest.mark.chaos
@pytest.mark.expects("could not be saved", "bytes are left")
def test_stored_bytes_always_equal_the_model(serve: Serve) -> None:
    """Whatever happens to an upload, what is stored is what was sent, to the byte."""
    server = serve()
    run_state_machine_as_test(
        lambda: UploadMachine(server),  # type: ignore[arg-type]
        settings=settings(
            max_examples=30 if FULL else 4,
            stateful_step_count=30 if FULL else 20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
