"""The cross-attention block in training: values, gradients, statistics, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels import registry
from xattn_kernels.functional import BlockStatistics
from xattn_kernels.ops.cross_attention_block_training import op, reference
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing.cases import LAYOUTS

LAYERS = ("query 1", "query 2", "key 1", "key 2", "value")


@dataclass(frozen=True)
class Block:
    """Sizes of a problem, and what its features are like."""

    name: str
    schedule: Schedule
    tokens: tuple[int, ...]
    channels: int = 9
    batch: int = 2
    fixed: bool = False
    mean: float = 0.0
    deviation: float = 1.0

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        w, c = self.schedule.num_weights, self.channels
        features = [
            (self.mean + self.deviation * draw(self.batch, c, n)).to(dtype) for n in self.tokens
        ]
        parameter = torch.float64 if dtype is torch.float64 else torch.float32
        weight = draw(w, 5, c, c) * (2 / c) ** 0.5
        gamma, beta = 0.5 + torch.rand(w, 5, c, generator=generator).double(), draw(w, 5, c)
        running = (draw(w, 5, c), beta.abs() + 0.5) if self.fixed else ()
        parameters = [x.to(parameter) for x in (weight, gamma, beta, *running)]
        return Inputs(features, *parameters)


@dataclass
class Inputs:
    features: list[Tensor]
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [*self.features, self.weight, self.gamma, self.beta]

    def require(self, wanted: Sequence[bool] | None = None) -> Inputs:
        for x, want in zip(self.leaves(), wanted or [True] * len(self.leaves()), strict=True):
            x.requires_grad_(want)
        return self

    def to(self, dtype: torch.dtype) -> Inputs:
        """Copies without a history."""
        return Inputs(
            [x.detach().to(dtype) for x in self.features],
            *(
                None if x is None else x.detach().to(dtype)
                for x in (self.weight, self.gamma, self.beta, self.running_mean, self.running_var)
            ),
        )


#: Weights 0 and 1, the former for two sources of one query; slot 1 attends to itself.
SHARED = Schedule.from_edges(
    [(0, 1, 0, 0), (0, 2, 1, 0), (1, 1, 2, 1), (2, 1, 3, 0)],
    num_queries=3,
    num_weights=2,
    allow_self=True,
)
TASKS = Block("cross_task", Schedule.cross_task(3), (70, 70, 60))
BLOCKS = [
    TASKS,
    Block("cross_scale", Schedule.cross_scale(3), (80, 20, 15), channels=12),
    Block("joint", Schedule.all_pairs(3, 1), (20, 30, 40)),
    Block("shared", SHARED, (40, 35, 30), channels=17),
    Block("one_channel", Schedule.cross_task(2), (5, 7), channels=1),
    Block("one_sample", Schedule.cross_task(2), (129, 65), channels=36, batch=1),
    Block("fixed", Schedule.cross_task(3), (30, 30, 20), fixed=True),
    Block("fixed_shared", SHARED, (20, 35, 30), fixed=True),
]


def run(inputs: Inputs, schedule: Schedule, **options: Any) -> tuple[list[Tensor], BlockStatistics]:
    return xk.cross_attention_block_training(
        inputs.features,
        inputs.weight,
        inputs.gamma,
        inputs.beta,
        schedule,
        running_mean=inputs.running_mean,
        running_var=inputs.running_var,
        **options,
    )


def compose(inputs: Inputs, schedule: Schedule, eps: float = 1e-12) -> list[Tensor]:
    """The same from stock operators, with the gradients of plain autograd."""

    def project(x: Tensor, w: int, layer: int) -> Tensor:
        running = (None, None)
        if inputs.running_mean is not None and inputs.running_var is not None:
            running = inputs.running_mean[w, layer], inputs.running_var[w, layer]
        y = F.conv1d(x, inputs.weight[w, layer].to(x.dtype).unsqueeze(2))
        affine = inputs.gamma[w, layer], inputs.beta[w, layer]
        return F.batch_norm(y, *running, *affine, training=running[0] is None)

    outputs = []
    for group in schedule.groups:
        query, _, _, w = group[0]
        x = inputs.features[query]
        q = F.softplus(project(F.relu(project(x, w, 0)), w, 1))
        s, z = 0.0, 0.0
        for edge in group:
            x = inputs.features[edge.source]
            k = F.softplus(project(F.relu(project(x, w, 2)), w, 3))
            v = F.relu(project(x, w, 4))
            s, z = s + v @ k.mT, z + k.sum(dim=2)
        outputs.append(s @ q / (z.unsqueeze(1) @ q).clamp_min(eps))
    return outputs


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs
    ]


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, cotangents(outputs)))


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative L2 distances."""
    pairs = [
        (a.detach().double(), e.detach().double()) for a, e in zip(actual, expected, strict=True)
    ]
    return [float((a - e).norm() / e.norm().clamp_min(1e-9)) for a, e in pairs]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_as_composed(engine: str, block: Block) -> None:
    inputs = block.tensors().require()
    kept = [x.detach().clone() for x in inputs.leaves()]
    outputs, _ = run(inputs, block.schedule)
    expected = compose(inputs, block.schedule)
    assert max(distances(outputs, expected)) <= 1e-12
    found = distances(gradients(outputs, inputs.leaves()), gradients(expected, inputs.leaves()))
    assert max(found) <= 1e-9
    assert all(map(torch.equal, inputs.leaves(), kept)), "inputs changed"


@pytest.mark.parametrize("block", BLOCKS[:4], ids=lambda block: block.name)
def test_statistics(engine: str, block: Block) -> None:
    inputs = block.tensors()
    _, statistics = run(inputs, block.schedule)
    assert len(set(statistics.rows)) == len(statistics.rows)
    assert statistics.counts.tolist() == [block.batch * n for n in block.tokens]
    for (slot, w, layer), mean, var in zip(*statistics[:3], strict=True):
        x = inputs.features[slot]
        if layer in (1, 3):  # follows layer 0 or 2
            y = inputs.weight[w, layer - 1] @ x
            x = F.relu(
                F.batch_norm(
                    y, None, None, inputs.gamma[w, layer - 1], inputs.beta[w, layer - 1], True
                )
            )
        y = (inputs.weight[w, layer] @ x).transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, y.mean(dim=1))
        torch.testing.assert_close(var, y.var(dim=1, unbiased=False))


def test_parameters_one_by_one(engine: str) -> None:
    """As stacked, with gradients of each; those that no edge uses have none."""
    inputs = TASKS.tensors()
    schedule = Schedule.from_edges([(0, 1, 0, 0), (1, 0, 1, 2)], num_queries=3, num_weights=3)
    inputs.weight, inputs.gamma, inputs.beta = (
        x[:3].clone() for x in (inputs.weight, inputs.gamma, inputs.beta)
    )
    expected, _ = run(inputs.require(), schedule)
    stacked = torch.autograd.grad(expected, inputs.leaves()[3:], cotangents(expected))
    parts = [
        [y.detach().clone().requires_grad_() for y in x.flatten(0, 1)]
        for x in (inputs.weight, inputs.gamma, inputs.beta)
    ]
    parts[0] = [x.detach()[:, :, None, None].requires_grad_() for x in parts[0]]
    outputs, _ = xk.cross_attention_block_training(inputs.features, *parts, schedule)
    assert all(map(torch.equal, outputs, expected))
    flat = [x for part in parts for x in part]
    found = torch.autograd.grad(outputs, flat, cotangents(outputs), allow_unused=True)
    for i, gradient in enumerate(found):
        group, (w, layer) = i // 15, divmod(i % 15, 5)
        if w == 1:
            assert gradient is None
            assert stacked[group][w].count_nonzero() == 0
        else:
            assert gradient.shape == flat[i].shape
            assert torch.equal(gradient.view_as(stacked[group][w, layer]), stacked[group][w, layer])


@pytest.mark.parametrize("fixed", [False, True])
def test_gradcheck(engine: str, fixed: bool) -> None:
    """Every leaf, and through transposed outputs, whose gradients then arrive transposed."""
    schedule = Schedule.from_edges(
        [(0, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0)], num_queries=2, allow_self=True
    )
    block = Block("small", schedule, (5, 4), channels=3, fixed=fixed)
    inputs = block.tensors().require()
    settings: dict[str, Any] = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}

    def function(x: Tensor, y: Tensor, *parameters: Tensor) -> list[Tensor]:
        running = inputs.running_mean, inputs.running_var
        return run(Inputs([x, y], *parameters, *running), schedule)[0]

    assert torch.autograd.gradcheck(function, inputs.leaves(), **settings)
    assert torch.autograd.gradcheck(
        lambda *x: [y.transpose(-1, -2).contiguous() for y in function(*x)],
        inputs.leaves(),
        **settings,
    )


def test_gradcheck_where_the_denominator_is_clamped(engine: str) -> None:
    block = Block("clamped", Schedule.cross_task(2), (5, 4), channels=2)
    inputs = block.tensors().require()
    outputs, _ = run(inputs, block.schedule, eps=12.0)
    expected = compose(inputs, block.schedule, eps=12.0)
    other, _ = run(inputs, block.schedule)
    assert not all(map(torch.equal, outputs, other))
    assert max(distances(outputs, expected)) <= 1e-12
    assert max(distances(*(gradients(y, inputs.leaves()) for y in (outputs, expected)))) <= 1e-9


class Recorded:
    """The names of the passes that a backward makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("target_sums", "target_gradients", "source_sums", "source_gradients"):
            self._record(monkeypatch, name)
        self._record(monkeypatch, "input_gradient")

    def _record(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(op, name)

        def call(*args: Any) -> Any:
            self.names.append(name)
            return original(*args)

        monkeypatch.setattr(op, name, call)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=5)))
def test_gradients_only_where_asked(
    engine: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block("pair", Schedule.from_edges([(0, 1, 0, 0)], num_queries=2), (30, 20))
    everything = block.tensors().require()
    expected = gradients(run(everything, block.schedule)[0], everything.leaves())
    inputs = block.tensors().require(wanted)
    outputs, _ = run(inputs, block.schedule)
    assert outputs[0].requires_grad == any(wanted)
    if not any(wanted):
        return
    recorded = Recorded(monkeypatch)
    outputs[0].backward(cotangents(outputs)[0])
    for x, want, gradient in zip(inputs.leaves(), wanted, expected, strict=True):
        assert (x.grad is not None) == want
        if want:
            # Fewer matrices in one batched product may round otherwise.
            torch.testing.assert_close(
                x.grad, gradient, rtol=1e-12, atol=1e-12 * gradient.abs().max().item()
            )
    target, source, parameters = wanted[0], wanted[1], any(wanted[2:])
    assert ("target_gradients" in recorded.names) == (target or parameters)
    assert ("source_sums" in recorded.names) == (source or parameters)
    assert ("source_gradients" in recorded.names) == (source or parameters)
    assert ("input_gradient" in recorded.names) == (target or source)


def test_unused_outputs_and_two_backwards(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the used output needs is computed; what it does not know has no gradient."""
    inputs = TASKS.tensors().require()
    outputs, _ = run(inputs, TASKS.schedule)  # of task 0 from 1 and 2, of 1 from 0 and 2, ..
    expected = compose(inputs, TASKS.schedule)
    used = [inputs.features[0], inputs.features[1], inputs.weight]
    slots = []
    original = op.target_sums
    monkeypatch.setattr(op, "target_sums", lambda *x: (slots.append(x[2]), original(*x))[1])
    for _ in range(2):
        found = torch.autograd.grad(outputs[0].square().sum(), used, retain_graph=True)
        again = torch.autograd.grad(expected[0].square().sum(), used, retain_graph=True)
        assert max(distances(found, again)) <= 1e-9
    assert slots == [[0], [0]]
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(outputs[0].sum(), inputs.features[2], retain_graph=True)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "slice", "token_major"])
def test_strided_gradients(engine: str, kind: str) -> None:
    inputs = TASKS.tensors().require()
    outputs, _ = run(inputs, TASKS.schedule)
    given = []
    for y in outputs:
        gradient = torch.randn(y.shape, dtype=y.dtype)
        if kind == "expanded":
            gradient = torch.randn(1, y.size(1), 1, dtype=y.dtype).expand(y.shape)
        elif kind == "transposed":
            gradient = torch.randn(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0)
        elif kind == "slice":
            wide = y.new_full((y.size(0), 2 * y.size(1), y.size(2) + 3), float("nan"))
            wide[:, 1::2, 3:] = gradient
            gradient = wide[:, 1::2, 3:]
        else:
            gradient = gradient.mT.contiguous().mT
        given.append(gradient)
    found = torch.autograd.grad(outputs, inputs.leaves(), given, retain_graph=True)
    expected = torch.autograd.grad(outputs, inputs.leaves(), [g.contiguous() for g in given])
    assert max(distances(found, expected)) <= 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_features(engine: str, layout: str) -> None:
    inputs = TASKS.tensors().require()
    expected, _ = run(inputs, TASKS.schedule)
    views = Inputs(
        [LAYOUTS[layout](x.detach()).requires_grad_() for x in inputs.features],
        inputs.weight,
        inputs.gamma,
        inputs.beta,
    )
    outputs, _ = run(views, TASKS.schedule)
    for x, edge in zip(outputs, TASKS.schedule.edges, strict=True):
        assert (x.stride(1) == 1) == (views.features[edge.query].stride(1) == 1)
    assert max(distances(outputs, expected)) <= 1e-13
    found = distances(gradients(outputs, views.leaves()), gradients(expected, inputs.leaves()))
    assert max(found) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "block",
    [
        Block("plain", Schedule.cross_task(2), (300, 200), channels=36),
        Block("mean_100", Schedule.cross_task(2), (300, 200), channels=18, mean=100.0),
        Block("variance_near_eps", Schedule.cross_task(2), (300, 200), 18, deviation=3e-3),
        Block("large", Schedule.cross_task(2), (300, 200), channels=18, deviation=1e4),
        Block("fixed", Schedule.cross_task(2), (300, 200), channels=18, fixed=True),
    ],
    ids=lambda block: block.name,
)
def test_accuracy(engine: str, block: Block, dtype: torch.dtype) -> None:
    """Errors against float64 of the same, rounded inputs stay near those of a composition.

    That computes in float32: the one in float16 overflows for large features, whose layers'
    outputs exceed its range. Results in 16 bits are rounded once, gradients to subnormals.
    """
    inputs = block.tensors(dtype).require()
    single, exact = inputs.to(torch.float32).require(), inputs.to(torch.float64).require()
    with torch.no_grad():
        given = [g.to(dtype) for g in cotangents(run(inputs, block.schedule)[0])]

    def results(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        converted = [g.to(y.dtype) for g, y in zip(given, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, converted)]

    ours = results(run(inputs, block.schedule)[0], inputs.leaves())
    theirs = results(compose(single, block.schedule), single.leaves())
    truth = results(compose(exact, block.schedule), exact.leaves())
    rounding = [y.to(x.dtype) for x, y in zip(ours, truth, strict=True)]
    for i, (x, y, z) in enumerate(
        zip(*(distances(found, truth) for found in (ours, theirs, rounding)), strict=True)
    ):
        assert x <= 3 * y + 1e-6 + 2 * z, i


def test_constant_channel(engine: str) -> None:
    """Its variance is zero: eps decides."""
    inputs = TASKS.tensors(torch.float32)
    for x in inputs.features:
        x[:, 2] = 3.25
    inputs.weight[:, 0, 1] = 0
    inputs.weight[:, 0, 1, 2] = 1  # a layer's output that is constant
    inputs.require()
    exact = inputs.to(torch.float64).require()
    outputs, statistics = run(inputs, TASKS.schedule)
    expected = compose(exact, TASKS.schedule)
    assert max(distances(outputs, expected)) <= 1e-5
    found = distances(gradients(outputs, inputs.leaves()), gradients(expected, exact.leaves()))
    assert max(found) <= 1e-3  # gradients through 1 / sqrt(eps)
    row = statistics.rows.index((0, 0, 0))
    assert statistics.var[row, 1] <= 1e-12


def test_repeats_bit_for_bit_on_any_number_of_threads(engine: str) -> None:
    block = Block("long", Schedule.cross_task(3), (3000, 2500, 1000), channels=36)
    inputs = block.tensors(torch.float32).require()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 5) if engine == "cpu" else (1, 1):
            torch.set_num_threads(threads)
            outputs, statistics = run(inputs, block.schedule)
            found = gradients(outputs, inputs.leaves())
            results.append([*outputs, *statistics[1:], *found])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_engines_agree() -> None:
    block = Block("agree", Schedule.cross_task(3), (400, 300, 100), channels=48)
    results = []
    for name in ("reference", "cpu"):
        inputs = block.tensors(torch.float32).require()
        with xk.backend(name):
            outputs, statistics = run(inputs, block.schedule)
            results.append([*outputs, *statistics[1:], *gradients(outputs, inputs.leaves())])
    assert max(distances(*results)) <= 1e-5


def test_double_backward_is_refused(engine: str) -> None:
    inputs = TASKS.tensors().require()
    outputs, _ = run(inputs, TASKS.schedule)
    (gradient,) = torch.autograd.grad(
        outputs[0].square().sum(), inputs.features[:1], create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated twice.*one by one"):
        gradient.sum().backward()


def test_changed_input_is_noticed(engine: str) -> None:
    inputs = TASKS.tensors().require()
    copy = inputs.features[0] * 1
    inputs.features[0] = copy
    outputs, _ = run(inputs, TASKS.schedule)
    copy.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(engine: str, dtype: torch.dtype) -> None:
    """Features are cast, parameters and what is computed are not; in backward neither."""
    inputs = TASKS.tensors(torch.float32)
    lower = Inputs([x.to(dtype) for x in inputs.features], *inputs.leaves()[3:]).require()
    expected, _ = run(lower, TASKS.schedule)
    found = gradients(expected, lower.leaves())
    inputs.require()
    with torch.autocast("cpu", dtype=dtype):
        outputs, statistics = run(inputs, TASKS.schedule)
        gradients_ = gradients(outputs, inputs.leaves())
    assert outputs[0].dtype is dtype
    assert statistics.mean.dtype is torch.float32
    assert all(map(torch.equal, outputs, expected))
    assert all(torch.equal(a, b.float()) for a, b in zip(gradients_, found, strict=True))


@pytest.mark.parametrize("fixed", [False, True])
def test_empty(engine: str, fixed: bool) -> None:
    """A source without tokens adds nothing; without samples there is nothing at all."""
    block = Block("empty", Schedule.cross_task(3), (20, 0, 10), fixed=fixed)
    inputs = block.tensors().require()
    outputs, _ = run(inputs, block.schedule)
    found = gradients(outputs, inputs.leaves())
    assert all(bool(x.isfinite().all()) for x in (*outputs, *found))
    for y, edge in zip(outputs, block.schedule.edges, strict=True):
        assert edge.source != 1 or y.count_nonzero() == 0
    joint = Schedule.from_edges([(0, 2, 0, 0), (0, 1, 0, 0)], num_queries=3, num_weights=6)
    alone = Schedule.from_edges([(0, 2, 0, 0)], num_queries=3, num_weights=6)
    assert torch.equal(run(inputs, joint)[0][0], run(inputs, alone)[0][0])
    none = Block("none", Schedule.cross_task(2), (20, 10), batch=0, fixed=fixed)
    inputs = none.tensors().require()
    outputs, _ = run(inputs, none.schedule)
    assert [y.shape for y in outputs] == [(0, 9, 20), (0, 9, 10)]
    assert all(g.count_nonzero() == 0 for g in gradients(outputs, inputs.leaves()))


def test_without_a_gradient(engine: str) -> None:
    """Under no_grad and inference_mode, with the same values and statistics."""
    inputs = TASKS.tensors().require()
    expected, known = run(inputs, TASKS.schedule)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs, statistics = run(inputs, TASKS.schedule)
        assert not outputs[0].requires_grad
        assert all(map(torch.equal, outputs, expected))
        assert torch.equal(statistics.var, known.var)


def saved_bytes(inputs: Inputs, schedule: Schedule) -> int:
    """Bytes of distinct storages kept for backward, features included, parameters not."""
    known = {x.untyped_storage().data_ptr() for x in inputs.leaves()[-3:]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # held: addresses stay distinct
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(inputs, schedule)
    return sum(size for size, _ in kept.values())


def test_saved_bytes(engine: str) -> None:
    """Features, statistics of 5 layers an edge, S and Z; nothing else of any size."""
    c, batch, tokens, slots, edges = 8, 2, 50, 3, 6
    block = Block("saved", Schedule.cross_task(slots), (tokens,) * slots, c, batch)
    features = slots * batch * c * tokens
    states = edges * batch * c * (c + 1)
    moments = slots * (c * c + 2 * c + 1)  # covariance, sums, means, count
    statistics = (2 * 5 + 3) * edges * c  # mean and variance; of first layers in closed form, too
    expected = 4 * (features + states + slots * c) + 8 * (moments + statistics) + 3 * edges
    assert saved_bytes(block.tensors(torch.float32).require(), block.schedule) == expected


@pytest.mark.parametrize("tasks", range(2, 9))
def test_saved_bytes_are_constant_in_tasks(tasks: int) -> None:
    """Of 8 maps, each is kept once, by however many tasks it is read.

    What grows with the tokens is counted: twice the tokens cost 8 more maps, for any number of
    edges. Beside it, an edge keeps B C (C + 1) numbers of its states and 13 C of statistics.
    """
    channels, batch, maps = 4, 2, 8
    schedule = Schedule.from_edges(
        [(t, a, o, o) for o, (t, a, _, _) in enumerate(Schedule.cross_task(tasks).edges)],
        num_queries=maps,
        num_sources=maps,
    )
    sizes = []
    for tokens in (64, 128):
        block = Block("tasks", schedule, (tokens,) * maps, channels, batch)
        sizes.append(saved_bytes(block.tensors(torch.float32).require(), schedule))
    assert sizes[1] - sizes[0] == maps * batch * channels * 64 * 4


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments of every pass: 2 target pairs, 3 source pairs, 3 outputs, 3 slots."""
    c, batch, engine = 4, 2, "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = [draw(batch, c, n) for n in (6, 5, 7)]
    center = draw(3, c)
    target = (features, center, [0, 1], draw(2, c, c), draw(2, 2, c), draw(2, c, c), draw(2, 3, c))
    target = (*target, [0, 1, 0], draw(3, batch, c, c), draw(3, batch, c).abs(), 1e-12)
    source = (features, center, [1, 2, 0], draw(3, 2, c, c), draw(3, 2, 2, c))
    source = (*source, draw(3, c, c), draw(3, 3, c))
    states = (draw(3, batch, c, c), draw(3, batch, c))
    outputs = [draw(batch, c, n) for n in (6, 5, 6)]
    sums = [torch.zeros(batch, n, c).mT for n in (6, 5, 7)]
    precise = torch.tensor([True, False, True])
    return {
        "moments": (features, engine),
        "first_moments": (*target[:4], precise[:2], engine),
        "hidden_moments": (*target[:6], engine),
        "states": (*source, engine),
        "attend": (*target, outputs, engine),
        "target_sums": (*target, outputs, engine),
        "target_gradients": (*target, outputs, draw(2, 2, c), precise[:2], sums, engine),
        "source_sums": (*source, *states, precise, sums, engine),
        "source_gradients": (*source, *states, draw(3, 2, c), precise, sums, engine),
        "input_gradient": (features, center, draw(3, c, c), draw(3, c), sums, engine),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(op, name), samples()[name])


@pytest.mark.parametrize("name", samples())
def test_passes_of_engines_agree(name: str) -> None:
    """Each pass by itself, in results and in what it writes."""
    written = {"attend": 11, "target_gradients": 14, "source_sums": 10, "source_gradients": 11}
    place = written.get(name, 4 if name == "input_gradient" else None)
    results = []
    for engine in ("reference", "cpu"):
        arguments = samples()[name]
        found = getattr(op, name)(*arguments[:-1], engine)
        found = [] if found is None else [found] if isinstance(found, Tensor) else [*found]
        results.append([*found, *(arguments[place] if place is not None else ())])
    assert results[0]
    assert max(distances(*results)) <= 1e-5


def test_gradients_of_features_that_nobody_wants(engine: str) -> None:
    """An engine is given a tensor without elements for them."""
    arguments = samples()["source_sums"][:-2]
    whole = [torch.zeros(2, n, 4).mT for n in (6, 5, 7)]
    part = [torch.zeros(0), torch.zeros(2, 5, 4).mT, torch.zeros(0)]
    expected = op.source_sums(*arguments, whole, engine)
    found = op.source_sums(*arguments, part, engine)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(part[1], whole[1])


def test_reference_is_found_by_its_passes() -> None:
    """Every pass has a function of the same name in every engine, with the same parameters."""
    cpu = registry.engine_module(op.OP, "cpu")
    for name in samples():
        parameters = [list(getattr(module, name).__annotations__) for module in (reference, cpu)]
        assert parameters[0] == parameters[1], name


def wrong_arguments() -> list[Any]:
    inputs = TASKS.tensors(torch.float32)
    x, w, g, b, s = inputs.features, inputs.weight, inputs.gamma, inputs.beta, TASKS.schedule
    one = [x[0][:1, :, :1], x[1], x[2]]
    one = [y[:1] for y in one]
    flat = list(w.flatten(0, 1))
    cases: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
        "slots": (ValueError, "features: got 2 slots", (x[:2], w, g, b, s), {}),
        "weight": (ValueError, "weight: got .*expected shape", (x, w[:, 1:], g, b, s), {}),
        "number": (ValueError, "weight: got 29 tensors, expected 30", (x, flat[1:], g, b, s), {}),
        "shape": (ValueError, r"weight\[3\]: got", (x, [*flat[:3], g, *flat[4:]], g, b, s), {}),
        "gamma": (ValueError, "gamma: got .*expected shape", (x, w, g[1:], b, s), {}),
        "dtype": (TypeError, r"beta\[0\]: got .*expected a dense", (x, w, g, b.double(), s), {}),
        "type": (TypeError, "beta: got NoneType", (x, w, g, None, s), {}),
        "device": (ValueError, r"gamma\[0\]: got", (x, w, g.to("meta"), b, s), {}),
        "running": (ValueError, "running_var: got None", (x, w, g, b, s), {"running_mean": g}),
        "bn_eps": (ValueError, "bn_eps: got -1", (x, w, g, b, s), {"bn_eps": -1.0}),
        "eps": (ValueError, "eps: got 0", (x, w, g, b, s), {"eps": 0.0}),
        "one token": (ValueError, "more than 1 value per channel", (one, w, g, b, s), {}),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("error", "message", "args", "options"), wrong_arguments())
def test_wrong_arguments(
    error: type[Exception], message: str, args: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        xk.cross_attention_block_training(*args, **options)


def test_engine_by_name_is_not_replaced() -> None:
    inputs = TASKS.tensors(torch.float32)
    with xk.backend("cuda"), pytest.raises(RuntimeError, match="cannot run this problem"):
        run(inputs, TASKS.schedule)
    assert xk.explain(op.OP, inputs.features[0]).engine == "cpu"
