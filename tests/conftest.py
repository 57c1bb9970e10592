"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Server

Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers on folders of the test's own; each is stopped and its log checked."""
    servers: list[Server] = []

    def start(*options: str, name: str = "data", ready: bool = True) -> Server:
        server = Server(tmp_path / name, *options)
        servers.append(server)
        return server.start(ready=ready)

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve: Serve) -> Server:
    """One server with its defaults."""
    return serve()


def missing(what: str) -> None:
    """Skip for want of a program; where nothing may be skipped, fail."""
    if os.environ.get("SLUICE_CI"):
        pytest.fail(f"{what} is missing here")
    pytest.skip(f"{what} is missing here")
