"""Layers with positions, of the kinds of networks that people have: recognized, read, replaced."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_networks import MARK, MLP, SIDE, LastChannels, ResNet, ViT, marked_images, trained
from torch import Tensor, nn

import feature_analysis as fa
from saexplain import where
from saexplain.activity import collect_activity, removal_effects
from saexplain.counterfactuals import minimal_flip_sets
from saexplain.layers import AtLayer
from saexplain.positions import find_layout, sampled_positions
from saexplain.sae import JumpReLUSAE, TopKSAE

MAKERS = {
    "resnet": ResNet,
    "vit": ViT,
    "vit_mean": lambda: ViT(class_token=False),
    "last": LastChannels,
    "mlp": MLP,
}
X, Y, PLACE = marked_images(300, 1)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {kind: trained(make, 60) for kind, make in MAKERS.items()}


LAYERS = [  # network, layer, positions, whether something goes around it, pool
    ("resnet", "layer1", fa.Positions((8, 8)), False, None),
    ("resnet", "layer2", fa.Positions((4, 4)), False, None),
    ("resnet", "layer2.bn2", fa.Positions((4, 4)), True, None),  # a residual branch
    ("resnet", "halves", fa.Positions((1, 2)), False, None),
    ("resnet", "wide", None, False, None),  # penultimate
    ("vit", "blocks.0", fa.Positions((4, 4), 1), False, None),
    ("vit", "blocks.1.attn", fa.Positions((4, 4), 1), True, None),
    ("vit", "blocks.1.mlp", fa.Positions((4, 4), 1), True, None),
    ("vit", "norm", fa.Positions((4, 4), 1), False, None),
    ("vit_mean", "blocks.1", fa.Positions((4, 4)), False, None),
    ("vit_mean", "norm", None, False, "mean"),
    ("last", "norm", fa.Positions((4, 4)), False, None),
    ("last", "mix", fa.Positions((4, 4)), False, None),
    ("mlp", "1", None, False, None),
]


def by_hand(net: nn.Module, name: str, images: Tensor, change=None) -> tuple[Tensor, Tensor]:
    """The layer's output, and the network's logits with change(output) in its place."""
    seen = []

    def hook(_module, _given, output):
        seen.append(output)
        return change(output) if change else output

    handle = dict(net.named_modules())[name].register_forward_hook(hook)
    logits = net(images)
    handle.remove()
    return seen[0], logits


def random_layer(net, name: str, pool=None, d_sae: int = 20) -> fa.ExplainedLayer:
    """The layer with a random SAE, of which a tenth of the features is active on a row."""
    at = AtLayer(net, name, pool, X[:8])
    values = fa.values_of(at.preactivations(X)).flatten(0, -2)
    mu, std = values.mean(0), values.std(0) + 0.1
    generator = torch.Generator().manual_seed(3)
    sae = JumpReLUSAE(len(mu), d_sae)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
        pre = sae.pre_activations((values - mu) / std)
        sae.threshold.copy_(pre.quantile(0.9, 0).clamp(min=0))
    return fa.ExplainedLayer(at, sae.requires_grad_(False), mu, std)


def close(a: Tensor, b: Tensor, off: float = 2e-4) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), atol=off, rtol=off)


@pytest.mark.parametrize(("kind", "name", "positions", "is_branch", "pool"), LAYERS)
def test_a_layer_is_recognized_and_put_in_again(networks, kind, name, positions, is_branch, pool):
    net = networks[kind]
    at = AtLayer(net, name, pool, X[:8])
    assert (at.positions, at.is_branch) == (positions, is_branch)
    output, logits = by_hand(net, name, X[:40])
    raw = at.preactivations(X[:40])
    close(at.logits_from_preactivations(raw), logits)
    if positions is None:
        return
    rows = fa.values_of(raw)
    assert rows.shape[:2] == (40, positions.n)
    grid = where.grid_maps(rows.mT, positions)  # (40, d_in, h, w)
    if kind == "resnet":
        close(grid, output)
    elif kind == "last":
        close(grid, output.permute(0, 3, 1, 2))
    else:
        close(rows, output)


@pytest.mark.parametrize(("kind", "name", "positions", "is_branch", "pool"), LAYERS)
def test_removing_a_feature_against_a_slow_loop(networks, kind, name, positions, is_branch, pool):
    net, k = networks[kind], 7
    layer = random_layer(net, name, pool)
    sae, raw = layer.sae, layer.raw(X[:40])
    values = fa.values_of(raw)
    rows = values if positions else values[:, None]
    expected = torch.zeros(*rows.shape[:2], layer.d_sae)
    for i, own in enumerate(rows):  # (P, d_in)
        for p, row in enumerate(own):
            pre = (row - layer.mu) / layer.std @ sae.W_enc + sae.b_enc
            expected[i, p] = torch.where(pre > sae.threshold, pre, 0.0)
    close(layer.acts_at(raw), expected)
    acts, position = layer.peaks(raw)
    close(acts, expected.amax(1))
    for i, j in (acts > 0).nonzero():
        assert expected[i, position[i, j], j] >= expected[i, :, j].amax() - 1e-4
    assert (acts[:, k] > 0).any()

    layout = layer.model.layout
    removed = rows - expected[:, :, k, None] * (sae.W_dec[k] * layer.std)
    changed = layout.to_output(removed if positions else removed[:, 0])
    _, logits = by_hand(net, name, X[:40], lambda _output: changed)
    close(layer.logits(layer.without(raw, k)), logits)
    each = torch.arange(40) % layer.d_sae  # another feature of each image
    own = layer.acts_of(raw, each)
    close(own if positions else own[:, None], expected[torch.arange(40), :, each])
    close(fa.values_of(layer.adding(layer.without(raw, each), each, own)), values)
    one = layer.acts_of(raw[3:4], 5)
    close(one if positions else one[:, None], expected[3:4, :, 5])


def test_an_sae_that_must_see_all_features_is_read_at_each_position(networks):
    layer = random_layer(networks["resnet"], "layer2")
    top_k = TopKSAE(*layer.sae.W_enc.shape, k=2)
    top_k.load_state_dict(layer.sae.state_dict())
    layer = layer.with_sae(top_k.requires_grad_(False))
    raw = layer.raw(X[:9])
    acts = layer.acts_at(raw)
    assert (acts > 0).sum(2).amax() <= 2
    close(layer.acts_of(raw, 4), acts[:, :, 4])
    each = torch.arange(9)
    close(layer.acts_of(raw, each), acts[each, :, each])


def test_the_index_of_branch_rows_leads_to_their_images(networks):
    layer = random_layer(networks["vit"], "blocks.1.mlp")
    raw = layer.raw(X)
    some = torch.tensor([5, 2, 2, 77])
    picked = raw[some][torch.tensor([3, 0])]
    assert torch.equal(picked.images, X[[77, 5]])
    close(layer.logits(picked), networks["vit"](X[[77, 5]]))
    assert [len(part) for part in raw.split(128)] == [128, 128, 44]
    close(torch.cat([layer.logits(part) for part in raw.split(128)]), networks["vit"](X))


@pytest.mark.parametrize("name", ["layer2", "layer2.bn2"])
def test_removals_use_some_images_and_scale_by_rate(networks, name, monkeypatch):
    monkeypatch.setattr("saexplain.activity.REMOVED_FROM", 10)
    layer = random_layer(networks["resnet"], name)
    raw = layer.raw(X)
    activity = collect_activity(layer, raw, Y)
    found = removal_effects(layer, raw, activity)
    k = int(activity.n_active.argmax())
    at = activity.of(k)[0]
    some = at[(torch.arange(10) * len(at) / 10).long()]
    delta = layer.logits(layer.without(raw[some], k)) - layer.logits(raw[some])
    assert found.n_images[k] == 10
    close(found.mean_delta[k].float(), delta.mean(0))
    centered = delta - delta.mean(1, keepdim=True)
    assert float(found.size[k]) == pytest.approx(float(centered.norm(dim=1).mean()) * len(at), 1e-3)


@pytest.mark.parametrize("name", ["layer2", "layer2.bn2"])
def test_a_flip_set_flips_and_needs_each_of_its_features(networks, name):
    layer = random_layer(networks["resnet"], name)
    raw = layer.raw(X[:60])
    goal = (layer.logits(raw).argmax(1) + 1) % 4
    sets = minimal_flip_sets(layer, raw, goal, most=6)
    assert sets.off.any(1).sum() > 5
    for i in sets.off.any(1).nonzero()[:, 0].tolist():
        features = sets.off[i].nonzero()[:, 0].tolist()
        own = raw[torch.tensor([i])]

        def predicted(removed, own=own):
            state = own
            for k in removed:
                state = layer.without(state, k, layer.acts_of(own, k))
            return int(layer.logits(state).argmax())

        assert predicted(features) == goal[i]
        for spared in features:
            assert predicted([k for k in features if k != spared]) != goal[i]


# --- What models return, and how they are wrapped -------------------------------------------------


class Returning(nn.Module):
    """A network that returns its logits in some form."""

    def __init__(self, net: nn.Module, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x):
        return self.form(self.net(x))


FORMS = {
    "tuple": lambda logits: (logits, None),
    "nested": lambda logits: {"loss": None, "out": [logits]},
    "dict": lambda logits: {"hidden": logits[:, :3] * 0, "logits": logits},
    "attribute": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_what_a_model_returns(networks, form):
    net = networks["resnet"]
    at = AtLayer(Returning(net, FORMS[form]), "net.layer2", images=X[:8])
    close(at.logits_from_preactivations(at.preactivations(X)), net(X))
    assert at.n_classes == 4


def test_a_single_logit_becomes_two_classes(networks):
    net = networks["resnet"]
    for form in (lambda logits: logits[:, 2:3], lambda logits: logits[:, 2]):
        at = AtLayer(Returning(net, form), "net.layer2", images=X[:8])
        found = at.logits_from_preactivations(at.preactivations(X))
        close(found, torch.stack([torch.zeros(len(X)), net(X)[:, 2]], 1))


class Tuples(nn.Module):
    """A layer whose output is a tuple, as those of transformers are."""

    def forward(self, x):
        return x * 2, {"weights": None}


def test_a_layer_may_give_a_tuple():
    net = nn.Sequential(nn.Conv2d(3, 5, 4, 4), Tuples(), Unpacked(), nn.Flatten(), nn.Linear(80, 3))
    at = AtLayer(net, "1", images=X[:8])
    raw = at.preactivations(X)
    close(raw, 2 * net[0](X).flatten(2).mT)
    close(at.logits_from_preactivations(raw + 1), net[4](net[3](2 * net[0](X) + 1)))


class Unpacked(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_wrapped_and_compiled_networks_keep_their_names(networks):
    net = networks["resnet"]
    raw = AtLayer(net, "layer2", images=X[:8]).preactivations(X[:20])
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        names = [name for name, _ in wrapped.named_modules() if name.endswith("layer2")]
        for name in ("layer2", *names):
            at = AtLayer(wrapped, name, images=X[:8])
            assert torch.equal(at.preactivations(X[:20]), raw)
            assert at.title == "layer layer2 of ResNet"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision(networks, dtype):
    net = trained(ViT, 20).to(dtype)
    at = AtLayer(net, "blocks.0", images=X[:8])
    raw = at.preactivations(X[:20])
    assert raw.dtype == torch.float32
    close(at.logits_from_preactivations(raw), net(X[:20].to(dtype)).float(), 2e-2)


def test_two_and_a_thousand_classes():
    for n in (2, 1000):
        at = AtLayer(ResNet(n).eval(), "layer2", images=X[:8])
        assert at.n_classes == n
        assert at.logits_from_preactivations(at.preactivations(X[:3])).shape == (3, n)


class RandomDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x)


def test_dropout_that_is_always_on_is_named(networks):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 9), RandomDropout(), nn.Linear(9, 3))
    with pytest.raises(ValueError, match=r"must be deterministic.*ignores self\.training"):
        AtLayer(net, "1", images=X[:8])


# --- Layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "image", "module", "given", "words"),
    [
        ((7,), (8, 8), nn.Linear(1, 1), {}, "a vector"),
        ((5, 4, 4), (8, 8), nn.Conv2d(1, 1, 1), {}, "a map (5, 4, 4): 4 x 4 positions"),
        ((4, 4, 5), (8, 8), nn.Linear(1, 1), {}, "a map, channels last (4, 4, 5): 4 x 4 positions"),
        ((4, 4, 4), (8, 8), nn.Conv2d(1, 1, 1), {}, "a map (4, 4, 4): 4 x 4 positions"),
        ((4, 4, 4), (8, 8), nn.LayerNorm(4), {}, "a map, channels last (4, 4, 4): 4 x 4 positions"),
        ((4, 8, 8), (8, 16), nn.ReLU(), {}, "a map, channels last (4, 8, 8): 4 x 8 positions"),
        ((5, 1, 1), (8, 8), nn.ReLU(), {}, "a vector"),
        ((16, 5), (8, 8), nn.ReLU(), {}, "tokens (16, 5): 4 x 4 positions"),
        ((17, 5), (8, 8), nn.ReLU(), {}, "tokens (17, 5): 4 x 4 positions after 1 prefix token"),
        ((13, 5), (4, 12), nn.ReLU(), {}, "tokens (13, 5): 2 x 6 positions after 1 prefix token"),
        ((201, 5), (224, 224), nn.ReLU(), {}, "14 x 14 positions after 5 prefix tokens"),
        ((20, 5), (8, 8), nn.ReLU(), {"grid": (4, 4)}, "4 x 4 positions after 4 prefix tokens"),
        ((20, 5), (8, 8), nn.ReLU(), {"prefix_tokens": 4}, "4 x 4 positions after 4 prefix"),
        ((5, 4, 4), (8, 8), nn.ReLU(), {"layout": "channels_last"}, "last (5, 4, 4): 5 x 4"),
        ((5, 4, 4), (8, 8), nn.ReLU(), {"layout": "vector"}, "a vector"),
    ],
)
def test_layouts(shape, image, module, given, words):
    output = torch.randn(2, *shape)
    layout = find_layout(output, (2, 3, *image), module, **given)
    assert words in layout.in_words()
    rows = layout.to_rows(output)
    assert torch.equal(layout.to_output(rows), output)
    if layout.kind == "tokens":
        assert torch.equal(rows, output)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": (5, 5)}, r"20 tokens cannot be -5 prefix tokens and a grid \(5, 5\)"),
        ({"prefix_tokens": 3}, "20 tokens for images of 8 x 9 pixels have no grid"),
        ({"prefix_tokens": 20}, "at least 0 and leave tokens for a grid, got 20 of 20"),
        ({"prefix_tokens": -5}, "at least 0 and leave tokens for a grid, got -5 of 20"),
        ({"layout": "rows"}, "layout must be one of .*, got 'rows'"),
        ({"layout": "channels_last"}, r"layout='channels_last' needs \(B, ...\) of 4 dimensions"),
    ],
)
def test_layouts_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        find_layout(torch.zeros(2, 20, 5), (2, 3, 8, 9), nn.ReLU(), **given)


def whole_of_two(n: int) -> Tensor:
    """Two positions of each image, without regard to prefix tokens."""
    return sampled_positions(0, n, 49, 2)


def test_sampled_positions_do_not_depend_on_the_batches():
    whole = sampled_positions(0, 500, 49, 8)
    parts = [sampled_positions(n, 100, 49, 8) for n in range(0, 500, 100)]
    assert torch.equal(whole, torch.cat(parts))
    assert all(len(row.unique()) == 8 for row in whole)
    counts = torch.bincount(whole.flatten(), minlength=49)
    assert counts.min() > 40  # 500 x 8 / 49 = 82 expected, and a deviation of 8
    assert counts.max() < 125
    assert torch.equal(sampled_positions(3, 2, 4, 8), torch.arange(4).expand(2, 4))
    with_token = sampled_positions(0, 500, 49, 8, n_prefix=2)
    assert torch.equal(with_token[:, :2], torch.arange(2).expand(500, 2))
    assert torch.bincount(with_token.flatten(), minlength=49)[2:].min() > 30
    assert torch.equal(sampled_positions(0, 500, 49, 2, n_prefix=2), whole_of_two(500))


# --- Where ----------------------------------------------------------------------------------------


def marked_layer(net: nn.Module, name: str) -> fa.ExplainedLayer:
    """The layer with an SAE of four features: the directions to positions with the mark of each
    class, from the mean of all."""
    at = AtLayer(net, name, images=X[:8])
    values, (h, w) = at.preactivations(X), at.positions.grid
    row, column = ((PLACE + MARK / 2) / SIDE * torch.tensor([h, w])).int().unbind(1)
    marked = at.positions.n_prefix + row * w + column
    mu, std = values.flatten(0, 1).mean(0), values.flatten(0, 1).std(0) + 1e-3
    z = (values - mu) / std
    own = z[torch.arange(len(X)), marked]
    directions = torch.stack([own[Y == c].mean(0) for c in range(4)])
    sae = JumpReLUSAE(len(mu), 4).requires_grad_(False)
    sae.W_enc.copy_(directions.T)
    sae.W_dec.copy_(nn.functional.normalize(directions, dim=1))
    sae.threshold.copy_(directions.square().sum(1) / 2)  # half of what its own mark gives
    return fa.ExplainedLayer(at, sae, mu, std)


@pytest.mark.parametrize(
    ("kind", "name", "near"),  # pixels: a patch sees itself, the block 4 pixels around as well
    [("last", "norm", MARK / 2), ("resnet", "layer1", MARK)],
)
def test_the_peak_of_a_map_is_at_the_planted_mark(networks, kind, name, near):
    layer = marked_layer(networks[kind], name)
    split = layer.activations(X, Y)
    bank = fa.feature_bank(layer, split.raw, Y, topk=20)
    activity = collect_activity(layer, split.raw, Y)
    maps = where.activation_maps(layer, split, bank, activity)
    acts = layer.acts_at(split.raw)
    hits = []
    for k in range(layer.d_sae):
        top = bank.top.of(k).index
        assert (Y[top] // 2 == k // 2).all()  # a mark of its color
        found = maps.top[k, : len(top)].flatten(1).argmax(1)
        center = where.center_of(found, fa.Positions(maps.grid), SIDE, SIDE)
        off = (center - PLACE[top] - MARK / 2).abs().amax(1)
        hits += (off <= near).tolist()
        close(maps.mean[k], acts[:, :, k].mean(0).view(maps.grid))
        assert float(maps.position_density[k]) == pytest.approx(
            float((acts[:, :, k] > 0).double().mean())
        )
        for b, band in enumerate(bank.bands(k)):
            expected = acts[band.index][:, :, k].unflatten(1, maps.grid)
            close(maps.bands[k, b, : len(band.index)].float(), expected, 2e-3)
    assert np.mean(hits) >= 0.95
    assert not maps.place_only.any()


def test_a_feature_of_a_place_and_one_of_the_class_token_are_marked():
    """Activations (N, P, 3): one feature at a fixed place, one at the class token, one anywhere."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(50, 5, 3)
    rows[:, 2, 0] = 3 + 0.1 * torch.rand(50, generator=generator)
    rows[:, 0, 1] = torch.rand(50, generator=generator) + 0.1
    rows[torch.arange(50), torch.randint(1, 5, (50,), generator=generator), 2] = 1.0
    model = SimpleNamespace(positions=fa.Positions((2, 2), 1), n_classes=2)
    eye = torch.eye(3)
    sae = JumpReLUSAE(3, 3).requires_grad_(False)
    sae.W_enc.copy_(eye)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(3), torch.ones(3))
    images = torch.rand(50, 3, 8, 8, generator=generator)
    images[:25, :, :4, 4:] = 0.5  # the second position is blank in half of the images
    split = fa.Activations(images, torch.zeros(50).long(), rows)
    activity = collect_activity(layer, rows, split.labels)
    bank = fa.feature_bank(layer, rows, split.labels, topk=50)
    maps = where.activation_maps(layer, split, bank, activity)
    assert maps.place_only.tolist() == [True, False, False]
    assert maps.prefix_share.tolist() == [0, 1, 0]
    assert maps.spread.tolist() == pytest.approx([0, 0, 1], abs=0.02)
    assert float(maps.blank_share[0]) == 0.5
    assert maps.position_density.tolist() == pytest.approx([0.2, 0.2, 0.2])


def test_the_receptive_field_and_the_pattern_of_a_convolution():
    """A map of one 5 x 5 convolution: the pattern is its kernel, in crops of its size."""
    conv = nn.Conv2d(1, 3, 5, 1, 2)
    conv.weight.data.abs_()  # so that no feature peaks beyond the border, where there is nothing
    net = nn.Sequential(conv, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    images = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    at = AtLayer(net.requires_grad_(False), "0", images=images)
    sae = JumpReLUSAE(3, 3).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(3))
    sae.W_dec.copy_(torch.eye(3))
    sae.b_enc.fill_(1.0)
    std = torch.tensor([1.0, 2.0, 4.0])
    layer = fa.ExplainedLayer(at, sae, torch.zeros(3), std)
    split = layer.activations(images, torch.zeros(60).long())
    bank = fa.feature_bank(layer, split.raw, split.labels, topk=8)
    side, patterns, correlation = where.aligned_patterns(layer, split, bank)
    assert side[0] == side[1]
    assert 4 <= side[0] <= 6
    kernel = conv.weight / std[:, None, None, None]
    padded = nn.functional.pad(patterns, (3, 3, 3, 3))
    best = max(
        float((padded[:, :, r : r + 5, c : c + 5] * kernel).sum())
        for r in range(padded.shape[2] - 4)
        for c in range(padded.shape[3] - 4)
    )
    length = float(patterns.norm() * kernel.norm())
    assert best / length > 0.9  # peaks at the border see less than the kernel
    assert correlation.min() > 0.9


def test_partial_cells_of_a_pattern_count_their_own_pixels(monkeypatch):
    """Positions that see every pixel of 15 x 15, in cells of 2 x 2: the last ones are smaller."""
    monkeypatch.setattr(where, "PATTERN_SIDE", 8)
    weight = torch.randn(225, 4, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(
        positions=fa.Positions((1, 2)),
        preactivations=lambda images: (images.flatten(1) @ weight).unflatten(1, (2, 2)),
        logits_from_preactivations=lambda raw: raw.mean(1),
        n_classes=2,
    )
    sae = JumpReLUSAE(2, 2).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2))
    sae.b_enc.fill_(50.0)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(2), torch.ones(2))
    images = torch.rand(30, 1, 15, 15, generator=torch.Generator().manual_seed(1))
    split = layer.activations(images, torch.zeros(30).long())
    bank = fa.feature_bank(layer, split.raw, split.labels, topk=8)
    side, patterns, _ = where.aligned_patterns(layer, split, bank)
    assert (side, patterns.shape) == ((15, 15), (2, 1, 8, 8))
    kernels = weight.T.view(2, 2, 15, 15)  # position, feature
    for k in (0, 1):
        top = bank.top.of(k).index
        at = layer.acts_of(split.raw[top], k).argmax(1)
        padded = nn.functional.pad(kernels[at, k].mean(0), (0, 1, 0, 1))
        close(patterns[k, 0], padded.view(8, 2, 8, 2).sum((1, 3)), 1e-4)


def test_patches_without_contrast_are_found_batch_by_batch(monkeypatch):
    images = torch.rand(40, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    images[::3, :, :10, :10] = 0.5
    sizes, split, pool = [], where.split_of, nn.functional.adaptive_avg_pool2d

    def pooled(gray: Tensor, grid) -> Tensor:
        sizes.append(len(gray))
        return pool(gray, grid)

    monkeypatch.setattr(where, "split_of", lambda images, index: split(images, index, 7))
    monkeypatch.setattr(nn.functional, "adaptive_avg_pool2d", pooled)
    index = torch.arange(40).view(4, 10)
    top = torch.zeros(4, 10, 2, 3)
    top[:3, :, 0, 0], top[3, :, 1, 2] = 1.0, 1.0
    found = where._blank_shares(images, top, SimpleNamespace(top=SimpleNamespace(index=index)))
    assert max(sizes) == 7  # never all images at their full size
    assert found.tolist() == pytest.approx([0.4, 0.3, 0.3, 0.0])


def test_covering_a_place_takes_away_what_is_there(monkeypatch):
    """Units that are the brightness of one patch: only covering that patch lowers them."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(196, 2), nn.ReLU(), nn.Linear(2, 2))
    net.requires_grad_(False)[1].bias.zero_()
    mask = torch.zeros(2, 14, 14)
    mask[0, :2, 12:], mask[1, 8:10, 2:4] = 1.0, 1.0
    net[1].weight.copy_(mask.flatten(1))
    images = torch.rand(30, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    sae = JumpReLUSAE(2, 2).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2))
    layer = fa.ExplainedLayer(AtLayer(net, "1", images=images), sae, torch.zeros(2), torch.ones(2))
    bank = fa.feature_bank(layer, layer.raw(images), torch.zeros(30).long(), topk=5)
    maps = where.occlusion_maps(layer, images, bank, [0, 1])
    assert (maps.kind, maps.grid) == ("occlusion", (7, 7))
    for k, (row, column) in enumerate([(0, 6), (4, 1)]):
        expected = torch.zeros(5, 7, 7)
        for n, image in enumerate(bank.top.index[k]):
            brightness = (mask[k] * images[image, 0]).sum()
            expected[n, row, column] = brightness - 4 * images.mean()
        close(maps.top[k].float(), expected, 2e-3)
    assert where.occlusion_maps(layer, images, bank, [1, 0]).top.equal(maps.top)

    monkeypatch.setattr(where, "COVER_ENTRIES", 49 * 196 * 3)  # time for 3 images
    few = where.occlusion_maps(layer, images, bank, [0, 1])
    covered = torch.isin(bank.top.index, bank.top.index[0, :3])
    assert 3 <= covered.sum() < covered.numel()
    for k in (0, 1):
        assert few.top[k, covered[k]].equal(maps.top[k, covered[k]])
        assert few.top[k, ~covered[k]].isnan().all()
        expected = maps.top[k, covered[k]].float().mean(0)  # of those that there are
        close(few.mean[k].nan_to_num(), expected.nan_to_num())
    assert few.spread.isfinite().all()
