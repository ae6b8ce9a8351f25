// The dashboard: asks this instance for JSON every few seconds and shows it. Text from outside only ever becomes text
// nodes, so that a model's name cannot be markup.

import { inferBox } from "./infer.js";
import { $, ago, bytes, count, el, keepToken, ms, rate, signed, sparkline, stateOf } from "./shown.js";

const EVERY_MS = 3000;
const ROWS = 50;
const API = "/dashboard/api/";

// Asking.

const answers = new Map(); // by path: the ETag and what was told

async function ask(path) {
  const known = answers.get(path);
  const response = await fetch(API + path, {
    cache: "no-store", headers: signed(known ? { "if-none-match": known.tag } : {}), signal: AbortSignal.timeout(15000),
  });
  if (response.status === 304) return known.told;
  const told = await response.json();
  if (!response.ok) throw Object.assign(new Error(told.error ?? `status ${response.status}`), { status: response.status });
  if (answers.size > 50) answers.clear();
  answers.set(path, { tag: response.headers.get("etag"), told });
  return told;
}

// What is kept between looks. The address holds the page and the model; the table's state is this page's alone.

const table = { search: "", state: "", sort: "-rate", offset: 0 };
let page = null; // { update } of what is shown
let live = true;
let timer = 0;
let turn = 0;
let told = 0; // when the instance answered last

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn;
  const current = page;
  try {
    const [summary, news] = await Promise.all([ask("summary"), current.ask()]);
    if (mine !== turn || current !== page) return;
    told = Date.now();
    problem(!summary.registry_connected ? "The registry does not answer: models cannot be registered now; inference goes on."
      : summary.missing.length ? `${summary.missing.join(", ")} did not answer; what is shown is without ${summary.missing.length > 1 ? "them" : "it"}.` : "");
    showSummary(summary);
    current.show(news, summary);
  } catch (error) {
    if (mine !== turn || current !== page) return;
    if (error.status === 401 || error.status === 403) { askForToken(error); return; }
    if (error.status) current.fail(error);
    else problem(`This instance does not answer (${told ? `last did ${ago(told)}` : "yet"}). Trying again.`);
  }
  $("told").textContent = told ? `Updated ${new Date(told).toLocaleTimeString()}` : "";
  if (live && !document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

// Asked once, and again when what was given is refused; until then nothing more is asked of the instance.
function askForToken(error) {
  answers.clear();
  $("summary").replaceChildren();
  const token = el("input", { id: "token", type: "password", autocomplete: "off", required: "" });
  const form = el("form", { class: "body" },
    el("div", { class: "field" }, el("label", { for: "token" }, "Bearer token with the scope manage"), token),
    el("div", { class: "row" }, el("button", { type: "submit", class: "main" }, "Show the dashboard")),
    el("p", { role: "alert" }, error.message));
  form.onsubmit = (event) => {
    event.preventDefault();
    keepToken(token.value);
    route();
  };
  $("main").replaceChildren(el("section", { class: "card", "aria-label": "Access" }, el("h2", {}, "This instance asks who you are"), form));
  token.focus();
}

function problem(text) {
  if ($("alert").textContent !== text) $("alert").textContent = text;
  $("alert").hidden = !text;
}

// The instance as a whole.

function showSummary(all) {
  const { history } = all;
  const last = (field) => history[field].at(-1);
  const several = all.workers.length > 1;
  document.title = `${several ? `${all.workers.length} workers` : all.instance} · mmcore`;
  $("identity").replaceChildren(
    several ? el("span", { title: all.workers.join(", ") }, `${all.workers.length} workers`) : el("span", { class: "mono" }, all.instance),
    el("span", { class: `state ${all.ready ? "good" : "warn"}` }, all.ready ? "ready" : "draining"),
    ...(all.leader ? [el("span", { class: "state extra" }, "leader")] : []),
    el("span", { class: "extra" }, `v${all.version}`),
  );
  const used = all.capacity_bytes ? all.used_bytes / all.capacity_bytes : 0;
  const minutes = Math.max(1, Math.round(history.requests_per_s.length * all.every_s / 60));
  const span = `last ${minutes} min`;
  const failing = history.failures_per_s.some((value) => value > 0);
  const p99 = history.p99_ms.findLast((value) => value !== null);
  const p50 = history.p50_ms.findLast((value) => value !== null);
  $("summary").replaceChildren(
    tile("Requests", rate(last("requests_per_s")), "/s", `${count(all.in_flight)} in flight · ${span}`, sparkline(history.requests_per_s)),
    tile("Latency p99", ms(p99), "", p50 == null ? "no requests yet" : `p50 ${ms(p50)}`, sparkline(history.p99_ms)),
    tile("Failed requests", rate(last("failures_per_s")), "/s", failing ? `some in the ${span}` : `none in the ${span}`, sparkline(history.failures_per_s), failing),
    tile("Memory", bytes(all.used_bytes), ` of ${bytes(all.capacity_bytes)}`, `${Math.round(used * 100)} % used · ${count(all.evictions)} evicted`, meter(used)),
    tile("Models loaded here", count(all.loaded), ` of ${count(all.models)}`,
      `${count(all.loading)} loading · ${count(all.failed)} failed`, meter(all.models ? all.loaded / all.models : 0), all.failed > 0 && "note"),
  );
}

// How much of something is taken; what it says is beside it in words.
function meter(share) {
  const made = el("div", { class: "meter", "aria-hidden": "true" }, el("span"));
  made.firstChild.style.width = `${Math.min(100, share * 100)}%`;
  return made;
}

function tile(title, value, unit, note, picture, bad = false) {
  return el("div", { class: bad === true ? "tile bad" : "tile" },
    el("h2", {}, title),
    el("div", { class: "value" }, value, el("small", {}, unit)),
    picture,
    el("div", { class: bad === "note" ? "note bad-text" : "note" }, note));
}

// Models.

const COLUMNS = [
  ["name", "Model", ""], ["state", "State", ""], ["copies", "Copies", "num optional"], ["bytes", "Size", "num optional"],
  ["rate", "Requests/s", "num"], ["p50_ms", "p50", "num optional"], ["p99_ms", "p99", "num"], ["failed", "Failed", "num optional"],
  ["last_used_ms", "Last used", "num optional"],
];
const STATES = ["loaded", "loading", "unloading", "failed", "not loaded", "withdrawn"];

function modelsPage() {
  const search = el("input", { type: "search", id: "search", placeholder: "Search models  (press /)", "aria-label": "Search models by name", value: table.search, autocomplete: "off", spellcheck: "false" });
  const chips = el("div", { class: "chips", role: "group", "aria-label": "Filter by state" });
  const head = el("tr");
  const body = el("tbody");
  const results = el("div", { class: "scroll" }, el("table", {}, el("caption", { hidden: "" }, "Models"), el("thead", {}, head), body));
  const empty = el("div", { class: "empty", hidden: "" });
  const where = el("span", { role: "status", id: "where" });
  const before = el("button", { type: "button", onclick: () => turnTo(table.offset - ROWS) }, "Previous");
  const after = el("button", { type: "button", onclick: () => turnTo(table.offset + ROWS) }, "Next");
  let typing = 0;
  search.oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(() => { Object.assign(table, { search: search.value.trim(), offset: 0 }); refresh(); }, 150);
  };
  const chipOf = new Map(["", ...STATES].map((state) => {
    const shown = el("b", {}, "");
    const chip = el("button", { type: "button", class: "chip", onclick: () => { Object.assign(table, { state, offset: 0 }); drawControls(); refresh(); } }, state ? state[0].toUpperCase() + state.slice(1) : "All", " ", shown);
    chips.append(chip);
    return [state, { chip, shown }];
  }));
  const headOf = new Map(COLUMNS.map(([key, title, kind]) => {
    const cell = el("th", { scope: "col", class: kind }, el("button", { type: "button", onclick: () => sortBy(key) }, title));
    head.append(cell);
    return [key, cell];
  }));

  function sortBy(key) {
    const down = key === "name" || key === "state" ? key : `-${key}`;
    const up = down.startsWith("-") ? key : `-${key}`;
    Object.assign(table, { sort: table.sort === down ? up : down, offset: 0 });
    drawControls();
    refresh();
  }
  function turnTo(offset) {
    table.offset = Math.max(0, offset);
    refresh();
    results.scrollIntoView({ block: "nearest" });
  }
  function drawControls() {
    for (const [state, { chip }] of chipOf) chip.setAttribute("aria-pressed", String(state === table.state));
    for (const [key, cell] of headOf) {
      if (key !== table.sort.replace("-", "")) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", table.sort.startsWith("-") ? "descending" : "ascending");
    }
  }
  drawControls();
  $("main").replaceChildren(el("section", { class: "card", "aria-label": "Models" },
    el("div", { class: "tools" }, el("div", { class: "search" }, search), chips),
    results, empty,
    el("div", { class: "pager" }, where, el("span", { class: "grow" }), before, after)));

  function show(news) {
    const matching = Object.values(news.states).reduce((sum, one) => sum + one, 0);
    for (const [state, { chip, shown }] of chipOf) {
      shown.textContent = count(state ? news.states[state] : matching);
      chip.classList.toggle("bad", state === "failed");
      chip.hidden = state !== "" && state !== table.state && !news.states[state];
    }
    if (!news.models.length && table.offset) { turnTo(0); return; }
    keepFocus(body, () => body.replaceChildren(...news.models.map(modelRow)));
    results.hidden = !news.models.length;
    empty.hidden = !results.hidden;
    if (!news.models.length) {
      empty.replaceChildren(...(news.total
        ? [el("strong", {}, "No model matches"), "Change the search or the filter."]
        : [el("strong", {}, "No models yet"), "Start with ", el("code", { class: "mono" }, "mmcore serve --models DIR"), ", or register one with ", el("code", { class: "mono" }, "mmcore models register"), "."]));
    }
    const last = news.offset + news.models.length;
    where.textContent = news.matched ? `${count(news.offset + 1)}–${count(last)} of ${count(news.matched)}` : "0 models";
    before.disabled = news.offset === 0;
    after.disabled = last >= news.matched;
  }
  return {
    ask: () => ask(`models?${new URLSearchParams({ search: table.search, state: table.state, sort: table.sort, offset: table.offset, limit: ROWS })}`),
    show,
    fail: (error) => problem(error.message),
  };
}

function modelRow(model) {
  const cell = (value, kind = "num") => el("td", { class: kind }, value ?? el("span", { class: "none" }, "–"));
  return el("tr", {},
    el("td", { class: "name" }, el("a", { href: `#/models/${encodeURIComponent(model.name)}` }, model.name),
      ...(model.reason ? [el("div", { class: model.state === "failed" ? "reason" : "reason none", title: model.reason }, model.reason)] : [])),
    el("td", {}, stateOf(model.state)),
    cell(model.copies ? count(model.copies) : null, "num optional"),
    cell(model.bytes === null ? null : bytes(model.bytes), "num optional"),
    cell(model.rate === null ? null : rate(model.rate)),
    cell(model.p50_ms === null ? null : ms(model.p50_ms), "num optional"),
    cell(model.p99_ms === null ? null : ms(model.p99_ms)),
    cell(model.failed ? el("span", { class: "bad-text" }, count(model.failed)) : model.failed === null ? null : "0", "num optional"),
    cell(model.last_used_ms === null ? null : ago(model.last_used_ms), "num optional"));
}

// Rows are made anew; a link in one that has the focus keeps it.
function keepFocus(within, change) {
  const focused = within.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  change();
  if (focused) [...within.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus({ preventScroll: true });
}

// One model.

function modelPage(name) {
  const title = el("h1", {}, name);
  const figures = el("dl");
  const life = el("ol", { class: "life" });
  const copies = el("div", { class: "scroll" });
  const rates = [];
  const picture = el("div");
  $("main").replaceChildren(
    el("a", { class: "crumb", href: "#/models" }, "← All models"), title,
    el("section", { class: "card whole", "aria-label": "Figures" }, el("div", { class: "body" }, figures, picture)),
    el("div", { class: "columns" },
      el("div", {},
        el("section", { class: "card" }, el("h2", {}, "Life ", el("small", {}, "in this instance, newest first")), life),
        el("section", { class: "card whole" }, el("h2", {}, "Versions and copies"), copies)),
      inferBox(name)));

  function show(news) {
    const model = news.model;
    title.replaceChildren(name, stateOf(model ? model.state : "unregistered"));
    life.replaceChildren(...(news.events.length ? news.events.map((event) => lifeLine(event)) : [el("li", {}, el("span"), el("span"), el("span", { class: "detail" }, "Nothing has happened since this instance started."))]));
    if (!model) { figures.replaceChildren(figure("State", "not registered any more")); copies.replaceChildren(); return; }
    rates.push(model.rate);
    if (rates.length > 200) rates.shift();
    figures.replaceChildren(
      figure("Requests/s", model.rate === null ? "–" : rate(model.rate)), figure("p50", ms(model.p50_ms)), figure("p99", ms(model.p99_ms)),
      figure("Requests", model.requests === null ? "–" : count(model.requests)), figure("Failed", model.failed === null ? "–" : count(model.failed)),
      figure("Size", model.bytes === null ? "–" : bytes(model.bytes)), figure("Copies", count(model.copies)),
      figure("Last used", model.last_used_ms ? ago(model.last_used_ms) : "–"),
      ...(model.registered ? [figure("Type", model.registered.type), figure("Path", model.registered.path || "–", "wide")] : []),
      ...(model.reason ? [el("div", { class: "wide" }, el("dt", {}, "Reason"), el("dd", { class: "reason" }, model.reason))] : []));
    picture.replaceChildren(...(rates.length > 1 && rates.some((value) => value > 0) ? [sparkline(rates)] : []));
    const rows = [
      ...model.versions.map((one) => [`${one.instance === news.instance ? "this instance" : one.instance}, version ${one.version || "?"}`, stateOf(one.state), [one.format, one.bytes === null ? "" : bytes(one.bytes), one.in_flight ? `${one.in_flight} in flight` : "", one.state === "not loaded" ? "the first request loads it" : one.reason].filter(Boolean).join(" · ")]),
      ...model.copies_at.filter((one) => !model.versions.some((other) => other.instance === one.instance)).map((one) => [one.instance, stateOf(one.state), `since ${ago(one.since_ms)}`]),
    ];
    copies.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["Where", "State", ""].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((one) => el("td", {}, one)))))));
  }
  return {
    ask: () => ask(`models/${encodeURIComponent(name)}`),
    show,
    fail: (error) => {
      $("main").replaceChildren(el("a", { class: "crumb", href: "#/models" }, "← All models"),
        el("div", { class: "card empty" }, el("strong", {}, error.status === 404 ? "There is no such model" : "That did not work"), error.message));
    },
  };
}

const figure = (title, value, kind = "") => el("div", { class: kind }, el("dt", {}, title), el("dd", {}, value));

function lifeLine(event, named = false) {
  const at = new Date(event.at_ms);
  return el("li", {},
    el("time", { datetime: at.toISOString(), title: at.toLocaleString() }, `${at.toLocaleTimeString([], { hour12: false })}.${String(at.getMilliseconds()).padStart(3, "0")}`),
    el("span", {}, stateOf(event.what)),
    ...(named ? [el("a", { class: "model", href: `#/models/${encodeURIComponent(event.model)}` }, event.model)] : []),
    el("span", { class: event.what === "failed" ? "detail bad-text" : "detail" }, (event.version ? `version ${event.version}${event.detail ? ": " : ""}` : "") + event.detail));
}

// Instances and activity.

function instancesPage() {
  const body = el("tbody");
  const heads = [["Instance", ""], ["State", ""], ["Memory", ""], ["Models", "num"], ["Loading", "num optional"], ["Req/min", "num"], ["In flight", "num optional"], ["Zone", "optional"], ["Labels", "optional"], ["Up", "num optional"]];
  const more = el("div", { class: "pager" });
  $("main").replaceChildren(el("section", { class: "card", "aria-label": "Instances" },
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(([text, kind]) => el("th", { scope: "col", class: kind }, text)))), body)), more));
  return {
    ask: () => ask("instances"),
    show: (news) => {
      body.replaceChildren(...news.instances.map((one) => {
        const states = [one.draining ? stateOf("draining") : stateOf("ready"), ...(one.own ? [" ", stateOf("this one")] : []), ...(one.leader ? [" ", stateOf("leader")] : [])];
        return el("tr", {},
          el("td", {}, el("span", { class: "mono" }, one.id), el("div", { class: "none" }, [one.address, one.location].filter(Boolean).join(" · "))),
          el("td", {}, ...states),
          el("td", {}, `${bytes(one.used_bytes)} of ${bytes(one.capacity_bytes)}`, meter(one.capacity_bytes ? one.used_bytes / one.capacity_bytes : 0)),
          ...[one.models, one.loading, one.requests_per_minute, one.in_flight].map((value, at) => el("td", { class: heads[3 + at][1] }, count(value))),
          el("td", { class: "optional" }, one.zone || "–"), el("td", { class: "optional" }, one.labels.join(", ") || "–"),
          el("td", { class: "num optional" }, ago(one.started_ms).replace(" ago", "")));
      }));
      more.textContent = `${count(news.instances.length)} of ${count(news.total)} instances`;
    },
    fail: (error) => problem(error.message),
  };
}

function activityPage() {
  const life = el("ol", { class: "life named" });
  const failing = el("section", { class: "card whole", hidden: "" }, el("h2", {}, "Models that failed"), el("ol", { class: "life named" }));
  $("main").replaceChildren(failing, el("section", { class: "card" }, el("h2", {}, "Life of all models ", el("small", {}, "in this instance, newest first")), life));
  return {
    ask: () => ask("events"),
    show: (news, summary) => {
      failing.hidden = !summary.failures.length;
      failing.lastChild.replaceChildren(...summary.failures.map((one) => el("li", {}, el("time", {}, one.version ? `version ${one.version}` : ""), stateOf("failed"),
        el("a", { class: "model", href: `#/models/${encodeURIComponent(one.model)}` }, one.model), el("span", { class: "detail bad-text" }, one.reason))));
      keepFocus(life, () => life.replaceChildren(...news.events.map((event) => lifeLine(event, true))));
      if (!news.events.length) life.replaceChildren(el("li", { class: "empty" }, "Nothing has happened yet."));
    },
    fail: (error) => problem(error.message),
  };
}

// The frame.

function route() {
  const [, where = "models", ...rest] = location.hash.split("/");
  let name = rest.join("/");
  try { name = decodeURIComponent(name); } catch { /* written by hand, with a % that means itself */ }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === where) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  problem("");
  if (where === "models" && name) page = modelPage(name);
  else page = { instances: instancesPage, activity: activityPage }[where]?.() ?? modelsPage();
  window.scrollTo(0, 0);
  refresh();
}

function showLive() {
  const runs = live && !document.hidden;
  $("live").setAttribute("aria-pressed", String(runs));
  $("live-text").textContent = runs ? "Live" : "Paused";
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("mmcore-theme", theme);
}

$("live").onclick = () => { live = !live; showLive(); if (live) refresh(); else clearTimeout(timer); };
$("theme").onclick = () => setTheme({ auto: "light", light: "dark", dark: "auto" }[localStorage.getItem("mmcore-theme") ?? "auto"] ?? "auto");
document.addEventListener("visibilitychange", () => { showLive(); if (document.hidden) clearTimeout(timer); else if (live) refresh(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  const search = $("search");
  if (search) { event.preventDefault(); search.focus(); search.select(); }
});
window.addEventListener("hashchange", () => { route(); $("main").focus({ preventScroll: true }); });
setTheme(localStorage.getItem("mmcore-theme") ?? "auto");
showLive();
route();
