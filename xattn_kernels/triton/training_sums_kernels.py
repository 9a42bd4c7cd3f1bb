# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the sums that the backward pass of the cross-attention block in training needs first.

They are built as those of the forward pass, from which everything is computed again, and sum over
chunks of tokens likewise. A program is for R0 + R1 rows of the sums and for all columns.

* ``target_sums_kernel``: dS, dZ and the sums that a batch norm needs, for one output.
* ``source_sums_kernel``: these sums for the keys of a pair, and all of its value layer. It adds to
  gradients of features as ``gradient_kernel`` does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.triton.maths import (
    dot,
    extent,
    feature_map_slope,
    load_tile,
    multiple,
    slot_tokens,
    softplus,
)
from xattn_kernels.triton.training_maths import (
    add_tile,
    attention_gradient,
    centred,
    first_layer,
    outer,
    product,
    second_layer,
    store_sums,
    store_vector,
    transposed,
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
        first += pair * C * C
        first_bias += pair * C
        second += pair * C * C
        affine += pair * 3 * C
        place = output.to(tl.int64) * batch_size + batch
        s = state_s + place * C * C
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
            mask = (c0 < C)[:, None] & valid[None, :]
            q0 = tl.where(mask, softplus(gamma0 * y0 + beta0, EXACT), 0.0)
            q1 = q0
            if C1 > 0:
                mask = (c1 < C)[:, None] & valid[None, :]
                q1 = tl.where(mask, softplus(gamma1 * y1 + beta1, EXACT), 0.0)
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
            g0 = load_tile(
                table, gradient, batch, r0, n, valid, C, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
            )
            g0 = g0 * w[None, :]
            g1 = g0
            if R1 > 0:
                g1 = load_tile(
                    table, gradient, batch, r1, n, valid, C, DT, SIZE, G_MINOR, G_VECTOR, G_WIDE
                )
                g1 = g1 * w[None, :]
            s00, s01, s10, s11 = outer(g0, g1, q0, q1, s00, s01, s10, s11, R1, C1, DOT)
        part = (tl.load(table + starts + output) + split) * batch_size + batch
        out = parts + part * (C + 1) * C
        store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
        if group == 0:
            store_vector(out + C * C, c0, c1, z0, z1, C, C1)
            store_vector(sums + part * 2 * C, c0, c1, a0, a1, C, C1)
            store_vector(sums + part * 2 * C + C, c0, c1, b0, b1, C, C1)


@triton.jit(
    do_not_specialize=[
        "features", "jobs", "results", "starts", "batch_size", "splits", "chunk"
    ]
)  # fmt: skip
def source_sums_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    grad_s,
    grad_z,
    parts,
    sums,
    features: tl.int32,
    jobs: tl.int32,
    results: tl.int32,
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
    SUMS: tl.constexpr,
    RESULTS: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    D_MINOR: tl.constexpr,
    D_VECTOR: tl.constexpr,
    D_WIDE: tl.constexpr,
):
    """parts[start(pair) + split, b]: (C + 1, C) of a chunk, da_v below da_v x^T; sums: (2, C)."""
    EXACT: tl.constexpr = DOT == "ieee"
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    pid = tl.program_id(0)
    group = 0
    if SUMS:
        group = pid % GROUPS
        pid = pid // GROUPS
    split = pid % splits
    batch = (pid // splits) % batch_size
    job = pid // splits // batch_size
    slot = tl.load(table + jobs + 2 * job)
    members = tl.load(table + jobs + 2 * job + 1)
    feature = features + slot.to(tl.int32) * 5
    result = results + slot.to(tl.int32) * 5
    tokens = slot_tokens(table, feature)
    begin = split * multiple(chunk, 16)
    if begin < tokens:
        end = tl.minimum(tokens, begin + multiple(chunk, 16))
        end = extent(end, X_MINOR, min(X_VECTOR, D_VECTOR))
        center += slot * C
        c0 = tl.arange(0, C0)
        c1 = c0
        r0 = group * (R0 + R1) + tl.arange(0, R0)
        r1 = r0
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
        if R1 > 0:
            r1 = group * (R0 + R1) + R0 + tl.arange(0, R1)
        count = tl.load(table + members).to(tl.int32)
        for member in range(count):
            pair = tl.load(table + members + 1 + member)
            w1 = first + pair * 2 * C * C
            wv = w1 + C * C
            bias = first_bias + pair * 2 * C
            w2 = second + pair * C * C
            shift = affine + pair * 3 * C
            s = grad_s + (pair * batch_size + batch) * C * C
            z = grad_z + (pair * batch_size + batch) * C
            gamma0 = vector(shift + C, c0, C)
            beta0 = vector(shift + 2 * C, c0, C)
            a0 = tl.zeros([C0], tl.float32)
            b0 = tl.zeros([C0], tl.float32)
            v0 = tl.zeros([R0], tl.float32)
            a1 = a0
            b1 = b0
            v1 = v0
            s00 = tl.zeros([R0, C0], tl.float32)
            s01 = s00
            s10 = s00
            s11 = s00
            if C1 > 0:
                gamma1 = vector(shift + C, c1, C)
                beta1 = vector(shift + 2 * C, c1, C)
                a1 = tl.zeros([C1], tl.float32)
                b1 = tl.zeros([C1], tl.float32)
                s01 = tl.zeros([R0, C1], tl.float32)
            if R1 > 0:
                v1 = tl.zeros([R1], tl.float32)
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
                    w1, bias, w2, shift, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT
                )  # fmt: skip
                k0 = softplus(gamma0 * y0 + beta0, EXACT)
                k0 = tl.where((c0 < C)[:, None], k0, 0.0)
                k1 = k0
                if C1 > 0:
                    k1 = softplus(gamma1 * y1 + beta1, EXACT)
                    k1 = tl.where((c1 < C)[:, None], k1, 0.0)
                # Steps of value channels: their values, what is known of dk^ by them, and da_v.
                d0 = tl.zeros([C0, BN], tl.float32) + vector(z, c0, C)
                x_grad0 = tl.zeros([C0, BN], tl.float32)
                d1 = d0
                x_grad1 = x_grad0
                if C1 > 0:
                    d1 = tl.zeros([C1, BN], tl.float32) + vector(z, c1, C)
                    x_grad1 = tl.zeros([C1, BN], tl.float32)
                for k in range(0, C, BK):
                    r = k + tl.arange(0, BK)
                    zeros = tl.zeros([BK, BN], tl.float32)
                    v = first_layer(wv, bias + C, r, c0, c1, x0, x1, zeros, C, C1, DOT)
                    if SUMS:
                        d0 = dot(transposed(s, c0, r, C), v, d0, DOT)
                        if C1 > 0:
                            d1 = dot(transposed(s, c1, r, C), v, d1, DOT)
                    if RESULTS:
                        dv = product(s, r, c0, c1, k0, k1, zeros, C, C1, DOT)
                        dv = tl.where(v > 0.0, dv, 0.0)
                        x_grad0 = dot(transposed(wv, c0, r, C), dv, x_grad0, DOT)
                        if C1 > 0:
                            x_grad1 = dot(transposed(wv, c1, r, C), dv, x_grad1, DOT)
                if SUMS:
                    d0 = d0 * feature_map_slope(gamma0 * y0 + beta0, "softplus", EXACT)
                    d0 = tl.where(valid[None, :], d0, 0.0)
                    a0 += tl.sum(d0, 1)
                    b0 += tl.sum(d0 * y0, 1)
                    if C1 > 0:
                        d1 = d1 * feature_map_slope(gamma1 * y1 + beta1, "softplus", EXACT)
                        d1 = tl.where(valid[None, :], d1, 0.0)
                        a1 += tl.sum(d1, 1)
                        b1 += tl.sum(d1 * y1, 1)
                    zeros = tl.zeros([R0, BN], tl.float32)
                    v = first_layer(wv, bias + C, r0, c0, c1, x0, x1, zeros, C, C1, DOT)
                    dv0 = product(s, r0, c0, c1, k0, k1, zeros, C, C1, DOT)
                    dv0 = tl.where((v > 0.0) & valid[None, :], dv0, 0.0)
                    v0 += tl.sum(dv0, 1)
                    dv1 = dv0
                    if R1 > 0:
                        zeros = tl.zeros([R1, BN], tl.float32)
                        v = first_layer(wv, bias + C, r1, c0, c1, x0, x1, zeros, C, C1, DOT)
                        dv1 = product(s, r1, c0, c1, k0, k1, zeros, C, C1, DOT)
                        dv1 = tl.where((v > 0.0) & valid[None, :], dv1, 0.0)
                        v1 += tl.sum(dv1, 1)
                    s00, s01, s10, s11 = outer(
                        dv0, dv1, x0, x1, s00, s01, s10, s11, R1, C1, DOT
                    )  # fmt: skip
                if RESULTS:
                    add_tile(
                        table, result, batch, c0, c1, n, valid, x_grad0, x_grad1, C, C1, D_MINOR,
                        D_VECTOR, D_WIDE,
                    )  # fmt: skip
            if SUMS:
                part = (tl.load(table + starts + pair) + split) * batch_size + batch
                out = parts + part * (C + 1) * C
                store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
                store_vector(out + C * C, r0, r1, v0, v1, C, R1)
                if group == 0:
                    store_vector(sums + part * 2 * C, c0, c1, a0, a1, C, C1)
                    store_vector(sums + part * 2 * C + C, c0, c1, b0, b1, C, C1)
            tl.debug_barrier()
