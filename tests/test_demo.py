"""The demo passes, touches nothing it should not, and fails when an analysis function is wrong."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_hypotheses as fh

SCRIPT = Path(demo.__file__).resolve()


@pytest.fixture(autouse=True)
def one_thread():
    """The demo's matrices are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failed_checks(text: str) -> list[str]:
    return [line.split("  ")[0] for line in text.splitlines() if line.endswith("FAILED")]


@pytest.fixture(autouse=True)
def no_statements(monkeypatch):
    """They take most of the time: only the demo that runs as a script tries them."""
    monkeypatch.setattr(demo, "statement_checks", lambda: iter(()))


# --------------------------------------------------------------------------------------------------
# It passes
# --------------------------------------------------------------------------------------------------


def test_demo_runs_as_a_script_and_writes_every_picture(tmp_path):
    command = [sys.executable, SCRIPT, "--out", "new/pictures"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")

    lines = done.stdout.splitlines()
    checks = [line for line in lines if line.endswith(" ok")]
    passed = "46 checks passed, 0 failed; pictures in new/pictures, see feature_0_panel.png first"
    assert lines[-1] == passed
    assert len(checks) == 46
    assert len({len(line) for line in checks}) == 1  # columns of fixed width
    kinds = ("gallery.png", "pattern.png", "pattern.npy", "panel.png")
    expected = {f"feature_{k}_{kind}" for k in range(len(demo.PLANTED)) for kind in kinds}
    expected |= {"single_gallery.png", "single_pattern.png"}
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


NAMED = """collect_feature_bank merge_feature_banks bands feature_input_pattern
feature_input_patterns feature_logit_effect feature_logit_effects feature_ablation_effect
feature_ablation_effects nearest_features pattern_roughness"""


def test_every_analysis_function_is_named_in_the_output(no_pictures, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in NAMED.split():
        assert f"\n{name}" in shown


@pytest.mark.parametrize("seed", [1, 2])
def test_checks_hold_for_other_images_too(seed, no_pictures, monkeypatch, tmp_path):
    draw = demo.draw_scene
    monkeypatch.setattr(demo, "draw_scene", lambda plan: draw(plan, seed))
    assert demo.main(["--out", str(tmp_path)]) == 0


def blots(n: int) -> list[demo.Planted]:
    """n more strokes of two pixels each, where nothing is drawn yet."""
    taken = np.any([row.mask for row in demo.PLANTED] + [demo.STAIN], axis=0)
    rows = []
    for r, c in np.ndindex(11, 11):
        top, left = 3 + 2 * r, 3 + 2 * c
        spot = demo.box(top, top, left, left + 1)
        i = len(rows)
        if i < n and not (spot & taken).any():
            rows.append(demo.Planted(f"blot {i}", spot, i % 6, (i + 1) % 6, 0.7 + 0.05 * i))
    return rows


def test_the_table_can_grow(no_pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PLANTED", (*demo.PLANTED, *blots(24)))
    assert len(demo.PLANTED) == 33
    assert demo.main(["--out", str(tmp_path)]) == 0


def test_a_stroke_without_own_pixels_is_refused():
    hidden = demo.PLANTED[0]._replace(name="copy")
    with pytest.raises(ValueError, match="every pixel of 'vertical bar' belongs to another stroke"):
        demo.make_plan((*demo.PLANTED, hidden))


# --------------------------------------------------------------------------------------------------
# What is planted is as difficult as it claims
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    plan = demo.make_plan(demo.PLANTED)
    scene = demo.draw_scene(plan)
    return plan, scene, demo.work_out(plan, scene), demo.plant(plan)


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    plan = demo.make_plan(demo.PLANTED)
    scene, again = demo.draw_scene(plan), demo.draw_scene(plan)
    demo.plant(plan)
    demo.work_out(plan, scene)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert all(torch.equal(a, b) for a, b in zip(scene, again, strict=True))


def test_images_have_what_they_should(planted):
    _, scene, hand, _ = planted
    strokes = (scene.ink > 0).sum(1)
    blank = scene.images.amax((1, 2, 3)) == 0
    assert scene.images.shape == (len(scene.labels), 1, 28, 28)
    assert 0 <= scene.images.min() < scene.images.max() <= 1
    assert blank.any()
    assert (strokes >= 2).float().mean() > 0.4
    assert len(scene.labels.unique()) == demo.N_CLASSES
    assert (scene.labels[blank] == 0).all()
    drawn = scene.ink[scene.ink > 0]
    assert drawn.min() < 0.5 < 0.95 < drawn.max()
    assert (scene.images[:, 0, :2] == 0).all()  # pixels that no image inks, as in MNIST
    few = (hand.fires.sum(0) > 0) & (hand.fires.sum(0) <= fa.SAMPLE_PER_FEATURE)
    assert few.sum() > 3


def test_features_have_what_they_should(planted):
    plan, _, hand, (_, sae, mu, std) = planted
    k = {name: k for k, name in enumerate(plan.names)}
    assert not hand.fires[:, k["dead dash"]].any()
    assert hand.patterns[k["empty centre"]].min() < 0 == hand.patterns[k["empty centre"]].max()
    row, twin = sae.W_dec[k["ring"]], sae.W_dec[k["strong ring"]]
    assert float(row @ twin) == pytest.approx(0.95, abs=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(len(plan.table)))
    assert mu.abs().max() > 0.5
    assert std.max() > 2 * std.min()
    assert len(std.unique()) == len(std)


def test_the_head_saturates_and_the_sae_errs(planted):
    plan, scene, hand, (model, sae, mu, std) = planted
    once = demo.effects_by_hand(plan, hand, "logit", 2000, alpha=1.0)
    thrice = demo.effects_by_hand(plan, hand, "logit", 2000, alpha=3.0)
    assert abs(thrice - 3 * once).max() > 0.3

    z = (model.preactivations(scene.images) - mu) / std
    error = (z - sae.decode(sae.encode(z))).square().sum() / (z - z.mean(0)).square().sum()
    assert error > 0.1


# --------------------------------------------------------------------------------------------------
# It fails when it should
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the drawing, which takes most of the time."""
    monkeypatch.setattr(demo, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(demo, "picture_checks", lambda *_: ())


def slow_ablation(error: str):
    """Ablation through the decoder, one feature at a time.

    What becomes of the SAE's error is right when it is "kept", and wrong when it is "forgotten" or
    "in the effect".
    """

    def effect(model, loader, sae, mu, std, k, n_eval=2000):
        z = (model.preactivations(torch.cat([images for images, _ in loader])) - mu) / std
        feature_acts = sae.encode(z)
        at = (feature_acts[:, k] > 0).nonzero()[:n_eval, 0]
        if len(at) == 0:
            return fa.LogitEffect(torch.zeros(demo.N_CLASSES), -1)

        without = feature_acts[at].clone()
        without[:, k] = 0
        before, after = sae.decode(feature_acts[at]), sae.decode(without)
        if error == "kept":
            before, after = z[at], after + z[at] - before
        elif error == "in the effect":
            before = z[at]

        logits_before = model.logits_from_preactivations(before * std + mu)
        logits_after = model.logits_from_preactivations(after * std + mu)
        delta = logits_after.mean(0) - logits_before.mean(0)
        return fa.LogitEffect(delta, int(delta.argmax()))

    return effect


def for_all(effect):
    """A function of every feature made of one of a single feature."""

    def effects(model, loader, sae, mu, std, n_eval=2000):
        each = [effect(model, loader, sae, mu, std, k, n_eval) for k in range(len(sae.W_dec))]
        deltas = torch.stack([one.mean_delta for one in each])
        tops = torch.tensor([one.top_class for one in each])

        z = (model.preactivations(torch.cat([images for images, _ in loader])) - mu) / std
        n_images = (sae.encode(z) > 0).sum(0).clamp(max=n_eval)
        return fa.LogitEffects(deltas, tops, n_images)

    return effects


def test_a_correct_but_slow_ablation_passes(no_pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(fa, "feature_ablation_effect", slow_ablation("kept"))
    monkeypatch.setattr(fa, "feature_ablation_effects", for_all(slow_ablation("kept")))
    assert demo.main(["--out", str(tmp_path)]) == 0


# Each takes a true function and gives a wrong one.


def forgotten(_):
    return slow_ablation("forgotten")


def in_the_effect(_):
    return slow_ablation("in the effect")


def all_forgotten(_):
    return for_all(slow_ablation("forgotten"))


def all_in_the_effect(_):
    return for_all(slow_ablation("in the effect"))


def without_std(true):
    def broken(model, loader, sae, mu, std, *args, **kw):
        divided = sae._replace(W_dec=sae.W_dec / std)
        return true(model, loader, divided, mu, std, *args, **kw)

    return broken


def reversed_topk(true):
    def broken(*args, **kw):
        bank = true(*args, **kw)
        return bank._replace(top=fa.Examples(*(column.flip(1) for column in bank.top)))

    return broken


def first_index_ignored(true):
    return lambda *args, first_index=0, **kw: true(*args, **kw)


def shifted_labels(true):
    def broken(*args, **kw):
        bank = true(*args, **kw)
        return bank._replace(label_histogram=bank.label_histogram.roll(1, 1))

    return broken


def second_forgotten(true):
    def broken(a, b):
        n_images = a.n_images + b.n_images
        return true(a, b)._replace(label_histogram=a.label_histogram, n_images=n_images)

    return broken


def linear_in_alpha(true):
    def broken(*args, alpha=1.0, **kw):
        effects = true(*args, **kw)
        return effects._replace(mean_delta=alpha * effects.mean_delta)

    return broken


def negated_top(true):
    def broken(*args, **kw):
        effect = true(*args, **kw)
        return effect._replace(top_class=(-effect.mean_delta).argmax(-1))

    return broken


def all_images(true):
    return lambda *args, n_eval=2000, **kw: true(*args, **kw)


def transposed(true):
    return lambda *args, **kw: true(*args, **kw).mT


def negative(true):
    return lambda *args, **kw: -true(*args, **kw)


def doubled(true):
    return lambda *args, **kw: 2 * true(*args, **kw)


def pattern_without_std(true):
    return lambda model, sae, mu, std, k: true(model, sae, mu, torch.ones_like(std), k)


def nearest_to_itself(_):
    return lambda W_dec: fa.NearestFeatures(torch.arange(len(W_dec)), torch.ones(len(W_dec)))


class Breakage(NamedTuple):
    function: str  # of feature_analysis
    breaking: Callable  # what makes the wrong function
    check: str = ""  # the check that must fail, behind the function's name


COUNTS, STRONGEST = ": images that fire it, by label", ": strongest activations"
RAISED, FEW, MUCH = ": class raised most", ": n_eval=25", ": n_eval=25, alpha=3"
BREAKAGES = {
    "ablation, error forgotten": Breakage("feature_ablation_effect", forgotten),
    "ablation, error in the effect": Breakage("feature_ablation_effect", in_the_effect),
    "ablations, error forgotten": Breakage("feature_ablation_effects", all_forgotten),
    "ablations, error in it": Breakage("feature_ablation_effects", all_in_the_effect),
    "ablation without std": Breakage("feature_ablation_effect", without_std),
    "ablations without std": Breakage("feature_ablation_effects", without_std),
    "ablations, n_eval ignored": Breakage("feature_ablation_effects", all_images, FEW),
    "ablation, wrong class": Breakage("feature_ablation_effect", negated_top, RAISED),
    "logit without std": Breakage("feature_logit_effect", without_std),
    "logits without std": Breakage("feature_logit_effects", without_std),
    "logits linear in alpha": Breakage("feature_logit_effects", linear_in_alpha, MUCH),
    "logits, n_eval ignored": Breakage("feature_logit_effects", all_images, MUCH),
    "logits, wrong class": Breakage("feature_logit_effects", negated_top, RAISED),
    "top-k reversed": Breakage("collect_feature_bank", reversed_topk, STRONGEST),
    "histogram shifted": Breakage("collect_feature_bank", shifted_labels, COUNTS),
    "merge, top-k reversed": Breakage("merge_feature_banks", reversed_topk, STRONGEST),
    "merge, half a histogram": Breakage("merge_feature_banks", second_forgotten, COUNTS),
    "pattern transposed": Breakage("feature_input_pattern", transposed),
    "patterns transposed": Breakage("feature_input_patterns", transposed),
    "pattern without std": Breakage("feature_input_pattern", pattern_without_std),
    "patterns of other sign": Breakage("feature_input_patterns", negative),
    "roughness doubled": Breakage("pattern_roughness", doubled),
    "nearest to itself": Breakage("nearest_features", nearest_to_itself, ": cosine"),
}


def keep_collecting_right(monkeypatch) -> None:
    """Collecting merges its batches by a function that is to be broken: let it use the true one."""
    merge, collect = fa.merge_feature_banks, fa.collect_feature_bank

    def collecting(*args, **kw):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fa, "merge_feature_banks", merge)
            return collect(*args, **kw)

    monkeypatch.setattr(fa, "collect_feature_bank", collecting)


@pytest.mark.parametrize("name", BREAKAGES)
def test_demo_fails_when_a_function_is_wrong(name, no_pictures, monkeypatch, tmp_path, capsys):
    function, breaking, check = BREAKAGES[name]
    if function == "merge_feature_banks":
        keep_collecting_right(monkeypatch)
    monkeypatch.setattr(fa, function, breaking(getattr(fa, function)))
    assert demo.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    failed = failed_checks(shown)
    assert function + check in failed
    assert f", {len(failed)} failed; " in shown.splitlines()[-1]


def test_halves_with_wrong_indices_are_not_merged(no_pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(fa, "collect_feature_bank", first_index_ignored(fa.collect_feature_bank))
    with pytest.raises(ValueError, match="both banks hold image"):
        demo.main(["--out", str(tmp_path)])


def test_demo_fails_when_bands_are_reversed(no_pictures, monkeypatch, tmp_path, capsys):
    true = fa.FeatureBank.bands
    monkeypatch.setattr(fa.FeatureBank, "bands", lambda bank, k: true(bank, k)[::-1])
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert failed_checks(capsys.readouterr().out) == ["bands: quarters of the active range"]


def gallery_of_another(true):
    return lambda self, k, bank: true(self, (k + 1) % 3, bank)


def pattern_of_other_sign(true):
    return lambda self, heat, k: true(self, -heat, k)


GALLERIES = ("write_feature_pictures", "show_feature_gallery")
PATTERNS = ("write_feature_pictures", "visualize_feature_pattern")
PAINTERS = [  # the painter, what breaks it, who must fail, and in what
    (fa.GalleryPainter, gallery_of_another, GALLERIES, "strongest image comes first"),
    (fa.PatternPainter, pattern_of_other_sign, PATTERNS, "red less blue pixels"),
]


@pytest.mark.parametrize(("painter", "breaking", "functions", "what"), PAINTERS)
def test_demo_fails_when_a_picture_is_wrong(
    painter, breaking, functions, what, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(demo, "PLANTED", demo.PLANTED[:3])
    assert demo.main(["--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(painter, "paint", breaking(painter.paint))
    assert demo.main(["--out", str(tmp_path)]) == 1
    failed = failed_checks(capsys.readouterr().out)
    assert {f"{function}: {what}" for function in functions} <= set(failed)
    assert all(check.endswith(what) for check in failed)


def test_compare_shows_the_worst_value_and_refuses_nan_and_shapes():
    names = ["a", "b"]
    table = demo.compare("x", names, [[1, 2], [3, 4]], [[1, 2.5], [3, 4]])
    assert table == ("x", "a [1]", "2", "2.5", False)
    assert demo.compare("x", names, [1, 2], [1, 2]) == ("x", "b", "2", "2", True)
    assert demo.compare("x", names, [1, 2], [1, float("nan")]) == ("x", "b", "2", "nan", False)
    assert demo.compare("x", names, [1, 2], [1, 2, 3]).where == "shape"


# --------------------------------------------------------------------------------------------------
# Statements: the pieces of which their checks are made
# --------------------------------------------------------------------------------------------------


def claim_about(row: demo.Planted, word: fh.Word) -> fh.Hypothesis:
    """A claim that names the class of `row`, its effects, and a word."""
    return fh.Hypothesis(
        feature=0,
        ink=fh.Strokes((word,)),
        often=(row.pushes,),
        hardly=(),
        label_scores=(1.0,) * demo.N_CLASSES,
        effect=fh.Effect(row.pushes, 0.3, row.against, 0.2),
        cut=0.5,
        drawing=fh.Strokes(),
        typical_activation=1.0,
        label_histogram=(1,) * demo.N_CLASSES,
        n_images=10,
        influence=0.1,
        changes=0.1,
        why_not={},
    )


def test_a_claim_is_right_where_it_says_what_was_planted():
    row, centre = demo.stroke_table(0)[0], demo.CENTRES[0]
    planted = fh.Word(row.name.split()[0], False, 0, 0)
    right = claim_about(row, planted)
    everything = {"word": True, "labels, if named": True, "effect, if named": True}
    assert demo.is_right(right, row, centre) == everything

    for word, is_right in (
        (planted._replace(long=True), True),
        (planted._replace(row=1, col=1), True),  # a cell that touches
        (planted._replace(col=2), False),
        (planted._replace(shape="dot"), False),
    ):
        claim = claim_about(row, word)
        assert demo.is_right(claim, row, centre) == everything | {"word": is_right}
    for labels in ({"often": (row.pushes, row.against)}, {"often": (), "hardly": (row.against,)}):
        found = demo.is_right(right._replace(**labels), row, centre)
        assert found == everything | {"labels, if named": False}
    exchanged = right._replace(effect=fh.Effect(row.against, 0.3, row.pushes, 0.2))
    assert demo.is_right(exchanged, row, centre) == everything | {"effect, if named": False}
    nothing = right._replace(often=(), ink=fh.Strokes(), effect=None)
    assert demo.is_right(nothing, row, centre) == everything | {"word": False}


def test_shuffling_keeps_activations_and_moves_them_to_other_images():
    scene = demo.draw_scene(demo.make_plan(demo.PLANTED))
    layer = demo.plant(demo.make_plan(demo.PLANTED))
    true = fa.collect_activity(layer, scene.images, scene.labels)
    found = demo.shuffled(true, seed=1)
    assert torch.equal(found.start, true.start)
    assert torch.equal(found.activation, true.activation)
    assert torch.equal(found.labels, true.labels)
    assert not torch.equal(found.image, true.image)
    for k in range(len(demo.PLANTED)):
        images = found.of(k)[0]
        assert torch.equal(images, images.unique())  # ascending, each once
        assert (images < len(scene.labels)).all()
    assert torch.equal(found.image, demo.shuffled(true, seed=1).image)


def test_strokes_of_the_four_turns_stand_in_the_same_places():
    tables = [demo.stroke_table(turn) for turn in range(4)]
    for k, (r, c) in enumerate(demo.CENTRES):
        orientations = {table[k].name.split()[0] for table in tables}
        assert orientations == set(demo.ORIENTATIONS)
        for table in tables:
            rows, columns = np.nonzero(table[k].mask)
            assert abs(rows.mean() - r) <= 0.5
            assert abs(columns.mean() - c) <= 0.5
            assert table[k].pushes != table[k].against


def test_shares_are_checked_against_their_bars():
    outcomes = [True] * 19 + [False]
    assert demo.at_least("x", outcomes, 0.95) == ("x", "20 features", ">= 95%", "95.0%", True)
    assert not demo.at_least("x", outcomes, 0.96).ok
    assert demo.at_most("x", outcomes, 0.95) == ("x", "20 features", "<= 95%", "95.0%", True)
    assert not demo.at_most("x", outcomes, 0.94).ok


def one_statement(**wrong: bool) -> demo.Statements:
    """One feature right in all but `wrong`, and as many null statements, none confirmed."""
    right = {"class": True, "place": True, "confirmed": True} | wrong
    return demo.Statements([right], {"activations shuffled": [False]})


def test_statements_that_are_wrong_or_confirmed_by_chance_fail(monkeypatch):
    monkeypatch.undo()  # the checks of statements themselves

    def checked(*tried: demo.Statements) -> list[str]:
        """The checks that fail when the models give `tried`, one after the other."""
        monkeypatch.setattr(demo, "try_statements", lambda turn: tried[turn % len(tried)])
        return [check.what for check in demo.statement_checks() if not check.ok]

    fine = one_statement()
    assert checked(fine) == []
    misplaced = one_statement(place=False)
    assert checked(fine, misplaced) == ["statements: place", "statements: all of these"]
    lucky = fine._replace(null_confirmed={"activations shuffled": [True]})
    assert checked(fine, lucky) == ["null statements confirmed: activations shuffled"]


# --------------------------------------------------------------------------------------------------
# Nowhere to write
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_folder_that_cannot_be_made_gives_one_line_and_status_2(below, tmp_path, capsys):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    assert demo.main(["--out", str(in_the_way / below)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(f"cannot write pictures into {in_the_way / below} (")
    assert in_the_way.read_text() == "not a folder"


def test_a_full_disk_gives_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fa, "write_whole", full)
    assert demo.main(["--out", str(tmp_path)]) == 2
    problem = f"cannot write pictures into {tmp_path} (No space left on device)"
    assert capsys.readouterr() == ("", f"{problem}: give another folder with --out\n")
