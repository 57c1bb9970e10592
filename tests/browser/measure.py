"""What the page is measured by: its first row, what jumps, and frames while one scrolls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from handlers import STATIC
from handlers.page import PageHandler

if TYPE_CHECKING:
    from playwright.sync_api import Page

Call = Callable[[str, Any], Any]
"""POST to a path, a body of JSON."""

LOADED = ("index.html", "main.js", "socket.js", "sluice.css")

# Notes each layout shift, and when the first row of the list was painted: a frame after it came in.
NOTES = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const { value, hadRecentInput, sources } of list.getEntries()) {
    const nodes = sources.map(({ node, previousRect, currentRect }) =>
      [(node?.outerHTML ?? node?.textContent ?? "").slice(0, 120),
        ...[previousRect, currentRect].map(({ x, y, width, height }) => [x, y, width, height])]);
    window.shifts.push({ value, hadRecentInput, nodes });
  }
}).observe({ type: "layout-shift", buffered: true });
window.firstRow = new Promise((painted) => {
  const watch = new MutationObserver(() => {
    if (!document.querySelector("li[data-job]")) return;
    watch.disconnect();
    requestAnimationFrame(() => setTimeout(() => painted(performance.now())));
  });
  watch.observe(document, { childList: true, subtree: true });
});
"""

# Counts the requests that are under way.
PENDING = """
window.pending = 0;
const { fetch } = window;
window.fetch = async (...args) => {
  window.pending += 1;
  try { return await fetch(...args); } finally { setTimeout(() => { window.pending -= 1; }); }
};
"""
DRAWN = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"

# Scrolls on with each frame, as far as the time that has passed says, and counts.
SCROLL = """async ([rows, seconds]) => {
  const list = document.querySelector(".jobs");
  const pixels = rows * list.firstElementChild.getBoundingClientRect().height;
  const long = [];
  const tasks = new PerformanceObserver((seen) => long.push(...seen.getEntries()));
  tasks.observe({ type: "longtask" });
  let frames = 0;
  scrollTo(0, 0);
  await new Promise((end) => {
    let begin = null;
    const step = (now) => {
      begin ??= now;
      frames += 1;
      scrollTo(0, ((now - begin) / 1000 / seconds) * pixels);
      if (now - begin < seconds * 1000) requestAnimationFrame(step);
      else end();
    };
    requestAnimationFrame(step);
  });
  await new Promise((told) => setTimeout(told, 200)); // the observer tells of a task after its end
  tasks.disconnect();
  return [frames / seconds, long.map((task) => task.duration)];
}"""


def settled(page: Page) -> None:
    """Wait until all that was asked for is here, and drawn."""
    page.evaluate(DRAWN)
    page.wait_for_function(
        """() => window.pending === 0 && document.querySelector(".live[data-state=live]")
          && document.querySelector("main > :not([hidden]) h1:not([hidden])")"""
    )
    page.evaluate(DRAWN)


def weight_bytes() -> int:
    """What a browser loads of HTML, CSS and JS, compressed as it is sent."""
    return sum(len(PageHandler.version(STATIC / name).packed) for name in LOADED)


class Scrolled(NamedTuple):
    """What was seen while the list was scrolled."""

    frames_per_s: float
    long_tasks_ms: list[float]  # those of more than 50 ms, by the browser's own definition


def fill(call: Call, rows: int, running: int) -> None:
    """Make so many jobs, of which the newest run; there must be a slot for each of them."""
    later: dict[str, Any] = {"kind": "count", "not_before": "2099-01-01T00:00:00Z"}
    now = {"kind": "count", "params": {"steps": 10**9, "delay_s": 0.1}}
    starts = [later | {"name": f"Wait for night {i}"} for i in range(rows - running)]
    starts += [now | {"name": f"Count the samples of field {i}"} for i in range(running)]
    for at in range(0, rows, 1000):
        call("/v1/jobs", starts[at : at + 1000])


def hold(call: Call) -> None:
    """Pause all that runs: the same list, without updates."""
    call("/v1/jobs/pause", {"filter": {"state": "running"}})


def go_on(call: Call) -> None:
    """Let all that is paused go on."""
    call("/v1/jobs/resume", {"filter": {"state": "paused"}})


def ready(page: Page, rows: int, state: str, n: int) -> None:
    """Wait until the page has all rows, and knows how many are in a state."""
    page.wait_for_function(
        """([rows, state, n]) => {
          const chip = document.querySelector(`.chip[data-group=${state}]`);
          const row = document.querySelector("li[data-job]")?.getBoundingClientRect().height;
          const list = document.querySelector(".jobs").getBoundingClientRect().height;
          return chip.lastElementChild.textContent === String(n) && list >= rows * row;
        }""",
        arg=[rows, state, n],
        timeout=180_000,
    )


def updated(page: Page) -> None:
    """Wait until the first row tells another number than now."""
    page.wait_for_function(
        """([row, was]) => row.querySelector(".much").textContent !== was""",
        arg=page.evaluate_handle(
            """() => { const row = document.querySelector("li[data-job]");
            return [row, row.querySelector(".much").textContent]; }"""
        ),
    )


def scroll(page: Page, rows: int, seconds: float) -> Scrolled:
    """Scroll steadily over so many rows in that time."""
    return Scrolled(*page.evaluate(SCROLL, [rows, seconds]))
