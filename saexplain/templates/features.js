/* All features: a list to sort and filter, a map, and how well the hypotheses predict. */
const RESULTS = ["High", "Medium", "Low", "not tested"];
/* The confidence in the hypothesis about a feature, where enough images activate it to test it. */
const resultWord = f => f.caption && (f.f1 !== null || Object.keys(f.found.results ?? {}).length)
  ? f.confidence : "not tested";
const sorts = { influence: f => -f.influence, density: f => -f.density,
  number: f => f.feature, F1: f => -(f.f1 ?? -1),
  confidence: f => RESULTS.indexOf(resultWord(f)) };
const densityBands = { "at least 10%": [.1, 2], "1% to 10%": [.01, .1], "0.1% to 1%": [.001, .01],
  "less than 0.1%": [1e-9, .001], never: [-1, 1e-9] };
const same = words => words.map(word => [word, word]), byClassName = classes.map(c =>
  [String(c), names[c]]);
/* What the list can be sorted and filtered by: a title, and [value, text] of each choice. */
const CHOICES = {
  sort: ["sort by", [["influence", "influence"], ["density", "share of images"], ["F1", "F1"],
    ["confidence", "result"], ["number", "number"]]],
  confidence: ["result", [["", "any"], ...same(RESULTS)]],
  density: ["active on", [["", "any share of images"], ...same(Object.keys(densityBands))]],
  supports: ["supports class", [["", "any"], ...byClassName]],
  label: ["mostly active on", [["", "any class"], ...byClassName]],
  ...features.some(f => f.mark) && { mark: ["found by a second SAE", [["", "either"],
    ["reproducible", "yes"], ["seed-specific", "no"]]] } };
const UNFILTERED = { sort: "influence", search: "",
  ...Object.fromEntries(Object.keys(CHOICES).slice(1).map(field => [field, ""])) };
const chosen = { ...UNFILTERED }, KEPT_LIST = `saexplain list ${meta.testing.sae}`;
const isChoice = (field, value) => field === "search" ? typeof value === "string"
  : CHOICES[field][1].some(([known]) => known === value);
const ownChoices = () => /* those that differ from a new visitor's */
  Object.fromEntries(Object.entries(chosen).filter(([field, v]) => v !== UNFILTERED[field]));

function recallList() { /* of an earlier visit */
  try {
    const kept = Object.entries(JSON.parse(localStorage.getItem(KEPT_LIST) ?? "{}"));
    for (const [field, v] of kept) if (field in chosen && isChoice(field, v)) chosen[field] = v;
  } catch { /* nothing is kept, or it cannot be read */ }
}
function readList() { /* of the address, where it has any of it */
  const given = Object.keys(chosen).filter(field => address().has(field));
  if (given.length) Object.assign(chosen, UNFILTERED);
  for (const field of given) {
    if (isChoice(field, address().get(field))) chosen[field] = address().get(field);
    else misreadField(field);
  }
}
function keepList() { /* in the address, for others, and in the browser, for the next visit */
  if (viewOf() === "features") history.replaceState(null, "", to("features", ownChoices()));
  try { localStorage.setItem(KEPT_LIST, JSON.stringify(ownChoices())); } catch { /* not kept */ }
}
function matches(f) {
  const words = chosen.search.trim().toLowerCase(), band = densityBands[chosen.density];
  const found = /^\d+$/.test(words) ? String(f.feature) === words
    : (f.caption ?? "").toLowerCase().includes(words);
  return (words === "" || found) && (chosen.label === "" || String(f.mode) === chosen.label) &&
    (chosen.supports === "" || f.density > 0 && String(supported(f)) === chosen.supports) &&
    (!band || f.density >= band[0] && f.density < band[1]) &&
    (!chosen.mark || f.mark === chosen.mark) &&
    (chosen.confidence === "" || resultWord(f) === chosen.confidence);
}
function selection() {
  const by = sorts[chosen.sort], list = features.map((f, i) => [f, i]).filter(([f]) => matches(f));
  return list.sort((a, b) => by(a[0]) - by(b[0]) || a[0].feature - b[0].feature);
}
/* The address of the feature before (by = -1) or after feature k in the list. */
function neighborInList(k, by) {
  const list = selection().map(([f]) => f.feature), at = list.indexOf(k), n = list.length;
  return toFeature(at < 0 ? list.at(by < 0 ? -1 : 0) ?? k : list[(at + by + n) % n]);
}
function placeInList(k) { /* in words */
  const list = selection(), at = list.findIndex(([f]) => f.feature === k);
  const which = list.length < F ? "filtered list" : "list";
  return at < 0 ? `not in your filtered list of ${list.length}`
    : `${at + 1} of ${list.length} in the ${which}, sorted by ` +
      CHOICES.sort[1].find(([value]) => value === chosen.sort)[1];
}
function choose(field, value) {
  chosen[field] = value;
  keepList();
  fillGrid();
}
function fillGrid() {
  const list = selection();
  byId("count").textContent = `${list.length} of ${plural(F, "feature")}` +
    (list.length ? "" : ": no feature is all of this; reset shows all");
  byId("resetList").disabled = !Object.keys(ownChoices()).length;
  byId("grid").replaceChildren(...list.map(([f, i]) => el("a", { href: toFeature(f.feature),
    title: f.caption ?? "", "aria-label": `feature ${f.feature}, ${inkCaption(f)}` },
  face(i), String(f.feature), el("br"), el("span", { class: "soft" },
    `${percent(f.density)} ${resultWord(f)}`))));
}
function filters() {
  const pick = ([field, [title, options]]) => el("label", { class: "small" }, `${title} `,
    el("select", { id: field, onchange: e => choose(field, e.target.value) },
      options.map(([value, text]) => el("option", { value, title: fullNames.get(text),
        selected: value === chosen[field] }, text))));
  const search = el("input", { type: "search", id: "search", placeholder: "number or word",
    value: chosen.search, oninput: e => choose("search", e.target.value) });
  const reset = button("reset", () => {
    Object.assign(chosen, UNFILTERED);
    keepList();
    featuresView();
  }, { id: "resetList" });
  return el("div", { class: "row", id: "filters" }, Object.entries(CHOICES).map(pick),
    el("label", { class: "small" }, "search ", search), reset);
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
    el("span", { title: "Laplacian eigenmaps of the nearest neighbors by cosine of decoder " +
      "directions; each feature moves to the nearest free cell" },
    "Features that do similar things to the network lie near one another"), "; across and down " +
    "have no unit. A flat map cannot keep all distances: for " +
    `${percent(meta.map.kept, 0)} of the features the most similar one is among the ten nearest ` +
    "here. The view of each feature lists those that are most similar."), mapOf(null, 36)];
}
function scatter() {
  const shown = features.filter(f => f.f1 !== null && f.density > 0);
  const width = fitting(600), height = 300;
  if (!shown.length) return note("No hypothesis was tested on enough images to draw this chart.");
  const logs = shown.map(f => Math.log10(f.density)), scores = shown.map(f => f.f1);
  const from = Math.min(...logs) - .1, till = Math.max(...logs) + .1;
  const low = Math.max(0, Math.min(...scores) - .01), high = Math.min(1, Math.max(...scores) + .01);
  const x = d => 50 + (width - 64) * (Math.log10(d) - from) / (till - from);
  const y = a => 26 + (height - 72) * (high - a) / (high - low), gap = high - low > .25 ? .1 : .05;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, id: "scatter",
    role: "img", "aria-label": `F1 of ${shown.length} hypotheses by density` });
  for (let a = Math.ceil(low / gap) * gap; a <= high + 1e-9; a += gap)
    chart.append(svg("text", { x: 44, y: y(a) + 4, "text-anchor": "end" }, a.toFixed(2)),
      svg("line", { x1: 48, x2: width - 10, y1: y(a), y2: y(a), class: "axis" }));
  for (let e = -5; e < 0; e++) for (const m of till - from < 3 && width > 400
    ? [1, 2, 5] : [1]) {
    const d = m * 10 ** e;
    if (Math.log10(d) >= from && Math.log10(d) <= till) chart.append(svg("text", { x: x(d),
      y: height - 26, "text-anchor": "middle" }, `${+(100 * d).toPrecision(1)}%`));
  }
  chart.append(svg("text", { x: 0, y: 13 }, "F1 of its hypothesis, on test images"),
    svg("text", { x: width / 2, y: height - 6, "text-anchor": "middle" },
      "share of validation images on which it is active"));
  for (const f of shown) {
    const open = () => { location.hash = toFeature(f.feature); };
    const point = { cx: x(f.density), cy: y(f.f1), r: 5, class: "point", onclick: open };
    chart.append(svg("circle", point,
      svg("title", {}, `Feature ${f.feature}: ${f.caption ?? ""}`)));
  }
  return chart;
}
function densities() {
  const counts = new Array(12).fill(0);
  const edge = i => `${+(100 * 10 ** (i / 3 - 4)).toPrecision(1)}%`;
  const labels = counts.map((_, i) => `${i ? edge(i) : "0%"} to ${edge(i + 1)}`);
  for (const f of features) {
    const third = Math.floor(3 * (Math.log10(f.density || 1e-9) + 4)); /* of a power of ten */
    counts[Math.max(0, Math.min(11, third))]++;
  }
  return columns("How often features are active", counts, labels, { y: "features",
    x: "share of validation images (first: all rarer)",
    ticks: [0, 3, 6, 9, 12].map(i => [i / 12, edge(i)]), width: 600, height: 180 });
}
function listView() {
  return [mapSwitch(), filters(), el("p", { id: "count", class: "small", role: "status" }),
    note("Under each picture: the feature's number, the share of the validation images on which " +
      "it is active, and the ", term("confidence"), " in its hypothesis. Arrow keys move, Enter " +
      "opens; a feature's own view goes through this list with ← and →."),
    el("div", { id: "grid" }), note(FACE)];
}
function chartsView() {
  return [el("h3", {}, "Each point is a feature; click it to open"),
    note(term("F1"), ": how well the hypothesis picks the test images on which the feature is " +
      "active; 1 is perfect, and rare features are harder. The list has the same features."),
    scatter(), densities()];
}
function featuresView() {
  const ways = { list: listView, map: mapView, charts: chartsView };
  const asked = address().get("as") ?? "list", as = Object.hasOwn(ways, asked) ? asked : "list";
  if (as !== asked) misreadField("as");
  readList();
  showMain(el("h2", {}, "All features"), linkBar("Show as",
    Object.keys(ways).map(way => [way, to("features", { as: way }), way]), as), ...ways[as]());
  if (as !== "list") return;
  keepList();
  fillGrid();
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
