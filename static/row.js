// One job as a row of the list. describe() is pure and says what is to be said of a job; Row writes only what differs,
// so that ten updates a second cost little and a focused button stays focused.

import { act, can, fetchable, menuItems, pending, toggle } from "./actions.js";
import { Spark, announce, button, el, icon, openMenu, setAttr, setText, swapIcon } from "./dom.js";
import { fraction, isFinal, isTransfer } from "./store.js";
import { format, words } from "./words.js";

const AWAY_MS = 3000;
const STILL_MS = 4000;

const SIGNS = {
  running: "play", pausing: "pause", paused: "pause", scheduled: "clock", cancelling: "stop", cancelled: "stop",
  succeeded: "check", failed: "cross", away: "clock", stalled: "clock",
};
const LOOKS = { pausing: "paused", scheduled: "queued", cancelling: "queued", cancelled: "still", succeeded: "done" };
const KIND_ICONS = { upload: "up", download: "down", export: "down" };

export function who(by, me) {
  const { actor = "", via = "system" } = by ?? {};
  if (actor === me || actor.startsWith(`${me}.`)) return words.by.you;
  if (via === "system") return words.by.server;
  if (via === "ws") return words.by.browser;
  return actor === "local" || !actor ? words.by.api : words.by.who(actor);
}

const quietSince = (row) => Math.max(row.movedAt, row.toldAt);

function failure({ error, rollback }) {
  return [error?.detail ?? error?.title, rollback && words.undone(rollback), words.next[error?.code] ?? error?.next].filter(Boolean).join(" ");
}

function waits(row, app) {
  const { why, position } = row.waiting ?? {};
  const at = format.time(row.not_before ?? row.created_at);
  if (why === "after") return words.waits.after;
  if (why === "time") return words.waits.time(at);
  if (why === "backoff") return words.waits.backoff(at, row.attempt);
  const { running, queued, slots } = app.store.now ?? {};
  // The place changes with every other job, and so is asked for.
  if (app.channel.state === "live") app.store.recheck(row, `${running} ${queued}`);
  return words.waits.slot(running, slots, position);
}

function result({ progress, started_at: from, ended_at: to, result: made }) {
  const { bytes, digests = {} } = made?.data ?? {};
  return [from && words.took(progress.done || !bytes ? format.amount(progress.done, progress.unit) : format.bytes(bytes), format.duration(format.between(from, to))),
    ...Object.entries(digests).map((pair) => format.digest(...pair))].filter(Boolean).join(" · ");
}

function running(row, app, said) {
  const { progress: { phase, message, eta_s: eta, rate_per_s: rate, unit }, transfer } = row;
  const quiet = performance.now() - quietSince(row);
  // An upload whose sender has gone: said only once it has been gone for a while.
  if (row.kind === "upload" && quiet > AWAY_MS && !["waiting", "joining", "checking", "publishing"].includes(phase)) {
    if (app.channel.state === "live") app.store.recheck(row, quietSince(row));
    if (transfer?.connected === false) {
      const choose = app.uploads.printOf(row) && !app.uploads.of(row);
      const how = choose ? "mine" : app.uploads.of(row) ? "here" : "other";
      return { ...said, look: "away", state: "away", choose, sub: words.away[how](format.bytes(transfer.stored_bytes)) };
    }
  }
  const still = isTransfer(row) && quiet > STILL_MS;
  if (still && transfer?.stalled_since) return { ...said, look: "stalled", state: "stalled", sub: words.stalled(format.time(transfer.stalled_since)) };
  return { ...said, sub: [words.phase[phase] ?? phase, message].filter(Boolean).join(": "),
    left: still ? "" : format.left(eta) || words.unknown, rate: still ? "" : format.rate(rate, unit) };
}

// look: running, paused, failed, queued, done, still, away or stalled; bar: 0 to 1, null for unknown,
// undefined for none.
function describe(row, app) {
  const { progress: { done, total, unit }, state, rollback, by } = row;
  const part = fraction(row);
  const final = isFinal(row);
  const said = { state, look: LOOKS[state] ?? state, bar: final ? undefined : part, big: part === null || (final && !part) ? "" : format.percent(part),
    small: final ? format.time(row.ended_at) : format.pair(done, total, unit), rate: "", left: "", sub: "" };
  if (state === "running") return running(row, app, said);
  if (said.look === "queued" && state !== "cancelling") {
    said.sub = waits(row, app);
    if (!done) Object.assign(said, { bar: undefined, big: "", small: total === null ? "" : said.small });
  } else if (state === "paused") said.sub = by ? words.paused(who(by, app.me), format.time(by.at)) : "";
  else if (state === "cancelling") said.sub = rollback ? words.undoing(rollback) : "";
  else if (state === "failed" || (state === "cancelled" && row.reason === "after")) said.sub = failure(row);
  else if (state === "cancelled") {
    said.sub = [row.reason === "expired" ? words.expired : words.cancelled(who(by, app.me)), rollback ? words.undone(rollback) : row.kind === "upload" ? words.gone : ""].join(" ");
  } else if (final) said.sub = result(row);
  return said;
}

export class Row {
  constructor(app, row, pick) {
    this.app = app;
    this.id = row.id;
    const nameId = `n${row.id}`;
    const text = (tag, name) => (this[name] = el(tag, { class: name }));
    this.pick = el("input", { type: "checkbox", onclick: (event) => pick(this.id, event.shiftKey) });
    this.name = el("a", { class: "name", id: nameId, href: `#job=${row.id}` });
    this.fill = el("div", { class: "fill" });
    this.track = el("div", { class: "track", role: "progressbar", "aria-labelledby": nameId, "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.spark = new Spark();
    this.word = el("span");
    this.state = el("span", { class: "state" }, this.word);
    this.main = button("", () => this.act(this.op));
    this.link = el("a", { class: "textual", download: "" }, words.act.download);
    this.cancel = button(icon("cross"), () => this.act("cancel"), { class: "cancel" });
    this.more = button(icon("more"), () => openMenu(this.more, menuItems(app, this.row)), { "aria-haspopup": "menu", "aria-expanded": "false" });
    this.node = el("li", { "data-job": row.id, tabindex: "-1", "aria-labelledby": nameId },
      el("label", { class: "kind" }, this.pick, icon(KIND_ICONS[row.kind] ?? "gear")),
      el("div", { class: "what" }, this.name, this.track, text("div", "sub")),
      this.spark.node,
      el("div", { class: "num much" }, text("b", "big"), " ", text("small", "small")),
      el("div", { class: "num pace" }, text("b", "rate"), " ", text("small", "left"), this.state),
      el("div", { class: "acts" }, this.main, this.link, this.cancel, this.more));
  }

  get row() {
    return this.app.store.rows.get(this.id);
  }

  act(op) {
    act(this.app, [this.row], op);
  }

  update(picked) {
    const { row, app } = this;
    if (!row) return;
    const said = describe(row, app);
    setAttr(this.node, "class", picked ? `${said.look} picked` : said.look);
    setAttr(this.node, "data-state", row.state);
    this.pick.checked = picked;
    if (this.name.textContent !== row.name) {
      this.name.textContent = this.name.title = row.name;
      this.pick.ariaLabel = words.of(words.select, row.name);
      this.more.ariaLabel = words.of(words.act.more, row.name);
      this.link.ariaLabel = words.of(words.act.download, row.name);
    }
    // Texts that come to stand elsewhere, because others come or go, are laid out as new ones.
    const shape = [said.state, said.bar === undefined, !said.big, !said.rate].join();
    if (this.shape && this.shape !== shape) for (const node of [this.sub, this.big.parentNode, this.rate.parentNode]) node.replaceWith(node);
    this.shape = shape;
    for (const key of ["sub", "big", "small", "rate", "left"]) setText(this[key], said[key]);
    setAttr(this.sub, "title", said.sub);
    this.state.classList.toggle("hush", Boolean(said.rate));
    setText(this.word, words.state[said.state]);
    swapIcon(this.state, SIGNS[said.state] ?? "circle");
    if (said.look === "running") this.spark.set(row.rates);
    this.bar(said);
    this.buttons(row, said);
  }

  bar({ bar, big, small, state, left }) {
    const { track, fill } = this;
    track.hidden = bar === undefined;
    if (track.hidden) return;
    track.classList.toggle("unknown", bar === null);
    setAttr(track, "aria-valuenow", bar === null ? null : Math.floor(bar * 100));
    setAttr(track, "aria-valuetext", [big || small, words.state[state], left].filter(Boolean).join(", "));
    const at = bar === null ? "" : `translateX(${((bar - 1) * 100).toFixed(2)}%)`;
    if (fill.at !== at) fill.style.transform = fill.at = at;
  }

  buttons(row, said) {
    const url = fetchable(row)?.url;
    const op = said.choose ? "choose" : can(row, "retry") && !url && row.state !== "succeeded" ? "retry" : toggle(row);
    const textual = op === "retry" || op === "choose";
    const busy = pending(row);
    const focused = this.node.contains(document.activeElement) && document.activeElement;
    this.op = op;
    this.main.hidden = !textual && !can(row, op);
    this.cancel.hidden = isFinal(row);
    this.link.hidden = !url;
    if (url) this.link.href = url;
    const stopping = busy === "cancel" || row.state === "cancelling";
    const label = (busy !== "cancel" && words.doing[busy]) || words.act[op];
    const face = textual ? label : op === "resume" ? "play" : "pause";
    if (this.face !== face) {
      this.main.replaceChildren(textual ? face : icon(face));
      if (focused !== this.main) this.main.replaceWith(this.main);
    }
    this.face = face;
    this.main.className = textual ? "textual" : "";
    for (const [node, name, mine] of [[this.main, label, busy && !stopping], [this.cancel, stopping ? words.state.cancelling : words.act.cancel, busy && stopping]]) {
      setAttr(node, "aria-label", words.of(name, row.name));
      setAttr(node, "title", name);
      setAttr(node, "aria-disabled", (busy || (stopping && node === this.cancel)) && "true");
      node.classList.toggle("busy", Boolean(mine));
    }
    if (focused?.hidden) this.node.focus();
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
