// The view that starts processes, and the form that a kind's JSON Schema becomes, here and in dialogs. What is left
// empty is not sent; what is refused is said at its field.

import { announce, button, el, notice, setText } from "./dom.js";
import { json, reason } from "./store.js";
import { words } from "./words.js";

const say = words.process;
const RESULT = "job:"; // and an id: what that job makes

export const soon = (run, timer) => () => {
  clearTimeout(timer);
  timer = setTimeout(run, 250);
};

let known;
export const kinds = async () => (known ??= await json("/v1/kinds"));

// Of several that are possible: fields, else a text.
export const resolve = (schema, root) => {
  if (schema.$ref) return resolve({ ...root.$defs[schema.$ref.split("/").pop()], ...schema, $ref: null }, root);
  const all = schema.anyOf?.map((one) => resolve(one, root));
  return all ? { ...(all.find((one) => one.properties) ?? all.find((one) => one.type === "string") ?? all[0]),
    ...schema, anyOf: null, many: all.some((one) => one.items) } : schema;
};

const isFile = (name, { format: meant }) => meant === "file" || /^(file|source)s?$/.test(name);
const title = (name) => name[0].toUpperCase() + name.slice(1).replace(/_(s|bytes)$/, " ($1)").replaceAll("_", " ");
export const query = (...pairs) => new URLSearchParams(pairs.filter(([, value]) => value));
const dots = (...parts) => parts.filter(Boolean).join(" · ");
const SIMPLE = /integer|number|string/;
const typed = (text, { type }) => (/integer|number/.test(type) ? Number(text) : text);
const stored = el("datalist", { id: "stored" });
const choice = (text, checked, change) => el("label", { class: "choice" },
  el("input", { type: "checkbox", checked, oninput: ({ target }) => change(target.checked) }), el("span", {}, text));

// chosen: a map of ids or names to names
function files(props, many, chosen) {
  const chips = el("div", { class: "choices" });
  const add = (value, name) => {
    chosen.set(value, name);
    chips.append(choice(name, true, (on) => (on ? chosen.set(value, name) : chosen.delete(value))));
    input.required = false;
  };
  const take = () => {
    const name = input.value.trim();
    if (name) add(name, name);
    input.value = "";
    input.focus();
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const search = soon(() => json(`/v1/files?${query(["newest", 1], ["q", input.value])}`)
    .then(({ items }) => stored.replaceChildren(...items.map(({ name }) => el("option", { value: name }))), () => {}));
  const input = el("input", { ...props, list: "stored", autocomplete: "off", onfocus: search, oninput: search, onkeydown: (event) => {
    if (event.key !== "Enter" || !input.value) return;
    event.preventDefault();
    take();
  } });
  for (const [value, name] of [...chosen]) add(value, name);
  return { node: el("div", {}, chips, el("div", { class: "with" }, input, button(say.add, take))), each: !many, hint: many ? say.several : say.each, read() {
    const all = [...chosen.keys(), input.value.trim()].filter(Boolean);
    return many && all[0] || all[1] ? all : all[0];
  } };
}

function control(props, schema, root, chosen) {
  const { id, name, required, ...described } = props;
  const { default: initial, type } = schema;
  const shown = typeof initial === "object" ? null : initial;
  const group = { id, role: "group", "aria-labelledby": `${id}-label`, ...described };
  const plain = (tag, more, parse, hint, options) => {
    const node = el(tag, { ...props, ...more }, options);
    return { node, hint, read: () => (node.value || required ? parse(node.value) : undefined) };
  };
  const area = (hint, parse) => plain("textarea", { rows: 2 }, (text) => parse(text.split("\n").map((line) => line.trim()).filter(Boolean)), hint);
  if (isFile(name, schema)) return files(props, schema.many || schema.items, chosen);
  if (schema.enum) {
    return plain("select", {}, (text) => schema.enum.find((value) => String(value) === text), "", [required || initial ? null : el("option", { value: "" }, say.none),
      ...schema.enum.map((value) => el("option", { value, selected: value === initial }, say.values[value] ?? value))]);
  }
  if (type === "boolean") {
    const node = el("input", { ...props, required: false, type: "checkbox", checked: initial });
    return { node, read: () => node.checked };
  }
  if (schema.properties) {
    const inner = form(root, id, { schema, needed: required });
    return { node: el("div", { ...group, class: "inner" }, inner.fields), read() {
      const value = inner.read();
      return required || Object.keys(value).length ? value : undefined;
    } };
  }
  if (schema.additionalProperties) {
    const values = resolve(schema.additionalProperties, root);
    return area(say.map(values.enum?.join(", ")), (lines) => Object.fromEntries(lines.map((line) => {
      const [key, ...value] = line.split(/\s*=\s*/);
      return [key, typed(value.join("="), values)];
    })));
  }
  const items = schema.items && resolve(schema.items, root);
  if (items?.enum) { // in the order in which they are chosen
    let on = initial ?? [];
    const node = el("div", { ...group, class: "choices" }, items.enum.map((value) => choice(value, on.includes(value), (is) => {
      on = on.filter((one) => one !== value).concat(is ? value : []);
    })));
    return { node, read: () => (String(on) === String(initial ?? []) ? undefined : on) };
  }
  if (SIMPLE.test(items?.type)) return area(say.many, (lines) => lines.map((line) => typed(line, items)));
  if (!SIMPLE.test(type)) return area("JSON", (lines) => JSON.parse(lines.join(" ")));
  const time = schema.format === "date-time";
  return plain("input", { type: type !== "string" ? "number" : time ? "datetime-local" : "text", min: schema.minimum, max: schema.maximum,
    step: type === "number" ? "any" : null, placeholder: shown },
  (text) => (time ? new Date(text).toISOString() : typed(text, schema)));
}

// The fields of a schema; each: the one whose files make a job each.
export function form(root, id, { schema = resolve(root, root), needed = true, chosen = new Map() } = {}) {
  const made = Object.entries(schema.properties ?? {}).map(([name, given]) => {
    const property = resolve(given, root);
    const required = needed && (schema.required ?? []).includes(name);
    const key = `${id}-${name}`;
    const one = control({ id: key, name, required, "aria-describedby": `${key}-hint ${key}-error` }, property, root, chosen);
    return { ...one, name, field: el("div", { class: "field" },
      el("label", { for: key, id: `${key}-label` }, property.title ?? title(name)), one.node,
      el("p", { class: "hint", id: `${key}-hint` }, dots(property.description, one.hint)), el("p", { class: "error", id: `${key}-error` })) };
  });
  return { fields: made.map(({ field }) => field), about: schema.description?.split("\n")[0], each: made.find((one) => one.each)?.name,
    read: () => Object.fromEntries(made.map(({ name, read }) => [name, read()]).filter(([, value]) => value !== undefined)) };
}

// At the field that is named, or at the one around it; false if there is none.
export function refuse(message, id, field = "", focus = true) {
  for (const path = field.match(/[a-z]\w*/gi) ?? []; path.length; path.pop()) {
    const key = [id, ...path].join("-");
    const node = document.getElementById(key);
    if (!node) continue;
    document.getElementById(`${key}-error`).textContent = message;
    node.ariaInvalid = "true";
    if (focus) (node.querySelector("input") ?? node).focus();
    return true;
  }
  return false;
}

export function clear(node) {
  for (const error of node.querySelectorAll(".error")) error.textContent = "";
  for (const field of node.querySelectorAll("[aria-invalid]")) field.ariaInvalid = null;
}

export function sender(run, parts, beside) {
  const error = el("p", { class: "error", id: "unsent" });
  const send = el("button", { class: "primary" }, say.start);
  const node = el("form", { class: "card form", onsubmit: async (event) => {
    event.preventDefault();
    if (send.ariaDisabled) return;
    send.ariaDisabled = "true";
    clear(node);
    try {
      await run();
    } catch (why) {
      const message = why instanceof TypeError ? say.again : why.message;
      if (!refuse(message, why.at ?? "x", why.field)) {
        error.textContent = message;
        announce(message);
      }
    }
    send.ariaDisabled = null;
  } }, ...parts, error, el("div", { class: "form-end" }, beside, send));
  return node;
}

// The step's key makes it safe to repeat.
export async function begin(starts, step) {
  step.key ??= Math.random();
  const { items, n, failures } = await json("/v1/jobs", { method: "POST", headers: { "Idempotency-Key": `"${step.key}"` }, body: JSON.stringify(starts) });
  const { error } = items.find((item) => item.error) ?? {};
  if (!n) throw Object.assign(new Error(error.detail), error);
  if (error) notice(say.some(n, failures, error.detail), true);
  return items.flatMap(({ job }) => job?.id ?? []);
}

const OPTIONS = { properties: {
  name: { type: "string", maxLength: 200, title: say.name, description: say.nameHint },
  priority: { type: "integer", minimum: 0, maximum: 9, default: 5, description: say.priority },
  not_before: { type: "string", format: "date-time" },
} };

export class ProcessView {
  constructor(app) {
    this.app = app;
    this.steps = [];
    this.chain = el("div", { class: "fields", oninput: () => this.changed() });
    this.count = el("p", { class: "hint" });
    this.options = form(OPTIONS, "p0");
    const [name, ...more] = this.options.fields;
    this.form = sender(() => this.start(), [this.chain, button(say.chain, () => this.add(), { class: "quiet" }),
      name, el("details", {}, el("summary", {}, words.act.more), el("div", { class: "pairs" }, more))], this.count);
    this.form.hidden = true;
    this.problems = el("details", { class: "hint", hidden: true });
    this.node = el("div", { class: "narrow" }, el("h1", {}, say.title), this.form, this.problems, stored);
  }

  async show(params) {
    const ids = params.getAll("files");
    try {
      const { items, problems } = await kinds();
      const named = async (id) => [id, (await json(`/v1/files/${id}`).catch(() => ({ name: id }))).name];
      const chosen = new Map(await Promise.all(ids.map(named)));
      this.kinds = items.filter((kind) => kind.startable);
      if (!this.steps.length || params.size) {
        this.steps = [];
        this.chain.replaceChildren();
        this.form.reset();
        this.form.hidden = false;
        this.add(params.get("kind") ?? (ids.length ? "" : "count"), chosen);
      }
      this.problems.replaceChildren(el("summary", {}, say.problems(problems.length)),
        el("ul", {}, problems.map(({ file, detail }) => el("li", {}, `${file}: ${detail}`))));
      this.problems.hidden = !problems.length;
    } catch (error) {
      notice(reason(error), true);
    }
  }

  add(kind, chosen = new Map([[RESULT, say.result]])) {
    const n = this.steps.length;
    const step = { id: `p${n}`, chosen, starts: () => {
      const params = step.form.read();
      const { each } = step.form;
      return [params[each]].flat().map((one) => ({ kind: select.value, params: each ? { ...params, [each]: one } : params }));
    } };
    const build = () => {
      const { kind, params, pause } = this.kinds.find((one) => one.kind === select.value);
      step.form = form(params, `${step.id}-params`, { chosen });
      body.replaceChildren(...step.form.fields);
      setText(about, dots(kind, step.form.about, pause && say.pause(pause)));
      this.changed();
    };
    const groups = Object.groupBy(this.kinds, (one) => say.groups[one.kind.split(".")[0]] ?? say.others);
    const select = step.select = el("select", { id: `kind${n}`, onchange: build }, Object.entries(groups).map(([label, all]) =>
      el("optgroup", { label }, all.map((one) => el("option", { value: one.kind, selected: one.kind === kind }, one.title)))));
    const about = el("p", { class: "hint" });
    const body = el("div", { class: "pairs" });
    step.node = el("div", { class: "fields", oninput: () => { step.key = null; } },
      el("div", { class: "field" }, el("label", { for: `kind${n}` }, n ? say.then : say.kind), select, about),
      body, n ? button(say.without, () => this.cut(n), { class: "quiet" }) : null);
    this.steps.push(step);
    build();
    this.chain.append(step.node);
    if (n) select.focus();
  }

  cut(n) {
    for (const { node } of this.steps.splice(n)) node.remove();
    this.steps[n - 1].select.focus();
    this.changed();
  }

  changed() {
    const [first] = this.steps;
    if (!first) return;
    let [n, each] = [0, 1];
    for (const step of this.steps) n += each *= (step.form.each && step.chosen.size) || 1;
    setText(this.count, n > 1 ? say.jobs(n) : "");
    history.replaceState(null, "", `#processes?${query(["kind", first.select.value], ...[...first.chosen.keys()].map((id) => ["files", id]))}`);
  }

  async start() {
    const plans = this.steps.map((step) => step.starts());
    const { priority, ...first } = this.options.read();
    let before = [""];
    for (const [i, step] of this.steps.entries()) {
      const starts = before.flatMap((id) => plans[i].map(({ kind, params }) => ({ kind, priority, ...(id ? { after: [id] } : first),
        params: JSON.parse(JSON.stringify(params).replaceAll(`"${RESULT}"`, `"${RESULT}${id}"`)) })));
      try {
        before = await begin(starts, step);
      } catch (error) {
        if (i) error.message = say.partly(error.message);
        throw Object.assign(error, { at: step.id });
      }
    }
    notice(say.begun(before.length));
    this.steps = []; // the next form is a new one
    this.app.go("jobs");
  }
}
