"""Training step of cross-task attention at scale 0: op by op and with this library's module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels import modules
from xattn_kernels.testing import op_by_op
from xattn_kernels.testing.compare import Truth, check
from xattn_kernels.testing.measure import in_fresh_process, interleaved, peak_memory, tensor_bytes

from ..core import TIMES, Bar, Preset, Result, milliseconds, seconds_of
from ..problems import TASKS, Scale, as_if_trained

BATCH = 2
OP_BY_OP, OURS = "op by op", "CrossTaskAttention"
GRADIENT_ERROR = 5e-3
"""Largest relative L2 error of a gradient."""
MIB = 2**20
MODULES: dict[str, Callable[[Sequence[str], int], nn.Module]] = {
    OP_BY_OP: op_by_op.CrossTaskAttention,
    OURS: modules.CrossTaskAttention,
}


def run(preset: Preset, say: Callable[[str], None], scale: int = 0, batch: int = BATCH) -> Result:
    """Check outputs, gradients and running statistics; then time, and count memory."""
    result = Result(
        f"Training, CTAM with fuse block, scale {Scale(scale)}, T=4, B={batch}, fp32",
        ["way", "forward + backward", "saved for backward, MiB", "rise at peak, MiB"],
        notes=[
            f"{TIMES}. saved for backward: distinct memory of all tensors "
            "that autograd keeps, inputs included, parameters not. rise at peak: resident memory "
            "in a process's first step beyond that before it, gradients included.",
        ],
    )
    say("checking")
    _check(scale, batch)
    say("timing")
    calls = {way: Step(way, scale, batch) for way in MODULES}
    timings = interleaved(
        calls,
        repetitions=preset.repetitions_of(sum(map(seconds_of, calls.values()))),
        min_sample_s=preset.sample_seconds,
    )
    say("memory")
    saved = {way: step.saved_bytes() for way, step in calls.items()}
    for way in MODULES:
        result.rows.append(
            {
                "way": way,
                "forward + backward": milliseconds(timings[way]),
                "saved for backward, MiB": saved[way] / MIB,
                "rise at peak, MiB": in_fresh_process(rise_bytes, way, scale, batch) / MIB,
            }
        )
    result.bars = [
        Bar(
            "training CTAM, op by op / ours",
            1.5,
            ">=",
            timings[OP_BY_OP].median / timings[OURS].median,
            "x",
        ),
        Bar(
            "training CTAM, bytes saved for backward, ours / op by op",
            0.6,
            "<=",
            saved[OURS] / saved[OP_BY_OP],
            "x",
        ),
    ]
    return result


class Step:
    """Forward and backward of one module on fixed features and output gradients."""

    def __init__(
        self,
        way: str,
        scale: int,
        batch: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            source = op_by_op.CrossTaskAttention(TASKS, Scale(scale).width)
            as_if_trained(source)
        self.way = way
        self.module = MODULES[way](TASKS, Scale(scale).width)
        self.module.load_state_dict(source.state_dict())
        self.module.to(dtype).train()
        for parameter in self.module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        features = [
            x.to(dtype=dtype, memory_format=memory_format).requires_grad_()
            for x in Scale(scale).features(batch)
        ]
        self.features = dict(zip(TASKS, features, strict=True))
        self.gradients = [x.to(dtype) for x in Scale(scale).features(batch, seed=1)]

    def __call__(self) -> Mapping[str, Tensor]:
        """The outputs; gradients are in the leaves' `grad`."""
        for leaf in (*self.features.values(), *self.module.parameters()):
            leaf.grad = None
        outputs: Mapping[str, Tensor] = self.module(self.features)
        torch.autograd.backward(list(outputs.values()), self.gradients)
        return outputs

    def results(self) -> dict[str, Tensor]:
        """Outputs, gradients and buffers after one step, by name; feature maps as (B, C, N)."""
        found = {f"output {task}": x.detach().flatten(2) for task, x in self().items()}
        for name, leaf in (*self.features.items(), *self.module.named_parameters()):
            assert leaf.grad is not None
            found[f"gradient {name}"] = leaf.grad.flatten(2) if leaf.dim() == 4 else leaf.grad
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                found[f"buffer {name}"] = buffer
        return found

    def saved_bytes(self) -> int:
        """Memory that autograd keeps between forward and backward, parameters apart."""
        kept: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = self.module(self.features)
        del outputs
        own = {x.untyped_storage().data_ptr() for x in self.module.parameters()}
        own |= {x.untyped_storage().data_ptr() for x in self.module.buffers()}
        return tensor_bytes([x for x in kept if x.untyped_storage().data_ptr() not in own])


def rise_bytes(way: str, scale: int, batch: int) -> int:
    """Resident bytes at the peak of this process's first step beyond those before it."""
    tiny = MODULES[way](TASKS, 4)
    features = {task: torch.zeros(2, 4, 2, 2) for task in TASKS}
    tiny(features)[TASKS[0]].sum().backward()
    step: Callable[[], Any] = Step(way, scale, batch)
    return peak_memory(step).rise


def _check(scale: int, batch: int) -> None:
    exact = Step(OP_BY_OP, scale, batch, torch.float64).results()
    # torch adds up batch statistics in another order when channels lie together.
    formats = (torch.contiguous_format, torch.channels_last)
    rounded = [Step(OP_BY_OP, scale, batch, memory_format=f).results() for f in formats]
    for name, x in Step(OURS, scale, batch).results().items():
        error = torch.stack([(y[name] - exact[name]).abs() for y in rounded]).amax(dim=0)
        if not name.startswith("gradient"):
            check(name, x, Truth(exact[name], error, error))
            continue
        # A relu whose input rounds to the other side of zero changes a gradient by its whole value.
        # Of the millions of relus a few do, in any evaluation, so no single element is held to it.
        relative = ((x - exact[name]).norm() / exact[name].norm()).item()
        if not relative <= GRADIENT_ERROR:
            raise AssertionError(
                f"{name}: relative L2 error {relative:.1e}, allowed {GRADIENT_ERROR:.0e}"
            )
