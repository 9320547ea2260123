// The charts of the page, one for each metric. Uses functions and variables of page.js.
"use strict";

const COLORS = ["#3b7dd8", "#e0752d", "#2f9e6e", "#c2479b", "#8a63d2", "#b08a00", "#1a9fb3", "#d1495b", "#6b7f2a", "#7d6b5d"];
const DASHES = ["solid", "dash", "dashdot", "dot"]; // the next one begins after each round of colors, as in esjax/watch/plot_layout.py
const STROKES = { solid: "", dash: "6 3", dashdot: "6 2 2 2", dot: "2 2" }; // the same line styles in SVG
const N_GRAM_DASHES = ["dot", "dash", "longdash", "dashdot"];
const UNIT_LINES = /.{1,38}(?: |$)|.{1,38}/g; // breaks a long unit, at spaces if possible
const EVALUATIONS = ["held_out", "greedy_reward", "pass_at_k"]; // columns that smoothing leaves as they are
const NAMED_REWARD = "reward_"; // beginning of the columns of rewards that have names
const CHARTS = [
  { column: "held_out", title: "Held-out loss", loss: true },
  { column: "loss", title: "Training loss, mean of the population", loss: true },
  { column: "reward", title: "Reward, mean of the population" },
  { column: "greedy_reward", title: "Reward on held-out prompts, greedy" },
  { column: "pass_at_k", title: "pass@k on held-out prompts" },
  // here: a chart for each reward that has a name
  { column: "member_tokens_per_second", title: "Rate", unit: "member-tokens per second", small: true },
  { column: "update_norm", title: "Size of the update", unit: "norm", small: true },
];

const named = new Map(); // the charts of rewards that have names, by their columns

// All charts in order; those of rewards that have names stay when a run had them once.
function allCharts() {
  const columns = chosen().flatMap((run) => Object.keys(run.curves)).filter((column) => column.startsWith(NAMED_REWARD));
  for (const column of columns) {
    if (!named.has(column)) named.set(column, { column, title: `Reward ${column.slice(NAMED_REWARD.length)}, mean of the population` });
  }
  const rewards = [...named.values()].sort((a, b) => (a.column < b.column ? -1 : 1));
  return [...CHARTS.filter(({ small }) => !small), ...rewards, ...CHARTS.filter(({ small }) => small)];
}

// Color and line style for the index of a run.
function styleAt(place) {
  return { color: COLORS[place % COLORS.length], dash: DASHES[Math.floor(place / COLORS.length) % DASHES.length] };
}

// The selected runs in groups: each alone, or together if their settings differ only in the seed.
function groups() {
  const found = new Map();
  for (const run of chosen()) {
    const others = Object.entries(run.settings).filter(([name]) => name !== "seed").sort();
    const key = view.seeds ? JSON.stringify(others) : run.run;
    found.set(key, [...(found.get(key) ?? []), run]);
  }
  return [...found.values()];
}

// Average exponentially over `span` earlier steps, see `smooth` in esjax/watch/downsampling.py.
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

// Interpolate a curve linearly at increasing points between its ends.
function interpolate(points, x, y) {
  let i = 0;
  return points.map((point) => {
    while (i + 1 < x.length && x[i + 1] <= point) i++;
    return x[i] === point ? y[i] : y[i] + ((y[i + 1] - y[i]) * (point - x[i])) / (x[i + 1] - x[i]);
  });
}

// Mean and range of curves where all of them have values, see `mean_and_range` in esjax/watch/downsampling.py.
function meanAndRange(curves) {
  const first = Math.max(...curves.map(({ x }) => x[0])), last = Math.min(...curves.map(({ x }) => x.at(-1)));
  const x = [...new Set(curves.flatMap((curve) => curve.x))].filter((point) => point >= first && point <= last).sort((a, b) => a - b);
  const values = curves.map((curve) => interpolate(x, curve.x, curve.y));
  const over = (combine) => x.map((_, i) => combine(values.map((value) => value[i])));
  return {
    x,
    mean: over((all) => all.reduce((sum, value) => sum + value, 0) / all.length),
    low: over((all) => Math.min(...all)),
    high: over((all) => Math.max(...all)),
  };
}

function traces(chart, dark) {
  const lines = [];
  const span = EVALUATIONS.includes(chart.column) ? 0 : Number(view.span);
  for (const group of groups()) {
    const { color, dash } = styleOf(group[0].run);
    const faint = { mode: "lines", hoverinfo: "skip", showlegend: false };
    const draw = (name, x, y) => lines.push({
      x, y, name, mode: x.length < 60 ? "lines+markers" : "lines", showlegend: false,
      line: { color, dash, width: 2 }, marker: { size: 5 }, hovertemplate: chart.loss ? "%{y:.3f}" : "%{y:.3s}",
    });
    const curves = group.filter((run) => run.curves[chart.column]?.value.length).map((run) => {
      const curve = run.curves[chart.column];
      return { name: run.name, x: curve[AXES[view.over]], raw: curve.value, y: smooth(curve.step, curve.value, span) };
    });
    const band = curves.length > 1 ? meanAndRange(curves) : { x: [] };
    if (band.x.length) {
      lines.push({ ...faint, x: band.x, y: band.low, line: { width: 0 } });
      lines.push({ ...faint, x: band.x, y: band.high, line: { width: 0 }, fill: "tonexty", fillcolor: color + "33" });
      draw(`${group[0].name} and ${group.length - 1} more`, band.x, band.mean);
      continue;
    }
    for (const { name, x, y, raw } of curves) {
      if (span) lines.push({ ...faint, x, y: raw, line: { color, width: 1 }, opacity: dark ? 0.35 : 0.25 });
      draw(name, x, y);
    }
  }
  return lines;
}

const shorten = (name) => (name.length <= 24 ? name : `${name.slice(0, 12)}…${name.slice(-11)}`);

// Lines beside the held-out loss: n-gram models, or its first value. The same ones once; different ones with the name of a run.
function baselines() {
  const texts = new Map();
  for (const [run] of groups()) { // runs of a group differ only in the seed, so they have the same text
    const key = JSON.stringify(Object.values(run.baselines).map((value) => value.toFixed(6)));
    if (Object.keys(run.baselines).length && !texts.has(key)) texts.set(key, run);
  }
  return [...texts.values()].flatMap((run) =>
    Object.entries(run.baselines).map(([name, value], i) => ({
      value,
      dash: N_GRAM_DASHES[i % N_GRAM_DASHES.length],
      text: `${name} ${value.toFixed(2)}` + (texts.size > 1 ? ` (${shorten(run.name)})` : ""),
      color: texts.size > 1 ? styleOf(run.run).color : null,
    })),
  );
}

// Units of a loss or a reward: nats per token, or the custom loss or reward of a run.
const units = (column) => [...new Set(chosen().map((run) => run.units[column]).filter(Boolean))].sort().join(", ");

const escapeText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;"); // Plotly interprets some HTML

function drawCharts() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--quiet").trim(), line = style.getPropertyValue("--line").trim();
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const charts = allCharts();
  if (charts.some(({ box }) => !box)) { // all boxes first, since they set the width of the charts
    for (const chart of charts) {
      chart.box ??= make("div", { id: "chart-" + chart.column });
      chart.card ??= make("div", { className: chart.small ? "chart small" : "chart" }, make("h2", {}, chart.title), chart.box);
      byId("charts").append(chart.card); // moves it, if it is there already
    }
  }
  for (const chart of charts) {
    const lines = traces(chart, dark), height = chart.box.clientHeight; // 0 if it was hidden
    chart.card.hidden = !lines.length;
    const marks = chart.column === "held_out" && lines.length ? baselines() : [];
    chart.box.style.setProperty("--legend", `${marks.length * 15}px`);
    const log = chart.loss && view.logY && lines.some(({ y }) => y.some((value) => value > 0)); // minus a reward is not
    const unit = ((chart.unit ?? units(chart.column)).match(UNIT_LINES) ?? []).map(escapeText).join("<br>");
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { color: ink } };
    Plotly.react(
      chart.box,
      lines.map((trace) => ({ ...trace, name: escapeText(trace.name ?? "") })),
      {
        xaxis: { ...axis, type: view.logX ? "log" : "linear", title: { text: view.over, font: { color: ink, size: 12 } }, exponentformat: "SI" },
        yaxis: { ...axis, type: log ? "log" : "linear", title: { text: unit, font: { color: ink, size: 12 } }, rangemode: chart.small && !log ? "tozero" : "normal", ...(log ? { dtick: "D1" } : {}) },
        margin: { l: 52, r: 16, t: 10, b: 40 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif", size: 12 },
        showlegend: marks.length > 0, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", traceorder: "normal", font: { size: 11 } }, hovermode: "x unified",
        hoverlabel: { namelength: -1, bgcolor: style.getPropertyValue("--card").trim(), bordercolor: line, font: { color: style.getPropertyValue("--ink").trim() } },
        shapes: marks.map(({ value, text, color, dash }) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, name: escapeText(text), showlegend: true, line: { color: color ?? ink, dash, width: 1 }, layer: "below" })),
        uirevision: [view.over, view.logX, view.logY].join(), // keeps the zoom over updates
      },
      { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] },
    );
    if (chart.box.clientHeight !== height) Plotly.Plots.resize(chart.box);
  }
}
