// What this page knows of the jobs: rows by id and newest first; counts and numbers are the server's.
// A row is replaced by one that is not older, from wherever it comes. Progress counts for the version it names,
// and done only grows. Numbers (h) fall from page to page, so each page tells which older rows are gone.

import { words } from "./words.js";

const FINAL = new Set(["succeeded", "failed", "cancelled"]);
const MOST = 10000;
const FOUND = 500; // by one search
const SAMPLES = 60;
const STILL_MS = 5000;
const GAP_MS = 5000; // without a number; then a line begins anew

export const isFinal = (row) => FINAL.has(row.state);
export const isTransfer = (row) => row.kind === "upload" || row.kind === "download";

// What the server says over REST; throws its problem.
export async function json(url, options) {
  const answer = await fetch(url, { cache: "no-store", ...options });
  const said = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.detail), said);
  return said;
}

// Why something did not work, in words.
export const reason = (error) => (error instanceof TypeError ? words.offline : [error.message, error.next].filter(Boolean).join(" ") || words.offline);

export class Store {
  rows = new Map();
  sorted = [];
  counts = {};
  now = null;
  ready = false;
  complete = false;
  cursor = null; // of the page behind the oldest one
  wanted = null; // if it is to come by itself
  fresh = new Set(); // ids named since the snapshot began
  gone = new Set(); // ids of the deleted: REST may still name them
  away = null; // {state: n} of what ends meanwhile
  flow = { in: [], out: [] }; // bytes a second, of the last minute
  listeners = new Set();

  // listen({rows: Set of ids | null for all, counts, now, event})
  listen(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  tell(change) {
    for (const listener of this.listeners) listener(change);
  }

  get total() {
    return Object.values(this.counts).reduce((sum, n) => sum + n, 0);
  }

  // Returns the cursor of the page that is wanted next.
  frame(frame, first) {
    const { t } = frame;
    if (t === "ev") this.event(frame);
    else if (t === "p") this.progress(frame);
    else if (t === "counts") {
      this.counts = frame.n;
      this.tell({ counts: true });
    } else if (t === "now") {
      this.now = frame;
      this.sample();
      this.tell({ now: true });
    } else {
      if (t === "snap") this.snapshot(frame, first);
      this.tell({ rows: null, counts: true });
    }
    return this.wanted;
  }

  snapshot({ epoch, jobs, counts, last, cursor }, first) {
    if (first) {
      const newest = this.ready ? this.sorted[0]?.h ?? 0 : Infinity;
      Object.assign(this, { newest, before: this.rows, fresh: new Set() });
      // In another log numbers may have been given again.
      if (epoch !== this.epoch) Object.assign(this, { epoch, rows: new Map(), sorted: [], gone: new Set() });
    }
    for (const row of jobs) this.enter(row);
    const wanted = this.fresh.size < MOST ? cursor : null;
    Object.assign(this, { counts, cursor, wanted, complete: last, ready: true });
    this.sorted = this.sorted.filter((row) => row.h < wanted || this.fresh.has(row.id) || !this.rows.delete(row.id));
  }

  event(frame) {
    const { row } = frame;
    const old = this.rows.get(row.id);
    if (frame.to === "deleted") {
      this.gone.add(row.id);
      if (this.rows.delete(row.id)) this.sorted.splice(this.place(row.h), 1);
    } else if (row.version <= old?.version || !this.enter(row, true)) return;
    this.tell({ rows: new Set([row.id]), event: frame });
  }

  // Where a job of that number is, or would be.
  place(h) {
    let [low, high] = [0, this.sorted.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.sorted[middle].h > h) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Take a row unless a newer one is here. news: it comes with an event.
  enter(row, news = false) {
    const old = this.rows.get(row.id);
    if (this.gone.has(row.id)) return false;
    this.fresh.add(row.id);
    if (row.version < old?.version) return false;
    const known = old ?? this.before?.get(row.id);
    if (this.away && isFinal(row) && (news || (known ? !isFinal(known) : row.h > this.newest))) {
      this.away[row.state] = (this.away[row.state] ?? 0) + 1;
    }
    if (!isFinal(row) && row.progress.done < old?.progress.done) row.progress.done = old.progress.done;
    Object.assign(row, { toldAt: performance.now(), movedAt: old?.movedAt ?? 0, rates: old?.rates ?? [] });
    this.rows.set(row.id, row);
    this.sorted.splice(this.place(row.h), old ? 1 : 0, row);
    return true;
  }

  put({ params, ...row }) {
    if (this.enter(row)) this.tell({ rows: null });
  }

  // Bring older rows that match. The newest search wins.
  async search({ state = [], kind = [], q = "" }) {
    const mine = this.searching = {};
    let after = this.cursor;
    for (let found = 0; after && found < FOUND;) {
      const query = [["limit", 100], ["after", after], ...state.map((one) => ["state", one]), ...kind.map((one) => ["kind", one])];
      if (q) query.push(["q", q.slice(0, 200)]);
      const page = await json(`/v1/jobs?${new URLSearchParams(query)}`).catch(() => null);
      if (!page || this.searching !== mine) return;
      for (const row of page.items) this.put(row);
      found += page.items.length;
      after = page.next;
    }
  }

  progress(frame) {
    const changed = new Set();
    for (const [h, version, done, rate_per_s, eta_s, total, phase, message] of frame.u) {
      const row = this.sorted[this.place(h)];
      if (row?.h !== h || row.version !== version) continue;
      const { progress } = row;
      if (done > progress.done) row.movedAt = performance.now();
      Object.assign(progress, { done: Math.max(done, progress.done), rate_per_s, eta_s, phase, message, total: total ?? progress.total });
      changed.add(row.id);
    }
    if (changed.size) this.tell({ rows: changed });
  }

  sample() {
    const at = performance.now();
    for (const [name, values] of Object.entries(this.flow)) {
      if (at - this.sampledAt > GAP_MS) values.length = 0;
      if (values.push(this.now[`${name}_bytes_per_s`]) > SAMPLES) values.shift();
    }
    this.sampledAt = at;
    const since = at - STILL_MS;
    for (const { state, rates, progress, movedAt, toldAt } of this.sorted) {
      if (state === "running" && rates.push((Math.max(movedAt, toldAt) > since && progress.rate_per_s) || 0) > SAMPLES) rates.shift();
    }
  }

  // Ask, once for each sign, what no event tells: the place in the queue; whether an upload has a sender.
  async recheck(row, sign) {
    if (row.rechecked === sign) return;
    row.rechecked = sign;
    try {
      const told = await json(`/v1/jobs/${row.id}`);
      if (told.version !== row.version) return;
      row.progress.done = Math.max(row.progress.done, told.progress.done);
      Object.assign(row, { transfer: told.transfer, waiting: told.waiting });
      this.tell({ rows: new Set([row.id]) });
    } catch {
      row.rechecked = null;
    }
  }
}

// How much of it is done, 0 to 1; null if nobody knows.
export function fraction({ state, progress: { done, total } }) {
  if (state === "succeeded") return 1;
  return total > 0 ? Math.min(1, done / total) : total === 0 ? 0 : null;
}
