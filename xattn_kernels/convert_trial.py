"""Running a block and its replacement side by side, for `xattn_kernels.convert`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels import registry
from xattn_kernels.convert_blocks import (
    HOOKS,
    Converted,
    ConvertedCrossScaleHead,
    ConvertedCrossTaskAttention,
    ConvertedResidualBlock,
    Left,
    assemble,
)

_BATCH = 2
_NOISE = 1e-8
"""Of the largest tensor of a kind: smaller ones are compared with that, being rounding errors."""

Inputs = dict[str, Tensor]
Call = Callable[[nn.Module, Inputs], Any]


def largest_difference(original: nn.Module, kind: str) -> float:
    """Largest relative L2 difference between a block and its replacement.

    Of outputs in inference, then of outputs, gradients and running statistics in training. Copies
    run, in float64 where the device has it, on random features; neither the block nor the random
    state of the process changes.

    Raises:
        Left: if one of them does not run, or they return different things.
    """
    reference = _run("it could not be copied", _copy, original)
    device = next(original.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
        reference.to_empty(device=device)
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    reference.to(dtype).requires_grad_()
    _randomise(reference)
    candidate = assemble(copy.deepcopy(reference), kind)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        registry.backend("auto"),
    ):
        *others, last = _problems(candidate, device, dtype)
        for problem in others:
            try:
                return _compare(reference, candidate, *problem)
            except _Refused:
                continue
        return _compare(reference, candidate, *last)


class _Refused(Left):
    """The block does not run, or not on these features."""


def _run(failure: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; whatever it raises is a reason not to swap the block."""
    try:
        return function(*args)
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise _Refused(f"{failure}: {type(error).__name__}: {message}") from error


def _copy(original: nn.Module) -> nn.Module:
    """A copy without hooks, whose batch norms need no process group."""
    modules = [*original.modules()]
    memo: dict[int, Any] = {
        id(module.__dict__[name]): OrderedDict() for module in modules for name in HOOKS
    }
    copied: nn.Module = copy.deepcopy(original, memo)
    for module in [*copied.modules()]:
        for name, child in module._modules.items():
            if isinstance(child, nn.SyncBatchNorm):
                module._modules[name] = _as_batch_norm(child)
    return copied


def _as_batch_norm(sync: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(
        sync.num_features, sync.eps, sync.momentum, sync.affine, sync.track_running_stats
    )
    norm._parameters, norm._buffers = sync._parameters, sync._buffers
    return norm.train(sync.training)


def _randomise(module: nn.Module) -> None:
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
        else:
            value -= 0.5
        x.copy_(value)


def _problems(
    candidate: Converted, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Inputs, Call]]:
    """Named inputs, and how to call either module with them; the next if the block refuses one."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int, height: int, width: int) -> Tensor:
        x = torch.randn((_BATCH, channels, height, width), generator=generator, dtype=dtype)
        return x.to(device)

    if isinstance(candidate, ConvertedCrossTaskAttention):
        names = candidate.auxiliary_tasks
        features = {f"features_{name}": draw(candidate.channels, 4, 6) for name in names}
        logits = {name: draw(1, 4, 6) for name in names}
        yield features, lambda module, x: module({**x, **logits})
    elif isinstance(candidate, ConvertedCrossScaleHead):
        last = len(candidate.channels) - 1
        sizes = [(1 << (last - s), 2 << (last - s)) for s in range(last + 1)]
        widths = zip(candidate.channels, sizes, strict=True)
        pyramid = {f"scale {s}": draw(c, *size) for s, (c, size) in enumerate(widths)}
        yield pyramid, lambda module, x: module([*x.values()])
    elif isinstance(candidate, ConvertedResidualBlock):
        yield {"x": draw(candidate.conv1.in_channels, 4, 6)}, lambda module, x: module(x["x"])
    else:
        channels: Any = candidate.channels
        for source in ((3, 5), (4, 6)):  # some blocks take maps of one size only
            pair = {"target": draw(channels, 4, 6), "source": draw(channels, *source)}
            yield pair, lambda module, x: module(x["target"], x["source"])


def _compare(reference: nn.Module, candidate: nn.Module, inputs: Inputs, call: Call) -> float:
    worst = 0.0
    for training in (False, True):
        reference.train(training)
        candidate.train(training)
        results = _results if training else torch.no_grad()(_outputs)
        expected = _run("it did not run on random features", results, reference, inputs, call)
        found = _run("its replacement did not run", results, candidate, inputs, call)
        worst = max(worst, _difference(found, expected))
    return worst


def _outputs(module: nn.Module, inputs: Inputs, call: Call) -> dict[str, Inputs]:
    """The outputs, in groups of what is compared with each other in size."""
    output = call(module, inputs)
    outputs = {"": output} if isinstance(output, Tensor) else output
    if type(outputs) is not dict or not all(isinstance(y, Tensor) for y in outputs.values()):
        raise TypeError(f"it returned a {type(output).__name__}")
    return {"outputs": outputs}


def _results(module: nn.Module, inputs: Inputs, call: Call) -> dict[str, Inputs]:
    """Outputs, gradients and running statistics of one step."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = _outputs(module, leaves, call)["outputs"]
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        for y in outputs.values()
    ]
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(
        [*outputs.values()], [*leaves.values(), *parameters.values()], weights, allow_unused=True
    )
    filled = [
        torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip((*leaves.values(), *parameters.values()), gradients, strict=True)
    ]
    return {
        "outputs": {name: y.detach() for name, y in outputs.items()},
        "gradients of inputs": dict(zip(leaves, filled, strict=False)),
        "gradients of parameters": dict(zip(parameters, filled[len(leaves) :], strict=True)),
        "buffers": {name: x.double() for name, x in module.named_buffers()},
    }


def _difference(found: Mapping[str, Inputs], expected: Mapping[str, Inputs]) -> float:
    worst = 0.0
    for group, tensors in expected.items():
        if list(tensors) != list(found[group]):
            raise Left(f"it returns {list(tensors)}, its replacement {list(found[group])}")
        floor = _NOISE * max((float(x.norm()) for x in tensors.values()), default=0.0)
        for name, x in tensors.items():
            y = found[group][name]
            if x.shape != y.shape or x.dtype != y.dtype:
                raise Left(f"it returns {_kind(x)}, its replacement {_kind(y)}")
            size = max(float(x.norm()), floor)
            error = float((x - y).norm())
            worst = max(worst, error / size if size else error)
            if error != error:
                return error
    return worst


def _kind(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
