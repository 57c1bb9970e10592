// The view of the whole service: what moves, what runs, what waits, what is free.
//
// Strategy: the numbers are kept each second, whatever is shown. In sight, the view is made anew from them
// and what differs is put in. What is drawn stands beside it as text.

import { Spark, el, morph, part, svg } from "./dom.js";
import { format, words } from "./words.js";

const say = words.overview;
const SAMPLES = 60;
const GAP_MS = 5000; // without a number; then the line begins anew

const line = (text, n = "", ...rest) => el("p", {}, el("span", {}, text), el("b", {}, n), ...rest);
const bar = (text, part, n) => line(text, n,
  svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { width: 100 * part || 0, height: 1 })));

function bars(counts) {
  const list = Object.entries(counts).filter(([, n]) => n).sort((a, b) => b[1] - a[1]);
  return list.length ? list.map(([name, n]) => bar(words.state[name] ?? name, n / list[0][1], format.count(n))) : say.none;
}

export class Overview {
  constructor(app) {
    this.store = app.store;
    this.values = { in: [], out: [] };
    this.node = el("div", { class: "overview" });
    app.store.listen(({ now }) => now && this.sample());
  }

  show() {
    this.draw();
  }

  sample() {
    const at = performance.now();
    for (const [name, values] of Object.entries(this.values)) {
      if (at - this.at > GAP_MS) values.length = 0;
      if (values.push(this.store.now[`${name}_bytes_per_s`]) > SAMPLES) values.shift();
    }
    this.at = at;
    this.draw();
  }

  flow(name) {
    const values = this.values[name];
    const spark = new Spark(SAMPLES);
    spark.set(values);
    const rate = (value) => format.rate(value, "bytes");
    return part(words.now[name], el("b", { class: "big" }, rate(values.at(-1))), spark.node,
      el("p", { class: "axis" }, [say.ago(SAMPLES), say.most(rate(Math.max(...values))), say.now].map((text) => el("span", {}, text))));
  }

  draw() {
    const { now, counts } = this.store;
    if (this.node.hidden || !now) return;
    const { disk_bytes: disk, free_bytes: free } = now;
    morph(this.node, el("h1", { class: "hush" }, words.views.overview), this.flow("in"), this.flow("out"),
      part(words.now.running, bar(say.slots(now.running, now.slots), now.running / now.slots), bars(now.running_by_kind ?? {})),
      part(words.views.jobs, bars(counts)),
      part(say.disk, bar(say.free(format.bytes(free), format.bytes(disk)), 1 - free / disk), line(words.now.stored(format.bytes(now.stored_bytes), format.count(now.files)))),
      part(say.service, say.facts(now).map((fact) => line(...fact))));
  }
}
