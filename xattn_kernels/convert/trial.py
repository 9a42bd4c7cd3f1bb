"""Running a block and its replacement side by side, for `xattn_kernels.convert`."""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xattn_kernels import registry
from xattn_kernels.convert.blocks import HOOKS, assemble
from xattn_kernels.convert.code import Left, is_idle, read_code
from xattn_kernels.convert.operators import Observer
from xattn_kernels.convert.settings import NORMS, settings_of
from xattn_kernels.convert.sizes import LikeTarget, Size, Sized, Sizes
from xattn_kernels.convert.swapped import (
    Converted,
    ConvertedCrossScaleHead,
    ConvertedCrossTaskAttention,
    ConvertedResidualBlock,
)
from xattn_kernels.modules import CrossAttention

_REFUSAL = "it did not run on random features"
_NOISE = 1e-7
"""Of the largest tensor of a kind: smaller ones are compared with that, being rounding errors."""
_NOTHING = 1e-9
"""Where all tensors of a kind are smaller than this, they are compared with this."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Random features and parameters to try a block with."""

    batch: int
    sizes: tuple[tuple[int, int], ...]
    """Of its maps, by turns; the first is the coarsest of a pyramid."""
    scale: float
    """Of features."""
    spread: float
    """Of batch norms' shifts."""
    second: tuple[float, float] | None = None
    """Bounds of the shifts after which queries and keys are activated; None: as the others."""
    modes: str = "i"
    """i: in inference; e: gradients in inference; t: in training, twice."""


CASES = (
    Case(2, ((4, 6), (3, 5), (5, 2)), 1.0, 0.5, modes="iet"),
    # Beyond thresholds and clamps, on both sides.
    Case(1, ((3, 7), (1, 17), (16, 1)), 1e2, 40.0, (5.0, 40.0), "it"),
    # Denominators of 1e-3 to 1e-9, then below the eps.
    Case(3, ((2, 5), (7, 1), (3, 3)), 1.0, 2.0, (-14.0, -2.0), "it"),
    Case(2, ((1, 9), (4, 4), (2, 3)), 1e-3, 1.0, (-40.0, -25.0), "ie"),
    Case(1, ((13, 17), (16, 11), (9, 10)), 1e4, 10.0),
)
"""Batches, odd sizes, magnitudes, signs."""
ONES = (
    Case(1, ((1, 1), (4, 1), (1, 3)), 1.0, 0.5),
    Case(2, ((1, 1), (1, 5), (4, 1)), 1.0, 0.5),
    Case(1, ((4, 1), (1, 1), (1, 3)), 1.0, 0.5),
    Case(2, ((4, 1), (1, 3), (1, 1)), 1.0, 0.5),
    Case(1, ((1, 3), (1, 1), (4, 1)), 1.0, 0.5),
)
"""Lengths of 1, for blocks whose code looks at sizes."""


def largest_difference(original: nn.Module, kind: str) -> float:
    """Largest relative L2 difference between a block and its replacement in all `CASES`.

    Of outputs in inference, then of outputs, gradients and running statistics in training. Copies
    run, in float64 where the device has it; neither the block nor the random states of the process
    change. The block is watched as it runs, and so are its decisions by sizes.

    Raises:
        Left: if one of them does not run, or they return different things; if the block runs
            operators that its replacement does not, is random, changes its attributes or inputs,
            or depends on what is not shown by its parameters, settings and input.
    """
    reference = _run("it could not be copied", _copy, original)
    device = next(original.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
        reference.to_empty(device=device)
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    reference.to(dtype).requires_grad_()
    candidate = assemble(copy.deepcopy(reference), kind)
    trial = _Trial(reference, candidate, device, dtype)
    with (
        _random_states_kept(device),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        registry.backend("auto"),
    ):
        return trial.run()


class _Refused(Left):
    """The block does not run, or not on these features."""


def _run(failure: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; whatever it raises is a reason not to swap the block."""
    try:
        return function(*args)
    except Left:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise _Refused(f"{failure}: {type(error).__name__}: {message}") from error


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _copy(original: nn.Module) -> nn.Module:
    """A copy without hooks, swapped blocks and idle dropout, whose norms need no process group."""
    modules = [*original.modules()]
    memo: dict[int, Any] = {
        id(module.__dict__[name]): OrderedDict() for module in modules for name in HOOKS
    }
    copied: nn.Module = copy.deepcopy(original, memo)
    for module in [*copied.modules()]:
        for name, child in module._modules.items():
            if isinstance(child, Converted):
                module._modules[name] = _copy(child.release())
            elif isinstance(child, nn.SyncBatchNorm):
                module._modules[name] = _as_batch_norm(child)
            elif child is not None and is_idle(child):
                module._modules[name] = nn.Identity()
    return copied


def _as_batch_norm(sync: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(
        sync.num_features, sync.eps, sync.momentum, sync.affine, sync.track_running_stats
    )
    norm._parameters, norm._buffers = sync._parameters, sync._buffers
    return norm.train(sync.training)


class _Trial:
    def __init__(
        self,
        reference: nn.Module,
        candidate: Converted,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._reference, self._candidate = reference, candidate
        self._device, self._dtype = device, dtype
        leaves = candidate.named_modules(remove_duplicate=False)
        self._layers = [path for path, m in leaves if not m._modules]
        for path in self._layers:
            layer = reference.get_submodule(path)
            if isinstance(layer, NORMS):
                layer.register_forward_hook(_with_plain_gradient)
        self._observer = Observer(map(reference.get_submodule, self._layers))
        self._maps, self._call = _signature(candidate)
        self._is_related = False
        """Whether the block takes only maps whose sizes fit each other."""

    def run(self) -> float:
        modules = dict(self._reference.named_modules())
        code = read_code(modules.values())
        before = settings_of(modules, code, frozenset())
        worst = 0.0
        for i, case in enumerate(CASES):
            if i == 0:
                try:
                    worst = self._try(case)
                except _Refused:
                    self._is_related = True
            if i > 0 or self._is_related:
                worst = max(worst, self._try(case))
        for case in ONES if self._observer.reads_sizes else ():
            with suppress(_Refused):
                worst = max(worst, self._try(case))
        if settings_of(modules, code, frozenset(), before.names) != before:
            raise Left("it changes its attributes, or what its code refers to, as it runs")
        if self._observer.reads_sizes:
            self._check_sizes()
        return worst

    def _try(self, case: Case) -> float:
        generator = torch.Generator().manual_seed(0)
        count = len(self._maps)
        sizes = _sizes(self._candidate, count, case.sizes, self._is_related)
        inputs = {}
        for (name, channels), size in zip(self._maps, sizes, strict=True):
            shape = (case.batch, channels, *size)
            x = torch.randn(shape, generator=generator, dtype=self._dtype)
            inputs[name] = case.scale * x.to(self._device)
        for module in (self._reference, self._candidate):
            _randomise(module, case)
        worst = 0.0
        for mode in case.modes:
            training, gradient = mode == "t", mode != "i"
            if training:
                self._repeat(inputs)
            step = (inputs, training, gradient)
            expected = _run(_REFUSAL, self._results, self._reference, *step)
            for finding in self._observer.findings:
                raise Left(finding)
            try:
                found = _run("its replacement did not run", self._results, self._candidate, *step)
            except _Refused as error:
                raise Left(str(error)) from error
            worst = max(worst, _difference(found, expected))
        return worst

    def _repeat(self, inputs: Inputs) -> None:
        """See whether the block computes the same twice, in training."""
        state = {name: x.clone() for name, x in self._reference.state_dict().items()}
        outputs = []
        for _ in range(2):
            self._reference.train()
            with torch.no_grad():
                copies = {name: x.clone() for name, x in inputs.items()}
                outputs.append(_run(_REFUSAL, _named, self._call, self._reference, copies))
            self._reference.load_state_dict(state)
        if not all(torch.equal(y, outputs[1][name]) for name, y in outputs[0].items()):
            raise Left("its results in training differ from call to call: it is random")

    def _results(
        self, module: nn.Module, inputs: Inputs, training: bool, gradient: bool
    ) -> dict[str, Inputs]:
        """Outputs, gradients and running statistics of one step."""
        module.train(training)
        module.zero_grad()
        watch = self._observer.watch if module is self._reference else nullcontext
        leaves = {name: x.clone().requires_grad_(gradient) for name, x in inputs.items()}
        given = {name: x.clone() for name, x in leaves.items()}
        versions = [x._version for x in given.values()]
        with torch.set_grad_enabled(gradient), watch():
            outputs = _named(self._call, module, given)
        if versions != [x._version for x in given.values()]:
            raise Left("it changes its input in place")
        if module is self._reference:
            for y in outputs.values():
                self._observer.see_output(y)
        results = {"outputs": {name: y.detach() for name, y in outputs.items()}}
        if not gradient:
            return results
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
            for y in outputs.values()
        ]
        ends = [(y, w) for y, w in zip(outputs.values(), weights, strict=True) if y.requires_grad]
        if ends:
            torch.autograd.backward([y for y, _ in ends], [w for _, w in ends])
        for kind, tensors in (("inputs", leaves), ("parameters", dict(module.named_parameters()))):
            results[f"gradients of {kind}"] = {
                name: torch.zeros_like(x) if x.grad is None else x.grad.detach().clone()
                for name, x in tensors.items()
            }
        results["buffers"] = {name: x.double() for name, x in module.named_buffers()}
        return results

    def _check_sizes(self) -> None:
        """See whether the block decides by sizes. Its layers are gone afterwards."""
        for path in self._layers:
            layer = self._reference.get_submodule(path)
            widths = (0, 0)  # batch norms and activations
            if isinstance(layer, nn.Conv2d):
                widths = (layer.in_channels, layer.out_channels)
            _replace(self._reference, path, Sized(*widths))
        known: set[object] = set()
        for path, part in self._candidate.named_modules():
            if path and isinstance(part, CrossAttention):
                block = self._reference.get_submodule(path)
                modules = dict(block.named_modules())
                settings = settings_of(modules, read_code(modules.values()), frozenset())
                if (type(block), settings) in known:
                    argument = next(iter(inspect.signature(block.forward).parameters))
                    _replace(self._reference, path, LikeTarget(argument))
                known.add((type(block), settings))
        symbols = Sizes(1 if self._is_related else len(self._maps))
        sizes = _sizes(self._candidate, len(self._maps), symbols.sizes, self._is_related)
        inputs = {
            name: symbols.features(channels, size)
            for (name, channels), size in zip(self._maps, sizes, strict=True)
        }
        failure = "it could not be run with symbols for sizes"
        _run(failure, symbols.run, lambda: self._call(self._reference, inputs))
        _run(failure, symbols.check)


def _with_plain_gradient(norm: nn.Module, args: object, output: Tensor) -> None:
    """Have the gradient of a batch norm's output contiguous.

    From the batch stride of a single sample, which may be anything, torch's CPU batch norm (seen in
    2.13) takes a gradient for contiguous that is not, and computes wrong gradients from it.
    """
    if output.requires_grad:
        output.register_hook(Tensor.contiguous)


def _replace(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = part


def _signature(
    candidate: Converted,
) -> tuple[list[tuple[str, int]], Callable[[nn.Module, Inputs], Any]]:
    """Names and widths of the maps that a block takes, and how to call it with them."""
    if isinstance(candidate, ConvertedCrossTaskAttention):
        names = candidate.auxiliary_tasks
        maps = [(f"features_{name}", candidate.channels) for name in names]
        return [*maps, *((name, 1) for name in names)], lambda block, x: block(x)
    if isinstance(candidate, ConvertedCrossScaleHead):
        maps = [(f"scale {s}", width) for s, width in enumerate(candidate.channels)]
        return maps, lambda block, x: block([*x.values()])
    if isinstance(candidate, ConvertedResidualBlock):
        return [("x", candidate.conv1.in_channels)], lambda block, x: block(x["x"])
    channels: Any = candidate.channels
    return (
        [("target", channels), ("source", channels)],
        lambda block, x: block(x["target"], x["source"]),
    )


def _sizes(
    candidate: Converted, count: int, sizes: Sequence[Size], related: bool
) -> Sequence[Size]:
    """Sizes of the maps that a block takes.

    Args:
        candidate: what is to stand for the block.
        count: of maps.
        sizes: to choose from.
        related: whether the maps have one size, those of a pyramid each half that of the last.
    """
    if related and isinstance(candidate, ConvertedCrossScaleHead):
        height, width = sizes[0]
        return [(height * 2**s, width * 2**s) for s in reversed(range(count))]
    return [sizes[0 if related else i % len(sizes)] for i in range(count)]


def _randomise(module: nn.Module, case: Case) -> None:
    """Other values for parameters and statistics: trained ones, or zeros, may hide a difference."""
    generator = torch.Generator().manual_seed(2)
    for name, x in module.state_dict().items():
        if not x.is_floating_point():
            x.zero_()
            continue
        value = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        if x.dim() > 1:
            value = (2 * value - 1) * (3 / x[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var")):
            value += 0.5
        elif name.endswith("bias") and "project.1." in name and case.second is not None:
            low, high = case.second
            value = low + (high - low) * value
        elif name.endswith("bias"):
            value = case.spread * (2 * value - 1)
        else:
            value -= 0.5
        x.copy_(value)


def _named(call: Callable[..., Any], *args: Any) -> Inputs:
    """What a block returns, by name."""
    output = call(*args)
    outputs = {"": output} if isinstance(output, Tensor) else output
    if type(outputs) is not dict or not all(isinstance(y, Tensor) for y in outputs.values()):
        raise TypeError(f"it returned a {type(output).__name__}")
    return outputs


def _difference(found: Mapping[str, Inputs], expected: Mapping[str, Inputs]) -> float:
    worst = 0.0
    for group, tensors in expected.items():
        if list(tensors) != list(found[group]):
            raise Left(f"it returns {list(tensors)}, its replacement {list(found[group])}")
        largest = max((float(x.norm()) for x in tensors.values()), default=0.0)
        floor = max(_NOISE * largest, _NOTHING)
        for name, x in tensors.items():
            y = found[group][name]
            if x.shape != y.shape or x.dtype != y.dtype:
                raise Left(f"it returns {_kind(x)}, its replacement {_kind(y)}")
            error = float((x - y).norm())
            worst = max(worst, error / max(float(x.norm()), floor))
            if error != error:
                return error
    return worst


def _kind(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
