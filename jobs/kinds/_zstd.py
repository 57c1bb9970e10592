"""Zstandard frames, block by block (RFC 8878).

A decompressor gives all that its input makes at once, and four bytes can make 128 KiB. So frames
are taken apart here, as far as it takes to see where each block ends: one block a step, which makes
at most 128 KiB. What is in a block is the library's business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import zstandard

from jobs.kinds._input import Damaged, Input, TooMuch

MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW_BYTES = 128 << 20  # as much as zstd(1) takes unless it is told otherwise

_SKIPPABLE = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f
_BLOCK_BYTES = 128 << 10
_RAW, _RUN, _COMPRESSED = 0, 1, 2


def is_frame(magic: bytes) -> bool:
    """Whether these four bytes begin a frame, or one that is to be skipped."""
    return magic == MAGIC or _is_skippable(magic)


def _is_skippable(magic: bytes) -> bool:
    return magic[1:4] == _SKIPPABLE and magic[:1] != b"" and magic[0] >> 4 == 5


async def frame(source: Input) -> AsyncGenerator[bytes, None]:
    """The text of the frame that begins here, in pieces of at most 128 KiB; some may be empty.

    Afterwards the source stands behind the frame. Raises Damaged, TooMuch.
    """
    magic = await source.exactly(4)
    if _is_skippable(magic):
        size = int.from_bytes(await source.exactly(4), "little")
        if source.skip(size) < size:
            raise Damaged("is cut short")
        return
    if magic != MAGIC:
        raise Damaged("goes on with what is no frame")
    header, checked = await _header(source)
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()
    try:
        decompressor.decompress(magic + header)
        last = False
        while not last:
            block, last = await _block(source)
            yield decompressor.decompress(block)
        if checked:
            yield decompressor.decompress(await source.exactly(4))
        if not decompressor.eof:
            raise Damaged("has a frame that does not end where it says")
    except zstandard.ZstdError as error:
        raise Damaged(f"is damaged ({error})") from error


async def _header(source: Input) -> tuple[bytes, bool]:
    """A frame's header behind its magic, and whether a checksum follows its last block."""
    first = await source.exactly(1)
    flags = first[0]
    single = bool(flags & 0x20)
    size_bytes = (1 if single else 0, 2, 4, 8)[flags >> 6]
    dictionary_bytes = (0, 1, 2, 4)[flags & 3]
    rest = await source.exactly((0 if single else 1) + dictionary_bytes + size_bytes)
    if single:
        window = int.from_bytes(rest[dictionary_bytes:], "little") + (256 if size_bytes == 2 else 0)
    else:
        base = 1 << (10 + (rest[0] >> 3))
        window = base + (base >> 3) * (rest[0] & 7)
    if window > WINDOW_BYTES:
        raise TooMuch(f"needs {window} bytes of memory; {WINDOW_BYTES} are allowed")
    return first + rest, bool(flags & 4)


async def _block(source: Input) -> tuple[bytes, bool]:
    """A block with its header, and whether it is the last one."""
    header = await source.exactly(3)
    fields = int.from_bytes(header, "little")
    kind, size = fields >> 1 & 3, fields >> 3
    if size > _BLOCK_BYTES or kind not in (_RAW, _RUN, _COMPRESSED):
        raise Damaged("has a block that can't be")
    return header + await source.exactly(1 if kind == _RUN else size), bool(fields & 1)
