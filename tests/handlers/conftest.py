"""One server for all tests of a module, and a caller of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.handlers.clients import Caller
from tests.harness import Server


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The module's server, with the module's OPTIONS if it has any; its log is checked."""
    folder = tmp_path_factory.mktemp("site") / "data"
    server = Server(folder, *getattr(request.module, "OPTIONS", ()))
    yield server.start()
    server.close()


@pytest.fixture
def name() -> str:
    """A file name that no other test uses."""
    return f"{uuid4().hex[:12]}.bin"


@pytest.fixture
def caller(site: Server) -> Caller:
    """A client of the module's server whose transfers no other test sees as its own."""
    return Caller(site, uuid4().hex[:12])
