// The one connection of all tabs: a WebSocket in a SharedWorker, or in the page where there is none.
//
// Strategy. Here is what every subscriber of jobs.v1 has to do alike, whatever it wants to know: connect, say
// hello, answer heartbeats, come back with full jitter. Cursors are the tabs' own. Nothing is translated: a tab
// numbers what it asks for from its base on, so an answer names its tab, and what has no id is for all.
// A tab is unsubscribed when it says so, or when the lock that it holds is free: then it has crashed.

const PROTOCOL = "jobs.v1.json";
const STEP_MS = 500;
const MOST_MS = 30000;
const PROBE_S = 10;
const TABS = 16; // on one connection: each has two of its 32 subscriptions, the list and a log
const BASE = 100000;

const lines = new Set();

class Line {
  constructor() {
    lines.add(this);
    this.tabs = new Map();
    this.last = 0;
    this.cid = Math.random().toString(36).slice(2);
    this.status = { state: "connecting", conn: 0, s: 0, code: null, restarting: false, lostAt: null, retryAt: null, rtt: null };
    this.tries = this.beats = this.hb = 0;
    this.online = true;
    this.pauseMs = null; // what the server wants to be waited for
    this.clock = setInterval(() => this.watch(), 1000);
    this.open();
  }

  tell(change) {
    Object.assign(this.status, change);
    for (const tab of this.tabs.values()) tab.port.postMessage({ status: this.status });
  }

  get vis() {
    return [...this.tabs.values()].some((tab) => tab.vis === "visible") ? "visible" : "hidden";
  }

  say(frame) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(frame));
  }

  open() {
    this.drop();
    this.status.retryAt = null;
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/ws`, [PROTOCOL]);
    this.socket = socket;
    this.heardAt = this.saidAt = Date.now();
    socket.onopen = () => {
      this.saidAt = performance.now();
      this.say({ t: "hello", ver: 1, cid: this.cid, feat: ["now"], vis: this.vis });
    };
    socket.onmessage = ({ data }) => this.hear([JSON.parse(data)].flat());
    socket.onclose = ({ code }) => this.closed(code);
  }

  // Let go of the socket, without another word from it.
  drop() {
    clearTimeout(this.timer);
    if (!this.socket) return;
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
    this.socket = null;
  }

  hear(frames) {
    this.heardAt = Date.now();
    const parts = new Map();
    for (const frame of frames) {
      if (frame.t === "welcome") {
        this.hb = frame.hb;
        const rtt = Math.round(performance.now() - this.saidAt);
        this.tell({ state: "live", conn: this.status.conn + 1, s: frame.s, rtt, restarting: false, lostAt: null });
      } else if (frame.t === "bye") {
        this.status.restarting = true;
        this.pauseMs = frame.retry_ms;
      } else {
        this.tries = 0;
        if (frame.t === "hb") this.say({ t: "hb" });
        const to = frame.id === undefined ? this.tabs.values() : [this.tabs.get(Math.floor(parseInt(frame.id, 10) / BASE))];
        for (const tab of to) if (tab) parts.get(tab)?.push(frame) ?? parts.set(tab, [frame]);
      }
    }
    for (const [tab, part] of parts) tab.port.postMessage({ frames: part });
  }

  // 44xx is final, but for 4409: then something else goes by our name.
  closed(code) {
    this.drop();
    const lostAt = this.status.lostAt ?? Date.now();
    if (code >= 4400 && code < 4500 && code !== 4409) return this.tell({ state: "ended", code, lostAt });
    const wait = this.pauseMs ?? (this.online ? Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** this.tries) : MOST_MS);
    this.pauseMs = null;
    this.tries += 1;
    this.timer = setTimeout(() => this.open(), wait);
    const restarting = this.status.restarting || code === 1012;
    return this.tell({ state: "lost", code, lostAt, restarting, retryAt: Date.now() + wait });
  }

  // Connect now rather than when the jitter says.
  retry() {
    if (this.status.state !== "lost") return;
    this.open();
    this.tell();
  }

  watch() {
    if (this.socket && Date.now() - this.heardAt > (2 * (this.hb || 15) + 5) * 1000) this.closed(1006);
    this.beats += 1;
    this.tell();
    if (this.beats % PROBE_S === 0) this.probe();
  }

  // How long an answer takes; only asked of a server that is there, if somebody looks.
  async probe() {
    if (this.status.state !== "live" || this.vis === "hidden") return;
    const from = performance.now();
    const found = await fetch("/healthz", { cache: "no-store" }).catch(() => null);
    this.tell({ rtt: found && Math.round(performance.now() - from) });
  }

  enter(port, vis) {
    this.last += 1;
    const n = this.last;
    const was = this.vis;
    const tab = { port, vis, subs: new Set() };
    this.tabs.set(n, tab);
    if (this.vis !== was) this.say({ t: "set", vis });
    port.postMessage({ base: n * BASE, status: this.status });
    return [tab, n];
  }

  take(tab, said) {
    const { vis } = this;
    if (said.t === "vis") {
      tab.vis = said.vis;
      this.watch();
      if (this.vis !== vis) this.say({ t: "set", vis: this.vis });
    } else if (said.t === "net") {
      this.online = said.online;
      if (this.online) this.retry();
      else if (this.socket && this.status.state !== "ended") this.closed(1006);
    } else if (said.t === "retry") this.retry();
    else {
      if (said.t === "sub") tab.subs.add(said.id);
      if (said.t === "unsub") tab.subs.delete(said.id);
      this.say(said);
    }
  }

  leave(n) {
    const { vis } = this;
    for (const id of this.tabs.get(n)?.subs ?? []) this.say({ t: "unsub", id });
    this.tabs.delete(n);
    if (this.tabs.size === 0) {
      clearInterval(this.clock);
      this.drop();
      lines.delete(this);
    } else if (this.vis !== vis) this.say({ t: "set", vis: this.vis });
  }
}

// A tab comes in by this port: it says join first, and then frames as if the connection were its own.
export function serve(port) {
  let line = null;
  let tab = null;
  let n = 0;
  const leave = () => {
    line?.leave(n);
    line = null;
  };
  port.onmessage = ({ data }) => {
    if (data.t === "join") {
      line = [...lines].find((one) => one.tabs.size < TABS) ?? new Line();
      [tab, n] = line.enter(port, data.vis);
    } else if (data.t === "leave") leave();
    else if (data.t === "lock") navigator.locks.request(data.name, leave);
    else line?.take(tab, data);
  };
}

if (globalThis.SharedWorkerGlobalScope) onconnect = ({ ports }) => serve(ports[0]);
