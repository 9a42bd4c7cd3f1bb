"""Random calls of modules, several in a row, and the same by the oracle."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import xattn_kernels as xk
from xattn_kernels import modules
from xattn_kernels.modules.layers import BasicBlock

from . import oracle_modules as oracle
from .changes import ALLOWED_WHILE_FROZEN, WRITES, Capture, change_layers, randomise, set_norms
from .draws import (
    DEGENERATE,
    GRADIENT,
    LAYOUTS,
    Draw,
    cotangents,
    gradients,
    kind_of_layout,
    kind_of_values,
    values,
)
from .judge import Call, Mismatch, Precision, Results, check_strides

#: Not for softmax, see `operator_cases.LARGEST_SCORE`. Not for 16 bits: weights are rounded to them
#: after batch norms are folded in, and where W x cancels that is more than op by op loses.
HUGE = ("huge_channel", "common_mode", "mean_100")

TASKS = ("semseg", "depth", "normals", "edge")


@dataclass(frozen=True)
class OneCall:
    """One call of a module."""

    before: str
    """What wrote to the parameters before it."""
    inputs: tuple[str, ...]
    mode: str
    """grad, no_grad or inference_mode, and autocast."""
    frozen: str
    """Whether it is frozen, and by what."""


@dataclass(frozen=True)
class ModuleCase:
    """Calls of one module, as far as their seed does not say."""

    seed: int
    module: str
    engine: str
    dtype: torch.dtype
    training: bool
    changes: tuple[str, ...]
    """Of its batch norms and layers."""
    fixed: str
    """Which parameters want no gradient."""
    calls: list[OneCall] = field(default_factory=list)


class Subject:
    """A module, what its inputs are, and how to call it with them."""

    def __init__(self, family: str, draw: Draw) -> None:
        self.family = family
        self.softmax = family != "basic_block" and draw.likely(0.3)
        heads = draw.weighted({1: 2.0, 2: 1.0}) if self.softmax else 1
        recompute = draw.one(["auto", "auto", False] if self.softmax else ["auto", True, False])
        options: dict[str, Any] = {
            "kind": "softmax" if self.softmax else "linear",
            "heads": heads,
            "recompute": recompute,
        }
        self.module: nn.Module
        if family == "basic_block":
            inner, outer = draw.integer(1, 12), draw.integer(1, 12)
            shortcut = draw.likely(0.7)
            outer = outer if shortcut else inner
            self.widths = [inner]
            self.module = BasicBlock(inner, outer, 0.1, shortcut=shortcut)
        elif family == "cross_attention":
            self.widths = [heads * draw.integer(1, 20 // heads)] * 2
            self.module = modules.CrossAttention(self.widths[0], **options)
        elif family == "cross_task":
            self.tasks = TASKS[: draw.weighted({2: 3.0, 3: 2.0, 4: 0.3})]
            targets = list(self.tasks)
            draw.random.shuffle(targets)
            if draw.likely(0.3):
                targets = targets[: draw.integer(1, len(targets))]
            self.widths = [heads * draw.integer(1, 12 // heads)] * len(self.tasks)
            self.module = modules.CrossTaskAttention(targets, self.widths[0], self.tasks, **options)
        else:
            scales = draw.weighted({2: 2.0, 3: 3.0, 4: 0.5})
            self.widths = [heads * draw.integer(1, 12 // heads) for _ in range(scales)]
            if family == "head":
                outputs = draw.integer(1, 6)
                self.module = modules.CrossScaleHead(self.widths, outputs, **options)
            else:
                self.module = modules.CrossScaleAttention(self.widths, **options)
        self.text = f"{type(self.module).__name__}({self.widths}, {self.module.extra_repr()})"

    def sizes(self, draw: Draw) -> list[tuple[int, int]]:
        """Heights and widths of the inputs."""
        low = 5 if self.family in ("head", "cross_scale") else 2
        height, width = draw.weighted(
            {
                (draw.integer(low, 12), draw.integer(low, 12)): 9.0,
                (1, 1): 0.1,
                (1, 7): 0.5,
                (9, 1): 0.5,
            }
        )
        if self.family == "cross_task":
            if draw.likely(0.8):
                return [(height, width)] * len(self.widths)
            return [(draw.integer(1, 9), draw.integer(1, 9)) for _ in self.widths]
        if draw.likely(0.3):
            return [(draw.integer(1, 12), draw.integer(1, 12)) for _ in self.widths]
        return [(max(1, height >> s), max(1, width >> s)) for s in range(len(self.widths))]

    def arrange(self, maps: Sequence[Tensor]) -> tuple[Any, ...]:
        """Arguments of a call."""
        if self.family == "cross_task":
            return (dict(zip(self.tasks, maps, strict=True)),)
        if self.family in ("head", "cross_scale"):
            return (list(maps),)
        return tuple(maps)

    def targets(self) -> list[int]:
        """The input that each output is in the size and format of; [] for none in particular."""
        if self.family == "cross_task":
            return [self.tasks.index(t) for t in self.module.tasks]
        if self.family == "cross_scale":
            scales = len(self.widths)
            return [s for s in range(scales) for _ in range(s + 1, scales)]
        return [] if self.family == "basic_block" else [0]


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [x for one in values for x in flatten(one)]


def draw_dtype(draw: Draw) -> torch.dtype:
    return draw.weighted(
        {torch.float64: 5.0, torch.float32: 5.0, torch.bfloat16: 2.0, torch.float16: 1.0}
    )


def draw_mode(draw: Draw) -> str:
    return draw.weighted({"grad": 5.0, "no_grad": 4.0, "inference_mode": 1.0})


class Run:
    """The calls of a case, one after the other."""

    def __init__(self, family: str, seed: int) -> None:
        draw = self.draw = Draw(f"{family} {seed}")
        with torch.random.fork_rng():
            torch.manual_seed(draw.random.getrandbits(32))
            subject = self.subject = Subject(family, draw)
            module = self.module = subject.module
            self.engine = draw.weighted({"auto": 6.0, "cpu": 2.0, "reference": 2.0})
            self.dtype = draw_dtype(draw)
            self.freezing = draw.likely(0.2)
            training = draw.likely(0.5) and not self.freezing
            module.train(training)
            changes = []
            if not self.freezing or draw.likely(0.3):
                changes = [*set_norms(module, draw), *change_layers(module, draw)]
        randomise(module, draw)
        module.to(self.dtype)
        self.mode = draw_mode(draw)
        self.case = ModuleCase(
            seed, subject.text, self.engine, self.dtype, training, tuple(changes), self._fix()
        )

    def _fix(self) -> str:
        """Have some parameters want no gradient."""
        what = self.draw.weighted({"none": 5.0, "all": 2.0, "some": 2.0, "convolutions": 1.0})
        for p in self.module.parameters():
            wanted = what == "none" or (what == "some" and self.draw.likely(0.5))
            p.requires_grad_(wanted or (what == "convolutions" and p.dim() < 4))
        return what

    def calls(self) -> Iterator[Call]:
        draw = self.draw
        autocast = self.dtype is torch.float32 and draw.likely(0.15)
        frozen = "no"
        for number in range(3 if self.freezing else draw.weighted({1: 3.0, 2: 3.0, 3: 1.0})):
            write = draw.one([*WRITES]) if number else "nothing"
            if frozen == "freeze_":
                write = draw.one([*ALLOWED_WHILE_FROZEN, *WRITES])
                if write not in ALLOWED_WHILE_FROZEN or draw.likely(0.1):
                    end = draw.one(["unfreeze_", "train"])
                    xk.unfreeze_(self.module) if end == "unfreeze_" else self.module.train().eval()
                    frozen, write = "no", f"{end}, {write}"
            WRITES[write.rpartition(", ")[2]](self.module, draw)
            if number and not self.freezing and draw.likely(0.15):
                self.module.train(not self.module.training)
                write += f", train({self.module.training})"
                frozen = "no" if self.module.training else frozen
            likely = 0.8 if self.freezing else 0.2
            if not self.module.training and frozen == "no" and draw.likely(likely):
                frozen = draw.weighted({"freeze_": 3.0, "frozen()": 1.0})
                if frozen == "freeze_":
                    xk.freeze_(self.module)
            yield from self._call(number, write, frozen, autocast)
            frozen = "no" if frozen == "frozen()" else frozen

    def _call(self, number: int, write: str, frozen: str, autocast: bool) -> Iterator[Call]:
        draw, subject = self.draw, self.subject
        mode = self.mode if draw.likely(0.7) else draw_mode(draw)
        if self.freezing and draw.likely(0.9):
            mode = "no_grad"
        inputs, texts = self._inputs(autocast, draw.one([0.0, 0.5, 1.0, 1.0]))
        text = f"{mode}{', autocast' if autocast else ''}"
        self.case.calls.append(OneCall(write, tuple(texts), text, frozen))
        # As they are before the call, which changes statistics.
        kept = copy.deepcopy(self.module)
        seed = f"{self.case.seed} {number}"
        coarse = torch.bfloat16 if autocast else self.dtype

        def results(module: nn.Module, outputs: list[Tensor], maps: Sequence[Tensor]) -> Results:
            named = {f"output {i}": y for i, y in enumerate(outputs)}
            leaves = {f"input {i}": x for i, x in enumerate(maps)}
            leaves |= dict(module.named_parameters())
            given = cotangents(seed, named, coarse, layouts=module is self.module)
            found = {} if mode != "grad" else gradients(named, leaves, given)
            statistics = {f"statistics {name}": b for name, b in module.named_buffers()}
            captured = {
                f"captured {name} {i}": y
                for name, part in module.named_modules(remove_duplicate=False)
                for hook in part._forward_hooks.values()
                if isinstance(hook, Capture)
                for i, y in enumerate(hook.kept)
            }
            everything = {**named, **found, **statistics, **captured}
            return {name: x.detach().clone() for name, x in everything.items()}

        def ours() -> Results:
            with contextlib.ExitStack() as stack:
                stack.enter_context(xk.backend(self.engine))
                stack.enter_context(
                    {
                        "grad": torch.enable_grad,
                        "no_grad": torch.no_grad,
                        "inference_mode": torch.inference_mode,
                    }[mode]()
                )
                if frozen == "frozen()":
                    stack.enter_context(xk.frozen(self.module))
                before = [x.detach().clone() for x in inputs]
                for part in self.module.modules():
                    for hook in part._forward_hooks.values():
                        if isinstance(hook, Capture):
                            hook.kept.clear()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    outputs = flatten(self.module(*subject.arrange(inputs)))
                self._check_outputs(outputs, inputs, coarse)
                found = results(self.module, outputs, inputs)
                if not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)):
                    raise Mismatch("an input was changed")
            for i, x in enumerate(inputs):
                if GRADIENT + f"input {i}" in found and not autocast:
                    gradient = found[GRADIENT + f"input {i}"]
                    check_strides(f"gradient of input {i}", gradient, x)
            return found

        def theirs(precision: Precision) -> Results:
            module = copy.deepcopy(kept)
            wide = precision.exact or precision.single
            if wide or self.dtype is torch.float64:
                module.to(precision.dtype(self.dtype))
            maps = [precision.convert(x) for x in inputs]
            with (
                torch.set_grad_enabled(mode == "grad"),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast and not wide),
            ):
                outputs = flatten(oracle.call(module, *subject.arrange(maps)))
                return results(module, outputs, maps)

        degenerate = any(kind in text for kind in DEGENERATE for text in texts)
        yield Call(f"call {number}", ours, theirs, coarse, degenerate=degenerate)

    def _inputs(self, autocast: bool, wanted: float) -> tuple[list[Tensor], list[str]]:
        draw, inputs, texts = self.draw, [], []
        batch = draw.weighted({1: 2.0, 2: 3.0, 3: 1.0})
        sizes = self.subject.sizes(draw)
        short = autocast or self.dtype in (torch.bfloat16, torch.float16)
        if short:
            # Of a few values batch norms of 16 bits have gradients that are noise.
            sizes = [(max(3, height), max(3, width)) for height, width in sizes]
        for (height, width), channels in zip(sizes, self.subject.widths, strict=True):
            kind, layout = kind_of_values(draw, 0.25), kind_of_layout(draw)
            if (short or self.subject.softmax) and kind in HUGE:
                kind = "ordinary"
            if kind in DEGENERATE and self._has_ties():
                kind = "ordinary"
            dtype = draw.one([torch.float32, torch.bfloat16]) if autocast else self.dtype
            x = values(draw, kind, (batch, channels, height, width), dtype)
            grad = draw.likely(wanted)
            inputs.append(LAYOUTS[layout](x).detach().requires_grad_(grad))
            texts.append(f"{tuple(x.shape)} {kind} {layout}{' grad' if grad else ''}")
        return inputs, texts

    def _has_ties(self) -> bool:
        """Whether batch norms of no variance give zeros, where a relu has its kink, or infinity."""
        return self.dtype is torch.float16 or any("affine" in text for text in self.case.changes)

    def _check_outputs(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        """Types, sizes and memory formats."""
        changed = any("stride" in text or "padding" in text for text in self.case.changes)
        for y, i in zip(outputs, self.subject.targets(), strict=False):
            x = inputs[i]
            if y.shape[2:] != x.shape[2:] and not changed:
                raise Mismatch(f"output of size {tuple(y.shape)} for {tuple(x.shape)}")
            if y.dtype != dtype and not self.case.changes and self.subject.family != "cross_task":
                raise Mismatch(f"output of {y.dtype}, expected {dtype}")


def generate(family: str, seed: int) -> tuple[ModuleCase, Iterator[Call]]:
    """Calls of a module of a family."""
    run = Run(family, seed)
    return run.case, run.calls()
