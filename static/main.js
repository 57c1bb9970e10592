// The composition: who this browser is, the channel into the store, the store into the views, and what
// belongs to the whole page: header, banner, drop target, title, keys.
//
// Strategy: modules know the small `app` object below and not each other. The part of the address
// behind # names the view.

import { Channel } from "./channel.js";
import { announce, el, icon, liveRegion, notice, noticeShelf, setAttr, setText } from "./dom.js";
import { FilesView } from "./files-view.js";
import { JobsView } from "./jobs-view.js";
import { ProcessView } from "./process-view.js";
import { sayEvent } from "./row.js";
import { Store, fraction } from "./store.js";
import { Uploads, dropped } from "./uploads.js";
import { format, words } from "./words.js";

const BANNER_MS = 1000;
const SILENT_MS = 4000;
const CROWDED = 4429; // the close code for too many connections
const YEAR_S = 31536000;

const random = () => [...crypto.getRandomValues(new Uint8Array(10))].map((byte) => (byte % 36).toString(36)).join("");

// The label by which the server and this page know this browser again; it grants nothing.
function clientId() {
  const found = document.cookie.match(/(?:^|; )client_id=([\w.~-]+)/)?.[1];
  const id = found ?? random();
  if (!found) document.cookie = `client_id=${id}; SameSite=Strict; Path=/; Max-Age=${YEAR_S}`;
  return id;
}

function tab(anew) {
  try {
    const id = (anew ? null : sessionStorage.getItem("tab")) ?? random();
    sessionStorage.setItem("tab", id);
    return id;
  } catch {
    return random();
  }
}

const store = new Store();
const app = { me: clientId(), store, places: new Map(), choose, chooseFor, go };
const channel = new Channel({ tab, frame: (frame, first) => store.frame(frame, first), status });
app.channel = channel;
store.more = () => store.nextPage(channel);
app.uploads = new Uploads(app);
const views = { jobs: new JobsView(app), files: new FilesView(app), processes: new ProcessView(app) };

// The frame of the page

const ICONS = { jobs: "jobs", files: "file", processes: "gear" };
const links = Object.keys(views).map((name) => el("a", { href: `#${name}` }, icon(ICONS[name]), el("span", {}, words.views[name])));
const liveText = el("span", { class: "live-text" });
const liveNode = el("span", { class: "live" }, el("span", { class: "dot" }), liveText);
const bannerText = el("span");
const bannerNext = el("span", { class: "banner-next" });
const bannerButton = el("button", { type: "button", onclick: () => (channel.state === "ended" ? location.reload() : channel.retry()) });
const banner = el("aside", { class: "banner", "aria-label": words.bannerLabel, hidden: true }, icon("clock"), bannerText, bannerNext, bannerButton);
const main = el("main", { id: "main", tabindex: "-1" }, Object.values(views).map((view) => view.node));
const picker = el("input", { type: "file", multiple: true, hidden: true, id: "picker" });
const shade = el("div", { class: "shade", hidden: true }, icon("drop"), el("strong", {}, words.drop.here));
document.body.prepend(
  el("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, words.skip),
  el("header", {}, el("a", { class: "logo", href: "#jobs" }, icon("logo"), words.title), el("nav", {}, links), liveNode),
  banner, main, picker, liveRegion, noticeShelf, shade);

function go(name) {
  location.hash = name;
}

function route() {
  const asked = location.hash.slice(1);
  const name = asked in views ? asked : "jobs";
  for (const [key, view] of Object.entries(views)) view.node.hidden = key !== name;
  links.forEach((link, i) => setAttr(link, "aria-current", Object.keys(views)[i] === name ? "page" : null));
  views[name].shown?.();
  scrollTo(0, 0);
}

// Files come in: chosen, dropped, pasted

let choosing = null;

function choose() {
  choosing = null;
  picker.multiple = true;
  picker.click();
}

function chooseFor(row) {
  choosing = row;
  picker.multiple = false;
  picker.click();
}

function take(files) {
  app.uploads.add(files);
  if (files.length) go("jobs");
}

async function resume(row, file) {
  if (!await app.uploads.goOn(row, file)) notice(words.uploads.other(row.name), true);
}

picker.addEventListener("change", () => {
  const files = [...picker.files];
  picker.value = "";
  if (!choosing) take(files);
  else if (files[0]) resume(choosing, files[0]);
  choosing = null;
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
let depth = 0;
addEventListener("dragenter", (event) => {
  if (!hasFiles(event)) return;
  depth += 1;
  shade.hidden = false;
});
addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  shade.hidden = depth === 0;
});
addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  shade.hidden = true;
  dropped(event.dataTransfer).then(take);
});
addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) take(files);
});

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey && !views.jobs.node.hidden) {
    event.preventDefault();
    views.jobs.search.focus();
  }
});

// Connection, title, announcements

let wasLost = false;

function status() {
  const { state } = channel;
  const silent = performance.now() - channel.heardAt;
  const text = state === "live"
    ? silent > SILENT_MS && document.visibilityState === "visible" ? words.silent(Math.round(silent / 1000)) : words.live(channel.rtt)
    : state === "connecting" ? words.connecting : words.lost;
  setText(liveText, text);
  setAttr(liveNode, "data-state", state === "live" && silent > SILENT_MS ? "silent" : state);
  setAttr(liveNode, "title", text);
  const down = state === "ended" || (state === "lost" && (channel.restarting || Date.now() - channel.lostAt > BANNER_MS));
  if (down) {
    const ended = state === "ended";
    setText(bannerText, ended ? (channel.code === CROWDED ? words.banner.crowded : words.banner.ended) : channel.restarting ? words.banner.restart
      : store.ready ? words.banner.lost(format.second(channel.lostAt)) : words.banner.never);
    const s = Math.ceil(((channel.retryAt ?? 0) - Date.now()) / 1000);
    setText(bannerNext, ended ? "" : words.banner.again(channel.retryAt ? s : 0));
    setText(bannerButton, ended ? words.banner.reload : words.banner.now);
    if (!wasLost) announce(bannerText.textContent);
  } else if (wasLost && state === "live") announce(words.back);
  if (state !== "lost" || down) wasLost = down;
  banner.hidden = !(down || (state === "lost" && wasLost));
  document.body.classList.toggle("stale", !banner.hidden);
}

let titled = null;
const quarters = new Map();

function follow(change) {
  if (change.event) sayEvent(change.event);
  titled ??= setTimeout(() => {
    titled = null;
    const running = store.sorted.filter((row) => row.state === "running");
    const parts = running.map(fraction).filter((part) => part !== null);
    const n = Math.max(running.length, store.counts.running ?? 0);
    const mean = parts.reduce((sum, part) => sum + part, 0) / parts.length;
    document.title = n === 0 ? words.title : `${parts.length ? `(${format.percent(mean)}) ` : ""}${n} running · ${words.title}`;
    if (running.length <= 3) for (const row of running) quarter(row);
  }, 250);
}

function quarter(row) {
  const now = Math.floor((fraction(row) ?? 0) * 4);
  const before = quarters.get(row.id);
  quarters.set(row.id, now);
  if (before !== undefined && now > before && now < 4) announce(words.said.quarter(row.name, format.percent(now / 4)));
}

store.listen(follow);
addEventListener("hashchange", route);
route();
status();
channel.open();
