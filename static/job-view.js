// The page of one job.
import { el } from "./dom.js";
export class JobView {
  constructor(app) {
    this.app = app;
    this.node = el("div");
  }

  show() {}
}
