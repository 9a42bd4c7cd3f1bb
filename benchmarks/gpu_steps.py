# ruff: noqa: B023 (functions made in a loop are called before it goes on)
"""The steps of `benchmarks.gpu_check` that judge: each takes a report, a device and an argument."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.ops.cross_attention_block import op as block_op
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case

from . import gpu_problems
from .gpu_module import ROOT
from .gpu_problems import (
    EPS,
    PUBLISHED_HEAD,
    Head,
    Report,
    linear,
    softmax,
    split,
    train,
    training_inputs,
)

_NAMES = ("cross_scale", "mixed", "empty_source", "joint", "wide_values")
_SMALL = [case for case in CASES if case.name in _NAMES]


def environment(report: Report, device: str, _: str) -> None:
    """Versions and the card."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": _output(["git", "rev-parse", "HEAD"]),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30),
            "driver": _output(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ),
        }
    report.add(**facts)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# Correctness: the tests of the operators' cases, against float64 on the CPU.


def _published(device: str) -> list[Case]:
    widths = (36, 72, 144, 288) if device == "cuda" else (36,)
    tasks = Schedule.cross_task(2)
    return [Case(f"C={c}", tasks, (130, 70), (130, 70), channels=c) for c in widths]


def _with_gradients(
    run: Callable[[Sequence[Tensor]], list[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(leaves)
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    grads = [g.to(dtype).to(x) for g, x in zip(drawn, results, strict=True)]
    found = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    both = zip(leaves, found, strict=True)
    return [x.detach() for x in results] + [
        torch.zeros_like(x) if g is None else g for x, g in both
    ]


def _judge_core(
    case: Case,
    dtype: torch.dtype,
    device: str,
    run: Callable[[Case, Sequence[Tensor]], list[Tensor]],
    composition: Callable[[Sequence[Tensor]], list[Tensor]],
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
    rounded: range = range(0),
) -> None:
    """Judge results and gradients; those in ``rounded`` as if they were of the inputs' type."""
    inputs = [x for group in case.tensors(dtype) for x in group]

    def reordered(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        query, key, value = split(case, tensors)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(key))]
        orders = [
            torch.randperm(k.shape[2], generator=g) for k, g in zip(key, generators, strict=True)
        ]
        moved = [
            [x[:, :, order] for x, order in zip(group, orders, strict=True)]
            for group in (key, value)
        ]
        return [*query, *moved[0], *moved[1]] if seed else list(tensors)

    truths = compare.truths(
        lambda x, seed: _with_gradients(lambda y: composition(reordered(y, seed)), x, dtype),
        inputs,
        dtype,
    )
    there = [layout(x.to(device)) for x in inputs]
    results = _with_gradients(lambda x: run(case, x), there, dtype)
    count = len(results) - len(inputs)
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        result = result.to(dtype) if i in rounded else result
        compare.check(f"result {i}", result.cpu(), truth, gradient=i >= count)


def correct_linear(report: Report, device: str, argument: str) -> None:
    """Values, states and gradients."""
    dtype = getattr(torch, argument)
    for case, layout in _cases_and_layouts(device):

        def composition(x: Sequence[Tensor], case: Case = case) -> list[Tensor]:
            outputs, state = compositions.linear_cross_attention(*split(case, x), case.schedule)
            return [*outputs, *state]

        # In cuda the states are float32 sums of products of what has been rounded to the type.
        outputs = case.schedule.num_outputs
        states = range(outputs, outputs + (2 if gpu_problems.ENGINE == "cuda" else 0))
        report.check(
            f"{case.name}, {layout}",
            lambda: _judge_core(case, dtype, device, linear, composition, LAYOUTS[layout], states),
        )


def correct_softmax(report: Report, device: str, argument: str) -> None:
    """Values, log-sum-exps and gradients, also with heads."""
    dtype = getattr(torch, argument)
    heads = (replace(_published(device)[0], name="heads", heads=3), "contiguous")
    for case, layout in [*_cases_and_layouts(device), heads]:

        def composition(x: Sequence[Tensor], case: Case = case) -> list[Tensor]:
            outputs, lse = compositions.softmax_cross_attention(
                *split(case, x), case.schedule, heads=case.heads
            )
            return [*outputs, *lse]

        report.check(
            f"{case.name}, {layout}",
            lambda: _judge_core(case, dtype, device, softmax, composition, LAYOUTS[layout]),
        )


def _cases_and_layouts(device: str) -> list[tuple[Case, str]]:
    published = [(case, "contiguous") for case in _published(device)]
    layouts = list(LAYOUTS) if device == "cuda" else ["token_major_sliced"]
    strided = [(_published(device)[0], name) for name in layouts if name != "contiguous"]
    return published + strided + [(case, "contiguous") for case in _SMALL]


def correct_block(report: Report, device: str, argument: str) -> None:
    """Outputs of the fused block, in slices of a buffer."""
    dtype = getattr(torch, argument)
    widths = (36, 72, 144, 288, 18) if device == "cuda" else (18,)
    for channels in widths:
        for schedule in (Schedule.cross_task(3), Schedule.cross_scale(3), Schedule.all_pairs(3, 1)):
            tokens = (130, 70, 9) if device == "cuda" else (20, 12, 9)
            what = f"C={channels}, {len(schedule.edges)} edges, {schedule.num_outputs} outputs"
            report.check(what, lambda: _judge_block(schedule, tokens, channels, dtype, device))


def _judge_block(
    schedule: Schedule, tokens: Sequence[int], channels: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features = [draw(2, channels, n).to(dtype) for n in tokens]
    weight = (draw(schedule.num_weights, 5, channels, channels) * (2 / channels) ** 0.5).to(dtype)
    bias = draw(schedule.num_weights, 5, channels).to(dtype)
    buffers = [
        torch.full((2, 2 * channels, tokens[q]), float("nan"), dtype=dtype, device=device)
        for q in schedule.output_queries
    ]
    outputs = [x[:, channels:] for x in buffers]
    there = [x.to(device) for x in features]
    engine, sets = gpu_problems.ENGINE, schedule.num_weights
    packed = block_op.pack_op(weight.to(device), bias.to(device), dtype, engine)
    block_op.block_out_op(there, packed, sets, schedule.edges_flat, EPS, outputs, engine)

    def evaluate(x: Sequence[Tensor], _: int) -> list[Tensor]:
        return compositions.cross_attention_block(x[:-2], x[-2], x[-1], schedule)

    with torch.no_grad():
        truths = compare.truths(evaluate, [*features, weight, bias], dtype)
    for i, (x, buffer, truth) in enumerate(zip(outputs, buffers, truths, strict=True)):
        compare.check(f"output {i}", x.cpu(), truth)
        assert bool(buffer[:, :channels].isnan().all()), "wrote outside of an output"


_HEADS = {
    "odd": Head((9, 12, 5), ((13, 17), (7, 9), (4, 5)), 50, 7),
    "one level": Head((5,), ((9, 11),), 17, 1),
    "many outputs": Head((6, 5), ((9, 7), (3, 2)), 33, 150),
}


def correct_pyramid(report: Report, device: str, argument: str) -> None:
    """Values by element; gradients by element in float32, else by norm, as relus may flip."""
    dtype = getattr(torch, argument)
    heads = {**_HEADS, "published": PUBLISHED_HEAD} if device == "cuda" else _HEADS
    for (name, head), statistics, last in itertools.product(
        heads.items(), (False, True), (False, True)
    ):
        if device == "cuda" or not last:
            what = f"{name}, {'batch' if statistics else 'fixed'}, {'channels last' * last}"
            report.check(what, lambda: _judge_head(head, dtype, device, statistics, last))


#: Largest relative L2 error of a gradient: that of a few relus on the other side of zero. Op by op
#: in bfloat16 it is up to 6e-2.
HEAD_ERROR = {torch.float16: 1e-2, torch.bfloat16: 1e-1}


def _judge_head(
    head: Head, dtype: torch.dtype, device: str, statistics: bool, channels_last: bool
) -> None:
    def evaluate(tensors: Sequence[Tensor], project: Any) -> list[Tensor]:
        def run(x: Sequence[Tensor]) -> list[Tensor]:
            return [head.run(x, statistics, project).flatten(2)]

        return _with_gradients(run, tensors, dtype)

    inputs = head.draw(dtype)
    project = compositions.pyramid_projection
    truths = compare.truths(lambda x, _: evaluate(x, project), inputs, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    there = [x.to(device, memory_format=layout if x.dim() == 4 else None) for x in inputs]
    output, *gradients = (x.cpu() for x in evaluate(there, None))
    compare.check("output", output, truths[0])
    for i, (x, truth) in enumerate(zip(gradients, truths[1:], strict=True)):
        if dtype is torch.float32:
            compare.check(f"gradient {i}", x, truth, gradient=True)
        else:
            _within(f"gradient {i}", x, truth.exact, HEAD_ERROR[dtype])


def _within(what: str, x: Tensor, exact: Tensor, allowed: float) -> None:
    error = float((x.double() - exact).norm() / exact.norm())
    if not error <= allowed:
        raise AssertionError(f"{what}: relative L2 error {error:.2e}, allowed {allowed:.2e}")


#: Largest relative L2 error of an output and of a gradient of the block in training.
TRAINING_ERROR = {
    torch.float32: (1e-5, 1e-3),
    torch.float16: (5e-3, 1.5e-1),
    torch.bfloat16: (3e-2, 3e-1),
}


def correct_training(report: Report, device: str, argument: str) -> None:
    """The block with batch statistics, forward and backward."""
    dtype = getattr(torch, argument)
    widths = (36, 72, 144, 288, 18) if device == "cuda" else (12,)
    for channels in widths:
        for schedule in (Schedule.cross_task(3), Schedule.cross_scale(3)):
            what = f"C={channels}, {len(schedule.edges)} edges"
            report.check(what, lambda: _judge_training(schedule, channels, dtype, device))


def _judge_training(schedule: Schedule, channels: int, dtype: torch.dtype, device: str) -> None:
    tokens = (5 * channels, 3 * channels + 1, 2 * channels)  # more than channels
    inputs = training_inputs(schedule, tokens, channels, dtype)
    there = [x.to(device) for x in inputs]
    found = _with_gradients(lambda x: train(schedule, x), there, dtype)
    doubles = [x.double() for x in inputs]
    exact = _with_gradients(lambda x: train(schedule, x, "reference"), doubles, dtype)
    for i, (x, r) in enumerate(zip(found, exact, strict=True)):
        allowed = TRAINING_ERROR[dtype][i >= schedule.num_outputs]
        _within(f"result {i}", x.cpu(), r, allowed)


def tf32(report: Report, device: str, _: str) -> None:
    """tf32 products are used when asked for, and only then."""
    case = _published(device)[1]
    inputs = [x.to(device) for group in case.tensors(torch.float32) for x in group]
    exact, _state = compositions.linear_cross_attention(
        *split(case, [x.double() for x in inputs]), case.schedule
    )
    for setting, low, high in (("ieee", 0.0, 1e-6), ("tf32", 1e-6, 1e-3)):
        torch.backends.cuda.matmul.fp32_precision = setting
        output = linear(case, inputs)[0]
        error = float((output - exact[0]).norm() / exact[0].norm())
        report.add(setting=setting, error=error)
        if not low <= error <= high:
            report.failures.append(f"{setting}: error {error}, expected {low} to {high}")


# Races, graphs, streams.


Run = Callable[[Sequence[Tensor]], list[Tensor]]


def _all(tokens: int, device: str) -> dict[str, tuple[Callable[..., list[Tensor]], Run]]:
    """Inputs, by dtype and seed, and calls of the operators."""
    schedule = Schedule.cross_task(3)
    case = Case("all", schedule, (tokens,) * 3, (tokens,) * 3, channels=36)
    head = Head((36, 20), ((30, tokens // 30), (15, 9)), 130, 40)

    def of_case(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        return [x.to(device) for group in case.tensors(dtype, seed=seed) for x in group]

    def of_head(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        return [x.to(device) for x in head.draw(dtype, seed)]

    def of_training(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        return [x.to(device) for x in training_inputs(schedule, (tokens,) * 3, 36, dtype, seed)]

    def of_block(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        *features, weight, _, beta = of_training(dtype, seed)
        return [*features, weight.to(dtype), beta.to(dtype)]

    def block(x: Sequence[Tensor]) -> list[Tensor]:
        with xk.backend(gpu_problems.ENGINE), torch.no_grad():
            return xk.cross_attention_block(list(x[:-2]), *x[-2:], schedule)

    every: dict[str, tuple[Callable[..., list[Tensor]], Run]] = {
        "linear": (of_case, lambda x: linear(case, x)),
        "softmax": (of_case, lambda x: softmax(case, x)),
        "block": (of_block, block),
        "pyramid": (of_head, lambda x: [head.run(x, True)]),
        "training": (of_training, lambda x: train(schedule, x)),
    }
    has = gpu_problems.OPERATORS.get(gpu_problems.ENGINE, tuple(every))
    return {name: every[name] for name in every if name in has}


def _results(name: str, run: Run, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What an operator gives, with all gradients if it has any."""
    return run(inputs) if name == "block" else _with_gradients(run, inputs, dtype)


def repeats(report: Report, device: str, _: str) -> None:
    """The same bits over and over: forward and all gradients."""
    size, count = (4800, 20) if device == "cuda" else (30, 1)
    for (name, (make, run)), dtype in itertools.product(
        _all(size, device).items(), (torch.bfloat16, torch.float32)
    ):
        inputs = make(dtype)
        first = _results(name, run, inputs, dtype)
        different = 0
        for _ in range(count):
            again = _results(name, run, inputs, dtype)
            different += not all(map(torch.equal, again, first))
        report.add(operator=name, dtype=str(dtype), different=different)
        if different:
            report.failures.append(f"{name}, {dtype}: {different} repeats differ")


def graphs(report: Report, device: str, _: str) -> None:
    """A captured call gives for new inputs what an eager call gives; other streams as well."""
    for name, (make, run) in _all(300, device).items():
        inputs = make(torch.bfloat16)
        run(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(inputs)
        fresh = make(torch.bfloat16, 1)
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        junk = [torch.randn_like(x) for x in inputs * 20]  # over whatever was freed
        graph.replay()
        torch.cuda.synchronize()
        expected = run(fresh)
        if not all(map(torch.equal, captured, expected)):
            report.failures.append(f"{name}: a replayed graph differs from an eager call")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = run(fresh)
        torch.cuda.current_stream().wait_stream(stream)
        if not all(map(torch.equal, aside, expected)):
            report.failures.append(f"{name}: another stream gives other results")
        report.add(operator=name, captured=len(captured), junk=len(junk))


def sanitized(report: Report, device: str, _: str) -> None:
    """Small calls of everything, to be run under compute-sanitizer."""
    for name, (make, run) in _all(60, device).items():
        inputs = make(torch.bfloat16)
        found = _results(name, run, inputs, torch.bfloat16)
        if device == "cuda":
            torch.cuda.synchronize()
        report.add(operator=name, results=len(found))


#: Elements between two samples of a tensor that is far apart, and which inputs of operators are.
FAR = 2**31
FAR_INPUTS = {
    "linear": (0, 4, 8),
    "softmax": (0, 4, 8),
    "block": (0,),
    "pyramid": (0,),
    "training": (0,),
}


def offsets(report: Report, device: str, _: str) -> None:
    """Samples 2^31 elements apart give what they give side by side; outputs too, where given."""
    for name, (make, run) in _all(300, device).items():
        inputs = make(torch.bfloat16)
        expected = _results(name, run, inputs, torch.bfloat16)
        moved = [_far(x) if i in FAR_INPUTS[name] else x for i, x in enumerate(inputs)]

        def judge() -> None:
            for i, (x, y) in enumerate(
                zip(_results(name, run, moved, torch.bfloat16), expected, strict=True)
            ):
                _within(f"result {i}", x, y.double(), 1e-2)

        report.check(f"{name}, inputs", judge)
        if name == "block":
            out = [_far(torch.empty_like(expected[0])), *map(torch.empty_like, expected[1:])]
            *features, weight, bias = inputs

            def judge_outputs() -> None:
                with xk.backend(gpu_problems.ENGINE), torch.no_grad():
                    schedule = Schedule.cross_task(3)
                    xk.cross_attention_block(features, weight, bias, schedule, out=out)
                for i, (x, y) in enumerate(zip(out, expected, strict=True)):
                    _within(f"output {i}", x, y.double(), 1e-2)

            report.check(f"{name}, outputs", judge_outputs)


def _far(x: Tensor) -> Tensor:
    """A copy whose samples are `FAR` elements apart."""
    sample = x[0].contiguous()
    base = x.new_empty(FAR * (x.size(0) - 1) + sample.numel())
    return base.as_strided(x.shape, (FAR, *sample.stride())).copy_(x)
