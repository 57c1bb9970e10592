// Files on their way from this tab to the server, over tus.
//
// Strategy. A small file is one request; a larger one is created, then sent whole. Whatever happens, the next step
// is the same: ask how much is stored and go on from there. Pause and cancel are the job's: the server holds or ends
// the request. The label of an upload, <me>.<fingerprint of the content>.<random>, finds it again: after a lost
// answer, after a reload, and for the same file in another browser. What is being sent elsewhere is left alone.

import { announce, ask, button, el, notice, setText } from "./dom.js";
import { isFinal } from "./store.js";
import { format, words } from "./words.js";

const MIB = 1 << 20;
const SAMPLE = 16 << 10;
const AT_ONCE = 3;
const SHOWN = 5;
const MOST_FILES = 20000;
const COLLECTED_MS = 3000;
const STUCK_MS = 30000;
const LABEL = /\.(\w+-\w+)\.\w+$/;

const say = words.uploads;
const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
const printOf = (row) => row.kind === "upload" && LABEL.exec(row.client)?.[1];

// The size, and a hash of samples from the whole length. It need not be a strong one (crypto.subtle is missing on
// plain http): it only finds.
async function fingerprint(file) {
  const samples = [];
  for (let at = 0; at < file.size; at += Math.max(SAMPLE, (file.size - SAMPLE) / 16)) samples.push(file.slice(at, at + SAMPLE));
  let [a, b] = [1, 2];
  for (const byte of new Uint8Array(await new Blob(samples).arrayBuffer())) {
    a = Math.imul(a ^ byte, 0x01000193);
    b = Math.imul(b ^ (b >>> 13) ^ byte, 0x2c1b3c6d);
  }
  return `${file.size.toString(36)}-${(a >>> 0).toString(36)}${(b >>> 0).toString(36)}`;
}

export class Uploads {
  constructor(app) {
    Object.assign(this, { app, waiting: [], active: new Set(), failed: [], keys: new Set(), labels: new Map(), held: false });
    this.block = Infinity; // bytes in a request, once something between has shown that it needs a bound
    this.text = el("span");
    this.meter = el("progress", { "aria-label": say.label });
    this.hold = button("", () => (this.held ? this.resumeAll() : this.pauseAll()));
    this.stop = button("", async () => {
      if (!this.busy) this.node.hidden = true;
      else if (await ask(say.sure, [], [{ value: "", label: say.keep }, { value: "yes", label: say.cancelAll, kind: "danger" }])) this.cancelAll();
    });
    this.sub = el("summary");
    this.bad = el("ul");
    this.node = el("section", { class: "sending", "aria-label": say.label, hidden: true },
      el("div", {}, this.text, this.hold, this.stop), this.meter, el("details", {}, this.sub, this.bad));
    const wake = () => { for (const item of this.active) item.wake?.(); };
    app.store.listen(({ rows, event }) => {
      if (rows === null) wake();
      else if (event && event.from !== event.to) this.of(event.row)?.wake?.();
    });
    addEventListener("online", wake);
    addEventListener("beforeunload", (event) => { if (this.busy) event.preventDefault(); });
    // Else the server would hold a paused request for an hour, and take it for a sender.
    addEventListener("pagehide", () => { for (const { id } of this.active) if (id) fetch(`/tus/${id}`, { method: "HEAD", keepalive: true }); });
  }

  get busy() {
    return this.active.size + this.waiting.length;
  }

  // The upload of this tab that a job belongs to.
  of(row) {
    return this.labels.get(row.client);
  }

  // Whether the same file, chosen here, can go on with it.
  isMine(row) {
    return Boolean(printOf(row));
  }

  add(files) {
    const twice = files.filter((file) => !this.enter(file)).map((file) => file.name);
    if (twice.length) notice(say.twice(...twice), true);
    this.next();
  }

  // Go on with one job; false if it is another file.
  async goOn(row, file) {
    if (!this.of(row) && await fingerprint(file).catch(() => "") !== printOf(row)) return false;
    this.enter(file, row.client);
    this.next();
    return true;
  }

  enter(file, label) {
    const path = file.path ?? (file.webkitRelativePath || file.name);
    const key = label ?? `${path}|${file.size}|${file.lastModified}`;
    if (this.keys.has(key) || this.labels.has(label)) return false;
    if (!this.busy) Object.assign(this, { files: 0, done: 0, bytes: 0, stored: 0, sum: 0, rate: 0, from: performance.now(), seenAt: performance.now() });
    this.keys.add(key);
    this.waiting.push({ file, path, key, label, at: null });
    this.files += 1;
    this.bytes += file.size;
    return true;
  }

  next() {
    while (!this.held && this.waiting.length && this.active.size < AT_ONCE) {
      const item = this.waiting.shift();
      this.active.add(item);
      this.run(item).then((why) => this.active.delete(item) && this.end(item, why));
    }
    this.show();
  }

  // why: undefined if it is stored, null if its row says what has happened, else what to say here.
  end(item, why) {
    this.active.delete(item);
    if (why) {
      notice(`${item.file.name}: ${why}`, true);
      this.failed.push(Object.assign(item, { why }));
    } else {
      this.keys.delete(item.key);
      this.labels.delete(item.label);
      this.files -= why === null;
      this.done += why !== null;
      this[why === null ? "bytes" : "stored"] += why === null ? -item.file.size : item.file.size;
    }
    if (!this.busy && this.done) announce(this.text.textContent);
    this.next();
  }

  // A failed file, once more or no more.
  settle(item, again) {
    this.failed.splice(this.failed.indexOf(item), 1);
    if (!again) return this.end(item, null);
    this.waiting.unshift(Object.assign(item, { at: null }));
    return this.next();
  }

  // One file, until it is stored or nothing more can be done; resolves with why, as in end().
  async run(item) {
    const { file } = item;
    for (let tries = 0; this.active.has(item); ) {
      try {
        await file.slice(0, 1).arrayBuffer(); // throws if it has changed or gone
        item.print ??= await fingerprint(file);
      } catch {
        return say.unreadable;
      }
      const { at } = item;
      const { status, response, got } = await this.step(item);
      item.at = null;
      if (status < 0) return say.elsewhere(file.name);
      if (status >= 200 && status < 300) {
        item.at = got("Upload-Offset");
        if (item.at === file.size) return undefined;
        if (item.at > at) tries = 0;
        if (status === 201 && this.held) await this.command("pause", item);
        continue;
      }
      const gone = item.id && (status === 404 || status === 410);
      const row = this.rowOf(item);
      if (gone && row && isFinal(row)) return row.state === "succeeded" ? undefined : null;
      if (gone && !row && this.knows) return say.ended;
      if (response?.code === "upload-taken-over") return say.elsewhere(file.name);
      if (status === 413 && !response) {
        if (this.block === MIB) return say.limit;
        this.block = MIB;
      } else if (!gone && status && (status < 500 || status === 507) && ![408, 409, 423, 425, 429].includes(status)) {
        return `${response?.detail ?? status} ${response?.next ?? ""}`;
      } else {
        item.lost = !status;
        await new Promise((resolve) => setTimeout(item.wake = resolve, got?.("Retry-After") * 1000 || Math.random() * Math.min(15000, 500 * 2 ** tries)));
        item.lost = false;
        tries += 1;
      }
    }
    return null;
  }

  // Whether all that the server has is here just now.
  get knows() {
    return this.app.channel.state === "live" && this.app.store.ready && !this.app.store.wanted;
  }

  rowOf(item) {
    return this.app.store.sorted.find((row) => row.client === item.label);
  }

  // The next request of a file; its outcome, or a negative status if someone else is sending it.
  async step(item) {
    const { file } = item;
    if (item.at !== null) return this.request(item, "PATCH", { "Upload-Offset": item.at }, file.slice(item.at, item.at + this.block));
    if (!item.id) {
      const { store } = this.app;
      if (!this.knows) return { status: 0 };
      // One that has the label was begun from here, and its answer was lost.
      const row = item.label ? this.rowOf(item) : store.sorted.find((one) =>
        printOf(one) === item.print && one.name.split("/").pop() === file.name.normalize() && !isFinal(one) && !this.of(one));
      if (row && !item.sent) {
        await store.recheck(row, {});
        if (row.transfer.connected) return { status: -1 };
      }
      item.id = row?.id;
      item.label ??= row?.client ?? `${this.app.me}.${item.print}.${Math.random().toString(36).slice(2, 9)}`;
      this.labels.set(item.label, item);
    }
    if (item.id) return this.request(item, "HEAD");
    item.sent = true;
    const about = Object.entries({ filename: file.name, filetype: file.type, relativePath: item.path });
    return this.request(item, "POST", { "X-Client-Id": item.label, "Upload-Length": file.size,
      "Upload-Metadata": about.filter(([, value]) => value).map(([key, value]) => `${key} ${base64(value)}`).join() },
    file.size <= Math.min(8 * MIB, this.block) ? file : null);
  }

  // By XMLHttpRequest, because fetch tells no progress of what it sends.
  request(item, method, headers = {}, body = null) {
    return new Promise((resolve) => {
      const xhr = new XMLHttpRequest();
      xhr.open(method, `/tus/${item.id ?? ""}`);
      xhr.responseType = "json";
      for (const name in headers) xhr.setRequestHeader(name, headers[name]);
      if (body) {
        xhr.setRequestHeader("Content-Type", "application/offset+octet-stream");
        Object.assign(item, { xhr, whole: false, leftAt: 0, movedAt: performance.now() });
        xhr.upload.onprogress = ({ loaded, total }) => {
          item.movedAt = performance.now();
          item.whole = loaded === total;
          if (loaded >= MIB) item.leftAt ||= item.movedAt;
        };
      }
      xhr.onloadend = () => {
        const { status, response } = xhr;
        item.xhr = null;
        if (status === 201) item.id = xhr.getResponseHeader("Location").split("/").pop();
        resolve({ status, response, got: (name) => status && Number(xhr.getResponseHeader(name)) });
      };
      xhr.send(body);
    });
  }

  // Each second: does something between here and the server collect a request, or is it stuck?
  watch() {
    const now = performance.now();
    for (const item of this.active) {
      const row = this.rowOf(item);
      if (!item.xhr) continue;
      if (!this.knows || (row && row.state !== "running")) item.movedAt = item.leftAt &&= now;
      const collected = item.leftAt && now - item.leftAt > COLLECTED_MS && this.block === Infinity && !(row?.progress.done > item.at);
      if (collected) {
        this.block = 4 * MIB;
        notice(this.note = say.collected, true);
      }
      if (!item.whole && (collected || now - Math.max(item.movedAt, row?.movedAt ?? 0) > STUCK_MS)) item.xhr.abort();
    }
    const { sum, seenAt } = this;
    this.show();
    this.rate += ((1000 * (this.sum - sum)) / (now - seenAt) - this.rate) / 5;
    this.seenAt = now;
  }

  // For all of this tab

  async command(op, item) {
    try {
      const row = this.rowOf(item);
      if (row) await this.app.channel.command(op, row.id);
    } catch (error) {
      if (error.code === "offline") return notice(words.refused(words.act[op], words.offline), true) ?? false;
    }
    return true;
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
    this.held = true;
    for (const item of this.waiting.splice(0)) this.end(item, null);
    for (const item of this.active) if (await this.command("cancel", item)) {
      item.xhr?.abort();
      this.end(item, null);
    }
    this.held = false;
    this.next();
  }

  // What is shown of all that, and a second's beat while there is something to show
  show() {
    const { active, waiting, failed, busy, held } = this;
    clearTimeout(this.timer);
    if (busy) this.timer = setTimeout(() => this.watch(), 1000);
    this.node.hidden &&= !busy;
    this.sum = this.stored;
    for (const item of active) this.sum += this.rowOf(item)?.progress.done ?? item.at ?? 0;
    const moves = !held && this.rate > 0;
    setText(this.text, !busy ? say.done(this.done, format.bytes(this.stored), format.duration((performance.now() - this.from) / 1000))
      : say.sum([this.files, this.done, waiting.length].map(format.count), [format.pair(this.sum, this.bytes, "bytes"),
        moves && format.rate(this.rate, "bytes"), moves && format.left(Array(2).fill((this.bytes - this.sum) / this.rate))]));
    this.meter.value = this.bytes ? this.sum / this.bytes : 1;
    setText(this.hold, held ? say.resumeAll : say.pauseAll);
    this.hold.hidden = !busy;
    setText(this.stop, busy ? say.cancelAll : words.dismiss);
    setText(this.sub, failed.length ? say.failed(failed.length, failed[0].file.name)
      : [...active].some((item) => item.lost) ? say.lost : held ? say.held : this.note ?? say.safe);
    if (this.told === (this.told = failed.map((item) => item.key).join())) return;
    this.bad.replaceChildren(...failed.slice(0, SHOWN).map((item) => el("li", {}, `${item.file.name}: ${item.why} `,
      [say.drop, say.again].map((label, again) => button(label, () => this.settle(item, again), { class: "quiet", "aria-label": words.of(label, item.file.name) })))),
    failed.length > SHOWN ? say.more(failed.length - SHOWN) : "");
  }
}

// The files of a drop, those of folders with their paths, in order. What can't be read is said once.
export async function dropped({ items }) {
  const wait = (object, method) => new Promise((done, fail) => object[method](done, fail));
  const entries = [...items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry() ?? item.getAsFile());
  const files = [];
  const unread = [];
  while (entries.length && files.length < MOST_FILES) {
    const entry = entries.shift();
    try {
      if (entry.isDirectory) {
        const reader = entry.createReader();
        const inside = [];
        for (let some = [0]; some.length; inside.push(...some)) some = await wait(reader, "readEntries");
        entries.unshift(...inside);
      } else files.push(entry.isFile ? Object.assign(await wait(entry, "file"), { path: entry.fullPath.slice(1) }) : entry);
    } catch {
      unread.push(entry.name);
    }
  }
  if (entries.length) notice(say.many(format.count(MOST_FILES)), true);
  if (unread.length) notice(say.unread(...unread), true);
  return files;
}
