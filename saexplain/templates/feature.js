/* One feature, and two side by side. */
const STRONGEST_TITLE = "Strongest images (below each: class and activation)";
function thumbnails(title, list) {
  const shown = list.map(([slot, label, activation]) => el("figure", {}, digit("images", slot,
    `${an(name(label))}, activation ${activation.toFixed(2)}`, LOOK.color ? 96 : 56),
  el("figcaption", {}, `${name(label)}: ${activation.toFixed(1)}`)));
  return el("div", {}, el("h3", {}, title),
    list.length ? el("div", { class: "thumbs" }, shown) : note("No image activates it."));
}
function doses(f) {
  if (!f.dose) return "";
  const row = (tag, cells) => el("tr", {}, cells.map(text => el(tag, {}, text)));
  return el("div", {}, el("h3", {}, "What adding more of it does"),
    note("Mean change of a score when the feature is added to test images that activate it, in " +
      "multiples of its typical activation; in brackets what it would be if the network were " +
      "linear."),
  el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "doses" }, el("table", {},
    row("th", ["added", ...f.dose.at.map(dose => `${dose} ×`)]),
    f.dose.curves.map(([c, curve, line]) => row("td", [`score for ${names[c]}`,
      ...curve.map((v, i) => `${signed(v)} (${signed(line[i])})`)])))));
}
const marks = { confirmed: "✓", inconclusive: "?", refuted: "✗" };
const marked = result => el("span", { class: result }, `${marks[result]} ${result}`);
const interval = (low, high, write = v => percent(v, 0)) => `[${write(low)}, ${write(high)}]`;
const OUTCOME = /^(.*): (confirmed|inconclusive|refuted)$/;
function evidenceLine(line) { /* a measurement, with a mark where it was a test */
  const [, words, outcome] = line.match(OUTCOME) ?? [, line];
  const mark = outcome && el("b", { class: outcome }, `${marks[outcome]} ${outcome}: `);
  return el("li", {}, mark, words);
}
const markNotes = { reproducible: "found by a second SAE, trained from another random start",
  "seed-specific": "not found by a second SAE, trained from another random start" };
/* Of a drawing, or of a hypothesis without one, which names classes and has no threshold. */
const pickedWords = ({ precision, recall }, { threshold, strong_from: strong } = {}) =>
  `Of the images ${threshold === null ? "of the classes it names" : "it picks"}, ` +
  `${percent(precision, 0)} activate the feature${strong ? " strongly" : ""} (precision); it ` +
  `finds ${percent(recall, 0)} of those that do (recall).`;
const classWords = (named, { share, low, high, usual }) => `${percent(share, 0)} ` +
  `${interval(low, high)} of the images that activate it are ` +
  `${named.map(c => plurals[c]).join(" or ")}; of all images ${percent(usual, 0)} `;
function scoreWords(verb, c) {
  return `remove it and the score for ${names[c.logit]} ` +
    `${(verb === "raises") === c.by >= 0 ? "falls" : "rises"} by ${number(Math.abs(c.by))} ` +
    (c.by >= 0 ? interval(c.low, c.high, number) : interval(-c.high, -c.low, number));
}
const hasEffects = f => ["raises", "lowers"].some(verb => f.found.results?.[verb]);
function hypothesisCard(f) {
  const own = LOOK.can_write && el("a", { class: "button",
    href: to("write", { feature: f.feature }) }, "Write your own");
  if (!f.caption) return el("div", {}, note("This run has no hypotheses about features."), own);
  const mark = markNotes[f.mark] ?? f.mark, { picked, detection, classes: of, effects } = f.found;
  const results = f.found.results ?? {}, lines = [];
  if (picked) lines.push(el("p", {}, pickedWords(picked, f.hypothesis)),
    el("p", {}, term("F1"), " ", el("b", { id: "f1" }, f.f1.toFixed(2)), " (picking every " +
      `image: ${f.found.chance_f1.toFixed(2)})`, detection ? ["; ", term("average precision"),
      ` ${detection.average_precision.toFixed(2)}; `, term("AUROC"),
      ` ${auroc(detection.auroc)}, 95% interval `,
      interval(detection.auroc_low, detection.auroc_high, auroc)] : "",
    `; on ${plural(f.found.n_images, "test image")}.`));
  /* Without drawings every test has a line of its own, whatever was tested. */
  const edits = Object.keys(EDITS).filter(edit => LOOK.can_write && results[edit]);
  if (edits.length) lines.push(el("p", {}, "Edits: ", edits.map((edit, n) =>
    [n ? "; " : "", `${EDITS[edit]} `, marked(results[edit])]), "."));
  if (of && LOOK.can_write)
    lines.push(el("p", {}, classWords(f.hypothesis.classes, of), marked(results.classes)));
  for (const [verb, c] of Object.entries(LOOK.can_write && effects || {}))
    lines.push(el("p", {}, `Effect: ${scoreWords(verb, c)} `, marked(results[verb])));
  if (LOOK.can_write && hasEffects(f)) lines.push(note(NOT_WHY));
  if (!LOOK.can_write) lines.push(el("ul", { class: "plain" },
    f.lines.filter(line => OUTCOME.test(line)).map(evidenceLine)), hasEffects(f) && note(NOT_WHY));
  const on = "on the other half of the test images", again = f.replicated === null ? ""
    : ["; ", term("replicated", f.replicated ? "replicated" : "not replicated"), ` ${on}`,
      f.replicated || f.confidence === "Low" ? "" : `, where it is weaker: take ` +
      `${f.confidence} with care`];
  const least = testing.min_active ?? "enough";
  const result = resultWord(f) === "not tested" ? el("p", {}, el("b", {}, "Not tested"),
    `: a test needs ${least} test images that activate it, and ${least} that do not`,
    mark ? `; ${mark}` : "", ".")
    : el("p", {}, term("confidence", "Confidence"), " ", el("b", {}, f.confidence ?? "none"),
      again, mark ? `; ${mark}` : "", ".");
  return el("div", { class: "card" },
    el("p", {}, "Hypothesis: ", el("b", {}, `“${f.caption}”`)), result, lines, own);
}
const evidence = f => f.caption && el("details", {},
  el("summary", {}, "How this was tested"),
  el("ul", { class: "small plain" }, f.lines.map(evidenceLine)), hasEffects(f) && note(NOT_WHY));
/* All classes; of many, the largest effects either way. */
const effectClasses = values => !MANY ? shownClasses(values.map(Math.abs))
  : classes.filter(c => values[c]).sort((a, b) => values[b] - values[a]);
const byClass = values => effectClasses(values).map(c =>
  ({ value: values[c], label: names[c], text: signed(values[c]) }));
const sampled = () => WHERE?.kind === "activation"; /* a layer with positions: at most 64 images */
const supports = (f, range = {}) =>
  bars("What it adds to the score for each class", byClass(f.supports), { id: "supports",
    unit: "score", note: "Right: it supports the class, left: it opposes it; the mean over " +
      `${sampled() ? "a sample of " : ""}the validation images on which it is active.`,
    ...range });
const pushes = f => el("details", {}, el("summary", {}, "Effect of adding it to all images"),
  bars("", byClass(f.pushes), { id: "pushes", unit: "score", note: "The mean change of each " +
    "score when the feature is added with activation 1 to " +
    `${sampled() ? "all positions of some" : "all"} validation images, whether or not it is ` +
    "active on them." }));
function labelColumns(f) {
  const title = "Images on which it is active, by class";
  if (C <= 12 && names.every(text => text.length <= 2))
    return columns(title, f.labels, names, { x: "class", y: "validation images" });
  const most = MANY ? largest(10, c => f.labels[c], C) : classes;
  return bars(title, most.map(c => ({ value: f.labels[c], label: names[c],
    text: number(f.labels[c]) })), { kind: "bar count", unit: "images", note: "Validation images" +
      (MANY ? "; the 10 classes with most of them." : ".") });
}
const quarters = ["Strongest quarter of its activations", "Second quarter", "Third quarter",
  "Weakest quarter"];
function activations(f, i) {
  const counts = arrays.histograms.subarray(i * meta.bins, (i + 1) * meta.bins);
  const edge = n => number(+(f.largest * n / meta.bins).toPrecision(3));
  const ends = [...counts].map((_, n) => `${edge(n)} to ${edge(n + 1)}`);
  return columns("How strongly it is active", counts, ends, { y: "validation images",
    x: `activation (above its threshold, ${number(f.threshold)})`,
    ticks: [...ticks(f.largest, 6).map(v => [v / f.largest, number(+v.toPrecision(3))])] });
}
function pictures(f, i) {
  const figure = (title, image, words) => el("figure", {}, el("h3", {}, title), image,
    el("figcaption", { class: "small soft" }, words));
  if (!isFaithful(i)) return "";
  const scale = arrays.heat_scale?.[i], most = scale?.toPrecision(2);
  const bar = scale ? twoColorBar(`−${most}`, `+${most}`) : twoColorBar("lowers", "raises");
  if (!LOOK.in_place) return el("div", { class: "row" }, figure("Input pattern",
    [pattern(i, 160), bar], "what raises it (red) or lowers it (blue) around a position"));
  return el("div", { class: "row" },
    figure(isDrawn(i) ? "Hypothesis" : "Its images", sketch(i, 200),
      isDrawn(i) ? `${PLACES}. Gray: the mean of its images.` : "Nothing is drawn."),
    figure("Input pattern", [pattern(i, 200), bar],
      `Red: ${INK} raises its activation; blue: it lowers it` + (LOOK.color ? ""
        : "; gray: hardly any image has ink there") + (scale
        ? `. Numbers: change of the activation by a pixel of full ${INK}.` : ".")));
}
/* The feature of the address and its place on the page; undefined, and another view, without. */
function featureOfAddress() {
  const k = address().get("feature");
  const i = /^\d+$/.test(k ?? "") ? position.get(Number(k)) : undefined;
  if (i !== undefined) return [Number(k), i];
  misreadField("feature");
  goInstead(to("features"));
}
function featureView() {
  const found = featureOfAddress();
  if (!found) return;
  const [k, i] = found, f = features[i];
  const neighbors = (title, near) => el("p", { class: "small" }, title, ": ", near.map(([g, v]) =>
    [featureLink(g, `feature ${g}`), ` (${v.toFixed(2)}) `]));
  const [second] = f.near.find(([g]) => position.has(g)) ?? [k];
  const other = el("input", { id: "other", type: "number", min: 0, value: second });
  const submit = el("input", { id: "side", type: "submit", value: "compare" });
  const compare = e => {
    e.preventDefault();
    location.hash = to("two", { features: `${k},${other.value}` });
  };
  const removal = f.fixes === undefined ? "" : ` ${removalCounts(f)}`;
  showMain(el("nav", { "aria-label": "Features" }, link(neighborInList(k, -1), "← previous"),
    link(neighborInList(k, 1), "next →"), link(to("features"), "the list")),
  el("h2", {}, `Feature ${k}`), note(`${placeInList(k)}`.replace(/^n/, "N"), "."),
  el("p", {}, `It is active on ${percent(f.density)} of the validation images` +
    `${positionDensity(f)} and ${effectCaption(f)}. It accounts for ` +
    `${percent(f.influence)} of all `, term("influence"), ` on these images; removing it changes ` +
    `${percent(f.changes)} of the predictions where it is active.` + removal),
  hypothesisCard(f), WHERE ? [whereItIs(f, i), pictures(f, i)]
    : [pictures(f, i), thumbnails(STRONGEST_TITLE, f.top)],
  el("div", { class: "halves" }, el("div", {}, supports(f), pushes(f)),
    el("div", {}, labelColumns(f), activations(f, i))),
  evidence(f), doses(f), el("details", { id: "quarters" },
    el("summary", {}, "Images from weakly to strongly active"),
    f.bands.map((band, b) => (WHERE ? examplesOf(quarters[b], f, band)
      : thumbnails(quarters[b], band)))),
  el("h3", {}, "Similar features"),
  neighbors(["Those that change the activations alike (", term("cosine"), " of directions)"],
    f.near),
  neighbors("Those that are active on the same images (correlation)", f.coactive),
  el("form", { class: "row", onsubmit: compare },
    el("label", {}, "Compare with feature ", other), submit),
  el("details", { id: "where" }, el("summary", {}, "On the map"),
    note("Solid frame: this feature; dashed: those that change the activations alike, listed " +
      "above, many of which are not near it on the map."), mapOf(f, 28)));
}
function twoView() {
  const asked = (address().get("features") ?? "").split(",");
  const pair = asked.map(text => /^\d+$/.test(text) ? Number(text) : null);
  const found = pair.map(k => position.get(k));
  if (found.length !== 2 || found.includes(undefined)) {
    const k = pair.find(own => position.has(own));
    misreadField("features");
    return goInstead(k === undefined ? to("features") : toFeature(k));
  }
  const both = pair.map((k, n) => features[found[n]]), every = both.flatMap(f => f.supports);
  const range = { low: Math.min(0, ...every), high: Math.max(0, ...every), id: null };
  const cosine = both[0].near.find(([k]) => k === pair[1])?.[1];
  const column = (f, n) => el("section", { "aria-label": `feature ${f.feature}` },
    el("h3", {}, link(toFeature(f.feature), `Feature ${f.feature}`)), el("div", { class: "row" },
      LOOK.in_place && isFaithful(found[n]) ? [sketch(found[n], 160),
        portrait(found[n], 160, "the pattern over the mean of its images")]
        : face(found[n], 160)),
    el("p", {}, f.caption ?? "No hypothesis."), el("p", { class: "soft" },
      `Active on ${percent(f.density)} of the validation images; ${percent(f.influence)} of all ` +
      `influence; confidence: ${resultWord(f)}.`),
    supports(f, range), labelColumns(f), WHERE
      ? examplesOf(STRONGEST_TITLE, f, f.top.slice(0, 6))
      : thumbnails(STRONGEST_TITLE, f.top.slice(0, 8)));
  showMain(el("h2", {}, `Features ${pair[0]} and ${pair[1]}`),
    cosine === undefined ? ""
      : el("p", {}, "The directions in which they change the activations have a ",
        term("cosine"), ` of ${cosine.toFixed(2)}.`),
    el("div", { class: "halves" }, both.map(column)),
    note(FACE, LOOK.in_place ? " Beside it: the input pattern." : ""));
}
