"""The directions in which the service may import, and the ways to a thread that it does not take.

Each file is read with `ast`, never run, so the rules hold for a file as soon as it appears. A name
that is imported is traced to the longest module of ours that it names: `from handlers import tus`
is `handlers.tus`, `from jobs.kinds import Context` is `jobs.kinds`. Each rule is a small function
from one import to a complaint; the tables at the end keep the rules themselves honest.
"""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
RANK = {"server": 4, "handlers": 3, "jobs": 2, "storage": 1, "errors": 0, "config": 0}
PACKAGES = ("handlers", "jobs", "storage")
SHARED_HANDLERS = frozenset(
    {
        "handlers",
        *(
            f"handlers.{name}"
            for name in (
                *("asyncapi", "auth", "base", "feed", "fields", "growing", "messages", "now"),
                *("pipe", "ranges", "send", "socket", "wire"),
            )
        ),
    }
)
OPENERS = frozenset({"open_state", "open_blobs"})
THREAD_MODULES = ("threading", "_thread", "concurrent")
THREAD_NAMES = frozenset(
    {"run_in_executor", "to_thread", "create_subprocess_exec", "create_subprocess_shell"}
)


class Import(NamedTuple):
    """`module` imports `name`, which belongs to `ours`, a module of the service, if not empty."""

    module: str
    name: str
    ours: str
    line: int
    function: str


def service_files() -> list[PurePosixPath]:
    found = [*ROOT.glob("*.py")]
    for package in PACKAGES:
        found += ROOT.joinpath(package).rglob("*.py")
    return sorted(PurePosixPath(file.relative_to(ROOT)) for file in found)


def module_of(file: PurePosixPath) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def is_under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def owner_of(name: str, known: frozenset[str]) -> str:
    """Return the module of ours that defines `name`, or nothing for a library's."""
    if name.partition(".")[0] not in RANK:
        return ""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def walk(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Yield each node with the name of the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        inner = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = child.name
        yield from walk(child, inner)


def imported_names(node: ast.AST, file: PurePosixPath) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = file.parent.parts[: len(file.parent.parts) - node.level + 1] if node.level else ()
    base = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(tree: ast.Module, file: PurePosixPath, known: frozenset[str]) -> Iterator[Import]:
    for node, function in walk(tree):
        for name in imported_names(node, file):
            line = getattr(node, "lineno", 0)
            yield Import(module_of(file), name, owner_of(name, known), line, function)


def points_up(found: Import) -> str:
    top, target = found.module.partition(".")[0], found.ours.partition(".")[0]
    if target in ("", "errors", top):
        return ""
    if target == "config":
        return "" if top == "server" else "only server.py reads the configuration"
    if top == "handlers" and target == "storage":
        return "handlers reach bytes and rows only through jobs"
    return "" if RANK.get(top, 0) > RANK[target] else f"{top} is not above {target}"


def reaches_the_web(found: Import) -> str:
    below = found.module.partition(".")[0] in ("jobs", "storage")
    return "no HTTP below handlers" if below and is_under(found.name, "tornado.web") else ""


def joins_dialects(found: Import) -> str:
    """Whatever is not shared is a dialect; only the page of all routes knows every one."""
    if not found.ours.startswith("handlers.") or found.module in ("handlers", "server"):
        return ""
    shared = found.ours in SHARED_HANDLERS or found.ours == found.module
    return "" if shared else f"{found.ours} is a dialect of its own"


def joins_backends(found: Import) -> str:
    backends = ("storage.state_", "storage.blobs_")
    if not found.ours.startswith(backends) or found.ours == found.module:
        return ""
    return "" if found.function in OPENERS else "a backend is only reached through its contract"


def widens_kinds(found: Import) -> str:
    if found.module == "jobs.kinds":
        return "the contract of kinds needs no storage" if is_under(found.ours, "storage") else ""
    if not found.module.startswith("jobs.kinds.") or found.ours in ("", "errors", "jobs.kinds"):
        return ""
    if found.ours.startswith("jobs.kinds._"):
        return ""
    return "a kind imports its contract, errors and libraries"


def hides(found: Import) -> str:
    opens = found.module == "storage" and found.function in OPENERS
    return "imports stand at the top of the file" if found.function and not opens else ""


def threads(found: Import) -> str:
    return "no threads" if any(is_under(found.name, name) for name in THREAD_MODULES) else ""


RULES = (points_up, reaches_the_web, joins_dialects, joins_backends, widens_kinds, hides, threads)


def forbidden_names(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Yield the uses of names that start a thread, or that open storage outside of server.py."""
    for node in ast.walk(tree):
        names = {getattr(node, "attr", ""), getattr(node, "id", "")}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        if names & THREAD_NAMES:
            yield getattr(node, "lineno", 0), "this starts a thread"
        if names & OPENERS and module not in ("server", "storage"):
            yield getattr(node, "lineno", 0), "only server.py opens storage"


def complaints(file: PurePosixPath, source: str, known: frozenset[str]) -> list[str]:
    tree = ast.parse(source, str(file))
    found = [
        (found.line, f"{found.name}: {said}")
        for found in imports(tree, file, known)
        for rule in RULES
        if (said := rule(found))
    ]
    found += forbidden_names(tree, module_of(file))
    return [f"{file}:{line}: {said}" for line, said in sorted(found)]


@pytest.mark.parametrize("file", service_files(), ids=str)
def test_each_file_imports_only_what_it_may(file: PurePosixPath) -> None:
    """Imports run down: server, handlers, jobs, storage."""
    known = frozenset(module_of(file) for file in service_files())
    assert complaints(file, ROOT.joinpath(file).read_text(encoding="utf-8"), known) == []


EXAMPLES = frozenset(
    {
        *("server", "config", "errors", "handlers", "handlers.base", "handlers.tus"),
        *("handlers.simple", "handlers.jobs", "jobs", "jobs.manager", "jobs.kinds"),
        *("jobs.kinds.count", "jobs.kinds.digest", "jobs.kinds._words"),
        *("storage", "storage.state_sqlite"),
        *("storage.state_redis", "storage.blobs_local"),
    }
)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("storage/state_sqlite.py", "import jobs.manager"),
        ("storage/__init__.py", "from jobs import manager"),
        ("jobs/manager.py", "from handlers import base"),
        ("jobs/manager.py", "import server"),
        ("jobs/manager.py", "from ..handlers.base import BaseHandler"),
        ("handlers/tus.py", "from storage import State"),
        ("handlers/tus.py", "import config"),
        ("jobs/manager.py", "from config import Config"),
        ("config.py", "import jobs.manager"),
        ("errors.py", "from storage import State"),
        ("errors.py", "import config"),
        ("jobs/manager.py", "import tornado.web"),
        ("jobs/manager.py", "from tornado import web"),
        ("storage/state_sqlite.py", "from tornado.web import HTTPError"),
        ("handlers/tus.py", "import handlers.simple"),
        ("handlers/tus.py", "from handlers import simple"),
        ("handlers/tus.py", "from . import simple"),
        ("handlers/tus.py", "from .simple import Upload"),
        ("handlers/base.py", "from handlers.jobs import JobHandler"),
        ("storage/state_redis.py", "from storage.state_sqlite import SqliteState"),
        ("storage/blobs_local.py", "from storage import state_sqlite"),
        ("jobs/manager.py", "import storage.state_sqlite"),
        ("jobs/kinds/count.py", "from jobs.kinds import digest"),
        ("jobs/kinds/_words.py", "from jobs.kinds import digest"),
        ("jobs/kinds/count.py", "from jobs.manager import Manager"),
        ("jobs/kinds/count.py", "import storage"),
        ("jobs/kinds/__init__.py", "from storage import Blobs"),
        ("jobs/manager.py", "def start():\n    import json"),
        (
            "jobs/manager.py",
            "class A:\n async def b(self):\n  if self:\n   import c",
        ),
        ("handlers/tus.py", "def open_state():\n    import json"),
        ("jobs/manager.py", "import threading"),
        ("jobs/manager.py", "from threading import Lock"),
        ("jobs/manager.py", "import concurrent.futures"),
        ("jobs/manager.py", "from concurrent import futures"),
        ("jobs/manager.py", "loop.run_in_executor(None, work)"),
        ("jobs/manager.py", "asyncio.to_thread(work)"),
        ("jobs/manager.py", "from asyncio import to_thread"),
        ("jobs/manager.py", "asyncio.create_subprocess_exec('true')"),
        ("jobs/manager.py", "from storage import open_state"),
        ("jobs/manager.py", "storage.open_blobs('file:///data')"),
    ],
)
def test_a_violation_is_seen(file: str, source: str) -> None:
    """Each rule of the design complains, with file and line, about the code that breaks it."""
    said = complaints(PurePosixPath(file), source, EXAMPLES)
    assert said
    assert said[0].startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("config.py", "import errors"),
        ("server.py", "import config, errors, jobs.manager\nfrom storage import open_state"),
        ("server.py", "from handlers import ROUTES, tus\nstorage.open_blobs('file:///data')"),
        ("handlers/__init__.py", "from handlers import simple, tus"),
        ("handlers/tus.py", "import errors\nfrom handlers.base import BaseHandler"),
        ("handlers/tus.py", "import tornado.web\nfrom jobs.manager import Manager"),
        ("handlers/jobs.py", "from jobs import kinds"),
        ("jobs/manager.py", "import tornado.ioloop\nfrom storage import State\nimport errors"),
        ("jobs/manager.py", "from jobs.kinds import count"),
        ("jobs/kinds/count.py", "import msgspec\nimport errors\nfrom jobs.kinds import Context"),
        ("jobs/kinds/count.py", "from jobs.kinds import _words\nimport jobs.kinds._words"),
        ("jobs/kinds/__init__.py", "import pkgutil"),
        ("storage/__init__.py", "def open_state():\n    from storage.state_sqlite import State"),
        ("storage/state_sqlite.py", "import sqlite3\nimport errors\nfrom storage import Stale"),
    ],
)
def test_what_the_design_allows_passes(file: str, source: str) -> None:
    """The rules do not complain about an import that runs down."""
    assert complaints(PurePosixPath(file), source, EXAMPLES) == []


def test_files_are_found() -> None:
    """The search looks where the service is, so that an empty result is not a success."""
    assert PurePosixPath("config.py") in service_files()
