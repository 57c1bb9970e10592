// What this page knows of the jobs: rows by id and newest first, counts and numbers as the server tells them.
//
// Strategy. A row is replaced whole by any row of a higher version, from wherever it comes, so
// duplicates and overlaps of snapshot and events do no harm. Progress comes under the job's number h and
// is dropped if it is of another version. A bar never goes back while its job is unfinished: done only
// grows. Counts are the server's, never counted here, because not all rows need be here: pages of older
// ones come one after another, up to MOST. Numbers fall from page to page, so after a reset a page tells
// which of the rows that are shown are gone. Everything that finds a row by its number halves its way.

import { words } from "./words.js";

const FINAL = new Set(["succeeded", "failed", "cancelled"]);
const MOST = 10000;
const FOUND = 500; // by one search
const SAMPLES = 60;
const STILL_MS = 5000;

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
  constructor() {
    this.rows = new Map();
    this.sorted = []; // newest first
    this.counts = {};
    this.now = null;
    this.ready = false;
    this.complete = false; // all rows that the server has are here
    this.cursor = null; // of the page behind the oldest one
    this.wanted = null; // the cursor of the page that is to come next
    this.epoch = null;
    this.fresh = new Set(); // ids that this snapshot, or an event since, has named
    this.gone = new Set(); // ids that were deleted: what REST has said before must not bring them back
    this.away = null; // {state: n} of what ends while nobody looks, if that is wanted
    this.listeners = new Set();
  }

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

  // first: of a snap, whether it begins a list rather than goes on with it. Returns the cursor of the page
  // that is wanted next.
  frame(frame, first) {
    switch (frame.t) {
      case "snap": return this.snapshot(frame, first);
      case "ack": // what was missed has yet to come; a page that was asked for does not
        this.tell({ rows: null });
        return this.wanted;
      case "ev": return this.event(frame);
      case "p": return this.progress(frame);
      case "counts":
        this.counts = frame.n;
        return this.tell({ counts: true });
      case "now":
        this.now = frame;
        this.sample();
        return this.tell({ now: true });
      default: return undefined;
    }
  }

  snapshot({ epoch, jobs, counts, last, cursor }, first) {
    if (first) {
      this.newest = this.ready ? this.sorted[0]?.h ?? 0 : Infinity;
      this.before = this.rows;
      this.fresh = new Set();
      if (epoch !== this.epoch) { // numbers may have been given again
        this.rows = new Map();
        this.sorted = [];
        this.gone.clear();
      }
      this.epoch = epoch;
    }
    for (const row of jobs) this.enter(row);
    this.counts = counts;
    this.cursor = cursor;
    this.complete = last;
    this.wanted = this.fresh.size < MOST ? cursor : null;
    this.sorted = this.sorted.filter((row) =>
      row.h < (this.wanted ?? 0) || this.fresh.has(row.id) || !this.rows.delete(row.id));
    this.ready = true;
    this.tell({ rows: null, counts: true });
    return this.wanted;
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
    let low = 0;
    let high = this.sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.sorted[middle].h > h) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Take a row unless a newer one is here; whether it was taken. news: it comes with an event.
  enter(row, news = false) {
    const old = this.rows.get(row.id);
    if (this.gone.has(row.id)) return false;
    this.fresh.add(row.id);
    if (row.version < old?.version) return false;
    const known = old ?? this.before?.get(row.id);
    if (this.away && isFinal(row) && (news || (known ? !isFinal(known) : row.h > this.newest))) {
      this.away[row.state] = (this.away[row.state] ?? 0) + 1;
    }
    if (old && !isFinal(row) && row.progress.done < old.progress.done) row.progress.done = old.progress.done;
    row.toldAt = performance.now();
    row.movedAt = old?.movedAt ?? 0;
    row.rates = old?.rates ?? [];
    this.rows.set(row.id, row);
    this.sorted.splice(this.place(row.h), old ? 1 : 0, row);
    return true;
  }

  // A row that came over REST.
  put({ params, ...row }) {
    if (this.enter(row)) this.tell({ rows: null });
  }

  // Bring older rows that match, over REST, behind those that are here. The newest search wins.
  async search({ state = [], kind = [], q = "" }) {
    const mine = {};
    this.searching = mine;
    let after = this.cursor;
    let found = 0;
    while (after && found < FOUND) {
      const query = new URLSearchParams({ limit: 100, after });
      for (const one of state) query.append("state", one);
      for (const one of kind) query.append("kind", one);
      if (q) query.set("q", q.slice(0, 200));
      const answer = await fetch(`/v1/jobs?${query}`, { cache: "no-store" });
      if (!answer.ok || this.searching !== mine) return;
      const page = await answer.json();
      for (const { params, ...row } of page.items) this.enter(row);
      if (page.items.length) this.tell({ rows: null });
      found += page.items.length;
      after = page.next;
    }
  }

  progress(frame) {
    const changed = new Set();
    for (const [h, version, done, rate, eta, total, phase, message] of frame.u) {
      const row = this.sorted[this.place(h)];
      if (row?.h !== h || row.version !== version) continue;
      const progress = row.progress;
      if (done > progress.done) {
        row.movedAt = performance.now();
        progress.done = done;
      }
      Object.assign(progress, { rate_per_s: rate, eta_s: eta, phase, message });
      if (total !== null) progress.total = total;
      changed.add(row.id);
    }
    if (changed.size) this.tell({ rows: changed });
  }

  // Once a second: how fast each job is, for its line; one that stands still is told as that.
  sample() {
    const now = performance.now();
    for (const row of this.sorted) {
      if (row.state !== "running") continue;
      const moves = now - Math.max(row.movedAt, row.toldAt) < STILL_MS;
      if (row.rates.push(moves ? row.progress.rate_per_s ?? 0 : 0) > SAMPLES) row.rates.shift();
    }
  }

  // Ask, once for each sign, what no event tells: the place in the queue; whether an upload that has gone
  // quiet is connected, and what the last progress of a short one was.
  async recheck(row, sign) {
    if (row.rechecked === sign) return;
    row.rechecked = sign;
    try {
      const told = await (await fetch(`/v1/jobs/${row.id}`, { cache: "no-store" })).json();
      if (told.version !== row.version) return;
      row.progress.done = Math.max(row.progress.done, told.progress.done);
      Object.assign(row, { transfer: told.transfer, waiting: told.waiting });
      this.tell({ rows: new Set([row.id]) });
    } catch {
      row.rechecked = null; // asked again at the next beat
    }
  }
}

// How much of it is done, 0 to 1; null if nobody knows.
export function fraction(row) {
  const { done, total } = row.progress;
  if (row.state === "succeeded") return 1;
  if (total === null || total === undefined) return null;
  return total > 0 ? Math.min(1, done / total) : 0;
}
