/* The network in one look: a guided tour, how two classes are told apart, who does the work. */
function tourSteps() {
  const { image, goal, off, logits } = meta.tests.tour, label = meta.tests.labels[image];
  const before = logits[0], last = logits.length - 1, after = argmax(logits[last]);
  const gone = new Set();
  const fired = firing(image).map(u => ({ ...u, lead: u.adds[label] - u.adds[goal] }))
    .sort((a, b) => b.lead - a.lead);
  const top = fired.filter(u => off.includes(u.k) || fired.indexOf(u) < 5);
  const row = u => featureRow(u.k, u.lead, { note: `makes ${number(u.lead)} of the lead of ` +
    `${names[label]} over ${names[goal]} on this image` });
  const seen = () => testDigit(image, 168);
  const thumb = k => place.has(k) ? portrait(place.get(k), 64) : el("span");
  const looked = k => place.has(k) ? `: ${looksFor(features[place.get(k)])}` : "";
  const off1 = off.length === 1 ? "this one feature" : `these ${off.length} features`;

  const first = () => [el("p", {}, `This is ${an(names[label])} that the network has never seen. ` +
    `It gives each class a score, and the highest wins.`),
  el("div", { class: "row" }, seen(), scores("Scores (in brackets: how sure it is)", before))];
  const second = () => [el("p", {}, `Why? On this image ${fired.length} of ${meta.d_sae} ` +
    "features fire. Each has found something it looks for. These do most for " +
    `${names[label]} and against ${names[goal]}:`),
  el("div", { class: "row" }, seen(), el("ul", { class: "units" }, top.map(row))), soft(PORTRAIT)];
  function third() {
    const out = el("div", { "aria-live": "polite" });
    const show = () => {
      const now = logits[off.reduce((sum, k, bit) => sum + (gone.has(k) ? 1 << bit : 0), 0)];
      const p = softmax(now), says = argmax(p);
      out.replaceChildren(el("p", {}, "Now it reads: ", el("b", { class: "big", id: "tourSays" },
        names[says]), ` (${sure(p[says])})`), scores("", now, { before, id: "tourScores",
        note: "The thin lines are the scores before." }));
    };
    show();
    const switches = off.map(k => el("li", { class: "unit" }, thumb(k),
      el("span", {}, `Feature ${k}${looked(k)}`),
      button(`switch ${k} off`, e => {
        gone.has(k) ? gone.delete(k) : gone.add(k);
        e.target.textContent = `switch ${k} ${gone.has(k) ? "on" : "off"}`;
        e.target.setAttribute("aria-pressed", gone.has(k));
        show();
      }, { id: `tour${k}`, "aria-pressed": "false" })));
    return [el("p", {}, `Now you: take ${off1} away. The image stays as it is.`),
      el("div", { class: "row" }, seen(), el("ul", { class: "units" }, switches), out)];
  }
  function fourth() {
    const outlined = off.filter(k => features[place.get(k)]?.drawing).map(k => place.get(k));
    const figure = (i, background, words) => el("figure", {}, sketch(i, 168, background),
      el("figcaption", { class: "small" }, `feature ${features[i].feature} on ${words}`));
    const pictures = outlined.map(i => [figure(i, seen(), `this ${names[label]}`),
      figure(i, classMean(label), `the mean ${names[label]}`),
      figure(i, classMean(goal), `the mean ${names[goal]}`)]);
    const said = off.map((k, n) => [n ? (n === off.length - 1 ? " and " : ", ") : "",
      link(toFeature(k), `feature ${k}`), looked(k)]);
    return [el("p", { class: "big" }, `Without ${off1} this ${names[label]} is a ` +
      `${names[after]} to the network.`),
    el("p", {}, "So here is one true thing about it: it tells this ", names[label], " from a ",
      names[goal], " by ", said, ". ", WORDS),
    el("div", { class: "row" }, pictures), outlined.length ? soft(PLACES, ".") : "",
    el("p", {}, "It holds beyond this image: below is what separates the two on all of theirs. ",
      drawLink(image, off, "See it in the drawing view, and draw your own"))];
  }
  return [first, second, third, fourth];
}
function tour() {
  if (!meta.tests?.tour) return "";
  const made = tourSteps(), n = asked("step", made.length, 0);
  if (address().get("step") === "end")
    return el("p", {}, el("a", { href: to("story"), id: "tourAgain" }, "Take the guided tour"));
  const last = made.length - 1, titles = ["An image", "What fired", "Switch off", "What you saw"];
  return el("section", { class: "card", id: "tour", "aria-label": "Guided tour" },
    el("p", { class: "soft" }, `Guided tour, ${n + 1} of ${made.length}: ${titles[n]}`), made[n](),
    el("nav", { "aria-label": "Tour" },
      n > 0 && link(to("story", { step: n - 1 }), "← back"),
      n < last && el("a", { id: "tourNext", class: "main", href: to("story", { step: n + 1 }) },
        ["Why?", "Let me try", "And so?"][n] + " →"),
      link(to("story", { step: "end" }), n === last ? "close" : "skip the tour")));
}
/* What makes most of the lead of a over b on the images of a, and more than on those of b. */
function separating(a, b, n) {
  return largest(n, i => parts(a, i, a, b) > parts(b, i, a, b) ? parts(a, i, a, b) : 0);
}
function apart() {
  const [a, b] = meta.tests?.pair ?? [0, Math.min(1, C - 1)];
  const row = (c, d) => i => featureRow(features[i].feature, parts(c, i, c, d), {
    picture: features[i].drawing && sketch(i, 96, classMean(c)),
    note: `fires on ${percent(frequency(i, c), 0)} of ${many[c]}, on ` +
      `${percent(frequency(i, d), 0)} of ${many[d]}` });
  const side = (c, d) => el("div", {}, el("h3", {}, `For ${names[c]}, against ${names[d]}, speak`),
    el("ul", { class: "units large" }, separating(c, d, 3).map(row(c, d))));
  const most = meta.tests?.errors
    ? `${names[a]} and ${names[b]} are the two that it most often takes for one another. ` : "";
  return [el("h2", {}, `How it tells ${an(names[a])} from ${an(names[b])}`),
    el("p", {}, most, "Each number is how much of the lead of one over the other a feature " +
      "makes, averaged over the images of that class. ",
    link(to("pair", { a, b }), "All that separates them")),
    el("div", { class: "halves" }, side(a, b), side(b, a)),
    drawn ? soft(PLACES, ", on the mean image of the class. ", WORDS) : ""];
}
function diagnoses() {
  if (!meta.diagnoses.length) return "";
  const measured = d => d.value === null ? "not computed" : number(d.value);
  const row = d => el("li", {}, el("b", {}, d.fine ? "✓ fine" : "! attention"),
    ` ${d.complaint}: ${measured(d)} (${d.what}; beyond ${d.limit} it deserves attention).`,
    d.fine ? "" : ` What to do: ${d.advice}, then run again.`);
  return [el("h2", {}, "How good is this SAE?"),
    soft("Usual complaints about sparse autoencoders, each measured on this one."),
    el("ul", { class: "plain" }, meta.diagnoses.map(row))];
}
function frontier() {
  if (meta.frontier.length < 2) return "";
  const line = (cells, tag) => el("tr", {}, cells.map(text => el(tag, {}, text)));
  const cells = r => [r.l0.toFixed(2), r.fvu.toFixed(4), percent(r.agreement, 2)];
  return [el("h2", {}, "Sparsity against fidelity"), el("table", {},
    line(["active features per image", "FVU", "predictions kept"], "th"),
    meta.frontier.map(r => line(cells(r), "td")))];
}
function storyView() {
  const t = meta.tests, order = largest(12, i => features[i].influence);
  const right = t ? `On ${t.n.toLocaleString("en")} images that it had never seen it was right ` +
    `on ${percent(1 - t.errors / t.n, 1)}. ` : "";
  main.replaceChildren(el("h2", {}, "The story of this network"),
    el("p", {}, `A small network looks at an image and says which of ${C} classes it shows. ` +
      `${right}Nobody told it how. Inside, `, el("b", {}, `${meta.d_sae} features`), " were " +
      "found: detectors, each of which fires when it sees what it looks for, and then moves the " +
      "scores of the classes. A ", el("b", {}, "sparse autoencoder"), " (SAE) found them; only " +
      "a few fire on any image."),
    tour(), ...apart(),
    el("h2", {}, "Who does the work"),
    el("p", {}, `${plural(doing(.5), "feature")} of ${F} make half of all that single features ` +
      `do to the scores, ${doing(.9)} make 90%. The strongest:`),
    el("div", { class: "tiles" }, order.map(card)),
    soft(PORTRAIT, " Supports and opposes: what the scores lose, on the images that fire the " +
      "feature, when it is taken away."),
    el("h2", {}, "In numbers"),
    el("div", { class: "cards" }, meta.results.map(([what, value]) =>
      el("div", { class: "card" }, el("b", {}, value), what))),
    ...[diagnoses(), frontier()].flat());
}
