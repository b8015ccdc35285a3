"""SAE training in MNIST_SAE_code.py: losses, gradients, lambda, calibration of thresholds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import feature_analysis as fa
import MNIST_SAE_code as st
from MNIST_SAE_code import SCHEDULE, Settings
from saexplain import calibration, fidelity
from saexplain import rows as rows_module
from saexplain.calibration import adjust_thresholds, threshold_shift
from saexplain.fidelity import mean_l0
from saexplain.optimization import Adam, TrainingError, spread_batches
from saexplain.rows import TrainingRows, mean_and_std
from saexplain.sae import JumpReLUSAE, PCACoordinates
from saexplain.stages import training_rows

TOY = dict(sae_latents=64, batch_sae=100, epochs_sae_final=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_sae(d_in: int = 6, d_sae: int = 9, seed: int = 0) -> JumpReLUSAE:
    """Weights from a normal distribution, unit decoder rows, thresholds in [0, 1)."""
    rng, sae = generator(seed), JumpReLUSAE(d_in, d_sae)
    with torch.no_grad():
        for weights in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            weights.copy_(torch.randn(weights.shape, generator=rng))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        sae.threshold.copy_(torch.rand(d_sae, generator=rng))
    return sae


def synthetic_z(n: int = 4000, d_in: int = 16) -> torch.Tensor:
    """z (n, d_in): sparse non-negative combinations of 40 directions, with a little noise."""
    rng = generator(7)
    directions = F.normalize(torch.randn(40, d_in, generator=rng), dim=1)
    codes = torch.rand(n, 40, generator=rng) * (torch.rand(n, 40, generator=rng) < 0.1)
    return codes @ directions + 0.01 * torch.randn(n, d_in, generator=rng)


def head(z: torch.Tensor) -> torch.Tensor:
    """Logits (N, 3) of z."""
    return z[:, :3]


# --- Coordinates ----------------------------------------------------------------------------------


def test_pca_coordinates_are_centred_decorrelated_and_of_mean_square_1():
    z = 3 * synthetic_z() + 5
    coordinates = PCACoordinates.fit(z)
    x = coordinates.transform(z)
    covariance = np.cov(x.double().numpy().T, bias=True)
    assert np.abs(x.double().mean(0).numpy()).max() < 1e-4
    assert np.abs(covariance - np.diag(covariance.diagonal())).max() < 1e-4
    assert (np.diff(covariance.diagonal()) > -1e-5).all()  # ascending
    assert covariance.trace() / 16 == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(coordinates.inverse_transform(x), z, atol=1e-4, rtol=1e-4)


def test_an_sae_of_x_and_its_rewriting_for_z_have_the_same_features():
    z = 3 * torch.randn(300, 6, generator=generator(1)) + 2
    coordinates, sae = PCACoordinates.fit(z), random_sae()
    x = coordinates.transform(z)
    rewritten = coordinates.sae_of_z(sae)
    torch.testing.assert_close(
        rewritten.encode(z), sae.encode(x).detach() * coordinates.scale, atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        rewritten(z), coordinates.inverse_transform(sae(x)).detach(), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(rewritten.W_dec.norm(dim=1), torch.ones(9))


# --- Losses and gradients -------------------------------------------------------------------------


def test_reconstruction_loss_is_the_mean_square_and_1_for_the_mean():
    x, x_hat = torch.randn(2, 50, 6, generator=generator())
    expected = ((x_hat.double().numpy() - x.double().numpy()) ** 2).sum() / (50 * 6)
    assert st.reconstruction_loss(x_hat, x).item() == pytest.approx(expected, rel=1e-5)
    assert st.reconstruction_loss(x, x).item() == 0
    x = PCACoordinates.fit(x).transform(x)
    assert st.reconstruction_loss(torch.zeros_like(x), x).item() == pytest.approx(1, rel=1e-4)


def test_logit_kl_against_its_definition():
    teacher, logits = (3 * torch.randn(50, 10, generator=generator(seed)) for seed in (0, 1))

    def softmax(a: torch.Tensor) -> np.ndarray:
        power = np.exp(a.double().numpy())
        return power / power.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(logits)
    expected = (p * np.log(p / q)).sum(1).mean()
    assert st.logit_kl(teacher, logits).item() == pytest.approx(expected, rel=1e-4)
    assert st.logit_kl(teacher, teacher + 7).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("per_image", [1, 2, 20])
def test_auxiliary_loss_against_a_loop(per_image, monkeypatch):
    """Value and gradients: image by image, the dying latents with the largest pre."""
    monkeypatch.setattr(st, "SCHEDULE", SCHEDULE._replace(auxiliary_per_image=per_image))
    sae, dying = random_sae(), [0, 2, 3, 7]
    x, residual = torch.randn(2, 12, 6, generator=generator(2))

    total = torch.zeros(())
    for image, wanted in zip(x, residual, strict=True):
        pre = {k: image @ sae.W_enc[:, k] + sae.b_enc[k] for k in dying}
        largest = sorted(dying, key=lambda k: -pre[k].item())[:per_image]
        explained = sum(pre[k] * sae.W_dec[k] for k in largest)
        total = total + (wanted - explained).square().sum()
    expected = total / (12 * 6)

    pre = sae.pre_activations(x)
    found = st.auxiliary_loss(pre, sae.W_dec, torch.tensor(dying), residual)
    torch.testing.assert_close(found, expected)
    weights = [sae.W_enc, sae.b_enc, sae.W_dec]
    for a, b in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dying", [[0, 2, 3, 7], [5], []])
@pytest.mark.parametrize("per_image", [2, 20])
def test_a_mask_of_dying_latents_is_the_same_as_their_indices(dying, per_image, monkeypatch):
    monkeypatch.setattr(st, "SCHEDULE", SCHEDULE._replace(auxiliary_per_image=per_image))
    sae, indices = random_sae(), torch.tensor(dying, dtype=torch.int64)
    x, residual = torch.randn(2, 12, 6, generator=generator(2))
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, indices, True)
    found = []
    for given in (indices, mask):
        loss = st.auxiliary_loss(sae.pre_activations(x), sae.W_dec, given, residual)
        found.append([loss, *torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.W_dec])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_auxiliary_loss_changes_dying_latents_only(monkeypatch):
    monkeypatch.setattr(st, "SCHEDULE", SCHEDULE._replace(auxiliary_per_image=1))
    sae = random_sae()
    x = torch.randn(12, 6, generator=generator(2))
    pre = sae.pre_activations(x)
    residual = x - sae.decode(sae.jump(pre))
    loss = st.auxiliary_loss(pre, sae.W_dec, torch.tensor([1, 4]), residual)
    d_W_enc, d_W_dec = torch.autograd.grad(loss, [sae.W_enc, sae.W_dec])
    changed = torch.tensor([k in (1, 4) for k in range(9)])
    assert torch.equal(d_W_dec.any(1), changed)
    assert torch.equal(d_W_enc.any(0), changed)


def test_jump_at_hand_computed_values():
    sae = JumpReLUSAE(1, 4)
    sae.threshold.copy_(torch.tensor([0.5, 0.5, 0.5, 0.0]))
    pre = torch.tensor([[0.49, 0.5, 0.51, -1.0]], requires_grad=True)
    acts = sae.jump(pre)
    assert acts.tolist() == [[0, 0, pytest.approx(0.51), 0]]  # at the threshold: inactive
    (gradient,) = torch.autograd.grad(acts.sum(), pre)
    assert gradient.tolist() == [[0, 0, 1, 0]]


def test_gradients_of_the_reconstruction_against_the_closed_form():
    """On both sides of the thresholds, in float64 and with numpy only."""
    sae, x = random_sae(), torch.randn(20, 6, generator=generator(1))
    losses = st.compute_losses(sae, x, head(x), head, 0.0, None)
    names = "W_enc b_enc W_dec b_dec".split()
    found = torch.autograd.grad(losses.total, [getattr(sae, name) for name in names])

    w = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    a = x.double().numpy()
    pre = a @ w["W_enc"] + w["b_enc"]
    active = pre > w["threshold"]
    acts = pre * active
    d_x_hat = 2 * (acts @ w["W_dec"] + w["b_dec"] - a) / a.size
    d_pre = (d_x_hat @ w["W_dec"].T) * active  # nothing below the threshold
    expected = [a.T @ d_pre, d_pre.sum(0), acts.T @ d_x_hat, d_x_hat.sum(0)]
    assert 0.2 < active.mean() < 0.8
    assert np.array_equal(losses.active.numpy(), active)
    for name, gradient, wanted in zip(names, found, expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), wanted, atol=1e-6, rtol=1e-4, err_msg=name)


def test_the_total_is_the_weighted_sum_of_the_three_losses():
    sae, x = random_sae(), torch.randn(20, 6, generator=generator(1))
    teacher, dying = torch.randn(20, 3, generator=generator(3)), torch.tensor([2, 5])
    found = st.compute_losses(sae, x, teacher, head, 0.3, dying)
    x_hat = sae(x)
    mse = F.mse_loss(x_hat, x)
    kl = st.logit_kl(teacher, head(x_hat))
    auxiliary = st.auxiliary_loss(sae.pre_activations(x), sae.W_dec, dying, x - x_hat)
    expected = mse + 0.3 * kl + SCHEDULE.auxiliary_weight * auxiliary
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.reconstruction, mse.detach())


def test_without_dying_latents_the_auxiliary_loss_has_no_gradient():
    sae, x = random_sae(), torch.randn(20, 6, generator=generator(1))
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    gradients = [
        torch.autograd.grad(st.compute_losses(sae, x, head(x), head, 0.0, dying).total, weights)
        for dying in (None, torch.tensor([], dtype=torch.int64))
    ]
    for without, empty in zip(*gradients, strict=True):
        assert torch.equal(without, empty)


# --- Sparsity -------------------------------------------------------------------------------------


def test_l0_target_falls_to_the_target_and_stays():
    start, settled = 20 * SCHEDULE.start_l0_factor, SCHEDULE.l0_settled_at
    assert st.l0_target_at(0, 20, 512) == start
    assert st.l0_target_at(settled / 2, 20, 512) == pytest.approx(math.sqrt(20 * start))
    assert st.l0_target_at(settled, 20, 512) == st.l0_target_at(1, 20, 512) == 20
    assert st.l0_target_at(0, 200, 512) == 256  # at most half of all latents
    assert st.l0_target_at(0, 400, 512) == 400  # but not below the target


@pytest.mark.parametrize("target", [2.0, 20.0, 60.0])
def test_lambda_controller_reaches_the_target(target):
    """On standard normal preactivations L0 is known: d_sae * P(pre > threshold)."""
    controller, rng = st.LambdaController(100.0, torch.tensor(0.5)), generator()
    for _ in range(600):
        pre = torch.randn(64, 200, generator=rng)
        controller.update((pre > controller.threshold()).float().sum(1).mean(), target)
    expected = 200 * 0.5 * math.erfc(controller.threshold().item() / math.sqrt(2))
    assert expected == pytest.approx(target, rel=0.06)


def test_lambda_controller_recovers_from_a_target_out_of_reach():
    controller = st.LambdaController(100.0, torch.tensor(0.5))
    for _ in range(500):
        controller.update(torch.tensor(10.0), 50.0)
    assert controller.threshold().item() == pytest.approx(controller.LEAST)
    for _ in range(40):
        controller.update(torch.tensor(100.0), 50.0)
    assert controller.threshold().item() > 10 * controller.LEAST


def test_latents_below_the_mean_density_have_lower_thresholds():
    mean = 2 / 4  # two active of four latents
    density = torch.tensor([0, mean / 9, mean, 1])
    found = st.latent_thresholds(torch.tensor(0.6), density, 2.0)
    assert found.tolist() == pytest.approx([0, 0.2, 0.6, 0.6])


# --- Initial SAE ----------------------------------------------------------------------------------


def test_initial_rows_point_to_different_images():
    z = torch.randn(50, 6, generator=generator()) * torch.tensor([4.0, 1, 1, 1, 1, 0.25])
    rows = st.initial_rows(TrainingRows.of(z), 20, generator(1))
    x = PCACoordinates.fit(z).transform(z)
    cosine = rows @ F.normalize(x / x.std(0).sqrt(), dim=1).T
    torch.testing.assert_close(cosine.amax(1), torch.ones(20))
    assert len(set(cosine.argmax(1).tolist())) == 20


def test_initial_rows_with_more_latents_than_images_and_a_constant_unit():
    z = torch.randn(5, 4, generator=generator())
    z[:, 2] = 0
    rows = st.initial_rows(TrainingRows.of(z), 12, generator())
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(12))
    assert len(torch.unique(rows, dim=0)) == 12


@pytest.mark.parametrize(("start_l0", "scale"), [(2, 1.0), (8, 1.0), (30, 1.0), (8, 5.0)])
@torch.no_grad()
def test_initial_sae_has_the_density_asked_for_and_the_best_gain(start_l0, scale):
    x = scale * torch.randn(2000, 16, generator=generator())
    rows = F.normalize(torch.randn(64, 16, generator=generator(1)), dim=1)
    sae = st.initial_sae(rows, x, start_l0)
    density = (sae.encode(x) > 0).float().mean(0)
    torch.testing.assert_close(density, torch.full((64,), start_l0 / 64), atol=2e-3, rtol=0)
    assert sae.threshold.unique().numel() == 1
    best = st.reconstruction_loss(sae(x), x)
    assert best < 0.9 * scale**2
    for factor in (0.9, 1.1):
        other = st.initial_sae(rows, x, start_l0)
        for value in (other.W_enc, other.b_enc, other.threshold):
            value.mul_(factor)
        assert st.reconstruction_loss(other(x), x) > best


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2, 6])
def test_training_reaches_the_target_and_reconstructs(target):
    z = synthetic_z()
    sae, history = st.train_sae(z, head, target, Settings(target_actives=(target,), **TOY))
    assert mean_l0(sae, z) == pytest.approx(target, rel=0.05)
    late = history[-10:]
    assert np.mean([row["l0"] for row in late]) == pytest.approx(target, rel=0.08)
    fvu = ((z - sae(z)).square().sum() / (z - z.mean(0)).square().sum()).item()
    assert fvu < {2: 0.35, 6: 0.1}[target]
    assert np.mean([row["loss"] for row in late]) == pytest.approx(fvu, rel=0.15)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_a_frozen_decoder_keeps_its_initial_rows():
    z, settings = synthetic_z(), Settings(target_actives=(6,), **TOY)
    sae, _ = st.train_sae(z, head, 6, settings, freeze_decoder=True)
    assert torch.equal(sae.W_dec, st.starting_rows(z, 64, settings.seed))
    assert mean_l0(sae, z) == pytest.approx(6, rel=0.05)
    fvu = ((z - sae(z)).square().sum() / (z - z.mean(0)).square().sum()).item()
    assert 0.1 < fvu < 0.3  # a trained decoder reaches less than 0.1


def test_same_seed_same_bytes_and_no_side_effects():
    z, settings = synthetic_z(1000), Settings(target_actives=(5,), **TOY)
    given, state = z.clone(), torch.get_rng_state()
    first, history = st.train_sae(z, head, 5, settings)
    torch.randn(7)  # torch's own generator is not used
    second, _ = st.train_sae(z, head, 5, settings)
    other, _ = st.train_sae(z, head, 5, Settings(target_actives=(5,), seed=1, **TOY))
    for name, value in first.state_dict().items():
        assert value.numpy().tobytes() == second.state_dict()[name].numpy().tobytes(), name
        assert not torch.equal(value, other.state_dict()[name]), name
    torch.set_rng_state(state)
    assert torch.equal(z, given)
    assert history[-1].keys() == {"step", "loss", "l0", "lambda", "dead"}
    assert [row["step"] for row in history] == sorted({row["step"] for row in history})
    assert not any(weight.requires_grad for weight in first.parameters())


def test_a_step_is_adam_on_the_losses(monkeypatch):
    """The first step of training against torch's own Adam."""
    z, settings = synthetic_z(400), Settings(target_actives=(5,), **TOY)
    steps = []

    class RecordingAdam(Adam):
        def step(self, gradients, lr):
            before = [w.detach().clone() for w in self.weights]
            super().step(gradients, lr)
            after = [w.detach().clone() for w in self.weights]
            steps.append((before, [g.clone() for g in gradients], lr, after))

    monkeypatch.setattr(st, "Adam", RecordingAdam)
    st.train_sae(z, head, 5, settings)
    before, gradients, lr, after = steps[0]
    reference = torch.optim.Adam(before, lr=lr, betas=(Adam.BETA1, Adam.BETA2))
    for weight, gradient in zip(before, gradients, strict=True):
        weight.grad = gradient
    reference.step()
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected)


def test_starting_rows_are_those_of_training(monkeypatch):
    z, seen = synthetic_z(500), {}
    usual = st.initial_sae

    def recording(rows: torch.Tensor, *given: object) -> JumpReLUSAE:
        seen["rows"] = rows
        return usual(rows, *given)

    monkeypatch.setattr(st, "initial_sae", recording)
    st.train_sae(z, head, 5, Settings(target_actives=(5,), seed=3, **TOY))
    expected = seen["rows"] @ PCACoordinates.fit(z).components.T
    assert torch.equal(st.starting_rows(z, 64, seed=3), expected)


# --- Rows and several SAEs ------------------------------------------------------------------------


def test_saes_trained_together_are_those_trained_alone():
    """One read of the rows, three targets: bit for bit the same, whatever the others do."""
    z = synthetic_z(1000)
    settings = Settings(target_actives=(5,), **TOY)
    rows = TrainingRows.of(z, head)
    together = st.train_together([st.SAETrainer(rows, target, settings) for target in (2, 5, 9)])
    for target, (sae, history) in zip((2, 5, 9), together, strict=True):
        alone, its_history = st.train_sae(z, head, target, settings)
        assert history == its_history
        for name, value in alone.state_dict().items():
            assert torch.equal(sae.state_dict()[name], value), name


def test_saes_of_other_seeds_start_elsewhere_and_share_the_batches():
    rows = TrainingRows.of(synthetic_z(1000))
    trainers = [
        st.SAETrainer(rows, 5, Settings(target_actives=(5,), seed=seed, **TOY)) for seed in (0, 1)
    ]
    assert not torch.equal(trainers[0].sae.W_dec, trainers[1].sae.W_dec)
    seen = [[], []]
    for number, trainer in enumerate(trainers):
        usual = trainer.step
        trainer.step = lambda step, batch, n=number, f=usual: (
            seen[n].append(batch.x),
            f(step, batch),
        )
    (sae, _), (other, _) = st.train_together(trainers)
    assert all(a is b for a, b in zip(*seen, strict=True))
    assert mean_l0(sae, synthetic_z(1000)) == pytest.approx(5, rel=0.1)
    assert mean_l0(other, synthetic_z(1000)) == pytest.approx(5, rel=0.1)


def test_saes_that_cannot_share_batches_are_not_trained_together():
    rows = TrainingRows.of(synthetic_z(1000))
    longer = {**TOY, "epochs_sae_final": 2}
    trainers = [
        st.SAETrainer(rows, 5, Settings(target_actives=(5,), **toy)) for toy in (TOY, longer)
    ]
    with pytest.raises(ValueError, match="the same rows, batch_sae and epochs"):
        st.train_together(trainers)


def positions_of(z: torch.Tensor, p: int = 4) -> torch.Tensor:
    """raw (N, p, d_in), p rows of z an image, at another scale."""
    scale = torch.linspace(0.5, 3, z.shape[1])
    return (z * scale + 2).reshape(-1, p, z.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_are_rows_and_a_step_takes_those_of_a_batch_of_images(dtype):
    z, settings = synthetic_z(8000), Settings(target_actives=(5,), **TOY)
    raw = positions_of(z).to(dtype)
    mu, std = raw.float().mean((0, 1)), raw.float().flatten(0, 1).std(0)
    rows = TrainingRows(raw, mu, std)
    assert (len(rows), rows.n_images, rows.positions, rows.d_in) == (8000, 2000, 4, 16)
    standardized = (raw.float().flatten(0, 1) - mu) / std
    torch.testing.assert_close(torch.cat([*rows.split(999)]), standardized)
    torch.testing.assert_close(mean_and_std(raw), (mu, std))

    index = next(rows.batches(100, 1, generator(3)))
    batch = rows.batch(index)
    of_images = standardized.reshape(2000, 4, 16)[index].flatten(0, 1)
    torch.testing.assert_close(batch.x, rows.coordinates.transform(of_images))
    assert batch.share == 1
    numbers = torch.tensor([7, 7999, 12])
    torch.testing.assert_close(
        rows.x_of(numbers), rows.coordinates.transform(standardized[numbers])
    )
    # Images from the first to the last, 0, 500, 1000, 1499 and 1999, and their positions in turn
    of_sample = standardized[torch.tensor([0, 2001, 4002, 5999, 7996])]
    torch.testing.assert_close(rows.sample(5), rows.coordinates.transform(of_sample))
    torch.testing.assert_close(rows.x_std, rows.coordinates.transform(standardized).std(0))

    trainer = st.SAETrainer(rows, 5, settings)
    assert trainer.steps == 24 * 20  # as many as of 2,000 images, of 400 rows each
    ((sae, history),) = st.train_together([trainer])
    assert mean_l0(sae, rows) == pytest.approx(5, rel=0.05)
    fvu = ((standardized - sae(standardized)).square().sum() / standardized.square().sum()).item()
    assert fvu < 0.13
    assert np.mean([row["loss"] for row in history[-10:]]) == pytest.approx(fvu, rel=0.15)
    adjusted, _ = adjust_thresholds(sae, rows, 3)
    assert int((adjusted.encode(standardized) > 0).sum()) == 3 * 8000


@pytest.mark.parametrize("order", ["random", "by class", "by class, twice"])
def test_of_vectors_grouped_by_class_all_classes_are_sampled(order):
    labels = torch.arange(600) // 100
    if order != "by class":
        labels = labels[torch.randperm(600, generator=generator(1))]
    if order == "by class, twice":
        labels = torch.cat([part.sort().values for part in labels.split(300)])
    raw = torch.eye(6)[labels]
    split = fa.Activations(labels, labels, raw)
    splits = {"train": split, "val": split}
    layer = fa.ExplainedLayer(None, None, torch.zeros(6), torch.ones(6), splits)
    rows = training_rows(layer).train
    found = rows.coordinates.inverse_transform(rows.sample(60)).argmax(1)
    if order.startswith("by class"):
        assert (found.bincount() - 10).abs().max() <= 2
    else:
        assert torch.equal(found, labels[:60])


@pytest.mark.parametrize(("n", "size"), [(1000, 100), (1037, 100), (30, 100)])
def test_spread_batches_pass_over_the_images_and_take_as_many_of_each_part(n, size):
    drawn = torch.stack([*spread_batches(n, size, 3, generator(1))])
    b = min(size, n)
    assert drawn.shape == (st.n_steps(n, size, 3), b)
    passes = drawn.reshape(3, -1)
    for images in passes:
        assert len(set(images.tolist())) == n // b * b
        assert 0 <= images.min() <= images.max() < n
    assert not torch.equal(passes[0], passes[1])
    for world in (2, 3):
        for part in (slice(n * r // world, n * (r + 1) // world) for r in range(world)):
            share = ((drawn >= part.start) & (drawn < part.stop)).sum(1)
            assert (share - b / world).abs().max() <= 2
    gaps = (drawn[1:] - drawn[:-1]) % n  # within a part, from one batch to the next
    assert n < size or len(gaps[: n // b - 1].unique()) > 5  # shuffled


def test_coordinates_of_rows_are_those_of_all_of_them(monkeypatch):
    """Sums over pieces against one product, about a mean far from 0."""
    monkeypatch.setattr(rows_module, "MOMENT_ROWS", 300)
    z = synthetic_z(4000) + 50
    found = TrainingRows(z.reshape(1000, 4, 16)).coordinates
    expected = PCACoordinates.fit(z.double())
    torch.testing.assert_close(found.mean.double(), expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.scale.double(), expected.scale, rtol=1e-5, atol=0)
    alike = (found.components.double() * expected.components).sum(0).abs()
    torch.testing.assert_close(alike, torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-4)


def test_logits_of_many_rows_are_computed_batch_by_batch(monkeypatch):
    """x and logits beyond PRECOMPUTED numbers are not kept: the same SAE within rounding."""
    z, settings = synthetic_z(1000), Settings(target_actives=(5,), **TOY)
    settings = st.replace(settings, lr_sae=1e-3, batch_sae=1000, head_kl=20.0)
    kept, _ = st.train_sae(z, head, 5, settings)
    monkeypatch.setattr(rows_module, "PRECOMPUTED", 100)
    found, _ = st.train_sae(z, head, 5, settings)
    without, _ = st.train_sae(z, None, 5, settings)
    difference, from_logits = (sae.W_dec - kept.W_dec for sae in (found, without))
    assert difference.abs().max() < from_logits.abs().max() / 10


def test_divergence_names_the_flag():
    settings = Settings(target_actives=(5,), lr_sae=1e38, **TOY)
    with pytest.raises(TrainingError, match=r"SAE training for 5 actives diverged.*--lr-sae"):
        st.train_sae(synthetic_z(1000), head, 5, settings)


def test_check_loss_finite_names_the_first_bad_step():
    losses = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    with pytest.raises(TrainingError, match=r"x diverged: .* step 2; lower --lr-x \(now 3\)"):
        st.check_loss_finite(losses, 3, "x", "--lr-x", 3)
    st.check_loss_finite(losses, 2, "x", "--lr-x", 3)  # checked every CHECK_EVERY steps only
    st.check_loss_finite(losses[:2], 1, "x", "--lr-x", 3)


def test_check_weights_finite():
    sae = random_sae()
    st.check_weights_finite(sae, "x", "--lr-x", 3)
    sae.threshold[2] = float("nan")
    with pytest.raises(TrainingError, match=r"weights are not finite.*lower --lr-x"):
        st.check_weights_finite(sae, "x", "--lr-x", 3)


# --- Calibration of the thresholds ----------------------------------------------------------------


def n_active(sae: JumpReLUSAE, z: torch.Tensor) -> int:
    return int((sae.encode(z) > 0).sum())


@pytest.mark.parametrize("target", [0.5, 1, 3, 4.2])
def test_adjusted_thresholds_give_exactly_the_target(target):
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    adjusted, shift = adjust_thresholds(sae, z, target)
    assert n_active(adjusted, z) == round(target * 1000)
    assert mean_l0(adjusted, z) == round(target * 1000) / 1000
    torch.testing.assert_close(adjusted.threshold, (sae.threshold + shift).clamp(min=0))
    for name, value in weights.items():
        assert torch.equal(sae.state_dict()[name], value), f"{name} of the original changed"
        if name != "threshold":
            assert torch.equal(adjusted.state_dict()[name], value), name


@pytest.mark.parametrize("digits", [1, 6])  # with one digit most excesses tie
@torch.no_grad()
def test_the_shift_is_that_of_a_sort(digits, monkeypatch):
    monkeypatch.setattr(fidelity, "EVAL_ROWS", 77)  # many pieces
    monkeypatch.setattr(calibration, "KEPT_AT_LEAST", 10)  # of which most excesses are dropped
    z = (10**digits * torch.randn(1000, 6, generator=generator(1))).round() / 10**digits
    sae = random_sae()
    sae.W_enc.mul_(10**digits).round_().div_(10**digits)
    pre = torch.cat([sae.pre_activations(chunk) for chunk in z.split(77)])
    excess = np.sort((pre - sae.threshold)[pre > 0].numpy())[::-1].astype(np.float64)
    for target in (0.001, 0.5, 2, 3.3):
        wanted = round(target * 1000)
        expected = (excess[wanted - 1] + excess[wanted]) / 2
        assert threshold_shift(sae, z, target) == expected


def test_of_too_many_positions_an_even_sample_of_all_places_decides(monkeypatch):
    """8 rows are too many for 3: a step of 3 would do, but of 3 positions it takes only the first,
    and so would one of 6 of the others."""
    sae = JumpReLUSAE(1, 1)
    sae.W_enc.data.fill_(1)
    monkeypatch.setattr(calibration, "CALIBRATED_ROWS", 10)
    raw = torch.arange(1.0, 31).reshape(10, 3, 1)
    taken = [1, 5, 9, 13, 17, 21, 25, 29]  # every fourth
    rows = TrainingRows(raw)
    assert calibration.row_step(rows) == 4
    adjusted, shift = adjust_thresholds(sae, rows, 0.25)  # 2 of them
    assert shift == 23
    assert int((adjusted.encode(torch.tensor(taken)[:, None].float()) > 0).sum()) == 2
    monkeypatch.setattr(calibration, "CALIBRATED_ROWS", 30)
    assert threshold_shift(sae, rows, 0.25) == 22.5  # 8 of 30


def test_tied_excesses_are_left_inactive():
    sae = JumpReLUSAE(1, 1)
    sae.W_enc.data.fill_(1)
    z = torch.tensor([[3.0], [2.0], [2.0], [1.0]])
    adjusted, shift = adjust_thresholds(sae, z, 0.5)  # 2 of 4 images
    assert shift == 2
    assert n_active(adjusted, z) == 1


def test_with_too_few_positive_preactivations_every_threshold_becomes_0():
    sae, z = random_sae(), torch.randn(100, 6, generator=generator(1))
    positive = int((sae.pre_activations(z) > 0).sum())
    adjusted, shift = adjust_thresholds(sae, z, (positive + 1) / 100)
    assert shift == -math.inf
    assert torch.equal(adjusted.threshold, torch.zeros(9))
    assert n_active(adjusted, z) == positive


def test_thresholds_do_not_fall_below_0():
    sae, z = random_sae(), torch.randn(1000, 6, generator=generator(1))
    positive = int((sae.pre_activations(z) > 0).sum())
    adjusted, shift = adjust_thresholds(sae, z, (positive - 5) / 1000)
    assert shift < -sae.threshold.min()
    assert adjusted.threshold.min() == 0
    assert n_active(adjusted, z) == positive - 5
