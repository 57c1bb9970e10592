// How it stands with the connection: a word in the header, and a banner over the page. Who is back within a
// second is not told. What ends while it is lost or the page hidden is told once all of it is here.

import { announce, button, el, icon, setAttr, setText } from "./dom.js";
import { format, words } from "./words.js";

const LOST_MS = 1000;
const SILENT_MS = 2000;
const FEW = 20;
const AWAY_MS = 30000;
const CROWDED = 4429;
const say = words.banner;

export class Banner {
  constructor(app) {
    this.app = app;
    this.now = el("span", { class: "live-text" });
    this.live = el("span", { class: "live" }, el("span", { class: "dot" }), this.now);
    this.text = el("span");
    this.button = button("", () => this.press());
    this.close = button(icon("cross"), () => this.show(), { class: "quiet", "aria-label": words.dismiss });
    this.node = el("aside", { class: "banner", "aria-label": words.bannerLabel, hidden: true }, icon("clock"), this.text, this.button, this.close);
  }

  status() {
    const { channel, store } = this.app;
    const { state, behind, lostAt, code, restarting } = channel;
    const hidden = document.visibilityState === "hidden";
    const age = performance.now() - channel.heardAt;
    const silent = state === "live" && age > SILENT_MS && !hidden;
    setText(this.now, state !== "live" ? words[state] ?? words.lost : silent ? words.asOf(format.second(Date.now() - age))
      : behind > FEW ? words.behind(format.count(behind)) : words.live(channel.rtt));
    setAttr(this.live, "data-state", silent ? "silent" : state);
    const s = Math.max(0, Math.ceil((channel.retryAt - Date.now()) / 1000));
    const down = state === "ended" || (state === "lost" && (restarting || this.shown === "lost" || Date.now() - lostAt > LOST_MS));
    if (state === "ended") this.show(state, code === CROWDED ? say.crowded : say.ended, say.reload);
    else if (down) this.show(state, restarting && s ? say.restart(s) : `${restarting ? say.restarting : store.ready ? say.lost(format.second(lostAt)) : say.never} ${say.again(s)}`, say.now);
    this.left ||= down || hidden;
    if (state !== "live" || hidden) store.away ??= {};
    else if (store.away && !behind) this.back(store.away);
  }

  back({ succeeded = 0, failed = 0, cancelled = 0 }) {
    this.app.store.away = null;
    if (this.left && succeeded + failed + cancelled) {
      this.to = failed ? "failed" : succeeded ? "done" : "cancelled";
      this.show("away", say.away(succeeded, failed, cancelled), say.see);
      this.timer = setTimeout(() => this.show(), AWAY_MS);
    } else if (this.shown === "lost") {
      announce(words.back);
      this.show();
    }
    this.left = false;
  }

  // What is shown: lost, ended, away, or nothing.
  show(what, text, label) {
    setText(this.text, text ?? "");
    setText(this.button, label ?? "");
    if (what && what !== this.shown) announce(text);
    this.shown = what;
    this.node.hidden = !what;
    this.close.hidden = what !== "away";
    document.body.classList.toggle("stale", what === "lost" || what === "ended");
    clearTimeout(this.timer);
  }

  press() {
    const { shown } = this;
    if (shown === "ended") location.reload();
    else if (shown === "lost") this.app.channel.retry();
    else {
      this.show();
      this.app.go(`jobs?state=${this.to}`);
    }
  }
}
