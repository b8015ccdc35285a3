/* The reader's hypotheses beside the program's, and how their confidence came out. */
function calibration() { /* counts by confidence given, and found */
  const counts = new Map(CONFIDENCES.map(c => [c, new Map(CONFIDENCES.map(d => [d, 0]))]));
  for (const h of mine.list) if (h.tested && h.confidence) {
    const row = counts.get(h.confidence), found = testResults(h).confidence;
    if (found) row.set(found, row.get(found) + 1);
  }
  return counts;
}
function calibrationTable() {
  const counts = calibration(), line = (cells, tag) =>
    el("tr", {}, cells.map(cell => el(tag, {}, String(cell))));
  return [el("h3", {}, "Your confidence, expected and found"),
    el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "calibration" },
      el("table", { id: "calibration", class: "numbers" },
        line(["you expected", ...CONFIDENCES.map(c => `found ${c}`)], "th"),
        CONFIDENCES.map(c => line([c, ...counts.get(c).values()], "td")))),
    note(testing.confidence_rule)];
}
function entryRow(h, n) {
  const i = position.get(h.feature), f = features[i], weights = weightsOf(h.drawing);
  const r = h.tested && testResults(h);
  const machine = r && machineResults(i, "test_half"), f1 = m => m ? m.f1.toFixed(2) : "none";
  const figure = (words, node) =>
    el("figure", {}, node, el("figcaption", { class: "small soft" }, words));
  const words = r ? [el("p", {}, "F1 ", el("b", {}, f1(r)), `, the program's ${f1(machine)}, ` +
    `picking every image ${r.chance_f1.toFixed(2)}. ` + (h.confidence
    ? `You expected confidence ${h.confidence}; ` : "You gave no confidence; ") +
    "the test gave ", el("b", {}, r.confidence ?? "none"), ". ",
  el("span", { class: "soft" }, `${ordinal(h.tries)} test of this feature on these images.`))]
    : [el("p", { class: "soft" }, "Not tested yet.")];
  const remove = button("delete", () => {
    mine.list.splice(n, 1);
    save();
    yoursView();
  }, { "aria-label": `delete hypothesis ${n + 1}` });
  return el("li", { class: "entry" },
    figure("yours", drawn(weights, onMean(i), 96,
    `your drawing: ${cellsInWords(weights)}`)),
    figure("the program's", sketch(i, 96)),
    el("div", {}, el("p", {}, link(toFeature(f.feature), `Feature ${f.feature}`), ": ",
      el("b", {}, h.caption || "you gave no words"), el("br"), el("span", { class: "soft" },
        `the program: ${f.caption ?? "none"}`)), words,
    el("div", { class: "controls" }, link(to("write", { feature: f.feature, entry: n }), "open"),
      remove)));
}
async function importFile(file, message) {
  try {
    if (file.size > 5e6) throw new Error("it must be smaller than 5 MB");
    const found = readFile(await file.text()), n = add(found);
    save();
    yoursView();
    byId("imported").textContent = `${file.name}: ${number(n)} new, ` +
      `${number(found.length - n)} known already.`;
  } catch (error) {
    message.textContent = `${file.name} cannot be read: ${error.message}.`;
  }
}
function yoursView() {
  const [most] = largest(1, i => features[i].influence), n = mine.list.length;
  const message = el("p", { id: "imported", role: "alert" });
  const input = el("input", { type: "file", id: "import", accept: ".json,application/json",
    onchange: e => { if (e.target.files[0]) importFile(e.target.files[0], message); } });
  const first = features[most ?? 0].feature, start = el("p", {}, "You have none yet. ",
    link(to("write", { feature: first }), "Write one about the most influential feature"), ".");
  showMain(el("h2", {}, "Your hypotheses"),
    n ? el("ul", { class: "plain", id: "entries" }, mine.list.map(entryRow)) : start,
    ...n ? calibrationTable() : [],
    el("div", { class: "controls wrap" }, n ? button(`export ${FILE}`, exportFile, { id: "export" })
      : "", el("label", { class: "small" }, `import ${FILE} `, input)), message,
    note(keptWords(), " Python tests an exported file on all images of the test half."));
}
