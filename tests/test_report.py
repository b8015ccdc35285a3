"""Which images decide what: validation images propose, one half of the test images tests, the other
replicates, training images give the mean of ablations."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from saexplain import evaluation, report
from saexplain.parallel import Stopwatch, Workers


class Calls(list):
    """Arguments and results of a function that is called."""

    def of(self, function):
        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            self.append((args, result))
            return result

        return recorded


@pytest.fixture(scope="module")
def evaluated(loaded, tmp_path_factory):
    """The frozen hypotheses of a run evaluated, and the calls that this made."""
    calls = {"own": Calls(), "baseline": Calls()}
    options = report.Options(seed=loaded.settings.seed)
    with pytest.MonkeyPatch.context() as patch, Workers(0) as workers:
        collect = evaluation.collect_evidence
        folder = tmp_path_factory.mktemp("report")
        draft = report.prepare_report(loaded.layer, folder, options, Stopwatch(), workers)
        units = {"neurons": report.default_baselines(loaded.layer, 0)["neurons"]}
        patch.setattr(evaluation, "collect_evidence", calls["baseline"].of(collect))
        workers.results(list(report.start_baselines(draft, units, workers).values()))
        patch.setattr(evaluation, "collect_evidence", calls["own"].of(collect))
        found = report.evaluate_draft(draft)
    return calls, found, folder


def half_of(split, test) -> str:
    halves = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}
    (name,) = [n for n, at in halves.items() if torch.equal(split.images, test.images[at])]
    assert torch.equal(split.labels, test.labels[halves[name]])
    assert torch.equal(split.raw, test.raw[halves[name]])
    return name


def test_even_test_images_test_and_odd_ones_replicate(loaded, evaluated):
    calls, found, _ = evaluated
    test = loaded.layer.splits["test"]
    by_half = {half_of(args[2], test): result for args, result in calls["own"]}
    assert set(by_half) == {"even", "odd"}
    assert [row.evidence for row in found.rows] == by_half["even"]
    assert [row.again for row in found.rows] == by_half["odd"]
    assert [half_of(args[2], test) for args, _ in calls["baseline"]] == ["even", "odd"]


def test_hypotheses_do_not_depend_on_test_images(loaded, evaluated, tmp_path):
    splits = dict(loaded.layer.splits)
    splits["test"] = splits["test"]._replace(
        images=torch.rand_like(splits["test"].images), raw=torch.zeros_like(splits["test"].raw)
    )
    other = replace(loaded.layer, splits=splits)
    options = report.Options(seed=loaded.settings.seed)
    with Workers(0) as workers:
        report.prepare_report(other, tmp_path, options, Stopwatch(), workers)
    frozen = [(folder / "hypotheses.json").read_bytes() for folder in (evaluated[2], tmp_path)]
    assert frozen[0] == frozen[1]


def test_mean_ablation_takes_the_mean_of_the_training_images(loaded):
    layer, splits = loaded.layer, loaded.layer.splits
    labels, z = splits["test"].labels, layer.standardize(splits["test"].raw)

    def cross_entropy(z) -> float:
        return float(F.cross_entropy(layer.logits_of_z(z).double(), labels))

    def recovered(name: str) -> float:
        mean = layer.standardize(splits[name].raw).mean(0)
        at_mean = cross_entropy(mean.expand_as(z))
        spliced = cross_entropy(layer.sae.decode(layer.sae.encode(z)))
        return (at_mean - spliced) / (at_mean - cross_entropy(z))

    (record,) = json.loads((loaded.folder / "summary.json").read_text())
    assert record["ce_recovered"] == pytest.approx(recovered("train"), rel=2e-5)
    for other in ("val", "test"):
        assert record["ce_recovered"] != pytest.approx(recovered(other), rel=4e-5)
