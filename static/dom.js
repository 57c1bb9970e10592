// Elements, icons, sparkline, menu, dialog, notices. Names come from strangers, so text only ever enters the
// page as a text node: nothing parses markup.

import { words } from "./words.js";

const UNDO_MS = 5000;
const SAY_MS = 300;

const given = (value) => (value ?? false) !== false;

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (given(value)) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(given));
  return node;
}

export const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
export const button = (label, onclick, props) => el("button", { type: "button", onclick, ...props }, label);
export const part = (title, ...rest) => el("section", {}, el("h2", {}, title), ...rest);

// These write only what differs: most updates of a live list change nothing.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttr(node, name, value) {
  if (!given(value)) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Give a node these children; what is alike stays, and with it focus and selection.
export function morph(parent, ...nodes) {
  const old = [...parent.childNodes];
  if (old.length !== nodes.length) parent.replaceChildren(...nodes);
  else old.forEach((node, i) => {
    if (node.cloneNode().isEqualNode(nodes[i].cloneNode())) morph(node, ...nodes[i].childNodes);
    else node.replaceWith(nodes[i]);
  });
}

const ICONS = {
  logo: "M3 4v12M17 4v12M3 8h14M8 13q2-2 4 0",
  up: "M10 16V4M5 9l5-5 5 5",
  down: "M10 4v12M5 11l5 5 5-5",
  drop: "M10 14V4M6 8l4-4 4 4M4 17h12",
  gear: "M10 6a4 4 0 1 0 0 8a4 4 0 0 0 0-8ZM10 6V3M10 14v3M6 10H3M14 10h3M7 7 5 5M13 13l2 2M7 13l-2 2M13 7l2-2",
  cross: "M6 6l8 8M14 6l-8 8",
  check: "M5 10l4 4 6-8",
  circle: "M10 6a4 4 0 1 0 0 8a4 4 0 0 0 0-8Z",
  clock: "M10 4a6 6 0 1 0 0 12a6 6 0 0 0 0-12ZM10 7v3l2 2",
  stop: "M10 4a6 6 0 1 0 0 12a6 6 0 0 0 0-12ZM6 14l8-8",
  file: "M5 3h7l3 4v10H5zM12 3v4h3",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  jobs: "M4 6h12M4 10h8M4 14h10",
  chart: "M4 16h12M5 12l3-4 3 3 5-6",
  pause: "M7 5v10M13 5v10",
  play: "M7 5v10l8-5z",
  more: "M4 10h1M10 10h1M16 10h1",
};

export const icon = (name) => svg("svg", { viewBox: "0 0 20 20", class: "icon", "data-icon": name, "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));

export function swapIcon(parent, name) {
  if (parent.icon === name) return;
  parent.icon = name;
  parent.querySelector("svg")?.remove();
  parent.prepend(icon(name));
}

// The last 60 values as a line that ends at the right; for the eye only, numbers stand beside it.
export class Spark {
  line = svg("polyline", { class: "line" });
  area = svg("polygon", { class: "area" });
  node = svg("svg", { class: "spark", viewBox: "0 0 59 28", preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);

  set(values) {
    const top = Math.max(...values, 1);
    const from = 60 - values.length;
    const points = values.map((value, i) => `${from + i},${(26 - (value / top) * 24).toFixed(1)}`).join(" ");
    setAttr(this.line, "points", points);
    setAttr(this.area, "points", points && `${from},28 ${points} 59,28`);
  }
}

// The one polite live region. What comes in a burst is said in one sentence.
export const liveRegion = el("div", { class: "hush", role: "status", "aria-live": "polite", id: "live" });
let said = [];
export function announce(text) {
  if (said.push(text) > 1) return;
  setTimeout(() => {
    liveRegion.textContent = [said.length > 3 && words.said.more(said.length - 3), ...said.slice(-3)].filter(Boolean).join(" ");
    said = [];
  }, SAY_MS);
}

// Short messages at the foot of the page; none goes while it is looked at. over: it has gone.
export const noticeShelf = el("aside", { class: "notices", "aria-label": words.notices });
export function notice(text, bad, acts = [], over = () => {}) {
  announce(text);
  const end = () => {
    if (!node.isConnected) return;
    node.remove();
    over();
  };
  const node = el("div", { class: bad ? "notice bad" : "notice" }, el("span", {}, text), acts,
    button(icon("cross"), end, { class: "quiet", "aria-label": words.dismiss }));
  const wait = (ms) => setTimeout(() => (node.matches(":hover, :focus-within") ? wait(1000) : end()), ms);
  noticeShelf.append(node);
  wait(bad ? 2 * UNDO_MS : UNDO_MS);
  return node;
}

const owed = new Set();
addEventListener("pagehide", () => owed.forEach((run) => run()));

// Do it in five seconds, unless Undo is pressed; at once if the page is left.
export function later(text, run, undone) {
  const go = () => { if (owed.delete(go)) run(); };
  owed.add(go);
  const node = notice(text, false, button(words.undo, () => {
    owed.delete(go);
    node.remove();
    undone();
  }, { class: "undo" }), go);
}

// items: [{label, run, danger}]. Place, Escape, a click elsewhere and the focus after it are the browser's.
export function openMenu(opener, items) {
  const nodes = items.map(({ label, run, danger }) =>
    button(label, () => { menu.hidePopover(); run(); }, { role: "menuitem", tabindex: -1, class: danger && "danger" }));
  const menu = el("div", { role: "menu", class: "menu", popover: "auto", "aria-label": opener.ariaLabel, onkeydown: (event) => {
    const at = nodes.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
    if (to !== undefined) nodes.at(to % nodes.length).focus();
    else if (event.key === "Tab") menu.hidePopover();
    else return;
    event.preventDefault();
  }, ontoggle: ({ newState }) => {
    opener.ariaExpanded = newState === "open";
    if (newState === "closed") menu.remove();
  } }, nodes);
  document.querySelector("main").append(menu); // what is outside of landmarks is passed over
  menu.showPopover({ source: opener });
  nodes[0].focus({ preventScroll: true });
}

// A modal; resolves with the value of the button that closed it, or "" for Escape.
export function ask(title, body, buttons) {
  return new Promise((resolve) => {
    const box = el("dialog", { "aria-label": title, onclose: () => { box.remove(); resolve(box.returnValue); } },
      el("form", { method: "dialog" }, el("h2", {}, title), body,
        el("div", { class: "dialog-acts" }, buttons.map(({ value = "", label, kind }) => el("button", { value, class: kind }, label)))));
    document.body.append(box);
    box.showModal();
  });
}

// Copies where the browser allows it, else shows the text to be copied by hand.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice(words.copied);
  } catch {
    ask(words.copyByHand, el("pre", { tabindex: 0 }, text), [{ label: words.close }]);
  }
}
