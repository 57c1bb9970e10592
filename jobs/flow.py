"""The checkpoint of a transfer: go on, hold, or stop.

A transfer is driven by bytes that arrive or leave, so its checkpoint is asked between two pieces.
To pause it is not to ask the socket for more; TCP then holds the peer. To end it is to raise, in
whatever the transfer waits for, the error that its request shall be answered with.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from errors import SluiceError


class Peer(Protocol):
    """The connection of a transfer."""

    def interrupt(self, error: SluiceError) -> None:
        """Raise ``error`` in the pending or next read or write."""
        ...


class Flow:
    """What is wanted of one live transfer, and who holds its connection."""

    def __init__(self, want: str, hold_s: float) -> None:
        self.want = want
        self.peer: Peer | None = None
        self.error: SluiceError | None = None  # why it must end
        self.moved_at = monotonic()  # when bytes last moved, or a pause ended
        self.stalled_at: int | None = None
        self._hold_s = hold_s
        self._gate: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Nothing stands in the way of the next piece."""
        return self.want == "run" and self.error is None

    async def checkpoint(self) -> None:
        """Return when the next piece may pass; raises the error that ends the transfer.

        Holds at most ``hold_s``: a peer that died during a pause can't be noticed, because
        nothing is read. Then paused-too-long; what is stored stays.
        """
        while not self.open:
            if self.error is not None:
                raise self.error
            self._gate = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(self._hold_s):
                    await self._gate
            except TimeoutError:
                raise SluiceError("paused-too-long", retry_after_s=60) from None
            finally:
                self._gate = None
            self.moved_at = monotonic()

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
