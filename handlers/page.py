"""The dashboard as it is sent: few and small answers, made of the plain files of ``static/``.

Strategy. The files are what is written, read and changed; nothing is built beforehand. A script
comes together with the modules that it imports, each as a function that returns its exports, in the
order in which they need each other; scripts and styles lose comments and blanks. No name changes,
so a browser's tools show what the files say. What a worker runs stays a module of its own. All is
made in memory, compressed, and made anew when one of the files has changed.
"""

from __future__ import annotations

import gzip
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import rcssmin
import rjsmin
from tornado.web import HTTPError, StaticFileHandler

from errors import SluiceError
from handlers.base import SECURITY_HEADERS, Services, WithOptions

_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'"
)
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_START = "main.js"
_WORKER = "socket.js"
_IMPORT = re.compile(r'^import \{ (.+) \} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:const|class|function|async function) (\w+))", re.MULTILINE)


def modules(start: Path) -> list[Path]:
    """A module and all that it imports, after what each of them needs; but not the worker's."""
    found: list[Path] = []

    def visit(path: Path) -> None:
        if path in found or path.name == _WORKER:
            return
        for _, other in _IMPORT.findall(path.read_text("utf-8")):
            visit(path.with_name(other))
        found.append(path)

    visit(start)
    return found


def together(start: Path) -> str:
    """The script of a module and all that it imports; ValueError if one is written otherwise."""
    paths = modules(start)
    names = {path.name: f"${i}" for i, path in enumerate(paths)}
    outside: dict[str, str] = {}
    parts = []

    def taken(imported: str, other: str) -> str:
        if other in names:
            return f"const {{ {imported} }} = {names[other]};\n"
        outside[other] = imported
        return ""

    for path in paths:
        text = _IMPORT.sub(lambda found: taken(found[1], found[2]), path.read_text("utf-8"))
        exports = ", ".join(name for _, name in _EXPORT.findall(text))
        text = _EXPORT.sub(r"\1", text)
        if wrong := re.search(r"^(import|export)\b.*", text, re.MULTILINE):
            raise ValueError(f"{path.name}: {wrong[0]}")
        body = f"{text}\nreturn {{ {exports} }};"
        parts.append(f"const {names[path.name]} = (() => {{\n{body}\n}})();\n")
    heads = (f'import {{ {imported} }} from "./{other}";\n' for other, imported in outside.items())
    return "".join([*heads, *parts])


def _sent(path: Path) -> bytes:
    if path.suffix == ".js":
        text = together(path) if path.name == _START else path.read_text("utf-8")
        return str(rjsmin.jsmin(text)).encode()
    if path.suffix == ".css":
        return str(rcssmin.cssmin(path.read_text("utf-8"))).encode()
    return path.read_bytes()


def _stamps(paths: list[Path]) -> list[tuple[int, int]]:
    found = [os.stat(path) for path in paths]
    return [(one.st_mtime_ns, one.st_size) for one in found]


class _Version(NamedTuple):
    """A file of the dashboard as it is now, in both encodings."""

    parts: list[Path]  # the files that it is made of
    changed: list[tuple[int, int]]  # their times and sizes
    tag: str
    plain: bytes
    packed: bytes


def warm(folder: Path) -> None:
    """Make all answers, which takes longer than a step of the loop may."""
    for path in folder.iterdir():
        PageHandler.version(path)


class PageHandler(WithOptions, StaticFileHandler):
    """The dashboard's files, under a strict policy: nothing from another host, nothing inline."""

    _versions: ClassVar[dict[Path, _Version]] = {}
    _tag = ""

    def set_default_headers(self) -> None:
        """Tornado's hook; also called before an error is written."""
        self.set_header("Server", "Sluice")
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)
        self.set_header("Content-Security-Policy", _POLICY)

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
        file = self.version(Path(name))
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

    @classmethod
    def version(cls, path: Path) -> _Version:
        """A file as it is sent now."""
        known = cls._versions.get(path)
        if known is None or known.changed != _stamps(known.parts):
            parts = modules(path) if path.name == _START else [path]
            changed = _stamps(parts)  # before they are read: what changes meanwhile is seen next
            plain = _sent(path)
            tag = sha256(plain).hexdigest()[:16]
            known = _Version(parts, changed, tag, plain, gzip.compress(plain, 9, mtime=0))
            cls._versions[path] = known
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
