// The live channel: one WebSocket that speaks jobs.v1.
//
// Strategy. The cursor (epoch, s) of the last applied frame is the truth about what this page has seen.
// An event is applied only if its p is that s; else one was missed, and the page resumes from its cursor.
// The server then either fills the gap or says reset and sends a snapshot. A lost connection is opened
// again with full jitter and resumes the same way. A command is a promise that ack or err settles; one
// that the connection's end leaves open is rejected, because nobody knows whether it was carried out.

const PROTOCOL = "jobs.v1.json";
const SUB = 1;
const FIRST_MS = 250;
const STEP_MS = 500;
const MOST_MS = 30000;
const ACK_MS = 20000;
const PROBE_MS = 10000;

export class CommandError extends Error {
  constructor(frame) {
    super(frame.msg ?? "");
    this.code = frame.code;
    this.next = frame.next ?? "";
    this.field = frame.field ?? null;
  }
}

export class Channel {
  // handlers: frame(frame) for snap, ev, p, counts, now, reset; status() whenever the state has changed.
  constructor(tab, handlers) {
    this.tab = tab;
    this.handlers = handlers;
    this.state = "connecting"; // connecting, live, lost, ended
    this.restarting = false;
    this.lostAt = null;
    this.retryAt = null;
    this.heardAt = 0; // performance.now() of the last frame
    this.rtt = null;
    this.epoch = null;
    this.s = null;
    this.tries = 0;
    this.nextId = 0;
    this.commands = new Map();
    this.syncing = true;
    this.hb = 15;
    addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => {
      if (this.state === "live") this.say({ t: "set", vis: document.visibilityState });
      if (document.visibilityState === "visible") this.watch();
    });
    setInterval(() => this.watch(), 1000);
    setInterval(() => this.probe(), PROBE_MS);
  }

  open() {
    clearTimeout(this.timer);
    this.retryAt = null;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/v1/ws`, [PROTOCOL]);
    this.socket = socket;
    this.heardAt = performance.now();
    socket.onopen = () => {
      this.saidAt = performance.now();
      this.say({ t: "hello", ver: 1, cid: this.tab, feat: ["now"], vis: document.visibilityState });
      this.subscribe();
    };
    socket.onmessage = (event) => {
      if (socket !== this.socket) return;
      this.heardAt = performance.now();
      const said = JSON.parse(event.data);
      for (const frame of Array.isArray(said) ? said : [said]) this.hear(frame);
    };
    socket.onclose = (event) => { if (socket === this.socket) this.closed(event.code); };
  }

  subscribe() {
    this.syncing = true;
    const resume = this.epoch === null ? {} : { epoch: this.epoch, s: this.s };
    this.say({ t: "sub", id: SUB, f: {}, ...resume });
  }

  say(frame) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  hear(frame) {
    switch (frame.t) {
      case "welcome":
        this.hb = frame.hb;
        this.rtt = Math.round(performance.now() - this.saidAt);
        break;
      case "snap":
        if (frame.id !== SUB) break;
        if (frame.page === 1) {
          this.epoch = frame.epoch;
          this.s = frame.s;
          this.synced();
        }
        this.handlers.frame(frame);
        break;
      case "ev":
        if (frame.id !== SUB) break;
        if (frame.p !== this.s) {
          if (!this.syncing) this.subscribe();
          break;
        }
        this.s = frame.s;
        this.handlers.frame(frame);
        break;
      case "mark":
        if (frame.id === SUB && !this.syncing) this.s = Math.max(this.s, frame.s);
        break;
      case "ack":
        if (frame.id === SUB) this.synced();
        else this.settle(frame.id, (command) => command.resolve(frame));
        break;
      case "err":
        if (frame.id === SUB) this.socket.close();
        else this.settle(frame.id, (command) => command.reject(new CommandError(frame)));
        break;
      case "bye":
        this.restarting = true;
        this.pauseMs = frame.retry_ms;
        break;
      case "hb":
        this.say({ t: "hb", s: this.s ?? 0 });
        break;
      case "reset":
        this.epoch = this.s = null;
        break;
      default:
        this.handlers.frame(frame);
    }
  }

  synced() {
    this.syncing = false;
    if (this.state === "live") return;
    this.state = "live";
    this.tries = 0;
    this.restarting = false;
    this.lostAt = null;
    this.handlers.status();
  }

  closed(code) {
    for (const id of [...this.commands.keys()]) {
      this.settle(id, (command) => command.reject(new CommandError({ code: "offline" })));
    }
    if (this.state === "live") this.lostAt = Date.now();
    this.socket = null;
    if (code >= 4400 && code < 4500) {
      this.state = "ended";
      this.handlers.status();
      return;
    }
    this.state = "lost";
    this.lostAt ??= Date.now();
    if (code === 1012 || code === 1013) this.restarting ||= code === 1012;
    const first = this.tries === 0 && !this.restarting;
    let wait = first ? Math.random() * FIRST_MS : Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** this.tries);
    if (this.pauseMs) wait += this.pauseMs;
    this.pauseMs = 0;
    this.tries += 1;
    this.retryAt = Date.now() + wait;
    this.timer = setTimeout(() => this.open(), wait);
    this.handlers.status();
  }

  // Connect now rather than when the jitter says.
  retry() {
    if (this.state === "lost" && this.retryAt !== null) this.open();
  }

  watch() {
    const silent = performance.now() - this.heardAt;
    if (this.socket && silent > (2 * this.hb + 5) * 1000) {
      const socket = this.socket;
      socket.onclose = null;
      socket.close();
      this.closed(1006);
    }
    this.handlers.status();
  }

  // How long an answer takes; only asked of a server that is there.
  async probe() {
    if (this.state !== "live" || document.visibilityState !== "visible") return;
    const from = performance.now();
    try {
      await fetch("/healthz", { cache: "no-store" });
      this.rtt = Math.round(performance.now() - from);
    } catch {
      this.rtt = null;
    }
  }

  more(cursor) {
    this.say({ t: "more", id: SUB, cursor });
  }

  // Resolves with the ack once the change is committed; rejects with a CommandError.
  command(op, job, args = {}) {
    return new Promise((resolve, reject) => {
      if (this.state !== "live") {
        reject(new CommandError({ code: "offline" }));
        return;
      }
      this.nextId += 1;
      const id = `c${this.nextId}`;
      const timer = setTimeout(() => this.settle(id, (c) => c.reject(new CommandError({ code: "offline" }))), ACK_MS);
      this.commands.set(id, { resolve, reject, timer });
      this.say({ t: "cmd", id, op, ...(job ? { job } : {}), args });
    });
  }

  settle(id, how) {
    const command = this.commands.get(id);
    if (!command) return;
    this.commands.delete(id);
    clearTimeout(command.timer);
    how(command);
  }
}
