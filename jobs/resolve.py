"""Where other servers are, and whether they may be spoken to.

Strategy. A name is looked up by a program of its own (resolve_child.py), because a look-up blocks,
in a thread at best. What it answers is checked here, address by address; the caller gets exactly
what was checked, and connects to that, not to the name. So a name that means another address a
moment later (DNS rebinding) gains nothing.

What is not on the public Internet is refused: this machine, private networks, link-local addresses
(where clouds keep their metadata), multicast, and whatever has one of them inside (IPv4 in IPv6, in
6to4, behind NAT64). IPv6 is refused unless it is known to be public. One such address among many
refuses the name. ``allow`` lists networks and names that are trusted in spite of that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from errors import SluiceError
from jobs.children import Children, Limits
from jobs.kinds import Address

_PROGRAM = Path(__file__).with_name("resolve_child.py")
_TIMEOUT_S = 15.0
_ANSWER_BYTES = 64 << 10
_MOST = 16  # addresses of one name that are used

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Not public (RFC 6890 and its registries), and the one public address that is a cloud's own.
_REFUSED_4 = [
    ipaddress.IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",
    )
]
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_6 = [
    ipaddress.IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")
]
# IPv6 with an IPv4 address inside, and how far from its end.
_CARRIERS = [
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
]

# Ports of services that take a request for something else, as browsers refuse them (Fetch, 2.9).
_REFUSED_PORTS = frozenset(
    {
        *(1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95),
        *(101, 102, 103, 104, 109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161),
        *(179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531, 532, 540, 548, 554, 556, 563),
        *(587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061),
        *(6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080),
    }
)


class Resolver:
    """Finds the addresses of names, and refuses those that are not to be reached."""

    def __init__(
        self,
        children: Children,
        allow: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-I", "-S", str(_PROGRAM)),
    ) -> None:
        self._children = children
        self._program = list(program)
        self._networks: list[Network] = []
        self._names: set[str] = set()
        for place in allow:
            try:
                self._networks.append(ipaddress.ip_network(place))
            except ValueError:
                self._names.add(place.lower())

    async def resolve(self, host: str, port: int) -> list[Address]:
        """The addresses of a name, or of an address in digits, all of them checked.

        Raises address-refused, fetch-failed. May be cancelled.
        """
        if port in _REFUSED_PORTS or not 0 < port < 1 << 16:
            raise SluiceError("address-refused", f"Nothing is fetched from port {port}.")
        try:
            found: Sequence[str] = [str(ipaddress.ip_address(host))]
        except ValueError:
            found = await self._look_up(host)
        ips = [ipaddress.ip_address(text) for text in dict.fromkeys(found)][:_MOST]
        if host.lower().rstrip(".") not in self._names:
            for ip in ips:
                self._check(ip, host)
        return [_address(ip, port) for ip in ips]

    def _check(self, ip: Ip, host: str) -> None:
        inner = _inner(ip)
        if any(ip in network or inner in network for network in self._networks):
            return
        if not is_public(ip):
            raise SluiceError(
                "address-refused", f"{host} is at an address that is not public, or reserved."
            )

    async def _look_up(self, host: str) -> Sequence[str]:
        """Ask the program."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = json.loads(await self._ask(host))
        except TimeoutError:
            raise SluiceError("fetch-failed", f"No name server has answered for {host}.") from None
        except ValueError:
            answer = {}
        found: list[str] = answer.get("addresses", [])
        if not found:
            raise SluiceError("fetch-failed", f"{host} has no address.")
        return found

    async def _ask(self, host: str) -> bytes:
        """All that the program says."""
        loop = asyncio.get_running_loop()
        out, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        said = bytearray()
        over = loop.create_future()

        def hear() -> None:
            with suppress(BlockingIOError):
                data = os.read(out, _ANSWER_BYTES)
                said.extend(data)
                if (not data or len(said) > _ANSWER_BYTES) and not over.done():
                    loop.remove_reader(out)
                    over.set_result(None)

        try:
            child = await self._children.start(
                [*self._program, host],
                cwd=Path("/"),
                fds={1: theirs},
                limits=Limits(cpu_s=10, nice=0),
            )
        except BaseException:
            os.close(out)
            raise
        finally:
            os.close(theirs)
        loop.add_reader(out, hear)
        try:
            await over
        finally:
            loop.remove_reader(out)
            os.close(out)
            child.signal("KILL")
        return bytes(said)


def is_public(ip: Ip) -> bool:
    """Whether an address is one of the public Internet, and has no other one inside."""
    inner = _inner(ip)
    if isinstance(inner, ipaddress.IPv4Address):
        return not any(inner in network for network in _REFUSED_4)
    return inner in _PUBLIC_6 and not any(inner in network for network in _REFUSED_6)


def _inner(ip: Ip) -> Ip:
    """The IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(ip, ipaddress.IPv6Address):
        for network, shift in _CARRIERS:
            if ip in network:
                return ipaddress.IPv4Address((int(ip) >> shift) & 0xFFFFFFFF)
    return ip


def _address(ip: Ip, port: int) -> Address:
    if isinstance(ip, ipaddress.IPv4Address):
        return Address(socket.AF_INET, (str(ip), port))
    return Address(socket.AF_INET6, (str(ip), port, 0, 0))
