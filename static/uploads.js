// Files on their way to the server, over tus; after any failure they go on where it stands.

import { button, el, later, notice, setText } from "./dom.js";
import { isFinal, reason } from "./store.js";
import { format, words } from "./words.js";

const MIB = 1 << 20;
const SAMPLE = 16 << 10;
const AT_ONCE = 3;
const MOST_FILES = 20000;
const PATIENCE_MS = 4000;

const say = words.uploads;
const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));

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
    this.items = []; // waiting, sending, failed, done or gone
    this.block = Infinity;
    this.node = el("section", { class: "sending", "aria-label": say.label, hidden: true },
      el("div", {}, this.text = el("span"), this.hold = button("", () => this.all(this.held ? "resume" : "pause")), this.stop = button("", () => {
        this.node.hidden = !this.busy.length;
        if (this.node.hidden) return;
        this.all("pause");
        later(say.cancelled, () => this.all("cancel"), () => this.all("resume"));
      })), el("details", {}, this.sub = el("summary"), this.bad = el("ul")));
    app.store.listen(({ now, event }) => {
      if (now && this.busy.length) this.beat();
      const item = event && this.those("sending").find(({ label, wish }) => wish && label === event.row.client);
      if (item) this.tell(item.wish, [item]);
    });
    addEventListener("online", () => this.wake());
    addEventListener("beforeunload", (event) => { if (this.busy.length) event.preventDefault(); });
    // Else the server would hold a paused request for an hour, and take it for a sender.
    addEventListener("pagehide", () => { for (const { id } of this.those("sending")) fetch(`/tus/${id}`, { method: "HEAD", keepalive: true }); });
  }

  those(...states) {
    return this.items.filter((item) => states.includes(item.state));
  }

  get busy() {
    return this.those("waiting", "sending");
  }

  of(row) {
    return this.busy.find((item) => item.label === row.client);
  }

  // The fingerprint of the file of an upload that this page can go on with.
  printOf(row) {
    return row.kind === "upload" && /\.(\w+-\w+)\.\w+$/.exec(row.client)?.[1];
  }

  add(files, label) {
    if (!this.busy.length) {
      Object.assign(this, { items: this.those("failed"), heardAt: performance.now(), sum: 0, rate: 0 });
      this.node.hidden = false;
    }
    const known = new Set(this.busy.map((item) => item.key));
    const twice = [];
    const failed = this.those("failed");
    for (const file of files) {
      const path = file.path || file.webkitRelativePath || file.name;
      const key = `${path}|${file.size}|${file.lastModified}`;
      for (const item of failed) if (item.path === path) this.become(item, "gone");
      if (known.size === known.add(key).size) twice.push(file.name);
      else this.items.push({ file, path, key, label, at: null, state: "waiting" });
    }
    if (twice.length) notice(say.twice(...twice), true);
    this.next();
  }

  async goOn(row, file) {
    const same = await fingerprint(file).catch(() => "") === this.printOf(row);
    if (same && !this.of(row)) this.add([file], row.client);
    return same;
  }

  next() {
    if (!this.held) for (const item of this.those("waiting").slice(0, AT_ONCE - this.those("sending").length)) {
      item.state = "sending";
      this.run(item).catch((why) => why).then((why) => this.become(item, why ? "failed" : why === null ? "gone" : "done", why));
    }
    this.show();
  }

  become(item, state, why) {
    const { name } = item.file;
    item.line?.remove();
    Object.assign(item, { state, at: null, id: null, label: null, sent: false });
    if (why) {
      if (!this.bad.firstChild) notice(`${name}: ${why}`, true);
      this.bad.append(item.line = el("li", {}, `${name}: ${why} `, [[say.again, "waiting"], [say.drop, "gone"]].map(([label, next]) =>
        button(label, () => this.become(item, next), { class: "quiet", "aria-label": words.of(label, name) }))));
    }
    this.next();
  }

  // Its outcome: nothing if it is stored, null if the row says why not, else a text that does.
  async run(item) {
    const { file } = item;
    for (let tries = 0; ;) {
      await file.slice(0, 1).arrayBuffer().catch(() => { throw say.unreadable; });
      item.print ??= await fingerprint(file);
      const { at } = item;
      const xhr = await this.step(item);
      const { status, response } = xhr;
      item.at = null;
      if (response?.code === "upload-taken-over") return say.elsewhere;
      if (status && status < 300) {
        item.at = Number(xhr.getResponseHeader("Upload-Offset"));
        if (item.at === file.size) return;
        if (at !== null) tries = 0;
        continue;
      }
      const row = this.rowOf(item);
      if ([404, 410].includes(status) && this.knows && (!row || isFinal(row))) return !row ? say.ended : row.state === "succeeded" ? undefined : null;
      // A proxy's limit; its answer can't always be read while a body is sent.
      const limited = status === 413 && !response;
      if (limited && item.size <= MIB) return say.limit;
      if (limited || (at !== null && !response && tries > 1)) this.block = MIB;
      if (status && !limited && (status < 500 || status === 507) && ![404, 408, 409, 410, 423, 425, 429].includes(status)) {
        return reason({ ...response, message: response?.detail ?? status });
      }
      await new Promise((resolve) => {
        setTimeout(item.wake = resolve, Math.random() * Math.min(15000, 500 * 2 ** tries));
        this.show();
      });
      item.wake = null;
      tries += 1;
    }
  }

  get knows() {
    return this.app.channel.state === "live" && !this.app.store.wanted;
  }

  rowOf(item) {
    return this.app.store.sorted.find((row) => row.client === item.label);
  }

  async step(item) {
    const { file } = item;
    if (item.at !== null) return this.request(item, "PATCH", { "Upload-Offset": item.at }, file.slice(item.at, item.at + this.block));
    if (!item.id) {
      const { store, me } = this.app;
      if (!this.knows) return { status: 0 };
      const row = item.label ? this.rowOf(item) : store.sorted.find((one) =>
        this.printOf(one) === item.print && one.name.split("/").pop() === file.name.normalize() && !isFinal(one) && !this.of(one));
      if (row && !item.sent) { // else only the answer was lost
        await store.recheck(row, {});
        if (row.transfer.connected) throw say.elsewhere;
      }
      item.id = row?.id;
      item.label ??= row?.client ?? `${me}.${item.print}.${Math.random().toString(36).slice(2, 9)}`;
    }
    if (item.id) return this.request(item, "HEAD");
    const body = !item.sent && file.size <= Math.min(8 * MIB, this.block) ? file : null;
    item.sent = true;
    return this.request(item, "POST", { "X-Client-Id": item.label, "Upload-Length": file.size,
      "Upload-Metadata": `filename ${base64(file.name)},filetype ${base64(file.type)},relativePath ${base64(item.path)}` }, body);
  }

  async request(item, method, headers = {}, body = null) {
    const xhr = item.xhr = new XMLHttpRequest();
    xhr.open(method, `/tus/${item.id ?? ""}`);
    xhr.responseType = "json";
    for (const name in headers) xhr.setRequestHeader(name, headers[name]);
    xhr.setRequestHeader("Content-Type", "application/offset+octet-stream");
    Object.assign(item, { leftAt: 0, size: body?.size });
    xhr.upload.onprogress = ({ loaded }) => { if (loaded >= MIB) item.leftAt ||= performance.now(); };
    xhr.send(body);
    await new Promise((resolve) => { xhr.onloadend = resolve; });
    if (xhr.status === 201) item.id = xhr.getResponseHeader("Location").split("/").pop();
    return xhr;
  }

  wake() {
    for (const item of this.those("sending")) {
      item.wake?.();
      item.xhr?.abort(); // it may wait for a network that is no more
    }
  }

  beat() {
    const now = performance.now();
    for (const item of this.those("sending")) {
      const row = this.rowOf(item);
      if (row?.state === "paused") item.leftAt = 0;
      if (item.leftAt && now - item.leftAt > PATIENCE_MS && this.block === Infinity && !(row?.progress.done > item.at)) {
        this.block = 4 * MIB;
        notice(say.collected, true);
        item.xhr.abort();
      }
    }
    const { sum, heardAt } = this;
    if (now - heardAt > PATIENCE_MS) this.wake();
    this.show();
    this.rate += ((1000 * (this.sum - sum)) / (now - heardAt) - this.rate) / (this.rate ? 5 : 1);
    this.heardAt = now;
  }

  all(op) {
    this.held = op === "pause";
    if (op === "cancel") for (const item of this.those("waiting")) item.state = "gone";
    this.tell(op, this.those("sending"));
    this.next();
  }

  // A command to these; one whose job is still being made gets it as soon as that is here.
  tell(op, items) {
    const jobs = [];
    for (const item of items) {
      const row = this.rowOf(item);
      item.wish = row || op === "resume" ? null : op;
      if (row) jobs.push(row.id);
    }
    if (jobs.length) this.app.channel.command(op, { jobs }).catch((error) => notice(words.refused(words.act[op], error.message), true));
  }

  show() {
    const { busy: { length: busy }, held } = this;
    const [waiting, sending, failed, done] = ["waiting", "sending", "failed", "done"].map((state) => this.those(state));
    const bytes = (items) => items.reduce((sum, item) => sum + item.file.size, 0);
    const all = bytes([...waiting, ...sending, ...done]);
    this.sum = sending.reduce((sum, item) => sum + (this.rowOf(item)?.progress.done ?? item.at ?? 0), bytes(done));
    const s = (all - this.sum) / this.rate;
    const pace = this.rate > 1 && this.app.channel.state === "live" ? ` · ${format.rate(this.rate, "bytes")} · ${format.left([s, s])}` : "";
    setText(this.text, busy ? say.sum(busy + done.length, done.length, waiting.length, format.pair(this.sum, all, "bytes") + pace)
      : say.done(done.length, format.bytes(this.sum)));
    setText(this.hold, held ? say.resumeAll : say.pauseAll);
    this.hold.style.visibility = busy ? "" : "hidden";
    setText(this.stop, busy ? say.cancelAll : words.dismiss);
    setText(this.sub, failed.length ? say.failed(failed.length, failed[0].file.name)
      : sending.some((item) => item.wake) ? say.lost : held ? say.held : busy ? say.safe : "");
  }
}

export async function dropped({ items }) {
  const wait = (object, method) => new Promise((done, fail) => object[method](done, fail));
  const files = [];
  const left = [];
  const walk = async (entry) => {
    try {
      if (entry.isDirectory) {
        for (let some = [0], reader = entry.createReader(); some.length;) {
          some = await wait(reader, "readEntries");
          for (const inside of some) await walk(inside);
        }
      } else if (files.length === MOST_FILES) left.push(entry.name);
      else files.push(entry.isFile ? Object.assign(await wait(entry, "file"), { path: entry.fullPath.slice(1) }) : entry);
    } catch {
      left.push(entry.name);
    }
  };
  // All of them now: the browser forgets the drop.
  for (const entry of [...items].map((item) => item.webkitGetAsEntry() ?? item.getAsFile())) if (entry) await walk(entry);
  if (left.length) notice(say.left(...left), true);
  return files;
}
