// @tus/server with its file store, in one process.
//
// The first argument is the folder for the files, the second one the path of new uploads. Listens on a
// free port and prints its address.

import { FileStore } from "@tus/file-store";
import { Server } from "@tus/server";

const [directory, path] = process.argv.slice(2);
const server = new Server({ path, datastore: new FileStore({ directory }) });
const listener = server.listen({ host: "127.0.0.1", port: 0 }, () => {
  console.log(`http://127.0.0.1:${listener.address().port}${path}`);
});
