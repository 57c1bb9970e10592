"""Tests that are coroutines run on a loop of their own, which must be left as clean as it was."""

import asyncio
import inspect
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine; a task left behind or an error nobody saw fails it."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    given: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}
    noise: list[str] = []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: noise.append(str(context)))
        runner.run(asyncio.wait_for(pyfuncitem.obj(**given), 300))
        left = asyncio.all_tasks(loop)
    assert not left
    assert not noise
    return True
