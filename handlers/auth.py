"""Who is asking, and may they: the one place that answers it.

While no authentication is configured there is one owner, ``local``. ``client`` is only a label by
which a caller finds its own transfers again; it grants nothing.

A web page anywhere can make a visitor's browser send requests to a server on the visitor's own
machine. So a request must name this service by a host name it knows (else a foreign name could be
pointed at 127.0.0.1, "DNS rebinding"), and nothing that changes state is done for another site,
which browsers tell by ``Sec-Fetch-Site`` and ``Origin``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from tornado.httputil import HTTPServerRequest

from errors import SluiceError
from jobs import By
from jobs.files import now_ms

_CLIENT = re.compile(r"[\x21-\x7e]{0,128}")


class Caller(NamedTuple):
    """Who a request comes from."""

    owner: str
    client: str

    def by(self, via: str) -> By:
        """The signature under a command."""
        return By(actor=self.client or self.owner, via=via, at=now_ms())


def identify(request: HTTPServerRequest) -> Caller:
    """The caller of a request. Raises invalid-field for a client label that is none."""
    client = request.headers.get("X-Client-Id")
    if client is None:
        cookie = request.cookies.get("client_id")
        client = cookie.value if cookie is not None else ""
    if not _CLIENT.fullmatch(client):
        raise SluiceError(
            "invalid-field", "X-Client-Id: at most 128 printable characters.", field="X-Client-Id"
        )
    return Caller("local", client)


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


def check_site(request: HTTPServerRequest) -> None:
    """Raise cross-site for a request that another site's page has caused."""
    site = request.headers.get("Sec-Fetch-Site", "")
    origin = request.headers.get("Origin")
    foreign = origin is not None and not same_origin(request, origin)
    if site == "cross-site" or (foreign and site not in ("same-origin", "none")):
        raise SluiceError("cross-site", "A page of another site may not do this.")


def is_prefetch(request: HTTPServerRequest) -> bool:
    """Whether a browser only guesses that the answer may be wanted."""
    purpose = request.headers.get("Sec-Purpose", "") + request.headers.get("Purpose", "")
    return "prefetch" in purpose.lower()
