"""What a person sees and does on the dashboard, in a real browser against a real server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import need
from tests.harness import FULL, Server, eventually, form

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

MB = 1_000_000
# What Chromium says of a server that is not there, or that is just starting.
DOWN = ["net::ERR_", "WebSocket connection", "status of 503"]
Curl = Callable[..., subprocess.Popen[bytes]]
# Keeps what the page says, and loses all events until one that leads to the state ``lose``.
LOSSY = """
window.said = [];
window.WebSocket = class extends WebSocket {
  set onmessage(hear) {
    super.onmessage = (event) => {
      const events = [JSON.parse(event.data)].flat().filter((message) => message.t === "ev");
      if (!window.lose || events.length === 0) hear(event);
      else if (events.some((message) => message.to === window.lose)) window.lose = null;
    };
  }
  send(text) {
    window.said.push(JSON.parse(text));
    super.send(text);
  }
};
"""


@pytest.fixture
def curl() -> Iterator[Curl]:
    """Run curl in the background; what is left of it ends with the test."""
    need("curl")
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["curl", "-sS", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, int], Path]:
    """Make a file of random bytes."""

    def write(name: str, size: int) -> Path:
        path = tmp_path / name
        path.write_bytes(os.urandom(size))
        return path

    return write


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def row(page: Page, name: str) -> Locator:
    """The row of the job of that name."""
    return page.locator("li[data-job]").filter(has=page.get_by_text(name, exact=True))


def see_values(page: Page, name: str, n: int) -> list[int]:
    """Wait until the bar has shown ``n`` different values; they only ever grow."""
    bar = row(page, name).get_by_role("progressbar")
    values: list[int] = []
    while len(values) < n:
        shown = page.wait_for_function(
            "([bar, seen]) => { const now = bar.getAttribute('aria-valuenow');"
            " return now !== null && !seen.includes(Number(now)) && now }",
            arg=[bar.element_handle(), values],
        )
        values.append(int(shown.json_value()))
    assert values == sorted(values)
    return values


def beats(page: Page, n: int) -> None:
    """Let ``n`` seconds' numbers of the server arrive."""
    points = "document.querySelector('.spark .line').getAttribute('points')"
    for _ in range(n):
        page.wait_for_function(f"(before) => {points} !== before", arg=page.evaluate(points))


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


def count_slowly(server: Server, name: str) -> str:
    """Start a process that goes on for minutes, a percent each second or two; its id."""
    params = {"steps": 5000, "delay_s": 0.02}
    started = server.post("/v1/jobs", {"kind": "count", "params": params, "name": name})
    return str(started.json["id"])


def lose_its_pause(server: Server, page: Page, job_id: str) -> None:
    """Pause a job, and let the page lose the events that tell of it."""
    page.evaluate("window.lose = 'paused'")
    server.post(f"/v1/jobs/{job_id}/pause")
    page.wait_for_function("() => window.lose === null")
    expect(row(page, "counting")).not_to_contain_text("Paused")


def subscriptions(page: Page) -> list[Any]:
    """What a lossy page has subscribed with."""
    said: list[Any] = page.evaluate("window.said.filter((message) => message.t === 'sub')")
    return said


def content(server: Server, name: str) -> bytes:
    """The newest stored file of that name."""
    files = server.get(f"/v1/files?name={name}").json["items"]
    return server.get(f"/v1/files/{files[0]['id']}/content").body


def test_curl_uploads_move_the_bar(
    server: Server, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """The bars of a form and of a raw upload by curl show at least three different values."""
    page.goto(server.url)
    form, raw = make("form.bin", 10 * MB), make("raw.bin", 10 * MB)
    curl("--limit-rate", "2M", "-F", f"file=@{form}", f"{server.url}/upload")
    see_values(page, "form.bin", 3)
    query = f"file_name=raw.bin&file_size={10 * MB}"
    curl("--limit-rate", "2M", "-X", "POST", "-T", str(raw), f"{server.url}/upload?{query}")
    see_values(page, "raw.bin", 3)
    for path in (form, raw):
        done = row(page, path.name)
        done.get_by_text("Done", exact=True).wait_for()
        assert content(server, path.name) == path.read_bytes()


def test_upload_is_paused_and_resumed_by_button(
    server: Server, page: Page, curl: Curl, make: Callable[[str, int], Path]
) -> None:
    """A paused upload stores nothing more; resumed, it ends at 100 % with the right digest."""
    page.goto(server.url)
    path = make("big.bin", 8 * MB)
    sender = curl("--limit-rate", "2M", "-F", f"file=@{path}", f"{server.url}/upload")
    see_values(page, "big.bin", 2)
    page.get_by_role("button", name="Pause big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Paused")
    expect(row(page, "big.bin")).to_contain_text("paused by you")
    [job] = server.jobs()
    before = stored_bytes(server, job["id"])
    beats(page, 2)
    assert stored_bytes(server, job["id"]) == before < 8 * MB
    assert sender.poll() is None
    page.get_by_role("button", name="Resume big.bin").click()
    expect(row(page, "big.bin")).to_contain_text("Done")
    expect(row(page, "big.bin")).to_contain_text("100\u00a0%")
    assert digest(content(server, "big.bin")) == digest(path.read_bytes())


def test_true_state_after_kill_and_restart(
    server: Server,
    page: Page,
    curl: Curl,
    make: Callable[[str, int], Path],
    allowed: list[str],
) -> None:
    """After kill -9 the page, not reloaded, shows what goes on and what has failed."""
    allowed += DOWN
    page.goto(server.url)
    start = {"kind": "count", "params": {"steps": 2000, "delay_s": 0.02}, "name": "counting"}
    count = server.post("/v1/jobs", start).json["id"]
    path = make("cut.bin", 9 * MB)
    curl("--limit-rate", "1M", "-F", f"file=@{path}", f"{server.url}/upload")
    see_values(page, "cut.bin", 2)
    before = see_values(page, "counting", 2)[-1]
    page.evaluate("window.mark = 'same page'")
    server.kill()
    expect(page.locator(".banner")).to_contain_text("Reconnecting")
    page.get_by_role("button", name="Pause counting").click()
    expect(row(page, "counting")).to_contain_text("Pause did not work: There is no connection")
    server.start()
    expect(page.locator(".banner")).to_be_hidden()
    expect(page.locator(".live")).to_contain_text("live")
    expect(row(page, "cut.bin")).to_contain_text("Failed")
    expect(row(page, "cut.bin")).to_contain_text("send it again")
    assert see_values(page, "counting", 2)[0] >= before
    page.get_by_role("button", name="Cancel counting").click()
    expect(row(page, "counting")).to_contain_text("Cancelled by you")
    assert server.job(count)["state"] == "cancelled"
    assert page.evaluate("window.mark") == "same page"


def test_page_drops_what_a_new_server_does_not_know(
    server: Server, page: Page, allowed: list[str]
) -> None:
    """When the server comes back without its data, the page shows that, without a reload."""
    allowed += DOWN
    server.post("/upload?file_name=old.txt&is_complete=true", b"old")
    page.goto(server.url)
    expect(row(page, "old.txt")).to_contain_text("Done")
    server.kill()
    shutil.rmtree(server.folder)
    server.start()
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    expect(page.locator("li[data-job]")).to_have_count(0)
    server.post("/upload?file_name=new.txt&is_complete=true", b"new")
    expect(row(page, "new.txt")).to_contain_text("Done")


def test_duplicated_tab(server: Server, page: Page, context: BrowserContext) -> None:
    """A tab whose twin has taken its name takes another; both stay connected and see all."""
    sockets: list[str] = []
    page.on("websocket", lambda socket: sockets.append(socket.url))
    page.goto(server.url)
    expect(page.locator(".live")).to_have_attribute("data-state", "live")
    name = page.evaluate("sessionStorage.getItem('tab')")
    twin = context.new_page()
    twin.on("websocket", lambda socket: sockets.append(socket.url))
    twin.add_init_script(f"sessionStorage.setItem('tab', '{name}')")
    twin.goto(server.url)
    page.wait_for_function("(name) => sessionStorage.getItem('tab') !== name", arg=name)
    job = count_slowly(server, "counting")
    for tab in (page, twin):
        see_values(tab, "counting", 2)
    server.post(f"/v1/jobs/{job}/cancel")
    for tab in (page, twin):
        expect(row(tab, "counting")).to_contain_text("Cancelled")
        expect(tab.locator(".live")).to_have_attribute("data-state", "live")
    assert twin.evaluate("sessionStorage.getItem('tab')") == name
    assert len(sockets) == 3  # the first of the page was closed, and no other


@pytest.mark.parametrize("by", ["next event", *(["heartbeat"] if FULL else [])])
def test_lost_event_is_noticed(server: Server, page: Page, by: str) -> None:
    """A page that has lost events asks from where it was, once, and shows what it has missed."""
    page.add_init_script(LOSSY)
    page.goto(server.url)
    job = count_slowly(server, "counting")
    see_values(page, "counting", 1)
    lose_its_pause(server, page, job)
    if by == "next event":
        count_slowly(server, "another")
    # else a heartbeat tells of it, when there was no event for 15 s
    expect(row(page, "counting")).to_contain_text("Paused", timeout=60_000)
    [first, again] = subscriptions(page)
    assert "s" not in first
    assert again["s"] > 0
    server.post(f"/v1/jobs/{job}/resume")
    see_values(page, "counting", 2)
    assert len(subscriptions(page)) == 2


def test_older_jobs_are_loaded_after_a_resume(server: Server, page: Page) -> None:
    """A page that had to resume loads older jobs below those that it has."""
    for i in range(70):
        server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": f"job {i:03}"})
    job = count_slowly(server, "counting")
    eventually(lambda: len(server.jobs("?state=succeeded&limit=500")) == 70, "all have ended")
    page.add_init_script(LOSSY)
    page.goto(server.url)
    see_values(page, "counting", 1)
    lose_its_pause(server, page, job)
    count_slowly(server, "another")
    expect(row(page, "counting")).to_contain_text("Paused")
    assert len(subscriptions(page)) == 2
    expect(row(page, "job 000")).to_have_count(0)
    page.locator("li[data-job]").last.scroll_into_view_if_needed()
    expect(row(page, "job 000")).to_have_count(1)
    expect(page.locator("li[data-job]")).to_have_count(72)


def test_page_uploads_a_file_that_comes_back_the_same(
    server: Server,
    page: Page,
    context: BrowserContext,
    make: Callable[[str, int], Path],
    tmp_path: Path,
) -> None:
    """A chosen file is uploaded with progress, and the download has the same bytes."""
    page.goto(server.url)
    slow_down(context, page, 5 * MB)
    path = make("a & b %41 ünï.bin", 30 * MB)
    page.set_input_files("#picker", path)
    see_values(page, path.name, 3)
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
    allowed += DOWN
    page.goto(server.url)
    slow_down(context, page, 8 * MB)
    path = make("survivor.bin", 30 * MB)
    page.set_input_files("#picker", path)
    assert see_values(page, path.name, 10)[-1] < 90
    server.kill()
    server.start()
    assert [job["state"] for job in server.jobs()] == ["running"]
    expect(row(page, path.name)).to_contain_text("Done", timeout=30_000)
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
    allowed += [*DOWN, "409", "404"]
    page.goto(server.url)
    slow_down(context, page, 4 * MB)
    path = make("unwanted.bin", 30 * MB)
    page.set_input_files("#picker", path)
    see_values(page, path.name, 2)
    page.get_by_role("button", name=f"Cancel {path.name}").click()
    expect(row(page, path.name)).to_contain_text("Cancelled by you")
    beats(page, 2)
    expect(page.locator(".mine li")).to_have_count(0)
    assert [job["state"] for job in server.jobs()] == ["cancelled"]


def test_process_by_form_and_buttons(server: Server, page: Page) -> None:
    """A process is started by the form, then paused, resumed and cancelled by its buttons."""
    page.goto(server.url)
    page.get_by_role("button", name="New process").click()
    page.get_by_label("Kind").select_option("count")
    page.get_by_label("Steps", exact=True).fill("1000")
    page.get_by_label("Delay (s)").fill("0.02")
    page.get_by_label("Name", exact=True).fill("by form")
    page.get_by_role("button", name="Start").click()
    see_values(page, "by form", 2)
    page.get_by_role("button", name="Pause by form").click()
    expect(row(page, "by form")).to_contain_text("paused by you")
    page.get_by_role("button", name="Resume by form").click()
    see_values(page, "by form", 2)
    expect(page).to_have_title(re.compile("running"))
    page.get_by_role("button", name="Cancel by form").click()
    expect(row(page, "by form")).to_contain_text("Cancelled by you")
    expect(page).to_have_title("Sluice")
    job = server.jobs()[0]
    assert job["by"]["via"] == "ws"
    assert job["by"]["actor"] in page.evaluate("document.cookie")


def test_files_are_exported_and_archived_by_form(server: Server, page: Page) -> None:
    """Both are started from the form, and their results are among the files."""
    body, kind = form(("file", "rows.csv", b"a,b\r\n1,2\r\n3,4\r\n"))
    assert server.post("/upload", body, Content_Type=kind).status == 200
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("export")
    page.get_by_label("Source", exact=True).fill("rows.csv")
    page.get_by_label("Where", exact=True).fill("a = 3")
    page.get_by_label("Format", exact=True).select_option("jsonl")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("li[data-job]")).to_have_count(2)  # the page has gone to the list
    expect(page.locator("li[data-job]").first).to_contain_text("Done")
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("archive")
    page.get_by_role("textbox", name="Files").fill("rows.csv, rows.jsonl")
    page.get_by_role("button", name="Start").click()
    eventually(lambda: server.jobs("?kind=archive")[0]["state"] == "succeeded", "it is made")
    content = server.get("/v1/files/by-name/rows.jsonl").headers["Location"]
    assert server.get(content).body == b'{"a":"3","b":"4"}\n'
    files = [file["name"] for file in server.get("/v1/files").json["items"]]
    assert files == ["files.zip", "rows.jsonl", "rows.csv"]


def test_form_shows_a_refusal_at_its_field(server: Server, page: Page) -> None:
    """What the server refuses is said at the field that it names; a failed job says what to do."""
    page.goto(f"{server.url}/#processes")
    page.get_by_label("Kind").select_option("count")
    page.locator("form").evaluate("(form) => { form.noValidate = true }")
    page.get_by_label("Steps", exact=True).fill("-1")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#p-steps-error")).to_contain_text(">= 0")
    expect(page.get_by_label("Steps", exact=True)).to_be_focused()
    page.get_by_label("Kind").select_option("checksum")
    page.get_by_label("File", exact=True).fill("missing.csv")
    page.get_by_role("button", name="Start").click()
    failed = page.locator("li[data-job]")
    expect(failed).to_contain_text("Failed")
    expect(failed).to_contain_text("missing.csv")
    expect(failed).to_contain_text("Upload the file, then retry.")
    failed.get_by_role("button", name="Retry").click()
    expect(page.locator("li[data-job]")).to_have_count(2)


def test_many_jobs_are_paged_filtered_and_removed(server: Server, page: Page) -> None:
    """The list loads page by page, chips count what the server counts, the menu removes a job."""
    for i in range(120):
        server.post("/v1/jobs", {"kind": "count", "params": {"steps": 0}, "name": f"job {i:03}"})
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "none"}, "name": "the bad one"})
    eventually(lambda: len(server.jobs("?state=succeeded&limit=500")) == 120, "all have ended")
    page.goto(server.url)
    expect(page.locator(".chip[data-group=all]")).to_have_text("All 121")
    page.locator(".chip[data-group=done]").click()
    expect(page.locator(".chip[data-group=done]")).to_have_text("Done 120")
    page.get_by_label("Search").fill("job 000")
    expect(page.locator("li[data-job]")).to_have_count(1)
    page.locator(".chip[data-group=failed]").click()
    expect(page.get_by_text("No job matches.")).to_be_visible()
    page.get_by_role("button", name="Show all jobs").click()
    bad = row(page, "the bad one")
    bad.get_by_role("button", name="More the bad one").focus()
    page.keyboard.press("Enter")
    page.get_by_role("menuitem", name="Details as JSON").click()
    expect(page.get_by_role("dialog")).to_contain_text('"kind": "checksum"')
    page.keyboard.press("Escape")
    bad.get_by_role("button", name="More the bad one").click()
    page.get_by_role("menuitem", name="Remove from the list").click()
    expect(bad).to_have_count(0)
    expect(page.locator(".chip[data-group=all]")).to_have_text("All 120")
    page.locator("li[data-job]").last.scroll_into_view_if_needed()
    expect(row(page, "job 000")).to_have_count(1)


def test_files_are_listed_and_deleted(
    server: Server, page: Page, make: Callable[[str, int], Path]
) -> None:
    """The view of files shows versions, and deletes one after asking."""
    markup = "%3Cimg src=x onerror=alert(1)%3E".replace(" ", "%20")
    server.post(f"/upload?file_name={markup}&is_complete=true", b"x")
    for text in (b"one", b"two!"):
        server.post("/upload?file_name=notes.txt&is_complete=true", text)
    page.goto(f"{server.url}/#files")
    files = page.locator("li[data-file]")
    expect(files).to_have_count(3)
    expect(files.last).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("img")).to_have_count(0)
    expect(files.first).to_contain_text("v2")
    expect(files.first).to_contain_text("4\u00a0B")
    files.first.get_by_role("button", name="Delete notes.txt").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(files).to_have_count(2)
    expect(files.first).to_contain_text("v1")
    assert content(server, "notes.txt") == b"one"


def small_controls(page: Page) -> list[Any]:
    """The visible controls that no finger hits, with their boxes."""
    found: list[Any] = page.evaluate(
        """() => [...document.querySelectorAll('button, a, select, input:not([type=checkbox])')]
        .filter((node) => node.checkVisibility() && !node.matches('.hush, .skip'))
        .map((node) => [node.outerHTML, node.getBoundingClientRect()])
        .filter(([, box]) => box.width < 44 || box.height < 44)"""
    )
    return found


@pytest.mark.parametrize(
    "context",
    [{"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}],
    indirect=True,
    ids=["phone"],
)
def test_phone(server: Server, page: Page) -> None:
    """On a phone nothing scrolls sideways and every control is at least 44 px wide and high."""
    server.post("/upload?file_name=" + "long-name-" * 12 + "&is_complete=true", b"x")
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "missing" * 20}})
    slow = {"kind": "count", "params": {"steps": 100_000, "delay_s": 0.1}}
    running = server.post("/v1/jobs", slow).json["id"]
    page.goto(server.url)
    expect(page.locator("li[data-job]")).to_have_count(3)
    for view in ("jobs", "files", "processes"):
        page.locator(f"nav a[href='#{view}']").click()
        expect(
            page.locator("main > :not([hidden]) :is(li, form) :is(a, button)").last
        ).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        # A row that was put in just now has no size before it is drawn.
        eventually(lambda: small_controls(page) == [], "every control is big enough", 5)
    server.post(f"/v1/jobs/{running}/cancel")


@pytest.mark.parametrize(
    "context", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=str
)
def test_empty_state_in_light_and_dark(server: Server, page: Page, tmp_path: Path) -> None:
    """An empty server shows the first step and a curl line, in the colours that are preferred."""
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    expect(page.locator("code")).to_contain_text(f"curl -F file=@movie.mkv {server.url}/upload")
    expect(page.locator(".live")).to_contain_text("live")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert background == ("rgb(15, 18, 20)" if dark else "rgb(246, 247, 248)")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5_000
