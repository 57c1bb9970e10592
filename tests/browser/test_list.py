"""The list of jobs: address, order, selection, commands, in a real browser."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.pages import count_slowly, row, see_values
from tests.conftest import Serve
from tests.harness import FULL, Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

N = 3000 if FULL else 300
HERE = Path(__file__).parent
NO_STEPS = {"kind": "count", "params": {"steps": 0}}


def fill(server: Server, n: int, name: str = "job") -> None:
    """Make ``n`` jobs that have ended, named by their number."""
    for begin in range(0, n, 500):
        names = range(begin, min(n, begin + 500))
        server.post("/v1/jobs", [NO_STEPS | {"name": f"{name} {i:04}"} for i in names])
    # The page counts what the server counts, so ask for no list.
    eventually(lambda: ended(server) >= n, "all have ended", 120)


def ended(server: Server) -> int:
    """How many jobs have succeeded."""
    return int(server.get("/v1/jobs?limit=1").json["counts"].get("succeeded", 0))


def names(page: Page) -> list[str]:
    """What the rows on the page are called, from above."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('li[data-job]')]
        .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
        .map((row) => row.querySelector('.name').textContent)"""
    )
    return found


def see_names(page: Page, expected: list[str]) -> None:
    """Wait until the rows of the page are these, in this order."""
    eventually(lambda: names(page)[: len(expected)] == expected, f"{expected}", 60)


def select(page: Page, name: str) -> Locator:
    """The box that selects a row."""
    return page.get_by_role("checkbox", name=f"Select {name}")


def rest(page: Page) -> None:
    """Put the pointer where it disturbs nothing."""
    page.mouse.move(5, 300)


def test_all_jobs_are_in_one_list(server: Server, page: Page) -> None:
    """Thousands of jobs are one list of few elements, from the newest to the oldest."""
    fill(server, N)
    page.goto(server.url)
    expect(page.locator(".chip[data-group=all]")).to_have_text(f"All {N:,}")
    see_names(page, [f"job {N - 1 - i:04}" for i in range(5)])
    expect(row(page, f"job {N - 1:04}")).to_have_attribute("aria-setsize", str(N))
    page.keyboard.press("End")
    expect(row(page, "job 0000")).to_be_in_viewport()
    assert page.locator("li[data-job]").count() < 60
    page.get_by_role("searchbox").fill("job 0007")
    expect(page.locator("li[data-job]")).to_have_count(1)
    page.locator(".chip[data-group=done]").click()
    expect(row(page, "job 0007")).to_be_visible()
    page.get_by_role("searchbox").fill("nothing like it")
    expect(page.get_by_text("No job matches.")).to_be_visible()
    page.get_by_role("button", name="Show all jobs").click()
    expect(row(page, f"job {N - 1:04}")).to_be_visible()


def test_the_first_job_is_seen_as_soon_as_it_is_there(server: Server, page: Page) -> None:
    """The list comes with its first row, and does not wait for the server's counts."""
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    page.evaluate(
        """() => { window.seen = new Promise((told) => new MutationObserver(() => {
          const row = document.querySelector("li[data-job]");
          if (row) told(row.checkVisibility());
        }).observe(document.body, { childList: true, subtree: true })); }"""
    )
    server.post("/v1/jobs", NO_STEPS | {"name": "the first"})
    assert page.evaluate("window.seen")


def test_what_is_asked_for_is_in_the_address(server: Server, page: Page) -> None:
    """State, kind, text and order come from the address, go to it, and outlive page and reload."""
    server.post("/upload?file_name=a.txt&is_complete=true", b"a")
    for name in ("b one", "a one", "c two"):
        server.post("/v1/jobs", NO_STEPS | {"name": name})
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "none"}, "name": "bad one"})
    eventually(lambda: ended(server) == 4, "all have ended")
    page.goto(f"{server.url}/#jobs?kind=count&q=ONE&sort=name")
    see_names(page, ["a one", "b one"])
    expect(page.locator("li[data-job]")).to_have_count(2)
    page.get_by_label("Show only").select_option("")
    see_names(page, ["a one", "b one", "bad one"])
    page.locator(".chip[data-group=failed]").click()
    expect(page.locator("li[data-job]")).to_have_count(1)
    page.get_by_role("searchbox").fill("")
    page.locator(".chip[data-group=all]").click()
    page.get_by_label("Order").select_option("old")
    see_names(page, ["a.txt", "b one", "a one", "c two", "bad one"])
    assert page.url.endswith("#jobs?sort=old")
    page.reload()
    see_names(page, ["a.txt", "b one", "a one", "c two", "bad one"])
    page.get_by_role("searchbox").fill("bad")
    row(page, "bad one").get_by_role("link", name="bad one").click()
    expect(page.locator("nav [aria-current]")).to_have_count(0)
    page.go_back()
    expect(page.locator("li[data-job]:visible")).to_have_count(1)
    expect(page.get_by_role("searchbox")).to_have_value("bad")


def test_nothing_moves_under_the_pointer(server: Server, page: Page) -> None:
    """While the pointer is on the list rows stay; new ones are told of, and come when it leaves."""
    job = count_slowly(server, "counting")
    first = server.post("/v1/jobs", NO_STEPS | {"name": "first"}).json["id"]
    server.wait_for(first, "succeeded")
    page.goto(f"{server.url}/#jobs?state=running")
    row(page, "counting").hover()
    before = row(page, "counting").bounding_box()
    server.post(f"/v1/jobs/{job}/cancel")
    expect(row(page, "counting")).to_contain_text("Cancelled")
    other = count_slowly(server, "another")
    fresh = page.get_by_role("button", name="1 new")
    expect(fresh).to_be_visible()
    assert names(page) == ["counting"]
    assert row(page, "counting").bounding_box() == before
    rest(page)
    see_names(page, ["another"])
    expect(row(page, "counting")).to_have_count(0)
    server.post(f"/v1/jobs/{other}/cancel")


def test_rows_in_sight_stay_while_it_is_scrolled(server: Server, page: Page) -> None:
    """New jobs do not push away what is being read further down."""
    fill(server, 60)
    page.goto(server.url)
    expect(row(page, "job 0059")).to_be_visible()
    rest(page)
    page.mouse.wheel(0, 1500)
    page.wait_for_function("() => scrollY === 1500")
    expect(row(page, "job 0040")).to_be_in_viewport()
    before = row(page, "job 0040").bounding_box()
    fill(server, 62, "new")
    fresh = page.get_by_role("button", name="62 new")
    expect(fresh).to_have_count(1)
    assert row(page, "job 0040").bounding_box() == before
    fresh.click()
    see_names(page, ["new 0061", "new 0060"])


def test_list_is_ordered_by_progress(server: Server, page: Page) -> None:
    """A list in the order of progress follows it live."""
    slow = server.post(
        "/v1/jobs", {"kind": "count", "name": "slow", "params": {"steps": 10**6, "delay_s": 0.5}}
    )
    fast = count_slowly(server, "fast")
    page.goto(f"{server.url}/#jobs?sort=progress")
    rest(page)
    see_values(page, "fast", 2)
    see_names(page, ["fast", "slow"])
    server.post(f"/v1/jobs/{slow.json['id']}/cancel")
    server.post(f"/v1/jobs/{fast}/cancel")


def test_a_selection_is_commanded(server: Server, page: Page) -> None:
    """Rows are selected one by one, by ctrl, as a range; a command goes to all it can mean."""
    for name in "abcdef":
        count_slowly(server, f"count {name}")
    server.post("/v1/jobs", {"kind": "checksum", "params": {"file": "none"}, "name": "bad"})
    page.goto(server.url)
    expect(row(page, "bad")).to_contain_text("Failed")
    select(page, "count e").check()
    row(page, "count b").locator(".much").click(modifiers=["Shift"])
    expect(page.locator(".many-text:visible")).to_have_text("4 selected")
    row(page, "count c").locator(".much").click(modifiers=["ControlOrMeta"])
    select(page, "bad").check()
    expect(page.locator(".many-text:visible")).to_have_text("4 selected")
    page.locator(".picks:visible").get_by_role("button", name="Pause").click()
    expect(page.locator(".notices")).to_contain_text("Pause: 3 done.")
    for name in ("b", "d", "e"):
        expect(row(page, f"count {name}")).to_contain_text("Paused")
    states = {job["name"]: job["state"] for job in server.jobs()}
    assert {name for name, state in states.items() if state == "paused"} == {
        "count b",
        "count d",
        "count e",
    }
    page.get_by_role("checkbox", name="Select all").check()
    expect(page.locator(".many-text:visible")).to_have_text("7 selected")
    page.locator(".picks:visible").get_by_role("button", name="Cancel").click()
    eventually(lambda: len(server.jobs("?state=cancelled")) == 6, "all are cancelled")


def test_a_filter_is_commanded(server: Server, page: Page) -> None:
    """All of a filter is removed at once, and is back after Undo; else it is gone in the end."""
    fill(server, 12)
    keep = count_slowly(server, "counting")
    page.goto(f"{server.url}/#jobs?q=job")
    expect(page.locator("li[data-job]")).to_have_count(12)
    for undo in (True, False):
        page.get_by_role("checkbox", name="Select all").check()
        page.locator(".picks:visible").get_by_role("button", name="Remove").click()
        expect(page.locator("li[data-job]")).to_have_count(0)
        assert ended(server) == 12
        if undo:
            page.get_by_role("button", name="Undo").click()
            expect(page.locator("li[data-job]")).to_have_count(12)
    page.goto("about:blank")  # who leaves has made up their mind
    eventually(lambda: [job["name"] for job in server.jobs()] == ["counting"], "they are removed")
    server.post(f"/v1/jobs/{keep}/cancel")


def test_cancel_shows_what_is_undone(serve: Serve, page: Page, tmp_path: Path) -> None:
    """A cancelled process is seen to be rolled back step by step, then to be undone."""
    server = serve("--kinds", str(HERE / "gate.py"))
    for step in (1, 2, 3):
        (tmp_path / f"step {step}").touch()
    params: dict[str, Any] = {"folder": str(tmp_path)}
    server.post("/v1/jobs", {"kind": "gate", "name": "undoable", "params": params})
    page.goto(server.url)
    expect(row(page, "undoable")).to_contain_text("3 of 4\u00a0steps")
    page.get_by_role("button", name="Cancel undoable").click()
    for step, told in (
        (3, "Undoing: 1 of 3"),
        (2, "Undoing: 2 of 3"),
        (1, "Cancelled by you. Undone: 3 of 3."),
    ):
        (tmp_path / f"back {step}").touch()
        expect(row(page, "undoable")).to_contain_text(told)


def test_a_refused_command_is_rolled_back(server: Server, page: Page) -> None:
    """A button is busy until the answer; what is refused looks as before, and says the reason."""
    job = count_slowly(server, "counting")
    page.goto(server.url)
    see_values(page, "counting", 1)
    page.evaluate(
        """async (id) => {
          window.busy = false;
          const row = document.querySelector('[data-job]');
          new MutationObserver(() => { window.busy ||= Boolean(row.querySelector('.busy')) })
            .observe(row, {subtree: true, attributes: true});
          // Cancelled behind the back of the page, in the same moment.
          fetch(`/v1/jobs/${id}/cancel`, {method: 'POST'});
          row.querySelector('.acts button').click();
        }""",
        job,
    )
    expect(row(page, "counting")).to_contain_text("Cancelled")
    assert page.evaluate("window.busy")
    expect(page.locator(".busy")).to_have_count(0)


def test_a_running_row_tells_how_it_goes(serve: Serve, page: Page) -> None:
    """Percent, amount, rate and time left are shown, or a dash; a line shows the rates so far."""
    server = serve("--kinds", str(HERE / "kinds"))
    count_slowly(server, "counting")
    endless = {"rows": 10**6, "delay_s": 0.05, "total": False}
    server.post("/v1/jobs", {"kind": "report", "name": "without an end", "params": endless})
    page.goto(server.url)
    shown = row(page, "counting")
    expect(row(page, "without an end")).to_contain_text("—")
    expect(shown).to_contain_text("steps/s")
    expect(shown).to_contain_text("of 5,000\u00a0steps")
    expect(shown).to_contain_text("left")
    page.wait_for_function(
        "(row) => (row.querySelector('.line').getAttribute('points') ?? '').includes(' ')",
        arg=shown.element_handle(),
    )
    bar = shown.get_by_role("progressbar")
    text = str(bar.get_attribute("aria-valuetext"))
    assert "Running" in text
    assert "left" in text
    page.get_by_role("button", name="Cancel counting").click()
    expect(shown).to_contain_text("Cancelled by you")
