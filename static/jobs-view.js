// The view of jobs: numbers of now, drop zone, filter and list.
//
// Strategy: the store says which ids have changed; they are collected and written in one animation frame,
// and only if their rows are on the page. At most so many rows are built; the end of the list is watched,
// and when it comes into sight more are built, then loaded. Nothing is sorted under the pointer: newest
// first, always.

import { el, icon, setAttr, setText, svg } from "./dom.js";
import { Row } from "./row.js";
import { format, words } from "./words.js";

const GROUPS = {
  all: null,
  running: ["running", "pausing", "cancelling"],
  paused: ["paused"],
  queued: ["queued", "scheduled"],
  done: ["succeeded"],
  failed: ["failed"],
  cancelled: ["cancelled"],
};
const SAMPLES = 60;
const STEP = 100;
const PLACES = 20;

class Spark {
  constructor() {
    this.values = [];
    this.line = svg("polyline", { class: "line" });
    this.area = svg("polygon", { class: "area" });
    this.node = svg("svg", { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.node.append(this.area, this.line);
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > SAMPLES) this.values.shift();
    const most = Math.max(...this.values, 1);
    const from = SAMPLES - this.values.length;
    const points = this.values.map((v, i) =>
      `${(((from + i) / (SAMPLES - 1)) * 100).toFixed(1)},${(26 - (v / most) * 24).toFixed(1)}`);
    this.line.setAttribute("points", points.join(" "));
    const first = ((from / (SAMPLES - 1)) * 100).toFixed(1);
    this.area.setAttribute("points", `${first},28 ${points.join(" ")} 100,28`);
  }
}

class Overview {
  constructor() {
    const tile = (label, ...rest) => el("div", { class: "tile" }, el("span", {}, label), ...rest);
    this.in = el("b", {}, "–");
    this.out = el("b", {}, "–");
    this.running = el("span", {}, "–");
    this.slots = el("small");
    this.waiting = el("span");
    this.free = el("b", {}, "–");
    this.stored = el("span");
    this.sparks = [new Spark(), new Spark()];
    this.node = el("section", { class: "flow", "aria-label": words.now.label },
      tile(words.now.in, this.in, this.sparks[0].node),
      tile(words.now.out, this.out, this.sparks[1].node),
      tile(words.now.running, el("b", {}, this.running, " ", this.slots), this.waiting),
      tile(words.now.free, this.free, this.stored));
  }

  now(now) {
    setText(this.in, format.rate(now.in_bytes_per_s, "bytes"));
    setText(this.out, format.rate(now.out_bytes_per_s, "bytes"));
    this.sparks[0].add(now.in_bytes_per_s);
    this.sparks[1].add(now.out_bytes_per_s);
    setText(this.slots, words.now.slots(now.slots));
    setText(this.running, format.count(now.running));
    setText(this.free, format.bytes(now.free_bytes));
    setText(this.stored, words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)));
  }

  counts(counts) {
    const paused = counts.paused ?? 0;
    const queued = (counts.queued ?? 0) + (counts.scheduled ?? 0);
    setText(this.waiting, words.now.waiting(format.count(paused), format.count(queued)));
  }
}

export class JobsView {
  constructor(app) {
    this.app = app;
    this.rows = new Map();
    this.dirty = new Set();
    this.group = "all";
    this.query = "";
    this.limit = STEP;
    this.overview = new Overview();
    this.chips = Object.keys(GROUPS).map((group) => this.chip(group));
    this.search = el("input", { type: "search", id: "search", placeholder: matchMedia("(pointer: coarse)").matches ? words.search : words.searchHint, "aria-label": words.search,
      autocomplete: "off", spellcheck: "false", oninput: () => { this.query = this.search.value.trim().toLowerCase(); this.relist(); } });
    this.list = el("ul", { class: "jobs", "aria-label": words.jobsLabel });
    this.end = el("p", { class: "end" });
    this.nothing = el("div", { class: "nothing", hidden: true }, el("p", {}, words.nothing),
      el("button", { type: "button", onclick: () => this.show("all", true) }, words.clear));
    this.drop = el("div", { class: "drop", hidden: true }, icon("drop"),
      el("span", { class: "drop-text" }, el("strong", {}, words.drop.bold), words.drop.rest),
      el("span", { class: "drop-acts" },
        el("button", { type: "button", class: "primary", onclick: () => app.choose() }, words.drop.upload),
        el("button", { type: "button", onclick: () => app.go("processes") }, words.drop.process)));
    this.empty = el("div", { class: "empty", hidden: true }, icon("drop"),
      el("h2", {}, words.empty.title), el("p", {}, words.empty.text),
      el("div", { class: "empty-acts" },
        el("button", { type: "button", class: "primary", onclick: () => app.choose() }, words.empty.choose),
        el("button", { type: "button", onclick: () => app.go("processes") }, words.drop.process)),
      el("p", { class: "curl" }, words.empty.curl, " ", el("code", {}, `curl -F file=@movie.mkv ${location.origin}/upload`)));
    this.bar = el("div", { class: "bar", hidden: true },
      el("div", { class: "chips", role: "group", "aria-label": words.filterLabel }, this.chips.map((chip) => chip.node)),
      this.search);
    this.node = el("div", {}, el("h1", { class: "hush" }, words.jobsLabel), this.overview.node, this.drop, app.uploads.node, this.bar, this.list, this.nothing, this.end, this.empty);
    new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) this.extend(); }, { rootMargin: "600px" }).observe(this.end);
    app.store.listen((change) => this.changed(change));
  }

  chip(group) {
    const number = el("span");
    const node = el("button", { type: "button", class: "chip", "data-group": group, "aria-pressed": String(group === "all"),
      onclick: () => this.show(group) }, words.filters[group], " ", number);
    return { group, node, number };
  }

  show(group, clear = false) {
    this.group = group;
    if (clear) this.search.value = this.query = "";
    for (const chip of this.chips) setAttr(chip.node, "aria-pressed", String(chip.group === group));
    this.limit = STEP;
    this.relist();
  }

  changed(change) {
    if (change.now) {
      this.overview.now(this.app.store.now);
      // Time passes in rows that nothing is said about: away, still, queued.
      for (const [id, row] of this.rows) if (["running", "queued"].includes(row.row?.state)) this.dirty.add(id);
      this.places();
    }
    if (change.counts) this.count();
    if (change.rows === null) this.listed = false;
    else for (const id of change.rows ?? []) this.dirty.add(id);
    if (change.event && this.listed) {
      const { from, to, row } = change.event;
      if (from !== to || !this.rows.has(row.id)) this.listed = false;
    }
    this.plan();
  }

  relist() {
    this.listed = false;
    this.plan();
  }

  plan() {
    this.planned ??= requestAnimationFrame(() => {
      this.planned = null;
      if (!this.listed) this.fill();
      else for (const id of this.dirty) this.rows.get(id)?.update();
      this.dirty.clear();
    });
  }

  count() {
    const { counts } = this.app.store;
    const all = Object.values(counts).reduce((sum, n) => sum + n, 0);
    for (const chip of this.chips) {
      const states = GROUPS[chip.group];
      const n = states ? states.reduce((sum, state) => sum + (counts[state] ?? 0), 0) : all;
      setText(chip.number, format.count(n));
      chip.node.hidden = n === 0 && chip.group !== "all" && chip.group !== this.group;
    }
    this.overview.counts(counts);
    // Before the first snapshot neither is shown: what is clicked must not vanish under the pointer.
    const { ready } = this.app.store;
    this.empty.hidden = !ready || all > 0;
    this.bar.hidden = this.list.hidden = this.drop.hidden = !ready || all === 0;
  }

  matches(row) {
    const states = GROUPS[this.group];
    if (states && !states.includes(row.state)) return false;
    return !this.query || row.name.toLowerCase().includes(this.query) || row.kind.includes(this.query) || row.id.startsWith(this.query);
  }

  // Make the list what it should be, moving as few elements as possible.
  fill() {
    this.listed = true;
    const { store } = this.app;
    const wanted = [];
    this.hidden = false;
    for (const row of store.sorted) {
      if (!this.matches(row)) continue;
      if (wanted.length === this.limit) {
        this.hidden = true;
        break;
      }
      wanted.push(row);
    }
    const ids = new Set(wanted.map((row) => row.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.node.remove();
      this.rows.delete(id);
    }
    let before = this.list.firstElementChild;
    for (const { id } of wanted) {
      let row = this.rows.get(id);
      if (row) row.update();
      else {
        row = new Row(this.app, store.rows.get(id));
        this.rows.set(id, row);
      }
      if (row.node === before) before = before.nextElementSibling;
      else this.list.insertBefore(row.node, before);
    }
    const more = this.hidden || store.cursor !== null;
    this.nothing.hidden = !store.ready || wanted.length > 0 || more || this.list.hidden;
    setText(this.end, more ? words.more : "");
    if (wanted.length === 0 || more) queueMicrotask(() => this.look());
    if (this.list.classList.contains("bare") !== (wanted.length === 0)) this.list.classList.toggle("bare", wanted.length === 0);
  }

  // The observer tells of changes only; an end that stays in sight is asked here.
  look() {
    if (this.node.hidden || !this.app.store.ready) return;
    if (this.end.getBoundingClientRect().top < innerHeight + 600) this.extend();
  }

  extend() {
    if (this.hidden) {
      this.limit += STEP;
      this.relist();
    } else this.app.store.nextPage(this.app.channel);
  }

  // The places of the first jobs in the queue, which change with every other job and so are asked for.
  async places() {
    const { store } = this.app;
    const queued = [...this.rows.values()].map((row) => row.row).filter((row) => row?.state === "queued").slice(-PLACES);
    const sign = `${store.now.running} ${store.now.queued} ${queued.map((row) => row.id).join()}`;
    if (sign === this.asked) return;
    this.asked = sign;
    await Promise.all(queued.map(async ({ id }) => {
      try {
        const job = await (await fetch(`/v1/jobs/${id}`, { cache: "no-store" })).json();
        if (job.waiting?.position) this.app.places.set(id, job.waiting.position);
        this.dirty.add(id);
      } catch {
        this.asked = null;
      }
    }));
    this.plan();
  }
}
