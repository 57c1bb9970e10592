// What one tab asks of the live channel, and how it misses nothing: an ev or mark is applied only if its
// p is the cursor; else the page subscribes again from there, taking neither until the ack. Pages are asked for
// one at a time, so half a snapshot is a fine place to resume. Each new connection hears all of it again.

import { serve } from "./socket.js";
import { words } from "./words.js";

const LIST = 1;
const AGAIN_MS = 1000;
const ACK_MS = 20000;
const GONE_MS = 5000; // then the worker has crashed

const random = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

class CommandError extends Error {
  constructor({ code, msg, next = "", field }) {
    super(msg);
    Object.assign(this, { code, next, field });
  }
}

export class Channel {
  state = "connecting";
  lostAt = null;
  heardAt = performance.now();
  rtt = null;
  at = null; // {epoch, s}: the cursor
  goal = 0; // the newest event when the connection was made
  asked = false;
  last = LIST;
  logs = new Map();
  commands = new Map();

  constructor(handlers) {
    this.handlers = handlers;
    for (const name of ["online", "offline"]) addEventListener(name, () => this.post({ t: "net", online: name === "online" }));
    addEventListener("pagehide", () => this.post({ t: "leave" }));
    document.addEventListener("visibilitychange", () => {
      this.post({ t: "vis", vis: document.visibilityState });
      handlers.status();
    });
    setInterval(() => {
      if (this.shared && performance.now() - this.toldAt > GONE_MS) this.open();
      handlers.status();
    }, 500);
  }

  open() {
    const inPage = () => {
      const { port1, port2 } = new MessageChannel();
      serve(port2);
      this.join(port1, false);
    };
    if (this.port) this.post({ t: "leave" });
    try {
      const worker = new SharedWorker(new URL("./socket.js", import.meta.url), { type: "module", name: "1" });
      worker.onerror = inPage;
      this.join(worker.port, true);
      const name = random();
      navigator.locks?.request(name, () => {
        this.post({ t: "lock", name });
        return new Promise(() => {}); // until this tab is gone
      });
    } catch {
      inPage();
    }
  }

  join(port, shared) {
    Object.assign(this, { port, shared, conn: null, toldAt: performance.now() });
    port.onmessage = ({ data }) => { if (port === this.port) this.told(data); };
    this.post({ t: "join", vis: document.visibilityState });
  }

  post(message) {
    this.port.postMessage(message);
  }

  told({ base, status, frames = [] }) {
    this.toldAt = performance.now();
    if (base) this.base = base;
    if (status) this.line(status);
    if (frames.length) this.heardAt = this.toldAt;
    for (const frame of frames) this.hear(frame);
  }

  line({ state, conn, s, lostAt, ...rest }) {
    Object.assign(this, rest);
    if (state !== "live") Object.assign(this, { state, lostAt, conn: null });
    else if (conn !== this.conn) {
      Object.assign(this, { conn, goal: s });
      this.subscribe();
      for (const id of this.logs.keys()) this.subscribeLog(id);
      for (const n of this.commands.keys()) this.say(n);
    }
    this.handlers.status();
  }

  // Events, of whomever, that came while this page was away and are not here yet
  get behind() {
    return Math.max(0, this.goal - (this.at?.s ?? 0));
  }

  subscribe() {
    this.asked = true;
    this.post({ t: "sub", id: this.base + LIST, f: {}, page: 200, ...this.at });
  }

  hear(frame) {
    const id = frame.id - this.base; // a subscription's
    const n = Number(String(frame.id).split("c")[1]); // a command's
    switch (frame.t) {
      case "snap": return this.snap(frame);
      case "reset": return this.reset();
      case "ev":
      case "mark": return this.asked || this.apply(frame);
      case "log": return this.logs.get(id)?.hear(frame);
      case "ack": return id === LIST ? this.answered(frame) : this.settle(n, "resolve", frame);
      case "err": return id === LIST ? setTimeout(() => this.subscribe(), AGAIN_MS) : this.settle(n, "reject", new CommandError(frame));
      case "hb": return this.asked || !(frame.s > this.at?.s) || this.subscribe();
      default: return this.handlers.frame(frame);
    }
  }

  answered(ack) {
    this.asked = false;
    if (ack.resumed) this.page(ack);
    else this.at = null; // a snapshot follows
  }

  // After the ack this says only why. If it comes unasked, a subscription keeps pages of the list before apart.
  reset() {
    if (!this.at) return;
    this.at = null;
    if (!this.asked) this.subscribe();
  }

  // A page's number does not tell whether it is the first: each subscription counts its own.
  snap(page) {
    const first = !this.at;
    if (first && this.asked) return;
    if (first) this.at = { epoch: page.epoch, s: page.s };
    this.page(page, first);
  }

  page(frame, first) {
    const was = this.state;
    this.state = "live";
    const cursor = this.handlers.frame(frame, first);
    if (was !== "live") this.handlers.status();
    if (cursor && !this.asked) this.post({ t: "more", id: this.base + LIST, cursor });
  }

  apply(message) {
    if (message.p !== this.at?.s) return this.subscribe();
    this.at.s = message.s;
    return message.t === "ev" && this.handlers.frame(message);
  }

  retry() {
    this.post({ t: "retry" });
  }

  // fn(lines, from) is told the newest 1000 lines of a job's log, then all that come, over all reconnects.
  follow(job, fn) {
    const id = this.last += 1;
    const hear = ({ lines, from }) => {
      this.logs.get(id).from = lines.at(-1).n;
      fn(lines, from);
    };
    this.logs.set(id, { log: job, from: -1000, hear });
    if (this.conn) this.subscribeLog(id);
    return () => {
      this.logs.delete(id);
      this.post({ t: "unsub", id: this.base + id });
    };
  }

  subscribeLog(id) {
    const { log, from } = this.logs.get(id);
    this.post({ t: "sub", id: this.base + id, log, from });
  }

  // Resolves with the ack after the commit; rejects with a CommandError. target: id, {jobs: ids}, {f: filter}, null
  command(op, target, args = {}) {
    return new Promise((resolve, reject) => {
      const n = this.last += 1;
      const fail = (code) => {
        this.commands.delete(n);
        reject(new CommandError({ code, msg: words[code] }));
      };
      if (this.state !== "live") return fail("offline");
      const frame = { t: "cmd", op, key: random(), args, ...(typeof target === "string" ? { job: target } : target) };
      this.commands.set(n, { frame, resolve, reject });
      this.say(n);
      return setTimeout(() => fail("unanswered"), ACK_MS);
    });
  }

  say(n) {
    this.post({ ...this.commands.get(n).frame, id: `${this.base}c${n}` });
  }

  settle(n, how, what) {
    this.commands.get(n)?.[how](what);
    this.commands.delete(n);
  }
}
