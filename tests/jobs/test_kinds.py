"""The registry of processes: what a kind must be, and how its parameters are read."""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest

import jobs.kinds
from errors import SluiceError
from jobs.kinds import JobCancelled, JobPaused, Registry, kind_of


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


async def run(ctx: Any, params: Any) -> None:
    """Do nothing."""


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
    assert kind.needs == frozenset()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"KIND": "Words"}, "is no name"),
        ({"KIND": ""}, "is no name"),
        ({"KIND": "a b"}, "is no name"),
        ({"UNIT": "miles"}, "UNIT or RUNNER"),
        ({"RUNNER": "thread"}, "UNIT or RUNNER"),
        ({"run": lambda ctx, params: None}, "not a coroutine"),
        ({"Params": Loose}, "forbid unknown"),
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
