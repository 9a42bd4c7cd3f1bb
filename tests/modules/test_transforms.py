"""torch.func: the transforms that torch's layers support work, the others raise torch's error."""

from __future__ import annotations

import pytest
import torch

from . import support


def stacked(pair: support.Pair) -> tuple:
    return support.tree_map(lambda x: torch.stack([x, 0.5 * x]), pair.arguments)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", support.CLASSES)
def test_vmap(name: str, gradient: bool) -> None:
    pair = support.make(name, training=False, requires_grad=False)
    arguments = stacked(pair)
    with torch.set_grad_enabled(gradient):
        outputs = torch.vmap(pair.ours)(*arguments)
        for i in range(2):
            expected = pair.theirs(*support.tree_map(lambda x, i=i: x[i], arguments))
            actual = support.tree_map(lambda x, i=i: x[i], outputs)
            assert support.distance(actual, expected) <= 1e-9


@pytest.mark.parametrize("name", support.CLASSES)
def test_vmap_cannot_train(name: str) -> None:
    """Running statistics have no place for several batches."""
    pair = support.make(name, requires_grad=False)
    with pytest.raises(RuntimeError, match="running_mean or running_var"):
        torch.vmap(pair.ours)(*stacked(pair))


@pytest.mark.parametrize("name", support.CLASSES)
def test_grad_of_functional_call(name: str) -> None:
    pair = support.make(name, training=False, requires_grad=False)
    parameters = {key: p.detach() for key, p in pair.ours.named_parameters()}

    def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
            outputs = torch.func.functional_call(module, values, pair.arguments)
            return sum(y.square().sum() for y in support.tensors(outputs))

        return torch.func.grad(loss)(parameters)

    assert support.distance(gradients(pair.ours), gradients(pair.theirs)) <= 1e-9


def test_forward_mode() -> None:
    pair = support.make("CrossAttention", training=False, requires_grad=False)
    tangents = tuple(torch.ones_like(x) for x in pair.arguments)
    ours = torch.func.jvp(pair.ours, pair.arguments, tangents)
    theirs = torch.func.jvp(pair.theirs, pair.arguments, tangents)
    assert support.distance(ours, theirs) <= 1e-9
