"""A file from another server, by HTTP or HTTPS.

Strategy. What is stored so far, with the validator of the version that it is of, is the cursor: the
artefact's length is saved with it. After a pause, a crash or a cut the rest is asked for by
``Range`` and ``If-Range``; only a 206 that begins just there, of the same version and length, goes
on. Whatever else the server sends is another file, or the whole again: then the artefact is begun
anew. Cut connections, 429 and 5xx are tried again here, with growing waits, as long as that gets
further; what is left of them fails the job, which may be retried as a whole.

Each hop of a redirect is a new place that is checked like the first (``ctx.resolve``); the
connection goes to an address that was checked (_http.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from time import monotonic
from typing import Annotated, Any, Literal

import msgspec

from errors import SluiceError
from jobs.kinds import ArtifactWriter, Context, Retry
from jobs.kinds._digests import hasher
from jobs.kinds._http import Cut, Exchange, Place, place_of
from jobs.kinds._names import check_name, plain_name

KIND = "fetch"
TITLE = "A file from another server"
UNIT = "bytes"
PAUSE = "at once; after 30 s nothing is read twice, if the server knows Range and a validator"
RETRY = Retry(times=3, base_s=60.0, max_s=3600.0)

_CONNECT_S = 15.0  # for each address
_REDIRECTS = 10
_MOST_TRIES = 1000  # also if each gets a little further
_WAIT_S = 1.0, 60.0  # before another try: the first, and the longest
_ASKED_S = 300.0  # a longer Retry-After ends the job
_READ_BYTES = 256 << 10
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED = frozenset({301, 302, 303, 307, 308})
_VALIDATOR_CHARS = 1024  # a longer one is not sent back

Algorithm = Literal["sha256", "sha512", "sha1", "md5", "blake2b", "crc32"]


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is fetched, and what it must be."""

    url: Annotated[
        str, msgspec.Meta(min_length=1, description="http:// or https://, without a password")
    ]
    name: Annotated[
        str | None, msgspec.Meta(description="default: as the server or the URL says")
    ] = None
    expect: Annotated[
        dict[Algorithm, str], msgspec.Meta(description="digests in hex that the file must have")
    ] = {}
    max_bytes: Annotated[
        int, msgspec.Meta(ge=0, description="a file that is larger fails the job")
    ] = 64 << 30
    retries: Annotated[
        int, msgspec.Meta(ge=0, le=100, description="tries in a row that get no further")
    ] = 5
    idle_s: Annotated[
        float, msgspec.Meta(ge=0.1, le=3600, description="a server that is silent so long is left")
    ] = 60
    expires_s: Annotated[
        Annotated[int, msgspec.Meta(ge=60, le=315_360_000)] | None,
        msgspec.Meta(description="the file is kept so long; default: for good"),
    ] = None

    def __post_init__(self) -> None:
        try:
            place_of(self.url)
        except ValueError as error:
            raise ValueError(f"The field `url` {error}") from None
        if self.name is not None:
            check_name(self.name)


class Cursor(msgspec.Struct):
    """Which version of what is in the artefact."""

    url: str  # where the last redirect led
    name: str
    media_type: str
    validator: str = ""  # for If-Range; without one nothing can go on
    total: int | None = None
    wasted: int = 0  # bytes that were thrown away; progress counts them, as it never goes back


class _StartOver(Exception):
    """What is stored so far is not the begin of what the server has now."""


async def run(ctx: Context, params: Params) -> dict[str, Any]:
    """Try until all is there."""
    return await _Fetch(ctx, params).run()


class _Fetch:
    """One run."""

    def __init__(self, ctx: Context, params: Params) -> None:
        self._ctx = ctx
        self._params = params
        self._cursor = None if ctx.cursor is None else msgspec.convert(ctx.cursor, Cursor)
        self._file: ArtifactWriter | None = None
        self._hashers = {name: hasher(name) for name in params.expect}
        self._hashed = 0  # bytes that the hashers have seen
        self._done = False  # an answer has come to its end, and nothing is missing
        self._best = 0  # the furthest that a try has come
        self._host = place_of(params.url).host

    async def run(self) -> dict[str, Any]:
        """Try until all is there. Raises SluiceError."""
        if self._cursor is not None:
            self._file = await self._open(self._cursor)
            self._best = self._file.offset
        failures = tries = 0
        while not self._is_whole():
            tries += 1
            try:
                await self._try()
            except Cut as cut:
                at = self._file.offset if self._file is not None else 0
                failures = 0 if at > self._best else failures + 1
                self._best = max(self._best, at)
                if failures > self._params.retries or tries >= _MOST_TRIES:
                    raise SluiceError("fetch-failed", f"{self._host}: {cut}.") from cut
                await self._wait(cut, failures)
            except _StartOver:
                await self._start_over()
        await self._check()
        assert self._file is not None and self._cursor is not None
        return {
            "name": self._cursor.name,
            "bytes": self._file.offset,
            "media_type": self._cursor.media_type,
            "host": place_of(self._cursor.url).host,
            "validator": self._cursor.validator,
        }

    def _is_whole(self) -> bool:
        """Whether there is nothing to ask for any more."""
        return self._done or (
            self._cursor is not None
            and self._file is not None
            and self._cursor.total == self._file.offset
        )

    async def _wait(self, cut: Cut, failures: int) -> None:
        first, longest = _WAIT_S
        wait_s = min(longest, first * 2 ** max(0, failures - 1)) * random.uniform(0.5, 1)
        wait_s = cut.after_s if cut.after_s is not None else wait_s
        self._ctx.log(f"{self._host}: {cut}; trying again in {wait_s:.0f} s")
        await self._ctx.checkpoint(message=f"{cut}; trying again")
        await self._ctx.sleep(wait_s)

    async def _start_over(self) -> None:
        """Forget what is stored so far."""
        assert self._cursor is not None and self._file is not None
        self._cursor.wasted += self._file.offset
        self._ctx.log(f"{self._host} has another version now, or no parts of it: starting over")
        self._cursor.validator, self._cursor.total = "", None
        self._file = await self._open(self._cursor, fresh=True)
        self._hashers = {name: hasher(name) for name in self._params.expect}
        self._hashed = 0

    async def _open(self, cursor: Cursor, *, fresh: bool = False) -> ArtifactWriter:
        return await self._ctx.artifact(
            cursor.name, cursor.media_type, expires_s=self._params.expires_s, fresh=fresh
        )

    # One try

    async def _try(self) -> None:
        """Ask for what is missing and take it. Raises Cut, _StartOver, SluiceError."""
        places = [self._params.url]
        if self._cursor is not None and self._cursor.url != self._params.url:
            places.insert(0, self._cursor.url)  # its server knows the validator
        for url in places:
            place = place_of(url)
            for _ in range(_REDIRECTS + 1):
                following = await self._ask(place, is_last=url == places[-1])
                if following is None:
                    return
                if following is place:  # the place of the last time is gone
                    break
                place = following
            else:
                raise SluiceError("fetch-refused", f"More than {_REDIRECTS} redirects.")

    async def _ask(self, place: Place, *, is_last: bool) -> Place | None:
        """Ask one place: None if all is there now, else where to ask next."""
        await self._ctx.checkpoint(message=f"asking {place.host}")
        exchange = Exchange(
            partial(self._ctx.resolve, place.host, place.port),
            place,
            self._headers(),
            _CONNECT_S,
        )
        try:
            await self._attend(exchange)
            if exchange.status in _MOVED:
                return _moved(exchange)
            if 400 <= exchange.status < 500 and exchange.status not in (*_AGAIN, 416):
                if not is_last:
                    return place
                raise SluiceError("fetch-refused", f"{place.host} answered {_status(exchange)}.")
            await self._take(exchange)
            self._done = True
            return None
        finally:
            await exchange.close()

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": "Sluice", "Accept": "*/*", "Accept-Encoding": "identity"}
        if self._cursor is not None and self._file is not None and self._file.offset:
            if not self._cursor.validator:
                raise _StartOver
            headers["Range"] = f"bytes={self._file.offset}-"
            headers["If-Range"] = self._cursor.validator
        return headers

    async def _attend(self, exchange: Exchange) -> None:
        """Return when there is something. Raises Cut for silence, or what has ended it."""
        half_s, silent = self._params.idle_s / 2, 0
        while not (exchange.has_news or exchange.over):
            if silent == 2:  # a pause may have ended one of them early, or be one
                raise Cut(f"nothing came for {self._params.idle_s:.0f} s")
            began = monotonic()
            await self._ctx.attend(exchange.news(), half_s)
            silent += monotonic() - began >= half_s * 0.99
        if exchange.over and exchange.error is not None:
            raise exchange.error

    # The answer

    async def _take(self, exchange: Exchange) -> None:
        """Take the body of an answer, if that is what is missing."""
        at = self._file.offset if self._file is not None else 0
        range_ = _range_of(exchange)
        if exchange.status in _AGAIN:
            raise _again(exchange)
        if exchange.status == 416 and at:
            if range_.total != at:
                raise _StartOver
            return
        if exchange.status == 206 and at:
            self._judge(exchange, range_, at)
        elif exchange.status == 200:
            if at:
                await self._start_over()
            await self._begin(exchange)
        else:
            raise SluiceError("fetch-refused", f"{self._host} answered {_status(exchange)}.")
        await self._body(exchange)

    def _judge(self, exchange: Exchange, range_: _Range, at: int) -> None:
        """See whether a part is the one that is missing, of the same version."""
        assert self._cursor is not None
        validator, total = self._cursor.validator, self._cursor.total
        etag = exchange.headers.get("ETag", "")
        if (
            range_.first != at
            or (None not in (range_.total, total) and range_.total != total)
            or (etag and validator.startswith('"') and etag != validator)
        ):
            raise _StartOver
        self._cursor.total = range_.total if total is None else total
        self._cursor.url = exchange.place.url

    async def _begin(self, exchange: Exchange) -> None:
        """Open the artefact for what comes from its start."""
        length = exchange.headers.get("Content-Length")
        chunked = "Transfer-Encoding" in exchange.headers
        total = int(length) if length and length.isdecimal() and not chunked else None
        media_type = _media_type(exchange)
        name = self._params.name or _name(exchange, place_of(self._params.url))
        if self._cursor is None:
            self._cursor = Cursor(exchange.place.url, name, media_type)
        cursor = self._cursor
        cursor.url, cursor.total = exchange.place.url, total
        cursor.validator = _validator(exchange)
        if total is not None:
            self._count(total)
        if self._file is None:
            self._file = await self._open(cursor)
        coding = exchange.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            self._ctx.log(f"{self._host} sends it as {_plain(coding)}; it is stored as it comes")

    async def _body(self, exchange: Exchange) -> None:
        """Write the pieces as they come."""
        file, cursor = self._file, self._cursor
        assert file is not None and cursor is not None
        saved = msgspec.to_builtins(cursor)
        await self._ctx.checkpoint(
            saved,
            done=cursor.wasted + file.offset,
            total=None if cursor.total is None else cursor.wasted + cursor.total,
            phase="fetching",
            message=f"from {exchange.place.host}",
        )
        exchange.go()
        while True:
            await self._attend(exchange)
            piece = exchange.piece
            if piece is None:
                break
            self._count(file.offset + len(piece))
            if cursor.total is not None and file.offset + len(piece) > cursor.total:
                raise _StartOver
            await self._hash(piece, file.offset)
            await file.write(piece)
            exchange.go()
            await self._ctx.checkpoint(saved, done=cursor.wasted + file.offset)
        if cursor.total is not None and file.offset < cursor.total:
            raise Cut("the answer has ended early")

    def _count(self, size_bytes: int) -> None:
        """See that it does not become too large."""
        if size_bytes > self._params.max_bytes:
            raise SluiceError(
                "too-large", f"It is larger than {self._params.max_bytes:,} bytes (max_bytes)."
            )

    # Digests

    async def _hash(self, piece: bytes, at: int) -> None:
        """Hash what comes, if all before it was hashed."""
        if self._hashers and self._hashed == at:
            for one in self._hashers.values():
                one.update(piece)
            self._hashed += len(piece)

    async def _check(self) -> None:
        """Compare the digests, after reading what was stored by an earlier run."""
        assert self._file is not None
        if self._hashers and self._hashed < self._file.offset:
            reader = await self._file.reader()
            try:
                while piece := await reader.read(self._hashed, _READ_BYTES):
                    await self._hash(piece, self._hashed)
                    await self._ctx.checkpoint(message="checking")
            finally:
                await reader.close()
        for name, expected in self._params.expect.items():
            found = self._hashers[name].hexdigest()
            if found != expected.lower():
                raise SluiceError(
                    "digest-mismatch", f"{name} is {found}, expected was {expected.lower()}."
                )


class _Range(msgspec.Struct):
    """What Content-Range says; None is what it doesn't."""

    first: int | None = None
    total: int | None = None


_CONTENT_RANGE = re.compile(
    r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)", re.IGNORECASE
)


def _range_of(exchange: Exchange) -> _Range:
    match = _CONTENT_RANGE.fullmatch(exchange.headers.get("Content-Range", "").strip())
    if match is None:
        return _Range()
    first, last, total = (int(text) if text and text != "*" else None for text in match.groups())
    length = exchange.headers.get("Content-Length")
    if first is not None and last is not None and length and length != str(last - first + 1):
        return _Range()
    return _Range(first, total)


def _again(exchange: Exchange) -> Exception:
    """What follows from an answer that asks to come back later."""
    after_s = _retry_after_s(exchange.headers)
    if after_s is not None and after_s > _ASKED_S:
        detail = f"{exchange.place.host} answered {_status(exchange)}, for {after_s:.0f} s."
        return SluiceError("fetch-failed", detail)
    return Cut(f"it answered {_status(exchange)}", after_s)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _moved(exchange: Exchange) -> Place:
    """Where a redirect leads. Raises SluiceError."""
    host = exchange.place.host
    location = _text(exchange, "Location").strip().replace(" ", "%20")
    try:
        place = place_of(location, exchange.place) if location else None
    except ValueError as error:
        raise SluiceError("fetch-refused", f"{host} redirects to what {error}.") from None
    if place is None or (place.scheme == "http" and exchange.place.scheme == "https"):
        raise SluiceError("fetch-refused", f"{host} redirects to nothing, or to plain http.")
    return place


def _text(exchange: Exchange, name: str) -> str:
    """A header in which some servers write UTF-8 as it is."""
    text = exchange.headers.get(name, "")
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _plain(text: str) -> str:
    """Foreign text, fit for a log."""
    return "".join(c for c in text[:80] if c.isprintable())


def _status(exchange: Exchange) -> str:
    return f"{exchange.status} {_plain(exchange.reason)}".strip()


def _validator(exchange: Exchange) -> str:
    """What says whether a version is still the same (RFC 9110, 13.1.5); nothing if it is weak."""
    headers = exchange.headers
    etag = headers.get("ETag", "").strip()
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) and len(etag) <= _VALIDATOR_CHARS:
        return etag
    modified = headers.get("Last-Modified", "").strip()
    try:
        since = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return ""
    return modified if since.total_seconds() >= 1 else ""


def _media_type(exchange: Exchange) -> str:
    """What the server says that it is; nothing where it says nothing: then the name tells."""
    found = exchange.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    known = re.fullmatch(r"[a-z0-9!#$&^_.+-]{1,100}/[a-z0-9!#$&^_.+-]{1,100}", found)
    return found if known and found != "application/octet-stream" else ""


def _name(exchange: Exchange, asked: Place) -> str:
    """The name that the server gives, else that of the URL."""
    message = Message()
    message["Content-Disposition"] = _text(exchange, "Content-Disposition")
    given = message.get_filename()
    for raw in (given or "", asked.name, exchange.place.name):
        if name := plain_name(raw):
            return name
    return "download"
