"""Every Blobs backend keeps the contract."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import Blobs, open_blobs
from tests.storage import conformance_blobs as suite


@pytest.fixture(params=["file"])
def blobs_url(tmp_path: Path) -> str:
    """An empty place."""
    return f"file://{tmp_path}"


@pytest.fixture
def blobs(blobs_url: str, runner: asyncio.Runner) -> Iterator[Blobs]:
    """An empty place, open."""
    blobs = open_blobs(blobs_url, "interval")
    runner.run(blobs.open())
    yield blobs
    runner.run(blobs.close())


class TestWriting(suite.Writing):
    """Over every backend."""


class TestPublishing(suite.Publishing):
    """Over every backend."""


class TestReading(suite.Reading):
    """Over every backend."""


class TestRemoving(suite.Removing):
    """Over every backend."""


class TestPlacing(suite.Placing):
    """Over every backend."""


class TestJoining(suite.Joining):
    """Over every backend."""


class TestBundling(suite.Bundling):
    """Over every backend."""


class TestKeeping(suite.Keeping):
    """Over every backend."""
