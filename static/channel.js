// What one tab asks of the live channel, and how it misses nothing.
//
// Strategy. The cursor (epoch, s) of the last applied message is the truth about what this page has seen.
// An ev or mark is applied only if its p is that s; else something was lost, and the page subscribes again
// from its cursor. Until the ack it takes neither. The server then fills the gap, or sends a snapshot: its
// first page is what comes while there is no cursor. All other pages are asked for one at a time, so half
// a snapshot is a fine place to resume here. After every new connection of socket.js all subscriptions are
// said again. So are commands that were not answered, under the key by which the server knows them again.

import { serve } from "./socket.js";
import { words } from "./words.js";

const LIST = 1;
const AGAIN_MS = 1000;
const ACK_MS = 20000;
const GONE_MS = 5000; // the worker says something each second; else it has crashed with the tab that began it

const random = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

export class CommandError extends Error {
  constructor({ code, msg = "", next = "", field = null }) {
    super(msg);
    Object.assign(this, { code, next, field });
  }
}

export class Channel {
  // handlers: frame(frame, first) for snap, ev, p, counts, now, and the ack of a resumed subscription; it
  // returns the cursor of the page to be sent next, if any. status() whenever the state has changed.
  constructor(handlers) {
    this.handlers = handlers;
    this.state = "connecting"; // connecting, live, lost, ended
    this.code = null; // of the last close
    this.restarting = false;
    this.lostAt = null;
    this.retryAt = null;
    this.heardAt = performance.now(); // of the last frame
    this.rtt = null;
    this.epoch = null;
    this.s = null;
    this.goal = 0; // the newest event when the connection was made
    this.conn = null;
    this.asked = false; // a subscription is not answered yet
    this.last = LIST;
    this.logs = new Map();
    this.commands = new Map();
    addEventListener("online", () => this.post({ t: "net", online: true }));
    addEventListener("offline", () => this.post({ t: "net", online: false }));
    addEventListener("pagehide", () => this.post({ t: "leave" }));
    addEventListener("pageshow", (event) => { if (event.persisted) this.open(); });
    document.addEventListener("visibilitychange", () => {
      this.post({ t: "vis", vis: document.visibilityState });
      this.handlers.status();
    });
    setInterval(() => {
      if (performance.now() - this.toldAt > GONE_MS) this.open();
      this.handlers.status();
    }, 500);
  }

  open() {
    if (this.port) this.post({ t: "leave" });
    try {
      const worker = new SharedWorker(new URL("./socket.js", import.meta.url), { type: "module", name: "sluice-1" });
      worker.onerror = () => this.inPage(); // it knows no modules
      this.join(worker.port);
      const name = random();
      navigator.locks?.request(name, () => {
        this.post({ t: "lock", name });
        return new Promise(() => {}); // until this tab is gone
      });
    } catch {
      this.inPage();
    }
  }

  inPage() {
    const { port1, port2 } = new MessageChannel();
    serve(port2);
    this.join(port1);
  }

  join(port) {
    this.port = port;
    this.conn = null;
    this.toldAt = performance.now();
    port.onmessage = ({ data }) => { if (port === this.port) this.told(data); };
    this.post({ t: "join", vis: document.visibilityState });
  }

  post(message) {
    this.port.postMessage(message);
  }

  told({ base, status, frames }) {
    this.toldAt = performance.now();
    if (base) this.base = base;
    if (status) this.line(status);
    if (!frames) return;
    this.heardAt = performance.now();
    for (const frame of frames) this.hear(frame);
  }

  // The connection is in another state, or another one. This page is live once its list is.
  line({ state, conn, s, ...rest }) {
    const { lostAt } = this;
    Object.assign(this, rest);
    if (state !== "live") {
      this.state = state;
      this.conn = null;
    } else {
      this.lostAt = this.state === "live" ? null : lostAt;
      if (conn !== this.conn) {
        this.conn = conn;
        this.goal = s;
        this.subscribe();
        for (const id of this.logs.keys()) this.subscribeLog(id);
        for (const n of this.commands.keys()) this.say(n);
      }
    }
    this.handlers.status();
  }

  // How many events, of whomever, came while this page was away and are not here yet.
  get behind() {
    return Math.max(0, this.goal - (this.s ?? 0));
  }

  subscribe() {
    this.asked = true;
    const resume = this.s === null ? {} : { epoch: this.epoch, s: this.s };
    this.post({ t: "sub", id: this.base + LIST, f: {}, page: 200, ...resume });
  }

  hear(frame) {
    const id = frame.id - this.base; // of a subscription
    const n = Number(String(frame.id).split("c")[1]); // of a command
    switch (frame.t) {
      case "snap": return this.snap(frame);
      case "reset": return this.reset();
      case "ev":
      case "mark":
        return this.asked ? undefined : this.apply(frame);
      case "log": return this.log(id, frame);
      case "ack":
        return id === LIST ? this.answered(frame) : this.settle(n, (command) => command.resolve(frame));
      case "err":
        // That of a log is known by its silence: its job is gone.
        if (id === LIST) return setTimeout(() => this.subscribe(), AGAIN_MS);
        return this.settle(n, (command) => command.reject(new CommandError(frame)));
      case "hb":
        if (!this.asked && this.s !== null && frame.s > this.s) this.subscribe();
        return undefined;
      default: return this.handlers.frame(frame);
    }
  }

  answered(ack) {
    this.asked = false;
    if (ack.resumed) {
      this.synced();
      this.more(this.handlers.frame(ack));
    } else this.epoch = this.s = null; // a snapshot follows
  }

  // After the ack this says only why. One that comes unasked, because this page has read too slowly, is
  // answered by a subscription, so that no page of the list before is taken for one of the new.
  reset() {
    if (this.s === null) return;
    this.epoch = this.s = null;
    if (!this.asked) this.subscribe();
  }

  // A page's number does not tell whether it is the first: each subscription counts its own.
  snap(page) {
    const first = this.s === null;
    if (first) {
      if (this.asked) return;
      this.epoch = page.epoch;
      this.s = page.s;
      this.synced();
    }
    this.more(this.handlers.frame(page, first));
  }

  // Ask for a page. While a subscription is not answered this does nothing: the page might belong to a
  // list that a snapshot replaces.
  more(cursor) {
    if (!this.asked && this.s !== null && cursor) this.post({ t: "more", id: this.base + LIST, cursor });
  }

  apply(message) {
    if (message.p !== this.s) {
      this.subscribe();
      return;
    }
    this.s = message.s;
    if (message.t === "ev") this.handlers.frame(message);
  }

  synced() {
    if (this.state === "live") return;
    this.state = "live";
    this.lostAt = null;
    this.handlers.status();
  }

  retry() {
    this.post({ t: "retry" });
  }

  // Follow the log of a job, over all reconnects: fn(lines, from) is told the newest 1000, then all that come.
  follow(job, fn) {
    this.last += 1;
    const id = this.last;
    this.logs.set(id, { job, fn, from: null });
    if (this.conn !== null) this.subscribeLog(id);
    return () => {
      this.logs.delete(id);
      this.post({ t: "unsub", id: this.base + id });
    };
  }

  subscribeLog(id) {
    const { job, from } = this.logs.get(id);
    this.post({ t: "sub", id: this.base + id, log: job, ...(from === null ? {} : { from }) });
  }

  log(id, { from, lines }) {
    const log = this.logs.get(id);
    if (!log) return;
    log.from = lines.at(-1).n;
    log.fn(lines, from);
  }

  // Resolves with the ack once the change is committed; rejects with a CommandError. target: the id of a job,
  // {jobs: ids}, {f: filter}, or null.
  command(op, target, args = {}) {
    return new Promise((resolve, reject) => {
      if (this.state !== "live") {
        reject(new CommandError({ code: "offline", msg: words.offline }));
        return;
      }
      this.last += 1;
      const n = this.last;
      const frame = { t: "cmd", op, key: random(), args, ...(typeof target === "string" ? { job: target } : target) };
      const late = () => this.settle(n, () => reject(new CommandError({ code: "unanswered", msg: words.unanswered })));
      this.commands.set(n, { frame, resolve, reject, timer: setTimeout(late, ACK_MS) });
      this.say(n);
    });
  }

  say(n) {
    this.post({ ...this.commands.get(n).frame, id: `${this.base}c${n}` });
  }

  settle(n, how) {
    const command = this.commands.get(n);
    if (!command) return;
    this.commands.delete(n);
    clearTimeout(command.timer);
    how(command);
  }
}
