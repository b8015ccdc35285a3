"""How is a layer of a network read and replaced? Activations in, logits out.

    net = AtLayer(model, "features.7")               # any torch.nn.Module, by a forward hook
    raw = net.preactivations(images)
    logits = net.logits_from_preactivations(raw)

Takes a network; what it gives for all images of a set is in activations.py, what shapes of output
there are in positions.py. It knows nothing of SAEs, and draws and writes nothing.

Key: N images, B in a batch, C classes, d_in units of the layer, P positions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import feature_analysis as fa
from saexplain.files import InputError
from saexplain.positions import (
    POOLS,
    Layout,
    decides_layout,
    find_layout,
    last_of,
)
from saexplain.sources import describe_error

METHODS = ("preactivations", "logits_from_preactivations")  # of a model that needs no hook
LOW_PRECISION = 1e-2  # relative difference of equal results on GPUs, which may round to 10 bits


def open_layer(
    model: object,
    layer: str | None,
    pool: str | None = None,
    layout: str | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> AtLayer | EvalMode:
    """The network with the two METHODS; layer None for a model that has them itself.

    The other arguments are those of `AtLayer`. Raises ValueError for an unknown layer, InputError
    for a model that cannot be used.
    """
    if isinstance(model, (AtLayer, EvalMode)) and layer is None:
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise InputError(f"the model's {name} has no values; run it once, or load its weights")
        if parameter.is_inference():
            raise InputError(
                "the model was made in torch.inference_mode(), so no gradients flow through it; "
                "make it outside"
            )
    if layer is not None:
        return AtLayer(model, layer, pool, None, layout, grid, prefix_tokens)
    if not all(callable(getattr(model, name, None)) for name in METHODS):
        raise InputError(
            f"{type(model).__name__} has no methods {' and '.join(METHODS)}; name one of its layers"
        )
    return EvalMode(model)


# --------------------------------------------------------------------------------------------------
# A layer of any network
# --------------------------------------------------------------------------------------------------


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass once the layer's output is there."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def gradients_if_asked(given: Tensor) -> torch.set_grad_enabled:
    """Gradients where `given` asks for them, never because a network's weights do."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and given.requires_grad)


def parameter_like(model: nn.Module) -> Tensor:
    """A parameter with the device and dtype that the model's images must have."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DataParallel and torch.compile, whose names of layers are its own."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model


def parts_of(output: object) -> Mapping:
    """The parts of a dict, tuple, list or dataclass, by key; none of anything else."""
    if isinstance(output, Mapping):  # also the dataclasses of transformers
        return output
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    names = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
    return {field.name: getattr(output, field.name) for field in names}


def path_to_tensor(output: object) -> tuple | None:
    """The keys that lead to the first tensor (B, ...) in a layer's output; None without any."""
    if isinstance(output, Tensor):
        return () if output.dim() > 1 else None
    for key, value in parts_of(output).items():
        path = path_to_tensor(value)
        if path is not None:
            return (key, *path)
    return None


def with_tensor_at(output: object, path: tuple, new: Tensor) -> object:
    """The output with another tensor at the end of the path."""
    if not path:
        return new
    parts = parts_of(output)
    parts = {**parts, path[0]: with_tensor_at(parts[path[0]], path[1:], new)}
    if isinstance(output, Mapping):  # also those of transformers, which take names only
        return type(output)(**parts)
    if isinstance(output, (tuple, list)):
        named = hasattr(output, "_fields")
        return type(output)(*parts.values()) if named else type(output)(parts.values())
    return dataclasses.replace(output, **{path[0]: parts[path[0]]})


def logits_in(result: object) -> Tensor | None:
    """Logits (B, C) in what a model returns: a tensor, `.logits`, or the first of a dict, tuple or
    dataclass that has this shape. A single logit x becomes those of two classes, 0 and x. None
    without any. Raises ValueError where there are several of different numbers of classes."""
    if isinstance(result, Tensor):
        if result.dim() == 1 and result.is_floating_point():
            result = result[:, None]
        if result.dim() != 2:
            return None
        return result if result.shape[1] > 1 else torch.cat([torch.zeros_like(result), result], 1)
    named = getattr(result, "logits", None)
    named = result.get("logits") if isinstance(result, Mapping) else named
    if isinstance(named, Tensor):
        return logits_in(named)
    found = [logits_in(value) for value in parts_of(result).values()]
    found = [logits for logits in found if logits is not None]
    if len({logits.shape[1] for logits in found}) > 1:
        shapes = ", ".join(f"(B, {logits.shape[1]})" for logits in found)
        raise ValueError(
            f"the model returns several tensors that may be the logits, {shapes}; have it return "
            f"the logits alone, or name them: {{'logits': ...}}"
        )
    return found[0] if found else None


class AtLayer:
    """The output of one layer of any network as activations, and the rest of the network as a head.

        net = AtLayer(model, "features.7")
        raw = net.preactivations(images)           # (B, d_in), by a forward hook
        logits = net.logits_from_preactivations(raw)  # (B, C), the layer's output replaced

    Nothing of the model is changed: it runs in evaluation mode, which is undone afterwards. For the
    head, the model runs on one image, and a hook replaces the layer's output. Where something goes
    around the layer, as around a residual branch, raw is a `fa.BranchRows` with the images, and the
    model runs on them.

    Args:
        model: maps images (B, ...) to logits (B, C), alone or in a dict, a tuple or as `.logits`.
        name: of the layer, as in `model.named_modules()`; of one that is neither traced nor
            scripted, which run no hooks.
        pool: of an output with positions: "mean" or "max" over them, which serves where the head
            reads no more than that, or "flatten" for all of it. By default positions stay, and raw
            is (B, P, d_in).
        images: (N, ...), one or more that the network can take; up to PROBED are used. Without,
            the first that `preactivations` is given.
        layout, grid, prefix_tokens: of the output, where `find_layout` would take it otherwise.

    Raises ValueError for an unknown layer; with the first images, for a layer whose output has no
    tensor, and where the logits depend on the other images of a batch, or the pool loses something.
    """

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pool: str | None = None,
        images: Tensor | None = None,
        layout: str | None = None,
        grid: Sequence[int] | None = None,
        prefix_tokens: int | None = None,
    ):
        model = unwrapped(model)
        modules = dict(model.named_modules())
        if not isinstance(name, str):
            own = next((own for own, part in modules.items() if part is name), str(name))
            met = type(name).__name__
            raise ValueError(f"layer must be a name, such as {own!r:.40}, got one of type {met}")
        for prefix in ("_orig_mod.", "module."):  # names of a compiled or parallel model
            name = name.removeprefix(prefix) if name and name not in modules else name
        if any(isinstance(part, torch.jit.ScriptModule) for part in (model, modules.get(name))):
            raise ValueError(
                f"layer {name!r} is traced or scripted, so that its output cannot be read or "
                f"replaced; give the torch.nn.Module that it was made from"
            )
        if name not in modules or not name:
            names = [own for own in modules if own]
            near = difflib.get_close_matches(name, names, 5, 0) if name else names[:5]
            listed = ", ".join(near) + (", ..." if len(near) < len(names) else "")
            raise ValueError(f"the model has no layer {name!r}; it has {listed or 'none'}")
        if pool is not None and pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.model, self.name, self.pool = model, name, pool
        self.title = f"layer {name} of {type(model).__name__}"
        self.short_name = f"{type(model).__name__}_{name}"
        self.layer = modules[name]
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtypes = list(dict.fromkeys(dtypes)) or [like.dtype]  # that images may have
        self.asked = (layout, grid, prefix_tokens)
        self.layout: Layout | None = None  # of the output, once images are known
        self.before: Tensor | None = None  # (1, ...) an image that leads to the layer
        self.is_branch = False  # whether something goes around the layer
        self.one_image = True  # whether one image is enough to run the head on many outputs
        self.n_classes = 0
        if images is not None:
            self._probe(images)

    @property
    def positions(self) -> fa.Positions | None:
        """The positions of the output, None for a vector."""
        return self.layout.positions if self.layout else None

    def in_words(self) -> str:
        """What was recognized of the layer, once images are known."""
        around = "; something goes around it, so each image runs again" if self.is_branch else ""
        return self.layout.in_words() + around

    @property
    def head_entries(self) -> int:
        """Numbers in the input of one row's pass through the rest of the model."""
        if self.is_branch:
            return self.before.numel()
        return math.prod(self.layout.shape) if self.layout else 0

    def preactivations(self, images: Tensor) -> fa.Rows:
        """images (B, ...) -> (B, d_in) or (B, P, d_in) float32; gradients flow to images that ask
        for them."""
        if self.before is None:
            self._probe(images)
        if len(images) == 0:  # many networks cannot take an empty batch
            return self.layout.to_rows(self._output(self.before))[:0]
        raw = self.layout.to_rows(self._output(images))
        return fa.BranchRows(raw, images) if self.is_branch else raw

    def logits_from_preactivations(self, raw: fa.Rows) -> Tensor:
        """raw (B, d_in) or (B, P, d_in) -> logits (B, C) float32; gradients flow to a raw that asks
        for them."""
        if self.before is None:
            raise ValueError(f"{self.name}: give `images` first, or call `preactivations`")
        if self.is_branch and not isinstance(raw, fa.BranchRows):
            raise ValueError(
                f"the logits depend on more than layer {self.name!r}: give the `fa.BranchRows` of "
                f"`preactivations`, which have the images"
            )
        values = fa.values_of(raw)
        if len(values) == 0:
            return values.new_zeros(0, self.n_classes)
        replaced, before = self.layout.to_output(values), self.before
        if self.is_branch:
            before = raw.images
        elif not self.one_image:
            before = before.expand(len(raw), *before.shape[1:])

        def replace(_module, _given, output) -> object:
            return with_tensor_at(output, path_to_tensor(output), replaced)

        return self._logits(self._run(before, replace, values)).float()

    def _logits(self, result: object) -> Tensor:
        """Logits (B, C) of what the model returns. Raises ValueError where there are none."""
        logits = logits_in(result)
        if logits is None:
            met = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"the model must give logits (B, C), alone, as `.logits`, or in a dict or tuple, "
                f"but gives {met}"
            )
        return logits

    def _run(self, images: Tensor, hook: Callable, of: Tensor) -> object:
        """The model's result for images, with a hook on the layer, and gradients if `of` asks."""
        handle = self.layer.register_forward_hook(hook)
        try:
            with eval_mode(self.model), gradients_if_asked(of):
                # A copy: some models change their input.
                return self.model(images.to(self.device, self.dtype, copy=True))
        finally:
            handle.remove()

    def _output(self, images: Tensor) -> Tensor:
        """The layer's output (B, ...), a copy, since it may be a view of the images."""
        found = []

        def keep(_module, _given, output) -> None:
            found.append(output)
            raise StopForward

        try:
            self._run(images, keep, images)
        except StopForward:
            pass
        if not found:
            raise ValueError(self._not_run())
        path, output = path_to_tensor(found[0]), found[0]
        if path is None:
            met = type(output).__name__
            raise ValueError(f"layer {self.name!r} must give a tensor (B, ...), but gives a {met}")
        for key in path:
            output = parts_of(output)[key]
        return output.clone()

    def _not_run(self) -> str:
        return (
            f"layer {self.name!r} does not run when the model is given images; name one that does "
            f"(those of an exported network are names only)"
        )

    @torch.no_grad()
    def _probe(self, images: Tensor) -> None:
        """Learn the layout of the layer's output, and check that its rows can be put in again.

        The first image leads to the layer, and the output for others, and for all with noise, is
        put in there: the logits must be those of the others. Where they are not, each must lead to
        its own. And they must not depend on the images beside them.
        """
        places = torch.linspace(0, len(images) - 1, min(fa.PROBED, len(images))).round().long()
        some = images[places.to(images.device)].detach().float()
        noise = torch.rand(some.shape, generator=torch.Generator().manual_seed(0))
        noisy = some + (some.std() + 1) * noise.to(some)  # unlike the first, whatever that is
        tried = torch.cat([some, noisy])
        result = self._first_result(tried)
        output, logits = self._output(tried), self._logits(result)
        if len(output) != len(tried):
            raise ValueError(
                f"layer {self.name!r} gives {tuple(output.shape)} for {len(tried)} images: images "
                f"must come first, as with batch_first=True"
            )
        module = self._decides_layout(some[:2])
        self.layout = find_layout(output, some.shape, module, self.pool, *self.asked)
        rounding = max(LOW_PRECISION, 16 * torch.finfo(logits.dtype).eps)
        again = self._logits(self._result(tried))
        if _distance(again, logits) > rounding:
            raise ValueError(
                "the model must be deterministic, but gives other logits for the same images the "
                "second time, as a dropout does that is no module, or ignores self.training"
            )
        if len(some) > 1:  # not every network takes a single image
            halves = [self._logits(self._result(half)) for half in tried.chunk(2)]
            if _distance(torch.cat(halves), logits) > rounding:
                raise ValueError(
                    "the model's logits for an image depend on the others of its batch"
                )
        self.before, self.n_classes = some[:1].clone(), logits.shape[1]
        try:
            self._find_head(tried, output, logits)
        except ValueError:
            self.before = None
            raise

    def _result(self, images: Tensor, hook: Callable = lambda *_: None) -> object:
        """What the model returns. Raises ValueError with the model's own error where it fails."""
        try:
            return self._run(images, hook, images)
        except Exception as error:  # whatever its code raises
            if fa.is_out_of_memory(error):
                raise
            shape, dtype = tuple(images.shape[1:]), str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"the model cannot take images of shape {shape}, {len(images)} of {dtype} on "
                f"{self.device}: {describe_error(error)}"
            ) from error

    def _first_result(self, tried: Tensor) -> object:
        """What the model returns for images of the first dtype that it can take. Raises ValueError
        unless the layer ran once."""
        failures = []
        for dtype in self.dtypes:
            self.dtype, runs = dtype, []
            try:
                result = self._result(tried, lambda *_, runs=runs: runs.append(1))
                break
            except ValueError as error:
                failures.append(error)
        else:
            self.dtype = self.dtypes[0]
            raise failures[0]
        if not runs:
            raise ValueError(self._not_run())
        if len(runs) > 1:
            raise ValueError(f"layer {self.name!r} runs {len(runs)} times; name one that runs once")
        return result

    def _decides_layout(self, images: Tensor) -> nn.Module:
        """The module that decides the layout of the layer's output: its last, or, where that has
        no weights, the one whose output it is given."""
        made: dict[nn.Module, tuple] = {}
        leaves = [part for part in self.model.modules() if not list(part.children())]
        handles = [
            leaf.register_forward_hook(
                lambda leaf, given, output: made.update({leaf: (given, output)})
            )
            for leaf in leaves
            if not isinstance(leaf, torch.jit.ScriptModule)
        ]
        try:
            self._result(images)
        finally:
            for handle in handles:
                handle.remove()
        module = last_of(self.layer)
        while module in made and not decides_layout(module):
            given, _ = made.pop(module)
            before = [m for m, (_, output) in made.items() if given and output is given[0]]
            if not before:
                break
            module = before[-1]
        return module

    def _find_head(self, tried: Tensor, output: Tensor, expected: Tensor) -> None:
        """Set `one_image`, or `is_branch`, so that the output (B, ...) for images tried (B, ...),
        put in again, gives the logits expected (B, C). Raises ValueError where nothing does."""
        off, failure = [], None
        rows = self.layout.to_rows(output)
        # A network may ask how many images there are.
        for self.one_image, self.is_branch in ((True, False), (False, False), (False, True)):
            given = fa.BranchRows(rows, tried) if self.is_branch else rows
            try:
                logits = self.logits_from_preactivations(given)
            except Exception as error:  # whatever the model's code raises
                if fa.is_out_of_memory(error):
                    raise
                failure = error
                continue
            off.append(_distance(logits, expected))
            if not off[-1] > fa.ROUNDING:
                return
        if not off:
            raise ValueError(
                f"the model does not run with the output of layer {self.name!r} put in again "
                f"({describe_error(failure)}); name another layer"
            ) from failure
        raise ValueError(
            f"the model reads more of layer {self.name!r} than pool={self.pool!r} keeps: with it "
            f"the logits are off by {min(off):.2g} of the largest; leave out pool, so that "
            f"positions stay"
        )


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Between logits (B, C), relative to the largest of those expected; inf for other shapes."""
    if logits.shape != expected.shape:
        return float("inf")
    logits, expected = logits.float(), expected.float()
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


class EvalMode:
    """A module that has the two METHODS itself, in evaluation mode while they run, and as it was
    afterwards; images on its device and of its dtype, results float32."""

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(self, model: nn.Module):
        self.model = model
        self.title = f"a layer of {type(model).__name__}"
        self.short_name = type(model).__name__
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        self.output = like  # has the device and dtype of the layer's output, once that is known
        self.positions, self.is_branch = getattr(model, "positions", None), False

    def in_words(self) -> str:
        """What is known of the layer."""
        return "its own preactivations"

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in)"""
        with eval_mode(self.model), gradients_if_asked(images):
            raw = self.model.preactivations(images.to(self.device, self.dtype, copy=True))
        self.output = raw.detach()[:0].clone()
        return raw.float()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C)"""
        given = raw.to(self.output.device, self.output.dtype)
        with eval_mode(self.model), gradients_if_asked(raw):
            return self.model.logits_from_preactivations(given).float()
