# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the cross-attention block. Tiles are (channels, tokens); nothing else is stored.

Weights are (W, 5, P, P) and biases (W, 5, P), P the width rounded up to 16 and filled with zeros.
Both kernels read a tile x of tokens once, in two pieces of C0 and C1 channels, and put it through a
projection of two layers in steps of BK hidden channels: no layer is ever needed as a whole.

* ``source_kernel``: S = sum_n v_n k_n^T over a chunk of the tokens of a source, for one set of
  weights: R0 + R1 rows (values), K0 + K1 columns (keys). Its second stage is ``reduce_kernel``.
* ``target_kernel``: q once for all outputs of a query with one set of weights, then their
  S q / max(Z . q, eps) in steps of BR rows, written where the outputs are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    dot,
    extent,
    load_tile,
    multiple,
    relu,
    slot_tokens,
    softplus,
    store_tile,
)
from xattn_kernels.engines.triton.table_kernel import BASE_NAMES, complete_table


@triton.jit
def _weight(weights, rows, columns, P: tl.constexpr):
    """A float32 tile of a projection, 0 outside of it."""
    mask = (rows < P)[:, None] & (columns < P)[None, :]
    return tl.load(weights + rows[:, None] * P + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _layer(
    weights,
    biases,
    rows,
    c0,
    c1,
    x0,
    x1,
    zeros,
    P: tl.constexpr,
    C1: tl.constexpr,
    DOT: tl.constexpr,
):
    """W x + b for some rows of W; x in one or two pieces."""
    acc = zeros + tl.load(biases + rows, mask=rows < P, other=0.0)[:, None]
    acc = dot(_weight(weights, rows, c0, P), x0, acc, DOT)
    if C1 > 0:
        acc = dot(_weight(weights, rows, c1, P), x1, acc, DOT)
    return acc


@triton.jit(
    do_not_specialize=[
        "length", *BASE_NAMES, "features", "pairs", "starts", "batch_size", "splits", "chunk"
    ]
)  # fmt: skip
def source_kernel(
    table,
    template,
    length: tl.int32,
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
    a8: tl.int64,
    a9: tl.int64,
    a10: tl.int64,
    a11: tl.int64,
    a12: tl.int64,
    a13: tl.int64,
    a14: tl.int64,
    a15: tl.int64,
    a16: tl.int64,
    a17: tl.int64,
    a18: tl.int64,
    a19: tl.int64,
    a20: tl.int64,
    a21: tl.int64,
    a22: tl.int64,
    a23: tl.int64,
    a24: tl.int64,
    a25: tl.int64,
    a26: tl.int64,
    a27: tl.int64,
    a28: tl.int64,
    a29: tl.int64,
    a30: tl.int64,
    a31: tl.int64,
    weights,
    biases,
    parts,
    features: tl.int32,
    pairs: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    C: tl.constexpr,
    P: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
):
    """parts[start(pair) + split, b]: (C + 1, C) of a chunk that is not empty.

    The first kernel of the operator: it completes the table, for those after it as well.
    """
    complete_table(
        table, template, length, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14,
        a15, a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip
    EXACT: tl.constexpr = DOT == "ieee"
    ROW_GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    COLUMN_GROUPS: tl.constexpr = (C + K0 + K1 - 1) // (K0 + K1)
    pid = tl.program_id(0)
    group = pid % (ROW_GROUPS * COLUMN_GROUPS)
    pid = pid // (ROW_GROUPS * COLUMN_GROUPS)
    split = pid % splits
    batch = (pid // splits) % batch_size
    pair = pid // splits // batch_size
    source = features + tl.load(table + pairs + 2 * pair).to(tl.int32) * 5
    projections = tl.load(table + pairs + 2 * pair + 1) * 5
    tokens = slot_tokens(table, source)
    begin = split * multiple(chunk, 256)
    if begin < tokens:
        end = extent(tl.minimum(tokens, begin + multiple(chunk, 256)), X_MINOR, X_VECTOR)
        weights += projections * P * P
        biases += projections * P
        row = (group // COLUMN_GROUPS) * (R0 + R1)
        column = (group % COLUMN_GROUPS) * (K0 + K1)
        c0 = tl.arange(0, C0)
        c1 = c0
        r0 = row + tl.arange(0, R0)
        k0 = column + tl.arange(0, K0)
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
        s00 = tl.zeros([R0, K0], tl.float32)
        z0 = tl.zeros([K0], tl.float32)
        if R1 > 0:
            r1 = row + R0 + tl.arange(0, R1)
            s10 = tl.zeros([R1, K0], tl.float32)
        if K1 > 0:
            k1 = column + K0 + tl.arange(0, K1)
            s01 = tl.zeros([R0, K1], tl.float32)
            z1 = tl.zeros([K1], tl.float32)
        if R1 > 0 and K1 > 0:
            s11 = tl.zeros([R1, K1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x0 = load_tile(
                table, source, batch, c0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
            )
            x1 = x0
            if C1 > 0:
                x1 = load_tile(
                    table, source, batch, c1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                )
            bias0 = tl.load(biases + 3 * P + k0, mask=k0 < P, other=0.0)
            key0 = tl.zeros([K0, BN], tl.float32) + bias0[:, None]
            if K1 > 0:
                bias1 = tl.load(biases + 3 * P + k1, mask=k1 < P, other=0.0)
                key1 = tl.zeros([K1, BN], tl.float32) + bias1[:, None]
            for h in range(0, C, BK):
                hidden = h + tl.arange(0, BK)
                zeros = tl.zeros([BK, BN], tl.float32)
                y = _layer(
                    weights + 2 * P * P, biases + 2 * P, hidden, c0, c1, x0, x1, zeros, P, C1, DOT
                )
                y = relu(y)
                key0 = dot(_weight(weights + 3 * P * P, k0, hidden, P), y, key0, DOT)
                if K1 > 0:
                    key1 = dot(_weight(weights + 3 * P * P, k1, hidden, P), y, key1, DOT)
            mask = (k0 < C)[:, None] & valid[None, :]
            key0 = tl.where(mask, softplus(key0, EXACT), 0.0)
            z0 += tl.sum(key0, 1)
            key0 = tl.trans(key0)
            if K1 > 0:
                mask = (k1 < C)[:, None] & valid[None, :]
                key1 = tl.where(mask, softplus(key1, EXACT), 0.0)
                z1 += tl.sum(key1, 1)
                key1 = tl.trans(key1)
            zeros = tl.zeros([R0, BN], tl.float32)
            v0 = _layer(weights + 4 * P * P, biases + 4 * P, r0, c0, c1, x0, x1, zeros, P, C1, DOT)
            v0 = relu(v0)
            s00 = dot(v0, key0, s00, DOT)
            if K1 > 0:
                s01 = dot(v0, key1, s01, DOT)
            if R1 > 0:
                zeros = tl.zeros([R1, BN], tl.float32)
                v1 = _layer(
                    weights + 4 * P * P, biases + 4 * P, r1, c0, c1, x0, x1, zeros, P, C1, DOT
                )
                v1 = relu(v1)
                s10 = dot(v1, key0, s10, DOT)
                if K1 > 0:
                    s11 = dot(v1, key1, s11, DOT)
        part = tl.load(table + starts + pair) + split
        out = parts + (part * batch_size + batch) * (C + 1) * C
        tl.store(out + r0[:, None] * C + k0[None, :], s00, (r0 < C)[:, None] & (k0 < C)[None, :])
        if row == 0:
            tl.store(out + C * C + k0, z0, k0 < C)
            if K1 > 0:
                tl.store(out + C * C + k1, z1, k1 < C)
        if K1 > 0:
            mask = (r0 < C)[:, None] & (k1 < C)[None, :]
            tl.store(out + r0[:, None] * C + k1[None, :], s01, mask)
        if R1 > 0:
            mask = (r1 < C)[:, None] & (k0 < C)[None, :]
            tl.store(out + r1[:, None] * C + k0[None, :], s10, mask)
            if K1 > 0:
                mask = (r1 < C)[:, None] & (k1 < C)[None, :]
                tl.store(out + r1[:, None] * C + k1[None, :], s11, mask)


@triton.jit(
    do_not_specialize=[
        "features", "pairs", "lists", "outputs", "batch_size", "tiles", "eps"
    ]
)  # fmt: skip
def target_kernel(
    table,
    weights,
    biases,
    state_s,
    state_z,
    features: tl.int32,
    pairs: tl.int32,
    lists: tl.int32,
    outputs: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    eps: tl.float32,
    C: tl.constexpr,
    P: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    O_MINOR: tl.constexpr,
    O_VECTOR: tl.constexpr,
    O_WIDE: tl.constexpr,
):
    """A tile of tokens of one query and sample, all of its outputs with one set of weights."""
    EXACT: tl.constexpr = DOT == "ieee"
    pid = tl.program_id(0)
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    pair = pid // tiles // batch_size
    query = features + tl.load(table + pairs + 2 * pair).to(tl.int32) * 5
    projections = tl.load(table + pairs + 2 * pair + 1) * 5
    tokens = slot_tokens(table, query)
    if tile * BM < tokens:
        weights += projections * P * P
        biases += projections * P
        n = tile * BM + tl.arange(0, BM)
        valid = n < extent(tokens, X_MINOR, min(X_VECTOR, O_VECTOR))
        c0 = tl.arange(0, C0)
        c1 = c0
        x0 = load_tile(table, query, batch, c0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE)
        x1 = x0
        bias0 = tl.load(biases + P + c0, mask=c0 < P, other=0.0)
        q0 = tl.zeros([C0, BM], tl.float32) + bias0[:, None]
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            x1 = load_tile(
                table, query, batch, c1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
            )
            bias1 = tl.load(biases + P + c1, mask=c1 < P, other=0.0)
            q1 = tl.zeros([C1, BM], tl.float32) + bias1[:, None]
        for h in range(0, C, BK):
            hidden = h + tl.arange(0, BK)
            zeros = tl.zeros([BK, BM], tl.float32)
            y = relu(_layer(weights, biases, hidden, c0, c1, x0, x1, zeros, P, C1, DOT))
            q0 = dot(_weight(weights + P * P, c0, hidden, P), y, q0, DOT)
            if C1 > 0:
                q1 = dot(_weight(weights + P * P, c1, hidden, P), y, q1, DOT)
        q0 = tl.where((c0 < C)[:, None], softplus(q0, EXACT), 0.0)
        if C1 > 0:
            q1 = tl.where((c1 < C)[:, None], softplus(q1, EXACT), 0.0)
        first = tl.load(table + lists + pair).to(tl.int32)
        last = tl.load(table + lists + pair + 1).to(tl.int32)
        for member in range(first, last):
            output = tl.load(table + lists + member)
            s = state_s + (output * batch_size + batch) * C * C
            z = state_z + (output * batch_size + batch) * C
            z0 = tl.load(z + c0, mask=c0 < C, other=0.0)
            denominator = tl.sum(z0[:, None] * q0, 0)
            if C1 > 0:
                z1 = tl.load(z + c1, mask=c1 < C, other=0.0)
                denominator += tl.sum(z1[:, None] * q1, 0)
            denominator = tl.where(denominator < eps, eps, denominator)
            place = outputs + output.to(tl.int32) * 5
            for k in range(0, C, BR):
                r = k + tl.arange(0, BR)
                s0 = tl.load(
                    s + r[:, None] * C + c0[None, :],
                    mask=(r < C)[:, None] & (c0 < C)[None, :],
                    other=0.0,
                )
                acc = dot(s0, q0, tl.zeros([BR, BM], tl.float32), DOT)
                if C1 > 0:
                    s1 = tl.load(
                        s + r[:, None] * C + c1[None, :],
                        mask=(r < C)[:, None] & (c1 < C)[None, :],
                        other=0.0,
                    )
                    acc = dot(s1, q1, acc, DOT)
                store_tile(
                    table, place, batch, r, n, valid, acc / denominator[None, :], C, DT, SIZE,
                    O_MINOR, O_VECTOR, O_WIDE,
                )  # fmt: skip
