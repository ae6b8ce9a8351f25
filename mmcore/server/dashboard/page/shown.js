// How things are written and drawn.

export const $ = (id) => document.getElementById(id);

// The bearer token, where the instance asks for one: kept as long as the tab.

const TOKEN = "mmcore-token";
export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);

export function signed(headers = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...headers, authorization: `Bearer ${token}` } : headers;
}

// An element with attributes and children; strings become text nodes, functions become properties.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value ?? 0);

// Three digits, which is what tells two figures apart at a glance.
function digits(value) {
  if (value === 0) return "0";
  if (value >= 100) return whole.format(Math.round(value));
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export const rate = (value) => value === null || value === undefined ? "–" : value > 0 && value < 0.01 ? "<0.01" : digits(value);

export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${digits(value / 1000)} s`;
  return value < 0.1 ? `${Math.round(value * 1000)} µs` : `${digits(value)} ms`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${at ? digits(value) : value} ${units[at]}`;
}

export function ago(then) {
  const seconds = Math.max(0, Math.round((Date.now() - then) / 1000));
  if (seconds < 1) return "just now";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit} ago`;
  return `${seconds} s ago`;
}

// JSON for people: what holds no objects or lists of its own is on one line.
export function json(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const entries = list ? value : Object.entries(value);
  const inner = indent + "  ";
  const written = entries.map((one) => list ? json(one, inner) : `${JSON.stringify(one[0])}: ${json(one[1], inner)}`);
  const flat = list && !value.some((one) => one !== null && typeof one === "object");
  const [open, close] = list ? "[]" : "{}";
  if (flat || !written.length) return open + written.join(", ") + close;
  return `${open}\n${written.map((one) => inner + one).join(",\n")}\n${indent}${close}`;
}

const KINDS = {
  loaded: "good", reloaded: "good", ready: "good",
  loading: "warn", queued: "warn", pulling: "warn", unloading: "warn", draining: "warn", evicted: "warn", "given up": "warn",
  failed: "bad",
};

// The state in words; the colour only repeats them.
export const stateOf = (state) => el("span", { class: `state ${KINDS[state] ?? ""}` }, state);

const SVG = "http://www.w3.org/2000/svg";

// A line of the values, gaps where there are none, from zero to the largest.
export function sparkline(values) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const top = Math.max(...values.filter((value) => value !== null), 0) || 1;
  const step = 100 / Math.max(1, values.length - 1);
  const points = values.map((value, at) => value === null ? null : [(at * step).toFixed(2), (29 - 27 * value / top).toFixed(2)]);
  let line = "";
  let area = "";
  points.forEach((point, at) => {
    if (!point) return;
    const begins = !points[at - 1];
    const ends = !points[at + 1];
    line += `${begins ? "M" : "L"}${point.join(" ")}`;
    area += `${begins ? `M${point[0]} 30L` : "L"}${point.join(" ")}${ends ? `L${point[0]} 30Z` : ""}`;
  });
  for (const [kind, d] of [["area", area], ["line", line]]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}
