"""MNIST_SAE_code.py: settings and flags, what both trainings share, the classifier."""

import math
import sys
import types

import pytest
import torch

import MNIST_SAE_code as driver
from MNIST_SAE_code import Settings, TrainingError
from saexplain.files import InputError
from saexplain.images import Split, load_images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_split(n: int = 2000) -> Split:
    train = load_images("sample").train
    return Split(train.images[:n], train.labels[:n])


def test_a_line_edited_in_the_settings_block_is_what_the_script_uses():
    with open(driver.__file__, encoding="utf-8") as file:
        source = file.read()
    edits = {"TARGET_ACTIVES = [20]": "TARGET_ACTIVES = [5, 7]"}
    edits |= {"NORMALIZE_Z = True": "NORMALIZE_Z = False", "SAE_LATENTS = 512": "SAE_LATENTS = 99"}
    for line, edited in edits.items():
        assert source.count(f"\n{line}") == 1
        source = source.replace(f"\n{line}", f"\n{edited}")
    module = types.ModuleType("edited_driver")
    module.__file__ = driver.__file__
    sys.modules["edited_driver"] = module  # dataclasses look their module up
    try:
        exec(compile(source, "edited_driver", "exec"), module.__dict__)
    finally:
        del sys.modules["edited_driver"]
    settings = module.parse_runs([])[0]
    assert settings.target_actives == (5, 7)
    assert settings.normalize_z is False
    assert settings.sae_latents == 99


def test_flags_override_the_settings_block():
    flags = "--target-actives 10 20 --no-normalize-z --lr-sae 0.5 --out there"
    (settings,) = driver.parse_runs(flags.split())
    assert settings.target_actives == (10, 20)
    assert settings.normalize_z is False
    assert (settings.lr_sae, settings.out) == (0.5, "there")
    assert driver.parse_runs([]) == [Settings()]


def test_seeds_and_latents_make_one_run_of_each_combination():
    runs = driver.parse_runs("--seeds 3 4 --sae-latents 64 128 --target-actives 5 9".split())
    assert [(r.seed, r.sae_latents) for r in runs] == [(3, 64), (3, 128), (4, 64), (4, 128)]
    singles = driver.combinations(runs)
    assert len(singles) == 8
    assert len({single.out for single in singles}) == 8
    assert all(len(single.target_actives) == 1 for single in singles)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-actives", "--target-actives"),
        ("--target-actives 0", "--target-actives .* got 0"),
        ("--target-actives 512", "--target-actives .* got 512"),
        ("--target-actives 5 5", r"--target-actives .* got \[5, 5\]"),
        ("--target-actives 2.5", "invalid int value: '2.5'"),
        ("--epochs-ffn 0", "--epochs-ffn must be at least 1, got 0"),
        ("--batch-sae 0", "--batch-sae"),
        ("--lr-sae 0", "--lr-sae"),
        ("--lr-ffn nan", "--lr-ffn must be finite"),
        ("--topk 0", "--topk"),
        ("--features -1", "--features must be at least 0, got -1"),
        ("--workers -2", "--workers"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_settings_that_cannot_be_used_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        driver.parse_runs(flags.split())


@pytest.mark.parametrize(
    "given",
    [
        {"sae_latents": 64.0},
        {"target_actives": (2.5,)},
        {"alpha": "1"},
        {"fresh": "no"},
        {"out": 3},
    ],
)
def test_settings_of_another_type_are_named(given):
    (name,) = given
    with pytest.raises(InputError, match=name.replace("_", "-")):
        Settings(**given)


@pytest.mark.parametrize("name", ["warp", "cuda:99"])
def test_unknown_or_absent_devices_are_named(name):
    with pytest.raises(InputError, match=f"--device {name}"):
        driver.pick_device(name)


def test_automatic_device_exists():
    assert torch.zeros(1, device=driver.pick_device("auto")).item() == 0


def test_a_small_set_is_passed_over_more_often():
    assert driver.scaled_epochs(5, 48_000) == 5
    assert driver.scaled_epochs(3, 3_500) == 41
    assert driver.scaled_epochs(1, 1_000_000) == 1


def test_batches_pass_over_everything_once_an_epoch():
    seen = list(driver.batches(10, 3, 2, generator()))
    assert len(seen) == driver.n_steps(10, 3, 2) == 6
    for epoch in (seen[:3], seen[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert len(list(driver.batches(4, 100, 2, generator()))) == driver.n_steps(4, 100, 2) == 2


def test_ramp():
    found = [driver.ramp(p, 0.2, 0.6) for p in (0, 0.1, 0.2, 0.5, 0.6, 0.8, 1)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_is_torchs(weight_decay):
    start = torch.randn(4, 3, generator=generator())
    ours, theirs = start.clone(), start.clone()
    own = driver.Adam([ours], weight_decay)
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    for step in range(20):
        gradient = torch.randn(4, 3, generator=generator(step))
        theirs.grad = gradient.clone()
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
        own.step([gradient], 0.01 * (step + 1))
    torch.testing.assert_close(ours, theirs)


def test_classifier_is_the_composition_of_its_two_methods():
    model = driver.Classifier(hidden_units=5)
    model.pixel_mean.uniform_(generator=generator())
    images = torch.rand(7, 1, 28, 28, generator=generator())
    z = (images.reshape(7, 784) - model.pixel_mean) @ model.hidden.weight.T + model.hidden.bias
    torch.testing.assert_close(model.preactivations(images), z, atol=1e-5, rtol=1e-5)
    logits = z.clamp(min=0) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=1e-5)


def test_classifier_learns_and_leaves_the_global_generator_alone():
    train, settings = tiny_split(), Settings(epochs_ffn=1, batch_ffn=64)
    torch.manual_seed(5)
    expected_next = torch.rand(1).item()
    torch.manual_seed(5)
    (model, history), (again, _) = (driver.train_classifier(train, settings) for _ in range(2))
    assert torch.rand(1).item() == expected_next
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (model(train.images).argmax(1) == train.labels).float().mean() > 0.95
    n = driver.n_steps(len(train.labels), 64, driver.scaled_epochs(1, len(train.labels)))
    assert [row["step"] for row in history] == list(driver.logged_steps(n))
    assert history[0]["loss"] == pytest.approx(math.log(10), abs=0.3)
    assert history[-1]["loss"] < 0.3
    other, _ = driver.train_classifier(train, Settings(epochs_ffn=1, batch_ffn=64, seed=1))
    assert not torch.equal(model.hidden.weight, other.hidden.weight)


def test_classifier_divergence_names_the_flag():
    with pytest.raises(TrainingError, match=r"classifier training diverged.*--lr-ffn"):
        driver.train_classifier(tiny_split(300), Settings(lr_ffn=1e38, epochs_ffn=1))


def test_images_on_another_scale_than_the_classifiers_are_an_error():
    model, _ = driver.train_classifier(tiny_split(300), Settings(epochs_ffn=1))
    with pytest.raises(ValueError, match="0 to 1"):
        model.preactivations(255 * tiny_split(4).images)
