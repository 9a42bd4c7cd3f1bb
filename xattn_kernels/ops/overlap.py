"""Whether strided tensors share memory, from addresses, shapes and strides."""

from __future__ import annotations

from torch import Tensor

#: Search steps after which an answer is given up for the safe one. Ordinary views need a handful.
_STEPS = 10_000


def overlaps_itself(x: Tensor) -> bool:
    """Whether two different indices of ``x`` address the same element."""
    sizes, strides = x.shape, x.stride()
    if x.numel() == 0:
        return False
    dims = sorted((s, n) for s, n in zip(strides, sizes, strict=True) if n > 1)
    reach = 0
    for stride, size in dims:
        # Each step of this dimension clears all that the smaller ones reach: the usual case.
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # The difference of two different indices: one dimension differs, say the first by k > 0.
    for i, (stride, size) in enumerate(dims):
        others = [(s, 1 - n, n - 1) for s, n in dims[:i]]
        if _reaches(0, [(stride, 1, size - 1), *others]):
            return True
    return False


def may_overlap(x: Tensor, y: Tensor) -> bool:
    """Whether ``x`` and ``y`` address a common byte; True in doubt."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (x_low, x_high), (y_low, y_high) = _extent(x), _extent(y)
    if x_high <= y_low or y_high <= x_low:
        return False
    size = x.element_size()
    if y.element_size() != size or (y_low - x_low) % size:
        return True
    terms = [(s, 0, n - 1) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
    terms += [(s, 1 - n, 0) for s, n in zip(y.stride(), y.shape, strict=True) if n > 1]
    return _reaches((y_low - x_low) // size, terms)


def _extent(x: Tensor) -> tuple[int, int]:
    """First byte of ``x`` in memory, and the one after its last."""
    span = sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (span + 1) * x.element_size()


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
