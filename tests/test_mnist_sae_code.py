"""MNIST_SAE_code.py: settings, the SAE and its calibration, fidelity, jobs, saved stages."""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import types
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import feature_analysis as fa
import MNIST_SAE_code as driver
from mnist_data import Split, load_images
from MNIST_SAE_code import InputError, JumpReLUSAE, Settings, TrainingError, TrainingFrame


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_sae(d_in: int = 6, d_sae: int = 9, seed: int = 0) -> JumpReLUSAE:
    rng, sae = generator(seed), JumpReLUSAE(d_in, d_sae)
    with torch.no_grad():
        for weights in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            weights.copy_(torch.randn(weights.shape, generator=rng))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        sae.threshold.copy_(torch.rand(d_sae, generator=rng))
    return sae.requires_grad_(False)


# --- Settings -------------------------------------------------------------------------------------


def test_a_line_edited_in_the_settings_block_is_what_the_script_uses():
    with open(driver.__file__, encoding="utf-8") as file:
        source = file.read()
    for line, edited in (
        ("TARGET_ACTIVES = [20]", "TARGET_ACTIVES = [5, 7]"),
        ("NORMALIZE_Z = True", "NORMALIZE_Z = False"),
    ):
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
    assert settings.sae_latents == driver.SAE_LATENTS


def test_flags_override_the_settings_block():
    (settings,) = driver.parse_runs(
        "--target-actives 10 20 --no-normalize-z --lr-sae 0.5 --out there".split()
    )
    assert (settings.target_actives, settings.normalize_z, settings.lr_sae, settings.out) == (
        (10, 20),
        False,
        0.5,
        "there",
    )
    assert driver.parse_runs([]) == [Settings()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-actives", "--target-actives is empty"),
        ("--target-actives 0", "--target-actives 0 must be positive and below --sae-latents 256"),
        ("--target-actives -3", "--target-actives -3 must be positive"),
        (
            "--target-actives 512",
            "--target-actives 512 must be positive and below --sae-latents 256",
        ),
        ("--target-actives 5 5", "names a target twice"),
        ("--target-actives 2.5", "invalid int value: '2.5'"),
        ("--epochs-ffn 0", "--epochs-ffn is 0; it must be a positive number"),
        ("--epochs-sae-final -1", "--epochs-sae-final is -1"),
        ("--batch-sae 0", "--batch-sae is 0"),
        ("--batch-ffn -5", "--batch-ffn is -5"),
        ("--lr-sae 0", "--lr-sae is 0.0"),
        ("--lr-ffn nan", "--lr-ffn is nan"),
        ("--lr-sae inf", "--lr-sae is inf"),
        ("--topk 0", "--topk is 0"),
        ("--n-eval 0", "--n-eval is 0"),
        ("--features -1", "--features is -1; it must not be negative"),
        ("--seed -1", "--seed is -1"),
        ("--seed 99999999999999999999", r"must be below 2\*\*63"),
        ("--alpha nan", "--alpha is nan"),
        ("--workers -2", "--workers is -2; it must be 0 or more, or -1"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_settings_that_cannot_be_used_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        driver.parse_runs(flags.split())


def test_a_whole_number_is_asked_for_where_one_is_needed():
    with pytest.raises(InputError, match=r"--sae-latents is 64\.0; it must be a whole number"):
        Settings(sae_latents=64.0)
    with pytest.raises(InputError, match=r"--target-actives is 2\.5; it must be a whole number"):
        Settings(target_actives=(2.5,))


@pytest.mark.parametrize("name", ["warp", "mps", "cuda:99", "cuda:128"])
def test_unknown_or_absent_devices_are_refused(name):
    with pytest.raises(InputError, match=f"--device {name}"):
        driver.pick_device(name)


def test_automatic_device_exists():
    assert torch.zeros(1, device=driver.pick_device("auto")).item() == 0


# --- Training, shared parts -----------------------------------------------------------------------


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
    assert [driver.ramp(p, 0.2, 0.6) for p in (0, 0.1, 0.2, 0.5, 0.6, 0.8, 1)] == pytest.approx(
        [0, 0.5, 1, 1, 1, 0.5, 0]
    )


def test_divergence_names_stage_step_and_flag():
    losses = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    with pytest.raises(
        TrainingError, match=r"some training diverged: .* step 2; lower --lr-x \(now 3\)"
    ):
        driver.refuse_divergence(losses, 3, "some training", "--lr-x", 3)
    driver.refuse_divergence(losses, 2, "some training", "--lr-x", 3)  # looked at only now and then
    driver.refuse_divergence(losses[:2], 1, "some training", "--lr-x", 3)  # finite


def test_classifier_is_the_composition_of_its_two_methods():
    model = driver.Classifier(hidden_units=5)
    model.pixel_mean.uniform_(generator=generator())
    images = torch.rand(7, 1, 28, 28, generator=generator())
    z = (images.reshape(7, 784) - model.pixel_mean) @ model.hidden.weight.T + model.hidden.bias
    assert torch.allclose(model.preactivations(images), z, atol=1e-5)
    logits = z.clamp(min=0) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(images), logits, atol=1e-5)


def tiny_data(n: int = 2000) -> Split:
    data = load_images("sample")
    return Split(data.train.images[:n], data.train.labels[:n])


def test_classifier_learns_and_leaves_the_global_generator_alone():
    train = tiny_data()
    settings = Settings(epochs_ffn=1, batch_ffn=64)
    torch.manual_seed(5)
    expected_next = torch.rand(1).item()
    torch.manual_seed(5)
    (model, log), (again, _) = (driver.train_classifier(train, settings) for _ in range(2))
    assert torch.rand(1).item() == expected_next
    assert not model.training
    assert not any(w.requires_grad for w in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (model(train.images).argmax(1) == train.labels).float().mean() > 0.95
    n = driver.n_steps(len(train.labels), 64, driver.scaled_epochs(1, len(train.labels)))
    assert [line["step"] for line in log] == list(driver.logged_steps(n))
    assert log[0]["loss"] == pytest.approx(math.log(10), abs=0.3) != log[-1]["loss"] < 0.3
    assert log[0].keys() == {"step", "stage", "loss", "seconds"}
    other, _ = driver.train_classifier(train, Settings(epochs_ffn=1, batch_ffn=64, seed=1))
    assert not torch.equal(model.hidden.weight, other.hidden.weight)


def test_classifier_divergence_is_reported():
    with pytest.raises(TrainingError, match=r"classifier training diverged.*--lr-ffn"):
        driver.train_classifier(tiny_data(300), Settings(lr_ffn=1e38, epochs_ffn=1))


def test_preactivations_are_standardised_by_the_training_images_only():
    data = load_images("sample")
    model = driver.Classifier().requires_grad_(False)
    model.hidden.weight[3] = 0  # a unit that never varies
    pre = driver.collect_preactivations(model, data, normalize=True)
    z = (pre.train - pre.mu) / pre.std
    varying = torch.arange(128) != 3
    assert torch.allclose(z.mean(0), torch.zeros(128), atol=1e-4)
    assert torch.allclose(z.std(0)[varying], torch.ones(127), atol=1e-4)
    assert pre.std[3] == 1
    assert torch.allclose(pre.test, model.preactivations(data.test.images), atol=1e-5)
    raw = driver.collect_preactivations(model, data, normalize=False)
    assert torch.equal(raw.mu, torch.zeros(128))
    assert torch.equal(raw.std, torch.ones(128))


# --- SAE ------------------------------------------------------------------------------------------


def test_jumprelu_by_hand():
    sae = JumpReLUSAE(2, 3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, 0.0, 0.0]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.b_dec.copy_(torch.tensor([10.0, 20.0]))
        sae.threshold.copy_(torch.tensor([1.0, 2.0, 0.0]))
    z = torch.tensor([[1.0, 2.0], [0.5, 3.0], [-1.0, -4.0]])
    # pre: [1.5, 2, 0], [1, 3, -2], [-0.5, -4, 2]. A value equal to its threshold is not active.
    f = torch.tensor([[1.5, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    assert torch.equal(sae.encode(z), f)
    assert torch.allclose(sae(z), torch.tensor([[11.5, 20.0], [10.0, 23.0], [11.2, 21.6]]))
    assert torch.equal(sae(z), sae.decode(sae.encode(z)))


def test_gradients_flow_through_active_features_only():
    sae = random_sae().requires_grad_(True)
    z = torch.randn(20, 6, generator=generator(1))
    sae(z).square().sum().backward()
    with torch.no_grad():
        pre = z @ sae.W_enc + sae.b_enc
        gate = (pre > sae.threshold).float()
        upstream = 2 * ((pre * gate) @ sae.W_dec + sae.b_dec)
        through = (upstream @ sae.W_dec.T) * gate
    assert torch.allclose(sae.W_enc.grad, z.T @ through, atol=1e-4)
    assert torch.allclose(sae.b_enc.grad, through.sum(0), atol=1e-4)
    assert torch.allclose(sae.W_dec.grad, (pre * gate).T @ upstream, atol=1e-4)


def test_training_frame_can_be_entered_left_and_folded_away():
    z = (
        torch.randn(500, 6, generator=generator()) @ torch.randn(6, 6, generator=generator(1)) * 30
        + 7
    )
    frame = TrainingFrame.of(z)
    x = frame.enter(z)
    assert torch.allclose(x.mean(0), torch.zeros(6), atol=1e-4)
    assert x.square().mean().item() == pytest.approx(1, abs=1e-4)
    covariance = x.T @ x / 500
    assert torch.allclose(
        covariance, torch.diag(covariance.diagonal()), atol=1e-4
    )  # principal directions
    assert torch.allclose(frame.leave(x), z, atol=1e-2)
    sae = random_sae()
    folded = frame.fold(sae)
    assert torch.allclose(folded.encode(z), sae.encode(x) * frame.scale, atol=1e-2)
    assert torch.allclose(folded(z), frame.leave(sae(x)), atol=1e-2)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(9), atol=1e-5)


def test_initial_sae_fires_as_often_as_asked_and_has_the_best_length():
    x = torch.randn(2000, 16, generator=generator())
    rows = F.normalize(torch.randn(64, 16, generator=generator(1)), dim=1)
    sae = driver.initial_sae(rows, x, start_l0=8.0)
    assert torch.equal(sae.W_dec, rows)
    density = (sae.encode(x) > 0).float().mean(0)
    assert torch.allclose(density, torch.full((64,), 8 / 64), atol=2e-3)
    best = (x - sae(x)).square().sum()
    start = driver.STEERING.start_threshold
    for factor in (0.9, 1.1):  # any other length, at the same actives, is worse
        other = driver.initial_sae(rows, x, start_l0=8.0)
        other.W_enc.mul_(factor)
        other.b_enc.copy_(start + factor * (sae.b_enc - start))
        assert ((other.encode(x) > 0) != (sae.encode(x) > 0)).sum() <= 64  # those at the threshold
        assert (x - other(x)).square().sum() > best


def test_many_latents_start_with_the_density_asked_for():
    x = torch.randn(501, 16, generator=generator())
    rows = F.normalize(torch.randn(1100, 16, generator=generator(1)), dim=1)
    sae = driver.initial_sae(rows, x, start_l0=220)
    expected = np.quantile((x @ rows.T).double().numpy(), 0.8, axis=0)  # at the rank 400 of 500
    cut = (sae.threshold - sae.b_enc) / (sae.W_enc * rows.T).sum(0)  # pre crosses the threshold
    assert cut.numpy() == pytest.approx(expected, abs=1e-4)


def test_initial_rows_point_towards_different_images():
    x = torch.randn(50, 6, generator=generator()) * torch.tensor([4.0, 1, 1, 1, 1, 0.25])
    rows = driver.initial_rows(x, 20, generator(1))
    towards = F.normalize(x / x.std(0).sqrt(), dim=1)
    cosine = rows @ towards.T
    assert torch.allclose(cosine.amax(1), torch.ones(20), atol=1e-5)
    assert len(set(cosine.argmax(1).tolist())) == 20
    assert torch.equal(rows, driver.initial_rows(x, 20, generator(1)))
    assert not torch.equal(rows, driver.initial_rows(x, 20, generator(2)))


def test_initial_rows_of_few_images_and_of_units_that_never_vary():
    x = torch.randn(5, 4, generator=generator())
    x[:, 2] = 0
    rows = driver.initial_rows(x, 12, generator())
    assert rows.shape == (12, 4)
    assert rows.norm(dim=1) == pytest.approx(torch.ones(12))
    assert len(torch.unique(rows, dim=0)) == 12


@pytest.mark.parametrize(("target", "busy"), [(5, 0.25), (16, 0.5)])  # twice the mean: 32 of 64
def test_rare_latents_pay_less_and_busy_ones_more(target, busy):
    training = driver.SAETraining(synthetic_z(400), head, target, Settings(**TOY), generator())
    fair = 1.25 * target / 64
    training.density = torch.tensor([fair / 9, fair, busy, 4 * busy])
    factor = training.thresholds(target) / training.controller.threshold()
    assert factor.tolist() == pytest.approx([1 / 3, 1, 1, 2])


def test_l0_target_falls_to_what_is_asked_and_stays():
    assert driver.l0_target_at(0, 20, 512) == 80
    assert driver.l0_target_at(0.15, 20, 512) == pytest.approx(40)  # half way, geometrically
    assert driver.l0_target_at(0.3, 20, 512) == driver.l0_target_at(1, 20, 512) == 20
    assert driver.l0_target_at(0, 80, 512) == 256  # at most half of all latents
    assert driver.l0_target_at(0, 400, 512) == 400  # but never below the target


@pytest.mark.parametrize("target", [2.0, 20.0, 60.0])
def test_lambda_controller_finds_the_l0_asked_for(target):
    """On standard normal pre-activations L0 is known: d_sae * P(pre > threshold)."""
    controller, rng = driver.LambdaController(100.0, torch.device("cpu")), generator()
    for _ in range(600):
        pre = torch.randn(64, 200, generator=rng)
        controller.observe((pre > controller.threshold()).float().sum(1).mean(), target)
    expected = 200 * 0.5 * math.erfc(controller.threshold().item() / math.sqrt(2))
    assert expected == pytest.approx(target, rel=0.06)


def test_the_controller_finds_back_from_a_target_out_of_reach():
    """While too few latents can fire, lambda falls; it must not fall so far that it stays there."""
    controller = driver.LambdaController(100.0, torch.device("cpu"))
    for _ in range(500):
        controller.observe(torch.tensor(10.0), 50.0)
    assert controller.threshold().item() == pytest.approx(controller.LEAST)
    for _ in range(40):
        controller.observe(torch.tensor(100.0), 50.0)
    assert controller.threshold().item() > 10 * controller.LEAST


def test_soft_kl_against_its_definition():
    teacher, logits = (3 * torch.randn(50, 10, generator=generator(s)) for s in (0, 1))
    p, q = (
        torch.softmax(a.double() / driver.STEERING.head_temperature, 1) for a in (teacher, logits)
    )
    expected = driver.STEERING.head_temperature**2 * (p * (p / q).log()).sum(1).mean().item()
    assert driver.soft_kl(teacher, logits).item() == pytest.approx(expected, rel=1e-4)
    assert driver.soft_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_gradients_are_autograds():
    """Of any loss of the reconstruction; features outside their range get none."""
    sae = random_sae().requires_grad_(True)
    x = torch.randn(20, 6, generator=generator(1))
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    feature_acts = sae.encode(x)
    x_hat = sae.decode(feature_acts)
    expected = torch.autograd.grad((x_hat - x).square().mean(), weights)
    d_x_hat = 2 * (x_hat - x) / x.numel()
    with torch.no_grad():
        found = driver.sae_gradients(sae, x, feature_acts, feature_acts.sign(), d_x_hat)
    assert 0 < (feature_acts > 0).float().mean() < 1
    for name, a, b in zip("W_enc b_enc W_dec b_dec".split(), found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_head_gradient_is_that_of_the_divergence():
    z = torch.randn(30, 6, generator=generator(1))
    frame = TrainingFrame.of(z)
    W = torch.randn(6, 4, generator=generator(2))
    teacher = torch.randn(30, 4, generator=generator(3))
    x_hat = frame.enter(z)
    found = driver.head_gradient(teacher, lambda z: z @ W, frame, x_hat)
    temperature = driver.STEERING.head_temperature
    softened = [torch.softmax(a / temperature, 1) for a in (z @ W, teacher)]
    of_logits = temperature * (softened[0] - softened[1]) / 30  # T^2 * (q - p) / (T * B)
    torch.testing.assert_close(found, of_logits @ W.T @ frame.basis * frame.scale)
    assert not x_hat.requires_grad


def rare_loss(sae, pre, residual, rare, at_once) -> torch.Tensor:
    """Image by image: the rare latents with the largest pre explain the residual."""
    total = torch.zeros(())
    for row, wanted in zip(pre, residual, strict=True):
        best = sorted((k for k in range(len(row)) if rare[k]), key=lambda k: -row[k].item())
        explained = sum(row[k] * sae.W_dec[k] for k in best[:at_once])
        total = total + (wanted - explained).square().sum()
    return total / residual.numel()


def test_rare_latents_are_pulled_as_a_loop_says(monkeypatch):
    steering = driver.STEERING._replace(rare_at_once=2, rare_share=5 / 9)
    monkeypatch.setattr(driver, "STEERING", steering)
    sae = random_sae().requires_grad_(True)
    density = torch.tensor([0, 0.5, 0.001, 0.0015, 0.5, 0.5, 0.5, 0.0005, 0.5])
    rare = density < 0.002
    x, error = torch.randn(2, 12, 6, generator=generator(2))
    pre = sae.pre_threshold(x)
    loss = steering.rare_coefficient * rare_loss(sae, pre, -error, rare, at_once=2)
    expected = torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.W_dec])
    found = [torch.ones_like(w) for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    with torch.no_grad():
        driver.add_rare_gradients(found, sae, x, pre, error, density, 0.002)
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a - 1, b, atol=1e-6, rtol=1e-4)
    assert torch.equal(found[3], torch.ones(6))


def test_without_rare_latents_nothing_is_pulled():
    sae = random_sae()
    x, error = torch.randn(2, 12, 6, generator=generator(2))
    found = [torch.zeros_like(w) for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    pre, density = sae.pre_threshold(x), torch.full((9,), 0.1)
    driver.add_rare_gradients(found, sae, x, pre, error, density, 0.1)
    assert not any(gradient.any() for gradient in found)


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


def test_a_step_is_gradient_descent_on_the_loss():
    """One step of SAETraining against autograd on the loss written out, and torch's Adam."""
    settings = Settings(target_actives=(5,), **TOY)
    z = synthetic_z(400)
    training = driver.SAETraining(z, head, 5, settings, generator())
    reference = driver.SAETraining(z, head, 5, settings, generator())
    index, number, progress = torch.arange(100), 1, 0.7  # after the logits count
    training.step(index, number, progress)

    sae, frame = reference.sae, reference.frame
    sae.threshold.copy_(reference.thresholds(driver.l0_target_at(progress, 5, 64)))
    sae.requires_grad_(True)
    x = reference.x[index]
    x_hat = sae(x)
    divergence = driver.soft_kl(reference.teacher[index], head(frame.leave(x_hat)))
    loss = F.mse_loss(x_hat, x) + settings.head_kl * divergence
    optimizer = torch.optim.Adam(
        [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec],
        lr=settings.lr_sae * driver.ramp(progress, 0.02, 0.3),
        betas=(0.9, 0.99),
    )
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    for name, value in training.sae.state_dict().items():
        torch.testing.assert_close(value, sae.state_dict()[name], msg=name, atol=1e-5, rtol=1e-4)


def synthetic_z(
    n: int = 4000, d_in: int = 16, scale: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    """Sparse non-negative combinations of 40 directions, with a little noise."""
    rng = generator(7)
    directions = F.normalize(torch.randn(40, d_in, generator=rng), dim=1)
    codes = torch.rand(n, 40, generator=rng) * (torch.rand(n, 40, generator=rng) < 0.1)
    return scale * (codes @ directions + 0.01 * torch.randn(n, d_in, generator=rng)) + offset


def head(z: torch.Tensor) -> torch.Tensor:
    return z[:, :3]


TOY = dict(sae_latents=64, batch_sae=100, epochs_sae_final=1)


def fvu_of(sae: JumpReLUSAE, z: torch.Tensor) -> float:
    return ((z - sae(z)).square().sum() / (z - z.mean(0)).square().sum()).item()


@pytest.mark.parametrize("target", [2, 6])
def test_training_reaches_the_target_in_one_run(target):
    z = synthetic_z()
    sae, course = driver.train_sae(z, head, target, Settings(target_actives=(target,), **TOY))
    assert driver.mean_actives(sae, z) == pytest.approx(
        target, rel=0.08
    )  # batches of 100: a noisy L0
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    assert (sae.threshold >= 0).all()
    assert len(course.l0) == driver.n_steps(4000, 100, 12)
    assert course.loss[-20:].mean() < course.loss[:20].mean()
    assert fvu_of(sae, z) < (0.4 if target == 2 else 0.12)


def test_training_does_not_depend_on_the_scale_of_z():
    """What NORMALIZE_Z = False needs: other units and origin give the same SAE, in those units."""
    settings = Settings(target_actives=(5,), head_kl=0.0, **TOY)
    plain, _ = driver.train_sae(synthetic_z(), head, 5, settings)
    other_z = synthetic_z(scale=50.0, offset=3.0)
    other, _ = driver.train_sae(other_z, head, 5, settings)
    assert driver.mean_actives(other, other_z) == pytest.approx(5, rel=0.08)
    assert fvu_of(other, other_z) == pytest.approx(fvu_of(plain, synthetic_z()), rel=0.25)


def test_training_repeats_itself_and_leaves_its_input_alone():
    z = synthetic_z(1000)
    before, settings = z.clone(), Settings(target_actives=(5,), **TOY)
    torch.manual_seed(1)
    expected_next = torch.rand(1).item()
    torch.manual_seed(1)
    (a, _), (b, _) = (driver.train_sae(z, head, 5, settings) for _ in range(2))
    assert torch.rand(1).item() == expected_next
    assert torch.equal(z, before)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_sae_divergence_is_reported():
    with pytest.raises(TrainingError, match=r"SAE training for 5 actives diverged.*--lr-sae"):
        driver.train_sae(
            synthetic_z(1000), head, 5, Settings(target_actives=(5,), lr_sae=1e38, **TOY)
        )


# --- Thresholds -----------------------------------------------------------------------------------


def actives(sae: JumpReLUSAE, z: torch.Tensor) -> int:
    return int((sae.encode(z) > 0).sum())


@pytest.mark.parametrize("target", [0.5, 1, 3, 4.2])
def test_adjusted_thresholds_give_exactly_the_target(target):
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    adjusted, shift = driver.adjust_thresholds(sae, z, target)
    assert actives(adjusted, z) == round(target * 1000)
    assert torch.allclose(adjusted.threshold, (sae.threshold + shift).clamp(min=0), atol=1e-6)
    for name, value in weights.items():
        assert torch.equal(sae.state_dict()[name], value), f"{name} of the original changed"
        if name != "threshold":
            assert torch.equal(adjusted.state_dict()[name], value), name


def test_the_shift_does_not_depend_on_how_images_are_cut(monkeypatch):
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    whole = driver.threshold_shift(sae, z, 3)
    monkeypatch.setattr(driver, "EVAL_ROWS", 77)
    assert driver.threshold_shift(sae, z, 3) == pytest.approx(whole, abs=1e-6)


def shift_by_sorting(sae: JumpReLUSAE, z: torch.Tensor, target: float) -> float:
    """Between the last excess that is wanted and the next one, all of them sorted."""
    pre = sae.pre_threshold(z)
    excess = np.sort((pre - sae.threshold)[pre > 0].numpy())[::-1].astype(np.float64)
    wanted = round(target * len(z))
    return (excess[wanted - 1] + excess[wanted]) / 2


@pytest.mark.parametrize("digits", [1, 6])  # with one digit most excesses tie
def test_the_shift_is_exactly_that_of_sorting(digits, monkeypatch):
    monkeypatch.setattr(driver, "EVAL_ROWS", 77)
    z = torch.randn(1000, 6, generator=generator(1))
    sae = random_sae()
    sae.W_enc.mul_(10**digits).round_().div_(10**digits)
    z = (10**digits * z).round() / 10**digits
    for target in (0.001, 0.5, 2, 3.3):
        assert driver.threshold_shift(sae, z, target) == shift_by_sorting(sae, z, target)


def test_the_values_of_ranks_are_those_of_sorting():
    special = torch.tensor([0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, 1.0, torch.inf, -torch.inf])
    values = torch.cat([special, 10 ** (10 * torch.randn(500, generator=generator()))])
    values = torch.cat([values, -values[:300]])
    expected = values.sort(descending=True).values
    ranks = torch.arange(1, len(values) + 1)
    assert torch.equal(driver.largest_at(ranks, lambda: values.split(64)), expected)
    assert driver.largest_at(ranks + 1, lambda: [values]) is None
    bits = torch.tensor([-(2**31), -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(driver.in_order(driver.in_order(bits)), bits)


def test_many_latents_are_evaluated_in_smaller_pieces(monkeypatch):
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    whole = (driver.feature_usage(sae, z), driver.mean_actives(sae, z))
    monkeypatch.setattr(driver, "EVAL_ENTRIES", 9 * 20)
    assert {len(chunk) for chunk in driver.chunks_for(sae, z)} == {20}
    density, mean = driver.feature_usage(sae, z)
    assert torch.equal(density, whole[0].feature_density)
    assert torch.allclose(mean, whole[0].mean_activation)
    assert driver.mean_actives(sae, z) == whole[1]


def test_thresholds_stay_at_zero_or_above():
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    positive = int((sae.pre_threshold(z) > 0).sum())
    target = (
        positive - 5
    ) / 1000  # so many that the smallest thresholds would have to fall below zero
    adjusted, shift = driver.adjust_thresholds(sae, z, target)
    assert shift < -sae.threshold.min()
    assert (adjusted.threshold >= 0).all()
    assert (adjusted.threshold == 0).any()
    assert actives(adjusted, z) == positive - 5


def test_more_actives_than_positive_preactivations_cannot_be_reached():
    sae, z = random_sae(), torch.randn(100, 6, generator=generator(1))
    adjusted, shift = driver.adjust_thresholds(sae, z, 9)
    assert shift == -math.inf
    assert torch.equal(adjusted.threshold, torch.zeros(9))
    assert actives(adjusted, z) == int((sae.pre_threshold(z) > 0).sum())


def test_ties_are_left_out_together():
    sae = JumpReLUSAE(1, 1)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
    z = torch.tensor([[5.0], [3.0], [3.0], [3.0], [1.0]])
    for wanted, reached in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 5)):
        adjusted, _ = driver.adjust_thresholds(sae, z, wanted / 5)
        assert actives(adjusted, z) == reached, wanted


# --- Preactivations in a file, and the course -----------------------------------------------------


class Doubled:
    """A model whose preactivations are twice its inputs."""

    def preactivations(self, images):
        return 2 * images


def test_preactivations_in_a_file_are_the_standardised_ones(tmp_path):
    images = 3 * torch.randn(1000, 5, generator=generator()) + 100
    images[:, 2] = 7  # a unit that never varies
    loader = [(some, None) for some in images.split(300)]
    path = tmp_path / "z.f32"
    z, mu, std = driver.memory_mapped_preactivations(Doubled(), loader, path)
    raw = 2 * images.double().numpy()
    expected = raw.std(0, ddof=1)
    expected[2] = 1
    assert mu.numpy() == pytest.approx(raw.mean(0), rel=1e-6)
    assert std.numpy() == pytest.approx(expected, rel=1e-6)
    assert z.numpy() == pytest.approx((raw - raw.mean(0)) / expected, abs=1e-4)
    assert np.array_equal(np.fromfile(path, np.float32).reshape(1000, 5), z.numpy())
    assert [file.name for file in tmp_path.iterdir()] == ["z.f32"]

    some = [(images[:10], None)]
    other = driver.memory_mapped_preactivations(Doubled(), some, tmp_path / "other", (mu, std))
    assert torch.equal(other.z, z[:10])
    with pytest.raises(ValueError, match="the loader is empty"):
        driver.memory_mapped_preactivations(Doubled(), [], path)
    assert len(list(tmp_path.iterdir())) == 2


def test_training_on_rows_that_are_streamed(tmp_path, monkeypatch):
    z = synthetic_z()
    z.numpy().tofile(tmp_path / "z.f32")
    settings = Settings(target_actives=(5,), **TOY)
    usual, plain = TrainingFrame.of(z), driver.train_sae(z, head, 5, settings)[0]
    monkeypatch.setattr(driver, "STREAMED", 1000 * 16)
    mapped = driver.map_rows(tmp_path / "z.f32", 16)
    frame = TrainingFrame.of(mapped)
    assert torch.allclose(frame.center, usual.center, atol=1e-6)
    assert torch.allclose(frame.scale, usual.scale)
    turned = (frame.basis.T @ usual.basis).abs()  # an eigenvector's sign is free
    assert torch.allclose(turned, torch.eye(16), atol=1e-3)

    training = driver.SAETraining(mapped, head, 5, settings, generator())
    assert training.x is None
    assert training.teacher is None
    index = torch.tensor([3, 3999, 17])
    assert torch.allclose(training.rows(index), frame.enter(z)[index], atol=1e-5)
    assert torch.equal(training.teacher_of(index), head(z)[index])
    x = driver.starting_images(mapped, frame, generator())
    assert len(x) == 1000
    distance = torch.cdist(frame.leave(x), z).amin(1)
    assert distance.max() < 1e-2  # all are images

    before = (tmp_path / "z.f32").read_bytes()
    sae, _ = driver.train_sae(mapped, head, 5, settings)
    assert driver.mean_actives(sae, z) == pytest.approx(5, rel=0.08)
    assert fvu_of(sae, z) < 1.2 * fvu_of(plain, z)
    assert (tmp_path / "z.f32").read_bytes() == before


def test_logged_steps_end_with_the_last():
    for n in (1, 99, 100, 101, 250, 1875, 7813):
        steps = driver.logged_steps(n)
        assert steps[-1] == n - 1
        assert min(n, 100) <= len(steps) < 200
        assert steps[0] >= 0


def test_dead_latents_are_those_whose_density_is_tiny():
    training = driver.SAETraining(synthetic_z(400), head, 5, Settings(**TOY), generator())
    assert training.dead() == 0
    training.density[:7] = torch.tensor([0, 9e-6, 1.1e-5, 1e-4, 0.5, 1, 0])
    assert training.dead() == 3
    # A latent that has fired on one of 128 images counts as dead after 206 silent batches.
    silent = math.log(driver.DEAD_BELOW * 128 / 0.01) / math.log(0.99)
    assert silent == pytest.approx(205, abs=1)


def test_the_log_keeps_each_stage_once(tmp_path):
    assert driver.read_log(tmp_path, "sae") == []
    columns = {"step": [0, 9], "loss": [2.0, 0.5], "dead": [0, 3]}
    lines = driver.log_lines("sae", columns, [0.12345, 1.0])
    assert lines == [
        {"step": 0, "stage": "sae", "loss": 2.0, "dead": 0, "seconds": 0.123},
        {"step": 9, "stage": "sae", "loss": 0.5, "dead": 3, "seconds": 1.0},
    ]
    other = driver.log_lines("classifier", {"step": [4], "loss": [1.5]}, [2.0])
    nothing = {"fingerprint": "", "seed": 0, "data_digest": ""}
    driver.save_trained(tmp_path, "sae", {}, nothing, lines)
    driver.save_trained(tmp_path, "classifier", {}, nothing, other)
    driver.save_trained(tmp_path, "sae", {}, nothing, lines[1:])
    written = (tmp_path / driver.LOG).read_text().splitlines()
    assert [json.loads(line) for line in written] == [*other, lines[1]]
    (tmp_path / "classifier.json").unlink()  # the lines belong to nothing now
    driver.write_log(tmp_path, "sae", lines)
    assert driver.read_log(tmp_path, "classifier") == []
    assert driver.log_of_stage(tmp_path, "sae") == []  # those that were saved were lines[1:]
    (tmp_path / driver.LOG).write_text("{")
    with pytest.raises(InputError, match=r"run\.log\.jsonl is damaged .*; move it away"):
        driver.read_log(tmp_path, "sae")


def test_the_picture_shows_the_log(tmp_path, monkeypatch):
    classifier = driver.log_lines("classifier", {"step": [4], "loss": [1.5]}, [2.0])
    columns = {"step": [0, 9], "loss": [2.0, 0.5], "l0": [30, 6], "lambda": [3, 4], "dead": [0, 1]}
    sae = driver.log_lines("sae", columns, [1.0, 2.0])
    curves = driver.training_curves(classifier, sae, 5, 0.15)
    assert [curve.values for curve in curves] == [[1.5], *list(columns.values())[1:]]
    assert [curve.steps for curve in curves] == [[4], *4 * [[0, 9]]]
    assert [curve.aim for curve in curves] == [None, None, 5, None, None]
    assert {curve.turn for curve in curves[1:]} == {5}
    assert len(driver.training_curves([], sae, 5, 0)) == 4
    assert driver.training_curves([], sae, 5, 0)[0].turn is None

    drawn = []
    monkeypatch.setattr(fa, "save_figure", lambda figure, path: drawn.append(figure))
    driver.draw_training(curves, tmp_path / "training.png")
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == [curve.title for curve in curves]
    assert panels[2].lines[0].get_ydata().tolist() == [30, 6]
    assert panels[2].lines[1].get_ydata() == [5, 5]
    driver.write_training(tmp_path, tmp_path, 5, 0.15)
    assert len(drawn) == 1  # without a log there is nothing to draw


# --- Fidelity -------------------------------------------------------------------------------------


def fidelity_case() -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(400, 3, generator=generator(4)) * 2 + 1
    return z, (z + torch.randn(400, 3, generator=generator(5))).argmax(1)


def test_a_perfect_reconstruction_loses_nothing():
    z, labels = fidelity_case()
    result = driver.fidelity(z, z, labels, head, z.mean(0))
    assert (result.agreement, result.fvu, result.ce_recovered) == (1, 0, 1)
    assert result.kl == pytest.approx(0, abs=1e-7)
    assert result.accuracy == pytest.approx((z.argmax(1) == labels).double().mean().item())


def test_the_mean_as_reconstruction_loses_everything():
    z, labels = fidelity_case()
    mean = z.mean(0)
    result = driver.fidelity(z, mean.expand_as(z), labels, head, mean)
    assert result.fvu == pytest.approx(1, abs=1e-6)
    assert result.ce_recovered == pytest.approx(0, abs=1e-6)
    assert result.accuracy == pytest.approx((labels == mean.argmax()).double().mean().item())


def test_fidelity_against_its_definitions():
    z, labels = fidelity_case()
    z_hat = z + 0.7 * torch.randn(z.shape, generator=generator(6))
    result = driver.fidelity(z, z_hat, labels, head, z.mean(0))
    p, q = (torch.softmax(a.double(), 1) for a in (z, z_hat))
    mean_p = torch.softmax(z.mean(0).double(), 0)
    ce, ce_hat = (-a[range(400), labels].log().mean().item() for a in (p, q))
    ce_mean = -mean_p[labels].log().mean().item()
    assert result.cross_entropy == pytest.approx(ce_hat, rel=1e-5)
    assert result.ce_recovered == pytest.approx((ce_mean - ce_hat) / (ce_mean - ce), rel=1e-4)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert result.agreement == pytest.approx(
        (z.argmax(1) == z_hat.argmax(1)).double().mean().item()
    )
    error, spread = (z - z_hat).double().square().sum(), (z - z.mean(0)).double().square().sum()
    assert result.fvu == pytest.approx((error / spread).item(), rel=1e-5)
    scaled = driver.fidelity(9 * z, 9 * z_hat, labels, head, 9 * z.mean(0))
    assert scaled.fvu == pytest.approx(result.fvu, rel=1e-5)


def test_the_three_modes_by_hand():
    sae = JumpReLUSAE(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
        sae.threshold.copy_(torch.tensor([0.5, 0.5]))
    z = torch.tensor([[2.0, 0.0], [4.0, 5.0], [0.4, 1.0]])
    usage = driver.feature_usage(sae, z)
    assert usage.feature_density.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert usage.mean_activation.tolist() == [3, 3]
    expected = {
        "jumprelu": [[2.0, 1.0], [7.0, 5.0], [0.6, 1.8]],
        "boolean": [[1.0, 1.0], [1.6, 1.8], [0.6, 1.8]],
        "boolean_scaled": [[3.0, 1.0], [4.8, 3.4], [1.8, 3.4]],
    }
    assert tuple(expected) == driver.MODES
    for mode, z_hat in expected.items():
        assert torch.allclose(
            driver.reconstruct(sae, z, mode, usage.mean_activation), torch.tensor(z_hat)
        ), mode


def test_a_share_of_nothing_is_not_computed_and_says_so():
    """An SAE that no training image fires."""
    train, test = (torch.randn(n, 3, generator=generator(n)) for n in (300, 200))
    pre = driver.Preactivations(train, test, test, torch.zeros(3), torch.ones(3))
    model = types.SimpleNamespace(logits_from_preactivations=lambda raw: raw)
    subject = driver.Subject(model, "", pre, "", "")
    sae = random_sae(3, 4)
    sae.threshold.fill_(1e6)
    trained = driver.TrainedSAE(sae, sae, {}, "")
    record = driver.measure(trained, subject, test.argmax(1), 2)
    assert (record["dense_share_of_l0"], record["dead_features"]) == (None, 4)
    driver.to_json(record)  # no number that JSON does not have
    record |= {"target_actives": 2, "lambda": 0.1, "threshold_shift": None}
    rows = [line.split("  ")[-1].strip() for line in driver.results_table([record]).splitlines()]
    assert rows[-1] == rows[5] == "not computed"

    advice = "no feature fires on any training image"
    d = driver.Diagnosis("few features do the work", None, 0.6, "share", advice)
    assert not d.fine
    told = driver.diagnoses_text([d]).splitlines()
    assert told[1].split() == "few features do the work not computed 0.6 attention share".split()
    assert told[2] == f"few features do the work: {advice}"

    records = [{**record, "seed": seed, "sae_latents": 4} for seed in (0, 1)]
    records[1]["dense_share_of_l0"] = 0.5  # of two seeds one has no share: no mean either
    assert driver.sweep_table(records).splitlines()[-1].endswith("4.0 ± 0.0  not computed")


def test_principal_components_are_the_best_of_their_number():
    z = torch.randn(500, 5, generator=generator()) * torch.tensor([3.0, 1, 2, 0.1, 0.5]) + 7
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator(1)))
    z = z @ turn
    centred = (z - z.mean(0)).double().numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    for n in (1, 3, 5):
        z_hat = driver.principal_reconstruction(z, z, n)
        left = (z - z_hat).square().sum().item()
        assert left == pytest.approx((singular[n:] ** 2).sum(), rel=1e-3, abs=1e-3)
    other = driver.principal_reconstruction(z, z + 1, 5)  # all of them keep everything
    assert torch.allclose(other, z + 1, atol=1e-4)


def test_mean_and_spread():
    assert driver.mean_and_spread(np.array([1.0, 2.0, 6.0])) == {
        "mean": 3.0,
        "std": pytest.approx(7**0.5),
    }
    assert driver.mean_and_spread(np.array([2.0])) == {"mean": 2.0, "std": None}


def seeds_compared(saes: list[JumpReLUSAE]) -> driver.Replicates | None:
    """`compare_seeds` on a model whose preactivations are its images (N, 6)."""
    images = torch.randn(400, 6, generator=generator(9))
    model = types.SimpleNamespace(preactivations=lambda x: x)
    raw = driver.Preactivations(images, images, images, torch.zeros(6), torch.ones(6))
    subject = driver.Subject(model, "", raw, "", "")
    trained = [driver.TrainedSAE(sae, sae, {}, "") for sae in saes]
    settings = Settings(seed=4, sae_latents=9, target_actives=(3,))
    return driver.compare_seeds(3, trained, settings, subject, images)


def test_an_sae_returns_wholly_in_itself_and_not_by_chance():
    sae = random_sae()
    found = seeds_compared([sae, sae])
    assert found.seeds == [5]
    assert found.matches[0].feature.tolist() == list(range(9))
    for name in ("features", "energy", "similarity"):
        assert found.record[name] == {"mean": pytest.approx(1, abs=1e-5), "std": None}
        assert found.record["untrained"][name] < 0.9
    (counterpart,) = found.counterparts(3)
    assert (counterpart["seed"], counterpart["feature"]) == (5, 3)
    assert counterpart["cosine"] == pytest.approx(1)


def test_pairs_of_saes_are_averaged_over_both_directions():
    """Of three SAEs two are the same, so that one pair of three returns wholly."""
    one, other = random_sae(), random_sae(seed=1)
    found = seeds_compared([one, one, other])
    alone = seeds_compared([one, other])
    across = alone.record["similarity"]["mean"]
    assert found.record["pairs"] == 3
    assert found.record["similarity"]["mean"] == pytest.approx((1 + 2 * across) / 3, abs=1e-5)
    expected = np.std([1, across, across], ddof=1)
    assert found.record["similarity"]["std"] == pytest.approx(expected, abs=1e-5)
    assert seeds_compared([one]) is None


def test_starting_rows_are_those_of_training():
    z = synthetic_z(400)
    training = driver.SAETraining(z, head, 5, Settings(seed=3, **TOY), generator(3))
    rows = driver.starting_rows(z, 64, seed=3)
    assert torch.allclose(rows, training.frame.fold(training.sae).W_dec, atol=1e-5)


def test_usage_of_a_silent_feature_is_zero():
    sae = JumpReLUSAE(1, 1)
    usage = driver.feature_usage(sae, torch.ones(5, 1))
    assert (usage.feature_density.item(), usage.mean_activation.item()) == (0, 0)


# --- Jobs -----------------------------------------------------------------------------------------


def double_or_fail(value: int) -> int:
    if value < 0:
        raise InputError(f"{value} is negative")
    return 2 * value


def threads_and_a_sum() -> tuple[int, float]:
    values = torch.rand(100_000, generator=generator())
    return torch.get_num_threads(), values.sum().item()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_jobs_give_their_results_in_order(workers):
    with driver.Jobs(workers) as jobs:
        started = [jobs.start("double", double_or_fail, i, here=i % 3 == 0) for i in range(7)]
        assert jobs.results(started) == [0, 2, 4, 6, 8, 10, 12]
        assert set(jobs.seconds) == {"double"}
        assert jobs.results([]) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_job_raises_arrives(workers):
    with driver.Jobs(workers) as jobs, pytest.raises(InputError, match="-1 is negative"):
        jobs.results([jobs.start("fail", double_or_fail, -1)])


def test_a_worker_computes_with_one_thread_and_gives_the_same_bits():
    with driver.torch_threads(1), driver.Jobs(1) as jobs:
        job = jobs.start("sum", threads_and_a_sum)
        assert job.future.result()  # run by the worker, not taken back
        assert jobs.results([job]) == [threads_and_a_sum()]
        assert threads_and_a_sum()[0] == 1


def test_a_worker_that_dies_is_reported():
    with driver.Jobs(1) as jobs:
        job = jobs.start("die", os._exit, 1)
        job.future.exception()  # waits until it is dead
        with pytest.raises(BrokenProcessPool):
            jobs.results([job])


def test_other_processes_are_left_alone():
    with driver.Jobs(1) as outer:
        with driver.Jobs(1) as inner:
            assert inner.results([inner.start("double", double_or_fail, 2)]) == [4]
        assert outer.results([outer.start("double", double_or_fail, 3)]) == [6]


def test_what_cannot_be_sent_is_refused_at_once():
    with driver.Jobs(1) as jobs:
        with pytest.raises(InputError, match="no cannot be sent to worker processes"):
            jobs.start("no", lambda: None)
        assert jobs.results([jobs.start("double", double_or_fail, 2)]) == [4]


PARENT = """
import sys, time
import feature_analysis as fa
import MNIST_SAE_code as driver
import os
if __name__ == "__main__":
    jobs = driver.Jobs(1)
    job = jobs.start("pid", os.getpid)
    print(job.future.result() and jobs.results([job])[0], flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are looked up in another way")
def test_workers_do_not_outlive_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(driver.__file__)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} is still there")


def test_torch_has_its_threads_back():
    before = torch.get_num_threads()
    with driver.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- Saved stages ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    record = {"fingerprint": "print", "note": "x"}
    driver.save_stage(tmp_path, "thing", {"a": torch.arange(3.0)}, record)
    return tmp_path


EXPECTED = {"fingerprint": "print"}


def test_a_saved_stage_is_reused(saved):
    stage, news = driver.reusable_stage(saved, "thing", EXPECTED, fresh=False)
    assert stage.tensors["a"].tolist() == [0, 1, 2]
    assert stage.record["note"] == "x"
    assert "thing: reused" in news


def test_fresh_ignores_a_saved_stage(saved):
    assert driver.reusable_stage(saved, "thing", EXPECTED, fresh=True) == (None, "")


def test_nothing_saved_is_nothing_to_report(tmp_path):
    assert driver.reusable_stage(tmp_path, "thing", EXPECTED, fresh=False) == (None, "")


def test_a_stage_of_other_settings_is_kept_aside(saved):
    for n in (1, 2):
        other = {"fingerprint": "another"}
        stage, news = driver.reusable_stage(saved, "thing", other, fresh=False)
        assert stage is None
        driver.keep_aside(saved, "thing")
        assert f"kept as thing.kept-{n}" in news
        assert driver.read_stage(saved, f"thing.kept-{n}").tensors["a"].tolist() == [0, 1, 2]
        driver.save_stage(saved, "thing", {"a": torch.arange(3.0)}, {"fingerprint": "print"})


def damage_tensors(folder):
    path = folder / "thing.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_header(folder):
    """A file that is not safetensors, with a JSON that vouches for it."""
    (folder / "thing.safetensors").write_bytes(b"nonsense")
    digest = hashlib.sha256(b"nonsense").hexdigest()
    record = driver.sealed({"fingerprint": "print", "sha256": digest})
    (folder / "thing.json").write_bytes(driver.to_json(record))


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        damage_header,
        lambda folder: (folder / "thing.json").write_text("{"),
        lambda folder: (folder / "thing.json").write_text("[]"),
        lambda folder: (folder / "thing.json").write_text("{}"),
        lambda folder: (folder / "thing.json").unlink(),
        lambda folder: (folder / "thing.json").write_text(
            (folder / "thing.json").read_text().replace('"x"', '"y"')
        ),
        lambda folder: (folder / "thing.safetensors").unlink(),
    ],
)
def test_a_damaged_stage_is_reported_retrained_and_kept_aside(saved, damage):
    damage(saved)
    left = sorted(path.read_bytes() for path in saved.iterdir())
    stage, news = driver.reusable_stage(saved, "thing", EXPECTED, fresh=False)
    driver.keep_aside(saved, "thing")
    assert stage is None
    assert "thing: retrained, because thing.safetensors with thing.json" in news
    assert "damaged or incomplete" in news
    assert sorted(path.read_bytes() for path in saved.iterdir()) == left
    assert all(".kept-1." in path.name for path in saved.iterdir())


def test_fingerprint_follows_settings_inputs_and_code(monkeypatch):
    def base(settings=Settings(), **inputs):  # noqa: B008
        return driver.fingerprint(driver.chosen(settings, ["seed"]), **inputs)

    before = base()
    assert before == base() == base(Settings(out="elsewhere"))
    assert len({before, base(Settings(seed=1)), base(data="x")}) == 3
    monkeypatch.setattr(driver, "code_below_settings", lambda: "other code")
    assert base() != before


def test_the_code_that_decides_is_the_file_below_the_settings():
    below = driver.code_below_settings()
    assert "SAE_LATENTS = " not in below  # an edit there is seen in the settings
    for name in ("initial_rows", "STEERING = ", "EVAL_ROWS = ", "def adjust_thresholds"):
        assert name in below
    assert below.endswith("sys.exit(run_script())\n")


def test_json_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        driver.to_json({"a": math.nan})


def test_load_run_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        driver.load_run(str(tmp_path))


def test_an_output_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"--out .*file cannot be written to"):
        driver.prepare_folder(tmp_path / "file")


def test_processes_beside_this_one(monkeypatch):
    for cores, ranks_here, expected in ((1, 1, 0), (2, 1, 1), (8, 2, 3), (64, 1, 7), (2, 4, 0)):
        monkeypatch.setattr(driver, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
        assert driver.n_workers(Settings(workers=-1)) == expected
        assert driver.n_workers(Settings(workers=5)) == 5


def test_memory_is_that_of_the_machine_at_most():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < driver.memory_bytes() <= machine


def test_the_most_influential_features_come_first_as_many_as_asked_for():
    removed = types.SimpleNamespace(influence=torch.tensor([0.1, 0.4, 0.1, 0.3]))
    analysis = types.SimpleNamespace(removed=removed)
    for limit, expected in ((0, [1, 3, 0, 2]), (2, [1, 3]), (9, [1, 3, 0, 2])):
        assert driver.analysed_features(analysis, limit) == expected
