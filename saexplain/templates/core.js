/* The numbers: data from Python, and the network that the drawing view computes. */
"use strict";
const meta = JSON.parse(document.getElementById("meta").textContent);
const features = meta.features, F = features.length;
const LONGEST_NAME = 32, fullNames = new Map(); /* by what is shown of long ones */
const isolated = text => /[\u0590-\u08ff\ufb1d-\ufefc]/.test(text) /* from right to left */
  ? `\u2068${text}\u2069` : text;
function shownName(text) { /* both ends of a long name: names often begin alike */
  const letters = [...text];
  if (letters.length <= LONGEST_NAME) return isolated(text);
  const short = isolated(`${letters.slice(0, 20).join("")}…${letters.slice(-11).join("")}`);
  fullNames.set(short, text);
  return short;
}
const names = meta.classes.map(shownName), C = names.length, classes = [...names.keys()];
const plurals = meta.plurals.map(shownName); /* names of several images of a class, as in "6s" */
const [H, W] = meta.shape, P = H * W;
/* How things are shown, where not as ink with patterns in the images' own coordinates. */
const LOOK = meta.look ?? { whole: [H, W], in_place: true, can_write: true, pattern: [H, W],
  color: null };
const [PH, PW] = LOOK.pattern; /* of patterns and mean images */
/* What patterns and drawings are of. */
const INK = !LOOK.color ? "ink" : LOOK.is_light ? "light" : "darkness";
const SPOTS = LOOK.color ? "places" : "pixels";
const MANY = C > 20, TABLES = meta.tables ?? false; /* only the largest effects are here */
const [CH, CW] = meta.testing.canvas, CP = CH * CW; /* cells of drawings */
const CELL = meta.testing.cell; /* pixels in the side of a cell */
const position = new Map( /* of each feature among those on the page */
  features.map((f, i) => [f.feature, i]));
const arrays = {};

async function unpack() {
  const text = document.getElementById("pack").textContent.trim();
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = binary.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const kinds = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, i4: Int32Array,
    f4: Float32Array };
  for (const [name, a] of Object.entries(meta.arrays))
    arrays[name] = new kinds[a.type](buffer, a.offset, a.length);
  if (meta.network) transposeW1();
  if (MANY) features.forEach(expandEffects);
  if (LOOK.color) for (const source of ["images", "tests"]) await decodeSheets(source);
}
/* Lists of [class, value] become arrays by class. */
function expandEffects(f) {
  for (const field of ["labels", "supports", "pushes"]) {
    const values = new Float32Array(C);
    for (const [c, v] of f[field]) values[c] = v;
    f[field] = values;
  }
}
const sheets = { images: [], tests: [] };
async function decodeSheets(source) {
  for (let n = 0; `${source}_${n}` in arrays; n++) {
    const blob = new Blob([arrays[`${source}_${n}`]], { type: "image/jpeg" });
    const sheet = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [sheet.width, sheet.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(sheet, 0, 0);
    sheets[source].push(context.getImageData(0, 0, sheet.width, sheet.height));
    delete arrays[`${source}_${n}`];
  }
}
/* The color of pixel p of an image: its own, or ink as gray. */
function colorOf(source, slot, p) {
  if (!LOOK.color) return Array(3).fill(255 - arrays[source][slot * P + p]);
  const { tile: [high, wide], across } = LOOK.color;
  const rows = sheets[source][0].height / high, tiles = rows * across;
  const { data, width } = sheets[source][Math.floor(slot / tiles)], at = slot % tiles;
  const y = Math.floor(at / across) * high + Math.floor(p / W), x = at % across * wide + p % W;
  return data.subarray(4 * (y * width + x), 4 * (y * width + x) + 3);
}

/* ---------- data from Python ---------- */
const argmax = values => values.indexOf(Math.max(...values));
function softmax(logits) {
  const top = Math.max(...logits), powers = Array.from(logits, l => Math.exp(l - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(p => p / sum);
}
/* Contribution of feature i to logit `to`, the mean over all images of class `of`. */
const adds = (of, i, to) => arrays.class_adds[(of * F + i) * C + to];
/* Its contribution to the logit of class c itself; null where it is not among the largest. */
const ownEffect = (c, i) => TABLES ? inTable("class_feature", "class_value", c, i) : adds(c, i, c);
function inTable(names, values, row, i) {
  const [own, n] = tableRow(names, row), at = own.indexOf(i);
  return at < 0 ? null : arrays[values][row * n + at];
}
function tableRow(name, row) {
  const n = arrays[name].length / (name === "class_feature" ? C : arrays.rivals.length);
  return [arrays[name].subarray(row * n, (row + 1) * n), n];
}
/* The classes that class a is compared with. */
const rivals = a => TABLES
  ? [...arrays.rivals.subarray(a * arrays.rivals.length / C, (a + 1) * arrays.rivals.length / C)]
  : classes.filter(c => c !== a);
const pairRow = (a, b) => rivals(a).includes(b)
  ? a * arrays.rivals.length / C + rivals(a).indexOf(b) : null;
const frequency = (i, c) => features[i].labels[c] / Math.max(1, meta.of_class[c]);
/* Contribution of feature i to the logit difference a - b, the mean over images of class `of`. */
function addsToDifference(of, i, a, b) {
  if (!TABLES) return adds(of, i, a) - adds(of, i, b);
  const [own, other] = of === a ? [a, b] : [b, a], row = pairRow(own, other);
  const value = row === null ? null : inTable("pair_of_feature", "pair_of_value", row, i);
  return value === null || of === a ? value : -value;
}
/* With tables an image has the values of some classes, and one that counts for all others. */
const testClasses = t => {
  const n = arrays.test_classes.length / meta.tests.labels.length;
  return arrays.test_classes.subarray(t * n, (t + 1) * n);
};
const isKnown = (t, c) => !TABLES || testClasses(t).includes(c);
function byClassOf(t, name, row, spread = 0) {
  if (!TABLES) return arrays[name].subarray(row * C, (row + 1) * C);
  const own = testClasses(t), n = own.length + 1, values = arrays[name].subarray(row * n);
  const all = new Float32Array(C).fill(values[n - 1] - spread);
  own.forEach((c, at) => { all[c] = values[at]; });
  return all;
}
const restOf = t => TABLES ? Math.log(Math.max(1, C - testClasses(t).length)) : 0;
const testLogits = t => byClassOf(t, "test_logits", t, restOf(t));
const fixedLogits = t => byClassOf(t, "fixed_logits", t, restOf(t));
/* The features k active on test image t, their activations and contributions to each logit. */
function activeOn(t) {
  const list = [];
  for (let p = arrays.pair_start[t]; p < arrays.pair_start[t + 1]; p++)
    list.push({ k: arrays.pair_feature[p], activation: arrays.pair_activation[p],
      adds: byClassOf(t, "pair_adds", p) });
  return list;
}
const pixelsOf = t => Float32Array.from(arrays.tests.subarray(t * P, (t + 1) * P), v => v / 255);
/* The indices of the n largest values above 0, ties by index. */
function largest(n, value, length = F) {
  const scored = [];
  for (let i = 0; i < length; i++) scored.push([value(i), i]);
  const found = scored.filter(([v]) => v > 0).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  return found.slice(0, n).map(([, i]) => i);
}
/* The number of features, the most influential first, that make up `share` of the influence. */
function featuresForShare(share) {
  const influence = features.map(f => f.influence).sort((a, b) => b - a);
  const all = influence.reduce((a, b) => a + b, 0);
  let n = 0, sum = 0;
  while (n < F && sum < share * all) sum += influence[n++];
  return n;
}

/* ---------- the network: logits = W2 relu(W1 x + b1) + b2 ---------- */
function transposeW1() { /* (d_in, pixels) to (pixels, d_in), so that blank pixels cost nothing */
  const d = meta.network.d_in, weights = new Float32Array(P * d);
  for (let j = 0; j < d; j++) for (let p = 0; p < P; p++) weights[p * d + j] = arrays.W1[j * P + p];
  arrays.W1 = weights;
}
function forward(pixels) {
  const { d_in: d, d_sae: n } = meta.network;
  const z = Float64Array.from(arrays.b1), feature = Float64Array.from(arrays.b_enc);
  for (let p = 0; p < P; p++) {
    const ink = pixels[p];
    if (ink) for (let j = 0, at = p * d; j < d; j++) z[j] += ink * arrays.W1[at + j];
  }
  for (let j = 0; j < d; j++) {
    const x = (z[j] - arrays.mu[j]) / arrays.std[j];
    for (let k = 0, at = j * n; k < n; k++) feature[k] += x * arrays.W_enc[at + k];
  }
  const before = feature.slice(); /* pre-activations, which the threshold cuts */
  for (let k = 0; k < n; k++) if (!(feature[k] > arrays.threshold[k])) feature[k] = 0;
  return { z, before, feature, logits: head(z) };
}
function head(z) {
  const logits = Float64Array.from(arrays.b2), d = z.length;
  for (let c = 0; c < C; c++)
    for (let j = 0, at = c * d; j < d; j++) if (z[j] > 0) logits[c] += arrays.W2[at + j] * z[j];
  return logits;
}
function reconstruct(feature) { /* the activations that the SAE decodes from its features */
  const z = Float64Array.from(arrays.b_dec), d = z.length;
  for (let k = 0; k < feature.length; k++)
    if (feature[k])
      for (let j = 0, at = k * d; j < d; j++) z[j] += feature[k] * arrays.W_dec[at + j];
  return z.map((v, j) => v * arrays.std[j] + arrays.mu[j]);
}
function withAdded(z, k, by) { /* z + by W_dec[k] std; what the SAE does not reconstruct stays */
  const out = Float64Array.from(z), d = z.length;
  for (let j = 0, at = k * d; j < d; j++) out[j] += by * arrays.W_dec[at + j] * arrays.std[j];
  return out;
}

/* ---------- ink: SUB x SUB cells to a pixel, each from 0 to 1 ---------- */
const SUB = 4, IW = SUB * W, IH = SUB * H, PEN = 1.2 * SUB;
const blankInk = () => new Float32Array(IW * IH);
function stroke(ink, [x0, y0], [x1, y1], erase = false) { /* a line with round ends, in cells */
  const dx = x1 - x0, dy = y1 - y0, squared = dx * dx + dy * dy || 1, far = PEN + 1;
  const left = Math.max(0, Math.floor(Math.min(x0, x1) - far));
  const right = Math.min(IW - 1, Math.ceil(Math.max(x0, x1) + far));
  const top = Math.max(0, Math.floor(Math.min(y0, y1) - far));
  const bottom = Math.min(IH - 1, Math.ceil(Math.max(y0, y1) + far));
  for (let y = top; y <= bottom; y++) for (let x = left; x <= right; x++) {
    const along = Math.max(0, Math.min(1, ((x - x0) * dx + (y - y0) * dy) / squared));
    const distance = Math.hypot(x - x0 - along * dx, y - y0 - along * dy);
    const cover = Math.max(0, Math.min(1, PEN + .5 - distance)), at = y * IW + x;
    ink[at] = erase ? Math.min(ink[at], 1 - cover) : Math.max(ink[at], cover);
  }
}
function enlarged(pixels) {
  const ink = blankInk();
  for (let y = 0; y < IH; y++) for (let x = 0; x < IW; x++)
    ink[y * IW + x] = pixels[Math.floor(y / SUB) * W + Math.floor(x / SUB)];
  return ink;
}
/* The box (left, top, w, h) of the ink as h2 x w2 means of its parts. */
function resized(ink, left, top, w, h, w2, h2) {
  const out = new Float32Array(w2 * h2);
  for (let y = 0; y < h2; y++) for (let x = 0; x < w2; x++) {
    const x0 = x * w / w2, x1 = (x + 1) * w / w2, y0 = y * h / h2, y1 = (y + 1) * h / h2;
    let sum = 0;
    for (let v = Math.floor(y0); v < Math.min(h, Math.ceil(y1)); v++)
      for (let u = Math.floor(x0); u < Math.min(w, Math.ceil(x1)); u++) {
        const wide = Math.min(u + 1, x1) - Math.max(u, x0);
        const high = Math.min(v + 1, y1) - Math.max(v, y0);
        sum += wide * high * ink[(top + v) * IW + left + u];
      }
    out[y * w2 + x] = sum / ((x1 - x0) * (y1 - y0));
  }
  return out;
}
const shrunk = ink => resized(ink, 0, 0, IW, IH, W, H);
function centered(ink) { /* as MNIST's: fitted into 20 of 28, center of mass in the middle */
  let left = IW, right = -1, top = IH, bottom = -1;
  for (let y = 0; y < IH; y++) for (let x = 0; x < IW; x++) if (ink[y * IW + x] > .1) {
    left = Math.min(left, x); right = Math.max(right, x);
    top = Math.min(top, y); bottom = Math.max(bottom, y);
  }
  const out = new Float32Array(P), w = right - left + 1, h = bottom - top + 1;
  if (right < 0) return out;
  const scale = Math.max(w, h) / Math.round(Math.min(W, H) * 5 / 7);
  const w2 = Math.max(1, Math.round(w / scale)), h2 = Math.max(1, Math.round(h / scale));
  const small = resized(ink, left, top, w, h, w2, h2);
  let mass = 0, mx = 0, my = 0;
  small.forEach((v, at) => { mass += v; mx += v * (at % w2); my += v * Math.floor(at / w2); });
  const dx = Math.round((W - 1) / 2 - mx / mass), dy = Math.round((H - 1) / 2 - my / mass);
  small.forEach((v, at) => {
    const x = at % w2 + dx, y = Math.floor(at / w2) + dy;
    if (x >= 0 && x < W && y >= 0 && y < H) out[y * W + x] = v;
  });
  return out;
}
