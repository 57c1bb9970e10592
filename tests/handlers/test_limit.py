"""Transfers with a limit, over real connections: how long they last, and who may interrupt them.

A machine may be busy, so that a transfer takes longer than its limit asks for; never less. Where
nothing but a command can end the wait, the wait would last a minute, and the transfer for hours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import pytest

from tests.handlers.clients import FORM, FORM_END, Caller, Raw, form_head
from tests.harness import Answer, eventually

N = 8_000_000
LIMIT = 2_000_000
CRAWL = 1024  # a minute for a chunk, four seconds for the least piece
AT_ONCE_S = 20.0

WAYS = ["form", "block", "chunked"]


class Sending:
    """An upload of N bytes that has begun, in one of several ways."""

    def __init__(self, caller: Caller, name: str, way: str, raw: Raw) -> None:
        self.caller = caller
        self.data = bytes(range(250)) * (N // 250)
        self._raw = raw
        path = (
            "/upload" if way == "form" else f"/upload?file_name={name}&bytes_read=0&is_complete=1"
        )
        body = form_head(name) + self.data + FORM_END if way == "form" else self.data
        headers: dict[str, Any] = {"Content_Type": FORM} if way == "form" else {}
        headers |= {"Content_Length": len(body)}
        if way == "chunked":
            headers = {"Transfer_Encoding": "chunked"}
            body = _chunks(body)
        raw.head("POST", path, X_Client_Id=caller.client, **headers)
        begin = 1000
        raw.send(body[:begin])
        self.job = caller.job("upload")
        self.path = f"/v1/jobs/{self.job['id']}"
        self._sender = threading.Thread(target=self._send, args=(body[begin:],), daemon=True)

    def _send(self, rest: bytes) -> None:
        try:
            self._raw.send(rest)
        except OSError:
            return  # the server needs no more of it

    def go(self) -> None:
        """Send the rest, as fast as it is taken."""
        self._sender.start()

    def limit(self, limit_bytes_per_s: int | None) -> None:
        """Limit it."""
        limit(self.caller, self.job, limit_bytes_per_s)

    def go_slowly(self) -> None:
        """The same under a limit that soon holds it; a first piece has passed by then."""
        self.limit(CRAWL)
        self.go()
        eventually(lambda: self.transfer()["stored_bytes"] > 1000, "a piece has passed")

    def transfer(self) -> Any:
        """How far it is."""
        return self.caller.get(self.path).json["transfer"]

    def answer(self) -> Answer:
        """The answer, when it comes."""
        answer = self._raw.answer()
        self._sender.join(30)
        return answer


def _chunks(body: bytes) -> bytes:
    parts = [body[i : i + (64 << 10)] for i in range(0, len(body), 64 << 10)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def limit(caller: Caller, job: Any, limit_bytes_per_s: int | None) -> None:
    """Limit a transfer."""
    body = {"limit_bytes_per_s": limit_bytes_per_s}
    answer = caller.server.request("PATCH", f"/v1/jobs/{job['id']}", body)
    assert answer.status == 200, answer
    assert answer.json["transfer"]["limit_bytes_per_s"] == limit_bytes_per_s


@contextmanager
def sending(caller: Caller, name: str, way: str) -> Iterator[Sending]:
    """An upload that has begun."""
    with Raw(caller.server) as raw:
        yield Sending(caller, name, way, raw)


@contextmanager
def exporting(caller: Caller, name: str) -> Iterator[tuple[Raw, Any]]:
    """A download of N bytes of which only the headers were read; its connection and its job."""
    caller.store(name, bytes(range(250)) * (N // 250))
    with Raw(caller.server, receive_bytes=64 << 10) as raw:
        body = json.dumps({"filename": name}).encode()
        raw.head("POST", "/export", Content_Length=len(body), X_Client_Id=caller.client)
        raw.send(body)
        while raw.file.readline() != b"\r\n":
            pass
        yield raw, caller.job("download")


def sent_bytes(caller: Caller, job: Any) -> int:
    """What has left of a download."""
    return int(caller.get(f"/v1/jobs/{job['id']}").json["transfer"]["received_bytes"])


def stands(value: Callable[[], int]) -> int:
    """A value that no longer changes for a while, once there is one."""
    seen = [0, -1]

    def check() -> bool:
        seen.append(value())
        return seen[-1] > 0 and len(seen) > 30 and len(set(seen[-20:])) == 1

    eventually(check, "it stands")
    return seen[-1]


# How long


@pytest.mark.parametrize("way", WAYS)
def test_a_limited_upload_lasts_as_long_as_it_should(caller: Caller, name: str, way: str) -> None:
    """8 MB at 2 MB/s take four seconds, evenly, and all bytes arrive."""
    with sending(caller, name, way) as upload:
        upload.limit(LIMIT)
        begun_s = monotonic()
        upload.go()
        eventually(lambda: upload.transfer()["stored_bytes"] > N // 2, "half of it is stored")
        half_s = monotonic() - begun_s
        answer = upload.answer()
        lasted_s = monotonic() - begun_s
    assert answer.status == 200, answer
    assert 3 < lasted_s < 40
    assert half_s > 1.5
    assert caller.content(answer.json["id"]) == upload.data


@pytest.mark.parametrize("way", ["form", "block"])
def test_a_limited_upload_comes_in_small_pieces(caller: Caller, name: str, way: str) -> None:
    """Between two looks no more arrives than their distance in time allows, and a little."""
    slow, slack_s = 50_000, 0.8
    with sending(caller, name, way) as upload:
        upload.limit(slow)
        upload.go()
        looks: list[tuple[float, int]] = []
        for _ in range(60):
            looks.append((monotonic(), upload.transfer()["stored_bytes"]))
            sleep(0.03)
        eventually(lambda: upload.transfer()["stored_bytes"] > slow // 4, "it moves")
        upload.limit(None)
        assert upload.answer().status == 200
    for (since_s, before), (_, after), (until_s, _) in zip(
        looks, looks[1:], looks[2:], strict=False
    ):
        assert after - before <= slow * (until_s - since_s + slack_s)


def test_a_limit_holds_over_many_short_blocks(caller: Caller, name: str) -> None:
    """Blocks that are each shorter than a piece are together no faster than the limit."""
    size, n = 20_000, 40
    caller.block(name, 0, bytes(size))
    limit(caller, caller.job("upload"), size * 10)
    begun_s = monotonic()
    for i in range(1, n):
        assert caller.block(name, i * size, bytes(size)).status == 200
    assert 3 < monotonic() - begun_s < 40


def test_a_limited_download_lasts_as_long_as_it_should(caller: Caller, name: str) -> None:
    """What is left when the limit is set takes as long as the limit says, and is complete."""
    with exporting(caller, name) as (raw, job):
        stands(lambda: sent_bytes(caller, job))
        limit(caller, job, LIMIT // 2)
        left = N - sent_bytes(caller, job)
        assert left > N // 3
        begun_s = monotonic()
        data = raw.file.read(N)
        lasted_s = monotonic() - begun_s
    assert data == bytes(range(250)) * (N // 250)
    assert 0.75 < lasted_s / (left / (LIMIT // 2)) < 10
    assert caller.server.wait_for(job["id"], "succeeded")["progress"]["done"] == N


# Another limit


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_whose_limit_ends_is_done_at_once(caller: Caller, name: str, way: str) -> None:
    """Without its limit an upload that would have lasted hours has soon ended."""
    with sending(caller, name, way) as upload:
        upload.go_slowly()
        begun_s = monotonic()
        upload.limit(None)
        answer = upload.answer()
        assert monotonic() - begun_s < AT_ONCE_S
    assert answer.status == 200, answer
    assert caller.content(answer.json["id"]) == upload.data


def test_a_download_whose_limit_ends_is_done_at_once(caller: Caller, name: str) -> None:
    """Without its limit a download that would have lasted hours has soon ended."""
    with exporting(caller, name) as (raw, job):
        limit(caller, job, CRAWL)
        begun_s = monotonic()
        threading.Timer(0.5, limit, (caller, job, None)).start()
        assert len(raw.file.read(N)) == N
        assert 0.4 < monotonic() - begun_s < 0.5 + AT_ONCE_S
    caller.server.wait_for(job["id"], "succeeded")


# Commands while the limit holds


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_that_waits_for_its_limit_is_paused_and_resumed(
    caller: Caller, name: str, way: str
) -> None:
    """The pause is in force at once; a resume without a limit takes the rest at once."""
    with sending(caller, name, way) as upload:
        upload.go_slowly()
        begun_s = monotonic()
        caller.post(f"{upload.path}/pause")
        caller.server.wait_for(upload.job["id"], "paused")
        assert monotonic() - begun_s < AT_ONCE_S
        stored = upload.transfer()["stored_bytes"]
        upload.limit(None)  # which a pause does not care for
        assert stands(lambda: int(upload.transfer()["stored_bytes"])) == stored
        begun_s = monotonic()
        assert caller.post(f"{upload.path}/resume").json["state"] == "running"
        answer = upload.answer()
        assert monotonic() - begun_s < AT_ONCE_S
    assert caller.content(answer.json["id"]) == upload.data


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_that_waits_for_its_limit_is_cancelled(
    caller: Caller, name: str, way: str
) -> None:
    """The cancel is answered at once, and nothing is left of the upload."""
    with sending(caller, name, way) as upload:
        upload.go_slowly()
        begun_s = monotonic()
        caller.post(f"{upload.path}/cancel")
        answer = upload.answer()
        assert monotonic() - begun_s < AT_ONCE_S
        assert (answer.status, answer.json["code"]) == (409, "upload-terminated")
    caller.server.wait_for(upload.job["id"], "cancelled")
    assert caller.versions(name) == []


@pytest.mark.parametrize("verb", ["pause", "cancel"])
def test_a_download_that_waits_for_its_limit_takes_commands(
    caller: Caller, name: str, verb: str
) -> None:
    """A pause and a cancel are in force at once, in the middle of the wait for the next piece."""
    with exporting(caller, name) as (raw, job):
        path = f"/v1/jobs/{job['id']}"
        before = stands(lambda: sent_bytes(caller, job))
        limit(caller, job, CRAWL)
        got: list[int] = []
        reader = threading.Thread(target=lambda: got.append(len(raw.file.read(N))), daemon=True)
        reader.start()
        eventually(lambda: sent_bytes(caller, job) > before, "a piece leaves")
        begun_s = monotonic()
        caller.post(f"{path}/{verb}")
        caller.server.wait_for(job["id"], "paused" if verb == "pause" else "cancelled")
        if verb == "pause":
            assert monotonic() - begun_s < AT_ONCE_S
            sent = sent_bytes(caller, job)
            limit(caller, job, None)
            assert stands(lambda: sent_bytes(caller, job)) == sent
            begun_s = monotonic()
            caller.post(f"{path}/resume")
        reader.join(30)
        assert monotonic() - begun_s < AT_ONCE_S
    assert (got == [N]) is (verb == "pause")
    caller.server.wait_for(job["id"], "succeeded" if verb == "pause" else "cancelled")


def test_a_renamed_upload_is_found_by_its_sender(caller: Caller) -> None:
    """A new label for a block upload, or a process, does not hide it from who began it."""
    begun = caller.post("/upload?file_name=rename-me.bin&file_size=8", b"abcd").json
    assert begun["bytes_read"] == 4
    (job,) = [row for row in caller.server.jobs("?kind=upload") if row["name"] == "rename-me.bin"]
    assert caller.server.request("PATCH", f"/v1/jobs/{job['id']}", {"name": "other"}).status == 200
    assert caller.get("/upload?file_name=rename-me.bin").json["bytes_read"] == 4
    done = caller.post("/upload?file_name=rename-me.bin&file_size=8&bytes_read=4", b"efgh")
    assert done.json["is_complete"], done
    assert caller.get("/v1/files?name=rename-me.bin").json["items"]
