"""Training of cross-task attention: op by op, compiled, stored, and by recompute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from xattn_kernels import modules
from xattn_kernels.functional import cross_attention_block_training
from xattn_kernels.schedule import Schedule
from xattn_kernels.testing import op_by_op
from xattn_kernels.testing.compare import Truth, check
from xattn_kernels.testing.device import device_peak_memory
from xattn_kernels.testing.measure import in_fresh_process, peak_memory, tensor_bytes

from .. import environment
from ..core import TIMES, Bar, Plot, Preset, Result, Series, measured, milliseconds
from ..problems import SCALES, SCHEDULE, TASKS, OpByOpSet, Scale, as_if_trained

BATCH = 2
OP_BY_OP, COMPILED, STORED, RECOMPUTED = "op by op", "torch.compile", "ours, stored", "ours"
MAKERS: dict[str, Callable[[Sequence[str], int], nn.Module]] = {
    OP_BY_OP: op_by_op.CrossTaskAttention,
    COMPILED: op_by_op.CrossTaskAttention,
    STORED: partial(modules.CrossTaskAttention, recompute=False),
    RECOMPUTED: partial(modules.CrossTaskAttention, recompute=True),
}
GRADIENT_ERROR = 5e-3
"""Largest relative L2 error of a gradient."""
DRAWS = 4
"""Features, of which some have to show gradients as exact as that. Of the millions of relus a few
have an input that rounds to the other side of zero, which changes gradients by the relu's whole
value: then op by op in float32 is off by 1e-2 at scale 3, and without by 3e-5."""
PROMISED = (0, 1)
"""Scales that the promises are about."""
MAPS, TARGETS = 8, (2, 4, 6, 8)
"""Feature maps, and how many of them attend to the others, where saved bytes are to be constant."""
BOTH, SAVED, SAVED_SET, RISE = (
    "forward + backward",
    "saved for backward, MiB",
    "of these for the pairs, MiB",
    "rise at peak, MiB",
)
MIB = 2**20


def run(
    preset: Preset,
    say: Callable[[str], None],
    scales: Sequence[int] | None = None,
    batch: int = BATCH,
) -> Result:
    """Check outputs, gradients and running statistics; then time, and count memory."""
    result = Result(
        f"Training, CTAM with its fuse block, T=4, B={batch}, fp32, batch statistics",
        ["scale", "way", "forward", "backward", BOTH, "/ ours", SAVED, SAVED_SET, RISE],
        question=2,
        notes=[
            f"{TIMES}. ours: by recompute; stored: our layers, with what backward needs kept. "
            "backward: of a forward pass that has run. saved for backward: distinct memory of all "
            "tensors that autograd keeps, inputs included, parameters not; for the pairs: of the "
            "12 cross-attentions without fuse block. rise at peak: memory in a process's first "
            "step beyond that before it, gradients included.",
        ],
    )
    ways = dict(MAKERS)
    missing = environment.compiler_error() if preset.device == "cpu" else None
    if missing is not None:
        del ways[COMPILED]
        result.notes.append(f"Without {COMPILED}: {missing}.")
    if scales is None:
        scales = SCALES if preset.thorough else PROMISED
    for scale in scales:
        _measure(result, scale, batch, list(ways), preset, say)
    say("saved bytes by number of tasks")
    targets = {t: saved_by_targets(t, scales[0], batch, preset.device) for t in TARGETS}
    result.bars = _bars(result.rows, scales, targets, missing)
    result.answers = _answers(result.rows, targets)
    result.plots = _plots(result.rows, ways, targets)
    return result


def _measure(
    result: Result,
    scale: int,
    batch: int,
    ways: Sequence[str],
    preset: Preset,
    say: Callable[[str], None],
) -> None:
    device = preset.device
    say(f"scale {scale}: checking")
    exact = Exact(scale, batch, device)
    steps = {way: Step(way, scale, batch, device=device) for way in ways}
    for way, step in steps.items():
        if way == COMPILED:
            say(f"scale {scale}: compiling the op-by-op version")
        exact.check(way, step)
    say(f"scale {scale}: timing")
    timings = {BOTH: measured(steps, preset)}
    timings["forward"] = measured({way: s.forward for way, s in steps.items()}, preset, share=0.5)
    backwards = {way: s.backward() for way, s in steps.items()}
    timings["backward"] = measured(backwards, preset, share=0.5)
    del backwards
    say(f"scale {scale}: memory")
    sets = {
        OP_BY_OP: saved_by_set(OP_BY_OP, scale, batch, device),
        RECOMPUTED: saved_by_set(RECOMPUTED, scale, batch, device),
    }
    for way, step in steps.items():
        row: dict[str, Any] = {"scale": str(Scale(scale)), "way": way}
        row |= {name: milliseconds(found[way]) for name, found in timings.items()}
        row["/ ours"] = timings[BOTH][way].median / timings[BOTH][RECOMPUTED].median
        row[SAVED] = step.saved_bytes() / MIB
        if way in sets:
            row[SAVED_SET] = sets[way] / MIB
        if way != COMPILED:
            row[RISE] = _rise(way, scale, batch, device) / MIB
        result.rows.append(row)


class Step:
    """Forward and backward of one module on fixed features and output gradients."""

    def __init__(
        self,
        way: str,
        scale: int,
        batch: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        device: str = "cpu",
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            source = op_by_op.CrossTaskAttention(TASKS, Scale(scale).width)
            as_if_trained(source)
        self.way = way
        self.module = MAKERS[way](TASKS, Scale(scale).width)
        self.module.load_state_dict(source.state_dict())
        self.module.to(device, dtype).train()
        for parameter in self.module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        self._scale, self._batch = scale, batch
        features = [
            x.to(device, dtype, memory_format=memory_format).requires_grad_()
            for x in Scale(scale).features(batch)
        ]
        self.features = dict(zip(TASKS, features, strict=True))
        self.gradients = [x.to(device, dtype) for x in Scale(scale).features(batch, seed=1)]
        self.forward: Callable[[], Mapping[str, Tensor]] = partial(self.module, self.features)
        if way == COMPILED:
            # Backward is also measured alone, more than once: what it reads may not be overwritten.
            torch._functorch.config.donated_buffer = False
            self.forward = partial(torch.compile(self.module), self.features)

    def __call__(self) -> Mapping[str, Tensor]:
        """The outputs; gradients are in the leaves' `grad`."""
        for leaf in (*self.features.values(), *self.module.parameters()):
            leaf.grad = None
        outputs = self.forward()
        torch.autograd.backward(list(outputs.values()), self.gradients)
        return outputs

    def draw(self, number: int) -> None:
        """Other features and output gradients in the same memory; those of 0 are the first."""
        features = Scale(self._scale).features(self._batch, seed=2 * number)
        gradients = Scale(self._scale).features(self._batch, seed=2 * number + 1)
        with torch.no_grad():
            for x, new in zip(self.features.values(), features, strict=True):
                x.copy_(new)
            for x, new in zip(self.gradients, gradients, strict=True):
                x.copy_(new)

    def backward(self) -> Callable[[], Any]:
        """A call of backward alone, of a forward pass that has run."""
        outputs = list(self.forward().values())
        leaves = [*self.features.values(), *self.module.parameters()]
        return lambda: torch.autograd.grad(outputs, leaves, self.gradients, retain_graph=True)

    def results(self) -> dict[str, Tensor]:
        """Outputs, gradients and buffers after one step, by name; feature maps as (B, C, N)."""
        found = {f"output {task}": x.detach().flatten(2) for task, x in self().items()}
        for name, leaf in (*self.features.items(), *self.module.named_parameters()):
            assert leaf.grad is not None
            found[f"gradient {name}"] = leaf.grad.flatten(2) if leaf.dim() == 4 else leaf.grad
        for name, buffer in self.module.named_buffers():
            if buffer.is_floating_point():
                found[f"buffer {name}"] = buffer.clone()
        return {name: x.cpu() for name, x in found.items()}

    def saved_bytes(self) -> int:
        """Memory that autograd keeps between forward and backward, parameters apart."""
        return _saved(self.forward, [*self.module.parameters(), *self.module.buffers()])


def saved_by_set(way: str, scale: int, batch: int, device: str) -> int:
    """Bytes kept for backward by the 12 cross-attentions of a scale, inputs included."""
    features = [x.to(device).requires_grad_() for x in Scale(scale).features(batch)]
    if way == OP_BY_OP:
        blocks = OpByOpSet(Scale(scale).width).to(device).train()
        return _saved(lambda: blocks(features), [*blocks.parameters(), *blocks.buffers()])
    return _saved_by_recompute(features, SCHEDULE)


def saved_by_targets(targets: int, scale: int, batch: int, device: str) -> int:
    """The same by recompute for some tasks that attend to all others of `MAPS`."""
    maps = Scale(scale).features(batch) * (MAPS // len(TASKS))
    features = [x.to(device).clone().requires_grad_() for x in maps]
    return _saved_by_recompute(features, Schedule.cross_task(targets, MAPS - targets))


def _saved_by_recompute(features: Sequence[Tensor], schedule: Schedule) -> int:
    c, sets, device = features[0].shape[1], schedule.num_weights, features[0].device
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(sets, 5, c, c, generator=generator) * c**-0.5).to(device)
    gamma, beta = torch.ones(sets, 5, c, device=device), torch.zeros(sets, 5, c, device=device)
    parameters = [x.requires_grad_() for x in (weight, gamma, beta)]
    call = partial(cross_attention_block_training, features, *parameters, schedule)
    return _saved(call, parameters)


def _saved(call: Callable[[], Any], own: Sequence[Tensor]) -> int:
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call()
    del outputs
    known = {x.untyped_storage().data_ptr() for x in own}
    return tensor_bytes([x for x in kept if x.untyped_storage().data_ptr() not in known])


def _rise(way: str, scale: int, batch: int, device: str) -> int:
    if device == "cuda":
        return rise_bytes(way, scale, batch, device)
    rise: int = in_fresh_process(rise_bytes, way, scale, batch, device)
    return rise


def rise_bytes(way: str, scale: int, batch: int, device: str = "cpu") -> int:
    """Bytes at the peak of this process's first step beyond those before it."""
    tiny = MAKERS[way](TASKS, 4).to(device)
    features = {task: torch.zeros(2, 4, 2, 2, device=device) for task in TASKS}
    tiny(features)[TASKS[0]].sum().backward()
    step: Callable[[], Any] = Step(way, scale, batch, device=device)
    return (device_peak_memory if device == "cuda" else peak_memory)(step).rise


class Exact:
    """What a step is compared with: op by op in float64, and how far op by op in float32 is."""

    def __init__(self, scale: int, batch: int, device: str) -> None:
        self._step = Step(OP_BY_OP, scale, batch, torch.float64, device=device)
        self._drawn = {0: self._step.results()}
        # torch adds up batch statistics in another order when channels lie together.
        formats = (torch.contiguous_format, torch.channels_last)
        rounded = [
            Step(OP_BY_OP, scale, batch, memory_format=f, device=device).results() for f in formats
        ]
        self.errors = {
            name: torch.stack([(y[name] - exact).abs() for y in rounded]).amax(dim=0)
            for name, exact in self._drawn[0].items()
        }

    def check(self, way: str, step: Step) -> None:
        """Accept the results of a step that has not run: outputs, buffers, then gradients.

        Raises:
            AssertionError: for what is not accepted, named.
        """
        found = step.results()
        for name, exact in self._drawn[0].items():
            if not name.startswith("gradient"):
                check(
                    f"{way}, {name}",
                    found[name],
                    Truth(exact, self.errors[name], self.errors[name]),
                )
        wrong = self._wrong_gradient(found, 0)
        first = wrong
        for draw in range(1, DRAWS):
            if wrong:
                step.draw(draw)
                wrong = self._wrong_gradient(step.results(), draw)
        step.draw(0)
        if wrong:
            raise AssertionError(f"{way}, {first}")

    def _wrong_gradient(self, found: Mapping[str, Tensor], draw: int) -> str:
        """The first gradient that is off, and by how much; nothing if none is."""
        if draw not in self._drawn:
            self._step.draw(draw)
            self._drawn[draw] = self._step.results()
        for name, exact in self._drawn[draw].items():
            if name.startswith("gradient"):
                relative = ((found[name] - exact).norm() / exact.norm()).item()
                if not relative <= GRADIENT_ERROR:
                    return f"{name}: relative L2 error {relative:.1e}, allowed {GRADIENT_ERROR:.0e}"
        return ""


# What follows from it


def _bars(
    rows: Sequence[dict[str, Any]],
    scales: Sequence[int],
    targets: Mapping[int, int],
    missing: str | None,
) -> list[Bar]:
    bars = []
    for scale in sorted({*scales} & {*PROMISED}):
        at = _at(rows, str(Scale(scale)))
        ours, by_op = at[RECOMPUTED], at[OP_BY_OP]
        where = f"training CTAM, scale {scale}"
        compiled = at[COMPILED]["/ ours"] if COMPILED in at else None
        memory, saved = (ours[name] / by_op[name] for name in (RISE, SAVED_SET))
        bars += [
            Bar(f"{where}, op by op / ours", 1.5, ">=", by_op["/ ours"], "x"),
            Bar(f"{where}, torch.compile / ours", 1.1, ">=", compiled, "x", missing or ""),
            Bar(f"{where}, peak memory, ours / op by op", 1 / 3, "<=", memory),
            Bar(f"{where}, pairs alone, saved bytes, ours / op by op", 0.05, "<=", saved),
        ]
    growth = max(targets.values()) / min(targets.values())
    name = f"training pairs, saved bytes by {TARGETS[0]} to {TARGETS[-1]} targets of {MAPS} maps"
    bars.append(Bar(f"{name}, largest / smallest", 1.05, "<=", growth))
    return bars


def _answers(rows: Sequence[dict[str, Any]], targets: Mapping[int, int]) -> list[str]:
    at = _at(rows, rows[0]["scale"])
    ours, by_op = at[RECOMPUTED], at[OP_BY_OP]
    compiled = (
        f" and {at[COMPILED]['/ ours']:.1f}x faster than torch.compile" if COMPILED in at else ""
    )
    return [
        f"A training step of cross-task attention at scale {rows[0]['scale']} is "
        f"{by_op['/ ours']:.1f}x faster than op by op{compiled}, and at its peak takes "
        f"{ours[RISE]:.0f} MiB instead of {by_op[RISE]:.0f}.",
        f"For backward, the 12 pairs keep {ours[SAVED_SET]:.0f} MiB instead of "
        f"{by_op[SAVED_SET]:.0f}: the maps they read, there anyway, and small matrices. "
        f"With {MAPS} maps it is {targets[TARGETS[0]] / MIB:.0f} MiB if {TARGETS[0]} of them "
        f"attend to the others, and {targets[TARGETS[-1]] / MIB:.0f} MiB if all do.",
    ]


def _at(rows: Sequence[dict[str, Any]], scale: str) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in rows if row["scale"] == scale}


def _plots(
    rows: Sequence[dict[str, Any]], ways: Mapping[str, Any], targets: Mapping[int, int]
) -> list[Plot]:
    by_way = [(way, [row for row in rows if row["way"] == way]) for way in ways]
    time = [
        Series(
            way,
            [row["scale"] for row in found],
            *([row[BOTH][i] for row in found] for i in range(3)),
        )
        for way, found in by_way
    ]
    memory = [
        Series(way, [row["scale"] for row in found], [row[RISE] for row in found])
        for way, found in by_way
        if way != COMPILED
    ]
    saved = Series("ours", list(targets), [size / MIB for size in targets.values()])
    return [
        Plot("bars", "Training step of cross-task attention", "scale", "ms", time),
        Plot("bars", "Peak memory of a training step", "scale", "MiB", memory),
        Plot(
            "lines",
            f"Kept for backward, {MAPS} maps",
            "tasks that attend to all others",
            "MiB",
            [saved],
        ),
    ]
