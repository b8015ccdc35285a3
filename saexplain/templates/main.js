/* The view named in the address, and the keys that work in every view. */
const views = { story: storyView, class: classView, pair: pairView, errors: errorsView,
  features: featuresView, feature: featureView, two: twoView, words: wordsView,
  ...LOOK.can_write && { draw: drawView, write: writeView, yours: yoursView },
  ...WHERE && { images: imagesView } };
const inMenu = { story: "Overview", class: "Classes", pair: "Two classes", errors: "Errors",
  images: "Images", features: "Features", draw: "Draw", yours: "Your hypotheses",
  words: "Words" };
let current = "";
const withoutView = { feature: "feature", set: "draw", step: "story" }; /* short addresses */
const viewOf = () => address().get("view") ??
  withoutView[Object.keys(withoutView).find(field => address().has(field))] ??
  (location.hash.slice(1) || "story");

function focusKey(node) { /* a selector that finds the same control after its view is redrawn */
  if (!node || node === document.body) return null;
  if (node.id) return `#${CSS.escape(node.id)}`;
  const group = node.closest("nav")?.getAttribute("aria-label");
  return group && node.hasAttribute("href")
    ? `nav[aria-label="${CSS.escape(group)}"] a[href="${CSS.escape(node.getAttribute("href"))}"]`
    : null;
}
function route(isNear = false) { /* isNear: the address asked for something else */
  if (isNear !== true) misread.clear();
  const isKnown = Object.hasOwn(views, viewOf()), view = isKnown ? viewOf() : "story";
  if (isKnown) checkFields();
  else misreadField("view", viewOf());
  const same = view === current;
  const back = same ? focusKey(document.activeElement) : null;
  current = view;
  views[view]();
  if (current !== view) return; /* it went to another one */
  main.prepend(misreadWords());
  forgetMisread();
  document.querySelectorAll("#views a").forEach(a =>
    a.setAttribute("aria-current", a.dataset.view === view ? "page" : "false"));
  const heading = main.querySelector("h2")?.textContent ?? "";
  document.title = `${heading}: ${meta.title}`;
  if (back) document.querySelector(back)?.focus({ preventScroll: true });
  if (same && view !== "feature") return;
  scrollTo(0, 0);
  announce(heading);
}
/* Escape: in the drawing view its own steps, otherwise back to what contains the view. */
function leave() {
  const { image, step } = Object.fromEntries(address());
  if (current === "draw") return leaveDrawing();
  if (["feature", "two", "write"].includes(current))
    return history.length > 1 ? history.back() : null;
  if (current === "story" && step !== undefined) location.hash = to("story");
  else if (image !== undefined) {
    const rest = address();
    rest.delete("image");
    location.hash = rest;
  } else if (current !== "story") location.hash = to("story");
}
function keys(e) {
  if (e.altKey || e.ctrlKey || e.metaKey) return;
  if (e.key === "Escape") return leave();
  if (/^(INPUT|SELECT|TEXTAREA|CANVAS)$/.test(e.target.tagName)) return;
  if (e.target.closest?.("[role=group]")) return;
  if (current === "feature" && (e.key === "ArrowLeft" || e.key === "ArrowRight")) {
    const by = e.key === "ArrowRight" ? 1 : -1;
    location.hash = neighborInList(Number(address().get("feature")), by);
  } else if (current === "features") gridKeys(e);
}
function start() {
  byId("title").textContent = meta.title;
  const entries = Object.entries(inMenu).filter(([view]) => view in views &&
    (view !== "draw" || meta.network) && (view !== "images" || meta.tests));
  byId("views").append(...entries.map(([view, title]) =>
    el("a", { href: to(view), "data-view": view }, title)));
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", route);
  route();
  document.body.dataset.ready = Math.round(performance.now()); /* ms since loading began */
}
recallList();
unpack().then(() => LOOK.can_write && loadMine()).then(start).catch(error => showMain(el("p", {},
  `This browser could not read the page's data (${error}). Use a current Chromium or Firefox.`)));
