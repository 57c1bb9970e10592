// What can be done with jobs: one, a selection, all of a filter.
//
// Strategy: a command is pending from the click to the server's answer and to the row that shows it; if
// it is refused, what was shown before comes back with the reason. Removing waits for Undo, and so is said
// over HTTP, which the browser carries through even while the page is left.

import { announce, copy, later, notice } from "./dom.js";
import { isFinal, isTransfer } from "./store.js";
import { words } from "./words.js";

const NOTE_MS = 10000;
const ACK_GRACE_MS = 3000;
const BULK = 500;

const doing = new Map(); // of a job's id: {op, version, until}
const notes = new Map(); // of a job's id: why the last command was refused
export const gone = new Set(); // ids that are removed unless Undo is pressed

export function pending(row) {
  const found = doing.get(row.id);
  if (found && (row.version >= found.version || performance.now() > found.until)) doing.delete(row.id);
  return doing.get(row.id)?.op ?? null;
}

export const note = (row) => notes.get(row.id);

// Whether a command can mean something to a job as it is now.
export const can = (row, op) => ({
  pause: !isFinal(row) && !["paused", "pausing", "cancelling"].includes(row.state),
  resume: ["paused", "pausing"].includes(row.state),
  cancel: !isFinal(row) && row.state !== "cancelling",
  force: row.state === "cancelling",
  retry: isFinal(row) && !isTransfer(row),
  delete: isFinal(row),
})[op];

export const toggle = (row) => (can(row, "resume") ? "resume" : "pause");

const reason = (error) => (error.code === "offline" ? error.message || words.offline : [error.message, error.next].filter(Boolean).join(" "));

export async function act(app, row, op) {
  const { id } = row;
  const tell = () => app.store.tell({ rows: new Set([id]) });
  if (op === "choose") return app.chooseFor(row);
  if (op === "delete") return remove(app, [id], row.name);
  if (doing.has(id)) return undefined;
  notes.delete(id);
  const wait = { op: op === "force" ? "cancel" : op, version: Infinity, until: Infinity };
  doing.set(id, wait);
  tell();
  if (op === "retry") app.views.jobs.expect();
  try {
    const ack = await app.channel.command(wait.op, id, op === "force" ? { force: true } : {});
    if (op === "retry") announce(words.process.started(row.name));
    Object.assign(wait, { version: op === "retry" ? 0 : ack.v ?? 0, until: performance.now() + ACK_GRACE_MS });
    setTimeout(tell, ACK_GRACE_MS + 50);
  } catch (error) {
    doing.delete(id);
    notes.set(id, words.refused(words.act[op], reason(error)));
    announce(notes.get(id));
    setTimeout(() => { notes.delete(id); tell(); }, NOTE_MS);
  }
  return tell();
}

// To many: rows, or all that a filter of the server takes.
export async function actMany(app, rows, op, filter) {
  const ids = filter ? [] : rows.filter((row) => can(row, op)).map((row) => row.id);
  if (!filter && !ids.length) return notice(words.many.none(words.act[op]), true);
  if (op === "delete") return remove(app, filter ? rows.filter(isFinal).map((row) => row.id) : ids, words.many.jobs(filter ? "" : ids.length), filter);
  for (const id of ids) {
    notes.delete(id);
    doing.set(id, { op, version: Infinity, until: performance.now() + NOTE_MS });
  }
  app.store.tell({ rows: new Set(ids) });
  const targets = filter ? [{ f: filter }] : [];
  for (let i = 0; i < ids.length; i += BULK) targets.push({ jobs: ids.slice(i, i + BULK) });
  let done = 0;
  const failed = [];
  try {
    for (const target of targets) {
      const ack = await app.channel.command(op, target);
      done += ack.n;
      failed.push(...(ack.failed ?? []));
    }
    notice([words.many.done(words.act[op], done), failed.length ? words.many.failed(failed.length, failed[0].problem?.detail ?? "") : ""].join(" "), failed.length > 0);
  } catch (error) {
    notice(words.refused(words.act[op], reason(error)), true);
  }
  for (const id of ids) doing.delete(id);
  return app.store.tell({ rows: new Set(ids) });
}

function remove(app, ids, name, filter) {
  const back = () => {
    ids.forEach((id) => gone.delete(id));
    app.store.tell({ rows: null });
  };
  ids.forEach((id) => gone.add(id));
  app.store.tell({ rows: null });
  later(words.removed(name), async () => {
    const send = (url, method, body) => fetch(url, { method, keepalive: true, ...(body ? { body: JSON.stringify(body) } : {}) });
    try {
      for (let i = 0; i < (filter ? 1 : ids.length); i += BULK) {
        const answer = ids.length === 1 && !filter ? await send(`/v1/jobs/${ids[0]}`, "DELETE")
          : await send("/v1/jobs/delete", "POST", filter ? { filter } : { ids: ids.slice(i, i + BULK) });
        const said = answer.status === 204 ? {} : await answer.json();
        const why = answer.ok ? said.failed?.[0]?.problem?.detail : said.detail;
        if (why) notice(words.refused(words.act.delete, why), true);
      }
    } catch {
      notice(words.refused(words.act.delete, words.offline), true);
    }
    setTimeout(back, 500); // what is gone was told by an event meanwhile
  }, back);
}

// What a job has left to be fetched: its result, else the first file that it made.
export function fetchable(row) {
  if (row.state !== "succeeded") return null;
  const made = row.artifacts[0];
  const file = row.result?.file ?? made?.file;
  return file ? { url: `/v1/files/${file}/content`, name: row.result?.file ? row.name : made.name } : null;
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The command line that does the same again; of a job as GET /v1/jobs/{id} tells it, with its parameters.
export function curlOf(job) {
  const at = location.origin;
  if (job.kind === "upload") return `curl -F file=@${quote(job.name)} ${at}/upload`;
  const [body, path] = isTransfer(job) ? [{ filename: job.name }, "export"] : [{ kind: job.kind, params: job.params ?? {}, name: job.name }, "v1/jobs"];
  return `curl ${isTransfer(job) ? "-OJ " : ""}-H 'Content-Type: application/json' -d ${quote(JSON.stringify(body))} ${at}/${path}`;
}

export async function detailsOf(row) {
  const answer = await fetch(`/v1/jobs/${row.id}`, { cache: "no-store" });
  return answer.ok ? answer.json() : row;
}

// For openMenu.
export function menuItems(app, row) {
  const found = fetchable(row);
  const item = (op) => can(row, op) && { label: words.act[op], run: () => act(app, row, op), danger: ["cancel", "force", "delete"].includes(op) };
  return [
    { label: words.act.open, run: () => app.go(`job=${row.id}`) },
    item("pause"), item("resume"), item("retry"),
    found && { label: words.act.link, run: () => copy(new URL(found.url, location.href).href) },
    { label: words.act.curl, run: async () => copy(curlOf(await detailsOf(row))) },
    item("cancel"), item("force"), item("delete"),
  ].filter(Boolean);
}
