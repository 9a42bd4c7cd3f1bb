# mypy: disable-error-code="import-untyped"
"""What the passes of the cross-attention block in training share on the host's side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn_kernels.engines.triton import runtime
from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.runtime import (
    Table,
    blocks,
    ceil_div,
    layout,
    layout_constants,
    pieces,
)
from xattn_kernels.engines.triton.states import Chunks
from xattn_kernels.engines.triton.training_tiles import Tiles

#: Elements of moments that a program of the merging kernel has.
_BLOCK = 512
#: The constant by which a kernel is asked for gradients of features.
_RESULTS = "RESULTS"


class Call:
    """A pass over the features of pairs, each of which has a slot.

    ``table`` is filled first; within :meth:`running` it is on the device and kernels can be run.
    """

    def __init__(self, features: Sequence[Tensor], slots: Sequence[int]) -> None:
        self.batch, self.channels, _ = features[0].shape
        self.dot = runtime.precision(features[0].dtype)
        self.like = features[0]
        self.slots = list(slots)
        self.tokens = [features[slot].size(2) for slot in slots]
        self.table = Table()
        self.rows = self.table.add_slots(features)
        self.pairs = self.table.add(self.slots)
        self.counts = self.table.add(self.tokens)
        self.device_table: Any = None
        self.constants: dict[str, Any] = {
            "C": self.channels,
            "DOT": self.dot,
            "DT": runtime.language_type(self.like.dtype),
            "SIZE": self.like.element_size(),
            **layout_constants(X=layout(features)),
        }
        first, second = pieces(self.channels)
        self.halves = {"C0": first, "C1": second}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the device of the features, with the table there."""
        with runtime.device_of(self.like):
            self.device_table = self.table.on(self.like.device)
            yield

    def operand(self, x: Tensor) -> Tensor:
        """Matrices (..., C, C) as products take them: (P, P) filled with zeros, and one more."""
        dtype = torch.bfloat16 if self.dot == "bf16" else torch.float32
        width = self.halves["C0"] + self.halves["C1"]
        count = x.shape[:-2].numel()
        padded = x.new_zeros(count + 1, width, width, dtype=dtype)
        padded[:count, : self.channels, : self.channels] = x.reshape(count, *x.shape[-2:])
        return padded

    def chunks(self, rows: int) -> Chunks:
        """Room for sums over chunks of tokens, ``rows`` and one more, of every pair."""
        return Chunks(self.table, self.tokens, self.batch, rows, self.like)

    def each(self) -> int:
        """Lists of one pair."""
        return self.table.add_lists([[pair] for pair in range(len(self.slots))])

    def launch(self, kernel: Any, chunks: Chunks, *args: Any, warps: int, **constants: Any) -> None:
        """Run a kernel for all chunks, and for all groups of rows if it has these.

        Args:
            kernel: its arguments end with where chunks start, batch, chunks of a pair, their size.
            chunks: sums to fill.
            args: other arguments of the kernel, after the table.
            warps: of a program.
            constants: other constants of the kernel.
        """
        rows = constants.get("R0", self.channels) + constants.get("R1", 0)
        launch(
            kernel,
            ceil_div(self.channels, rows) * chunks.per_slot * self.batch * len(self.slots),
            self.device_table,
            *args,
            chunks.starts,
            self.batch,
            chunks.per_slot,
            chunks.size,
            **self.constants,
            **self.halves,
            **constants,
            warps=warps,
        )

    def reduce(self, chunks: Chunks, lists: int, count: int) -> tuple[Tensor, Tensor]:
        """Sums (count, B, rows, C) and (count, B, C) of the last row over all pairs of lists."""
        sums = chunks.sums
        upper = sums.new_empty(count, self.batch, chunks.value_channels, self.channels)
        last = sums.new_empty(count, self.batch, self.channels)
        chunks.reduce(self.device_table, lists, count, None, None, upper, last)
        return upper, last

    def total(self, chunks: Chunks, lists: int, count: int) -> Tensor:
        """The same over samples as well, with the last row below the others."""
        upper, last = self.reduce(chunks, lists, count)
        return torch.cat([upper, last.unsqueeze(2)], 2).sum(1)

    def merge(self, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Means (P, C) and deviations (P, rows, C) from those of chunks."""
        from xattn_kernels.engines.triton.training_kernels import merge_kernel

        pairs, rows = len(self.slots), chunks.value_channels
        mean = chunks.sums.new_empty(pairs, self.batch, self.channels)
        deviations = chunks.sums.new_empty(pairs, self.batch, rows, self.channels)
        launch(
            merge_kernel,
            ceil_div(rows * self.channels, _BLOCK) * self.batch * pairs,
            self.device_table,
            chunks.sums,
            mean,
            deviations,
            self.rows,
            self.pairs,
            chunks.starts,
            self.batch,
            chunks.size,
            C=self.channels,
            ROWS=rows,
            BLOCK=_BLOCK,
        )
        overall = mean.sum(1) / max(self.batch, 1)
        apart = mean - overall.unsqueeze(1)
        columns = apart.unsqueeze(2)
        lines = apart.unsqueeze(3) if rows > 1 else columns
        tokens = self.device_table[self.counts : self.counts + pairs].to(mean.dtype)
        between = (lines * columns).sum(1) * tokens[:, None, None]
        return overall, deviations.sum(1) + between


class _Launch(NamedTuple):
    """A launch of a kernel that adds to gradients of features, or sums, or both."""

    flags: frozenset[str]
    """Which of its constants are set."""
    groups: int
    jobs: int
    """Where in the table they begin: the slot of each and where its pairs are."""
    programs: int
    chunks: int
    """Chunks of the slot with the most tokens."""
    size: int
    """Tokens of a chunk."""


class Gradients:
    """Launches of a kernel that sums over tokens, and adds to gradients of features.

    Those of one slot are added to by all of its pairs, in turn, by one program. Where a kernel
    needs groups of rows for its sums, there are launches for these and for the gradients.
    """

    def __init__(
        self,
        call: Call,
        chunks: Chunks,
        tiles: Tiles,
        grad_features: Sequence[Tensor],
        sums: Sequence[str],
    ) -> None:
        """Plan the launches; ``sums`` are the constants by which a kernel is asked for sums."""
        self.call, self.chunks, self.tiles, self.sums = call, chunks, tiles, sums
        wanted = [x if x.numel() > 0 else None for x in grad_features]
        self.layout = layout(wanted)
        self.rows = call.table.add_slots(wanted)
        of_slot: dict[int, list[int]] = {}
        for pair, slot in enumerate(call.slots):
            of_slot.setdefault(slot, []).append(pair)
        missing = [slot for slot in of_slot if wanted[slot] is None]
        self.launches: list[_Launch] = []
        sizes = (chunks.per_slot, chunks.size)
        groups = ceil_div(call.channels, sum(tiles.rows))
        if len(missing) < len(of_slot) and groups == 1:
            self._add({*sums, _RESULTS}, 1, list(of_slot.items()), *sizes)
            return
        by_pair = [(slot, [pair]) for pair, slot in enumerate(call.slots)]
        for flags in (set(sums),) if tiles.together else ({name} for name in sums):
            self._add(flags, groups, by_pair, *sizes)
        for slot in missing:
            del of_slot[slot]
        if of_slot:
            steps = blocks([x.size(2) for x in wanted if x is not None], tiles.tokens)
            self._add({_RESULTS}, 1, list(of_slot.items()), steps, tiles.tokens)

    def _add(
        self,
        flags: set[str],
        groups: int,
        jobs: Sequence[tuple[int, Sequence[int]]],
        chunks: int,
        size: int,
    ) -> None:
        table = self.call.table
        places = [table.add([len(pairs), *pairs]) for _, pairs in jobs]
        rows = [x for (slot, _), place in zip(jobs, places, strict=True) for x in (slot, place)]
        start = table.add(rows)
        self.launches.append(_Launch(frozenset(flags), groups, start, len(jobs), chunks, size))

    def run(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Run a kernel.

        Args:
            kernel: its arguments end with jobs, rows of results, where chunks start, batch, chunks
                of a slot, their size.
            args: other arguments of the kernel, after the table.
            constants: other constants of the kernel.
        """
        call, tiles = self.call, self.tiles
        for todo in self.launches:
            launch(
                kernel,
                todo.groups * todo.chunks * call.batch * todo.programs,
                call.device_table,
                *args,
                todo.jobs,
                self.rows,
                self.chunks.starts,
                call.batch,
                todo.chunks,
                todo.size,
                **call.constants,
                **call.halves,
                **layout_constants(D=self.layout),
                R0=tiles.rows[0],
                R1=tiles.rows[1],
                BK=tiles.step,
                BN=tiles.tokens,
                **{name: name in todo.flags for name in (*self.sums, _RESULTS)},
                **constants,
                warps=tiles.warps,
                stages=tiles.stages,
            )
