"""Names of what a kind makes."""

from __future__ import annotations

import unicodedata

_MAX_BYTES = 255


def check_name(name: str) -> None:
    """Only what would be stored unchanged as a file's name. Raises ValueError for the rest."""
    hidden = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    plain = unicodedata.normalize("NFC", name).strip() == name and name not in ("", ".", "..")
    if hidden or not plain or "/" in name or "\\" in name or len(name.encode()) > _MAX_BYTES:
        raise ValueError("The field `name` is no plain file name of at most 255 bytes")


def with_suffix(stem: str, suffix: str) -> str:
    """The two as one name, without folders; the stem is cut where that would be too long."""
    kept = (
        stem.rpartition("/")[2]
        .encode()[: _MAX_BYTES - len(suffix.encode())]
        .decode(errors="ignore")
    )
    return kept.rstrip() + suffix


def plain_name(raw: str) -> str | None:
    """The part of a foreign name that can be a file's name, or None if nothing is left of it."""
    base = raw.replace("\\", "/").rpartition("/")[2]
    base = "".join(c for c in base if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))
    name = with_suffix(unicodedata.normalize("NFC", base).strip(), "").strip()
    return None if name in ("", ".", "..") else name
