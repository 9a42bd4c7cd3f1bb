# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the sums that the backward pass of the cross-attention block in training needs first.

They are built as those of the forward pass, from which everything is computed again, and sum over
chunks of tokens likewise. A program is for R0 + R1 rows of the sums and for all columns.

* ``target_sums_kernel``: dS, dZ and the sums that a batch norm needs, for one output.
* ``key_sums_kernel``: these sums for the keys of a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    extent,
    feature_map_slope,
    load_tile,
    multiple,
    slot_tokens,
    softplus,
)
from xattn_kernels.engines.triton.training_maths import (
    attention_gradient,
    centred,
    columns,
    first_layer,
    outer,
    second_layer,
    store_sums,
    store_vector,
    vector,
)


@triton.jit(
    do_not_specialize=[
        "features", "pairs", "gradients", "eps", "starts", "batch_size", "splits", "chunk"
    ]
)  # fmt: skip
def target_sums_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    state_s,
    state_z,
    mean,
    parts,
    sums,
    features: tl.int32,
    pairs: tl.int32,
    gradients: tl.int32,
    eps: tl.float32,
    starts: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
):
    """parts[start(output) + split, b]: (C + 1, C) of a chunk, and sums[...]: (2, C)."""
    EXACT: tl.constexpr = DOT == "ieee"
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    P: tl.constexpr = C0 + C1
    pid = tl.program_id(0)
    group = pid % GROUPS
    pid = pid // GROUPS
    split = pid % splits
    batch = (pid // splits) % batch_size
    output = pid // splits // batch_size
    pair = tl.load(table + pairs + 2 * output)
    slot = tl.load(table + pairs + 2 * output + 1)
    feature = features + slot.to(tl.int32) * 5
    gradient = gradients + output * 5
    tokens = slot_tokens(table, feature)
    begin = split * multiple(chunk, 256)
    if begin < tokens:
        end = tl.minimum(tokens, begin + multiple(chunk, 256))
        end = extent(end, X_MINOR, min(X_VECTOR, G_VECTOR))
        center += slot * C
        first += pair * P * P
        first_bias += pair * C
        second += pair * P * P
        affine += pair * 3 * C
        place = output.to(tl.int64) * batch_size + batch
        s = state_s + place * P * P
        z = state_z + place * C
        m = mean + place * C
        c0 = tl.arange(0, C0)
        c1 = c0
        r0 = group * (R0 + R1) + tl.arange(0, R0)
        r1 = r0
        gamma0 = vector(affine + C, c0, C)
        beta0 = vector(affine + 2 * C, c0, C)
        z0 = tl.zeros([C0], tl.float32)
        a0 = tl.zeros([C0], tl.float32)
        b0 = tl.zeros([C0], tl.float32)
        z1 = z0
        a1 = a0
        b1 = b0
        s00 = tl.zeros([R0, C0], tl.float32)
        s01 = s00
        s10 = s00
        s11 = s00
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            gamma1 = vector(affine + C, c1, C)
            beta1 = vector(affine + 2 * C, c1, C)
            z1 = tl.zeros([C1], tl.float32)
            a1 = tl.zeros([C1], tl.float32)
            b1 = tl.zeros([C1], tl.float32)
            s01 = tl.zeros([R0, C1], tl.float32)
        if R1 > 0:
            r1 = group * (R0 + R1) + R0 + tl.arange(0, R1)
            s10 = tl.zeros([R1, C0], tl.float32)
            if C1 > 0:
                s11 = tl.zeros([R1, C1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x0, x1 = centred(
                table, feature, batch, center, c0, c1, n, valid, C, C1, DT, SIZE, X_MINOR,
                X_VECTOR, X_WIDE,
            )  # fmt: skip
            y0, y1 = second_layer(
                first, first_bias, second, affine, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT
            )
            q0 = tl.where(valid[None, :], softplus(gamma0 * y0 + beta0, EXACT), 0.0)
            q1 = q0
            if C1 > 0:
                q1 = tl.where(valid[None, :], softplus(gamma1 * y1 + beta1, EXACT), 0.0)
            d0, d1, w, u = attention_gradient(
                table, gradient, batch, s, z, m, q0, q1, c0, c1, n, valid, eps, C, C0, C1, BK, BN,
                DOT, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE,
            )  # fmt: skip
            z0 += tl.sum(q0 * u[None, :], 1)
            d0 = d0 * feature_map_slope(gamma0 * y0 + beta0, "softplus", EXACT)
            d0 = tl.where(valid[None, :], d0, 0.0)
            a0 += tl.sum(d0, 1)
            b0 += tl.sum(d0 * y0, 1)
            if C1 > 0:
                z1 += tl.sum(q1 * u[None, :], 1)
                d1 = d1 * feature_map_slope(gamma1 * y1 + beta1, "softplus", EXACT)
                d1 = tl.where(valid[None, :], d1, 0.0)
                a1 += tl.sum(d1, 1)
                b1 += tl.sum(d1 * y1, 1)
            g = load_tile(
                table, gradient, batch, r0, n, valid, C, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
            )
            s00, s01 = outer(g * w[None, :], q0, q1, s00, s01, C1, DOT)
            if R1 > 0:
                g = load_tile(
                    table, gradient, batch, r1, n, valid, C, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
                )
                s10, s11 = outer(g * w[None, :], q0, q1, s10, s11, C1, DOT)
        part = (tl.load(table + starts + output) + split) * batch_size + batch
        out = parts + part * (C + 1) * C
        store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
        if group == 0:
            store_vector(out + C * C, c0, c1, z0, z1, C, C1)
            store_vector(sums + part * 2 * C, c0, c1, a0, a1, C, C1)
            store_vector(sums + part * 2 * C + C, c0, c1, b0, b1, C, C1)


@triton.jit(do_not_specialize=["features", "pairs", "starts", "batch_size", "splits", "chunk"])
def key_sums_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    grad_s,
    grad_z,
    sums,
    features: tl.int32,
    pairs: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
):
    """sums[start(pair) + split, b]: (2, C) of a chunk."""
    EXACT: tl.constexpr = DOT == "ieee"
    P: tl.constexpr = C0 + C1
    pid = tl.program_id(0)
    split = pid % splits
    batch = (pid // splits) % batch_size
    pair = pid // splits // batch_size
    slot = tl.load(table + pairs + pair)
    feature = features + slot.to(tl.int32) * 5
    tokens = slot_tokens(table, feature)
    begin = split * multiple(chunk, 256)
    if begin < tokens:
        end = extent(tl.minimum(tokens, begin + multiple(chunk, 256)), X_MINOR, X_VECTOR)
        center += slot * C
        first += pair.to(tl.int64) * 2 * P * P
        first_bias += pair * 2 * C
        second += pair.to(tl.int64) * P * P
        affine += pair * 3 * C
        place = pair.to(tl.int64) * batch_size + batch
        s = grad_s + place * P * P
        z = grad_z + place * C
        c0 = tl.arange(0, C0)
        c1 = c0
        gamma0 = vector(affine + C, c0, C)
        beta0 = vector(affine + 2 * C, c0, C)
        a0 = tl.zeros([C0], tl.float32)
        b0 = tl.zeros([C0], tl.float32)
        a1 = a0
        b1 = b0
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            gamma1 = vector(affine + C, c1, C)
            beta1 = vector(affine + 2 * C, c1, C)
            a1 = tl.zeros([C1], tl.float32)
            b1 = tl.zeros([C1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x0, x1 = centred(
                table, feature, batch, center, c0, c1, n, valid, C, C1, DT, SIZE, X_MINOR,
                X_VECTOR, X_WIDE,
            )  # fmt: skip
            y0, y1 = second_layer(
                first, first_bias, second, affine, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT
            )
            d0 = tl.zeros([C0, BN], tl.float32) + vector(z, c0, C)
            d1 = d0
            if C1 > 0:
                d1 = tl.zeros([C1, BN], tl.float32) + vector(z, c1, C)
            for k in range(0, C, BK):
                r = k + tl.arange(0, BK)
                zeros = tl.zeros([BK, BN], tl.float32)
                v = first_layer(
                    first + P * P, first_bias + C, r, c0, c1, x0, x1, zeros, C, P, C1, DOT
                )
                d0, d1 = columns(s, c0, c1, r, v, d0, d1, P, C1, DOT)
            d0 = d0 * feature_map_slope(gamma0 * y0 + beta0, "softplus", EXACT)
            d0 = tl.where(valid[None, :], d0, 0.0)
            a0 += tl.sum(d0, 1)
            b0 += tl.sum(d0 * y0, 1)
            if C1 > 0:
                d1 = d1 * feature_map_slope(gamma1 * y1 + beta1, "softplus", EXACT)
                d1 = tl.where(valid[None, :], d1, 0.0)
                a1 += tl.sum(d1, 1)
                b1 += tl.sum(d1 * y1, 1)
        part = (tl.load(table + starts + pair) + split) * batch_size + batch
        store_vector(sums + part * 2 * C, c0, c1, a0, a1, C, C1)
        store_vector(sums + part * 2 * C + C, c0, c1, b0, b1, C, C1)
