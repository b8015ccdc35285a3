/* Paint a hypothesis of one's own, follow its numbers, and test it. */
const WIDE = 12; /* pixels of the sheet in the side of a cell */
const writing = { i: null, h: null, weights: null, scores: null, now: null, past: [], role: 1,
  strong: false, size: 3, at: [CH >> 1, CW >> 1], last: null, keyed: false, parts: {} };
const ROLES = [[`${INK} wanted`, 1], ["blank wanted", -1], ["eraser", 0]];

/* ---------- the hypothesis in hand ---------- */
function blankHypothesis(k) {
  return { feature: k, caption: "", drawing: rowsOf(new Int8Array(CP)), classes: [], raises: null,
    lowers: null, confidence: "", threshold: null, tries: 0, tested: null };
}
function openEntry(i, h) {
  const weights = weightsOf(h.drawing);
  Object.assign(writing, { i, h, weights, scores: scoresOf(weights, "val"), past: [], last: null,
    threshold: h.threshold }); /* as given, until the drawing changes */
}
function edited() { /* what was tested stays: a change makes a new hypothesis */
  if (writing.h.tested) {
    writing.h = { ...writing.h, tries: 0, tested: null };
    announce("A new hypothesis. The tested one stays as it is.");
  }
  if (!mine.list.includes(writing.h)) mine.list.push(writing.h);
}
function keep() { /* after each stroke */
  Object.assign(writing.h, { drawing: rowsOf(writing.weights),
    threshold: writing.weights.some(Boolean) ? writing.now.threshold : null });
  save();
  write(writing.parts.kept, keptWords());
}
function setField(name, value) {
  edited();
  writing.h[name] = value;
  keep();
  showWriting();
}

/* ---------- painting ---------- */
function setCell(p, w) {
  const by = w - writing.weights[p];
  if (!by) return;
  edited();
  writing.weights[p] = w;
  writing.threshold = null;
  addToScores(writing.scores, "val", p, by);
}
function setDrawing(weights) {
  weights.forEach((w, p) => setCell(p, w));
  showWriting();
  keep();
}
function rememberDrawing() {
  writing.past.push(writing.weights.slice());
  if (writing.past.length > 100) writing.past.shift();
}
function undoPaint() {
  if (writing.past.length) setDrawing(writing.past.pop());
}
function dab([row, column]) { /* the brush, round, at a cell */
  const radius = writing.size / 2, low = -Math.floor((writing.size - 1) / 2);
  const center = low + (writing.size - 1) / 2;
  for (let v = low; v < low + writing.size; v++) for (let u = low; u < low + writing.size; u++) {
    const y = row + v, x = column + u;
    if (y < 0 || y >= CH || x < 0 || x >= CW) continue;
    if ((v - center) ** 2 + (u - center) ** 2 < radius ** 2 + .1)
      setCell(y * CW + x, writing.role * (writing.strong ? 2 : 1));
  }
}
function paintTo(cell) { /* from the last cell to this one */
  const [row, column] = writing.last ?? cell;
  const n = Math.max(1, Math.abs(cell[0] - row), Math.abs(cell[1] - column));
  for (let m = 1; m <= n; m++) dab([Math.round(row + (cell[0] - row) * m / n),
    Math.round(column + (cell[1] - column) * m / n)]);
  writing.last = cell;
}
const within = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v)));
function brush(canvas) {
  paintable(canvas, { down: () => {
    rememberDrawing();
    Object.assign(writing, { last: null, keyed: false });
  }, line: ([x, y]) => {
    writing.at = [within(y * CH, CH), within(x * CW, CW)];
    if (String(writing.at) === String(writing.last)) return;
    paintTo(writing.at);
    schedule();
  }, up: () => { showWriting(); keep(); announce(writing.parts.words.textContent); } });
}
function brushKeys(e) {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
  const role = { r: 1, b: -1, e: 0 }[e.key], paints = e.key === " " || e.key === "Enter";
  if ((e.ctrlKey || e.metaKey) && e.key === "z") undoPaint();
  else if (e.ctrlKey || e.metaKey || e.altKey) return;
  else if (by) {
    writing.at = [within(writing.at[0] + by[0], CH), within(writing.at[1] + by[1], CW)];
  } else if (paints) {
    rememberDrawing();
    writing.last = null;
    paintTo(writing.at);
    writing.last = null;
  } else if (role !== undefined) writing.role = role;
  else if (e.key === "s") writing.strong = !writing.strong;
  else return;
  e.preventDefault();
  writing.keyed = true;
  showWriting();
  if (paints) keep();
  const w = writing.weights[writing.at[0] * CW + writing.at[1]];
  announce(`row ${writing.at[0] + 1}, column ${writing.at[1] + 1}: ` + ["blank wanted strongly",
    "blank wanted", "nothing", `${INK} wanted`, `${INK} wanted strongly`][w + 2]);
}

/* ---------- what follows the brush ---------- */
function paintSheet() {
  const context = writing.parts.context;
  context.drawImage(writing.parts.under, 0, 0, CW * WIDE, CH * WIDE);
  tint(context, writing.weights, WIDE);
  if (!writing.keyed) return;
  const [row, column] = writing.at;
  context.strokeStyle = "#000";
  context.lineWidth = 2;
  context.strokeRect(column * WIDE, row * WIDE, WIDE, WIDE);
}
const numberRows = { precision: "precision", recall: "recall", f1: "F1",
  average_precision: "average precision", auroc: "AUROC" };
/* A table of measures; every column is [title, measures or null]. */
function measureTable(label, columns, id, names = Object.keys(numberRows)) {
  const line = (cells, tag) => el("tr", {}, cells.map(cell => el(tag, {}, cell)));
  const value = (m, key) => m ? m[key].toFixed(3) : "none";
  return el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label },
    el("table", { id, class: "numbers" }, line(["", ...columns.map(([title]) => title)], "th"),
      names.map(key => el("tr", {}, el("th", { scope: "row" }, numberRows[key]),
        columns.map(([, m]) => el("td", {}, value(m, key)))))));
}
const everyImage = m => ({ precision: m.rate, recall: 1, f1: m.chance_f1, average_precision: m.rate,
  auroc: .5 });
/* The strongest image missed, and the one with the best match that is wrongly picked. */
function examples() {
  const { i, scores, now: { threshold } } = writing, at = activeIn("val", i);
  const activation = pairsOf("val", i, "activation"), active = new Set(at);
  const [missed] = largest(1, n => scores[at[n]] < threshold ? activation[n] : 0, at.length);
  const picked = [...scores.keys()].filter(t => scores[t] >= threshold && !active.has(t));
  const wrong = picked.reduce((a, b) => scores[b] > scores[a] ? b : a, picked[0]);
  const example = (title, t, words) => t === undefined ? "" : el("figure", { "data-image": t },
    picture(`${title}: ${an(names[arrays.val_labels[t]])}`, 96, null,
      p => gray(255 - levelsOf("val", t)[cellAt(p)])),
    el("figcaption", { class: "small" }, title, el("br"), el("span", { class: "soft" }, words)));
  return put(el("div", { class: "row", id: "examples" }), {}, [
    example("Strongest image it misses", at[missed],
      `activation ${percent(activation[missed] / 255, 0)} of the largest`),
    example("Best match it wrongly picks", wrong, "the feature is inactive")]);
}
function showWriting() {
  const { i, h, parts } = writing, any = writing.weights.some(Boolean);
  const same = isDrawn(i) && String(writing.weights) === String(drawingOf(i));
  const threshold = writing.threshold ?? (same ? features[i].hypothesis.threshold : null);
  writing.now = measure(writing.scores, activeIn("val", i), threshold);
  const now = any ? writing.now : null;
  paintSheet();
  write(parts.words, now ? `F1 ${now.f1.toFixed(2)}. ${pickedWords(now)}`
    : "Nothing is drawn yet. Paint on the picture.");
  parts.numbers.replaceChildren(measureTable("your numbers", [["yours", now],
    ["the program's", parts.machine], ["every image picked", everyImage(writing.now)]],
  "numbers", ["precision", "recall", "f1", "average_precision"]));
  parts.examples.replaceChildren(now ? examples() : "");
  parts.roles.forEach((node, n) =>
    node.setAttribute("aria-pressed", String(writing.role === ROLES[n][1])));
  parts.strong.setAttribute("aria-pressed", String(writing.strong));
  parts.undo.disabled = !writing.past.length;
  const both = h.raises !== null && h.raises === h.lowers;
  parts.test.disabled = Boolean(h.tested) || !any || both || !isTestable("test_half", i);
  const looks = mine.looks.get(h.feature) ?? 0;
  write(parts.state, h.tested ? "This hypothesis is tested and stays as it is (the result is " +
    "below). Change anything, and it becomes a new one."
    : both ? "It cannot raise and lower the same score."
    : looks ? `This would be test ${looks + 1} of this feature on the same images. Each further ` +
      "test is weaker evidence."
    : "A second test on the same images is weaker evidence than the first: test what you believe.");
  if (parts.result.dataset.of !== String(h.tested?.sha256)) {
    parts.result.dataset.of = String(h.tested?.sha256);
    parts.result.replaceChildren(...h.tested ? resultView(h) : []);
  }
}
/* ---------- the test ---------- */
function testIt() {
  const h = writing.h;
  edited();
  keep();
  mine.looks.set(h.feature, (mine.looks.get(h.feature) ?? 0) + 1);
  h.tries = mine.looks.get(h.feature);
  h.tested = { sha256: sha256(canonical(h)) };
  save();
  showWriting();
  /* The button in focus is disabled now; the canvas stays in view. */
  writing.parts.result.focus({ preventScroll: true });
}
const ordinal = n => n + (Math.floor(n / 10) % 10 === 1 ? "th"
  : { 1: "st", 2: "nd", 3: "rd" }[n % 10] ?? "th");
function resultView(h) {
  const r = testResults(h), i = position.get(h.feature), again = r.other_half;
  const table = (own, half, id) => measureTable(id, [["yours", own],
    ["the program's", machineResults(i, half)], ["every image picked", everyImage(own)]], id);
  const edit = ([verb, e]) => el("li", {}, `${EDITS[verb]} turns it ` +
    `${verb === "painting" ? "active" : "inactive"} on ${e.named} of ${e.n} images, the same ` +
    `edit elsewhere on ${e.elsewhere} `, marked(e.result));
  const lines = Object.entries(r.edits).map(edit);
  if (!testing.edits.can) lines.push(el("li", {}, "This page cannot test edits and " +
    "scores, and confidence rests on edits: Python tests an exported file in full."));
  if (r.classes)
    lines.push(el("li", {}, classWords(h.classes, r.classes), marked(r.classes.result)));
  for (const [verb, c] of Object.entries(r.effects)) lines.push(el("li", {}, "Effect: ",
    scoreWords(verb, c), "; whether random directions do as much, only Python tests"));
  if (Object.keys(r.effects).length) lines.push(el("li", { class: "soft" }, NOT_WHY));
  const look = h.tries > 1 ? "Each further test is weaker evidence. " : "";
  return [el("h3", {}, "Result: confidence ", el("b", {}, r.confidence ?? "not known"),
    h.confidence ? ` (you expected ${h.confidence})` : ""),
  note(`On ${number(r.n_images)} test images, of which ${number(r.active)} activate the feature; ` +
    "the numbers while you paint are on other images. " +
    `${ordinal(h.tries)} test of this feature on them. ${look}`),
  el("p", {}, pickedWords(r)), table(r, "test_half", "results"),
  el("ul", { class: "plain small" }, lines),
  again && el("details", {}, el("summary", {}, "On the other half of the test images"),
    table(again, "replication_half", "other half")),
  el("details", {}, el("summary", {}, "About this test"), note(
    r.classes || Object.keys(r.effects).length ? "Brackets: 95% intervals. " : "",
    "Python tests all images of the half and edits others, so a result near its bar may differ " +
    "there. The hypothesis is frozen as SHA-256 ",
    el("code", { id: "sha256" }, h.tested.sha256), ".")),
  el("p", {}, link(to("yours"), "All your hypotheses"))].filter(Boolean);
}

/* ---------- the view ---------- */
function paintTools(i) {
  const { parts } = writing, press = change => () => { change(); showWriting(); };
  parts.roles = ROLES.map(([words, role]) => button(words, press(() => { writing.role = role; }),
    { class: { 1: "wanted", "-1": "unwanted" }[role] }));
  parts.strong = button("strong", press(() => { writing.strong = !writing.strong; }),
    { title: "counts twice" });
  parts.undo = button("undo", undoPaint, { id: "undoPaint" });
  const resize = e => { writing.size = Number(e.target.value); };
  const size = el("select", { id: "size", onchange: resize },
    [1, 2, 3, 4, 6].map(n => el("option", { value: n, selected: n === writing.size }, n)));
  const whole = weights => () => { rememberDrawing(); setDrawing(weights); };
  return [el("div", { class: "controls wrap", role: "group", "aria-label": "Brush" }, parts.roles,
    parts.strong, el("label", { class: "small" }, "size ", size)),
  el("div", { class: "controls wrap" }, parts.undo,
    button("clear", whole(new Int8Array(CP)), { id: "clearPaint" }),
    isDrawn(i) && button("start from the program's", whole(drawingOf(i)), { id: "fromMachine" }))];
}
function writeForm(h) {
  const pick = (id, title, options, value, set) => el("label", {}, `${title} `, el("select",
    { id, onchange: e => set(e.target.value) }, options.map(([v, text]) =>
      el("option", { value: v, selected: String(v) === String(value ?? "") }, text))));
  const scores = [["", "no class"], ...classes.map(c => [c, names[c]])];
  const score = verb => pick(verb, `It ${verb} the score for`, scores, h[verb], v =>
    setField(verb, v === "" ? null : Number(v)));
  const tick = c => el("label", {}, el("input", { type: "checkbox", name: "class", value: c,
    checked: h.classes.includes(c), title: fullNames.get(names[c]),
    onchange: e => setField("classes",
      e.target.checked ? [...writing.h.classes, c].sort((a, b) => a - b)
        : writing.h.classes.filter(d => d !== c)) }), names[c]);
  const isGiven = h.caption || h.classes.length || h.raises !== null || h.lowers !== null ||
    h.confidence;
  return el("details", { open: Boolean(isGiven) || innerWidth > 980 }, el("summary", {},
    "In words, classes, confidence"),
  el("form", { id: "hypothesis", onsubmit: e => e.preventDefault() },
    el("label", { class: "block" }, "In words ", el("input", { id: "caption", type: "text",
      maxlength: LONGEST_CAPTION, value: h.caption, placeholder: "vertical line",
      onchange: e => setField("caption", e.target.value) })),
    el("fieldset", {}, el("legend", {}, "Mostly on images of"),
      el("div", { class: "controls wrap" }, classes.map(tick))),
    el("div", { class: "controls wrap" }, score("raises"), score("lowers"),
      pick("sure", "How sure are you?", [["", "no opinion"], ...CONFIDENCES.map(c => [c, c])],
        h.confidence, v => setField("confidence", v)))));
}
function writeView() {
  const found = featureOfAddress();
  if (!found) return;
  const [k, i] = found;
  const f = features[i], n = fromAddress("entry", mine.list.length, null);
  const drafts = mine.list.filter(h => h.feature === k && !h.tested);
  const h = (mine.list[n]?.feature === k && mine.list[n]) || drafts.at(-1) || blankHypothesis(k);
  const sheet = el("canvas", { id: "paint", width: CW * WIDE, height: CH * WIDE, tabindex: 0,
    role: "application", onkeydown: brushKeys,
    onblur: () => { writing.keyed = false; paintSheet(); },
    "aria-label": "Your drawing. Arrow keys move, space paints; " +
      `r: ${INK} wanted, b: blank wanted, e: eraser, s: strong, Ctrl+Z: undo.` });
  const parts = { context: sheet.getContext("2d"), machine: machineResults(i, "val"),
    under: drawn(new Int8Array(CP), onMean(i), 0), words: el("p", { id: "picked" }),
    numbers: el("div"), examples: el("div"), state: note(""), kept: note(keptWords()),
    result: el("section", { id: "result", tabindex: -1, "aria-label": "Result" }),
    test: button("Test it", testIt, { id: "test", class: "main" }) };
  writing.parts = parts;
  parts.context.imageSmoothingEnabled = false;
  const tools = paintTools(i);
  brush(sheet);
  openEntry(i, h);
  const { of_split: total, min_active: least } = testing, half = "test_half";
  const used = has(half) ? `The test uses ${number(nOf(half))} of the ${number(total[half])} ` +
    "images of the test half (test images with even numbers), evenly spaced; the other half is " +
    "shown beside it." : "This page was written without test images.";
  const rare = has(half) && !isTestable(half, i) ? ` ${activeIn(half, i).length} of them ` +
    `activate this feature; a test needs ${least} that do, and ${least} that do not.` : "";
  showMain(el("h2", {}, `Your hypothesis about feature ${k}`),
    el("p", {}, "What must an image look like to activate this feature? Paint where it wants " +
      `${INK}, and where it wants none. Then test it. `,
    link(toFeature(k), "Back to the feature")),
    el("div", { id: "writing" },
      el("div", {}, sheet, parts.words, tools),
      el("div", {}, writeForm(h), el("div", { class: "controls wrap" }, parts.test, parts.state),
        parts.result, note(used, rare), parts.kept),
      el("div", {}, parts.numbers, note("While you paint: on " +
        `${number(nOf("val"))} of ${number(total.val)} validation images, evenly spaced; a test ` +
        "is on others. Images whose ", term("match"), " reaches the best threshold are picked."),
      parts.examples, note("Gray: the mean of the images that activate it. Strong cells count " +
        "twice. By keyboard: arrows move, space paints, r, b and e choose the brush, s is " +
        "strong."))),
    thumbnails(STRONGEST_TITLE, f.top),
    el("div", { class: "halves" }, supports(f), labelColumns(f)));
  showWriting();
}
