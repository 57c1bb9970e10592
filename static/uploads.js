// Files on their way from this tab to the server, over tus.
//
// Strategy. Whatever happens: ask how much is stored, and go on from there. Pause and cancel are the job's: the
// server holds or ends the request. The label of an upload, <me>.<size-hash>.<random>, finds it again: after a lost
// answer or a reload, and in another browser. What is sent elsewhere is left alone.

import { announce, ask, button, el, notice, setText } from "./dom.js";
import { isFinal } from "./store.js";
import { format, words } from "./words.js";

const MIB = 1 << 20;
const SAMPLE = 16 << 10;
const AT_ONCE = 3;
const SHOWN = 50;
const MOST_FILES = 20000;
const COLLECTED_MS = 3000;
const STUCK_MS = 30000;

const say = words.uploads;
const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
const printOf = (row) => row.kind === "upload" && /\.(\w+-\w+)\.\w+$/.exec(row.client)?.[1];

// The size, and a hash of samples from the whole length: it only finds. (crypto.subtle is missing on plain http.)
async function fingerprint(file) {
  const samples = [];
  for (let at = 0; at < file.size; at += Math.max(SAMPLE, (file.size - SAMPLE) / 16)) samples.push(file.slice(at, at + SAMPLE));
  let hash = 1;
  for (const byte of new Uint8Array(await new Blob(samples).arrayBuffer())) hash = (hash * 257 + byte) % 17592186044399;
  return `${file.size.toString(36)}-${hash.toString(36)}`;
}

export class Uploads {
  constructor(app) {
    this.app = app;
    this.items = []; // with a state: waiting, sending, failed, done; or gone, if nothing is to be said of it
    this.block = Infinity; // bytes in a request, once something between has shown that it needs a bound
    this.text = el("span");
    this.meter = el("progress", { "aria-label": say.label });
    this.hold = button("", () => (this.held ? this.resumeAll() : this.pauseAll()));
    this.stop = button("", async () => {
      if (!this.busy.length) this.node.hidden = true;
      else if (await ask(say.sure, [], [{ value: "", label: say.keep }, { value: "yes", label: say.cancelAll, kind: "danger" }])) this.cancelAll();
    });
    this.sub = el("summary");
    this.bad = el("ul");
    this.node = el("section", { class: "sending", "aria-label": say.label, hidden: true },
      el("div", {}, this.text, this.hold, this.stop), this.meter, el("details", {}, this.sub, this.bad));
    const wake = () => { for (const item of this.items) item.wake?.(); };
    app.store.listen(({ rows, event }) => {
      if (rows === null) wake();
      else if (event && event.from !== event.to) this.of(event.row)?.wake?.();
    });
    addEventListener("online", wake);
    addEventListener("beforeunload", (event) => { if (this.busy.length) event.preventDefault(); });
    // Else the server would hold a paused request for an hour, and take it for a sender.
    addEventListener("pagehide", () => { for (const { id } of this.those("sending")) if (id) fetch(`/tus/${id}`, { method: "HEAD", keepalive: true }); });
  }

  those(...states) {
    return this.items.filter((item) => states.includes(item.state));
  }

  get busy() {
    return this.those("waiting", "sending");
  }

  // The upload of this tab that a job belongs to.
  of(row) {
    return this.busy.find((item) => item.label === row.client);
  }

  // Whether the same file, chosen here, can go on with it.
  isMine(row) {
    return printOf(row);
  }

  // label: of the upload that the files are for.
  add(files, label) {
    if (!this.busy.length) {
      Object.assign(this, { items: this.those("failed"), from: performance.now(), seenAt: performance.now(), sum: 0, rate: 0, beats: 0 });
      this.node.hidden = false;
    }
    const known = new Set(this.busy.map((item) => item.key));
    const failed = this.those("failed");
    const twice = [];
    for (const file of files) {
      const path = file.path ?? (file.webkitRelativePath || file.name);
      const key = `${path}|${file.size}|${file.lastModified}`;
      for (const item of failed) if (item.path === path) item.state = "gone";
      if (known.size === known.add(key).size) twice.push(file.name);
      else this.items.push({ file, path, key, label, at: null, state: "waiting" });
    }
    if (twice.length) notice(say.twice(...twice), true);
    this.next();
  }

  // Go on with one job; false if it is another file.
  async goOn(row, file) {
    const same = await fingerprint(file).catch(() => "") === printOf(row);
    if (same && !this.of(row)) this.add([file], row.client);
    return same;
  }

  next() {
    const free = AT_ONCE - this.those("sending").length;
    if (!this.held) for (const item of this.those("waiting").slice(0, free)) {
      item.state = "sending";
      this.run(item).then((why) => this.end(item, why));
    }
    this.show();
  }

  // why: undefined if it is stored, null if its row says why not, else what to say.
  end(item, why) {
    if (item.state !== "sending") return;
    item.state = why ? "failed" : why === null ? "gone" : "done";
    item.why = why;
    if (why && this.those("failed").length === 1) notice(`${item.file.name}: ${why}`, true);
    this.next();
    if (!this.busy.length) announce(this.text.textContent);
  }

  async run(item) {
    const { file } = item;
    let stuckAt = null;
    for (let tries = 0; item.state === "sending"; ) {
      try {
        await file.slice(0, 1).arrayBuffer(); // throws if it has changed or gone
        item.print ??= await fingerprint(file);
      } catch {
        return say.unreadable;
      }
      const { at } = item;
      const xhr = await this.step(item);
      const { status, response } = xhr;
      const got = (name) => status && Number(xhr.getResponseHeader(name));
      item.at = null;
      if (status < 0 || response?.code === "upload-taken-over") return say.elsewhere(file.name);
      if (status >= 200 && status < 300) {
        item.at = got("Upload-Offset");
        if (item.at === file.size) return undefined;
        if (item.at > at) tries = 0;
        continue;
      }
      const gone = item.id && (status === 404 || status === 410);
      const row = this.rowOf(item);
      if (gone && row && isFinal(row)) return row.state === "succeeded" ? undefined : null;
      if (gone && !row && this.knows) return say.ended;
      // A proxy's limit, which can't always be read while a body is sent.
      const limited = status === 413 && !response;
      if (limited && this.block === MIB) return say.limit;
      if (limited || (!response && at !== null && at === stuckAt)) this.block = MIB;
      stuckAt = at ?? stuckAt;
      if (limited) continue;
      if (!gone && status && (status < 500 || status === 507) && ![408, 409, 423, 425, 429].includes(status)) {
        return `${response?.detail ?? status} ${words.next[response?.code] ?? response?.next ?? ""}`;
      }
      const wait = (row?.state !== "running" && got("Retry-After") * 1000) || Math.random() * Math.min(15000, 500 * 2 ** tries);
      await new Promise((resolve) => setTimeout(item.wake = resolve, wait));
      item.wake = null;
      tries += 1;
    }
    return null;
  }

  get knows() {
    return this.app.channel.state === "live" && this.app.store.ready && !this.app.store.wanted;
  }

  rowOf(item) {
    return this.app.store.sorted.find((row) => row.client === item.label);
  }

  // The next request of a file; a status below 0 if someone else is sending it.
  async step(item) {
    const { file } = item;
    if (item.at !== null) return this.request(item, "PATCH", { "Upload-Offset": item.at }, file.slice(item.at, item.at + this.block));
    if (!item.id) {
      const { store, me } = this.app;
      if (!this.knows) return { status: 0 };
      // One that has the label and was sent lacks the answer only.
      const row = item.label ? this.rowOf(item) : store.sorted.find((one) =>
        printOf(one) === item.print && one.name.split("/").pop() === file.name.normalize() && !isFinal(one) && !this.of(one));
      if (row && !item.sent) {
        await store.recheck(row, {});
        if (row.transfer.connected) return { status: -1 };
      }
      item.id = row?.id;
      item.label ??= row?.client ?? `${me}.${item.print}.${Math.random().toString(36).slice(2, 9)}`;
    }
    if (item.id) return this.request(item, "HEAD");
    const body = !item.sent && file.size <= Math.min(8 * MIB, this.block) ? file : null;
    item.sent = true;
    const about = Object.entries({ filename: file.name, filetype: file.type, relativePath: item.path });
    return this.request(item, "POST", { "X-Client-Id": item.label, "Upload-Length": file.size,
      "Upload-Metadata": about.map(([key, value]) => `${key} ${base64(value)}`).join() }, body);
  }

  // By XMLHttpRequest, because fetch tells no progress of what it sends.
  request(item, method, headers = {}, body = null) {
    return new Promise((resolve) => {
      const xhr = new XMLHttpRequest();
      xhr.open(method, `/tus/${item.id ?? ""}`);
      xhr.responseType = "json";
      for (const name in headers) xhr.setRequestHeader(name, headers[name]);
      if (body) xhr.setRequestHeader("Content-Type", "application/offset+octet-stream");
      Object.assign(item, { xhr, whole: !body, leftAt: 0, movedAt: performance.now() });
      xhr.upload.onprogress = ({ loaded, total }) => {
        item.movedAt = performance.now();
        item.whole = loaded === total;
        if (loaded >= MIB) item.leftAt ||= item.movedAt;
      };
      xhr.onloadend = () => {
        if (xhr.status === 201) item.id = xhr.getResponseHeader("Location").split("/").pop();
        resolve(xhr);
      };
      xhr.send(body);
    });
  }

  // Each second: does something between here and the server collect a request, or is it stuck?
  watch() {
    const now = performance.now();
    for (const item of this.those("sending")) {
      const row = this.rowOf(item);
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
    this.beats += 1;
    this.rate += ((1000 * (this.sum - sum)) / (now - seenAt) - this.rate) / Math.min(5, this.beats);
    this.seenAt = now;
  }

  async command(op) {
    this.held = op !== "resume";
    const ids = this.those("sending").map((item) => this.rowOf(item)?.id).filter(Boolean);
    try {
      if (ids.length) await this.app.channel.command(op, { jobs: ids });
    } catch (error) {
      notice(words.refused(words.act[op], error.message), true);
    }
    this.next();
  }

  pauseAll() {
    return this.command("pause");
  }

  resumeAll() {
    return this.command("resume");
  }

  async cancelAll() {
    for (const item of this.those("waiting")) item.state = "gone";
    await this.command("cancel");
    this.held = false;
    this.next();
  }

  show() {
    const { busy: { length: busy }, held } = this;
    const [waiting, sending, failed, done] = ["waiting", "sending", "failed", "done"].map((state) => this.those(state));
    clearTimeout(this.timer);
    if (busy) this.timer = setTimeout(() => this.watch(), 1000);
    const bytes = (items) => items.reduce((sum, item) => sum + item.file.size, 0);
    const all = bytes([...waiting, ...sending, ...done]);
    this.sum = sending.reduce((sum, item) => sum + (this.rowOf(item)?.progress.done ?? item.at ?? 0), bytes(done));
    const moves = !held && this.rate > 0;
    setText(this.text, busy ? say.sum([busy + done.length, done.length, waiting.length].map(format.count), [format.pair(this.sum, all, "bytes"),
      moves && format.rate(this.rate, "bytes"), moves && format.left(Array(2).fill((all - this.sum) / this.rate))])
      : say.done(done.length, format.bytes(this.sum), format.duration((performance.now() - this.from) / 1000)));
    this.meter.value = all ? this.sum / all : 1;
    setText(this.hold, held ? say.resumeAll : say.pauseAll);
    this.hold.style.visibility = busy ? "" : "hidden";
    setText(this.stop, busy ? say.cancelAll : words.dismiss);
    setText(this.sub, failed.length ? say.failed(failed.length, failed[0].file.name)
      : sending.some((item) => item.wake && this.rowOf(item)?.state !== "paused") ? say.lost : held ? say.held : this.note ?? say.safe);
    if (this.told === (this.told = failed.map((item) => item.key).join())) return;
    const change = (item, state) => () => {
      Object.assign(item, { state, at: null, id: null, label: null, sent: false });
      this.next();
    };
    this.bad.replaceChildren(...failed.slice(0, SHOWN).map((item) => el("li", {}, `${item.file.name}: ${item.why} `,
      [[say.again, "waiting"], [say.drop, "gone"]].map(([label, state]) =>
        button(label, change(item, state), { class: "quiet", "aria-label": words.of(label, item.file.name) })))));
  }
}

// The files of a drop, those of folders with their paths, in order. What can't be read is said once.
export async function dropped({ items }) {
  const wait = (object, method) => new Promise((done, fail) => object[method](done, fail));
  const files = [];
  const unread = [];
  const walk = async (entry) => {
    try {
      if (!entry.isDirectory) files.push(entry.isFile ? Object.assign(await wait(entry, "file"), { path: entry.fullPath.slice(1) }) : entry);
      else for (let some = [0], reader = entry.createReader(); some.length && files.length < MOST_FILES;) {
        some = await wait(reader, "readEntries");
        for (const inside of some) await walk(inside);
      }
    } catch {
      unread.push(entry.name);
    }
  };
  // All of them now: the browser forgets the drop.
  for (const entry of [...items].filter((item) => item.kind === "file").map((item) => item.webkitGetAsEntry() ?? item.getAsFile())) await walk(entry);
  if (files.length >= MOST_FILES) notice(say.many(format.count(files.length)), true);
  if (unread.length) notice(say.unread(...unread), true);
  return files;
}
