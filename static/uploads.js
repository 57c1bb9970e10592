// Files on their way from this tab to the server, in blocks.
//
// Strategy. A block is one POST that names the offset it begins at, so whatever happens, the next step
// is the same: ask how much is stored and go on from there. Progress, pause and cancel are not here:
// the job's row shows them, and the server lets go of, holds or ends the request. Every upload has a
// client label of its own, <me>.<fingerprint of the file>.<random>: names can't collide, and after a
// reload the same file, chosen again, finds its unfinished job by the fingerprint.

import { words } from "./words.js";

const FIRST_BLOCK = 8 << 20;
const MOST_BLOCK = 64 << 20;
const QUICK_MS = 2000;
const AT_ONCE = 3;
const STEP_MS = 500;
const MOST_MS = 15000;

const random = () => Math.floor(Math.random() * 2 ** 40).toString(36);

export function fingerprint(file) {
  const text = `${file.name}|${file.size}|${file.lastModified}`;
  let a = 0xdeadbeef;
  let b = 0x41c6ce57;
  for (let i = 0; i < text.length; i += 1) {
    a = Math.imul(a ^ text.charCodeAt(i), 2654435761);
    b = Math.imul(b ^ text.charCodeAt(i), 1597334677);
  }
  return ((a >>> 0).toString(36) + (b >>> 0).toString(36)).padEnd(8, "0");
}

class Stop extends Error {}

export class Uploads {
  constructor(me, store, onchange) {
    this.me = me;
    this.store = store;
    this.items = new Set();
    this.onchange = onchange;
    addEventListener("beforeunload", (event) => {
      if ([...this.items].some((item) => item.status !== "failed")) event.preventDefault();
    });
  }

  // The upload of this tab that a job belongs to.
  of(row) {
    return [...this.items].find((item) => item.client === row.client && item.status !== "failed");
  }

  // An unfinished upload of this browser that nobody sends just now.
  isMine(row) {
    return row.kind === "upload" && row.transfer?.protocol === "blocks" && row.client.startsWith(`${this.me}.`);
  }

  add(files) {
    for (const file of files) {
      const print = `${this.me}.${fingerprint(file)}.`;
      const rest = this.store.sorted.find((row) =>
        row.client.startsWith(print) && this.isMine(row) && !row.ended_at && !row.transfer.connected && !this.of(row));
      this.enter(file, rest ? rest.client : print + random(), Boolean(rest));
    }
  }

  // Go on with one job; false if it is another file.
  goOn(row, file) {
    if (!row.client.startsWith(`${this.me}.${fingerprint(file)}.`)) return false;
    if (!this.of(row)) this.enter(file, row.client, true);
    return true;
  }

  enter(file, client, begun) {
    const item = { file, client, status: "waiting", begun, error: "", retryAt: 0, wake: null };
    this.items.add(item);
    this.changed();
    this.next();
  }

  retry(item) {
    item.status = "waiting";
    this.changed();
    this.next();
  }

  drop(item) {
    item.dropped = true;
    item.wake?.();
    this.items.delete(item);
    this.changed();
    this.next();
  }

  changed() {
    this.onchange();
  }

  next() {
    const active = [...this.items].filter((item) => !["waiting", "failed"].includes(item.status)).length;
    for (const item of [...this.items].filter((one) => one.status === "waiting").slice(0, AT_ONCE - active)) {
      item.status = "sending";
      this.run(item);
    }
  }

  async run(item) {
    try {
      await this.send(item);
      this.items.delete(item);
    } catch (error) {
      if (error instanceof Stop) {
        if (!error.message) this.items.delete(item); // the row says what has happened
        item.error = error.message;
      } else {
        item.error = words.uploads.unreadable(item.file.name);
      }
      item.status = "failed";
    }
    this.changed();
    this.next();
  }

  async send(item) {
    const { file } = item;
    let at = item.begun ? await this.offset(item) : 0;
    let size = FIRST_BLOCK;
    let tries = 0;
    while (at !== null) {
      const from = performance.now();
      const block = file.slice(at, at + size);
      if (block.size) await block.slice(0, 1).arrayBuffer(); // throws if the file has changed or gone
      const { status, body } = await this.post(item, at, block);
      if (item.dropped) throw new Stop("");
      if (status === 200) {
        item.begun = true;
        item.status = "sending";
        tries = 0;
        if (body.is_complete) return;
        at = body.bytes_read;
        if (performance.now() - from < QUICK_MS) size = Math.min(MOST_BLOCK, size * 2);
        continue;
      }
      if (body?.code === "upload-terminated") throw new Stop("");
      const goesOn = status === 0 || status === 408 || status === 429 || status === 503
        || ["offset-mismatch", "upload-busy", "upload-finishing"].includes(body?.code);
      if (!goesOn) throw new Stop(`${body?.detail ?? status} ${body?.next ?? ""}`.trim());
      size = FIRST_BLOCK;
      if (body?.code === "paused-too-long") await this.resumed(item);
      else if (body?.code !== "offset-mismatch" || tries > 0) await this.backOff(item, tries);
      tries += 1;
      at = await this.offset(item);
    }
  }

  async post(item, at, block) {
    const query = new URLSearchParams({ file_name: item.file.name, bytes_read: at, file_size: item.file.size });
    const headers = { "X-Client-Id": item.client, "Content-Type": "application/octet-stream" };
    return this.request(`/upload/?${query}`, { method: "POST", headers, body: block });
  }

  async request(url, options) {
    try {
      const answer = await fetch(url, options);
      return { status: answer.status, body: await answer.json() };
    } catch {
      return { status: 0, body: null };
    }
  }

  // Where to go on; null if the job has succeeded. Asks until the server answers.
  async offset(item) {
    const query = new URLSearchParams({ file_name: item.file.name });
    for (let tries = 0; ; tries += 1) {
      if (item.dropped) throw new Stop("");
      const { status, body } = await this.request(`/upload/?${query}`, { headers: { "X-Client-Id": item.client }, cache: "no-store" });
      if (status === 200 && !body.is_complete) {
        item.begun = true;
        item.status = "sending";
        return body.bytes_read;
      }
      // Nothing unfinished is there (a finished file of that name may be anyone's): what became of the job?
      if (status === 200 || status === 404) {
        const ended = await this.ended(item);
        if (ended === "succeeded") return null;
        if (ended === "none" && !item.begun) return 0;
        if (ended === "none") throw new Stop(words.uploads.ended(item.file.name));
        if (ended !== "unknown") throw new Stop("");
      }
      await this.backOff(item, tries);
    }
  }

  async ended(item) {
    const { status, body } = await this.request("/v1/jobs?kind=upload&limit=200", { cache: "no-store" });
    if (status !== 200) return "unknown";
    return body.items.find((row) => row.client === item.client)?.state ?? "none";
  }

  async backOff(item, tries) {
    const wait = Math.random() * Math.min(MOST_MS, STEP_MS * 2 ** tries);
    item.status = "lost";
    item.retryAt = Date.now() + wait;
    this.changed();
    await new Promise((resolve) => {
      item.wake = resolve;
      setTimeout(resolve, wait);
    });
    if (item.dropped) throw new Stop("");
  }

  // Returns when the row is no longer paused.
  async resumed(item) {
    item.status = "paused";
    this.changed();
    await new Promise((resolve) => {
      item.wake = resolve;
      const look = () => {
        const row = this.store.sorted.find((one) => one.client === item.client);
        if (row && ["paused", "pausing"].includes(row.state)) return;
        stop();
        resolve();
      };
      const stop = this.store.listen(look);
      look();
    });
  }
}

// The files of a drop; folders are named, not taken.
export function dropped(transfer) {
  const files = [];
  const folders = [];
  for (const item of transfer.items) {
    if (item.kind !== "file") continue;
    const entry = item.webkitGetAsEntry?.();
    if (entry?.isDirectory) folders.push(entry.name);
    else files.push(item.getAsFile());
  }
  return { files: files.filter(Boolean), folders };
}
