"""What Prometheus scrapes, read with its own parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.handlers.clients import Caller, Raw
from tests.harness import Server, eventually

BLOCKER = """
import time
import msgspec

KIND, TITLE = "blocker", "Holds the loop"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    steps: int = 1
    step_s: float = 0.05

async def run(ctx, params):
    for n in range(params.steps):
        time.sleep(params.step_s)
        await ctx.sleep(0.01)
"""
NAPPER = """
import msgspec

KIND, TITLE, RUNNER = "napper", "Waits in a child process", "child"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass

async def run(ctx, params):
    await ctx.checkpoint(1, done=1)
    while True:
        await ctx.sleep(1)
"""
ENDLESS = {"kind": "count", "params": {"steps": 10**6, "delay_s": 0.01}}


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """Each sample: its name and the values of its labels, in the order of their names."""
    answer = server.get("/metrics")
    assert answer.status == 200
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def ended(server: Server, body: Any) -> Any:
    """A job that was waited for."""
    answer = server.post("/v1/jobs", body, Prefer="wait=30")
    assert answer.status == 200, answer
    return answer.json


def test_what_is_there_is_counted(caller: Caller, name: str) -> None:
    """Jobs by kind and state, slots, the queue, bytes in and out, what is stored."""
    server = caller.server
    before = scrape(server)
    assert before["sluice_slots",] == 8
    file_id = caller.store(name, bytes(70_000))
    assert len(caller.content(file_id)) == 70_000
    job = server.post("/v1/jobs", ENDLESS).json
    server.wait_for(job["id"], "running")
    now = scrape(server)
    assert now["sluice_jobs", "count", "running"] == 1
    uploads = ("sluice_jobs", "upload", "succeeded")
    assert now[uploads] == before.get(uploads, 0) + 1
    assert (now["sluice_used_slots",], now["sluice_queued_jobs",]) == (1, 0)
    for counted in ("sluice_received_bytes_total", "sluice_sent_bytes_total"):
        assert now[counted,] >= before[counted,] + 70_000
    assert now["sluice_stored_files",] == before["sluice_stored_files",] + 1
    assert now["sluice_stored_bytes",] == before["sluice_stored_bytes",] + 70_000
    assert now["sluice_free_bytes",] > 0
    server.post(f"/v1/jobs/{job['id']}/cancel", Prefer="wait=30")
    assert ("sluice_jobs", "count", "running") not in scrape(server)


def test_pauses_and_cancels_are_timed(site: Server) -> None:
    """Each that a running job had to obey is in the histogram of its kind, once."""
    before = scrape(site)
    job = site.post("/v1/jobs", ENDLESS).json
    site.wait_for(job["id"], "running")
    for verb in ("pause", "pause", "resume", "cancel", "cancel"):
        assert site.post(f"/v1/jobs/{job['id']}/{verb}", Prefer="wait=30").status == 200
    now = scrape(site)
    for verb in ("pause", "cancel"):
        name = f"sluice_{verb}_seconds"
        count = now[f"{name}_count",] - before[f"{name}_count",]
        assert count == 1
        assert now[f"{name}_bucket", "+Inf"] == now[f"{name}_count",]
        assert now[f"{name}_bucket", "60.0"] == now[f"{name}_count",]
        assert now[f"{name}_sum",] > before[f"{name}_sum",]
    eventually(lambda: scrape(site)["sluice_loop_lag_seconds_count",] > 1, "the lag is sampled")


def test_who_waits_is_counted_as_long_as_it_is_there(site: Server) -> None:
    """A request that waits for a job is one; a client that hangs up leaves none behind."""
    with Raw(site) as raw:
        body = json.dumps(ENDLESS).encode()
        raw.head("POST", "/v1/jobs", Prefer="wait=60", Content_Length=len(body))
        raw.send(body)
        eventually(lambda: scrape(site)["sluice_waiting_requests",] == 1, "it waits")
        raw.cut()
    eventually(lambda: scrape(site)["sluice_waiting_requests",] == 0, "it has gone")
    [job] = eventually(lambda: site.jobs("?state=running"), "the job runs")
    site.post(f"/v1/jobs/{job['id']}/cancel", Prefer="wait=30")


def test_subscribers_are_counted(site: Server) -> None:
    """Whoever follows the channel is one, until it leaves."""
    assert scrape(site)["sluice_subscribers",] == 0
    socket = site.socket()
    eventually(lambda: scrape(site)["sluice_subscribers",] == 1, "it is there")
    socket.close()
    eventually(lambda: scrape(site)["sluice_subscribers",] == 0, "it has left")


def test_a_kind_that_holds_the_loop_is_named(tmp_path: Path) -> None:
    """Steps over 20 ms are counted for their kind, with the worst, here and in the status."""
    (tmp_path / "blocker.py").write_text(BLOCKER)
    server = Server(tmp_path / "data", "--kinds", str(tmp_path / "blocker.py"))
    server.start()
    try:
        assert not [sample for sample in scrape(server) if sample[0].startswith("sluice_slow")]
        assert server.get("/v1/status").json["slow_steps"] == []
        ended(server, {"kind": "blocker", "params": {"steps": 3}})
        ended(server, {"kind": "blocker", "params": {"step_s": 0.1}})
        now = scrape(server)
        n = now["sluice_slow_steps_total", "blocker"]
        assert n in (4, 5, 6)  # where the machine holds us, also the last step of a job
        assert 0.1 <= now["sluice_slowest_step_seconds", "blocker"] < 60
        [slow] = server.get("/v1/status").json["slow_steps"]
        assert (slow["kind"], slow["n"]) == ("blocker", n)
        assert slow["worst_ms"] >= 100
    finally:
        server.close()


def test_child_processes_are_counted(tmp_path: Path) -> None:
    """One that runs and one that is paused are there, one that was cancelled is not."""
    (tmp_path / "napper.py").write_text(NAPPER)
    server = Server(tmp_path / "data", "--kinds", str(tmp_path / "napper.py"))
    server.start()
    try:
        job = server.post("/v1/jobs", {"kind": "napper"}).json["id"]
        eventually(lambda: scrape(server)["sluice_children",] == 1, "it runs")
        eventually(lambda: server.job(job)["progress"]["done"] == 1, "it has begun")
        assert server.post(f"/v1/jobs/{job}/pause", Prefer="wait=30").status == 200
        assert scrape(server)["sluice_children",] == 1
        assert server.post(f"/v1/jobs/{job}/cancel", Prefer="wait=30").status == 200
        assert scrape(server)["sluice_children",] == 0
    finally:
        server.close()


def test_a_scraper_may_ask_for_openmetrics(site: Server) -> None:
    """The format follows Accept; each has its own media type."""
    plain = site.get("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=")
    assert (plain.headers["Vary"], plain.headers["Cache-Control"]) == ("Accept", "no-store")
    accept = "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"
    open_ = site.get("/metrics", Accept=accept)
    assert open_.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    parse: Any = openmetrics.text_string_to_metric_families
    families = list(parse(open_.body.decode()))
    assert "sluice_slots" in {family.name for family in families}


def test_the_rules_of_access_are_those_of_the_status(site: Server) -> None:
    """A foreign host name is refused, as everywhere."""
    for path in ("/metrics", "/v1/status"):
        answer = site.get(path, Host="evil.example")
        assert (answer.status, answer.json["code"]) == (403, "unknown-host")
        assert site.post(path).status == 405
