// How it stands with the connection: a word in the header, and a banner over the page. Who is back within a
// second is not told. What ends while it is lost or the page hidden is told once all of it is here.

import { announce, button, el, icon, setAttr, setText } from "./dom.js";
import { format, words } from "./words.js";

const LOST_MS = 1000;
const SILENT_MS = 2000;
const FEW = 20;
const AWAY_MS = 30000;
const CROWDED = 4429;

export class Banner {
  constructor(app) {
    this.app = app;
    this.now = el("span", { class: "live-text" });
    this.live = el("span", { class: "live" }, el("span", { class: "dot" }), this.now);
    this.said = el("span");
    this.next = el("span", { class: "banner-next" });
    this.button = button("", () => this.press());
    this.close = button(icon("cross"), () => this.show(null), { class: "quiet", "aria-label": words.dismiss });
    this.node = el("aside", { class: "banner", "aria-label": words.bannerLabel, hidden: true }, icon("clock"), this.said, this.next, this.button, this.close);
    this.shown = null;
    this.left = false;
  }

  status() {
    const { channel, store } = this.app;
    const { state, behind } = channel;
    const hidden = document.visibilityState === "hidden";
    const age = performance.now() - channel.heardAt;
    const silent = state === "live" && age > SILENT_MS && !hidden;
    setText(this.now, state === "connecting" ? words.connecting : state !== "live" ? words.lost
      : silent ? words.asOf(format.second(Date.now() - age)) : behind > FEW ? words.behind(format.count(behind)) : words.live(channel.rtt));
    setAttr(this.live, "data-state", silent ? "silent" : state);
    const down = state === "ended" || (state === "lost" && (channel.restarting || this.shown === "lost" || Date.now() - channel.lostAt > LOST_MS));
    this.left ||= down || hidden;
    if (down) this.down(state);
    if (state !== "live" || hidden) store.away ??= {};
    else if (store.away && behind === 0) this.back();
  }

  down(state) {
    const { channel, store } = this.app;
    const s = Math.max(0, Math.ceil((channel.retryAt - Date.now()) / 1000));
    const ended = state === "ended";
    setText(this.said, ended ? (channel.code === CROWDED ? words.banner.crowded : words.banner.ended)
      : channel.restarting ? words.banner.restart(s) : store.ready ? words.banner.lost(format.second(channel.lostAt)) : words.banner.never);
    setText(this.next, ended || (channel.restarting && s) ? "" : words.banner.again(s));
    this.show(ended ? "ended" : "lost", ended ? words.banner.reload : words.banner.now);
  }

  back() {
    const { store } = this.app;
    const { succeeded = 0, failed = 0, cancelled = 0 } = store.away;
    const lost = this.shown === "lost";
    store.away = null;
    if (this.left && succeeded + failed + cancelled) {
      this.to = failed ? "failed" : succeeded ? "done" : "cancelled";
      setText(this.said, words.banner.away(succeeded, failed, cancelled));
      setText(this.next, "");
      this.show("away", words.banner.see);
    } else if (lost) {
      announce(words.back);
      this.show(null);
    }
    this.left = false;
  }

  show(what, label) {
    if (what) setText(this.button, label);
    if (what === this.shown && what !== "away") return;
    this.shown = what;
    this.node.hidden = !what;
    this.close.hidden = what !== "away";
    document.body.classList.toggle("stale", what === "lost" || what === "ended");
    if (what) announce(this.said.textContent);
    clearTimeout(this.timer);
    if (what === "away") this.timer = setTimeout(() => this.show(null), AWAY_MS);
  }

  press() {
    const { channel, go } = this.app;
    if (this.shown === "ended") location.reload();
    else if (this.shown === "lost") channel.retry();
    else {
      this.show(null);
      go(`jobs?state=${this.to}`);
    }
  }
}
