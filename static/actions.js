// What can be done with jobs: one, a selection, all of a filter.
//
// A command is pending from the click to the server's answer; if it is refused, what was shown before comes
// back with the reason. Removing waits for Undo.

import { announce, copy, later, notice } from "./dom.js";
import { isFinal, isTransfer, json, reason } from "./store.js";
import { words } from "./words.js";

const BULK = 500;

const doing = new Map(); // the command that a job's id waits for
export const gone = new Set(); // ids that are removed unless Undo is pressed

export const pending = (row) => doing.get(row.id);

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

const chunks = (ids) => (ids.length ? [ids.slice(0, BULK), ...chunks(ids.slice(BULK))] : []);

// To rows, or to all that a filter of the server takes.
export async function act(app, rows, op, filter) {
  if (op === "choose") return app.choose({ row: rows[0] });
  const ids = rows.filter((row) => can(row, op) && !doing.has(row.id)).map((row) => row.id);
  const one = !filter && ids.length === 1;
  const name = one ? rows.find((row) => row.id === ids[0]).name : words.many.jobs(filter ? "" : ids.length);
  if (!ids.length && !filter) return undefined;
  if (op === "delete") return remove(app, ids, name, filter);
  const tell = () => app.store.tell({ rows: new Set(ids) });
  for (const id of ids) doing.set(id, op === "force" ? "cancel" : op);
  tell();
  if (op === "retry") app.views.jobs.expect();
  try {
    let n = 0;
    const failed = [];
    for (const target of filter ? [{ f: filter }] : one ? ids : chunks(ids).map((jobs) => ({ jobs }))) {
      const ack = await app.channel.command(op === "force" ? "cancel" : op, target, op === "force" ? { force: true } : {});
      n += ack.n;
      failed.push(...(ack.failed ?? []));
    }
    if (!one) notice(words.many.done(words.act[op], n, failed.length, failed[0]?.problem.detail), failed.length > 0);
    else if (op === "retry") announce(words.process.started(name));
  } catch (error) {
    notice(words.refused(words.act[op], `${name}: ${reason(error)}`), true);
  }
  for (const id of ids) doing.delete(id);
  return tell();
}

function remove(app, ids, name, filter) {
  const show = (how) => {
    ids.forEach((id) => gone[how](id));
    app.store.tell({ rows: null });
  };
  const back = () => show("delete");
  show("add");
  later(words.removed(name), async () => {
    const failed = [];
    try {
      for (const body of filter ? [{ filter }] : chunks(ids).map((some) => ({ ids: some }))) {
        // keepalive: it is carried through while the page is left
        const answer = await json("/v1/jobs/delete", { method: "POST", keepalive: true, body: JSON.stringify(body) });
        failed.push(...(answer.failed ?? []));
      }
      if (failed.length) throw new Error(failed[0].problem.detail);
    } catch (error) {
      notice(words.refused(words.act.delete, reason(error)), true);
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
function curlOf(job) {
  const at = location.origin;
  if (job.kind === "upload") return `curl -F file=@${quote(job.name)} ${at}/upload`;
  const [body, path] = isTransfer(job) ? [{ filename: job.name }, "export"] : [{ kind: job.kind, params: job.params ?? {}, name: job.name }, "v1/jobs"];
  return `curl ${isTransfer(job) ? "-OJ " : ""}-H 'Content-Type: application/json' -d ${quote(JSON.stringify(body))} ${at}/${path}`;
}

const detailsOf = (row) => json(`/v1/jobs/${row.id}`).catch(() => row);

// For openMenu.
export function menuItems(app, row) {
  const item = (op) => can(row, op) && { label: words.act[op], run: () => act(app, [row], op), danger: ["cancel", "force", "delete"].includes(op) };
  return [
    { label: words.act.open, run: () => app.go(`job=${row.id}`) },
    item("pause"), item("resume"), item("retry"),
    { label: words.act.curl, run: async () => copy(curlOf(await detailsOf(row))) },
    item("cancel"), item("force"), item("delete"),
  ].filter(Boolean);
}
