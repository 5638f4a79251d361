"use strict";
// The gallery: samples in the order of the reader's question, with masks and tokens drawn on the image.
{
  const GREEN = [0, 158, 115], VERMILION = [213, 94, 0], PARKED = [0, 114, 178], SIDE = 296;
  let page = 0;
  const data = () => report.gallery[Number(byId("group").value)];
  const loaded = new Map();
  const picture = (uri) => {
    if (!loaded.has(uri)) {
      const image = new Image();
      image.src = uri;
      loaded.set(uri, image.decode().then(() => image));
    }
    return loaded.get(uri);
  };

  function pixels(image, width, height, smooth) {
    const canvas = make("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = smooth;
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  }

  async function canvasOf(sample, paint) {
    const image = await picture(sample.image);
    const scale = SIDE / Math.max(image.naturalWidth, image.naturalHeight);
    const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.max(1, Math.round(side * scale)));
    const base = pixels(image, width, height, true);
    await paint(base.data, width, height);
    const canvas = make("canvas", { width, height });
    canvas.getContext("2d").putImageData(base, 0, 0);
    return canvas;
  }

  const grey = (data, at) => 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];

  // The image greyed, the mask in colour with a white rim, the target's rim in green.
  const masked = (sample, uri, colour) => canvasOf(sample, async (data, width, height) => {
    const inside = pixels(await picture(uri), width, height, false).data;
    const target = pixels(await picture(sample.target), width, height, false).data;
    const within = (mask, x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[4 * (y * width + x)] > 127;
    const rim = (mask, x, y) => within(mask, x, y) && !(within(mask, x - 1, y) && within(mask, x + 1, y) && within(mask, x, y - 1) && within(mask, x, y + 1));
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const at = 4 * (y * width + x), light = grey(data, at) * 0.6 + 51;
      for (let c = 0; c < 3; c++) {
        let value = within(inside, x, y) ? 0.35 * data[at + c] + 0.65 * colour[c] : light;
        if (rim(inside, x, y)) value = 255;
        if (colour !== GREEN && rim(target, x, y)) value = GREEN[c];
        data[at + c] = value;
      }
    }
  });

  const bits = (text, size) => {
    const bytes = atob(text || "");
    return Array.from({ length: size }, (_, at) => ((bytes.charCodeAt(at >> 3) || 0) >> (7 - (at & 7))) & 1);
  };

  // The image at the places of active tokens, parked places tinted, others dark.
  const tokens = (sample, stage) => canvasOf(sample, (data, width, height) => {
    const [rows, columns] = stage.grid, [top, left, bottom, right] = stage.box;
    const lit = bits(stage.cells, rows * columns), parked = bits(stage.parked, rows * columns);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const row = Math.floor((((y + 0.5) / height - top) / (bottom - top)) * rows);
      const column = Math.floor((((x + 0.5) / width - left) / (right - left)) * columns);
      const cell = row >= 0 && column >= 0 && row < rows && column < columns ? row * columns + column : -1;
      if (cell >= 0 && lit[cell]) continue;
      const at = 4 * (y * width + x), light = grey(data, at);
      for (let c = 0; c < 3; c++) data[at + c] = cell >= 0 && parked[cell] ? 0.45 * light + 0.35 * PARKED[c] : 0.18 * light;
    }
  });

  function panel(made, caption) {
    const figure = make("figure", {}, make("figcaption", { textContent: caption }));
    made.then((canvas) => figure.prepend(canvas)).catch(() => figure.prepend("cannot be drawn"));
    return figure;
  }

  function run(sample, row, asked) {
    const { labels, ious } = data(), iou = ious[row][sample.place];
    const title = `${labels[row]} · IoU ${iou === null ? "–" : iou.toFixed(3)}`;
    const panels = make("div", { className: "panels" });
    const found = sample.runs[row];
    if (found) {
      const all = found.stages.length ? "" : `; all ${sample.tokens} image tokens in every layer`;
      panels.append(panel(masked(sample, found.mask, VERMILION), `mask${all}`));
      for (const stage of found.stages) {
        const caption = `${stage.name}, from layer ${stage.layer}: ${stage.kept} of ${sample.tokens}`;
        if (stage.grid) panels.append(panel(tokens(sample, stage), caption));
        else panels.append(make("figure", {}, make("figcaption", { textContent: `${caption} (places are not stored)` })));
      }
    } else panels.append(make("p", { className: "empty", textContent: "no mask is stored" }));
    return make("div", { className: asked ? "run asked" : "run" }, make("h4", { textContent: title }), panels);
  }

  // All queries in the order that is asked for, as places in the list of IoUs; those without a value are left out.
  function ordered(first, second) {
    const { ious } = data();
    const value = second === null
      ? (at) => ious[first][at]
      : (at) => (ious[first][at] === null || ious[second][at] === null ? null : -Math.abs(ious[first][at] - ious[second][at]));
    return ious[first].map((_, at) => at).filter((at) => value(at) !== null).sort((a, b) => value(a) - value(b) || a - b);
  }

  function rowsOf(first, second) {
    const { labels, budgets } = data();
    if (!byId("everyone").checked) {
      const reference = labels.indexOf("none");
      return [...new Set(second === null ? [first, ...(reference < 0 ? [] : [reference])] : [first, second])];
    }
    const wanted = budgets[first] ?? (second === null ? null : budgets[second]);
    const others = labels.map((_, row) => row).filter((row) => budgets[row] === null || budgets[row] === wanted);
    return [...new Set([first, ...(second === null ? [] : [second]), ...others])];
  }

  function card(sample, rank, total, first, second) {
    const { ious } = data();
    const gap = second === null ? "" : ` · difference ${(ious[first][sample.place] - ious[second][sample.place]).toFixed(3)}`;
    const seed = report.seeds > 1 ? `, seed ${sample.seed}` : "";
    const meta = `rank ${rank} of ${total}${gap} · ${sample.name}${seed} · ${sample.kind} · target ${sample.size}`;
    const shown = make("div", { className: "panels" });
    const image = make("img", { src: sample.image, alt: "" });
    shown.append(make("figure", {}, image, make("figcaption", { textContent: "image" })));
    shown.append(panel(masked(sample, sample.target, GREEN), "target"));
    const input = make("div", { className: "run" }, make("h4", { textContent: "Query" }), shown);
    const runs = rowsOf(first, second).map((row) => run(sample, row, row === first || row === second));
    return make("article", { className: "card" }, make("h3", { textContent: `“${sample.text}”` }),
      make("p", { className: "meta", textContent: meta }), make("div", { className: byId("everyone").checked ? "runs many" : "runs" }, input, ...runs));
  }

  function show() {
    const { samples, note } = data();
    const against = byId("mode").value === "against";
    for (const node of document.querySelectorAll(".only-against")) node.hidden = !against;
    for (const node of document.querySelectorAll(".only-worst")) node.hidden = against;
    for (const node of [byId("gallery-controls"), byId("gallery-legend"), document.querySelector(".pager")]) node.hidden = !samples.length;
    byId("gallery-note").textContent = note || `The report holds pictures of ${samples.length} queries, taken in turns from the worst of each row and the largest differences at equal budget; ranks count all queries.`;
    if (!samples.length) return byId("cards").replaceChildren();
    const first = Number(byId("first").value), second = against ? Number(byId("second").value) : null;
    const order = ordered(first, second), rank = new Map(order.map((place, at) => [place, at + 1]));
    const found = samples.filter((sample) => rank.has(sample.place) && sample.runs[first] && (second === null || sample.runs[second]))
      .sort((a, b) => rank.get(a.place) - rank.get(b.place));
    const size = Number(byId("per-page").value), pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(Math.max(page, 0), pages - 1);
    const cards = found.slice(page * size, (page + 1) * size).map((sample) => card(sample, rank.get(sample.place), order.length, first, second));
    byId("cards").replaceChildren(...cards);
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }

  function fill() {
    const { labels, budgets } = data();
    const options = () => labels.map((label, row) => make("option", { value: row, textContent: label }));
    byId("first").replaceChildren(...options());
    byId("second").replaceChildren(...options());
    const own = budgets.findIndex((one) => one !== null), reference = labels.indexOf("none");
    byId("first").value = Math.max(own, 0);
    byId("second").value = reference >= 0 ? reference : 0;
    page = 0;
    show();
  }

  for (const id of ["mode", "first", "second", "per-page", "everyone"]) {
    byId(id).addEventListener("change", () => { page = 0; show(); });
  }
  byId("previous").addEventListener("click", () => { page -= 1; show(); });
  byId("next").addEventListener("click", () => { page += 1; show(); });
  byId("group").addEventListener("change", fill);
  fill();
}
