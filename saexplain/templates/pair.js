/* Why one class and not another. */
function onImage(t, a, b) { /* parts of the lead of a over b, on test image t */
  const logits = testLogits(t), lead = logits[a] - logits[b];
  const rows = firing(t).map(u => ({ ...u, part: u.adds[a] - u.adds[b] }))
    .sort((x, y) => Math.abs(y.part) - Math.abs(x.part));
  const who = k => place.has(k) ? link(toFeature(k), portrait(place.get(k), 32), `${k}`) : `${k}`;
  return el("div", { id: "onImage", "data-lead": lead },
    el("h3", {}, `Test image ${meta.tests.number[t]}, ${an(name(meta.tests.labels[t]))}`),
    el("div", { class: "row" }, testDigit(t, 112), el("p", {}, `The network gives ${names[a]} `,
      el("b", {}, signed(logits[a])), ` and ${names[b]} `, el("b", {}, signed(logits[b])),
      `: ${names[lead > 0 ? a : b]} leads by ${number(Math.abs(lead))}. Removing a feature ` +
      `takes its part away from the lead. `, drawLink(t))),
    bars("", rows.slice(0, 12).map(u => ({ value: u.part, text: signed(u.part), label: who(u.k) })),
      { id: "imageParts", note: `Right: for ${names[a]}; left: for ${names[b]}. The ` +
        `${Math.min(12, rows.length)} strongest of ${rows.length} that fire.` }));
}
function pairView() {
  const [x, y] = meta.tests?.pair ?? [0, 1], a = asked("a", C, x);
  let b = asked("b", C, a === y ? x : y);
  if (a === b) b = (a + 1) % C;
  const of = t => [meta.tests.labels[t], reading(t)]; /* right ones of both, then the confused */
  const hand = tests().filter(t => of(t).every(c => c === a || c === b));
  hand.sort((s, t) => isError(s) - isError(t) || s - t);
  const tour = meta.tests?.tour?.image, first = hand.includes(tour) ? tour : hand[0];
  const t = asked("image", tests().length, first);
  const row = (c, d) => i => featureRow(features[i].feature, parts(c, i, c, d), {
    picture: features[i].drawing && sketch(i, 96, classMean(c)),
    note: `fires on ${percent(frequency(i, a), 0)} of ${many[a]}, ` +
      `${percent(frequency(i, b), 0)} of ${many[b]}; on ${many[d]} it makes ` +
      `${signed(parts(d, i, c, d))}` });
  const words = i => isError(i) ? `${names[of(i)[0]]} read as ${names[of(i)[1]]}` : names[of(i)[0]];
  const side = (c, d) => el("div", { class: "large" },
    featureRows(`For ${names[c]}, on ${many[c]}`, separating(c, d, 8).map(row(c, d))));
  main.replaceChildren(el("h2", {}, `Why ${names[a]} and not ${names[b]}?`),
    el("div", { class: "row" }, el("span", {}, "this"),
      classLinks("This class", c => to("pair", { a: c, b: c === b ? a : b }), a)),
    el("div", { class: "row" }, el("span", {}, "not that"),
      classLinks("Not that class", c => to("pair", { a: c === a ? b : a, b: c }), b)),
    el("p", {}, `The network says ${names[a]} when its score leads that of ${names[b]}. Each ` +
      `number is how much of that lead a feature makes, the mean over all validation images of ` +
      `the class.`),
    el("div", { class: "halves" }, side(a, b), side(b, a)),
    drawn ? soft(PLACES, ", on the mean image of the class. ", WORDS) : "",
    el("h2", {}, "On one image"), meta.tests ? "" : noTests(),
    strip("Images at hand", hand, image => to("pair", { a, b, image }), t, words),
    t === undefined ? "" : onImage(t, a, b), soft(ADDS, " ", NOT_SUMS));
}
