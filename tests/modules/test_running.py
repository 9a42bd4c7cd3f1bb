"""Ways of running: every module and network gives what it gives when it is simply called.

Or, where a way cannot be had, one clear error. docs/what_works.md has the same table in words;
compilation by inductor is in `test_inductor.py`.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from xattn_kernels import freeze_

from . import subjects
from .subjects import SUBJECTS, Flat, Maps, draw, error

TOLERANCE = 2e-5
"""In float32, of the largest value: other orders of summation."""
TRANSFORMED = 1e-4

Way = Callable[[Flat, Maps], float]


def eager(module: nn.Module, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return module(*x)


def under(context: Callable[[], Any]) -> Way:
    def run(module: Flat, maps: Maps) -> float:
        x = draw(maps)
        with context():
            return error(module(*x), eager(module, x))

    return run


def with_gradients_of_inputs(module: Flat, maps: Maps) -> float:
    x = draw(maps)
    return error(module(*(y.requires_grad_() for y in draw(maps))), eager(module, x))


def aot_eager(dynamic: bool | None, mode: str) -> Way:
    def run(module: Flat, maps: Maps) -> float:
        torch._dynamo.reset()
        module.train(mode == "train")
        peer = copy.deepcopy(module)
        compiled = torch.compile(module, backend="aot_eager", dynamic=dynamic)
        worst = 0.0
        for factor in (1, 2, 3) if mode == "eval" else (1, 2):
            x = draw(maps, factor=factor)
            if mode == "eval":
                with torch.no_grad():
                    worst = max(worst, error(compiled(*x), peer(*x)))
            else:
                worst = max(worst, error(step(compiled, x, module), step(peer, x, peer)))
        torch._dynamo.reset()
        return worst

    return run


def step(call: Callable[..., Any], x: tuple[Tensor, ...], owner: nn.Module) -> list[Tensor]:
    """Outputs, gradients and statistics of a training step."""
    owner.zero_grad(set_to_none=True)
    x = tuple(y.clone().requires_grad_() for y in x)
    torch.manual_seed(3)  # for what drops paths
    outputs = call(*x)
    sum(y.square().mean() for y in outputs).backward()
    gradients = [p.grad for p in owner.parameters() if p.grad is not None]
    statistics = [b.clone().float() for b in owner.buffers()]
    # Gradients that are zero but for rounding are compared with the others.
    scale = max(float(g.abs().max()) for g in gradients)
    gradients = [torch.cat([g.flatten(), g.new_tensor([scale])]) for g in gradients]
    return [*outputs, *(y.grad for y in x), *gradients, *statistics]


def exported(strict: bool) -> Way:
    def run(module: Flat, maps: Maps) -> float:
        x = draw(maps)
        with torch.no_grad():
            program = torch.export.export(module, x, strict=strict).module()
            again = draw(maps, seed=5)
            return max(error(program(*y), module(*y)) for y in (x, again))

    return run


def exported_for_any_batch(module: Flat, maps: Maps) -> float:
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (tuple({0: batch} for _ in maps),)
    with torch.no_grad():
        program = torch.export.export(module, draw(maps, batch=3), dynamic_shapes=shapes).module()
        return max(error(program(*y), module(*y)) for y in (draw(maps, batch=n) for n in (3, 1, 5)))


def traced(module: Flat, maps: Maps) -> float:
    """Of its outputs: the file needs operators, not Python."""
    with torch.no_grad():
        program = torch.jit.trace(module, draw(maps), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(program, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        again = draw(maps, seed=7)
        return max(error(p(*again), module(*again)) for p in (program, loaded))


def traced_with_gradients(module: Flat, maps: Maps) -> float:
    program = torch.jit.trace(module, draw(maps), check_trace=False)
    again = draw(maps, seed=7)
    return error(program(*again), eager(module, again))


def replayed(module: Flat, maps: Maps) -> float:
    """As in a CUDA graph: the same memory with other values."""
    x = draw(maps)
    first = eager(module, x)
    kept = [y.clone() for y in first]
    for y, new in zip(x, draw(maps, seed=9), strict=True):
        y.copy_(new)
    second = eager(module, x)
    fresh = eager(copy.deepcopy(module), tuple(y.clone() for y in x))
    return max(error(second, fresh), error(first, kept))


def checkpointed(reentrant: bool) -> Way:
    def run(module: Flat, maps: Maps) -> float:
        module.train()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 0.0  # statistics are updated twice
        peer = copy.deepcopy(module)
        x = draw(maps)

        def call(*y: Tensor) -> Any:
            return checkpoint(module, *y, use_reentrant=reentrant)

        ours, theirs = step(call, x, module), step(peer, x, peer)
        return error(ours[: -len([*module.buffers()])], theirs[: -len([*peer.buffers()])])

    return run


def replicas(mode: str) -> Way:
    """What `nn.DataParallel` does on each device."""

    def run(module: Flat, maps: Maps) -> float:
        x, module = draw(maps), module.train(mode == "train")
        peer = copy.deepcopy(module)
        for replica in replicas_of(module):
            outputs = replica(*x) if mode == "train" else eager(replica, x)
        torch.manual_seed(3)
        expected = peer(*x)
        if mode == "eval":
            # Values written to the module are those of the next replicas.
            worst = error(outputs, expected)
            with torch.no_grad():
                for p in (*module.parameters(), *peer.parameters()):
                    p.data.mul_(1.25)
            return max(worst, error(eager(replicas_of(module)[0], x), peer(*x)))
        torch.manual_seed(3)
        outputs = replicas_of(module)[0](*x)
        sum(y.square().mean() for y in outputs).backward()
        sum(y.square().mean() for y in expected).backward()
        pairs = zip(module.parameters(), peer.parameters(), strict=True)
        found = [(p.grad, q.grad) for p, q in pairs if q.grad is not None]
        return max(error(outputs, expected), error(*map(list, zip(*found, strict=True))))

    return run


def replicas_of(module: nn.Module) -> list[nn.Module]:
    """As `replicate` makes them, on one device, for the CPU has but one."""

    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.clone() for x in tensors)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            return gradients

    modules = [*module.modules()]
    copies = {m: m._replicate_for_data_parallel() for m in modules}
    parameters = [*module.parameters()]
    cloned = dict(zip(map(id, parameters), Copy.apply(*parameters), strict=True))
    for original, replica in copies.items():
        replica._former_parameters = {}
        for key, child in original._modules.items():
            replica._modules[key] = None if child is None else copies[child]
        for key, p in original._parameters.items():
            if p is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, cloned[id(p)])
                replica._former_parameters[key] = cloned[id(p)]
        for key, b in original._buffers.items():
            replica._buffers[key] = None if b is None else b.clone()
    return [copies[module]]


def copied(module: Flat, maps: Maps) -> float:
    x = draw(maps)
    expected = eager(module, x)
    copies = [copy.deepcopy(module)]
    inner = pickle.loads(pickle.dumps(module.inner)) if picklable(module) else None
    if inner is not None:
        copies.append(Flat(inner, module.arrange))
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return max(error(eager(one, x), expected) for one in copies)


def picklable(module: Flat) -> bool:
    return "<locals>" not in type(module.inner).__qualname__


def functional_call(module: Flat, maps: Maps) -> float:
    x, other = draw(maps), copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
        state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        return error(torch.func.functional_call(module, state, x), other(*x))


def vmapped(module: Flat, maps: Maps) -> float:
    first, second = draw(maps), draw(maps, seed=11)
    stacked = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    with torch.no_grad():
        found = torch.vmap(module)(*stacked)
        expected = zip(module(*first), module(*second), strict=True)
        return error(found, [torch.stack(pair) for pair in expected])


def of_functional_gradients(module: Flat, maps: Maps) -> float:
    x = draw(maps)

    def loss(*y: Tensor) -> Tensor:
        return sum(z.square().mean() for z in module(*y))

    found = torch.func.grad(loss, argnums=tuple(range(len(x))))(*x)
    leaves = [y.clone().requires_grad_() for y in x]
    return error(list(found), list(torch.autograd.grad(loss(*leaves), leaves)))


def forward_mode(module: Flat, maps: Maps) -> float:
    """Directional derivatives, against differences."""
    module, x = module.double(), draw(maps, dtype=torch.float64)
    along = draw(maps, dtype=torch.float64, seed=13)
    step = 1e-6
    with torch.no_grad():
        _, found = torch.func.jvp(module, x, along)
        ends = [module(*(y + s * d for y, d in zip(x, along, strict=True))) for s in (step, -step)]
    return error(found, [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)])


def fake(module: Flat, maps: Maps) -> float:
    x = draw(maps)
    expected = eager(module, x)
    for training in (False, True):
        copied = copy.deepcopy(module).train(training)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(y) for y in x]
            with torch.set_grad_enabled(training):
                outputs = copied(*fakes)
        for y, z in zip(outputs, expected, strict=True):
            assert (y.shape, y.dtype) == (z.shape, z.dtype)
            if not training:
                strides = zip(y.shape, y.stride(), z.stride(), strict=True)
                assert all(a == b for n, a, b in strides if n > 1)
    return 0.0


def frozen(module: Flat, maps: Maps) -> float:
    x = draw(maps)
    expected = eager(module, x)
    freeze_(module)
    return max(error(eager(module, x), expected) for _ in range(2))


def in_threads(module: Flat, maps: Maps) -> float:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [draw(maps, seed=seed) for seed in range(4)]
    expected = [eager(module, x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: eager(module, x), inputs))
    return max(error(*pair) for pair in zip(found, expected, strict=True))


WAYS: dict[str, Way] = {
    "grad": under(torch.enable_grad),
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "gradients of inputs": with_gradients_of_inputs,
    "aot_eager, eval": aot_eager(None, "eval"),
    "aot_eager, eval, dynamic": aot_eager(True, "eval"),
    "aot_eager, train": aot_eager(None, "train"),
    "export": exported(strict=False),
    "export, any batch": exported_for_any_batch,
    "jit.trace": traced,
    "jit.trace, with gradients": traced_with_gradients,
    "replay in the same memory": replayed,
    "checkpoint": checkpointed(reentrant=False),
    "checkpoint, reentrant": checkpointed(reentrant=True),
    "replicas, eval": replicas("eval"),
    "replicas, train": replicas("train"),
    "deepcopy": copied,
    "functional_call": functional_call,
    "vmap": vmapped,
    "func.grad": of_functional_gradients,
    "func.jvp": forward_mode,
    "fake tensors": fake,
    "frozen": frozen,
    "threads": in_threads,
}

LOOSER = {"func.jvp": 1e-6, "vmap": TRANSFORMED, "func.grad": TRANSFORMED}
LIMITS = {name: LOOSER.get(name, 2e-4 if "train" in name else TOLERANCE) for name in WAYS}


SLOW = ("aot_eager, eval", "aot_eager, eval, dynamic", "aot_eager, train", "func.jvp")
"""Minutes for a whole network: its modules stand for it."""
CELLS = [(way, name) for way in WAYS for name in SUBJECTS if name != "network" or way not in SLOW]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("way", "name"), CELLS)
def test_equal_to_eager(way: str, name: str) -> None:
    module, maps = subjects.make(name)
    assert WAYS[way](module, maps) <= LIMITS[way]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_no_samples(kept: bool, gradient: bool, name: str) -> None:
    module, maps = subjects.make(name)
    if kept:
        freeze_(module)
    with torch.set_grad_enabled(gradient):
        found = module(*draw(maps, batch=0))
        expected = module(*draw(maps, batch=1))
    assert [y.shape for y in found] == [(0, *y.shape[1:]) for y in expected]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("compiler", [torch.jit.script, torch.fx.symbolic_trace])
def test_compilers_that_read_python(compiler: Callable[[nn.Module], Any], name: str) -> None:
    module, _ = subjects.make(name)
    inner = module.inner
    with pytest.raises(NotImplementedError, match=r"use torch\.jit\.trace, torch\.export"):
        compiler(inner.inner if isinstance(inner, subjects.Pair) else inner)


@pytest.mark.parametrize("name", SUBJECTS)
def test_meta_device(name: str) -> None:
    module, maps = subjects.make(name)
    if name == "block":  # plain layers: nothing to refuse
        assert module.to("meta")(*(x.to("meta") for x in draw(maps)))[0].is_meta
        return
    with pytest.raises(ValueError, match=r"got .* on meta, expected .*FakeTensorMode") as caught:
        module.to("meta")(*(x.to("meta") for x in draw(maps)))
    assert len(str(caught.value)) < 2000


def test_the_page_lists_every_way() -> None:
    page = (Path(__file__).parents[2] / "docs" / "what_works.md").read_text()
    rows = page.partition("| --- | --- |\n")[2].partition("\n\n")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows] == list(WAYS)
