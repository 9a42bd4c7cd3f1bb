"""Overlap of strided tensors against the set of addresses that they have."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xattn_kernels.ops.overlap import first_overlap, may_overlap, overlaps_itself

MEMORY = torch.zeros(4096)

views = st.builds(
    lambda sizes, strides, offset: MEMORY.as_strided(sizes, strides, offset),
    st.tuples(*[st.integers(0, 5)] * 3),
    st.tuples(*[st.integers(0, 40)] * 3),
    st.integers(0, 120),
)


def addresses(x: Tensor) -> list[int]:
    positions = torch.arange(MEMORY.numel()).as_strided(x.shape, x.stride(), x.storage_offset())
    return positions.flatten().tolist()


@settings(max_examples=400, deadline=None)
@given(views)
def test_within_a_tensor(x: Tensor) -> None:
    used = addresses(x)
    assert overlaps_itself(x) == (len(set(used)) < len(used))


@settings(max_examples=400, deadline=None)
@given(views, views)
def test_between_tensors(x: Tensor, y: Tensor) -> None:
    assert may_overlap(x, y) == bool(set(addresses(x)) & set(addresses(y)))


@settings(max_examples=400, deadline=None)
@given(st.lists(views, max_size=5), st.lists(views, max_size=3))
def test_among_tensors(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    together = [*outputs, *inputs]
    wrong = {(i, i) for i, x in enumerate(outputs) if overlaps_itself(x)} | {
        (i, j)
        for i, x in enumerate(outputs)
        for j, y in enumerate(together)
        if i < j and may_overlap(x, y)
    }
    found = first_overlap(outputs, inputs)
    assert (found in wrong) if wrong else found is None


def test_slices_of_a_consumers_buffer() -> None:
    buffer = torch.zeros(2, 48, 6, 10)
    for memory in (buffer, buffer.to(memory_format=torch.channels_last)):
        slices = [memory[:, start : start + 8].flatten(2) for start in range(0, 48, 8)]
        assert not any(overlaps_itself(x) for x in slices)
        assert not any(may_overlap(x, y) for x in slices for y in slices if x is not y)
        assert may_overlap(slices[0], memory[:, 7:9].flatten(2))


def test_other_memory_and_other_element_sizes() -> None:
    assert not may_overlap(MEMORY, MEMORY.clone())
    halves = MEMORY.view(torch.float16)
    assert may_overlap(MEMORY[:4], halves[6:9])
    assert not may_overlap(MEMORY[:4], halves[8:9])


def test_doubt_is_overlap() -> None:
    # More steps than the search takes.
    x = torch.zeros(2**22).as_strided((500, 500, 500), (1009, 1013, 1019), 0)
    assert overlaps_itself(x)
