/* What several views share: a feature as a row or a card, and notes on what the numbers mean. */
const CONTRIBUTION = "A feature's contribution to a score is the score minus what it is after " +
  "this feature alone is removed from the activations (what the SAE does not rebuild stays).";
const NOT_ADDITIVE = "The network is not linear, so contributions do not sum to the score.";
const NOT_WHY = "Effects on scores say what removing the feature does to the network, not why it " +
  "is active: with activations shuffled over images, many of them are confirmed as well. Alone " +
  "they never give a confidence above Low.";
const PLACES = `Red: ${INK} is wanted there; blue: it is not; the darker tone counts twice`;
const WORDS = LOOK.color || !LOOK.can_write ? ""
  : "Ink is what pictures show dark. A bar is horizontal, a stem vertical, a slash rises, a " +
  "backslash falls, a hook bends, a ring closes; a patch is broad, a spot small.";
const EDITS = { erasing: `erasing the wanted ${INK}`, filling: "filling the unwanted cells",
  painting: "making images as drawn" };
const STRONGEST = "the image that activates it most" + (meta.where ? ", and where in it" +
  (isCropped() ? ", cropped to what the most active position sees" : "") : "");
const FACE = !LOOK.in_place ? `The picture of a feature is ${STRONGEST}.`
  : "Each picture shows a feature's hypothesis on the mean of the images on which it is " +
  `active. ${PLACES}. ${WORDS}` + (features.every((_, i) => features[i].faithful !== false) ? ""
  : ` The picture of a feature without a faithful pattern is ${STRONGEST}.`);

function inkCaption(f) {
  if (!f.caption) return "no hypothesis about it";
  return f.caption.charAt(0).toLowerCase() + f.caption.slice(1);
}
/* Mean contributions where the feature is active, not the effect of adding it everywhere. */
const supported = f => argmax(f.supports);
const opposed = f => f.supports.indexOf(Math.min(...f.supports));
function effectCaption(f) {
  const up = supported(f), down = opposed(f), words = [];
  if (f.supports[up] > 0) words.push(`supports ${names[up]} (${signed(f.supports[up])})`);
  if (f.supports[down] < 0) words.push(`opposes ${names[down]} (${signed(f.supports[down])})`);
  return words.length ? words.join(", ") : "changes no score";
}
/* A row of a list: a picture, the feature's caption, a note, and a value on this image or class. */
function featureRow(k, value, more = {}) {
  const i = position.get(k), amount = el("b", { class: value < 0 ? "minus" : "plus" },
    signed(value));
  if (i === undefined) return el("li", { class: "unit" }, el("span"),
    el("div", {}, `Feature ${k}, which is not on this page.`), amount);
  const f = features[i];
  return el("li", { class: "unit", onpointerenter: more.onpoint, onfocusin: more.onpoint },
    more.picture ?? face(i, 64),
    el("div", {}, link(toFeature(k), `Feature ${k}`), ": ", inkCaption(f), ".", el("br"),
      el("span", { class: "soft" }, more.note ?? effectCaption(f))), amount);
}
function featureRows(title, rows) {
  const list = rows.length ? el("ul", { class: "units" }, rows) : note("None.");
  return el("div", {}, el("h3", {}, title), list);
}
const card = i => el("a", { class: "tile", href: toFeature(features[i].feature) },
  face(i, 112), el("b", {}, `Feature ${features[i].feature}`),
  el("span", {}, inkCaption(features[i])),
  el("span", { class: "soft" }, effectCaption(features[i])));

/* ---------- test images ---------- */
const predicted = t => argmax([...testLogits(t)]);
const isError = t => t < meta.tests.shown_errors; /* errors come first */
const tests = () => [...(meta.tests?.labels.keys() ?? [])];
const noTests = () => note("This page was written without test images.");
/* Test images to choose from: links that keep the view. */
function strip(title, shownTests, href, chosen, words = t => name(meta.tests.labels[t])) {
  const label = t => `test image ${meta.tests.number[t]}, ${an(name(meta.tests.labels[t]))}` +
    (isError(t) ? `, classified as ${name(predicted(t))}` : "");
  return el("nav", { "aria-label": title, class: "strip" }, shownTests.map(t => el("a",
    { href: href(t), "aria-current": t === chosen && "true", "aria-label": label(t) },
    testDigit(t, 44, ""), el("span", {}, words(t)))));
}
function drawLink(t, off = [], words = "Open it in the drawing view") {
  const set = off.length ? { set: off.map(k => `${k}:0`).join(",") } : {};
  return meta.network ? link(to("draw", { image: t, ...set }), words) : "";
}
const classLinks = (label, href, chosen) =>
  chooser(label, classes.map(c => [names[c], href(c), c]), chosen);

/* ---------- the address, which readers may type ---------- */
const misread = new Map(); /* what was not understood, in words, until the next address */
function misreadField(field, value = address().get(field) ?? "") {
  const text = [...value].slice(0, 40).join("");
  misread.set(field, `${field} “${text}${text === value ? "" : "…"}”`);
}
/* A whole number of the address below `n`, or a default. */
function fromAddress(field, n, otherwise) {
  const value = address().get(field);
  if (value === null || value === "end") return otherwise; /* "end": of the tour */
  if (/^\d+$/.test(value) && Number(value) < n) return Number(value);
  misreadField(field);
  return otherwise;
}
const FIELDS = "view class a b image label feature features as step set pin entry of search";
function checkFields() { /* those that no view reads */
  if (address().has("view")) for (const field of address().keys())
    if (!FIELDS.split(" ").includes(field) && !Object.hasOwn(CHOICES, field)) misreadField(field);
}
function forgetMisread() { /* the address of what is shown instead; a drawing writes its own */
  if (!misread.size || current === "draw") return;
  const rest = misread.has("view") ? {} : Object.fromEntries(address());
  for (const field of misread.keys()) delete rest[field];
  if (misread.has("step")) rest.step = 0;
  history.replaceState(null, "", to(current, rest));
}
/* The address has no such feature or view: the nearest view that there is. */
function goInstead(href) {
  history.replaceState(null, "", href);
  route(true);
}
function misreadWords() {
  const list = [...misread.values()].join(", ");
  return list && el("p", { id: "misread", class: "mark", role: "alert" },
    `Not understood in the address, or not on this page: ${list}. It was left out.`);
}
