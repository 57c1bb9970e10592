// One job as a row of the list.
//
// Strategy: describe() is pure and turns a job into what is said of it, here and on its own page: bar,
// numbers, state as word, sign and pattern, one sentence of reason. Row builds the elements once and writes
// only what differs, so that ten updates a second cost little and a focused button stays focused.

import { act, can, fetchable, menuItems, note, pending, toggle } from "./actions.js";
import { Spark, announce, button, el, icon, openMenu, setAttr, setText, swapIcon } from "./dom.js";
import { fraction, isFinal, isTransfer } from "./store.js";
import { format, words } from "./words.js";

const AWAY_MS = 3000;
const STILL_MS = 4000;

export const SIGNS = {
  running: "play", pausing: "pause", paused: "pause", queued: "circle", scheduled: "clock", cancelling: "stop",
  cancelled: "stop", succeeded: "check", failed: "cross", away: "clock", stalled: "clock",
};

const KIND_ICONS = { upload: "up", download: "down", export: "down" };
export const kindIcon = (row) => KIND_ICONS[row.kind] ?? "gear";

export function who(by, me) {
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
  if (app.channel.state === "live") app.store.recheck(row, Math.max(row.movedAt, row.toldAt));
  return row.transfer?.connected === false;
}

const stored = (row) => format.bytes(row.transfer?.stored_bytes ?? row.progress.done);

export function failure(row) {
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
      const place = row.waiting?.position;
      // The place changes with every other job, and so is asked for.
      if (app.channel.state === "live" && row.state === "queued") app.store.recheck(row, `${app.store.now?.running} ${app.store.now?.queued}`);
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
export function describe(row, app) {
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
    case "paused":
      return { ...said, look: "paused", sub: row.by ? words.paused(who(row.by, app.me), format.time(row.by.at)) : "" };
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
  if (row.transfer?.stalled_since && still) {
    return { ...said, look: "stalled", state: "stalled", sub: words.stalled(format.time(row.transfer.stalled_since)) };
  }
  const sub = [words.phase[progress.phase] ?? progress.phase, progress.message].filter(Boolean).join(": ");
  return { ...said, sub, left: still ? "" : format.left(progress.eta_s) || words.unknown, rate: still ? "" : format.rate(progress.rate_per_s, progress.unit) };
}

export class Row {
  constructor(app, row, pick) {
    this.app = app;
    this.id = row.id;
    const nameId = `n${row.id}`;
    this.pick = el("input", { type: "checkbox", onclick: (event) => pick(this.id, event.shiftKey) });
    this.name = el("a", { class: "name", id: nameId, href: `#job=${row.id}` });
    this.fill = el("div", { class: "fill" });
    this.track = el("div", { class: "track", role: "progressbar", "aria-labelledby": nameId, "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.sub = el("div", { class: "sub" });
    this.spark = new Spark();
    this.big = el("b");
    this.small = el("small");
    this.rate = el("b");
    this.left = el("small");
    this.word = el("span");
    this.state = el("span", { class: "state" }, icon("circle"), this.word);
    this.main = button(icon("pause"), () => this.act(this.op), { class: "main" });
    this.textual = button("", () => this.act(this.op), { class: "textual" });
    this.link = el("a", { class: "textual", download: "" }, words.act.download);
    this.cancel = button(icon("cross"), () => this.act("cancel"), { class: "cancel" });
    this.more = button(icon("more"), () => openMenu(this.more, menuItems(app, this.row)), { class: "more", "aria-haspopup": "menu", "aria-expanded": "false" });
    this.node = el("li", { "data-job": row.id, tabindex: "-1", "aria-labelledby": nameId },
      el("label", { class: "kind" }, this.pick, icon(kindIcon(row))),
      el("div", { class: "what" }, this.name, this.track, this.sub),
      this.spark.node,
      el("div", { class: "num much" }, this.big, " ", this.small),
      el("div", { class: "num pace" }, this.rate, " ", this.left, this.state),
      el("div", { class: "acts" }, this.main, this.textual, this.link, this.cancel, this.more));
  }

  get row() {
    return this.app.store.rows.get(this.id);
  }

  act(op) {
    if (!pending(this.row)) act(this.app, this.row, op);
  }

  update(picked) {
    const { row, app } = this;
    if (!row) return;
    const said = describe(row, app);
    setAttr(this.node, "class", picked ? `${said.look} picked` : said.look);
    setAttr(this.node, "data-state", row.state);
    this.pick.checked = picked;
    if (this.name.textContent !== row.name) {
      this.name.textContent = row.name;
      setAttr(this.name, "title", row.name);
      setAttr(this.pick, "aria-label", words.of(words.select, row.name));
      setAttr(this.more, "aria-label", words.of(words.act.more, row.name));
      setAttr(this.link, "aria-label", words.of(words.act.download, row.name));
    }
    paintBar(this.track, this.fill, said, row);
    const sub = note(row) ?? said.sub;
    setText(this.sub, sub);
    setAttr(this.sub, "title", sub);
    this.sub.hidden = !sub;
    setAttr(this.sub, "class", said.bad || note(row) ? "sub bad" : "sub");
    setText(this.big, said.big);
    setText(this.small, said.small);
    setText(this.rate, said.rate);
    setText(this.left, said.left);
    this.state.classList.toggle("hush", Boolean(said.rate));
    setText(this.word, words.state[said.state] ?? said.state);
    swapIcon(this.state, SIGNS[said.state] ?? "circle");
    if (said.look === "running" && row.rates?.length > 1) this.spark.set(row.rates);
    this.buttons(row, said);
  }

  buttons(row, said) {
    const final = isFinal(row);
    const url = fetchable(row)?.url;
    const op = said.choose ? "choose" : can(row, "retry") && !url && row.state !== "succeeded" ? "retry" : toggle(row);
    const textual = op === "retry" || op === "choose";
    const busy = pending(row);
    const focused = this.node.contains(document.activeElement) ? document.activeElement : null;
    this.op = op;
    this.main.hidden = textual || final || row.state === "cancelling";
    this.textual.hidden = !textual;
    this.cancel.hidden = final;
    this.link.hidden = !url;
    if (url) setAttr(this.link, "href", url);
    const label = busy && busy !== "cancel" ? words.doing[busy] ?? words.act[op] : words.act[op];
    if (textual) setText(this.textual, label);
    else swapIcon(this.main, op === "resume" ? "play" : "pause");
    const cancelling = busy === "cancel" || row.state === "cancelling";
    for (const [node, name] of [[this.main, label], [this.textual, label], [this.cancel, cancelling ? words.state.cancelling : words.act.cancel]]) {
      const mine = busy && (node === this.cancel) === (busy === "cancel");
      setAttr(node, "aria-label", words.of(name, row.name));
      setAttr(node, "title", name);
      setAttr(node, "aria-disabled", busy || (node === this.cancel && cancelling) ? "true" : null);
      node.classList.toggle("busy", Boolean(mine));
    }
    if (focused?.hidden) this.node.focus();
  }
}

// A bar with its text, as describe() says.
export function paintBar(track, fill, said, row) {
  track.hidden = said.bar === undefined;
  if (track.hidden) return;
  track.classList.toggle("unknown", said.bar === null);
  setAttr(track, "aria-valuenow", said.bar === null ? null : Math.floor(said.bar * 100));
  const at = said.bar === null ? "" : `translateX(${((said.bar - 1) * 100).toFixed(2)}%)`;
  if (fill.at !== at) fill.style.transform = fill.at = at;
  setAttr(track, "aria-valuetext", [said.big || said.small, words.state[said.state], said.left].filter(Boolean).join(", "));
}

export function sayEvent(frame) {
  const { row, from, to } = frame;
  if (from === null) announce(words.said.started(row.name));
  else if (to === "succeeded") announce(words.said.succeeded(row.name));
  else if (to === "failed") announce(words.said.failed(row.name, failure(row)));
  else if (to === "cancelled") announce(words.said.cancelled(row.name));
  else if (to === "paused" && from !== to) announce(words.said.paused(row.name));
}
