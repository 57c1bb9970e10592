// The page of the Uppy tests: what is put into its one input is uploaded at once.
//
// `?orders=` is JSON with the endpoint and other options of @uppy/tus. `window.uppy` stands for the
// buttons that a real page would have; `window.outcome` appears when no file is left to do.

import Uppy from "@uppy/core";
import Tus from "@uppy/tus";

const orders = JSON.parse(new URLSearchParams(location.search).get("orders"));
const uppy = new Uppy({ autoProceed: true });
uppy.use(Tus, { retryDelays: Array(200).fill(50), ...orders });

uppy.on("complete", ({ successful, failed }) => {
  window.outcome = {
    done: successful.map((file) => file.uploadURL),
    errors: failed.map((file) => file.error),
  };
});

document.querySelector("input").addEventListener("change", ({ target }) => {
  uppy.addFiles([...target.files].map((file) => ({ name: file.name, type: file.type, data: file })));
});

window.uppy = uppy;
