# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Device functions of the training kernels: layers recomputed from features, sums of products.

All channels of a tile are in two pieces of C0 and C1 channels, of which the second may be missing
(C1 = 0: its values are those of the first, and unused). Matrices are (P, P) with P = C0 + C1,
filled with zeros, so that nothing is tested to read them; behind the last one there is another,
which rows of the last group may reach. Vectors have C elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import dot, load_tile, relu, store_tile


@triton.jit
def matrix(base, rows, columns, P: tl.constexpr):
    """A float32 tile of a matrix."""
    return tl.load(base + rows[:, None] * P + columns[None, :]).to(tl.float32)


@triton.jit
def transposed(base, rows, columns, P: tl.constexpr):
    """The same of its transpose."""
    return tl.load(base + rows[:, None] + columns[None, :] * P).to(tl.float32)


@triton.jit
def vector(base, rows, C: tl.constexpr):
    """Some elements, as a column."""
    return tl.load(base + rows, mask=rows < C, other=0.0)[:, None]


@triton.jit
def product(base, rows, c0, c1, x0, x1, acc, P: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr):
    """acc + M x for some rows of M."""
    acc = dot(matrix(base, rows, c0, P), x0, acc, DOT)
    if C1 > 0:
        acc = dot(matrix(base, rows, c1, P), x1, acc, DOT)
    return acc


@triton.jit
def product_transposed(
    base, rows, c0, c1, x0, x1, acc, P: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr
):
    """acc + M^T x for some rows of M^T."""
    acc = dot(transposed(base, rows, c0, P), x0, acc, DOT)
    if C1 > 0:
        acc = dot(transposed(base, rows, c1, P), x1, acc, DOT)
    return acc


@triton.jit
def columns(
    base, c0, c1, rows, x, acc0, acc1, P: tl.constexpr, C1: tl.constexpr, DOT: tl.constexpr
):
    """acc + M^T x in pieces for a tile x of some rows of M."""
    acc0 = dot(transposed(base, c0, rows, P), x, acc0, DOT)
    if C1 > 0:
        acc1 = dot(transposed(base, c1, rows, P), x, acc1, DOT)
    return acc0, acc1


@triton.jit
def outer(a, b0, b1, s0, s1, C1: tl.constexpr, DOT: tl.constexpr):
    """s + a b^T, summed over the tokens of two tiles, of which b is in pieces."""
    s0 = dot(a, tl.trans(b0), s0, DOT)
    if C1 > 0:
        s1 = dot(a, tl.trans(b1), s1, DOT)
    return s0, s1


@triton.jit
def store_sums(
    base, r0, r1, c0, c1, s00, s01, s10, s11, C: tl.constexpr, R1: tl.constexpr, C1: tl.constexpr
):
    """Write a (C, C) sum in pieces, as far as rows and columns are in it."""
    tl.store(base + r0[:, None] * C + c0[None, :], s00, (r0 < C)[:, None] & (c0 < C)[None, :])
    if C1 > 0:
        tl.store(base + r0[:, None] * C + c1[None, :], s01, (r0 < C)[:, None] & (c1 < C)[None, :])
    if R1 > 0:
        tl.store(base + r1[:, None] * C + c0[None, :], s10, (r1 < C)[:, None] & (c0 < C)[None, :])
        if C1 > 0:
            mask = (r1 < C)[:, None] & (c1 < C)[None, :]
            tl.store(base + r1[:, None] * C + c1[None, :], s11, mask)


@triton.jit
def store_vector(base, c0, c1, v0, v1, C: tl.constexpr, C1: tl.constexpr):
    """Write C numbers in pieces."""
    tl.store(base + c0, v0, c0 < C)
    if C1 > 0:
        tl.store(base + c1, v1, c1 < C)


@triton.jit
def centred_piece(
    table,
    row,
    batch,
    center,
    c,
    n,
    valid,
    C: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x - center for some channels, 0 outside of the slot."""
    x = load_tile(table, row, batch, c, n, valid, C, DT, SIZE, MINOR, VECTOR, WIDE)
    return tl.where(valid[None, :], x - vector(center, c, C), 0.0)


@triton.jit
def centred(
    table,
    row,
    batch,
    center,
    c0,
    c1,
    n,
    valid,
    C: tl.constexpr,
    C1: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x - center in pieces, 0 outside of the slot."""
    x0 = centred_piece(
        table, row, batch, center, c0, n, valid, C, DT, SIZE, MINOR, VECTOR, WIDE
    )  # fmt: skip
    x1 = x0
    if C1 > 0:
        x1 = centred_piece(
            table, row, batch, center, c1, n, valid, C, DT, SIZE, MINOR, VECTOR, WIDE
        )  # fmt: skip
    return x0, x1


@triton.jit
def first_layer(
    weight,
    bias,
    rows,
    c0,
    c1,
    x0,
    x1,
    zeros,
    C: tl.constexpr,
    P: tl.constexpr,
    C1: tl.constexpr,
    DOT: tl.constexpr,
):
    """relu(W x + b) for some rows; ``zeros`` is a tile of their shape."""
    return relu(product(weight, rows, c0, c1, x0, x1, zeros + vector(bias, rows, C), P, C1, DOT))


@triton.jit
def second_layer(
    first,
    bias,
    second,
    shift,
    c0,
    c1,
    x0,
    x1,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    SHIFTED: tl.constexpr = True,
):
    """W_2 relu(W_1 x + b) in pieces, plus ``shift`` if SHIFTED, by steps of BK hidden channels."""
    P: tl.constexpr = C0 + C1
    y0 = tl.zeros([C0, BN], tl.float32)
    y1 = y0
    if C1 > 0:
        y1 = tl.zeros([C1, BN], tl.float32)
    if SHIFTED:
        y0 += vector(shift, c0, C)
        if C1 > 0:
            y1 += vector(shift, c1, C)
    for k in range(0, C, BK):
        hidden = k + tl.arange(0, BK)
        zeros = tl.zeros([BK, BN], tl.float32)
        h = first_layer(first, bias, hidden, c0, c1, x0, x1, zeros, C, P, C1, DOT)
        y0 = dot(matrix(second, c0, hidden, P), h, y0, DOT)
        if C1 > 0:
            y1 = dot(matrix(second, c1, hidden, P), h, y1, DOT)
    return y0, y1


@triton.jit
def attention_gradient(
    table,
    gradient,
    batch,
    s,
    z,
    mean,
    q0,
    q1,
    c0,
    c1,
    n,
    valid,
    eps,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of q^ from one output, and 1/d and -c/d of its tokens.

    ``s`` is S - m Z^T with ``mean`` m: S^T g and c Z nearly cancel where keys hardly differ, and
    more so the shorter the operands of products are rounded.
    """
    z0 = vector(z, c0, C)
    denominator = tl.sum(z0 * q0, 0)
    h0 = tl.zeros([C0, BN], tl.float32)
    h1 = h0
    z1 = z0
    if C1 > 0:
        z1 = vector(z, c1, C)
        denominator += tl.sum(z1 * q1, 0)
        h1 = tl.zeros([C1, BN], tl.float32)
    along_mean = tl.zeros([BN], tl.float32)
    for k in range(0, C, BK):
        r = k + tl.arange(0, BK)
        g = load_tile(table, gradient, batch, r, n, valid, C, DT, SIZE, MINOR, VECTOR, WIDE)
        along_mean += tl.sum(g * vector(mean, r, C), 0)
        h0, h1 = columns(s, c0, c1, r, g, h0, h1, C0 + C1, C1, DOT)
    clamped = denominator < eps
    w = 1.0 / tl.where(clamped, eps, denominator)
    along = tl.sum(q0 * h0, 0)
    if C1 > 0:
        along += tl.sum(q1 * h1, 0)
    along = tl.where(clamped, -along_mean, along * w)
    d0 = (h0 - along[None, :] * z0) * w[None, :]
    d1 = d0
    if C1 > 0:
        d1 = (h1 - along[None, :] * z1) * w[None, :]
    u = tl.where(clamped, 0.0, -(along + along_mean) * w)
    return d0, d1, w, u


@triton.jit
def add_tile(
    table,
    result,
    batch,
    c0,
    c1,
    n,
    valid,
    x0,
    x1,
    C: tl.constexpr,
    C1: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add a tile to the gradient of a slot, if that is wanted."""
    if tl.load(table + result) != 0:
        x0 += load_tile(
            table, result, batch, c0, n, valid, C, tl.float32, 4, MINOR, VECTOR, WIDE
        )  # fmt: skip
        store_tile(
            table, result, batch, c0, n, valid, x0, C, tl.float32, 4, MINOR, VECTOR, WIDE
        )  # fmt: skip
        if C1 > 0:
            x1 += load_tile(
                table, result, batch, c1, n, valid, C, tl.float32, 4, MINOR, VECTOR, WIDE
            )  # fmt: skip
            store_tile(
                table, result, batch, c1, n, valid, x1, C, tl.float32, 4, MINOR, VECTOR, WIDE
            )  # fmt: skip
