"""States (S, Z) from sums over chunks of tokens: the second stage, of every operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_kernels.engines.triton.launch import launch
from xattn_kernels.engines.triton.runtime import Table, ceil_div

#: Elements of states that a program of the summing kernel has.
_BLOCK = 512


class Chunks:
    """Sums over chunks of tokens of slots, to be filled by a kernel, and states made of these.

    Chunk number ``starts[slot] + i`` is the i-th of a slot. A slot without tokens has none.
    """

    def __init__(
        self, table: Table, tokens: Sequence[int], batch: int, value_channels: int, like: Tensor
    ) -> None:
        self.batch, self.channels, self.value_channels = batch, like.size(1), value_channels
        self.slots = len(tokens)
        longest = max(tokens, default=0)
        self.size = chunk_of(batch, longest)
        self.per_slot = ceil_div(longest, self.size)
        starts = [0]
        for n in tokens:
            starts.append(starts[-1] + ceil_div(n, self.size))
        self.starts = table.add(starts)
        self.sums = like.new_empty(
            starts[-1], batch, value_channels + 1, self.channels, dtype=torch.float32
        )

    def reduce(
        self,
        table: Tensor,
        lists: int,
        count: int,
        initial_s: Tensor | None,
        initial_z: Tensor | None,
        out_s: Tensor,
        out_z: Tensor,
        by_member: bool = False,
    ) -> None:
        """Sum the chunks of the slots in every list, and what the list starts from.

        Args:
            table: the table on the device.
            lists: where in it the lists of slots begin.
            count: how many they are.
            initial_s: S to start from, by list or by member of a list.
            initial_z: the same of Z.
            out_s: (count, B, Cv, C).
            out_z: (count, B, C).
            by_member: whether the initial states are those of the members.
        """
        from xattn_kernels.engines.triton.linear_kernels import reduce_kernel

        size = (self.value_channels + 1) * self.channels
        launch(
            reduce_kernel,
            ceil_div(size, _BLOCK) * self.batch * count,
            table,
            self.sums,
            out_s if initial_s is None else initial_s,
            out_z if initial_z is None else initial_z,
            out_s,
            out_z,
            lists,
            self.starts,
            self.batch,
            C=self.channels,
            CV=self.value_channels,
            BLOCK=_BLOCK,
            HAS_S=initial_s is not None,
            HAS_Z=initial_z is not None,
            BY_MEMBER=by_member,
        )


def chunk_of(batch: int, longest: int) -> int:
    """Tokens of a chunk: few enough for some hundred programs, and their states cost little."""
    chunk = 256
    while chunk < 2048 and 128 * chunk < batch * longest:
        chunk *= 2
    return chunk
