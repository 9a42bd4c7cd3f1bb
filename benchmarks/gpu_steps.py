# ruff: noqa: B023 (functions made in a loop are called before it goes on)
"""The steps of `benchmarks.gpu_check`: each takes a report, a device and an argument."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels.ops.cross_attention_block import op as block_op
from xattn_kernels.ops.linear_cross_attention import op as linear_op
from xattn_kernels.ops.softmax_cross_attention import op as softmax_op
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compare, compositions
from xattn_kernels.testing.cases import CASES, LAYOUTS, Case

from .problems import SCALES, SCHEDULE, OpByOpSet, Scale

BATCH = 8
#: Roofline of the blocks of one scale, all four together (seconds), and of memory (bytes/s), H200.
ROOFLINE_S, BANDWIDTH = 0.2e-3, 4.3e12
EPS = 1e-12

_NAMES = ("cross_scale", "mixed", "empty_source", "joint", "wide_values")
_SMALL = [case for case in CASES if case.name in _NAMES]


class Report:
    """Rows and failures of a step, written whenever there is something new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps({"rows": self.rows, "failures": self.failures}, indent=1))

    def check(self, what: str, judge: Callable[[], Any]) -> None:
        """Note a failure, and go on."""
        try:
            judge()
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:400]}")
            print("FAILED", self.failures[-1], flush=True)
        else:
            self.rows.append({"checked": what})


def environment(report: Report, device: str, _: str) -> None:
    """Versions and the card."""
    import triton

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
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


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# Correctness: the tests of the operators' cases, against float64 on the CPU.


def _published(device: str) -> list[Case]:
    widths = (36, 72, 144, 288) if device == "cuda" else (36,)
    tasks = Schedule.cross_task(2)
    return [Case(f"C={c}", tasks, (130, 70), (130, 70), channels=c) for c in widths]


def _split(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    queries, keys = len(case.query_tokens), len(case.source_tokens)
    return tensors[:queries], tensors[queries : queries + keys], tensors[queries + keys :]


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


def _linear(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    slots = [list(x) for x in _split(case, tensors)]
    edges = case.schedule.triples_flat
    outputs, s, z = linear_op.call(*slots, edges, None, None, "softplus", EPS, "triton")
    return [*outputs, s, z]


def _softmax(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    slots = [list(x) for x in _split(case, tensors)]
    scale = (case.channels // case.heads) ** -0.5
    outputs, lse = softmax_op.call(*slots, case.schedule.triples_flat, case.heads, scale, "triton")
    return [*outputs, *lse]


def _judge_core(
    case: Case,
    dtype: torch.dtype,
    device: str,
    run: Callable[[Case, Sequence[Tensor]], list[Tensor]],
    composition: Callable[[Sequence[Tensor]], list[Tensor]],
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:
    inputs = [x for group in case.tensors(dtype) for x in group]

    def reordered(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        query, key, value = _split(case, tensors)
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
        compare.check(f"result {i}", result.cpu(), truth, gradient=i >= count)


def correct_linear(report: Report, device: str, argument: str) -> None:
    """Values, states and gradients."""
    dtype = getattr(torch, argument)
    for case, layout in _cases_and_layouts(device):

        def composition(x: Sequence[Tensor], case: Case = case) -> list[Tensor]:
            outputs, state = compositions.linear_cross_attention(*_split(case, x), case.schedule)
            return [*outputs, *state]

        report.check(
            f"{case.name}, {layout}",
            lambda: _judge_core(case, dtype, device, _linear, composition, LAYOUTS[layout]),
        )


def correct_softmax(report: Report, device: str, argument: str) -> None:
    """Values, log-sum-exps and gradients, also with heads."""
    dtype = getattr(torch, argument)
    heads = (replace(_published(device)[0], name="heads", heads=3), "contiguous")
    for case, layout in [*_cases_and_layouts(device), heads]:

        def composition(x: Sequence[Tensor], case: Case = case) -> list[Tensor]:
            outputs, lse = compositions.softmax_cross_attention(
                *_split(case, x), case.schedule, heads=case.heads
            )
            return [*outputs, *lse]

        report.check(
            f"{case.name}, {layout}",
            lambda: _judge_core(case, dtype, device, _softmax, composition, LAYOUTS[layout]),
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
            tokens = (130, 70, 9)
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
    packed = block_op.pack_op(weight.to(device), bias.to(device), dtype, "triton")
    sets = schedule.num_weights
    block_op.block_op(there, packed, sets, schedule.edges_flat, EPS, outputs, "triton")

    def evaluate(x: Sequence[Tensor], _: int) -> list[Tensor]:
        return compositions.cross_attention_block(x[:-2], x[-2], x[-1], schedule)

    with torch.no_grad():
        truths = compare.truths(evaluate, [*features, weight, bias], dtype)
    for i, (x, buffer, truth) in enumerate(zip(outputs, buffers, truths, strict=True)):
        compare.check(f"output {i}", x.cpu(), truth)
        assert bool(buffer[:, :channels].isnan().all()), "wrote outside of an output"


def tf32(report: Report, device: str, _: str) -> None:
    """tf32 products are used when asked for, and only then."""
    case = _published(device)[1]
    inputs = [x.to(device) for group in case.tensors(torch.float32) for x in group]
    exact, _state = compositions.linear_cross_attention(
        *_split(case, [x.double() for x in inputs]), case.schedule
    )
    for setting, low, high in (("ieee", 0.0, 1e-6), ("tf32", 1e-6, 1e-3)):
        torch.backends.cuda.matmul.fp32_precision = setting
        output = _linear(case, inputs)[0]
        error = float((output - exact[0]).norm() / exact[0].norm())
        report.add(setting=setting, error=error)
        if not low <= error <= high:
            report.failures.append(f"{setting}: error {error}, expected {low} to {high}")


# Races, graphs, streams.


def repeats(report: Report, device: str, _: str) -> None:
    """The same bits over and over: forward and all gradients."""
    case = Case("repeats", Schedule.cross_task(4), (4800,) * 4, (4800,) * 4, channels=72)
    for (name, run), dtype in itertools.product(
        (("linear", _linear), ("softmax", _softmax)), (torch.bfloat16, torch.float32)
    ):
        inputs = [x.to(device) for group in case.tensors(dtype) for x in group]
        first = _with_gradients(lambda x, run=run: run(case, x), inputs, dtype)
        different = 0
        for _ in range(30 if name == "linear" else 4):
            again = _with_gradients(lambda x, run=run: run(case, x), inputs, dtype)
            different += not all(map(torch.equal, again, first))
        report.add(operator=name, dtype=str(dtype), different=different)
        if different:
            report.failures.append(f"{name}, {dtype}: {different} repeats differ")


def graphs(report: Report, device: str, _: str) -> None:
    """A captured call gives for new inputs what an eager call gives; other streams as well."""
    case = Case("graph", Schedule.cross_task(3), (300, 200, 100), (300, 200, 100), channels=36)
    for name, run in (("linear", _linear), ("softmax", _softmax)):
        inputs = [x.to(device) for group in case.tensors(torch.bfloat16) for x in group]
        run(case, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, inputs)
        fresh = [x.to(device) for group in case.tensors(torch.bfloat16, seed=1) for x in group]
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        junk = [torch.randn_like(x) for x in inputs * 20]  # over whatever was freed
        graph.replay()
        torch.cuda.synchronize()
        expected = run(case, fresh)
        if not all(map(torch.equal, captured, expected)):
            report.failures.append(f"{name}: a replayed graph differs from an eager call")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = run(case, fresh)
        torch.cuda.current_stream().wait_stream(stream)
        if not all(map(torch.equal, aside, expected)):
            report.failures.append(f"{name}: another stream gives other results")
        report.add(operator=name, captured=len(captured), junk=len(junk))


def sanitized(report: Report, device: str, _: str) -> None:
    """Small calls of everything, to be run under compute-sanitizer."""
    case = Case("small", Schedule.cross_task(2), (70, 33), (70, 33), channels=36)
    inputs = [x.to(device) for group in case.tensors(torch.bfloat16) for x in group]
    for run in (_linear, _softmax):
        _with_gradients(lambda x, run=run: run(case, x), inputs, torch.bfloat16)
    _judge_block(Schedule.cross_task(2), (70, 33), 36, torch.bfloat16, device)
    torch.cuda.synchronize()
    report.add(done=True)


def build(report: Report, device: str, _: str) -> None:
    """The package builds with what is there (the Triton engine does without)."""
    target = report.path.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "--target", str(target), "."], capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    report.add(code=done.returncode)
    if done.returncode:
        report.failures.append(done.stderr[-800:])


# Speed.


def _seconds(call: Callable[[], Any], seconds: float = 1.0, graph: bool = True) -> dict[str, float]:
    """Medians with the L2 cache flushed before every call: eager, and replayed as a graph."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    found = {"eager": _median(call, flush, seconds)}
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        found["graph"] = _median(captured.replay, flush, seconds)
    return found


def _median(call: Callable[[], Any], flush: Tensor, seconds: float) -> float:
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < seconds and len(samples) < 100):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def _block_calls(scale: Scale) -> tuple[Callable[[], Any], OpByOpSet, list[Tensor]]:
    model = OpByOpSet(scale.width)
    weight, bias = (x.to("cuda", torch.bfloat16) for x in model.folded())
    model = model.to("cuda", torch.bfloat16)
    features = [x.to("cuda", torch.bfloat16) for x in scale.features(BATCH)]
    flat = [x.flatten(2) for x in features]
    packed = block_op.pack_op(weight, bias, torch.bfloat16, "triton")
    outputs = [torch.empty_like(flat[e.query]) for e in SCHEDULE.edges]
    sets, edges = SCHEDULE.num_weights, SCHEDULE.edges_flat

    def fused() -> None:
        block_op.block_op(flat, packed, sets, edges, EPS, outputs, "triton")

    fused()
    with torch.no_grad():
        expected = model(features)
    for x, y in zip(outputs, expected, strict=True):
        error = float((x.float() - y.flatten(2).float()).norm() / y.float().norm())
        if not error < 0.02:
            raise AssertionError(f"scale {scale.number}: relative error {error}")
    return fused, model, features


@torch.no_grad()
def bench_block(report: Report, device: str, _: str) -> None:
    """The cross-attentions of CTAM, T=4, B=8, bf16, four scales: fused against op by op."""
    total = {"fused": 0.0, "by op": 0.0, "by op, graph": 0.0}
    for number in SCALES:
        scale = Scale(number)
        fused, model, features = _block_calls(scale)
        ours, theirs = _seconds(fused), _seconds(lambda model=model, x=features: model(x))
        row = {f"fused {key} ms": 1e3 * s for key, s in ours.items()}
        row |= {f"by op {key} ms": 1e3 * s for key, s in theirs.items()}
        report.add(scale=str(scale), **row)
        total["fused"] += ours.get("graph", ours["eager"])
        total["by op"] += theirs["eager"]
        total["by op, graph"] += theirs.get("graph", theirs["eager"])
    report.add(
        scale="all",
        fused_ms=1e3 * total["fused"],
        vs_by_op=total["by op"] / total["fused"],
        vs_by_op_graph=total["by op, graph"] / total["fused"],
        of_roofline=ROOFLINE_S / total["fused"],
    )


@torch.no_grad()
def bench_compiled(report: Report, device: str, _: str) -> None:
    """The same against torch.compile(mode="max-autotune")."""
    for number in reversed(SCALES):
        scale = Scale(number)
        fused, model, features = _block_calls(scale)
        compiled: Any = torch.compile(model, mode="max-autotune-no-cudagraphs")
        ours, theirs = _seconds(fused), _seconds(lambda run=compiled, x=features: run(x))
        best = min(theirs.values())
        report.add(scale=str(scale), compiled_ms=1e3 * best, vs_compiled=best / min(ours.values()))


def bench_linear(report: Report, device: str, _: str) -> None:
    """The linear core, forward and backward, B=8, T=4, bf16."""
    for number in SCALES:
        scale = Scale(number)
        tokens = scale.shape[0] * scale.shape[1]
        case = Case("core", SCHEDULE, (tokens,) * 4, (tokens,) * 4, scale.width, batch=BATCH)
        inputs = [
            x.to("cuda", torch.bfloat16).requires_grad_()
            for group in case.tensors(torch.bfloat16)
            for x in group
        ]
        grads = [torch.randn(BATCH, scale.width, tokens, device="cuda").bfloat16()] * 12

        def step(run: Any, inputs: Any = inputs, grads: Any = grads) -> None:
            torch.autograd.grad(run(inputs), inputs, grads)

        def ours(x: Any, case: Case = case) -> list[Tensor]:
            return _linear(case, x)[:12]

        def theirs(x: Any, case: Case = case) -> list[Tensor]:
            return compositions.linear_cross_attention(*_split(case, x), case.schedule)[0]

        fused = _seconds(lambda: step(ours), graph=False)["eager"]
        by_op = _seconds(lambda: step(theirs), graph=False)["eager"]
        # Forward reads q, k, v and writes 12 outputs; backward reads all again and writes 3 kinds.
        slot = BATCH * scale.width * tokens * 2
        floor = slot * (4 * 3 + 12 + 12 + 4 * 3 + 4 * 3) / BANDWIDTH
        row = {"fused_ms": 1e3 * fused, "by_op_ms": 1e3 * by_op, "of_memory_floor": floor / fused}
        if number in (0, 3):
            compiled = torch.compile(theirs)
            row["vs_compiled"] = _seconds(lambda: step(compiled), graph=False)["eager"] / fused
        report.add(scale=str(scale), **row)


@torch.no_grad()
def bench_softmax(report: Report, device: str, _: str) -> None:
    """The softmax core, forward, one edge, against the backends of torch's attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for number in (1, 2, 3, 0):
        scale = Scale(number)
        tokens = scale.shape[0] * scale.shape[1]
        case = Case("core", Schedule.identity(1), (tokens,), (tokens,), scale.width, batch=BATCH)
        inputs = [x.to("cuda") for group in case.tensors(torch.bfloat16) for x in group]
        row = {"fused_ms": 1e3 * min(_seconds(lambda: _softmax(case, inputs), 0.3).values())}
        q, k, v = (x.transpose(1, 2).unsqueeze(1).contiguous() for x in inputs)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = backend.name.partition("_")[0].lower()
            try:
                with sdpa_kernel(backend):
                    times = _seconds(lambda: F.scaled_dot_product_attention(q, k, v), 0.3)
            except RuntimeError as error:
                print(f"{name}: {error}")
            else:
                row[f"{name}_ms"] = 1e3 * min(times.values())
        best = min((ms for name, ms in row.items() if name != "fused_ms"), default=None)
        if best is not None:
            row["vs_best"] = best / row["fused_ms"]
        report.add(scale=str(scale), **row)
