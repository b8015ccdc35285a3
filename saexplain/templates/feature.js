/* One feature, and two side by side. */
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
  return el("div", {}, el("h3", {}, "Dose and response"),
    note("Mean change of a logit when the feature is added, in multiples of its typical " +
      "activation; in brackets the linear prediction."),
  el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "doses" }, el("table", {},
    row("th", ["dose", ...f.dose.at.map(String)]), f.dose.curves.map(([c, curve, line]) => row("td",
      [`logit of ${names[c]}`, ...curve.map((v, i) => `${number(v)} (${number(line[i])})`)])))));
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
const markNotes = { reproducible: "reproducible (SAEs of other seeds have it, too)",
  "seed-specific": "seed-specific (not in all SAEs of other seeds)" };
/* Of a drawing, or of a hypothesis without one, which names classes and has no threshold. */
const pickedWords = ({ precision, recall }, { threshold, strong_from: strong } = {}) =>
  `Of the images ${threshold === null ? "of the classes it names" : "it picks"}, ` +
  `${percent(precision, 0)} activate the feature${strong ? " strongly" : ""}; it finds ` +
  `${percent(recall, 0)} of those that do.`;
const classWords = (named, { share, low, high, usual }) => `${percent(share, 0)} ` +
  `${interval(low, high)} of the images that activate it are ` +
  `${named.map(c => plurals[c]).join(" or ")}; of all images ${percent(usual, 0)} `;
function logitWords(verb, c) {
  return `it ${verb} the logit of ${names[c.logit]} by ${number(c.by)} ` +
    `${interval(c.low, c.high, number)}`;
}
function hypothesisCard(f) {
  const own = LOOK.can_write && el("a", { class: "button",
    href: to("write", { feature: f.feature }) }, "Write your own");
  if (!f.caption) return el("div", {}, note("This run has no hypotheses about features."), own);
  const mark = markNotes[f.mark] ?? f.mark, { picked, detection, classes: of, effects } = f.found;
  const results = f.found.results ?? {}, lines = [];
  if (picked) lines.push(el("p", {}, pickedWords(picked, f.hypothesis)),
    el("p", {}, "F1 ", el("b", { id: "f1" }, f.f1.toFixed(2)), ` (picking every image: ` +
      `${f.found.chance_f1.toFixed(2)})` + (detection ? `; average precision ` +
      `${detection.average_precision.toFixed(2)}; AUROC ${auroc(detection.auroc)} ` +
      interval(detection.auroc_low, detection.auroc_high, auroc) : "") +
      `; ${plural(f.found.n_images, "test image")}.`));
  /* Without drawings every test has a line of its own, whatever was tested. */
  const edits = Object.keys(EDITS).filter(edit => LOOK.can_write && results[edit]);
  if (edits.length) lines.push(el("p", {}, "Edits: ", edits.map((edit, n) =>
    [n ? "; " : "", `${EDITS[edit]} `, marked(results[edit])]), "."));
  if (of && LOOK.can_write)
    lines.push(el("p", {}, classWords(f.hypothesis.classes, of), marked(results.classes)));
  for (const [verb, c] of Object.entries(LOOK.can_write && effects || {}))
    lines.push(el("p", {}, `On these images ${logitWords(verb, c)} `, marked(results[verb])));
  if (!LOOK.can_write) lines.push(el("ul", { class: "plain" },
    f.lines.filter(line => OUTCOME.test(line)).map(evidenceLine)));
  const on = "replicated on the other half", again = { true: `; ${on}`, false: `; not ${on}` };
  return el("div", { class: "card" }, el("p", {}, el("b", {}, `“${f.caption}”`)),
    el("p", {}, "Confidence ", el("b", {}, f.confidence ?? "none"), again[f.replicated] ?? "",
      mark ? `; ${mark}` : ""), lines, own);
}
const evidence = f => f.caption && el("details", {},
  el("summary", {}, "Details of the tests"),
  el("ul", { class: "small plain" }, f.lines.map(evidenceLine)));
/* All classes; of many, the largest effects either way. */
const effectClasses = values => !MANY ? shownClasses(values.map(Math.abs))
  : classes.filter(c => values[c]).sort((a, b) => values[b] - values[a]);
const byClass = values => effectClasses(values).map(c =>
  ({ value: values[c], label: names[c], text: signed(values[c]) }));
const sampled = () => WHERE?.kind === "activation"; /* a layer with positions: at most 64 images */
const supports = (f, range = {}) =>
  bars("Mean contribution to each logit", byClass(f.supports), { id: "supports",
    note: "Right: it supports the class, left: it opposes it; the mean over " +
      `${sampled() ? "a sample of " : ""}the images on which it is active.`, ...range });
const pushes = f => el("details", {}, el("summary", {}, "Effect of adding it to all images"),
  bars("", byClass(f.pushes), { id: "pushes", note: "The mean change of each logit when the " +
    `feature is added with activation 1 to ${sampled() ? "all positions of some" : "all"} ` +
    "images, whether or not it is active on them." }));
/* What fits under a column. */
const shortened = text => text.length > 5 ? `${text.slice(0, 4)}…` : text;
function labelColumns(f) {
  const title = "Images on which it is active, by class";
  const wide = C > 10 && C <= 12 && names.some(text => text.length > 2) ? 420 : 300;
  if (!MANY) return columns(title, f.labels, names.map(text => C <= 12 ? shortened(text) : ""),
    110, wide);
  const most = largest(10, c => f.labels[c], C);
  return bars(title, most.map(c => ({ value: f.labels[c], label: names[c],
    text: number(f.labels[c]) })), { note: "The 10 classes with most of them." });
}
const quarters = ["Strongest quarter", "Second quarter", "Third quarter", "Weakest quarter"];
function activations(f, i) {
  const counts = arrays.histograms.subarray(i * meta.bins, (i + 1) * meta.bins);
  const ends = ["0", ...Array(meta.bins - 2).fill(""), number(f.largest)];
  return columns(`Activations where it is active (threshold ${number(f.threshold)})`, counts, ends);
}
function pictures(f, i) {
  const figure = (title, image, words) => el("figure", {}, el("h3", {}, title), image,
    el("figcaption", { class: "small soft" }, words));
  if (!isFaithful(i)) return "";
  if (!LOOK.in_place) return el("div", { class: "row" }, figure("Input pattern", pattern(i, 160),
    "what raises it (red) or lowers it (blue) around a position"));
  return el("div", { class: "row" },
    figure(isDrawn(i) ? "Hypothesis" : "Its images", sketch(i, 200),
      isDrawn(i) ? `${PLACES}. Gray: the mean of its images` : "nothing is drawn"),
    figure("Input pattern", pattern(i, 200),
      `red: ${INK} raises its activation, blue: lowers it` + (LOOK.color ? ""
        : ", gray: hardly ever inked")));
}
function positionOf(k) { /* undefined, and a message, without such a feature */
  const i = position.get(k);
  if (i === undefined) showMain(el("p", {}, `There is no feature ${k} on this page.`));
  return i;
}
function featureView() {
  const k = Number(address().get("feature")), i = positionOf(k);
  if (i === undefined) return;
  const f = features[i], list = selection().map(([g]) => g.feature), at = list.indexOf(k);
  const step = by => toFeature(list[(at + by + list.length) % list.length] ?? k);
  const neighbors = (title, near) => el("p", { class: "small" }, title + ": ", near.map(([g, v]) =>
    [featureLink(g, `feature ${g}`), ` (${v.toFixed(2)}) `]));
  const [second] = f.near.find(([g]) => position.has(g)) ?? [k];
  const other = el("input", { id: "other", type: "number", min: 0, value: second });
  const submit = el("input", { id: "side", type: "submit", value: "compare" });
  const compare = e => {
    e.preventDefault();
    location.hash = to("two", { features: `${k},${other.value}` });
  };
  const removal = f.fixes === undefined ? "" : ` ${removalCounts(f)}`;
  showMain(el("nav", { "aria-label": "Features" }, link(step(-1), "← previous"),
    link(step(1), "next →"), link(to("features"), "all")), el("h2", {}, `Feature ${k}`),
  el("p", {}, `It is active on ${percent(f.density)} of the validation images` +
    `${positionDensity(f)} and ${effectCaption(f)}. Its influence is ${percent(f.influence)}. ` +
    `Without it ${percent(f.changes)} of the predictions change on the images on which it is ` +
    "active." + removal), hypothesisCard(f), WHERE ? [whereItIs(f, i), pictures(f, i)]
    : [pictures(f, i), thumbnails("Strongest images", f.top)],
  el("div", { class: "halves" }, el("div", {}, supports(f), pushes(f)),
    el("div", {}, labelColumns(f), activations(f, i))),
  evidence(f), doses(f), el("details", { id: "quarters" },
    el("summary", {}, "Images from each quarter of its active range"),
    f.bands.map((band, b) => (WHERE ? examplesOf(quarters[b], f, band)
      : thumbnails(quarters[b], band)))),
  el("h3", {}, "Similar features"), neighbors("By decoder direction (cosine)", f.near),
  neighbors("By coactivation (correlation)", f.coactive),
  el("form", { class: "row", onsubmit: compare },
    el("label", {}, "Compare with feature ", other), submit),
  el("details", { id: "where" }, el("summary", {}, "On the map"),
    note("Solid frame: this feature; dashed: its neighbors by direction, listed above, many of " +
      "which are not near it on the map."), mapOf(f, 28)));
}
function twoView() {
  const pair = (address().get("features") ?? "").split(",").map(Number);
  const found = pair.map(positionOf);
  if (found.length !== 2 || found.includes(undefined)) return;
  const both = pair.map((k, n) => features[found[n]]), every = both.flatMap(f => f.supports);
  const range = { low: Math.min(0, ...every), high: Math.max(0, ...every), id: null };
  const cosine = both[0].near.find(([k]) => k === pair[1])?.[1];
  const column = (f, n) => el("section", { "aria-label": `feature ${f.feature}` },
    el("h3", {}, link(toFeature(f.feature), `Feature ${f.feature}`)), el("div", { class: "row" },
      LOOK.in_place && isFaithful(found[n]) ? [sketch(found[n], 160),
        portrait(found[n], 160, "the pattern over the mean of its images")]
        : face(found[n], 160)),
    el("p", {}, f.caption ?? "No hypothesis."), el("p", { class: "soft" },
      `Active on ${percent(f.density)} of images; influence ${percent(f.influence)}; confidence ` +
      `${f.confidence ?? "none"}.`),
    supports(f, range), labelColumns(f), WHERE
      ? examplesOf("Strongest images", f, f.top.slice(0, 6))
      : thumbnails("Strongest images", f.top.slice(0, 8)));
  showMain(el("h2", {}, `Features ${pair[0]} and ${pair[1]}`),
    cosine === undefined ? ""
      : el("p", {}, `Their decoder directions have cosine ${cosine.toFixed(2)}.`),
    el("div", { class: "halves" }, both.map(column)),
    note(FACE, LOOK.in_place ? " Beside it: the input pattern." : ""));
}
