"use strict";
// Plots: colours of the theme, and legends that switch series on and off.
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};
const percent = (value) => (value === null ? "none" : String(value));

const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b0478d", "#a87400", "#3d9bd6", "#6a3d9a", "#7a6a4f"],
  dark: ["#4da3e0", "#ff8a4c", "#2fc796", "#e38cc0", "#e6b422", "#8fd0fa", "#b79ae8", "#c9b38c"],
};
const GLYPHS = {
  circle: "●", square: "■", "triangle-up": "▲", diamond: "◆", "triangle-down": "▼", cross: "✚", x: "✖", star: "★", line: "┄",
};
const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(slot) {
  if (slot >= 0) return PALETTES[dark.matches ? "dark" : "light"][slot];
  if (slot === -2) return getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
  return dark.matches ? "#7b848e" : "#9aa3ac";
}

function faint(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

function themed(trace, on) {
  const { meta, ...rest } = trace;
  const shade = colour(meta.slot);
  const found = { ...rest, showlegend: false, name: trace.legendgroup, visible: on };
  if (meta.role === "band") return { ...found, fillcolor: faint(shade, 0.13), line: { width: 0, color: shade } };
  const line = { ...(trace.line || {}), color: shade, width: meta.role === "front" ? 1.5 : 2 };
  const marker = { color: shade, size: 8, symbol: meta.symbol || "circle", line: { width: 0 } };
  for (const axis of ["error_x", "error_y"]) {
    if (trace[axis]) found[axis] = { ...trace[axis], color: meta.role === "bar" ? colour(-2) : shade, thickness: 1.2 };
  }
  return meta.role === "bar" ? { ...found, marker: { color: shade } } : { ...found, line, marker };
}

const switched = {}; // by plot, what the reader switched on or off
function draw(id, plot) {
  const box = byId(`plot-${id}`);
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  const own = (switched[id] ??= new Map());
  const on = new Map(plot.legend.map((entry) => [entry.name, own.get(entry.name) ?? entry.on]));
  const narrow = box.clientWidth < 480;
  const horizontal = plot.rows !== undefined;
  if (horizontal) box.style.height = `${90 + 24 * plot.rows}px`;
  const axis = (given) => ({
    gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true, ...given,
    title: given.title ? { ...given.title, font: { size: 13 }, standoff: 8 } : undefined,
  });
  const layout = {
    ...plot.layout,
    xaxis: axis(plot.layout.xaxis || {}), yaxis: axis(plot.layout.yaxis || {}),
    margin: { l: narrow ? 8 : 60, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: text }, hovermode: "closest", dragmode: false,
    bargap: horizontal ? 0.3 : 0.2,
  };
  if (layout.xaxis.zeroline) Object.assign(layout.xaxis, { zerolinecolor: text, zerolinewidth: 1 });
  const data = plot.data.map((trace) => themed(trace, on.get(trace.legendgroup) ?? true));
  Plotly.react(box, data, layout, { displayModeBar: false, responsive: true });
  legend(id, box, plot, on, own);
}

function legend(id, box, plot, on, own) {
  const list = make("div", { className: "legend" });
  for (const entry of plot.legend) {
    const swatch = make("b", { textContent: GLYPHS[entry.symbol] });
    swatch.style.color = colour(entry.slot);
    const button = make("button", { type: "button", title: "show or hide" }, swatch, entry.name);
    button.setAttribute("aria-pressed", on.get(entry.name));
    button.addEventListener("click", () => {
      own.set(entry.name, !on.get(entry.name));
      draw(id, plot);
    });
    list.append(button);
  }
  const before = box.previousElementSibling;
  if (before?.classList.contains("legend")) before.replaceWith(list);
  else box.before(list);
}
