"""One gzip member (RFC 1952) in parts, so that it can be gone on with behind any of them.

Each part is a raw deflate stream of its own that ends in a full flush, i.e. on a byte, with nothing
of it needed behind: what follows takes only the CRC-32 and the length of the text so far. Any
gunzip reads the member as if it had been made in one go. A part of 1 MiB of text loses next to
nothing against one long stream.
"""

from __future__ import annotations

import struct
import zlib

PART_BYTES = 1 << 20  # of text in one part
HEAD = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255])  # RFC 1952: no time, no name, any system
_END = b"\x03\x00"  # an empty last block of deflate (RFC 1951, 3.2.6)


class Member:
    """The compressed form of a text, as it is made. Pure: it writes nowhere."""

    def __init__(self, level: int, crc32: int = 0, size_bytes: int = 0) -> None:
        self.crc32 = crc32
        self.size_bytes = size_bytes
        self._level = level
        self._begin()

    def _begin(self) -> None:
        self._part = zlib.compressobj(self._level, zlib.DEFLATED, -zlib.MAX_WBITS)

    def add(self, text: bytes | memoryview) -> bytes:
        """Add text to the part; what is known of its compressed form."""
        self.crc32 = zlib.crc32(text, self.crc32)
        self.size_bytes += len(text)
        return self._part.compress(text)

    def end_part(self) -> bytes:
        """End the part, and begin another one; the rest of its compressed form."""
        rest = self._part.flush(zlib.Z_FULL_FLUSH)
        self._begin()
        return rest

    def end(self) -> bytes:
        """What ends the member, behind its last part."""
        return _END + struct.pack("<LL", self.crc32, self.size_bytes & 0xFFFFFFFF)
