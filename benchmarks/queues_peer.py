"""One end of a peer of benchmarks/queues.py; runs in the peers' own virtual environment.

    python queues_peer.py QUEUE work SOCKET WIDTH FIRST N
    python queues_peer.py QUEUE submit SOCKET WIDTH FIRST N

Both ends first make ``FIRST`` jobs, so that connections and scripts are there, then ``N`` that
count; ``WIDTH`` of them are under way at once. The submitter waits for a line on its input between
the two lots, and prints when it began the second. The worker prints ``ready``, and when it had
finished each lot, to the result in Redis. Times are those of the monotonic clock, which is the same
for all processes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from time import perf_counter
from typing import Any, NamedTuple

import arq
import arq.connections
import redis
import redis.asyncio
import rq
import saq
import saq.queue.redis
import uvloop

_LOT = 1000  # jobs that RQ's client sends together


class Order(NamedTuple):
    """What is asked for."""

    role: str
    socket: str
    width: int
    first: int
    n: int


def tell(what: object) -> None:
    """A line for the one who started this."""
    print(what, flush=True)


class Count:
    """Counts the jobs that have ended; tells when a lot has, and ends the process after both."""

    def __init__(self, order: Order) -> None:
        self._left = order.first + order.n
        self._n = order.n

    def __call__(self) -> None:
        self._left -= 1
        if self._left in (0, self._n):
            tell(perf_counter())
        if self._left == 0:
            os._exit(0)  # what the worker would tidy up is not measured


async def nothing(*_: Any, **__: Any) -> None:
    """The job of arq and SAQ."""


async def submit(one: Callable[[], Awaitable[Any]], order: Order) -> None:
    """Submit both lots."""
    await _submit(one, order.first, order.width)
    sys.stdin.readline()
    tell(perf_counter())
    await _submit(one, order.n, order.width)


async def _submit(one: Callable[[], Awaitable[Any]], n: int, width: int) -> None:
    left = iter(range(n))

    async def work() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(work() for _ in range(width)))


async def use_arq(order: Order) -> None:
    """The shortest delay between polls, and nothing logged."""
    pool = await arq.create_pool(arq.connections.RedisSettings(unix_socket_path=order.socket))
    if order.role == "submit":
        await submit(lambda: pool.enqueue_job("nothing"), order)
        return
    count = Count(order)

    async def ended(_: Any) -> None:
        count()

    worker = arq.Worker(
        [nothing],
        redis_pool=pool,
        max_jobs=order.width,
        poll_delay=0.002,
        after_job_end=ended,
        log_results=False,
        handle_signals=False,
    )
    tell("ready")
    await worker.async_run()


async def use_saq(order: Order) -> None:
    """As many operations at once as there are jobs."""
    queue = saq.queue.redis.RedisQueue(
        redis.asyncio.Redis(unix_socket_path=order.socket), max_concurrent_ops=2 * order.width
    )
    await queue.connect()
    if order.role == "submit":
        await submit(lambda: queue.enqueue("nothing"), order)
        return
    count = Count(order)

    async def ended(_: Any) -> None:
        count()

    worker = saq.Worker(queue, [nothing], concurrency=order.width, after_process=ended)
    tell("ready")
    await worker.start()


def use_rq(order: Order) -> None:
    """Lots in one pipeline, and a worker that does not fork for each job."""
    connection = redis.Redis(unix_socket_path=order.socket)
    queue = rq.Queue(connection=connection)
    if order.role == "submit":
        for lot in (order.first, order.n):
            if lot == order.n:
                sys.stdin.readline()
                tell(perf_counter())
            for at in range(0, lot, _LOT):
                many = min(_LOT, lot - at)
                queue.enqueue_many([rq.Queue.prepare_data("time.time") for _ in range(many)])
        return
    count = Count(order)

    class Counting(rq.SimpleWorker):  # type: ignore[misc]
        """Counts after each job."""

        def execute_job(self, *args: Any, **options: Any) -> None:
            """Run a job and count it."""
            super().execute_job(*args, **options)
            count()

    tell("ready")
    Counting([queue], connection=connection).work(logging_level="ERROR")


def main(name: str, role: str, socket: str, *numbers: str) -> None:
    """Run one end."""
    order = Order(role, socket, *map(int, numbers))
    if name == "rq":
        use_rq(order)
        return
    ends: dict[str, Callable[[Order], Coroutine[Any, Any, None]]] = {"arq": use_arq, "saq": use_saq}
    uvloop.run(ends[name](order))


if __name__ == "__main__":
    main(*sys.argv[1:])
