"""What `xattn_kernels.convert` knows: blocks of other code, and what stands for them.

A block is recognised by the names of its submodules. Its replacement is one of this library's
modules that holds the block's own layers, the same objects.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from xattn_kernels.convert.code import Left, is_idle
from xattn_kernels.convert.settings import CALL_HOOKS
from xattn_kernels.convert.swapped import (
    Converted,
    ConvertedCrossAttention,
    ConvertedCrossScaleHead,
    ConvertedCrossTaskAttention,
    ConvertedResidualBlock,
)
from xattn_kernels.modules import (
    CrossAttention,
    CrossScaleAttention,
    CrossScaleHead,
    CrossTaskAttention,
)
from xattn_kernels.modules.layers import BasicBlock

KINDS = ("cross_attention", "cross_task_attention", "cross_scale_head", "residual_block")
"""What is looked for: `CrossAttention`, `CrossTaskAttention`, `CrossScaleHead`, `BasicBlock`."""
OURS = (CrossAttention, CrossTaskAttention, CrossScaleAttention, CrossScaleHead, BasicBlock)

_CLASSES = {
    "GlobalContextAttentionBlock": "cross_attention",
    "MultiTaskDistillationModule": "cross_task_attention",
}
_EPS = 1e-12
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_LAYERS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Conv2d: (nn.Conv2d,),
    nn.BatchNorm2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    nn.ReLU: (nn.ReLU,),
}
_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_STATELESS = (nn.ReLU, nn.Softplus, nn.Identity, nn.Upsample)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HOOKS = CALL_HOOKS + _STATE_HOOKS


def kind_of(module: nn.Module) -> str | None:
    """The kind of `KINDS` that a module looks like, by its class or what it is made of."""
    children = module._modules.keys()
    if children >= {"dimensionality_reduction", "cross_attention"}:
        return "cross_task_attention"
    if "last_layer" in children and any(c.startswith("cross_scale_attention") for c in children):
        return "cross_scale_head"
    if children >= {"query_project", "key_project", "value_project"}:
        return "cross_attention"
    layers = {"conv1", "bn1", "conv2", "bn2"}
    if children >= layers and not any(
        _has_layers(child)
        for name, child in module._modules.items()
        if child is not None and name not in layers | {"downsample"}
    ):
        return "residual_block"
    return _CLASSES.get(type(module).__name__)


def _has_layers(module: nn.Module) -> bool:
    """Whether there are layers in it of the kinds that residual blocks are made of."""
    norm = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(part, norm) or (isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1))
        for part in module.modules()
    )


def assemble(original: nn.Module, kind: str) -> Converted:
    """The replacement of a block of a kind, made of its layers.

    Raises:
        Left: if anything cannot be carried over exactly.
    """
    with torch.device("meta"):  # neither memory nor random numbers: its own layers go
        module = _BLUEPRINTS[kind](original)
    _check_state(original, module)
    carried = [p for p, m in module.named_modules() if p == "" or isinstance(m, CrossAttention)]
    shared = [p for p, m in module.named_modules(remove_duplicate=False) if not m._modules]
    _check_modules(original, module, carried, shared)
    for path in shared:
        parent, _, name = path.rpartition(".")
        module.get_submodule(parent)._modules[name] = original.get_submodule(path)
    for path, mine in module.named_modules(remove_duplicate=False):
        its = original.get_submodule(path)
        if not isinstance(mine, nn.Sequential | nn.ModuleDict | nn.ModuleList):
            order = [name for name in its._modules if name in mine._modules]
            mine._modules = {name: mine._modules[name] for name in order}
    if list(module.state_dict()) != list(original.state_dict()):
        raise Left("its parameters come in another order")
    module.stand_for(original, _arguments(original, kind), shared)
    return module


def _cross_attention(original: nn.Module) -> ConvertedCrossAttention:
    return ConvertedCrossAttention(_shape(original, "query_project.0.conv.weight")[0])


def _cross_task(original: nn.Module) -> ConvertedCrossTaskAttention:
    channels = _shape(original, "dimensionality_reduction.conv1.weight")[0]
    cross_attention = original._modules.get("cross_attention")
    rows = {}
    for task, row in cross_attention.named_children() if cross_attention is not None else ():
        rows[task] = [name for name, _ in row.named_children()]
    sources = _sources(rows)
    try:
        return ConvertedCrossTaskAttention(list(rows), channels, sources)
    except ValueError as error:
        raise Left(str(error)) from error


def _sources(rows: Mapping[str, Sequence[str]]) -> list[str]:
    """All sources in the order that the rows have, each of which lacks its own task."""
    if rows:
        first, others = next(iter(rows.items()))
        for place in range(len(others) + 1):
            sources = [*others[:place], first, *others[place:]]
            if all([s for s in sources if s != task] == row for task, row in rows.items()):
                return sources
    raise Left(f"its targets do not attend to the same tasks in one order: {dict(rows)}")


def _head(original: nn.Module) -> ConvertedCrossScaleHead:
    blocks = [c for c in original._modules if c.startswith("cross_scale_attention")]
    count = len(blocks)
    weight = "query_project.0.conv.weight"
    widths = [_shape(original, f"cross_scale_attention{s}.{weight}")[0] for s in range(count)]
    widths.append(_shape(original, f"upsample{count}{count - 1}.0.weight")[1])
    outputs = _shape(original, "last_layer.3.weight")[0]
    return ConvertedCrossScaleHead(widths, outputs)


def _residual_block(original: nn.Module) -> ConvertedResidualBlock:
    out_channels, in_channels, *_ = _shape(original, "conv1.weight")
    shortcut = original._modules.get("downsample") is not None
    if not shortcut and in_channels != out_channels:
        raise Left("its width changes without a projected shortcut")
    for name in ("conv1", "conv2"):
        convolution = original._modules[name]
        plain = isinstance(convolution, nn.Conv2d) and (
            convolution.kernel_size == (3, 3)
            and convolution.padding in (1, (1, 1))
            and convolution.stride == convolution.dilation == (1, 1)
            and convolution.groups == 1
            and convolution.padding_mode == "zeros"
        )
        if not plain:
            raise Left(f"its {name} is no 3x3 convolution of stride 1")
    return ConvertedResidualBlock(in_channels, out_channels, 0.1, shortcut=shortcut)


_BLUEPRINTS = {
    "cross_attention": _cross_attention,
    "cross_task_attention": _cross_task,
    "cross_scale_head": _head,
    "residual_block": _residual_block,
}


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    path, _, leaf = name.rpartition(".")
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            raise Left(f"it has no {name}")
        module = child
    value = getattr(module, leaf, None)
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise Left(f"its {name} is not the weight of a convolution")
    return tuple(value.shape)


def _check_state(original: nn.Module, module: nn.Module) -> None:
    """Names and shapes of parameters and buffers; statistics may be missing."""
    its, mine = _tensors(original), _tensors(module)
    missing = [k for k in mine if k not in its and not k.endswith(_STATISTICS)]
    if missing:
        raise Left(f"it has no {_some(missing)}")
    further = [k for k in its if k not in mine]
    if further:
        raise Left(f"it has further parameters or buffers: {_some(further)}")
    for name, x in its.items():
        if x.shape != mine[name].shape:
            raise Left(
                f"its {name} is {tuple(x.shape)}, where {tuple(mine[name].shape)} is expected"
            )


def _check_modules(
    original: nn.Module, module: nn.Module, carried: Sequence[str], shared: Sequence[str]
) -> None:
    """Layers, what is between them, hooks, and settings that only the attention has."""
    its = dict(original.named_modules(remove_duplicate=False))
    for path in shared:
        layer = module.get_submodule(path)
        expected = _LAYERS[type(layer)]
        if path not in its or type(its[path]) not in expected:
            found = type(its[path]).__name__ if path in its else "missing"
            raise Left(f"its {path} is {found}, where {expected[0].__name__} is expected")
        for name in _CONVOLUTION if isinstance(layer, nn.Conv2d) else ():
            found, wanted = getattr(its[path], name), getattr(layer, name)
            if found != wanted:
                raise Left(f"its {path} has {name} {found}, where {wanted} is expected")
    mine = dict(module.named_modules(remove_duplicate=False))
    missing = [path for path in mine if path not in its]
    if missing:
        raise Left(f"it has no {_some(missing)}")
    for path, part in its.items():
        where = path or "the block itself"
        if path not in mine and not (isinstance(part, _STATELESS) or is_idle(part)):
            raise Left(f"it has an unknown submodule {path} ({type(part).__name__})")
        eps = getattr(part, "eps", _EPS) if path in carried else _EPS
        if eps != _EPS:
            raise Left(f"the eps of {where} is {eps}, where {_EPS} is expected")
        if path in shared:
            continue
        hooks = HOOKS if path not in carried else _STATE_HOOKS
        if any(part.__dict__[name] for name in hooks):
            raise Left(f"hooks on {where} would not run")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(
        itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
    )


def _arguments(original: nn.Module, kind: str) -> tuple[str, ...]:
    """Names of the arguments of `forward`; none if it does not tell."""
    for path, module in original.named_modules():
        where = f"of {path} " if path else ""
        if "forward" in vars(module):
            raise Left(f"the method forward {where}was replaced on the instance")
        if module._compiled_call_impl is not None:
            raise Left(f"a module of it {where}was compiled; convert before compiling")
    count = 2 if kind == "cross_attention" else 1
    parameters = list(inspect.signature(type(original).forward).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    if len(positional) != count or len(parameters) != count:
        raise Left(
            f"its forward takes ({', '.join(map(str, parameters))}), where {count} "
            f"argument{'s are' if count > 1 else ' is'} expected"
        )
    return tuple(positional)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
