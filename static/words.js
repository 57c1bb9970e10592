// All words, and how numbers are written: a translation is this file.

const counted = (n, what) => `${n} ${what}${String(n) === "1" ? "" : "s"}`;

export const words = {
  title: "Sluice",
  views: { jobs: "Jobs", files: "Files", processes: "Processes", overview: "Overview" },
  nav: "Views",
  skip: "Skip to the content",
  running: (percent, n) => [percent && `(${percent})`, n, "running"].filter(Boolean).join(" "),
  undo: "Undo",
  unknown: "—",
  select: "Select",
  help: {
    title: "Keyboard",
    letters: "Single letters do something on this page",
    keys: [
      ["j k", "next, previous job"], ["x", "select it; Shift j or k a range"], ["Ctrl a", "select all"],
      ["p", "pause or resume"], ["c", "cancel"], ["r", "retry"], ["Delete", "remove what has ended"], ["z", "undo"],
      ["Enter", "open it"], ["m", "its menu"], ["/", "search"], ["u", "upload"],
      ["n", "new process"], ["1 2 3 4", "jobs, files, processes, overview"], ["Escape", "clear, close"], ["?", "this sheet"],
    ],
  },
  live: (ms) => (ms === null ? "live" : `live · ${ms} ms`),
  connecting: "connecting",
  asOf: (at) => `as of ${at}`,
  behind: (n) => `catching up, ${n} behind`,
  lost: "offline",

  bannerLabel: "Connection",
  banner: {
    lost: (at) => `The connection was lost at ${at}. What you see is from then.`,
    restart: (s) => `The server is restarting, back in ${s} s.`,
    restarting: "The server is restarting.",
    never: "The server does not answer.",
    again: (s) => (s > 0 ? `Reconnecting in ${s} s` : "Reconnecting …"),
    now: "Try now",
    ended: "The server has closed this channel.",
    crowded: "Too many pages are open. Close some.",
    reload: "Reload",
    away: (...n) => "While you were away: " + ["done", "failed", "cancelled"].map((what, i) => n[i] && `${n[i]} ${what}`).filter(Boolean).join(", ") + ".",
    see: "Show",
  },
  back: "Connected again.",
  unanswered: "No answer came: nobody knows whether it was done.",
  offline: "There is no connection to the server.",

  now: {
    label: "Now",
    in: "In",
    out: "Out",
    running: "Running",
    free: "Free",
    slots: (n) => `of ${counted(n, "slot")}`,
    waiting: (paused, queued) => `${paused} paused · ${queued} queued`,
    stored: (size, n) => `${size} stored · ${counted(n, "file")}`,
  },

  drop: {
    bold: "Drop files or folders anywhere",
    rest: " — uploads go on after a reload or a lost connection.",
    here: "Drop to upload",
    folder: "Folder",
    upload: "Upload",
    process: "New process",
  },

  filters: { all: "All", done: "Done" },
  filterLabel: "Show jobs by state",
  kindLabel: "Show only",
  allKinds: "All kinds",
  kinds: { upload: "Uploads", download: "Downloads", export: "Exports" },
  sortLabel: "Order",
  sorts: { "": "Newest first", old: "Oldest first", name: "By name", progress: "By progress", rate: "By rate" },
  fresh: (n) => (n ? `${n} new` : ""),
  many: {
    all: "Select all",
    picked: (n, more) => `${more ? "All" : n} selected`,
    clear: "Clear",
    jobs: (n) => counted(n || "All", "job"),
    done: (act, n, failed, why) => `${act}: ${n} done.` + (failed ? ` ${failed} not: ${why}` : ""),
  },
  search: "Search",
  searchHint: "Search   /",
  jobsLabel: "Jobs",
  more: "Loading more …",
  nothing: "No job matches.",
  clear: "Show all jobs",

  empty: {
    title: "Nothing here yet",
    text: "Upload a file, or start a process.",
    curl: "Or from a terminal:",
    files: "No files yet. What is uploaded or made is kept here.",
  },

  state: {
    running: "Running", pausing: "Pausing", paused: "Paused", queued: "Queued", scheduled: "Scheduled",
    cancelling: "Cancelling", cancelled: "Cancelled", succeeded: "Done", failed: "Failed", away: "Waiting", stalled: "Stalled",
  },
  act: {
    pause: "Pause", resume: "Resume", cancel: "Cancel", retry: "Retry", download: "Download", choose: "Choose file",
    delete: "Remove", open: "Open", curl: "Copy as curl",
    force: "Cancel without clean-up", more: "More",
  },
  of: (act, name) => `${act} ${name}`,
  doing: { pause: "Pausing", resume: "Resuming", cancel: "Cancelling", retry: "Retrying", delete: "Removing" },
  removed: (name) => `${name} removed.`,
  refused: (act, why) => `${act} did not work: ${why}`,

  phase: { receiving: "", waiting: "Waits for other parts", joining: "Joining the parts", checking: "Checking", publishing: "" },
  units: { rows: "rows", steps: "steps", files: "files" },
  soFar: (amount) => `${amount} so far`,
  part: (done, total) => `${done} of ${total}`,
  left: (time) => `${time} left`,
  stalled: (at) => `Nothing has come since ${at}; what came is safe.`,
  waits: {
    slot: (running, slots, n) => (n > 1 ? `No. ${n} in line · waits` : n ? "Next in line · waits" : "Waits") + " for a slot" + (slots ? `: ${running} of ${slots} in use` : ""),
    after: "Waits for another job",
    time: (at) => `Starts at ${at}`,
    backoff: (at, n) => `Attempt ${n} at ${at}`,
  },
  away: {
    here: () => "The connection was lost; this tab sends on when it can.",
    mine: (amount) => `${amount} are safe. Choose the file again to go on.`,
    other: (amount) => `${amount} are safe. Waits for its sender to go on.`,
  },
  undoing: ({ done, total }) => `Undoing: ${done} of ${total}`,
  undone: ({ done, total }) => `Undone: ${done} of ${total}.`,
  by: {
    you: "by you", server: "by the server", browser: "in another browser", api: "over the API",
    who: (name) => `by ${name}`,
  },
  paused: (who, at) => `paused ${who}, ${at}`,
  cancelled: (who) => `Cancelled ${who}.`,
  gone: "Nothing is left of it.",
  took: (amount, time) => `${amount} in ${time}`,
  expired: "Not finished in time.",

  next: {
    "client-gone": "Nothing was kept; send it again.",
    interrupted: "Nothing was kept; send it again.",
    "file-unknown": "Upload the file, then retry.",
  },

  uploads: {
    label: "Uploads of this tab",
    sum: (n, done, waiting, rest) => `Uploading ${counted(n, "file")}: ${done} done, ${waiting} waiting · ${rest}`,
    done: (n, size) => `Uploaded ${counted(n, "file")} · ${size}`,
    pauseAll: "Pause all",
    resumeAll: "Resume all",
    cancelAll: "Cancel all",
    cancelled: "All uploads are cancelled.",
    safe: "After a reload choose the same files again: they go on.",
    held: "Paused. What is stored is safe.",
    lost: "The connection was lost; what is stored is safe.",
    failed: (n, name) => (n > 1 ? `${n} files are not uploaded` : `${name} is not uploaded`),
    again: "Try again",
    drop: "Give up",
    twice: (name, ...more) => name + (more.length ? ` and ${more.length} more are` : " is") + " on the way already.",
    other: (name) => `That is not the ${name} of before.`,
    elsewhere: "It is being sent from another tab or browser just now.",
    unreadable: "It has changed or can no longer be read. Choose it again.",
    ended: "The server no longer knows it.",
    limit: "A proxy lets only small requests pass (client_max_body_size).",
    collected: "Something between you and the server collects uploads: progress comes late, and a pause does not hold the sender. nginx needs proxy_request_buffering off.",
    left: (name, ...more) => name + (more.length ? ` and ${more.length} more` : "") + " can't be read.",
  },

  files: {
    export: "Export", archive: "Archive", process: "Start a process", delete: "Delete",
    deleted: (n, name) => (n > 1 ? `${n} files` : name) + " deleted.",
    more: "Show older files",
    fresh: (n) => counted(n, "new file"),
    none: "No file matches.",
    picked: (n, size) => `${n} selected · ${size}`,
    version: (n) => `v${n}`,
    versions: "Versions",
    job: "Job",
    digest: "Copy the SHA-256",
    expires: (at) => `until ${at}`,
    order: "in the order of your choice",
    preview: "The first rows",
  },

  process: {
    title: "New process",
    kind: "Kind",
    groups: { archive: "Files", checksum: "Files", compress: "Files", decompress: "Files", fetch: "Files", scrub: "Files",
      csv: "Tables", export: "Tables", exec: "Programs" },
    others: "Others",
    name: "Job name",
    nameHint: "shown in the list",
    none: "as usual",
    values: { "\t": "tab", ",": "comma", ";": "semicolon", "|": "bar" },
    add: "Add",
    several: "Enter adds another one",
    each: "several make a job each",
    many: "one per line",
    map: (values) => `one per line: name = ${values ?? "value"}`,
    priority: "the higher the earlier",
    chain: "Then start …",
    then: "Then",
    result: "The result before",
    without: "Without this one",
    start: "Start",
    jobs: (n) => `Starts ${n} jobs.`,
    pause: (text) => `Pausing takes effect ${text}.`,
    started: (name) => `${name} was started.`,
    begun: (n) => `${n} started.`,
    some: (n, failures, why) => `${n} started, ${failures} not: ${why}`,
    partly: (why) => `What comes before is started; this is not: ${why}`,
    again: "No answer. Start again: nothing is started twice.",
    problems: (n) => `${n} ${n === 1 ? "process" : "processes"} could not be loaded`,
  },

  said: {
    started: (name) => `${name} started.`,
    quarter: (name, percent) => `${name}: ${percent}`,
    succeeded: (name) => `${name} is done.`,
    failed: (name, why) => `${name} failed. ${why}`,
    cancelled: (name) => `${name} was cancelled.`,
    paused: (name) => `${name} is paused.`,
    more: (n) => `${n} more.`,
  },

  job: {
    back: "← Jobs",
    details: "Facts",
    params: "Parameters",
    outcome: "Result",
    history: "History",
    raw: "Raw JSON",
    log: "Log",
    none: "No lines.",
    skipped: (n) => `… ${n} lines skipped`,
    more: (n) => `… ${n} more`,
    follow: (n) => (n ? `Follow: ${n} new` : "Follow"),
    unknown: (id) => `There is no job ${id} here.`,
    removed: (name) => `${name} was removed from the list. Its files are kept.`,
    safe: { true: "Nothing of it is kept.", false: "Stored files are as they were." },
    here: "in this browser",
    bool: { true: "yes", false: "no" },
    doors: { rest: "REST", simple: "simple API", tus: "tus", resumable: "resumable upload" },
    causes: {
      pause: "paused", run: "resumed", cancel: "cancelled", command: "changed", claimed: "got a slot", checkpoint: "at a safe point",
      done: "finished", error: "went wrong", undone: "all is undone", due: "time has come", after: "others have ended",
      deadline: "took too long", crash: "the server had crashed", shutdown: "the server stopped", expired: "not finished in time",
      "client-gone": "the sender has gone", stalled: "nothing came", "client-back": "the sender is back", "taken-over": "by a newer request",
    },
  },

  overview: {
    disk: "Disk", service: "Service",
    axis: (s, rate) => [`${s} s ago`, `at most ${rate}`, "now"],
    slots: (n, of) => `${n} of ${of} slots in use`,
    free: (free, of) => `${free} free of ${of}`,
    facts: ({ queued, loop_lag_ms: lag, subscribers }) => [["Waiting for a slot", queued], ["The loop is late by", `${lag} ms`], ["Watching", subscribers]],
  },

  copy: "Copy",
  copied: "Copied.",
  copyByHand: "Copy this text",
  close: "Close",
  dismiss: "Dismiss",
  notices: "Notices",
};


const NB = "\u00a0";
// Made when first used: while they are, the connection is opened already.
const made = (kind) => (options) => {
  let one;
  return { format: (value) => (one ??= new Intl[kind](undefined, options)).format(value) };
};
const numbers = made("NumberFormat");
const dates = made("DateTimeFormat");
const whole = numbers({ maximumFractionDigits: 0 });
const short = numbers({ maximumSignificantDigits: 2 });
const tenth = numbers({ minimumFractionDigits: 1, maximumFractionDigits: 1 });
const compact = numbers({ notation: "compact", maximumSignificantDigits: 3 });
const clock = dates({ timeStyle: "short" });
const seconds = dates({ timeStyle: "medium" });
const day = dates({ day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const full = dates({ dateStyle: "medium", timeStyle: "short" });

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
const SCALES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

const scaleOf = (s) => SCALES.find(([size]) => s >= 2 * size) ?? SCALES[3];
const powerOf = (n) => UNITS.findIndex((unit, i) => i === 5 || Math.round(n / 1000 ** i) < 1000);
const scaled = (n, i) => (i && n < 100 * 1000 ** i ? tenth : whole).format(n / 1000 ** i);
const isToday = (at) => new Date(at).toDateString() === new Date().toDateString();

export const format = {
  count: (n) => (n < 10000 ? whole : compact).format(n),
  percent: (fraction) => `${Math.floor(fraction * 100)}${NB}%`,
  bytes: (n) => `${scaled(n, powerOf(n))}${NB}${UNITS[powerOf(n)]}`,
  amount: (n, unit) => (unit === "bytes" ? format.bytes(n) : `${format.count(n)}${NB}${words.units[unit] ?? unit}`),
  pair(done, total, unit) {
    if ((total ?? null) === null) return words.soFar(format.amount(done, unit));
    return words.part(unit !== "bytes" ? format.count(done) : done && scaled(done, powerOf(total)), format.amount(total, unit));
  },
  rate(n, unit) {
    if ((n ?? null) === null) return "";
    if (unit === "bytes" || n >= 100) return `${format.amount(Math.round(n), unit)}/s`;
    return `${short.format(n)}${NB}${words.units[unit] ?? unit}/s`;
  },
  duration(s) {
    const [size, name] = scaleOf(s);
    return `${s < 10 ? short.format(s) : Math.round(s / size)}${NB}${name}`;
  },
  left(eta) {
    if (!eta) return "";
    const [size, name] = scaleOf(eta[1]);
    const [a, b] = eta.map((s) => Math.max(1, Math.round(s / size)));
    return words.left((b - a < (size === 1 ? 2 : 1) ? b : `${a}–${b}`) + NB + name);
  },
  time: (at) => (isToday(at) ? clock : day).format(new Date(at)),
  second: (at) => seconds.format(new Date(at)),
  moment: (at) => (isToday(at) ? seconds : full).format(new Date(at)),
  between: (from, to) => Math.max(0, (new Date(to) - new Date(from)) / 1000),
  digest: (name, hex) => `${name.toUpperCase()} ${hex.slice(0, 4)}…${hex.slice(-4)}`,
};
