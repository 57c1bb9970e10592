"""The page of one job, in a real browser: history, log, what it has made, and ways back."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.pages import DOWN, count_slowly, digest
from tests.conftest import Serve, need
from tests.harness import FULL, Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

MISSING = "status of 404"

# Says ``first`` lines at once, and as many more for each file that appears, then ends.
TALK = """
from pathlib import Path
import msgspec

KIND, TITLE, PAUSE = "talk", "Talk", "at once"

class Params(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    first: int
    more: int
    folder: str = ""
    text: str = "line"
    per_s: int = 800

async def run(ctx, params):
    n = 0
    for turn, lines in enumerate([params.first, *[params.more] * 4]):
        while turn and not Path(params.folder, str(turn)).exists():
            await ctx.sleep(0.01)
        for _ in range(lines):
            n += 1
            ctx.log(f"{params.text} {n}")
            if n % 50 == 0:
                await ctx.sleep(50 / params.per_s)
"""


@pytest.fixture
def talker(serve: Serve, tmp_path: Path) -> Server:
    """A server with a kind that talks."""
    (tmp_path / "talk.py").write_text(TALK)
    return serve("--kinds", str(tmp_path / "talk.py"))


def start(server: Server, kind: str, name: str, **params: Any) -> str:
    """Start a process; its id."""
    return str(server.post("/v1/jobs", {"kind": kind, "params": params, "name": name}).json["id"])


def look_at(page: Page, server: Server, job_id: str) -> Locator:
    """Open the page of a job by its address."""
    page.goto(f"{server.url}/#job={job_id}")
    shown = page.locator(".job")
    expect(shown.get_by_role("heading", level=1)).to_have_text(server.job(job_id)["name"])
    return shown


def fact(shown: Locator, name: str) -> Locator:
    """The value beside that name."""
    return shown.locator(f"dt:text-is('{name}') + dd")


def test_history_names_causes_and_actors(server: Server, page: Page, allowed: list[str]) -> None:
    """Each transition tells why and by whom, live, and after kill -9 what the server did itself."""
    allowed += DOWN
    job = count_slowly(server, "counting")
    shown = look_at(page, server, job)
    steps = shown.get_by_label("History").get_by_role("listitem")
    expect(steps).to_have_count(2)
    expect(steps.nth(0)).to_contain_text("Queued created over the API, REST")
    expect(steps.nth(1)).to_contain_text("Queued → Running got a slot")
    expect(page).to_have_title(re.compile("counting"))
    shown.get_by_role("button", name="Pause counting").click()
    expect(steps.nth(2)).to_contain_text("Running → Pausing paused by you, in this browser")
    expect(steps.nth(3)).to_contain_text("Pausing → Paused at a safe point")
    expect(shown).to_contain_text("paused by you")
    server.post(f"/v1/jobs/{job}/resume")
    expect(steps.nth(5)).to_contain_text("Queued → Running")
    expect(steps.nth(4)).to_contain_text("resumed over the API, REST")
    server.kill()
    expect(page.locator(".banner")).to_be_visible()
    server.start()
    expect(steps.nth(6)).to_contain_text("Running → Queued the server had crashed")
    expect(steps.nth(7)).to_contain_text("Queued → Running got a slot")
    told = server.get(f"/v1/jobs/{job}/events").json["items"]
    assert steps.count() == len(told)
    server.post(f"/v1/jobs/{job}/cancel")
    expect(shown).to_contain_text("Cancelled over the API")
    expect(fact(shown, "ended")).not_to_have_text("–")


def test_long_history_shows_both_ends(server: Server, page: Page) -> None:
    """Of a long history the first and the newest events are shown, and how many are between."""
    job = count_slowly(server, "renamed often")
    for n in range(260):
        server.request("PATCH", f"/v1/jobs/{job}", {"name": f"name {n}"})
    shown = look_at(page, server, job)
    steps = shown.get_by_label("History").get_by_role("listitem")
    expect(steps).to_have_count(250)
    expect(steps.nth(50)).to_contain_text("… 12 more")
    expect(steps.last).to_contain_text("renamed over the API")
    between = server.get(str(steps.nth(50).get_by_role("link").get_attribute("href"))).json
    assert [event["version"] for event in between["items"][:12]] == list(range(51, 63))
    server.post(f"/v1/jobs/{job}/cancel")
    expect(steps.nth(50)).to_contain_text(re.compile("… 1[34] more"))
    expect(steps.last).to_contain_text("Cancelled")
    expect(steps).to_have_count(250)


def test_what_was_made_can_be_checked(
    serve: Serve, page: Page, context: BrowserContext, make: Callable[[str, int], Path]
) -> None:
    """An upload's page has its file with the full digest, which can be copied, and its bytes."""
    server = serve("--digest", "always")
    data = make("photo.raw", 300_000).read_bytes()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.post("/upload?file_name=photo.raw&is_complete=true", data)
    job = server.jobs()[0]["id"]
    shown = look_at(page, server, job)
    expect(shown).to_contain_text(digest(data))
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(fact(shown, "durable")).to_have_text(re.compile("300.kB"))
    shown.get_by_role("button", name="Copy sha-256 photo.raw").click()
    expect(page.get_by_text("Copied.").first).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == digest(data)
    with page.expect_download() as download:
        shown.get_by_role("link", name="photo.raw", exact=True).last.click()
    assert digest(Path(download.value.path()).read_bytes()) == digest(data)


def test_curl_line_does_it_again(server: Server, page: Page, context: BrowserContext) -> None:
    """The line that is copied, run in a shell, starts a job like this one."""
    need("curl")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    job = start(server, "count", 'it\'s "quoted" $HOME', steps=3, delay_s=0)
    shown = look_at(page, server, job)
    shown.get_by_role("button", name="More").click()
    page.get_by_role("menuitem", name="Copy as curl").click()
    expect(page.get_by_text("Copied.").first).to_be_visible()
    line = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=True, timeout=30)
    again = json.loads(done.stdout)
    assert again["id"] != job
    for name in ("kind", "name", "params"):
        assert again[name] == server.job(job)[name]


def test_raw_json_is_what_the_server_says(server: Server, page: Page) -> None:
    """Raw JSON is fetched when it is opened; parameters, result and a failure are readable."""
    job = start(server, "count", "counted", steps=7, delay_s=0)
    server.wait_for(job, "succeeded")
    shown = look_at(page, server, job)
    shown.get_by_text("Raw JSON").click()
    raw = shown.locator("pre")
    expect(raw).to_contain_text('"counted": 7')
    assert json.loads(raw.inner_text()) == server.job(job)
    expect(fact(shown, "steps")).to_have_text("7")
    expect(fact(shown, "counted")).to_have_text("7")
    failed = start(server, "checksum", "no such file", file="none")
    server.wait_for(failed, "failed")
    shown = look_at(page, server, failed)
    expect(fact(shown, "error")).to_have_text("file-unknown")
    expect(fact(shown, "data")).to_have_text("Stored files are as they were.")
    expect(shown).to_contain_text("Upload the file, then retry.")
    again = server.post(f"/v1/jobs/{failed}/retry").json["id"]
    shown = look_at(page, server, again)
    shown.get_by_role("link", name=failed).click()
    expect(page).to_have_url(re.compile(failed))
    expect(fact(shown, "retry of")).to_have_count(0)


def test_job_that_is_not_there(server: Server, page: Page, allowed: list[str]) -> None:
    """An unknown id, and a job that is deleted while it is looked at, say so and lead back."""
    allowed += [MISSING]
    page.goto(f"{server.url}/#job=01a0")
    expect(page.get_by_role("heading", level=1)).to_contain_text("There is no job 01a0 here.")
    job = start(server, "count", "short", steps=0)
    server.wait_for(job, "succeeded")
    shown = look_at(page, server, job)
    server.delete(f"/v1/jobs/{job}")
    expect(shown.get_by_role("heading", name="short was removed")).to_be_visible()
    expect(shown.get_by_role("heading")).to_have_count(1)
    shown.get_by_role("link", name="Jobs").click()
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()


def test_ways_in_and_back(server: Server, page: Page) -> None:
    """A row opens its page, which survives a reload; the way back keeps the list's filter."""
    for n in range(3):
        start(server, "count", f"old {n}", steps=0)
    count_slowly(server, "counting")
    eventually(lambda: len(server.jobs("?state=succeeded")) == 3, "all have ended")
    page.goto(f"{server.url}/#jobs?state=done")
    page.get_by_role("link", name="old 1").click()
    shown = page.locator(".job")
    expect(shown.get_by_role("heading", level=1)).to_have_text("old 1")
    shown.get_by_role("link", name="← Jobs").click()
    expect(page).to_have_url(re.compile("state=done"))
    page.get_by_role("link", name="old 2").click()
    page.reload()
    expect(shown.get_by_role("heading", level=1)).to_have_text("old 2")
    expect(shown).to_contain_text("Done")


def test_log_is_followed(talker: Server, page: Page, tmp_path: Path) -> None:
    """The newest 1,000 lines, then live; who scrolls up sees them stand until they follow again."""
    more = 5000 if FULL else 1100
    job = start(talker, "talk", "talking", first=1000, more=more, folder=str(tmp_path))
    shown = look_at(page, talker, job)
    log = shown.get_by_role("log")
    lines = log.locator("div")
    expect(lines.last).to_have_text("line 1000")
    (tmp_path / "1").touch()
    newest = 1000 + more
    expect(lines.last).to_have_text(f"line {newest}")
    expect(lines).to_have_count(1000)
    expect(shown.get_by_text(f"… {more} lines skipped")).to_be_visible()
    assert is_at_end(log)
    log.hover()
    page.mouse.wheel(0, -400)
    expect(shown.get_by_role("button", name="Follow", exact=True)).to_be_visible()
    (tmp_path / "2").touch()
    expect(shown.get_by_role("button", name="Follow: 1000 new")).to_be_visible()
    assert lines.last.inner_text() == f"line {newest}"
    newest += more
    path = f"/v1/jobs/{job}/log?after={newest - 1}"
    eventually(lambda: talker.get(path).json["items"], "all is said", 60)
    log.press("End")
    expect(lines.last).to_have_text(f"line {newest}")
    assert is_at_end(log)
    numbers = log.evaluate("(log) => [...log.children].map((line) => Number(line.dataset.n))")
    assert numbers == list(range(newest - 999, newest + 1))
    expect(shown.get_by_text(f"… {newest - 1000} lines skipped")).to_be_visible()
    (tmp_path / "3").touch()
    expect(lines.last).not_to_have_text(f"line {newest}")
    page.mouse.wheel(0, -400)  # also while lines come
    expect(shown.get_by_role("button", name="Follow")).to_be_visible()
    (tmp_path / "4").touch()
    expect(shown.get_by_role("button", name=re.compile("Follow: [1-9]"))).to_be_visible()
    stood = lines.last.inner_text()
    expect(fact(shown, "ended")).not_to_have_text("–")
    assert lines.last.inner_text() == stood
    shown.get_by_role("button", name="Follow").click()
    expect(lines.last).to_have_text(f"line {newest + 2 * more}")
    expect(fact(shown, "ended")).not_to_have_text("–")


def test_log_goes_on_after_a_crash(
    talker: Server, page: Page, tmp_path: Path, allowed: list[str]
) -> None:
    """After kill -9 the log goes on behind the last line: none is missing, none is there twice."""
    allowed += DOWN
    job = start(talker, "talk", "talking", first=200, more=100, folder=str(tmp_path))
    shown = look_at(page, talker, job)
    lines = shown.get_by_role("log").locator("div")
    expect(lines.last).to_have_text("line 200")
    talker.kill()
    expect(page.locator(".banner")).to_be_visible()
    (tmp_path / "1").touch()
    talker.start()
    expect(lines.last).to_have_text("line 300")
    numbers = lines.evaluate_all("(lines) => lines.map((line) => Number(line.dataset.n))")
    assert numbers == list(range(1, 501))


def is_at_end(box: Locator) -> bool:
    """Whether the newest line is in sight."""
    return bool(box.evaluate("(at) => at.scrollTop + at.clientHeight > at.scrollHeight - 8"))


def test_job_without_lines(server: Server, page: Page) -> None:
    """A job that has said nothing says that."""
    job = start(server, "count", "silent", steps=0)
    expect(look_at(page, server, job).get_by_text("No lines.")).to_be_visible()


@pytest.mark.skipif(not FULL, reason="a matter of time")
def test_fast_log_blocks_nothing(talker: Server, page: Page, tmp_path: Path) -> None:
    """A thousand lines a second are written without a long task."""
    job = start(talker, "talk", "talking", first=1000, more=5000, per_s=1000, folder=str(tmp_path))
    page.add_init_script(
        "window.long = []; new PerformanceObserver((list) => long.push("
        "...list.getEntries().map((entry) => entry.duration))).observe({ type: 'longtask' })"
    )
    shown = look_at(page, talker, job)
    lines = shown.get_by_role("log").locator("div")
    expect(lines.last).to_have_text("line 1000")
    longest_ms = []
    for turn in range(1, 4):
        page.evaluate("window.long = []")
        (tmp_path / f"{turn}").touch()
        expect(lines.last).to_have_text(f"line {1000 + turn * 5000}")
        longest_ms.append(max(page.evaluate("window.long"), default=0))
    # 50 ms would be long on a machine that does nothing else, for which the best turn stands.
    assert min(longest_ms) <= 200
