"""What every Blobs backend must do.

A backend's test module inherits these classes and provides the fixtures ``blobs_url`` (an empty
place) and ``blobs`` (that one, open). Nothing here looks behind the contract in
``storage/__init__.py``.
"""

import asyncio
import hashlib
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import SluiceError
from storage import Blobs, Bundle, Reader, open_blobs

MIB = 1 << 20

# Names as people give them: the store may not change, refuse or confuse any of them.
NAMES = [
    "data.csv",
    "żółw 🐢 数据.csv",
    "e\u0301 is not \u00e9",
    "é" * 127 + "x",
    "x" * 255,
    " leading and trailing ",
    "-rf",
    ".hidden",
    "...",
    "a%2Fb\\c:d*e?f\"g<h>i|j'k",
    "two\nlines",
    "CON",
]


async def put(blobs: Blobs, blob_id: str, data: bytes) -> None:
    """An unfinished blob with these bytes."""
    writer = await blobs.writer(blob_id, 1)
    assert await writer.write(memoryview(data)) == len(data)
    await writer.sync()
    await writer.close()


async def content(blobs: Blobs, blob_id: str, name: str | None = None) -> bytes:
    """All bytes of a blob."""
    return await whole(await blobs.reader(blob_id, name))


async def whole(reader: Reader) -> bytes:
    """All that a reader has, which is closed."""
    data = b""
    while piece := await reader.read(len(data), 1 << 30):
        data += piece
    assert reader.size_bytes == len(data)
    await reader.close()
    return data


async def stored(blobs: Blobs, blob_id: str, data: bytes) -> None:
    """A published blob with these bytes."""
    await put(blobs, blob_id, data)
    await blobs.publish(blob_id, "data.csv")


async def member(bundle: Bundle, member_id: str) -> bytes:
    """All bytes of a member."""
    return await whole(await bundle.reader(member_id))


async def unbundled(blobs: Blobs, blob_id: str) -> None:
    """There are no members to read."""
    with pytest.raises(SluiceError) as caught:
        await blobs.bundle(blob_id)
    assert caught.value.code == "file-unknown"


async def settled() -> None:
    """What is removed beside the calls has gone."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


def digests(data: bytes) -> dict[str, str]:
    """What hashlib and zlib say, by the names that digesters know."""
    return {
        "sha-256": hashlib.sha256(data).hexdigest(),
        "sha-512": hashlib.sha512(data).hexdigest(),
        "sha": hashlib.sha1(data).hexdigest(),
        "md5": hashlib.md5(data).hexdigest(),
        "crc-32": f"{zlib.crc32(data):08x}",
    }


async def refused(blobs: Blobs, blob_id: str, name: str | None = None) -> None:
    """There is nothing to read there."""
    with pytest.raises(SluiceError) as caught:
        await blobs.reader(blob_id, name)
    assert caught.value.status == 404


class Writing:
    """``writer`` and ``size``."""

    async def test_bytes_are_appended(self, blobs: Blobs) -> None:
        """Each write returns the new offset, and the blob holds the pieces in order."""
        writer = await blobs.writer("b1", 1)
        assert await writer.write(memoryview(b"hello ")) == 6
        assert await writer.write(memoryview(b"")) == 6
        assert await writer.write(memoryview(b"world")) == 11
        await writer.close()
        assert await blobs.size("b1") == 11
        assert await content(blobs, "b1") == b"hello world"

    async def test_a_large_view_is_written_whole(self, blobs: Blobs) -> None:
        """One call may bring more than one system call takes."""
        data = random.Random(1).randbytes(3 * MIB + 17)
        await put(blobs, "b1", data)
        assert await content(blobs, "b1") == data

    async def test_a_view_may_be_reused(self, blobs: Blobs) -> None:
        """The buffer behind a view belongs to the caller again when write returns."""
        buffer = bytearray(4)
        writer = await blobs.writer("b1", 1)
        for letter in b"abc":
            buffer[:] = bytes([letter]) * 4
            await writer.write(memoryview(buffer)[:3])
        buffer[:] = b"zzzz"
        await writer.close()
        assert await content(blobs, "b1") == b"aaabbbccc"

    async def test_a_blob_is_continued(self, blobs: Blobs) -> None:
        """A new writer at the end goes on where the former stopped."""
        await put(blobs, "b1", b"one ")
        writer = await blobs.writer("b1", 2, offset=4)
        assert await writer.write(memoryview(b"two")) == 7
        await writer.close()
        assert await content(blobs, "b1") == b"one two"

    async def test_what_lies_behind_the_offset_is_cut_off(self, blobs: Blobs) -> None:
        """Bytes that were never acknowledged are gone as soon as the writer is there."""
        await put(blobs, "b1", b"0123456789")
        writer = await blobs.writer("b1", 2, offset=4)
        assert await blobs.size("b1") == 4
        await writer.write(memoryview(b"x"))
        await writer.close()
        assert await content(blobs, "b1") == b"0123x"

    async def test_starting_again_empties_the_blob(self, blobs: Blobs) -> None:
        """Without an offset a writer begins at nought."""
        await put(blobs, "b1", b"old")
        await (await blobs.writer("b1", 2)).close()
        assert await blobs.size("b1") == 0

    async def test_missing_bytes_are_an_error(self, blobs: Blobs) -> None:
        """A blob shorter than the offset is refused and stays as it is: no hole, no zeros."""
        await put(blobs, "b1", b"123")
        with pytest.raises(SluiceError) as caught:
            await blobs.writer("b1", 2, offset=4)
        assert caught.value.code == "storage-failed"
        assert await content(blobs, "b1") == b"123"

    async def test_a_missing_blob_is_not_continued(self, blobs: Blobs) -> None:
        """An offset into a blob that is not there is refused, and none is made."""
        with pytest.raises(SluiceError) as caught:
            await blobs.writer("b1", 2, offset=1)
        assert caught.value.code == "storage-failed"
        assert await blobs.size("b1") is None

    async def test_sync_tells_the_durable_offset(self, blobs: Blobs) -> None:
        """After a sync all that was written is durable."""
        writer = await blobs.writer("b1", 1)
        assert await writer.sync() == 0
        await writer.write(memoryview(b"abc"))
        assert await writer.sync() == 3
        assert await writer.sync() == 3
        await writer.close()

    async def test_closing_keeps_the_bytes(self, blobs: Blobs) -> None:
        """A writer can be closed twice and without a sync; the bytes are there."""
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"abc"))
        await writer.close()
        await writer.close()
        assert await content(blobs, "b1") == b"abc"

    async def test_blobs_do_not_mix(self, blobs: Blobs) -> None:
        """Several blobs grow at the same time."""
        writers = [await blobs.writer(f"b{i}", 1) for i in range(5)]
        for _ in range(3):
            await asyncio.gather(
                *(writer.write(memoryview(b"%d" % i)) for i, writer in enumerate(writers))
            )
        for writer in writers:
            await writer.close()
        assert [await content(blobs, f"b{i}") for i in range(5)] == [
            b"%d" % i * 3 for i in range(5)
        ]

    async def test_the_size_of_what_is_not_there(self, blobs: Blobs) -> None:
        """Unknown and published blobs have no unfinished size."""
        assert await blobs.size("unknown") is None
        await put(blobs, "b1", b"abc")
        assert await blobs.size("b1") == 3
        await blobs.publish("b1", "data.csv")
        assert await blobs.size("b1") is None

    async def test_what_can_not_fit_is_refused_at_once(self, blobs: Blobs) -> None:
        """A length far beyond the room that is left costs no byte of traffic."""
        with pytest.raises(SluiceError) as caught:
            await blobs.writer("b1", 1, length=1 << 60)
        assert caught.value.code == "disk-full"
        assert await blobs.size("b1") is None
        await (await blobs.writer("b1", 1, length=3)).close()

    async def test_only_the_missing_bytes_need_room(self, blobs: Blobs) -> None:
        """A blob that is complete can be opened again, however long it is said to be."""
        await put(blobs, "b1", b"abc")
        await (await blobs.writer("b1", 2, offset=3, length=3)).close()
        assert await content(blobs, "b1") == b"abc"

    @settings(
        deadline=None,
        database=None,
        max_examples=40,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(
        moves=st.lists(
            st.one_of(
                st.binary(max_size=40),  # written
                st.integers(0, 100),  # opened again there
            ),
            max_size=20,
        )
    )
    def test_a_blob_is_a_bytearray(
        self, runner: asyncio.Runner, blobs: Blobs, moves: list[bytes | int]
    ) -> None:
        """However it was written, interrupted and continued, a blob holds what a model holds."""

        async def compare() -> None:
            model = bytearray()
            writer = await blobs.writer("b1", 1)
            for fence, move in enumerate(moves):
                if isinstance(move, bytes):
                    model += move
                    assert await writer.write(memoryview(move)) == len(model)
                    continue
                await writer.close()
                if move <= len(model):
                    del model[move:]
                else:
                    with pytest.raises(SluiceError):
                        await blobs.writer("b1", fence, offset=move)
                writer = await blobs.writer("b1", fence, offset=len(model))
            await writer.close()
            assert await content(blobs, "b1") == model

        runner.run(compare())


class Publishing:
    """``publish`` and ``unpublish``."""

    @pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
    async def test_a_blob_is_read_under_its_name(self, blobs: Blobs, name: str) -> None:
        """Any name that a file can have is kept as it is, and no other name finds it."""
        await put(blobs, "b1", b"abc")
        assert await blobs.publish("b1", name) == 3
        assert await content(blobs, "b1", name) == b"abc"
        await refused(blobs, "b1", name[:-1] + "~")

    async def test_publishing_is_one_step(self, blobs: Blobs) -> None:
        """Before it nothing can be read under the name, after it nothing unfinished is left."""
        await put(blobs, "b1", b"abc")
        await refused(blobs, "b1", "data.csv")
        await blobs.publish("b1", "data.csv")
        await refused(blobs, "b1")
        assert await blobs.sweep([]) == 0

    async def test_an_empty_blob_can_be_published(self, blobs: Blobs) -> None:
        """Nought bytes are a file too."""
        await put(blobs, "b1", b"")
        assert await blobs.publish("b1", "empty") == 0
        assert await content(blobs, "b1", "empty") == b""

    async def test_one_name_for_many_blobs(self, blobs: Blobs) -> None:
        """Blobs of one name do not replace each other."""
        for i in range(3):
            await put(blobs, f"b{i}", b"%d" % i)
            await blobs.publish(f"b{i}", "data.csv")
        assert [await content(blobs, f"b{i}", "data.csv") for i in range(3)] == [b"0", b"1", b"2"]

    @pytest.mark.parametrize("name", ["data.csv", "other.csv"])
    async def test_what_is_published_never_changes(self, blobs: Blobs, name: str) -> None:
        """Neither writing nor publishing under the same id touches the published bytes."""
        await put(blobs, "b1", b"abc")
        await blobs.publish("b1", "data.csv")
        await put(blobs, "b1", b"changed")
        assert await content(blobs, "b1", "data.csv") == b"abc"
        with pytest.raises(SluiceError) as caught:
            await blobs.publish("b1", name)
        assert caught.value.code == "storage-failed"
        assert await content(blobs, "b1", "data.csv") == b"abc"

    async def test_what_is_not_there_is_not_published(self, blobs: Blobs) -> None:
        """Publishing an unknown blob is refused and leaves nothing under the name."""
        with pytest.raises(SluiceError) as caught:
            await blobs.publish("b1", "data.csv")
        assert caught.value.code == "storage-failed"
        await refused(blobs, "b1", "data.csv")
        assert not await blobs.unpublish("b1")

    async def test_publishing_can_be_taken_back(self, blobs: Blobs) -> None:
        """Afterwards the blob is unfinished again, can grow, and can be published again."""
        await put(blobs, "b1", b"abc")
        await blobs.publish("b1", "data.csv")
        assert await blobs.unpublish("b1")
        await refused(blobs, "b1", "data.csv")
        assert await blobs.size("b1") == 3
        writer = await blobs.writer("b1", 2, offset=3)
        await writer.write(memoryview(b"def"))
        await writer.close()
        assert await blobs.publish("b1", "other.csv") == 6
        assert await content(blobs, "b1", "other.csv") == b"abcdef"

    async def test_there_may_be_nothing_to_take_back(self, blobs: Blobs) -> None:
        """Taking back what was never published says so and changes nothing."""
        assert not await blobs.unpublish("unknown")
        await put(blobs, "b1", b"abc")
        assert not await blobs.unpublish("b1")
        assert await content(blobs, "b1") == b"abc"


class Reading:
    """``reader`` and ``digester``."""

    async def test_any_range(self, blobs: Blobs) -> None:
        """A read gives at most what was asked for, from where it was asked for."""
        data = bytes(range(256))
        await put(blobs, "b1", data)
        await blobs.publish("b1", "data.csv")
        reader = await blobs.reader("b1", "data.csv")
        assert reader.size_bytes == 256
        for start, n in ((0, 256), (0, 1), (255, 1), (100, 56), (0, 0)):
            assert await reader.read(start, n) == data[start : start + n]
        assert await reader.read(200, 999) == data[200:]
        assert await reader.read(256, 10) == b""
        assert await reader.read(999, 10) == b""
        await reader.close()
        await reader.close()

    async def test_a_read_is_empty_only_at_the_end(self, blobs: Blobs) -> None:
        """Large reads may give less than was asked for, but never nothing."""
        data = random.Random(2).randbytes(2 * MIB + 5)
        await put(blobs, "b1", data)
        assert await content(blobs, "b1") == data

    async def test_an_unfinished_blob(self, blobs: Blobs) -> None:
        """Without a name the bytes so far are read, while the writer goes on."""
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"abc"))
        assert await content(blobs, "b1") == b"abc"
        await writer.write(memoryview(b"def"))
        assert await content(blobs, "b1") == b"abcdef"
        await writer.close()

    async def test_what_is_not_there(self, blobs: Blobs) -> None:
        """Unknown ids, unfinished blobs and wrong names are not found."""
        await put(blobs, "b1", b"abc")
        await refused(blobs, "unknown")
        await refused(blobs, "unknown", "data.csv")
        await refused(blobs, "b1", "data.csv")
        await blobs.publish("b1", "data.csv")
        await refused(blobs, "b1", "DATA.CSV")

    @pytest.mark.parametrize("name", [None, "data.csv"])
    async def test_a_reader_survives_discard(self, blobs: Blobs, name: str | None) -> None:
        """Who began to read reads to the end, whoever discards the blob meanwhile."""
        data = random.Random(3).randbytes(MIB)
        await put(blobs, "b1", data)
        if name is not None:
            await blobs.publish("b1", name)
        readers = [await blobs.reader("b1", name) for _ in range(3)]
        await blobs.discard("b1")
        await refused(blobs, "b1", name)
        for reader in readers:
            assert await reader.read(0, MIB) == data
            await reader.close()

    async def test_a_reader_survives_publishing(self, blobs: Blobs) -> None:
        """A blob may move while it is read."""
        await put(blobs, "b1", b"abc")
        reader = await blobs.reader("b1", None)
        await blobs.publish("b1", "data.csv")
        assert await reader.read(0, 9) == b"abc"
        await blobs.unpublish("b1")
        assert await reader.read(1, 1) == b"b"
        await reader.close()

    @pytest.mark.parametrize("start", [0, 3, MIB])
    @pytest.mark.parametrize("size", [0, 1, 4095, 6 * MIB + 7])
    async def test_digests(self, blobs: Blobs, start: int, size: int) -> None:
        """Every algorithm, of any size, from any place on."""
        data = random.Random(size).randbytes(start + size)
        await put(blobs, "b1", data)
        digester = await blobs.digester("b1", list(digests(b"")), start=start)
        assert digester.processed == start
        await digester.reach(len(data))
        assert digester.processed == len(data)
        assert await digester.result() == digests(data[start:])
        digester.close()

    async def test_a_digest_follows_the_writer(self, blobs: Blobs) -> None:
        """A blob is hashed while it grows; bytes that were not followed do not count."""
        data = random.Random(6).randbytes(12 * MIB)
        writer = await blobs.writer("b1", 1)
        digester = await blobs.digester("b1", ["sha-256", "crc-32"])
        for start in range(0, len(data), MIB):
            digester.follow(await writer.write(memoryview(data)[start : start + MIB]))
            await asyncio.sleep(0)
            if start == 5 * MIB:
                expected = digests(data[: 6 * MIB])
                found = await digester.result()
                assert found == {name: expected[name] for name in ("sha-256", "crc-32")}
        await writer.write(memoryview(b"not followed"))
        await writer.close()
        await digester.reach(len(data))
        for _ in range(2):
            assert (await digester.result())["sha-256"] == digests(data)["sha-256"]
        digester.close()
        digester.close()

    async def test_digests_of_one_blob(self, blobs: Blobs) -> None:
        """Each has its own start and end."""
        await put(blobs, "b1", b"0123456789")
        some = [await blobs.digester("b1", ["md5"], start=start) for start in (0, 5)]
        await some[0].reach(7)
        await some[1].reach(10)
        assert await some[0].result() == {"md5": digests(b"0123456")["md5"]}
        assert await some[1].result() == {"md5": digests(b"56789")["md5"]}
        for digester in some:
            digester.close()

    @pytest.mark.parametrize("name", [None, "data.csv"])
    async def test_a_digest_survives_discard(self, blobs: Blobs, name: str | None) -> None:
        """The blob may be published, or go, in the middle."""
        data = random.Random(7).randbytes(40 * MIB)
        await put(blobs, "b1", data)
        digester = await blobs.digester("b1", ["sha-256"])
        await digester.reach(MIB)
        if name is not None:
            await blobs.publish("b1", name)
            published = await blobs.digester("b1", ["sha-256"], name=name)
        else:
            published = await blobs.digester("b1", ["sha-256"])
        await blobs.discard("b1")
        for each in (digester, published):
            await each.reach(len(data))
            assert (await each.result())["sha-256"] == digests(data)["sha-256"]
            each.close()

    async def test_no_digest_of_what_is_not_there(self, blobs: Blobs) -> None:
        """Unknown ids, wrong names and unknown algorithms are refused at once."""
        await put(blobs, "b1", b"abc")
        for blob_id, name in (("unknown", None), ("b1", "data.csv")):
            with pytest.raises(SluiceError) as caught:
                await blobs.digester(blob_id, ["md5"], name=name)
            assert caught.value.code == "file-unknown"
        for algorithms in (["sha-3"], ["md5", ""], []):
            with pytest.raises(ValueError, match="algorithms"):
                await blobs.digester("b1", algorithms)

    async def test_a_digest_of_missing_bytes(self, blobs: Blobs) -> None:
        """A blob that is shorter than was said fails, and it alone."""
        await put(blobs, "b1", b"abc")
        short, good = [await blobs.digester("b1", ["md5"]) for _ in range(2)]
        with pytest.raises(SluiceError) as caught:
            await short.reach(4)
        assert caught.value.code == "storage-failed"
        await good.reach(3)
        assert await good.result() == {"md5": digests(b"abc")["md5"]}
        short.close()
        good.close()


class Removing:
    """``discard`` and ``sweep``."""

    async def test_discard(self, blobs: Blobs) -> None:
        """Published and unfinished blobs go; unknown ones are fine."""
        await put(blobs, "b1", b"abc")
        await put(blobs, "b2", b"abc")
        await blobs.publish("b2", "data.csv")
        for blob_id in ("b1", "b2", "b1", "b2", "unknown"):
            await blobs.discard(blob_id)
        await refused(blobs, "b1")
        await refused(blobs, "b2", "data.csv")
        assert await blobs.size("b1") is None
        assert not await blobs.unpublish("b2")

    async def test_discard_takes_no_other(self, blobs: Blobs) -> None:
        """Only the blob of that id goes."""
        for blob_id in ("b", "b1", "b11"):
            await put(blobs, blob_id, b"abc")
        await blobs.discard("b1")
        assert [await blobs.size(blob_id) for blob_id in ("b", "b1", "b11")] == [3, None, 3]

    async def test_an_id_can_be_used_again(self, blobs: Blobs) -> None:
        """After a discard a new blob of that id begins empty and can be published."""
        await put(blobs, "b1", b"abc")
        await blobs.publish("b1", "data.csv")
        await blobs.discard("b1")
        await put(blobs, "b1", b"de")
        assert await blobs.publish("b1", "data.csv") == 2
        assert await content(blobs, "b1", "data.csv") == b"de"

    async def test_a_writer_survives_discard(self, blobs: Blobs) -> None:
        """A writer whose blob was discarded brings nothing back."""
        writer = await blobs.writer("b1", 1)
        await writer.write(memoryview(b"abc"))
        await blobs.discard("b1")
        await writer.write(memoryview(b"def"))
        await writer.close()
        assert await blobs.size("b1") is None

    async def test_sweep_keeps_what_it_is_told_to(self, blobs: Blobs) -> None:
        """Unfinished blobs that nobody claims go, and it is said how many."""
        for i in range(5):
            await put(blobs, f"b{i}", b"%d" % i)
        assert await blobs.sweep({"b1", "b3", "unknown"}) == 3
        sizes = [await blobs.size(f"b{i}") for i in range(5)]
        assert sizes == [None, 1, None, 1, None]
        assert await content(blobs, "b3") == b"3"
        assert await blobs.sweep(["b1", "b3"]) == 0
        assert await blobs.sweep([]) == 2

    async def test_sweep_never_takes_what_is_published(self, blobs: Blobs) -> None:
        """A published blob stays, even if an unfinished one of its id is swept."""
        await put(blobs, "b1", b"abc")
        await blobs.publish("b1", "data.csv")
        await put(blobs, "b1", b"left over")
        assert await blobs.sweep([]) == 1
        assert await content(blobs, "b1", "data.csv") == b"abc"


class Placing:
    """``place``: a blob that a library writes by itself."""

    async def test_what_is_written_there_is_the_blob(self, blobs: Blobs) -> None:
        """It is published as any other, and its empty side files go."""
        path = await blobs.place("b1")
        assert await blobs.size("b1") is None
        path.write_bytes(b"abc")
        Path(f"{path}-journal").touch()
        assert await blobs.size("b1") == 3
        assert await blobs.publish("b1", "data.db") == 3
        assert await content(blobs, "b1", "data.db") == b"abc"
        assert not Path(f"{path}-journal").exists()

    @pytest.mark.parametrize("side", ["-wal", "-journal", "-shm"])
    async def test_a_blob_in_two_parts_is_not_published(self, blobs: Blobs, side: str) -> None:
        """As long as there are bytes beside it, it is not whole."""
        path = await blobs.place("b1")
        path.write_bytes(b"abc")
        Path(f"{path}{side}").write_bytes(b"def")
        with pytest.raises(SluiceError) as caught:
            await blobs.publish("b1", "data.db")
        assert caught.value.code == "storage-failed"
        assert path.read_bytes() == b"abc"
        assert Path(f"{path}{side}").read_bytes() == b"def"

    async def test_what_lies_there_is_forced_to_the_disk(self, blobs: Blobs) -> None:
        """With its side files; where there is nothing, nothing happens."""
        path = await blobs.place("b1")
        await blobs.sync("b1")
        assert not path.exists()
        path.write_bytes(b"abc")
        Path(f"{path}-wal").write_bytes(b"def")
        await blobs.sync("b1")
        assert path.read_bytes() == b"abc"

    async def test_side_files_go_with_the_blob(self, blobs: Blobs) -> None:
        """``discard`` and ``sweep`` take them; ``sweep`` keeps those of a blob that it keeps."""
        paths = [await blobs.place(f"b{i}") for i in range(3)]
        for path in paths:
            for side in ("", "-wal", "-journal"):
                Path(f"{path}{side}").write_bytes(b"abc")
        await blobs.discard("b0")
        assert await blobs.sweep(["b1"]) == 1
        left = sorted(path.name for path in paths[0].parent.iterdir())
        assert left == ["b1", "b1-journal", "b1-wal"]


class Joining:
    """``concat``."""

    async def test_parts_are_joined_in_order(self, blobs: Blobs) -> None:
        """Published and unfinished, large and empty parts; the parts stay as they were."""
        dice = random.Random(4)
        parts = [dice.randbytes(n) for n in (10, 2 * MIB + 3, 0, MIB, 1)]
        for i, part in enumerate(parts):
            await put(blobs, f"p{i}", part)
        await blobs.publish("p1", "part")
        await blobs.publish("p3", "part")
        named = [(f"p{i}", "part" if i in (1, 3) else None) for i in range(5)]
        total = await blobs.concat("all", named)
        assert total == sum(map(len, parts))
        assert await content(blobs, "all") == b"".join(parts)
        for part, (blob_id, name) in zip(parts, named, strict=True):
            assert await content(blobs, blob_id, name) == part

    async def test_a_part_may_come_twice(self, blobs: Blobs) -> None:
        """The same blob can be used for several parts."""
        await put(blobs, "p", b"ab")
        assert await blobs.concat("all", [("p", None)] * 3) == 6
        assert await content(blobs, "all") == b"ababab"

    async def test_no_parts(self, blobs: Blobs) -> None:
        """Nothing joined is an empty blob."""
        assert await blobs.concat("all", []) == 0
        assert await blobs.size("all") == 0

    async def test_the_whole_is_a_blob_like_others(self, blobs: Blobs) -> None:
        """It can be continued and published."""
        await put(blobs, "p", b"abc")
        await blobs.concat("all", [("p", None)])
        writer = await blobs.writer("all", 1, offset=3)
        await writer.write(memoryview(b"!"))
        await writer.close()
        assert await blobs.publish("all", "whole.txt") == 4
        assert await content(blobs, "all", "whole.txt") == b"abc!"

    async def test_a_former_attempt_is_replaced(self, blobs: Blobs) -> None:
        """Joining again starts from nothing."""
        await put(blobs, "all", b"longer than the parts")
        await put(blobs, "p", b"abc")
        assert await blobs.concat("all", [("p", None)]) == 3
        assert await content(blobs, "all") == b"abc"

    async def test_the_pace(self, blobs: Blobs) -> None:
        """Between slices the caller hears how much there is, and may end it; then nothing is."""
        await put(blobs, "p", bytes(5 * MIB))
        heard: list[int] = []

        async def pace(done: int) -> None:
            heard.append(done)
            if done > 8 * MIB:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await blobs.concat("all", [("p", None)] * 3, pace)
        assert heard == sorted(set(heard))
        assert heard[0] < 5 * MIB < heard[-1]
        assert await blobs.size("all") is None

    async def test_a_missing_part_leaves_nothing(self, blobs: Blobs) -> None:
        """Without all of its parts there is no whole."""
        await put(blobs, "p", b"abc")
        with pytest.raises(SluiceError) as caught:
            await blobs.concat("all", [("p", None), ("gone", "data.csv")])
        assert caught.value.status == 404
        assert await blobs.size("all") is None


class Bundling:
    """``link`` and ``bundle``."""

    async def test_a_member_is_what_its_source_is(self, blobs: Blobs) -> None:
        """The bytes of published blobs can be read as members of another one, under their ids."""
        data = random.Random(8).randbytes(2 * MIB + 3)
        for blob_id, content_ in (("b1", data), ("b2", b""), ("b3", b"abc")):
            await stored(blobs, blob_id, content_)
            await blobs.link("all", blob_id, "data.csv")
        bundle = await blobs.bundle("all")
        assert await member(bundle, "b1") == data
        assert await member(bundle, "b2") == b""
        reader = await bundle.reader("b3")
        assert await reader.read(1, 9) == b"bc"
        await reader.close()
        await bundle.close()
        await bundle.close()

    async def test_linking_again_changes_nothing(self, blobs: Blobs) -> None:
        """A process that begins again may say the same again, also after the source has gone."""
        await stored(blobs, "b1", b"abc")
        for _ in range(3):
            await blobs.link("all", "b1", "data.csv")
        await blobs.discard("b1")
        bundle = await blobs.bundle("all")
        assert await member(bundle, "b1") == b"abc"
        await bundle.close()

    @pytest.mark.parametrize("size", [3, 40 * MIB])
    async def test_a_member_outlives_its_source(self, blobs: Blobs, size: int) -> None:
        """Whatever the size, the bytes stay when the source is discarded, read or not."""
        data = random.Random(9).randbytes(1000) * (size // 1000 + 1)
        await stored(blobs, "b1", data)
        await blobs.link("all", "b1", "data.csv")
        reader = await blobs.reader("b1", "data.csv")
        await blobs.discard("b1")
        await refused(blobs, "b1", "data.csv")
        assert await reader.read(len(data) - 3, 9) == data[-3:]
        await reader.close()
        await settled()
        bundle = await blobs.bundle("all")
        assert await member(bundle, "b1") == data
        await bundle.close()

    @pytest.mark.parametrize("size", [3, 40 * MIB])
    async def test_a_source_outlives_its_members(self, blobs: Blobs, size: int) -> None:
        """Discarding the whole takes nothing from the blobs that it was made of."""
        data = random.Random(10).randbytes(1000) * (size // 1000 + 1)
        await stored(blobs, "b1", data)
        for whole in ("all", "other"):
            await stored(blobs, whole, b"manifest")
            await blobs.link(whole, "b1", "data.csv")
        await blobs.discard("all")
        await settled()
        await unbundled(blobs, "all")
        assert await content(blobs, "b1", "data.csv") == data
        bundle = await blobs.bundle("other")
        assert await member(bundle, "b1") == data
        await bundle.close()

    async def test_only_what_is_published_becomes_a_member(self, blobs: Blobs) -> None:
        """Unknown ids, wrong names and unfinished blobs are refused, and no bundle is made."""
        await put(blobs, "b1", b"abc")
        await stored(blobs, "b2", b"abc")
        for source, name in (("unknown", "data.csv"), ("b1", "data.csv"), ("b2", "other.csv")):
            with pytest.raises(SluiceError) as caught:
                await blobs.link("all", source, name)
            assert caught.value.code == "file-unknown"
        await blobs.link("all", "b2", "data.csv")
        bundle = await blobs.bundle("all")
        with pytest.raises(SluiceError) as caught:
            await bundle.reader("b1")
        assert caught.value.code == "file-unknown"
        await bundle.close()

    async def test_there_may_be_no_members(self, blobs: Blobs) -> None:
        """Unknown blobs and those without members have no bundle."""
        await stored(blobs, "b1", b"abc")
        for blob_id in ("unknown", "b1"):
            await unbundled(blobs, blob_id)

    @pytest.mark.parametrize("bundles", [1, 3])
    async def test_a_bundle_survives_discard(self, blobs: Blobs, bundles: int) -> None:
        """Who began to read the members reads them all, though nobody else finds them."""
        sizes = {"b1": 3, "b2": 40 * MIB, "b3": 5}
        for blob_id, size in sizes.items():
            await stored(blobs, blob_id, blob_id.encode() * (size // 2))
            await blobs.link("all", blob_id, "data.csv")
            await blobs.discard(blob_id)
        await stored(blobs, "all", b"manifest")
        opened = [await blobs.bundle("all") for _ in range(bundles)]
        reader = await opened[0].reader("b1")
        await blobs.discard("all")
        await settled()
        await unbundled(blobs, "all")
        await blobs.sweep([])
        for bundle in opened:
            for blob_id, size in sizes.items():
                assert await member(bundle, blob_id) == blob_id.encode() * (size // 2)
            await bundle.close()
            await settled()
        assert await reader.read(0, 9) == b"b"[:1] + b"1"
        await reader.close()

    async def test_an_id_can_be_bundled_again(self, blobs: Blobs) -> None:
        """After a discard a blob of that id has new members; those who read the old keep them."""
        for blob_id in ("b1", "b2", "b3"):
            await stored(blobs, blob_id, blob_id.encode())
        bundles = []
        for blob_id in ("b1", "b2", "b3"):
            await blobs.link("all", blob_id, "data.csv")
            bundles.append(await blobs.bundle("all"))
            await blobs.discard("all")
        for bundle, blob_id in zip(bundles, ("b1", "b2", "b3"), strict=True):
            assert await member(bundle, blob_id) == blob_id.encode()
            for other in {"b1", "b2", "b3"} - {blob_id}:
                with pytest.raises(SluiceError):
                    await bundle.reader(other)
            await bundle.close()

    async def test_sweep_takes_members_that_nobody_claims(self, blobs: Blobs) -> None:
        """Members of unfinished blobs that are kept, and of published ones, stay."""
        await stored(blobs, "b1", b"abc")
        for whole in ("published", "kept", "unborn", "swept"):
            await blobs.link(whole, "b1", "data.csv")
        await put(blobs, "kept", b"")
        await put(blobs, "swept", b"")
        await stored(blobs, "published", b"manifest")
        assert await blobs.sweep(["kept", "unborn"]) == 1
        for whole in ("published", "kept", "unborn"):
            bundle = await blobs.bundle(whole)
            assert await member(bundle, "b1") == b"abc"
            await bundle.close()
        await unbundled(blobs, "swept")

    async def test_members_stay_with_their_blob(self, blobs: Blobs, blobs_url: str) -> None:
        """Publishing, taking that back and a restart leave them as they are."""
        await stored(blobs, "b1", b"abc")
        await put(blobs, "all", b"manifest")
        await blobs.link("all", "b1", "data.csv")
        await blobs.publish("all", "files.zip")
        await blobs.unpublish("all")
        await blobs.publish("all", "files.zip")
        await blobs.discard("b1")
        await blobs.close()
        again = open_blobs(blobs_url, "always")
        await again.open()
        await again.sweep([])
        bundle = await again.bundle("all")
        assert await member(bundle, "b1") == b"abc"
        await bundle.close()
        await again.close()


class Keeping:
    """``open``, ``close`` and ``free_bytes``."""

    async def test_everything_outlives_a_restart(self, blobs_url: str, blobs: Blobs) -> None:
        """Another start finds the same published and unfinished blobs."""
        await put(blobs, "b1", b"abc")
        await put(blobs, "b2", b"def")
        await blobs.publish("b2", "data.csv")
        await blobs.close()
        again = open_blobs(blobs_url, "always")
        await again.open()
        assert await content(again, "b1") == b"abc"
        assert await content(again, "b2", "data.csv") == b"def"
        await again.close()

    async def test_opening_leaves_no_trace(self, blobs: Blobs) -> None:
        """The look whether the place can be written makes no blob."""
        assert await blobs.sweep([]) == 0

    async def test_free_bytes(self, blobs: Blobs) -> None:
        """There is a number of bytes that are free."""
        assert await blobs.disk_bytes() >= await blobs.free_bytes() > MIB

    @pytest.mark.parametrize("durability", ["always", "interval", "never"])
    async def test_each_durability(self, blobs_url: str, durability: str) -> None:
        """Whatever is promised about power cuts, bytes come out as they went in."""
        blobs = open_blobs(blobs_url, durability)
        await blobs.open()
        data = random.Random(5).randbytes(MIB + 1)
        for blob_id in ("b0", "b1"):
            await put(blobs, blob_id, data)
            await blobs.publish(blob_id, "data.csv")
            assert await content(blobs, blob_id, "data.csv") == data
        assert await blobs.concat("all", [("b0", "data.csv"), ("b1", "data.csv")]) == 2 * MIB + 2
        await blobs.close()
