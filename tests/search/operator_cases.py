"""Random calls of the operators, and the same by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels import Schedule

from . import oracle_operators as oracle
from .draws import (
    DEGENERATE,
    FLOATS,
    GRADIENT,
    LAYOUTS,
    Draw,
    cotangents,
    gradients,
    kind_of_layout,
    kind_of_values,
    values,
)
from .judge import UNIT, Call, Mismatch, Precision, Results, check_strides

ACCUMULATED = {torch.float64: torch.float64}
"""The type of states and parameters: float32 unless it is float64."""


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator, as far as its seed does not say."""

    seed: int
    operator: str
    engine: str
    dtype: torch.dtype
    features: tuple[str, ...]
    """Shape, kind of values, layout and whether a gradient is wanted, of every tensor."""
    edges: tuple[tuple[int, int, int, int], ...]
    options: dict[str, Any]


def draw_engine(draw: Draw) -> str:
    return draw.weighted({"auto": 6.0, "cpu": 2.0, "reference": 2.0})


def draw_dtype(draw: Draw) -> torch.dtype:
    return draw.weighted(dict(zip(FLOATS, (3.0, 5.0, 3.0, 2.0), strict=True)))


def draw_edges(draw: Draw, slots: int, *, own: bool) -> list[tuple[int, int, int, int]]:
    """Edges between slots, of outputs with one or several sources.

    Args:
        draw: where from.
        slots: how many queries and sources there are.
        own: whether every output has a set of weights of its own.
    """
    pairs = [(q, a) for q in range(slots) for a in range(slots)]
    draw.random.shuffle(pairs)
    chosen = pairs[: draw.integer(1, min(5, len(pairs)))]
    edges: list[tuple[int, int, int, int]] = []
    outputs: list[int] = []  # the query of each
    for q, a in chosen:
        joined = [o for o, query in enumerate(outputs) if query == q]
        if joined and draw.likely(0.5):
            output = draw.one(joined)
        else:
            output = len(outputs)
            outputs.append(q)
        edges.append((q, a, output, output))
    if own:
        return edges
    sets = draw.integer(1, len(outputs))
    return [(q, a, o, w % sets) for q, a, o, w in edges]


class Leaves:
    """Named tensors of a call: laid out for the package, plain for the oracle."""

    def __init__(self, draw: Draw, dtype: torch.dtype, gradient: float) -> None:
        self.draw, self.dtype = draw, dtype
        self.chance = gradient
        self.tensors: dict[str, Tensor] = {}
        self.parameters: set[str] = set()
        """Whose gradients may have any dense layout."""
        self.texts: list[str] = []
        self.degenerate = False

    def add(self, name: str, x: Tensor, text: str) -> None:
        layout = kind_of_layout(self.draw) if x.dim() > 1 and x.numel() else "contiguous"
        wanted = self.draw.likely(self.chance)
        self.tensors[name] = LAYOUTS[layout](x).detach().requires_grad_(wanted)
        self.texts.append(f"{name} {tuple(x.shape)} {text} {layout}{' grad' if wanted else ''}")

    def features(self, name: str, shape: Sequence[int], mean: float = 0.0) -> None:
        kind = kind_of_values(self.draw)
        self.degenerate |= kind in DEGENERATE
        x = values(self.draw, kind, shape, self.dtype)
        self.add(name, x + mean if mean else x, f"{kind}{f' {mean:+}' if mean else ''}")

    def parameter(self, name: str, x: Tensor) -> None:
        self.parameters.add(name)
        self.add(name, x.to(ACCUMULATED.get(self.dtype, torch.float32)), "")

    def group(self, prefix: str, leaves: dict[str, Tensor]) -> list[Tensor]:
        return [x for name, x in leaves.items() if name.split()[0] == prefix]


Run = Callable[[dict[str, Tensor]], Results]


def compared(
    case: OperatorCase,
    leaves: Leaves,
    ours: Run,
    theirs: Run,
    slack: float = 0.0,
    noise: float = 0.0,
) -> Iterator[Call]:
    """The one call of a case. Results whose names begin with "no gradient" have none."""

    def run(function: Run, tensors: dict[str, Tensor], layouts: bool) -> Results:
        results = function(tensors)
        outputs = {n: y for n, y in results.items() if not n.startswith("no gradient")}
        given = cotangents(case.seed, outputs, case.dtype, layouts)
        return {**results, **gradients(outputs, tensors, given)}

    def call() -> Results:
        kept = {name: x.detach().clone() for name, x in leaves.tensors.items()}
        with xk.backend(case.engine):
            results = run(ours, leaves.tensors, True)
        for name, x in leaves.tensors.items():
            if not torch.equal(x, kept[name]):
                raise Mismatch(f"{name} was changed")
            if x.requires_grad and GRADIENT + name in results:
                gradient = results[GRADIENT + name]
                if gradient.dtype != x.dtype:
                    raise Mismatch(f"{GRADIENT}{name}: {gradient.dtype}, expected {x.dtype}")
                check_strides(GRADIENT + name, gradient, x, strict=name not in leaves.parameters)
        return {name: x.detach() for name, x in results.items()}

    def expected(precision: Precision) -> Results:
        tensors = {name: precision.convert(x) for name, x in leaves.tensors.items()}
        return {name: x.detach() for name, x in run(theirs, tensors, False).items()}

    yield Call(case.operator, call, expected, case.dtype, slack, noise, leaves.degenerate)


def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As (B, C, N)."""
    return [x.flatten(2) for x in tensors]


def named(name: str, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Results:
    """Results by number; checked to be of `dtype`."""
    for x in tensors:
        if dtype is not None and x.dtype != dtype:
            raise Mismatch(f"{name}: {x.dtype}, expected {dtype}")
    return {f"{name} {i}": x for i, x in enumerate(tensors)}


def draw_shape(draw: Draw, batch: int, channels: int, tokens: int, maps: bool) -> tuple[int, ...]:
    if not maps:
        return batch, channels, tokens
    height = draw.one([h for h in range(1, tokens + 1) if tokens % h == 0] or [1])
    return batch, channels, height, tokens // height


def draw_tokens(draw: Draw, empty: float = 0.04) -> int:
    if draw.likely(empty):
        return 0
    return draw.weighted({1: 1.0, draw.integer(2, 20): 5.0, draw.integer(21, 200): 4.0})


def attention(seed: int, kind: str) -> tuple[OperatorCase, Iterator[Call]]:
    """A call of either attention core."""
    draw = Draw(f"{kind} {seed}")
    dtype, slots = draw_dtype(draw), draw.integer(1, 3)
    heads = draw.weighted({1: 3.0, 2: 1.0, 3: 1.0}) if kind == "softmax" else 1
    channels, width = (heads * draw.integer(1, 40 // heads) for _ in range(2))
    width = draw.one([channels, width])
    batch = draw.weighted({0: 0.05, 1: 1.0, 2: 1.0, 3: 0.5})
    maps = draw.likely(0.5)
    leaves = Leaves(draw, dtype, draw.one([0.0, 0.6, 1.0, 1.0]))
    mean = draw.weighted({0.0: 6.0, -5.0: 1.0, -14.0: 1.0, -30.0: 1.0, 25.0: 1.0})
    mean = mean if kind == "linear" else 0.0
    for i in range(slots):
        leaves.features(f"query {i}", draw_shape(draw, batch, channels, draw_tokens(draw), maps))
    for i in range(slots):
        tokens = draw_tokens(draw)
        leaves.features(f"key {i}", draw_shape(draw, batch, channels, tokens, maps), mean)
        leaves.features(f"value {i}", draw_shape(draw, batch, width, tokens, maps))
    single = slots == 1 and draw.likely(0.5)
    edges = [(0, 0, 0, 0)] if single else draw_edges(draw, slots, own=False)
    schedule = Schedule.from_edges(edges, num_queries=slots, num_sources=slots, allow_self=True)
    if not single and draw.likely(0.2):
        edges, schedule = [(i, i, i, 0) for i in range(slots)], None
    options: dict[str, Any]
    slack = 0.0
    if kind == "softmax":
        options = {"heads": heads, "scale": draw.one([None, None, 1.0, 0.05, -0.3])}
        extra = {"return_lse": draw.likely(0.5)}
        slack = _limit_scores(leaves, edges, options)
    else:
        feature_map = draw.weighted({"softplus": 6.0, "relu": 1.0, "elu": 1.0, "identity": 0.5})
        options = {"feature_map": feature_map, "eps": draw.one([1e-12, 1e-12, 1e-6, 3.0])}
        extra = {"return_state": draw.likely(0.5)}
        if draw.likely(0.2):
            outputs = len({o for _, _, o, _ in edges})
            leaves.parameter("state_s", draw.normal(outputs, batch, width, channels))
            leaves.parameter("state_z", draw.uniform(outputs, batch, channels))
    case = OperatorCase(
        seed, kind, draw_engine(draw), dtype, tuple(leaves.texts), tuple(edges), options | extra
    )

    def slots_of(tensors: dict[str, Tensor]) -> list[list[Tensor]]:
        return [leaves.group(prefix, tensors) for prefix in ("query", "key", "value")]

    def state_of(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        return (tensors["state_s"], tensors["state_z"]) if "state_s" in tensors else None

    def ours(tensors: dict[str, Tensor]) -> Results:
        arguments: list[Any] = slots_of(tensors)
        queries = arguments[0]
        arguments = [x[0] for x in arguments] if single else [*arguments, schedule]
        if kind == "linear":
            found = xk.linear_cross_attention(
                *arguments, **options, **extra, state=state_of(tensors)
            )
        else:
            found = xk.softmax_cross_attention(*arguments, **options, **extra)
        outputs, more = found if any(extra.values()) else (found, ())
        more = [more] if isinstance(more, Tensor) else [*more]
        outputs = [outputs] if single else outputs
        for y, (q, _, _) in zip(outputs, oracle.groups(edges), strict=True):
            if y.shape != (batch, width, *queries[q].shape[2:]):
                raise Mismatch(f"output of shape {tuple(y.shape)} for {tuple(queries[q].shape)}")
        accumulated = ACCUMULATED.get(dtype, torch.float32)
        return {**named("output", flat(outputs), dtype), **named("more", more, accumulated)}

    def theirs(tensors: dict[str, Tensor]) -> Results:
        query, key, value = map(flat, slots_of(tensors))
        if kind == "linear":
            found = oracle.linear(query, key, value, edges, **options, state=state_of(tensors))
            outputs, more = found.outputs, [found.s, found.z]
        else:
            outputs, more = oracle.softmax(query, key, value, edges, **options)
        return {**named("output", outputs), **(named("more", more) if any(extra.values()) else {})}

    allowances = (0.0, 0.0) if case.engine == "reference" else (slack, _noise(leaves))
    return case, compared(case, leaves, ours, theirs, *allowances)


LARGEST_SCORE = 1000.0
LARGE = 50.0


def _noise(leaves: Leaves) -> float:
    """What gradients of queries and keys may be off by where values are huge.

    The gradients of weights are differences g . v - g . out, zero where all weight is on one token:
    the rounding error of the output is theirs.
    """
    values = [x.detach().abs().max() for x in leaves.group("value", leaves.tensors) if x.numel()]
    largest = float(max(values, default=torch.zeros(())))
    return 16 * UNIT[ACCUMULATED.get(leaves.dtype, torch.float32)] * largest * (largest > LARGE)


def _limit_scores(leaves: Leaves, edges: oracle.Edges, options: dict[str, Any]) -> float:
    """Have no gradients where scores are huge; the slack of gradients else.

    Kernels recompute the weights from the log-sum-exp, exp(score - lse): the rounding errors of
    both, units of their size, are relative errors of the weights. Op by op they cancel.
    """
    tensors = {name: x.detach().double() for name, x in leaves.tensors.items()}
    slots = [flat(leaves.group(prefix, tensors)) for prefix in ("query", "key", "value")]
    sums = [x for x in oracle.softmax(*slots, edges, **options)[1] if x.numel()]
    largest = max((float(x.nan_to_num(neginf=0.0).abs().max()) for x in sums), default=0.0)
    if largest > LARGEST_SCORE:
        for x in leaves.tensors.values():
            x.requires_grad_(False)
    return 4 * UNIT[ACCUMULATED.get(leaves.dtype, torch.float32)] * largest


def block(seed: int) -> tuple[OperatorCase, Iterator[Call]]:
    """A call of the block for inference."""
    draw = Draw(f"block {seed}")
    dtype, slots, channels = draw_dtype(draw), draw.integer(1, 3), draw.integer(1, 40)
    batch = draw.weighted({0: 0.05, 1: 1.0, 2: 1.0, 3: 0.5})
    maps = draw.likely(0.5)
    leaves = Leaves(draw, dtype, 0.0)
    for i in range(slots):
        leaves.features(f"x {i}", draw_shape(draw, batch, channels, draw_tokens(draw), maps))
    edges = draw_edges(draw, slots, own=draw.likely(0.5))
    schedule = Schedule.from_edges(edges, num_queries=slots, num_sources=slots, allow_self=True)
    sets = schedule.num_weights
    rounded = draw.likely(0.3)
    for name, x in (
        ("weight", draw.normal(sets, 5, channels, channels) * (2 / channels) ** 0.5),
        ("bias", 0.3 * draw.normal(sets, 5, channels)),
    ):
        leaves.add(name, x.to(dtype if rounded else ACCUMULATED.get(dtype, torch.float32)), "")
    eps, packed = draw.one([1e-12, 1e-12, 2.0]), draw.likely(0.3)
    out = draw.one(["new", "new", "contiguous", "channels_last", "sliced", "sliced_last"])
    case = OperatorCase(
        seed,
        "block",
        draw_engine(draw),
        dtype,
        tuple(leaves.texts),
        tuple(edges),
        {"eps": eps, "packed": packed, "out": out},
    )

    def ours(tensors: dict[str, Tensor]) -> Results:
        features, weight, bias = leaves.group("x", tensors), tensors["weight"], tensors["bias"]
        options: dict[str, Any] = {"eps": eps}
        if packed:
            options["packed"] = xk.pack_block_weights(weight, bias, dtype)
        shapes = [features[q].shape for q, _, _ in oracle.groups(edges)]
        if out != "new":
            nan = [torch.full(s, float("nan"), dtype=dtype) for s in shapes]
            options["out"] = [LAYOUTS[out](x) for x in nan]
        outputs = xk.cross_attention_block(features, weight, bias, schedule, **options)
        if [y.shape for y in outputs] != shapes:
            raise Mismatch(f"output shapes {[y.shape for y in outputs]}, expected {shapes}")
        if out != "new" and any(a is not b for a, b in zip(outputs, options["out"], strict=True)):
            raise Mismatch("outputs are others than those given")
        return named("output", flat(outputs), dtype)

    def theirs(tensors: dict[str, Tensor]) -> Results:
        features = flat(leaves.group("x", tensors))
        weight, bias = (tensors[n].to(features[0].dtype) for n in ("weight", "bias"))
        return named("output", oracle.block(features, weight, bias, edges, eps))

    return case, compared(case, leaves, ours, theirs)


def training_block(seed: int) -> tuple[OperatorCase, Iterator[Call]]:
    """A call of the block for training."""
    draw = Draw(f"training_block {seed}")
    dtype, slots, channels = draw_dtype(draw), draw.integer(1, 3), draw.integer(1, 24)
    batch, maps = draw.integer(1, 3), draw.likely(0.5)
    leaves = Leaves(draw, dtype, draw.one([0.6, 1.0, 1.0]))
    for i in range(slots):
        tokens = draw.weighted({draw.integer(16, 60): 3.0, draw.integer(61, 300): 2.0, 1: 0.05})
        leaves.features(f"x {i}", draw_shape(draw, batch, channels, tokens, maps))
    edges = draw_edges(draw, slots, own=draw.likely(0.5))
    schedule = Schedule.from_edges(edges, num_queries=slots, num_sources=slots, allow_self=True)
    shape = (schedule.num_weights, 5, channels)
    leaves.parameter("weight", draw.normal(*shape, channels) * (2 / channels) ** 0.5)
    leaves.parameter("gamma", 0.5 + draw.normal(*shape).abs())
    leaves.parameter("beta", draw.normal(*shape))
    fixed, eps = draw.likely(0.25), draw.one([1e-12, 1e-12, 2.0])
    bn_eps = draw.one([1e-5, 1e-5, 1e-3])
    if fixed:
        leaves.chance = 0.0
        leaves.parameter("mean", draw.normal(*shape))
        leaves.parameter("var", 0.5 + draw.uniform(*shape))
    case = OperatorCase(
        seed,
        "training_block",
        draw_engine(draw),
        dtype,
        tuple(leaves.texts),
        tuple(edges),
        {"eps": eps, "bn_eps": bn_eps, "fixed": fixed},
    )

    def ours(tensors: dict[str, Tensor]) -> Results:
        outputs, statistics = xk.cross_attention_block_training(
            leaves.group("x", tensors),
            *(tensors[name] for name in ("weight", "gamma", "beta")),
            schedule,
            running_mean=tensors.get("mean"),
            running_var=tensors.get("var"),
            bn_eps=bn_eps,
            eps=eps,
        )
        results = named("output", flat(outputs), dtype)
        if not fixed:
            for row, mean, var in zip(*statistics[:3], strict=True):
                results[f"no gradient, mean {row}"] = mean
                results[f"no gradient, variance {row}"] = var + bn_eps  # as it is used
        return results

    def theirs(tensors: dict[str, Tensor]) -> Results:
        # In the type of the parameters: the operator computes in it whatever the features are.
        kind = tensors["weight"].dtype
        found = oracle.training_block(
            [x.to(kind) for x in flat(leaves.group("x", tensors))],
            *(tensors[name] for name in ("weight", "gamma", "beta")),
            edges,
            (tensors["mean"], tensors["var"]) if fixed else None,
            bn_eps,
            eps,
        )
        if not fixed and any(
            leaves.tensors[f"x {i}"].flatten(2)[:, 0].numel() == 1 for i in range(slots)
        ):
            raise ValueError("Expected more than 1 value per channel when training")
        results = named("output", found.outputs)
        for row, mean in found.means.items():
            results[f"no gradient, mean {row}"] = mean
            results[f"no gradient, variance {row}"] = found.variances[row] + bn_eps
        return results

    return case, compared(case, leaves, ours, theirs)


def pyramid(seed: int) -> tuple[OperatorCase, Iterator[Call]]:
    """A call of the aggregation of a pyramid."""
    draw = Draw(f"pyramid {seed}")
    dtype, levels = draw_dtype(draw), draw.integer(1, 4)
    batch = draw.weighted({0: 0.03, 1: 1.0, 2: 1.0, 3: 0.5})
    leaves = Leaves(draw, dtype, draw.one([0.0, 0.6, 1.0]))
    hidden, outputs = draw.integer(1, 40), draw.integer(1, 9)
    height, width = draw.integer(1, 20), draw.integer(1, 20)
    ragged = draw.likely(0.4)
    for s in range(levels):
        channels = draw.integer(1, 24)
        size = (max(1, height >> s), max(1, width >> s))
        if ragged and s:
            size = (draw.integer(1, 21), draw.integer(1, 21))
        leaves.features(f"x {s}", (batch, channels, *size))
        leaves.parameter(f"weight {s}", draw.normal(hidden, channels) * channels**-0.5)
    leaves.parameter("scale", 0.5 + draw.normal(hidden).abs())
    leaves.parameter("shift", draw.normal(hidden))
    leaves.parameter("classifier", draw.normal(outputs, hidden) * hidden**-0.5)
    if draw.likely(0.7):
        leaves.parameter("bias", draw.normal(outputs))
    batch_statistics, eps = draw.likely(0.5), draw.one([1e-5, 1e-5, 1e-2])
    options = {"batch_statistics": batch_statistics, "eps": eps}
    case = OperatorCase(seed, "pyramid", draw_engine(draw), dtype, tuple(leaves.texts), (), options)

    def seen(*statistics: Tensor) -> list[Tensor]:
        """Mean and variance, the latter as it is used."""
        return [x + eps * i for i, x in enumerate(statistics)]

    def arguments(tensors: dict[str, Tensor]) -> list[Any]:
        vectors = [tensors[name] for name in ("scale", "shift", "classifier")]
        lists = [leaves.group("x", tensors), leaves.group("weight", tensors)]
        return [*lists, *vectors, tensors.get("bias")]

    def ours(tensors: dict[str, Tensor]) -> Results:
        found = xk.pyramid_projection(*arguments(tensors), **options)
        output, *statistics = found if batch_statistics else (found,)
        statistics = seen(*statistics)
        accumulated = ACCUMULATED.get(dtype, torch.float32)
        return {
            **named("output", [output], dtype),
            **named("no gradient, statistic", statistics, accumulated),
        }

    def theirs(tensors: dict[str, Tensor]) -> Results:
        features, weights, *others = arguments(tensors)
        kind = features[0].dtype
        weights = [x.to(kind) for x in weights]
        others = [None if x is None else x.to(kind) for x in others]
        if batch_statistics and features[0][:, 0].numel() < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        output, mean, var = oracle.pyramid(features, weights, *others, batch_statistics, eps)
        statistics = [] if mean is None or var is None else seen(mean, var)
        return {**named("output", [output]), **named("no gradient, statistic", statistics)}

    return case, compared(case, leaves, ours, theirs)
