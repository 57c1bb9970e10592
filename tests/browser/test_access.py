"""What everybody can see, read and use: rules of WCAG, keys, phone, zoom, colours, motion."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.busy import Busy, busy
from tests.browser.measure import PENDING, settled
from tests.browser.pages import DOWN, row
from tests.conftest import missing
from tests.harness import FULL, Server, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

with contextlib.suppress(ImportError):  # then the fixtures skip
    from playwright.sync_api import expect

pytestmark = pytest.mark.browser

GATE = Path(__file__).with_name("gate.py")
DESKTOP = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}
LOOKS = {"light desktop": DESKTOP | LIGHT, "dark phone": PHONE | DARK}
if FULL:
    LOOKS |= {"dark desktop": DESKTOP | DARK, "light phone": PHONE | LIGHT}
looks = pytest.mark.parametrize("context", LOOKS.values(), indirect=True, ids=LOOKS)
phone = pytest.mark.parametrize("context", [PHONE], indirect=True, ids=["phone"])

# By name what a person has done, and by address where they have done it.
VIEWS = {
    "jobs": "#jobs",
    "failed jobs": "#jobs?state=failed",
    "jobs found": "#jobs?q=count&sort=name",
    "no job found": "#jobs?q=nonsense",
    "running job": "#job={log}",
    "failed job": "#job={failed}",
    "missing file": "#job={missing}",
    "job with a result": "#job={done}",
    "job with a digest": "#job={checksum}",
    "queued job": "#job={after}",
    "no such job": "#job=01a00000-0000-7000-8000-000000000000",
    "files": "#files",
    "files found": "#files?q=samples",
    "count": "#processes?kind=count",
    "import": "#processes?kind=csv.import",
    "export": "#processes?kind=export",
    "archive": "#processes?kind=archive",
    "report": "#processes?kind=report",
    "overview": "#overview",
}

AXE = """async () => (await axe.run(document, {
  resultTypes: ["violations"], rules: { "target-size": { enabled: true } },
})).violations.map((rule) =>
  [rule.id, rule.help, rule.nodes.map((node) => node.html.slice(0, 120))])"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    """One busy server for all tests that only look."""
    with busy(tmp_path_factory.mktemp("busy") / "data") as made:
        yield made


@pytest.fixture(scope="module")
def axe() -> str:
    """The checker's source. The policy lets no script in, but what the debugger says is run."""
    found = find_spec("axe_playwright_python")
    origin = found and found.origin
    if not origin:
        missing("axe")
    return Path(str(origin)).with_name("axe.min.js").read_text()


def violations(page: Page, axe: str) -> list[Any]:
    """What axe has against the page as it is."""
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(axe)
    found: list[Any] = page.evaluate(AXE)
    return found


def show(page: Page, made: Busy, address: str) -> None:
    """Go to a view without a reload, and wait until it has come."""
    page.evaluate("(hash) => { location.hash = hash }", address.format(**made.ids))
    settled(page)


def small_controls(page: Page, least: int = 44) -> list[Any]:
    """The visible controls that no finger hits, with their size."""
    found: list[Any] = page.evaluate(
        """(least) => [...document.querySelectorAll('button, a, select, summary, label:has(input), '
          + 'input:not([type=checkbox], [type=radio])')]
        .filter((node) => node.checkVisibility() && !node.matches('.hush, .skip, p a'))
        .map((node) => [node.outerHTML.slice(0, 90), node.getBoundingClientRect()])
        .filter(([, box]) => box.width < least || box.height < least)
        .map(([html, box]) => [html, box.width, box.height])""",
        least,
    )
    return found


def sideways(page: Page) -> list[Any]:
    """What sticks out of the page at its right, if the page scrolls sideways."""
    found: list[Any] = page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? []
        : [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
          && node.getBoundingClientRect().right > innerWidth).map((node) =>
          node.outerHTML.slice(0, 120))"""
    )
    return found[:3]


@pytest.fixture
def visit(shared: Busy, page: Page, allowed: list[str]) -> Page:
    """The page of the busy server."""
    allowed += ["404"]  # of the job that is not there
    page.add_init_script(PENDING)
    page.goto(shared.server.url)
    settled(page)
    return page


@looks
def test_rules(shared: Busy, visit: Page, axe: str) -> None:
    """No view breaks a rule of WCAG 2.2 AA or of good practice, is cut off, or is hard to hit."""
    least = 24 if visit.evaluate("innerWidth > 720") else 44
    found: dict[str, Any] = {}
    for name, address in VIEWS.items():
        show(visit, shared, address)
        # A row that was put in just now has no size before it is drawn.
        wrong = [violations(visit, axe), sideways(visit), small_controls(visit, least)]
        if any(wrong):
            found[name] = wrong
    assert not found, "\n".join(f"{name}: {wrong}" for name, wrong in found.items())


@looks
def test_rules_of_what_opens(shared: Busy, visit: Page, axe: str) -> None:
    """Menus, dialogs, the list of keys and chosen rows keep the same rules."""
    found: dict[str, Any] = {}

    def check(what: str) -> None:
        visit.evaluate("scrollTo(0, 0)")  # else what stands still covers a part of what does not
        settled(visit)
        wrong = [violations(visit, axe), sideways(visit)]
        if any(wrong):
            found[what] = wrong

    show(visit, shared, "#jobs?q=Report")
    more = row(visit, "Report of April").get_by_role("button", name="More Report of April")
    more.press("Enter")
    expect(visit.get_by_role("menu")).to_be_visible()
    if wrong := [one for one in violations(visit, axe) if one[0] != "target-size"]:
        found["menu"] = wrong
    visit.get_by_role("menuitem", name="Copy as curl").dispatch_event("click")
    expect(visit.locator(".notice, dialog").first).to_be_visible()
    check("notice")
    row(visit, "Report of March").get_by_role("checkbox").check()
    expect(visit.get_by_text("1 selected")).to_be_visible()
    check("chosen rows")
    visit.get_by_role("button", name="Keyboard").click()
    expect(visit.get_by_role("dialog")).to_be_visible()
    check("keys")
    visit.keyboard.press("Escape")
    show(visit, shared, "#files")
    visit.get_by_text("Versions").first.click()
    for file in visit.locator(".files > li", has_text="csv").get_by_role("checkbox").all()[:2]:
        file.check()
    check("chosen files, versions")
    for dialog in ("Export", "Archive"):
        visit.get_by_role("button", name=dialog, exact=True).click()
        expect(visit.get_by_role("dialog")).to_be_visible()
        check(dialog)
        visit.keyboard.press("Escape")
        expect(visit.get_by_role("dialog")).to_have_count(0)
    show(visit, shared, "#job={done}")
    visit.get_by_text("Raw JSON").click()
    check("raw job")
    assert not found, "\n".join(f"{name}: {wrong}" for name, wrong in found.items())


@looks
def test_rules_when_empty_and_offline(
    server: Server, page: Page, axe: str, allowed: list[str]
) -> None:
    """So do an empty server, in the preferred colours, and the page of one that is gone."""
    allowed += DOWN
    page.goto(server.url)
    expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
    expect(page.locator("code")).to_contain_text(f"curl -F file=@movie.mkv {server.url}/upload")
    expect(page.locator(".live")).to_contain_text("live")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 18, 20)" if dark else "rgb(246, 247, 248)")
    assert violations(page, axe) == []
    server.post("/v1/jobs", {"kind": "count", "params": {"steps": 10**6}, "name": "counting"})
    counting = row(page, "counting")
    expect(counting).to_contain_text("steps/s")
    expect(counting).to_be_visible()
    server.kill()
    expect(page.locator(".banner")).to_be_visible()
    counting.get_by_role("button", name="Pause counting").click()
    expect(page.locator(".notices")).to_contain_text("Pause did not work: counting: There is")
    assert violations(page, axe) == []
    assert sideways(page) == []


STOP = """() => {
  const node = document.activeElement;
  if (node === document.body) return null;
  const style = getComputedStyle(node);
  const box = node.getBoundingClientRect();
  const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  const label = node.getAttribute("aria-label") ?? node.labels?.[0]?.textContent;
  return {
    html: node.outerHTML.slice(0, 200),
    name: (label ?? node.textContent).trim(),
    ring: (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2),
    seen: Boolean(top) && (node.contains(top) || top.contains(node)),
  };
}"""


@pytest.mark.parametrize("context", [DESKTOP], indirect=True, ids=["desktop"])
def test_tab_goes_everywhere(shared: Busy, visit: Page) -> None:
    """Tab comes to each control of each view; where it stands is seen, and has a name."""
    for address in VIEWS.values():
        show(visit, shared, address)
        visit.evaluate(
            """() => {
            document.activeElement.blur();
            const controls = document.querySelectorAll('a, button, input, select, textarea');
            window.left = new Set([...controls].filter((node) => node.tabIndex >= 0
              && node.checkVisibility({ visibilityProperty: true }) && !node.disabled
              && node.type !== 'radio' && !node.closest('[data-job]')));
            document.addEventListener('focusin', (event) => window.left.delete(event.target));
            }"""
        )
        stops: list[Any] = []
        visit.keyboard.press("Tab")
        while (stop := visit.evaluate(STOP)) and len(stops) < 400:
            stops.append(stop)
            visit.keyboard.press("Tab")
        bad = [stop for stop in stops if not (stop["name"] and stop["ring"] and stop["seen"])]
        assert bad == [], address
        missed = visit.evaluate("[...window.left].map((node) => node.outerHTML)")
        assert missed == [], address


def test_one_polite_region_tells_all(
    serve: Callable[..., Server], page: Page, tmp_path: Path
) -> None:
    """Start, quarters, end and failure are said in one polite region, in that order."""
    server = serve("--kinds", str(GATE))
    page.goto(server.url)
    expect(page.locator(".live")).to_contain_text("live")
    page.evaluate(
        """() => {
        window.said = [];
        const live = document.querySelector('[aria-live]');
        new MutationObserver(() => window.said.push(live.textContent))
          .observe(live, { childList: true, characterData: true, subtree: true });
        }"""
    )
    regions = "[aria-live], [role=status], [role=alert], [role=log], output"
    assert page.locator(regions).count() == 1
    assert page.locator(regions).get_attribute("aria-live") == "polite"

    def hear(text: str) -> None:
        page.wait_for_function(
            "(text) => window.said.some((said) => said.includes(text))", arg=text
        )

    params = {"folder": str(tmp_path), "steps": 4}
    server.post("/v1/jobs", {"kind": "gate", "params": params, "name": "counting"})
    hear("counting started")
    expect(page).to_have_title(re.compile("running"))  # so the page knows that it is at nought
    for step, text in enumerate(("counting: 25", "counting: 50", "counting: 75", "is done"), 1):
        (tmp_path / f"step {step}").touch()
        hear(text)
    expect(row(page, "counting")).to_contain_text("Done")
    missing_file = {"kind": "checksum", "params": {"file": "none.csv"}, "name": "the bad one"}
    server.post("/v1/jobs", missing_file)
    expect(row(page, "the bad one")).to_contain_text("Failed")
    hear("failed")
    said = " ".join(page.evaluate("window.said"))
    assert re.findall(r"counting[^.:]*(?:: \d+|is done|started)", said) == [
        *("counting started", "counting: 25", "counting: 50", "counting: 75", "counting is done"),
    ]
    assert re.search(r"the bad one failed\. .*none\.csv", said)


MOVING = "() => document.getAnimations().map((one) => `${one.effect.target.outerHTML}`)"


@pytest.mark.parametrize(
    "context", [{"reduced_motion": "reduce"}, {"reduced_motion": "no-preference"}], indirect=True
)
def test_nothing_moves_for_those_who_want_it_so(shared: Busy, visit: Page) -> None:
    """With reduced motion no animation runs, on any view; without, a bar without an end does."""
    still = visit.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")
    if not still:
        eventually(lambda: visit.evaluate(MOVING), "the bar moves")
        return
    for address in VIEWS.values():
        show(visit, shared, address)
        assert visit.evaluate(MOVING) == [], address


COLOURS = """async (base64) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]));
  const canvas = new OffscreenCanvas(image.width, image.height);
  const draw = canvas.getContext("2d", { willReadFrequently: true });
  draw.drawImage(image, 0, 0);
  const at = (x) => draw.getImageData(x, image.height >> 1, 1, 1).data.join();
  return [at(3), at(image.width - 4)];
}"""


@pytest.mark.parametrize("context", [{"forced_colors": "active"}], indirect=True, ids=["forced"])
def test_bars_are_seen_in_forced_colours(server: Server, page: Page) -> None:
    """Where a system forces its few colours, one still sees how far a bar has come."""
    server.post("/upload?file_name=half.bin&file_size=2000000", bytes(1_000_000))
    page.goto(server.url)
    bar = row(page, "half.bin").get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", "50")

    def differ() -> bool:
        picture = base64.b64encode(bar.screenshot()).decode()
        done, left = page.evaluate(COLOURS, picture)
        return bool(done != left)

    eventually(differ, "both ends of the bar have a colour of their own")


SPACED = """() => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(`* { line-height: 1.5 !important; letter-spacing: .12em !important;
    word-spacing: .16em !important; } p { margin-bottom: 2em !important; }`);
  document.adoptedStyleSheets = [sheet];
}"""


@pytest.mark.parametrize(
    "context",
    [{"viewport": {"width": 640, "height": 430}}, {"viewport": {"width": 320, "height": 256}}],
    indirect=True,
    ids=["200 %", "400 %"],
)
def test_zoom(shared: Busy, visit: Page) -> None:
    """At 200 and 400 %, also with much space between letters, nothing scrolls sideways."""
    visit.evaluate(SPACED)
    found = {}
    for name, address in VIEWS.items():
        show(visit, shared, address)
        if wide := sideways(visit):
            found[name] = wide
    assert not found, "\n".join(f"{name}: {wide}" for name, wide in found.items())
