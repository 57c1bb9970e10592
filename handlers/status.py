"""Health, readiness, the numbers of now, the catalogue of errors, and the dashboard's page."""

from __future__ import annotations

import gzip
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tornado.web import HTTPError, StaticFileHandler

from errors import CATALOGUE, SluiceError
from handlers.base import SECURITY_HEADERS, BaseHandler, Services, WithOptions

_SLOW_KINDS = 10  # that status names

_PAGE_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'"
)


class HealthHandler(BaseHandler):
    """Whether the loop lives."""

    OPEN = True

    async def get(self) -> None:
        """200 as soon as requests are served."""
        self.reply({"status": "ok"})


class ReadyHandler(BaseHandler):
    """Whether work is taken."""

    OPEN = True

    async def get(self) -> None:
        """200 once recovery is done, 503 before and while stopping."""
        life = self.services.life
        if life.stopping or not life.ready:
            raise SluiceError("stopping" if life.stopping else "starting", retry_after_s=1)
        self.reply({"status": "ready"})


class StatusHandler(BaseHandler):
    """The numbers of now."""

    async def get(self) -> None:
        """What moves, what waits, what is free, and which kinds have held the loop."""
        services = self.services
        slow = services.manager.measures.slow_steps.items()
        worst = sorted(slow, key=lambda found: found[1].worst_s, reverse=True)[:_SLOW_KINDS]
        row = await services.now.row(services, self.caller.owner)
        row["slow_steps"] = [
            {"kind": kind, "n": steps.n, "worst_ms": round(steps.worst_s * 1e3, 1)}
            for kind, steps in worst
        ]
        self.set_header("Cache-Control", "no-store")
        self.reply(row)


class ErrorPageHandler(BaseHandler):
    """What an error's ``type`` points to."""

    async def get(self, code: str) -> None:
        """The row of the catalogue."""
        entry = CATALOGUE.get(code)
        if entry is None:
            raise SluiceError("not-found", "No error has that code.")
        self.reply({"code": code, **entry._asdict()})


_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class _Version(NamedTuple):
    """A file of the dashboard as it is now, in both encodings."""

    changed: tuple[int, int]
    tag: str
    plain: bytes
    packed: bytes


class PageHandler(WithOptions, StaticFileHandler):
    """The dashboard's files, under a strict policy: nothing from another host, nothing inline.

    They are kept in memory, compressed once for each version of a file.
    """

    _versions: ClassVar[dict[str, _Version]] = {}
    _tag = ""

    def set_default_headers(self) -> None:
        """Tornado's hook; also called before an error is written."""
        self.set_header("Server", "Sluice")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)
        self.set_header("Content-Security-Policy", _PAGE_POLICY)

    async def prepare(self) -> None:
        """Refuse a foreign host name."""
        services: Services = self.application.settings["services"]
        try:
            services.hosts.check(self.request)
        except SluiceError as error:
            self.set_status(error.status)
            self.finish(error.detail + "\n")

    async def get(self, path: str, include_body: bool = True) -> None:
        """The file, as gzip for whoever takes that. Ranges of it are not served."""
        self.path = self.parse_url_path(path)
        absolute = self.get_absolute_path(self.root, self.path)
        name = self.validate_absolute_path(self.root, absolute)
        if name is None:  # answered already
            return
        file = self._version(name)
        packed = _takes_gzip(self.request.headers.get("Accept-Encoding", ""))
        self._tag = f'"{file.tag}{"-gz" if packed else ""}"'
        self.set_header("Content-Type", _MEDIA_TYPES.get(Path(name).suffix, "text/plain"))
        self.set_header("Cache-Control", "no-cache")  # revalidated, so a new version shows at once
        self.set_header("Vary", "Accept-Encoding")
        if packed:
            self.set_header("Content-Encoding", "gzip")
        self.write(file.packed if packed else file.plain)

    def compute_etag(self) -> str | None:
        """Tornado's hook: by this it answers 304."""
        return self._tag or None

    def _version(self, name: str) -> _Version:
        found = os.stat(name)
        changed = (found.st_mtime_ns, found.st_size)
        known = self._versions.get(name)
        if known is None or known.changed != changed:
            plain = Path(name).read_bytes()
            tag = sha256(plain).hexdigest()[:16]
            known = _Version(changed, tag, plain, gzip.compress(plain, 9, mtime=0))
            self._versions[name] = known
        return known

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Tornado's hook."""
        self.set_header("Content-Type", "text/plain")
        self.finish(f"{status_code}\n")

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Tornado's hook: a file that is not there is no warning."""
        if not isinstance(value, HTTPError):
            super().log_exception(typ, value, tb)


def _takes_gzip(header: str) -> bool:
    """Whether an Accept-Encoding allows gzip (RFC 9110 section 12.5.3)."""
    weights = {}
    for one in header.lower().replace(" ", "").split(","):
        name, _, weight = one.partition(";")
        weights[name] = weight
    weight = weights.get("gzip", weights.get("*", "q=0"))
    return not re.fullmatch(r"q=0(\.0*)?", weight)
