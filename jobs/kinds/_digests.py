"""Hashes by their names, with one interface."""

from __future__ import annotations

import hashlib
import zlib
from typing import Protocol


class Hasher(Protocol):
    """A digest in the making."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""
        ...


class _Crc32:
    """CRC-32 with the interface of hashlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_NAMES = {"sha": "sha1", "sha-256": "sha256", "sha-512": "sha512", "crc-32": "crc32"}
_KNOWN = frozenset({"sha256", "sha512", "sha1", "md5", "blake2b", "crc32"})


def is_known(name: str) -> bool:
    """Whether there is such a hash: by hashlib's name, or by the one that headers use."""
    return _NAMES.get(name, name) in _KNOWN


def hasher(name: str) -> Hasher:
    """A new hash; the name must be known. None of them guards a secret here."""
    name = _NAMES.get(name, name)
    return _Crc32() if name == "crc32" else hashlib.new(name, usedforsecurity=False)
