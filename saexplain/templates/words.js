/* What each term means, in one plain line; every view has a link to it. */
const GLOSSARY = {
  "validation and test images": "Images that the network was not trained on. What features do is " +
    "measured on the validation images, whether hypotheses are right on the test images: one " +
    "half of these is for the test, the other half for a repetition.",
  "score": "A number (also called logit) that the network computes for each class. It predicts " +
    "the class with the largest score.",
  "activation": "A number that a layer of the network, or a feature, has on one image.",
  "SAE": "Sparse autoencoder: a small second network that rebuilds the activations of a layer " +
    "from a few of many features.",
  "feature": "One of the parts from which the SAE rebuilds activations. It is active (above its " +
    "threshold) on some images, and 0 on all others.",
  "rate": "The share of images on which a feature is active; also called density.",
  "L0": "The mean number of features that are active on an image.",
  "FVU": "Fraction of variance unexplained: the share of the activations' variance that the SAE " +
    "does not rebuild; 0 is perfect.",
  "contribution": "What a feature does to a score: the score, minus the score after this feature " +
    "alone is removed from the activations. It supports a class where this is above 0.",
  "influence": "A feature's share of all changes of scores that removing single features causes. " +
    "This page counts it on the validation images, hypotheses.md and influence.png on the test " +
    "images.",
  "input pattern": "What at each place of an image raises the feature's activation (red), and " +
    "what lowers it (blue).",
  "hypothesis": "What an image must look like to activate a feature: a drawing, or words. It is " +
    "made from validation images and tested on test images.",
  ...LOOK.can_write && { "match": "How well an image fits a drawing: its " +
    `${INK} in the red cells, minus that in the blue cells. From a threshold on the image is ` +
    "picked: the feature is predicted to be active." },
  "precision": "Of the images that a hypothesis picks, the share that activate the feature.",
  "recall": "Of the images that activate the feature, the share that a hypothesis picks.",
  "F1": "Precision and recall in one number, their harmonic mean, from 0 to 1.",
  "average precision": "The mean of the precision over all thresholds; 1 is perfect.",
  "AUROC": "How often an image that activates the feature has a better match than one that does " +
    "not; 0.5 is chance, 1 is perfect.",
  "confirmed": "The result of a test is large enough, and more than chance. Refuted: it is too " +
    "small. Inconclusive: these images cannot decide.",
  "[a, b]": "A 95% interval: with other images of the same kind the number would mostly be in it.",
  "confidence": "How well a hypothesis did in its tests: High, Medium or Low. What removing a " +
    "feature does to scores is never enough for more than Low.",
  "replicated": "The other half of the test images gives a hypothesis the same confidence, or a " +
    "higher one.",
  "reproducible": "SAEs trained from other random starts (seeds) have nearly the same feature. " +
    "Others are specific to the seed: not found by a second SAE.",
  "flip set": "The fewest features found whose removal turns an error into the right prediction.",
  "cosine": "How alike two directions are: 1 the same, 0 unrelated.",
};
/* The word as a link to what it means, which also shows under the pointer. */
const term = (word, shownAs = word) => el("a",
  { class: "term", href: to("words", { of: word }), title: GLOSSARY[word] }, shownAs);
function wordsView() {
  const of = address().get("of");
  if (of !== null && !Object.hasOwn(GLOSSARY, of)) misreadField("of");
  showMain(el("h2", {}, "Words"), el("dl", { class: "words" }, Object.entries(GLOSSARY).map(
    ([word, text]) => [el("dt", word === of ? { class: "here" } : {}, word), el("dd", {}, text)])),
  LOOK.can_write && WORDS && note(WORDS));
  requestAnimationFrame(() => main.querySelector("dt.here")?.scrollIntoView({ block: "center" }));
}
