# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the gradients of linear cross-attention; states are made as in the forward pass.

* ``query_gradient_kernel``: dq for a tile of tokens, summed over the outputs of a query; leaves
  w = 1/d and u = -c/d of every output and token for the state kernel of the backward pass. It
  multiplies S - m Z^T with m = S 1 / Z 1, about the mean output, and not S: S^T g and c Z nearly
  cancel where keys hardly differ, and more so the shorter the operands are rounded.
* ``source_gradient_kernel``: dk = (dS^T v + dZ) phi'(k) and dv = dS phi(k), in a grid of both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    dot,
    extent,
    feature_map_slope,
    load_tile,
    map_tile,
    slot_tokens,
    store_tile,
)


@triton.jit(
    do_not_specialize=[
        "queries", "gradients", "results", "lists", "batch_size", "tiles", "longest", "eps"
    ]
)  # fmt: skip
def query_gradient_kernel(
    table,
    state_s,
    state_z,
    weights,
    queries: tl.int32,
    gradients: tl.int32,
    results: tl.int32,
    lists: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    longest: tl.int32,
    eps: tl.float32,
    C: tl.constexpr,
    CV: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PHI: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    Q_MINOR: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
    R_MINOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    R_WIDE: tl.constexpr,
):
    """A tile of tokens of one query and sample, all channels."""
    EXACT: tl.constexpr = DOT == "ieee"
    pid = tl.program_id(0)
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    slot = pid // tiles // batch_size
    query = queries + slot * 5
    tokens = extent(slot_tokens(table, query), Q_MINOR, min(Q_VECTOR, min(G_VECTOR, R_VECTOR)))
    if tile * BM < tokens:
        n = tile * BM + tl.arange(0, BM)
        valid = n < tokens
        c0 = tl.arange(0, C0)
        x0 = load_tile(table, query, batch, c0, n, valid, C, DT, SIZE, Q_MINOR, Q_VECTOR, Q_WIDE)
        q0 = map_tile(x0, c0, valid, C, PHI, DOT)
        d0 = tl.zeros([C0, BM], tl.float32)
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            x1 = load_tile(
                table, query, batch, c1, n, valid, C, DT, SIZE, Q_MINOR, Q_VECTOR, Q_WIDE
            )
            q1 = map_tile(x1, c1, valid, C, PHI, DOT)
            d1 = tl.zeros([C1, BM], tl.float32)
        first = tl.load(table + lists + slot).to(tl.int32)
        last = tl.load(table + lists + slot + 1).to(tl.int32)
        for member in range(first, last):
            output = tl.load(table + lists + member)
            gradient = gradients + output * 5
            present = tl.load(table + gradient) != 0
            if present:
                s = state_s + (output * batch_size + batch) * CV * C
                z = state_z + (output * batch_size + batch) * C
                z0 = tl.load(z + c0, mask=c0 < C, other=0.0)[:, None]
                denominator = tl.sum(z0 * q0, 0)
                total = tl.sum(z0)
                size = tl.sum(tl.abs(z0))
                h0 = tl.zeros([C0, BM], tl.float32)
                if C1 > 0:
                    z1 = tl.load(z + c1, mask=c1 < C, other=0.0)[:, None]
                    denominator += tl.sum(z1 * q1, 0)
                    total += tl.sum(z1)
                    size += tl.sum(tl.abs(z1))
                    h1 = tl.zeros([C1, BM], tl.float32)
                # Any m is right; where Z nearly sums to 0 it would be large, and is left out.
                usable = total > 0.5 * size
                inverse = tl.where(usable, 1.0 / tl.where(usable, total, 1.0), 0.0)
                along_mean = tl.zeros([BM], tl.float32)
                for k in range(0, CV, BK):
                    r = k + tl.arange(0, BK)
                    g = load_tile(
                        table, gradient, batch, r, n, valid, CV, DT, SIZE, G_MINOR, G_VECTOR,
                        G_WIDE,
                    )  # fmt: skip
                    inner = (r < CV)[None, :]
                    s0 = tl.load(
                        s + c0[:, None] + r[None, :] * C, mask=(c0 < C)[:, None] & inner, other=0.0
                    )
                    mean = tl.sum(s0, 0)
                    if C1 > 0:
                        s1 = tl.load(
                            s + c1[:, None] + r[None, :] * C,
                            mask=(c1 < C)[:, None] & inner,
                            other=0.0,
                        )
                        mean += tl.sum(s1, 0)
                    mean = mean * inverse
                    along_mean += tl.sum(g * mean[:, None], 0)
                    h0 = dot(s0 - z0 * mean[None, :], g, h0, DOT)
                    if C1 > 0:
                        h1 = dot(s1 - z1 * mean[None, :], g, h1, DOT)
                clamped = denominator < eps
                w = 1.0 / tl.where(clamped, eps, denominator)
                along = tl.sum(q0 * h0, 0)
                if C1 > 0:
                    along += tl.sum(q1 * h1, 0)
                along = tl.where(clamped, -along_mean, along * w)
                d0 += (h0 - along[None, :] * z0) * w[None, :]
                if C1 > 0:
                    d1 += (h1 - along[None, :] * z1) * w[None, :]
                along = tl.where(clamped, 0.0, along + along_mean)
                place = weights + (output * batch_size + batch) * 2 * longest + n
                tl.store(place, w, mask=valid)
                tl.store(place + longest, -along * w, mask=valid)
        result = results + slot * 5
        d0 = d0 * feature_map_slope(x0, PHI, EXACT)
        store_tile(table, result, batch, c0, n, valid, d0, C, DT, SIZE, R_MINOR, R_VECTOR, R_WIDE)
        if C1 > 0:
            d1 = d1 * feature_map_slope(x1, PHI, EXACT)
            store_tile(
                table, result, batch, c1, n, valid, d1, C, DT, SIZE, R_MINOR, R_VECTOR, R_WIDE
            )


@triton.jit
def _product(
    table,
    row,
    batch,
    matrix,
    r,
    n,
    valid,
    acc,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    BK: tl.constexpr,
    PHI: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    MINOR: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc + matrix phi(x) for rows ``r`` of a matrix and a tile x of a slot."""
    for k in range(0, WIDTH, BK):
        c = k + tl.arange(0, BK)
        x = load_tile(table, row, batch, c, n, valid, WIDTH, DT, SIZE, MINOR, VECTOR, WIDE)
        x = map_tile(x, c, valid, WIDTH, PHI, DOT)
        a = tl.load(
            matrix + r[:, None] * ROW_STRIDE + c[None, :] * STRIDE,
            mask=(r < ROWS)[:, None] & (c < WIDTH)[None, :],
            other=0.0,
        )
        acc = dot(a, x, acc, DOT)
    return acc


@triton.jit(
    do_not_specialize=["keys", "values", "key_results", "value_results", "batch_size", "tiles"]
)
def source_gradient_kernel(
    table,
    grad_s,
    grad_z,
    keys: tl.int32,
    values: tl.int32,
    key_results: tl.int32,
    value_results: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    C: tl.constexpr,
    CV: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PHI: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    K_MINOR: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
    DK_MINOR: tl.constexpr,
    DK_VECTOR: tl.constexpr,
    DK_WIDE: tl.constexpr,
    DV_MINOR: tl.constexpr,
    DV_VECTOR: tl.constexpr,
    DV_WIDE: tl.constexpr,
):
    """BR rows of dk, or of dv, for a tile of tokens of one source and sample."""
    KEY_GROUPS: tl.constexpr = (C + BR - 1) // BR
    GROUPS: tl.constexpr = KEY_GROUPS + (CV + BR - 1) // BR
    pid = tl.program_id(0)
    group = pid % GROUPS
    pid = pid // GROUPS
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    slot = pid // tiles // batch_size
    tokens = slot_tokens(table, keys + slot * 5)
    if tile * BN < tokens:
        n = tile * BN + tl.arange(0, BN)
        place = slot.to(tl.int64) * batch_size + batch
        s = grad_s + place * CV * C
        key = keys + slot * 5
        value = values + slot * 5
        if group < KEY_GROUPS:
            result = key_results + slot * 5
            if tl.load(table + result) != 0:
                valid = n < extent(tokens, K_MINOR, min(V_VECTOR, min(K_VECTOR, DK_VECTOR)))
                c = group * BR + tl.arange(0, BR)
                z = tl.load(grad_z + place * C + c, mask=c < C, other=0.0)
                acc = tl.zeros([BR, BN], tl.float32) + z[:, None]
                acc = _product(
                    table, value, batch, s, c, n, valid, acc, C, CV, 1, C, BK, "identity", DOT,
                    DT, SIZE, V_MINOR, V_VECTOR, V_WIDE,
                )  # fmt: skip
                x = load_tile(
                    table, key, batch, c, n, valid, C, DT, SIZE, K_MINOR, K_VECTOR, K_WIDE
                )
                acc = acc * feature_map_slope(x, PHI, DOT == "ieee")
                store_tile(
                    table, result, batch, c, n, valid, acc, C, DT, SIZE, DK_MINOR, DK_VECTOR,
                    DK_WIDE,
                )  # fmt: skip
        else:
            result = value_results + slot * 5
            if tl.load(table + result) != 0:
                valid = n < extent(tokens, K_MINOR, min(K_VECTOR, DV_VECTOR))
                r = (group - KEY_GROUPS) * BR + tl.arange(0, BR)
                acc = tl.zeros([BR, BN], tl.float32)
                acc = _product(
                    table, key, batch, s, r, n, valid, acc, CV, C, C, 1, BK, PHI, DOT,
                    DT, SIZE, K_MINOR, K_VECTOR, K_WIDE,
                )  # fmt: skip
                store_tile(
                    table, result, batch, r, n, valid, acc, CV, DT, SIZE, DV_MINOR, DV_VECTOR,
                    DV_WIDE,
                )  # fmt: skip
