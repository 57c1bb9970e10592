// The view of jobs. What is asked for is in the address. The list is as high as all of its rows, but only those in
// sight exist. What is listed is settled anew only while that disturbs nobody: not under the pointer, nor scrolled.

import { act, can, gone } from "./actions.js";
import { Spark, button, el, icon, setAttr, setText } from "./dom.js";
import { Row } from "./row.js";
import { fraction } from "./store.js";
import { format, words } from "./words.js";

const GROUPS = {
  running: ["running", "pausing", "cancelling"], paused: ["paused"], queued: ["queued", "scheduled"],
  done: ["succeeded"], failed: ["failed"], cancelled: ["cancelled"],
};
const ORDERS = {
  old: (a, b) => a.h - b.h,
  name: (a, b) => (a.name > b.name) - (a.name < b.name),
  progress: (a, b) => (fraction(b) ?? -1) - (fraction(a) ?? -1) || b.h - a.h,
  rate: (a, b) => (b.progress.rate_per_s ?? 0) - (a.progress.rate_per_s ?? 0) || b.h - a.h,
};
const OPS = ["pause", "resume", "cancel", "retry", "delete"];
const BEYOND = 6; // rows that exist above and below those in sight
const EDGE = 110; // pixels that may be covered above and below
const SORT_MS = 1000;
const TYPING_MS = 200;
const EXPECT_MS = 2000;

class Tiles {
  constructor() {
    this.node = el("section", { class: "flow", "aria-label": words.now.label }, ["in", "out", "running", "free"].map((key, i) => {
      const tile = this[key] = { big: el("b", {}, "–"), spark: new Spark(), small: el("span") };
      return el("div", { class: "tile" }, el("span", {}, words.now[key]), tile.big, i < 2 ? tile.spark.node : tile.small);
    }));
  }

  show({ now, flow, counts: { paused = 0, queued = 0, scheduled = 0 } }) {
    for (const key of ["in", "out"]) {
      setText(this[key].big, format.rate(flow[key].at(-1), "bytes"));
      this[key].spark.set(flow[key]);
    }
    this.running.big.replaceChildren(format.count(now.running), el("small", {}, words.now.slots(now.slots)));
    setText(this.running.small, words.now.waiting(format.count(paused), format.count(queued + scheduled)));
    setText(this.free.big, format.bytes(now.free_bytes));
    setText(this.free.small, words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)));
  }
}

export class JobsView {
  constructor(app) {
    this.app = app;
    this.ids = []; // what is listed, in order
    this.rows = new Map(); // those that exist
    this.dirty = new Set();
    this.picked = new Set();
    this.kinds = new Set();
    this.asked = {}; // of the address
    this.tiles = new Tiles();
    this.chips = ["all", ...Object.keys(GROUPS)].map((group) => {
      const number = el("span");
      return { group, number, node: button([words.filters[group] ?? words.state[group], " ", number], () => this.ask({ state: group === "all" ? "" : group }), { class: "chip", "data-group": group }) };
    });
    const select = (label, key, options) => el("select", { "aria-label": label, onchange: ({ target }) => this.ask({ [key]: target.value }) },
      Object.entries(options).map(([value, text]) => el("option", { value }, text)));
    this.kind = select(words.kindLabel, "kind", { "": words.allKinds });
    this.sort = select(words.sortLabel, "sort", words.sorts);
    this.search = el("input", { type: "search", placeholder: matchMedia("(pointer: coarse)").matches ? words.search : words.searchHint,
      "aria-label": words.search, autocomplete: "off", spellcheck: "false", oninput: () => this.ask({ q: this.search.value.trim() }) });
    this.bar = el("div", { class: "bar" }, el("div", { class: "chips", role: "group", "aria-label": words.filterLabel }, this.chips.map((chip) => chip.node)),
      el("div", { class: "finds" }, this.kind, this.sort, this.search));
    this.all = el("input", { type: "checkbox", "aria-label": words.many.all, onchange: () => this.pickAll(this.all.checked) });
    this.many = el("span", { class: "many-text" });
    this.acts = OPS.map((op) => button(words.act[op], () => this.command(op)));
    this.new = button("", () => { scrollTo(0, 0); this.settle(true); }, { class: "fresh", hidden: true });
    this.picks = el("div", { class: "picks" }, el("label", { class: "kind" }, this.all), this.many,
      el("span", { class: "many-acts" }, this.acts, button(words.many.clear, () => this.pickAll(false), { class: "quiet" })), this.new);
    this.list = el("ul", { class: "jobs", "aria-label": words.jobsLabel, onclick: (event) => this.clicked(event),
      onpointerenter: ({ pointerType }) => { this.over = pointerType === "mouse"; }, onpointerleave: () => this.freed(this.over = false) });
    this.end = el("p", { class: "end" });
    this.nothing = el("div", { class: "nothing", hidden: true }, el("p", {}, words.nothing),
      button(words.clear, () => this.ask({ state: "", kind: "", q: "" })));
    const entry = (name) => el("span", { class: name }, button(words.drop.upload, () => app.choose(), { class: "primary" }),
      button(words.drop.folder, () => app.choose({ folder: true })), button(words.drop.process, () => app.go("processes")));
    this.drop = el("div", { class: "drop" }, icon("drop"), el("span", {}, el("strong", {}, words.drop.bold), words.drop.rest), entry("drop-acts"));
    this.empty = el("div", { class: "empty", hidden: true }, icon("drop"),
      el("h2", {}, words.empty.title), el("p", {}, words.empty.text), entry("empty-acts"),
      el("p", { class: "curl" }, words.empty.curl, " ", el("code", {}, `curl -F file=@movie.mkv ${location.origin}/upload`)));
    this.node = el("div", {}, el("h1", { class: "hush" }, words.views.jobs), this.tiles.node, this.drop, app.uploads.node, this.bar, this.picks, this.list, this.nothing, this.end, this.empty);
    addEventListener("scroll", () => { this.moved = true; this.freed(); }, { passive: true });
    addEventListener("resize", () => this.measure());
    app.store.listen((change) => this.changed(change));
  }

  show(params) {
    this.asked = Object.fromEntries(params);
    this.filtered();
    this.count();
    this.measure();
    scrollTo(0, this.scrolled ?? 0);
  }

  hide() {
    this.scrolled = scrollY;
  }

  // What this person starts now is shown at once, wherever the pointer is.
  expect() {
    this.expected = performance.now() + EXPECT_MS;
  }

  // Something else is asked for: by the address, so that it can be shared and comes back.
  ask(change) {
    const query = new URLSearchParams(Object.entries(this.asked = { ...this.asked, ...change }).filter(([, value]) => value));
    history.replaceState(null, "", `#jobs?${query}`);
    this.pickAll(false);
    this.filtered();
  }

  filtered() {
    const { state = "", kind = "", q = "", sort = "" } = this.asked;
    for (const { group, node } of this.chips) setAttr(node, "aria-pressed", group === (state || "all"));
    if (this.search.value.trim() !== q) this.search.value = q;
    if (kind) this.kinds.add(kind);
    this.sort.value = sort;
    // As the server takes it; null for everything.
    const filter = Object.entries({ state: GROUPS[state], kind: kind && [kind], q }).filter(([, value]) => value);
    this.filter = filter.length ? Object.fromEntries(filter) : null;
    this.settle(true);
    clearTimeout(this.typing);
    const { store } = this.app;
    if (this.filter && !store.complete) this.typing = setTimeout(() => store.search(this.filter), TYPING_MS);
  }

  changed({ rows, counts, now, event }) {
    if (now) {
      this.tiles.show(this.app.store);
      // Time passes in rows that nothing is said about: away, still, queued.
      for (const [id, { row }] of this.rows) if (row && ["running", "queued"].includes(row.state)) this.dirty.add(id);
    }
    // The first row and the last one, too: the counts may come a second later.
    if (counts || this.list.hidden || (event && !this.app.store.sorted.length)) this.count();
    for (const id of rows ?? []) this.dirty.add(id);
    if (rows === null || (event && (event.from !== event.to || event.cause === "renamed"))) this.unsettled = true;
    if (event?.from === null && performance.now() < this.expected) this.settle(true);
    this.plan();
  }

  plan() {
    if (this.node.hidden) return;
    this.planned ??= requestAnimationFrame(() => {
      this.planned = null;
      if (this.unsettled || ["progress", "rate"].includes(this.asked.sort)) this.settle(false);
      this.paint();
    });
  }

  count() {
    const { counts, ready, total, sorted } = this.app.store;
    for (const { group, node, number } of this.chips) {
      const n = GROUPS[group]?.reduce((sum, state) => sum + (counts[state] ?? 0), 0) ?? total;
      setText(number, format.count(n));
      node.style.visibility = n === 0 && group === "cancelled" && group !== this.asked.state ? "hidden" : ""; // it has its place
    }
    const empty = total === 0 && !sorted.length && this.app.uploads.node.hidden;
    this.empty.hidden = !ready || !empty;
    for (const node of [this.bar, this.picks, this.list, this.drop]) node.hidden = !ready || empty;
  }

  matches(row) {
    const { state, kind, q = "" } = this.filter ?? {};
    const text = q.toLowerCase();
    return !gone.has(row.id) && (!state || state.includes(row.state)) && (!kind || row.kind === kind[0])
      && (!text || row.name.toLowerCase().includes(text) || row.id === text);
  }

  get scrolledAway() {
    return scrollY > 0 && scrollY > this.top - EDGE; // of a list that is hidden so far the top is 0
  }

  // Settle what is listed; anew: even if that moves rows under the pointer, because it was asked for.
  settle(anew) {
    const { store } = this.app;
    if (!store.ready || (!anew && !this.unsettled && performance.now() - this.sortedAt < SORT_MS)) return;
    this.sortedAt = performance.now();
    const wanted = store.sorted.filter((row) => this.matches(row));
    const order = ORDERS[this.asked.sort];
    if (order) wanted.sort(order);
    this.held = !anew && this.ids.length > 0 && (this.over || this.scrolledAway || this.list.querySelector("[aria-expanded=true]"));
    if (!this.held) {
      this.ids = wanted.map((row) => row.id);
      this.newest = store.sorted[0]?.h ?? 0;
    }
    const known = new Set(this.ids);
    const others = wanted.filter((row) => !known.has(row.id));
    // Held: those that are removed make room, older ones that were loaded go below, new ones wait.
    if (this.held) this.ids = [...this.ids.filter((id) => store.rows.has(id) && !gone.has(id)), ...others.filter((row) => row.h <= this.newest).map((row) => row.id)];
    const fresh = others.filter((row) => row.h > this.newest).length;
    this.unsettled = false;
    this.index = new Map(this.ids.map((id, i) => [id, i]));
    for (const { kind } of wanted) this.kinds.add(kind);
    for (const value of [...this.kinds].slice(this.kind.options.length - 1)) this.kind.append(el("option", { value }, words.kinds[value] ?? value));
    this.kind.value = this.asked.kind ?? "";
    this.nothing.hidden = this.ids.length > 0 || this.list.hidden || !store.complete;
    this.new.hidden = !fresh;
    setText(this.new, words.fresh(fresh));
    setText(this.end, store.complete ? "" : words.more);
    this.list.classList.toggle("bare", !this.ids.length);
    this.pickText();
    this.measure();
  }

  // What was held back is settled once nobody is disturbed.
  freed() {
    this.unsettled ||= this.held && !this.over && !this.scrolledAway;
    this.plan();
  }

  measure() {
    this.height = parseFloat(getComputedStyle(this.list).getPropertyValue("--row"));
    this.list.style.height = `${this.ids.length * this.height}px`;
    this.moved = true;
    this.plan();
  }

  // Make the rows in sight exist and say what is true.
  paint() {
    if (this.moved) {
      this.moved = false;
      this.top = this.list.getBoundingClientRect().top + scrollY;
      const at = (y) => Math.max(0, Math.floor((scrollY - this.top + y) / this.height));
      const wanted = new Set(this.ids.slice(Math.max(0, at(0) - BEYOND), at(innerHeight) + BEYOND));
      for (const [id, { node }] of this.rows) {
        if (wanted.has(id) || (this.index.has(id) && node.contains(document.activeElement))) continue;
        node.remove();
        this.rows.delete(id);
      }
      let before = this.list.firstElementChild;
      for (const id of wanted) {
        const row = this.rows.get(id) ?? new Row(this.app, this.app.store.rows.get(id), (...picked) => this.pick(...picked));
        const i = this.index.get(id);
        this.rows.set(id, row);
        row.update(this.picked.has(id));
        setAttr(row.node, "aria-posinset", i + 1);
        setAttr(row.node, "aria-setsize", this.ids.length);
        row.node.style.transform = `translateY(${i * this.height}px)`;
        while (before && !wanted.has(before.dataset.job)) before = before.nextElementSibling;
        if (row.node === before) before = before.nextElementSibling;
        else this.list.insertBefore(row.node, before);
      }
    } else for (const id of this.dirty) this.rows.get(id)?.update(this.picked.has(id));
    this.dirty.clear();
  }

  pick(id, range) {
    const on = range || !this.picked.has(id);
    const here = this.index.get(id);
    const [a, b] = [range ? this.index.get(this.anchor) ?? here : here, here].sort((x, y) => x - y);
    for (const one of this.ids.slice(a, b + 1)) this.picked[on ? "add" : "delete"](one);
    this.anchor = id;
    this.all.checked = false;
    this.pickText();
  }

  // All is the filter itself, so that rows which are not loaded count.
  pickAll(on) {
    this.picked = new Set(on ? this.ids : []);
    this.all.checked = on;
    this.pickText();
  }

  pickText() {
    const rows = this.pickedRows();
    const more = this.all.checked && !this.app.store.complete;
    this.picks.classList.toggle("on", rows.length > 0);
    this.all.indeterminate = rows.length > 0 && !this.all.checked;
    setText(this.many, rows.length ? words.many.picked(format.count(rows.length), more) : words.many.all);
    this.acts.forEach((node, i) => { node.hidden = !more && !rows.some((row) => can(row, OPS[i])); });
    this.moved = true;
    this.plan();
  }

  pickedRows() {
    return [...this.picked].map((id) => this.app.store.rows.get(id)).filter(Boolean);
  }

  command(op) {
    act(this.app, this.pickedRows(), op, this.all.checked && !this.app.store.complete && (this.filter ?? {}));
    if (op === "delete") this.pickAll(false);
  }

  clicked(event) {
    const id = event.target.closest("li")?.dataset.job;
    if (!id || event.target.closest("button, a, label") || !(event.ctrlKey || event.metaKey || event.shiftKey)) return;
    this.pick(id, event.shiftKey);
  }

  // Keys; true if it was one of ours. What is selected is meant, else the row that has the focus.
  key(event) {
    const { key, shiftKey, ctrlKey, metaKey } = event;
    const combined = ctrlKey || metaKey;
    const at = document.activeElement.closest(".jobs > li")?.dataset.job;
    const row = this.app.store.rows.get(at);
    const i = this.index?.get(at) ?? -1;
    const step = { j: 1, J: 1, ArrowDown: row && 1, k: -1, K: -1, ArrowUp: row && -1 }[key];
    const rows = this.picked.size ? this.pickedRows() : row ? [row] : [];
    const op = { p: rows.some((one) => can(one, "pause")) ? "pause" : "resume", c: "cancel", r: "retry", Delete: "delete" }[key];
    if (combined && key !== "a") return false;
    if (step) {
      if (shiftKey && row && !this.picked.has(at)) this.pick(at, false);
      this.focusRow(Math.min(this.ids.length - 1, Math.max(0, i + step)));
      if (shiftKey) this.pick(document.activeElement.dataset.job, true);
    } else if (op && this.picked.size) this.command(op);
    else if (op && row && can(row, op)) {
      if (op === "delete") this.focusRow(i < this.ids.length - 1 ? i + 1 : i - 1);
      act(this.app, [row], op);
    } else if (key === "/") this.search.focus();
    else if (key === "Escape") this.pickAll(false);
    else if (combined) this.pickAll(true);
    else if (key === "x" && row) this.pick(at, false);
    else if (key === "Enter" && row && document.activeElement.matches("li")) this.app.go(`job=${at}`);
    else if (key === "m" && row) this.rows.get(at).more.click();
    else return false;
    return true;
  }

  focusRow(i) {
    if (i < 0) return;
    const y = this.top + i * this.height;
    scrollTo(0, Math.max(y + this.height + EDGE - innerHeight, Math.min(scrollY, y - EDGE)));
    this.moved = true;
    this.paint();
    this.rows.get(this.ids[i])?.node.focus({ preventScroll: true });
  }
}
