"""The demo passes, and each kind of fault in an analysis function is noticed. About 8 seconds."""

import re
from types import SimpleNamespace

import pytest
import torch

import demo_feature_analysis as demo
import feature_analysis as fa


def use(monkeypatch, **functions) -> None:
    """Let the demo draw nothing, which is slow, and use these functions of feature_analysis. What
    feature_analysis itself calls stays as it is."""
    drawing = ("show_feature_gallery", "visualize_feature_pattern", "show_feature_panel")
    quiet = dict.fromkeys(drawing, lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "fa", SimpleNamespace(**vars(fa) | quiet | functions))


def run_demo(folder, capsys) -> tuple[int, list[str], str]:
    """Exit status, the column of each check that fails, and the last line."""
    status = demo.main(["--out", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    header, *rows = [re.split(" {2,}", line) for line in lines[:-2]]
    cells = [cell for row in rows for cell in zip(header, row, strict=True)]
    failed = [title for title, value in cells if value.endswith(" FAIL")]
    return status, failed, lines[-1]


def test_demo_passes_and_writes_the_pictures(tmp_path, capsys):
    folder = tmp_path / "new" / "pictures"
    assert run_demo(folder, capsys) == (0, [], f"90 checks passed, 0 failed; pictures in {folder}")
    assert len(list(folder.glob("feature_?_*.png"))) == 3 * len(demo.PLANTED)


@pytest.mark.parametrize("seed", [1, 2])
def test_demo_passes_with_other_images_and_a_slow_ablation(seed, monkeypatch, tmp_path, capsys):
    use(monkeypatch, feature_ablation_effects=slow_ablation("kept"))
    draw = demo.draw_scene
    monkeypatch.setattr(demo, "draw_scene", lambda plan: draw(plan, seed))
    assert run_demo(tmp_path, capsys)[:2] == (0, [])


# Faults: each takes the right function and returns a wrong one.


def changes(field, change):
    """Applies `change` to a field of the result."""
    edit = lambda result: result._replace(**{field: change(getattr(result, field))})  # noqa: E731
    return lambda right: lambda *args, **kwargs: edit(right(*args, **kwargs))


def ignores(name):
    """Leaves an argument at its default."""
    return lambda right: lambda *args, **kw: right(*args, **{k: kw[k] for k in kw if k != name})


def ignores_std(right):
    return lambda model, sae, mu, std, *args: right(model, sae, mu, torch.ones_like(std), *args)


def forgets_std(right):
    """Effects of W_dec instead of W_dec * std."""

    def wrong(model, loader, sae, mu, std, *args, **kwargs):
        divided = SimpleNamespace(W_enc=sae.W_enc, encode=sae.encode, W_dec=sae.W_dec / std)
        return right(model, loader, divided, mu, std, *args, **kwargs)

    return wrong


def slow_ablation(error: str):
    """feature_ablation_effects by the decoder: right where the SAE's error is "kept", wrong where
    it is "lost" (logits of reconstructions) or "added" (to the feature's effect)."""

    def effects(model, loader, sae, mu, std, n_eval=2000):
        z = (model.preactivations(torch.cat([images for images, _ in loader])) - mu) / std
        acts, deltas = sae.encode(z), torch.zeros(len(sae.W_dec), demo.N_CLASSES)
        for k in range(len(deltas)):
            at = (acts[:, k] > 0).nonzero()[:n_eval, 0]
            remaining = acts[at].index_fill(1, torch.tensor(k), 0)
            before, after = sae.decode(acts[at]), sae.decode(remaining)
            if error == "kept":
                after += z[at] - before
            if error != "lost":
                before = z[at]
            logits = [model.logits_from_preactivations(some * std + mu) for some in (before, after)]
            deltas[k] = (logits[1] - logits[0]).sum(0) / max(1, len(at))
        top = deltas.argmax(1).where((acts > 0).any(0), -1)
        return fa.LogitEffects(deltas, top, None)

    return effects


def weakest_first(top):
    return fa.Examples(*(column.flip(1) for column in top))


FAULTS = [  # function, (s): also that of all features; what makes it wrong; column that must fail
    ("collect_feature_bank", changes("top", weakest_first), "top"),
    ("collect_feature_bank", changes("top", lambda t: t._replace(index=t.index.roll(1, 1))), "top"),
    ("collect_feature_bank", changes("sample", lambda s: s._replace(label=s.label + 1)), "bands"),
    ("collect_feature_bank", changes("label_histogram", lambda n: n.roll(1, 1)), "label"),
    ("collect_feature_bank", changes("n_images", lambda n: n - 1), "density"),
    ("collect_feature_bank", changes("activation_sum", torch.sqrt), "mean"),
    ("merge_feature_banks", lambda right: lambda a, b: a, "merged"),
    ("merge_feature_banks", changes("top", weakest_first), "merged"),
    ("feature_input_pattern(s)", lambda right: lambda *args: -right(*args), "pattern"),
    ("feature_input_pattern(s)", lambda right: lambda *args: right(*args).mT, "pattern"),
    ("feature_input_pattern(s)", ignores_std, "pattern"),
    ("feature_logit_effect(s)", changes("mean_delta", torch.neg), "adding"),
    ("feature_logit_effect(s)", forgets_std, "adding"),
    ("feature_logit_effects", ignores("n_eval"), "adding"),
    ("feature_logit_effects", ignores("alpha"), "adding"),
    ("feature_ablation_effect(s)", changes("mean_delta", torch.neg), "removing"),
    ("feature_ablation_effect(s)", forgets_std, "removing"),
    ("feature_ablation_effects", ignores("n_eval"), "removing"),
    ("feature_ablation_effects", lambda right: slow_ablation("lost"), "removing"),
    ("feature_ablation_effects", lambda right: slow_ablation("added"), "removing"),
    ("nearest_features", changes("feature", lambda k: k * 0), "nearest"),
]
CASES = [(name.replace("(s)", ""), *fault) for name, *fault in FAULTS]
CASES += [(name.replace("(s)", "s"), *fault) for name, *fault in FAULTS if name.endswith("(s)")]


@pytest.mark.parametrize(("function", "breaks", "column"), CASES)
def test_a_fault_is_noticed(function, breaks, column, monkeypatch, tmp_path, capsys):
    use(monkeypatch, **{function: breaks(getattr(fa, function))})
    status, failed, last_line = run_demo(tmp_path, capsys)
    assert status == 1
    assert column in failed
    assert f", {len(failed)} failed; " in last_line


def test_reversed_bands_are_noticed(monkeypatch, tmp_path, capsys):
    use(monkeypatch)
    right = fa.FeatureBank.bands
    monkeypatch.setattr(fa.FeatureBank, "bands", lambda bank, k: right(bank, k)[::-1])
    status, failed, _ = run_demo(tmp_path, capsys)
    assert (status, set(failed)) == (1, {"bands", "merged"})


def test_a_folder_that_cannot_be_made_gives_one_line_and_status_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert demo.main(["--out", str(file / "below")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"cannot write into \S+/below: .*; give another --out\n", shown.err)
