"""The demo passes, touches nothing it should not, and fails when an analysis function is wrong."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo_feature_analysis as demo
import feature_analysis as fa

SCRIPT = Path(demo.__file__).resolve()


@pytest.fixture(autouse=True)
def one_thread():
    """The demo's matrices are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failed_checks(text):
    return [line.split("  ")[0] for line in text.splitlines() if line.endswith("FAILED")]


@pytest.fixture(autouse=True)
def no_statements(monkeypatch):
    """test_hypotheses.py has them; here, only the demo that runs as a script tries them, too."""
    monkeypatch.setattr(demo, "statement_checks", lambda: iter(()))


# ---------------------------------------------------------------------------------------------------------------------
# It passes
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_runs_as_a_script_and_writes_every_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", "new/pictures"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    checks = [line for line in lines if line.endswith(" ok")]
    assert lines[-1].startswith(f"{len(checks)} checks passed, 0 failed; pictures in new/pictures, see feature_0_panel")
    assert len(checks) > 30
    assert len({len(line) for line in checks}) == 1  # columns of fixed width
    kinds = ("gallery.png", "pattern.png", "pattern.npy", "panel.png")
    expected = {f"feature_{k}_{kind}" for k in range(len(demo.PLANTED)) for kind in kinds}
    expected |= {"single_gallery.png", "single_pattern.png"}
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_every_analysis_function_is_named_in_the_output(no_pictures, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in (
        "collect_feature_bank merge_feature_banks bands feature_input_pattern feature_input_patterns "
        "feature_logit_effect feature_logit_effects feature_ablation_effect feature_ablation_effects "
        "nearest_features pattern_roughness"
    ).split():
        assert f"\n{name}" in shown


@pytest.mark.parametrize("seed", [1, 2])
def test_checks_hold_for_other_images_too(seed, no_pictures, monkeypatch, tmp_path):
    draw = demo.draw_scene
    monkeypatch.setattr(demo, "draw_scene", lambda plan: draw(plan, seed))
    assert demo.main(["--out", str(tmp_path)]) == 0


def test_the_table_can_grow(no_pictures, monkeypatch, tmp_path):
    taken = np.any([row.mask for row in demo.PLANTED] + [demo.STAIN], axis=0)
    spots = [demo.box(r, r, c, c + 1) for r in range(3, 25, 2) for c in range(3, 24, 2)]
    free = [spot for spot in spots if not (spot & taken).any()][:24]
    blots = [demo.Planted(f"blot {i}", spot, i % 6, (i + 1) % 6, 0.7 + 0.05 * i) for i, spot in enumerate(free)]
    monkeypatch.setattr(demo, "PLANTED", (*demo.PLANTED, *blots))
    assert len(demo.PLANTED) > 32
    assert demo.main(["--out", str(tmp_path)]) == 0


def test_a_stroke_without_own_pixels_is_refused():
    hidden = demo.PLANTED[0]._replace(name="copy")
    with pytest.raises(ValueError, match="every pixel of 'vertical bar' belongs to another stroke"):
        demo.make_plan((*demo.PLANTED, hidden))


# ---------------------------------------------------------------------------------------------------------------------
# What is planted is as difficult as it claims
# ---------------------------------------------------------------------------------------------------------------------


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
    once, thrice = (demo.effects_by_hand(plan, hand, "logit", 2000, alpha) for alpha in (1.0, 3.0))
    assert abs(thrice - 3 * once).max() > 0.3
    z = (model.preactivations(scene.images) - mu) / std
    error = (z - sae.decode(sae.encode(z))).square().sum() / (z - z.mean(0)).square().sum()
    assert error > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# It fails when it should
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the drawing, which takes most of the time."""
    monkeypatch.setattr(demo, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(demo, "picture_checks", lambda *_: ())


def slow_ablation(error: str):
    """Ablation through the decoder, one feature at a time; `error` is "kept", "forgotten" or "in the effect"."""

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
        delta = [model.logits_from_preactivations(state * std + mu).mean(0) for state in (after, before)]
        return fa.LogitEffect(delta[0] - delta[1], int((delta[0] - delta[1]).argmax()))

    return effect


def for_all(effect):
    """A function of every feature made of one of a single feature."""

    def effects(model, loader, sae, mu, std, n_eval=2000):
        each = [effect(model, loader, sae, mu, std, k, n_eval) for k in range(len(sae.W_dec))]
        z = (model.preactivations(torch.cat([images for images, _ in loader])) - mu) / std
        n_images = (sae.encode(z) > 0).sum(0).clamp(max=n_eval)
        return fa.LogitEffects(torch.stack([e.mean_delta for e in each]), torch.tensor([e[1] for e in each]), n_images)

    return effects


def test_a_correct_but_slow_ablation_passes(no_pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(fa, "feature_ablation_effect", slow_ablation("kept"))
    monkeypatch.setattr(fa, "feature_ablation_effects", for_all(slow_ablation("kept")))
    assert demo.main(["--out", str(tmp_path)]) == 0


def without_std(true):
    return lambda model, loader, sae, mu, std, *a, **kw: true(
        model, loader, sae._replace(W_dec=sae.W_dec / std), mu, std, *a, **kw
    )


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
    return lambda a, b: true(a, b)._replace(label_histogram=a.label_histogram, n_images=a.n_images + b.n_images)


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


BREAKAGES = {  # name: (attribute of feature_analysis, what makes the wrong function, check that must fail)
    "ablation, error forgotten": ("feature_ablation_effect", lambda _: slow_ablation("forgotten"), ""),
    "ablation, error in the effect": ("feature_ablation_effect", lambda _: slow_ablation("in the effect"), ""),
    "ablations, error forgotten": ("feature_ablation_effects", lambda _: for_all(slow_ablation("forgotten")), ""),
    "ablations, error in it": ("feature_ablation_effects", lambda _: for_all(slow_ablation("in the effect")), ""),
    "ablation without std": ("feature_ablation_effect", without_std, ""),
    "ablations without std": ("feature_ablation_effects", without_std, ""),
    "ablations, n_eval ignored": ("feature_ablation_effects", all_images, ": n_eval=25"),
    "ablation, wrong class": ("feature_ablation_effect", negated_top, ": class raised most"),
    "logit without std": ("feature_logit_effect", without_std, ""),
    "logits without std": ("feature_logit_effects", without_std, ""),
    "logits linear in alpha": ("feature_logit_effects", linear_in_alpha, ": n_eval=25, alpha=3"),
    "logits, n_eval ignored": ("feature_logit_effects", all_images, ": n_eval=25, alpha=3"),
    "logits, wrong class": ("feature_logit_effects", negated_top, ": class raised most"),
    "top-k reversed": ("collect_feature_bank", reversed_topk, ": strongest activations"),
    "histogram shifted": ("collect_feature_bank", shifted_labels, ": images that fire it, by label"),
    "merge, top-k reversed": ("merge_feature_banks", reversed_topk, ": strongest activations"),
    "merge, half a histogram": ("merge_feature_banks", second_forgotten, ": images that fire it, by label"),
    "pattern transposed": ("feature_input_pattern", lambda true: lambda *a, **kw: true(*a, **kw).mT, ""),
    "patterns transposed": ("feature_input_patterns", lambda true: lambda *a, **kw: true(*a, **kw).mT, ""),
    "pattern without std": (
        "feature_input_pattern",
        lambda true: lambda model, sae, mu, std, k: true(model, sae, mu, torch.ones_like(std), k),
        "",
    ),
    "patterns of other sign": ("feature_input_patterns", lambda true: lambda *a, **kw: -true(*a, **kw), ""),
    "roughness doubled": ("pattern_roughness", lambda true: lambda heats: 2 * true(heats), ""),
    "nearest to itself": (
        "nearest_features",
        lambda _: lambda W: fa.NearestFeatures(torch.arange(len(W)), torch.ones(len(W))),
        ": cosine",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_demo_fails_when_a_function_is_wrong(name, no_pictures, monkeypatch, tmp_path, capsys):
    function, breaking, check = BREAKAGES[name]
    true = getattr(fa, function)
    merge = fa.merge_feature_banks
    monkeypatch.setattr(fa, function, breaking(true))
    if function == "merge_feature_banks":  # collecting merges its batches by the same function: keep that one right
        collect = fa.collect_feature_bank

        def collecting(*args, **kw):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fa, "merge_feature_banks", merge)
                return collect(*args, **kw)

        monkeypatch.setattr(fa, "collect_feature_bank", collecting)
    assert demo.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    failed = failed_checks(shown)
    assert function + check in failed
    assert f", {len(failed)} failed; " in shown.splitlines()[-1]


def test_demo_fails_when_halves_are_merged_with_wrong_indices(no_pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fa, "collect_feature_bank", first_index_ignored(fa.collect_feature_bank))
    assert demo.main(["--out", str(tmp_path)]) == 1
    failed = failed_checks(capsys.readouterr().out)
    assert "merge_feature_banks: activation of the images named" in failed
    assert not any(check.startswith("collect_feature_bank") for check in failed)


def test_demo_fails_when_bands_are_reversed(no_pictures, monkeypatch, tmp_path, capsys):
    true = fa.FeatureBank.bands
    monkeypatch.setattr(fa.FeatureBank, "bands", lambda bank, k: true(bank, k)[::-1])
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert failed_checks(capsys.readouterr().out) == ["bands: quarters of the active range"]


@pytest.mark.parametrize(
    ("painter", "breaking", "checks"),
    [
        (
            "GalleryPainter",
            lambda true: lambda self, k, bank: true(self, (k + 1) % 3, bank),
            [
                "write_feature_pictures: strongest image comes first",
                "show_feature_gallery: strongest image comes first",
            ],
        ),
        (
            "PatternPainter",
            lambda true: lambda self, heat, k: true(self, -heat, k),
            ["write_feature_pictures: red less blue pixels", "visualize_feature_pattern: red less blue pixels"],
        ),
    ],
)
def test_demo_fails_when_a_picture_is_wrong(painter, breaking, checks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "PLANTED", demo.PLANTED[:3])
    assert demo.main(["--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(getattr(fa, painter), "paint", breaking(getattr(fa, painter).paint))
    assert demo.main(["--out", str(tmp_path)]) == 1
    failed = failed_checks(capsys.readouterr().out)
    assert failed == checks


def test_compare_shows_the_worst_value_and_refuses_nan_and_shapes():
    names = ["a", "b"]
    assert demo.compare("x", names, [[1, 2], [3, 4]], [[1, 2.5], [3, 4]]) == ("x", "a [1]", "2", "2.5", False)
    assert demo.compare("x", names, [1, 2], [1, 2]) == ("x", "b", "2", "2", True)
    assert demo.compare("x", names, [1, 2], [1, float("nan")]) == ("x", "b", "2", "nan", False)
    assert demo.compare("x", names, [1, 2], [1, 2, 3]).where == "shape"


# ---------------------------------------------------------------------------------------------------------------------
# Nowhere to write
# ---------------------------------------------------------------------------------------------------------------------


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
    expected = f"cannot write pictures into {tmp_path} (No space left on device): give another folder with --out\n"
    assert capsys.readouterr() == ("", expected)
