/* Every misclassified test image, and what would mend it. */
function habits(k, label, says) { /* what a feature does on other images, those it gets right too */
  const i = place.get(k);
  if (i === undefined) return `Feature ${k} is not on this page.`;
  const f = features[i];
  const [there, here] = [says, label].map(of => el("b", {}, signed(parts(of, i, says, label))));
  return [link(toFeature(k), `Feature ${k}`), `: on all ${many[says]} it makes `, there,
    ` of their lead over ${names[label]}, on all ${many[label]} `, here, " of that same lead. " +
    `Removed from every test image, alone, it would mend ${plural(f.fixes, "error")} and make ` +
    `${plural(f.breaks, "right prediction")} wrong.`];
}
function mending(t, label, says) {
  const off = meta.tests.fixing[t];
  if (!off.length)
    return el("p", { id: "mending" }, "No set of its features was found whose removal mends it.");
  const after = arrays.fixed_logits.subarray(t * C, (t + 1) * C), p = softmax(after);
  const only = off.length === 1 ? "this one" : `these ${off.length}`;
  return [el("p", { id: "mending", "data-off": off.join(" ") },
    `Without ${only} it would be read as `,
    el("b", {}, names[label]), ` (${sure(p[label])}): features `, off.map((k, n) => [n ? ", " : "",
      link(toFeature(k), String(k))]), ". ", drawLink(t, off, "Try it in the drawing view")),
  soft("Found greedily: the feature that helps most goes first, then needless ones are put " +
    "back. There may be a smaller set."),
  el("h3", {}, "What the same features do elsewhere"),
  el("ul", { class: "plain" }, off.map(k => el("li", {}, habits(k, label, says))))];
}
function oneError(t) {
  const label = meta.tests.labels[t], says = reading(t), p = softmax(testLogits(t));
  const rows = firing(t).map(u => ({ ...u, part: u.adds[says] - u.adds[label] }))
    .sort((a, b) => b.part - a.part);
  const guilty = rows.filter(u => u.part > 0), against = rows.filter(u => u.part < 0).reverse();
  const row = u => featureRow(u.k, u.part,
    { note: `its part of the lead of ${names[says]} over ${names[label]} here` });
  return el("div", { id: "error" },
    el("h3", {}, `Test image ${meta.tests.number[t]}: ${an(names[label])}, read as ` +
      `${names[says]} (${sure(p[says])})`),
    el("div", { class: "row" }, testDigit(t, 140), scores("", testLogits(t))),
    mending(t, label, says),
    featureRows(`Responsible: they speak for ${names[says]}`, guilty.slice(0, 6).map(row)),
    featureRows(`They speak for ${names[label]}, in vain`, against.slice(0, 4).map(row)),
    soft(ADDS, " ", NOT_SUMS));
}
function errorsView() {
  const said = meta.tests;
  if (!said) return main.replaceChildren(el("h2", {}, "Errors"), noTests());
  const n = said.shown_errors, t = asked("image", n, n ? 0 : null), label = asked("label", C, null);
  const every = [...Array(n).keys()];
  const shown = every.filter(e => label === null || said.labels[e] === label);
  const keep = label === null ? {} : { label };
  const which = n < said.errors ? `Shown are the ${n} whose own class is furthest behind. ` : "";
  const filter = choose("Errors on", [["all", to("errors"), null],
    ...classes.map(c => [`${many[c]}`, to("errors", { label: c }), c])], label);
  const chosen = shown.includes(t) ? t : shown[0];
  main.replaceChildren(el("h2", {}, "Errors"),
    el("p", {}, `${plural(said.errors, "test image")} of ${said.n.toLocaleString("en")} ` +
      `${said.errors === 1 ? "is" : "are"} misclassified. ${which}The surest error first.`),
    filter, el("div", { class: "aside wide" },
      el("div", {}, strip("Errors", shown, image => to("errors", { image, ...keep }), chosen,
        e => `${names[said.labels[e]]} → ${names[reading(e)]}`),
      soft("Under each: its class → what the network reads.")),
      chosen === undefined ? soft("None of these.") : oneError(chosen)));
}
