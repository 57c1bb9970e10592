// The view of the whole service: what moves, runs, waits, and is free. It is made anew each second, and what differs
// is put in. What is drawn stands beside it as text. Each state has its line, so that none moves the others; kinds
// have as much room as they.

import { Spark, el, morph, part } from "./dom.js";
import { format, words } from "./words.js";

const say = words.overview;
const SAMPLES = 60;
const STATES = "queued scheduled running pausing paused cancelling succeeded failed cancelled".split(" ");

const line = (text, n = "", share = null) =>
  el("p", {}, el("span", {}, text), el("b", {}, n), share === null ? "" : el("progress", { value: share, "aria-hidden": "true" }));

function bars(names, counts) {
  const most = Math.max(1, ...Object.values(counts));
  return names.map((name) => line(words.state[name] ?? name, format.count(counts[name] ?? 0), (counts[name] ?? 0) / most));
}

export class Overview {
  constructor({ store }) {
    this.store = store;
    this.node = el("div", { class: "overview" });
    store.listen(({ now }) => now && this.show());
  }

  flow(name) {
    const values = this.store.flow[name];
    const spark = new Spark();
    spark.set(values);
    const rate = (value) => format.rate(value, "bytes");
    return part(words.now[name], el("b", { class: "big" }, rate(values.at(-1))), spark.node,
      el("p", { class: "axis" }, say.axis(SAMPLES, rate(Math.max(...values))).map((text) => el("span", {}, text))));
  }

  show() {
    const { now, counts } = this.store;
    if (this.node.hidden || !now) return;
    const { disk_bytes: disk, free_bytes: free, running, slots } = now;
    morph(this.node, el("h1", { class: "hush" }, words.views.overview), this.flow("in"), this.flow("out"),
      part(words.now.running, line(say.slots(running, slots), "", running / slots), bars(Object.keys(now.running_by_kind).sort(), now.running_by_kind)),
      part(words.views.jobs, bars(STATES, counts)),
      part(say.disk, line(say.free(format.bytes(free), format.bytes(disk)), "", 1 - free / disk), line(words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)))),
      part(say.service, say.facts(now).map((fact) => line(...fact))));
  }
}
