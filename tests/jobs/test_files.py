"""Names and ids of stored files."""

from __future__ import annotations

import unicodedata
import uuid

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from errors import SluiceError
from jobs.files import clean_name, media_type_of, now_ms, uuid7


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("data.csv", "data.csv"),
        ("/etc/passwd", "passwd"),
        ("../../up.txt", "up.txt"),
        ("C:\\Users\\ann\\photo.png", "photo.png"),
        ("a/b\\c/d.txt", "d.txt"),
        ("..\\..\\x", "x"),
        (" spaced name.txt ", "spaced name.txt"),
        ("line\r\nbreak\0.txt", "linebreak.txt"),
        ("Zu\u0308rich.txt", "Zürich.txt"),
        ("日本語.txt", "日本語.txt"),
        ("...", "..."),
        (".hidden", ".hidden"),
        ("x" * 255, "x" * 255),
    ],
)
def test_name_is_a_label(raw: str, name: str) -> None:
    """Whatever a client sends as a name, its last part in NFC is what is stored."""
    assert clean_name(raw) == name


@pytest.mark.parametrize(
    "raw",
    ["", ".", "..", "/", "a/", "a/..", "\\", "  ", "\0", "\n", "x" * 256, "ü" * 128, "\ud800"],
)
def test_what_names_no_file_is_refused(raw: str) -> None:
    """An empty name, a folder's name and one of more than 255 bytes are refused, with the field."""
    with pytest.raises(SluiceError) as caught:
        clean_name(raw, "filename")
    assert caught.value.code == "invalid-field"
    assert caught.value.field == "filename"


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_name_is_safe_or_refused(raw: str) -> None:
    """Every string becomes a name that is one path component and stays itself, or is refused."""
    try:
        name = clean_name(raw)
    except SluiceError as error:
        assert error.code == "invalid-field"
        error.detail.encode()  # it can be sent, whatever was in the name
        return
    assert name not in ("", ".", "..")
    assert not set(name) & set("/\\\0\r\n")
    assert len(name.encode()) <= 255
    assert unicodedata.is_normalized("NFC", name)
    assert clean_name(name) == name


@given(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=60))
def test_plain_name_stays_as_it_is(name: str) -> None:
    """Letters and digits in any script are kept."""
    name = unicodedata.normalize("NFC", name)
    assume(len(name.encode()) <= 255)
    assert clean_name(name) == name


def test_id_is_a_version_7_uuid() -> None:
    """An id has version and variant of RFC 9562 and the time of its making."""
    before = now_ms()
    made = [uuid.UUID(uuid7()) for _ in range(2000)]
    after = now_ms()
    for one in made:
        assert one.version == 7
        assert one.variant == uuid.RFC_4122
        assert before <= one.int >> 80 <= after
    assert len(set(made)) == len(made)


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id of a later millisecond is the greater text."""
    ids = []
    for at in (1, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1):
        monkeypatch.setattr("jobs.files.now_ms", lambda at=at: at)
        ids.append(uuid7())
    assert ids == sorted(ids)
    assert all(one == one.lower() and len(one) == 36 for one in ids)


def test_media_type_follows_the_name() -> None:
    """A known ending has its type; anything else is just bytes."""
    assert media_type_of("a.csv") == "text/csv"
    assert media_type_of("a.PNG") == "image/png"
    assert media_type_of("a.zzz") == "application/octet-stream"
