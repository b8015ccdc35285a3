/* The reader's hypotheses: kept in the browser, and as my_hypotheses.json. */
const FORMAT = "saexplain hypotheses 1", FILE = "my_hypotheses.json", KEPT_AS =
  `saexplain hypotheses ${testing.sae}`; /* those of another SAE are kept apart */
const CONFIDENCES = ["High", "Medium", "Low"], LONGEST_CAPTION = 300, MOST_HYPOTHESES = 500;
const mine = { list: [], looks: new Map(), kept: true }; /* looks: at the test half, by feature */

function canonical(h) { /* what is frozen, as text */
  const { feature, caption, drawing, classes: of, raises, lowers, confidence, threshold } = h;
  return JSON.stringify({ feature, caption, drawing, classes: of, raises, lowers, confidence,
    threshold });
}
function sha256(text) { /* FIPS 180-4; crypto.subtle is missing where pages come by plain http */
  const bytes = new TextEncoder().encode(text), n = bytes.length;
  const blocks = new Uint32Array(16 * ((n + 8 >> 6) + 1)), w = new Uint32Array(64);
  const primes = [];
  for (let p = 2; primes.length < 64; p++) if (primes.every(q => p % q)) primes.push(p);
  const bits = x => Math.floor((x - Math.floor(x)) * 2 ** 32); /* the first 32 of the fraction */
  const state = Uint32Array.from(primes.slice(0, 8), p => bits(Math.sqrt(p)));
  const constants = primes.map(p => bits(Math.cbrt(p))), turn = (x, by) => x >>> by | x << 32 - by;
  bytes.forEach((b, at) => { blocks[at >> 2] |= b << 24 - 8 * (at & 3); });
  blocks[n >> 2] |= 128 << 24 - 8 * (n & 3);
  blocks[blocks.length - 1] = 8 * n;
  for (let from = 0; from < blocks.length; from += 16) {
    for (let t = 0; t < 64; t++) w[t] = t < 16 ? blocks[from + t]
      : w[t - 16] + w[t - 7] + (turn(w[t - 15], 7) ^ turn(w[t - 15], 18) ^ w[t - 15] >>> 3) +
        (turn(w[t - 2], 17) ^ turn(w[t - 2], 19) ^ w[t - 2] >>> 10);
    let [a, b, c, d, e, f, g, h] = state;
    for (let t = 0; t < 64; t++) {
      const one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (e & f ^ ~e & g) + constants[t] +
        w[t];
      const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + (a & b ^ a & c ^ b & c);
      [h, g, f, e, d, c, b, a] = [g, f, e, d + one | 0, c, b, a, one + two | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((v, m) => { state[m] += v; });
  }
  return [...state].map(v => v.toString(16).padStart(8, "0")).join("");
}

/* ---------- reading ---------- */
function check(fine, what, value) {
  if (!fine) throw new Error(`${what}, got ${String(JSON.stringify(value)).slice(0, 40)}`);
}
const isWhole = (v, below) => Number.isInteger(v) && v >= 0 && v < below;
function readHypothesis(h) { /* a copy with the known fields only */
  check(h && typeof h === "object" && !Array.isArray(h), "it must be an object", h);
  const { feature, drawing, raises = null, lowers = null, threshold = null, tested: frozen } = h;
  const caption = h.caption ?? "", of = h.classes ?? [], tries = h.tries ?? 0;
  const confidence = h.confidence ?? "";
  check(position.has(feature), "feature must be a number of a feature on this page", feature);
  check(typeof caption === "string" && caption.length <= LONGEST_CAPTION,
    `caption must be text of at most ${LONGEST_CAPTION} characters`, caption);
  check(Array.isArray(drawing) && drawing.length === CH,
    `drawing must have ${CH} rows`, drawing?.length ?? null);
  for (const row of drawing) check(typeof row === "string" && row.length === CW &&
    [...row].every(c => c in TONES), `a row of drawing must be ${CW} characters of .+#-=`, row);
  check(Array.isArray(of) && new Set(of).size === of.length && of.every(c => isWhole(c, C)),
    `classes must be different whole numbers below ${C}`, of);
  for (const [verb, c] of Object.entries({ raises, lowers }))
    check(c === null || isWhole(c, C), `${verb} must be null or a whole number below ${C}`, c);
  check(raises === null || raises !== lowers, "raises and lowers must differ", lowers);
  check(["", ...CONFIDENCES].includes(confidence), "confidence must be High, Medium, Low or empty",
    confidence);
  check(threshold === null || Number.isInteger(threshold) && Math.abs(threshold) < 2 ** 31,
    "threshold must be null or a whole number", threshold);
  check(isWhole(tries, 1e6) && (tries > 0 || !frozen), "tries must be a whole number", tries);
  const own = { feature, caption, drawing: [...drawing], classes: [...of], raises, lowers,
    confidence, threshold, tries, tested: null };
  /* Results are not read: the page computes them again, where nothing has been changed since. */
  if (frozen && threshold !== null && frozen.sha256 === sha256(canonical(own)) &&
    isTestable("test_half", position.get(feature))) own.tested = { sha256: frozen.sha256 };
  return own;
}
function readFile(text) {
  let file;
  try { file = JSON.parse(text); } catch { throw new Error("it must be JSON"); }
  check(file?.format === FORMAT, `format must be "${FORMAT}"`, file?.format ?? null);
  check(Array.isArray(file.hypotheses) && file.hypotheses.length <= MOST_HYPOTHESES,
    `hypotheses must be a list of at most ${MOST_HYPOTHESES}`, file.hypotheses?.length);
  const foreign = file.sae !== undefined && file.sae !== testing.sae;
  check(!foreign, "its hypotheses must be about the SAE of this page", file.source);
  return file.hypotheses.map((h, n) => {
    try { return readHypothesis(h); } catch (error) {
      throw new Error(`hypothesis ${n + 1}: ${error.message}`);
    }
  });
}
function add(found) { /* those that are not here already; their number */
  const known = new Set(mine.list.map(h => canonical(h) + Boolean(h.tested)));
  const fresh = found.filter(h => !known.has(canonical(h) + Boolean(h.tested)));
  check(mine.list.length + fresh.length <= MOST_HYPOTHESES,
    `there can be at most ${MOST_HYPOTHESES} hypotheses`, mine.list.length + fresh.length);
  mine.list.push(...fresh);
  for (const { feature, tries } of found)
    mine.looks.set(feature, Math.max(tries, mine.looks.get(feature) ?? 0));
  return fresh.length;
}

/* ---------- writing ---------- */
function fileOf(list, full) {
  const plain = h => ({ ...h, tested: h.tested && full ? { ...h.tested, ...testResults(h) }
    : h.tested });
  return JSON.stringify({ format: FORMAT, source: meta.title, sae: testing.sae,
    hypotheses: list.map(plain) }, null, full ? 1 : 0);
}
function save() {
  if (mine.unread) return; /* what could not be read is not overwritten */
  try {
    localStorage.setItem(KEPT_AS, fileOf(mine.list, false));
    localStorage.setItem(`${KEPT_AS} looks`, JSON.stringify([...mine.looks]));
    mine.kept = true;
  } catch { mine.kept = false; } /* blocked, or full */
}
const keptWords = () => mine.kept ? "Kept in this browser only."
  : "This browser keeps nothing for this page: export before you leave.";
function loadMine() {
  try {
    const text = localStorage.getItem(KEPT_AS);
    if (text) add(readFile(text));
    for (const [k, n] of JSON.parse(localStorage.getItem(`${KEPT_AS} looks`) ?? "[]"))
      if (position.has(k) && isWhole(n, 1e6)) mine.looks.set(k, n);
  } catch { mine.kept = false; mine.unread = true; }
}
function exportFile() {
  const blob = new Blob([fileOf(mine.list, true)], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: FILE }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
