/* All features: a list to sort and filter, a map, and how well the hypotheses predict. */
const sorts = { influence: f => -f.influence, density: f => -f.density,
  number: f => f.feature, F1: f => -(f.f1 ?? -1),
  confidence: f => ["High", "Medium", "Low", null].indexOf(f.confidence ?? null) };
const densityBands = { "at least 10%": [.1, 2], "1% to 10%": [.01, .1], "0.1% to 1%": [.001, .01],
  "less than 0.1%": [1e-9, .001], never: [-1, 1e-9] };
const chosen = { sort: "influence", label: "", supports: "", density: "", confidence: "",
  search: "" };
function matches(f) {
  const words = chosen.search.trim().toLowerCase(), band = densityBands[chosen.density];
  const found = /^\d+$/.test(words) ? String(f.feature) === words
    : (f.caption ?? "").toLowerCase().includes(words);
  return (words === "" || found) && (chosen.label === "" || String(f.mode) === chosen.label) &&
    (chosen.supports === "" || f.density > 0 && String(supported(f)) === chosen.supports) &&
    (!band || f.density >= band[0] && f.density < band[1]) &&
    (chosen.confidence === "" || f.confidence === chosen.confidence);
}
function selection() {
  const by = sorts[chosen.sort], list = features.map((f, i) => [f, i]).filter(([f]) => matches(f));
  return list.sort((a, b) => by(a[0]) - by(b[0]) || a[0].feature - b[0].feature);
}
function choice(field, title, options) {
  const fill = () => { chosen[field] = byId(field).value; fillGrid(); };
  return el("label", { class: "small" }, title + " ", el("select", { id: field, onchange: fill },
    options.map(([value, text]) =>
      el("option", { value, selected: value === chosen[field] }, text))));
}
function fillGrid() {
  const list = selection();
  byId("count").textContent = `${list.length} of ${F} features`;
  byId("grid").replaceChildren(...list.map(([f, i]) => el("a", { href: toFeature(f.feature),
    title: f.caption ?? "", "aria-label": `feature ${f.feature}, ${inkCaption(f)}` },
  face(i), String(f.feature), el("br"), el("span", { class: "soft" },
    `${percent(f.density)} ${f.confidence ?? ""}`))));
}
function filters() {
  const same = words => words.map(word => [word, word]);
  const labels = classes.map(c => [String(c), names[c]]);
  return el("div", { class: "row" }, choice("sort", "sort by", same(Object.keys(sorts))),
    choice("label", "most active on", [["", "any"], ...labels]),
    choice("supports", "supports", [["", "any"], ...labels]),
    choice("density", "density", [["", "any"], ...same(Object.keys(densityBands))]),
    choice("confidence", "confidence", [["", "any"], ...same(["High", "Medium", "Low"])]),
    el("label", { class: "small" }, "search ", el("input", { type: "search", id: "search",
      placeholder: "number or word", value: chosen.search,
      oninput: e => { chosen.search = e.target.value; fillGrid(); } })));
}
function mapOf(here, size) { /* features in their cells; feature `here` and its neighbors marked */
  const { cells, side } = meta.map, near = new Set(here === null ? [] : here.near.map(([k]) => k));
  const box = el("div", { id: "map", style: `width:${side * size}px;height:${side * size}px` });
  features.forEach((f, i) => {
    const [x, y] = cells[i], kind = f === here ? "here" : near.has(f.feature) ? "near" : "";
    const style = `left:${x * size}px;top:${y * size}px;width:${size}px;height:${size}px`;
    box.append(el("a", { href: toFeature(f.feature), class: kind, style,
      title: `${f.feature}: ${inkCaption(f)}`, "aria-label": `feature ${f.feature} ${kind}` },
    face(i, size - 4)));
  });
  return el("div", { class: "scroll" }, box);
}
function mapView() {
  return [el("p", { class: "small" },
    `Features with similar decoder directions lie near one another (Laplacian eigenmaps of the ` +
    `nearest neighbors by cosine; each feature moves to the nearest free cell). A map of two ` +
    `dimensions cannot keep all distances: for ${percent(meta.map.kept, 0)} of the features the ` +
    `nearest neighbor by cosine is among the ten nearest on the map. The view of each feature ` +
    `lists its true neighbors.`), mapOf(null, 36)];
}
function scatter() {
  const shown = features.filter(f => f.f1 !== null && f.density > 0), width = 600, height = 300;
  if (!shown.length) return note("No hypothesis was tested on enough images to draw this chart.");
  const logs = shown.map(f => Math.log10(f.density)), scores = shown.map(f => f.f1);
  const from = Math.min(...logs) - .1, till = Math.max(...logs) + .1;
  const low = Math.max(0, Math.min(...scores) - .01), high = Math.min(1, Math.max(...scores) + .01);
  const x = d => 50 + (width - 64) * (Math.log10(d) - from) / (till - from);
  const y = a => 10 + (height - 56) * (high - a) / (high - low), gap = high - low > .25 ? .1 : .05;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, id: "scatter",
    role: "img", "aria-label": `F1 of ${shown.length} hypotheses by density` });
  for (let a = Math.ceil(low / gap) * gap; a <= high + 1e-9; a += gap)
    chart.append(svg("text", { x: 44, y: y(a) + 4, "text-anchor": "end" }, a.toFixed(2)),
      svg("line", { x1: 48, x2: width - 10, y1: y(a), y2: y(a), class: "axis" }));
  for (let e = -5; e < 0; e++) for (const m of till - from < 3 ? [1, 2, 5] : [1]) {
    const d = m * 10 ** e;
    if (Math.log10(d) >= from && Math.log10(d) <= till) chart.append(svg("text", { x: x(d),
      y: height - 26, "text-anchor": "middle" }, `${+(100 * d).toPrecision(1)}%`));
  }
  chart.append(svg("text", { x: width / 2, y: height - 6, "text-anchor": "middle" },
    "density: share of images on which the feature is active"));
  for (const f of shown) {
    const open = () => { location.hash = toFeature(f.feature); };
    const point = { cx: x(f.density), cy: y(f.f1), r: 5, class: "point", onclick: open };
    chart.append(svg("circle", point,
      svg("title", {}, `Feature ${f.feature}: ${f.caption ?? ""}`)));
  }
  return el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "chart" }, chart);
}
function densities() {
  const counts = new Array(12).fill(0);
  const labels = counts.map((_, i) => i % 3 ? "" : ["0.01%", "0.1%", "1%", "10%"][i / 3]);
  for (const f of features) {
    const third = Math.floor(3 * (Math.log10(f.density || 1e-9) + 4)); /* of a power of ten */
    counts[Math.max(0, Math.min(11, third))]++;
  }
  return columns("Features by density (the first column: all rarer)",
    counts, labels, 150, 420);
}
function listView() {
  return [mapSwitch(), note(FACE, " Under each: density (share of images on which it is active) " +
    "and confidence in its hypothesis. Arrow keys move, Enter opens."), filters(),
    el("p", { id: "count", class: "small", role: "status" }), el("div", { id: "grid" })];
}
function chartsView() {
  return [el("h3", {}, "Each point is a feature; click it to open"),
    note("Vertical: how well the hypothesis picks the test images on which the feature is active " +
      "(F1: 1 is perfect; rare features are harder). The list shows the same features, sorted by " +
      "F1 or density."),
    scatter(), densities()];
}
function featuresView() {
  const ways = { list: listView, map: mapView, charts: chartsView };
  const as = address().get("as") in ways ? address().get("as") : "list";
  showMain(el("h2", {}, "All features"), linkBar("Show as",
    Object.keys(ways).map(way => [way, to("features", { as: way }), way]), as), ...ways[as]());
  if (as === "list") fillGrid();
}
function gridKeys(e) { /* the arrow keys move through the list */
  const cells = [...document.querySelectorAll("#grid a")];
  const now = cells.indexOf(document.activeElement);
  if (!cells.length || !e.key.startsWith("Arrow")) return;
  const across = Math.max(1, cells.filter(c => c.offsetTop === cells[0].offsetTop).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[e.key];
  const next = cells[now < 0 ? 0 : now + step];
  if (next) { next.focus(); e.preventDefault(); }
}
