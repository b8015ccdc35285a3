/* The first view: what this is, doors into it, a guided tour, and what matters most. */
/* ---------- the tour ---------- */
const TOUR = meta.tests?.tour, TOUR_TITLES = ["An image", "Its active features",
  TOUR?.off.length === 1 ? "Switch it off" : "Switch them off", "The result"];
const inTour = () => TOUR && address().has("step") && address().get("step") !== "end";
const isShort = () => TOUR.off.length < 3; /* then a phone has room for more words */
const isPlaced = () => hasPlaces() && WHERE.tests.includes(TOUR.image);
/* The image of the tour, where it can be with the place where feature i is active. */
function tourImage(size, i) {
  const label = an(names[meta.tests.labels[TOUR.image]]);
  return i === undefined || !isPlaced() ? testDigit(TOUR.image, size, label)
    : overlaid("tests", TOUR.image, mapOnImage(i, TOUR.image), label, size, null);
}
/* Feature off[n] on the image: only where what is known of it agrees with what is seen there. */
function tourFace(n, size) {
  const i = position.get(TOUR.off[n]);
  if (i === undefined) return el("span");
  if (isDrawn(i) && TOUR.agrees[n]) return sketch(i, size, onTest(TOUR.image));
  return isPlaced() && hasPlace(features[i]) ? tourImage(size, i) : face(i, size);
}
function tourWords(n) {
  const k = TOUR.off[n], f = features[position.get(k)];
  if (!f || !TOUR.agrees[n]) return [featureLink(k, `Feature ${k}`)];
  return [featureLink(k, `Feature ${k}`), ": ", inkCaption(f), ". ", isShort() &&
    el("span", { class: "soft" }, `Confidence ${f.confidence} after tests on other images.`)];
}
const moved = change => `${change < 0 ? "falls" : "rises"} by ${Math.abs(change).toFixed(2)}`;
/* The name of class c where there is little room: both ends of a long one. */
function brief(c) {
  const letters = [...meta.classes[c]];
  return letters.length < 17 ? names[c]
    : isolated(`${letters.slice(0, 7).join("")}…${letters.slice(-7).join("")}`);
}
/* A switch for each feature of the tour, and the prediction that follows them. */
function tourSwitches(removed) {
  const { image, goal, off, logits } = TOUR, label = meta.tests.labels[image];
  const out = el("div", { id: "tourOutcome", class: "chart", "aria-live": "polite" });
  const show = () => {
    const now = logits[off.reduce((sum, k, bit) => sum + (removed.has(k) ? 1 << bit : 0), 0)];
    const p = softmax(now), prediction = argmax(p), by = c => now[c] - logits[0][c];
    out.replaceChildren(el("p", {}, "Prediction: ",
      el("b", { class: "big", id: "tourPrediction" }, brief(prediction)),
      ` (${probability(p[prediction])}). `, removed.size ? `The score for ${brief(label)} ` +
      `${moved(by(label))}, that for ${brief(goal)} ${moved(by(goal))}.` : ""),
    logitBars("", now, { before: logits[0], id: "tourLogits",
      note: "Bars: scores. Thin lines: before." }));
  };
  const words = k => `switch ${k} ${removed.has(k) ? "on" : "off"}`;
  const flip = k => button(words(k), e => {
    removed.has(k) ? removed.delete(k) : removed.add(k);
    byId("tourNext")?.classList.add("main"); /* until then the switch is the main button */
    e.target.classList.remove("main");
    e.target.textContent = words(k);
    e.target.setAttribute("aria-pressed", removed.has(k));
    show();
  }, { id: `tour${k}`, "aria-pressed": String(removed.has(k)), class: !removed.size && "main" });
  show();
  return el("div", { class: "row" }, el("ul", { class: "units" }, off.map((k, n) =>
    el("li", { class: "unit" }, tourFace(n, 64), el("span", {}, tourWords(n)), flip(k)))), out);
}
function firstStep() {
  const label = meta.tests.labels[TOUR.image];
  return [el("p", {}, `The network was not trained on this ${names[label]}. It computes a ` +
    "number for each class, its ", el("b", {}, "score"), ", and predicts the class with the " +
    `largest: ${names[label]}.`),
  el("div", { class: "row" }, tourImage(140),
    logitBars("Scores (in brackets: probabilities)", TOUR.logits[0]))];
}
function secondStep() {
  const { image, goal, off } = TOUR, label = meta.tests.labels[image];
  const active = activeOn(image).map(u => ({ ...u, value: u.adds[label] - u.adds[goal] }))
    .sort((a, b) => b.value - a.value);
  const top = active.filter((u, rank) => off.includes(u.k) || isShort() && rank < 3);
  const row = u => {
    const n = off.indexOf(u.k), i = position.get(u.k);
    if (n < 0 || i === undefined) return featureRow(u.k, u.value, { note: i === undefined
      ? "" : `active on ${percent(frequency(i, label), 0)} of all ${plurals[label]}` });
    return el("li", { class: "unit" }, tourFace(n, 64), el("div", {}, tourWords(n)),
      el("b", { class: u.value < 0 ? "minus" : "plus" }, signed(u.value)));
  };
  return [el("p", {}, `${active.length} of ${meta.d_sae} features are active on it. These ` +
    `support ${names[label]} against ${names[goal]} most; the number is how far the lead of ` +
    `${names[label]} shrinks without the feature:`),
  el("div", { class: "row" }, tourImage(112), el("ul", { class: "units" }, top.map(row))),
  LOOK.in_place && note(PLACES, "."),
  isPlaced() && heatMaps.on && note("Bright: where in the image the feature is active.")];
}
const tourThese = () => TOUR.off.length === 1 ? "this feature"
  : `these ${TOUR.off.length} features`;
const thirdStep = () => [el("p", {}, `Switch ${tourThese()} off: what ` +
  `${TOUR.off.length === 1 ? "it adds" : "they add"} is taken out of the network's computation. ` +
  "The image stays as it is."), tourSwitches(new Set())];
function fourthStep() {
  const { image, goal, off } = TOUR, label = meta.tests.labels[image];
  const drawn = off.map((k, n) => [position.get(k), n])
    .filter(([i, n]) => i !== undefined && isDrawn(i) && TOUR.agrees[n]).map(([i]) => i);
  const figure = (i, base, words) => el("figure", {}, sketch(i, 84, base),
    el("figcaption", { class: "small" }, words));
  const pictures = drawn.length > 1 ? [] : drawn.map(i => [ /* more would not fit a screen */
    figure(i, onTest(image), `on this ${brief(label)}`),
    figure(i, onClass(label), `on the mean ${brief(label)}`),
    figure(i, onClass(goal), `on the mean ${brief(goal)}`)]);
  return [el("p", { class: "big" }, `Without ${tourThese()} the network reads this ` +
    `${brief(label)} as ${an(brief(goal))}.`),
  pictures.length ? el("div", { class: "row", id: "tourPictures" }, pictures) : "",
  tourSwitches(new Set(off)),
  el("nav", { "aria-label": "Go on", id: "tourOn" },
    meta.network && drawLink(image, off, "Change this image yourself"),
    isPlaced() && link(to("images", { image }), "Where in this image?"),
    link(to("pair", { a: label, b: goal }), `${brief(label)} or ${brief(goal)}?`),
    meta.tests.errors ? link(to("errors"), "The errors") : "")];
}
function tourView() {
  const steps = [firstStep, secondStep, thirdStep, fourthStep], last = steps.length - 1;
  const n = fromAddress("step", steps.length, 0);
  showMain(el("section", { class: "card", id: "tour", "aria-label": "Guided tour" },
    el("h2", {}, `${TOUR_TITLES[n]} `, el("span", { class: "soft small" },
      `tour, ${n + 1} of ${steps.length}`)),
    steps[n](),
    el("nav", { "aria-label": "Tour", id: "tourSteps" },
      n > 0 && link(to("story", { step: n - 1 }), "← back"),
      n < last && el("a", { id: "tourNext", class: n !== 2 && "main",
        href: to("story", { step: n + 1 }) },
        `${TOUR_TITLES[n + 1]} →`),
      n === last && link(to("story", { step: 0 }), "again"),
      link(to("story"), n === last ? "close" : "leave"))));
}
/* ---------- doors ---------- */
function doors() {
  const [a, b] = meta.tests?.pair ?? [0, Math.min(1, C - 1)], t = meta.tests;
  const door = (href, title, words, more = {}) => el("a", { href, ...more }, el("b", {}, title),
    el("span", {}, words));
  const photo = TOUR && WHERE?.tests.includes(TOUR.image) ? { image: TOUR.image } : {};
  const third = meta.network ? door(to("draw"), "Draw your own",
    "Watch the features while you draw, and switch them off")
    : WHERE && t ? door(to("images", photo), "Where in an image?", hasPlaces()
      ? "Point at a part of an image: the features active there"
      : "Which parts of an image a feature needs")
      : door(to("features"), "What does it look for?", "All its features, as pictures");
  return el("nav", { id: "doors", "aria-label": "Start here" },
    door(to("pair", { a, b }), `How does it tell ${an(names[a])} from ${an(names[b])}?`,
      "The features that separate the two"),
    t && door(to("errors"), "Where is it wrong?", t.errors ? `${plural(t.errors, "error")} on ` +
      `${plural(t.n, "test image")}, and why` : `No error on ${plural(t.n, "test image")}`),
    third,
    TOUR && door(to("story", { step: 0 }), "Take the tour", "One image, " +
      `${TOUR.off.length === 1 ? "one feature" : plural(TOUR.off.length, "feature")}, and what ` +
      `changes without ${TOUR.off.length === 1 ? "it" : "them"}: a minute`,
    { id: "tourStart", class: "main" }));
}
/* ---------- two classes ---------- */
const isCompared = (a, b) => !TABLES || pairRow(a, b) !== null;
/* Features that contribute most to a - b on images of a, and more than on images of b. */
function separating(a, b, n) {
  if (TABLES) return isCompared(a, b)
    ? [...tableRow("pair_of_feature", pairRow(a, b))[0]].filter(i => i >= 0).slice(0, n) : [];
  return largest(n, i => {
    const own = addsToDifference(a, i, a, b);
    return own > addsToDifference(b, i, a, b) ? own : 0;
  });
}
const separatingRow = (i, c, d, more = "") =>
  featureRow(features[i].feature, addsToDifference(c, i, c, d), {
    picture: onMeanOf(c, i, 96),
    note: `active on ${percent(frequency(i, c), 0)} of ${plurals[c]} and ` +
      `${percent(frequency(i, d), 0)} of ${plurals[d]}${more}` });
function pairSummary() {
  const [a, b] = meta.tests?.pair ?? [0, Math.min(1, C - 1)];
  const side = (c, d) => el("div", {},
    el("h3", {}, `Features that support ${names[c]} against ${names[d]}`),
    el("ul", { class: "units large" }, separating(c, d, 3).map(i => separatingRow(i, c, d))));
  const most = meta.tests?.errors
    ? `The network confuses ${names[a]} and ${names[b]} most often. ` : "";
  return [el("h2", {}, `What separates ${names[a]} from ${names[b]}`),
    el("p", {}, most, "Each number says how far the class is ahead of the other thanks to the " +
      "feature: the mean over its validation images. ",
    link(to("pair", { a, b }), "All features that separate them")),
    el("div", { class: "halves" }, side(a, b), side(b, a)),
    LOOK.in_place && note(PLACES, "; here on the mean image of the class. ", WORDS)];
}
/* Advice that begins with one of these changes a setting, so that another run is needed. */
const CHANGES_SETTING = /^(lower|raise|set|compare|train) /;
function diagnoses() {
  if (!meta.diagnoses.length) return "";
  const measured = d => d.value === null ? "not computed" : number(d.value);
  const again = d => CHANGES_SETTING.test(d.advice) ? ", then run again" : "";
  const row = d => el("li", {}, el("b", {}, d.fine ? "✓ fine" : "! attention"),
    ` ${d.complaint}: ${measured(d)} (${d.what}; limit ${d.limit}).`,
    d.fine ? "" : ` What to do: ${d.advice}${again(d)}.`);
  return [el("h2", {}, "Quality of the SAE"),
    note("Common problems of sparse autoencoders, each measured on this one."),
    el("ul", { class: "plain" }, meta.diagnoses.map(row))];
}
function frontier() {
  if (meta.frontier.length < 2) return "";
  const line = (cells, tag) => el("tr", {}, cells.map(text => el(tag, {}, text)));
  const cells = r => [r.l0.toFixed(2), r.fvu.toFixed(4), percent(r.agreement, 2)];
  const header = ["active features per image (L0)", "fraction of variance unexplained (FVU)",
    "predictions kept"];
  return [el("h2", {}, "Sparsity against fidelity"),
    el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "fidelity" },
      el("table", {}, line(header, "th"), meta.frontier.map(r => line(cells(r), "td"))))];
}
function storyView() {
  if (inTour()) return tourView();
  const t = meta.tests, order = largest(12, i => features[i].influence);
  const accuracy = t ? `The network is right on ${percent(1 - t.errors / t.n, 1)} of ` +
    `${plural(t.n, "test image")}. ` : "";
  showMain(el("h2", { class: "unseen" }, "Overview"),
    el("p", { id: "lead" }, `A neural network gives each of ${C} classes a score (its logit), ` +
      "and predicts the class with the largest. A second network, a ",
      el("b", {}, "sparse autoencoder"),
      ` (SAE), splits what the first one computes into ${number(meta.d_sae)} `,
      el("b", {}, "features"), ": see what each one looks for, and what it changes."),
    doors(),
    meta.features_known && el("p", { id: "fewer" }, "So that the page stays small, it has the " +
      `${F} features of most influence of ${meta.features_known}; feature_report.json has all.`),
    el("h2", {}, "The most influential features"),
    el("p", {}, accuracy, "A feature's influence is its share of all changes of the scores that " +
      `removing single features causes. ${plural(featuresForShare(.5), "feature")} of ${F} ` +
      `account for 50% of the influence${meta.features_known ? " of those on this page" : ""}, ` +
      `${featuresForShare(.9)} for 90%. The most influential are:`),
    mapSwitch(), el("div", { class: "tiles" }, order.map(card)),
    note(FACE, " Supports and opposes: how far the feature raises or lowers a score, the mean " +
      "over the images on which it is active."),
    LOOK.can_write && el("p", {}, "Do you see what a feature means? Open it, and write and test " +
      "a hypothesis of your own. ", link(to("yours"), "Your hypotheses")),
    ...pairSummary(),
    el("h2", {}, "Results"),
    el("div", { class: "cards" }, meta.results.map(([what, value]) =>
      el("div", { class: "card" }, el("b", {}, value), what))),
    ...[diagnoses(), frontier()].flat());
}
