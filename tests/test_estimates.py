"""What is estimated before the work starts: saexplain.estimates."""

import pytest
from small_networks import CLASSES, ResNet, ViT, marked_images, trained

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import layers
from saexplain.estimates import count_head_rows


@pytest.mark.parametrize(
    ("make", "name"), [(ResNet, "layer2"), (ResNet, "wide"), (ViT, "blocks.0")]
)
def test_about_as_many_rows_go_through_the_rest_of_the_network(make, name, tmp_path, monkeypatch):
    passed, usual = [], layers.AtLayer.logits_from_preactivations

    def count(self, raw):
        passed.append(len(raw))
        return usual(self, raw)

    splits = [marked_images(n, seed)[:2] for seed, n in enumerate((300, 200, 200))]
    monkeypatch.setattr(layers.AtLayer, "logits_from_preactivations", count)
    given = dict(target=4, sae_latents=40, epochs_sae_final=1, stability_seeds=0)
    run = driver.explain(trained(make, 40), name, *splits, classes=CLASSES, out=tmp_path, **given)
    raw = run.layer.splits["val"].raw
    layer = fa.ExplainedLayer(run.layer.model, None, run.layer.mu, run.layer.std)
    n_positions = raw.shape[1] if raw.dim() == 3 else 1
    found = count_head_rows(layer, run.data, n_positions, run.settings)
    assert 0.6 < found / sum(passed) < 1.6
