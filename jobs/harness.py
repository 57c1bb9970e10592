"""Tries a kind: disturbs its job at every point, and compares the end with an undisturbed run.

    python server.py check [--kinds PATH] KIND [PARAMS-JSON] [FILE...]

    from jobs.harness import check
    check("mykinds/lines.py", {"file": "a.txt"}, {"a.txt": b"one\\ntwo\\n"})

Strategy. The job runs twice undisturbed; its points are counted, and both runs must come to the
same end. Then each mode of disturbance is tried at each point, or at a sample spread evenly over
them, every time on a fresh copy of the same folder (see trial.py). A job that was paused or killed
must end with the same ``result.data``, the same artefacts byte for byte, and the same files in its
working folder. One that was cancelled must leave nothing: no file, no unfinished blob, no entry of
its journal, no open file, no task and no process.

``examine`` is told how to open a folder by the program that puts the service together, and forks,
so its process must have neither threads nor a running loop. ``check`` runs that in a process of its
own, so that it fits in any test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import zip_longest
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import msgspec

from errors import SluiceError
from jobs.kinds import Kind, Registry, kind_in
from jobs.states import CANCELLED, FAILED, SUCCEEDED
from jobs.tables import TABLE
from jobs.trial import (
    ENDING,
    MODES,
    OF_PROGRAMS,
    Artefact,
    Open,
    Outcome,
    Plan,
    may,
    overseer,
    prepare,
    tree,
)

T = TypeVar("T")

_SAMPLE = 50
_MOST_AT_ONCE = 4
_TIMEOUT_S = 60.0
_BLOCK_BYTES = 1 << 20
_WAITS = 5  # waits for programs that are tried; how many there are is chance
_SHOWN = 20  # differences that the report for people has
_SHOWN_CHARS = 300
_ABOUT = "SELECT key, value FROM meta WHERE key != 'mark' ORDER BY key"
_PROGRAM = Path(__file__).parent.parent / "server.py"


class Misused(Exception):
    """What was asked for can't be tried; one line."""


class Ask(msgspec.Struct, kw_only=True):
    """What shall be tried."""

    kind: str  # a name, or the path of a file
    params: dict[str, Any] = {}
    files: list[str] = []  # stored under their names before the job starts
    kinds: list[str] = []
    sample: int = _SAMPLE  # points for each mode; 0 is all of them
    modes: list[str]
    ignore: list[str] = []  # fields of result.data that may differ, at any depth
    timeout_s: float = _TIMEOUT_S  # for one run of the job, with all that is done to it
    json: bool = False


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a disturbance has changed."""

    mode: str
    at: str  # such as "checkpoint 3"
    text: str


class Report(msgspec.Struct, kw_only=True):
    """What a check has found."""

    kind: str
    points: dict[str, int] = {}  # how many of each sort an undisturbed run has
    trials: dict[str, int] = {}  # how many of each mode have met their point
    missed: int = 0  # trials whose job ended before it came to their point
    differences: list[Difference] = []
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether no disturbance has changed anything."""
        return not self.differences

    def text(self) -> str:
        """The report for people."""
        points = ", ".join(f"{_count(n, sort)}" for sort, n in self.points.items())
        lines = [f"{self.kind}: {points or 'no point was reached'}; {self.seconds:.1f} s"]
        bad = Counter(difference.mode for difference in self.differences)
        for mode, n in self.trials.items():
            said = f"{bad[mode]} wrong" if bad[mode] else "as undisturbed"
            if mode in (*ENDING, "child") and not bad[mode]:
                said = "nothing is left"
            lines.append(f"  {mode:7} {n:4} times  {said:15} ({MODES[mode]})")
        if self.missed:
            lines.append(f"  {_count(self.missed, 'job')} ended before the point was reached")
        for found in self.differences[:_SHOWN]:
            lines.append(f"{found.mode or 'undisturbed'}, {found.at}: {found.text}")
        if (more := len(self.differences) - _SHOWN) > 0:
            lines.append(f"and {more} more")
        return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Misused(f"check: {message}")


def parse(argv: Sequence[str]) -> Ask:
    """Read what follows ``check``. ``--help`` prints and exits. Raises Misused."""
    parser = _Parser(
        prog="python server.py check",
        description="Run a kind undisturbed, then pause, kill and cancel it at every point.",
        allow_abbrev=False,
    )
    parser.add_argument("--kinds", metavar="PATH", action="append", default=[])
    parser.add_argument(
        "--sample",
        metavar="N",
        type=int,
        default=_SAMPLE,
        help=f"points at which each mode is tried, spread evenly; 0: all (default {_SAMPLE})",
    )
    parser.add_argument("--modes", metavar="MODE,...", default=",".join(MODES), help=_modes())
    parser.add_argument(
        "--ignore", metavar="FIELD", action="append", default=[], help="field of result.data"
    )
    parser.add_argument(
        "--timeout-s",
        metavar="S",
        type=float,
        default=_TIMEOUT_S,
        help=f"seconds for one run of the job (default {_TIMEOUT_S:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("kind", metavar="KIND", help="its name, or its file")
    parser.add_argument("rest", metavar="PARAMS-JSON FILE", nargs="*")
    given = parser.parse_args(list(argv))
    rest, params = given.rest, {}
    if rest and rest[0].lstrip().startswith("{"):
        try:
            params = json.loads(rest[0])
        except ValueError as error:
            raise Misused(f"check: the parameters are no JSON: {error}") from None
        rest = rest[1:]
    modes = [mode for mode in given.modes.split(",") if mode]
    if not modes or set(modes) - set(MODES):
        raise Misused(f"check: --modes are {', '.join(MODES)}")
    if given.sample < 0:
        raise Misused("check: --sample is a whole number from 0")
    return Ask(
        kind=given.kind,
        params=params,
        files=rest,
        kinds=[path for paths in given.kinds for path in paths.split(",") if path],
        sample=given.sample,
        modes=modes,
        ignore=given.ignore,
        timeout_s=given.timeout_s,
        json=given.json,
    )


def _modes() -> str:
    return "; ".join(f"{mode}: {meaning}" for mode, meaning in MODES.items())


# In a test


def check(
    kind: str | Path | Kind,
    params: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    *,
    kinds: Sequence[Path] = (),
    sample: int = _SAMPLE,
    modes: Sequence[str] = tuple(MODES),
    ignore: Sequence[str] = (),
    timeout_s: float = _TIMEOUT_S,
    options: Sequence[str] = (),
) -> Report:
    """Try a kind in a process of its own, as the command line does; the report if all is well.

    ``kind`` is a name, the path of a ``.py`` file, or a Kind; ``files`` are stored under their
    names first. ``sample=0`` tries every point. ``options`` are those of the server. Raises
    AssertionError with the report if a disturbance changes anything, ValueError if it can't be
    tried.
    """
    if isinstance(kind, Kind):
        kind = kind.name if kind.source[0] == "package" else kind.source[1]
    with tempfile.TemporaryDirectory(prefix="sluice-files-") as place:
        paths = []
        for name, content in (files or {}).items():
            path = Path(place) / name
            if isinstance(content, Path):
                os.symlink(content.resolve(), path)
            else:
                path.write_bytes(content)
            paths.append(str(path))
        flags = [f"--kinds={path}" for path in kinds] + [f"--ignore={name}" for name in ignore]
        flags += [f"--sample={sample}", f"--modes={','.join(modes)}"]
        flags += [f"--timeout-s={timeout_s}", "--json"]
        asked = [str(kind), json.dumps(dict(params or {})), *paths]
        done = subprocess.run(
            [sys.executable, str(_PROGRAM), *options, "check", *flags, "--", *asked],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    if done.returncode not in (0, 1) or not done.stdout:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    report = msgspec.json.decode(done.stdout, type=Report)
    if not report.ok:
        raise AssertionError(report.text())
    return report


# The examination


def examine(ask: Ask, opened: Open, load: Callable[[Sequence[Path]], Registry]) -> Report:
    """Try a kind; never raises for what the kind does. Raises Misused.

    ``load`` makes the registry, with the kinds of these paths, too.
    """
    begun = monotonic()
    kind = _find(ask, load)
    files = [Path(name) for name in ask.files]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise Misused(f"check: no such file: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="sluice-check-") as place:
        base = Path(place) / "base"
        _prepare(opened, base, files)
        examination = _Examination(ask, kind, opened, Path(place), base)
        examination.run()
    examination.report.seconds = monotonic() - begun
    return examination.report


def _find(ask: Ask, load: Callable[[Sequence[Path]], Registry]) -> Kind:
    """The kind that is meant, and whether its parameters will do. Raises Misused."""
    kinds = [Path(path) for path in ask.kinds]
    if missing := [str(path) for path in kinds if not path.exists()]:
        raise Misused(f"check: no such file or folder: {', '.join(missing)}")
    if ask.kind.endswith(".py"):
        try:
            kind = kind_in(Path(ask.kind))
        except Exception as error:
            raise Misused(f"check: {ask.kind} is no kind: {error}") from error
        registry = Registry([kind])
    else:
        registry = load(kinds)
        found = registry.get(ask.kind)
        if found is None:
            known = ", ".join(registry.names())
            said = "".join(f"; {problem.file}: {problem.detail}" for problem in registry.problems)
            raise Misused(f"check: no kind is named {ask.kind!r}; there are {known}{said}")
        kind = found
    try:
        registry.parse(kind.name, ask.params)
    except SluiceError as error:
        raise Misused(f"check: {error.detail}") from error
    return kind


def _prepare(opened: Open, base: Path, files: list[Path]) -> None:
    """Make the folder that each trial begins with, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            asyncio.run(prepare(opened, base, files))
            status = 0
        except (SluiceError, OSError) as error:
            print(f"sluice: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise Misused("check: the files can't be stored")


class _Examination:
    """The trials of one kind, and what they differ in."""

    def __init__(self, ask: Ask, kind: Kind, opened: Open, place: Path, base: Path) -> None:
        self.report = Report(kind=kind.name)
        self._ask = ask
        self._kind = kind
        self._opened = opened
        self._place = place
        self._plan = Plan(
            params=ask.params,
            base=str(base),
            folder="",
            timeout_s=ask.timeout_s,
        )

    def run(self) -> None:
        """All trials."""
        report = self.report
        for at in ("for the first time", "once more"):
            folder = self._place / at.replace(" ", "-")
            plan = msgspec.structs.replace(self._plan, folder=str(folder))
            ((_, outcome),) = self._results([plan])
            if at == "for the first time":
                self._model, self._model_folder = outcome, folder
                report.points = dict(Counter(s for s in outcome.points if s != "end"))
            self._judge(plan, at, outcome)
            if report.differences:
                return
        has_programs = any(self._model.with_program)
        modes = [mode for mode in self._ask.modes if has_programs or mode not in OF_PROGRAMS]
        report.trials = dict.fromkeys(modes, 0)
        for plan, outcome in self._results(self._plans()):
            if outcome.reached:
                report.trials[plan.mode] += 1
            elif outcome.state == SUCCEEDED:
                report.missed += 1
            at = f"{plan.sort} {plan.nth}" if plan.sort != "end" else "its end"
            self._judge(plan, at, outcome)
            shutil.rmtree(plan.folder)
        report.differences.sort(key=self._order)
        for mode, n in report.trials.items():
            if not n:
                self._differs(
                    mode, "anywhere", "no job has come to a point where it could be tried"
                )

    def _plans(self) -> Iterator[Plan]:
        """Each mode at its points, or at some of them."""
        numbers = iter(range(10**9))
        for mode in self._ask.modes:
            seen: Counter[str] = Counter()
            points: list[tuple[str, int]] = []
            for sort, has_program in zip(self._model.points, self._model.with_program, strict=True):
                seen[sort] += 1
                if may(mode, sort, has_program):
                    points.append((sort, seen[sort]))
            waits = [point for point in points if point[0] == "wait"]
            others = [point for point in points if point[0] != "wait"]
            some = _spread(waits, 1 if others else min(self._ask.sample or _WAITS, _WAITS))
            for sort, nth in (*_spread(others, self._ask.sample), *some):
                folder = str(self._place / str(next(numbers)))
                plan = msgspec.structs.replace(self._plan, folder=folder, mode=mode)
                yield msgspec.structs.replace(plan, sort=sort, nth=nth)

    def _results(self, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Outcome]]:
        """Run trials, some at once, and tell each as it ends."""
        left, poll = iter(plans), select.poll()
        running: dict[int, tuple[int, Plan]] = {}
        most = min(_MOST_AT_ONCE, os.cpu_count() or 1)
        try:
            while True:
                while len(running) < most and (plan := next(left, None)) is not None:
                    pid = os.fork()
                    if pid == 0:
                        overseer(plan, self._kind, self._opened)
                    pidfd = os.pidfd_open(pid)
                    running[pidfd] = (pid, plan)
                    poll.register(pidfd, select.POLLIN)
                if not running:
                    return
                for pidfd, _ in poll.poll():
                    pid, plan = running.pop(pidfd)
                    poll.unregister(pidfd)
                    os.close(pidfd)
                    os.waitpid(pid, 0)
                    result = (Path(plan.folder) / "result").read_bytes()
                    yield plan, msgspec.json.decode(result, type=Outcome)
        finally:
            for pid, _ in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    # Judging

    def _order(self, difference: Difference) -> tuple[int, str, int]:
        """By mode and point, as trials end in any order."""
        sort, _, nth = difference.at.partition(" ")
        return self._ask.modes.index(difference.mode), sort, int(nth) if nth.isdigit() else 0

    def _differs(self, mode: str, at: str, text: str) -> None:
        self.report.differences.append(Difference(mode=mode, at=at, text=text))

    def _judge(self, plan: Plan, at: str, outcome: Outcome) -> None:
        """Compare an outcome with what it must be."""
        wanted = CANCELLED if plan.mode in ENDING and outcome.reached else SUCCEEDED
        if plan.mode == "child" and outcome.state == FAILED:
            wanted = FAILED  # and nothing is left; a kind that is tried again ends well
        for text in outcome.wrong:
            self._differs(plan.mode, at, text)
        if outcome.state != wanted:
            why = f": {outcome.error}" if outcome.error else ""
            self._differs(plan.mode, at, f"the job is {outcome.state}, not {wanted}{why}")
        elif wanted == SUCCEEDED:
            work, undisturbed = Path(plan.folder) / "work", self._model_folder / "work"
            for text in (
                *_unlike_data(outcome.data, self._model.data, self._ask.ignore),
                *_unlike_artefacts(outcome.artefacts, self._model.artefacts),
                *_unlike_folders(work, undisturbed),
            ):
                self._differs(plan.mode, at, text)


def _spread(points: Sequence[T], sample: int) -> Iterator[T]:
    """All points, or as many as the sample, evenly spread from the first to the last."""
    n = len(points)
    if sample == 0 or n <= sample:
        yield from points
    elif sample == 1:
        yield points[n // 2]
    else:
        yield from (points[i * (n - 1) // (sample - 1)] for i in range(sample))


def _unlike_data(data: Any, model: Any, ignore: Sequence[str]) -> Iterator[str]:
    if _without(data, ignore) != _without(model, ignore):
        yield f"result.data is {_short(data)}, undisturbed {_short(model)}"


def _without(data: Any, ignore: Sequence[str]) -> Any:
    """JSON without some fields."""
    if isinstance(data, dict):
        return {k: _without(v, ignore) for k, v in data.items() if k not in ignore}
    if isinstance(data, list):
        return [_without(item, ignore) for item in data]
    return data


def _short(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def _unlike_artefacts(found: Sequence[Artefact], model: Sequence[Artefact]) -> Iterator[str]:
    told, wanted = ([f"{a.name} ({a.media_type})" for a in made] for made in (found, model))
    if told != wanted:
        yield f"the artefacts are {', '.join(told) or 'none'}, undisturbed {', '.join(wanted)}"
        return
    for artefact, other in zip(found, model, strict=True):
        unlike = _unlike_tables if artefact.layout == TABLE else _unlike_files
        yield from unlike(Path(artefact.path), Path(other.path), artefact.name)


def _unlike_tables(found: Path, model: Path, name: str) -> Iterator[str]:
    """The first row that differs. Where a database keeps its rows depends on its commits."""
    with closing(_database(found)) as one, closing(_database(model)) as other:
        for query in (_ABOUT, "SELECT * FROM rows"):  # these come in their order by themselves
            rows = zip_longest(one.execute(query), other.execute(query))
            unlike = ((row, wanted) for row, wanted in rows if row != wanted)
            if (first := next(unlike, None)) is not None:
                yield f"{name} has {_short(first[0])}, undisturbed {_short(first[1])}"


def _database(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)


def _unlike_folders(found: Path, model: Path) -> Iterator[str]:
    names, wanted = tree(found), tree(model)
    yield from (f"{name} is left in the working folder" for name in sorted(names - wanted))
    yield from (f"{name} is missing in the working folder" for name in sorted(wanted - names))
    for name in sorted(names & wanted):
        yield from _unlike_files(found / name, model / name, name)


def _unlike_files(found: Path, model: Path, name: str) -> Iterator[str]:
    """The first byte that differs."""
    sizes = (found.stat().st_size, model.stat().st_size)
    at = 0
    with found.open("rb") as file, model.open("rb") as other:
        while block := file.read(_BLOCK_BYTES):
            wanted = other.read(_BLOCK_BYTES)
            if block != wanted:
                at += next(
                    (
                        i
                        for i, pair in enumerate(zip(block, wanted, strict=False))
                        if pair[0] != pair[1]
                    ),
                    min(len(block), len(wanted)),
                )
                break
            at += len(block)
    if at < max(sizes):
        yield f"{name} has {sizes[0]:,} bytes, undisturbed {sizes[1]:,}; byte {at:,} differs first"
