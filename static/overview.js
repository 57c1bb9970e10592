// The view of the whole service.
import { el } from "./dom.js";
export class Overview {
  constructor(app) {
    this.app = app;
    this.node = el("div");
  }

  show() {}
}
