"""The checkpoint of a transfer: go on, hold, or stop."""

from __future__ import annotations

import asyncio

import pytest

from errors import SluiceError
from jobs.flow import Flow


class Socket:
    """A peer that remembers what it was interrupted with."""

    def __init__(self) -> None:
        self.errors: list[SluiceError] = []

    def interrupt(self, error: SluiceError) -> None:
        """See Peer."""
        self.errors.append(error)


async def test_open_flow_passes_without_waiting() -> None:
    """Nothing wanted: the checkpoint returns before the loop turns."""
    flow = Flow("run", 60)
    turned: list[bool] = []
    asyncio.get_running_loop().call_soon(turned.append, True)
    await flow.checkpoint()
    assert flow.open
    assert turned == []
    await asyncio.sleep(0)


async def test_pause_holds_until_resume() -> None:
    """A paused transfer stands at the checkpoint; the resume lets it on, its idle clock afresh."""
    flow = Flow("pause", 60)
    waiting = asyncio.create_task(flow.checkpoint())
    await asyncio.sleep(0)
    flow.signal("pause")  # once more changes nothing
    await asyncio.sleep(0)
    assert not waiting.done()
    flow.moved_at = 0.0
    flow.signal("run")
    await waiting
    assert flow.moved_at > 0


async def test_end_wakes_who_holds() -> None:
    """A transfer that is ended while it is paused leaves at once, with the reason."""
    flow, peer = Flow("pause", 60), Socket()
    flow.peer = peer
    waiting = asyncio.create_task(flow.checkpoint())
    await asyncio.sleep(0)
    reason = SluiceError("upload-terminated")
    flow.end(reason)
    with pytest.raises(SluiceError) as caught:
        await waiting
    assert caught.value is reason
    assert peer.errors == [reason]


async def test_first_reason_to_end_wins() -> None:
    """A second reason does not replace the one that the client is answered with."""
    flow, peer = Flow("run", 60), Socket()
    flow.peer = peer
    flow.end(SluiceError("upload-terminated"))
    flow.end(SluiceError("stopping"))
    flow.signal("run")
    with pytest.raises(SluiceError, match="upload-terminated"):
        await flow.checkpoint()
    assert [error.code for error in peer.errors] == ["upload-terminated"] * 2
    assert not flow.open


async def test_pause_does_not_hold_forever() -> None:
    """A peer that may have died meanwhile is let go after a while, and told to come back."""
    flow = Flow("pause", 0.02)
    with pytest.raises(SluiceError) as caught:
        await flow.checkpoint()
    assert caught.value.code == "paused-too-long"
    assert caught.value.retry_after_s is not None


async def test_request_that_goes_while_it_holds_leaves_nothing() -> None:
    """A cancelled waiter is forgotten: the next checkpoint and the next signal work as ever."""
    flow = Flow("pause", 60)
    waiting = asyncio.create_task(flow.checkpoint())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    flow.signal("run")
    await flow.checkpoint()
