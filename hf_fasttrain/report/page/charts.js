"use strict";
// Draws the charts in the page's colours, and again when theme, axis or size change.

// Okabe and Ito's colours, which colour-blind people can tell apart; some darker on white or lighter on black, to stand
// out by 3 to 1.
const OKABE_ITO = {
  light: ["#0072B2", "#D55E00", "#009E73", "#BF6A9B", "#B87D00", "#2E8FC6", "#555555"],
  dark: ["#56B4E9", "#E69F00", "#1FBF92", "#DE96BF", "#F0E442", "#E8703A", "#BBBBBB"],
};
const root = document.documentElement;
const state = { axis: "steps", order: "clustered", ranges: null };
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const coarse = window.matchMedia("(pointer: coarse)").matches; // a finger on a chart should scroll the page
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const matrix = figures.confusion ? readMatrix(figures.confusion.layout.meta.matrix) : null;
if (matrix) state.order = matrix.orders.clustered === matrix.orders.original ? "original" : "clustered";

function palette(dark) {
  const style = getComputedStyle(root), colours = {};
  OKABE_ITO[dark ? "dark" : "light"].forEach((colour, index) => {
    colours[`theme:c${index}`] = colour;
    colours[`theme:band${index}`] = colour + "33";
    colours[`theme:area${index}`] = colour + "99";
  });
  for (const name of ["paper", "panel", "ink", "muted", "rule", "grid"]) {
    colours[`theme:${name}`] = style.getPropertyValue(`--${name}`).trim();
  }
  const [wrong, right] = dark ? [["#FFC860", "#E69F00"], ["#56B4E9", "#9AD8FF"]] : [["#7a3500", "#D55E00"], ["#0072B2", "#00314f"]];
  colours["theme:rightAndWrong"] = [[0, wrong[0]], [0.2, wrong[1]], [0.5, colours["theme:panel"]], [0.8, right[0]], [1, right[1]]];
  return colours;
}

// A copy of a figure's part in which theme:NAME has become a colour; long arrays of numbers are taken as they are.
function painted(value, colours) {
  if (typeof value === "string") return colours[value] ?? value;
  if (Array.isArray(value)) return value.length && typeof value[0] === "object" && value[0] && !Array.isArray(value[0]) ? value.map((item) => painted(item, colours)) : value;
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, colours)]));
  return value;
}

function byEpoch(figure) {
  const scaled = (values, factor) => (factor ? values.map((value) => (value === null ? null : value * factor)) : values);
  const data = figure.data.map((trace) => ({ ...trace, x: scaled(trace.x, trace.meta.epochs_per_step) }));
  const factor = figure.layout.meta.epochs_per_step || 1, { shapes = [], annotations = [] } = figure.layout;
  return {
    data,
    layout: {
      ...figure.layout,
      xaxis: { ...figure.layout.xaxis, title: { text: "epoch", standoff: 6 }, unifiedhovertitle: { text: "epoch %{x:.2f}" } },
      shapes: shapes.map((shape) => ({ ...shape, x0: shape.x0 * factor, x1: shape.x1 * factor })),
      annotations: annotations.map((note) => ({ ...note, x: note.x * factor })),
    },
  };
}

function figureOf(name) {
  if (name === "confusion") return matrixFigure(matrix, state.order, state.ranges, plots.find((plot) => plot.dataset.chart === name).clientWidth);
  const figure = figures[name];
  if (figure.layout.meta.own_axis) return figure;
  if (state.axis === "epochs") return byEpoch(figure);
  const xaxis = { ...figure.layout.xaxis, tickformat: ",~g", unifiedhovertitle: { text: "step %{x:,.0f}" } };
  return { data: figure.data, layout: { ...figure.layout, xaxis } };
}

function draw(plot) {
  const name = plot.dataset.chart, colours = palette(isDark()), figure = painted(figureOf(name), colours);
  const axis = { gridcolor: colours["theme:grid"], zerolinecolor: colours["theme:rule"], linecolor: colours["theme:rule"] };
  const named = figure.data.filter((trace) => trace.showlegend !== false).length > 1 && figure.layout.showlegend !== false;
  const layout = {
    margin: { t: 28, r: 12, b: named ? 72 : 46, l: 58 }, legend: { orientation: "h", x: 0, y: -0.24, yanchor: "top" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, uirevision: `${name} ${state.axis} ${state.order}`,
    font: { family: "system-ui, sans-serif", size: 12, color: colours["theme:ink"] }, dragmode: coarse ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours["theme:muted"], activecolor: colours["theme:ink"] },
    hoverlabel: { bgcolor: colours["theme:panel"], bordercolor: colours["theme:rule"], font: { color: colours["theme:ink"] }, align: "left" },
    ...figure.layout,
  };
  layout.xaxis = { ...axis, ...layout.xaxis };
  layout.yaxis = { ...axis, ...layout.yaxis };
  const config = {
    displaylogo: false, responsive: true, doubleClick: "reset", showTips: false,
    // These and no others: one of plotly's own would upload the chart.
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]], plotlyServerURL: "",
    toImageButtonOptions: { filename: name, scale: 2 },
  };
  return Plotly.react(plot, figure.data, layout, config);
}

function zoomMatrix(plot, event) {
  if (!Object.keys(event).some((key) => key.includes("axis"))) return;
  const { xaxis, yaxis } = plot.layout;
  state.ranges = [[...xaxis.range], [...yaxis.range]];
  draw(plot);
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    plots.forEach(draw);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  systemDark.addEventListener("change", show);
  window.addEventListener("beforeprint", () => {
    root.dataset.printedIn = root.dataset.theme || "";
    root.dataset.theme = "light";
    plots.forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    if (root.dataset.printedIn) root.dataset.theme = root.dataset.printedIn;
    else delete root.dataset.theme;
    plots.forEach(draw);
  });
  button.setAttribute("aria-pressed", String(isDark()));
}

function setUpAxis() {
  const byStep = plots.filter((plot) => plot.dataset.chart !== "confusion" && !figures[plot.dataset.chart].layout.meta.own_axis);
  const known = byStep.some((plot) => figures[plot.dataset.chart].data.some((trace) => trace.meta.epochs_per_step));
  const buttons = [...document.querySelectorAll("[data-axis]")];
  document.querySelectorAll(".switch").forEach((group) => { group.hidden = !known; });
  buttons.forEach((button) => button.addEventListener("click", () => {
    state.axis = button.dataset.axis;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other.dataset.axis === state.axis)));
    byStep.forEach(draw);
  }));
}

function setUpMatrix() {
  const plot = plots.find((candidate) => candidate.dataset.chart === "confusion"), order = document.getElementById("matrix-order");
  if (!plot) return;
  plot.classList.toggle("small", matrix.size <= 5);
  order.closest("div").hidden = matrix.orders.clustered === matrix.orders.original;
  order.addEventListener("change", () => {
    state.order = order.value;
    state.ranges = null;
    draw(plot);
  });
}

setUpTheme();
setUpAxis();
setUpMatrix();
plots.forEach((plot) => draw(plot).then(() => {
  if (plot.dataset.chart === "confusion") plot.on("plotly_relayout", (event) => zoomMatrix(plot, event));
  plot.dataset.drawn = "yes";
}));
