/* Elements, pictures and bars. */
const main = document.getElementById("main");
const byId = id => document.getElementById(id);
function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (![null, undefined, false].includes(value)) node.setAttribute(name, value);
  }
  const wanted = children.flat(9).filter(child => ![null, undefined, "", false].includes(child));
  node.append(...wanted);
  return node;
}
const el = (tag, attributes = {}, ...children) =>
  put(document.createElement(tag), attributes, children);
const showMain = (...children) => {
  main.replaceChildren();
  put(main, {}, children);
};
const svg = (tag, attributes = {}, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const announce = words => { byId("status").textContent = words; };
const note = (...words) => el("p", { class: "small soft" }, ...words);
const button = (text, onclick, more = {}) =>
  el("button", { type: "button", onclick, ...more }, text);

/* Calls down(), line([x, y]) at each place from 0 to 1, and up(), as a pointer paints. */
function paintable(canvas, { down, line, up }) {
  let painting = false;
  const at = e => {
    const box = canvas.getBoundingClientRect(); /* with a border of 2 pixels */
    return [(e.clientX - box.left - 2) / (box.width - 4),
      (e.clientY - box.top - 2) / (box.height - 4)];
  };
  const end = () => { if (painting) { painting = false; up(); } };
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    painting = true;
    down();
    line(at(e));
  });
  canvas.addEventListener("pointermove", e => { if (painting && e.buttons) line(at(e)); });
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
}

/* ---------- words ---------- */
function percent(x, digits = 1) {
  return x === null || x === undefined ? "none" : (100 * x).toFixed(digits) + "%";
}
const probability = p => p > .995 ? ">99%" : p < .005 ? "<1%" : percent(p, 0);
function number(x) {
  if (Number.isInteger(x)) return (x || 0).toLocaleString("en"); /* -0 is 0 */
  return Math.abs(x) < .001 ? x.toExponential(1) : x.toFixed(Math.abs(x) < 1 ? 3 : 2);
}
const sign = x => x >= .005 ? "+" : x <= -.005 ? "−" : "";
const signed = x => Number.isNaN(x) ? "small" : sign(x) + Math.abs(x).toFixed(2);
const auroc = a => (Math.floor(a * 1000) / 1000).toFixed(3); /* never rounded up to 1 */
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const name = c => c === null || c === undefined ? "none" : names[c];

/* ---------- the address ---------- */
const address = () => new URLSearchParams(location.hash.slice(1));
const to = (view, more = {}) => "#" +
  new URLSearchParams({ view, ...more }).toString().replaceAll("%2C", ",").replaceAll("%3A", ":");
const toFeature = k => to("feature", { feature: k });
const link = (href, ...words) => el("a", { href }, ...words);
/* A link to feature k, or the words alone where it is not on this page. */
const featureLink = (k, words) => position.has(k) ? link(toFeature(k), words) : words;
/* Links, or, where they would be many, a list to choose from. */
function chooser(label, links, chosen) {
  if (links.length <= 21) return linkBar(label, links, chosen);
  return el("select", { id: label.replaceAll(" ", ""), "aria-label": label,
    onchange: e => { location.hash = e.target.value; } }, links.map(([text, href, value]) =>
    el("option", { value: href, title: fullNames.get(text), selected: value === chosen }, text)));
}
const linkBar = (label, links, chosen) => el("nav", { "aria-label": label },
  links.map(([text, href, value]) => el("a", { href, title: fullNames.get(text),
    "aria-current": value === chosen && "true" }, text)));

/* ---------- pictures ---------- */
const painted = new Map();
function imageData(key, paint, w = W, h = H) { /* cached by key; null: not cached */
  if (painted.has(key)) return painted.get(key);
  const pixels = new ImageData(w, h);
  for (let p = 0; p < w * h; p++) {
    const [r, g, b] = paint(p);
    pixels.data.set([r, g, b, 255], 4 * p);
  }
  if (key !== null) painted.set(key, pixels);
  return pixels;
}
function picture(label, size, key, paint, w = W, h = H) { /* no label: described beside it */
  const aria = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const kind = LOOK.color ? "photo" : "pix";
  const canvas = el("canvas", { width: w, height: h, class: kind, ...aria });
  if (size) canvas.style.width = `${size}px`;
  canvas.getContext("2d").putImageData(imageData(key, paint, w, h), 0, 0);
  return canvas;
}
const gray = v => [v, v, v];
const digit = (source, slot, label, size) => picture(label, size, `${source}${slot}`,
  p => colorOf(source, slot, p));
const an = name => `${/^[aeiou8]/i.test(name) ? "an" : "a"} ${name}`;
const testDigit = (t, size, label = an(name(meta.tests.labels[t]))) =>
  digit("tests", t, label, size);
/* A gray base mixed with a share t of red for values v above 0, of blue for those below. */
const RED = [178, 24, 43], BLUE = [33, 102, 172];
const mixed = (base, v, t) => (v > 0 ? RED : BLUE).map(c => base + t * (c - base));
const heatColor = v => mixed(255, v, Math.min(1, Math.abs(v)));
/* Ink under a pattern's value v: colored where v is large and ink is common. */
const tinted = (p, ink, v) =>
  mixed(255 - .6 * ink, v, common(p) * Math.min(1, 1.3 * Math.max(0, Math.abs(v) - .15)));
/* Ink of one image, colored by its contribution v to a feature's activation. */
const driving = (ink, v) => mixed(255 - ink, v, Math.sqrt(Math.abs(v)));
/* How common ink is at pixel p, from 0 to 1: a third of the mean ink in some class counts as 1. */
function common(p) {
  arrays.common ??= Float32Array.from({ length: P }, (_, q) =>
    Math.min(1, Math.max(...classes.map(c => 3 * classMean(c, q) / 255))));
  return arrays.common[p];
}
/* Patterns and means may be coarser than images: the place there of pixel p. */
const coarse = p => PH === H && PW === W ? p
  : Math.floor(Math.floor(p / W) * PH / H) * PW + Math.floor(p % W * PW / W);
const heat = (i, p) => arrays.heats[i * PH * PW + coarse(p)] / 127;
const inkedAt = p => arrays.inked[coarse(p)];
const meanAt = (i, p) => arrays.means[i * PH * PW + coarse(p)];
const classMean = (c, p) => arrays.class_means[c * PH * PW + coarse(p)];
const isFaithful = i => features[i].faithful !== false && "heats" in arrays;
const pattern = (i, size) =>
  picture(`${SPOTS} whose ${INK} raises (red) or lowers (blue) feature ${features[i].feature}`,
    size, `heat${i}`, p => arrays.inked[p]
    ? heatColor(arrays.heats[i * PH * PW + p] / 127) : [224, 224, 224], PW, PH);
/* The pattern of feature i over the mean of the images on which it is active. */
const portrait = (i, size, label = "") => picture(label, size, `portrait${i}`,
  p => tinted(p, meanAt(i, p), inkedAt(p) ? heat(i, p) : 0));
/* What a drawing lies on: gray values by pixel. */
const onMean = i => p => 255 - .7 * meanAt(i, p);
const onClass = c => p => 255 - .7 * classMean(c, p);
const onTest = t => p => colorOf("tests", t, p).reduce((a, b) => a + b) / 3;
/* A drawing: ink wanted in red, unwanted in blue, strongly in the darker tone. */
const TONE_SHARES = [0, .42, .8];
const drawingOf = i => arrays.drawings.subarray(i * CP, (i + 1) * CP);
const isDrawn = i => LOOK.can_write && drawingOf(i).some(Boolean);
const cellAt = p => Math.floor(Math.floor(Math.floor(p / W) * LOOK.whole[0] / H) / CELL) * CW +
  Math.floor(Math.floor(p % W * LOOK.whole[1] / W) / CELL);
function drawn(weights, base, size, label = "", key = null) {
  return picture(label, size, key, p => {
    const w = weights[cellAt(p)];
    return mixed(base(p), w, TONE_SHARES[Math.abs(w)]);
  });
}
function cellsInWords(weights) {
  const count = sign => weights.filter(w => w * sign > 0).length;
  return `${count(1)} cells with ${INK} wanted, ${count(-1)} with ${INK} unwanted`;
}
/* The hypothesis of feature i as a picture; by default on the mean of its images. */
const sketch = (i, size, base = null) => drawn(drawingOf(i), base ?? onMean(i), size,
  `drawing of the hypothesis of feature ${features[i].feature}: ${cellsInWords(drawingOf(i))}`,
  base ? null : `sketch${i}`);
/* The one picture of a feature in lists, described beside it. */
function face(i, size) {
  if (isDrawn(i)) return drawn(drawingOf(i), onMean(i), size, "", `sketch${i}`);
  if (!isFaithful(i)) return strongest(i, size);
  return LOOK.in_place ? portrait(i, size) : pattern(i, size);
}
/* The hypothesis on a class, or else the face. */
const onMeanOf = (c, i, size) =>
  LOOK.in_place && isFaithful(i) ? sketch(i, size, onClass(c)) : face(i, size);
function tint(context, weights, cell) { /* a drawing over what is there, `cell` pixels to a cell */
  weights.forEach((w, p) => {
    if (!w) return;
    context.fillStyle = `rgba(${w > 0 ? RED : BLUE}, ${TONE_SHARES[Math.abs(w)]})`;
    context.fillRect(p % CW * cell, Math.floor(p / CW) * cell, cell, cell);
  });
}

/* ---------- what colors and lengths mean ---------- */
function colorBar(ends, color) {
  const bar = picture("", 90, null, p => color((p % 60) / 59), 60, 6);
  bar.style.height = "12px";
  return el("p", { class: "small soft colorBar" }, ends[0], bar, ends[1]);
}
/* From blue through white, 0, to red. */
const twoColorBar = (low, high) => colorBar([low, high], share => heatColor(2 * share - 1));
/* Round values from 0 to `high`, about `n` of them. */
function ticks(high, n = 4) {
  const power = 10 ** Math.floor(Math.log10(high / n));
  const step = [1, 2, 5, 10].find(m => m * power * n >= high * .999) * power;
  return Array.from({ length: Math.floor(high / step * 1.0001) + 1 }, (_, m) => m * step);
}

/* ---------- bars: positive values right of the line, negative left ---------- */
function bars(title, rows, more = {}) {
  const values = rows.map(r => r.value).concat(rows.map(r => r.before ?? 0), 0);
  const low = more.low ?? Math.min(...values), high = more.high ?? Math.max(...values, low + 1e-9);
  const at = v => 100 * (Math.max(low, Math.min(high, v)) - low) / (high - low);
  const span = (kind, style, ...words) => el("span", { class: kind, style }, ...words);
  const lines = rows.map(r => {
    const from = Math.min(at(r.value), at(0)), wide = Math.abs(at(r.value) - at(0));
    const kind = more.kind ?? (r.value < 0 ? "bar minus" : "bar");
    const bar = span(kind, `left:${from}%;width:${wide}%`);
    const before = r.before !== undefined && span("before", `left:${at(r.before)}%`);
    const track = span("track", null, bar, span("zero", `left:${at(0)}%`), before);
    return el("li", {}, el("span", { class: "label", title: fullNames.get(r.label) }, r.label),
      track, span("value", null, r.text));
  });
  const ends = [low, 0, high].filter((v, n) => n === 1 || Math.abs(at(v) - at(0)) > 28);
  const marks = ends.map(v => span("tick", `left:${at(v)}%;transform:translateX(-${at(v)}%)`,
    Number.isInteger(v) ? number(v) : signed(v)));
  lines.push(el("li", { class: "scale", "aria-hidden": "true" }, span("label"),
    span("ticks", null, marks), span("value", null, more.unit ?? "")));
  return el("div", { class: "chart" }, title && el("h3", {}, title),
    el("ul", { class: "bars", id: more.id, ...more.data }, lines), more.note && note(more.note));
}
/* All classes, or of many those with the ten highest scores. */
function shownClasses(logits) {
  if (C <= 12) return classes;
  const order = [...classes].sort((a, b) => logits[b] - logits[a] || a - b);
  return order.slice(0, 10).sort((a, b) => a - b);
}
function logitBars(title, logits, more = {}) {
  const p = softmax(logits), best = argmax(p);
  const rows = shownClasses(more.before ?? logits).map(c => ({
    label: c === best ? el("b", { title: fullNames.get(names[c]) }, names[c]) : names[c],
    value: logits[c],
    before: more.before?.[c], text: `${signed(logits[c])} (${probability(p[c])})` }));
  const data = { "data-logits": [...logits].join(" ") };
  return bars(title, rows, { data, unit: "score", ...more });
}
const fitting = width => Math.max(300, Math.min(width, innerWidth - 40)); /* a phone's screen */
/* Upright bars of counts; `more` has the axes' titles x and y, ticks [share of the width, text]
   where columns have no labels, and a size. */
function columns(title, values, labels, more) {
  const { x, y, height = 150 } = more, width = fitting(more.width ?? 340);
  const high = Math.max(...values, 1);
  const left = 52, top = 22, bottom = 34, w = (width - left - 8) / values.length;
  const words = [...values].map((v, i) => `${labels[i]} ${number(v)}`).join(", ");
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${title}, ${y}: ${words}` });
  const level = v => height - bottom - (height - bottom - top) * v / high;
  const text = (words, place) => chart.append(svg("text", place, words));
  for (const v of ticks(high)) {
    chart.append(svg("line", { x1: left, x2: width - 8, y1: level(v), y2: level(v),
      class: "axis" }));
    text(number(v), { x: left - 5, y: level(v) + 4, "text-anchor": "end" });
  }
  [...values].forEach((v, i) => chart.append(svg("rect", { x: left + i * w + 1, y: level(v),
    width: Math.max(1, w - 2), height: Math.max(.5, level(0) - level(v)), class: "column" },
  svg("title", {}, `${labels[i]}: ${number(v)}`))));
  const under = more.ticks ?? labels.map((label, i) => [(i + .5) / values.length, label]);
  for (const [share, label] of under) text(label, { x: left + share * (width - left - 8),
    y: height - 20, "text-anchor": share === 1 ? "end" : "middle" });
  text(y, { x: 0, y: 13 });
  text(x, { x: left + (width - left - 8) / 2, y: height - 4, "text-anchor": "middle" });
  return el("div", {}, el("h3", {}, title), chart);
}
