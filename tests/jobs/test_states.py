"""The state machine: every cell by hand, every race by chance, and the checker checked itself.

A *stimulus* is an input with what matters about it: ``fail+retry``, ``resume+ahead``, ``deadline2``
(the third time that the clock of an intermediate state runs out). An *outcome* is one word:
``paused/202`` answers a command, ``paused`` follows an internal event, ``paused*`` says that an
event is logged although the state stays, ``job-finished`` is a refusal with 409, and ``.`` means
that the event came too late and is ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from errors import SluiceError
from jobs import states
from jobs.states import COMMANDS, FINAL, STATES, Decision, Effect, Facts, Input, Row
from storage import By, Event, Job, Result, Stale, Transfer, Undo

NOW: Final = 1_800_000_000_000
AHEAD: Final = NOW + 3_600_000
ERROR: Final = {"code": "kind-failed"}
JOURNAL: Final = (Undo(name="drop_table", args={"table": "t"}),)
SUBJECTS: Final[dict[str, Transfer | None]] = {
    "process": None,
    "resumable": Transfer(protocol="tus", resumable=True),
    "fragile": Transfer(protocol="multipart", resumable=False),
}

ANSWERS_TO_A_PROCESS: Final = """
            pause           resume          resume+ahead    resume+blocked
scheduled   paused/200      scheduled/200   scheduled/200   scheduled/200
queued      paused/200      queued/200      queued/200      queued/200
running     pausing/202     running/200     running/200     running/200
pausing     pausing/202     running/200     running/200     running/200
paused      paused/200      queued/202      scheduled/202   scheduled/202
cancelling  job-cancelling  job-cancelling  job-cancelling  job-cancelling
succeeded   job-finished    job-finished    job-finished    job-finished
failed      job-finished    job-finished    job-finished    job-finished
cancelled   job-finished    job-finished    job-finished    job-finished
"""

CANCELS_OF_A_PROCESS: Final = """
            cancel          cancel+undo     cancel+force     cancel+undo+force
scheduled   cancelled/200   cancelling/202  cancelled/200    cancelling/202
queued      cancelled/200   cancelling/202  cancelled/200    cancelling/202
running     cancelling/202  cancelling/202  cancelling/202   cancelling/202
pausing     cancelling/202  cancelling/202  cancelling/202   cancelling/202
paused      cancelling/202  cancelling/202  cancelling/202   cancelling/202
cancelling  cancelling/202  cancelling/202  cancelling*/202  cancelling*/202
succeeded   job-finished    job-finished    job-finished     job-finished
failed      job-finished    job-finished    job-finished     job-finished
cancelled   cancelled/200   cancelled/200   cancelled/200    cancelled/200
"""

# A transfer is never scheduled or queued.
ANSWERS_TO_A_TRANSFER: Final = """
            pause           resume          resume+ahead    cancel          cancel+force
running     pausing/202     running/200     running/200     cancelling/202  cancelling/202
pausing     pausing/202     running/200     running/200     cancelling/202  cancelling/202
paused      paused/200      running/200     running/200     cancelling/202  cancelling/202
cancelling  job-cancelling  job-cancelling  job-cancelling  cancelling/202  cancelling*/202
succeeded   job-finished    job-finished    job-finished    job-finished    job-finished
failed      job-finished    job-finished    job-finished    job-finished    job-finished
cancelled   job-finished    job-finished    job-finished    cancelled/200   cancelled/200
"""

EVENTS_OF_A_PROCESS: Final = """
                      scheduled   queued   running     pausing     paused     cancelling
due                   queued      .        .           .           .          .
due+blocked           .           .        .           .           .          .
retry_at              queued      .        .           .           .          .
retry_at+blocked      .           .        .           .           .          .
after                 .           .        .           .           .          .
after+blocked         queued      .        .           .           paused*    .
after+blocked+ahead   scheduled*  .        .           .           paused*    .
after+blocked+broken  cancelled   .        .           .           cancelled  .
claim                 .           running  .           .           .          .
finish                .           .        succeeded   succeeded   .          cancelling
fail                  .           .        failed      failed      .          cancelling
fail+retry            .           .        scheduled   paused      .          cancelling
fail+undo             .           .        cancelling  cancelling  .          cancelling
fail+retry+undo       .           .        scheduled   paused      .          cancelling
unwound               .           .        queued      paused      .          cancelling
crash                 .           .        queued      paused      .          cancelling*
crash+undo            .           .        queued      paused      .          cancelling*
crash+loop            .           .        failed      paused      .          cancelling*
crash+loop+undo       .           .        cancelling  paused      .          cancelling*
shutdown              .           .        queued      paused      .          .
deadline0             .           .        .           pausing*    .          cancelling*
deadline1             .           .        .           pausing*    .          cancelling*
deadline2             .           .        .           paused      .          cancelled
deadline2+error       .           .        .           paused      .          failed
expire                .           .        .           .           .          .
undone                .           .        .           .           .          cancelled
undone+error          .           .        .           .           .          failed
"""

EVENTS_OF_A_RESUMABLE_TRANSFER: Final = """
                 running     pausing     paused     cancelling
due              .           .           .          .
retry_at         .           .           .          .
after            .           .           .          .
claim            .           .           .          .
finish           succeeded   succeeded   .          cancelling
fail             failed      failed      failed     cancelling
fail+retry       failed      failed      failed     cancelling
fail+undo        cancelling  cancelling  failed     cancelling
fail+retry+undo  cancelling  cancelling  failed     cancelling
unwound          running     paused      .          cancelling
crash            running*    paused      .          cancelling*
shutdown         running*    paused      .          .
deadline0        .           pausing*    .          cancelling*
deadline1        .           pausing*    .          cancelling*
deadline2        .           paused      .          cancelled
deadline2+error  .           paused      .          failed
expire           cancelled   .           cancelled  .
undone           .           .           .          cancelled
undone+error     .           .           .          failed
"""

EVENTS_OF_A_FRAGILE_TRANSFER: Final = """
                 running     pausing     paused     cancelling
due              .           .           .          .
retry_at         .           .           .          .
after            .           .           .          .
claim            .           .           .          .
finish           succeeded   succeeded   .          cancelling
fail             failed      failed      failed     cancelling
fail+retry       failed      failed      failed     cancelling
unwound          running     paused      .          cancelling
crash            failed      failed      failed     cancelling*
shutdown         failed      failed      failed     .
deadline0        .           pausing*    .          cancelling*
deadline1        .           pausing*    .          cancelling*
deadline2        .           paused      .          cancelled
deadline2+error  .           paused      .          failed
expire           cancelled   .           cancelled  .
undone           .           .           .          cancelled
undone+error     .           .           .          failed
"""

# What must be done after the commit; more may be.
DUTIES: Final[dict[tuple[str, str], set[Effect]]] = {
    ("queued", "claim"): {Effect.START},
    ("scheduled", "due"): {Effect.QUEUE},
    ("scheduled", "retry_at"): {Effect.QUEUE},
    ("scheduled", "after+blocked"): {Effect.QUEUE},
    ("scheduled", "after+blocked+ahead"): {Effect.ALARM},
    ("scheduled", "after+blocked+broken"): {Effect.DISCARD},
    ("paused", "after+blocked+broken"): {Effect.DISCARD},
    ("running", "crash+loop"): {Effect.DISCARD},
    ("running", "crash+loop+undo"): {Effect.ROLLBACK, Effect.ALARM},
    ("running", "pause"): {Effect.SIGNAL, Effect.ALARM},
    ("running", "cancel"): {Effect.SIGNAL, Effect.ALARM},
    ("pausing", "resume"): {Effect.SIGNAL},
    ("pausing", "cancel"): {Effect.SIGNAL, Effect.ALARM},
    ("paused", "cancel"): {Effect.SIGNAL, Effect.ALARM},
    ("paused", "resume"): {Effect.QUEUE},
    ("paused", "resume+ahead"): {Effect.ALARM},
    ("scheduled", "cancel"): {Effect.SIGNAL, Effect.DISCARD},
    ("queued", "cancel"): {Effect.SIGNAL, Effect.DISCARD},
    ("scheduled", "cancel+undo"): {Effect.ROLLBACK, Effect.ALARM},
    ("queued", "cancel+undo"): {Effect.ROLLBACK, Effect.ALARM},
    ("cancelling", "cancel+force"): {Effect.FORCE, Effect.ALARM},
    ("cancelling", "finish"): {Effect.ROLLBACK},
    ("cancelling", "fail"): {Effect.ROLLBACK},
    ("cancelling", "unwound"): {Effect.ROLLBACK},
    ("cancelling", "crash"): {Effect.ROLLBACK, Effect.ALARM},
    ("running", "finish"): {Effect.RELEASE},
    ("running", "fail"): {Effect.RELEASE},
    ("running", "fail+retry"): {Effect.RELEASE, Effect.ALARM},
    ("running", "fail+undo"): {Effect.ROLLBACK, Effect.ALARM},
    ("running", "unwound"): {Effect.RELEASE, Effect.QUEUE},
    ("pausing", "unwound"): {Effect.RELEASE},
    ("pausing", "deadline0"): {Effect.ALARM},
    ("pausing", "deadline1"): {Effect.FORCE, Effect.ALARM},
    ("pausing", "deadline2"): {Effect.RELEASE},
    ("cancelling", "deadline0"): {Effect.ALARM},
    ("cancelling", "deadline1"): {Effect.FORCE, Effect.ALARM},
    ("cancelling", "deadline2"): {Effect.RELEASE},
    ("cancelling", "undone"): {Effect.RELEASE},
}

Cells = dict[tuple[str, str], str]  # (state, stimulus) → outcome


def _by_state(text: str) -> Cells:
    """A table whose rows are states."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    return {(row[0], head[i]): cell for row in rows for i, cell in enumerate(row[1:])}


def _by_stimulus(text: str) -> Cells:
    """A table whose columns are states; in a final state every event is ignored."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    cells = {(head[i], row[0]): cell for row in rows for i, cell in enumerate(row[1:])}
    return cells | {(state, row[0]): "." for row in rows for state in FINAL}


EXPECTED: Final[dict[str, Cells]] = {
    "process": (
        _by_state(ANSWERS_TO_A_PROCESS)
        | _by_state(CANCELS_OF_A_PROCESS)
        | _by_stimulus(EVENTS_OF_A_PROCESS)
    ),
    "resumable": _by_state(ANSWERS_TO_A_TRANSFER) | _by_stimulus(EVENTS_OF_A_RESUMABLE_TRANSFER),
    "fragile": _by_state(ANSWERS_TO_A_TRANSFER) | _by_stimulus(EVENTS_OF_A_FRAGILE_TRANSFER),
}

# Which facts may matter to an input; any other fact must change nothing.
MATTERS: Final[dict[Input, set[str]]] = {
    Input.RESUME: {"ahead"},
    Input.AFTER: {"ahead", "broken"},
    Input.CRASH: {"loop", "undo"},
    Input.DUE: {"ahead"},
    Input.RETRY_AT: {"ahead"},
    Input.CANCEL: {"undo", "force"},
    Input.FAIL: {"undo", "retry"},
}


def job_in(state: str, subject: str = "process", flags: frozenset[str] = frozenset()) -> Job:
    """A sound row in that state, its clocks just run out."""
    steps = {"deadline1": 1, "deadline2": 2}
    wants = {"pausing": "pause", "paused": "pause", "cancelling": "cancel", "cancelled": "cancel"}
    between = state in ("pausing", "cancelling")
    return Job(
        id="j1",
        kind="count",
        name="n",
        owner="o",
        state=state,
        want=wants.get(state, "run"),
        version=7,
        rank=NOW - 60_000,
        created_at=NOW - 60_000,
        started_at=None if state in ("scheduled", "queued") else NOW - 50_000,
        ended_at=NOW - 1 if state in FINAL else None,
        not_before=AHEAD if "ahead" in flags else NOW,
        deadline_at=NOW if between else None,
        deadline_step=max(steps.get(flag, 0) for flag in flags | {""}) if between else 0,
        expires_at=NOW,
        transfer=SUBJECTS[subject],
        error=ERROR if state == "failed" or ("error" in flags and state == "cancelling") else None,
        cursor={"row": 41},
        undo=JOURNAL if "undo" in flags else (),
        after=("j0",) if "blocked" in flags else (),
        blocked="blocked" in flags and state in ("scheduled", "paused"),
        crashes=tuple(NOW - ago for ago in range(100, 0, -1)) if "loop" in flags else (),
    )


def facts_of(flags: frozenset[str] = frozenset(), now: int = NOW) -> Facts:
    """What the caller knows besides the row."""
    return Facts(
        now=now,
        force="force" in flags,
        retry_at=now + 60_000 if "retry" in flags else None,
        broken="broken" in flags,
        error=ERROR,
        result=Result(data={"n": 1}),
    )


def decided(job: Job, input: Input, facts: Facts) -> tuple[Decision | None, str]:
    """The decision, and its outcome in one word."""
    try:
        decision = states.decide(job, input, facts)
    except SluiceError as refusal:
        return None, refusal.code if refusal.status == 409 else f"{refusal.code}/{refusal.status}"
    if decision is None:
        return None, "."
    text = decision.job.state + "*" * (decision.changed and decision.job.state == job.state)
    return decision, f"{text}/{decision.status}" if input in COMMANDS else text


def stimulate(
    state: str, stimulus: str, subject: str = "process", more: frozenset[str] = frozenset()
) -> tuple[Job, Decision | None, str]:
    """Let a stimulus act on a row in that state."""
    word, *rest = stimulus.split("+")
    flags = frozenset(rest) | more | {word}
    before = job_in(state, subject, flags)
    return before, *decided(before, Input(word.rstrip("012")), facts_of(flags))


def _unsound(before: Job, decision: Decision) -> list[str]:
    """What is wrong with the row after a decision, whichever cell it is."""
    after, found = decision.job, states.violations(decision.job)
    if after.version != before.version + decision.changed:
        found.append(f"version {before.version} became {after.version}")
    if not decision.changed and after != before:
        found.append("the row changed without an event")
    if after.state != before.state and not decision.changed:
        found.append("the state changed without an event")
    if before.want == "cancel" != after.want:
        found.append("the cancel was withdrawn")
    return found


def mismatches() -> list[str]:
    """Walk every cell; each line names one in which the table and the expectation differ."""
    found = []
    for subject, cells in EXPECTED.items():
        for (state, stimulus), expected in cells.items():
            input = Input(stimulus.split("+")[0].rstrip("012"))
            noise = {"ahead", "force", "retry", "broken", "loop"}
            noise |= {"undo"} if subject == "process" else set()
            for more in (frozenset[str](), frozenset(noise - MATTERS.get(input, set()))):
                before, decision, outcome = stimulate(state, stimulus, subject, more)
                wrong = _unsound(before, decision) if decision else []
                if outcome != expected:
                    wrong.append(f"expected {expected}, got {outcome}")
                found += [f"{subject} {state} {stimulus}: {text}" for text in wrong]
    for (state, stimulus), duties in DUTIES.items():
        decision = stimulate(state, stimulus)[1]
        missing = duties.difference(decision.effects if decision else ())
        found += [f"process {state} {stimulus}: without {effect.name}" for effect in missing]
    return found


def test_every_cell_is_as_written_here() -> None:
    """Each command and event does in each state what the tables above say, and nothing else."""
    assert mismatches() == []


@pytest.mark.parametrize("subject", SUBJECTS)
def test_tables_here_leave_out_no_pair(subject: str) -> None:
    """Every input is expected or ruled out in every state that the subject can be in."""
    never = {"scheduled", "queued"} if subject != "process" else set()
    walked = {
        (state, Input(stimulus.split("+")[0].rstrip("012")))
        for state, stimulus in EXPECTED[subject]
    }
    assert walked == set(product(set(STATES) - never, Input))


# ---- What follows from single cells ----


def test_refusal_names_the_state_that_won() -> None:
    """A command that comes too late says which job it was and how it stands now."""
    with pytest.raises(SluiceError) as caught:
        states.decide(job_in("succeeded"), Input.CANCEL, facts_of())
    assert caught.value.problem()["code"] == "job-finished"
    assert caught.value.extra == {"job": "j1", "state": "succeeded"}


def test_resumed_job_goes_to_the_front() -> None:
    """A resumed job comes before all that wait since their creation, and the older one first."""
    older, younger = (
        msgspec.structs.replace(job_in("paused"), created_at=NOW - ago, rank=NOW - ago)
        for ago in (20_000, 10_000)
    )
    ranks = []
    for job in (older, younger):
        decision, outcome = decided(job, Input.RESUME, facts_of())
        assert decision is not None
        assert outcome == "queued/202"
        ranks.append(decision.job.rank)
    assert ranks[0] < ranks[1] < 0 <= job_in("queued").rank


def test_only_who_ran_or_was_asked_for_goes_to_the_front() -> None:
    """A job whose time has come waits behind the older ones, any other way back is a short cut."""
    front = {}
    for (state, stimulus), expected in EXPECTED["process"].items():
        before, decision, _ = stimulate(state, stimulus)
        if expected.startswith("queued") and before.state != "queued":
            assert decision is not None
            front[state, stimulus] = decision.job.rank < 0
        elif decision is not None:
            assert decision.job.rank == before.rank, (state, stimulus)
    assert front == {
        ("paused", "resume"): True,
        ("running", "crash"): True,
        ("running", "shutdown"): True,
        ("running", "unwound"): True,
        ("running", "crash+undo"): True,
        ("scheduled", "due"): False,
        ("scheduled", "retry_at"): False,
        ("scheduled", "after+blocked"): False,
    }


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("scheduled", "due"),
        ("scheduled", "retry_at"),
        ("paused", "resume"),
        ("running", "crash"),
        ("running", "shutdown"),
        ("running", "unwound"),
    ],
)
def test_place_at_the_front_is_kept(state: str, word: str) -> None:
    """Who is at the front already neither loses its place nor gets a better one."""
    job = msgspec.structs.replace(job_in(state), rank=states.FRONT + 5)
    decision, _ = decided(job, Input(word), facts_of())
    assert decision is not None
    assert (decision.job.state, decision.job.rank) == ("queued", states.FRONT + 5)


@pytest.mark.parametrize("state", ["running", "pausing"])
def test_retry_keeps_the_cursor_and_counts(state: str) -> None:
    """A failure with attempts left waits for the next one, with its cursor and without an error."""
    _, decision, _ = stimulate(state, "fail+retry")
    assert decision is not None
    after = decision.job
    assert (after.attempt, after.not_before) == (2, NOW + 60_000)
    assert (after.cursor, after.error) == ({"row": 41}, None)


def test_crash_counts_as_an_attempt_and_shutdown_does_not() -> None:
    """Both queue a running process again with their reason; only the crash uses up an attempt."""
    found = {}
    for word in ("crash", "shutdown"):
        decision = stimulate("running", word)[1]
        assert decision is not None
        found[word] = (decision.job.reason, decision.job.attempt)
    assert found == {"crash": ("crash", 2), "shutdown": ("shutdown", 1)}


@pytest.mark.parametrize("subject", ["resumable", "fragile"])
def test_expired_transfer_says_why(subject: str) -> None:
    """A transfer left alone for too long is cancelled for the reason expired."""
    for state in ("running", "paused"):
        decision = stimulate(state, "expire", subject)[1]
        assert decision is not None
        assert (decision.job.reason, decision.cause) == ("expired", "expired")


@pytest.mark.parametrize(("command", "end"), [(Input.PAUSE, "paused"), (Input.CANCEL, "cancelled")])
def test_clock_warns_forces_and_gives_up(command: Input, end: str) -> None:
    """Nobody answers: a warning after 10 s, force after 30 s, and 10 s later the job moves on."""
    job, now, seen = job_in("running"), NOW, []
    for input in (command, Input.DEADLINE, Input.DEADLINE, Input.DEADLINE):
        decision = decided(job, input, facts_of(now=now))[0]
        assert decision is not None
        job = decision.job
        seen.append((now - NOW, Effect.FORCE in decision.effects))
        now = job.deadline_at or now
    assert seen == [(0, False), (10_000, False), (30_000, True), (40_000, False)]
    assert (job.state, job.reason) == (end, "forced")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_first_row_of_a_job(subject: str) -> None:
    """A transfer runs from its creation; a process waits for a slot, or for its time."""
    for flags, waiting in ((frozenset[str](), "queued"), (frozenset({"ahead"}), "scheduled")):
        row = states.created(job_in("queued", subject, flags), facts_of())
        assert (row.state, row.version) == ("running" if SUBJECTS[subject] else waiting, 1)
        assert states.violations(row) == []


def test_failure_after_a_cancel_ends_cancelled() -> None:
    """Who was asked to cancel and then stumbles is cancelled: the late error is not kept."""
    job = job_in("running", flags=frozenset({"undo"}))
    for input in (Input.CANCEL, Input.FAIL, Input.UNDONE):
        decision = decided(job, input, facts_of())[0]
        assert decision is not None
        job = decision.job
    assert (job.state, job.want, job.error) == ("cancelled", "cancel", None)


@pytest.mark.parametrize("state", ["running", "pausing"])
@pytest.mark.parametrize("subject", ["resumable", "fragile"])
@pytest.mark.parametrize(("more", "end"), [("", "failed"), ("+undo", "cancelling")])
def test_failed_transfer_is_never_tried_again(
    subject: str, state: str, more: str, end: str
) -> None:
    """An offered retry neither schedules nor pauses a transfer: it fails, undone if need be."""
    before, decision, outcome = stimulate(state, f"fail+retry{more}", subject)
    assert decision is not None
    assert states.violations(decision.job) == []
    after = decision.job
    assert (outcome, after.error) == (end, ERROR)
    assert (after.attempt, after.not_before) == (before.attempt, before.not_before)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("left_ms", [-3_600_000, 0, 9_000])
def test_crash_while_cancelling_starts_the_clock_anew(
    subject: str, step: int, left_ms: int
) -> None:
    """After a restart the journal has all of its grace, however much of it was used up."""
    job = msgspec.structs.replace(
        job_in("cancelling", subject), deadline_step=step, deadline_at=NOW + left_ms
    )
    decision, outcome = decided(job, Input.CRASH, facts_of()._replace(warn_ms=7_000))
    assert decision is not None
    assert outcome == "cancelling*"
    assert (decision.job.deadline_step, decision.job.deadline_at) == (0, NOW + 7_000)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(
    ("stimulus", "end"),
    [
        ("undone", "cancelled"),
        ("undone+error", "failed"),
        ("deadline2", "cancelled"),
        ("deadline2+error", "failed"),
    ],
)
def test_want_is_not_withdrawn_by_the_end(subject: str, stimulus: str, end: str) -> None:
    """A job that was to be cancelled still is after its rollback, even if it ends as failed."""
    decision = stimulate("cancelling", stimulus, subject)[1]
    assert decision is not None
    assert (decision.job.state, decision.job.want) == (end, "cancel")


@pytest.mark.parametrize("state", ["pausing", "cancelling"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_old_alarm_is_ignored(state: str, step: int) -> None:
    """An alarm before the deadline of the row means nothing, and one at the deadline counts."""
    job = msgspec.structs.replace(job_in(state), deadline_step=step, deadline_at=NOW + 1)
    assert states.decide(job, Input.DEADLINE, facts_of(now=NOW)) is None
    assert states.decide(job, Input.DEADLINE, facts_of(now=NOW + 1)) is not None


def test_alarm_of_an_earlier_pause_is_ignored() -> None:
    """Paused, resumed and paused again: the clock of the first pause doesn't shorten the second."""
    job = job_in("running")
    for input, now in ((Input.PAUSE, NOW), (Input.RESUME, NOW + 1), (Input.PAUSE, NOW + 9_000)):
        decision = decided(job, input, facts_of(now=now))[0]
        assert decision is not None
        job = decision.job
    assert decided(job, Input.DEADLINE, facts_of(now=NOW + 10_000)) == (None, ".")
    assert (job.deadline_step, job.deadline_at) == (0, NOW + 19_000)


@pytest.mark.parametrize("state", ["scheduled", "queued"])
def test_cancel_of_a_waiting_job_leaves_nothing(state: str) -> None:
    """Who waits with nothing to undo is told and cleaned up, and no clock or journal is needed."""
    decision = stimulate(state, "cancel")[1]
    assert decision is not None
    assert set(decision.effects) == {Effect.SIGNAL, Effect.DISCARD}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("step", [0, 1])
def test_force_is_an_event_and_a_mere_cancel_is_none(subject: str, step: int) -> None:
    """A second cancel changes nothing; with force it is logged and leaves 10 s until the end."""
    job = msgspec.structs.replace(
        job_in("cancelling", subject), deadline_step=step, deadline_at=NOW + 5_000
    )
    by = By(actor="o", via="rest", at=NOW)
    mere = states.decide(job, Input.CANCEL, facts_of()._replace(by=by))
    assert mere == Decision(job, 202, (), "command", changed=False)
    forced = states.decide(job, Input.CANCEL, facts_of(frozenset({"force"}))._replace(by=by))
    assert forced is not None
    assert (forced.status, forced.changed, forced.cause) == (202, True, "command")
    assert set(forced.effects) == {Effect.FORCE, Effect.ALARM}
    assert forced.job == msgspec.structs.replace(
        job, version=job.version + 1, deadline_step=2, deadline_at=NOW + 10_000, by=by
    )


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_second_force_postpones_nothing(subject: str) -> None:
    """Once the grace was ended, by force or by the clock, another force changes nothing."""
    job = msgspec.structs.replace(
        job_in("cancelling", subject), deadline_step=2, deadline_at=NOW + 5_000
    )
    forced = states.decide(job, Input.CANCEL, facts_of(frozenset({"force"})))
    assert forced == Decision(job, 202, (), "command", changed=False)


def test_force_ends_the_grace() -> None:
    """Cancelled, then forced 3 s later: the job is cancelled 10 s after that, whoever is silent."""
    job = job_in("running")
    for flags, input, now in (
        (frozenset[str](), Input.CANCEL, NOW),
        (frozenset({"force"}), Input.CANCEL, NOW + 3_000),
        (frozenset[str](), Input.DEADLINE, NOW + 13_000),
    ):
        decision = decided(job, input, facts_of(flags, now))[0]
        assert decision is not None
        job = decision.job
    assert (job.state, job.reason, job.ended_at) == ("cancelled", "forced", NOW + 13_000)


# ---- No state is a trap ----


def _neighbours(job: Job) -> Iterator[Job]:
    """Every row that one input makes of this one."""
    matter = {Input.FAIL: "retry", Input.CANCEL: "force"}
    for input, now in product(Input, {NOW, AHEAD, job.deadline_at or NOW}):
        flags = [frozenset[str]()]
        if input in matter:
            flags.append(frozenset({matter[input]}))
        for chosen in flags:
            decision = decided(job, input, facts_of(chosen, now))[0]
            if decision is not None:
                yield decision.job


def _key(job: Job) -> tuple[Any, ...]:
    """All of a row that decisions can depend on."""
    early = job.not_before is not None and job.not_before > NOW
    return job.state, job.want, min(job.deadline_step, 3), bool(job.undo), bool(job.error), early


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("flags", [(), ("undo",), ("ahead",), ("ahead", "undo")])
def test_no_state_is_a_trap(subject: str, flags: tuple[str, ...]) -> None:
    """From each row that can come about, some inputs lead to an end."""
    first = states.created(job_in("queued", subject, frozenset(flags)), facts_of())
    rows, edges, todo = {_key(first): first}, set[tuple[Any, Any]](), [first]
    while todo:
        job = todo.pop()
        for after in _neighbours(job):
            edges.add((_key(job), _key(after)))
            if _key(after) not in rows:
                rows[_key(after)] = after
                todo.append(after)
    free = {key for key, job in rows.items() if job.state in FINAL}
    while grown := {a for a, b in edges if b in free} - free:
        free |= grown
    assert set(rows) - free == set()
    impossible = {"scheduled", "queued"} if SUBJECTS[subject] else set()
    assert {job.state for job in rows.values()} == set(STATES) - impossible


@pytest.mark.parametrize(
    ("subject", "state"),
    [
        *product(SUBJECTS, ["running", "pausing", "paused", "cancelling"]),
        *product(["process"], ["scheduled", "queued"]),
    ],
)
def test_cancel_needs_nobody_else(subject: str, state: str) -> None:
    """After a cancel the clock alone brings a job to its end, whoever has died meanwhile."""
    job = job_in(state, subject, frozenset({"undo"}))
    for input in (Input.CANCEL, Input.DEADLINE, Input.DEADLINE, Input.DEADLINE):
        decision = decided(job, input, facts_of(now=job.deadline_at or NOW))[0]
        job = decision.job if decision else job
    assert job.state == "cancelled"


# ---- Races ----


def logged(before: Job | None, after: Job, cause: str) -> Event:
    """The entry of the log for a change."""
    return Event(
        job=after.id,
        version=after.version,
        kind=after.kind,
        owner=after.owner,
        at=0,
        from_=before.state if before else None,
        to=after.state,
        cause=cause,
        actor="test",
        row=msgspec.Raw(b"{}"),
    )


class Store:
    """One row and its log, as a backend keeps them: a commit is a compare-and-swap."""

    def __init__(self, row: Job) -> None:
        self.row = row
        self.log = [logged(None, row, "created")]

    def commit(self, job: Job, event: Event, *, was_version: int) -> None:
        if self.row.version != was_version:
            raise Stale
        self.row = msgspec.structs.replace(job, undo=self.row.undo)
        self.log.append(event)


def write(store: Store, seen: Job, decision: Decision | None) -> None:
    """Commit a decision about a row as it was seen; raises Stale if the row has moved."""
    if decision is not None and decision.changed:
        entry = logged(seen, decision.job, decision.cause)
        store.commit(decision.job, entry, was_version=seen.version)


class Race(NamedTuple):
    """Two stimuli that meet: how the two orders answer them, and where the job ends."""

    state: str
    one: str
    two: str
    one_first: tuple[str, str, str]
    two_first: tuple[str, str, str]


RACES: Final = (
    Race(
        "running",
        "finish",
        "cancel",
        ("succeeded", "job-finished", "succeeded"),
        ("cancelling", "cancelling/202", "cancelling"),
    ),
    Race(
        "running",
        "finish",
        "pause",
        ("succeeded", "job-finished", "succeeded"),
        ("succeeded", "pausing/202", "succeeded"),
    ),
    Race(
        "running",
        "fail",
        "cancel",
        ("failed", "job-finished", "failed"),
        ("cancelling", "cancelling/202", "cancelling"),
    ),
    Race(
        "pausing",
        "unwound",
        "resume",
        ("paused", "queued/202", "queued"),
        ("queued", "running/200", "queued"),
    ),
    Race(
        "pausing",
        "finish",
        "resume",
        ("succeeded", "job-finished", "succeeded"),
        ("succeeded", "running/200", "succeeded"),
    ),
    Race(
        "cancelling",
        "undone",
        "cancel",
        ("cancelled", "cancelled/200", "cancelled"),
        ("cancelled", "cancelling/202", "cancelled"),
    ),
    Race(
        "pausing",
        "unwound",
        "deadline2",
        ("paused", ".", "paused"),
        (".", "paused", "paused"),
    ),
    Race(
        "cancelling",
        "undone",
        "deadline2",
        ("cancelled", ".", "cancelled"),
        (".", "cancelled", "cancelled"),
    ),
    Race(
        "cancelling",
        "undone",
        "cancel+force",
        ("cancelled", "cancelled/200", "cancelled"),
        ("cancelled", "cancelling*/202", "cancelled"),
    ),
    Race(  # the grace has ended already, so the force changes nothing
        "cancelling",
        "deadline2",
        "cancel+force",
        ("cancelled", "cancelled/200", "cancelled"),
        ("cancelled", "cancelling/202", "cancelled"),
    ),
    Race(
        "queued",
        "claim",
        "cancel",
        ("running", "cancelling/202", "cancelling"),
        (".", "cancelled/200", "cancelled"),
    ),
    Race(
        "queued",
        "claim",
        "pause",
        ("running", "pausing/202", "pausing"),
        (".", "paused/200", "paused"),
    ),
)


@pytest.mark.parametrize("race", RACES, ids=lambda race: f"{race.one}-{race.two}")
def test_first_commit_decides_a_race(race: Race) -> None:
    """However the two interleave, it ends as if one had come wholly after the other."""
    words = (race.one, race.two)
    for order in sorted(set(permutations((0, 0, 1, 1)))):
        store = Store(job_in(race.state, flags=frozenset(words)))
        seen: dict[int, Job] = {}
        answers: dict[int, str] = {}
        for actor in order:
            if actor not in seen:
                seen[actor] = store.row
                continue
            word, *flags = words[actor].split("+")
            input, facts = Input(word.rstrip("012")), facts_of(frozenset(flags))
            while actor not in answers:
                decision, outcome = decided(seen[actor], input, facts)
                try:
                    write(store, seen[actor], decision)
                    answers[actor] = outcome
                except Stale:
                    seen[actor] = store.row
        end = (answers[0], answers[1], store.row.state)
        assert end in (race.one_first, race.two_first), order


@dataclasses.dataclass
class Model:
    """A job as its user understands it: told in sentences, not in a table."""

    subject: str
    state: str
    undo: bool = False
    not_before: int | None = None
    want: str = "run"
    failed: bool = False
    front: bool = False
    rings_at: int | None = None
    step: int = 0
    attempt: int = 1
    blocked: bool = False
    broken: bool = False
    crashes: tuple[int, ...] = ()

    def meet(self, input: Input, facts: Facts) -> str:
        """Let it happen; the outcome in one word."""
        before = self.state
        method = {"retry_at": "due"}.get(input.value, input.value)
        outcome: str = getattr(self, method)(facts)
        if self.state != before:
            self.blocked = self.blocked and self.state in ("scheduled", "paused")
            self._wants()
            self.step, self.rings_at = 0, None
            if self.state in ("pausing", "cancelling"):
                self.rings_at = facts.now + 10_000
        return outcome

    def _wants(self) -> None:
        if self.state in ("cancelling", "cancelled"):
            self.want = "cancel"
        elif self.want != "cancel":
            self.want = "pause" if self.state in ("pausing", "paused") else "run"

    def _waits_in_front(self) -> str:
        self.front = True
        return self._becomes("queued")

    def _becomes(self, state: str, suffix: str = "") -> str:
        self.state = state
        return state + suffix

    def _too_late(self) -> str | None:
        if self.state in ("succeeded", "failed", "cancelled"):
            return "job-finished"
        return "job-cancelling" if self.state == "cancelling" else None

    def pause(self, facts: Facts) -> str:
        if refusal := self._too_late():
            return refusal
        if self.state in ("running", "pausing"):
            return self._becomes("pausing", "/202")
        return self._becomes("paused", "/200")

    def resume(self, facts: Facts) -> str:
        if refusal := self._too_late():
            return refusal
        if self.state == "pausing" or (self.state == "paused" and self.subject != "process"):
            return self._becomes("running", "/200")
        if self.state != "paused":
            return f"{self.state}/200"
        if self.blocked or self._is_early(facts):
            return self._becomes("scheduled", "/202")
        return self._waits_in_front() + "/202"

    def cancel(self, facts: Facts) -> str:
        if self.state in ("succeeded", "failed"):
            return "job-finished"
        untouched = self.state in ("scheduled", "queued") and not self.undo
        if untouched or self.state == "cancelled":
            return self._becomes("cancelled", "/200")
        if self.state == "cancelling" and facts.force and self.step < 2:
            self.step, self.rings_at = 2, facts.now + 10_000
            return "cancelling*/202"
        return self._becomes("cancelling", "/202")

    def _is_early(self, facts: Facts) -> bool:
        return self.not_before is not None and facts.now < self.not_before

    def due(self, facts: Facts) -> str:
        waits = self.state == "scheduled" and not self.blocked
        return self._becomes("queued") if waits else "."

    def after(self, facts: Facts) -> str:
        if not self.blocked:
            return "."
        self.blocked = False
        if facts.broken:
            self.broken = True
            return self._becomes("cancelled")
        if self.state == "paused" or self._is_early(facts):
            return self.state + "*"
        return self._becomes("queued")

    def claim(self, facts: Facts) -> str:
        return self._becomes("running") if self.state == "queued" else "."

    def finish(self, facts: Facts) -> str:
        if self.state in ("running", "pausing"):
            return self._becomes("succeeded")
        return "cancelling" if self.state == "cancelling" else "."

    def fail(self, facts: Facts) -> str:
        if self.state == "cancelling":
            return "cancelling"
        if self.state not in ("running", "pausing"):
            lost = self.subject != "process" and self.state == "paused"
            return self._ends_in_failure() if lost else "."
        if facts.retry_at is not None and self.subject == "process":
            self.attempt += 1
            self.not_before = facts.retry_at
            return self._becomes("scheduled" if self.state == "running" else "paused")
        if self.undo:
            self.failed = True
            return self._becomes("cancelling")
        return self._ends_in_failure()

    def _ends_in_failure(self) -> str:
        self.failed = True
        return self._becomes("failed")

    def unwound(self, facts: Facts) -> str:
        if self.state == "pausing":
            return self._becomes("paused")
        if self.state == "running":
            return self._waits_in_front() if self.subject == "process" else "running"
        return "cancelling" if self.state == "cancelling" else "."

    def crash(self, facts: Facts) -> str:
        if self.state == "cancelling":
            self.step, self.rings_at = 0, facts.now + 10_000
            return "cancelling*"
        if self.state == "running" and self.subject == "process":
            recent = tuple(at for at in self.crashes if at > facts.now - 600_000)
            self.crashes = (*recent, facts.now)
            if len(self.crashes) > 100:
                self.failed = True
                return self._becomes("cancelling" if self.undo else "failed")
            self.attempt += 1
        return self._stopped()

    def shutdown(self, facts: Facts) -> str:
        return "." if self.state == "cancelling" else self._stopped()

    def _stopped(self) -> str:
        if self.subject == "fragile" and self.state in ("running", "pausing", "paused"):
            return self._ends_in_failure()
        if self.state == "pausing":
            return self._becomes("paused")
        if self.state == "running":
            return self._waits_in_front() if self.subject == "process" else "running*"
        return "."

    def deadline(self, facts: Facts) -> str:
        if self.rings_at is None or facts.now < self.rings_at:
            return "."
        if self.step < 2:
            self.rings_at = facts.now + (10_000 if self.step else 20_000)
            self.step += 1
            return self.state + "*"
        if self.state == "pausing":
            return self._becomes("paused")
        return self._becomes("failed" if self.failed else "cancelled")

    def expire(self, facts: Facts) -> str:
        if self.subject != "process" and self.state in ("running", "paused"):
            return self._becomes("cancelled")
        return "."

    def undone(self, facts: Facts) -> str:
        if self.state != "cancelling":
            return "."
        return self._becomes("failed" if self.failed else "cancelled")


@dataclasses.dataclass
class Attempt:
    """What one actor has in hand: the row that it read, and what it means to do with it."""

    input: Input
    flags: frozenset[str]
    seen: Job
    model: Model


# What a job in that state is likely to meet; now and then it meets anything at all.
LIKELY: Final[dict[str, str]] = {
    "scheduled": "due retry_at after pause resume cancel",
    "queued": "claim claim pause resume cancel",
    "running": "finish fail unwound pause pause cancel shutdown expire",
    "pausing": "unwound finish fail resume cancel deadline shutdown",
    "paused": "resume resume after cancel fail shutdown expire pause",
    "cancelling": "unwound finish fail undone deadline cancel pause resume",
    "succeeded": "cancel pause fail undone",
    "failed": "cancel resume finish undone",
    "cancelled": "cancel finish undone deadline",
}
Plan = tuple[int, int, bool, bool]
PLANS: Final = st.tuples(st.integers(0, 999), st.integers(0, 9), st.booleans(), st.booleans())
JOBS: Final = st.tuples(
    st.sampled_from(sorted(SUBJECTS)),
    st.sampled_from([state for state in STATES if state not in FINAL]),
    st.sets(st.sampled_from(["ahead", "undo", "blocked", "loop"])),
)


class Interleavings(RuleBasedStateMachine):
    """Two actors read a row, decide and commit, in any order, until a crash or the end."""

    @initialize(job=JOBS)
    def start(self, job: tuple[str, str, set[str]]) -> None:
        """A job that has got as far as that."""
        subject, state, flags = job
        if subject != "process":
            state = state.replace("scheduled", "running").replace("queued", "running")
            flags = flags & {"ahead"}
        undo = "undo" in flags
        row = msgspec.structs.replace(job_in(state, subject, frozenset(flags)), version=1)
        self.now = NOW
        self.store = Store(row)
        self.model = Model(subject, state, undo, row.not_before, row.want, rings_at=row.deadline_at)
        self.model.blocked, self.model.crashes = row.blocked, row.crashes
        self.attempts: dict[str, Attempt] = {}
        self.ended: Job | None = None
        self.cancelled = False

    @precondition(lambda self: self.model.state in FINAL)
    @rule(job=JOBS)
    def start_another(self, job: tuple[str, str, set[str]]) -> None:
        """Enough late events: the same with another job."""
        self.start(job)

    def _clock(self, input: Input) -> int:
        """When the event of a clock is due; at once for any other input."""
        row = self.store.row
        if input is Input.DEADLINE:
            return row.deadline_at or 0
        return row.not_before or 0 if input in (Input.DUE, Input.RETRY_AT) else 0

    @rule(actor=st.sampled_from(["door", "driver"]), plan=PLANS)
    def turn(self, actor: str, plan: Plan) -> None:
        """An actor goes on: it reads the row, or writes what it has decided."""
        if actor in self.attempts:
            self._write(actor)
        else:
            self._read(actor, plan)

    @rule(plans=st.tuples(PLANS, PLANS), order=st.permutations(["door", "driver"]))
    def collide(self, plans: tuple[Plan, Plan], order: list[str]) -> None:
        """Both have read the same row before either writes."""
        self.attempts.clear()
        for actor, plan in zip(order, plans, strict=True):
            self._read(actor, plan)
        for actor in order:
            self._write(actor)

    def _read(self, actor: str, plan: Plan) -> None:
        pick, odd, retry, force = plan
        names = [input.value for input in Input] if odd == 5 else LIKELY[self.model.state].split()
        input = Input(names[pick % len(names)])
        flags = {"retry"} if retry else set()
        # Force is promised only to a job that is being cancelled already.
        if force and input is Input.CANCEL and self.model.state == "cancelling":
            flags.add("force")
        if force and input is Input.AFTER:
            flags.add("broken")
        if odd != 4:  # else the clock that rings may be an old one
            self.now = max(self.now, self._clock(input))
        self.attempts[actor] = Attempt(
            input, frozenset(flags), self.store.row, dataclasses.replace(self.model)
        )

    def _write(self, actor: str) -> None:
        """Decide about the row as it was read, and commit; if the row has moved, read it again."""
        attempt = self.attempts.pop(actor)
        facts = facts_of(attempt.flags, self.now)
        decision, outcome = decided(attempt.seen, attempt.input, facts)
        model = dataclasses.replace(attempt.model)
        assert outcome == model.meet(attempt.input, facts)
        try:
            write(self.store, attempt.seen, decision)
        except Stale:
            self.attempts[actor] = dataclasses.replace(
                attempt, seen=self.store.row, model=dataclasses.replace(self.model)
            )
            return
        if decision is not None and decision.changed:
            self.model = model
        else:
            assert model == attempt.model
        if attempt.input is Input.CANCEL and outcome != "job-finished":
            self.cancelled = True

    @rule(odd=st.integers(0, 9))
    def crash(self, odd: int) -> None:
        """The service dies with all that was in hand, and puts the row right when it starts."""
        if odd not in (3, 4, 5):
            return
        self.attempts.clear()
        facts = facts_of(now=self.now)
        decision, outcome = decided(self.store.row, Input.CRASH, facts)
        assert outcome == self.model.meet(Input.CRASH, facts)
        write(self.store, self.store.row, decision)

    @precondition(
        lambda self: (
            self.model.subject == "process"
            and self.model.state in ("running", "pausing")
            and not self.model.undo
            and not self.attempts
        )
    )
    @rule()
    def journal(self) -> None:
        """The running process notes what would have to be undone: no event, no new version."""
        self.store.row = msgspec.structs.replace(self.store.row, undo=JOURNAL)
        self.model.undo = True

    @rule(ms=st.sampled_from([1_000, 60_000, 3_600_000]))
    def wait(self, ms: int) -> None:
        """Time passes."""
        self.now += ms

    @invariant()
    def row_is_sound(self) -> None:
        """No moment shows a row that contradicts itself or the model."""
        row, model = self.store.row, self.model
        assert states.violations(row) == []
        has_error = model.failed or model.broken
        told = (model.state, model.want, model.attempt, has_error, model.front)
        assert (row.state, row.want, row.attempt, row.error is not None, row.rank < 0) == told
        assert row.blocked == model.blocked
        assert (row.deadline_step, row.deadline_at) == (model.step, model.rings_at)

    @invariant()
    def log_is_gapless(self) -> None:
        """Each version is logged once, in order, and each event begins where the last one ended."""
        log = self.store.log
        assert [entry.version for entry in log] == list(range(1, len(log) + 1))
        assert self.store.row.version == len(log)
        assert [entry.from_ for entry in log] == [None, *(entry.to for entry in log[:-1])]
        assert log[-1].to == self.store.row.state

    @invariant()
    def end_is_the_end(self) -> None:
        """A final row never changes again."""
        if self.ended is not None:
            assert self.store.row == self.ended
        elif self.store.row.state in FINAL:
            self.ended = self.store.row

    @invariant()
    def cancel_stays_wanted(self) -> None:
        """A cancel that was wanted once ends as cancelled, or as failed if that came first."""
        self.cancelled = self.cancelled or self.store.row.want == "cancel"
        if self.cancelled:
            allowed = {"cancelling", "failed" if self.model.failed else "cancelled"}
            assert self.store.row.state in allowed
            assert self.store.row.want == "cancel"

    def teardown(self) -> None:
        """Wherever it was left, a cancel and the clock end it."""
        for input in (Input.CANCEL, Input.DEADLINE, Input.DEADLINE, Input.DEADLINE):
            self.now = max(self.now, self.store.row.deadline_at or 0)
            decision, _ = decided(self.store.row, input, facts_of(now=self.now))
            write(self.store, self.store.row, decision)
        assert self.store.row.state in FINAL


def test_any_interleaving_keeps_the_invariants() -> None:
    """Two actors, any inputs, any order, a crash at any moment: the row and its log stay sound."""
    run_state_machine_as_test(
        Interleavings,
        settings=settings(max_examples=400, stateful_step_count=40, deadline=None),
    )


# ---- The page and the checker ----


def test_page_is_generated_from_the_table() -> None:
    """docs/states.md says how it is made, and is what that makes today."""
    page = Path(states.__file__).parents[1].joinpath("docs", "states.md").read_text("utf-8")
    assert page.startswith("<!-- made by: python -m jobs.states > docs/states.md -->\n")
    assert page == states.describe() + "\n"


BROKEN: Final[dict[str, tuple[str, Input, tuple[Row, ...], str]]] = {
    "a cancelled job may still succeed": (
        "cancelling",
        Input.FINISH,
        (Row("succeeded"),),
        "process cancelling finish",
    ),
    "a rollback is forgotten when the work ends first": (
        "cancelling",
        Input.FINISH,
        (Row("cancelling"),),
        "process cancelling finish",
    ),
    "a pause can't be withdrawn": ("pausing", Input.RESUME, (), "process pausing resume"),
    "a withdrawn pause leaves a job without a runner": (
        "running",
        Input.UNWOUND,
        (),
        "process running unwound",
    ),
    "a resumed transfer queues": (
        "paused",
        Input.RESUME,
        (Row("queued", 202),),
        "resumable paused resume",
    ),
    "a waiting job is cancelled without its journal": (
        "queued",
        Input.CANCEL,
        (Row("cancelled"),),
        "process queued cancel+undo",
    ),
    "the journal runs although attempts are left": (
        "running",
        Input.FAIL,
        states.TRANSITIONS["running", Input.FAIL][1:],
        "process running fail+retry",
    ),
    "a transfer is tried again": (
        "running",
        Input.FAIL,
        (
            states.TRANSITIONS["running", Input.FAIL][0]._replace(when=None),
            *states.TRANSITIONS["running", Input.FAIL][1:],
        ),
        "resumable running fail+retry",
    ),
    "a force is no event": (
        "cancelling",
        Input.CANCEL,
        states.TRANSITIONS["cancelling", Input.CANCEL][1:],
        "process cancelling cancel+force",
    ),
    "a fragile transfer survives a crash": (
        "running",
        Input.CRASH,
        states.TRANSITIONS["running", Input.CRASH][1:],
        "fragile running crash",
    ),
    "cancelling never gives up": (
        "cancelling",
        Input.DEADLINE,
        states.TRANSITIONS["cancelling", Input.DEADLINE][:2],
        "process cancelling deadline2",
    ),
    "a cancel is withdrawn": (
        "cancelling",
        Input.RESUME,
        (Row("running"),),
        "process cancelling resume",
    ),
    "a success is cancelled": (
        "succeeded",
        Input.CANCEL,
        (Row("cancelled"),),
        "process succeeded cancel",
    ),
    "a late failure spoils a success": (
        "succeeded",
        Input.FAIL,
        (Row("failed"),),
        "process succeeded fail",
    ),
    "a process expires": ("running", Input.EXPIRE, (Row("cancelled"),), "process running expire"),
}


@pytest.mark.parametrize("rule_broken", BROKEN)
def test_walk_notices_a_broken_rule(rule_broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk over the cells names the cell when a rule of the table is broken."""
    state, input, rows, cell = BROKEN[rule_broken]
    monkeypatch.setitem(states.TRANSITIONS, (state, input), rows)
    assert any(line.startswith(f"{cell}:") for line in mismatches())


def _mutants(row: Row, input: Input) -> Iterator[tuple[Row, ...]]:
    """The same row with one thing changed, or without it."""
    yield ()
    yield (row._replace(to="failed" if row.to == "succeeded" else "succeeded"),)
    if input in COMMANDS:
        yield (row._replace(status=402 - row.status),)
    yield (row._replace(note=not row.note),)


ROWS: Final = [(key, i) for key, rows in states.TRANSITIONS.items() for i in range(len(rows))]


@pytest.mark.parametrize(
    ("key", "index"), ROWS, ids=[f"{state}-{input.value}-{i}" for (state, input), i in ROWS]
)
def test_walk_notices_each_changed_row(
    key: tuple[str, Input], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row of the table can be dropped or changed without the walk noticing."""
    rows = states.TRANSITIONS[key]
    for mutant in _mutants(rows[index], key[1]):
        if mutant and mutant[0].to == rows[index].to != key[0] and mutant[0].note:
            continue  # a note means nothing where the state changes anyway
        monkeypatch.setitem(states.TRANSITIONS, key, rows[:index] + mutant + rows[index + 1 :])
        assert mismatches() != [], mutant
