# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Gradients at the hidden channels of the pyramid projection. Tiles are (channels, tokens).

A program has a block of hidden channels in a chunk of the tokens of a sample. For the gradient G of
the outputs it computes g = [scale z + shift > 0] V^T G and

* with SUMS the chunk's sums of g, of g (z - mean) and of relu(scale z + shift) G^T;
* else dz = scale g + slope (z - mean) + constant, which it stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import dot, extent, load_tile, multiple, relu, store_tile


@triton.jit(
    do_not_specialize=[
        "classifier", "map", "grad", "result", "tokens", "batch_size", "splits", "chunk"
    ]
)  # fmt: skip
def gradient_kernel(
    table,
    vectors,
    sums,
    products,
    classifier: tl.int32,
    map: tl.int32,
    grad: tl.int32,
    result: tl.int32,
    tokens: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    M: tl.constexpr,
    CO: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    SUMS: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    DW: tl.constexpr,
    DW_SIZE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
    Z_MINOR: tl.constexpr,
    Z_VECTOR: tl.constexpr,
    Z_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
):
    """``vectors``: scale, shift, mean, slope and constant, (5, M)."""
    OUTPUTS: tl.constexpr = O0 + O1
    GROUPS: tl.constexpr = (CO + OUTPUTS - 1) // OUTPUTS
    BLOCKS: tl.constexpr = (M + BH - 1) // BH
    pid = tl.program_id(0)
    h = (pid % BLOCKS) * BH + tl.arange(0, BH)
    pid = pid // BLOCKS
    split = pid % splits
    batch = (pid // splits) % batch_size
    group = pid // splits // batch_size
    begin = split * multiple(chunk, 256)
    end = tl.minimum(tokens, begin + multiple(chunk, 256))
    inside = h < M
    scale = tl.load(vectors + h, mask=inside, other=0.0)
    shift = tl.load(vectors + M + h, mask=inside, other=0.0)
    mean = tl.load(vectors + 2 * M + h, mask=inside, other=0.0)
    o0 = group * OUTPUTS + tl.arange(0, O0)
    o1 = group * OUTPUTS + O0
    if O1 > 0:
        o1 += tl.arange(0, O1)
    if SUMS:
        sum_g = tl.zeros([BH], tl.float32)
        sum_gz = tl.zeros([BH], tl.float32)
        product0 = tl.zeros([BH, O0], tl.float32)
        if O1 > 0:
            product1 = tl.zeros([BH, O1], tl.float32)
    else:
        slope = tl.load(vectors + 3 * M + h, mask=inside, other=0.0)
        constant = tl.load(vectors + 4 * M + h, mask=inside, other=0.0)
    for n0 in range(begin, end, BN):
        n = n0 + tl.arange(0, BN)
        valid = n < extent(end, "n", Z_VECTOR)
        z = load_tile(table, map, batch, h, n, valid, M, DT, SIZE, Z_MINOR, Z_VECTOR, Z_WIDE)
        active = z * scale[:, None] + shift[:, None]
        if group == 0:
            g = tl.zeros([BH, BN], tl.float32)
            for first in range(0, GROUPS * OUTPUTS, OUTPUTS):
                p0 = first + tl.arange(0, O0)
                v0 = load_tile(
                    table,
                    classifier,
                    batch * 0,
                    p0,
                    h,
                    inside,
                    CO,
                    DW,
                    DW_SIZE,
                    V_MINOR,
                    V_VECTOR,
                    V_WIDE,
                )
                g0 = load_tile(
                    table, grad, batch, p0, n, valid, CO, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
                )
                g = dot(tl.trans(v0), g0, g, DOT)
                if O1 > 0:
                    p1 = first + O0 + tl.arange(0, O1)
                    v1 = load_tile(
                        table, classifier, batch * 0, p1, h, inside, CO, DW, DW_SIZE, V_MINOR,
                        V_VECTOR, V_WIDE,
                    )  # fmt: skip
                    g1 = load_tile(
                        table, grad, batch, p1, n, valid, CO, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
                    )
                    g = dot(tl.trans(v1), g1, g, DOT)
            g = tl.where(active <= 0.0, 0.0, g)
            apart = tl.where(valid[None, :], z - mean[:, None], 0.0)
            if SUMS:
                sum_g += tl.sum(g, 1)
                sum_gz += tl.sum(g * apart, 1)
            else:
                dz = scale[:, None] * g + slope[:, None] * apart + constant[:, None]
                store_tile(
                    table, result, batch, h, n, valid, dz, M, DW, DW_SIZE, "n", Z_VECTOR, Z_WIDE
                )
        if SUMS:
            active = tl.where(valid[None, :], relu(active), 0.0)
            g0 = load_tile(
                table, grad, batch, o0, n, valid, CO, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
            )
            product0 = dot(active, tl.trans(g0), product0, DOT)
            if O1 > 0:
                g1 = load_tile(
                    table, grad, batch, o1, n, valid, CO, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
                )
                product1 = dot(active, tl.trans(g1), product1, DOT)
    if SUMS:
        part = (batch * splits + split).to(tl.int64)
        if group == 0:
            tl.store(sums + part * 2 * M + h, sum_g, mask=inside)
            tl.store(sums + part * 2 * M + M + h, sum_gz, mask=inside)
        out = products + (part * M + h[:, None]) * CO
        tl.store(out + o0[None, :], product0, mask=inside[:, None] & (o0 < CO)[None, :])
        if O1 > 0:
            tl.store(out + o1[None, :], product1, mask=inside[:, None] & (o1 < CO)[None, :])
