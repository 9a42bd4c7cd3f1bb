# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of gradients of layers: of both of queries or keys, and of that of values.

They add to the gradients of features, where other pairs of a slot add as well. So their programs
are for a list of pairs of one slot, which they go through one after the other: pairs of a list
never run at the same time, and the result does not depend on who comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    extent,
    feature_map_slope,
    multiple,
    slot_tokens,
    softplus,
)
from xattn_kernels.engines.triton.training_maths import (
    add_tile,
    attention_gradient,
    centred,
    columns,
    first_layer,
    outer,
    product,
    product_transposed,
    second_layer,
    store_sums,
    store_vector,
    vector,
)


@triton.jit(
    do_not_specialize=[
        "features", "lists", "gradients", "eps", "jobs", "results", "starts", "batch_size",
        "splits", "chunk",
    ]
)  # fmt: skip
def gradient_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    state_s,
    state_z,
    mean,
    coefficients,
    parts,
    features: tl.int32,
    lists: tl.int32,
    gradients: tl.int32,
    eps: tl.float32,
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
    SOURCE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RESULTS: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
    G_MINOR: tl.constexpr,
    G_VECTOR: tl.constexpr,
    G_WIDE: tl.constexpr,
    D_MINOR: tl.constexpr,
    D_VECTOR: tl.constexpr,
    D_WIDE: tl.constexpr,
):
    """parts[start(pair) + split, b]: (2 C + 1, C) of a chunk: (sum e h^T)^T, da1 x^T, da1.

    For a source the states are dS and dZ of the pair, which give dk^ with the values; for a target
    those of its outputs, which give dq^ with the gradients of these.
    """
    EXACT: tl.constexpr = DOT == "ieee"
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    P: tl.constexpr = C0 + C1
    LAYERS: tl.constexpr = 2 if SOURCE else 1
    pid = tl.program_id(0)
    group = 0
    if FIRST or SECOND:
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
        end = extent(end, X_MINOR, min(X_VECTOR, min(G_VECTOR, D_VECTOR)))
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
            w1 = first + pair * LAYERS * P * P
            bias = first_bias + pair * LAYERS * C
            w2 = second + pair * P * P
            shift = affine + pair * 3 * C
            gamma0 = vector(shift + C, c0, C)
            beta0 = vector(shift + 2 * C, c0, C)
            constant0 = vector(coefficients + pair * 2 * C, c0, C)
            slope0 = vector(coefficients + pair * 2 * C + C, c0, C)
            b0 = tl.zeros([R0], tl.float32)
            s00 = tl.zeros([R0, C0], tl.float32)
            t00 = tl.zeros([R0, C0], tl.float32)
            b1 = b0
            s01 = s00
            s10 = s00
            s11 = s00
            t01 = t00
            t10 = t00
            t11 = t00
            if C1 > 0:
                gamma1 = vector(shift + C, c1, C)
                beta1 = vector(shift + 2 * C, c1, C)
                constant1 = vector(coefficients + pair * 2 * C, c1, C)
                slope1 = vector(coefficients + pair * 2 * C + C, c1, C)
                s01 = tl.zeros([R0, C1], tl.float32)
                t01 = tl.zeros([R0, C1], tl.float32)
            if R1 > 0:
                b1 = tl.zeros([R1], tl.float32)
                s10 = tl.zeros([R1, C0], tl.float32)
                t10 = tl.zeros([R1, C0], tl.float32)
                if C1 > 0:
                    s11 = tl.zeros([R1, C1], tl.float32)
                    t11 = tl.zeros([R1, C1], tl.float32)
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
                if SOURCE:
                    s = state_s + (pair * batch_size + batch) * P * P
                    z = state_z + (pair * batch_size + batch) * C
                    e0 = tl.zeros([C0, BN], tl.float32) + vector(z, c0, C)
                    e1 = e0
                    if C1 > 0:
                        e1 = tl.zeros([C1, BN], tl.float32) + vector(z, c1, C)
                    for k in range(0, C, BK):
                        r = k + tl.arange(0, BK)
                        zeros = tl.zeros([BK, BN], tl.float32)
                        v = first_layer(
                            w1 + P * P, bias + C, r, c0, c1, x0, x1, zeros, C, P, C1, DOT
                        )  # fmt: skip
                        e0, e1 = columns(s, c0, c1, r, v, e0, e1, P, C1, DOT)
                else:
                    e0 = tl.zeros([C0, BN], tl.float32)
                    e1 = e0
                    q0 = softplus(gamma0 * y0 + beta0, EXACT)
                    q1 = q0
                    if C1 > 0:
                        e1 = tl.zeros([C1, BN], tl.float32)
                        q1 = softplus(gamma1 * y1 + beta1, EXACT)
                    first_output = tl.load(table + lists + pair).to(tl.int32)
                    last_output = tl.load(table + lists + pair + 1).to(tl.int32)
                    for i in range(first_output, last_output):
                        output = tl.load(table + lists + i)
                        place = output * batch_size + batch
                        d0, d1, _w, _u = attention_gradient(
                            table, gradients + output.to(tl.int32) * 5, batch,
                            state_s + place * P * P, state_z + place * C, mean + place * C, q0, q1,
                            c0, c1, n, valid, eps, C, C0, C1, BK, BN, DOT, DT, SIZE, G_MINOR,
                            G_VECTOR, G_WIDE,
                        )  # fmt: skip
                        e0 += d0
                        if C1 > 0:
                            e1 += d1
                e0 = e0 * feature_map_slope(gamma0 * y0 + beta0, "softplus", EXACT)
                e0 = tl.where(valid[None, :], gamma0 * e0 - constant0 - slope0 * y0, 0.0)
                if C1 > 0:
                    e1 = e1 * feature_map_slope(gamma1 * y1 + beta1, "softplus", EXACT)
                    e1 = tl.where(valid[None, :], gamma1 * e1 - constant1 - slope1 * y1, 0.0)
                d0 = tl.zeros([C0, BN], tl.float32)
                d1 = d0
                if C1 > 0:
                    d1 = tl.zeros([C1, BN], tl.float32)
                if FIRST or SECOND:
                    zeros = tl.zeros([R0, BN], tl.float32)
                    h = first_layer(w1, bias, r0, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                    if SECOND:
                        s00, s01 = outer(h, e0, e1, s00, s01, C1, DOT)
                    if FIRST:
                        da = product_transposed(w2, r0, c0, c1, e0, e1, zeros, P, C1, DOT)
                        da = tl.where(h > 0.0, da, 0.0)
                        b0 += tl.sum(da, 1)
                        t00, t01 = outer(da, x0, x1, t00, t01, C1, DOT)
                        if RESULTS and GROUPS == 1:
                            d0, d1 = columns(w1, c0, c1, r0, da, d0, d1, P, C1, DOT)
                    if R1 > 0:
                        zeros = tl.zeros([R1, BN], tl.float32)
                        h = first_layer(w1, bias, r1, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                        if SECOND:
                            s10, s11 = outer(h, e0, e1, s10, s11, C1, DOT)
                        if FIRST:
                            da = product_transposed(w2, r1, c0, c1, e0, e1, zeros, P, C1, DOT)
                            da = tl.where(h > 0.0, da, 0.0)
                            b1 += tl.sum(da, 1)
                            t10, t11 = outer(da, x0, x1, t10, t11, C1, DOT)
                            if RESULTS and GROUPS == 1:
                                d0, d1 = columns(w1, c0, c1, r1, da, d0, d1, P, C1, DOT)
                if RESULTS:
                    if not (FIRST and GROUPS == 1):
                        for k in range(0, C, BK):
                            r = k + tl.arange(0, BK)
                            zeros = tl.zeros([BK, BN], tl.float32)
                            h = first_layer(w1, bias, r, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                            da = product_transposed(w2, r, c0, c1, e0, e1, zeros, P, C1, DOT)
                            da = tl.where(h > 0.0, da, 0.0)
                            d0, d1 = columns(w1, c0, c1, r, da, d0, d1, P, C1, DOT)
                    add_tile(
                        table, result, batch, c0, c1, n, valid, d0, d1, C, C1, D_MINOR,
                        D_VECTOR, D_WIDE,
                    )  # fmt: skip
            part = (tl.load(table + starts + pair) + split) * batch_size + batch
            out = parts + part * (2 * C + 1) * C
            if SECOND:
                store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
            if FIRST:
                store_sums(out + C * C, r0, r1, c0, c1, t00, t01, t10, t11, C, R1, C1)
                store_vector(out + 2 * C * C, r0, r1, b0, b1, C, R1)
            tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "features", "jobs", "results", "starts", "batch_size", "splits", "chunk"
    ]
)  # fmt: skip
def value_gradient_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    grad_s,
    parts,
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
    """parts[start(pair) + split, b]: (C + 1, C) of a chunk, da_v below da_v x^T."""
    EXACT: tl.constexpr = DOT == "ieee"
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    P: tl.constexpr = C0 + C1
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
            wv = first + pair * 2 * P * P + P * P
            bias = first_bias + pair * 2 * C
            shift = affine + pair * 3 * C
            s = grad_s + (pair * batch_size + batch) * P * P
            gamma0 = vector(shift + C, c0, C)
            beta0 = vector(shift + 2 * C, c0, C)
            b0 = tl.zeros([R0], tl.float32)
            s00 = tl.zeros([R0, C0], tl.float32)
            b1 = b0
            s01 = s00
            s10 = s00
            s11 = s00
            if C1 > 0:
                gamma1 = vector(shift + C, c1, C)
                beta1 = vector(shift + 2 * C, c1, C)
                s01 = tl.zeros([R0, C1], tl.float32)
            if R1 > 0:
                b1 = tl.zeros([R1], tl.float32)
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
                k0, k1 = second_layer(
                    wv - P * P, bias, second + pair * P * P, shift, c0, c1, x0, x1, C, C0, C1, BK,
                    BN, DOT,
                )  # fmt: skip
                k0 = softplus(gamma0 * k0 + beta0, EXACT)
                d0 = tl.zeros([C0, BN], tl.float32)
                d1 = d0
                if C1 > 0:
                    k1 = softplus(gamma1 * k1 + beta1, EXACT)
                    d1 = tl.zeros([C1, BN], tl.float32)
                if SUMS:
                    zeros = tl.zeros([R0, BN], tl.float32)
                    v = first_layer(wv, bias + C, r0, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                    dv = product(s, r0, c0, c1, k0, k1, zeros, P, C1, DOT)
                    dv = tl.where((v > 0.0) & valid[None, :], dv, 0.0)
                    b0 += tl.sum(dv, 1)
                    s00, s01 = outer(dv, x0, x1, s00, s01, C1, DOT)
                    if RESULTS and GROUPS == 1:
                        d0, d1 = columns(wv, c0, c1, r0, dv, d0, d1, P, C1, DOT)
                    if R1 > 0:
                        zeros = tl.zeros([R1, BN], tl.float32)
                        v = first_layer(wv, bias + C, r1, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                        dv = product(s, r1, c0, c1, k0, k1, zeros, P, C1, DOT)
                        dv = tl.where((v > 0.0) & valid[None, :], dv, 0.0)
                        b1 += tl.sum(dv, 1)
                        s10, s11 = outer(dv, x0, x1, s10, s11, C1, DOT)
                        if RESULTS and GROUPS == 1:
                            d0, d1 = columns(wv, c0, c1, r1, dv, d0, d1, P, C1, DOT)
                if RESULTS:
                    if not (SUMS and GROUPS == 1):
                        for k in range(0, C, BK):
                            r = k + tl.arange(0, BK)
                            zeros = tl.zeros([BK, BN], tl.float32)
                            v = first_layer(wv, bias + C, r, c0, c1, x0, x1, zeros, C, P, C1, DOT)
                            dv = product(s, r, c0, c1, k0, k1, zeros, P, C1, DOT)
                            dv = tl.where(v > 0.0, dv, 0.0)
                            d0, d1 = columns(wv, c0, c1, r, dv, d0, d1, P, C1, DOT)
                    add_tile(
                        table, result, batch, c0, c1, n, valid, d0, d1, C, C1, D_MINOR,
                        D_VECTOR, D_WIDE,
                    )  # fmt: skip
            if SUMS:
                part = (tl.load(table + starts + pair) + split) * batch_size + batch
                out = parts + part * (C + 1) * C
                store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
                store_vector(out + C * C, r0, r1, b0, b1, C, R1)
            tl.debug_barrier()
