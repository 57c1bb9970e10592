// The view of the whole service: what moves, runs, waits, and is free. It is made anew each second, and what differs
// is put in. What is drawn stands beside it as text.

import { Spark, el, morph, part } from "./dom.js";
import { format, words } from "./words.js";

const say = words.overview;
const SAMPLES = 60;

const line = (text, n = "", share = null) =>
  el("p", {}, el("span", {}, text), el("b", {}, n), share === null ? "" : el("progress", { value: share, "aria-hidden": "true" }));

function bars(counts) {
  const list = Object.entries(counts).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
  return list.map(([name, n]) => line(words.state[name] ?? name, format.count(n), n / list[0][1]));
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
      part(words.now.running, line(say.slots(running, slots), "", running / slots), bars(now.running_by_kind)),
      part(words.views.jobs, bars(counts)),
      part(say.disk, line(say.free(format.bytes(free), format.bytes(disk)), "", 1 - free / disk), line(words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)))),
      part(say.service, say.facts(now).map((fact) => line(...fact))));
  }
}
