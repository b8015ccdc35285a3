/* Draw, or load a test image, and switch features off. A drawing survives a change of view. */
const live = { ink: blankInk(), fitted: true, image: null, pixels: new Float32Array(P),
  result: null, change: new Map(), watched: null, past: [], erase: false, last: null,
  down: false, order: [], pen: [IW / 2, IH / 2], penDown: false, keyed: false,
  pins: new Set() }; /* features that stay listed */
const shown = { tiles: new Map(), sheet: null }; /* elements, made once */

/* ---------- actions ---------- */
function remember() {
  live.past.push({ ink: live.ink.slice(), fitted: live.fitted, image: live.image });
  if (live.past.length > 40) live.past.shift();
}
function inkChanged() { /* the image and all that depends on it must be computed anew */
  live.pixels = live.fitted ? centered(live.ink) : shrunk(live.ink);
  live.result = null;
  live.change.clear();
}
function loadTest(t) {
  Object.assign(live, { ink: enlarged(pixelsOf(t)), fitted: false, image: t });
  inkChanged();
}
function clearDrawing() {
  remember();
  Object.assign(live, { ink: blankInk(), fitted: true, image: null, watched: null });
  inkChanged();
  refresh();
}
function undo() {
  if (live.past.length) { Object.assign(live, live.past.pop()); inkChanged(); }
  refresh();
}
function mark(from, till) {
  stroke(live.ink, from, till, live.erase);
  live.image = null;
  inkChanged();
  schedule(true);
}
function setFeature(k, value) {
  if (value === null) live.change.delete(k); else live.change.set(k, value);
}
const isFeature = text => /^\d+$/.test(text) && Number(text) < meta.d_sae;
function pin(k) {
  if (!live.pins.delete(k)) live.pins.add(k);
  live.order = [];
  refresh();
}
function keepAddress() { /* a test image, changed and pinned features fit into the address */
  const set = [...live.change].map(([k, v]) => `${k}:${+v.toFixed(3)}`).join(",");
  const short = live.image === null ? {} : { image: live.image, ...(set && { set }) };
  if (live.pins.size) short.pin = [...live.pins].join(",");
  if (viewOf() === "draw") /* not where a link was followed a moment ago */
    history.replaceState(null, "", to("draw", short));
}
function readAddress() {
  const t = fromAddress("image", tests().length, null), set = address().get("set");
  const pins = address().get("pin");
  if (t !== null && t !== live.image) { remember(); loadTest(t); }
  if (pins !== null) live.pins = new Set(pins.split(",").filter(isFeature).map(Number));
  if (set === null) return;
  live.change.clear();
  for (const [k, v] of set.split(",").map(part => part.split(":").map(Number)))
    if (k in arrays.threshold && v >= 0 && v <= 1e6) live.change.set(k, v);
    else misreadField("set");
}

/* ---------- numbers ---------- */
function compute() {
  live.result ??= { ...forward(live.pixels), without: new Map() };
  const { z, feature, logits } = live.result;
  let after = z;
  for (const [k, value] of live.change) after = withAdded(after, k, value - feature[k]);
  if (live.watched !== null && !(feature[live.watched] > 0)) live.watched = null;
  return live.change.size ? head(after) : logits;
}
function contribution(k, target) { /* of feature k to the score of `target` */
  const { z, feature, logits, without } = live.result;
  if (!without.has(k)) without.set(k, feature[k] > 0 ? head(withAdded(z, k, -feature[k])) : logits);
  return logits[target] - without.get(k)[target];
}

/* ---------- display ---------- */
function paintInk() {
  const data = shown.data.data;
  for (let at = 0; at < live.ink.length; at++)
    data[4 * at] = data[4 * at + 1] = data[4 * at + 2] = 255 - 255 * live.ink[at];
  shown.context.putImageData(shown.data, 0, 0);
  if (live.watched !== null && !live.fitted && position.has(live.watched)) {
    tint(shown.context, drawingOf(position.get(live.watched)), SUB * CELL);
  }
  if (!live.keyed) return;
  shown.context.strokeStyle = live.penDown ? "#b2182b" : "#0b5cad";
  shown.context.lineWidth = 1.5;
  shown.context.strokeRect(live.pen[0] - 5, live.pen[1] - 5, 10, 10);
}
function paintInput() { /* the network's input, colored by its effect on the watched feature */
  const i = position.get(live.watched), driven = new Float32Array(P);
  if (i !== undefined) for (let p = 0; p < P; p++) driven[p] = live.pixels[p] * heat(i, p);
  const most = driven.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-9);
  const paint = p => i === undefined ? gray(255 - 255 * live.pixels[p])
    : driving(255 * live.pixels[p], driven[p] / most);
  shown.input.getContext("2d").putImageData(imageData(null, paint), 0, 0);
  const places = i !== undefined && isDrawn(i);
  shown.places.replaceChildren(...places ? [sketch(i, 72, p => 255 - 255 * live.pixels[p])] : []);
  shown.inputNote.hidden = i === undefined;
  write(shown.inputNote, i === undefined ? "" : `Left: ink that raises feature ${live.watched} ` +
    "(red) or lowers it (blue)" + (places ? "; right: the drawing of its hypothesis" : ""));
}
function paintLogits(before, after) {
  const p = softmax(after), q = softmax(before), now = argmax(p), first = argmax(q);
  const rows = shownClasses(before);
  if (String(rows) !== shown.rows) {
    shown.rows = String(rows);
    const span = (kind, ...words) => el("span", { class: kind }, ...words);
    shown.lines = rows.map(c => [c, span("label", names[c]), span("bar"), span("zero"),
      span("before"), span("value")]);
    shown.bars.replaceChildren(...shown.lines.map(([, label, bar, zero, old, value]) =>
      el("li", {}, label, el("span", { class: "track" }, bar, zero, old), value)));
  }
  const every = rows.flatMap(c => [before[c], after[c], 0]);
  const low = 5 * Math.floor(Math.min(...every) / 5);
  const high = 5 * Math.ceil(Math.max(...every) / 5) || 5;
  const at = v => 100 * (v - low) / (high - low), zero0 = at(0);
  for (const [c, label, bar, zero, old, value] of shown.lines) {
    const x = at(after[c]);
    bar.style.left = `${Math.min(x, zero0)}%`;
    bar.style.width = `${Math.abs(x - zero0)}%`;
    bar.className = after[c] < 0 ? "bar minus" : "bar";
    zero.style.left = `${zero0}%`;
    old.style.left = `${at(before[c])}%`;
    label.style.fontWeight = c === now ? 700 : 400;
    write(value, `${signed(after[c])} (${probability(p[c])})`);
  }
  write(shown.axis, `scores from ${number(low).replace("-", "−")} to ${high}; thin line: ` +
    "unchanged");
  write(shown.prediction, `Prediction: ${names[first]} (${probability(q[first])})`);
  write(shown.changed, live.change.size
    ? `, changed: ${names[now]} (${probability(p[now])})` : "");
  const spliced = softmax(head(reconstruct(live.result.feature))), best = argmax(spliced);
  write(shown.spliced, `With the SAE's reconstruction in place of the activations: ` +
    `${names[best]} (${probability(spliced[best])}).`);
  shown.prediction.dataset.logits = before.join(" ");
  shown.changed.dataset.logits = after.join(" ");
}
function tileOf(k) {
  if (shown.tiles.has(k)) return shown.tiles.get(k);
  const i = position.get(k), f = features[i] ?? null, title = featureLink(k, `Feature ${k}`);
  const slider = el("input", { type: "range", id: `set${k}`, min: 0, step: "any",
    "aria-label": `activation of feature ${k}`,
    oninput: () => { setFeature(k, Number(slider.value)); schedule(); } });
  const flip = button("off", () => {
    setFeature(k, live.change.get(k) === 0 ? null : 0);
    refresh();
  }, { id: `flip${k}` });
  const watchIt = () => { live.watched = live.watched === k ? null : k; refresh(); };
  const watch = button("why?", watchIt, { id: `watch${k}`,
    title: "shows which ink of the image raises or lowers it",
    "aria-label": `why? The ink that raises or lowers feature ${k}` });
  const pinIt = button("pin", () => pin(k),
    { id: `pin${k}`, title: "keeps it in this list, also where it is inactive" });
  const value = el("span", { class: "soft" }), adding = el("b", {});
  const far = el("span", {}), bar = el("span", { class: "bar minus" });
  const below = el("div", { class: "below small soft" }, far, el("span", { class: "track",
    "aria-hidden": "true" }, bar));
  const node = el("li", { class: "unit", "data-feature": k }, i === undefined ? el("span")
    : face(i, 56),
    el("div", {}, el("div", { class: "controls" }, el("span", {}, title), value, adding),
      f && el("div", { class: "words" }, inkCaption(f)),
      below, el("div", { class: "controls" }, flip, slider, watch, pinIt)));
  const tile = { node, slider, flip, watch, value, adding, pinIt, below, far, bar };
  shown.tiles.set(k, tile);
  return tile;
}
function write(node, text) { /* unchanged text costs no layout */
  if (node.textContent !== text) node.textContent = text;
}
function press(node, isPressed) {
  if (node.getAttribute("aria-pressed") !== String(isPressed))
    node.setAttribute("aria-pressed", String(isPressed));
}
/* How far an inactive feature is from its threshold, in words and as a bar that is full there. */
function paintDistance({ below, far, bar }, k) {
  const distance = arrays.threshold[k] - live.result.before[k];
  const most = Math.max(features[position.get(k)]?.largest ?? 0, arrays.threshold[k], distance);
  below.hidden = live.result.feature[k] > 0;
  below.dataset.distance = distance;
  write(far, `inactive, ${distance.toFixed(2)} below its threshold`);
  bar.style.width = `${100 * (1 - distance / most)}%`;
}
function paintTile(k, target, isBlank) {
  const tile = tileOf(k), { node, slider, flip, watch, value, adding, pinIt } = tile;
  const f = features[position.get(k)], v = live.result.feature[k], now = live.change.get(k) ?? v;
  const most = Math.max(2 * v, f?.largest ?? 1, now, 1), add = contribution(k, target);
  if (Number(slider.max) !== most) slider.max = most;
  if (Number(slider.value) !== now) slider.value = now;
  write(value, now === v ? v ? v.toFixed(2) : ""
    : `${v.toFixed(2)}→${now ? now.toFixed(2) : 0}`);
  write(adding, v ? signed(add) : "");
  adding.className = add < 0 ? "minus" : "plus";
  paintDistance(tile, k);
  node.classList.toggle("off", now === 0 && v > 0);
  flip.disabled = !v && !live.change.has(k);
  slider.disabled = isBlank;
  watch.hidden = !position.has(k);
  press(watch, live.watched === k);
  press(pinIt, live.pins.has(k));
  const way = now === 0 && v ? "on" : "off";
  if (flip.textContent === way && flip.hasAttribute("aria-label")) return;
  write(flip, way);
  flip.setAttribute("aria-label", `switch feature ${k} ${way}`);
  pinIt.setAttribute("aria-label", `pin feature ${k}`);
}
function arrange(list, nodes) { /* moves only nodes out of place, so that focus stays */
  const wanted = new Set(nodes);
  for (const node of [...list.children]) if (!wanted.has(node)) node.remove();
  nodes.forEach((node, n) => {
    if (list.children[n] !== node) list.insertBefore(node, list.children[n] ?? null);
  });
}
function paintTiles(target, isBlank) {
  const { feature } = live.result, active = new Set([...live.pins, ...live.change.keys()]);
  if (!isBlank) feature.forEach((v, k) => { if (v > 0) active.add(k); });
  const size = new Map([...active].map(k => [k, live.pins.has(k) ? Infinity
    : Math.abs(contribution(k, target))]));
  /* During a stroke or a drag the tiles on the page keep their order. */
  const known = live.down || live.change.size ? live.order.filter(k => active.has(k)) : [];
  const fresh = [...active].filter(k => !known.includes(k));
  live.order = [...known, ...fresh.sort((a, b) => size.get(b) - size.get(a) || 0)];
  for (const k of live.order) paintTile(k, target, isBlank);
  const focused = document.activeElement?.id;
  arrange(byId("active"), live.order.map(k => tileOf(k).node));
  if (focused && document.activeElement?.id !== focused) byId(focused)?.focus();
  const n = isBlank ? 0 : feature.reduce((sum, v) => sum + (v > 0), 0);
  write(byId("count"), isBlank ? "No feature is active yet."
    : `${n} active; each with its activation, and how far the score for ${names[target]} falls ` +
      "without it");
}
function refresh() {
  const blank = !live.pixels.some(v => v > 0), after = compute(), { logits } = live.result;
  paintInk();
  paintInput();
  paintLogits(logits, after);
  shown.empty.hidden = !blank;
  shown.outcome.hidden = shown.spliced.hidden = blank;
  paintTiles(argmax([...logits]), blank);
  byId("undo").disabled = !live.past.length;
  if (!live.down) keepAddress();
}
let waiting = false;
function schedule() {
  if (!waiting) requestAnimationFrame(() => {
    waiting = false;
    if (current === "draw") refresh();
    if (current === "write") showWriting();
  });
  waiting = true;
}

/* ---------- the canvas, by pointer and by keyboard ---------- */
function pointer(canvas) {
  const line = ([x, y]) => {
    const here = [x * IW, y * IH];
    mark(live.last ?? here, here);
    live.last = here;
  };
  paintable(canvas, { line, down: () => {
    remember();
    Object.assign(live, { last: null, down: true, keyed: false });
  }, up: () => { live.down = false; live.order = []; schedule(); } });
}
function penKeys(e) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
  if (e.key !== " " && !by) return;
  e.preventDefault();
  live.keyed = true;
  if (e.key === " ") {
    live.penDown = !live.penDown;
    if (live.penDown) { remember(); mark(live.pen, live.pen); }
    announce(live.penDown ? "pen down" : "pen up");
  } else {
    const far = e.shiftKey ? 1 : SUB, from = live.pen, fit = (v, n) => Math.max(0, Math.min(n, v));
    live.pen = [fit(from[0] + far * by[0], IW), fit(from[1] + far * by[1], IH)];
    if (live.penDown) mark(from, live.pen);
  }
  schedule();
}
function sheet() {
  const label = "The drawing. Arrow keys move the pen, space puts it down or lifts it, Escape " +
    "lifts it.";
  const canvas = el("canvas", { id: "draw", width: IW, height: IH, tabindex: 0, role: "application",
    "aria-label": label, onkeydown: penKeys, onfocus: e => {
      if (e.target.matches(":focus-visible")) { live.keyed = true; schedule(); }
    }, onblur: () => { live.keyed = live.penDown = false; schedule(); } });
  pointer(canvas);
  shown.context = canvas.getContext("2d", { willReadFrequently: true });
  shown.data = new ImageData(new Uint8ClampedArray(4 * IW * IH).fill(255), IW, IH);
  return canvas;
}
function leaveDrawing() {
  if (live.penDown) { live.penDown = false; announce("pen up"); }
  else if (live.watched !== null) live.watched = null;
  else if (live.change.size) live.change.clear();
  else return void (location.hash = to("story"));
  refresh();
}
function pinForm() {
  const field = el("input", { type: "number", id: "pinNumber", min: 0, max: meta.d_sae - 1,
    required: true, placeholder: `0 to ${meta.d_sae - 1}`, "aria-label": "number of a feature" });
  const add = e => {
    e.preventDefault();
    if (isFeature(field.value) && !live.pins.has(Number(field.value))) pin(Number(field.value));
    field.value = "";
  };
  return el("form", { class: "controls", onsubmit: add }, field,
    el("button", { id: "pinIt" }, "pin number"));
}
function build() {
  const bar = el("ul", { class: "bars" });
  Object.assign(shown, { bars: bar, axis: note(""), spliced: note(""),
    prediction: el("span", { id: "prediction" }), changed: el("b", { id: "changed" }), rows: "",
    inputNote: note(""), places: el("div", {}),
    empty: el("p", { id: "empty", class: "big" }, "Draw something"),
    input: picture("the network's input", 72, null, () => [255, 255, 255]) });
  shown.outcome = el("div", {}, el("p", {}, shown.prediction, shown.changed), bar, shown.axis);
  const eraser = button("eraser", () => {
    live.erase = !live.erase;
    eraser.setAttribute("aria-pressed", live.erase);
  }, { id: "eraser", "aria-pressed": "false" });
  const controls = el("div", { class: "controls wrap" }, button("undo", undo, { id: "undo" }),
    eraser, button("clear", clearDrawing, { id: "clear" }));
  const reset = button("reset", () => { live.change.clear(); refresh(); },
    { id: "reset", "aria-label": "reset features" });
  const some = [...tests().filter(t => !isError(t)), ...tests().filter(isError).slice(0, 20)];
  const words = t => name(meta.tests.labels[t]) + (isError(t) ? ", error" : "");
  const pick = strip("Test images", some, t => to("draw", { image: t }), null, words);
  shown.sheet = [el("div", { id: "drawing" },
    el("div", { id: "sheet" }, sheet(), el("div", {}, controls,
      el("div", { class: "controls" }, el("figure", {}, shown.input,
        el("figcaption", { class: "small soft" }, "as it is read")), shown.places))),
    el("div", { id: "predictions" }, shown.empty, shown.outcome, shown.inputNote),
    el("div", {}, el("div", { class: "controls wrap" }, el("h3", {}, "Features"), reset,
      pinForm()), el("p", { id: "count", class: "small soft" }),
    el("ul", { class: "units", id: "active", "aria-label": "Features", tabindex: 0 }))),
  shown.spliced, el("h3", {}, "Or choose a test image, and change it"), meta.tests ? pick
    : noTests(), note("A slider sets the activation of a feature; pinned features stay listed, " +
    "also where they are inactive. By keyboard: arrows move the pen (Shift: finely), space puts " +
    "it down or lifts it. A drawing is centered and scaled like the images of MNIST; a test " +
    "image is used as it is, and can be edited.")];
}
function drawView() {
  const why = meta.without_drawing || "This page was written without the network's weights.";
  if (!meta.network) {
    return showMain(el("h2", {}, "Draw"), el("p", { id: "without" }, why));
  }
  if (!shown.sheet) build();
  showMain(el("h2", { class: "unseen" }, "Draw an image"), ...shown.sheet);
  readAddress();
  refresh();
}
