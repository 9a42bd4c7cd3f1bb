"""What users do to modules: batch norms in other modes, layers replaced, weights written to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels.modules import CrossAttention
from xattn_kernels.modules.layers import BasicBlock, Projection

from .draws import Draw
from .oracle_modules import Changed, Twice


class ChangedProjection(Changed, Projection):
    pass


class ChangedAttention(Changed, CrossAttention):
    pass


class ChangedBlock(Changed, BasicBlock):
    pass


class ChangedConvolution(Changed, nn.Conv2d):
    pass


class ChangedNorm(Changed, nn.BatchNorm2d):
    pass


class SampleNorm(nn.Module):
    """Every sample with its own statistics of all channels.

    Not by torch's layers (seen in 2.13): the backward pass of its group norm crashes where the
    input wants no gradient, and that of its instance norm is wrong for one sample in channels_last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.full((channels, 1, 1), 0.125))  # no kink of a relu

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        var = (x - mean).square().mean(dim=(1, 2, 3), keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt() * self.weight + self.bias


SUBCLASSES: dict[type, type] = {
    Projection: ChangedProjection,
    CrossAttention: ChangedAttention,
    BasicBlock: ChangedBlock,
    nn.Conv2d: ChangedConvolution,
    nn.BatchNorm2d: ChangedNorm,
}


def shrink(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 0.5 * output


def grow(module: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    return tuple(1.5 * x for x in inputs)


def damp(module: nn.Module, before: Any, after: Any) -> Any:
    """A hook of the gradients of a layer's inputs."""
    return tuple(None if g is None else 0.5 * g for g in before)


class Capture:
    """A hook that keeps what a layer gives, as code that looks at features does."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept.append(output)

    def __deepcopy__(self, memo: Any) -> Capture:
        return Capture()


def randomise(module: nn.Module, draw: Draw) -> None:
    """Batch norms as after training; convolutions keep what they were made with, scaled."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                size = part.num_features
                if part.weight is not None:
                    part.weight.copy_(0.5 + draw.uniform(size))
                    part.bias.copy_(0.4 * draw.uniform(size) - 0.2)
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.copy_(0.4 * draw.uniform(size) - 0.2)
                    part.running_var.copy_(0.5 + draw.uniform(size))
                    if part.num_batches_tracked is not None:
                        part.num_batches_tracked.fill_(draw.integer(0, 3))
            elif isinstance(part, nn.Conv2d):
                shape = part.weight.shape
                part.weight.copy_(draw.normal(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5)
                if part.bias is not None:
                    part.bias.copy_(0.2 * draw.normal(*part.bias.shape))


def parts_of(module: nn.Module, *kinds: type) -> list[tuple[str, nn.Module]]:
    """Those below `module` of exactly one of these classes, by name."""
    return [(n, m) for n, m in module.named_modules() if type(m) in kinds and n]


def parent_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    before, _, last = name.rpartition(".")
    return module.get_submodule(before), last


def replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, last = parent_of(module, name)
    parent.add_module(last, new)


# Batch norms.


def set_norms(module: nn.Module, draw: Draw) -> list[str]:
    """Some batch norms in other modes; what was done."""
    if draw.likely(0.6):
        return []
    norms = parts_of(module, nn.BatchNorm2d)
    few = draw.likely(0.6)
    if few:
        norms = [draw.one(norms) for _ in range(draw.integer(1, 2))]
    what = draw.one(["train", "eval", "either", "momentum", "average", "affine", "track", "eps"])
    for name, bn in norms:
        assert isinstance(bn, nn.BatchNorm2d)
        if what in ("train", "eval"):
            bn.train(what == "train")
        elif what == "either":
            bn.train(draw.likely(0.5))
        elif what == "momentum":
            bn.momentum = draw.one([0.0, 0.3, 1.0])
        elif what == "average":
            bn.momentum = None
        elif what == "eps":
            bn.eps = 1e-3
        else:
            options = {"affine": False} if what == "affine" else {"track_running_stats": False}
            new = nn.BatchNorm2d(bn.num_features, momentum=bn.momentum, **options)
            replace(module, name, new.train(bn.training))
    return [f"{what} {'of ' + ', '.join(n for n, _ in norms) if few else 'of all'}"]


# Layers.


def _hook(module: nn.Module, draw: Draw) -> str:
    kinds = (*SUBCLASSES, nn.Sequential, nn.ReLU)
    name, part = draw.one(parts_of(module, *kinds))
    what = draw.one(["forward", "before", "gradient", "capture"])
    if what == "forward":
        part.register_forward_hook(shrink)
    elif what == "capture":
        part.register_forward_hook(Capture())
    elif what == "before":
        part.register_forward_pre_hook(grow)
    else:
        name, part = draw.one(parts_of(module, nn.Conv2d, nn.BatchNorm2d))
        part.register_full_backward_hook(damp)
    return f"hook {what} of {name}"


def _instance(module: nn.Module, draw: Draw) -> str:
    name, part = draw.one(parts_of(module, *SUBCLASSES))
    part.forward = Twice(part)
    return f"forward of {name}"


def _subclass(module: nn.Module, draw: Draw) -> str:
    name, part = draw.one(parts_of(module, *SUBCLASSES))
    part.__class__ = SUBCLASSES[type(part)]
    return f"subclass of {name}"


def _own_subclass(module: nn.Module, draw: Draw) -> str:
    """Of the module itself."""
    if type(module) not in SUBCLASSES:
        return ""
    module.__class__ = SUBCLASSES[type(module)]
    return "subclass of the whole"


def _identity(module: nn.Module, draw: Draw) -> str:
    name, _ = draw.one(parts_of(module, nn.BatchNorm2d))
    replace(module, name, nn.Identity())
    return f"identity for {name}"


def _other_norm(module: nn.Module, draw: Draw) -> str:
    name, bn = draw.one(parts_of(module, nn.BatchNorm2d))
    assert isinstance(bn, nn.BatchNorm2d)
    replace(module, name, SampleNorm(bn.num_features))
    return f"norm by sample for {name}"


def _activation(module: nn.Module, draw: Draw) -> str:
    found = parts_of(module, nn.ReLU)
    if not found:
        return ""
    new = draw.one([nn.GELU(), nn.LeakyReLU(0.2), nn.Identity(), nn.ReLU(inplace=True), nn.SiLU()])
    replace(module, found[0][0], new)
    return f"{type(new).__name__} for {found[0][0]}"


def _convolution(module: nn.Module, draw: Draw) -> str:
    """Another convolution of the same width that keeps the size of maps."""
    name, old = draw.one(parts_of(module, nn.Conv2d))
    assert isinstance(old, nn.Conv2d)
    inner, outer, kernel = old.in_channels, old.out_channels, old.kernel_size[0]
    options: dict[str, Any] = draw.one(
        [
            {"kernel_size": 3, "padding": 1},
            {"kernel_size": 3, "padding": "same"},
            {"kernel_size": 3, "padding": 2, "dilation": 2},
            {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            {"kernel_size": kernel, "padding": kernel // 2, "bias": True},
            {"kernel_size": 1},
            {"kernel_size": 5, "padding": 2},
            {"kernel_size": (1, 3), "padding": (0, 1)},
            {"kernel_size": kernel, "padding": kernel // 2, "groups": 2},
        ]
    )
    if options.get("groups") and (inner % 2 or outer % 2):
        options["groups"] = 1
    bias = options.pop("bias", old.bias is not None)
    new = nn.Conv2d(inner, outer, **options, bias=bias)
    replace(module, name, new)
    return f"{options}, bias={bias} for {name}"


def _resized(module: nn.Module, draw: Draw) -> str:
    """Steps: of a residual block as in ResNets, or of an adapter between scales."""
    adapters = [n for n, m in parts_of(module, nn.Sequential) if n.startswith("upsample")]
    if isinstance(module, BasicBlock) and module.downsample is not None:
        module.conv1.stride = module.downsample[0].stride = (2, 2)
        return "steps of 2"
    if not adapters:
        return ""
    name = draw.one(adapters)
    layer = module.get_submodule(f"{name}.0")
    assert isinstance(layer, nn.Conv2d)
    what = draw.one(["stride", "padding"])
    setattr(layer, what, (2, 2) if what == "stride" else (1, 1))
    return f"{what} of {name}"


def _normed_weight(module: nn.Module, draw: Draw) -> str:
    name, part = draw.one(parts_of(module, nn.Conv2d))
    torch.nn.utils.parametrizations.weight_norm(part)
    return f"weight norm of {name}"


def _tied(module: nn.Module, draw: Draw) -> str:
    """One layer, or its weight, for two."""
    pairs = {
        frozenset((a, b))
        for a, m in parts_of(module, nn.Conv2d, nn.BatchNorm2d, Projection, CrossAttention)
        for b, o in parts_of(module, type(m))
        if a < b and _sizes(m) == _sizes(o) and not b.startswith(a) and _part(a) == _part(b)
    }
    if not pairs:
        return ""
    first, second = sorted(draw.one(sorted(pairs, key=sorted)))
    part = module.get_submodule(first)
    if isinstance(part, nn.Conv2d) and draw.likely(0.5):
        other = module.get_submodule(second)
        other.weight = part.weight
        return f"weight of {first} for {second}"
    replace(module, second, part)
    return f"{first} for {second}"


def _part(name: str) -> str:
    """Of the module; in which order two of these update what they share is nobody's promise."""
    first = name.partition(".")[0]
    return "" if first.endswith("_project") else first.rstrip("0123456789")


def _sizes(module: nn.Module) -> list[Any]:
    options = [getattr(module, n, None) for n in ("padding", "stride", "kind", "heads")]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [{name: x.shape for name, x in tensors}, options]


def _zero(module: nn.Module, draw: Draw) -> str:
    """Weights of a batch norm that are zero, as residual branches begin with."""
    name, bn = draw.one(parts_of(module, nn.BatchNorm2d))
    if bn.weight is None:
        return ""
    with torch.no_grad():
        bn.weight.zero_()
    return f"zero weight of {name}"


def _memory_format(module: nn.Module, draw: Draw) -> str:
    module.to(memory_format=torch.channels_last)
    return "channels_last"


CHANGES: tuple[Callable[[nn.Module, Draw], str], ...] = (
    _hook,
    _instance,
    _subclass,
    _own_subclass,
    _identity,
    _other_norm,
    _activation,
    _convolution,
    _resized,
    _normed_weight,
    _tied,
    _zero,
    _memory_format,
)


def change_layers(module: nn.Module, draw: Draw) -> list[str]:
    """Change some layers; what was done."""
    done: list[str] = []
    if draw.likely(0.6):
        return done
    for _ in range(draw.weighted({1: 4.0, 2: 1.0})):
        done.append(draw.one(CHANGES)(module, draw))
    return [text for text in done if text]


# Writing.


def _data(module: nn.Module, draw: Draw) -> None:
    for p in module.parameters():
        p.data.mul_(0.75).add_(0.01)


def _ema(module: nn.Module, draw: Draw) -> None:
    other = copy.deepcopy(module)
    randomise(other, draw)
    with torch.no_grad():
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            p.lerp_(q, 0.5)


def _copied(module: nn.Module, draw: Draw) -> None:
    randomise(module, draw)


def _optimiser(module: nn.Module, draw: Draw) -> None:
    wanted = [p for p in module.parameters() if p.requires_grad]
    if not wanted:
        return
    optimiser = draw.one([torch.optim.SGD, torch.optim.AdamW])(wanted, lr=0.02)
    for p in wanted:
        p.grad = torch.ones_like(p)
    optimiser.step()
    optimiser.zero_grad()


def _numpy(module: nn.Module, draw: Draw) -> None:
    for p in module.parameters():
        if p.dtype in (torch.float32, torch.float64):
            p.detach().numpy()[...] *= 0.75
        else:
            p.data.mul_(0.75)


def _swapped(module: nn.Module, draw: Draw) -> None:
    for p in module.parameters():
        p.data = (p.data * 0.75).clone()


def _loaded(module: nn.Module, draw: Draw) -> None:
    state = {k: v * 0.75 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=draw.likely(0.3))


def _new_parameters(module: nn.Module, draw: Draw) -> None:
    for part in [*module.modules()]:
        for name, p in [*part.named_parameters(recurse=False)]:
            setattr(part, name, nn.Parameter(p.detach() * 0.75, p.requires_grad))


def _statistics(module: nn.Module, draw: Draw) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
            part.running_var.data.mul_(1.5)
            part.running_mean += 0.125


def _moved(module: nn.Module, draw: Draw) -> None:
    dtype = next(module.parameters()).dtype
    module.to(torch.float64).to(dtype)


WRITES: dict[str, Callable[[nn.Module, Draw], None]] = {
    "nothing": lambda module, draw: None,
    "data": _data,
    "moving average": _ema,
    "copies": _copied,
    "optimiser": _optimiser,
    "numpy": _numpy,
    "new data": _swapped,
    "load_state_dict": _loaded,
    "new parameters": _new_parameters,
    "statistics": _statistics,
    "to": _moved,
}

ALLOWED_WHILE_FROZEN = ("nothing", "load_state_dict", "to")
