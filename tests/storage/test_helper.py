"""The helper process: what it computes, how it shares, and how it lives and dies.

Real processes and files; the only thing that stands for another is a broken disk. A child that is
stopped (SIGSTOP) stands for one that is busy for as long as the test likes.
"""

import asyncio
import errno
import hashlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage
import storage.helper
from errors import SluiceError
from storage import helper_child
from storage.helper import Digest, Helper
from storage.helper_child import ALGORITHMS

ROOT = Path(storage.__file__).parent.parent
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
ALL = sorted(ALGORITHMS)


@pytest.fixture
def helper(runner: asyncio.Runner) -> Iterator[Helper]:
    """A helper that has not started; whatever it starts is gone at the end."""
    helper = Helper("tests")
    yield helper
    pid = helper.pid
    runner.run(helper.close())
    assert not running(helper)
    assert pid is None or not alive(pid)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is not there yet."""
    return tmp_path / "file"


def digests(data: bytes) -> dict[str, str]:
    """What hashlib and zlib say."""
    return {
        "crc-32": f"{zlib.crc32(data):08x}",
        "md5": hashlib.md5(data).hexdigest(),
        "sha": hashlib.sha1(data).hexdigest(),
        "sha-256": hashlib.sha256(data).hexdigest(),
        "sha-512": hashlib.sha512(data).hexdigest(),
    }


def digest_of(helper: Helper, file: Path, *algorithms: str, start: int = 0) -> Digest:
    """Begin to hash a file."""
    return helper.digest(os.open(file, os.O_RDONLY), algorithms or ALL, start)


def sparse(file: Path, size_bytes: int, begin: bytes = b"") -> Path:
    """A file that takes long to hash and no room."""
    file.write_bytes(begin)
    os.truncate(file, size_bytes)
    return file


def child(helper: Helper) -> int:
    """The process, which is there."""
    assert helper.pid is not None
    return helper.pid


def running(helper: Helper) -> bool:
    """Whether it has a process now."""
    return helper.pid is not None


def alive(pid: int) -> bool:
    """Whether there is such a process, and be it a dead one that nobody waited for."""
    return Path(f"/proc/{pid}").exists()


def descriptors(pid: int | str = "self") -> int:
    """How many are open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what shows itself in no event."""
    until_s = monotonic() + 60
    while not condition():
        assert monotonic() < until_s
        await asyncio.sleep(0.002)


async def failed(call: Awaitable[object]) -> str:
    """What was said about a call that could not be done."""
    with pytest.raises(SluiceError) as caught:
        await asyncio.wait_for(call, 60)
    assert caught.value.code == "storage-failed"
    return caught.value.detail


async def killed(helper: Helper) -> None:
    """Kill the child, and wait until the helper has noticed."""
    pid = child(helper)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: helper.pid != pid)


class TestHashing:
    """What comes out."""

    @pytest.mark.parametrize("start", [0, 1, 4096, 3 * MIB])
    @pytest.mark.parametrize("size", [0, 1, 4095, 256 * KIB, 256 * KIB + 1, 9 * MIB + 11])
    async def test_digests_are_right(
        self, helper: Helper, file: Path, size: int, start: int
    ) -> None:
        """All algorithms agree with hashlib about any size, from any place on."""
        data = random.Random(size).randbytes(start + size)
        file.write_bytes(data)
        digest = digest_of(helper, file, start=start)
        assert digest.processed == start
        await digest.reach(len(data))
        assert digest.processed == len(data)
        assert await digest.result() == digests(data[start:])
        digest.close()

    @settings(
        deadline=None,
        database=None,
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        start=st.integers(0, 3),
        pieces=st.lists(st.tuples(st.binary(max_size=3000), st.sampled_from("frn")), max_size=20),
    )
    def test_a_file_that_grows(
        self,
        runner: asyncio.Runner,
        helper: Helper,
        file: Path,
        start: int,
        pieces: list[tuple[bytes, str]],
    ) -> None:
        """However it was told, asked and awaited, a digest is that of what it was told of."""

        async def compare() -> None:
            model = bytearray(b"...")
            file.write_bytes(model)
            digest = digest_of(helper, file, "sha-256", "crc-32", start=start)
            with file.open("ab", buffering=0) as out:
                for piece, move in pieces:
                    out.write(piece)
                    model += piece
                    digest.follow(len(model))
                    if move == "r":
                        await digest.reach(len(model))
                    if move == "n":
                        found = await digest.result()
                        assert digest.processed == len(model)
                        right = digests(bytes(model[start:]))
                        assert found == {name: right[name] for name in ("sha-256", "crc-32")}
            await digest.reach(len(model))
            assert (await digest.result())["sha-256"] == digests(bytes(model[start:]))["sha-256"]
            digest.close()

        runner.run(compare())

    async def test_it_follows_an_upload(self, helper: Helper, file: Path) -> None:
        """Bytes that arrive by the MiB are hashed while they do, and none before they are told."""
        dice = random.Random(1)
        data = b""
        digest: Digest | None = None
        with file.open("wb", buffering=0) as out:
            for _ in range(24):
                piece = dice.randbytes(MIB)
                out.write(piece)
                data += piece
                digest = digest or digest_of(helper, file)
                digest.follow(len(data))
                assert digest.processed <= len(data)
                await asyncio.sleep(0)
            assert digest is not None
            following = digest
            await until(lambda: following.processed == len(data))
            out.write(b"not told")
        assert await digest.result() == digests(data)
        digest.close()

    async def test_a_result_may_be_asked_again(self, helper: Helper, file: Path) -> None:
        """The hash goes on afterwards, and two who ask at once are both answered."""
        file.write_bytes(b"abcdef")
        digest = digest_of(helper, file)
        assert await digest.result() == digests(b"")
        await digest.reach(3)
        assert await digest.result() == digests(b"abc")
        assert await digest.result() == digests(b"abc")
        await digest.reach(6)
        for found in await asyncio.gather(digest.result(), digest.result()):
            assert found == digests(b"abcdef")
        digest.close()

    async def test_a_result_is_of_what_was_followed_before(
        self, helper: Helper, file: Path
    ) -> None:
        """Not of what was followed afterwards, however quickly, and the later comes right too."""
        data = random.Random(3).randbytes(20 * MIB)
        file.write_bytes(data)
        digest = digest_of(helper, file, "crc-32")
        asked = []
        for mib in (1, 1, 2, 12, 13, 20):
            digest.follow(mib * MIB)
            asked.append((mib, asyncio.ensure_future(digest.result())))
            await asyncio.sleep(0)
        digest.follow(20 * MIB)
        for mib, found in asked:
            assert await found == {"crc-32": digests(data[: mib * MIB])["crc-32"]}
        assert digest.processed == 20 * MIB
        digest.close()

    async def test_nothing_goes_back(self, helper: Helper, file: Path) -> None:
        """Following less than before changes nothing."""
        file.write_bytes(b"abcdef")
        digest = digest_of(helper, file)
        await digest.reach(6)
        digest.follow(2)
        await digest.reach(3)
        assert digest.processed == 6
        assert await digest.result() == digests(b"abcdef")
        digest.close()

    @pytest.mark.parametrize("algorithms", [["sha-3"], ["sha-256", "SHA-256"], []])
    def test_unknown_algorithms(self, helper: Helper, file: Path, algorithms: list[str]) -> None:
        """They are refused at once, and nothing is started."""
        file.write_bytes(b"abc")
        with file.open("rb") as opened, pytest.raises(ValueError, match="algorithms"):
            helper.digest(opened.fileno(), algorithms)
        assert not running(helper)

    async def test_a_file_that_is_shorter(self, helper: Helper, file: Path) -> None:
        """It fails, whoever waits for it, now and later; the others go on."""
        file.write_bytes(b"abc")
        short, good = digest_of(helper, file), digest_of(helper, file)
        said, _ = await asyncio.gather(failed(short.reach(4)), good.reach(3))
        assert str(file) not in said
        short.follow(5)
        await failed(short.reach(5))
        await failed(short.result())
        assert await good.result() == digests(b"abc")
        assert descriptors(child(helper)) == 3
        short.close()
        good.close()

    async def test_a_descriptor_that_can_not_be_read(self, helper: Helper, file: Path) -> None:
        """It is an error like any other."""
        digest = helper.digest(os.open(file, os.O_WRONLY | os.O_CREAT), ["md5"])
        await failed(digest.reach(1))
        digest.close()

    async def test_closing_ends_all_waits(self, helper: Helper, file: Path) -> None:
        """Who waits is told, who asks later too, and the descriptor is given back once."""
        released: list[int] = []
        fd = os.open(sparse(file, 64 * GIB), os.O_RDONLY)
        digest = helper.digest(fd, ALL, release=released.append)
        waits = [asyncio.ensure_future(failed(digest.reach(64 * GIB))) for _ in range(2)]
        waits.append(asyncio.ensure_future(failed(digest.result())))
        await until(lambda: len(digest._waiting) == 2)
        digest.close()
        digest.close()
        await asyncio.gather(*waits)
        await failed(digest.reach(64 * GIB))
        await failed(digest.result())
        assert released == [fd]
        os.close(fd)
        await until(lambda: descriptors(child(helper)) == 3)

    async def test_a_wait_may_be_given_up(self, helper: Helper, file: Path) -> None:
        """The hash goes on without those who waited for it."""
        size = 40 * MIB
        digest = digest_of(helper, sparse(file, size), "crc-32")
        for call in (digest.reach(size), digest.result()):
            wait = asyncio.ensure_future(call)
            await asyncio.sleep(0)
            wait.cancel()
            with suppress(asyncio.CancelledError):
                await wait
        await digest.reach(size)
        assert await digest.result() == {"crc-32": digests(bytes(size))["crc-32"]}
        digest.close()


class TestSharing:
    """Many at once."""

    async def test_a_small_file_overtakes_a_big_one(
        self, helper: Helper, file: Path, tmp_path: Path
    ) -> None:
        """It waits for slices of the others, not for their ends."""
        big = digest_of(helper, sparse(file, 64 * GIB))
        big.follow(64 * GIB)
        await big.reach(1)
        begin = big.processed
        other = tmp_path / "small"
        other.write_bytes(b"abc")
        small = digest_of(helper, other)
        await small.reach(3)
        assert await small.result() == digests(b"abc")
        assert big.processed - begin < 16 * GIB
        big.close()
        small.close()

    async def test_equals_go_on_together(self, helper: Helper, file: Path, tmp_path: Path) -> None:
        """Of two big files neither is far ahead."""
        both = [
            digest_of(helper, sparse(path, 64 * GIB), "crc-32") for path in (file, tmp_path / "b")
        ]
        await asyncio.gather(*(digest.reach(1) for digest in both))
        os.kill(child(helper), signal.SIGSTOP)  # so that none has a start
        for digest in both:
            digest.follow(64 * GIB)
        os.kill(child(helper), signal.SIGCONT)
        await both[0].reach(400 * MIB)
        assert both[1].processed > 200 * MIB
        for digest in both:
            digest.close()

    async def test_more_than_the_child_may_hold(self, helper: Helper, tmp_path: Path) -> None:
        """Of 450 files at most 200 are open in the child, and all come out right, once read."""
        paths = [tmp_path / str(i) for i in range(450)]
        for i, path in enumerate(paths):
            sparse(path, 5 * MIB, b"%d" % i)
        endless = sparse(tmp_path / "endless", 64 * GIB)
        held = [digest_of(helper, endless, "crc-32") for _ in range(450)]
        for digest in held:
            digest.follow(64 * GIB)
        await until(lambda: descriptors(child(helper)) >= 3 + 200)
        many = [digest_of(helper, path, "crc-32") for path in paths]
        for digest in many:
            digest.follow(5 * MIB)
        waits = asyncio.gather(*(digest.reach(5 * MIB) for digest in many))
        most = descriptors(child(helper))
        for digest in held:
            digest.close()
        while not waits.done():
            most = max(most, descriptors(child(helper)))
            await asyncio.sleep(0.002)
        assert most <= 3 + 200 + 1  # a descriptor is there before the former one is closed
        for i in (0, 1, 199, 200, 449):
            right = digests(b"%d" % i + bytes(5 * MIB - len(b"%d" % i)))["crc-32"]
            assert await many[i].result() == {"crc-32": right}
        assert descriptors(child(helper)) == 3
        for digest in many:
            digest.close()

    async def test_the_loop_is_not_held(self, helper: Helper, tmp_path: Path) -> None:
        """500 uploads that are followed cost the loop little, also while nothing is taken."""
        path = sparse(tmp_path / "file", 8 * MIB)
        many = [digest_of(helper, path, "crc-32") for _ in range(500)]
        await many[0].reach(1)
        os.kill(child(helper), signal.SIGSTOP)
        longest_s = 0.0
        begin_s = process_time()  # others may have the CPU, too; who waited would wait for ever
        for mib in range(1, 9):
            for digest in many:
                called_s = process_time()
                digest.follow(mib * MIB)
                longest_s = max(longest_s, process_time() - called_s)
            await asyncio.sleep(0)
        spent_s = process_time() - begin_s
        assert spent_s / 4000 < 0.001
        assert longest_s < 0.1
        os.kill(child(helper), signal.SIGCONT)
        await asyncio.gather(*(digest.reach(8 * MIB) for digest in many))
        right = digests(bytes(8 * MIB))["crc-32"]
        assert await many[0].result() == await many[499].result() == {"crc-32": right}
        for digest in many:
            digest.close()

    async def test_a_child_that_stopped_costs_no_memory(self, helper: Helper, file: Path) -> None:
        """What it can not take now is said later, in one message, however much it became."""
        digest = digest_of(helper, sparse(file, 8 * GIB), "crc-32")
        await digest.reach(1)
        os.kill(child(helper), signal.SIGSTOP)
        for upto in range(MIB, 8 * GIB, MIB):
            digest.follow(upto)
        assert len(helper._wanted) <= 1
        digest.close()
        os.kill(child(helper), signal.SIGCONT)
        after = digest_of(helper, file, "crc-32")
        await after.reach(MIB)
        after.close()

    async def test_what_was_closed_unheard(self, helper: Helper, tmp_path: Path) -> None:
        """Digests that come and go while the child is stopped leave nothing in it."""
        path = sparse(tmp_path / "file", 8 * MIB)
        first = digest_of(helper, path, "crc-32")
        await first.reach(1)
        os.kill(child(helper), signal.SIGSTOP)
        for _ in range(1000):
            digest = digest_of(helper, path, "crc-32")
            digest.follow(8 * MIB)
            digest.close()
        os.kill(child(helper), signal.SIGCONT)
        await first.reach(8 * MIB)
        await until(lambda: descriptors(child(helper)) == 3)
        first.close()


class TestSyncing:
    """Forcing files to the disk."""

    @pytest.mark.parametrize("full", [False, True])
    async def test_a_file_and_a_folder(self, helper: Helper, file: Path, full: bool) -> None:
        """Both can be forced; the child keeps neither."""
        file.write_bytes(b"abc")
        for path in (file, file.parent):
            fd = os.open(path, os.O_RDONLY)
            await helper.sync(fd, full=full)
            os.close(fd)
        assert descriptors(child(helper)) == 3

    async def test_many_at_once(self, helper: Helper, file: Path) -> None:
        """More than the child may hold are done, too."""
        file.write_bytes(b"abc")
        with file.open("rb") as opened:
            await asyncio.gather(*(helper.sync(opened.fileno()) for _ in range(500)))

    async def test_what_the_system_refuses(self, helper: Helper) -> None:
        """The error is the one that the call would have raised here."""
        ends = os.pipe()
        with pytest.raises(OSError) as caught:
            await helper.sync(ends[0])
        assert caught.value.errno == errno.EINVAL
        for end in ends:
            os.close(end)

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("call", ["fdatasync", "fsync"])
    def test_a_broken_disk(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
    ) -> None:
        """The child passes on what the disk says, and goes on with the next one."""

        def refuse(fd: int) -> None:
            assert os.fstat(fd).st_size == 3
            raise OSError(number, "broken")

        file.write_bytes(b"abc")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = descriptors()
        with file.open("rb") as opened, ours, theirs, monkeypatch.context() as patch:
            fds = [opened.fileno()]
            for key in (b"7", b"8"):
                what = b"full" if call == "fsync" else b"data"
                socket.send_fds(ours, [b"sync %b %b" % (key, what)], fds)
            ours.shutdown(socket.SHUT_WR)
            patch.setattr(os, call, refuse)
            helper_child.Child(theirs).run()
            assert ours.recv(100) == b"synced 7 %d" % number
            assert ours.recv(100) == b"synced 8 %d" % number
        assert descriptors() == before - 2

    async def test_a_sync_that_was_given_up(self, helper: Helper, file: Path) -> None:
        """The file may be closed as soon as nobody waits, whether it was sent or not."""
        file.write_bytes(b"abc")
        with file.open("rb") as opened:
            await helper.sync(opened.fileno())
            os.kill(child(helper), signal.SIGSTOP)
            waits = [asyncio.ensure_future(helper.sync(opened.fileno())) for _ in range(500)]
            await asyncio.sleep(0)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        os.kill(child(helper), signal.SIGCONT)
        with file.open("rb") as opened:
            await helper.sync(opened.fileno())
        await until(lambda: descriptors(child(helper)) == 3)

    async def test_a_sync_outlives_the_child(self, helper: Helper, file: Path) -> None:
        """The next child does it."""
        file.write_bytes(b"abc")
        with file.open("rb") as opened:
            await helper.sync(opened.fileno())
            os.kill(child(helper), signal.SIGSTOP)
            wait = asyncio.ensure_future(helper.sync(opened.fileno()))
            await asyncio.sleep(0)
            await killed(helper)
            await wait


class TestLiving:
    """Starting, dying, starting again, resting."""

    async def test_it_starts_at_the_first_need(self, helper: Helper, file: Path) -> None:
        """A digest that was told of nothing needs no process."""
        file.write_bytes(b"abc")
        digest = digest_of(helper, file)
        digest.follow(0)
        assert not running(helper)
        digest.follow(1)
        assert running(helper)
        digest.close()

    async def test_it_has_nothing_of_ours(self, helper: Helper, file: Path) -> None:
        """Three descriptors, another session, another folder; not even a socket left open."""
        with socket.socket() as listening:
            listening.set_inheritable(True)
            listening.listen()
            file.write_bytes(b"abc")
            digest = digest_of(helper, file)
            await digest.reach(3)
        pid = child(helper)
        open_ = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert open_.keys() == {"0", "1", "2"}
        assert open_["0"].startswith("socket:")
        assert open_["1"] == open_["2"] == "/dev/null"
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        digest.close()

    async def test_it_does_not_hear_signals(self, helper: Helper, file: Path) -> None:
        """What asks a group of processes to end is for the service alone."""
        file.write_bytes(b"abc")
        digest = digest_of(helper, file)
        digest.follow(1)
        pid = child(helper)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        await digest.reach(3)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert await digest.result() == digests(b"abc")
        assert helper.pid == pid
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        digest.close()

    async def test_a_child_that_is_killed(
        self, helper: Helper, file: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The next one reads again; nothing that was said is taken back, and all comes right."""
        begin = random.Random(2).randbytes(5 * MIB)
        size = 200 * MIB
        digest = digest_of(helper, sparse(file, size, begin), "sha-256", "crc-32")
        digest.follow(size)
        await digest.reach(40 * MIB)
        asked = asyncio.ensure_future(digest.reach(size))
        pid, before = child(helper), digest.processed
        await killed(helper)
        assert digest.processed >= before
        found = await digest.result()
        assert digest.processed >= before
        data = begin + bytes(size - len(begin))
        assert found["crc-32"] == digests(data[: digest.processed])["crc-32"]
        await asked
        assert await digest.result() == {
            name: digests(data)[name] for name in ("sha-256", "crc-32")
        }
        assert child(helper) != pid
        assert not alive(pid)
        assert [record.levelname for record in caplog.records if "ended early" in record.message]
        digest.close()

    async def test_all_are_read_again(self, helper: Helper, tmp_path: Path) -> None:
        """Also those that were done, as somebody may ask for them, or they go on."""
        many = []
        for i in range(250):
            path = tmp_path / str(i)
            path.write_bytes(b"%d" % i)
            many.append(digest_of(helper, path, "sha-256"))
        await asyncio.gather(*(digest.reach(1) for digest in many))
        await killed(helper)
        for i, digest in enumerate(many):
            await digest.reach(len(b"%d" % i))
            assert await digest.result() == {"sha-256": digests(b"%d" % i)["sha-256"]}
            digest.close()

    async def test_a_storm(
        self, helper: Helper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Uploads come, grow and go while the child is killed again and again; all come right."""
        monkeypatch.setattr(storage.helper, "_SHORT_S", 0.0)
        monkeypatch.setattr(storage.helper, "_BUSY_MOST", 10)
        dice = random.Random(4)
        pids: set[int] = set()
        trouble = asyncio.ensure_future(make_trouble(helper, dice, pids))
        while len(pids) < 8:
            await asyncio.gather(*(upload(helper, tmp_path / str(i), dice) for i in range(40)))
        trouble.cancel()
        with suppress(asyncio.CancelledError):
            await trouble

    async def test_killed_twice(
        self, helper: Helper, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who waits is refused; after a while it is tried again, and what was told is known."""
        now_s = monotonic()
        monkeypatch.setattr(storage.helper, "monotonic", lambda: now_s)
        data = b"abc" * MIB
        file.write_bytes(data)
        digest = digest_of(helper, sparse(file, 64 * GIB, data))
        waits = [asyncio.ensure_future(failed(digest.reach(64 * GIB)))]
        await digest.reach(1)
        with file.open("rb") as opened:
            await killed(helper)
            assert running(helper)
            os.kill(child(helper), signal.SIGSTOP)
            waits.append(asyncio.ensure_future(failed(digest.result())))
            waits.append(asyncio.ensure_future(failed(helper.sync(opened.fileno()))))
            await asyncio.sleep(0)
            await killed(helper)
            await asyncio.gather(*waits)
            assert not running(helper)
            await failed(digest.reach(64 * GIB))
            await failed(digest.result())
            await failed(helper.sync(opened.fileno()))
        digest.follow(64 * GIB)
        assert not running(helper)
        digest.close()
        file.write_bytes(data)
        digest = digest_of(helper, file)
        await failed(digest.reach(len(data)))
        now_s += 3600
        await digest.reach(len(data))
        assert await digest.result() == digests(data)
        digest.close()

    async def test_a_digest_outlives_two_deaths(
        self, helper: Helper, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is refused for a while, and then goes on from its start."""
        now_s = monotonic()
        monkeypatch.setattr(storage.helper, "monotonic", lambda: now_s)
        file.write_bytes(b"abcdef")
        digest = digest_of(helper, file)
        await digest.reach(6)
        for _ in range(2):
            await killed(helper)
        assert not running(helper)
        await failed(digest.result())
        now_s += 3600
        assert await digest.result() == digests(b"abcdef")
        digest.close()

    async def test_it_can_not_be_started(
        self,
        helper: Helper,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Who needs it is refused, who only tells is not, and it is said once."""
        before = descriptors()
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        file.write_bytes(b"abc")
        digest = digest_of(helper, file)
        digest.follow(3)
        await failed(digest.reach(3))
        await failed(digest.result())
        with file.open("rb") as opened:
            await failed(helper.sync(opened.fileno()))
        assert len(caplog.records) == 1
        digest.close()
        assert descriptors() == before

    async def test_it_rests(self, runner: asyncio.Runner, file: Path) -> None:
        """Without digests and syncs it ends after its time, and comes back when it is needed."""
        helper = Helper("tests", idle_s=0.05)
        file.write_bytes(b"abc")
        first = digest_of(helper, file)
        await first.reach(3)
        pid = child(helper)
        second = digest_of(helper, file)
        first.close()
        await asyncio.sleep(0.15)  # there is no event in nothing that happens
        assert helper.pid == pid
        second.close()
        await until(lambda: not alive(pid))
        assert not running(helper)
        with file.open("rb") as opened:
            await helper.sync(opened.fileno())
        await until(lambda: helper.pid is None)
        await helper.close()

    async def test_closing(self, helper: Helper, file: Path) -> None:
        """In the middle of work the process ends at once; who waits, or comes later, is told."""
        digest = digest_of(helper, sparse(file, 64 * GIB))
        digest.follow(64 * GIB)
        await digest.reach(1)
        pid = child(helper)
        wait = asyncio.ensure_future(failed(digest.reach(64 * GIB)))
        await asyncio.sleep(0)
        await helper.close()
        await wait
        assert not alive(pid)
        await helper.close()
        await failed(digest.reach(64 * GIB))
        await failed(digest.result())
        with file.open("rb") as opened:
            await failed(helper.sync(opened.fileno()))
        digest.close()

    async def test_no_descriptor_leaks(
        self, helper: Helper, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever was done and however it ended, nothing stays open here."""
        monkeypatch.setattr(storage.helper, "_SHORT_S", 0.0)
        before = descriptors()
        file.write_bytes(b"abc")
        for _ in range(5):
            short, good = digest_of(helper, file), digest_of(helper, file)
            await asyncio.gather(failed(short.reach(9)), good.reach(2))
            with file.open("rb") as opened:
                await helper.sync(opened.fileno())
            await killed(helper)
            await good.reach(3)
            short.close()
            good.close()
        await helper.close()
        assert descriptors() == before

    async def test_dropping_it_ends_the_process(self, file: Path) -> None:
        """Who forgets to close it leaves no process behind; the loop is its last holder."""
        file.write_bytes(b"abc")

        async def use() -> int:
            helper = Helper("tests")
            digest = digest_of(helper, file)
            await digest.reach(3)
            digest.close()
            pid = child(helper)
            assert helper._wire is not None
            asyncio.get_running_loop().remove_reader(helper._wire)
            assert helper._timer is not None
            helper._timer.cancel()
            return pid

        pid = await use()
        await until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)


async def upload(helper: Helper, path: Path, dice: random.Random) -> None:
    """Hash a file as an upload does that comes in pieces, and look that it is right."""
    data = dice.randbytes(dice.choice((0, 100, MIB, 3 * MIB)))
    path.write_bytes(data)
    start = dice.randrange(len(data) + 1)
    digest = digest_of(helper, path, "crc-32", start=start)
    for upto in sorted(dice.randrange(start, len(data) + 1) for _ in range(9)):
        digest.follow(upto)
        if dice.random() < 0.1:
            right = {"crc-32": digests(data[start:upto])["crc-32"]}
            assert await digest.result() == right
        if dice.random() < 0.3:
            await digest.reach(upto)
        if dice.random() < 0.02:
            digest.close()
            return
        await asyncio.sleep(dice.random() / 10)
    with path.open("rb") as opened:
        await helper.sync(opened.fileno())
    await digest.reach(len(data))
    assert await digest.result() == {"crc-32": digests(data[start:])["crc-32"]}
    digest.close()


async def make_trouble(helper: Helper, dice: random.Random, pids: set[int]) -> None:
    """Kill or stop the child for a moment, again and again."""
    while True:
        await asyncio.sleep(dice.random() / 5)
        pid = helper.pid
        if pid is None:
            continue
        pids.add(pid)
        number = dice.choice((signal.SIGKILL, signal.SIGCONT))
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(dice.random() / 50)
        finally:
            os.kill(pid, number)
        if number == signal.SIGKILL:  # one that is dead may be gone at any time
            await until(lambda: helper.pid != pid)  # noqa: B023


PARENT = """
import asyncio, os, sys
def no_threads(event, args):
    if event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
        os.write(2, b"a thread was started")
        os.abort()
sys.addaudithook(no_threads)
from storage.helper import Helper
async def main():
    helper = Helper("tests")
    fd = os.open(sys.argv[1], os.O_RDONLY)
    digest = helper.digest(fd, ["sha-256"])
    digest.follow(os.fstat(fd).st_size)
    await digest.reach(1)
    await helper.sync(fd)
    print(helper.pid, len(os.listdir("/proc/self/task")), flush=True)
    if sys.argv[2] == "wait":
        await digest.reach(os.fstat(fd).st_size)
    digest.close()
    await helper.close()
    print(len(os.listdir("/proc/self/task")), flush=True)
asyncio.run(main())
"""


def parent(file: Path, *args: str) -> subprocess.Popen[str]:
    """A small service that hashes a file."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(file), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_thread_is_started(file: Path) -> None:
    """A helper's whole life adds none to the service."""
    with parent(sparse(file, 20 * MIB), "go on") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split()[1:] == ["1", "1"]


@pytest.mark.parametrize("size", [1, GIB])
def test_it_does_not_outlive_the_service(file: Path, size: int) -> None:
    """When the service is killed the child ends, in the middle of a big file, too."""
    with parent(sparse(file, size * 64), "wait" if size > 1 else "go on") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[0])
        try:
            end = os.pidfd_open(pid)
        except ProcessLookupError:  # it was quicker
            assert size == 1
            process.wait(30)
            return
        process.kill()
        process.wait(30)
        assert select.select([end], [], [], 60)[0]
        os.close(end)
