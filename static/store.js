// What this page knows of the jobs: rows by id, counts and numbers as the server tells them.
//
// Strategy. A row is replaced whole by any row of a higher version, from wherever it comes, so
// duplicates and overlaps of snapshot and events do no harm. Progress comes under the job's number h and
// is dropped if it is of another version. A bar never goes back while its job is unfinished: done only
// grows. Counts are the server's, never counted here, because not all rows need be loaded. Pages of a
// snapshot are fetched on demand, and as many again after a reset.

const FINAL = new Set(["succeeded", "failed", "cancelled"]);
export const isFinal = (row) => FINAL.has(row.state);
export const isTransfer = (row) => row.kind === "upload" || row.kind === "download";

export class Store {
  constructor() {
    this.rows = new Map();
    this.byNumber = new Map();
    this.counts = {};
    this.cursor = null; // of the next page; null: all are here
    this.paging = false;
    this.pages = 1;
    this.now = null;
    this.ready = false;
    this.epoch = null;
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

  get sorted() {
    this.order ??= [...this.rows.values()].sort((a, b) => b.h - a.h);
    return this.order;
  }

  // first: of a snap, whether it begins a list rather than goes on with it.
  frame(frame, first) {
    switch (frame.t) {
      case "snap": return this.snapshot(frame, first);
      case "ack": return this.resumed();
      case "ev": return this.event(frame);
      case "p": return this.progress(frame);
      case "counts":
        this.counts = frame.n;
        return this.tell({ counts: true });
      case "now":
        this.now = frame;
        return this.tell({ now: true });
      default: return undefined;
    }
  }

  snapshot(frame, first) {
    this.paging = false;
    this.counts = frame.counts;
    if (first) {
      const before = frame.epoch === this.epoch ? this.rows : new Map();
      this.epoch = frame.epoch;
      this.rows = new Map();
      this.order = null;
      this.byNumber.clear();
      this.wanted = this.ready ? this.pages : 1;
      this.pages = 1;
      for (const row of frame.jobs) this.put(row, before.get(row.id));
    } else {
      this.pages += 1;
      for (const row of frame.jobs) this.put(row, this.rows.get(row.id));
    }
    this.cursor = frame.last ? null : frame.cursor;
    this.ready = true;
    this.tell({ rows: null, counts: true });
    if (this.pages < this.wanted) this.more?.();
  }

  // A page that was asked for before does not come any more: whoever wants one asks again.
  resumed() {
    this.paging = false;
    this.tell({ rows: null });
    if (this.pages < this.wanted) this.more?.();
  }

  event(frame) {
    const old = this.rows.get(frame.row.id);
    if (frame.to === "deleted") {
      this.rows.delete(frame.row.id);
      this.byNumber.delete(frame.row.h);
      this.order = null;
    } else if (!this.put(frame.row, old)) return;
    this.tell({ rows: new Set([frame.row.id]), event: frame });
  }

  put(row, old) {
    if (old && this.rows.get(row.id) && row.version <= old.version) return false;
    if (old && !isFinal(row) && row.progress.done < old.progress.done) row.progress.done = old.progress.done;
    if (!old || !this.rows.has(row.id)) this.order = null;
    else if (this.order) this.order[this.order.indexOf(old)] = row;
    row.toldAt = performance.now();
    row.movedAt = old?.movedAt ?? 0;
    this.rows.set(row.id, row);
    this.byNumber.set(row.h, row.id);
    return true;
  }

  progress(frame) {
    const changed = new Set();
    for (const [h, version, done, rate, eta, total, phase, message] of frame.u) {
      const row = this.rows.get(this.byNumber.get(h));
      if (!row || row.version !== version) continue;
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

  // Ask once about an upload that has gone quiet: no event tells that a request has ended between two
  // blocks, nor what the last progress of a short one was.
  async recheck(row) {
    const quietSince = Math.max(row.movedAt, row.toldAt);
    if (row.rechecked === quietSince) return;
    row.rechecked = quietSince;
    try {
      const told = await (await fetch(`/v1/jobs/${row.id}`, { cache: "no-store" })).json();
      if (told.version !== row.version) return;
      row.progress.done = Math.max(row.progress.done, told.progress.done);
      row.transfer = told.transfer;
      this.tell({ rows: new Set([row.id]) });
    } catch {
      row.rechecked = null; // asked again at the next beat
    }
  }

  // Ask for the next page; false if there is none.
  nextPage(channel) {
    if (this.cursor === null || this.paging) return false;
    this.paging = true;
    channel.more(this.cursor);
    return true;
  }
}

// How much of it is done, 0 to 1; null if nobody knows.
export function fraction(row) {
  const { done, total } = row.progress;
  if (row.state === "succeeded") return 1;
  if (total === null || total === undefined) return null;
  return total > 0 ? Math.min(1, done / total) : 0;
}
