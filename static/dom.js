// Elements, icons, menu, dialog, notices.
//
// Strategy: names come from strangers, so text only ever enters the page as a text node; nothing here
// parses markup. One menu, one dialog and one live region exist at a time. Styles are classes, or are
// set through the CSSOM, which the page's policy allows.

import { words } from "./words.js";

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

// Writes only what differs: most updates of a live list change nothing.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttr(node, name, value) {
  if (value === null || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
}

const STROKES = {
  logo: "M3 4v12M17 4v12M3 8h14M8 13c1.3-1.2 2.7-1.2 4 0",
  up: "M10 16V4.5M5.5 9 10 4.5 14.5 9",
  down: "M10 4v11.5M5.5 11l4.5 4.5 4.5-4.5",
  drop: "M10 13.5v-10M5.8 7.5 10 3.3l4.2 4.2M3.5 17h13",
  gear: "M10 4.8a5.2 5.2 0 1 0 0 10.4 5.2 5.2 0 0 0 0-10.4ZM10 8a2 2 0 1 0 0 4 2 2 0 0 0 0-4ZM10 4.8v-2M10 17.2v-2M4.8 10h-2M17.2 10h-2M6.3 6.3 4.9 4.9M15.1 15.1l-1.4-1.4M6.3 13.7l-1.4 1.4M15.1 4.9l-1.4 1.4",
  cross: "M5.5 5.5l9 9M14.5 5.5l-9 9",
  check: "M4.5 10.5l3.6 3.6 7.4-8",
  circle: "M10 5.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9Z",
  clock: "M10 3.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13ZM10 6.5V10l2.3 1.8",
  stop: "M10 3.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13ZM5.5 14.5l9-9",
  file: "M5.5 3h6l3.5 3.5V17h-9.5zM11.5 3v3.5H15",
  trash: "M4.5 6h11M8 6V4.2h4V6M6 6l.7 10.5h6.6L14 6",
  jobs: "M4 5.5h12M4 10h8M4 14.5h10",
};
const FILLS = {
  pause: "M5.5 4.5h3v11h-3zM11.5 4.5h3v11h-3z",
  play: "M6.5 4.2v11.6L16 10z",
  more: "M3.6 10a1.4 1.4 0 1 0 2.8 0 1.4 1.4 0 0 0-2.8 0M8.6 10a1.4 1.4 0 1 0 2.8 0 1.4 1.4 0 0 0-2.8 0M13.6 10a1.4 1.4 0 1 0 2.8 0 1.4 1.4 0 0 0-2.8 0",
};
const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, props) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  return node;
}

export function icon(name) {
  const filled = name in FILLS;
  const node = svg("svg", { viewBox: "0 0 20 20", class: filled ? "icon solid" : "icon", "aria-hidden": "true" });
  node.append(svg("path", { d: filled ? FILLS[name] : STROKES[name] }));
  node.dataset.icon = name;
  return node;
}

export function swapIcon(parent, name) {
  const old = parent.querySelector("svg");
  if (old?.dataset.icon === name) return;
  if (old) old.replaceWith(icon(name));
  else parent.prepend(icon(name));
}

// The one polite live region.
const live = el("div", { class: "hush", role: "status", "aria-live": "polite", id: "live" });
export const liveRegion = live;
export function announce(text) {
  live.textContent = text;
}

// Short messages at the foot of the page; a bad one stays longer.
const shelf = el("aside", { class: "notices", "aria-label": words.notices });
export const noticeShelf = shelf;
export function notice(text, bad = false) {
  announce(text);
  const node = el("div", { class: bad ? "notice bad" : "notice" }, el("span", {}, text),
    el("button", { type: "button", class: "quiet", "aria-label": words.dismiss, onclick: () => node.remove() }, icon("cross")));
  shelf.append(node);
  setTimeout(() => node.remove(), bad ? 12000 : 5000);
}

let closeMenu = () => {};

// items: [{label, run, danger}]; arrow keys, Home, End, Escape, Tab and a click elsewhere work.
export function openMenu(button, items) {
  const again = button.getAttribute("aria-expanded") === "true";
  closeMenu();
  if (again) return;
  const nodes = items.map(({ label, run, danger }) =>
    el("button", { type: "button", role: "menuitem", tabindex: "-1", class: danger ? "danger" : null,
      onclick: () => { closeMenu(); run(); } }, label));
  const menu = el("div", { role: "menu", class: "menu", "aria-label": button.getAttribute("aria-label") }, nodes);
  const away = (event) => { if (!menu.contains(event.target) && !button.contains(event.target)) closeMenu(false); };
  closeMenu = (refocus = true) => {
    menu.remove();
    button.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", away, true);
    window.removeEventListener("scroll", closeMenu);
    if (refocus === true && button.isConnected) button.focus();
    closeMenu = () => {};
  };
  menu.addEventListener("keydown", (event) => {
    const at = nodes.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (to !== undefined) nodes[(to + nodes.length) % nodes.length].focus();
    else if (event.key === "Escape" || event.key === "Tab") closeMenu();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.querySelector("main").append(menu); // what is outside of landmarks is passed over
  const box = button.getBoundingClientRect();
  const size = menu.getBoundingClientRect();
  const below = box.bottom + size.height + 8 < innerHeight;
  menu.style.setProperty("left", `${Math.max(8, box.right - size.width)}px`);
  menu.style.setProperty("top", `${Math.max(8, below ? box.bottom + 4 : box.top - size.height - 4)}px`);
  button.setAttribute("aria-expanded", "true");
  document.addEventListener("pointerdown", away, true);
  window.addEventListener("scroll", closeMenu, { passive: true });
  nodes[0].focus({ preventScroll: true });
}

// A modal; resolves with the value of the button that closed it, or "" for Escape.
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
