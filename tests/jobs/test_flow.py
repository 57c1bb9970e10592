"""The checkpoint of a transfer: go on, hold, or stop; and how fast.

The limit is tested on a loop whose time passes only where everybody waits, and then at once: what
would take minutes takes none, and the figures are exact.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from errors import SluiceError
from jobs import flow as flow_module
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


# ---- The limit ----


class Clock(selectors.SelectSelector):
    """A selector that does not wait: the time that it should have waited has passed."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """See selectors."""
        assert timeout is not None, "everybody waits for ever"
        self.now_s += timeout
        return super().select(0)


class ClockLoop(asyncio.SelectorEventLoop):
    """A loop that goes by a Clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._clock = clock

    def time(self) -> float:
        """See asyncio."""
        return self._clock.now_s


Play = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the flows and of ``play``."""
    clock = Clock()
    monkeypatch.setattr(flow_module, "monotonic", lambda: clock.now_s)
    return clock


@pytest.fixture
def play(clock: Clock) -> Iterator[Play]:
    """Runs coroutines by the clock."""
    with asyncio.Runner(loop_factory=lambda: ClockLoop(clock)) as runner:
        yield runner.run


async def pour(flow: Flow, n: int, pace_s: float = 0.0, piece: int | None = None) -> None:
    """Pass ``n`` bytes in pieces as long as the flow wants them, each of which takes a while."""
    while n > 0:
        await flow.checkpoint()
        passed = min(n, piece or flow.next_bytes() or 1 << 20)
        await asyncio.sleep(pace_s)
        flow.spend(passed)
        n -= passed
    await flow.checkpoint()


@pytest.mark.parametrize(
    ("limit", "piece"),
    [
        (1 << 10, 4 << 10),
        (64_000, 6400),
        (2_000_000, 200_000),
        (10**9, 1 << 20),
        (1 << 40, 1 << 20),
    ],
)
def test_pieces_are_small_enough_to_be_smooth(limit: int, piece: int) -> None:
    """A piece is a tenth of a second's worth, but neither tiny nor huge; without a limit any."""
    assert Flow("run", 60, limit).next_bytes() == piece
    assert Flow("run", 60).next_bytes() is None


@pytest.mark.parametrize(
    ("limit", "piece"),
    [
        *((1 << 10, piece) for piece in (None, 999, 1 << 16)),
        *((50_000, piece) for piece in (None, 999, 1 << 16)),
        *((2_000_000, piece) for piece in (None, 1 << 16)),
        *((300_000_000, piece) for piece in (None, 1 << 20)),
    ],
)
def test_a_limit_is_kept_on_average(
    play: Play, clock: Clock, limit: int, piece: int | None
) -> None:
    """Whatever the pieces are, so many bytes take as long as the limit says."""
    begun_s = clock.now_s
    play(pour(Flow("run", 60, limit), 10 * limit, piece=piece))
    assert clock.now_s - begun_s == pytest.approx(10, rel=0.02)


def test_slow_pieces_do_not_count_twice(play: Play, clock: Clock) -> None:
    """The time that the pieces themselves take is a part of what the limit asks for."""
    begun_s = clock.now_s
    play(pour(Flow("run", 60, 1_000_000), 5_000_000, pace_s=0.06))
    assert clock.now_s - begun_s == pytest.approx(5, rel=0.03)


def test_a_hiccup_is_made_up_for_and_a_long_silence_is_not(play: Play, clock: Clock) -> None:
    """What a late wake-up has cost comes back; a sender that was silent may not flood."""

    async def body() -> None:
        flow = Flow("run", 60, 1_000_000)
        for silence_s, lasts_s in ((0.05, 0.95), (60, 0.9)):
            await pour(flow, 1_000_000)
            await asyncio.sleep(silence_s)
            begun_s = clock.now_s
            await pour(flow, 1_000_000)
            assert clock.now_s - begun_s == pytest.approx(lasts_s, abs=0.01)

    play(body())


def test_a_flow_is_not_open_before_the_limit_lets_it(play: Play, clock: Clock) -> None:
    """After a piece the flow is closed for as long as the piece should have taken."""

    async def body() -> None:
        flow = Flow("run", 60, 10_000)
        seen = [flow.open]
        flow.spend(10_000)
        for wait_s in (0, 0.99, 0.02):
            await asyncio.sleep(wait_s)
            seen.append(flow.open)
        assert seen == [True, False, False, True]

    play(body())


def test_waiting_for_the_limit_is_neither_a_pause_nor_a_silence(play: Play, clock: Clock) -> None:
    """A wait that is longer than a pause may be ends well, and no idle clock runs meanwhile."""

    async def body() -> None:
        flow = Flow("run", 0.5, 1 << 10)
        waiting = asyncio.create_task(pour(flow, 1 << 17, piece=1 << 16))
        idle_s = 0.0
        while not waiting.done():
            await asyncio.sleep(0.1)
            idle_s = max(idle_s, clock.now_s - flow.moved_at)
        await waiting
        assert idle_s < 0.2

    begun_s = clock.now_s
    play(body())
    assert clock.now_s - begun_s == pytest.approx(128, rel=0.01)


@pytest.mark.parametrize(
    ("limit", "waits_s"), [(None, 0), (8 << 10, 8), (1 << 30, 0), (1 << 10, 64), (1 << 9, 64)]
)
def test_another_limit_is_in_force_at_once(
    play: Play, clock: Clock, limit: int | None, waits_s: float
) -> None:
    """Who waits goes on as the higher limit would have it, and waits no longer for a lower one."""

    async def body() -> None:
        flow = Flow("run", 60, 1 << 10)
        flow.spend(1 << 16)
        waiting = asyncio.create_task(flow.checkpoint())
        await asyncio.sleep(0)
        flow.limit(limit)
        begun_s = clock.now_s
        await waiting
        assert clock.now_s - begun_s == pytest.approx(waits_s, abs=0.01)
        assert flow.moved_at == clock.now_s
        assert flow.limit_bytes_per_s == limit

    play(body())


def test_a_limit_can_come_later(play: Play, clock: Clock) -> None:
    """What has passed before there was a limit is not waited for."""

    async def body() -> None:
        flow = Flow("run", 60)
        flow.spend(1 << 30)
        flow.limit(1_000_000)
        assert flow.open
        begun_s = clock.now_s
        await pour(flow, 3_000_000)
        assert clock.now_s - begun_s == pytest.approx(3, rel=0.02)

    play(body())


def test_a_pause_in_the_wait_for_the_limit_is_a_pause(play: Play, clock: Clock) -> None:
    """The pause holds at once and as long as it lasts; then the limit's time may be over."""

    async def body() -> None:
        flow = Flow("run", 1000, 1 << 10)
        flow.spend(1 << 16)
        waiting = asyncio.create_task(flow.checkpoint())
        await asyncio.sleep(1)
        flow.signal("pause")
        await asyncio.sleep(100)
        assert not waiting.done()
        flow.signal("run")
        begun_s = clock.now_s
        await waiting
        assert clock.now_s == begun_s

    play(body())


def test_another_limit_does_not_prolong_a_pause(play: Play, clock: Clock) -> None:
    """A paused transfer holds no longer than it may, however often its limit changes."""

    async def body() -> None:
        flow = Flow("pause", 10, 1 << 10)
        waiting = asyncio.create_task(flow.checkpoint())
        for limit in (1 << 11, None, 1 << 12):
            await asyncio.sleep(3)
            flow.limit(limit)
            assert not flow.open
        begun_s = clock.now_s
        with pytest.raises(SluiceError, match="paused-too-long"):
            await waiting
        assert clock.now_s - begun_s == pytest.approx(1)

    play(body())


def test_the_wait_for_the_limit_can_be_ended(play: Play, clock: Clock) -> None:
    """A transfer that is ended while the limit holds it leaves at once, with the reason."""

    async def body() -> None:
        flow = Flow("run", 60, 1 << 10)
        flow.spend(1 << 16)
        waiting = asyncio.create_task(flow.checkpoint())
        await asyncio.sleep(1)
        begun_s = clock.now_s
        flow.end(SluiceError("upload-terminated"))
        with pytest.raises(SluiceError, match="upload-terminated"):
            await waiting
        assert clock.now_s == begun_s

    play(body())
