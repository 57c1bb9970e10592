"""The jobs' own endpoints: start, list, look, change, command, delete, history, log, kinds."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.handlers.clients import UNDOING, UUID7, Caller, Raw
from tests.harness import Answer, Server, eventually, form

FIELDS = {
    *("id", "h", "kind", "name", "owner", "client", "state", "want", "reason", "version"),
    *("attempt", "priority", "params", "created_at", "started_at", "ended_at", "not_before"),
    *("deadline_at", "expires_at", "retry_of", "after", "by", "waiting", "progress", "transfer"),
    *("rollback", "result", "artifacts", "error"),
}


def start(caller: Caller, steps: int = 100_000, delay_s: float = 0.01, **more: Any) -> Any:
    """Start a count; its row."""
    params = {"steps": steps, "delay_s": delay_s}
    answer = caller.post("/v1/jobs", {"kind": "count", "params": params} | more)
    assert answer.status == 201, answer
    return answer.json


def running(caller: Caller) -> Any:
    """A count that runs."""
    return caller.server.wait_for(start(caller)["id"], "running")


def ended(caller: Caller) -> Any:
    """A count that has succeeded."""
    return caller.server.wait_for(start(caller, 0)["id"], "succeeded")


def command(caller: Caller, job: Any, verb: str, **headers: str) -> Answer:
    """Command a job."""
    return caller.post(f"/v1/jobs/{job['id']}/{verb}", **headers)


def change(caller: Caller, job: Any, body: Any, **headers: str) -> Answer:
    """Change a job."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    path = f"/v1/jobs/{job['id']}"
    return caller.server.request("PATCH", path, body, {"X-Client-Id": caller.client} | names)


# Start


def test_a_job_is_started(caller: Caller) -> None:
    """A start is answered with 201, the job's address, its version and its row."""
    body = {
        "kind": "count",
        "params": {"steps": 3, "delay_s": 0},
        "name": "three ☃",
        "priority": 7,
    }
    answer = caller.post("/v1/jobs", body)
    job = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["Etag"] == f'"{job["version"]}"'
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(job) == FIELDS
    assert UUID7.fullmatch(job["id"])
    assert (job["name"], job["priority"], job["client"]) == ("three ☃", 7, caller.client)
    assert job["params"] == {"steps": 3, "delay_s": 0.0, "undo_steps": 0}
    assert (job["by"]["actor"], job["by"]["via"]) == (caller.client, "rest")
    done = caller.server.wait_for(job["id"], "succeeded")
    assert done["result"] == {"file": None, "data": {"counted": 3}}
    assert done["progress"]["done"] == done["progress"]["total"] == 3
    assert done["h"] == job["h"]


def test_a_job_waits_for_its_time(caller: Caller) -> None:
    """A job with a time ahead is scheduled, can be paused and resumed, and then runs."""
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    job = start(caller, 0, not_before=later)
    assert (job["state"], job["waiting"]["why"]) == ("scheduled", "time")
    assert command(caller, job, "pause").json["state"] == "paused"
    assert command(caller, job, "resume").json["state"] == "scheduled"
    assert command(caller, job, "cancel").json["state"] == "cancelled"
    soon = (datetime.now(UTC) + timedelta(seconds=0.2)).isoformat()
    job = start(caller, 0, not_before=soon)
    caller.server.wait_for(job["id"], "succeeded")


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"", "invalid-json", None),
        (b"{", "invalid-json", None),
        (b"kind=count", "invalid-json", None),
        (b'{"kind": "\xff"}', "invalid-json", None),
        (b'{"kind": "count", "params": {"a": ' + b"[" * 100_000, "invalid-json", None),
        (b"[]", "invalid-field", None),
        (b"null", "invalid-field", None),
        (b"{}", "invalid-field", "kind"),
        (b'{"kind": 5}', "invalid-field", "kind"),
        (b'{"kind": ""}', "invalid-field", "kind"),
        (b'{"kind": "nope"}', "unknown-kind", "kind"),
        (b'{"kind": "upload"}', "kind-not-startable", "kind"),
        (b'{"kind": "download"}', "kind-not-startable", "kind"),
        (b'{"kind": "count", "colour": 1}', "invalid-field", "colour"),
        (b'{"kind": "count", "params": []}', "invalid-field", "params"),
        (b'{"kind": "count", "params": null}', "invalid-field", "params"),
        (b'{"kind": "count", "params": {"steps": "5"}}', "invalid-field", "params.steps"),
        (b'{"kind": "count", "params": {"steps": 1.5}}', "invalid-field", "params.steps"),
        (b'{"kind": "count", "params": {"steps": true}}', "invalid-field", "params.steps"),
        (b'{"kind": "count", "params": {"steps": -1}}', "invalid-field", "params.steps"),
        (b'{"kind": "count", "params": {"delay_s": 3601}}', "invalid-field", "params.delay_s"),
        (b'{"kind": "count", "params": {"colour": 1}}', "invalid-field", "params.colour"),
        (b'{"kind": "checksum", "params": {}}', "invalid-field", "params.file"),
        (
            b'{"kind": "checksum", "params": {"file": "x", "algorithms": ["sha3"]}}',
            "invalid-field",
            "params.algorithms[0]",
        ),
        (b'{"kind": "count", "priority": 10}', "invalid-field", "priority"),
        (b'{"kind": "count", "priority": "5"}', "invalid-field", "priority"),
        (b'{"kind": "count", "name": ""}', "invalid-field", "name"),
        (b'{"kind": "count", "name": "%s"}' % (b"x" * 201), "invalid-field", "name"),
        (b'{"kind": "count", "not_before": 5}', "invalid-field", "not_before"),
        (b'{"kind": "count", "not_before": "soon"}', "invalid-field", "not_before"),
        (
            b'{"kind": "count", "not_before": "2030-01-01T00:00:00"}',
            "invalid-field",
            "not_before",
        ),
        (
            b'{"kind": "count", "not_before": "0001-01-01T00:00:00+14:00"}',
            "invalid-field",
            "not_before",
        ),
        (
            b'{"kind": "count", "not_before": "9999-12-31T23:59:59-14:00"}',
            "invalid-field",
            "not_before",
        ),
        (b'{"kind": "count", "name": "%s"}' % (b"x" * (1 << 20)), "body-too-long", None),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_wrong_start_is_a_400_that_names_the_field(
    caller: Caller, body: bytes, code: str, field: str | None
) -> None:
    """What is malformed, unknown, of a wrong type or too long is refused, and nothing starts."""
    answer = caller.post("/v1/jobs", body, Content_Type="application/json")
    assert (answer.status, answer.json["code"]) == (400, code), answer.json
    assert answer.json.get("field") == field
    assert caller.jobs() == []


def test_a_name_may_hold_any_characters(caller: Caller) -> None:
    """A job's name is kept as it was given, whatever stands in it."""
    name = "'; DROP TABLE jobs; -- \\ \u2028 \t \U0001f388 <script>"
    job = start(caller, 0, name=name)
    assert caller.get(f"/v1/jobs/{job['id']}").json["name"] == name


# List


def test_jobs_are_listed_newest_first_and_page_by_page(caller: Caller) -> None:
    """Pages follow each other without a gap and without a job twice."""
    ids = [start(caller, 0)["id"] for _ in range(9)]
    for job_id in ids:
        caller.server.wait_for(job_id, "succeeded")
    found: list[str] = []
    after = ""
    while len(found) < 9:
        page = caller.get(f"/v1/jobs?kind=count&limit=3{after}").json
        assert len(page["items"]) == 3
        found += [job["id"] for job in page["items"]]
        after = f"&after={page['next']}"
    assert found == ids[::-1]


def test_the_end_of_a_list_is_told(site: Server, caller: Caller) -> None:
    """On the last page next is null."""
    for _ in range(2):
        ended(caller)
    rows = len(site.jobs("?limit=500"))
    assert site.get("/v1/jobs?limit=500").json["next"] is None
    page = site.get(f"/v1/jobs?limit={rows - 1}").json
    assert len(site.jobs(f"?limit=1&after={page['next']}")) == 1


def test_filters_may_be_repeated(caller: Caller, name: str) -> None:
    """State and kind are filters; a repeated one matches any of its values."""
    caller.store(name, b"x")
    paused = running(caller)
    command(caller, paused, "pause")
    caller.server.wait_for(paused["id"], "paused")

    def ids(query: str) -> set[str]:
        mine = [job for job in caller.server.jobs(query) if job["client"] == caller.client]
        return {f"{job['kind']} {job['state']}" for job in mine}

    assert ids("?state=paused") == {"count paused"}
    assert ids("?state=paused&state=succeeded") == {"count paused", "upload succeeded"}
    assert ids("?kind=upload") == {"upload succeeded"}
    assert ids("?kind=upload&kind=count&state=paused") == {"count paused"}
    assert ids("?owner=local&kind=upload") == {"upload succeeded"}
    assert ids("?owner=somebody") == set()
    command(caller, paused, "cancel")


def test_a_list_tells_counts_and_a_cursor(caller: Caller) -> None:
    """A list tells how many jobs there are in each state, and where the log stands."""
    job = running(caller)
    page = caller.get("/v1/jobs?limit=1").json
    assert set(page) == {"items", "next", "cursor", "counts"}
    assert page["counts"]["running"] >= 1
    epoch, seq = page["cursor"].split(":")
    assert epoch and int(seq) > 0
    command(caller, job, "cancel")
    caller.server.wait_for(job["id"], "cancelled")
    eventually(
        lambda: int(caller.get("/v1/jobs?limit=1").json["cursor"].split(":")[1]) > int(seq),
        "the cursor moves on",
    )


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("after=x", "after"),
        ("after=%D9%A3", "after"),
        ("state=done", "state"),
        ("state=", "state"),
        ("colour=red", "colour"),
        ("limit=1&limit=2", "limit"),
        ("&".join(f"kind=k{i}" for i in range(21)), "kind"),
        ("&".join(f"kind=k{i}" for i in range(150)), None),
        ("kind=%FF", None),
    ],
)
def test_a_wrong_list_is_a_400(site: Server, query: str, field: str | None) -> None:
    """A parameter that is wrong or unknown is a 400 that names it."""
    answer = site.get(f"/v1/jobs?{query}")
    assert answer.status == 400
    assert answer.json.get("field") == field


# One job


def test_a_job_has_its_version_as_validator(caller: Caller) -> None:
    """The ETag of a job is its version; jobs are never cached."""
    job = ended(caller)
    answer = caller.get(f"/v1/jobs/{job['id']}")
    assert answer.headers["Etag"] == f'"{job["version"]}"'
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(answer.json) == FIELDS


def test_a_queued_job_tells_its_place(serve: Serve) -> None:
    """A job that waits for a slot tells how many are before it."""
    caller = Caller(serve("--slots", "1"), "c")
    first = running(caller)
    waiting = [start(caller), start(caller), start(caller, priority=9)]
    places = [caller.server.job(job["id"])["waiting"] for job in waiting]
    assert {place["why"] for place in places} == {"slot"}
    assert sorted(place["position"] for place in places) == [1, 2, 3]
    for job in (*waiting, first):
        command(caller, job, "cancel")


@pytest.mark.parametrize("path", ["", "/events", "/log"])
def test_an_unknown_job_is_a_404(site: Server, path: str) -> None:
    """What is not there is a 404."""
    answer = site.get(f"/v1/jobs/none{path}")
    assert (answer.status, answer.json["code"]) == (404, "job-unknown")


# Change


def test_a_job_is_renamed(caller: Caller) -> None:
    """A live and an ended job take a new name; it is an event, and the version is the new ETag."""
    job = running(caller)
    for name in ("new ☃ name", "its last name"):
        answer = change(caller, job, {"name": name})
        assert (answer.status, answer.json["name"]) == (200, name)
        assert answer.headers["Etag"] == f'"{answer.json["version"]}"'
        assert answer.headers["Cache-Control"] == "no-store"
        assert set(answer.json) == FIELDS
        assert (answer.json["by"]["actor"], answer.json["by"]["via"]) == (caller.client, "rest")
        event = caller.get(f"/v1/jobs/{job['id']}/events").json["items"][-1]
        assert (event["cause"], event["from"], event["to"]) == (
            *("renamed", answer.json["state"], answer.json["state"]),
        )
        assert (event["row"]["name"], event["actor"]) == (name, caller.client)
        command(caller, job, "cancel")
        caller.server.wait_for(job["id"], "cancelled")


def test_a_queued_job_is_moved_in_the_queue(serve: Serve) -> None:
    """A higher priority is a better place in the queue, and an earlier start."""
    caller = Caller(serve("--slots", "1"), "c")
    first = running(caller)
    early, late = start(caller), start(caller)
    answer = change(caller, late, {"priority": 9})
    assert (answer.json["priority"], answer.json["waiting"]["position"]) == (9, 1)
    command(caller, first, "cancel")
    caller.server.wait_for(late["id"], "running")
    assert caller.server.job(early["id"])["state"] == "queued"
    for job in (early, late):
        command(caller, job, "cancel")
        caller.server.wait_for(job["id"], "cancelled")


def test_the_limit_of_a_transfer_is_set_and_ended(caller: Caller, name: str) -> None:
    """An unfinished upload has the limit it was given, over its requests, until null ends it."""
    caller.block(name, 0, b"first")
    job = caller.job("upload")
    assert job["transfer"]["limit_bytes_per_s"] is None
    for limit in (5000, 1 << 40, None):
        answer = change(caller, job, {"limit_bytes_per_s": limit})
        assert answer.status == 200
        assert answer.json["transfer"]["limit_bytes_per_s"] == limit
        event = caller.get(f"/v1/jobs/{job['id']}/events").json["items"][-1]
        assert (event["cause"], event["row"]["transfer"]["limit_bytes_per_s"]) == ("command", limit)
    assert caller.block(name, 5, b"last", "&is_complete=1").status == 200


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"", "invalid-json", None),
        (b"{", "invalid-json", None),
        (b"[]", "invalid-field", None),
        (b"{}", "invalid-field", None),
        (b'{"colour": 1}', "invalid-field", "colour"),
        (b'{"name": "x", "state": "failed"}', "invalid-field", "state"),
        (b'{"name": null}', "invalid-field", "name"),
        (b'{"name": 5}', "invalid-field", "name"),
        (b'{"name": ""}', "invalid-field", "name"),
        (b'{"name": "a\\u0000b"}', "invalid-field", "name"),
        (b'{"name": "a\\nb"}', "invalid-field", "name"),
        (b'{"name": "%s"}' % (b"x" * 201), "invalid-field", "name"),
        (b'{"priority": 10}', "invalid-field", "priority"),
        (b'{"priority": -1}', "invalid-field", "priority"),
        (b'{"priority": null}', "invalid-field", "priority"),
        (b'{"priority": true}', "invalid-field", "priority"),
        (b'{"limit_bytes_per_s": "1"}', "invalid-field", "limit_bytes_per_s"),
        (b'{"limit_bytes_per_s": 0}', "invalid-field", "limit_bytes_per_s"),
        (b'{"limit_bytes_per_s": 1023}', "invalid-field", "limit_bytes_per_s"),
        (b'{"limit_bytes_per_s": 1e6}', "invalid-field", "limit_bytes_per_s"),
        (b'{"limit_bytes_per_s": 1099511627777}', "invalid-field", "limit_bytes_per_s"),
        (b'{"limit_bytes_per_s": %s}' % (b"9" * 9999), "invalid-field", "limit_bytes_per_s"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_wrong_change_is_a_400_that_names_the_field(
    caller: Caller, name: str, body: bytes, code: str, field: str | None
) -> None:
    """What is malformed, unknown, of a wrong type or out of bounds is refused, and nothing is."""
    caller.block(name, 0, b"first")
    job = caller.job("upload")
    answer = change(caller, job, body)
    assert (answer.status, answer.json["code"]) == (400, code), answer.json
    assert answer.json.get("field") == field
    assert caller.server.job(job["id"])["version"] == job["version"]


def test_a_process_has_no_limit(caller: Caller) -> None:
    """The limit is for transfers: a 400 for anything else, also to end one."""
    job = running(caller)
    for limit in (5000, None):
        answer = change(caller, job, {"limit_bytes_per_s": limit})
        assert (answer.status, answer.json["field"]) == (400, "limit_bytes_per_s")
    command(caller, job, "cancel")


def test_a_job_that_has_ended_is_only_renamed(caller: Caller, name: str) -> None:
    """Anything but a name comes too late: 409, and the name that came with it is not taken."""
    upload = caller.server.job(caller.send_form(("file", name, b"x")).json["job"])
    for body in ({"priority": 9}, {"limit_bytes_per_s": 5000}, {"name": "x", "priority": 9}):
        answer = change(caller, upload, body)
        assert (answer.status, answer.json["code"]) == (409, "job-finished")
        assert (answer.json["job"], answer.json["state"]) == (upload["id"], "succeeded")
    assert caller.server.job(upload["id"])["name"] == name
    assert change(caller, upload, {"name": "x"}).status == 200


def test_a_change_may_name_the_version_it_means(caller: Caller) -> None:
    """With If-Match a change is made only if the job has not changed since."""
    job = running(caller)
    stale = change(caller, job, {"name": "x"}, If_Match=f'"{job["version"] - 1}"')
    assert (stale.status, stale.json["code"]) == (412, "version-mismatch")
    assert stale.json["version"] == job["version"]
    assert change(caller, job, {"name": "x"}, If_Match="x").json["field"] == "If-Match"
    answer = change(caller, job, {"name": "x"}, If_Match=f'"{job["version"]}"')
    assert (answer.status, answer.json["version"]) == (200, job["version"] + 1)
    again = change(caller, job, {"name": "x"}, If_Match=answer.headers["Etag"])
    assert (again.status, again.headers["Etag"]) == (200, answer.headers["Etag"])
    command(caller, job, "cancel")


def test_an_unknown_job_is_not_changed(site: Server) -> None:
    """A change of nothing is a 404."""
    answer = site.request("PATCH", "/v1/jobs/none", {"name": "x"})
    assert (answer.status, answer.json["code"]) == (404, "job-unknown")


def test_another_site_changes_nothing(caller: Caller) -> None:
    """A PATCH is a change: a page of another site may not cause it."""
    job = ended(caller)
    answer = change(caller, job, {"name": "x"}, Origin="http://evil")
    assert (answer.status, answer.json["code"]) == (403, "cross-site")
    assert caller.server.job(job["id"])["name"] == job["name"]


# Commands


def test_a_job_is_paused_resumed_and_cancelled(caller: Caller) -> None:
    """A command is 202 while it is under way and 200 when it is done."""
    job = running(caller)
    answer = command(caller, job, "pause")
    assert (answer.status, answer.json["state"]) == (202, "pausing")
    assert answer.json["want"] == "pause"
    caller.server.wait_for(job["id"], "paused")
    answer = command(caller, job, "pause")
    assert (answer.status, answer.json["state"]) == (200, "paused")
    answer = command(caller, job, "resume")
    assert (answer.status, answer.json["state"]) == (202, "queued")
    caller.server.wait_for(job["id"], "running")
    assert command(caller, job, "resume").status == 200
    answer = command(caller, job, "cancel")
    assert (answer.status, answer.json["state"]) == (202, "cancelling")
    caller.server.wait_for(job["id"], "cancelled")
    answer = command(caller, job, "cancel")
    assert (answer.status, answer.json["state"]) == (200, "cancelled")


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_a_job_that_has_ended_takes_no_command(caller: Caller, verb: str) -> None:
    """What comes too late is a 409 that tells the state."""
    job = ended(caller)
    answer = command(caller, job, verb)
    assert (answer.status, answer.json["code"]) == (409, "job-finished")
    assert (answer.json["job"], answer.json["state"]) == (job["id"], "succeeded")


def test_a_job_that_is_being_cancelled_is_not_resumed(serve: Serve, tmp_path: Path) -> None:
    """A cancel is never withdrawn; its grace can be ended by force."""
    kind, until = tmp_path / "undoing.py", tmp_path / "until"
    kind.write_text(UNDOING)
    caller = Caller(serve("--kinds", str(kind)), "c")
    job = caller.post("/v1/jobs", {"kind": "undoing", "params": {"until": str(until)}}).json
    eventually(lambda: caller.server.job(job["id"])["progress"]["done"] == 1, "it has done it")
    assert command(caller, job, "cancel").status == 202
    for verb in ("pause", "resume"):
        answer = command(caller, job, verb)
        assert (answer.status, answer.json["code"]) == (409, "job-cancelling")
    until.touch()
    caller.server.wait_for(job["id"], "cancelled")


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "retry"])
def test_an_unknown_job_takes_no_command(site: Server, verb: str) -> None:
    """A command to nobody is a 404."""
    answer = site.post(f"/v1/jobs/none/{verb}")
    assert (answer.status, answer.json["code"]) == (404, "job-unknown")


@pytest.mark.parametrize("verb", ["pause", "cancel"])
def test_a_command_may_name_the_version_it_means(caller: Caller, verb: str) -> None:
    """With If-Match a command is obeyed only if the job has not changed since."""
    job = running(caller)
    stale = f'"{job["version"] - 1}"'
    answer = command(caller, job, verb, If_Match=stale)
    assert (answer.status, answer.json["code"]) == (412, "version-mismatch")
    assert answer.json["version"] == job["version"]
    assert caller.server.job(job["id"])["state"] == "running"
    assert command(caller, job, verb, If_Match=f'"{job["version"]}"').status == 202
    command(caller, job, "cancel", If_Match="*")


@pytest.mark.parametrize("header", ["x", "", ",", "-1", "1, 2", "'1'"])
def test_a_wrong_version_is_a_400(caller: Caller, header: str) -> None:
    """An If-Match that is no version is a 400 that names it."""
    job = ended(caller)
    answer = command(caller, job, "cancel", If_Match=header)
    assert (answer.status, answer.json["field"]) == (400, "If-Match")


def test_retry_makes_a_new_job(caller: Caller) -> None:
    """A job that has ended is run again as a new job that names the old one."""
    job = ended(caller)
    answer = command(caller, job, "retry")
    again = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/v1/jobs/{again['id']}"
    assert again["id"] != job["id"] and again["retry_of"] == job["id"]
    assert (again["params"], again["name"]) == (job["params"], job["name"])
    caller.server.wait_for(again["id"], "succeeded")


def test_only_what_has_ended_is_retried_or_deleted(caller: Caller) -> None:
    """A live job can neither be retried nor deleted: 409."""
    job = running(caller)
    for answer in (command(caller, job, "retry"), caller.delete(f"/v1/jobs/{job['id']}")):
        assert (answer.status, answer.json["code"]) == (409, "job-live")
    command(caller, job, "cancel")


def test_a_transfer_is_not_retried(caller: Caller, name: str) -> None:
    """Nobody can send the bytes again for the client."""
    job = caller.send_form(("file", name, b"x")).json["job"]
    answer = caller.post(f"/v1/jobs/{job}/retry")
    assert (answer.status, answer.json["code"]) == (400, "kind-not-startable")


def test_a_deleted_job_is_gone_and_its_file_stays(caller: Caller, name: str) -> None:
    """A delete forgets the job and its history, not its file."""
    answer = caller.send_form(("file", name, b"x")).json
    path = f"/v1/jobs/{answer['job']}"
    stale = caller.delete(path, If_Match='"99"')
    assert stale.status == 412
    deleted = caller.delete(path)
    assert (deleted.status, deleted.body) == (204, b"")
    for gone in (path, f"{path}/events", f"{path}/log"):
        assert caller.get(gone).status == 404
    assert caller.delete(path).status == 404
    assert caller.content(answer["id"]) == b"x"


def test_a_form_upload_is_paused_and_resumed(caller: Caller, name: str) -> None:
    """A paused upload reads nothing more; resumed it takes the rest."""
    data = bytes(range(256)) * 4000
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n'
    body = head % name.encode() + data + b"\r\n--b--\r\n"
    with Raw(caller.server) as raw:
        raw.head(
            "POST",
            "/upload",
            Content_Type="multipart/form-data; boundary=b",
            Content_Length=len(body),
            X_Client_Id=caller.client,
        )
        raw.send(body[:200_000])
        job = caller.job("upload")
        path = f"/v1/jobs/{job['id']}"
        eventually(lambda: caller.get(path).json["transfer"]["stored_bytes"] > 190_000, "stored")
        answer = caller.post(f"{path}/pause")
        assert answer.json["want"] == "pause"
        paused = caller.server.wait_for(job["id"], "paused")
        raw.send(body[200_000:])
        transfer = caller.get(path).json["transfer"]
        assert transfer["stored_bytes"] == paused["transfer"]["stored_bytes"]
        assert transfer["connected"] and transfer["warm"]
        answer = caller.post(f"{path}/resume")
        assert (answer.status, answer.json["state"]) == (200, "running")
        done = raw.answer()
    assert done.status == 200, done
    assert caller.content(done.json["id"]) == data


# History, log, kinds


def test_the_history_of_a_job(caller: Caller) -> None:
    """Each transition is listed once, oldest first, with its versions in order."""
    job = running(caller)
    command(caller, job, "pause")
    caller.server.wait_for(job["id"], "paused")
    command(caller, job, "cancel")
    caller.server.wait_for(job["id"], "cancelled")
    page = caller.get(f"/v1/jobs/{job['id']}/events").json
    steps = [(e["from"], e["to"], e["cause"]) for e in page["items"]]
    assert steps == [
        (None, "queued", "created"),
        ("queued", "running", "claimed"),
        ("running", "pausing", "command"),
        ("pausing", "paused", "checkpoint"),
        ("paused", "cancelling", "command"),
        ("cancelling", "cancelled", "undone"),
    ]
    assert [e["version"] for e in page["items"]] == list(range(1, len(steps) + 1))
    seqs = [e["seq"] for e in page["items"]]
    assert seqs == sorted(set(seqs))
    assert page["next"] is None
    signed = [(e["actor"], e["via"]) for e in page["items"]]
    mine, service = (caller.client, "rest"), ("service", "system")
    assert signed == [mine, service, mine, service, mine, service]
    assert page["items"][-1]["row"]["state"] == "cancelled"
    first = caller.get(f"/v1/jobs/{job['id']}/events?limit=2").json
    rest = caller.get(f"/v1/jobs/{job['id']}/events?after={first['next']}").json
    assert first["items"] + rest["items"] == page["items"]


def test_each_event_says_who_caused_it_and_through_which_door(serve: Serve) -> None:
    """Over HTTP, the channel, the simple API and tus, by the service itself, and by its death."""
    caller = Caller(serve("--slots", "1"), "ann")
    server = caller.server

    def told(job_id: str) -> list[tuple[str, str, str, str]]:
        rows = server.get(f"/v1/jobs/{job_id}/events").json["items"]
        return [(e["to"], e["cause"], e["actor"], e["via"]) for e in rows]

    job = caller.get("/demo/process/?steps=100000").json["id"]
    server.wait_for(job, "running")
    socket = server.socket("jobs.v1.json", header=["X-Client-Id: bob"])
    socket.say(t="hello", ver=1)
    socket.say(t="cmd", id=1, op="pause", job=job)
    server.wait_for(job, "paused")
    caller.server.post("/v1/jobs/resume", {"ids": [job]}, X_Client_Id="eve")
    server.wait_for(job, "running")
    change(caller, {"id": job}, {"name": "x"})
    socket.close()
    server.kill()
    server.start()
    server.wait_for(job, "running")
    caller.post("/demo/process/cancel/")
    server.wait_for(job, "cancelled")
    service = ("service", "system")
    assert told(job) == [
        ("queued", "created", "ann", "simple"),
        ("running", "claimed", *service),
        ("pausing", "command", "bob", "ws"),
        ("paused", "checkpoint", *service),
        ("queued", "command", "eve", "rest"),
        ("running", "claimed", *service),
        ("running", "renamed", "ann", "rest"),
        ("queued", "crash", *service),
        ("running", "claimed", *service),
        ("cancelling", "command", "ann", "simple"),
        ("cancelled", "undone", *service),
    ]
    tus = {"Tus-Resumable": "1.0.0", "X-Client-Id": "ann", "Upload-Defer-Length": "1"}
    upload = server.request("POST", "/tus/", None, tus).headers["Location"].rpartition("/")[2]
    del tus["Upload-Defer-Length"]
    tus |= {"Upload-Length": "5", "Upload-Offset": "0"}
    tus["Content-Type"] = "application/offset+octet-stream"
    assert server.request("PATCH", f"/tus/{upload}", b"bytes", tus).status == 204
    steps = [step for step in told(upload) if step[2:] != service]
    assert steps == [("running", "created", "ann", "tus"), ("running", "command", "ann", "tus")]
    cursor = server.get("/v1/jobs?limit=1").json["cursor"]
    caller.delete(f"/v1/jobs/{job}")
    [gone] = server.get(f"/v1/events?after={cursor}&wait=5").json["events"]
    assert (gone["to"], gone["actor"], gone["via"]) == ("deleted", "ann", "rest")


def test_the_log_of_a_job(caller: Caller) -> None:
    """A job's log lines are a list, empty where it said nothing."""
    job = ended(caller)
    page = caller.get(f"/v1/jobs/{job['id']}/log").json
    assert page == {"items": [], "next": None}


@pytest.mark.parametrize("path", ["events", "log"])
@pytest.mark.parametrize(
    ("query", "field"), [("limit=0", "limit"), ("after=x", "after"), ("x=1", "x")]
)
def test_a_wrong_page_is_a_400(caller: Caller, path: str, query: str, field: str) -> None:
    """A parameter that is wrong or unknown is a 400 that names it."""
    answer = caller.get(f"/v1/jobs/none/{path}?{query}")
    assert (answer.status, answer.json["field"]) == (400, field)


def test_kinds_have_a_schema(site: Server) -> None:
    """Each kind that can be started tells its parameters as JSON Schema."""
    kinds = {kind["kind"]: kind for kind in site.get("/v1/kinds").json["items"]}
    assert kinds["upload"]["startable"] is kinds["download"]["startable"] is False
    count = kinds["count"]
    assert (count["startable"], count["resumable"], count["unit"]) == (True, True, "steps")
    schema = count["params"]
    if "$ref" in schema:
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    assert schema["properties"]["steps"]["minimum"] == 0
    assert schema["properties"]["steps"]["default"] == 100
    assert schema["additionalProperties"] is False


def test_kinds_of_a_folder_run_and_a_broken_one_is_told(serve: Serve, tmp_path: Path) -> None:
    """The good kinds of ``--kinds`` can be started; of the broken one file and reason are there."""
    folder = tmp_path / "mykinds"
    folder.mkdir()
    (folder / "_text.py").write_text("GREETING = 'hello'\n")
    (folder / "greet.py").write_text(
        "import msgspec\nfrom ._text import GREETING\n"
        "KIND, TITLE = 'greet', 'Greet'\n"
        "class Params(msgspec.Struct, forbid_unknown_fields=True):\n    name: str\n"
        "async def run(ctx, params):\n    return {'said': f'{GREETING} {params.name}'}\n"
    )
    (folder / "broken.py").write_text("import sys\nsys.exit(open('/nowhere/at/all'))\n")
    server = serve("--kinds", str(folder))
    server.expected = ("broken.py is no kind",)
    page = server.get("/v1/kinds").json
    assert page["problems"] == [{"file": "broken.py", "detail": "line 2: FileNotFoundError"}]
    assert "greet" in [kind["kind"] for kind in page["items"]]
    job = server.post("/v1/jobs", {"kind": "greet", "params": {"name": "ann"}}).json
    assert server.wait_for(job["id"], "succeeded")["result"]["data"] == {"said": "hello ann"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("DELETE", "/v1/jobs", "GET, POST"),
        ("POST", "/v1/jobs/none", "GET, PATCH, DELETE"),
        ("GET", "/v1/jobs/none/pause", "POST"),
        ("POST", "/v1/kinds", "GET"),
        ("DELETE", "/v1/kinds", "GET"),
    ],
)
def test_other_methods_are_refused(site: Server, method: str, path: str, allowed: str) -> None:
    """A method that an address does not have is a 405 that tells which it has."""
    answer = site.request(method, path)
    assert (answer.status, answer.json["code"]) == (405, "method-not-allowed")
    assert answer.headers["Allow"] == f"{allowed}, OPTIONS"


def test_the_history_tells_when_a_sender_goes_and_comes_back(site: Server) -> None:
    """A cut in a block is noted with the connection gone; the next block notes the return."""
    path = "/upload?file_name=gone-and-back.bin&bytes_read="
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        head = f"POST {path}0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 10)
        job_id = eventually(
            lambda: [j["id"] for j in site.jobs() if j["name"] == "gone-and-back.bin"], "it begins"
        )[0]
    eventually(lambda: site.job(job_id)["reason"] == "client-gone", "the cut is noticed")
    job = site.job(job_id)
    assert job["state"] == "running"
    assert job["transfer"]["connected"] is False
    stored = job["transfer"]["stored_bytes"]
    assert site.post(f"{path}{stored}&is_complete=true", b"y").status == 200
    events = site.get(f"/v1/jobs/{job_id}/events").json["items"]
    assert [event["cause"] for event in events] == ["created", "client-gone", "client-back", "done"]
    assert [event["row"]["transfer"]["connected"] for event in events[1:3]] == [False, True]


def test_a_form_shows_what_was_received_while_it_arrives(site: Server) -> None:
    """The live row of a form upload counts received bytes, like that of a block."""
    body, content_type = form(("file", "arriving.bin", b"x" * 200_000))
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        head = f"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:100_000])
        transfer = eventually(
            lambda: [
                job["transfer"]
                for job in site.jobs("?state=running")
                if job["name"] == "arriving.bin"
                and job["transfer"]["stored_bytes"] > 90_000
                # Nothing is on its way between the one and the other.
                and job["transfer"]["received_bytes"] == job["transfer"]["stored_bytes"]
            ],
            "the first part is stored",
        )[0]
        assert transfer["received_bytes"] <= 100_000
        connection.sendall(body[100_000:])
        assert connection.recv(12) == b"HTTP/1.1 200"
