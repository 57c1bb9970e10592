"""Every State backend keeps the contract."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import State, open_state
from tests.storage import conformance_state as suite


@pytest.fixture(params=["sqlite"])
def new_url(tmp_path: Path) -> suite.NewUrl:
    """Each call names an empty store of its own."""
    numbers = itertools.count()
    return lambda: f"sqlite://{tmp_path}/{next(numbers)}.db"


@pytest.fixture
def url(new_url: suite.NewUrl) -> str:
    """An empty store."""
    return new_url()


@pytest.fixture
def state(url: str, runner: asyncio.Runner) -> Iterator[State]:
    """An empty store, open."""
    state = open_state(url, "interval")
    runner.run(state.open())
    yield state
    runner.run(state.close())


class TestCreating(suite.Creating):
    """Over every backend."""


class TestCommitting(suite.Committing):
    """Over every backend."""


class TestSaving(suite.Saving):
    """Over every backend."""


class TestClaiming(suite.Claiming):
    """Over every backend."""


class TestChaining(suite.Chaining):
    """Over every backend."""


class TestFinding(suite.Finding):
    """Over every backend."""


class TestSearching(suite.Searching):
    """Over every backend."""


class TestKeying(suite.Keying):
    """Over every backend."""


class TestDeleting(suite.Deleting):
    """Over every backend."""


class TestLines(suite.Lines):
    """Over every backend."""


class TestLogging(suite.Logging):
    """Over every backend."""


class TestFiling(suite.Filing):
    """Over every backend."""


class TestGrouping(suite.Grouping):
    """Over every backend."""


class TestTogether(suite.Together):
    """Over every backend."""


class TestRestarting(suite.Restarting):
    """Over every backend."""


class TestModelling(suite.Modelling):
    """Over every backend."""
