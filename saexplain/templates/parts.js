/* What several views show: a feature in a row or a card, and what is meant by its numbers. */
const ADDS = "What a feature adds is what the score loses when this feature alone is taken away " +
  "(the part that the features do not rebuild stays).";
const NOT_SUMS = "A network is not a sum: what two features add is not what both together add, " +
  "so these numbers do not sum to the score.";
const drawn = features.some(f => f.drawing); /* strokes are named and drawn for pen strokes only */
const PLACES = drawn ? "Full red outlines are where a feature looks for ink, dashed blue ones " +
  "where it wants none (searched for apart from the words)" : "";
const WORDS = drawn ? "A bar is horizontal, a stem vertical, a slash rises, a backslash falls, " +
  "ink is any." : "";
const PORTRAIT = "Each picture: in grey the mean of the images that fire the feature, in red " +
  "where ink helps to fire it, in blue where ink keeps it silent. " + WORDS;

/* What a feature looks for, in words: the first part of its statement. */
function looksFor(f) {
  if (!f.caption) return "no statement was made about it";
  const first = f.caption.split("; ")[0];
  return first.charAt(0).toLowerCase() + first.slice(1);
}
/* Where it fires, it supports a class by so much: never what it does when it is added. */
const supported = f => argmax(f.supports);
const opposed = f => f.supports.indexOf(Math.min(...f.supports));
function does(f) {
  const up = supported(f), down = opposed(f), words = [];
  if (f.supports[up] > 0) words.push(`supports ${names[up]} (${signed(f.supports[up])})`);
  if (f.supports[down] < 0) words.push(`opposes ${names[down]} (${signed(f.supports[down])})`);
  return words.length ? words.join(", ") : "changes no score";
}
/* A feature that is perhaps not on the page: a picture, what it is, and what it does here. */
function featureRow(k, value, more = {}) {
  const i = place.get(k);
  if (i === undefined) return el("li", { class: "unit" }, `Feature ${k} is not on this page.`);
  const f = features[i];
  return el("li", { class: "unit", onpointerenter: more.onlook, onfocusin: more.onlook },
    more.picture ?? portrait(i, 64),
    el("div", {}, el("a", { href: toFeature(k) }, `Feature ${k}`), ": ", looksFor(f), ".",
      el("br"), el("span", { class: "soft" }, more.note ?? does(f))),
    el("b", { class: value < 0 ? "minus" : "plus" }, signed(value)));
}
function featureRows(title, rows, empty = "None.") {
  const list = rows.length ? el("ul", { class: "units" }, rows) : soft(empty);
  return el("div", {}, el("h3", {}, title), list);
}
const card = i => el("a", { class: "tile", href: toFeature(features[i].feature) },
  portrait(i, 112), el("b", {}, `Feature ${features[i].feature}`),
  el("span", {}, looksFor(features[i])), el("span", { class: "soft" }, does(features[i])));
/* Test images to choose from: links that keep the view. */
function strip(title, tests, href, chosen, words = t => name(meta.tests.labels[t])) {
  const said = t => `test image ${meta.tests.number[t]}, ${an(name(meta.tests.labels[t]))}` +
    (isError(t) ? `, read as ${name(reading(t))}` : "");
  return el("nav", { "aria-label": title, class: "strip" }, tests.map(t => el("a",
    { href: href(t), "aria-current": t === chosen && "true", "aria-label": said(t) },
    testDigit(t, 44, ""), el("span", {}, words(t)))));
}
const reading = t => argmax([...testLogits(t)]);
const isError = t => t < meta.tests.shown_errors;
const tests = () => [...(meta.tests?.labels.keys() ?? [])];
const noTests = () => soft("This page was written without test images.");
function drawLink(t, off = [], words = "Open it in the drawing view") {
  const set = off.length ? { set: off.map(k => `${k}:0`).join(",") } : {};
  return meta.network ? link(to("draw", { image: t, ...set }), words) : "";
}
const classLinks = (label, href, chosen) =>
  choose(label, classes.map(c => [names[c], href(c), c]), chosen);
/* A whole number of the address below `n`, or what stands in for it. */
function asked(field, n, otherwise) {
  const value = address().get(field);
  return value !== null && /^\d+$/.test(value) && Number(value) < n ? Number(value) : otherwise;
}
