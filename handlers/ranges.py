"""What of a representation a request gets: conditions and ranges (RFC 9110 sections 13 and 14).

Pure: headers and three facts go in, a decision comes out. The order is that of section 13.2.2:
If-Match, else If-Unmodified-Since; If-None-Match, else If-Modified-Since; then Range, where
If-Range allows it. What is malformed in a condition makes it match nothing (a list) or counts as
not sent (a date).

Anyone may send any list, so its length and its commas are looked at before anything else, and what
is too long is no range at all: such a request gets the whole file, as if it had asked for that.
Nobody gets more bytes by ranges than without them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from errors import SluiceError

MAX_RANGES = 100
_MAX_RANGE_CHARS = 4096  # room for so many of the largest files
_MAX_TAGS_CHARS = 8192
_MAX_OVERLAPS = 2
_STRONG_AFTER_S = 1  # two versions in the same second have the same date

_MAX_DIGITS = 18  # what is longer lies behind the end of any file
_BEYOND = 10**_MAX_DIGITS
_RANGE = re.compile(r"[ \t]*+([0-9]*+)[ \t]*+-[ \t]*+([0-9]*+)[ \t]*+")
_TAG = re.compile(r'[ \t,]*+((?:W/)?"[\x21\x23-\x7e\x80-\xff]*+")[ \t]*+(?=,|\Z)')

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH, _TIME = rf"(?P<month>{'|'.join(_MONTHS)})", r"(?P<time>[0-9]{2}:[0-9]{2}:[0-9]{2})"
_DATES = (  # section 5.6.7: the form of today, and two that must still be read
    re.compile(
        rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), (?P<day>[0-9]{{2}}) {_MONTH} "
        rf"(?P<year>[0-9]{{4}}) {_TIME} GMT"
    ),
    re.compile(
        rf"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, (?P<day>[0-9]{{2}})-{_MONTH}-"
        rf"(?P<year>[0-9]{{2}}) {_TIME} GMT"
    ),
    re.compile(
        rf"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} "
        rf"(?P<year>[0-9]{{4}})"
    ),
)


class Span(NamedTuple):
    """Bytes ``[start, end)``."""

    start: int
    end: int


class Shown(NamedTuple):
    """The representation that is asked for: its strong validator, date and length."""

    etag: str
    modified_s: int
    size_bytes: int


class Decision(NamedTuple):
    """The answer: 200 with one span, 206 with one or more, or 304 without any."""

    status: int
    spans: list[Span]


def decide(headers: Mapping[str, str], shown: Shown, *, get: bool, now_s: float) -> Decision:
    """What a GET (``get``) or HEAD of ``shown`` is answered with.

    Raises version-mismatch (412), range-not-satisfiable (416).
    """
    _require(headers, shown, now_s)
    if _is_known(headers, shown, now_s):
        return Decision(304, [])
    if get and "Range" in headers and _range_applies(headers.get("If-Range"), shown, now_s):
        spans = spans_of(headers["Range"], shown.size_bytes)
        if spans is not None:
            return Decision(206, spans)
    return Decision(200, [Span(0, shown.size_bytes)])


def spans_of(header: str, size_bytes: int) -> list[Span] | None:
    """The spans that a Range header asks for, in its order; None for the whole.

    Overlapping and adjacent ones become one. The whole it is for another unit, an empty
    representation, more than MAX_RANGES ranges, more than two that overlap, and more bytes in sum
    than there are. Raises range-not-satisfiable for what is malformed or lies behind the end.
    """
    if len(header) > _MAX_RANGE_CHARS or header.count(",") >= MAX_RANGES or size_bytes == 0:
        return None
    unit, equals, asked = header.partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return None
    found = [_span(text, size_bytes) for text in asked.split(",") if text.strip(" \t")]
    spans = [span for span in found if span is not None]
    if not spans:
        raise _unsatisfiable("None of the ranges lies inside the file.", size_bytes)
    if sum(end - start for start, end in spans) > size_bytes:
        return None
    return _joined(spans)


def byteranges(
    spans: list[Span], media_type: str, size_bytes: int, boundary: str
) -> tuple[list[bytes], bytes]:
    """What stands before each span of a multipart/byteranges body, and at its end (14.6)."""
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\n"
        f"Content-Range: bytes {start}-{end - 1}/{size_bytes}\r\n\r\n".encode("latin-1")
        for start, end in spans
    ]
    heads[0] = heads[0].removeprefix(b"\r\n")
    return heads, f"\r\n--{boundary}--\r\n".encode("latin-1")


def http_date(text: str, now_s: float) -> int | None:
    """Seconds since 1970 of a date in one of its three forms (section 5.6.7); None if it is none.

    A year of two digits that would lie more than 50 years ahead is one of the past century.
    """
    found = next((match for form in _DATES if (match := form.fullmatch(text.strip()))), None)
    if found is None:
        return None
    year = int(found["year"])
    if len(found["year"]) == 2:
        this_year = datetime.fromtimestamp(now_s, UTC).year
        year += this_year // 100 * 100
        if year > this_year + 50:
            year -= 100
    hour, minute, second = map(int, found["time"].split(":"))
    month = _MONTHS.index(found["month"]) + 1
    try:
        date = datetime(year, month, int(found["day"]), hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return int(date.timestamp())


def _require(headers: Mapping[str, str], shown: Shown, now_s: float) -> None:
    """If-Match, by strong comparison; without it, If-Unmodified-Since."""
    match = headers.get("If-Match")
    if match is not None:
        if match.strip() != "*" and shown.etag not in tags_of(match):
            raise SluiceError("version-mismatch", "If-Match names another version of the file.")
        return
    since = http_date(headers.get("If-Unmodified-Since", ""), now_s)
    if since is not None and shown.modified_s > since:
        raise SluiceError("version-mismatch", "The file is newer than If-Unmodified-Since.")


def _is_known(headers: Mapping[str, str], shown: Shown, now_s: float) -> bool:
    """If-None-Match, by weak comparison; without it, If-Modified-Since."""
    none_match = headers.get("If-None-Match")
    if none_match is not None:
        tags = {tag.removeprefix("W/") for tag in tags_of(none_match)}
        return none_match.strip() == "*" or shown.etag in tags
    since = http_date(headers.get("If-Modified-Since", ""), now_s)
    return since is not None and shown.modified_s <= since


def _range_applies(if_range: str | None, shown: Shown, now_s: float) -> bool:
    """Whether the client has begun this very version (section 13.1.5): only strong validators."""
    if if_range is None:
        return True
    if if_range.strip() == shown.etag:
        return True
    old_enough = now_s - shown.modified_s > _STRONG_AFTER_S
    return old_enough and http_date(if_range, now_s) == shown.modified_s


def tags_of(header: str) -> list[str]:
    """The entity tags of a list, in which a comma may stand inside a tag; to the first bad one."""
    tags: list[str] = []
    if len(header) > _MAX_TAGS_CHARS:
        return tags
    at = 0
    while match := _TAG.match(header, at):
        tags.append(match[1])
        at = match.end()
    return tags


def _span(text: str, size_bytes: int) -> Span | None:
    """One range, cut to what is there; None if nothing of it is. Raises range-not-satisfiable."""
    match = _RANGE.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        raise _unsatisfiable(f"{text.strip()[:40]!r} is no range.", size_bytes)
    if not match[1]:
        start, end = size_bytes - min(_number(match[2]), size_bytes), size_bytes
    else:
        start, last = _number(match[1]), _number(match[2]) if match[2] else _BEYOND
        if last < start:
            raise _unsatisfiable(f"{text.strip()[:40]!r} ends before it begins.", size_bytes)
        end = min(last + 1, size_bytes)
    return Span(start, end) if start < end else None


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= _MAX_DIGITS else _BEYOND


def _joined(spans: list[Span]) -> list[Span] | None:
    """The same bytes in spans that neither overlap nor touch; None if too many overlap.

    Each stands where the first of those that it is made of stood.
    """
    overlaps = 0
    joined: list[tuple[int, Span]] = []
    for place, span in sorted(enumerate(spans), key=lambda item: item[1]):
        before, last = joined[-1] if joined else (0, Span(-1, -1))
        if span.start > last.end:
            joined.append((place, span))
            continue
        overlaps += span.start < last.end
        joined[-1] = (min(before, place), Span(last.start, max(last.end, span.end)))
    return None if overlaps > _MAX_OVERLAPS else [span for _, span in sorted(joined)]


def _unsatisfiable(what: str, size_bytes: int) -> SluiceError:
    detail = f"{what} The file has {size_bytes} bytes."
    return SluiceError("range-not-satisfiable", detail, bytes=size_bytes)
