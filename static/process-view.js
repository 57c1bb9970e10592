// The view that starts a process: a form made from the kind's own JSON Schema.
//
// Strategy: each property becomes the plainest control that its schema allows; a schema this page does
// not understand becomes a field for JSON. The browser checks what the schema says, the server decides,
// and its refusal lands at the field that it names.

import { el, notice, setText } from "./dom.js";
import { words } from "./words.js";

const resolve = (schema, root) => {
  let found = schema;
  while (found.$ref) found = { ...root.$defs[found.$ref.split("/").pop()], ...found, $ref: undefined };
  const choices = found.anyOf ?? found.oneOf;
  if (choices) {
    const real = choices.map((one) => resolve(one, root)).filter((one) => one.type !== "null");
    // Of several that are possible, a text: "one, or a list of them" is one here.
    const plain = real.length === 1 ? real[0] : real.find((one) => one.type === "string");
    if (plain) found = { ...plain, ...found, anyOf: undefined, oneOf: undefined, optional: true };
  }
  return found;
};

const title = (name) => {
  const text = name.replace(/_s$/, " (s)").replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
};

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const typed = (text, type) => (type === "integer" || type === "number" ? Number(text) : text);

// A control and how to read it: {node, read() → value or undefined}.
function control(id, name, schema, required, root) {
  const common = { id, name, required, "aria-describedby": `${id}-hint ${id}-error` };
  const initial = schema.default;
  if (schema.enum) {
    const node = el("select", common, required ? null : el("option", { value: "" }),
      schema.enum.map((value) => el("option", { value, selected: value === initial }, String(value))));
    return { node, read: () => schema.enum.find((value) => String(value) === node.value) };
  }
  if (schema.type === "boolean") {
    const node = el("input", { ...common, required: false, type: "checkbox", checked: initial === true });
    return { node, read: () => node.checked };
  }
  if (schema.type === "integer" || schema.type === "number") {
    const node = el("input", { ...common, type: "number", inputmode: schema.type === "integer" ? "numeric" : "decimal",
      min: schema.minimum, max: schema.maximum, step: schema.type === "integer" ? 1 : "any", value: initial });
    return { node, read: () => (node.value === "" ? undefined : node.valueAsNumber) };
  }
  if (schema.type === "string") {
    const node = el("input", { ...common, type: "text", minlength: schema.minLength, maxlength: schema.maxLength,
      pattern: schema.pattern, value: initial, list: ["file", "source"].includes(name) ? "stored-files" : null, autocomplete: "off" });
    return { node, read: () => (node.value === "" && !required ? undefined : node.value) };
  }
  const items = schema.type === "array" ? resolve(schema.items ?? {}, root) : null;
  if (items?.enum) {
    const boxes = items.enum.map((value) => el("input", { type: "checkbox", value, checked: (initial ?? []).includes(value) }));
    const node = el("div", { id, class: "choices", role: "group", "aria-labelledby": `${id}-label`, "aria-describedby": `${id}-hint ${id}-error` },
      boxes.map((box) => el("label", { class: "choice" }, box, el("span", {}, box.value))));
    return { node, read: () => { const on = boxes.filter((box) => box.checked).map((box) => box.value); return on.length ? on : undefined; } };
  }
  if (items && ["string", "integer", "number"].includes(items.type)) {
    const node = el("input", { ...common, type: "text", value: (initial ?? []).join(", "), autocomplete: "off" });
    const read = () => node.value.split(",").map((part) => part.trim()).filter(Boolean).map((part) => typed(part, items.type));
    return { node, hint: words.process.many, read: () => (read().length ? read() : undefined) };
  }
  if (schema.type === "object" && schema.additionalProperties && !schema.properties) {
    const values = resolve(schema.additionalProperties === true ? {} : schema.additionalProperties, root);
    const node = el("textarea", { ...common, rows: 2, spellcheck: "false" });
    const read = () => Object.fromEntries(lines(node.value).map((line) => {
      const [key, ...rest] = line.split("=");
      return [key.trim(), typed(rest.join("=").trim(), values.type)];
    }));
    return { node, hint: words.process.json, read: () => (node.value.trim() ? read() : undefined) };
  }
  const node = el("textarea", { ...common, rows: 3, spellcheck: "false" }, initial === undefined ? "" : JSON.stringify(initial));
  return { node, hint: "JSON", read: () => (node.value.trim() ? JSON.parse(node.value) : undefined) };
}

export class ProcessView {
  constructor(app) {
    this.app = app;
    this.kinds = [];
    this.kind = el("select", { id: "kind", name: "kind", onchange: () => this.build() });
    this.name = el("input", { id: "job-name", type: "text", maxlength: 200, autocomplete: "off", placeholder: words.process.nameHint });
    this.fields = el("div", { class: "fields" });
    this.pause = el("p", { class: "hint" });
    this.error = el("p", { class: "error", id: "form-error", hidden: true });
    this.button = el("button", { class: "primary" }, words.process.start);
    this.stored = el("datalist", { id: "stored-files" });
    this.form = el("form", { class: "card form", onsubmit: (event) => { event.preventDefault(); this.start(); } },
      el("div", { class: "field" }, el("label", { for: "kind" }, words.process.kind), this.kind),
      this.fields,
      el("div", { class: "field" }, el("label", { for: "job-name" }, words.process.name), this.name),
      this.error, el("div", { class: "form-end" }, this.pause, this.button), this.stored);
    this.node = el("div", { class: "narrow" }, el("h1", {}, words.process.title), this.form);
  }

  async show() {
    try {
      const [kinds, files] = await Promise.all(["/v1/kinds", "/v1/files?limit=100"].map(async (url) => (await fetch(url, { cache: "no-store" })).json()));
      const names = [...new Set(files.items.map((file) => file.name))];
      this.stored.replaceChildren(...names.map((name) => el("option", { value: name })));
      if (this.kinds.length) return;
      this.kinds = kinds.items.filter((kind) => kind.startable);
      this.kind.replaceChildren(...this.kinds.map((kind) => el("option", { value: kind.kind }, kind.title)));
      if (this.kinds.some((kind) => kind.kind === "count")) this.kind.value = "count";
      this.build();
    } catch {
      notice(words.offline, true);
    }
  }

  build() {
    const kind = this.kinds.find((one) => one.kind === this.kind.value);
    if (!kind) return;
    const root = kind.params;
    const schema = resolve(root, root);
    this.controls = new Map();
    this.fields.replaceChildren(...Object.entries(schema.properties ?? {}).map(([name, given]) => {
      const property = resolve(given, root);
      const id = `p-${name}`;
      const required = (schema.required ?? []).includes(name);
      const made = control(id, name, property, required, root);
      const error = el("p", { class: "error", id: `${id}-error`, hidden: true });
      this.controls.set(name, { ...made, error });
      const hints = [property.description, made.hint, !required && property.default === undefined ? words.process.optional : null];
      const hint = el("p", { class: "hint", id: `${id}-hint` }, hints.filter(Boolean).join(" · "));
      const label = el("label", { for: id, id: `${id}-label` }, title(name));
      return el("div", { class: property.type === "boolean" ? "field check" : "field" }, label, made.node, hint, error);
    }));
    setText(this.pause, kind.pause ? words.process.pause(kind.pause) : "");
    this.clear();
  }

  clear() {
    this.error.hidden = true;
    for (const { node, error } of this.controls.values()) {
      error.hidden = true;
      node.removeAttribute("aria-invalid");
    }
  }

  // Show a refusal at the field it names, else below all.
  refuse(message, field) {
    const name = (field ?? "").split(".")[1] ?? field;
    const at = this.controls.get((name ?? "").replace(/\[.*/, ""));
    const error = at?.error ?? this.error;
    error.textContent = message;
    error.hidden = false;
    at?.node.setAttribute("aria-invalid", "true");
    (at?.node ?? this.button).focus();
  }

  async start() {
    if (this.button.getAttribute("aria-disabled")) return;
    this.clear();
    const params = {};
    for (const [name, { read }] of this.controls) {
      try {
        const value = read();
        if (value !== undefined) params[name] = value;
      } catch {
        this.refuse(words.process.bad, `params.${name}`);
        return;
      }
    }
    const name = this.name.value.trim();
    this.button.setAttribute("aria-disabled", "true");
    setText(this.button, words.process.starting);
    try {
      await this.app.channel.command("start", null, { kind: this.kind.value, params, ...(name ? { name } : {}) });
      this.name.value = "";
      this.app.go("jobs");
    } catch (error) {
      this.refuse(error.code === "offline" ? words.offline : error.message, error.field);
    } finally {
      this.button.removeAttribute("aria-disabled");
      setText(this.button, words.process.start);
    }
  }
}
