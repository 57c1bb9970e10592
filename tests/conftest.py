"""Fixtures of all tests."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tornado.ioloop import IOLoop

from tests.harness import Server

Serve = Callable[..., Server]

# How long an example takes is the machine's doing.
settings.register_profile(
    "any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


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


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """The loop of pytest-tornado's tests; its own fixture leaves another one behind, unclosed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    io_loop = IOLoop.current()
    yield io_loop
    io_loop.close()
    asyncio.set_event_loop(None)


def missing(what: str) -> None:
    """Skip for want of a program; where nothing may be skipped, fail."""
    if os.environ.get("SLUICE_CI"):
        pytest.fail(f"{what} is missing here")
    pytest.skip(f"{what} is missing here")


def need(program: str) -> str:
    """The path of a program; without it the test is skipped, or fails, as ``missing`` says."""
    path = shutil.which(program)
    if path is None:
        missing(program)
    return str(path)
