"""Whether strided tensors share memory, from addresses, shapes and strides.

Answers depend on few different geometries, which come again with every call: they are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

#: Search steps after which an answer is given up for the safe one. Ordinary views need a handful.
_STEPS = 10_000

Ints = tuple[int, ...]


def overlaps_itself(x: Tensor) -> bool:
    """Whether two different indices of ``x`` address the same element; True in doubt."""
    return _geometry(x.shape, x.stride())[1]


def may_overlap(x: Tensor, y: Tensor) -> bool:
    """Whether ``x`` and ``y`` address a common byte; True in doubt."""
    x_low, x_high = _extent(x)
    y_low, y_high = _extent(y)
    if x_high <= y_low or y_high <= x_low:
        return False
    size = x.element_size()
    if y.element_size() != size or (y_low - x_low) % size:
        return True
    return _meet((y_low - x_low) // size, x.shape, x.stride(), y.shape, y.stride())


def first_overlap(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[int, int] | None:
    """Find two tensors that share memory, at least one of them an output.

    Returns:
        Positions in ``[*outputs, *inputs]``, the smaller one, of an output, first; equal for an
        output that overlaps itself. None if there are none.
    """
    tensors = [*outputs, *inputs]
    for i, x in enumerate(outputs):
        if overlaps_itself(x):
            return i, i
    spans = sorted((*_extent(x), i) for i, x in enumerate(tensors))
    reaching: list[tuple[int, int]] = []  # (end, position) of those that may reach the next
    for low, high, j in spans:
        if low == high:
            continue
        reaching = [(end, i) for end, i in reaching if end > low]
        for _, i in reaching:
            pair = (min(i, j), max(i, j))
            if pair[0] < len(outputs) and may_overlap(tensors[i], tensors[j]):
                return pair
        reaching.append((high, j))
    return None


def _extent(x: Tensor) -> tuple[int, int]:
    """First byte of ``x`` in memory, and the one after its last."""
    low = x.data_ptr()
    return low, low + _geometry(x.shape, x.stride())[0] * x.element_size()


@functools.lru_cache(maxsize=4096)
def _geometry(sizes: Ints, strides: Ints) -> tuple[int, bool]:
    """Elements from the first to the last one, both included, and whether two coincide."""
    if 0 in sizes:
        return 0, False
    dims = sorted((s, n) for s, n in zip(strides, sizes, strict=True) if n > 1)
    span = 1 + sum(s * (n - 1) for s, n in dims)
    reach = 0
    for stride, size in dims:
        # Each step of this dimension clears all that the smaller ones reach: the usual case.
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return span, False
    # Of two indices that coincide, let dimension i be the last that differs, by k > 0.
    for i, (stride, size) in enumerate(dims):
        others = [(s, 1 - n, n - 1) for s, n in dims[:i]]
        if _reaches(0, [(stride, 1, size - 1), *others]):
            return span, True
    return span, False


@functools.lru_cache(maxsize=4096)
def _meet(offset: int, x_sizes: Ints, x_strides: Ints, y_sizes: Ints, y_strides: Ints) -> bool:
    """Whether two views, the second one starting ``offset`` elements later, share an element."""
    terms = [(s, 0, n - 1) for s, n in zip(x_strides, x_sizes, strict=True)]
    terms += [(s, 1 - n, 0) for s, n in zip(y_strides, y_sizes, strict=True)]
    return _reaches(offset, terms)


def _reaches(target: int, terms: list[tuple[int, int, int]]) -> bool:
    """Whether ``target`` is a sum of multiples of strides; a term is (stride, least, most)."""
    merged: dict[int, tuple[int, int]] = {}
    for stride, least, most in terms:
        low, high = merged.get(stride, (0, 0))
        merged[stride] = (low + least, high + most)
    ordered = sorted((s, *bounds) for s, bounds in merged.items() if s)[::-1]
    lows, highs = [0], [0]  # of what the smaller strides reach together
    for stride, least, most in reversed(ordered):
        lows.append(lows[-1] + stride * least)
        highs.append(highs[-1] + stride * most)
    steps = 0
    stack = [(0, target)]
    while stack:
        depth, rest = stack.pop()
        if depth == len(ordered):
            if rest == 0:
                return True
            continue
        stride, least, most = ordered[depth]
        low, high = lows[len(ordered) - depth - 1], highs[len(ordered) - depth - 1]
        first = max(least, -((high - rest) // stride))
        last = min(most, (rest - low) // stride)
        for k in range(first, last + 1):
            steps += 1
            if steps > _STEPS:
                return True
            stack.append((depth + 1, rest - k * stride))
    return False
