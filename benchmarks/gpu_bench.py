# ruff: noqa: B023 (functions made in a loop are called before it goes on)
"""The steps of `benchmarks.gpu_check` that measure: bf16, B=8, T=4, NYUD-v2 sizes.

Every step checks what it times first, and names what it measured of the promises of `gpu_bars`.
Calls without gradients are timed eager and as replayed CUDA graphs, and the smaller figure counts
for both sides of a ratio, but where a promise is about eager calls. The L2 cache is cold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import xattn_kernels as xk
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import compositions
from xattn_kernels.testing.cases import LAYOUTS, Case
from xattn_kernels.testing.device import device_interleaved, graphed
from xattn_kernels.testing.measure import tensor_bytes

from . import gpu_problems
from .gpu_problems import Head, Report, linear, softmax, split, train
from .problems import SCALES, SCHEDULE, TASKS, OpByOpSet, Scale

BATCH = 8
DEVICE, DTYPE = "cuda", torch.bfloat16
#: Of the cross-attentions of CTAM, all scales, and of CSAM; seconds, on an H200.
ROOFLINE_S, CSAM_FLOOR_S = 0.2e-3, 78e-6
#: Bytes a second that a copy moves on an H200.
BANDWIDTH = 4.3e12
Call = Callable[[], Any]
COMPILED = "torch.compile(max-autotune)"


def medians(
    calls: Mapping[str, Call], seconds: float = 1.0, graph: bool = True
) -> dict[str, float]:
    """Seconds of each call and, with ", graph" behind its name, of its graph, timed by turns."""
    every = dict(calls)
    if graph:
        every |= {f"{name}, graph": graphed(call) for name, call in calls.items()}
    once = device_interleaved(every, repetitions=2, warmup=2)
    total = sum(timing.median for timing in once.values())
    repetitions = max(5, min(100, int(seconds / max(total, 1e-9))))
    timings = device_interleaved(every, repetitions=repetitions, warmup=0)
    print({name: f"{1e3 * timing.median:.4f} ms" for name, timing in timings.items()}, flush=True)
    return {name: timing.median for name, timing in timings.items()}


def best(calls: Mapping[str, Call], seconds: float = 1.0, graph: bool = True) -> dict[str, float]:
    """Seconds of each call, eager or as a graph, whichever is less."""
    found = medians(calls, seconds, graph)
    return {name: min(found[name], found.get(f"{name}, graph", found[name])) for name in calls}


def close(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> None:
    """Raises AssertionError for a relative L2 error above `allowed`."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        x, y = x.detach(), y.detach()
        error = float((x.float().flatten() - y.float().flatten()).norm() / y.float().norm())
        if not error <= allowed:
            raise AssertionError(f"{what}, {i}: relative L2 error {error:.1e}, allowed {allowed}")


def block_calls(scale: Scale, engine: str | None = None) -> tuple[Call, OpByOpSet, list[Tensor]]:
    """The cross-attentions of a scale: an engine's, checked; op by op, and its features."""
    engine = engine or gpu_problems.ENGINE
    model = OpByOpSet(scale.width)
    weight, bias = (x.to(DEVICE, DTYPE) for x in model.folded())
    model = model.to(DEVICE, DTYPE)
    features = [x.to(DEVICE, DTYPE) for x in scale.features(BATCH)]
    out = [torch.empty_like(features[edge.query]) for edge in SCHEDULE.edges]
    with xk.backend(engine):
        packed = xk.pack_block_weights(weight, bias)

    @torch.no_grad()
    def ours() -> None:
        with xk.backend(engine):
            xk.cross_attention_block(features, weight, bias, SCHEDULE, packed=packed, out=out)

    ours()
    with torch.no_grad():
        close(f"scale {scale}", out, model(features), 0.02)
    return ours, model, features


def launches_of(call: Call) -> int:
    """Kernels, copies and fills on the device in one call; none on the CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiled.events())


@torch.no_grad()
def cam(report: Report, device: str, _: str) -> None:
    """CTAM and CSAM in inference against op by op, and against other engines."""
    rivals = gpu_problems.rivals()
    total = dict.fromkeys(("fused", "op by op", *rivals), 0.0)
    for number in SCALES:
        scale = Scale(number)
        ours, model, features = block_calls(scale)
        calls = {"fused": ours, "op by op": lambda m=model, x=features: m(x)}
        calls |= {name: block_calls(scale, engine)[0] for name, engine in rivals.items()}
        found = medians(calls)
        launches = launches_of(ours)
        row = {f"{name} ms": 1e3 * seconds for name, seconds in found.items()}
        report.add(scale=str(scale), **row, launches=launches)
        for way in ("fused", *rivals):
            total[way] += min(found[way], found[f"{way}, graph"])
        total["op by op"] += found["op by op"]
        if number == 0:
            report.bar("kernel launches for one CTAM in inference", launches)
    name = "CTAM CAM set, four scales"
    for way in ("op by op", *rivals):
        report.bar(f"{name}, {way} / fused", total[way] / total["fused"])
    report.bar(f"{name}, share of the 0.2 ms roofline", 100 * ROOFLINE_S / total["fused"])
    seconds = sum(_cross_scale(number) for number in SCALES[:-1])
    report.add(scale="CSAM", fused_ms=1e3 * seconds)
    report.bar("CSAM CAM set, share of the 78 us memory floor", 100 * CSAM_FLOOR_S / seconds)


@torch.no_grad()
def sm90a(report: Report, device: str, _: str) -> None:
    """The block by warpgroup products, which XATTN_CUDA_SM90A=1 asks for, and without them."""

    def asked(value: str, run: Call) -> Call:
        def call() -> None:
            os.environ["XATTN_CUDA_SM90A"] = value
            run()

        return call

    for number in SCALES:
        calls = {}
        for name, value in (("mma", "0"), ("wgmma", "1")):
            os.environ["XATTN_CUDA_SM90A"] = value  # checked the way it is timed
            calls[name] = asked(value, block_calls(Scale(number))[0])
        found = best(calls)
        report.add(
            scale=str(Scale(number)),
            **{f"{name} ms": 1e3 * seconds for name, seconds in found.items()},
            ratio=found["mma"] / found["wgmma"],
        )


def _cross_scale(target: int) -> float:
    """Seconds of a target scale of all tasks, sources in its width already."""
    width, coarser = Scale(target).width, SCALES[target:]
    slots, edges = [], []
    for task in range(len(TASKS)):
        first = len(slots)
        for number in coarser:
            height, columns = Scale(number).shape
            slots.append(torch.randn(BATCH, width, height * columns, device=DEVICE, dtype=DTYPE))
            if number > target:
                edges.append((first, len(slots) - 1, len(edges), task))
    schedule = Schedule.from_edges(edges, num_queries=len(slots), num_weights=len(TASKS))
    weight = torch.randn(len(TASKS), 5, width, width, device=DEVICE, dtype=DTYPE) * width**-0.5
    bias = torch.zeros(len(TASKS), 5, width, device=DEVICE, dtype=DTYPE)
    out = [torch.empty_like(slots[query]) for query, *_ in edges]
    with xk.backend(gpu_problems.ENGINE):
        packed = xk.pack_block_weights(weight, bias)

    @torch.no_grad()
    def ours() -> None:
        with xk.backend(gpu_problems.ENGINE):
            xk.cross_attention_block(slots, weight, bias, schedule, packed=packed, out=out)

    ours()
    expected = compositions.cross_attention_block(
        slots[: len(coarser)], weight, bias, _one(coarser)
    )
    close(f"CSAM, target {target}", out[: len(coarser) - 1], expected, 0.02)
    return best({"fused": ours}, 0.5)["fused"]


def _one(coarser: Sequence[int]) -> Schedule:
    """The edges of the first task alone."""
    return Schedule.from_edges([(0, i, i - 1, 0) for i in range(1, len(coarser))])


def training_calls(scale: Scale) -> tuple[Call, Call, OpByOpSet, list[Tensor], dict[str, Any]]:
    """Forward and backward of the cross-attentions: ours, op by op; and what saving needs."""
    model = OpByOpSet(scale.width).train()
    layers = [
        layer
        for block in model.blocks
        for layer in (*block.query_project, *block.key_project, block.value_project)
    ]
    shape = (len(SCHEDULE.edges), 5)
    parameters = [
        torch.stack(list(x)).unflatten(0, shape).detach().to(DEVICE).requires_grad_()
        for x in (
            [layer.conv.weight.flatten(1) for layer in layers],
            [layer.bn.weight for layer in layers],
            [layer.bn.bias for layer in layers],
        )
    ]
    model = model.to(DEVICE, DTYPE)
    features = [x.to(DEVICE, DTYPE).requires_grad_() for x in scale.features(BATCH)]
    grads = [torch.randn_like(features[edge.query]) for edge in SCHEDULE.edges]
    theirs = [*features, *model.parameters()]
    runs = {
        "ours": lambda: train(SCHEDULE, [*features, *parameters]),
        "op by op": lambda: model(features),
    }

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(runs["ours"](), [*features, *parameters], grads)

    def op_by_op() -> tuple[Tensor, ...]:
        return torch.autograd.grad(runs["op by op"](), theirs, grads)

    close(f"training, scale {scale}", runs["ours"](), runs["op by op"](), 0.05)
    close("gradients", ours()[: len(TASKS)], op_by_op()[: len(TASKS)], 0.4)  # relus flip in bf16
    return ours, op_by_op, model, features, runs


def saved_bytes(run: Call, own: Sequence[Tensor]) -> int:
    """Memory that autograd keeps between forward and backward, but for what is there anyway."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = run()
    del outputs
    alive = {x.untyped_storage().data_ptr() for x in own}
    return tensor_bytes([x for x in kept if x.untyped_storage().data_ptr() not in alive])


def training(report: Report, device: str, _: str) -> None:
    """CTAM in training, forward and backward, against op by op."""
    total = {"ours": 0.0, "op by op": 0.0}
    saved = {"ours": 0, "op by op": 0}
    for number in SCALES:
        ours, op_by_op, model, features, runs = training_calls(Scale(number))
        found = best({"ours": ours, "op by op": op_by_op}, graph=False)
        own = [*features, *model.parameters(), *model.buffers()]
        for name, run in runs.items():
            total[name] += found[name]
            saved[name] += saved_bytes(run, own)
        report.add(scale=str(Scale(number)), **{f"{k}_ms": 1e3 * v for k, v in found.items()})
    name = "training CTAM, four scales, forward + backward, op by op / ours"
    report.bar(name, total["op by op"] / total["ours"])
    name = "training CTAM, bytes saved for backward, ours / op by op"
    report.bar(name, saved["ours"] / saved["op by op"])


def _core(number: int, tokens: int | None = None) -> Case:
    height, columns = Scale(number).shape
    each = (tokens or height * columns,) * len(TASKS)
    return Case("core", SCHEDULE, each, each, Scale(number).width, batch=BATCH)


def _inputs(case: Case) -> list[Tensor]:
    return [x.to(DEVICE) for group in case.tensors(DTYPE) for x in group]


#: How the linear core's tensors lie in memory, by what torch calls that.
MEMORY = {"NCHW": LAYOUTS["contiguous"], "channels_last": LAYOUTS["token_major"]}


def _core_steps(
    number: int, memory: str = "NCHW"
) -> tuple[dict[str, Call], Callable[..., list[Tensor]], Callable[..., Call], int]:
    """Forward and backward of the linear core: ours and that of other engines by name; op by op,
    what makes a step of it, bytes."""
    case, layout = _core(number), MEMORY[memory]
    inputs = [layout(x).requires_grad_() for x in _inputs(case)]
    shape = (BATCH, case.channels, case.query_tokens[0])
    grads = [layout(torch.randn(shape, device=DEVICE, dtype=DTYPE)) for _ in SCHEDULE.edges]

    def step(run: Callable[..., list[Tensor]]) -> Call:
        return lambda: torch.autograd.grad(run(*inputs), inputs, grads)

    def op_by_op(*x: Tensor) -> list[Tensor]:
        return compositions.linear_cross_attention(*split(case, x), case.schedule)[0]

    def by(engine: str) -> Callable[..., list[Tensor]]:
        return lambda *x: linear(case, x, engine)[: len(grads)]

    ways = {"fused": by(gpu_problems.ENGINE)}
    ways |= {name: by(engine) for name, engine in gpu_problems.rivals().items()}
    for name, run in ways.items():
        close(f"linear core, scale {number}, {name}", run(*inputs), op_by_op(*inputs), 0.02)
    # Forward reads q, k, v and writes the outputs; backward reads q, k, v and the outputs'
    # gradients and writes those of q, k, v.
    slots = 3 * len(TASKS)
    moved = 2 * inputs[0].numel() * (slots + len(grads) + slots + len(grads) + slots)
    return {name: step(run) for name, run in ways.items()}, op_by_op, step, moved


def linear_core(report: Report, device: str, _: str) -> None:
    """The linear core, forward and backward, against op by op and the memory floor."""
    for number, memory in [(0, "channels_last"), *((number, "NCHW") for number in SCALES)]:
        ways, op_by_op, step, moved = _core_steps(number, memory)
        found = best({**ways, "op by op": step(op_by_op)}, graph=False)
        row = {f"{name}_ms": 1e3 * seconds for name, seconds in found.items()}
        floor = 100 * moved / BANDWIDTH / found["fused"]
        report.add(scale=str(Scale(number)), memory=memory, **row, of_memory_floor=floor)
        name = "linear core, forward + backward, scale 0"
        if number == 0:
            report.bar(f"{name}, {memory}, share of the memory floor", floor)
        if number == 0 and memory == "NCHW":
            report.bar(f"{name}, share of the memory floor", floor)


BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@torch.no_grad()
def softmax_core(report: Report, device: str, _: str) -> None:
    """The softmax core of all edges, forward, against torch's, looped or batched over the edges."""
    problems = [(1, 4800), (2, 4800), (1, 19200), (2, 19200), (0, None), (3, None)]
    for number, tokens in problems:
        case = _core(number, tokens)
        inputs = _inputs(case)
        calls: dict[str, Call] = {"fused": lambda case=case, x=inputs: softmax(case, x)}
        for name, engine in gpu_problems.rivals().items():
            calls[name] = lambda case=case, x=inputs, engine=engine: softmax(case, x, engine)
        expected = softmax(case, inputs)[: len(SCHEDULE.edges)]
        heads = [x.transpose(1, 2).unsqueeze(1).contiguous() for x in inputs]
        query, key, value = split(case, heads)
        edges = [(query[e.query], key[e.source], value[e.source]) for e in SCHEDULE.edges]
        stacked = [torch.cat(x) for x in zip(*edges, strict=True)]
        for backend in BACKENDS:
            name = backend.name.partition("_")[0].lower()

            def looped(backend: Any = backend, edges: Any = edges) -> list[Tensor]:
                with sdpa_kernel(backend):
                    return [F.scaled_dot_product_attention(*edge) for edge in edges]

            def batched(backend: Any = backend, x: Any = stacked) -> list[Tensor]:
                with sdpa_kernel(backend):
                    return list(F.scaled_dot_product_attention(*x).chunk(len(SCHEDULE.edges)))

            for kind, call in (("looped", looped), ("batched", batched)):
                try:
                    output = call()
                except RuntimeError as error:
                    print(f"{name}, {kind}: {str(error)[:200]}", flush=True)
                    continue
                found = [x.squeeze(1).transpose(1, 2) for x in output]
                close(f"{name}, {kind}", expected, found, 0.02)
                calls[f"{name} {kind}"] = call
        times = best(calls, 1.0)
        report.add(
            C=case.channels,
            N=case.query_tokens[0],
            **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
        )
        ours = ("fused", *gpu_problems.rivals())
        others = [seconds for name, seconds in times.items() if name not in ours]
        if others:
            where = f"C={case.channels}" + (f", N={tokens}" if tokens else "")
            name = f"softmax core, {where}, best of torch's SDPA / fused"
            report.bar(name, min(others) / times["fused"])


def head(report: Report, device: str, _: str) -> None:
    """The aggregation head: inference, and forward and backward with batch statistics."""
    sizes = [Scale(number).shape for number in SCALES]
    for outputs in (40, 1):
        problem = Head((144, 216, 288, 288), sizes, 1080, outputs, batch=BATCH)
        flat = [x.to(DEVICE) for x in problem.draw(DTYPE)]
        project = compositions.pyramid_projection
        with torch.no_grad():
            expected = problem.run(flat, False, project)
            close("head", [problem.run(flat, False)], [expected], 0.02)

        def infer(given: Any = None, engine: str | None = None) -> Tensor:
            with torch.no_grad():
                return problem.run(flat, False, given, engine)

        calls: dict[str, Call] = {"fused": infer, "op by op": lambda: infer(project)}
        for name, engine in gpu_problems.rivals().items():
            calls[name] = lambda engine=engine: infer(None, engine)
        _add_head(report, "inference", outputs, best(calls))
        leaves = [x.requires_grad_() for x in flat]
        grad = torch.randn_like(expected)

        def step(given: Any = None) -> tuple[Tensor, ...]:
            return torch.autograd.grad(problem.run(leaves, True, given), leaves, grad)

        close("gradients", step()[:4], step(project)[:4], 0.1)
        trained = best({"fused": step, "op by op": lambda: step(project)}, graph=False)
        _add_head(report, "training", outputs, trained)


def _add_head(report: Report, name: str, outputs: int, found: Mapping[str, float]) -> None:
    row = {f"{way}_ms": 1e3 * seconds for way, seconds in found.items()}
    report.add(head=name, outputs=outputs, **row, gain=found["op by op"] / found["fused"])


# Against torch.compile, which takes its time.


def _compiled(run: Any) -> Any:
    torch._dynamo.reset()
    # Graphs are made here, of both sides.
    return torch.compile(run, mode="max-autotune-no-cudagraphs")


@torch.no_grad()
def compiled_cam(report: Report, device: str, _: str) -> None:
    """The cross-attentions of CTAM in inference."""
    total = {"fused": 0.0, "compiled": 0.0}
    for number in reversed(SCALES):
        ours, model, features = block_calls(Scale(number))
        compiled = _compiled(model)
        found = best({"fused": ours, "compiled": lambda run=compiled, x=features: run(x)})
        row = {f"{name}_ms": 1e3 * seconds for name, seconds in found.items()}
        report.add(scale=str(Scale(number)), **row)
        for name, seconds in found.items():
            total[name] += seconds
    name = f"CTAM CAM set, four scales, {COMPILED} / fused"
    report.bar(name, total["compiled"] / total["fused"])


def compiled_linear(report: Report, device: str, _: str) -> None:
    """The linear core, forward and backward, at scale 0."""
    ways, op_by_op, step, _moved = _core_steps(0)
    calls = {"fused": ways["fused"], "compiled": step(_compiled(op_by_op))}
    found = best(calls, graph=False)
    report.add(**{f"{name}_ms": 1e3 * seconds for name, seconds in found.items()})
    name = "linear core, forward + backward, torch.compile / fused"
    report.bar(name, found["compiled"] / found["fused"])


def compiled_training(report: Report, device: str, _: str) -> None:
    """CTAM in training, scale by scale from the coarsest."""
    total = {"ours": 0.0, "compiled": 0.0}
    for number in reversed(SCALES):
        ours, _op_by_op, model, features, _runs = training_calls(Scale(number))
        compiled, leaves = _compiled(model), [*features, *model.parameters()]
        grads = [torch.randn_like(features[edge.query]) for edge in SCHEDULE.edges]

        def step(run: Any = compiled, x: Any = features) -> tuple[Tensor, ...]:
            return torch.autograd.grad(run(x), leaves, grads)

        found = best({"ours": ours, "compiled": step}, graph=False)
        row = {f"{name}_ms": 1e3 * seconds for name, seconds in found.items()}
        report.add(scale=str(Scale(number)), **row)
        for name, seconds in found.items():
            total[name] += seconds
    name = f"training CTAM, forward + backward, {COMPILED} / ours"
    report.bar(name, total["compiled"] / total["ours"])
