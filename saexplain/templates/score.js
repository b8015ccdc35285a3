/* Drawings measured and tested on images of the page. The rules are those of Python's edits.py and
   evaluation.py: on the same images both find the same. */
const testing = meta.testing, TONES = { ".": 0, "+": 1, "#": 2, "-": -1, "=": -2 };
const TONE_OF = Object.fromEntries(Object.entries(TONES).map(([character, w]) => [w, character]));
const rowsOf = weights => Array.from({ length: CH }, (_, row) =>
  Array.from(weights.subarray(row * CW, (row + 1) * CW), w => TONE_OF[w]).join(""));
const weightsOf = rows => Int8Array.from([...rows.join("")], character => TONES[character]);
const machineOf = i => ({ ...features[i].hypothesis, drawing: rowsOf(drawingOf(i)) });

/* ---------- images: "val", "test_half" and "replication_half" ---------- */
const has = split => `${split}_levels` in arrays;
const nOf = split => arrays[`${split}_labels`].length;
const levelsOf = (split, t) => arrays[`${split}_levels`].subarray(t * CP, (t + 1) * CP);
const pairsOf = (split, i, column) => arrays[`${split}_${column}`].subarray(
  arrays[`${split}_start`][i], arrays[`${split}_start`][i + 1]);
const activeIn = (split, i) => pairsOf(split, i, "image"); /* the images that activate feature i */
function inactiveIn(split, i) {
  const active = new Set(activeIn(split, i));
  return [...Array(nOf(split)).keys()].filter(t => !active.has(t));
}
const isTestable = (split, i) => has(split) && activeIn(split, i).length >= testing.min_active &&
  activeIn(split, i).length <= nOf(split) - testing.min_active;
function evenlySpaced(list, most) { /* at most so many, the first and the last among them */
  const n = Math.min(most, list.length);
  return n < 2 ? [...list.slice(0, n)]
    : Array.from({ length: n }, (_, m) => list[Math.round(m * (list.length - 1) / (n - 1))]);
}

/* ---------- scores ---------- */
const byCell = {}; /* levels by cell, so that a brush reads what lies side by side */
function levelsByCell(split) {
  const levels = arrays[`${split}_levels`], n = nOf(split), turned = new Uint8Array(n * CP);
  for (let t = 0; t < n; t++) for (let p = 0; p < CP; p++) turned[p * n + t] = levels[t * CP + p];
  return turned;
}
function addToScores(scores, split, p, by) { /* the weight of cell p changes */
  const n = scores.length, levels = byCell[split] ??= levelsByCell(split);
  for (let t = 0, at = p * n; t < n; t++) scores[t] += by * levels[at + t];
}
function scoresOf(weights, split) {
  const scores = new Int32Array(nOf(split));
  weights.forEach((w, p) => { if (w) addToScores(scores, split, p, w); });
  return scores;
}
/* How well scores pick the images `at`; without a threshold, at the one with the largest F1. */
function measure(scores, at, threshold = null) {
  const n = scores.length, m = at.length, keys = new Float64Array(n);
  for (let t = 0; t < n; t++) keys[t] = 2 * scores[t];
  for (const t of at) keys[t] += 1;
  keys.sort();
  let seen = 0, hits = 0, sum = 0, below = 0, best = -1, found = Math.floor(keys[n - 1] / 2) + 1;
  for (let end = n - 1; end >= 0;) { /* from the highest score down, equal scores together */
    const score = Math.floor(keys[end] / 2), before = end;
    let own = 0;
    for (; end >= 0 && Math.floor(keys[end] / 2) === score; end--) own += keys[end] - 2 * score;
    seen += before - end;
    hits += own;
    sum += own * hits / seen;
    const others = before - end - own; /* inactive ones of this score */
    below += own * (n - m - (seen - hits) + others / 2);
    const f1 = 2 * hits / (seen + m), next = end < 0 ? score : Math.floor(keys[end] / 2);
    if (m && f1 > best) { best = f1; found = Math.ceil((score + next) / 2); }
  }
  threshold ??= found;
  const picked = scores.reduce((count, s) => count + (s >= threshold), 0);
  const both = at.reduce((count, t) => count + (scores[t] >= threshold), 0), rate = m / n;
  return { threshold, n_images: n, picked, active: m, both, precision: both / Math.max(1, picked),
    recall: both / Math.max(1, m), f1: 2 * both / Math.max(1, picked + m),
    average_precision: m ? sum / m : 0, auroc: m && m < n ? below / (m * (n - m)) : .5, rate,
    chance_f1: 2 * rate / (1 + rate) };
}
const measureOn = (split, i, h) =>
  measure(scoresOf(weightsOf(h.drawing), split), activeIn(split, i), h.threshold);

/* ---------- edits ---------- */
function regionsOf(weights, sign) { /* connected cells of one sign, as lists of cells */
  const left = new Set([...weights.keys()].filter(p => weights[p] * sign > 0)), regions = [];
  for (const first of left) {
    const region = [first];
    left.delete(first);
    for (const p of region) {
      const near = [p - CW, p + CW, ...p % CW ? [p - 1] : [], ...(p + 1) % CW ? [p + 1] : []];
      for (const q of near) if (left.delete(q)) region.push(q);
    }
    regions.push(region);
  }
  return regions;
}
function placesElsewhere(region, free) { /* where most of its cells are free, the nearest first */
  const step = testing.edits.step, up = Math.floor(CH / step), across = Math.floor(CW / step);
  const moves = [];
  for (let v = -up; v <= up; v++) for (let u = -across; u <= across; u++) {
    const down = v * step, right = u * step, cells = [];
    for (const p of region) {
      const row = Math.floor(p / CW) + down, column = p % CW + right, q = row * CW + column;
      if (row >= 0 && row < CH && column >= 0 && column < CW && free[q]) cells.push(q);
    }
    if (cells.length) moves.push({ cells, down, right, far: Math.abs(down) + Math.abs(right) });
  }
  moves.sort((a, b) => b.cells.length - a.cells.length || a.far - b.far || a.down - b.down ||
    a.right - b.right);
  return moves.slice(0, testing.edits.places).map(move => move.cells);
}
function shapesOf(weights, sign, free) {
  const regions = regionsOf(weights, sign);
  return { cells: regions.flat(), elsewhere: regions.map(region => placesElsewhere(region, free)) };
}
const sumAt = (cells, values) => cells.reduce((all, p) => all + values[p], 0);
function otherCells(shapes, available) { /* of each region, at the two places with most */
  const found = new Set();
  for (const places of shapes.elsewhere) {
    const ordered = places.map((cells, n) => [sumAt(cells, available), n]);
    ordered.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    for (const [, n] of ordered.slice(0, 2)) for (const p of places[n]) found.add(p);
  }
  return [...found];
}
/* Adds the changes of `available` ink in the shapes, and as much elsewhere, or what there is. */
function addEdit([named, elsewhere], shapes, available, sign) {
  const other = otherCells(shapes, available), there = sumAt(other, available);
  const part = Math.min(1, sumAt(shapes.cells, available) / Math.max(1, there));
  for (const p of shapes.cells) named[p] += sign * available[p];
  for (const p of other) elsewhere[p] += sign * part * available[p];
}
/* The pre-activation of feature i less its threshold, of levels changed: a dot product. */
function readout(i) {
  const { d_in: d, d_sae: n } = meta.network, k = features[i].feature;
  const weights = new Float64Array(P);
  let bias = arrays.b_enc[k] - arrays.threshold[k];
  for (let j = 0; j < d; j++) {
    const w = arrays.W_enc[j * n + k] / arrays.std[j];
    bias += w * (arrays.b1[j] - arrays.mu[j]);
    for (let p = 0; p < P; p++) weights[p] += w * arrays.W1[p * d + j];
  }
  return (levels, change) => weights.reduce((sum, w, p) =>
    sum + w * Math.max(0, Math.min(255, levels[p] + change[p])) / 255, bias);
}
function editTests(i, weights) {
  if (!testing.edits.can) return {};
  const read = readout(i), free = arrays.canvas_inked.map((v, p) => v && !weights[p]);
  const [wanted, unwanted] = [1, -1].map(sign => shapesOf(weights, sign, free)), found = {};
  const missing = (levels, upTo) => Array.from(levels, v => Math.max(0, upTo - v));
  const run = (edit, list, change) => {
    const counts = { n: 0, named: 0, elsewhere: 0, only_named: 0, only_elsewhere: 0 };
    for (const t of evenlySpaced(list, testing.edits.n)) {
      const levels = levelsOf("test_half", t), pair = [new Float64Array(P), new Float64Array(P)];
      change(pair, levels);
      if (pair[0].some(Boolean) && !pair[1].some(Boolean)) continue; /* nothing elsewhere */
      const [a, b] = pair.map(own => read(levels, own) > 0 === (edit === "painting"));
      counts.n++;
      counts.named += a; counts.elsewhere += b;
      counts.only_named += a && !b; counts.only_elsewhere += b && !a;
    }
    if (counts.n < testing.min_active) return;
    found[edit] = { ...counts, ...difference(counts) };
    found[edit].result = resultOf(found[edit], testing.rule.edit_difference, 0);
  };
  const active = activeIn("test_half", i);
  if (wanted.cells.length)
    run("erasing", active, (pair, levels) => addEdit(pair, wanted, levels, -1));
  if (unwanted.cells.length) run("filling", active, (pair, levels) =>
    addEdit(pair, unwanted, missing(levels, testing.edits.fill), 1));
  if (wanted.cells.length || unwanted.cells.length)
    run("painting", inactiveIn("test_half", i), (pair, levels) => {
      addEdit(pair, unwanted, levels, -1);
      addEdit(pair, wanted, missing(levels, 255), 1);
    });
  return found;
}

/* ---------- intervals (95%) and results ---------- */
const Z_95 = 1.959964;
function wilson(count, n) {
  const share = count / n, z2 = Z_95 ** 2, center = (share + z2 / (2 * n)) / (1 + z2 / n);
  const reach = Z_95 / (1 + z2 / n) * Math.sqrt(share * (1 - share) / n + z2 / (4 * n * n));
  return [Math.max(0, center - reach), Math.min(1, center + reach)];
}
function difference(e) { /* of two shares of the same images: Newcombe 1998, method 10 */
  const a = e.named / e.n, b = e.elsewhere / e.n, both = e.named - e.only_named;
  const [low, high] = wilson(e.named, e.n), [otherLow, otherHigh] = wilson(e.elsewhere, e.n);
  let cross = both * (e.n - e.named - e.only_elsewhere) - e.only_named * e.only_elsewhere;
  if (cross > 0) cross = Math.max(0, cross - e.n / 2);
  const spread = e.named * e.elsewhere * (e.n - e.named) * (e.n - e.elsewhere);
  const phi = cross / Math.sqrt(spread || 1);
  const reach = (x, y) => Math.sqrt(Math.max(0, x * x - 2 * phi * x * y + y * y));
  return { difference: a - b, low: a - b - reach(a - low, otherHigh - b),
    high: a - b + reach(high - a, b - otherLow) };
}
function resultOf({ difference: value, low, high }, bar, nothing) {
  if (value >= bar && low > nothing) return "confirmed";
  return high < bar ? "refuted" : "inconclusive";
}
function classTest(i, named) {
  const labels = arrays.test_half_labels, at = activeIn("test_half", i), own = new Set(named);
  const count = at.reduce((sum, t) => sum + own.has(labels[t]), 0), [low, high] = wilson(count,
    at.length), share = count / at.length;
  const usual = labels.reduce((sum, c) => sum + own.has(c), 0) / labels.length;
  const result = resultOf({ difference: share, low, high }, testing.rule.enrichment * usual, usual);
  return { share, low, high, usual, result };
}
/* How much logit c falls, on average, without feature i; the interval is that of a mean. */
function logitTest(i, c, verb) {
  const k = features[i].feature;
  const lost = evenlySpaced(activeIn("test_half", i), testing.effect_images).map(t => {
    const pixels = Float32Array.from(levelsOf("test_half", t), v => v / 255);
    const { z, feature, logits } = forward(pixels);
    return (logits[c] - head(withAdded(z, k, -feature[k]))[c]) * (verb === "raises" ? 1 : -1);
  });
  const by = lost.reduce((a, b) => a + b, 0) / lost.length;
  const spread = lost.reduce((sum, v) => sum + (v - by) ** 2, 0) / (lost.length - 1);
  const reach = Z_95 * Math.sqrt(spread / lost.length);
  return { logit: c, by, low: by - reach, high: by + reach };
}
function confidenceOf({ f1, chance_f1 }, edits) { /* null where edits cannot be tested */
  const rule = testing.rule, results = Object.values(edits).map(e => e.result);
  const reaches = (least, lift) => f1 >= least && f1 - chance_f1 >= lift;
  if (!testing.edits.can) return null;
  if (reaches(rule.high_f1, rule.high_lift) && results.every(r => r === "confirmed")) return "High";
  return reaches(rule.medium_f1, rule.medium_lift) && results.includes("confirmed") ? "Medium"
    : "Low";
}
/* All tests of a frozen hypothesis, once for each page: they depend on nothing else. */
const tested = new Map();
function testResults(h) {
  const key = canonical(h), i = position.get(h.feature);
  if (!tested.has(key)) {
    const own = measureOn("test_half", i, h), edits = editTests(i, weightsOf(h.drawing));
    const effects = {}, again = isTestable("replication_half", i);
    for (const verb of ["raises", "lowers"])
      if (h[verb] !== null && testing.edits.can) effects[verb] = logitTest(i, h[verb], verb);
    tested.set(key, { ...own, edits, effects, confidence: confidenceOf(own, edits),
      classes: h.classes.length ? classTest(i, h.classes) : null,
      other_half: again ? measureOn("replication_half", i, h) : null });
  }
  return tested.get(key);
}
const machineResults = (i, split) => // its drawing on the same images
  isDrawn(i) ? measureOn(split, i, machineOf(i)) : null;
