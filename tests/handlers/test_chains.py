"""One request for an upload and what follows it, and jobs that wait for others, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import Serve
from tests.handlers.clients import Caller, Raw
from tests.handlers.tus_client import Tus
from tests.harness import Server, eventually

DATA = b"a,b\n1,2\n" * 999
SHA = hashlib.sha256(DATA).hexdigest()
THEN = {"kind": "checksum", "params": {"algorithms": ["sha256"]}, "name": "what follows"}
SLOW = {"kind": "count", "params": {"steps": 100_000, "delay_s": 0.05}}


def then(start: Any = THEN) -> str:
    """The parameter of the query."""
    return f"then={quote(json.dumps(start))}"


def metadata(**values: str) -> str:
    """Upload-Metadata."""
    pairs = ((key, base64.b64encode(value.encode()).decode()) for key, value in values.items())
    return ",".join(f"{key} {value}" for key, value in pairs)


def ended(server: Server, job_id: str) -> Any:
    """A job as soon as it has ended."""
    return eventually(
        lambda: (job := server.job(job_id))["ended_at"] and job, f"job {job_id} has ended"
    )


def by_form(caller: Caller, name: str) -> str:
    """Upload a form; the upload's job."""
    body = (
        f'--B\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        + DATA
        + b"\r\n--B--\r\n"
    )
    answer = caller.post(f"/upload?{then()}", body, Content_Type="multipart/form-data; boundary=B")
    assert answer.status == 200, answer
    return str(answer.json["job"])


def break_off(caller: Caller, name: str, more: str = "") -> None:
    """Begin an upload by blocks, and go away before its first byte."""
    with Raw(caller.server) as raw:
        path = f"/upload?file_name={name}{more}"
        raw.head("POST", path, Content_Length=9, X_Client_Id=caller.client)
        eventually(lambda: any(job["kind"] == "upload" for job in caller.jobs()), "it has begun")
    eventually(
        lambda: not caller.server.job(caller.job("upload")["id"])["transfer"]["connected"],
        "it is noticed",
    )


def by_blocks(caller: Caller, name: str) -> str:
    """Upload by two blocks, after a first try that broke off."""
    break_off(caller, name, f"&{then()}")
    assert caller.block(name, 0, DATA[:100], f"&{then()}").status == 200
    answer = caller.block(name, 100, DATA[100:], f"&is_complete=true&{then()}")
    assert answer.status == 200, answer
    return str(answer.json["job"])


def by_tus(caller: Caller, name: str) -> str:
    """Upload by tus, in two pieces."""
    tus = Tus(caller.server, caller.client)
    path = tus.new(len(DATA), Upload_Metadata=metadata(filename=name, then=json.dumps(THEN)))
    tus.patch(path, 0, DATA[:100])
    assert tus.patch(path, 100, DATA[100:]).status == 204
    return path.rpartition("/")[2]


def by_resumable(caller: Caller, name: str) -> str:
    """Upload by the IETF's protocol."""
    answer = caller.post(
        f"/resumable/?{then()}", DATA, Upload_Complete="?1", Upload_Draft_Interop_Version="8"
    )
    assert answer.status == 201, answer
    return str(answer.json["job"])


@pytest.mark.parametrize("upload", [by_form, by_blocks, by_tus, by_resumable])
def test_what_follows_an_upload_is_part_of_its_request(
    caller: Caller, name: str, upload: Callable[[Caller, str], str]
) -> None:
    """One job waits for the upload, has its file as a parameter, and runs when that is stored."""
    job_id = upload(caller, name)
    child_id = caller.server.job(job_id)["params"]["then"]
    child = ended(caller.server, child_id)
    assert (child["state"], child["after"], child["name"]) == (
        "succeeded",
        [job_id],
        "what follows",
    )
    assert child["params"]["file"] == f"job:{job_id}"
    assert child["result"]["data"]["digests"]["sha256"] == SHA
    assert [job["kind"] for job in caller.jobs()] == ["checksum", "upload"]


def test_it_is_there_as_soon_as_the_upload_is(caller: Caller, name: str) -> None:
    """While the upload is under way, its follower waits and says for what; without it, it ends."""
    tus = Tus(caller.server, caller.client)
    path = tus.new(len(DATA), Upload_Metadata=metadata(filename=name, then=json.dumps(THEN)))
    child = caller.job("checksum")
    assert (child["state"], child["waiting"]["why"]) == ("scheduled", "after")
    assert tus.ask("DELETE", path).status == 204
    child = ended(caller.server, child["id"])
    assert (child["state"], child["reason"]) == ("cancelled", "after")
    assert child["error"]["parent"] == path.rpartition("/")[2]


@pytest.mark.parametrize(
    ("start", "field"),
    [
        ({"kind": "nothing"}, "kind"),
        ({"kind": "count", "params": {"steps": "many"}}, "params.steps"),
        ({"params": {}}, "then.kind"),
        ([], "then"),
        ({"kind": "count", "priority": 10}, "then.priority"),
    ],
)
def test_what_can_not_follow_is_refused_before_any_byte(
    caller: Caller, name: str, start: Any, field: str
) -> None:
    """A 400 that names the field, while the client still waits for 100; nothing is made."""
    refusals = []
    with Raw(caller.server) as raw:
        path = f"/upload?file_name={name}&{then(start)}"
        raw.head("POST", path, Content_Length=9, Expect="100-continue", X_Client_Id=caller.client)
        refusals.append(raw.answer())
    with Raw(caller.server) as raw:
        path = f"/resumable/?{then(start)}"
        raw.head("POST", path, Content_Length=9, Expect="100-continue", X_Client_Id=caller.client)
        refusals.append(raw.answer())
    tus = Tus(caller.server, caller.client)
    told = metadata(filename=name, then=json.dumps(start))
    refusals.append(tus.create(len(DATA), Upload_Metadata=told))
    for answer in refusals:
        assert answer.status == 400, answer
        assert answer.json["field"] == field, answer
    assert caller.jobs() == []


def test_nothing_follows_a_part(caller: Caller, name: str) -> None:
    """A partial upload of tus makes no file, so nothing can follow it."""
    tus = Tus(caller.server, caller.client)
    told = metadata(filename=name, then=json.dumps(THEN))
    answer = tus.create(5, Upload_Metadata=told, Upload_Concat="partial")
    assert answer.status == 400


def test_a_live_upload_gets_its_follower_once(caller: Caller, name: str) -> None:
    """A later first block may bring what follows; a repeated one makes no second job."""
    break_off(caller, name)
    assert [job["kind"] for job in caller.jobs()] == ["upload"]
    for _ in range(3):
        break_off(caller, name, f"&{then()}")
    assert [job["kind"] for job in caller.jobs()] == ["checksum", "upload"]
    assert caller.block(name, 0, DATA, "&is_complete=true").status == 200
    assert ended(caller.server, caller.job("checksum")["id"])["state"] == "succeeded"


def test_upload_then_checksum_by_two_requests(caller: Caller, name: str) -> None:
    """A start may name an upload that is under way, and its file."""
    tus = Tus(caller.server, caller.client)
    path = tus.new(len(DATA), Upload_Metadata=metadata(filename=name))
    upload = path.rpartition("/")[2]
    asked = {"kind": "checksum", "params": {"file": f"job:{upload}"}, "after": [upload]}
    started = caller.post("/v1/jobs", asked)
    assert (started.status, started.json["state"]) == (201, "scheduled")
    tus.patch(path, 0, DATA)
    child = ended(caller.server, started.json["id"])
    assert child["result"]["data"]["digests"]["sha256"] == SHA


def test_a_job_that_has_made_no_file(caller: Caller) -> None:
    """Its follower fails with a clear error."""
    parent = caller.post("/v1/jobs", {"kind": "count", "params": {"steps": 1, "delay_s": 0}})
    job_id = parent.json["id"]
    asked = {"kind": "checksum", "params": {"file": f"job:{job_id}"}, "after": [job_id]}
    child = ended(caller.server, caller.post("/v1/jobs", asked).json["id"])
    assert (child["state"], child["error"]["code"]) == ("failed", "file-unknown")
    assert job_id in child["error"]["detail"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"after": ["019506d0-0000-7000-8000-000000000000"]}, "after"),
        ({"after": ["x"] * 101}, "after"),
        ({"after": "x"}, "after"),
        ({"on": "failure"}, "on"),
    ],
)
def test_what_a_start_can_not_wait_for(caller: Caller, more: Any, field: str) -> None:
    """A 400 that names the field; no job is made."""
    answer = caller.post("/v1/jobs", SLOW | more)
    assert (answer.status, answer.json["field"]) == (400, field), answer
    assert caller.jobs() == []


@pytest.mark.parametrize("on", ["success", "any"])
def test_a_cancelled_parent(caller: Caller, on: str) -> None:
    """What must follow its success is cancelled; what follows its end runs."""
    parent = caller.post("/v1/jobs", SLOW).json["id"]
    quick = {"kind": "count", "params": {"steps": 1, "delay_s": 0}}
    child = caller.post("/v1/jobs", quick | {"after": [parent], "on": on}).json["id"]
    caller.post(f"/v1/jobs/{parent}/cancel")
    state = ended(caller.server, child)["state"]
    assert state == ("cancelled" if on == "success" else "succeeded")


def test_a_full_queue_is_a_429(serve: Serve) -> None:
    """Waiting jobs count, whatever they wait for; the answer says when to come again."""
    server = serve("--slots", "1", "--owner-queued", "2", "--kind-limits", '{"count": 1}')
    running = server.post("/v1/jobs", SLOW).json["id"]
    server.wait_for(running, "running")
    for later in ({"after": [running]}, {"not_before": "2099-01-01T00:00:00Z"}):
        assert server.post("/v1/jobs", SLOW | later).status == 201
    answer = server.post("/v1/jobs", SLOW)
    assert (answer.status, answer.json["code"]) == (429, "queue-full")
    assert int(answer.headers["Retry-After"]) > 0
    for job in server.jobs(""):
        server.post(f"/v1/jobs/{job['id']}/cancel")


def test_what_follows_an_upload_survives_kill_9(serve: Serve) -> None:
    """Killed while the upload is under way, and again right after its last byte."""
    server = serve()
    tus = Tus(server, "c")
    told = metadata(filename="a.csv", then=json.dumps(THEN))
    path = tus.new(len(DATA), Upload_Metadata=told)
    tus.patch(path, 0, DATA[:100])
    server.kill()
    server.start()
    child = server.jobs("?kind=checksum")[0]
    assert (child["state"], child["waiting"]["why"]) == ("scheduled", "after")
    offset = int(tus.ask("HEAD", path).headers["Upload-Offset"])
    assert tus.patch(path, offset, DATA[offset:]).status == 204
    server.kill()
    server.start()
    assert ended(server, child["id"])["result"]["data"]["digests"]["sha256"] == SHA
    assert len(server.jobs("")) == 2


def have_succeeded(server: Server, n: int) -> bool:
    """Whether so many jobs have."""
    return len(server.jobs("?state=succeeded&limit=500")) >= n


def test_chains_survive_kill_9(serve: Serve) -> None:
    """Killed at any moment, each link still runs once all before it have ended, and only then."""
    server = serve()
    step = {"kind": "count", "params": {"steps": 3, "delay_s": 0.005}}
    chains: list[list[str]] = []
    for _ in range(6):
        chain: list[str] = []
        for _ in range(12):
            answer = server.post("/v1/jobs", step | {"after": chain[-2:]})
            assert answer.status == 201, answer
            chain.append(answer.json["id"])
        doomed = server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "no such file"}})
        broken = server.post("/v1/jobs", step | {"after": [doomed.json["id"], chain[-1]]})
        chains.append([*chain, broken.json["id"]])
    for _ in range(6):
        goal = min(72, len(server.jobs("?state=succeeded&limit=500")) + 5)
        eventually(partial(have_succeeded, server, goal), "some links have run")
        server.kill()
        server.start()
    for chain in chains:
        jobs = [ended(server, job) for job in chain]
        assert [job["state"] for job in jobs] == ["succeeded"] * 12 + ["cancelled"]
        for before, job in pairwise(jobs[:-1]):
            assert before["ended_at"] <= job["started_at"]
