"""Does the channel tell everything? Follows it for a while, and compares with the log.

    python -m jobs.verify http://localhost:8888 --for 60

A subscriber like any other, over the network: it keeps the rules of ``jobs/replica.py``, comes back
when it is cut, and reads what a reset has jumped over from the jobs' histories. At the end it reads
the log from where it began to where it came to, by long-poll, and says which transitions of the log
it was not told of, and which it was told twice. A program of its own: it may wait as it likes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from statistics import median, quantiles
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlencode, urlsplit

import websocket

from jobs.channel import Cursor
from jobs.replica import Replica

_PROTOCOL = "jobs.v1.json"
_TELL = 20  # transitions that are named
_TURN_S = 0.5
_PAGE = 500
_RETRY_S = 0.5, 10.0


class Unreachable(Exception):
    """The service did not answer."""


class Verifier:
    """One subscriber, and what it has seen."""

    def __init__(self, url: str, select: dict[str, list[str] | str]) -> None:
        at = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        if at.scheme not in ("http", "https") or not at.hostname:
            raise ValueError(f"{url!r} is no address of a service")
        self._secure = at.scheme == "https"
        self._place = at.netloc
        self._path = at.path.rstrip("/")
        self._select = select
        self.replica = Replica(select={k: v for k, v in select.items() if v})
        self.cuts = 0
        self.lags_ms: list[float] = []
        self.begin: Cursor | None = None  # the log is compared from here on
        self._jumped = False  # a snapshot has taken the place of some transitions

    # Following

    def follow(self, for_s: float) -> None:
        """Subscribe, say when that has begun, and follow until the time is over.

        Raises Unreachable if it never began.
        """
        end = monotonic() + for_s
        tries, follows = 0, False
        while monotonic() < end:
            heard = False
            try:
                for _ in self._connection(end):
                    heard, tries = True, 0
                    if self.replica.ready and not follows:
                        follows = True
                        print("verify: following the jobs", file=sys.stderr, flush=True)
            except (OSError, websocket.WebSocketException) as error:
                if self.begin is None and tries >= 3:
                    raise Unreachable(str(error)) from error
            self.replica.cut()
            if monotonic() >= end:
                return
            self.cuts += heard
            tries += 1
            least, most = _RETRY_S
            sleep(min(max(0.0, end - monotonic()), random.uniform(0, min(most, least * 2**tries))))

    def _connection(self, end: float) -> Iterator[None]:
        """One connection, until it ends; yields whenever it was heard of."""
        socket = websocket.create_connection(
            f"{'wss' if self._secure else 'ws'}://{self._place}{self._path}/v1/ws",
            subprotocols=[_PROTOCOL],
            suppress_origin=True,
            timeout=10,
        )
        try:
            socket.send(json.dumps([{"t": "hello", "ver": 1}, self.replica.ask()]))
            socket.settimeout(_TURN_S)
            while monotonic() < end:
                try:
                    text = socket.recv()
                except websocket.WebSocketTimeoutException:
                    continue
                if not text:
                    return
                said = json.loads(text)
                for message in said if isinstance(said, list) else [said]:
                    for answer in self._hear(message):
                        socket.send(json.dumps(answer))
                yield
        finally:
            socket.shutdown()  # type: ignore[no-untyped-call]

    def _hear(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        was_ready = self.replica.ready
        answers = self.replica.hear(message)
        if message["t"] == "ev":
            lag = datetime.now(UTC) - datetime.fromisoformat(message["at"])
            self.lags_ms.append(lag.total_seconds() * 1000)
        cursor = self.replica.cursor
        if message["t"] == "snap" and message["page"] == 1 and cursor is not None:
            if not was_ready or (self.begin and self.begin.epoch != cursor.epoch):
                # What came before a first whole snapshot, or of another log, can't be compared.
                self.begin = cursor
                self.replica.seen.clear()
            else:
                self._jumped = True
        if message["t"] == "snap" and message["last"] and was_ready:
            self._fill()
        return answers

    def _fill(self) -> None:
        """Read what a snapshot has jumped over."""
        for gap in self.replica.gaps():
            after = gap.after
            while after < gap.upto:
                path = f"/v1/jobs/{gap.job}/events?{urlencode({'after': after, 'limit': _PAGE})}"
                events = self._get(path).get("items", [])
                for event in events:
                    if event["version"] <= gap.upto:
                        self.replica.fill(gap.job, event["version"])
                if not events:
                    break
                after = events[-1]["version"]

    # Comparing

    def compare(self) -> tuple[list[tuple[str, int]], int]:
        """What the log has and this subscriber was not told, and how much there is in all."""
        cursor = self.begin
        if cursor is None or self.replica.cursor is None:
            raise Unreachable("no snapshot came")
        end = self.replica.cursor.seq
        missed, n = [], 0
        filters = [
            ({"jobs": "job"}.get(name, name), value)
            for name, values in self._select.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        while cursor.seq < end:
            query = urlencode([*filters, ("after", str(cursor)), ("limit", _PAGE)])
            page = self._get(f"/v1/events?{query}")
            if page["reset"] is not None:
                raise Unreachable(f"the log can't be read any more: {page['reset']}")
            following = Cursor.parse(page["cursor"])
            assert following is not None
            for event in page["events"]:
                if event["seq"] <= end:
                    n += 1
                    if event["version"] not in self.replica.seen.get(event["job"], ()):
                        missed.append((event["job"], event["version"]))
            if following.seq <= cursor.seq:
                break
            cursor = following
        if self._jumped:  # what was deleted meanwhile can't be looked up any more, nor be shown
            gone = {job for job in {job for job, _ in missed} if not self._get(f"/v1/jobs/{job}")}
            missed = [one for one in missed if one[0] not in gone]
        return missed, n

    def _get(self, path: str) -> Any:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._place, timeout=30)
        try:
            connection.request("GET", self._path + path, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(str(error)) from error
        finally:
            connection.close()
        if answer.status == 404:
            return {}
        if answer.status != 200:
            raise Unreachable(f"{path}: {answer.status}")
        return body


def _verify(verifier: Verifier, for_s: float) -> int:
    began = monotonic()
    try:
        verifier.follow(for_s)
    except KeyboardInterrupt:
        verifier.replica.cut()
    took_s = monotonic() - began
    missed, n = verifier.compare()
    replica = verifier.replica
    repeated = replica.repeated
    lags = verifier.lags_ms
    print(
        f"{n} transitions of {len(replica.seen)} jobs in {took_s:.0f} s,"
        f" {verifier.cuts} reconnects, {len(replica.resets)} resets"
    )
    if len(lags) > 1:
        p99 = quantiles(lags, n=100)[98]
        print(f"from the commit to here: p50 {median(lags):.0f} ms, p99 {p99:.0f} ms")
    for what, which in (("missed", missed), ("repeated", repeated)):
        for job, version in which[:_TELL]:
            print(f"{what}: job {job}, version {version}")
        if len(which) > _TELL:
            print(f"{what}: and {len(which) - _TELL} more")
    print(f"{len(missed)} missed, {len(repeated)} repeated")
    return 1 if missed or repeated else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 if nothing was missed or repeated, 1 if so, 2 if it can't tell."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.verify", description=__doc__.split("\n")[0]
    )
    parser.add_argument("url", help="address of the service, such as http://localhost:8888")
    parser.add_argument("--for", dest="for_s", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--kind", action="append", default=[])
    parser.add_argument("--state", action="append", default=[])
    parser.add_argument("--job", action="append", default=[])
    parser.add_argument("--q", default="", metavar="TEXT")
    options = parser.parse_args(argv)
    select = {
        "kind": options.kind,
        "state": options.state,
        "jobs": options.job,
        "q": options.q,
    }
    try:
        verifier = Verifier(options.url, {k: v for k, v in select.items() if v})
        return _verify(verifier, options.for_s)
    except (Unreachable, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
