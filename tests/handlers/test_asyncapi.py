"""The AsyncAPI document: it is whole, and what it shows is what is said."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from handlers.asyncapi import document
from handlers.messages import HEARD, PROTOCOL, SAID, decode, id_of
from tests.handlers.clients import Caller
from tests.harness import Described, Server

DOCUMENT = document()
MESSAGES = DOCUMENT["components"]["messages"]
SCHEMAS = DOCUMENT["components"]["schemas"]


def within(value: Any) -> Iterator[Any]:
    """A value and all that is in it."""
    yield value
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, dict | list):
            yield from within(one)


def at(ref: str) -> Any:
    """What a reference leads to."""
    found: Any = DOCUMENT
    for name in ref.removeprefix("#/").split("/"):
        found = found[name]
    return found


def titles(operation: str) -> set[str]:
    """The messages of an operation."""
    refs = [message["$ref"] for message in DOCUMENT["operations"][operation]["messages"]]
    assert all(at(at(ref)["$ref"]) is MESSAGES[ref.rpartition("/")[2]] for ref in refs)
    return {ref.rpartition("/")[2] for ref in refs}


def test_it_is_served(site: Server) -> None:
    """The document is there for anyone, as JSON."""
    answer = site.get("/asyncapi.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.json == DOCUMENT
    assert answer.json["asyncapi"] == "3.0.0"


def test_every_reference_leads_somewhere() -> None:
    """No $ref points to nothing, and none has a neighbour that draft 7 would ignore."""
    refs = [one for one in within(DOCUMENT) if isinstance(one, dict) and "$ref" in one]
    assert refs
    for one in refs:
        assert at(one["$ref"])
        assert list(one) == ["$ref"]


def test_every_type_is_in_it() -> None:
    """What the code says and hears is what the document sends and receives."""
    assert titles("say") == {of.__name__ for of in SAID}
    assert titles("hear") == {of.__name__ for of in HEARD}
    assert titles("stream") < titles("say")
    assert titles("poll") == {"Polled"}
    live, events = DOCUMENT["channels"]["live"], DOCUMENT["channels"]["events"]
    assert (live["address"], events["address"]) == ("/v1/ws", "/v1/events")
    asked = live["bindings"]["ws"]["headers"]["properties"]["Sec-WebSocket-Protocol"]
    assert asked["const"] == PROTOCOL


@pytest.mark.parametrize("title", [of.__name__ for of in (*SAID, *HEARD)])
def test_each_message_is_told_by_its_t(title: str) -> None:
    """A message has one value of t, which is its name, and a text that says what it is for."""
    message, schema = MESSAGES[title], SCHEMAS[title]
    assert schema["properties"]["t"] == {"const": message["name"]}
    assert "t" in schema["required"]
    assert message["summary"] == schema["description"]
    assert "``" not in message["summary"]


@pytest.mark.parametrize("title", MESSAGES)
def test_each_example_is_true(title: str) -> None:
    """An example fits its schema with nothing beside it; one of a client's is understood."""
    described = Described(DOCUMENT)
    (example,) = MESSAGES[title]["examples"]
    assert described.validator(title).is_valid(example["payload"])
    if title in titles("hear"):
        assert type(decode(json.dumps(example["payload"]))).__name__ == title


def test_what_the_server_says_may_grow() -> None:
    """Clients are told to expect members that are not described; only a filter is closed."""
    closed = {
        name for name, schema in SCHEMAS.items() if schema.get("additionalProperties") is False
    }
    assert closed == {"Select"}


@pytest.mark.parametrize(
    ("title", "name"),
    [("Sub", "s"), ("Sub", "from"), ("Sub", "page"), ("More", "cursor"), ("Cmd", "if_v")],
)
def test_numbers_that_reach_the_store_fit_into_it(title: str, name: str) -> None:
    """What a client may name to look something up is below 2^63, in both directions."""
    schema = SCHEMAS[title]["properties"][name]
    (number,) = [one for one in schema.get("anyOf", [schema]) if one["type"] == "integer"]
    assert number.keys() & {"minimum", "exclusiveMinimum"}
    assert number.get("exclusiveMaximum", number.get("maximum", 1 << 63)) < 1 << 63


def test_a_message_that_is_too_deep_has_no_id() -> None:
    """The id of a wrong message is looked for in vain, however wrong the message is."""
    assert id_of("[" * 50_000 + "]" * 50_000) is None
    assert id_of('{"id": ') is None
    assert id_of('{"t": "dance", "id": 3}') == 3


def test_only_words_of_draft_7_are_used() -> None:
    """No keyword is of a later draft than the one that AsyncAPI means."""
    later = {"prefixItems", "$defs", "unevaluatedProperties", "dependentRequired"}
    assert not any(later & one.keys() for one in within(SCHEMAS) if isinstance(one, dict))


def test_what_does_not_fit_is_noticed() -> None:
    """A frame with a member too many, one too few, or a wrong one is no frame of ours."""
    described = Described(DOCUMENT)
    mark = {"t": "mark", "id": 1, "s": 2, "p": 1}
    assert described.complaint(mark) is None
    wrong: list[Any] = [
        mark | {"more": 1},
        mark | {"s": "2"},
        mark | {"t": "marks"},
        {"t": "mark", "id": 1, "s": 2},
        {"t": []},
        5,
    ]
    for one in wrong:
        assert "not described" in (described.complaint(one) or "")


def test_polls_and_histories_are_as_described(caller: Caller) -> None:
    """The answer to a poll fits, with and without events, and so does a job's history."""
    described = Described(DOCUMENT)
    polled, event = described.validator("Polled"), described.validator("EventRow")
    first = caller.get("/v1/events").json
    job = caller.post("/v1/jobs", {"kind": "count", "params": {"steps": 2}}).json
    caller.server.wait_for(job["id"], "succeeded")
    second = caller.get(f"/v1/events?after={first['cursor']}").json
    lost = caller.get("/v1/events?after=elsewhere:1").json
    assert (first["events"], lost["reset"]) == ([], "epoch")
    assert {event["job"] for event in second["events"]} == {job["id"]}
    for answer in (first, second, lost):
        polled.validate(answer)
    for item in caller.get(f"/v1/jobs/{job['id']}/events").json["items"]:
        event.validate(item)


def test_streams_are_as_described(caller: Caller) -> None:
    """Each message of server-sent events is one that the document streams, and fits."""
    described = Described(DOCUMENT)
    streamed = {MESSAGES[title]["name"] for title in titles("stream")}
    seen: list[Any] = []
    connection = http.client.HTTPConnection("127.0.0.1", caller.server.port, timeout=30)
    try:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "elsewhere:1"}
        connection.request("GET", "/v1/events", headers=headers)
        stream = connection.getresponse()
        while not seen or seen[-1].get("to") != "succeeded":
            field, _, value = stream.readline().decode().partition(": ")
            if field != "data":
                continue
            seen.append(json.loads(value))
            assert described.complaint(seen[-1]) is None
            if seen[-1]["t"] == "snap":
                caller.post("/v1/jobs", {"kind": "count", "params": {"steps": 2}})
    finally:
        connection.close()
    told = [message["t"] for message in seen]
    assert told[:3] == ["ack", "reset", "snap"]
    assert set(told) <= streamed
