"use strict";
// The plots of records with masks, and the selectors above them.
const group = () => report.groups[Number(byId("group").value)];
const budget = () => group().budgets[Number(byId("budget").value)];

function drawAll() {
  const now = budget();
  draw("tradeoff", group().tradeoff[byId("metric").value][byId("cost").value]);
  for (const name of ["layers", "kind", "size", "times"]) draw(name, now[name]);
  for (const node of document.querySelectorAll(".against")) node.hidden = group().differences === null;
  const place = byId("plot-differences").previousElementSibling;
  if (place.classList.contains("legend")) place.hidden = group().differences === null;
  if (group().differences !== null) draw("differences", group().differences);
  for (const node of document.querySelectorAll(".at")) {
    node.textContent = now.budget === null ? "without a budget" : `at budget ${now.budget}`;
  }
  drawMatrix(now.matrix);
}

function drawMatrix({ labels, cells }) {
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
  const head = make("tr", {}, make("th"), ...labels.map((label) => make("th", { textContent: label, scope: "col" })));
  const rows = labels.map((label, row) => {
    const line = make("tr", {}, make("th", { textContent: label, scope: "row" }));
    cells[row].forEach((cell, column) => {
      if (cell === null) return line.append(make("td", { className: row === column ? "self" : "none" }));
      const told = `${label} − ${labels[column]}: ${signed(cell.value)} [${signed(cell.low)}, ${signed(cell.high)}], p = ${cell.p.toPrecision(2)}`;
      const node = make("td", { title: cell.shown ? told : `no difference shown; ${told}` });
      if (cell.shown) {
        node.textContent = signed(cell.value);
        node.style.background = `rgba(var(--${cell.value > 0 ? "better" : "worse"}), ${Math.min(0.65, 0.12 + Math.abs(cell.value))})`;
      } else Object.assign(node, { textContent: "·", className: "none" });
      line.append(node);
    });
    return line;
  });
  byId("matrix").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function fillBudgets() {
  const options = group().budgets.map((one, at) => make("option", { value: at, textContent: percent(one.budget) }));
  byId("budget").replaceChildren(...options);
  byId("budget").value = Math.floor((options.length - 1) / 2);
  byId("budget").closest("label").hidden = options.length === 1;
}

byId("group").addEventListener("change", () => { fillBudgets(); drawAll(); });
for (const id of ["budget", "metric", "cost"]) byId(id).addEventListener("change", drawAll);
dark.addEventListener("change", drawAll);
fillBudgets();
drawAll();
