"""Header fields that are written alike in every dialect: structured fields (RFC 9651), digests,
preferences (RFC 7240).

What is malformed counts as not sent, as RFC 9651 section 4.2 wants it: a reader returns nothing
instead of raising, and the dialect says what it misses. Digests are hex everywhere but here.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote

import http_sf
import multipart

# What is compared and told (RFC 9530 section 5), and how many bytes each has. The registry's other
# algorithms prove nothing against an attacker, so a digest by one of them is not looked at.
_DIGEST_BYTES = {"sha-256": 32, "sha-512": 64}

# One of a list, in which a comma may stand in a string; and what a preference looks like. Both take
# any text in linear time.
_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*+"?+)++', re.DOTALL)
_TOKEN = r"[\w!#$%&'*+.^`|~-]++"
_WORD = rf'(?:"((?:[^"\\]|\\.)*+)"|({_TOKEN}))'
_PREFERENCE = re.compile(
    rf"[ \t]*+({_TOKEN})[ \t]*+(?:=[ \t]*+{_WORD}[ \t]*+)?+"
    rf"(?:;[ \t]*+(?:{_TOKEN}[ \t]*+(?:=[ \t]*+{_WORD}[ \t]*+)?+)?+)*+",
    re.ASCII | re.DOTALL,
)

_QUOTED = re.compile('"[^"]*"')
_EXTENDED_NAME = re.compile(r"(?i);\s*filename\*\s*=\s*utf-8'[^';]*'([^\s;\"]+)")
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}")
_UNKNOWN_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded")


def integer(value: str | None) -> int | None:
    """An Integer (RFC 9651 section 3.3.1); None if it is missing or anything else."""
    found = _item(value)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def boolean(value: str | None) -> bool | None:
    """A Boolean (RFC 9651 section 3.3.6); None if it is missing or anything else."""
    found = _item(value)
    return found if isinstance(found, bool) else None


def string(value: str | None) -> str | None:
    """A String (RFC 9651 section 3.3.3); None if it is missing or anything else."""
    found = _item(value)
    return found if isinstance(found, str) else None


def preferences(value: str | None) -> dict[str, str]:
    """The preferences of a Prefer (RFC 7240 section 2) by name in lower case, without parameters.

    One without a value has an empty one, which means the same. Of one that is there twice the first
    counts; what is malformed counts as not sent.
    """
    found: dict[str, str] = {}
    for element in _ELEMENT.findall(value or ""):
        match = _PREFERENCE.fullmatch(element)
        if match is not None:
            quoted, plain = match[2], match[3]
            text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain or ""
            found.setdefault(match[1].lower(), text)
    return found


def dictionary(values: Mapping[str, int | bool | bytes]) -> str:
    """A Dictionary (RFC 9651 section 3.2) of these members, of which there is at least one."""
    return http_sf.ser(dict(values))


def digests(value: str | None) -> dict[str, str]:
    """The digests in hex of a Repr-Digest or Content-Digest (RFC 9530 sections 2 and 3)."""
    return {
        name: found.hex()
        for name, found in _members(value).items()
        if isinstance(found, bytes) and _DIGEST_BYTES.get(name) == len(found)
    }


def wants_digest(value: str | None) -> bool:
    """Whether a Want-Repr-Digest asks for any (RFC 9530 section 4); a 0 asks for none.

    Which one is only a preference, so the answer may be by another algorithm.
    """
    weights = _members(value).values()
    return any(type(weight) is int and weight > 0 for weight in weights)


def wants_legacy_digest(value: str | None) -> bool:
    """The same of a Want-Digest (RFC 3230 section 4.3.1), the only one that some clients send."""
    wishes = [wish.replace(" ", "").lower() for wish in (value or "").split(",")]
    return any(wish and not re.search(r";q=0(\.0*)?$", wish) for wish in wishes)


def repr_digest(digest: Mapping[str, str]) -> str:
    """A file's digests as Repr-Digest; empty if there is none to be told."""
    known = {name: bytes.fromhex(digest[name]) for name in _DIGEST_BYTES if name in digest}
    return dictionary(known) if known else ""


def legacy_digest(digest: Mapping[str, str]) -> str:
    """The same as Digest (RFC 3230), the only one that some download clients verify."""
    return ",".join(
        f"{name.upper()}={b64encode(bytes.fromhex(digest[name])).decode()}"
        for name in _DIGEST_BYTES
        if name in digest
    )


def file_name(disposition: str | None) -> str | None:
    """The name in a Content-Disposition (RFC 6266 section 4.3), as it was sent; None without one.

    ``filename*`` comes first. Bytes that are not ASCII are taken as UTF-8, if they are that.
    """
    text = disposition or ""
    if extended := _EXTENDED_NAME.search(_QUOTED.sub('""', text)):
        with suppress(UnicodeDecodeError):
            return unquote(extended[1], errors="strict")
    with suppress(UnicodeEncodeError, UnicodeDecodeError):
        text = text.encode("latin-1").decode()
    _, options = multipart.parse_options_header(text, unquote=multipart.content_disposition_unquote)
    name: str | None = options.get("filename")
    return name


def media_type(value: str | None) -> str | None:
    """A media type (RFC 9110 section 8.3.1) in lower case, without parameters; None if it is none.

    So is one that clients send when they know nothing about the content.
    """
    found = (value or "").partition(";")[0].strip().lower()
    known = _MEDIA_TYPE.fullmatch(found) and found not in _UNKNOWN_TYPES
    return found if known else None


def _item(value: str | None) -> object:
    found = _parsed(value, "item")
    return found[0] if isinstance(found, tuple) else None


def _members(value: str | None) -> dict[str, object]:
    """The members of a Dictionary without their parameters; none if it is malformed."""
    found = _parsed(value, "dictionary")
    if not isinstance(found, dict):
        return {}
    return {
        name: member[0] for name, member in found.items() if isinstance(member, tuple) and member
    }


def _parsed(value: str | None, kind: str) -> object:
    if value is None:
        return None
    try:
        return http_sf.parse(value.encode("ascii"), tltype=kind)
    except (http_sf.StructuredFieldError, UnicodeEncodeError):
        return None
