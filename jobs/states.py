"""The state machine of a job: one table, no I/O, no clock.

``decide(job, input, facts)`` returns the job as it shall be, and *effects*: data that says what
the manager must then do. The table below is the document; what is absent is refused (for a
command) or ignored (for an internal event that came too late). docs/states.md is drawn from it by
``python -m jobs.states``.

Races have one commit point: the caller writes the decision with compare-and-swap on the version;
if the row moved meanwhile, it reads again and decides again. So "finish against cancel" is simply
which of the two committed first, and the table says what the second one finds.

``want`` (run < pause < cancel) is what was last asked for; a runner compares itself with it at each
checkpoint. Cancel is never withdrawn. ``reason`` says why a job is where it is when nobody asked.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

import msgspec

from errors import SluiceError
from storage import Artifact, By, Job, Result, Rollback

SCHEDULED: Final = "scheduled"
QUEUED: Final = "queued"
RUNNING: Final = "running"
PAUSING: Final = "pausing"
PAUSED: Final = "paused"
CANCELLING: Final = "cancelling"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

STATES: Final = (
    SCHEDULED,
    QUEUED,
    RUNNING,
    PAUSING,
    PAUSED,
    CANCELLING,
    SUCCEEDED,
    FAILED,
    CANCELLED,
)
FINAL: Final = frozenset({SUCCEEDED, FAILED, CANCELLED})
DELETED: Final = "deleted"  # not a state: what the last event of a deleted job goes to

# Jobs that ran before go to the front of their priority: their rank is below every creation time.
FRONT: Final = -(10**14)

_END_MS: Final = 10_000  # from the force of a deadline to its end
_LOOP, _LOOP_MS = 100, 600_000  # crashes in that time without progress; one more is no bad luck


class Input(Enum):
    """What can happen to a job: three commands, and what the service itself observes."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    DUE = "due"  # the time of a scheduled job has come
    CLAIM = "claim"  # a slot was given to it
    FINISH = "finish"  # the work is done
    FAIL = "fail"  # the work can't be done
    UNWOUND = "unwound"  # the runner stands at a checkpoint and has let go
    CRASH = "crash"  # found at start-up: an earlier incarnation ran it
    SHUTDOWN = "shutdown"  # this incarnation is stopping
    DEADLINE = "deadline"  # an intermediate state has lasted too long
    AFTER = "after"  # all that it waited for have ended as they must, or one of them has not
    RETRY_AT = "retry_at"  # the back-off before the next attempt is over
    EXPIRE = "expire"  # an unfinished upload was left alone for too long
    UNDONE = "undone"  # the undo journal has been run


COMMANDS: Final = frozenset({Input.PAUSE, Input.RESUME, Input.CANCEL})


class Effect(Enum):
    """What the manager does after the commit."""

    SIGNAL = "tell the runner what is wanted now"
    START = "let the driver run it"
    RELEASE = "its slot is free"
    QUEUE = "look for a job that can start"
    ALARM = "watch the clock that the row names"
    ROLLBACK = "run the undo journal, then report undone"
    DISCARD = "remove its unfinished bytes"
    FORCE = "stop the runner by force"


class Facts(NamedTuple):
    """What ``decide`` may know besides the row. Times in milliseconds since 1970."""

    now: int
    by: By | None = None
    warn_ms: int = 10_000
    grace_ms: int = 30_000
    force: bool = False
    retry_at: int | None = None
    broken: bool = False
    error: dict[str, Any] | None = None
    result: Result | None = None
    rollback: Rollback | None = None
    reason: str | None = None
    artifacts: tuple[Artifact, ...] = ()


class Row(NamedTuple):
    """One alternative of a cell: taken if ``when`` holds; the first that does wins."""

    to: str
    status: int = 200
    effects: tuple[Effect, ...] = ()
    when: Callable[[Job, Facts], bool] | None = None
    note: bool = False  # an event is logged although the state stays


class Decision(NamedTuple):
    """The job as it shall be, the HTTP status of a command, the effects, and the event's cause."""

    job: Job
    status: int
    effects: tuple[Effect, ...]
    cause: str
    changed: bool


def has_undo(job: Job, facts: Facts) -> bool:
    """Something is to be undone."""
    return bool(job.undo)


def is_transfer(job: Job, facts: Facts) -> bool:
    """An upload or download: it never queues."""
    return job.transfer is not None


def is_fragile(job: Job, facts: Facts) -> bool:
    """A transfer that can't go on without its connection."""
    return job.transfer is not None and not job.transfer.resumable


def is_early(job: Job, facts: Facts) -> bool:
    """Its time lies ahead."""
    return job.not_before is not None and job.not_before > facts.now


def is_blocked(job: Job, facts: Facts) -> bool:
    """It still waits for another job."""
    return job.blocked


def is_broken(job: Job, facts: Facts) -> bool:
    """A job that must succeed before it has not."""
    return facts.broken


def is_looping(job: Job, facts: Facts) -> bool:
    """A process that was running at too many crashes in a short time, and came no further."""
    return job.transfer is None and len(_in_vain(job, facts.now)) >= _LOOP


def is_looping_with_undo(job: Job, facts: Facts) -> bool:
    """The same, and something is to be undone."""
    return is_looping(job, facts) and has_undo(job, facts)


def may_retry(job: Job, facts: Facts) -> bool:
    """The kind grants another attempt; a transfer has none."""
    return facts.retry_at is not None and job.transfer is None


def has_failed(job: Job, facts: Facts) -> bool:
    """The journal runs because of an error, not of a cancel."""
    return job.error is not None


def forced(job: Job, facts: Facts) -> bool:
    """The command asks to end the grace, and nobody did before."""
    return facts.force and job.deadline_step < 2


def warns(job: Job, facts: Facts) -> bool:
    """First deadline: say so."""
    return job.deadline_step == 0


def forces(job: Job, facts: Facts) -> bool:
    """Second deadline: the grace is over."""
    return job.deadline_step == 1


_SIGNAL = (Effect.SIGNAL, Effect.ALARM)
_KEEP_QUEUE = (Effect.RELEASE, Effect.QUEUE)

TRANSITIONS: Final[dict[tuple[str, Input], tuple[Row, ...]]] = {
    (SCHEDULED, Input.PAUSE): (Row(PAUSED),),
    (QUEUED, Input.PAUSE): (Row(PAUSED),),
    (RUNNING, Input.PAUSE): (Row(PAUSING, 202, _SIGNAL),),
    (PAUSING, Input.PAUSE): (Row(PAUSING, 202),),
    (PAUSED, Input.PAUSE): (Row(PAUSED),),
    (SCHEDULED, Input.RESUME): (Row(SCHEDULED),),
    (QUEUED, Input.RESUME): (Row(QUEUED),),
    (RUNNING, Input.RESUME): (Row(RUNNING),),
    (PAUSING, Input.RESUME): (Row(RUNNING, 200, (Effect.SIGNAL,)),),
    (PAUSED, Input.RESUME): (
        Row(RUNNING, 200, (Effect.SIGNAL,), is_transfer),
        Row(SCHEDULED, 202, (), is_blocked),
        Row(SCHEDULED, 202, (Effect.ALARM,), is_early),
        Row(QUEUED, 202, (Effect.QUEUE,)),
    ),
    (SCHEDULED, Input.CANCEL): (
        Row(CANCELLING, 202, (Effect.ALARM, Effect.ROLLBACK), has_undo),
        Row(CANCELLED, 200, (Effect.SIGNAL, Effect.DISCARD)),
    ),
    (QUEUED, Input.CANCEL): (
        Row(CANCELLING, 202, (Effect.ALARM, Effect.ROLLBACK), has_undo),
        Row(CANCELLED, 200, (Effect.SIGNAL, Effect.DISCARD)),
    ),
    (RUNNING, Input.CANCEL): (Row(CANCELLING, 202, _SIGNAL),),
    (PAUSING, Input.CANCEL): (Row(CANCELLING, 202, _SIGNAL),),
    (PAUSED, Input.CANCEL): (Row(CANCELLING, 202, _SIGNAL),),
    (CANCELLING, Input.CANCEL): (
        Row(CANCELLING, 202, (Effect.FORCE, Effect.ALARM), forced, note=True),
        Row(CANCELLING, 202),
    ),
    (CANCELLED, Input.CANCEL): (Row(CANCELLED),),
    (SCHEDULED, Input.DUE): (Row(QUEUED, 200, (Effect.QUEUE,)),),
    (SCHEDULED, Input.RETRY_AT): (Row(QUEUED, 200, (Effect.QUEUE,)),),
    (SCHEDULED, Input.AFTER): (
        Row(CANCELLED, 200, (Effect.DISCARD,), is_broken),
        Row(SCHEDULED, 200, (Effect.ALARM,), is_early, note=True),
        Row(QUEUED, 200, (Effect.QUEUE,)),
    ),
    (PAUSED, Input.AFTER): (
        Row(CANCELLED, 200, (Effect.DISCARD,), is_broken),
        Row(PAUSED, note=True),
    ),
    (QUEUED, Input.CLAIM): (Row(RUNNING, 200, (Effect.START,)),),
    (RUNNING, Input.FINISH): (Row(SUCCEEDED, 200, (Effect.RELEASE,)),),
    (PAUSING, Input.FINISH): (Row(SUCCEEDED, 200, (Effect.RELEASE,)),),
    (CANCELLING, Input.FINISH): (Row(CANCELLING, 200, (Effect.ROLLBACK,)),),
    (RUNNING, Input.FAIL): (
        Row(SCHEDULED, 200, (Effect.RELEASE, Effect.ALARM), may_retry),
        Row(CANCELLING, 200, (Effect.ALARM, Effect.ROLLBACK), has_undo),
        Row(FAILED, 200, (Effect.RELEASE, Effect.DISCARD)),
    ),
    (PAUSING, Input.FAIL): (
        Row(PAUSED, 200, (Effect.RELEASE,), may_retry),
        Row(CANCELLING, 200, (Effect.ALARM, Effect.ROLLBACK), has_undo),
        Row(FAILED, 200, (Effect.RELEASE, Effect.DISCARD)),
    ),
    (PAUSED, Input.FAIL): (Row(FAILED, 200, (Effect.DISCARD,), is_transfer),),
    (CANCELLING, Input.FAIL): (Row(CANCELLING, 200, (Effect.ROLLBACK,)),),
    (PAUSING, Input.UNWOUND): (Row(PAUSED, 200, (Effect.RELEASE,)),),
    (CANCELLING, Input.UNWOUND): (Row(CANCELLING, 200, (Effect.ROLLBACK,)),),
    # A pause was withdrawn after the runner had let go: it starts again from its cursor.
    (RUNNING, Input.UNWOUND): (
        Row(RUNNING, 200, (), is_transfer),
        Row(QUEUED, 200, _KEEP_QUEUE),
    ),
    (RUNNING, Input.CRASH): (
        Row(FAILED, 200, (Effect.DISCARD,), is_fragile),
        Row(RUNNING, 200, (Effect.SIGNAL,), is_transfer, note=True),
        Row(CANCELLING, 200, (Effect.ALARM, Effect.ROLLBACK), is_looping_with_undo),
        Row(FAILED, 200, (Effect.DISCARD,), is_looping),
        Row(QUEUED, 200, (Effect.QUEUE,)),
    ),
    (PAUSING, Input.CRASH): (
        Row(FAILED, 200, (Effect.DISCARD,), is_fragile),
        Row(PAUSED),
    ),
    (PAUSED, Input.CRASH): (Row(FAILED, 200, (Effect.DISCARD,), is_fragile),),
    (CANCELLING, Input.CRASH): (Row(CANCELLING, 200, (Effect.ALARM, Effect.ROLLBACK), note=True),),
    (RUNNING, Input.SHUTDOWN): (
        Row(FAILED, 200, (Effect.DISCARD,), is_fragile),
        Row(RUNNING, 200, (), is_transfer, note=True),
        Row(QUEUED, 200, (Effect.RELEASE,)),
    ),
    (PAUSING, Input.SHUTDOWN): (
        Row(FAILED, 200, (Effect.DISCARD,), is_fragile),
        Row(PAUSED, 200, (Effect.RELEASE,)),
    ),
    (PAUSED, Input.SHUTDOWN): (Row(FAILED, 200, (Effect.DISCARD,), is_fragile),),
    (PAUSING, Input.DEADLINE): (
        Row(PAUSING, 200, (Effect.ALARM,), warns, note=True),
        Row(PAUSING, 200, (Effect.FORCE, Effect.ALARM), forces, note=True),
        Row(PAUSED, 200, (Effect.RELEASE,)),
    ),
    (CANCELLING, Input.DEADLINE): (
        Row(CANCELLING, 200, (Effect.ALARM,), warns, note=True),
        Row(CANCELLING, 200, (Effect.FORCE, Effect.ALARM), forces, note=True),
        Row(FAILED, 200, (Effect.RELEASE, Effect.DISCARD), has_failed),
        Row(CANCELLED, 200, (Effect.RELEASE, Effect.DISCARD)),
    ),
    (RUNNING, Input.EXPIRE): (Row(CANCELLED, 200, (Effect.SIGNAL, Effect.DISCARD), is_transfer),),
    (PAUSED, Input.EXPIRE): (Row(CANCELLED, 200, (Effect.SIGNAL, Effect.DISCARD), is_transfer),),
    (CANCELLING, Input.UNDONE): (
        Row(FAILED, 200, (Effect.RELEASE,), has_failed),
        Row(CANCELLED, 200, (Effect.RELEASE,)),
    ),
}

# The word that the event carries for each internal input; a command's is "command".
_CAUSES: Final = {
    Input.DUE: "due",
    Input.CLAIM: "claimed",
    Input.FINISH: "done",
    Input.FAIL: "error",
    Input.UNWOUND: "checkpoint",
    Input.CRASH: "crash",
    Input.SHUTDOWN: "shutdown",
    Input.DEADLINE: "deadline",
    Input.RETRY_AT: "due",
    Input.AFTER: "after",
    Input.EXPIRE: "expired",
    Input.UNDONE: "undone",
}

_WAITED_FOR: Final = frozenset({Input.DUE, Input.RETRY_AT, Input.AFTER})
_WANTS: Final = {PAUSING: "pause", PAUSED: "pause", CANCELLING: "cancel", CANCELLED: "cancel"}


def decide(job: Job, input: Input, facts: Facts) -> Decision | None:
    """What becomes of ``job``; None when an internal event came too late to matter.

    Raises job-finished or job-cancelling (409) for a command that the state does not allow; the
    problem carries the job's state, so that a command that lost a race says so.
    """
    if input is Input.DEADLINE and (job.deadline_at or facts.now) > facts.now:
        return None  # an alarm of an earlier state, or of a deadline that was moved
    if job.blocked != (input is Input.AFTER) and input in _WAITED_FOR:
        return None  # the clock does not start what waits for another job, nor the other way round
    for row in TRANSITIONS.get((job.state, input), ()):
        if row.when is None or row.when(job, facts):
            changed = row.to != job.state or row.note
            after = _moved(job, input, row, facts) if changed else job
            cause = "command" if input in COMMANDS else _CAUSES[input]
            return Decision(after, row.status, row.effects, cause, changed)
    if input not in COMMANDS:
        return None
    code = "job-cancelling" if job.state == CANCELLING else "job-finished"
    raise SluiceError(
        code, f"The job is {job.state}: {input.value} is not possible.", job=job.id, state=job.state
    )


def _moved(job: Job, input: Input, row: Row, facts: Facts) -> Job:
    """The row after the transition: the fields that follow from the new state."""
    change: dict[str, Any] = {
        "state": row.to,
        "version": job.version + 1,
        "want": _WANTS.get(row.to, "cancel" if job.want == "cancel" else "run"),
        "reason": facts.reason or (None if input in COMMANDS else _reason(input, job)),
    }
    if facts.by is not None:
        change["by"] = facts.by
    if row.to != job.state:
        change |= {"deadline_at": None, "deadline_step": 0}
    if row.to in FINAL:
        change["ended_at"] = facts.now
    if job.blocked and row.to not in (SCHEDULED, PAUSED):
        change["blocked"] = False
    change |= _of_state(job, input, row.to, facts)
    change |= _of_input(job, input, row.to, facts)
    return msgspec.structs.replace(job, **change)


def _reason(input: Input, job: Job) -> str | None:
    if input in (Input.CRASH, Input.SHUTDOWN):
        return str(input.value)
    if input is Input.EXPIRE:
        return "expired"
    return job.reason if input in (Input.UNWOUND, Input.DEADLINE, Input.UNDONE) else None


def _of_state(job: Job, input: Input, to: str, facts: Facts) -> dict[str, Any]:
    """Fields that every way into a state sets. Each deadline has three steps: warn, force, end."""
    if to in (PAUSING, CANCELLING):
        forced_now = input is Input.CANCEL and job.state == CANCELLING
        step = job.deadline_step + 1 if input is Input.DEADLINE else 2 * forced_now
        wait_ms = (facts.warn_ms, facts.grace_ms - facts.warn_ms, _END_MS)[min(step, 2)]
        return {"deadline_step": step, "deadline_at": facts.now + wait_ms}
    if to == RUNNING:
        return {"started_at": job.started_at or facts.now}
    return {}


def _of_input(job: Job, input: Input, to: str, facts: Facts) -> dict[str, Any]:
    """Fields that only this input sets."""
    change: dict[str, Any] = {}
    if input is Input.FINISH and to == SUCCEEDED:
        change = {"result": facts.result, "error": None, "artifacts": facts.artifacts}
    elif input is Input.FAIL or (input is Input.SHUTDOWN and to == FAILED):
        change = {"error": None if to in (SCHEDULED, PAUSED) else facts.error}
        if to in (SCHEDULED, PAUSED):
            change |= {"attempt": job.attempt + 1, "not_before": facts.retry_at}
            change["retries"] = job.retries + 1
    elif input is Input.CRASH:
        change = _of_crash(job, to, facts)
    elif input is Input.AFTER:
        change = {"blocked": False}
        if to == CANCELLED:
            change |= {"error": facts.error, "reason": "after"}
    elif input is Input.UNDONE:
        change = {"rollback": facts.rollback}
    elif input is Input.DEADLINE and to != job.state:
        change = {"reason": "forced"}
    if to == QUEUED and job.rank >= 0 and input not in _WAITED_FOR:
        change["rank"] = FRONT + job.created_at
    return change


def _of_crash(job: Job, to: str, facts: Facts) -> dict[str, Any]:
    """Fields that a crash sets. One of a process that was running is counted."""
    change: dict[str, Any] = {"attempt": job.attempt + (to == QUEUED)}
    if job.state == RUNNING and job.transfer is None:
        change["crashes"] = (*_in_vain(job, facts.now), facts.now)
        change["crashed_at"] = job.progress.done
    if to == FAILED or (to == CANCELLING and job.state == RUNNING):
        change["error"] = facts.error
    return change


def _in_vain(job: Job, now: int) -> tuple[int, ...]:
    """The crashes since the job has last come further."""
    if job.progress.done > job.crashed_at:
        return ()
    return tuple(at for at in job.crashes if at > now - _LOOP_MS)


def created(job: Job, facts: Facts) -> Job:
    """The first row of a job: running for a transfer, else scheduled or queued."""
    if job.transfer is not None:
        state = RUNNING
    else:
        state = SCHEDULED if job.blocked or is_early(job, facts) else QUEUED
    return msgspec.structs.replace(
        job,
        state=state,
        version=1,
        by=facts.by,
        rank=job.created_at,
        started_at=facts.now if state == RUNNING else None,
    )


def noted(job: Job, **change: Any) -> Job:
    """The row after something worth an event that is no transition (renamed, client gone)."""
    return msgspec.structs.replace(job, version=job.version + 1, **change)


def violations(job: Job) -> list[str]:
    """Which invariants the row breaks; empty for a sound one."""
    found = []
    if (job.ended_at is not None) != (job.state in FINAL):
        found.append("ended_at is set exactly in final states")
    if (job.deadline_at is not None) != (job.state in (PAUSING, CANCELLING)):
        found.append("a deadline is set exactly in pausing and cancelling")
    if job.state in _WANTS and job.want != _WANTS[job.state]:
        found.append("want follows the state")
    if job.state == FAILED and job.error is None:
        found.append("a failed job has an error")
    if job.state == SUCCEEDED and job.error is not None:
        found.append("a succeeded job has no error")
    if job.transfer is not None and job.state in (SCHEDULED, QUEUED):
        found.append("a transfer never queues")
    if job.blocked and job.state not in (SCHEDULED, PAUSED):
        found.append("only a job that has not begun waits for others")
    return found


def describe() -> str:
    """docs/states.md: the table as a diagram and as text."""
    lines = [
        "<!-- made by: python -m jobs.states > docs/states.md -->",
        "# The states of a job",
        "",
        "Drawn from the table in `jobs/states.py`. What the table does not hold is refused with",
        "409 (a command) or ignored (an internal event that came too late).",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> scheduled: start, time ahead or after another job",
        "    [*] --> queued: start",
        "    [*] --> running: start of a transfer",
    ]
    edges: dict[tuple[str, str], list[str]] = {}
    for (state, input), rows in TRANSITIONS.items():
        for row in rows:
            if row.to != state:
                edges.setdefault((state, row.to), []).append(input.value)
    lines += [f"    {a} --> {b}: {', '.join(dict.fromkeys(w))}" for (a, b), w in edges.items()]
    lines += [f"    {state} --> [*]" for state in STATES if state in FINAL]
    lines += [
        "```",
        "",
        "| in | input | if | becomes | answer | then |",
        "|---|---|---|---|---|---|",
    ]
    for (state, input), rows in TRANSITIONS.items():
        for row in rows:
            when = (row.when.__doc__ or "").strip().rstrip(".") if row.when else ""
            status = str(row.status) if input in COMMANDS else ""
            then = "; ".join(effect.value for effect in row.effects)
            lines.append(f"| {state} | {input.value} | {when} | {row.to} | {status} | {then} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
