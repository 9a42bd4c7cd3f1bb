"""The step of `benchmarks.gpu_check` that times engines against each other, problem by problem.

Its rows are what ``python -m xattn_kernels.measured`` makes the table of that ``auto`` chooses by:
every operator, element type and published width, in inference and with the backward pass. An engine
whose result is not that of ``reference`` has no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import xattn_kernels as xk
from xattn_kernels.problem import Problem

from . import gpu_bench as bench
from .gpu_problems import NAMES, Head, Report, linear, softmax, train, training_inputs
from .problems import SCHEDULE, TASKS

#: Engines that may be in the table, the oracle last.
ENGINES = ("cuda", "triton", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Largest relative L2 difference from the oracle, of outputs; gradients may have three times that.
ALLOWED = {torch.bfloat16: 0.02, torch.float16: 5e-3, torch.float32: 1e-3}
#: Of the block in training, whose relus may fall on the other side of zero.
ALLOWED_IN_TRAINING = {torch.bfloat16: 0.4, torch.float16: 0.2, torch.float32: 0.02}


class Subject(NamedTuple):
    """One problem: its name and sizes, and a function from an engine's name to what it gives."""

    op: str
    channels: int
    value_channels: int
    tokens: int
    gradient: bool
    run: Callable[[str], list[Tensor]]
    allowed: float


def engines(report: Report, device: str, argument: str) -> None:
    """One row a problem: microseconds of every engine that can run it and is right."""
    capability = "0.0"
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for subject, dtype in subjects():
        times = _times(report, subject, dtype)
        if times:
            report.add(
                capability=capability,
                op=subject.op,
                dtype=str(dtype).rpartition(".")[2],
                channels=subject.channels,
                tokens=subject.tokens,
                gradient=subject.gradient,
                microseconds={name: 1e6 * seconds for name, seconds in times.items()},
            )


def _times(report: Report, subject: Subject, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the engines; failures are noted, and engines that refuse left out."""
    problem = Problem(
        subject.op,
        dtype,
        bench.DEVICE,
        subject.channels,
        subject.value_channels,
        gradient=subject.gradient,
    )
    refusals = xk.explain(problem).reasons
    expected = subject.run("reference")
    calls: dict[str, bench.Call] = {}
    for engine in ENGINES:
        if refusals[engine]:
            continue
        what = f"{engine}, {subject.op}, {dtype}, C={subject.channels}"
        what += ", with gradients" if subject.gradient else ""

        def judge(engine: str = engine, what: str = what) -> None:
            bench.close(what, subject.run(engine), expected, subject.allowed)

        try:
            judge()
        except Exception as error:
            report.failures.append(f"{what}: {type(error).__name__}: {str(error)[:400]}")
            print("FAILED", report.failures[-1], flush=True)
            continue
        calls[engine] = lambda engine=engine: subject.run(engine)
    return bench.medians(calls, 0.3, graph=False) if calls else {}


def subjects() -> Iterator[tuple[Subject, torch.dtype]]:
    """All problems: bfloat16 first, then the other types; inference before training."""
    for dtype in DTYPES:
        for make in (_block, _linear, _softmax, _pyramid, _training):
            for gradient in (False, True):
                for number in bench.SCALES if make is not _pyramid else (0,):
                    subject = make(number, dtype, gradient)
                    if subject is not None:
                        yield subject, dtype


def _grads(
    run: Callable[[str, Sequence[Tensor]], list[Tensor]], inputs: Sequence[Tensor], gradient: bool
) -> Callable[[str], list[Tensor]]:
    """Outputs without gradients; or the gradients of all inputs, from fixed ones of outputs."""
    if not gradient:

        def infer(engine: str) -> list[Tensor]:
            with torch.no_grad():
                return run(engine, inputs)

        return infer
    leaves = [x.detach().requires_grad_() for x in inputs]
    fixed: list[Tensor] = []

    def step(engine: str) -> list[Tensor]:
        outputs = run(engine, leaves)
        if not fixed:
            fixed.extend(map(torch.randn_like, outputs))
        return list(torch.autograd.grad(outputs, leaves, fixed))

    return step


def _core(
    name: str, run: Any, case: Any, dtype: torch.dtype, gradient: bool, count: int
) -> Subject:
    inputs = [x.to(bench.DEVICE) for group in case.tensors(dtype) for x in group]

    def call(engine: str, x: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = run(case, x, engine)[:count]
        return found

    return Subject(
        NAMES[name],
        case.channels,
        case.channels,
        case.query_tokens[0],
        gradient,
        _grads(call, inputs, gradient),
        ALLOWED[dtype] * (3 if gradient else 1),
    )


def _linear(number: int, dtype: torch.dtype, gradient: bool) -> Subject:
    case = bench._core(number)
    return _core("linear", linear, case, dtype, gradient, len(SCHEDULE.edges))


def _softmax(number: int, dtype: torch.dtype, gradient: bool) -> Subject:
    """Of one image: the oracle stores the scores of an edge."""
    case = replace(bench._core(number), batch=1)
    return _core("softmax", softmax, case, dtype, gradient, len(SCHEDULE.edges))


def _block(number: int, dtype: torch.dtype, gradient: bool) -> Subject | None:
    if gradient:
        return None
    scale = bench.Scale(number)
    weight, bias = (x.to(bench.DEVICE, dtype) for x in bench.OpByOpSet(scale.width).folded())
    features = [x.to(bench.DEVICE, dtype) for x in scale.features(bench.BATCH)]
    packed: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(engine: str) -> list[Tensor]:
        with xk.backend(engine):
            if engine not in packed:
                packed[engine] = xk.pack_block_weights(weight, bias)
            return xk.cross_attention_block(features, weight, bias, SCHEDULE, packed=packed[engine])

    tokens = features[0][0, 0].numel()
    return Subject(NAMES["block"], scale.width, scale.width, tokens, False, run, 2 * ALLOWED[dtype])


def _pyramid(number: int, dtype: torch.dtype, gradient: bool) -> Subject:
    sizes = [bench.Scale(i).shape for i in bench.SCALES]
    head = Head((144, 216, 288, 288), sizes, 1080, 40, batch=bench.BATCH)
    flat = [x.to(bench.DEVICE) for x in head.draw(dtype)]

    def run(engine: str, x: Sequence[Tensor]) -> list[Tensor]:
        return [head.run(x, gradient, engine=engine)]

    tokens = sizes[0][0] * sizes[0][1]
    allowed = ALLOWED[dtype] * (5 if gradient else 1)
    return Subject(
        NAMES["pyramid"], 144, 40, tokens, gradient, _grads(run, flat, gradient), allowed
    )


def _training(number: int, dtype: torch.dtype, gradient: bool) -> Subject | None:
    if not gradient:
        return None
    scale = bench.Scale(number)
    tokens = scale.shape[0] * scale.shape[1]
    inputs = training_inputs(SCHEDULE, (tokens,) * len(TASKS), scale.width, dtype)
    there = [x.to(bench.DEVICE) for x in inputs]
    run = _grads(lambda engine, x: train(SCHEDULE, x, engine), there, True)
    allowed = ALLOWED_IN_TRAINING[dtype]
    return Subject(NAMES["training"], scale.width, scale.width, tokens, True, run, allowed)
