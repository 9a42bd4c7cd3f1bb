# mypy: disable-error-code="import-untyped,no-untyped-def,no-untyped-call"
"""Kernels of linear cross-attention: states and outputs. Tiles are (channels, tokens).

Widths are split, not padded.

* ``state_kernel``: S = sum_n w_n v_n phi(k_n)^T over a chunk of the tokens of one slot and sample,
  and below it, as its row Cv, Z = sum_n u_n phi(k_n). A program has a group of R0 + R1 rows and
  C0 + C1 columns in registers and runs through its chunk. w = u = 1 forward.
* ``reduce_kernel``: states from those of chunks, in a fixed order, for lists of slots.
* ``output_kernel``: out = S phi(q) / max(Z . phi(q), eps) for a tile of tokens and R0 + R1 rows;
  channels of q are run through in steps of BK.

Chunks depend on the number of tokens only, so that a result does not on what else is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xattn_kernels.engines.triton.maths import (
    dot,
    extent,
    load_tile,
    map_tile,
    multiple,
    slot_tokens,
    store_tile,
)


@triton.jit(
    do_not_specialize=["keys", "values", "starts", "batch_size", "splits", "chunk", "longest"]
)
def state_kernel(
    table,
    weights,
    parts,
    keys: tl.int32,
    values: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    splits: tl.int32,
    chunk: tl.int32,
    longest: tl.int32,
    C: tl.constexpr,
    CV: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BN: tl.constexpr,
    PHI: tl.constexpr,
    DOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    K_MINOR: tl.constexpr,
    K_VECTOR: tl.constexpr,
    K_WIDE: tl.constexpr,
    V_MINOR: tl.constexpr,
    V_VECTOR: tl.constexpr,
    V_WIDE: tl.constexpr,
):
    """parts[start(slot) + split, b]: (Cv + 1, C) of a chunk that is not empty."""
    ROW_GROUPS: tl.constexpr = (CV + R0 + R1 - 1) // (R0 + R1)
    COLUMN_GROUPS: tl.constexpr = (C + C0 + C1 - 1) // (C0 + C1)
    pid = tl.program_id(0)
    group = pid % (ROW_GROUPS * COLUMN_GROUPS)
    pid = pid // (ROW_GROUPS * COLUMN_GROUPS)
    split = pid % splits
    batch = (pid // splits) % batch_size
    slot = pid // splits // batch_size
    key = keys + slot * 5
    value = values + slot * 5
    tokens = slot_tokens(table, value)
    chunk = multiple(chunk, 256)
    begin = split * chunk
    if begin < tokens:
        end = extent(tl.minimum(tokens, begin + chunk), V_MINOR, min(K_VECTOR, V_VECTOR))
        row = (group // COLUMN_GROUPS) * (R0 + R1)
        column = (group % COLUMN_GROUPS) * (C0 + C1)
        r0 = row + tl.arange(0, R0)
        c0 = column + tl.arange(0, C0)
        s00 = tl.zeros([R0, C0], tl.float32)
        z0 = tl.zeros([C0], tl.float32)
        if R1 > 0:
            r1 = row + R0 + tl.arange(0, R1)
            s10 = tl.zeros([R1, C0], tl.float32)
        if C1 > 0:
            c1 = column + C0 + tl.arange(0, C1)
            s01 = tl.zeros([R0, C1], tl.float32)
            z1 = tl.zeros([C1], tl.float32)
        if R1 > 0 and C1 > 0:
            s11 = tl.zeros([R1, C1], tl.float32)
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            valid = n < end
            k0 = load_tile(table, key, batch, c0, n, valid, C, DT, SIZE, K_MINOR, K_VECTOR, K_WIDE)
            k0 = map_tile(k0, c0, valid, C, PHI, DOT)
            k0t = tl.trans(k0)
            v0 = load_tile(
                table, value, batch, r0, n, valid, CV, DT, SIZE, V_MINOR, V_VECTOR, V_WIDE
            )
            if WEIGHTED:
                place = weights + (slot.to(tl.int64) * batch_size + batch) * 2 * longest + n
                w = tl.load(place, mask=valid, other=0.0)
                u = tl.load(place + longest, mask=valid, other=0.0)
                v0 = v0 * w[None, :]
                z0 += tl.sum(k0 * u[None, :], 1)
            else:
                z0 += tl.sum(k0, 1)
            s00 = dot(v0, k0t, s00, DOT)
            if C1 > 0:
                k1 = load_tile(
                    table, key, batch, c1, n, valid, C, DT, SIZE, K_MINOR, K_VECTOR, K_WIDE
                )
                k1 = map_tile(k1, c1, valid, C, PHI, DOT)
                k1t = tl.trans(k1)
                if WEIGHTED:
                    z1 += tl.sum(k1 * u[None, :], 1)
                else:
                    z1 += tl.sum(k1, 1)
                s01 = dot(v0, k1t, s01, DOT)
            if R1 > 0:
                v1 = load_tile(
                    table, value, batch, r1, n, valid, CV, DT, SIZE, V_MINOR, V_VECTOR, V_WIDE
                )
                if WEIGHTED:
                    v1 = v1 * w[None, :]
                s10 = dot(v1, k0t, s10, DOT)
                if C1 > 0:
                    s11 = dot(v1, k1t, s11, DOT)
        part = tl.load(table + starts + slot) + split
        out = parts + (part * batch_size + batch) * (CV + 1) * C
        tl.store(out + r0[:, None] * C + c0[None, :], s00, (r0 < CV)[:, None] & (c0 < C)[None, :])
        if row == 0:
            tl.store(out + CV * C + c0, z0, c0 < C)
            if C1 > 0:
                tl.store(out + CV * C + c1, z1, c1 < C)
        if C1 > 0:
            mask = (r0 < CV)[:, None] & (c1 < C)[None, :]
            tl.store(out + r0[:, None] * C + c1[None, :], s01, mask)
        if R1 > 0:
            mask = (r1 < CV)[:, None] & (c0 < C)[None, :]
            tl.store(out + r1[:, None] * C + c0[None, :], s10, mask)
            if C1 > 0:
                mask = (r1 < CV)[:, None] & (c1 < C)[None, :]
                tl.store(out + r1[:, None] * C + c1[None, :], s11, mask)


@triton.jit(do_not_specialize=["lists", "starts", "batch_size"])
def reduce_kernel(
    table,
    parts,
    initial_s,
    initial_z,
    out_s,
    out_z,
    lists: tl.int32,
    starts: tl.int32,
    batch_size: tl.int32,
    C: tl.constexpr,
    CV: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_Z: tl.constexpr,
    BY_MEMBER: tl.constexpr,
):
    """out[i] = sum of the parts of all slots in list i, plus initial[i] or those of its members."""
    STATE: tl.constexpr = CV * C
    TILES: tl.constexpr = (STATE + C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    e = (pid % TILES) * BLOCK + tl.arange(0, BLOCK)
    batch = (pid // TILES) % batch_size
    i = pid // TILES // batch_size
    is_s = e < STATE
    is_z = (e >= STATE) & (e < STATE + C)
    total = tl.zeros([BLOCK], tl.float32)
    place = i.to(tl.int64) * batch_size + batch
    if not BY_MEMBER:
        if HAS_S:
            total += tl.load(initial_s + place * STATE + e, mask=is_s, other=0.0)
        if HAS_Z:
            total += tl.load(initial_z + place * C + (e - STATE), mask=is_z, other=0.0)
    step = batch_size.to(tl.int64)
    first = tl.load(table + lists + i).to(tl.int32)
    last = tl.load(table + lists + i + 1).to(tl.int32)
    for member in range(first, last):
        slot = tl.load(table + lists + member)
        if BY_MEMBER:
            theirs = slot * batch_size + batch
            if HAS_S:
                total += tl.load(initial_s + theirs * STATE + e, mask=is_s, other=0.0)
            if HAS_Z:
                total += tl.load(initial_z + theirs * C + (e - STATE), mask=is_z, other=0.0)
        begin = tl.load(table + starts + slot).to(tl.int32)
        end = tl.load(table + starts + slot + 1).to(tl.int32)
        for part in range(begin, end):
            offset = (part * step + batch) * (STATE + C)
            total += tl.load(parts + offset + e, mask=is_s | is_z, other=0.0)
    tl.store(out_s + place * STATE + e, total, mask=is_s)
    tl.store(out_z + place * C + (e - STATE), total, mask=is_z)


@triton.jit(do_not_specialize=["queries", "outputs", "batch_size", "tiles", "eps"])
def output_kernel(
    table,
    state_s,
    state_z,
    queries: tl.int32,
    outputs: tl.int32,
    batch_size: tl.int32,
    tiles: tl.int32,
    eps: tl.float32,
    C: tl.constexpr,
    CV: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    PHI: tl.constexpr,
    DOT: tl.constexpr,
    DT: tl.constexpr,
    SIZE: tl.constexpr,
    Q_MINOR: tl.constexpr,
    Q_VECTOR: tl.constexpr,
    Q_WIDE: tl.constexpr,
    O_MINOR: tl.constexpr,
    O_VECTOR: tl.constexpr,
    O_WIDE: tl.constexpr,
):
    """A tile of tokens of one output and sample."""
    ROW_GROUPS: tl.constexpr = (CV + R0 + R1 - 1) // (R0 + R1)
    pid = tl.program_id(0)
    row = (pid % ROW_GROUPS) * (R0 + R1)
    pid = pid // ROW_GROUPS
    tile = pid % tiles
    batch = (pid // tiles) % batch_size
    slot = pid // tiles // batch_size
    query = queries + slot * 5
    output = outputs + slot * 5
    tokens = extent(slot_tokens(table, query), Q_MINOR, min(Q_VECTOR, O_VECTOR))
    if tile * BM < tokens:
        n = tile * BM + tl.arange(0, BM)
        valid = n < tokens
        place = slot.to(tl.int64) * batch_size + batch
        s = state_s + place * CV * C
        z = state_z + place * C
        r0 = row + tl.arange(0, R0)
        a0 = tl.zeros([R0, BM], tl.float32)
        if R1 > 0:
            r1 = row + R0 + tl.arange(0, R1)
            a1 = tl.zeros([R1, BM], tl.float32)
        denominator = tl.zeros([BM], tl.float32)
        for k in range(0, C, BK):
            c = k + tl.arange(0, BK)
            q = load_tile(table, query, batch, c, n, valid, C, DT, SIZE, Q_MINOR, Q_VECTOR, Q_WIDE)
            q = map_tile(q, c, valid, C, PHI, DOT)
            denominator += tl.sum(tl.load(z + c, mask=c < C, other=0.0)[:, None] * q, 0)
            inner = (c < C)[None, :]
            s0 = tl.load(
                s + r0[:, None] * C + c[None, :], mask=(r0 < CV)[:, None] & inner, other=0.0
            )
            a0 = dot(s0, q, a0, DOT)
            if R1 > 0:
                s1 = tl.load(
                    s + r1[:, None] * C + c[None, :], mask=(r1 < CV)[:, None] & inner, other=0.0
                )
                a1 = dot(s1, q, a1, DOT)
        denominator = tl.where(denominator < eps, eps, denominator)[None, :]
        store_tile(
            table, output, batch, r0, n, valid, a0 / denominator, CV, DT, SIZE, O_MINOR, O_VECTOR,
            O_WIDE,
        )  # fmt: skip
        if R1 > 0:
            store_tile(
                table, output, batch, r1, n, valid, a1 / denominator, CV, DT, SIZE, O_MINOR,
                O_VECTOR, O_WIDE,
            )  # fmt: skip
