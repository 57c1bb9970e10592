// Elements, icons, sparkline, menu, dialog, notices.
//
// Names come from strangers, so text only ever enters the page as a text node: nothing parses markup.

import { words } from "./words.js";

const UNDO_MS = 5000;
const SAY_MS = 300;

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// These write only what differs: most updates of a live list change nothing.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttr(node, name, value) {
  if (value === null || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
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

export const part = (title, ...rest) => el("section", {}, el("h2", {}, title), ...rest);

export const button = (label, onclick, props = {}) => el("button", { type: "button", onclick, ...props }, label);

const STROKES = {
  logo: "M3 4v12M17 4v12M3 8h14M8 13c1.3-1.2 2.7-1.2 4 0",
  up: "M10 16V4.5M5.5 9 10 4.5 14.5 9",
  down: "M10 4v11.5M5.5 11l4.5 4.5 4.5-4.5",
  drop: "M10 13.5v-10M5.8 7.5 10 3.3l4.2 4.2M3.5 17h13",
  gear: "M10 6a4 4 0 1 0 0 8a4 4 0 0 0 0-8ZM10 6V3M10 14v3M6 10H3M14 10h3M7 7 5 5M13 13l2 2M7 13l-2 2M13 7l2-2",
  cross: "M5.5 5.5l9 9M14.5 5.5l-9 9",
  check: "M4.5 10.5l3.6 3.6 7.4-8",
  circle: "M10 6a4 4 0 1 0 0 8a4 4 0 0 0 0-8Z",
  clock: "M10 4a6 6 0 1 0 0 12a6 6 0 0 0 0-12ZM10 7v3l2 2",
  stop: "M10 4a6 6 0 1 0 0 12a6 6 0 0 0 0-12ZM6 14l8-8",
  file: "M5.5 3h6l3.5 3.5V17h-9.5zM11.5 3v3.5H15",
  trash: "M4.5 6h11M8 6V4.2h4V6M6 6l.7 10.5h6.6L14 6",
  jobs: "M4 5.5h12M4 10h8M4 14.5h10",
  chart: "M3.5 16.5h13M5 13l3.5-4 3 2.5L16 5",
  moon: "M15 12A6 6 0 0 1 8 5a6 6 0 1 0 7 7Z",
};
const FILLS = {
  pause: "M6 5h3v10h-3zM11 5h3v10h-3z",
  play: "M7 4v12l9-6z",
  more: "M4 9h2v2h-2zM9 9h2v2h-2zM14 9h2v2h-2z",
};

export function svg(tag, props, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function icon(name) {
  const filled = name in FILLS;
  const node = svg("svg", { viewBox: "0 0 20 20", class: filled ? "icon solid" : "icon", "aria-hidden": "true" },
    svg("path", { d: filled ? FILLS[name] : STROKES[name] }));
  node.dataset.icon = name;
  return node;
}

export function swapIcon(parent, name) {
  const old = parent.querySelector("svg");
  if (old?.dataset.icon === name) return;
  if (old) old.replaceWith(icon(name));
  else parent.prepend(icon(name));
}

// The last so many values as a line that ends at the right; for the eye only, numbers stand beside it.
export class Spark {
  constructor(most = 60) {
    this.most = most;
    this.line = svg("polyline", { class: "line" });
    this.area = svg("polygon", { class: "area" });
    this.node = svg("svg", { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);
  }

  set(values) {
    const top = Math.max(...values, 1);
    const x = (i) => (((this.most - values.length + i) / (this.most - 1)) * 100).toFixed(1);
    const points = values.map((value, i) => `${x(i)},${(26 - (value / top) * 24).toFixed(1)}`).join(" ");
    setAttr(this.line, "points", points);
    setAttr(this.area, "points", values.length ? `${x(0)},28 ${points} 100,28` : "");
  }
}

// The one polite live region. What comes in a burst is said in one sentence.
export const liveRegion = el("div", { class: "hush", role: "status", "aria-live": "polite", id: "live" });
let said = [];
export function announce(text) {
  if (said.push(text) > 1) return;
  setTimeout(() => {
    const last = said.slice(-3).join(" ");
    liveRegion.textContent = said.length > 3 ? `${words.said.more(said.length - 3)} ${last}` : last;
    said = [];
  }, SAY_MS);
}

// Short messages at the foot of the page; none goes while it is looked at.
export const noticeShelf = el("aside", { class: "notices", "aria-label": words.notices });
export function notice(text, bad = false, acts = [], ms = bad ? 12000 : UNDO_MS, over = () => {}) {
  announce(text);
  const node = el("div", { class: bad ? "notice bad" : "notice" }, el("span", {}, text), acts,
    button(icon("cross"), () => { node.remove(); over(); }, { class: "quiet", "aria-label": words.dismiss }));
  const end = () => {
    if (node.matches(":hover, :focus-within")) setTimeout(end, 1000);
    else if (node.isConnected) {
      node.remove();
      over();
    }
  };
  noticeShelf.append(node);
  setTimeout(end, ms);
  return node;
}

const owed = new Set();
addEventListener("pagehide", () => owed.forEach((run) => run()));

// Do it in five seconds, unless Undo is pressed; at once if the page is left.
export function later(text, run, undone) {
  const go = () => { if (owed.delete(go)) run(); };
  const undo = button(words.undo, () => {
    owed.delete(go);
    node.remove();
    undone();
  }, { class: "undo" });
  owed.add(go);
  const node = notice(text, false, undo, UNDO_MS, go);
}

// items: [{label, run, danger}]; arrow keys, Home, End and Tab here, Escape and a click elsewhere by the browser.
export function openMenu(opener, items) {
  const nodes = items.map(({ label, run, danger }) =>
    button(label, () => { menu.hidePopover(); run(); }, { role: "menuitem", tabindex: "-1", class: danger ? "danger" : null }));
  const menu = el("div", { role: "menu", class: "menu", popover: "auto", "aria-label": opener.getAttribute("aria-label") }, nodes);
  const from = scrollY; // what has brought the opener into sight may be told of only now
  const away = () => { if (Math.abs(scrollY - from) > 30) menu.hidePopover(); };
  menu.addEventListener("keydown", (event) => {
    const at = nodes.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (to !== undefined) nodes[(to + nodes.length) % nodes.length].focus();
    else if (event.key === "Tab") menu.hidePopover();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  menu.addEventListener("toggle", ({ newState }) => {
    if (newState === "open") return;
    removeEventListener("scroll", away);
    setAttr(opener, "aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) opener.focus();
    menu.remove();
  });
  document.querySelector("main").append(menu); // what is outside of landmarks is passed over
  menu.showPopover();
  const box = opener.getBoundingClientRect();
  const size = menu.getBoundingClientRect();
  const below = box.bottom + size.height + 8 < innerHeight;
  menu.style.left = `${Math.max(8, box.right - size.width)}px`;
  menu.style.top = `${Math.max(8, below ? box.bottom + 4 : box.top - size.height - 4)}px`;
  addEventListener("scroll", away, { passive: true });
  setAttr(opener, "aria-expanded", "true");
  nodes[0].focus({ preventScroll: true });
}

// A modal; resolves with the value of the button that closed it, or "" for Escape. A button with run does
// not close it.
export function ask(title, body, buttons) {
  return new Promise((resolve) => {
    const box = el("dialog", { "aria-label": title },
      el("form", { method: "dialog" },
        el("h2", {}, title), body,
        el("div", { class: "dialog-acts" }, buttons.map(({ value, label, kind, run }) =>
          el("button", { value, class: kind ?? null, type: run ? "button" : "submit", onclick: run ?? null }, label)))));
    box.addEventListener("close", () => { box.remove(); resolve(box.returnValue); });
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
    await ask(words.copyByHand, el("pre", { tabindex: "0" }, text), [{ value: "", label: words.close }]);
  }
}
