"""The checkpoint of a transfer: go on, hold, or stop; and how fast.

A transfer is driven by bytes that arrive or leave, so its checkpoint is asked between two pieces.
To pause it is not to ask the socket for more; TCP then holds the peer. To end it is to raise, in
whatever the transfer waits for, the error that its request shall be answered with.

A limit is kept by waiting *after* a piece for as long as it should have taken; the piece itself
may be of any length. So one number is all there is to remember: when the next piece may pass. Where
that is past, the transfer was too slow for its limit, and it may make up for a moment of it.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from errors import SluiceError

_PIECES_PER_S = 10  # so many pieces make a limited transfer smooth
_LEAST_BYTES, _MOST_BYTES = 4 << 10, 1 << 20  # in a piece
_BURST_S, _BURST_BYTES = 0.1, 16 << 10  # what may be made up for: the larger of both


class Peer(Protocol):
    """The connection of a transfer."""

    def interrupt(self, error: SluiceError) -> None:
        """Raise ``error`` in the pending or next read or write."""
        ...


class Flow:
    """What is wanted of one live transfer, how fast it may be, and who holds its connection."""

    def __init__(self, want: str, hold_s: float, limit_bytes_per_s: int | None = None) -> None:
        self.want = want
        self.limit_bytes_per_s = limit_bytes_per_s
        self.peer: Peer | None = None
        self.error: SluiceError | None = None  # why it must end
        # When bytes last moved, or a pause ended; while the limit holds the transfer, when that
        # ends. A clock that measures a silent peer from here never counts our own waiting.
        self.moved_at = monotonic()
        self.stalled_at: int | None = None
        self._free_at = self.moved_at  # when the limit lets the next piece pass
        self._hold_s = hold_s
        self._gate: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Nothing stands in the way of the next piece."""
        return (
            self.want == "run"
            and self.error is None
            and (self.limit_bytes_per_s is None or self._free_at <= monotonic())
        )

    def next_bytes(self) -> int | None:
        """How long the next piece may be so that the limit is kept smoothly; None: any length.

        0 while no piece may pass.
        """
        if not self.open:
            return 0
        if self.limit_bytes_per_s is None:
            return None
        return min(max(self.limit_bytes_per_s // _PIECES_PER_S, _LEAST_BYTES), _MOST_BYTES)

    async def checkpoint(self) -> None:
        """Return when the next piece may pass; raises the error that ends the transfer.

        A pause holds at most ``hold_s``: a peer that died meanwhile can't be noticed, because
        nothing is read. Then paused-too-long; what is stored stays. The limit holds for as long
        as it takes.
        """
        while not self.open:
            if self.error is not None:
                raise self.error
            paused = self.want != "run"
            wait_s = self._hold_s if paused else self._free_at - monotonic()
            if not paused:
                self.moved_at = self._free_at
            self._gate = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(wait_s):
                    await self._gate
            except TimeoutError:
                if paused:
                    raise SluiceError("paused-too-long", retry_after_s=60) from None
            finally:
                self._gate = None
            self.moved_at = monotonic()

    def spend(self, n: int) -> None:
        """``n`` bytes have passed; the next piece waits until they are within the limit."""
        now = self.moved_at = monotonic()
        if self.limit_bytes_per_s is not None:
            burst_s = max(_BURST_S, _BURST_BYTES / self.limit_bytes_per_s)
            self._free_at = max(self._free_at, now - burst_s) + n / self.limit_bytes_per_s

    def limit(self, limit_bytes_per_s: int | None) -> None:
        """Let no more than that pass from now on (None: no limit), also for who waits already.

        What has passed is waited for at the faster of both rates.
        """
        before, self.limit_bytes_per_s = self.limit_bytes_per_s, limit_bytes_per_s
        now = monotonic()
        wait_s = max(0.0, self._free_at - now)
        if before is None or limit_bytes_per_s is None:
            wait_s = 0.0
        elif limit_bytes_per_s > before:
            wait_s *= before / limit_bytes_per_s
        self._free_at = now + wait_s
        if self.want == "run":  # a pause is held no longer for it
            self._wake()

    def signal(self, want: str) -> None:
        """``want`` is run or pause now; a transfer that holds looks at it at once."""
        self.want = want
        self.moved_at = monotonic()
        self._wake()

    def end(self, error: SluiceError) -> None:
        """Stop the transfer, wherever it waits."""
        if self.error is None:
            self.error = error
        self._wake()
        if self.peer is not None:
            self.peer.interrupt(self.error)

    def _wake(self) -> None:
        if self._gate is not None and not self._gate.done():
            self._gate.set_result(None)
