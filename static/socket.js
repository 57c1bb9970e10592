// The one connection of all tabs: a WebSocket in a SharedWorker, or in the page where there is none.
// A tab numbers what it asks for from its base on, so an answer names its tab; what has no id is for all.

const STEP_MS = 500;
const MOST_MS = 30000;
const SILENT_MS = 35000;
const PROBE_S = 10;
const TABS = 16; // a list and a log each, of 32 subscriptions
const BASE = 100000;
const lines = new Set();

class Line {
  tabs = new Map();
  last = 0;
  tries = 0;
  beats = 0;
  online = true;
  cid = Math.random().toString(36).slice(2);
  status = { state: "connecting", conn: 0, lostAt: null, rtt: null };

  constructor() {
    lines.add(this);
    this.clock = setInterval(() => this.beat(), 1000);
    this.open();
  }

  tell(change) {
    Object.assign(this.status, change);
    for (const { port } of this.tabs.values()) port.postMessage({ status: this.status });
  }

  say(frame) {
    if (this.socket?.readyState === 1) this.socket.send(JSON.stringify(frame));
  }

  open() {
    this.drop();
    this.socket = new WebSocket(`${location.origin.replace("http", "ws")}/v1/ws`, ["jobs.v1.json"]);
    this.heardAt = Date.now();
    this.socket.onopen = () => this.say({ t: "hello", ver: 1, cid: this.cid, feat: ["now"], vis: this.vis });
    this.socket.onmessage = ({ data }) => this.hear([JSON.parse(data)].flat());
    this.socket.onclose = ({ code }) => this.closed(code);
  }

  drop() {
    clearTimeout(this.timer);
    Object.assign(this.socket ?? {}, { onmessage: null, onclose: null }).close?.();
    this.socket = null;
  }

  hear(frames) {
    this.heardAt = Date.now();
    const parts = new Map();
    for (const frame of frames) {
      if (frame.t === "welcome") this.tell({ state: "live", conn: this.status.conn + 1, s: frame.s, restarting: false, lostAt: null });
      else if (frame.t === "bye") {
        this.status.restarting = true;
        this.pauseMs = frame.retry_ms;
      } else {
        this.tries = 0;
        if (frame.t === "hb") this.say({ t: "hb" });
        for (const n of "id" in frame ? [parseInt(frame.id, 10) / BASE | 0] : this.tabs.keys()) parts.set(n, [...parts.get(n) ?? [], frame]);
      }
    }
    for (const [n, part] of parts) this.tabs.get(n)?.port.postMessage({ frames: part });
  }

  closed(code) {
    this.drop();
    const ended = code >= 4400 && code < 4500 && code !== 4409;
    const wait = this.pauseMs ?? (this.online ? Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** this.tries) : MOST_MS);
    this.pauseMs = null;
    this.tries += 1;
    if (!ended) this.timer = setTimeout(() => this.open(), wait);
    this.tell({ state: ended ? "ended" : "lost", code, lostAt: this.status.lostAt ?? Date.now(), retryAt: Date.now() + wait });
  }

  retry() {
    if (this.status.state !== "lost") return;
    this.open();
    this.tell({ retryAt: 0 });
  }

  async beat() {
    if (this.socket && Date.now() - this.heardAt > SILENT_MS) this.closed(1006);
    if (this.status.state === "live" && this.vis === "visible" && this.beats++ % PROBE_S === 0) {
      const from = performance.now();
      const found = await fetch("/healthz", { cache: "no-store" }).catch(() => null);
      this.status.rtt = found && Math.round(performance.now() - from);
    }
    this.tell();
  }

  take(n, said) {
    const tab = this.tabs.get(n);
    if (said.t === "vis") tab.vis = said.vis;
    else if (said.t === "net") {
      this.online = said.online;
      if (this.online) this.retry();
      else if (this.socket) this.closed(1006);
    } else if (said.t === "retry") this.retry();
    else if (said.t === "leave") {
      for (const id of tab.subs) this.say({ t: "unsub", id });
      this.tabs.delete(n);
    } else {
      if (said.t === "sub") tab.subs.add(said.id);
      this.say(said);
    }
    this.look();
  }

  look() {
    const vis = [...this.tabs.values()].some((tab) => tab.vis === "visible") ? "visible" : "hidden";
    if (vis !== this.vis) this.say({ t: "set", vis });
    this.vis = vis;
    if (this.tabs.size) return;
    clearInterval(this.clock);
    this.drop();
    lines.delete(this);
  }
}

// A tab says join, then frames as if the connection were its own. When its lock is free it has crashed.
export function serve(port) {
  let line = null;
  let n = 0;
  port.onmessage = ({ data }) => {
    if (data.t === "join") {
      line = [...lines].find((one) => one.tabs.size < TABS) ?? new Line();
      n = line.last += 1;
      line.tabs.set(n, { port, vis: data.vis, subs: new Set() });
      line.look();
      port.postMessage({ base: n * BASE, status: line.status });
    } else if (data.t === "lock") navigator.locks.request(data.name, () => port.onmessage({ data: { t: "leave" } }));
    else if (line?.tabs.has(n)) line.take(n, data);
  };
}

if (globalThis.SharedWorkerGlobalScope) onconnect = ({ ports }) => serve(ports[0]);
