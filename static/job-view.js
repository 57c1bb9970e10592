// The page of one job: its row, facts, history, files and log.
//
// Strategy: the row is the list's. What rows lack is read each second while the job lives, the history when
// its version has risen. Log lines are written once a frame, and wait while older ones are looked at.

import { announce, button, copy, el, morph, part, setText } from "./dom.js";
import { Row, who } from "./row.js";
import { isFinal, isTransfer } from "./store.js";
import { format, words } from "./words.js";

const say = words.job;
const FIRST = 50;
const NEWEST = 200;
const LINES = 1000;
const BATCH = 100; // lines in a frame
const FACTS = ("kind created_at started_at ended_at took attempt priority owner id client not_before after retry_of expires_at deadline_at error data"
  + " protocol connected received_bytes stored_bytes durable_bytes limit_bytes_per_s").split(" ");
const ALWAYS = 9; // of them have a place before they are known

const get = (path) => fetch(`/v1/jobs/${path}`).then((answer) => answer.json()).catch(() => null);
const time = (at) => el("time", { title: at }, format.moment(at));
const none = (given) => (given ?? "").length === 0;
const atEnd = (box) => box.scrollTop + box.clientHeight > box.scrollHeight - 8;

function value(name, given) {
  if (none(given)) return "–";
  if (/_(at|before)$/.test(name) && Date.parse(given)) return time(given);
  if (/^(after|retry_of)$/.test(name)) return [given].flat().map((id) => el("a", { href: `#job=${id}` }, id));
  if (/bytes/.test(name) && given >= 0) return format[/per_s/.test(name) ? "rate" : "bytes"](given, "bytes");
  return typeof given === "object" ? el("code", {}, JSON.stringify(given)) : say.bool[given] ?? String(given);
}

const pairs = (given, names = Object.keys(given)) => el("dl", {}, names.flatMap((name) =>
  [el("dt", {}, name.replaceAll("_", " ").replace(/ (at|bytes.*)$/, "")), el("dd", {}, value(name, given[name]))]));

export class JobView {
  constructor(app) {
    this.app = app;
    this.back = el("a", { href: "#jobs" }, say.back);
    this.lost = el("h1");
    this.body = el("div");
    this.node = el("div", { class: "job" }, this.back, this.lost, this.body);
    // The list is left with its filter in the address.
    addEventListener("hashchange", ({ oldURL }) => { if (oldURL.includes("#jobs")) this.back.href = new URL(oldURL).hash; });
    app.store.listen((change) => this.id && this.changed(change));
  }

  get title() {
    return this.job?.name;
  }

  show(params) {
    this.end("");
    this.id = params.get("job");
    this.busy = null;
    this.fresh = [];
    this.stop = this.app.channel.follow(this.id, (lines) => {
      this.fresh = [...this.fresh, ...lines].slice(-LINES);
      this.plan();
    });
    const row = this.app.store.rows.get(this.id);
    if (row) this.tell({ params: {}, ...row });
    else Object.assign(this.lost, { hidden: false, textContent: this.id });
    this.load();
  }

  hide() {
    this.stop?.();
    this.stop = this.id = this.job = null;
  }

  // Instead of the page: why there is none.
  end(text) {
    this.hide();
    this.body.replaceChildren();
    this.say(text);
  }

  say(text) {
    this.lost.hidden = !text;
    setText(this.lost, text);
    if (text) announce(text);
  }

  build() {
    const box = (tag, props) => el(tag, { tabindex: 0, ...props });
    this.row = new Row(this.app, this.job, () => {});
    this.told = el("div");
    this.list = box("ol", { "aria-label": say.history });
    this.log = box("div", { class: "log", role: "log", "aria-live": "off", "aria-label": say.log, hidden: true, onscroll: () => this.follow(atEnd(this.log)) });
    this.older = el("p");
    this.toggle = button("", () => this.follow(true));
    this.seen = 0; // the version
    this.n = 0; // of the last line
    this.follows = true;
    const raw = box("pre");
    this.body.replaceChildren(el("h1", {}, this.row.name), el("ul", { class: "jobs" }, this.row.node),
      el("div", { class: "cols" }, this.told, part(say.history, this.list)),
      el("details", { ontoggle: async () => { raw.textContent = JSON.stringify(await get(this.id), null, 2); } },
        el("summary", {}, say.raw), button(words.copy, () => copy(raw.textContent)), raw),
      part(say.log, this.older, this.log, this.toggle));
  }

  changed({ rows, now, event }) {
    const { id, job } = this;
    if (event?.to === "deleted" && event.row.id === id) this.end(say.removed(event.row.name));
    else if (rows === null || (now && !(job && isFinal(job))) || this.app.store.rows.get(id)?.version > job?.version) this.load();
    this.plan();
  }

  plan() {
    this.planned ??= requestAnimationFrame(() => {
      this.planned = null;
      if (this.job) this.draw();
    });
  }

  async load() {
    const { id } = this;
    if (this.busy === id) return;
    this.busy = id;
    const job = await get(id);
    if (id !== this.id) return;
    this.busy = null;
    if (job?.version) {
      this.tell(job);
      if (job.version > this.seen) this.history(id, job.version);
    } else if (job?.status === 404) this.end(say.unknown(id));
    else if (!this.job) this.say(words.offline); // a later change asks again
  }

  async history(id, version) {
    const { list } = this;
    const page = (after, limit) => get(`${id}/events?after=${after}&limit=${limit}`);
    const far = version - NEWEST;
    const pages = await Promise.all(far > FIRST ? [page(0, FIRST), page(far, NEWEST)] : [page(0, FIRST + NEWEST)]);
    if (list !== this.list || pages.includes(null)) return;
    const events = pages.flatMap(({ items }) => items ?? []);
    const sticks = atEnd(list);
    morph(list, ...events.map((event, i) => this.entry(event, events[i - 1])));
    if (sticks) list.scrollTop = list.scrollHeight;
    this.seen = version;
  }

  tell(job) {
    const isNew = !this.job;
    this.job = job;
    if (!(this.app.store.rows.get(job.id)?.version >= job.version)) this.app.store.put(job);
    if (isNew) this.build();
    this.say("");
    const { error, transfer, result, artifacts, started_at: start } = job;
    const took = start && format.duration(format.between(start, job.ended_at ?? Date.now()));
    const facts = { ...job, ...transfer, took, error: error?.code, data: error && say.safe[isTransfer(job)] };
    const data = { ...result?.data };
    const files = [...[data.files].flat().filter((file) => file?.id), ...artifacts.map((made) => ({ ...made, id: made.file }))];
    if (data.files?.[0]?.id) delete data.files;
    morph(this.told,
      part(say.details, pairs(facts, FACTS.filter((name, i) => i < ALWAYS || name in (transfer ?? {}) || !none(facts[name])))),
      part(say.params, pairs(job.params)),
      part(say.outcome, el("ul", {}, files.map(({ id, name, bytes, digest }) => el("li", {},
        el("a", { href: `/v1/files/${id}/content`, download: name }, name), ` ${format.bytes(bytes)}`,
        Object.entries(digest).map(([algorithm, hex]) => el("div", {}, algorithm.toUpperCase(), " ", el("code", {}, hex), " ",
          button(words.copy, ({ target }) => copy(target.previousElementSibling.textContent), { "aria-label": words.of(words.copy, `${algorithm} ${name}`) })))))),
      pairs(data)));
    this.draw();
  }

  draw() {
    this.row.update();
    this.row.state.classList.remove("hush");
    this.write();
  }

  entry({ job, version, from, to, cause, at, actor, via, row }, last) {
    const what = cause === "command" && from !== to ? row.want : cause;
    const by = via === "system" ? "" : who({ actor, via }, this.app.me);
    const states = (from && from !== to ? [from, to] : [to]).map((state) => words.state[state] ?? state);
    return el("li", {}, last && last.version < version - 1 ? el("a", { href: `/v1/jobs/${job}/events?after=${last.version}&limit=500` }, say.more(version - last.version - 1)) : "",
      time(at), " ", el("b", {}, states.join(" → ")), " ", say.causes[what] ?? what, " ",
      [by, by === words.by.you && via === "ws" ? say.here : say.doors[via]].filter(Boolean).join(", "), " ",
      el("small", {}, last ? `+${format.duration(format.between(last.at, at))}` : ""));
  }

  follow(on) {
    this.follows = on;
    this.plan();
  }

  write() {
    const { log, fresh, follows } = this;
    if (follows && fresh.length) {
      for (const { n, at, line } of fresh.splice(0, BATCH)) {
        if (this.n && n > this.n + 1) log.append(el("p", {}, say.skipped(n - this.n - 1)));
        log.append(el("div", { "data-at": format.second(at), "data-n": n }, line));
        this.n = n;
      }
      while (log.childElementCount > LINES) log.firstChild.remove();
      log.hidden = false;
      log.scrollTop = log.scrollHeight;
      if (fresh.length) this.plan();
    }
    const first = log.querySelector("div")?.dataset.n;
    setText(this.older, first > 1 ? say.skipped(first - 1) : first ? "" : say.none);
    this.toggle.hidden = follows;
    setText(this.toggle, say.follow(fresh.length));
  }
}
