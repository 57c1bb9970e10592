"""The meter: what a job's progress, rate and time left are, for a clock that the test moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.progress import Meter
from storage import Progress


def run(meter: Meter, now: float, seconds: float, per_s: float) -> float:
    """Let the job make ``per_s`` a second, looked at ten times a second; the time afterwards."""
    done, step = float(meter.done), 0.1
    for _ in range(round(seconds / step)):
        now += step
        done += per_s * step
        meter.mark(round(done))
        meter.progress(now)
    return now


def test_nothing_is_claimed_at_the_start() -> None:
    """A job that has just begun has neither a rate nor a time left."""
    meter = Meter("bytes")
    meter.mark(0, 1000)
    assert meter.progress(5.0) == Progress(done=0, total=1000, unit="bytes")


def test_steady_job_has_its_rate() -> None:
    """What makes 100 a second for a while is told to make 100 a second."""
    meter = Meter("steps")
    meter.mark(0)
    meter.progress(0.0)
    run(meter, 0.0, 5, 100)
    assert meter.progress(5.0).rate_per_s == pytest.approx(100, rel=0.02)


def test_rate_has_a_half_life_of_two_seconds() -> None:
    """Two seconds after the speed has changed, the rate is half way to the new one."""
    meter = Meter("steps")
    meter.mark(0)
    meter.progress(0.0)
    now = run(meter, 0.0, 20, 1000)
    now = run(meter, now, 2, 3000)
    assert meter.progress(now).rate_per_s == pytest.approx(2000, rel=0.03)


def test_rate_does_not_depend_on_who_looks() -> None:
    """Asking a hundred times in a tenth of a second changes nothing."""
    meter = Meter("steps")
    meter.mark(0)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    looks = {meter.progress(now + i / 1001).rate_per_s for i in range(100)}
    assert len(looks) <= 2
    assert looks.pop() == pytest.approx(100, rel=0.05)


def test_pause_stops_the_clock() -> None:
    """An hour of pause counts for nothing, even if the progress is looked at all the while."""
    meter = Meter("steps")
    meter.mark(0, 10_000)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    meter.hold()
    for minute in range(60):
        assert meter.progress(now + 60 * minute).rate_per_s is None
        assert meter.progress(now + 60 * minute).eta_s is None
    now += 3600
    now = run(meter, now, 5, 100)
    assert meter.progress(now).rate_per_s == pytest.approx(100, rel=0.05)


def test_time_left_is_an_interval_around_the_truth() -> None:
    """A steady job with 1,000 steps to go at 100 a second has about ten seconds left."""
    meter = Meter("steps")
    meter.mark(0, 1500)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    eta = meter.progress(now).eta_s
    assert eta is not None
    assert eta[0] <= 10.1
    assert eta[1] >= 9.9
    assert eta[1] - eta[0] < 1


def test_time_left_is_wider_for_an_unsteady_job() -> None:
    """A job that runs in bursts gets a wider interval than a steady one of the same speed."""
    meter = Meter("steps")
    meter.mark(0, 10_000)
    now = 0.0
    meter.progress(now)
    for _ in range(10):
        now = run(meter, now, 0.5, 200)
        now = run(meter, now, 0.5, 0)
    eta = meter.progress(now).eta_s
    assert eta is not None
    assert eta[1] > 1.3 * eta[0]


def test_the_steadiest_job_has_an_interval() -> None:
    """No machine goes on at exactly the same pace: 100 seconds are told as about 97 to 103."""
    meter = Meter("steps")
    meter.mark(0, 10_500)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    assert meter.progress(now).eta_s == pytest.approx((97, 103), abs=1)


def test_each_phase_has_its_own_rate() -> None:
    """What came before a new phase tells nothing about its rate, or about the time left."""
    meter = Meter("steps")
    meter.mark(0, 10_000, "reading")
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 1000)
    meter.mark(phase="writing")
    found = meter.progress(now)
    assert (found.phase, found.rate_per_s, found.eta_s) == ("writing", None, None)
    now = run(meter, now, 2.8, 100)
    assert meter.progress(now).eta_s is None
    now = run(meter, now, 0.4, 100)
    meter.mark(phase="writing")  # no new one
    found = meter.progress(now)
    assert found.rate_per_s == pytest.approx(100, rel=0.05)
    assert found.eta_s == pytest.approx((45, 48), rel=0.05)


def test_no_time_left_is_told_where_the_job_says_so() -> None:
    """A job that knows that its pace will be another one has a rate, but no time left."""
    meter = Meter("steps")
    meter.mark(0, 10_000, eta=False)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    assert meter.progress(now).rate_per_s == pytest.approx(100, rel=0.05)
    assert meter.progress(now).eta_s is None
    meter.mark(eta=True)
    assert meter.progress(now).eta_s is not None


@pytest.mark.parametrize("seconds", [0.0, 1.0, 2.8])
def test_no_time_left_is_told_too_early(seconds: float) -> None:
    """In the first three seconds there is no time left: it would be a guess."""
    meter = Meter("steps")
    meter.mark(0, 1000)
    meter.progress(0.0)
    now = run(meter, 0.0, seconds, 100)
    assert meter.progress(now).eta_s is None


def test_no_time_left_without_a_total() -> None:
    """What has no known end has no time left."""
    meter = Meter("rows")
    meter.mark(0)
    meter.progress(0.0)
    now = run(meter, 0.0, 10, 100)
    assert meter.progress(now).eta_s is None


def test_no_time_left_for_a_job_that_stands_still() -> None:
    """A job that has stopped moving has no time left rather than a thousand years."""
    meter = Meter("bytes")
    meter.mark(0, 1000)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    for _ in range(3000):
        now += 1
        meter.progress(now)
    assert meter.progress(now).eta_s is None


def test_done_never_goes_back() -> None:
    """A late or smaller number is ignored; so is what was done before a restart."""
    meter = Meter("steps", Progress(done=40, total=100, phase="reading"))
    meter.mark(30)
    assert meter.progress(0.0).done == 40
    meter.mark(41, message="on")
    assert meter.progress(0.0) == Progress(done=41, total=100, phase="reading", message="on")


def test_work_from_before_a_restart_is_no_speed() -> None:
    """A job that goes on at 1,000,000 did not do them in its first tenth of a second."""
    meter = Meter("steps", Progress(done=1_000_000, total=2_000_000))
    meter.mark(1_000_000)
    meter.progress(0.0)
    now = run(meter, 0.0, 5, 100)
    assert meter.progress(now).rate_per_s == pytest.approx(100, rel=0.05)


def test_finished_is_whole() -> None:
    """A job that succeeded is at its total, and has neither a rate nor a time left."""
    meter = Meter("bytes")
    meter.mark(999, 1000, "writing", "almost")
    done = Progress(done=1000, total=1000, unit="bytes", phase="writing", message="almost")
    assert meter.finished() == done
    endless = Meter("rows")
    endless.mark(7)
    assert endless.finished() == Progress(done=7, total=7, unit="rows")


def test_a_total_that_was_too_low_grows() -> None:
    """More than all of it is never done, also not at the end."""
    meter = Meter("rows")
    meter.mark(90, 100)
    meter.mark(total=80)
    assert (meter.progress(0.0).done, meter.progress(0.0).total) == (90, 90)
    assert (meter.finished().done, meter.finished().total) == (90, 90)
    meter.mark(total=200)
    assert (meter.progress(0.0).done, meter.progress(0.0).total) == (90, 200)


def test_a_phase_that_counts_anew_takes_nothing_back() -> None:
    """What was done stays done; the phase shows as soon as it is further."""
    meter = Meter("rows")
    meter.mark(100, 100, "reading")
    meter.mark(0, 50, "writing")
    assert (meter.progress(0.0).done, meter.progress(0.0).total) == (100, 100)
    meter.mark(101, 150)
    assert (meter.progress(0.0).done, meter.progress(0.0).total) == (101, 150)


def test_what_is_done_again_has_no_rate() -> None:
    """After a resume from an older cursor nothing is told of the pace, until it is further."""
    meter = Meter("rows", Progress(done=1000, total=2000))
    now = 0.0
    for done in range(0, 1000, 10):
        now += 0.1
        meter.mark(done)
        found = meter.progress(now)
        assert (found.done, found.rate_per_s, found.eta_s) == (1000, None, None)
    now = run(meter, now, 10, 100)
    assert meter.progress(now).rate_per_s == pytest.approx(100, rel=0.1)


# What a job and its keeper do: marks of any kind, pauses, looks, and a crash with a resume.
lives = st.lists(
    st.one_of(
        st.tuples(
            st.just("mark"),
            st.one_of(st.none(), st.integers(0, 1000)),
            st.one_of(st.none(), st.integers(0, 1000)),
            st.sampled_from([None, "one", "two"]),
        ),
        st.tuples(st.sampled_from(["hold", "look", "resume"])),
    ),
    max_size=80,
)


@given(lives, st.lists(st.floats(0, 100), min_size=80, max_size=80))
def test_progress_never_lies(moves: list[tuple[Any, ...]], waits: list[float]) -> None:
    """Over marks, phases, pauses and resumes: never back, never beyond the total, whole at the end.

    A rate and a time left are only of what moves: while the job is held there is neither.
    """
    meter, now, before, held = Meter("rows"), 0.0, 0, False
    for (what, *values), wait_s in zip(moves, waits, strict=False):
        now += wait_s
        if what == "mark":
            held = held and (values[0] is None or values[0] <= before)
            meter.mark(*values)
        elif what == "hold":
            meter.hold()
            held = True
        elif what == "resume":  # from the row that was stored last
            meter = Meter("rows", meter.progress(now))
            held = before > 0
        found = meter.progress(now)
        assert found.done >= before
        assert found.total is None or found.total >= found.done
        if held:
            assert (found.rate_per_s, found.eta_s) == (None, None)
        if found.eta_s is not None:
            assert found.total is not None
            assert 0 <= found.eta_s[0] <= found.eta_s[1] < math.inf
        before = found.done
    end = meter.finished()
    assert end.total is not None
    assert end.done == end.total >= before
    assert (end.rate_per_s, end.eta_s) == (None, None)


moves = st.lists(
    st.tuples(
        st.sampled_from(["mark", "hold", "look"]),
        st.integers(0, 2**60),
        st.floats(0, 1e5, allow_nan=False),
    ),
    max_size=60,
)


@given(moves, st.one_of(st.none(), st.integers(0, 2**60)))
def test_whatever_happens_the_numbers_are_sound(
    moves: list[tuple[str, int, float]], total: int | None
) -> None:
    """done never falls, the rate is no less than 0, an interval is finite and in order."""
    meter, now, before = Meter("bytes"), 0.0, 0
    meter.mark(0, total)
    for what, value, passed_s in moves:
        now += passed_s
        if what == "mark":
            meter.mark(value)
        elif what == "hold":
            meter.hold()
        found = meter.progress(now)
        assert found.done >= before
        before = found.done
        assert found.rate_per_s is None or (
            found.rate_per_s >= 0 and math.isfinite(found.rate_per_s)
        )
        if found.eta_s is not None:
            low, high = found.eta_s
            assert 0 <= low <= high < math.inf
