"""The live channel in all the trouble there is, against what REST says.

A hypothesis state machine drives a real server, and a subscriber with several filters that is cut
at any byte, reads little or nothing, changes doors, loses messages, sleeps longer than the log
remembers, and comes back to a server that was killed or has another log. After all that its rows
must be those that REST lists, and it must know of every transition.

Each rule that this rests on is also taken away, on either side, and a fixed script shows that it is
missed. The test does that, in a subclass or in tests/serve.py; the product has no switch for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from jobs.channel import Cursor
from jobs.replica import Gap, Message, Replica
from tests.chaos.channel_client import Door, Subscriber, list_all
from tests.conftest import Serve
from tests.harness import FULL, Server

KEEP_EVENTS = 100
FORGOTTEN = KEEP_EVENTS * 6 // 5  # so many events, and all before them are beyond the retention
LIMIT_S = 120.0
NAMES = ("alpha", "beta", "Alphabet", "gamma")
ALL, ACTIVE, KIND, NAMED, SOME = range(1, 6)
FILTERS: dict[int, dict[str, Any]] = {
    ALL: {},
    ACTIVE: {"state": ["running", "paused"]},
    KIND: {"kind": ["count"]},
    NAMED: {"q": "ALPHA"},
    SOME: {"jobs": ["none"]},
}

which = st.integers(0, 15)
amounts = st.sampled_from([1, 300, 2000, 5000, 12_000, 50_000])


class Differs(AssertionError):
    """A replica is not what the server says."""


class ChannelMachine(RuleBasedStateMachine):
    """What may happen to jobs, to the server, and between it and a subscriber."""

    def __init__(self, server: Server, replica: type[Replica] = Replica) -> None:
        super().__init__()
        self.server = server
        self.replica = replica
        self.jobs: list[str] = []
        self.renamed = 0

    @initialize()
    def begin(self) -> None:
        """An empty log, and subscribers to it."""
        if self.newest().seq > 0:
            self.another_log()
        self.subscribe(FILTERS)
        self.start_some(5, False, "alpha")

    def subscribe(self, filters: dict[int, dict[str, Any]]) -> None:
        """Follow these, on a subscription each."""
        self.subscriber = Subscriber(
            self.server, [self.replica(id, select) for id, select in filters.items()]
        )
        self.check()  # so that the replica of everything has seen all from the beginning

    @property
    def everything(self) -> Replica:
        """The replica that must know of every transition."""
        return self.subscriber.replicas[ALL]

    # Jobs

    @rule(n=st.integers(1, 4), quick=st.booleans(), name=st.sampled_from(NAMES))
    def start_some(self, n: int, quick: bool, name: str) -> None:
        """So many jobs."""
        for _ in range(n):
            self.start(quick, name)

    def start(self, quick: bool, name: str) -> None:
        """A job that soon ends, or one that stays."""
        params = {"steps": 3, "delay_s": 0.01} if quick else {"steps": 2, "delay_s": 3600}
        body = {"kind": "count", "name": name, "params": params}
        answer = self.server.post("/v1/jobs", body)
        assert answer.status == 201, answer
        self.jobs.append(answer.json["id"])

    @rule(at=which, verb=st.sampled_from(["pause", "resume", "cancel", "retry"]))
    def command(self, at: int, verb: str) -> None:
        """To a job in any state; what it can't do is refused."""
        if self.jobs:
            answer = self.server.post(f"/v1/jobs/{self.pick(at)}/{verb}")
            assert answer.status in (200, 201, 202, 404, 409), answer
            if answer.status == 201:
                self.jobs.append(answer.json["id"])

    @rule(at=which, name=st.sampled_from(NAMES))
    def rename(self, at: int, name: str) -> None:
        """Into a filter, out of it, or neither."""
        if self.jobs:
            self.renamed += 1
            body = {"name": f"{name} {self.renamed}"}
            answer = self.server.request("PATCH", f"/v1/jobs/{self.pick(at)}", body)
            assert answer.status == 200, answer

    @rule(at=which)
    def delete(self, at: int) -> None:
        """End a job, and forget it."""
        if self.jobs:
            job = self.pick(at)
            self.server.post(f"/v1/jobs/{job}/cancel")
            self.server.wait_for(job, "cancelled", "succeeded", "failed", within_s=LIMIT_S)
            assert self.server.delete(f"/v1/jobs/{job}").status == 204
            self.jobs.remove(job)

    @rule(n=st.sampled_from([20, FORGOTTEN]))
    def burst(self, n: int) -> None:
        """Many events while the subscriber does not read."""
        if not self.jobs:
            self.start(False, "alpha")
        for i in range(n):
            self.rename(i // 4, NAMES[i % len(NAMES)])

    def pick(self, at: int) -> str:
        """One of the jobs."""
        return self.jobs[at % len(self.jobs)]

    # The subscriber

    @rule(n_bytes=amounts)
    def read(self, n_bytes: int) -> None:
        """Some of what is there."""
        self.subscriber.read(n_bytes, 0.05)

    @rule()
    def hang_up(self) -> None:
        """It is away until it reads again."""
        self.subscriber.cut()

    @rule(n_bytes=amounts)
    def cut(self, n_bytes: int) -> None:
        """Each connection ends once so many more bytes were read, be it within a frame."""
        self.subscriber.read(1)  # connects
        self.subscriber.cut_after(n_bytes)
        for _ in range(5):
            self.subscriber.read(wait_s=0.02)

    @rule(door=st.sampled_from(["ws", "sse", "poll"]))
    def go_to(self, door: Door) -> None:
        """Go on at another door with the same cursors."""
        self.subscriber.go_to(door)

    @rule(id=st.sampled_from([ALL, ACTIVE, KIND, NAMED]))
    def drop(self, id: int) -> None:
        """The next event or mark of a replica gets lost on the way."""
        self.subscriber.dropping.add(id)

    @rule(at=which)
    def follow(self, at: int) -> None:
        """Ask for some jobs by their ids."""
        if self.jobs:
            ids = list(dict.fromkeys(self.pick(at + i) for i in range(5)))
            self.subscriber.replace(self.replica(SOME, {"jobs": ids}))

    # The server

    @rule(empty=st.sampled_from([False, False, True]))
    def restart(self, empty: bool) -> None:
        """The server dies, and comes back, perhaps without its data."""
        if empty:
            self.another_log()
            self.start_some(4, False, "alpha")
        else:
            self.kill()

    def kill(self) -> None:
        """kill -9, and again."""
        self.server.kill()
        self.server.start()

    def another_log(self) -> None:
        """The server comes back with nothing, under the same address."""
        self.server.kill()
        shutil.rmtree(self.server.folder)
        self.server.start()
        self.jobs.clear()

    # What always holds

    @rule()
    def check(self) -> None:
        """Once it has read to the end, the subscriber knows all that the server knows."""
        end_s = time.monotonic() + LIMIT_S
        replicas = self.subscriber.replicas.values()
        while True:
            newest = self.newest()
            self.drain(newest, end_s)
            truths = [list_all(self.server, replica.select)[0] for replica in replicas]
            histories = {row["id"]: self.history(row["id"]) for row in truths[0]}
            if self.newest() == newest:
                break
            assert time.monotonic() < end_s, "the log does not come to rest"
        for replica, rows in zip(replicas, truths, strict=True):
            for gap in replica.gaps():
                self.fill(replica, gap)
            same(replica.rows.values(), rows, f"rows of {replica.select}")
            if replica.repeated:
                raise Differs(f"{replica.select} has seen twice: {replica.repeated}")
            if replica.cursor != newest:
                raise Differs(f"{replica.select} is at {replica.cursor}, the log at {newest}")
        for job, versions in histories.items():
            if self.everything.seen.get(job) != versions:
                raise Differs(f"{job}: {self.everything.seen.get(job)}, but it was {versions}")

    def newest(self) -> Cursor:
        """Where the log stands."""
        cursor = Cursor.parse(self.server.get("/v1/jobs?limit=1").json["cursor"])
        assert cursor is not None
        return cursor

    def drain(self, newest: Cursor, end_s: float) -> None:
        """Read until all replicas have come that far, or another event is needed for that."""
        subscriber = self.subscriber
        while any(subscriber.stands_at(id) < newest.seq for id in subscriber.replicas):
            subscriber.read(wait_s=1)
            if subscriber.has_dropped:
                subscriber.has_dropped = False
                # A hole is seen by what comes behind it. A heartbeat would do, in 15 s.
                self.start(True, "beta")
                return
            places = {id: subscriber.stands_at(id) for id in subscriber.replicas}
            assert time.monotonic() < end_s, f"{newest} was not reached: {places}"

    def history(self, job: str, after: int = 0) -> set[int]:
        """The versions of a job behind one of them."""
        found: set[int] = set()
        following: str | None = str(after)
        while following is not None:
            answer = self.server.get(f"/v1/jobs/{job}/events?limit=500&after={following}").json
            found |= {event["version"] for event in answer["items"]}
            following = answer["next"]
        return found

    def fill(self, replica: Replica, gap: Gap) -> None:
        """Read what a replica has missed from the job's history."""
        for version in self.history(gap.job, gap.after):
            if version <= gap.upto:
                replica.fill(gap.job, version)

    def teardown(self) -> None:
        """Every run ends with a check."""
        if hasattr(self, "subscriber"):
            try:
                self.check()
            finally:
                self.subscriber.cut()


def same(mine: Any, theirs: Any, what: str) -> None:
    """Raise Differs if two sets of rows are not the same."""
    known, true = (
        {row["id"]: (row["version"], row["state"], row["name"]) for row in rows}
        for rows in (mine, theirs)
    )
    if known != true:
        ids = known.keys() | true.keys()
        wrong = {id: (known.get(id), true.get(id)) for id in ids if known.get(id) != true.get(id)}
        raise Differs(f"{what}, as known and as they are: {wrong}")


@pytest.mark.chaos
def test_a_subscriber_misses_nothing_whatever_happens(serve: Serve) -> None:
    """Rows and transitions are complete after cuts, kills, lost messages, and long absences."""
    server = serve("--keep-events", str(KEEP_EVENTS))
    run_state_machine_as_test(
        lambda: ChannelMachine(server),  # type: ignore[arg-type]
        settings=settings(
            max_examples=18 if FULL else 2,
            stateful_step_count=40 if FULL else 20,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # each run takes seconds, and no two are quite alike
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Scripts of the same rules: each leads to a check that can't be passed without one rule.

Script = Callable[[ChannelMachine], None]


def lose_a_deletion(machine: ChannelMachine) -> None:
    """The last event of a job gets lost on the way."""
    machine.start(quick=False, name="beta")
    machine.command(0, "cancel")
    machine.server.wait_for(machine.jobs[0], "cancelled", within_s=LIMIT_S)
    machine.check()
    machine.drop(ALL)
    machine.delete(0)
    machine.check()
    assert not machine.subscriber.dropping


def miss_a_deletion(machine: ChannelMachine) -> None:
    """A job is deleted while the subscriber is away, and the log forgets it."""
    machine.start(quick=False, name="beta")
    machine.check()
    machine.hang_up()
    machine.delete(0)
    machine.burst(FORGOTTEN)
    machine.check()
    assert "retention" in machine.everything.resets


def miss_transitions(machine: ChannelMachine) -> None:
    """A job goes through many transitions while the subscriber is away."""
    machine.start(quick=False, name="beta")
    machine.check()
    machine.hang_up()
    machine.burst(FORGOTTEN)
    machine.check()
    assert "retention" in machine.everything.resets


def come_back_to_another_log(machine: ChannelMachine) -> None:
    """The numbers that a cursor follows have been given again."""
    machine.start(quick=False, name="beta")
    machine.check()
    machine.another_log()
    machine.burst(20)
    assert machine.everything.cursor is not None
    assert machine.everything.cursor.seq < machine.newest().seq < KEEP_EVENTS
    machine.check()
    assert machine.everything.resets == ["epoch"]


def come_back_too_late(machine: ChannelMachine) -> None:
    """The log has forgotten a deletion, and the server has not kept it either."""
    machine.start(quick=False, name="beta")
    machine.check()
    machine.hang_up()
    machine.delete(0)
    machine.burst(FORGOTTEN)
    machine.kill()
    machine.check()
    assert machine.everything.resets == ["retention"]


def read_too_slowly(machine: ChannelMachine) -> None:
    """The log forgets what a subscriber has been promised, because it does not read."""
    machine.start(quick=False, name="beta")
    machine.start(quick=False, name="alpha")
    machine.check()
    machine.hang_up()
    machine.burst(20)
    machine.delete(0)
    machine.burst(60)
    machine.kill()
    machine.read(1)  # connects
    machine.read(500)
    machine.burst(FORGOTTEN)
    machine.check()
    assert machine.everything.resets == ["retention"]


def leave_a_filter(machine: ChannelMachine) -> None:
    """A job that was shown ends."""
    machine.start(quick=False, name="beta")
    machine.check()
    machine.command(0, "cancel")
    machine.check()


def lose_an_event_within_a_snapshot(machine: ChannelMachine) -> None:
    """A gap is found when some pages of a snapshot have come and others have not."""
    for _ in range(14):
        machine.start(quick=False, name="alpha")
    machine.check()
    machine.subscriber.replace(machine.replica(NAMED, FILTERS[NAMED]))
    while machine.subscriber.replicas[NAMED].cursor is None:  # the first page has not come
        machine.read(200)
    machine.drop(NAMED)
    machine.rename(0, "alpha")
    machine.rename(1, "alpha")
    machine.check()


class Trusting(Replica):
    """Takes whatever comes."""

    def follows(self, message: Message) -> bool:
        """Never a gap."""
        return True


class Hoarding(Replica):
    """Keeps the rows that a snapshot does not have."""

    def end(self) -> None:
        """Nothing is gone."""
        kept = dict(self.rows)
        super().end()
        self.rows |= kept


class Careless(Replica):
    """Does not ask what a reset has jumped over."""

    def gaps(self) -> list[Gap]:
        """None."""
        return []


def play(script: Script, server: Server, replica: type[Replica] = Replica) -> None:
    """One script from its beginning to its last check."""
    machine = ChannelMachine(server, replica)
    machine.subscribe({id: FILTERS[id] for id in (ALL, ACTIVE)})
    try:
        script(machine)
    finally:
        machine.subscriber.cut()
        server.kill()


SCRIPTS: list[tuple[Script, type[Replica] | None, str | None]] = [
    (lose_a_deletion, Trusting, None),
    (miss_a_deletion, Hoarding, None),
    (miss_transitions, Careless, None),
    (come_back_to_another_log, None, "epoch"),
    (come_back_too_late, None, "retention"),
    (read_too_slowly, None, "retention"),
    (leave_a_filter, None, "filter"),
]


@pytest.mark.chaos
@pytest.mark.parametrize(("script", "replica", "mutant"), SCRIPTS)
def test_without_one_rule_it_would_be_noticed(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    replica: type[Replica] | None,
    mutant: str | None,
) -> None:
    """A script comes to its end with all rules, and differs without one of either side."""
    options = ("--keep-events", str(KEEP_EVENTS))
    play(script, serve(*options))
    if mutant is not None:
        monkeypatch.setattr(Server, "env", {"MUTANT": mutant})
    with pytest.raises(Differs):
        play(script, serve(*options, name="mutant"), replica or Replica)


@pytest.mark.chaos
def test_half_a_snapshot_is_no_ground_to_go_on_from(serve: Serve) -> None:
    """A gap between the pages of a snapshot makes the subscriber begin anew; no row is missing."""
    play(lose_an_event_within_a_snapshot, serve())
