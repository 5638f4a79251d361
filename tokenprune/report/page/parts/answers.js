"use strict";
// Answers: scores against cost, and a table with a row for each strategy and budget.
{
  const chosen = () => report.answers[Number(byId("answer-group").value)];
  const fixed = (value, like) => value.toFixed(Math.abs(like) < 100 ? 3 : 1).replace("-", "−");
  const interval = (ends, like) => (ends === null ? " [–]" : ` [${ends.map((end) => fixed(end, like)).join(", ")}]`);
  const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
  const score = (row, metric) => {
    const found = row.scores[metric];
    if (!found) return ["–"];
    const title = found.stderr === null ? "no standard error is known" : `standard error ${Number(found.stderr.toPrecision(3))}`;
    return [make("span", { textContent: fixed(found.value, found.value), title }), make("small", { textContent: interval(found.interval, found.value) })];
  };

  function table() {
    const { metrics, rows } = chosen();
    const columns = [
      ["strategy", (row) => [row.strategy]],
      ["budget", (row) => [percent(row.budget).replace("none", "–")]],
      ["equivalent tokens", (row) => [row.tokens.toFixed(1), make("small", { textContent: ` ${share(row.share)}` })]],
      ["FLOPs", (row) => [share(row.flops)]],
      ...metrics.map((metric) => [metric, (row) => score(row, metric)]),
      ["image tokens", (row) => [row.images.toFixed(1)]],
      ["answers", (row) => [String(row.answers)]],
    ];
    const head = make("tr", {}, ...columns.map(([title]) => make("th", { textContent: title, scope: "col" })));
    const lines = rows.map((row) => make("tr", {}, ...columns.map(([, cell]) => make("td", {}, ...cell(row)))));
    byId("answer-table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
  }

  function plot() {
    const costs = chosen().tradeoff[byId("answer-metric").value] ?? {};
    const cost = byId("answer-cost");
    for (const option of cost.options) option.disabled = !costs[option.value];
    if (!costs[cost.value]) cost.value = Object.keys(costs)[0];
    for (const node of document.querySelectorAll(".scored")) node.hidden = !cost.value;
    if (cost.value) draw("answers", costs[cost.value]);
  }

  function fill() {
    const options = chosen().metrics.map((metric) => make("option", { value: metric, textContent: metric }));
    byId("answer-metric").replaceChildren(...options);
    table();
    plot();
  }

  byId("answer-group").addEventListener("change", fill);
  for (const id of ["answer-metric", "answer-cost"]) byId(id).addEventListener("change", plot);
  dark.addEventListener("change", plot);
  fill();
}
