"""Finding blocks and swapping them, all or none of each: `convert_` and `revert_`."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from xattn_kernels.convert.blocks import KINDS, OURS, assemble, kind_of
from xattn_kernels.convert.code import Left, read_code
from xattn_kernels.convert.settings import settings_of
from xattn_kernels.convert.swapped import Converted, user_modules
from xattn_kernels.convert.trial import largest_difference

__all__ = ["KINDS", "TOLERANCE", "Conversion", "ConversionReport", "convert_", "revert_"]

TOLERANCE = 1e-6
"""Largest relative L2 difference between a block and its replacement, both in float64."""


@dataclass(frozen=True)
class Conversion:
    """What became of one block."""

    name: str
    """Where it is in the model, as in `named_modules`."""
    class_name: str
    """Class of the model's own block."""
    kind: str
    """One of `KINDS`."""
    replacement: str | None = None
    """Class that took its place; None if it was left."""
    reason: str = ""
    """Why it was left; empty if it was not."""
    difference: float | None = None
    """Largest relative L2 difference found by trying; None if it did not come to that."""

    def __str__(self) -> str:
        if self.replacement is None:
            return f"left     {self.name} ({self.class_name}): {self.reason}"
        return f"swapped  {self.name} ({self.class_name}) for {self.replacement}"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_` found, in the order of the model. Prints as one line per block."""

    entries: tuple[Conversion, ...]

    @property
    def converted(self) -> tuple[Conversion, ...]:
        """Blocks that were swapped."""
        return tuple(entry for entry in self.entries if entry.replacement is not None)

    @property
    def left(self) -> tuple[Conversion, ...]:
        """Blocks that look like known ones and were not swapped."""
        return tuple(entry for entry in self.entries if entry.replacement is None)

    def __iter__(self) -> Iterator[Conversion]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        count = f"{len(self.converted)} swapped, {len(self.left)} left"
        return "\n".join([count, *map(str, self.entries)])


def convert_(
    model: nn.Module, *, kinds: Sequence[str] = KINDS, verbose: bool = False
) -> ConversionReport:
    """Swap known blocks below `model` for this library's, in place.

    Outer blocks come first: the attention blocks inside a converted cross-task module or head are
    part of it; inside one that is left they are swapped one by one. A block at two places stays one
    block. Blocks of this library are passed over, so a second call finds nothing new. Models in
    `DataParallel`, `DistributedDataParallel` or `torch.compile` are converted inside.

    A block is left, and the report says why, if anything of it could not be carried over exactly:
    other shapes (ATRC's change of width), further parameters or submodules, dropout, batch norms
    without weights, another eps of the attention, hooks on inner modules, a replaced or compiled
    `forward`, other operators, code that depends on more than its input and settings, or results
    that differ when tried. Blocks of one class with equal settings and shapes are tried once. Hooks
    on the block, on attention blocks inside it and on its layers stay, and layers with hooks are
    called as before.

    A block that is changed after it was swapped computes what the model's own block would, with the
    change, by the model's own `forward`: see the module's docstring. Only in replicas of
    `DataParallel` and with maps that `shard_rows` splits, that is a RuntimeError.

    Other references to a block (a list in an attribute, say) keep calling the model's own block,
    with the same parameters.

    Args:
        model: a network that contains the blocks.
        kinds: which blocks to look for, of `KINDS`.
        verbose: whether to print the report.

    Returns:
        What was swapped and what was left.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: for unknown kinds; and if `model` is itself such a block, because only a parent
            can be given another child: put it into an `nn.ModuleList`, and take it out again.
    """
    _check_model(model)
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: got {kinds!r}, expected a sequence of {KINDS}")
    if kind_of(model) in kinds and not isinstance(model, OURS):
        raise ValueError(
            f"model: got a {type(model).__name__}, which is itself a block to be swapped, expected "
            "a model that contains it: holder = nn.ModuleList([block]); convert_(holder); "
            "block = holder[0]"
        )
    plan = _Plan(frozenset(kinds))
    plan.visit(model, "")
    for parent, name, replacement in plan.swaps:
        parent._modules[name] = replacement
    report = ConversionReport(tuple(plan.entries))
    if verbose:
        print(report)
    return report


def revert_(model: nn.Module) -> tuple[str, ...]:
    """Put back what `convert_` swapped: the same objects, with the parameters as they are now.

    Modes (`train`, `eval`) go along, and what was set in the meantime: attributes, and layers that
    were exchanged, as `SyncBatchNorm.convert_sync_batchnorm` does.

    Returns:
        The names of the blocks that were put back.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: if `model` is itself a swapped block.
    """
    _check_model(model)
    if isinstance(model, Converted):
        raise ValueError(
            f"model: got a {type(model).__name__}, which is itself swapped, expected a model that "
            "contains it"
        )
    names: list[str] = []
    _put_back(model, "", names, set())
    return tuple(names)


class _Plan:
    """The swaps to make, all found before the first is made."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self.swaps: list[tuple[nn.Module, str, nn.Module]] = []
        self.entries: list[Conversion] = []
        self._known: dict[int, tuple[nn.Module | None, Conversion]] = {}
        self._verdicts: dict[Hashable, tuple[float | None, str]] = {}
        self._visited: set[int] = set()

    def visit(self, parent: nn.Module, path: str) -> None:
        """Find the blocks below `parent`, which is called `path`."""
        if id(parent) in self._visited or isinstance(parent, torch.jit.ScriptModule):
            return
        self._visited.add(id(parent))
        for name, child in parent._modules.items():
            if child is None or isinstance(child, OURS):
                continue
            where = f"{path}.{name}" if path else name
            kind = kind_of(child)
            if kind is not None and kind in self.kinds:
                if id(child) not in self._known:
                    self._known[id(child)] = self._convert(child, kind, parent)
                replacement, entry = self._known[id(child)]
                self.entries.append(replace(entry, name=where))
                if replacement is not None:
                    self.swaps.append((parent, name, replacement))
                    continue
            self.visit(child, where)

    def _convert(
        self, original: nn.Module, kind: str, parent: nn.Module
    ) -> tuple[nn.Module | None, Conversion]:
        """The replacement or None, and the report without the name."""
        entry = Conversion("", type(original).__name__, kind)
        try:
            if isinstance(original, torch.jit.ScriptModule):
                raise Left("it was scripted; convert before scripting")
            if hasattr(parent, "_orig_mod"):
                raise Left("it was compiled by itself; convert before compiling")
            replacement = assemble(original, kind)
            replacement.rely_on_settings()
            difference, reason = self._verdict(original, kind)
            if difference is not None and not difference <= TOLERANCE:
                reason = (
                    f"its results differ from those of {type(replacement).__name__} by "
                    f"{difference:.1e} (relative L2), allowed {TOLERANCE:.0e}"
                )
            if reason:
                raise Left(reason, difference)
        except Left as left:
            return None, replace(entry, reason=str(left), difference=left.difference)
        return replacement, replace(
            entry, replacement=type(replacement).__name__, difference=difference
        )

    def _verdict(self, original: nn.Module, kind: str) -> tuple[float | None, str]:
        """The largest difference found, or None and why there is none; once for equal blocks."""
        modules = dict(user_modules(original))
        tensors = {**dict(original.named_parameters()), **dict(original.named_buffers())}
        key = (
            kind,
            tuple(map(type, modules.values())),
            settings_of(modules, read_code(modules.values()), frozenset()),
            tuple((name, x.shape, x.dtype, x.device) for name, x in tensors.items()),
        )
        if key not in self._verdicts:
            try:
                self._verdicts[key] = largest_difference(original, kind), ""
            except Left as left:
                self._verdicts[key] = None, str(left)
        return self._verdicts[key]


def _put_back(parent: nn.Module, path: str, names: list[str], visited: set[int]) -> None:
    if id(parent) in visited:
        return
    visited.add(id(parent))
    for name, child in parent._modules.items():
        where = f"{path}.{name}" if path else name
        if isinstance(child, Converted):
            child = parent._modules[name] = child.release()
            names.append(where)
        if child is not None:
            _put_back(child, where, names, visited)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
