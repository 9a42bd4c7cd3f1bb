"""Ways of writing weights: whatever wrote them, the next result uses them.

Each writes to a module that has computed in evaluation mode; the truth is a fresh module that loads
the values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from xattn_kernels import freeze_, frozen, unfreeze_
from xattn_kernels.modules.freezing import Freezable

from .subjects import SUBJECTS, draw, error, make


def parameters(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.is_floating_point()]


def by_data(module: nn.Module) -> None:
    """As code for exponential moving averages does."""
    for p in parameters(module):
        p.data.mul_(0.75).add_(0.01)


def by_replacing_data(module: nn.Module) -> None:
    for p in parameters(module):
        p.data = p.data * 0.75


def by_numpy(module: nn.Module) -> None:
    for p in parameters(module):
        p.detach().numpy()[...] *= 0.75


def by_dlpack(module: nn.Module) -> None:
    for p in parameters(module):
        torch.from_dlpack(p.detach()).mul_(0.75)


def by_fused_optimiser(module: nn.Module) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    optimiser.zero_grad()


def by_swap(module: nn.Module) -> None:
    """As weights are exchanged with their averages for evaluation."""
    for p in parameters(module):
        p.data, _ = (p.data * 0.75).clone(), p.data


def by_new_parameters(module: nn.Module) -> None:
    for part in [*module.modules()]:
        for name, p in [*part.named_parameters(recurse=False)]:
            setattr(part, name, nn.Parameter(p.detach() * 0.75, requires_grad=p.requires_grad))


def by_loading(module: nn.Module) -> None:
    module.load_state_dict(
        {k: v * 0.75 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    )


def by_assigning(module: nn.Module) -> None:
    state = {k: v * 0.75 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def by_statistics(module: nn.Module) -> None:
    """As batch norms are recalibrated: in training, alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(17)
    for norm in norms:
        norm.train()
        for _ in range(3):
            norm(torch.randn(4, norm.num_features, 5, 5, generator=generator) * 2 + 1)
        norm.eval()


def by_buffer_data(module: nn.Module) -> None:
    for b in module.buffers():
        if b.is_floating_point():
            b.data.mul_(1.5)


def by_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        for p in parameters(module):
            p.mul_(0.75)


def by_broadcast(module: nn.Module) -> None:
    for x in (*module.parameters(), *module.buffers()):
        if x.is_floating_point():
            other = [torch.full_like(x, 0.0)]
            dist.all_gather(other, (x.detach() * 0.75))
            dist.broadcast(x.data.copy_(other[0]), 0)


def by_all_reduce(module: nn.Module) -> None:
    for x in (*module.parameters(), *module.buffers()):
        if x.is_floating_point():
            dist.all_reduce(x.detach(), op=dist.ReduceOp.SUM)
            x.detach().view(-1).numpy()[:] *= 0.75


WRITES = (
    by_data,
    by_replacing_data,
    by_numpy,
    by_dlpack,
    by_fused_optimiser,
    by_swap,
    by_new_parameters,
    by_loading,
    by_assigning,
    by_statistics,
    by_buffer_data,
    by_inference_mode,
    by_broadcast,
    by_all_reduce,
)


@pytest.fixture
def group(tmp_path: Path) -> object:
    """One process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_next_result_uses_what_was_written(
    write: Callable[[nn.Module], None], name: str, group: object
) -> None:
    module, maps = make(name)
    x = draw(maps)
    with torch.no_grad():
        before = module(*x)
        for _ in range(2):
            module(*x)
    with torch.enable_grad():
        write(module) if write is by_fused_optimiser else torch.no_grad()(write)(module)
    fresh, _ = make(name, seed=1)
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        after = module(*x)
        assert error(after, fresh(*x)) <= 1e-6
    assert error(after, before) > 1e-3, "nothing was written"


@pytest.mark.parametrize("name", SUBJECTS)
def test_frozen_weights_are_kept_until_unfrozen(name: str) -> None:
    module, maps = make(name)
    x = draw(maps)
    with torch.no_grad():
        expected = module(*x)
        assert freeze_(module) is module
        assert error(module(*x), expected) <= 1e-5
        kept = [m._frozen for m in module.modules() if isinstance(m, Freezable) and m._frozen]
        assert bool(kept) == (name not in ("attention-softmax", "cross-task-softmax"))
        again = module(*x)
        assert all(map(torch.equal, again, module(*x)))
        unfreeze_(module)
        by_data(module)
        fresh, _ = make(name, seed=1)
        fresh.load_state_dict(module.state_dict())
        assert error(module(*x), fresh(*x)) <= 1e-6
    assert not any(m._frozen for m in module.modules() if isinstance(m, Freezable))


@pytest.mark.parametrize("name", ["attention", "cross-task", "head", "block", "converted"])
def test_what_ends_or_renews_freezing(name: str) -> None:
    """Training, conversion and loading are seen; copies and pickles are not frozen."""
    module, maps = make(name)
    x = draw(maps)

    def truth() -> tuple[torch.Tensor, ...]:
        fresh, _ = make(name, seed=1)
        fresh.load_state_dict(module.state_dict())
        return fresh(*x)

    with torch.no_grad():
        freeze_(module)(*x)
        by_loading(module)
        assert error(module(*x), truth()) <= 1e-6
        module.double().float()
        assert error(module(*x), truth()) <= 1e-6
        other = copy.deepcopy(module)
        by_data(other)
        fresh, _ = make(name, seed=1)
        fresh.load_state_dict(other.state_dict())
        assert error(other(*x), fresh(*x)) <= 1e-6
        module.train().eval()
        by_data(module)
        assert error(module(*x), truth()) <= 1e-6


def test_frozen_context() -> None:
    module, maps = make("cross-task")
    x = draw(maps)
    with torch.no_grad():
        with frozen(module) as same, frozen(module):
            assert same is module
            module(*x)
            assert module.inner._frozen
        assert module.inner._frozen is None
        freeze_(module)
        with frozen(module):
            module(*x)
        assert module.inner._frozen is not None
    with pytest.raises(ZeroDivisionError), frozen(unfreeze_(module)):
        _ = 1 / 0
    assert module.inner._frozen is None


def test_freezing_is_for_evaluation() -> None:
    module, _ = make("cross-task")
    with pytest.raises(ValueError, match=r"model: got one in training mode, expected model\.eval"):
        freeze_(module.train())
    for function in (freeze_, unfreeze_):
        with pytest.raises(TypeError, match=r"model: got str, expected an nn\.Module"):
            function("model")
    plain = nn.Linear(2, 2).eval()
    assert freeze_(plain) is plain


def test_gradients_do_not_see_frozen_weights() -> None:
    """A frozen module whose parameters get gradients computes from these."""
    module, maps = make("cross-task")
    freeze_(module)
    x = draw(maps)
    with torch.no_grad():
        module(*x)
    outputs = module(*x)
    assert all(y.requires_grad for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None for p in module.parameters())
