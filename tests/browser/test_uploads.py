"""Uploads that people make, or watch, on the page, in a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.pages import (
    DOWN,
    MB,
    Curl,
    beats,
    content,
    digest,
    row,
    see_steps,
    see_values,
)
from tests.conftest import Serve, need
from tests.handlers.test_proxy import PROGRAMS, configuration, free_port
from tests.harness import FULL, Server, eventually
from tests.interop.proxy import Proxy

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Dialog, Locator, Page, Route

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

UNLIMITED = -1


def stored_bytes(server: Server, job_id: str) -> int:
    """What the server has of an upload."""
    return int(server.job(job_id)["transfer"]["stored_bytes"])


def slow_down(context: BrowserContext, page: Page, bytes_per_s: float) -> None:
    """Let the page upload no faster than that."""
    limits = {
        "offline": False,
        "latency": 0,
        "downloadThroughput": -1,
        "uploadThroughput": bytes_per_s,
    }
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", limits)


def choose(page: Page, *paths: Path, folder: bool = False) -> None:
    """Choose files, or a folder, by the page's buttons."""
    with page.expect_file_chooser() as chooser:
        name = "Folder" if folder else "Upload"
        buttons = page.locator(".drop, .empty").get_by_role("button", name=name)
        buttons.locator("visible=true").first.click()
    chooser.value.set_files(list(paths))


def sending(page: Page) -> Locator:
    """What the page says of its own uploads."""
    return page.get_by_role("region", name="Uploads of this tab")


def stored(server: Server) -> dict[str, str]:
    """The digests of all stored files by name."""
    files: dict[str, str] = {}
    after = ""
    while True:
        found = server.get(f"/v1/files?limit=200{after}").json
        for file in found["items"]:
            files[file["name"]] = digest(server.get(f"/v1/files/{file['id']}/content").body)
        if found["next"] is None:
            return files
        after = f"&after={found['next']}"


def leave(page: Page) -> None:
    """Reload, though bytes are on their way."""
    asked: list[str] = []

    def accept(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.accept()

    page.on("dialog", accept)
    page.reload()
    page.remove_listener("dialog", accept)
    assert asked == ["beforeunload"]


def test_curl_uploads_move_the_bar(
    server: Server, relay: Proxy, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """The bars of a form and of a raw upload by curl show at least three different values."""
    page.goto(server.url)
    form, raw = make("form.bin", 5 * MB), make("raw.bin", 5 * MB)
    relay.hold_at(MB)
    curl("-F", f"file=@{form}", f"{relay.url}/upload")
    see_steps(page, "form.bin", 3, relay)
    relay.open()
    query = f"file_name=raw.bin&file_size={5 * MB}"
    row(page, form.name).get_by_text("Done", exact=True).wait_for()
    relay.hold_at(relay.sent + MB)
    curl("-X", "POST", "-T", str(raw), f"{relay.url}/upload?{query}")
    see_steps(page, "raw.bin", 3, relay)
    relay.open()
    for path in (form, raw):
        done = row(page, path.name)
        done.get_by_text("Done", exact=True).wait_for()
        assert content(server, path.name) == path.read_bytes()


def test_upload_is_paused_and_resumed_by_button(
    server: Server, relay: Proxy, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """A paused upload stores nothing more; resumed, it ends at 100 % with the right digest."""
    page.goto(server.url)
    path = make("big.bin", 5 * MB)
    relay.hold_at(MB)
    sender = curl("-F", f"file=@{path}", f"{relay.url}/upload")
    see_steps(page, "big.bin", 2, relay)
    page.get_by_role("button", name="Pause big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Paused")
    expect(row(page, "big.bin")).to_contain_text("paused by you")
    [job] = server.jobs()
    before = stored_bytes(server, job["id"])
    relay.open()
    beats(page, 2)
    assert stored_bytes(server, job["id"]) == before < 5 * MB
    assert sender.poll() is None
    page.get_by_role("button", name="Resume big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Done")
    expect(row(page, "big.bin")).to_contain_text("100\u00a0%")
    assert digest(content(server, "big.bin")) == digest(path.read_bytes())


def test_page_uploads_a_file_that_comes_back_the_same(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    tmp_path: Path,
) -> None:
    """A chosen file is uploaded with progress, and the download has the same bytes."""
    page.goto(server.url)
    slow_down(context, page, MB / 2)
    path = make("a & b %41 ünï.bin", 12 * MB)
    choose(page, path)
    see_values(page, path.name, 3)
    slow_down(context, page, UNLIMITED)
    row(page, path.name).get_by_text("Done", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Download {path.name}").click()
    copy = tmp_path / "copy"
    download.value.save_as(copy)
    assert copy.read_bytes() == path.read_bytes()
    assert download.value.suggested_filename == path.name


def test_page_upload_survives_kill_and_restart(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """An upload from the page goes on by itself after kill -9 and a restart in its middle."""
    allowed += [*DOWN, "status of 423"]
    page.goto(server.url)
    slow_down(context, page, MB)
    path = make("survivor.bin", 20 * MB)
    choose(page, path)
    assert see_values(page, path.name, 5)[-1] < 90
    server.kill()
    server.start()
    assert [job["state"] for job in server.jobs()] == ["running"]
    slow_down(context, page, UNLIMITED)
    expect(row(page, path.name)).to_contain_text("Done")
    assert content(server, path.name) == path.read_bytes()
    assert [job["state"] for job in server.jobs()] == ["succeeded"]


def test_upload_without_a_sender_says_what_is_safe(server: Server, page: Page) -> None:
    """An upload whose sender is away shows how much is stored, and that it waits."""
    page.goto(server.url)
    server.post(f"/upload?file_name=half.bin&file_size={2 * MB}", bytes(MB))
    half = row(page, "half.bin")
    expect(half).to_contain_text("1.0\u00a0MB are safe. Waits for its sender to go on.")
    expect(half.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")
    server.post(f"/upload?file_name=half.bin&bytes_read={MB}", bytes(MB))
    expect(half).to_contain_text("Done")


def test_page_upload_is_cancelled(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """A page's upload that is cancelled by its button stops for good."""
    allowed += [*DOWN, "409", "404", "410"]
    page.goto(server.url)
    slow_down(context, page, MB)
    path = make("unwanted.bin", 30 * MB)
    choose(page, path)
    see_values(page, path.name, 2)
    page.get_by_role("button", name=f"Cancel {path.name}").click()
    expect(row(page, path.name)).to_contain_text("Cancelled by you")
    beats(page, 2)
    expect(sending(page)).not_to_contain_text("Uploading")
    assert [job["state"] for job in server.jobs()] == ["cancelled"]


def test_many_files_arrive_byte_for_byte(server: Server, page: Page, tmp_path: Path) -> None:
    """All of many files, also empty ones and oddly named, arrive as they are; one line tells."""
    n = 200 if FULL else 20
    names = [
        "empty",
        "a & b %41 ünï.txt",
        "日本語 🐢.bin",
        "'\"<b>.html",
        "#?&=+;.x",
        "e\u0301.txt",
    ]
    names += [f"file {i}.bin" for i in range(n - len(names))]
    paths = [tmp_path / name for name in names]
    for i, path in enumerate(paths):
        path.write_bytes(os.urandom(i * 7919))
    page.goto(server.url)
    choose(page, *paths)
    expect(sending(page)).to_contain_text(f"Uploaded {n} files", timeout=60_000)
    expected = {unicodedata.normalize("NFC", p.name): digest(p.read_bytes()) for p in paths}
    assert stored(server) == expected
    page.get_by_role("button", name="Dismiss").first.click()
    expect(sending(page)).to_be_hidden()


def test_a_large_upload_goes_on_after_a_pause_and_a_reload(
    server: Server, page: Page, context: BrowserContext, tmp_path: Path
) -> None:
    """Paused, left and chosen again, also as another file of that size first, it ends right."""
    size = 1 << 30 if FULL else 30 * MB
    path, copy, wrong = tmp_path / "large.bin", tmp_path / "x" / "large.bin", tmp_path / "other"
    copy.parent.mkdir()
    with path.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(size // 64))
    shutil.copyfile(path, copy)  # with another date
    size = path.stat().st_size
    shutil.copyfile(path, wrong)
    with wrong.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 8))
    page.goto(server.url)
    slow_down(context, page, size / 40)
    choose(page, path)
    see_values(page, path.name, 2)
    page.get_by_role("button", name="Pause large.bin").click()
    expect(row(page, path.name)).to_contain_text("paused by you")
    [job] = server.jobs()
    leave(page)
    slow_down(context, page, UNLIMITED)
    # The server was told that nobody sends it any more, though it reads nothing while it is paused.
    eventually(lambda: not server.job(job["id"])["transfer"]["connected"], "it is let go")
    before = stored_bytes(server, job["id"])
    assert 0 < before < size
    page.get_by_role("button", name="Resume large.bin").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose file large.bin").click()
    chooser.value.set_files(wrong)
    page.get_by_text("That is not the large.bin of before").first.wait_for()
    assert stored_bytes(server, job["id"]) == before
    with page.expect_request(lambda request: request.method == "PATCH") as sent:
        choose(page, copy)
    assert int(sent.value.headers["upload-offset"]) == before
    expect(row(page, path.name)).to_contain_text("Done", timeout=60_000)
    [job] = server.jobs()
    assert job["state"] == "succeeded"
    assert stored(server) == {"large.bin": digest(path.read_bytes())}


def test_another_browser_goes_on(
    server: Server,
    chromium: Browser,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
) -> None:
    """What one browser is sending, another leaves alone; when the first has gone, it goes on."""
    path = make("shared.bin", 24 * MB)
    first = chromium.new_context()
    theirs = first.new_page()
    theirs.goto(server.url)
    slow_down(first, theirs, MB / 4)
    choose(theirs, path)
    see_values(theirs, path.name, 2)
    page.goto(server.url)
    row(page, path.name).wait_for()
    choose(page, path)
    expect(sending(page)).to_contain_text("shared.bin is not uploaded")
    sending(page).get_by_text("shared.bin is not uploaded").click()
    expect(sending(page)).to_contain_text("is being sent from another tab or browser just now")
    first.close()
    [job] = server.jobs()
    eventually(lambda: not server.job(job["id"])["transfer"]["connected"], "it has gone")
    before = stored_bytes(server, job["id"])
    assert 0 < before < 24 * MB
    with page.expect_request(lambda request: request.method == "PATCH") as sent:
        page.get_by_role("button", name="Try again shared.bin").click()
    assert int(sent.value.headers["upload-offset"]) == before
    expect(row(page, path.name)).to_contain_text("Done")
    assert [job["state"] for job in server.jobs()] == ["succeeded"]
    assert stored(server) == {"shared.bin": digest(path.read_bytes())}


def test_a_lost_answer_makes_no_second_upload(
    server: Server, page: Page, make: Callable[[str, int], Path], allowed: list[str]
) -> None:
    """An upload whose creation was not answered is found by its label and goes on."""
    allowed += ["net::ERR_"]
    lost: list[str] = []

    def lose(route: Route) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().headers["location"])
            route.abort()

    page.goto(server.url)
    page.route("**/tus/", lose)
    path = make("lost.bin", 9 * MB)
    choose(page, path)
    expect(row(page, path.name)).to_contain_text("Done")
    assert [job["id"] for job in server.jobs()] == lost
    assert stored(server) == {"lost.bin": digest(path.read_bytes())}


def test_folders_keep_their_paths(
    server: Server, page: Page, context: BrowserContext, tmp_path: Path
) -> None:
    """Folders, chosen or dropped, arrive with the paths of their files."""
    folder = tmp_path / "trip"
    expected = {}
    n = 120  # more than a folder is read at once
    for name in ["a.txt", "deep/er/a.txt", "deep/ü b.txt", *(f"many/{i}" for i in range(n))]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        expected[f"trip/{name}"] = digest(name.encode())
    page.goto(server.url)
    session = context.new_cdp_session(page)
    single = tmp_path / "single.txt"
    single.write_bytes(b"single")
    data = {"items": [], "files": [str(folder), str(single)], "dragOperationsMask": 1}

    def drag(kind: str) -> bool:
        event = {"type": kind, "x": 300, "y": 300, "data": data}
        session.send("Input.dispatchDragEvent", event)
        return page.get_by_text("Drop to upload").is_visible()

    def drop() -> bool:
        page.evaluate("window.end = null")
        drag("dragEnter")
        eventually(lambda: drag("dragOver"), "it may be dropped")
        drag("drop")
        return bool(page.wait_for_function("() => window.end").json_value() == "drop")

    page.evaluate(
        "for (const type of ['drop', 'dragleave']) addEventListener(type, () => { end = type; })"
    )
    # To the browser it is no drop while it has not heard that the page takes it: then it leaves.
    eventually(drop, "it is dropped")
    expect(sending(page)).to_contain_text(f"Uploaded {n + 4} files", timeout=60_000)
    assert stored(server) == expected | {"single.txt": digest(b"single")}
    (folder / "new.txt").write_bytes(b"new")
    shutil.rmtree(folder / "many")
    choose(page, folder, folder=True)
    expect(sending(page)).to_contain_text("Uploaded 4 files")
    assert stored(server).keys() == {*expected, "single.txt", "trip/new.txt"}


def test_all_of_a_tab_are_paused_resumed_and_cancelled(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """Pause all holds also what waits; a file removed meanwhile is named; Cancel all ends all."""
    allowed += [*DOWN, "404", "410"]
    page.goto(server.url)
    slow_down(context, page, MB)
    paths = [make(f"part {i}.bin", 9 * MB) for i in range(6)]
    choose(page, *paths, paths[0])
    for path in paths[:3]:
        row(page, path.name).wait_for()
    sending(page).get_by_role("button", name="Pause all").click()
    for path in paths[:3]:
        expect(row(page, path.name)).to_contain_text("Paused")
    expect(sending(page)).to_contain_text("Uploading 6 files: 0 done, 3 waiting")
    jobs = [job["id"] for job in server.jobs()]
    before = [stored_bytes(server, job) for job in jobs]
    choose(page, paths[0])
    page.get_by_text("part 0.bin is on the way already").first.wait_for()
    for path in (paths[3], paths[5]):
        path.unlink()
    beats(page, 2)
    assert [stored_bytes(server, job) for job in jobs] == before
    slow_down(context, page, 40 * MB)
    sending(page).get_by_role("button", name="Resume all").click()
    for path in (*paths[:3], paths[4]):
        expect(row(page, path.name)).to_contain_text("Done")
    expect(sending(page)).to_contain_text("2 files are not uploaded")
    # The file is there again, as another one: that is what it is chosen for.
    slow_down(context, page, MB / 5)
    paths[3].write_bytes(os.urandom(9 * MB))
    choose(page, paths[3])
    expect(sending(page)).to_contain_text("part 5.bin is not uploaded")
    row(page, paths[3].name).wait_for()
    sending(page).get_by_role("button", name="Cancel all").click()
    page.get_by_role("button", name="Undo").click()
    expect(row(page, paths[3].name)).to_contain_text("Running")
    sending(page).get_by_role("button", name="Cancel all").click()
    expect(row(page, paths[3].name)).to_contain_text("Cancelled by you")
    expect(sending(page)).to_contain_text("Uploaded 0 files")
    states = [job["state"] for job in server.jobs()]
    assert states == ["cancelled", *["succeeded"] * 4]
    sending(page).get_by_text("part 5.bin is not uploaded").click()
    expect(sending(page)).to_contain_text("It has changed or can no longer be read")
    page.get_by_role("button", name="Give up part 5.bin").click()
    expect(sending(page)).not_to_contain_text("part 5.bin")


def test_all_is_also_what_is_being_made(
    server: Server, page: Page, make: Callable[[str, int], Path], allowed: list[str]
) -> None:
    """Pause all and Cancel all hold for an upload whose job is still being made."""
    allowed += [*DOWN, "404", "410"]
    asked: list[Route] = []

    def hold(route: Route) -> None:
        asked.append(route)

    page.goto(server.url)
    page.route("**/tus/", hold)
    path = make("unborn.bin", 9 * MB)
    choose(page, path)
    eventually(lambda: page.evaluate("true") and asked, "the creation")
    sending(page).get_by_role("button", name="Pause all").click()
    asked.pop().continue_()
    expect(row(page, path.name)).to_contain_text("Paused")
    sending(page).get_by_role("button", name="Resume all").click()
    expect(row(page, path.name)).to_contain_text("Done")
    path = make("unwanted.bin", 9 * MB)
    choose(page, path)
    eventually(lambda: page.evaluate("true") and asked, "the creation")
    sending(page).get_by_role("button", name="Cancel all").click()
    page.get_by_role("button", name="Undo").wait_for()
    page.get_by_role("button", name="Undo").wait_for(state="hidden")
    asked.pop().continue_()
    expect(row(page, path.name)).to_contain_text("Cancelled by you")
    expect(sending(page)).to_contain_text("Uploaded 0 files")
    assert list(stored(server)) == ["unborn.bin"]


def test_a_pause_outlives_its_request(
    serve: Serve,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """A request that is ended because the pause is too long is followed by another, at resume."""
    allowed += [*DOWN, "503"]
    server = serve("--pause-hold-s", "1")
    page.goto(server.url)
    slow_down(context, page, MB / 2)
    path = make("patient.bin", 10 * MB)
    choose(page, path)
    see_values(page, path.name, 2)
    page.get_by_role("button", name=f"Pause {path.name}").click()
    [job] = server.jobs()
    eventually(lambda: not server.job(job["id"])["transfer"]["connected"], "it is let go")
    expect(row(page, path.name)).to_contain_text("Paused")
    with page.expect_request(lambda request: request.method == "PATCH"):
        page.get_by_role("button", name=f"Resume {path.name}").click()
    slow_down(context, page, UNLIMITED)
    expect(row(page, path.name)).to_contain_text("Done")
    assert stored(server) == {path.name: digest(path.read_bytes())}


def test_files_are_pasted(server: Server, page: Page) -> None:
    """A pasted file is uploaded; pasted text is nothing."""
    page.goto(server.url)
    page.locator("nav").wait_for()
    page.evaluate(
        """() => {
          for (const file of [null, new File(["pasted"], "image.png", { type: "image/png" })]) {
            const data = new DataTransfer();
            if (file) data.items.add(file);
            else data.setData("text/plain", "words");
            dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
          }
        }"""
    )
    expect(row(page, "image.png")).to_contain_text("Done")
    [file] = server.get("/v1/files").json["items"]
    assert (file["name"], file["media_type"]) == ("image.png", "image/png")


@contextlib.contextmanager
def nginx(server: Server, folder: Path, old: str, new: str) -> Iterator[str]:
    """An nginx as the docs set it up, but for one line; its address."""
    path = need("nginx")
    folder.mkdir()
    port = free_port()
    text = configuration("nginx", port, server)
    assert text.count(old) == 1
    file = folder / "conf"
    file.write_text(text.replace(old, new))
    command = PROGRAMS["nginx"].command(path, file)
    process = subprocess.Popen(command, cwd=folder, env={"HOME": str(folder), "PATH": ""})
    front = Server(server.folder)
    front.port = port
    try:
        eventually(lambda: front.get("/healthz").status == 200, "it serves")
        yield front.url
    finally:
        process.terminate()
        process.wait(10)


def test_a_proxy_that_collects_is_found(
    serve: Serve,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    tmp_path: Path,
    allowed: list[str],
) -> None:
    """Behind a proxy that buffers the page says so, and the bar moves all the same."""
    allowed += ["net::ERR_"]
    server = serve("--trusted-proxies", "127.0.0.1")
    with nginx(
        server, tmp_path / "nginx", "proxy_request_buffering off;", "proxy_request_buffering on;"
    ) as url:
        page.goto(url)
        slow_down(context, page, MB)  # it takes four seconds to be found
        path = make("collected.bin", 24 * MB)
        choose(page, path)
        page.get_by_text("Something between you and the server collects uploads").first.wait_for()
        expect(row(page, path.name)).to_contain_text("0\u00a0%")
        slow_down(context, page, 2 * MB)
        see_values(page, path.name, 3)
        slow_down(context, page, UNLIMITED)
        expect(row(page, path.name)).to_contain_text("Done")
        assert stored(server) == {path.name: digest(path.read_bytes())}
        page.goto("about:blank")


def test_a_proxy_that_lets_only_small_requests_pass(
    serve: Serve,
    page: Page,
    make: Callable[[str, int], Path],
    tmp_path: Path,
    allowed: list[str],
) -> None:
    """Where a proxy has a limit for bodies, a file goes through in pieces."""
    allowed += ["413"]
    server = serve("--trusted-proxies", "127.0.0.1")
    with nginx(
        server, tmp_path / "nginx", "client_max_body_size 0;", "client_max_body_size 1m;"
    ) as url:
        page.goto(url)
        paths = [make("large.bin", 20 * MB), make("small.bin", 3 * MB)]
        choose(page, *paths)
        for path in paths:
            expect(row(page, path.name)).to_contain_text("Done")
        assert stored(server) == {path.name: digest(path.read_bytes()) for path in paths}
        page.goto("about:blank")
