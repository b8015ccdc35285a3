/* Which features separate two classes. */
function onImage(t, a, b) { /* contributions to the logit difference a - b on test image t */
  const logits = testLogits(t), difference = logits[a] - logits[b];
  const rows = activeOn(t).map(u => ({ ...u, value: u.adds[a] - u.adds[b] }))
    .sort((x, y) => Math.abs(y.value) - Math.abs(x.value));
  const label = k => position.has(k)
    ? link(toFeature(k), face(position.get(k), 32), `${k}`) : `${k}`;
  return el("div", { id: "onImage", "data-difference": difference },
    el("h3", {}, `Test image ${meta.tests.number[t]}, ${an(name(meta.tests.labels[t]))}`),
    el("div", { class: "row" }, testDigit(t, 112), el("p", {}, `Scores: ${names[a]} `,
      el("b", {}, signed(logits[a])), `, ${names[b]} `, el("b", {}, signed(logits[b])),
      `; ${names[difference > 0 ? a : b]} is ahead by ${number(Math.abs(difference))}. Removing ` +
      `a feature takes its contribution away from the difference. `, drawLink(t))),
    bars("", rows.slice(0, 12).map(u =>
      ({ value: u.value, text: signed(u.value), label: label(u.k) })),
    { id: "imageParts", unit: "score",
      note: `Right: supports ${names[a]}; left: supports ${names[b]}. The ` +
      `${Math.min(12, rows.length)} largest of ${plural(rows.length, "active feature")}.` }));
}
function pairView() {
  const [x, y] = meta.tests?.pair ?? [0, 1], a = fromAddress("a", C, x);
  let b = fromAddress("b", C, a === y ? x : y);
  if (a === b) { /* as without it */
    misreadField("b");
    b = a === y ? x : y;
  }
  const outcome = t => [meta.tests.labels[t], predicted(t)];
  const listed = tests().filter(t => outcome(t).every(c => c === a || c === b) &&
    isKnown(t, a) && isKnown(t, b));
  listed.sort((s, t) => isError(s) - isError(t) || s - t); /* correct ones, then the confused */
  const tour = meta.tests?.tour?.image, first = listed.includes(tour) ? tour : listed[0];
  const t = fromAddress("image", tests().length, first);
  const elsewhereWords = (i, c, d) => TABLES ? ""
    : `; on ${plurals[d]} it contributes ${signed(addsToDifference(d, i, c, d))}`;
  const row = (c, d) => i => separatingRow(i, c, d, elsewhereWords(i, c, d));
  const words = i => outcome(i).slice(0, isError(i) ? 2 : 1).map(c => names[c]).join(" → ");
  const side = (c, d) => el("div", { class: "large" }, featureRows(
    `Evidence for ${names[c]} over ${names[d]}, on images of ${plurals[c]}`,
    separating(c, d, 8).map(row(c, d))), isCompared(c, d) ? "" : note(`Not computed: ` +
    `${names[d]} is not among the classes whose scores are largest on images of ${plurals[c]}: `,
  rivals(c).map((r, n) => [n ? ", " : "", link(to("pair", { a: c, b: r }), names[r])]), "."));
  showMain(el("h2", {}, `Why ${names[a]} and not ${names[b]}?`),
    el("div", { class: "row" }, el("span", {}, "this class"),
      classLinks("This class", c => to("pair", { a: c, b: c === b ? a : b }), a)),
    el("div", { class: "row" }, el("span", {}, "not that class"),
      classLinks("Not that class", c => to("pair", { a: c === a ? b : a, b: c }), b)),
    el("p", {}, `The network prefers ${names[a]} to ${names[b]} when its `, term("score"),
      " is larger. Each number is a feature's ", term("contribution"), ` to the difference of ` +
      `the two scores, the mean over all validation images of the class.`),
    el("div", { class: "halves" }, side(a, b), side(b, a)),
    mapSwitch(), LOOK.in_place && note(PLACES, "; here on the mean image of the class. ", WORDS),
    el("h2", {}, "On one image"), meta.tests ? "" : noTests(),
    strip("Images of both classes", listed, image => to("pair", { a, b, image }), t, words),
    t === undefined ? "" : onImage(t, a, b), note(CONTRIBUTION, " ", NOT_ADDITIVE));
}
