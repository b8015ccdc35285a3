/* Which features support a class, and which oppose it. */
function classPicture(c, size, rows) { /* the class mean, colored by the patterns of its features */
  const sum = new Float32Array(P);
  for (const i of rows) for (let p = 0; p < P; p++) sum[p] += ownEffect(c, i) * heat(i, p);
  const most = Math.max(...sum.map(Math.abs), 1e-9);
  return picture(`the mean ${names[c]}, red where ${INK} supports it, blue where it opposes it`,
    size, null, p => tinted(p, classMean(c, p), inkedAt(p) ? sum[p] / most : 0));
}
function separatingMost(a, b) { /* the feature that contributes most to a - b on images of a */
  return TABLES ? separating(a, b, 1) : largest(1, j => addsToDifference(a, j, a, b));
}
function classView() {
  const first = Math.max(0, meta.of_class.findIndex(Boolean)); /* of which there are images */
  const c = fromAddress("class", C, first), n = meta.of_class[c];
  const supporting = largest(12, i => ownEffect(c, i));
  const opposing = largest(8, i => -ownEffect(c, i));
  const figure = el("figure", { id: "onMean" });
  const showAll = () => figure.replaceChildren(classPicture(c, 224, supporting),
    el("figcaption", { class: "small" },
      `The mean ${names[c]}. ${INK[0].toUpperCase() + INK.slice(1)} on red ${SPOTS} supports the ` +
      `class, ${INK} on blue ${SPOTS} opposes it ` +
      "(the input patterns of its supporting features, weighted by their contributions).",
    twoColorBar("opposes", "supports")));
  const showOne = i => LOOK.in_place && figure.replaceChildren(sketch(i, 224, onClass(c)),
    el("figcaption", { class: "small" },
      `The drawing of feature ${features[i].feature} on the mean ${names[c]}. ${PLACES}.`));
  if (LOOK.in_place) showAll();
  const row = i => featureRow(features[i].feature, ownEffect(c, i), { onpoint: () => showOne(i),
    note: `active on ${percent(frequency(i, c), 0)} of all ${plurals[c]}; over all classes it ` +
      effectCaption(features[i]) });
  function against(d) { /* the feature that separates c from d most */
    const [i] = separatingMost(c, d), f = features[i];
    return f ? el("li", {}, link(to("pair", { a: c, b: d }), names[d]), ": ",
      link(toFeature(f.feature), `feature ${f.feature}`), `, ${inkCaption(f)}`) : "";
  }
  const beside = LOOK.in_place && el("div", { class: "pinned" }, figure,
    button("all features", showAll),
    note("Point at a feature, or tab to it, to see its drawing."));
  showMain(el("h2", { title: meta.classes[c] }, `Features of class ${names[c]}`),
    classLinks("Class", d => to("class", { class: d }), c), mapSwitch(),
    el("div", { class: LOOK.in_place ? "aside" : "" }, beside,
    el("div", {}, featureRows(`Evidence for ${names[c]}, on images of ${plurals[c]}`,
      supporting.map(row)),
      featureRows(`Evidence against ${names[c]}, on images of ${plurals[c]}`, opposing.map(row)),
      el("h3", {}, `The feature that is the best evidence for ${names[c]} over`),
      el("ul", { class: "plain" }, rivals(c).map(against)),
      TABLES && note(`The classes whose scores are largest on images of ${plurals[c]}.`),
      note(`Each number is a feature's contribution to the score for ${names[c]}, the mean over ` +
        `all ${n.toLocaleString("en")} validation images of the class; an image on which the ` +
        "feature is inactive counts as 0. ", CONTRIBUTION, " ", NOT_ADDITIVE))));
}
