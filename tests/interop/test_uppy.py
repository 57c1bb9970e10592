"""What a page of another site can do with Uppy, and what it can not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.harness import eventually
from tests.interop.clients import SIZE, Uppy
from tests.interop.rig import HEADS, Rig, Source, digest_of, make_source

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("rig", ["uppy"], indirect=True)
def test_five_files_at_once(rig: Rig, tmp_path: Path) -> None:
    """Five files that are sent side by side are all stored."""
    sources = [make_source(tmp_path / f"{number}.bin", SIZE // 5) for number in range(5)]
    assert isinstance(rig.client, Uppy)
    rig.client.start(rig.endpoint, {}, *(source.path for source in sources))
    urls, errors = rig.client.outcome()
    assert (len(set(urls)), errors) == (5, [])
    stored = {file["name"]: digest_of(rig.server, file["id"]) for file in rig.files()}
    assert stored == {source.path.name: source.sha256 for source in sources}


@pytest.mark.parametrize("rig", ["uppy"], indirect=True)
def test_paused_by_the_page(rig: Rig, source: Source) -> None:
    """An upload that the page pauses at 40 % and resumes is sent once."""
    rig.start_and_hold(source)
    assert isinstance(rig.client, Uppy)
    rig.client.page.evaluate("uppy.pauseAll()")
    rig.proxy.release()
    eventually(lambda: not rig.jobs()[0]["transfer"]["connected"], "the request has ended")
    rig.client.page.evaluate("uppy.resumeAll()")
    rig.arrived(source)
    assert rig.proxy.sent < SIZE + HEADS


def test_only_the_origins_that_are_named(serve: Serve, uppy: Uppy, tmp_path: Path) -> None:
    """A page of an origin that the server was not told of can upload nothing."""
    server = serve("--cors-origins", "http://127.0.0.1:1")
    small = make_source(tmp_path / "small.bin", 1000)
    uppy.start(f"{server.url}/tus/", {"retryDelays": []}, small.path)
    urls, errors = uppy.outcome()
    assert (urls, len(errors)) == ([], 1)
    assert server.jobs() == []
