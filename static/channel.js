// The live channel: one WebSocket that speaks jobs.v1.
//
// Strategy. The cursor (epoch, s) of the last applied message is the truth about what this page has seen.
// An ev or mark is applied only if its p is that s; else something was lost, and the page subscribes again
// from its cursor. Until the ack it takes neither. The server then fills the gap, or sends a snapshot: its
// first page is what comes while there is no cursor. All other pages are asked for when they are wanted,
// so half a snapshot is a fine place to resume here. A lost connection is opened again with full jitter
// and resumes the same way. A command is a promise that ack or err settles; one that the connection's end
// leaves open is rejected, because nobody knows whether it was carried out.

const PROTOCOL = "jobs.v1.json";
const SUB = 1;
const STEP_MS = 500;
const MOST_MS = 30000;
const ACK_MS = 20000;
const PROBE_MS = 10000;
const REPLACED = 4409;

export class CommandError extends Error {
  constructor(frame) {
    super(frame.msg ?? "");
    this.code = frame.code;
    this.next = frame.next ?? "";
    this.field = frame.field ?? null;
  }
}

export class Channel {
  // handlers: tab(anew) names this tab, by a new name if anew; frame(frame, first) for snap, ev, p, counts,
  // now, and the ack of a resumed subscription; status() whenever the state has changed.
  constructor(handlers) {
    this.handlers = handlers;
    this.tab = handlers.tab(false);
    this.state = "connecting"; // connecting, live, lost, ended
    this.code = null; // of the last close
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
    this.asked = false; // a subscription is not answered yet
    this.pauseMs = null; // what the server wants to be waited for
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
    this.asked = true;
    const resume = this.s === null ? {} : { epoch: this.epoch, s: this.s };
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
        if (frame.id === SUB) this.snap(frame);
        break;
      case "reset":
        if (frame.id === SUB) this.reset();
        break;
      case "ev":
      case "mark":
        if (frame.id === SUB && !this.asked) this.follow(frame);
        break;
      case "ack":
        if (frame.id === SUB) this.answered(frame);
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
        if (!this.asked && this.s !== null && frame.s > this.s) this.subscribe();
        break;
      default:
        this.handlers.frame(frame);
    }
  }

  answered(ack) {
    this.asked = false;
    if (ack.resumed) {
      this.synced();
      this.handlers.frame(ack);
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
    if (first && this.asked) return;
    if (first) {
      this.epoch = page.epoch;
      this.s = page.s;
      this.synced();
    }
    this.handlers.frame(page, first);
  }

  follow(message) {
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
    this.code = code;
    // A tab that is duplicated has the name of the first, and ends its connection.
    if (code === REPLACED) this.tab = this.handlers.tab(true);
    else if (code >= 4400 && code < 4500) {
      this.state = "ended";
      this.handlers.status();
      return;
    }
    this.state = "lost";
    this.lostAt ??= Date.now();
    if (code === 1012) this.restarting = true;
    const wait = this.pauseMs ?? Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** this.tries);
    this.pauseMs = null;
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

  // Ask for a page. While a subscription is not answered this does nothing: the page might belong to a
  // list that a snapshot replaces.
  more(cursor) {
    if (!this.asked && this.s !== null) this.say({ t: "more", id: SUB, cursor });
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
