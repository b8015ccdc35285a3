/* One feature, and two side by side. */
function thumbnails(title, list) {
  const shown = list.map(([slot, label, activation]) => el("figure", {}, digit("images", slot,
    `${an(name(label))}, activation ${activation.toFixed(2)}`, 56),
  el("figcaption", {}, `${name(label)}: ${activation.toFixed(1)}`)));
  return el("div", {}, el("h3", {}, title),
    list.length ? el("div", { class: "thumbs" }, shown) : soft("No image fires it."));
}
function doses(f) {
  if (!f.dose) return "";
  const row = (tag, cells) => el("tr", {}, cells.map(text => el(tag, {}, text)));
  return el("div", {}, el("h3", {}, "Dose and response"),
    soft("Mean change of a score when the feature is added again, in doses of its typical " +
      "activation; in brackets what a straight line predicts."),
  el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "doses" }, el("table", {},
    row("th", ["dose", ...f.dose.at.map(String)]), f.dose.curves.map(([c, curve, line]) => row("td",
      [`score of ${names[c]}`, ...curve.map((v, i) => `${number(v)} (${number(line[i])})`)])))));
}
const marks = { confirmed: "✓ passed", inconclusive: "? open", refuted: "✗ failed" };
function clause(line) { /* what was measured, with a mark where it was a test */
  const [, words, verdict] = line.match(/^(.*): (confirmed|inconclusive|refuted)$/) ?? [, line];
  return el("li", {}, verdict && el("b", { class: verdict }, `${marks[verdict]}: `), words);
}
function statement(f) {
  if (!f.caption) return soft("This run made no statements about features.");
  const mark = f.mark === "returns" ? "returns in an SAE of another seed" : f.mark;
  return el("div", { class: "card" }, el("p", {}, el("b", {}, `“${f.caption}”`)),
    el("p", {}, "Confidence ", el("b", {}, f.confidence ?? "none"),
      "; verdict ", el("b", { class: f.outcome }, f.outcome ?? "none"), mark ? `; ${mark}` : ""),
    soft(WORDS, " Percentages are of the images that fire the feature."));
}
const tested = f => f.caption && el("details", { open: true },
  el("summary", {}, "Every test its statement was put to"),
  el("p", { class: "small" }, f.evidence), el("ul", { class: "small plain" }, f.lines.map(clause)));
const byClass = values => shownClasses(values.map(Math.abs)).map(c =>
  ({ value: values[c], label: names[c], text: signed(values[c]) }));
const supports = (f, range = {}) =>
  bars("Supports: what each score loses without it", byClass(f.supports), { id: "supports",
    note: "Right: it supports the class, left: it opposes it; the mean over images that fire it.",
    ...range });
const pushes = f => el("details", {}, el("summary", {}, "Pushes when added: another question"),
  bars("", byClass(f.pushes), { id: "pushes", note: "The change of each score when the feature " +
    "is added, at strength 1, to all images, whether it fires on them or not." }));
const shortened = text => text.length > 5 ? `${text.slice(0, 4)}…` : text; /* room for so much */
const labelColumns = f =>
  columns("Images that fire it, by class", f.labels,
    names.map(text => C <= 12 ? shortened(text) : ""));
const quarters = ["Strongest quarter", "Second quarter", "Third quarter", "Weakest quarter"];
function activations(f, i) {
  const counts = arrays.histograms.subarray(i * meta.bins, (i + 1) * meta.bins);
  const ends = ["0", ...Array(meta.bins - 2).fill(""), number(f.largest)];
  return columns(`Activations where it is active (threshold ${number(f.threshold)})`, counts, ends);
}
function pictures(f, i) {
  const both = "the pattern over the mean of its images";
  const figure = (title, image, words) => el("figure", {}, el("h3", {}, title), image,
    el("figcaption", { class: "small soft" }, words));
  const places = f.drawing ? "full outline: ink, dashed: none; over the mean of its images"
    : "no places were claimed";
  return el("div", { class: "row" },
    figure("Pixels that drive it", pattern(i, 200),
      "red: ink fires it, blue: ink silences it, grey: hardly ever inked"),
    figure(f.drawing ? "Exact places that predict it" : "Its images", sketch(i, 200), places),
    figure("Both", portrait(i, 200, both), both));
}
function known(k) {
  const i = place.get(k);
  if (i === undefined) main.replaceChildren(el("p", {}, `There is no feature ${k} on this page.`));
  return i;
}
function featureView() {
  const k = Number(address().get("feature")), i = known(k);
  if (i === undefined) return;
  const f = features[i], list = selection().map(([g]) => g.feature), at = list.indexOf(k);
  const step = by => toFeature(list[(at + by + list.length) % list.length] ?? k);
  const neighbours = (title, near) => el("p", { class: "small" }, title + ": ", near.map(([g, v]) =>
    [link(toFeature(g), `feature ${g}`), ` (${v.toFixed(2)}) `]));
  const other = el("input", { id: "other", type: "number", min: 0, value: f.near[0]?.[0] ?? k });
  const submit = el("input", { id: "side", type: "submit", value: "side by side" });
  const compare = e => {
    e.preventDefault();
    location.hash = to("two", { features: `${k},${other.value}` });
  };
  const turned = f.fixes === undefined ? "" : ` Removed from every test image, it alone mends ` +
    `${plural(f.fixes, "error")} and makes ${plural(f.breaks, "right prediction")} wrong.`;
  main.replaceChildren(el("nav", { "aria-label": "Features" }, link(step(-1), "← previous"),
    link(step(1), "next →"), link(to("features"), "all")), el("h2", {}, `Feature ${k}`),
  el("p", {}, `It fires on ${percent(f.density)} of the images and ${does(f)}. Its share of all ` +
    `that single features do is ${percent(f.influence, 1)}; without it ${percent(f.changes, 1)} ` +
    `of the predictions on images that fire it change.${turned}`), statement(f), pictures(f, i),
  thumbnails("Strongest images", f.top),
  el("div", { class: "halves" }, el("div", {}, supports(f), pushes(f)),
    el("div", {}, labelColumns(f), activations(f, i))),
  tested(f), doses(f), el("details", { id: "quarters" },
    el("summary", {}, "Images from each quarter of its range"),
    f.bands.map((band, b) => thumbnails(quarters[b], band))),
  el("h3", {}, "Like it"), neighbours("Nearest by direction (cosine)", f.near),
  neighbours("Fires together with (correlation)", f.together),
  el("form", { class: "row", onsubmit: compare },
    el("label", {}, "Compare with feature ", other), submit),
  el("details", { id: "where" }, el("summary", {}, "Where it is on the map"),
    soft("Framed: this feature; dashed: its true nearest, named above. The map puts many of " +
      "them elsewhere."), mapOf(f, 28)));
}
function twoView() {
  const pair = (address().get("features") ?? "").split(",").map(Number), found = pair.map(known);
  if (found.length !== 2 || found.includes(undefined)) return;
  const both = pair.map((k, n) => features[found[n]]), every = both.flatMap(f => f.supports);
  const range = { low: Math.min(0, ...every), high: Math.max(0, ...every), id: null };
  const cosine = both[0].near.find(([k]) => k === pair[1])?.[1];
  const column = (f, n) => el("section", { "aria-label": `feature ${f.feature}` },
    el("h3", {}, link(toFeature(f.feature), `Feature ${f.feature}`)), portrait(found[n], 160,
      "the pattern over the mean of its images"), sketch(found[n], 160),
    el("p", {}, f.caption ?? "No statement."), el("p", { class: "soft" },
      `Fires on ${percent(f.density)}; influence ${percent(f.influence)}; confidence ` +
      `${f.confidence ?? "none"}.`),
    supports(f, range), labelColumns(f), thumbnails("Strongest images", f.top.slice(0, 8)));
  main.replaceChildren(el("h2", {}, `Features ${pair[0]} and ${pair[1]}`),
    cosine === undefined ? "" : el("p", {}, `Their directions have cosine ${cosine.toFixed(2)}.`),
    el("div", { class: "halves" }, both.map(column)), soft(PORTRAIT));
}
