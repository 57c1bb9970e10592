"""The registry of processes: what a kind must be, and how its parameters are read."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest

import jobs.kinds
from errors import SluiceError
from jobs.kinds import JobCancelled, JobPaused, Problem, Registry, kind_of, load_kind


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of every sort."""

    steps: Annotated[int, msgspec.Meta(ge=0, le=100, description="how far")] = 10
    delay_s: float = 0.5
    loud: bool = False
    words: list[str] = []
    name: str | None = None


class Loose(msgspec.Struct):
    """Parameters that ignore what they don't know."""


class Needy(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A parameter without a default."""

    file: Annotated[str, msgspec.Meta(min_length=1)]
    at: list[int] = []
    only: list[str] | None = None
    one: str | list[str] = ""


class Untold(msgspec.Struct, forbid_unknown_fields=True):
    """A parameter that no JSON Schema can describe."""

    at: complex = 0j


async def run(ctx: Any, params: Any) -> None:
    """Do nothing."""


async def run_it() -> None:
    """Take nothing."""


def a_module(**change: Any) -> SimpleNamespace:
    """A kind as an author would write it."""
    fields = {"KIND": "words", "TITLE": "Count words", "Params": Params, "run": run} | change
    return SimpleNamespace(**fields)


def registry(**change: Any) -> Registry:
    """A registry of that one kind."""
    return Registry([kind_of(a_module(**change))])


def test_kind_has_sensible_defaults() -> None:
    """Only name, title, parameters and ``run`` must be given."""
    kind = kind_of(a_module())
    assert (kind.name, kind.unit, kind.runner, kind.cursor_version) == ("words", "steps", "lane", 1)
    assert kind.resumable
    assert not kind.exactly_once


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"KIND": "Words"}, "KIND is 'Words'; it must be lower-case"),
        ({"KIND": ""}, "KIND is ''; it must be lower-case"),
        ({"KIND": "a b"}, "KIND is 'a b'; it must be lower-case"),
        ({"KIND": 7}, "KIND is 7; it must be lower-case"),
        ({"KIND": "upload"}, "KIND is 'upload'; .* no transfer"),
        ({"TITLE": ""}, "TITLE is ''; it must be a text of 1 to 200"),
        ({"TITLE": "two\nlines"}, "TITLE is .* one line"),
        ({"UNIT": "miles"}, 'UNIT is \'miles\'; it must be "bytes" or "files" or "rows"'),
        ({"UNIT": ["bytes"]}, "UNIT is \\['bytes'\\]; it must be"),
        ({"RUNNER": "thread"}, "RUNNER is 'thread'; it must be"),
        ({"RESUMABLE": "no"}, "RESUMABLE is 'no'; it must be True or False"),
        ({"EXACTLY_ONCE": 1}, "EXACTLY_ONCE is 1; it must be True or False"),
        ({"CURSOR_VERSION": "2"}, "CURSOR_VERSION is '2'; it must be a whole number"),
        ({"CURSOR_VERSION": True}, "CURSOR_VERSION is True; it must be a whole number"),
        ({"PAUSE": None}, "PAUSE is None; it must be a text"),
        ({"UNDO": [run_it]}, "UNDO is .*; it must be a dict"),
        ({"UNDO": {"a": print}}, "UNDO is .*; it must be a dict of names and `async def`s"),
        ({"run": lambda ctx, params: None}, "run is .*; it must be `async def run"),
        ({"run": run_it}, "run is .*; it must be `async def run"),
        ({"Params": Loose}, "Params is .*; it must be .*forbid_unknown_fields=True"),
        ({"Params": dict}, "Params is .*; it must be .*msgspec.Struct"),
        ({"Params": Untold}, "Params is .*; it must be .*JSON"),
    ],
)
def test_wrong_kind_is_refused_at_start(change: dict[str, Any], complaint: str) -> None:
    """A mistake of the author is said when the kind is loaded, not when it runs."""
    with pytest.raises(TypeError, match=complaint):
        kind_of(a_module(**change))


@pytest.mark.parametrize("gone", ["KIND", "TITLE", "Params", "run"])
def test_incomplete_kind_is_refused(gone: str) -> None:
    """A module that leaves one of the four out is no kind, and the complaint names it."""
    module = a_module()
    delattr(module, gone)
    with pytest.raises((TypeError, AttributeError), match=gone):
        kind_of(module)


def test_every_module_of_the_package_is_a_kind() -> None:
    """All kinds that come with the service load, each under its own name."""
    loaded = Registry.load()
    found = [module.name for module in pkgutil.iter_modules(jobs.kinds.__path__)]
    modules = [name for name in found if not name.startswith("_")]
    assert len(loaded.names()) == len(modules)
    assert {"count", "checksum"} <= set(loaded.names())
    for name in modules:
        module = importlib.import_module(f"jobs.kinds.{name}")
        assert loaded.get(module.KIND) == kind_of(module)


def test_description_carries_a_schema() -> None:
    """A client can make a form from what a kind says of itself."""
    described = registry().describe()
    assert [(d["kind"], d["title"], d["startable"]) for d in described] == [
        ("words", "Count words", True)
    ]
    schema = described[0]["params"]
    fields = schema["$defs"]["Params"]["properties"]
    assert fields["steps"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 100,
        "description": "how far",
        "default": 10,
    }
    assert schema["$defs"]["Params"]["additionalProperties"] is False
    msgspec.json.encode(described)


def test_defaults_are_filled_in() -> None:
    """What is not given has its default, so that a job's row says what it runs with."""
    assert registry().parse("words", {"steps": 3}) == {
        "steps": 3,
        "delay_s": 0.5,
        "loud": False,
        "words": [],
        "name": None,
    }


def test_text_is_read_as_what_it_must_be() -> None:
    """A query string has only text: numbers and truth are read from it."""
    text = {"steps": "3", "delay_s": "0.25", "loud": "true", "name": "7"}
    parsed = registry().parse("words", text, text=True)
    assert (parsed["steps"], parsed["delay_s"], parsed["loud"], parsed["name"]) == (
        3,
        0.25,
        True,
        "7",
    )


def test_json_is_not_read_as_text() -> None:
    """In JSON a number is a number: "3" is refused."""
    with pytest.raises(SluiceError) as caught:
        registry().parse("words", {"steps": "3"})
    assert caught.value.field == "params.steps"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"steps": -1}, "params.steps"),
        ({"steps": 101}, "params.steps"),
        ({"steps": None}, "params.steps"),
        ({"stepz": 1}, "params.stepz"),
        ({"words": ["a", 1]}, "params.words[1]"),
        ({"loud": 1}, "params.loud"),
    ],
)
def test_wrong_parameter_is_named(given: dict[str, Any], field: str) -> None:
    """A bad value is refused with the path of its field."""
    with pytest.raises(SluiceError) as caught:
        registry().parse("words", given)
    assert caught.value.code == "invalid-field"
    assert caught.value.field == field


def test_missing_parameter_is_named() -> None:
    """What has no default must be given."""
    with pytest.raises(SluiceError) as caught:
        registry(Params=Needy).parse("words", {})
    assert caught.value.field == "params.file"


def test_unknown_kind_lists_the_known() -> None:
    """Who asks for what is not there learns what is."""
    with pytest.raises(SluiceError, match="words") as caught:
        registry().parse("wrods", {})
    assert caught.value.code == "unknown-kind"
    assert registry().get("wrods") is None


def test_lists_are_known() -> None:
    """A query writes lists with commas, so one can ask which parameters are lists."""
    assert registry().lists("words") == {"words"}
    assert registry(Params=Needy).lists("words") == {"at", "only"}
    assert registry().lists("nothing") == set()


def test_except_exception_lets_pause_and_cancel_through() -> None:
    """A kind that catches Exception can't swallow a pause or a cancel by accident."""
    assert not issubclass(JobPaused, Exception)
    assert not issubclass(JobCancelled, Exception)


# ---- Kinds of one's own ----

WORDS = """
from __future__ import annotations
import msgspec
from jobs.kinds import Context
{imports}
KIND = "{name}"
TITLE = "Count words"


class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    text: str


async def run(ctx: Context, params: Params) -> dict[str, object]:
    return {{"words": {result}}}
"""


def write(folder: Path, file: str, text: str = "", **more: str) -> Path:
    """A file with a kind in it, or with the given text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    fields = {"imports": "", "name": path.stem, "result": "len(params.text.split())"} | more
    path.write_text(text or WORDS.format(**fields))
    return path


def test_kinds_load_from_files_and_folders(tmp_path: Path) -> None:
    """A file is a kind, a folder is all of its modules but helpers and tests; each once."""
    write(tmp_path / "a", "words.py")
    write(tmp_path / "a", "letters.py")
    for other in ("_helper.py", "test_words.py", "conftest.py", "notes.txt"):
        write(tmp_path / "a", other, "raise RuntimeError")
    lines = write(tmp_path / "b", "my-lines.py", name="lines")
    write(tmp_path / "b", "unasked.py")
    paths_before = list(sys.path)
    loaded = Registry.load([tmp_path / "a", lines, tmp_path / "a" / "words.py"])
    assert not loaded.problems
    ours = set(loaded.names()) - set(Registry.load().names())
    assert ours == {"words", "letters", "lines"}
    assert loaded.parse("lines", {"text": "a b"}) == {"text": "a b"}
    assert sys.path == paths_before
    assert not {"words", "letters", "my-lines", "lines"} & set(sys.modules)


def test_modules_with_an_underscore_are_helpers_of_their_folder_alone(tmp_path: Path) -> None:
    """Two folders may have helpers of one name."""
    for folder, count in (("a", 1), ("b", 2)):
        write(tmp_path / folder, "_count.py", f"COUNT = {count}\n")
        imports = "from ._count import COUNT"
        write(tmp_path / folder, f"{folder}.py", imports=imports, result="COUNT")
    loaded = Registry.load([tmp_path / "a", tmp_path / "b"])
    for name, count in (("a", 1), ("b", 2)):
        kind = loaded.get(name)
        assert kind is not None
        with pytest.raises(StopIteration) as done:
            kind.run(None, None).send(None)
        assert done.value.value == {"words": count}


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("import os\ndef", "line 2: SyntaxError: invalid syntax"),
        ("import nothing_there", "line 1: ModuleNotFoundError: no module is named 'nothing_there'"),
        (
            "\nimport _near",
            "line 2: ModuleNotFoundError: no module is named '_near'; "
            "a neighbour is imported by `from . import _near`",
        ),
        ("open('/etc/secret/file')", "line 1: FileNotFoundError"),
        ("\nraise ValueError('the password is x')", "line 2: ValueError"),
        ("raise SystemExit('x')", "line 1: SystemExit"),
        ("def f():\n  raise GeneratorExit\nf()", "line 2: GeneratorExit"),
        ("KIND = 'x'", "TITLE is missing; it must be a text of 1 to 200 characters in one line"),
        (WORDS.format(imports="", name="count", result=0), "KIND is 'count'; that name is taken"),
        (WORDS.format(imports="", name="good", result=0), "KIND is 'good'; that name is taken"),
    ],
)
def test_a_file_that_is_no_kind_is_a_problem_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, detail: str
) -> None:
    """It is told by its name and the reason, without paths or texts of exceptions; logged whole."""
    write(tmp_path, "wrong.py", text)
    write(tmp_path, "good.py")
    write(tmp_path, "_near.py", "X = 1\n")
    before = set(sys.modules)
    loaded = Registry.load([tmp_path])
    assert loaded.problems == [Problem("wrong.py", detail)]
    assert {"good", "count"} <= set(loaded.names())
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(tmp_path / "wrong.py") in record.getMessage()
    if "taken" not in detail:
        assert not [name for name in sys.modules.keys() - before if name.endswith(".wrong")]


def test_a_kind_is_loaded_again_by_its_source(tmp_path: Path) -> None:
    """A process of its own imports the same kind from where the registry has found it."""
    path = write(tmp_path, "words.py")
    loaded = Registry.load([path])
    for name in ("words", "count"):
        kind = loaded.get(name)
        assert kind is not None
        again = load_kind(kind.source, name)
        assert (again.name, again.source) == (name, kind.source)
        assert msgspec.json.schema(again.params) == msgspec.json.schema(kind.params)
    with pytest.raises(TypeError, match="KIND is 'words'; it must be 'letters'"):
        load_kind(("file", str(path)), "letters")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_kind(("file", str(path)), "words")
