// The view of stored files: the newest version of each name, and what can be done with those that are chosen.
//
// Strategy: the list is read anew from its top, as far as it is shown, and compared with what is there by id, so that
// rows stay where they are. What is new waits behind a button while the pointer or the focus is in the list. A row
// that is deleted hides at once; the request goes when Undo is over. The boxes are the selection.

import { button, copy, el, icon, later, notice, setText } from "./dom.js";
import { begin, clear, form, json, kinds, refuse, resolve, say, sender, soon } from "./process-view.js";
import { format, words } from "./words.js";

const PAGE = 100;
const ROWS = /\.(csv|tsv|jsonl|ndjson)$|csv|json|sqlite/i;
const sizes = (files) => format.bytes(files.reduce((sum, { bytes }) => sum + bytes, 0));
const isTable = (file) => /sqlite/.test(file.media_type);

// The names of the columns and the first rows: of a table as the server filters them, else of the first 64 KiB.
async function head(file, columns, where) {
  const query = new URLSearchParams([["limit", 10], ...columns.map((name) => ["columns", name]), ...(where ? [["where", where]] : [])]);
  const [url, headers] = isTable(file) ? [`/v1/tables/${file.id}/rows?${query}`, { Accept: "text/csv" }]
    : [`/v1/files/${file.id}/content`, { Range: "bytes=0-65535" }];
  const answer = await fetch(url, { headers });
  if (!answer.ok) { const said = await answer.json(); throw Object.assign(new Error(said.detail), said); }
  const text = await answer.text();
  if (/jsonl|ndjson/.test(file.name + file.media_type)) {
    const rows = text.split("\n", 11).slice(0, -1).map((line) => JSON.parse(line));
    const names = columns.length ? columns : [...new Set(rows.flatMap(Object.keys))];
    return [names, ...rows.map((row) => names.map((name) => row[name]))];
  }
  const rows = [[]];
  const by = /\.tsv$/i.test(file.name) ? "\t" : ",";
  for (const [, value, end] of text.replace(/^\ufeff/, "").matchAll(RegExp(`("(?:[^"]|"")*"|[^${by}\\r\\n]*)(${by}|\\r?\\n|$)`, "gy"))) {
    rows.at(-1).push(value.replace(/^"|"$/g, "").replaceAll('""', '"'));
    if (!end || (end !== by && rows.push([]) > 11)) break;
  }
  if (!rows.at(-1).join("") || text.length > 65000) rows.pop();
  const at = columns.map((name) => rows[0].indexOf(name));
  return columns.length ? rows.map((row) => at.map((i) => row[i])) : rows;
}

export class FilesView {
  constructor(app) {
    this.app = app;
    this.rows = new Map();
    this.gone = new Set();
    this.want = PAGE;
    this.list = el("ul", { class: "files", "aria-label": words.views.files, onclick: (event) => this.pick(event) });
    this.more = button(words.files.more, () => { this.want += PAGE; this.load(true); }, { class: "older", hidden: true });
    this.search = el("input", { type: "search", "aria-label": words.search, placeholder: words.searchHint, oninput: soon(() => {
      history.replaceState(null, "", `#files${this.search.value ? `?${new URLSearchParams({ q: this.search.value })}` : ""}`);
      this.load(true);
    }) });
    this.all = el("input", { type: "checkbox", "aria-label": words.many.all, onchange: () => this.pickAll(this.all.checked) });
    this.picked = el("span");
    this.fresh = button("", () => this.load(true), { class: "fresh", hidden: true });
    this.acts = ["export", "archive", "process", "delete"].map((op) => button(words.files[op], () => this[op](this.chosen), { class: op === "delete" ? "danger" : null }));
    this.bar = el("div", { class: "picks" }, el("label", { class: "kind" }, this.all), this.picked, el("div", { class: "many-acts" }, this.acts), this.fresh);
    this.none = el("p", { class: "nothing", hidden: true }, words.files.none);
    this.empty = el("div", { class: "empty", hidden: true }, icon("file"), el("p", {}, words.empty.files),
      button(words.empty.choose, () => app.choose(), { class: "primary" }));
    this.node = el("div", {}, el("div", { class: "view-head" }, el("h1", {}, words.views.files), el("div", { class: "finds" }, this.search), button(words.drop.upload, () => app.choose(), { class: "primary" })),
      this.bar, this.list, this.more, this.none, this.empty);
    app.store.listen(({ event, rows }) => { if (!this.node.hidden && (event?.to === "succeeded" || rows === null)) this.load(); });
  }

  show(params) {
    this.search.value = params.get("q") ?? "";
    this.load(true);
  }

  key({ key, ctrlKey, metaKey }) {
    const run = { "/": () => this.search.focus(), Delete: () => this.delete(this.chosen), Escape: () => this.pickAll(false),
      a: (ctrlKey || metaKey) && (() => this.pickAll(true)) }[key];
    run?.();
    return run;
  }

  pickAll(on) {
    for (const { box, node } of this.rows.values()) box.checked = on && !node.hidden;
    this.count();
  }

  get chosen() {
    return [...this.rows.values()].filter(({ box, node }) => box.checked && !node.hidden).map(({ file }) => file);
  }

  async load(now) {
    const asked = (this.asked = {});
    const files = [];
    let after = "";
    try {
      do {
        const page = await json(`/v1/files?newest=1&limit=${PAGE}&${new URLSearchParams({ q: this.search.value, ...(after && { after }) })}`);
        files.push(...page.items);
        after = page.next;
      } while (after && files.length < this.want);
    } catch {
      return; // the banner tells; the next snapshot loads again
    }
    if (asked !== this.asked) return;
    const fresh = files.filter(({ id }) => !this.rows.has(id)).length;
    this.fresh.hidden = now || !fresh || !this.list.matches(":hover, :focus-within");
    this.fresh.textContent = words.files.fresh(fresh);
    if (this.fresh.hidden) this.draw(files, after);
  }

  draw(files, next) {
    const ids = new Set(files.map(({ id }) => id));
    for (const [id, { node }] of this.rows) {
      if (ids.has(id)) continue;
      this.leave(node);
      node.remove();
      this.rows.delete(id);
    }
    let at = this.list.firstChild;
    for (const file of files) {
      let row = this.rows.get(file.id);
      if (!row) this.rows.set(file.id, row = this.row(file));
      if (row.node === at) at = at.nextSibling;
      else this.list.insertBefore(row.node, at);
    }
    this.more.hidden = !next;
    this.hide();
  }

  hide() {
    for (const node of this.list.querySelectorAll("[data-file]")) {
      const gone = this.gone.has(node.dataset.file);
      if (gone && !node.hidden) this.leave(node);
      node.hidden = gone;
    }
    const any = this.list.querySelector(":scope > :not([hidden])");
    this.list.hidden = !any;
    this.none.hidden = any || !this.search.value;
    this.empty.hidden = any || this.search.value;
    this.count();
  }

  // The focus goes to a neighbour when its row goes.
  leave(node) {
    if (!node.contains(document.activeElement)) return;
    const next = [...this.list.querySelectorAll(":scope > :not([hidden])")].filter((one) => one !== node);
    (next.find((one) => one.compareDocumentPosition(node) & 2) ?? next.at(-1))?.querySelector("input").focus();
  }

  row(file, old = false) {
    const digest = file.digest["sha-256"];
    const box = el("input", { type: "checkbox", "aria-label": words.of(words.select, file.name) });
    const versions = el("ul");
    const node = el("li", { "data-file": file.id }, old ? el("span") : el("label", { class: "kind" }, icon("file"), box),
      el("div", { class: "what" }, el("div", { class: "name", title: file.name }, file.name),
        el("div", { class: "sub" }, words.files.version(file.version), " · ", file.media_type,
          digest && [" · ", button(`SHA-256 ${digest.slice(0, 4)}…${digest.slice(-4)}`, () => copy(digest), { class: "link", title: digest, "aria-label": words.of(words.files.digest, file.name) })],
          file.expires_at && ` · ${words.files.expires(format.time(file.expires_at))}`,
          file.job && [" · ", el("a", { href: `#job=${file.job}`, "aria-label": words.of(words.files.job, file.name) }, words.files.job)])),
      el("div", { class: "num much" }, el("b", {}, format.bytes(file.bytes))),
      el("div", { class: "num pace" }, el("small", { title: format.exact(file.created_at) }, format.time(file.created_at))),
      el("div", { class: "acts" },
        el("a", { class: "textual", href: `/v1/files/${file.id}/content`, download: file.name,
          "aria-label": words.of(words.act.download, file.name) }, words.act.download),
        button(icon("trash"), () => this.delete([file]), { title: words.files.delete, "aria-label": words.of(words.files.delete, file.name) })),
      old || file.version === 1 ? null : el("details", { ontoggle: async ({ target }) => {
        if (!target.open) return;
        const { items } = await json(`/v1/files?limit=500&name=${encodeURIComponent(file.name)}`).catch(() => ({ items: [] }));
        versions.replaceChildren(...items.map((one) => this.row(one, true).node));
        this.hide();
      } }, el("summary", { "aria-label": words.of(words.files.versions, file.name) }, words.files.versions), versions));
    return { file, node, box };
  }

  pick({ target, shiftKey }) {
    if (target.type !== "checkbox") return;
    const boxes = [...this.list.querySelectorAll(":scope > :not([hidden]) > .kind input")];
    const [from, to] = [boxes.indexOf(this.last), boxes.indexOf(target)].sort((a, b) => a - b);
    if (shiftKey && from >= 0) for (const box of boxes.slice(from, to)) box.checked = target.checked;
    this.last = target;
    this.count();
  }

  count() {
    const { chosen, rows } = this;
    this.bar.classList.toggle("on", chosen.length);
    this.acts[0].hidden = !chosen.every(({ name, media_type: type }) => ROWS.test(name) || ROWS.test(type));
    this.all.checked = chosen.length > 0;
    this.all.indeterminate = chosen.length > 0 && chosen.length < rows.size;
    setText(this.picked, chosen.length ? words.files.picked(chosen.length, sizes(chosen)) : words.many.all);
  }

  delete(files) {
    if (!files.length) return;
    for (const { id } of files) this.gone.add(id);
    this.hide();
    const back = () => {
      for (const { id } of files) this.gone.delete(id);
      this.hide();
    };
    later(words.files.deleted(files.length, files[0].name), async () => {
      const told = await Promise.allSettled(files.map(({ id }) => json(`/v1/files/${id}`, { method: "DELETE", keepalive: true })));
      let why;
      files.forEach(({ id }, i) => {
        const { reason } = told[i];
        if (reason && reason.code !== "file-unknown") why = reason;
        else {
          this.rows.delete(id);
          this.list.querySelectorAll(`[data-file="${id}"]`).forEach((node) => node.remove());
        }
      });
      if (why) notice(words.refused(words.files.delete, say(why)), true);
      back();
      this.load(true);
    }, back);
  }

  process(files) {
    this.app.go(`processes?${new URLSearchParams(files.map(({ id }) => ["files", id]))}`);
  }

  archive(files) {
    return this.ask("archive", files, "files", ["name"], [el("ul", { class: "members" }, files.map((file) => el("li", {}, el("span", {}, file.name), format.bytes(file.bytes)))),
      el("p", {}, words.files.picked(files.length, sizes(files)))]);
  }

  async export(files) {
    const [names] = await head(files[0], []).catch(() => [[]]);
    const preview = el("div", { class: "preview", tabindex: "0", role: "region", "aria-label": words.files.preview });
    const look = async () => {
      const { columns = [], where } = fields.read();
      try {
        const [top, ...rows] = await head(files[0], columns, where);
        clear(preview.parentNode);
        preview.replaceChildren(el("table", {}, el("tr", {}, top.map((name) => el("th", { scope: "col" }, name))),
          rows.map((row) => el("tr", {}, row.map((value) => el("td", {}, typeof value === "object" ? JSON.stringify(value) : String(value ?? "")))))),
          where && !isTable(files[0]) ? el("p", {}, words.files.unfiltered) : "");
      } catch (error) {
        if (!refuse(say(error), "x", error.field, false)) preview.textContent = say(error);
      }
    };
    const fields = await this.ask("export", files, "source", ["columns", "where", "format", "name"], [preview], names, soon(look));
    look();
  }

  // A dialog with some of a kind's fields, which starts it on these files.
  async ask(kind, files, field, only, body, columns, changed) {
    const { params: root } = (await kinds()).items.find((one) => one.kind === kind);
    const { properties } = resolve(root, root);
    const given = Object.fromEntries(only.map((name) => [name, properties[name]]));
    if (columns?.length) given.columns = { type: "array", items: { enum: columns }, default: columns, description: words.files.order };
    const fields = form(root, "x", { schema: { properties: given } });
    const step = { id: "x" };
    const box = el("dialog", { "aria-label": words.files[kind], onclose: () => box.remove(), oninput: () => { step.key = null; changed?.(); } }, el("h2", {}, words.files[kind]),
      sender(async () => {
        await begin([{ kind, params: { ...fields.read(), [field]: files.map(({ id }) => id) } }], step);
        box.close();
        this.app.go("jobs");
      }, [...body, ...fields.fields], button(words.close, () => box.close())));
    document.body.append(box);
    box.showModal();
    return fields;
  }
}
