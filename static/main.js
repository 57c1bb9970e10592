// The composition: who this browser is, the channel into the store, the store into the views, and what belongs
// to the whole page. Modules know the small `app` object, and not each other.

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
const NAV = { jobs: "jobs", files: "file", processes: "gear", overview: "chart" };

// The label by which the server and this page know this browser again; it grants nothing.
function clientId() {
  const found = document.cookie.match(/(?:^|; )client_id=([\w.~-]+)/)?.[1];
  const id = found ?? [...crypto.getRandomValues(new Uint8Array(10))].map((byte) => (byte % 36).toString(36)).join("");
  if (!found) document.cookie = `client_id=${id}; SameSite=Strict; Path=/; Max-Age=${YEAR_S}`;
  return id;
}

const app = { me: clientId(), store: new Store(), choose, go };
const { store } = app;
const banner = new Banner(app);
app.channel = new Channel({ frame: (...told) => store.frame(...told), status: () => banner.status() });
app.channel.open(); // its worker starts while the page is built
app.uploads = new Uploads(app);
const views = app.views = { jobs: new JobsView(app), files: new FilesView(app), processes: new ProcessView(app), overview: new Overview(app), job: new JobView(app) };

const links = Object.entries(NAV).map(([name, sign]) => el("a", { href: `#${name}` }, icon(sign), words.views[name]));
const main = el("main", { tabindex: -1 }, Object.values(views).map((one) => one.node));
const picker = el("input", { type: "file", multiple: true, hidden: true, id: "picker", onchange: picked });
const shade = el("div", { class: "shade", hidden: true }, icon("drop"), words.drop.here);
document.body.prepend(
  el("header", {}, el("a", { class: "skip", href: "#", onclick: (event) => { event.preventDefault(); main.focus(); } }, words.skip),
    el("a", { class: "logo", href: "#jobs" }, icon("logo"), words.title), el("nav", { "aria-label": words.nav }, links), banner.live,
    button("?", help, { class: "quiet", "aria-label": words.help.title, title: words.help.title })),
  banner.node, main, picker, liveRegion, noticeShelf, shade);

let view;

function go(hash) {
  views.jobs.expect();
  location.hash = hash;
}

// The part of the address behind # names the view and what it shows.
function route() {
  const [asked, query] = location.hash.slice(1).split("?");
  const job = asked.match(/^job=(.+)/)?.[1];
  const name = job ? "job" : asked in NAV ? asked : "jobs";
  view?.hide?.();
  view = views[name];
  for (const one of Object.values(views)) one.node.hidden = one !== view;
  for (const link of links) setAttr(link, "aria-current", link.hash === `#${name}` && "page");
  scrollTo(0, 0);
  view.show(new URLSearchParams(job ? { job } : query));
  title();
}

// Files come in: chosen (for a row, if it is to go on), dropped, pasted.

let choosing = null;

function choose({ folder = false, row = null } = {}) {
  choosing = row;
  picker.multiple = !row;
  picker.webkitdirectory = folder;
  picker.click();
}

async function picked() {
  const [files, row] = [[...picker.files], choosing];
  picker.value = "";
  if (!row) take(files);
  else if (files[0] && !(await app.uploads.goOn(row, files[0]))) notice(words.uploads.other(row.name), true);
}

function take(files) {
  app.uploads.add(files);
  if (files.length) go("jobs");
  views.jobs.count();
}

function dragged(event, over) {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  shade.hidden = !over;
  if (event.type === "drop") dropped(event.dataTransfer).then(take);
}
for (const type of ["dragenter", "dragover"]) addEventListener(type, (event) => dragged(event, true));
addEventListener("dragleave", (event) => { if (!event.relatedTarget) shade.hidden = true; });
addEventListener("drop", (event) => dragged(event, false));
addEventListener("paste", ({ clipboardData: { files } }) => take([...files]));

// Keys: those of a single letter can be turned off (WCAG 2.1.4), for who dictates or mistypes.

let memory = {}; // where nothing may be remembered: for this page
try {
  memory = localStorage;
} catch { /* so it is */ }

function help() {
  const box = el("input", { type: "checkbox", checked: memory.keys !== "off", onchange: () => { memory.keys = box.checked ? "on" : "off"; } });
  ask(words.help.title, [el("dl", { class: "keys" }, words.help.keys.map(([keys, text]) =>
    el("div", {}, el("dt", {}, keys.split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, text)))),
  el("label", {}, box, " ", words.help.letters)], [{ label: words.close, kind: "primary" }]);
}

const KEYS = { "?": help, u: () => choose(), n: () => go("processes"), z: () => [...document.querySelectorAll(".undo")].at(-1)?.click(),
  1: () => go("jobs"), 2: () => go("files"), 3: () => go("processes"), 4: () => go("overview") };

addEventListener("keydown", (event) => {
  const { key, target, ctrlKey, metaKey } = event;
  const letter = key.length === 1 && !ctrlKey && !metaKey;
  if (event.defaultPrevented || event.altKey || target.closest("dialog, [popover]") || (letter && memory.keys === "off")) return;
  if (target.matches("textarea, select, input:not([type=checkbox])")) {
    if (key === "Escape") target.blur();
  } else if (letter && KEYS[key]) {
    KEYS[key]();
    event.preventDefault();
  } else if (view.key?.(event)) event.preventDefault();
});

// Title, and what is said aloud

let titled = null;
const quarters = new Map();

function title() {
  titled = null;
  const running = store.sorted.filter((row) => row.state === "running");
  const parts = running.map(fraction).filter((part) => part !== null);
  const n = Math.max(running.length, store.counts.running ?? 0);
  const mean = parts.length && format.percent(parts.reduce((sum, part) => sum + part, 0) / parts.length);
  document.title = [n && words.running(mean, format.count(n)), view.title, words.title].filter(Boolean).join(" · ");
  for (const row of running.length > 3 ? [] : running) {
    const now = Math.floor((fraction(row) ?? 0) * 4);
    if (now > quarters.get(row.id) && now < 4) announce(words.said.quarter(row.name, format.percent(now / 4)));
    quarters.set(row.id, now);
  }
}

store.listen(({ event }) => {
  if (event) sayEvent(event);
  titled ??= setTimeout(title, 250);
});
addEventListener("hashchange", route);
route();
banner.status();
