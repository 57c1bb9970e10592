// Numbers, sizes, rates, durations and dates as people of the browser's language write them.
//
// Strategy: pure functions over Intl; a size pair shares its unit ("7.4 of 12.1 GB"), a time left is an
// interval, and what is not known is an empty string, never a guess. SI units, as disks are sold.

const NB = "\u00a0";
const number = new Intl.NumberFormat();
const short = new Intl.NumberFormat(undefined, { maximumSignificantDigits: 2 });
const tenth = new Intl.NumberFormat(undefined, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const seconds = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

const power = (bytes) => {
  let step = 0;
  while (step < UNITS.length - 1 && Math.round(bytes / 1000 ** step) >= 1000) step += 1;
  return step;
};

const scaled = (value, step) => {
  const x = value / 1000 ** step;
  return step > 0 && x < 100 ? tenth.format(x) : number.format(Math.round(x));
};

export const count = (value) => (Math.abs(value) < 10000 ? number.format(value) : compact.format(value));
export const percent = (fraction) => `${Math.floor(fraction * 100)}${NB}%`;

export function bytes(value) {
  const step = power(value);
  return `${scaled(value, step)}${NB}${UNITS[step]}`;
}

export function amount(value, unit) {
  return unit === "bytes" ? bytes(value) : `${count(value)}${NB}${unit}`;
}

export function pair(done, total, unit) {
  if (unit !== "bytes") return `${count(done)} of ${count(total)}${NB}${unit}`;
  const step = power(total);
  return `${done === 0 ? "0" : scaled(done, step)} of ${scaled(total, step)}${NB}${UNITS[step]}`;
}

export function rate(value, unit) {
  if (value === null || value === undefined) return "";
  if (unit === "bytes") return `${bytes(Math.round(value))}/s`;
  return `${value >= 100 ? count(Math.round(value)) : short.format(value)}${NB}${unit}/s`;
}

const SCALES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

export function duration(s) {
  if (s < 1) return `${short.format(Math.round(s * 100) / 100)}${NB}s`;
  if (s < 10) return `${short.format(Math.round(s * 10) / 10)}${NB}s`;
  if (s < 120) return `${Math.round(s)}${NB}s`;
  const [size, name] = SCALES.find(([unit]) => s >= 2 * unit);
  return `${Math.round(s / size)}${NB}${name}`;
}

export function left(eta) {
  if (!eta) return "";
  const high = Math.max(1, eta[1]);
  const [size, name] = SCALES.find(([unit]) => high >= 2 * unit) ?? [1, "s"];
  const a = Math.max(1, Math.round(eta[0] / size));
  const b = Math.max(1, Math.round(high / size));
  return b - a < 2 && size === 1 ? `${b}${NB}${name} left` : a === b ? `${b}${NB}${name} left` : `${a}–${b}${NB}${name} left`;
}

const date = (at) => new Date(at);
const sameDay = (a, b) => a.toDateString() === b.toDateString();

export function time(at) {
  const when = date(at);
  return sameDay(when, new Date()) ? clock.format(when) : `${day.format(when)}, ${clock.format(when)}`;
}

export const exact = (at) => full.format(date(at));
export const second = (at) => seconds.format(date(at));
export const between = (from, to) => Math.max(0, (date(to) - date(from)) / 1000);
