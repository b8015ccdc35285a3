/* The misclassified test images, and the features whose removal fixes them. */
const removalCounts = f => `Removing it from every test image fixes ` +
  `${plural(f.fixes, "mistake")} and causes ${number(f.breaks)}.`;
/* What the features of a flip set contribute on other images, and do when removed from all. */
function elsewhere(off, label, prediction) {
  const line = (cells, tag) => el("tr", {}, cells.map(cell => el(tag, {}, cell)));
  const isCounted = features[0]?.fixes !== undefined; /* whether removed from every image */
  const cells = i => [link(toFeature(features[i].feature), `${features[i].feature}`),
    ...[prediction, label].map(of => signed(addsToDifference(of, i, prediction, label) ?? NaN)),
    ...isCounted ? [`${features[i].fixes}`, `${features[i].breaks}`] : []];
  const listed = off.filter(k => position.has(k)).map(k => position.get(k));
  return [el("h3", {}, "The same features on other images"),
    el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "other images" },
      el("table", {}, line(["feature", `mean on ${plurals[prediction]}`,
        `mean on ${plurals[label]}`, ...isCounted ? ["fixes", "causes"] : []], "th"),
      listed.map(i => line(cells(i), "td")))),
    note(`Mean: contribution to the score for ${names[prediction]} minus that for ` +
      `${names[label]} on the validation images of a class.` + (isCounted ? " Fixes, causes: " +
      "mistakes fixed and caused when this feature alone is removed from every test image." : ""))];
}
function flipSet(t, label, prediction) {
  const off = meta.tests.fixing[t];
  if (!off.length)
    return el("p", { id: "flipSet" }, "No features were found whose removal fixes it.");
  const p = softmax(fixedLogits(t));
  const ids = off.map((k, n) => [n ? ", " : "", featureLink(k, String(k))]);
  return [el("p", { id: "flipSet", "data-off": off.join(" ") },
    `What would fix it: without ${off.length === 1 ? "feature" : "features"} `, ids,
    ` it is classified as `, el("b", {}, names[label]), ` (${probability(p[label])}). `,
    drawLink(t, off, "Try it in the drawing view")),
  note("The smallest ", term("flip set"), " found: the feature whose removal helps most goes " +
    "first; features that prove needless are put back. A smaller set may exist."),
  ...elsewhere(off, label, prediction)];
}
function oneError(t) {
  const label = meta.tests.labels[t], prediction = predicted(t), p = softmax(testLogits(t));
  const rows = activeOn(t).map(u => ({ ...u, value: u.adds[prediction] - u.adds[label] }))
    .sort((a, b) => b.value - a.value);
  const wrong = rows.filter(u => u.value > 0), right = rows.filter(u => u.value < 0).reverse();
  const row = u => featureRow(u.k, u.value);
  return el("div", { id: "error" },
    el("h3", {}, `Test image ${meta.tests.number[t]}: ${an(names[label])}, classified as ` +
      `${names[prediction]} (${probability(p[prediction])})`),
    el("div", { class: "row" }, testDigit(t, 140), logitBars("", testLogits(t))),
    flipSet(t, label, prediction),
    featureRows(`Evidence for ${names[prediction]}, the wrong class`,
      wrong.slice(0, 6).map(row)),
    featureRows(`Evidence for ${names[label]}, outvoted`, right.slice(0, 4).map(row)),
    note(`Numbers: contributions to the score for ${names[prediction]} minus that for ` +
      `${names[label]}.`),
    note(CONTRIBUTION, " ", NOT_ADDITIVE));
}
function errorsView() {
  if (!meta.tests) return showMain(el("h2", {}, "Errors"), noTests());
  const { shown_errors: n, errors, labels } = meta.tests;
  const t = fromAddress("image", n, n ? 0 : null), label = fromAddress("label", C, null);
  const listed = [...Array(n).keys()].filter(e => label === null || labels[e] === label);
  const chosen = listed.includes(t) ? t : listed[0], keep = label === null ? {} : { label };
  const which = n < errors ? `Shown are the ${n} of the largest difference. ` : "";
  const wrong = MANY ? new Set(labels.slice(0, n)) : null; /* classes of which errors are shown */
  const filter = chooser("Errors on", [["all", to("errors"), null],
    ...classes.filter(c => wrong?.has(c) ?? true).map(c =>
      [plurals[c], to("errors", { label: c }), c])], label);
  showMain(el("h2", {}, "Errors"),
    el("p", {}, `${errors.toLocaleString("en")} of ${plural(meta.tests.n, "test image")} ` +
      `${errors === 1 ? "is" : "are"} misclassified. ${which}They are sorted by how far the ` +
      "score for the predicted class exceeds that for the true class."),
    filter, el("div", { class: "aside wide" },
      el("div", {}, strip("Errors", listed, image => to("errors", { image, ...keep }), chosen,
        e => `${names[labels[e]]} → ${names[predicted(e)]}`),
      note("Under each image: true class → predicted class.")),
      chosen === undefined ? note("No errors on this class.") : oneError(chosen)));
}
