// The page of esjax: it shows runs from embedded data, or polls the server if there are none.
"use strict";

const embedded = JSON.parse(document.getElementById("embedded").textContent || "null");
const INTERVAL = 1500; // milliseconds between two requests
const AXES = { steps: "step", seconds: "seconds", "member-tokens": "member_tokens" };
const TICKS = ["logX", "logY", "seeds"]; // options that are on or off
const FIRST = 4; // runs that are selected at first, unless the address names some

const view = { over: "steps", logX: false, logY: false, seeds: false, span: 0, filter: "", ...embedded?.view };
const runs = new Map(); // details of each run, `curves` included, by its identifier
const colors = new Map(); // selected runs in order of selection, with the index of their color
let list = [];
let all = false;
let sorted = { column: "", falling: false }; // of the table of runs; "": the order of selection

const byId = (id) => document.getElementById(id);

// Make an element; children are elements or plain text, never parsed as HTML.
function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

// Make a short sample of the line of a run.
function swatch(run) {
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  mark.setAttribute("class", "swatch");
  if (!colors.has(run)) return mark;
  const { color, dash } = styleOf(run);
  const line = document.createElementNS(mark.namespaceURI, "path");
  for (const [name, value] of Object.entries({ d: "M0 5H24", stroke: color, "stroke-width": 3, "stroke-dasharray": STROKES[dash] })) line.setAttribute(name, value);
  mark.append(line);
  return mark;
}

// All runs of a group have the style of the first one.
function styleOf(run) {
  const group = view.seeds ? groups().find((found) => found.some((one) => one.run === run)) : null;
  return styleAt(colors.get(group ? group[0].run : run));
}

const matches = ({ name }) => view.filter.toLowerCase().split(/\s+/).every((word) => name.toLowerCase().includes(word));
const chosen = () => [...colors.keys()].map((run) => runs.get(run)).filter((run) => run?.curves && matches(run));

// Rebuild a box if its content has changed.
function renew(box, shows, children) {
  const print = JSON.stringify(shows);
  if (box.dataset.print === print) return;
  box.dataset.print = print;
  box.replaceChildren(...children());
}

function choose(run, on) {
  if (!on) colors.delete(run);
  else if (!colors.has(run)) {
    const used = new Set(colors.values());
    let index = 0;
    while (used.has(index)) index++;
    colors.set(run, index);
  }
}

// Select or deselect all listed runs.
function chooseListed(on) {
  for (const run of list.filter(matches)) choose(run.run, on);
  writeAddress();
  draw();
  if (!embedded) look();
}

// The address holds the selection, so that it can be bookmarked.

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of ["over", "span", "filter"]) if (words.has(name)) view[name] = name === "span" ? Number(words.get(name)) : words.get(name);
  for (const name of TICKS) if (words.has(name)) view[name] = words.get(name) === "1";
  if (!(view.over in AXES)) view.over = "steps";
  if (!(view.span >= 0)) view.span = 0;
  return words.getAll("run");
}

function writeAddress() {
  const words = new URLSearchParams();
  for (const run of colors.keys()) words.append("run", run);
  words.set("over", view.over);
  words.set("span", view.span);
  for (const name of TICKS) if (view[name]) words.set(name, "1");
  if (view.filter) words.set("filter", view.filter);
  history.replaceState(null, "", "#" + words);
}

// Formatting.

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

// The list of runs. Rows are reused, so that an update never swallows a click.

function drawRuns() {
  const box = byId("runs");
  const rows = new Map([...box.children].map((row) => [row.dataset.run, row]));
  list.filter(matches).forEach((run, place) => {
    let row = rows.get(run.run);
    rows.delete(run.run);
    if (!row) {
      const tick = make("input", { type: "checkbox" });
      tick.addEventListener("change", () => {
        choose(run.run, tick.checked);
        writeAddress();
        draw();
        if (!embedded) look();
      });
      row = make("li", {}, make("label", {}, tick));
      row.dataset.run = run.run;
    }
    if (box.children[place] !== row) box.insertBefore(row, box.children[place] ?? null);
    const { last } = run;
    const greedy = last.greedy_reward == null ? "" : ` · greedy ${fixed(last.greedy_reward)}`;
    const facts = `step ${whole(last.step)} · ${clock(last.seconds ?? 0)} · held-out ${fixed(last.held_out)}${greedy}`;
    const print = JSON.stringify([run, colors.has(run.run) && styleOf(run.run)]);
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

// Settings side by side.

const differs = (among, name) => new Set(among.map((run) => JSON.stringify(run.settings[name]))).size > 1;
const settingsOf = (among) => [...new Set(among.flatMap((run) => Object.keys(run.settings)))].sort();
const labels = (among) => among.map((run) => [run.run, run.name, styleOf(run.run)]);

function drawSettings() {
  const among = chosen();
  byId("settings").hidden = !among.length;
  const names = settingsOf(among), marked = names.filter((name) => differs(among, name));
  const rows = all || among.length < 2 ? [...marked, ...names.filter((name) => !marked.includes(name))] : marked;
  byId("settings").querySelector("label").hidden = among.length < 2;
  renew(byId("settings").querySelector("table"), [rows, labels(among), among.map((run) => run.settings)], () => [
    make("tr", {}, make("th", {}, rows.length ? "" : "no setting differs"), ...among.map((run) => make("th", {}, swatch(run.run), run.name))),
    ...rows.map((name) =>
      make("tr", { className: marked.includes(name) ? "differs" : "" }, make("th", {}, name), ...among.map((run) => make("td", {}, shown(run.settings[name])))),
    ),
  ]);
}

// The table of runs: progress, and settings that differ; a click on a head sorts.

const REWARDS = [
  { head: "reward", of: (run) => run.last.reward, write: fixed },
  { head: "greedy reward", of: (run) => run.last.greedy_reward, write: fixed },
  { head: "pass@k", of: (run) => run.last.pass_at_k, write: fixed },
]; // columns for runs with a reward in Python

function columnsOf(among) {
  return [
    { head: "run", of: (run) => run.name },
    { head: "state", of: (run) => run.state },
    { head: "held-out loss", of: (run) => run.last.held_out, write: fixed },
    { head: "best held-out loss", of: (run) => run.best, write: fixed },
    { head: "training loss", of: (run) => run.last.loss, write: fixed },
    ...REWARDS.filter(({ of }) => among.some((run) => of(run) != null)),
    { head: "steps done", of: (run) => run.last.step, write: whole },
    { head: "seconds trained", of: (run) => run.last.seconds, write: (value) => fixed(value, 1) },
    { head: "member-tokens", of: (run) => run.last.member_tokens, write: whole },
    ...settingsOf(among).filter((name) => differs(among, name)).map((name) => ({ head: name, of: (run) => run.settings[name], write: shown })),
  ];
}

// Missing values come last, in both directions.
function compare(a, b) {
  if (a == null || b == null) return (a == null) - (b == null);
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return sorted.falling ? -order : order;
}

function drawTable() {
  const among = chosen(), columns = columnsOf(among);
  byId("table").hidden = !among.length;
  const [head, body] = byId("table").querySelectorAll("thead tr, tbody");
  renew(head, columns.map((column) => column.head), () => columns.map((column) => make("th", { scope: "col" }, make("button", { type: "button" }, column.head))));
  columns.forEach(({ head: name }, i) => head.children[i].setAttribute("aria-sort", name !== sorted.column ? "none" : sorted.falling ? "descending" : "ascending"));
  const by = columns.find((column) => column.head === sorted.column);
  const rows = by ? [...among].sort((a, b) => compare(by.of(a), by.of(b))) : among;
  const cells = rows.map((run) => columns.map(({ of, write = String }) => write(of(run))));
  renew(body, [labels(rows), cells], () => rows.map((run, i) => make("tr", {}, ...cells[i].map((cell, k) => make("td", {}, ...(k ? [] : [swatch(run.run)]), cell)))));
}

function sortBy(event) {
  const column = event.target.closest("button")?.textContent;
  if (!column) return;
  sorted = { column, falling: column === sorted.column && !sorted.falling };
  drawTable();
}

function drawSamples() {
  const among = chosen().filter((run) => run.samples.length || run.notes.length);
  byId("samples").hidden = !among.length;
  renew(byId("samples").querySelector("div"), [labels(among), among.map((run) => [run.samples, run.notes])], () =>
    among.map((run) => {
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
              host.name + (host.reference ? " *" : ""), host.state, whole(host.step), whole(host.members_per_second),
              `${Math.round(host.share * 100)}%`, `${Math.round(host.last_seen)} s`, host.device, host.note,
            ].map((cell) => make("td", {}, cell))),
          ),
        ),
        make("p", { className: "quiet" }, run.hosts.hosts.some((host) => host.reference) ? "* checkpoints save the state of this host" : ""),
      );
    }),
  );
}

function hint() {
  if (!list.length) return "There is no run yet. New runs appear here.";
  if (!list.some(matches)) return `No run has "${view.filter.trim()}" in its name.`;
  return "Select runs to see them side by side.";
}

function draw() {
  drawRuns();
  const among = chosen();
  const any = list.some((run) => colors.has(run.run) && matches(run));
  byId("hint").hidden = any;
  byId("hint").textContent = hint();
  byId("charts").hidden = !any;
  if (any) drawCharts();
  drawHosts();
  drawTable();
  drawSamples();
  drawSettings();
  document.title = among.length === 1 ? `${among[0].name} - esjax` : "esjax";
}

// Requests. The server sends only new points, which are appended to the known ones.

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
      Promise.all([...colors.keys()].map(askHosts)).then(drawHosts, () => {}); // not awaited: a coordinator may be slow
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
  for (const name of TICKS) form[name].checked = view[name];
  form.addEventListener("change", () => {
    Object.assign(view, { over: form.over.value, span: Number(form.span.value) }, Object.fromEntries(TICKS.map((name) => [name, form[name].checked])));
    writeAddress();
    draw();
  });
  byId("all").addEventListener("change", (event) => {
    all = event.target.checked;
    drawSettings();
  });
  byId("filter").value = view.filter;
  byId("filter").addEventListener("input", (event) => {
    view.filter = event.target.value;
    writeAddress();
    draw();
  });
  byId("table").addEventListener("click", sortBy);
  byId("show").addEventListener("click", () => chooseListed(true));
  byId("hide").addEventListener("click", () => chooseListed(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  if (embedded) {
    list = embedded.runs;
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
