/* A test image: which features are active where, and the scores without one of them. */
const looking = { t: null, at: null, pinned: false, k: null, parts: {} };
const hasPlaces = () => "at_start" in arrays;
/* The features at position `at` of test image t, strongest first: [i, activation]. */
function activeAt(at, t = looking.t) {
  const row = WHERE.tests.indexOf(t) * (CELLS + WHERE.n_prefix) + at, found = [];
  for (let n = arrays.at_start[row]; n < arrays.at_start[row + 1]; n++) {
    const i = arrays.at_feature[n];
    found.push([i, arrays.at_activation[n] / 255 * features[i].largest]);
  }
  return found.sort((a, b) => b[1] - a[1]);
}
/* Feature i over the grid of test image t, as far as it is among the strongest. */
function mapOnImage(i, t = looking.t) {
  const values = new Uint8Array(CELLS);
  for (let at = 0; at < CELLS; at++) for (const [j, v] of activeAt(at, t))
    if (j === i) values[at] = 255 * v / features[i].largest;
  return values;
}
const positionWords = at => at >= CELLS ? `prefix token ${at - CELLS + 1}`
  : `row ${Math.floor(at / GW) + 1}, column ${at % GW + 1}`;
function paintLooking(k = looking.k) { /* the image with the map of feature k */
  const { t, at, parts } = looking, context = parts.canvas.getContext("2d");
  const i = k === null ? undefined : position.get(k);
  const under = overlaid("tests", t, i === undefined || !hasPlaces() ? null : mapOnImage(i), "", 0,
    null), { width, height } = parts.canvas;
  context.imageSmoothingEnabled = Boolean(LOOK.color);
  context.drawImage(under, 0, 0, width, height);
  if (at === null || at >= CELLS) return;
  const [x, y] = [at % GW * width / GW, Math.floor(at / GW) * height / GH];
  for (const [color, thick] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.strokeRect(x + 2, y + 2, width / GW - 4, height / GH - 4);
  }
}
function removeIt(k) {
  looking.k = looking.k === k ? null : k;
  showLooking();
}
function lookingRow(k, value, add) {
  const i = position.get(k), off = looking.k === k;
  const show = { onpointerenter: () => paintLooking(k), onpointerleave: () => paintLooking() };
  return el("li", { class: "unit", "data-feature": k, ...show },
    i === undefined ? el("span") : face(i, 64),
    el("div", {}, i === undefined ? `Feature ${k}` : link(toFeature(k), `Feature ${k}`),
      i === undefined ? "" : `: ${inkCaption(features[i])}`, el("br"), el("span", { class: "soft" },
        value === null ? "" : `activation ${number(value)}`,
        add === null ? "" : `${value === null ? "" : "; "}adds ${signed(add)} to ` +
          `${names[predicted(looking.t)]}`)),
    button(off ? "put back" : "remove", () => removeIt(k),
      { id: `remove${k}`, "aria-pressed": String(off) }));
}
function showLooking() {
  const { t, at, k, parts } = looking, active = activeOn(t), to_ = predicted(t);
  const adds = new Map(active.map(u => [u.k, u.adds]));
  const before = testLogits(t), own = adds.get(k);
  const after = own ? before.map((v, c) => v - own[c]) : before;
  paintLooking();
  const list = at === null
    ? [...active].sort((a, b) => Math.abs(b.adds[to_]) - Math.abs(a.adds[to_])).slice(0, 20)
      .map(u => lookingRow(u.k, u.activation, u.adds[to_]))
    : activeAt(at).map(([i, v]) => lookingRow(features[i].feature, v,
      adds.get(features[i].feature)?.[to_] ?? null));
  const back = document.activeElement?.id;
  parts.title.textContent = at === null ? "Active anywhere, the largest contributions first"
    : `Active at ${positionWords(at)}, the strongest first`;
  parts.list.replaceChildren(...list.length ? list : [note("No feature of this page is active " +
    "there.")]);
  parts.logits.replaceChildren(logitBars(k === null ? "Scores" : `Scores without feature ${k}`,
    after, k === null ? {} : { before, note: "The thin lines mark the scores before." }));
  parts.all.hidden = at === null;
  if (back && document.activeElement?.id !== back) byId(back)?.focus({ preventScroll: true });
}
function choosePosition(at, pinned) {
  if (at === looking.at && pinned === looking.pinned) return;
  Object.assign(looking, { at, pinned });
  showLooking();
}
function lookingCanvas() {
  const wide = 336, canvas = el("canvas", { id: "looking", width: wide,
    height: Math.round(wide * H / W), tabindex: hasPlaces() ? 0 : null, role: "application",
    "aria-label": hasPlaces() ? "The image. Arrow keys move over its positions." : "The image" });
  if (!hasPlaces()) return canvas;
  const at = e => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((e.clientX - box.left) / box.width * GW);
    const y = Math.floor((e.clientY - box.top) / box.height * GH);
    return Math.max(0, Math.min(GH - 1, y)) * GW + Math.max(0, Math.min(GW - 1, x));
  };
  canvas.addEventListener("pointermove", e => {
    if (!looking.pinned && e.pointerType === "mouse") choosePosition(at(e), false);
  });
  canvas.addEventListener("pointerleave", e => {
    if (!looking.pinned && e.pointerType === "mouse") choosePosition(null, false);
  });
  canvas.addEventListener("click", e => {
    const here = at(e), again = looking.pinned && here === looking.at;
    choosePosition(again ? null : here, !again);
  });
  canvas.addEventListener("keydown", e => {
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0],
      ArrowDown: [1, 0] }[e.key] ?? [];
    if (down === undefined) return;
    e.preventDefault();
    const from = looking.at === null || looking.at >= CELLS ? null
      : [Math.floor(looking.at / GW), looking.at % GW];
    const [y, x] = from ? [from[0] + down, from[1] + right] : [GH >> 1, GW >> 1];
    choosePosition(Math.max(0, Math.min(GH - 1, y)) * GW + Math.max(0, Math.min(GW - 1, x)), true);
    announce(`${positionWords(looking.at)}: ${plural(activeAt(looking.at).length, "feature")}`);
  });
  return canvas;
}
function imagesView() {
  if (!meta.tests) return showMain(el("h2", {}, "Images"), noTests());
  const listed = WHERE.tests, t = fromAddress("image", tests().length, listed[0]);
  if (t !== looking.t) Object.assign(looking, { t, at: null, pinned: false, k: null });
  const parts = looking.parts = { canvas: lookingCanvas(), title: el("h3"), list: el("ul",
    { class: "units", id: "activeHere" }), logits: el("div", { "aria-live": "polite" }),
  all: button("all features of this image", () => choosePosition(null, false)) };
  const prefix = hasPlaces() && WHERE.n_prefix ? el("div", { class: "controls wrap" },
    [...Array(WHERE.n_prefix).keys()].map(n => button(`prefix token ${n + 1}`,
      () => choosePosition(CELLS + n, true)))) : "";
  const label = meta.tests.labels[t], now = predicted(t);
  const words = s => isError(s) ? `${name(meta.tests.labels[s])} → ${name(predicted(s))}`
    : name(meta.tests.labels[s]);
  const how = hasPlaces() ? "Point at a position, tap it, or move with the arrow keys: the list " +
    `shows the features active there, at most ${WHERE.per_position}. Point at a feature to see ` +
    "its map. " : "";
  showMain(el("h2", {}, "Images"),
    el("p", {}, `Test image ${meta.tests.number[t]}: ${an(names[label])}, classified as `,
      el("b", {}, names[now]), ` (${probability(softmax(testLogits(t))[now])}). ${how}` +
      "“Remove” shows the scores without a feature, as the network itself computes them."),
    el("div", { class: "looking" }, el("div", { class: "pinned" }, parts.canvas,
      el("div", { class: "controls wrap" }, prefix, parts.all), mapSwitch(), parts.logits),
    el("div", {}, parts.title, parts.list)),
    el("h3", {}, "Choose a test image"),
    strip("Test images", listed, image => to("images", { image }), t, words),
    note(CONTRIBUTION, " ", NOT_ADDITIVE));
  showLooking();
}
