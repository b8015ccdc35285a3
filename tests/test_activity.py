"""saexplain.activity, analysis and diagnoses against numpy, slow loops and plain computations."""

import json

import numpy as np
import pytest
import small_models as sm
import torch
from small_models import Scene, activity_of, analysis_of, identity_args, make_scene, slow_effect
from torch.testing import assert_close

import feature_analysis as fa
from saexplain import activity as act
from saexplain.activity import Activity, coactivation_neighbors, collect_activity, contributions
from saexplain.analysis import by_influence, feature_record
from saexplain.diagnoses import diagnose
from saexplain.patterns import pattern_roughness

N, D_SAE, C = sm.N, sm.D_SAE, sm.C


@pytest.fixture(params=["linear", "relu", "conv"])
def scene(request) -> Scene:
    return make_scene(request.param)


def activity_in(scene: Scene) -> Activity:
    return collect_activity(scene.layer, scene.raw, scene.labels)


@pytest.mark.parametrize("rows", [fa.ROWS, 16, 1])
def test_activity_is_that_of_encode(scene, rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    activity, acts = activity_in(scene), scene.feature_acts()
    dense = torch.zeros_like(acts)
    for k in range(D_SAE):
        image, activation = activity.of(k)
        dense[image, k] = activation
        assert image.tolist() == sorted(image.tolist())
    assert torch.equal(dense, acts)
    assert activity.n_active.tolist() == (acts > 0).sum(0).tolist()
    assert torch.equal(activity.labels, scene.labels)


def test_removals_are_those_of_a_slow_loop(scene):
    removed = act.removal_effects(scene.layer, scene.raw, activity_in(scene))
    acts, logits_of = scene.feature_acts(), scene.model.logits_from_preactivations
    sizes = []
    for k in range(D_SAE):
        active = [i for i in range(N) if acts[i, k] > 0]
        step = scene.sae.W_dec[k] * scene.std
        mean = slow_effect(scene, active, lambda i, k=k, step=step: -acts[i, k] * step)
        assert_close(removed.mean_delta[k].float(), mean, atol=1e-4, rtol=1e-4)
        size, changed = 0.0, 0
        for i in active:
            before, after = logits_of(scene.raw[i]), logits_of(scene.raw[i] - acts[i, k] * step)
            moved = (after - before).numpy().astype(float)
            size += np.sqrt(np.sum((moved - moved.mean()) ** 2))
            changed += int(before.argmax() != after.argmax())
        sizes.append(size)
        assert removed.n_changed[k] == changed
        assert removed.changes[k] == pytest.approx(changed / max(1, len(active)))
    assert removed.influence.tolist() == pytest.approx(np.divide(sizes, sum(sizes)), rel=1e-4)
    small = removed._replace(size=1e-15 * removed.size)  # logits of another scale
    assert small.influence.tolist() == pytest.approx(removed.influence.tolist())


@pytest.mark.parametrize("head_rows", [fa.HEAD_ROWS, 7])
def test_contributions_are_what_each_image_loses(scene, head_rows, monkeypatch):
    monkeypatch.setattr(fa, "HEAD_ROWS", head_rows)
    activity, logits_of = activity_in(scene), scene.model.logits_from_preactivations
    added, logits = contributions(scene.layer, scene.raw, activity)
    assert_close(logits, logits_of(scene.raw))
    pairs = zip(activity.feature, activity.image, activity.activation, added, strict=True)
    for k, i, size, found in pairs:
        less = scene.raw[i] - size * scene.sae.W_dec[k] * scene.std
        assert_close(found, logits_of(scene.raw[i]) - logits_of(less))


def test_activity_checks_labels_and_activations():
    scene = make_scene("relu")
    for labels in (scene.labels[:5], scene.labels.float(), scene.labels - 1, scene.labels + C):
        with pytest.raises(ValueError, match="labels"):
            collect_activity(scene.layer, scene.raw, labels)
    model, [(raw, labels)], sae, *frame = identity_args(-torch.ones(3, 2))
    sae = sae._replace(threshold=torch.full((2,), -9.0))
    with pytest.raises(ValueError, match="activations must be 0 or more, got -1"):
        collect_activity(fa.ExplainedLayer(model, sae, *frame), raw, labels)


@pytest.mark.parametrize("function", [act.removal_effects, contributions])
def test_the_activity_of_other_images_or_features_is_an_error(function):
    scene = make_scene("relu")
    activity = activity_in(scene)
    W_enc, b_enc, threshold, W_dec = scene.sae
    fewer = sm.SAE(W_enc[:, 1:], b_enc[1:], threshold[1:], W_dec[1:])
    for sae, raw in ((scene.sae, scene.raw[:60]), (fewer, scene.raw)):
        with pytest.raises(ValueError, match=r"activity must be of .*got \(90, 12\)"):
            function(scene.layer.with_sae(sae), raw, activity)


@pytest.mark.parametrize(("d_sae", "rows", "pairs"), [(24, 5, 30), (300, fa.ROWS, 2**18)])
def test_coactivation_is_the_correlation_of_numpy(d_sae, rows, pairs, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    monkeypatch.setattr(act, "PAIRS_AT_ONCE", pairs)
    acts = torch.randn(200, d_sae, generator=torch.Generator().manual_seed(0)).relu()
    acts[:, -1] = 0
    acts[:50] = 0  # images that activate nothing
    others, correlation = coactivation_neighbors(activity_of(acts.tolist()), 3)
    expected = np.corrcoef((acts[:, :-1] > 0).T.numpy())
    np.fill_diagonal(expected, -2)
    best = -np.sort(-expected, axis=1)[:, :3]
    assert correlation[:-1].numpy() == pytest.approx(best, abs=1e-4)
    found = np.take_along_axis(expected, others[:-1].numpy(), axis=1)
    assert found == pytest.approx(best, abs=1e-4)
    assert (correlation[-1] == 0).all()  # never active
    alone = coactivation_neighbors(activity_of([[1.0], [0.0]]), 3)
    assert [part.shape for part in alone] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("rows", [fa.ROWS, 2])
def test_similar_rows_are_those_of_all_cosines(rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    W_dec = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    unit, own = torch.nn.functional.normalize(W_dec, dim=1), torch.tensor([20, 3, 4, 5, 6, 7])
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, -2)
    columns, values = act.top_similar_rows(unit, own, 4)
    assert columns.tolist() == np.argsort(-cosine[own], axis=1)[:, :4].tolist()
    assert values.numpy() == pytest.approx(-np.sort(-cosine[own], axis=1)[:, :4], abs=1e-6)


def test_record_of_a_feature_has_the_results_of_plain_computations(scene):
    acts, labels, analysis = scene.feature_acts(), scene.labels, analysis_of(scene)
    for k in (sm.ALWAYS, sm.RARE, 5):
        record = feature_record(k, analysis)
        active = [i for i in range(N) if acts[i, k] > 0]
        strongest = sorted(active, key=lambda i, k=k: (-acts[i, k].item(), i))[:7]
        counts = [sum(int(labels[i]) == c for i in active) for c in range(C)]
        step = scene.sae.W_dec[k] * scene.std
        spread = np.linspace(0, N - 1, 20).round().astype(int).tolist()
        added = slow_effect(scene, spread, lambda _, step=step: step)
        removed = slow_effect(scene, active, lambda i, k=k, step=step: -acts[i, k] * step)
        cosines = torch.nn.functional.cosine_similarity(scene.sae.W_dec, scene.sae.W_dec[k][None])
        cosines[k] = -2
        heat = analysis.heats[k].double().numpy()
        steps = [np.mean(np.diff(heat, axis=axis) ** 2) for axis in (0, 1)]
        assert (record["feature"], record["n_active"]) == (k, len(active))
        assert (record["label_histogram"], record["top_examples"]) == (counts, strongest)
        assert record["top_scores"] == acts[strongest, k].tolist()
        assert record["top_labels"] == labels[strongest].tolist()
        assert record["ablation_images"] == len(active)
        assert record["mean_active"] == pytest.approx(len(active) / N)
        mean = float(acts[active, k].mean())
        assert record["mean_activation_when_active"] == pytest.approx(mean)
        assert counts[record["label_mode_when_active"]] == max(counts)
        assert record["logit_delta_vector"] == pytest.approx(added.tolist(), abs=1e-4)
        assert added[record["logit_boost_class"]] == added.max()
        assert record["ablation_delta_vector"] == pytest.approx(removed.tolist(), abs=1e-3)
        assert record["nearest_cosine"] == pytest.approx(float(cosines.max()), abs=1e-6)
        assert cosines[record["nearest_feature"]] == pytest.approx(float(cosines.max()), abs=1e-6)
        rough = sum(steps) / 4 / np.mean(heat**2)
        assert record["pattern_roughness"] == pytest.approx(rough, rel=1e-4)
        summed = scene.images.flatten(1) @ analysis.heats[k].flatten()
        pre = (scene.raw - scene.mu) / scene.std @ scene.sae.W_enc[:, k]
        correlation = np.corrcoef(summed, pre)[0, 1]
        assert record["pattern_correlation"] == pytest.approx(correlation, abs=1e-4)
        assert record["influence"] == pytest.approx(float(analysis.removed.influence[k]))
        assert record["predictions_changed"] == pytest.approx(float(analysis.removed.changes[k]))


def test_records_reuse_what_is_known_of_all_patterns(monkeypatch):
    """Of thousands of large patterns, one pass over all takes seconds: none for each record."""
    analysis = analysis_of(make_scene("conv"))
    rough = pattern_roughness(analysis.heats)

    def never(_heats):
        raise AssertionError("the roughness of all patterns is known")

    monkeypatch.setattr("saexplain.analysis.pattern_roughness", never)
    assert analysis.heats is analysis.heats
    records = [feature_record(k, analysis) for k in range(D_SAE)]
    assert [r["pattern_roughness"] for r in records] == pytest.approx(rough.tolist())
    follows = torch.tensor([r["pattern_correlation"] for r in records]) >= 0.5
    assert analysis.faithful.equal(follows & (rough <= 0.5))


def test_record_has_json_values_also_for_a_feature_that_is_never_active():
    analysis = analysis_of(make_scene("relu"))
    record = feature_record(sm.DEAD, analysis)
    assert json.loads(json.dumps(record)) == record
    assert record["label_mode_when_active"] is None
    assert record["n_active"] == record["mean_active"] == record["ablation_images"] == 0
    assert record["top_examples"] == record["top_scores"] == record["top_labels"] == []
    influence = analysis.removed.influence.tolist()
    order = sorted(range(D_SAE), key=lambda k: (-influence[k], k))
    assert (by_influence(analysis), by_influence(analysis, 3)) == (order, order[:3])
    for k in (-1, D_SAE):
        with pytest.raises(IndexError, match=f"feature {k} does not exist"):
            feature_record(k, analysis)


@pytest.mark.parametrize("dense", [None, 0.5, 0.7])
def test_diagnoses_compare_results_with_limits(dense):
    analysis = analysis_of(make_scene("relu"))
    record = {"sae_latents": D_SAE, "dead_features": 3, "delta_acc_boolean_scaled": 0.01}
    record |= {"dense_share_of_l0": dense, "reproducibility": {"variance": {"mean": 0.6}}}
    seconds = {"bank": 1.0, "patterns": 2.0, "effects": 3.0, "pictures": 4.0}
    found = {d.complaint: d for d in diagnose(record, analysis, [1, 2], seconds)}
    assert found["dead latents"].value == 3 / D_SAE
    assert not found["dead latents"].fine
    assert found["graded features"].fine
    assert found["dense features"].fine == (dense == 0.5)
    assert found["seed-specific features"].value == pytest.approx(0.4)
    assert found["slow analysis"].value == pytest.approx(1000 * (6 / D_SAE + 4 / 2))
    rough = pattern_roughness(analysis.heats[1:3]).median().item()
    assert found["noisy patterns"].as_record()["value"] == rough
    assert found["unfaithful patterns"].value == pytest.approx(0, abs=1e-5)  # a linear layer
    json.dumps([d.as_record() for d in found.values()])
