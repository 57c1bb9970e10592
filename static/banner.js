// What is said of the connection: beside the title always, in a banner while it is down.

import { announce, button, el, icon, setAttr, setText } from "./dom.js";
import { format, words } from "./words.js";

const BANNER_MS = 1000;
const SILENT_MS = 4000;
const CROWDED = 4429; // the close code for too many connections

export class Banner {
  constructor(app) {
    this.app = app;
    this.text = el("span", { class: "live-text" });
    this.live = el("span", { class: "live" }, el("span", { class: "dot" }), this.text);
    this.what = el("span");
    this.next = el("span", { class: "banner-next" });
    this.button = button("", () => (app.channel.state === "ended" ? location.reload() : app.channel.retry()));
    this.node = el("aside", { class: "banner", "aria-label": words.bannerLabel, hidden: true }, icon("clock"), this.what, this.next, this.button);
    this.lost = false;
  }

  status() {
    const { channel, store } = this.app;
    const { state } = channel;
    const silent = performance.now() - channel.heardAt;
    const text = state === "live"
      ? silent > SILENT_MS && document.visibilityState === "visible" ? words.silent(Math.round(silent / 1000)) : words.live(channel.rtt)
      : state === "connecting" ? words.connecting : words.lost;
    setText(this.text, text);
    setAttr(this.live, "data-state", state === "live" && silent > SILENT_MS ? "silent" : state);
    const ended = state === "ended";
    const down = ended || (state === "lost" && (channel.restarting || Date.now() - channel.lostAt > BANNER_MS));
    if (down) {
      setText(this.what, ended ? (channel.code === CROWDED ? words.banner.crowded : words.banner.ended) : channel.restarting ? words.banner.restart
        : store.ready ? words.banner.lost(format.second(channel.lostAt)) : words.banner.never);
      const s = Math.ceil(((channel.retryAt ?? 0) - Date.now()) / 1000);
      setText(this.next, ended ? "" : words.banner.again(channel.retryAt ? s : 0));
      setText(this.button, ended ? words.banner.reload : words.banner.now);
      if (!this.lost) announce(this.what.textContent);
    } else if (this.lost && state === "live") announce(words.back);
    if (state !== "lost" || down) this.lost = down;
    this.node.hidden = !(down || (state === "lost" && this.lost));
    document.body.classList.toggle("stale", !this.node.hidden);
  }
}
