"""What all handlers share: who asks, JSON in and out, errors as problem+json, bodies.

Every request goes the same way: ``prepare`` checks where it comes from, ``admit`` (a handler's own)
refuses what can be refused before the body, then the verb runs. Handlers with ``STREAMS`` pull a
POST, PUT or PATCH body from ``self.body`` inside the verb; the others get a small one whole, by
``self.json``. An error raised anywhere becomes one answer, also in the middle of a body. Around all
of that is ``Door``: before it what a proxy says is applied, behind it each answer is marked for the
pages of other sites.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.web import (
    Application,
    HTTPError,
    OutputTransform,
    RequestHandler,
    stream_request_body,
)

from errors import SluiceError
from handlers.auth import Caller, Cors, Hosts, Proxies, check_site, identify
from handlers.feed import Feeds
from handlers.now import Now
from handlers.wire import Body, block_body, read_body_by, turns
from jobs.children import Children
from jobs.commands import Commands, following
from jobs.downloads import Downloads
from jobs.events import Hub
from jobs.files import Files, uuid7
from jobs.growing import Growing
from jobs.kinds import invalid
from jobs.manager import Following, Manager
from jobs.states import STATES
from jobs.uploads import ClientGone, Uploads

log = logging.getLogger("sluice.http")

T = TypeVar("T")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
_SAFE = ("GET", "HEAD", "OPTIONS")
_OVERRIDES = ("PATCH", "DELETE", "HEAD")  # what a POST may stand for
_LIMIT, _MOST = 50, 500  # items on a page
_TEXT_CHARS = 200  # of a search
_DISCARD_BYTES = 64 << 10  # a refused body so short is read, and the connection is kept

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Settings:
    """The numbers and names of the configuration that handlers need."""

    max_json_bytes: int
    chunk_bytes: int
    write_idle_s: float
    terminate_recent_s: float
    default_kind: str
    default_params: dict[str, Any]
    max_sockets: int
    slots: int
    body_idle_s: float
    delete_completed: str  # "allow" or "refuse"
    informational: bool  # 104 is sent to those who can take it


@dataclass
class Life:
    """Where the service is in its life."""

    ready: bool = False
    stopping: bool = False


@dataclass(frozen=True)
class Services:
    """The domain, as handlers find it."""

    manager: Manager
    children: Children
    uploads: Uploads
    downloads: Downloads
    files: Files
    growing: Growing
    hub: Hub
    feeds: Feeds
    commands: Commands
    now: Now
    hosts: Hosts
    cors: Cors
    proxies: Proxies
    life: Life
    settings: Settings


class Door(Application):
    """What every request passes before its handler is found, and every answer on its way out."""

    def __init__(self, routes: list[Any], services: Services, **settings: Any) -> None:
        super().__init__(routes, services=services, **settings)
        self._proxies = services.proxies
        self.add_transform(_granting(services.cors))

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Tornado's hook."""
        self._proxies.apply(request)
        return super().find_handler(request, **kwargs)


def _granting(cors: Cors) -> type[OutputTransform]:
    class Granting(OutputTransform):
        """Marks an answer when its headers leave, so that no handler and no error can forget it."""

        def __init__(self, request: HTTPServerRequest) -> None:
            self._request = request

        def transform_first_chunk(
            self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
        ) -> tuple[int, HTTPHeaders, bytes]:
            cors.grant(self._request, headers)
            return status_code, headers, chunk

    return Granting


class WithOptions(RequestHandler):
    """Answers OPTIONS: which methods there are; to a preflight, also what a page may send."""

    def allowed(self) -> list[str]:
        """The methods that this handler has."""
        names = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        return [
            name
            for name in names
            if getattr(type(self), name.lower()) is not getattr(RequestHandler, name.lower())
        ]

    async def options(self, *args: str, **kwargs: str) -> None:
        """Say what may be asked here. A dialect that has more to say calls this first."""
        services: Services = self.application.settings["services"]
        methods = ", ".join(self.allowed())
        self.set_status(204)
        self.set_header("Allow", methods)
        for name, value in services.cors.preflight(self.request, methods).items():
            self.set_header(name, value)


@stream_request_body
class BaseHandler(WithOptions):
    """The root of all handlers."""

    STREAMS = False  # the verb pulls the body
    OPEN = False  # answers before recovery is done, to anyone
    CHANGES = False  # GET changes state, too
    OVERRIDES = False  # POST may stand for another method, for clients that have no other

    caller: Caller
    body: Body
    request_id: str = ""
    gone: Callable[[], None] | None = None  # to be called when the client has gone

    def initialize(self) -> None:
        """Find the services."""
        self.services: Services = self.application.settings["services"]
        self._collected: list[bytes] = []
        self._served = False
        self._done = False
        self._is_head_by_post = False
        self._serving: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    def set_default_headers(self) -> None:
        """Tornado's hook; also called before an error is written."""
        self.set_header("Server", "Sluice")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)

    # The way of a request

    async def prepare(self) -> None:
        """Check the request; a refusal is answered here, before any 100-continue."""
        given = self.request.headers.get("X-Request-Id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid7()
        self.set_header("X-Request-Id", self.request_id)
        self.body = Body(self.connection, self._body_length())
        try:
            self._override()
            self._check()
            self._check_whole()
            self.connection.set_max_body_size(self._max_body_bytes())
            if self.method_streams:
                await turns.next()  # many may come at once
                await self.admit()
                self._hook()
            else:
                self.connection.set_body_timeout(self.services.settings.body_idle_s)
        except Exception as error:
            if self.body.unread:
                await self._refuse(error)
            else:
                self._postpone(error)

    def _postpone(self, error: Exception) -> None:
        """Let the verb raise: Tornado closes a connection whose request is answered before it."""

        async def refuse(*_: str, **__: str) -> None:
            raise error

        setattr(self, (self.request.method or "").lower(), refuse)

    async def admit(self) -> None:
        """Refuse a body before it is read, if the request already shows why."""

    @property
    def method_streams(self) -> bool:
        """Whether the verb of this request pulls the body."""
        return self.STREAMS and self.request.method not in _SAFE

    def _override(self) -> None:
        """Let the request be what X-HTTP-Method-Override says, for all that follows."""
        method = self.request.headers.get("X-HTTP-Method-Override")
        if not self.OVERRIDES or self.request.method != "POST" or method is None:
            return
        if method not in _OVERRIDES:
            raise SluiceError(
                "invalid-field",
                f"A POST can't stand for {method[:20]!r}, only for {', '.join(_OVERRIDES)}.",
                field="X-HTTP-Method-Override",
            )
        if method not in self.allowed():
            raise SluiceError("method-not-allowed")
        self.request.method = method
        self._is_head_by_post = method == "HEAD"

    def _check(self) -> None:
        if self.OPEN:
            return
        self.services.hosts.check(self.request)
        if self.request.method == "OPTIONS":
            return  # told to anyone, at any time
        changes = self.CHANGES or self.request.method not in _SAFE
        if changes:
            check_site(self.request, self.services.cors)
        self.caller = identify(self.request)
        life = self.services.life
        if not life.ready:
            raise SluiceError("starting", retry_after_s=1)
        if life.stopping and changes:
            raise SluiceError("stopping", retry_after_s=5)
        length, limit = self.body.length, self.services.settings.max_json_bytes
        if not self.method_streams and length is not None and length > limit:
            if not changes:
                raise SluiceError("body-unexpected", "GET takes no body; send it by POST.")
            raise SluiceError("body-too-long", f"The body has more than {limit:,} bytes.")

    def _check_whole(self) -> None:
        """A part must never be stored as if it were the whole (RFC 9110 section 14.5)."""
        if self.request.method == "PUT" and "Content-Range" in self.request.headers:
            raise SluiceError(
                "invalid-field",
                "PUT takes whole files; a part of one is appended by PATCH.",
                field="Content-Range",
            )

    def _body_length(self) -> int | None:
        """The announced length; Tornado itself refuses what is malformed, afterwards."""
        if "Transfer-Encoding" in self.request.headers:
            return None
        length = self.request.headers.get("Content-Length", "0").split(",")[0].strip()
        return int(length) if length.isascii() and length.isdigit() else 0

    def _max_body_bytes(self) -> int:
        if self.method_streams:
            return 1 << 62
        return max(self.services.settings.max_json_bytes, _DISCARD_BYTES)

    @property
    def connection(self) -> HTTP1Connection:
        """The connection, as it serves this one request."""
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection)
        return connection

    # Bodies that the verb pulls

    def _hook(self) -> None:
        """Let the verb run while the body arrives; afterwards Tornado finds it done."""
        if self.body.length == 0:
            return
        self.body.bound(self.services.settings.body_idle_s)
        name = (self.request.method or "").lower()
        self._verb: Callable[..., Awaitable[None]] = getattr(self, name)

        async def read_fixed_body(length: int, delegate: Any) -> None:
            self.body.length = self.body.left = length
            await self._serve()

        setattr(self, name, self._conclude)
        if self.body.length is not None:
            read_body_by(self.connection, read_fixed_body)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Tornado's hook: a chunked body, or a short one that is collected."""
        if not self.method_streams:
            self._collected.append(chunk)
            return None
        if self._serving is None:
            self._serving = asyncio.get_running_loop().create_task(self._serve_fed())
        return self.body.feed(chunk)

    async def _serve(self) -> None:
        """Run the verb on a body that is pulled from the stream."""
        self._served = True
        try:
            await self._verb(*self.path_args, **self.path_kwargs)
        except ClientGone:
            raise StreamClosedError from None
        except Exception as error:
            if self.body.unread:
                await self._refuse(error)
                raise StreamClosedError from None  # else the rest were the next request
            self._failure = error
        self.body.let_go()
        self.body.bound(self.services.settings.body_idle_s)
        try:
            async for _ in self.body:  # what the verb did not care for
                pass
        except (ClientGone, SluiceError):
            self.connection.stream.close()
            raise StreamClosedError from None

    async def _serve_fed(self) -> None:
        """Run the verb on a body that Tornado reads."""
        self._served = True
        try:
            await self._verb(*self.path_args, **self.path_kwargs)
        except ClientGone:
            return
        except Exception as error:
            if self.body.unread:
                await self._refuse(error)
            else:
                self._failure = error
        self.body.discard()

    async def _conclude(self, *args: str, **kwargs: str) -> None:
        """What Tornado calls as the verb once the body has been read."""
        if self.body.unread:
            self.body.feed_end()
        if self._serving is not None:
            await self._serving
        elif not self._served:  # a chunked body without a chunk
            await self._verb(*args, **kwargs)
        if self._failure is not None:
            raise self._failure

    async def _refuse(self, error: Exception) -> None:
        """Answer before the body was read, so that the client sees it; then close."""
        block_body(self.connection, fed=self._serving is not None)
        if isinstance(error, ClientGone) or self.connection.stream.closed():
            return
        self._log_failure(error)
        body = self._problem(_refusal(error))
        self.set_header("Connection", "close")
        self.set_header("Content-Length", str(len(body)))
        self.write(body)
        try:
            await self.flush()
        except StreamClosedError:
            return
        await self.body.drain()
        if not self._done:
            self.finish()

    def on_finish(self) -> None:
        """Tornado's hook: the answer is complete."""
        self._done = True
        body = getattr(self, "body", None)
        if body is not None:
            body.closed()

    def on_connection_close(self) -> None:
        """Tornado's hook: the client has gone."""
        body = getattr(self, "body", None)
        if body is not None:
            body.closed()
        if self.gone is not None:
            self.gone()
        super().on_connection_close()

    def compute_etag(self) -> str | None:
        """Tornado's hook: a validator is set where there is one, never made from the body."""
        return None

    # In and out

    def query(self, *known: str, drop_slash: bool = False) -> dict[str, str]:
        """The query's parameters. With ``known``, others are refused; so is one given twice.

        ``drop_slash`` drops one slash at the end of the query.
        """
        text = self.request.query
        if drop_slash and text.endswith("/"):
            text = text[:-1]
        return _parameters(text, (), known)[1]

    def following(self, text: str | bytes | None) -> Following | None:
        """The start that shall follow an upload, checked, if one is given (docs/queue.md)."""
        return None if text is None else following(self.services.manager, text)

    def filters(
        self, repeated: Iterable[str], *known: str
    ) -> tuple[dict[str, list[str]], dict[str, str]]:
        """A list's filters, which may be repeated, and the other parameters, as ``query`` has them.

        Raises invalid-field, also for a ``state`` that is none.
        """
        filters, values = _parameters(self.request.query, repeated, known)
        check_states(filters.get("state", ()))
        return filters, values

    def paging(self, values: dict[str, str]) -> tuple[int, int | None]:
        """``limit`` (50, at most 500) and ``after`` (a key) of a list. Raises invalid-field."""
        numbers = {}
        for name in ("limit", "after"):
            text = values.get(name, "")
            if name in values and not (text.isascii() and text.isdigit() and len(text) <= 18):
                raise SluiceError("invalid-field", f"{name} must be a whole number.", field=name)
            numbers[name] = int(text) if text else None
        limit = _LIMIT if numbers["limit"] is None else numbers["limit"]
        if not 1 <= limit <= _MOST:
            raise SluiceError("invalid-field", f"limit must be 1 to {_MOST}.", field="limit")
        return limit, numbers["after"]

    def decimal(self, values: dict[str, str], name: str, low: float, high: float) -> float | None:
        """A parameter that is a number. Raises invalid-field."""
        if name not in values:
            return None
        try:
            number = float(values[name])
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise SluiceError("invalid-field", f"{name} is {low:g} to {high:g}.", field=name)
        return number

    def flag(self, values: dict[str, str], name: str) -> bool:
        """A parameter that is 0 (as if it were not there) or 1. Raises invalid-field."""
        value = values.get(name, "0")
        if value not in ("0", "1"):
            raise SluiceError("invalid-field", f"{name} can only be 0 or 1.", field=name)
        return value == "1"

    def json(self, type: type[T]) -> T:
        """The body as a typed value. Raises invalid-json, invalid-field (with its name)."""
        try:
            return msgspec.json.decode(b"".join(self._collected), type=type)
        except msgspec.ValidationError as error:
            raise invalid(error) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SluiceError("invalid-json", f"The body is no JSON: {error}.") from error

    @property
    def has_body(self) -> bool:
        """Whether the request brought a body."""
        return bool(self._collected) or self.body.length != 0

    @property
    def prefix(self) -> str:
        """The path under which a proxy shows the service; normally empty."""
        return self.services.proxies.prefix(self.request)

    def location(self, path: str) -> str:
        """An absolute path of ours, as the client has to ask for it."""
        return self.prefix + path

    def flush(self, include_footers: bool = False) -> asyncio.Future[None]:
        """Tornado's hook: HEAD has no body, but who sent a POST would wait for one."""
        if self._is_head_by_post and self.get_status() not in (204, 304):
            self.set_header("Content-Length", "0")
        return super().flush(include_footers)

    def reply(self, value: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.write(msgspec.json.encode(value) + b"\n")

    # Errors

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Tornado's hook: every error is problem+json."""
        info = kwargs.get("exc_info")
        error = info[1] if info else None
        refusal = _refusal(error) if isinstance(error, Exception) else None
        self.finish(self._problem(refusal or SluiceError("internal", status=status_code)))

    def _problem(self, error: SluiceError) -> bytes:
        """Forget what was to be answered; status, headers and body of the problem instead."""
        self.clear()
        self.request_id = self.request_id or uuid7()
        self.set_header("X-Request-Id", self.request_id)
        self.set_status(error.status)
        self.set_header("Content-Type", "application/problem+json")
        self.set_header("Cache-Control", "no-store")
        if error.retry_after_s is not None:
            self.set_header("Retry-After", str(max(1, round(error.retry_after_s))))
        if error.code == "method-not-allowed":
            self.set_header("Allow", ", ".join(self.allowed()))
        if error.code == "range-not-satisfiable":
            self.set_header("Content-Range", f"bytes */{error.extra['bytes']}")
        return msgspec.json.encode(error.problem(self.request_id)) + b"\n"

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Tornado's hook: only what is our fault is logged with its trace."""
        if isinstance(value, Exception):
            self._log_failure(value)

    def _log_failure(self, error: Exception) -> None:
        refusal = _refusal(error)
        if refusal.code == "internal":
            log.error("request %s failed", self.request_id, exc_info=error)
        else:
            log.debug("request %s: %s", self.request_id, refusal)


def check_states(names: Iterable[str]) -> None:
    """Raise invalid-field for a state that is none."""
    for name in names:
        if name not in STATES:
            raise SluiceError("invalid-field", f"{name[:40]!r} is no state.", field="state")


def check_text(text: str | None) -> str | None:
    """What a list is searched for, if it is; an empty text is none. Raises invalid-field."""
    if text is not None and len(text) > _TEXT_CHARS:
        raise SluiceError("invalid-field", f"q has at most {_TEXT_CHARS} characters.", field="q")
    return text or None


def _parameters(
    query: str, repeated: Iterable[str], known: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The parameters of a query that may be repeated, and the others.

    Raises bad-request, or invalid-field for one that is not known, or given twice.
    """
    lists: dict[str, list[str]] = {name: [] for name in repeated}
    values: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        raise SluiceError("bad-request", "The query is no valid UTF-8 or too long.") from error
    for name, value in pairs:
        if name in lists:
            lists[name].append(value)
        elif name in values:
            raise SluiceError("invalid-field", f"{name} is given twice.", field=name)
        elif known and name not in known:
            raise SluiceError("invalid-field", f"{name[:80]} is not known here.", field=name)
        else:
            values[name] = value
    return lists, values


def _refusal(error: Exception) -> SluiceError:
    """Any error as a row of the catalogue."""
    if isinstance(error, SluiceError):
        return error
    if isinstance(error, HTTPError):
        codes = {404: "not-found", 405: "method-not-allowed", 400: "bad-request"}
        return SluiceError(codes.get(error.status_code, "internal"))
    return SluiceError("internal")


class NotFoundHandler(BaseHandler):
    """Answers what no route matches."""

    def _check(self) -> None:
        self.services.hosts.check(self.request)
        raise SluiceError("not-found", f"Nothing is at {self.request.path[:200]}.")
