/* What makes an image one of a class. */
function classPicture(c, size, rows) { /* the mean image, under all that speaks for the class */
  const sum = new Float32Array(P);
  for (const i of rows) for (let p = 0; p < P; p++) sum[p] += adds(c, i, c) * heat(i, p);
  const most = Math.max(...sum.map(Math.abs), 1e-9);
  return picture(`the mean ${names[c]}, red where ink speaks for it, blue where it speaks against`,
    size, null, p => tinted(p, arrays.class_means[c * P + p], arrays.inked[p] ? sum[p] / most : 0));
}
function classView() {
  const c = asked("class", C, 0), n = meta.of_class[c], share = i => percent(frequency(i, c), 0);
  const forIt = largest(12, i => adds(c, i, c)), against = largest(8, i => -adds(c, i, c));
  const figure = el("figure", { id: "onMean" });
  const whole = () => figure.replaceChildren(classPicture(c, 224, forIt),
    el("figcaption", { class: "small" },
      `The mean ${names[c]}; red: ink there speaks for it, blue: against it (patterns of the ` +
      `features below, weighted by what they add).`));
  const onlyOne = i => figure.replaceChildren(sketch(i, 224, classMean(c)),
    el("figcaption", { class: "small" },
      `The places of feature ${features[i].feature} on the mean ${names[c]}: full outline, ink; ` +
      `dashed, none.`));
  whole();
  const row = i => featureRow(features[i].feature, adds(c, i, c), { onlook: () => onlyOne(i),
    note: `fires on ${share(i)} of all ${many[c]}; where it fires at all, it ` +
      `${does(features[i])}` });
  function keeps(d) {
    const [i] = largest(1, j => parts(c, j, c, d)), f = features[i];
    return f ? el("li", {}, link(to("pair", { a: c, b: d }), an(names[d])), ": ",
      link(toFeature(f.feature), `feature ${f.feature}`), `, ${looksFor(f)}`) : "";
  }
  main.replaceChildren(el("h2", {}, `What makes ${an(names[c])}`),
    classLinks("Class", d => to("class", { class: d }), c),
    el("div", { class: "aside" }, el("div", { class: "pinned" }, figure,
      button("all features", whole), soft("Point at a feature, or tab to it, to see its places.")),
    el("div", {}, featureRows(`These speak for ${names[c]}`, forIt.map(row)),
      featureRows(`These speak against ${names[c]}, on images of ${many[c]}`, against.map(row)),
      el("h3", {}, `What most keeps ${an(names[c])} from being read as`),
      el("ul", { class: "plain" }, classes.filter(d => d !== c).map(keeps)),
      soft(`The number is what a feature adds to the score of ${names[c]}, the mean over all ` +
        `${n.toLocaleString("en")} validation images of the class; it is 0 on those that do not ` +
        "fire it. ", ADDS, " ", NOT_SUMS))));
}
