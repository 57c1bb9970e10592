// Uploads one file by tus-js-client.
//
// Its orders are JSON in the first argument. It tells in lines of JSON what happens: {"url"} of the
// upload, each {"offset"} that was acknowledged, then {"done": url} or {"error": text}. A line on stdin
// ends the upload and removes it from the server: {"terminated": url}.

import { createReadStream, readFileSync } from "node:fs";
import { PassThrough } from "node:stream";
import * as tus from "tus-js-client";

const { endpoint, file, name, memory, options } = JSON.parse(process.argv[2]);

function tell(line) {
  console.log(JSON.stringify(line));
}

function end(line) {
  tell(line);
  process.exit("error" in line ? 1 : 0);
}

function open() {
  // A stream without a path has no length and can be read only once.
  if (options.uploadLengthDeferred) return createReadStream(file).pipe(new PassThrough());
  // Of a file that is sent in pieces 4.3.1 never says "Upload-Complete: ?1"; of a buffer it does.
  return options.protocol ? readFileSync(file) : createReadStream(file);
}

// The IETF's drafts know no metadata of tus; a file's name is in the header that HTTP has for it.
const disposition = `attachment; filename*=UTF-8''${encodeURIComponent(name)}`;

const upload = new tus.Upload(open(), {
  endpoint,
  metadata: { filename: name, filetype: "application/octet-stream" },
  headers: options.protocol ? { "Content-Disposition": disposition } : {},
  retryDelays: Array(200).fill(50),
  urlStorage: new tus.FileUrlStorage(memory),
  onUploadUrlAvailable: () => tell({ url: upload.url }),
  onChunkComplete: (_, offset) => tell({ offset }),
  onSuccess: () => end({ done: upload.url }),
  onError: (error) => end({ error: String(error) }),
  ...options,
});

process.stdin.once("data", () => {
  upload.abort(true).then(
    () => tell({ terminated: upload.url }), // requests for its parts may still be under way
    (error) => end({ error: String(error) }),
  );
});

const [previous] = await upload.findPreviousUploads();
if (previous) upload.resumeFromPreviousUpload(previous);
upload.start();
