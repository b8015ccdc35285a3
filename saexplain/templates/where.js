/* Where features are active: maps over images, crops, and a switch for them. */
const WHERE = meta.where ?? null;
const [GH, GW] = WHERE?.grid ?? [1, 1], CELLS = GH * GW; /* positions of the grid */
const KEPT_MAPS = "saexplain heat maps";
const heatMaps = { on: true };
try { heatMaps.on = localStorage.getItem(KEPT_MAPS) !== "off"; } catch { /* nothing is kept */ }

function mapSwitch() {
  if (!WHERE) return "";
  return el("p", { class: "small" }, button(`heat maps: ${heatMaps.on ? "on" : "off"}`, () => {
    heatMaps.on = !heatMaps.on;
    try { localStorage.setItem(KEPT_MAPS, heatMaps.on ? "on" : "off"); } catch { /* not kept */ }
    route();
  }, { id: "heatMaps", "aria-pressed": String(heatMaps.on) }));
}

/* ---------- colors ---------- */
/* Dark where a map is 0, as it is where it is 1; a gray image gets a warm tint instead. */
function warmed([r, g, b], share) {
  if (LOOK.color) return [r, g, b].map(v => v + (1 - Math.sqrt(share)) * (22 + .35 * v - v));
  const dim = 22 + .42 * (.299 * r + .587 * g + .114 * b), s = Math.sqrt(share);
  const warm = v => dim + s * (v - dim);
  return [warm(.7 * r + .3 * 255), warm(.7 * g + .3 * 165), warm(.7 * b)];
}
/* A mean map alone: from dark to the warm tint. */
const glow = share => [40 + 215 * share, 42 + 143 * share, 48 + 12 * share];
/* The values of a map at pixel p of h x w, between its positions linearly. */
function smooth(values, p, w, h) {
  const y = Math.max(0, (Math.floor(p / w) + .5) * GH / h - .5), y0 = Math.floor(y), down = y - y0;
  const x = Math.max(0, (p % w + .5) * GW / w - .5), x0 = Math.floor(x), right = x - x0;
  const row = y0 * GW, next = Math.min(GH - 1, y0 + 1) * GW, x1 = Math.min(GW - 1, x0 + 1);
  return (1 - down) * ((1 - right) * values[row + x0] + right * values[row + x1]) +
    down * ((1 - right) * values[next + x0] + right * values[next + x1]);
}
const mapAt = n => arrays.maps.subarray(n * CELLS, (n + 1) * CELLS);

/* ---------- pictures ---------- */
/* The color of pixel p of an image under a map, where maps are on. */
const shaded = (source, slot, values) => heatMaps.on
  ? p => warmed(colorOf(source, slot, p), smooth(values, p, W, H) / 255)
  : p => colorOf(source, slot, p);
/* An image with a map (from 0 to 255) over it; null: without one. */
function overlaid(source, slot, values, label, size, key) {
  if (!values || !heatMaps.on) return digit(source, slot, label, size);
  return picture(label, size, key, shaded(source, slot, values));
}
const example = ([slot, , , map], label, size) =>
  overlaid("images", slot, map === undefined ? null : mapAt(map), label, size, `map${map}`);
/* Whether maps show where feature f is active: on prefix tokens it is nowhere. */
const hasPlace = f => !(f.prefix_share >= WHERE?.prefix_share);
function isCropped() {
  return WHERE !== null && WHERE.receptive.some(share => share < .95);
}
/* The box (left, top, wide, high) in pixels of what the position sees where a map is largest. */
function seenBox(values) {
  const at = argmax([...values]), [high, wide] = WHERE.receptive;
  const h = Math.max(2, Math.round(high * H)), w = Math.max(2, Math.round(wide * W));
  const place = (n, of, side, all) => Math.max(0, Math.min(all - side,
    Math.round((n + .5) / of * all - side / 2)));
  return [place(at % GW, GW, w, W), place(Math.floor(at / GW), GH, h, H), w, h];
}
function cropped([slot, , , map], label, size) {
  const values = mapAt(map), [left, top, w, h] = seenBox(values), shown = shaded("images", slot,
    values);
  const canvas = picture(label, size, `crop${map}${heatMaps.on}`,
    p => shown((top + Math.floor(p / w)) * W + left + p % w), w, h);
  canvas.className = "photo";
  return canvas;
}
/* The image that activates feature i most: cropped to what the most active position sees. */
function strongest(i, size, label = "") {
  const [row] = features[i].top;
  if (!row) return picture(label, size, "blank", () => [200, 200, 200]);
  if (!WHERE || !hasPlace(features[i])) return digit("images", row[0], label, size);
  return isCropped() && row[3] !== undefined ? cropped(row, label, size)
    : example(row, label, size);
}
function mapLegend(f) {
  if (!heatMaps.on) return "";
  const has = row => row[3] !== undefined;
  if (!f.top.some(has)) return note("Which places matter for it is not known: patches were " +
    "covered only in the strongest images of the features of most influence.");
  const look = LOOK.color ? "Bright" : "In color";
  const words = WHERE.kind === "occlusion" ? `${look}: places whose covering lowers the ` +
    "activation, most where it falls most on these images." +
    (f.top.every(has) ? "" : " An image that is not dim anywhere has no map.")
    : `${look}: where the feature is active, most at its largest activation here.`;
  return [note(words), colorBar(["0", number(f.scale)], s => warmed([190, 190, 190], s))];
}
/* ---------- one feature ---------- */
const CROPS = 6; /* strongest images whose crops are shown */
function examplesOf(title, f, list) {
  const size = LOOK.color ? 96 : 72;
  const show = hasPlace(f) ? example : (row, ...more) => digit("images", row[0], ...more);
  const figures = list.map(row => el("figure", {}, show(row, `${an(name(row[1]))}, ` +
    `activation ${row[2].toFixed(2)}`, size), el("figcaption", {},
    `${name(row[1])}: ${row[2].toFixed(1)}`)));
  return el("div", {}, el("h3", {}, title),
    list.length ? el("div", { class: "thumbs" }, figures) : note("No image activates it."));
}
function crops(f) {
  const some = f.top.filter(row => row[3] !== undefined).slice(0, CROPS);
  if (!isCropped() || !some.length || !hasPlace(f)) return "";
  return el("div", {}, el("h3", {}, "What the most active position sees"),
    el("div", { class: "thumbs" }, some.map(row => cropped(row,
      `the crop of ${an(name(row[1]))}`, 96))));
}
function meanMap(f, i) {
  if (f.mean_peak === null) return "";
  const values = arrays.mean_maps.subarray(i * CELLS, (i + 1) * CELLS), side = 48;
  const canvas = picture(`mean map of feature ${f.feature}`, 140, `mean map${i}`,
    p => glow(smooth(values, p, side, Math.round(side * H / W)) / 255), side,
    Math.round(side * H / W));
  canvas.className = "photo";
  return el("figure", {}, el("h3", {}, WHERE.kind === "occlusion" ? "Which places matter on average"
    : "Where it is active on average"), canvas, colorBar(["0", number(f.mean_peak)], glow),
  el("figcaption", { class: "small soft" }, WHERE.kind === "occlusion"
    ? "The mean over those of its strongest images that have a map."
    : "The mean over all validation images."));
}
function placeMarks(f) {
  const marks = [];
  if (f.place_only) marks.push("It is active at one place whatever the image: it encodes only " +
    "the place.");
  if (f.prefix_share >= .05) marks.push(`On ${percent(f.prefix_share, 0)} of the images that ` +
    "activate it, it is strongest on prefix tokens, such as the class token: no place.");
  if (f.blank_share >= .5 && hasPlace(f)) marks.push(`On ${percent(f.blank_share, 0)} of its ` +
    "strongest images its peak is on a part without contrast, such as a blank background.");
  return marks.map(words => el("p", { class: "mark" }, words));
}
const positionDensity = f => WHERE?.kind === "activation"
  ? ` and on ${percent(f.position_density, f.position_density < .01 ? 2 : 1)} of all positions`
  : "";
/* The face and the maps of feature i, where these show what it sees. */
function whereItIs(f, i) {
  const words = f.faithful === false && f.correlation !== undefined ? note("Its input pattern is " +
    `not faithful: what it predicts has a correlation of ${f.correlation.toFixed(2)} with the ` +
    "activation before the threshold. So it is not shown.") : "";
  return [placeMarks(f), mapSwitch(), examplesOf(STRONGEST_TITLE, f, f.top),
    f.top.length && hasPlace(f) ? mapLegend(f) : "",
    el("div", { class: "row" }, crops(f), meanMap(f, i)), words];
}
