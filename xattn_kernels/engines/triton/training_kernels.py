# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of the cross-attention block in training: statistics, states, outputs.

Features, centred, are read in tiles of tokens, from which everything else is computed again. A
kernel that sums over tokens goes through a chunk of them and writes the sum of that; chunks are
summed, or for moments merged, in a second launch and in a fixed order.

* ``moments_kernel``: mean of a chunk and, about it, sum (x - mean)(x - mean)^T, for R0 + R1 rows.
* ``hidden_kernel``: mean and sum of squared deviations of the channels of W_2 h over a chunk.
* ``merge_kernel``: moments of chunks to those of samples, by Chan's formula.
* ``state_kernel``: S = sum v k^T and Z = sum k over a chunk, for R0 + R1 rows (values).
* ``attend_kernel``: q once for all outputs of a pair, then these in steps of BR rows.
* ``affine_kernel``: adds M x + v to a gradient in steps of BR rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    dot,
    extent,
    load_tile,
    multiple,
    slot_tokens,
    softplus,
    store_tile,
)
from xattn_kernels.engines.triton.training_maths import (
    centred,
    centred_piece,
    first_layer,
    matrix,
    outer,
    product,
    second_layer,
    store_sums,
    store_vector,
    vector,
)


@triton.jit(do_not_specialize=["features", "starts", "batch_size", "splits", "chunk"])
def moments_kernel(
    table,
    parts,
    features: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    X_MINOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    X_WIDE: tl.constexpr,
):
    """parts[start(slot) + split, b]: (C + 1, C) of a chunk, the mean below the deviations."""
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    pid = tl.program_id(0)
    group = pid % GROUPS
    pid = pid // GROUPS
    split = pid % splits
    batch = (pid // splits) % batch_size
    slot = pid // splits // batch_size
    feature = features + slot * 5
    tokens = slot_tokens(table, feature)
    begin = split * multiple(chunk, 256)
    if begin < tokens:
        stop = tl.minimum(tokens, begin + multiple(chunk, 256))
        end = extent(stop, X_MINOR, X_VECTOR)
        c0 = tl.arange(0, C0)
        c1 = c0
        r0 = group * (R0 + R1) + tl.arange(0, R0)
        r1 = r0
        mean0 = tl.zeros([C0], tl.float32)
        mean1 = mean0
        row0 = tl.zeros([R0], tl.float32)
        row1 = row0
        s00 = tl.zeros([R0, C0], tl.float32)
        s01 = s00
        s10 = s00
        s11 = s00
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            mean1 = tl.zeros([C1], tl.float32)
            s01 = tl.zeros([R0, C1], tl.float32)
        if R1 > 0:
            r1 = group * (R0 + R1) + R0 + tl.arange(0, R1)
            row1 = tl.zeros([R1], tl.float32)
            s10 = tl.zeros([R1, C0], tl.float32)
            if C1 > 0:
                s11 = tl.zeros([R1, C1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x = load_tile(
                table, feature, batch, c0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
            )
            mean0 += tl.sum(x, 1)
            if C1 > 0:
                x = load_tile(
                    table, feature, batch, c1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                )
                mean1 += tl.sum(x, 1)
            if GROUPS > 1:
                x = load_tile(
                    table, feature, batch, r0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                )
                row0 += tl.sum(x, 1)
                if R1 > 0:
                    x = load_tile(
                        table, feature, batch, r1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                    )
                    row1 += tl.sum(x, 1)
        count = (stop - begin).to(tl.float32)
        mean0 = mean0 / count
        mean1 = mean1 / count
        row0 = row0 / count
        row1 = row1 / count
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x0 = load_tile(
                table, feature, batch, c0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
            )
            x0 = tl.where(valid[None, :], x0 - mean0[:, None], 0.0)
            x1 = x0
            if C1 > 0:
                x1 = load_tile(
                    table, feature, batch, c1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                )
                x1 = tl.where(valid[None, :], x1 - mean1[:, None], 0.0)
            y0 = x0
            y1 = x1
            if GROUPS > 1:
                y0 = load_tile(
                    table, feature, batch, r0, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                )
                y0 = tl.where(valid[None, :], y0 - row0[:, None], 0.0)
                if R1 > 0:
                    y1 = load_tile(
                        table, feature, batch, r1, n, valid, C, DT, SIZE, X_MINOR, X_VECTOR, X_WIDE
                    )
                    y1 = tl.where(valid[None, :], y1 - row1[:, None], 0.0)
            s00, s01 = outer(y0, x0, x1, s00, s01, C1, DOT)
            if R1 > 0:
                s10, s11 = outer(y1, x0, x1, s10, s11, C1, DOT)
        part = tl.load(table + starts + slot) + split
        out = parts + (part * batch_size + batch) * (C + 1) * C
        store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
        if group == 0:
            store_vector(out + C * C, c0, c1, mean0, mean1, C, C1)


@triton.jit(do_not_specialize=["features", "pairs", "starts", "batch_size", "chunk"])
def merge_kernel(
    table,
    parts,
    mean,
    deviations,
    features: tl.int32,
    pairs: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    chunk: tl.int32,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean (C) and deviations (ROWS, C) of a pair and sample: ROWS is C, or 1 for the diagonal."""
    TILES: tl.constexpr = (ROWS * C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    e = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    batch = (pid // TILES) % batch_size
    i = pid // TILES // batch_size
    tokens = slot_tokens(table, features + tl.load(table + pairs + i).to(tl.int32) * 5)
    inside = e < ROWS * C
    column = e % C
    row = e // C if ROWS > 1 else column
    begin = tl.load(table + starts + i).to(tl.int32)
    end = tl.load(table + starts + i + 1).to(tl.int32)
    step = batch_size.to(tl.int64)
    mean_row = tl.zeros([BLOCK], tl.float32)
    mean_column = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([1], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(begin, end):
        out = parts + (part * step + batch) * (ROWS + 1) * C
        n = tl.minimum(tokens - (part - begin) * chunk, chunk).to(tl.float32)
        fraction = n / (count + n)
        along_row = tl.load(out + ROWS * C + row, mask=inside, other=0.0) - mean_row
        along_column = tl.load(out + ROWS * C + column, mask=inside, other=0.0) - mean_column
        total += tl.load(out + e, mask=inside, other=0.0)
        total += along_row * along_column * (count * fraction)
        mean_row += along_row * fraction
        mean_column += along_column * fraction
        count += n
    place = i.to(tl.int64) * batch_size + batch
    tl.store(deviations + place * ROWS * C + e, total, mask=inside)
    tl.store(mean + place * C + e, mean_column, mask=e < C)


@triton.jit(do_not_specialize=["features", "pairs", "starts", "batch_size", "splits", "chunk"])
def hidden_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    parts,
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
    """parts[start(pair) + split, b]: (2, C) of a chunk, the mean below the deviations."""
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
        stop = tl.minimum(tokens, begin + multiple(chunk, 256))
        end = extent(stop, X_MINOR, X_VECTOR)
        center += slot * C
        first += pair.to(tl.int64) * P * P
        first_bias += pair * C
        second += pair.to(tl.int64) * P * P
        c0 = tl.arange(0, C0)
        c1 = c0
        mean0 = tl.zeros([C0], tl.float32)
        total0 = tl.zeros([C0], tl.float32)
        mean1 = mean0
        total1 = total0
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            mean1 = tl.zeros([C1], tl.float32)
            total1 = tl.zeros([C1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            x0, x1 = centred(
                table, feature, batch, center, c0, c1, n, valid, C, C1, DT, SIZE, X_MINOR,
                X_VECTOR, X_WIDE,
            )  # fmt: skip
            y0, y1 = second_layer(
                first, first_bias, second, first_bias, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT, False
            )
            here = tl.minimum(stop - n0, BN).to(tl.float32)
            before = (n0 - begin).to(tl.float32)
            fraction = here / (before + here)
            own = tl.sum(tl.where(valid[None, :], y0, 0.0), 1) / here
            y0 = tl.where(valid[None, :], y0 - own[:, None], 0.0)
            own -= mean0
            total0 += tl.sum(y0 * y0, 1) + own * own * (before * fraction)
            mean0 += own * fraction
            if C1 > 0:
                own = tl.sum(tl.where(valid[None, :], y1, 0.0), 1) / here
                y1 = tl.where(valid[None, :], y1 - own[:, None], 0.0)
                own -= mean1
                total1 += tl.sum(y1 * y1, 1) + own * own * (before * fraction)
                mean1 += own * fraction
        part = tl.load(table + starts + pair) + split
        out = parts + (part * batch_size + batch) * 2 * C
        store_vector(out, c0, c1, total0, total1, C, C1)
        store_vector(out + C, c0, c1, mean0, mean1, C, C1)


@triton.jit(do_not_specialize=["features", "pairs", "starts", "batch_size", "splits", "chunk"])
def state_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
    parts,
    features: tl.int32,
    pairs: tl.int32,
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
):
    """parts[start(pair) + split, b]: (C + 1, C) of a chunk, Z below S."""
    EXACT: tl.constexpr = DOT == "ieee"
    GROUPS: tl.constexpr = (C + R0 + R1 - 1) // (R0 + R1)
    P: tl.constexpr = C0 + C1
    pid = tl.program_id(0)
    group = pid % GROUPS
    pid = pid // GROUPS
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
        c0 = tl.arange(0, C0)
        c1 = c0
        r0 = group * (R0 + R1) + tl.arange(0, R0)
        r1 = r0
        gamma0 = vector(affine + C, c0, C)
        beta0 = vector(affine + 2 * C, c0, C)
        z0 = tl.zeros([C0], tl.float32)
        z1 = z0
        s00 = tl.zeros([R0, C0], tl.float32)
        s01 = s00
        s10 = s00
        s11 = s00
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
            gamma1 = vector(affine + C, c1, C)
            beta1 = vector(affine + 2 * C, c1, C)
            z1 = tl.zeros([C1], tl.float32)
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
            k0, k1 = second_layer(
                first, first_bias, second, affine, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT
            )
            k0 = tl.where(valid[None, :], softplus(gamma0 * k0 + beta0, EXACT), 0.0)
            z0 += tl.sum(k0, 1)
            if C1 > 0:
                k1 = tl.where(valid[None, :], softplus(gamma1 * k1 + beta1, EXACT), 0.0)
                z1 += tl.sum(k1, 1)
            zeros = tl.zeros([R0, BN], tl.float32)
            v = first_layer(first + P * P, first_bias + C, r0, c0, c1, x0, x1, zeros, C, P, C1, DOT)
            s00, s01 = outer(v, k0, k1, s00, s01, C1, DOT)
            if R1 > 0:
                zeros = tl.zeros([R1, BN], tl.float32)
                v = first_layer(
                    first + P * P, first_bias + C, r1, c0, c1, x0, x1, zeros, C, P, C1, DOT
                )
                s10, s11 = outer(v, k0, k1, s10, s11, C1, DOT)
        part = tl.load(table + starts + pair) + split
        out = parts + (part * batch_size + batch) * (C + 1) * C
        store_sums(out, r0, r1, c0, c1, s00, s01, s10, s11, C, R1, C1)
        if group == 0:
            store_vector(out + C * C, c0, c1, z0, z1, C, C1)


@triton.jit(
    do_not_specialize=["features", "pairs", "lists", "outputs", "batch_size", "tiles", "eps"]
)
def attend_kernel(
    table,
    center,
    first,
    first_bias,
    second,
    affine,
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
    C0: tl.constexpr,
    C1: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
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
    """A tile of tokens of one pair and sample, all of its outputs."""
    EXACT: tl.constexpr = DOT == "ieee"
    P: tl.constexpr = C0 + C1
    pid = tl.program_id(0)
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    pair = pid // tiles // batch_size
    slot = tl.load(table + pairs + pair)
    feature = features + slot.to(tl.int32) * 5
    tokens = slot_tokens(table, feature)
    if tile * BN < tokens:
        first += pair.to(tl.int64) * P * P
        first_bias += pair * C
        second += pair.to(tl.int64) * P * P
        affine += pair * 3 * C
        n = tile * BN + tl.arange(0, BN)
        valid = n < extent(tokens, X_MINOR, min(X_VECTOR, O_VECTOR))
        c0 = tl.arange(0, C0)
        c1 = c0
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)
        x0, x1 = centred(
            table, feature, batch, center + slot * C, c0, c1, n, valid, C, C1, DT, SIZE, X_MINOR,
            X_VECTOR, X_WIDE,
        )  # fmt: skip
        q0, q1 = second_layer(
            first, first_bias, second, affine, c0, c1, x0, x1, C, C0, C1, BK, BN, DOT
        )
        q0 = softplus(vector(affine + C, c0, C) * q0 + vector(affine + 2 * C, c0, C), EXACT)
        if C1 > 0:
            q1 = softplus(vector(affine + C, c1, C) * q1 + vector(affine + 2 * C, c1, C), EXACT)
        begin = tl.load(table + lists + pair).to(tl.int32)
        end = tl.load(table + lists + pair + 1).to(tl.int32)
        for member in range(begin, end):
            output = tl.load(table + lists + member)
            s = state_s + (output * batch_size + batch) * P * P
            z = state_z + (output * batch_size + batch) * C
            denominator = tl.sum(vector(z, c0, C) * q0, 0)
            if C1 > 0:
                denominator += tl.sum(vector(z, c1, C) * q1, 0)
            denominator = tl.where(denominator < eps, eps, denominator)
            place = outputs + output.to(tl.int32) * 5
            for k in range(0, C, BR):
                r = k + tl.arange(0, BR)
                zeros = tl.zeros([BR, BN], tl.float32)
                result = product(s, r, c0, c1, q0, q1, zeros, P, C1, DOT) / denominator[None, :]
                store_tile(
                    table, place, batch, r, n, valid, result, C, DT, SIZE, O_MINOR, O_VECTOR,
                    O_WIDE,
                )  # fmt: skip


@triton.jit(do_not_specialize=["features", "gradients", "batch_size", "tiles"])
def affine_kernel(
    table,
    center,
    weight,
    bias,
    features: tl.int32,
    gradients: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    C: tl.constexpr,
    P: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
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
    """BR rows of a tile of tokens of one slot and sample."""
    GROUPS: tl.constexpr = (C + BR - 1) // BR
    pid = tl.program_id(0)
    r = (pid % GROUPS) * BR + tl.arange(0, BR)
    pid = pid // GROUPS
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    slot = pid // tiles // batch_size
    feature = features + slot * 5
    gradient = gradients + slot * 5
    tokens = slot_tokens(table, gradient)
    if tile * BN < tokens:
        n = tile * BN + tl.arange(0, BN)
        valid = n < extent(tokens, X_MINOR, min(X_VECTOR, D_VECTOR))
        acc = tl.zeros([BR, BN], tl.float32) + vector(bias + slot * C, r, C)
        for k in range(0, C, BK):
            c = k + tl.arange(0, BK)
            x = centred_piece(
                table, feature, batch, center + slot * C, c, n, valid, C, DT, SIZE, X_MINOR,
                X_VECTOR, X_WIDE,
            )  # fmt: skip
            acc = dot(matrix(weight + slot.to(tl.int64) * P * P, r, c, P), x, acc, DOT)
        acc += load_tile(
            table, gradient, batch, r, n, valid, C, tl.float32, 4, D_MINOR, D_VECTOR, D_WIDE
        )
        store_tile(
            table, gradient, batch, r, n, valid, acc, C, tl.float32, 4, D_MINOR, D_VECTOR, D_WIDE
        )
