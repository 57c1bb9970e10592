// Files on their way from this tab to the server, over tus.
//
// Strategy. A small file is one request; a larger one is created, then sent whole. Whatever happens, the
// next step is the same: ask how much is stored and go on from there. Pause, resume and cancel are the
// job's: the server holds or ends the request. The label of an upload, <me>.<fingerprint of the
// content>.<random>, is what finds it again: after an answer that was lost, after a reload, and by the
// same file in another browser. What someone else is sending is left alone.

import { announce, ask, el, icon, notice, setText } from "./dom.js";
import { format, words } from "./words.js";

const MIB = 1 << 20;
const SMALL = 8 * MIB;
const MOST_BLOCK = 64 * MIB;
const SAMPLE = 16 << 10;
const AT_ONCE = 3;
const SHOWN = 5;
const MOST_FILES = 20000;
const STEP_MS = 500;
const MOST_MS = 15000;
const COLLECTED_MS = 3000;
const STUCK_MS = 30000;
const RATE_S = 10;
const AGAIN = [0, 408, 409, 423, 425, 429];
const LABEL = /\.([0-9a-z]+-[0-9a-z]+)\.[0-9a-z]+$/;

const say = words.uploads;
const random = () => Math.floor(Math.random() * 2 ** 40).toString(36);
const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
const pathOf = (file) => file.path ?? (file.webkitRelativePath || file.name);
const printOf = (row) => (row.kind === "upload" && row.transfer?.protocol === "tus" && LABEL.exec(row.client)?.[1]) || null;

// The size, and a hash of samples from the whole length: all of a small file. crypto.subtle is missing
// on plain http, and need not be: this only finds, the offset is the server's.
async function fingerprint(file) {
  const step = Math.max(SAMPLE, (file.size - SAMPLE) / 16);
  const samples = [];
  for (let at = 0; at < file.size; at += step) samples.push(file.slice(at, at + SAMPLE));
  let a = 1;
  let b = 2;
  for (const byte of new Uint8Array(await new Blob(samples).arrayBuffer())) {
    a = Math.imul(a ^ byte, 0x01000193);
    b = Math.imul(b ^ (b >>> 13) ^ byte, 0x2c1b3c6d);
  }
  return `${file.size.toString(36)}-${(a >>> 0).toString(36)}${(b >>> 0).toString(36)}`;
}

export class Uploads {
  constructor(app) {
    this.app = app;
    this.waiting = [];
    this.active = new Set();
    this.failed = [];
    this.keys = new Set(); // of all these files
    this.labels = new Map(); // label → item
    this.held = false;
    this.block = Infinity; // bytes in a request, once something between has shown that it needs a bound
    this.most = MOST_BLOCK;
    this.panel();
    app.store.listen((change) => {
      if (change.rows === null) this.wake();
      else if (change.event && change.event.from !== change.event.to) this.of(change.event.row)?.wake?.();
    });
    addEventListener("online", () => this.wake());
    addEventListener("beforeunload", (event) => { if (this.active.size || this.waiting.length) event.preventDefault(); });
    // Else the server would hold a paused request for an hour, and take the upload for one being sent.
    addEventListener("pagehide", () => {
      for (const { id } of this.active) if (id) fetch(`/tus/${id}`, { method: "HEAD", keepalive: true }).catch(() => {});
    });
  }

  // The upload of this tab that a job belongs to.
  of(row) {
    return this.labels.get(row.client);
  }

  // Whether the same file, chosen here, can go on with it.
  isMine(row) {
    return printOf(row) !== null;
  }

  add(files) {
    if (!this.active.size && !this.waiting.length) this.batch = { files: 0, done: 0, bytes: 0, stored: 0, at: performance.now(), seen: [] };
    const twice = [];
    const known = this.unfinished();
    known.catch(() => {});
    for (const file of files) {
      const path = pathOf(file);
      const key = `${path}|${file.size}|${file.lastModified}`;
      if (this.keys.has(key)) twice.push(file.name);
      else this.enter({ file, path, key, known });
    }
    if (twice.length) notice(say.twice(twice[0], twice.length), true);
    this.next();
  }

  // Go on with one job; false if it is another file.
  async goOn(row, file) {
    if (this.of(row)) return true;
    try {
      if (await fingerprint(file) !== printOf(row)) return false;
      if ((await this.json(`/v1/jobs/${row.id}`)).transfer?.connected) notice(say.elsewhere(row.name), true);
      else {
        this.add([]);
        this.enter({ file, path: row.name, key: row.client, id: row.id, label: row.client });
        this.next();
      }
    } catch {
      notice(say.unreadable(file.name), true);
    }
    return true;
  }

  enter(item) {
    Object.assign(item, { at: null, begun: 0, loaded: 0 });
    this.keys.add(item.key);
    if (item.label) this.labels.set(item.label, item);
    this.waiting.push(item);
    this.batch.files += 1;
    this.batch.bytes += item.file.size;
  }

  next() {
    while (!this.held && this.waiting.length && this.active.size < AT_ONCE) {
      const item = this.waiting.shift();
      this.active.add(item);
      this.run(item);
    }
    this.show();
  }

  // why: undefined if it is stored, null if its row says what has happened, else what to say here.
  end(item, why) {
    if (!this.active.delete(item)) return;
    if (why) {
      item.why = why;
      this.failed.push(item);
      notice(`${item.file.name}: ${why}`, true);
    } else this.forget(item, why === undefined);
    this.next();
  }

  forget(item, stored) {
    this.keys.delete(item.key);
    this.labels.delete(item.label);
    if (stored) {
      this.batch.done += 1;
      this.batch.stored += item.file.size;
    } else {
      this.batch.files -= 1;
      this.batch.bytes -= item.file.size;
    }
  }

  again(item) {
    this.failed.splice(this.failed.indexOf(item), 1);
    item.known = null;
    item.at = null;
    this.waiting.unshift(item);
    this.next();
  }

  giveUp(item) {
    this.failed.splice(this.failed.indexOf(item), 1);
    this.forget(item, false);
    this.show();
  }

  // One file, until it is stored or nothing more can be done.
  async run(item) {
    for (let tries = 0; this.active.has(item); ) {
      const { at } = item;
      try {
        await item.file.slice(0, 1).arrayBuffer(); // throws if it has changed or gone
        item.print ??= await fingerprint(item.file);
      } catch {
        return this.end(item, say.unreadable);
      }
      const from = performance.now();
      const answer = await this.step(item);
      if (!this.active.has(item)) return undefined;
      const { status, code, detail, offset, wait_s: wait } = answer;
      if (status === 200 || status === 201 || status === 204) {
        item.at = offset ?? 0;
        if (item.at === item.file.size) return this.end(item);
        if (at !== null && item.at > at) tries = 0;
        if (status === 204) this.pace(performance.now() - from);
        if (status === 201 && this.held) await this.command("pause", item);
        continue;
      }
      if (status === -1) continue; // found, to be asked
      item.at = null;
      if (code === "elsewhere" || code === "upload-taken-over") return this.end(item, say.elsewhere(item.file.name));
      if (item.id && (status === 404 || status === 410)) {
        const row = await this.json(`/v1/jobs/${item.id}`).catch((error) => error);
        if (row.state) return this.end(item, row.state === "succeeded" ? undefined : null);
        if (row.status === 404) return this.end(item, say.ended);
      } else if (status === 413 && !code && this.block > MIB) this.most = this.block = Math.max(MIB, Math.min(this.block, item.file.size, MOST_BLOCK) / 4);
      else if (status === 413 && !code) return this.end(item, say.limit);
      else if (!AGAIN.includes(status) && (status < 500 || status === 507)) return this.end(item, detail || say.refused(status));
      else {
        item.lost = status === 0;
        await new Promise((resolve) => {
          item.wake = resolve;
          setTimeout(resolve, wait ? wait * 1000 : Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** tries));
        });
        item.wake = null;
        item.lost = false;
        tries += 1;
      }
    }
    return undefined;
  }

  // The next request of a file.
  async step(item) {
    const { file } = item;
    if (item.at !== null) {
      const body = file.slice(item.at, item.at + this.block);
      return this.request(item, "PATCH", `/tus/${item.id}`, { "Upload-Offset": item.at }, body);
    }
    if (item.id) return this.request(item, "HEAD", `/tus/${item.id}`);
    // A label that is there already was sent before: its answer may have been lost.
    const same = (row) => row.client === item.label
      || (printOf(row) === item.print && row.name.split("/").pop() === file.name.normalize() && !this.of(row));
    try {
      const row = (await (item.known ?? this.unfinished())).find(same);
      item.known = null;
      if (row) {
        if (row.client !== item.label && row.transfer.connected) return { code: "elsewhere" };
        item.id = row.id;
        this.labels.set(item.label = row.client, item);
        return { status: -1 };
      }
    } catch (error) {
      item.known = null;
      return { status: error.status ?? 0 };
    }
    item.label ??= `${this.app.me}.${item.print}.${random()}`;
    this.labels.set(item.label, item);
    const about = { filename: file.name, filetype: file.type, relativePath: item.path };
    const headers = { "X-Client-Id": item.label, "Upload-Length": file.size,
      "Upload-Metadata": Object.entries(about).filter(([, value]) => value).map(([key, value]) => `${key} ${base64(value)}`).join() };
    return this.request(item, "POST", "/tus/", headers, file.size <= Math.min(SMALL, this.block) ? file : null);
  }

  request(item, method, url, headers = {}, body = null) {
    return new Promise((resolve) => {
      const xhr = new XMLHttpRequest();
      const got = (name) => xhr.getResponseHeader(name);
      xhr.open(method, url);
      for (const [name, value] of Object.entries(headers)) xhr.setRequestHeader(name, value);
      if (body) {
        xhr.setRequestHeader("Content-Type", "application/offset+octet-stream");
        Object.assign(item, { xhr, loaded: 0, size: body.size, movedAt: performance.now(), sentAt: null });
        xhr.upload.onprogress = ({ loaded }) => {
          item.loaded = loaded;
          item.movedAt = performance.now();
          if (loaded >= MIB) item.sentAt ??= item.movedAt;
        };
      }
      xhr.onloadend = () => {
        item.xhr = null;
        let problem = {};
        try {
          problem = JSON.parse(xhr.responseText);
        } catch { /* not ours, or none */ }
        const address = xhr.status === 201 && got("Location");
        if (address) item.id = address.split("/").pop();
        const offset = xhr.status && got("Upload-Offset");
        resolve({ status: xhr.status, code: problem.code, detail: [problem.detail, problem.next].filter(Boolean).join(" "),
          offset: offset ? Number(offset) : null, wait_s: xhr.status && Number(got("Retry-After")) });
      };
      xhr.send(body);
    });
  }

  async json(url) {
    const answer = await fetch(url, { cache: "no-store" });
    if (!answer.ok) throw Object.assign(new Error(), { status: answer.status });
    return answer.json();
  }

  // All uploads that wait for bytes.
  async unfinished() {
    const rows = [];
    for (let after = ""; after !== null; ) {
      const page = await this.json(`/v1/jobs?kind=upload&state=running&state=pausing&state=paused&limit=200${after}`);
      rows.push(...page.items);
      after = page.next && `&after=${page.next}`;
    }
    return rows;
  }

  pace(ms) {
    if (this.block < Infinity) this.block = Math.max(MIB / 4, Math.min(this.most, this.block * (ms < 1000 ? 2 : ms > 4000 ? 0.5 : 1)));
  }

  wake() {
    for (const item of this.active) item.wake?.();
  }

  // Each second: is a request stuck, or does something between here and the server collect it?
  watch() {
    const { store, channel } = this.app;
    const now = performance.now();
    for (const item of this.active) {
      const row = this.rowOf(item);
      if (!item.xhr || channel.state !== "live" || (row && row.state !== "running")) {
        item.sentAt &&= now;
        item.movedAt = now;
        continue;
      }
      const stored = row?.progress.done ?? 0;
      if (now - item.sentAt > COLLECTED_MS && item.sentAt && stored <= (item.at ?? 0) && this.block === Infinity) {
        this.block = 4 * MIB;
        notice(this.note = say.collected, true);
      }
      const whole = item.loaded >= item.size;
      if (!whole && (item.size > this.block * 2 || now - Math.max(item.movedAt, row?.movedAt ?? 0) > STUCK_MS)) item.xhr.abort();
    }
    if (store.ready) this.show();
  }

  rowOf(item) {
    return item.id ? this.app.store.rows.get(item.id) : this.app.store.sorted.find((row) => row.client === item.label);
  }

  // For all of this tab

  async command(op, item) {
    const id = item.id ?? this.rowOf(item)?.id;
    try {
      if (id) await this.app.channel.command(op, id);
      return true;
    } catch (error) {
      if (error.code === "offline") notice(words.refused(words.act[op], words.offline), true);
      return error.code !== "offline";
    }
  }

  pauseAll() {
    this.held = true;
    for (const item of this.active) this.command("pause", item);
    this.show();
  }

  resumeAll() {
    this.held = false;
    for (const item of this.active) this.command("resume", item);
    this.next();
  }

  async cancelAll() {
    for (const item of this.waiting.splice(0)) this.forget(item, false);
    for (const item of [...this.active]) {
      if (!await this.command("cancel", item)) continue;
      item.xhr?.abort();
      this.end(item, null);
    }
    this.held = false;
    this.next();
  }

  // What is shown of all that

  panel() {
    const button = (label, run) => el("button", { type: "button", onclick: run }, label);
    this.text = el("span", { class: "sending-text" });
    this.meter = el("progress", { max: 1, "aria-label": say.label });
    this.hold = button(say.pauseAll, () => (this.held ? this.resumeAll() : this.pauseAll()));
    this.stop = button(say.cancelAll, async () => {
      if (await ask(say.sure, el("p", {}, say.sureText), [{ value: "", label: say.keep }, { value: "yes", label: say.cancelAll, kind: "danger" }])) this.cancelAll();
    });
    this.close = el("button", { type: "button", class: "quiet", "aria-label": words.dismiss, onclick: () => { this.node.hidden = true; } }, icon("cross"));
    this.sub = el("p", { class: "sub" });
    this.bad = el("ul");
    this.more = el("details", {}, this.head = el("summary"), this.bad);
    this.node = el("section", { class: "sending", "aria-label": say.label, hidden: true },
      el("div", {}, this.text, this.hold, this.stop, this.close), this.meter, this.sub, this.more);
  }

  show() {
    const { active, waiting, failed, batch } = this;
    const busy = active.size + waiting.length;
    this.timer = busy ? this.timer ?? setInterval(() => this.watch(), 1000) : clearInterval(this.timer) ?? null;
    if (!batch) return;
    let stored = batch.stored;
    for (const item of active) stored += Math.min(item.file.size, this.rowOf(item)?.progress.done ?? item.at ?? 0);
    const now = performance.now();
    const { seen } = batch;
    if (!seen.length || now - seen.at(-1).now > 500) seen.push({ now, stored });
    if (seen.length > RATE_S) seen.shift();
    const rate = (1000 * (stored - seen[0].stored)) / (now - seen[0].now);
    const moving = !this.held && rate > 0;
    if (busy) this.node.hidden = false;
    setText(this.text, busy
      ? say.sum(format.count(batch.files), format.count(batch.done), format.count(waiting.length), [format.pair(stored, batch.bytes, "bytes"),
        moving && format.rate(rate, "bytes"), moving && format.left(Array(2).fill((batch.bytes - stored) / rate))])
      : say.done(batch.done, format.bytes(batch.stored), format.duration((now - batch.at) / 1000)));
    if (!busy && batch.busy && batch.done) announce(this.text.textContent);
    batch.busy = busy;
    this.meter.value = batch.bytes ? stored / batch.bytes : 1;
    setText(this.hold, this.held ? say.resumeAll : say.pauseAll);
    this.hold.hidden = this.stop.hidden = !busy;
    this.close.hidden = Boolean(busy);
    setText(this.sub, [...active].some((item) => item.lost) ? say.lost : this.held ? say.held : this.note ?? "");
    this.more.hidden = !failed.length;
    setText(this.head, say.failed(failed.length, failed[0]?.file.name));
    const lines = failed.slice(0, SHOWN).map((item) => this.problem(item));
    if (failed.length > SHOWN) lines.push(el("li", {}, say.more(failed.length - SHOWN)));
    if (this.shown !== (this.shown = failed.map((item) => item.key + item.why).join())) this.bad.replaceChildren(...lines);
  }

  problem(item) {
    const { name } = item.file;
    return el("li", { class: "bad" }, `${name}: ${item.why} `, ...[[say.again, "again"], [say.drop, "giveUp"]].map(([label, does]) =>
      el("button", { type: "button", class: "quiet", "aria-label": words.of(label, name), onclick: () => this[does](item) }, label)));
  }
}

// The files of a drop, those of folders with their paths, in order. What can't be read is said once.
export async function dropped(transfer) {
  const todo = [...transfer.items].filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).reverse();
  const files = [];
  const unread = [];
  while (todo.length) {
    const entry = todo.pop();
    try {
      if (files.length === MOST_FILES) {
        notice(say.many(format.count(MOST_FILES)), true);
        break;
      } else if (entry.isDirectory) {
        const reader = entry.createReader();
        const inside = [];
        for (let some = [0]; some.length; inside.push(...some)) some = await new Promise((done, fail) => reader.readEntries(done, fail));
        todo.push(...inside.reverse());
      } else if (entry.isFile) {
        const file = await new Promise((done, fail) => entry.file(done, fail));
        files.push(Object.assign(file, { path: entry.fullPath.slice(1) }));
      } else files.push(entry);
    } catch {
      unread.push(entry?.name ?? "?");
    }
  }
  if (unread.length) notice(say.unread(unread[0], unread.length), true);
  return files;
}
