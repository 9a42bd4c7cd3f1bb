"""Networks as users have them, for the tests of `xattn_kernels.convert`."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels.testing import op_by_op
from xattn_models import op_by_op as network

TASKS = ("semseg", "depth", "normals")
OUTPUTS = {"semseg": 5, "depth": 1, "normals": 3}
WIDTHS = (6, 12, 24, 48)


class Pyramid(nn.Module):
    """A backbone of hardly any size."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = SimpleNamespace(channels=partial(list, WIDTHS))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1)
            for a, b, s in zip((3, *WIDTHS), WIDTHS, (4, 2, 2, 2), strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
            maps.append(x)
        return maps


def whole_network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = network.SCAMTL(TASKS, OUTPUTS, backbone=Pyramid(), **options)
    return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return model


class Layer(nn.Module):
    """Convolution, norm and activation under the names of mmcv's ConvModule."""

    def __init__(self, a: int, b: int, activation: nn.Module, **norm: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, b, 1, bias=False)
        self.bn = nn.BatchNorm2d(b, **norm)
        self.activate = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class GlobalContextAttentionBlock(nn.Module):
    """As ATRC writes it: activations are modules, keys come first, widths may change."""

    eps = 1e-12

    def __init__(
        self,
        channels: int,
        width: int | None = None,
        *,
        value: nn.Module | None = None,
        query: nn.Module | None = None,
        **norm: Any,
    ) -> None:
        super().__init__()
        width = width or channels
        query = query or nn.Softplus()
        self.key_project = nn.Sequential(
            Layer(channels, width, nn.ReLU()), Layer(width, width, nn.Softplus())
        )
        self.query_project = nn.Sequential(
            Layer(channels, width, nn.ReLU()), Layer(width, width, query)
        )
        self.value_project = Layer(channels, width, value or nn.ReLU(), **norm)

    def forward(self, target_task_feats: Tensor, source_task_feats: Tensor) -> Tensor:
        query = self.query_project(target_task_feats).flatten(2)
        key = self.key_project(source_task_feats).flatten(2)
        value = self.value_project(source_task_feats).flatten(2)
        weights = (query.transpose(1, 2) @ key.sum(2, keepdim=True)).transpose(1, 2)
        y = (value @ key.transpose(1, 2)) @ query / weights.clamp_min(self.eps)
        return y.unflatten(2, target_task_feats.shape[2:])


class Attention(nn.Module):
    """The same in parts, for others to replace one of them."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        layers = [op_by_op.Projection(channels, channels) for _ in range(5)]
        self.query_project = nn.ModuleList(layers[:2])
        self.key_project = nn.ModuleList(layers[2:4])
        self.value_project = layers[4]

    def rectify(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def activate(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def divide(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        return numerator / denominator.clamp_min(1e-12)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = self.activate(query), self.activate(key)
        denominator = key.sum(dim=2).unsqueeze(1) @ query
        return self.divide((value @ key.mT) @ query, denominator)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        query = self.query_project[1](self.rectify(self.query_project[0](target)))
        key = self.key_project[1](self.rectify(self.key_project[0](source)))
        value = self.rectify(self.value_project(source))
        return self.attend(query.flatten(2), key.flatten(2), value.flatten(2)).view_as(target)


class Residual(nn.Module):
    """A residual block in parts, for others to replace one of them."""

    def __init__(self, channels: int = 6, **others: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        for name, module in others.items():
            setattr(self, name, module)

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.activate(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.add(self.body(x), x))


class Pair(nn.Module):
    """A model around one block for two maps."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 1)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.block(x, x[:, :, ::2, ::2])


def pair(block: nn.Module | None = None) -> Pair:
    torch.manual_seed(0)
    model = Pair(GlobalContextAttentionBlock(8) if block is None else block)
    randomise(model)
    return model


def image(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (64, 96)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((2, 3, *size), generator=generator).to(dtype)


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = model(x)
    if isinstance(found, Tensor):
        return {"": found}
    deep = found["deep_supervision"]
    result = {task: found[task] for task in model.tasks}
    return result | {f"{s}.{key}": y for s, ys in deep.items() for key, y in ys.items()}


def inference(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return outputs(model.eval(), x)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and statistics of one training step."""
    torch.manual_seed(1)
    model.train().zero_grad()
    found = outputs(model, x)
    sum((i + 1) * y.square().mean() for i, y in enumerate(found.values())).backward()
    return {
        **{f"output {k}": y.detach() for k, y in found.items()},
        **{f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None},
        **{f"buffer {k}": b.double().clone() for k, b in model.named_buffers()},
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative L2 distance; what is rounding beside the largest tensor counts as that."""
    assert list(found) == list(expected)
    floor = 1e-8 * max(float(x.norm()) for x in expected.values())
    return max(
        float((found[name] - x).norm()) / max(float(x.norm()), floor)
        for name, x in expected.items()
    )


def identities(model: nn.Module) -> list[tuple[str, int]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(x)) for name, x in tensors]


def tree(model: nn.Module) -> list[tuple[str, int, bool]]:
    return [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
