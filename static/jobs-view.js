// The view of jobs: numbers of now, drop zone, filter, selection and the list of everything.
//
// Strategy. What is asked for is in the address: state, kind, text, order. The list is as high as all of
// its rows, which are all of one height, and only those in sight exist. The store says which ids have
// changed; they are written in one animation frame. What is shown, and in which order, is settled anew only
// while nobody would be disturbed: not while the pointer is over the list, nor when it is scrolled.
// Until then rows stay where they are, and a button tells of new ones.

import { act, actMany, can, gone, toggle } from "./actions.js";
import { Spark, button, el, icon, openMenu, setAttr, setText } from "./dom.js";
import { Row } from "./row.js";
import { fraction, isFinal } from "./store.js";
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
const ended = (row) => Date.parse(row.ended_at ?? row.created_at);
const ORDERS = {
  new: null,
  old: (a, b) => a.h - b.h,
  name: (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : b.h - a.h),
  progress: (a, b) => (fraction(b) ?? -1) - (fraction(a) ?? -1) || b.h - a.h,
  rate: (a, b) => (b.progress.rate_per_s ?? 0) - (a.progress.rate_per_s ?? 0) || b.h - a.h,
  ended: (a, b) => ended(b) - ended(a) || b.h - a.h,
};
const OPS = ["pause", "resume", "cancel", "retry", "delete"];
const SAMPLES = 60;
const BEYOND = 6; // rows that exist above and below those in sight
const SORT_MS = 1000;
const EDGE = 80; // pixels: scrolled further, the list stands
const TYPING_MS = 200;
const EXPECT_MS = 2000;

class Tiles {
  constructor() {
    const tile = (label, ...rest) => el("div", { class: "tile" }, el("span", {}, label), ...rest);
    const b = () => el("b", {}, "–");
    [this.in, this.out, this.free] = [b(), b(), b()];
    [this.running, this.slots, this.waiting, this.stored] = [el("span", {}, "–"), el("small"), el("span"), el("span")];
    this.sparks = [new Spark(SAMPLES), new Spark(SAMPLES)];
    this.values = [[], []];
    this.node = el("section", { class: "flow", "aria-label": words.now.label },
      tile(words.now.in, this.in, this.sparks[0].node),
      tile(words.now.out, this.out, this.sparks[1].node),
      tile(words.now.running, el("b", {}, this.running, " ", this.slots), this.waiting),
      tile(words.now.free, this.free, this.stored));
  }

  show(now, counts) {
    [[this.in, now.in_bytes_per_s], [this.out, now.out_bytes_per_s]].forEach(([node, value], i) => {
      setText(node, format.rate(value, "bytes"));
      this.values[i] = [...this.values[i], value].slice(-SAMPLES);
      this.sparks[i].set(this.values[i]);
    });
    setText(this.slots, words.now.slots(now.slots));
    setText(this.running, format.count(now.running));
    setText(this.free, format.bytes(now.free_bytes));
    setText(this.stored, words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)));
    setText(this.waiting, words.now.waiting(format.count(counts.paused ?? 0), format.count((counts.queued ?? 0) + (counts.scheduled ?? 0))));
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
    this.group = "all";
    this.q = this.only = "";
    this.order = "new";
    this.tiles = new Tiles();
    this.chips = Object.keys(GROUPS).map((group) => {
      const number = el("span");
      return { group, number, node: button([words.filters[group], " ", number], () => this.ask({ group }), { class: "chip", "data-group": group }) };
    });
    const choice = (label, options, key) => el("select", { "aria-label": label, onchange: (event) => this.ask({ [key]: event.target.value }) },
      options.map(([value, text]) => el("option", { value }, text)));
    this.kind = choice(words.kindLabel, [["", words.allKinds]], "only");
    this.sort = choice(words.sortLabel, Object.entries(words.sorts), "order");
    this.search = el("input", { type: "search", placeholder: matchMedia("(pointer: coarse)").matches ? words.search : words.searchHint,
      "aria-label": words.search, autocomplete: "off", spellcheck: "false", oninput: () => this.ask({ q: this.search.value.trim() }) });
    this.all = el("input", { type: "checkbox", "aria-label": words.many.all, onchange: () => this.pickAll(this.all.checked) });
    this.many = el("span", { class: "many-text" });
    this.acts = OPS.map((op) => button(words.act[op], () => this.command(op), { "data-op": op, class: op === "delete" ? "danger" : null }));
    this.new = button("", () => { scrollTo(0, 0); this.settle(true); }, { class: "fresh", hidden: true });
    this.list = el("ul", { class: "jobs", "aria-label": words.jobsLabel,
      onpointerenter: (event) => { this.over = event.pointerType === "mouse"; },
      onpointerleave: () => { this.over = false; this.unsettled = this.held; this.plan(); },
      onclick: (event) => this.clicked(event) });
    this.end = el("p", { class: "end" });
    this.nothing = el("div", { class: "nothing", hidden: true }, el("p", {}, words.nothing),
      button(words.clear, () => { this.search.value = ""; this.ask({ group: "all", q: "", only: "" }); }));
    const entry = (label) => [button(label, () => app.choose(), { class: "primary" }), button(words.drop.process, () => app.go("processes"))];
    this.drop = el("div", { class: "drop", hidden: true }, icon("drop"),
      el("span", { class: "drop-text" }, el("strong", {}, words.drop.bold), words.drop.rest),
      el("span", { class: "drop-acts" }, entry(words.drop.upload), button(icon("more"), (event) => openMenu(event.currentTarget,
        [{ label: words.drop.files, run: () => app.choose() }, { label: words.drop.folder, run: () => app.choose({ folder: true }) }]),
      { "aria-label": words.drop.more, "aria-haspopup": "menu", "aria-expanded": "false", class: "quiet" })));
    this.empty = el("div", { class: "empty", hidden: true }, icon("drop"),
      el("h2", {}, words.empty.title), el("p", {}, words.empty.text), el("div", { class: "empty-acts" }, entry(words.empty.choose)),
      el("p", { class: "curl" }, words.empty.curl, " ", el("code", {}, `curl -F file=@movie.mkv ${location.origin}/upload`)));
    this.bar = el("div", { class: "bar", hidden: true },
      el("div", { class: "chips", role: "group", "aria-label": words.filterLabel }, this.chips.map((chip) => chip.node)),
      el("div", { class: "finds" }, this.kind, this.sort, this.search));
    this.picks = el("div", { class: "picks", hidden: true }, el("label", { class: "kind" }, this.all), this.many, el("span", { class: "many-acts" }, this.acts,
      button(words.many.clear, () => this.pickAll(false), { class: "quiet" })), this.new);
    this.node = el("div", {}, el("h1", { class: "hush" }, words.views.jobs), this.tiles.node, this.drop, app.uploads.node, this.bar, this.picks, this.list, this.nothing, this.end, this.empty);
    addEventListener("scroll", () => {
      this.moved = true;
      this.unsettled ||= this.held && scrollY <= this.top - EDGE;
      this.plan();
    }, { passive: true });
    addEventListener("resize", () => this.measure());
    app.store.listen((change) => this.changed(change));
  }

  show(params) {
    this.group = params.get("state") in GROUPS ? params.get("state") : "all";
    this.only = params.get("kind") ?? "";
    this.q = params.get("q") ?? "";
    this.order = params.get("sort") in ORDERS ? params.get("sort") : "new";
    if (this.search.value.trim() !== this.q) this.search.value = this.q;
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
    Object.assign(this, change);
    const query = new URLSearchParams(Object.entries({ state: this.group === "all" ? "" : this.group, kind: this.only, q: this.q, sort: this.order === "new" ? "" : this.order }).filter(([, value]) => value));
    history.replaceState(null, "", `#jobs${query.size ? `?${query}` : ""}`);
    this.pickAll(false);
    this.filtered();
  }

  filtered() {
    for (const chip of this.chips) setAttr(chip.node, "aria-pressed", String(chip.group === this.group));
    this.sort.value = this.order;
    this.kindOptions();
    this.text = this.q.toLowerCase();
    this.settle(true);
    const { store } = this.app;
    clearTimeout(this.typing);
    if (this.filter && !store.complete) this.typing = setTimeout(() => store.search?.(this.filter), TYPING_MS);
  }

  // As the server takes it; null for everything.
  get filter() {
    const filter = { ...(GROUPS[this.group] ? { state: GROUPS[this.group] } : {}), ...(this.only ? { kind: [this.only] } : {}), ...(this.q ? { q: this.q } : {}) };
    return Object.keys(filter).length ? filter : null;
  }

  kindOptions() {
    if (this.only) this.kinds.add(this.only);
    for (const kind of [...this.kinds].sort()) {
      if (![...this.kind.options].some((option) => option.value === kind)) this.kind.append(el("option", { value: kind }, words.kinds[kind] ?? kind));
    }
    this.kind.value = this.only;
  }

  changed({ rows, counts, now, event }) {
    const { store } = this.app;
    if (now) {
      this.tiles.show(store.now, store.counts);
      // Time passes in rows that nothing is said about: away, still, queued.
      for (const [id, row] of this.rows) if (["running", "queued"].includes(row.row?.state)) this.dirty.add(id);
    }
    if (counts) this.count();
    if (rows === null) this.unsettled = true;
    else for (const id of rows ?? []) this.dirty.add(id);
    if (event && (event.from !== event.to || event.cause === "renamed")) this.unsettled = true;
    if (event?.from === null && performance.now() < this.expected) this.settle(true);
    this.plan();
  }

  plan() {
    if (this.node.hidden) return;
    this.planned ??= requestAnimationFrame(() => {
      this.planned = null;
      if (this.unsettled || this.order === "progress" || this.order === "rate") this.settle(false);
      this.paint();
    });
  }

  count() {
    const { counts, ready } = this.app.store;
    const all = Object.values(counts).reduce((sum, n) => sum + n, 0);
    for (const { group, node, number } of this.chips) {
      const n = GROUPS[group] ? GROUPS[group].reduce((sum, state) => sum + (counts[state] ?? 0), 0) : all;
      setText(number, format.count(n));
      node.hidden = n === 0 && group !== "all" && group !== this.group;
    }
    // Before the first snapshot neither is shown: what is clicked must not vanish under the pointer.
    this.empty.hidden = !ready || all > 0;
    this.bar.hidden = this.picks.hidden = this.list.hidden = this.drop.hidden = !ready || all === 0;
  }

  matches(row) {
    const states = GROUPS[this.group];
    return !gone.has(row.id) && (!states || states.includes(row.state)) && (!this.only || row.kind === this.only)
      && (!this.text || row.name.toLowerCase().includes(this.text) || row.id === this.text);
  }

  // Settle what is listed; anew: also if that moves rows under the pointer, because it was asked for.
  settle(anew) {
    const { store } = this.app;
    if (!store.ready || (!anew && !this.unsettled && performance.now() - this.sortedAt < SORT_MS)) return;
    this.sortedAt = performance.now();
    const wanted = store.sorted.filter((row) => this.matches(row));
    if (ORDERS[this.order]) wanted.sort(ORDERS[this.order]);
    this.held = !anew && this.ids.length > 0 && (this.over || scrollY > this.top - EDGE || this.list.contains(document.querySelector("[aria-expanded=true]")));
    if (!this.held) {
      this.ids = wanted.map((row) => row.id);
      this.newest = store.sorted[0]?.h ?? 0;
    }
    const known = new Set(this.ids);
    const others = wanted.filter((row) => !known.has(row.id));
    // Held: those that are removed make room, older ones that were loaded go below, new ones wait.
    if (this.held) this.ids = [...this.ids.filter((id) => store.rows.has(id) && !gone.has(id)), ...others.filter((row) => row.h <= this.newest).map((row) => row.id)];
    this.fresh = others.filter((row) => row.h > this.newest).length;
    this.unsettled = false;
    for (const { kind } of wanted) this.kinds.add(kind);
    if (this.kinds.size >= this.kind.options.length) this.kindOptions();
    this.index = new Map(this.ids.map((id, i) => [id, i]));
    this.moved = true;
    this.nothing.hidden = this.ids.length > 0 || this.list.hidden || !store.complete;
    this.new.hidden = !this.fresh;
    setText(this.new, words.fresh(this.fresh));
    setText(this.end, store.complete ? "" : words.more);
    this.list.style.height = `${this.ids.length * this.height}px`;
    this.list.classList.toggle("bare", this.ids.length === 0);
    this.pickText();
    this.plan();
  }

  measure() {
    this.height = parseFloat(getComputedStyle(this.list).getPropertyValue("--row")) || 72;
    this.moved = true;
    this.list.style.height = `${this.ids.length * this.height}px`;
    this.plan();
  }

  // Make the rows in sight exist and say what is true.
  paint() {
    if (this.moved) {
      this.moved = false;
      this.top = this.list.getBoundingClientRect().top + scrollY;
      const from = Math.max(0, Math.floor((scrollY - this.top) / this.height) - BEYOND);
      const wanted = new Set(this.ids.slice(from, Math.max(0, Math.ceil((scrollY - this.top + innerHeight) / this.height)) + BEYOND));
      for (const [id, row] of this.rows) {
        if (wanted.has(id) || (this.index.has(id) && row.node.contains(document.activeElement))) continue;
        row.node.remove();
        this.rows.delete(id);
      }
      let before = this.list.firstElementChild;
      for (const id of wanted) {
        const row = this.rows.get(id) ?? new Row(this.app, this.app.store.rows.get(id), (...picked) => this.pick(...picked));
        this.rows.set(id, row);
        const i = this.index.get(id);
        row.update(this.picked.has(id));
        setAttr(row.node, "aria-posinset", i + 1);
        setAttr(row.node, "aria-setsize", this.ids.length);
        const y = `translateY(${i * this.height}px)`;
        if (row.y !== y) row.node.style.transform = row.y = y;
        while (before && !wanted.has(before.dataset.job)) before = before.nextElementSibling;
        if (row.node === before) before = before.nextElementSibling;
        else this.list.insertBefore(row.node, before);
      }
    } else for (const id of this.dirty) this.rows.get(id)?.update(this.picked.has(id));
    this.dirty.clear();
  }

  // Selection: of ids; when all is ticked it is the filter itself, so that rows which are not loaded count.
  pick(id, range) {
    const on = !this.picked.has(id);
    const [a, b] = [this.index.get(range ? this.anchor : id) ?? this.index.get(id), this.index.get(id)].sort((x, y) => x - y);
    for (const one of this.ids.slice(a, b + 1)) if (on || range) this.picked.add(one); else this.picked.delete(one);
    this.anchor = id;
    this.all.checked = false;
    this.pickText();
  }

  pickAll(on) {
    this.picked = new Set(on ? this.ids : []);
    this.all.checked = on;
    this.pickText();
  }

  get number() {
    if (!this.all.checked || this.app.store.complete) return this.picked.size;
    const { counts } = this.app.store;
    return this.only || this.q ? this.picked.size : Object.keys(counts).reduce((sum, state) => sum + (!GROUPS[this.group] || GROUPS[this.group].includes(state) ? counts[state] : 0), 0);
  }

  pickText() {
    const n = this.number;
    this.picks.classList.toggle("on", n > 0);
    this.all.indeterminate = n > 0 && !this.all.checked;
    setText(this.many, n ? words.many.picked(format.count(n)) : words.many.all);
    const picked = this.pickedRows();
    this.acts.forEach((node, i) => { node.hidden = !picked.some((row) => can(row, OPS[i])); });
    this.moved = true;
    this.plan();
  }

  pickedRows() {
    return [...this.picked].map((id) => this.app.store.rows.get(id)).filter(Boolean);
  }

  command(op) {
    actMany(this.app, this.pickedRows(), op, this.all.checked && !this.app.store.complete ? this.filter ?? {} : null, this.number);
    if (op === "delete") this.pickAll(false);
  }

  clicked(event) {
    const id = event.target.closest("li")?.dataset.job;
    if (!id || event.target.closest("button, a, label") || !(event.ctrlKey || event.metaKey || event.shiftKey)) return;
    event.preventDefault();
    this.pick(id, event.shiftKey);
  }

  // Keys; true if it was one of ours. The row that has the focus is the one that is meant.
  key(event) {
    const { key } = event;
    const at = document.activeElement.closest?.(".jobs > li")?.dataset.job;
    const i = this.index?.get(at) ?? -1;
    const step = { j: 1, k: -1, J: 1, K: -1, ArrowDown: 1, ArrowUp: -1 }[key];
    if (step && (i >= 0 || key.length === 1)) {
      if (event.shiftKey && i >= 0 && !this.picked.has(at)) this.pick(at, false);
      this.focusRow(Math.min(this.ids.length - 1, Math.max(0, i + step)));
      if (event.shiftKey) this.pick(document.activeElement.dataset.job, true);
      return true;
    }
    const row = this.app.store.rows.get(at);
    const op = { p: row && toggle(row), c: "cancel", r: "retry", Delete: "delete" }[key];
    if (key === "/") this.search.focus();
    else if (key === "Escape" && this.picked.size) this.pickAll(false);
    else if (key === "a" && (event.ctrlKey || event.metaKey)) this.pickAll(true);
    else if (key in { p: 1, c: 1, r: 1, Delete: 1 } && this.picked.size) this.command(key === "p" && !this.pickedRows().some((one) => can(one, "pause")) ? "resume" : op ?? "pause");
    else if (op && row && can(row, op)) {
      if (op === "delete") this.focusRow(i < this.ids.length - 1 ? i + 1 : i - 1);
      act(this.app, row, op);
    } else if (key === "x" && row) this.pick(at, false);
    else if (key === "Enter" && row && document.activeElement.matches("li")) this.app.go(`job=${at}`);
    else if (key === "m" && row) this.rows.get(at).more.click();
    else return false;
    return true;
  }

  focusRow(i) {
    if (i < 0) return;
    const y = this.top + i * this.height;
    if (y < scrollY + 110) scrollTo(0, y - 110);
    else if (y + this.height > scrollY + innerHeight - 80) scrollTo(0, y + this.height - innerHeight + 80);
    this.moved = true;
    this.paint();
    this.rows.get(this.ids[i])?.node.focus({ preventScroll: true });
  }

}
