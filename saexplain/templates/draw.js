/* Draw, or take a test image, and switch features off. What is drawn survives a look elsewhere. */
const live = { ink: noInk(), fitted: true, image: null, pixels: new Float32Array(P), result: null,
  change: new Map(), watched: null, past: [], rub: false, last: null, down: false, order: [],
  pen: [IW / 2, IH / 2], penDown: false, keyed: false };
const shown = { tiles: new Map(), sheet: null }; /* elements, made once */

/* ---------- what happens ---------- */
function remember() {
  live.past.push({ ink: live.ink.slice(), fitted: live.fitted, image: live.image });
  if (live.past.length > 40) live.past.shift();
}
function inked() { /* the ink has changed: so do the image, the features, and everything */
  live.pixels = live.fitted ? centred(live.ink) : shrunk(live.ink);
  live.result = null;
  live.change.clear();
}
function take(t) {
  Object.assign(live, { ink: enlarged(pixelsOf(t)), fitted: false, image: t });
  inked();
}
function wipe() {
  remember();
  Object.assign(live, { ink: noInk(), fitted: true, image: null, watched: null });
  inked();
  refresh();
}
function undo() {
  if (live.past.length) { Object.assign(live, live.past.pop()); inked(); }
  refresh();
}
function mark(from, till) {
  stroke(live.ink, from, till, live.rub);
  live.image = null;
  inked();
  schedule(true);
}
function setFeature(k, value) {
  if (value === null) live.change.delete(k); else live.change.set(k, value);
}
function keepAddress() { /* a test image and what is switched is short enough for the address */
  const set = [...live.change].map(([k, v]) => `${k}:${+v.toFixed(3)}`).join(",");
  const short = live.image === null ? {} : { image: live.image, ...(set && { set }) };
  if (viewOf() === "draw") /* not where a link was followed a moment ago */
    history.replaceState(null, "", to("draw", short));
}
function readAddress() {
  const t = asked("image", tests().length, null), set = address().get("set");
  if (t !== null && t !== live.image) { remember(); take(t); }
  if (set === null) return;
  live.change.clear();
  for (const [k, v] of set.split(",").map(part => part.split(":").map(Number)))
    if (k in arrays.threshold && v >= 0) live.change.set(k, v);
}

/* ---------- what it comes to ---------- */
function compute() {
  live.result ??= { ...forward(live.pixels), without: new Map() };
  const { z, feature, logits } = live.result;
  let after = z;
  for (const [k, value] of live.change) after = moved(after, k, value - feature[k]);
  if (live.watched !== null && !(feature[live.watched] > 0)) live.watched = null;
  return live.change.size ? head(after) : logits;
}
function contribution(k, target) { /* what feature k adds to the score of `target` */
  const { z, feature, logits, without } = live.result;
  if (!without.has(k)) without.set(k, feature[k] > 0 ? head(moved(z, k, -feature[k])) : logits);
  return logits[target] - without.get(k)[target];
}

/* ---------- what is shown ---------- */
function paintInk() {
  const data = shown.data.data;
  for (let at = 0; at < live.ink.length; at++)
    data[4 * at] = data[4 * at + 1] = data[4 * at + 2] = 255 - 255 * live.ink[at];
  shown.context.putImageData(shown.data, 0, 0);
  if (live.watched !== null && !live.fitted && place.has(live.watched)) {
    const f = features[place.get(live.watched)];
    if (f.drawing) outline(shown.context, f.drawing, SUB);
  }
  if (!live.keyed) return;
  shown.context.strokeStyle = live.penDown ? "#b2182b" : "#0b5cad";
  shown.context.lineWidth = 1.5;
  shown.context.strokeRect(live.pen[0] - 5, live.pen[1] - 5, 10, 10);
}
function paintSeen() { /* what the network sees; red and blue: how it drives the watched feature */
  const i = place.get(live.watched), driven = new Float32Array(P);
  if (i !== undefined) for (let p = 0; p < P; p++) driven[p] = live.pixels[p] * heat(i, p);
  const most = driven.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-9);
  const paint = p => i === undefined ? grey(255 - 255 * live.pixels[p])
    : driving(255 * live.pixels[p], driven[p] / most);
  shown.seen.getContext("2d").putImageData(imageData(null, paint), 0, 0);
  const places = i !== undefined && features[i].drawing;
  shown.places.replaceChildren(...places ? [sketch(i, 84, shown.seen)] : []);
  write(shown.why, i === undefined ? "What the network sees" :
    `Ink that fires feature ${live.watched} (red) or holds it back (blue)` +
      (places ? "; its places" : ""));
}
function paintScores(before, after) {
  const p = softmax(after), q = softmax(before), says = argmax(p), said = argmax(q);
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
    label.style.fontWeight = c === says ? 700 : 400;
    write(value, `${signed(after[c])} (${sure(p[c])})`);
  }
  write(shown.axis, `scores from ${low} to ${high}; thin line: without your changes`);
  write(shown.says, `The network says ${names[said]} (${sure(q[said])})`);
  write(shown.changed, live.change.size ? `with your changes ${names[says]} (${sure(p[says])})`
    : "switch features off to change that");
  const alone = softmax(head(through(live.result.feature))), best = argmax(alone);
  write(shown.through, `From its features alone: ${names[best]} (${sure(alone[best])}).`);
  shown.says.dataset.logits = before.join(" ");
  shown.changed.dataset.logits = after.join(" ");
}
function tileOf(k) {
  if (shown.tiles.has(k)) return shown.tiles.get(k);
  const i = place.get(k), f = features[i] ?? null, title = link(toFeature(k), `Feature ${k}`);
  const slider = el("input", { type: "range", id: `set${k}`, min: 0, step: "any",
    "aria-label": `activation of feature ${k}`,
    oninput: () => { setFeature(k, Number(slider.value)); schedule(); } });
  const flip = button("off", () => { setFeature(k, live.change.get(k) === 0 ? null : 0); refresh();
    },
    { id: `flip${k}` });
  const watch = button("places", () => { live.watched = live.watched === k ? null : k; refresh(); },
    { id: `watch${k}`, "aria-label": `show where feature ${k} is on the drawing` });
  const value = el("span", {}), adding = el("b", {});
  const node = el("li", { class: "unit", "data-feature": k }, i === undefined ? el("span")
    : portrait(i, 56),
    el("div", {}, el("div", { class: "controls" }, f ? title : `Feature ${k}`, adding),
      f && el("div", { class: "words" }, looksFor(f)), slider,
      el("div", { class: "controls" }, flip, watch, value)));
  const tile = { node, slider, flip, watch, value, adding };
  shown.tiles.set(k, tile);
  return tile;
}
function write(node, text) { /* what stays the same costs no layout */
  if (node.textContent !== text) node.textContent = text;
}
function paintTile(k, target) {
  const { node, slider, flip, watch, value, adding } = tileOf(k), f = features[place.get(k)];
  const v = live.result.feature[k], now = live.change.get(k) ?? v, add = contribution(k, target);
  const most = Math.max(2 * v, f?.largest ?? 1, now, 1), watched = String(live.watched === k);
  if (Number(slider.max) !== most) slider.max = most;
  if (Number(slider.value) !== now) slider.value = now;
  write(value, now === v ? v.toFixed(2) : `${v.toFixed(2)}→${now.toFixed(2)}`);
  write(adding, signed(add));
  adding.className = add < 0 ? "minus" : "plus";
  node.classList.toggle("off", now === 0);
  if (watch.getAttribute("aria-pressed") !== watched) watch.setAttribute("aria-pressed", watched);
  const way = now === 0 ? "on" : "off";
  if (flip.textContent === way) return;
  flip.textContent = way;
  flip.setAttribute("aria-label", `switch feature ${k} ${way}`);
}
function arrange(list, nodes) { /* only what is new or has moved is touched, so focus stays */
  const wanted = new Set(nodes);
  for (const node of [...list.children]) if (!wanted.has(node)) node.remove();
  nodes.forEach((node, n) => {
    if (list.children[n] !== node) list.insertBefore(node, list.children[n] ?? null);
  });
}
function paintTiles(target) {
  const { feature } = live.result, firing = new Set(live.change.keys());
  feature.forEach((v, k) => { if (v > 0) firing.add(k); });
  const size = new Map([...firing].map(k => [k, Math.abs(contribution(k, target))]));
  /* While one draws or drags, what is there keeps its place. */
  const known = live.down || live.change.size ? live.order.filter(k => firing.has(k)) : [];
  const fresh = [...firing].filter(k => !known.includes(k));
  live.order = [...known, ...fresh.sort((a, b) => size.get(b) - size.get(a))];
  for (const k of live.order) paintTile(k, target);
  const focused = document.activeElement?.id;
  arrange(byId("active"), live.order.map(k => tileOf(k).node));
  if (focused && document.activeElement?.id !== focused) byId(focused)?.focus();
  write(byId("count"), `${plural(live.order.length, "feature")} fire; right, what each adds to ` +
    `the score of ${names[target]} (or takes from it); sliders: 0 is off.`);
}
function refresh() {
  const blank = !live.pixels.some(v => v > 0), after = compute(), { logits } = live.result;
  const target = argmax([...logits]);
  paintInk();
  paintSeen();
  paintScores(logits, after);
  shown.empty.hidden = !blank;
  if (blank) { byId("active").replaceChildren(); write(byId("count"), ""); }
  else paintTiles(target);
  byId("undo").disabled = !live.past.length;
  if (!live.down) keepAddress();
}
let waiting = false;
function schedule() {
  if (!waiting) requestAnimationFrame(() => { waiting = false; if (current === "draw") refresh();
    });
  waiting = true;
}

/* ---------- the canvas, by pointer and by keyboard ---------- */
function pointer(canvas) {
  const at = e => {
    const box = canvas.getBoundingClientRect();
    return [(e.clientX - box.left - 2) * IW / (box.width - 4),
      (e.clientY - box.top - 2) * IH / (box.height - 4)];
  };
  const line = e => { const here = at(e); mark(live.last ?? here, here); live.last = here; };
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    remember();
    Object.assign(live, { last: null, down: true, keyed: false });
    line(e);
  });
  canvas.addEventListener("pointermove", e => { if (e.buttons && live.down) line(e); });
  const up = () => { if (live.down) { live.down = false; live.order = []; schedule(); } };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
}
function penKeys(e) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
  if (e.key !== " " && !by) return;
  e.preventDefault();
  live.keyed = true;
  if (e.key === " ") {
    live.penDown = !live.penDown;
    if (live.penDown) { remember(); mark(live.pen, live.pen); }
    say(live.penDown ? "pen down" : "pen up");
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
  if (live.penDown) { live.penDown = false; say("pen up"); }
  else if (live.watched !== null) live.watched = null;
  else if (live.change.size) live.change.clear();
  else return void (location.hash = to("story"));
  refresh();
}
function build() {
  const bar = el("ul", { class: "bars" });
  Object.assign(shown, { bars: bar, axis: soft(""), through: soft(""),
    says: el("span", { id: "says" }), changed: el("b", { id: "changed" }), rows: "",
    why: soft(""), places: el("div", {}),
    empty: el("p", { id: "empty" }, "Draw in the square, or take a test image."),
    seen: picture("what the network sees", 84, null, () => [255, 255, 255]) });
  const rub = button("eraser", () => {
    live.rub = !live.rub;
    rub.setAttribute("aria-pressed", live.rub);
  }, { id: "rub", "aria-pressed": "false" });
  const controls = el("div", { class: "controls" }, button("undo", undo, { id: "undo" }), rub,
    button("clear", wipe, { id: "clear" }));
  const forget = () => { live.change.clear(); refresh(); };
  const reset = button("undo my changes", forget, { id: "reset" });
  const some = [...tests().filter(t => !isError(t)), ...tests().filter(isError).slice(0, 20)];
  const words = t => name(meta.tests.labels[t]) + (isError(t) ? ", error" : "");
  const pick = strip("Test images", some, t => to("draw", { image: t }), null, words);
  shown.sheet = [el("div", { id: "drawing" },
    el("div", {}, sheet(), controls, soft("By keyboard: arrows move the pen (Shift: finely), " +
      "space puts it down or lifts it. A drawing is centred and scaled as the network's images " +
      "were; a test image is taken as it is, and can be edited."),
    el("div", { class: "controls" }, shown.seen, shown.places), shown.why),
    el("div", { id: "predictions" }, shown.empty, el("p", {}, shown.says, ", ", shown.changed, "."),
      bar, shown.axis, shown.through),
    el("div", {}, el("div", { class: "controls" }, el("h3", {}, "What fires"), reset),
      el("p", { id: "count", class: "small soft" }),
      el("ul", { class: "units", id: "active" }))),
  el("h3", {}, "Or take a test image, and change it"), meta.tests ? pick : noTests()];
}
function drawView() {
  const why = meta.without_drawing || "This page was written without the network's weights.";
  if (!meta.network) {
    return main.replaceChildren(el("h2", {}, "Draw"), el("p", { id: "without" }, "There is " +
      `nothing to draw on here: ${why} All else on this page was computed when it was written.`));
  }
  if (!shown.sheet) build();
  main.replaceChildren(el("h2", {}, "Draw, and look inside"), ...shown.sheet);
  readAddress();
  refresh();
}
