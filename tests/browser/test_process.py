"""Processes that are started by the form, in a real browser."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.pages import DOWN, content, row, see_values
from tests.conftest import Serve, need
from tests.harness import Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

PROGRAMS = """
[search]
title = "Lines that match"
argv = ["grep", "{ignore_case}", "-m", "{most}", "-e", "{pattern}", "/dev/stdin"]
stdin = "text"
stdout = "found-{form}.txt"
params.text = {type = "file", title = "Text file"}
params.pattern = {type = "text", pattern = "o"}
params.ignore_case = {type = "boolean", flag = "-i"}
params.form = {type = "choice", choices = ["short", "long"], default = "short"}
params.most = {type = "integer", min = 1, default = 9}
[broken]
argv = "no list"
"""


def store(server: Server, *names: str) -> list[str]:
    """Upload files that hold their names; their ids."""
    for name in names:
        server.post(f"/upload?file_name={name}&is_complete=true", name.encode())
    found = {file["name"]: file["id"] for file in server.get("/v1/files?limit=99").json["items"]}
    return [found[name] for name in names]


def open_form(server: Server, page: Page, kind: str, *files: str) -> None:
    """The form of a kind, for some files."""
    query = "".join(f"&files={file}" for file in files)
    page.goto(f"{server.url}/#processes?kind={kind}{query}")
    expect(page.get_by_label("Kind")).to_have_value(kind)


def start(page: Page) -> None:
    """Press Start; the page goes to the list."""
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page).to_have_url(re.compile("#jobs"))


def started(server: Server, n: int) -> list[Any]:
    """The jobs that are no uploads, oldest first, when there are so many."""

    def found() -> list[Any]:
        return [job for job in server.jobs()[::-1] if job["kind"] != "upload"]

    eventually(lambda: len(found()) == n, f"{n} jobs")
    return [server.job(job["id"]) for job in found()]


def test_process_by_form_and_buttons(server: Server, page: Page) -> None:
    """A process is started by the form, then paused, resumed and cancelled by its buttons."""
    page.goto(server.url)
    page.get_by_role("button", name="New process").click()
    page.get_by_label("Kind").select_option("count")
    page.get_by_label("Steps", exact=True).fill("5000")
    page.get_by_label("Delay (s)").fill("0.02")
    page.get_by_label("Job name").fill("by form")
    page.get_by_role("button", name="Start", exact=True).dblclick()
    see_values(page, "by form", 2)
    assert len(server.jobs()) == 1
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


def test_form_shows_a_refusal_at_its_field(server: Server, page: Page, allowed: list[str]) -> None:
    """What the server refuses is said at the field that it names; a failed job says what to do."""
    allowed.append("status of 400")
    open_form(server, page, "count")
    page.locator("form.form").evaluate("(form) => { form.noValidate = true }")
    page.get_by_label("Steps", exact=True).fill("-1")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#p0-params-steps-error")).to_contain_text(">= 0")
    expect(page.get_by_label("Steps", exact=True)).to_be_focused()
    page.get_by_label("Kind").select_option("export")
    page.get_by_label("Source", exact=True).fill("missing.csv")
    page.get_by_label("From").fill("2026-01-01")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(
        page.locator("#p0-params-dates-column-error, #p0-params-dates-error").first
    ).to_contain_text("column")
    page.get_by_label("Kind").select_option("checksum")
    page.get_by_label("File", exact=True).fill("missing.csv")
    start(page)
    failed = page.locator("li[data-job]")
    expect(failed).to_contain_text("Failed")
    expect(failed).to_contain_text("missing.csv")
    expect(failed).to_contain_text("Upload the file, then retry.")


def test_all_that_a_schema_can_say(server: Server, page: Page) -> None:
    """Choices, lists, maps, fields in fields, and what is left empty; from one kind to another."""
    store(server, "rows.csv")
    open_form(server, page, "csv.import")
    page.get_by_label("Table", exact=True).fill("stays away")
    page.get_by_label("Kind").select_option("csv.validate")
    page.get_by_label("Source", exact=True).fill("rows.csv")
    page.get_by_label("Delimiter").select_option(label="comma")
    page.get_by_label("Types").fill("id = integer\nat=date\n")
    page.get_by_label("Null").fill("-\nnone, really")
    page.get_by_label("Infer").uncheck()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Priority").fill("7")
    page.get_by_label("Not before").fill("2040-01-02T03:04")
    start(page)
    (job,) = started(server, 1)
    assert (job["priority"], job["not_before"][:7], job["state"]) == (7, "2040-01", "scheduled")
    given = {name: job["params"][name] for name in ("delimiter", "types", "null", "infer")}
    assert given == {
        "delimiter": ",",
        "types": {"id": "integer", "at": "date"},
        "null": ["-", "none, really"],
        "infer": False,
    }
    assert "table" not in job["params"]
    open_form(server, page, "checksum")
    page.get_by_label("File", exact=True).fill("rows.csv")
    page.get_by_label("sha1", exact=True).check()
    page.get_by_label("md5", exact=True).check()
    start(page)
    assert started(server, 2)[1]["params"]["algorithms"] == ["sha1", "md5"]
    open_form(server, page, "export")
    page.get_by_label("Source", exact=True).fill("rows.csv")
    page.get_by_label("Column", exact=True).fill("rows.csv")
    page.get_by_label("From").fill("2026-01-01")
    start(page)
    dates = started(server, 3)[2]["params"]["dates"]
    assert dates in ({"column": "rows.csv", "from": "2026-01-01", "to": None}, [dates])


def test_a_file_is_found_while_its_name_is_typed(server: Server, page: Page) -> None:
    """The field offers stored files that the server has found, however many there are."""
    store(server, *(f"other-{n}" for n in range(55)))
    server.post("/upload?file_name=%3Cb%3Eneedle&is_complete=true", b"x")
    open_form(server, page, "checksum")
    field = page.get_by_label("File", exact=True)
    field.press_sequentially("NEED")
    option = page.locator("datalist option")
    expect(option).to_have_count(1)
    expect(option).to_have_attribute("value", "<b>needle")
    field.fill(server.get("/v1/files?q=needle").json["items"][0]["id"])
    start(page)
    eventually(lambda: started(server, 1)[0]["state"] == "succeeded", "it is done")


def test_a_form_is_filled_in_by_keys_alone(server: Server, page: Page) -> None:
    """From the view's link to the start, no pointer is needed."""
    store(server, "a.bin", "b.bin")
    page.goto(f"{server.url}/#overview")
    page.locator("body").press("n")
    expect(page).to_have_url(re.compile("#processes"))
    page.get_by_label("Kind").focus()
    page.keyboard.type("Many stored")
    page.keyboard.press("Tab")
    page.keyboard.type("a.bin")
    page.keyboard.press("Enter")
    page.keyboard.type("b.bin")
    page.keyboard.press("Enter")
    expect(page.locator("#p0-params-files")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")  # leaves b.bin out again
    expect(page.get_by_role("checkbox", name="b.bin")).not_to_be_checked()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#jobs"))
    assert started(server, 1)[0]["params"]["files"] == ["a.bin"]


def test_a_selection_goes_into_one_process(server: Server, page: Page) -> None:
    """From the list of files to one job of a kind that takes many of them."""
    ids = store(server, "a.bin", "b.bin", "c.bin")
    page.goto(f"{server.url}/#files")
    page.get_by_label("Select a.bin").check()
    page.get_by_label("Select c.bin").check()
    page.get_by_role("button", name="Start a process").click()
    page.get_by_label("Kind").select_option("archive")
    expect(page.locator(".choice")).to_have_text(["c.bin", "a.bin"])
    page.reload()
    expect(page.locator(".choice")).to_have_text(["c.bin", "a.bin"])
    start(page)
    assert started(server, 1)[0]["params"]["files"] == [ids[2], ids[0]]


def test_a_selection_makes_a_job_each(server: Server, page: Page) -> None:
    """A kind that takes one file is started for each of them, and says so before."""
    ids = store(server, "a.bin", "b.bin", "c.bin")
    open_form(server, page, "checksum", *ids)
    expect(page.get_by_text("Starts 3 jobs.")).to_be_visible()
    page.get_by_role("checkbox", name="b.bin").uncheck()
    expect(page.get_by_text("Starts 2 jobs.")).to_be_visible()
    start(page)
    files = [job["params"]["file"] for job in started(server, 2)]
    assert sorted(files) == sorted([ids[0], ids[2]])


def test_one_process_after_the_other(server: Server, page: Page) -> None:
    """Each step waits for the one before, and has what that has made."""
    ids = store(server, "a.bin", "b.bin")
    open_form(server, page, "compress", *ids)
    page.get_by_role("button", name="Then start").press("Enter")
    expect(page.locator("#kind1")).to_be_focused()
    page.locator("#kind1").select_option("decompress")
    page.get_by_role("button", name="Then start").click()
    page.locator("#kind2").select_option("count")
    page.get_by_role("button", name="Without this one").last.click()
    expect(page.locator("#kind2")).to_have_count(0)
    page.locator("#p1-params-name").fill("again.bin")
    expect(page.get_by_text("Starts 4 jobs.")).to_be_visible()
    start(page)
    jobs = started(server, 4)
    eventually(lambda: all(job["state"] == "succeeded" for job in started(server, 4)), "all done")
    first, second = jobs[:2], jobs[2:]
    assert [job["kind"] for job in jobs] == ["compress"] * 2 + ["decompress"] * 2
    assert sorted(job["after"][0] for job in second) == sorted(job["id"] for job in first)
    assert content(server, "again.bin") in (b"a.bin", b"b.bin")


def test_what_was_started_is_not_started_twice(
    server: Server, page: Page, allowed: list[str]
) -> None:
    """A later step that is refused, or an answer that is lost, starts nothing a second time."""
    allowed += [*DOWN, "status of 400"]
    store(server, "a.bin")
    open_form(server, page, "checksum")
    page.get_by_label("File", exact=True).fill("a.bin")
    page.get_by_role("button", name="Then start").click()
    page.locator("#kind1").select_option("count")
    page.locator("form.form").evaluate("(form) => { form.noValidate = true }")
    page.locator("#p1-params-steps").fill("-1")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#p1-params-steps-error")).to_contain_text("What comes before is started")
    assert len(started(server, 1)) == 1
    page.locator("#p1-params-steps").fill("1")
    start(page)
    first, second = started(server, 2)
    assert second["after"] == [first["id"]]
    open_form(server, page, "count")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.context.set_offline(True)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#unsent")).to_contain_text("No answer")
    page.context.set_offline(False)
    page.route("**/v1/jobs", lose, times=1)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#unsent")).to_contain_text("nothing is started twice")
    start(page)
    assert len(started(server, 3)) == 3


def test_a_program_has_a_form(serve: Serve, page: Page, tmp_path: Path) -> None:
    """A program's parameters are fields, also a file of any name; what is no kind is told."""
    need("grep")
    (tmp_path / "programs.toml").write_text(PROGRAMS)
    server = serve("--programs", str(tmp_path / "programs.toml"))
    server.expected = ("broken is no program",)
    store(server, "Foo.txt")
    open_form(server, page, "exec.search")
    expect(page.locator("#kind0 optgroup[label=Programs] option")).to_have_text("Lines that match")
    expect(page.locator("#p0-params-text-hint")).to_contain_text("Text file")
    page.get_by_label("Text", exact=True).fill("Foo.txt")
    page.get_by_label("Pattern").fill("foo")
    page.get_by_label("Ignore case").check()
    page.get_by_label("Form").select_option("long")
    expect(page.get_by_label("Most")).to_have_attribute("placeholder", "9")
    expect(page.get_by_text("1 process could not be loaded")).to_be_visible()
    page.get_by_text("1 process could not be loaded").click()
    expect(page.get_by_text("programs.toml: broken")).to_be_visible()
    start(page)
    eventually(lambda: started(server, 1)[0]["state"] == "succeeded", "it is done")
    assert content(server, "found-long.txt") == b"Foo.txt\n"
