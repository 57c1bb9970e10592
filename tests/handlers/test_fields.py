"""Structured fields and digests, as the dialects read and write them."""

from __future__ import annotations

import base64
import hashlib

import pytest

from handlers import fields

SHA256 = hashlib.sha256(b"hello")
SHA512 = hashlib.sha512(b"hello")
FIRST = base64.b64encode(SHA256.digest()).decode()
SECOND = base64.b64encode(SHA512.digest()).decode()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("0", 0),
        (" 42 ", 42),
        ("-1", -1),
        ("5;a=b", 5),
        ("9" * 15, 10**15 - 1),
        *((odd, None) for odd in ("9" * 16, "1.0", "+5", "5x", "5, 5", "?1", '"5"', "@5", "é", "")),
        (None, None),
    ],
)
def test_an_integer_is_one_or_is_not_there(given: str | None, found: int | None) -> None:
    """What is no Integer counts as not sent (RFC 9651 section 4.2)."""
    assert fields.integer(given) == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("?1", True),
        ("?0", False),
        ("?1;a", True),
        *((odd, None) for odd in ("1", "0", "true", "?2", "?", "?1, ?1", "é", "", None)),
    ],
)
def test_a_boolean_is_one_or_is_not_there(given: str | None, found: bool | None) -> None:
    """What is no Boolean counts as not sent (RFC 9651 section 4.2)."""
    assert fields.boolean(given) is found


def test_a_dictionary_is_written() -> None:
    """Members keep their order (RFC 9651 section 3.2)."""
    assert fields.dictionary({"max-size": 5, "min-size": 0}) == "max-size=5, min-size=0"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (f"sha-256=:{FIRST}:", {"sha-256": SHA256.hexdigest()}),
        (
            f"md5=:AAAA:, sha-512=:{SECOND}:, sha-256=:{FIRST}:",
            {"sha-256": SHA256.hexdigest(), "sha-512": SHA512.hexdigest()},
        ),
        ("md5=:XUFAKrxLKna5cZ2REBfFkg==:", {}),
        ("sha-256=:AAAA:", {}),
        ("sha-256", {}),
        ("sha-256=5", {}),
        (f"sha-256={FIRST}", {}),
        (f"sha-256=:{FIRST}:, ?", {}),
        (f"sha-256=(:{FIRST}:)", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_digests_are_read(given: str | None, found: dict[str, str]) -> None:
    """Only what proves something is kept; what is malformed counts as not sent (RFC 9530)."""
    assert fields.digests(given) == found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("sha-256=10", True),
        ("sha-512=0, sha-256=1", True),
        ("sha-256=0", False),
        ("sha-256", False),
        ("sha-256=?1", False),
        ("sha-256=", False),
        ("", False),
        (None, False),
    ],
)
def test_a_digest_is_wanted(given: str | None, wanted: bool) -> None:
    """A weight of 0 asks for none (RFC 9530 section 4)."""
    assert fields.wants_digest(given) is wanted


def test_digests_are_told() -> None:
    """Both fields name what is known and registered; nothing else is told."""
    both = {"crc-32": "0", "sha-512": SHA512.hexdigest(), "sha-256": SHA256.hexdigest()}
    assert fields.repr_digest(both) == f"sha-256=:{FIRST}:, sha-512=:{SECOND}:"
    assert fields.legacy_digest(both) == f"SHA-256={FIRST},SHA-512={SECOND}"
    for none in ({}, {"crc-32": "00000000"}):
        assert fields.repr_digest(none) == fields.legacy_digest(none) == ""
