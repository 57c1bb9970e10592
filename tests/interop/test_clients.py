"""Whatever happens on the way: what a client calls uploaded is stored, byte for byte."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.interop.clients import FLAVOURS, SIZE, VARIANTS
from tests.interop.rig import HEADS, MARK, Rig, Source, make_source

PAUSE_S = 1.5


def flavours(*names: str) -> pytest.MarkDecorator:
    """Run the test with these flavours."""
    marks = {"uppy": pytest.mark.browser}
    given = [pytest.param(name, marks=marks.get(name.partition("-")[0], ())) for name in names]
    return pytest.mark.parametrize("rig", given, indirect=True)


every_flavour = flavours(*FLAVOURS)
every_variant = flavours(*FLAVOURS, *VARIANTS)


@every_flavour
def test_file_arrives(rig: Rig, source: Source) -> None:
    """A file is stored under its name, which may be in any script, and nothing else is."""
    rig.start(source)
    rig.arrived(source)


@flavours("tus-js", "tuspy", "aiotus", "uppy")
def test_empty_file_arrives(rig: Rig, tmp_path: Path) -> None:
    """A file without a byte is stored like any other."""
    empty = make_source(tmp_path / "empty.bin", 0)
    rig.start(empty)
    rig.arrived(empty)


@every_flavour
def test_killed_client_goes_on_where_it_was(rig: Rig, source: Source) -> None:
    """A client that died at 40 % and is started again sends only what is missing."""
    stored = rig.start_and_hold(source)
    rig.client.kill()
    rig.proxy.cut()
    before = rig.proxy.sent
    rig.start(source)
    rig.arrived(source)
    sent = rig.proxy.sent - before
    assert sent < SIZE - stored + HEADS


@every_flavour
def test_client_outlives_kill_9_of_the_server(rig: Rig, source: Source) -> None:
    """A client goes on by itself when the server is back, and repeats nothing acknowledged."""
    rig.start_and_hold(source)
    rig.server.kill()
    rig.proxy.cut()
    time.sleep(0.3)  # it tries in vain
    rig.proxy.patient = True  # what it asks next is asked of a server that is just starting
    rig.server.start()
    rig.arrived(source)
    repeated, piece = rig.proxy.sent - SIZE, rig.flavour.piece
    assert piece is None or repeated < piece + HEADS


@flavours("tus-js-chunks", "tus-js-draft-05", "tuspy", "aiotus", "uppy")
def test_client_outlives_a_restart(rig: Rig, source: Source) -> None:
    """A client that asks while the server stops goes on when it is back, and repeats nothing."""
    rig.start_and_hold(source)
    log = rig.server.log_path
    stops = log.read_text().count("stopping")
    stopping = threading.Thread(target=rig.server.stop)
    stopping.start()
    eventually(lambda: log.read_text().count("stopping") > stops, "the server stops")
    rig.proxy.cut()
    stopping.join()
    rig.proxy.patient = True
    rig.server.start()
    rig.arrived(source)
    repeated, piece = rig.proxy.sent - SIZE, rig.flavour.piece
    assert piece is None or repeated < piece + HEADS


@every_variant
def test_client_outlives_a_reset(rig: Rig, source: Source) -> None:
    """A client whose connections were reset at 40 % goes on by itself."""
    rig.proxy.cut_at(MARK)
    rig.start(source)
    rig.arrived(source)


@flavours("tus-js", "tus-js-parallel", "tus-js-draft-05", "tuspy", "aiotus", "uppy")
def test_client_waits_while_the_upload_is_paused(rig: Rig, source: Source) -> None:
    """The offset of a paused upload stands still; after the resume the client ends it."""
    rig.start_and_hold(source)
    paused = [job["id"] for job in rig.jobs() if job["state"] == "running"]
    for job in paused:
        assert rig.server.post(f"/v1/jobs/{job}/pause").status in (200, 202)
        rig.server.wait_for(job, "paused")
    stored = rig.stored()
    rig.proxy.release()
    end = time.monotonic() + PAUSE_S
    while time.monotonic() < end:
        assert rig.stored() == stored
        time.sleep(0.05)
    for job in paused:
        assert rig.server.post(f"/v1/jobs/{job}/resume").status in (200, 202)
    rig.arrived(source)


@flavours("tus-js", "tus-js-parallel", "uppy")
def test_terminated_upload_leaves_nothing(rig: Rig, source: Source) -> None:
    """An upload that its client terminates at 40 % is cancelled, and its bytes are freed."""
    rig.start_and_hold(source)
    rig.client.terminate()
    for job in rig.jobs():
        rig.server.wait_for(job["id"], "cancelled")
    tmp = rig.server.folder / "tmp"
    eventually(lambda: list(tmp.iterdir()) == [], "the bytes are freed")
    assert rig.files() == []
