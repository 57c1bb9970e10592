// The view of stored files: newest first, each with its version, size, date, download and delete.
//
// Strategy: a plain list read over HTTP, read again while it is in sight whenever a job has succeeded;
// files change rarely and have no live numbers of their own.

import { ask, el, icon, notice } from "./dom.js";
import { format, words } from "./words.js";

export class FilesView {
  constructor(app) {
    this.list = el("ul", { class: "files", "aria-label": words.views.files });
    this.more = el("button", { type: "button", class: "older", hidden: true, onclick: () => this.load(this.next) }, words.files.more);
    this.empty = el("div", { class: "empty", hidden: true }, icon("file"), el("p", {}, words.empty.files),
      el("div", { class: "empty-acts" }, el("button", { type: "button", class: "primary", onclick: () => app.choose() }, words.empty.choose)));
    this.head = el("div", { class: "view-head" }, el("h1", {}, words.views.files),
      el("button", { type: "button", class: "primary", onclick: () => app.choose() }, words.drop.upload));
    this.node = el("div", {}, this.head, this.list, this.more, this.empty);
    app.store.listen((change) => {
      const to = change.event?.to;
      if (!this.node.hidden && (to === "succeeded" || change.rows === null)) this.load();
    });
  }

  show() {
    this.load();
  }

  async load(after = null) {
    let page;
    try {
      const query = new URLSearchParams({ limit: 100, ...(after ? { after } : {}) });
      page = await (await fetch(`/v1/files?${query}`, { cache: "no-store" })).json();
    } catch {
      return; // the banner tells; the next snapshot loads again
    }
    const rows = page.items.map((file) => this.row(file));
    if (after) this.list.append(...rows);
    else this.list.replaceChildren(...rows);
    this.next = page.next;
    this.more.hidden = page.next === null;
    this.list.hidden = this.list.childElementCount === 0;
    this.empty.hidden = !this.list.hidden;
    this.head.hidden = this.list.hidden;
  }

  row(file) {
    const digest = file.digest?.["sha-256"];
    const node = el("li", { "data-file": file.id },
      el("span", { class: "kind" }, icon("file")),
      el("div", { class: "what" }, el("div", { class: "name", title: file.name }, file.name),
        el("div", { class: "sub" }, words.files.version(file.version), " · ", file.media_type,
          digest ? ` · SHA-256 ${digest.slice(0, 4)}…${digest.slice(-4)}` : "")),
      el("div", { class: "num much" }, el("b", {}, format.bytes(file.bytes))),
      el("div", { class: "num pace" }, el("small", { title: format.exact(file.created_at) }, format.time(file.created_at))),
      el("div", { class: "acts" },
        el("a", { class: "textual", href: `/v1/files/${file.id}/content`, download: file.name,
          "aria-label": words.of(words.act.download, file.name) }, words.act.download),
        el("button", { type: "button", title: words.files.delete, "aria-label": words.of(words.files.delete, file.name),
          onclick: () => this.delete(file, node) }, icon("trash"))));
    return node;
  }

  async delete(file, node) {
    const sure = await ask(words.files.sure(file.name), el("p", {}, words.files.gone), [
      { value: "", label: words.files.keep },
      { value: "yes", label: words.files.delete, kind: "danger" },
    ]);
    if (sure !== "yes") return;
    try {
      const answer = await fetch(`/v1/files/${file.id}`, { method: "DELETE" });
      if (!answer.ok && answer.status !== 404) throw new Error((await answer.json()).detail);
      node.remove();
      notice(words.files.deleted(file.name));
    } catch (error) {
      notice(words.refused(words.files.delete, error instanceof TypeError ? words.offline : error.message), true);
    }
    this.load();
  }
}
