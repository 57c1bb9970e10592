// One job as a row of the list.
//
// Strategy: describe() is pure and turns a job into what its row says: bar, numbers, state as word, sign
// and pattern, one sentence of reason, and which actions make sense. Row builds the elements once and
// writes only what differs, so that ten updates a second of many rows cost little and a focused button
// stays focused.

import { announce, ask, copy, el, icon, openMenu, setAttr, setText, swapIcon } from "./dom.js";
import { fraction, isFinal, isTransfer } from "./store.js";
import { format, words } from "./words.js";

const AWAY_MS = 3000;
const STILL_MS = 4000;
const NOTE_MS = 10000;
const ACK_GRACE_MS = 3000;

const SIGNS = {
  running: "play", pausing: "pause", paused: "pause", queued: "circle", scheduled: "clock", cancelling: "stop",
  cancelled: "stop", succeeded: "check", failed: "cross", away: "clock",
};

const KIND_ICONS = { upload: "up", download: "down", export: "down" };

function who(by, me) {
  if (!by) return words.by.server;
  if (by.actor === me || by.actor.startsWith(`${me}.`)) return words.by.you;
  if (by.via === "system" || by.actor === "service" || by.actor === "system") return words.by.server;
  if (by.via === "ws") return words.by.browser;
  return by.actor === "local" || by.actor === "" ? words.by.api : words.by.who(by.actor);
}

// An upload whose sender has gone: said only once it has been gone for a while.
function isAway(row, app) {
  const busy = ["waiting", "joining", "checking", "publishing"].includes(row.progress.phase);
  if (row.kind !== "upload" || busy || performance.now() - Math.max(row.movedAt, row.toldAt) < AWAY_MS) return false;
  if (app.channel.state === "live") app.store.recheck(row);
  return row.transfer?.connected === false;
}

const stored = (row) => format.bytes(row.transfer?.stored_bytes ?? row.progress.done);

function failure(row) {
  const error = row.error ?? {};
  const next = words.next[error.code] ?? error.next ?? "";
  const undone = row.rollback ? words.undone(row.rollback.done, row.rollback.total) : "";
  return [error.detail ?? error.title ?? "", undone, next].filter(Boolean).join(" ");
}

function waits(row, app) {
  switch (row.waiting?.why) {
    case "after": return words.waits.after;
    case "time": return words.waits.time(format.time(row.not_before ?? row.created_at));
    case "backoff": return words.waits.backoff(format.time(row.not_before ?? row.created_at), row.attempt);
    default: {
      const reason = words.waits.slot(app.store.now?.running ?? 0, app.store.now?.slots ?? 0);
      const place = app.places.get(row.id) ?? row.waiting?.position;
      return place ? `${words.waits.place(place)} · ${reason.charAt(0).toLowerCase()}${reason.slice(1)}` : reason;
    }
  }
}

function result(row) {
  const { progress } = row;
  const parts = [];
  const shown = isTransfer(row) && progress.done === 0 && row.result?.data?.bytes ? row.result.data.bytes : progress.done;
  if (row.started_at && row.ended_at) {
    const took = format.between(row.started_at, row.ended_at);
    parts.push(words.took(format.amount(shown, progress.unit), format.duration(took)));
  }
  const digests = Object.entries(row.result?.data?.digests ?? {});
  for (const [name, hex] of digests.slice(0, 2)) {
    parts.push(`${name.toUpperCase().replace(/^SHA(\d)/, "SHA-$1")} ${hex.slice(0, 4)}…${hex.slice(-4)}`);
  }
  return parts.join(" · ");
}

// look: running, paused, failed, queued, done or still; bar: 0 to 1, null for unknown, undefined for none.
function describe(row, app) {
  const { progress, state } = row;
  const part = fraction(row);
  const pair = progress.total !== null && progress.total !== undefined
    ? format.pair(progress.done, progress.total, progress.unit)
    : words.soFar(format.amount(progress.done, progress.unit));
  const said = {
    look: "running", bar: part, big: part === null ? "" : format.percent(part), small: pair,
    rate: "", left: "", state, sub: "", bad: false,
  };
  switch (state) {
    case "running": return running(row, app, said);
    case "pausing": return { ...said, look: "paused" };
    case "paused": {
      const by = row.by ? words.paused(who(row.by, app.me), format.time(row.by.at)) : "";
      return { ...said, look: "paused", small: by || said.small };
    }
    case "queued":
    case "scheduled": {
      const begun = progress.done > 0;
      return { ...said, look: "queued", bar: begun ? part : undefined, big: begun ? said.big : "",
        small: progress.total === null && !begun ? "" : pair, sub: waits(row, app) };
    }
    case "cancelling": {
      const { rollback } = row;
      return { ...said, look: "queued", sub: rollback ? words.undoing(rollback.done, rollback.total) : "" };
    }
    case "failed":
      return { ...said, look: "failed", bar: undefined, big: part ? said.big : "", small: format.time(row.ended_at), sub: failure(row), bad: true };
    case "cancelled": {
      const asked = row.reason === "after" ? failure(row) : words.cancelled(who(row.by, app.me));
      const why = row.reason === "expired" ? words.expired : asked;
      const undone = row.rollback ? words.undone(row.rollback.done, row.rollback.total) : row.kind === "upload" ? words.gone : "";
      return { ...said, look: "still", bar: undefined, big: part ? said.big : "", small: format.time(row.ended_at), sub: `${why} ${undone}`.trim() };
    }
    default:
      return { ...said, look: "done", bar: undefined, small: format.time(row.ended_at), sub: result(row) };
  }
}

function running(row, app, said) {
  const { progress } = row;
  if (isAway(row, app)) {
    const mine = app.uploads.isMine(row);
    const here = app.uploads.of(row);
    const sub = here ? words.away.here : mine ? words.away.mine(stored(row)) : words.away.other(stored(row));
    return { ...said, look: "away", state: "away", sub, choose: mine && !here };
  }
  const still = isTransfer(row) && performance.now() - Math.max(row.movedAt, row.toldAt) > STILL_MS;
  if (row.transfer?.stalled_since && still) said.left = words.stalled(format.time(row.transfer.stalled_since));
  else if (!still) said.left = format.left(progress.eta_s) || progress.message || (words.phase[progress.phase] ?? progress.phase) || "";
  return { ...said, rate: still ? "" : format.rate(progress.rate_per_s, progress.unit) };
}

const curlQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

async function detailsOf(row) {
  const answer = await fetch(`/v1/jobs/${row.id}`, { cache: "no-store" });
  return answer.ok ? answer.json() : row;
}

function curlOf(job) {
  const at = location.origin;
  if (job.kind === "upload") return `curl -F file=@${curlQuote(job.name)} ${at}/upload`;
  if (isTransfer(job)) return `curl -OJ -H 'Content-Type: application/json' -d ${curlQuote(JSON.stringify({ filename: job.name }))} ${at}/export`;
  const body = JSON.stringify({ kind: job.kind, params: job.params ?? {}, name: job.name });
  return `curl -H 'Content-Type: application/json' -d ${curlQuote(body)} ${at}/v1/jobs`;
}

// What a job has left to be fetched: its result, else the first file that it made.
function fetchable(row) {
  if (row.state !== "succeeded") return null;
  const made = row.artifacts[0];
  const file = row.result?.file ?? made?.file;
  return file ? { url: `/v1/files/${file}/content`, name: row.result?.file ? row.name : made.name } : null;
}

export class Row {
  constructor(app, row) {
    this.app = app;
    this.id = row.id;
    this.pending = null;
    this.note = null;
    const nameId = `n${row.id}`;
    this.kind = el("span", { class: "kind" }, icon(KIND_ICONS[row.kind] ?? "gear"));
    this.name = el("div", { class: "name", id: nameId });
    this.fill = el("div", { class: "fill" });
    this.track = el("div", { class: "track", role: "progressbar", "aria-labelledby": nameId, "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.sub = el("div", { class: "sub" });
    this.big = el("b");
    this.small = el("small");
    this.rate = el("b");
    this.left = el("small");
    this.word = el("span");
    this.state = el("span", { class: "state" }, icon("circle"), this.word);
    this.main = el("button", { type: "button", class: "main", onclick: () => this.act(this.mainOp) }, icon("pause"));
    this.textual = el("button", { type: "button", class: "textual", onclick: () => this.act(this.mainOp) });
    this.link = el("a", { class: "textual", download: "" }, words.act.download);
    this.cancel = el("button", { type: "button", class: "cancel", onclick: () => this.act("cancel") }, icon("cross"));
    this.more = el("button", { type: "button", class: "more", "aria-haspopup": "menu", "aria-expanded": "false", onclick: () => this.menu() }, icon("more"));
    this.node = el("li", { "data-job": row.id },
      this.kind,
      el("div", { class: "what" }, this.name, this.track, this.sub),
      el("div", { class: "num much" }, this.big, " ", this.small),
      el("div", { class: "num pace" }, this.rate, " ", this.left, this.state),
      el("div", { class: "acts" }, this.main, this.textual, this.link, this.cancel, this.more));
    this.update();
  }

  get row() {
    return this.app.store.rows.get(this.id);
  }

  update() {
    const { row, app } = this;
    if (!row) return;
    if (this.pending && (row.version >= this.pending.version || performance.now() > this.pending.until)) this.pending = null;
    const said = describe(row, app);
    setAttr(this.node, "class", said.look);
    setAttr(this.node, "data-state", row.state);
    setText(this.name, row.name);
    setAttr(this.name, "title", row.name);
    this.bar(said, row);
    const sub = this.note ?? said.sub;
    setText(this.sub, sub);
    this.sub.hidden = !sub;
    setAttr(this.sub, "class", said.bad || this.note ? "sub bad" : "sub");
    setText(this.big, said.big);
    setText(this.small, said.small);
    setText(this.rate, said.rate);
    setText(this.left, said.left);
    this.state.classList.toggle("hush", Boolean(said.rate));
    setText(this.word, words.state[said.state] ?? said.state);
    swapIcon(this.state, SIGNS[said.state] ?? "circle");
    this.buttons(row, said);
  }

  bar(said, row) {
    const { track, fill } = this;
    track.hidden = said.bar === undefined;
    if (track.hidden) return;
    track.classList.toggle("unknown", said.bar === null);
    if (said.bar === null) {
      setAttr(track, "aria-valuenow", null);
      fill.style.removeProperty("transform");
    } else {
      setAttr(track, "aria-valuenow", Math.floor(said.bar * 100));
      const at = `translateX(${((said.bar - 1) * 100).toFixed(2)}%)`;
      if (this.at !== at) fill.style.setProperty("transform", at);
      this.at = at;
    }
    setAttr(track, "aria-valuetext", [said.big || said.small, words.state[row.state], said.left].filter(Boolean).join(", "));
  }

  buttons(row, said) {
    const final = isFinal(row);
    const found = fetchable(row);
    const url = found?.url;
    const retry = final && !url && !isTransfer(row) && row.state !== "succeeded";
    const op = retry ? "retry" : said.choose ? "choose" : ["paused", "pausing"].includes(row.state) ? "resume" : "pause";
    const textual = op === "retry" || op === "choose";
    const busy = this.pending?.op ?? null;
    const focused = this.node.contains(document.activeElement) ? document.activeElement : null;
    this.mainOp = op;
    this.main.hidden = textual || final || row.state === "cancelling";
    this.textual.hidden = !textual;
    this.cancel.hidden = final;
    this.link.hidden = !url;
    if (url) {
      setAttr(this.link, "href", url);
      setAttr(this.link, "download", found.name);
      setAttr(this.link, "aria-label", words.of(words.act.download, row.name));
    }
    const label = busy && busy !== "cancel" ? words.doing[busy] : words.act[op];
    if (textual) setText(this.textual, label);
    else swapIcon(this.main, op === "resume" ? "play" : "pause");
    for (const button of [this.main, this.textual]) setAttr(button, "aria-label", words.of(label ?? "", row.name));
    const cancelling = busy === "cancel" || row.state === "cancelling";
    setAttr(this.cancel, "aria-label", words.of(cancelling ? words.state.cancelling : words.act.cancel, row.name));
    setAttr(this.main, "title", label);
    setAttr(this.cancel, "title", words.act.cancel);
    setAttr(this.more, "aria-label", words.of(words.act.more, row.name));
    setAttr(this.more, "title", words.act.more);
    for (const button of [this.main, this.textual, this.cancel]) {
      setAttr(button, "aria-disabled", busy || (button === this.cancel && row.state === "cancelling") ? "true" : null);
      button.classList.toggle("busy", Boolean(busy) && (button === this.cancel) === (busy === "cancel"));
    }
    if (focused?.hidden) this.more.focus();
  }

  async act(op) {
    if (this.pending) return;
    if (op === "choose") {
      this.app.chooseFor(this.row);
      return;
    }
    this.note = null;
    this.pending = { op: op === "force" ? "cancel" : op, version: Infinity, until: Infinity };
    this.update();
    try {
      const ack = op === "force" ? await this.app.channel.command("cancel", this.id, { force: true })
        : await this.app.channel.command(op, this.id);
      if (op === "retry") announce(words.process.started(this.row.name));
      this.pending = { ...this.pending, version: op === "retry" ? 0 : ack.v ?? 0, until: performance.now() + ACK_GRACE_MS };
      setTimeout(() => this.update(), ACK_GRACE_MS + 50);
    } catch (error) {
      this.pending = null;
      const why = error.code === "offline" ? words.offline : error.message;
      this.note = words.refused(words.act[op] ?? op, why);
      announce(this.note);
      setTimeout(() => { this.note = null; this.update(); }, NOTE_MS);
    }
    this.update();
  }

  menu() {
    const { row } = this;
    const final = isFinal(row);
    const found = fetchable(row);
    const url = found?.url;
    const items = [];
    const add = (label, run, danger = false) => items.push({ label, run, danger });
    if (!final && row.state !== "cancelling") add(words.act[this.mainOp], () => this.act(this.mainOp));
    if (final && !isTransfer(row)) add(words.act.retry, () => this.act("retry"));
    if (url) add(words.act.link, () => copy(new URL(url, location.href).href));
    add(words.act.details, () => this.details());
    add(words.act.curl, async () => copy(curlOf(await detailsOf(row))));
    if (!final) {
      const force = row.state === "cancelling";
      add(force ? words.act.force : words.act.cancel, () => this.act(force ? "force" : "cancel"), true);
    } else add(words.act.delete, () => this.act("delete"), true);
    openMenu(this.more, items);
  }

  async details() {
    const text = JSON.stringify(await detailsOf(this.row), null, 2);
    const buttons = [
      { value: "copy", label: words.copyJson, run: () => copy(text) },
      { value: "", label: words.close, kind: "primary" },
    ];
    await ask(this.row?.name ?? "", el("pre", { tabindex: "0" }, text), buttons);
    if (this.more.isConnected) this.more.focus();
  }
}

export function sayEvent(frame) {
  const { row, from, to } = frame;
  if (from === null) announce(words.said.started(row.name));
  else if (to === "succeeded") announce(words.said.succeeded(row.name));
  else if (to === "failed") announce(words.said.failed(row.name, failure(row)));
  else if (to === "cancelled") announce(words.said.cancelled(row.name));
  else if (to === "paused" && from !== to) announce(words.said.paused(row.name));
}
