// The composition: who this browser is, the channel into the store, the store into the views, and what
// belongs to the whole page: header, drop target, title, keys.
//
// Strategy: modules know the small `app` object below and not each other. The part of the address
// behind # names the view and what it shows.

import { Banner } from "./banner.js";
import { Channel } from "./channel.js";
import { announce, ask, button, el, icon, liveRegion, notice, noticeShelf, setAttr } from "./dom.js";
import { FilesView } from "./files-view.js";
import { JobView } from "./job-view.js";
import { JobsView } from "./jobs-view.js";
import { Overview } from "./overview.js";
import { ProcessView } from "./process-view.js";
import { sayEvent } from "./row.js";
import { Store, fraction } from "./store.js";
import { Uploads, dropped } from "./uploads.js";
import { format, words } from "./words.js";

const YEAR_S = 31536000;

// What this browser remembers; nothing where it may not.
function remembered(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { /* then for this page only */ }
  return value ?? null;
}

// The label by which the server and this page know this browser again; it grants nothing.
function clientId() {
  const found = document.cookie.match(/(?:^|; )client_id=([\w.~-]+)/)?.[1];
  const id = found ?? [...crypto.getRandomValues(new Uint8Array(10))].map((byte) => (byte % 36).toString(36)).join("");
  if (!found) document.cookie = `client_id=${id}; SameSite=Strict; Path=/; Max-Age=${YEAR_S}`;
  return id;
}

const app = { me: clientId(), store: new Store(), choose, chooseFor, go };
const banner = new Banner(app);
app.channel = new Channel({ frame: (frame, first) => app.store.frame(frame, first), status: () => banner.status() });
app.uploads = new Uploads(app);
const views = { jobs: new JobsView(app), files: new FilesView(app), processes: new ProcessView(app), overview: new Overview(app), job: new JobView(app) };
app.views = views;

// The frame of the page

const ICONS = { jobs: "jobs", files: "file", processes: "gear", overview: "chart" };
const links = Object.keys(ICONS).map((name) => el("a", { href: `#${name}` }, icon(ICONS[name]), el("span", {}, words.views[name])));
const main = el("main", { id: "main", tabindex: "-1" }, Object.values(views).map((view) => view.node));
const picker = el("input", { type: "file", multiple: true, hidden: true, id: "picker" });
const shade = el("div", { class: "shade", hidden: true }, icon("drop"), el("strong", {}, words.drop.here));
document.body.prepend(
  el("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, words.skip),
  el("header", {}, el("a", { class: "logo", href: "#jobs" }, icon("logo"), words.title), el("nav", { "aria-label": words.nav }, links), banner.live,
    button(icon("moon"), theme, { class: "quiet", "aria-label": words.theme, title: words.theme }),
    button("?", help, { class: "quiet", "aria-label": words.help.title, title: words.help.title })),
  banner.node, main, picker, liveRegion, noticeShelf, shade);

function theme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!remembered("theme") && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.style.colorScheme = remembered("theme", dark ? "light" : "dark");
}
if (remembered("theme")) document.documentElement.style.colorScheme = remembered("theme");

let view = views.jobs;

function go(hash) {
  views.jobs.expect();
  location.hash = hash;
}

function route() {
  const [asked, query] = location.hash.slice(1).split("?");
  const job = asked.match(/^job=(.+)/)?.[1];
  const name = job ? "job" : asked in ICONS ? asked : "jobs";
  view.hide?.();
  view = views[name];
  for (const one of Object.values(views)) one.node.hidden = one !== view;
  links.forEach((link, i) => setAttr(link, "aria-current", Object.keys(ICONS)[i] === name ? "page" : null));
  scrollTo(0, 0);
  view.show(new URLSearchParams(job ? { job } : query));
  title();
}

// Files come in: chosen, dropped, pasted

let choosing = null;

function choose({ folder = false, row = null } = {}) {
  choosing = row;
  picker.multiple = !row;
  picker.webkitdirectory = folder;
  picker.click();
}

function chooseFor(row) {
  choose({ row });
}

function take(files) {
  app.uploads.add(files);
  if (files.length) go("jobs");
  views.jobs.count();
}

picker.addEventListener("change", async () => {
  const [files, row] = [[...picker.files], choosing];
  picker.value = "";
  if (!row) take(files);
  else if (files[0] && !(await app.uploads.goOn(row, files[0]))) notice(words.uploads.other(row.name), true);
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
const shadow = (n) => { shade.hidden = (depth = Math.max(0, n)) === 0; };
let depth = 0;
addEventListener("dragenter", (event) => { if (hasFiles(event)) shadow(depth + 1); });
addEventListener("dragleave", () => shadow(depth - 1));
addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
addEventListener("drop", async (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  shadow(0);
  take(await dropped(event.dataTransfer));
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) take(files);
});

// Keys: those of a single letter can be turned off (WCAG 2.1.4), for who dictates or mistypes.

function help() {
  const box = el("input", { type: "checkbox", checked: remembered("keys") !== "off", onchange: () => remembered("keys", box.checked ? "on" : "off") });
  const rows = words.help.keys.map(([keys, text]) => el("div", {}, el("dt", {}, keys.split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, text)));
  ask(words.help.title, [el("dl", { class: "keys" }, rows), el("label", {}, box, " ", words.help.letters)], [{ value: "", label: words.close, kind: "primary" }]);
}

addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.defaultPrevented || event.altKey || target.closest?.("dialog, [popover]")) return;
  const typing = target.closest?.("textarea, select, input:not([type=checkbox])");
  if (typing) {
    if (key === "Escape") target.blur();
    return;
  }
  const letter = key.length === 1 && !event.ctrlKey && !event.metaKey;
  if (letter && remembered("keys") === "off") return;
  const own = letter && { "?": help, u: () => choose(), n: () => go("processes"), z: () => [...document.querySelectorAll(".undo")].at(-1)?.click(),
    ...Object.fromEntries(Object.keys(ICONS).map((name, i) => [i + 1, () => go(name)])) }[key];
  if (own) own();
  else if ((!letter && !["Enter", "Escape", "Delete", "ArrowUp", "ArrowDown", "a"].includes(key)) || !view.key?.(event)) return;
  event.preventDefault();
});

// Title and announcements

let titled = null;
const quarters = new Map();

function title() {
  titled = null;
  const running = app.store.sorted.filter((row) => row.state === "running");
  const parts = running.map(fraction).filter((part) => part !== null);
  const n = Math.max(running.length, app.store.counts.running ?? 0);
  const mean = parts.reduce((sum, part) => sum + part, 0) / parts.length;
  const now = n ? words.running(parts.length ? format.percent(mean) : "", format.count(n)) : "";
  document.title = [now, view.title, words.title].filter(Boolean).join(" · ");
  if (running.length <= 3) for (const row of running) quarter(row);
}

function quarter(row) {
  const now = Math.floor((fraction(row) ?? 0) * 4);
  const before = quarters.get(row.id);
  quarters.set(row.id, now);
  if (before !== undefined && now > before && now < 4) announce(words.said.quarter(row.name, format.percent(now / 4)));
}

app.store.listen(({ event }) => {
  if (event) sayEvent(event);
  titled ??= setTimeout(title, 250);
});
addEventListener("hashchange", route);
route();
banner.status();
app.channel.open();
