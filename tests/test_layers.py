"""saexplain.layers: a layer of any network is read and replaced, and nothing else changes."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import feature_analysis as fa
from saexplain import activations, images, layers
from saexplain.files import InputError
from saexplain.layers import AtLayer
from saexplain.parallel import ONE_PROCESS


class Branched(nn.Module):
    """Dropout, batch norm, ReLUs in place, and, if asked for, a connection around the layer `wide`,
    or a use of the number of images."""

    def __init__(self, around: bool = False, counts: bool = False):
        super().__init__()
        self.around, self.counts = around, counts
        parts = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*parts)
        self.wide = nn.Linear(4 * 16, 12)
        self.rest = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(12, 3))
        self.shortcut = nn.Linear(3 * 64, 3)

    def forward(self, x):
        n = x.shape[0]
        found = self.wide(self.features(x).flatten(1))
        logits = self.rest(found.view(n, -1) if self.counts else found)
        return logits + self.shortcut(x.flatten(1)) if self.around else logits


def network(**kinds: bool) -> Branched:
    """In training mode, with statistics that are not those of one batch."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Branched(**kinds)
        net(torch.randn(50, 3, 8, 8))
    return net


def some_images(n: int = 30) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(net: Branched, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of `wide` and the logits, in evaluation mode, written out."""
    conv, norm, _ = net.features
    spread = (norm.running_var + norm.eps).sqrt()[:, None, None]
    x = (conv(x) - norm.running_mean[:, None, None]) / spread
    x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    wide, head = x.flatten(1) @ net.wide.weight.T + net.wide.bias, net.rest[2]
    return wide, wide.clamp(min=0) @ head.weight.T + head.bias


def close(a: torch.Tensor, b: torch.Tensor, off: float = 1e-5) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), atol=off, rtol=off)


@pytest.mark.parametrize("counts", [False, True])
def test_a_layer_and_the_rest_of_a_network(counts):
    net, x = network(counts=counts), some_images()
    net.features.eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    wide, logits = by_hand(net, x)
    at = AtLayer(net, "wide")
    raw = at.preactivations(x)
    close(raw, wide)
    before = raw.clone()
    close(at.logits_from_preactivations(raw), logits)
    assert torch.equal(raw, before)  # the ReLU in place worked on a copy
    expected = (wide + 1.5).clamp(min=0) @ net.rest[2].weight.T + net.rest[2].bias
    close(at.logits_from_preactivations(raw + 1.5), expected)
    AtLayer(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "0").preactivations(x).zero_()
    assert torch.equal(x, some_images())  # nor is the output a view of the images
    assert at.preactivations(x[:0]).shape == (0, 12)
    assert at.logits_from_preactivations(raw[:0]).shape == (0, 3)

    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_gradients_are_those_of_the_network():
    net, x = network(), some_images(2)
    at = AtLayer(net, "wide", images=x)
    pixels = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(at.preactivations(pixels)[:, 3].sum(), pixels)
    (expected,) = torch.autograd.grad(by_hand(net, pixels)[0][:, 3].sum(), pixels)
    close(found, expected)
    raw = at.preactivations(x).requires_grad_()
    (slope,) = torch.autograd.grad(at.logits_from_preactivations(raw)[:, 1].sum(), raw)
    assert torch.equal(slope, torch.where(raw > 0, net.rest[2].weight[1].detach(), 0.0))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not at.preactivations(x).requires_grad  # though the weights ask for gradients
    assert not at.logits_from_preactivations(raw.detach()).requires_grad


# --- What the logits depend on --------------------------------------------------------------------


@pytest.mark.parametrize("x", [some_images(), some_images(1), torch.zeros(5, 3, 8, 8)])
def test_a_branch_runs_the_images_themselves(x):
    net = network(around=True)
    at = AtLayer(net, "wide", images=x)
    raw = at.preactivations(x)
    assert at.is_branch
    close(at.logits_from_preactivations(raw), net.eval()(x))
    moved = raw.like(raw.raw + 1.5)
    wide, head = by_hand(net, x)[0], net.rest[2]
    expected = net(x) + ((wide + 1.5).clamp(min=0) - wide.clamp(min=0)) @ head.weight.T
    close(at.logits_from_preactivations(moved), expected)
    close(at.logits_from_preactivations(moved[1:2]), expected[1:2])
    with pytest.raises(ValueError, match="depend on more than layer 'wide'"):
        at.logits_from_preactivations(raw.raw)


def test_a_connection_that_few_images_open_is_found():
    net, x = network(), some_images()
    net.register_forward_hook(lambda _net, given, logits: logits + 5 * (given[0][:, 0, 0, :1] < -7))
    assert not AtLayer(net, "wide", images=x).is_branch  # none of these opens the connection
    x[21, 0] = -9
    assert AtLayer(net, "wide", images=x).is_branch


def test_logits_that_depend_on_the_batch_are_found():
    net = nn.Sequential(nn.Linear(6, 6), nn.Softmax(0), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="depend on the others of its batch"):
        AtLayer(net, "0", images=torch.randn(9, 6))


class Positions(nn.Module):
    """An output (B, C, H, W), (B, H, W, C) or (B, tokens, C) that a head reads in some way."""

    def __init__(self, layout: str, read):
        super().__init__()
        self.layout, self.read = layout, read
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 3), nn.Identity(), nn.Linear(5, 3)

    def forward(self, x):
        found = self.conv(x) if self.layout == "BCHW" else self.conv(x).permute(0, 2, 3, 1)
        found = found.flatten(1, 2) if self.layout == "BTC" else found
        return self.head(self.read(self.norm(found)))


LAYOUTS = {"BCHW": (2, 3), "BHWC": (1, 2), "BTC": (1,)}  # and the dimensions of positions


@pytest.mark.parametrize(("pool", "reduce"), [("mean", torch.mean), ("max", torch.amax)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_rows_or_pooled(layout, pool, reduce):
    net, x = Positions(layout, lambda found: reduce(found, LAYOUTS[layout])), some_images()
    rows = net.conv(x).flatten(2).mT  # (B, 36, 5)
    at = AtLayer(net, "norm", images=x)
    assert at.positions == fa.Positions((6, 6))
    close(at.preactivations(x), rows)
    close(at.logits_from_preactivations(rows), net(x))
    rows[:, 7, 2] += 9
    rows = rows.detach()
    close(at.logits_from_preactivations(rows), net.head(reduce(rows, 1)))
    pooled = AtLayer(net, "norm", pool, x)
    raw = pooled.preactivations(x)
    assert pooled.positions is None
    close(raw, reduce(net.conv(x), (2, 3)))
    close(pooled.logits_from_preactivations(raw), net(x))
    close(pooled.logits_from_preactivations(raw + 1), net.head(raw + 1))


def test_a_position_that_is_read_alone_needs_all():
    net, x = Positions("BTC", lambda tokens: tokens[:, 0]), some_images()
    with pytest.raises(ValueError, match="reads more of layer 'norm' than pool='mean' keeps"):
        AtLayer(net, "norm", "mean", x)
    at = AtLayer(net, "norm", "flatten", x)
    assert at.preactivations(x).shape == (30, 36 * 5)
    close(at.logits_from_preactivations(at.preactivations(x)), net(x))
    wide = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(1440, 3))
    with pytest.raises(ValueError, match=r"pool='flatten' makes 1,440 numbers of \(40, 6, 6\)"):
        AtLayer(wide, "0", "flatten", x)


class Half(nn.Module):
    def forward(self, x):
        return x.bfloat16()


@pytest.mark.parametrize("layer", ["1", "2", "3", None])
def test_a_network_may_have_several_dtypes(layer):
    parts = nn.Linear(8, 12).bfloat16(), nn.ReLU(), nn.Linear(12, 4).bfloat16()
    net, x = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), Half(), *parts), torch.rand(20, 64)
    net.preactivations, net.logits_from_preactivations = net[:4].forward, net[4:].forward
    opened = layers.open_layer(net, layer)
    raw = opened.preactivations(x)
    assert raw.dtype == torch.float32
    close(opened.logits_from_preactivations(raw), net(x).float(), 1e-2)


# --- Networks that cannot be used -----------------------------------------------------------------


def network_that_takes_no_copy() -> nn.Sequential:
    net, kept = nn.Sequential(nn.Linear(6, 3), nn.Identity()), []
    net[0].register_forward_hook(lambda _module, _given, output: kept.append(output))

    def check(_module, given):
        if given[0] is not kept[-1]:
            raise RuntimeError("this is a copy")

    net[1].register_forward_pre_hook(check)
    return net


class Numbers(nn.Module):
    def forward(self, x):
        return {"n": len(x)}


LINEAR = nn.Linear(6, 6)
TWICE = nn.Sequential(LINEAR, nn.ReLU(), LINEAR)
TWICE[1].unused = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("model", "name", "pool", "message"),
    [
        (TWICE, "1.unsued", None, r"no layer '1.unsued'; it has 1.unused, "),
        (TWICE, "", None, "no layer ''"),
        (TWICE, "0", "sum", "pool must be one of mean, max, flatten, got 'sum'"),
        (TWICE, "0", None, "layer '0' runs 2 times"),
        (TWICE, "1.unused", None, "layer '1.unused' does not run"),
        (network_that_takes_no_copy(), "0", None, "does not run .*this is a copy"),
        (nn.Sequential(Half(), Numbers()), "1", None, "layer '1' must give a tensor .* a dict"),
        (nn.Sequential(LINEAR, nn.Unflatten(1, (2, 3))), "0", None, r"gives \(8, 2, 3\)"),
        (nn.Sequential(LINEAR, Numbers()), "0", None, r"must give logits \(B, C\), .* a? ?dict"),
    ],
)
def test_layers_that_cannot_be_used_are_named(model, name, pool, message):
    with pytest.raises(ValueError, match=message):
        AtLayer(model, name, pool, torch.randn(4, 6))


def test_models_that_cannot_be_opened_are_named():
    with pytest.raises(InputError, match=r"must be a torch\.nn\.Module, got a object"):
        layers.open_layer(object(), "wide")
    with torch.inference_mode():
        made = network()
    with pytest.raises(InputError, match=r"made in torch.inference_mode\(\)"):
        layers.open_layer(made, "wide")
    with pytest.raises(ValueError, match="give `images` first"):
        AtLayer(network(), "wide").logits_from_preactivations(torch.zeros(2, 12))


# --- Activations of the splits --------------------------------------------------------------------


def data_of(*parts: torch.Tensor) -> images.Data:
    splits = [images.Split(x, torch.arange(len(x)) % 3) for x in parts]
    return images.Data(*splits, classes=("a", "b", "c"), source="", digest="")


def test_activations_are_standardized_by_training_images():
    net, parts = AtLayer(network(), "wide"), [some_images(n) * (1 + n / 50) for n in (50, 20, 30)]
    with torch.no_grad():
        net.layer.weight[5] = 0  # a unit that never varies
    layer = activations.collect_activations(net, data_of(*parts))
    for found, x in zip(layer.splits.values(), parts, strict=True):
        close(found.raw, by_hand(net.model, x)[0])
    raw = layer.splits["train"].raw
    close(layer.mu, raw.mean(0))
    close(layer.std, torch.where(torch.arange(12) == 5, 1.0, raw.std(0)))
    plain = activations.collect_activations(net, data_of(*parts), normalize=False)
    assert (plain.mu.abs().sum(), plain.std.min(), plain.std.max()) == (0, 1, 1)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_layer_must_vary(value):
    blank = torch.full((40, 3, 8, 8), value)
    faint = blank + 1e-4 * some_images(40)  # hardly varies, but does
    activations.collect_activations(AtLayer(network(), "wide"), data_of(faint, blank, blank))
    with pytest.raises(InputError, match="for all 40 training images"):
        activations.collect_activations(AtLayer(network(), "wide"), data_of(blank, blank, blank))


def test_probabilities_are_no_logits():
    parts = nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3)
    data = data_of(*(some_images(n) for n in (40, 20, 30)))
    with pytest.raises(InputError, match=r"must return logits, .*leave out the softmax"):
        activations.collect_activations(AtLayer(nn.Sequential(*parts, nn.Softmax(1)), "1"), data)
    activations.collect_activations(AtLayer(nn.Sequential(*parts, nn.LogSoftmax(1)), "1"), data)
    # One-hot rows sum to 1 as well, but not where the activations are others.
    identity = SimpleNamespace(preactivations=lambda x: x, logits_from_preactivations=lambda x: x)
    eye = torch.eye(3)[torch.arange(30) % 3]
    assert activations.collect_activations(identity, data_of(eye, eye, eye)).n_classes == 3


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for made in tree_leaves(found):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return found


def test_no_copy_of_a_whole_split_is_made():
    raw = torch.randn(60_000, 2, 4, generator=torch.Generator().manual_seed(0)).half()
    splits = {name: fa.Activations(raw, torch.zeros(60_000), raw) for name in images.SPLIT_NAMES}
    layer = fa.ExplainedLayer(None, None, torch.zeros(4), torch.ones(4), splits)
    with Allocations() as made:
        activations.warn_scale_shift(layer)
        activations.range_of(raw.flatten(0, 1), ONE_PROCESS)
    assert 0 < made.largest < raw.untyped_storage().nbytes()  # sums are float64


def test_large_outputs_in_16_bits_are_compared(capsys):
    raw = 4e4 * torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).sign().half()
    split = fa.Activations(raw, torch.zeros(400), raw)
    splits = dict.fromkeys(images.SPLIT_NAMES, split)
    activations.warn_scale_shift(
        fa.ExplainedLayer(None, None, raw[0], torch.ones(6).half(), splits)
    )
    assert capsys.readouterr().out == ""


def test_what_a_layer_is_made_from_names_code_and_type_and_library():
    net, data = network(), data_of(*(some_images(n) for n in (40, 20, 30)))
    found = activations.layer_inputs(AtLayer(net, "wide"), data)
    assert found == activations.layer_inputs(AtLayer(net, "wide"), data)
    assert found["torch"] == torch.__version__
    assert found["dtype"] == "torch.float32"
    assert found["layout"] == "a vector"
    usual = net.forward
    net.forward = lambda x: usual(x.flip(3))  # the same weights and images
    other = activations.layer_inputs(AtLayer(net, "wide"), data)
    assert {key for key in found if other[key] != found[key]} == {"some outputs"}


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (6, 3, ""),
        (3, 8, "validation .*2.0 standard deviations off .*spread 1 times"),
        (1 / 3, 2, "validation .*spread 0.11 times as far"),
        (30, 2, "validation .*spread 10 times as far"),
    ],
)
def test_splits_on_different_scales_are_reported(capsys, scale, shift, words):
    train = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2
    val = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) * scale + shift
    raw = {"train": train, "val": val, "test": train[:100]}
    splits = {name: fa.Activations(x, torch.zeros(len(x)), x) for name, x in raw.items()}
    activations.warn_scale_shift(fa.ExplainedLayer(None, None, train[0], torch.ones(6), splits))
    assert re.fullmatch(f".*{words}.*\n" if words else "", capsys.readouterr().out)
