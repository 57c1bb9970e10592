// The view of stored files: the newest version of each name, and what can be done with those that are chosen. The
// list is compared with what is there, so that rows stay where they are. The boxes are the selection.

import { button, copy, el, icon, later, notice, setText } from "./dom.js";
import { begin, clear, form, kinds, query, refuse, resolve, sender, soon } from "./process-view.js";
import { json, reason } from "./store.js";
import { format, words } from "./words.js";

const say = words.files;
const PAGE = 100;
const size = (files) => format.bytes(files.reduce((sum, { bytes }) => sum + bytes, 0));

export class FilesView {
  constructor(app) {
    this.app = app;
    this.rows = new Map(); // of the list, by id
    this.want = PAGE;
    this.list = el("ul", { class: "files", "aria-label": words.views.files, onclick: (event) => this.pick(event) });
    this.more = button(say.more, () => { this.want += PAGE; this.load(true); }, { class: "older", hidden: true });
    this.search = el("input", { type: "search", "aria-label": words.search, placeholder: words.searchHint, oninput: soon(() => {
      history.replaceState(null, "", `#files?${query(["q", this.search.value])}`);
      this.load(true);
    }) });
    this.all = el("input", { type: "checkbox", "aria-label": words.many.all, onchange: () => {
      for (const { box } of this.shown) box.checked = this.all.checked;
      this.count();
    } });
    this.picked = el("span", { class: "many-text" });
    this.fresh = button("", () => this.load(true), { class: "fresh", hidden: true });
    this.acts = ["export", "archive", "process", "delete"].map((op) => button(say[op], () => this[op](this.chosen)?.catch((error) => notice(reason(error), true)), { class: op === "delete" && "danger" }));
    this.bar = el("div", { class: "picks" }, el("label", { class: "kind" }, this.all), this.picked, el("div", { class: "many-acts" }, this.acts), this.fresh);
    this.empty = el("p", { class: "empty", hidden: true });
    this.node = el("div", {}, el("div", { class: "view-head" }, el("h1", {}, words.views.files), el("div", { class: "finds" }, this.search),
      button(words.drop.upload, () => app.choose(), { class: "primary" })), this.bar, this.list, this.more, this.empty);
    app.store.listen(({ event, rows }) => { if (!this.node.hidden && (event?.to === "succeeded" || rows === null)) this.load(); });
  }

  show(params) {
    this.search.value = params.get("q") ?? "";
    this.load(true);
  }

  key({ key }) {
    if (key === "/") this.search.focus();
    return key === "/";
  }

  async load(now) {
    const asked = (this.asked = {});
    const files = [];
    let next;
    try {
      do {
        const page = await json(`/v1/files?${query(["newest", 1], ["limit", PAGE], ["q", this.search.value], ["after", next])}`);
        files.push(...page.items);
        ({ next } = page);
      } while (next && files.length < this.want);
    } catch {
      return; // the banner tells; the next snapshot loads again
    }
    if (asked !== this.asked) return;
    const fresh = files.filter(({ id }) => !this.rows.has(id)).length;
    this.fresh.hidden = now || !fresh || !this.list.matches(":hover, :focus-within");
    setText(this.fresh, say.fresh(fresh));
    if (!this.fresh.hidden) return;
    const rows = new Map(files.map((file) => [file.id, this.rows.get(file.id) ?? this.row(file)]));
    for (const [id, { node }] of this.rows) if (!rows.has(id)) this.leave(node);
    const { activeElement } = document;
    // Untouched if nothing differs: a click may be under way.
    if (String([...rows.keys()]) !== String([...this.rows.keys()])) this.list.replaceChildren(...[...rows.values()].map(({ node }) => node));
    activeElement.focus({ preventScroll: true });
    this.rows = rows;
    this.more.hidden = !next;
    this.count();
  }

  row(file, old) {
    const { id, name, digest: { "sha-256": digest }, expires_at: until, job, created_at: at } = file;
    const box = el("input", { type: "checkbox", "aria-label": words.of(words.select, name) });
    const versions = el("ul");
    const node = el("li", { "data-file": id }, old ? el("span") : el("label", { class: "kind" }, box, icon("file")),
      el("div", { class: "what" }, el("div", { class: "name", title: name }, name),
        el("div", { class: "sub" }, say.version(file.version), " · ", file.media_type,
          digest && [" · ", button(`SHA-256 ${digest.slice(0, 4)}…${digest.slice(-4)}`, () => copy(digest), { title: digest, "aria-label": words.of(say.digest, name) })],
          until && ` · ${say.expires(format.time(until))}`,
          job && [" · ", el("a", { href: `#job=${job}`, "aria-label": words.of(say.job, name) }, say.job)])),
      el("div", { class: "num much" }, el("b", {}, format.bytes(file.bytes))),
      el("div", { class: "num pace" }, el("small", { title: format.moment(at) }, format.time(at))),
      el("div", { class: "acts" },
        el("a", { class: "textual", href: `/v1/files/${id}/content`, download: name, "aria-label": words.of(words.act.download, name) }, words.act.download),
        button(icon("trash"), () => this.delete([file]), { title: say.delete, "aria-label": words.of(say.delete, name) })),
      old || file.version < 2 ? null : el("details", { ontoggle: async () => {
        const { items } = await json(`/v1/files?${query(["limit", 500], ["name", name])}`).catch(() => ({ items: [] }));
        versions.replaceChildren(...items.map((one) => this.row(one, true).node));
      } }, el("summary", { "aria-label": words.of(say.versions, name) }, say.versions), versions));
    return { file, node, box };
  }

  get shown() {
    return [...this.rows.values()].filter(({ node }) => !node.hidden);
  }

  get chosen() {
    return this.shown.filter(({ box }) => box.checked).map(({ file }) => file);
  }

  pick({ target, shiftKey }) {
    const boxes = this.shown.map(({ box }) => box);
    const [at, last] = [boxes.indexOf(target), boxes.indexOf(this.last)];
    if (at < 0) return;
    if (shiftKey && last >= 0) for (const box of boxes.slice(Math.min(at, last), Math.max(at, last))) box.checked = target.checked;
    this.last = target;
    this.count();
  }

  count() {
    const { chosen, chosen: { length: n }, shown, all } = this;
    this.bar.classList.toggle("on", n);
    all.checked = n;
    setText(this.picked, n ? say.picked(n, size(chosen)) : words.many.all);
    if (!n && this.bar.contains(document.activeElement)) all.focus();
    this.list.hidden = !shown.length;
    this.empty.hidden = shown.length;
    setText(this.empty, this.search.value ? say.none : words.empty.files);
  }

  // The focus of a row that goes is its neighbour's.
  leave(node) {
    if (!node.contains(document.activeElement)) return;
    const open = [...node.parentNode.children].filter((one) => one === node || !one.hidden);
    const at = open.indexOf(node);
    ((open[at + 1] ?? open[at - 1])?.querySelector("input, button, a") ?? this.search).focus();
  }

  delete(files) {
    const show = (some, on) => {
      for (const { id } of some) {
        for (const node of this.list.querySelectorAll(`[data-file="${id}"]`)) {
          if (!on) this.leave(node);
          node.hidden = !on;
        }
      }
      this.count();
    };
    if (!files.length) return;
    show(files);
    later(say.deleted(files.length, files[0].name), async () => {
      let why;
      await Promise.all(files.map((file) => json(`/v1/files/${file.id}`, { method: "DELETE", keepalive: true }).catch((error) => {
        if (error.code === "file-unknown") return;
        why = error;
        show([file], true);
      })));
      if (why) notice(words.refused(say.delete, reason(why)), true);
      this.load(true);
    }, () => show(files, true));
  }

  process(files) {
    this.app.go(`processes?${query(...files.map(({ id }) => ["files", id]))}`);
  }

  archive(files) {
    return this.ask("archive", files, "files", ["name"], [el("ul", { class: "members" }, files.map((file) => el("li", {}, el("span", {}, file.name), size([file])))),
      el("p", {}, say.picked(files.length, size(files)))]);
  }

  // The first answer has all columns, from which some are chosen.
  async export(files) {
    const preview = el("div", { class: "preview", tabindex: "0", role: "region", "aria-label": say.preview });
    let fields;
    let last;
    const look = async () => {
      const { columns = [], where } = fields?.read() ?? {};
      const asked = `/v1/files/${files[0].id}/sample?${query(["limit", 10], ["where", where], ...columns.map((name) => ["columns", name]))}`;
      if (asked === last) return [];
      last = asked;
      try {
        const sample = await json(asked);
        if (asked !== last) return [];
        clear(preview.parentNode ?? preview);
        const rows = [sample.columns, ...sample.items].map((cells, i) => el("tr", {}, cells.map((cell) => el(i ? "td" : "th", {}, cell))));
        preview.replaceChildren(el("table", {}, rows));
        return sample.columns;
      } catch (error) {
        if (asked === last && !refuse(reason(error), "x-params", error.field, false)) setText(preview, reason(error));
        return [];
      }
    };
    const names = await look();
    fields = await this.ask("export", files, "source", ["columns", "where", "format", "name"], [preview], names, soon(look));
  }

  // A dialog with some of a kind's fields, which starts it on these files.
  async ask(kind, files, field, only, body, names = [], changed = () => {}) {
    const { params: root } = (await kinds()).items.find((one) => one.kind === kind);
    const properties = Object.fromEntries(only.map((name) => [name, resolve(root, root).properties[name]]));
    if (names.length) properties.columns = { type: "array", items: { enum: names }, default: names, description: say.order };
    const fields = form(root, "x-params", { schema: { properties } });
    const step = {};
    const box = el("dialog", { "aria-label": say[kind], onclose: () => box.remove(), oninput: () => { step.key = null; changed(); } }, el("h2", {}, say[kind]),
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
