"""The softmax core on 12 edges against scaled_dot_product_attention, one edge after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn_kernels.functional import softmax_cross_attention
from xattn_kernels.testing.compare import check
from xattn_kernels.testing.measure import in_fresh_process, peak_memory, tensor_bytes

from ..checks import truths_in_one_order
from ..core import TIMES, Bar, Preset, Result, measured, milliseconds
from ..problems import SCHEDULE, TASKS

CHANNELS, TOKENS = 72, 4800
OURS, OURS_TOKEN_MAJOR = "ours, (B, C, N)", "ours, channels last"
SDPA, SDPA_AS_GIVEN = "torch, contiguous (B, 1, N, C)", "torch, views of (B, C, N)"
MIB = 2**20

Tensors = list[Tensor]


def run(preset: Preset, say: Callable[[str], None], tokens: int = TOKENS) -> Result:
    """Check and time the forward pass, and forward and backward together."""
    result = Result(
        f"Softmax core: 12 edges, T=4, B=1, N={tokens}, C={CHANNELS}, one head, fp32",
        ["way", "forward", "forward + backward", "memory beyond results, MiB", "score matrices"],
        question=2,
        notes=[
            f"{TIMES}. memory beyond results: rise of the resident set in "
            "forward and backward less outputs and gradients; in score matrices of one edge "
            f"({4 * tokens**2 / MIB:.0f} MiB).",
            "torch, contiguous: its flash kernel, asked for by name.",
        ],
    )
    say("checking")
    inputs = make_inputs(tokens)
    _check(inputs)
    ways: dict[str, Callable[[Tensors], Tensors]] = {
        OURS: _ours,
        OURS_TOKEN_MAJOR: _ours,
        SDPA: _sdpa_flash,
        SDPA_AS_GIVEN: _sdpa,
    }
    slots = {
        OURS: inputs,
        OURS_TOKEN_MAJOR: [token_major(x) for x in inputs],
        SDPA: [x.transpose(1, 2).unsqueeze(1).contiguous() for x in inputs],
        SDPA_AS_GIVEN: [x.transpose(1, 2).unsqueeze(1) for x in inputs],
    }
    timings = {}
    for name, step in (("forward", _forward), ("forward + backward", _both)):
        say(f"timing, {name}")
        # Views of (B, C, N) do not get torch's flash kernel: slow, and only shown for the forward.
        timed = [way for way in ways if way != SDPA_AS_GIVEN or step is _forward]
        calls = {way: step(ways[way], slots[way]) for way in timed}
        timings[name] = measured(
            calls,
            preset,
            warmup=0,
        )
    say("memory")
    beyond = {way: in_fresh_process(memory_beyond_results, way, tokens) for way in (OURS, SDPA)}
    for way in ways:
        row: dict[str, Any] = {"way": way}
        row |= {name: milliseconds(t[way]) for name, t in timings.items() if way in t}
        if way in beyond:
            row["memory beyond results, MiB"] = beyond[way] / MIB
            row["score matrices"] = beyond[way] / (4 * tokens**2)
        result.rows.append(row)
    result.answers = [
        f"Softmax attention of 12 pairs of {tokens} tokens, forward and backward, needs "
        f"{beyond[OURS] / MIB:.0f} MiB beyond its results; the scores of one pair alone would take "
        f"{4 * tokens**2 / MIB:.0f} MiB."
    ]
    for name, timing in timings.items():
        gain = timing[SDPA].median / timing[OURS].median
        result.bars.append(Bar(f"softmax core, {name}, torch's SDPA / ours", 1.0, ">=", gain, "x"))
    result.bars.append(
        Bar(
            "softmax core, memory beyond results / one score matrix",
            0.1,
            "<=",
            beyond[OURS] / (4 * tokens**2),
        )
    )
    return result


def make_inputs(tokens: int) -> Tensors:
    """Queries, keys and values of all tasks, (1, C, N) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHANNELS, tokens)
    return [torch.randn(shape, generator=generator) for _ in range(3 * len(TASKS))]


def token_major(x: Tensor) -> Tensor:
    """The same values with the channels of a token together."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def memory_beyond_results(way: str, tokens: int) -> int:
    """Bytes that forward and backward need in this process, less outputs and gradients."""
    attend, inputs = _ours, make_inputs(tokens)
    tiny = [x[:, :, :2].contiguous() for x in inputs]
    if way == SDPA:
        attend = _sdpa_flash
        inputs, tiny = (
            [x.transpose(1, 2).unsqueeze(1).contiguous() for x in xs] for xs in (inputs, tiny)
        )
    _both(attend, tiny)()
    results: Tensors = []
    call = _both(attend, inputs)
    rise = peak_memory(lambda: results.extend(call())).rise
    return rise - tensor_bytes(results)


def _ours(inputs: Tensors) -> Tensors:
    outputs: Tensors = softmax_cross_attention(*_thirds(inputs), SCHEDULE)
    return outputs


def _sdpa(inputs: Tensors) -> Tensors:
    query, key, value = _thirds(inputs)
    return [
        F.scaled_dot_product_attention(query[edge.query], key[edge.source], value[edge.source])
        for edge in SCHEDULE.edges
    ]


def _sdpa_flash(inputs: Tensors) -> Tensors:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(inputs)


def _thirds(inputs: Sequence[Tensor]) -> tuple[Tensors, Tensors, Tensors]:
    count = len(TASKS)
    return list(inputs[:count]), list(inputs[count : 2 * count]), list(inputs[2 * count :])


def _forward(attend: Callable[[Tensors], Tensors], inputs: Tensors) -> Callable[[], Any]:
    return torch.no_grad()(lambda: attend(inputs))


def _both(attend: Callable[[Tensors], Tensors], inputs: Tensors) -> Callable[[], Tensors]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    # One gradient serves every output: they have the same shape and layout.
    gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.empty_like(inputs[0]).copy_(gradient)

    def call() -> Tensors:
        outputs = attend(leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [gradient] * len(outputs))]

    return call


def _check(inputs: Tensors) -> None:
    """Accept outputs and gradients of both layouts, one edge of the truth at a time."""
    gradient = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def evaluate(xs: Sequence[Tensor]) -> Tensors:
        outputs, gradients = [], [torch.zeros_like(x) for x in xs]
        tasks = len(TASKS)
        for edge in SCHEDULE.edges:
            numbers = (edge.query, tasks + edge.source, 2 * tasks + edge.source)
            q, k, v = leaves = [xs[i].detach().requires_grad_() for i in numbers]
            scores = (q.transpose(1, 2) @ k * CHANNELS**-0.5).softmax(dim=2)
            output = v @ scores.transpose(1, 2)
            parts = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
            for i, part in zip(numbers, parts, strict=True):
                gradients[i] += part
            outputs.append(output.detach())
        return outputs + gradients

    expected = truths_in_one_order(evaluate, inputs, torch.float32)
    for name, given in (
        (OURS, inputs),
        (OURS_TOKEN_MAJOR, [token_major(x) for x in inputs]),
    ):
        results = _both(_ours, given)()
        for number, (x, truth) in enumerate(zip(results, expected, strict=True)):
            is_gradient = number >= SCHEDULE.num_outputs
            check(f"{name}, result {number}", x, truth, gradient=is_gradient)
