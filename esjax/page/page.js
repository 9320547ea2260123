// The page of esjax: with what it is told, it shows runs; if it was told nothing, it asks, again and again.
"use strict";

const told = JSON.parse(document.getElementById("told").textContent || "null");
const INTERVAL = 1500; // milliseconds between two looks
const COLORS = ["#3b7dd8", "#e0752d", "#2f9e6e", "#c2479b", "#8a63d2", "#b08a00", "#1a9fb3", "#d1495b", "#6b7f2a", "#7d6b5d"];
const AXES = { steps: "step", seconds: "seconds", "member-tokens": "member_tokens" };
const CHARTS = [
  { column: "held_out", title: "Held-out loss", loss: true },
  { column: "loss", title: "Training loss, mean of the population", loss: true },
  { column: "member_tokens_per_second", title: "Rate", unit: "member-tokens per second", small: true },
  { column: "update_norm", title: "Size of the update", unit: "norm", small: true },
];
const FIRST = 4; // runs that are chosen when the page opens, if nothing is said

const view = { over: "steps", logX: false, logY: false, span: 0, ...told?.view };
const runs = new Map(); // by the name that the server knows: what was told of it, `curves` among it
const colors = new Map(); // chosen runs, in the order of choice, with the index of their color
let list = [];
let all = false;

const byId = (id) => document.getElementById(id);

// Make an element; children are elements or plain text, which is never read as HTML.
function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

function swatch(run) {
  const mark = make("span", { className: "swatch" });
  if (colors.has(run)) mark.style.background = colorOf(run);
  return mark;
}

const colorOf = (run) => COLORS[colors.get(run) % COLORS.length];
const chosen = () => [...colors.keys()].filter((run) => runs.get(run)?.curves).map((run) => runs.get(run));

function choose(run, on) {
  if (!on) colors.delete(run);
  else if (!colors.has(run)) {
    const used = new Set(colors.values());
    let index = 0;
    while (used.has(index)) index++;
    colors.set(run, index);
  }
}

// What is chosen stands in the address, so that it can be kept and loaded again.

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of ["over", "span"]) if (words.has(name)) view[name] = name === "span" ? Number(words.get(name)) : words.get(name);
  for (const name of ["logX", "logY"]) if (words.has(name)) view[name] = words.get(name) === "1";
  if (!(view.over in AXES)) view.over = "steps";
  if (!(view.span >= 0)) view.span = 0;
  return words.getAll("run");
}

function writeAddress() {
  const words = new URLSearchParams();
  for (const run of colors.keys()) words.append("run", run);
  words.set("over", view.over);
  words.set("span", view.span);
  for (const name of ["logX", "logY"]) if (view[name]) words.set(name, "1");
  history.replaceState(null, "", "#" + words);
}

// Words and numbers.

function clock(seconds) {
  if (seconds == null) return "";
  const rest = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(rest / 3600), minutes = Math.floor(rest / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(rest % 60)}` : `${minutes}:${two(rest % 60)}`;
}

const fixed = (value, digits = 3) => (value == null ? "-" : value.toFixed(digits));
const whole = (value) => (value == null ? "0" : Math.round(value).toLocaleString("en"));

function shown(value) {
  if (value === undefined) return "-";
  if (value === null) return "none";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// The list of runs. Rows stay in place, so that a click is never lost to an update.

function drawRuns() {
  const box = byId("runs");
  const rows = new Map([...box.children].map((row) => [row.dataset.run, row]));
  list.forEach((run, place) => {
    let row = rows.get(run.run);
    rows.delete(run.run);
    if (!row) {
      const tick = make("input", { type: "checkbox" });
      tick.addEventListener("change", () => {
        choose(run.run, tick.checked);
        writeAddress();
        draw();
        if (!told) look();
      });
      row = make("li", {}, make("label", {}, tick));
      row.dataset.run = run.run;
    }
    if (box.children[place] !== row) box.insertBefore(row, box.children[place] ?? null);
    const { last } = run;
    const facts = `step ${whole(last.step)} · ${clock(last.seconds ?? 0)} · held-out ${fixed(last.held_out)}`;
    const print = JSON.stringify([run, colors.get(run.run)]);
    if (row.dataset.print === print) return;
    row.dataset.print = print;
    const label = row.firstChild, tick = label.firstChild;
    tick.checked = colors.has(run.run);
    while (tick.nextSibling) tick.nextSibling.remove();
    label.append(
      swatch(run.run),
      make("span", { className: "name" }, run.name),
      make("span", { className: `state ${run.state}` }, run.state),
      make("span", { className: "facts" }, facts),
    );
    const trouble = [run.error, last.void_pairs ? `${whole(last.void_pairs)} pairs void` : ""].filter(Boolean);
    for (const line of trouble) label.append(make("span", { className: "facts note" }, line));
  });
  for (const row of rows.values()) row.remove();
}

// Curves.

// Average exponentially over `span` steps back, see esjax.curves.smooth.
function smooth(steps, values, span) {
  if (!span) return values;
  let total = 0, weight = 0;
  return values.map((value, i) => {
    const kept = i ? Math.exp((steps[i - 1] - steps[i]) / span) : 0;
    total = kept * total + value;
    weight = kept * weight + 1;
    return total / weight;
  });
}

function traces(chart, dark) {
  const lines = [];
  for (const run of chosen()) {
    const curve = run.curves[chart.column];
    if (!curve?.value.length) continue;
    const x = curve[AXES[view.over]], color = colorOf(run.run);
    const span = chart.column === "held_out" ? 0 : Number(view.span);
    if (span) lines.push({ x, y: curve.value, mode: "lines", line: { color, width: 1 }, opacity: dark ? 0.35 : 0.25, hoverinfo: "skip" });
    const few = curve.value.length < 60;
    lines.push({
      x, y: smooth(curve.step, curve.value, span), name: run.name, mode: few ? "lines+markers" : "lines",
      line: { color, width: 2 }, marker: { size: 5 }, hovertemplate: chart.loss ? "%{y:.3f}" : "%{y:.3s}",
    });
  }
  return lines;
}

// The n-gram models: once for each text, named after the run if there are several.
function baselines() {
  const texts = new Map();
  for (const run of chosen()) {
    const key = JSON.stringify(Object.values(run.baselines).map((value) => value.toFixed(6)));
    if (Object.keys(run.baselines).length && !texts.has(key)) texts.set(key, run);
  }
  return [...texts.values()].flatMap((run) =>
    Object.entries(run.baselines).map(([name, value]) => ({
      value,
      text: `${name} ${value.toFixed(2)}` + (texts.size > 1 ? ` (${run.name})` : ""),
      color: texts.size > 1 ? colorOf(run.run) : null,
    })),
  );
}

// What losses are in: nats per token, or what a run has in their place.
const units = () => [...new Set(chosen().map((run) => run.unit))].sort().join(", ");

const escapeText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;"); // Plotly reads some HTML

function drawCharts() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--quiet").trim(), line = style.getPropertyValue("--line").trim();
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  if (!CHARTS[0].box) { // all of them first: a chart takes the width that its box has
    for (const chart of CHARTS) {
      chart.box = make("div", { id: "chart-" + chart.column });
      byId("charts").append(make("div", { className: chart.small ? "chart small" : "chart" }, make("h2", {}, chart.title), chart.box));
    }
  }
  for (const chart of CHARTS) {
    const lines = traces(chart, dark);
    const marks = chart.column === "held_out" && lines.length ? baselines() : [];
    const log = chart.loss && view.logY && lines.some(({ y }) => y.some((value) => value > 0)); // a reward's are not
    const unit = chart.loss ? escapeText(units()) : chart.unit;
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { color: ink } };
    Plotly.react(
      chart.box,
      lines.map((trace) => ({ ...trace, name: escapeText(trace.name ?? "") })),
      {
        xaxis: { ...axis, type: view.logX ? "log" : "linear", title: { text: view.over, font: { color: ink, size: 12 } }, exponentformat: "SI" },
        yaxis: { ...axis, type: log ? "log" : "linear", title: { text: unit, font: { color: ink, size: 12 } }, rangemode: chart.small && !log ? "tozero" : "normal", ...(log ? { dtick: "D1" } : {}) },
        margin: { l: 52, r: marks.length ? 78 : 16, t: 10, b: 40 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif", size: 12 },
        showlegend: false, hovermode: "x unified",
        hoverlabel: { namelength: -1, bgcolor: style.getPropertyValue("--card").trim(), bordercolor: line, font: { color: style.getPropertyValue("--ink").trim() } },
        shapes: marks.map(({ value, color }) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: color ?? ink, dash: "dash", width: 1 }, layer: "below" })),
        annotations: marks.map(({ value, text, color }) => ({ xref: "paper", x: 1, y: log ? Math.log10(value) : value, xanchor: "left", text: escapeText(text), showarrow: false, font: { size: 11, color: color ?? ink } })),
        uirevision: [view.over, view.logX, view.logY].join(), // a zoom outlives updates
      },
      { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] },
    );
  }
}

// Settings side by side.

function drawSettings() {
  const among = chosen();
  byId("settings").hidden = !among.length;
  const names = [...new Set(among.flatMap((run) => Object.keys(run.settings)))].sort();
  const differs = (name) => new Set(among.map((run) => JSON.stringify(run.settings[name]))).size > 1;
  const marked = names.filter(differs);
  const rows = all || among.length < 2 ? [...marked, ...names.filter((name) => !differs(name))] : marked;
  const table = byId("settings").querySelector("table");
  const print = JSON.stringify([rows, among.map((run) => [run.name, colors.get(run.run), run.settings])]);
  byId("settings").querySelector("label").hidden = among.length < 2;
  if (table.dataset.print === print) return;
  table.dataset.print = print;
  table.replaceChildren(
    make("tr", {}, make("th", {}, rows.length ? "" : "no setting differs"), ...among.map((run) => make("th", {}, swatch(run.run), run.name))),
    ...rows.map((name) =>
      make("tr", { className: marked.includes(name) ? "differs" : "" }, make("th", {}, name), ...among.map((run) => make("td", {}, shown(run.settings[name])))),
    ),
  );
}

function drawSamples() {
  const among = chosen().filter((run) => run.samples.length || run.notes.length);
  byId("samples").hidden = !among.length;
  const box = byId("samples").querySelector("div");
  const print = JSON.stringify(among.map((run) => [run.name, colors.get(run.run), run.samples, run.notes]));
  if (box.dataset.print === print) return;
  box.dataset.print = print;
  box.replaceChildren(
    ...among.map((run) => {
      const sample = run.samples.at(-1);
      const step = sample ? ` step ${whole(sample.step)}` : "";
      return make(
        "div", {},
        make("h3", {}, swatch(run.run), run.name, make("span", { className: "quiet" }, step)),
        ...run.notes.map((note) => make("p", { className: "note" }, note)),
        make("pre", {}, sample?.text ?? ""),
      );
    }),
  );
}

function drawHosts() {
  const among = chosen().filter((run) => run.state === "running" && (run.hosts?.hosts.length || run.hosts?.note));
  byId("hosts").hidden = !among.length;
  byId("hosts").querySelector("div").replaceChildren(
    ...among.map((run) => {
      if (!run.hosts.hosts.length) return make("p", { className: "quiet" }, `${run.name}: ${run.hosts.note}`);
      const heads = [run.name, "state", "step", "members/s", "share", "last seen", "device", "note"];
      return make(
        "div", { className: "wide" },
        make(
          "table", {},
          make("tr", {}, ...heads.map((head, i) => make("th", {}, ...(i ? [] : [swatch(run.run)]), head))),
          ...run.hosts.hosts.map((host) =>
            make("tr", {}, ...[
              host.name + (host.anchor ? " *" : ""), host.state, whole(host.step), whole(host.members_per_second),
              `${Math.round(host.share * 100)}%`, `${Math.round(host.last_seen)} s`, host.device, host.note,
            ].map((cell) => make("td", {}, cell))),
          ),
        ),
        make("p", { className: "quiet" }, run.hosts.hosts.some((host) => host.anchor) ? "* its state is the one that is kept" : ""),
      );
    }),
  );
}

function draw() {
  drawRuns();
  const among = chosen();
  byId("hint").hidden = colors.size > 0;
  byId("hint").textContent = list.length ? "Choose runs to see them side by side." : "There is no run yet; one appears here when it begins.";
  byId("charts").hidden = !colors.size;
  if (colors.size) drawCharts();
  drawHosts();
  drawSettings();
  drawSamples();
  document.title = among.length === 1 ? `${among[0].name} - esjax` : "esjax";
}

// Asking. Only what is new is told: points are added to those that are there.

async function ask(path, words = {}) {
  const response = await fetch(`api/${path}?${new URLSearchParams(words)}`);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function askRun(run) {
  const known = runs.get(run);
  const points = Object.fromEntries(Object.entries(known?.curves ?? {}).map(([name, curve]) => [name, [curve.stride, curve.value.length]]));
  const news = await ask("run", { run, known: JSON.stringify({ mark: known?.mark ?? "", points }) });
  for (const [name, curve] of Object.entries(news.curves)) {
    const before = known?.curves?.[name];
    if (!curve.start || !before) continue;
    for (const column of [...Object.values(AXES), "value"]) curve[column] = before[column].slice(0, curve.start).concat(curve[column]);
  }
  if (news.state === "running") news.hosts = known?.hosts;
  runs.set(run, news);
}

async function askHosts(run) {
  const { state } = runs.get(run) ?? {};
  if (state === "running") runs.get(run).hosts = await ask("hosts", { run });
}

let timer, looking = false, again = false;

async function look() {
  if (looking) return void (again = true);
  looking = true;
  clearTimeout(timer);
  try {
    list = await ask("runs");
    const there = new Map(list.map((run) => [run.run, run]));
    for (const run of [...colors.keys()]) if (!there.has(run)) choose(run, false);
    const stale = [...colors.keys()].filter((run) => {
      const before = runs.get(run), now = there.get(run);
      return !now.error && (!before || now.state === "running" || now.state !== before.state || now.last.step !== before.last.step);
    });
    await Promise.all(stale.map(askRun));
    trouble("");
    draw();
    if (list.some((run) => run.state === "running" && colors.has(run.run))) {
      Promise.all([...colors.keys()].map(askHosts)).then(drawHosts, () => {}); // a slow coordinator holds up nothing else
    }
  } catch (error) {
    trouble(error instanceof TypeError ? "The dashboard does not answer; is it still running?" : error.message);
  }
  looking = false;
  timer = setTimeout(look, again ? 0 : INTERVAL);
  again = false;
}

function trouble(line) {
  byId("trouble").textContent = line;
  byId("trouble").hidden = !line;
}

function begin() {
  const named = readAddress();
  const form = byId("controls");
  if (![...form.span.options].some((option) => Number(option.value) === Number(view.span))) {
    form.span.append(make("option", { value: view.span }, `${view.span} steps`));
  }
  form.over.value = view.over;
  form.span.value = view.span;
  form.logX.checked = view.logX;
  form.logY.checked = view.logY;
  form.addEventListener("change", () => {
    Object.assign(view, { over: form.over.value, span: Number(form.span.value), logX: form.logX.checked, logY: form.logY.checked });
    writeAddress();
    draw();
  });
  byId("all").addEventListener("change", (event) => {
    all = event.target.checked;
    drawSettings();
  });
  byId("none").addEventListener("click", () => {
    colors.clear();
    writeAddress();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (told) {
    list = told.runs;
    for (const run of list) runs.set(run.run, run);
    for (const { run } of list) if (!named.length || named.includes(run)) choose(run, true);
    draw();
    return;
  }
  ask("runs").then((found) => {
    list = found;
    const going = found.filter((run) => run.state === "running");
    const first = named.length ? named : (going.length ? going : found).slice(0, FIRST).map((run) => run.run);
    for (const run of first) choose(run, true);
  }, () => {}).finally(look);
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) look();
  });
}

begin();
