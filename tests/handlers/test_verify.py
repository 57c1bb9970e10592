"""The verifier, as an operator runs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Serve
from tests.handlers.clients import Caller
from tests.harness import ROOT, Server, eventually
from tests.interop.proxy import Proxy


def verify(url: str, *options: str, for_s: float = 600) -> subprocess.Popen[str]:
    """Start it; for longer than any test lasts unless a test says so."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.verify", url, "--for", str(for_s), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(verifying: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and what it said, or else complained of."""
    said, complained = verifying.communicate(timeout=60)
    return verifying.returncode, said or complained


def interrupted(verifying: subprocess.Popen[str]) -> tuple[int, str]:
    """The same of one that a person ends."""
    verifying.send_signal(signal.SIGINT)
    return outcome(verifying)


def follows(verifying: subprocess.Popen[str]) -> None:
    """Return when it says that it follows the jobs."""
    assert verifying.stderr is not None
    assert verifying.stderr.readline() == "verify: following the jobs\n"


def follow(server: Server, n: int) -> None:
    """Return when so many follow the jobs of a server."""
    eventually(lambda: server.get("/v1/status").json["subscribers"] == n, f"{n} follow")


def reach(proxy: Proxy, beyond: int) -> None:
    """Return when more bytes than that have passed on to the server."""
    eventually(lambda: proxy.sent > beyond, "it is there, or there again")


def move(made: Callable[[], int], n: int = 2) -> None:
    """Return when so many jobs have come and gone."""
    begun = made()
    eventually(lambda: made() >= begun + n, "jobs have moved")


@contextmanager
def busy(caller: Caller) -> Iterator[Callable[[], int]]:
    """Jobs come and go meanwhile, and are deleted; how many have been so far."""
    done = threading.Event()
    made = 0

    def work() -> None:
        nonlocal made
        while not done.is_set():
            try:
                body = {"kind": "count", "params": {"steps": 0}}
                answer = caller.post("/v1/jobs", body)
                if answer.status == 503:  # it has just been started again
                    continue
                job = answer.json["id"]
                caller.server.wait_for(job, "succeeded")
                if made % 3 == 0:
                    caller.delete(f"/v1/jobs/{job}")
            except (ConnectionError, OSError):
                continue
            made += 1

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield lambda: made
    finally:
        done.set()
        thread.join(30)


def test_all_is_told(serve: Serve) -> None:
    """It follows live jobs, and finds that nothing was missed or repeated."""
    server = serve()
    with busy(Caller(server, "c")) as made:
        verifying = verify(server.url)
        follows(verifying)
        move(made, 10)
    status, said = interrupted(verifying)
    assert (status, said.splitlines()[-1]) == (0, "0 missed, 0 repeated")
    assert int(said.split()[0]) > 0
    assert "0 reconnects, 0 resets" in said
    assert "p99" in said


@pytest.mark.parametrize("options", [("--kind", "count"), ("--state", "running"), ("--q", "count")])
def test_a_filter_is_verified(site: Server, caller: Caller, options: tuple[str, ...]) -> None:
    """What a filter takes is all that is compared."""
    with busy(caller):
        status, said = outcome(verify(site.url, *options, for_s=4))
    assert (status, said.splitlines()[-1]) == (0, "0 missed, 0 repeated"), said


def test_cuts_lose_nothing(serve: Serve) -> None:
    """Over a network that breaks again and again it resumes, and still knows everything."""
    server = serve()
    proxy = Proxy(server.port)
    sent = 0
    try:
        with busy(Caller(server, "c")) as made:
            verifying = verify(proxy.url)
            follows(verifying)
            for n in (2, 2, 2, 2, 10):
                reach(proxy, sent)
                follow(server, 1)  # a connection was made; now it is a subscriber
                move(made, n)
                if n == 2:
                    proxy.cut()
                    sent = proxy.sent
        status, said = interrupted(verifying)
    finally:
        proxy.close()
    assert (status, said.splitlines()[-1]) == (0, "0 missed, 0 repeated"), said


def test_a_restart_loses_nothing(serve: Serve) -> None:
    """It outlives kill -9 of the server, and a log that goes on."""
    server = serve()
    caller = Caller(server, "c")
    proxy = Proxy(server.port)
    proxy.patient = True  # it gives up on a server that it never reached
    try:
        with busy(caller) as made:
            verifying = verify(proxy.url)
            follows(verifying)
            move(made)
            server.kill()
            server.start()
            follow(server, 1)
            move(made, 10)
        status, said = interrupted(verifying)
    finally:
        proxy.close()
    assert (status, said.splitlines()[-1]) == (0, "0 missed, 0 repeated"), said


def test_what_is_missed_is_named(
    site: Server,
    caller: Caller,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A subscriber that does not keep the gap rule is found out, with the job and the version."""
    from jobs import verify as module  # noqa: PLC0415 - only this test runs it in its own process
    from jobs.replica import Replica  # noqa: PLC0415

    dropped: list[tuple[str, int]] = []
    hear, heard = module.Verifier._hear, 0

    def lossy(self: module.Verifier, message: dict[str, object]) -> list[dict[str, object]]:
        nonlocal heard
        row, ready = message.get("row"), self.replica.ready
        if message["t"] == "ev" and ready and not dropped and isinstance(row, dict):
            dropped.append((row["id"], row["version"]))
            return []
        answers = hear(self, message)
        heard += message["t"] == "ev" and ready
        if heard == 10:  # so that it has come far behind what it has missed
            raise KeyboardInterrupt
        return answers

    monkeypatch.setattr(module.Verifier, "_hear", lossy)
    monkeypatch.setattr(Replica, "follows", lambda self, message: self.cursor is not None)
    with busy(caller):
        status = module.main([site.url, "--for", "600"])
    said = capsys.readouterr().out
    assert status == 1
    assert f"missed: job {dropped[0][0]}, version {dropped[0][1]}" in said
    assert said.splitlines()[-1] == "1 missed, 0 repeated"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "nonsense:"])
def test_what_is_no_service_is_said(url: str) -> None:
    """It can't tell, and says why in one line."""
    status, said = outcome(verify(url, for_s=20))
    assert status == 2
    assert said.startswith("verify: ")
    assert len(said.splitlines()) == 1
