/* The overview: a guided tour, what separates two classes, the most influential features. */
function tourSteps() {
  const { image, goal, off, logits } = meta.tests.tour, label = meta.tests.labels[image];
  const before = logits[0], after = argmax(logits[logits.length - 1]);
  const difference = `the logit difference ${names[label]} − ${names[goal]}`;
  const removed = new Set();
  const active = activeOn(image).map(u => ({ ...u, value: u.adds[label] - u.adds[goal] }))
    .sort((a, b) => b.value - a.value);
  const top = active.filter((u, rank) => off.includes(u.k) || rank < 5);
  const row = u => featureRow(u.k, u.value);
  const shownImage = () => testDigit(image, 168);
  const caption = k => position.has(k) ? `: ${inkCaption(features[position.get(k)])}` : "";
  const these = off.length === 1 ? "this feature" : `these ${off.length} features`;

  const first = () => [el("p", {}, `This ${names[label]} is a test image: the network was not ` +
    `trained on it. The network computes a logit for each class and predicts the class with the ` +
    `largest one.`),
  el("div", { class: "row" }, shownImage(), logitBars("Logits (in brackets: probabilities)",
    before))];
  const second = () => [el("p", {}, `On this image ${active.length} of ${meta.d_sae} features ` +
    `are active. These contribute most to ${difference}:`),
  el("div", { class: "row" }, shownImage(), el("ul", { class: "units" }, top.map(row))),
  note(FACE)];
  function third() {
    const out = el("div", { "aria-live": "polite" });
    const show = () => {
      const now = logits[off.reduce((sum, k, bit) => sum + (removed.has(k) ? 1 << bit : 0), 0)];
      const p = softmax(now), prediction = argmax(p);
      out.replaceChildren(el("p", {}, "Prediction: ", 
        el("b", { class: "big", id: "tourPrediction" }, names[prediction]),
        ` (${probability(p[prediction])})`), logitBars("", now, { before, id: "tourLogits",
        note: "The thin lines mark the logits before." }));
    };
    show();
    const switches = off.map(k => el("li", { class: "unit" },
      position.has(k) ? face(position.get(k), 64) : el("span"),
      el("span", {}, `Feature ${k}${caption(k)}`),
      button(`switch ${k} off`, e => {
        removed.has(k) ? removed.delete(k) : removed.add(k);
        e.target.textContent = `switch ${k} ${removed.has(k) ? "on" : "off"}`;
        e.target.setAttribute("aria-pressed", removed.has(k));
        show();
      }, { id: `tour${k}`, "aria-pressed": "false" })));
    return [el("p", {}, `Switch ${these} off: its contribution is subtracted from the network's ` +
      "activations. The image stays unchanged."),
      el("div", { class: "row" }, shownImage(), el("ul", { class: "units" }, switches), out)];
  }
  function fourth() {
    const shown = off.filter(k => position.has(k)).map(k => position.get(k));
    const outlined = shown.filter(isDrawn);
    const figure = (i, base, words) => el("figure", {}, sketch(i, 168, base),
      el("figcaption", { class: "small" }, `feature ${features[i].feature} on ${words}`));
    const pictures = outlined.map(i => [figure(i, onTest(image), `this ${names[label]}`),
      figure(i, onClass(label), `the mean ${names[label]}`),
      figure(i, onClass(goal), `the mean ${names[goal]}`)]);
    const list = off.map(k => el("li", {}, featureLink(k, `Feature ${k}`), caption(k)));
    return [el("p", { class: "big" }, `Without ${these} the network classifies this ` +
      `${names[label]} as ${names[after]}.`),
    el("p", {}, `On this image, what separates ${names[label]} from ${names[goal]} is:`),
    el("ul", { class: "plain" }, list), el("div", { class: "row" }, pictures),
    !outlined.length && el("div", { class: "row" }, shown.map(i => face(i, 112))),
    outlined.length || WORDS ? note(outlined.length ? `${PLACES}. ` : "", WORDS) : "",
    el("p", {}, "Below: the features that separate the two classes on all their images. ",
      drawLink(image, off, "See this image in the drawing view, and draw your own"))];
  }
  return [first, second, third, fourth];
}
function tour() {
  if (!meta.tests?.tour) return "";
  const steps = tourSteps(), n = fromAddress("step", steps.length, 0), last = steps.length - 1;
  if (address().get("step") === "end")
    return el("p", {}, el("a", { href: to("story"), id: "tourAgain" }, "Take the guided tour"));
  const titles = ["An image", "Its active features", "Switch features off", "The result"];
  return el("section", { class: "card", id: "tour", "aria-label": "Guided tour" },
    el("p", { class: "soft" }, `Guided tour, ${n + 1} of ${steps.length}: ${titles[n]}`),
    steps[n](),
    el("nav", { "aria-label": "Tour" },
      n > 0 && link(to("story", { step: n - 1 }), "← back"),
      n < last && el("a", { id: "tourNext", class: "main", href: to("story", { step: n + 1 }) },
        `${titles[n + 1]} →`),
      link(to("story", { step: "end" }), n === last ? "close" : "skip the tour")));
}
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
    ? `${names[a]} and ${names[b]} are the two classes most often confused. ` : "";
  return [el("h2", {}, `What separates ${names[a]} from ${names[b]}`),
    el("p", {}, most, "Each number is a feature's contribution to the logit difference of the " +
      "two classes, the mean over the validation images of the supported class. ",
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
  const t = meta.tests, order = largest(12, i => features[i].influence);
  const accuracy = t ? `Its accuracy on ${t.n.toLocaleString("en")} test images is ` +
    `${percent(1 - t.errors / t.n, 1)}. ` : "";
  showMain(el("h2", {}, "Overview"),
    el("p", {}, `The network classifies images into ${C} classes. ${accuracy}A `,
      el("b", {}, "sparse autoencoder"), " (SAE) reconstructs the activations of one of its " +
      "layers from ", el("b", {}, `${meta.d_sae} features`), ". On any one image only some of " +
      "them are active; each active feature changes the logits of the classes. This page shows " +
      (LOOK.in_place && !LOOK.color ? "which images, pixels and classes belong to each feature, " +
      "and what an image must look like for it to be active. "
        : "which images activate each feature, where in them, and what it does to the logits. "),
    LOOK.can_write && link(to("yours"), "Write and test a hypothesis of your own")),
    meta.features_known && el("p", { id: "fewer" }, "So that the page stays small, it has the " +
      `${F} features of most influence of ${meta.features_known}; feature_report.json has all.`),
    mapSwitch(), tour(), ...pairSummary(),
    el("h2", {}, "The most influential features"),
    el("p", {}, `A feature's influence is its share of all changes of the logits that removing ` +
      `single features causes. ${plural(featuresForShare(.5), "feature")} of ${F} make up 50% ` +
      `of the influence${meta.features_known ? " of those on this page" : ""}, ` +
      `${featuresForShare(.9)} make up 90%. The most influential are:`),
    el("div", { class: "tiles" }, order.map(card)),
    note(FACE, " Supports and opposes: the feature's mean contribution to a logit over the " +
      "images on which it is active."),
    LOOK.can_write && el("p", {}, "Do you see what a feature means? Open it, and write and test " +
      "a hypothesis of your own. ", link(to("yours"), "Your hypotheses")),
    el("h2", {}, "Results"),
    el("div", { class: "cards" }, meta.results.map(([what, value]) =>
      el("div", { class: "card" }, el("b", {}, value), what))),
    ...[diagnoses(), frontier()].flat());
}
