"""The modules by their equations, unfolded: their layers one by one, in plain PyTorch.

Takes modules of the package as containers of layers and never calls them. Layers of torch are
called themselves, hooks and all; for the package's own classes the functions below stand in, with
what tests changed about them, see `Changed` and `Twice`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.modules import (
    CrossAttention,
    CrossScaleAttention,
    CrossScaleHead,
    CrossTaskAttention,
)
from xattn_kernels.modules.layers import BasicBlock, Projection

from . import oracle_operators as operators


class Changed:
    """Mixed into a class of the package: its outputs are changed by `change`."""

    def forward(self, *inputs: Any) -> Any:
        return self.change(super().forward(*inputs))

    def change(self, y: Tensor) -> Tensor:
        return 0.75 * y + 0.125


class Twice:
    """A `forward` of one instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Tensor) -> Tensor:
        output: Tensor = type(self.module).forward(self.module, *inputs)
        return self.change(output)

    def change(self, y: Tensor) -> Tensor:
        return 2 * y


def call(module: nn.Module, *inputs: Any) -> Any:
    """What calling `module` is to give."""
    body = next((f for kind, f in BODIES.items() if isinstance(module, kind)), None)
    if body is None:
        y = _batch_norm(module, *inputs) if type(module) is nn.BatchNorm2d else module(*inputs)
        return operators.rounded(y)
    for hook in module._forward_pre_hooks.values():
        inputs = hook(module, inputs)
    output = body(module, *inputs)
    if isinstance(module, Changed):
        output = module.change(output)
    twice = module.__dict__.get("forward")
    if twice is not None:
        assert isinstance(twice, Twice)
        output = twice.change(output)
    for hook in module._forward_hooks.values():
        output = _hooked(hook(module, inputs, output), output)
    return output


def _hooked(changed: Any, output: Any) -> Any:
    return output if changed is None else changed


def _batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """In float64 by the formula, hooks and all, in other types by torch's kernel.

    That one (torch 2.13) computes wrong gradients for one sample in channels_last if there is a
    full backward hook, which has the norm see a view with another batch stride.
    """
    if x.dtype is not torch.float64:
        return bn(x)
    own = bn.__dict__.get("forward")

    def forward(x: Tensor) -> Tensor:
        y = _normalised(bn, x)
        return y if own is None else own.change(y)

    bn.forward = forward
    try:
        return bn(x)
    finally:
        del bn.forward
        if own is not None:
            bn.forward = own


def _normalised(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    batch = bn.training or bn.running_mean is None
    if batch:
        n = x.numel() // x.shape[1]
        if n == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        if bn.training and bn.track_running_stats:
            _update(bn, mean.detach(), var.detach() * (n / (n - 1)))
    else:
        assert bn.running_mean is not None and bn.running_var is not None
        # Changed in place by later calls.
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
    y = (x - mean[:, None, None]) / (var + bn.eps).sqrt()[:, None, None]
    if bn.weight is None:
        return y
    return y * bn.weight[:, None, None] + bn.bias[:, None, None]


def _update(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked += 1
    factor = bn.momentum if bn.momentum is not None else 1 / float(bn.num_batches_tracked)
    for running, new in ((bn.running_mean, mean), (bn.running_var, var)):
        assert running is not None
        running.copy_((1 - factor) * running + factor * new)


def projection(module: Projection, x: Tensor) -> Tensor:
    y: Tensor = call(module.bn, call(module.conv, x))
    return y


def cross_attention(module: CrossAttention, target: Tensor, source: Tensor) -> Tensor:
    queries, keys = module.query_project, module.key_project
    query = call(queries[1], F.relu(call(queries[0], target)))
    key = call(keys[1], F.relu(call(keys[0], source)))
    value = F.relu(call(module.value_project, source))
    slots = [[x.flatten(2)] for x in (query, key, value)]
    edges = [(0, 0, 0, 0)]
    if module.kind == "linear":
        [output] = operators.linear(*slots, edges).outputs
    else:
        [output] = operators.softmax(*slots, edges, heads=module.heads)[0]
    return output.unflatten(2, query.shape[2:])


def basic_block(module: BasicBlock, x: Tensor) -> Tensor:
    hidden = F.relu(call(module.bn1, call(module.conv1, x)))
    residual = call(module.bn2, call(module.conv2, hidden))
    shortcut = x if module.downsample is None else sequence(module.downsample, x)
    return F.relu(residual + shortcut)


def sequence(layers: nn.Module, x: Tensor) -> Tensor:
    """An `nn.Sequential` layer by layer, with its own hooks; anything else is called."""
    if type(layers) is not nn.Sequential:
        output: Tensor = call(layers, x)
        return output
    inputs: Any = (x,)
    for hook in layers._forward_pre_hooks.values():
        inputs = hook(layers, inputs)
    (x,) = inputs
    for layer in layers:
        x = call(layer, x)
    for hook in layers._forward_hooks.values():
        x = _hooked(hook(layers, inputs, x), x)
    return x


def cross_task(module: CrossTaskAttention, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs = {}
    for task in module.tasks:
        x, blocks = features[task], module.cross_attention[task]
        assert isinstance(blocks, nn.ModuleDict)
        parts = []
        for other in reversed([name for name in module.auxiliary_tasks if name != task]):
            parts += [x, call(blocks[other], x, features[other])]
        outputs[task] = x + call(module.dimensionality_reduction, torch.cat(parts, dim=1))
    return outputs


def cross_scale(module: nn.Module, features: Sequence[Tensor]) -> list[list[Tensor]]:
    rows = []
    for s in range(len(features) - 1):
        block = module.get_submodule(f"cross_scale_attention{s}")
        adapters = [module.get_submodule(f"upsample{r}{s}") for r in range(s + 1, len(features))]
        coarser = zip(adapters, features[s + 1 :], strict=True)
        rows.append([call(block, features[s], sequence(a, x)) for a, x in coarser])
    return rows


def head(module: CrossScaleHead, features: Sequence[Tensor]) -> Tensor:
    rows = cross_scale(module, features)
    parts = [torch.cat([x, y], 1) for x, row in zip(features, rows, strict=False) for y in row]
    size = features[0].shape[2:]
    resized = [
        F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (*parts, features[-1])
    ]
    return sequence(module.last_layer, torch.cat(resized, dim=1))


BODIES: dict[type[nn.Module], Callable[..., Any]] = {
    Projection: projection,
    CrossAttention: cross_attention,
    BasicBlock: basic_block,
    CrossTaskAttention: cross_task,
    CrossScaleHead: head,
    CrossScaleAttention: cross_scale,
}
