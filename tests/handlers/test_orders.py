"""Starts and commands over HTTP: who waits, who repeats itself, and those to many jobs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import Serve
from tests.handlers.clients import UNDOING, Caller, Raw
from tests.harness import Answer, Server, eventually

ENDLESS = {"steps": 100_000, "delay_s": 0.01}
AT_ONCE = {"steps": 3, "delay_s": 0}
LATER = "2990-01-01T00:00:00Z"


def count(params: Any, **more: Any) -> dict[str, Any]:
    """What starts a count."""
    return {"kind": "count", "params": params} | more


def a_key() -> str:
    """A key that no other test uses, as it stands in the header."""
    return f'"{uuid4().hex}"'


def running(caller: Caller) -> Any:
    """A count that runs."""
    job = caller.post("/v1/jobs", count(ENDLESS)).json
    return caller.server.wait_for(job["id"], "running")


def ended(caller: Caller) -> Any:
    """A count that has succeeded."""
    answer = caller.post("/v1/jobs", count(AT_ONCE), Prefer="wait=30")
    assert answer.json["state"] == "succeeded", answer
    return answer.json


def post(caller: Caller, job: Any, verb: str, **headers: str) -> Answer:
    """Command a job."""
    return caller.post(f"/v1/jobs/{job['id']}/{verb}", **headers)


def code_of(answer: Answer) -> tuple[int, str]:
    """Status and code of a refusal."""
    return answer.status, answer.json["code"]


# Those who wait


def test_a_start_that_need_not_be_waited_for_is_accepted(caller: Caller) -> None:
    """With respond-async a start is a 202 that says where the job is, and that it was heard."""
    answer = caller.post("/v1/jobs", count(ENDLESS), Prefer="respond-async")
    assert answer.status == 202
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json['id']}"
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert "Prefer" in answer.headers["Vary"]
    post(caller, answer.json, "cancel")


def test_a_start_is_answered_when_the_job_has_ended(caller: Caller) -> None:
    """With wait=N the answer is the job that has ended, well or not."""
    answer = caller.post("/v1/jobs", count(AT_ONCE), Prefer="wait=30")
    assert (answer.status, answer.json["state"]) == (200, "succeeded")
    assert answer.json["result"]["data"] == {"counted": 3}
    assert answer.headers["Preference-Applied"] == "wait=30"
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json['id']}"
    assert answer.headers["Etag"] == f'"{answer.json["version"]}"'
    body = {"kind": "checksum", "params": {"file": "no such file"}}
    failed = caller.post("/v1/jobs", body, Prefer="respond-async, wait=30")
    assert (failed.status, failed.json["state"]) == (200, "failed")
    assert failed.json["error"]["code"] == "file-unknown"
    assert failed.headers["Preference-Applied"] == "wait=30"


def test_a_start_that_takes_longer_is_accepted_in_the_end(caller: Caller) -> None:
    """If the time is over first the answer is a 202 with the job as it is then."""
    began = time.monotonic()
    answer = caller.post("/v1/jobs", count(ENDLESS), Prefer="respond-async, wait=1")
    assert time.monotonic() - began >= 1
    assert (answer.status, answer.json["state"]) == (202, "running")
    assert answer.headers["Preference-Applied"] == "respond-async, wait=1"
    post(caller, answer.json, "cancel")


def test_a_job_that_is_queued_has_not_ended(serve: Serve) -> None:
    """Who waits for a job that has no slot so far waits, and is told of its end."""
    caller = Caller(serve("--slots", "1"), "c")
    first = running(caller)
    answer = caller.post("/v1/jobs", count(AT_ONCE), Prefer="wait=1")
    assert (answer.status, answer.json["state"]) == (202, "queued")
    with Raw(caller.server) as raw:
        body = json.dumps(count(AT_ONCE)).encode()
        raw.head("POST", "/v1/jobs", Prefer="wait=30", Content_Length=len(body))
        raw.send(body)
        eventually(lambda: len(caller.server.jobs("?state=queued")) == 2, "both wait")
        assert post(caller, first, "cancel", Prefer="wait=30").json["state"] == "cancelled"
        answer = raw.answer()
    assert (answer.status, answer.json["state"]) == (200, "succeeded")


@pytest.mark.parametrize(
    ("prefer", "status", "applied"),
    [
        ("", 201, None),
        ("wait", 201, None),
        ("wait=-1", 201, None),
        ("wait=soon", 201, None),
        ("wait=1.5", 201, None),
        ("respond-async=yes", 201, None),
        ("return=minimal; foo=bar, handling=lenient", 201, None),
        ('"respond-async, wait=5', 201, None),
        ("Wait = 7; unit=s, wait=2", 200, "wait=7"),
        ('foo="a, wait=1", WAIT="9"', 200, "wait=9"),
        ("wait=86400", 200, "wait=60"),
        ("wait=99999999999999999999", 201, None),
    ],
)
def test_a_preference_is_read_as_it_may_be_written(
    caller: Caller, prefer: str, status: int, applied: str | None
) -> None:
    """Names in any case, strings, parameters; the first of two counts; what is wrong is ignored."""
    answer = caller.post("/v1/jobs", count({"steps": 0, "delay_s": 0}), Prefer=prefer)
    assert answer.status == status
    assert answer.headers.get("Preference-Applied") == applied


def test_a_command_is_answered_when_it_is_done(caller: Caller) -> None:
    """With wait=N a pause waits for the pause, a resume for the run, the others for an end."""
    job = running(caller)
    for verb, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        answer = post(caller, job, verb, Prefer="wait=30")
        assert (answer.status, answer.json["state"]) == (200, state)
        assert answer.headers["Preference-Applied"] == "wait=30"
        assert "Prefer" in answer.headers["Vary"]
    done = ended(caller)
    answer = post(caller, done, "retry", Prefer="wait=30")
    assert (answer.status, answer.json["state"]) == (200, "succeeded")
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json['id']}"
    assert answer.json["retry_of"] == done["id"]


def test_a_cancel_that_takes_long_is_under_way(caller: Caller) -> None:
    """A command that is not done in time is a 202, as without waiting."""
    params = {"steps": 10**12, "delay_s": 0, "undo_steps": 1000}
    job = caller.post("/v1/jobs", count(params)).json
    eventually(lambda: caller.server.job(job["id"])["progress"]["done"] > 300, "it counts")
    answer = post(caller, job, "cancel", Prefer="wait=0")
    assert (answer.status, answer.json["state"]) == (202, "cancelling")
    assert answer.headers["Preference-Applied"] == "wait=0"
    assert post(caller, job, "cancel", Prefer="wait=60").json["state"] == "cancelled"


def test_who_waits_for_a_job_is_told_what_others_made_of_it(caller: Caller) -> None:
    """A start that is waited for and cancelled by somebody else is answered with that end."""
    with Raw(caller.server) as raw:
        body = json.dumps(count(ENDLESS)).encode()
        raw.head(
            "POST",
            "/v1/jobs",
            Prefer="wait=60",
            Content_Length=len(body),
            X_Client_Id=caller.client,
        )
        raw.send(body)
        job = caller.job("count")
        post(caller, job, "cancel")
        answer = raw.answer()
    assert (answer.status, answer.json["state"]) == (200, "cancelled")


def test_a_stop_of_the_service_ends_the_waiting(serve: Serve) -> None:
    """Who waits when the service stops is answered with the job as it is."""
    server = serve()
    with Raw(server) as raw:
        body = json.dumps(count(ENDLESS)).encode()
        raw.head("POST", "/v1/jobs", Prefer="wait=60", Content_Length=len(body))
        raw.send(body)
        eventually(lambda: server.jobs("?state=running"), "the job runs")
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 20
        answer = raw.answer()
    assert answer.status == 202


# Those who repeat themselves


def test_a_start_under_a_key_makes_one_job(caller: Caller) -> None:
    """The repeat is answered like the first, with the same job, and says that it is a repeat."""
    key = a_key()
    first = caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=key)
    assert "Idempotency-Replayed" not in first.headers
    again = caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=key)
    assert (first.status, again.status) == (201, 201)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    waited = caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=key, Prefer="wait=30")
    assert (waited.status, waited.json["state"]) == (200, "succeeded")
    assert {again.json["id"], waited.json["id"]} == {first.json["id"]}
    assert [job["id"] for job in caller.jobs()] == [first.json["id"]]


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "retry", "delete", "change"])
def test_a_command_under_a_key_is_obeyed_once(caller: Caller, verb: str) -> None:
    """A repeat changes nothing, and its answer is of the same class and about the same job."""
    job = (ended if verb in ("retry", "delete") else running)(caller)
    if verb == "resume":
        job = post(caller, job, "pause", Prefer="wait=30").json
    headers = {"Idempotency-Key": a_key(), "X-Client-Id": caller.client}
    path, method, body = f"/v1/jobs/{job['id']}", "POST", None
    match verb:
        case "delete":
            method = "DELETE"
        case "change":
            method, body = "PATCH", {"priority": 8}
        case _:
            path += f"/{verb}"
    first = caller.server.request(method, path, body, headers)
    # A second pause or resume would be a step of its own now.
    if verb in ("pause", "resume"):
        caller.server.wait_for(job["id"], "paused" if verb == "pause" else "running")
        other = {"pause": "resume", "resume": "pause"}[verb]
        post(caller, job, other, Prefer="wait=30")
    n = len(caller.jobs())
    before = caller.get(f"/v1/jobs/{job['id']}").body if verb != "delete" else b""
    again = caller.server.request(method, path, body, headers)
    assert first.status // 100 == again.status // 100 == 2
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert len(caller.jobs()) == n
    if verb == "delete":
        assert (first.status, again.status) == (204, 204)
    else:
        assert again.json["id"] == first.json["id"]
        version = json.loads(before)["version"]
        assert caller.server.job(job["id"])["version"] == version or verb == "cancel"
        post(caller, job, "cancel")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "8e03978e-40d5-43dd-bc93-6894a57f9324",
        '""',
        '"open',
        '"a", "b"',
        "5",
        ":YQ==:",
        '%"caf%c3%a9"',
        f'"{"x" * 129}"',
        '"a" b',
    ],
)
def test_a_key_that_is_no_string_is_a_400(caller: Caller, key: str) -> None:
    """The key is a String of RFC 9651, with 1 to 128 characters; else nothing is done."""
    answer = caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=key)
    assert code_of(answer) == (400, "invalid-field")
    assert answer.json["field"] == "Idempotency-Key"
    assert caller.jobs() == []


def test_a_key_is_for_one_request(caller: Caller) -> None:
    """Another body, job, verb or version under the key is a 422 and does nothing."""
    job, other = running(caller), running(caller)
    key = a_key()
    version = f'"{job["version"]}"'
    assert post(caller, job, "pause", Idempotency_Key=key, If_Match=version).status == 202
    paused = caller.server.wait_for(job["id"], "paused")
    for answer in (
        post(caller, job, "pause", Idempotency_Key=key),
        post(caller, job, "pause", Idempotency_Key=key, If_Match='"99"'),
        post(caller, other, "pause", Idempotency_Key=key, If_Match=version),
        post(caller, job, "resume", Idempotency_Key=key, If_Match=version),
        caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=key),
        caller.post("/v1/jobs", [count(AT_ONCE)], Idempotency_Key=key),
        caller.post("/v1/jobs/pause", {"ids": [job["id"]]}, Idempotency_Key=key),
    ):
        assert code_of(answer) == (422, "key-reused")
    started = a_key()
    caller.post("/v1/jobs", count(AT_ONCE), Idempotency_Key=started)
    answer = caller.post("/v1/jobs", count(AT_ONCE, priority=9), Idempotency_Key=started)
    assert code_of(answer) == (422, "key-reused")
    # The same in other words is the same.
    words = b'{"priority": 5, "params": {"delay_s": 0, "steps": 3}, "kind": "count"}'
    assert caller.post("/v1/jobs", words, Idempotency_Key=started).status == 201
    assert caller.server.job(job["id"])["version"] == paused["version"]
    assert caller.server.job(other["id"])["state"] == "running"
    for one in (job, other):
        post(caller, one, "cancel")


def test_what_was_refused_may_be_asked_for_again(caller: Caller) -> None:
    """A refusal changes nothing, so it spends no key."""
    key, job = a_key(), running(caller)
    path = f"/v1/jobs/{job['id']}"
    assert code_of(caller.delete(path, Idempotency_Key=key)) == (409, "job-live")
    post(caller, job, "cancel", Prefer="wait=30")
    assert caller.delete(path, Idempotency_Key=key).status == 204


def test_a_repeat_while_the_first_is_under_way_is_a_409(caller: Caller) -> None:
    """Two at once do it once: the second is told that the first is not done."""
    key = a_key()
    body = json.dumps([count(AT_ONCE)] * 1000).encode()
    head = {"Idempotency_Key": key, "Content_Length": len(body), "X_Client_Id": caller.client}
    with Raw(caller.server) as one, Raw(caller.server) as two:
        for raw in (one, two):
            raw.head("POST", "/v1/jobs", **head)
            raw.send(body[:-1])
        os.kill(caller.server.pid, signal.SIGSTOP)  # so that it finds both at once
        one.send(body[-1:])
        two.send(body[-1:])
        os.kill(caller.server.pid, signal.SIGCONT)
        answers = [one.answer(), two.answer()]
    assert sorted(answer.status for answer in answers) == [201, 409]
    refused = max(answers, key=lambda answer: answer.status)
    assert refused.json["code"] == "key-in-flight"
    assert refused.headers["Retry-After"] == "1"
    again = caller.post("/v1/jobs", json.loads(body), Idempotency_Key=key)
    assert (again.status, again.json["n"]) == (201, 1000)
    jobs = [item["job"]["id"] for item in again.json["items"]]
    made = next(answer for answer in answers if answer.status == 201)
    assert jobs == [item["job"]["id"] for item in made.json["items"]]


def test_a_key_is_the_same_through_every_door(caller: Caller) -> None:
    """What was started over the channel is known over HTTP, and the other way round."""
    key = uuid4().hex
    socket = caller.server.socket("jobs.v1.json")
    socket.say(t="hello", ver=1)
    args = count(AT_ONCE)
    socket.say(t="cmd", id="a", op="start", args=args, key=key)
    job = socket.until(lambda message: message["t"] == "ack")["job"]
    socket.close()
    answer = caller.post("/v1/jobs", args, Idempotency_Key=f'"{key}"')
    assert answer.json["id"] == job
    assert answer.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize(
    ("verb", "point"), [("start", "started:1"), ("schedule", "created:1"), ("pause", "pausing:1")]
)
def test_a_key_outlives_the_death_of_the_service(serve: Serve, verb: str, point: str) -> None:
    """Killed between the commit and the answer, it still knows what was done under the key."""
    server = serve()
    caller, key = Caller(server, "c"), a_key()
    job = running(caller)
    server.kill()
    server.env = {"CRASH_AT": point}
    server.start()
    server.wait_for(job["id"], "running")
    path, body = "/v1/jobs", count(AT_ONCE)
    if verb == "schedule":
        body = count(AT_ONCE, not_before=LATER)
    elif verb == "pause":
        path, body = f"/v1/jobs/{job['id']}/pause", {}
    with pytest.raises(ConnectionError):
        caller.post(path, body, Idempotency_Key=key)
    server._ended()
    server.env = {}
    server.start()
    answer = caller.post(path, body, Idempotency_Key=key)
    assert answer.status // 100 == 2
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert len(caller.jobs()) == (1 if verb == "pause" else 2)
    if verb == "pause":
        assert server.job(job["id"])["state"] == "paused"
    post(caller, job, "cancel", Prefer="wait=30")


# Those who know the version


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ("*", 201),
        ('"{v}"', 201),
        ("{v}", 201),
        ('"77", "{v}"', 201),
        ('"x,y" , "{v}",', 201),
        ('W/"{v}"', 412),
        ('W/"{v}", "{v}"', 201),
        ('"77"', 412),
        ('"0{v}"', 412),
        ('"x"', 412),
    ],
)
def test_a_command_is_obeyed_only_at_a_version_that_is_named(
    caller: Caller, wanted: str, status: int
) -> None:
    """If-Match is a star or a list of tags, compared strongly (RFC 9110 section 13.1.1)."""
    job = ended(caller)
    answer = post(caller, job, "retry", If_Match=wanted.format(v=job["version"]))
    assert answer.status == status
    if status == 412:
        assert answer.json["code"] == "version-mismatch"
        assert answer.json["version"] == job["version"]
    assert len(caller.jobs()) == (1 if status == 412 else 2)


def test_a_version_goes_with_one_job(caller: Caller) -> None:
    """For a start and for many jobs If-Match means nothing: 400."""
    for path, body in (
        ("/v1/jobs", count(AT_ONCE)),
        ("/v1/jobs", [count(AT_ONCE)]),
        ("/v1/jobs/pause", {"filter": {}}),
    ):
        answer = caller.post(path, body, If_Match='"1"')
        assert (answer.status, answer.json["field"]) == (400, "If-Match")
    assert caller.jobs() == []


# Many


def test_many_are_started_at_once(caller: Caller) -> None:
    """A list is answered item by item, in its order, and started in that order."""
    body = [count(AT_ONCE, name=f"item {n}") for n in range(120)]
    answer = caller.post("/v1/jobs", body)
    assert (answer.status, answer.json["n"], answer.json["failures"]) == (201, 120, 0)
    jobs = [item["job"] for item in answer.json["items"]]
    assert [job["name"] for job in jobs] == [item["name"] for item in body]
    assert len({job["h"] for job in jobs}) == 120
    assert (jobs[0]["by"]["via"], jobs[0]["client"]) == ("rest", caller.client)
    assert jobs[0]["params"] == AT_ONCE | {"delay_s": 0.0, "undo_steps": 0}
    done = [caller.server.wait_for(job["id"], "succeeded") for job in jobs]
    assert done[0]["started_at"] <= done[-1]["started_at"]


def test_each_item_of_a_list_has_its_own_fate(caller: Caller) -> None:
    """What one item is refused for is told in its place; the others are started."""
    body = [
        count(AT_ONCE),
        {"kind": "nope"},
        count({"steps": -1}),
        {"kind": "upload"},
        count(AT_ONCE, not_before="2030-01-01T00:00:00"),
        count(AT_ONCE, after=["none"]),
        count(AT_ONCE),
    ]
    answer = caller.post("/v1/jobs", body)
    assert (answer.status, answer.json["n"], answer.json["failures"]) == (200, 2, 5)
    problems = [item.get("error", {}) for item in answer.json["items"]]
    assert [(found.get("code"), found.get("field")) for found in problems] == [
        (None, None),
        ("unknown-kind", "kind"),
        ("invalid-field", "params.steps"),
        ("kind-not-startable", "kind"),
        ("invalid-field", "not_before"),
        ("invalid-field", "after"),
        (None, None),
    ]
    assert {job["id"] for job in caller.jobs()} == {
        item["job"]["id"] for item in answer.json["items"] if "job" in item
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], None),
        ([count(AT_ONCE)] * 1001, None),
        ([count(AT_ONCE), {"params": {}}], "[1].kind"),
        ([count(AT_ONCE), count(AT_ONCE), {"kind": 5}], "[2].kind"),
        ([count(AT_ONCE), count(AT_ONCE, colour=1)], "[1].colour"),
        ([count(AT_ONCE), "count"], "[1]"),
        ([[count(AT_ONCE)]], "[0]"),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_a_list_of_a_wrong_shape_starts_nothing(
    caller: Caller, body: Any, field: str | None
) -> None:
    """An item that is no start is a 400 that names its place, and none of the others is started."""
    answer = caller.post("/v1/jobs", body)
    assert code_of(answer) == (400, "invalid-field")
    assert answer.json.get("field") == field
    assert caller.jobs() == []


def test_the_queue_takes_as_many_of_a_list_as_it_has_room_for(serve: Serve) -> None:
    """Each item counts: the first ones are started, the rest is told that the queue is full."""
    caller = Caller(serve("--slots", "1", "--max-queued", "40"), "c")
    first = running(caller)
    key = a_key()
    body = [count(ENDLESS)] * 100
    answer = caller.post("/v1/jobs", body, Idempotency_Key=key)
    assert (answer.status, answer.json["n"], answer.json["failures"]) == (200, 40, 60)
    codes = [item.get("error", {}).get("code") for item in answer.json["items"]]
    assert codes == [None] * 40 + ["queue-full"] * 60
    # There may be room later, so a repeat goes on with the rest.
    caller.post("/v1/jobs/cancel", {"filter": {"state": "queued"}})
    again = caller.post("/v1/jobs", body, Idempotency_Key=key)
    assert (again.json["n"], again.json["failures"]) == (80, 20)
    made = [item["job"]["id"] for item in again.json["items"] if "job" in item]
    assert made[:40] == [item["job"]["id"] for item in answer.json["items"][:40]]
    caller.post("/v1/jobs/cancel", {"filter": {"kind": "count"}})
    caller.server.wait_for(first["id"], "cancelled")


@pytest.mark.parametrize("point", ["created:1", "created:40", "created:100", "spent:1"])
def test_a_list_under_a_key_is_finished_after_a_crash(serve: Serve, point: str) -> None:
    """A repeat goes on with those that were not started, and starts none twice.

    Killed with the first commit, in the middle, behind the last job, or when all is written down.
    """
    server = serve()
    caller, key = Caller(server, "c"), a_key()
    body = [count(AT_ONCE, name=f"item {n}", not_before=LATER) for n in range(100)] + [
        {"kind": "nope"}
    ]
    server.kill()
    server.env = {"CRASH_AT": point}
    server.start()
    with pytest.raises(ConnectionError):
        caller.post("/v1/jobs", body, Idempotency_Key=key)
    server._ended()
    server.env = {}
    server.start()
    before = {job["id"] for job in caller.jobs()}
    assert int(point.partition(":")[2]) <= len(before) <= 100
    answer = caller.post("/v1/jobs", body, Idempotency_Key=key)
    assert ("Idempotency-Replayed" in answer.headers) == (point == "spent:1")
    assert (answer.status, answer.json["n"], answer.json["failures"]) == (200, 100, 1)
    assert [item["job"]["name"] for item in answer.json["items"][:100]] == [
        item["name"] for item in body[:100]
    ]
    assert before <= {item["job"]["id"] for item in answer.json["items"][:100]}
    again = caller.post("/v1/jobs", body, Idempotency_Key=key)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json["items"][100]["error"]["code"] == "unknown-kind"
    assert [item["job"]["id"] for item in again.json["items"][:100]] == [
        item["job"]["id"] for item in answer.json["items"][:100]
    ]
    assert len(caller.jobs()) == 100


def test_many_jobs_are_commanded_by_their_ids(caller: Caller) -> None:
    """Each of a list is paused, resumed, cancelled, retried, deleted, and what can't be is told."""
    jobs = [running(caller) for _ in range(3)]
    done = ended(caller)
    ids = [job["id"] for job in jobs]

    def bulk(verb: str, *more: str) -> Any:
        answer = caller.post(f"/v1/jobs/{verb}", {"ids": [*ids, *more]})
        assert answer.status == 200, answer
        return answer.json

    answer = bulk("pause", done["id"], "none")
    assert (answer["n"], answer["failures"]) == (3, 2)
    assert [(one["job"], one["problem"]["code"]) for one in answer["failed"]] == [
        (done["id"], "job-finished"),
        ("none", "job-unknown"),
    ]
    for verb, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        assert bulk(verb) == {"n": 3, "failures": 0, "failed": []}
        for job_id in ids:
            caller.server.wait_for(job_id, state)
    assert bulk("retry")["n"] == 3
    again = [job for job in caller.jobs() if job["retry_of"] in ids]
    assert len(again) == 3
    assert bulk("delete")["n"] == 3
    assert {job["id"] for job in caller.jobs()} == {done["id"]} | {job["id"] for job in again}
    ids = [job["id"] for job in again]
    bulk("cancel")


def test_many_jobs_are_commanded_by_a_filter(serve: Serve) -> None:
    """A filter has the words of the list; without a state it means the jobs that it can mean."""
    caller = Caller(serve("--slots", "3"), "c")
    jobs = [
        caller.post("/v1/jobs", count(ENDLESS, name=name)).json
        for name in ("Tea", "more tea", "coffee")
    ]

    def bulk(verb: str, **words: Any) -> Any:
        answer = caller.post(f"/v1/jobs/{verb}", {"filter": words})
        assert answer.status == 200, answer
        return answer.json["n"]

    for job in jobs:
        caller.server.wait_for(job["id"], "running")
    assert bulk("pause", q="tea", kind="count") == 2
    for job in jobs[:2]:
        caller.server.wait_for(job["id"], "paused")
    assert caller.server.job(jobs[2]["id"])["state"] == "running"
    assert bulk("pause", kind=["upload", "checksum"]) == 0
    assert bulk("cancel", owner="somebody else") == 0
    assert bulk("resume", state=["paused", "scheduled"]) == 2
    assert bulk("cancel") == 3
    for job in jobs:
        caller.server.wait_for(job["id"], "cancelled")
    assert bulk("delete", state="succeeded") == 0
    assert bulk("delete") == 3
    assert caller.server.jobs() == []


def test_many_cancels_may_be_forced(serve: Serve, tmp_path: Path) -> None:
    """With force=1 the grace of each ends, and the history says who has asked for that."""
    kind, until = tmp_path / "undoing.py", tmp_path / "until"
    kind.write_text(UNDOING)
    caller = Caller(serve("--kinds", str(kind)), "c")
    start = {"kind": "undoing", "params": {"until": str(until)}}
    jobs = [caller.post("/v1/jobs", start).json["id"] for _ in range(2)]

    def have_begun() -> bool:
        return all(caller.server.job(job)["progress"]["done"] == 1 for job in jobs)

    eventually(have_begun, "they have something to take back")
    for query in ("", "", "?force=1"):
        answer = caller.post(f"/v1/jobs/cancel{query}", {"ids": jobs})
        assert answer.json == {"n": 2, "failures": 0, "failed": []}
    until.touch()
    for job in jobs:
        caller.server.wait_for(job, "cancelled")
        events = caller.get(f"/v1/jobs/{job}/events").json["items"]
        asked = [(e["from"], e["to"]) for e in events if e["cause"] == "command"]
        assert asked == [("running", "cancelling"), ("cancelling", "cancelling")]


def test_a_command_to_many_under_a_key_is_obeyed_once(caller: Caller) -> None:
    """A repeat tells the counts of the first, and touches no job again."""
    jobs = [running(caller) for _ in range(2)]
    body = {"ids": [job["id"] for job in jobs] + ["none"]}
    key = a_key()
    first = caller.post("/v1/jobs/pause", body, Idempotency_Key=key)
    for job in jobs:
        caller.server.wait_for(job["id"], "paused")
        post(caller, job, "resume", Prefer="wait=30")
    again = caller.post("/v1/jobs/pause", body, Idempotency_Key=key)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert (again.json["n"], again.json["failures"]) == (first.json["n"], 1) == (2, 1)
    assert again.json["failed"][0]["problem"]["code"] == "job-unknown"
    for job in jobs:
        assert caller.server.job(job["id"])["want"] == "run"
        post(caller, job, "cancel")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "ids"),
        ({"ids": ["a"], "filter": {}}, "ids"),
        ({"ids": []}, "ids"),
        ({"ids": "a"}, "ids"),
        ({"ids": [5]}, "ids[0]"),
        ({"ids": ["x" * 65]}, "ids[0]"),
        ({"ids": ["a"] * 501}, "ids"),
        ({"filter": {"state": "done"}}, "state"),
        ({"filter": {"state": ["running", "done"]}}, "state"),
        ({"filter": {"colour": "red"}}, "filter.colour"),
        ({"filter": {"q": "x" * 201}}, "q"),
        ({"colour": "red"}, "colour"),
        ([], None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_command_to_many_is_a_400(caller: Caller, body: Any, field: str | None) -> None:
    """What is missing, unknown, too long or of a wrong type is named, and no job is touched."""
    answer = caller.post("/v1/jobs/cancel", body)
    assert code_of(answer) == (400, "invalid-field")
    assert answer.json.get("field") == field


def test_a_verb_is_no_job(site: Server) -> None:
    """The addresses of commands to many are no jobs: only a POST is allowed there."""
    for verb in ("pause", "resume", "cancel", "retry", "delete"):
        answer = site.get(f"/v1/jobs/{verb}")
        assert (answer.status, answer.headers["Allow"]) == (405, "POST, OPTIONS")
    assert site.post("/v1/jobs/stop", {"filter": {}}).status == 405
