"""Tests that are coroutines run on one loop each, which must be left as clean as it was found."""

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

# The suites are no test modules by name; their assertions shall speak as plainly.
pytest.register_assert_rewrite("tests.storage.conformance_state", "tests.storage.conformance_blobs")


@pytest.fixture(autouse=True)
def runner() -> Iterator[asyncio.Runner]:
    """A loop for a test and its fixtures; a task left behind or an error nobody saw fails it."""
    noise: list[str] = []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: noise.append(str(context)))
        yield runner
        left = asyncio.all_tasks(loop)
    assert not left
    assert not noise


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine on the loop of its fixtures."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    given: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}
    runner = pyfuncitem.funcargs["runner"]
    assert isinstance(runner, asyncio.Runner)
    runner.run(pyfuncitem.obj(**given))
    return True
