"""Conditions and ranges: the rules by themselves, and against slices of a file on a real server."""

from __future__ import annotations

import http.client
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from email.utils import format_datetime, formatdate, parsedate_to_datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from errors import SluiceError
from handlers.ranges import MAX_RANGES, Shown, byteranges, decide, http_date, spans_of
from tests.conftest import Serve
from tests.handlers.clients import Caller
from tests.harness import FULL, Answer, Server, eventually

DATA = bytes(range(256)) * 4
N = len(DATA)

NOW = 1_800_000_000
ETAG = '"a,b"'  # a comma inside a tag separates nothing
SHOWN = Shown(ETAG, NOW - 100, N)
DATE = formatdate(SHOWN.modified_s, usegmt=True)
EARLIER, LATER = (formatdate(SHOWN.modified_s + s, usegmt=True) for s in (-1, 1))


def status(asked: dict[str, str], shown: Shown = SHOWN, *, get: bool = True) -> int:
    """The status that a request with these headers gets."""
    headers = {name.replace("_", "-"): value for name, value in asked.items()}
    try:
        return decide(headers, shown, get=get, now_s=NOW).status
    except SluiceError as error:
        return error.status


def parts(answer: Answer) -> list[tuple[dict[str, str], bytes]]:
    """The parts of a multipart/byteranges answer: headers and bytes; it must be well-formed."""
    form = r"multipart/byteranges; boundary=([0-9a-f]{32})"
    found = re.fullmatch(form, answer.headers["Content-Type"])
    assert found
    first, *middle, last = answer.body.split(b"--" + found[1].encode())
    assert (first, last) == (b"", b"--\r\n")
    result = []
    for piece in middle:
        head, _, data = piece.partition(b"\r\n\r\n")
        assert (head[:2], data[-2:]) == (b"\r\n", b"\r\n")
        lines = [line.split(": ", 1) for line in head[2:].decode().split("\r\n")]
        result.append(({name: value for name, value in lines}, data[:-2]))
    return result


# Conditions, in the order of RFC 9110 section 13.2.2


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"If_Match": ETAG}, 200),
        ({"If_Match": "*"}, 200),
        ({"If_Match": f'"x", {ETAG}'}, 200),
        ({"If_Match": f',, "x" ,{ETAG} ,'}, 200),
        ({"If_Match": f"W/{ETAG}"}, 412),
        ({"If_Match": '"x"'}, 412),
        ({"If_Match": '"a'}, 412),
        ({"If_Match": 'b"'}, 412),
        ({"If_Match": ""}, 412),
        ({"If_Match": '"x",' * 3000 + ETAG}, 412),
        ({"If_Match": ETAG, "If_Unmodified_Since": EARLIER}, 200),
        ({"If_Match": '"x"', "If_None_Match": ETAG}, 412),
        ({"If_Match": '"x"', "Range": "bytes=9999-"}, 412),
        ({"If_Unmodified_Since": EARLIER}, 412),
        ({"If_Unmodified_Since": DATE}, 200),
        ({"If_Unmodified_Since": LATER}, 200),
        ({"If_Unmodified_Since": "yesterday"}, 200),
        ({"If_Unmodified_Since": EARLIER, "If_None_Match": ETAG}, 412),
        ({"If_None_Match": ETAG}, 304),
        ({"If_None_Match": f"W/{ETAG}"}, 304),
        ({"If_None_Match": "*"}, 304),
        ({"If_None_Match": f'"x" , W/"y",{ETAG}'}, 304),
        ({"If_None_Match": '"a", "b"'}, 200),
        ({"If_None_Match": f'x"a {ETAG}'}, 200),
        ({"If_None_Match": '"x"'}, 200),
        ({"If_None_Match": ""}, 200),
        ({"If_None_Match": ETAG, "Range": "bytes=0-9"}, 304),
        ({"If_None_Match": ETAG, "Range": "bytes=9999-"}, 304),
        ({"If_None_Match": '"x"', "Range": "bytes=0-9"}, 206),
        ({"If_None_Match": '"x"', "If_Modified_Since": DATE}, 200),
        ({"If_Modified_Since": EARLIER}, 200),
        ({"If_Modified_Since": DATE}, 304),
        ({"If_Modified_Since": LATER}, 304),
        ({"If_Modified_Since": LATER, "Range": "bytes=0-9"}, 304),
        ({"If_Modified_Since": "yesterday"}, 200),
        ({"If_Modified_Since": DATE.replace("GMT", "+0000")}, 200),
        ({"If_Range": ETAG, "Range": "bytes=0-9"}, 206),
        ({"If_Range": f" {ETAG} ", "Range": "bytes=0-9"}, 206),
        ({"If_Range": f"W/{ETAG}", "Range": "bytes=0-9"}, 200),
        ({"If_Range": '"x"', "Range": "bytes=0-9"}, 200),
        ({"If_Range": '"x"', "Range": "bytes=9999-"}, 200),
        ({"If_Range": f'"x", {ETAG}', "Range": "bytes=0-9"}, 200),
        ({"If_Range": "*", "Range": "bytes=0-9"}, 200),
        ({"If_Range": DATE, "Range": "bytes=0-9"}, 206),
        ({"If_Range": EARLIER, "Range": "bytes=0-9"}, 200),
        ({"If_Range": LATER, "Range": "bytes=0-9"}, 200),
        ({"If_Range": "yesterday", "Range": "bytes=0-9"}, 200),
        ({"If_Range": ETAG}, 200),
    ],
)
def test_conditions(headers: dict[str, str], expected: int) -> None:
    """Conditions on the tag come before those on the date, both before the range."""
    assert status(headers) == expected
    if expected != 206:
        assert status(headers, get=False) == expected  # HEAD, to which no range applies


def test_a_date_is_a_weak_validator_for_a_moment() -> None:
    """In the second of its making a file's date could be another version's, too."""
    for age_s, expected in ((-5, 200), (0, 200), (1, 200), (2, 206)):
        shown = Shown(ETAG, NOW - age_s, N)
        date = formatdate(shown.modified_s, usegmt=True)
        assert status({"If_Range": date, "Range": "bytes=0-9"}, shown) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("Monday, 06-Nov-34 08:49:37 GMT", 2046415777),
        ("Sunday, 06-Nov-77 08:49:37 GMT", 3403414177),  # 50 years ahead
        ("Monday, 06-Nov-78 08:49:37 GMT", 279190177),  # 51 would be
        ("Sun, 06 Nov 1994 08:49:37 UTC", None),
        ("Sun, 06 Nov 1994 08:49:37 +0100", None),
        ("sun, 06 nov 1994 08:49:37 gmt", None),
        ("Sun, 6 Nov 1994 08:49:37 GMT", None),
        ("Sun, 31 Feb 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 24:00:00 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT; length=3", None),
        ("784111777", None),
        ("", None),
    ],
)
def test_dates(text: str, expected: int | None) -> None:
    """A date may have three forms; anything else is none."""
    assert http_date(text, NOW) == expected


# Ranges by themselves


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-9", [(0, 10)]),
        ("BYTES=0-9", [(0, 10)]),
        ("bytes=0-9,20-29", [(0, 10), (20, 30)]),
        ("bytes=20-29,0-9", [(20, 30), (0, 10)]),
        ("bytes= 0-9 ,, 20 - 29 ,", [(0, 10), (20, 30)]),
        ("bytes=0-9,10-19", [(0, 20)]),
        ("bytes=" + ",".join(f"{i}-{i}" for i in range(50)), [(0, 50)]),
        ("bytes=0-9,5-19,15-29", [(0, 30)]),
        ("bytes=0-9,5-19,15-29,25-39", None),
        ("bytes=0-9,0-9,0-9,0-9", None),
        ("bytes=100-109,0-9,105-119", [(100, 120), (0, 10)]),
        ("bytes=0-9,2-3", [(0, 10)]),
        ("bytes=0-1023,0-0", None),
        ("bytes=-600,-600", None),
        ("bytes=0-511,512-1023", [(0, N)]),
        ("bytes=0-1,5000-", [(0, 2)]),
        ("bytes=0-99999999999999999999999999", [(0, N)]),
        ("bytes=-99999999999999999999999999", [(0, N)]),
        ("bytes=0000000000000000000000005-6", [(5, 7)]),
        ("bytes", None),
        ("", None),
        ("bytes 0-9", None),
        ("items=abc", None),
        ("bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(MAX_RANGES)), MAX_RANGES),
        ("bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(MAX_RANGES + 1)), None),
        ("bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(500, 0, -1)), None),
        ("bytes=0-9" + "," * MAX_RANGES, None),
        ("bytes=" + "0" * 5000 + "-9", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_which_spans_are_asked_for(asked: str, expected: list[tuple[int, int]] | int) -> None:
    """Some spans in the order that was asked for, joined where they touch; or the whole."""
    found = spans_of(asked, N)
    assert (len(found or []) if isinstance(expected, int) else found) == expected


@pytest.mark.parametrize(
    "asked",
    [
        *("bytes=", "bytes=,", "bytes=-", "bytes=abc", "bytes=1-2-3", "bytes=0x1-2", "bytes=+1-2"),
        *(
            "bytes=9-2",
            "bytes=1024-",
            "bytes=-0",
            "bytes=1024-,-0",
            "bytes=0-9,abc",
            "bytes=0-9,9-2",
        ),
        *("bytes=\u0661-\u0662", "bytes=1.5-2", "bytes=--5", "bytes=0-9;20-29", "bytes=0-9 20-29"),
        "bytes=99999999999999999999999999-",
    ],
)
def test_what_can_not_be_met(asked: str) -> None:
    """A malformed range, and one behind the end, is refused with the size; of nothing none is."""
    with pytest.raises(SluiceError) as refused:
        spans_of(asked, N)
    assert (refused.value.status, refused.value.extra) == (416, {"bytes": N})
    assert spans_of(asked, 0) is None


def steps(asked: str) -> int:
    """How many lines and calls it takes to look at a Range header."""
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        spans_of(asked, 1 << 40)
    except SluiceError:
        pass
    finally:
        sys.setprofile(None)
        sys.settrace(None)
    return count


def hostile(separator: str = ",") -> Iterator[str]:
    """Range headers of 60 KiB."""
    yield "bytes=" + separator.join(["0-0"] * (15 << 10))
    yield "bytes=" + separator.join(f"{i}-{i}" for i in range(7999, 2000, -1))
    yield "bytes=" + separator.join(["0-"] * (20 << 10))
    yield "bytes=" + separator * (60 << 10)
    yield "bytes=" + "9" * (60 << 10) + "-"


def test_case_60_a_hostile_list_costs_no_more_than_one_range() -> None:
    """A list that is too long is not looked at; the longest that is costs 100 times one range."""
    one = steps("bytes=0-1")
    assert one > 10
    for asked in hostile():
        assert steps(asked) <= one
    longest = "bytes=" + ",".join(f"{i * 10**10}-{i * 10**10}" for i in range(MAX_RANGES))
    assert one < steps(longest) <= MAX_RANGES * one


def test_the_text_around_the_parts() -> None:
    """Each part has its type and place; the lines between them are those of RFC 2046."""
    heads, tail = byteranges(spans_of("bytes=0-1,4-5", N) or [], "a/b", N, "xyz")
    assert heads == [
        b"--xyz\r\nContent-Type: a/b\r\nContent-Range: bytes 0-1/1024\r\n\r\n",
        b"\r\n--xyz\r\nContent-Type: a/b\r\nContent-Range: bytes 4-5/1024\r\n\r\n",
    ]
    assert tail == b"\r\n--xyz--\r\n"


# Table 1b: what a request for 1024 bytes is answered with


@pytest.fixture(scope="module")
def file(site: Server) -> Any:
    """A stored file of 1024 bytes with a digest."""
    headers = {"Want-Repr-Digest": "sha-256=1", "Upload-Complete": "?1"}
    headers |= {"Content-Disposition": 'attachment; filename="data.bin"'}
    made = site.request("POST", "/resumable/", DATA, headers)
    assert made.status == 201, made
    (row,) = site.get("/v1/files?name=data.bin").json["items"]
    return row


def ask(server: Server, file_id: str, method: str = "GET", **headers: str) -> Answer:
    """Ask for the content of a file."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.request(method, f"/v1/files/{file_id}/content", headers=sent)


ALWAYS = ("Etag", "Last-Modified", "Cache-Control", "Content-Disposition", "Accept-Ranges")
DIGESTS = ("Repr-Digest", "Digest")

# id: (method, headers, status, Content-Range, which bytes of the file are the body)
TABLE: dict[str, tuple[str, dict[str, str], int, str | None, slice]] = {
    "first-ten": ("GET", {"Range": "bytes=0-9"}, 206, "bytes 0-9/1024", slice(0, 10)),
    "head-ignores-range": ("HEAD", {"Range": "bytes=0-9"}, 200, None, slice(0, 0)),
    "suffix": ("GET", {"Range": "bytes=-10"}, 206, "bytes 1014-1023/1024", slice(1014, N)),
    "long-suffix": ("GET", {"Range": "bytes=-5000"}, 206, "bytes 0-1023/1024", slice(0, N)),
    "behind-the-end": ("GET", {"Range": "bytes=1024-"}, 416, "bytes */1024", slice(0, 0)),
    "no-suffix": ("GET", {"Range": "bytes=-0"}, 416, "bytes */1024", slice(0, 0)),
    "backwards": ("GET", {"Range": "bytes=9-2"}, 416, "bytes */1024", slice(0, 0)),
    "no-number": ("GET", {"Range": "bytes=abc"}, 416, "bytes */1024", slice(0, 0)),
    "unknown-unit": ("GET", {"Range": "items=0-1"}, 200, None, slice(0, N)),
    "one-of-two": ("GET", {"Range": "bytes=0-1,5000-"}, 206, "bytes 0-1/1024", slice(0, 2)),
    "two-overlaps": ("GET", {"Range": "bytes=0-5,4-9,8-11"}, 206, "bytes 0-11/1024", slice(0, 12)),
    "three-overlaps": ("GET", {"Range": "bytes=0-5,4-9,8-11,0-1"}, 200, None, slice(0, N)),
    "more-than-all": ("GET", {"Range": "bytes=0-,0-0"}, 200, None, slice(0, N)),
    "if-range": (
        *("GET", {"Range": "bytes=4-7", "If-Range": "{etag}"}),
        *(206, "bytes 4-7/1024", slice(4, 8)),
    ),
    "if-range-mismatch": (
        *("GET", {"Range": "bytes=4-7", "If-Range": '"other"'}),
        *(200, None, slice(0, N)),
    ),
    "if-range-weak": (
        *("GET", {"Range": "bytes=4-7", "If-Range": "W/{etag}"}),
        *(200, None, slice(0, N)),
    ),
    "if-range-other-date": (
        *("GET", {"Range": "bytes=4-7", "If-Range": "Sun, 06 Nov 1994 08:49:37 GMT"}),
        *(200, None, slice(0, N)),
    ),
    "if-none-match-wins": (
        *("GET", {"Range": "bytes=4-7", "If-None-Match": "{etag}"}),
        *(304, None, slice(0, 0)),
    ),
    "if-match-miss": (
        *("GET", {"Range": "bytes=4-7", "If-Match": '"other"'}),
        *(412, None, slice(0, 0)),
    ),
    "never-compressed": (
        *("GET", {"Range": "bytes=0-9", "Accept-Encoding": "gzip"}),
        *(206, "bytes 0-9/1024", slice(0, 10)),
    ),
    "whole": ("GET", {"Accept-Encoding": "gzip"}, 200, None, slice(0, N)),
}


@pytest.mark.parametrize("row", TABLE)
def test_table_1b(site: Server, file: Any, row: str) -> None:
    """Each row has its status, its Content-Range, its bytes, and repeats what identifies them."""
    method, given, status, content_range, which = TABLE[row]
    headers = {name: value.format(etag=file["etag"]) for name, value in given.items()}
    answer = site.request(method, f"/v1/files/{file['id']}/content", headers=headers)
    assert answer.status == status
    assert answer.headers.get("Content-Range") == content_range
    assert "Content-Encoding" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    if status >= 400:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "Sluice-Job" not in answer.headers
        return
    assert answer.body == DATA[which]
    assert answer.headers["Etag"] == file["etag"]
    if status == 304:
        assert "Content-Length" not in answer.headers
        assert {"Cache-Control", "Last-Modified"} <= answer.headers.keys()
        return
    length = N if method == "HEAD" else len(DATA[which])
    assert answer.headers["Content-Length"] == str(length)
    assert all(name in answer.headers for name in ALWAYS + DIGESTS)
    assert answer.headers["Content-Type"] == "application/octet-stream"


def test_table_1b_several_ranges(site: Server, file: Any) -> None:
    """Several ranges are parts with a type and a place each, in their order; all add up."""
    answers = [ask(site, file["id"], Range="bytes=1000-1009,0-1,-3") for _ in range(2)]
    assert answers[0].headers["Content-Type"] != answers[1].headers["Content-Type"]
    for answer in answers:
        assert answer.status == 206
        assert "Content-Range" not in answer.headers
        assert answer.headers["Content-Length"] == str(len(answer.body))
        media_type = {"Content-Type": "application/octet-stream"}
        assert parts(answer) == [
            (media_type | {"Content-Range": "bytes 1000-1009/1024"}, DATA[1000:1010]),
            (media_type | {"Content-Range": "bytes 0-1/1024"}, DATA[:2]),
            (media_type | {"Content-Range": "bytes 1021-1023/1024"}, DATA[1021:]),
        ]


@pytest.mark.parametrize(
    "asked", ["bytes=0-", "bytes=-5", "bytes=0-0", "bytes=abc", "bytes=0-1,5-6"]
)
def test_table_1b_empty_file(site: Server, asked: str) -> None:
    """Of an empty file any range is the whole file."""
    file_id = Caller(site, "ranges").store("empty.bin", b"")
    answer = ask(site, file_id, Range=asked)
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")


def test_table_1b_if_range_with_a_date(site: Server, file: Any) -> None:
    """Once it is a little old, the exact date of a file is as good as its tag, in any form."""
    date = ask(site, file["id"], "HEAD").headers["Last-Modified"]
    weekday, day, month, year, time_of_day, _ = date.split()
    long_day = {"Tue,": "Tuesday", "Wed,": "Wednesday", "Thu,": "Thursday", "Sat,": "Saturday"}
    long_day_ = long_day.get(weekday, weekday[:-1] + "day")
    forms = [
        date,
        f"{long_day_}, {day}-{month}-{year[2:]} {time_of_day} GMT",
        f"{weekday[:-1]} {month} {int(day):2} {time_of_day} {year}",
    ]

    def dated(form: str) -> bool:
        return ask(site, file["id"], Range="bytes=4-7", If_Range=form).status == 206

    for form in forms:
        eventually(
            partial(dated, form),
            f"{form} is old enough",
        )
    for seconds in (-1, 1):
        other = parsedate_to_datetime(date) + timedelta(seconds=seconds)
        assert not dated(format_datetime(other, usegmt=True))


def test_case_59_a_206_repeats_what_identifies_the_file(site: Server, file: Any) -> None:
    """A 206, of one part or more, has the validators, lifetime, name and digests of the 200."""
    whole = ask(site, file["id"])
    for asked in ("bytes=0-9", "bytes=0-1,4-5"):
        part = ask(site, file["id"], Range=asked)
        assert part.status == 206
        for name in ALWAYS + DIGESTS:
            assert part.headers[name] == whole.headers[name]
        assert ("Content-Range" in part.headers) == ("," not in asked)


def test_case_60_hostile_lists_get_the_whole(site: Server, file: Any) -> None:
    """More than 100 ranges are ignored, however they are ordered; a 416 costs as little."""
    for asked in hostile():
        answer = ask(site, file["id"], Range=asked)
        assert (answer.status, answer.body) == (200, DATA)
    descending = ",".join(f"{i}-{i}" for i in range(1000, 800, -2))
    assert len(parts(ask(site, file["id"], Range=f"bytes={descending}"))) == MAX_RANGES
    assert ask(site, file["id"], Range=f"bytes={descending},0-0").status == 200


def test_case_60_a_hostile_list_of_tags_matches_nothing(site: Server, file: Any) -> None:
    """A list of validators that is too long names no version: 412 for one, the bytes for other."""
    tags = '"x", ' * 10_000 + file["etag"]
    assert ask(site, file["id"], If_Match=tags).status == 412
    assert ask(site, file["id"], If_None_Match=tags).status == 200


@pytest.mark.parametrize("field", ["bytes 0-4/10", "bytes 0-4/*", "bytes 0-9/10"])
def test_case_63_a_put_of_a_part_is_refused(site: Server, file: Any, field: str) -> None:
    """PUT with Content-Range is a 400 at any address, and stores nothing; other methods a 405."""
    before = site.get("/v1/files").json["items"]
    headers = {"Content-Range": field, "Upload-Complete": "?1"}
    content = f"/v1/files/{file['id']}/content"
    for path in ("/resumable/", content, "/upload?file_name=x&bytes_read=0"):
        refused = site.request("PUT", path, b"01234", headers)
        assert (refused.status, refused.json["field"]) == (400, "Content-Range")
    assert site.get("/v1/files").json["items"] == before
    assert site.jobs("?state=running") == []
    for method in ("PUT", "POST", "PATCH", "DELETE"):
        other = site.request(method, content, b"01234", {"Upload-Complete": "?1"})
        assert (other.status, other.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert ask(site, file["id"]).body == DATA
    assert site.request("PUT", "/resumable/", b"01234", {"Upload-Complete": "?1"}).status == 201


# Against slices

_numbers = st.one_of(st.integers(0, 1100), st.integers(0, 40), st.just(10**20))
_specs = st.one_of(
    st.tuples(_numbers, _numbers),
    st.tuples(st.integers(0, 1000), st.integers(0, 30)).map(lambda pair: (pair[0], sum(pair))),
    st.tuples(_numbers, st.none()),
    st.tuples(st.none(), _numbers),
)
Spec = tuple[int | None, int | None]


def places(first: int | None, last: int | None) -> range:
    """The bytes of the file that one range means."""
    if first is None:
        return range(N)[-last:] if last else range(0)
    return range(N)[first:] if last is None else range(N)[first : last + 1]


def expected(specs: list[Spec]) -> tuple[int, list[slice]]:
    """The status and the slices, found by marking bytes one by one."""
    if len(specs) > 100:
        return 200, [slice(0, N)]
    asked = [one for spec in specs if (one := places(*spec))]
    if not asked or any(None not in (a, b) and a > b for a, b in specs):  # type: ignore[operator]
        return 416, []
    if sum(map(len, asked)) > N:
        return 200, [slice(0, N)]
    marked: set[int] = set()
    overlaps = 0
    for one in sorted(asked, key=lambda one: (one.start, one.stop)):
        overlaps += not marked.isdisjoint(one)
        marked.update(one)
    if overlaps > 2:
        return 200, [slice(0, N)]
    slices: list[slice] = []
    for one in asked:
        start, stop = one.start, one.stop
        while start - 1 in marked:
            start -= 1
        while stop in marked:
            stop += 1
        if slice(start, stop) not in slices:
            slices.append(slice(start, stop))
    return 206, slices


@pytest.fixture(scope="module")
def connection(site: Server) -> Iterator[http.client.HTTPConnection]:
    """One connection for all requests of a test."""
    found = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    yield found
    found.close()


@settings(max_examples=3000 if FULL else 300, deadline=None)
@given(
    specs=st.lists(_specs, min_size=1, max_size=6),
    between=st.sampled_from([",", ", ", " ,\t,", ",,"]),
)
@example(specs=[(0, 9), (5, 14), (10, 19)], between=",")
@example(specs=[(20, 29), (0, 9), (10, 19)], between=",")
@example(specs=[(i * 2, i * 2) for i in range(100)], between=",")
@example(specs=[(i * 2, i * 2) for i in range(101)], between=",")
def test_any_ranges_are_slices_of_the_file(
    connection: http.client.HTTPConnection, file: Any, specs: list[Spec], between: str
) -> None:
    """Whatever ranges are asked for, on one connection: what comes is what slicing gives."""
    text = between.join(
        f"{'' if first is None else first}-{'' if last is None else last}" for first, last in specs
    )
    connection.request("GET", f"/v1/files/{file['id']}/content", headers={"Range": f"bytes={text}"})
    got = connection.getresponse()
    answer = Answer(got.status, dict(got.headers.items()), got.read())
    status, slices = expected(specs)
    assert answer.status == status
    if status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{N}"
    elif len(slices) > 1:
        said = [f"bytes {one.start}-{one.stop - 1}/{N}" for one in slices]
        assert [part["Content-Range"] for part, _ in parts(answer)] == said
        assert [data for _, data in parts(answer)] == [DATA[one] for one in slices]
    else:
        (one,) = slices
        assert answer.body == DATA[one]
        place = f"bytes {one.start}-{one.stop - 1}/{N}" if status == 206 else None
        assert answer.headers.get("Content-Range") == place


def test_ranges_of_a_completed_tus_upload(serve: Serve) -> None:
    """An upload that is complete is read by the same rules."""
    server = serve()
    made = server.post(
        "/tus/",
        DATA,
        Tus_Resumable="1.0.0",
        Upload_Length=str(N),
        Content_Type="application/offset+octet-stream",
    )
    path = "/tus/" + made.headers["Location"]
    answer = server.get(path, Range="bytes=5-6,1-2")
    assert [data for _, data in parts(answer)] == [DATA[5:7], DATA[1:3]]
    assert server.get(path, If_Unmodified_Since="Sun, 06 Nov 1994 08:49:37 GMT").status == 412
