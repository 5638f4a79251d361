"use strict";
// The table of all results: sorted by a click on a heading, filtered by words, model, dataset and budget.
{
  const si = (value) => {
    const steps = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const [size, prefix] = steps.find(([size]) => value >= size) || [1, ""];
    return `${Number((value / size).toPrecision(3))}${prefix && " " + prefix}`;
  };
  const fixed = (value) => value.toFixed(3).replace("-", "−");
  const interval = ([low, high]) => make("small", { textContent: ` [${fixed(low)}, ${fixed(high)}]` });
  const measured = (row, key) => [row[key].toFixed(3), interval(row[`${key}_interval`])];
  const share = (value) => (value === null ? [] : [make("small", { textContent: ` ${(100 * value).toFixed(0)} %` })]);
  const COLUMNS = [
    ["strategy", "strategy", (row) => [row.strategy]],
    ["budget", "budget", (row) => [row.budget === null ? "–" : String(row.budget)]],
    ["model", "model", (row) => [row.model], "text"],
    ["dataset", "dataset", (row) => [row.dataset], "text"],
    ["queries", "queries", (row) => [String(row.queries)]],
    ["giou", "gIoU", (row) => measured(row, "giou")],
    ["ciou", "cIoU", (row) => measured(row, "ciou")],
    ["difference", "gIoU against none", (row) => {
      if (row.difference === null) return ["–"];
      if (!row.shown) return [make("span", { className: "dim", textContent: "no difference shown" })];
      return [`${row.difference < 0 ? "−" : "+"}${Math.abs(row.difference).toFixed(3)}`, interval(row.difference_interval)];
    }],
    ["tokens", "tokens", (row) => [row.tokens.toFixed(1), ...share(row.share)]],
    ["flops", "FLOPs", (row) => [si(row.flops), ...share(row.flops_share)]],
    ["kv", "KV bytes", (row) => [si(row.kv)]],
    ["prefill", "prefill, ms", (row) => [row.prefill == null ? "–" : row.prefill.toFixed(1)]],
  ];
  const constant = ["model", "dataset"].filter((key) => new Set(report.table.map((row) => row[key])).size === 1);
  const same = new Set(report.table.map((row) => row.queries)).size === 1;
  const columns = COLUMNS.filter(([key]) => !constant.includes(key) && !(key === "queries" && same)); // the head of the page has them
  for (const key of constant) byId(`by-${key}`).closest("label").hidden = true;
  let order = { key: null, down: false };

  const compare = (a, b) => {
    const [x, y] = [a[order.key], b[order.key]];
    if (x == null || y == null) return (x == null) - (y == null); // what is missing comes last in both directions
    const found = typeof x === "string" ? x.localeCompare(y) : x - y;
    return order.down ? -found : found;
  };

  function show() {
    const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = Object.fromEntries(["model", "dataset", "budget"].map((key) => [key, byId(`by-${key}`).value]));
    const rows = report.table.filter((row) => {
      const text = `${row.strategy} ${row.model} ${row.dataset} ${row.budget ?? ""}`.toLowerCase();
      const fits = Object.entries(chosen).every(([key, value]) => !value || percent(row[key]) === value);
      return fits && words.every((word) => text.includes(word));
    });
    if (order.key !== null) rows.sort(compare);
    const lines = rows.map((row) =>
      make("tr", {}, ...columns.map(([, , cell, kind]) => make("td", { className: kind || "" }, ...cell(row)))));
    document.querySelector("#results tbody").replaceChildren(...lines);
    byId("count").textContent = rows.length === report.table.length ? `${rows.length} rows` : `${rows.length} of ${report.table.length} rows`;
    for (const node of document.querySelectorAll("#results th")) {
      node.ariaSort = node.dataset.key === order.key ? (order.down ? "descending" : "ascending") : "none";
    }
  }

  const head = columns.map(([key, title, , kind]) => {
    const button = make("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      const numbers = typeof report.table.find((row) => row[key] != null)?.[key] === "number";
      order = { key, down: order.key === key ? !order.down : numbers };
      show();
    });
    const node = make("th", { scope: "col", className: kind || "" }, button);
    node.dataset.key = key;
    return node;
  });
  document.querySelector("#results thead").append(make("tr", {}, ...head));
  for (const key of ["model", "dataset", "budget"]) {
    const values = [...new Set(report.table.map((row) => percent(row[key])))];
    byId(`by-${key}`).append(...values.map((value) => make("option", { value, textContent: value })));
    byId(`by-${key}`).addEventListener("change", show);
  }
  byId("find").addEventListener("input", show);
  show();
}
