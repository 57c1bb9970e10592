"""Who is asking, and may they: the one place that answers it.

While no authentication is configured there is one owner, ``local``. ``client`` is only a label by
which a caller finds its own transfers again; it grants nothing.

A web page anywhere can make a visitor's browser send requests to a server on the visitor's own
machine. So a request must name this service by a host name it knows (else a foreign name could be
pointed at 127.0.0.1, "DNS rebinding"), and nothing that changes state is done for another site,
which browsers tell by ``Sec-Fetch-Site`` and ``Origin``. ``Cors`` knows the sites that may.

Behind a proxy the peer is always the proxy, so ``Proxies`` writes into each request what a trusted
one says of it, before anything else looks: all below then reads the request as the client sent it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from errors import SluiceError
from jobs import By
from jobs.files import now_ms

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,4096}")
_CLIENT = re.compile(r"[\x21-\x7e]{0,128}")

# What proxies write. Each pattern takes any text in linear time: clients can send it through them.
_NODE = re.compile(  # an address, and a port that does not matter
    r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::\w+)?|([0-9A-Fa-f:.]+(?:%[\w.-]+)?)", re.ASCII
)
_PAIR = re.compile(  # name=value, name="value" or nothing, and what separates it from the next
    r"[ \t]*+(?:([\w!#$%&'*+.^`|~-]+)=(?:\"((?:[^\"\\]|\\.)*+)\"|([^\s\",;]*+)))?+[ \t]*+([,;]|$)",
    re.ASCII,
)
_HOST = re.compile(r"(?:[A-Za-z0-9._~-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")

# Headers that a page of another site may send, and those of the answer that it may read.
_ASKABLE = (
    *("Authorization", "Content-Type", "Content-Disposition", "Content-Digest", "Repr-Digest"),
    *("Want-Repr-Digest", "Want-Content-Digest", "Idempotency-Key"),
    *("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range"),
    *("Range", "Origin", "Prefer"),
    *("X-Client-Id", "X-Request-Id", "X-Requested-With", "X-HTTP-Method-Override"),
    *("Tus-Resumable", "Upload-Length", "Upload-Offset", "Upload-Defer-Length", "Upload-Metadata"),
    *("Upload-Concat", "Upload-Checksum", "Upload-Complete", "Upload-Incomplete"),
    "Upload-Draft-Interop-Version",
)
_READABLE = (
    *("Location", "Upload-Offset", "Upload-Length", "Upload-Defer-Length", "Upload-Expires"),
    *("Upload-Metadata", "Upload-Concat", "Upload-Complete", "Upload-Limit"),
    *("Upload-Draft-Interop-Version", "Tus-Version", "Tus-Resumable", "Tus-Max-Size"),
    *("Tus-Extension", "Tus-Checksum-Algorithm", "Content-Range", "Content-Disposition"),
    *("Accept-Ranges", "ETag", "Repr-Digest", "Digest", "Retry-After", "X-Request-Id"),
    *("Preference-Applied", "Idempotency-Replayed", "Sluice-Job"),
)
_PREFLIGHT_S = 86400  # how long a browser remembers what it was told; it takes less if it wants


class Caller(NamedTuple):
    """Who a request comes from."""

    owner: str
    client: str

    def by(self, via: str) -> By:
        """The signature under a command."""
        return By(actor=self.client or self.owner, via=via, at=now_ms())


def identify(request: HTTPServerRequest) -> Caller:
    """The caller of a request, by its headers and cookies; never by its address.

    Raises invalid-field for a client label or a token that is none.
    """
    _token(request)  # there is nobody yet whom it could name
    client = request.headers.get("X-Client-Id")
    if client is None:
        cookie = request.cookies.get("client_id")
        client = cookie.value if cookie is not None else ""
    if not _CLIENT.fullmatch(client):
        raise SluiceError(
            "invalid-field", "X-Client-Id: at most 128 printable characters.", field="X-Client-Id"
        )
    return Caller("local", client)


def _token(request: HTTPServerRequest) -> str | None:
    """The token that a page has put among the subprotocols: it can send no other header."""
    for name in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
        kind, dot, token = name.strip().partition(".")
        if kind == "auth" and dot:
            if not _TOKEN.fullmatch(token):
                raise SluiceError(
                    "invalid-field",
                    "auth.<token> takes base64url without padding.",
                    field="Sec-WebSocket-Protocol",
                )
            return token
    return None


class Hosts:
    """The host names that the service answers to."""

    def __init__(self, address: str, extra: tuple[str, ...]) -> None:
        self._names = {"localhost", address.lower(), socket.gethostname().lower()}
        self._names |= {name.lower() for name in extra}

    def check(self, request: HTTPServerRequest) -> None:
        """Raise unknown-host for a name that is not known. An IP address can't be rebound."""
        host = host_of(request.headers.get("Host", ""))
        if host in self._names or host.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise SluiceError(
                "unknown-host", f"This service is not known as {host[:80]!r}."
            ) from None


def host_of(value: str) -> str:
    """The name in a Host header or an origin, without its port, in lower case."""
    try:
        return (urlsplit(f"//{value}").hostname or "").lower()
    except ValueError:
        return ""


def same_origin(request: HTTPServerRequest, origin: str) -> bool:
    """Whether a page of ``origin`` was served by this service."""
    try:
        place = urlsplit(origin).netloc
    except ValueError:
        return False
    return place != "" and place.lower() == request.headers.get("Host", "").lower()


@dataclass(frozen=True)
class Cors:
    """The other sites whose pages may do what our own page may: exact origins, or ``*`` for any.

    With ``*`` a page never gets what needs the visitor's cookies or password.
    """

    origins: tuple[str, ...] = ()

    def allows(self, origin: str) -> bool:
        """Whether a page of that origin may use the service."""
        return origin != "" and ("*" in self.origins or origin in self.origins)

    def grant(self, request: HTTPServerRequest, headers: HTTPHeaders) -> None:
        """Mark an answer, whatever it is: it depends on the Origin, and who may read it."""
        if not self.origins:
            return
        vary = headers.get("Vary", "")
        if not {"*", "origin"} & {name.strip().lower() for name in vary.split(",")}:
            headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
        origin = request.headers.get("Origin", "")
        if not self.allows(origin):
            return
        if "*" in self.origins:
            headers["Access-Control-Allow-Origin"] = "*"
        else:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Credentials"] = "true"
        if not _is_preflight(request):
            headers["Access-Control-Expose-Headers"] = ", ".join(_READABLE)

    def preflight(self, request: HTTPServerRequest, methods: str) -> dict[str, str]:
        """The headers that let an allowed page send its real request; for others there are none."""
        if not (_is_preflight(request) and self.allows(request.headers["Origin"])):
            return {}
        headers = {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": ", ".join(_ASKABLE),
            "Access-Control-Max-Age": str(_PREFLIGHT_S),
        }
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return headers


def _is_preflight(request: HTTPServerRequest) -> bool:
    """Whether a browser asks if it may send what a page of another site wants (Fetch 4.8)."""
    asked = {"Origin", "Access-Control-Request-Method"}
    return request.method == "OPTIONS" and all(name in request.headers for name in asked)


def check_site(request: HTTPServerRequest, cors: Cors) -> None:
    """Raise cross-site for a request that a page has caused whose site may not."""
    site = request.headers.get("Sec-Fetch-Site", "")
    origin = request.headers.get("Origin")
    if origin is not None and cors.allows(origin):
        return
    foreign = origin is not None and not same_origin(request, origin)
    if site == "cross-site" or (foreign and site not in ("same-origin", "none")):
        raise SluiceError("cross-site", "A page of another site may not do this.")


def is_prefetch(request: HTTPServerRequest) -> bool:
    """Whether a browser only guesses that the answer may be wanted."""
    purpose = request.headers.get("Sec-Purpose", "") + request.headers.get("Purpose", "")
    return "prefetch" in purpose.lower()


@dataclass(frozen=True)
class Proxies:
    """The proxies in front that are believed; what anybody else says of a request is not heard."""

    networks: tuple[Network, ...] = ()

    def apply(self, request: HTTPServerRequest) -> None:
        """Set remote_ip, protocol, host and the header Host to what the client saw; never raises.

        A value that is malformed or missing leaves what the proxy itself has sent.
        """
        if not self._trusts(_peer(request)):
            return
        seen: dict[str, str] = {}
        for hop in reversed(_hops(request.headers)):
            seen |= hop  # who stands farther out, and is trusted, knows better
            if not self._trusts(_address(hop.get("for", ""))):
                break
        address = _address(seen.get("for", ""))
        if address is not None:
            request.remote_ip = str(address)
        protocol = seen.get("proto", "").lower()
        if protocol in ("http", "https"):
            request.protocol = protocol
        host = seen.get("host", "")
        if _HOST.fullmatch(host):
            request.host = request.headers["Host"] = host
            request.host_name = host_of(host)

    def prefix(self, request: HTTPServerRequest) -> str:
        """The path under which a trusted proxy shows the service; empty if that is the root."""
        prefix = request.headers.get("X-Forwarded-Prefix", "").removesuffix("/")
        known = _PREFIX.fullmatch(prefix) is not None and self._trusts(_peer(request))
        return prefix if known else ""

    def _trusts(self, address: Address | None) -> bool:
        # Tornado gives 0.0.0.0 to a peer that has no address, which may be in a trusted network.
        if address is None or address.is_unspecified:
            return False
        return any(address in network for network in self.networks)


def _peer(request: HTTPServerRequest) -> Address | None:
    """Who is at the other end of the connection, whatever was said about it."""
    context = getattr(request.connection, "context", None)
    return _address(getattr(context, "remote_ip", None) or "")


def _address(node: str) -> Address | None:
    """An IP address, with or without a port; None for names, "unknown" and all that is none."""
    match = _NODE.fullmatch(node.strip())
    if match is None:
        return None
    try:
        address = ipaddress.ip_address(match[1] or match[2] or match[3])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _hops(headers: HTTPHeaders) -> list[dict[str, str]]:
    """What each proxy wrote (``for``, ``proto``, ``host``), the nearest one last."""
    if "Forwarded" in headers:
        return _forwarded(headers["Forwarded"])
    hops = [{"for": node} for node in headers.get("X-Forwarded-For", "").split(",")]
    # Not every proxy extends these, so of several values only the last one is a proxy's for sure.
    for name, header in (("proto", "X-Forwarded-Proto"), ("host", "X-Forwarded-Host")):
        value = headers.get(header, "").rpartition(",")[2].strip()
        if value:
            hops[-1][name] = value
    return hops


def _forwarded(header: str) -> list[dict[str, str]]:
    """The elements of a Forwarded header (RFC 7239 section 4); none if it is malformed."""
    elements: list[dict[str, str]] = [{}]
    at = 0
    while at < len(header):
        match = _PAIR.match(header, at)
        if match is None:
            return []
        name, quoted, plain, separator = match.groups()
        if name is not None:
            name = name.lower()
            if name in elements[-1]:
                return []
            elements[-1][name] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        if separator == ",":
            elements.append({})
        at = match.end()
    return [element for element in elements if element]
