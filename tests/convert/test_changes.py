"""Blocks that are changed after they were swapped compute what the model's own would."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from xattn_kernels.convert import convert_, revert_
from xattn_kernels.convert.swapped import Converted
from xattn_kernels.testing import op_by_op
from xattn_models import op_by_op as network

from .support import TASKS, Attention, Residual, randomise

FACTOR = 1


def bounded(limit: float | None) -> Callable[[Tensor], Tensor]:
    """A relu with an upper bound, if there is any."""
    return lambda x: F.relu(x) if limit is None else x.clamp(0, limit)


class Block(Residual):
    """A residual block with some settings of its own."""

    last = True

    def __init__(self) -> None:
        shortcut = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
        super().__init__(relu=nn.ReLU(), drop=nn.Dropout(0.0), downsample=shortcut)
        self.scale: float | None = None
        self.function = F.relu
        self.bounded = bounded(None)

    def activate(self, x: Tensor) -> Tensor:
        functions = F  # a module may be a value as well
        return self.relu(x) if FACTOR == 1 else functions.relu(FACTOR * x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.bn2(self.conv2(self.activate(self.bn1(self.conv1(x))))))
        y = y + self.downsample(x) if self.scale is None else y * self.scale + x
        return self.function(self.bounded(y)) if self.last else y


class Features(nn.Module):
    """A cross-task module that takes its features one by one, as the tests give them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = network.MultiTaskDistillationModule(TASKS, TASKS, 4)

    def forward(self, *features: Tensor) -> Tensor:
        found = self.block({f"features_{t}": x for t, x in zip(TASKS, features, strict=True)})
        return torch.cat([*found.values()], dim=1)


class Pyramid(nn.Module):
    """A head that takes its scales one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = op_by_op.CrossScaleHead((4, 6), 2)

    def forward(self, *features: Tensor) -> Tensor:
        return self.block(features)


class Alone(nn.Module):
    """A block and nothing else."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *features: Tensor) -> Tensor:
        return self.block(*features)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Alone(Block()),
    "attention": lambda: Alone(Attention(4)),
    "tasks": Features,
    "scales": Pyramid,
}
SHAPES = {
    "residual": [(6, 7, 8)],
    "attention": [(4, 5, 6), (4, 4, 5)],
    "tasks": [(4, 5, 6)] * 3,
    "scales": [(4, 6, 8), (6, 3, 4)],
}


def models(kind: str) -> tuple[nn.Module, nn.Module]:
    """One that was converted, and one that was not."""
    torch.manual_seed(0)
    plain = randomise(MODELS[kind]()).double()
    converted = copy.deepcopy(plain)
    [entry] = convert_(converted)
    assert entry.replacement, entry.reason
    return converted, plain


def results(model: nn.Module, kind: str) -> list[Tensor]:
    """Outputs in inference; outputs, gradients and statistics in training."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn((2, *shape), generator=generator, dtype=torch.float64).requires_grad_()
        for shape in SHAPES[kind]
    ]
    with torch.no_grad():
        found = [model.eval()(*inputs)]
    torch.manual_seed(2)
    y = model.train()(*inputs)
    parameters = [p for _, p in sorted(model.named_parameters())]
    found += [y, *torch.autograd.grad(y.square().sum(), [*inputs, *parameters], allow_unused=True)]
    found += [b.double().clone() for _, b in sorted(model.named_buffers())]
    return [torch.zeros(()) if x is None else x.detach() for x in found]


def assert_alike(model: nn.Module, plain: nn.Module, kind: str) -> None:
    for x, y in zip(results(model, kind), results(plain, kind), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7 * float(y.abs().max()) + 1e-12)


def runs_original(model: nn.Module) -> bool:
    assert isinstance(model.block, Converted)
    return model.block._original.is_changed()


def dilate(layer: nn.Module) -> None:
    layer.dilation = layer.padding = (2, 2)


def wrap_forward(layer: nn.Module) -> None:
    """As libraries do that move tensors between devices around a call."""
    forward = layer.forward
    layer.forward = lambda *args: 2 * forward(*args)


def hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: 2 * output)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "dilated": ("residual", lambda b: dilate(b.conv1)),
    "padded otherwise": ("residual", lambda b: setattr(b.conv2, "padding_mode", "circular")),
    "larger kernel": (
        "residual",
        lambda b: setattr(b, "conv1", nn.Conv2d(6, 6, 5, padding=2).double()),
    ),
    "other size": (
        "residual",
        lambda b: (
            setattr(b, "conv1", nn.Conv2d(6, 6, 3).double()),
            setattr(b, "conv2", nn.Conv2d(6, 6, 3, padding=2).double()),
        ),
    ),
    "shortcut": ("residual", lambda b: setattr(b, "downsample", nn.Identity())),
    "strided and back": (
        "residual",
        lambda b: setattr(b.downsample[0], "padding_mode", "reflect"),
    ),
    "no norm": ("residual", lambda b: setattr(b, "bn1", nn.Identity())),
    "activation": ("residual", lambda b: setattr(b, "relu", nn.ReLU6())),
    "setting of an activation": ("residual", lambda b: setattr(b, "relu", nn.LeakyReLU(0.3))),
    "function": ("residual", lambda b: setattr(b, "function", torch.sigmoid)),
    "function in a closure": ("residual", lambda b: setattr(b, "bounded", bounded(0.5))),
    "dropout": ("residual", lambda b: setattr(b.drop, "p", 0.5)),
    "attribute": ("residual", lambda b: setattr(b, "scale", 0.5)),
    "attribute of the class": ("residual", lambda b: setattr(b, "last", False)),
    "forward of a layer": ("residual", lambda b: wrap_forward(b.conv2)),
    "forward of a norm": ("residual", lambda b: wrap_forward(b.bn2)),
    "forward of an activation": ("residual", lambda b: wrap_forward(b.relu)),
    "hook on an activation": ("residual", lambda b: hook(b.relu)),
    "class of a layer": ("residual", lambda b: setattr(b.conv1, "__class__", Doubled)),
    "method": ("residual", lambda b: setattr(b, "activate", lambda x: F.relu6(b.bn1(x)))),
    "parametrised": ("residual", lambda b: parametrizations.weight_norm(b.conv1)),
    "a part's activation": (
        "attention",
        lambda b: setattr(b, "rectify", F.relu6),
    ),
    "a part's layer": (
        "attention",
        lambda b: setattr(b.value_project, "conv", nn.Conv2d(4, 4, 3, padding=1).double()),
    ),
    "a part": ("attention", lambda b: setattr(b, "value_project", nn.Identity())),
    "hook on a part": ("attention", lambda b: hook(b.query_project[0])),
    "forward of a part": ("attention", lambda b: wrap_forward(b.key_project[1])),
    "kind of an inner block": (
        "tasks",
        lambda b: setattr(b.cross_attention["depth"]["normals"], "kind", "softmax"),
    ),
    "tasks": ("tasks", lambda b: setattr(b, "tasks", [*b.tasks][::-1])),
    "inner layer": ("tasks", lambda b: wrap_forward(b.dimensionality_reduction.conv1)),
    "inner block": (
        "scales",
        lambda b: setattr(b.cross_scale_attention0, "kind", "softmax"),
    ),
    "last layers": ("scales", lambda b: b.last_layer.__setitem__(2, nn.GELU())),
    "adapter": ("scales", lambda b: b.upsample10.append(nn.ReLU())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed(name: str) -> None:
    kind, change = CHANGES[name]
    model, plain = models(kind)
    assert_alike(model, plain, kind)
    assert not runs_original(model)
    for block in (model.block, plain.block):
        torch.manual_seed(3)
        change(block)
    assert_alike(model, plain, kind)
    assert runs_original(model)
    # The model's own block has it all when it comes back.
    revert_(model)
    assert not isinstance(model.block, Converted)
    assert_alike(model, plain, kind)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b.bn1, "eps", 0.1),
        lambda b: setattr(b.bn2, "momentum", 0.9),
        lambda b: setattr(b.bn2, "momentum", None),
        lambda b: setattr(b, "remark", "mine"),
        lambda b: setattr(b.conv1, "remark", "mine"),
        lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(6).double())),
        lambda b: setattr(b.bn1, "weight", None),
        lambda b: b.requires_grad_(False).conv1.requires_grad_(),
        lambda b: hook(b.conv1),
        lambda b: prune.ln_structured(b.conv2, "weight", 0.5, n=2, dim=0),
    ],
)
def test_what_replacements_know_of(change: Callable[[Any], object]) -> None:
    model, plain = models("residual")
    for block in (model.block, plain.block):
        change(block)
        block.requires_grad_()
    assert_alike(model, plain, "residual")
    assert not runs_original(model)


def test_on_the_models_own_block() -> None:
    """A reference to it may be held elsewhere."""
    torch.manual_seed(0)
    plain = randomise(Alone(Block())).double()
    model = copy.deepcopy(plain)
    own = model.block
    convert_(model)
    results(model, "residual")
    results(plain, "residual")
    own.scale = plain.block.scale = 0.5
    assert_alike(model, plain, "residual")
    assert runs_original(model)


def test_constants_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = models("residual")
    monkeypatch.setitem(globals(), "FACTOR", 2)
    assert_alike(model, plain, "residual")
    assert runs_original(model)
    monkeypatch.setitem(globals(), "FACTOR", 1)
    assert not runs_original(model)
    monkeypatch.setattr(Block, "last", False)
    assert_alike(model, plain, "residual")
    assert runs_original(model)


def test_methods_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = models("residual")
    monkeypatch.setattr(Block, "activate", lambda self, x: F.relu6(x))
    assert_alike(model, plain, "residual")
    assert runs_original(model)


def test_changed_and_back() -> None:
    model, plain = models("residual")
    for value in (0.5, None, 0.25, None):
        model.block.scale = plain.block.scale = value
        assert_alike(model, plain, "residual")
        assert model.block.scale == value
        assert runs_original(model) == (value is not None)
    relu = model.block.relu
    model.block.relu = nn.GELU()
    assert runs_original(model)
    model.block.relu = relu
    assert not runs_original(model)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_notice(through: Callable[[nn.Module], nn.Module]) -> None:
    """Copies of unchanged and of changed blocks."""
    model, plain = models("attention")
    other, same = through(model), through(plain)
    for m in (other, same):
        torch.manual_seed(3)
        m.block.value_project.conv = nn.Conv2d(4, 4, 3, padding=1).double()
    assert_alike(other, same, "attention")
    assert runs_original(other) and not runs_original(model)
    again, same = through(other), through(same)
    assert_alike(again, same, "attention")
    assert runs_original(again)
    assert_alike(model, plain, "attention")


def test_saved_whole() -> None:
    model, plain = models("attention")
    for m in (model, plain):
        m.block.divide = torch.mul
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_alike(loaded, plain, "attention")
    assert runs_original(loaded)


def test_modes_and_hooks_of_changed_blocks() -> None:
    """The block's own modules train or not as the model does, hooks run once."""
    model, plain = models("residual")
    calls: list[str] = []
    model.block.register_forward_hook(lambda *_: calls.append("block"))
    model.block.drop.p = plain.block.drop.p = 0.5
    assert_alike(model, plain, "residual")
    assert calls == ["block"] * 2
    assert model.block._original.block.drop.training
    model.eval()(torch.zeros(1, 6, 4, 4).double())
    assert not model.block._original.block.drop.training


def test_synchronised_norms_are_no_change() -> None:
    model, _ = models("attention")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.eval()(*(torch.zeros(2, *shape).double() for shape in SHAPES["attention"]))
    assert not runs_original(model)


def test_both_levels() -> None:
    """Inner blocks that were swapped before the outer one."""
    torch.manual_seed(0)
    plain = randomise(Features()).double()
    model = copy.deepcopy(plain)
    convert_(model, kinds=["cross_attention"])
    convert_(model)
    assert isinstance(model.block, Converted)
    assert_alike(model, plain, "tasks")
    for block in (model.block, plain.block):
        torch.manual_seed(3)
        inner = block.cross_attention["depth"]["normals"]
        inner.value_project.conv = nn.Conv2d(4, 4, 3, padding=1).double()
    assert_alike(model, plain, "tasks")
    assert runs_original(model)
    revert_(model)
    assert not any(isinstance(m, Converted) for m in model.modules())
    assert_alike(model, plain, "tasks")


def test_compiled() -> None:
    model, plain = models("residual")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        for change in (lambda b: None, lambda b: dilate(b.conv1)):
            for m in (model, plain):
                change(m.eval().block)
            torch.testing.assert_close(compiled(x), plain(x))


def test_replica_of_a_changed_block() -> None:
    """Copies that share their settings, but not their layers, with the block they are made of."""
    model, _ = models("residual")
    replica = model.block._replicate_for_data_parallel()
    replica._former_parameters = {}  # as `torch.nn.parallel.replicate` does
    x = torch.zeros(1, 6, 4, 4).double()
    assert replica.eval()(x).shape == x.shape
    dilate(model.block.conv1)
    with pytest.raises(RuntimeError, match="ConvertedResidualBlock: got a block that was changed"):
        replica(x)
